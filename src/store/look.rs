//! What is to be seen of a database that servers run on: nothing is migrated, owned or changed. What to make of it is
//! `doctor`'s business.

use std::sync::Arc;

use super::{Head, OpenError, Store, StoreError, postgres, sqlite};

/// What is to be seen of a database.
pub struct Seen {
    /// Its name for people, without user and password.
    pub shown: String,
    /// The newest migration that it has had; None = no Keyward has used it.
    pub schema: Option<i64>,
    /// The newest migration that this program knows.
    pub known: i64,
    /// What holds for its kind alone.
    pub kind: Kind,
    /// Where its log ends, when the newest part of that is whole. None = it was not looked at: see `schema`, `kind`.
    pub log: Option<Result<Head, StoreError>>,
    /// For further questions, where there may be any.
    pub store: Option<Arc<dyn Store>>,
}

impl std::fmt::Debug for Seen {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Seen").field("database", &self.shown).finish_non_exhaustive()
    }
}

/// What holds for one kind of database.
#[derive(Debug)]
pub enum Kind {
    /// One file.
    Sqlite(FileFacts),
    /// A server.
    Postgres(ServerFacts),
}

/// What a file shows.
#[derive(Clone, Debug)]
pub struct FileFacts {
    /// Its permissions: the lowest nine bits.
    pub mode: u32,
    /// Its size in bytes.
    pub bytes: u64,
    /// What is free on its file system, in bytes.
    pub free: u64,
    /// Whether a server has it.
    pub owned: bool,
    /// What its own check found, where the file is small enough for it to be made.
    pub structure: Option<Result<(), String>>,
}

/// What a server says of itself.
#[derive(Clone, Debug)]
pub struct ServerFacts {
    /// `server_version_num`.
    pub version: i64,
    /// Whether it is a standby.
    pub in_recovery: bool,
    /// `fsync`.
    pub fsync: String,
    /// `full_page_writes`.
    pub full_page_writes: String,
    /// `synchronous_commit`, the default of sessions.
    pub synchronous_commit: String,
    /// `synchronous_standby_names`.
    pub standbys: String,
    /// `server_encoding`.
    pub encoding: String,
    /// Why no server would start on it, and what to do.
    pub objection: Option<(String, &'static str)>,
}

/// Looks at the database that `url` names.
///
/// # Errors
/// When it cannot be reached, or the URL names none.
pub async fn look(url: &str) -> Result<Seen, OpenError> {
    match url.split_once(':') {
        Some(("sqlite", path)) => sqlite::look(path.strip_prefix("//").unwrap_or(path)).await,
        _ => postgres::look(url).await,
    }
}
