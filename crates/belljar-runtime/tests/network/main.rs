//! Sandbox networks on hosts made for the tests: see `world`. Needs root.

mod guest;
mod host;
mod lifecycle;
mod reach;
mod world;
