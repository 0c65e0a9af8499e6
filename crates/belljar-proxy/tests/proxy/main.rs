//! The proxy against real servers and clients on loopback.

#![allow(clippy::unwrap_used, reason = "a test may panic")]
#![allow(unreachable_pub, reason = "modules of one test program")]

mod addressing;
mod crossing;
mod endings;
mod streaming;
mod support;
mod tunnels;
