//! One sandbox's cgroup under version 2, and what has to be so above it.
//!
//! A controller reaches a group only if every group above names it in `cgroup.subtree_control`, and a group that does
//! so may hold no processes itself (the true root is exempt). Where the server stands in the way, as the process of a
//! systemd service with a delegated subtree does, it moves into a leaf of its own.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::cpus::CpuList;
use super::{CPU_PERIOD_US, CgroupError, Usage, files};
use crate::cgroup::hierarchy::NEEDED;

/// The weight of a group that nobody gave any.
const WEIGHT_PER_VCPU: u64 = 100;
const HIGHEST_WEIGHT: u64 = 10_000;

/// Where processes go that stand in a group that has to hand out controllers.
const SUPERVISOR: &str = "supervisor";

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Group {
    directory: PathBuf,
}

/// Makes `path` below `root` and hands the needed controllers down to its children.
pub(super) fn delegate(root: &Path, path: &Path) -> Result<(), CgroupError> {
    let mut directory = root.to_owned();
    hand_down(&directory)?;
    for name in path {
        directory.push(name);
        files::make_directory(&directory)?;
        hand_down(&directory)?;
    }
    Ok(())
}

fn hand_down(directory: &Path) -> Result<(), CgroupError> {
    let control = directory.join("cgroup.subtree_control");
    let enabled = files::read(&control)?;
    let enabled: BTreeSet<&str> = enabled.split_whitespace().collect();
    let missing: Vec<String> =
        NEEDED.iter().filter(|name| !enabled.contains(*name)).map(|name| format!("+{name}")).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let request = missing.join(" ");
    match files::write(&control, &request) {
        Err(CgroupError::Io { source, .. }) if source.raw_os_error() == Some(nix::libc::EBUSY) => {
            make_room(directory)?;
            files::write(&control, &request)
        }
        result => result,
    }
}

/// Moves the processes of a group into a leaf below it, but only if this process is one of them: other groups are not
/// ours to rearrange.
fn make_room(directory: &Path) -> Result<(), CgroupError> {
    let processes = files::read_processes(directory)?;
    let own = i32::try_from(std::process::id()).expect("process ids fit the kernel's type");
    if !processes.contains(&own) {
        return Err(CgroupError::Occupied { path: directory.to_owned() });
    }
    let leaf = directory.join(SUPERVISOR);
    files::make_directory(&leaf)?;
    for process in processes {
        match files::write(&leaf.join("cgroup.procs"), &process.to_string()) {
            // It has ended meanwhile.
            Err(CgroupError::Io { source, .. }) if is_no_such_process(&source) => {}
            result => result?,
        }
    }
    Ok(())
}

fn is_no_such_process(error: &io::Error) -> bool {
    error.raw_os_error() == Some(nix::libc::ESRCH)
}

impl Group {
    pub(super) fn new(root: &Path, path: &Path) -> Self {
        Self { directory: root.join(path) }
    }

    pub(super) fn directory(&self) -> &Path {
        &self.directory
    }

    pub(super) fn cpus(&self) -> Result<CpuList, CgroupError> {
        super::parse_cpus(&self.directory.join("cpuset.cpus.effective"))
    }

    pub(super) fn set_cpus(&self, cpus: &CpuList) -> Result<(), CgroupError> {
        self.write("cpuset.cpus", &cpus.to_string())
    }

    pub(super) fn set_cpu_time(&self, vcpus: u32) -> Result<(), CgroupError> {
        let vcpus = u64::from(vcpus);
        self.write("cpu.weight", &(WEIGHT_PER_VCPU * vcpus).min(HIGHEST_WEIGHT).to_string())?;
        self.write("cpu.max", &format!("{} {CPU_PERIOD_US}", CPU_PERIOD_US * vcpus))
    }

    /// No swap at all: the limit would only move the excess there. Hosts without swap accounting lack the file.
    pub(super) fn set_memory(&self, bytes: u64) -> Result<(), CgroupError> {
        self.write("memory.max", &bytes.to_string())?;
        if self.directory.join("memory.swap.max").exists() { self.write("memory.swap.max", "0") } else { Ok(()) }
    }

    pub(super) fn set_processes(&self, count: u64) -> Result<(), CgroupError> {
        self.write("pids.max", &count.to_string())
    }

    /// Ends every process at once. Kernels before 5.14 can't; there the caller goes one by one.
    pub(super) fn kill(&self) -> Result<(), CgroupError> {
        let control = self.directory.join("cgroup.kill");
        if control.exists() { files::write(&control, "1") } else { Ok(()) }
    }

    pub(super) fn usage(&self) -> Result<Usage, CgroupError> {
        let inactive_bytes = self.counter("memory.stat", "inactive_file")?;
        let memory_bytes = files::read_number(&self.directory.join("memory.current"))?;
        Ok(Usage {
            cpu_time: Duration::from_micros(self.counter("cpu.stat", "usage_usec")?),
            memory_bytes: memory_bytes.saturating_sub(inactive_bytes),
            out_of_memory_kills: self.counter("memory.events", "oom_kill")?,
            process_limit_hits: self.counter("pids.events", "max")?,
        })
    }

    fn counter(&self, file: &str, name: &str) -> Result<u64, CgroupError> {
        Ok(files::read_table(&self.directory.join(file))?.get(name).copied().unwrap_or(0))
    }

    fn write(&self, file: &str, value: &str) -> Result<(), CgroupError> {
        files::write(&self.directory.join(file), value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    /// A tree with what the kernel puts into each new group, since a directory on a disk gets nothing by itself.
    fn fake_group(directory: &Path) {
        fs::create_dir_all(directory).expect("created");
        for (file, text) in [
            ("cgroup.subtree_control", ""),
            ("cgroup.procs", ""),
            ("cpu.max", ""),
            ("cpu.weight", ""),
            ("memory.max", ""),
            ("pids.max", ""),
            ("cpu.stat", "usage_usec 2500\nuser_usec 2000\n"),
            ("memory.current", "5000\n"),
            ("memory.stat", "anon 4000\ninactive_file 1000\n"),
            ("memory.events", "low 0\noom 1\noom_kill 1\n"),
            ("pids.events", "max 4\n"),
            ("cpuset.cpus.effective", "0-1\n"),
        ] {
            fs::write(directory.join(file), text).expect("written");
        }
    }

    fn get(path: &Path) -> String {
        fs::read_to_string(path).expect("read")
    }

    #[test]
    fn controllers_are_handed_down_to_the_sandboxes() {
        let root = tempfile::tempdir().expect("a temporary directory");
        for path in ["", "outer", "outer/belljar"] {
            fake_group(&root.path().join(path));
        }
        fs::write(root.path().join("cgroup.subtree_control"), "cpuset cpu io memory pids\n").expect("written");
        delegate(root.path(), Path::new("outer/belljar")).expect("delegated");
        assert_eq!(get(&root.path().join("cgroup.subtree_control")), "cpuset cpu io memory pids\n", "left alone");
        for path in ["outer", "outer/belljar"] {
            let control = get(&root.path().join(path).join("cgroup.subtree_control"));
            assert_eq!(control, "+cpu +cpuset +memory +pids");
        }
    }

    #[test]
    fn only_the_own_group_is_rearranged() {
        let root = tempfile::tempdir().expect("a temporary directory");
        fake_group(root.path());
        fake_group(&root.path().join(SUPERVISOR));
        fs::write(root.path().join("cgroup.procs"), "1\n").expect("written");
        assert!(matches!(make_room(root.path()), Err(CgroupError::Occupied { .. })));

        let own = std::process::id().to_string();
        fs::write(root.path().join("cgroup.procs"), format!("{own}\n")).expect("written");
        make_room(root.path()).expect("moved");
        assert_eq!(get(&root.path().join(SUPERVISOR).join("cgroup.procs")), own);
    }

    #[test]
    fn limits_and_usage() {
        let root = tempfile::tempdir().expect("a temporary directory");
        fake_group(&root.path().join("one"));
        let group = Group::new(root.path(), Path::new("one"));
        group.set_cpu_time(2).expect("set");
        group.set_memory(1 << 30).expect("set, without swap accounting");
        group.set_processes(4352).expect("set");
        assert_eq!(get(&group.directory.join("cpu.max")), "200000 100000");
        assert_eq!(get(&group.directory.join("cpu.weight")), "200");
        assert_eq!(get(&group.directory.join("memory.max")), "1073741824");
        assert_eq!(get(&group.directory.join("pids.max")), "4352");
        assert_eq!(group.cpus().expect("read").len(), 2);
        let expected = Usage {
            cpu_time: Duration::from_micros(2500),
            memory_bytes: 4000,
            out_of_memory_kills: 1,
            process_limit_hits: 4,
        };
        assert_eq!(group.usage().expect("read"), expected);
    }
}
