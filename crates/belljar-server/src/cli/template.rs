//! `belljar template`: builds and lists what sandboxes start from.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use anyhow::Context;
use belljar_runtime::image::{BuildOptions, Progress};
use clap::{Args, Subcommand};
use serde_json::json;

use super::{ListArgs, open_store, output};
use crate::builder;
use crate::config::Config;

#[derive(Debug, Subcommand)]
pub(super) enum TemplateCommand {
    /// Build a template that belljar ships, from Debian packages (minutes, ~1 GB)
    Build(BuildArgs),
    /// List the templates that sandboxes can be made from
    List(ListArgs),
}

#[derive(Debug, Args)]
pub(super) struct BuildArgs {
    /// Which one
    #[arg(default_value = "base")]
    name: String,
    /// Build anew even if nothing has changed, to get newer packages
    #[arg(long)]
    force: bool,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

pub(super) async fn template(config: &Config, command: TemplateCommand) -> anyhow::Result<()> {
    match command {
        TemplateCommand::Build(args) => build(config, &args).await,
        TemplateCommand::List(args) => list(config, &args).await,
    }
}

async fn build(config: &Config, args: &BuildArgs) -> anyhow::Result<()> {
    let (state, store) = open_store(config).await?;
    let options = build_options(config)?;
    let started = Instant::now();
    let mut report = ProgressReport::new();
    let show = |progress| report.show(&progress);
    let published =
        builder::build_and_publish(&args.name, &state, &store, &options, config.sandbox, args.force, show).await?;
    report.finish();
    let (record, mib) = (&published.record, published.rootfs_bytes / (1024 * 1024));
    if args.json {
        return output::json(&json!({"id": record.id, "name": record.name, "build_id": record.build_id,
            "rootfs_bytes": published.rootfs_bytes, "unchanged": published.unchanged}));
    }
    if published.unchanged {
        println!("Template {} is up to date ({mib} MiB); --force builds it anew.", record.name);
    } else {
        println!("Template {} is ready: {mib} MiB, built in {} s.", record.name, started.elapsed().as_secs());
    }
    Ok(())
}

pub(super) fn build_options(config: &Config) -> anyhow::Result<BuildOptions> {
    let build = &config.template_build;
    let security_mirror = (!build.security_mirror.is_empty()).then_some(&build.security_mirror);
    Ok(BuildOptions {
        mirror: build.mirror.parse().context("`template_build.mirror` can't be used")?,
        security_mirror: security_mirror
            .map(|mirror| mirror.parse())
            .transpose()
            .context("`template_build.security_mirror` can't be used")?,
        host_ca_certificates: build.host_ca_certificates.clone(),
        apt_options: build.apt_options.clone(),
        timeout: Duration::from_secs(build.timeout_s),
    })
}

async fn list(config: &Config, args: &ListArgs) -> anyhow::Result<()> {
    let (_state, store) = open_store(config).await?;
    let templates = store.templates().await?;
    if args.json {
        let rows: Vec<_> = templates
            .iter()
            .map(|template| {
                json!({"id": template.id, "name": template.name, "build_id": template.build_id,
                       "resources": template.resources, "updated_ms": template.updated_ms})
            })
            .collect();
        return output::json(&rows);
    }
    let rows: Vec<[String; 6]> = templates
        .iter()
        .map(|template| {
            let resources = template.resources;
            [
                template.name.clone(),
                template.id.to_string(),
                resources.vcpus.to_string(),
                format!("{} MiB", resources.memory_mib),
                format!("{} MiB", resources.disk_mib),
                output::moment(template.updated_ms),
            ]
        })
        .collect();
    output::table(["NAME", "ID", "CPUS", "MEMORY", "DISK", "BUILT"], &rows)
}

/// One line that moves on a terminal; one line a step elsewhere.
struct ProgressReport {
    is_terminal: bool,
    last_step: Option<&'static str>,
    started: Instant,
}

impl ProgressReport {
    fn new() -> Self {
        Self { is_terminal: std::io::stderr().is_terminal(), last_step: None, started: Instant::now() }
    }

    fn show(&mut self, progress: &Progress) {
        let step = progress.step.describe();
        let is_new = self.last_step.replace(step) != Some(step);
        let seconds = self.started.elapsed().as_secs();
        let mut stderr = std::io::stderr().lock();
        // Progress that can't be shown is no reason to stop a build.
        let _ = if self.is_terminal {
            const WIDTH: usize = 100;
            let line = progress.line.as_deref().unwrap_or_default();
            let text: String =
                format!("{:3}% {seconds:3}s  {step}  {line}", progress.percent).chars().take(WIDTH).collect();
            write!(stderr, "\r\x1b[K{text}").and_then(|()| stderr.flush())
        } else if is_new {
            writeln!(stderr, "{:3}% {seconds:3}s  {step}", progress.percent)
        } else {
            Ok(())
        };
    }

    fn finish(&self) {
        if self.is_terminal {
            let _ = write!(std::io::stderr().lock(), "\r\x1b[K");
        }
    }
}
