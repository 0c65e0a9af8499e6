//! `belljar sandbox`: create, list, use and kill sandboxes through a running server.

use std::collections::BTreeMap;
use std::process::ExitCode;

use belljar_protocol::api::NewSandbox;
use belljar_protocol::client::Command;
use clap::{Args, Subcommand};

use super::client::Connection;
use super::output;
use super::run::{explain, stream_command};

#[derive(Debug, Subcommand)]
pub(super) enum SandboxCommand {
    /// List your running sandboxes
    List(ListArgs),
    /// Create a sandbox and print its id
    Create(CreateArgs),
    /// Run a command in a sandbox; its output and exit code become this command's. It gets no standard input, and goes
    /// on if this is interrupted
    Exec(ExecArgs),
    /// Kill sandboxes
    Kill(KillArgs),
}

#[derive(Debug, Args)]
pub(super) struct ListArgs {
    #[command(flatten)]
    connection: Connection,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
pub(super) struct CreateArgs {
    #[command(flatten)]
    connection: Connection,
    /// Template to start from
    #[arg(default_value = "base")]
    template: String,
    /// Seconds until it is killed
    #[arg(long, value_name = "SECONDS", default_value_t = 300)]
    timeout: i64,
    /// Metadata as KEY=VALUE; may be repeated
    #[arg(long, value_name = "KEY=VALUE", value_parser = pair)]
    metadata: Vec<(String, String)>,
    /// Environment variable as NAME=VALUE; may be repeated
    #[arg(long, value_name = "NAME=VALUE", value_parser = pair)]
    env: Vec<(String, String)>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
pub(super) struct ExecArgs {
    #[command(flatten)]
    connection: Connection,
    /// Id of the sandbox
    id: String,
    /// Run as this user [default: the template's]
    #[arg(long)]
    user: Option<String>,
    /// Run in this directory [default: the user's home]
    #[arg(long)]
    cwd: Option<String>,
    /// Environment variable as NAME=VALUE; may be repeated
    #[arg(long, value_name = "NAME=VALUE", value_parser = pair)]
    env: Vec<(String, String)>,
    /// The command and its arguments, after `--`
    #[arg(required = true, last = true)]
    command: Vec<String>,
}

#[derive(Debug, Args)]
pub(super) struct KillArgs {
    #[command(flatten)]
    connection: Connection,
    /// Ids of the sandboxes
    #[arg(required = true)]
    ids: Vec<String>,
}

/// Reads `KEY=VALUE`.
pub(super) fn pair(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("write it as KEY=VALUE")?;
    if key.is_empty() { Err("the key is empty".into()) } else { Ok((key.to_owned(), value.to_owned())) }
}

pub(super) async fn sandbox(command: SandboxCommand) -> anyhow::Result<ExitCode> {
    match command {
        SandboxCommand::List(args) => list(&args).await.map(|()| ExitCode::SUCCESS),
        SandboxCommand::Create(args) => create(args).await.map(|()| ExitCode::SUCCESS),
        SandboxCommand::Exec(args) => exec(args).await,
        SandboxCommand::Kill(args) => kill(&args).await.map(|()| ExitCode::SUCCESS),
    }
}

async fn list(args: &ListArgs) -> anyhow::Result<()> {
    let sandboxes = args.connection.client()?.list().await?;
    if args.json {
        return output::json(&sandboxes);
    }
    let rows: Vec<[String; 5]> = sandboxes
        .into_iter()
        .map(|sandbox| {
            let metadata: Vec<String> = sandbox.metadata.iter().map(|(key, value)| format!("{key}={value}")).collect();
            [
                sandbox.sandbox_id,
                sandbox.alias,
                output::moment(sandbox.started_at.unix_timestamp() * 1000),
                output::moment(sandbox.end_at.unix_timestamp() * 1000),
                metadata.join(" "),
            ]
        })
        .collect();
    output::table(["ID", "TEMPLATE", "STARTED", "ENDS", "METADATA"], &rows)
}

async fn create(args: CreateArgs) -> anyhow::Result<()> {
    let request = NewSandbox {
        timeout: Some(args.timeout),
        metadata: Some(args.metadata.into_iter().collect()),
        env_vars: Some(args.env.into_iter().collect()),
        ..NewSandbox::of(&args.template)
    };
    let sandbox = args.connection.client()?.create(&request).await?;
    if args.json {
        return output::json(&sandbox);
    }
    println!("{}", sandbox.sandbox_id);
    Ok(())
}

async fn exec(args: ExecArgs) -> anyhow::Result<ExitCode> {
    let client = args.connection.client()?;
    let detail = client.get(&args.id).await?;
    let sandbox = client.sandbox(&args.id, detail.envd_access_token.as_deref());
    let mut words = args.command.into_iter();
    let command = Command {
        program: words.next().unwrap_or_default(),
        arguments: words.collect(),
        env: args.env.into_iter().collect::<BTreeMap<_, _>>(),
        cwd: args.cwd,
        user: args.user,
    };
    explain(&client, &args.id, stream_command(&sandbox, &command).await).await
}

async fn kill(args: &KillArgs) -> anyhow::Result<()> {
    let client = args.connection.client()?;
    for id in &args.ids {
        client.kill(id).await?;
        println!("{id}");
    }
    Ok(())
}
