//! Who may have a connection, and which ones are there already.
//!
//! A sandbox has one [`Lane`] per generation. The lane counts what is in flight, keeps the connections that wait for
//! their next request, and ends all of it at once when the sandbox is gone:
//!
//! ```text
//!  enter ──▶ Permit ──▶ take / open ──▶ request, answer ──▶ park ──▶ take …
//!              │                                             │
//!              └── dropped: one less in flight               └── swept after `idle_timeout`
//! ```

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use belljar_core::id::SandboxId;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;

use crate::connection::{Drivers, Http1Connection, Http2Connection};

/// All lanes.
#[derive(Debug)]
pub(crate) struct Pool {
    lanes: Mutex<HashMap<SandboxId, Arc<Lane>>>,
    idle: IdlePolicy,
    in_flight_slots: Arc<Semaphore>,
    /// Requests and tunnels.
    requests: TaskTracker,
    /// Connections; they may outlive the request they were made for.
    drivers: TaskTracker,
    stop: CancellationToken,
}

#[derive(Debug, Clone)]
struct IdlePolicy {
    slots: Arc<Semaphore>,
    timeout: Duration,
}

/// Why a request is not let in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Denied {
    /// The sandbox has all it may have in flight.
    SandboxFull {
        limit: usize,
    },
    /// The whole proxy has.
    ProxyFull,
    /// The sandbox was restored since it was looked up.
    Superseded,
    Draining,
}

/// The right to have one request, or one tunnel, in flight.
#[derive(Debug)]
pub(crate) struct Permit {
    lane: Arc<Lane>,
    _slot: OwnedSemaphorePermit,
    /// Lets a drain wait for this.
    _counted: TaskTrackerToken,
}

impl Permit {
    pub(crate) fn lane(&self) -> &Lane {
        &self.lane
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.lane.in_flight.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Pool {
    /// Must be called within a tokio runtime, on which idle connections are swept.
    pub(crate) fn new(max_in_flight: usize, max_idle: usize, idle_timeout: Duration) -> Arc<Self> {
        let pool = Arc::new(Self {
            lanes: Mutex::default(),
            idle: IdlePolicy { slots: Arc::new(Semaphore::new(max_idle)), timeout: idle_timeout },
            in_flight_slots: Arc::new(Semaphore::new(max_in_flight)),
            requests: TaskTracker::new(),
            drivers: TaskTracker::new(),
            stop: CancellationToken::new(),
        });
        let sweeper = sweep_regularly(Arc::downgrade(&pool), pool.stop.clone(), idle_timeout);
        pool.drivers.spawn(sweeper);
        pool
    }

    /// Lets one request in. The first to come with a newer generation ends whatever the older ones have.
    pub(crate) fn enter(&self, id: &SandboxId, generation: u64, limit: usize) -> Result<Permit, Denied> {
        // Counted before the question whether a drain has begun, so that the drain can't miss it.
        let counted = self.requests.token();
        if self.requests.is_closed() {
            return Err(Denied::Draining);
        }
        let slot = Arc::clone(&self.in_flight_slots).try_acquire_owned().map_err(|_| Denied::ProxyFull)?;
        let mut lanes = lock(&self.lanes);
        let lane = match lanes.get(id) {
            Some(lane) if lane.generation > generation => return Err(Denied::Superseded),
            Some(lane) if lane.generation == generation => Arc::clone(lane),
            outdated => {
                if let Some(lane) = outdated {
                    lane.cut();
                }
                let lane = Arc::new(self.new_lane(generation));
                lanes.insert(id.clone(), Arc::clone(&lane));
                lane
            }
        };
        // Under the lock of the lanes, so two can't both be the last one admitted.
        if lane.in_flight.load(Ordering::Relaxed) >= limit {
            return Err(Denied::SandboxFull { limit });
        }
        lane.in_flight.fetch_add(1, Ordering::Relaxed);
        drop(lanes);
        Ok(Permit { lane, _slot: slot, _counted: counted })
    }

    fn new_lane(&self, generation: u64) -> Lane {
        Lane {
            generation,
            in_flight: AtomicUsize::new(0),
            drivers: Drivers { tasks: self.drivers.clone(), cut: self.stop.child_token() },
            requests: self.requests.clone(),
            idle_policy: self.idle.clone(),
            idle: Mutex::default(),
        }
    }

    /// Ends every connection of a sandbox, idle or not.
    pub(crate) fn disconnect(&self, id: &SandboxId) {
        let lane = lock(&self.lanes).remove(id);
        if let Some(lane) = lane {
            lane.cut();
        }
    }

    pub(crate) fn in_flight(&self) -> usize {
        lock(&self.lanes).values().map(|lane| lane.in_flight.load(Ordering::Relaxed)).sum()
    }

    /// Admits nothing any more, and returns when nothing is in flight.
    pub(crate) async fn drain(&self) {
        self.requests.close();
        for lane in lock(&self.lanes).values() {
            lane.forget_idle();
        }
        self.requests.wait().await;
    }

    /// Ends everything that is in flight.
    pub(crate) async fn stop(&self) {
        self.stop.cancel();
        self.drivers.close();
        self.drivers.wait().await;
    }

    pub(crate) fn is_stopped(&self) -> bool {
        self.stop.is_cancelled()
    }

    fn sweep(&self) {
        lock(&self.lanes).retain(|_, lane| {
            lane.forget_expired();
            lane.in_flight.load(Ordering::Relaxed) > 0 || !lock(&lane.idle).is_empty()
        });
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

async fn sweep_regularly(pool: Weak<Pool>, stop: CancellationToken, every: Duration) {
    // An interval of nothing would panic.
    let mut ticks = tokio::time::interval(every.max(Duration::from_millis(10)));
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    while stop.run_until_cancelled(ticks.tick()).await.is_some() {
        let Some(pool) = pool.upgrade() else { return };
        pool.sweep();
    }
}

/// Everything the proxy has with one generation of one sandbox.
#[derive(Debug)]
pub(crate) struct Lane {
    generation: u64,
    in_flight: AtomicUsize,
    drivers: Drivers,
    requests: TaskTracker,
    idle_policy: IdlePolicy,
    idle: Mutex<HashMap<u16, Idle>>,
}

/// The connections to one port that wait for a request.
#[derive(Debug, Default)]
struct Idle {
    http1: Vec<Parked<Http1Connection>>,
    http2: Option<Parked<Http2Connection>>,
}

#[derive(Debug)]
struct Parked<C> {
    connection: C,
    since: Instant,
    _slot: OwnedSemaphorePermit,
}

impl Lane {
    pub(crate) fn drivers(&self) -> &Drivers {
        &self.drivers
    }

    /// Where tunnels run.
    pub(crate) fn requests(&self) -> &TaskTracker {
        &self.requests
    }

    pub(crate) fn is_cut(&self) -> bool {
        self.drivers.cut.is_cancelled()
    }

    fn cut(&self) {
        self.drivers.cut.cancel();
        self.forget_idle();
    }

    /// The HTTP/1.1 connection that was used last, if one is free.
    pub(crate) fn take_http1(&self, port: u16) -> Option<Http1Connection> {
        let mut idle = lock(&self.idle);
        let parked = &mut idle.get_mut(&port)?.http1;
        // One that is not ready still takes in a body that was answered early; it may become ready yet.
        let usable = |parked: &Parked<Http1Connection>| {
            parked.connection.is_ready() && parked.since.elapsed() < self.idle_policy.timeout
        };
        parked.iter().rposition(usable).map(|index| parked.remove(index).connection)
    }

    /// Keeps a connection for the next request, unless too many are kept already.
    pub(crate) fn park(&self, port: u16, connection: Http1Connection) {
        let may_be_of_use = !connection.is_closed() && !self.is_cut() && !self.requests.is_closed();
        if may_be_of_use && let Some(parked) = self.parked(connection) {
            lock(&self.idle).entry(port).or_default().http1.push(parked);
        }
    }

    /// The HTTP/2 connection to a port, in use or not.
    pub(crate) fn share_http2(&self, port: u16) -> Option<Http2Connection> {
        let mut idle = lock(&self.idle);
        let parked = idle.get_mut(&port)?.http2.as_mut().filter(|parked| !parked.connection.is_closed())?;
        parked.since = Instant::now();
        Some(parked.connection.clone())
    }

    /// Offers a new HTTP/2 connection to the requests that come.
    pub(crate) fn offer_http2(&self, port: u16, connection: Http2Connection) {
        if let Some(parked) = self.parked(connection) {
            lock(&self.idle).entry(port).or_default().http2 = Some(parked);
        }
    }

    fn parked<C>(&self, connection: C) -> Option<Parked<C>> {
        let slot = Arc::clone(&self.idle_policy.slots).try_acquire_owned().ok()?;
        Some(Parked { connection, since: Instant::now(), _slot: slot })
    }

    fn forget_idle(&self) {
        lock(&self.idle).clear();
    }

    fn forget_expired(&self) {
        let timeout = self.idle_policy.timeout;
        lock(&self.idle).retain(|_, idle| {
            idle.http1.retain(|parked| !parked.connection.is_closed() && parked.since.elapsed() < timeout);
            idle.http2.take_if(|parked| {
                let is_over = parked.connection.is_idle() && parked.since.elapsed() >= timeout;
                parked.connection.is_closed() || is_over
            });
            !idle.http1.is_empty() || idle.http2.is_some()
        });
    }
}

/// What these locks guard is whole at every step, so a panic elsewhere does not spoil it.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
