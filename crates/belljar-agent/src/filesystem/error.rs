//! What can go wrong with a path, and its Connect code.

use std::error::Error;
use std::io;
use std::path::{Path, PathBuf};

use connectrpc::{ConnectError, ErrorCode};
use rustix::io::Errno;

#[derive(Debug, thiserror::Error)]
pub(crate) enum FilesystemError {
    #[error("{what} not found: {}", path.display())]
    NotFound { what: &'static str, path: PathBuf },
    #[error("directory already exists: {}", .0.display())]
    AlreadyExists(PathBuf),
    #[error("path already exists but it is not a directory: {}", .0.display())]
    Occupied(PathBuf),
    #[error("path is not a directory: {}", .0.display())]
    NotADirectory(PathBuf),
    #[error("path is a file: {}", .0.display())]
    FileInTheWay(PathBuf),
    #[error("cyclic symlink or chain of too many links at {}", .0.display())]
    SymlinkLoop(PathBuf),
    #[error("{} has more than {limit} entries; list less of it, or less deep", path.display())]
    TooManyEntries { path: PathBuf, limit: usize },
    #[error("error {doing} {}", path.display())]
    Io {
        doing: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

impl FilesystemError {
    /// For `map_err`: what was being done to which path.
    pub(crate) fn io(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { doing, path: path.to_owned(), source }
    }

    /// Like [`Self::io`], but a path that isn't there is told apart.
    pub(crate) fn or_not_found(what: &'static str, doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| match source.kind() {
            // A file where a directory should be: what is asked for isn't there either.
            io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => Self::NotFound { what, path: path.to_owned() },
            _ if Errno::from_io_error(&source) == Some(Errno::LOOP) => Self::SymlinkLoop(path.to_owned()),
            _ => Self::Io { doing, path: path.to_owned(), source },
        }
    }

    /// The message with its cause. Everything in it happened in the tenant's own sandbox, so the tenant may read it.
    pub(crate) fn describe(&self) -> String {
        match self.source() {
            Some(cause) => format!("{self}: {cause}"),
            None => self.to_string(),
        }
    }
}

impl From<FilesystemError> for ConnectError {
    fn from(error: FilesystemError) -> Self {
        let code = match &error {
            FilesystemError::NotFound { .. } => ErrorCode::NotFound,
            FilesystemError::AlreadyExists(_) => ErrorCode::AlreadyExists,
            FilesystemError::Occupied(_) | FilesystemError::NotADirectory(_) | FilesystemError::FileInTheWay(_) => {
                ErrorCode::InvalidArgument
            }
            FilesystemError::SymlinkLoop(_) | FilesystemError::TooManyEntries { .. } => ErrorCode::FailedPrecondition,
            FilesystemError::Io { .. } => ErrorCode::Internal,
        };
        ConnectError::new(code, error.describe())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_paths_are_not_found_and_other_failures_say_why() {
        let map = |kind: io::ErrorKind| {
            ConnectError::from(FilesystemError::or_not_found("file", "reading", Path::new("/x"))(kind.into()))
        };
        assert_eq!(map(io::ErrorKind::NotFound).code, ErrorCode::NotFound);
        assert_eq!(map(io::ErrorKind::NotADirectory).code, ErrorCode::NotFound);
        let other = map(io::ErrorKind::PermissionDenied);
        assert_eq!(other.code, ErrorCode::Internal);
        assert_eq!(other.message.as_deref(), Some("error reading /x: permission denied"));
    }
}
