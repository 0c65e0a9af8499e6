//! What the proxy asks of the server: which sandbox is meant, and a connection into it.

use std::io;
use std::sync::Arc;

use async_trait::async_trait;
use belljar_core::id::SandboxId;
use tokio::net::TcpStream;

use crate::BoxError;

/// The most requests and tunnels one sandbox serves at a time, unless its [`Upstream`] says otherwise.
pub const DEFAULT_MAX_CONNECTIONS: usize = 1_000;

/// The running sandboxes, by id.
#[async_trait]
pub trait Sandboxes: Send + Sync + 'static {
    /// Finds a running sandbox. Called for every request, so an implementation should answer from memory.
    ///
    /// # Errors
    /// Why the sandbox can't be reached.
    async fn resolve(&self, id: &SandboxId) -> Result<Arc<dyn Upstream>, Unresolved>;
}

/// Why no connection to a sandbox can be had.
#[derive(Debug, thiserror::Error)]
pub enum Unresolved {
    /// It never existed, or was killed, or reached its deadline.
    #[error("there is no such sandbox")]
    NotFound,
    /// It is paused, and traffic does not wake it. E2B tells this from `NotFound` no more than its SDK does.
    #[error("the sandbox is not running")]
    Stopped,
    /// It is about to run, or to stop running: asking again soon gives a definite answer.
    #[error("the sandbox is changing its state")]
    Transitioning,
    /// The server could not find out. The source is for the operator and is not shown to the client.
    #[error("the sandbox could not be looked up")]
    Failed(#[source] BoxError),
}

/// One generation of one running sandbox, as the proxy sees it.
#[async_trait]
pub trait Upstream: Send + Sync + 'static {
    /// Opens a connection to a port inside the sandbox.
    ///
    /// # Errors
    /// Whatever the kernel said; `ConnectionRefused` is the ordinary one.
    async fn connect(&self, port: u16) -> io::Result<TcpStream>;

    /// A number that grows whenever connections made before became worthless, which is each time the sandbox was
    /// resumed or restored. Connections of an older generation are closed when the proxy meets a newer one.
    fn generation(&self) -> u64;

    /// The token that every request has to show in `e2b-traffic-access-token`, except those to the agent, which checks
    /// its own. `None`: everybody may come in (E2B's `network.allowPublicTraffic`).
    fn traffic_access_token(&self) -> Option<&str>;

    /// What to send as `Host` instead of the client's, except to the agent; `${PORT}` in it stands for the port
    /// (E2B's `network.maskRequestHost`).
    fn request_host_mask(&self) -> Option<&str> {
        None
    }

    /// The most requests and tunnels in flight at a time.
    fn max_connections(&self) -> usize {
        DEFAULT_MAX_CONNECTIONS
    }
}
