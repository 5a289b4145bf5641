//! The embedded store: one SQLite file, owned by one process.
//!
//! WAL with `synchronous=FULL`: what was committed survives a power cut. Ownership is a `flock` on a file next
//! to the database, so that a second server refuses to start while backup tools may still read. One connection
//! writes; a few others read, each seeing whole transactions only. Here: opening, checking and connections; the
//! transactions are in `sqlite_write.rs`, the
//! reads in `sqlite_read.rs`.

use std::{
    fs::{File, OpenOptions},
    io::{Read as _, Seek as _, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use sqlx::{
    Connection as _, Row as _, SqlStr, SqliteConnection, SqlitePool,
    migrate::{MigrateError, Migration, MigrationType, Migrator},
    sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteRow, SqliteSynchronous},
};
use tokio::sync::Mutex;

use crate::domain::{log::GENESIS, time::Revision};

use super::{
    CommitError, Committed, Head, Hour, OpenError, StoreError, UsageBatch, Write,
    rows::{damaged, revision_from_i64, revision_to_i64},
    sqlite_write,
};

/// The first SQLite without the WAL-reset corruption.
const OLDEST_SQLITE: (u32, u32, u32) = (3, 51, 3);
/// How many of the newest log rows a start verifies; all of them is AuditService.Verify's work.
const VERIFY_AT_START: u64 = 100_000;
const READERS: u32 = 4;

/// The migrations, oldest first. Never edited once released.
fn migrations() -> Vec<Migration> {
    [
        (1, "start", SqlStr::from_static(include_str!("migrations/sqlite/0001_start.sql"))),
        (2, "people", SqlStr::from_static(include_str!("migrations/sqlite/0002_people.sql"))),
    ]
    .into_iter()
    .map(|(version, name, sql)| Migration::new(version, name.into(), MigrationType::Simple, sql, false))
    .collect()
}

/// The store in one SQLite file.
pub struct Sqlite {
    writer: Mutex<Option<SqliteConnection>>,
    options: SqliteConnectOptions,
    pub(super) readers: SqlitePool,
    /// Held until the process ends; the lock goes with it.
    _lock: File,
}

impl std::fmt::Debug for Sqlite {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sqlite").field("file", &self.options.get_filename()).finish_non_exhaustive()
    }
}

impl Sqlite {
    /// Opens or makes the file at `path`, takes ownership, migrates and checks it.
    ///
    /// # Errors
    /// When it is in use, damaged, newer than this program, or cannot be opened.
    pub async fn open(path: &str) -> Result<Sqlite, OpenError> {
        let other = |source: Box<dyn std::error::Error + Send + Sync>| OpenError::Other {
            path: path.to_owned(),
            source,
        };
        let lock = own(Path::new(path))?;
        let options = SqliteConnectOptions::new()
            .filename(path)
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Full)
            .foreign_keys(true)
            .busy_timeout(Duration::from_secs(5))
            .statement_cache_capacity(64);
        let mut writer =
            SqliteConnection::connect_with(&options).await.map_err(|error| open_error(path, error))?;
        check_version(&mut writer).await?;
        check_whole(path, &mut writer).await?;
        migrate(path, &mut writer).await?;
        check_log(path, &mut writer).await?;
        let readers = SqlitePoolOptions::new()
            .max_connections(READERS)
            .acquire_timeout(Duration::from_secs(5))
            .connect_with(options.clone().create_if_missing(false).pragma("query_only", "on"))
            .await
            .map_err(|error| other(error.into()))?;
        Ok(Sqlite { writer: Mutex::new(Some(writer)), options, readers, _lock: lock })
    }

    /// Runs `work` on the writing connection, opening it again after a fault.
    async fn writing<T>(
        &self,
        work: impl AsyncFnOnce(&mut SqliteConnection) -> Result<T, sqlx::Error>,
    ) -> Result<T, sqlx::Error> {
        let mut slot = self.writer.lock().await;
        if self.readers.is_closed() {
            return Err(sqlx::Error::PoolClosed);
        }
        let mut connection = match slot.take() {
            Some(connection) => connection,
            None => SqliteConnection::connect_with(&self.options).await?,
        };
        let result = work(&mut connection).await;
        if result.is_ok() {
            *slot = Some(connection);
        } else {
            // Whatever state the fault left it in, a new connection begins afresh.
            let _ = connection.close_hard().await;
        }
        result
    }

    pub(super) async fn commit_batch(&self, batch: &[Write]) -> Result<Committed, CommitError> {
        let mut committing = false;
        let result = self
            .writing(async |connection| {
                sqlx::query("BEGIN IMMEDIATE").execute(&mut *connection).await?;
                let committed = sqlite_write::batch(connection, batch).await?;
                if committed.rows.is_empty() {
                    sqlx::query("ROLLBACK").execute(&mut *connection).await?;
                } else {
                    committing = true;
                    sqlx::query("COMMIT").execute(&mut *connection).await?;
                }
                Ok(committed)
            })
            .await;
        match result {
            Ok(committed) => Ok(committed),
            // Without room the commit's last frame is not in the WAL, and without that nothing of it counts.
            Err(error) if committing && primary_code(&error) != Some(SQLITE_FULL) => {
                Err(CommitError::Unknown(store_error(error)))
            }
            Err(error) => Err(CommitError::NotRecorded(store_error(error))),
        }
    }

    pub(super) async fn write_usage(&self, batch: &UsageBatch) -> Result<(), StoreError> {
        self.writing(async |connection| {
            sqlx::query("BEGIN IMMEDIATE").execute(&mut *connection).await?;
            sqlite_write::usage(connection, batch).await?;
            sqlx::query("COMMIT").execute(&mut *connection).await.map(drop)
        })
        .await
        .map_err(store_error)
    }

    pub(super) async fn drop_usage(&self, before: Hour) -> Result<(), StoreError> {
        self.writing(async |connection| {
            sqlx::query("DELETE FROM usage WHERE hour < ?1")
                .bind(before.0)
                .execute(connection)
                .await
                .map(drop)
        })
        .await
        .map_err(store_error)
    }

    pub(super) async fn shut(&self) {
        self.readers.close().await;
        if let Some(connection) = self.writer.lock().await.take() {
            // Folds the WAL into the file; if that fails the next start does it.
            if let Err(error) = connection.close().await {
                tracing::warn!(error = &error as &dyn std::error::Error, "closing the database failed");
            }
        }
    }
}

/// Takes ownership of the database file, or says who has it.
fn own(path: &Path) -> Result<File, OpenError> {
    let shown = path.display().to_string();
    let other = |error: std::io::Error| OpenError::Other { path: shown.clone(), source: error.into() };
    // The same file under another name is the same file. It is made first, where it is missing: a link to
    // nothing yet leads nowhere. It holds digests and names: it is for its owner alone.
    OpenOptions::new().append(true).create(true).mode(0o600).open(path).map_err(other)?;
    let real = path.canonicalize().map_err(other)?;
    let mut name = real.into_os_string();
    name.push("-lock");
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(PathBuf::from(name))
        .map_err(other)?;
    match file.try_lock() {
        Ok(()) => {
            let note = format!("{}\n", std::process::id());
            file.set_len(0).and_then(|()| file.write_all(note.as_bytes())).map_err(other)?;
            Ok(file)
        }
        Err(std::fs::TryLockError::WouldBlock) => {
            let mut note = String::new();
            let _ = file.rewind().and_then(|()| file.read_to_string(&mut note));
            let owner = note.trim().parse::<u32>().map(|id| format!(" (process {id})")).unwrap_or_default();
            Err(OpenError::Locked { path: shown, owner })
        }
        Err(std::fs::TryLockError::Error(error)) => Err(other(error)),
    }
}

async fn check_version(connection: &mut SqliteConnection) -> Result<(), OpenError> {
    let found: String = sqlx::query_scalar("SELECT sqlite_version()")
        .fetch_one(connection)
        .await
        .map_err(|error| open_error("SQLite", error))?;
    if version_at_least(&found, OLDEST_SQLITE) { Ok(()) } else { Err(OpenError::OldSqlite { found }) }
}

fn version_at_least(found: &str, least: (u32, u32, u32)) -> bool {
    let mut parts = found.split('.').map(|part| part.parse::<u32>().unwrap_or(0));
    let mut next = || parts.next().unwrap_or(0);
    (next(), next(), next()) >= least
}

/// The file's structure: SQLite's own check, with every index held against its table. The quick one leaves the
/// indices out, and a List or a name would be looked up in one that has lost entries.
async fn check_whole(path: &str, connection: &mut SqliteConnection) -> Result<(), OpenError> {
    let found: String = sqlx::query_scalar("PRAGMA integrity_check(1)")
        .fetch_one(connection)
        .await
        .map_err(|error| open_error(path, error))?;
    if found == "ok" { Ok(()) } else { Err(OpenError::Damaged { path: path.to_owned(), what: found }) }
}

async fn migrate(path: &str, connection: &mut SqliteConnection) -> Result<(), OpenError> {
    let migrations = migrations();
    let known = migrations.iter().map(|migration| migration.version).max().unwrap_or(0);
    match Migrator::with_migrations(migrations).run(&mut *connection).await {
        Ok(()) => {}
        Err(MigrateError::VersionMissing(found)) => {
            return Err(OpenError::NewerSchema { path: path.to_owned(), found, known });
        }
        Err(MigrateError::VersionMismatch(version) | MigrateError::Dirty(version)) => {
            return Err(OpenError::Damaged {
                path: path.to_owned(),
                what: format!("migration {version} is not the one that this keyward knows"),
            });
        }
        Err(error) => {
            return Err(OpenError::Other { path: path.to_owned(), source: error.into() });
        }
    }
    sqlx::query("INSERT OR IGNORE INTO meta VALUES (1, randomblob(16), 1, 0, ?1)")
        .bind(GENESIS.as_slice())
        .execute(connection)
        .await
        .map(drop)
        .map_err(|error| open_error(path, error))
}

/// The end of the log: the newest rows form a chain that ends where `meta` says.
async fn check_log(path: &str, connection: &mut SqliteConnection) -> Result<(), OpenError> {
    let broken = |what: String| OpenError::Damaged { path: path.to_owned(), what };
    let failed = |error: sqlx::Error| open_error(path, error);
    let head = read_head(connection).await.map_err(failed)?;
    let start = Revision(head.revision.0.saturating_sub(VERIFY_AT_START));
    let mut last = if start == Revision(0) {
        Head { revision: start, hash: GENESIS }
    } else {
        let found = sqlx::query("SELECT hash FROM log WHERE revision = ?1")
            .bind(revision_to_i64(start))
            .fetch_optional(&mut *connection)
            .await
            .map_err(failed)?;
        let row = found.ok_or_else(|| broken(format!("the log has no entry {start}")))?;
        Head { revision: start, hash: hash_at(&row, 0).map_err(failed)? }
    };
    loop {
        let rows = super::sqlite_read::log_after(&mut *connection, last.revision, 1000)
            .await
            .map_err(|error| broken(error.to_string()))?;
        for row in &rows {
            if !row.follows(last.revision, &last.hash) {
                return Err(broken(format!("the log's hash chain breaks at entry {}", last.revision.next())));
            }
            last = Head { revision: row.revision, hash: row.hash };
        }
        if rows.is_empty() {
            break;
        }
    }
    if last == head {
        Ok(())
    } else {
        Err(broken(format!("the log ends at {}, and should end at {}", last.revision, head.revision)))
    }
}

pub(super) async fn read_head(connection: &mut SqliteConnection) -> Result<Head, sqlx::Error> {
    let row = sqlx::query("SELECT head, head_hash FROM meta").fetch_one(connection).await?;
    Ok(Head { revision: revision_from_i64(row.try_get(0)?), hash: hash_at(&row, 1)? })
}

pub(super) fn hash_at(row: &SqliteRow, column: usize) -> Result<[u8; 32], sqlx::Error> {
    let bytes: &[u8] = row.try_get(column)?;
    bytes.try_into().map_err(|_| sqlx::Error::Decode("a hash is not 32 bytes".into()))
}

/// SQLite's primary result code.
fn primary_code(error: &sqlx::Error) -> Option<u32> {
    let code = error.as_database_error()?.code()?.parse::<u32>().ok()?;
    Some(code & 0xff)
}

const SQLITE_CORRUPT: u32 = 11;
const SQLITE_FULL: u32 = 13;
const SQLITE_NOTADB: u32 = 26;

pub(super) fn store_error(error: sqlx::Error) -> StoreError {
    match primary_code(&error) {
        Some(SQLITE_FULL) => StoreError::Full(error.into()),
        Some(SQLITE_CORRUPT | SQLITE_NOTADB) => damaged("the database file", error),
        _ => StoreError::Unavailable(error.into()),
    }
}

fn open_error(path: &str, error: sqlx::Error) -> OpenError {
    match primary_code(&error) {
        Some(SQLITE_CORRUPT | SQLITE_NOTADB) => {
            OpenError::Damaged { path: path.to_owned(), what: error.to_string() }
        }
        _ => OpenError::Other { path: path.to_owned(), source: error.into() },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_sqlite_without_the_wal_reset_corruption_is_accepted() {
        for (version, good) in [
            ("3.51.3", true),
            ("3.52.0", true),
            ("4.0", true),
            ("3.51.2", false),
            ("3.6.20", false),
            ("x", false),
        ] {
            assert_eq!(version_at_least(version, OLDEST_SQLITE), good, "{version}");
        }
    }
}
