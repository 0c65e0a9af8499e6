//! From a request to its answer: every check, in order.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use belljar_core::id::SandboxId;
use bytes::Bytes;
use http::header::{CONTENT_TYPE, HeaderValue};
use http::request::Parts;
use http::uri::Authority;
use http::{Method, Request, Response, StatusCode, Version};
use http_body_util::BodyExt;
use subtle::ConstantTimeEq;
use tracing::Instrument;

use crate::BoxError;
use crate::body::Body;
use crate::config::Config;
use crate::connection::RequestBody;
use crate::exchange::{Exchange, ExchangeError};
use crate::headers::{self, Client, Rewrite, TRAFFIC_ACCESS_TOKEN};
use crate::pool::{Denied, Permit, Pool};
use crate::refusal::{Form, Refusal};
use crate::reserved;
use crate::sandboxes::{Sandboxes, Unresolved, Upstream};
use crate::target::{AGENT_PORT, BadTarget, Target, authority_of};
use crate::tunnel::{Switch, Wish};

/// How long a stopped proxy waits for its tasks, which have nothing left to do but to end.
const STOP_TIMEOUT: Duration = Duration::from_secs(1);

/// The data plane. Clones share everything.
#[derive(Clone)]
pub struct Proxy {
    config: Arc<Config>,
    sandboxes: Arc<dyn Sandboxes>,
    pool: Arc<Pool>,
}

/// How a [drain](Proxy::drain) went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Drained {
    /// Requests and tunnels that did not end in time and were cut off.
    pub cut: usize,
}

impl Proxy {
    /// Must be called within a tokio runtime.
    #[must_use]
    pub fn new(config: Config, sandboxes: Arc<dyn Sandboxes>) -> Self {
        let pool = Pool::new(config.max_in_flight, config.max_idle, config.idle_timeout);
        Self { config: Arc::new(config), sandboxes, pool }
    }

    /// The target of a request, or `None` if it is not addressed to a sandbox and so is the API's.
    #[must_use]
    pub fn route_of(&self, parts: &Parts) -> Option<Result<Target, BadTarget>> {
        self.config.domains.route_of(parts)
    }

    /// Answers a request: with what the sandbox says, or with why it can't be asked.
    ///
    /// The listener has to serve its connections with upgrades enabled for WebSocket to work, and with
    /// `http2().enable_connect_protocol()` for WebSocket over HTTP/2.
    pub async fn proxy<B>(
        &self,
        target: Result<Target, BadTarget>,
        client: Client,
        request: Request<B>,
    ) -> Response<Body>
    where
        B: http_body::Body<Data = Bytes, Error: Into<BoxError>> + Send + 'static,
    {
        let form = Form::wanted_by(request.headers());
        let answer = match target {
            Ok(target) => {
                let span = tracing::info_span!("proxy", sandbox_id = %target.sandbox_id, port = target.port);
                self.forward(target, client, request).instrument(span).await
            }
            Err(bad) => Err(Refusal::BadTarget(bad)),
        };
        answer.unwrap_or_else(|refusal| refusal.into_response(form))
    }

    /// Ends every connection to a sandbox, whatever it is in the middle of. To be called when the sandbox is gone, and
    /// before it is paused: a snapshot can't hold connections that lead outside. [`Sandboxes::resolve`] should refuse
    /// the sandbox by then, or new connections come; a request that was resolved just before may still bring one.
    pub fn disconnect(&self, id: &SandboxId) {
        self.pool.disconnect(id);
    }

    /// Requests and tunnels in flight, over all sandboxes.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.pool.in_flight()
    }

    /// Refuses new requests, lets those in flight end until the deadline, and then cuts them off.
    pub async fn drain(&self, deadline: Duration) -> Drained {
        let in_time = tokio::time::timeout(deadline, self.pool.drain()).await;
        let cut = if in_time.is_ok() { 0 } else { self.pool.in_flight() };
        if tokio::time::timeout(STOP_TIMEOUT, self.pool.stop()).await.is_err() {
            tracing::warn!("connections to sandboxes were still closing when the proxy stopped");
        }
        Drained { cut }
    }

    async fn forward<B>(
        &self,
        target: Target,
        client: Client,
        mut request: Request<B>,
    ) -> Result<Response<Body>, Refusal>
    where
        B: http_body::Body<Data = Bytes, Error: Into<BoxError>> + Send + 'static,
    {
        let is_agent = target.port == AGENT_PORT;
        if is_agent && reserved::is_reserved(request.uri().path()) {
            return Err(Refusal::ReservedPath);
        }
        let upstream = self.resolve(&target.sandbox_id).await?;
        if !is_agent {
            check_token(&target, upstream.as_ref(), request.headers())?;
        }

        let client_upgrade = hyper::upgrade::on(&mut request);
        let (mut parts, body) = request.into_parts();
        // The agent speaks nothing but HTTP, and a tunnel to it would get past the check of paths.
        let wish = Wish::of(&parts).filter(|_| !is_agent);
        if parts.method == Method::CONNECT && wish.is_none() {
            return Err(Refusal::Connect);
        }
        let permit = self.enter(&target, upstream.as_ref())?;
        let is_grpc = parts.version == Version::HTTP_2 && is_grpc(&parts);
        let host = self.prepare(&mut parts, &target, client, upstream.as_ref())?;
        let body: RequestBody = body.map_err(Into::into).boxed_unsync();

        let exchange =
            Exchange { config: &self.config, lane: permit.lane(), upstream: upstream.as_ref(), port: target.port };
        let answered = match &wish {
            Some(wish) => {
                wish.write_request(&mut parts);
                exchange.http1_unpooled(Request::from_parts(parts, body)).await
            }
            None if is_grpc => exchange.http2(Request::from_parts(parts, body), &host).await,
            None => exchange.http1(Request::from_parts(parts, body)).await,
        };
        let (response, carrier) = match answered {
            Ok(answered) => answered,
            Err(error) => return Err(self.explain(error, target).await),
        };

        let is_switching = response.status() == StatusCode::SWITCHING_PROTOCOLS;
        match wish {
            Some(wish) if is_switching && wish.is_granted(&response) => {
                tracing::debug!("tunnel opened");
                Ok(Switch { wish, client: client_upgrade, carrier, permit }.answer(response))
            }
            _ if is_switching => Err(Refusal::NoAnswer(target)),
            _ => {
                let (mut parts, body) = response.into_parts();
                headers::prepare_response(&mut parts);
                tracing::debug!(status = parts.status.as_u16(), "answered");
                Ok(Response::from_parts(parts, Body::from_sandbox(body, carrier, permit)))
            }
        }
    }

    async fn resolve(&self, id: &SandboxId) -> Result<Arc<dyn Upstream>, Refusal> {
        self.sandboxes.resolve(id).await.map_err(|unresolved| match unresolved {
            Unresolved::NotFound | Unresolved::Stopped => Refusal::NotFound(id.clone()),
            Unresolved::Transitioning => Refusal::Transitioning(id.clone()),
            Unresolved::Failed(source) => {
                tracing::warn!(error = source, "sandbox lookup failed");
                Refusal::LookupFailed(id.clone())
            }
        })
    }

    fn enter(&self, target: &Target, upstream: &dyn Upstream) -> Result<Permit, Refusal> {
        let sandbox_id = &target.sandbox_id;
        self.pool.enter(sandbox_id, upstream.generation(), upstream.max_connections()).map_err(|denied| match denied {
            Denied::SandboxFull { limit } => Refusal::SandboxFull { sandbox_id: sandbox_id.clone(), limit },
            Denied::ProxyFull => Refusal::ProxyFull,
            Denied::Superseded => Refusal::Transitioning(sandbox_id.clone()),
            Denied::Draining => Refusal::Draining,
        })
    }

    /// Makes the request what the sandbox is to see, and says which host it sees.
    fn prepare(
        &self,
        parts: &mut Parts,
        target: &Target,
        client: Client,
        upstream: &dyn Upstream,
    ) -> Result<String, Refusal> {
        let authority = authority_of(parts).map_err(|_| Refusal::BadTarget(BadTarget::Host))?;
        let mask = upstream.request_host_mask().filter(|_| target.port != AGENT_PORT);
        let host = match (mask, &authority) {
            (Some(mask), _) => mask.replace("${PORT}", &target.port.to_string()),
            (None, Some(authority)) => authority.to_string(),
            (None, None) => format!("localhost:{}", target.port),
        };
        let header = HeaderValue::from_str(&host).map_err(|_| Refusal::BadTarget(BadTarget::Host))?;
        let authority: Option<&Authority> = authority.as_ref();
        let trust_forwarded_headers = self.config.trust_forwarded_headers;
        headers::prepare_request(parts, Rewrite { client, authority, host: header, trust_forwarded_headers });
        Ok(host)
    }

    /// What to tell the client when the sandbox gave no answer: often, that it is not there any more.
    async fn explain(&self, error: ExchangeError, target: Target) -> Refusal {
        tracing::debug!(error = &error as &dyn std::error::Error, "no answer from the sandbox");
        if self.pool.is_stopped() {
            return Refusal::Draining;
        }
        if let Err(gone) = self.resolve(&target.sandbox_id).await {
            return gone;
        }
        match error {
            ExchangeError::Connect(_) => Refusal::PortClosed(target),
            // It was cut, and is there: restored in between.
            ExchangeError::Cut => Refusal::Transitioning(target.sandbox_id),
            ExchangeError::Http(_) => Refusal::NoAnswer(target),
            ExchangeError::Timeout => Refusal::AnswerTimeout(target),
        }
    }
}

impl fmt::Debug for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Proxy").field("config", &self.config).field("pool", &self.pool).finish_non_exhaustive()
    }
}

fn check_token(target: &Target, upstream: &dyn Upstream, headers: &http::HeaderMap) -> Result<(), Refusal> {
    let Some(token) = upstream.traffic_access_token() else { return Ok(()) };
    match headers.get(TRAFFIC_ACCESS_TOKEN) {
        None => Err(Refusal::TokenMissing(target.sandbox_id.clone())),
        // In constant time, or its answers would tell how much of a guess is right.
        Some(shown) if bool::from(shown.as_bytes().ct_eq(token.as_bytes())) => Ok(()),
        Some(_) => Err(Refusal::TokenInvalid(target.sandbox_id.clone())),
    }
}

/// gRPC itself, which needs HTTP/2 all the way; not gRPC-Web, which does not.
fn is_grpc(parts: &Parts) -> bool {
    let content_type = parts.headers.get(CONTENT_TYPE).map_or(&[][..], HeaderValue::as_bytes);
    let is_end = |rest: &[u8]| matches!(rest.first(), None | Some(b'+' | b';' | b' '));
    content_type.strip_prefix(b"application/grpc").is_some_and(is_end)
}
