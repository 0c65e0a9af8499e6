//! The OCI configuration that runsc reads.
//!
//! The types are our own: belljar only ever writes this file, and writes a tenth of what the specification knows. Each
//! field here is one we decided on.

use std::path::{Path, PathBuf};

use serde::Serialize;

use super::LaunchSpec;

/// What root may do in the guest: all that the sentry knows except `CAP_SYS_RESOURCE`, with which it could raise its
/// limits. They are capabilities over the guest's own kernel; what they are worth on the host says [`IDENTITY`].
const ROOT_CAPABILITIES: [&str; 37] = [
    "CAP_AUDIT_CONTROL",
    "CAP_AUDIT_READ",
    "CAP_AUDIT_WRITE",
    "CAP_BLOCK_SUSPEND",
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_DAC_READ_SEARCH",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_IPC_LOCK",
    "CAP_IPC_OWNER",
    "CAP_KILL",
    "CAP_LEASE",
    "CAP_LINUX_IMMUTABLE",
    "CAP_MAC_ADMIN",
    "CAP_MAC_OVERRIDE",
    "CAP_MKNOD",
    "CAP_NET_ADMIN",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_BROADCAST",
    "CAP_NET_RAW",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYSLOG",
    "CAP_SYS_ADMIN",
    "CAP_SYS_BOOT",
    "CAP_SYS_CHROOT",
    "CAP_SYS_MODULE",
    "CAP_SYS_NICE",
    "CAP_SYS_PACCT",
    "CAP_SYS_PTRACE",
    "CAP_SYS_RAWIO",
    "CAP_SYS_TIME",
    "CAP_SYS_TTY_CONFIG",
    "CAP_WAKE_ALARM",
];

/// Files that one process may have open, in the guest.
const OPEN_FILES: u64 = 65_536;

/// When the host itself is out of memory a sandbox goes before the server and the machine's own services.
const OOM_SCORE_ADJUSTMENT: i32 = 500;

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Configuration<'a> {
    oci_version: &'static str,
    process: Process<'a>,
    root: Root<'a>,
    hostname: &'a str,
    mounts: Vec<Mount<'a>>,
    linux: Linux<'a>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Process<'a> {
    user: User,
    args: &'a [String],
    cwd: &'static str,
    capabilities: Capabilities,
    rlimits: Vec<Rlimit>,
    /// False, or `sudo` would not work.
    no_new_privileges: bool,
    oom_score_adj: i32,
}

#[derive(Debug, Serialize)]
struct User {
    uid: u32,
    gid: u32,
}

#[derive(Debug, Serialize)]
struct Capabilities {
    bounding: &'static [&'static str],
    effective: &'static [&'static str],
    permitted: &'static [&'static str],
}

#[derive(Debug, Serialize)]
struct Rlimit {
    #[serde(rename = "type")]
    kind: &'static str,
    soft: u64,
    hard: u64,
}

#[derive(Debug, Serialize)]
struct Root<'a> {
    path: &'a Path,
    readonly: bool,
}

#[derive(Debug, Serialize)]
struct Mount<'a> {
    destination: &'a Path,
    #[serde(rename = "type")]
    kind: &'static str,
    source: &'a Path,
    options: Vec<String>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Linux<'a> {
    cgroups_path: PathBuf,
    namespaces: Vec<Namespace<'a>>,
    uid_mappings: [IdMapping; 1],
    gid_mappings: [IdMapping; 1],
}

#[derive(Debug, Serialize)]
struct Namespace<'a> {
    #[serde(rename = "type")]
    kind: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    path: Option<&'a Path>,
}

#[derive(Debug, Clone, Copy, Serialize)]
struct IdMapping {
    #[serde(rename = "containerID")]
    container_id: u32,
    #[serde(rename = "hostID")]
    host_id: u32,
    size: u32,
}

/// Every user is itself, so on the host the sentry has user id 0: the files of root are its own, as far as the empty
/// root directory that runsc puts it in lets it reach any. The namespace is there for the capabilities: runsc gives the
/// sentry, a process of the host, those that the guest's root has, and this way they hold for what belongs to its own
/// user namespace and for nothing else on the host.
const IDENTITY: [IdMapping; 1] = [IdMapping { container_id: 0, host_id: 0, size: u32::MAX }];

impl<'a> Configuration<'a> {
    pub(super) fn new(spec: &'a LaunchSpec, cgroups_path: PathBuf) -> Self {
        Self {
            oci_version: "1.0.2",
            process: Process {
                user: User { uid: 0, gid: 0 },
                args: &spec.init,
                cwd: "/",
                capabilities: Capabilities {
                    bounding: &ROOT_CAPABILITIES,
                    effective: &ROOT_CAPABILITIES,
                    permitted: &ROOT_CAPABILITIES,
                },
                rlimits: vec![
                    fixed_limit("RLIMIT_NPROC", u64::from(spec.resources.processes)),
                    fixed_limit("RLIMIT_NOFILE", OPEN_FILES),
                ],
                no_new_privileges: false,
                oom_score_adj: OOM_SCORE_ADJUSTMENT,
            },
            // Writable for the guest, by the sentry's overlay; the directory itself is never written.
            root: Root { path: &spec.rootfs, readonly: false },
            hostname: &spec.hostname,
            mounts: mounts(spec),
            linux: Linux {
                cgroups_path,
                namespaces: namespaces(&spec.inner_netns),
                uid_mappings: IDENTITY,
                gid_mappings: IDENTITY,
            },
        }
    }
}

fn fixed_limit(kind: &'static str, value: u64) -> Rlimit {
    Rlimit { kind, soft: value, hard: value }
}

fn namespaces(network: &Path) -> Vec<Namespace<'_>> {
    let own = ["pid", "mount", "ipc", "uts", "user"].map(|kind| Namespace { kind, path: None });
    own.into_iter().chain([Namespace { kind: "network", path: Some(network) }]).collect()
}

fn mounts(spec: &LaunchSpec) -> Vec<Mount<'_>> {
    // As on Linux, /dev/shm takes half of the memory at most; what is in it counts as memory.
    let shm_size = format!("size={}m", spec.resources.memory_mib / 2);
    let system = [
        ("/proc", "proc", vec!["nosuid", "noexec", "nodev"]),
        ("/dev", "tmpfs", vec!["nosuid", "strictatime", "mode=755"]),
        ("/dev/pts", "devpts", vec!["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"]),
        ("/dev/shm", "tmpfs", vec!["nosuid", "nodev", "mode=1777", &shm_size]),
        ("/sys", "sysfs", vec!["nosuid", "noexec", "nodev", "ro"]),
    ];
    let system = system.into_iter().map(|(destination, kind, options)| Mount {
        destination: Path::new(destination),
        kind,
        source: Path::new(kind),
        options: options.into_iter().map(str::to_owned).collect(),
    });
    let binds = spec.mounts.iter().map(|mount| Mount {
        destination: &mount.destination,
        kind: "bind",
        source: &mount.source,
        options: ["ro", "nosuid", "nodev"].map(str::to_owned).into(),
    });
    system.chain(binds).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gvisor::ReadOnlyMount;
    use belljar_core::id::SandboxId;
    use belljar_core::limits::Resources;
    use serde_json::json;

    fn spec() -> LaunchSpec {
        LaunchSpec {
            id: SandboxId::generate(),
            rootfs: "/templates/base".into(),
            scratch_dir: "/scratch".into(),
            inner_netns: "/run/netns/inner".into(),
            hostname: "belljar".into(),
            resources: Resources { vcpus: 1, memory_mib: 512, disk_mib: 1024, processes: 64 },
            init: vec!["/.belljar/agent".into()],
            mounts: vec![ReadOnlyMount { source: "/state/guest".into(), destination: "/.belljar".into() }],
        }
    }

    fn written() -> serde_json::Value {
        serde_json::to_value(Configuration::new(&spec(), "/belljar-main/x".into())).expect("serializable")
    }

    #[test]
    fn root_can_not_raise_its_limits() {
        let written = written();
        for set in ["bounding", "effective", "permitted"] {
            let capabilities = written["process"]["capabilities"][set].as_array().expect("a list");
            assert!(!capabilities.contains(&json!("CAP_SYS_RESOURCE")), "{set}");
            assert!(capabilities.contains(&json!("CAP_SETUID")), "{set}");
        }
        assert_eq!(written["process"]["rlimits"][0], json!({"type": "RLIMIT_NPROC", "soft": 64, "hard": 64}));
        assert_eq!(written["process"]["noNewPrivileges"], json!(false));
    }

    #[test]
    fn the_sentry_has_a_user_namespace_of_its_own() {
        let linux = &written()["linux"];
        assert!(linux["namespaces"].as_array().expect("a list").contains(&json!({"type": "user"})));
        assert_eq!(linux["uidMappings"], json!([{"containerID": 0, "hostID": 0, "size": u32::MAX}]));
        assert_eq!(linux["cgroupsPath"], json!("/belljar-main/x"));
        assert_eq!(linux["namespaces"][5], json!({"type": "network", "path": "/run/netns/inner"}));
    }

    #[test]
    fn every_bind_is_read_only() {
        let written = written();
        let binds: Vec<_> = written["mounts"]
            .as_array()
            .expect("a list")
            .iter()
            .filter(|mount| mount["type"] == json!("bind"))
            .collect();
        assert_eq!(binds.len(), 1);
        assert_eq!(binds[0]["destination"], json!("/.belljar"));
        assert!(binds[0]["options"].as_array().expect("a list").contains(&json!("ro")));
    }
}
