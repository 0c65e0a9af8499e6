//! What happens between fork and exec of runsc, and process descriptors.
#![allow(unsafe_code)]

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};

use nix::errno::Errno;
use nix::libc;
use nix::mount::{MsFlags, mount};
use nix::poll::{PollFd, PollFlags, PollTimeout};
use nix::sched::{CloneFlags, setns, unshare};
use nix::unistd::{setsid, write};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::process::Command;

/// Where a process of the sandbox belongs. Everything is opened or allocated beforehand: after the fork nothing may be.
#[derive(Debug)]
pub(super) struct Place {
    /// `cgroup.procs` files.
    pub(super) cgroup_entrances: Vec<OwnedFd>,
    pub(super) network: OwnedFd,
    /// The directory that runsc is to see as the top of cgroup version 2.
    pub(super) cgroup_top: Option<CString>,
}

/// Makes `command` start at `place`, in a session and with mounts of its own.
pub(super) fn start_at(command: &mut Command, place: Place) {
    // SAFETY: `enter` makes nothing but system calls and allocates nothing, as a child of a process with threads must
    // not.
    unsafe { command.pre_exec(move || enter(&place).map_err(io::Error::from)) };
}

fn enter(place: &Place) -> nix::Result<()> {
    // Signals to the server's terminal and process group are not for the sandbox, not even while it starts.
    setsid()?;
    for entrance in &place.cgroup_entrances {
        write(entrance, b"0")?;
    }
    setns(&place.network, CloneFlags::CLONE_NEWNET)?;
    unshare(CloneFlags::CLONE_NEWNS)?;
    // Unmounting on the host still reaches here, mounting here never reaches the host.
    mount(None::<&CStr>, c"/", None::<&CStr>, MsFlags::MS_SLAVE | MsFlags::MS_REC, None::<&CStr>)?;
    // runsc takes a namespace for the host's own if this directory has certain files. Since Linux 6.11 it has them in
    // every namespace, so it has to be empty.
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some(c"none"), c"/proc/sys/net/core", Some(c"tmpfs"), flags, None::<&CStr>)?;
    if let Some(top) = &place.cgroup_top {
        mount(Some(top.as_c_str()), c"/sys/fs/cgroup", None::<&CStr>, MsFlags::MS_BIND, None::<&CStr>)?;
    }
    close_on_exec_from(3)
}

/// Nothing that the server has open may reach a sandbox, whoever opened it and however.
fn close_on_exec_from(first: libc::c_uint) -> nix::Result<()> {
    const CLOSE_RANGE_CLOEXEC: libc::c_uint = 4;
    // SAFETY: close_range takes three numbers and touches no memory. It is called by number since old C libraries lack
    // it.
    let result = unsafe { libc::syscall(libc::SYS_close_range, first, libc::c_uint::MAX, CLOSE_RANGE_CLOEXEC) };
    match Errno::result(result) {
        // Kernels before 5.11; there it is enough that this program opens nothing without the flag.
        Err(Errno::ENOSYS | Errno::EINVAL) => Ok(()),
        result => result.map(drop),
    }
}

/// A descriptor of a process: readable once the process has ended, and never another process's.
pub(super) fn open_process(pid: i32) -> nix::Result<OwnedFd> {
    // SAFETY: pidfd_open takes two numbers and touches no memory.
    let descriptor = Errno::result(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })?;
    let descriptor = i32::try_from(descriptor).expect("the kernel's descriptors fit their type");
    // SAFETY: the kernel just made this descriptor for us, so nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

/// Whether the process has ended. It may not have been reaped yet.
pub(super) fn has_ended(process: &OwnedFd) -> nix::Result<bool> {
    let mut poll = [PollFd::new(process.as_fd(), PollFlags::POLLIN)];
    nix::poll::poll(&mut poll, PollTimeout::ZERO).map(|ready| ready > 0)
}

/// Registers a process descriptor with the async runtime.
pub(super) fn watch_process(process: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` stays open and keeps its number until it is dropped, and the `AsyncFd` owns it.
    Ok(unsafe { AsyncFd::register_with_interest(process, Interest::READABLE) }?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_descriptor_tells_of_the_end() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().expect("started");
        let process = open_process(i32::try_from(child.id()).expect("fits")).expect("opened");
        assert_eq!(has_ended(&process), Ok(false));
        child.kill().expect("killed");
        child.wait().expect("reaped");
        assert_eq!(has_ended(&process), Ok(true));
        assert!(open_process(i32::MAX).is_err());
    }
}
