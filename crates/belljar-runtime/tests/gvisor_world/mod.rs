//! An engine of its own for each test: directories, cgroups and networks that nobody else uses, and a busybox to run.
//!
//! Nothing is executed in a running sandbox, so a guest tells what it found over the network: its init serves `/www` by
//! HTTP, and the test asks from the other end of the guest's cable.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use belljar_core::id::SandboxId;
use belljar_core::limits::Resources;
use belljar_runtime::cgroup::{CgroupTree, Hierarchy, Usage};
use belljar_runtime::disk::{ScratchDisk, ScratchDisks};
use belljar_runtime::gvisor::{Gvisor, GvisorConfig, LaunchError, LaunchSpec, ReadOnlyMount, RunningSandbox};
use nix::sched::{CloneFlags, setns, unshare};
use tempfile::TempDir;

const GUEST: Ipv4Addr = Ipv4Addr::new(169, 254, 7, 2);
const PORT: u16 = 8080;

/// Longer than anything takes on a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

pub(crate) const SMALL: Resources = Resources { vcpus: 1, memory_mib: 256, disk_mib: 256, processes: 64 };

/// What a guest's init does before the test's own script. A small cache for /proc is what belljar's agent asks for too.
const PROLOGUE: &str = "mount -t proc -o dentry_cache_limit=16 proc /proc; mkdir -p /www; httpd -p 8080 -h /www\n";
const EPILOGUE: &str = "\necho done > /www/done; while true; do sleep 1000; done";

/// The engine under test and all that belongs to it. Dropping it removes everything.
#[derive(Debug)]
pub(crate) struct World {
    pub(crate) engine: Gvisor,
    pub(crate) disks: ScratchDisks,
    cgroups: CgroupTree,
    place: Place,
    /// None in a process that only visits another's world.
    state: Option<TempDir>,
}

/// Where a world is; enough for another process to open the same.
#[derive(Debug, Clone)]
pub(crate) struct Place {
    pub(crate) directory: PathBuf,
    pub(crate) cgroup_parent: String,
}

/// A running guest.
#[derive(Debug)]
pub(crate) struct Guest {
    pub(crate) running: RunningSandbox,
    pub(crate) disk: ScratchDisk,
    cable: Cable,
}

impl World {
    /// None, after saying why, where sandboxes can't be run.
    pub(crate) fn open() -> Option<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        if let Some(reason) = obstacle() {
            // Straight to the descriptor: the test harness would swallow what is printed.
            writeln!(io::stderr(), "SKIPPED: {reason}").expect("standard error is open");
            return None;
        }
        let state = tempfile::Builder::new().prefix("bj").tempdir().expect("a directory");
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let cgroup_parent = format!("belljar-test-{}-{number}", std::process::id());
        build_rootfs(&state.path().join("rootfs"));
        let place = Place { directory: state.path().to_owned(), cgroup_parent };
        let mut world = Self::visit(place);
        world.state = Some(state);
        Some(world)
    }

    /// Opens a world that another process made, as a restarted server would.
    pub(crate) fn visit(place: Place) -> Self {
        let hierarchy = Hierarchy::detect().expect("cgroups");
        let cgroups = CgroupTree::open(hierarchy, Path::new(&place.cgroup_parent)).expect("a cgroup parent");
        let engine = Self::engine_at(&place, cgroups.clone());
        let disks = ScratchDisks::new(place.directory.join("disks"));
        Self { engine, disks, cgroups, place, state: None }
    }

    fn engine_at(place: &Place, cgroups: CgroupTree) -> Gvisor {
        let config = GvisorConfig::new(runsc().expect("found before"), place.directory.join("run"));
        Gvisor::new(config, cgroups).expect("an engine")
    }

    pub(crate) fn place(&self) -> Place {
        self.place.clone()
    }

    /// What a restarted server has: the same directories and nothing else.
    pub(crate) fn restarted_engine(&self) -> Gvisor {
        Self::engine_at(&self.place, self.cgroups.clone())
    }

    pub(crate) fn rootfs(&self) -> PathBuf {
        self.place.directory.join("rootfs")
    }

    pub(crate) async fn start(&self, resources: Resources, script: &str) -> Guest {
        self.try_start(&SandboxId::generate(), resources, script).await.expect("launched")
    }

    pub(crate) async fn try_start(
        &self,
        id: &SandboxId,
        resources: Resources,
        script: &str,
    ) -> Result<Guest, LaunchError> {
        let (mut spec, disk, cable) = self.prepare(id, resources).await;
        spec.init = ["/bin/sh", "-c"].map(str::to_owned).into();
        spec.init.push(format!("{PROLOGUE}{script}{EPILOGUE}"));
        let running = self.engine.launch(&spec).await?;
        Ok(Guest { running, disk, cable })
    }

    /// Everything that has to be there before a launch, and a specification without init.
    pub(crate) async fn prepare(&self, id: &SandboxId, resources: Resources) -> (LaunchSpec, ScratchDisk, Cable) {
        let disk = self.disks.create(id, resources.disk_mib).await.expect("a disk");
        let cable = Cable::new();
        let spec = LaunchSpec {
            id: id.clone(),
            rootfs: self.rootfs(),
            scratch_dir: disk.mount_point().to_owned(),
            inner_netns: cable.inner.path(),
            hostname: "glass".to_owned(),
            resources,
            init: Vec::new(),
            mounts: vec![ReadOnlyMount {
                source: self.place.directory.join("guest"),
                destination: PathBuf::from("/.belljar"),
            }],
        };
        fs::create_dir_all(self.place.directory.join("guest")).expect("created");
        fs::write(self.place.directory.join("guest/greeting"), "from the host\n").expect("written");
        (spec, disk, cable)
    }

    pub(crate) fn usage(&self, id: &SandboxId) -> Usage {
        self.cgroups.cgroup(id).usage().expect("counted")
    }

    pub(crate) async fn destroy(&self, id: &SandboxId) {
        self.engine.destroy(id).await.expect("destroyed");
        self.disks.destroy(id).await.expect("disk removed");
    }

    pub(crate) async fn destroy_all(&self) {
        let mut ids = self.engine.list_owned().expect("listed");
        ids.extend(self.disks.list().expect("listed"));
        for id in ids {
            self.destroy(&id).await;
        }
    }

    /// Everything of a sandbox that exists on the host, in words. Loop devices go a moment after their mount.
    pub(crate) fn leftovers(&self) -> Vec<String> {
        let deadline = Instant::now() + Duration::from_secs(5);
        loop {
            let found = self.leftovers_now();
            if found.is_empty() || Instant::now() > deadline {
                return found;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    pub(crate) fn leftovers_now(&self) -> Vec<String> {
        let directory = self.place.directory.to_str().expect("plain text");
        let mounts = fs::read_to_string("/proc/self/mountinfo").expect("readable");
        let mut found: Vec<String> =
            mounts.lines().filter(|line| line.contains(directory)).map(|line| format!("mount {line}")).collect();
        for device in fs::read_dir("/sys/block").expect("listed").flatten() {
            let backing = fs::read_to_string(device.path().join("loop/backing_file")).unwrap_or_default();
            if backing.contains(directory) {
                found.push(format!("loop device {backing}"));
            }
        }
        found.extend(self.processes().iter().map(|(pid, command)| format!("process {pid} {command}")));
        found.extend(self.cgroups.list().expect("listed").iter().map(|id| format!("cgroup {id}")));
        found.extend(self.disks.list().expect("listed").iter().map(|id| format!("disk {id}")));
        found.extend(
            fs::read_dir(self.place.directory.join("run"))
                .expect("listed")
                .flatten()
                .map(|entry| format!("file {}", entry.path().display())),
        );
        found
    }

    /// The sandboxes' processes: each has the run directory in its arguments.
    pub(crate) fn processes(&self) -> Vec<(i32, String)> {
        let run = format!("{}/run", self.place.directory.display());
        let processes = fs::read_dir("/proc").expect("listed").flatten().filter_map(|entry| {
            let pid = entry.file_name().to_str()?.parse().ok()?;
            let command = fs::read(entry.path().join("cmdline")).ok()?;
            Some((pid, String::from_utf8_lossy(&command).replace('\0', " ")))
        });
        processes.filter(|(_, command)| command.contains(&run)).collect()
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if self.state.is_none() {
            return;
        }
        // A thread, since this may be dropped inside an async runtime, where another can't be run.
        let removed = std::thread::scope(|scope| {
            let removal = scope.spawn(|| {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
                runtime.block_on(self.destroy_all());
                self.cgroups.remove().expect("the cgroup parent is empty");
            });
            removal.join()
        });
        // A second panic would hide the first.
        assert!(removed.is_ok() || std::thread::panicking(), "the world can't be removed");
    }
}

impl Guest {
    pub(crate) fn id(&self) -> &SandboxId {
        self.running.id()
    }

    /// The text of a file below the guest's /www, once there is any.
    pub(crate) fn read(&self, file: &str) -> String {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.cable.get(file) {
                Ok(Some(text)) if !text.is_empty() => return text.trim().to_owned(),
                result if Instant::now() > deadline => panic!("no {file} in time: {result:?}"),
                _ => std::thread::sleep(Duration::from_millis(20)),
            }
        }
    }

    /// What is there now; an error if nobody answers.
    pub(crate) fn peek(&self, file: &str) -> io::Result<Option<String>> {
        self.cable.get(file)
    }
}

/// A network namespace without a name: it ends with the last process in it, also when a test panics.
#[derive(Debug)]
pub(crate) struct Netns(File);

impl Netns {
    fn new() -> Self {
        let made = std::thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).expect("a namespace");
            Self(File::open("/proc/thread-self/ns/net").expect("its file"))
        });
        made.join().expect("a thread")
    }

    pub(crate) fn path(&self) -> PathBuf {
        format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd()).into()
    }

    fn run(&self, command: &str) {
        let status = Command::new("nsenter")
            .arg(format!("--net={}", self.path().display()))
            .args(command.split(' '))
            .status()
            .expect("nsenter runs");
        assert!(status.success(), "{command}");
    }
}

/// The two ends of a guest's network cable.
#[derive(Debug)]
pub(crate) struct Cable {
    inner: Netns,
    router: Netns,
}

impl Cable {
    fn new() -> Self {
        let cable = Self { inner: Netns::new(), router: Netns::new() };
        let inner = cable.inner.path();
        cable.router.run(&format!("ip link add guest type veth peer name eth0 netns {}", inner.display()));
        cable.router.run("ip address add 169.254.7.1/30 dev guest");
        cable.router.run("ip link set guest up");
        cable.inner.run("ip address add 169.254.7.2/30 dev eth0");
        cable.inner.run("ip link set eth0 up");
        cable.inner.run("ip link set lo up");
        cable
    }

    pub(crate) fn get(&self, file: &str) -> io::Result<Option<String>> {
        let (router, request) = (&self.router.0, format!("GET /{file} HTTP/1.0\r\n\r\n"));
        std::thread::scope(|scope| {
            let asked = scope.spawn(move || {
                setns(router, CloneFlags::CLONE_NEWNET)?;
                let mut stream = TcpStream::connect_timeout(&SocketAddr::from((GUEST, PORT)), Duration::from_secs(2))?;
                stream.set_read_timeout(Some(Duration::from_secs(5)))?;
                stream.write_all(request.as_bytes())?;
                let mut answer = String::new();
                stream.read_to_string(&mut answer)?;
                let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((answer.as_str(), ""));
                Ok(head.contains(" 200 ").then(|| body.to_owned()))
            });
            asked.join().expect("a thread")
        })
    }
}

fn obstacle() -> Option<String> {
    if !nix::unistd::geteuid().is_root() {
        return Some("sandboxes can only be run by root".to_owned());
    }
    if runsc().is_none() {
        return Some("no runsc, neither in BELLJAR_RUNSC nor on the PATH".to_owned());
    }
    for program in ["ip", "nsenter", "mkfs.ext4"] {
        if on_path(program).is_none() {
            return Some(format!("no {program} on the PATH"));
        }
    }
    match on_path("busybox") {
        Some(busybox) if is_static(&busybox) => None,
        _ => Some("no static busybox on the PATH (Debian: busybox-static)".to_owned()),
    }
}

/// Whether an x86-64 program names no interpreter, which is what a dynamic one does first.
fn is_static(program: &Path) -> bool {
    const INTERPRETER: u32 = 3;
    let program = fs::read(program).unwrap_or_default();
    let half = |at: usize| program.get(at..at + 2).map(|bytes| u16::from_le_bytes([bytes[0], bytes[1]]));
    let (Some(headers), Some(size), Some(count)) = (half(32), half(54), half(56)) else { return false };
    let kind = |number: u16| {
        let at = usize::from(headers) + usize::from(size) * usize::from(number);
        program.get(at..at + 4).map(|bytes| u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
    };
    (0..count).all(|number| kind(number).is_some_and(|kind| kind != INTERPRETER))
}

pub(crate) fn runsc() -> Option<PathBuf> {
    std::env::var_os("BELLJAR_RUNSC").map(PathBuf::from).or_else(|| on_path("runsc"))
}

fn on_path(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|directory| directory.join(program)).find(|file| file.is_file())
}

/// busybox under all its names, once more as a setuid `su`, and two users who need no password.
fn build_rootfs(rootfs: &Path) {
    for directory in ["bin", "dev", "etc", "proc", "root", "sys", "tmp", "usr"] {
        fs::create_dir_all(rootfs.join(directory)).expect("created");
    }
    let busybox = on_path("busybox").expect("found before");
    fs::copy(&busybox, rootfs.join("bin/busybox")).expect("copied");
    let listed = Command::new(&busybox).arg("--list").stdin(Stdio::null()).output().expect("busybox runs").stdout;
    let names: BTreeSet<String> = String::from_utf8_lossy(&listed).lines().map(str::to_owned).collect();
    for name in names.iter().filter(|name| !["busybox", "su"].contains(&name.as_str())) {
        symlink("busybox", rootfs.join("bin").join(name)).expect("linked");
    }
    fs::copy(&busybox, rootfs.join("bin/su")).expect("copied");
    fs::set_permissions(rootfs.join("bin/su"), fs::Permissions::from_mode(0o4755)).expect("setuid");
    fs::write(rootfs.join("etc/passwd"), "root::0:0:root:/root:/bin/sh\nuser::1000:1000:user:/tmp:/bin/sh\n")
        .expect("written");
    fs::write(rootfs.join("etc/group"), "root:x:0:\nuser:x:1000:\n").expect("written");
    fs::write(rootfs.join("etc/hosts"), "127.0.0.1 localhost\n").expect("written");
    fs::set_permissions(rootfs.join("tmp"), fs::Permissions::from_mode(0o1777)).expect("sticky");
}
