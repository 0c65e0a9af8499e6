//! The only SQL of belljar. Everything that must survive a crash goes through here, and a call that returns has been
//! written to disk.

mod keys;
mod sandboxes;
mod templates;

use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePool, SqlitePoolOptions, SqliteSynchronous};

pub use keys::{KeyRecord, NewKey, TeamRecord};
pub use sandboxes::{IdempotentInsert, SandboxRecord};
pub use templates::TemplateRecord;

/// Something went wrong with the database.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("the database can't be opened")]
    Open(#[source] sqlx::Error),
    #[error("the database's tables can't be brought up to date")]
    Migrate(#[source] sqlx::migrate::MigrateError),
    #[error("the database refused a query")]
    Query(#[from] sqlx::Error),
    /// A row says something that this version can't read; it was written by another program or a newer version.
    #[error("the record of {what} can't be read: {why}")]
    Corrupt { what: String, why: String },
    /// The record doesn't stand where the caller believes it to be.
    #[error("sandbox {id} is not being created any more")]
    Conflict { id: String },
    #[error("{what} `{name}` already exists")]
    Exists { what: &'static str, name: String },
}

/// A handle to the database; cheap to clone.
#[derive(Debug, Clone)]
pub struct Store {
    pool: SqlitePool,
}

impl Store {
    /// Opens the SQLite file, makes it if it isn't there, and brings its tables up to date.
    ///
    /// # Errors
    /// If the file can't be opened or was written by a newer version.
    pub async fn open(path: &Path) -> Result<Self, StoreError> {
        let options = SqliteConnectOptions::new()
            .filename(path)
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal)
            // FULL: what was acknowledged survives a power cut, not just a crash of the process.
            .synchronous(SqliteSynchronous::Full)
            .foreign_keys(true)
            // The command line writes to the same file beside a running server.
            .busy_timeout(Duration::from_secs(10));
        let pool = SqlitePoolOptions::new().max_connections(8).connect_with(options).await.map_err(StoreError::Open)?;
        sqlx::migrate!().run(&pool).await.map_err(StoreError::Migrate)?;
        Ok(Self { pool })
    }

    /// Opens an existing database only to read it, beside a running server or without one; changes nothing.
    ///
    /// # Errors
    /// If it isn't there or can't be opened.
    pub async fn open_to_read(path: &Path) -> Result<Self, StoreError> {
        let options = SqliteConnectOptions::new().filename(path).read_only(true).busy_timeout(Duration::from_secs(10));
        let pool = SqlitePoolOptions::new().max_connections(1).connect_with(options).await.map_err(StoreError::Open)?;
        Ok(Self { pool })
    }

    /// Closes all connections and folds the write-ahead log into the file.
    pub async fn close(self) {
        self.pool.close().await;
    }
}

/// The wall clock as the database keeps it.
#[must_use]
pub fn now_ms() -> i64 {
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since_epoch.as_millis()).unwrap_or(i64::MAX)
}

fn corrupt(what: impl Into<String>, why: impl ToString) -> StoreError {
    StoreError::Corrupt { what: what.into(), why: why.to_string() }
}
