//! What the server asks of the agent itself: `/health`, `/init`, `/envs`, `/metrics`.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::Json;
use axum::body::Bytes;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use belljar_protocol::envd::ENVD_VERSION;
use belljar_protocol::envd::rest::{InitRequest, Metrics};
use http::{HeaderMap, StatusCode, header};

use crate::auth;
use crate::error::HttpError;
use crate::metrics::Meter;
use crate::state::{Defaults, Sandbox};

pub(crate) async fn health() -> Response {
    (StatusCode::NO_CONTENT, [(header::CACHE_CONTROL, "no-store")]).into_response()
}

/// Takes what `/init` brings. The token it must show, if one is set already, may be in the header, which leaves the
/// body free to bring a new one, or be the one in the body.
pub(crate) async fn init(
    State(sandbox): State<Sandbox>,
    headers: HeaderMap,
    body: Bytes,
) -> Result<Response, HttpError> {
    let mut request = if body.is_empty() {
        InitRequest::default()
    } else {
        serde_json::from_slice(&body)
            .map_err(|error| HttpError::bad_request(format!("error decoding request: {error}")))?
    };
    let token = request.access_token.take().filter(|token| !token.is_empty());
    if !sandbox.token.admits(&[auth::presented(&headers), token.as_deref()]) {
        return Err(HttpError::unauthorized("access token validation failed"));
    }
    refuse_what_is_not_served(&request)?;
    if apply(&mut sandbox.defaults(), request)
        && let Some(token) = token
    {
        sandbox.token.set(token);
    }
    let headers = [("cache-control", "no-store"), ("x-envd-version", ENVD_VERSION)];
    Ok((StatusCode::NO_CONTENT, headers).into_response())
}

fn refuse_what_is_not_served(request: &InitRequest) -> Result<(), HttpError> {
    for (field, given) in [
        ("hyperloopIP", request.hyperloop_ip.is_some()),
        ("lifecycleID", request.lifecycle_id.is_some()),
        ("caBundle", request.ca_bundle.is_some()),
        ("volumeMounts", request.volume_mounts.as_ref().is_some_and(|mounts| !mounts.is_empty())),
    ] {
        if given {
            return Err(HttpError::not_served(&format!("'{field}' is")));
        }
    }
    Ok(())
}

/// Returns whether the request was news. A repeated or overtaken one must not undo a newer one.
fn apply(defaults: &mut Defaults, request: InitRequest) -> bool {
    if let Some(timestamp) = request.timestamp {
        if defaults.initialised_at.is_some_and(|newest| timestamp <= newest) {
            return false;
        }
        defaults.initialised_at = Some(timestamp);
    }
    if let Some(env) = request.env_vars {
        defaults.replace_env(env);
    }
    if let Some(user) = request.default_user.filter(|user| !user.is_empty()) {
        defaults.user = user;
    }
    if let Some(workdir) = request.default_workdir.filter(|workdir| !workdir.is_empty()) {
        defaults.workdir = Some(workdir);
    }
    true
}

pub(crate) async fn envs(State(sandbox): State<Sandbox>) -> Json<BTreeMap<String, String>> {
    Json(sandbox.defaults().env.clone())
}

pub(crate) async fn metrics(State(meter): State<Arc<Meter>>) -> Result<Json<Metrics>, HttpError> {
    let read = tokio::task::spawn_blocking(move || meter.read()).await;
    let metrics = read
        .map_err(|error| HttpError::internal(error.to_string()))?
        .map_err(|error| HttpError::internal(format!("error reading metrics: {error}")))?;
    Ok(Json(metrics))
}

#[cfg(test)]
mod tests {
    use time::{Duration, OffsetDateTime};

    use super::*;

    #[test]
    fn an_overtaken_init_changes_nothing() {
        let mut defaults = Defaults::default();
        let now = OffsetDateTime::UNIX_EPOCH + Duration::days(20_000);
        let at = |timestamp, user: &str| InitRequest {
            timestamp: Some(timestamp),
            default_user: Some(user.to_owned()),
            ..InitRequest::default()
        };
        assert!(apply(&mut defaults, at(now, "first")));
        assert!(!apply(&mut defaults, at(now, "repeated")));
        assert!(!apply(&mut defaults, at(now - Duration::seconds(1), "late")));
        assert_eq!(defaults.user, "first");
        assert!(apply(&mut defaults, at(now + Duration::milliseconds(1), "second")));
        assert!(apply(&mut defaults, InitRequest::default()), "without a timestamp it is always news");
        assert_eq!(defaults.user, "second");
    }

    #[test]
    fn fields_of_later_features_are_named() {
        let request = InitRequest { ca_bundle: Some("-----BEGIN".into()), ..InitRequest::default() };
        let error = refuse_what_is_not_served(&request).expect_err("refused");
        assert_eq!(
            (error.status, error.message.as_str()),
            (StatusCode::NOT_IMPLEMENTED, "'caBundle' is not served yet")
        );
        let no_mounts = InitRequest { volume_mounts: Some(Vec::new()), ..InitRequest::default() };
        assert_eq!(refuse_what_is_not_served(&no_mounts), Ok(()));
    }
}
