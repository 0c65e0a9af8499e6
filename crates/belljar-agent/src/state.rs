//! What `/init` sets for the whole sandbox.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use http::{HeaderMap, header};
use time::OffsetDateTime;

use crate::auth::AccessToken;
use crate::paths::{self, PathError};
use crate::users::{LookupError, User, UserDatabase};

/// Who requests that name no user run as, until `/init` says otherwise.
const DEFAULT_USER: &str = "user";

/// What every command starts with, for programs that want to know where they are.
const SANDBOX_MARK: (&str, &str) = ("E2B_SANDBOX", "true");

/// Who a request runs as, and with what.
#[derive(Debug, Clone)]
pub(crate) struct Defaults {
    /// Environment variables of every command.
    pub(crate) env: BTreeMap<String, String>,
    pub(crate) user: String,
    pub(crate) workdir: Option<String>,
    /// The newest timestamp seen by `/init`.
    pub(crate) initialised_at: Option<OffsetDateTime>,
}

impl Default for Defaults {
    fn default() -> Self {
        Self {
            env: BTreeMap::from([(SANDBOX_MARK.0.to_owned(), SANDBOX_MARK.1.to_owned())]),
            user: DEFAULT_USER.to_owned(),
            workdir: None,
            initialised_at: None,
        }
    }
}

impl Defaults {
    /// Replaces the variables of an earlier call; the agent's own mark stays.
    pub(crate) fn replace_env(&mut self, env: BTreeMap<String, String>) {
        self.env = env;
        self.env.insert(SANDBOX_MARK.0.to_owned(), SANDBOX_MARK.1.to_owned());
    }
}

/// Shared by every request handler; clones share one state.
#[derive(Debug, Clone)]
pub(crate) struct Sandbox {
    pub(crate) token: Arc<AccessToken>,
    pub(crate) users: UserDatabase,
    defaults: Arc<Mutex<Defaults>>,
}

/// Why a request's user could not be had.
#[derive(Debug, thiserror::Error)]
pub(crate) enum UserError {
    #[error("invalid username: '{name}'")]
    Named {
        name: String,
        #[source]
        source: LookupError,
    },
    #[error("invalid default user: '{name}'")]
    Default {
        name: String,
        #[source]
        source: LookupError,
    },
    #[error("malformed Authorization header")]
    MalformedHeader,
}

impl Sandbox {
    pub(crate) fn new() -> Self {
        Self { token: Arc::default(), users: UserDatabase::system(), defaults: Arc::default() }
    }

    pub(crate) fn defaults(&self) -> MutexGuard<'_, Defaults> {
        self.defaults.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The user called `name`, or the default one.
    pub(crate) fn user(&self, name: Option<&str>) -> Result<User, UserError> {
        match name {
            Some(name) => self.users.find(name).map_err(|source| UserError::Named { name: name.to_owned(), source }),
            None => {
                let name = self.defaults().user.clone();
                self.users.find(&name).map_err(|source| UserError::Default { name, source })
            }
        }
    }

    /// The user a Connect request names by `Authorization: Basic`, whose password is unused, or the default one.
    pub(crate) fn user_of(&self, headers: &HeaderMap) -> Result<User, UserError> {
        let Some(value) = headers.get(header::AUTHORIZATION) else { return self.user(None) };
        let value = value.to_str().map_err(|_| UserError::MalformedHeader)?;
        let Some((scheme, encoded)) = value.split_once(' ') else { return self.user(None) };
        if !scheme.eq_ignore_ascii_case("basic") {
            return self.user(None);
        }
        let credentials = STANDARD.decode(encoded.trim()).map_err(|_| UserError::MalformedHeader)?;
        let credentials = String::from_utf8(credentials).map_err(|_| UserError::MalformedHeader)?;
        let (name, _password) = credentials.split_once(':').ok_or(UserError::MalformedHeader)?;
        self.user(Some(name))
    }

    /// What `path` means for `user`.
    pub(crate) fn resolve(&self, path: &str, user: &User) -> Result<PathBuf, PathError> {
        paths::resolve(path, user, self.defaults().workdir.as_deref())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_authorization(value: &str) -> HeaderMap {
        HeaderMap::from_iter([(header::AUTHORIZATION, value.parse().expect("a header value"))])
    }

    #[test]
    fn the_user_comes_from_basic_authorization() {
        let sandbox = Sandbox::new();
        let user = sandbox.user_of(&with_authorization("Basic cm9vdDo=")).expect("root is on every machine");
        assert_eq!((user.name.as_str(), user.uid), ("root", 0));
        assert!(matches!(
            sandbox.user_of(&with_authorization("Basic bm9ib2R5LWhlcmU6")),
            Err(UserError::Named { name, .. }) if name == "nobody-here"
        ));
    }

    #[test]
    fn broken_authorization_is_refused_and_foreign_schemes_are_not_ours() {
        let sandbox = Sandbox::new();
        for broken in ["Basic !!!", "Basic cm9vdA==", "Basic /w=="] {
            assert!(
                matches!(sandbox.user_of(&with_authorization(broken)), Err(UserError::MalformedHeader)),
                "{broken}"
            );
        }
        sandbox.defaults().user = "root".into();
        assert_eq!(sandbox.user_of(&with_authorization("Bearer x")).expect("the default").name, "root");
        assert_eq!(sandbox.user_of(&HeaderMap::new()).expect("the default").name, "root");
    }

    #[test]
    fn replaced_variables_do_not_pile_up() {
        let mut defaults = Defaults::default();
        defaults.replace_env(BTreeMap::from([("A".into(), "1".into())]));
        defaults.replace_env(BTreeMap::from([("B".into(), "2".into()), ("E2B_SANDBOX".into(), "no".into())]));
        let env: Vec<_> = defaults.env.iter().map(|(name, value)| format!("{name}={value}")).collect();
        assert_eq!(env, ["B=2", "E2B_SANDBOX=true"]);
    }
}
