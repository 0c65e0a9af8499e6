//! `sudo` for users without the set-user-ID bit: the agent's broker and its client, with the host's own `sudo` behind.
//!
//! Each agent has its own /etc/sudoers, /run and /usr/bin, in a mount namespace that is gone with it.

mod support;

use std::io::{IoSlice, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Command;

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use serde_json::json;
use support::{Agent, Events, Outcome, PATIENCE, basic, eventually, is_alive};

/// A user that every Debian has, here entitled to everything.
const ENTITLED: &str = "nobody";

/// Another, who isn't.
const OTHER: &str = "daemon";

/// What a template looks like to the agent. `$0` is the test's directory, with what differs from the host below `etc`
/// and `bin`, and an empty file `sudo` for the client.
const NAMESPACE: &str = r#"
    set -e
    mount -t overlay -o "lowerdir=$0/etc:/etc" belljar-test /etc
    mount -t overlay -o "lowerdir=$0/bin:/usr/bin" belljar-test /usr/bin
    mount -t tmpfs belljar-test /run
    mount --bind "$1" "$0/sudo"
    exec "$@" --sudo"#;

/// An agent that starts `sudo` for `entitled`. `None`, with a note, where that can't be.
fn start_for(entitled: &str) -> Option<Agent> {
    let Some(sudo) =
        ["/usr/bin/sudo.distrib", "/usr/bin/sudo"].map(PathBuf::from).into_iter().find(|path| path.exists())
    else {
        eprintln!("skipped: there is no sudo on this machine");
        return None;
    };
    let directory = tempfile::tempdir().expect("a temporary directory");
    let at = |name: &str| directory.path().join(name);
    std::fs::create_dir_all(at("etc/sudoers.d")).expect("created");
    std::fs::create_dir(at("bin")).expect("created");
    std::fs::copy(sudo, at("bin/sudo.distrib")).expect("copied");
    let rule = format!("{entitled} ALL=(ALL:ALL) NOPASSWD: ALL\n");
    let policy = "Defaults env_reset\nroot ALL=(ALL:ALL) ALL\n@includedir /etc/sudoers.d\n";
    for (name, content) in [("etc/sudoers.d/90-belljar", rule.as_str()), ("etc/sudoers", policy), ("sudo", "")] {
        std::fs::write(at(name), content).expect("written");
    }
    let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
    // Or sudo says that it can't find itself.
    std::fs::write(at("etc/hosts"), format!("127.0.0.1 localhost {host}\n")).expect("written");
    for (name, mode) in [("etc/sudoers.d/90-belljar", 0o440), ("etc/sudoers", 0o440), ("etc/hosts", 0o644)] {
        std::fs::set_permissions(at(name), PermissionsExt::from_mode(mode)).expect("changed");
    }
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", NAMESPACE]).arg(directory.path()).arg(env!("CARGO_BIN_EXE_belljar-agent"));
    Agent::run(command, directory)
}

fn start() -> Option<Agent> {
    start_for(ENTITLED)
}

/// Starts a shell command in which `$sudo` is the client.
async fn stream_as(agent: &Agent, user: &str, command: &str) -> Events {
    let request = json!({
        "process": {
            "cmd": "/bin/bash",
            "args": ["-c", command],
            "cwd": "/",
            "envs": {"sudo": agent.text_path("sudo")},
        },
        "stdin": false,
    });
    agent.stream("process.Process/Start", request, &[("authorization", &basic(user))]).await
}

async fn run_as(agent: &Agent, user: &str, command: &str) -> Outcome {
    stream_as(agent, user, command).await.outcome().await
}

async fn stdout(agent: &Agent, command: &str) -> String {
    let outcome = run_as(agent, ENTITLED, command).await;
    assert_eq!(outcome.stderr, "", "{command}");
    outcome.stdout
}

#[tokio::test]
async fn the_entitled_user_is_root_or_whom_it_likes() {
    let Some(agent) = start() else { return };
    assert_eq!(stdout(&agent, "id -un; $sudo id -un; $sudo -u daemon id -un").await, "nobody\nroot\ndaemon\n");
    let named = "printf '%s ' $SUDO_USER $SUDO_UID $SUDO_GID $SUDO_COMMAND";
    let shell = format!("$sudo sh -c \"{}\"", named.replace('$', "\\$"));
    assert_eq!(stdout(&agent, &shell).await, format!("nobody 65534 65534 {} ", "/usr/bin/sh -c ".to_owned() + named));
    let listed = stdout(&agent, "$sudo -l").await;
    assert!(listed.contains("User nobody may run") && listed.contains("NOPASSWD: ALL"), "{listed}");
}

#[tokio::test]
async fn others_are_refused() {
    let Some(agent) = start() else { return };
    let refused = |outcome: &Outcome| {
        assert_eq!(
            (outcome.stdout.as_str(), outcome.stderr.as_str()),
            ("1\n", "sudo: daemon is not in the sudoers file.\n")
        );
    };
    refused(&run_as(&agent, OTHER, "$sudo id; echo $?").await);
    // The group opens the socket, and no more than that.
    let in_group = "setpriv --reuid=daemon --regid=nogroup --clear-groups bash -c '$sudo id; echo $?'";
    refused(&run_as(&agent, "root", in_group).await);
    // Root needs nobody's help.
    assert_eq!(run_as(&agent, "root", "$sudo id -un").await.stdout, "root\n");
}

#[tokio::test]
async fn nothing_listens_where_nobody_is_entitled() {
    let Some(agent) = start_for("# nobody") else { return };
    assert!(!agent_path(&agent, "run/belljar").exists());
}

#[tokio::test]
async fn it_ends_as_the_command_does() {
    let Some(agent) = start() else { return };
    let statuses = "$sudo true; echo $?; $sudo sh -c 'exit 7'; echo $?; $sudo sh -c 'kill -9 $$'; echo $?
        $sudo sh -c 'kill -TERM $$'; echo $?; $sudo no-such-command; echo $?";
    let outcome = run_as(&agent, ENTITLED, statuses).await;
    assert_eq!(outcome.stdout, "0\n7\n137\n143\n1\n");
    assert!(outcome.stderr.contains("sudo: no-such-command: command not found"), "{}", outcome.stderr);
}

#[tokio::test]
async fn the_command_is_where_its_caller_is() {
    let Some(agent) = start() else { return };
    let surroundings = "cd /tmp; umask 027; A='b c' B=d LD_LIBRARY_PATH=/x TMPDIR=/y $sudo -E sh -c \
        'pwd; umask; echo $A $B $LD_LIBRARY_PATH $TMPDIR; ulimit -n'; ulimit -n; A=b $sudo sh -c 'echo $A'";
    let found = stdout(&agent, surroundings).await;
    let lines: Vec<_> = found.lines().collect();
    let &[directory, umask, variables, limit, callers_limit, cleared] = &lines[..] else { panic!("{lines:?}") };
    assert_eq!((directory, umask, variables, cleared), ("/tmp", "0027", "b c d", ""));
    assert_eq!(limit, callers_limit);
    // A directory that the caller is in without the right to enter it.
    let locked = agent.path("locked");
    std::fs::create_dir(&locked).expect("created");
    std::fs::set_permissions(&locked, PermissionsExt::from_mode(0o700)).expect("changed");
    let entered =
        format!("cd {}; setpriv --reuid=nobody --regid=nogroup --clear-groups $sudo pwd -P", locked.display());
    let outcome = run_as(&agent, "root", &entered).await;
    assert_eq!((outcome.stdout.trim(), outcome.stderr.as_str()), (locked.to_str().expect("text"), ""));
}

#[tokio::test]
async fn streams_are_the_callers_own() {
    let Some(agent) = start() else { return };
    assert_eq!(stdout(&agent, "echo in | $sudo cat | $sudo sh -c 'read a; echo $a out'").await, "in out\n");
    assert_eq!(stdout(&agent, "$sudo cat <<< here").await, "here\n");
    assert_eq!(stdout(&agent, "head -c 5000000 /dev/zero | $sudo cat | wc -c").await, "5000000\n");
    assert_eq!(stdout(&agent, "$sudo yes | head -1; $sudo cat /dev/zero | head -c 1 | wc -c").await, "y\n1\n");
    assert_eq!(stdout(&agent, "$sudo sh -c 'sleep 0.2; echo later' & echo first; wait").await, "first\nlater\n");
    let outcome = run_as(&agent, ENTITLED, "$sudo sh -c 'echo out; echo err >&2'").await;
    assert_eq!((outcome.stdout.as_str(), outcome.stderr.as_str()), ("out\n", "err\n"));
}

#[tokio::test]
async fn large_command_lines_fit_and_larger_ones_are_told_so() {
    let Some(agent) = start() else { return };
    assert_eq!(stdout(&agent, "$sudo sh -c 'echo $#' sh $(seq 100000)").await, "100000\n");
    assert_eq!(stdout(&agent, "A=$(printf %0100000d 1) $sudo -E sh -c 'echo ${#A}'").await, "100000\n");
    let outcome = run_as(&agent, ENTITLED, "ulimit -s unlimited; $sudo true $(seq 300000); echo $?").await;
    assert_eq!((outcome.stdout.as_str(), outcome.stderr.as_str()), ("1\n", "sudo: Argument list too long\n"));
}

#[tokio::test]
async fn signals_are_passed_on() {
    let Some(agent) = start() else { return };
    // A shell's background jobs ignore SIGINT, unless it has job control.
    for (signal, name) in [("TERM", "TERM"), ("INT", "INT"), ("USR1", "USR1"), ("HUP", "HUP")] {
        let command = format!(
            "set -m; $sudo bash -c 'trap \"echo got {name}; exit 5\" {name}; echo ready; while :; do sleep 0.05; done' \
             > >(tee {out}) & until grep -q ready {out} 2>/dev/null; do sleep 0.05; done; kill -{signal} $!; wait $!; echo $?",
            out = agent.text_path(name)
        );
        let outcome = run_as(&agent, ENTITLED, &command).await;
        let mut lines: Vec<_> = outcome.stdout.lines().collect();
        lines.sort_unstable();
        assert_eq!(lines, ["5", &format!("got {name}"), "ready"], "{}", outcome.stderr);
    }
}

#[tokio::test]
async fn a_stopped_command_goes_on_when_told() {
    let Some(agent) = start() else { return };
    let count = agent.text_path("count");
    let command = format!(
        "set -m; $sudo bash -c 'for i in $(seq 40); do echo $i > {count}; sleep 0.05; done' & sleep 0.5; kill -TSTP $!; \
         sleep 0.2; a=$(cat {count}); sleep 0.4; b=$(cat {count}); echo $((b - a)); kill -CONT $!; \
         until [ $(cat {count}) = 40 ]; do sleep 0.1; done; echo all"
    );
    assert_eq!(run_as(&agent, ENTITLED, &command).await.stdout, "0\nall\n");
}

#[tokio::test]
async fn whoever_kills_the_caller_kills_the_command() {
    let Some(agent) = start() else { return };
    let command = "$sudo bash -c 'sleep 1000 & echo $!; setsid sleep 1000 & echo $!; echo $$; wait'; echo unreachable";
    let mut events = stream_as(&agent, ENTITLED, command).await;
    let pid = events.pid().await;
    let mut printed = String::new();
    while printed.lines().count() < 3 {
        printed.push_str(&events.stdout().await);
    }
    let pids: Vec<u64> = printed.lines().map(|line| line.parse().expect("a pid")).collect();
    assert!(pids.iter().all(|pid| is_alive(*pid)));
    agent.unary("process.Process/SendSignal", json!({"process": {"pid": pid}, "signal": "SIGNAL_SIGKILL"})).await;
    eventually("all of them are dead", || !pids.iter().any(|pid| is_alive(*pid))).await;
    assert_eq!(events.outcome().await.stdout, "");
    // What a command leaves running when it ends by itself goes on.
    let left = stdout(&agent, "$sudo bash -c 'sleep 1000 > /dev/null 2>&1 & echo $!'").await;
    let left: u64 = left.trim().parse().expect("a pid");
    assert!(is_alive(left));
    run_as(&agent, "root", &format!("kill {left}")).await;
}

#[tokio::test]
async fn a_terminal_is_the_commands_own() {
    let Some(agent) = start() else { return };
    // `script` is the terminal; the command's is another, which it can open as /dev/tty, and read from.
    let command = "export TERM=xterm; { sleep 1; echo typed; sleep 1; } | script -qec \
        \"$sudo bash -c 'read a; echo got \\$a > /dev/tty; test -t 2 && stty size; exit 4'\" /dev/null; echo $?";
    let outcome = run_as(&agent, ENTITLED, command).await;
    assert!(outcome.stdout.contains("got typed\r\n0 0\r\n"), "{outcome:?}");
    assert!(outcome.stdout.ends_with("4\n"), "{outcome:?}");
    // A key is a signal to what runs inside, and only once.
    let command = "{ sleep 1; printf '\\003'; sleep 1; } | script -qec \
        \"$sudo bash -c 'trap \\\"echo int\\\" INT; sleep 2; echo end'\" /dev/null";
    let outcome = run_as(&agent, ENTITLED, command).await;
    assert_eq!(outcome.stdout.matches("int").count(), 1, "{outcome:?}");
    assert!(outcome.stdout.contains("end"), "{outcome:?}");
}

fn agent_path(agent: &Agent, path: &str) -> PathBuf {
    PathBuf::from(format!("/proc/{}/root", agent.pid())).join(path)
}

fn connect(agent: &Agent) -> UnixStream {
    let stream = UnixStream::connect(agent_path(agent, "run/belljar/sudo.sock")).expect("it listens");
    stream.set_read_timeout(Some(PATIENCE)).expect("set");
    stream
}

/// A connection of which the broker is told who sends what.
fn greeted(agent: &Agent) -> UnixStream {
    let mut stream = connect(agent);
    stream.read_exact(&mut [0; 5]).expect("a greeting");
    stream
}

/// The text of a refusal.
fn refusal(stream: &mut UnixStream) -> String {
    let mut answer = Vec::new();
    if let Err(error) = stream.read_to_end(&mut answer) {
        // The end of a connection on which something was left unread.
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    }
    let text = answer.iter().position(|byte| *byte == 3).map(|start| &answer[start + 5..]);
    String::from_utf8_lossy(text.unwrap_or_default()).into_owned()
}

fn send(stream: &UnixStream, bytes: &[u8], files: usize) {
    let file = std::fs::File::open("/dev/null").expect("opened");
    let files = vec![file.as_raw_fd(); files];
    let rights = [ControlMessage::ScmRights(&files)];
    let rights = if files.is_empty() { &[][..] } else { &rights };
    sendmsg::<()>(stream.as_raw_fd(), &[IoSlice::new(bytes)], rights, MsgFlags::MSG_NOSIGNAL, None).expect("sent");
}

#[tokio::test]
async fn hostile_clients_get_nowhere() {
    let Some(mut agent) = start_for("root") else { return };
    let descriptors = |agent: &Agent| {
        std::fs::read_dir(agent_path(agent, "proc").join(agent.pid().to_string()).join("fd")).map_or(0, Iterator::count)
    };
    let before = descriptors(&agent);
    let length = |length: u32| length.to_le_bytes();
    for _ in 0..20 {
        for (bytes, files, expected) in [
            (&length(1 << 30)[..], 4, "Argument list too long"),
            (&length(9), 0, "malformed request"),
            (&length(9), 3, "malformed request"),
            (&length(9), 253, "malformed request"),
            (&[1], 4, "malformed request"),
            (&[&length(3)[..], &[0; 3]].concat(), 4, "malformed request"),
            (&[&length(10)[..], &[0; 9], b"x"].concat(), 4, "malformed request"),
            // A terminal that isn't one, and a directory that isn't one.
            (&[&length(9)[..], &[0, 0, 0, 0, 1, 0, 0, 0, 0]].concat(), 4, "unable to execute /usr/bin/sudo.distrib: "),
            (&[&length(9)[..], &[0; 9]].concat(), 4, "unable to execute /usr/bin/sudo.distrib: Not a directory"),
        ] {
            let mut stream = greeted(&agent);
            send(&stream, bytes, files);
            // What follows is never read.
            let _ = stream.write(&[9; 100]);
            let refused = refusal(&mut stream);
            assert!(refused.starts_with(expected), "{bytes:?} with {files} files: {refused}");
        }
        send(&greeted(&agent), &length(1 << 20), 4);
    }
    eventually("all files are closed again", || descriptors(&agent) <= before).await;

    let idle: Vec<_> = (0..256).map(|_| greeted(&agent)).collect();
    assert!(refusal(&mut connect(&agent)).starts_with("256 commands run at a time"));
    drop(idle);
    eventually("there is room again", || {
        let mut greeting = [0; 5];
        connect(&agent).read_exact(&mut greeting).is_ok() && greeting[0] == 0
    })
    .await;
    assert!(agent.is_running());
}
