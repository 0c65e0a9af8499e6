//! Teams and their API keys.

use belljar_core::id::{KeyId, TeamId};
use belljar_core::key::{ApiKey, KeyHash};
use sqlx::Row;
use sqlx::sqlite::SqliteRow;

use crate::{Store, StoreError, corrupt, now_ms};

/// One team.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TeamRecord {
    pub id: TeamId,
    pub name: String,
}

/// What is kept of an API key: never the key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyRecord {
    pub id: KeyId,
    pub team_id: TeamId,
    pub name: String,
    pub mask: String,
    pub created_ms: i64,
    pub revoked_ms: Option<i64>,
}

/// A key just made; the only moment at which its secret exists.
#[derive(Debug)]
pub struct NewKey {
    pub record: KeyRecord,
    pub secret: ApiKey,
}

impl Store {
    /// # Errors
    /// If a team of that name exists, or the database fails.
    pub async fn create_team(&self, name: &str) -> Result<TeamRecord, StoreError> {
        let team = TeamRecord { id: TeamId::generate(), name: name.to_owned() };
        sqlx::query("INSERT INTO teams (id, name, created_ms) VALUES (?, ?, ?)")
            .bind(team.id.as_str())
            .bind(&team.name)
            .bind(now_ms())
            .execute(&self.pool)
            .await
            .map_err(|error| exists(error, "team", name))?;
        Ok(team)
    }

    /// All teams, oldest first.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn teams(&self) -> Result<Vec<TeamRecord>, StoreError> {
        let rows = sqlx::query("SELECT id, name FROM teams ORDER BY created_ms, id").fetch_all(&self.pool).await?;
        rows.iter().map(team_from_row).collect()
    }

    /// # Errors
    /// If the database fails.
    pub async fn team_by_name(&self, name: &str) -> Result<Option<TeamRecord>, StoreError> {
        let row =
            sqlx::query("SELECT id, name FROM teams WHERE name = ?").bind(name).fetch_optional(&self.pool).await?;
        row.as_ref().map(team_from_row).transpose()
    }

    /// Makes a key for a team. Its secret is in the answer and nowhere else.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn create_key(&self, team_id: &TeamId, name: &str) -> Result<NewKey, StoreError> {
        let secret = ApiKey::generate();
        let record = KeyRecord {
            id: KeyId::generate(),
            team_id: team_id.clone(),
            name: name.to_owned(),
            mask: secret.mask(),
            created_ms: now_ms(),
            revoked_ms: None,
        };
        sqlx::query("INSERT INTO api_keys (id, team_id, name, hash, mask, created_ms) VALUES (?, ?, ?, ?, ?, ?)")
            .bind(record.id.as_str())
            .bind(team_id.as_str())
            .bind(name)
            .bind(secret.hash().as_bytes())
            .bind(&record.mask)
            .bind(record.created_ms)
            .execute(&self.pool)
            .await?;
        Ok(NewKey { record, secret })
    }

    /// The team that a key opens, if the key exists and isn't revoked. Never cached, so that a revocation counts from
    /// the next request on.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn team_of_key(&self, hash: &KeyHash) -> Result<Option<TeamRecord>, StoreError> {
        let row = sqlx::query(
            "SELECT teams.id, teams.name FROM api_keys JOIN teams ON teams.id = api_keys.team_id \
             WHERE api_keys.hash = ? AND api_keys.revoked_ms IS NULL",
        )
        .bind(hash.as_bytes())
        .fetch_optional(&self.pool)
        .await?;
        row.as_ref().map(team_from_row).transpose()
    }

    /// All keys, revoked ones too, oldest first.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn keys(&self) -> Result<Vec<KeyRecord>, StoreError> {
        let rows = sqlx::query("SELECT * FROM api_keys ORDER BY created_ms, id").fetch_all(&self.pool).await?;
        rows.iter().map(key_from_row).collect()
    }

    /// Revokes a key; false if there is none of that id, or it was revoked before.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn revoke_key(&self, id: &KeyId) -> Result<bool, StoreError> {
        let done = sqlx::query("UPDATE api_keys SET revoked_ms = ? WHERE id = ? AND revoked_ms IS NULL")
            .bind(now_ms())
            .bind(id.as_str())
            .execute(&self.pool)
            .await?;
        Ok(done.rows_affected() == 1)
    }
}

fn team_from_row(row: &SqliteRow) -> Result<TeamRecord, StoreError> {
    let id: String = row.try_get("id")?;
    Ok(TeamRecord { id: id.parse().map_err(|why| corrupt(format!("team {id}"), why))?, name: row.try_get("name")? })
}

fn key_from_row(row: &SqliteRow) -> Result<KeyRecord, StoreError> {
    let id: String = row.try_get("id")?;
    let team_id: String = row.try_get("team_id")?;
    Ok(KeyRecord {
        id: id.parse().map_err(|why| corrupt(format!("key {id}"), why))?,
        team_id: team_id.parse().map_err(|why| corrupt(format!("key {id}"), why))?,
        name: row.try_get("name")?,
        mask: row.try_get("mask")?,
        created_ms: row.try_get("created_ms")?,
        revoked_ms: row.try_get("revoked_ms")?,
    })
}

/// Tells the violation of a unique name from other failures.
pub(crate) fn exists(error: sqlx::Error, what: &'static str, name: &str) -> StoreError {
    match &error {
        sqlx::Error::Database(database) if database.is_unique_violation() => {
            StoreError::Exists { what, name: name.to_owned() }
        }
        _ => StoreError::Query(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn store() -> (tempfile::TempDir, Store) {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let store = Store::open(&directory.path().join("test.db")).await.expect("a new database opens");
        (directory, store)
    }

    #[tokio::test]
    async fn a_key_opens_its_team_until_revoked() {
        let (_directory, store) = store().await;
        let team = store.create_team("default").await.expect("the name is free");
        let key = store.create_key(&team.id, "first").await.expect("the team exists");
        assert_eq!(store.team_of_key(&key.secret.hash()).await.expect("query"), Some(team));
        assert!(store.revoke_key(&key.record.id).await.expect("query"));
        assert_eq!(store.team_of_key(&key.secret.hash()).await.expect("query"), None);
        assert!(!store.revoke_key(&key.record.id).await.expect("query"), "a second revocation changes nothing");
    }

    #[tokio::test]
    async fn the_file_never_holds_the_secret() {
        let (directory, store) = store().await;
        let team = store.create_team("default").await.expect("the name is free");
        let key = store.create_key(&team.id, "first").await.expect("the team exists");
        store.close().await;
        let secret = key.secret.reveal().as_bytes();
        for entry in std::fs::read_dir(directory.path()).expect("the directory is there") {
            let bytes = std::fs::read(entry.expect("entry").path()).expect("the file is readable");
            assert!(!bytes.windows(secret.len()).any(|window| window == secret));
        }
    }

    #[tokio::test]
    async fn team_names_are_unique() {
        let (_directory, store) = store().await;
        store.create_team("default").await.expect("the name is free");
        assert!(matches!(store.create_team("default").await, Err(StoreError::Exists { .. })));
    }
}
