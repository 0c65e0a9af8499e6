//! The one shape in which plain HTTP requests fail: `{"code": 404, "message": "…"}`. Connect requests fail with
//! [`connectrpc::ConnectError`] instead.

use axum::Json;
use axum::response::{IntoResponse, Response};
use belljar_protocol::envd::rest::ErrorBody;
use http::StatusCode;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct HttpError {
    pub(crate) status: StatusCode,
    pub(crate) message: String,
}

impl HttpError {
    pub(crate) fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self { status, message: message.into() }
    }

    pub(crate) fn bad_request(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, message)
    }

    pub(crate) fn unauthorized(message: impl Into<String>) -> Self {
        Self::new(StatusCode::UNAUTHORIZED, message)
    }

    pub(crate) fn internal(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, message)
    }

    /// For what envd does and this agent does not do yet.
    pub(crate) fn not_served(what: &str) -> Self {
        Self::new(StatusCode::NOT_IMPLEMENTED, format!("{what} not served yet"))
    }
}

impl IntoResponse for HttpError {
    fn into_response(self) -> Response {
        let body = ErrorBody { code: self.status.as_u16(), message: self.message };
        (self.status, Json(body)).into_response()
    }
}
