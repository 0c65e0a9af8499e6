//! Which sandbox is meant, who may come in, and what those are told who may not.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use belljar_core::id::SandboxId;
use belljar_proxy::{AGENT_PORT, Unresolved};
use hyper::Response;

use crate::support::{Answer, DOMAIN, Fixture, Sandbox, Settings, empty, full, request, request2};

async fn serve_name(sandbox: &Sandbox, port: u16, name: &'static str) {
    sandbox.serve(port, move |_| async move { Response::new(full(name)) }).await;
}

#[tokio::test]
async fn host_and_headers_find_the_sandbox() {
    let fixture = Fixture::new().await;
    let [first, second] = [fixture.sandbox(), fixture.sandbox()];
    serve_name(&first, 8080, "first").await;
    serve_name(&second, 8080, "second").await;

    assert_eq!(fixture.get(&first.host(8080), "/").await.body, "first");
    assert_eq!(fixture.get(&format!("{}:3000", second.host(8080)), "/").await.body, "second");

    let with_headers = |host: &str, sandbox: &Sandbox| {
        let mut request = request("GET", host, "/", empty());
        request.headers_mut().insert("E2b-Sandbox-Id", sandbox.id.as_str().parse().unwrap());
        request.headers_mut().insert("E2b-Sandbox-Port", "8080".parse().unwrap());
        request
    };
    let answer = fixture.send(with_headers("localhost:3000", &second)).await;
    assert_eq!(Answer::of(answer).await.body, "second");
    let answer = fixture.send(with_headers(&first.host(8080), &second)).await;
    assert_eq!(Answer::of(answer).await.body, "first", "a host that names a sandbox wins");

    let answer = fixture.http2().await.send(request2("GET", &first.host(8080), "/", empty())).await.unwrap();
    assert_eq!(Answer::of(answer).await.body, "first");
}

#[tokio::test]
async fn everything_else_is_the_apis() {
    let fixture = Fixture::new().await;
    for host in [DOMAIN, "localhost:3000", "my-api.sandbox.test"] {
        assert_eq!(fixture.get(host, "/").await.body, "the API", "{host}");
    }
}

#[tokio::test]
async fn a_sandbox_that_is_gone_is_a_502_the_sdk_recognises() {
    let fixture = Fixture::new().await;
    let id = SandboxId::generate();
    let answer = fixture.get(&format!("8080-{id}.{DOMAIN}"), "/").await;
    assert_eq!(answer.status, 502);
    assert_eq!(answer.body, format!(r#"{{"sandboxId":"{id}","message":"The sandbox was not found","code":502}}"#));
    assert_eq!(answer.header("content-type"), Some("application/json; charset=utf-8"));
    assert_eq!(answer.header("should-retry"), Some("false"));
    assert_eq!(answer.header("cache-control"), Some("no-store"));

    let answer = fixture.get(&format!("8080-i0therserversids.{DOMAIN}"), "/").await;
    assert_eq!((answer.status, answer.body.contains("was not found")), (502, true));
}

#[tokio::test]
async fn states_between_have_their_own_answers() {
    let fixture = Fixture::new().await;
    let unresolved: [fn() -> Unresolved; 3] =
        [|| Unresolved::Stopped, || Unresolved::Transitioning, || Unresolved::Failed("the database is on fire".into())];
    let expected = [(502, "was not found", "false"), (409, "try again", "true"), (503, "try again", "true")];
    for (unresolved, (status, words, should_retry)) in unresolved.into_iter().zip(expected) {
        let id = SandboxId::generate();
        fixture.registry.unresolved.lock().unwrap().insert(id.clone(), unresolved);
        let answer = fixture.get(&format!("8080-{id}.{DOMAIN}"), "/").await;
        assert_eq!(answer.status, status);
        assert!(answer.body.contains(words) && !answer.body.contains("fire"), "{}", answer.body);
        assert_eq!(answer.header("should-retry"), Some(should_retry));
    }
}

#[tokio::test]
async fn a_closed_port_is_a_502_the_sdk_recognises() {
    let fixture = Fixture::new().await;
    let sandbox = fixture.sandbox();
    let answer = fixture.get(&sandbox.host(8080), "/").await;
    assert_eq!(answer.status, 502);
    let id = &sandbox.id;
    assert_eq!(
        answer.body,
        format!(
            r#"{{"sandboxId":"{id}","message":"The sandbox is running but port is not open","port":8080,"code":502}}"#
        )
    );
    assert_eq!(answer.header("should-retry"), None, "a server may be about to start there");
}

#[tokio::test]
async fn a_browser_gets_a_page() {
    let fixture = Fixture::new().await;
    let sandbox = fixture.sandbox();
    let mut navigation = request("GET", &sandbox.host(8080), "/", empty());
    navigation.headers_mut().insert("accept", "text/html,*/*;q=0.8".parse().unwrap());
    let answer = Answer::of(fixture.send(navigation).await).await;
    assert_eq!(answer.status, 502);
    assert_eq!(answer.header("content-type"), Some("text/html; charset=utf-8"));
    assert!(answer.header("content-security-policy").unwrap().starts_with("default-src 'none'"));
    assert!(answer.body.starts_with("<!doctype html>") && answer.body.contains(sandbox.id.as_str()), "{}", answer.body);
}

#[tokio::test]
async fn bad_addresses_are_400s() {
    let fixture = Fixture::new().await;
    let id = SandboxId::generate();
    let cases = [
        (format!("0-{id}.{DOMAIN}"), "Invalid sandbox port"),
        (format!("65536-{id}.{DOMAIN}"), "Invalid sandbox port"),
        (format!("80-{id}_.{DOMAIN}"), "Invalid sandbox ID"),
    ];
    for (host, message) in cases {
        let answer = fixture.get(&host, "/").await;
        assert_eq!((answer.status, answer.body), (400, format!(r#"{{"message":"{message}","code":400}}"#)), "{host}");
    }
    let answer = fixture
        .raw(&format!("GET / HTTP/1.1\r\nHost: localhost\r\nHost: 80-{id}.{DOMAIN}\r\nConnection: close\r\n\r\n"))
        .await;
    assert!(answer.starts_with("HTTP/1.1 400 "), "{answer}");
}

#[tokio::test]
async fn control_endpoints_of_the_agent_are_out_of_reach() {
    let fixture = Fixture::new().await;
    let sandbox = fixture.sandbox();
    let reached = Arc::new(AtomicUsize::new(0));
    for port in [AGENT_PORT, 8080] {
        let reached = Arc::clone(&reached);
        let handler = move |_| {
            reached.fetch_add(1, Ordering::SeqCst);
            async { Response::new(empty()) }
        };
        sandbox.serve(port, handler).await;
    }
    let agent = sandbox.host(AGENT_PORT);
    let dodges = [
        "/init",
        "/INIT/",
        "//init",
        "/./init",
        "/files/../init",
        "/%69nit",
        "/%2569nit",
        "/files/%2e%2e%2finit",
        "/files\\..\\init",
        "/init;x",
        "/freeze?maxWaitMs=1",
        "/upgrade",
    ];
    let mut http2 = fixture.http2().await;
    for path in dodges {
        let raw = fixture.raw(&format!("POST {path} HTTP/1.1\r\nHost: {agent}\r\nConnection: close\r\n\r\n")).await;
        assert!(raw.starts_with("HTTP/1.1 404 ") && raw.contains("reserved"), "{path}: {raw}");
        let absolute = format!("POST http://{agent}{path} HTTP/1.1\r\nHost: other\r\nConnection: close\r\n\r\n");
        let raw = fixture.raw(&absolute).await;
        assert!(raw.starts_with("HTTP/1.1 404 "), "absolute {path}: {raw}");
        let answer = http2.send(request2("POST", &agent, path, empty())).await.unwrap();
        assert_eq!(answer.status(), 404, "HTTP/2 {path}");
        let mut by_headers = request("POST", "localhost", path, empty());
        by_headers.headers_mut().insert("e2b-sandbox-id", sandbox.id.as_str().parse().unwrap());
        by_headers.headers_mut().insert("e2b-sandbox-port", "49983".parse().unwrap());
        assert_eq!(fixture.send(by_headers).await.status(), 404, "by headers {path}");
    }
    assert_eq!(reached.load(Ordering::SeqCst), 0);

    assert_eq!(fixture.get(&agent, "/health").await.status, 200);
    assert_eq!(fixture.get(&sandbox.host(8080), "/init").await.status, 200, "other ports have no agent");
    assert_eq!(reached.load(Ordering::SeqCst), 2);
}

#[tokio::test]
async fn the_agent_is_not_upgraded_to_something_unchecked() {
    let fixture = Fixture::new().await;
    let sandbox = fixture.sandbox();
    let handler = |request: hyper::Request<hyper::body::Incoming>| async move {
        Response::new(full(format!("upgrade: {:?}", request.headers().get("upgrade"))))
    };
    for port in [AGENT_PORT, 8080] {
        sandbox.serve(port, handler).await;
    }
    let upgrade = |port, protocol| {
        let host = sandbox.host(port);
        format!("GET / HTTP/1.1\r\nHost: {host}\r\nConnection: upgrade, close\r\nUpgrade: {protocol}\r\n\r\n")
    };
    for protocol in ["websocket", "h2c", "anything"] {
        let answer = fixture.raw(&upgrade(AGENT_PORT, protocol)).await;
        assert!(answer.ends_with("upgrade: None"), "{protocol}: {answer}");
    }
    assert!(fixture.raw(&upgrade(8080, "h2c")).await.ends_with("upgrade: None"));
    let answer = fixture.raw(&format!("CONNECT {} HTTP/1.1\r\nConnection: close\r\n\r\n", sandbox.host(8080))).await;
    assert!(answer.starts_with("HTTP/1.1 405 "), "{answer}");
}

#[tokio::test]
async fn a_closed_sandbox_wants_its_token() {
    let fixture = Fixture::new().await;
    let sandbox = fixture.registry.add(Settings { token: Some("secret".to_owned()), ..Settings::default() });
    let handler = |request: hyper::Request<hyper::body::Incoming>| async move {
        Response::new(full(format!("token: {:?}", request.headers().get("e2b-traffic-access-token"))))
    };
    for port in [AGENT_PORT, 8080] {
        sandbox.serve(port, handler).await;
    }
    let with_token = |token: Option<&str>, port| {
        let mut request = request("GET", &sandbox.host(port), "/", empty());
        if let Some(token) = token {
            request.headers_mut().insert("E2B-Traffic-Access-Token", token.parse().unwrap());
        }
        request
    };
    for (token, words) in [(None, "missing"), (Some("secreT"), "invalid"), (Some(""), "invalid")] {
        let answer = Answer::of(fixture.send(with_token(token, 8080)).await).await;
        assert_eq!((answer.status, answer.body.contains(words)), (403, true), "{token:?}: {}", answer.body);
    }
    assert_eq!(sandbox.connects(), 0);
    let answer = Answer::of(fixture.send(with_token(Some("secret"), 8080)).await).await;
    assert_eq!(answer.body, "token: None", "code in the sandbox does not learn it");
    assert_eq!(fixture.send(with_token(None, AGENT_PORT)).await.status(), 200, "the agent has its own token");
}
