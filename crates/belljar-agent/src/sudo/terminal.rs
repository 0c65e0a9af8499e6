//! A command in a terminal: it gets one of its own, since the caller's belongs to the caller's session.
//!
//! ```text
//! caller's terminal ──input──▶ outer end │ inner end: the command's stdin, stdout, stderr,
//!     set to raw   ◀─output──            │            and controlling terminal
//! ```
//!
//! Keys such as Ctrl-C are not signals to this process then, but bytes that the inner terminal makes signals of, for
//! whoever is in its foreground.

use std::fs::File;
use std::io::{self, Read, Stdin, Stdout, Write};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rustix::fs::{Mode, OFlags, open};
use rustix::process::{Signal, getpgrp};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcgetpgrp, tcgetwinsize, tcsetattr, tcsetwinsize};
use tokio::sync::oneshot;

/// How long the inner terminal may be silent after the command's end, while something that it left has it open.
const SILENCE: Duration = Duration::from_millis(100);

#[derive(Debug)]
pub(super) struct Terminal {
    stdin: Stdin,
    /// The caller's settings.
    settings: Termios,
    outer: File,
    inner: Option<OwnedFd>,
    output: Output,
}

/// The thread that shows what the command prints.
#[derive(Debug)]
struct Output {
    /// Odd while it writes.
    steps: Arc<AtomicU64>,
    ended: oneshot::Receiver<()>,
}

impl Terminal {
    /// For a caller who reads from and writes to a terminal and is in its foreground; all others need no terminal, or
    /// must not be taken the input.
    pub(super) fn open() -> io::Result<Option<Self>> {
        let (stdin, stdout) = (io::stdin(), io::stdout());
        if !isatty(&stdin) || !isatty(&stdout) || tcgetpgrp(&stdin) != Ok(getpgrp()) {
            return Ok(None);
        }
        let settings = tcgetattr(&stdin)?;
        let outer = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
        grantpt(&outer)?;
        unlockpt(&outer)?;
        let inner = open(ptsname(&outer, Vec::new())?, OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC, Mode::empty())?;
        tcsetattr(&inner, OptionalActions::Now, &settings)?;
        let outer = File::from(outer);
        let output = show(outer.try_clone()?, stdout)?;
        pass_on(io::stdin(), outer.try_clone()?)?;
        let mut terminal = Self { stdin, settings, outer, inner: Some(inner), output };
        terminal.adapt();
        Ok(Some(terminal))
    }

    /// The command's end. Whoever takes it must close it once the command has it, or the output would never end.
    pub(super) fn take_inner(&mut self) -> Option<OwnedFd> {
        self.inner.take()
    }

    /// Whether the inner terminal makes the signal of a key. gVisor's outer terminal does as well, although it is told
    /// not to, and then it would come twice.
    pub(super) fn makes(signal: Signal) -> bool {
        matches!(signal, Signal::INT | Signal::QUIT | Signal::TSTP)
    }

    /// Makes the inner terminal as large as the caller's, and the caller's raw: after a signal either may have changed.
    pub(super) fn adapt(&mut self) {
        // A terminal without a size is one that nobody looks at.
        if let Ok(size) = tcgetwinsize(&self.stdin) {
            let _ = tcsetwinsize(&self.outer, size);
        }
        let mut raw = self.settings.clone();
        raw.make_raw();
        let _ = tcsetattr(&self.stdin, OptionalActions::Drain, &raw);
    }

    /// Shows what is still to be shown, and gives the caller's terminal back.
    pub(super) async fn close(mut self) {
        self.inner = None;
        let mut seen = self.output.steps.load(Ordering::Relaxed);
        while tokio::time::timeout(SILENCE, &mut self.output.ended).await.is_err() {
            let steps = self.output.steps.load(Ordering::Relaxed);
            let is_writing = steps % 2 == 1;
            if steps == seen && !is_writing {
                break;
            }
            seen = steps;
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = tcsetattr(&self.stdin, OptionalActions::Drain, &self.settings);
    }
}

/// A thread, because reading a terminal without blocking would make it so for all who have it open.
fn pass_on(mut stdin: Stdin, mut outer: File) -> io::Result<()> {
    std::thread::Builder::new().name("input".to_owned()).spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(length @ 1..) = stdin.read(&mut buffer) {
            if outer.write_all(&buffer[..length]).is_err() {
                return;
            }
        }
    })?;
    Ok(())
}

fn show(mut outer: File, mut stdout: Stdout) -> io::Result<Output> {
    let (end, ended) = oneshot::channel();
    let steps = Arc::new(AtomicU64::new(0));
    let counter = Arc::clone(&steps);
    std::thread::Builder::new().name("output".to_owned()).spawn(move || {
        let mut buffer = [0; 4096];
        // An error is what the end of a terminal looks like: nobody has the other side open.
        while let Ok(length @ 1..) = outer.read(&mut buffer) {
            counter.fetch_add(1, Ordering::Relaxed);
            let shown = stdout.write_all(&buffer[..length]).and_then(|()| stdout.flush());
            counter.fetch_add(1, Ordering::Relaxed);
            if shown.is_err() {
                break;
            }
        }
        let _ = end.send(());
    })?;
    Ok(Output { steps, ended })
}
