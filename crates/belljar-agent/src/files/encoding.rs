//! Which content encodings a transfer uses: gzip or none.

use http::{HeaderMap, header};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Encoding {
    Identity,
    Gzip,
}

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("no acceptable encoding found, supported: [identity, gzip]")]
pub(super) struct NotAcceptable;

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("unsupported Content-Encoding: {0}, supported: [identity, gzip]")]
pub(super) struct Unsupported(String);

/// How a request's body is encoded.
pub(super) fn of_body(headers: &HeaderMap) -> Result<Encoding, Unsupported> {
    let Some(value) = headers.get(header::CONTENT_ENCODING) else { return Ok(Encoding::Identity) };
    let text = String::from_utf8_lossy(value.as_bytes());
    match text.trim().to_ascii_lowercase().as_str() {
        "" | "identity" => Ok(Encoding::Identity),
        "gzip" => Ok(Encoding::Gzip),
        _ => Err(Unsupported(text.into_owned())),
    }
}

/// How to encode an answer.
///
/// HTTP libraries offer gzip on every request, unasked, and the way to a sandbox is rarely the bottleneck. So a file is
/// compressed only for a client that names gzip and nothing else, which is how the SDKs' `gzip=True` looks, or that
/// takes nothing else. All others get the file as it is, with its length.
pub(super) fn for_answer(headers: &HeaderMap) -> Result<Encoding, NotAcceptable> {
    let mut offers = Vec::new();
    for value in headers.get_all(header::ACCEPT_ENCODING) {
        let text = String::from_utf8_lossy(value.as_bytes()).to_ascii_lowercase();
        offers.extend(text.split(',').map(str::trim).filter(|offer| !offer.is_empty()).map(parse_offer));
    }
    let weight = |name: &str| offers.iter().find(|offer| offer.name == name).map(|offer| offer.weight);
    let anything = weight("*");
    let identity = weight("identity").or(anything.filter(|weight| *weight <= 0.0)).unwrap_or(1.0) > 0.0;
    let gzip = weight("gzip").or(anything).is_some_and(|weight| weight > 0.0);
    let only_gzip = matches!(offers.as_slice(), [offer] if offer.name == "gzip");
    match (identity, gzip) {
        (_, true) if only_gzip => Ok(Encoding::Gzip),
        (true, _) => Ok(Encoding::Identity),
        (false, true) => Ok(Encoding::Gzip),
        (false, false) => Err(NotAcceptable),
    }
}

struct Offer {
    name: String,
    weight: f32,
}

fn parse_offer(text: &str) -> Offer {
    let mut parts = text.split(';').map(str::trim);
    let name = parts.next().unwrap_or_default().to_owned();
    let weight = parts.find_map(|part| part.strip_prefix("q=")?.trim().parse().ok()).unwrap_or(1.0);
    Offer { name, weight }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(name: header::HeaderName, value: &str) -> HeaderMap {
        HeaderMap::from_iter([(name, value.parse().expect("a header value"))])
    }

    #[test]
    fn files_are_compressed_for_those_who_ask_for_just_that() {
        for (offered, expected) in [
            ("gzip", Ok(Encoding::Gzip)),
            ("GZIP;q=0.5", Ok(Encoding::Gzip)),
            ("gzip, deflate, br, zstd", Ok(Encoding::Identity)),
            ("", Ok(Encoding::Identity)),
            ("*", Ok(Encoding::Identity)),
            ("br", Ok(Encoding::Identity)),
            ("identity;q=0, gzip", Ok(Encoding::Gzip)),
            ("gzip, *;q=0", Ok(Encoding::Gzip)),
            ("identity, *;q=0", Ok(Encoding::Identity)),
            ("gzip;q=0", Ok(Encoding::Identity)),
            ("*;q=0", Err(NotAcceptable)),
            ("br, identity;q=0", Err(NotAcceptable)),
        ] {
            assert_eq!(for_answer(&with(header::ACCEPT_ENCODING, offered)), expected, "{offered}");
        }
        assert_eq!(for_answer(&HeaderMap::new()), Ok(Encoding::Identity));
    }

    #[test]
    fn bodies_are_plain_or_gzip() {
        assert_eq!(of_body(&HeaderMap::new()), Ok(Encoding::Identity));
        assert_eq!(of_body(&with(header::CONTENT_ENCODING, "Gzip")), Ok(Encoding::Gzip));
        assert_eq!(of_body(&with(header::CONTENT_ENCODING, "br")), Err(Unsupported("br".into())));
    }
}
