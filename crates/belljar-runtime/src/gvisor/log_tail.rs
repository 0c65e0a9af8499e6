//! The end of a log on a sandbox's disk. Guests can make logs long, so never more than a bounded part is read.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::Path;

/// The last `longest_bytes` of a file, or all of it.
pub(super) fn read(path: &Path, longest_bytes: u64) -> io::Result<String> {
    let mut file = File::open(path)?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(longest_bytes)))?;
    let mut bytes = Vec::new();
    // It may grow meanwhile.
    file.take(longest_bytes).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_end_is_read() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let path = directory.path().join("log");
        assert!(read(&path, 4).is_err());
        std::fs::write(&path, "ab").expect("written");
        assert_eq!(read(&path, 4).expect("read"), "ab");
        std::fs::write(&path, [b"a".repeat(1 << 20), b"\xFFend".to_vec()].concat()).expect("written");
        assert_eq!(read(&path, 4).expect("read"), "\u{FFFD}end");
    }
}
