//! `sudo` on an engine that ignores set-user-ID bits.
//!
//! There nobody but the init can make a process of root's, so the agent starts the real `sudo` for whoever may:
//!
//! ```text
//!   /usr/bin/sudo ──exec──▶ client (/.belljar/sudo)          broker (the agent)
//!   the template's                │  arguments, environment, umask  │
//!   wrapper                       ├────────────────────────────────▶│ may this user?
//!                                 │  stdin, stdout, stderr, cwd     ├──▶ sudo.distrib SUDO_USER=… ARGUMENTS
//!                                 │                                 │       as root, in a session of its own
//!                                 │  signals                        │
//!                                 ├────────────────────────────────▶├──▶ to it
//!                                 │                  exit or signal │
//!                                 │◀────────────────────────────────┤◀── its end
//!                                 ╵ the same end
//! ```
//!
//! **Who may** is what the template says: the one user that its sudoers file entitles to everything without a password
//! (`entitlement`). The socket can only be opened by that user's group, and the kernel's word on who sent the
//! request decides. (`SO_PEERCRED` must not be asked: gVisor answers with the asker.)
//!
//! **What is the same**: options, sudoers' rules for the environment, `SUDO_USER` and its siblings, exit codes, the
//! working directory, the umask, pipes and files as standard streams, and terminals with job control inside (`terminal`).
//!
//! **What differs from a `sudo` that is set-user-ID**:
//! - The command's parent is the init, and its session is its own. It counts as one of the caller's all the same: when
//!   the client is gone without having seen the end, everything that the command started is killed. (The real one
//!   leaves it running when killed by SIGKILL.)
//! - sudoers is asked about root, since root is who starts it: rules that restrict the entitled user do not hold.
//! - Other users that sudoers entitles are refused.
//! - A command in a terminal can't be suspended as a whole: Ctrl-Z is for what runs inside, such as a shell's jobs.
//!   Nor does SIGINT, SIGQUIT or SIGTSTP reach it by `kill` of the client; only the keys do.
//! - `sudo -e` has no `SUDO_USER`, which the real `sudo` does not let anyone set there.

mod arguments;
mod broker;
mod client;
mod entitlement;
mod session;
mod sys;
mod terminal;
mod wire;

pub(crate) use broker::Broker;
pub(crate) use client::{is_called as is_client, run as run_client};

/// The directory is the agent's own; its parents are root's.
const SOCKET: &str = "/run/belljar/sudo.sock";

/// Debian's `sudo`, which the template moved aside.
const REAL_SUDO: &str = "/usr/bin/sudo.distrib";

/// The system's own words, without the number that Rust adds.
fn errno_text(error: &std::io::Error) -> String {
    let text = |number| nix::errno::Errno::from_raw(number).desc().to_owned();
    error.raw_os_error().map_or_else(|| error.to_string(), text)
}
