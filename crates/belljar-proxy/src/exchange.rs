//! One request and the head of its answer, over a connection that is waiting or a new one.

use std::io;

use http::uri::{Authority, Scheme};
use http::{Method, Request, Response, Uri};
use http_body::Body as _;
use http_body_util::{BodyExt, Empty};
use hyper::body::Incoming;
use tokio::net::TcpStream;

use crate::config::Config;
use crate::connection::{Carrier, Http1Connection, Http2Connection, RequestBody};
use crate::pool::Lane;
use crate::sandboxes::Upstream;

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ExchangeError {
    #[error("no connection to the port")]
    Connect(#[source] io::Error),
    #[error("the sandbox was disconnected")]
    Cut,
    #[error("no answer in HTTP")]
    Http(#[source] hyper::Error),
    #[error("no answer in time")]
    Timeout,
}

/// What it takes to reach one port of one sandbox.
#[derive(Clone, Copy)]
pub(crate) struct Exchange<'a> {
    pub(crate) config: &'a Config,
    pub(crate) lane: &'a Lane,
    pub(crate) upstream: &'a dyn Upstream,
    pub(crate) port: u16,
}

impl Exchange<'_> {
    /// In HTTP/1.1, repeating what a connection closed at the wrong moment left undone, where that is safe.
    pub(crate) async fn http1(
        &self,
        request: Request<RequestBody>,
    ) -> Result<(Response<Incoming>, Carrier), ExchangeError> {
        self.in_time(async {
            let mut request = request;
            if let Some(mut connection) = self.lane.take_http1(self.port) {
                let spare = copy_if_repeatable(&request);
                match connection.send(request).await {
                    Ok(response) => return Ok(self.answered(response, connection)),
                    Err(mut error) => {
                        let unsent = error.take_message();
                        let error = error.into_error();
                        request = match unsent.or_else(|| spare.filter(|_| !error.is_parse())) {
                            Some(again) if !self.lane.is_cut() => again,
                            _ => return Err(self.failed(error)),
                        };
                    }
                }
            }
            self.http1_on_new_connection(request).await
        })
        .await
    }

    /// In HTTP/1.1 on a connection of its own, so that nothing needs repeating.
    pub(crate) async fn http1_unpooled(
        &self,
        request: Request<RequestBody>,
    ) -> Result<(Response<Incoming>, Carrier), ExchangeError> {
        self.in_time(self.http1_on_new_connection(request)).await
    }

    async fn http1_on_new_connection(
        &self,
        request: Request<RequestBody>,
    ) -> Result<(Response<Incoming>, Carrier), ExchangeError> {
        let stream = self.connect().await?;
        let mut connection =
            Http1Connection::open(stream, self.lane.drivers()).await.map_err(|error| self.failed(error))?;
        let response = connection.send(request).await.map_err(|error| self.failed(error.into_error()))?;
        Ok(self.answered(response, connection))
    }

    /// In HTTP/2, on the one connection that all such requests to a port share.
    pub(crate) async fn http2(
        &self,
        mut request: Request<RequestBody>,
        authority: &str,
    ) -> Result<(Response<Incoming>, Carrier), ExchangeError> {
        *request.uri_mut() = absolute(request.uri(), authority);
        request.headers_mut().remove(http::header::HOST);
        request.headers_mut().remove(http::header::CONNECTION);
        *request.version_mut() = http::Version::HTTP_2;
        self.in_time(async {
            let mut request = request;
            if let Some(mut connection) = self.lane.share_http2(self.port) {
                match connection.send(request).await {
                    Ok(response) => return Ok((response, Carrier::Http2 { _connection: connection })),
                    Err(mut error) => match error.take_message() {
                        Some(unsent) if !self.lane.is_cut() => request = unsent,
                        _ => return Err(self.failed(error.into_error())),
                    },
                }
            }
            let stream = self.connect().await?;
            let mut connection =
                Http2Connection::open(stream, self.lane.drivers()).await.map_err(|error| self.failed(error))?;
            self.lane.offer_http2(self.port, connection.clone());
            let response = connection.send(request).await.map_err(|error| self.failed(error.into_error()))?;
            Ok((response, Carrier::Http2 { _connection: connection }))
        })
        .await
    }

    async fn connect(&self) -> Result<TcpStream, ExchangeError> {
        let connecting = tokio::time::timeout(self.config.connect_timeout, self.upstream.connect(self.port));
        let connected = self.lane.drivers().cut.run_until_cancelled(connecting).await.ok_or(ExchangeError::Cut)?;
        let stream = connected.unwrap_or_else(|elapsed| Err(elapsed.into())).map_err(ExchangeError::Connect)?;
        // Small answers must not wait for the acknowledgement of earlier ones.
        stream.set_nodelay(true).map_err(ExchangeError::Connect)?;
        Ok(stream)
    }

    fn answered(&self, response: Response<Incoming>, connection: Http1Connection) -> (Response<Incoming>, Carrier) {
        (response, Carrier::Http1 { connection, port: self.port })
    }

    fn failed(&self, error: hyper::Error) -> ExchangeError {
        if self.lane.is_cut() { ExchangeError::Cut } else { ExchangeError::Http(error) }
    }

    async fn in_time<T>(&self, exchange: impl Future<Output = Result<T, ExchangeError>>) -> Result<T, ExchangeError> {
        match self.config.header_timeout {
            Some(timeout) => tokio::time::timeout(timeout, exchange).await.unwrap_or(Err(ExchangeError::Timeout)),
            None => exchange.await,
        }
    }
}

/// A second copy of a request that the server may see twice: one that changes nothing, and has no body to send again.
fn copy_if_repeatable(request: &Request<RequestBody>) -> Option<Request<RequestBody>> {
    let is_safe = matches!(*request.method(), Method::GET | Method::HEAD | Method::OPTIONS);
    (is_safe && request.body().is_end_stream()).then(|| {
        let mut copy = Request::new(Empty::new().map_err(|never| match never {}).boxed_unsync());
        *copy.method_mut() = request.method().clone();
        *copy.uri_mut() = request.uri().clone();
        *copy.headers_mut() = request.headers().clone();
        copy
    })
}

/// HTTP/2 names scheme and host in every request.
fn absolute(uri: &Uri, authority: &str) -> Uri {
    let mut parts = uri.clone().into_parts();
    parts.scheme = Some(Scheme::HTTP);
    parts.authority = authority.parse::<Authority>().ok().or(Some(Authority::from_static("localhost")));
    Uri::from_parts(parts).expect("scheme, authority and path make a whole")
}
