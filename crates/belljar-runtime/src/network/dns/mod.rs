//! A sandbox's name service: queries come in at the gateway address and go out from the host to its own resolvers.
//!
//! The guest could not reach those itself, as they mostly have private addresses. Messages pass as they are, under an
//! identifier and from a port that the guest does not know; the guest chooses no destination.

mod message;

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use message::{QUERY_BYTES_MAX, Query, Rejection, ResponseCode, is_inconclusive};

pub(super) const DNS_PORT: u16 = 53;

/// Three attempts of this length end before the 5 seconds after which resolvers in the guest ask again.
const ATTEMPT_TIMEOUT: Duration = Duration::from_millis(1500);
const ATTEMPTS_MAX: usize = 3;

const TCP_CONNECTIONS_MAX: usize = 16;
const TCP_IDLE_TIMEOUT: Duration = Duration::from_secs(10);

/// Pause after a socket error, so that a lasting one does not become a busy loop.
const ERROR_PAUSE: Duration = Duration::from_millis(100);

const ANSWER_BYTES_MAX: usize = u16::MAX as usize;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Transport {
    Udp,
    Tcp,
}

/// Forwards the queries of one sandbox.
#[derive(Debug, Clone)]
pub(super) struct Forwarder {
    upstreams: watch::Receiver<Vec<SocketAddr>>,
    permits: Arc<Semaphore>,
}

impl Forwarder {
    pub(super) fn new(upstreams: watch::Receiver<Vec<SocketAddr>>, concurrency: usize) -> Self {
        Self { upstreams, permits: Arc::new(Semaphore::new(concurrency)) }
    }

    /// Serves until `stop`; what is under way then is dropped.
    pub(super) async fn serve(self, udp: UdpSocket, tcp: TcpListener, stop: CancellationToken) {
        tokio::select! {
            () = stop.cancelled() => {}
            () = self.serve_udp(udp) => {}
            () = self.serve_tcp(tcp) => {}
        }
    }

    async fn serve_udp(&self, socket: UdpSocket) {
        let socket = Arc::new(socket);
        let mut exchanges = JoinSet::new();
        // One byte more than allowed, so that too long is not mistaken for just right.
        let mut buffer = vec![0; QUERY_BYTES_MAX + 1];
        loop {
            let received = tokio::select! {
                received = socket.recv_from(&mut buffer) => received,
                Some(_) = exchanges.join_next() => continue,
            };
            let (length, guest) = match received {
                Ok(received) => received,
                Err(error) => {
                    tracing::debug!(error = %error, "DNS over UDP: receive failed");
                    tokio::time::sleep(ERROR_PAUSE).await;
                    continue;
                }
            };
            let immediate = match Query::parse(&buffer[..length]) {
                Err(Rejection::Silent) => continue,
                Err(Rejection::Answer(answer)) => answer,
                Ok(query) => match Arc::clone(&self.permits).try_acquire_owned() {
                    Err(_) => query.response(ResponseCode::ServerFailure),
                    Ok(permit) => {
                        let forwarder = self.clone();
                        let socket = Arc::clone(&socket);
                        exchanges.spawn(async move {
                            let answer = forwarder.resolve(&query, Transport::Udp).await;
                            drop(permit);
                            reply(&socket, &answer, guest).await;
                        });
                        continue;
                    }
                },
            };
            reply(&socket, &immediate, guest).await;
        }
    }

    async fn serve_tcp(&self, listener: TcpListener) {
        let mut connections = JoinSet::new();
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                Some(_) = connections.join_next() => continue,
            };
            match accepted {
                // A guest that opens more has its newest closed; those it has go on.
                Ok(_) if connections.len() >= TCP_CONNECTIONS_MAX => {}
                Ok((stream, _)) => {
                    let forwarder = self.clone();
                    connections.spawn(async move {
                        if let Err(error) = forwarder.serve_connection(stream).await {
                            tracing::debug!(error = %error, "DNS over TCP: connection ended");
                        }
                    });
                }
                Err(error) => {
                    tracing::debug!(error = %error, "DNS over TCP: accept failed");
                    tokio::time::sleep(ERROR_PAUSE).await;
                }
            }
        }
    }

    async fn serve_connection(&self, mut stream: TcpStream) -> io::Result<()> {
        loop {
            let message = match timeout(TCP_IDLE_TIMEOUT, read_framed(&mut stream, QUERY_BYTES_MAX)).await? {
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
                message => message?,
            };
            let answer = match Query::parse(&message) {
                Err(Rejection::Silent) => return Ok(()),
                Err(Rejection::Answer(answer)) => answer,
                Ok(query) => match self.permits.try_acquire() {
                    Err(_) => query.response(ResponseCode::ServerFailure),
                    Ok(_permit) => self.resolve(&query, Transport::Tcp).await,
                },
            };
            timeout(TCP_IDLE_TIMEOUT, write_framed(&mut stream, &answer)).await??;
        }
    }

    /// Answers as well as the upstreams can, over the guest's transport; resolvers that know nothing of TCP are common,
    /// and a short answer of theirs is better than none.
    async fn resolve(&self, query: &Query, transport: Transport) -> Vec<u8> {
        let mut answer = self.ask(query, transport).await;
        if answer.is_none() && transport == Transport::Tcp {
            answer = self.ask(query, Transport::Udp).await;
        }
        answer.unwrap_or_else(|| query.response(ResponseCode::ServerFailure))
    }

    /// Asks the upstreams in turn, a lone one repeatedly, until one gives a conclusive answer.
    async fn ask(&self, query: &Query, transport: Transport) -> Option<Vec<u8>> {
        let upstreams = self.upstreams.borrow().clone();
        let mut second_best = None;
        for (attempt, upstream) in upstreams.iter().cycle().take(ATTEMPTS_MAX).enumerate() {
            match timeout(ATTEMPT_TIMEOUT, exchange(query, *upstream, transport)).await {
                Ok(Ok(answer)) if !is_inconclusive(&answer) => return Some(answer),
                Ok(Ok(answer)) => {
                    second_best = Some(answer);
                    // Whoever answered would say the same again.
                    if attempt + 1 >= upstreams.len() {
                        break;
                    }
                }
                Ok(Err(error)) => tracing::debug!(%upstream, error = %error, "DNS upstream failed"),
                Err(_) => tracing::debug!(%upstream, "DNS upstream did not answer in time"),
            }
        }
        second_best
    }
}

async fn reply(socket: &UdpSocket, answer: &[u8], guest: SocketAddr) {
    if let Err(error) = socket.send_to(answer, guest).await {
        tracing::debug!(error = %error, "DNS over UDP: reply failed");
    }
}

async fn exchange(query: &Query, upstream: SocketAddr, transport: Transport) -> io::Result<Vec<u8>> {
    let id = rand::random();
    let mut answer = match transport {
        Transport::Udp => exchange_udp(query, id, upstream).await?,
        Transport::Tcp => {
            let mut stream = TcpStream::connect(upstream).await?;
            write_framed(&mut stream, &query.with_id(id)).await?;
            let answer = read_framed(&mut stream, ANSWER_BYTES_MAX).await?;
            if !query.is_answered_by(&answer, id) {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "the answer is to another question"));
            }
            answer
        }
    };
    query.restore_id(&mut answer);
    Ok(answer)
}

/// One socket per query: the kernel picks a random port for it, and being connected it hears the upstream alone.
async fn exchange_udp(query: &Query, id: u16, upstream: SocketAddr) -> io::Result<Vec<u8>> {
    let any_port: SocketAddr = match upstream {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    let socket = UdpSocket::bind(any_port).await?;
    socket.connect(upstream).await?;
    socket.send(&query.with_id(id)).await?;
    let mut buffer = vec![0; ANSWER_BYTES_MAX];
    loop {
        let length = socket.recv(&mut buffer).await?;
        // What does not fit may be somebody's guess at an answer: the real one may still come.
        if query.is_answered_by(&buffer[..length], id) {
            buffer.truncate(length);
            return Ok(buffer);
        }
    }
}

async fn read_framed(stream: &mut TcpStream, bytes_max: usize) -> io::Result<Vec<u8>> {
    let length = usize::from(stream.read_u16().await?);
    if length > bytes_max {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "the message is too long"));
    }
    let mut message = vec![0; length];
    stream.read_exact(&mut message).await?;
    Ok(message)
}

async fn write_framed(stream: &mut TcpStream, message: &[u8]) -> io::Result<()> {
    let length = u16::try_from(message.len()).map_err(io::Error::other)?;
    // In one write, or a server may see the length without the message.
    let mut framed = length.to_be_bytes().to_vec();
    framed.extend_from_slice(message);
    stream.write_all(&framed).await
}

#[cfg(test)]
mod tests;
