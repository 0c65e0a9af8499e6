//! A world of its own for each test: a host, an internet and a private network, each a network namespace.
//!
//! ```text
//!   private ── lan0 [host] eth0 ── internet
//! 10.99.0.2   10.99.0.1 │ 198.51.100.1   198.51.100.2, 1.2.3.4
//!                    sandboxes
//! ```
//!
//! The test's thread *is* the host, so everything belljar does to "the host" it does there: the machine's own network
//! is not touched, and neither its firewall nor its forwarding changes what the tests see. Namespaces without a file
//! end with the last thread or descriptor, also when a test panics.

use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs, UdpSocket};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use belljar_core::id::SandboxId;
use belljar_runtime::network::{
    Egress, GATEWAY_ADDRESS, GUEST_ADDRESS, InstanceName, NetworkConfig, NetworkManager, SandboxNetwork,
};
use nix::mount::{MntFlags, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, socket};
use tempfile::TempDir;

pub(crate) const HOST: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);
pub(crate) const HOST_ON_LAN: Ipv4Addr = Ipv4Addr::new(10, 99, 0, 1);
pub(crate) const INTERNET: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 2);
pub(crate) const PUBLIC: Ipv4Addr = Ipv4Addr::new(1, 2, 3, 4);
pub(crate) const PRIVATE: Ipv4Addr = Ipv4Addr::new(10, 99, 0, 2);
/// All held by the machine in the private network.
pub(crate) const NOT_PUBLIC: [Ipv4Addr; 6] = [
    PRIVATE,
    Ipv4Addr::new(192, 168, 77, 2),
    Ipv4Addr::new(172, 20, 0, 2),
    Ipv4Addr::new(100, 64, 0, 2),
    Ipv4Addr::new(169, 254, 169, 254),
    Ipv4Addr::new(203, 0, 113, 9),
];

/// What the host's sandboxes are told to be its resolver.
const RESOLVER: (Ipv4Addr, u16) = (Ipv4Addr::LOCALHOST, 5300);

/// Longer than any answer takes, and shorter than a second SYN would wait.
pub(crate) const PATIENCE: Duration = Duration::from_millis(700);

#[derive(Debug, Clone)]
pub(crate) struct Netns(Arc<File>);

impl Netns {
    fn current() -> Self {
        Self(Arc::new(File::open("/proc/thread-self/ns/net").expect("own namespace")))
    }

    pub(crate) fn open(path: &Path) -> Self {
        Self(Arc::new(File::open(path).expect("a namespace file")))
    }

    fn new() -> Self {
        let made = std::thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).expect("unshare");
            Self::current()
        });
        made.join().expect("a new namespace")
    }

    fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd())
    }

    fn spawn<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> JoinHandle<T> {
        let file = Arc::clone(&self.0);
        std::thread::spawn(move || {
            setns(&*file, CloneFlags::CLONE_NEWNET).expect("setns");
            job()
        })
    }

    /// Runs `job` on a thread of its own in this namespace, while the test's tasks go on.
    pub(crate) async fn run<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> T {
        let (sender, receiver) = tokio::sync::oneshot::channel();
        let thread = self.spawn(move || drop(sender.send(job())));
        match receiver.await {
            Ok(result) => result,
            Err(_) => std::panic::resume_unwind(thread.join().expect_err("it sent nothing")),
        }
    }

    /// Runs a shell script in this namespace; it must succeed. Returns what it printed.
    pub(crate) fn sh(&self, script: &str) -> String {
        let script = script.to_owned();
        let ran = self.spawn(move || {
            let output = Command::new("sh").args(["-ec", &script]).output().expect("sh");
            assert!(output.status.success(), "{script}\n{}", String::from_utf8_lossy(&output.stderr));
            String::from_utf8_lossy(&output.stdout).into_owned()
        });
        ran.join().expect("a script that succeeds")
    }

    /// Connects, exchanges a word, and says from which address the other side saw it come.
    pub(crate) async fn connect(&self, address: Ipv4Addr, port: u16) -> io::Result<IpAddr> {
        self.run(move || {
            let mut stream = TcpStream::connect_timeout(&(address, port).into(), PATIENCE)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer)?;
            answer.parse().map_err(io::Error::other)
        })
        .await
    }
}

/// A TCP server that tells every client its address and hangs up, and remembers who came.
#[derive(Debug)]
pub(crate) struct Listener {
    stop: Arc<AtomicBool>,
    visitors: Arc<Mutex<Vec<SocketAddr>>>,
    thread: Option<JoinHandle<()>>,
    pub(crate) port: u16,
}

impl Listener {
    pub(crate) async fn start(netns: &Netns) -> Self {
        let listener = netns
            .run(|| {
                let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0))?;
                listener.set_nonblocking(true)?;
                io::Result::Ok(listener)
            })
            .await
            .expect("a listener");
        let port = listener.local_addr().expect("an address").port();
        let stop = Arc::new(AtomicBool::new(false));
        let visitors = Arc::new(Mutex::new(Vec::new()));
        let thread = std::thread::spawn({
            let (stop, visitors) = (Arc::clone(&stop), Arc::clone(&visitors));
            move || {
                while !stop.load(Ordering::Relaxed) {
                    match listener.accept() {
                        Ok((mut stream, peer)) => {
                            visitors.lock().expect("no panic").push(peer);
                            let _ = write!(stream, "{}", peer.ip());
                        }
                        Err(_) => std::thread::sleep(Duration::from_millis(2)),
                    }
                }
            }
        });
        Self { stop, visitors, thread: Some(thread), port }
    }

    pub(crate) fn visitors(&self) -> Vec<SocketAddr> {
        self.visitors.lock().expect("no panic").clone()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A UDP socket in a namespace, with a limit to its patience.
pub(crate) async fn udp(netns: &Netns, address: impl Into<IpAddr>, port: u16) -> UdpSocket {
    let address = address.into();
    let socket = netns.run(move || UdpSocket::bind((address, port))).await.expect("a UDP socket");
    socket.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    socket
}

/// Whether a datagram from one socket arrives at the other.
pub(crate) async fn arrives(from: &UdpSocket, to: impl ToSocketAddrs, at: &UdpSocket) -> bool {
    let word = b"word";
    // A reject may come back as an error of the send; either way nothing arrives.
    let _ = from.send_to(word, to);
    let at = at.try_clone().expect("a clone");
    let received = tokio::task::spawn_blocking(move || at.recv_from(&mut [0; 64]).is_ok());
    received.await.expect("no panic")
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum EchoKind {
    Reply = 0,
    Request = 8,
}

/// An ICMP echo message.
pub(crate) fn echo(kind: EchoKind, id: u16) -> [u8; 8] {
    let [kind, code, number] = [kind as u8, 0, 0];
    // What makes the 16-bit words add up to all ones.
    let [checksum_high, checksum_low] = (!u16::from_be_bytes([kind, code]).wrapping_add(id)).to_be_bytes();
    let [id_high, id_low] = id.to_be_bytes();
    [kind, code, checksum_high, checksum_low, id_high, id_low, 0, number]
}

/// A raw ICMP socket in a namespace; the system calls are those of UDP's.
pub(crate) async fn icmp(netns: &Netns) -> UdpSocket {
    let made =
        netns.run(|| socket(AddressFamily::Inet, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::Icmp)).await;
    let socket = UdpSocket::from(made.expect("a raw socket"));
    socket.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    socket
}

/// Whether another echo message from this address comes.
pub(crate) async fn received_echo(socket: &UdpSocket, kind: EchoKind, sender: Ipv4Addr) -> bool {
    let socket = socket.try_clone().expect("a clone");
    let received = tokio::task::spawn_blocking(move || {
        let mut packet = [0; 128];
        while let Ok((length, from)) = socket.recv_from(&mut packet) {
            let ip_header_length = usize::from(packet[0] & 0x0f) * 4;
            if from.ip() == sender && packet[ip_header_length..length].first() == Some(&(kind as u8)) {
                return true;
            }
        }
        false
    });
    received.await.expect("no panic")
}

pub(crate) async fn pings(netns: &Netns, address: Ipv4Addr) -> bool {
    let socket = icmp(netns).await;
    socket.send_to(&echo(EchoKind::Request, 1), (address, 0)).expect("sent");
    received_echo(&socket, EchoKind::Reply, address).await
}

#[derive(Debug)]
pub(crate) struct World {
    pub(crate) host: Netns,
    pub(crate) internet: Netns,
    pub(crate) private: Netns,
    pub(crate) directory: TempDir,
}

impl World {
    fn build() -> Self {
        let world = Self {
            host: Netns::current(),
            internet: Netns::new(),
            private: Netns::new(),
            directory: tempfile::Builder::new().prefix("belljar-network-").tempdir().expect("a directory"),
        };
        let internet = world.internet.path();
        let private = world.private.path();
        world.host.sh(&format!(
            "ip link set lo up
             ip link add eth0 mtu 1400 type veth peer name eth0 netns {internet}
             ip link add lan0 type veth peer name eth0 netns {private}
             ip addr add {HOST}/24 dev eth0; ip link set eth0 up
             ip addr add {HOST_ON_LAN}/24 dev lan0; ip link set lan0 up
             ip route add default via {INTERNET}"
        ));
        world.internet.sh(&format!(
            "ip link set lo up; ip addr add {PUBLIC}/32 dev lo
             ip addr add {INTERNET}/24 dev eth0; ip link set eth0 up"
        ));
        world.private.sh(&format!(
            "ip link set lo up
             ip addr add {PRIVATE}/24 dev eth0; ip link set eth0 up
             ip route add default via {HOST_ON_LAN}"
        ));
        for address in NOT_PUBLIC.iter().filter(|address| **address != PRIVATE) {
            world.private.sh(&format!("ip addr add {address}/32 dev lo"));
            world.host.sh(&format!("ip route add {address}/32 via {PRIVATE}"));
        }
        // Until the kernel has seen the carrier, an interface drops what is sent.
        for netns in [&world.host, &world.internet, &world.private] {
            netns.sh("until ! ip link show type veth | grep -v 'state UP' | grep -q mtu; do sleep 0.01; done");
        }
        world
    }

    pub(crate) fn config(&self, instance: &str) -> NetworkConfig {
        NetworkConfig {
            netns_dir: self.directory.path().join(instance),
            allowed_exceptions: vec!["198.51.100.0/24".parse().expect("a network")],
            dns_upstreams: vec![RESOLVER.into()],
            ..NetworkConfig::new(InstanceName::new(instance).expect("a valid name"))
        }
    }

    pub(crate) async fn manager(&self) -> NetworkManager {
        NetworkManager::start(self.config("test")).await.expect("a manager")
    }

    pub(crate) fn inner(&self, network: &SandboxNetwork) -> Netns {
        Netns::open(network.inner_netns_path())
    }

    pub(crate) fn router(&self, network: &SandboxNetwork) -> Netns {
        Netns::open(&network.inner_netns_path().with_extension("router"))
    }

    /// How many connections a namespace's kernel keeps track of.
    pub(crate) fn tracked(netns: &Netns) -> usize {
        netns.sh("cat /proc/sys/net/netfilter/nf_conntrack_count").trim().parse().expect("a number")
    }

    /// What is left on the host of any instance: interfaces, namespace files, mounts. Not the packet filter.
    pub(crate) fn traces(&self) -> Vec<String> {
        let links = self.host.sh("ip -o link");
        let mut traces: Vec<String> = links.lines().filter(|line| line.contains(": bj")).map(str::to_owned).collect();
        traces.extend(self.mounts());
        for instance in std::fs::read_dir(self.directory.path()).expect("the directory") {
            let files = std::fs::read_dir(instance.expect("an entry").path()).expect("an instance's directory");
            traces.extend(files.map(|file| format!("{:?}", file.expect("an entry").path())));
        }
        traces
    }

    fn mounts(&self) -> Vec<String> {
        let directory = self.directory.path().to_str().expect("a plain path");
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").expect("mountinfo");
        mounts.lines().filter(|line| line.contains(directory)).map(str::to_owned).collect()
    }
}

impl Drop for World {
    fn drop(&mut self) {
        for mount in self.mounts() {
            if let Some(path) = mount.split(' ').nth(4) {
                let _ = umount2(path, MntFlags::MNT_DETACH);
            }
        }
    }
}

pub(crate) fn skipped(why: &str) {
    // Past the test harness, which would keep the line of a test that passes to itself.
    let _ = writeln!(io::stderr(), "SKIPPED: {why}");
}

/// Runs a test as the host of a world of its own.
pub(crate) fn in_a_world<T, F>(test: T)
where
    T: FnOnce(Arc<World>) -> F + Send + 'static,
    F: Future<Output = ()>,
{
    if !nix::unistd::geteuid().is_root() {
        return skipped("needs root");
    }
    let host = std::thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET).expect("unshare");
        let world = Arc::new(World::build());
        // One thread: a runtime's workers would all have to move into the namespace.
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(test(world));
    });
    if let Err(panic) = host.join() {
        std::panic::resume_unwind(panic);
    }
}

pub(crate) async fn create(manager: &NetworkManager) -> SandboxNetwork {
    manager.create(&SandboxId::generate(), Egress::Internet).await.expect("a network")
}

/// The kernel's interface to a sandbox and the addresses on its two ends.
pub(crate) fn uplink_addresses(world: &World, interface: &str) -> (Ipv4Addr, Ipv4Addr) {
    let listing = world.host.sh(&format!("ip -o -4 addr show dev {interface}"));
    let host = listing.split_whitespace().skip_while(|word| *word != "inet").nth(1).expect("an address");
    let host: Ipv4Addr = host.split('/').next().expect("an address").parse().expect("an address");
    (host, Ipv4Addr::from(u32::from(host) + 1))
}

/// The packet must not arrive, and the guest must be told so at once rather than wait.
pub(crate) async fn assert_closed(from: &Netns, address: Ipv4Addr, port: u16) {
    let started = Instant::now();
    let error = from.connect(address, port).await.expect_err(&format!("{address}:{port} is reachable"));
    assert!(
        error.kind() != ErrorKind::TimedOut && error.kind() != ErrorKind::WouldBlock,
        "{address}:{port} keeps the guest waiting: {error}, {:?}",
        started.elapsed()
    );
}

pub(crate) const QUERY: &[u8] =
    b"\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x07example\x03org\x00\x00\x01\x00\x01";

/// Makes the host's resolver answer every query with itself, for as long as the test runs.
pub(crate) async fn answer_queries() {
    let socket = tokio::net::UdpSocket::bind(RESOLVER).await.expect("a UDP socket");
    tokio::spawn(async move {
        let mut buffer = [0; 512];
        while let Ok((length, from)) = socket.recv_from(&mut buffer).await {
            buffer[2] |= 0x80;
            socket.send_to(&buffer[..length], from).await.expect("sent");
        }
    });
}

/// Asks the gateway as the guest does.
pub(crate) async fn is_answered(guest: &Netns) -> bool {
    let socket = udp(guest, GUEST_ADDRESS, 0).await;
    let asked = tokio::task::spawn_blocking(move || {
        let mut answer = [0; 512];
        socket.send_to(QUERY, (GATEWAY_ADDRESS, 53)).expect("sent");
        let length = socket.recv(&mut answer).ok()?;
        Some(answer[..length].to_vec())
    });
    let answer = asked.await.expect("no panic");
    answer.is_some_and(|answer| answer[..2] == QUERY[..2] && answer[2] & 0x80 != 0 && answer[12..] == QUERY[12..])
}
