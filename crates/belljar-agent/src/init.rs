//! What being a sandbox's first process takes.
//!
//! The runtime has set up the network and [`crate::system`] the files, and nothing below the agent needs its signals,
//! so little is left: to be the parent of every orphan, for [`crate::process::Children`] to reap, and to take nothing
//! from what a command should have. A process that is not the first, as in tests, adopts its orphans the same way.

use std::io;

use rustix::fs::Mode;
use rustix::process::{Resource, Rlimit, getpid, getrlimit, set_child_subreaper, setrlimit, umask};

/// Files are readable to all and writable to their owner, whatever the agent was started with.
const UMASK: Mode = Mode::WGRP.union(Mode::WOTH);

/// Returns the limit on open files that commands are to have: the agent's own is raised, since every connection and
/// every running command needs some.
pub(crate) fn become_init() -> io::Result<Rlimit> {
    umask(UMASK);
    set_child_subreaper(Some(getpid()))?;
    let original = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: original.maximum, maximum: original.maximum })?;
    Ok(original)
}
