//! The agent's child processes. One thread forks, reaps and signals all of them, so that a process id is never
//! signalled after it was reaped, and an exit is never reaped before someone waits for it.
//!
//! As the sandbox's init the agent is also the parent of every orphan; those are reaped and forgotten.

use std::collections::HashMap;
use std::io;
use std::process::{ChildStderr, ChildStdin, ChildStdout, Command};

use rustix::process::{Pid, Signal, WaitOptions, kill_process_group, wait};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, oneshot};

use super::exit::Exit;
use super::limit::ProcessLimit;
use super::tree::{self, Whom};

/// Requests that may wait for the thread; each takes a few milliseconds at most.
const QUEUE: usize = 64;

/// Forking and scanning `/proc` need little.
const STACK_BYTES: usize = 256 << 10;

/// Handle to the thread. It ends when the last handle is gone.
#[derive(Debug, Clone)]
pub(crate) struct Children {
    requests: mpsc::Sender<Request>,
}

/// A started command, with its ends of the pipes that `Command` was given.
#[derive(Debug)]
pub(crate) struct Spawned {
    pub(crate) pid: Pid,
    pub(crate) stdin: Option<ChildStdin>,
    pub(crate) stdout: Option<ChildStdout>,
    pub(crate) stderr: Option<ChildStderr>,
    pub(crate) exit: oneshot::Receiver<Exit>,
}

#[derive(Debug)]
enum Request {
    Spawn {
        command: Box<Command>,
        reply: oneshot::Sender<io::Result<Spawned>>,
    },
    Terminate {
        leader: Pid,
        reply: oneshot::Sender<()>,
    },
    KillTree {
        leader: Pid,
        reply: oneshot::Sender<()>,
    },
    Signal {
        leader: Pid,
        whom: Whom,
        signal: Signal,
        reply: oneshot::Sender<()>,
    },
    /// Some child changed its state.
    Reap,
}

impl Children {
    /// Starts the thread, and a task that wakes it for every SIGCHLD. Call it within the runtime, before any child.
    ///
    /// With a limit, what the thread forks counts towards it.
    pub(crate) fn start(limit: Option<ProcessLimit>) -> io::Result<Self> {
        let (requests, queue) = mpsc::channel(QUEUE);
        let (ready, started) = std::sync::mpsc::sync_channel(1);
        std::thread::Builder::new().name("children".to_owned()).stack_size(STACK_BYTES).spawn(move || {
            let joined = limit.map_or(Ok(()), |mut limit| limit.join());
            let is_limited = joined.is_ok();
            let _ = ready.send(joined);
            if is_limited {
                Parent::default().run(queue);
            }
        })?;
        started.recv().map_err(|_| io::Error::other("the thread for child processes died at once"))??;

        let mut child_changed = signal(SignalKind::child())?;
        let reaper = requests.downgrade();
        tokio::spawn(async move {
            while child_changed.recv().await.is_some() {
                let Some(requests) = reaper.upgrade() else { return };
                if requests.send(Request::Reap).await.is_err() {
                    return;
                }
            }
        });
        Ok(Self { requests })
    }

    /// Starts a command. It must lead its own session for the other methods to find what it starts.
    pub(crate) async fn spawn(&self, command: Command) -> io::Result<Spawned> {
        self.ask(|reply| Request::Spawn { command: Box::new(command), reply }).await?
    }

    /// SIGTERM to the leader's process group: a shell that waits for a child would not act on it alone.
    pub(crate) async fn terminate(&self, leader: Pid) -> io::Result<()> {
        self.ask(|reply| Request::Terminate { leader, reply }).await
    }

    /// SIGKILL to the leader and everything it started.
    pub(crate) async fn kill_tree(&self, leader: Pid) -> io::Result<()> {
        self.ask(|reply| Request::KillTree { leader, reply }).await
    }

    /// Any signal, as long as the leader lives.
    pub(crate) async fn signal(&self, leader: Pid, whom: Whom, signal: Signal) -> io::Result<()> {
        self.ask(|reply| Request::Signal { leader, whom, signal, reply }).await
    }

    async fn ask<T>(&self, request: impl FnOnce(oneshot::Sender<T>) -> Request) -> io::Result<T> {
        let gone = || io::Error::other("the thread that owns the child processes is gone");
        let (reply, answer) = oneshot::channel();
        self.requests.send(request(reply)).await.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())
    }
}

/// The thread's own state: who waits for which exit.
#[derive(Debug, Default)]
struct Parent {
    waiting: HashMap<Pid, oneshot::Sender<Exit>>,
}

impl Parent {
    fn run(mut self, mut queue: mpsc::Receiver<Request>) {
        while let Some(request) = queue.blocking_recv() {
            // Whoever no longer waits for a reply has lost nothing but the reply.
            match request {
                Request::Spawn { command, reply } => {
                    let _ = reply.send(self.spawn(*command));
                }
                Request::Terminate { leader, reply } => {
                    let _ = kill_process_group(leader, Signal::TERM);
                    let _ = reply.send(());
                }
                Request::KillTree { leader, reply } => {
                    tree::kill(leader);
                    let _ = reply.send(());
                }
                Request::Signal { leader, whom, signal, reply } => {
                    if self.waiting.contains_key(&leader) {
                        tree::signal(leader, whom, signal);
                    }
                    let _ = reply.send(());
                }
                Request::Reap => self.reap(),
            }
        }
    }

    fn spawn(&mut self, mut command: Command) -> io::Result<Spawned> {
        let mut child = command.spawn()?;
        let pid = Pid::from_child(&child);
        let (sender, exit) = oneshot::channel();
        self.waiting.insert(pid, sender);
        Ok(Spawned { pid, stdin: child.stdin.take(), stdout: child.stdout.take(), stderr: child.stderr.take(), exit })
    }

    fn reap(&mut self) {
        // Ends with `None` when the rest still runs, and with an error when there are no children at all.
        while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
            let Some(exit) = Exit::from_wait_status(status) else { continue };
            if let Some(waiter) = self.waiting.remove(&pid) {
                let _ = waiter.send(exit);
            }
        }
    }
}
