//! The Rust SDK: the control plane and a sandbox's commands and files, over the same two URLs as E2B's SDKs.
//!
//! It speaks plain HTTP only; put it behind something that speaks TLS, or use it on the server's machine.

mod control;
mod sandbox;

use bytes::Bytes;
use http::{Request, Response, StatusCode, Uri};
use http_body_util::{BodyExt, Full, Limited};
use hyper_util::client::legacy::Client as HyperClient;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;

pub use control::Client;
pub use sandbox::{Command, Exit, SandboxClient, Stream};

/// Answers are small; one that isn't comes from something that is no belljar server.
const ANSWER_BYTES: usize = 16 * 1024 * 1024;

/// An error of somebody else's making, carried along.
type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// A call that did not succeed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    #[error("`{0}` is not an http:// address")]
    Address(String),
    #[error("{url} can't be reached; is the server running?")]
    Unreachable { url: Box<Uri>, source: BoxError },
    #[error("the connection broke")]
    Broken(#[source] BoxError),
    #[error("{message} ({status})")]
    Refused { status: StatusCode, message: String },
    #[error("the server's answer can't be understood")]
    Answer(#[source] serde_json::Error),
    #[error("the request can't be sent")]
    Request(#[source] http::Error),
    /// The agent refused a command, or the stream broke off, as it does when the sandbox ends.
    #[error("the command was refused or cut off")]
    Command(#[source] Box<connectrpc::ConnectError>),
    #[error("the command's stream ended without its exit code")]
    NoExitCode,
}

type Http = HyperClient<HttpConnector, Full<Bytes>>;

fn http() -> Http {
    HyperClient::builder(TokioExecutor::new()).build_http()
}

fn parse_address(text: &str) -> Result<Uri, ClientError> {
    let address = || ClientError::Address(text.to_owned());
    let uri: Uri = text.trim_end_matches('/').parse().map_err(|_| address())?;
    if uri.scheme_str() == Some("http") && uri.authority().is_some() { Ok(uri) } else { Err(address()) }
}

/// Sends a request and returns its body if it succeeded, else the message in E2B's error body.
async fn exchange(http: &Http, request: Request<Full<Bytes>>) -> Result<Bytes, ClientError> {
    let url = Box::new(request.uri().clone());
    let response =
        http.request(request).await.map_err(|error| ClientError::Unreachable { url, source: error.into() })?;
    let (parts, body) = Response::into_parts(response);
    let bytes = Limited::new(body, ANSWER_BYTES).collect().await.map_err(ClientError::Broken)?.to_bytes();
    if parts.status.is_success() {
        return Ok(bytes);
    }
    let message = serde_json::from_slice::<crate::api::ErrorBody>(&bytes)
        .map_or_else(|_| String::from_utf8_lossy(&bytes).into_owned(), |body| body.message);
    Err(ClientError::Refused { status: parts.status, message })
}
