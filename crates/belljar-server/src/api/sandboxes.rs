//! Create, connect, get, kill and the deadlines of sandboxes.

use std::time::Duration;

use axum::Json;
use axum::extract::{Path, State};
use belljar_core::id::SandboxId;
use belljar_core::key::AccessToken;
use belljar_protocol::api::{
    ConnectSandbox, Lifecycle, ListedSandbox, NewSandbox, OnTimeout, Refresh, Sandbox, SandboxDetail, SandboxState,
    SetTimeout,
};
use belljar_protocol::envd::ENVD_VERSION;
use belljar_store::SandboxRecord;
use http::{HeaderMap, StatusCode};
use sha2::{Digest, Sha256};
use time::OffsetDateTime;

use super::auth::Team;
use super::body::JsonBody;
use super::error::of_sandbox;
use super::{Api, ApiError, validation};
use crate::lifecycle::{CreateRequest, Idempotency};

/// Default life in seconds of a sandbox made by the first version of the call, as `openapi.yml` has it.
const TIMEOUT_V1_S: i64 = 15;
/// The same for the second version, as the SDK packages have it.
const TIMEOUT_V2_S: i64 = 300;
/// Longest extension that `refreshes` takes, in seconds, as `openapi.yml` has it.
const LONGEST_REFRESH_S: i64 = 3600;
/// E2B names the machine that runs a sandbox here; there is one.
const CLIENT_ID: &str = "belljar";

const IDEMPOTENCY_HEADER: &str = "idempotency-key";
const IDEMPOTENCY_KEY_BYTES: usize = 255;

pub(super) async fn create_v1(
    State(api): State<Api>,
    team: Team,
    headers: HeaderMap,
    body: JsonBody<NewSandbox>,
) -> Result<(StatusCode, Json<Sandbox>), ApiError> {
    let secure = body.value.secure.unwrap_or(false);
    create(&api, team, &headers, body, TIMEOUT_V1_S, secure).await
}

pub(super) async fn create_v2(
    State(api): State<Api>,
    team: Team,
    headers: HeaderMap,
    body: JsonBody<NewSandbox>,
) -> Result<(StatusCode, Json<Sandbox>), ApiError> {
    if body.value.secure == Some(false) {
        return Err(ApiError::bad_request("`secure` can't be switched off: sandboxes made by this call always are"));
    }
    create(&api, team, &headers, body, TIMEOUT_V2_S, true).await
}

async fn create(
    api: &Api,
    Team(team_id): Team,
    headers: &HeaderMap,
    body: JsonBody<NewSandbox>,
    default_timeout_s: i64,
    secure: bool,
) -> Result<(StatusCode, Json<Sandbox>), ApiError> {
    let request = body.value;
    validation::new_sandbox(&request, &api.limits)?;
    let timeout = validation::timeout("timeout", request.timeout.unwrap_or(default_timeout_s), &api.limits)?;
    let idempotency = idempotency(headers, secure, &body.bytes)?;
    let template = api.store.template_for_team(&request.template_id, &team_id).await?.ok_or_else(|| {
        ApiError::new(StatusCode::NOT_FOUND, format!("Template `{}` was not found", abbreviated(&request.template_id)))
    })?;
    let record = api
        .manager
        .create(CreateRequest {
            team_id,
            template,
            timeout,
            metadata: request.metadata.unwrap_or_default(),
            env: request.env_vars.unwrap_or_default(),
            secure,
            allow_internet_access: request.allow_internet_access,
            idempotency,
        })
        .await?;
    Ok((StatusCode::CREATED, Json(sandbox(api, &record))))
}

/// The same body means something else to another version of the call, so what sets them apart is part of the hash.
fn idempotency(headers: &HeaderMap, secure: bool, body: &[u8]) -> Result<Option<Idempotency>, ApiError> {
    let Some(value) = headers.get(IDEMPOTENCY_HEADER) else { return Ok(None) };
    let key = value.to_str().ok().filter(|key| (1..=IDEMPOTENCY_KEY_BYTES).contains(&key.len())).ok_or_else(|| {
        ApiError::bad_request(format!("Idempotency-Key takes 1 to {IDEMPOTENCY_KEY_BYTES} ASCII characters"))
    })?;
    let request_hash = Sha256::new().chain_update([u8::from(secure)]).chain_update(body).finalize().to_vec();
    Ok(Some(Idempotency { key: key.to_owned(), request_hash }))
}

/// Names from outside are repeated in messages, but not at any length.
fn abbreviated(name: &str) -> String {
    const SHOWN: usize = 80;
    if name.chars().count() > SHOWN { name.chars().take(SHOWN).chain("…".chars()).collect() } else { name.to_owned() }
}

pub(super) async fn connect_v1(
    state: State<Api>,
    team: Team,
    path: Path<String>,
    body: JsonBody<ConnectSandbox>,
) -> Result<Json<Sandbox>, ApiError> {
    if body.value.timeout.is_none() {
        return Err(ApiError::bad_request("`timeout` is missing"));
    }
    connect_v2(state, team, path, body).await
}

/// Never shortens a life: whoever connects must not end it for others.
pub(super) async fn connect_v2(
    State(api): State<Api>,
    Team(team_id): Team,
    Path(id): Path<String>,
    body: JsonBody<ConnectSandbox>,
) -> Result<Json<Sandbox>, ApiError> {
    let sandbox_id = parse_id(&id)?;
    let timeout = validation::timeout("timeout", body.value.timeout.unwrap_or(TIMEOUT_V2_S), &api.limits)?;
    let record = api.manager.set_timeout(&sandbox_id, &team_id, timeout, true).await.map_err(of_sandbox(&id))?;
    Ok(Json(sandbox(&api, &record)))
}

pub(super) async fn get(
    State(api): State<Api>,
    Team(team_id): Team,
    Path(id): Path<String>,
) -> Result<Json<SandboxDetail>, ApiError> {
    let record = api.manager.get(&parse_id(&id)?, &team_id).map_err(of_sandbox(&id))?;
    Ok(Json(detail(&api, &record)))
}

pub(super) async fn kill(
    State(api): State<Api>,
    Team(team_id): Team,
    Path(id): Path<String>,
) -> Result<StatusCode, ApiError> {
    api.manager.kill(&parse_id(&id)?, &team_id).await.map_err(of_sandbox(&id))?;
    Ok(StatusCode::NO_CONTENT)
}

pub(super) async fn set_timeout(
    State(api): State<Api>,
    Team(team_id): Team,
    Path(id): Path<String>,
    body: JsonBody<SetTimeout>,
) -> Result<StatusCode, ApiError> {
    let sandbox_id = parse_id(&id)?;
    let timeout = validation::timeout("timeout", body.value.timeout, &api.limits)?;
    api.manager.set_timeout(&sandbox_id, &team_id, timeout, false).await.map_err(of_sandbox(&id))?;
    Ok(StatusCode::NO_CONTENT)
}

pub(super) async fn refresh(
    State(api): State<Api>,
    Team(team_id): Team,
    Path(id): Path<String>,
    body: JsonBody<Refresh>,
) -> Result<StatusCode, ApiError> {
    let sandbox_id = parse_id(&id)?;
    let seconds = body.value.duration.unwrap_or(TIMEOUT_V1_S);
    if !(0..=LONGEST_REFRESH_S).contains(&seconds) {
        return Err(ApiError::bad_request(format!("`duration` must be from 0 to {LONGEST_REFRESH_S} seconds")));
    }
    let duration = Duration::from_secs(seconds.unsigned_abs());
    api.manager.set_timeout(&sandbox_id, &team_id, duration, true).await.map_err(of_sandbox(&id))?;
    Ok(StatusCode::NO_CONTENT)
}

/// Text that can't be an id is the id of no sandbox.
fn parse_id(text: &str) -> Result<SandboxId, ApiError> {
    text.parse().map_err(|_| ApiError::sandbox_not_found(&abbreviated(text)))
}

fn sandbox(api: &Api, record: &SandboxRecord) -> Sandbox {
    Sandbox {
        template_id: record.template_id.to_string(),
        sandbox_id: record.id.to_string(),
        client_id: CLIENT_ID.into(),
        alias: record.template_name.clone(),
        envd_version: ENVD_VERSION.into(),
        envd_access_token: record.access_token.as_ref().map(|token| AccessToken::reveal(token).to_owned()),
        domain: api.domain.to_string(),
    }
}

pub(super) fn listed(record: &SandboxRecord) -> ListedSandbox {
    ListedSandbox {
        template_id: record.template_id.to_string(),
        sandbox_id: record.id.to_string(),
        client_id: CLIENT_ID.into(),
        alias: record.template_name.clone(),
        started_at: time_of(record.started_ms),
        end_at: time_of(record.deadline_ms),
        cpu_count: record.resources.vcpus,
        memory_mb: record.resources.memory_mib,
        disk_size_mb: record.resources.disk_mib,
        state: SandboxState::Running,
        envd_version: ENVD_VERSION.into(),
        metadata: record.metadata.clone(),
    }
}

fn detail(api: &Api, record: &SandboxRecord) -> SandboxDetail {
    SandboxDetail {
        listed: listed(record),
        domain: api.domain.to_string(),
        envd_access_token: record.access_token.as_ref().map(|token| AccessToken::reveal(token).to_owned()),
        allow_internet_access: record.allow_internet_access,
        lifecycle: Lifecycle { on_timeout: OnTimeout::Kill, auto_resume: false },
    }
}

fn time_of(epoch_ms: i64) -> OffsetDateTime {
    // Deadlines are bounded to 68 years from now, which is well within what a date can say.
    OffsetDateTime::from_unix_timestamp_nanos(i128::from(epoch_ms) * 1_000_000).unwrap_or(OffsetDateTime::UNIX_EPOCH)
}
