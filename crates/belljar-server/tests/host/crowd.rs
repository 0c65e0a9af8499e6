//! Too much of everything: connections, sandboxes, bytes.

use std::time::{Duration, Instant};

use belljar_protocol::client::ClientError;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::server::{Server, base};

const CROWD: usize = 10_000;

/// Ten thousand clients connect, ask, and stay. Each is answered or turned away within seconds, and right afterwards
/// the API works as ever, although none of them has hung up.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs root and the base template"]
async fn ten_thousand_connections_hang_nobody() {
    raise_open_files();
    let server = Server::start();
    let connections: Vec<_> = (0..CROWD)
        .map(|_| {
            let address = server.address.clone();
            tokio::spawn(async move {
                let mut stream = TcpStream::connect(&address).await?;
                stream.write_all(b"GET /sandboxes HTTP/1.1\r\nhost: test\r\n\r\n").await?;
                let mut head = [0; 12];
                stream.read_exact(&mut head).await?;
                Ok::<_, std::io::Error>((String::from_utf8_lossy(&head).into_owned(), stream))
            })
        })
        .collect();
    let deadline = Instant::now() + Duration::from_secs(60);
    let (mut answered, mut turned_away, mut open) = (0, 0, Vec::new());
    for connection in connections {
        let left = deadline.saturating_duration_since(Instant::now());
        let outcome = tokio::time::timeout(left, connection).await.expect("nobody hangs").unwrap();
        match outcome {
            Ok((head, stream)) if head == "HTTP/1.1 401" => {
                answered += 1;
                open.push(stream);
            }
            Ok((head, _)) if head == "HTTP/1.1 503" => turned_away += 1,
            Ok((head, _)) => panic!("an unexpected answer: {head}"),
            // Turned away while still writing.
            Err(_) => turned_away += 1,
        }
    }
    println!("{answered} answered, {turned_away} turned away");
    assert!(answered > CROWD / 2);
    tokio::time::sleep(Duration::from_secs(1)).await;
    let client = server.client();
    let sandbox = client.create(&base()).await.expect("the API works as ever");
    client.kill(&sandbox.sandbox_id).await.unwrap();
    drop(open);
}

/// With few places, clients that only sit there are asked to leave in favour of those that want something.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs root and the base template"]
async fn idle_connections_give_way() {
    let server = Server::start_with(&["--kill-on-exit"], &[("BELLJAR_SERVER_CONNECTIONS", "40")]);
    let mut idle = Vec::new();
    for _ in 0..40 {
        idle.push(TcpStream::connect(&server.address).await.unwrap());
    }
    let deadline = Instant::now() + Duration::from_secs(20);
    while let Err(error) = server.client().list().await {
        let full = matches!(&error, ClientError::Refused { status, .. } if status.as_u16() == 503);
        assert!(full || matches!(error, ClientError::Unreachable { .. }), "{error}");
        assert!(Instant::now() < deadline, "idle connections keep everybody out");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs root and the base template"]
async fn a_full_machine_says_so_and_has_room_again_after_a_kill() {
    let variables = [("BELLJAR_CAPACITY_MEMORY_MIB", "2048"), ("BELLJAR_CAPACITY_MEMORY_OVERCOMMIT", "1.0")];
    let server = Server::start_with(&["--kill-on-exit"], &variables);
    let client = server.client();
    let first = client.create(&base()).await.unwrap();
    client.create(&base()).await.unwrap();
    match client.create(&base()).await {
        Err(ClientError::Refused { status, message }) => {
            assert_eq!(status.as_u16(), 429);
            assert!(message.contains("2048 of 2048 MiB"), "{message}");
        }
        other => panic!("the third does not fit: {other:?}"),
    }
    client.kill(&first.sandbox_id).await.unwrap();
    client.create(&base()).await.expect("there is room again");
}

fn raise_open_files() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).unwrap();
    assert!(hard > CROWD as u64 + 1000, "this machine allows only {hard} open files; the crowd needs more");
}
