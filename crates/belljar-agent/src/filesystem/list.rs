//! Listing a directory, and the directories in it, to a depth.

use std::path::{Path, PathBuf};
use std::{fs, io};

use belljar_protocol::envd::filesystem::EntryInfo;

use super::entry;
use super::error::FilesystemError;
use crate::users::Names;

/// What one answer may hold: about 50 MB of it as JSON.
const MAX_ENTRIES: usize = 100_000;

/// A directory still to be listed.
struct Pending {
    /// Where it is.
    real: PathBuf,
    /// Where the client sees it, which differs if the client named a symlink.
    shown: PathBuf,
    /// How many levels of it are wanted.
    levels: u32,
}

/// Lists `path` as envd does: every directory's entries by name, each directory before what is in it; symlinks are
/// listed, not followed, except for `path` itself.
pub(super) fn list(path: &Path, depth: u32, names: &Names) -> Result<Vec<EntryInfo>, FilesystemError> {
    let real = fs::canonicalize(path).map_err(FilesystemError::or_not_found("path", "resolving", path))?;
    let metadata = fs::metadata(&real).map_err(FilesystemError::or_not_found("directory", "getting info of", &real))?;
    if !metadata.is_dir() {
        return Err(FilesystemError::NotADirectory(real));
    }

    let mut entries = Vec::new();
    // A directory's children are put on top in reverse, so that each is followed by its own children.
    let mut stack = vec![Pending { real, shown: path.to_owned(), levels: depth.max(1) }];
    let mut is_root = true;
    while let Some(directory) = stack.pop() {
        if !is_root {
            match described(&directory, names)? {
                Some(entry) => entries.push(entry),
                None => continue,
            }
            if entries.len() > MAX_ENTRIES {
                return Err(FilesystemError::TooManyEntries { path: path.to_owned(), limit: MAX_ENTRIES });
            }
        }
        if directory.levels > 0 {
            let children = children(&directory, is_root)?;
            if children.len() > MAX_ENTRIES {
                return Err(FilesystemError::TooManyEntries { path: path.to_owned(), limit: MAX_ENTRIES });
            }
            stack.extend(children.into_iter().rev());
        }
        is_root = false;
    }
    Ok(entries)
}

/// `None` if it is gone already.
fn described(pending: &Pending, names: &Names) -> Result<Option<EntryInfo>, FilesystemError> {
    match entry::describe(&pending.real, names) {
        Ok(mut entry) => {
            entry.path = pending.shown.to_string_lossy().into_owned();
            Ok(Some(entry))
        }
        Err(FilesystemError::NotFound { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

/// What is in a directory, by name; nothing if it is not one, or gone already.
fn children(directory: &Pending, is_root: bool) -> Result<Vec<Pending>, FilesystemError> {
    if !is_root && !fs::symlink_metadata(&directory.real).is_ok_and(|metadata| metadata.is_dir()) {
        return Ok(Vec::new());
    }
    let failed = || FilesystemError::io("reading directory", &directory.real);
    let read = match fs::read_dir(&directory.real) {
        Ok(read) => read,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(failed()(error)),
    };
    let mut found = Vec::new();
    for entry in read.take(MAX_ENTRIES + 1) {
        found.push(entry.map_err(failed())?.file_name());
    }
    found.sort_unstable();
    Ok(found
        .into_iter()
        .map(|name| Pending {
            real: directory.real.join(&name),
            shown: directory.shown.join(&name),
            levels: directory.levels - 1,
        })
        .collect())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;
    use crate::users::UserDatabase;

    fn listed(path: &Path, depth: u32) -> Result<Vec<String>, FilesystemError> {
        let entries = list(path, depth, &UserDatabase::system().names())?;
        Ok(entries
            .into_iter()
            .map(|entry| entry.path.strip_prefix(path.to_str().expect("text")).expect("below").to_owned())
            .collect())
    }

    fn tree() -> tempfile::TempDir {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let root = directory.path();
        fs::create_dir_all(root.join("b/c/d")).expect("created");
        fs::write(root.join("a"), "").expect("written");
        fs::write(root.join("b/x"), "").expect("written");
        symlink(root.join("b"), root.join("z")).expect("linked");
        directory
    }

    #[test]
    fn depth_counts_levels_and_symlinks_are_not_followed() {
        let directory = tree();
        for (depth, expected) in [
            (0, vec!["/a", "/b", "/z"]),
            (1, vec!["/a", "/b", "/z"]),
            (2, vec!["/a", "/b", "/b/c", "/b/x", "/z"]),
            (u32::MAX, vec!["/a", "/b", "/b/c", "/b/c/d", "/b/x", "/z"]),
        ] {
            assert_eq!(listed(directory.path(), depth).expect("listed"), expected, "{depth}");
        }
    }

    #[test]
    fn a_symlink_can_be_listed_and_keeps_its_name() {
        let directory = tree();
        assert_eq!(listed(&directory.path().join("z"), 1).expect("listed"), ["/c", "/x"]);
    }

    #[test]
    fn only_directories_can_be_listed() {
        let directory = tree();
        let at = |name| listed(&directory.path().join(name), 1);
        assert!(matches!(at("a"), Err(FilesystemError::NotADirectory(_))));
        assert!(matches!(at("missing"), Err(FilesystemError::NotFound { .. })));
        assert!(matches!(at("a/below"), Err(FilesystemError::NotFound { .. })));
        symlink("loop", directory.path().join("loop")).expect("linked");
        assert!(matches!(at("loop"), Err(FilesystemError::SymlinkLoop(_))));
    }
}
