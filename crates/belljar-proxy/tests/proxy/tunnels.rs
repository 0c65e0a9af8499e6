//! WebSocket and other upgrades.

use futures::{SinkExt, StreamExt};
use hyper::ext::Protocol;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::handshake::server;
use tokio_tungstenite::tungstenite::protocol::Role;

use crate::support::{Answer, Fixture, Sandbox, Settings, empty, read_head, request, soon};

/// A WebSocket server that greets with the path and the offered subprotocol, and echoes.
async fn serve_echo(sandbox: &Sandbox, port: u16) {
    let handler = |stream: TcpStream| async move {
        let mut greeting = String::new();
        #[allow(clippy::result_large_err, reason = "the library's type")]
        let greet = |request: &server::Request, mut response: server::Response| {
            let subprotocol = request.headers().get("sec-websocket-protocol").cloned();
            greeting = format!("{} {subprotocol:?}", request.uri());
            if let Some(subprotocol) = subprotocol {
                response.headers_mut().insert("sec-websocket-protocol", subprotocol);
            }
            Ok(response)
        };
        let Ok(mut socket) = tokio_tungstenite::accept_hdr_async(stream, greet).await else { return };
        socket.send(Message::text(greeting)).await.unwrap();
        while let Some(Ok(message)) = socket.next().await {
            if (message.is_text() || message.is_binary()) && socket.send(message).await.is_err() {
                break;
            }
        }
    };
    sandbox.serve_raw(port, handler).await;
}

async fn check_echo<S: AsyncRead + AsyncWrite + Unpin>(mut socket: WebSocketStream<S>, greeting: &str) {
    let next = async |socket: &mut WebSocketStream<S>| soon("a message", socket.next()).await.unwrap().unwrap();
    assert_eq!(next(&mut socket).await, Message::text(greeting));
    let large = Message::binary(vec![7; 1 << 20]);
    for message in [Message::text("hello"), Message::binary(vec![0, 255]), large] {
        socket.send(message.clone()).await.unwrap();
        assert!(next(&mut socket).await == message);
    }
    socket.close(None).await.unwrap();
    while let Some(message) = soon("the close", socket.next()).await {
        assert!(message.unwrap().is_close());
    }
}

#[tokio::test]
async fn websocket_over_http1() {
    let fixture = Fixture::new().await;
    let sandbox = fixture.sandbox();
    serve_echo(&sandbox, 8080).await;
    let stream = TcpStream::connect(fixture.address).await.unwrap();
    let mut handshake = Request::get(format!("ws://{}/chat?room=1", sandbox.host(8080)));
    for (name, value) in [
        ("host", sandbox.host(8080).as_str()),
        ("connection", "Upgrade"),
        ("upgrade", "websocket"),
        ("sec-websocket-version", "13"),
        ("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ=="),
        ("sec-websocket-protocol", "chat"),
    ] {
        handshake = handshake.header(name, value);
    }
    // The client checks the answer to its key, so the server's own must have crossed.
    let opening = tokio_tungstenite::client_async(handshake.body(()).unwrap(), stream);
    let (socket, answer) = soon("the handshake", opening).await.unwrap();
    assert_eq!(answer.headers().get("sec-websocket-protocol").unwrap(), "chat");
    check_echo(socket, "/chat?room=1 Some(\"chat\")").await;
    nothing_in_flight(&fixture).await;
}

#[tokio::test]
async fn websocket_over_http2() {
    let fixture = Fixture::new().await;
    let sandbox = fixture.sandbox();
    serve_echo(&sandbox, 8080).await;
    let mut client = fixture.http2().await;
    for _ in 0..2 {
        let mut connect = Request::builder()
            .method("CONNECT")
            .uri(format!("http://{}/chat?room=1", sandbox.host(8080)))
            .header("sec-websocket-version", "13")
            .body(empty())
            .unwrap();
        connect.extensions_mut().insert(Protocol::from_static("websocket"));
        let mut answer = client.send(connect).await.unwrap();
        assert_eq!(answer.status(), 200);
        assert!(!answer.headers().contains_key("sec-websocket-accept"));
        let upgraded = soon("the stream", hyper::upgrade::on(&mut answer)).await.unwrap();
        let socket = WebSocketStream::from_raw_socket(TokioIo::new(upgraded), Role::Client, None).await;
        check_echo(socket, "/chat?room=1 None").await;
    }
    nothing_in_flight(&fixture).await;
}

/// Each tunnel gave back its place.
async fn nothing_in_flight(fixture: &Fixture) {
    soon("the end of all tunnels", async {
        while fixture.proxy.in_flight() > 0 {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

/// Opens a tunnel with a protocol of the test's own.
async fn open_tunnel(fixture: &Fixture, host: &str) -> TcpStream {
    let mut stream = TcpStream::connect(fixture.address).await.unwrap();
    let head = format!("GET / HTTP/1.1\r\nHost: {host}\r\nConnection: upgrade\r\nUpgrade: first, bytes\r\n\r\n");
    stream.write_all(head.as_bytes()).await.unwrap();
    let answer = soon("the switch", read_head(&mut stream)).await;
    assert!(answer.starts_with("HTTP/1.1 101 ") && answer.contains("upgrade: bytes\r\n"), "{answer}");
    stream
}

/// Agrees to the protocol, together with the first bytes of it, and leaves the rest to the handler.
async fn accept_tunnel(stream: &mut TcpStream) {
    let head = read_head(stream).await;
    assert!(head.contains("\r\nconnection: upgrade\r\n") && head.contains("\r\nupgrade: first, bytes\r\n"), "{head}");
    let answer = "HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: bytes\r\n\r\nearly";
    stream.write_all(answer.as_bytes()).await.unwrap();
}

#[tokio::test]
async fn each_side_of_a_tunnel_may_finish_first() {
    let fixture = Fixture::new().await;
    let sandbox = fixture.sandbox();
    // The server answers only when the client has said its last.
    let after_client = |mut stream: TcpStream| async move {
        accept_tunnel(&mut stream).await;
        let mut said = String::new();
        stream.read_to_string(&mut said).await.unwrap();
        stream.write_all(format!(" heard: {said}").as_bytes()).await.unwrap();
    };
    sandbox.serve_raw(8080, after_client).await;
    let mut stream = open_tunnel(&fixture, &sandbox.host(8080)).await;
    stream.write_all(b"last words").await.unwrap();
    stream.shutdown().await.unwrap();
    let mut answer = String::new();
    soon("the answer", stream.read_to_string(&mut answer)).await.unwrap();
    assert_eq!(answer, "early heard: last words");

    let (told, mut hears) = tokio::sync::mpsc::channel(1);
    let before_client = move |mut stream: TcpStream| {
        let told = told.clone();
        async move {
            accept_tunnel(&mut stream).await;
            stream.shutdown().await.unwrap();
            let mut said = String::new();
            stream.read_to_string(&mut said).await.unwrap();
            told.send(said).await.unwrap();
        }
    };
    sandbox.serve_raw(8081, before_client).await;
    let mut stream = open_tunnel(&fixture, &sandbox.host(8081)).await;
    let mut answer = String::new();
    soon("the end", stream.read_to_string(&mut answer)).await.unwrap();
    assert_eq!(answer, "early");
    stream.write_all(b"still here").await.unwrap();
    stream.shutdown().await.unwrap();
    assert_eq!(soon("the last words", hears.recv()).await.unwrap(), "still here");
    nothing_in_flight(&fixture).await;
}

#[tokio::test]
async fn a_tunnel_that_is_refused_is_an_ordinary_answer() {
    let fixture = Fixture::new().await;
    let sandbox = fixture.sandbox();
    sandbox.serve(8080, |_| async { Response::builder().status(426).body(crate::support::full("no")).unwrap() }).await;
    let websocket = |host: &str| {
        let mut request = request("GET", host, "/", empty());
        request.headers_mut().insert("connection", "upgrade".parse().unwrap());
        request.headers_mut().insert("upgrade", "websocket".parse().unwrap());
        request
    };
    let answer = Answer::of(fixture.send(websocket(&sandbox.host(8080))).await).await;
    assert_eq!((answer.status, answer.body.as_str()), (426, "no"));
    let answer = Answer::of(fixture.send(websocket(&sandbox.host(9))).await).await;
    assert_eq!((answer.status, answer.body.contains("port is not open")), (502, true));

    let other = |mut stream: TcpStream| async move {
        read_head(&mut stream).await;
        let answer = "HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: something-else\r\n\r\n";
        stream.write_all(answer.as_bytes()).await.unwrap();
    };
    sandbox.serve_raw(8081, other).await;
    assert_eq!(Answer::of(fixture.send(websocket(&sandbox.host(8081))).await).await.status, 502);
}

#[tokio::test]
async fn a_tunnel_holds_its_place_until_it_ends() {
    let fixture = Fixture::new().await;
    let sandbox = fixture.registry.add(Settings { max_connections: Some(1), ..Settings::default() });
    let open_ended = |mut stream: TcpStream| async move {
        accept_tunnel(&mut stream).await;
        let _ = stream.read_to_end(&mut Vec::new()).await;
    };
    sandbox.serve_raw(8080, open_ended).await;
    let stream = open_tunnel(&fixture, &sandbox.host(8080)).await;
    assert_eq!(fixture.get(&sandbox.host(8080), "/").await.status, 429);
    drop(stream);
    nothing_in_flight(&fixture).await;
    drop(open_tunnel(&fixture, &sandbox.host(8080)).await);
}
