//! What can go wrong while a network is built, named by the step that failed.

use std::io;
use std::net::Ipv4Addr;
use std::path::PathBuf;

use belljar_core::id::SandboxId;
use ipnet::Ipv4Net;

/// A network operation failed. The text says which step; the kernel's own words are the source.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    #[error("invalid network configuration: {reason}")]
    InvalidConfig { reason: String },

    #[error("cannot {step} {}", path.display())]
    File {
        step: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },

    #[error("cannot {step}")]
    Namespace {
        step: &'static str,
        #[source]
        source: io::Error,
    },

    #[error("netlink: cannot {step}")]
    Netlink {
        step: String,
        #[source]
        source: io::Error,
    },

    #[error("cannot run nft to {step}")]
    PacketFilterTool {
        step: &'static str,
        #[source]
        source: io::Error,
    },

    /// nft ran and refused; `message` is what it printed.
    #[error("nft refused to {step}: {message}")]
    PacketFilter { step: &'static str, message: String },

    #[error("cannot {step}")]
    Socket {
        step: &'static str,
        #[source]
        source: io::Error,
    },

    #[error("all {slots} uplink addresses of {pool} are in use")]
    PoolExhausted { pool: Ipv4Net, slots: u32 },

    #[error("the uplink pool {pool} overlaps {address} on interface {interface}; choose another pool")]
    PoolOverlapsHost { pool: Ipv4Net, address: Ipv4Addr, interface: String },

    #[error("sandbox {sandbox} already has a network")]
    AlreadyExists { sandbox: SandboxId },

    /// What is left of a create or a destroy that was cut short: only [`destroy`](super::NetworkManager::destroy)
    /// helps.
    #[error("the network of sandbox {sandbox} is incomplete: {missing}")]
    Incomplete { sandbox: SandboxId, missing: &'static str },

    #[error("a network worker thread ended before it answered")]
    WorkerGone,
}

impl NetworkError {
    /// The kernel's error number, where there is one.
    pub(super) fn raw_os_error(&self) -> Option<i32> {
        match self {
            Self::File { source, .. }
            | Self::Namespace { source, .. }
            | Self::Netlink { source, .. }
            | Self::PacketFilterTool { source, .. }
            | Self::Socket { source, .. } => source.raw_os_error(),
            Self::InvalidConfig { .. }
            | Self::PacketFilter { .. }
            | Self::PoolExhausted { .. }
            | Self::PoolOverlapsHost { .. }
            | Self::AlreadyExists { .. }
            | Self::Incomplete { .. }
            | Self::WorkerGone => None,
        }
    }
}
