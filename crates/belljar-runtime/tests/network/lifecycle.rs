//! What is there after a create, a restart, an accident, a destroy.

use std::path::Path;
use std::time::Duration;

use belljar_core::id::SandboxId;
use belljar_runtime::network::{Egress, NetworkConfig, NetworkError, NetworkManager};
use futures::future::join_all;

use crate::world::{
    HOST, INTERNET, Listener, Netns, PATIENCE, World, answer_queries, assert_closed, create, in_a_world, is_answered,
    uplink_addresses,
};

#[test]
fn fifty_networks_come_and_go_without_a_trace() {
    in_a_world(async |world| {
        let manager = world.manager().await;
        for _ in 0..50 {
            let network = create(&manager).await;
            let sandbox = network.sandbox_id().clone();
            assert_eq!(manager.list_owned().await.expect("a list"), std::slice::from_ref(&sandbox));
            assert!(world.traces().len() >= 3, "{:?}", world.traces());
            manager.destroy(&sandbox).await.expect("destroyed");
            assert_eq!(world.traces(), Vec::<String>::new());
        }
        manager.uninstall().await.expect("uninstalled");
        assert_eq!(world.host.sh("nft list ruleset"), "");
    });
}

#[test]
fn many_at_once_share_nothing() {
    in_a_world(async |world| {
        let manager = world.manager().await;
        let networks = join_all((0..20).map(|_| create(&manager))).await;
        let mut uplinks: Vec<_> = networks.iter().map(|network| network.uplink_interface().to_owned()).collect();
        uplinks.sort();
        uplinks.dedup();
        assert_eq!(uplinks.len(), 20);
        let listener = Listener::start(&world.internet).await;
        for network in &networks {
            assert_eq!(world.inner(network).connect(INTERNET, listener.port).await.expect("reached"), HOST);
        }
        join_all(networks.iter().map(|network| manager.destroy(network.sandbox_id()))).await;
        assert_eq!(world.traces(), Vec::<String>::new());
    });
}

#[test]
fn a_restarted_server_finds_its_networks() {
    in_a_world(async |world| {
        let manager = world.manager().await;
        let network = create(&manager).await;
        let sandbox = network.sandbox_id().clone();
        assert!(matches!(manager.adopt(&sandbox, Egress::Internet).await, Err(NetworkError::AlreadyExists { .. })));
        assert!(matches!(manager.create(&sandbox, Egress::Internet).await, Err(NetworkError::AlreadyExists { .. })));
        drop((network, manager));

        answer_queries().await;
        let manager = world.manager().await;
        assert_eq!(manager.list_owned().await.expect("a list"), std::slice::from_ref(&sandbox));
        assert!(matches!(manager.create(&sandbox, Egress::Internet).await, Err(NetworkError::AlreadyExists { .. })));
        let network = manager.adopt(&sandbox, Egress::Internet).await.expect("adopted");
        let guest = world.inner(&network);
        let in_guest = Listener::start(&guest).await;
        assert!(network.connect(in_guest.port, PATIENCE).await.is_ok());
        let listener = Listener::start(&world.internet).await;
        assert!(guest.connect(INTERNET, listener.port).await.is_ok());
        assert!(is_answered(&guest).await);
        // Its slot is not given to another.
        assert_ne!(create(&manager).await.uplink_interface(), network.uplink_interface());
    });
}

/// Given the path of the inner namespace and the name of the uplink.
type Damage = fn(&World, &Path, &str);

#[test]
fn whatever_half_exists_is_found_and_removed() {
    in_a_world(async |world| {
        let damages: [(&str, Damage); 6] = [
            ("a router without a mount", |_, inner, _| {
                nix::mount::umount2(&inner.with_extension("router"), nix::mount::MntFlags::MNT_DETACH).expect("umount");
            }),
            ("only an uplink", |_, inner, _| {
                for path in [inner.to_owned(), inner.with_extension("router")] {
                    nix::mount::umount2(&path, nix::mount::MntFlags::MNT_DETACH).expect("umount");
                    std::fs::remove_file(path).expect("removed");
                }
            }),
            ("no uplink", |world, _, uplink| drop(world.host.sh(&format!("ip link del {uplink}")))),
            ("no label", |world, _, uplink| drop(world.host.sh(&format!("ip link set {uplink} alias ''")))),
            ("no inner namespace", |_, inner, _| {
                nix::mount::umount2(inner, nix::mount::MntFlags::MNT_DETACH).expect("umount");
                std::fs::remove_file(inner).expect("removed");
            }),
            ("no guest interface", |_, inner, _| drop(Netns::open(inner).sh("ip link del eth0"))),
        ];
        for (damage, inflict) in damages {
            let manager = world.manager().await;
            let network = create(&manager).await;
            let sandbox = network.sandbox_id().clone();
            // Holds the namespaces, as an engine that is still dying would.
            let pins = (world.inner(&network), world.router(&network));
            let (inner, uplink) = (network.inner_netns_path().to_owned(), network.uplink_interface().to_owned());
            drop((network, manager));
            inflict(&world, &inner, &uplink);

            let manager = world.manager().await;
            assert_eq!(manager.list_owned().await.expect("a list"), std::slice::from_ref(&sandbox), "{damage}");
            let adopted = manager.adopt(&sandbox, Egress::Internet).await;
            assert!(matches!(adopted, Err(NetworkError::Incomplete { .. })), "{damage}: {adopted:?}");
            manager.destroy(&sandbox).await.expect(damage);
            assert_eq!(world.traces(), Vec::<String>::new(), "{damage}");
            manager.destroy(&sandbox).await.expect("destroying twice");
            drop(pins);
        }
    });
}

#[test]
fn a_create_that_is_cancelled_can_be_destroyed() {
    in_a_world(async |world| {
        let manager = world.manager().await;
        for micros in (0..6000).step_by(400) {
            let sandbox = SandboxId::generate();
            let limit = Duration::from_micros(micros);
            let _ = tokio::time::timeout(limit, manager.create(&sandbox, Egress::Internet)).await;
            manager.destroy(&sandbox).await.expect("destroyed");
            assert_eq!(world.traces(), Vec::<String>::new(), "cancelled after {limit:?}");
        }
    });
}

#[test]
fn a_create_that_fails_leaves_nothing() {
    in_a_world(async |world| {
        let manager = world.manager().await;
        // A file in the way of the second namespace.
        let sandbox = SandboxId::generate();
        let in_the_way = world.directory.path().join(format!("test/{sandbox}.router"));
        std::fs::write(&in_the_way, "").expect("a file");
        assert!(manager.create(&sandbox, Egress::Internet).await.is_err());
        assert_eq!(world.traces(), Vec::<String>::new());
        assert!(manager.create(&sandbox, Egress::Internet).await.is_ok());
    });
}

#[test]
fn instances_share_a_pool_until_it_is_used_up() {
    in_a_world(async |world| {
        let config = |instance| NetworkConfig {
            uplink_pool: "10.214.0.0/29".parse().expect("a network"),
            ..world.config(instance)
        };
        let first = NetworkManager::start(config("first")).await.expect("a manager");
        let second = NetworkManager::start(config("second")).await.expect("a manager");
        let networks = [create(&first).await, create(&second).await, create(&first).await, create(&second).await];
        let mut addresses: Vec<_> =
            networks.iter().map(|network| uplink_addresses(&world, network.uplink_interface()).0).collect();
        addresses.sort();
        addresses.dedup();
        assert_eq!(addresses.len(), 4);
        let one_more = first.create(&SandboxId::generate(), Egress::Internet).await;
        assert!(matches!(one_more, Err(NetworkError::PoolExhausted { .. })), "{one_more:?}");
        let listener = Listener::start(&world.internet).await;
        for network in &networks {
            assert!(world.inner(network).connect(INTERNET, listener.port).await.is_ok());
        }
        // They are as closed to each other as those of one instance.
        let in_router = Listener::start(&world.router(&networks[1])).await;
        let router_end = uplink_addresses(&world, networks[1].uplink_interface()).1;
        assert_closed(&world.inner(&networks[0]), router_end, in_router.port).await;
    });
}
