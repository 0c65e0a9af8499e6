//! Who is meant: finds the sandbox and the port that a request is addressed to.
//!
//! There are two ways to say it, and a request may use both, as the SDKs do:
//!
//! 1. `Host: PORT-SANDBOXID.DOMAIN`, with a configured domain. **This wins.** E2B reads the headers only on hosts that
//!    name no sandbox, and it has to be so: a web page that one sandbox serves may send any header to its own origin,
//!    and must not reach another sandbox that way.
//! 2. The headers `E2b-Sandbox-Id` and `E2b-Sandbox-Port`, on any other host.

use belljar_core::id::SandboxId;
use http::header::{HOST, HeaderMap};
use http::request::Parts;
use http::uri::Authority;

/// The port that the agent listens on in every sandbox (E2B's envd).
pub const AGENT_PORT: u16 = 49983;

const SANDBOX_ID_HEADER: &str = "e2b-sandbox-id";
const SANDBOX_PORT_HEADER: &str = "e2b-sandbox-port";

/// The longest id that is echoed in an answer: a DNS label.
const LONGEST_FOREIGN_ID: usize = 63;

/// A port of a sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    pub sandbox_id: SandboxId,
    pub port: u16,
}

/// The request is addressed to a sandbox, but wrongly.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadTarget {
    #[error("Invalid host")]
    Host,
    #[error("Invalid sandbox ID")]
    SandboxId,
    #[error("Invalid sandbox port")]
    Port,
    #[error("Missing header: {0}")]
    MissingHeader(&'static str),
    #[error("Repeated header: {0}")]
    RepeatedHeader(&'static str),
    /// An id such as other E2B servers give out, which no sandbox here can have.
    #[error("The sandbox was not found")]
    NoSuchSandbox(String),
}

/// The text is not a domain.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a domain name")]
pub struct InvalidDomain(String);

/// The domains whose subdomains are sandboxes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Domains(Vec<String>);

impl Domains {
    /// Accepts `example.com`, `Example.com.`, and `example.com:3000`, whose port says nothing here.
    ///
    /// # Errors
    /// The first name that is not a domain.
    pub fn parse<I>(names: I) -> Result<Self, InvalidDomain>
    where
        I: IntoIterator,
        I::Item: AsRef<str>,
    {
        names.into_iter().map(|name| normalized_domain(name.as_ref())).collect::<Result<_, _>>().map(Self)
    }

    /// The target of a request, or `None` if it is not addressed to a sandbox.
    #[must_use]
    pub fn route_of(&self, parts: &Parts) -> Option<Result<Target, BadTarget>> {
        let authority = match authority_of(parts) {
            Ok(authority) => authority,
            // Which of several hosts is meant is for attackers to choose, so nobody is served.
            Err(UnclearAuthority::Repeated) => return Some(Err(BadTarget::Host)),
            Err(UnclearAuthority::Malformed) => return target_in_headers(&parts.headers).map(|_| Err(BadTarget::Host)),
        };
        authority
            .and_then(|authority| self.target_in_host(authority.host()))
            .or_else(|| target_in_headers(&parts.headers))
    }

    fn target_in_host(&self, host: &str) -> Option<Result<Target, BadTarget>> {
        let host = host.strip_suffix('.').unwrap_or(host).to_ascii_lowercase();
        let label = self.0.iter().find_map(|domain| host.strip_suffix(domain.as_str())?.strip_suffix('.'))?;
        let (port, sandbox_id) = label.split_once('-')?;
        // `my-api.example.com` may well be somebody's API. A label is ours when at least one half says so.
        let is_ours = !label.contains('.')
            && (!port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit())
                || sandbox_id.parse::<SandboxId>().is_ok());
        is_ours.then(|| target(sandbox_id, port))
    }
}

fn normalized_domain(name: &str) -> Result<String, InvalidDomain> {
    let invalid = || InvalidDomain(name.to_owned());
    let host = match name.rsplit_once(':') {
        Some((host, port)) => port.parse::<u16>().map(|_| host).map_err(|_| invalid())?,
        None => name,
    };
    let host = host.strip_suffix('.').unwrap_or(host).to_ascii_lowercase();
    let is_label = |label: &str| {
        (1..=63).contains(&label.len())
            && label.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-')
    };
    if host.len() <= 253 && host.split('.').all(is_label) { Ok(host) } else { Err(invalid()) }
}

/// The request does not say which host it is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum UnclearAuthority {
    Repeated,
    Malformed,
}

/// The host a request is for, as the client named it: `:authority` or an absolute URI before the `Host` header
/// (RFC 9112, 3.2.2). `None` for a client of HTTP/1.0 that names none.
pub(crate) fn authority_of(parts: &Parts) -> Result<Option<Authority>, UnclearAuthority> {
    let mut hosts = parts.headers.get_all(HOST).iter();
    let header = hosts.next();
    if hosts.next().is_some() {
        return Err(UnclearAuthority::Repeated);
    }
    let authority = match (parts.uri.authority(), header) {
        (Some(authority), _) => authority.clone(),
        (None, Some(header)) => Authority::try_from(header.as_bytes()).map_err(|_| UnclearAuthority::Malformed)?,
        (None, None) => return Ok(None),
    };
    // `user@host` is read as the one or the other by different programs.
    if authority.as_str().contains('@') { Err(UnclearAuthority::Malformed) } else { Ok(Some(authority)) }
}

fn target_in_headers(headers: &HeaderMap) -> Option<Result<Target, BadTarget>> {
    let pair = single_header(headers, SANDBOX_ID_HEADER).and_then(|sandbox_id| {
        let port = single_header(headers, SANDBOX_PORT_HEADER)?;
        Ok((sandbox_id, port))
    });
    Some(match pair {
        Ok((None, None)) => return None,
        Ok((Some(sandbox_id), Some(port))) => match (std::str::from_utf8(sandbox_id), std::str::from_utf8(port)) {
            (Ok(sandbox_id), Ok(port)) => target(sandbox_id, port),
            (Err(_), _) => Err(BadTarget::SandboxId),
            (_, Err(_)) => Err(BadTarget::Port),
        },
        Ok((None, Some(_))) => Err(BadTarget::MissingHeader("E2b-Sandbox-Id")),
        Ok((Some(_), None)) => Err(BadTarget::MissingHeader("E2b-Sandbox-Port")),
        Err(repeated) => Err(repeated),
    })
}

/// The value of a header that may come once; an empty one counts as absent, as with E2B.
fn single_header<'a>(headers: &'a HeaderMap, name: &'static str) -> Result<Option<&'a [u8]>, BadTarget> {
    let mut values = headers.get_all(name).iter();
    let value = values.next().map(|value| value.as_bytes().trim_ascii()).filter(|value| !value.is_empty());
    if values.next().is_some() { Err(BadTarget::RepeatedHeader(name)) } else { Ok(value) }
}

fn target(sandbox_id: &str, port: &str) -> Result<Target, BadTarget> {
    let is_number = (1..=5).contains(&port.len()) && port.bytes().all(|byte| byte.is_ascii_digit());
    let port = port.parse().ok().filter(|port| is_number && *port != 0).ok_or(BadTarget::Port)?;
    match sandbox_id.parse() {
        Ok(sandbox_id) => Ok(Target { sandbox_id, port }),
        Err(_) if is_foreign_id(sandbox_id) => Err(BadTarget::NoSuchSandbox(sandbox_id.to_owned())),
        Err(_) => Err(BadTarget::SandboxId),
    }
}

/// E2B's rule for ids. One that keeps it is answered like any sandbox that is gone, so that the SDK sees what it
/// would see there.
fn is_foreign_id(text: &str) -> bool {
    (1..=LONGEST_FOREIGN_ID).contains(&text.len())
        && text.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit())
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::Request;
    use proptest::prelude::*;

    const ID: &str = "abcdefghij0123456789";

    fn domains() -> Domains {
        Domains::parse(["example.com", "Sandbox.Test:3000"]).expect("valid")
    }

    fn route(uri: &str, headers: &[(&str, &str)]) -> Option<Result<Target, BadTarget>> {
        let mut request = Request::get(uri);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        domains().route_of(&request.body(()).expect("valid request").into_parts().0)
    }

    fn host(host: &str) -> Option<Result<Target, BadTarget>> {
        route("/", &[("host", host)])
    }

    fn found(port: u16) -> Option<Result<Target, BadTarget>> {
        Some(Ok(Target { sandbox_id: ID.parse().expect("valid id"), port }))
    }

    #[test]
    fn a_host_names_sandbox_and_port() {
        for name in [
            format!("8080-{ID}.example.com"),
            format!("8080-{ID}.example.com:3000"),
            format!("8080-{ID}.EXAMPLE.com."),
            format!("8080-{}.sandbox.test", ID.to_uppercase()),
        ] {
            assert_eq!(host(&name), found(8080), "{name}");
        }
        assert_eq!(route(&format!("http://8080-{ID}.example.com/x"), &[]), found(8080), "as in HTTP/2");
    }

    #[test]
    fn other_hosts_are_the_apis() {
        for name in [
            "example.com",
            "localhost:3000",
            "127.0.0.1",
            "[::1]:3000",
            "api.example.com",
            "my-api.example.com",
            &format!("8080-{ID}.example.org"),
            &format!("8080-{ID}.sub.example.com"),
            &format!("8080-{ID}notexample.com"),
            &format!("user@8080-{ID}.example.com"),
            "-.example.com",
            "",
        ] {
            assert_eq!(host(name), None, "{name}");
        }
    }

    #[test]
    fn a_bad_host_says_what_is_bad() {
        let cases = [
            (format!("0-{ID}.example.com"), BadTarget::Port),
            (format!("65536-{ID}.example.com"), BadTarget::Port),
            (format!("000080-{ID}.example.com"), BadTarget::Port),
            (format!("http-{ID}.example.com"), BadTarget::Port),
            (format!("80-{ID}-client.example.com"), BadTarget::SandboxId),
            ("80-.example.com".to_owned(), BadTarget::SandboxId),
            ("80-a_b.example.com".to_owned(), BadTarget::SandboxId),
            (format!("80-{ID}x.example.com"), BadTarget::NoSuchSandbox(format!("{ID}x"))),
            (format!("80-{}.example.com", "a".repeat(64)), BadTarget::SandboxId),
        ];
        for (name, bad) in cases {
            assert_eq!(host(&name), Some(Err(bad)), "{name}");
        }
    }

    #[test]
    fn headers_name_sandbox_and_port_on_any_host() {
        for name in ["localhost:3000", "127.0.0.1", "sandbox.example.com", "anything.else"] {
            let headers = [("host", name), ("E2b-Sandbox-Id", ID), ("E2B-SANDBOX-PORT", "49983")];
            assert_eq!(route("/", &headers), found(49983), "{name}");
        }
        assert_eq!(route("/", &[("e2b-sandbox-id", ID), ("e2b-sandbox-port", "80")]), found(80), "HTTP/1.0");
    }

    #[test]
    fn the_host_wins_over_headers() {
        let name = format!("8080-{ID}.example.com");
        let other = ID.replace('a', "b");
        assert_eq!(route("/", &[("host", &name), ("e2b-sandbox-id", &other), ("e2b-sandbox-port", "1")]), found(8080));
    }

    #[test]
    fn bad_headers_say_what_is_bad() {
        let cases: [(&[(&str, &str)], BadTarget); 9] = [
            (&[("e2b-sandbox-id", ID)], BadTarget::MissingHeader("E2b-Sandbox-Port")),
            (&[("e2b-sandbox-id", ""), ("e2b-sandbox-port", "80")], BadTarget::MissingHeader("E2b-Sandbox-Id")),
            (&[("e2b-sandbox-id", ID), ("e2b-sandbox-port", "80 ;")], BadTarget::Port),
            (&[("e2b-sandbox-id", ID), ("e2b-sandbox-port", "+80")], BadTarget::Port),
            (&[("e2b-sandbox-id", "a/../b"), ("e2b-sandbox-port", "80")], BadTarget::SandboxId),
            (&[("e2b-sandbox-id", "ä"), ("e2b-sandbox-port", "80")], BadTarget::SandboxId),
            (&[("e2b-sandbox-id", ID), ("e2b-sandbox-port", "８０")], BadTarget::Port),
            (
                &[("e2b-sandbox-id", ID), ("e2b-sandbox-id", ID), ("e2b-sandbox-port", "80")],
                BadTarget::RepeatedHeader(SANDBOX_ID_HEADER),
            ),
            (&[("host", "a b"), ("e2b-sandbox-id", ID), ("e2b-sandbox-port", "80")], BadTarget::Host),
        ];
        for (headers, bad) in cases {
            assert_eq!(route("/", headers), Some(Err(bad)), "{headers:?}");
        }
    }

    #[test]
    fn two_hosts_are_refused() {
        assert_eq!(route("/", &[("host", "localhost"), ("host", "example.com")]), Some(Err(BadTarget::Host)));
    }

    #[test]
    fn a_domain_is_checked_when_configured() {
        for name in ["", ".", "a..b", "*.example.com", "exämple.com", "example.com:port", "a/b", "[::1]"] {
            assert_eq!(Domains::parse([name]), Err(InvalidDomain(name.to_owned())), "{name}");
        }
    }

    proptest! {
        #[test]
        fn nothing_panics_and_what_is_found_is_whole(name in "\\PC{0,200}", id in "\\PC{0,80}", port in "\\PC{0,80}") {
            let mut request = Request::new(());
            for (header, value) in [("host", &name), (SANDBOX_ID_HEADER, &id), (SANDBOX_PORT_HEADER, &port)] {
                if let Ok(value) = http::HeaderValue::from_bytes(value.as_bytes()) {
                    request.headers_mut().insert(header, value);
                }
            }
            if let Some(Ok(target)) = domains().route_of(&request.into_parts().0) {
                prop_assert_eq!(target.sandbox_id.as_str(), id.trim());
                prop_assert_ne!(target.port, 0);
            }
        }

        #[test]
        fn every_port_of_a_sandbox_can_be_named(port in 1_u16.., case in any::<bool>(), suffix in "(:[0-9]{1,5})?") {
            let name = format!("{port}-{ID}.example.com{suffix}");
            prop_assert_eq!(host(&if case { name.to_uppercase() } else { name }), found(port));
        }

        #[test]
        fn a_number_that_is_no_port_is_refused(port in prop_oneof![Just(0_u64), 65_536_u64..]) {
            let name = format!("{port}-{ID}.example.com");
            prop_assert_eq!(host(&name), Some(Err(BadTarget::Port)));
        }

        #[test]
        fn hosts_almost_right_never_find_another_sandbox(label in "[0-9]{0,6}-?[a-z0-9./:@-]{0,40}") {
            let name = format!("{label}.example.com");
            let mut request = Request::new(());
            if let Ok(value) = http::HeaderValue::from_str(&name) {
                request.headers_mut().insert(HOST, value);
            }
            if let Some(Ok(target)) = domains().route_of(&request.into_parts().0) {
                prop_assert!(label.ends_with(&format!("-{}", target.sandbox_id)), "{}", label);
            }
        }
    }
}
