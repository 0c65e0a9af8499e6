use super::message::tests::query_bytes;
use super::*;

const LOCALHOST: (Ipv4Addr, u16) = (Ipv4Addr::LOCALHOST, 0);

/// An upstream that hears everything and says only what the test sends through it.
async fn silent_upstream() -> (UdpSocket, SocketAddr) {
    let socket = UdpSocket::bind(LOCALHOST).await.expect("a socket");
    let address = socket.local_addr().expect("an address");
    (socket, address)
}

/// An upstream that answers every query, over UDP and TCP, with `code` and no records.
async fn answering_upstream(code: u8) -> SocketAddr {
    let (udp, tcp) = loop {
        // UDP and TCP have to share a port, and the one the kernel gave out may be taken for the other.
        let udp = UdpSocket::bind(LOCALHOST).await.expect("a socket");
        if let Ok(tcp) = TcpListener::bind(udp.local_addr().expect("an address")).await {
            break (udp, tcp);
        }
    };
    let address = udp.local_addr().expect("an address");
    let answer = move |query: &[u8]| {
        let mut bytes = query.to_vec();
        bytes[2] |= 0x80;
        bytes[3] = code;
        bytes
    };
    tokio::spawn(async move {
        let mut buffer = [0; 4096];
        while let Ok((length, from)) = udp.recv_from(&mut buffer).await {
            udp.send_to(&answer(&buffer[..length]), from).await.expect("sent");
        }
    });
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = tcp.accept().await {
            let query = read_framed(&mut stream, ANSWER_BYTES_MAX).await.expect("a query");
            write_framed(&mut stream, &answer(&query)).await.expect("sent");
        }
    });
    address
}

struct Running {
    address: SocketAddr,
    stop: CancellationToken,
    task: tokio::task::JoinHandle<()>,
    _upstreams: watch::Sender<Vec<SocketAddr>>,
}

impl Running {
    async fn start(upstreams: Vec<SocketAddr>, concurrency: usize) -> Self {
        let (udp, tcp) = loop {
            let udp = UdpSocket::bind(LOCALHOST).await.expect("a socket");
            if let Ok(tcp) = TcpListener::bind(udp.local_addr().expect("an address")).await {
                break (udp, tcp);
            }
        };
        let address = udp.local_addr().expect("an address");
        let (sender, upstreams) = watch::channel(upstreams);
        let stop = CancellationToken::new();
        let task = tokio::spawn(Forwarder::new(upstreams, concurrency).serve(udp, tcp, stop.clone()));
        Self { address, stop, task, _upstreams: sender }
    }

    async fn client(&self) -> UdpSocket {
        let socket = UdpSocket::bind(LOCALHOST).await.expect("a socket");
        socket.connect(self.address).await.expect("connected");
        socket
    }

    async fn ask(&self, query: &[u8]) -> Vec<u8> {
        let client = self.client().await;
        client.send(query).await.expect("sent");
        receive(&client).await
    }
}

async fn receive(socket: &UdpSocket) -> Vec<u8> {
    let mut buffer = vec![0; 4096];
    let length =
        timeout(Duration::from_secs(10), socket.recv(&mut buffer)).await.expect("an answer").expect("received");
    buffer.truncate(length);
    buffer
}

fn code(answer: &[u8]) -> u8 {
    answer[3] & 0x0f
}

#[tokio::test]
async fn an_answer_comes_back_under_the_guests_id() {
    let forwarder = Running::start(vec![answering_upstream(0).await], 4).await;
    let query = query_bytes(0x4242, "example.org", 1);
    let answer = forwarder.ask(&query).await;
    assert_eq!(answer[..2], query[..2]);
    assert_eq!(answer[12..], query[12..]);
    assert_eq!(code(&answer), 0);
}

#[tokio::test]
async fn upstreams_see_other_ids_and_other_ports_each_time() {
    let (upstream, address) = silent_upstream().await;
    let forwarder = Running::start(vec![address], 8).await;
    let client = forwarder.client().await;
    let mut seen = Vec::new();
    let mut buffer = [0; 512];
    for _ in 0..8 {
        client.send(&query_bytes(1, "example.org", 1)).await.expect("sent");
        let (_, from) = upstream.recv_from(&mut buffer).await.expect("a query");
        seen.push(([buffer[0], buffer[1]], from.port()));
    }
    // Two of eight random identifiers being equal, or one being the guest's, is a matter of 1 in 1800.
    let ids: std::collections::HashSet<_> = seen.iter().map(|(id, _)| id).collect();
    let ports: std::collections::HashSet<_> = seen.iter().map(|(_, port)| port).collect();
    assert!(ids.len() >= 7, "{seen:?}");
    assert_eq!(ports.len(), 8, "{seen:?}");
}

#[tokio::test]
async fn a_forged_answer_is_passed_over() {
    let (upstream, address) = silent_upstream().await;
    let forwarder = Running::start(vec![address], 4).await;
    let client = forwarder.client().await;
    client.send(&query_bytes(9, "example.org", 1)).await.expect("sent");
    let mut buffer = [0; 512];
    let (length, from) = upstream.recv_from(&mut buffer).await.expect("a query");
    let mut answer = buffer[..length].to_vec();
    answer[2] |= 0x80;
    let mut forged = answer.clone();
    forged[0] ^= 0xff;
    forged[3] = 3;
    upstream.send_to(&forged, from).await.expect("sent");
    upstream.send_to(&answer, from).await.expect("sent");
    assert_eq!(code(&receive(&client).await), 0);
}

#[tokio::test]
async fn the_next_upstream_is_asked_when_one_fails() {
    let (closed, dead) = silent_upstream().await;
    drop(closed);
    let refusing = answering_upstream(5).await;
    let good = answering_upstream(3).await;
    let forwarder = Running::start(vec![dead, refusing, good], 4).await;
    assert_eq!(code(&forwarder.ask(&query_bytes(1, "example.org", 1)).await), 3);

    let only_refusing = Running::start(vec![dead, refusing], 4).await;
    assert_eq!(code(&only_refusing.ask(&query_bytes(1, "example.org", 1)).await), 5);
}

#[tokio::test]
async fn no_answer_is_a_server_failure() {
    let (_upstream, address) = silent_upstream().await;
    let started = std::time::Instant::now();
    for upstreams in [vec![], vec![address]] {
        let forwarder = Running::start(upstreams, 4).await;
        let query = query_bytes(5, "example.org", 1);
        let answer = forwarder.ask(&query).await;
        assert_eq!(code(&answer), 2);
        assert_eq!(answer[..2], query[..2]);
    }
    assert!(started.elapsed() < Duration::from_secs(5), "took {:?}", started.elapsed());
}

#[tokio::test]
async fn one_query_too_many_fails_at_once_and_does_no_harm() {
    let (_upstream, silent) = silent_upstream().await;
    let forwarder = Running::start(vec![silent], 2).await;
    let client = forwarder.client().await;
    for id in 1..=3 {
        client.send(&query_bytes(id, "example.org", 1)).await.expect("sent");
    }
    let started = std::time::Instant::now();
    let answer = receive(&client).await;
    assert_eq!((answer[1], code(&answer)), (3, 2));
    assert!(started.elapsed() < ATTEMPT_TIMEOUT, "took {:?}", started.elapsed());
    // The two under way end, and make room again.
    for _ in 0..2 {
        receive(&client).await;
    }
    client.send(&query_bytes(4, "example.org", 1)).await.expect("sent");
    assert!(timeout(ATTEMPT_TIMEOUT, client.recv(&mut [0; 512])).await.is_err(), "the fourth was not forwarded");
}

#[tokio::test]
async fn tcp_is_forwarded_over_tcp() {
    let forwarder = Running::start(vec![answering_upstream(3).await], 4).await;
    let mut stream = TcpStream::connect(forwarder.address).await.expect("connected");
    for id in [7, 8] {
        write_framed(&mut stream, &query_bytes(id, "example.org", 1)).await.expect("sent");
        let answer = read_framed(&mut stream, ANSWER_BYTES_MAX).await.expect("an answer");
        assert_eq!((u16::from(answer[1]), code(&answer)), (id, 3));
    }
}

#[tokio::test]
async fn tcp_is_answered_even_if_the_upstream_knows_only_udp() {
    let (upstream, address) = silent_upstream().await;
    let forwarder = Running::start(vec![address], 4).await;
    let mut stream = TcpStream::connect(forwarder.address).await.expect("connected");
    write_framed(&mut stream, &query_bytes(7, "example.org", 1)).await.expect("sent");
    let mut buffer = [0; 512];
    let (length, from) = upstream.recv_from(&mut buffer).await.expect("the query, over UDP");
    buffer[2] |= 0x80;
    upstream.send_to(&buffer[..length], from).await.expect("sent");
    let answer = read_framed(&mut stream, ANSWER_BYTES_MAX).await.expect("an answer");
    assert_eq!(u16::from(answer[1]), 7);
}

#[tokio::test]
async fn stopping_closes_the_sockets() {
    let forwarder = Running::start(vec![], 4).await;
    forwarder.stop.cancel();
    forwarder.task.await.expect("ended");
    assert!(TcpStream::connect(forwarder.address).await.is_err());
    assert!(UdpSocket::bind(forwarder.address).await.is_ok());
}
