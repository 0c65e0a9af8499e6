//! Who is asking: the team whose API key a request carries.

use axum::extract::FromRequestParts;
use belljar_core::id::TeamId;
use belljar_core::key::ApiKey;
use http::request::Parts;

use super::{Api, ApiError};

const HEADER: &str = "x-api-key";

/// The team that a request speaks for. A handler that takes this can't be reached without a valid key.
#[derive(Debug, Clone)]
pub(super) struct Team(pub(super) TeamId);

impl FromRequestParts<Api> for Team {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, api: &Api) -> Result<Self, ApiError> {
        let given = parts
            .headers
            .get(HEADER)
            .ok_or_else(|| ApiError::unauthorized("No API key: send it in the header X-API-Key"))?;
        // One wording for malformed, unknown and revoked, so that nobody learns which keys once were valid.
        let invalid = || ApiError::unauthorized("Invalid API key: `belljar key list` shows the valid ones");
        let key: ApiKey = given.to_str().ok().and_then(|text| text.parse().ok()).ok_or_else(invalid)?;
        let team = api.store.team_of_key(&key.hash()).await?.ok_or_else(invalid)?;
        Ok(Self(team.id))
    }
}
