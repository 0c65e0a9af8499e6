//! Commands and files of one sandbox.

use std::collections::BTreeMap;

use base64::Engine;
use bytes::Bytes;
use connectrpc::client::{ClientConfig, HttpClient};
use http::{HeaderMap, HeaderValue, Request, Uri, header};
use http_body_util::Full;
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};

use super::{ClientError, Http, exchange};
use crate::envd::process::process_event::Event;
use crate::envd::process::process_event::data_event::Output;
use crate::envd::process::{ProcessClient, ProcessConfig, StartRequest};
use crate::envd::{ACCESS_TOKEN_HEADER, ENVD_PORT};

/// One sandbox, reached through the proxy.
#[derive(Debug, Clone)]
pub struct SandboxClient {
    http: Http,
    url: Uri,
    headers: HeaderMap,
}

/// A command to run in a sandbox.
#[derive(Debug, Clone, Default)]
pub struct Command {
    pub program: String,
    pub arguments: Vec<String>,
    pub env: BTreeMap<String, String>,
    /// The user's home if not set.
    pub cwd: Option<String>,
    /// The template's default user if not set.
    pub user: Option<String>,
}

/// Which of a command's streams some output came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    Stdout,
    Stderr,
}

/// How a command ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exit {
    pub code: i32,
    /// In words, such as `exit status 1` or `signal: killed`.
    pub status: String,
}

impl SandboxClient {
    pub(super) fn new(http: Http, url: Uri, sandbox_id: &str, access_token: Option<&str>) -> Self {
        let mut headers = HeaderMap::new();
        let mut insert = |name, value: &str| {
            if let Ok(value) = HeaderValue::from_str(value) {
                headers.insert(name, value);
            }
        };
        insert("e2b-sandbox-id", sandbox_id);
        insert("e2b-sandbox-port", &ENVD_PORT.to_string());
        if let Some(token) = access_token {
            insert(ACCESS_TOKEN_HEADER, token);
        }
        Self { http, url, headers }
    }

    /// Runs a command to its end. Output is handed on as it arrives, in order.
    ///
    /// # Errors
    /// If the command can't be started or the sandbox goes away meanwhile.
    pub async fn run(&self, command: &Command, mut output: impl FnMut(Stream, &[u8])) -> Result<Exit, ClientError> {
        let mut config = ClientConfig::new(self.url.clone()).with_default_headers(self.headers.clone());
        if let Some(user) = &command.user {
            config = config.with_default_header(header::AUTHORIZATION, basic(user));
        }
        let request = StartRequest {
            process: ProcessConfig {
                cmd: command.program.clone(),
                args: command.arguments.clone(),
                envs: command.env.clone().into_iter().collect(),
                cwd: command.cwd.clone(),
            }
            .into(),
            stdin: Some(false),
            ..StartRequest::default()
        };
        let process = ProcessClient::new(HttpClient::plaintext(), config);
        let mut events = process.start(request).await.map_err(cut_off)?;
        let mut exit = None;
        while let Some(message) = events.message().await.map_err(cut_off)? {
            match &message.to_owned_message().event.event {
                Some(Event::Data(data)) => match &data.output {
                    Some(Output::Stdout(bytes)) => output(Stream::Stdout, bytes),
                    Some(Output::Stderr(bytes)) => output(Stream::Stderr, bytes),
                    Some(Output::Pty(_)) | None => {}
                },
                Some(Event::End(end)) => exit = Some(Exit { code: end.exit_code, status: end.status.clone() }),
                Some(Event::Start(_) | Event::Keepalive(_)) | None => {}
            }
        }
        exit.ok_or(ClientError::NoExitCode)
    }

    /// Writes a file, in one piece, and makes the directories above it.
    ///
    /// # Errors
    /// If the agent refuses, or the sandbox can't be reached.
    pub async fn write_file(&self, path: &str, content: Bytes) -> Result<(), ClientError> {
        let path = utf8_percent_encode(path, NON_ALPHANUMERIC);
        let mut request = Request::post(format!("{}/files?path={path}", self.url.to_string().trim_end_matches('/')))
            .header(header::CONTENT_TYPE, "application/octet-stream")
            .body(Full::new(content))
            .map_err(ClientError::Request)?;
        request.headers_mut().extend(self.headers.clone());
        exchange(&self.http, request).await.map(drop)
    }
}

fn cut_off(error: connectrpc::ConnectError) -> ClientError {
    ClientError::Command(Box::new(error))
}

/// The agent takes the user from here, as E2B's does; it has no password.
fn basic(user: &str) -> String {
    format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(format!("{user}:")))
}
