//! envd: what is spoken with the agent inside a sandbox.
//!
//! Two Connect services ([`process`], [`filesystem`]), generated from `proto/`, and a few plain HTTP endpoints, whose
//! bodies are in [`rest`]. The SDKs speak Connect with JSON, our own client the binary encoding; both are served.

pub mod rest;

/// The envd version the agent answers to. Every feature gate of today's SDKs opens at it, and it has no suffix because
/// the Python SDK can't parse one.
pub const ENVD_VERSION: &str = "0.6.4";

/// The port the agent listens on inside the sandbox; the SDKs have it built in.
pub const ENVD_PORT: u16 = 49983;

/// Carries the sandbox's access token, on every request but `GET /health`.
pub const ACCESS_TOKEN_HEADER: &str = "x-access-token";

/// How many whole seconds a quiet command stream may be before the agent sends a keepalive event.
pub const KEEPALIVE_HEADER: &str = "keepalive-ping-interval";

/// Prefix of the upload headers whose rest names a metadata key and whose value is its value.
pub const METADATA_HEADER_PREFIX: &str = "x-metadata-";

mod generated {
    #![allow(clippy::all, clippy::unwrap_used, missing_debug_implementations, unreachable_pub)]
    connectrpc::include_generated!();
}

pub use generated::{filesystem, process};

#[cfg(test)]
mod tests {
    use super::filesystem::{EntryInfo, FileType};
    use super::process::process_event::data_event::Output;
    use super::process::process_event::{DataEvent, EndEvent, Event};
    use super::process::process_selector::Selector;
    use super::process::{ProcessEvent, SendSignalRequest, Signal, StartRequest, StartResponse};

    /// The exact text that `e2b` 2.63 (Python) sends for `commands.run("ls")`.
    #[test]
    fn reads_what_the_python_sdk_sends() {
        let sent = r#"{"process":{"cmd":"/bin/bash","args":["-l","-c","ls"]},"stdin":false,"fromTomorrow":1}"#;
        let request: StartRequest = serde_json::from_str(sent).expect("unknown fields are ignored");
        assert_eq!(request.process.args, ["-l", "-c", "ls"]);
        assert_eq!(request.process.cwd, None);
        assert_eq!(request.stdin, Some(false));
        assert!(request.pty.is_unset());
    }

    #[test]
    fn signals_travel_by_name() {
        let sent = r#"{"process":{"pid":7},"signal":"SIGNAL_SIGKILL"}"#;
        let request: SendSignalRequest = serde_json::from_str(sent).expect("valid");
        assert_eq!(request.process.selector, Some(Selector::Pid(7)));
        assert_eq!(request.signal.as_known(), Some(Signal::Sigkill));
    }

    /// proto3 JSON: bytes as base64, defaults left out, optional fields present when set.
    #[test]
    fn writes_what_the_sdks_parse() {
        let response = |event| StartResponse { event: ProcessEvent { event: Some(event) }.into() };
        let data = DataEvent { output: Some(Output::Stdout(b"hi\n".as_slice().into())) };
        let text = serde_json::to_string(&response(Event::Data(data.into()))).expect("serialises");
        assert_eq!(text, r#"{"event":{"data":{"stdout":"aGkK"}}}"#);

        let end = EndEvent {
            exit_code: -1,
            exited: false,
            status: "signal: killed".to_owned(),
            error: Some("signal: killed".to_owned()),
        };
        let text = serde_json::to_string(&response(Event::End(end.into()))).expect("serialises");
        assert_eq!(text, r#"{"event":{"end":{"exitCode":-1,"status":"signal: killed","error":"signal: killed"}}}"#);
    }

    #[test]
    fn entries_carry_sizes_as_text_and_types_by_name() {
        let entry = EntryInfo { size: 1 << 40, r#type: FileType::File.into(), is_symlink: true, ..Default::default() };
        let value = serde_json::to_value(&entry).expect("serialises");
        assert_eq!(value["size"], "1099511627776");
        assert_eq!(value["type"], "FILE_TYPE_FILE");
        assert_eq!(value["isSymlink"], true);
    }
}
