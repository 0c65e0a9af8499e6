//! One sandbox's network, as the rest of the server uses it.

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use belljar_core::id::SandboxId;
use tokio::net::{TcpListener, TcpSocket, TcpStream, UdpSocket};
use tokio::time::timeout;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::error::NetworkError;
use super::namespace::{Namespace, NamespaceWorkers};
use super::slot::GUEST_ADDRESS;

/// A sandbox's network that this server serves: its name service runs as long as this value lives.
///
/// The namespaces outlive it; [`destroy`](super::NetworkManager::destroy) removes them.
#[derive(Debug)]
pub struct SandboxNetwork {
    pub(super) sandbox: SandboxId,
    pub(super) inner_path: PathBuf,
    pub(super) uplink_interface: String,
    pub(super) router: Arc<Namespace>,
    pub(super) sockets: Arc<NamespaceWorkers>,
    pub(super) stop: CancellationToken,
    pub(super) _stop_on_drop: DropGuard,
}

impl SandboxNetwork {
    #[must_use]
    pub fn sandbox_id(&self) -> &SandboxId {
        &self.sandbox
    }

    /// The namespace that holds nothing but the guest's end, for the engine to take over.
    #[must_use]
    pub fn inner_netns_path(&self) -> &Path {
        &self.inner_path
    }

    /// The host's interface to this sandbox: its counters are the sandbox's traffic with the world.
    #[must_use]
    pub fn uplink_interface(&self) -> &str {
        &self.uplink_interface
    }

    /// A connection to a port in the guest, straight into its network stack: no address translation is on the way.
    ///
    /// # Errors
    /// `ConnectionRefused` if nobody listens there, `TimedOut` if the guest does not answer (yet), `NotConnected` if
    /// the network is destroyed meanwhile.
    pub async fn connect(&self, port: u16, limit: Duration) -> io::Result<TcpStream> {
        let connecting = async {
            let socket = self
                .socket("create a TCP socket", || {
                    let socket = TcpSocket::new_v4()?;
                    socket.set_nodelay(true)?;
                    Ok(socket)
                })
                .await?;
            socket.connect((GUEST_ADDRESS, port).into()).await
        };
        tokio::select! {
            () = self.stop.cancelled() => Err(io::ErrorKind::NotConnected.into()),
            connected = timeout(limit, connecting) => connected.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())),
        }
    }

    /// A UDP socket next to the guest. What the guest may send to it is for the packet filter to say.
    pub async fn bind_udp(&self, address: SocketAddr) -> io::Result<UdpSocket> {
        let socket = self
            .socket("bind a UDP socket", move || {
                let socket = std::net::UdpSocket::bind(address)?;
                socket.set_nonblocking(true)?;
                Ok(socket)
            })
            .await?;
        UdpSocket::from_std(socket)
    }

    /// A TCP listener next to the guest. What the guest may send to it is for the packet filter to say.
    pub async fn bind_tcp_listener(&self, address: SocketAddr) -> io::Result<TcpListener> {
        let listener = self
            .socket("bind a TCP listener", move || {
                let listener = std::net::TcpListener::bind(address)?;
                listener.set_nonblocking(true)?;
                Ok(listener)
            })
            .await?;
        TcpListener::from_std(listener)
    }

    /// Sockets belong to the namespace of the thread that makes them, for ever; so they are made where the guest is.
    async fn socket<T: Send + 'static>(
        &self,
        step: &'static str,
        make: impl FnOnce() -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        let made = self
            .sockets
            .run(&self.router, move || make().map_err(|source| NetworkError::Socket { step, source }))
            .await;
        made.map_err(|error| match error {
            NetworkError::Socket { source, .. } => source,
            other => io::Error::other(other),
        })
    }
}
