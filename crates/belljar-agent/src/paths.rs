//! What a path in a request means: `~` and relative paths start at the user's home directory, an empty one is the
//! default working directory.

use std::path::{Component, Path, PathBuf};

use crate::users::User;

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum PathError {
    #[error("cannot expand user-specific home dir in '{0}'")]
    OtherUsersHome(String),
    #[error("path contains a null byte")]
    NullByte,
}

/// Resolves `path` for `user`. Absolute paths stay exactly as given.
pub(crate) fn resolve(path: &str, user: &User, default_workdir: Option<&str>) -> Result<PathBuf, PathError> {
    if path.contains('\0') {
        return Err(PathError::NullByte);
    }
    let path = if path.is_empty() { default_workdir.unwrap_or_default() } else { path };
    let below_home = match path.strip_prefix('~') {
        None => path,
        Some(rest) if rest.is_empty() || rest.starts_with('/') => rest.trim_start_matches('/'),
        Some(_) => return Err(PathError::OtherUsersHome(path.to_owned())),
    };
    if below_home.starts_with('/') {
        return Ok(below_home.into());
    }
    Ok(normalise(&user.home.join(below_home)))
}

/// Removes `.` and `..` by their letters, without looking at what is on disk.
fn normalise(path: &Path) -> PathBuf {
    let mut normal = PathBuf::new();
    for component in path.components() {
        match component {
            Component::ParentDir => {
                normal.pop();
            }
            Component::CurDir => {}
            Component::RootDir | Component::Prefix(_) | Component::Normal(_) => normal.push(component),
        }
    }
    normal
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resolved(path: &str, workdir: Option<&str>) -> Result<PathBuf, PathError> {
        let user = User { name: "user".into(), uid: 1, gid: 1, home: "/home/user".into(), groups: vec![1] };
        resolve(path, &user, workdir)
    }

    #[test]
    fn paths_start_where_envd_starts_them() {
        for (path, expected) in [
            ("", "/home/user"),
            ("~", "/home/user"),
            ("~/", "/home/user"),
            ("~/a/b", "/home/user/a/b"),
            ("a.txt", "/home/user/a.txt"),
            ("./a/../b", "/home/user/b"),
            ("../../..", "/"),
            ("/etc/../tmp/", "/etc/../tmp/"),
        ] {
            assert_eq!(resolved(path, None), Ok(expected.into()), "{path}");
        }
    }

    #[test]
    fn the_default_working_directory_is_for_empty_paths_only() {
        assert_eq!(resolved("", Some("/work")), Ok("/work".into()));
        assert_eq!(resolved("", Some("~/code")), Ok("/home/user/code".into()));
        assert_eq!(resolved("x", Some("/work")), Ok("/home/user/x".into()));
    }

    #[test]
    fn other_homes_and_null_bytes_are_refused() {
        assert_eq!(resolved("~root/x", None), Err(PathError::OtherUsersHome("~root/x".into())));
        assert_eq!(resolved("a\0b", None), Err(PathError::NullByte));
    }
}
