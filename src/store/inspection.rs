//! The result of inspecting a database. What to make of it is up to `doctor`.

use std::sync::Arc;

use super::{contract::Store, error::StoreError, records::LogHead};

/// The state of a database that servers may be using.
pub struct DatabaseInspection {
    /// The database, named without user and password.
    pub display_name: String,
    /// The newest migration in the database; `None` if Keyward has never used it.
    pub schema_version: Option<i64>,
    /// The newest migration that this program knows.
    pub newest_schema_version: i64,
    /// The facts that only this kind of database has.
    pub kind: DatabaseKind,
    /// The end of the log if its newest part is intact. `None`: not checked, see `schema_version` and `kind`.
    pub log_check: Option<Result<LogHead, StoreError>>,
    /// A store for further reads, if the schema is current.
    pub store: Option<Arc<dyn Store>>,
}

impl std::fmt::Debug for DatabaseInspection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DatabaseInspection").field("database", &self.display_name).finish_non_exhaustive()
    }
}

/// The kind of a database, with what only this kind has.
#[derive(Debug)]
pub enum DatabaseKind {
    /// One SQLite file.
    Sqlite(SqliteFileInfo),
    /// A schema on a PostgreSQL server.
    Postgres(PostgresServerInfo),
}

/// The state of an SQLite file and of its file system.
#[derive(Clone, Debug)]
pub struct SqliteFileInfo {
    /// The permission bits of the file: the lowest nine.
    pub mode: u32,
    /// The size of the file in bytes, without its WAL.
    pub size_bytes: u64,
    /// The free space of its file system in bytes.
    pub free_bytes: u64,
    /// Whether a server owns the file at this moment.
    pub is_owned: bool,
    /// The result of SQLite's integrity check; `None` if the file is too large for one.
    pub integrity_check: Option<Result<(), String>>,
}

/// The settings of a PostgreSQL server that matter for durability.
#[derive(Clone, Debug)]
pub struct PostgresServerInfo {
    /// The setting `server_version_num`.
    pub version_number: i64,
    /// Whether the server is a standby.
    pub in_recovery: bool,
    /// The setting `fsync`, which must be `on`.
    pub fsync: String,
    /// The setting `full_page_writes`, which protects against torn pages.
    pub full_page_writes: String,
    /// The setting `synchronous_commit`, the default of sessions.
    pub synchronous_commit: String,
    /// The setting `synchronous_standby_names`; empty if there is none.
    pub synchronous_standbys: String,
    /// The setting `server_encoding`, which must be `UTF8`.
    pub encoding: String,
    /// Why Keyward would not start on this server, and what to do.
    pub unsuitable_reason: Option<(String, &'static str)>,
}
