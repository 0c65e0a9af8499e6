//! A whole sandbox on gVisor: network, disk, cgroup and engine put together.
//!
//! ```text
//! create:   network ┐
//!           disk    ┴─▶ engine (joins the cgroup, enters the network, writes to the disk)
//! destroy:  engine ─▶ network ┐
//!                     disk    ┴─▶ nothing is left
//! ```

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use belljar_core::id::SandboxId;
use belljar_core::lifecycle::EndReason;
use tokio::net::TcpStream;
use tracing::{error, info, warn};

use crate::cgroup::{CgroupTree, Hierarchy};
use crate::disk::ScratchDisks;
use crate::gvisor::{self, ExitReason, Gvisor, GvisorConfig, LaunchSpec, ReadOnlyMount};
use crate::instance_lock::InstanceLock;
use crate::network::{Egress, GATEWAY_ADDRESS, NetworkConfig, NetworkError, NetworkManager, SandboxNetwork};
use crate::runtime::{RunningSandbox, Runtime, RuntimeError, SandboxSpec};

/// Where the guest finds what is belljar's: its init, and what a template's `sudo` turns into.
const TOOLS_IN_GUEST: &str = "/.belljar";
const AGENT_IN_GUEST: &str = "/.belljar/agent";

/// How long the guest's network stack may take to answer; a closed port answers at once.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);

/// What must not outlive a reboot of the host is here, in a directory per instance.
const RUN_DIR: &str = "/run/belljar";

/// How often, after a first time, and after which pause a network is looked for that could not be looked at.
const ADOPT_RETRIES: usize = 3;
const ADOPT_PAUSE: Duration = Duration::from_millis(500);

/// The pause after a failed attempt to watch a sandbox: doubled each time, up to the longest.
const WATCH_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_WATCH_PAUSE: Duration = Duration::from_secs(30);

/// What the runtime is started with.
#[derive(Debug)]
pub struct GvisorSettings {
    pub runsc: PathBuf,
    /// Further flags for runsc.
    pub runsc_flags: Vec<String>,
    pub network: NetworkConfig,
    /// Holds the sandboxes' disks, and the agent that they run.
    pub state_dir: PathBuf,
    /// The agent's executable.
    pub agent: &'static [u8],
}

/// Sandboxes on gVisor.
#[derive(Debug)]
pub struct GvisorRuntime {
    lock: InstanceLock,
    network: NetworkManager,
    disks: ScratchDisks,
    engine: Gvisor,
    cgroups: CgroupTree,
    run_dir: PathBuf,
    /// The directory that every guest has as [`TOOLS_IN_GUEST`].
    tools: PathBuf,
    /// Whether the agent has to start `sudo`, since the engine would not do it as root.
    starts_sudo: bool,
}

impl GvisorRuntime {
    /// Sets up what all sandboxes share, or takes it over from a server before.
    ///
    /// # Errors
    /// Naming the step that failed.
    pub async fn start(settings: GvisorSettings) -> Result<Self, RuntimeError> {
        let instance = settings.network.instance.clone();
        let lock = InstanceLock::take(Path::new(RUN_DIR), instance.as_str())
            .map_err(RuntimeError::at("claim the instance's name"))?;
        let tools = install_tools(&settings.state_dir.join("engine"), settings.agent)
            .map_err(RuntimeError::at("install the agent"))?;
        let hierarchy = Hierarchy::detect().map_err(RuntimeError::at("find the cgroups"))?;
        let cgroups = CgroupTree::open(hierarchy, Path::new(&format!("belljar-{instance}")))
            .map_err(RuntimeError::at("prepare the cgroups"))?;
        let run_dir = lock.directory().join("engine");
        let mut config = GvisorConfig::new(settings.runsc, &run_dir);
        config.extra_flags = settings.runsc_flags;
        let engine = Gvisor::new(config, cgroups.clone()).map_err(RuntimeError::at("prepare the engine"))?;
        let info = engine.probe().await.map_err(RuntimeError::at("ask the engine for its version"))?;
        info!(version = info.version, "runsc is ready");
        let starts_sudo = !info.honours_setuid();
        let network = NetworkManager::start(settings.network).await.map_err(RuntimeError::at("prepare the network"))?;
        let disks = ScratchDisks::new(settings.state_dir.join("disks"));
        Ok(Self { lock, network, disks, engine, cgroups, run_dir, tools, starts_sudo })
    }

    /// Takes back everything that [`Self::start`] set up on the host. For when no sandbox is left.
    ///
    /// # Errors
    /// Naming the step that failed.
    pub async fn uninstall(&self) -> Result<(), RuntimeError> {
        self.network.uninstall().await.map_err(RuntimeError::at("remove the host's side of the network"))?;
        self.cgroups.remove().map_err(RuntimeError::at("remove the cgroups"))?;
        fs::remove_dir(&self.run_dir)
            .and_then(|()| self.lock.remove_directory())
            .map_err(RuntimeError::at("remove the run directory"))
    }

    fn launch_spec(&self, spec: &SandboxSpec, scratch_dir: &Path, network: &SandboxNetwork) -> LaunchSpec {
        let mut init = vec![
            AGENT_IN_GUEST.into(),
            "--nameserver".into(),
            GATEWAY_ADDRESS.to_string(),
            "--processes".into(),
            spec.resources.processes.to_string(),
        ];
        init.extend(self.starts_sudo.then(|| "--sudo".to_owned()));
        LaunchSpec {
            id: spec.id.clone(),
            rootfs: spec.rootfs.clone(),
            scratch_dir: scratch_dir.to_owned(),
            inner_netns: network.inner_netns_path().to_owned(),
            hostname: spec.id.to_string(),
            resources: spec.resources,
            init,
            mounts: vec![ReadOnlyMount { source: self.tools.clone(), destination: TOOLS_IN_GUEST.into() }],
        }
    }
}

#[async_trait]
impl Runtime for GvisorRuntime {
    async fn create(&self, spec: &SandboxSpec) -> Result<Arc<dyn RunningSandbox>, RuntimeError> {
        let (network, disk) = tokio::join!(
            self.network.create(&spec.id, egress(spec)),
            self.disks.create(&spec.id, spec.resources.disk_mib)
        );
        let network = network.map_err(RuntimeError::at("make the sandbox's network"))?;
        let disk = disk.map_err(RuntimeError::at("make the sandbox's disk"))?;
        let launch = self.launch_spec(spec, disk.mount_point(), &network);
        let engine = self.engine.launch(&launch).await.map_err(RuntimeError::at("start the sandbox"))?;
        Ok(Arc::new(GvisorSandbox { network, engine }))
    }

    async fn adopt(&self, spec: &SandboxSpec) -> Result<Option<Arc<dyn RunningSandbox>>, RuntimeError> {
        let Some(engine) = self.engine.adopt(&spec.id).map_err(RuntimeError::at("find the sandbox's engine"))? else {
            return Ok(None);
        };
        if self.disks.adopt(&spec.id).map_err(RuntimeError::at("find the sandbox's disk"))?.is_none() {
            error!(sandbox_id = %spec.id, "the sandbox's disk is not mounted: the sandbox is lost");
            return Ok(None);
        }
        match retried(|| self.network.adopt(&spec.id, egress(spec))).await {
            Ok(network) => Ok(Some(Arc::new(GvisorSandbox { network, engine }))),
            Err(failure @ NetworkError::Incomplete { .. }) => {
                // It runs, but nobody can reach it ever again.
                let failure = &failure as &dyn std::error::Error;
                error!(sandbox_id = %spec.id, error = failure, "the sandbox's network is gone: the sandbox is lost");
                Ok(None)
            }
            Err(failure) => Err(RuntimeError::at("find the sandbox's network")(failure)),
        }
    }

    async fn destroy(&self, id: &SandboxId) -> Result<(), RuntimeError> {
        // What uses the network and the disk goes first; then one failure must not keep the other from being freed.
        self.engine.destroy(id).await.map_err(RuntimeError::at("end the sandbox"))?;
        let (network, disk) = tokio::join!(self.network.destroy(id), self.disks.destroy(id));
        network.map_err(RuntimeError::at("remove the sandbox's network"))?;
        disk.map_err(RuntimeError::at("remove the sandbox's disk"))
    }

    async fn owned(&self) -> Result<BTreeSet<SandboxId>, RuntimeError> {
        let mut ids = self.engine.list_owned().map_err(RuntimeError::at("list the engine's sandboxes"))?;
        ids.extend(self.disks.list().map_err(RuntimeError::at("list the disks"))?);
        ids.extend(self.network.list_owned().await.map_err(RuntimeError::at("list the networks"))?);
        Ok(ids)
    }

    async fn reconcile(&self) -> Result<(), RuntimeError> {
        self.network.reconcile().await.map_err(RuntimeError::at("put the network right"))
    }
}

#[derive(Debug)]
struct GvisorSandbox {
    network: SandboxNetwork,
    engine: gvisor::RunningSandbox,
}

#[async_trait]
impl RunningSandbox for GvisorSandbox {
    async fn connect(&self, port: u16) -> io::Result<TcpStream> {
        self.network.connect(port, CONNECT_LIMIT).await
    }

    async fn exited(&self) -> EndReason {
        let id = self.engine.id();
        match watched(id, || self.engine.exited()).await {
            ExitReason::OutOfMemory => EndReason::OutOfMemory,
            ExitReason::OutOfProcesses => EndReason::OutOfProcesses,
            // What the sandbox said last is for the guest to choose: `?` escapes what could forge a line of our log.
            ExitReason::EngineFailure { message } => {
                let console = self.engine.end_of_console();
                warn!(sandbox_id = %id, cause = ?message, ?console, "the sandbox's engine broke");
                EndReason::EngineFailed
            }
            ExitReason::Ended => {
                warn!(sandbox_id = %id, console = ?self.engine.end_of_console(), "the sandbox ended by itself");
                EndReason::Exited
            }
        }
    }
}

/// Tries again what failed, unless it is certain that the network is incomplete: other failures may pass.
async fn retried<T, Attempt>(mut attempt: impl FnMut() -> Attempt) -> Result<T, NetworkError>
where
    Attempt: Future<Output = Result<T, NetworkError>>,
{
    for _ in 0..ADOPT_RETRIES {
        match attempt().await {
            Err(failure) if !matches!(failure, NetworkError::Incomplete { .. }) => {
                warn!(error = &failure as &dyn std::error::Error, "a sandbox's network can't be looked at yet");
                tokio::time::sleep(ADOPT_PAUSE).await;
            }
            result => return result,
        }
    }
    attempt().await
}

/// Waits for the end. That it can't be waited for is a trouble of the server, and not the sandbox's end.
async fn watched<Attempt>(id: &SandboxId, mut attempt: impl FnMut() -> Attempt) -> ExitReason
where
    Attempt: Future<Output = io::Result<ExitReason>>,
{
    let mut pause = WATCH_PAUSE;
    loop {
        match attempt().await {
            Ok(reason) => return reason,
            Err(failure) if pause == WATCH_PAUSE => {
                let failure = &failure as &dyn std::error::Error;
                error!(sandbox_id = %id, error = failure, "the sandbox can't be watched; trying again");
            }
            Err(_) => {}
        }
        tokio::time::sleep(pause).await;
        pause = (2 * pause).min(LONGEST_WATCH_PAUSE);
    }
}

fn egress(spec: &SandboxSpec) -> Egress {
    if spec.internet { Egress::Internet } else { Egress::Nothing }
}

/// Writes the agent where sandboxes can map it, in a directory for them to mount: once under its own name, and as
/// `sudo`, which it is when called so. One directory costs a sandbox no more than one file. Its name is its content, so
/// that a newer server leaves alone what running sandboxes have mapped.
fn install_tools(directory: &Path, agent: &[u8]) -> io::Result<PathBuf> {
    if agent.is_empty() {
        return Err(io::Error::other("this belljar was built without it; build with `make build`"));
    }
    let tools = directory.join(format!("guest-{}", digest(agent)));
    fs::create_dir_all(&tools)?;
    match symlink("agent", tools.join("sudo")) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    let path = tools.join("agent");
    if fs::read(&path).is_ok_and(|present| present == agent) {
        return Ok(tools);
    }
    let partial = path.with_extension("partial");
    let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o755).open(&partial)?;
    file.write_all(agent)?;
    file.sync_all()?;
    fs::rename(&partial, &path)?;
    Ok(tools)
}

fn digest(bytes: &[u8]) -> String {
    use sha2::{Digest, Sha256};
    Sha256::digest(bytes).iter().take(8).map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;
    use tokio::time::Instant;

    #[tokio::test(start_paused = true)]
    async fn a_failed_watch_is_not_the_end() {
        let (id, mut attempts) = (SandboxId::generate(), 0);
        let started = Instant::now();
        let reason = watched(&id, || {
            attempts += 1;
            let result = if attempts <= 7 { Err(io::Error::other("too many files")) } else { Ok(ExitReason::Ended) };
            async { result }
        });
        assert_eq!(reason.await, ExitReason::Ended);
        assert_eq!(started.elapsed().as_secs(), 1 + 2 + 4 + 8 + 16 + 30 + 30);
    }

    #[tokio::test(start_paused = true)]
    async fn only_an_incomplete_network_is_given_up_at_once() {
        let incomplete = || NetworkError::Incomplete { sandbox: SandboxId::generate(), missing: "all" };
        for (failure, expected) in [(incomplete as fn() -> NetworkError, 1), (|| NetworkError::WorkerGone, 4)] {
            let mut attempts = 0;
            let result: Result<(), _> = retried(|| {
                attempts += 1;
                async { Err(failure()) }
            })
            .await;
            assert!(result.is_err());
            assert_eq!(attempts, expected);
        }
        let mut attempts = 0;
        let result = retried(|| {
            attempts += 1;
            let result = if attempts < 4 { Err(NetworkError::WorkerGone) } else { Ok(attempts) };
            async { result }
        });
        assert!(matches!(result.await, Ok(4)));
    }

    #[test]
    fn the_agent_is_installed_once_and_mended_if_damaged() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let tools = install_tools(directory.path(), b"an agent").expect("it can be written");
        let path = tools.join("agent");
        assert_eq!(fs::metadata(&path).expect("it is there").permissions().mode() & 0o777, 0o755);
        fs::write(&path, b"an ag").expect("it can be damaged");
        assert_eq!(install_tools(directory.path(), b"an agent").expect("it can be mended"), tools);
        assert_eq!(fs::read(&path).expect("it is there"), b"an agent");
        assert_eq!(fs::read(tools.join("sudo")).expect("it is there"), b"an agent");
        assert_ne!(install_tools(directory.path(), b"a newer agent").expect("it can be written"), tools);
    }

    #[test]
    fn a_build_without_an_agent_is_refused() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        assert!(install_tools(directory.path(), b"").is_err());
    }
}
