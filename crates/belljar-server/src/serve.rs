//! The listener: accepts connections within bounds, and hands each request to the proxy or the API.
//!
//! A connection is closed when it has had no request under way for a while: [`IDLE`] ordinarily, [`IDLE_WHEN_CROWDED`]
//! once most places are taken. So a herd that only connects keeps others out for a second or two. A connection beyond
//! the last place is told so and closed.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use belljar_proxy::{Client, Proxy};
use http::{Request, Response};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tower::Service;
use tracing::{debug, warn};

use crate::unread::ReadToEnd;

/// The longest a connection may go without a request, and the longest the head of a request may take.
const IDLE: Duration = Duration::from_secs(75);
const IDLE_WHEN_CROWDED: Duration = Duration::from_secs(1);
/// How often a connection looks whether it has been idle for too long.
const LOOK: Duration = Duration::from_millis(500);
const HEADER_BYTES: usize = 64 * 1024;
/// Streams of one HTTP/2 connection at a time; the SDKs open another connection past what the server allows.
const STREAMS_PER_CONNECTION: u32 = 250;
/// After a failed accept, which means that the process or the machine ran out of something.
const PAUSE_AFTER_FAILED_ACCEPT: Duration = Duration::from_millis(50);

/// Told to connections beyond the last place, before any request is read.
static TOO_MANY_CONNECTIONS: LazyLock<String> = LazyLock::new(|| {
    let body = r#"{"code":503,"message":"The server has too many connections open; try again in a second"}"#;
    format!(
        "HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nretry-after: 1\r\nconnection: close\r\n\
         content-length: {}\r\n\r\n{body}",
        body.len()
    )
});

/// What serves requests.
#[derive(Debug, Clone)]
pub(crate) struct Services {
    pub(crate) api: Router,
    pub(crate) proxy: Proxy,
}

/// Serves until `stop`, then lets requests under way finish within `drain_deadline`.
pub(crate) async fn serve(
    listener: TcpListener,
    services: Services,
    connections: usize,
    stop: CancellationToken,
    drain_deadline: Duration,
) {
    let places = Places { free: Arc::new(Semaphore::new(connections)), all: connections };
    let tasks = TaskTracker::new();
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => break,
            accepted = listener.accept() => accepted,
        };
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                warn!(error = &error as &dyn std::error::Error, "a connection could not be accepted");
                tokio::time::sleep(PAUSE_AFTER_FAILED_ACCEPT).await;
                continue;
            }
        };
        // Small answers must not wait for more of them.
        let _ = stream.set_nodelay(true);
        match places.take() {
            Some(place) => {
                let connection = Connection { services: services.clone(), peer, activity: Arc::default() };
                tasks.spawn(connection.run(stream, places.clone(), place, stop.clone()));
            }
            None => drop(tasks.spawn(refuse(stream))),
        }
    }
    drop(listener);
    tasks.close();
    let (drained, finished) =
        tokio::join!(services.proxy.drain(drain_deadline), tokio::time::timeout(drain_deadline, tasks.wait()),);
    if drained.cut > 0 || finished.is_err() {
        let deadline_s = drain_deadline.as_secs();
        warn!(deadline_s, to_sandboxes = drained.cut, "requests under way were cut off at the deadline");
    }
}

/// The room for connections.
#[derive(Debug, Clone)]
struct Places {
    free: Arc<Semaphore>,
    all: usize,
}

impl Places {
    fn take(&self) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.free).try_acquire_owned().ok()
    }

    /// Whether less than a quarter is left.
    fn are_crowded(&self) -> bool {
        self.free.available_permits() < self.all / 4
    }
}

/// Says why and hangs up.
async fn refuse(mut stream: TcpStream) {
    let answer = async {
        // A client that is gone already needs no answer.
        let _ = stream.write_all(TOO_MANY_CONNECTIONS.as_bytes()).await;
        let _ = stream.shutdown().await;
    };
    let _ = tokio::time::timeout(Duration::from_secs(1), answer).await;
}

/// One connection of a client.
struct Connection {
    services: Services,
    peer: SocketAddr,
    activity: Arc<Activity>,
}

impl Connection {
    async fn run(self, stream: TcpStream, places: Places, _place: OwnedSemaphorePermit, stop: CancellationToken) {
        let Self { services, peer, activity } = self;
        let builder = connection_builder();
        let service = service_fn(|request: Request<Incoming>| {
            let (services, under_way) = (services.clone(), UnderWay::new(&activity));
            async move {
                let response = answer(services, peer, request).await;
                // A body that still streams counts as under way.
                Ok::<_, Infallible>(response.map(|body| Body::new(KeepUntilEnd { body, _under_way: under_way })))
            }
        });
        let connection = builder.serve_connection_with_upgrades(TokioIo::new(stream), service);
        tokio::pin!(connection);
        let mut is_closing = false;
        loop {
            tokio::select! {
                ended = connection.as_mut() => {
                    if let Err(error) = ended {
                        debug!(%peer, error = error.as_ref() as &dyn std::error::Error, "a connection broke");
                    }
                    return;
                }
                () = stop.cancelled(), if !is_closing => {
                    connection.as_mut().graceful_shutdown();
                    is_closing = true;
                }
                () = tokio::time::sleep(LOOK) => {
                    let longest = if places.are_crowded() { IDLE_WHEN_CROWDED } else { IDLE };
                    if activity.idle_for() <= longest {
                        continue;
                    }
                    if is_closing {
                        // It was asked to and has nothing under way: half a request, or a client that doesn't listen.
                        return;
                    }
                    connection.as_mut().graceful_shutdown();
                    is_closing = true;
                }
            }
        }
    }
}

async fn answer(mut services: Services, peer: SocketAddr, request: Request<Incoming>) -> Response<Body> {
    let (parts, body) = request.into_parts();
    let target = services.proxy.route_of(&parts);
    let request = Request::from_parts(parts, ReadToEnd::new(body));
    match target {
        Some(target) => {
            let client = Client { address: peer, tls: false };
            services.proxy.proxy(target, client, request).await.map(Body::new)
        }
        None => {
            let Ok(response) = services.api.call(request.map(Body::new)).await;
            response
        }
    }
}

fn connection_builder() -> auto::Builder<TokioExecutor> {
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(IDLE).max_buf_size(HEADER_BYTES);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(STREAMS_PER_CONNECTION)
        .max_header_list_size(u32::try_from(HEADER_BYTES).expect("the constant is small"))
        .keep_alive_interval(Duration::from_secs(30))
        .keep_alive_timeout(Duration::from_secs(20))
        .adaptive_window(true)
        .enable_connect_protocol();
    builder
}

/// What a connection is doing.
#[derive(Debug)]
struct Activity {
    under_way: AtomicUsize,
    born: Instant,
    /// Milliseconds from `born` to the end of the last request.
    last_end_ms: AtomicU64,
}

impl Default for Activity {
    fn default() -> Self {
        Self { under_way: AtomicUsize::new(0), born: Instant::now(), last_end_ms: AtomicU64::new(0) }
    }
}

impl Activity {
    fn idle_for(&self) -> Duration {
        if self.under_way.load(Ordering::Acquire) > 0 {
            return Duration::ZERO;
        }
        self.born.elapsed().saturating_sub(Duration::from_millis(self.last_end_ms.load(Ordering::Acquire)))
    }
}

/// Exists as long as a request is under way.
#[derive(Debug)]
struct UnderWay(Arc<Activity>);

impl UnderWay {
    fn new(activity: &Arc<Activity>) -> Self {
        activity.under_way.fetch_add(1, Ordering::AcqRel);
        Self(Arc::clone(activity))
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        let now_ms = u64::try_from(self.0.born.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.0.last_end_ms.store(now_ms, Ordering::Release);
        self.0.under_way.fetch_sub(1, Ordering::AcqRel);
    }
}

/// A body that keeps its request under way until its last byte.
struct KeepUntilEnd {
    body: Body,
    _under_way: UnderWay,
}

impl http_body::Body for KeepUntilEnd {
    type Data = bytes::Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Result<http_body::Frame<Self::Data>, Self::Error>>> {
        std::pin::Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> http_body::SizeHint {
        self.body.size_hint()
    }
}
