//! The proxy's own answers: why a request got no further, in the form that the client can use.
//!
//! What E2B's SDKs recognise must stay as it is: the status 502, and in the JSON member `message` the words "was not
//! found" for a sandbox that is gone and "port is not open" for a port that is closed. `Should-Retry: false` keeps
//! them from asking again where the answer can't change.

use belljar_core::id::SandboxId;
use http::header::{
    ACCEPT, ALLOW, CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue,
    RETRY_AFTER, VARY, X_CONTENT_TYPE_OPTIONS,
};
use http::{Response, StatusCode};
use serde::Serialize;

use crate::body::Body;
use crate::page;
use crate::target::{BadTarget, Target};

const SHOULD_RETRY: HeaderName = HeaderName::from_static("should-retry");

/// Every reason for which the proxy answers by itself.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    BadTarget(BadTarget),
    ReservedPath,
    /// CONNECT, other than to begin a WebSocket over HTTP/2.
    Connect,
    NotFound(SandboxId),
    Transitioning(SandboxId),
    LookupFailed(SandboxId),
    TokenMissing(SandboxId),
    TokenInvalid(SandboxId),
    SandboxFull {
        sandbox_id: SandboxId,
        limit: usize,
    },
    ProxyFull,
    Draining,
    PortClosed(Target),
    /// The connection ended, or said something other than HTTP, before the head of an answer was complete.
    NoAnswer(Target),
    AnswerTimeout(Target),
}

/// What an answer says, whatever its form.
#[derive(Debug)]
pub(crate) struct Wording {
    pub(crate) status: StatusCode,
    /// One line for people in a hurry; the page's heading.
    pub(crate) title: &'static str,
    /// For programs and people; the SDKs show it as the text of their exception.
    pub(crate) message: String,
    /// What the reader could do; on the page only.
    pub(crate) hint: &'static str,
    pub(crate) sandbox_id: Option<String>,
    pub(crate) port: Option<u16>,
}

/// The answer in JSON, as E2B's clients read it.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Json<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    sandbox_id: Option<&'a str>,
    message: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    port: Option<u16>,
    code: u16,
}

/// In which form the client wants to read what went wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Form {
    Json,
    Html,
    Text,
}

impl Form {
    /// A page is for a person who follows a link. A script's `fetch` in the same browser gets JSON, whatever it
    /// accepts, for it is about to parse it.
    pub(crate) fn wanted_by(headers: &HeaderMap) -> Self {
        let lower = |name: &str| {
            headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default().to_ascii_lowercase()
        };
        let accept = lower(ACCEPT.as_str());
        let is_script = match lower("sec-fetch-mode").as_str() {
            "navigate" => false,
            "" => headers.contains_key("x-requested-with"),
            _ => true,
        };
        if accept.contains("text/html") && !is_script {
            Self::Html
        } else if accept.contains("text/plain") && !accept.contains("json") && !is_script {
            Self::Text
        } else {
            Self::Json
        }
    }
}

impl Refusal {
    pub(crate) fn into_response(self, form: Form) -> Response<Body> {
        let wording = self.wording();
        let (content_type, body) = match form {
            Form::Json => ("application/json; charset=utf-8", json(&wording)),
            Form::Html => ("text/html; charset=utf-8", page::render(&wording)),
            Form::Text => ("text/plain; charset=utf-8", format!("{}\n", wording.message)),
        };
        let mut response = Response::new(Body::own(body));
        *response.status_mut() = wording.status;
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
        headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
        headers.insert(VARY, HeaderValue::from_static("Accept, Sec-Fetch-Mode, X-Requested-With"));
        headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
        if form == Form::Html {
            headers.insert(CONTENT_SECURITY_POLICY, HeaderValue::from_static(page::SECURITY_POLICY));
        }
        if let Some(should_retry) = self.should_retry() {
            headers.insert(SHOULD_RETRY, HeaderValue::from_static(if should_retry { "true" } else { "false" }));
            if should_retry {
                headers.insert(RETRY_AFTER, HeaderValue::from_static("1"));
            }
        }
        if self == Self::Connect {
            headers.insert(ALLOW, HeaderValue::from_static("GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"));
        }
        response
    }

    /// Whether the same request may fare better in a second. `None`: depends on what runs in the sandbox.
    fn should_retry(&self) -> Option<bool> {
        match self {
            Self::Transitioning(_)
            | Self::LookupFailed(_)
            | Self::SandboxFull { .. }
            | Self::ProxyFull
            | Self::Draining => Some(true),
            Self::BadTarget(_)
            | Self::ReservedPath
            | Self::Connect
            | Self::NotFound(_)
            | Self::TokenMissing(_)
            | Self::TokenInvalid(_) => Some(false),
            Self::PortClosed(_) | Self::NoAnswer(_) | Self::AnswerTimeout(_) => None,
        }
    }

    fn wording(&self) -> Wording {
        let new = |status, title, message: String, hint| Wording {
            status,
            title,
            message,
            hint,
            sandbox_id: None,
            port: None,
        };
        let wording = match self {
            Self::BadTarget(BadTarget::NoSuchSandbox(_)) | Self::NotFound(_) => new(
                StatusCode::BAD_GATEWAY,
                "Sandbox not found",
                "The sandbox was not found".to_owned(),
                "It was killed or paused, or reached its timeout, or the id is mistyped.",
            ),
            Self::BadTarget(bad) => new(
                StatusCode::BAD_REQUEST,
                "Bad sandbox address",
                bad.to_string(),
                "A sandbox is addressed as PORT-SANDBOXID.DOMAIN, or by the headers E2b-Sandbox-Id and E2b-Sandbox-Port.",
            ),
            Self::ReservedPath => new(
                StatusCode::NOT_FOUND,
                "Reserved endpoint",
                "This endpoint is reserved for the server that runs the sandbox and can't be called from outside"
                    .to_owned(),
                "The sandbox's other endpoints are reachable as usual.",
            ),
            Self::Connect => new(
                StatusCode::METHOD_NOT_ALLOWED,
                "Method not allowed",
                "CONNECT is served only to open a WebSocket over HTTP/2, and not on the agent's port".to_owned(),
                "Use a plain request, or a WebSocket.",
            ),
            Self::Transitioning(_) => new(
                StatusCode::CONFLICT,
                "Sandbox not ready",
                "The sandbox is changing its state; try again in a moment".to_owned(),
                "Reload this page in a moment.",
            ),
            Self::LookupFailed(_) => new(
                StatusCode::SERVICE_UNAVAILABLE,
                "Sandbox unavailable",
                "The sandbox could not be looked up; try again in a moment".to_owned(),
                "This is the server's fault. Reload this page in a moment.",
            ),
            Self::TokenMissing(_) => new(
                StatusCode::FORBIDDEN,
                "Access token required",
                "The sandbox is closed to public traffic and the header e2b-traffic-access-token is missing".to_owned(),
                "Whoever created the sandbox has its traffic access token.",
            ),
            Self::TokenInvalid(_) => new(
                StatusCode::FORBIDDEN,
                "Access token invalid",
                "The sandbox is closed to public traffic and the token in the header e2b-traffic-access-token is invalid"
                    .to_owned(),
                "Whoever created the sandbox has its traffic access token.",
            ),
            Self::SandboxFull { limit, .. } => new(
                StatusCode::TOO_MANY_REQUESTS,
                "Too many connections",
                format!("The sandbox has too many concurrent connections (limit: {limit})"),
                "Close some, or wait until others do.",
            ),
            Self::ProxyFull => new(
                StatusCode::SERVICE_UNAVAILABLE,
                "Server busy",
                "The server has all the connections to sandboxes that it may have".to_owned(),
                "Reload this page in a moment.",
            ),
            Self::Draining => new(
                StatusCode::SERVICE_UNAVAILABLE,
                "Server stopping",
                "The server is shutting down".to_owned(),
                "Reload this page in a moment. Sandboxes usually outlive a restart of the server.",
            ),
            Self::PortClosed(_) => new(
                StatusCode::BAD_GATEWAY,
                "Nothing listens on this port",
                "The sandbox is running but port is not open".to_owned(),
                "Start a server in the sandbox that listens on this port, on 0.0.0.0, and reload this page.",
            ),
            Self::NoAnswer(_) => new(
                StatusCode::BAD_GATEWAY,
                "No answer",
                "The server in the sandbox closed the connection or did not answer in HTTP".to_owned(),
                "Look at the output of the server in the sandbox.",
            ),
            Self::AnswerTimeout(_) => new(
                StatusCode::GATEWAY_TIMEOUT,
                "No answer in time",
                "The server in the sandbox did not answer in time".to_owned(),
                "Look at the output of the server in the sandbox.",
            ),
        };
        let (sandbox_id, port) = self.concerned();
        Wording { sandbox_id, port, ..wording }
    }

    fn concerned(&self) -> (Option<String>, Option<u16>) {
        match self {
            Self::PortClosed(target) | Self::NoAnswer(target) | Self::AnswerTimeout(target) => {
                (Some(target.sandbox_id.to_string()), Some(target.port))
            }
            Self::NotFound(id)
            | Self::Transitioning(id)
            | Self::LookupFailed(id)
            | Self::TokenMissing(id)
            | Self::TokenInvalid(id)
            | Self::SandboxFull { sandbox_id: id, .. } => (Some(id.to_string()), None),
            Self::BadTarget(BadTarget::NoSuchSandbox(id)) => (Some(id.clone()), None),
            Self::BadTarget(_) | Self::ReservedPath | Self::Connect | Self::ProxyFull | Self::Draining => (None, None),
        }
    }
}

fn json(wording: &Wording) -> String {
    let json = Json {
        sandbox_id: wording.sandbox_id.as_deref(),
        message: &wording.message,
        port: wording.port,
        code: wording.status.as_u16(),
    };
    serde_json::to_string(&json).expect("strings and numbers always have a JSON form")
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::Request;

    fn form(headers: &[(&str, &str)]) -> Form {
        let mut request = Request::get("/");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        Form::wanted_by(request.body(()).expect("valid request").headers())
    }

    #[test]
    fn browsers_get_a_page_and_programs_json() {
        let navigation = ("accept", "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8");
        assert_eq!(form(&[navigation]), Form::Html);
        assert_eq!(form(&[navigation, ("sec-fetch-mode", "navigate"), ("x-requested-with", "x")]), Form::Html);
        assert_eq!(form(&[navigation, ("sec-fetch-mode", "cors")]), Form::Json);
        assert_eq!(form(&[navigation, ("x-requested-with", "XMLHttpRequest")]), Form::Json);
        assert_eq!(form(&[("accept", "*/*")]), Form::Json);
        assert_eq!(form(&[("accept", "application/json, text/plain, */*")]), Form::Json);
        assert_eq!(form(&[("accept", "text/plain")]), Form::Text);
        assert_eq!(form(&[]), Form::Json);
    }

    #[test]
    fn the_sdks_recognise_what_they_look_for() {
        let sandbox_id: SandboxId = "abcdefghij0123456789".parse().expect("valid id");
        assert_eq!(
            json(&Refusal::NotFound(sandbox_id.clone()).wording()),
            r#"{"sandboxId":"abcdefghij0123456789","message":"The sandbox was not found","code":502}"#
        );
        assert_eq!(
            json(&Refusal::PortClosed(Target { sandbox_id, port: 8080 }).wording()),
            r#"{"sandboxId":"abcdefghij0123456789","message":"The sandbox is running but port is not open","port":8080,"code":502}"#
        );
    }
}
