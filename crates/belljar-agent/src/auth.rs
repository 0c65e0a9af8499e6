//! The access token: who may talk to the agent.
//!
//! Once `POST /init` has set a token, every request but `GET /health` must carry it in `X-Access-Token`, a further
//! `/init` included. Before that the agent is open, because nobody but the server can reach it: the proxy sends no
//! traffic to a sandbox that is not initialised, and never lets `/init` through.
//!
//! # Threat model
//!
//! The token keeps strangers out who reach the sandbox's address through the proxy. It does not protect the agent from
//! what runs inside the sandbox: that code may be root there, can read the agent's memory and can kill it. It gains
//! nothing by it, since the agent has no rights outside the sandbox and nothing on the host trusts what it says: the
//! server and the proxy treat every byte from here as a tenant's.

use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::Response;
use belljar_protocol::envd::ACCESS_TOKEN_HEADER;
use http::{HeaderMap, Method};
use subtle::ConstantTimeEq;

use crate::error::HttpError;

/// The token that requests must carry; none until the first `/init` that sets one.
#[derive(Debug, Default)]
pub(crate) struct AccessToken {
    token: RwLock<Option<String>>,
}

impl AccessToken {
    pub(crate) fn set(&self, token: String) {
        *self.token.write().unwrap_or_else(PoisonError::into_inner) = Some(token);
    }

    /// Whether any of the candidates is the token, or no token is needed. Takes the same time wherever they differ.
    pub(crate) fn admits(&self, candidates: &[Option<&str>]) -> bool {
        let token = self.token.read().unwrap_or_else(PoisonError::into_inner);
        let Some(token) = token.as_deref() else { return true };
        candidates.iter().flatten().any(|candidate| candidate.as_bytes().ct_eq(token.as_bytes()).into())
    }
}

/// The token a request carries.
pub(crate) fn presented(headers: &HeaderMap) -> Option<&str> {
    headers.get(ACCESS_TOKEN_HEADER)?.to_str().ok()
}

/// Middleware: answers 401 to what does not carry the token.
pub(crate) async fn require_token(
    State(token): State<Arc<AccessToken>>,
    request: Request,
    next: Next,
) -> Result<Response, HttpError> {
    // `/init` may carry the token in its body instead, and checks it itself.
    let checks_itself = matches!((request.method(), request.uri().path()), (&Method::POST, "/init"));
    let open = matches!((request.method(), request.uri().path()), (&Method::GET | &Method::HEAD, "/health"));
    if open || checks_itself || token.admits(&[presented(request.headers())]) {
        return Ok(next.run(request).await);
    }
    let signed = request.uri().path() == "/files"
        && request.uri().query().is_some_and(|query| query.split('&').any(|pair| pair.starts_with("signature=")));
    if signed {
        return Err(HttpError::not_served("signed URLs are"));
    }
    take_in(request.into_body()).await;
    Err(HttpError::unauthorized("unauthorized access, please provide a valid access token"))
}

/// Takes in what is still under way of a refused request, within bounds: a connection that is closed with something
/// unread is reset, and the client may see that instead of the answer.
async fn take_in(body: Body) {
    const LARGEST_BYTES: usize = 256 << 10;
    const LONGEST: Duration = Duration::from_secs(1);
    // Whether it arrived whole, broke off or was too much makes no difference to the answer.
    let _ = tokio::time::timeout(LONGEST, axum::body::to_bytes(body, LARGEST_BYTES)).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_token_everyone_is_admitted() {
        assert!(AccessToken::default().admits(&[None]));
    }

    #[test]
    fn with_a_token_only_its_bearer_is_admitted() {
        let token = AccessToken::default();
        token.set("secret".into());
        assert!(token.admits(&[None, Some("secret")]));
        for wrong in [None, Some(""), Some("secre"), Some("secrets"), Some("Secret")] {
            assert!(!token.admits(&[wrong]), "{wrong:?}");
        }
    }
}
