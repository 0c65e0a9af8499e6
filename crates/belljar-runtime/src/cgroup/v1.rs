//! One sandbox's cgroup under version 1: a directory of the same name in every hierarchy.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::cpus::CpuList;
use super::{CPU_PERIOD_US, CgroupError, Usage, files};

/// The shares of a process that nobody gave any.
const SHARES_PER_VCPU: u64 = 1024;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Group {
    /// This group's directory for each controller.
    controllers: BTreeMap<String, PathBuf>,
}

impl Group {
    pub(super) fn new(mounts: &BTreeMap<String, PathBuf>, path: &Path) -> Self {
        Self { controllers: mounts.iter().map(|(name, mount)| (name.clone(), mount.join(path))).collect() }
    }

    /// Controllers that are mounted together share one directory.
    pub(super) fn directories(&self) -> BTreeSet<&Path> {
        self.controllers.values().map(PathBuf::as_path).collect()
    }

    /// A new `cpuset` group has no CPUs and no memory nodes, and takes no process until it has both.
    pub(super) fn inherit_cpuset(&self) -> Result<(), CgroupError> {
        let directory = &self.controllers["cpuset"];
        let parent = directory.parent().expect("the mount point is above");
        for file in ["cpuset.cpus", "cpuset.mems"] {
            if files::read(&directory.join(file))?.trim().is_empty() {
                files::write(&directory.join(file), files::read(&parent.join(file))?.trim())?;
            }
        }
        Ok(())
    }

    pub(super) fn cpus(&self) -> Result<CpuList, CgroupError> {
        super::parse_cpus(&self.file("cpuset", "cpuset.cpus"))
    }

    pub(super) fn set_cpus(&self, cpus: &CpuList) -> Result<(), CgroupError> {
        files::write(&self.file("cpuset", "cpuset.cpus"), &cpus.to_string())
    }

    pub(super) fn set_cpu_time(&self, vcpus: u32) -> Result<(), CgroupError> {
        let vcpus = u64::from(vcpus);
        files::write(&self.file("cpu", "cpu.shares"), &(SHARES_PER_VCPU * vcpus).to_string())?;
        files::write(&self.file("cpu", "cpu.cfs_period_us"), &CPU_PERIOD_US.to_string())?;
        files::write(&self.file("cpu", "cpu.cfs_quota_us"), &(CPU_PERIOD_US * vcpus).to_string())
    }

    /// Swap counts too, where the host counts it: otherwise the limit would only move the excess there.
    pub(super) fn set_memory(&self, bytes: u64) -> Result<(), CgroupError> {
        let (alone, with_swap) =
            (self.file("memory", "memory.limit_in_bytes"), self.file("memory", "memory.memsw.limit_in_bytes"));
        let value = bytes.to_string();
        if !with_swap.exists() {
            return files::write(&alone, &value);
        }
        // The limit with swap may at no time be the lower one, so which goes first depends on the direction.
        if files::read_number(&with_swap)? < bytes {
            files::write(&with_swap, &value)?;
            files::write(&alone, &value)
        } else {
            files::write(&alone, &value)?;
            files::write(&with_swap, &value)
        }
    }

    pub(super) fn set_processes(&self, count: u64) -> Result<(), CgroupError> {
        files::write(&self.file("pids", "pids.max"), &count.to_string())
    }

    pub(super) fn usage(&self) -> Result<Usage, CgroupError> {
        let inactive = files::read_table(&self.file("memory", "memory.stat"))?;
        let inactive_bytes = inactive.get("total_inactive_file").copied().unwrap_or(0);
        let memory_bytes = files::read_number(&self.file("memory", "memory.usage_in_bytes"))?;
        Ok(Usage {
            cpu_time: Duration::from_nanos(files::read_number(&self.file("cpuacct", "cpuacct.usage"))?),
            memory_bytes: memory_bytes.saturating_sub(inactive_bytes),
            out_of_memory_kills: self.counter("memory", "memory.oom_control", "oom_kill")?,
            process_limit_hits: self.counter("pids", "pids.events", "max")?,
        })
    }

    fn counter(&self, controller: &str, file: &str, name: &str) -> Result<u64, CgroupError> {
        Ok(files::read_table(&self.file(controller, file))?.get(name).copied().unwrap_or(0))
    }

    fn file(&self, controller: &str, name: &str) -> PathBuf {
        // The hierarchy was checked to have every controller that is asked for here.
        self.controllers[controller].join(name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn group(root: &Path) -> Group {
        let mounts = ["cpu", "cpuacct", "cpuset", "memory", "pids"]
            .map(|name| (name.to_owned(), root.join(if name == "cpuacct" { "cpu" } else { name })));
        let group = Group::new(&mounts.into(), Path::new("parent/child"));
        for directory in group.directories() {
            fs::create_dir_all(directory).expect("created");
        }
        group
    }

    fn put(group: &Group, controller: &str, file: &str, text: &str) {
        fs::write(group.file(controller, file), text).expect("written");
    }

    fn get(group: &Group, controller: &str, file: &str) -> String {
        fs::read_to_string(group.file(controller, file)).expect("read")
    }

    #[test]
    fn shared_hierarchies_are_one_directory() {
        let root = tempfile::tempdir().expect("a temporary directory");
        assert_eq!(group(root.path()).directories().len(), 4);
    }

    #[test]
    fn cpus_come_from_the_parent_unless_set() {
        let root = tempfile::tempdir().expect("a temporary directory");
        let group = group(root.path());
        fs::write(root.path().join("cpuset/parent/cpuset.cpus"), "0-3\n").expect("written");
        fs::write(root.path().join("cpuset/parent/cpuset.mems"), "0\n").expect("written");
        put(&group, "cpuset", "cpuset.cpus", "\n");
        put(&group, "cpuset", "cpuset.mems", "1\n");
        group.inherit_cpuset().expect("inherited");
        assert_eq!(group.cpus().expect("read").len(), 4);
        assert_eq!(get(&group, "cpuset", "cpuset.mems"), "1\n");
    }

    #[test]
    fn swap_counts_where_it_can() {
        let root = tempfile::tempdir().expect("a temporary directory");
        let group = group(root.path());
        put(&group, "memory", "memory.limit_in_bytes", "9999");
        group.set_memory(1000).expect("without swap accounting");
        put(&group, "memory", "memory.memsw.limit_in_bytes", "9999");
        group.set_memory(2000).expect("with it");
        assert_eq!(get(&group, "memory", "memory.limit_in_bytes"), "2000");
        assert_eq!(get(&group, "memory", "memory.memsw.limit_in_bytes"), "2000");
    }

    #[test]
    fn usage_leaves_out_what_the_kernel_can_take_back() {
        let root = tempfile::tempdir().expect("a temporary directory");
        let group = group(root.path());
        put(&group, "memory", "memory.usage_in_bytes", "5000\n");
        put(&group, "memory", "memory.stat", "cache 900\ntotal_inactive_file 800\n");
        put(&group, "memory", "memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n");
        put(&group, "cpuacct", "cpuacct.usage", "1500000000\n");
        put(&group, "pids", "pids.events", "max 3\n");
        let expected = Usage {
            cpu_time: Duration::from_millis(1500),
            memory_bytes: 4200,
            out_of_memory_kills: 2,
            process_limit_hits: 3,
        };
        assert_eq!(group.usage().expect("read"), expected);
    }
}
