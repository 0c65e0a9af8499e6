//! The recipe of a template: `template.toml`, parsed once, refused where it is wrong.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// Part of every recipe's digest: raise it when the builder makes something else of the same recipe.
const BUILDER_REVISION: u32 = 2;

/// What a template consists of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// The template's name, as in `Sandbox.create("base")`.
    pub name: String,
    /// Debian's code name, such as `trixie`.
    pub suite: String,
    /// How much of Debian is there before `packages`.
    #[serde(default)]
    pub variant: Variant,
    /// Debian packages to install, without their recommendations.
    #[serde(default)]
    pub packages: Vec<String>,
    /// Shell commands, each run as root in the finished system by `sh -eu`.
    #[serde(default)]
    pub run: Vec<String>,
    /// Who runs the sandbox's commands.
    pub user: User,
    /// Where commands start; the user's home unless given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub working_directory: Option<String>,
    /// The environment of every command.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
}

/// The package set a build starts from, in mmdebstrap's words.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Variant {
    /// Essential packages only: no apt inside.
    Essential,
    /// Essential packages and apt.
    #[default]
    Apt,
    /// Every package of priority "required", and apt.
    Minbase,
}

impl Variant {
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Essential => "essential",
            Self::Apt => "apt",
            Self::Minbase => "minbase",
        }
    }
}

/// The account that commands run under.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct User {
    pub name: String,
    pub uid: u32,
    pub home: String,
    /// Whether the user becomes root by `sudo` without being asked.
    #[serde(default)]
    pub passwordless_sudo: bool,
}

/// Why a recipe is refused.
#[derive(Debug, thiserror::Error)]
pub enum RecipeError {
    #[error("cannot read the recipe {path}")]
    Read {
        path: String,
        #[source]
        source: std::io::Error,
    },
    #[error("the recipe is not valid")]
    Syntax(#[source] toml::de::Error),
    #[error("the recipe's `{field}` is not valid: {value:?} {reason}")]
    Field { field: &'static str, value: String, reason: &'static str },
}

impl Recipe {
    /// Reads and checks the recipe in the file `path`.
    pub fn load(path: &Path) -> Result<Self, RecipeError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| RecipeError::Read { path: path.display().to_string(), source })?;
        Self::parse(&text)
    }

    /// Parses and checks a recipe.
    pub fn parse(text: &str) -> Result<Self, RecipeError> {
        let recipe: Self = toml::from_str(text).map_err(RecipeError::Syntax)?;
        recipe.check()?;
        Ok(recipe)
    }

    /// `sha256:…` of everything in the recipe that decides about the result: the same for the same recipe, whatever its
    /// comments, spaces and order of keys.
    pub fn digest(&self) -> String {
        let canonical = serde_json::to_vec(&(BUILDER_REVISION, self)).expect("a recipe has only string keys");
        let mut hasher = Sha256::new();
        hasher.update(&canonical);
        hasher.update(super::mmdebstrap::CUSTOMIZE_SCRIPT);
        format!("sha256:{:x}", hasher.finalize())
    }

    /// Where commands start.
    pub fn working_directory(&self) -> &str {
        self.working_directory.as_deref().unwrap_or(&self.user.home)
    }

    // The values reach a shell, apt's command line and files with a syntax of their own. Each is held to the narrow
    // form its kind has in Debian, so that none can be read as something else there.
    fn check(&self) -> Result<(), RecipeError> {
        check("name", &self.name, is_template_name, "must be lowercase letters, digits and inner hyphens, at most 63")?;
        check("suite", &self.suite, is_suite, "must be a Debian code name such as trixie")?;
        for package in &self.packages {
            check("packages", package, is_package_name, "is not the name of a Debian package")?;
        }
        check("user.name", &self.user.name, is_user_name, "must be lowercase letters, digits, - and _, and not root")?;
        let uid = self.user.uid;
        check("user.uid", &uid.to_string(), |_| (1000..60_000).contains(&uid), "must be from 1000 to 59999")?;
        check("user.home", &self.user.home, is_plain_path, "must be an absolute path of plain names")?;
        check("working_directory", self.working_directory(), is_plain_path, "must be an absolute path of plain names")?;
        for (key, value) in &self.env {
            check("env", key, is_variable_name, "is not the name of an environment variable")?;
            check("env", value, is_one_line, "must be one line without quotes, since pam_env reads it")?;
        }
        for command in &self.run {
            check("run", command, |text| !text.contains('\0') && !text.trim().is_empty(), "is not a command")?;
        }
        let sudo_without_package = self.user.passwordless_sudo && !self.packages.iter().any(|name| name == "sudo");
        check("user.passwordless_sudo", "true", |_| !sudo_without_package, "needs the package sudo")
    }
}

fn check(
    field: &'static str,
    value: &str,
    accepts: impl Fn(&str) -> bool,
    reason: &'static str,
) -> Result<(), RecipeError> {
    if accepts(value) { Ok(()) } else { Err(RecipeError::Field { field, value: value.to_owned(), reason }) }
}

fn is_made_of(text: &str, extra: &str) -> bool {
    text.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || extra.contains(c))
}

fn starts_with(text: &str, accepts: impl Fn(char) -> bool) -> bool {
    text.chars().next().is_some_and(accepts)
}

fn is_template_name(text: &str) -> bool {
    text.len() <= 63 && is_made_of(text, "-") && !text.is_empty() && !text.starts_with('-') && !text.ends_with('-')
}

fn is_suite(text: &str) -> bool {
    is_made_of(text, "-") && starts_with(text, |c| c.is_ascii_lowercase())
}

/// Debian Policy 5.6.1, without the trailing hyphen that apt reads as "remove".
fn is_package_name(text: &str) -> bool {
    text.len() >= 2
        && is_made_of(text, "+-.")
        && starts_with(text, |c| c.is_ascii_alphanumeric())
        && !text.ends_with('-')
}

fn is_user_name(text: &str) -> bool {
    text != "root"
        && (1..=32).contains(&text.len())
        && is_made_of(text, "-_")
        && starts_with(text, |c| c.is_ascii_lowercase() || c == '_')
}

fn is_plain_path(text: &str) -> bool {
    text.strip_prefix('/').is_some_and(|rest| {
        rest.split('/').all(|name| {
            !name.is_empty()
                && name != "."
                && name != ".."
                && name.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
        })
    })
}

fn is_variable_name(text: &str) -> bool {
    starts_with(text, |c| c.is_ascii_alphabetic() || c == '_')
        && text.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
}

fn is_one_line(text: &str) -> bool {
    !text.contains(['\n', '\r', '\0', '"', '\'', '\\'])
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALL: &str = r#"
        name = "small"
        suite = "trixie"
        packages = ["less", "g++", "libstdc++6"]
        user = { name = "user", uid = 1000, home = "/home/user" }
        env = { LANG = "C.UTF-8" }
    "#;

    fn refused(from: &str, to: &str) -> String {
        assert!(SMALL.contains(from), "the test replaces what is there");
        match Recipe::parse(&SMALL.replace(from, to)) {
            Ok(recipe) => panic!("accepted: {recipe:?}"),
            Err(RecipeError::Syntax(error)) => error.to_string(),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn the_shipped_base_recipe_is_valid() {
        let recipe = Recipe::parse(include_str!("../../../../templates/base/template.toml")).expect("valid");
        assert_eq!(recipe.name, "base");
        assert_eq!(recipe.working_directory(), "/home/user");
        assert_eq!(recipe.variant, Variant::Apt);
    }

    #[test]
    fn unknown_and_missing_fields_are_refused_by_name() {
        assert!(refused("suite =", "sweet =").contains("sweet"));
        assert!(refused("uid = 1000", "uid = 1000, shell = 'x'").contains("shell"));
        assert!(refused("name = \"small\"", "").contains("name"));
        assert!(refused("suite = \"trixie\"", "suite = \"trixie\"\nvariant = \"huge\"").contains("huge"));
    }

    #[test]
    fn values_that_would_be_read_as_syntax_elsewhere_are_refused() {
        for package in
            ["--force-yes", "less-", "?essential", "~i", "/etc/passwd", "a b", "a,b", "x", "Less", "less/sid"]
        {
            assert!(refused("\"less\"", &format!("\"{package}\"")).contains("`packages`"), "{package}");
        }
        for suite in ["", "../x", "trixie main", "[trusted=yes]"] {
            assert!(refused("\"trixie\"", &format!("\"{suite}\"")).contains("`suite`"), "{suite}");
        }
        for home in ["home", "/", "/home/../etc", "/home/us er", "/home/$(id)", "/home//user", "/home/user/"] {
            assert!(refused("/home/user", home).contains("`user.home`"), "{home}");
        }
        for uid in ["0", "999", "60000", "4294967295"] {
            assert!(refused("1000", uid).contains("`user.uid`"), "{uid}");
        }
        assert!(refused("name = \"user\"", "name = \"root\"").contains("`user.name`"));
        assert!(refused("LANG", "\"LA NG\"").contains("`env`"));
        assert!(refused("\"C.UTF-8\"", "\"C\\nLD_PRELOAD=x\"").contains("`env`"));
    }

    #[test]
    fn sudo_without_its_package_is_refused() {
        assert!(refused("uid = 1000", "uid = 1000, passwordless_sudo = true").contains("sudo"));
    }

    #[test]
    fn the_digest_depends_on_content_and_on_nothing_else() {
        let digest = Recipe::parse(SMALL).expect("valid").digest();
        let reordered = r#"
            env.LANG = "C.UTF-8"   # a comment
            suite = "trixie"
            name = "small"
            packages = [ "less",
              "g++", "libstdc++6" ]
            [user]
            home = "/home/user"
            uid = 1000
            name = "user"
        "#;
        assert_eq!(Recipe::parse(reordered).expect("valid").digest(), digest);
        assert_eq!(digest.len(), "sha256:".len() + 64);
        for (from, to) in [("\"less\", ", ""), ("1000", "1001"), ("C.UTF-8", "C"), ("small", "tiny")] {
            assert_ne!(Recipe::parse(&SMALL.replace(from, to)).expect("valid").digest(), digest, "{from} → {to}");
        }
    }
}
