//! The only crate that touches the host kernel: namespaces, mounts, cgroups, packet filters and the sandbox engine.

pub mod cgroup;
pub mod disk;
pub mod gvisor;
mod gvisor_runtime;
pub mod host;
pub mod image;
mod instance_lock;
pub mod network;
mod runtime;

pub use gvisor_runtime::{GvisorRuntime, GvisorSettings};
pub use runtime::{RunningSandbox, Runtime, RuntimeError, SandboxSpec};
