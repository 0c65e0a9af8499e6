//! `belljar up`: from nothing to a server, and from a signal to nothing. Read it from top to bottom.

use std::io::IsTerminal;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use belljar_core::admission;
use belljar_core::id::SandboxId;
use belljar_core::key::ApiKey;
use belljar_proxy::{Domains, Proxy};
use belljar_runtime::gvisor::release;
use belljar_runtime::{GvisorRuntime, GvisorSettings};
use belljar_store::Store;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Semaphore, mpsc};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::api::{self, Api, REQUESTS_UNDER_WAY};
use crate::cli::require_root;
use crate::config::{Config, LogFormat};
use crate::data_plane::RunningSandboxes;
use crate::lifecycle::{Manager, Settings};
use crate::serve::{Services, serve};
use crate::state_dir::StateDir;

/// The team that a new server starts with.
pub(crate) const FIRST_TEAM: &str = "default";

/// The longest a create may take; the slowest honest one, on a busy machine, takes a few seconds.
const CREATE_TIMEOUT: Duration = Duration::from_secs(60);

/// How long all sandboxes together may take to end, with `--kill-on-exit`.
const END_LIMIT: Duration = Duration::from_secs(60);

/// How long creates that had begun when the server was told to stop may go on after its last request.
const LAST_STARTS: Duration = Duration::from_secs(5);

/// Of the files that the process may have open, connections of clients take half, and the proxy's a quarter, two each;
/// the rest is for sandboxes, their names' resolution and the database.
const FILES_PER_CONNECTION: usize = 2;
const FILES_PER_PROXIED_REQUEST: usize = 8;

/// Runs the server until it is told to stop.
pub(crate) async fn up(config: Config) -> anyhow::Result<()> {
    start_logging(config.server.log_format);
    require_root("it makes network namespaces, mounts and cgroups for the sandboxes")?;
    let open_files = raise_open_files();

    let state = StateDir::open(&config.state_dir)?;
    let _lock = state.lock()?;
    let store = Store::open(&state.database()).await?;
    let listener = TcpListener::bind(config.server.listen)
        .await
        .with_context(|| format!("{} can't be listened on; choose another with --listen", config.server.listen))?;

    let runtime = Arc::new(GvisorRuntime::start(runtime_settings(&config).await?).await?);
    let (manager, unreachable) = Manager::new(store.clone(), runtime.clone(), lifecycle_settings(&config, &state)?);
    manager.recover(&state.boot_id()).await?;
    tokio::spawn(manager.clone().sweep_periodically());

    let services = services(&config, &store, &manager, open_files)?;
    tokio::spawn(cut_connections(unreachable, services.proxy.clone()));
    let stop = stop_on_signal(&manager)?;
    announce(&config, &store).await?;

    let drain_deadline = Duration::from_secs(config.server.drain_deadline_s);
    let connections = config.server.connections.min(open_files / FILES_PER_CONNECTION);
    serve(listener, services, connections, stop, drain_deadline).await;

    let ended = if config.server.kill_on_exit { end_everything(&manager, &runtime).await } else { Ok(()) };
    manager.finish_starts(LAST_STARTS).await;
    store.close().await;
    ended?;
    info!("stopped");
    Ok(())
}

/// For `--kill-on-exit`. What can't be ended in time is found by the next start.
async fn end_everything(manager: &Manager, runtime: &GvisorRuntime) -> anyhow::Result<()> {
    tokio::time::timeout(END_LIMIT, manager.end_all())
        .await
        .with_context(|| format!("not all sandboxes could be ended within {} s", END_LIMIT.as_secs()))?;
    runtime.uninstall().await.context("the host's side could not be taken back")
}

fn start_logging(format: LogFormat) {
    let filter = tracing_subscriber::EnvFilter::try_from_env("BELLJAR_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    let is_terminal = std::io::stderr().is_terminal();
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(is_terminal);
    match format {
        LogFormat::Text => builder.init(),
        LogFormat::Json => builder.json().init(),
    }
}

/// Each connection and each sandbox takes file descriptors; the soft limit of a shell is far too low.
/// Returns what there is then, by which the limits of connections are set.
fn raise_open_files() -> usize {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let raised =
        getrlimit(Resource::RLIMIT_NOFILE).and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(errno) = raised {
        warn!(%errno, "the limit of open files could not be raised");
    }
    let open_files = getrlimit(Resource::RLIMIT_NOFILE).map_or(1024, |(soft, _)| soft);
    usize::try_from(open_files).unwrap_or(usize::MAX)
}

async fn runtime_settings(config: &Config) -> anyhow::Result<GvisorSettings> {
    let configured = (!config.engine.runsc.as_os_str().is_empty()).then_some(config.engine.runsc.as_path());
    let mirror = config.template_build.mirror.parse().context("`template_build.mirror` can't be used")?;
    let runsc = release::ensure_runsc(&config.state_dir, configured, &mirror).await?;
    Ok(GvisorSettings {
        runsc,
        runsc_flags: config.engine.runsc_flags.clone(),
        network: config.network.for_runtime(&config.instance)?,
        state_dir: config.state_dir.clone(),
        agent: crate::agent_binary::AGENT,
    })
}

fn lifecycle_settings(config: &Config, state: &StateDir) -> anyhow::Result<Settings> {
    let cpus = std::thread::available_parallelism().context("the number of CPUs can't be found out")?.get();
    let memory_mib = match config.capacity.memory_mib {
        0 => belljar_runtime::host::memory_mib().context("the size of the memory can't be found out")?,
        set => set,
    };
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss)]
    let promised_mib = (memory_mib as f64 * config.capacity.memory_overcommit) as u64;
    Ok(Settings {
        capacity: admission::Capacity {
            memory_mib: promised_mib,
            sandboxes: config.capacity.sandboxes,
            sandboxes_per_team: config.capacity.sandboxes_per_team,
            vcpus: u32::try_from(cpus).unwrap_or(u32::MAX),
        },
        concurrent_starts: match config.capacity.concurrent_starts {
            0 => 2 * cpus,
            set => set,
        },
        create_timeout: CREATE_TIMEOUT,
        templates_dir: state.templates(),
    })
}

fn services(config: &Config, store: &Store, manager: &Manager, open_files: usize) -> anyhow::Result<Services> {
    let domain = config.public_domain();
    let domains = Domains::parse([domain.as_str()]).context("`server.domain` can't be used")?;
    let mut settings = belljar_proxy::Config::new(domains);
    settings.max_in_flight = settings.max_in_flight.min(open_files / FILES_PER_PROXIED_REQUEST);
    let proxy = Proxy::new(settings, Arc::new(RunningSandboxes(manager.clone())));
    let api = api::router(Api {
        store: store.clone(),
        manager: manager.clone(),
        limits: config.limits,
        domain: domain.as_str().into(),
        places: Arc::new(Semaphore::new(REQUESTS_UNDER_WAY)),
    });
    Ok(Services { api, proxy })
}

/// Cuts what is connected to sandboxes that have ended.
async fn cut_connections(mut unreachable: mpsc::Receiver<SandboxId>, proxy: Proxy) {
    while let Some(id) = unreachable.recv().await {
        proxy.disconnect(&id);
    }
}

/// Cancelled by the first SIGTERM or SIGINT. The second ends the process at once, as if it had crashed, which it is
/// made to survive.
fn stop_on_signal(manager: &Manager) -> anyhow::Result<CancellationToken> {
    let stop = CancellationToken::new();
    let (token, manager) = (stop.clone(), manager.clone());
    let mut terminate = signal(SignalKind::terminate()).context("SIGTERM can't be listened for")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("SIGINT can't be listened for")?;
    tokio::spawn(async move {
        for last in [false, true] {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            if last {
                warn!("stopped at once by a second signal");
                std::process::exit(130);
            }
            info!("stopping: requests under way may finish");
            manager.stop_accepting();
            token.cancel();
        }
    });
    Ok(stop)
}

/// A team, and a key if somebody is there to see it, where the database is new. Nobody sees what goes to a log, and a
/// log is no place for a secret.
async fn first_key(store: &Store) -> anyhow::Result<Option<ApiKey>> {
    if !store.teams().await?.is_empty() {
        return Ok(None);
    }
    let team = store.create_team(FIRST_TEAM).await?;
    if !std::io::stdout().is_terminal() {
        return Ok(None);
    }
    Ok(Some(store.create_key(&team.id, "first").await?.secret))
}

async fn announce(config: &Config, store: &Store) -> anyhow::Result<()> {
    let key = first_key(store).await?;
    let url = format!("http://{}", config.server.listen);
    println!("belljar {} is up.\n", env!("CARGO_PKG_VERSION"));
    println!("Point E2B's SDKs at it:\n");
    println!("  export E2B_API_URL={url}");
    println!("  export E2B_SANDBOX_URL={url}");
    match key {
        Some(key) => println!("  export E2B_API_KEY={}   # shown this once\n", key.reveal()),
        None => {
            let state_dir = config.state_dir.display();
            println!("  export E2B_API_KEY=…   # `belljar key create --state-dir {state_dir}` makes one\n");
        }
    }
    if store.templates().await?.is_empty() {
        println!("There is no template yet, so no sandbox can be made. Build one:\n");
        println!("  belljar template build base --state-dir {}\n", config.state_dir.display());
    }
    Ok(())
}
