//! The control plane's HTTP API, as E2B's `openapi.yml` and its SDK packages speak it.

mod auth;
mod body;
mod error;
mod listing;
mod sandboxes;
mod unserved;
mod validation;

use std::sync::Arc;

use axum::Router;
use axum::extract::{Request, State};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use belljar_core::limits::RequestLimits;
use belljar_store::Store;
use http::{Method, StatusCode};
use tokio::sync::Semaphore;
use tracing::Instrument;

pub(crate) use error::ApiError;

use crate::lifecycle::Manager;

/// What the handlers work with.
#[derive(Debug, Clone)]
pub(crate) struct Api {
    pub(crate) store: Store,
    pub(crate) manager: Manager,
    pub(crate) limits: RequestLimits,
    /// As handed to clients.
    pub(crate) domain: Arc<str>,
    /// Places for requests under way.
    pub(crate) places: Arc<Semaphore>,
}

/// Requests under way at once; one more is told to come back. Creates wait for their turn here, the rest takes
/// milliseconds.
pub(crate) const REQUESTS_UNDER_WAY: usize = 1024;

/// All routes. What E2B has and belljar doesn't serve yet says so.
pub(crate) fn router(api: Api) -> Router {
    let served = Router::new()
        .route("/health", get(async || StatusCode::NO_CONTENT))
        .route("/sandboxes", get(listing::list_v1).post(sandboxes::create_v1))
        .route("/v2/sandboxes", get(listing::list_v2).post(sandboxes::create_v2))
        .route("/sandboxes/{sandbox_id}", get(sandboxes::get).delete(sandboxes::kill))
        .route("/sandboxes/{sandbox_id}/connect", post(sandboxes::connect_v1))
        .route("/v2/sandboxes/{sandbox_id}/connect", post(sandboxes::connect_v2))
        .route("/sandboxes/{sandbox_id}/timeout", post(sandboxes::set_timeout))
        .route("/sandboxes/{sandbox_id}/refreshes", post(sandboxes::refresh));
    unserved::add_to(served)
        .method_not_allowed_fallback(async |method: Method, request: Request| {
            ApiError::new(StatusCode::METHOD_NOT_ALLOWED, format!("{} doesn't take {method}", request.uri().path()))
        })
        .fallback(async |method: Method, request: Request| {
            ApiError::new(StatusCode::NOT_FOUND, format!("there is no {method} {}", request.uri().path()))
        })
        .layer(middleware::from_fn_with_state(api.clone(), admit))
        .layer(middleware::from_fn(trace))
        .with_state(api)
}

/// Turns requests away that there is no place for, at once: waiting would only make a crowd a longer queue.
async fn admit(State(api): State<Api>, request: Request, next: Next) -> Response {
    match api.places.try_acquire() {
        Ok(_place) => next.run(request).await,
        Err(_) => {
            let message = "The server has too many requests under way; try again in a second";
            ApiError::new(StatusCode::SERVICE_UNAVAILABLE, message).into_response()
        }
    }
}

/// Opens a span per request and notes how it ended.
async fn trace(request: Request, next: Next) -> Response {
    let span = tracing::info_span!("request", method = %request.method(), path = request.uri().path());
    async {
        let started = tokio::time::Instant::now();
        let response = next.run(request).await;
        let status = response.status().as_u16();
        tracing::debug!(status, elapsed_us = started.elapsed().as_micros(), "answered");
        response.into_response()
    }
    .instrument(span)
    .await
}
