//! The embedded store: one SQLite file, owned by one process.
//!
//! WAL with `synchronous=FULL`: what was committed survives a power cut. Ownership is a `flock` on a file next
//! to the database, so that a second server refuses to start while backup tools may still read. One connection
//! writes; a few others read, each seeing whole transactions only. Here: opening, checking and writing; the
//! reads are in `sqlite_read.rs`.

use std::{
    fs::{File, OpenOptions},
    io::{Read as _, Seek as _, Write as _},
    path::{Path, PathBuf},
    time::Duration,
};

use sqlx::{
    Connection as _, Row as _, SqliteConnection, SqlitePool,
    migrate::{MigrateError, Migration, MigrationType, Migrator},
    sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteRow, SqliteSynchronous},
};
use tokio::sync::Mutex;

use crate::domain::{
    account::Account,
    key::Key,
    log::{Change, GENESIS, LogRow},
    name::KeyId,
    time::Revision,
};

use super::{
    CommitError, Committed, Head, IDEMPOTENCY_WINDOW, OpenError, Outcome, Rejection, StoreError, UsedSecret,
    Write,
    rows::{KeyRow, account_sum, damaged, revision_from_i64, revision_to_i64, secret_sum},
};

/// The first SQLite without the WAL-reset corruption.
const OLDEST_SQLITE: (u32, u32, u32) = (3, 51, 3);
/// How many of the newest log rows a start verifies; all of them is AuditService.Verify's work.
const VERIFY_AT_START: u64 = 100_000;
const READERS: u32 = 4;

/// The migrations, oldest first. Never edited once released.
fn migrations() -> Vec<Migration> {
    [(
        1,
        "start",
        sqlx::SqlStr::from_static(include_str!("migrations/sqlite/0001_start.sql")),
    )]
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
        f.debug_struct("Sqlite")
            .field("file", &self.options.get_filename())
            .finish_non_exhaustive()
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
        let mut writer = SqliteConnection::connect_with(&options)
            .await
            .map_err(|error| open_error(path, error))?;
        check_version(&mut writer).await?;
        check_whole(path, &mut writer).await?;
        migrate(path, &mut writer).await?;
        check_log(path, &mut writer).await?;
        let readers = SqlitePoolOptions::new()
            .max_connections(READERS)
            .acquire_timeout(Duration::from_secs(5))
            .connect_with(
                options
                    .clone()
                    .create_if_missing(false)
                    .pragma("query_only", "on"),
            )
            .await
            .map_err(|error| other(error.into()))?;
        Ok(Sqlite {
            writer: Mutex::new(Some(writer)),
            options,
            readers,
            _lock: lock,
        })
    }

    /// Runs `work` on the writing connection, opening it again after a fault.
    async fn writing<T>(
        &self,
        work: impl AsyncFnOnce(&mut SqliteConnection) -> Result<T, sqlx::Error>,
    ) -> Result<T, sqlx::Error> {
        let mut slot = self.writer.lock().await;
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
                let committed = write_batch(connection, batch).await?;
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
            Err(error) if committing => Err(CommitError::Unknown(store_error(error))),
            Err(error) => Err(CommitError::NotRecorded(store_error(error))),
        }
    }

    pub(super) async fn write_used(&self, used: &[UsedSecret]) -> Result<(), StoreError> {
        self.writing(async |connection| {
            sqlx::query("BEGIN IMMEDIATE").execute(&mut *connection).await?;
            for UsedSecret { key_id, version, at } in used {
                sqlx::query(
                    "UPDATE secrets SET last_used_at = max(coalesce(last_used_at, 0), ?3) \
                     WHERE key_id = ?1 AND version = ?2",
                )
                .bind(key_id.as_bytes().as_slice())
                .bind(i64::from(*version))
                .bind(at.as_micros())
                .execute(&mut *connection)
                .await?;
            }
            sqlx::query("COMMIT").execute(&mut *connection).await.map(drop)
        })
        .await
        .map_err(store_error)
    }

    pub(super) async fn shut(&self) {
        self.readers.close().await;
        if let Some(connection) = self.writer.lock().await.take() {
            // Folds the WAL into the file; if that fails the next start does it.
            if let Err(error) = connection.close().await {
                tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    "closing the database failed"
                );
            }
        }
    }
}

/// Takes ownership of the database file, or says who has it.
fn own(path: &Path) -> Result<File, OpenError> {
    let shown = path.display().to_string();
    let other = |error: std::io::Error| OpenError::Other {
        path: shown.clone(),
        source: error.into(),
    };
    // The same file under another name is the same file.
    let real = match path.canonicalize() {
        Ok(real) => real,
        Err(_) => {
            let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
            let folder = folder.unwrap_or(Path::new(".")).canonicalize().map_err(other)?;
            folder.join(path.file_name().unwrap_or_default())
        }
    };
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
            file.set_len(0)
                .and_then(|()| file.write_all(note.as_bytes()))
                .map_err(other)?;
            Ok(file)
        }
        Err(std::fs::TryLockError::WouldBlock) => {
            let mut note = String::new();
            let _ = file.rewind().and_then(|()| file.read_to_string(&mut note));
            let owner = note
                .trim()
                .parse::<u32>()
                .map(|id| format!(" (process {id})"))
                .unwrap_or_default();
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
    if version_at_least(&found, OLDEST_SQLITE) {
        Ok(())
    } else {
        Err(OpenError::OldSqlite { found })
    }
}

fn version_at_least(found: &str, least: (u32, u32, u32)) -> bool {
    let mut parts = found.split('.').map(|part| part.parse::<u32>().unwrap_or(0));
    let mut next = || parts.next().unwrap_or(0);
    (next(), next(), next()) >= least
}

/// The file's structure: SQLite's own quick check.
async fn check_whole(path: &str, connection: &mut SqliteConnection) -> Result<(), OpenError> {
    let found: String = sqlx::query_scalar("PRAGMA quick_check(1)")
        .fetch_one(connection)
        .await
        .map_err(|error| open_error(path, error))?;
    if found == "ok" {
        Ok(())
    } else {
        Err(OpenError::Damaged {
            path: path.to_owned(),
            what: found,
        })
    }
}

async fn migrate(path: &str, connection: &mut SqliteConnection) -> Result<(), OpenError> {
    let migrations = migrations();
    let known = migrations
        .iter()
        .map(|migration| migration.version)
        .max()
        .unwrap_or(0);
    match Migrator::with_migrations(migrations).run(&mut *connection).await {
        Ok(()) => {}
        Err(MigrateError::VersionMissing(found)) => {
            return Err(OpenError::NewerSchema {
                path: path.to_owned(),
                found,
                known,
            });
        }
        Err(MigrateError::VersionMismatch(version) | MigrateError::Dirty(version)) => {
            return Err(OpenError::Damaged {
                path: path.to_owned(),
                what: format!("migration {version} is not the one that this keyward knows"),
            });
        }
        Err(error) => {
            return Err(OpenError::Other {
                path: path.to_owned(),
                source: error.into(),
            });
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
    let broken = |what: String| OpenError::Damaged {
        path: path.to_owned(),
        what,
    };
    let failed = |error: sqlx::Error| open_error(path, error);
    let head = read_head(connection).await.map_err(failed)?;
    let start = Revision(head.revision.0.saturating_sub(VERIFY_AT_START));
    let mut last = if start == Revision(0) {
        Head {
            revision: start,
            hash: GENESIS,
        }
    } else {
        let found = sqlx::query("SELECT hash FROM log WHERE revision = ?1")
            .bind(revision_to_i64(start))
            .fetch_optional(&mut *connection)
            .await
            .map_err(failed)?;
        let row = found.ok_or_else(|| broken(format!("the log has no entry {start}")))?;
        Head {
            revision: start,
            hash: hash_at(&row, 0).map_err(failed)?,
        }
    };
    loop {
        let rows = super::sqlite_read::log_after(&mut *connection, last.revision, 1000)
            .await
            .map_err(|error| broken(error.to_string()))?;
        for row in &rows {
            if !row.follows(last.revision, &last.hash) {
                return Err(broken(format!(
                    "the log's hash chain breaks at entry {}",
                    last.revision.next()
                )));
            }
            last = Head {
                revision: row.revision,
                hash: row.hash,
            };
        }
        if rows.is_empty() {
            break;
        }
    }
    if last == head {
        Ok(())
    } else {
        Err(broken(format!(
            "the log ends at {}, and should end at {}",
            last.revision, head.revision
        )))
    }
}

pub(super) async fn read_head(connection: &mut SqliteConnection) -> Result<Head, sqlx::Error> {
    let row = sqlx::query("SELECT head, head_hash FROM meta")
        .fetch_one(connection)
        .await?;
    Ok(Head {
        revision: revision_from_i64(row.try_get(0)?),
        hash: hash_at(&row, 1)?,
    })
}

pub(super) fn hash_at(row: &SqliteRow, column: usize) -> Result<[u8; 32], sqlx::Error> {
    let bytes: &[u8] = row.try_get(column)?;
    bytes
        .try_into()
        .map_err(|_| sqlx::Error::Decode("a hash is not 32 bytes".into()))
}

/// Writes what of the batch can be written; `BEGIN` and `COMMIT` are the caller's.
async fn write_batch(connection: &mut SqliteConnection, batch: &[Write]) -> Result<Committed, sqlx::Error> {
    let mut head = read_head(connection).await?;
    let mut committed = Committed::default();
    for write in batch {
        let outcome = match reject(connection, write).await? {
            Some(outcome) => outcome,
            None => {
                let (row, change) = write_one(connection, write, head).await?;
                head = Head {
                    revision: row.revision,
                    hash: row.hash,
                };
                committed.rows.push((row, change.clone()));
                Ok(Outcome::Applied(change))
            }
        };
        committed.outcomes.push(outcome);
    }
    if !committed.rows.is_empty() {
        sqlx::query("UPDATE meta SET head = ?1, head_hash = ?2")
            .bind(revision_to_i64(head.revision))
            .bind(head.hash.as_slice())
            .execute(connection)
            .await?;
    }
    Ok(committed)
}

/// Everything that stands against a write, found before anything of it is written.
async fn reject(
    connection: &mut SqliteConnection,
    write: &Write,
) -> Result<Option<Result<Outcome, Rejection>>, sqlx::Error> {
    if let Some(idempotency) = &write.idempotency {
        let since = write.at.minus(IDEMPOTENCY_WINDOW);
        let found =
            super::sqlite_read::idempotent(connection, idempotency.caller, &idempotency.key, since).await?;
        if let Some((key_id, fingerprint)) = found {
            let same = fingerprint == idempotency.fingerprint;
            return Ok(Some(if same {
                Ok(Outcome::Replayed(key_id))
            } else {
                Err(Rejection::IdempotencyReused)
            }));
        }
    }
    let current = match &write.change {
        Change::Account(account) => current_account_revision(connection, account).await?,
        Change::Key(key) => current_key_revision(connection, key.id).await?,
    };
    if current != write.expect {
        return Ok(Some(Err(Rejection::Conflict)));
    }
    if let Change::Key(key) = &write.change {
        if name_taken(connection, key).await? {
            return Ok(Some(Err(Rejection::NameTaken)));
        }
        if digest_taken(connection, key).await? {
            return Ok(Some(Err(Rejection::DigestTaken)));
        }
    }
    Ok(None)
}

async fn current_account_revision(
    connection: &mut SqliteConnection,
    account: &Account,
) -> Result<Option<Revision>, sqlx::Error> {
    sqlx::query_scalar("SELECT revision FROM accounts WHERE id = ?1")
        .bind(account.id.as_str())
        .fetch_optional(connection)
        .await
        .map(|found| found.map(revision_from_i64))
}

async fn current_key_revision(
    connection: &mut SqliteConnection,
    id: KeyId,
) -> Result<Option<Revision>, sqlx::Error> {
    sqlx::query_scalar("SELECT revision FROM keys WHERE id = ?1")
        .bind(id.as_bytes().as_slice())
        .fetch_optional(connection)
        .await
        .map(|found| found.map(revision_from_i64))
}

async fn name_taken(connection: &mut SqliteConnection, key: &Key) -> Result<bool, sqlx::Error> {
    let Some(name) = key.terms.name.as_ref().filter(|_| key.revocation.is_none()) else {
        return Ok(false);
    };
    let query = match (key.owner.account(), key.owner.user()) {
        (Some(account), _) => sqlx::query_scalar(
            "SELECT 1 FROM keys WHERE account = ?1 AND name = ?2 AND revoked_at IS NULL AND id <> ?3",
        )
        .bind(account.as_str()),
        (None, user) => sqlx::query_scalar(
            "SELECT 1 FROM keys WHERE user_id = ?1 AND name = ?2 AND revoked_at IS NULL AND id <> ?3",
        )
        .bind(user.map(|user| user.as_str())),
    };
    let found: Option<i64> = query
        .bind(name.as_str())
        .bind(key.id.as_bytes().as_slice())
        .fetch_optional(connection)
        .await?;
    Ok(found.is_some())
}

async fn digest_taken(connection: &mut SqliteConnection, key: &Key) -> Result<bool, sqlx::Error> {
    let Some(newest) = key.secrets.first() else {
        return Ok(false);
    };
    let found: Option<i64> =
        sqlx::query_scalar("SELECT 1 FROM secrets WHERE digest = ?1 AND (key_id <> ?2 OR version <> ?3)")
            .bind(newest.digest.as_bytes().as_slice())
            .bind(key.id.as_bytes().as_slice())
            .bind(i64::from(newest.version))
            .fetch_optional(connection)
            .await?;
    Ok(found.is_some())
}

/// Writes one record and its log row after `head`. Nothing stands against it any more.
async fn write_one(
    connection: &mut SqliteConnection,
    write: &Write,
    head: Head,
) -> Result<(LogRow, Change), sqlx::Error> {
    let revision = head.revision.next();
    let change = write.change.clone().at_revision(revision);
    match &change {
        Change::Key(key) => {
            put_key(connection, key, write.expect.is_none()).await?;
            put_secrets(connection, key).await?;
        }
        Change::Account(account) => put_account(connection, account).await?,
    }
    let payload = serde_json::to_string(&change).map_err(|error| sqlx::Error::Encode(Box::new(error)))?;
    let mut row = LogRow {
        revision,
        at: write.at,
        action: write.action.as_str().to_owned(),
        account: change.account().cloned(),
        key_id: change.key_id(),
        user: change.user().cloned(),
        actor: write.actor.to_string(),
        actor_account: write.actor.account.clone(),
        method: write.method.to_owned(),
        payload,
        prev_hash: head.hash,
        hash: GENESIS,
    };
    row.hash = row.expected_hash();
    append(connection, &row).await?;
    if let (Some(idempotency), Change::Key(key)) = (&write.idempotency, &change) {
        sqlx::query("INSERT OR REPLACE INTO idempotency VALUES (?1, ?2, ?3, ?4, ?5)")
            .bind(idempotency.caller.as_bytes().as_slice())
            .bind(idempotency.key.as_str())
            .bind(idempotency.fingerprint.as_slice())
            .bind(key.id.as_bytes().as_slice())
            .bind(write.at.as_micros())
            .execute(&mut *connection)
            .await?;
        // Each insert takes away a few that no longer count, so the table stays small without a sweeper.
        sqlx::query(
            "DELETE FROM idempotency WHERE (caller, key) IN (SELECT caller, key FROM idempotency \
             WHERE created_at < ?1 ORDER BY created_at LIMIT 4)",
        )
        .bind(write.at.minus(IDEMPOTENCY_WINDOW).as_micros())
        .execute(&mut *connection)
        .await?;
    }
    Ok((row, change))
}

async fn put_key(connection: &mut SqliteConnection, key: &Key, new: bool) -> Result<(), sqlx::Error> {
    let row = KeyRow::of(key);
    let sum = row.sum();
    let query = if new {
        sqlx::query(
            "INSERT INTO keys VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15, ?16, \
             ?17, ?18, ?19, ?20, ?21, ?22)",
        )
    } else {
        sqlx::query(
            "UPDATE keys SET account = ?2, user_id = ?3, environment = ?4, name = ?5, scopes = ?6, roles = ?7, \
             expires_at = ?8, customers = ?9, allowed_cidrs = ?10, rate_limits = ?11, quota = ?12, \
             metadata = ?13, created_at = ?14, created_by = ?15, updated_at = ?16, disabled_at = ?17, \
             revoked_at = ?18, revoke_reason = ?19, revoke_comment = ?20, revision = ?21, sum = ?22 \
             WHERE id = ?1",
        )
    };
    query
        .bind(row.id.as_slice())
        .bind(&row.account)
        .bind(&row.user_id)
        .bind(&row.environment)
        .bind(&row.name)
        .bind(&row.scopes)
        .bind(&row.roles)
        .bind(row.expires_at)
        .bind(&row.customers)
        .bind(&row.allowed_cidrs)
        .bind(&row.rate_limits)
        .bind(&row.quota)
        .bind(&row.metadata)
        .bind(row.created_at)
        .bind(&row.created_by)
        .bind(row.updated_at)
        .bind(row.disabled_at)
        .bind(row.revoked_at)
        .bind(&row.revoke_reason)
        .bind(&row.revoke_comment)
        .bind(row.revision)
        .bind(sum)
        .execute(connection)
        .await
        .map(drop)
}

/// Brings the secrets' rows to where the record says. A row that left the record ended when the one after the
/// next was made, at the latest.
async fn put_secrets(connection: &mut SqliteConnection, key: &Key) -> Result<(), sqlx::Error> {
    let key_id = key.id.as_bytes().as_slice();
    for secret in &key.secrets {
        sqlx::query(
            "INSERT INTO secrets VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, NULL) \
             ON CONFLICT (digest) DO UPDATE SET expires_at = excluded.expires_at, sum = excluded.sum",
        )
        .bind(secret.digest.as_bytes().as_slice())
        .bind(key_id)
        .bind(i64::from(secret.version))
        .bind(&secret.hint)
        .bind(secret.created_at.as_micros())
        .bind(secret.expires_at.map(|end| end.as_micros()))
        .bind(secret_sum(key_id, secret))
        .execute(&mut *connection)
        .await?;
    }
    let Some(oldest) = key
        .secrets
        .last()
        .filter(|oldest| oldest.version > 1 && key.secrets.len() > 1)
    else {
        return Ok(());
    };
    let Some(newest) = key.secrets.first() else {
        return Ok(());
    };
    let left = sqlx::query(
        "SELECT digest, version, hint, created_at, expires_at, sum FROM secrets \
         WHERE key_id = ?1 AND version = ?2 AND (expires_at IS NULL OR expires_at > ?3)",
    )
    .bind(key_id)
    .bind(i64::from(oldest.version) - 1)
    .bind(newest.created_at.as_micros())
    .fetch_optional(&mut *connection)
    .await?;
    if let Some(row) = left {
        let mut secret = super::sqlite_read::secret_at(&row, key_id, 0)
            .map_err(|error| sqlx::Error::Decode(Box::new(error)))?;
        secret.expires_at = Some(newest.created_at);
        sqlx::query("UPDATE secrets SET expires_at = ?2, sum = ?3 WHERE digest = ?1")
            .bind(secret.digest.as_bytes().as_slice())
            .bind(newest.created_at.as_micros())
            .bind(secret_sum(key_id, &secret))
            .execute(connection)
            .await?;
    }
    Ok(())
}

async fn put_account(connection: &mut SqliteConnection, account: &Account) -> Result<(), sqlx::Error> {
    sqlx::query(
        "INSERT INTO accounts VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7) ON CONFLICT (id) DO UPDATE SET \
         name = excluded.name, suspended_at = excluded.suspended_at, updated_at = excluded.updated_at, \
         revision = excluded.revision, sum = excluded.sum",
    )
    .bind(account.id.as_str())
    .bind(account.name.as_str())
    .bind(account.suspended_at.map(|at| at.as_micros()))
    .bind(account.created_at.as_micros())
    .bind(account.updated_at.as_micros())
    .bind(revision_to_i64(account.revision))
    .bind(account_sum(account))
    .execute(connection)
    .await
    .map(drop)
}

async fn append(connection: &mut SqliteConnection, row: &LogRow) -> Result<(), sqlx::Error> {
    sqlx::query("INSERT INTO log VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12)")
        .bind(revision_to_i64(row.revision))
        .bind(row.at.as_micros())
        .bind(&row.action)
        .bind(row.account.as_ref().map(|account| account.as_str()))
        .bind(row.key_id.as_ref().map(|id| id.as_bytes().as_slice()))
        .bind(row.user.as_ref().map(|user| user.as_str()))
        .bind(&row.actor)
        .bind(row.actor_account.as_ref().map(|account| account.as_str()))
        .bind(&row.method)
        .bind(&row.payload)
        .bind(row.prev_hash.as_slice())
        .bind(row.hash.as_slice())
        .execute(connection)
        .await
        .map(drop)
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
        Some(SQLITE_CORRUPT | SQLITE_NOTADB) => OpenError::Damaged {
            path: path.to_owned(),
            what: error.to_string(),
        },
        _ => OpenError::Other {
            path: path.to_owned(),
            source: error.into(),
        },
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
