//! `<dest>.partial`: where a build is written until one rename makes it `<dest>`.
//!
//! The directory itself is the lock: whoever writes in it holds `flock` on it, the supervised build included (it
//! inherits the open directory). So a build that was killed a moment ago and is still dying is told from one that left
//! its directory behind, across processes and without process ids, and nothing needs unlocking after a crash.

use std::fs::{File, TryLockError};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::BuildError;

const SUFFIX: &str = ".partial";
/// How long a build that was told to end may take to do so.
const DYING: Duration = Duration::from_secs(10);
const POLL: Duration = Duration::from_millis(50);

/// A build under way, locked against others.
#[derive(Debug)]
pub(super) struct Staging {
    dest: PathBuf,
    directory: PathBuf,
    lock: File,
}

impl Staging {
    /// Takes `<dest>.partial`, emptied.
    pub(super) async fn begin(dest: &Path) -> Result<Self, BuildError> {
        if dest.exists() {
            return Err(BuildError::AlreadyExists { path: dest.to_owned() });
        }
        // Absolute, since mmdebstrap and its hook are told this path.
        let dest = std::path::absolute(dest).map_err(BuildError::file("use", dest))?;
        let mut name = dest.clone().into_os_string();
        name.push(SUFFIX);
        let directory = PathBuf::from(name);
        if let Some(parent) = directory.parent() {
            std::fs::create_dir_all(parent).map_err(BuildError::file("create", parent))?;
        }

        let deadline = Instant::now() + DYING;
        let lock = loop {
            match std::fs::create_dir(&directory) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                    return Err(BuildError::file("create", &directory)(error));
                }
                _ => {}
            }
            match lock_directory(&directory).map_err(BuildError::file("lock", &directory))? {
                Some(lock) => break lock,
                None if Instant::now() >= deadline => return Err(BuildError::Busy { path: directory }),
                None => tokio::time::sleep(POLL).await,
            }
        };
        let staging = Self { dest, directory, lock };
        staging.blocking("empty", empty).await?;
        Ok(staging)
    }

    pub(super) fn directory(&self) -> &Path {
        &self.directory
    }

    pub(super) fn rootfs(&self) -> PathBuf {
        super::rootfs_of(&self.directory)
    }

    /// What the customize script reads: not part of the result.
    pub(super) fn inputs(&self) -> PathBuf {
        self.directory.join("inputs")
    }

    /// A second holder of the lock: it is free when the last holder is gone.
    pub(super) fn lock_handle(&self) -> Result<File, BuildError> {
        self.lock.try_clone().map_err(BuildError::file("lock", &self.directory))
    }

    /// Makes the result appear as `dest`, on disk before it can be seen: a power cut leaves a whole template or none.
    pub(super) async fn commit(self) -> Result<(), BuildError> {
        let dest = self.dest.clone();
        self.blocking("write to disk", move |directory| {
            let opened = File::open(directory)?;
            nix::unistd::syncfs(&opened)?;
            std::fs::rename(directory, &dest)?;
            dest.parent().map_or(Ok(()), |parent| File::open(parent)?.sync_all())
        })
        .await
    }

    /// Removes all of it.
    pub(super) async fn discard(self) -> Result<(), BuildError> {
        self.blocking("remove", |directory| std::fs::remove_dir_all(directory)).await
    }

    async fn blocking(
        &self,
        action: &'static str,
        work: impl FnOnce(&Path) -> io::Result<()> + Send + 'static,
    ) -> Result<(), BuildError> {
        let directory = self.directory.clone();
        let lock = self.lock_handle()?;
        tokio::task::spawn_blocking(move || {
            let outcome = work(&directory).map_err(BuildError::file(action, directory));
            drop(lock);
            outcome
        })
        .await
        .map_err(BuildError::Interrupted)?
    }
}

/// Removes what killed builds left in `parent`, and names it. What a build is writing at present stays.
///
/// # Errors
/// When `parent` cannot be read or a leftover cannot be removed. A missing `parent` holds no leftovers.
pub fn remove_abandoned(parent: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = match std::fs::read_dir(parent) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut removed = Vec::new();
    for entry in entries {
        let entry = entry?;
        let is_partial = entry.file_name().to_str().is_some_and(|name| name.ends_with(SUFFIX));
        if !is_partial || !entry.file_type()?.is_dir() {
            continue;
        }
        let directory = entry.path();
        // Kept until the directory is gone, so that no build begins in it meanwhile.
        let lock = lock_directory(&directory)?;
        if lock.is_some() {
            std::fs::remove_dir_all(&directory)?;
            removed.push(directory);
        }
    }
    Ok(removed)
}

/// Locks the directory. `None` when somebody else has it, and also when it is no longer there: its former owner removed
/// or renamed it meanwhile.
fn lock_directory(path: &Path) -> io::Result<Option<File>> {
    let directory = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        opened => opened?,
    };
    match directory.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Ok(None),
        Err(TryLockError::Error(error)) => return Err(error),
    }
    let is_same = match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => false,
        found => {
            let (found, opened) = (found?, directory.metadata()?);
            (found.dev(), found.ino()) == (opened.dev(), opened.ino())
        }
    };
    Ok(is_same.then_some(directory))
}

fn empty(directory: &Path) -> io::Result<()> {
    for entry in std::fs::read_dir(directory)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            std::fs::remove_dir_all(entry.path())?;
        } else {
            std::fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_result_appears_whole_or_not_at_all() {
        let parent = tempfile::tempdir().expect("a directory");
        let dest = parent.path().join("base");
        let staging = Staging::begin(&dest).await.expect("free");
        std::fs::write(staging.directory().join("file"), "x").expect("written");
        assert!(!dest.exists());
        staging.commit().await.expect("committed");
        assert_eq!(std::fs::read_to_string(dest.join("file")).expect("there"), "x");
        assert!(!parent.path().join("base.partial").exists());
        assert!(matches!(Staging::begin(&dest).await, Err(BuildError::AlreadyExists { .. })));
    }

    #[tokio::test]
    async fn what_a_killed_build_left_is_cleared_by_the_next() {
        let parent = tempfile::tempdir().expect("a directory");
        let dest = parent.path().join("base");
        std::fs::create_dir_all(parent.path().join("base.partial/rootfs/deep")).expect("created");
        let staging = Staging::begin(&dest).await.expect("free");
        assert_eq!(std::fs::read_dir(staging.directory()).expect("there").count(), 0);
        staging.discard().await.expect("removed");
        assert_eq!(std::fs::read_dir(parent.path()).expect("there").count(), 0);
    }

    #[tokio::test]
    async fn reconciliation_removes_leftovers_but_no_running_build() {
        let parent = tempfile::tempdir().expect("a directory");
        let running = Staging::begin(&parent.path().join("running")).await.expect("free");
        std::fs::create_dir_all(parent.path().join("dead.partial/rootfs")).expect("created");
        std::fs::create_dir_all(parent.path().join("finished")).expect("created");

        assert_eq!(remove_abandoned(parent.path()).expect("readable"), [parent.path().join("dead.partial")]);
        assert!(running.directory().exists() && parent.path().join("finished").exists());

        // The lock outlives the build as long as a process of it lives.
        let process = running.lock_handle().expect("a handle");
        let directory = running.directory().to_owned();
        drop(running);
        assert!(remove_abandoned(parent.path()).expect("readable").is_empty());
        drop(process);
        assert_eq!(remove_abandoned(parent.path()).expect("readable"), [directory]);
        assert!(remove_abandoned(&parent.path().join("nowhere")).expect("nothing").is_empty());
    }
}
