//! What the server says to the agent of a sandbox it has just started: is it up, and who it is.
//!
//! The agent runs among code that nobody trusts, so its answers are read as hostile: bounded in size and time, and
//! never believed beyond «it answered».

use std::collections::BTreeMap;
use std::io;
use std::time::Duration;

use belljar_core::key::AccessToken;
use belljar_protocol::envd::ENVD_PORT;
use belljar_protocol::envd::rest::InitRequest;
use belljar_runtime::RunningSandbox;
use bytes::Bytes;
use http::{Request, StatusCode, header};
use http_body_util::Full;
use hyper_util::rt::TokioIo;
use time::OffsetDateTime;

/// A connection attempt made before the guest's network stack is up is lost without an answer, and the kernel would try
/// again only after a second; so the first attempts are short. A machine too busy to answer in that time gets longer
/// ones.
const FIRST_ATTEMPT: Duration = Duration::from_millis(50);
const LONGEST_ATTEMPT: Duration = Duration::from_secs(1);
const PAUSE_BETWEEN_ATTEMPTS: Duration = Duration::from_millis(2);
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// The agent could not be made ready.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AgentError {
    #[error("the agent can't be reached")]
    Connect(#[source] io::Error),
    #[error("the connection to the agent broke")]
    Http(#[from] hyper::Error),
    #[error("the agent did not answer within {} s", ANSWER_TIMEOUT.as_secs())]
    Silent,
    #[error("the agent refused its settings with status {0}")]
    Refused(StatusCode),
}

/// The identity that a sandbox takes on.
#[derive(Debug)]
pub(crate) struct Identity<'a> {
    pub(crate) access_token: Option<&'a AccessToken>,
    pub(crate) env: &'a BTreeMap<String, String>,
    pub(crate) user: &'a str,
    pub(crate) workdir: &'a str,
}

/// Waits until the agent accepts connections, and gives it its identity. The caller bounds the time.
pub(crate) async fn initialise(sandbox: &dyn RunningSandbox, identity: &Identity<'_>) -> Result<(), AgentError> {
    let stream = connect_patiently(sandbox).await?;
    let answer = tokio::time::timeout(ANSWER_TIMEOUT, post_init(stream, identity)).await;
    let status = answer.map_err(|_| AgentError::Silent)??;
    if status.is_success() { Ok(()) } else { Err(AgentError::Refused(status)) }
}

async fn connect_patiently(sandbox: &dyn RunningSandbox) -> Result<tokio::net::TcpStream, AgentError> {
    let mut attempt = FIRST_ATTEMPT;
    loop {
        match tokio::time::timeout(attempt, sandbox.connect(ENVD_PORT)).await {
            Ok(Ok(stream)) => return Ok(stream),
            Ok(Err(error)) if is_not_yet(&error) => {}
            Ok(Err(error)) => return Err(AgentError::Connect(error)),
            Err(_) => attempt = (attempt * 2).min(LONGEST_ATTEMPT),
        }
        tokio::time::sleep(PAUSE_BETWEEN_ATTEMPTS).await;
    }
}

fn is_not_yet(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionRefused
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::TimedOut
            | io::ErrorKind::HostUnreachable
            | io::ErrorKind::NetworkUnreachable
    )
}

async fn post_init(stream: tokio::net::TcpStream, identity: &Identity<'_>) -> Result<StatusCode, hyper::Error> {
    let body = serde_json::to_vec(&InitRequest {
        access_token: identity.access_token.map(|token| token.reveal().to_owned()),
        env_vars: Some(identity.env.clone()),
        default_user: Some(identity.user.to_owned()),
        default_workdir: Some(identity.workdir.to_owned()),
        // The guest's clock may have stood still; it is set by this.
        timestamp: Some(OffsetDateTime::now_utc()),
        ..InitRequest::default()
    })
    .expect("strings and maps of strings always have a JSON form");
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let request = Request::post("/init")
        .header(header::HOST, "agent")
        .header(header::CONTENT_TYPE, "application/json")
        .body(Full::new(Bytes::from(body)))
        .expect("the request is made of constants");
    // The connection's own future moves the bytes; it ends with the answer, because nothing of the body is wanted.
    let exchange = sender.send_request(request);
    tokio::pin!(exchange);
    tokio::select! {
        answer = &mut exchange => answer.map(|answer| answer.status()),
        ended = connection => {
            ended?;
            exchange.await.map(|answer| answer.status())
        }
    }
}
