//! The agent's control endpoints, which only the server may call, over its own connection. They share the port with
//! what the SDKs call, so the proxy keeps strangers away from them.
//!
//! What the agent's router would make of a path is not what a later one might, so a path is judged under every
//! reading of it: each level of percent-encoding, `\` as `/`, empty and dot segments resolved, parameters cut off,
//! upper case as lower case. Refusing too much costs nothing, as no public endpoint comes near these names.

/// Marked `x-internal` in `envd.yaml`, and `/upgrade`, which E2B's proxy adds; `belljar` for what is our own.
const RESERVED: [&[u8]; 8] =
    [b"init", b"freeze", b"unfreeze", b"collapse", b"fsfreeze", b"fsthaw", b"upgrade", b"belljar"];

/// Deeper encoding than this has no honest reason, and each level costs a pass over the path.
const MAX_ENCODING_LEVELS: usize = 8;

/// Whether a path of the agent, as it stands in a request, is or may be read as a control endpoint.
pub(crate) fn is_reserved(path: &str) -> bool {
    let mut path = path.as_bytes().to_vec();
    for _ in 0..MAX_ENCODING_LEVELS {
        if starts_reserved(&path) {
            return true;
        }
        let decoded = percent_decoded(&path);
        if decoded.len() == path.len() {
            return false;
        }
        path = decoded;
    }
    true
}

fn starts_reserved(path: &[u8]) -> bool {
    let mut resolved: Vec<&[u8]> = Vec::new();
    for segment in path.split(|byte| matches!(byte, b'/' | b'\\')) {
        let end = segment.iter().position(|byte| matches!(byte, b';' | b'?' | b'#' | 0)).unwrap_or(segment.len());
        match segment[..end].trim_ascii() {
            b"" | b"." => {}
            b".." => {
                resolved.pop();
            }
            segment => resolved.push(segment),
        }
    }
    resolved.first().is_some_and(|first| RESERVED.iter().any(|name| first.eq_ignore_ascii_case(name)))
}

fn percent_decoded(path: &[u8]) -> Vec<u8> {
    let mut decoded = Vec::with_capacity(path.len());
    let mut rest = path;
    while let Some((&byte, after)) = rest.split_first() {
        rest = after;
        let digit = |index: usize| after.get(index).and_then(|&digit| char::from(digit).to_digit(16));
        match (byte, digit(0), digit(1)) {
            (b'%', Some(high), Some(low)) => {
                // Two hexadecimal digits: at most 255.
                decoded.push(u8::try_from(high * 16 + low).unwrap_or(u8::MAX));
                rest = &after[2..];
            }
            _ => decoded.push(byte),
        }
    }
    decoded
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn control_endpoints_are_reserved_however_they_are_spelt() {
        for path in [
            "/init",
            "/init/",
            "//init",
            "/./init",
            "/files/../init",
            "/../init",
            "/INIT",
            "/%69nit",
            "/%2569nit",
            "/%252569nit",
            "/%2e/init",
            "/files/%2e%2e/init",
            "/files%2f..%2finit",
            "/files/..;/init",
            "/init;a=b",
            "/init%3Fa",
            "/init%00.txt",
            "/init%20",
            "/%09init",
            "\\init",
            "/files\\..\\init",
            "/init/anything",
            "init",
            "/freeze",
            "/unfreeze",
            "/collapse",
            "/fsfreeze",
            "/fsthaw",
            "/upgrade",
            "/belljar/anything",
        ] {
            assert!(is_reserved(path), "{path}");
        }
    }

    #[test]
    fn what_the_sdks_call_is_not() {
        for path in [
            "",
            "/",
            "*",
            "/health",
            "/metrics",
            "/envs",
            "/files",
            "/files/compose",
            "/files/init",
            "/initialise",
            "/process.Process/Start",
            "/filesystem.Filesystem/WatchDir",
            "/init/..",
            "/%zz",
            "/100%",
            "/%25252541",
        ] {
            assert!(!is_reserved(path), "{path}");
        }
    }

    #[test]
    fn endless_encoding_is_refused_without_endless_work() {
        assert!(is_reserved(&format!("/%{}", "25".repeat(1 << 20))));
    }

    /// Spells each byte of a path in a random one of the ways that some reader somewhere understands.
    fn spelling(path: &'static str) -> impl Strategy<Value = String> {
        let length = path.len();
        let padding = prop_oneof![Just(""), Just("/"), Just("/./"), Just("/files/../"), Just("/a/b/../..//")];
        (padding, prop::collection::vec((any::<bool>(), 0..3_usize), length)).prop_map(move |(padding, ways)| {
            let mut text = padding.to_owned();
            for (byte, (upper, levels)) in path.bytes().zip(ways) {
                let byte = if upper { byte.to_ascii_uppercase() } else { byte };
                match levels {
                    0 => text.push(char::from(byte)),
                    levels => text.push_str(&format!("%{}{byte:02x}", "25".repeat(levels - 1))),
                }
            }
            text
        })
    }

    proptest! {
        #[test]
        fn no_spelling_gets_through(path in prop_oneof![spelling("/init"), spelling("/freeze"), spelling("/fsthaw/")]) {
            prop_assert!(is_reserved(&path), "{}", path);
        }

        #[test]
        fn nothing_panics(path in "\\PC{0,200}") {
            is_reserved(&path);
        }
    }
}
