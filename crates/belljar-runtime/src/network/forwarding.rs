//! Makes the host pass sandboxes' packets on, and nobody else's.
//!
//! The usual `net.ipv4.ip_forward=1` would make the host a router for everybody on every network it is in. The kernel
//! asks only the interface that a packet *arrives* on whether it may be forwarded (`ip_route_input` looks at the
//! incoming device's `forwarding`), so two kinds of interface are enough: the uplinks, for what sandboxes send, and the
//! interfaces by which answers come back. On the second kind a stranger's packets arrive too; a guard rule drops those
//! in the forward hook. It is only for interfaces that belljar switched on, and goes when somebody makes the host a
//! router on purpose (`ip_forward`, which belljar leaves alone, tells).

use std::collections::BTreeSet;

use ipnet::Ipv4Net;

use super::config::NetworkConfig;
use super::error::NetworkError;
use super::netlink::{Link, Route};
use super::nft::Nft;
use super::rules::{self, GUARD_TABLE, GUARDED_SET, INSTANCE_TABLE_PREFIX};
use super::slot::ANY_INSTANCE_PREFIX;
use super::sysctl;

const LOOPBACK: &str = "lo";

/// The interfaces behind which destinations lie that sandboxes may reach.
pub(super) fn egress_interfaces(config: &NetworkConfig, routes: &[Route], links: &[Link]) -> BTreeSet<String> {
    let covers = |ranges: &[Ipv4Net], destination: &Ipv4Net| ranges.iter().any(|range| range.contains(destination));
    let overlaps = |range: &Ipv4Net, destination: &Ipv4Net| range.contains(destination) || destination.contains(range);
    routes
        .iter()
        .filter(|route| {
            !covers(&config.denied_destinations, &route.destination)
                || config.allowed_exceptions.iter().any(|exception| overlaps(exception, &route.destination))
        })
        .filter_map(|route| links.iter().find(|link| link.index == route.interface_index))
        .filter(|link| link.name != LOOPBACK && !link.name.starts_with(ANY_INSTANCE_PREFIX))
        .filter(|link| is_plain(&link.name))
        .map(|link| link.name.clone())
        .collect()
}

/// The kernel lets an interface be called almost anything; only plain names go into a rule's text.
fn is_plain(interface: &str) -> bool {
    interface.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-' | b'@'))
}

/// Whether the host is a router by somebody else's decision.
pub(super) fn is_router() -> Result<bool, NetworkError> {
    Ok(sysctl::read(sysctl::IP_FORWARD)? != "0")
}

/// Lets answers in by `interfaces`. The calling thread is in the host's namespace.
pub(super) fn switch_on(nft: &Nft, interfaces: &BTreeSet<String>) -> Result<(), NetworkError> {
    if is_router()? {
        return remove_guard(nft);
    }
    let mut switched_off = Vec::new();
    for interface in interfaces {
        if sysctl::read(&sysctl::interface_forwarding(interface))? == "0" {
            switched_off.push(interface.clone());
        }
    }
    if switched_off.is_empty() {
        return Ok(());
    }
    // The guard stands before the door opens.
    nft.load("guard the host's interfaces", &rules::guard_rules(&switched_off))?.finish()?;
    for interface in &switched_off {
        sysctl::write(&sysctl::interface_forwarding(interface), "1")?;
    }
    tracing::info!(interfaces = ?switched_off, "IPv4 forwarding switched on, for sandboxes' traffic only");
    Ok(())
}

/// Undoes [`switch_on`], unless another instance on the machine still needs it.
pub(super) fn switch_off(nft: &Nft) -> Result<(), NetworkError> {
    if tables(nft)?.iter().any(|table| table.starts_with(INSTANCE_TABLE_PREFIX)) {
        return Ok(());
    }
    if !is_router()? {
        for interface in guarded_interfaces(nft)? {
            match sysctl::write(&sysctl::interface_forwarding(&interface), "0") {
                // An interface that has gone has taken its setting along.
                Err(error) if error.raw_os_error() == Some(nix::libc::ENOENT) => {}
                other => other?,
            }
        }
    }
    remove_guard(nft)
}

fn remove_guard(nft: &Nft) -> Result<(), NetworkError> {
    if tables(nft)?.iter().any(|table| table == GUARD_TABLE) {
        nft.load("remove the guard of the host's interfaces", &rules::delete_table(GUARD_TABLE))?.finish()?;
    }
    Ok(())
}

/// Names of the tables of the family that belljar uses.
fn tables(nft: &Nft) -> Result<Vec<String>, NetworkError> {
    let listing = nft.query("list the tables", &["-j", "list", "tables", "inet"])?;
    Ok(objects(&listing, "table").filter_map(|table| Some(table["name"].as_str()?.to_owned())).collect())
}

fn guarded_interfaces(nft: &Nft) -> Result<Vec<String>, NetworkError> {
    if !tables(nft)?.iter().any(|table| table == GUARD_TABLE) {
        return Ok(Vec::new());
    }
    let listing = nft.query("list the guarded interfaces", &["-j", "list", "set", "inet", GUARD_TABLE, GUARDED_SET])?;
    Ok(objects(&listing, "set")
        .filter_map(|set| set["elem"].as_array().cloned())
        .flatten()
        .filter_map(|element| Some(element.as_str()?.to_owned()))
        .collect())
}

/// The objects of one kind in nft's JSON: `{"nftables": [{"table": {…}}, {"set": {…}}, …]}`.
pub(super) fn objects<'a>(listing: &str, kind: &'a str) -> impl Iterator<Item = serde_json::Value> + use<'a> {
    let mut listing: serde_json::Value = serde_json::from_str(listing).unwrap_or_default();
    let entries = match listing["nftables"].take() {
        serde_json::Value::Array(entries) => entries,
        _ => Vec::new(),
    };
    entries.into_iter().filter_map(move |mut entry| Some(entry.get_mut(kind)?.take()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::network::config::InstanceName;

    fn link(index: u32, name: &str) -> Link {
        Link { index, name: name.to_owned(), alias: None, mtu: None }
    }

    fn route(destination: &str, interface_index: u32) -> Route {
        Route { destination: destination.parse().expect("a network"), interface_index, metric: 0 }
    }

    #[test]
    fn only_interfaces_that_lead_somewhere_open_are_switched_on() {
        let config = NetworkConfig {
            allowed_exceptions: vec!["172.30.5.0/24".parse().expect("a network")],
            ..NetworkConfig::new(InstanceName::new("test").expect("a valid name"))
        };
        let links = [
            link(1, "lo"),
            link(2, "eth0"),
            link(3, "docker0"),
            link(4, "bj000000-1"),
            link(5, "vpn0"),
            link(6, "wide0"),
            link(7, "od\"d"),
        ];
        let routes = [
            route("0.0.0.0/0", 2),
            route("192.168.1.0/24", 2),
            route("172.17.0.0/16", 3),
            route("10.214.0.1/32", 4),
            route("172.30.5.16/28", 5),
            route("172.16.0.0/12", 6),
            route("0.0.0.0/0", 7),
        ];
        let interfaces: Vec<_> = egress_interfaces(&config, &routes, &links).into_iter().collect();
        assert_eq!(interfaces, ["eth0", "vpn0", "wide0"]);
    }

    #[test]
    fn nft_listings_are_searched_by_kind() {
        let listing = r#"{"nftables": [{"metainfo": {"version": "1"}}, {"table": {"name": "a"}}, {"set": {"name": "s"}},
                          {"table": {"name": "b"}}]}"#;
        let names: Vec<_> = objects(listing, "table").map(|table| table["name"].clone()).collect();
        assert_eq!(names, ["a", "b"]);
        assert_eq!(objects("", "table").count(), 0);
    }
}
