//! The packet filters, as the text nft reads: everything belljar forbids on the network is in this file.
//!
//! ```text
//!   inner namespace         router namespace                     host
//!  ┌───────────────┐   ┌────────────────────────┐   ┌────────────────────────────┐
//!  │ guest    eth0 ├───┤ guest  [router] uplink ├───┤ bj<hash>-<n>  [host]  eth0 ├─── internet
//!  └───────────────┘   └────────────────────────┘   └────────────────────────────┘
//! ```
//!
//! Each rule of consequence stands twice, once in the sandbox's [router](router_rules) and once on the
//! [host](host_rules): a mistake in one still leaves the other. The router's set is replaced per sandbox; the host's is
//! one static table per server that knows sandboxes only by their interfaces' prefix, so it costs nothing per sandbox.
//!
//! Only typed values are written into the text: there is no way to put a quote or a brace into it.

use std::fmt::Write;

use ipnet::Ipv4Net;

use super::config::{Egress, InstanceName, NetworkConfig};
use super::slot::{ANY_INSTANCE_PREFIX, GATEWAY_ADDRESS, GATEWAY_INTERFACE, GUEST_ADDRESS, UPLINK_INTERFACE};

pub(super) const INSTANCE_TABLE_PREFIX: &str = "belljar_";

/// The table in every router namespace.
pub(super) const ROUTER_TABLE: &str = "belljar";

/// Shared by all instances of a machine. The hyphen keeps it apart from every instance's table.
pub(super) const GUARD_TABLE: &str = "belljar-host";
pub(super) const GUARDED_SET: &str = "switched_on";

/// TCP connections and pings from a guest to its gateway that are tracked at once.
const GATEWAY_CONNECTIONS_MAX: u32 = 64;

pub(super) fn host_table(instance: &InstanceName) -> String {
    format!("{INSTANCE_TABLE_PREFIX}{instance}")
}

/// The host's side of one instance: replaced as a whole, in one transaction.
pub(super) fn host_rules(config: &NetworkConfig, prefix: &str) -> String {
    let table = host_table(&config.instance);
    let pool = config.uplink_pool;
    let sets = destination_sets(config);
    format!(
        r#"table inet {table} {{}}
delete table inet {table}
table inet {table} {{
{sets}
    # Before connection tracking and before anybody's address translation. Is the sender who it says: is its address
    # routed to the very interface it came by? And does it keep its hands off this host? The routing table knows all
    # addresses of the host at any moment, so none is listed here.
    chain prerouting {{
        type filter hook prerouting priority raw; policy accept;
        iifname "{prefix}*" jump admission
    }}
    chain admission {{
        meta nfproto != ipv4 drop
        fib saddr . iif oif missing drop
        fib daddr type local reject with icmp type admin-prohibited
    }}

    # Whatever a broadcast or another table's translation made a packet for this host.
    chain input {{
        type filter hook input priority filter; policy accept;
        iifname "{prefix}*" drop
    }}

    # An accept here is not final, other tables still have their say; a drop is.
    chain forward {{
        type filter hook forward priority filter; policy accept;
        iifname "{prefix}*" jump from_sandbox
        oifname "{prefix}*" jump to_sandbox
    }}
    chain from_sandbox {{
        oifname "{ANY_INSTANCE_PREFIX}*" drop
        ip daddr @allowed_exceptions accept
        ip daddr @denied_destinations reject with icmp type admin-prohibited
    }}
    chain to_sandbox {{
        ct state established,related accept
        drop
    }}

    chain postrouting {{
        type nat hook postrouting priority srcnat; policy accept;
        ip saddr {pool} oifname != "{ANY_INSTANCE_PREFIX}*" masquerade
    }}
}}
"#
    )
}

/// One sandbox's router: replaced as a whole, in one transaction. The same for all sandboxes of an instance with the
/// same egress.
pub(super) fn router_rules(config: &NetworkConfig, egress: Egress) -> String {
    // The gateway's port of the name service stays as it is: without egress nobody listens there.
    let world = match egress {
        Egress::Internet => "jump guest_to_world",
        Egress::Nothing => "reject with icmp type admin-prohibited",
    };
    let pool = config.uplink_pool;
    let connections_max = config.connections_max;
    let sets = destination_sets(config);
    format!(
        r#"table inet {ROUTER_TABLE} {{}}
delete table inet {ROUTER_TABLE}
table inet {ROUTER_TABLE} {{
{sets}
    chain prerouting {{
        type filter hook prerouting priority raw; policy accept;
        iifname "{GATEWAY_INTERFACE}" jump from_guest
    }}
    # DNS is not tracked: a query from each of its ports, and a guest would have filled a connection table that has a
    # quarter of a million places, in kernel memory that nobody is charged for.
    chain from_guest {{
        meta nfproto != ipv4 drop
        ip saddr != {GUEST_ADDRESS} drop
        ip daddr {GATEWAY_ADDRESS} udp dport 53 notrack
    }}
    chain output {{
        type filter hook output priority raw; policy accept;
        oifname "{GATEWAY_INTERFACE}" ip saddr {GATEWAY_ADDRESS} udp sport 53 notrack
    }}

    # To the gateway: DNS, ping, and the answers to the server's own connections. From the uplink: nothing.
    chain input {{
        type filter hook input priority filter; policy drop;
        iifname "{GATEWAY_INTERFACE}" jump guest_to_gateway
    }}
    chain guest_to_gateway {{
        ip daddr != {GATEWAY_ADDRESS} reject with icmp type admin-prohibited
        udp dport 53 accept
        ct state established,related accept
        tcp dport 53 goto served
        icmp type echo-request goto served
        reject with icmp type admin-prohibited
    }}
    chain served {{
        ct state new ct count over {GATEWAY_CONNECTIONS_MAX} drop
        accept
    }}

    chain forward {{
        type filter hook forward priority filter; policy drop;
        iifname "{GATEWAY_INTERFACE}" oifname "{UPLINK_INTERFACE}" {world}
        iifname "{UPLINK_INTERFACE}" oifname "{GATEWAY_INTERFACE}" ct state established,related accept
    }}
    # Destinations are checked on every packet, not only on a connection's first: a range that is closed later cuts
    # what is open. Untranslated packets would leave with the guest's own address, hence no invalid ones.
    chain guest_to_world {{
        ct state invalid drop
        ip daddr {pool} reject with icmp type admin-prohibited
        ip daddr @allowed_exceptions goto admitted
        ip daddr @denied_destinations reject with icmp type admin-prohibited
        goto admitted
    }}
    chain admitted {{
        ct state new ct count over {connections_max} reject with icmp type admin-prohibited
        accept
    }}

    chain postrouting {{
        type nat hook postrouting priority srcnat; policy accept;
        oifname "{UPLINK_INTERFACE}" masquerade
    }}
}}
"#
    )
}

/// Keeps the host from routing for its neighbours through interfaces that only sandboxes' answers should come in by.
///
/// Adds to what is there, instead of replacing it: the table belongs to all instances.
pub(super) fn guard_rules(interfaces: &[String]) -> String {
    let mut rules = format!(
        r#"add table inet {GUARD_TABLE}
add set inet {GUARD_TABLE} {GUARDED_SET} {{ type ifname; }}
add chain inet {GUARD_TABLE} forward {{ type filter hook forward priority filter; policy accept; }}
flush chain inet {GUARD_TABLE} forward
add rule inet {GUARD_TABLE} forward meta nfproto ipv4 iifname @{GUARDED_SET} oifname != "{ANY_INSTANCE_PREFIX}*" \
    ct state != {{ established, related }} drop
"#
    );
    for interface in interfaces {
        // Writing to a String cannot fail.
        let _ = writeln!(rules, r#"add element inet {GUARD_TABLE} {GUARDED_SET} {{ "{interface}" }}"#);
    }
    rules
}

pub(super) fn delete_table(table: &str) -> String {
    // Declaring it first makes deleting what is not there no error.
    format!("table inet {table} {{}}\ndelete table inet {table}\n")
}

fn destination_sets(config: &NetworkConfig) -> String {
    let set = |name: &str, ranges: &[Ipv4Net]| {
        // nft refuses an empty list of elements.
        let elements = if ranges.is_empty() {
            String::new()
        } else {
            let ranges: Vec<String> = ranges.iter().map(|range| range.trunc().to_string()).collect();
            format!("        elements = {{ {} }}\n", ranges.join(", "))
        };
        format!(
            "    set {name} {{\n        type ipv4_addr\n        flags interval\n        auto-merge\n{elements}    }}\n"
        )
    };
    set("denied_destinations", &config.denied_destinations) + &set("allowed_exceptions", &config.allowed_exceptions)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> NetworkConfig {
        NetworkConfig::new(InstanceName::new("test").expect("a valid name"))
    }

    #[test]
    fn ranges_are_written_without_host_bits_and_empty_sets_without_elements() {
        let config = NetworkConfig {
            denied_destinations: vec!["10.1.2.3/8".parse().expect("a network")],
            allowed_exceptions: Vec::new(),
            ..config()
        };
        let rules = router_rules(&config, Egress::Internet);
        assert!(rules.contains("elements = { 10.0.0.0/8 }"), "{rules}");
        assert_eq!(rules.matches("elements").count(), 1, "{rules}");
    }

    #[test]
    fn exceptions_come_after_what_is_always_closed_and_before_what_is_closed_by_default() {
        let always_closed = [
            (router_rules(&config(), Egress::Internet), "ip daddr 10.214.0.0/16 reject"),
            (host_rules(&config(), "bj000000-"), r#"oifname "bj*" drop"#),
        ];
        for (rules, always_closed) in always_closed {
            let position = |text: &str| rules.find(text).unwrap_or_else(|| panic!("{text} is missing in {rules}"));
            assert!(position(always_closed) < position("ip daddr @allowed_exceptions"));
            assert!(position("ip daddr @allowed_exceptions") < position("ip daddr @denied_destinations"));
        }
    }

    #[test]
    fn the_guard_names_each_interface_once() {
        let rules = guard_rules(&["eth0".to_owned(), "eth1.7".to_owned()]);
        assert_eq!(rules.matches("add element").count(), 2, "{rules}");
        assert!(rules.contains(r#"{ "eth1.7" }"#), "{rules}");
    }
}
