//! What a path is, as the SDKs show it.

use std::fs::{self, Metadata};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use belljar_protocol::envd::filesystem::{EntryInfo, FileType};
use buffa_types::google::protobuf::Timestamp;
use rustix::fs::FileType as Kind;

use super::error::FilesystemError;
use super::metadata;
use crate::users::Names;

/// Describes what is at `path`; a symlink is described itself, with the type and mode of what it leads to.
pub(super) fn describe(path: &Path, names: &Names) -> Result<EntryInfo, FilesystemError> {
    let own = fs::symlink_metadata(path).map_err(FilesystemError::or_not_found("file", "getting info of", path))?;
    let mode = own.mode();
    let is_symlink = own.is_symlink();
    let target = is_symlink.then(|| fs::canonicalize(path).unwrap_or_else(|_| path.to_owned()));
    let led_to = if is_symlink { fs::metadata(path).ok() } else { Some(own.clone()) };

    Ok(EntryInfo {
        name: path.file_name().map_or_else(|| "/".into(), |name| name.to_string_lossy().into_owned()),
        r#type: led_to.as_ref().map_or(FileType::FILE_TYPE_SYMLINK, file_type).into(),
        path: path.to_string_lossy().into_owned(),
        size: i64::try_from(own.size()).unwrap_or(i64::MAX),
        mode: led_to.map_or(0, |metadata| metadata.mode() & 0o777),
        permissions: permissions(mode),
        owner: names.user(own.uid()),
        group: names.group(own.gid()),
        modified_time: modified(&own).into(),
        symlink_target: target.map(|target| target.to_string_lossy().into_owned()),
        metadata: metadata::read(path).into_iter().collect(),
        is_symlink,
    })
}

/// A link that leads nowhere counts as a symlink; what has no type in envd's protocol, as a socket, has none here.
fn file_type(metadata: &Metadata) -> FileType {
    if metadata.is_file() {
        FileType::FILE_TYPE_FILE
    } else if metadata.is_dir() {
        FileType::FILE_TYPE_DIRECTORY
    } else {
        FileType::FILE_TYPE_UNSPECIFIED
    }
}

fn modified(metadata: &Metadata) -> Timestamp {
    let nanos = i32::try_from(metadata.mtime_nsec()).unwrap_or(0);
    Timestamp { seconds: metadata.mtime(), nanos, ..Default::default() }
}

/// The mode as Go's `FileMode.String` writes it, which is not quite what `ls` does: a letter for each property, `-` if
/// there are none, then the permission bits alone.
fn permissions(mode: u32) -> String {
    const SETUID: u32 = 0o4000;
    const SETGID: u32 = 0o2000;
    const STICKY: u32 = 0o1000;

    let kind = match Kind::from_raw_mode(mode) {
        Kind::Directory => "d",
        Kind::Symlink => "L",
        Kind::BlockDevice => "D",
        Kind::CharacterDevice => "Dc",
        Kind::Fifo => "p",
        Kind::Socket => "S",
        Kind::RegularFile | Kind::Unknown => "",
    };
    let mut text = String::new();
    // Go's order of letters is d a l T L D p S u g c t.
    text.push_str(kind.trim_end_matches('c'));
    for (bit, letter) in [(SETUID, 'u'), (SETGID, 'g')] {
        if mode & bit != 0 {
            text.push(letter);
        }
    }
    if kind.ends_with('c') {
        text.push('c');
    }
    if mode & STICKY != 0 {
        text.push('t');
    }
    if text.is_empty() {
        text.push('-');
    }
    for (position, letter) in "rwxrwxrwx".chars().enumerate() {
        text.push(if mode & (0o400 >> position) == 0 { '-' } else { letter });
    }
    text
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;
    use crate::users::UserDatabase;

    #[test]
    fn permissions_read_like_gos() {
        for (mode, text) in [
            (0o100_644, "-rw-r--r--"),
            (0o040_755, "drwxr-xr-x"),
            (0o041_777, "dtrwxrwxrwx"),
            (0o120_777, "Lrwxrwxrwx"),
            (0o104_755, "urwxr-xr-x"),
            (0o106_711, "ugrwx--x--x"),
            (0o020_666, "Dcrw-rw-rw-"),
            (0o060_660, "Drw-rw----"),
            (0o010_600, "prw-------"),
            (0o140_777, "Srwxrwxrwx"),
        ] {
            assert_eq!(permissions(mode), text, "{mode:o}");
        }
    }

    fn entry(path: &Path) -> EntryInfo {
        describe(path, &UserDatabase::system().names()).expect("exists")
    }

    #[test]
    fn a_file_is_described_in_full() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let path = directory.path().join("a.txt");
        fs::write(&path, "hello").expect("written");
        let entry = entry(&path);
        assert_eq!((entry.name.as_str(), entry.size, entry.mode), ("a.txt", 5, 0o644));
        assert_eq!(entry.path, path.to_string_lossy());
        assert_eq!(entry.r#type.as_known(), Some(FileType::FILE_TYPE_FILE));
        assert_eq!((entry.symlink_target, entry.is_symlink), (None, false));
        let modified = fs::metadata(&path).expect("exists").mtime();
        assert_eq!(entry.modified_time.seconds, modified);
    }

    #[test]
    fn symlinks_show_what_they_lead_to() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let real = fs::canonicalize(directory.path()).expect("exists");
        let (link, dangling) = (real.join("link"), real.join("dangling"));
        symlink(&real, &link).expect("linked");
        symlink("nowhere", &dangling).expect("linked");

        let entry_of_link = entry(&link);
        assert!(entry_of_link.is_symlink);
        assert_eq!(entry_of_link.r#type.as_known(), Some(FileType::FILE_TYPE_DIRECTORY));
        assert_eq!(entry_of_link.symlink_target.as_deref(), real.to_str());
        assert_eq!(entry_of_link.permissions, "Lrwxrwxrwx");

        let entry_of_dangling = entry(&dangling);
        assert_eq!(entry_of_dangling.r#type.as_known(), Some(FileType::FILE_TYPE_SYMLINK));
        assert_eq!(entry_of_dangling.mode, 0);
    }

    #[test]
    fn the_root_has_a_name() {
        assert_eq!(entry(Path::new("/")).name, "/");
    }
}
