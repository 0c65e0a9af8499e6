//! Runs a program so that nothing of it outlives us: no process, and no mount.
//!
//! ```text
//! belljar ──stdin: a pipe that never carries anything──┐
//!    └─ unshare ── sh, PID 1 of its own namespace ─────┴─ reads the pipe; at its end kills all others
//!                    └─ mmdebstrap ── apt, dpkg, the packages' scripts …
//! ```
//!
//! Whatever ends belljar, SIGKILL included, closes the pipe; the shell then kills the build and ends, and with PID 1
//! the kernel ends its namespace and the mount namespace in which all mounts were made. A parent-death signal would not
//! do: it follows the *thread* that started the child, and threads of an async runtime end when they are idle.

use std::ffi::OsString;
use std::fs::File;
use std::process::{ExitStatus, Stdio};

use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, ChildStderr, ChildStdin, Command};

const SCRIPT: &str = include_str!("supervise.sh");

/// A program and all that it starts.
#[derive(Debug)]
pub(super) struct Supervised {
    child: Child,
    output: BufReader<ChildStderr>,
    /// Held, never written to.
    lifeline: Option<ChildStdin>,
}

impl Supervised {
    /// Starts `command` (program and arguments) with exactly `environment`. It holds `lock` as long as any process of
    /// it lives; its standard output and standard error are one stream.
    pub(super) fn start(command: &[OsString], environment: &[(&str, OsString)], lock: File) -> std::io::Result<Self> {
        let mut child = Command::new("unshare")
            .args(["--mount", "--pid", "--uts", "--ipc", "--fork", "--kill-child", "--mount-proc", "--"])
            .args(["sh", "-c", SCRIPT, "sh"])
            .args(command)
            .env_clear()
            .envs(environment.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::piped())
            // The script moves it away from standard output: this is how a child is handed an open file in safe Rust.
            .stdout(lock)
            .stderr(Stdio::piped())
            // A Ctrl-C at the terminal is for belljar, which then lets go of the lifeline.
            .process_group(0)
            .kill_on_drop(true)
            .spawn()?;
        let output = child.stderr.take().expect("standard error is piped");
        let lifeline = child.stdin.take();
        Ok(Self { child, output: BufReader::new(output), lifeline })
    }

    /// The next line of output; `None` when all processes have closed it.
    pub(super) async fn line(&mut self) -> std::io::Result<Option<String>> {
        let mut bytes = Vec::new();
        if self.output.read_until(b'\n', &mut bytes).await? == 0 {
            return Ok(None);
        }
        Ok(Some(String::from_utf8_lossy(&bytes).trim_end().to_owned()))
    }

    /// Waits for the end of all of it. The status is the command's own.
    pub(super) async fn wait(mut self) -> std::io::Result<ExitStatus> {
        // `Child::wait` would close a standard input it still owned; the lifeline was taken out, so it stays open.
        self.child.wait().await
    }

    /// Ends all of it, and returns when it has ended.
    pub(super) async fn stop(mut self) -> std::io::Result<()> {
        drop(self.lifeline.take());
        self.child.kill().await
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn lock() -> (tempfile::TempDir, File) {
        let directory = tempfile::tempdir().expect("a directory");
        let file = File::open(directory.path()).expect("opened");
        file.try_lock().expect("free");
        (directory, file)
    }

    fn start(script: &str, lock: File) -> Supervised {
        let command = ["sh", "-c", script].map(OsString::from);
        let path = std::env::var_os("PATH").expect("a PATH");
        Supervised::start(&command, &[("PATH", path)], lock).expect("started")
    }

    /// Waits until nobody holds the lock, which is until every process is gone.
    async fn all_gone(directory: &tempfile::TempDir) -> bool {
        for _ in 0..100 {
            if File::open(directory.path()).expect("opened").try_lock().is_ok() {
                return true;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        false
    }

    fn skip(test: &str) -> bool {
        super::super::tests::skipped_without_root(test)
    }

    #[tokio::test]
    async fn output_and_status_come_through_and_the_environment_is_exact() {
        if skip("output_and_status_come_through_and_the_environment_is_exact") {
            return;
        }
        let (_directory, lock) = lock();
        let mut supervised =
            start("echo out; echo err >&2; echo pid $PPID; hostname; env | grep -c CARGO; exit 7", lock);
        let mut lines = Vec::new();
        while let Some(line) = supervised.line().await.expect("readable") {
            lines.push(line);
        }
        assert_eq!(lines, ["out", "err", "pid 1", "localhost", "0"]);
        assert_eq!(supervised.wait().await.expect("ended").code(), Some(7));
    }

    #[tokio::test]
    async fn everything_ends_when_the_lifeline_is_cut() {
        if skip("everything_ends_when_the_lifeline_is_cut") {
            return;
        }
        let (directory, lock) = lock();
        // A mount, a process that ignores signals, one that left its session: what a package's script might do.
        let script =
            "mount -t tmpfs belljar-test /mnt; trap '' TERM INT HUP; setsid sleep 1000 & echo ready; sleep 1000";
        let mut supervised = start(script, lock);
        assert_eq!(supervised.line().await.expect("readable").as_deref(), Some("ready"));
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").expect("readable");
        assert!(!mounts.contains("belljar-test"), "the mount is visible outside");
        assert!(!all_gone_now(&directory), "it is running");

        // As when belljar is killed: only the pipe closes, nobody sends a signal.
        supervised.lifeline = None;
        assert!(all_gone(&directory).await);
        assert!(!supervised.wait().await.expect("ended").success());
    }

    #[tokio::test]
    async fn everything_ends_when_it_is_stopped() {
        if skip("everything_ends_when_it_is_stopped") {
            return;
        }
        let (directory, lock) = lock();
        let mut supervised = start("setsid sleep 1000 & echo ready; sleep 1000", lock);
        assert_eq!(supervised.line().await.expect("readable").as_deref(), Some("ready"));
        supervised.stop().await.expect("stopped");
        assert!(all_gone(&directory).await);
    }

    fn all_gone_now(directory: &tempfile::TempDir) -> bool {
        File::open(directory.path()).expect("opened").try_lock().is_ok()
    }
}
