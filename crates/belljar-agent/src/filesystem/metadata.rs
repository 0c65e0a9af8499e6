//! A file's user-defined metadata: extended attributes under `user.e2b.`.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;

use rustix::fs::{XattrFlags, flistxattr, fremovexattr, fsetxattr, getxattr, listxattr};
use rustix::io::Errno;

/// What the kernel demands of attributes anyone may set, and what keeps ours apart from those of others.
const PREFIX: &str = "user.e2b.";

/// The kernel's limit on a name, less the prefix.
const MAX_KEY_BYTES: usize = 255 - PREFIX.len();

/// What ext4 can keep beside one inode, prefixes included.
const MAX_TOTAL_BYTES: usize = 4096;

/// The kernel's limits on a list of names and on a value.
const LIST_BYTES: usize = 64 << 10;

pub(crate) type Metadata = BTreeMap<String, String>;

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum InvalidMetadata {
    #[error("metadata key must not be empty")]
    EmptyKey,
    #[error("metadata key \"{key}\" exceeds {MAX_KEY_BYTES} bytes")]
    LongKey { key: String },
    #[error("metadata {of} contains a byte that is not printable ASCII")]
    NotPrintable { of: String },
    #[error("total metadata size {bytes} exceeds {MAX_TOTAL_BYTES} bytes")]
    TooMuch { bytes: usize },
}

pub(crate) fn validate(metadata: &Metadata) -> Result<(), InvalidMetadata> {
    let printable = |text: &str| text.bytes().all(|byte| (0x20..=0x7e).contains(&byte));
    for (key, value) in metadata {
        if key.is_empty() {
            return Err(InvalidMetadata::EmptyKey);
        }
        if key.len() > MAX_KEY_BYTES {
            return Err(InvalidMetadata::LongKey { key: key.clone() });
        }
        if !printable(key) {
            return Err(InvalidMetadata::NotPrintable { of: "key".to_owned() });
        }
        if !printable(value) {
            return Err(InvalidMetadata::NotPrintable { of: format!("value for key \"{key}\"") });
        }
    }
    let bytes = metadata.iter().map(|(key, value)| PREFIX.len() + key.len() + value.len()).sum();
    if bytes > MAX_TOTAL_BYTES {
        return Err(InvalidMetadata::TooMuch { bytes });
    }
    Ok(())
}

/// What is stored with the file. Nothing if that can't be read: an entry is complete without it.
pub(crate) fn read(path: &Path) -> Metadata {
    let mut names = vec![0; LIST_BYTES];
    let Ok(length) = listxattr(path, &mut names) else { return Metadata::new() };
    let names = names[..length].split(|byte| *byte == 0);
    names
        .filter_map(|name| {
            let name = std::str::from_utf8(name).ok()?;
            let key = name.strip_prefix(PREFIX)?;
            let mut value = vec![0; LIST_BYTES];
            let length = getxattr(path, name, &mut value).ok()?;
            value.truncate(length);
            // Programs in the sandbox can store any bytes there; what isn't text can't be answered.
            Some((key.to_owned(), String::from_utf8(value).ok()?))
        })
        .collect()
}

/// Replaces what is stored with the open file. A file system without extended attributes keeps none, as with envd:
/// the answer to the upload shows what was kept.
pub(crate) fn replace(file: impl AsFd, metadata: &Metadata) -> io::Result<()> {
    match try_replace(file, metadata) {
        Err(Errno::NOTSUP) => Ok(()),
        result => Ok(result?),
    }
}

fn try_replace(file: impl AsFd, metadata: &Metadata) -> Result<(), Errno> {
    let mut names = vec![0; LIST_BYTES];
    let length = flistxattr(&file, &mut names)?;
    for name in names[..length].split(|byte| *byte == 0).filter(|name| name.starts_with(PREFIX.as_bytes())) {
        match fremovexattr(&file, name) {
            Ok(()) | Err(Errno::NODATA) => {}
            Err(error) => return Err(error),
        }
    }
    for (key, value) in metadata {
        fsetxattr(&file, format!("{PREFIX}{key}"), value.as_bytes(), XattrFlags::empty())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(key: &str, value: &str) -> Metadata {
        Metadata::from([(key.to_owned(), value.to_owned())])
    }

    #[test]
    fn limits_are_the_kernels() {
        assert_eq!(validate(&one("author", "me & you~")), Ok(()));
        assert_eq!(validate(&one("", "x")), Err(InvalidMetadata::EmptyKey));
        assert_eq!(validate(&one(&"k".repeat(MAX_KEY_BYTES), "")), Ok(()));
        assert!(matches!(validate(&one(&"k".repeat(MAX_KEY_BYTES + 1), "")), Err(InvalidMetadata::LongKey { .. })));
        assert!(matches!(validate(&one("k", "ä")), Err(InvalidMetadata::NotPrintable { .. })));
        assert!(matches!(validate(&one("k", "a\nb")), Err(InvalidMetadata::NotPrintable { .. })));
        assert_eq!(validate(&one("k", &"v".repeat(MAX_TOTAL_BYTES - 10))), Ok(()));
        assert_eq!(
            validate(&one("k", &"v".repeat(MAX_TOTAL_BYTES - 9))),
            Err(InvalidMetadata::TooMuch { bytes: MAX_TOTAL_BYTES + 1 })
        );
    }

    #[test]
    fn a_new_set_replaces_the_old_one() {
        let file = tempfile::NamedTempFile::new().expect("a temporary file");
        if fsetxattr(file.as_file(), "user.other", b"kept", XattrFlags::empty()) == Err(Errno::NOTSUP) {
            eprintln!("skipped: this file system has no extended attributes");
            return;
        }
        replace(file.as_file(), &one("a", "1")).expect("stored");
        replace(file.as_file(), &one("b", "2")).expect("stored");
        assert_eq!(read(file.path()), one("b", "2"));
        replace(file.as_file(), &Metadata::new()).expect("cleared");
        assert_eq!(read(file.path()), Metadata::new());
        let mut other = [0; 8];
        assert_eq!(getxattr(file.path(), "user.other", &mut other), Ok(4));
    }
}
