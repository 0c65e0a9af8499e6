//! The limit on the number of processes that holds even for the guest's root.
//!
//! gVisor exempts root from `RLIMIT_NPROC`, but not from a group of its own pids controller. The thread that forks all
//! commands joins such a group, so they are born into it; the agent's other threads stay outside and can still serve
//! and kill when the group is full. Root could undo this. Then the host's limit for the whole sandbox is what ends it.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::Path;

use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use rustix::thread::gettid;

/// Only while the group is made: nothing in the sandbox needs to see it.
const MOUNT_POINT: &str = "/run/belljar-cgroup";

/// A group with room for so many processes and threads.
#[derive(Debug)]
pub(crate) struct ProcessLimit {
    /// Its list of threads; writing an id moves that thread in.
    tasks: File,
}

impl ProcessLimit {
    pub(crate) fn new(processes: u32) -> io::Result<Self> {
        let mount_point = Path::new(MOUNT_POINT);
        fs::create_dir_all(mount_point)?;
        mount("none", mount_point, "cgroup", MountFlags::empty(), c"pids")?;
        let group = mount_point.join("commands");
        let made = fs::create_dir(&group)
            .and_then(|()| fs::write(group.join("pids.max"), processes.to_string()))
            .and_then(|()| OpenOptions::new().write(true).open(group.join("tasks")));
        // The open file keeps the group; the mount is not needed any more.
        unmount(mount_point, UnmountFlags::DETACH)?;
        fs::remove_dir(mount_point)?;
        Ok(Self { tasks: made? })
    }

    /// Moves the calling thread, and so all that it will fork, into the group.
    pub(super) fn join(&mut self) -> io::Result<()> {
        self.tasks.write_all(gettid().as_raw_nonzero().to_string().as_bytes())
    }
}
