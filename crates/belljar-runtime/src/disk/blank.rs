//! Empty filesystems, formatted once per size and copied from then on: the copy is half a megabyte, whatever the size.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::errno::Errno;
use nix::unistd::{Whence, lseek};

use super::DiskError;

/// Part of a blank's name, so that a change of [`FORMAT`] never meets an older blank.
const FORMAT_VERSION: u32 = 1;

/// Nothing on a scratch disk outlives its sandbox, so there is no journal, no checksum and no spare superblock. It
/// holds a handful of files, so there are few inodes, which is what keeps a blank small.
const FORMAT: [&str; 10] = [
    "-b",
    "4096",
    "-m",
    "0",
    "-N",
    "1024",
    "-O",
    "^has_journal,^resize_inode,^metadata_csum,uninit_bg,sparse_super2",
    "-E",
    "nodiscard,packed_meta_blocks=1,num_backup_sb=0,lazy_itable_init=0",
];

/// The blank of this size, formatted now if it doesn't exist yet.
pub(super) fn of_size(directory: &Path, disk_mib: u32) -> Result<PathBuf, DiskError> {
    let blank = directory.join(format!("{disk_mib}-v{FORMAT_VERSION}.img"));
    if blank.exists() {
        return Ok(blank);
    }
    fs::create_dir_all(directory).map_err(DiskError::at("make the directory of blank disks"))?;
    // One at a time, also across processes; it is unlocked when it is closed, so a crash can't leave it locked.
    let lock = File::create(directory.join("lock")).map_err(DiskError::at("open the lock of blank disks"))?;
    lock.lock().map_err(DiskError::at("lock the blank disks"))?;
    if blank.exists() {
        return Ok(blank);
    }
    // Renamed when complete, so nobody meets a half-formatted one; what a crash leaves is overwritten here.
    let part = directory.join("part.img");
    let file = File::create(&part).map_err(DiskError::at("make a blank disk"))?;
    file.set_len(u64::from(disk_mib) << 20).map_err(DiskError::at("size a blank disk"))?;
    format(&part)?;
    fs::rename(&part, &blank).map_err(DiskError::at("name a blank disk"))?;
    Ok(blank)
}

fn format(image: &Path) -> Result<(), DiskError> {
    let output = Command::new("mkfs.ext4")
        .args(["-q", "-F"])
        .args(FORMAT)
        .arg(image)
        .stdin(Stdio::null())
        .output()
        .map_err(DiskError::at("run mkfs.ext4 (from e2fsprogs)"))?;
    if output.status.success() {
        return Ok(());
    }
    Err(DiskError::Format { message: String::from_utf8_lossy(&output.stderr).trim().to_owned() })
}

/// Copies a sparse file, holes staying holes.
pub(super) fn copy_sparse(source: &Path, target: &Path) -> io::Result<()> {
    let mut source = File::open(source)?;
    // Nobody else on the host has any business in it.
    let mut target = OpenOptions::new().write(true).create_new(true).mode(0o600).open(target)?;
    let length = source.metadata()?.len();
    target.set_len(length)?;
    let mut position = 0;
    while let Some(data) = seek(&source, position, Whence::SeekData)? {
        // There is always a hole at the end of a file, so the fallback is for a file that shrinks meanwhile.
        let hole = seek(&source, data, Whence::SeekHole)?.unwrap_or(length);
        source.seek(SeekFrom::Start(data))?;
        target.seek(SeekFrom::Start(data))?;
        io::copy(&mut io::Read::take(&mut source, hole - data), &mut target)?;
        position = hole;
    }
    Ok(())
}

/// Where the next data, or the next hole, begins; none after the last.
fn seek(file: &File, from: u64, whence: Whence) -> io::Result<Option<u64>> {
    let from = i64::try_from(from).map_err(io::Error::other)?;
    match lseek(file.as_fd(), from, whence) {
        Ok(position) => u64::try_from(position).map(Some).map_err(io::Error::other),
        Err(Errno::ENXIO) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{FileExt, MetadataExt};

    #[test]
    fn copies_data_and_keeps_holes() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let (source, target) = (directory.path().join("source"), directory.path().join("target"));
        let file = File::create(&source).expect("created");
        file.set_len(64 << 20).expect("sized");
        file.write_all_at(b"early", 0).expect("written");
        file.write_all_at(b"late", 50 << 20).expect("written");

        copy_sparse(&source, &target).expect("copied");

        let copy = File::open(&target).expect("opened");
        let metadata = copy.metadata().expect("readable");
        assert_eq!((metadata.len(), metadata.mode() & 0o777), (64 << 20, 0o600));
        assert!(metadata.blocks() * 512 < 1 << 20, "{} blocks are not sparse", metadata.blocks());
        let mut text = [0; 5];
        copy.read_exact_at(&mut text, 0).expect("read");
        assert_eq!(&text, b"early");
        copy.read_exact_at(&mut text[..4], 50 << 20).expect("read");
        assert_eq!(&text[..4], b"late");
    }

    #[test]
    fn an_existing_target_is_not_overwritten() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let (source, target) = (directory.path().join("source"), directory.path().join("target"));
        fs::write(&source, "new").expect("written");
        fs::write(&target, "old").expect("written");
        assert!(copy_sparse(&source, &target).is_err());
        assert_eq!(fs::read(&target).expect("read"), b"old");
    }
}
