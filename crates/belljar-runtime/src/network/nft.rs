//! Runs nft, in whatever network namespace the calling thread is in.
//!
//! Rules are handed over as text rather than built as netlink messages: a filter has to be readable in one look. What
//! the process costs is only paid where it does not matter; see [`ruleset`](super::ruleset).

use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::error::NetworkError;

/// Far above what nft takes, even on a loaded machine with thousands of rules of others.
const NFT_TIMEOUT: Duration = Duration::from_secs(10);

/// Distributions put nft into sbin, which not every service's PATH has.
const PLACES: [&str; 4] = ["/usr/sbin/nft", "/sbin/nft", "/usr/bin/nft", "/usr/local/sbin/nft"];

/// The nft program.
#[derive(Debug, Clone)]
pub(super) struct Nft {
    program: PathBuf,
}

impl Nft {
    pub(super) fn find() -> Option<Self> {
        PLACES.iter().map(Path::new).find(|place| place.exists()).map(|place| Self { program: place.to_owned() })
    }

    pub(super) fn program(&self) -> &Path {
        &self.program
    }

    /// Starts loading `rules`, all or none of them; [`Loading::finish`] waits for it.
    ///
    /// The child inherits the network namespace of the calling thread, which may leave it at once.
    pub(super) fn load(&self, step: &'static str, rules: &str) -> Result<Loading, NetworkError> {
        let failed = |source| NetworkError::PacketFilterTool { step, source };
        let child = Command::new(&self.program)
            .args(["-f", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(failed)?;
        let mut loading = Loading { step, child, finished: false };
        let mut input = loading.child.stdin.take().expect("stdin was asked for");
        // A reader that is gone has printed why: that is the better error.
        match input.write_all(rules.as_bytes()) {
            Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(failed(error)),
            _ => Ok(loading),
        }
    }

    /// Runs a query and returns what it printed.
    pub(super) fn query(&self, step: &'static str, arguments: &[&str]) -> Result<String, NetworkError> {
        let failed = |source| NetworkError::PacketFilterTool { step, source };
        let child = Command::new(&self.program)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(failed)?;
        let mut running = Loading { step, child, finished: false };
        let answer = read_to_end(running.child.stdout.take().expect("stdout was asked for")).map_err(failed)?;
        running.finish()?;
        Ok(String::from_utf8_lossy(&answer).into_owned())
    }
}

/// An nft that is at work.
#[derive(Debug)]
pub(super) struct Loading {
    step: &'static str,
    child: Child,
    finished: bool,
}

impl Loading {
    pub(super) fn finish(mut self) -> Result<(), NetworkError> {
        let step = self.step;
        let failed = |source| NetworkError::PacketFilterTool { step, source };
        // The end of its error stream is the end of the program; unlike wait(), it can be waited for with a limit.
        let message = read_to_end(self.child.stderr.take().expect("stderr was asked for")).map_err(failed)?;
        let status = self.child.wait().map_err(failed)?;
        self.finished = true;
        if status.success() { Ok(()) } else { Err(NetworkError::PacketFilter { step, message: first_line(&message) }) }
    }
}

impl Drop for Loading {
    fn drop(&mut self) {
        if !self.finished {
            // It may have ended meanwhile; and there is nobody to tell.
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

fn read_to_end(mut stream: impl Read + AsFd) -> io::Result<Vec<u8>> {
    let deadline = Instant::now() + NFT_TIMEOUT;
    let mut collected = Vec::new();
    let mut chunk = [0; 4096];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        let ready = poll(&mut [PollFd::new(stream.as_fd(), PollFlags::POLLIN)], timeout);
        match ready {
            Ok(0) => return Err(io::ErrorKind::TimedOut.into()),
            Ok(_) => {}
            Err(nix::Error::EINTR) => continue,
            Err(errno) => return Err(errno.into()),
        }
        let count = stream.read(&mut chunk)?;
        if count == 0 {
            return Ok(collected);
        }
        collected.extend_from_slice(&chunk[..count]);
    }
}

/// nft repeats its input under the error; the first line says what is wrong.
fn first_line(message: &[u8]) -> String {
    String::from_utf8_lossy(message).lines().next().unwrap_or("it gave no reason").to_owned()
}
