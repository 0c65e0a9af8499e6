//! What the proxy costs: the same requests, straight to a server, through a relay that does nothing but copy bytes
//! between two sockets, and through the proxy, all on loopback.
//!
//! ```text
//! cargo run --release -p belljar-proxy --example overhead
//! ```
//!
//! The three take turns, in another order each round, so that whatever else the machine does falls on all of them.
//! Client, server, and what is between have one thread each. Where there are fewer cores than that, or where the
//! client takes bytes faster than one core can copy them, streaming at full speed is slower through anything: compare
//! with the relay. So a stream is also measured with a server that sends no faster than `PACED_MIB_PER_S`.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use belljar_core::id::SandboxId;
use belljar_proxy::{Client, Config, Domains, Proxy, Sandboxes, Unresolved, Upstream};
use bytes::Bytes;
use futures::StreamExt;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Empty, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::client::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::{Builder, Runtime};

type Error = Box<dyn std::error::Error + Send + Sync>;
type AnyBody = UnsyncBoxBody<Bytes, Error>;

const ROUNDS: usize = 20;
const REQUESTS_PER_ROUND: usize = 1_000;
const CHUNK: &[u8] = &[7; 64 * 1024];
const RELAY_BYTES: usize = 128 * 1024;
const MIB: usize = 1024 * 1024;
const STREAM_MIB: usize = 256;
const PACED_MIB_PER_S: usize = 400;
const TRANSFERS: [(&str, &str); 3] = [("GET", "/download"), ("POST", "/upload"), ("GET", "/paced")];

/// Every sandbox is the one server.
struct Loopback {
    server: SocketAddr,
}

#[async_trait]
impl Sandboxes for Loopback {
    async fn resolve(&self, _: &SandboxId) -> Result<Arc<dyn Upstream>, Unresolved> {
        Ok(Arc::new(Self { server: self.server }))
    }
}

#[async_trait]
impl Upstream for Loopback {
    async fn connect(&self, _: u16) -> io::Result<TcpStream> {
        TcpStream::connect(self.server).await
    }

    fn generation(&self) -> u64 {
        1
    }

    fn traffic_access_token(&self) -> Option<&str> {
        None
    }
}

fn main() -> Result<(), Error> {
    let [client, between, server] = [runtime()?, runtime()?, runtime()?];
    let sandbox_id = SandboxId::generate();
    let direct = server.block_on(start_server())?;
    let relayed = between.block_on(start_relay(direct))?;
    let proxied = between.block_on(start_proxy(direct))?;
    let ways = [("direct", direct), ("relayed", relayed), ("proxied", proxied)];
    client.block_on(measure(ways, &format!("8080-{sandbox_id}.bench.test")))
}

/// One thread, beside the main one, that runs what is spawned on it.
fn runtime() -> io::Result<Runtime> {
    Builder::new_multi_thread().worker_threads(1).enable_all().build()
}

async fn start_server() -> io::Result<SocketAddr> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let _ = stream.set_nodelay(true);
            tokio::spawn(async move {
                let builder = auto::Builder::new(TokioExecutor::new());
                let _ = builder.serve_connection(TokioIo::new(stream), service_fn(answer)).await;
            });
        }
    });
    Ok(address)
}

async fn answer(request: Request<Incoming>) -> Result<Response<AnyBody>, Infallible> {
    let body = match request.uri().path() {
        "/download" => chunks(),
        "/paced" => paced_chunks(),
        _ => {
            let mut body = request.into_body();
            while let Some(Ok(_)) = body.frame().await {}
            full("ok")
        }
    };
    Ok(Response::new(body))
}

async fn start_relay(server: SocketAddr) -> io::Result<SocketAddr> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut server = TcpStream::connect(server).await?;
                client.set_nodelay(true)?;
                server.set_nodelay(true)?;
                tokio::io::copy_bidirectional_with_sizes(&mut client, &mut server, RELAY_BYTES, RELAY_BYTES).await
            });
        }
    });
    Ok(address)
}

async fn start_proxy(server: SocketAddr) -> Result<SocketAddr, Error> {
    let proxy = Proxy::new(Config::new(Domains::parse(["bench.test"])?), Arc::new(Loopback { server }));
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    tokio::spawn(async move {
        while let Ok((stream, address)) = listener.accept().await {
            let _ = stream.set_nodelay(true);
            let proxy = proxy.clone();
            let service = service_fn(move |request: Request<Incoming>| {
                let proxy = proxy.clone();
                async move {
                    let (parts, body) = request.into_parts();
                    let target = proxy.route_of(&parts).expect("every request of the bench names a sandbox");
                    let request = Request::from_parts(parts, body);
                    Ok::<_, Infallible>(proxy.proxy(target, Client { address, tls: false }, request).await)
                }
            });
            tokio::spawn(async move {
                let builder = auto::Builder::new(TokioExecutor::new());
                let _ = builder.serve_connection_with_upgrades(TokioIo::new(stream), service).await;
            });
        }
    });
    Ok(address)
}

type Ways = [(&'static str, SocketAddr); 3];

async fn measure(ways: Ways, host: &str) -> Result<(), Error> {
    let mut latencies_us = [(); 3].map(|()| Vec::new());
    let mut rates = [(); 3].map(|()| [(); 3].map(|()| Vec::new()));
    for round in 0..ROUNDS {
        let mut order = [0, 1, 2];
        order.rotate_left(round % 3);
        for way in order {
            let mut connection = Connection::open(ways[way].1, host).await?;
            for _ in 0..REQUESTS_PER_ROUND {
                let begun = Instant::now();
                connection.send("GET", "/", empty()).await?;
                latencies_us[way].push(begun.elapsed().as_secs_f64() * 1e6);
            }
        }
        for (transfer, (method, path)) in TRANSFERS.into_iter().enumerate() {
            for way in order {
                let mut connection = Connection::open(ways[way].1, host).await?;
                let begun = Instant::now();
                connection.send(method, path, if method == "POST" { chunks() } else { empty() }).await?;
                rates[transfer][way].push(STREAM_MIB as f64 / begun.elapsed().as_secs_f64());
            }
        }
    }

    println!("latency of a small request, µs ({} each)", ROUNDS * REQUESTS_PER_ROUND);
    let [direct, _, proxied] = report(ways, &mut latencies_us);
    println!("  added p50: {:.0} µs (at most 300 are promised)\n", proxied - direct);
    let paced = format!("download paced at {PACED_MIB_PER_S} MiB/s");
    for (title, rates) in ["download", "upload", &paced].into_iter().zip(&mut rates) {
        println!("{title}, MiB/s ({ROUNDS} of {STREAM_MIB} MiB each)");
        let [direct, relayed, proxied] = report(ways, rates);
        println!("  proxied / direct: {:.2}, proxied / relayed: {:.2}\n", proxied / direct, proxied / relayed);
    }
    Ok(())
}

/// Prints a distribution each, and returns the medians.
fn report(ways: Ways, samples: &mut [Vec<f64>; 3]) -> [f64; 3] {
    std::array::from_fn(|way| {
        samples[way].sort_unstable_by(f64::total_cmp);
        let last = samples[way].len() - 1;
        let at = |part: f64| samples[way][(last as f64 * part).round() as usize];
        let [low, middle, high, highest] = [0.1, 0.5, 0.9, 0.99].map(at);
        println!("  {:8} p10 {low:8.0}  p50 {middle:8.0}  p90 {high:8.0}  p99 {highest:8.0}", ways[way].0);
        middle
    })
}

struct Connection {
    sender: http1::SendRequest<AnyBody>,
    host: String,
}

impl Connection {
    async fn open(address: SocketAddr, host: &str) -> Result<Self, Error> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        let (sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        tokio::spawn(connection);
        Ok(Self { sender, host: host.to_owned() })
    }

    /// Sends a request and reads the whole answer.
    async fn send(&mut self, method: &str, path: &str, body: AnyBody) -> Result<(), Error> {
        self.sender.ready().await?;
        let request = Request::builder().method(method).uri(path).header("host", &self.host).body(body)?;
        let answer = self.sender.send_request(request).await?;
        let (status, mut body) = (answer.status(), answer.into_body());
        while let Some(frame) = body.frame().await {
            frame?;
        }
        if status.is_success() { Ok(()) } else { Err(format!("{path} was answered {status}").into()) }
    }
}

fn empty() -> AnyBody {
    Empty::new().map_err(|never| match never {}).boxed_unsync()
}

fn full(text: &'static str) -> AnyBody {
    Full::new(Bytes::from_static(text.as_bytes())).map_err(|never| match never {}).boxed_unsync()
}

fn chunks() -> AnyBody {
    let count = STREAM_MIB * MIB / CHUNK.len();
    StreamBody::new(futures::stream::iter(0..count).map(|_| Ok(Frame::data(Bytes::from_static(CHUNK))))).boxed_unsync()
}

fn paced_chunks() -> AnyBody {
    let begun = Instant::now();
    let count = STREAM_MIB * MIB / CHUNK.len();
    let frames = futures::stream::iter(0..count).then(move |index| async move {
        let due = Duration::from_secs_f64((index * CHUNK.len()) as f64 / (PACED_MIB_PER_S * MIB) as f64);
        tokio::time::sleep_until((begun + due).into()).await;
        Ok(Frame::data(Bytes::from_static(CHUNK)))
    });
    StreamBody::new(frames).boxed_unsync()
}
