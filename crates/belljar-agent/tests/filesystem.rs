//! The file system service, as the SDKs use it.

mod support;

use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};

use belljar_protocol::envd::filesystem::{FileType, ListDirRequest, StatRequest};
use http::StatusCode;
use serde_json::{Value, json};
use support::Agent;

async fn call(agent: &Agent, method: &str, body: Value) -> (StatusCode, Value) {
    agent.unary(&format!("filesystem.Filesystem/{method}"), body).await
}

/// The code of a call that fails, or the answer of one that does not.
async fn code(agent: &Agent, method: &str, body: Value) -> Value {
    let (status, answer) = call(agent, method, body).await;
    if status.is_success() { answer } else { answer["code"].clone() }
}

#[tokio::test]
async fn entries_are_described_in_both_encodings() {
    let Some(agent) = Agent::start().await else { return };
    let path = agent.text_path("file.txt");
    fs::write(&path, "hello").expect("written");
    let (status, answer) = call(&agent, "Stat", json!({"path": path})).await;
    assert_eq!(status, StatusCode::OK);
    let entry = &answer["entry"];
    for (field, expected) in [
        ("name", json!("file.txt")),
        ("type", json!("FILE_TYPE_FILE")),
        ("path", json!(path)),
        ("size", json!("5")),
        ("permissions", json!("-rw-r--r--")),
        ("owner", json!("root")),
        ("group", json!("root")),
    ] {
        assert_eq!(entry[field], expected, "{entry}");
    }
    assert!(entry["modifiedTime"].as_str().is_some_and(|time| time.ends_with('Z')), "{entry}");

    let request = StatRequest { path: path.clone() };
    let binary = agent.filesystem().stat(request).await.expect("found").into_owned().entry.into_option();
    let binary = binary.expect("an entry");
    assert_eq!((binary.name.as_str(), binary.size, binary.mode), ("file.txt", 5, 0o644));
    assert_eq!(binary.r#type.as_known(), Some(FileType::FILE_TYPE_FILE));
}

#[tokio::test]
async fn directories_are_listed_to_a_depth() {
    let Some(agent) = Agent::start().await else { return };
    fs::create_dir_all(agent.path("d/e/f")).expect("created");
    fs::write(agent.path("d/a"), "").expect("written");
    symlink("nowhere", agent.path("d/z")).expect("linked");
    let request = |depth| ListDirRequest { path: agent.text_path("d"), depth };
    let mut listed = Vec::new();
    for depth in 1..=3 {
        let list = agent.filesystem().list_dir(request(depth)).await.expect("listed").into_owned();
        listed.push(list.entries.into_iter().map(|entry| entry.name).collect::<Vec<_>>().join(" "));
    }
    assert_eq!(listed, ["a e z", "a e f z", "a e f z"]);
    let (_, answer) = call(&agent, "ListDir", json!({"path": agent.text_path("d")})).await;
    assert_eq!(answer["entries"][2]["type"], "FILE_TYPE_SYMLINK");
    assert_eq!(code(&agent, "ListDir", json!({"path": agent.text_path("x")})).await, "not_found");
    assert_eq!(code(&agent, "ListDir", json!({"path": agent.text_path("d/a")})).await, "invalid_argument");
}

#[tokio::test]
async fn directories_are_made_for_their_user() {
    let Some(agent) = Agent::start().await else { return };
    let path = agent.text_path("a/b/c");
    let (status, answer) = agent.unary_as("nobody", "filesystem.Filesystem/MakeDir", json!({"path": path})).await;
    assert_eq!(status, StatusCode::OK);
    assert_eq!(answer["entry"]["owner"], "nobody");
    assert_eq!(fs::metadata(agent.path("a")).expect("exists").uid(), 65534);
    assert_eq!(code(&agent, "MakeDir", json!({"path": path})).await, "already_exists");
    fs::write(agent.path("file"), "").expect("written");
    assert_eq!(code(&agent, "MakeDir", json!({"path": agent.text_path("file")})).await, "invalid_argument");
    assert_eq!(code(&agent, "MakeDir", json!({"path": agent.text_path("file/x")})).await, "invalid_argument");
}

#[tokio::test]
async fn things_are_moved_and_removed() {
    let Some(agent) = Agent::start().await else { return };
    let (from, to) = (agent.text_path("from"), agent.text_path("new/place/to"));
    fs::create_dir(&from).expect("created");
    fs::write(agent.path("from/x"), "x").expect("written");
    let (status, answer) = call(&agent, "Move", json!({"source": from, "destination": to})).await;
    assert_eq!((status, &answer["entry"]["path"]), (StatusCode::OK, &json!(to)));
    assert_eq!(fs::read_to_string(format!("{to}/x")).expect("readable"), "x");
    let gone = json!({"source": from, "destination": agent.text_path("other/place")});
    assert_eq!(code(&agent, "Move", gone).await, "not_found");
    assert!(!agent.path("other").exists(), "nothing was created for what could not be moved");

    assert_eq!(code(&agent, "Remove", json!({"path": agent.text_path("new")})).await, json!({}));
    assert!(!agent.path("new").exists());
    assert_eq!(code(&agent, "Remove", json!({"path": agent.text_path("new")})).await, json!({}), "gone is gone");
    assert_eq!(code(&agent, "Stat", json!({"path": agent.text_path("new")})).await, "not_found");
}

#[tokio::test]
async fn things_are_moved_between_file_systems() {
    // To the agent `small` is another file system than what is around it.
    let Some(agent) = Agent::start_with_little_space().await else { return };
    fs::create_dir(agent.path("tree")).expect("created");
    fs::write(agent.path("tree/file"), "content").expect("written");
    symlink("file", agent.path("tree/link")).expect("linked");
    let there = json!({"source": agent.text_path("tree"), "destination": agent.text_path("small/tree")});
    assert_eq!(call(&agent, "Move", there).await.0, StatusCode::OK);
    assert!(!agent.path("tree").exists());
    let back = json!({"source": agent.text_path("small/tree"), "destination": agent.text_path("back")});
    assert_eq!(call(&agent, "Move", back).await.0, StatusCode::OK);
    assert_eq!(fs::read_to_string(agent.path("back/file")).expect("readable"), "content");
    assert!(fs::symlink_metadata(agent.path("back/link")).expect("exists").is_symlink());

    fs::write(agent.path("large"), vec![0; 4 << 20]).expect("written");
    let too_large = json!({"source": agent.text_path("large"), "destination": agent.text_path("small/large")});
    assert_eq!(code(&agent, "Move", too_large).await, "internal");
    assert!(agent.path("large").exists(), "what could not be moved is still there");
}

#[tokio::test]
async fn relative_paths_start_at_home() {
    let Some(agent) = Agent::start().await else { return };
    for path in ["", "~", "~/", ".", "x/.."] {
        let (_, answer) = call(&agent, "Stat", json!({"path": path})).await;
        assert_eq!(answer["entry"]["path"], "/root", "{path}");
    }
    agent.post("/init", json!({"defaultWorkdir": agent.text_path("")})).await;
    let (_, answer) = call(&agent, "Stat", json!({"path": ""})).await;
    assert_eq!(answer["entry"]["path"], agent.text_path(""));
    assert_eq!(code(&agent, "Stat", json!({"path": "~nobody"})).await, "invalid_argument");
    let ghost = agent.unary_as("ghost", "filesystem.Filesystem/Stat", json!({"path": "/"})).await;
    assert_eq!((ghost.0, &ghost.1["code"]), (StatusCode::UNAUTHORIZED, &json!("unauthenticated")));
}

#[tokio::test]
async fn watching_is_not_served_yet() {
    let Some(agent) = Agent::start().await else { return };
    for method in ["CreateWatcher", "GetWatcherEvents", "RemoveWatcher"] {
        let (status, error) = call(&agent, method, json!({})).await;
        assert_eq!(status, StatusCode::NOT_IMPLEMENTED, "{method}");
        let message = "watching directories is not served yet";
        assert_eq!(error, json!({"code": "unimplemented", "message": message}), "{method}");
    }
    let stream = agent.stream("filesystem.Filesystem/WatchDir", json!({"path": "/"}), &[]).await;
    assert_eq!(stream.outcome().await.end["code"], "unimplemented");
}
