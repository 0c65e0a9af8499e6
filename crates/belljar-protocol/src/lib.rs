//! The wire: what E2B's SDKs, the server and the agent say to each other.

pub mod api;
#[cfg(feature = "client")]
pub mod client;
pub mod envd;
