//! A server under test: started, killed, started again, on one state directory.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use belljar_protocol::api::{NewSandbox, Sandbox};
use belljar_protocol::client::{self, Client, Exit, SandboxClient};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::census::Census;

const BELLJAR: &str = env!("CARGO_BIN_EXE_belljar");
const READY_WITHIN: Duration = Duration::from_secs(60);

/// One server and all its sandboxes; both are gone when this is dropped.
pub(crate) struct Server {
    child: Child,
    pub address: String,
    pub key: String,
    pub state_dir: PathBuf,
    pub instance: String,
    config: PathBuf,
    arguments: Vec<String>,
}

impl Server {
    /// Starts a server that ends its sandboxes when it is told to stop.
    pub(crate) fn start() -> Self {
        Self::start_with(&["--kill-on-exit"], &[])
    }

    pub(crate) fn start_with(arguments: &[&str], variables: &[(&str, &str)]) -> Self {
        let state_dir = PathBuf::from(
            std::env::var("BELLJAR_TEST_STATE_DIR").expect("BELLJAR_TEST_STATE_DIR is not set; `make test` sets it"),
        );
        let config = PathBuf::from(std::env::var("BELLJAR_TEST_CONFIG").expect("BELLJAR_TEST_CONFIG is not set"));
        let instance = format!("t{}", std::process::id());
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let address = format!("127.0.0.1:{port}");
        let arguments: Vec<String> = arguments.iter().map(|argument| (*argument).to_owned()).collect();
        let child = spawn(&config, &state_dir, &instance, &address, &arguments, variables);
        let mut server = Self { child, address, key: String::new(), state_dir, instance, config, arguments };
        server.wait_until_ready();
        server.key = server.create_key("default");
        server
    }

    pub(crate) fn create_key(&self, team: &str) -> String {
        let output = self.command(&["key", "create", "--team", team]);
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }

    /// Runs `belljar` beside the server, as its operator and as its user.
    pub(crate) fn command(&self, arguments: &[&str]) -> Output {
        let url = format!("http://{}", self.address);
        Command::new(BELLJAR)
            .args(arguments)
            .args(["--state-dir", self.state_dir.to_str().unwrap()])
            .env("E2B_API_URL", &url)
            .env("E2B_SANDBOX_URL", &url)
            .env("E2B_API_KEY", &self.key)
            .env("BELLJAR_INSTANCE", &self.instance)
            .env("BELLJAR_CONFIG", &self.config)
            .stdin(Stdio::null())
            .output()
            .unwrap()
    }

    /// Ends the server as a crash does.
    pub(crate) fn crash(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Tells the server to stop, and waits until it has.
    pub(crate) fn stop(&mut self) {
        kill(self.pid(), Signal::SIGTERM).unwrap();
        let status = self.child.wait().unwrap();
        assert!(status.success(), "the server ended with {status}");
    }

    /// Starts the server again after [`Self::crash`] or [`Self::stop`].
    pub(crate) fn start_again(&mut self) {
        self.child = spawn(&self.config, &self.state_dir, &self.instance, &self.address, &self.arguments, &[]);
        self.wait_until_ready();
    }

    pub(crate) fn pid(&self) -> Pid {
        Pid::from_raw(i32::try_from(self.child.id()).unwrap())
    }

    pub(crate) fn client(&self) -> Client {
        let url = format!("http://{}", self.address);
        Client::new(&url, &url, &self.key).unwrap()
    }

    pub(crate) fn census(&self) -> Census {
        Census::take(&self.state_dir, &self.instance)
    }

    pub(crate) fn assert_nothing_left(&self) {
        Census::assert_empty(&self.state_dir, &self.instance);
    }

    fn wait_until_ready(&mut self) {
        let deadline = Instant::now() + READY_WITHIN;
        while std::net::TcpStream::connect(&self.address).is_err() || !self.is_healthy() {
            if let Some(status) = self.child.try_wait().unwrap() {
                panic!("the server ended at start with {status}");
            }
            assert!(Instant::now() < deadline, "the server is not ready after {READY_WITHIN:?}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn is_healthy(&self) -> bool {
        use std::io::{Read, Write};
        let Ok(mut stream) = std::net::TcpStream::connect(&self.address) else { return false };
        stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let mut answer = Vec::new();
        let request = b"GET /health HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n";
        stream.write_all(request).is_ok()
            && stream.read_to_end(&mut answer).is_ok()
            && answer.starts_with(b"HTTP/1.1 204")
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // A stopped server leaves its sandboxes; one started to end them doesn't.
        let _ = self.child.kill();
        let _ = self.child.wait();
        let last = ["--kill-on-exit".to_owned()];
        let mut child = spawn(&self.config, &self.state_dir, &self.instance, &self.address, &last, &[]);
        let deadline = Instant::now() + READY_WITHIN;
        while !self.is_healthy() && Instant::now() < deadline && matches!(child.try_wait(), Ok(None)) {
            std::thread::sleep(Duration::from_millis(50));
        }
        let _ = kill(Pid::from_raw(i32::try_from(child.id()).unwrap()), Signal::SIGTERM);
        let _ = child.wait();
    }
}

fn spawn(
    config: &Path,
    state_dir: &Path,
    instance: &str,
    address: &str,
    arguments: &[String],
    variables: &[(&str, &str)],
) -> Child {
    Command::new(BELLJAR)
        .arg("up")
        .args(["--config", config.to_str().unwrap(), "--state-dir", state_dir.to_str().unwrap(), "--listen", address])
        .args(arguments)
        .env("BELLJAR_INSTANCE", instance)
        .env("BELLJAR_LOG", std::env::var("BELLJAR_LOG").unwrap_or_else(|_| "warn".into()))
        .envs(variables.iter().copied())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .unwrap()
}

/// A request for a base sandbox that lives for an hour.
pub(crate) fn base() -> NewSandbox {
    NewSandbox { timeout: Some(3600), ..NewSandbox::of("base") }
}

/// The way into a sandbox just created.
pub(crate) fn inside(client: &Client, sandbox: &Sandbox) -> SandboxClient {
    client.sandbox(&sandbox.sandbox_id, sandbox.envd_access_token.as_deref())
}

/// Runs a line of shell in a sandbox; its exit and its standard output.
pub(crate) async fn shell(
    sandbox: &SandboxClient,
    user: Option<&str>,
    line: &str,
) -> Result<(Exit, String), client::ClientError> {
    let command = client::Command {
        program: "/bin/bash".into(),
        arguments: vec!["-c".into(), line.into()],
        user: user.map(ToOwned::to_owned),
        ..client::Command::default()
    };
    let mut stdout = Vec::new();
    let exit = sandbox
        .run(&command, |stream, bytes| {
            if stream == client::Stream::Stdout {
                stdout.extend_from_slice(bytes);
            }
        })
        .await?;
    Ok((exit, String::from_utf8_lossy(&stdout).into_owned()))
}
