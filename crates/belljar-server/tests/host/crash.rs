//! The server is killed without warning, and starts again: nothing acknowledged is lost, nothing is leaked.

use std::time::{Duration, Instant};

use rand::Rng;

use crate::server::{Server, base, inside, shell};

const MOMENTS: u32 = 10;

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs root and the base template"]
async fn a_sandbox_outlives_a_crash_with_its_processes_files_and_deadline() {
    let mut server = Server::start_with(&[], &[]);
    let client = server.client();
    let sandbox = client.create(&base()).await.unwrap();
    let before = client.get(&sandbox.sandbox_id).await.unwrap();
    let way_in = inside(&client, &sandbox);
    shell(&way_in, None, "echo kept > file; nohup bash -c 'sleep 1000' >/dev/null 2>&1 & echo $! > pid").await.unwrap();

    server.crash();
    server.start_again();

    let client = server.client();
    assert_eq!(client.get(&sandbox.sandbox_id).await.unwrap(), before, "the record, deadline and token are the same");
    let way_in = inside(&client, &sandbox);
    let (exit, output) = shell(&way_in, None, "cat file && kill -0 $(cat pid)").await.unwrap();
    assert_eq!((exit.code, output.as_str()), (0, "kept\n"));
    client.kill(&sandbox.sandbox_id).await.unwrap();
    server.assert_nothing_left();
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs root and the base template"]
async fn a_deadline_that_passes_while_the_server_is_down_is_kept_at_its_start() {
    let mut server = Server::start_with(&[], &[]);
    let client = server.client();
    let request = belljar_protocol::api::NewSandbox { timeout: Some(3), ..base() };
    let sandbox = client.create(&request).await.unwrap();
    server.crash();
    assert_ne!(server.census(), crate::census::Census::default(), "the sandbox outlives the server");
    tokio::time::sleep(Duration::from_secs(4)).await;
    server.start_again();
    assert!(server.client().get(&sandbox.sandbox_id).await.is_err());
    server.assert_nothing_left();
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs root and the base template"]
async fn an_ordinary_stop_leaves_sandboxes_running() {
    let mut server = Server::start_with(&[], &[]);
    let client = server.client();
    let sandbox = client.create(&base()).await.unwrap();
    server.stop();
    server.start_again();
    let (exit, _) = shell(&inside(&server.client(), &sandbox), None, "true").await.unwrap();
    assert_eq!(exit.code, 0);
}

/// How long a create and a kill take on this machine, so that the crashes fall within them.
async fn durations(server: &Server) -> (Duration, Duration) {
    let client = server.client();
    let (mut create, mut kill) = (Duration::MAX, Duration::MAX);
    for _ in 0..3 {
        let started = Instant::now();
        let sandbox = client.create(&base()).await.unwrap();
        create = create.min(started.elapsed());
        let started = Instant::now();
        client.kill(&sandbox.sandbox_id).await.unwrap();
        kill = kill.min(started.elapsed());
    }
    (create, kill)
}

/// Kills the server at moments spread over a create and over a kill. Whatever was acknowledged must be there
/// afterwards, whatever was killed must be gone, and nothing may be left of anything else.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs root and the base template"]
async fn crashes_at_moments_of_create_and_kill_lose_and_leak_nothing() {
    let seed: u64 = std::env::var("BELLJAR_TEST_SEED").ok().map_or_else(rand::random, |text| text.parse().unwrap());
    println!("BELLJAR_TEST_SEED={seed}");
    let mut random = <rand::rngs::StdRng as rand::SeedableRng>::seed_from_u64(seed);
    let mut server = Server::start_with(&[], &[]);
    let (mut during_create, mut during_kill) = (0, 0);
    let (create_takes, kill_takes) = durations(&server).await;

    for moment in 0..MOMENTS {
        // The kept sandbox is acknowledged before; it must outlive whatever comes.
        let kept = server.client().create(&base()).await.unwrap();
        let doomed = server.client().create(&base()).await.unwrap();

        let client = server.client();
        let is_create = moment % 2 == 0;
        let doomed_id = doomed.sandbox_id.clone();
        let operation = tokio::spawn(async move {
            if is_create {
                client.create(&base()).await.map(|sandbox| Some(sandbox.sandbox_id))
            } else {
                client.kill(&doomed_id).await.map(|()| None)
            }
        });
        let takes = if is_create { create_takes } else { kill_takes };
        tokio::time::sleep(takes.mul_f64(random.random_range(0.0..0.9))).await;
        server.crash();
        let outcome = operation.await.unwrap();
        match (&outcome, is_create) {
            (Err(_), true) => during_create += 1,
            (Err(_), false) => during_kill += 1,
            (Ok(_), _) => {}
        }
        server.start_again();

        let client = server.client();
        let (exit, _) = shell(&inside(&client, &kept), None, "true").await.unwrap();
        assert_eq!(exit.code, 0, "what was acknowledged before the crash is there");
        match &outcome {
            Ok(Some(created)) => assert!(client.get(created).await.is_ok(), "an acknowledged create is kept"),
            Ok(None) => assert!(client.get(&doomed.sandbox_id).await.is_err(), "an acknowledged kill is kept"),
            Err(_) => {}
        }
        for sandbox in client.list().await.unwrap() {
            // Whatever is listed is usable, or the listing lies.
            let detail = client.get(&sandbox.sandbox_id).await.unwrap();
            let way_in = client.sandbox(&sandbox.sandbox_id, detail.envd_access_token.as_deref());
            assert_eq!(shell(&way_in, None, "true").await.unwrap().0.code, 0);
            client.kill(&sandbox.sandbox_id).await.unwrap();
        }
        server.assert_nothing_left();
    }
    println!("{MOMENTS} crashes: {during_create} during a create, {during_kill} during a kill");
    assert!(during_create > 0 && during_kill > 0, "the crashes missed what they were to hit");
}
