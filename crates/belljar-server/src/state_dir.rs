//! The directory of everything that outlives the server.
//!
//! ```text
//! belljar.db         records: teams, keys, templates, sandboxes
//! lock               held by the running server
//! boot-id            the boot of the host that the server last ran in
//! engine/            fetched and verified engines, and the agent
//! templates/BUILD/   rootfs and build.json of one template build
//! disks/             the sandboxes' scratch disks
//! ```
//!
//! What must not outlive a boot of the host is in `/run/belljar/INSTANCE/` instead.

use std::fs::{DirBuilder, File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

/// A server that was killed while it started a program lives on in that program's first moments, its locks with it.
const LOCK_PATIENCE: Duration = Duration::from_secs(1);
const LOCK_RETRY: Duration = Duration::from_millis(20);

/// The state directory can't be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StateDirError {
    #[error("{path} can't be made; belljar keeps its state there and needs to write to it")]
    Make { path: PathBuf, source: io::Error },
    #[error("another belljar server runs in {0}; stop it, or give this one another --state-dir")]
    Locked(PathBuf),
    #[error("{path} can't be locked")]
    Lock { path: PathBuf, source: io::Error },
}

/// The layout of a state directory.
#[derive(Debug, Clone)]
pub(crate) struct StateDir {
    root: PathBuf,
}

/// Held while a server runs in the directory; the kernel frees it however the process ends.
#[derive(Debug)]
pub(crate) struct Lock {
    _file: Flock<File>,
}

impl StateDir {
    /// Makes the directory and its parts if they aren't there. Only root can look inside: it holds access tokens and
    /// the files of every sandbox.
    pub(crate) fn open(root: &Path) -> Result<Self, StateDirError> {
        let state = Self { root: root.to_owned() };
        for directory in [root.to_owned(), state.engine(), state.templates(), state.disks()] {
            let mut builder = DirBuilder::new();
            builder.recursive(true).mode(0o700);
            builder.create(&directory).map_err(|source| StateDirError::Make { path: directory, source })?;
        }
        // Also if it was there before: whoever can't enter it can't read what is below, whatever its modes are.
        std::fs::set_permissions(root, Permissions::from_mode(0o700))
            .map_err(|source| StateDirError::Make { path: root.to_owned(), source })?;
        Ok(state)
    }

    /// Claims the directory for this server.
    pub(crate) fn lock(&self) -> Result<Lock, StateDirError> {
        let path = self.root.join("lock");
        let failed = |source: io::Error| StateDirError::Lock { path: path.clone(), source };
        let mut file = OpenOptions::new().create(true).truncate(false).write(true).open(&path).map_err(failed)?;
        let deadline = Instant::now() + LOCK_PATIENCE;
        loop {
            file = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(file) => return Ok(Lock { _file: file }),
                Err((file, Errno::EWOULDBLOCK)) if Instant::now() < deadline => file,
                Err((_, Errno::EWOULDBLOCK)) => return Err(StateDirError::Locked(self.root.clone())),
                Err((_, errno)) => return Err(failed(errno.into())),
            };
            std::thread::sleep(LOCK_RETRY);
        }
    }

    pub(crate) fn database(&self) -> PathBuf {
        self.root.join("belljar.db")
    }

    pub(crate) fn boot_id(&self) -> PathBuf {
        self.root.join("boot-id")
    }

    fn engine(&self) -> PathBuf {
        self.root.join("engine")
    }

    pub(crate) fn templates(&self) -> PathBuf {
        self.root.join("templates")
    }

    fn disks(&self) -> PathBuf {
        self.root.join("disks")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_server_at_a_time() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let state = StateDir::open(directory.path()).expect("the directory can be used");
        let first = state.lock().expect("nobody holds it");
        assert!(matches!(state.lock(), Err(StateDirError::Locked(_))));
        drop(first);
        state.lock().expect("free again");
    }

    #[test]
    fn nobody_but_the_owner_can_look_inside() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let root = directory.path().join("state");
        std::fs::create_dir(&root).expect("it can be there before");
        std::fs::set_permissions(&root, Permissions::from_mode(0o755)).expect("and open to all");
        StateDir::open(&root).expect("the directory can be used");
        let mode = std::fs::metadata(&root).expect("it is there").permissions().mode();
        assert_eq!(mode & 0o077, 0);
    }
}
