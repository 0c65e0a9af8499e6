//! A command's standard input: writes in the order they were asked for, each whole.
//!
//! One task owns the pipe. A request that gives up waiting leaves what it handed over in the queue, so that two writes
//! are never mixed.

use bytes::Bytes;
use tokio::io::AsyncWriteExt;
use tokio::net::unix::pipe;
use tokio::sync::{mpsc, oneshot};

/// Writes that may wait for the command to read. Each is at most one message.
const QUEUE: usize = 16;

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum StdinError {
    #[error("stdin not enabled or closed")]
    Closed,
    #[error("the process no longer reads its stdin")]
    NotRead,
}

/// The sending side; nothing inside if the command was started without stdin.
#[derive(Debug)]
pub(crate) struct Stdin {
    writes: Option<mpsc::Sender<Write>>,
}

#[derive(Debug)]
pub(crate) enum Write {
    Data { data: Bytes, done: oneshot::Sender<Result<(), StdinError>> },
    Close { done: oneshot::Sender<()> },
}

impl Stdin {
    /// A command that reads `/dev/null`.
    pub(crate) fn disabled() -> Self {
        Self { writes: None }
    }

    /// Returns the queue's other end, for [`serve`].
    pub(crate) fn piped() -> (Self, mpsc::Receiver<Write>) {
        let (writes, queue) = mpsc::channel(QUEUE);
        (Self { writes: Some(writes) }, queue)
    }

    /// Returns once the command's pipe has taken all of `data`.
    pub(crate) async fn write(&self, data: Bytes) -> Result<(), StdinError> {
        let writes = self.writes.as_ref().ok_or(StdinError::Closed)?;
        let (done, written) = oneshot::channel();
        writes.send(Write::Data { data, done }).await.map_err(|_| StdinError::Closed)?;
        // The task ends with the process.
        written.await.unwrap_or(Err(StdinError::NotRead))
    }

    /// Closes it after what was written before. Closing what is closed is no error.
    pub(crate) async fn close(&self) {
        let Some(writes) = &self.writes else { return };
        let (done, closed) = oneshot::channel();
        if writes.send(Write::Close { done }).await.is_ok() {
            // An error says that the task, and with it the pipe, is gone: closed all the same.
            let _ = closed.await;
        }
    }
}

/// Writes what the queue holds, until it is closed from either side.
pub(crate) async fn serve(mut pipe: pipe::Sender, mut queue: mpsc::Receiver<Write>) {
    while let Some(write) = queue.recv().await {
        match write {
            Write::Data { data, done } => {
                let written = pipe.write_all(&data).await.map_err(|_| StdinError::NotRead);
                let _ = done.send(written);
            }
            Write::Close { done } => {
                drop(pipe);
                drop(queue);
                let _ = done.send(());
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncReadExt;

    #[tokio::test]
    async fn writes_arrive_in_order_and_closing_is_the_end() {
        let (sender, mut receiver) = pipe::pipe().expect("a pipe");
        let (stdin, queue) = Stdin::piped();
        let task = tokio::spawn(serve(sender, queue));
        stdin.write(Bytes::from_static(b"one ")).await.expect("written");
        stdin.write(Bytes::from_static(b"two")).await.expect("written");
        stdin.close().await;
        stdin.close().await;
        let mut text = String::new();
        receiver.read_to_string(&mut text).await.expect("read");
        assert_eq!(text, "one two");
        assert_eq!(stdin.write(Bytes::from_static(b"three")).await, Err(StdinError::Closed));
        task.await.expect("ended");
    }

    #[tokio::test]
    async fn writing_to_nobody_fails() {
        let (sender, receiver) = pipe::pipe().expect("a pipe");
        let (stdin, queue) = Stdin::piped();
        let _task = tokio::spawn(serve(sender, queue));
        drop(receiver);
        assert_eq!(stdin.write(Bytes::from_static(b"x")).await, Err(StdinError::NotRead));
    }

    #[tokio::test]
    async fn a_disabled_stdin_is_closed() {
        let stdin = Stdin::disabled();
        assert_eq!(stdin.write(Bytes::new()).await, Err(StdinError::Closed));
        stdin.close().await;
    }
}
