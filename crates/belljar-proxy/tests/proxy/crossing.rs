//! What crosses of requests and answers, over which connections.

use std::io::{Read, Write};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use http::header::HeaderMap;
use http_body_util::{BodyExt, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::{Request, Response, Version};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::support::{Answer, AnyBody, Fixture, Sandbox, Settings, empty, full, read_head, request, request2, soon};

/// Answers with what the server saw: method, target, version, sorted headers, body, trailers.
async fn describe(request: Request<Incoming>) -> Response<AnyBody> {
    let (parts, body) = request.into_parts();
    let body = body.collect().await.unwrap();
    let trailers = body.trailers().cloned();
    let mut lines = vec![format!("{} {} {:?}", parts.method, parts.uri, parts.version)];
    let mut headers: Vec<String> =
        parts.headers.iter().map(|(name, value)| format!("{name}: {}", value.to_str().unwrap())).collect();
    headers.sort_unstable();
    lines.append(&mut headers);
    lines.push(format!("body: {}", String::from_utf8_lossy(&body.to_bytes())));
    lines.extend(trailers.iter().flat_map(HeaderMap::iter).map(|(name, value)| format!("trailer {name}: {value:?}")));
    Response::new(full(lines.join("\n")))
}

fn with_trailers(data: &'static str, trailers: HeaderMap) -> AnyBody {
    let frames = [Ok(Frame::data(Bytes::from(data))), Ok(Frame::trailers(trailers))];
    StreamBody::new(futures::stream::iter(frames)).boxed_unsync()
}

fn trailers(name: &'static str, value: &'static str) -> HeaderMap {
    [(name.parse().unwrap(), value.parse().unwrap())].into_iter().collect()
}

#[tokio::test]
async fn a_request_crosses_whole() {
    let fixture = Fixture::new().await;
    let sandbox = fixture.sandbox();
    sandbox.serve(8080, describe).await;
    let host = sandbox.host(8080);

    let mut http1 = request("PATCH", &host, "/a%20b/../c?d=%2F", full("text"));
    http1.headers_mut().insert("x-forwarded-for", "10.0.0.1".parse().unwrap());
    let answer = Answer::of(fixture.send(http1).await).await;
    let expected = format!(
        "PATCH /a%20b/../c?d=%2F HTTP/1.1\ncontent-length: 4\nhost: {host}\nx-forwarded-for: 127.0.0.1\n\
         x-forwarded-host: {host}\nx-forwarded-proto: http\nbody: text"
    );
    assert_eq!(answer.body, expected);

    let http2 = request2("PATCH", &host, "/a%20b/../c?d=%2F", full("text"));
    let answer = fixture.http2().await.send(http2).await.unwrap();
    assert_eq!(answer.version(), Version::HTTP_2);
    assert_eq!(Answer::of(answer).await.body, expected, "over HTTP/2");
}

#[tokio::test]
async fn the_host_can_be_masked() {
    let fixture = Fixture::new().await;
    let host_mask = Some("localhost:${PORT}".to_owned());
    let sandbox = fixture.registry.add(Settings { host_mask, ..Settings::default() });
    sandbox.serve(8080, describe).await;
    let answer = fixture.get(&sandbox.host(8080), "/").await;
    assert!(answer.body.contains("\nhost: localhost:8080\n"), "{}", answer.body);
    assert!(answer.body.contains(&format!("\nx-forwarded-host: {}\n", sandbox.host(8080))), "{}", answer.body);
}

#[tokio::test]
async fn hop_by_hop_headers_do_not_cross() {
    let fixture = Fixture::new().await;
    let sandbox = fixture.sandbox();
    sandbox.serve(8080, describe).await;
    let host = sandbox.host(8080);
    let answer = fixture
        .raw(&format!(
            "GET / HTTP/1.1\r\nHost: {host}\r\nConnection: close, X-Access-Token, X-Forwarded-For, Host\r\n\
             X-Access-Token: secret\r\nKeep-Alive: 5\r\nTE: gzip\r\nProxy-Authorization: x\r\nX-Belljar-A: b\r\n\r\n"
        ))
        .await;
    let seen = answer.split("\r\n\r\n").nth(1).unwrap();
    assert_eq!(
        seen,
        format!(
            "GET / HTTP/1.1\nhost: {host}\nx-forwarded-for: 127.0.0.1\nx-forwarded-host: {host}\n\
             x-forwarded-proto: http\nbody: "
        )
    );

    let answers = |stream: TcpStream| {
        answer_raw(
            stream,
            "HTTP/1.1 200 OK\r\nConnection: X-Secret\r\nX-Secret: 1\r\nKeep-Alive: 5\r\nX-Belljar-A: b\r\n\
         Transfer-Encoding: chunked\r\nX-Kept: 1\r\n\r\n2\r\nok\r\n0\r\n\r\n",
        )
    };
    sandbox.serve_raw(8081, answers).await;
    let answer = fixture.get(&sandbox.host(8081), "/").await;
    let mut names: Vec<&str> = answer.headers.keys().map(|name| name.as_str()).collect();
    names.sort_unstable();
    assert_eq!((names, answer.body.as_str()), (vec!["date", "transfer-encoding", "x-kept"], "ok"));
}

/// Answers every request on a connection with the same bytes.
async fn answer_raw(mut stream: TcpStream, answer: &'static str) {
    while !read_head(&mut stream).await.is_empty() {
        stream.write_all(answer.as_bytes()).await.unwrap();
    }
}

#[tokio::test]
async fn no_request_hides_in_another() {
    let fixture = Fixture::new().await;
    let sandbox = fixture.sandbox();
    let seen = Arc::new(Mutex::new(Vec::new()));
    let handler = {
        let seen = Arc::clone(&seen);
        move |request: Request<Incoming>| {
            let seen = Arc::clone(&seen);
            async move {
                let path = request.uri().path().to_owned();
                let body = request.into_body().collect().await.map(|body| body.to_bytes());
                let length = body.map(|body| body.len());
                seen.lock().unwrap().push(format!("{path} {length:?}"));
                Response::new(empty())
            }
        }
    };
    sandbox.serve(8080, handler).await;
    let host = sandbox.host(8080);
    let hidden = format!("GET /hidden HTTP/1.1\r\nHost: {host}\r\n\r\n");
    let length = hidden.len();
    // Each of these looks like one request to one parser and like two to another.
    let attempts = [
        format!("Content-Length: {}\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n{hidden}", length + 5),
        format!("Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n{hidden}"),
        format!("Content-Length: 0\r\nContent-Length: {length}\r\n\r\n{hidden}"),
        format!("Transfer-Encoding: xchunked\r\nContent-Length: {length}\r\n\r\n{hidden}"),
        format!("Transfer-Encoding : chunked\r\nContent-Length: {length}\r\n\r\n{hidden}"),
        format!("Connection: content-length\r\nContent-Length: {length}\r\n\r\n{hidden}"),
        format!(
            "Connection: transfer-encoding\r\nTransfer-Encoding: chunked\r\n\r\n{length:x}\r\n{hidden}\r\n0\r\n\r\n"
        ),
    ];
    for attempt in &attempts {
        let mut stream = TcpStream::connect(fixture.address).await.unwrap();
        let text = format!("POST /visible HTTP/1.1\r\nHost: {host}\r\n{attempt}");
        stream.write_all(text.as_bytes()).await.unwrap();
        stream.shutdown().await.unwrap();
        let mut answer = Vec::new();
        let _ = soon("the end", stream.read_to_end(&mut answer)).await;
    }
    let seen = seen.lock().unwrap();
    assert!(seen.iter().all(|request| request.starts_with("/visible ")), "{seen:?}");
    assert!(seen.contains(&format!("/visible Ok({length})")), "those that are one request arrive as one: {seen:?}");
}

#[tokio::test]
async fn trailers_cross_both_ways() {
    let fixture = Fixture::new().await;
    let sandbox = fixture.sandbox();
    sandbox.serve(8080, describe).await;
    let answers = |_| async {
        let mut response = Response::new(with_trailers("text", trailers("x-sum", "42")));
        response.headers_mut().insert("trailer", "x-sum".parse().unwrap());
        response
    };
    sandbox.serve(8081, answers).await;

    let mut upload = request("POST", &sandbox.host(8080), "/", with_trailers("text", trailers("x-sum", "41")));
    upload.headers_mut().insert("trailer", "x-sum".parse().unwrap());
    let answer = Answer::of(fixture.send(upload).await).await;
    assert!(answer.body.ends_with("body: text\ntrailer x-sum: \"41\""), "{}", answer.body);

    let mut download = request("GET", &sandbox.host(8081), "/", empty());
    download.headers_mut().insert("te", "trailers".parse().unwrap());
    let answer = fixture.send(download).await;
    assert_eq!(answer.into_body().collect().await.unwrap().trailers(), Some(&trailers("x-sum", "42")));

    let mut download = request2("GET", &sandbox.host(8081), "/", empty());
    download.headers_mut().insert("te", "trailers".parse().unwrap());
    let answer = fixture.http2().await.send(download).await.unwrap();
    assert_eq!(answer.into_body().collect().await.unwrap().trailers(), Some(&trailers("x-sum", "42")), "HTTP/2");
}

#[tokio::test]
async fn grpc_is_http2_all_the_way() {
    let fixture = Fixture::new().await;
    let sandbox = fixture.sandbox();
    let answers = |request: Request<Incoming>| async move {
        let words = format!("{:?} {} {:?}", request.version(), request.uri(), request.headers().get("te"));
        let frames = [Ok(Frame::data(Bytes::from(words))), Ok(Frame::trailers(trailers("grpc-status", "0")))];
        Response::new(StreamBody::new(futures::stream::iter(frames)).boxed_unsync())
    };
    sandbox.serve(50051, answers).await;
    let mut client = fixture.http2().await;
    for _ in 0..3 {
        let mut call = request2("POST", &sandbox.host(50051), "/a.Service/Call", full("message"));
        call.headers_mut().insert("content-type", "application/grpc+proto".parse().unwrap());
        call.headers_mut().insert("te", "trailers".parse().unwrap());
        let answer = client.send(call).await.unwrap().into_body().collect().await.unwrap();
        assert_eq!(answer.trailers(), Some(&trailers("grpc-status", "0")));
        let expected = format!("HTTP/2.0 http://{}/a.Service/Call Some(\"trailers\")", sandbox.host(50051));
        assert_eq!(String::from_utf8(answer.to_bytes().to_vec()).unwrap(), expected);
    }
    assert_eq!(sandbox.connects(), 1, "calls share a connection");
}

#[tokio::test]
async fn answers_without_a_body_keep_their_heads() {
    let fixture = Fixture::new().await;
    let sandbox = fixture.sandbox();
    sandbox.serve_raw(8080, |stream| answer_raw(stream, "HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")).await;
    sandbox.serve_raw(8081, |stream| answer_raw(stream, "HTTP/1.1 304 Not Modified\r\nETag: \"x\"\r\n\r\n")).await;
    sandbox.serve_raw(8082, |stream| answer_raw(stream, "HTTP/1.1 299 Odd Reason\r\nContent-Length: 0\r\n\r\n")).await;

    let head = Answer::of(fixture.send(request("HEAD", &sandbox.host(8080), "/", empty())).await).await;
    assert_eq!((head.status, head.header("content-length"), head.body.as_str()), (200, Some("1000"), ""));
    let not_modified = fixture.get(&sandbox.host(8081), "/").await;
    assert_eq!((not_modified.status, not_modified.header("etag")), (304, Some("\"x\"")));
    assert_eq!(fixture.get(&sandbox.host(8082), "/").await.status, 299);
}

#[tokio::test]
async fn expect_continue_is_answered_by_the_proxy() {
    let fixture = Fixture::new().await;
    let sandbox = fixture.sandbox();
    sandbox.serve(8080, describe).await;
    let mut stream = TcpStream::connect(fixture.address).await.unwrap();
    let host = sandbox.host(8080);
    let head = format!("POST / HTTP/1.1\r\nHost: {host}\r\nExpect: 100-continue\r\nContent-Length: 4\r\n\r\n");
    stream.write_all(head.as_bytes()).await.unwrap();
    assert_eq!(soon("100 Continue", read_head(&mut stream)).await, "HTTP/1.1 100 Continue\r\n\r\n");
    stream.write_all(b"text").await.unwrap();
    assert!(soon("the answer", read_head(&mut stream)).await.starts_with("HTTP/1.1 200 OK\r\n"));
}

#[tokio::test]
async fn old_clients_and_old_servers_are_served() {
    let fixture = Fixture::new().await;
    let sandbox = fixture.sandbox();
    let until_close = |mut stream: TcpStream| async move {
        read_head(&mut stream).await;
        stream.write_all(b"HTTP/1.0 200 OK\r\n\r\nuntil the end").await.unwrap();
    };
    sandbox.serve_raw(8080, until_close).await;
    assert_eq!(fixture.get(&sandbox.host(8080), "/").await.body, "until the end");

    let id = &sandbox.id;
    let old = format!("GET / HTTP/1.0\r\nE2b-Sandbox-Id: {id}\r\nE2b-Sandbox-Port: 8080\r\n\r\n");
    let answer = fixture.raw(&old).await;
    assert!(answer.ends_with("\r\n\r\nuntil the end"), "{answer}");
}

#[tokio::test]
async fn what_is_not_http_is_a_502() {
    let fixture = Fixture::new().await;
    let sandbox = fixture.sandbox();
    let unasked = "HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n";
    for (port, answer) in [(1, "SSH-2.0-OpenSSH\r\n"), (2, ""), (3, "HTTP/1.1 200 OK\r\nX"), (4, unasked)] {
        let handler = move |mut stream: TcpStream| async move {
            read_head(&mut stream).await;
            stream.write_all(answer.as_bytes()).await.unwrap();
        };
        sandbox.serve_raw(port, handler).await;
        let refused = fixture.get(&sandbox.host(port), "/").await;
        assert_eq!((refused.status, refused.body.contains("did not answer in HTTP")), (502, true), "{answer:?}");
    }
}

#[tokio::test]
async fn connections_are_reused_and_expire() {
    let fixture = Fixture::with(|config| config.idle_timeout = Duration::from_secs(3)).await;
    let sandbox = fixture.sandbox();
    let other = fixture.sandbox();
    for sandbox in [&sandbox, &other] {
        sandbox.serve(8080, describe).await;
        sandbox.serve(8081, describe).await;
    }
    let mut client = fixture.http1().await;
    for (method, body) in [("GET", ""), ("POST", "text"), ("GET", ""), ("DELETE", "")] {
        Answer::of(client.send_on(request(method, &sandbox.host(8080), "/", full(body))).await).await;
    }
    assert_eq!(sandbox.connects(), 1);
    fixture.get(&sandbox.host(8081), "/").await;
    assert_eq!(sandbox.connects(), 2, "not for another port");
    fixture.get(&other.host(8080), "/").await;
    assert_eq!(other.connects(), 1, "not for another sandbox");

    // In time for the timeout, but not yet for the sweep that comes once in its length.
    tokio::time::sleep(Duration::from_millis(3_300)).await;
    fixture.get(&sandbox.host(8080), "/").await;
    assert_eq!(sandbox.connects(), 3, "not after the timeout");
}

#[tokio::test]
async fn idle_connections_are_bounded() {
    let fixture = Fixture::with(|config| config.max_idle = 1).await;
    let [first, second] = [fixture.sandbox(), fixture.sandbox()];
    for sandbox in [&first, &second] {
        sandbox.serve(8080, describe).await;
    }
    for _ in 0..2 {
        fixture.get(&first.host(8080), "/").await;
        fixture.get(&second.host(8080), "/").await;
    }
    assert_eq!((first.connects(), second.connects()), (1, 2));
}

/// Answers the first request of each connection, and closes it at the second, having read it or not.
async fn serve_once(sandbox: &Sandbox, port: u16, reads_second: bool, requests: Arc<AtomicUsize>) {
    let handler = move |mut stream: TcpStream| {
        let requests = Arc::clone(&requests);
        async move {
            read_head(&mut stream).await;
            requests.fetch_add(1, Ordering::SeqCst);
            stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").await.unwrap();
            if reads_second && !read_head(&mut stream).await.is_empty() {
                requests.fetch_add(1, Ordering::SeqCst);
            }
        }
    };
    sandbox.serve_raw(port, handler).await;
}

#[tokio::test]
async fn a_stale_connection_is_replaced() {
    let fixture = Fixture::new().await;
    let sandbox = fixture.sandbox();
    let requests = Arc::new(AtomicUsize::new(0));
    serve_once(&sandbox, 8080, false, Arc::clone(&requests)).await;
    for (count, method) in ["GET", "POST", "GET", "POST", "PUT"].into_iter().enumerate() {
        let answer = Answer::of(fixture.send(request(method, &sandbox.host(8080), "/", empty())).await).await;
        assert_eq!((answer.status, answer.body.as_str()), (200, "ok"), "{method}");
        assert_eq!(requests.load(Ordering::SeqCst), count + 1);
    }
}

#[tokio::test]
async fn a_request_that_was_not_sent_is_sent_again() {
    let fixture = Fixture::new().await;
    let sandbox = fixture.sandbox();
    // A server on a thread of its own, which answers one request and closes the connection when told to.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    sandbox.listen(8080, listener.local_addr().unwrap());
    let (close, told) = std::sync::mpsc::channel::<()>();
    let (closed, is_closed) = std::sync::mpsc::channel();
    let server = std::thread::spawn(move || {
        for _ in 0..2 {
            let (mut stream, _) = listener.accept().unwrap();
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                let mut byte = [0];
                stream.read_exact(&mut byte).unwrap();
                head.push(byte[0]);
            }
            stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").unwrap();
            let _ = told.recv();
            drop(stream);
            closed.send(()).unwrap();
        }
    });

    let mut client = TcpStream::connect(fixture.address).await.unwrap();
    let head = format!("POST / HTTP/1.1\r\nHost: {}\r\nContent-Length: 0\r\n\r\n", sandbox.host(8080));
    let mut answer = vec![0; 2];
    for _ in 0..2 {
        if sandbox.connects() == 0 {
            client.write_all(head.as_bytes()).await.unwrap();
        } else {
            // This thread is the proxy's too. Until it waits, the proxy sees neither that a request came nor, after
            // it, that the connection it kept for one was closed.
            assert_eq!(client.try_write(head.as_bytes()).unwrap(), head.len());
            close.send(()).unwrap();
            is_closed.recv().unwrap();
        }
        assert!(soon("an answer", read_head(&mut client)).await.starts_with("HTTP/1.1 200 OK\r\n"));
        client.read_exact(&mut answer).await.unwrap();
    }
    assert_eq!(sandbox.connects(), 2);
    drop(close);
    server.join().unwrap();
}

#[tokio::test]
async fn a_request_is_sent_twice_only_if_it_changes_nothing() {
    let fixture = Fixture::new().await;
    let sandbox = fixture.sandbox();
    for (port, method, status, total) in [(1, "GET", 200, 3), (2, "POST", 502, 2), (3, "DELETE", 502, 2)] {
        let requests = Arc::new(AtomicUsize::new(0));
        serve_once(&sandbox, port, true, Arc::clone(&requests)).await;
        let host = sandbox.host(port);
        assert_eq!(fixture.get(&host, "/").await.status, 200);
        let answer = Answer::of(fixture.send(request(method, &host, "/", empty())).await).await;
        assert_eq!(answer.status, status, "{method}");
        assert_eq!(requests.load(Ordering::SeqCst), total, "{method}");
    }
}
