//! A whole sandbox on gVisor: network, disk, cgroup and engine put together.
//!
//! ```text
//! create:   network ┐
//!           disk    ┴─▶ engine (joins the cgroup, enters the network, writes to the disk)
//! destroy:  engine ─▶ network ┐
//!                     disk    ┴─▶ nothing is left
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
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
use crate::network::{GATEWAY_ADDRESS, NetworkConfig, NetworkManager, SandboxNetwork};
use crate::runtime::{RunningSandbox, Runtime, RuntimeError, SandboxSpec};

/// Where the guest finds its init. No template needs to know of it.
const AGENT_IN_GUEST: &str = "/.belljar/agent";

/// How long the guest's network stack may take to answer; a closed port answers at once.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);

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
    network: NetworkManager,
    disks: ScratchDisks,
    engine: Gvisor,
    cgroups: CgroupTree,
    run_dir: PathBuf,
    agent: PathBuf,
}

impl GvisorRuntime {
    /// Sets up what all sandboxes share, or takes it over from a server before.
    ///
    /// # Errors
    /// Naming the step that failed.
    pub async fn start(settings: GvisorSettings) -> Result<Self, RuntimeError> {
        let instance = settings.network.instance.clone();
        let agent = install_agent(&settings.state_dir.join("engine"), settings.agent)
            .map_err(RuntimeError::at("install the agent"))?;
        let hierarchy = Hierarchy::detect().map_err(RuntimeError::at("find the cgroups"))?;
        let cgroups = CgroupTree::open(hierarchy, Path::new(&format!("belljar-{instance}")))
            .map_err(RuntimeError::at("prepare the cgroups"))?;
        // Not in the state directory: what is in it must not outlive a reboot of the host.
        let run_dir = Path::new("/run/belljar").join(instance.as_str()).join("engine");
        let mut config = GvisorConfig::new(settings.runsc, &run_dir);
        config.extra_flags = settings.runsc_flags;
        let engine = Gvisor::new(config, cgroups.clone()).map_err(RuntimeError::at("prepare the engine"))?;
        let info = engine.probe().await.map_err(RuntimeError::at("ask the engine for its version"))?;
        info!(version = info.version, "runsc is ready");
        let network = NetworkManager::start(settings.network).await.map_err(RuntimeError::at("prepare the network"))?;
        let disks = ScratchDisks::new(settings.state_dir.join("disks"));
        Ok(Self { network, disks, engine, cgroups, run_dir, agent })
    }

    /// Takes back everything that [`Self::start`] set up on the host. For when no sandbox is left.
    ///
    /// # Errors
    /// Naming the step that failed.
    pub async fn uninstall(&self) -> Result<(), RuntimeError> {
        self.network.uninstall().await.map_err(RuntimeError::at("remove the host's side of the network"))?;
        self.cgroups.remove().map_err(RuntimeError::at("remove the cgroups"))?;
        let parent = self.run_dir.parent().unwrap_or(&self.run_dir);
        fs::remove_dir(&self.run_dir)
            .and_then(|()| fs::remove_dir(parent))
            .map_err(RuntimeError::at("remove the run directory"))
    }

    fn launch_spec(&self, spec: &SandboxSpec, scratch_dir: &Path, network: &SandboxNetwork) -> LaunchSpec {
        LaunchSpec {
            id: spec.id.clone(),
            rootfs: spec.rootfs.clone(),
            scratch_dir: scratch_dir.to_owned(),
            inner_netns: network.inner_netns_path().to_owned(),
            hostname: spec.id.to_string(),
            resources: spec.resources,
            init: vec![
                AGENT_IN_GUEST.into(),
                "--nameserver".into(),
                GATEWAY_ADDRESS.to_string(),
                "--processes".into(),
                spec.resources.processes.to_string(),
            ],
            mounts: vec![ReadOnlyMount { source: self.agent.clone(), destination: AGENT_IN_GUEST.into() }],
            env: BTreeMap::new(),
            annotations: BTreeMap::new(),
        }
    }
}

#[async_trait]
impl Runtime for GvisorRuntime {
    async fn create(&self, spec: &SandboxSpec) -> Result<Arc<dyn RunningSandbox>, RuntimeError> {
        let (network, disk) =
            tokio::join!(self.network.create(&spec.id), self.disks.create(&spec.id, spec.resources.disk_mib));
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
        match self.network.adopt(&spec.id).await {
            Ok(network) => Ok(Some(Arc::new(GvisorSandbox { network, engine }))),
            Err(failure) => {
                // It runs, but nobody can reach it ever again.
                let failure = &failure as &dyn std::error::Error;
                error!(sandbox_id = %spec.id, error = failure, "the sandbox's network is lost, and the sandbox with it");
                Ok(None)
            }
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
        match self.engine.exited().await {
            Ok(ExitReason::OutOfMemory) => EndReason::OutOfMemory,
            Ok(ExitReason::OutOfProcesses) => EndReason::OutOfProcesses,
            Ok(ExitReason::EngineFailure { message }) => {
                warn!(sandbox_id = %self.engine.id(), message, "the sandbox's engine broke");
                EndReason::EngineFailed
            }
            Ok(ExitReason::Ended) => EndReason::Exited,
            Err(failure) => {
                let failure = &failure as &dyn std::error::Error;
                error!(sandbox_id = %self.engine.id(), error = failure, "the sandbox can't be watched any more");
                EndReason::EngineFailed
            }
        }
    }
}

/// Writes the agent where sandboxes can map it. Its name is its content, so that a newer server leaves the file that
/// running sandboxes have mapped alone.
fn install_agent(directory: &Path, agent: &[u8]) -> io::Result<PathBuf> {
    if agent.is_empty() {
        return Err(io::Error::other("this belljar was built without it; build with `make build`"));
    }
    fs::create_dir_all(directory)?;
    let path = directory.join(format!("belljar-agent-{}", digest(agent)));
    if fs::read(&path).is_ok_and(|present| present == agent) {
        return Ok(path);
    }
    let partial = path.with_extension("partial");
    let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o755).open(&partial)?;
    file.write_all(agent)?;
    file.sync_all()?;
    fs::rename(&partial, &path)?;
    Ok(path)
}

fn digest(bytes: &[u8]) -> String {
    use sha2::{Digest, Sha256};
    Sha256::digest(bytes).iter().take(8).map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn the_agent_is_installed_once_and_mended_if_damaged() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let path = install_agent(directory.path(), b"an agent").expect("it can be written");
        assert_eq!(fs::metadata(&path).expect("it is there").permissions().mode() & 0o777, 0o755);
        fs::write(&path, b"an ag").expect("it can be damaged");
        assert_eq!(install_agent(directory.path(), b"an agent").expect("it can be mended"), path);
        assert_eq!(fs::read(&path).expect("it is there"), b"an agent");
        assert_ne!(install_agent(directory.path(), b"a newer agent").expect("it can be written"), path);
    }

    #[test]
    fn a_build_without_an_agent_is_refused() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        assert!(install_agent(directory.path(), b"").is_err());
    }
}
