//! Listing sandboxes: filters, order, pages.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::Json;
use axum::extract::{RawQuery, State};
use belljar_core::id::SandboxId;
use belljar_protocol::api::ListedSandbox;
use belljar_store::SandboxRecord;
use http::{HeaderMap, HeaderValue};
use percent_encoding::percent_decode_str;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::auth::Team;
use super::sandboxes::listed;
use super::{Api, ApiError};

const PAGE: usize = 100;

/// Where a page ended: the start and id of its last sandbox. Both, because several can start in one millisecond.
type Cursor = (i64, SandboxId);

#[derive(Debug, Default)]
struct Query {
    metadata: BTreeMap<String, String>,
    /// Whether running sandboxes are asked for; there are no others.
    running: bool,
    ascending: bool,
    started_after_ms: Option<i64>,
    template: Option<String>,
    limit: usize,
    after: Option<Cursor>,
}

pub(super) async fn list_v1(
    State(api): State<Api>,
    Team(team_id): Team,
    RawQuery(query): RawQuery,
) -> Result<Json<Vec<ListedSandbox>>, ApiError> {
    let mut query = Query::parse(query.as_deref().unwrap_or_default())?;
    query.limit = usize::MAX;
    let (page, _) = query.page(api.manager.list(&team_id));
    Ok(Json(page.iter().map(|record| listed(record)).collect()))
}

pub(super) async fn list_v2(
    State(api): State<Api>,
    Team(team_id): Team,
    RawQuery(query): RawQuery,
) -> Result<(HeaderMap, Json<Vec<ListedSandbox>>), ApiError> {
    let query = Query::parse(query.as_deref().unwrap_or_default())?;
    let all = api.manager.list(&team_id);
    let mut headers = HeaderMap::new();
    headers.insert("x-total-running", HeaderValue::from(all.len()));
    let (page, next) = query.page(all);
    if let Some((started_ms, id)) = next {
        let token =
            HeaderValue::from_str(&format!("{started_ms}_{id}")).expect("digits and an id are valid in a header");
        headers.insert("x-next-token", token);
    }
    Ok((headers, Json(page.iter().map(|record| listed(record)).collect())))
}

impl Query {
    fn parse(text: &str) -> Result<Self, ApiError> {
        let mut query = Self { running: true, limit: PAGE, ..Self::default() };
        for (key, value) in form_pairs(text)? {
            match key.as_str() {
                "metadata" => query.metadata = parse_metadata(&value)?,
                "state" => query.running = parse_states(&value)?,
                "order" => {
                    query.ascending = match value.as_str() {
                        "asc" => true,
                        "desc" => false,
                        _ => return Err(invalid("order", "is `asc` or `desc`")),
                    };
                }
                "startedAfter" => {
                    let time = OffsetDateTime::parse(&value, &Rfc3339)
                        .map_err(|_| invalid("startedAfter", "is a time as in 2026-01-31T12:00:00Z"))?;
                    query.started_after_ms = i64::try_from(time.unix_timestamp_nanos() / 1_000_000).ok();
                }
                "template" => query.template = Some(value),
                "limit" => {
                    query.limit = value
                        .parse()
                        .ok()
                        .filter(|limit| (1..=PAGE).contains(limit))
                        .ok_or_else(|| invalid("limit", format!("is a number from 1 to {PAGE}")))?;
                }
                "nextToken" => query.after = parse_cursor(&value)?,
                other => return Err(invalid(other, "is not a parameter of this call")),
            }
        }
        Ok(query)
    }

    fn page(&self, mut records: Vec<Arc<SandboxRecord>>) -> (Vec<Arc<SandboxRecord>>, Option<Cursor>) {
        records.retain(|record| self.matches(record));
        records.sort_by(|a, b| (a.started_ms, &a.id).cmp(&(b.started_ms, &b.id)));
        if !self.ascending {
            records.reverse();
        }
        let more = records.len() > self.limit;
        records.truncate(self.limit);
        let next = records.last().filter(|_| more).map(|record| (record.started_ms, record.id.clone()));
        (records, next)
    }

    fn matches(&self, record: &SandboxRecord) -> bool {
        let position = (record.started_ms, &record.id);
        let beyond_cursor = self.after.as_ref().is_none_or(|(started_ms, id)| {
            let cursor = (*started_ms, id);
            if self.ascending { position > cursor } else { position < cursor }
        });
        beyond_cursor
            && self.running
            && self.started_after_ms.is_none_or(|start| record.started_ms >= start)
            && self
                .template
                .as_ref()
                .is_none_or(|asked| *asked == record.template_name || asked == record.template_id.as_str())
            && self.metadata.iter().all(|(key, value)| record.metadata.get(key) == Some(value))
    }
}

fn invalid(parameter: &str, why: impl std::fmt::Display) -> ApiError {
    ApiError::bad_request(format!("`{parameter}` {why}"))
}

fn form_pairs(text: &str) -> Result<Vec<(String, String)>, ApiError> {
    let decode = |part: &str| {
        let spaced = part.replace('+', " ");
        let decoded = percent_decode_str(&spaced).decode_utf8().map(|text| text.into_owned());
        decoded.map_err(|_| ApiError::bad_request("The query is not valid UTF-8"))
    };
    text.split('&')
        .filter(|pair| !pair.is_empty())
        .map(|pair| {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            Ok((decode(key)?, decode(value)?))
        })
        .collect()
}

/// The filter is a query within the query, whose keys and values the SDKs encode once more by themselves.
fn parse_metadata(text: &str) -> Result<BTreeMap<String, String>, ApiError> {
    let decode_again = |part: String| percent_decode_str(&part).decode_utf8_lossy().into_owned();
    Ok(form_pairs(text)?.into_iter().map(|(key, value)| (decode_again(key), decode_again(value))).collect())
}

fn parse_states(text: &str) -> Result<bool, ApiError> {
    let mut running = false;
    for state in text.split(',') {
        match state {
            "running" => running = true,
            "paused" => {}
            _ => return Err(invalid("state", "is `running`, `paused` or both")),
        }
    }
    Ok(running)
}

fn parse_cursor(token: &str) -> Result<Option<Cursor>, ApiError> {
    if token.is_empty() {
        return Ok(None);
    }
    token
        .split_once('_')
        .and_then(|(started_ms, id)| Some((started_ms.parse().ok()?, id.parse().ok()?)))
        .map(Some)
        .ok_or_else(|| invalid("nextToken", "is not one that this server gave out"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use belljar_core::id::{TeamId, TemplateId};
    use belljar_core::lifecycle::State;
    use belljar_core::limits::Resources;

    fn record(started_ms: i64, metadata: &[(&str, &str)]) -> Arc<SandboxRecord> {
        Arc::new(SandboxRecord {
            id: SandboxId::generate(),
            team_id: TeamId::generate(),
            template_id: TemplateId::generate(),
            template_name: "base".into(),
            build_id: "build".into(),
            state: State::Running,
            resources: Resources::default(),
            metadata: metadata.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect(),
            env: BTreeMap::new(),
            access_token: None,
            allow_internet_access: None,
            started_ms,
            deadline_ms: started_ms + 1,
        })
    }

    #[test]
    fn pages_cover_everything_once_in_either_order() {
        // Many in one millisecond, so that the cursor's second half counts.
        let all: Vec<_> = (0..25).map(|n| record(n / 10, &[])).collect();
        for order in ["asc", "desc"] {
            let (mut seen, mut token) = (Vec::new(), String::new());
            loop {
                let query = Query::parse(&format!("order={order}&limit=4&nextToken={token}")).expect("a lawful query");
                let (page, next) = query.page(all.clone());
                seen.extend(page);
                let Some((started_ms, id)) = next else { break };
                token = format!("{started_ms}_{id}");
            }
            assert_eq!(seen.len(), all.len());
            assert!(seen.is_sorted_by(|a, b| if order == "asc" {
                a.started_ms <= b.started_ms
            } else {
                a.started_ms >= b.started_ms
            }));
            let mut ids: Vec<_> = seen.iter().map(|record| record.id.clone()).collect();
            ids.sort();
            ids.dedup();
            assert_eq!(ids.len(), all.len());
        }
    }

    #[test]
    fn metadata_is_read_as_both_sdks_encode_it() {
        let matching = record(1, &[("a b", "c&d/é")]);
        let other = record(2, &[("a b", "c")]);
        // As recorded from the Python and the JavaScript SDK.
        for text in
            ["metadata=a%252520b%3Dc%252526d%252F%2525C3%2525A9", "metadata=a%252520b%3Dc%252526d%25252F%2525C3%2525A9"]
        {
            let (page, _) = Query::parse(text).expect("a lawful query").page(vec![matching.clone(), other.clone()]);
            assert_eq!(page, vec![matching.clone()], "{text}");
        }
    }

    #[test]
    fn unlawful_queries_are_refused() {
        for text in [
            "state=dead",
            "order=up",
            "limit=0",
            "limit=101",
            "limit=x",
            "nextToken=zzz",
            "startedAfter=now",
            "nonsense=1",
            "metadata=%ff",
        ] {
            assert!(Query::parse(text).is_err(), "{text} passed");
        }
        assert!(Query::parse("state=running%2Cpaused").expect("lawful").running);
        assert!(!Query::parse("state=paused").expect("lawful").running);
    }
}
