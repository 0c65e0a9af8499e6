//! The caller's end: what `/usr/bin/sudo` turns into. It hands everything over and ends as the command does.

use std::ffi::OsStr;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::task::Poll;
use std::{env, future};

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::process::{Signal, getuid, umask};
use tokio::io::{AsyncWriteExt, Interest};
use tokio::net::UnixStream;
use tokio::signal::unix::{SignalKind, signal};

use super::terminal::Terminal;
use super::wire::{Order, Reply, relayed_signals};
use super::{REAL_SUDO, SOCKET, errno_text, sys};
use crate::process::Exit;
use crate::users::UserDatabase;

/// What `sudo` exits with when it is to blame itself.
const FAILURE: u8 = 1;

/// Whether the program was called by the client's name.
pub(crate) fn is_called(name: Option<&OsStr>) -> bool {
    name.is_some_and(|name| Path::new(name).file_name() == Some(OsStr::new("sudo")))
}

/// Has the broker run `sudo` with this program's arguments, or runs it itself where there is no broker to be asked.
pub(crate) fn run() -> ExitCode {
    match ask_and_wait() {
        Ok(Exit::Code(code)) => ExitCode::from(u8::try_from(code).unwrap_or(FAILURE)),
        Ok(Exit::Signal { number, .. }) => {
            sys::die_of(number);
            // It was ignored here, or isn't deadly. A shell would say the same.
            ExitCode::from(u8::try_from(128 + number).unwrap_or(FAILURE))
        }
        Err(error) => {
            eprintln!("sudo: {error}");
            ExitCode::from(FAILURE)
        }
    }
}

#[derive(Debug, thiserror::Error)]
enum ClientError {
    #[error("{0}")]
    Refused(String),
    #[error("{0} is not in the sudoers file.")]
    NotEntitled(String),
    #[error("unable to execute {REAL_SUDO}: {}", errno_text(.0))]
    Exec(io::Error),
    #[error("{0}")]
    Order(#[from] super::wire::OrderError),
    #[error("unable to have the command run: {}", errno_text(.0))]
    Io(#[from] io::Error),
}

fn ask_and_wait() -> Result<Exit, ClientError> {
    if getuid().is_root() {
        return Err(exec());
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let ended = runtime.block_on(async {
        let stream = match UnixStream::connect(SOCKET).await {
            // No broker: an engine that knows set-user-ID bits.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(exec()),
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                let name = UserDatabase::system().names().user(getuid().as_raw());
                return Err(ClientError::NotEntitled(name));
            }
            stream => stream?,
        };
        attend(stream).await
    });
    // A thread may still wait for input.
    runtime.shutdown_background();
    ended
}

/// Turns into the real `sudo`; returns only with a reason.
fn exec() -> ClientError {
    ClientError::Exec(Command::new(REAL_SUDO).arg0("sudo").args(env::args_os().skip(1)).exec())
}

async fn attend(mut stream: UnixStream) -> Result<Exit, ClientError> {
    // Before the command runs, or a signal could end this alone.
    let mut signals = Signals::listen()?;
    match Reply::read(&mut stream).await? {
        Reply::Ready => {}
        Reply::Refused(reason) => return Err(ClientError::Refused(reason)),
        Reply::Ended(_) => return Err(io::Error::from(io::ErrorKind::InvalidData).into()),
    }
    let mut terminal = Terminal::open()?;
    let ended = match send_order(&mut stream, terminal.as_mut()).await {
        Ok(()) => wait(&mut stream, &mut signals, terminal.as_mut()).await,
        // Refused before everything was said, perhaps.
        Err(ClientError::Io(error)) => match Reply::read(&mut stream).await {
            Ok(Reply::Refused(reason)) => Err(ClientError::Refused(reason)),
            _ => Err(error.into()),
        },
        Err(error) => Err(error),
    };
    if let Some(terminal) = terminal {
        terminal.close().await;
    }
    ended
}

async fn send_order(stream: &mut UnixStream, terminal: Option<&mut Terminal>) -> Result<(), ClientError> {
    let mask = umask(Mode::empty());
    umask(mask);
    let order = Order {
        umask: mask.bits(),
        has_terminal: terminal.is_some(),
        arguments: env::args_os().skip(1).collect(),
        environment: env::vars_os().collect(),
    };
    let bytes = order.encode()?;
    let length = u32::try_from(bytes.len()).map_err(io::Error::other)?.to_le_bytes();
    let directory = working_directory()?;
    let inner: Option<OwnedFd> = terminal.and_then(Terminal::take_inner);
    let (stdin, stdout, stderr) = (io::stdin(), io::stdout(), io::stderr());
    let (mut input, mut output, mut errors) = (stdin.as_fd(), stdout.as_fd(), stderr.as_fd());
    if let Some(inner) = &inner {
        (input, output) = (inner.as_fd(), inner.as_fd());
        if rustix::termios::isatty(errors) {
            errors = inner.as_fd();
        }
    }
    let files = [input, output, errors, directory.as_fd()].map(|file| file.as_raw_fd());
    let send = || {
        let rights = [ControlMessage::ScmRights(&files)];
        let sent = sendmsg::<()>(stream.as_raw_fd(), &[IoSlice::new(&length)], &rights, MsgFlags::MSG_NOSIGNAL, None)?;
        // A few bytes on a new connection; the files go with the first of them.
        if sent == length.len() { Ok(()) } else { Err(io::Error::from(io::ErrorKind::WriteZero)) }
    };
    stream.async_io(Interest::WRITABLE, send).await?;
    stream.write_all(&bytes).await?;
    Ok(())
}

/// The working directory, which need not be readable; by its other name it need not even be one that the caller may
/// enter, as after root's `sudo -u user`.
fn working_directory() -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let opened = openat(CWD, ".", flags, Mode::empty());
    Ok(opened.or_else(|_| openat(CWD, "/proc/self/cwd", flags, Mode::empty()))?)
}

/// Passes signals on until the broker says how the command ended.
async fn wait(
    stream: &mut UnixStream,
    signals: &mut Signals,
    mut terminal: Option<&mut Terminal>,
) -> Result<Exit, ClientError> {
    let (mut replies, mut orders) = stream.split();
    // Once, since reading it in part and beginning anew would lose that part.
    let mut reply = std::pin::pin!(Reply::read(&mut replies));
    loop {
        let signal = tokio::select! {
            reply = &mut reply => return match reply? {
                Reply::Ended(exit) => Ok(exit),
                Reply::Refused(reason) => Err(ClientError::Refused(reason)),
                Reply::Ready => Err(io::Error::from(io::ErrorKind::InvalidData).into()),
            },
            signal = signals.next() => signal,
        };
        if let Some(terminal) = &mut terminal {
            if Terminal::makes(signal) {
                continue;
            }
            terminal.adapt();
        }
        // If it can't be passed on, the broker has something to say or is gone; the reply tells.
        let _ = orders.write_all(&[byte(signal)]).await;
        if signal == Signal::TSTP {
            // Until somebody continues this process; or not at all, if the kernel knows of nobody who could.
            sys::stop();
            let _ = orders.write_all(&[byte(Signal::CONT)]).await;
        }
    }
}

fn byte(signal: Signal) -> u8 {
    u8::try_from(signal.as_raw()).unwrap_or(0)
}

/// The signals to pass on, except those that this process was started to ignore.
#[derive(Debug)]
struct Signals(Vec<(Signal, tokio::signal::unix::Signal)>);

impl Signals {
    fn listen() -> io::Result<Self> {
        let heeded = relayed_signals().filter(|number| !sys::is_ignored(*number));
        heeded
            .map(|number| Ok((number, signal(SignalKind::from_raw(number.as_raw()))?)))
            .collect::<io::Result<_>>()
            .map(Self)
    }

    async fn next(&mut self) -> Signal {
        future::poll_fn(|context| {
            for (number, signal) in &mut self.0 {
                if let Poll::Ready(Some(())) = signal.poll_recv(context) {
                    return Poll::Ready(*number);
                }
            }
            Poll::Pending
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStrExt;

    use super::*;

    #[test]
    fn the_client_goes_by_its_name() {
        for (name, expected) in [
            (Some("/.belljar/sudo"), true),
            (Some("sudo"), true),
            (Some("/.belljar/agent"), false),
            (Some("/sudo/agent"), false),
            (Some(""), false),
            (None, false),
        ] {
            assert_eq!(is_called(name.map(|name| OsStr::from_bytes(name.as_bytes()))), expected, "{name:?}");
        }
    }
}
