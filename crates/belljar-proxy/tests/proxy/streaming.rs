//! Bodies that flow: nothing waits for an end, nothing piles up, and nothing is lost.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use http_body_util::{BodyExt, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::{Request, Response};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::sync::{Notify, mpsc};
use tokio_util::sync::CancellationToken;

use crate::support::{Answer, AnyBody, Fixture, PATIENCE, empty, read_head, request, request2, soon};

const CHUNK_BYTES: usize = 64 * 1024;
const TOTAL_BYTES: usize = 64 * 1024 * 1024;
/// What may be under way between two ends that don't take it: the kernel's buffers, HTTP/2's windows of 1 MiB or 2, and
/// some frames. A proxy that kept a body would have `TOTAL_BYTES`.
const UNDER_WAY_BYTES: usize = 8 * 1024 * 1024;

/// The part of the pattern that lies in one chunk; bytes depend on their place.
fn chunk(index: usize) -> Bytes {
    Bytes::from(vec![u8::try_from(index % 251).unwrap(); CHUNK_BYTES])
}

/// A body of `TOTAL_BYTES`, and a count of what was taken of it.
fn pattern() -> (AnyBody, Arc<AtomicUsize>) {
    let taken = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&taken);
    let chunks = futures::stream::iter(0..TOTAL_BYTES / CHUNK_BYTES).map(move |index| {
        counter.fetch_add(CHUNK_BYTES, Ordering::SeqCst);
        Ok(Frame::data(chunk(index)))
    });
    (StreamBody::new(chunks).boxed_unsync(), taken)
}

/// Whether nothing follows in a body. HTTP/2 may say so in an empty frame.
async fn is_at_end(body: &mut Incoming) -> bool {
    loop {
        match soon("the end", body.frame()).await {
            Some(Ok(frame)) if frame.data_ref().is_some_and(Bytes::is_empty) => {}
            other => return other.is_none(),
        }
    }
}

/// Reads a body to its end, checks every byte, and returns how many there were.
async fn check_pattern(mut body: Incoming) -> usize {
    let mut position = 0;
    while let Some(frame) = soon("the next frame", body.frame()).await {
        let mut data = frame.unwrap().into_data().unwrap();
        while !data.is_empty() {
            let expected = chunk(position / CHUNK_BYTES).split_off(position % CHUNK_BYTES);
            let part = data.split_to(data.len().min(expected.len()));
            assert!(part == expected[..part.len()], "at {position}");
            position += part.len();
        }
    }
    position
}

/// Waits until a counter stands still.
async fn standstill(counter: &AtomicUsize) -> usize {
    let mut last = usize::MAX;
    soon("a standstill", async {
        loop {
            let now = counter.load(Ordering::SeqCst);
            if now == last {
                return now;
            }
            last = now;
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_waits_for_the_server() {
    let fixture = Fixture::new().await;
    let sandbox = fixture.sandbox();
    let go = Arc::new(Notify::new());
    let handler = {
        let go = Arc::clone(&go);
        move |request: Request<Incoming>| {
            let go = Arc::clone(&go);
            async move {
                go.notified().await;
                Response::new(crate::support::full(check_pattern(request.into_body()).await.to_string()))
            }
        }
    };
    sandbox.serve(8080, handler).await;
    for version in ["HTTP/1.1", "HTTP/2"] {
        let (body, taken) = pattern();
        let sent = if version == "HTTP/2" {
            let mut client = fixture.http2().await;
            let request = request2("POST", &sandbox.host(8080), "/", body);
            tokio::spawn(async move { client.send(request).await.unwrap().into_body().collect().await.unwrap() })
        } else {
            let client = fixture.http1().await;
            let request = request("POST", &sandbox.host(8080), "/", body);
            tokio::spawn(async move { client.send(request).await.into_body().collect().await.unwrap() })
        };
        let under_way = standstill(&taken).await;
        assert!((1..UNDER_WAY_BYTES).contains(&under_way), "{version}: {under_way} bytes under way");
        assert!(!sent.is_finished());
        go.notify_one();
        let answer = soon("the answer", sent).await.unwrap().to_bytes();
        assert_eq!(answer, TOTAL_BYTES.to_string(), "{version}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_download_waits_for_the_client() {
    let fixture = Fixture::new().await;
    let sandbox = fixture.sandbox();
    let (counters, mut started) = mpsc::unbounded_channel();
    let handler = move |_| {
        let (body, taken) = pattern();
        counters.send(taken).unwrap();
        async { Response::new(body) }
    };
    sandbox.serve(8080, handler).await;
    for version in ["HTTP/1.1", "HTTP/2"] {
        // Must outlive the download.
        let mut http2 = fixture.http2().await;
        let answer = if version == "HTTP/2" {
            http2.send(request2("GET", &sandbox.host(8080), "/", empty())).await.unwrap()
        } else {
            fixture.send(request("GET", &sandbox.host(8080), "/", empty())).await
        };
        let taken = started.recv().await.unwrap();
        let under_way = standstill(&taken).await;
        assert!((1..UNDER_WAY_BYTES).contains(&under_way), "{version}: {under_way} bytes under way");
        assert_eq!(check_pattern(answer.into_body()).await, TOTAL_BYTES, "{version}");
    }
}

#[tokio::test]
async fn an_early_answer_overtakes_the_upload() {
    let fixture = Fixture::new().await;
    let sandbox = fixture.sandbox();
    let too_large = |mut stream: TcpStream| async move {
        read_head(&mut stream).await;
        stream.write_all(b"HTTP/1.1 413 Payload Too Large\r\nContent-Length: 2\r\n\r\nno").await.unwrap();
        // Not one byte of the body is read, and the connection stays.
        std::future::pending::<()>().await;
    };
    sandbox.serve_raw(8080, too_large).await;
    let host = sandbox.host(8080);
    let answer = Answer::of(fixture.send(request("POST", &host, "/", pattern().0)).await).await;
    assert_eq!((answer.status, answer.body.as_str()), (413, "no"));
    let answer = fixture.http2().await.send(request2("POST", &host, "/", pattern().0)).await.unwrap();
    assert_eq!(answer.status(), 413);
    assert_eq!(fixture.get(&host, "/").await.status, 413, "what still takes in an upload carries no other request");
    assert_eq!(sandbox.connects(), 3);
}

#[tokio::test]
async fn events_arrive_one_by_one() {
    let fixture = Fixture::new().await;
    let sandbox = fixture.sandbox();
    // The server sends an event only after the client has told it, out of band, that it has the one before.
    let (received, acknowledgements) = mpsc::channel::<()>(1);
    let acknowledgements = Arc::new(tokio::sync::Mutex::new(acknowledgements));
    let handler = move |_| {
        let acknowledgements = Arc::clone(&acknowledgements);
        let events = futures::stream::unfold(0, move |count| {
            let acknowledgements = Arc::clone(&acknowledgements);
            async move {
                if count > 0 {
                    acknowledgements.lock().await.recv().await.unwrap();
                }
                let event = Frame::data(Bytes::from(format!("data: {count}\n\n")));
                (count < 5).then_some((Ok(event), count + 1))
            }
        });
        async move {
            let mut response = Response::new(StreamBody::new(events).boxed_unsync());
            response.headers_mut().insert("content-type", "text/event-stream".parse().unwrap());
            response
        }
    };
    sandbox.serve(8080, handler).await;
    let mut http2 = fixture.http2().await;
    for version in ["HTTP/1.1", "HTTP/2"] {
        let answer = if version == "HTTP/2" {
            http2.send(request2("GET", &sandbox.host(8080), "/", empty())).await.unwrap()
        } else {
            fixture.send(request("GET", &sandbox.host(8080), "/", empty())).await
        };
        let mut body = answer.into_body();
        for count in 0..5 {
            let event = soon("an event", body.frame()).await.unwrap().unwrap().into_data().unwrap();
            assert_eq!(event, format!("data: {count}\n\n"), "{version}");
            received.send(()).await.unwrap();
        }
        assert!(is_at_end(&mut body).await, "{version}");
    }
}

#[tokio::test]
async fn both_directions_flow_at_once() {
    let fixture = Fixture::new().await;
    let sandbox = fixture.sandbox();
    sandbox
        .serve(8080, |request: Request<Incoming>| async {
            Response::new(request.into_body().map_err(Into::into).boxed_unsync())
        })
        .await;
    let mut http2 = fixture.http2().await;
    let (to_server, from_client) = mpsc::channel::<Bytes>(1);
    let frames = futures::stream::unfold(from_client, |mut from_client| async {
        let data = from_client.recv().await?;
        Some((Ok(Frame::data(data)), from_client))
    });
    let echo = request2("POST", &sandbox.host(8080), "/", StreamBody::new(frames).boxed_unsync());
    let mut body = http2.send(echo).await.unwrap().into_body();
    for word in ["one", "two", "three"] {
        to_server.send(Bytes::from(word)).await.unwrap();
        assert_eq!(soon("an echo", body.frame()).await.unwrap().unwrap().into_data().unwrap(), word);
    }
    drop(to_server);
    assert!(is_at_end(&mut body).await);
}

/// Told when it is dropped, as the handler of a request is when its connection closes.
struct Dropped(CancellationToken);

impl Drop for Dropped {
    fn drop(&mut self) {
        self.0.cancel();
    }
}

#[tokio::test]
async fn a_client_that_leaves_is_noticed_by_the_server() {
    let fixture = Fixture::new().await;
    let sandbox = fixture.sandbox();
    let (arrivals, mut arrived) = mpsc::unbounded_channel();
    let handler = move |request: Request<Incoming>| {
        let arrivals = arrivals.clone();
        async move {
            let gone = CancellationToken::new();
            let guard = Dropped(gone.clone());
            arrivals.send(gone).unwrap();
            if request.uri().path() == "/never-answers" {
                std::future::pending::<()>().await;
            }
            // One frame, and then silence.
            let frames = futures::stream::unfold(Some(guard), |guard| async {
                guard.map(|guard| (Ok(Frame::data(Bytes::from("first"))), Some(guard)))
            });
            let once_then_silence = frames.take(1).chain(futures::stream::pending());
            Response::new(StreamBody::new(once_then_silence).boxed_unsync())
        }
    };
    sandbox.serve(8080, handler).await;
    let host = sandbox.host(8080);

    let mut http1 = fixture.http1().await;
    let waiting = tokio::spawn(http1.begin(request("GET", &host, "/never-answers", empty())));
    let gone = soon("the request", arrived.recv()).await.unwrap();
    assert!(!gone.is_cancelled());
    drop(http1);
    soon("the server to notice, waiting for a head", gone.cancelled()).await;
    assert!(soon("the client", waiting).await.unwrap().is_err());

    let mut http1 = fixture.http1().await;
    let mut answer = http1.send_on(request("GET", &host, "/stream", empty())).await.into_body();
    let gone = arrived.recv().await.unwrap();
    assert_eq!(soon("a frame", answer.frame()).await.unwrap().unwrap().into_data().unwrap(), "first");
    drop((answer, http1));
    soon("the server to notice, in a quiet body", gone.cancelled()).await;

    let mut http2 = fixture.http2().await;
    let mut answer = http2.send(request2("GET", &host, "/stream", empty())).await.unwrap().into_body();
    let gone = arrived.recv().await.unwrap();
    assert_eq!(soon("a frame", answer.frame()).await.unwrap().unwrap().into_data().unwrap(), "first");
    drop(answer);
    soon("the server to notice, when a stream is reset", gone.cancelled()).await;

    let pending =
        tokio::time::timeout(Duration::from_millis(200), http2.send(request2("GET", &host, "/never-answers", empty())));
    assert!(pending.await.is_err());
    let gone = arrived.recv().await.unwrap();
    soon("the server to notice, when a stream is reset before its answer", gone.cancelled()).await;

    soon("the permits", async {
        while fixture.proxy.in_flight() > 0 {
            tokio::time::sleep(PATIENCE / 1000).await;
        }
    })
    .await;
}
