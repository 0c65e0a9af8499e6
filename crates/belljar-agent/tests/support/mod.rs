//! Starts the agent as an ordinary process and speaks with it on the wire.
// Each test file uses its own part of this.
#![allow(dead_code)]

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use belljar_protocol::envd::filesystem::FilesystemClient;
use belljar_protocol::envd::process::ProcessClient;
use bytes::{Buf, Bytes, BytesMut};
use connectrpc::client::{ClientConfig, HttpClient};
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde_json::{Value, json};

/// Longer than anything here takes, shorter than anyone wants to wait for a test that hangs.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// A running agent with a directory of its own. Both are gone when it is dropped.
pub(crate) struct Agent {
    process: Child,
    address: SocketAddr,
    directory: tempfile::TempDir,
    client: Client<HttpConnector, Full<Bytes>>,
}

impl Agent {
    /// Starts one whose default user is root. `None`, with a note, where the tests do not run as root: only root can
    /// run commands as other users.
    pub(crate) async fn start() -> Option<Self> {
        let agent = Self::start_bare()?;
        let status = agent.post("/init", json!({"defaultUser": "root"})).await.status();
        assert_eq!(status, StatusCode::NO_CONTENT);
        Some(agent)
    }

    /// Starts one that nobody has initialised.
    pub(crate) fn start_bare() -> Option<Self> {
        let directory = tempfile::tempdir().expect("a temporary directory");
        Self::run(Command::new(env!("CARGO_BIN_EXE_belljar-agent")), directory)
    }

    /// Starts one to which the directory `small` is a file system of its own, of one MiB.
    pub(crate) async fn start_with_little_space() -> Option<Self> {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let small = directory.path().join("small");
        std::fs::create_dir(&small).expect("created");
        // The mount is the agent's alone, and gone with it.
        let script = "mount -t tmpfs -o size=1m belljar-test \"$0\" && exec \"$@\"";
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-c", script]).arg(&small).arg(env!("CARGO_BIN_EXE_belljar-agent"));
        let agent = Self::run(command, directory)?;
        agent.post("/init", json!({"defaultUser": "root"})).await;
        Some(agent)
    }

    pub(crate) fn run(mut command: Command, directory: tempfile::TempDir) -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: this test needs root, as the agent does");
            return None;
        }
        // Commands of every user are to reach it.
        let everyone = std::os::unix::fs::PermissionsExt::from_mode(0o777);
        std::fs::set_permissions(directory.path(), everyone).expect("changed");
        command.args(["--listen", "127.0.0.1:0"]).stdin(Stdio::null()).stderr(Stdio::piped());
        let mut process = command.spawn().expect("the agent starts");
        let mut log = BufReader::new(process.stderr.take().expect("piped"));
        let mut line = String::new();
        log.read_line(&mut line).expect("readable");
        let address = line.split("address=").nth(1).and_then(|rest| rest.split(' ').next());
        let address = address.and_then(|address| address.parse().ok()).unwrap_or_else(|| panic!("no address: {line}"));
        // What else it logs belongs to the test's output; a full pipe would stop it.
        std::thread::spawn(move || log.lines().map_while(Result::ok).for_each(|line| eprintln!("agent: {line}")));
        // A connection each: one that the agent closes after a bad request must not be the next one's.
        let client = Client::builder(TokioExecutor::new()).pool_max_idle_per_host(0).build_http();
        Some(Self { process, address, directory, client })
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    pub(crate) fn pid(&self) -> u32 {
        self.process.id()
    }

    /// The directory that is this agent's, or something in it.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub(crate) fn text_path(&self, name: &str) -> String {
        self.path(name).to_str().expect("temporary directories have plain names").to_owned()
    }

    pub(crate) fn is_running(&mut self) -> bool {
        self.process.try_wait().expect("a child").is_none()
    }

    pub(crate) async fn send(&self, request: Request<Full<Bytes>>) -> Response<Incoming> {
        let what = format!("{} {}", request.method(), request.uri().path());
        let sent = tokio::time::timeout(PATIENCE, self.client.request(request)).await;
        sent.expect("answered in time").unwrap_or_else(|error| panic!("{what} is not answered: {error:?}"))
    }

    pub(crate) fn request(&self, method: &str, path: &str) -> http::request::Builder {
        Request::builder().method(method).uri(format!("http://{}{path}", self.address))
    }

    pub(crate) async fn get(&self, path: &str) -> Response<Incoming> {
        self.send(self.request("GET", path).body(Full::default()).expect("valid")).await
    }

    pub(crate) async fn post(&self, path: &str, body: Value) -> Response<Incoming> {
        let request = self.request("POST", path).header("content-type", "application/json");
        self.send(request.body(Full::from(body.to_string())).expect("valid")).await
    }

    /// A unary Connect request with JSON, as root.
    pub(crate) async fn unary(&self, method: &str, body: Value) -> (StatusCode, Value) {
        self.unary_as("root", method, body).await
    }

    pub(crate) async fn unary_as(&self, user: &str, method: &str, body: Value) -> (StatusCode, Value) {
        let request = self
            .request("POST", &format!("/{method}"))
            .header("content-type", "application/json")
            .header("connect-protocol-version", "1")
            .header("authorization", basic(user));
        read_json(self.send(request.body(Full::from(body.to_string())).expect("valid")).await).await
    }

    /// A server stream with JSON, as the SDKs send it.
    pub(crate) async fn stream(&self, method: &str, body: Value, headers: &[(&str, &str)]) -> Events {
        let mut request = self
            .request("POST", &format!("/{method}"))
            .header("content-type", "application/connect+json")
            .header("connect-protocol-version", "1");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let response = self.send(request.body(Full::from(envelope(&body))).expect("valid")).await;
        Events { response, buffer: BytesMut::new() }
    }

    /// A client stream with JSON. Returns the answer, or the error.
    pub(crate) async fn client_stream(&self, method: &str, messages: &[Value]) -> Value {
        let body: Vec<u8> = messages.iter().flat_map(|message| envelope(message).to_vec()).collect();
        let request = self.request("POST", &format!("/{method}")).header("content-type", "application/connect+json");
        let response = self.send(request.body(Full::from(body)).expect("valid")).await;
        let body = response.into_body().collect().await.expect("a body").to_bytes();
        // One message, if any, and the end of the stream.
        let mut answer = Value::Null;
        let mut rest = body;
        while rest.len() >= 5 {
            let (flags, length) = (rest.get_u8(), rest.get_u32() as usize);
            let message: Value = serde_json::from_slice(&rest.split_to(length)).expect("JSON");
            match message.get("error") {
                Some(error) => answer = error.clone(),
                None if flags == 0 => answer = message,
                None => {}
            }
        }
        answer
    }

    /// Starts a shell command and returns its stream.
    pub(crate) async fn shell(&self, command: &str) -> Events {
        self.stream("process.Process/Start", shell(command), &[]).await
    }

    /// Runs a shell command to its end.
    pub(crate) async fn run_shell(&self, command: &str) -> Outcome {
        self.shell(command).await.outcome().await
    }

    /// Our own client, which speaks the binary encoding.
    pub(crate) fn processes(&self) -> ProcessClient<HttpClient> {
        ProcessClient::new(HttpClient::plaintext(), self.client_config())
    }

    pub(crate) fn filesystem(&self) -> FilesystemClient<HttpClient> {
        FilesystemClient::new(HttpClient::plaintext(), self.client_config())
    }

    fn client_config(&self) -> ClientConfig {
        ClientConfig::new(format!("http://{}", self.address).parse().expect("a URI"))
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if let Some(pid) = rustix::process::Pid::from_raw(i32::try_from(self.process.id()).unwrap_or(0)) {
            // Ended already, then.
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        }
        let _ = self.process.wait();
    }
}

pub(crate) fn basic(user: &str) -> String {
    format!("Basic {}", STANDARD.encode(format!("{user}:")))
}

/// `StartRequest` for `sh -c command` without stdin.
pub(crate) fn shell(command: &str) -> Value {
    json!({"process": {"cmd": "/bin/sh", "args": ["-c", command]}, "stdin": false})
}

pub(crate) fn envelope(message: &Value) -> Bytes {
    let message = message.to_string();
    let length = u32::try_from(message.len()).expect("short");
    [&[0][..], &length.to_be_bytes(), message.as_bytes()].concat().into()
}

pub(crate) async fn read_json(response: Response<Incoming>) -> (StatusCode, Value) {
    let status = response.status();
    let body = response.into_body().collect().await.expect("a body").to_bytes();
    let value = serde_json::from_slice(&body).unwrap_or_else(|_| panic!("not JSON: {body:?}"));
    (status, value)
}

/// What came back from a command.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Outcome {
    pub(crate) stdout: String,
    pub(crate) stderr: String,
    /// The end event's fields, or the error that ended the stream.
    pub(crate) end: Value,
}

/// The messages of a server stream.
pub(crate) struct Events {
    pub(crate) response: Response<Incoming>,
    buffer: BytesMut,
}

impl Events {
    /// The next message's `event`, or the stream's end: `{"endStream": …}`. `None` if the connection broke off.
    pub(crate) async fn next(&mut self) -> Option<Value> {
        tokio::time::timeout(PATIENCE, self.next_unbounded()).await.expect("the next event comes in time")
    }

    async fn next_unbounded(&mut self) -> Option<Value> {
        const END_STREAM: u8 = 2;
        loop {
            if self.buffer.len() >= 5 {
                let length = u32::from_be_bytes(self.buffer[1..5].try_into().expect("four bytes")) as usize;
                if self.buffer.len() >= 5 + length {
                    let flags = self.buffer[0];
                    self.buffer.advance(5);
                    let message: Value = serde_json::from_slice(&self.buffer.split_to(length)).expect("JSON");
                    let event = if flags & END_STREAM != 0 {
                        json!({ "endStream": message })
                    } else {
                        message["event"].clone()
                    };
                    return Some(event);
                }
            }
            let frame = self.response.body_mut().frame().await?.ok()?;
            self.buffer.extend_from_slice(&frame.into_data().unwrap_or_default());
        }
    }

    /// Takes the start event and returns its pid.
    pub(crate) async fn pid(&mut self) -> u64 {
        let event = self.next().await.expect("an event");
        event["start"]["pid"].as_u64().unwrap_or_else(|| panic!("no start event: {event}"))
    }

    /// Takes the next data on stdout.
    pub(crate) async fn stdout(&mut self) -> String {
        let event = self.next().await.expect("an event");
        decode(event["data"]["stdout"].as_str().unwrap_or_else(|| panic!("no output: {event}")))
    }

    /// Reads on to the end, skipping keepalives.
    pub(crate) async fn outcome(mut self) -> Outcome {
        let mut outcome = Outcome::default();
        loop {
            let event = self.next().await.expect("the stream ends properly");
            if let Some(end) = event.get("endStream") {
                if let Some(error) = end.get("error") {
                    outcome.end = error.clone();
                }
                return outcome;
            } else if let Some(end) = event.get("end") {
                outcome.end = end.clone();
            } else if let Some(data) = event["data"]["stdout"].as_str() {
                outcome.stdout.push_str(&decode(data));
            } else if let Some(data) = event["data"]["stderr"].as_str() {
                outcome.stderr.push_str(&decode(data));
            }
        }
    }
}

pub(crate) fn decode(base64: &str) -> String {
    String::from_utf8(STANDARD.decode(base64).expect("base64")).expect("text")
}

/// Whether the process runs; zombies don't.
pub(crate) fn is_alive(pid: u64) -> bool {
    let Ok(stat) = std::fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("stat")) else { return false };
    !stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with('Z'))
}

/// Waits for what is to become true.
pub(crate) async fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = tokio::time::Instant::now() + PATIENCE;
    while !condition() {
        assert!(tokio::time::Instant::now() < deadline, "never: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
