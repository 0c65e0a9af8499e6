//! The limits that a sandbox was promised hold, and what is inside sees them.

use belljar_protocol::client::{Client, SandboxClient};

use crate::server::{Server, base, inside, shell};

async fn sandbox(client: &Client) -> SandboxClient {
    inside(client, &client.create(&base()).await.unwrap())
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs root and the base template"]
async fn the_guest_sees_its_own_size() {
    let server = Server::start();
    let sandbox = sandbox(&server.client()).await;
    let (_, cpus) = shell(&sandbox, None, "nproc").await.unwrap();
    assert_eq!(cpus.trim(), "2");
    let (_, memory) = shell(&sandbox, None, "free -m | awk '/^Mem:/ {print $2}'").await.unwrap();
    let memory: u32 = memory.trim().parse().unwrap();
    assert!((1000..=1024).contains(&memory), "free says {memory} MiB");
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs root and the base template"]
async fn a_fork_bomb_of_root_hurts_nobody_else() {
    let server = Server::start();
    let client = server.client();
    let (bomber, neighbour) = (sandbox(&client).await, sandbox(&client).await);
    // It ends itself, so that its sandbox can be asked afterwards.
    let bomb = "ulimit -u unlimited 2>/dev/null; n=0; while [ $n -lt 3000 ]; do sleep 30 & n=$((n+1)); done 2>/dev/null; jobs -p | wc -l";
    let (_, started) = shell(&bomber, Some("root"), bomb).await.unwrap_or_else(|error| {
        println!("the bomb took its own sandbox down: {error}");
        (belljar_protocol::client::Exit { code: 0, status: String::new() }, "0".into())
    });
    let started: u32 = started.trim().parse().unwrap_or(0);
    assert!(started <= 1024, "{started} processes were started");
    let (exit, _) = shell(&neighbour, None, "true").await.unwrap();
    assert_eq!(exit.code, 0);
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs root and the base template"]
async fn a_memory_hog_ends_alone() {
    let server = Server::start();
    let client = server.client();
    let (hog, neighbour) = (sandbox(&client).await, sandbox(&client).await);
    let _ = shell(&hog, None, "python3 -c \"x = []\nwhile True: x.append(bytearray(16 << 20))\"").await;
    let (exit, _) = shell(&neighbour, None, "true").await.unwrap();
    assert_eq!(exit.code, 0);
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs root and the base template"]
async fn a_full_disk_is_an_error_inside_and_nothing_outside() {
    let server = Server::start();
    let client = server.client();
    let created = client.create(&base()).await.unwrap();
    let disk_mib = client.get(&created.sandbox_id).await.unwrap().listed.disk_size_mb;
    let sandbox = inside(&client, &created);
    let fill = format!("dd if=/dev/zero of=big bs=1M count={} 2>&1 | grep -c 'No space left'", disk_mib + 64);
    let (_, refused) = shell(&sandbox, None, &fill).await.unwrap();
    assert_eq!(refused, "1\n", "{disk_mib} MiB were promised, and not one more fits");
    let (_, after) = shell(&sandbox, None, "rm big && echo small > small && cat small").await.unwrap();
    assert_eq!(after, "small\n");
}
