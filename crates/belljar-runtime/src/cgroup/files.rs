//! Reading and writing the kernel's control files, with errors that name the file.

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::path::Path;

use super::CgroupError;

pub(super) fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> CgroupError {
    let path = path.to_owned();
    move |source| CgroupError::Io { action, path, source }
}

pub(super) fn read(path: &Path) -> Result<String, CgroupError> {
    fs::read_to_string(path).map_err(failed("read", path))
}

/// Never creates the file: a control file that isn't there is a controller that isn't there.
pub(super) fn write(path: &Path, value: &str) -> Result<(), CgroupError> {
    OpenOptions::new()
        .write(true)
        .open(path)
        .and_then(|mut file| file.write_all(value.as_bytes()))
        .map_err(failed("write", path))
}

pub(super) fn make_directory(path: &Path) -> Result<(), CgroupError> {
    match fs::create_dir(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(failed("create", path)(error)),
        _ => Ok(()),
    }
}

pub(super) fn read_number(path: &Path) -> Result<u64, CgroupError> {
    number(read(path)?.trim(), path)
}

/// Files of `name value` lines, such as `memory.stat`.
pub(super) fn read_table(path: &Path) -> Result<BTreeMap<String, u64>, CgroupError> {
    read(path)?
        .lines()
        .filter_map(|line| line.split_once(' '))
        // «max» stands for no limit; it is never in a counter that is asked for here.
        .filter(|(_, value)| *value != "max")
        .map(|(name, value)| Ok((name.to_owned(), number(value.trim(), path)?)))
        .collect()
}

fn number(text: &str, path: &Path) -> Result<u64, CgroupError> {
    text.parse().map_err(|error| failed("understand", path)(io::Error::new(io::ErrorKind::InvalidData, error)))
}

/// The process ids in a `cgroup.procs`; none if the cgroup is gone.
pub(super) fn read_processes(directory: &Path) -> Result<Vec<i32>, CgroupError> {
    let path = directory.join("cgroup.procs");
    let text = match fs::read_to_string(&path) {
        Ok(text) => text,
        // ENODEV is what reading an open file of a cgroup says once that is removed.
        Err(error) if error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(nix::libc::ENODEV) => {
            return Ok(Vec::new());
        }
        Err(error) => return Err(failed("read", &path)(error)),
    };
    // A process of a foreign PID namespace shows as 0; there is nothing that could be done with it.
    Ok(text.lines().filter_map(|line| line.parse().ok()).filter(|pid| *pid > 0).collect())
}
