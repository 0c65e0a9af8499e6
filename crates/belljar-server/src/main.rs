//! The `belljar` command: the server, and what its operator needs beside it.

mod agent_binary;
mod api;
mod builder;
mod cli;
mod config;
mod data_plane;
mod lifecycle;
mod serve;
mod state_dir;
mod unread;
mod up;

use std::process::ExitCode;

fn main() -> ExitCode {
    cli::run()
}
