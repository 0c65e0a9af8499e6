//! The gVisor engine against real sandboxes: what the guest sees, what a hostile guest can't do, and what a crash can't
//! leave behind.
//!
//! Needs root, runsc (`BELLJAR_RUNSC` or on the PATH) and a static busybox; says SKIPPED where one is missing.

mod gvisor_world;

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use belljar_core::id::SandboxId;
use belljar_core::limits::Resources;
use belljar_runtime::gvisor::{ExitReason, LaunchError};
use belljar_runtime::network::{InstanceName, NetworkConfig};
use belljar_runtime::{GvisorRuntime, GvisorSettings};
use gvisor_world::{Guest, PATIENCE, Place, SMALL, World};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;

async fn exit_reason(guest: &Guest) -> ExitReason {
    tokio::time::timeout(PATIENCE, guest.running.exited()).await.expect("it ends in time").expect("it can be awaited")
}

fn kill_process(pid: i32) {
    kill(Pid::from_raw(pid), Signal::SIGKILL).expect("it was alive");
}

#[tokio::test]
async fn a_destroyed_sandbox_leaves_nothing() {
    let Some(world) = World::open() else { return };
    let guest = world.start(SMALL, "").await;
    guest.read("done");
    assert_eq!(world.engine.list_owned().expect("listed"), [guest.id().clone()].into());
    let found = world.leftovers_now();
    for kind in ["mount", "loop device", "process", "cgroup", "disk", "file"] {
        assert!(found.iter().any(|line| line.starts_with(kind)), "no {kind} in {found:#?}");
    }
    world.destroy(guest.id()).await;
    assert_eq!(world.leftovers(), Vec::<String>::new());
    world.destroy(guest.id()).await;
}

#[tokio::test]
async fn the_guest_sees_its_own_machine() {
    let Some(world) = World::open() else { return };
    let script = r"
        exec 2> /www/errors
        nproc > /www/cpus
        grep MemTotal /proc/meminfo > /www/memory
        hostname > /www/hostname
        ulimit -u > /www/processes
        grep CapBnd /proc/self/status > /www/capabilities
        cat /.belljar/greeting > /www/greeting
        (echo x > /.belljar/greeting) 2> /dev/null; echo $? > /www/overwrite
        echo '10.0.0.1 other' | tee -a /etc/hosts > /dev/null
        sed -i s/other/another/ /etc/hosts; cp /etc/hosts /www/hosts
        su user -c 'id -u; su root -c id\ -u 2> /dev/null' | tr '\n' ' ' > /www/users
        cp /bin/busybox /usr/busybox; /usr/busybox echo runs > /www/program
        umount /tmp; df /tmp | tail -1 > /www/tmp
        df /dev/shm -k | tail -1 > /www/shm
        rm -r /bin/vi; ls /bin/vi | wc -l > /www/removed";
    let resources = Resources { vcpus: 1, memory_mib: 300, disk_mib: 128, processes: 77 };
    let guest = world.start(resources, script).await;
    guest.read("done");
    assert_eq!(guest.read("cpus"), "1");
    assert_eq!(guest.read("memory").split_whitespace().nth(1), Some((300 * 1024).to_string().as_str()));
    assert_eq!(guest.read("hostname"), "glass");
    assert_eq!(guest.read("processes"), "77");
    assert_eq!(guest.read("greeting"), "from the host");
    assert_eq!(guest.read("overwrite"), "1");
    assert_eq!(guest.read("hosts"), "127.0.0.1 localhost\n10.0.0.1 another");
    // Known limitation: older engines ignore the setuid bit.
    let setuid = world.engine.probe().await.expect("usable").honours_setuid();
    assert_eq!(guest.read("users"), if setuid { "1000 0" } else { "1000" });
    assert_eq!(guest.read("program"), "runs");
    assert!(guest.read("tmp").ends_with('/'), "/tmp is on the disk: {}", guest.read("tmp"));
    assert_eq!(guest.read("shm").split_whitespace().nth(1), Some((150 * 1024).to_string().as_str()));
    assert_eq!(guest.read("removed"), "0");
    assert!(world.rootfs().join("bin/vi").is_symlink(), "the shared rootfs is as it was");

    let bounding = guest.read("capabilities");
    let bounding = u64::from_str_radix(bounding.rsplit('\t').next().expect("a value"), 16).expect("hexadecimal");
    let (resource, setuid) = (1 << 24, 1 << 7);
    assert_eq!((bounding & resource, bounding & setuid), (0, setuid), "{bounding:x}");
}

#[tokio::test]
async fn two_cpus_are_two() {
    let Some(world) = World::open() else { return };
    let host = std::thread::available_parallelism().expect("known").get();
    let guest = world.start(Resources { vcpus: 2, ..SMALL }, "nproc > /www/cpus").await;
    assert_eq!(guest.read("cpus"), 2.min(host).to_string());
}

/// The sentry has root's user id, but capabilities over its own user namespace only; and it can't see the host's files.
#[tokio::test]
async fn the_sentry_is_confined_on_the_host() {
    let Some(world) = World::open() else { return };
    let guest = world.start(SMALL, "").await;
    let sentry = PathBuf::from(format!("/proc/{}", guest.running.sentry().pid));
    let own = |kind: &str| fs::read_link(format!("/proc/self/ns/{kind}")).expect("readable");
    for kind in ["user", "net", "mnt", "ipc", "uts"] {
        assert_ne!(fs::read_link(sentry.join("ns").join(kind)).expect("readable"), own(kind), "{kind}");
    }
    let mounts = fs::read_to_string(sentry.join("mountinfo")).expect("readable");
    assert!(!mounts.contains(" ext4 "), "no disk of the host is mounted there: {mounts}");
    let status = fs::read_to_string(sentry.join("status")).expect("readable");
    assert!(status.lines().any(|line| line == "Seccomp:\t2"), "{status}");
    assert!(status.lines().any(|line| line == "Uid:\t0\t0\t0\t0"), "root's number, without root's power: {status}");
    assert_eq!(fs::read_to_string(sentry.join("oom_score_adj")).expect("readable").trim(), "500");
    let session = fs::read_to_string(sentry.join("stat")).expect("readable");
    let session = session.rsplit(") ").next().and_then(|rest| rest.split(' ').nth(3)).expect("a session").to_owned();
    assert_ne!(session, nix::unistd::getsid(None).expect("own session").to_string());
}

#[tokio::test]
async fn a_memory_hog_ends_alone_and_it_is_known_why() {
    let Some(world) = World::open() else { return };
    let neighbour = world.start(SMALL, "").await;
    neighbour.read("done");
    let hog = world.start(SMALL, "dd if=/dev/zero of=/dev/null bs=1000M count=1").await;
    assert_eq!(exit_reason(&hog).await, ExitReason::OutOfMemory);
    assert_eq!(neighbour.peek("done").expect("it answers").as_deref(), Some("done\n"));
    world.destroy(hog.id()).await;
}

/// All that the guest may have it can have; the overhead is the sentry's.
#[tokio::test]
async fn a_guest_can_use_the_memory_it_sees() {
    let Some(world) = World::open() else { return };
    let guest = world.start(SMALL, "dd if=/dev/zero of=/dev/null bs=252M count=2; echo $? > /www/used").await;
    assert_eq!(guest.read("used"), "0");
}

/// Forks until it fails, then tells how far it came.
const BOMB: &str = "
    n=0; while [ $n -lt 2000 ]; do
        (exec sleep 1000) 2> /dev/null & [ $? = 0 ] || break
        n=$((n + 1)); echo $n > /tmp/count
    done 2> /dev/null";

#[tokio::test]
async fn a_users_fork_bomb_meets_its_limit() {
    let Some(world) = World::open() else { return };
    let script =
        format!("echo '{BOMB}' > /tmp/bomb; chmod 777 /tmp/bomb; su user -c 'sh /tmp/bomb'; cp /tmp/count /www");
    let guest = world.start(Resources { memory_mib: 512, ..SMALL }, &script).await;
    let count: u32 = guest.read("count").parse().expect("a number");
    assert!((40..=64).contains(&count), "{count} processes for a limit of 64");
    assert_eq!(guest.read("done"), "done", "init still works");
}

/// Root passes over RLIMIT_NPROC, so its own kernel's cgroup has to hold it. The agent sets this up.
#[tokio::test]
async fn roots_fork_bomb_meets_the_limit_of_its_own_kernel() {
    let Some(world) = World::open() else { return };
    let script = format!(
        "mkdir /limit; mount -t cgroup -o pids none /limit; mkdir /limit/all; echo 64 > /limit/all/pids.max
         sh -c 'echo $$ > /limit/all/cgroup.procs; {BOMB}'; cp /tmp/count /www"
    );
    let guest = world.start(Resources { memory_mib: 512, ..SMALL }, &script).await;
    let count: u32 = guest.read("count").parse().expect("a number");
    // gVisor lets a few more through than the figure says.
    assert!((40..=80).contains(&count), "{count} processes for a limit of 64");
    assert_eq!(guest.read("done"), "done", "init still works");
}

/// Without it the host's limit holds, at the price of the sandbox, and only of that.
#[tokio::test]
async fn roots_fork_bomb_never_reaches_the_host() {
    let Some(world) = World::open() else { return };
    let neighbour = world.start(SMALL, "").await;
    neighbour.read("done");
    let resources = Resources { vcpus: 1, memory_mib: 2048, disk_mib: 128, processes: 16 };
    let bomb = world.start(resources, BOMB).await;
    assert_eq!(exit_reason(&bomb).await, ExitReason::OutOfProcesses);
    assert_eq!(neighbour.peek("done").expect("it answers").as_deref(), Some("done\n"));
    world.destroy(bomb.id()).await;
}

#[tokio::test]
async fn a_full_disk_is_an_error_and_not_the_end() {
    let Some(world) = World::open() else { return };
    let script = "
        complaint=$(dd if=/dev/zero of=/fill bs=1M 2>&1); size=$(ls -l /fill); rm /fill
        echo $complaint > /www/complaint; echo $size > /www/size
        dd if=/dev/zero of=/again bs=1M count=100 2> /dev/null; echo $? > /www/again";
    // More disk than memory: what waits to be written must not count as the guest's memory for good.
    let guest = world.start(Resources { vcpus: 1, memory_mib: 128, disk_mib: 512, processes: 64 }, script).await;
    assert_eq!(guest.read("again"), "0");
    assert!(guest.read("complaint").contains("No space left on device"), "{}", guest.read("complaint"));
    let size: u64 = guest.read("size").split_whitespace().nth(4).and_then(|size| size.parse().ok()).expect("a size");
    assert!((480 << 20..=512 << 20).contains(&size), "{size} bytes fit on 512 MiB");
    let figures = nix::sys::statvfs::statvfs(guest.disk.mount_point()).expect("measured");
    let used_bytes = (figures.blocks() - figures.blocks_free()) * figures.fragment_size();
    assert!(used_bytes < 200 << 20, "what was deleted is free again: {used_bytes}");
}

#[tokio::test]
async fn a_restarted_server_finds_its_sandbox() {
    let Some(world) = World::open() else { return };
    let guest = world.start(SMALL, "").await;
    let later = world.restarted_engine();
    let adopted = later.adopt(guest.id()).expect("read").expect("it runs");
    assert_eq!(adopted.sentry(), guest.running.sentry());
    assert!(world.disks.adopt(guest.id()).expect("read").is_some());
    assert_eq!(later.adopt(&SandboxId::generate()).expect("read").map(|found| found.id().clone()), None);

    kill_process(adopted.sentry().pid);
    let reason = tokio::time::timeout(PATIENCE, adopted.exited()).await.expect("in time").expect("awaited");
    assert_eq!(reason, ExitReason::Ended);
    assert!(later.adopt(guest.id()).expect("read").is_none(), "a dead one is not adopted");
    later.destroy(guest.id()).await.expect("destroyed");
    assert_eq!(later.list_owned().expect("listed"), Default::default());
}

/// A second server of the name would end the first one's sandboxes as leftovers.
#[test]
fn an_instance_has_one_server_at_a_time_and_leaves_nothing_when_uninstalled() {
    let Some(world) = World::open() else { return };
    let instance = format!("t{}", std::process::id());
    let settings = |state: &str| GvisorSettings {
        runsc: gvisor_world::runsc().expect("found before"),
        runsc_flags: Vec::new(),
        network: NetworkConfig::new(InstanceName::new(&instance).expect("a name")),
        state_dir: world.place().directory.join(state),
        agent: b"an agent",
    };
    let runtimes = async || {
        let first = GvisorRuntime::start(settings("first")).await.expect("started");
        let refused = GvisorRuntime::start(settings("second")).await.expect_err("the name is taken");
        assert!(refused.source.to_string().contains(&format!("runs as instance {instance}")), "{refused:?}");
        assert!(!settings("second").state_dir.exists(), "nothing else was touched");
        first.uninstall().await.expect("uninstalled");
        assert!(!Path::new("/run/belljar").join(&instance).exists());
    };
    std::thread::scope(|scope| {
        // In a network of its own, since a server changes the host's.
        scope.spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).expect("a network");
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            runtime.block_on(runtimes());
        });
    });
}

#[tokio::test]
async fn a_recycled_process_id_is_not_adopted() {
    let Some(world) = World::open() else { return };
    let guest = world.start(SMALL, "").await;
    let record = world.place().directory.join("run").join(guest.id().as_str()).join("sentry.json");
    let text = fs::read_to_string(&record).expect("read");
    let start = guest.running.sentry().start_time_ticks.to_string();
    fs::write(&record, text.replace(&start, "1")).expect("written");
    assert!(world.restarted_engine().adopt(guest.id()).expect("read").is_none(), "another start time");
    let pid = guest.running.sentry().pid.to_string();
    fs::write(&record, text.replace(&pid, &std::process::id().to_string())).expect("written");
    assert!(world.restarted_engine().adopt(guest.id()).expect("read").is_none(), "a process of others");
    fs::write(&record, "{").expect("written");
    assert!(world.restarted_engine().adopt(guest.id()).is_err(), "damage is not taken for absence");
}

#[tokio::test]
async fn the_end_of_init_is_the_end() {
    let Some(world) = World::open() else { return };
    let guest = world.start(SMALL, "sleep 1; yes filler | head -n 1000; echo last words; exit 3").await;
    assert_eq!(exit_reason(&guest).await, ExitReason::Ended);
    let console = guest.running.end_of_console();
    assert!(console.ends_with("filler\nlast words\n"), "{console:?}");
    assert!(console.len() <= 2048, "{}", console.len());
    world.destroy(guest.id()).await;
    assert_eq!(world.leftovers(), Vec::<String>::new());
}

#[tokio::test]
async fn a_killed_sentry_takes_everything_with_it() {
    let Some(world) = World::open() else { return };
    let guest = world.start(SMALL, "").await;
    guest.read("done");
    kill_process(guest.running.sentry().pid);
    assert_eq!(exit_reason(&guest).await, ExitReason::Ended);
    let deadline = Instant::now() + PATIENCE;
    while world.leftovers_now().iter().any(|line| line.starts_with("process")) {
        assert!(Instant::now() < deadline, "{:#?}", world.leftovers_now());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Without the gofer there are no files of the template any more, so the sandbox must not linger.
#[tokio::test]
async fn a_killed_gofer_ends_the_sandbox() {
    let Some(world) = World::open() else { return };
    let guest = world.start(SMALL, "").await;
    guest.read("done");
    let gofer = world.processes().into_iter().find(|(_, command)| command.starts_with("runsc-gofer"));
    kill_process(gofer.expect("there is one").0);
    assert_eq!(exit_reason(&guest).await, ExitReason::Ended);
}

#[tokio::test]
async fn what_can_not_start_says_why_and_leaves_nothing() {
    let Some(world) = World::open() else { return };
    let id = SandboxId::generate();
    let (mut spec, _disk, _cable) = world.prepare(&id, SMALL).await;
    spec.init = vec!["/bin/nothing".to_owned()];
    let error = world.engine.launch(&spec).await.expect_err("no such program");
    assert!(matches!(&error, LaunchError::Refused { message, .. } if message.contains("/bin/nothing")), "{error}");
    world.destroy(&id).await;

    let (mut spec, _disk, _cable) = world.prepare(&id, SMALL).await;
    spec.init = vec!["/bin/sh".to_owned()];
    spec.rootfs = "/nonexistent".into();
    let error = world.engine.launch(&spec).await.expect_err("no such directory");
    assert!(matches!(error, LaunchError::Refused { .. }), "{error}");
    world.destroy(&id).await;
    assert_eq!(world.leftovers(), Vec::<String>::new());
}

#[tokio::test]
async fn the_engine_is_known() {
    let Some(world) = World::open() else { return };
    let info = world.engine.probe().await.expect("a usable runsc");
    assert!(info.has_flag("overlay2") && !info.version.is_empty(), "{info:?}");
}

// A server that is killed at any moment: played by this test program, started once more.

const PLACE: &str = "BELLJAR_TEST_PLACE";

/// Not a test: the part of a server that a test kills. It launches one sandbox after another, and waits after the last.
#[tokio::test]
#[ignore = "started by other tests, as a process to be killed"]
async fn server() {
    let place = std::env::var(PLACE).expect("started by a test");
    let (directory, cgroup_parent) = place.split_once('|').expect("two parts");
    let world = World::visit(Place { directory: directory.into(), cgroup_parent: cgroup_parent.to_owned() });
    let guest = world.start(SMALL, "").await;
    guest.read("done");
    fs::write(world.place().directory.join("ready"), guest.id().as_str()).expect("written");
    tokio::time::sleep(PATIENCE).await;
}

fn start_server(world: &World) -> Child {
    let place = world.place();
    Command::new(std::env::current_exe().expect("known"))
        .args(["--exact", "server", "--ignored"])
        .env(PLACE, format!("{}|{}", place.directory.display(), place.cgroup_parent))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .process_group(0)
        .spawn()
        .expect("started")
}

/// The whole process group at once, as a service manager does it.
fn kill_server(mut server: Child) {
    killpg(Pid::from_raw(i32::try_from(server.id()).expect("fits")), Signal::SIGKILL).expect("it was alive");
    server.wait().expect("reaped");
}

#[tokio::test]
async fn a_sandbox_outlives_its_server() {
    let Some(world) = World::open() else { return };
    let server = start_server(&world);
    let ready = world.place().directory.join("ready");
    let deadline = Instant::now() + PATIENCE;
    while !ready.exists() {
        assert!(Instant::now() < deadline, "the server is ready in time");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    kill_server(server);
    tokio::time::sleep(Duration::from_millis(300)).await;
    let id: SandboxId = fs::read_to_string(ready).expect("read").parse().expect("an id");
    let adopted = world.engine.adopt(&id).expect("read").expect("it still runs");
    let ended = tokio::time::timeout(Duration::from_millis(300), adopted.exited()).await;
    assert!(ended.is_err(), "it goes on: {ended:?}");
    world.destroy(&id).await;
    assert_eq!(world.leftovers(), Vec::<String>::new());
}

#[tokio::test]
async fn a_server_killed_at_any_moment_leaves_nothing_unfound() {
    let Some(world) = World::open() else { return };
    for round in 0..14 {
        let server = start_server(&world);
        tokio::time::sleep(Duration::from_millis(20 * round)).await;
        kill_server(server);
        // What a new server does: it adopts what runs, and removes what it does not want.
        for id in world.engine.list_owned().expect("listed") {
            world.engine.adopt(&id).expect("no half-written record");
        }
        world.destroy_all().await;
        assert_eq!(world.leftovers(), Vec::<String>::new(), "killed after {} ms", 20 * round);
    }
}

/// `cargo test -p belljar-runtime --test gvisor figures -- --ignored --nocapture`
#[tokio::test]
#[ignore = "measures, and prints what it measured"]
async fn figures() {
    const ROUNDS: usize = 20;
    let Some(world) = World::open() else { return };
    let (mut disk, mut launch, mut first_answer, mut destroy) = (vec![], vec![], vec![], vec![]);
    let (mut cpu_time, mut memory) = (vec![], vec![]);
    for _ in 0..ROUNDS {
        let id = SandboxId::generate();
        let start = Instant::now();
        world.disks.create(&id, 10 * 1024).await.expect("a disk");
        disk.push(start.elapsed());
        world.disks.destroy(&id).await.expect("removed");

        let (mut spec, _disk, cable) = world.prepare(&id, SMALL).await;
        spec.init = ["/bin/sh", "-c", "mkdir /www; echo done > /www/done; exec httpd -f -p 8080 -h /www"]
            .map(str::to_owned)
            .into();
        let start = Instant::now();
        world.engine.launch(&spec).await.expect("launched");
        launch.push(start.elapsed());
        cpu_time.push(world.usage(&id).cpu_time);
        while !cable.get("done").is_ok_and(|text| text.is_some()) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        first_answer.push(start.elapsed());
        tokio::time::sleep(Duration::from_millis(200)).await;
        memory.push(world.usage(&id).memory_bytes >> 10);

        let start = Instant::now();
        world.destroy(&id).await;
        destroy.push(start.elapsed());
    }
    let lines = [
        ("disk of 10 GiB", disk),
        ("launch", launch),
        ("of that CPU time", cpu_time),
        ("first answer", first_answer),
        ("destroy", destroy),
    ];
    for (name, mut times) in lines {
        times.sort_unstable();
        println!("{name}: p50 {:.1?}, worst {:.1?}", times[ROUNDS / 2], times[ROUNDS - 1]);
    }
    memory.sort_unstable();
    println!("memory of an idle sandbox: p50 {} KiB, most {} KiB", memory[ROUNDS / 2], memory[ROUNDS - 1]);

    let start = Instant::now();
    let together = futures::future::join_all((0..20).map(|_| world.start(SMALL, ""))).await;
    println!("20 launches at once, with disks and networks: {:.1?}", start.elapsed());
    let start = Instant::now();
    futures::future::join_all(together.iter().map(|guest| world.destroy(guest.id()))).await;
    println!("20 destroyed at once: {:.1?}", start.elapsed());
    assert_eq!(world.leftovers(), Vec::<String>::new());
}
