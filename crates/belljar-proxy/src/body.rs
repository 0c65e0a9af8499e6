//! The body of an answer: what the sandbox sends, frame by frame, or the proxy's own words.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http_body::{Frame, SizeHint};
use http_body_util::Full;
use hyper::body::Incoming;

use crate::connection::Carrier;
use crate::pool::Permit;

/// The body of every response that [`Proxy::proxy`](crate::Proxy::proxy) gives.
#[derive(Debug)]
pub struct Body(Source);

#[derive(Debug)]
enum Source {
    Own(Full<Bytes>),
    Sandbox(FromSandbox),
}

impl Body {
    pub(crate) fn own(text: impl Into<Bytes>) -> Self {
        Self(Source::Own(Full::new(text.into())))
    }

    pub(crate) fn from_sandbox(body: Incoming, carrier: Carrier, permit: Permit) -> Self {
        Self(Source::Sandbox(FromSandbox { body, carried: Some((carrier, permit)) }))
    }
}

/// Holds what the request occupies until the last frame, or until the client is gone.
#[derive(Debug)]
struct FromSandbox {
    body: Incoming,
    carried: Option<(Carrier, Permit)>,
}

impl FromSandbox {
    fn finish(&mut self) {
        if let Some((carrier, permit)) = self.carried.take() {
            carrier.finish(&permit);
        }
    }
}

impl Drop for FromSandbox {
    fn drop(&mut self) {
        // A receiver that knows the length never asks for the end. Dropped before it, the carrier closes its
        // connection, which is how the server in the sandbox learns that nobody listens.
        if http_body::Body::is_end_stream(&self.body) {
            self.finish();
        }
    }
}

impl http_body::Body for Body {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        let source = match &mut self.0 {
            Source::Own(body) => {
                return Pin::new(body)
                    .poll_frame(context)
                    .map(|frame| frame.map(|frame| frame.map_err(|never| match never {})));
            }
            Source::Sandbox(source) => source,
        };
        let frame = ready!(Pin::new(&mut source.body).poll_frame(context));
        match &frame {
            None => source.finish(),
            Some(Err(_)) => source.carried = None,
            Some(Ok(_)) => {}
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        match &self.0 {
            Source::Own(body) => body.is_end_stream(),
            Source::Sandbox(source) => source.body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.0 {
            Source::Own(body) => body.size_hint(),
            Source::Sandbox(source) => source.body.size_hint(),
        }
    }
}
