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

use std::fs::{DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

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
    /// Makes the directory and its parts if they aren't there. Only root can look inside: it holds access tokens and the
    /// files of every sandbox.
    pub(crate) fn open(root: &Path) -> Result<Self, StateDirError> {
        let state = Self { root: root.to_owned() };
        for directory in [root.to_owned(), state.engine(), state.templates(), state.disks()] {
            let mut builder = DirBuilder::new();
            builder.recursive(true).mode(0o700);
            builder.create(&directory).map_err(|source| StateDirError::Make { path: directory, source })?;
        }
        Ok(state)
    }

    /// Claims the directory for this server.
    pub(crate) fn lock(&self) -> Result<Lock, StateDirError> {
        let path = self.root.join("lock");
        let failed = |source: io::Error| StateDirError::Lock { path: path.clone(), source };
        let file = OpenOptions::new().create(true).truncate(false).write(true).open(&path).map_err(failed)?;
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(file) => Ok(Lock { _file: file }),
            Err((_, Errno::EWOULDBLOCK)) => Err(StateDirError::Locked(self.root.clone())),
            Err((_, errno)) => Err(failed(errno.into())),
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
    use std::os::unix::fs::PermissionsExt;

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
        StateDir::open(&root).expect("the directory can be made");
        let mode = std::fs::metadata(&root).expect("it is there").permissions().mode();
        assert_eq!(mode & 0o077, 0);
    }
}
