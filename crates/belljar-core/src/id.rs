//! Identifiers. Each noun has its own type, so a template can't be passed where a sandbox is meant.

use std::fmt;
use std::str::FromStr;

use rand::Rng;
use serde::{Deserialize, Serialize};

/// Length of every generated identifier, in characters (E2B's sandbox ids have the same).
pub const ID_LENGTH: usize = 20;

/// The text is not an identifier: 20 lowercase letters and digits, a letter first.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{kind} ids are 20 lowercase letters and digits, a letter first")]
pub struct InvalidId {
    kind: &'static str,
}

fn generate() -> String {
    const LETTERS: &[u8] = b"abcdefghijklmnopqrstuvwxyz";
    const ALL: &[u8] = b"abcdefghijklmnopqrstuvwxyz0123456789";
    let mut rng = rand::rng();
    (0..ID_LENGTH)
        .map(|position| {
            // A DNS label and an interface name are both happier with a letter in front.
            let alphabet = if position == 0 { LETTERS } else { ALL };
            char::from(alphabet[rng.random_range(0..alphabet.len())])
        })
        .collect()
}

fn is_valid(text: &str) -> bool {
    text.len() == ID_LENGTH
        && text.starts_with(|c: char| c.is_ascii_lowercase())
        && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit())
}

macro_rules! identifier {
    ($(#[$doc:meta])* $name:ident, $kind:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// A fresh random identifier; 103 bits, so collisions need no handling.
            #[must_use]
            pub fn generate() -> Self {
                Self(generate())
            }

            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = InvalidId;

            fn from_str(text: &str) -> Result<Self, InvalidId> {
                if is_valid(text) {
                    Ok(Self(text.to_owned()))
                } else {
                    Err(InvalidId { kind: $kind })
                }
            }
        }

        impl TryFrom<String> for $name {
            type Error = InvalidId;

            fn try_from(text: String) -> Result<Self, InvalidId> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> Self {
                id.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

identifier!(
    /// One sandbox, over its whole life.
    SandboxId, "sandbox"
);
identifier!(
    /// One template, over all its builds.
    TemplateId, "template"
);
identifier!(
    /// One team: the owner of sandboxes, templates and keys.
    TeamId, "team"
);
identifier!(
    /// One API key's public handle (never the secret).
    KeyId, "key"
);

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn generated_ids_are_valid_and_differ() {
        let first = SandboxId::generate();
        assert_eq!(first.as_str().parse::<SandboxId>().as_ref(), Ok(&first));
        assert_ne!(first, SandboxId::generate());
    }

    #[test]
    fn foreign_text_is_refused() {
        for text in [
            "",
            "short",
            "1aaaaaaaaaaaaaaaaaaa",
            "aaaaaaaaaaaaaaaaaaaA",
            "aaaaaaaaaaaaaaaaaa-a",
            "../../../../etc/pass",
        ] {
            assert!(text.parse::<SandboxId>().is_err(), "{text} passed");
        }
    }

    proptest! {
        #[test]
        fn whatever_parses_is_a_dns_label(text in "\\PC{0,40}") {
            if let Ok(id) = text.parse::<SandboxId>() {
                prop_assert!(id.as_str().bytes().all(|b| b.is_ascii_alphanumeric()));
                prop_assert!(id.as_str().len() <= 63);
            }
        }
    }
}
