//! The record of every sandbox: the live ones, from which a restarted server finds them again, and the ended ones.

use std::collections::BTreeMap;

use belljar_core::id::{SandboxId, TeamId, TemplateId};
use belljar_core::key::AccessToken;
use belljar_core::lifecycle::{EndReason, State};
use belljar_core::limits::Resources;
use sqlx::sqlite::SqliteRow;
use sqlx::{Row, Sqlite, Transaction};

use crate::templates::{from_json, json, resources_from_row};
use crate::{Store, StoreError, corrupt, now_ms};

/// How long an idempotency key is remembered.
const IDEMPOTENCY_KEPT_MS: i64 = 24 * 3600 * 1000;

/// How long the record of a sandbox that ended is kept.
const ENDED_KEPT_MS: i64 = 30 * 24 * 3600 * 1000;

/// Everything that must be known of a sandbox after a crash.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SandboxRecord {
    pub id: SandboxId,
    pub team_id: TeamId,
    pub template_id: TemplateId,
    pub template_name: String,
    pub build_id: String,
    pub state: State,
    pub resources: Resources,
    pub metadata: BTreeMap<String, String>,
    pub env: BTreeMap<String, String>,
    pub access_token: Option<AccessToken>,
    /// As asked for; none when it wasn't mentioned.
    pub allow_internet_access: Option<bool>,
    pub started_ms: i64,
    pub deadline_ms: i64,
}

/// What became of an insert that carried an idempotency key.
#[derive(Debug, PartialEq, Eq)]
pub enum IdempotentInsert {
    Inserted,
    /// The same request came before and made this sandbox.
    Repeated(SandboxId),
    /// The key came before with another request.
    Mismatch,
}

impl Store {
    /// Records a sandbox that is about to be created. With `idempotency`, a key and the hash of the request, a second
    /// insert under the same key changes nothing.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn insert_sandbox(
        &self,
        record: &SandboxRecord,
        idempotency: Option<(&str, &[u8])>,
    ) -> Result<IdempotentInsert, StoreError> {
        // IMMEDIATE: two creates with one key at once must see each other.
        let mut transaction = self.pool.begin_with("BEGIN IMMEDIATE").await?;
        if let Some((key, request_hash)) = idempotency {
            let known =
                sqlx::query("SELECT request_hash, sandbox_id FROM idempotency_keys WHERE team_id = ? AND key = ?")
                    .bind(record.team_id.as_str())
                    .bind(key)
                    .fetch_optional(&mut *transaction)
                    .await?;
            if let Some(row) = known {
                return earlier_request(&row, request_hash);
            }
        }
        insert(&mut transaction, record).await?;
        if let Some((key, request_hash)) = idempotency {
            sqlx::query(
                "INSERT INTO idempotency_keys (team_id, key, request_hash, sandbox_id, created_ms) VALUES (?, ?, ?, ?, ?)",
            )
            .bind(record.team_id.as_str())
            .bind(key)
            .bind(request_hash)
            .bind(record.id.as_str())
            .bind(now_ms())
            .execute(&mut *transaction)
            .await?;
        }
        transaction.commit().await?;
        Ok(IdempotentInsert::Inserted)
    }

    /// Records that a sandbox runs, and until when.
    ///
    /// # Errors
    /// [`StoreError::Conflict`] if it isn't being created, or the database fails.
    pub async fn acknowledge_sandbox(&self, id: &SandboxId, deadline_ms: i64) -> Result<(), StoreError> {
        let acknowledge = "UPDATE sandboxes SET state = 'running', deadline_ms = ?1 \
                           WHERE id = ?2 AND (state = 'creating' OR (state = 'running' AND deadline_ms = ?1))";
        let done = sqlx::query(acknowledge).bind(deadline_ms).bind(id.as_str()).execute(&self.pool).await?;
        if done.rows_affected() == 1 { Ok(()) } else { Err(StoreError::Conflict { id: id.to_string() }) }
    }

    /// Records that a sandbox is to be torn down. The first reason stays.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn begin_end(&self, id: &SandboxId, reason: EndReason) -> Result<(), StoreError> {
        sqlx::query(
            "UPDATE sandboxes SET state = 'ending', end_reason = ? WHERE id = ? AND state IN ('creating', 'running')",
        )
        .bind(reason_name(reason))
        .bind(id.as_str())
        .execute(&self.pool)
        .await?;
        Ok(())
    }

    /// Records that nothing of a sandbox is left, and forgets what nobody needs any more: its secrets.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn finish_end(&self, id: &SandboxId, reason: EndReason) -> Result<(), StoreError> {
        sqlx::query(
            "UPDATE sandboxes SET state = 'ended', end_reason = coalesce(end_reason, ?), ended_ms = ?, env = '{}', \
             access_token = NULL WHERE id = ? AND state <> 'ended'",
        )
        .bind(reason_name(reason))
        .bind(now_ms())
        .bind(id.as_str())
        .execute(&self.pool)
        .await?;
        Ok(())
    }

    /// # Errors
    /// If the database fails.
    pub async fn set_deadline(&self, id: &SandboxId, deadline_ms: i64) -> Result<(), StoreError> {
        sqlx::query("UPDATE sandboxes SET deadline_ms = ? WHERE id = ?")
            .bind(deadline_ms)
            .bind(id.as_str())
            .execute(&self.pool)
            .await?;
        Ok(())
    }

    /// Every sandbox that may still hold something on the host, oldest first. A record that can't be read is logged and
    /// left out: it must not keep the others from being found.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn live_sandboxes(&self) -> Result<Vec<SandboxRecord>, StoreError> {
        let rows = sqlx::query("SELECT * FROM sandboxes WHERE state <> 'ended' ORDER BY started_ms, id")
            .fetch_all(&self.pool)
            .await?;
        let readable = |row: &SqliteRow| {
            sandbox_from_row(row)
                .inspect_err(|error| tracing::error!(error = error as &dyn std::error::Error, "a record is left out"))
                .ok()
        };
        Ok(rows.iter().filter_map(readable).collect())
    }

    /// The record of a sandbox, ended ones too.
    ///
    /// # Errors
    /// If the database fails or the record can't be read.
    pub async fn sandbox(&self, id: &SandboxId) -> Result<Option<SandboxRecord>, StoreError> {
        let row =
            sqlx::query("SELECT * FROM sandboxes WHERE id = ?").bind(id.as_str()).fetch_optional(&self.pool).await?;
        row.as_ref().map(sandbox_from_row).transpose()
    }

    /// Lets the idempotency key under which a sandbox was asked for be used again: nobody was given that sandbox.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn release_idempotency_key(&self, id: &SandboxId) -> Result<(), StoreError> {
        sqlx::query("DELETE FROM idempotency_keys WHERE sandbox_id = ?").bind(id.as_str()).execute(&self.pool).await?;
        Ok(())
    }

    /// Forgets idempotency keys after a day, and sandboxes a month after their end.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn forget_what_is_old(&self) -> Result<(), StoreError> {
        let now = now_ms();
        sqlx::query("DELETE FROM idempotency_keys WHERE created_ms < ?")
            .bind(now - IDEMPOTENCY_KEPT_MS)
            .execute(&self.pool)
            .await?;
        sqlx::query("DELETE FROM sandboxes WHERE state = 'ended' AND ended_ms < ?")
            .bind(now - ENDED_KEPT_MS)
            .execute(&self.pool)
            .await?;
        Ok(())
    }

    /// What became of an earlier request under this idempotency key; none if there was none.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn idempotent_request(
        &self,
        team_id: &TeamId,
        key: &str,
        request_hash: &[u8],
    ) -> Result<Option<IdempotentInsert>, StoreError> {
        let row = sqlx::query("SELECT request_hash, sandbox_id FROM idempotency_keys WHERE team_id = ? AND key = ?")
            .bind(team_id.as_str())
            .bind(key)
            .fetch_optional(&self.pool)
            .await?;
        row.as_ref().map(|row| earlier_request(row, request_hash)).transpose()
    }
}

fn earlier_request(row: &SqliteRow, request_hash: &[u8]) -> Result<IdempotentInsert, StoreError> {
    let known_hash: Vec<u8> = row.try_get("request_hash")?;
    if known_hash != request_hash {
        return Ok(IdempotentInsert::Mismatch);
    }
    let id: String = row.try_get("sandbox_id")?;
    let id = id.parse().map_err(|why| corrupt(format!("idempotency key of sandbox {id}"), why))?;
    Ok(IdempotentInsert::Repeated(id))
}

async fn insert(transaction: &mut Transaction<'_, Sqlite>, record: &SandboxRecord) -> Result<(), StoreError> {
    let (state, end_reason) = state_columns(record.state);
    sqlx::query(
        "INSERT INTO sandboxes (id, team_id, template_id, template_name, build_id, state, end_reason, vcpus, memory_mib, \
         disk_mib, processes, metadata, env, access_token, allow_internet_access, started_ms, deadline_ms) \
         VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
    )
    .bind(record.id.as_str())
    .bind(record.team_id.as_str())
    .bind(record.template_id.as_str())
    .bind(&record.template_name)
    .bind(&record.build_id)
    .bind(state)
    .bind(end_reason)
    .bind(record.resources.vcpus)
    .bind(record.resources.memory_mib)
    .bind(record.resources.disk_mib)
    .bind(record.resources.processes)
    .bind(json(&record.metadata))
    .bind(json(&record.env))
    .bind(record.access_token.as_ref().map(AccessToken::reveal))
    .bind(record.allow_internet_access)
    .bind(record.started_ms)
    .bind(record.deadline_ms)
    .execute(&mut **transaction)
    .await?;
    Ok(())
}

fn sandbox_from_row(row: &SqliteRow) -> Result<SandboxRecord, StoreError> {
    let id: String = row.try_get("id")?;
    let what = format!("sandbox {id}");
    let team_id: String = row.try_get("team_id")?;
    let template_id: String = row.try_get("template_id")?;
    Ok(SandboxRecord {
        team_id: team_id.parse().map_err(|why| corrupt(&what, why))?,
        template_id: template_id.parse().map_err(|why| corrupt(&what, why))?,
        template_name: row.try_get("template_name")?,
        build_id: row.try_get("build_id")?,
        state: state_from_columns(row.try_get("state")?, row.try_get("end_reason")?)
            .ok_or_else(|| corrupt(&what, "its state is not known"))?,
        resources: resources_from_row(row)?,
        metadata: from_json(row.try_get("metadata")?, &what)?,
        env: from_json(row.try_get("env")?, &what)?,
        access_token: row.try_get::<Option<String>, _>("access_token")?.map(AccessToken::from_stored),
        allow_internet_access: row.try_get("allow_internet_access")?,
        started_ms: row.try_get("started_ms")?,
        deadline_ms: row.try_get("deadline_ms")?,
        id: id.parse().map_err(|why| corrupt(&what, why))?,
    })
}

fn state_columns(state: State) -> (&'static str, Option<&'static str>) {
    match state {
        State::Creating => ("creating", None),
        State::Running => ("running", None),
        State::Ending(reason) => ("ending", Some(reason_name(reason))),
        State::Ended(reason) => ("ended", Some(reason_name(reason))),
    }
}

fn state_from_columns(state: &str, reason: Option<&str>) -> Option<State> {
    match (state, reason) {
        ("creating", None) => Some(State::Creating),
        ("running", None) => Some(State::Running),
        ("ending", Some(reason)) => Some(State::Ending(reason_from_name(reason)?)),
        ("ended", Some(reason)) => Some(State::Ended(reason_from_name(reason)?)),
        _ => None,
    }
}

const REASONS: [(EndReason, &str); 10] = [
    (EndReason::Killed, "killed"),
    (EndReason::DeadlinePassed, "deadline_passed"),
    (EndReason::CreateFailed, "create_failed"),
    (EndReason::CreateInterrupted, "create_interrupted"),
    (EndReason::OutOfMemory, "out_of_memory"),
    (EndReason::OutOfProcesses, "out_of_processes"),
    (EndReason::EngineFailed, "engine_failed"),
    (EndReason::Exited, "exited"),
    (EndReason::HostRestarted, "host_restarted"),
    (EndReason::ServerStopped, "server_stopped"),
];

fn reason_name(reason: EndReason) -> &'static str {
    REASONS.iter().find(|(known, _)| *known == reason).map(|(_, name)| *name).expect("every reason has a name")
}

fn reason_from_name(name: &str) -> Option<EndReason> {
    REASONS.iter().find(|(_, known)| *known == name).map(|(reason, _)| *reason)
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn store_with_team() -> (tempfile::TempDir, Store, TeamId) {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let store = Store::open(&directory.path().join("test.db")).await.expect("a new database opens");
        let team = store.create_team("default").await.expect("the name is free");
        (directory, store, team.id)
    }

    fn record(team_id: &TeamId) -> SandboxRecord {
        SandboxRecord {
            id: SandboxId::generate(),
            team_id: team_id.clone(),
            template_id: TemplateId::generate(),
            template_name: "base".into(),
            build_id: "build".into(),
            state: State::Creating,
            resources: Resources::default(),
            metadata: BTreeMap::from([("who".into(), "ünïcode \"quoted\"".into())]),
            env: BTreeMap::new(),
            access_token: Some(AccessToken::generate()),
            allow_internet_access: None,
            started_ms: 1_000,
            deadline_ms: 2_000,
        }
    }

    #[tokio::test]
    async fn a_record_comes_back_as_it_was_written_after_reopening() {
        let (directory, store, team) = store_with_team().await;
        let written = record(&team);
        store.insert_sandbox(&written, None).await.expect("insert");
        store.close().await;
        let store = Store::open(&directory.path().join("test.db")).await.expect("the database opens again");
        assert_eq!(store.live_sandboxes().await.expect("query"), vec![written]);
    }

    #[tokio::test]
    async fn every_state_survives_the_database() {
        let (_directory, store, team) = store_with_team().await;
        let state = async |id: &SandboxId| store.sandbox(id).await.expect("query").map(|record| record.state);
        for (reason, _) in REASONS {
            let record = record(&team);
            store.insert_sandbox(&record, None).await.expect("insert");
            store.acknowledge_sandbox(&record.id, 3_000).await.expect("it is being created");
            assert_eq!(state(&record.id).await, Some(State::Running));
            store.begin_end(&record.id, reason).await.expect("update");
            assert_eq!(state(&record.id).await, Some(State::Ending(reason)));
            store.finish_end(&record.id, reason).await.expect("update");
            assert_eq!(state(&record.id).await, Some(State::Ended(reason)));
        }
        assert!(store.live_sandboxes().await.expect("query").is_empty());
    }

    #[tokio::test]
    async fn an_end_keeps_its_first_reason_and_no_secrets() {
        let (_directory, store, team) = store_with_team().await;
        let mut record = record(&team);
        record.env.insert("SECRET".into(), "hunter2".into());
        store.insert_sandbox(&record, None).await.expect("insert");
        store.begin_end(&record.id, EndReason::Killed).await.expect("update");
        store.finish_end(&record.id, EndReason::Exited).await.expect("update");
        let ended = store.sandbox(&record.id).await.expect("query").expect("it is kept");
        assert_eq!(ended.state, State::Ended(EndReason::Killed));
        assert_eq!((ended.access_token, ended.env), (None, BTreeMap::new()));
    }

    #[tokio::test]
    async fn what_has_ended_can_not_be_acknowledged() {
        let (_directory, store, team) = store_with_team().await;
        let record = record(&team);
        store.insert_sandbox(&record, None).await.expect("insert");
        store.acknowledge_sandbox(&record.id, 3_000).await.expect("it is being created");
        store.acknowledge_sandbox(&record.id, 3_000).await.expect("an answer that was lost does no harm");
        store.begin_end(&record.id, EndReason::Killed).await.expect("update");
        let refused = store.acknowledge_sandbox(&record.id, 3_000).await;
        assert!(matches!(refused, Err(StoreError::Conflict { .. })));
    }

    #[tokio::test]
    async fn an_unreadable_record_does_not_hide_the_others() {
        let (_directory, store, team) = store_with_team().await;
        let (damaged, sound) = (record(&team), record(&team));
        for record in [&damaged, &sound] {
            store.insert_sandbox(record, None).await.expect("insert");
        }
        sqlx::query("UPDATE sandboxes SET env = 'damaged' WHERE id = ?")
            .bind(damaged.id.as_str())
            .execute(&store.pool)
            .await
            .expect("update");
        assert_eq!(store.live_sandboxes().await.expect("query"), vec![sound]);
    }

    #[tokio::test]
    async fn one_idempotency_key_makes_one_sandbox() {
        let (_directory, store, team) = store_with_team().await;
        let (first, second) = (record(&team), record(&team));
        let key = Some(("key", b"hash".as_slice()));
        assert_eq!(store.insert_sandbox(&first, key).await.expect("insert"), IdempotentInsert::Inserted);
        assert_eq!(
            store.insert_sandbox(&second, key).await.expect("insert"),
            IdempotentInsert::Repeated(first.id.clone())
        );
        let other = Some(("key", b"other".as_slice()));
        assert_eq!(store.insert_sandbox(&second, other).await.expect("insert"), IdempotentInsert::Mismatch);
        assert_eq!(store.live_sandboxes().await.expect("query").len(), 1);
        store.release_idempotency_key(&first.id).await.expect("delete");
        assert_eq!(store.insert_sandbox(&second, other).await.expect("insert"), IdempotentInsert::Inserted);
    }
}
