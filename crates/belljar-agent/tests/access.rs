//! Who may talk to the agent, and what it does with those who talk nonsense.

mod support;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, StatusCode};
use http_body_util::Full;
use serde_json::{Value, json};
use support::{Agent, PATIENCE, envelope, read_json};

const TOKEN: &str = "x-access-token";

async fn status(agent: &Agent, method: &str, path: &str, token: Option<&str>, body: &str) -> StatusCode {
    let mut request = agent.request(method, path).header("content-type", "application/json");
    if let Some(token) = token {
        request = request.header(TOKEN, token);
    }
    agent.send(request.body(Full::from(body.to_owned())).expect("valid")).await.status()
}

#[tokio::test]
async fn with_a_token_set_only_its_bearer_gets_in() {
    let Some(agent) = Agent::start_bare() else { return };
    assert_eq!(status(&agent, "GET", "/envs", None, "").await, StatusCode::OK);
    let init = json!({"accessToken": "secret", "defaultUser": "root"}).to_string();
    assert_eq!(status(&agent, "POST", "/init", None, &init).await, StatusCode::NO_CONTENT);

    let requests = [
        ("GET", "/envs", StatusCode::OK),
        ("GET", "/metrics", StatusCode::OK),
        ("GET", "/files?path=/etc/passwd", StatusCode::OK),
        ("POST", "/process.Process/List", StatusCode::OK),
        ("POST", "/filesystem.Filesystem/Remove", StatusCode::OK),
        ("POST", "/freeze", StatusCode::NOT_IMPLEMENTED),
        ("POST", "/files/compose", StatusCode::NOT_IMPLEMENTED),
        ("GET", "/nowhere", StatusCode::NOT_FOUND),
        ("PUT", "/envs", StatusCode::METHOD_NOT_ALLOWED),
    ];
    for (method, path, allowed) in requests {
        let body = r#"{"path": "/nonexistent/belljar"}"#;
        for wrong in [None, Some(""), Some("Secret"), Some("secret2")] {
            let found = status(&agent, method, path, wrong, body).await;
            assert_eq!(found, StatusCode::UNAUTHORIZED, "{method} {path} {wrong:?}");
        }
        assert_eq!(status(&agent, method, path, Some("secret"), body).await, allowed, "{method} {path}");
    }
    assert_eq!(status(&agent, "GET", "/health", None, "").await, StatusCode::NO_CONTENT);

    let refused = agent.get("/envs").await;
    let (_, error) = read_json(refused).await;
    assert_eq!(error["code"], 401);
    let signed = agent.get("/files?path=/etc/passwd&signature=v1_x").await;
    let (status, error) = read_json(signed).await;
    assert_eq!((status, &error["message"]), (StatusCode::NOT_IMPLEMENTED, &json!("signed URLs are not served yet")));
}

#[tokio::test]
async fn a_further_init_needs_the_token_and_can_change_it() {
    let Some(agent) = Agent::start_bare() else { return };
    let with = |token: &str| json!({"accessToken": token}).to_string();
    assert_eq!(status(&agent, "POST", "/init", None, &with("first")).await, StatusCode::NO_CONTENT);
    for (header, body) in [(None, ""), (None, "{}"), (None, &with("second")), (Some("second"), &with("second"))] {
        assert_eq!(status(&agent, "POST", "/init", header, body).await, StatusCode::UNAUTHORIZED, "{header:?} {body}");
    }
    assert_eq!(status(&agent, "POST", "/init", None, &with("first")).await, StatusCode::NO_CONTENT);
    assert_eq!(status(&agent, "POST", "/init", Some("first"), "").await, StatusCode::NO_CONTENT);
    assert_eq!(status(&agent, "GET", "/envs", Some("first"), "").await, StatusCode::OK, "still the same");
    assert_eq!(status(&agent, "POST", "/init", Some("first"), &with("second")).await, StatusCode::NO_CONTENT);
    assert_eq!(status(&agent, "GET", "/envs", Some("first"), "").await, StatusCode::UNAUTHORIZED);
    assert_eq!(status(&agent, "GET", "/envs", Some("second"), "").await, StatusCode::OK);
}

#[tokio::test]
async fn init_says_what_it_does_not_do() {
    let Some(agent) = Agent::start_bare() else { return };
    for (body, expected, named) in [
        (r#"{"caBundle": "x"}"#, StatusCode::NOT_IMPLEMENTED, "'caBundle' is not served yet"),
        (r#"{"volumeMounts": [{"path": "/x"}]}"#, StatusCode::NOT_IMPLEMENTED, "'volumeMounts' is not served yet"),
        (r#"{"unheardOf": 1}"#, StatusCode::BAD_REQUEST, "unheardOf"),
        (r#"{"timestamp": "yesterday"}"#, StatusCode::BAD_REQUEST, "error decoding request"),
        ("not json", StatusCode::BAD_REQUEST, "error decoding request"),
    ] {
        let request = agent.request("POST", "/init").body(Full::from(body)).expect("valid");
        let (status, error) = read_json(agent.send(request).await).await;
        assert_eq!(status, expected, "{body}");
        assert!(error["message"].as_str().is_some_and(|text| text.contains(named)), "{body}: {error}");
    }
    let body = json!({"envVars": {"A": "1"}, "timestamp": "2026-01-02T03:04:05.678Z"}).to_string();
    assert_eq!(status(&agent, "POST", "/init", None, &body).await, StatusCode::NO_CONTENT);
    let older = json!({"envVars": {"A": "2"}, "timestamp": "2026-01-02T03:04:05Z"}).to_string();
    assert_eq!(status(&agent, "POST", "/init", None, &older).await, StatusCode::NO_CONTENT);
    let (_, envs) = read_json(agent.get("/envs").await).await;
    assert_eq!(envs, json!({"A": "1", "E2B_SANDBOX": "true"}));
}

#[tokio::test]
async fn browsers_may_ask_before_they_have_a_token() {
    let Some(agent) = Agent::start_bare() else { return };
    status(&agent, "POST", "/init", None, r#"{"accessToken": "secret"}"#).await;
    let preflight = agent
        .request("OPTIONS", "/process.Process/List")
        .header("origin", "https://example.com")
        .header("access-control-request-method", "POST")
        .header("access-control-request-headers", "authorization,x-access-token");
    let response = agent.send(preflight.body(Full::default()).expect("valid")).await;
    assert_eq!(response.status(), StatusCode::OK);
    assert_eq!(response.headers()["access-control-allow-origin"], "*");
    assert_eq!(response.headers()["access-control-allow-headers"], "authorization,x-access-token");
}

#[tokio::test]
async fn http2_is_spoken_without_being_asked_first() {
    let Some(agent) = Agent::start_bare() else { return };
    let stream = tokio::net::TcpStream::connect(agent.address()).await.expect("connected");
    let io = hyper_util::rt::TokioIo::new(stream);
    let executor = hyper_util::rt::TokioExecutor::new();
    let (mut sender, connection) =
        hyper::client::conn::http2::handshake::<_, _, Full<Bytes>>(executor, io).await.expect("HTTP/2");
    tokio::spawn(connection);
    let request = Request::get(format!("http://{}/health", agent.address())).body(Full::default()).expect("valid");
    let response = sender.send_request(request).await.expect("answered");
    assert_eq!((response.status(), response.version()), (StatusCode::NO_CONTENT, http::Version::HTTP_2));
}

/// What a client could send that is too large, too long, or not what it claims to be. The agent answers or hangs up,
/// and goes on.
#[tokio::test]
async fn nonsense_is_survived() {
    let Some(mut agent) = Agent::start().await else { return };
    let start = "/process.Process/Start";
    let announced = |length: u32, body: &[u8]| [&[0][..], &length.to_be_bytes(), body].concat();
    let deep = format!("{}1{}", "[".repeat(100_000), "]".repeat(100_000));
    let requests: Vec<(&str, &str, Vec<u8>)> = vec![
        (start, "application/connect+json", Vec::new()),
        (start, "application/connect+json", vec![0; 3]),
        (start, "application/connect+json", announced(u32::MAX, b"{}")),
        (start, "application/connect+json", announced(100, b"{}")),
        (start, "application/connect+json", announced(1, &[1, 2, 3])),
        (start, "application/connect+json", envelope(&json!({"process": 7})).to_vec()),
        (start, "application/connect+json", envelope(&json!({"process": {"cmd": ["x"]}})).to_vec()),
        (start, "application/connect+proto", announced(6, &[0xff; 6])),
        (start, "application/connect+yaml", announced(2, b"{}")),
        (start, "application/json", b"{}".to_vec()),
        ("/process.Process/List", "application/json", b"[".to_vec()),
        ("/process.Process/List", "application/json", deep.into_bytes()),
        ("/process.Process/List", "application/proto", vec![0x0a, 0xff, 0xff, 0xff, 0xff, 0x0f]),
        ("/process.Process/SendInput", "application/json", br#"{"input":{"stdin":"!!"}}"#.to_vec()),
        ("/process.Process/SendSignal", "application/json", br#"{"process":{"pid":-1}}"#.to_vec()),
        ("/process.Process/SendSignal", "application/json", br#"{"process":{"pid":1},"signal":9}"#.to_vec()),
        ("/process.Process/StreamInput", "application/connect+json", announced(5, b"{}")),
        ("/process.Process/Nothing", "application/json", b"{}".to_vec()),
        ("/filesystem.Filesystem/ListDir", "application/json", br#"{"depth":99999999999}"#.to_vec()),
        ("/init", "application/json", vec![b' '; 8 << 20]),
    ];
    for (path, content_type, body) in requests {
        let request = agent.request("POST", path).header("content-type", content_type);
        let response = agent.send(request.body(Full::from(body)).expect("valid")).await;
        assert_ne!(response.status(), StatusCode::INTERNAL_SERVER_ERROR, "{path}");
        if response.status() == StatusCode::OK && content_type.starts_with("application/connect+") {
            let body = http_body_util::BodyExt::collect(response.into_body()).await.expect("a body").to_bytes();
            assert!(String::from_utf8_lossy(&body).contains("\"error\""), "{path} was accepted: {body:?}");
        } else {
            assert_ne!(response.status(), StatusCode::OK, "{path} {content_type}");
        }
        assert_eq!(agent.run_shell("echo fine").await.stdout, "fine\n");
    }
    let mut headers = agent.request("GET", "/health");
    for number in 0..90 {
        headers = headers.header(format!("x-{number}"), "y".repeat(1000));
    }
    let refused = agent.send(headers.body(Full::default()).expect("valid")).await.status();
    assert_eq!(refused, StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE);
    for garbage in [
        &b"\x16\x03\x01\x02\x00garbage"[..],
        b"GET\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\xff\xff\xff\xff\xff\xff",
    ] {
        let mut connection = TcpStream::connect(agent.address()).expect("connected");
        connection.set_read_timeout(Some(PATIENCE)).expect("set");
        connection.write_all(garbage).expect("sent");
        let mut answer = Vec::new();
        // Whether it says anything before it hangs up is its business.
        let _ = connection.read_to_end(&mut answer);
    }
    assert_eq!(agent.run_shell("echo fine").await.stdout, "fine\n");
    assert!(agent.is_running());
}

#[tokio::test]
async fn messages_beyond_the_limit_are_refused() {
    let Some(agent) = Agent::start().await else { return };
    let oversized = 65 << 20;
    let request = agent.request("POST", "/process.Process/SendInput").header("content-type", "application/json");
    let (_, error): (_, Value) =
        read_json(agent.send(request.body(Full::from(vec![b' '; oversized])).expect("valid")).await).await;
    assert_eq!(error["code"], "resource_exhausted");
}

#[tokio::test]
async fn idle_connections_do_not_keep_others_out() {
    let Some(agent) = Agent::start().await else { return };
    let idle: Vec<_> = (0..500).map(|_| TcpStream::connect(agent.address()).expect("connected")).collect();
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(agent.get("/health").await.status(), StatusCode::NO_CONTENT);
    assert_eq!(idle.len(), 500);
}
