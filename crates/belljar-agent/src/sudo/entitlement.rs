//! Who may become root: the user that the template's own sudoers file entitles.

use std::io;
use std::path::Path;
use std::{fs, str};

/// What a template with passwordless sudo contains; see the image's recipe.
const SUDOERS: &str = "/etc/sudoers.d/90-belljar";

/// The rule that makes a user entitled, after the user's name.
const RULE: &str = " ALL=(ALL:ALL) NOPASSWD: ALL";

/// The entitled user's name, or `None` in a template without passwordless sudo.
pub(super) fn entitled_user() -> io::Result<Option<String>> {
    read(Path::new(SUDOERS))
}

fn read(path: &Path) -> io::Result<Option<String>> {
    match fs::read_to_string(path) {
        Ok(sudoers) => Ok(sudoers.lines().filter_map(|line| line.strip_suffix(RULE)).find(is_user).map(str::to_owned)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Not a comment, a group, or an alias that stands for others.
fn is_user(name: &&str) -> bool {
    name.starts_with(|first: char| first.is_ascii_lowercase() || first == '_') && !name.contains([' ', ','])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_rule_for_everything_entitles() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let path = directory.path().join("sudoers");
        assert_eq!(read(&path).expect("nothing there"), None);
        for (sudoers, expected) in [
            ("Defaults env_keep += \"LANG\"\nuser ALL=(ALL:ALL) NOPASSWD: ALL\n", Some("user")),
            ("user ALL=(ALL:ALL) ALL\n", None),
            ("user ALL=(ALL:ALL) NOPASSWD: /usr/bin/id\n", None),
            ("# user ALL=(ALL:ALL) NOPASSWD: ALL\n%user ALL=(ALL:ALL) NOPASSWD: ALL\n", None),
            ("", None),
        ] {
            fs::write(&path, sudoers).expect("written");
            assert_eq!(read(&path).expect("readable").as_deref(), expected, "{sudoers}");
        }
    }
}
