//! `belljar key`: the API keys, straight from the server's database, so that it works whether or not a server runs.

use anyhow::Context;
use belljar_core::id::KeyId;
use belljar_store::{KeyRecord, Store, TeamRecord};
use clap::{Args, Subcommand};
use serde_json::json;

use super::{ListArgs, open_store, output};
use crate::config::Config;
use crate::up::FIRST_TEAM;

#[derive(Debug, Subcommand)]
pub(super) enum KeyCommand {
    /// Make a key and show it, this once
    Create(CreateArgs),
    /// List all keys, without their secrets
    List(ListArgs),
    /// Revoke a key; it is refused from the next request on
    Revoke(RevokeArgs),
}

#[derive(Debug, Args)]
pub(super) struct CreateArgs {
    /// What the key is for
    #[arg(long, default_value = "key")]
    name: String,
    /// The team it opens; made if there is none of that name
    #[arg(long, default_value = FIRST_TEAM)]
    team: String,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
pub(super) struct RevokeArgs {
    /// Id of the key, as `belljar key list` shows it
    id: String,
}

pub(super) async fn key(config: &Config, command: KeyCommand) -> anyhow::Result<()> {
    let (_state, store) = open_store(config).await?;
    match command {
        KeyCommand::Create(args) => create(&store, &args).await,
        KeyCommand::List(args) => list(&store, &args).await,
        KeyCommand::Revoke(args) => revoke(&store, &args).await,
    }
}

async fn create(store: &Store, args: &CreateArgs) -> anyhow::Result<()> {
    anyhow::ensure!(!args.team.trim().is_empty(), "a team needs a name");
    let team = match store.team_by_name(&args.team).await? {
        Some(team) => team,
        None => store.create_team(&args.team).await?,
    };
    let key = store.create_key(&team.id, &args.name).await?;
    if args.json {
        return output::json(
            &json!({"id": key.record.id, "key": key.secret.reveal(), "name": key.record.name, "team": team.name}),
        );
    }
    println!("{}", key.secret.reveal());
    eprintln!("Key {} of team {}. It is shown this once; only its hash is kept.", key.record.id, team.name);
    Ok(())
}

async fn list(store: &Store, args: &ListArgs) -> anyhow::Result<()> {
    let teams = store.teams().await?;
    let keys = store.keys().await?;
    if args.json {
        let rows: Vec<_> = keys
            .iter()
            .map(|key| {
                json!({"id": key.id, "name": key.name, "team": team_name(&teams, key), "mask": key.mask,
                       "created_ms": key.created_ms, "revoked_ms": key.revoked_ms})
            })
            .collect();
        return output::json(&rows);
    }
    let rows: Vec<[String; 6]> = keys
        .iter()
        .map(|key| {
            let state = key.revoked_ms.map_or_else(|| "valid".into(), |at| format!("revoked {}", output::moment(at)));
            [
                key.id.to_string(),
                key.name.clone(),
                team_name(&teams, key),
                key.mask.clone(),
                output::moment(key.created_ms),
                state,
            ]
        })
        .collect();
    output::table(["ID", "NAME", "TEAM", "KEY", "CREATED", "STATE"], &rows)
}

fn team_name(teams: &[TeamRecord], key: &KeyRecord) -> String {
    teams.iter().find(|team| team.id == key.team_id).map_or_else(String::new, |team| team.name.clone())
}

async fn revoke(store: &Store, args: &RevokeArgs) -> anyhow::Result<()> {
    let id: KeyId = args.id.parse().context("that is not a key's id; `belljar key list` shows them")?;
    anyhow::ensure!(store.revoke_key(&id).await?, "there is no valid key {id}; `belljar key list` shows them");
    println!("Key {id} is revoked.");
    Ok(())
}
