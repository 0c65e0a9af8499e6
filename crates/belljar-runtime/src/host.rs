//! What this host has and lacks.

use std::fs;
use std::io;
use std::path::Path;

use serde::Serialize;

/// One thing that was looked at on the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    pub status: Status,
    /// What was looked for and what was found, in one sentence.
    pub what: String,
    /// What mends it: a command where one does.
    pub remedy: Option<String>,
}

/// How a requirement stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    Met,
    /// Sandboxes run without it, but less well.
    Advice,
    /// Sandboxes can't run without it.
    Missing,
}

impl Finding {
    pub fn met(what: impl Into<String>) -> Self {
        Self { status: Status::Met, what: what.into(), remedy: None }
    }

    pub fn advice(what: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { status: Status::Advice, what: what.into(), remedy: Some(remedy.into()) }
    }

    pub fn missing(what: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { status: Status::Missing, what: what.into(), remedy: Some(remedy.into()) }
    }
}

/// The oldest kernel that everything used here is in: `LOOP_CONFIGURE` is the newest.
const OLDEST_KERNEL: (u32, u32) = (5, 8);

/// Memory of the machine, in MiB.
///
/// # Errors
/// If the kernel doesn't say.
pub fn memory_mib() -> io::Result<u64> {
    let text = fs::read_to_string("/proc/meminfo")?;
    parse_memory_mib(&text).ok_or_else(|| io::Error::other("/proc/meminfo has no MemTotal"))
}

fn parse_memory_mib(meminfo: &str) -> Option<u64> {
    let kib = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?.trim().strip_suffix("kB")?;
    Some(kib.trim().parse::<u64>().ok()? / 1024)
}

/// Why gVisor, in a sentence. Firecracker needs KVM, and this version doesn't drive it yet.
#[must_use]
pub fn engine_choice() -> String {
    let why = match kvm() {
        Kvm::Usable => "KVM is usable here, but this version of belljar does not drive Firecracker yet",
        Kvm::NoDevice => "there is no /dev/kvm",
        Kvm::NoHardware => {
            "/dev/kvm is there, but the CPU shows neither vmx nor svm, so ordinary guest kernels do not boot"
        }
    };
    format!("gVisor (runsc, systrap): {why}")
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kvm {
    Usable,
    NoDevice,
    NoHardware,
}

fn kvm() -> Kvm {
    if !Path::new("/dev/kvm").exists() {
        return Kvm::NoDevice;
    }
    let cpus = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    if shows_virtualization(&cpus) { Kvm::Usable } else { Kvm::NoHardware }
}

fn shows_virtualization(cpuinfo: &str) -> bool {
    let flags = cpuinfo.lines().filter_map(|line| line.strip_prefix("flags")).next().unwrap_or_default();
    flags.split_whitespace().any(|flag| flag == "vmx" || flag == "svm")
}

/// Everything about the machine itself; networking has its own list.
#[must_use]
pub fn check() -> Vec<Finding> {
    let mut findings = vec![root(), architecture(), kernel(), cgroups()];
    for (program, package, what) in
        [("mkfs.ext4", "e2fsprogs", "makes the sandboxes' disks"), ("mmdebstrap", "mmdebstrap", "builds templates")]
    {
        findings.push(program_on_path(program, package, what));
    }
    findings.push(loop_devices());
    findings
}

fn root() -> Finding {
    if nix::unistd::geteuid().is_root() {
        Finding::met("belljar runs as root, which namespaces, mounts and cgroups need")
    } else {
        Finding::missing(
            "belljar does not run as root, which namespaces, mounts and cgroups need",
            "sudo belljar doctor",
        )
    }
}

fn architecture() -> Finding {
    match std::env::consts::ARCH {
        "x86_64" => Finding::met("the machine is x86-64"),
        other => Finding::missing(format!("the machine is {other}; only x86-64 is supported"), "use an x86-64 machine"),
    }
}

fn kernel() -> Finding {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let release = release.trim();
    let (major, minor) = OLDEST_KERNEL;
    if parse_kernel(release).is_some_and(|version| version >= OLDEST_KERNEL) {
        Finding::met(format!("the kernel is Linux {release} ({major}.{minor} or newer is needed)"))
    } else {
        Finding::missing(format!("the kernel is {release:?}"), format!("install Linux {major}.{minor} or newer"))
    }
}

fn parse_kernel(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

fn cgroups() -> Finding {
    match crate::cgroup::Hierarchy::detect() {
        Ok(hierarchy) => Finding::met(format!("cgroups with cpu, memory and pids controllers: {hierarchy}")),
        Err(error) => Finding::missing(
            format!("cgroups can't be used: {error}"),
            "boot with systemd's defaults, or mount cgroup2 at /sys/fs/cgroup with the cpu, memory and pids \
             controllers",
        ),
    }
}

fn program_on_path(program: &str, package: &str, what: &str) -> Finding {
    let path = std::env::var_os("PATH").unwrap_or_default();
    match std::env::split_paths(&path).map(|directory| directory.join(program)).find(|file| file.is_file()) {
        Some(file) => Finding::met(format!("{program}, which {what}, is {}", file.display())),
        None => {
            Finding::missing(format!("{program}, which {what}, was not found"), format!("apt-get install {package}"))
        }
    }
}

fn loop_devices() -> Finding {
    if Path::new("/dev/loop-control").exists() {
        Finding::met("loop devices, for the sandboxes' disks, are there")
    } else {
        Finding::missing("there are no loop devices, for the sandboxes' disks", "modprobe loop")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_the_kernel_says() {
        assert_eq!(parse_memory_mib("MemFree: 1 kB\nMemTotal:       24684092 kB\n"), Some(24_105));
        assert_eq!(parse_kernel("6.18.44-amd64"), Some((6, 18)));
        assert_eq!(parse_kernel("5.8"), Some((5, 8)));
        assert_eq!(parse_kernel("unknown"), None);
        assert!(shows_virtualization("flags\t\t: fpu svm sse\n"));
        assert!(!shows_virtualization("flags\t\t: fpu svm_lock sse\n"));
    }
}
