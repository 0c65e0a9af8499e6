//! Every path the agent answers, in one place.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::{DefaultBodyLimit, FromRef};
use axum::middleware::from_fn_with_state;
use axum::routing::{any_service, get, post};
use belljar_protocol::envd::filesystem::FilesystemExt;
use belljar_protocol::envd::process::ProcessExt;
use connectrpc::{ConnectRpcService, DeadlinePolicy, Limits};
use http::{HeaderName, Method, StatusCode, header};
use tower_http::cors::{AllowHeaders, Any, CorsLayer};

use crate::error::HttpError;
use crate::filesystem::FilesystemService;
use crate::metrics::Meter;
use crate::process::ProcessService;
use crate::state::Sandbox;
use crate::{auth, control, files};

/// The largest Connect message: what one `send_stdin` can carry, and little enough for the smallest sandbox.
const MAX_MESSAGE_BYTES: usize = 64 << 20;

/// The envelope that a message of a stream comes in.
const ENVELOPE_BYTES: usize = 5;

/// The largest body of `POST /init`. Uploads have no limit but the disk.
const MAX_INIT_BYTES: usize = 4 << 20;

/// How long a browser may remember that it is allowed to ask.
const CORS_MAX_AGE: Duration = Duration::from_secs(2 * 60 * 60);

#[derive(Debug, Clone, FromRef)]
struct AppState {
    sandbox: Sandbox,
    meter: Arc<Meter>,
}

pub(crate) fn router(sandbox: Sandbox, processes: ProcessService, filesystem: FilesystemService) -> Router {
    let token = Arc::clone(&sandbox.token);
    let connect = any_service(connect_service(processes, filesystem));
    Router::new()
        .route("/health", get(control::health))
        .route("/init", post(control::init).layer(DefaultBodyLimit::max(MAX_INIT_BYTES)))
        .route("/envs", get(control::envs))
        .route("/metrics", get(control::metrics))
        .route("/files", get(files::download).post(files::upload).layer(DefaultBodyLimit::disable()))
        .route("/files/compose", post(async || HttpError::not_served("composing files is")))
        .route("/freeze", post(async || HttpError::not_served("freezing is")))
        .route("/unfreeze", post(async || HttpError::not_served("freezing is")))
        .route("/collapse", post(async || HttpError::not_served("collapsing memory is")))
        .route("/fsfreeze", post(async || HttpError::not_served("freezing the file system is")))
        .route("/fsthaw", post(async || HttpError::not_served("freezing the file system is")))
        .route("/process.Process/{method}", connect.clone())
        .route("/filesystem.Filesystem/{method}", connect)
        .fallback(async || HttpError::new(StatusCode::NOT_FOUND, "no such endpoint"))
        .method_not_allowed_fallback(async || HttpError::new(StatusCode::METHOD_NOT_ALLOWED, "method not allowed"))
        .with_state(AppState { sandbox, meter: Arc::default() })
        .layer(from_fn_with_state(token, auth::require_token))
        // Outermost: a browser asks for permission without its token.
        .layer(cors())
}

fn connect_service(processes: ProcessService, filesystem: FilesystemService) -> ConnectRpcService {
    let router = Arc::new(processes).register(connectrpc::Router::new());
    let router = Arc::new(filesystem).register(router);
    ConnectRpcService::new(router)
        .with_limits(
            Limits::default()
                .with_max_message_size(MAX_MESSAGE_BYTES)
                .with_max_request_body_size(MAX_MESSAGE_BYTES + ENVELOPE_BYTES),
        )
        // Also the streams of running commands end at their deadline, not only the wait for their first event.
        .with_deadline_policy(DeadlinePolicy::new().with_enforce_on_streams(true))
}

/// The JavaScript SDK also runs in browsers. What a page may read is decided by the token, not by where it is from.
fn cors() -> CorsLayer {
    CorsLayer::new()
        .allow_origin(Any)
        .allow_methods([Method::HEAD, Method::GET, Method::POST, Method::PUT, Method::PATCH, Method::DELETE])
        .allow_headers(AllowHeaders::mirror_request())
        .expose_headers([
            header::LOCATION,
            header::CACHE_CONTROL,
            header::CONTENT_DISPOSITION,
            HeaderName::from_static("x-content-type-options"),
        ])
        .max_age(CORS_MAX_AGE)
}
