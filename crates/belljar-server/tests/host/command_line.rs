//! The command line, as a person and a script use it.

use std::process::Output;

use serde_json::Value;

use crate::server::Server;

fn text(output: &Output) -> (String, String) {
    (String::from_utf8_lossy(&output.stdout).into_owned(), String::from_utf8_lossy(&output.stderr).into_owned())
}

fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"))
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs root and the base template"]
async fn run_has_the_files_output_and_exit_code_and_leaves_nothing() {
    let server = Server::start();
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("with space.py");
    std::fs::write(&file, "import sys; print('out', sys.argv[1]); print('err', file=sys.stderr); sys.exit(7)").unwrap();
    let output = server.command(&["run", file.to_str().unwrap(), "argument"]);
    assert_eq!(text(&output), ("out argument\n".into(), "err\n".into()));
    assert_eq!(output.status.code(), Some(7));
    server.assert_nothing_left();
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs root and the base template"]
async fn sandboxes_are_created_listed_used_and_killed() {
    let server = Server::start();
    let output = server.command(&["sandbox", "create", "--metadata", "who=me", "--env", "A=b c"]);
    let id = text(&output).0.trim().to_owned();
    assert_eq!(id.len(), 20, "{output:?}");
    let listed = json(&server.command(&["sandbox", "list", "--json"]));
    assert_eq!(listed[0]["sandboxID"], id.as_str());
    assert_eq!(listed[0]["metadata"]["who"], "me");
    let output =
        server.command(&["sandbox", "exec", &id, "--user", "root", "--", "sh", "-c", "id -u; echo $A; exit 3"]);
    assert_eq!((text(&output).0.as_str(), output.status.code()), ("0\nb c\n", Some(3)));
    assert!(server.command(&["sandbox", "kill", &id]).status.success());
    let again = server.command(&["sandbox", "kill", &id]);
    assert!(!again.status.success() && text(&again).1.contains("was not found"), "{again:?}");
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs root and the base template"]
async fn a_revoked_key_is_refused_at_once_and_keys_of_other_teams_see_nothing() {
    let mut server = Server::start();
    let mine = server.client().create(&crate::server::base()).await.unwrap();
    server.key = server.create_key("others");
    let client = server.client();
    assert!(client.list().await.unwrap().is_empty());
    for outcome in [client.get(&mine.sandbox_id).await.map(drop), client.kill(&mine.sandbox_id).await] {
        assert!(outcome.expect_err("it is not theirs").to_string().contains("was not found"));
    }
    let keys = json(&server.command(&["key", "list", "--json"]));
    let id = keys.as_array().unwrap().iter().rfind(|key| key["team"] == "others").unwrap()["id"]
        .as_str()
        .unwrap()
        .to_owned();
    assert!(server.command(&["key", "revoke", &id]).status.success());
    assert!(client.list().await.expect_err("revoked").to_string().contains("Invalid API key"));
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs root and the base template"]
async fn doctor_finds_this_machine_ready() {
    let server = Server::start();
    let output = server.command(&["doctor", "--json"]);
    let report = json(&output);
    assert_eq!(report["ready"], true, "{report:#}");
    assert!(report["engine"].as_str().unwrap().starts_with("gVisor"));
}
