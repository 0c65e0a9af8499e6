//! Addresses of Debian mirrors, which may carry a password.

use std::fmt;
use std::str::FromStr;

/// The base address of a Debian mirror, such as `http://deb.debian.org/debian`.
///
/// Its `Display` and `Debug` leave credentials out; only apt gets to see them.
#[derive(Clone, PartialEq, Eq)]
pub struct Mirror {
    scheme: &'static str,
    credentials: Option<String>,
    host_and_path: String,
}

/// Why an address is refused.
#[derive(Debug, thiserror::Error)]
#[error(
    "not the address of a Debian mirror: it must begin with http:// or https://, name a host, \
     and have no spaces, quotes, `?` or `#`"
)]
pub struct MirrorError;

impl Mirror {
    /// Where this mirror's security updates are expected: beside `…/debian`, as `…/debian-security`, which is how full
    /// mirrors lay them out; at Debian's own address when the path ends in something else.
    pub fn security(&self) -> Self {
        match self.host_and_path.strip_suffix("/debian") {
            Some(front) => Self { host_and_path: format!("{front}/debian-security"), ..self.clone() },
            None => Self {
                scheme: "http://",
                credentials: None,
                host_and_path: "deb.debian.org/debian-security".to_owned(),
            },
        }
    }

    /// The address with its credentials: for apt's and our own requests, never for a log or for what a sandbox can
    /// read.
    pub(crate) fn with_credentials(&self) -> String {
        match &self.credentials {
            Some(credentials) => format!("{}{credentials}@{}", self.scheme, self.host_and_path),
            None => self.to_string(),
        }
    }

    /// `text` without this mirror's credentials, should it quote them.
    pub(super) fn redact(&self, text: String) -> String {
        match &self.credentials {
            Some(credentials) if text.contains(credentials.as_str()) => text.replace(credentials.as_str(), "…"),
            _ => text,
        }
    }
}

impl Default for Mirror {
    fn default() -> Self {
        Self { scheme: "http://", credentials: None, host_and_path: "deb.debian.org/debian".to_owned() }
    }
}

impl fmt::Display for Mirror {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.scheme, self.host_and_path)
    }
}

impl fmt::Debug for Mirror {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Mirror({self})")
    }
}

impl FromStr for Mirror {
    type Err = MirrorError;

    fn from_str(text: &str) -> Result<Self, MirrorError> {
        let (scheme, rest) = ["http://", "https://"]
            .into_iter()
            .find_map(|scheme| text.strip_prefix(scheme).map(|rest| (scheme, rest)))
            .ok_or(MirrorError)?;
        let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
        let (credentials, host) = match authority.rsplit_once('@') {
            Some((credentials, host)) => (Some(credentials.to_owned()), host),
            None => (None, authority),
        };
        // The address becomes part of a line of sources.list, where brackets and spaces are syntax.
        let foreign = |c: char| c.is_whitespace() || c.is_control() || "\"'\\?#[]<>".contains(c);
        if host.is_empty() || rest.contains(foreign) {
            return Err(MirrorError);
        }
        let host_and_path = format!("{host}/{path}").trim_end_matches('/').to_owned();
        Ok(Self { scheme, credentials, host_and_path })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mirror(text: &str) -> Mirror {
        text.parse().expect("a mirror")
    }

    #[test]
    fn credentials_go_to_apt_alone() {
        let private = mirror("https://reader:s3cret@mirror.example/debian/");
        assert_eq!(private.to_string(), "https://mirror.example/debian");
        assert_eq!(format!("{private:?}"), "Mirror(https://mirror.example/debian)");
        assert_eq!(private.with_credentials(), "https://reader:s3cret@mirror.example/debian");
        assert_eq!(
            private.redact("Err:1 https://reader:s3cret@mirror.example".into()),
            "Err:1 https://…@mirror.example"
        );
        assert_eq!(mirror("http://a/debian").redact("untouched".into()), "untouched");
    }

    #[test]
    fn the_security_archive_is_looked_for_beside_the_main_one() {
        assert_eq!(Mirror::default().security().to_string(), "http://deb.debian.org/debian-security");
        let private = mirror("https://u:p@mirror.example/pub/debian");
        assert_eq!(private.security().with_credentials(), "https://u:p@mirror.example/pub/debian-security");
        assert_eq!(mirror("http://mirror.example/d").security().to_string(), "http://deb.debian.org/debian-security");
    }

    #[test]
    fn what_is_no_plain_http_address_is_refused() {
        for text in
            ["", "deb.debian.org", "ftp://a/debian", "http://", "http:///debian", "http://a b", "http://a/[x=y]"]
        {
            assert!(text.parse::<Mirror>().is_err(), "{text}");
        }
    }
}
