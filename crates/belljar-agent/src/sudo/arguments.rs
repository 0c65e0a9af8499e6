//! What the real `sudo` is given, so that it does for root what it would have done for the caller.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;

use crate::users::User;

/// Options of `sudo` whose value may be the next argument.
const SHORT_WITH_VALUE: &[u8] = b"aCcDgpRrTtUu";
const LONG_WITH_VALUE: [&[u8]; 11] = [
    b"close-from",
    b"login-class",
    b"chdir",
    b"group",
    b"prompt",
    b"chroot",
    b"role",
    b"command-timeout",
    b"type",
    b"other-user",
    b"user",
];

/// What the dynamic linker and libc take out of the environment of a set-user-ID program. This one isn't marked as such,
/// so that it is up to us.
const UNSAFE_VARIABLES: [&[u8]; 14] = [
    b"GCONV_PATH",
    b"GETCONF_DIR",
    b"GLIBC_TUNABLES",
    b"HOSTALIASES",
    b"LOCALDOMAIN",
    b"LOCPATH",
    b"MALLOC_TRACE",
    b"NIS_PATH",
    b"NLSPATH",
    b"RESOLV_HOST_CONF",
    b"RES_OPTIONS",
    b"TMPDIR",
    b"TZDIR",
    b"MALLOC_CHECK_",
];

/// What the caller's command line asks of `sudo`, as far as it matters here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    /// Run something, or something else that takes no notice of variables.
    Run,
    /// Edit files; variables are an error.
    Edit,
    /// Say what somebody may run.
    List { names_whom: bool },
}

/// The caller's arguments, preceded by those that name the caller.
///
/// Variables in front of a command are `sudo`'s own means of setting them after it has cleared the environment, and its
/// own `SUDO_USER` gives way to them. They may precede options, too.
pub(super) fn for_root(caller: &User, arguments: Vec<OsString>) -> Vec<OsString> {
    let mut all: Vec<OsString> = match mode(&arguments) {
        Mode::Run => vec![
            format!("SUDO_USER={}", caller.name).into(),
            format!("SUDO_UID={}", caller.uid).into(),
            format!("SUDO_GID={}", caller.gid).into(),
            [OsStr::new("SUDO_HOME="), caller.home.as_os_str()].into_iter().collect(),
        ],
        Mode::List { names_whom: false } => vec!["-U".into(), caller.name.clone().into()],
        Mode::List { names_whom: true } | Mode::Edit => Vec::new(),
    };
    all.extend(arguments);
    all
}

pub(super) fn is_safe_variable(name: &OsStr) -> bool {
    let name = name.as_bytes();
    !name.starts_with(b"LD_") && !UNSAFE_VARIABLES.contains(&name)
}

/// Reads the options up to the command, as `getopt_long` would.
fn mode(arguments: &[OsString]) -> Mode {
    let (mut edits, mut lists, mut names_whom) = (false, false, false);
    let mut rest = arguments.iter().map(|argument| argument.as_bytes());
    while let Some(argument) = rest.next() {
        if argument == b"--" {
            break;
        } else if let Some(long) = argument.strip_prefix(b"--") {
            let name = long.split(|byte| *byte == b'=').next().unwrap_or_default();
            // An option may be shortened as long as it is clear which is meant.
            edits |= name.len() > 1 && b"edit".starts_with(name);
            lists |= b"list".starts_with(name) && name.len() > 1;
            names_whom |= b"other-user".starts_with(name);
            if name.len() == long.len() && LONG_WITH_VALUE.iter().any(|option| option.starts_with(name)) {
                rest.next();
            }
        } else if let Some(short) = argument.strip_prefix(b"-").filter(|short| !short.is_empty()) {
            for (index, option) in short.iter().enumerate() {
                edits |= *option == b'e';
                lists |= *option == b'l';
                names_whom |= *option == b'U';
                if *option == b'h' {
                    // A host, if something follows it at once.
                    break;
                }
                if SHORT_WITH_VALUE.contains(option) {
                    if index + 1 == short.len() {
                        rest.next();
                    }
                    break;
                }
            }
        } else if !argument.contains(&b'=') {
            break;
        }
    }
    match (edits, lists) {
        (true, _) => Mode::Edit,
        (false, true) => Mode::List { names_whom },
        (false, false) => Mode::Run,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mode_of(line: &str) -> Mode {
        mode(&line.split_whitespace().map(OsString::from).collect::<Vec<_>>())
    }

    #[test]
    fn options_are_told_from_the_commands_own() {
        let list = |names_whom| Mode::List { names_whom };
        for (line, expected) in [
            ("", Mode::Run),
            ("id", Mode::Run),
            ("ls -l -e", Mode::Run),
            ("-n -u nobody ls -l", Mode::Run),
            ("-nu nobody ls -l", Mode::Run),
            ("-unobody ls -e", Mode::Run),
            ("-u -l id", Mode::Run),
            ("--user=nobody ls -l", Mode::Run),
            ("--user -l id", Mode::Run),
            ("-hlocalhost id -l", Mode::Run),
            ("-- -l", Mode::Run),
            ("- -l", Mode::Run),
            ("-s", Mode::Run),
            ("-k", Mode::Run),
            ("--login", Mode::Run),
            ("A=b ls -l", Mode::Run),
            ("A=b -e x", Mode::Edit),
            ("-ne x", Mode::Edit),
            ("--edit x", Mode::Edit),
            ("-l", list(false)),
            ("-nl id", list(false)),
            ("-u nobody --list", list(false)),
            ("-l -U nobody", list(true)),
            ("--other-user=nobody -l", list(true)),
        ] {
            assert_eq!(mode_of(line), expected, "{line}");
        }
    }

    #[test]
    fn the_caller_is_named_where_sudo_takes_it() {
        let caller = User { name: "user".into(), uid: 1000, gid: 1001, home: "/home/user".into(), groups: vec![1001] };
        let given = |line: &str| {
            let arguments = line.split_whitespace().map(OsString::from).collect();
            for_root(&caller, arguments).join(OsStr::new(" ")).into_string().expect("text")
        };
        let named = "SUDO_USER=user SUDO_UID=1000 SUDO_GID=1001 SUDO_HOME=/home/user";
        assert_eq!(given("-n id"), format!("{named} -n id"));
        assert_eq!(given("-l"), "-U user -l");
        assert_eq!(given("-e /etc/hosts"), "-e /etc/hosts");
    }

    #[test]
    fn what_steers_the_dynamic_linker_is_not_passed_on() {
        for (name, safe) in [("PATH", true), ("LD_PRELOAD", false), ("LDAP", true), ("GCONV_PATH", false)] {
            assert_eq!(is_safe_variable(OsStr::new(name)), safe, "{name}");
        }
    }
}
