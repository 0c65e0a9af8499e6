//! Whether a host can carry sandbox networks, and what to do where it can't.

use std::process::{Command, Stdio};
use std::sync::Arc;

use nix::sched::{CloneFlags, unshare};

use super::config::{Egress, NetworkConfig};
use super::error::NetworkError;
use super::namespace::{Namespace, NamespaceWorkers};
use super::netlink::{Netlink, VethEnd};
use super::nft::Nft;
use super::slot::{GATEWAY_LINK_ADDRESS, GUEST_LINK_ADDRESS, interface_prefix};
use super::{NetworkManager, forwarding, host, manager, rules};
use crate::host::{Finding, Status};

impl NetworkManager {
    /// Looks at everything that sandbox networks need from the host. Changes nothing: what has to be tried is tried in
    /// a namespace that is thrown away.
    pub async fn check_host(config: &NetworkConfig) -> Vec<Finding> {
        let config = config.clone();
        let checked = async {
            let home = Arc::new(Namespace::current()?);
            let workers = NamespaceWorkers::start("network-check", 1, &home)?;
            workers
                .run(&home, {
                    let home = Arc::clone(&home);
                    move || Ok(check(&config, &home))
                })
                .await
        };
        checked.await.unwrap_or_else(|error| vec![unexpected("the network of this host", &error)])
    }
}

fn check(config: &NetworkConfig, home: &Namespace) -> Vec<Finding> {
    if !nix::unistd::geteuid().is_root() {
        return vec![Finding::missing(
            "the network was not looked at: namespaces and packet filters are root's",
            "run it as root",
        )];
    }
    let mut findings = vec![resolvers(config)];
    findings.extend(routing(config).unwrap_or_else(|error| vec![unexpected("routing", &error)]));
    let Some(nft) = Nft::find() else {
        findings.push(Finding::missing("nft is not installed", "apt-get install nftables"));
        return findings;
    };
    findings.push(version(&nft));
    findings.extend(other_firewalls(config, &nft).unwrap_or_else(|error| vec![unexpected("other firewalls", &error)]));
    findings.push(attempt(config, &nft));
    if let Err(error) = home.enter() {
        findings.push(unexpected("leaving the trial namespace", &error));
    }
    findings
}

fn version(nft: &Nft) -> Finding {
    match nft.query("print its version", &["--version"]) {
        Ok(version) => Finding::met(format!("{}, {}", nft.program().display(), version.trim())),
        Err(error) => unexpected("nft", &error),
    }
}

/// Builds a sandbox's links and both packet filters, in a namespace that ends with this thread's stay in it.
fn attempt(config: &NetworkConfig, nft: &Nft) -> Finding {
    let tried = || -> Result<(), (NetworkError, &str)> {
        unshare(CloneFlags::CLONE_NEWNET).map_err(|errno| {
            let error = NetworkError::Namespace { step: "unshare the network namespace", source: errno.into() };
            (error, "the kernel needs CONFIG_NET_NS, and a container around belljar must be privileged")
        })?;
        let links = || {
            let here = VethEnd { interface: "trial0", link_address: GATEWAY_LINK_ADDRESS };
            let there = VethEnd { interface: "trial1", link_address: GUEST_LINK_ADDRESS };
            Netlink::open()?.create_veth(&here, &there, &Namespace::current()?, 1500)
        };
        links().map_err(|error| (error, "modprobe veth"))?;
        for rules in [
            rules::router_rules(config, Egress::Internet),
            rules::host_rules(config, &interface_prefix(&config.instance)),
        ] {
            nft.load("try out the packet filter", &rules).and_then(super::nft::Loading::finish).map_err(|error| {
                (
                    error,
                    "modprobe -a nf_tables nft_ct nft_connlimit nft_fib_inet nft_reject_inet nft_masq nft_chain_nat",
                )
            })?;
        }
        Ok(())
    };
    match tried() {
        Ok(()) => {
            Finding::met("namespaces, virtual links and the packet filter work: tried in a namespace of their own")
        }
        Err((error, remedy)) => Finding::missing(with_sources(&error), remedy),
    }
}

fn resolvers(config: &NetworkConfig) -> Finding {
    let upstreams = manager::upstreams(config);
    if upstreams.is_empty() {
        Finding::missing(
            "no resolver for sandboxes: the configuration names none and /etc/resolv.conf has none that can be used",
            "set dns_upstreams",
        )
    } else {
        let list: Vec<String> = upstreams.iter().map(ToString::to_string).collect();
        Finding::met(format!("sandboxes' DNS queries go to {}", list.join(", ")))
    }
}

fn routing(config: &NetworkConfig) -> Result<Vec<Finding>, NetworkError> {
    let mut netlink = Netlink::open()?;
    let (links, addresses, routes) = (netlink.links()?, netlink.addresses()?, netlink.routes()?);
    let mut findings = Vec::new();
    findings.push(match host::default_route(&routes) {
        Some(route) => {
            let name = links.iter().find(|link| link.index == route.interface_index).map_or("?", |link| &link.name);
            Finding::met(format!("the IPv4 default route leads through {name}"))
        }
        None => Finding::missing("no IPv4 default route: sandboxes reach nothing", "ip route add default via GATEWAY"),
    });
    findings.push(match host::pool_overlap(config, &links, &addresses) {
        Some(overlap) => Finding::missing(overlap.to_string(), "set uplink_pool to a range that is not used here"),
        None => Finding::met(format!("the uplink pool {} is not used by this host", config.uplink_pool)),
    });
    findings.push(if forwarding::is_router()? {
        Finding::met("IPv4 forwarding is on for the whole host (net.ipv4.ip_forward); belljar leaves it as it is")
    } else {
        let interfaces: Vec<_> = forwarding::egress_interfaces(config, &routes, &links).into_iter().collect();
        Finding::met(format!(
            "this host is no router: IPv4 forwarding is switched on for {} and sandboxes only, \
             with a guard against others",
            interfaces.join(", ")
        ))
    });
    Ok(findings)
}

/// A base chain of somebody else's that drops what it does not know.
#[derive(Debug, PartialEq, Eq)]
struct ForeignChain {
    family: String,
    table: String,
    chain: String,
}

/// A drop in any table is final, so a firewall that drops unknown forwarded packets (Docker's, ufw's, firewalld's) has
/// to be told about sandboxes; belljar does not change other people's firewalls by itself.
fn other_firewalls(config: &NetworkConfig, nft: &Nft) -> Result<Vec<Finding>, NetworkError> {
    let prefix = interface_prefix(&config.instance);
    let mut findings = Vec::new();
    for foreign in dropping_forward_chains(&nft.query("list the chains", &["-j", "list", "chains"])?) {
        let ForeignChain { family, table, chain } = foreign;
        let rules = nft.query("list a table", &["list", "table", &family, &table])?;
        let subject = format!("the firewall chain {family} {table} {chain} drops forwarded packets it does not know");
        findings.push(if rules.contains(&prefix) {
            Finding::met(format!("{subject}, and knows this instance's"))
        } else {
            let chain = if rules.contains("chain DOCKER-USER") { "DOCKER-USER" } else { chain.as_str() };
            let insert = format!("nft insert rule {family} {table} {chain}");
            Finding::missing(
                subject,
                format!(
                    "{insert} iifname '\"{prefix}*\"' accept && \
                     {insert} oifname '\"{prefix}*\"' ct state established,related accept"
                ),
            )
        });
    }
    if nft.query("list the tables", &["list", "tables"])?.lines().any(|table| table == "table inet firewalld") {
        findings.push(firewalld(nft, &prefix)?);
    }
    findings.extend(legacy_iptables(&prefix));
    if findings.is_empty() {
        findings.push(Finding::met("no other firewall drops forwarded packets by default"));
    }
    Ok(findings)
}

/// firewalld's chains accept by policy and reject by their last rule.
fn firewalld(nft: &Nft, prefix: &str) -> Result<Finding, NetworkError> {
    const WHAT: &str = "firewalld is running, and rejects forwarded packets it does not know";
    let known = nft.query("list a table", &["list", "table", "inet", "firewalld"])?.contains(prefix);
    Ok(if known {
        Finding::met(format!("{WHAT}; it knows this instance's"))
    } else {
        Finding::missing(
            WHAT,
            format!("firewall-cmd --permanent --zone=trusted --add-interface='{prefix}+' && firewall-cmd --reload"),
        )
    })
}

/// Rules of the iptables before nftables, which nft does not show.
fn legacy_iptables(prefix: &str) -> Option<Finding> {
    // Only ask where the table exists: the question would create it.
    let tables = std::fs::read_to_string("/proc/thread-self/net/ip_tables_names").ok()?;
    tables.lines().find(|table| *table == "filter")?;
    let rules = ["iptables-legacy", "iptables"].iter().find_map(|program| {
        let output = Command::new(program).args(["-w", "5", "-S"]).stdin(Stdio::null()).output().ok()?;
        output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
    })?;
    if !rules.lines().any(|rule| rule == "-P FORWARD DROP") {
        return None;
    }
    const WHAT: &str = "iptables drops forwarded packets it does not know (policy of FORWARD)";
    if rules.contains(prefix) {
        return Some(Finding::met(format!("{WHAT}; it knows this instance's")));
    }
    let chain = if rules.lines().any(|rule| rule == "-N DOCKER-USER") { "DOCKER-USER" } else { "FORWARD" };
    Some(Finding::missing(
        WHAT,
        format!(
            "iptables -I {chain} -i '{prefix}+' -j ACCEPT && \
             iptables -I {chain} -o '{prefix}+' -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT"
        ),
    ))
}

fn dropping_forward_chains(listing: &str) -> Vec<ForeignChain> {
    forwarding::objects(listing, "chain")
        .filter(|chain| chain["hook"] == "forward" && chain["policy"] == "drop")
        .filter_map(|chain| {
            let text = |key: &str| chain[key].as_str().map(str::to_owned);
            Some(ForeignChain { family: text("family")?, table: text("table")?, chain: text("name")? })
        })
        .filter(|chain| ["ip", "inet"].contains(&chain.family.as_str()))
        .collect()
}

fn unexpected(subject: &str, error: &NetworkError) -> Finding {
    let what = format!("{subject} could not be looked at: {}", with_sources(error));
    Finding { status: Status::Missing, what, remedy: None }
}

/// An error and its causes, which `Display` leaves to whoever prints it.
fn with_sources(error: &dyn std::error::Error) -> String {
    std::iter::successors(Some(error), |error| error.source()).map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_forward_chains_that_drop_ipv4_by_policy_count() {
        let chain = |family: &str, name: &str, hook: &str, policy: &str| {
            format!(
                r#"{{"chain": {{"family": "{family}", "table": "filter", "name": "{name}", "hook": "{hook}",
                    "policy": "{policy}"}}}}"#
            )
        };
        let listing = format!(
            r#"{{"nftables": [
                {{"metainfo": {{}}}}, {}, {}, {}, {}, {{"chain": {{"family": "ip", "name": "DOCKER"}}}}
            ]}}"#,
            chain("ip", "FORWARD", "forward", "drop"),
            chain("ip", "INPUT", "input", "drop"),
            chain("inet", "forward", "forward", "accept"),
            chain("bridge", "FORWARD", "forward", "drop"),
        );
        let expected =
            ForeignChain { family: "ip".to_owned(), table: "filter".to_owned(), chain: "FORWARD".to_owned() };
        assert_eq!(dropping_forward_chains(&listing), [expected]);
    }

    #[test]
    fn causes_are_told() {
        let error = NetworkError::Namespace { step: "try", source: std::io::Error::other("no luck") };
        assert_eq!(with_sources(&error), "cannot try: no luck");
    }
}
