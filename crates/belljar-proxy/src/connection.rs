//! One connection to a server inside a sandbox, and the task that drives it.

use std::future::Future;
use std::sync::Arc;

use http::{Request, Response};
use http_body_util::combinators::UnsyncBoxBody;
use hyper::body::Incoming;
use hyper::client::conn::{TrySendError, http1, http2};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::{AbortOnDropHandle, TaskTracker};

use crate::BoxError;
use crate::pool::Permit;

/// How much of a head or a body an HTTP/1.1 connection holds at most, in each direction. Larger buffers (hyper's own
/// grow to 400 KiB) carry no more bytes per second, and there may be thousands of connections.
const BUFFER_BYTES: usize = 128 * 1024;

pub(crate) type RequestBody = UnsyncBoxBody<bytes::Bytes, BoxError>;

/// Where the tasks of connections live, and what ends them all at once.
#[derive(Debug, Clone)]
pub(crate) struct Drivers {
    pub(crate) tasks: TaskTracker,
    /// Cancelled when the sandbox is gone, or the whole proxy stops.
    pub(crate) cut: CancellationToken,
}

impl Drivers {
    /// Runs a connection until it ends, is cut, or its handle is dropped.
    fn drive<F>(&self, connection: F) -> AbortOnDropHandle<()>
    where
        F: Future<Output = hyper::Result<()>> + Send + 'static,
    {
        let cut = self.cut.clone();
        AbortOnDropHandle::new(self.tasks.spawn(async move {
            // An error of the connection is told to whoever waits for an answer on it; an idle one has no one.
            let _ = cut.run_until_cancelled(connection).await;
        }))
    }
}

/// An HTTP/1.1 connection, which carries one request at a time. Dropped, it is closed.
#[derive(Debug)]
pub(crate) struct Http1Connection {
    sender: http1::SendRequest<RequestBody>,
    _driver: AbortOnDropHandle<()>,
}

impl Http1Connection {
    pub(crate) async fn open(stream: TcpStream, drivers: &Drivers) -> hyper::Result<Self> {
        let (sender, connection) =
            http1::Builder::new().max_buf_size(BUFFER_BYTES).handshake(TokioIo::new(stream)).await?;
        Ok(Self { sender, _driver: drivers.drive(connection.with_upgrades()) })
    }

    /// Whether another request can be sent: the last one is done in both directions, and the server has not closed.
    pub(crate) fn is_ready(&self) -> bool {
        self.sender.is_ready()
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.sender.is_closed()
    }

    /// The error gives the request back if none of it was sent.
    pub(crate) async fn send(
        &mut self,
        request: Request<RequestBody>,
    ) -> Result<Response<Incoming>, TrySendError<Request<RequestBody>>> {
        self.sender.try_send_request(request).await
    }
}

/// An HTTP/2 connection, which carries many requests at a time. It closes when its last clone is dropped.
#[derive(Debug, Clone)]
pub(crate) struct Http2Connection {
    sender: http2::SendRequest<RequestBody>,
    driver: Arc<AbortOnDropHandle<()>>,
}

impl Http2Connection {
    /// Speaks HTTP/2 without asking, as there is no TLS that could have agreed on it.
    pub(crate) async fn open(stream: TcpStream, drivers: &Drivers) -> hyper::Result<Self> {
        let (sender, connection) = http2::handshake(Tracked(drivers.tasks.clone()), TokioIo::new(stream)).await?;
        Ok(Self { sender, driver: Arc::new(drivers.drive(connection)) })
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.sender.is_closed()
    }

    /// Whether this is the only clone, so that no request is in flight.
    pub(crate) fn is_idle(&self) -> bool {
        Arc::strong_count(&self.driver) == 1
    }

    pub(crate) async fn send(
        &mut self,
        request: Request<RequestBody>,
    ) -> Result<Response<Incoming>, TrySendError<Request<RequestBody>>> {
        self.sender.try_send_request(request).await
    }
}

/// Lets hyper start the tasks of an HTTP/2 connection where they are counted.
#[derive(Debug, Clone)]
struct Tracked(TaskTracker);

impl<F> hyper::rt::Executor<F> for Tracked
where
    F: Future<Output: Send> + Send + 'static,
{
    fn execute(&self, task: F) {
        self.0.spawn(task);
    }
}

/// What an answer is still coming on.
#[derive(Debug)]
pub(crate) enum Carrier {
    Http1 {
        connection: Http1Connection,
        port: u16,
    },
    /// Held only so that the connection lives as long as the answer.
    Http2 {
        _connection: Http2Connection,
    },
}

impl Carrier {
    /// The answer is complete: the connection may carry another.
    pub(crate) fn finish(self, permit: &Permit) {
        match self {
            Self::Http1 { connection, port } => permit.lane().park(port, connection),
            Self::Http2 { .. } => {}
        }
    }
}
