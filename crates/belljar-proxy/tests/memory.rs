//! Large bodies cost no memory. A program of its own, as it measures the whole process.

#![allow(clippy::unwrap_used, reason = "a test may panic")]
#![allow(dead_code, unreachable_pub, reason = "shared with the other tests")]

#[path = "proxy/support.rs"]
mod support;

use bytes::Bytes;
use futures::StreamExt;
use http_body_util::{BodyExt, StreamBody};
use hyper::Response;
use hyper::body::{Frame, Incoming};

use support::{AnyBody, Fixture, empty, full, request, request2, soon};

const CHUNK: &[u8] = &[7; 64 * 1024];
const CHUNKS: usize = 1024;
const TOTAL_BYTES: usize = CHUNKS * CHUNK.len();
/// Client, proxy, and server together, with their buffers of some hundred KiB per connection.
const MAX_GROWTH_KIB: usize = 16 * 1024;

fn large() -> AnyBody {
    StreamBody::new(futures::stream::iter(0..CHUNKS).map(|_| Ok(Frame::data(Bytes::from_static(CHUNK))))).boxed_unsync()
}

async fn length(mut body: Incoming) -> usize {
    let mut length = 0;
    while let Some(frame) = soon("the next frame", body.frame()).await {
        length += frame.unwrap().into_data().unwrap().len();
    }
    length
}

/// The most memory this process had resident since the peak was last forgotten.
fn peak_kib() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn bodies_of_64_mib_leave_memory_flat() {
    let fixture = Fixture::new().await;
    let sandbox = fixture.sandbox();
    let handler = |request: http::Request<Incoming>| async {
        if request.method() == "POST" {
            Response::new(full(length(request.into_body()).await.to_string()))
        } else {
            Response::new(large())
        }
    };
    sandbox.serve(8080, handler).await;
    let host = sandbox.host(8080);
    fixture.send(request("POST", &host, "/", empty())).await;

    // Makes the kernel forget the peak until now.
    std::fs::write("/proc/self/clear_refs", "5").unwrap();
    let before = peak_kib();
    for _ in 0..2 {
        let upload = fixture.send(request("POST", &host, "/", large())).await;
        assert_eq!(upload.into_body().collect().await.unwrap().to_bytes(), TOTAL_BYTES.to_string());
        let download = fixture.send(request("GET", &host, "/", empty())).await;
        assert_eq!(length(download.into_body()).await, TOTAL_BYTES);
        let mut http2 = fixture.http2().await;
        let upload = http2.send(request2("POST", &host, "/", large())).await.unwrap();
        assert_eq!(upload.into_body().collect().await.unwrap().to_bytes(), TOTAL_BYTES.to_string());
        let download = http2.send(request2("GET", &host, "/", empty())).await.unwrap();
        assert_eq!(length(download.into_body()).await, TOTAL_BYTES);
    }
    let growth = peak_kib() - before;
    println!("peak memory grew by {growth} KiB over {} MiB", 8 * TOTAL_BYTES / 1024 / 1024);
    assert!(growth < MAX_GROWTH_KIB, "memory grew by {growth} KiB");
}
