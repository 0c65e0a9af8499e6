//! Loop devices, which are made and filled by ioctls.
#![allow(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

use nix::errno::Errno;
use nix::libc;

// From linux/loop.h; the libc crate has none of them.
const LOOP_CTL_GET_FREE: libc::c_ulong = 0x4C82;
const LOOP_CONFIGURE: libc::c_ulong = 0x4C0A;
const LO_FLAGS_AUTOCLEAR: u32 = 4;
const LO_FLAGS_DIRECT_IO: u32 = 16;

#[repr(C)]
struct LoopInfo64 {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

#[repr(C)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    info: LoopInfo64,
    reserved: [u64; 8],
}

/// A loop device with a file behind it. It lasts as long as this handle or a mount of it, whichever is later, so it
/// can't be left behind, not even by a crash.
#[derive(Debug)]
pub(super) struct LoopDevice {
    /// Only held: closing it is what may free the device.
    _device: File,
    pub(super) path: PathBuf,
}

/// Puts `image` behind a free loop device.
pub(super) fn attach(image: &File, block_size_bytes: u32) -> io::Result<LoopDevice> {
    let control = OpenOptions::new().read(true).write(true).open("/dev/loop-control")?;
    // Others take devices too, between our asking for a free one and our using it.
    for _ in 0..64 {
        // SAFETY: LOOP_CTL_GET_FREE takes no argument; the descriptor is open.
        let number = Errno::result(unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE) })?;
        let path = PathBuf::from(format!("/dev/loop{number}"));
        let device = OpenOptions::new().read(true).write(true).custom_flags(libc::O_CLOEXEC).open(&path)?;
        match configure(&device, image, block_size_bytes) {
            Ok(()) => return Ok(LoopDevice { _device: device, path }),
            Err(Errno::EBUSY) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Err(Errno::EBUSY.into())
}

fn configure(device: &File, image: &File, block_size_bytes: u32) -> nix::Result<()> {
    let fd = u32::try_from(image.as_fd().as_raw_fd()).expect("open descriptors are not negative");
    let config = LoopConfig {
        fd,
        block_size: block_size_bytes,
        info: LoopInfo64 {
            device: 0,
            inode: 0,
            rdevice: 0,
            offset: 0,
            size_limit: 0,
            number: 0,
            encrypt_type: 0,
            encrypt_key_size: 0,
            // Direct, or everything would be cached twice: 1 GiB written and synced took 1.2 s instead of 5.5 s. The
            // kernel does without where the filesystem below can't.
            flags: LO_FLAGS_AUTOCLEAR | LO_FLAGS_DIRECT_IO,
            file_name: [0; 64],
            crypt_name: [0; 64],
            encrypt_key: [0; 32],
            init: [0; 2],
        },
        reserved: [0; 8],
    };
    // SAFETY: LOOP_CONFIGURE reads one `struct loop_config`, which `LoopConfig` mirrors field by field (checked by a
    // test of its size), and keeps no pointer to it. Both descriptors are open for the length of the call.
    Errno::result(unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CONFIGURE, &raw const config) }).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_structures_are_as_large_as_the_kernels() {
        assert_eq!(size_of::<LoopInfo64>(), 232);
        assert_eq!(size_of::<LoopConfig>(), 304);
    }
}
