//! One client and its command, from the order to the end.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use rustix::process::{Pid, Rlimit};
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::UnixStream;
use tokio::sync::{Semaphore, oneshot};
use tokio_util::sync::CancellationToken;

use super::sys::{self, Received, Surroundings};
use super::wire::{FILES, HEADER_BYTES, MAX_ORDER_BYTES, Order, Reply, relayed};
use super::{REAL_SUDO, arguments, errno_text};
use crate::process::{Children, Exit};
use crate::users::{User, UserDatabase};

/// How long a client may take to say what it wants.
const PATIENCE: Duration = Duration::from_secs(10);

/// How long it may take to read how its command ended.
const FAREWELL: Duration = Duration::from_secs(1);

/// Memory for orders that are on their way, all clients together.
const ORDERS_BYTES: usize = 4 * MAX_ORDER_BYTES;

/// The least time between two rounds of signals for one command: each can mean a look at every process.
const BETWEEN_SIGNALS: Duration = Duration::from_millis(10);

/// What all sessions share.
#[derive(Debug)]
pub(super) struct Sessions {
    children: Children,
    users: UserDatabase,
    open_files: Rlimit,
    entitled: String,
    orders_bytes: Semaphore,
    /// Orders are unpacked one at a time: that takes more memory than they do.
    unpacking: Semaphore,
    /// Everything ends when the agent does.
    pub(super) ending: CancellationToken,
}

/// Why nothing was started, in words for the caller.
#[derive(Debug, thiserror::Error)]
enum Refusal {
    #[error("{0} is not in the sudoers file.")]
    NotEntitled(String),
    #[error("{0}")]
    Order(#[from] super::wire::OrderError),
    #[error("the request took too long")]
    TooSlow,
    #[error("unable to execute {REAL_SUDO}: {}", errno_text(.0))]
    Start(io::Error),
    /// Nobody is left to be told.
    #[error("the connection broke off")]
    Gone(#[from] io::Error),
}

impl Sessions {
    pub(super) fn new(children: Children, users: UserDatabase, open_files: Rlimit, entitled: String) -> Self {
        Self {
            children,
            users,
            open_files,
            entitled,
            orders_bytes: Semaphore::new(ORDERS_BYTES),
            unpacking: Semaphore::new(1),
            ending: CancellationToken::new(),
        }
    }

    /// Serves one client until its command has ended or it is gone.
    pub(super) async fn attend(self: Arc<Self>, mut stream: UnixStream) {
        let reply = match self.start(&mut stream).await {
            Ok((pid, exit)) => match self.accompany(&mut stream, pid, exit).await {
                Some(exit) => Reply::Ended(exit),
                None => return,
            },
            Err(refusal) => Reply::Refused(refusal.to_string()),
        };
        say(&mut stream, &reply).await;
    }

    async fn start(&self, stream: &mut UnixStream) -> Result<(Pid, oneshot::Receiver<Exit>), Refusal> {
        rustix::net::sockopt::set_socket_passcred(&*stream, true).map_err(io::Error::from)?;
        stream.write_all(&Reply::Ready.encode()).await?;
        let ordered = tokio::time::timeout(PATIENCE, self.order(stream)).await;
        let (caller, files, bytes, _room) = ordered.map_err(|_| Refusal::TooSlow)??;

        let _turn = self.unpacking.acquire().await.map_err(io::Error::other)?;
        let order = Order::decode(&bytes)?;
        drop(bytes);
        let command = prepare(&caller, order, files, self.open_files);
        let spawned = self.children.spawn(command).await.map_err(Refusal::Start)?;
        tracing::debug!(pid = spawned.pid.as_raw_nonzero(), user = caller.name, "sudo");
        Ok((spawned.pid, spawned.exit))
    }

    /// Receives who wants something, the files, and the order, not yet unpacked.
    async fn order(
        &self,
        stream: &mut UnixStream,
    ) -> Result<(User, [OwnedFd; FILES], Vec<u8>, tokio::sync::SemaphorePermit<'_>), Refusal> {
        let mut header = [0; HEADER_BYTES];
        let received = stream.async_io(Interest::READABLE, || sys::receive(stream.as_fd(), &mut header)).await?;
        let Received { length, sender, files } = received;
        let caller = self.entitled(sender)?;
        let malformed = super::wire::OrderError::Malformed;
        let files = files.try_into().map_err(|_| malformed)?;
        let length = u32::try_from(length).ok().filter(|length| *length as usize == HEADER_BYTES);
        length.ok_or(super::wire::OrderError::Malformed)?;
        let length = u32::from_le_bytes(header);
        if length as usize > MAX_ORDER_BYTES {
            return Err(super::wire::OrderError::TooLong.into());
        }
        let room = self.orders_bytes.acquire_many(length).await.map_err(io::Error::other)?;
        let mut bytes = vec![0; length as usize];
        stream.read_exact(&mut bytes).await?;
        Ok((caller, files, bytes, room))
    }

    /// The sandbox's users can change, so they are looked up each time.
    fn entitled(&self, sender: Option<u32>) -> Result<User, Refusal> {
        let sender = sender.ok_or_else(|| io::Error::other("an unknown sender"))?;
        match self.users.find(&self.entitled) {
            Ok(user) if user.uid == sender => Ok(user),
            _ => Err(Refusal::NotEntitled(self.users.names().user(sender))),
        }
    }

    /// Passes signals on until the command ends. `None` if the client went first, and the command with it.
    async fn accompany(&self, stream: &mut UnixStream, pid: Pid, mut exit: oneshot::Receiver<Exit>) -> Option<Exit> {
        let mut signals = [0; 64];
        loop {
            let read = tokio::select! {
                biased;
                exit = &mut exit => {
                    return Some(exit.expect("the thread that reaps lives as long as any handle to it, and `children` is one"));
                }
                () = self.ending.cancelled() => Ok(0),
                read = stream.read(&mut signals) => read,
            };
            let Ok(length @ 1..) = read else { break };
            let mut received = signals[..length].to_vec();
            received.dedup();
            for (signal, whom) in received.into_iter().filter_map(relayed) {
                if let Err(error) = self.children.signal(pid, whom, signal).await {
                    tracing::error!(%error, pid = pid.as_raw_nonzero(), "a signal could not be passed on");
                }
            }
            tokio::time::sleep(BETWEEN_SIGNALS).await;
        }
        if let Err(error) = self.children.kill_tree(pid).await {
            tracing::error!(%error, pid = pid.as_raw_nonzero(), "what a lost client started could not be killed");
        }
        None
    }
}

/// Tells the client, if it listens.
pub(super) async fn say(stream: &mut UnixStream, reply: &Reply) {
    let reply = reply.encode();
    // Neither a client that is gone nor one that does not read has a claim to more.
    let _ = tokio::time::timeout(FAREWELL, stream.write_all(&reply)).await;
}

fn prepare(caller: &User, order: Order, files: [OwnedFd; FILES], open_files: Rlimit) -> Command {
    let [stdin, stdout, stderr, directory] = files;
    let Order { umask, has_terminal, arguments, environment } = order;
    let mut command = Command::new(REAL_SUDO);
    command.arg0("sudo").args(arguments::for_root(caller, arguments));
    command.env_clear().envs(environment.into_iter().filter(|(name, _)| arguments::is_safe_variable(name)));
    command.stdin(Stdio::from(stdin)).stdout(Stdio::from(stdout)).stderr(Stdio::from(stderr));
    sys::surround(&mut command, Surroundings { directory, umask, has_terminal, open_files });
    command
}
