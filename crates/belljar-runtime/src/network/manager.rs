//! The networks of one server: what it has made, what it finds again, and what it owes the host.

use std::collections::HashMap;
use std::fs::DirBuilder;
use std::net::SocketAddr;
use std::os::unix::fs::DirBuilderExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use belljar_core::id::SandboxId;
use tokio::sync::{Mutex as AsyncMutex, OwnedMutexGuard, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::config::{Egress, NetworkConfig, parse_resolv_conf};
use super::dns::{DNS_PORT, Forwarder};
use super::error::NetworkError;
use super::host::{self, HostState};
use super::namespace::{Namespace, NamespaceWorkers};
use super::nft::Nft;
use super::ruleset::Ruleset;
use super::sandbox::SandboxNetwork;
use super::slot::{GATEWAY_ADDRESS, Slot, interface_prefix};
use super::slots::Slots;
use super::topology::{self, BuildError, Plan};
use super::{forwarding, rules};

pub(super) const INNER_SUFFIX: &str = "inner";
pub(super) const ROUTER_SUFFIX: &str = "router";

const RESOLV_CONF: &str = "/etc/resolv.conf";

/// Builders mostly wait for the kernel's network lock; more of them than this only wait for each other.
const BUILDER_THREADS: usize = 4;

/// Slots that turn out to be another instance's before a create gives up. Each try jumps to a random place in the pool.
const SLOT_ATTEMPTS_MAX: usize = 16;

/// How long a destroy waits for the name service's sockets to close. They hold the namespace, not the interfaces.
const SERVICE_STOP_TIMEOUT: Duration = Duration::from_secs(1);

/// What a sandbox's network is made of, beyond what the kernel keeps.
#[derive(Debug)]
struct Attachment {
    slot: Slot,
    /// Held by whatever builds or removes, on the worker thread: a destroy waits for a create whose caller has gone.
    busy: Arc<AsyncMutex<()>>,
    stop: CancellationToken,
    services: TaskTracker,
}

impl Attachment {
    /// One that nobody serves: just being made, or found after a restart.
    fn unserved(slot: Slot) -> Self {
        let stop = CancellationToken::new();
        stop.cancel();
        Self { slot, busy: Arc::default(), stop, services: closed_tracker() }
    }
}

/// What a create begins with.
#[derive(Debug)]
struct Reservation {
    slot: Slot,
    mtu: u32,
    busy: OwnedMutexGuard<()>,
}

#[derive(Debug)]
struct State {
    slots: Slots,
    attachments: HashMap<SandboxId, Attachment>,
    mtu: u32,
}

/// Makes, finds and removes sandboxes' networks.
///
/// Operations on one sandbox are for its owner to put in order; those on different sandboxes run side by side.
/// One process at a time manages an instance.
#[derive(Debug)]
pub struct NetworkManager {
    config: Arc<NetworkConfig>,
    nft: Nft,
    internet_rules: Arc<Ruleset>,
    closed_rules: Arc<Ruleset>,
    home: Arc<Namespace>,
    builders: NamespaceWorkers,
    /// Separate, so that connections to sandboxes never queue behind the making of others.
    sockets: Arc<NamespaceWorkers>,
    upstreams: watch::Sender<Vec<SocketAddr>>,
    state: Mutex<State>,
}

impl NetworkManager {
    /// Sets up the host's side, or takes it over from a server before; the calling thread's network namespace is "the
    /// host". Removes uplinks that a killed server had not got as far as to label; finds the rest again.
    pub async fn start(config: NetworkConfig) -> Result<Self, NetworkError> {
        config.validate()?;
        let nft = Nft::find().ok_or_else(|| NetworkError::PacketFilterTool {
            step: "set up the packet filter",
            source: std::io::Error::new(std::io::ErrorKind::NotFound, "nft is not installed"),
        })?;
        DirBuilder::new().recursive(true).mode(0o700).create(&config.netns_dir).map_err(|source| {
            NetworkError::File { step: "create the directory", path: config.netns_dir.clone(), source }
        })?;
        let config = Arc::new(config);
        let home = Arc::new(Namespace::current()?);
        let builders = NamespaceWorkers::start("network", BUILDER_THREADS, &home)?;
        let sockets = Arc::new(NamespaceWorkers::start("sockets", 1, &home)?);

        let internet_rules = Self::compile(&config, Egress::Internet, &nft, &home, &builders).await?;
        let closed_rules = Self::compile(&config, Egress::Nothing, &nft, &home, &builders).await?;
        let host = Self::apply_host_side(&config, &nft, &home, &builders).await?;
        let prefix = interface_prefix(&config.instance);
        let labelled = builders
            .run(&home, {
                let prefix = prefix.clone();
                move || host::labelled_uplinks(&prefix)
            })
            .await?;
        let mut slots = Slots::new(&prefix, config.uplink_pool);
        let mut attachments = HashMap::new();
        for (interface, sandbox) in labelled {
            match slots.take_by_name(&interface) {
                Some(slot) => drop(attachments.insert(sandbox, Attachment::unserved(slot))),
                None => tracing::warn!(interface, %sandbox, "this uplink is not in the configured pool"),
            }
        }
        let (upstreams, _) = watch::channel(upstreams(&config));
        let state = Mutex::new(State { slots, attachments, mtu: host.mtu });
        Ok(Self { config, nft, internet_rules, closed_rules, home, builders, sockets, upstreams, state })
    }

    /// Puts the host's side in order again: packet filter, forwarding, resolvers, MTU of networks made from here on.
    /// For calling every so often; does nothing that can be noticed if all is well.
    pub async fn reconcile(&self) -> Result<(), NetworkError> {
        let host = Self::apply_host_side(&self.config, &self.nft, &self.home, &self.builders).await?;
        self.state().mtu = host.mtu;
        let upstreams = upstreams(&self.config);
        self.upstreams.send_if_modified(|current| {
            let changed = *current != upstreams;
            *current = upstreams;
            changed
        });
        Ok(())
    }

    /// Makes a network for a sandbox that has none. A create that fails removes what it made.
    ///
    /// One that is cancelled leaves it for [`destroy`](Self::destroy).
    pub async fn create(&self, sandbox: &SandboxId, egress: Egress) -> Result<SandboxNetwork, NetworkError> {
        for _ in 0..SLOT_ATTEMPTS_MAX {
            let Reservation { slot, mtu, busy } = self.reserve(sandbox)?;
            let plan = self.plan(sandbox, egress);
            let built = self
                .builders
                .run(&self.home, {
                    let slot = slot.clone();
                    move || {
                        let built = build_or_clean_up(&plan, &slot, mtu);
                        drop(busy);
                        Ok(built)
                    }
                })
                .await?;
            match built {
                Ok(router) => match self.serve(sandbox, router, egress).await {
                    Ok(network) => return Ok(network),
                    Err(error) => {
                        if let Err(leftover) = self.destroy(sandbox).await {
                            tracing::warn!(%sandbox, error = %leftover, "a failed network could not be removed");
                        }
                        return Err(error);
                    }
                },
                Err(BuildError::SlotTaken) => {
                    tracing::info!(%sandbox, interface = slot.interface, "uplink slot is taken, trying another");
                    let mut state = self.state();
                    state.attachments.remove(sandbox);
                    // Kept: whoever has it keeps it for longer than this create takes.
                    state.slots.jump();
                }
                Err(BuildError::Failed(error)) => {
                    self.forget(sandbox);
                    return Err(error);
                }
            }
        }
        Err(self.exhausted())
    }

    /// Takes over a network that a server before this one made.
    pub async fn adopt(&self, sandbox: &SandboxId, egress: Egress) -> Result<SandboxNetwork, NetworkError> {
        let (slot, services) = {
            let state = self.state();
            let attachment = state.attachments.get(sandbox).ok_or_else(|| NetworkError::Incomplete {
                sandbox: sandbox.clone(),
                missing: "its uplink on the host is gone",
            })?;
            if !attachment.stop.is_cancelled() {
                return Err(NetworkError::AlreadyExists { sandbox: sandbox.clone() });
            }
            (attachment.slot.clone(), attachment.services.clone())
        };
        // A SandboxNetwork that was dropped a moment ago may not have closed its sockets yet.
        services.wait().await;
        let plan = self.plan(sandbox, egress);
        let router = self.builders.run(&self.home, move || topology::adopt(&plan, &slot)).await?;
        self.serve(sandbox, router, egress).await
    }

    /// Every sandbox that has anything here, complete or not.
    pub async fn list_owned(&self) -> Result<Vec<SandboxId>, NetworkError> {
        let config = Arc::clone(&self.config);
        self.builders.run(&self.home, move || host::owners(&config)).await
    }

    /// Removes whatever a sandbox has here. To destroy what is not there is no error.
    pub async fn destroy(&self, sandbox: &SandboxId) -> Result<(), NetworkError> {
        let known = {
            let state = self.state();
            state.attachments.get(sandbox).map(|attachment| {
                attachment.stop.cancel();
                (attachment.services.clone(), Arc::clone(&attachment.busy))
            })
        };
        let mut busy = None;
        if let Some((services, lock)) = known {
            if tokio::time::timeout(SERVICE_STOP_TIMEOUT, services.wait()).await.is_err() {
                tracing::warn!(%sandbox, "the name service did not stop in time");
            }
            busy = Some(lock.lock_owned().await);
        }
        let plan = self.plan(sandbox, Egress::Nothing);
        self.builders
            .run(&self.home, move || {
                let demolished = topology::demolish(&plan);
                drop(busy);
                demolished
            })
            .await?;
        self.forget(sandbox);
        Ok(())
    }

    /// Destroys every network of the instance and takes the host's side back: the host is as it was found, and this
    /// manager of no more use.
    pub async fn uninstall(&self) -> Result<(), NetworkError> {
        for sandbox in self.list_owned().await? {
            self.destroy(&sandbox).await?;
        }
        let (config, nft) = (Arc::clone(&self.config), self.nft.clone());
        self.builders
            .run(&self.home, move || {
                nft.load("remove the packet filter", &rules::delete_table(&rules::host_table(&config.instance)))?
                    .finish()?;
                forwarding::switch_off(&nft)?;
                std::fs::remove_dir(&config.netns_dir).map_err(|source| NetworkError::File {
                    step: "remove the directory",
                    path: config.netns_dir.clone(),
                    source,
                })
            })
            .await
    }

    async fn compile(
        config: &NetworkConfig,
        egress: Egress,
        nft: &Nft,
        home: &Arc<Namespace>,
        builders: &NamespaceWorkers,
    ) -> Result<Arc<Ruleset>, NetworkError> {
        let (nft, text) = (nft.clone(), rules::router_rules(config, egress));
        builders.run(home, move || Ruleset::compile(&nft, rules::ROUTER_TABLE, text)).await.map(Arc::new)
    }

    async fn apply_host_side(
        config: &Arc<NetworkConfig>,
        nft: &Nft,
        home: &Arc<Namespace>,
        builders: &NamespaceWorkers,
    ) -> Result<HostState, NetworkError> {
        let (config, nft) = (Arc::clone(config), nft.clone());
        builders.run(home, move || host::apply(&config, &nft)).await
    }

    /// Gives the sandbox a slot before anything is made of it, so that a destroy finds it whatever happens.
    fn reserve(&self, sandbox: &SandboxId) -> Result<Reservation, NetworkError> {
        let mut state = self.state();
        if state.attachments.contains_key(sandbox) {
            return Err(NetworkError::AlreadyExists { sandbox: sandbox.clone() });
        }
        let slot = state.slots.take().ok_or_else(|| self.exhausted())?;
        let attachment = Attachment::unserved(slot.clone());
        let busy = Arc::clone(&attachment.busy).try_lock_owned().expect("nobody else knows this lock yet");
        state.attachments.insert(sandbox.clone(), attachment);
        Ok(Reservation { slot, mtu: state.mtu, busy })
    }

    fn forget(&self, sandbox: &SandboxId) {
        let mut state = self.state();
        if let Some(attachment) = state.attachments.remove(sandbox) {
            state.slots.give_back(&attachment.slot);
        }
    }

    /// Starts the name service of a network that stands.
    async fn serve(
        &self,
        sandbox: &SandboxId,
        router: Namespace,
        egress: Egress,
    ) -> Result<SandboxNetwork, NetworkError> {
        let stop = CancellationToken::new();
        let services = closed_tracker();
        let uplink_interface = {
            let mut state = self.state();
            let attachment = state.attachments.get_mut(sandbox).ok_or_else(|| NetworkError::Incomplete {
                sandbox: sandbox.clone(),
                missing: "it was destroyed while it was made",
            })?;
            attachment.stop = stop.clone();
            attachment.services = services.clone();
            attachment.slot.interface.clone()
        };
        let network = SandboxNetwork {
            sandbox: sandbox.clone(),
            inner_path: self.inner_path(sandbox),
            uplink_interface,
            router: Arc::new(router),
            sockets: Arc::clone(&self.sockets),
            _stop_on_drop: stop.clone().drop_guard(),
            stop: stop.clone(),
        };
        if egress == Egress::Nothing {
            return Ok(network);
        }
        let failed = |source| NetworkError::Socket { step: "open a sandbox's name service", source };
        let address = SocketAddr::from((GATEWAY_ADDRESS, DNS_PORT));
        let udp = network.bind_udp(address).await.map_err(failed)?;
        let tcp = network.bind_tcp_listener(address).await.map_err(failed)?;
        let forwarder = Forwarder::new(self.upstreams.subscribe(), self.config.dns_concurrency);
        services.spawn(forwarder.serve(udp, tcp, stop));
        Ok(network)
    }

    /// What to build, or to look for. The egress says nothing to a demolition.
    fn plan(&self, sandbox: &SandboxId, egress: Egress) -> Plan {
        let rules = match egress {
            Egress::Internet => &self.internet_rules,
            Egress::Nothing => &self.closed_rules,
        };
        Plan {
            sandbox: sandbox.clone(),
            inner_path: self.inner_path(sandbox),
            router_path: self.path(sandbox, ROUTER_SUFFIX),
            home: Arc::clone(&self.home),
            nft: self.nft.clone(),
            rules: Arc::clone(rules),
        }
    }

    fn inner_path(&self, sandbox: &SandboxId) -> PathBuf {
        self.path(sandbox, INNER_SUFFIX)
    }

    fn path(&self, sandbox: &SandboxId, suffix: &str) -> PathBuf {
        self.config.netns_dir.join(format!("{sandbox}.{suffix}"))
    }

    fn exhausted(&self) -> NetworkError {
        let pool = self.config.uplink_pool;
        NetworkError::PoolExhausted { pool, slots: super::slot::slot_count(pool) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // No code that holds the lock can panic half way through a change.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// `wait` returns when its last task ends; on an open one it would wait for more.
fn closed_tracker() -> TaskTracker {
    let tracker = TaskTracker::new();
    tracker.close();
    tracker
}

/// On the worker thread itself, so that a create whose caller has gone still leaves all or nothing.
fn build_or_clean_up(plan: &Plan, slot: &Slot, mtu: u32) -> Result<Namespace, BuildError> {
    topology::build(plan, slot, mtu).inspect_err(|error| {
        // The namespace of that name is another's.
        if matches!(error, BuildError::Failed(NetworkError::AlreadyExists { .. })) {
            return;
        }
        if let Err(error) = plan.home.enter().and_then(|()| topology::demolish(plan)) {
            tracing::warn!(sandbox = %plan.sandbox, error = %error, "a failed network could not be removed");
        }
    })
}

/// The configured resolvers, or else the host's.
pub(super) fn upstreams(config: &NetworkConfig) -> Vec<SocketAddr> {
    if !config.dns_upstreams.is_empty() {
        return config.dns_upstreams.clone();
    }
    match std::fs::read_to_string(RESOLV_CONF) {
        Ok(text) => parse_resolv_conf(&text),
        Err(error) => {
            tracing::warn!(error = %error, "cannot read {RESOLV_CONF}: sandboxes have no name service");
            Vec::new()
        }
    }
}
