//! What an operator can set about sandbox networking, with safe defaults.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};

use ipnet::Ipv4Net;

use super::error::NetworkError;

const INSTANCE_LENGTH_MAX: usize = 20;

/// A shorter prefix would need more digits than an interface name has room for; a longer one than 30 holds no pair.
const POOL_PREFIX_LENGTHS: std::ops::RangeInclusive<u8> = 12..=30;

const DNS_PORT: u16 = 53;

/// Names one server on a machine that may run several: its packet filter table, interfaces and directories carry it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct InstanceName(String);

impl InstanceName {
    /// Up to 20 lowercase letters, digits and hyphens, a letter first: what nft, a path and a log line all take
    /// unquoted.
    pub fn new(name: &str) -> Result<Self, NetworkError> {
        let well_formed = name.starts_with(|c: char| c.is_ascii_lowercase())
            && name.len() <= INSTANCE_LENGTH_MAX
            && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
        if well_formed {
            Ok(Self(name.to_owned()))
        } else {
            Err(NetworkError::InvalidConfig {
                reason: format!(
                    "the instance name {name:?} is not 1 to {INSTANCE_LENGTH_MAX} lowercase letters, digits \
                     and hyphens, a letter first"
                ),
            })
        }
    }

    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for InstanceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// How far a sandbox reaches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Egress {
    /// The internet, less what is denied to all sandboxes.
    Internet,
    /// Nothing at all, name service included: questions to a resolver can carry data out as well.
    Nothing,
}

/// Settings of one server's sandbox networks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetworkConfig {
    pub instance: InstanceName,

    /// Where the namespaces are kept open, as `<sandbox-id>.inner` and `<sandbox-id>.router`.
    ///
    /// Not /run/netns: that directory belongs to `ip netns`, and container tools list and prune what they find there.
    /// A directory of our own makes "what do I own" a directory listing, and keeps it closed to other users.
    pub netns_dir: PathBuf,

    /// Every sandbox takes one /31 of it for the link between its router namespace and the host. Never seen outside.
    /// Servers on one machine may share a pool.
    pub uplink_pool: Ipv4Net,

    /// Where no sandbox may connect. The host's own addresses and `uplink_pool` are closed beyond this list, always.
    pub denied_destinations: Vec<Ipv4Net>,

    /// Holes in `denied_destinations`; an address in both is open.
    pub allowed_exceptions: Vec<Ipv4Net>,

    /// Resolvers that sandboxes' queries are forwarded to, in order of preference.
    /// Empty: the host's /etc/resolv.conf, read again at every reconcile.
    pub dns_upstreams: Vec<SocketAddr>,

    /// DNS queries of one sandbox under way at once; one more is answered SERVFAIL.
    pub dns_concurrency: usize,

    /// Outgoing connections (TCP, UDP flows, pings) of one sandbox that are tracked at once; one more is rejected.
    /// The host's connection table (`net.netfilter.nf_conntrack_max`) holds two entries for each.
    pub connections_max: u32,
}

impl NetworkConfig {
    /// The defaults for one instance.
    #[must_use]
    pub fn new(instance: InstanceName) -> Self {
        Self {
            netns_dir: Path::new("/run/belljar").join(instance.as_str()).join("netns"),
            instance,
            uplink_pool: default_uplink_pool(),
            denied_destinations: default_denied_destinations(),
            allowed_exceptions: Vec::new(),
            dns_upstreams: Vec::new(),
            dns_concurrency: 64,
            connections_max: 4096,
        }
    }

    /// How the names of this instance's interfaces on the host begin.
    #[must_use]
    pub fn interface_prefix(&self) -> String {
        super::slot::interface_prefix(&self.instance)
    }

    pub(super) fn validate(&self) -> Result<(), NetworkError> {
        let refuse = |reason: String| Err(NetworkError::InvalidConfig { reason });
        if !POOL_PREFIX_LENGTHS.contains(&self.uplink_pool.prefix_len()) {
            return refuse(format!(
                "uplink_pool {} must have a prefix length from {} to {}",
                self.uplink_pool,
                POOL_PREFIX_LENGTHS.start(),
                POOL_PREFIX_LENGTHS.end()
            ));
        }
        if self.uplink_pool.trunc() != self.uplink_pool {
            return refuse(format!("uplink_pool {} has host bits set", self.uplink_pool));
        }
        if self.uplink_pool.contains(&super::slot::GATEWAY_ADDRESS) {
            return refuse(format!("uplink_pool {} contains the sandboxes' own network", self.uplink_pool));
        }
        if self.dns_concurrency == 0 || self.connections_max == 0 {
            return refuse("dns_concurrency and connections_max must be at least 1".to_owned());
        }
        if !self.netns_dir.is_absolute() {
            return refuse(format!("netns_dir {} is not absolute", self.netns_dir.display()));
        }
        Ok(())
    }
}

#[must_use]
pub fn default_uplink_pool() -> Ipv4Net {
    Ipv4Net::new_assert(Ipv4Addr::new(10, 214, 0, 0), 16)
}

/// Everything that is not the public internet, from IANA's registry of special-purpose addresses (RFC 6890 and later).
///
/// The documentation ranges are in it too, although nothing should answer there: some private deployments number
/// their package mirrors from them, and then an operator decides, with `allowed_exceptions`.
#[must_use]
pub fn default_denied_destinations() -> Vec<Ipv4Net> {
    const DENIED: [([u8; 4], u8); 14] = [
        ([0, 0, 0, 0], 8),       // this network
        ([10, 0, 0, 0], 8),      // private
        ([100, 64, 0, 0], 10),   // carrier-grade NAT, and many clouds' internal services
        ([127, 0, 0, 0], 8),     // loopback
        ([169, 254, 0, 0], 16),  // link-local, with every cloud's metadata service
        ([172, 16, 0, 0], 12),   // private
        ([192, 0, 0, 0], 24),    // protocol assignments
        ([192, 0, 2, 0], 24),    // documentation 1
        ([192, 168, 0, 0], 16),  // private
        ([198, 18, 0, 0], 15),   // benchmarking
        ([198, 51, 100, 0], 24), // documentation 2
        ([203, 0, 113, 0], 24),  // documentation 3
        ([224, 0, 0, 0], 4),     // multicast
        ([240, 0, 0, 0], 4),     // reserved, and broadcast
    ];
    DENIED.iter().map(|&(octets, prefix)| Ipv4Net::new_assert(Ipv4Addr::from(octets), prefix)).collect()
}

/// The resolvers a `resolv.conf` names. What can't be understood is left out: a resolver too few beats none at all.
#[must_use]
pub fn parse_resolv_conf(text: &str) -> Vec<SocketAddr> {
    text.lines()
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            (words.next() == Some("nameserver")).then(|| words.next())?
        })
        .filter_map(|address| address.parse::<IpAddr>().ok())
        .map(|address| SocketAddr::new(address, DNS_PORT))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> NetworkConfig {
        NetworkConfig::new(InstanceName::new("test").expect("a valid name"))
    }

    #[test]
    fn instance_names_fit_a_path_and_nft() {
        for name in ["belljar", "a", "ci-2", "abcdefghijklmnopqrst"] {
            assert!(InstanceName::new(name).is_ok(), "{name} was refused");
        }
        for name in ["", "2ci", "-a", "Belljar", "a_b", "a/b", "a b", "a;b", "abcdefghijklmnopqrstu", "ä"] {
            assert!(InstanceName::new(name).is_err(), "{name} passed");
        }
    }

    #[test]
    fn the_defaults_are_valid_and_close_what_is_not_public() {
        let config = config();
        assert!(config.validate().is_ok());
        let denied = |address: &str| {
            let address: Ipv4Addr = address.parse().expect("an address");
            config.denied_destinations.iter().any(|range| range.contains(&address))
        };
        for address in ["10.1.2.3", "127.0.0.1", "169.254.169.254", "172.31.255.255", "192.168.0.1", "100.127.0.1"] {
            assert!(denied(address), "{address} is open");
        }
        for address in ["1.1.1.1", "172.32.0.1", "100.128.0.1", "198.20.0.1", "223.255.255.255"] {
            assert!(!denied(address), "{address} is closed");
        }
    }

    #[test]
    fn pools_that_cannot_work_are_refused() {
        for pool in ["10.0.0.0/8", "10.0.0.0/31", "10.214.1.0/16", "169.254.0.0/16"] {
            let config = NetworkConfig { uplink_pool: pool.parse().expect("a network"), ..config() };
            assert!(config.validate().is_err(), "{pool} passed");
        }
    }

    #[test]
    fn resolv_conf_is_read_leniently() {
        let text = "# nameserver 9.9.9.9\nsearch example.org\nnameserver 127.0.0.53\n\tnameserver\t2001:db8::1 # two\n\
                    nameserver fe80::1%eth0\nnameserver\nnameserver what\noptions edns0\n";
        let expected: Vec<SocketAddr> =
            vec!["127.0.0.53:53".parse().expect("v4"), "[2001:db8::1]:53".parse().expect("v6")];
        assert_eq!(parse_resolv_conf(text), expected);
    }
}
