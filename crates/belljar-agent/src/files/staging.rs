//! Where an upload's bytes go until all of them are there.
//!
//! They are written to a new file beside the target, which is then renamed over it: a reader sees the old file or the
//! new one, and an upload that breaks off or finds the disk full changes nothing. What can't be replaced like that is
//! written in place: a device such as `/dev/null`, a file under `/proc`, and a file that is itself a mount, as
//! `/etc/hosts` is in a container.

use std::error::Error;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::io::Errno;

use crate::filesystem::metadata::{self, Metadata};
use crate::users::User;

/// Every staging file's name starts like this.
const PREFIX: &str = ".belljar-upload-";

/// What a new file may be, before the umask.
const NEW_FILE_MODE: u32 = 0o666;

const PERMISSION_BITS: u32 = 0o777;

/// As many as the kernel follows.
const MAX_SYMLINKS: usize = 40;

static NEXT: AtomicU64 = AtomicU64::new(0);

#[derive(Debug, thiserror::Error)]
pub(super) enum StagingError {
    #[error("path is a directory: {}", .0.display())]
    IsADirectory(PathBuf),
    #[error("path is neither a file nor a device: {}", .0.display())]
    NotWritable(PathBuf),
    #[error("not enough inodes available")]
    NoInodes,
    #[error("not enough disk space available")]
    NoSpace,
    #[error("error {doing}")]
    Io {
        doing: &'static str,
        #[source]
        source: io::Error,
    },
}

impl StagingError {
    fn io(doing: &'static str) -> impl Fn(io::Error) -> Self {
        move |source| if is_full(&source) { Self::NoSpace } else { Self::Io { doing, source } }
    }

    /// The message with its cause, both of which happened in the tenant's own sandbox.
    pub(super) fn describe(&self) -> String {
        match self.source() {
            Some(cause) => format!("{self}: {cause}"),
            None => self.to_string(),
        }
    }
}

pub(super) fn is_full(error: &io::Error) -> bool {
    matches!(Errno::from_io_error(error), Some(Errno::NOSPC | Errno::DQUOT))
}

/// An upload on its way to disk. Dropped before it is finished, it leaves nothing behind.
#[derive(Debug)]
pub(super) struct Staged {
    file: File,
    /// The target itself, with symlinks followed.
    target: PathBuf,
    /// The staging file, while it exists; none if the target is written in place.
    staging: Option<PathBuf>,
    /// Permissions of the file that is replaced.
    mode: Option<u32>,
}

impl Staged {
    /// Blocking, like everything here.
    pub(super) fn begin(path: &Path) -> Result<Self, StagingError> {
        let (target, existing) = follow(path)?;
        let Some(existing) = existing else {
            let (file, staging) = create_beside(&target).map_err(|error| {
                if is_full(&error) { StagingError::NoInodes } else { StagingError::io("opening file")(error) }
            })?;
            return Ok(Self { file, target, staging: Some(staging), mode: None });
        };
        let kind = existing.file_type();
        if kind.is_dir() {
            return Err(StagingError::IsADirectory(target));
        }
        if kind.is_char_device() || kind.is_block_device() {
            return Self::in_place(target);
        }
        if !kind.is_file() {
            return Err(StagingError::NotWritable(target));
        }
        match create_beside(&target) {
            Ok((file, staging)) => {
                let mode = existing.mode() & PERMISSION_BITS;
                Ok(Self { file, target, staging: Some(staging), mode: Some(mode) })
            }
            Err(error) if is_full(&error) => Err(StagingError::NoInodes),
            // Its directory takes no new files.
            Err(_) => Self::in_place(target),
        }
    }

    fn in_place(target: PathBuf) -> Result<Self, StagingError> {
        let file =
            OpenOptions::new().write(true).truncate(true).open(&target).map_err(StagingError::io("opening file"))?;
        Ok(Self { file, target, staging: None, mode: None })
    }

    /// A second handle to write through.
    pub(super) fn writer(&self) -> Result<File, StagingError> {
        self.file.try_clone().map_err(StagingError::io("opening file"))
    }

    /// Makes what was written the file, `owner`'s.
    pub(super) fn finish(mut self, owner: &User, metadata: &Metadata) -> Result<(), StagingError> {
        let failed = StagingError::io;
        if self.staging.is_some() || self.file.metadata().is_ok_and(|file| file.is_file()) {
            fchown(&self.file, Some(owner.uid), Some(owner.gid)).map_err(failed("changing file ownership"))?;
            metadata::replace(&self.file, metadata).map_err(failed("writing file metadata"))?;
        }
        let Some(staging) = &self.staging else { return Ok(()) };
        if let Some(mode) = self.mode {
            self.file.set_permissions(Permissions::from_mode(mode)).map_err(failed("changing permissions"))?;
        }
        match fs::rename(staging, &self.target) {
            Ok(()) => self.staging = None,
            Err(error) if Errno::from_io_error(&error) == Some(Errno::BUSY) => {
                // The target is a mount. `self.staging` is removed when `self` is dropped.
                fs::copy(staging, &self.target).map_err(failed("writing file"))?;
            }
            Err(error) => return Err(failed("renaming file")(error)),
        }
        Ok(())
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        if let Some(staging) = &self.staging
            && let Err(error) = fs::remove_file(staging)
        {
            tracing::warn!(%error, path = %staging.display(), "an unfinished upload was not removed");
        }
    }
}

/// Where writing to `path` would write to, and what is there.
fn follow(path: &Path) -> Result<(PathBuf, Option<fs::Metadata>), StagingError> {
    let failed = StagingError::io("getting file info");
    let mut target = path.to_owned();
    for _ in 0..MAX_SYMLINKS {
        match fs::symlink_metadata(&target) {
            Ok(metadata) if metadata.is_symlink() => {
                let link = fs::read_link(&target).map_err(&failed)?;
                target = target.parent().unwrap_or(Path::new("/")).join(link);
            }
            Ok(metadata) => return Ok((target, Some(metadata))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok((target, None)),
            Err(error) => return Err(failed(error)),
        }
    }
    Err(failed(Errno::LOOP.into()))
}

fn create_beside(target: &Path) -> io::Result<(File, PathBuf)> {
    let directory = target.parent().unwrap_or(Path::new("/"));
    loop {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let staging = directory.join(format!("{PREFIX}{}-{number}", std::process::id()));
        match OpenOptions::new().write(true).create_new(true).mode(NEW_FILE_MODE).open(&staging) {
            Ok(file) => return Ok((file, staging)),
            // Someone in the sandbox was here before. Numbers are not going to run out.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::fs::symlink;

    use super::*;

    fn myself(directory: &Path) -> User {
        let metadata = fs::metadata(directory).expect("exists");
        let (uid, gid) = (metadata.uid(), metadata.gid());
        User { name: "me".into(), uid, gid, home: "/".into(), groups: vec![gid] }
    }

    fn write(path: &Path, text: &str) -> Result<(), StagingError> {
        let staged = Staged::begin(path)?;
        staged.writer()?.write_all(text.as_bytes()).map_err(StagingError::io("writing"))?;
        staged.finish(&myself(&std::env::temp_dir()), &Metadata::new())
    }

    fn names(directory: &Path) -> Vec<String> {
        let entries = fs::read_dir(directory).expect("readable");
        let mut names: Vec<_> =
            entries.map(|entry| entry.expect("an entry").file_name().into_string().expect("text")).collect();
        names.sort();
        names
    }

    #[test]
    fn a_finished_upload_replaces_the_file_and_keeps_its_permissions() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let path = directory.path().join("script");
        write(&path, "old").expect("written");
        assert_eq!(fs::metadata(&path).expect("exists").mode() & PERMISSION_BITS, 0o644);
        fs::set_permissions(&path, Permissions::from_mode(0o750)).expect("changed");
        write(&path, "new").expect("written");
        assert_eq!(fs::read_to_string(&path).expect("readable"), "new");
        assert_eq!(fs::metadata(&path).expect("exists").mode() & PERMISSION_BITS, 0o750);
        assert_eq!(names(directory.path()), ["script"]);
    }

    #[test]
    fn an_unfinished_upload_changes_nothing() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let path = directory.path().join("file");
        fs::write(&path, "old").expect("written");
        let staged = Staged::begin(&path).expect("begun");
        staged.writer().expect("open").write_all(b"half of the n").expect("written");
        drop(staged);
        assert_eq!(fs::read_to_string(&path).expect("readable"), "old");
        assert_eq!(names(directory.path()), ["file"]);
    }

    #[test]
    fn symlinks_are_written_through() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let (real, link) = (directory.path().join("real"), directory.path().join("link"));
        symlink("real", &link).expect("linked");
        write(&link, "through a dangling link").expect("written");
        write(&link, "again").expect("written");
        assert_eq!(fs::read_to_string(&real).expect("readable"), "again");
        assert!(fs::symlink_metadata(&link).expect("exists").is_symlink());
        symlink("loop", directory.path().join("loop")).expect("linked");
        assert!(write(&directory.path().join("loop"), "").is_err());
    }

    #[test]
    fn devices_are_written_in_place_and_other_things_not_at_all() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        write(Path::new("/dev/null"), "gone").expect("written");
        assert!(fs::metadata("/dev/null").expect("exists").file_type().is_char_device());
        assert!(matches!(write(directory.path(), ""), Err(StagingError::IsADirectory(_))));
        let socket = directory.path().join("socket");
        let _listener = std::os::unix::net::UnixListener::bind(&socket).expect("bound");
        assert!(matches!(write(&socket, ""), Err(StagingError::NotWritable(_))));
    }
}
