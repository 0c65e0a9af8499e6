//! Finding everything again: after a restart, and ever after.
//!
//! A crash can leave a record without a sandbox, a sandbox without a server, and pieces of a sandbox without a record. The
//! first two are settled once, before the first request is served; the third is looked for again and again, because the
//! same sweep also catches what an unforeseen failure leaves behind.

use std::path::Path;
use std::time::Duration;

use belljar_core::lifecycle::State;
use belljar_runtime::RuntimeError;
use belljar_store::StoreError;
use tracing::{info, warn};

use super::driver::{Beginning, beginning_without_sandbox};
use super::manager::Manager;

/// Between two sweeps.
const SWEEP_INTERVAL: Duration = Duration::from_secs(30);

/// The state of the last run could not be settled, so the server must not start.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RecoveryError {
    #[error("the records of the last run can't be read")]
    Store(#[from] StoreError),
    #[error("the sandboxes of the last run can't be looked at")]
    Runtime(#[from] RuntimeError),
    #[error("the kernel doesn't say which boot this is")]
    BootId(#[source] std::io::Error),
}

impl Manager {
    /// Takes over what the last run left. To be called once, before the first request.
    pub(crate) async fn recover(&self, boot_id_file: &Path) -> Result<(), RecoveryError> {
        let host_restarted = note_boot(boot_id_file).map_err(RecoveryError::BootId)?;
        let records = self.shared.store.live_sandboxes().await?;
        let (mut found, mut gone) = (0, 0);
        for record in records {
            let sandbox = match record.state {
                State::Running => self.shared.runtime.adopt(&self.shared.spec_of(&record)).await?,
                State::Creating | State::Ending(_) | State::Ended(_) => None,
            };
            let beginning = match sandbox {
                Some(sandbox) => {
                    found += 1;
                    Beginning::Adopted(sandbox)
                }
                None => {
                    gone += 1;
                    beginning_without_sandbox(record.state, host_restarted)
                }
            };
            self.shared.take_over(record, beginning);
        }
        self.sweep().await?;
        if found + gone > 0 {
            info!(found, gone, "sandboxes of the last run are settled");
        }
        Ok(())
    }

    /// Sweeps until the server stops.
    pub(crate) async fn sweep_periodically(self) {
        while self.shared.stopping.run_until_cancelled(tokio::time::sleep(SWEEP_INTERVAL)).await.is_some() {
            if let Err(error) = self.sweep().await {
                warn!(error = &error as &dyn std::error::Error, "the sweep failed; the next one tries again");
            }
        }
    }

    /// Removes what has no owner, and puts right what the host changed.
    async fn sweep(&self) -> Result<(), RecoveryError> {
        // What exists is looked up before who is known: a sandbox enters the registry before anything of it exists.
        for id in self.shared.runtime.owned().await? {
            if !self.shared.knows(&id) {
                info!(sandbox_id = %id, "removing what has no owner");
                self.shared.runtime.destroy(&id).await?;
            }
        }
        self.shared.runtime.reconcile().await?;
        self.shared.store.forget_old_idempotency_keys().await?;
        Ok(())
    }
}

/// Whether the host was started anew since the last call; notes the present boot.
fn note_boot(file: &Path) -> std::io::Result<bool> {
    let present = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    let last = std::fs::read_to_string(file).ok();
    std::fs::write(file, &present)?;
    Ok(last.is_some_and(|last| last != present))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_boot_is_noticed_once() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let file = directory.path().join("boot-id");
        assert!(!note_boot(&file).expect("noted"), "nothing is known of the boot before the first run");
        assert!(!note_boot(&file).expect("noted"));
        std::fs::write(&file, "another boot").expect("written");
        assert!(note_boot(&file).expect("noted"));
    }
}
