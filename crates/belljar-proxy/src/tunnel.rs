//! Connections that change their protocol: WebSocket, over HTTP/1.1 (`Upgrade`) and over HTTP/2 (RFC 8441), and
//! whatever else a server agrees to upgrade to. To the server in the sandbox it is always the former.
//!
//! Once upgraded, bytes are copied both ways until both sides have ended, so that each can close its half first.

use std::time::Duration;

use http::header::{CONNECTION, HeaderValue, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY, SEC_WEBSOCKET_VERSION, UPGRADE};
use http::request::Parts;
use http::{Method, Response, StatusCode};
use hyper::body::Incoming;
use hyper::ext::Protocol;
use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_util::rt::TokioIo;
use rand::Rng;

use crate::body::Body;
use crate::connection::Carrier;
use crate::headers;
use crate::pool::Permit;

/// How much may wait in each direction.
const BUFFER_BYTES: usize = 32 * 1024;

/// How long the client's side may take to have the head of the answer written and be free for other bytes.
const SWITCH_TIMEOUT: Duration = Duration::from_secs(30);

/// What a request wants its connection to become.
#[derive(Debug)]
pub(crate) enum Wish {
    /// HTTP/1.1: this protocol.
    Upgrade(HeaderValue),
    /// HTTP/2: a stream that carries WebSocket.
    WebSocketStream,
}

impl Wish {
    pub(crate) fn of(parts: &Parts) -> Option<Self> {
        if parts.method == Method::CONNECT {
            let protocol = parts.extensions.get::<Protocol>()?;
            protocol.as_str().eq_ignore_ascii_case("websocket").then_some(Self::WebSocketStream)
        } else {
            headers::requested_upgrade(parts).map(Self::Upgrade)
        }
    }

    /// Asks the server in the sandbox for the same. To be called when the rest of the request is prepared.
    pub(crate) fn write_request(&self, parts: &mut Parts) {
        let protocol = match self {
            Self::Upgrade(protocol) => protocol.clone(),
            Self::WebSocketStream => {
                parts.method = Method::GET;
                parts.headers.insert(SEC_WEBSOCKET_KEY, websocket_key());
                parts.headers.insert(SEC_WEBSOCKET_VERSION, HeaderValue::from_static("13"));
                HeaderValue::from_static("websocket")
            }
        };
        parts.headers.insert(UPGRADE, protocol);
        parts.headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
    }

    /// Whether the server changed the protocol, and to what was asked for.
    pub(crate) fn is_granted(&self, response: &Response<Incoming>) -> bool {
        let wanted = match self {
            Self::Upgrade(protocol) => protocol.as_bytes(),
            Self::WebSocketStream => b"websocket",
        };
        // The client may have offered several, of which the server takes one.
        let is_wanted = |granted: &[u8]| {
            wanted
                .split(|byte| *byte == b',')
                .any(|offer| offer.trim_ascii().eq_ignore_ascii_case(granted.trim_ascii()))
        };
        response.headers().get(UPGRADE).is_some_and(|granted| is_wanted(granted.as_bytes()))
    }
}

/// The two sides of a tunnel to be.
#[derive(Debug)]
pub(crate) struct Switch {
    pub(crate) wish: Wish,
    pub(crate) client: OnUpgrade,
    /// Keeps the connection open until it is handed over.
    pub(crate) carrier: Carrier,
    pub(crate) permit: Permit,
}

impl Switch {
    /// Tells the client that the server agreed, and carries bytes from then on.
    pub(crate) fn answer(self, mut response: Response<Incoming>) -> Response<Body> {
        let server = hyper::upgrade::on(&mut response);
        let (mut parts, _) = response.into_parts();
        let granted = parts.headers.get(UPGRADE).cloned();
        headers::prepare_response(&mut parts);
        match self.wish {
            Wish::Upgrade(_) => {
                if let Some(protocol) = granted {
                    parts.headers.insert(UPGRADE, protocol);
                }
                parts.headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
            }
            Wish::WebSocketStream => {
                parts.status = StatusCode::OK;
                // It answers the key that was made up here.
                parts.headers.remove(SEC_WEBSOCKET_ACCEPT);
            }
        }
        let Self { client, carrier, permit, .. } = self;
        let requests = permit.lane().requests().clone();
        requests.spawn(async move {
            let cut = permit.lane().drivers().cut.clone();
            // How a tunnel ends is between its ends; both have seen it.
            let _ = cut.run_until_cancelled(carry(client, server, carrier)).await;
            drop(permit);
        });
        Response::from_parts(parts, Body::own(""))
    }
}

async fn carry(client: OnUpgrade, server: OnUpgrade, carrier: Carrier) -> Result<(), crate::BoxError> {
    let server = server.await?;
    drop(carrier);
    let client = tokio::time::timeout(SWITCH_TIMEOUT, client).await??;
    copy_both_ways(client, server).await?;
    Ok(())
}

async fn copy_both_ways(client: Upgraded, server: Upgraded) -> std::io::Result<(u64, u64)> {
    let (mut client, mut server) = (TokioIo::new(client), TokioIo::new(server));
    tokio::io::copy_bidirectional_with_sizes(&mut client, &mut server, BUFFER_BYTES, BUFFER_BYTES).await
}

/// 16 random bytes in base64, which servers echo to prove that they mean WebSocket. The proof is not checked: a server
/// that answers 101 to a request it did not understand harms nobody but its own sandbox.
fn websocket_key() -> HeaderValue {
    const LETTERS: &[u8; 62] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789";
    // The last of 22 letters stands for the last two bits only.
    const LAST_LETTERS: &[u8; 4] = b"AQgw";
    let mut rng = rand::rng();
    let mut key: Vec<u8> = (0..21).map(|_| LETTERS[rng.random_range(0..LETTERS.len())]).collect();
    key.push(LAST_LETTERS[rng.random_range(0..LAST_LETTERS.len())]);
    key.extend_from_slice(b"==");
    HeaderValue::from_bytes(&key).expect("letters and digits are a header value")
}
