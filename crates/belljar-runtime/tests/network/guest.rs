//! What a guest gets from its gateway, and the server from a guest.

use std::io::{ErrorKind, Read};
use std::net::{Ipv4Addr, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use belljar_runtime::network::{GATEWAY_ADDRESS, GUEST_ADDRESS, NetworkConfig, NetworkManager};

use crate::world::{
    EchoKind, INTERNET, Listener, Netns, PATIENCE, QUERY, World, answer_queries, assert_closed, create, echo, icmp,
    in_a_world, is_answered, pings, received_echo, udp, uplink_addresses,
};

#[test]
fn names_are_resolved_at_the_gateway_and_nothing_else_is_there() {
    in_a_world(async |world| {
        answer_queries().await;
        let manager = world.manager().await;
        let network = create(&manager).await;
        let guest = world.inner(&network);
        assert!(is_answered(&guest).await);
        assert!(pings(&guest, GATEWAY_ADDRESS).await);
        assert!(!pings(&guest, uplink_addresses(&world, network.uplink_interface()).1).await);

        // TCP is open too; what listens beside it is not.
        let connected = guest.run(|| TcpStream::connect_timeout(&(GATEWAY_ADDRESS, 53).into(), PATIENCE)).await;
        assert!(connected.is_ok(), "{connected:?}");
        let listener = Listener::start(&world.router(&network)).await;
        assert_closed(&guest, GATEWAY_ADDRESS, listener.port).await;
        assert_eq!(listener.visitors(), []);
    });
}

#[test]
fn connections_to_the_guest() {
    in_a_world(async |world| {
        let manager = world.manager().await;
        let network = create(&manager).await;
        let listener = Listener::start(&world.inner(&network)).await;
        let stream = network.connect(listener.port, PATIENCE).await.expect("connected");
        assert!(stream.nodelay().expect("an option"));
        let mut stream = stream.into_std().expect("a stream");
        stream.set_nonblocking(false).expect("blocking");
        let mut seen_as = String::new();
        stream.read_to_string(&mut seen_as).expect("an answer");
        assert_eq!(seen_as, GATEWAY_ADDRESS.to_string());

        let closed = network.connect(1, PATIENCE).await.expect_err("nobody listens");
        assert_eq!(closed.kind(), ErrorKind::ConnectionRefused);

        // A guest whose engine is not up yet.
        world.inner(&network).sh("ip addr flush dev eth0");
        let started = Instant::now();
        let silent = network.connect(listener.port, Duration::from_millis(80)).await.expect_err("nobody is there");
        assert_eq!(silent.kind(), ErrorKind::TimedOut);
        assert!(started.elapsed() < Duration::from_millis(300), "{:?}", started.elapsed());
        // The next attempt succeeds as soon as it is.
        world.inner(&network).sh("ip addr add 169.254.7.2/30 dev eth0");
        network.connect(listener.port, Duration::from_millis(80)).await.expect("connected");

        // One that is under way ends with the network.
        world.inner(&network).sh("ip addr flush dev eth0");
        let destroying = async {
            tokio::time::sleep(Duration::from_millis(50)).await;
            manager.destroy(network.sandbox_id()).await
        };
        let (connected, destroyed) = tokio::join!(network.connect(listener.port, Duration::from_secs(20)), destroying);
        assert_eq!(connected.expect_err("it is gone").kind(), ErrorKind::NotConnected);
        destroyed.expect("destroyed");
    });
}

#[test]
fn one_connection_too_many_is_rejected() {
    in_a_world(async |world| {
        let config = NetworkConfig { connections_max: 5, ..world.config("test") };
        let manager = NetworkManager::start(config).await.expect("a manager");
        let (one, other) = (create(&manager).await, create(&manager).await);
        let listener = world.internet.run(|| std::net::TcpListener::bind((INTERNET, 7000))).await.expect("a listener");
        let open =
            async |netns: &Netns| netns.run(|| TcpStream::connect_timeout(&(INTERNET, 7000).into(), PATIENCE)).await;
        let mut streams = Vec::new();
        for _ in 0..5 {
            streams.push(open(&world.inner(&one)).await.expect("connected"));
        }
        assert!(open(&world.inner(&one)).await.is_err());
        // Neither another sandbox nor the server feels it.
        assert!(open(&world.inner(&other)).await.is_ok());
        let in_guest = Listener::start(&world.inner(&one)).await;
        assert!(one.connect(in_guest.port, PATIENCE).await.is_ok());
        drop((streams, listener));
    });
}

#[test]
fn what_the_gateway_remembers_of_a_guest_is_bounded() {
    in_a_world(async |world| {
        let manager = world.manager().await;
        let network = create(&manager).await;
        let (guest, router) = (world.inner(&network), world.router(&network));

        // Queries leave nothing in the connection table, however many ports they come from.
        let sent = guest.run(|| {
            (0..300).all(|_| {
                let socket = UdpSocket::bind((GUEST_ADDRESS, 0)).expect("a socket");
                socket.send_to(QUERY, (GATEWAY_ADDRESS, 53)).is_ok()
            })
        });
        assert!(sent.await);
        assert_eq!(World::tracked(&router), 0);
        // Pings do, up to a limit.
        let pinging = icmp(&guest).await;
        for id in 0..100 {
            pinging.send_to(&echo(EchoKind::Request, id), (GATEWAY_ADDRESS, 0)).expect("sent");
        }
        let mut answered = 0;
        while received_echo(&pinging, EchoKind::Reply, GATEWAY_ADDRESS).await {
            answered += 1;
        }
        assert_eq!((answered, World::tracked(&router)), (64, 64));

        // Nor do ARP requests in the name of others make neighbours: the host's own table has no more room than theirs.
        let announce = async |number: u8| {
            let source = Ipv4Addr::new(169, 254, 9, number);
            guest.sh(&format!("ip addr add {source}/32 dev lo; ip neigh flush dev eth0 nud all"));
            udp(&guest, source, 0).await.send_to(b"word", (GATEWAY_ADDRESS, 9)).expect("sent");
            tokio::time::sleep(Duration::from_millis(20)).await;
            router.sh("ip neigh show dev guest nud all").contains(&source.to_string())
        };
        assert!(!announce(1).await);
        router.sh("cd /proc/sys/net/ipv4/conf; echo 0 > all/rp_filter; echo 0 > guest/rp_filter");
        assert!(announce(2).await);
    });
}
