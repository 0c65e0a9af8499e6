//! Control groups: what bounds a sandbox on the host, counts what it used, and holds all its processes together, so
//! that ending a sandbox means ending everything in its group.
//!
//! ```text
//! <hierarchy>/belljar-<instance>/<sandbox id>      the sentry, the gofer and all that they start
//! ```
//!
//! belljar makes the groups itself and hands runsc a finished one, which runsc then leaves alone. A process joins
//! before it becomes runsc, so not even a half-started sandbox has a process outside. [`Hierarchy`] tells which version
//! of cgroups the host has; above [`Cgroup`] nobody needs to know.

mod cpus;
mod files;
mod hierarchy;
mod v1;
mod v2;

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, Instant};

use belljar_core::id::SandboxId;
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

pub use cpus::{CpuList, InvalidCpuList};
pub use hierarchy::Hierarchy;

const CPU_PERIOD_US: u64 = 100_000;

/// A killed process may be busy in the kernel for a while, writing out its memory for example.
const END_LIMIT: Duration = Duration::from_secs(10);
const END_RETRY: Duration = Duration::from_millis(2);

/// A cgroup could not be made, changed, read or removed.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    #[error("no cgroups are mounted")]
    NotMounted,
    #[error("cgroup controllers are missing: {missing}")]
    MissingControllers { missing: String },
    #[error("{parent:?} can't be the parent of cgroups: a relative path without «..» is needed")]
    InvalidParent { parent: PathBuf },
    #[error("could not {action} {}", path.display())]
    Io {
        action: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{} holds processes of others, so it can't hand controllers down", path.display())]
    Occupied { path: PathBuf },
    #[error("{} processes of sandbox {id} do not end", processes.len())]
    Unkillable { id: SandboxId, processes: Vec<i32> },
}

/// Where the cgroups of one server's sandboxes are. Cheap to clone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CgroupTree {
    hierarchy: Hierarchy,
    parent: PathBuf,
}

/// The cgroup of one sandbox. Dropping it leaves it as it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cgroup {
    id: SandboxId,
    group: Group,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Group {
    V1(v1::Group),
    V2(v2::Group),
}

/// What a sandbox has used, the sentry's own part included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    pub cpu_time: Duration,
    /// Without the part that the kernel would take back before it ends anything.
    pub memory_bytes: u64,
    /// How often the kernel ended a process because the group was out of memory.
    pub out_of_memory_kills: u64,
    /// How often the limit of processes kept one from starting.
    pub process_limit_hits: u64,
}

impl CgroupTree {
    /// Makes `parent`, a path below the hierarchy's top such as `belljar-main`, and prepares it to hold sandboxes.
    ///
    /// # Errors
    /// If the path is no such path, or the kernel refuses.
    pub fn open(hierarchy: Hierarchy, parent: &Path) -> Result<Self, CgroupError> {
        let ordinary = parent.components().all(|component| matches!(component, Component::Normal(_)));
        if !ordinary || parent.as_os_str().is_empty() {
            return Err(CgroupError::InvalidParent { parent: parent.to_owned() });
        }
        match &hierarchy {
            Hierarchy::V1(mounts) => {
                let mut path = PathBuf::new();
                for name in parent {
                    path.push(name);
                    make_v1(&v1::Group::new(mounts, &path))?;
                }
            }
            Hierarchy::V2(root) => v2::delegate(root, parent)?,
        }
        Ok(Self { hierarchy, parent: parent.to_owned() })
    }

    /// Makes a sandbox's cgroup, without limits yet.
    ///
    /// # Errors
    /// If the kernel refuses. What was made until then stays, for [`Cgroup::remove`].
    pub fn create(&self, id: &SandboxId) -> Result<Cgroup, CgroupError> {
        let cgroup = self.cgroup(id);
        match &cgroup.group {
            Group::V1(group) => make_v1(group)?,
            Group::V2(group) => files::make_directory(group.directory())?,
        }
        Ok(cgroup)
    }

    /// The cgroup of a sandbox, whether it exists or not.
    #[must_use]
    pub fn cgroup(&self, id: &SandboxId) -> Cgroup {
        let path = self.parent.join(id.as_str());
        let group = match &self.hierarchy {
            Hierarchy::V1(mounts) => Group::V1(v1::Group::new(mounts, &path)),
            Hierarchy::V2(root) => Group::V2(v2::Group::new(root, &path)),
        };
        Cgroup { id: id.clone(), group }
    }

    /// Every sandbox of which there is a cgroup, or a part of one.
    ///
    /// # Errors
    /// If the directories can't be read.
    pub fn list(&self) -> Result<BTreeSet<SandboxId>, CgroupError> {
        let mut ids = BTreeSet::new();
        for directory in self.parent_directories() {
            let entries = match fs::read_dir(&directory) {
                Ok(entries) => entries,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(files::failed("list", &directory)(error)),
            };
            for entry in entries {
                let entry = entry.map_err(files::failed("list", &directory))?;
                ids.extend(entry.file_name().to_str().and_then(|name| name.parse::<SandboxId>().ok()));
            }
        }
        Ok(ids)
    }

    /// The CPUs that sandboxes may run on.
    ///
    /// # Errors
    /// If the kernel doesn't say.
    pub fn cpus(&self) -> Result<CpuList, CgroupError> {
        match &self.hierarchy {
            Hierarchy::V1(mounts) => v1::Group::new(mounts, &self.parent).cpus(),
            Hierarchy::V2(root) => v2::Group::new(root, &self.parent).cpus(),
        }
    }

    /// Removes the parent, once no sandbox is left in it. Only a server that is uninstalled, or a test, needs this.
    ///
    /// # Errors
    /// If there still are sandboxes.
    pub fn remove(&self) -> Result<(), CgroupError> {
        self.parent_directories().iter().try_for_each(|directory| remove_directory(directory).map(drop))
    }

    fn parent_directories(&self) -> BTreeSet<PathBuf> {
        match &self.hierarchy {
            Hierarchy::V1(mounts) => mounts.values().map(|mount| mount.join(&self.parent)).collect(),
            Hierarchy::V2(root) => BTreeSet::from([root.join(&self.parent)]),
        }
    }

    /// The path that `linux.cgroupsPath` of runsc's configuration takes, and, under version 2, the directory that runsc
    /// has to see as the top of the hierarchy: it would otherwise switch on controllers for groups that aren't ours.
    pub(crate) fn view_for_runsc(&self, id: &SandboxId) -> RunscView {
        match &self.hierarchy {
            Hierarchy::V1(_) => RunscView { path: Path::new("/").join(&self.parent).join(id.as_str()), top: None },
            Hierarchy::V2(root) => {
                RunscView { path: Path::new("/").join(id.as_str()), top: Some(root.join(&self.parent)) }
            }
        }
    }
}

/// See [`CgroupTree::view_for_runsc`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RunscView {
    pub(crate) path: PathBuf,
    pub(crate) top: Option<PathBuf>,
}

impl Cgroup {
    /// Which CPUs it runs on.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn set_cpus(&self, cpus: &CpuList) -> Result<(), CgroupError> {
        match &self.group {
            Group::V1(group) => group.set_cpus(cpus),
            Group::V2(group) => group.set_cpus(cpus),
        }
    }

    /// How much CPU time it gets, as a number of whole CPUs, and its weight when CPUs are short.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn set_cpu_time(&self, vcpus: u32) -> Result<(), CgroupError> {
        match &self.group {
            Group::V1(group) => group.set_cpu_time(vcpus),
            Group::V2(group) => group.set_cpu_time(vcpus),
        }
    }

    /// How much memory it may use; swap does not add to it.
    ///
    /// # Errors
    /// If the kernel refuses, for example because more is in use.
    pub fn set_memory(&self, bytes: u64) -> Result<(), CgroupError> {
        match &self.group {
            Group::V1(group) => group.set_memory(bytes),
            Group::V2(group) => group.set_memory(bytes),
        }
    }

    /// How many processes and threads of the host it may have.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn set_processes(&self, count: u64) -> Result<(), CgroupError> {
        match &self.group {
            Group::V1(group) => group.set_processes(count),
            Group::V2(group) => group.set_processes(count),
        }
    }

    /// What it has used so far.
    ///
    /// # Errors
    /// If it doesn't exist.
    pub fn usage(&self) -> Result<Usage, CgroupError> {
        match &self.group {
            Group::V1(group) => group.usage(),
            Group::V2(group) => group.usage(),
        }
    }

    /// Open files through which a process joins, by writing `0` to each.
    pub(crate) fn entrances(&self) -> Result<Vec<OwnedFd>, CgroupError> {
        self.directories()
            .into_iter()
            .map(|directory| {
                let path = directory.join("cgroup.procs");
                let file = OpenOptions::new().write(true).open(&path).map_err(files::failed("open", &path))?;
                Ok(File::into(file))
            })
            .collect()
    }

    /// The ids of the processes in it; none if it doesn't exist.
    pub(crate) fn processes(&self) -> Result<BTreeSet<i32>, CgroupError> {
        let mut processes = BTreeSet::new();
        for directory in self.directories() {
            processes.extend(files::read_processes(directory)?);
        }
        Ok(processes)
    }

    /// Ends every process in it and returns when none is left. Does nothing if there is none.
    ///
    /// # Errors
    /// [`CgroupError::Unkillable`] if some are stuck in the kernel.
    pub async fn end_processes(&self) -> Result<(), CgroupError> {
        let deadline = Instant::now() + END_LIMIT;
        loop {
            let processes = self.processes()?;
            if processes.is_empty() {
                return Ok(());
            }
            if Instant::now() >= deadline {
                return Err(CgroupError::Unkillable {
                    id: self.id.clone(),
                    processes: processes.into_iter().collect(),
                });
            }
            if let Group::V2(group) = &self.group {
                group.kill()?;
            }
            for process in processes {
                // One that has ended meanwhile is what was wanted; one that can't be killed stays in the list. That its
                // id is taken by another process in the microseconds since is not to be expected: ids are given out in
                // turn.
                let _ = kill(Pid::from_raw(process), Signal::SIGKILL);
            }
            tokio::time::sleep(END_RETRY).await;
        }
    }

    /// Removes it. Does nothing if it doesn't exist.
    ///
    /// # Errors
    /// If it still has processes.
    pub async fn remove(&self) -> Result<(), CgroupError> {
        let deadline = Instant::now() + END_LIMIT;
        for directory in self.directories() {
            // The kernel keeps a group busy for a moment after its last process has ended.
            while remove_directory(directory)? == Removal::Busy {
                if Instant::now() >= deadline {
                    return Err(files::failed("remove", directory)(Errno::EBUSY.into()));
                }
                tokio::time::sleep(END_RETRY).await;
            }
        }
        Ok(())
    }

    fn directories(&self) -> BTreeSet<&Path> {
        match &self.group {
            Group::V1(group) => group.directories(),
            Group::V2(group) => BTreeSet::from([group.directory()]),
        }
    }
}

fn make_v1(group: &v1::Group) -> Result<(), CgroupError> {
    for directory in group.directories() {
        files::make_directory(directory)?;
    }
    group.inherit_cpuset()
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Removal {
    Gone,
    Busy,
}

fn remove_directory(path: &Path) -> Result<Removal, CgroupError> {
    match fs::remove_dir(path) {
        Ok(()) => Ok(Removal::Gone),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Removal::Gone),
        Err(error) if error.kind() == io::ErrorKind::ResourceBusy => Ok(Removal::Busy),
        Err(error) => Err(files::failed("remove", path)(error)),
    }
}

fn parse_cpus(path: &Path) -> Result<CpuList, CgroupError> {
    files::read(path)?.parse().map_err(|error: InvalidCpuList| {
        files::failed("understand", path)(io::Error::new(io::ErrorKind::InvalidData, error))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parent_is_a_path_below_the_top() {
        for parent in ["", "/", "/belljar", "..", "a/../../b"] {
            let error =
                CgroupTree::open(Hierarchy::V2(PathBuf::from("/nowhere")), Path::new(parent)).expect_err(parent);
            assert!(matches!(error, CgroupError::InvalidParent { .. }), "{error}");
        }
    }

    #[test]
    fn runsc_sees_only_our_part_of_version_two() {
        let id = SandboxId::generate();
        let tree = CgroupTree { hierarchy: Hierarchy::V2(PathBuf::from("/cg")), parent: PathBuf::from("belljar-x") };
        let view = tree.view_for_runsc(&id);
        assert_eq!(view.path, PathBuf::from(format!("/{id}")));
        assert_eq!(view.top, Some(PathBuf::from("/cg/belljar-x")));
    }

    #[tokio::test]
    async fn leftovers_are_listed_and_removed_whatever_is_there() {
        let root = tempfile::tempdir().expect("a temporary directory");
        let mounts =
            ["cpu", "cpuacct", "cpuset", "memory", "pids"].map(|name| (name.to_owned(), root.path().join(name)));
        let tree = CgroupTree { hierarchy: Hierarchy::V1(mounts.into()), parent: PathBuf::from("belljar-x") };
        assert_eq!(tree.list().expect("no parent yet"), BTreeSet::new());
        let id = SandboxId::generate();
        fs::create_dir_all(root.path().join("memory/belljar-x").join(id.as_str())).expect("created");
        assert_eq!(tree.list().expect("listed"), BTreeSet::from([id.clone()]));
        let cgroup = tree.cgroup(&id);
        cgroup.end_processes().await.expect("there are none");
        cgroup.remove().await.expect("removed");
        cgroup.remove().await.expect("a second time does nothing");
        assert_eq!(tree.list().expect("listed"), BTreeSet::new());
    }
}
