//! Bodies of envd's plain HTTP endpoints (`envd.yaml`).

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use time::OffsetDateTime;

/// Every failed request's body. The SDKs show `message` and map the HTTP status, which `code` repeats.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorBody {
    pub code: u16,
    pub message: String,
}

/// `POST /init`: what the server tells a sandbox when it starts or is restored. Absent fields leave things as they are.
///
/// Unknown fields are refused, so that a newer server learns that an older agent can't do what it asks for.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct InitRequest {
    /// From now on every request but `GET /health` must carry this token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub access_token: Option<String>,
    /// Replaces the environment variables that commands start with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub env_vars: Option<BTreeMap<String, String>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub default_user: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub default_workdir: Option<String>,
    /// A request no newer than one already seen changes nothing.
    #[serde(default, skip_serializing_if = "Option::is_none", with = "time::serde::rfc3339::option")]
    pub timestamp: Option<OffsetDateTime>,
    /// E2B's remaining fields; the agent refuses them by name until it serves them.
    #[serde(rename = "hyperloopIP", default, skip_serializing_if = "Option::is_none")]
    pub hyperloop_ip: Option<String>,
    #[serde(rename = "lifecycleID", default, skip_serializing_if = "Option::is_none")]
    pub lifecycle_id: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca_bundle: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub volume_mounts: Option<Vec<serde_json::Value>>,
}

/// `GET /metrics`: what the sandbox uses of what it has.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Metrics {
    /// Unix time in seconds, by the sandbox's clock.
    pub ts: i64,
    pub cpu_count: u32,
    /// Of all cores together, 0 to 100, since the request before this one.
    pub cpu_used_pct: f32,
    /// Bytes, as are the fields without a unit that follow.
    pub mem_total: u64,
    pub mem_used: u64,
    pub mem_cache: u64,
    pub mem_total_mib: u64,
    pub mem_used_mib: u64,
    pub disk_used: u64,
    pub disk_total: u64,
}

/// One uploaded file, in the answer to `POST /files`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UploadedFile {
    /// Absolute.
    pub path: String,
    pub name: String,
    pub r#type: UploadedFileType,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub metadata: BTreeMap<String, String>,
}

/// envd's schema knows a single value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum UploadedFileType {
    File,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn init_uses_envds_spelling() {
        let text = r#"{"accessToken":"t","envVars":{"A":"1"},"defaultUser":"u","defaultWorkdir":"/w",
            "timestamp":"2026-08-01T00:00:00Z","hyperloopIP":"10.0.0.1","lifecycleID":"x","volumeMounts":[]}"#;
        let request: InitRequest = serde_json::from_str(text).expect("every field is known");
        assert_eq!(request.access_token.as_deref(), Some("t"));
        assert_eq!(request.hyperloop_ip.as_deref(), Some("10.0.0.1"));
        assert_eq!(serde_json::to_value(InitRequest::default()).expect("serialises"), serde_json::json!({}));
    }

    #[test]
    fn init_names_a_field_it_does_not_know() {
        let error = serde_json::from_str::<InitRequest>(r#"{"fromTomorrow":1}"#).expect_err("refused");
        assert!(error.to_string().contains("fromTomorrow"), "{error}");
    }

    #[test]
    fn uploads_without_metadata_leave_it_out() {
        let file = UploadedFile {
            path: "/a/b".into(),
            name: "b".into(),
            r#type: UploadedFileType::File,
            metadata: BTreeMap::new(),
        };
        assert_eq!(serde_json::to_string(&file).expect("serialises"), r#"{"path":"/a/b","name":"b","type":"file"}"#);
    }
}
