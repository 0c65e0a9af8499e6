//! Why mmdebstrap failed, in words that name what to do: read from the last lines of its output.

use std::path::Path;

use super::{BuildError, Mirror};

/// Lines of output that are kept to explain a failure.
pub(super) const KEPT_LINES: usize = 200;
/// Lines of them that an error quotes when nothing better is known.
const QUOTED_LINES: usize = 12;

/// The error that `lines`, the end of a failed build's output, amount to.
pub(super) fn diagnose(lines: &[String], status: String, mirror: &Mirror, directory: &Path) -> BuildError {
    let find = |needles: &[&str]| {
        lines.iter().find(|line| needles.iter().any(|needle| line.contains(needle))).map(|line| line.trim().to_owned())
    };
    // Ordered from cause to consequence: a full disk also makes a download fail, an unknown key a repository
    // "unsigned".
    if find(&["No space left on device", "(28: ", "Disk quota exceeded"]).is_some() {
        return BuildError::DiskFull { path: directory.to_owned() };
    }
    if let Some(failure) = command_failure(lines) {
        return failure;
    }
    if let Some(detail) = find(&["is not valid yet", "is expired", "Release file for"]) {
        return BuildError::Expired { detail };
    }
    if let Some(detail) =
        find(&["NO_PUBKEY", "EXPKEYSIG", "signatures were invalid", "Missing key", "Sub-process /usr/bin/sqv"])
    {
        return BuildError::Untrusted { detail };
    }
    let unknown: Vec<&str> = lines.iter().filter_map(|line| unknown_package(line)).collect();
    if !unknown.is_empty() {
        return BuildError::UnknownPackages { names: unknown.join(", ") };
    }
    const UNREACHABLE: [&str; 7] = [
        "Could not resolve",
        "Temporary failure resolving",
        "Could not connect",
        "Unable to connect",
        "Connection failed",
        "Connection timed out",
        "certificate verification failed",
    ];
    if let Some(detail) = find(&UNREACHABLE) {
        return BuildError::MirrorUnreachable { mirror: mirror.to_string(), detail };
    }
    if let Some(detail) = find(&["does not have a Release file", "is not signed", "404  Not Found", "Failed to fetch"])
    {
        return BuildError::SuiteMissing { detail };
    }
    BuildError::Failed { status, detail: last(lines, QUOTED_LINES) }
}

fn unknown_package(line: &str) -> Option<&str> {
    line.strip_prefix("E: Unable to locate package ").or_else(|| {
        line.strip_prefix("E: Package '")?.split_once("' has no installation candidate").map(|(name, _)| name)
    })
}

/// "belljar: failed: 3: pip install x" is what the customize script says last.
fn command_failure(lines: &[String]) -> Option<BuildError> {
    let position = lines.iter().rposition(|line| line.starts_with(super::mmdebstrap::COMMAND_FAILED_MARK))?;
    let (number, command) =
        lines[position].strip_prefix(super::mmdebstrap::COMMAND_FAILED_MARK)?.trim().split_once(": ")?;
    Some(BuildError::CommandFailed {
        number: number.parse().ok()?,
        command: command.to_owned(),
        detail: last(&lines[..position], QUOTED_LINES),
    })
}

fn last(lines: &[String], count: usize) -> String {
    lines[lines.len().saturating_sub(count)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn diagnosis(text: &str) -> BuildError {
        let lines: Vec<String> = text.lines().map(str::to_owned).collect();
        diagnose(&lines, "exit status: 1".into(), &Mirror::default(), Path::new("/state/base"))
    }

    // What the programs print was taken from runs against wrong mirrors, wrong keys and full disks.
    #[test]
    fn each_common_failure_is_told_apart() {
        assert!(matches!(
            diagnosis("E: Failed to fetch http://nowhere.invalid/debian  Could not resolve 'nowhere.invalid'"),
            BuildError::MirrorUnreachable { .. }
        ));
        assert!(matches!(
            diagnosis("E: The repository 'http://mirror.example/debian trixie Release' does not have a Release file."),
            BuildError::SuiteMissing { .. }
        ));
        assert!(matches!(
            diagnosis(
                "W: GPG error: http://deb.debian.org/debian trixie InRelease: The following signatures couldn't be \
                 verified because the public key is not available: NO_PUBKEY 6ED0E7B82643E131\n\
                 E: The repository 'http://deb.debian.org/debian trixie InRelease' is not signed."
            ),
            BuildError::Untrusted { .. }
        ));
        assert!(matches!(
            diagnosis(
                "E: Failed to fetch http://deb.debian.org/debian  Write error - write (28: No space left on \
                 device)"
            ),
            BuildError::DiskFull { path } if path == Path::new("/state/base")
        ));
        assert!(matches!(
            diagnosis(
                "E: Release file for http://a/dists/x/InRelease is expired (invalid since 3d). Updates \
                 for this repository will not be applied."
            ),
            BuildError::Expired { .. }
        ));
    }

    #[test]
    fn all_unknown_packages_are_named_at_once() {
        let error = diagnosis("E: Unable to locate package nopkg\nE: Package 'old' has no installation candidate");
        assert!(matches!(error, BuildError::UnknownPackages { names } if names == "nopkg, old"));
    }

    #[test]
    fn a_failed_command_is_quoted_with_what_it_said() {
        let error = diagnosis("belljar: run 2: false thing\noh no\nbelljar: failed: 2: false thing\nE: setup failed");
        let BuildError::CommandFailed { number, command, detail } = error else { panic!("{error:?}") };
        assert_eq!((number, command.as_str()), (2, "false thing"));
        assert!(detail.ends_with("oh no"));
    }

    #[test]
    fn an_unknown_failure_is_quoted() {
        let error = diagnosis("one\ntwo");
        assert!(matches!(error, BuildError::Failed { detail, .. } if detail == "one\ntwo"));
    }
}
