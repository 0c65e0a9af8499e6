//! `belljar run FILE`: a fresh sandbox, the file's output and exit code, nothing left.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use belljar_protocol::api::NewSandbox;
use belljar_protocol::client::{Client, ClientError, Command, SandboxClient, Stream};
use clap::Args;
use tokio::signal::unix::{SignalKind, signal};

use super::client::Connection;
use super::sandbox::pair;

/// What a shell answers for a command that a signal ended.
const SIGNALLED: u8 = 128;
const INTERRUPTED: u8 = SIGNALLED + 2;

#[derive(Debug, Args)]
pub(super) struct RunArgs {
    #[command(flatten)]
    connection: Connection,
    /// The file. Its ending says what runs it (.py, .js, .mjs, .sh); otherwise its first line must
    file: PathBuf,
    /// Arguments for the file
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<String>,
    /// Template to start from
    #[arg(long, default_value = "base")]
    template: String,
    /// Seconds until the sandbox is killed, whatever it is doing
    #[arg(long, value_name = "SECONDS", default_value_t = 3600)]
    timeout: i64,
    /// Environment variable as NAME=VALUE; may be repeated
    #[arg(long, value_name = "NAME=VALUE", value_parser = pair)]
    env: Vec<(String, String)>,
}

pub(super) async fn run(args: RunArgs) -> anyhow::Result<ExitCode> {
    let content = std::fs::read(&args.file).with_context(|| format!("{} can't be read", args.file.display()))?;
    let client = args.connection.client()?;
    let request = NewSandbox {
        timeout: Some(args.timeout),
        metadata: Some([("belljar-run".to_owned(), args.file.display().to_string())].into()),
        ..NewSandbox::of(&args.template)
    };
    // Listened for from here on, so that one that comes during the create is not lost: it is acted on right after.
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut hang_up = signal(SignalKind::hangup())?;
    let created = client.create(&request).await?;
    let sandbox = client.sandbox(&created.sandbox_id, created.envd_access_token.as_deref());
    let outcome = tokio::select! {
        outcome = run_in(&sandbox, &args, content) => outcome,
        _ = interrupt.recv() => Ok(ExitCode::from(INTERRUPTED)),
        _ = terminate.recv() => Ok(ExitCode::from(INTERRUPTED)),
        _ = hang_up.recv() => Ok(ExitCode::from(INTERRUPTED)),
    };
    let outcome = explain(&client, &created.sandbox_id, outcome).await;
    remove(&client, &created.sandbox_id).await;
    outcome
}

async fn run_in(sandbox: &SandboxClient, args: &RunArgs, content: Vec<u8>) -> anyhow::Result<ExitCode> {
    let name = args.file.file_name().context("that is not a file")?.to_string_lossy();
    sandbox.write_file(&name, content.into()).await?;
    let path = format!("./{name}");
    let (program, first) = match interpreter(&args.file) {
        Some(interpreter) => (interpreter.to_owned(), vec![path]),
        // The kernel reads the first line; the file only has to be executable.
        None => ("/bin/sh".into(), vec!["-c".into(), "chmod +x \"$0\" && exec \"$0\" \"$@\"".into(), path]),
    };
    let command = Command {
        program,
        arguments: first.into_iter().chain(args.arguments.iter().cloned()).collect(),
        env: args.env.iter().cloned().collect(),
        ..Command::default()
    };
    stream_command(sandbox, &command).await
}

fn interpreter(file: &Path) -> Option<&'static str> {
    match file.extension()?.to_str()? {
        "py" => Some("python3"),
        "js" | "mjs" | "cjs" => Some("node"),
        "sh" | "bash" => Some("bash"),
        _ => None,
    }
}

/// Whatever happened before, the sandbox goes; if even that fails, its deadline ends it.
async fn remove(client: &Client, id: &str) {
    match client.kill(id).await {
        // Its own deadline, or its end for another reason, came first.
        Err(ClientError::Refused { status, .. }) if status.as_u16() == 404 => {}
        Err(error) => eprintln!("The sandbox {id} could not be removed and stays until its deadline: {error}"),
        Ok(()) => {}
    }
}

/// A command that was cut off has a reason, and the sandbox's absence is the likeliest.
pub(super) async fn explain(client: &Client, id: &str, outcome: anyhow::Result<ExitCode>) -> anyhow::Result<ExitCode> {
    let Err(error) = outcome else { return outcome };
    match client.get(id).await {
        Err(ClientError::Refused { status, .. }) if status.as_u16() == 404 => Err(error.context(
            "the sandbox ended meanwhile: killed, past its deadline, or out of memory; the server's log says which",
        )),
        _ => Err(error),
    }
}

/// Runs a command with its output and exit code as this process's own.
pub(super) async fn stream_command(sandbox: &SandboxClient, command: &Command) -> anyhow::Result<ExitCode> {
    let exit = sandbox
        .run(command, |stream, bytes| {
            // A closed pipe, as of `| head`, is no reason to stop the command.
            let _ = match stream {
                Stream::Stdout => {
                    let mut stdout = std::io::stdout().lock();
                    stdout.write_all(bytes).and_then(|()| stdout.flush())
                }
                Stream::Stderr => std::io::stderr().lock().write_all(bytes),
            };
        })
        .await?;
    match u8::try_from(exit.code) {
        Ok(code) => Ok(ExitCode::from(code)),
        Err(_) => {
            eprintln!("The command ended by {}.", exit.status);
            Ok(ExitCode::from(SIGNALLED))
        }
    }
}
