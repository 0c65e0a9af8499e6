//! The one place where a failure becomes an HTTP answer in E2B's shape.
//!
//! What a tenant may read is the message; what the operator may read is logged here, once.

use axum::Json;
use axum::response::{IntoResponse, Response};
use belljar_protocol::api::ErrorBody;
use belljar_store::StoreError;
use http::{HeaderValue, StatusCode, header};
use tracing::error;

use crate::lifecycle::{ChangeError, CreateError};

/// An answer that isn't a success.
#[derive(Debug)]
pub(crate) struct ApiError {
    status: StatusCode,
    message: String,
    /// The SDKs repeat 429, 502, 503 and 504 by themselves; this tells them not to.
    retry_is_useless: bool,
}

impl ApiError {
    pub(crate) fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self { status, message: message.into(), retry_is_useless: false }
    }

    pub(crate) fn bad_request(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, message)
    }

    pub(crate) fn unauthorized(message: impl Into<String>) -> Self {
        Self::new(StatusCode::UNAUTHORIZED, message)
    }

    /// One wording for a sandbox that never was, is gone, or is somebody else's, so that nobody can tell which.
    pub(crate) fn sandbox_not_found(id: &str) -> Self {
        Self::new(StatusCode::NOT_FOUND, format!("Sandbox {id} was not found"))
    }

    /// A failure of the server's own: logged for the operator, without detail for the tenant.
    pub(crate) fn internal(failure: &(dyn std::error::Error + 'static)) -> Self {
        error!(error = failure, "a request failed");
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "The server could not do this; its log says why")
    }

    fn without_retry(mut self) -> Self {
        self.retry_is_useless = true;
        self
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let body = ErrorBody { code: self.status.as_u16(), message: self.message };
        let mut response = (self.status, Json(body)).into_response();
        if self.retry_is_useless {
            response.headers_mut().insert("should-retry", HeaderValue::from_static("false"));
        }
        if self.status == StatusCode::SERVICE_UNAVAILABLE {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
        }
        response
    }
}

impl From<StoreError> for ApiError {
    fn from(failure: StoreError) -> Self {
        Self::internal(&failure)
    }
}

impl From<CreateError> for ApiError {
    fn from(failure: CreateError) -> Self {
        match &failure {
            // A machine that is full now is full in a second too; the caller should hear it at once.
            CreateError::Full(refusal) if refusal.is_temporary() => {
                Self::new(StatusCode::TOO_MANY_REQUESTS, refusal.to_string()).without_retry()
            }
            CreateError::Full(refusal) => Self::bad_request(refusal.to_string()),
            CreateError::Stopping | CreateError::Ended(_) => {
                Self::new(StatusCode::SERVICE_UNAVAILABLE, "The server is stopping")
            }
            CreateError::Busy => Self::new(StatusCode::SERVICE_UNAVAILABLE, failure.to_string()),
            CreateError::IdempotencyMismatch => Self::new(
                StatusCode::CONFLICT,
                "This Idempotency-Key was used with another request; use a new one for each",
            ),
            CreateError::IdempotentGone => {
                Self::new(StatusCode::CONFLICT, "This Idempotency-Key has made a sandbox that is gone; use a new one")
            }
            CreateError::Runtime(_)
            | CreateError::Agent(_)
            | CreateError::Exited(_)
            | CreateError::TooSlow(_)
            | CreateError::Store(_)
            | CreateError::Broken => Self::internal(&failure),
        }
    }
}

/// For handlers of one sandbox: its absence, told with its id, and other failures.
pub(super) fn of_sandbox<E: Into<ChangeError>>(id: &str) -> impl FnOnce(E) -> ApiError + use<E> {
    let id = id.to_owned();
    move |failure| match failure.into() {
        ChangeError::Gone => ApiError::sandbox_not_found(&id),
        failure @ ChangeError::Store(_) => ApiError::internal(&failure),
    }
}
