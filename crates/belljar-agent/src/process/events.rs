//! A subscription as the events of a `Start` or `Connect` stream: start, data, end, and keepalives in quiet times.

use std::time::Duration;

use belljar_protocol::envd::KEEPALIVE_HEADER;
use belljar_protocol::envd::process::process_event::data_event::Output;
use belljar_protocol::envd::process::process_event::{DataEvent, Event, KeepAlive, StartEvent};
use belljar_protocol::envd::process::{ConnectResponse, ProcessEvent, StartResponse};
use connectrpc::{ConnectError, ErrorCode};
use futures::{Stream, StreamExt, stream};
use http::HeaderMap;

use super::output::{Chunk, Item, PATIENCE_ALONE, Subscription};

/// When the client asks for nothing else.
const DEFAULT_KEEPALIVE: Duration = Duration::from_secs(90);

/// Seconds a client may ask for. Its intermediaries need to see something now and then, not all the time.
const KEEPALIVE_SECONDS: std::ops::RangeInclusive<u64> = 1..=3600;

/// The interval that a request's headers ask for.
pub(crate) fn keepalive_interval(headers: &HeaderMap) -> Duration {
    headers
        .get(KEEPALIVE_HEADER)
        .and_then(|value| value.to_str().ok()?.trim().parse::<u64>().ok())
        .map_or(DEFAULT_KEEPALIVE, |seconds| {
            Duration::from_secs(seconds.clamp(*KEEPALIVE_SECONDS.start(), *KEEPALIVE_SECONDS.end()))
        })
}

/// Everything the stream of one client carries.
pub(crate) fn events<R>(
    pid: u32,
    subscription: Subscription,
    keepalive: Duration,
    response: fn(ProcessEvent) -> R,
) -> impl Stream<Item = Result<R, ConnectError>> {
    let start = Event::Start(StartEvent { pid }.into());
    let rest = stream::unfold(Some(subscription), move |subscription| async move {
        let mut subscription = subscription?;
        let Ok(item) = tokio::time::timeout(keepalive, subscription.next()).await else {
            return Some((Ok(Event::Keepalive(KeepAlive::default().into())), Some(subscription)));
        };
        Some(match item {
            Item::Chunk(chunk) => (Ok(data(chunk)), Some(subscription)),
            Item::End(exit) => (Ok(Event::End(exit.to_event().into())), None),
            Item::CutOff => (Err(cut_off()), None),
        })
    });
    stream::once(async { Ok(start) })
        .chain(rest)
        .map(move |event| event.map(|event| response(ProcessEvent { event: Some(event) })))
}

fn data(chunk: Chunk) -> Event {
    let output = match chunk {
        Chunk::Stdout(data) => Output::Stdout(data),
        Chunk::Stderr(data) => Output::Stderr(data),
    };
    Event::Data(DataEvent { output: Some(output) }.into())
}

fn cut_off() -> ConnectError {
    let patience = PATIENCE_ALONE.as_secs();
    ConnectError::new(
        ErrorCode::Aborted,
        format!("the process waited up to {patience} s for this stream to be read; connect again to go on"),
    )
}

/// The two streams differ in nothing but the name of their message.
pub(crate) fn start_response(event: ProcessEvent) -> StartResponse {
    StartResponse { event: event.into() }
}

pub(crate) fn connect_response(event: ProcessEvent) -> ConnectResponse {
    ConnectResponse { event: event.into() }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use bytes::Bytes;

    use super::super::exit::Exit;
    use super::super::output::OutputLog;
    use super::*;

    #[test]
    fn keepalives_come_as_asked_for_within_reason() {
        for (value, seconds) in [("50", 50), ("0", 1), ("-3", 90), ("soon", 90), ("99999999", 3600)] {
            let headers = HeaderMap::from_iter([(
                http::HeaderName::from_static(KEEPALIVE_HEADER),
                value.parse().expect("a header value"),
            )]);
            assert_eq!(keepalive_interval(&headers).as_secs(), seconds, "{value}");
        }
        assert_eq!(keepalive_interval(&HeaderMap::new()), DEFAULT_KEEPALIVE);
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_starts_with_the_pid_keeps_alive_and_ends_with_the_exit() {
        let log = Arc::new(OutputLog::default());
        let interval = Duration::from_secs(50);
        let mut stream = Box::pin(events(7, log.subscribe(), interval, |event| event.event));
        let mut next = async || stream.next().await.map(|event| event.expect("no error").expect("an event"));

        assert!(matches!(next().await, Some(Event::Start(start)) if start.pid == 7));
        let quiet_since = tokio::time::Instant::now();
        assert!(matches!(next().await, Some(Event::Keepalive(_))));
        assert!(quiet_since.elapsed() >= interval);
        log.push(Chunk::Stderr(Bytes::from_static(b"oops"))).await;
        log.end(Exit::Code(2));
        let Some(Event::Data(data)) = next().await else { panic!("data comes before the end") };
        assert_eq!(data.output, Some(Output::Stderr(Bytes::from_static(b"oops"))));
        assert!(matches!(next().await, Some(Event::End(end)) if end.exit_code == 2));
        assert!(next().await.is_none());
    }
}
