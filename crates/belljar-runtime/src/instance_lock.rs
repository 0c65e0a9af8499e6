//! One server per instance: a second one of the same name would take the first one's sandboxes for leftovers.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

/// An instance can't be claimed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum InstanceLockError {
    #[error("another belljar server runs as instance {instance}; give this one another `instance`")]
    Taken { instance: String },
    #[error("{} can't be locked", path.display())]
    Io {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// Held while a server runs as an instance; the kernel frees it however the process ends.
#[derive(Debug)]
pub(crate) struct InstanceLock {
    directory: PathBuf,
    _file: File,
}

impl InstanceLock {
    /// Claims `instance` by a lock in its run directory below `parent`, which is made if it isn't there.
    pub(crate) fn take(parent: &Path, instance: &str) -> Result<Self, InstanceLockError> {
        let directory = parent.join(instance);
        let path = lock_file(&directory);
        loop {
            match try_take(&directory) {
                Ok(Some(file)) => return Ok(Self { directory, _file: file }),
                // A server that was just uninstalled removed the file before it was locked here.
                Ok(None) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Err(InstanceLockError::Taken { instance: instance.to_owned() });
                }
                Err(source) => return Err(InstanceLockError::Io { path, source }),
            }
        }
    }

    /// The instance's run directory.
    pub(crate) fn directory(&self) -> &Path {
        &self.directory
    }

    /// Removes the lock's file and the run directory, which must hold nothing else. The lock itself stays, on a file
    /// without a name: the next server makes another.
    pub(crate) fn remove_directory(&self) -> io::Result<()> {
        fs::remove_file(lock_file(&self.directory))?;
        fs::remove_dir(&self.directory)
    }
}

fn lock_file(directory: &Path) -> PathBuf {
    directory.join("lock")
}

/// None if the file that was locked is no longer the one in the directory.
fn try_take(directory: &Path) -> io::Result<Option<File>> {
    DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
    let path = lock_file(directory);
    let file = match OpenOptions::new().create(true).truncate(false).write(true).open(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        opened => opened?,
    };
    file.try_lock()?;
    match fs::symlink_metadata(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        found => {
            let (found, locked) = (found?, file.metadata()?);
            Ok(((found.dev(), found.ino()) == (locked.dev(), locked.ino())).then_some(file))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_instance_has_one_server_at_a_time() {
        let parent = tempfile::tempdir().expect("a directory");
        let lock = InstanceLock::take(parent.path(), "main").expect("free");
        let refused = InstanceLock::take(parent.path(), "main").expect_err("taken");
        assert!(matches!(refused, InstanceLockError::Taken { instance } if instance == "main"));
        InstanceLock::take(parent.path(), "other").expect("another instance");
        drop(lock);
        InstanceLock::take(parent.path(), "main").expect("free again");
    }

    #[test]
    fn an_uninstalled_instance_leaves_nothing_and_can_be_taken_again() {
        let parent = tempfile::tempdir().expect("a directory");
        let lock = InstanceLock::take(parent.path(), "main").expect("free");
        lock.remove_directory().expect("removed");
        assert!(!lock.directory().exists());
        let next = InstanceLock::take(parent.path(), "main").expect("free, though the former server still runs");
        assert!(InstanceLock::take(parent.path(), "main").is_err());
        next.remove_directory().expect("removed");
    }
}
