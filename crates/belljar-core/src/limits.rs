//! What one sandbox may use, and the bounds on what a caller may ask for.

use serde::{Deserialize, Serialize};

/// The resources promised to one sandbox. The runtime enforces each, and the guest sees them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Resources {
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Memory in MiB that the guest sees and may use.
    pub memory_mib: u32,
    /// Writable disk in MiB.
    pub disk_mib: u32,
    /// Processes and threads in the guest, per user.
    pub processes: u32,
}

impl Default for Resources {
    fn default() -> Self {
        Self { vcpus: 2, memory_mib: 1024, disk_mib: 10 * 1024, processes: 1024 }
    }
}

/// Bounds on what a caller may hand in. All are checked before anything is created.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RequestLimits {
    /// Sum of the bytes of all metadata keys and values.
    pub metadata_bytes: usize,
    /// Number of metadata entries.
    pub metadata_entries: usize,
    /// Sum of the bytes of all environment variables' names and values.
    pub env_bytes: usize,
    /// Size of a request body, in bytes.
    pub body_bytes: usize,
    /// Longest life that may be asked for in one call, in seconds; 0 is unlimited.
    pub timeout_s: u32,
}

impl Default for RequestLimits {
    fn default() -> Self {
        Self {
            metadata_bytes: 16 * 1024,
            metadata_entries: 64,
            env_bytes: 128 * 1024,
            body_bytes: 1024 * 1024,
            timeout_s: 0,
        }
    }
}
