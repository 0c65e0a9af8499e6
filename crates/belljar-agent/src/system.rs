//! The files that make a template's tree this sandbox's system: who it is, and who resolves names for it.
//!
//! The agent writes them, and the host doesn't mount them, so that they are ordinary files, as `sudo tee -a /etc/hosts`
//! expects.

use std::fs::{self, Permissions};
use std::io;
use std::net::IpAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

/// gVisor keeps what was looked up below /proc for up to a thousand processes that are gone, 82 KB each. This option
/// bounds that; an engine without it ignores it.
const PROC_OPTIONS: &std::ffi::CStr = c"dentry_cache_limit=16";

/// Sets the system up. To be called once, before the first command.
pub(crate) fn set_up(nameserver: IpAddr) -> io::Result<()> {
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount("proc", "/proc", "proc", flags, PROC_OPTIONS)?;
    put_tmp_on_disk()?;
    let name = rustix::system::uname().nodename().to_string_lossy().into_owned();
    write("/etc/hostname", &format!("{name}\n"))?;
    write("/etc/hosts", &hosts(&name))?;
    write("/etc/resolv.conf", &format!("nameserver {nameserver}\n"))
}

/// gVisor mounts a file system of memory on an empty /tmp; people put there what is too big for memory.
fn put_tmp_on_disk() -> io::Result<()> {
    match unmount("/tmp", UnmountFlags::DETACH) {
        Err(error) if error != Errno::INVAL => return Err(error.into()),
        _ => {}
    }
    fs::set_permissions("/tmp", Permissions::from_mode(0o1777))
}

fn hosts(name: &str) -> String {
    format!("127.0.0.1\tlocalhost\n127.0.1.1\t{name}\n::1\tlocalhost ip6-localhost ip6-loopback\n")
}

/// Replaces whatever a template left there, such as a link to a resolver's file that doesn't run here.
fn write(path: &str, content: &str) -> io::Result<()> {
    let path = Path::new(path);
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    fs::write(path, content)?;
    fs::set_permissions(path, Permissions::from_mode(0o644))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_host_knows_its_own_name() {
        assert!(hosts("i123").lines().any(|line| line == "127.0.1.1\ti123"));
    }
}
