//! The command line. Each command is a module; this one says what they are called and take.

mod client;
mod doctor;
mod key;
mod output;
mod run;
mod sandbox;
mod template;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::{Args, Parser, Subcommand};

use crate::config::Config;
use crate::state_dir::StateDir;
use crate::up;

const EXAMPLES: &str = "\
Examples:
  belljar doctor                     Is this machine ready, and what is missing?
  belljar template build base        Build the template that sandboxes start from (once, minutes).
  belljar up                         Start the server; prints the variables that E2B's SDKs need.
  belljar run script.py              Run a file in a fresh sandbox.

Settings come from --config FILE, are overridden by BELLJAR_* variables (server.listen is
BELLJAR_SERVER_LISTEN), and last by flags.";

/// Runs code that nobody trusts, under glass: the E2B platform as one program on one Linux machine.
#[derive(Debug, Parser)]
#[command(name = "belljar", version, after_help = EXAMPLES, propagate_version = true)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Args)]
struct Global {
    /// Configuration file (TOML)
    #[arg(long, global = true, value_name = "FILE", env = "BELLJAR_CONFIG")]
    config: Option<PathBuf>,
    /// Where belljar keeps its state [default: /var/lib/belljar]
    #[arg(long, global = true, value_name = "DIR")]
    state_dir: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Start the server: API, traffic to sandboxes, and the sandboxes themselves (root)
    Up(UpArgs),
    /// Check everything that this machine must have, and say how to get what is missing
    Doctor(doctor::DoctorArgs),
    /// Create, list, use and kill sandboxes through a running server (needs E2B_API_KEY)
    #[command(subcommand)]
    Sandbox(sandbox::SandboxCommand),
    /// Run a file in a fresh sandbox: its output, its exit code, gone afterwards; without standard input (needs
    /// E2B_API_KEY)
    Run(run::RunArgs),
    /// Create, list and revoke API keys (root, on the server's machine)
    #[command(subcommand)]
    Key(key::KeyCommand),
    /// Build and list templates (root, on the server's machine)
    #[command(subcommand)]
    Template(template::TemplateCommand),
}

#[derive(Debug, Args)]
struct UpArgs {
    /// Address to listen on, for the API and the sandboxes' traffic [default: 127.0.0.1:3000]
    #[arg(long, value_name = "ADDRESS:PORT")]
    listen: Option<SocketAddr>,
    /// End all sandboxes when the server stops; for development. Otherwise they live on and are found again
    #[arg(long)]
    kill_on_exit: bool,
}

/// What every listing of the server's own state takes.
#[derive(Debug, Args)]
struct ListArgs {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Parses the command line and does what it says.
pub(crate) fn run() -> ExitCode {
    let cli = Cli::parse();
    match dispatch(cli) {
        Ok(code) => code,
        Err(failure) => {
            output::failure(&failure);
            ExitCode::FAILURE
        }
    }
}

fn dispatch(cli: Cli) -> anyhow::Result<ExitCode> {
    let config = cli.global.load()?;
    let runtime =
        tokio::runtime::Builder::new_multi_thread().enable_all().build().context("no runtime can be started")?;
    runtime.block_on(async {
        match cli.command {
            Command::Up(args) => up::up(args.apply(config)).await.map(|()| ExitCode::SUCCESS),
            Command::Doctor(args) => doctor::doctor(&config, &args).await,
            Command::Sandbox(command) => sandbox::sandbox(command).await,
            Command::Run(args) => run::run(args).await,
            Command::Key(command) => key::key(&config, command).await.map(|()| ExitCode::SUCCESS),
            Command::Template(command) => template::template(&config, command).await.map(|()| ExitCode::SUCCESS),
        }
    })
}

impl Global {
    fn load(&self) -> anyhow::Result<Config> {
        let variables = std::env::vars_os().filter_map(|(name, _)| name.into_string().ok());
        Config::refuse_unknown_variables(variables)?;
        let mut config = Config::load(self.config.as_deref(), |name| std::env::var(name).ok())?;
        if let Some(directory) = &self.state_dir {
            config.state_dir = std::path::absolute(directory).context("--state-dir is not a path")?;
        }
        Ok(config)
    }
}

impl UpArgs {
    fn apply(self, mut config: Config) -> Config {
        if let Some(listen) = self.listen {
            config.server.listen = listen;
        }
        config.server.kill_on_exit |= self.kill_on_exit;
        config
    }
}

/// Opens the state directory's database for a command that works beside the server.
async fn open_store(config: &Config) -> anyhow::Result<(StateDir, belljar_store::Store)> {
    require_root("it reads and writes the server's own state")?;
    let state = StateDir::open(&config.state_dir)?;
    let store = belljar_store::Store::open(&state.database()).await?;
    Ok((state, store))
}

/// Stops with a sentence if the caller isn't root.
pub(crate) fn require_root(why: &str) -> anyhow::Result<()> {
    if nix::unistd::geteuid().is_root() {
        return Ok(());
    }
    anyhow::bail!("this command has to be run as root, because {why}; try it with sudo")
}
