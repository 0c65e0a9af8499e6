//! Creating the directories a path needs.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt, chown};
use std::path::Path;

use super::error::FilesystemError;
use crate::users::User;

const MODE: u32 = 0o755;

/// Makes `path` a directory, with all it lies in. What is created belongs to `owner`; what exists stays as it is.
pub(crate) fn ensure(path: &Path, owner: &User) -> Result<(), FilesystemError> {
    let mut missing = Vec::new();
    for ancestor in path.ancestors().filter(|ancestor| !ancestor.as_os_str().is_empty()) {
        match fs::metadata(ancestor) {
            Ok(metadata) if metadata.is_dir() => break,
            Ok(_) => return Err(FilesystemError::FileInTheWay(ancestor.to_owned())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => missing.push(ancestor),
            // Some ancestor is a file: it comes up further on.
            Err(error) if error.kind() == io::ErrorKind::NotADirectory => {}
            Err(error) => return Err(FilesystemError::io("checking", ancestor)(error)),
        }
    }
    for directory in missing.into_iter().rev() {
        match DirBuilder::new().mode(MODE).create(directory) {
            Ok(()) => {}
            // Someone else was quicker, perhaps another upload; its owner is set all the same.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(FilesystemError::io("creating directory", directory)(error)),
        }
        chown(directory, Some(owner.uid), Some(owner.gid))
            .map_err(FilesystemError::io("changing the owner of", directory))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    /// The tests' own user, so that they need no rights.
    fn myself(directory: &Path) -> User {
        let metadata = fs::metadata(directory).expect("exists");
        let (uid, gid) = (metadata.uid(), metadata.gid());
        User { name: "me".into(), uid, gid, home: "/".into(), groups: vec![gid] }
    }

    #[test]
    fn creates_what_is_missing_and_accepts_what_is_there() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let me = myself(directory.path());
        let deep = directory.path().join("a/b/c");
        ensure(&deep, &me).expect("created");
        ensure(&deep, &me).expect("still there");
        assert_eq!(fs::metadata(deep).expect("exists").mode() & 0o7777, MODE);
    }

    #[test]
    fn a_file_in_the_way_is_named() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let file = directory.path().join("file");
        fs::write(&file, "").expect("written");
        let error = ensure(&file.join("a/b"), &myself(directory.path())).expect_err("in the way");
        assert!(matches!(&error, FilesystemError::FileInTheWay(path) if *path == file), "{error}");
    }
}
