//! The host's side of an instance: brought into order at start and at every reconcile, and read to find what is owned.
//! Everything here runs on a worker thread in the host's namespace.

use std::collections::BTreeSet;

use belljar_core::id::SandboxId;

use super::config::NetworkConfig;
use super::error::NetworkError;
use super::manager::{INNER_SUFFIX, ROUTER_SUFFIX};
use super::netlink::{Link, Netlink, Route};
use super::nft::Nft;
use super::slot::{ANY_INSTANCE_PREFIX, interface_prefix};
use super::{forwarding, rules, sysctl};

/// Ethernet's, for a host that does not say where its packets go.
const MTU_WITHOUT_DEFAULT_ROUTE: u32 = 1500;

/// What networks are made after.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct HostState {
    pub(super) mtu: u32,
}

/// Brings packet filter and forwarding into the state they should have.
pub(super) fn apply(config: &NetworkConfig, nft: &Nft) -> Result<HostState, NetworkError> {
    let mut netlink = Netlink::open()?;
    let links = netlink.links()?;
    if let Some(error) = pool_overlap(config, &links, &netlink.addresses()?) {
        return Err(error);
    }
    let routes = netlink.routes()?;
    let prefix = interface_prefix(&config.instance);
    nft.load("set up the host's packet filter", &rules::host_rules(config, &prefix))?.finish()?;
    forwarding::switch_on(nft, &forwarding::egress_interfaces(config, &routes, &links))?;
    // Made so when they were made; but whoever writes to ip_forward sets every interface with it.
    for uplink in links.iter().filter(|link| link.name.starts_with(&prefix)) {
        match sysctl::write(&sysctl::interface_forwarding(&uplink.name), "1") {
            // Destroyed since the listing.
            Err(error) if error.raw_os_error() == Some(nix::libc::ENOENT) => {}
            other => other?,
        }
    }
    let mtu = default_route(&routes)
        .and_then(|route| links.iter().find(|link| link.index == route.interface_index)?.mtu)
        .unwrap_or(MTU_WITHOUT_DEFAULT_ROUTE);
    Ok(HostState { mtu })
}

/// The instance's uplinks with their owners. Removes those that have no owner's label: they are the beginning of a
/// create that was killed. Only for a time when no create is under way.
pub(super) fn labelled_uplinks(prefix: &str) -> Result<Vec<(String, SandboxId)>, NetworkError> {
    let mut netlink = Netlink::open()?;
    let mut labelled = Vec::new();
    for link in netlink.links()?.into_iter().filter(|link| link.name.starts_with(prefix)) {
        match owner(&link) {
            Some(sandbox) => labelled.push((link.name, sandbox)),
            None => netlink.delete_link(&link.name)?,
        }
    }
    Ok(labelled)
}

/// Everybody who has a namespace file or an uplink.
pub(super) fn owners(config: &NetworkConfig) -> Result<Vec<SandboxId>, NetworkError> {
    let prefix = interface_prefix(&config.instance);
    let mut owners: BTreeSet<SandboxId> =
        Netlink::open()?.links()?.iter().filter(|link| link.name.starts_with(&prefix)).filter_map(owner).collect();
    let failed = |source| NetworkError::File { step: "list the directory", path: config.netns_dir.clone(), source };
    for entry in std::fs::read_dir(&config.netns_dir).map_err(failed)? {
        let name = entry.map_err(failed)?.file_name();
        let owner = name
            .to_str()
            .and_then(|name| name.rsplit_once('.'))
            .filter(|(_, suffix)| [INNER_SUFFIX, ROUTER_SUFFIX].contains(suffix))
            .and_then(|(sandbox, _)| sandbox.parse().ok());
        owners.extend(owner);
    }
    Ok(owners.into_iter().collect())
}

/// The default route that the kernel prefers.
pub(super) fn default_route(routes: &[Route]) -> Option<&Route> {
    routes.iter().filter(|route| route.destination.prefix_len() == 0).min_by_key(|route| route.metric)
}

/// An address of the host inside the pool: sandboxes' uplinks would cut the host off from its own network.
pub(super) fn pool_overlap(
    config: &NetworkConfig,
    links: &[Link],
    addresses: &[(u32, std::net::Ipv4Addr)],
) -> Option<NetworkError> {
    let pool = config.uplink_pool;
    addresses.iter().filter(|(_, address)| pool.contains(address)).find_map(|(index, address)| {
        let link = links.iter().find(|link| link.index == *index)?;
        (!link.name.starts_with(ANY_INSTANCE_PREFIX)).then(|| NetworkError::PoolOverlapsHost {
            pool,
            address: *address,
            interface: link.name.clone(),
        })
    })
}

fn owner(link: &Link) -> Option<SandboxId> {
    link.alias.as_deref()?.parse().ok()
}
