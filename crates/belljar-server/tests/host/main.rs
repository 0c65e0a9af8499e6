//! Tests of the whole server on a real host: real sandboxes, real crashes, real counting of what is left.
//!
//! They need root, the base template and a few minutes, so a plain `cargo test` lists them as ignored; `make test` runs
//! them. `BELLJAR_TEST_STATE_DIR` names a state directory with the template and `BELLJAR_TEST_CONFIG` a configuration
//! that suits the machine. They share that state directory, so they run one after the other.

#![allow(clippy::unwrap_used, reason = "a test that can't go on should panic")]

mod census;
mod command_line;
mod crash;
mod crowd;
mod leaks;
mod limits;
mod server;
