//! Commands, as the SDKs run them.

mod support;

use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use belljar_protocol::envd::process::process_event::Event;
use belljar_protocol::envd::process::process_event::data_event::Output;
use belljar_protocol::envd::process::{ProcessConfig, StartRequest, StartResponse};
use http::StatusCode;
use serde_json::{Value, json};
use support::{Agent, Outcome, basic, eventually, is_alive, shell};

fn exit(code: i32) -> Value {
    let status = format!("exit status {code}");
    match code {
        0 => json!({"exited": true, "status": status}),
        _ => json!({"exitCode": code, "exited": true, "status": status, "error": status}),
    }
}

fn killed(description: &str) -> Value {
    let status = format!("signal: {description}");
    json!({"exitCode": -1, "status": status, "error": status})
}

fn pid(pid: u64) -> Value {
    json!({"process": {"pid": pid}})
}

#[tokio::test]
async fn a_command_streams_its_output_and_its_end() {
    let Some(agent) = Agent::start().await else { return };
    let mut events = agent.shell("echo out; sleep 0.1; echo err >&2; exit 3").await;
    assert_eq!(events.response.status(), StatusCode::OK);
    assert_eq!(events.response.headers()["content-type"], "application/connect+json");
    assert!(is_alive(events.pid().await));
    let expected = Outcome { stdout: "out\n".into(), stderr: "err\n".into(), end: exit(3) };
    assert_eq!(events.outcome().await, expected);
    assert_eq!(agent.run_shell("exit 0").await.end, exit(0));
    assert_eq!(agent.run_shell("kill -9 $$").await.end, killed("killed"));
    assert_eq!(agent.run_shell("kill -TERM $$").await.end, killed("terminated"));
}

#[tokio::test]
async fn the_binary_encoding_carries_the_same() {
    let Some(agent) = Agent::start().await else { return };
    let config = ProcessConfig {
        cmd: "/bin/sh".into(),
        args: vec!["-c".into(), r"printf '\377\000'; echo $A >&2; exit 7".into()],
        envs: [("A".to_owned(), "b".to_owned())].into_iter().collect(),
        cwd: Some("/".into()),
    };
    let request = StartRequest { process: config.into(), tag: Some("t".into()), ..Default::default() };
    let mut stream = agent.processes().start(request).await.expect("started");
    let (mut stdout, mut stderr, mut end) = (Vec::new(), Vec::new(), None);
    while let Some(message) = stream.message::<StartResponse>().await.expect("no error") {
        match message.to_owned_message().event.into_option().and_then(|event| event.event) {
            Some(Event::Data(data)) => match data.output {
                Some(Output::Stdout(data)) => stdout.extend_from_slice(&data),
                Some(Output::Stderr(data)) => stderr.extend_from_slice(&data),
                other => panic!("unexpected output: {other:?}"),
            },
            Some(Event::End(event)) => end = Some(*event),
            _ => {}
        }
    }
    assert_eq!((stdout.as_slice(), stderr.as_slice()), (&b"\xff\x00"[..], &b"b\n"[..]));
    let end = end.expect("an end event");
    assert_eq!((end.exit_code, end.exited, end.status.as_str()), (7, true, "exit status 7"));
    let list = agent.processes().list(Default::default()).await.expect("listed");
    assert!(list.into_owned().processes.is_empty());
}

#[tokio::test]
async fn what_cannot_be_started_says_why() {
    let Some(agent) = Agent::start().await else { return };
    std::fs::write(agent.path("data"), "").expect("written");
    let start = |process: Value| json!({"process": process});
    for (request, user, code, message) in [
        (start(json!({"cmd": "true", "cwd": "/nope"})), "root", "invalid_argument", "cwd '/nope' does not exist"),
        (start(json!({"cmd": "true", "cwd": "/etc/passwd"})), "root", "invalid_argument", "is not a directory"),
        (start(json!({"cmd": "true", "cwd": "~x/y"})), "root", "invalid_argument", "cannot expand"),
        (start(json!({"cmd": "no-such-program"})), "root", "invalid_argument", "error starting process 'no-such"),
        (start(json!({"cmd": agent.text_path("data")})), "root", "invalid_argument", "Permission denied"),
        (start(json!({"cmd": "a\0b"})), "root", "invalid_argument", "nul byte"),
        (start(json!({"cmd": "true", "cwd": "/root"})), "nobody", "invalid_argument", "Permission denied"),
        (start(json!({"cmd": "true"})), "ghost", "unauthenticated", "invalid username: 'ghost'"),
        (json!({}), "root", "invalid_argument", "no process given"),
        (json!({"process": {"cmd": "sh"}, "pty": {}}), "root", "unimplemented", "PTYs are not served yet"),
    ] {
        let authorization = basic(user);
        let headers = [("authorization", authorization.as_str())];
        let outcome = agent.stream("process.Process/Start", request.clone(), &headers).await.outcome().await;
        assert_eq!(outcome.end["code"], code, "{request}: {outcome:?}");
        assert!(outcome.end["message"].as_str().is_some_and(|text| text.contains(message)), "{request}: {outcome:?}");
    }
    let mut events = agent.stream("process.Process/Start", json!({"process": {"cmd": "true"}}), &[]).await;
    assert!(events.pid().await > 0, "and the agent goes on");
}

#[tokio::test]
async fn commands_run_as_their_user_and_with_their_environment() {
    let Some(agent) = Agent::start().await else { return };
    agent.post("/init", json!({"envVars": {"FROM_INIT": "1", "BOTH": "init"}, "defaultWorkdir": "/usr"})).await;
    let script = "id -un; id -G | wc -w; pwd; echo $HOME $USER $LOGNAME $FROM_INIT $BOTH $E2B_SANDBOX; umask";
    let mut request = shell(script);
    request["process"]["envs"] = json!({"BOTH": "call"});
    let root = agent.stream("process.Process/Start", request.clone(), &[]).await.outcome().await;
    assert_eq!(root.stdout, "root\n1\n/usr\n/root root root 1 call true\n0022\n");

    request["process"]["cwd"] = json!("/tmp");
    let authorization = basic("nobody");
    let headers = [("authorization", authorization.as_str())];
    let nobody = agent.stream("process.Process/Start", request, &headers).await.outcome().await;
    assert_eq!(nobody.stdout, "nobody\n1\n/tmp\n/nonexistent nobody nobody 1 call true\n0022\n");

    let rights = shell("grep -E 'CapEff|CapPrm' /proc/self/status; cat /proc/1/environ; ls /root");
    let mut rights = rights;
    rights["process"]["cwd"] = json!("/");
    let outcome = agent.stream("process.Process/Start", rights, &headers).await.outcome().await;
    assert_eq!(outcome.stdout, "CapPrm:\t0000000000000000\nCapEff:\t0000000000000000\n", "{outcome:?}");

    // What /init set is replaced, not added to.
    agent.post("/init", json!({"envVars": {"NEW": "2"}})).await;
    assert_eq!(agent.run_shell("echo $FROM_INIT$NEW").await.stdout, "2\n");
}

#[tokio::test]
async fn a_process_outlives_its_stream_and_can_be_connected_to() {
    let Some(agent) = Agent::start().await else { return };
    let gate = agent.text_path("gate");
    let script = format!("echo one; while [ ! -e {gate} ]; do sleep 0.01; done; echo two; exit 5");
    let mut request = shell(&script);
    request["tag"] = json!("job");
    let mut first = agent.stream("process.Process/Start", request, &[]).await;
    let id = first.pid().await;
    assert_eq!(first.stdout().await, "one\n");
    drop(first);

    let (status, list) = agent.unary("process.Process/List", json!({})).await;
    assert_eq!(status, StatusCode::OK);
    assert_eq!(list["processes"][0]["pid"], id);
    assert_eq!(list["processes"][0]["tag"], "job");
    assert_eq!(list["processes"][0]["config"]["args"], json!(["-c", script]));

    let mut by_tag = agent.stream("process.Process/Connect", json!({"process": {"tag": "job"}}), &[]).await;
    assert_eq!(by_tag.pid().await, id);
    std::fs::write(&gate, "").expect("written");
    let expected = Outcome { stdout: "two\n".into(), stderr: String::new(), end: exit(5) };
    assert_eq!(by_tag.outcome().await, expected);

    // It is over, but not forgotten at once.
    let late = agent.stream("process.Process/Connect", pid(id), &[]).await.outcome().await;
    assert_eq!(late.end, exit(5));
    let (_, list) = agent.unary("process.Process/List", json!({})).await;
    assert_eq!(list, json!({}));
}

#[tokio::test]
async fn what_is_printed_while_nobody_listens_is_not_lost() {
    let Some(agent) = Agent::start().await else { return };
    let (ready, gate) = (agent.text_path("ready"), agent.text_path("gate"));
    let script = format!("echo before; touch {ready}; while [ ! -e {gate} ]; do sleep 0.01; done");
    let mut events = agent.shell(&script).await;
    let id = events.pid().await;
    drop(events);
    eventually("the command has printed", || std::path::Path::new(&ready).exists()).await;
    let mut again = agent.stream("process.Process/Connect", pid(id), &[]).await;
    again.pid().await;
    // Read or not when the first stream broke off, it comes at most once.
    std::fs::write(&gate, "").expect("written");
    let outcome = again.outcome().await;
    assert!(outcome.stdout.is_empty() || outcome.stdout == "before\n", "{outcome:?}");
    assert_eq!(outcome.end, exit(0));
}

#[tokio::test]
async fn a_slow_reader_gets_everything_in_order() {
    let Some(agent) = Agent::start().await else { return };
    // Far more than the log, the pipe and the sockets hold.
    const LINES: usize = 3_000_000;
    let mut events = agent.shell(&format!("seq 1 {LINES}")).await;
    let id = events.pid().await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert!(is_alive(id), "it waits for its reader");
    let outcome = events.outcome().await;
    assert_eq!(outcome.end, exit(0));
    let mut lines = outcome.stdout.lines();
    assert!((1..=LINES).all(|number| lines.next() == Some(number.to_string().as_str())));
    assert_eq!(lines.next(), None);
}

#[tokio::test]
async fn a_process_without_a_reader_never_waits() {
    let Some(agent) = Agent::start().await else { return };
    let done = agent.text_path("done");
    let mut events = agent.shell(&format!("seq 1 3000000; touch {done}")).await;
    events.pid().await;
    drop(events);
    eventually("the command has finished", || std::path::Path::new(&done).exists()).await;
}

#[tokio::test]
async fn killing_takes_the_whole_tree() {
    let Some(agent) = Agent::start().await else { return };
    let pids = agent.text_path("pids");
    let script = format!(
        "echo $$ > {pids}; sleep 600 & echo $! >> {pids}; setsid sh -c 'echo $$ >> {pids}; sleep 600; true' & \
         (sleep 600 & echo $! >> {pids}); echo ready; wait"
    );
    let mut events = agent.shell(&script).await;
    let id = events.pid().await;
    assert_eq!(events.stdout().await, "ready\n");
    let read = || -> Vec<u64> {
        std::fs::read_to_string(&pids).unwrap_or_default().lines().filter_map(|line| line.parse().ok()).collect()
    };
    eventually("all four run", || read().len() == 4).await;
    assert!(read().into_iter().all(is_alive));

    let kill = json!({"process": {"pid": id}, "signal": "SIGNAL_SIGKILL"});
    assert_eq!(agent.unary("process.Process/SendSignal", kill.clone()).await.0, StatusCode::OK);
    assert_eq!(events.outcome().await.end, killed("killed"));
    eventually("none of them runs", || !read().into_iter().any(is_alive)).await;

    let (status, error) = agent.unary("process.Process/SendSignal", kill).await;
    assert_eq!((status, &error["code"]), (StatusCode::NOT_FOUND, &json!("not_found")));
    let (_, error) = agent.unary("process.Process/SendSignal", json!({"process": {"tag": "x"}, "signal": 9})).await;
    assert_eq!(error, json!({"code": "not_found", "message": "process with tag x not found"}));
}

#[tokio::test]
async fn terminating_reaches_what_a_shell_waits_for() {
    let Some(agent) = Agent::start().await else { return };
    let mut events = agent.shell("trap 'echo bye; exit 9' TERM; echo ready; sleep 600; true").await;
    let id = events.pid().await;
    assert_eq!(events.stdout().await, "ready\n");
    // A signal between the shell's fork and the exec of `sleep` would be lost on the way.
    eventually("the shell waits for its child", || {
        let children = std::fs::read_to_string(format!("/proc/{id}/task/{id}/children")).unwrap_or_default();
        std::fs::read_to_string(format!("/proc/{}/comm", children.trim())).is_ok_and(|name| name == "sleep\n")
    })
    .await;
    let signal = |signal| json!({"process": {"pid": id}, "signal": signal});
    assert_eq!(agent.unary("process.Process/SendSignal", signal("SIGNAL_SIGTERM")).await.0, StatusCode::OK);
    let outcome = events.outcome().await;
    assert_eq!((outcome.stdout.as_str(), outcome.end), ("bye\n", exit(9)));
    let mut other = agent.shell("sleep 600").await;
    let request = json!({"process": {"pid": other.pid().await}});
    assert_eq!(agent.unary("process.Process/SendSignal", request).await.1["code"], "unimplemented");
}

#[tokio::test]
async fn input_arrives_in_order_and_ends() {
    let Some(agent) = Agent::start().await else { return };
    let gate = agent.text_path("gate");
    let mut request = shell(&format!("cat; while [ ! -e {gate} ]; do sleep 0.01; done; echo done"));
    request["stdin"] = json!(true);
    let mut events = agent.stream("process.Process/Start", request, &[]).await;
    let id = events.pid().await;
    let input = |text: &str| json!({"process": {"pid": id}, "input": {"stdin": STANDARD.encode(text)}});
    for text in ["one\n", "two\n"] {
        assert_eq!(agent.unary("process.Process/SendInput", input(text)).await.0, StatusCode::OK);
    }
    assert_eq!(agent.unary("process.Process/CloseStdin", pid(id)).await.0, StatusCode::OK);
    assert_eq!(agent.unary("process.Process/CloseStdin", pid(id)).await.0, StatusCode::OK, "twice is fine");
    assert_eq!(agent.unary("process.Process/SendInput", input("late")).await.1["code"], "failed_precondition");
    std::fs::write(&gate, "").expect("written");
    let outcome = events.outcome().await;
    assert_eq!((outcome.stdout.as_str(), outcome.end), ("one\ntwo\ndone\n", exit(0)));
    assert_eq!(agent.unary("process.Process/SendInput", input("late")).await.1["code"], "not_found");
}

#[tokio::test]
async fn input_can_be_streamed() {
    let Some(agent) = Agent::start().await else { return };
    let mut request = shell("wc -c");
    request["stdin"] = json!(true);
    let mut events = agent.stream("process.Process/Start", request, &[]).await;
    let id = events.pid().await;
    // More than a pipe holds, so that the stream has to wait for the command.
    let chunk = STANDARD.encode(vec![b'x'; 100_000]);
    let mut messages = vec![json!({"start": {"process": {"pid": id}}}), json!({"keepalive": {}})];
    messages.extend((0..5).map(|_| json!({"data": {"input": {"stdin": chunk}}})));
    let answer = agent.client_stream("process.Process/StreamInput", &messages).await;
    assert_eq!(answer, json!({}));
    agent.unary("process.Process/CloseStdin", pid(id)).await;
    assert_eq!(events.outcome().await.stdout.trim(), "500000");

    let answer = agent.client_stream("process.Process/StreamInput", &messages[2..]).await;
    assert_eq!(answer["code"], "invalid_argument");
}

#[tokio::test]
async fn a_command_without_stdin_takes_no_input() {
    let Some(agent) = Agent::start().await else { return };
    let mut events = agent.shell("cat; sleep 600").await;
    let id = events.pid().await;
    let request = json!({"process": {"pid": id}, "input": {"stdin": STANDARD.encode("x")}});
    let (status, error) = agent.unary("process.Process/SendInput", request).await;
    assert_eq!((status, &error["code"]), (StatusCode::BAD_REQUEST, &json!("failed_precondition")));
    assert_eq!(agent.unary("process.Process/CloseStdin", pid(id)).await.0, StatusCode::OK);
    let pty = json!({"process": {"pid": id}, "input": {"pty": STANDARD.encode("x")}});
    assert_eq!(agent.unary("process.Process/SendInput", pty).await.1["code"], "unimplemented");
    assert_eq!(agent.unary("process.Process/Update", pid(id)).await.1["code"], "unimplemented");
}

#[tokio::test]
async fn the_deadline_kills_the_command() {
    let Some(agent) = Agent::start().await else { return };
    let started = Instant::now();
    let headers = [("connect-timeout-ms", "300")];
    let mut events = agent.stream("process.Process/Start", shell("sleep 600 & sleep 600"), &headers).await;
    let id = events.pid().await;
    let outcome = events.outcome().await;
    assert_eq!(outcome.end["code"], "deadline_exceeded");
    assert!(started.elapsed() >= Duration::from_millis(300));
    eventually("the command is gone", || !is_alive(id)).await;
    let late = agent.stream("process.Process/Connect", pid(id), &[]).await.outcome().await;
    assert_eq!(late.end, killed("killed"));
}

#[tokio::test]
async fn the_deadline_of_a_connect_only_ends_the_connect() {
    let Some(agent) = Agent::start().await else { return };
    let mut events = agent.shell("sleep 600").await;
    let id = events.pid().await;
    let headers = [("connect-timeout-ms", "200")];
    let outcome = agent.stream("process.Process/Connect", pid(id), &headers).await.outcome().await;
    assert_eq!(outcome.end["code"], "deadline_exceeded");
    assert!(is_alive(id));
}

#[tokio::test]
async fn a_child_that_keeps_the_output_open_keeps_the_stream_open() {
    let Some(agent) = Agent::start().await else { return };
    let outcome = agent.run_shell("(sleep 0.3; echo late) & echo early").await;
    assert_eq!((outcome.stdout.as_str(), outcome.end), ("early\nlate\n", exit(0)));

    // One that never lets go is let go of at the deadline, and lives on.
    let pidfile = agent.text_path("pid");
    let script = format!("sh -c 'echo $$ > {pidfile}; while echo tick; do sleep 0.05; done' & sleep 0.1");
    let headers = [("connect-timeout-ms", "500")];
    let outcome = agent.stream("process.Process/Start", shell(&script), &headers).await.outcome().await;
    assert_eq!(outcome.end["code"], "deadline_exceeded");
    let child = std::fs::read_to_string(&pidfile).expect("written").trim().parse().expect("a pid");
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(is_alive(child), "it did not die of a closed pipe");
    rustix::process::kill_process(
        rustix::process::Pid::from_raw(i32::try_from(child).expect("a pid")).expect("not zero"),
        rustix::process::Signal::KILL,
    )
    .expect("killed");
}

#[tokio::test]
async fn quiet_streams_are_kept_alive() {
    let Some(agent) = Agent::start().await else { return };
    let mut events =
        agent.stream("process.Process/Start", shell("sleep 600"), &[("keepalive-ping-interval", "1")]).await;
    events.pid().await;
    for _ in 0..2 {
        assert_eq!(events.next().await, Some(json!({"keepalive": {}})));
    }
}

#[tokio::test]
async fn several_clients_can_follow_one_command() {
    let Some(agent) = Agent::start().await else { return };
    let gate = agent.text_path("gate");
    let mut starter = agent.shell(&format!("while [ ! -e {gate} ]; do sleep 0.01; done; seq 1 1000")).await;
    let id = starter.pid().await;
    let mut followers = Vec::new();
    for _ in 0..4 {
        let mut follower = agent.stream("process.Process/Connect", pid(id), &[]).await;
        follower.pid().await;
        followers.push(follower);
    }
    std::fs::write(&gate, "").expect("written");
    let expected = starter.outcome().await;
    assert_eq!(expected.stdout.lines().count(), 1000);
    for follower in followers {
        assert_eq!(follower.outcome().await, expected);
    }
}

#[tokio::test]
async fn many_commands_run_side_by_side_and_leave_nothing_behind() {
    let Some(agent) = Agent::start().await else { return };
    let pipes = || {
        let links = std::fs::read_dir(format!("/proc/{}/fd", agent.pid())).expect("readable");
        let targets = links.flatten().filter_map(|entry| std::fs::read_link(entry.path()).ok());
        targets.filter(|target| target.to_string_lossy().starts_with("pipe:")).count()
    };
    let before = pipes();
    let runs = (0..60).map(|number| {
        let agent = &agent;
        async move {
            let outcome = agent.run_shell(&format!("sleep 0.05; (sleep 0.1 &) ; echo {number}")).await;
            assert_eq!(outcome.stdout, format!("{number}\n"));
        }
    });
    futures::future::join_all(runs).await;
    let children = || {
        let children = std::fs::read_to_string(format!("/proc/{0}/task/{0}/children", agent.pid()));
        children.expect("readable").split_whitespace().count()
    };
    eventually("every child and every orphan is reaped", || children() == 0).await;
    eventually("every pipe is closed", || pipes() == before).await;
}

#[tokio::test]
async fn when_the_agent_is_told_to_end_its_commands_end_too() {
    let Some(agent) = Agent::start().await else { return };
    let mut events = agent.shell("setsid sleep 600 & sleep 600").await;
    let id = events.pid().await;
    drop(agent);
    eventually("the command is gone", || !is_alive(id)).await;
}

#[tokio::test]
async fn programs_keep_their_own_limit_on_open_files() {
    let Some(agent) = Agent::start().await else { return };
    let own = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
    let own = own.map_or_else(|| "unlimited".to_owned(), |limit| limit.to_string());
    assert_eq!(agent.run_shell("ulimit -n").await.stdout.trim(), own);
}

#[tokio::test]
async fn an_unreadable_home_is_no_working_directory() {
    let Some(agent) = Agent::start().await else { return };
    let closed = agent.path("closed");
    std::fs::create_dir(&closed).expect("created");
    std::fs::set_permissions(&closed, PermissionsExt::from_mode(0o700)).expect("changed");
    let mut request = shell("true");
    request["process"]["cwd"] = json!(closed);
    let authorization = basic("nobody");
    let headers = [("authorization", authorization.as_str())];
    let outcome = agent.stream("process.Process/Start", request, &headers).await.outcome().await;
    assert_eq!(outcome.end["code"], "invalid_argument");
}
