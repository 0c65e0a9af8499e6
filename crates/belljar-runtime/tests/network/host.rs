//! What belljar does to a host, and finds in its way there.

use belljar_runtime::host::Status;
use belljar_runtime::network::{NetworkConfig, NetworkError, NetworkManager};

use crate::world::{HOST, INTERNET, Listener, PRIVATE, PUBLIC, arrives, assert_closed, create, in_a_world, udp};

#[test]
fn the_host_does_not_become_a_router() {
    in_a_world(async |world| {
        let manager = world.manager().await;
        let _network = create(&manager).await;
        let setting = |name: &str| world.host.sh(&format!("cat /proc/sys/net/ipv4/{name}")).trim().to_owned();
        assert_eq!((setting("conf/eth0/forwarding"), setting("conf/lan0/forwarding")), ("1".into(), "0".into()));
        assert_eq!(setting("ip_forward"), "0");
        world.internet.sh(&format!("ip route add 10.99.0.0/24 via {HOST}"));
        let (from, at) = (udp(&world.internet, INTERNET, 0).await, udp(&world.private, PRIVATE, 7000).await);
        assert!(!arrives(&from, (PRIVATE, 7000), &at).await);
        // It is the guard that does it: without, the host would pass it on.
        world.host.sh("nft delete table inet belljar-host");
        assert!(arrives(&from, (PRIVATE, 7000), &at).await);
    });
}

#[test]
fn a_host_that_is_a_router_stays_one() {
    in_a_world(async |world| {
        let manager = world.manager().await;
        assert!(world.host.sh("nft list tables").contains("belljar-host"));
        // Somebody, Docker for one, makes it a router after all.
        world.host.sh("echo 1 > /proc/sys/net/ipv4/ip_forward");
        manager.reconcile().await.expect("reconciled");
        world.internet.sh(&format!("ip route add 10.99.0.0/24 via {HOST}"));
        let (from, at) = (udp(&world.internet, INTERNET, 0).await, udp(&world.private, PRIVATE, 7000).await);
        assert!(arrives(&from, (PRIVATE, 7000), &at).await);
        manager.uninstall().await.expect("uninstalled");
        assert_eq!(world.host.sh("cat /proc/sys/net/ipv4/conf/eth0/forwarding").trim(), "1");
    });
}

#[test]
fn uninstalling_leaves_the_host_as_it_was() {
    in_a_world(async |world| {
        let state = || {
            let settings = "sysctl -a 2>/dev/null | grep -E '^net.ipv4.(ip_forward |conf)'";
            world.host.sh(&format!("ip link; ip -4 addr; ip -4 route show table all; nft list ruleset; {settings}"))
        };
        let before = state();
        let first = world.manager().await;
        let second = NetworkManager::start(world.config("second")).await.expect("a manager");
        let network = create(&first).await;
        assert_ne!(state(), before);
        first.uninstall().await.expect("uninstalled");
        // The second instance goes on.
        let listener = Listener::start(&world.internet).await;
        let remaining = create(&second).await;
        assert!(world.inner(&remaining).connect(INTERNET, listener.port).await.is_ok());
        second.uninstall().await.expect("uninstalled");
        assert_eq!(state(), before);
        drop((network, remaining));
    });
}

#[test]
fn reconciling_mends_the_host() {
    in_a_world(async |world| {
        let manager = world.manager().await;
        let network = create(&manager).await;
        let guest = world.inner(&network);
        let listener = Listener::start(&world.internet).await;
        // Switching the whole host on and off takes the interfaces along, uplinks included.
        world.host.sh("nft flush ruleset; cd /proc/sys/net/ipv4; echo 1 > ip_forward; echo 0 > ip_forward");
        assert!(guest.connect(INTERNET, listener.port).await.is_err());
        manager.reconcile().await.expect("reconciled");
        assert!(guest.connect(INTERNET, listener.port).await.is_ok());
        let in_host = Listener::start(&world.host).await;
        assert_closed(&guest, HOST, in_host.port).await;
    });
}

#[test]
fn a_pool_the_host_lives_in_is_refused() {
    in_a_world(async |world| {
        let config = NetworkConfig { uplink_pool: "10.99.0.0/16".parse().expect("a network"), ..world.config("test") };
        let refused = NetworkManager::start(config.clone()).await;
        assert!(matches!(refused, Err(NetworkError::PoolOverlapsHost { .. })), "{refused:?}");
        assert_eq!(world.host.sh("nft list ruleset"), "");
        let findings = NetworkManager::check_host(&config).await;
        assert!(
            findings.iter().any(|finding| finding.status != Status::Met && finding.what.contains("lan0")),
            "{findings:?}"
        );
    });
}

#[test]
fn a_host_without_a_way_out_is_found() {
    in_a_world(async |world| {
        world.host.sh("ip route del default");
        let findings = NetworkManager::check_host(&world.config("test")).await;
        let bad: Vec<_> = findings.iter().filter(|finding| finding.status != Status::Met).collect();
        assert_eq!(bad.len(), 1, "{findings:?}");
        assert!(bad[0].what.contains("default route"), "{bad:?}");
    });
}

#[test]
fn a_firewall_in_the_way_is_found_and_the_remedy_mends_it() {
    in_a_world(async |world| {
        let config = world.config("test");
        let all_good = NetworkManager::check_host(&config).await;
        assert!(all_good.iter().all(|finding| finding.status == Status::Met), "{all_good:?}");
        assert_eq!(world.host.sh("nft list ruleset"), "", "a check must change nothing");

        let guest_reaches = async |manager: &NetworkManager| {
            let listener = Listener::start(&world.internet).await;
            let network = create(manager).await;
            let reached = world.inner(&network).connect(PUBLIC, listener.port).await.is_ok();
            manager.destroy(network.sandbox_id()).await.expect("destroyed");
            reached
        };
        let manager = world.manager().await;
        assert!(guest_reaches(&manager).await);
        // As Docker leaves it, with its chain for others' rules.
        world.host.sh("nft -f - <<END
             table ip filter {
                 chain DOCKER-USER { }
                 chain FORWARD { type filter hook forward priority filter; policy drop; jump DOCKER-USER; }
             }
END");
        assert!(!guest_reaches(&manager).await);
        let findings = NetworkManager::check_host(&config).await;
        let bad: Vec<_> = findings.iter().filter(|finding| finding.status != Status::Met).collect();
        assert_eq!(bad.len(), 1, "{findings:?}");
        world.host.sh(bad[0].remedy.as_deref().expect("a remedy"));
        assert!(guest_reaches(&manager).await);
        let findings = NetworkManager::check_host(&config).await;
        assert!(findings.iter().all(|finding| finding.status == Status::Met), "{findings:?}");
    });
}
