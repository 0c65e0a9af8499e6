//! The init of a sandbox. Runs its commands and serves its files to E2B's SDKs, speaking envd's protocol.
//!
//! A static binary without libc's name services: everything it needs of the sandbox's file system is `/proc` and
//! `/etc/passwd`.

mod auth;
mod connect_errors;
mod control;
mod error;
mod files;
mod filesystem;
mod init;
mod metrics;
mod paths;
mod process;
mod routes;
mod server;
mod state;
mod sudo;
mod system;
mod users;

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::process::ExitCode;

use anyhow::{Context, bail};
use belljar_protocol::envd::{ENVD_PORT, ENVD_VERSION};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};

use crate::filesystem::FilesystemService;
use crate::process::{Children, ProcessLimit, ProcessService};
use crate::state::Sandbox;

const USAGE: &str = "\
The init of a belljar sandbox: runs commands and serves files to E2B's SDKs.

Usage: belljar-agent [--listen ADDRESS:PORT] [--nameserver ADDRESS] [--processes COUNT] [--sudo]

Options:
  --listen ADDRESS:PORT  where to listen [default: 0.0.0.0:49983]
  --nameserver ADDRESS   set up the system first: /proc, hosts, host name, and this resolver
  --processes COUNT      how many processes and threads all commands together may have, root's too
  --sudo                 run sudo for the user whom the template entitles, on engines that ignore set-user-ID bits
  --version              print the agent's version and the envd version it answers to
  --help                 print this
";

/// Threads for file operations. They end when idle.
const BLOCKING_THREADS: usize = 16;

/// Deep enough for a file operation, and little enough to keep sixteen of them small.
const THREAD_STACK_BYTES: usize = 512 << 10;

#[derive(Debug, PartialEq, Eq)]
enum Invocation {
    Run(Options),
    Print(String),
}

#[derive(Debug, PartialEq, Eq)]
struct Options {
    listen: SocketAddr,
    nameserver: Option<IpAddr>,
    processes: Option<u32>,
    sudo: bool,
}

fn main() -> ExitCode {
    if sudo::is_client(std::env::args_os().next().as_deref()) {
        return sudo::run_client();
    }
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("belljar-agent: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> anyhow::Result<()> {
    let options = match parse(std::env::args().skip(1))? {
        Invocation::Run(options) => options,
        Invocation::Print(text) => {
            print!("{text}");
            return Ok(());
        }
    };
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_max_level(tracing::Level::INFO)
        .with_target(false)
        .with_ansi(false)
        .init();
    if let Some(nameserver) = options.nameserver {
        system::set_up(nameserver).context("could not set up the system")?;
    }
    let limit = options.processes.map(ProcessLimit::new).transpose().context("could not limit the processes")?;
    let open_files = init::become_init().context("could not become init")?;
    // One thread for the sandbox's traffic: an idle agent costs next to nothing, and what blocks has its own.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(BLOCKING_THREADS)
        .thread_stack_size(THREAD_STACK_BYTES)
        .build()
        .context("could not start the runtime")?;
    let served = runtime.block_on(serve(options, limit, open_files));
    // A file operation that hangs must not hold up the end.
    runtime.shutdown_background();
    served
}

async fn serve(
    options: Options,
    limit: Option<ProcessLimit>,
    open_files: rustix::process::Rlimit,
) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let sandbox = Sandbox::new();
    let children = Children::start(limit).context("could not start the thread for child processes")?;
    let processes = ProcessService::new(sandbox.clone(), children.clone(), open_files);
    let filesystem = FilesystemService::new(sandbox.clone(), children.clone());
    let sudo = if options.sudo { start_sudo(&sandbox, children, open_files) } else { None };
    let router = routes::router(sandbox, processes.clone(), filesystem);

    let listener = TcpListener::bind(options.listen).await;
    let listener = listener.with_context(|| format!("could not listen on {}", options.listen))?;
    tracing::info!(address = %listener.local_addr()?, envd_version = ENVD_VERSION, "listening");
    tokio::select! {
        never = server::serve(listener, router) => match never {},
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    processes.kill_all().await;
    if let Some(sudo) = sudo {
        sudo.kill_all().await;
    }
    Ok(())
}

/// A sandbox is of use without it, so that a failure is only worth a line.
fn start_sudo(sandbox: &Sandbox, children: Children, open_files: rustix::process::Rlimit) -> Option<sudo::Broker> {
    let started = sudo::Broker::start(children, sandbox.users.clone(), open_files);
    started.unwrap_or_else(|error| {
        tracing::error!("sudo will not work: {:#}", anyhow::Error::from(error));
        None
    })
}

fn parse(mut arguments: impl Iterator<Item = String>) -> anyhow::Result<Invocation> {
    let listen = SocketAddr::from((Ipv4Addr::UNSPECIFIED, ENVD_PORT));
    let mut options = Options { listen, nameserver: None, processes: None, sudo: false };
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--listen" => {
                let address = arguments.next().context("--listen needs an ADDRESS:PORT")?;
                options.listen = address.parse().with_context(|| format!("'{address}' is not an ADDRESS:PORT"))?;
            }
            "--nameserver" => {
                let address = arguments.next().context("--nameserver needs an ADDRESS")?;
                options.nameserver = Some(address.parse().with_context(|| format!("'{address}' is not an ADDRESS"))?);
            }
            "--processes" => {
                let count = arguments.next().context("--processes needs a COUNT")?;
                options.processes = Some(count.parse().with_context(|| format!("'{count}' is not a COUNT"))?);
            }
            "--sudo" => options.sudo = true,
            "--version" => {
                let version = env!("CARGO_PKG_VERSION");
                return Ok(Invocation::Print(format!("belljar-agent {version} (envd {ENVD_VERSION})\n")));
            }
            "--help" | "-h" => return Ok(Invocation::Print(USAGE.to_owned())),
            other => bail!("unknown argument '{other}'; see --help"),
        }
    }
    Ok(Invocation::Run(options))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(arguments: &[&str]) -> anyhow::Result<Invocation> {
        parse(arguments.iter().map(|argument| (*argument).to_owned()))
    }

    #[test]
    fn arguments_are_understood_or_refused() {
        let default = "0.0.0.0:49983".parse().expect("an address");
        assert_eq!(
            parsed(&[]).expect("valid"),
            Invocation::Run(Options { listen: default, nameserver: None, processes: None, sudo: false })
        );
        let given = "127.0.0.1:0".parse().expect("an address");
        let resolver = "10.0.0.1".parse().expect("an address");
        assert_eq!(
            parsed(&["--listen", "127.0.0.1:0", "--nameserver", "10.0.0.1", "--processes", "7", "--sudo"])
                .expect("valid"),
            Invocation::Run(Options { listen: given, nameserver: Some(resolver), processes: Some(7), sudo: true })
        );
        assert!(matches!(parsed(&["--version"]), Ok(Invocation::Print(text)) if text.contains(ENVD_VERSION)));
        for wrong in [
            &["--listen"][..],
            &["--nameserver"],
            &["--nameserver", "here"],
            &["--processes", "-1"],
            &["--listen", "here"],
            &["--port", "1"],
            &["x"],
        ] {
            assert!(parsed(wrong).is_err(), "{wrong:?}");
        }
    }
}
