//! Counts everything on the host that belongs to a server: what is left after its sandboxes are gone is a leak.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use belljar_runtime::network::{InstanceName, NetworkConfig};

/// Teardown that goes on after a kill was answered has this long.
const SETTLE: Duration = Duration::from_secs(20);

/// Names of what exists, by kind.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Census {
    pub processes: BTreeSet<String>,
    pub mounts: BTreeSet<String>,
    pub interfaces: BTreeSet<String>,
    pub namespaces: BTreeSet<String>,
    pub cgroups: BTreeSet<String>,
    pub loop_devices: BTreeSet<String>,
    pub files: BTreeSet<String>,
}

impl Census {
    pub(crate) fn take(state_dir: &Path, instance: &str) -> Self {
        let state = state_dir.to_str().unwrap();
        let run_dir = Path::new("/run/belljar").join(instance);
        let network = NetworkConfig::new(InstanceName::new(instance).unwrap());
        Self {
            processes: processes(&format!("/belljar/{instance}/")),
            mounts: lines("/proc/self/mountinfo", |line| {
                line.contains(state) || line.contains(&format!("/belljar/{instance}/"))
            }),
            interfaces: interfaces(&network.interface_prefix()),
            namespaces: entries(&network.netns_dir),
            cgroups: cgroups(instance),
            loop_devices: loop_devices(state),
            files: [state_dir.join("disks/scratch"), run_dir.join("engine")]
                .iter()
                .flat_map(|part| entries(part))
                .collect(),
        }
    }

    /// Waits until nothing is left, and fails with what is.
    pub(crate) fn assert_empty(state_dir: &Path, instance: &str) {
        let deadline = Instant::now() + SETTLE;
        loop {
            let census = Self::take(state_dir, instance);
            if census == Self::default() {
                return;
            }
            assert!(Instant::now() < deadline, "something is left: {census:#?}");
            std::thread::sleep(Duration::from_millis(200));
        }
    }
}

/// The engine's processes carry the run directory in their arguments.
fn processes(run_dir: &str) -> BTreeSet<String> {
    fs::read_dir("/proc")
        .unwrap()
        .filter_map(|entry| {
            let path = entry.ok()?.path();
            let pid = path.file_name()?.to_str()?.parse::<u32>().ok()?;
            let command = String::from_utf8_lossy(&fs::read(path.join("cmdline")).ok()?).replace('\0', " ");
            command.contains(run_dir).then(|| format!("{pid} {}", command.chars().take(120).collect::<String>()))
        })
        .collect()
}

fn lines(file: &str, matches: impl Fn(&str) -> bool) -> BTreeSet<String> {
    fs::read_to_string(file).unwrap().lines().filter(|line| matches(line)).map(str::to_owned).collect()
}

fn interfaces(prefix: &str) -> BTreeSet<String> {
    let names = fs::read_dir("/sys/class/net").unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name.starts_with(prefix)).collect()
}

fn entries(directory: &Path) -> BTreeSet<String> {
    fs::read_dir(directory)
        .map(|entries| entries.map(|entry| entry.unwrap().path().display().to_string()).collect())
        .unwrap_or_default()
}

/// Sandboxes' groups below the instance's, in every hierarchy.
fn cgroups(instance: &str) -> BTreeSet<String> {
    let output = Command::new("find")
        .args(["/sys/fs/cgroup", "-type", "d", "-path"])
        .arg(format!("*/belljar-{instance}/*"))
        .output()
        .unwrap();
    String::from_utf8(output.stdout).unwrap().lines().map(str::to_owned).collect()
}

fn loop_devices(state: &str) -> BTreeSet<String> {
    fs::read_dir("/sys/block")
        .unwrap()
        .filter_map(|entry| fs::read_to_string(entry.ok()?.path().join("loop/backing_file")).ok())
        .filter(|file| file.contains(state))
        .map(|file| file.trim().to_owned())
        .collect()
}
