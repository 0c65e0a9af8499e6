//! A proxy on loopback, sandboxes that are servers on loopback, and clients that say exactly what a test wants said.

use std::collections::HashMap;
use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use belljar_core::id::SandboxId;
use belljar_proxy::{Client, Config, Domains, Proxy, Sandboxes, Unresolved, Upstream};
use bytes::Bytes;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Empty, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::task::JoinHandle;

pub const DOMAIN: &str = "sandbox.test";
/// What no step of any test should take. A test that fails because of it would otherwise hang.
pub const PATIENCE: Duration = Duration::from_secs(60);

pub type AnyBody = UnsyncBoxBody<Bytes, Box<dyn std::error::Error + Send + Sync>>;

pub fn empty() -> AnyBody {
    Empty::new().map_err(Into::into).boxed_unsync()
}

pub fn full(text: impl Into<Bytes>) -> AnyBody {
    Full::new(text.into()).map_err(Into::into).boxed_unsync()
}

/// Waits for something that is certain to come, unless the proxy is broken.
pub async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.unwrap_or_else(|_| panic!("waited in vain for {what}"))
}

/// What the kernel may buffer per socket and direction. By itself it buffers as much as the machine is set to, often
/// dozens of MiB, in which tests of backpressure would drown.
const SOCKET_BYTES: u32 = 128 * 1024;

fn socket() -> TcpSocket {
    let socket = TcpSocket::new_v4().expect("a socket");
    socket.set_recv_buffer_size(SOCKET_BYTES).expect("a socket option");
    socket.set_send_buffer_size(SOCKET_BYTES).expect("a socket option");
    socket
}

fn listener() -> TcpListener {
    let socket = socket();
    socket.bind(SocketAddr::from(([127, 0, 0, 1], 0))).expect("loopback has free ports");
    socket.listen(1024).expect("a bound socket")
}

async fn connect(address: SocketAddr) -> io::Result<TcpStream> {
    socket().connect(address).await
}

/// One sandbox: its ports are servers on loopback.
#[derive(Debug)]
pub struct Sandbox {
    pub id: SandboxId,
    ports: Mutex<HashMap<u16, SocketAddr>>,
    pub connects: AtomicUsize,
    pub generation: AtomicU64,
    pub settings: Settings,
}

#[derive(Debug, Default)]
pub struct Settings {
    pub token: Option<String>,
    pub host_mask: Option<String>,
    pub max_connections: Option<usize>,
    pub never_connects: bool,
}

impl Sandbox {
    pub fn host(&self, port: u16) -> String {
        format!("{port}-{}.{DOMAIN}", self.id)
    }

    pub fn connects(&self) -> usize {
        self.connects.load(Ordering::SeqCst)
    }

    pub fn listen(&self, port: u16, address: SocketAddr) {
        self.ports.lock().expect("no test panics with it").insert(port, address);
    }

    /// Serves a port with a handler of requests, in HTTP/1.1 and HTTP/2.
    pub async fn serve<H, F>(&self, port: u16, handler: H)
    where
        H: Fn(Request<Incoming>) -> F + Clone + Send + 'static,
        F: Future<Output = Response<AnyBody>> + Send + 'static,
    {
        let listener = listener();
        self.listen(port, listener.local_addr().expect("bound"));
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let handler = handler.clone();
                let service = service_fn(move |request| {
                    let answer = handler(request);
                    async { Ok::<_, Infallible>(answer.await) }
                });
                tokio::spawn(async move {
                    let builder = auto::Builder::new(TokioExecutor::new());
                    let _ = builder.serve_connection_with_upgrades(TokioIo::new(stream), service).await;
                });
            }
        });
    }

    /// Serves a port byte by byte.
    pub async fn serve_raw<H, F>(&self, port: u16, handler: H)
    where
        H: Fn(TcpStream) -> F + Send + 'static,
        F: Future<Output = ()> + Send + 'static,
    {
        let listener = listener();
        self.listen(port, listener.local_addr().expect("bound"));
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(handler(stream));
            }
        });
    }
}

struct View {
    sandbox: Arc<Sandbox>,
    generation: u64,
}

#[async_trait]
impl Upstream for View {
    async fn connect(&self, port: u16) -> io::Result<TcpStream> {
        self.sandbox.connects.fetch_add(1, Ordering::SeqCst);
        if self.sandbox.settings.never_connects {
            std::future::pending::<()>().await;
        }
        let address = self.sandbox.ports.lock().expect("no test panics with it").get(&port).copied();
        connect(address.ok_or(io::ErrorKind::ConnectionRefused)?).await
    }

    fn generation(&self) -> u64 {
        self.generation
    }

    fn traffic_access_token(&self) -> Option<&str> {
        self.sandbox.settings.token.as_deref()
    }

    fn request_host_mask(&self) -> Option<&str> {
        self.sandbox.settings.host_mask.as_deref()
    }

    fn max_connections(&self) -> usize {
        self.sandbox.settings.max_connections.unwrap_or(belljar_proxy::DEFAULT_MAX_CONNECTIONS)
    }
}

/// What the server knows.
#[derive(Default)]
pub struct Registry {
    sandboxes: Mutex<HashMap<SandboxId, Arc<Sandbox>>>,
    pub unresolved: Mutex<HashMap<SandboxId, fn() -> Unresolved>>,
}

impl Registry {
    pub fn add(&self, settings: Settings) -> Arc<Sandbox> {
        let sandbox = Arc::new(Sandbox {
            id: SandboxId::generate(),
            ports: Mutex::default(),
            connects: AtomicUsize::new(0),
            generation: AtomicU64::new(1),
            settings,
        });
        self.sandboxes.lock().expect("no test panics with it").insert(sandbox.id.clone(), Arc::clone(&sandbox));
        sandbox
    }

    pub fn remove(&self, sandbox: &Sandbox) {
        self.sandboxes.lock().expect("no test panics with it").remove(&sandbox.id);
    }
}

#[async_trait]
impl Sandboxes for Registry {
    async fn resolve(&self, id: &SandboxId) -> Result<Arc<dyn Upstream>, Unresolved> {
        if let Some(unresolved) = self.unresolved.lock().expect("no test panics with it").get(id) {
            return Err(unresolved());
        }
        let sandbox = self.sandboxes.lock().expect("no test panics with it").get(id).cloned();
        let sandbox = sandbox.ok_or(Unresolved::NotFound)?;
        let generation = sandbox.generation.load(Ordering::SeqCst);
        Ok(Arc::new(View { sandbox, generation }))
    }
}

/// A proxy with its listener, and an API behind the same one.
pub struct Fixture {
    pub proxy: Proxy,
    pub registry: Arc<Registry>,
    pub address: SocketAddr,
    listener: JoinHandle<()>,
}

impl Drop for Fixture {
    fn drop(&mut self) {
        self.listener.abort();
    }
}

impl Fixture {
    pub async fn new() -> Self {
        Self::with(|_| {}).await
    }

    pub async fn with(adjust: impl FnOnce(&mut Config)) -> Self {
        let mut config = Config::new(Domains::parse([DOMAIN]).expect("a domain"));
        // Tests count connections, and a busy machine may take its time between two requests.
        config.idle_timeout = Duration::from_secs(10);
        adjust(&mut config);
        let registry = Arc::new(Registry::default());
        let proxy = Proxy::new(config, Arc::clone(&registry) as Arc<dyn Sandboxes>);
        let listener = listener();
        let address = listener.local_addr().expect("bound");
        let listener = tokio::spawn(listen(proxy.clone(), listener));
        Self { proxy, registry, address, listener }
    }

    pub fn sandbox(&self) -> Arc<Sandbox> {
        self.registry.add(Settings::default())
    }

    /// One request over HTTP/1.1 on a connection of its own.
    pub async fn send(&self, request: Request<AnyBody>) -> Response<Incoming> {
        self.http1().await.send(request).await
    }

    pub async fn get(&self, host: &str, path: &str) -> Answer {
        Answer::of(self.send(request("GET", host, path, empty())).await).await
    }

    pub async fn http1(&self) -> Http1 {
        let stream = connect(self.address).await.expect("the proxy listens");
        let (sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.expect("a handshake needs nobody");
        let driver = tokio::spawn(async move {
            let _ = connection.with_upgrades().await;
        });
        Http1 { sender, driver: Some(driver) }
    }

    pub async fn http2(&self) -> Http2 {
        let stream = connect(self.address).await.expect("the proxy listens");
        let (sender, connection) =
            hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.expect("HTTP/2");
        let driver = tokio::spawn(async move {
            let _ = connection.await;
        });
        Http2 { sender, driver }
    }

    /// Sends bytes as they are, and returns everything that comes back until the connection closes.
    pub async fn raw(&self, bytes: &str) -> String {
        let mut stream = connect(self.address).await.expect("the proxy listens");
        stream.write_all(bytes.as_bytes()).await.expect("written");
        let mut answer = Vec::new();
        let _ = soon("the end of a raw answer", stream.read_to_end(&mut answer)).await;
        String::from_utf8_lossy(&answer).into_owned()
    }
}

async fn listen(proxy: Proxy, listener: TcpListener) {
    while let Ok((stream, address)) = listener.accept().await {
        stream.set_nodelay(true).expect("a TCP option");
        let proxy = proxy.clone();
        let service = service_fn(move |request: Request<Incoming>| {
            let proxy = proxy.clone();
            async move {
                let (parts, body) = request.into_parts();
                let Some(target) = proxy.route_of(&parts) else {
                    return Ok(Response::new(full("the API")));
                };
                let request = Request::from_parts(parts, body);
                let answer = proxy.proxy(target, Client { address, tls: false }, request).await;
                Ok::<_, Infallible>(answer.map(|body| body.map_err(Into::into).boxed_unsync()))
            }
        });
        tokio::spawn(async move {
            let mut builder = auto::Builder::new(TokioExecutor::new());
            builder.http2().enable_connect_protocol();
            let _ = builder.serve_connection_with_upgrades(TokioIo::new(stream), service).await;
        });
    }
}

/// A client's connection. Dropped, it is closed, as when a client dies.
pub struct Http1 {
    sender: hyper::client::conn::http1::SendRequest<AnyBody>,
    driver: Option<JoinHandle<()>>,
}

impl Http1 {
    pub async fn send(mut self, request: Request<AnyBody>) -> Response<Incoming> {
        let answer = soon("an answer", self.sender.send_request(request)).await.expect("an answer in HTTP/1.1");
        // Left alone, the connection ends with the answer.
        self.driver = None;
        answer
    }

    pub async fn send_on(&mut self, request: Request<AnyBody>) -> Response<Incoming> {
        soon("the connection", self.sender.ready()).await.expect("an open connection");
        soon("an answer", self.sender.send_request(request)).await.expect("an answer in HTTP/1.1")
    }

    /// Sends without waiting for the answer.
    pub fn begin(
        &mut self,
        request: Request<AnyBody>,
    ) -> impl Future<Output = hyper::Result<Response<Incoming>>> + use<> {
        self.sender.send_request(request)
    }
}

impl Drop for Http1 {
    fn drop(&mut self) {
        if let Some(driver) = &self.driver {
            driver.abort();
        }
    }
}

pub struct Http2 {
    sender: hyper::client::conn::http2::SendRequest<AnyBody>,
    driver: JoinHandle<()>,
}

impl Http2 {
    pub async fn send(&mut self, request: Request<AnyBody>) -> hyper::Result<Response<Incoming>> {
        soon("the connection", self.sender.ready()).await?;
        soon("an answer", self.sender.send_request(request)).await
    }
}

impl Drop for Http2 {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

pub fn request(method: &str, host: &str, path: &str, body: AnyBody) -> Request<AnyBody> {
    Request::builder().method(method).uri(path).header("host", host).body(body).expect("valid request")
}

/// As HTTP/2 wants it, with the host in the URI.
pub fn request2(method: &str, host: &str, path: &str, body: AnyBody) -> Request<AnyBody> {
    Request::builder().method(method).uri(format!("http://{host}{path}")).body(body).expect("valid request")
}

/// A whole answer.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub headers: http::HeaderMap,
    pub body: String,
}

impl Answer {
    pub async fn of(response: Response<Incoming>) -> Self {
        let (parts, body) = response.into_parts();
        let body = soon("the body", body.collect()).await.expect("a whole body").to_bytes();
        Self {
            status: parts.status.as_u16(),
            headers: parts.headers,
            body: String::from_utf8(body.to_vec()).expect("text"),
        }
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(|value| value.to_str().expect("text"))
    }
}

/// Reads one request's head from a raw connection. Empty when the connection is closed.
pub async fn read_head(stream: &mut TcpStream) -> String {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        match stream.read_u8().await {
            Ok(byte) => head.push(byte),
            Err(_) => return String::new(),
        }
    }
    String::from_utf8(head).expect("text")
}
