//! From a request to a command that can be started.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::{env, fs, io};

use belljar_protocol::envd::process::ProcessConfig;
use rustix::process::{Gid, Rlimit, Uid};

use super::sys::{self, Identity};
use crate::paths::PathError;
use crate::state::Sandbox;
use crate::users::User;

/// Where programs are if whoever started the agent did not say.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What a command's standard streams are. A terminal will be the other kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum StdioKind {
    /// A pipe for each; without `stdin` the command reads `/dev/null`.
    Pipes { stdin: bool },
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum StartError {
    #[error("no process given")]
    NothingToStart,
    #[error(transparent)]
    Directory(PathError),
    #[error("cwd '{}' does not exist", .0.display())]
    NoSuchDirectory(PathBuf),
    #[error("cwd '{}' is not a directory", .0.display())]
    NotADirectory(PathBuf),
    #[error("error starting process '{command}': {reason}")]
    Spawn { command: String, reason: String, kind: SpawnFailure },
}

/// Whether trying the same again can help.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SpawnFailure {
    /// No such program, not allowed to run it, not a directory the user may enter.
    Permanent,
    /// The sandbox is at a limit: processes, memory, open files.
    OutOfResources,
}

impl StartError {
    /// A failure of fork or exec, or of setting up the pipes.
    pub(crate) fn spawn(config: &ProcessConfig, error: &io::Error) -> Self {
        use rustix::io::Errno;
        let exhausted = [Errno::AGAIN, Errno::NOMEM, Errno::MFILE, Errno::NFILE];
        let kind = match Errno::from_io_error(error) {
            Some(errno) if exhausted.contains(&errno) => SpawnFailure::OutOfResources,
            _ => SpawnFailure::Permanent,
        };
        Self::Spawn { command: config.cmd.clone(), reason: error.to_string(), kind }
    }
}

/// Builds the command that `config` describes, to run as `user`.
///
/// The environment is PATH, HOME, USER and LOGNAME, then what `/init` set, then what the request sets.
pub(crate) fn prepare(
    config: &ProcessConfig,
    user: &User,
    stdio: StdioKind,
    sandbox: &Sandbox,
    open_files: Rlimit,
) -> Result<Command, StartError> {
    if config.cmd.is_empty() {
        return Err(StartError::NothingToStart);
    }
    let directory = sandbox.resolve(config.cwd.as_deref().unwrap_or_default(), user).map_err(StartError::Directory)?;
    let directory = existing_directory(directory)?;

    let mut command = Command::new(&config.cmd);
    command.args(&config.args).env_clear();
    command.env("PATH", env::var_os("PATH").unwrap_or_else(|| DEFAULT_PATH.into()));
    command.env("HOME", &user.home).env("USER", &user.name).env("LOGNAME", &user.name);
    command.envs(usable(&sandbox.defaults().env));
    command.envs(usable(&config.envs.iter().map(|(name, value)| (name.clone(), value.clone())).collect()));

    match stdio {
        StdioKind::Pipes { stdin } => {
            command.stdin(if stdin { Stdio::piped() } else { Stdio::null() });
            command.stdout(Stdio::piped()).stderr(Stdio::piped());
        }
    }
    sys::assume(
        &mut command,
        Identity {
            uid: Uid::from_raw(user.uid),
            gid: Gid::from_raw(user.gid),
            groups: user.groups.iter().map(|gid| Gid::from_raw(*gid)).collect(),
            directory,
            open_files,
        },
    );
    Ok(command)
}

/// Leaves out what no environment can hold: names that are empty or contain `=`.
fn usable(variables: &BTreeMap<String, String>) -> impl Iterator<Item = (&str, &str)> {
    variables
        .iter()
        .filter(|(name, _)| !name.is_empty() && !name.contains('='))
        .map(|(name, value)| (name.as_str(), value.as_str()))
}

fn existing_directory(path: PathBuf) -> Result<CString, StartError> {
    match fs::metadata(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Err(StartError::NoSuchDirectory(path)),
        Ok(metadata) if !metadata.is_dir() => Err(StartError::NotADirectory(path)),
        // Whatever else is wrong with it, the command's own attempt to enter it will tell.
        Ok(_) | Err(_) => c_path(&path).ok_or(StartError::Directory(PathError::NullByte)),
    }
}

fn c_path(path: &Path) -> Option<CString> {
    CString::new(path.as_os_str().to_owned().into_vec()).ok()
}
