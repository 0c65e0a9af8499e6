//! The Connect service `filesystem.Filesystem`, and what it shares with the uploads and downloads of [`crate::files`].
//!
//! Everything is done as root, like envd: the user of a request decides whose home relative paths start at and who owns
//! what is created, not what may be read. Whoever holds the sandbox's token can run commands as root anyway.
//!
//! Disk operations run on the blocking pool, so that a slow one holds up nothing else.

mod directories;
mod entry;
mod error;
mod list;
pub(crate) mod metadata;
mod service;

pub(crate) use directories::ensure;
pub(crate) use error::FilesystemError;
pub(crate) use service::FilesystemService;
