//! The registry of sandboxes, and what may be asked of it.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use belljar_core::admission::{Capacity, Promised, Refusal};
use belljar_core::id::{SandboxId, TeamId};
use belljar_core::key::AccessToken;
use belljar_core::lifecycle::{EndReason, State};
use belljar_runtime::{RunningSandbox, Runtime, RuntimeError, SandboxSpec};
use belljar_store::{IdempotentInsert, SandboxRecord, Store, StoreError, TemplateRecord, now_ms};
use tokio::sync::{Semaphore, SemaphorePermit, mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{error, warn};

use super::agent::AgentError;
use super::driver::{Beginning, Command, Creation, Driver};

/// Commands that may wait for one sandbox's driver.
const COMMANDS_WAITING: usize = 16;

/// Ends that may wait to be acted on by the proxy, which takes microseconds for each.
const UNREACHABLE_WAITING: usize = 64;

/// How long a create waits for its turn to start.
const START_QUEUE_LIMIT: Duration = Duration::from_secs(30);

/// After a driver broke off, before another one clears up behind it.
const PAUSE_AFTER_PANIC: Duration = Duration::from_secs(1);

/// How the lifecycle is set up.
#[derive(Debug, Clone)]
pub(crate) struct Settings {
    pub(crate) capacity: Capacity,
    pub(crate) concurrent_starts: usize,
    pub(crate) create_timeout: Duration,
    pub(crate) templates_dir: PathBuf,
}

/// What can be seen of a sandbox from outside its driver.
#[derive(Debug, Clone)]
pub(crate) struct View {
    pub(crate) record: Arc<SandboxRecord>,
    /// None before it runs and once it is to end.
    pub(crate) sandbox: Option<Arc<dyn RunningSandbox>>,
}

/// There is no such sandbox, for this caller, any more or at all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the sandbox was not found")]
pub(crate) struct Gone;

/// A running sandbox could not be changed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ChangeError {
    #[error("the sandbox was not found")]
    Gone,
    #[error("the change could not be written down, so it was not made")]
    Store(#[from] StoreError),
}

impl From<Gone> for ChangeError {
    fn from(Gone: Gone) -> Self {
        Self::Gone
    }
}

/// A create that was asked for; everything in it has been checked.
#[derive(Debug)]
pub(crate) struct CreateRequest {
    pub(crate) team_id: TeamId,
    pub(crate) template: TemplateRecord,
    pub(crate) timeout: Duration,
    pub(crate) metadata: BTreeMap<String, String>,
    pub(crate) env: BTreeMap<String, String>,
    pub(crate) secure: bool,
    pub(crate) allow_internet_access: Option<bool>,
    pub(crate) idempotency: Option<Idempotency>,
}

/// A caller's word that two requests are the same one.
#[derive(Debug)]
pub(crate) struct Idempotency {
    pub(crate) key: String,
    pub(crate) request_hash: Vec<u8>,
}

/// Why a sandbox could not be created.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CreateError {
    #[error("there is no room for the sandbox")]
    Full(#[from] Refusal),
    #[error("the server is stopping")]
    Stopping,
    #[error("too many sandboxes are being started; none could begin within {} s", START_QUEUE_LIMIT.as_secs())]
    Busy,
    #[error("the sandbox was ended while it was being created: {0:?}")]
    Ended(EndReason),
    #[error("the idempotency key was used with another request")]
    IdempotencyMismatch,
    #[error("the request under this idempotency key was answered before, and its sandbox is gone")]
    IdempotentGone,
    #[error("the engine could not make the sandbox")]
    Runtime(#[source] RuntimeError),
    #[error("the sandbox's agent did not become ready")]
    Agent(#[source] AgentError),
    #[error("the sandbox stopped while it was being created: {0:?}")]
    Exited(EndReason),
    #[error("the sandbox was not ready within {} s", .0.as_secs())]
    TooSlow(Duration),
    #[error("the sandbox could not be written down")]
    Store(#[source] StoreError),
    #[error("the task that made the sandbox broke off")]
    Broken,
}

/// The registry's side of a driver.
#[derive(Debug)]
struct Handle {
    team_id: TeamId,
    memory_mib: u32,
    commands: mpsc::Sender<Command>,
    view: watch::Receiver<View>,
}

/// What the manager and its drivers have in common.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) store: Store,
    pub(super) runtime: Arc<dyn Runtime>,
    pub(super) settings: Settings,
    pub(super) starts: Semaphore,
    pub(super) stopping: CancellationToken,
    /// Told of every sandbox that nothing may be sent to any more.
    unreachable: mpsc::Sender<SandboxId>,
    registry: Mutex<HashMap<SandboxId, Handle>>,
    tasks: TaskTracker,
}

/// Creates, finds and ends sandboxes. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Manager {
    pub(super) shared: Arc<Shared>,
}

impl Manager {
    /// The receiver is told of each sandbox that becomes unreachable, so that connections to it can be cut: its end is
    /// not something that its own network stack still announces.
    pub(crate) fn new(
        store: Store,
        runtime: Arc<dyn Runtime>,
        settings: Settings,
    ) -> (Self, mpsc::Receiver<SandboxId>) {
        let starts = Semaphore::new(settings.concurrent_starts);
        let (unreachable, receiver) = mpsc::channel(UNREACHABLE_WAITING);
        let shared = Shared {
            store,
            runtime,
            settings,
            starts,
            stopping: CancellationToken::new(),
            unreachable,
            registry: Mutex::default(),
            tasks: TaskTracker::new(),
        };
        (Self { shared: Arc::new(shared) }, receiver)
    }

    /// Creates a sandbox and returns its record once it runs.
    ///
    /// The work goes on in a task of its own, so a caller that hangs up leaves no half-made sandbox: it runs until its
    /// deadline, as with E2B.
    pub(crate) async fn create(&self, request: CreateRequest) -> Result<Arc<SandboxRecord>, CreateError> {
        let shared = Arc::clone(&self.shared);
        let task = self.shared.tasks.spawn(async move { shared.create(request).await });
        task.await.unwrap_or(Err(CreateError::Broken))
    }

    /// The running sandbox of that id, if it is the team's.
    pub(crate) fn get(&self, id: &SandboxId, team_id: &TeamId) -> Result<Arc<SandboxRecord>, Gone> {
        let view = self.shared.view(id).ok_or(Gone)?;
        let visible = view.record.state.is_visible() && view.record.team_id == *team_id;
        if visible { Ok(view.record) } else { Err(Gone) }
    }

    /// All running sandboxes of a team, in no order.
    pub(crate) fn list(&self, team_id: &TeamId) -> Vec<Arc<SandboxRecord>> {
        let registry = self.shared.registry();
        registry
            .values()
            .filter(|handle| handle.team_id == *team_id)
            .map(|handle| handle.view.borrow())
            .filter(|view| view.record.state.is_visible())
            .map(|view| Arc::clone(&view.record))
            .collect()
    }

    /// Where a sandbox's traffic goes, whoever it belongs to; the proxy asks.
    pub(crate) fn view(&self, id: &SandboxId) -> Option<View> {
        self.shared.view(id)
    }

    /// Ends a running sandbox of the team.
    pub(crate) async fn kill(&self, id: &SandboxId, team_id: &TeamId) -> Result<(), Gone> {
        self.get(id, team_id)?;
        self.shared.command(id, |done| Command::End { reason: EndReason::Killed, done }).await.unwrap_or(Err(Gone))
    }

    /// Lets a running sandbox of the team end `timeout` from now; with `only_extend`, no sooner than it would have.
    pub(crate) async fn set_timeout(
        &self,
        id: &SandboxId,
        team_id: &TeamId,
        timeout: Duration,
        only_extend: bool,
    ) -> Result<Arc<SandboxRecord>, ChangeError> {
        self.get(id, team_id)?;
        let deadline_ms = deadline_after(timeout);
        let set = |done| Command::SetDeadline { deadline_ms, only_extend, done };
        self.shared.command(id, set).await.unwrap_or(Err(ChangeError::Gone))
    }

    /// Refuses creates from now on, those that wait for their turn too.
    pub(crate) fn stop_accepting(&self) {
        // Under the lock, so that no create passes the check after whoever stops has looked at what there is.
        let _registry = self.shared.registry();
        self.shared.stopping.cancel();
    }

    /// Waits for creates under way, so that none is interrupted that could have been finished.
    pub(crate) async fn finish_starts(&self, deadline: Duration) {
        let all = u32::try_from(self.shared.settings.concurrent_starts).unwrap_or(u32::MAX);
        if tokio::time::timeout(deadline, self.shared.starts.acquire_many(all)).await.is_err() {
            warn!("creates under way are cut off; the next start of the server removes what they began");
        }
    }

    /// Ends every sandbox; returns when all are gone. To be called after [`Self::stop_accepting`].
    pub(crate) async fn end_all(&self) {
        let ids: Vec<SandboxId> = self.shared.registry().keys().cloned().collect();
        let ends = ids.iter().map(|id| {
            let end = |done| Command::End { reason: EndReason::ServerStopped, done };
            self.shared.command(id, end)
        });
        futures::future::join_all(ends).await;
        self.shared.tasks.close();
        self.shared.tasks.wait().await;
    }
}

impl Shared {
    async fn create(self: Arc<Self>, request: CreateRequest) -> Result<Arc<SandboxRecord>, CreateError> {
        let idempotency = request.idempotency.as_ref().map(|given| (given.key.as_str(), given.request_hash.as_slice()));
        if let Some((key, hash)) = idempotency {
            // Before room is looked for: what was made once needs none.
            let earlier =
                self.store.idempotent_request(&request.team_id, key, hash).await.map_err(CreateError::Store)?;
            if let Some(earlier) = earlier {
                return self.repeat(earlier).await;
            }
        }
        let record = new_record(&request);
        let id = record.id.clone();
        // Promise first, write second: a full server must refuse without touching the disk.
        let driver = self.promise(record.clone())?;
        match self.store.insert_sandbox(&record, idempotency).await {
            Ok(IdempotentInsert::Inserted) => {}
            Ok(earlier @ (IdempotentInsert::Repeated(_) | IdempotentInsert::Mismatch)) => {
                self.forget(&id);
                return self.repeat(earlier).await;
            }
            Err(error) => {
                self.forget(&id);
                return Err(CreateError::Store(error));
            }
        }
        let (created, answer) = oneshot::channel();
        let TemplateRecord { user, workdir, .. } = request.template;
        self.start(driver, id, Beginning::Create(Creation { created, timeout: request.timeout, user, workdir }));
        answer.await.unwrap_or(Err(CreateError::Broken))
    }

    /// Answers a request that came before.
    async fn repeat(&self, earlier: IdempotentInsert) -> Result<Arc<SandboxRecord>, CreateError> {
        match earlier {
            IdempotentInsert::Repeated(first) => self.wait_until_running(&first).await,
            IdempotentInsert::Mismatch | IdempotentInsert::Inserted => Err(CreateError::IdempotencyMismatch),
        }
    }

    /// Runs a driver. If it breaks off, another one ends what it owned: a sandbox without a driver would never end.
    fn start(self: &Arc<Self>, driver: Driver, id: SandboxId, beginning: Beginning) {
        let shared = Arc::clone(self);
        let running = self.tasks.spawn(driver.run(beginning));
        self.tasks.spawn(async move {
            if running.await.is_ok() {
                return;
            }
            error!(sandbox_id = %id, "the sandbox's driver broke off; the sandbox is ended");
            tokio::time::sleep(PAUSE_AFTER_PANIC).await;
            match shared.store.sandbox(&id).await {
                Ok(Some(record)) if record.state.may_hold_resources() => {
                    shared.take_over(record, Beginning::End(EndReason::EngineFailed));
                }
                // Nobody knows it any more, so the next sweep removes what there is of it.
                _ => shared.forget(&id),
            }
        });
    }

    /// A turn to start a sandbox.
    pub(super) async fn turn_to_start(&self) -> Result<SemaphorePermit<'_>, CreateError> {
        let turn = tokio::time::timeout(START_QUEUE_LIMIT, self.starts.acquire());
        let turn = self.stopping.run_until_cancelled(turn).await.ok_or(CreateError::Stopping)?;
        turn.map_err(|_| CreateError::Busy).map(|turn| turn.expect("the semaphore is never closed"))
    }

    /// Enters a sandbox into the registry if there is room for it.
    fn promise(self: &Arc<Self>, record: SandboxRecord) -> Result<Driver, CreateError> {
        let mut registry = self.registry();
        if self.stopping.is_cancelled() {
            return Err(CreateError::Stopping);
        }
        let mut promised = Promised::default();
        for handle in registry.values() {
            promised.memory_mib += u64::from(handle.memory_mib);
            promised.sandboxes += 1;
            promised.sandboxes_of_team += u32::from(handle.team_id == record.team_id);
        }
        self.settings.capacity.admit(promised, record.resources)?;
        Ok(self.enter(&mut registry, record))
    }

    /// Enters a sandbox that exists already, room or no room, and starts its driver.
    pub(super) fn take_over(self: &Arc<Self>, record: SandboxRecord, beginning: Beginning) {
        let id = record.id.clone();
        let driver = self.enter(&mut self.registry(), record);
        self.start(driver, id, beginning);
    }

    fn enter(self: &Arc<Self>, registry: &mut HashMap<SandboxId, Handle>, record: SandboxRecord) -> Driver {
        let (commands, commands_rx) = mpsc::channel(COMMANDS_WAITING);
        let (view_tx, view) = watch::channel(View { record: Arc::new(record.clone()), sandbox: None });
        let handle =
            Handle { team_id: record.team_id.clone(), memory_mib: record.resources.memory_mib, commands, view };
        registry.insert(record.id.clone(), handle);
        Driver::new(Arc::clone(self), record, commands_rx, view_tx)
    }

    /// Takes a sandbox of which nothing is left out of the registry.
    pub(super) fn forget(&self, id: &SandboxId) {
        self.registry().remove(id);
    }

    /// Has connections to a sandbox cut. Nobody listens once the server stops, and then there is nothing to cut.
    pub(super) async fn cut_connections(&self, id: &SandboxId) {
        let _ = self.unreachable.send(id.clone()).await;
    }

    pub(super) fn knows(&self, id: &SandboxId) -> bool {
        self.registry().contains_key(id)
    }

    fn view(&self, id: &SandboxId) -> Option<View> {
        self.registry().get(id).map(|handle| handle.view.borrow().clone())
    }

    /// Asks a driver; none if there is none, or it ends without an answer.
    async fn command<Answer>(
        &self,
        id: &SandboxId,
        command: impl FnOnce(oneshot::Sender<Answer>) -> Command,
    ) -> Option<Answer> {
        let commands = self.registry().get(id)?.commands.clone();
        let (done, answer) = oneshot::channel();
        commands.send(command(done)).await.ok()?;
        answer.await.ok()
    }

    async fn wait_until_running(&self, id: &SandboxId) -> Result<Arc<SandboxRecord>, CreateError> {
        let mut view = self.registry().get(id).map(|handle| handle.view.clone()).ok_or(CreateError::IdempotentGone)?;
        let settled = view.wait_for(|view| view.record.state != State::Creating).await;
        let record = settled.map(|view| view.record.clone()).map_err(|_| CreateError::IdempotentGone)?;
        if record.state.is_visible() { Ok(record) } else { Err(CreateError::IdempotentGone) }
    }

    pub(super) fn spec_of(&self, record: &SandboxRecord) -> SandboxSpec {
        SandboxSpec {
            id: record.id.clone(),
            rootfs: self.settings.templates_dir.join(&record.build_id).join("rootfs"),
            resources: record.resources,
            internet: record.allow_internet_access != Some(false),
        }
    }

    fn registry(&self) -> MutexGuard<'_, HashMap<SandboxId, Handle>> {
        self.registry.lock().expect("nothing panics while it holds the registry")
    }
}

fn new_record(request: &CreateRequest) -> SandboxRecord {
    let mut env = request.template.env.clone();
    env.extend(request.env.clone());
    SandboxRecord {
        id: SandboxId::generate(),
        team_id: request.team_id.clone(),
        template_id: request.template.id.clone(),
        template_name: request.template.name.clone(),
        build_id: request.template.build_id.clone(),
        state: State::Creating,
        resources: request.template.resources,
        metadata: request.metadata.clone(),
        env,
        access_token: request.secure.then(AccessToken::generate),
        allow_internet_access: request.allow_internet_access,
        started_ms: now_ms(),
        deadline_ms: deadline_after(request.timeout),
    }
}

pub(super) fn deadline_after(timeout: Duration) -> i64 {
    now_ms().saturating_add(i64::try_from(timeout.as_millis()).unwrap_or(i64::MAX))
}
