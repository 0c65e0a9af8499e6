//! Reads a JSON request body within bounds of size and time.

use std::time::Duration;

use axum::body::to_bytes;
use axum::extract::{FromRequest, Request};
use bytes::Bytes;
use http::StatusCode;
use serde::de::DeserializeOwned;

use super::{Api, ApiError};

/// A client that sends slower than this is cut off; no request of the control plane is large.
const READ_TIMEOUT: Duration = Duration::from_secs(10);

/// A parsed body, and the bytes it was parsed from.
#[derive(Debug)]
pub(super) struct JsonBody<T> {
    pub(super) value: T,
    pub(super) bytes: Bytes,
}

impl<T: DeserializeOwned> FromRequest<Api> for JsonBody<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, api: &Api) -> Result<Self, ApiError> {
        let limit = api.limits.body_bytes;
        let read = tokio::time::timeout(READ_TIMEOUT, to_bytes(request.into_body(), limit)).await;
        let bytes = read
            .map_err(|_| {
                let message = format!("The body did not arrive within {} seconds", READ_TIMEOUT.as_secs());
                ApiError::new(StatusCode::REQUEST_TIMEOUT, message)
            })?
            .map_err(|_| {
                let message = format!("The body could not be read whole; it may have at most {limit} bytes");
                ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, message)
            })?;
        // A call whose fields are all optional may come without a body.
        let text: &[u8] = if bytes.is_empty() { b"{}" } else { &bytes };
        // With the path of the field that is wrong, which the parser alone doesn't tell.
        let refuse =
            |why: &dyn std::fmt::Display| ApiError::bad_request(format!("The body is not what this call takes: {why}"));
        let mut parser = serde_json::Deserializer::from_slice(text);
        let value = serde_path_to_error::deserialize(&mut parser).map_err(|error| refuse(&error))?;
        parser.end().map_err(|error| refuse(&error))?;
        Ok(Self { value, bytes })
    }
}
