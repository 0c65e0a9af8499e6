//! What the runsc at hand is and can do.

use std::collections::BTreeSet;
use std::io;
use std::path::Path;
use std::process::{Output, Stdio};
use std::time::Duration;

use tokio::process::Command;

/// What a runsc is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EngineInfo {
    /// As it says itself, for example `0.0~20240729.0` or `release-20250804.0`.
    pub version: String,
    flags: BTreeSet<String>,
}

/// Flags that belljar starts sandboxes with. A runsc without one of them is too old.
const NEEDED_FLAGS: [&str; 5] = ["overlay2", "panic-log", "platform", "network", "log-format"];

/// Releases that can honour setuid bits have to be told to.
pub(super) const SETUID_FLAG: &str = "allow-suid";

const ANSWER_LIMIT: Duration = Duration::from_secs(10);

/// The program is no usable runsc.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    #[error("could not run {program}")]
    Run {
        program: String,
        #[source]
        source: io::Error,
    },
    #[error("{program} did not answer within {} s", ANSWER_LIMIT.as_secs())]
    Silent { program: String },
    #[error("{program} is not runsc: {answer:?}")]
    NotRunsc { program: String, answer: String },
    #[error("runsc {version} is too old: it lacks {missing}")]
    TooOld { version: String, missing: String },
}

impl EngineInfo {
    /// Whether it has a flag, named without dashes.
    #[must_use]
    pub fn has_flag(&self, name: &str) -> bool {
        self.flags.contains(name)
    }

    /// Whether setuid programs, such as `sudo`, gain anything in the guest. gVisor ignored the bit before August 2025.
    #[must_use]
    pub fn honours_setuid(&self) -> bool {
        self.has_flag(SETUID_FLAG)
    }

    /// Asks a program what it is.
    ///
    /// # Errors
    /// If it can't be run, is no runsc, or is too old.
    pub async fn ask(runsc: &Path) -> Result<Self, ProbeError> {
        let program = runsc.display().to_string();
        let answer = run(runsc, "--version").await?;
        let answer = String::from_utf8_lossy(&answer.stdout).into_owned();
        let Some(version) = parse_version(&answer) else {
            return Err(ProbeError::NotRunsc { program, answer: answer.chars().take(100).collect() });
        };
        // It describes its flags on standard error.
        let flags = run(runsc, "flags").await?;
        let flags = [flags.stdout, flags.stderr].concat();
        let info = Self { version: version.to_owned(), flags: parse_flags(&String::from_utf8_lossy(&flags)) };
        let missing: Vec<&str> = NEEDED_FLAGS.into_iter().filter(|flag| !info.has_flag(flag)).collect();
        if missing.is_empty() {
            Ok(info)
        } else {
            Err(ProbeError::TooOld { version: info.version, missing: missing.join(", ") })
        }
    }
}

async fn run(runsc: &Path, argument: &str) -> Result<Output, ProbeError> {
    let program = runsc.display().to_string();
    let output = Command::new(runsc).arg(argument).stdin(Stdio::null()).kill_on_drop(true).output();
    match tokio::time::timeout(ANSWER_LIMIT, output).await {
        Ok(Ok(output)) => Ok(output),
        Ok(Err(source)) => Err(ProbeError::Run { program, source }),
        Err(_) => Err(ProbeError::Silent { program }),
    }
}

fn parse_version(text: &str) -> Option<&str> {
    text.lines().find_map(|line| line.strip_prefix("runsc version ")).map(str::trim)
}

/// Each flag begins a line of its own: `  -name type`.
fn parse_flags(text: &str) -> BTreeSet<String> {
    text.lines()
        .filter_map(|line| line.strip_prefix("  -"))
        .filter_map(|flag| flag.split_whitespace().next())
        .map(str::to_owned)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_runsc_prints() {
        assert_eq!(parse_version("runsc version 0.0~20240729.0\nspec: 1.2.0\n"), Some("0.0~20240729.0"));
        assert_eq!(parse_version("usage: something else\n"), None);
        let flags = parse_flags("  -overlay2 value\n    \twrap mounts - with overlayfs\n  -debug\n    \tenable\n");
        assert_eq!(flags, ["debug", "overlay2"].map(str::to_owned).into());
    }

    #[tokio::test]
    async fn other_programs_are_recognised() {
        let error = EngineInfo::ask(Path::new("/bin/echo")).await.expect_err("not runsc");
        assert!(matches!(error, ProbeError::NotRunsc { .. }), "{error}");
        let error = EngineInfo::ask(Path::new("/nonexistent/runsc")).await.expect_err("nothing there");
        assert!(matches!(error, ProbeError::Run { .. }), "{error}");
    }
}
