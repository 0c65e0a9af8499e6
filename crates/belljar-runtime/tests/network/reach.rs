//! Who reaches whom.

use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket};
use std::path::Path;

use belljar_core::id::SandboxId;
use belljar_runtime::network::{Egress, GATEWAY_ADDRESS, GUEST_ADDRESS, NetworkManager};
use futures::future::join_all;

use crate::world::{
    EchoKind, HOST, HOST_ON_LAN, INTERNET, Listener, NOT_PUBLIC, Netns, PATIENCE, PRIVATE, PUBLIC, arrives,
    assert_closed, create, echo, icmp, in_a_world, pings, received_echo, skipped, udp, uplink_addresses,
};

#[test]
fn the_internet_is_reached_and_sees_only_the_host() {
    in_a_world(async |world| {
        let manager = world.manager().await;
        let network = create(&manager).await;
        let guest = world.inner(&network);
        let listener = Listener::start(&world.internet).await;
        // One address because the configuration makes an exception for it, one because nothing speaks against it.
        for address in [INTERNET, PUBLIC] {
            let seen_as = guest.connect(address, listener.port).await.expect("reached");
            assert_eq!(seen_as, IpAddr::from(HOST));
        }
        let (from, at) = (udp(&guest, GUEST_ADDRESS, 0).await, udp(&world.internet, PUBLIC, 7000).await);
        assert!(arrives(&from, (PUBLIC, 7000), &at).await);
        assert!(pings(&guest, PUBLIC).await);
        // The host's way out has an MTU of 1400, and so has the guest's.
        assert!(guest.sh("ip link show eth0").contains("mtu 1400"));
    });
}

#[test]
fn without_egress_nothing_is_reached_and_the_server_still_gets_in() {
    in_a_world(async |world| {
        let manager = world.manager().await;
        let network = manager.create(&SandboxId::generate(), Egress::Nothing).await.expect("a network");
        let guest = world.inner(&network);
        let listener = Listener::start(&world.internet).await;
        for address in [INTERNET, PUBLIC] {
            assert_closed(&guest, address, listener.port).await;
        }
        assert!(!pings(&guest, PUBLIC).await);
        assert_closed(&guest, GATEWAY_ADDRESS, 53).await;
        assert_eq!(listener.visitors(), []);

        let inside = Listener::start(&guest).await;
        network.connect(inside.port, PATIENCE).await.expect("the server's way in");

        // A server started later closes it just the same.
        let id = network.sandbox_id().clone();
        drop(network);
        let network = manager.adopt(&id, Egress::Nothing).await.expect("adopted");
        assert_closed(&world.inner(&network), PUBLIC, listener.port).await;
    });
}

#[test]
fn the_host_is_closed_on_every_address() {
    in_a_world(async |world| {
        let manager = world.manager().await;
        let network = create(&manager).await;
        let guest = world.inner(&network);
        let listener = Listener::start(&world.host).await;
        // An address the host got after the sandbox; and one that an exception seems to open.
        world.host.sh("ip addr add 5.6.7.8/32 dev lo");
        let (uplink, _) = uplink_addresses(&world, network.uplink_interface());
        for address in [HOST, HOST_ON_LAN, uplink, "5.6.7.8".parse().expect("an address")] {
            assert_closed(&guest, address, listener.port).await;
        }
        // Loopback is the guest's own.
        let error = guest.connect(Ipv4Addr::LOCALHOST, listener.port).await.expect_err("nobody listens in the guest");
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
        assert_eq!(listener.visitors(), []);
        // The listener is there: others reach it.
        assert!(world.internet.connect(HOST, listener.port).await.is_ok());

        // Nor is there a way round by somebody's translation: a transparent proxy's, say.
        world.host.sh(&format!(
            "nft 'table ip proxy {{ chain prerouting {{ type nat hook prerouting priority dstnat
                 tcp dport 80 redirect to :{}
             }}; }}'",
            listener.port
        ));
        assert!(world.internet.connect(HOST, 80).await.is_ok());
        assert!(guest.connect(PUBLIC, 80).await.is_err());
        assert_eq!(listener.visitors().len(), 2);

        // Also if the router's filter failed, by the host's alone.
        world.router(&network).sh("nft flush ruleset");
        let router = world.router(&network);
        for address in [HOST, HOST_ON_LAN, uplink] {
            assert!(router.connect(address, listener.port).await.is_err(), "{address}");
        }
        assert_eq!(listener.visitors().len(), 2);
        assert!(router.connect(INTERNET, Listener::start(&world.internet).await.port).await.is_ok());
    });
}

#[test]
fn private_and_special_addresses_are_closed() {
    in_a_world(async |world| {
        let manager = world.manager().await;
        let network = create(&manager).await;
        let guest = world.inner(&network);
        let listener = Listener::start(&world.private).await;
        for address in NOT_PUBLIC {
            assert!(world.host.connect(address, listener.port).await.is_ok(), "{address} does not answer the host");
        }
        let before = listener.visitors();
        for address in NOT_PUBLIC {
            assert_closed(&guest, address, listener.port).await;
        }
        assert_eq!(listener.visitors(), before);

        // By the host's filter alone, and by the router's alone. Datagrams tell, as they need no way back.
        let reached = async |from: &UdpSocket, address: Ipv4Addr| {
            let netns = if address == PUBLIC { &world.internet } else { &world.private };
            arrives(from, (address, 7000), &udp(netns, address, 7000).await).await
        };
        let router_end = uplink_addresses(&world, network.uplink_interface()).1;
        world.router(&network).sh("nft flush ruleset");
        let from_router = udp(&world.router(&network), router_end, 0).await;
        let other = create(&manager).await;
        let from_guest = udp(&world.inner(&other), GUEST_ADDRESS, 0).await;
        assert_eq!(join_all(NOT_PUBLIC.map(|address| reached(&from_router, address))).await, [false; 6]);
        assert!(reached(&from_router, PUBLIC).await);
        world.host.sh("nft flush ruleset");
        assert_eq!(join_all(NOT_PUBLIC.map(|address| reached(&from_guest, address))).await, [false; 6]);
        assert!(reached(&from_guest, PUBLIC).await);
    });
}

#[test]
fn an_exception_opens_a_private_network_and_no_other() {
    in_a_world(async |world| {
        let mut config = world.config("test");
        config.allowed_exceptions.push("10.99.0.0/24".parse().expect("a network"));
        let manager = NetworkManager::start(config).await.expect("a manager");
        let guest = world.inner(&create(&manager).await);
        let listener = Listener::start(&world.private).await;
        let seen_as = guest.connect(PRIVATE, listener.port).await.expect("reached");
        assert_eq!(seen_as, IpAddr::from(HOST_ON_LAN));
        for address in NOT_PUBLIC.into_iter().filter(|address| *address != PRIVATE) {
            assert_closed(&guest, address, listener.port).await;
        }
        // The host's own address in the opened range stays closed.
        let on_host = Listener::start(&world.host).await;
        assert_closed(&guest, HOST_ON_LAN, on_host.port).await;
    });
}

#[test]
fn sandboxes_do_not_reach_each_other() {
    in_a_world(async |world| {
        // With all private addresses open, what keeps sandboxes apart must be more than the list.
        let mut config = world.config("test");
        config.allowed_exceptions.push("0.0.0.0/0".parse().expect("a network"));
        let manager = NetworkManager::start(config).await.expect("a manager");
        let (one, other) = (create(&manager).await, create(&manager).await);
        let guest = world.inner(&one);
        let in_other_guest = Listener::start(&world.inner(&other)).await;
        let in_other_router = Listener::start(&world.router(&other)).await;
        let (host_end, router_end) = uplink_addresses(&world, other.uplink_interface());
        for port in [in_other_guest.port, in_other_router.port] {
            for address in [host_end, router_end] {
                assert_closed(&guest, address, port).await;
            }
            for address in [GUEST_ADDRESS, GATEWAY_ADDRESS] {
                // These are the sandbox's own.
                assert!(guest.connect(address, port).await.is_err(), "{address}:{port}");
            }
        }
        // By the host's filter alone, and without the other's either.
        for network in [&one, &other] {
            world.router(network).sh("nft flush ruleset");
        }
        assert!(world.router(&one).connect(router_end, in_other_router.port).await.is_err());
        // A route over the other's uplink to its guest, too.
        let address_of_one = uplink_addresses(&world, one.uplink_interface()).1;
        world.host.sh(&format!("ip route add {GUEST_ADDRESS}/32 via {router_end}"));
        world.router(&one).sh("ip addr flush dev guest");
        let (from, at) =
            (udp(&world.router(&one), address_of_one, 0).await, udp(&world.inner(&other), GUEST_ADDRESS, 7000).await);
        assert!(!arrives(&from, (GUEST_ADDRESS, 7000), &at).await);
        assert_eq!((in_other_guest.visitors(), in_other_router.visitors()), (vec![], vec![]));
    });
}

#[test]
fn a_spoofed_source_is_dropped_by_the_router_and_by_the_host() {
    in_a_world(async |world| {
        let manager = world.manager().await;
        let (one, other) = (create(&manager).await, create(&manager).await);
        let at = udp(&world.internet, PUBLIC, 7000).await;
        let send =
            async |netns: &Netns, source: Ipv4Addr| arrives(&udp(netns, source, 0).await, (PUBLIC, 7000), &at).await;

        let guest = world.inner(&one);
        let stranger: Ipv4Addr = "8.7.6.5".parse().expect("an address");
        guest.sh(&format!("ip addr add 169.254.7.9/32 dev lo; ip addr add {stranger}/32 dev lo"));
        assert!(send(&guest, GUEST_ADDRESS).await);
        for _ in 0..2 {
            assert!(!send(&guest, Ipv4Addr::new(169, 254, 7, 9)).await);
            assert!(!send(&guest, stranger).await);
            // Once more without the kernel's own check, by the rules alone.
            world.router(&one).sh("cd /proc/sys/net/ipv4/conf; echo 0 > all/rp_filter; echo 0 > guest/rp_filter");
        }

        // Without its translation and filter, the router would let any source out.
        let router = world.router(&one);
        router.sh("nft flush ruleset");
        let own = uplink_addresses(&world, one.uplink_interface()).1;
        let others = uplink_addresses(&world, other.uplink_interface()).1;
        router.sh(&format!("ip addr add {others}/32 dev lo; ip addr add {stranger}/32 dev lo"));
        assert!(send(&router, own).await);
        assert!(!send(&router, others).await);
        assert!(!send(&router, stranger).await);
        assert!(!send(&router, GATEWAY_ADDRESS).await);
    });
}

#[test]
fn nobody_outside_reaches_a_sandbox() {
    in_a_world(async |world| {
        let manager = world.manager().await;
        let network = create(&manager).await;
        let (_, router_end) = uplink_addresses(&world, network.uplink_interface());
        let in_guest = Listener::start(&world.inner(&network)).await;
        let in_router = Listener::start(&world.router(&network)).await;
        // A neighbour who knows the way, as far as the host would show it.
        world.internet.sh(&format!("ip route add default via {HOST}"));
        world.host.sh(&format!("ip route add {GUEST_ADDRESS}/32 via {router_end}"));
        for netns in [&world.internet, &world.host] {
            for port in [in_guest.port, in_router.port] {
                assert!(netns.connect(router_end, port).await.is_err());
                assert!(netns.connect(GUEST_ADDRESS, port).await.is_err());
            }
        }
        assert_eq!((in_guest.visitors(), in_router.visitors()), (vec![], vec![]));
        // The server reaches it.
        assert!(network.connect(in_guest.port, PATIENCE).await.is_ok());

        // By the host's filter alone.
        let router = world.router(&network);
        router.sh("nft flush ruleset");
        let (from, at) = (udp(&world.internet, INTERNET, 0).await, udp(&router, router_end, 7000).await);
        assert!(!arrives(&from, (router_end, 7000), &at).await);
        world.host.sh("nft flush ruleset");
        assert!(arrives(&from, (router_end, 7000), &at).await);
    });
}

#[test]
fn ipv6_ends_at_loopback() {
    in_a_world(async |world| {
        if !Path::new("/proc/sys/net/ipv6").exists() {
            return skipped("the kernel has no IPv6");
        }
        let manager = world.manager().await;
        let network = create(&manager).await;
        let (guest, router) = (world.inner(&network), world.router(&network));
        let addresses = guest.sh("cat /proc/net/if_inet6");
        assert!(addresses.lines().all(|line| line.ends_with("lo")), "{addresses}");
        assert_eq!(router.sh("cat /proc/net/if_inet6"), "");
        // A guest that makes itself an address all the same talks to nobody: not to a router that had one, and, should
        // that one let it, not by way of a host that forwards IPv6. Neighbours are set, as nobody answers for them.
        let addressed = |netns: &Netns, interface: &str, address: &str, neighbour: (&str, &str)| {
            let (neighbour, link_address) = neighbour;
            netns.sh(&format!(
                "echo 0 > /proc/sys/net/ipv6/conf/all/disable_ipv6
                 echo 0 > /proc/sys/net/ipv6/conf/{interface}/disable_ipv6
                 ip addr add {address}/64 dev {interface} nodad
                 ip neigh add {neighbour} lladdr {link_address} dev {interface}"
            ));
        };
        let parsed = |address: &str| address.parse::<Ipv6Addr>().expect("an address");
        addressed(&guest, "eth0", "fd00::2", ("fd00::1", "02:62:6a:00:07:01"));
        addressed(&router, "guest", "fd00::1", ("fd00::2", "02:62:6a:00:07:02"));
        let (from, at) = (udp(&guest, parsed("fd00::2"), 0).await, udp(&router, parsed("fd00::1"), 53).await);
        assert!(!arrives(&from, ("fd00::1", 53), &at).await);
        router.sh("nft flush ruleset");
        assert!(arrives(&from, ("fd00::1", 53), &at).await);

        let link_address = |netns: &Netns| {
            netns.sh("ip -br link show eth0").split_whitespace().nth(2).expect("a link address").to_owned()
        };
        let (of_host, of_internet) = (link_address(&world.host), link_address(&world.internet));
        addressed(&router, "uplink", "fd01::2", ("fd01::1", "02:62:6a:01:07:01"));
        addressed(&world.host, network.uplink_interface(), "fd01::1", ("fd01::2", "02:62:6a:01:07:02"));
        addressed(&world.host, "eth0", "fd02::1", ("fd02::2", &of_internet));
        addressed(&world.internet, "eth0", "fd02::2", ("fd02::1", &of_host));
        world.host.sh("echo 1 > /proc/sys/net/ipv6/conf/all/forwarding");
        router.sh("ip route add fd02::/64 via fd01::1");
        let (from, at) =
            (udp(&router, parsed("fd01::2"), 0).await, udp(&world.internet, parsed("fd02::2"), 7000).await);
        assert!(!arrives(&from, ("fd02::2", 7000), &at).await);
        world.host.sh("nft flush ruleset");
        assert!(arrives(&from, ("fd02::2", 7000), &at).await);
    });
}

#[test]
fn nothing_leaves_untranslated() {
    in_a_world(async |world| {
        let manager = world.manager().await;
        let network = create(&manager).await;
        let (guest, router) = (world.inner(&network), world.router(&network));
        // An answer to a question that nobody asked: connection tracking makes nothing of it, so it is not translated.
        let stray = async || {
            let listening = icmp(&world.internet).await;
            let sender = icmp(&guest).await;
            sender.send_to(&echo(EchoKind::Reply, 7), (PUBLIC, 0)).expect("sent");
            received_echo(&listening, EchoKind::Reply, GUEST_ADDRESS).await
        };
        world.host.sh("nft flush ruleset");
        assert!(!stray().await);
        router.sh("nft flush ruleset");
        assert!(stray().await);
    });
}
