//! `/proc/self/mountinfo`, read.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

/// One mounted filesystem, as this process's mount namespace shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Mount {
    pub(crate) mount_point: PathBuf,
    pub(crate) filesystem: String,
    /// Options of the filesystem itself; for cgroup v1 they name the controllers.
    pub(crate) super_options: Vec<String>,
}

pub(crate) fn read() -> io::Result<Vec<Mount>> {
    // Others may have mounted anything anywhere, names that are no text included; ours are text.
    Ok(parse(&String::from_utf8_lossy(&fs::read("/proc/self/mountinfo")?)))
}

/// Lines that aren't of the documented form are left out: nothing of ours is on them.
pub(crate) fn parse(text: &str) -> Vec<Mount> {
    text.lines().filter_map(parse_line).collect()
}

fn parse_line(line: &str) -> Option<Mount> {
    // id parent major:minor root mount-point options [optional fields] - filesystem source super-options
    let (mount, filesystem) = line.split_once(" - ")?;
    let mut filesystem = filesystem.split(' ');
    Some(Mount {
        mount_point: unescape(mount.split(' ').nth(4)?),
        filesystem: filesystem.next()?.to_owned(),
        super_options: filesystem.nth(1)?.split(',').map(str::to_owned).collect(),
    })
}

/// The kernel writes space, tab, newline and backslash as three octal digits.
fn unescape(text: &str) -> PathBuf {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        let octal = match tail {
            [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', ..] if *first == b'\\' => {
                Some((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'))
            }
            _ => None,
        };
        bytes.push(octal.unwrap_or(*first));
        rest = if octal.is_some() { &tail[3..] } else { tail };
    }
    PathBuf::from(OsString::from_vec(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_the_kernel_writes() {
        let text = "39 32 0:34 / /sys/fs/cgroup/cpu,cpuacct rw,noexec shared:18 - cgroup cgroup rw,cpu,cpuacct\n\
                    40 32 7:1 / /srv/a\\040b\\134c rw - ext4 /dev/loop1 rw\n\
                    garbage\n";
        let mounts = parse(text);
        assert_eq!(mounts.len(), 2);
        assert_eq!(mounts[0].mount_point, PathBuf::from("/sys/fs/cgroup/cpu,cpuacct"));
        assert_eq!(mounts[0].super_options, ["rw", "cpu", "cpuacct"]);
        assert_eq!(mounts[1].mount_point, PathBuf::from("/srv/a b\\c"));
        assert_eq!(mounts[1].filesystem, "ext4");
    }

    #[test]
    fn reads_this_machine() {
        let mounts = read().expect("mountinfo is readable");
        assert!(mounts.iter().any(|mount| mount.mount_point.as_os_str() == "/"));
    }
}
