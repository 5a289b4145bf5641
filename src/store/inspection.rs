//! What is to be seen of a database that servers run on: nothing is migrated, owned or changed. What to make of it is
//! `doctor`'s business.

use std::sync::Arc;

use super::{contract::Store, error::StoreError, records::LogHead};

/// What is to be seen of a database.
pub struct DatabaseInspection {
    /// Its name for people, without user and password.
    pub display_name: String,
    /// The newest migration that it has had; None = no Keyward has used it.
    pub schema_version: Option<i64>,
    /// The newest migration that this program knows.
    pub newest_schema_version: i64,
    /// What holds for its kind alone.
    pub kind: DatabaseKind,
    /// Where its log ends, when the newest part of that is whole. None = it was not looked at: see `schema`, `kind`.
    pub log_check: Option<Result<LogHead, StoreError>>,
    /// For further questions, where there may be any.
    pub store: Option<Arc<dyn Store>>,
}

impl std::fmt::Debug for DatabaseInspection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DatabaseInspection").field("database", &self.display_name).finish_non_exhaustive()
    }
}

/// What holds for one kind of database.
#[derive(Debug)]
pub enum DatabaseKind {
    /// One file.
    Sqlite(SqliteFileInfo),
    /// A server.
    Postgres(PostgresServerInfo),
}

/// What a file shows.
#[derive(Clone, Debug)]
pub struct SqliteFileInfo {
    /// Its permissions: the lowest nine bits.
    pub mode: u32,
    /// Its size in bytes.
    pub size_bytes: u64,
    /// What is free on its file system, in bytes.
    pub free_bytes: u64,
    /// Whether a server has it.
    pub is_owned: bool,
    /// What its own check found, where the file is small enough for it to be made.
    pub integrity_check: Option<Result<(), String>>,
}

/// What a server says of itself.
#[derive(Clone, Debug)]
pub struct PostgresServerInfo {
    /// `server_version_num`.
    pub version_number: i64,
    /// Whether it is a standby.
    pub in_recovery: bool,
    /// `fsync`.
    pub fsync: String,
    /// `full_page_writes`.
    pub full_page_writes: String,
    /// `synchronous_commit`, the default of sessions.
    pub synchronous_commit: String,
    /// `synchronous_standby_names`.
    pub synchronous_standbys: String,
    /// `server_encoding`.
    pub encoding: String,
    /// Why no server would start on it, and what to do.
    pub unsuitable_reason: Option<(String, &'static str)>,
}
