//! Uploads and downloads, as the SDKs make them.

mod support;

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

use async_compression::tokio::write::{GzipDecoder, GzipEncoder};
use bytes::Bytes;
use http::{Response, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use serde_json::{Value, json};
use support::{Agent, eventually, read_json};
use tokio::io::AsyncWriteExt;

const OCTET_STREAM: &str = "application/octet-stream";

/// Percent-encodes what a query can't hold.
fn query(path: &str) -> String {
    path.bytes()
        .map(|byte| match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'/' | b'.' | b'-' | b'_' => char::from(byte).to_string(),
            other => format!("%{other:02X}"),
        })
        .collect()
}

async fn upload(agent: &Agent, path: &str, headers: &[(&str, &str)], body: impl Into<Bytes>) -> (StatusCode, Value) {
    let mut request = agent.request("POST", &format!("/files?path={}", query(path)));
    if !headers.iter().any(|(name, _)| *name == "content-type") {
        request = request.header("content-type", OCTET_STREAM);
    }
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    read_json(agent.send(request.body(Full::new(body.into())).expect("valid")).await).await
}

async fn download(agent: &Agent, path: &str, headers: &[(&str, &str)]) -> Response<Incoming> {
    let mut request = agent.request("GET", &format!("/files?path={}", query(path)));
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    agent.send(request.body(Full::default()).expect("valid")).await
}

async fn bytes(response: Response<Incoming>) -> Bytes {
    response.into_body().collect().await.expect("a whole body").to_bytes()
}

fn names(directory: &std::path::Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(directory)
        .expect("readable")
        .map(|entry| entry.expect("an entry").file_name().into_string().expect("text"))
        .collect();
    names.sort();
    names
}

#[tokio::test]
async fn a_file_comes_back_as_it_was_sent() {
    let Some(agent) = Agent::start().await else { return };
    let path = agent.text_path("deep/er/ñ \"x\".bin");
    let content: Vec<u8> = (0..3_000_000_u32).flat_map(u32::to_le_bytes).collect();
    let (status, answer) = upload(&agent, &path, &[], content.clone()).await;
    assert_eq!(status, StatusCode::OK);
    assert_eq!(answer, json!([{"path": path, "name": "ñ \"x\".bin", "type": "file"}]));

    let response = download(&agent, &path, &[("accept-encoding", "gzip, deflate")]).await;
    assert_eq!(response.status(), StatusCode::OK);
    assert_eq!(response.headers()["content-type"], OCTET_STREAM);
    assert_eq!(response.headers()["content-length"], content.len().to_string().as_str());
    assert!(response.headers().get("content-encoding").is_none());
    assert!(bytes(response).await == content);
}

#[tokio::test]
async fn empty_files_and_files_without_a_size_can_be_read() {
    let Some(agent) = Agent::start().await else { return };
    let path = agent.text_path("empty");
    assert_eq!(upload(&agent, &path, &[], "").await.0, StatusCode::OK);
    let response = download(&agent, &path, &[]).await;
    assert_eq!(response.headers()["content-length"], "0");
    assert!(bytes(response).await.is_empty());
    assert!(bytes(download(&agent, "/proc/version", &[]).await).await.starts_with(b"Linux version"));
}

#[tokio::test]
async fn transfers_can_be_compressed() {
    let Some(agent) = Agent::start().await else { return };
    let path = agent.text_path("file");
    let content = "compressible ".repeat(100_000);
    let mut encoder = GzipEncoder::new(Vec::new());
    encoder.write_all(content.as_bytes()).await.expect("compressed");
    encoder.shutdown().await.expect("compressed");
    let sent = encoder.into_inner();
    let (status, _) = upload(&agent, &path, &[("content-encoding", "gzip")], sent.clone()).await;
    assert_eq!(status, StatusCode::OK);
    assert!(fs::read_to_string(&path).expect("readable") == content);

    let response = download(&agent, &path, &[("accept-encoding", "gzip")]).await;
    assert_eq!(response.headers()["content-encoding"], "gzip");
    let received = bytes(response).await;
    assert!(received.len() < content.len() / 10);
    let mut decoder = GzipDecoder::new(Vec::new());
    decoder.write_all(&received).await.expect("decompressed");
    decoder.shutdown().await.expect("decompressed");
    assert!(decoder.into_inner() == content.as_bytes());

    let (status, _) = upload(&agent, &path, &[("content-encoding", "br")], "x").await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
    fs::write(&path, "kept").expect("written");
    let (status, _) = upload(&agent, &path, &[("content-encoding", "gzip")], sent[..sent.len() / 2].to_vec()).await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
    assert_eq!(fs::read_to_string(&path).expect("readable"), "kept", "half a file does not replace a whole one");
    let refused = download(&agent, &path, &[("accept-encoding", "identity;q=0")]).await;
    assert_eq!(refused.status(), StatusCode::NOT_ACCEPTABLE);
}

fn form(files: &[(&str, &str)]) -> (String, String) {
    let boundary = "b0undary";
    let mut body = String::new();
    for (name, content) in files {
        body.push_str(&format!(
            "--{boundary}\r\nContent-Disposition: form-data; name=\"file\"; filename=\"{name}\"\r\n\
             Content-Type: {OCTET_STREAM}\r\n\r\n{content}\r\n"
        ));
    }
    body.push_str(&format!("--{boundary}--\r\n"));
    (format!("multipart/form-data; boundary={boundary}"), body)
}

async fn upload_form(agent: &Agent, query: &str, files: &[(&str, &str)]) -> (StatusCode, Value) {
    let (content_type, body) = form(files);
    let request = agent.request("POST", &format!("/files{query}")).header("content-type", content_type);
    read_json(agent.send(request.body(Full::from(body)).expect("valid")).await).await
}

#[tokio::test]
async fn a_form_brings_many_files() {
    let Some(agent) = Agent::start().await else { return };
    let (one, two) = (agent.text_path("one.txt"), agent.text_path("sub/two.txt"));
    let (status, answer) = upload_form(&agent, "", &[(&one, "1"), (&two, "22")]).await;
    assert_eq!(status, StatusCode::OK);
    assert_eq!(answer[0]["path"], one);
    assert_eq!(answer[1]["name"], "two.txt");
    assert_eq!(fs::read_to_string(&two).expect("readable"), "22");

    // With a path in the query the names in the form don't matter.
    let path = agent.text_path("named");
    let (_, answer) = upload_form(&agent, &format!("?path={path}"), &[("whatever", "x")]).await;
    assert_eq!(answer[0]["path"], path);

    let (status, error) = upload_form(&agent, "", &[(&one, "first"), (&one, "second")]).await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
    assert!(error["message"].as_str().is_some_and(|text| text.contains("same path")), "{error}");
    assert_eq!(fs::read_to_string(&one).expect("readable"), "first");
}

#[tokio::test]
async fn uploads_belong_to_their_user() {
    let Some(agent) = Agent::start().await else { return };
    let path = agent.text_path("new/dir/file");
    let request = agent.request("POST", &format!("/files?username=nobody&path={path}"));
    let request = request.header("content-type", OCTET_STREAM).body(Full::from("x")).expect("valid");
    assert_eq!(agent.send(request).await.status(), StatusCode::OK);
    for name in ["new", "new/dir", "new/dir/file"] {
        let metadata = fs::metadata(agent.path(name)).expect("exists");
        assert_eq!((metadata.uid(), metadata.gid()), (65534, 65534), "{name}");
    }
    assert_eq!(fs::metadata(&path).expect("exists").mode() & 0o777, 0o644);

    let ghost = agent.get("/files?username=ghost&path=/etc/passwd").await;
    let (status, error) = read_json(ghost).await;
    assert_eq!(status, StatusCode::UNAUTHORIZED);
    assert_eq!(error, json!({"code": 401, "message": "error looking up user 'ghost': user: unknown user ghost"}));
}

#[tokio::test]
async fn replacing_a_file_keeps_what_it_is() {
    let Some(agent) = Agent::start().await else { return };
    let (real, link) = (agent.path("run.sh"), agent.path("link"));
    fs::write(&real, "old").expect("written");
    fs::set_permissions(&real, fs::Permissions::from_mode(0o755)).expect("changed");
    symlink("run.sh", &link).expect("linked");
    let (_, answer) = upload(&agent, &agent.text_path("link"), &[], "new").await;
    assert_eq!(answer[0]["path"], agent.text_path("link"));
    assert_eq!(fs::read_to_string(&real).expect("readable"), "new");
    assert_eq!(fs::metadata(&real).expect("exists").mode() & 0o777, 0o755);
    assert!(fs::symlink_metadata(&link).expect("exists").is_symlink());
    assert_eq!(names(&agent.path("")), ["link", "run.sh"]);
}

#[tokio::test]
async fn metadata_is_kept_with_the_file() {
    let Some(agent) = Agent::start().await else { return };
    let path = agent.text_path("file");
    let (status, answer) = upload(&agent, &path, &[("X-Metadata-Author", "me"), ("x-metadata-n", "1")], "x").await;
    assert_eq!(status, StatusCode::OK);
    if answer[0].get("metadata").is_none() {
        eprintln!("skipped: this file system has no extended attributes");
        return;
    }
    assert_eq!(answer[0]["metadata"], json!({"author": "me", "n": "1"}));
    let stat = async || agent.unary("filesystem.Filesystem/Stat", json!({"path": path})).await.1["entry"].clone();
    assert_eq!(stat().await["metadata"], json!({"author": "me", "n": "1"}));
    upload(&agent, &path, &[("x-metadata-n", "2")], "x").await;
    assert_eq!(stat().await["metadata"], json!({"n": "2"}));
    upload(&agent, &path, &[], "x").await;
    assert_eq!(stat().await.get("metadata"), None);

    let too_long = "v".repeat(5000);
    let (status, error) = upload(&agent, &path, &[("x-metadata-k", &too_long)], "y").await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
    assert!(error["message"].as_str().is_some_and(|text| text.starts_with("invalid metadata")), "{error}");
    assert_eq!(fs::read_to_string(&path).expect("readable"), "x");
}

#[tokio::test]
async fn what_cannot_be_done_says_why() {
    let Some(agent) = Agent::start().await else { return };
    fs::write(agent.path("file"), "").expect("written");
    let (directory, missing) = (agent.text_path(""), agent.text_path("missing"));
    let inside_file = agent.text_path("file/inside");
    for (path, status, message) in [
        (directory.as_str(), StatusCode::BAD_REQUEST, "is a directory"),
        (&missing, StatusCode::NOT_FOUND, "does not exist"),
        (&inside_file, StatusCode::NOT_FOUND, "does not exist"),
        ("/dev/zero", StatusCode::BAD_REQUEST, "not a regular file"),
        ("~other/x", StatusCode::BAD_REQUEST, "cannot expand"),
        ("a\0b", StatusCode::BAD_REQUEST, "null byte"),
    ] {
        let (found, error) = read_json(download(&agent, path, &[]).await).await;
        assert_eq!(found, status, "{path:?}: {error}");
        assert_eq!(error["code"], status.as_u16());
        assert!(error["message"].as_str().is_some_and(|text| text.contains(message)), "{path:?}: {error}");
    }
    for (path, headers, status) in [
        (directory.as_str(), vec![], StatusCode::BAD_REQUEST),
        (&inside_file, vec![], StatusCode::BAD_REQUEST),
        (&missing, vec![("content-type", "text/plain")], StatusCode::BAD_REQUEST),
        (&missing, vec![("content-type", "multipart/form-data")], StatusCode::BAD_REQUEST),
        (&missing, vec![("content-type", "multipart/form-data; boundary=x")], StatusCode::BAD_REQUEST),
    ] {
        let (found, error) = upload(&agent, path, &headers, "not a form").await;
        assert_eq!(found, status, "{path:?} {headers:?}: {error}");
    }
    let pathless = agent.request("POST", "/files").header("content-type", OCTET_STREAM);
    let (status, _) = read_json(agent.send(pathless.body(Full::from("x")).expect("valid")).await).await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
    assert_eq!(names(&agent.path("")), ["file"]);
}

#[tokio::test]
async fn a_full_disk_keeps_the_old_file_and_leaves_nothing() {
    let Some(agent) = Agent::start_with_little_space().await else { return };
    let path = agent.text_path("small/file");
    assert_eq!(upload(&agent, &path, &[], "old").await.0, StatusCode::OK);
    let (status, error) = upload(&agent, &path, &[], vec![0; 4 << 20]).await;
    assert_eq!(status, StatusCode::INSUFFICIENT_STORAGE);
    let message = "attempted to write 4194304 bytes: not enough disk space available";
    assert_eq!(error, json!({"code": 507, "message": message}));
    assert_eq!(bytes(download(&agent, &path, &[]).await).await, "old");
    let listed = agent.unary("filesystem.Filesystem/ListDir", json!({"path": agent.text_path("small")})).await.1;
    assert_eq!(listed["entries"].as_array().map(Vec::len), Some(1), "{listed}");
    assert_eq!(upload(&agent, &path, &[], vec![1; 500_000]).await.0, StatusCode::OK, "there is room again");
}

#[tokio::test]
async fn a_broken_upload_leaves_nothing() {
    let Some(agent) = Agent::start().await else { return };
    let path = agent.path("file");
    fs::write(&path, "old").expect("written");
    let mut connection = TcpStream::connect(agent.address()).expect("connected");
    let head = format!(
        "POST /files?path={} HTTP/1.1\r\nhost: x\r\ncontent-type: {OCTET_STREAM}\r\ncontent-length: 1000000\r\n\r\n",
        path.display()
    );
    connection.write_all(head.as_bytes()).expect("sent");
    connection.write_all(&[b'x'; 100_000]).expect("sent");
    eventually("the upload has begun", || names(&agent.path("")).len() == 2).await;
    drop(connection);
    eventually("the upload is gone", || names(&agent.path("")) == ["file"]).await;
    assert_eq!(fs::read_to_string(&path).expect("readable"), "old");
}

#[tokio::test]
async fn an_answer_reaches_a_client_that_is_still_sending() {
    let Some(agent) = Agent::start().await else { return };
    let mut connection = TcpStream::connect(agent.address()).expect("connected");
    let length = 64 << 20;
    let head = format!(
        "POST /files?path=/etc HTTP/1.1\r\nhost: x\r\ncontent-type: {OCTET_STREAM}\r\ncontent-length: {length}\r\n\r\n"
    );
    let answer = tokio::task::spawn_blocking(move || {
        connection.write_all(head.as_bytes()).expect("sent");
        connection.write_all(&vec![0; length]).expect("all of it is taken, though nobody wants it");
        let mut answer = [0; 12];
        connection.read_exact(&mut answer).expect("answered");
        answer
    });
    assert_eq!(&answer.await.expect("no panic"), b"HTTP/1.1 400");
}

#[tokio::test]
async fn transfers_take_little_memory() {
    let Some(agent) = Agent::start().await else { return };
    let peak = || {
        let status = fs::read_to_string(format!("/proc/{}/status", agent.pid())).expect("readable");
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("a peak");
        line.trim().trim_end_matches(" kB").parse::<usize>().expect("a number")
    };
    let path = agent.text_path("large");
    fs::File::create(&path).expect("created").set_len(1 << 30).expect("sparse");
    let mut response = download(&agent, &path, &[]).await;
    let mut received = 0;
    while let Some(frame) = response.body_mut().frame().await {
        received += frame.expect("whole").into_data().expect("data").len();
    }
    assert_eq!(received, 1 << 30);
    assert!(peak() < 64 << 10, "{} kB", peak());
}
