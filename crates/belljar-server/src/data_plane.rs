//! What the proxy may know of the sandboxes: which runs, and a way in.

use std::io;
use std::sync::Arc;

use async_trait::async_trait;
use belljar_core::id::SandboxId;
use belljar_core::lifecycle::State;
use belljar_proxy::{Sandboxes, Unresolved, Upstream};
use belljar_runtime::RunningSandbox;
use tokio::net::TcpStream;

use crate::lifecycle::Manager;

/// The registry as the proxy sees it.
#[derive(Debug)]
pub(crate) struct RunningSandboxes(pub(crate) Manager);

#[async_trait]
impl Sandboxes for RunningSandboxes {
    async fn resolve(&self, id: &SandboxId) -> Result<Arc<dyn Upstream>, Unresolved> {
        let view = self.0.view(id).ok_or(Unresolved::NotFound)?;
        match (view.sandbox, view.record.state) {
            (Some(sandbox), State::Running) => Ok(Arc::new(Reachable(sandbox))),
            (_, State::Creating) => Err(Unresolved::Transitioning),
            _ => Err(Unresolved::NotFound),
        }
    }
}

#[derive(Debug)]
struct Reachable(Arc<dyn RunningSandbox>);

#[async_trait]
impl Upstream for Reachable {
    async fn connect(&self, port: u16) -> io::Result<TcpStream> {
        self.0.connect(port).await
    }

    /// A sandbox is never restored under its id yet, so its first generation is its only one.
    fn generation(&self) -> u64 {
        0
    }

    /// Closing a sandbox's ports to the public is refused at create, so every one is open.
    fn traffic_access_token(&self) -> Option<&str> {
        None
    }
}
