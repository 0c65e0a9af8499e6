//! Kernel settings under /proc/sys/net. The kernel shows every thread those of the namespace that the thread is in.

use std::io;
use std::path::{Path, PathBuf};

use super::error::NetworkError;

pub(super) const IP_FORWARD: &str = "ipv4/ip_forward";

/// Per interface, IPv4 only. The name is a path component here, so one with dots (a VLAN's) needs no escaping.
pub(super) fn interface_forwarding(interface: &str) -> String {
    format!("ipv4/conf/{interface}/forwarding")
}

pub(super) fn read(setting: &str) -> Result<String, NetworkError> {
    let path = path(setting);
    std::fs::read_to_string(&path).map(|value| value.trim().to_owned()).map_err(|source| NetworkError::File {
        step: "read the kernel setting",
        path,
        source,
    })
}

pub(super) fn write(setting: &str, value: &str) -> Result<(), NetworkError> {
    let path = path(setting);
    std::fs::write(&path, value).map_err(|source| NetworkError::File { step: "write the kernel setting", path, source })
}

/// For a setting that a kernel without the feature (here: IPv6) does not have, and then does not need.
pub(super) fn write_if_present(setting: &str, value: &str) -> Result<(), NetworkError> {
    match write(setting, value) {
        Err(NetworkError::File { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

fn path(setting: &str) -> PathBuf {
    Path::new("/proc/sys/net").join(setting)
}
