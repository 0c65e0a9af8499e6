//! Finding everything again: after a restart, and ever after.
//!
//! A crash can leave a record without a sandbox, a sandbox without a server, and pieces of a sandbox without a record.
//! The first two are settled at the start: before the first request is served every sandbox has its driver again,
//! although one that has to end may still be ending. The third is looked for again and again, because the same sweep
//! also catches what an unforeseen failure leaves behind.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use std::{fs, io};

use belljar_core::lifecycle::State;
use belljar_runtime::RunningSandbox;
use belljar_store::{SandboxRecord, StoreError};
use tracing::{error, info, warn};

use super::driver::{Beginning, beginning_without_sandbox};
use super::manager::Manager;

/// Between two sweeps.
const SWEEP_INTERVAL: Duration = Duration::from_secs(30);

/// The state of the last run could not be settled, so the server must not start.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RecoveryError {
    #[error("the records of the last run can't be read")]
    Store(#[from] StoreError),
    #[error("the kernel doesn't say which boot this is")]
    BootId(#[source] io::Error),
}

impl Manager {
    /// Takes over what the last run left. To be called once, before the first request.
    pub(crate) async fn recover(&self, boot_id_file: &Path) -> Result<(), RecoveryError> {
        let boot = Boot::present(boot_id_file).map_err(RecoveryError::BootId)?;
        let records = self.shared.store.live_sandboxes().await?;
        let (mut found, mut gone) = (0, 0);
        for record in records {
            let sandbox = match record.state {
                State::Running => self.adopt(&record).await,
                State::Creating | State::Ending(_) | State::Ended(_) => None,
            };
            let beginning = match sandbox {
                Some(sandbox) => {
                    found += 1;
                    Beginning::Adopted(sandbox)
                }
                None => {
                    gone += 1;
                    beginning_without_sandbox(record.state, boot.is_another)
                }
            };
            self.shared.take_over(record, beginning);
        }
        boot.note(boot_id_file).map_err(RecoveryError::BootId)?;
        self.sweep().await;
        if found + gone > 0 {
            info!(found, gone, "sandboxes of the last run are settled");
        }
        Ok(())
    }

    /// The sandbox of a record, if it still runs. One that can't be looked at is given up, for the others' sake: the
    /// runtime has tried again by then.
    async fn adopt(&self, record: &SandboxRecord) -> Option<Arc<dyn RunningSandbox>> {
        self.shared.runtime.adopt(&self.shared.spec_of(record)).await.unwrap_or_else(|failure| {
            let failure = &failure as &dyn std::error::Error;
            error!(sandbox_id = %record.id, error = failure, "the sandbox can't be taken over and is ended");
            None
        })
    }

    /// Sweeps until the server stops.
    pub(crate) async fn sweep_periodically(self) {
        while self.shared.stopping.run_until_cancelled(tokio::time::sleep(SWEEP_INTERVAL)).await.is_some() {
            self.sweep().await;
        }
    }

    /// Puts right what the host changed, and removes what has no owner. What fails doesn't keep the rest from being
    /// done; the next sweep tries again.
    async fn sweep(&self) {
        let failed = |what: &str, error: &(dyn std::error::Error + 'static)| warn!(error, "the sweep could not {what}");
        if let Err(error) = self.shared.runtime.reconcile().await {
            failed("put the host right", &error);
        }
        // What exists is looked up before who is known: a sandbox enters the registry before anything of it exists.
        match self.shared.runtime.owned().await {
            Ok(owned) => {
                for id in owned.into_iter().filter(|id| !self.shared.knows(id)) {
                    info!(sandbox_id = %id, "removing what has no owner");
                    if let Err(error) = self.shared.runtime.destroy(&id).await {
                        failed("remove what has no owner", &error);
                    }
                }
            }
            Err(error) => failed("list what there is", &error),
        }
        if let Err(error) = self.shared.store.forget_what_is_old().await {
            failed("forget what is old", &error);
        }
    }
}

/// Which boot of the host this is.
#[derive(Debug)]
struct Boot {
    id: String,
    /// The server has run here before, in another one.
    is_another: bool,
}

impl Boot {
    fn present(file: &Path) -> io::Result<Self> {
        let id = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
        let is_another = fs::read_to_string(file).is_ok_and(|last| last != id);
        Ok(Self { id, is_another })
    }

    /// To be called once the records have been settled: a crash before that must find the question open.
    fn note(&self, file: &Path) -> io::Result<()> {
        let partial = file.with_extension("partial");
        fs::write(&partial, &self.id)?;
        fs::rename(partial, file)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_boot_is_noticed_once() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let file = directory.path().join("boot-id");
        let boot = Boot::present(&file).expect("the kernel says");
        assert!(!boot.is_another, "nothing is known of the boot before the first run");
        boot.note(&file).expect("noted");
        assert!(!Boot::present(&file).expect("the kernel says").is_another);
        fs::write(&file, "another boot").expect("written");
        let boot = Boot::present(&file).expect("the kernel says");
        assert!(boot.is_another && Boot::present(&file).expect("the kernel says").is_another, "until it is noted");
        boot.note(&file).expect("noted");
        assert!(!Boot::present(&file).expect("the kernel says").is_another);
    }
}
