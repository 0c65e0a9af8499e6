//! What may be in a request to create a sandbox. A field that asks for something belljar doesn't serve is refused by
//! name: nothing is dropped in silence.

use std::collections::BTreeMap;
use std::time::Duration;

use belljar_core::limits::RequestLimits;
use belljar_protocol::api::NewSandbox;
use serde_json::Value;

use super::ApiError;

/// The name `field` and why it is refused.
fn invalid(field: &str, why: impl std::fmt::Display) -> ApiError {
    ApiError::bad_request(format!("`{field}` {why}"))
}

fn unserved(field: &str) -> ApiError {
    invalid(field, "is not served by this version of belljar; leave it out")
}

/// Reads a timeout in seconds.
pub(super) fn timeout(field: &str, seconds: i64, limits: &RequestLimits) -> Result<Duration, ApiError> {
    let seconds = u32::try_from(seconds)
        .ok()
        .filter(|seconds| i32::try_from(*seconds).is_ok())
        .ok_or_else(|| invalid(field, format!("must be from 0 to {} seconds, not {seconds}", i32::MAX)))?;
    if limits.timeout_s != 0 && seconds > limits.timeout_s {
        return Err(invalid(field, format!("may be at most {} seconds on this server", limits.timeout_s)));
    }
    Ok(Duration::from_secs(seconds.into()))
}

/// Checks everything that a template doesn't have a say in.
pub(super) fn new_sandbox(request: &NewSandbox, limits: &RequestLimits) -> Result<(), ApiError> {
    refuse_unserved(request)?;
    if let Some(metadata) = &request.metadata {
        if metadata.len() > limits.metadata_entries {
            return Err(invalid("metadata", format!("may have at most {} entries", limits.metadata_entries)));
        }
        bounded("metadata", metadata, limits.metadata_bytes)?;
    }
    if let Some(env) = &request.env_vars {
        bounded("envVars", env, limits.env_bytes)?;
        for (name, value) in env {
            if name.is_empty() || name.contains(['=', '\0']) {
                return Err(invalid("envVars", format!("has a name that no process can have: {name:?}")));
            }
            if value.contains('\0') {
                return Err(invalid("envVars", format!("has a value with a NUL character: {name}")));
            }
        }
    }
    Ok(())
}

fn bounded(field: &str, map: &BTreeMap<String, String>, limit: usize) -> Result<(), ApiError> {
    let bytes: usize = map.iter().map(|(key, value)| key.len() + value.len()).sum();
    if bytes > limit {
        return Err(invalid(field, format!("has {bytes} bytes; at most {limit} are allowed")));
    }
    Ok(())
}

fn refuse_unserved(request: &NewSandbox) -> Result<(), ApiError> {
    if request.auto_pause == Some(true) {
        return Err(unserved("autoPause"));
    }
    if request.auto_resume.is_some_and(|resume| resume.enabled) {
        return Err(unserved("autoResume"));
    }
    for (key, value) in request.network.iter().flatten() {
        let asks_for_the_default = match value {
            Value::Null => true,
            Value::Bool(public) => key == "allowPublicTraffic" && *public,
            Value::Array(items) => items.is_empty(),
            Value::Object(entries) => entries.is_empty(),
            Value::Number(_) | Value::String(_) => false,
        };
        if !asks_for_the_default {
            return Err(unserved(&format!("network.{key}")));
        }
    }
    let asks_for_something = |value: &Value| !value.is_null() && value.as_object().is_none_or(|map| !map.is_empty());
    if request.mcp.as_ref().is_some_and(asks_for_something) {
        return Err(unserved("mcp"));
    }
    if request.iam.as_ref().is_some_and(asks_for_something) {
        return Err(unserved("iam"));
    }
    if request.volume_mounts.as_ref().is_some_and(|mounts| !mounts.is_empty()) {
        return Err(unserved("volumeMounts"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn check(mut body: Value) -> Result<(), String> {
        body["templateID"] = json!("base");
        let request: NewSandbox = serde_json::from_value(body).map_err(|error| error.to_string())?;
        new_sandbox(&request, &RequestLimits::default()).map_err(|error| format!("{error:?}"))
    }

    #[test]
    fn what_the_sdks_always_send_passes() {
        for body in [
            json!({}),
            json!({"metadata": {}, "envVars": {}}),
            json!({"timeout": 300, "secure": true, "allow_internet_access": true}),
            json!({"autoPause": false, "autoResume": {"enabled": false}}),
            json!({"network": {"allowPublicTraffic": true, "allowOut": []}, "mcp": null, "volumeMounts": []}),
        ] {
            assert_eq!(check(body.clone()), Ok(()), "{body}");
        }
    }

    #[test]
    fn what_is_not_served_is_refused_by_name() {
        for (body, field) in [
            (json!({"autoPause": true}), "autoPause"),
            (json!({"autoResume": {"enabled": true}}), "autoResume"),
            (json!({"network": {"denyOut": ["0.0.0.0/0"]}}), "network.denyOut"),
            (json!({"network": {"allowPublicTraffic": false}}), "network.allowPublicTraffic"),
            (json!({"mcp": {"github": {}}}), "mcp"),
            (json!({"iam": {"tokens": {"a": {}}}}), "iam"),
            (json!({"volumeMounts": [{"name": "a", "path": "/a"}]}), "volumeMounts"),
            (json!({"nonsense": 1}), "nonsense"),
            (json!({"metadata": {"a": 1}}), "string"),
            (json!({"metadata": {"a": "x".repeat(1_000_000)}}), "metadata"),
            (json!({"envVars": {"A=B": "x"}}), "envVars"),
        ] {
            let refusal = check(body.clone()).expect_err("it must not pass");
            assert!(refusal.contains(field), "{body}: {refusal}");
        }
    }

    #[test]
    fn timeouts_are_bounded() {
        let limits = RequestLimits { timeout_s: 60, ..RequestLimits::default() };
        assert!(timeout("timeout", -1, &limits).is_err());
        assert!(timeout("timeout", 61, &limits).is_err());
        assert!(timeout("timeout", i64::from(i32::MAX) + 1, &RequestLimits::default()).is_err());
        assert_eq!(timeout("timeout", 60, &limits).ok(), Some(Duration::from_secs(60)));
    }
}
