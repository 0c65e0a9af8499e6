//! What one process printed, between the process and whoever reads it.
//!
//! A bounded log of chunks in the order they were read, with a cursor per subscriber:
//!
//! - **Someone reads:** nothing is lost and nothing is reordered. A chunk leaves the log when every subscriber has it.
//!   When the log is full the process waits, as it would for a slow terminal.
//! - **Nobody reads:** the process never waits. The log keeps the newest [`CAPACITY_BYTES`], and the next subscriber
//!   starts with them, so a client that disconnects and connects again misses nothing that fits.
//! - **Someone else reads already:** a further subscriber starts with what comes next.
//! - **Someone has stopped reading:** the process waits for it [`PATIENCE_ALONE`], or only [`PATIENCE_SHARED`] when
//!   others read too. Then that subscriber is cut off and told so, and what it didn't take stays for the next one.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::Notify;
use tokio::time::Instant;

use super::exit::Exit;

/// How much a process can be ahead of its slowest reader.
const CAPACITY_BYTES: usize = 1 << 20;

/// What a chunk costs beside its bytes, so that a million one-byte chunks can't pass for a megabyte.
const CHUNK_OVERHEAD_BYTES: usize = 128;

/// How long a process waits for its only reader to take anything.
pub(crate) const PATIENCE_ALONE: Duration = Duration::from_secs(300);

/// How long a process and its other readers wait for the slowest one.
const PATIENCE_SHARED: Duration = Duration::from_secs(10);

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Chunk {
    Stdout(Bytes),
    Stderr(Bytes),
}

impl Chunk {
    fn cost(&self) -> usize {
        let (Self::Stdout(data) | Self::Stderr(data)) = self;
        data.len() + CHUNK_OVERHEAD_BYTES
    }
}

/// What a subscriber gets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Item {
    Chunk(Chunk),
    /// The process ended. Repeats if asked again.
    End(Exit),
    /// The subscriber read too slowly and gets nothing more.
    CutOff,
}

#[derive(Debug, Default)]
pub(crate) struct OutputLog {
    state: Mutex<State>,
    /// A chunk or the end was added, or a subscriber was cut off.
    changed: Notify,
    /// A subscriber took a chunk or left.
    room: Notify,
}

#[derive(Debug, Default)]
struct State {
    chunks: VecDeque<Chunk>,
    /// Number of the first chunk in `chunks`, counted from the first that was ever pushed.
    first: u64,
    cost: usize,
    subscribers: BTreeMap<u64, Cursor>,
    next_subscriber: u64,
    end: Option<Exit>,
}

#[derive(Debug)]
struct Cursor {
    /// Number of the chunk it gets next.
    next: u64,
    last_taken: Instant,
}

enum Push {
    Done,
    /// Try again when there is room, or at this time, when a reader will have been waited for long enough.
    Full(Instant),
}

impl OutputLog {
    /// Adds a chunk, waiting for room as the module's header says.
    pub(crate) async fn push(&self, chunk: Chunk) {
        let mut waiting_since = None;
        loop {
            let room = self.room.notified();
            tokio::pin!(room);
            room.as_mut().enable();
            let now = Instant::now();
            match self.try_push(&chunk, *waiting_since.get_or_insert(now), now) {
                Push::Done => return,
                Push::Full(until) => {
                    // Elapsed or notified, the next attempt finds out which.
                    let _ = tokio::time::timeout_at(until, room).await;
                }
            }
        }
    }

    fn try_push(&self, chunk: &Chunk, waiting_since: Instant, now: Instant) -> Push {
        let mut state = self.state();
        while state.cost + chunk.cost() > CAPACITY_BYTES {
            if state.subscribers.is_empty() {
                state.drop_first();
                continue;
            }
            let patience = if state.subscribers.len() == 1 { PATIENCE_ALONE } else { PATIENCE_SHARED };
            let first = state.first;
            let waited_for_since = |cursor: &Cursor| cursor.last_taken.max(waiting_since);
            let slowest = state.subscribers.iter().filter(|(_, cursor)| cursor.next == first);
            let Some((&id, since)) =
                slowest.map(|(id, cursor)| (id, waited_for_since(cursor))).min_by_key(|(_, since)| *since)
            else {
                // Everyone has the first chunk already; it only had not been dropped yet.
                state.drop_first();
                continue;
            };
            if now < since + patience {
                return Push::Full(since + patience);
            }
            state.subscribers.remove(&id);
            self.changed.notify_waiters();
        }
        state.cost += chunk.cost();
        state.chunks.push_back(chunk.clone());
        drop(state);
        self.changed.notify_waiters();
        Push::Done
    }

    /// Adds the end. Nothing may be pushed after it.
    pub(crate) fn end(&self, exit: Exit) {
        self.state().end = Some(exit);
        self.changed.notify_waiters();
    }

    pub(crate) fn has_ended(&self) -> bool {
        self.state().end.is_some()
    }

    /// A new reader: from the oldest chunk still here if it is the only one, else from the next one pushed.
    pub(crate) fn subscribe(self: &Arc<Self>) -> Subscription {
        let mut state = self.state();
        let next = if state.subscribers.is_empty() { state.first } else { state.last() };
        let id = state.next_subscriber;
        state.next_subscriber += 1;
        state.subscribers.insert(id, Cursor { next, last_taken: Instant::now() });
        Subscription { log: Arc::clone(self), id }
    }

    fn take(&self, id: u64) -> Option<Item> {
        let mut state = self.state();
        let last = state.last();
        let first = state.first;
        let end = state.end;
        let Some(cursor) = state.subscribers.get_mut(&id) else { return Some(Item::CutOff) };
        if cursor.next == last {
            return end.map(Item::End);
        }
        let index = usize::try_from(cursor.next - first).expect("a cursor points into the log or at its end");
        cursor.next += 1;
        cursor.last_taken = Instant::now();
        let chunk = state.chunks[index].clone();
        self.trim(state);
        Some(Item::Chunk(chunk))
    }

    fn leave(&self, id: u64) {
        let mut state = self.state();
        state.subscribers.remove(&id);
        self.trim(state);
    }

    /// Drops what every subscriber has. What nobody has taken stays when the last one leaves.
    fn trim(&self, mut state: MutexGuard<'_, State>) {
        if let Some(needed) = state.subscribers.values().map(|cursor| cursor.next).min() {
            while state.first < needed {
                state.drop_first();
            }
        }
        drop(state);
        self.room.notify_waiters();
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Number of the chunk that will be pushed next.
    fn last(&self) -> u64 {
        self.first + self.chunks.len() as u64
    }

    fn drop_first(&mut self) {
        if let Some(chunk) = self.chunks.pop_front() {
            self.first += 1;
            self.cost -= chunk.cost();
        }
    }
}

/// One reader of an [`OutputLog`]; leaves when dropped.
#[derive(Debug)]
pub(crate) struct Subscription {
    log: Arc<OutputLog>,
    id: u64,
}

impl Subscription {
    /// Waits for the next item. Dropping the future takes nothing.
    pub(crate) async fn next(&mut self) -> Item {
        loop {
            let changed = self.log.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            if let Some(item) = self.log.take(self.id) {
                return item;
            }
            changed.await;
        }
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        self.log.leave(self.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chunk(text: &str) -> Chunk {
        Chunk::Stdout(Bytes::copy_from_slice(text.as_bytes()))
    }

    /// Four of these fill the log.
    fn large(mark: u8) -> Chunk {
        Chunk::Stderr(Bytes::from(vec![mark; CAPACITY_BYTES / 4 - CHUNK_OVERHEAD_BYTES]))
    }

    fn is_pending<F: Future>(future: F) -> bool {
        futures::FutureExt::now_or_never(future).is_none()
    }

    #[tokio::test]
    async fn subscribers_get_every_chunk_in_order_and_then_the_end() {
        let log = Arc::new(OutputLog::default());
        let mut subscription = log.subscribe();
        for text in ["a", "b", "c"] {
            log.push(chunk(text)).await;
        }
        log.end(Exit::Code(0));
        for text in ["a", "b", "c"] {
            assert_eq!(subscription.next().await, Item::Chunk(chunk(text)));
        }
        assert_eq!(subscription.next().await, Item::End(Exit::Code(0)));
        assert_eq!(subscription.next().await, Item::End(Exit::Code(0)));
    }

    #[tokio::test]
    async fn a_reader_that_returns_finds_what_came_meanwhile_and_nothing_twice() {
        let log = Arc::new(OutputLog::default());
        let mut first = log.subscribe();
        log.push(chunk("seen")).await;
        log.push(chunk("unseen")).await;
        assert_eq!(first.next().await, Item::Chunk(chunk("seen")));
        drop(first);
        log.push(chunk("later")).await;
        let mut second = log.subscribe();
        assert_eq!(second.next().await, Item::Chunk(chunk("unseen")));
        assert_eq!(second.next().await, Item::Chunk(chunk("later")));
        assert!(is_pending(second.next()));
    }

    #[tokio::test]
    async fn a_second_reader_starts_with_what_comes_next() {
        let log = Arc::new(OutputLog::default());
        let _first = log.subscribe();
        log.push(chunk("old")).await;
        let mut second = log.subscribe();
        log.push(chunk("new")).await;
        assert_eq!(second.next().await, Item::Chunk(chunk("new")));
    }

    #[tokio::test]
    async fn without_a_reader_the_newest_output_is_kept_and_nobody_waits() {
        let log = Arc::new(OutputLog::default());
        for mark in 0..10 {
            log.push(large(mark)).await;
        }
        let mut subscription = log.subscribe();
        for mark in 6..10 {
            assert_eq!(subscription.next().await, Item::Chunk(large(mark)));
        }
        assert!(is_pending(subscription.next()));
    }

    #[tokio::test]
    async fn tiny_chunks_are_charged_for_what_they_cost() {
        let log = Arc::new(OutputLog::default());
        for _ in 0..CAPACITY_BYTES / 4 {
            log.push(chunk("x")).await;
        }
        assert!(log.state().chunks.len() <= CAPACITY_BYTES / CHUNK_OVERHEAD_BYTES);
    }

    #[tokio::test]
    async fn a_full_log_makes_the_process_wait_until_the_reader_takes_something() {
        let log = Arc::new(OutputLog::default());
        let mut subscription = log.subscribe();
        for mark in 0..4 {
            log.push(large(mark)).await;
        }
        let waiting = tokio::spawn({
            let log = Arc::clone(&log);
            async move { log.push(large(4)).await }
        });
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        for mark in 0..5 {
            assert_eq!(subscription.next().await, Item::Chunk(large(mark)));
        }
        waiting.await.expect("pushed");
    }

    #[tokio::test(start_paused = true)]
    async fn a_reader_that_stops_is_cut_off_and_its_output_kept() {
        let log = Arc::new(OutputLog::default());
        let mut stopped = log.subscribe();
        for mark in 0..4 {
            log.push(large(mark)).await;
        }
        let start = Instant::now();
        log.push(large(4)).await;
        assert!(start.elapsed() >= PATIENCE_ALONE);
        assert_eq!(stopped.next().await, Item::CutOff);
        drop(stopped);
        let mut next = log.subscribe();
        assert_eq!(next.next().await, Item::Chunk(large(1)));
    }

    #[tokio::test(start_paused = true)]
    async fn a_stopped_reader_holds_up_the_others_only_briefly() {
        let log = Arc::new(OutputLog::default());
        let _stopped = log.subscribe();
        let mut brisk = log.subscribe();
        let start = Instant::now();
        for mark in 0..8 {
            log.push(large(mark)).await;
            assert_eq!(brisk.next().await, Item::Chunk(large(mark)));
        }
        let took = start.elapsed();
        assert!(took >= PATIENCE_SHARED && took < PATIENCE_SHARED * 2, "{took:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_slow_reader_that_keeps_reading_is_never_cut_off() {
        let log = Arc::new(OutputLog::default());
        let mut slow = log.subscribe();
        let writer = tokio::spawn({
            let log = Arc::clone(&log);
            async move {
                for mark in 0..20 {
                    log.push(large(mark)).await;
                }
            }
        });
        for mark in 0..20 {
            tokio::time::sleep(PATIENCE_ALONE / 2).await;
            assert_eq!(slow.next().await, Item::Chunk(large(mark)));
        }
        writer.await.expect("pushed");
    }
}
