//! The one place that needs `unsafe`: files that arrive by a socket, what happens between fork and exec, and dying of a
//! signal.
#![allow(unsafe_code)]

use std::io::{self, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, sigaction};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, UnixCredentials, recvmsg};
use rustix::fs::Mode;
use rustix::process::{Resource, Rlimit, Signal, fchdir, ioctl_tiocsctty, setrlimit, setsid, umask};

/// The most files that the kernel passes with one message. With less room than that, what did not fit would be cut off
/// without a trace of what did.
const MAX_FILES: usize = 253;

/// One message, with what the kernel says about it.
#[derive(Debug)]
pub(super) struct Received {
    pub(super) length: usize,
    /// The user that sent it; unknown at the end of the stream.
    pub(super) sender: Option<u32>,
    pub(super) files: Vec<OwnedFd>,
}

/// Receives what is there, from a socket on which `SO_PASSCRED` is set.
pub(super) fn receive(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<Received> {
    let mut space = nix::cmsg_space!([RawFd; MAX_FILES], UnixCredentials);
    let mut slices = [IoSliceMut::new(buffer)];
    let message = recvmsg::<()>(socket.as_raw_fd(), &mut slices, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC)?;
    let mut received = Received { length: message.bytes, sender: None, files: Vec::new() };
    for part in message.cmsgs()? {
        match part {
            ControlMessageOwned::ScmCredentials(credentials) if credentials.pid() > 0 => {
                received.sender = Some(credentials.uid());
            }
            ControlMessageOwned::ScmRights(files) => {
                // SAFETY: the kernel has just opened these descriptors for this process, and nobody else knows of them.
                received.files.extend(files.into_iter().map(|file| unsafe { OwnedFd::from_raw_fd(file) }));
            }
            _ => {}
        }
    }
    Ok(received)
}

/// What a child becomes before it turns into `sudo`.
#[derive(Debug)]
pub(super) struct Surroundings {
    pub(super) directory: OwnedFd,
    pub(super) umask: u32,
    /// Whether its stdin is to be its controlling terminal.
    pub(super) has_terminal: bool,
    pub(super) open_files: Rlimit,
}

/// Makes `command` start there, leading a session of its own.
pub(super) fn surround(command: &mut Command, surroundings: Surroundings) {
    let enter = move || -> io::Result<()> {
        setsid()?;
        if surroundings.has_terminal {
            ioctl_tiocsctty(rustix::stdio::stdin())?;
        }
        setrlimit(Resource::Nofile, surroundings.open_files)?;
        umask(Mode::from_bits_truncate(surroundings.umask));
        fchdir(&surroundings.directory)?;
        Ok(())
    };
    // SAFETY: the closure runs in the forked child, where only async-signal-safe operations are allowed: it makes raw
    // system calls on values made before the fork, and neither allocates, locks nor panics. Its stdin is open: the
    // command was given one.
    unsafe {
        command.pre_exec(enter);
    }
}

/// Whether whoever started this process wants it not to notice the signal, as `nohup` does.
pub(super) fn is_ignored(signal: Signal) -> bool {
    let Some(signal) = nix_signal(signal) else { return false };
    let default = SigAction::new(SigHandler::SigDfl, SaFlags::empty(), SigSet::empty());
    // SAFETY: no handler is installed, but the default and then what was there before; both are sound at any time.
    let Ok(before) = (unsafe { sigaction(signal, &default) }) else { return false };
    let is_ignored = matches!(before.handler(), SigHandler::SigIgn);
    if is_ignored {
        // SAFETY: as above.
        let _ = unsafe { sigaction(signal, &before) };
    }
    is_ignored
}

/// Ends this process by the signal. Returns if it is not one that ends processes.
pub(super) fn die_of(number: i32) {
    let Ok(signal) = nix::sys::signal::Signal::try_from(number) else { return };
    // The command has left its core already, if it was to.
    let _ = setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) });
    let default = SigAction::new(SigHandler::SigDfl, SaFlags::empty(), SigSet::empty());
    // SAFETY: it only takes handlers away. (SIGKILL has none, which is an error that changes nothing.)
    let _ = unsafe { sigaction(signal, &default) };
    let _ = nix::sys::signal::raise(signal);
}

/// Stops this process as SIGTSTP does by default. Returns when it is continued.
pub(super) fn stop() {
    let default = SigAction::new(SigHandler::SigDfl, SaFlags::empty(), SigSet::empty());
    let signal = nix::sys::signal::Signal::SIGTSTP;
    // SAFETY: the handler is taken away and put back as it was; no signal can meet one half installed.
    let Ok(before) = (unsafe { sigaction(signal, &default) }) else { return };
    let _ = nix::sys::signal::raise(signal);
    // SAFETY: as above.
    let _ = unsafe { sigaction(signal, &before) };
}

fn nix_signal(signal: Signal) -> Option<nix::sys::signal::Signal> {
    nix::sys::signal::Signal::try_from(signal.as_raw()).ok()
}
