//! Starting a sandbox.

use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::atomic::Ordering;

use belljar_core::limits::Resources;
use tokio::process::Command;

use super::bundle::Configuration;
use super::probe::{EngineInfo, ProbeError, SETUID_FLAG};
use super::process::{Process, ProcessError};
use super::sys::{self, Place};
use super::{
    CONSOLE_LOG, ExitReason, Gvisor, LaunchSpec, RECORD, Record, RunningSandbox, ending, log_tail,
    make_private_directory, off_the_async_threads,
};
use crate::cgroup::{Cgroup, CgroupError};

/// A sandbox could not be started.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    #[error("could not {action} {}", path.display())]
    Io {
        action: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("could not prepare the sandbox's cgroup")]
    Cgroup(#[source] CgroupError),
    #[error("runsc is not usable")]
    Probe(#[source] ProbeError),
    #[error("could not start runsc")]
    Spawn(#[source] io::Error),
    #[error("runsc did not finish in time")]
    TimedOut,
    #[error("runsc refused ({status}): {message}")]
    Refused { status: ExitStatus, message: String },
    #[error("the sandbox ended while it was started: {reason:?}")]
    Ended { reason: ExitReason },
    #[error("could not identify the sentry")]
    Identify(#[source] Box<dyn std::error::Error + Send + Sync>),
}

impl LaunchError {
    fn at(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { action, path, source }
    }
}

impl From<ProcessError> for LaunchError {
    fn from(error: ProcessError) -> Self {
        Self::Identify(error.into())
    }
}

/// Host threads that one guest process can take: its stub, one thread per CPU that it runs on, and one for its system
/// calls.
fn host_tasks_per_process(vcpus: u32) -> u64 {
    u64::from(vcpus) + 2
}

/// Host threads of sentry, gofer and runsc themselves. Go starts one for each blocked system call.
const ENGINE_TASKS: u64 = 512;

const MIB: u64 = 1 << 20;

const PID_FILE: &str = "sentry.pid";

/// Everything that a sandbox's engine writes on its scratch disk. The quota of that disk also bounds what a guest can
/// make the sentry log.
#[derive(Debug, Clone)]
struct ScratchLayout {
    filestore: PathBuf,
    console: PathBuf,
    log: PathBuf,
    panic_log: PathBuf,
}

impl ScratchLayout {
    fn new(scratch_dir: &Path) -> Self {
        let logs = scratch_dir.join("logs");
        Self {
            filestore: scratch_dir.join("files"),
            console: logs.join(CONSOLE_LOG),
            log: logs.join("runsc.log"),
            panic_log: logs.join("panic.log"),
        }
    }

    /// Makes the directories and opens the console.
    fn create(&self) -> Result<File, LaunchError> {
        for directory in [Some(self.filestore.as_path()), self.log.parent()].into_iter().flatten() {
            make_private_directory(directory).map_err(LaunchError::at("create", directory))?;
        }
        let console = OpenOptions::new().append(true).create(true).open(&self.console);
        console.map_err(LaunchError::at("open", &self.console))
    }
}

pub(super) async fn launch(engine: &Gvisor, spec: &LaunchSpec) -> Result<RunningSandbox, LaunchError> {
    let info = engine.probe().await.map_err(LaunchError::Probe)?;
    let directory = engine.directory(&spec.id);
    let scratch = ScratchLayout::new(&spec.scratch_dir);
    let console = prepare_files(engine, spec, &directory, &scratch).await?;

    let cgroup = engine.cgroups.create(&spec.id).map_err(LaunchError::Cgroup)?;
    limit_to_what_the_guest_sees(engine, &cgroup, &spec.resources).map_err(LaunchError::Cgroup)?;

    let mut command = command(engine, info, spec, &directory, &scratch, console)?;
    sys::start_at(&mut command, place(engine, spec, &cgroup)?);
    run(engine, command, &scratch).await?;

    let pid = read_pid(&directory.join(PID_FILE))?;
    let Some(process) = Process::find(pid, &cgroup)? else {
        return Err(LaunchError::Ended { reason: ending::reason(cgroup.usage().ok(), &scratch.panic_log) });
    };
    widen_to_what_the_host_allows(engine, &cgroup, &spec.resources).map_err(LaunchError::Cgroup)?;
    let record = Record { process: process.identity, panic_log: scratch.panic_log };
    write_record(&directory, &record)?;
    Ok(RunningSandbox { id: spec.id.clone(), process, cgroup, panic_log: record.panic_log })
}

/// Makes the directories, writes runsc's configuration, and opens the console.
async fn prepare_files(
    engine: &Gvisor,
    spec: &LaunchSpec,
    directory: &Path,
    scratch: &ScratchLayout,
) -> Result<File, LaunchError> {
    let path = directory.join("config.json");
    let configuration = Configuration::new(spec, engine.cgroups.view_for_runsc(&spec.id).path);
    let text = serde_json::to_vec(&configuration)
        .map_err(|error| LaunchError::at("serialize", &path)(io::Error::other(error)))?;
    let prepare = {
        let (directory, scratch) = (directory.to_owned(), scratch.clone());
        move || {
            make_private_directory(&directory).map_err(LaunchError::at("create", &directory))?;
            fs::write(&path, text).map_err(LaunchError::at("write", &path))?;
            scratch.create()
        }
    };
    off_the_async_threads(prepare).await
}

/// runsc tells the guest as many CPUs as the cgroup has, and as much memory as its limit is.
fn limit_to_what_the_guest_sees(engine: &Gvisor, cgroup: &Cgroup, resources: &Resources) -> Result<(), CgroupError> {
    let count = usize::try_from(resources.vcpus).unwrap_or(usize::MAX);
    let first = engine.next_cpu.fetch_add(count, Ordering::Relaxed);
    cgroup.set_cpus(&engine.cgroups.cpus()?.take_from(first, count))?;
    cgroup.set_cpu_time(resources.vcpus)?;
    cgroup.set_memory(u64::from(resources.memory_mib) * MIB)?;
    let tasks = u64::from(resources.processes) * host_tasks_per_process(resources.vcpus) + ENGINE_TASKS;
    cgroup.set_processes(tasks)
}

fn widen_to_what_the_host_allows(engine: &Gvisor, cgroup: &Cgroup, resources: &Resources) -> Result<(), CgroupError> {
    let memory_mib = u64::from(resources.memory_mib) + u64::from(engine.config.memory_overhead_mib);
    cgroup.set_memory(memory_mib * MIB)?;
    // The quota of time stays; which CPUs it is spent on is better left to the host's scheduler.
    cgroup.set_cpus(&engine.cgroups.cpus()?)
}

fn command(
    engine: &Gvisor,
    info: &EngineInfo,
    spec: &LaunchSpec,
    directory: &Path,
    scratch: &ScratchLayout,
    console: File,
) -> Result<Command, LaunchError> {
    let console_too = console.try_clone().map_err(LaunchError::at("open", &scratch.console))?;
    let mut command = Command::new(&engine.config.runsc);
    command
        .arg(flag("root", directory))
        .arg("--platform=systrap")
        .arg("--network=sandbox")
        .arg(flag("overlay2", format!("root:dir={}", scratch.filestore.display())))
        .arg(flag("log", &scratch.log))
        .arg("--log-format=json")
        .arg(flag("panic-log", &scratch.panic_log))
        .args(info.honours_setuid().then(|| format!("--{SETUID_FLAG}")))
        .args(&engine.config.extra_flags)
        .args(["run", "--detach"])
        .arg(flag("bundle", directory))
        .arg(flag("pid-file", directory.join(PID_FILE)))
        .arg(spec.id.as_str())
        .current_dir("/")
        .env_clear()
        .stdin(Stdio::null())
        .stdout(console)
        .stderr(console_too);
    Ok(command)
}

fn flag(name: &str, value: impl AsRef<std::ffi::OsStr>) -> std::ffi::OsString {
    let mut flag = std::ffi::OsString::from(format!("--{name}="));
    flag.push(value);
    flag
}

fn place(engine: &Gvisor, spec: &LaunchSpec, cgroup: &Cgroup) -> Result<Place, LaunchError> {
    let network = File::open(&spec.inner_netns).map_err(LaunchError::at("open", &spec.inner_netns))?;
    let cgroup_top = engine
        .cgroups
        .view_for_runsc(&spec.id)
        .top
        .map(|top| {
            CString::new(top.as_os_str().as_bytes())
                .map_err(|error| LaunchError::at("use", &top)(io::Error::new(io::ErrorKind::InvalidInput, error)))
        })
        .transpose()?;
    Ok(Place {
        cgroup_entrances: cgroup.entrances().map_err(LaunchError::Cgroup)?,
        network: network.into(),
        cgroup_top,
    })
}

/// Runs `runsc run --detach`, which ends when the guest's init has been started.
async fn run(engine: &Gvisor, mut command: Command, scratch: &ScratchLayout) -> Result<(), LaunchError> {
    let mut runsc = command.spawn().map_err(LaunchError::Spawn)?;
    let status = match tokio::time::timeout(engine.config.launch_limit, runsc.wait()).await {
        Ok(status) => status.map_err(LaunchError::Spawn)?,
        // The caller destroys the sandbox, and with it this process, which is in its cgroup.
        Err(_) => return Err(LaunchError::TimedOut),
    };
    if status.success() { Ok(()) } else { Err(LaunchError::Refused { status, message: complaint(&scratch.log) }) }
}

/// Much more than runsc writes until it gives up. The sentry logs to the same file, at the guest's will.
const LONGEST_END_OF_LOG_BYTES: u64 = 64 << 10;

/// The last error in runsc's log.
fn complaint(log: &Path) -> String {
    let text = log_tail::read(log, LONGEST_END_OF_LOG_BYTES).unwrap_or_default();
    last_error(&text).unwrap_or_else(|| "it gave no reason".to_owned())
}

fn last_error(log: &str) -> Option<String> {
    #[derive(serde::Deserialize)]
    struct Line {
        msg: String,
        level: String,
    }
    log.lines()
        .rev()
        .filter_map(|line| serde_json::from_str::<Line>(line).ok())
        .find(|line| line.level == "error" || line.level == "fatal")
        .map(|line| line.msg)
}

fn read_pid(path: &Path) -> Result<i32, LaunchError> {
    let text = fs::read_to_string(path).map_err(LaunchError::at("read", path))?;
    text.trim()
        .parse()
        .map_err(|error| LaunchError::at("understand", path)(io::Error::new(io::ErrorKind::InvalidData, error)))
}

/// Renamed into place, so that a later server finds all of it or nothing.
fn write_record(directory: &Path, record: &Record) -> Result<(), LaunchError> {
    let (part, path) = (directory.join("sentry.json.part"), directory.join(RECORD));
    let text =
        serde_json::to_vec(record).map_err(|error| LaunchError::at("serialize", &path)(io::Error::other(error)))?;
    fs::write(&part, text).map_err(LaunchError::at("write", &part))?;
    fs::rename(&part, &path).map_err(LaunchError::at("write", &path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_error_is_what_counts() {
        let log = "{\"msg\":\"first\",\"level\":\"error\",\"time\":\"t\"}\n\
                   {\"msg\":\"second\",\"level\":\"error\",\"time\":\"t\"}\n\
                   {\"msg\":\"later\",\"level\":\"info\",\"time\":\"t\"}\nnot json\n";
        assert_eq!(last_error(log).as_deref(), Some("second"));
        assert_eq!(last_error(""), None);
    }

    #[test]
    fn a_long_log_is_read_from_its_end() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let log = directory.path().join("runsc.log");
        let line = |message: &str| format!("{{\"msg\":\"{message}\",\"level\":\"error\",\"time\":\"t\"}}\n");
        let filler = "not json\n".repeat(LONGEST_END_OF_LOG_BYTES as usize);
        fs::write(&log, line("first") + &filler + &line("last")).expect("written");
        assert_eq!(complaint(&log), "last");
        fs::write(&log, line("first") + &filler).expect("written");
        assert_eq!(complaint(&log), "it gave no reason");
        assert_eq!(complaint(&directory.path().join("none")), "it gave no reason");
    }

    #[test]
    fn records_are_whole() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let process = super::super::ProcessIdentity { pid: 7, start_time_ticks: 4711 };
        write_record(directory.path(), &Record { process, panic_log: "/scratch/panic.log".into() }).expect("written");
        let bytes = fs::read(directory.path().join(RECORD)).expect("read");
        let record: Record = serde_json::from_slice(&bytes).expect("a record");
        assert_eq!(record.process, process);
        assert_eq!(fs::read_dir(directory.path()).expect("listed").count(), 1);
    }
}
