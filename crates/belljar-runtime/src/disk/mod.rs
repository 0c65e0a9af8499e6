//! Scratch disks: a sandbox's writable storage, bounded by a filesystem of exactly its quota.
//!
//! ```text
//! <root>/blank/10240-v1.img          formatted once per size
//!    └─ copied, holes stay holes ──▶ <root>/scratch/<sandbox id>/disk.img
//!                                       └─ loop device ──ext4──▶ <root>/scratch/<sandbox id>/mount/
//! ```
//!
//! The image is sparse, so an empty disk costs half a megabyte; blocks that the guest frees are given back to the host
//! (`discard`). The loop device clears itself when its mount goes. Everything is named by the sandbox, so what a crash
//! leaves is found by [`ScratchDisks::list`] and removed by [`ScratchDisks::destroy`], whichever step it had reached.

mod blank;
pub(crate) mod mountinfo;
mod sys;

use std::collections::BTreeSet;
use std::fs::{self, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use belljar_core::id::SandboxId;
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};

/// How long a disk may stay busy after its sandbox has ended: the kernel frees a big file store after its last process
/// is gone.
const BUSY_LIMIT: Duration = Duration::from_secs(10);
const BUSY_RETRY: Duration = Duration::from_millis(5);

const BLOCK_SIZE_BYTES: u32 = 4096;

/// A scratch disk could not be made, found or removed.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    #[error("could not {step}")]
    Io {
        step: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("mkfs.ext4 failed: {message}")]
    Format { message: String },
    #[error("{} stays busy: something still uses the sandbox's files", mount_point.display())]
    Busy { mount_point: PathBuf },
}

impl DiskError {
    fn at<E: Into<io::Error>>(step: &'static str) -> impl FnOnce(E) -> Self {
        move |source| Self::Io { step, source: source.into() }
    }
}

/// All scratch disks under one directory. Cheap to clone.
#[derive(Debug, Clone)]
pub struct ScratchDisks {
    root: PathBuf,
}

/// A mounted scratch disk. Dropping it leaves the disk as it is: disks outlive the server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ScratchDisk {
    mount_point: PathBuf,
}

impl ScratchDisks {
    /// `root` should be on the filesystem that is to hold the sandboxes' data; nothing is made yet.
    #[must_use]
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// Makes and mounts a disk of `disk_mib`. It must not exist yet; a half-made one has to be destroyed first.
    ///
    /// # Errors
    /// Naming the step. What was made until then stays, for [`Self::destroy`].
    pub async fn create(&self, id: &SandboxId, disk_mib: u32) -> Result<ScratchDisk, DiskError> {
        let (disks, directory) = (self.clone(), self.directory(id));
        blocking(move || disks.create_blocking(&directory, disk_mib)).await
    }

    /// The disk of a sandbox that another server process made; none unless it is mounted.
    ///
    /// # Errors
    /// If the kernel's list of mounts can't be read.
    pub fn adopt(&self, id: &SandboxId) -> Result<Option<ScratchDisk>, DiskError> {
        let mount_point = self.directory(id).join(MOUNT);
        Ok((mounts_at(&mount_point)? > 0).then_some(ScratchDisk { mount_point }))
    }

    /// Unmounts and deletes a disk, in whatever state it is; does nothing if there is none.
    ///
    /// # Errors
    /// [`DiskError::Busy`] if the sandbox still runs; otherwise naming the step. A later call tries again.
    pub async fn destroy(&self, id: &SandboxId) -> Result<(), DiskError> {
        let directory = self.directory(id);
        blocking(move || destroy_blocking(&directory)).await
    }

    /// Every sandbox of which there is a disk, or a part of one.
    ///
    /// # Errors
    /// If the directory can't be read.
    pub fn list(&self) -> Result<BTreeSet<SandboxId>, DiskError> {
        let entries = match fs::read_dir(self.root.join(SCRATCH)) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(BTreeSet::new()),
            Err(error) => return Err(DiskError::at("list the scratch disks")(error)),
        };
        entries
            .filter_map(|entry| match entry {
                Ok(entry) => entry.file_name().to_str()?.parse().ok().map(Ok),
                Err(error) => Some(Err(DiskError::at("list the scratch disks")(error))),
            })
            .collect()
    }

    fn directory(&self, id: &SandboxId) -> PathBuf {
        self.root.join(SCRATCH).join(id.as_str())
    }

    fn create_blocking(&self, directory: &Path, disk_mib: u32) -> Result<ScratchDisk, DiskError> {
        let blank = blank::of_size(&self.root.join("blank"), disk_mib)?;
        let (image, mount_point) = (directory.join("disk.img"), directory.join(MOUNT));
        fs::create_dir_all(&mount_point).map_err(DiskError::at("make a scratch disk's directory"))?;
        blank::copy_sparse(&blank, &image).map_err(DiskError::at("copy a blank disk"))?;
        mount_image(&image, &mount_point)?;
        Ok(ScratchDisk { mount_point })
    }
}

impl ScratchDisk {
    /// The directory that the sandbox's data goes to.
    #[must_use]
    pub fn mount_point(&self) -> &Path {
        &self.mount_point
    }
}

const SCRATCH: &str = "scratch";
const MOUNT: &str = "mount";

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, DiskError> + Send + 'static,
) -> Result<T, DiskError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(DiskError::at("finish")(io::Error::other(error))),
    }
}

fn mount_image(image: &Path, mount_point: &Path) -> Result<(), DiskError> {
    let file =
        OpenOptions::new().read(true).write(true).open(image).map_err(DiskError::at("open a scratch disk's image"))?;
    let device = sys::attach(&file, BLOCK_SIZE_BYTES).map_err(DiskError::at("attach a loop device"))?;
    // Not `noexec`: programs that a guest installs are mapped from here.
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOATIME;
    // No barriers: the data dies with the sandbox, so there is nothing to keep in order for after a power cut.
    mount(Some(&device.path), mount_point, Some("ext4"), flags, Some("noinit_itable,nobarrier,discard"))
        .map_err(DiskError::at("mount a scratch disk"))
}

fn destroy_blocking(directory: &Path) -> Result<(), DiskError> {
    let mount_point = directory.join(MOUNT);
    let deadline = Instant::now() + BUSY_LIMIT;
    while mounts_at(&mount_point)? > 0 {
        match umount2(&mount_point, MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) => {}
            Err(Errno::EBUSY) if Instant::now() < deadline => std::thread::sleep(BUSY_RETRY),
            Err(Errno::EBUSY) => return Err(DiskError::Busy { mount_point }),
            Err(error) => return Err(DiskError::at("unmount a scratch disk")(error)),
        }
    }
    match fs::remove_dir_all(directory) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(DiskError::at("delete a scratch disk")(error)),
        _ => Ok(()),
    }
}

fn mounts_at(mount_point: &Path) -> Result<usize, DiskError> {
    let mounts = mountinfo::read().map_err(DiskError::at("read the list of mounts"))?;
    // The kernel shows the real path, whatever symbolic links lead to ours.
    let real = match fs::canonicalize(mount_point) {
        Ok(real) => real,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
        Err(error) => return Err(DiskError::at("resolve a scratch disk's path")(error)),
    };
    Ok(mounts.iter().filter(|mount| mount.mount_point == real).count())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_sandbox_ids_are_listed() {
        let root = tempfile::tempdir().expect("a temporary directory");
        let disks = ScratchDisks::new(root.path());
        assert_eq!(disks.list().expect("nothing made yet"), BTreeSet::new());
        let id = SandboxId::generate();
        fs::create_dir_all(disks.directory(&id)).expect("created");
        fs::create_dir_all(root.path().join("scratch/lost+found")).expect("created");
        assert_eq!(disks.list().expect("readable"), BTreeSet::from([id]));
    }

    #[tokio::test]
    async fn a_half_made_disk_is_found_and_removed() {
        let root = tempfile::tempdir().expect("a temporary directory");
        let disks = ScratchDisks::new(root.path());
        let id = SandboxId::generate();
        fs::create_dir_all(disks.directory(&id).join(MOUNT)).expect("created");
        fs::write(disks.directory(&id).join("disk.img"), "half").expect("written");
        assert_eq!(disks.adopt(&id).expect("readable"), None);
        disks.destroy(&id).await.expect("removed");
        disks.destroy(&id).await.expect("a second time does nothing");
        assert_eq!(disks.list().expect("readable"), BTreeSet::new());
    }
}
