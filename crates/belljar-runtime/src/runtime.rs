//! What an engine must be able to do. The server knows nothing else of it.

use std::collections::BTreeSet;
use std::fmt;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use belljar_core::id::SandboxId;
use belljar_core::lifecycle::EndReason;
use belljar_core::limits::Resources;
use tokio::net::TcpStream;

/// All that an engine needs to know to make a sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SandboxSpec {
    pub id: SandboxId,
    /// The template's root filesystem, shared by its sandboxes and never written.
    pub rootfs: PathBuf,
    pub resources: Resources,
    /// Whether the sandbox reaches the internet. What is closed to all sandboxes stays closed.
    pub internet: bool,
}

/// Makes, finds and removes sandboxes on this host.
///
/// Every call may be cut short by a crash. Whatever then exists under the sandbox's id is found by [`Runtime::owned`]
/// and removed by [`Runtime::destroy`].
#[async_trait]
pub trait Runtime: Send + Sync + fmt::Debug {
    /// Makes a sandbox whose agent accepts connections.
    ///
    /// # Errors
    /// Naming the step that failed. What had been made by then is still there: the caller destroys it.
    async fn create(&self, spec: &SandboxSpec) -> Result<Arc<dyn RunningSandbox>, RuntimeError>;

    /// Takes over a sandbox that another server process made; none if it doesn't run any more.
    ///
    /// # Errors
    /// If that can't be found out.
    async fn adopt(&self, spec: &SandboxSpec) -> Result<Option<Arc<dyn RunningSandbox>>, RuntimeError>;

    /// Ends a sandbox and frees all it held. Does nothing where nothing is left, so it can be repeated.
    ///
    /// # Errors
    /// If something could not be freed; a later call tries again.
    async fn destroy(&self, id: &SandboxId) -> Result<(), RuntimeError>;

    /// Every sandbox of which anything exists on this host, half-made and half-removed ones too.
    ///
    /// # Errors
    /// If the host can't be asked.
    async fn owned(&self) -> Result<BTreeSet<SandboxId>, RuntimeError>;

    /// Puts right whatever the host may have changed since the last call: filters, addresses. Periodic and idempotent.
    ///
    /// # Errors
    /// If it could not be put right.
    async fn reconcile(&self) -> Result<(), RuntimeError>;
}

/// A sandbox that runs.
#[async_trait]
pub trait RunningSandbox: Send + Sync + fmt::Debug {
    /// Opens a connection to a port inside.
    ///
    /// # Errors
    /// `ConnectionRefused` if nobody listens there; others if the sandbox can't be reached.
    async fn connect(&self, port: u16) -> io::Result<TcpStream>;

    /// Returns once the sandbox has stopped by itself, with why.
    async fn exited(&self) -> EndReason;
}

/// A step that failed, with its cause. It is for the operator; a tenant learns only that it failed.
#[derive(Debug, thiserror::Error)]
#[error("{step}")]
pub struct RuntimeError {
    pub step: &'static str,
    #[source]
    pub source: Box<dyn std::error::Error + Send + Sync>,
}

impl RuntimeError {
    /// For `map_err`: names the step.
    pub fn at<E: Into<Box<dyn std::error::Error + Send + Sync>>>(step: &'static str) -> impl FnOnce(E) -> Self {
        move |source| Self { step, source: source.into() }
    }
}
