//! Sandbox networks: every sandbox in a network of its own, out to the internet, in only through the server.
//!
//! ```text
//!  inner namespace       router namespace                                        host namespace
//! ┌──────────────────┐  ┌────────────────────────────────────────────────────┐  ┌──────────────────────────────┐
//! │ eth0             │  │ guest                 filter            uplink     │  │ bj<hash>-<n>                 │
//! │ 169.254.7.2/30 ──┼──┼ 169.254.7.1/30 ──── (router_rules) ── 10.214.x.y/31┼──┼ 10.214.x.y-1 ─ (host_rules) ─┼─ eth0
//! │ (runsc takes it) │  │   │        ▲                                       │  │                              │
//! └──────────────────┘  │  DNS :53   └ the server's sockets                  │  │                              │
//!                       └────────────────────────────────────────────────────┘  └──────────────────────────────┘
//! ```
//!
//! - **The guest's side is the same in every sandbox**, so a memory snapshot restores into any of them.
//! - **Ingress** crosses no address translation: the server makes its sockets inside the router namespace
//!   ([`SandboxNetwork::connect`]).
//! - **Egress** is translated twice, to the uplink's address and to the host's, and filtered twice (`rules.rs`).
//! - **DNS** is answered in the router namespace by the server (`dns`); the guest reaches no address of the host.
//! - **IPv6** does not exist on a guest's interface, and is dropped wherever it might appear.
//!
//! State lives in the kernel: namespaces are files, uplinks carry their sandbox's id as alias, slots are interface
//! names. A restarted server reads it back ([`NetworkManager::start`], [`NetworkManager::adopt`]).

mod config;
mod dns;
mod error;
mod forwarding;
mod host;
mod host_check;
mod manager;
mod namespace;
mod netfilter;
mod netlink;
mod nft;
mod rules;
mod ruleset;
mod sandbox;
mod slot;
mod slots;
mod sysctl;
mod topology;

pub use config::{
    Egress, InstanceName, NetworkConfig, default_denied_destinations, default_uplink_pool, parse_resolv_conf,
};
pub use error::NetworkError;
pub use manager::NetworkManager;
pub use sandbox::SandboxNetwork;
pub use slot::{GATEWAY_ADDRESS, GUEST_ADDRESS};
