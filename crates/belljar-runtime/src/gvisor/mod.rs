//! The gVisor engine: sandboxes are started, found again and ended by driving `runsc`.
//!
//! ```text
//! launch: cgroup with what the guest shall see ─▶ fork ─▶ join cgroup, network, own mounts ─▶ exec runsc run
//!         ─▶ runsc starts sentry and gofer, says the sentry's pid, ends ─▶ raise the cgroup to what the host allows
//!         ─▶ write sentry.json: from here on the sandbox runs
//! adopt:  sentry.json ─▶ the process of that id, in the sandbox's cgroup, started at that time
//! destroy: kill all in the cgroup ─▶ remove cgroup ─▶ remove directory
//! ```
//!
//! Nothing of a sandbox depends on the server: neither its processes, which have their own session, nor its output,
//! which goes to files on its own scratch disk. What a crash leaves at any moment has the sandbox's id in its name, as
//! a directory below the run directory or as a cgroup, and [`Gvisor::destroy`] removes it from any state.
//!
//! **The sentry is root without root's power**: it has the host's user id 0, but lives in a user namespace of its own
//! and has no capability outside of it, sees an empty directory for the host's files, and makes no system call that
//! runsc's filter does not allow.
//!
//! **The guest sees its limits** because runsc reads them from the cgroup when it starts: the number of CPUs, and the
//! memory. Right after, the cgroup is widened: to all CPUs, with a quota of time instead, and by an overhead of memory,
//! which is for the sentry itself.

mod bundle;
mod ending;
mod launch;
mod log_tail;
mod probe;
mod process;
pub mod release;
mod sys;

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicUsize;
use std::time::Duration;

use belljar_core::id::{ID_LENGTH, SandboxId};
use belljar_core::limits::Resources;
use serde::{Deserialize, Serialize};
use tokio::sync::OnceCell;

use crate::cgroup::{Cgroup, CgroupError, CgroupTree};
use process::{Process, ProcessError};

pub use ending::ExitReason;
pub use launch::LaunchError;
pub use probe::{EngineInfo, ProbeError};
pub use process::ProcessIdentity;

/// How sandboxes are run on this host.
#[derive(Debug, Clone)]
pub struct GvisorConfig {
    /// The program.
    pub runsc: PathBuf,
    /// Where the state of running sandboxes is kept. It should not survive a reboot: `/run/belljar/<instance>/engine`.
    pub run_dir: PathBuf,
    /// Memory for the sentry itself, on top of what the guest was promised.
    pub memory_overhead_mib: u32,
    /// How long a start may take.
    pub launch_limit: Duration,
    /// Further global flags for runsc, each as `--name=value`.
    pub extra_flags: Vec<String>,
}

impl GvisorConfig {
    #[must_use]
    pub fn new(runsc: impl Into<PathBuf>, run_dir: impl Into<PathBuf>) -> Self {
        Self {
            runsc: runsc.into(),
            run_dir: run_dir.into(),
            memory_overhead_mib: 128,
            launch_limit: Duration::from_secs(30),
            extra_flags: Vec::new(),
        }
    }
}

/// A sandbox to be started. Its disk is mounted and its network namespace is made; the gVisor engine makes the rest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LaunchSpec {
    pub id: SandboxId,
    /// The root filesystem, shared with other sandboxes. It is only read, with one exception: runsc makes the
    /// directories that `mounts` go to if they don't exist.
    pub rootfs: PathBuf,
    /// The mounted scratch disk, which takes all that the guest writes and all that the sentry logs.
    pub scratch_dir: PathBuf,
    /// The network namespace with the guest's interface. The sentry takes addresses and routes off it.
    pub inner_netns: PathBuf,
    pub hostname: String,
    pub resources: Resources,
    /// The guest's first process, with its arguments.
    pub init: Vec<String>,
    pub mounts: Vec<ReadOnlyMount>,
}

/// A file or directory of the host that the guest can read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReadOnlyMount {
    pub source: PathBuf,
    pub destination: PathBuf,
}

/// The engine. One per server and instance.
#[derive(Debug)]
pub struct Gvisor {
    config: GvisorConfig,
    cgroups: CgroupTree,
    /// Which CPU the next sandbox starts on.
    next_cpu: AtomicUsize,
    info: OnceCell<EngineInfo>,
}

/// A sandbox that runs, or ran when this was made. Dropping it leaves the sandbox as it is.
#[derive(Debug, Clone)]
pub struct RunningSandbox {
    id: SandboxId,
    process: Process,
    cgroup: Cgroup,
    panic_log: PathBuf,
}

/// What a launch leaves for a later server to find.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Record {
    process: ProcessIdentity,
    panic_log: PathBuf,
}

/// The engine could not find, list or remove sandboxes.
#[derive(Debug, thiserror::Error)]
pub enum GvisorError {
    #[error(
        "the run directory's path is too long for runsc's sockets: {} has more than {LONGEST_RUN_DIR} bytes",
        run_dir.display()
    )]
    RunDirTooLong { run_dir: PathBuf },
    #[error("could not {action} {}", path.display())]
    Io {
        action: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{} is damaged", path.display())]
    DamagedRecord {
        path: PathBuf,
        #[source]
        source: serde_json::Error,
    },
    #[error("could not look for the sandbox's processes")]
    Process(#[source] Box<dyn std::error::Error + Send + Sync>),
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
}

impl GvisorError {
    fn at(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { action, path, source }
    }
}

impl From<ProcessError> for GvisorError {
    fn from(error: ProcessError) -> Self {
        Self::Process(error.into())
    }
}

/// runsc puts its socket at `<run dir>/<id>/runsc-<id>.sock`. Socket paths have 107 bytes at most; where one is longer,
/// runsc silently takes another directory, which nobody would clean up.
const LONGEST_RUN_DIR: usize = 107 - "//runsc-.sock".len() - 2 * ID_LENGTH;

const RECORD: &str = "sentry.json";

/// In the same directory as the sentry's panic log.
const CONSOLE_LOG: &str = "console.log";
const LONGEST_END_OF_CONSOLE_BYTES: u64 = 2048;

impl Gvisor {
    /// Makes the run directory.
    ///
    /// # Errors
    /// If that fails, or its path is too long.
    pub fn new(config: GvisorConfig, cgroups: CgroupTree) -> Result<Self, GvisorError> {
        let run_dir = &config.run_dir;
        if run_dir.as_os_str().len() > LONGEST_RUN_DIR {
            return Err(GvisorError::RunDirTooLong { run_dir: run_dir.clone() });
        }
        make_private_directory(run_dir).map_err(GvisorError::at("create", run_dir))?;
        Ok(Self { config, cgroups, next_cpu: AtomicUsize::new(0), info: OnceCell::new() })
    }

    /// What the configured runsc is and can do. It is asked once.
    ///
    /// # Errors
    /// If it can't be run, or is too old.
    pub async fn probe(&self) -> Result<&EngineInfo, ProbeError> {
        self.info.get_or_try_init(|| EngineInfo::ask(&self.config.runsc)).await
    }

    /// Starts a sandbox, and returns when its init has been started.
    ///
    /// # Errors
    /// Naming the step. What was made until then stays, also if the returned future is dropped: [`Self::destroy`] it.
    pub async fn launch(&self, spec: &LaunchSpec) -> Result<RunningSandbox, LaunchError> {
        launch::launch(self, spec).await
    }

    /// A sandbox that another server process launched; none if it has ended, or never ran.
    ///
    /// # Errors
    /// If what is known of it can't be read.
    ///
    /// # Panics
    /// Outside of an async runtime.
    pub fn adopt(&self, id: &SandboxId) -> Result<Option<RunningSandbox>, GvisorError> {
        let path = self.directory(id).join(RECORD);
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(GvisorError::at("read", &path)(error)),
        };
        let record: Record =
            serde_json::from_slice(&bytes).map_err(|source| GvisorError::DamagedRecord { path, source })?;
        let cgroup = self.cgroups.cgroup(id);
        let process = Process::find(record.process.pid, &cgroup)?.filter(|found| found.identity == record.process);
        Ok(process.map(|process| RunningSandbox { id: id.clone(), process, cgroup, panic_log: record.panic_log }))
    }

    /// Ends a sandbox, in whatever state it is, and removes all that the engine made for it. Does nothing if there is
    /// none. The scratch disk and the network are not the engine's.
    ///
    /// # Errors
    /// If something can't be removed; a later call tries again.
    pub async fn destroy(&self, id: &SandboxId) -> Result<(), GvisorError> {
        let cgroup = self.cgroups.cgroup(id);
        cgroup.end_processes().await?;
        cgroup.remove().await?;
        let directory = self.directory(id);
        let removed = off_the_async_threads({
            let directory = directory.clone();
            move || fs::remove_dir_all(directory)
        });
        match removed.await {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(GvisorError::at("delete", &directory)(error)),
            _ => Ok(()),
        }
    }

    /// Every sandbox of which the engine has anything, running, half-made or half-removed.
    ///
    /// # Errors
    /// If it can't be listed.
    pub fn list_owned(&self) -> Result<BTreeSet<SandboxId>, GvisorError> {
        let run_dir = &self.config.run_dir;
        let mut ids = self.cgroups.list()?;
        for entry in fs::read_dir(run_dir).map_err(GvisorError::at("list", run_dir))? {
            let entry = entry.map_err(GvisorError::at("list", run_dir))?;
            ids.extend(entry.file_name().to_str().and_then(|name| name.parse::<SandboxId>().ok()));
        }
        Ok(ids)
    }

    fn directory(&self, id: &SandboxId) -> PathBuf {
        self.config.run_dir.join(id.as_str())
    }
}

impl RunningSandbox {
    #[must_use]
    pub fn id(&self) -> &SandboxId {
        &self.id
    }

    /// The sentry: the host process that is the sandbox's kernel.
    #[must_use]
    pub fn sentry(&self) -> ProcessIdentity {
        self.process.identity
    }

    /// Returns once the sandbox has ended by itself, with why. Whatever it held is still there, for
    /// [`Gvisor::destroy`].
    ///
    /// # Errors
    /// If it can't be waited for.
    pub async fn exited(&self) -> io::Result<ExitReason> {
        self.process.ended().await?;
        Ok(ending::reason(self.cgroup.usage().ok(), &self.panic_log))
    }

    /// The last of what its first process wrote; empty if there is nothing. The guest can write anything there.
    #[must_use]
    pub fn end_of_console(&self) -> String {
        let console = self.panic_log.with_file_name(CONSOLE_LOG);
        log_tail::read(&console, LONGEST_END_OF_CONSOLE_BYTES).unwrap_or_default()
    }
}

/// For work on files that may take its time.
async fn off_the_async_threads<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            // Only the end of the async runtime cancels it, and then nobody waits for this any more.
            Err(_) => std::future::pending().await,
        },
    }
}

/// For root alone: what is inside names the sandboxes and holds their control sockets.
fn make_private_directory(path: &Path) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path)
}
