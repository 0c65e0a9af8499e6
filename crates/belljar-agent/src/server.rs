//! Accepting connections: HTTP/1.1 and HTTP/2 without TLS, told apart by how they begin.

use std::convert::Infallible;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::Request;
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tower::ServiceExt;

/// Connections served at once. More wait in the kernel's queue.
const MAX_CONNECTIONS: usize = 4096;

/// Streams that one HTTP/2 connection may have open: the SDKs put all of a sandbox's commands on one.
const MAX_STREAMS: u32 = 1024;

/// A request's header lines together.
const MAX_HEADER_BYTES: u32 = 64 << 10;

/// How long a client may take over its header lines, and over nothing at all between requests.
const HEADER_TIMEOUT: Duration = Duration::from_secs(640);

/// The pause after a connection could not be accepted, which mostly means that the open files are used up.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Serves `router` until the future is dropped.
pub(crate) async fn serve(listener: TcpListener, router: Router) -> Infallible {
    let permits = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let builder = Arc::new(builder());
    let mut connections = JoinSet::new();
    loop {
        let permit = Arc::clone(&permits).acquire_owned().await.expect("the semaphore is never closed");
        let stream = match listener.accept().await {
            Ok((stream, _peer)) => stream,
            Err(error) => {
                pause_after(&error).await;
                continue;
            }
        };
        let (builder, router) = (Arc::clone(&builder), router.clone());
        connections.spawn(async move {
            serve_connection(&builder, stream, router).await;
            drop(permit);
        });
        // Those that are done, so that the set does not grow.
        while connections.try_join_next().is_some() {}
    }
}

/// A connection that was gone before it was accepted says nothing about the next one.
async fn pause_after(error: &io::Error) {
    use io::ErrorKind::{ConnectionAborted, ConnectionReset};
    if !matches!(error.kind(), ConnectionAborted | ConnectionReset) {
        tracing::warn!(%error, "a connection could not be accepted");
        tokio::time::sleep(ACCEPT_PAUSE).await;
    }
}

fn builder() -> Builder<TokioExecutor> {
    let mut builder = Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .max_buf_size(MAX_HEADER_BYTES as usize);
    builder.http2().timer(TokioTimer::new()).max_concurrent_streams(MAX_STREAMS).max_header_list_size(MAX_HEADER_BYTES);
    builder
}

async fn serve_connection(builder: &Builder<TokioExecutor>, stream: TcpStream, router: Router) {
    // A command's output should not wait for more of it.
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "no TCP_NODELAY");
    }
    let service = hyper::service::service_fn(move |request: Request<Incoming>| router.clone().oneshot(request));
    // How a connection ends is the client's business, and the requests on it have told their own errors.
    if let Err(error) = builder.serve_connection(TokioIo::new(stream), service).await {
        tracing::debug!(%error, "a connection ended early");
    }
}
