//! Nothing is left of sandboxes that are gone.

use crate::server::{Server, base, inside, shell};

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs root and the base template"]
async fn two_hundred_sandboxes_created_and_killed_leave_nothing() {
    let server = Server::start();
    let client = server.client();
    for number in 0..200 {
        let sandbox = client.create(&base()).await.unwrap_or_else(|error| panic!("create {number}: {error}"));
        client.kill(&sandbox.sandbox_id).await.unwrap();
    }
    server.assert_nothing_left();
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs root and the base template"]
async fn twenty_sandboxes_run_commands_side_by_side() {
    let server = Server::start();
    let client = server.client();
    let sandboxes = futures::future::join_all((0..20).map(|_| async { client.create(&base()).await.unwrap() })).await;
    // Each command is still running when the last one has begun: it waits for a file that is written after all began.
    let commands = sandboxes.iter().enumerate().map(|(number, sandbox)| {
        let sandbox = inside(&client, sandbox);
        tokio::spawn(async move {
            let line = format!("touch began; until [ -e go ]; do sleep 0.2; done; echo {number}");
            shell(&sandbox, None, &line).await.unwrap()
        })
    });
    let commands: Vec<_> = commands.collect();
    for sandbox in &sandboxes {
        let sandbox = inside(&client, sandbox);
        shell(&sandbox, None, "until [ -e began ]; do sleep 0.1; done").await.unwrap();
    }
    assert!(commands.iter().all(|command| !command.is_finished()), "all twenty are running at this moment");
    for sandbox in &sandboxes {
        inside(&client, sandbox).write_file("go", bytes::Bytes::new()).await.unwrap();
    }
    for (number, command) in commands.into_iter().enumerate() {
        let (exit, output) = command.await.unwrap();
        assert_eq!((exit.code, output.trim()), (0, number.to_string().as_str()));
    }
    futures::future::join_all(sandboxes.iter().map(|sandbox| client.kill(&sandbox.sandbox_id))).await;
    server.assert_nothing_left();
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs root and the base template"]
async fn a_deadline_ends_a_sandbox_and_frees_everything() {
    let server = Server::start();
    let client = server.client();
    let request = belljar_protocol::api::NewSandbox { timeout: Some(2), ..base() };
    let sandbox = client.create(&request).await.unwrap();
    while client.get(&sandbox.sandbox_id).await.is_ok() {
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
    server.assert_nothing_left();
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs root and the base template"]
async fn a_server_told_to_kill_on_exit_leaves_nothing() {
    let mut server = Server::start();
    let client = server.client();
    for _ in 0..3 {
        client.create(&base()).await.unwrap();
    }
    server.stop();
    server.assert_nothing_left();
}
