//! The sentry as a process of the host, identified so that a recycled process id is never mistaken for it.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use nix::errno::Errno;
use serde::{Deserialize, Serialize};
use tokio::io::unix::AsyncFd;

use super::sys;
use crate::cgroup::{Cgroup, CgroupError};

/// What names a process for good: its id, which is used again, and the time at which it started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProcessIdentity {
    pub pid: i32,
    /// Since the host was booted, in the kernel's ticks.
    pub start_time_ticks: u64,
}

/// A live process, or one that was alive when this was made.
#[derive(Debug, Clone)]
pub(super) struct Process {
    pub(super) identity: ProcessIdentity,
    /// Registered once, here: who waits for the end needs no descriptor of its own, of which there may be none left.
    descriptor: Arc<AsyncFd<OwnedFd>>,
}

#[derive(Debug, thiserror::Error)]
pub(super) enum ProcessError {
    #[error("could not look at process {pid}")]
    Io {
        pid: i32,
        #[source]
        source: io::Error,
    },
    #[error("could not list the sandbox's processes")]
    Cgroup(#[source] CgroupError),
}

impl Process {
    /// The process of this id, if it is alive and one of the cgroup's.
    ///
    /// Membership is the proof that it is the sandbox's: only what belljar starts joins the group.
    ///
    /// # Panics
    /// Outside of an async runtime.
    pub(super) fn find(pid: i32, cgroup: &Cgroup) -> Result<Option<Self>, ProcessError> {
        let descriptor = match sys::open_process(pid) {
            Ok(descriptor) => descriptor,
            Err(Errno::ESRCH) => return Ok(None),
            Err(error) => return Err(ProcessError::Io { pid, source: error.into() }),
        };
        if !cgroup.processes().map_err(ProcessError::Cgroup)?.contains(&pid) {
            return Ok(None);
        }
        let start_time_ticks = match start_time_ticks(pid) {
            Ok(ticks) => ticks,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(ProcessError::Io { pid, source }),
        };
        // What was read above is of this process only if the id was never free since the descriptor was opened.
        if sys::has_ended(&descriptor).map_err(|error| ProcessError::Io { pid, source: error.into() })? {
            return Ok(None);
        }
        let identity = ProcessIdentity { pid, start_time_ticks };
        let process = Self::watch(identity, descriptor).map_err(|source| ProcessError::Io { pid, source })?;
        Ok(Some(process))
    }

    fn watch(identity: ProcessIdentity, descriptor: OwnedFd) -> io::Result<Self> {
        Ok(Self { identity, descriptor: Arc::new(sys::watch_process(descriptor)?) })
    }

    /// Returns when the process has ended.
    pub(super) async fn ended(&self) -> io::Result<()> {
        self.descriptor.readable().await.map(drop)
    }
}

fn start_time_ticks(pid: i32) -> io::Result<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    parse_start_time_ticks(&text).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "unknown form of stat"))
}

fn parse_start_time_ticks(stat: &str) -> Option<u64> {
    // The second field is the program's name in parentheses, and may itself contain spaces and parentheses. The start
    // time is the 22nd field.
    let (_, after_name) = stat.rsplit_once(") ")?;
    after_name.split(' ').nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sched::{CloneFlags, unshare};
    use std::time::Duration;

    #[test]
    fn a_hostile_name_does_not_shift_the_fields() {
        let stat = "7 (a) S 1 2 (b) S 1 7 7 0 -1 4194560 10 0 0 0 1 2 3 4 20 0 1 0 4711 1000 50 18446744073709551615";
        assert_eq!(parse_start_time_ticks(stat), Some(4711));
        assert_eq!(parse_start_time_ticks("7 (short) S 1"), None);
        assert_eq!(parse_start_time_ticks(""), None);
    }

    /// Or a server that has none left would lose sight of its sandboxes.
    #[test]
    fn waiting_for_the_end_takes_no_descriptor() {
        // With a table of descriptors of its own, so that other tests' don't count.
        let thread = std::thread::spawn(|| {
            unshare(CloneFlags::CLONE_FILES).expect("a table of its own");
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            runtime.block_on(async {
                let mut child = std::process::Command::new("sleep").arg("60").spawn().expect("started");
                let pid = i32::try_from(child.id()).expect("fits");
                let identity = ProcessIdentity { pid, start_time_ticks: 0 };
                let process = Process::watch(identity, sys::open_process(pid).expect("opened")).expect("watched");
                let open = || fs::read_dir("/proc/thread-self/fd").expect("listed").count();
                let before = open();
                let (one, other) = (process.ended(), process.ended());
                let mut both = std::pin::pin!(futures::future::join(one, other));
                let waited = tokio::time::timeout(Duration::from_millis(20), &mut both).await;
                assert!(waited.is_err(), "it has not ended");
                assert_eq!(open(), before);
                child.kill().expect("killed");
                let (one, other) = both.await;
                assert!(one.is_ok() && other.is_ok());
                process.ended().await.expect("also who asks later");
                child.wait().expect("reaped");
            });
        });
        thread.join().expect("no panic");
    }

    #[test]
    fn reads_the_kernels_own() {
        let own = i32::try_from(std::process::id()).expect("fits");
        assert!(start_time_ticks(own).expect("readable") > 0);
        assert!(start_time_ticks(i32::MAX).is_err());
    }
}
