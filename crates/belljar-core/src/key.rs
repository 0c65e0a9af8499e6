//! Secrets: API keys and access tokens. Only hashes of API keys are ever stored.

use std::fmt;
use std::str::FromStr;

use rand::RngCore;
use sha2::{Digest, Sha256};

const PREFIX: &str = "e2b_";
const HEX_DIGITS: usize = 40;

/// The text is not an API key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("API keys are `e2b_` followed by 40 hexadecimal digits")]
pub struct InvalidKey;

/// An API key in the clear: `e2b_` and 40 hexadecimal digits (160 bits). Its `Debug` shows nothing of the secret.
#[derive(Clone, PartialEq, Eq)]
pub struct ApiKey(String);

impl ApiKey {
    #[must_use]
    pub fn generate() -> Self {
        Self(format!("{PREFIX}{}", random_hex(HEX_DIGITS / 2)))
    }

    /// The secret itself, to be shown once to its owner.
    #[must_use]
    pub fn reveal(&self) -> &str {
        &self.0
    }

    /// What is stored. A plain hash is enough: the key has 160 random bits, so there is nothing to guess.
    #[must_use]
    pub fn hash(&self) -> KeyHash {
        KeyHash(Sha256::digest(self.0.as_bytes()).into())
    }

    /// A form that tells keys apart in a listing without giving one away.
    #[must_use]
    pub fn mask(&self) -> String {
        format!("{}…{}", &self.0[..PREFIX.len() + 4], &self.0[self.0.len() - 4..])
    }
}

impl FromStr for ApiKey {
    type Err = InvalidKey;

    fn from_str(text: &str) -> Result<Self, InvalidKey> {
        let digits = text.strip_prefix(PREFIX).ok_or(InvalidKey)?;
        if digits.len() == HEX_DIGITS && digits.bytes().all(|b| b.is_ascii_hexdigit()) {
            Ok(Self(text.to_owned()))
        } else {
            Err(InvalidKey)
        }
    }
}

impl fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ApiKey(secret)")
    }
}

/// SHA-256 of an API key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KeyHash([u8; 32]);

impl KeyHash {
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

/// The secret that opens one sandbox's agent. It is kept in the clear, because every answer about the sandbox repeats
/// it to its owner.
#[derive(Clone, PartialEq, Eq)]
pub struct AccessToken(String);

impl AccessToken {
    #[must_use]
    pub fn generate() -> Self {
        Self(random_hex(32))
    }

    /// A token read back from the store.
    #[must_use]
    pub fn from_stored(text: String) -> Self {
        Self(text)
    }

    #[must_use]
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for AccessToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("AccessToken(secret)")
    }
}

fn random_hex(bytes: usize) -> String {
    let mut buffer = vec![0u8; bytes];
    rand::rng().fill_bytes(&mut buffer);
    buffer.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_generated_key_parses_and_hashes_alike() {
        let key = ApiKey::generate();
        let again: ApiKey = key.reveal().parse().expect("a generated key is valid");
        assert_eq!(key.hash(), again.hash());
        assert_ne!(key.hash(), ApiKey::generate().hash());
    }

    #[test]
    fn foreign_keys_are_refused() {
        for text in
            ["", "e2b_", "sk_0123456789012345678901234567890123456789", "e2b_012345678901234567890123456789012345678g"]
        {
            assert_eq!(text.parse::<ApiKey>(), Err(InvalidKey), "{text}");
        }
    }

    #[test]
    fn secrets_stay_out_of_debug_output() {
        let key = ApiKey::generate();
        let token = AccessToken::generate();
        assert!(!format!("{key:?} {token:?}").contains(&key.reveal()[4..]));
        assert!(!format!("{token:?}").contains(token.reveal()));
        assert!(!key.mask().contains(&key.reveal()[8..40]));
    }
}
