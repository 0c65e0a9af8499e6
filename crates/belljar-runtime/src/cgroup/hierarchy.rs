//! Which cgroups this host has, and where they are mounted.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::{Path, PathBuf};

use super::{CgroupError, files};
use crate::disk::mountinfo::{self, Mount};

/// What limits can't do without. Under version 1 CPU time is counted by a controller of its own.
pub(super) const NEEDED: [&str; 4] = ["cpu", "cpuset", "memory", "pids"];
const NEEDED_V1: [&str; 5] = ["cpu", "cpuacct", "cpuset", "memory", "pids"];

/// The host's cgroups. A hybrid host, which has version 2 mounted without controllers, counts as version 1.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Hierarchy {
    /// Where each controller is mounted. Several may share one directory.
    V1(BTreeMap<String, PathBuf>),
    /// Where the one tree is mounted.
    V2(PathBuf),
}

impl Hierarchy {
    /// What this process sees mounted.
    ///
    /// # Errors
    /// If no cgroups are mounted, or a controller is missing that limits need.
    pub fn detect() -> Result<Self, CgroupError> {
        let path = Path::new("/proc/self/mountinfo");
        let mounts = mountinfo::read().map_err(files::failed("read", path))?;
        let hierarchy = Self::from_mounts(&mounts).ok_or(CgroupError::NotMounted)?;
        hierarchy.check()?;
        Ok(hierarchy)
    }

    fn from_mounts(mounts: &[Mount]) -> Option<Self> {
        let controllers: BTreeMap<String, PathBuf> = mounts
            .iter()
            .filter(|mount| mount.filesystem == "cgroup")
            .flat_map(|mount| mount.super_options.iter().map(|option| (option.clone(), mount.mount_point.clone())))
            .filter(|(option, _)| !is_mount_flag(option))
            .collect();
        if controllers.contains_key("memory") || controllers.contains_key("cpu") {
            return Some(Self::V1(controllers));
        }
        let unified = mounts.iter().find(|mount| mount.filesystem == "cgroup2")?;
        Some(Self::V2(unified.mount_point.clone()))
    }

    fn check(&self) -> Result<(), CgroupError> {
        let missing = match self {
            Self::V1(controllers) => absent(&NEEDED_V1, |name| controllers.contains_key(name)),
            Self::V2(root) => {
                let available = files::read(&root.join("cgroup.controllers"))?;
                let available: BTreeSet<&str> = available.split_whitespace().collect();
                absent(&NEEDED, |name| available.contains(name))
            }
        };
        if missing.is_empty() { Ok(()) } else { Err(CgroupError::MissingControllers { missing: missing.join(", ") }) }
    }
}

fn absent(needed: &[&'static str], present: impl Fn(&str) -> bool) -> Vec<&'static str> {
    needed.iter().copied().filter(|name| !present(name)).collect()
}

/// Options of a version 1 mount that aren't controllers.
fn is_mount_flag(option: &str) -> bool {
    ["rw", "ro", "xattr", "noprefix", "clone_children", "cpuset_v2_mode", "favordynmods"].contains(&option)
        || option.starts_with("release_agent=")
}

impl fmt::Display for Hierarchy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::V1(controllers) => {
                let names: Vec<&str> = controllers.keys().map(String::as_str).collect();
                write!(f, "cgroup version 1 with {}", names.join(", "))
            }
            Self::V2(root) => write!(f, "cgroup version 2 at {}", root.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HYBRID: &str = "\
30 23 0:26 / /sys/fs/cgroup ro,nosuid shared:9 - tmpfs tmpfs ro,mode=755
31 30 0:27 / /sys/fs/cgroup/unified rw,nosuid shared:10 - cgroup2 cgroup2 rw,nsdelegate
32 30 0:28 / /sys/fs/cgroup/systemd rw,nosuid shared:11 - cgroup cgroup rw,xattr,name=systemd
33 30 0:30 / /sys/fs/cgroup/cpu,cpuacct rw,nosuid shared:15 - cgroup cgroup rw,cpu,cpuacct
34 30 0:31 / /sys/fs/cgroup/memory rw,nosuid shared:16 - cgroup cgroup rw,memory
35 30 0:32 / /sys/fs/cgroup/cpuset rw,nosuid shared:17 - cgroup cgroup rw,cpuset
";

    #[test]
    fn a_hybrid_host_is_version_one() {
        let hierarchy = Hierarchy::from_mounts(&mountinfo::parse(HYBRID)).expect("cgroups");
        let Hierarchy::V1(controllers) = &hierarchy else { panic!("{hierarchy}") };
        let names: Vec<&str> = controllers.keys().map(String::as_str).collect();
        assert_eq!(names, ["cpu", "cpuacct", "cpuset", "memory", "name=systemd"]);
        assert_eq!(controllers["cpuacct"], PathBuf::from("/sys/fs/cgroup/cpu,cpuacct"));
        let error = hierarchy.check().expect_err("pids is not mounted");
        assert_eq!(error.to_string(), "cgroup controllers are missing: pids");
    }

    #[test]
    fn a_unified_host_is_version_two() {
        let root = tempfile::tempdir().expect("a temporary directory");
        let line = format!("31 30 0:27 / {} rw,nosuid - cgroup2 cgroup2 rw\n", root.path().display());
        let hierarchy = Hierarchy::from_mounts(&mountinfo::parse(&line)).expect("cgroups");
        assert_eq!(hierarchy, Hierarchy::V2(root.path().to_owned()));
        std::fs::write(root.path().join("cgroup.controllers"), "cpuset cpu io memory hugetlb pids\n").expect("written");
        hierarchy.check().expect("all are there");
        std::fs::write(root.path().join("cgroup.controllers"), "cpu memory\n").expect("written");
        assert_eq!(
            hierarchy.check().expect_err("two lack").to_string(),
            "cgroup controllers are missing: cpuset, pids"
        );
    }

    #[test]
    fn no_cgroups_at_all() {
        assert_eq!(Hierarchy::from_mounts(&mountinfo::parse("1 0 0:1 / / rw - ext4 /dev/vda rw\n")), None);
    }
}
