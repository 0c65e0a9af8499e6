//! Names and addresses: what is the same in every sandbox, and what follows from the number of its uplink.

use std::net::Ipv4Addr;

use ipnet::Ipv4Net;
use sha2::{Digest, Sha256};

use super::config::InstanceName;

// The guest's side is the same in every sandbox, down to the link addresses, so that a memory snapshot can be restored
// into any of them with its sockets and its neighbour table still true.
pub const GUEST_ADDRESS: Ipv4Addr = Ipv4Addr::new(169, 254, 7, 2);
pub const GATEWAY_ADDRESS: Ipv4Addr = Ipv4Addr::new(169, 254, 7, 1);
pub(super) const GUEST_PREFIX_LENGTH: u8 = 30;

pub(super) const GUEST_INTERFACE: &str = "eth0";
pub(super) const GATEWAY_INTERFACE: &str = "guest";
pub(super) const UPLINK_INTERFACE: &str = "uplink";

/// Locally administered, and set explicitly on every end: udev renumbers links whose address the kernel made up.
pub(super) const GUEST_LINK_ADDRESS: [u8; 6] = [0x02, b'b', b'j', 0, 7, 2];
pub(super) const GATEWAY_LINK_ADDRESS: [u8; 6] = [0x02, b'b', b'j', 0, 7, 1];
pub(super) const UPLINK_LINK_ADDRESS: [u8; 6] = [0x02, b'b', b'j', 1, 7, 2];
pub(super) const HOST_LINK_ADDRESS: [u8; 6] = [0x02, b'b', b'j', 1, 7, 1];

/// What the uplinks of every belljar on the machine begin with.
pub(super) const ANY_INSTANCE_PREFIX: &str = "bj";

/// The beginning of all host interface names of an instance: `bj`, 6 hex digits, a hyphen. With a slot number of at
/// most 6 digits (see the limits of the pool) it fills the kernel's 15 characters.
pub(super) fn interface_prefix(instance: &InstanceName) -> String {
    let digest = Sha256::digest(instance.as_str().as_bytes());
    format!("{ANY_INSTANCE_PREFIX}{:02x}{:02x}{:02x}-", digest[0], digest[1], digest[2])
}

/// One /31 of the pool and the host interface that carries it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Slot {
    pub(super) index: u32,
    pub(super) interface: String,
    pub(super) host_address: Ipv4Addr,
    pub(super) router_address: Ipv4Addr,
}

impl Slot {
    pub(super) fn new(prefix: &str, pool: Ipv4Net, index: u32) -> Self {
        debug_assert!(index < slot_count(pool), "slot {index} lies outside {pool}");
        let base = u32::from(pool.network()) + 2 * index;
        Self {
            index,
            interface: format!("{prefix}{index}"),
            host_address: Ipv4Addr::from(base),
            router_address: Ipv4Addr::from(base + 1),
        }
    }

    /// The slot that an interface of the instance stands for, if it is one and lies in the pool.
    pub(super) fn index_of(prefix: &str, pool: Ipv4Net, interface: &str) -> Option<u32> {
        let digits = interface.strip_prefix(prefix)?;
        let index = digits.parse().ok()?;
        (index < slot_count(pool)).then_some(index)
    }
}

/// How many sandboxes a pool can connect.
pub(super) fn slot_count(pool: Ipv4Net) -> u32 {
    1 << (31 - u32::from(pool.prefix_len()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn instance() -> InstanceName {
        InstanceName::new("test").expect("a valid name")
    }

    #[test]
    fn two_instances_differ_and_the_name_is_stable() {
        assert_eq!(interface_prefix(&instance()), "bj9f86d0-");
        assert_ne!(interface_prefix(&instance()), interface_prefix(&InstanceName::new("other").expect("a valid name")));
    }

    proptest! {
        #[test]
        fn every_slot_has_its_own_pair_inside_the_pool(prefix_length in 12u8..=30, choice in any::<u32>()) {
            let pool = Ipv4Net::new_assert(Ipv4Addr::new(10, 208, 0, 0), prefix_length);
            let index = choice % slot_count(pool);
            let prefix = interface_prefix(&instance());
            let slot = Slot::new(&prefix, pool, index);
            prop_assert!(slot.interface.len() <= 15);
            prop_assert!(pool.contains(&slot.host_address) && pool.contains(&slot.router_address));
            prop_assert_eq!(u32::from(slot.host_address) % 2, 0);
            prop_assert_eq!(u32::from(slot.host_address) + 1, u32::from(slot.router_address));
            prop_assert_eq!(Slot::index_of(&prefix, pool, &slot.interface), Some(index));
        }
    }

    #[test]
    fn foreign_interfaces_are_no_slots() {
        let prefix = interface_prefix(&instance());
        let pool = Ipv4Net::new_assert(Ipv4Addr::new(10, 214, 0, 0), 24);
        for name in ["eth0", "bj", "bj000000-1", &prefix, &format!("{prefix}x"), &format!("{prefix}128")] {
            assert_eq!(Slot::index_of(&prefix, pool, name), None, "{name} passed");
        }
    }
}
