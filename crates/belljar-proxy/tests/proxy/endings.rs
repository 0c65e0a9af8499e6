//! Limits, timeouts, and what becomes of connections when a sandbox or the server ends.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::StreamExt;
use http_body_util::{BodyExt, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::{Request, Response};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::Notify;

use crate::support::{Answer, Fixture, Sandbox, Settings, empty, full, read_head, request, request2, soon};

/// `/wait` is answered when told to; `/stream` sends one frame and then nothing; everything else is answered at once.
async fn serve_slowly(sandbox: &Sandbox, port: u16) -> Arc<Notify> {
    let go = Arc::new(Notify::new());
    let told = Arc::clone(&go);
    let handler = move |request: Request<Incoming>| {
        let told = Arc::clone(&told);
        async move {
            match request.uri().path() {
                "/wait" => told.notified().await,
                "/stream" => {
                    let first = futures::stream::iter([Ok(Frame::data(Bytes::from("first")))]);
                    return Response::new(StreamBody::new(first.chain(futures::stream::pending())).boxed_unsync());
                }
                _ => {}
            }
            Response::new(full("answered"))
        }
    };
    sandbox.serve(port, handler).await;
    go
}

async fn until_in_flight(fixture: &Fixture, count: usize) {
    soon("requests in flight", async {
        while fixture.proxy.in_flight() != count {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

#[tokio::test]
async fn a_sandbox_has_only_so_many_connections() {
    let fixture = Fixture::new().await;
    let sandbox = fixture.registry.add(Settings { max_connections: Some(2), ..Settings::default() });
    let other = fixture.sandbox();
    let go = serve_slowly(&sandbox, 8080).await;
    serve_slowly(&other, 8080).await;
    let host = sandbox.host(8080);

    let first = tokio::spawn(fixture.http1().await.send(request("GET", &host, "/wait", empty())));
    let mut http2 = fixture.http2().await;
    let second = http2.send(request2("GET", &host, "/stream", empty())).await.unwrap();
    until_in_flight(&fixture, 2).await;

    let answer = fixture.get(&host, "/").await;
    assert_eq!(answer.status, 429);
    assert!(answer.body.contains("(limit: 2)"), "{}", answer.body);
    assert_eq!((answer.header("retry-after"), answer.header("should-retry")), (Some("1"), Some("true")));
    assert_eq!(fixture.get(&other.host(8080), "/").await.status, 200, "another sandbox has its own limit");

    go.notify_one();
    assert_eq!(Answer::of(soon("the answer", first).await.unwrap()).await.body, "answered");
    until_in_flight(&fixture, 1).await;
    assert_eq!(fixture.get(&host, "/").await.status, 200);
    drop(second);
    until_in_flight(&fixture, 0).await;
}

#[tokio::test]
async fn the_proxy_has_only_so_many_connections() {
    let fixture = Fixture::with(|config| config.max_in_flight = 1).await;
    let [first, second] = [fixture.sandbox(), fixture.sandbox()];
    let go = serve_slowly(&first, 8080).await;
    serve_slowly(&second, 8080).await;
    let waiting = tokio::spawn(fixture.http1().await.send(request("GET", &first.host(8080), "/wait", empty())));
    until_in_flight(&fixture, 1).await;
    let answer = fixture.get(&second.host(8080), "/").await;
    assert_eq!((answer.status, answer.header("retry-after")), (503, Some("1")));
    go.notify_one();
    assert_eq!(soon("the answer", waiting).await.unwrap().status(), 200);
    until_in_flight(&fixture, 0).await;
    assert_eq!(fixture.get(&second.host(8080), "/").await.status, 200);
}

#[tokio::test]
async fn what_never_connects_or_never_answers_times_out() {
    let timeout = Duration::from_secs(2);
    let fixture = Fixture::with(|config| {
        config.connect_timeout = timeout / 10;
        config.header_timeout = Some(timeout);
    })
    .await;
    let unreachable = fixture.registry.add(Settings { never_connects: true, ..Settings::default() });
    let answer = fixture.get(&unreachable.host(8080), "/").await;
    assert_eq!((answer.status, answer.body.contains("port is not open")), (502, true));

    let sandbox = fixture.sandbox();
    let _never = serve_slowly(&sandbox, 8080).await;
    let begun = Instant::now();
    let answer = fixture.get(&sandbox.host(8080), "/wait").await;
    assert_eq!(answer.status, 504);
    assert!(begun.elapsed() >= timeout);

    let mut stream = fixture.send(request("GET", &sandbox.host(8080), "/stream", empty())).await.into_body();
    assert_eq!(soon("a frame", stream.frame()).await.unwrap().unwrap().into_data().unwrap(), "first");
    let more = tokio::time::timeout(timeout * 3 / 2, stream.frame()).await;
    assert!(more.is_err(), "an answer that has begun may take any time");
}

#[tokio::test]
async fn a_killed_sandbox_takes_its_connections_with_it() {
    let fixture = Fixture::new().await;
    let sandbox = fixture.sandbox();
    let _never = serve_slowly(&sandbox, 8080).await;
    let host = sandbox.host(8080);
    let tunnel = |mut stream: TcpStream| async move {
        read_head(&mut stream).await;
        let answer = "HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: bytes\r\n\r\n";
        stream.write_all(answer.as_bytes()).await.unwrap();
        let _ = stream.read_to_end(&mut Vec::new()).await;
    };
    sandbox.serve_raw(8081, tunnel).await;

    fixture.get(&host, "/").await;
    let waiting = tokio::spawn(fixture.http1().await.send(request("GET", &host, "/wait", empty())));
    let mut http1 = fixture.http1().await;
    let mut body1 = http1.send_on(request("GET", &host, "/stream", empty())).await.into_body();
    let mut http2 = fixture.http2().await;
    let mut body2 = http2.send(request2("GET", &host, "/stream", empty())).await.unwrap().into_body();
    let mut upgraded = TcpStream::connect(fixture.address).await.unwrap();
    let head =
        format!("GET / HTTP/1.1\r\nHost: {}\r\nConnection: upgrade\r\nUpgrade: bytes\r\n\r\n", sandbox.host(8081));
    upgraded.write_all(head.as_bytes()).await.unwrap();
    assert!(read_head(&mut upgraded).await.starts_with("HTTP/1.1 101 "));
    for body in [&mut body1, &mut body2] {
        assert_eq!(soon("a frame", body.frame()).await.unwrap().unwrap().into_data().unwrap(), "first");
    }
    until_in_flight(&fixture, 4).await;

    fixture.registry.remove(&sandbox);
    fixture.proxy.disconnect(&sandbox.id);
    let answer = Answer::of(soon("the answer", waiting).await.unwrap()).await;
    assert_eq!((answer.status, answer.body.contains("was not found")), (502, true), "{}", answer.body);
    for body in [&mut body1, &mut body2] {
        let end = soon("the cut", body.frame()).await;
        assert!(end.is_some_and(|frame| frame.is_err()), "a body that was cut does not look complete");
    }
    let _ = soon("the end of the tunnel", upgraded.read_to_end(&mut Vec::new())).await;
    assert_eq!(fixture.proxy.in_flight(), 0);
    assert_eq!(fixture.get(&host, "/").await.status, 502);
}

#[tokio::test]
async fn a_restored_sandbox_gets_new_connections() {
    let fixture = Fixture::new().await;
    let sandbox = fixture.sandbox();
    serve_slowly(&sandbox, 8080).await;
    let host = sandbox.host(8080);
    let mut http1 = fixture.http1().await;
    let mut old = http1.send_on(request("GET", &host, "/stream", empty())).await.into_body();
    assert!(soon("a frame", old.frame()).await.unwrap().is_ok());
    fixture.get(&host, "/").await;
    fixture.get(&host, "/").await;
    assert_eq!(sandbox.connects(), 2);

    sandbox.generation.store(2, Ordering::SeqCst);
    assert_eq!(fixture.get(&host, "/").await.status, 200);
    assert_eq!(sandbox.connects(), 3, "what was kept belongs to the old generation");
    assert!(soon("the cut", old.frame()).await.is_some_and(|frame| frame.is_err()));

    sandbox.generation.store(1, Ordering::SeqCst);
    let answer = fixture.get(&host, "/").await;
    assert_eq!((answer.status, answer.header("should-retry")), (409, Some("true")), "an outdated lookup");
    assert_eq!(sandbox.connects(), 3);
}

#[tokio::test]
async fn a_drain_lets_requests_end_and_then_cuts_them() {
    let fixture = Fixture::new().await;
    let sandbox = fixture.sandbox();
    let go = serve_slowly(&sandbox, 8080).await;
    let host = sandbox.host(8080);
    let ends = tokio::spawn(fixture.http1().await.send(request("GET", &host, "/wait", empty())));
    until_in_flight(&fixture, 1).await;

    let proxy = fixture.proxy.clone();
    let drain = tokio::spawn(async move { proxy.drain(Duration::from_secs(60)).await });
    soon("the drain to begin", async { while fixture.get(&host, "/").await.status != 503 {} }).await;
    assert!(!drain.is_finished());
    go.notify_one();
    assert_eq!(Answer::of(soon("the answer", ends).await.unwrap()).await.body, "answered");
    assert_eq!(soon("the drain", drain).await.unwrap().cut, 0);

    let fixture = Fixture::new().await;
    let sandbox = fixture.sandbox();
    let _never = serve_slowly(&sandbox, 8080).await;
    let host = sandbox.host(8080);
    let waiting = tokio::spawn(fixture.http1().await.send(request("GET", &host, "/wait", empty())));
    let mut http1 = fixture.http1().await;
    let mut body = http1.send_on(request("GET", &host, "/stream", empty())).await.into_body();
    assert!(soon("a frame", body.frame()).await.unwrap().is_ok());
    until_in_flight(&fixture, 2).await;
    assert_eq!(soon("the drain", fixture.proxy.drain(Duration::from_millis(100))).await.cut, 2);
    let answer = Answer::of(soon("the answer", waiting).await.unwrap()).await;
    assert_eq!((answer.status, answer.body.contains("shutting down")), (503, true), "{}", answer.body);
    assert!(soon("the cut", body.frame()).await.is_some_and(|frame| frame.is_err()));
}
