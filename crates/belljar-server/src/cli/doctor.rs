//! `belljar doctor`: everything this machine must have, found or missing, and the command that mends it.

use std::process::ExitCode;

use belljar_runtime::gvisor::release;
use belljar_runtime::host::{self, Finding, Status};
use belljar_runtime::network::NetworkManager;
use clap::Args;
use serde_json::json;

use super::output;
use crate::config::Config;

#[derive(Debug, Args)]
pub(super) struct DoctorArgs {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Exits with failure if anything is missing that sandboxes can't run without.
pub(super) async fn doctor(config: &Config, args: &DoctorArgs) -> anyhow::Result<ExitCode> {
    let mut findings = host::check();
    findings.extend(NetworkManager::check_host(&config.network.for_runtime(&config.instance)?).await);
    findings.push(engine(config));
    findings.push(template(config).await);
    let engine_choice = host::engine_choice();
    let ready = findings.iter().all(|finding| finding.status != Status::Missing);
    if args.json {
        output::json(&json!({"ready": ready, "engine": engine_choice, "findings": findings}))?;
    } else {
        let verdict = if ready { "This machine is ready." } else { "This machine is not ready yet." };
        let lines: String = findings.iter().map(line).collect();
        output::text(&format!("{lines}\nEngine: {engine_choice}.\n{verdict}\n"))?;
    }
    Ok(if ready { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn line(finding: &Finding) -> String {
    let mark = match finding.status {
        Status::Met => "ok      ",
        Status::Advice => "advice  ",
        Status::Missing => "MISSING ",
    };
    let remedy = finding.remedy.as_ref().map_or_else(String::new, |remedy| format!("           → {remedy}\n"));
    format!("  {mark} {}\n{remedy}", finding.what)
}

fn engine(config: &Config) -> Finding {
    let configured = &config.engine.runsc;
    if !configured.as_os_str().is_empty() {
        return if configured.is_file() {
            Finding::met(format!("runsc is configured to be {}", configured.display()))
        } else {
            Finding::missing(
                format!("runsc is configured to be {}, which is not a file", configured.display()),
                "correct `engine.runsc`, or leave it out to have the pinned release fetched",
            )
        };
    }
    match release::present(&config.state_dir.join("engine")) {
        Some(path) => Finding::met(format!("runsc is fetched and verified: {}", path.display())),
        None => Finding::advice("runsc is not fetched yet", "`belljar up` fetches and verifies it"),
    }
}

async fn template(config: &Config) -> Finding {
    let none = || Finding::advice("no template is built yet", "belljar template build base");
    match std::fs::metadata(config.state_dir.join("belljar.db")) {
        Ok(_) => {}
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return none(),
        Err(error) => {
            return Finding::advice(format!("the templates can't be looked at: {error}"), "sudo belljar doctor");
        }
    }
    let names = async {
        let store = belljar_store::Store::open_to_read(&config.state_dir.join("belljar.db")).await?;
        let names: Vec<String> = store.templates().await?.into_iter().map(|template| template.name).collect();
        anyhow::Ok(names)
    };
    match names.await {
        Ok(names) if names.is_empty() => none(),
        Ok(names) => Finding::met(format!("templates are built: {}", names.join(", "))),
        Err(error) => Finding::advice(format!("the templates can't be looked at: {error}"), "sudo belljar doctor"),
    }
}
