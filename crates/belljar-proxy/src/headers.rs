//! What of a message's head crosses the proxy.
//!
//! Both sides are adversaries of somebody: clients may try to strip or forge what the proxy adds (`Connection:
//! x-forwarded-for`), or to make two parsers disagree on where a body ends; sandboxes may answer anything. So framing
//! is never copied: it is removed, and written anew from the body that was parsed.

use std::net::SocketAddr;

use http::header::{
    CONNECTION, CONTENT_LENGTH, COOKIE, EXPECT, HOST, HeaderMap, HeaderName, HeaderValue, TE, TRANSFER_ENCODING,
    UPGRADE,
};
use http::request::Parts;
use http::uri::{Authority, PathAndQuery};
use http::{Uri, Version};

pub(crate) const TRAFFIC_ACCESS_TOKEN: HeaderName = HeaderName::from_static("e2b-traffic-access-token");

/// Meant for the next hop only (RFC 9110, 7.6.1), whether `Connection` says so or not.
const HOP_BY_HOP: [HeaderName; 9] = [
    CONNECTION,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    HeaderName::from_static("proxy-authenticate"),
    HeaderName::from_static("proxy-authorization"),
    HeaderName::from_static("http2-settings"),
    TE,
    TRANSFER_ENCODING,
    UPGRADE,
];

const FORWARDED: HeaderName = HeaderName::from_static("forwarded");
const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
const FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
const REAL_IP: HeaderName = HeaderName::from_static("x-real-ip");

/// Headers that only belljar itself may write, for whatever it wants to tell the agent.
const INTERNAL_PREFIX: &str = "x-belljar-";

/// The client's end of the connection that a request came on.
#[derive(Debug, Clone, Copy)]
pub struct Client {
    pub address: SocketAddr,
    /// Whether the connection is encrypted, which the sandbox learns as `X-Forwarded-Proto`.
    pub tls: bool,
}

/// What is written into a request on its way.
#[derive(Debug)]
pub(crate) struct Rewrite<'a> {
    pub(crate) client: Client,
    /// As the client named it; `None` if it did not.
    pub(crate) authority: Option<&'a Authority>,
    /// The `Host` that the sandbox is to see.
    pub(crate) host: HeaderValue,
    pub(crate) trust_forwarded_headers: bool,
}

/// Turns a request as received into a request as sent, in HTTP/1.1.
pub(crate) fn prepare_request(parts: &mut Parts, rewrite: Rewrite<'_>) {
    let headers = &mut parts.headers;
    let accepts_trailers = has_token(headers, &TE, "trailers");
    strip_hop_by_hop(headers);
    // The listener has answered 100 Continue itself when it began to read the body.
    headers.remove(EXPECT);
    headers.remove(CONTENT_LENGTH);
    // A secret between the client and the proxy: code in the sandbox that learnt it could invite others.
    headers.remove(TRAFFIC_ACCESS_TOKEN);
    remove_prefixed(headers, INTERNAL_PREFIX);
    if accepts_trailers {
        headers.insert(TE, HeaderValue::from_static("trailers"));
        headers.insert(CONNECTION, HeaderValue::from_static("te"));
    }
    join_cookies(headers);
    write_forwarded(headers, &rewrite);
    headers.insert(HOST, rewrite.host);

    let path = parts.uri.path_and_query().cloned().unwrap_or_else(|| PathAndQuery::from_static("/"));
    parts.uri = Uri::from(path);
    parts.version = Version::HTTP_11;
    parts.extensions.clear();
}

/// Turns a response as received into a response as sent. Its `Content-Length` stays: the answer to a HEAD request
/// has one without a body, and the client's side holds a body to it.
pub(crate) fn prepare_response(parts: &mut http::response::Parts) {
    strip_hop_by_hop(&mut parts.headers);
    remove_prefixed(&mut parts.headers, INTERNAL_PREFIX);
    parts.version = Version::HTTP_11;
}

/// The protocol that a request wants to change its connection to. A change to HTTP/2 is not offered: what follows it
/// would pass unseen by everything that is checked per request.
pub(crate) fn requested_upgrade(parts: &Parts) -> Option<HeaderValue> {
    let mut protocols = parts.headers.get_all(UPGRADE).iter();
    let protocol = protocols.next()?;
    let is_asked = parts.version == Version::HTTP_11 && has_token(&parts.headers, &CONNECTION, "upgrade");
    let is_http = has_token(&parts.headers, &UPGRADE, "h2c") || has_token(&parts.headers, &UPGRADE, "h2");
    (is_asked && !is_http && protocols.next().is_none()).then(|| protocol.clone())
}

/// Whether a header that is a list of tokens holds this one. Parameters (`trailers;q=0.5`) are not looked at.
pub(crate) fn has_token(headers: &HeaderMap, name: &HeaderName, token: &str) -> bool {
    tokens(headers, name)
        .any(|found| found.split(';').next().is_some_and(|found| found.trim().eq_ignore_ascii_case(token)))
}

fn tokens<'a>(headers: &'a HeaderMap, name: &HeaderName) -> impl Iterator<Item = &'a str> {
    headers.get_all(name).iter().filter_map(|value| value.to_str().ok()).flat_map(|value| value.split(','))
}

fn strip_hop_by_hop(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = tokens(headers, &CONNECTION).filter_map(|name| name.trim().parse().ok()).collect();
    for name in named.iter().chain(&HOP_BY_HOP) {
        headers.remove(name);
    }
}

fn remove_prefixed(headers: &mut HeaderMap, prefix: &str) {
    let prefixed: Vec<HeaderName> = headers.keys().filter(|name| name.as_str().starts_with(prefix)).cloned().collect();
    for name in prefixed {
        headers.remove(name);
    }
}

/// HTTP/2 clients may send a header per cookie; in HTTP/1.1 there is one for all (RFC 9113, 8.2.3).
fn join_cookies(headers: &mut HeaderMap) {
    let mut cookies = headers.get_all(COOKIE).iter();
    if let (Some(first), Some(second)) = (cookies.next(), cookies.next()) {
        let all: Vec<&[u8]> = [first, second].into_iter().chain(cookies).map(HeaderValue::as_bytes).collect();
        if let Ok(joined) = HeaderValue::from_bytes(&all.join(b"; ".as_slice())) {
            headers.insert(COOKIE, joined);
        }
    }
}

fn write_forwarded(headers: &mut HeaderMap, rewrite: &Rewrite<'_>) {
    if !rewrite.trust_forwarded_headers {
        remove_prefixed(headers, "x-forwarded-");
        headers.remove(FORWARDED);
        headers.remove(REAL_IP);
    }
    let address = rewrite.client.address.ip().to_canonical().to_string();
    let mut route: Vec<&str> = headers.get_all(FORWARDED_FOR).iter().filter_map(|value| value.to_str().ok()).collect();
    route.push(&address);
    if let Ok(route) = HeaderValue::from_str(&route.join(", ")) {
        headers.insert(FORWARDED_FOR, route);
    }
    let scheme = if rewrite.client.tls { "https" } else { "http" };
    headers.entry(FORWARDED_PROTO).or_insert(HeaderValue::from_static(scheme));
    if let Some(host) = rewrite.authority.and_then(|authority| HeaderValue::from_str(authority.as_str()).ok()) {
        headers.entry(FORWARDED_HOST).or_insert(host);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::Request;

    fn prepared(trust_forwarded_headers: bool, headers: &[(&str, &str)]) -> Parts {
        let mut request = Request::post("http://8080-x.example.com/a%20b?c");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let mut parts = request.body(()).expect("valid request").into_parts().0;
        let authority = Authority::from_static("8080-x.example.com");
        let client = Client { address: "[::ffff:192.0.2.1]:5000".parse().expect("valid address"), tls: true };
        let host = HeaderValue::from_static("8080-x.example.com");
        prepare_request(&mut parts, Rewrite { client, authority: Some(&authority), host, trust_forwarded_headers });
        parts
    }

    fn value<'a>(parts: &'a Parts, name: &str) -> Option<&'a str> {
        parts.headers.get(name).map(|value| value.to_str().expect("text"))
    }

    #[test]
    fn the_target_is_in_origin_form() {
        let parts = prepared(false, &[("host", "other")]);
        assert_eq!(parts.uri, "/a%20b?c");
        assert_eq!(value(&parts, "host"), Some("8080-x.example.com"));
    }

    #[test]
    fn hop_by_hop_headers_stay_behind() {
        let parts = prepared(
            false,
            &[
                ("connection", "X-Access-Token, close, X-Forwarded-For"),
                ("connection", "Host ,x-named"),
                ("x-named", "1"),
                ("x-access-token", "secret"),
                ("keep-alive", "1"),
                ("proxy-connection", "keep-alive"),
                ("proxy-authorization", "x"),
                ("transfer-encoding", "chunked"),
                ("content-length", "5"),
                ("upgrade", "h2c"),
                ("http2-settings", "x"),
                ("te", "gzip"),
                ("expect", "100-continue"),
                ("x-belljar-init", "1"),
                ("e2b-traffic-access-token", "secret"),
                ("x-kept", "1"),
            ],
        );
        let mut names: Vec<&str> = parts.headers.keys().map(HeaderName::as_str).collect();
        names.sort_unstable();
        assert_eq!(names, ["host", "x-forwarded-for", "x-forwarded-host", "x-forwarded-proto", "x-kept"]);
    }

    #[test]
    fn trailers_may_still_be_asked_for() {
        let parts = prepared(false, &[("te", "gzip, Trailers;q=0.5")]);
        assert_eq!(value(&parts, "te"), Some("trailers"));
        assert_eq!(value(&parts, "connection"), Some("te"));
    }

    #[test]
    fn a_strangers_claims_are_replaced() {
        let claims = [
            ("x-forwarded-for", "10.0.0.1"),
            ("x-forwarded-proto", "http"),
            ("x-forwarded-host", "evil"),
            ("x-forwarded-port", "1"),
            ("x-real-ip", "10.0.0.1"),
            ("forwarded", "for=10.0.0.1"),
        ];
        let parts = prepared(false, &claims);
        assert_eq!(value(&parts, "x-forwarded-for"), Some("192.0.2.1"));
        assert_eq!(value(&parts, "x-forwarded-proto"), Some("https"));
        assert_eq!(value(&parts, "x-forwarded-host"), Some("8080-x.example.com"));
        assert_eq!(
            [value(&parts, "x-forwarded-port"), value(&parts, "x-real-ip"), value(&parts, "forwarded")],
            [None; 3]
        );

        let parts = prepared(true, &claims);
        assert_eq!(value(&parts, "x-forwarded-for"), Some("10.0.0.1, 192.0.2.1"));
        assert_eq!(value(&parts, "x-forwarded-proto"), Some("http"));
        assert_eq!(value(&parts, "x-forwarded-host"), Some("evil"));
    }

    #[test]
    fn cookies_become_one_header() {
        let parts = prepared(false, &[("cookie", "a=1"), ("cookie", "b=2"), ("cookie", "c=3")]);
        assert_eq!(parts.headers.get_all("cookie").iter().collect::<Vec<_>>(), ["a=1; b=2; c=3"]);
    }

    #[test]
    fn upgrades_are_recognised() {
        let upgrade = |version, headers: &[(&str, &str)]| {
            let mut request = Request::get("/").version(version);
            for (name, value) in headers {
                request = request.header(*name, *value);
            }
            requested_upgrade(&request.body(()).expect("valid request").into_parts().0)
        };
        let websocket = [("connection", "keep-alive, Upgrade"), ("upgrade", "websocket")];
        assert_eq!(upgrade(Version::HTTP_11, &websocket), Some(HeaderValue::from_static("websocket")));
        assert_eq!(upgrade(Version::HTTP_10, &websocket), None);
        assert_eq!(upgrade(Version::HTTP_11, &websocket[1..]), None);
        assert_eq!(upgrade(Version::HTTP_11, &[("connection", "upgrade"), ("upgrade", "websocket, H2C")]), None);
    }
}
