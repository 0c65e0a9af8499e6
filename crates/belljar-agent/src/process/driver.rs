//! One task per process: moves its output into the log and sees it to its end.

use std::io;
use std::sync::Arc;

use bytes::Bytes;
use rustix::process::Pid;
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tokio::sync::oneshot;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::children::Children;
use super::exit::Exit;
use super::output::{Chunk, OutputLog};
use super::table::{Process, RETENTION, Table};

/// The most that one data event carries: envd's size, and half a pipe.
const CHUNK_BYTES: usize = 32 << 10;

/// A started process's pipes and exit, still to be attended to.
#[derive(Debug)]
pub(crate) struct Driver {
    pub(crate) process: Arc<Process>,
    pub(crate) stdout: pipe::Receiver,
    pub(crate) stderr: pipe::Receiver,
    /// The task that writes its stdin, if it has one.
    pub(crate) stdin: Option<JoinHandle<()>>,
    pub(crate) exit: oneshot::Receiver<Exit>,
    /// When the whole tree is killed.
    pub(crate) deadline: Option<Instant>,
    pub(crate) children: Children,
    pub(crate) table: Arc<Table>,
    pub(crate) tasks: TaskTracker,
}

impl Driver {
    /// Runs until the process has ended and is forgotten.
    pub(crate) async fn run(self) {
        let Self { process, stdout, stderr, stdin, exit, deadline, children, table, tasks } = self;
        let drain = CancellationToken::new();
        let mut pumps = JoinSet::new();
        pumps.spawn(pump(stdout, Chunk::Stdout, Arc::clone(&process.output), drain.clone(), tasks.clone()));
        pumps.spawn(pump(stderr, Chunk::Stderr, Arc::clone(&process.output), drain.clone(), tasks));

        let exit = exit_before(deadline, exit, &children, process.pid).await;
        tokio::select! {
            () = finish(&mut pumps) => {}
            // Nothing is owed to what a killed or overdue process left running with its output open.
            () = process.killed.cancelled() => {}
            () = reached(deadline) => {}
        }
        drain.cancel();
        finish(&mut pumps).await;

        if let Some(stdin) = stdin {
            // A write may still wait for what the process left behind to read it.
            stdin.abort();
        }
        process.output.end(exit);
        table.retire(&process);
        tokio::time::sleep(RETENTION).await;
        table.forget(&process);
    }
}

/// Waits for the exit; kills the tree when the deadline comes first.
async fn exit_before(
    deadline: Option<Instant>,
    mut exit: oneshot::Receiver<Exit>,
    children: &Children,
    leader: Pid,
) -> Exit {
    let exited = tokio::select! {
        exited = &mut exit => exited,
        () = reached(deadline) => {
            if let Err(error) = children.kill_tree(leader).await {
                tracing::error!(%error, pid = leader.as_raw_nonzero(), "an overdue process could not be killed");
            }
            exit.await
        }
    };
    exited.expect("the thread that reaps lives as long as any handle to it, and `children` is one")
}

/// Never, if there is no deadline.
async fn reached(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

async fn finish(pumps: &mut JoinSet<()>) {
    while let Some(finished) = pumps.join_next().await {
        if let Err(error) = finished {
            tracing::error!(%error, "reading a process's output failed");
        }
    }
}

/// Moves one stream into the log until it is closed, or, when `drain` is set, until what the process wrote is there.
async fn pump(
    mut stream: pipe::Receiver,
    chunk: fn(Bytes) -> Chunk,
    log: Arc<OutputLog>,
    drain: CancellationToken,
    tasks: TaskTracker,
) {
    let mut buffer = vec![0; CHUNK_BYTES];
    loop {
        let read = tokio::select! {
            read = stream.read(&mut buffer) => read,
            () = drain.cancelled() => match stream.try_read(&mut buffer) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    // Whoever still has the other end is not to die of SIGPIPE for writing to it.
                    tasks.spawn(discard(stream));
                    return;
                }
                read => read,
            },
        };
        match read {
            Ok(0) => return,
            Ok(length) => log.push(chunk(Bytes::copy_from_slice(&buffer[..length]))).await,
            Err(error) => {
                tracing::warn!(%error, "a process's output could not be read");
                return;
            }
        }
    }
}

async fn discard(mut stream: pipe::Receiver) {
    let mut buffer = vec![0; 4096];
    while stream.read(&mut buffer).await.is_ok_and(|length| length > 0) {}
}
