//! The one place that needs `unsafe`: what happens between fork and exec.
#![allow(unsafe_code)]

use std::ffi::CString;
use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;

use rustix::process::{Resource, Rlimit, chdir, setrlimit, setsid};
use rustix::thread::{set_thread_gid, set_thread_groups, set_thread_uid};

/// What a child becomes before it turns into the command.
#[derive(Debug)]
pub(crate) struct Identity {
    pub(crate) uid: rustix::process::Uid,
    pub(crate) gid: rustix::process::Gid,
    pub(crate) groups: Vec<rustix::process::Gid>,
    pub(crate) directory: CString,
    /// The limit the agent itself was started with, not the one it raised for its connections.
    pub(crate) open_files: Rlimit,
}

/// Makes `command` start as `identity`, leading a session of its own.
pub(crate) fn assume(command: &mut Command, identity: Identity) {
    let become_identity = move || -> io::Result<()> {
        setsid()?;
        setrlimit(Resource::Nofile, identity.open_files)?;
        // The user comes last: with it goes the right to change the rest. The directory comes after that, so that it
        // must be the user's to enter.
        set_thread_groups(&identity.groups)?;
        set_thread_gid(identity.gid)?;
        set_thread_uid(identity.uid)?;
        chdir(identity.directory.as_c_str())?;
        Ok(())
    };
    // SAFETY: the closure runs in the forked child, where only async-signal-safe operations are allowed: it makes raw
    // system calls on memory prepared before the fork, and neither allocates, locks nor panics. The child has one
    // thread, so that changing the thread's identity changes the process's.
    unsafe {
        command.pre_exec(become_identity);
    }
}
