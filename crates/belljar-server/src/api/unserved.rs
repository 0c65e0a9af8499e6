//! Calls that E2B has and this version doesn't serve. They answer 501 with the feature's name, so that nobody mistakes
//! a gap for a typing error.

use axum::Router;
use axum::routing::any;
use http::StatusCode;

use super::auth::Team;
use super::{Api, ApiError};

const UNSERVED: [(&str, &str); 18] = [
    ("/sandboxes/metrics", "metrics"),
    ("/sandboxes/{sandbox_id}/metrics", "metrics"),
    ("/sandboxes/{sandbox_id}/logs", "logs"),
    ("/v2/sandboxes/{sandbox_id}/logs", "logs"),
    ("/sandboxes/{sandbox_id}/pause", "pausing sandboxes"),
    ("/sandboxes/{sandbox_id}/resume", "resuming sandboxes"),
    ("/sandboxes/{sandbox_id}/fork", "forking sandboxes"),
    ("/sandboxes/{sandbox_id}/snapshots", "snapshots"),
    ("/sandboxes/{sandbox_id}/network", "changing the network of a running sandbox"),
    ("/snapshots", "snapshots"),
    ("/templates", "building templates through the API"),
    ("/templates/{*rest}", "building templates through the API"),
    ("/v2/templates", "building templates through the API"),
    ("/v2/templates/{*rest}", "building templates through the API"),
    ("/v3/templates", "building templates through the API"),
    ("/volumes", "volumes"),
    ("/volumes/{*rest}", "volumes"),
    ("/secrets", "secrets"),
];

pub(super) fn add_to(router: Router<Api>) -> Router<Api> {
    UNSERVED.into_iter().fold(router, |router, (path, feature)| {
        let answer = async move |_: Team| {
            ApiError::new(StatusCode::NOT_IMPLEMENTED, format!("This version of belljar does not serve {feature} yet"))
        };
        router.route(path, any(answer))
    })
}
