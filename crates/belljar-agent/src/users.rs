//! Who a command runs as and who owns a file: `/etc/passwd` and `/etc/group`, read directly.
//!
//! The agent is a static binary, so there is no NSS; and the files are the sandbox's own and change while it runs, so
//! nothing is cached.

use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

/// A passwd or group file longer than this is cut off: it is the sandbox's to fill.
const MAX_DATABASE_BYTES: u64 = 4 << 20;

/// One line of `/etc/passwd`, with the groups that list the user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct User {
    pub(crate) name: String,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) home: PathBuf,
    /// Supplementary groups, the primary one first.
    pub(crate) groups: Vec<u32>,
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum LookupError {
    #[error("unknown user {0}")]
    Unknown(String),
    #[error("could not read the user database")]
    Unreadable(#[source] io::Error),
}

/// The users and groups of one root directory.
#[derive(Debug, Clone)]
pub(crate) struct UserDatabase {
    passwd: PathBuf,
    group: PathBuf,
}

impl UserDatabase {
    pub(crate) fn system() -> Self {
        Self::below(Path::new("/etc"))
    }

    fn below(directory: &Path) -> Self {
        Self { passwd: directory.join("passwd"), group: directory.join("group") }
    }

    pub(crate) fn find(&self, name: &str) -> Result<User, LookupError> {
        let passwd = read_database(&self.passwd).map_err(LookupError::Unreadable)?;
        let mut user =
            passwd.lines().find_map(|line| parse_user(line, name)).ok_or_else(|| LookupError::Unknown(name.into()))?;

        // Without a readable group file a user still has its primary group.
        let groups = read_database(&self.group).unwrap_or_default();
        let listed = groups.lines().filter_map(parse_group).filter(|group| group.lists(name));
        for group in listed {
            if !user.groups.contains(&group.gid) {
                user.groups.push(group.gid);
            }
        }
        Ok(user)
    }

    /// The names behind numeric owners. One reading serves a whole directory listing.
    pub(crate) fn names(&self) -> Names {
        Names {
            passwd: read_database(&self.passwd).unwrap_or_default(),
            group: read_database(&self.group).unwrap_or_default(),
        }
    }
}

/// A snapshot of the databases, for translating ids into names.
#[derive(Debug)]
pub(crate) struct Names {
    passwd: String,
    group: String,
}

impl Names {
    /// The user's name, or the number itself where it has none.
    pub(crate) fn user(&self, uid: u32) -> String {
        name_of(&self.passwd, uid)
    }

    pub(crate) fn group(&self, gid: u32) -> String {
        name_of(&self.group, gid)
    }
}

fn name_of(database: &str, id: u32) -> String {
    database
        .lines()
        .find_map(|line| {
            let mut fields = line.split(':');
            let name = fields.next()?;
            (fields.nth(1)?.parse() == Ok(id)).then(|| name.to_owned())
        })
        .unwrap_or_else(|| id.to_string())
}

fn read_database(path: &Path) -> io::Result<String> {
    let mut bytes = Vec::new();
    fs::File::open(path)?.take(MAX_DATABASE_BYTES).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// `name:password:uid:gid:comment:home:shell`, if it is `wanted`'s line and well formed.
fn parse_user(line: &str, wanted: &str) -> Option<User> {
    let mut fields = line.split(':');
    let name = fields.next().filter(|name| *name == wanted && !name.is_empty())?;
    let uid = fields.nth(1)?.parse().ok()?;
    let gid = fields.next()?.parse().ok()?;
    let home = fields.nth(1)?;
    let home = if home.is_empty() { "/" } else { home };
    Some(User { name: name.to_owned(), uid, gid, home: home.into(), groups: vec![gid] })
}

struct Group<'a> {
    gid: u32,
    members: &'a str,
}

impl Group<'_> {
    fn lists(&self, name: &str) -> bool {
        self.members.split(',').any(|member| member == name)
    }
}

/// `name:password:gid:member,member`
fn parse_group(line: &str) -> Option<Group<'_>> {
    let mut fields = line.split(':');
    let gid = fields.nth(2)?.parse().ok()?;
    Some(Group { gid, members: fields.next()? })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn database(passwd: &str, group: &str) -> (tempfile::TempDir, UserDatabase) {
        let directory = tempfile::tempdir().expect("a temporary directory");
        fs::write(directory.path().join("passwd"), passwd).expect("written");
        fs::write(directory.path().join("group"), group).expect("written");
        let database = UserDatabase::below(directory.path());
        (directory, database)
    }

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/bash\nuser:x:1000:1000::/home/user:/bin/bash\n\
                          broken:x:many:1:::\nhomeless:x:7:8:::\n";
    const GROUP: &str = "root:x:0:\nsudo:x:27:admin,user\nuser:x:1000:user\nodd\n";

    #[test]
    fn finds_a_user_with_its_groups() {
        let (_directory, database) = database(PASSWD, GROUP);
        let user = database.find("user").expect("listed");
        assert_eq!((user.uid, user.gid, user.home.as_path()), (1000, 1000, Path::new("/home/user")));
        assert_eq!(user.groups, [1000, 27]);
    }

    #[test]
    fn a_user_without_a_home_lives_at_the_root() {
        let (_directory, database) = database(PASSWD, GROUP);
        assert_eq!(database.find("homeless").expect("listed").home, Path::new("/"));
    }

    #[test]
    fn unknown_and_malformed_users_are_unknown() {
        let (_directory, database) = database(PASSWD, GROUP);
        for name in ["nobody", "broken", "", "root:x", "use"] {
            assert!(matches!(database.find(name), Err(LookupError::Unknown(_))), "{name}");
        }
    }

    #[test]
    fn a_missing_database_is_not_an_unknown_user() {
        let database = UserDatabase::below(Path::new("/nonexistent"));
        assert!(matches!(database.find("root"), Err(LookupError::Unreadable(_))));
        assert_eq!(database.names().user(5), "5");
    }

    #[test]
    fn numbers_get_their_names_back() {
        let (_directory, database) = database(PASSWD, GROUP);
        let names = database.names();
        assert_eq!((names.user(1000), names.user(4242)), ("user".to_owned(), "4242".to_owned()));
        assert_eq!((names.group(27), names.group(4242)), ("sudo".to_owned(), "4242".to_owned()));
    }
}
