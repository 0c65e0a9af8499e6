//! Builds, mends and removes the namespaces and links of one sandbox. Everything here runs on a worker thread.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use belljar_core::id::SandboxId;

use super::error::NetworkError;
use super::namespace::Namespace;
use super::netlink::{Netlink, VethEnd};
use super::nft::{Loading, Nft};
use super::ruleset::Ruleset;
use super::slot::{
    GATEWAY_ADDRESS, GATEWAY_INTERFACE, GATEWAY_LINK_ADDRESS, GUEST_ADDRESS, GUEST_INTERFACE, GUEST_LINK_ADDRESS,
    GUEST_PREFIX_LENGTH, HOST_LINK_ADDRESS, Slot, UPLINK_INTERFACE, UPLINK_LINK_ADDRESS,
};
use super::sysctl;

/// The kernel may hold link events back for a second when there are many.
const LINK_TIMEOUT: Duration = Duration::from_secs(5);
const LINK_POLL_INTERVAL: Duration = Duration::from_micros(200);

/// Everything that is needed to work on a sandbox's network.
#[derive(Debug, Clone)]
pub(super) struct Plan {
    pub(super) sandbox: SandboxId,
    pub(super) inner_path: PathBuf,
    pub(super) router_path: PathBuf,
    pub(super) home: Arc<Namespace>,
    pub(super) nft: Nft,
    pub(super) rules: Arc<Ruleset>,
}

/// A build that failed.
#[derive(Debug)]
pub(super) enum BuildError {
    /// Another instance on the machine, or a leftover, has this slot's interface or address: try the next.
    SlotTaken,
    Failed(NetworkError),
}

impl From<NetworkError> for BuildError {
    fn from(error: NetworkError) -> Self {
        Self::Failed(error)
    }
}

/// Makes it all. On failure some of it may stand: [`demolish`] it.
pub(super) fn build(plan: &Plan, slot: &Slot, mtu: u32) -> Result<Namespace, BuildError> {
    let inner = Namespace::create_at(&plan.inner_path).map_err(|error| match error.raw_os_error() {
        Some(nix::libc::EEXIST) => NetworkError::AlreadyExists { sandbox: plan.sandbox.clone() },
        _ => error,
    })?;
    // Only interfaces made from here on; loopback keeps ::1, which programs that know no network at all may use.
    sysctl::write_if_present("ipv6/conf/default/disable_ipv6", "1")?;
    let mut inner_netlink = Netlink::open()?;

    let router = Namespace::create_at(&plan.router_path)?;
    // Rules name interfaces, which need not be there yet: nft, should it be needed, runs while the links are made.
    let filter = plan.rules.install(&plan.nft)?;
    prepare_router()?;
    let mut router_netlink = Netlink::open()?;
    router_netlink.create_veth(
        &VethEnd { interface: GATEWAY_INTERFACE, link_address: GATEWAY_LINK_ADDRESS },
        &VethEnd { interface: GUEST_INTERFACE, link_address: GUEST_LINK_ADDRESS },
        &inner,
        mtu,
    )?;
    router_netlink
        .create_veth(
            &VethEnd { interface: UPLINK_INTERFACE, link_address: UPLINK_LINK_ADDRESS },
            &VethEnd { interface: &slot.interface, link_address: HOST_LINK_ADDRESS },
            &plan.home,
            mtu,
        )
        .map_err(slot_taken_if_it_exists)?;
    connect_router(&mut router_netlink, slot)?;
    configure_inner(&mut inner_netlink)?;

    plan.home.enter()?;
    connect_host(&mut Netlink::open()?, slot, &plan.sandbox)?;
    filter.map_or(Ok(()), Loading::finish)?;
    // The ends that were set up before their peers.
    for interface in [GATEWAY_INTERFACE, UPLINK_INTERFACE] {
        wait_until_operational(&mut router_netlink, interface)?;
    }
    Ok(router)
}

/// Takes over what a server before this one built, and renews the packet filter, which may be an older version's. The
/// calling thread is in the host's namespace.
///
/// What is missing is [`NetworkError::Incomplete`], and nothing else is: the sandbox is given up for it.
pub(super) fn adopt(plan: &Plan, slot: &Slot) -> Result<Namespace, NetworkError> {
    let missing = |missing| NetworkError::Incomplete { sandbox: plan.sandbox.clone(), missing };
    let missing_if_absent = |part| {
        move |error: NetworkError| match error.raw_os_error() {
            Some(nix::libc::ENOENT | nix::libc::ENODEV) => missing(part),
            _ => error,
        }
    };
    sysctl::write(&sysctl::interface_forwarding(&slot.interface), "1")
        .map_err(missing_if_absent("its uplink on the host is gone"))?;
    let inner = Namespace::open(&plan.inner_path)?.ok_or_else(|| missing("its inner namespace is gone"))?;
    let router = Namespace::open(&plan.router_path)?.ok_or_else(|| missing("its router namespace is gone"))?;
    inner.enter()?;
    Netlink::open()?.index(GUEST_INTERFACE).map_err(missing_if_absent("its guest interface is gone"))?;
    router.enter()?;
    let mut netlink = Netlink::open()?;
    for interface in [GATEWAY_INTERFACE, UPLINK_INTERFACE] {
        netlink.index(interface).map_err(missing_if_absent("its router lacks an interface"))?;
    }
    let filter = plan.rules.replace(&plan.nft)?;
    prepare_router()?;
    connect_router(&mut netlink, slot)?;
    filter.map_or(Ok(()), Loading::finish)?;
    Ok(router)
}

/// Removes whatever is there, in an order that leaves a trace of it until the last step: a removal that was cut short
/// can be found and repeated. The calling thread is in the host's namespace.
pub(super) fn demolish(plan: &Plan) -> Result<(), NetworkError> {
    if let Some(router) = Namespace::open(&plan.router_path)? {
        // By their ends in here: only these are surely this sandbox's. And explicitly, because the kernel takes its
        // time with the interfaces of a namespace that nobody holds any more.
        router.enter()?;
        let mut netlink = Netlink::open()?;
        netlink.delete_own_links()?;
        plan.home.enter()?;
    } else {
        let mut netlink = Netlink::open()?;
        let owner = plan.sandbox.as_str();
        for link in netlink.links()?.into_iter().filter(|link| link.alias.as_deref() == Some(owner)) {
            netlink.delete_link(&link.name)?;
        }
    }
    Namespace::remove_at(&plan.inner_path)?;
    Namespace::remove_at(&plan.router_path)
}

/// Settings of a router namespace, which starts with the kernel's defaults.
fn prepare_router() -> Result<(), NetworkError> {
    for scope in ["all", "default"] {
        sysctl::write_if_present(&format!("ipv6/conf/{scope}/disable_ipv6"), "1")?;
    }
    // Also for ARP: without, a guest could announce a thousand neighbours, and so fill a table that the kernel has one
    // of for all namespaces, the host's included.
    sysctl::write("ipv4/conf/all/rp_filter", "1")?;
    sysctl::write(sysctl::IP_FORWARD, "1")?;
    // Rejections are ICMP errors to the sandbox's own guest: nobody else is bothered by many.
    sysctl::write("ipv4/icmp_ratelimit", "0")?;
    // The server makes all of its connections from one address to one address: let it have more than the usual 28,000
    // ports, and take one again before its last connection's minute of TIME_WAIT is over.
    sysctl::write("ipv4/ip_local_port_range", "1024 65535")?;
    sysctl::write("ipv4/tcp_tw_reuse", "1")
}

fn connect_router(netlink: &mut Netlink, slot: &Slot) -> Result<(), NetworkError> {
    let gateway = netlink.index(GATEWAY_INTERFACE)?;
    netlink.set_up(gateway)?;
    netlink.set_address(gateway, GATEWAY_ADDRESS, GUEST_PREFIX_LENGTH, true)?;
    // Fixed neighbours everywhere. Towards the guest it also means that a connection to one that is just starting is
    // tried at once, instead of being held back a second after an unanswered ARP request.
    netlink.set_neighbour(gateway, GUEST_ADDRESS, GUEST_LINK_ADDRESS)?;
    let uplink = netlink.index(UPLINK_INTERFACE)?;
    netlink.set_up(uplink)?;
    netlink.set_address(uplink, slot.router_address, 31, true)?;
    netlink.set_neighbour(uplink, slot.host_address, HOST_LINK_ADDRESS)?;
    netlink.set_default_route(uplink, slot.host_address)
}

fn configure_inner(netlink: &mut Netlink) -> Result<(), NetworkError> {
    /// The kernel numbers it so in every namespace.
    const LOOPBACK_INDEX: u32 = 1;
    netlink.set_up(LOOPBACK_INDEX)?;
    let interface = netlink.index(GUEST_INTERFACE)?;
    netlink.set_up(interface)?;
    netlink.set_address(interface, GUEST_ADDRESS, GUEST_PREFIX_LENGTH, true)?;
    netlink.set_neighbour(interface, GATEWAY_ADDRESS, GATEWAY_LINK_ADDRESS)?;
    netlink.set_default_route(interface, GATEWAY_ADDRESS)
}

fn connect_host(netlink: &mut Netlink, slot: &Slot, sandbox: &SandboxId) -> Result<(), BuildError> {
    let interface = netlink.index(&slot.interface)?;
    // First of all, whose it is: what comes after can then be cleaned up by whoever finds it.
    netlink.set_alias(interface, sandbox.as_str())?;
    sysctl::write_if_present(&format!("ipv6/conf/{}/disable_ipv6", slot.interface), "1")?;
    netlink.set_up(interface)?;
    // The kernel would accept the same address on another interface, and another instance's choice of the same slot
    // with it. A route it accepts once: the routing table is the allocator that all instances share.
    netlink.set_address(interface, slot.host_address, 32, false)?;
    netlink.claim_host_route(interface, slot.router_address, slot.host_address).map_err(slot_taken_if_it_exists)?;
    netlink.set_neighbour(interface, slot.router_address, UPLINK_LINK_ADDRESS)?;
    sysctl::write(&sysctl::interface_forwarding(&slot.interface), "1")?;
    Ok(())
}

/// Usually at once. A network that is handed out earlier would lose its first packets.
fn wait_until_operational(netlink: &mut Netlink, interface: &str) -> Result<(), NetworkError> {
    let deadline = Instant::now() + LINK_TIMEOUT;
    while !netlink.is_operational(interface)? {
        if Instant::now() > deadline {
            let step = format!("bring up {interface}");
            return Err(NetworkError::Netlink { step, source: io::ErrorKind::TimedOut.into() });
        }
        std::thread::sleep(LINK_POLL_INTERVAL);
    }
    Ok(())
}

fn slot_taken_if_it_exists(error: NetworkError) -> BuildError {
    match error.raw_os_error() {
        Some(nix::libc::EEXIST) => BuildError::SlotTaken,
        _ => BuildError::Failed(error),
    }
}
