//! Configuration: built-in defaults, overridden by a TOML file, by `BELLJAR_*` variables, and last by flags.
//!
//! Every key has a default, so the table of defaults is also the list of keys that exist: a key that isn't in it is
//! refused with the nearest one that is, and a variable is looked up for each (`server.listen` is
//! `BELLJAR_SERVER_LISTEN`; lists are separated by commas).

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use belljar_core::limits::{RequestLimits, Resources};
use belljar_runtime::network::{InstanceName, NetworkConfig};
use serde::{Deserialize, Serialize};
use toml::{Table, Value};

const DEFAULT_INSTANCE: &str = "belljar";

/// Everything that can be set.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Config {
    /// Where belljar keeps everything that outlives it.
    pub state_dir: PathBuf,
    /// Tells several servers on one machine apart: network interfaces, namespaces and cgroups carry it.
    pub instance: String,
    pub server: Server,
    pub capacity: Capacity,
    pub limits: RequestLimits,
    /// What a template gets that doesn't say otherwise.
    pub sandbox: Resources,
    pub network: Network,
    pub engine: Engine,
    pub template_build: TemplateBuild,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Server {
    /// Address of the API and of the sandboxes' traffic.
    pub listen: SocketAddr,
    /// Sandboxes are reached at `PORT-ID.DOMAIN`. Empty: `localhost` and the port listened on.
    pub domain: String,
    /// Connections at once; one more is answered 503 and closed.
    pub connections: usize,
    /// How long requests under way may take once the server is told to stop, in seconds.
    pub drain_deadline_s: u64,
    /// End all sandboxes when the server stops. For development.
    pub kill_on_exit: bool,
    /// `text` or `json`.
    pub log_format: LogFormat,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum LogFormat {
    Text,
    Json,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Capacity {
    /// Memory that sandboxes may be promised before overcommit, in MiB. 0: all of the machine's.
    pub memory_mib: u64,
    /// Promised memory may be this many times `memory_mib`, since most sandboxes use a fraction of theirs.
    pub memory_overcommit: f64,
    pub sandboxes: u32,
    pub sandboxes_per_team: u32,
    /// Sandboxes that are started at the same moment; others wait their turn. 0: two for each CPU.
    pub concurrent_starts: usize,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Network {
    /// Addresses between the host and the sandboxes; private to this machine.
    pub uplink_pool: String,
    /// Destinations that no sandbox reaches. The host's own addresses are always among them.
    pub denied_destinations: Vec<String>,
    /// Exceptions to `denied_destinations`.
    pub allowed_destinations: Vec<String>,
    /// Where sandboxes' DNS questions are forwarded to, as `ADDRESS:PORT`. Empty: the host's resolvers.
    pub dns_upstreams: Vec<String>,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Engine {
    /// gVisor's `runsc`. Empty: the pinned release, fetched and verified once.
    pub runsc: PathBuf,
    /// Further flags for `runsc`, for debugging.
    pub runsc_flags: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct TemplateBuild {
    /// Debian mirror that templates and the engine are fetched from.
    pub mirror: String,
    /// Where security updates come from. Empty: derived from `mirror`.
    pub security_mirror: String,
    /// Options for apt during a build, as `Key=value`.
    pub apt_options: Vec<String>,
    /// A build is stopped when it takes longer, in seconds.
    pub timeout_s: u64,
    /// Certificates of the host that every sandbox shall trust, as paths of PEM files.
    pub host_ca_certificates: Vec<PathBuf>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            state_dir: "/var/lib/belljar".into(),
            instance: DEFAULT_INSTANCE.into(),
            server: Server::default(),
            capacity: Capacity::default(),
            limits: RequestLimits::default(),
            sandbox: Resources::default(),
            network: Network::default(),
            engine: Engine::default(),
            template_build: TemplateBuild::default(),
        }
    }
}

impl Default for Server {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 3000)),
            domain: String::new(),
            connections: 12_000,
            drain_deadline_s: 10,
            kill_on_exit: false,
            log_format: LogFormat::Text,
        }
    }
}

impl Default for Capacity {
    fn default() -> Self {
        Self { memory_mib: 0, memory_overcommit: 2.0, sandboxes: 1000, sandboxes_per_team: 1000, concurrent_starts: 0 }
    }
}

impl Default for Network {
    fn default() -> Self {
        let runtime = NetworkConfig::new(InstanceName::new(DEFAULT_INSTANCE).expect("the default is well-formed"));
        Self {
            uplink_pool: runtime.uplink_pool.to_string(),
            denied_destinations: runtime.denied_destinations.iter().map(ToString::to_string).collect(),
            allowed_destinations: Vec::new(),
            dns_upstreams: Vec::new(),
        }
    }
}

impl Default for TemplateBuild {
    fn default() -> Self {
        Self {
            mirror: "http://deb.debian.org/debian".into(),
            security_mirror: String::new(),
            apt_options: Vec::new(),
            timeout_s: 30 * 60,
            host_ca_certificates: Vec::new(),
        }
    }
}

/// The configuration can't be used; each says where and what to do.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConfigError {
    #[error("the configuration file {path} can't be read")]
    Read { path: PathBuf, source: std::io::Error },
    #[error("the configuration file {path} is not valid TOML")]
    Syntax { path: PathBuf, source: toml::de::Error },
    #[error("{origin}: there is no key `{key}`; the nearest is `{nearest}`")]
    UnknownKey { origin: String, key: String, nearest: String },
    #[error("{origin}")]
    Value { origin: String, source: toml::de::Error },
    #[error("`{key}` {why}")]
    Invalid { key: &'static str, why: String },
}

impl Network {
    /// The same, parsed.
    pub(crate) fn for_runtime(&self, instance: &str) -> Result<NetworkConfig, ConfigError> {
        let invalid = |key, why: String| ConfigError::Invalid { key, why };
        let cidrs = |key, texts: &[String]| {
            texts
                .iter()
                .map(|text| {
                    text.parse().map_err(|_| invalid(key, format!("has `{text}`, which is not like 10.0.0.0/8")))
                })
                .collect::<Result<Vec<_>, _>>()
        };
        let dns_upstreams = self
            .dns_upstreams
            .iter()
            .map(|text| {
                let why = || invalid("network.dns_upstreams", format!("has `{text}`, which is not like 9.9.9.9:53"));
                text.parse().map_err(|_| why())
            })
            .collect::<Result<Vec<_>, _>>()?;
        let instance = InstanceName::new(instance).map_err(|error| invalid("instance", error.to_string()))?;
        let pool = &self.uplink_pool;
        Ok(NetworkConfig {
            uplink_pool: pool
                .parse()
                .map_err(|_| invalid("network.uplink_pool", format!("is `{pool}`, which is not like 10.214.0.0/16")))?,
            denied_destinations: cidrs("network.denied_destinations", &self.denied_destinations)?,
            allowed_exceptions: cidrs("network.allowed_destinations", &self.allowed_destinations)?,
            dns_upstreams,
            ..NetworkConfig::new(instance)
        })
    }
}

impl Config {
    /// Reads the configuration. `environment` looks a variable up, so that tests need not touch the process's own.
    ///
    /// # Errors
    /// If the file or a variable can't be read or says something impossible.
    pub(crate) fn load(file: Option<&Path>, environment: impl Fn(&str) -> Option<String>) -> Result<Self, ConfigError> {
        let known = Value::try_from(Self::default()).expect("the defaults have a TOML form");
        let known = known.as_table().expect("the configuration is a table");
        let mut merged = Table::new();
        let mut origin = "the environment".to_owned();
        if let Some(path) = file {
            let text =
                std::fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.into(), source })?;
            merged = text.parse().map_err(|source| ConfigError::Syntax { path: path.into(), source })?;
            origin = path.display().to_string();
            refuse_unknown(&merged, known, "", &all_keys(known, ""), &origin)?;
        }
        overlay_environment(&mut merged, known, "", &environment);
        let config: Self = merged.try_into().map_err(|source| ConfigError::Value { origin, source })?;
        config.check()?;
        Ok(config)
    }

    /// Refuses variables that begin like a section's and name no key of it: most likely a typing error. Variables that
    /// begin otherwise, such as `BELLJAR_LOG`, may be anybody's.
    ///
    /// # Errors
    /// With the nearest key's variable.
    pub(crate) fn refuse_unknown_variables(names: impl IntoIterator<Item = String>) -> Result<(), ConfigError> {
        let known = Value::try_from(Self::default()).expect("the defaults have a TOML form");
        let known = known.as_table().expect("the configuration is a table");
        let sections: Vec<String> =
            known.iter().filter(|(_, value)| value.is_table()).map(|(name, _)| variable(&format!("{name}."))).collect();
        let keys: Vec<String> = all_keys(known, "").iter().map(|key| variable(key)).collect();
        for name in names {
            if sections.iter().any(|section| name.starts_with(section)) && !keys.contains(&name) {
                let nearest = nearest_to(&name, &keys);
                return Err(ConfigError::UnknownKey { origin: "the environment".into(), key: name, nearest });
            }
        }
        Ok(())
    }

    fn check(&self) -> Result<(), ConfigError> {
        let invalid = |key, why: &str| Err(ConfigError::Invalid { key, why: why.to_owned() });
        self.network.for_runtime(&self.instance)?;
        if !self.state_dir.is_absolute() {
            return invalid("state_dir", "must be an absolute path");
        }
        if !self.capacity.memory_overcommit.is_finite() || self.capacity.memory_overcommit < 1.0 {
            return invalid("capacity.memory_overcommit", "must be a number of at least 1");
        }
        if self.sandbox.vcpus == 0 {
            return invalid("sandbox.vcpus", "must be at least 1");
        }
        if self.sandbox.memory_mib < 128 {
            return invalid("sandbox.memory_mib", "must be at least 128");
        }
        if self.sandbox.disk_mib < 64 {
            return invalid("sandbox.disk_mib", "must be at least 64");
        }
        if self.sandbox.processes < 16 {
            return invalid("sandbox.processes", "must be at least 16");
        }
        if self.server.connections == 0 {
            return invalid("server.connections", "must be at least 1");
        }
        Ok(())
    }

    /// The domain as handed to clients.
    #[must_use]
    pub(crate) fn public_domain(&self) -> String {
        if self.server.domain.is_empty() {
            format!("localhost:{}", self.server.listen.port())
        } else {
            self.server.domain.clone()
        }
    }
}

fn all_keys(table: &Table, prefix: &str) -> Vec<String> {
    table
        .iter()
        .flat_map(|(key, value)| {
            let path = format!("{prefix}{key}");
            match value {
                Value::Table(inner) => {
                    let mut keys = all_keys(inner, &format!("{path}."));
                    keys.push(path);
                    keys
                }
                _ => vec![path],
            }
        })
        .collect()
}

fn nearest_to(name: &str, known: &[String]) -> String {
    let likeness = |candidate: &String| strsim::jaro_winkler(candidate, name);
    known.iter().max_by(|a, b| likeness(a).total_cmp(&likeness(b))).cloned().unwrap_or_default()
}

/// The variable that overrides a key.
fn variable(key: &str) -> String {
    format!("BELLJAR_{}", key.replace('.', "_").to_uppercase())
}

fn refuse_unknown(given: &Table, known: &Table, prefix: &str, all: &[String], origin: &str) -> Result<(), ConfigError> {
    for (key, value) in given {
        let path = format!("{prefix}{key}");
        match (known.get(key), value) {
            (None, _) => {
                let nearest = nearest_to(&path, all);
                return Err(ConfigError::UnknownKey { origin: origin.to_owned(), key: path, nearest });
            }
            (Some(Value::Table(known)), Value::Table(given)) => {
                refuse_unknown(given, known, &format!("{path}."), all, origin)?;
            }
            (Some(_), _) => {}
        }
    }
    Ok(())
}

fn overlay_environment(merged: &mut Table, known: &Table, prefix: &str, lookup: &impl Fn(&str) -> Option<String>) {
    for (key, default) in known {
        let path = format!("{prefix}{key}");
        if let Value::Table(inner) = default {
            let entry = merged.entry(key.clone()).or_insert_with(|| Value::Table(Table::new()));
            if let Value::Table(table) = entry {
                overlay_environment(table, inner, &format!("{path}."), lookup);
            }
        } else if let Some(text) = lookup(&variable(&path)) {
            merged.insert(key.clone(), value_like(default, &text));
        }
    }
}

/// Reads a variable's text as the type that its key's default has; text that doesn't fit is left for the typed parse to
/// refuse.
fn value_like(default: &Value, text: &str) -> Value {
    let as_text = || Value::String(text.to_owned());
    match default {
        Value::Integer(_) => text.parse().map_or_else(|_| as_text(), Value::Integer),
        Value::Float(_) => text.parse().map_or_else(|_| as_text(), Value::Float),
        Value::Boolean(_) => text.parse().map_or_else(|_| as_text(), Value::Boolean),
        Value::Array(_) => Value::Array(
            text.split(',')
                .map(str::trim)
                .filter(|item| !item.is_empty())
                .map(|item| Value::String(item.into()))
                .collect(),
        ),
        _ => as_text(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(text: &str, variables: &[(&str, &str)]) -> Result<Config, ConfigError> {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let path = directory.path().join("belljar.toml");
        std::fs::write(&path, text).expect("the file can be written");
        let lookup = |name: &str| variables.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned());
        Config::load(Some(&path), lookup)
    }

    #[test]
    fn nothing_set_gives_the_defaults() {
        assert_eq!(load("", &[]).expect("an empty file is fine"), Config::default());
    }

    #[test]
    fn the_environment_wins_over_the_file() {
        let text = "[server]\nlisten = \"127.0.0.1:1\"\n[sandbox]\nvcpus = 4\n";
        let config = load(
            text,
            &[("BELLJAR_SERVER_LISTEN", "127.0.0.1:2"), ("BELLJAR_NETWORK_DNS_UPSTREAMS", "9.9.9.9:53, 1.1.1.1:53")],
        )
        .expect("all keys are known");
        assert_eq!(config.server.listen.port(), 2);
        assert_eq!(config.sandbox.vcpus, 4);
        assert_eq!(config.network.dns_upstreams, ["9.9.9.9:53", "1.1.1.1:53"]);
    }

    #[test]
    fn an_unknown_key_is_refused_with_the_nearest_one() {
        let error = load("[server]\nlisten_adress = \"127.0.0.1:1\"\n", &[]).expect_err("the key is misspelt");
        assert!(
            error.to_string().ends_with("there is no key `server.listen_adress`; the nearest is `server.listen`"),
            "{error}"
        );
    }

    #[test]
    fn a_misspelt_variable_is_refused_with_the_nearest_one() {
        let check = |name: &str| Config::refuse_unknown_variables([name.to_owned()]).map_err(|error| error.to_string());
        let refusal = check("BELLJAR_SERVER_LISTENS").expect_err("there is no such key");
        assert!(refusal.contains("BELLJAR_SERVER_LISTEN`"), "{refusal}");
        for fine in ["BELLJAR_SERVER_LISTEN", "BELLJAR_STATE_DIR", "BELLJAR_LOG", "BELLJAR_TEST_STATE_DIR", "PATH"] {
            assert_eq!(check(fine), Ok(()), "{fine}");
        }
    }

    #[test]
    fn impossible_values_are_refused() {
        for text in [
            "instance = \"No Spaces\"",
            "state_dir = \"relative\"",
            "[sandbox]\nvcpus = 0",
            "[capacity]\nmemory_overcommit = 0.5",
            "[sandbox]\nmemory_mib = -1",
            "[server]\nlisten = \"nowhere\"",
        ] {
            assert!(load(text, &[]).is_err(), "{text} passed");
        }
        assert!(load("", &[("BELLJAR_SANDBOX_VCPUS", "many")]).is_err());
    }
}
