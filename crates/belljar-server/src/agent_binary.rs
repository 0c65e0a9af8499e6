//! The agent, carried inside this binary, so that one file is all there is to install.

/// The static executable that becomes the init of every sandbox. See `build.rs` for where it comes from.
pub(crate) const AGENT: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/belljar-agent"));
