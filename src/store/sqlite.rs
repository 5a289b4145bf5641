//! The embedded store: one SQLite file, owned by one process.
//!
//! WAL with `synchronous=FULL`: what was committed survives a power cut. A second server refuses to start, and one that
//! has lost the file stops (`sqlite/owner.rs`), while backup tools may still read. A file whose WAL is lost is refused
//! (`sqlite/mark.rs`). One connection writes (`sqlite/connection.rs`); a few others read, each seeing whole transactions
//! only. Here: opening and checking; what a transaction writes is in `sqlite/write.rs`, the reads in `backend.rs`.

mod backup;
mod bulk;
mod connection;
mod file_owner;
mod inspect;
mod migrate;
mod open_mark;
mod page_readers;
mod permissions;
mod pre_state;
mod secret_range;
mod snapshot;
mod write;

pub(super) use backup::backup;

use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use futures_util::TryStreamExt as _;
use rusqlite::{Connection, params};
use sqlx::{
    AssertSqlSafe, Connection as _, SqliteConnection, SqlitePool,
    sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous},
};
use tokio::{sync::watch::Sender, time::Instant};

use crate::domain::{
    limit::QuotaUsage,
    log::LogEntry,
    name::KeyId,
    time::{Revision, Timestamp},
};

pub(super) use self::inspect::inspect;
use self::{
    bulk::SqliteBulkReader,
    connection::{SqliteResult as Written, SqliteWriter},
    file_owner::{FileOwner, acquire, report_lost, watch_ownership},
    page_readers::{PageReaders, PageRow},
    snapshot::SnapshotReader,
};
use super::{
    ArchiveCheckpoint, BulkReader, CommitError, CommittedBatch, LogHead, MigrationStep, OpenError,
    SchemaPolicy, SnapshotLoader, StoreError, StoredKey, UsageBatch, UsageHour, WriteRequest,
    backend::{self, EntryVisitor, RowVisitor, SnapshotView, StoreBackend},
    queries::SqlQuery,
    replica_registry::ReplicaRegistry,
    row_format::{damaged_error, revision_to_i64},
};

/// The first SQLite without the WAL-reset corruption.
const MIN_SQLITE_VERSION: (u32, u32, u32) = (3, 51, 3);
const MAX_SQLX_READERS: u32 = 4;
/// A file of up to so many bytes is checked before it is used. Of a larger one that would hold up the start for
/// seconds by the gigabyte: its check begins when the keys are loaded, each of which has a checksum of its own.
const MAX_CHECKED_AT_OPEN: u64 = 64 << 20;

/// The store in one SQLite file.
pub struct SqliteStore {
    writer: SqliteWriter,
    /// How a reader opens the file.
    read_options: SqliteConnectOptions,
    /// For snapshots.
    sqlx_readers: SqlitePool,
    /// For everything else.
    page_readers: PageReaders,
    /// Whether the file is to be checked when the keys are loaded.
    check_pending: AtomicBool,
    /// Whether the file was found damaged, or is no longer this process's own.
    lost: Sender<bool>,
    /// None = the file is only looked at.
    file_owner: Option<Arc<FileOwner>>,
}

impl std::fmt::Debug for SqliteStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SqliteStore").field("file", &self.read_options.get_filename()).finish_non_exhaustive()
    }
}

impl SqliteStore {
    /// Opens or makes the file at `path`, takes ownership, migrates and checks it.
    ///
    /// # Errors
    /// When it is in use, damaged, newer than this program, or cannot be opened.
    pub async fn open(path: &str, schema: SchemaPolicy) -> Result<SqliteStore, OpenError> {
        SqliteStore::open_checked(path, MAX_CHECKED_AT_OPEN, schema).await
    }

    /// Opens a file whose WAL is lost, as it is without. It stays one that was not closed until something is committed.
    ///
    /// # Errors
    /// As [`SqliteStore::open`], and when its WAL is not lost.
    pub async fn open_without_wal(path: &str) -> Result<SqliteStore, OpenError> {
        SqliteStore::open_locked(
            path,
            acquire(path, true).await?,
            MAX_CHECKED_AT_OPEN,
            SchemaPolicy::RequireCurrent,
        )
        .await
    }

    /// Brings the file's schema up to date, or only says what that would do. Gives the steps.
    ///
    /// # Errors
    /// As [`SqliteStore::open`].
    pub async fn migrate(path: &str, dry_run: bool) -> Result<Vec<MigrationStep>, OpenError> {
        if dry_run && !Path::new(path).exists() {
            return Ok(migrate::all_steps());
        }
        let (owner, writer) = acquire(path, false).await?;
        let mut connection = SqliteConnection::connect_with(&migration_options(owner.real_path()))
            .await
            .map_err(|error| open_error(path, error))?;
        check_sqlite_version(&mut connection).await?;
        let steps = migrate::pending_steps(path, &mut connection).await?;
        if !dry_run {
            migrate::run_migrations(path, &mut connection, SchemaPolicy::Migrate).await?;
        }
        let _ = connection.close().await;
        owner.release(&writer).await.map_err(|error| store_open_error(path, error))?;
        Ok(steps)
    }

    /// Opens a file, and checks it first if it has up to so many bytes.
    async fn open_checked(path: &str, first: u64, schema: SchemaPolicy) -> Result<SqliteStore, OpenError> {
        let held = acquire(path, false).await?;
        let owner = held.0.clone();
        let opened = SqliteStore::open_locked(path, held, first, schema).await;
        let store = opened.map_err(|error| owner.explain_open_error(error))?;
        tokio::spawn(watch_ownership(Arc::downgrade(&owner), store.lost.clone()));
        let begun = store.writer.run(move |connection| owner.begin_term(connection)).await;
        begun.map_err(|error| store_open_error(path, error))?;
        Ok(store)
    }

    async fn open_locked(
        path: &str,
        (owner, writer): (Arc<FileOwner>, SqliteWriter),
        first: u64,
        schema: SchemaPolicy,
    ) -> Result<SqliteStore, OpenError> {
        let other = |source: Box<dyn std::error::Error + Send + Sync>| OpenError::Other {
            path: path.to_owned(),
            source,
        };
        let mut migrating = SqliteConnection::connect_with(&migration_options(owner.real_path()))
            .await
            .map_err(|error| open_error(path, error))?;
        check_sqlite_version(&mut migrating).await?;
        let unchecked = std::fs::metadata(path).map_err(|error| other(error.into()))?.len() > first;
        if !unchecked {
            check_integrity(path, &mut migrating).await?;
        }
        migrate::run_migrations(path, &mut migrating, schema).await?;
        let _ = migrating.close().await;
        let options = read_only_options(owner.real_path());
        let readers = SqlitePoolOptions::new()
            .max_connections(MAX_SQLX_READERS)
            .acquire_timeout(Duration::from_secs(5))
            .connect_with(options.clone())
            .await
            .map_err(|error| other(error.into()))?;
        let unchecked = AtomicBool::new(unchecked);
        let pages = PageReaders::new(options.get_filename().to_owned());
        let lost = Sender::new(false);
        let store = SqliteStore {
            writer,
            read_options: options,
            sqlx_readers: readers,
            page_readers: pages,
            check_pending: unchecked,
            lost,
            file_owner: Some(owner),
        };
        backend::verify_newest_log(&store).await.map_err(|error| store_open_error(path, error))?;
        Ok(store)
    }

    /// Does `run` in a transaction, if this process owns the file. `commits` says whether there is something to commit.
    async fn transaction<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Connection) -> Written<T> + Send + 'static,
        commits: impl FnOnce(&T) -> bool + Send + 'static,
    ) -> Result<T, StoreError> {
        let Some(owner) = self.file_owner.clone() else {
            return Err(StoreError::Unavailable("the database is open for reading only".into()));
        };
        let done = self.writer.run(move |connection| owner.transaction(connection, work, commits)).await;
        if let Err(error @ StoreError::OwnershipLost(_)) = &done {
            report_lost(&self.lost, error);
        }
        done
    }

    /// The same of what is always committed.
    async fn write_transaction<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Connection) -> Written<T> + Send + 'static,
    ) -> Result<T, StoreError> {
        self.transaction(work, |_| true).await
    }
}

#[async_trait]
impl StoreBackend for SqliteStore {
    type QueryDatabase = sqlx::Sqlite;
    type QueryRow = PageRow;

    async fn fetch_rows(&self, query: SqlQuery<sqlx::Sqlite>) -> Result<Vec<PageRow>, StoreError> {
        self.page_readers.fetch_rows(query).await
    }

    async fn fetch_log_page(&self, query: SqlQuery<sqlx::Sqlite>) -> Result<Vec<LogEntry>, StoreError> {
        self.page_readers.fetch_log(query).await
    }

    async fn fetch_keys_by_id(&self, ids: &[KeyId]) -> Result<Vec<StoredKey>, StoreError> {
        self.page_readers.fetch_keys(ids).await
    }

    fn bulk(&self, entries: u64) -> Box<dyn BulkReader + '_> {
        Box::new(SqliteBulkReader::new(&self.page_readers, entries))
    }

    async fn for_each_entry(&self, after: Revision, take: EntryVisitor<'_>) -> Result<(), StoreError> {
        snapshot::stream_log(self.read_options.get_filename().to_owned(), after, take).await
    }

    async fn commit_batch(&self, batch: &[WriteRequest]) -> Result<CommittedBatch, CommitError> {
        let batch = batch.to_vec();
        let committing = Arc::new(AtomicBool::new(false));
        let begun = committing.clone();
        let commits = move |committed: &CommittedBatch| {
            let commits = !committed.entries.is_empty();
            begun.store(commits, Ordering::Relaxed);
            commits
        };
        match self.transaction(move |connection| write::write_batch(connection, &batch), commits).await {
            Ok(committed) => Ok(committed),
            // Without room the commit's last frame is not in the WAL, and without that nothing of it counts.
            Err(error) if committing.load(Ordering::Relaxed) && !matches!(error, StoreError::Full(_)) => {
                Err(CommitError::Unknown(error))
            }
            Err(error) => Err(CommitError::NotRecorded(error)),
        }
    }

    async fn load_snapshot(
        &self,
        forget_before: Timestamp,
        loader: &Arc<dyn SnapshotLoader>,
    ) -> Result<LogHead, StoreError> {
        let mut connection = self.sqlx_readers.acquire().await.map_err(store_error)?;
        // While nobody writes, two transactions that begin see the same.
        let writer = self.writer.pause().await?;
        let mut transaction = connection.begin().await.map_err(store_error)?;
        sqlx::query("SELECT head FROM meta").execute(&mut *transaction).await.map_err(store_error)?;
        let reader = SnapshotReader::begin(self.read_options.get_filename().to_owned()).await?;
        drop(writer);
        let mut view = SqliteView { connection: &mut transaction, reader: Some(reader) };
        let head = backend::read_snapshot(&mut view, forget_before, loader).await?;
        if self.check_pending.swap(false, Ordering::Relaxed) {
            tokio::spawn(check_in_background(self.read_options.clone(), self.lost.clone()));
        }
        Ok(head)
    }

    async fn write_usage(&self, batch: &UsageBatch) -> Result<Vec<(KeyId, QuotaUsage)>, StoreError> {
        let batch = batch.clone();
        self.write_transaction(move |connection| write::write_usage(connection, &batch)).await
    }

    async fn delete_usage_rows(&self, before: UsageHour) -> Result<(), StoreError> {
        let work = move |connection: &Connection| {
            connection.execute("DELETE FROM usage WHERE hour < ?1", [before.0])?;
            Ok(())
        };
        self.write_transaction(work).await
    }

    async fn insert_checkpoint(&self, checkpoint: &ArchiveCheckpoint) -> Result<(), StoreError> {
        let ArchiveCheckpoint { head, entry_count, made_at } = *checkpoint;
        let work = move |connection: &Connection| {
            let sql = "INSERT INTO checkpoints VALUES (?1, ?2, ?3, ?4) ON CONFLICT DO NOTHING";
            let entries = i64::try_from(entry_count).unwrap_or(i64::MAX);
            connection.execute(
                sql,
                params![revision_to_i64(head.revision), head.hash, entries, made_at.as_micros()],
            )?;
            Ok(())
        };
        self.write_transaction(work).await
    }

    async fn delete_log_entries(&self, upto: Revision, most: u32) -> Result<u64, StoreError> {
        let work = move |connection: &Connection| {
            let sql = "DELETE FROM log WHERE revision IN \
                       (SELECT revision FROM log WHERE revision <= ?1 ORDER BY revision LIMIT ?2)";
            Ok(connection.execute(sql, params![revision_to_i64(upto), most])? as u64)
        };
        self.write_transaction(work).await
    }

    /// SQLite has decided a commit when it answers, or when its file is opened again.
    async fn resolve_pending_commits(&self) -> Result<(), StoreError> {
        self.writer.pause().await.map(drop)
    }

    fn as_replica_registry(self: Arc<Self>) -> Option<Arc<dyn ReplicaRegistry>> {
        None
    }

    async fn wait_until_lost(&self) {
        // The sender lives as long as `self`.
        let _ = self.lost.subscribe().wait_for(|lost| *lost).await;
    }

    fn has_single_server_since(&self, _: Instant) -> bool {
        true
    }

    async fn shutdown(&self) {
        self.sqlx_readers.close().await;
        self.page_readers.close().await;
        let Some(owner) = self.file_owner.clone() else { return };
        // Last of all, since that folds the WAL into the file; if it fails the next start does it.
        if let Err(error) = owner.release(&self.writer).await {
            tracing::warn!(error = &error as &dyn std::error::Error, "closing the database failed");
        }
    }
}

/// The view of two transactions that see the same revision.
struct SqliteView<'c> {
    connection: &'c mut SqliteConnection,
    /// What reads the keys.
    reader: Option<SnapshotReader>,
}

#[async_trait]
impl SnapshotView for SqliteView<'_> {
    type ViewDatabase = sqlx::Sqlite;

    async fn for_each_row(
        &mut self,
        query: SqlQuery<sqlx::Sqlite>,
        take: RowVisitor<'_, sqlx::Sqlite>,
    ) -> Result<(), StoreError> {
        // A snapshot asks for whole tables: there is no value to bind.
        let (statement, _) = query.into_parts();
        let mut rows = sqlx::query(AssertSqlSafe(statement)).fetch(&mut *self.connection);
        while let Some(row) = rows.try_next().await.map_err(store_error)? {
            take(&row)?;
        }
        Ok(())
    }

    async fn load_keys(
        &mut self,
        forget_before: Timestamp,
        loader: &Arc<dyn SnapshotLoader>,
    ) -> Result<(), StoreError> {
        match self.reader.take() {
            Some(reader) => reader.load_keys(forget_before, loader).await,
            None => Ok(()),
        }
    }
}

async fn check_sqlite_version(connection: &mut SqliteConnection) -> Result<(), OpenError> {
    let found: String = sqlx::query_scalar("SELECT sqlite_version()")
        .fetch_one(connection)
        .await
        .map_err(|error| open_error("SQLite", error))?;
    if is_version_at_least(&found, MIN_SQLITE_VERSION) {
        Ok(())
    } else {
        Err(OpenError::SqliteTooOld { found })
    }
}

fn is_version_at_least(found: &str, least: (u32, u32, u32)) -> bool {
    let mut parts = found.split('.').map(|part| part.parse::<u32>().unwrap_or(0));
    let mut next = || parts.next().unwrap_or(0);
    (next(), next(), next()) >= least
}

/// The file's structure: SQLite's own check, with every index held against its table. The quick one leaves the
/// indices out, and a List or a name would be looked up in one that has lost entries.
async fn check_integrity(path: &str, connection: &mut SqliteConnection) -> Result<(), OpenError> {
    let found: String = sqlx::query_scalar("PRAGMA integrity_check(1)")
        .fetch_one(connection)
        .await
        .map_err(|error| open_error(path, error))?;
    if found == "ok" { Ok(()) } else { Err(OpenError::Damaged { path: path.to_owned(), what: found }) }
}

/// Checks a file that is in use, on a connection of its own.
async fn check_in_background(options: SqliteConnectOptions, lost: Sender<bool>) {
    let path = options.get_filename().display().to_string();
    let check = async {
        let connection = SqliteConnection::connect_with(&options).await;
        let mut connection = connection.map_err(|error| open_error(&path, error))?;
        let checked = check_integrity(&path, &mut connection).await;
        let _ = connection.close().await;
        checked
    };
    match check.await {
        Ok(()) => tracing::info!(path, "the whole database file was checked"),
        Err(OpenError::Damaged { path, what }) => {
            let said = OpenError::Damaged { path, what };
            tracing::error!(error = &said as &dyn std::error::Error, "the database file is damaged");
            lost.send_replace(true);
        }
        Err(error) => {
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                "the database file could not be checked"
            );
        }
    }
}

/// How a file is opened that may be migrated.
fn migration_options(path: &Path) -> SqliteConnectOptions {
    SqliteConnectOptions::new()
        .filename(path)
        .journal_mode(SqliteJournalMode::Wal)
        .synchronous(SqliteSynchronous::Full)
        .foreign_keys(true)
        .busy_timeout(Duration::from_secs(5))
}

/// How a file is opened to be read. Such a connection leaves the WAL as it is when it is closed.
fn read_only_options(path: &Path) -> SqliteConnectOptions {
    SqliteConnectOptions::new()
        .filename(path)
        .read_only(true)
        .pragma("query_only", "on")
        .busy_timeout(Duration::from_secs(5))
}

/// SQLite's primary result code.
fn primary_code(error: &sqlx::Error) -> Option<u32> {
    let code = error.as_database_error()?.code()?.parse::<u32>().ok()?;
    Some(code & 0xff)
}

const SQLITE_CORRUPT: u32 = 11;
const SQLITE_FULL: u32 = 13;
const SQLITE_NOTADB: u32 = 26;

fn store_error(error: sqlx::Error) -> StoreError {
    match primary_code(&error) {
        Some(SQLITE_FULL) => StoreError::Full(error.into()),
        Some(SQLITE_CORRUPT | SQLITE_NOTADB) => damaged_error("the database file", error),
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

fn store_open_error(path: &str, error: StoreError) -> OpenError {
    match error {
        StoreError::Damaged(what) => OpenError::Damaged { path: path.to_owned(), what },
        error => OpenError::Other { path: path.to_owned(), source: error.into() },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::{
        account::AccountMember,
        name::{AccountId, RoleName, UserId},
        time::Revision,
    };
    use crate::store::{LoadedKey, SnapshotPart, SnapshotRecord, row_format::member_checksum};

    /// Takes a snapshot and keeps nothing.
    struct Nobody;

    impl SnapshotLoader for Nobody {
        fn add_record(&self, _: SnapshotRecord) {}

        fn reserve_secrets(&self, _: usize) {}

        fn begin_part(&self) -> Box<dyn SnapshotPart> {
            Box::new(Nobody)
        }
    }

    impl SnapshotPart for Nobody {
        fn add_key(&mut self, _: &LoadedKey<'_>) {}

        fn finish(self: Box<Self>) {}
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_damaged_index_is_found_at_the_start_or_in_a_large_file_behind_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("keyward.db").display().to_string();
        let store = SqliteStore::open(&path, SchemaPolicy::Migrate).await.unwrap();
        store
            .writer
            .run(|connection| {
                let member = AccountMember {
                    account: AccountId::parse("acme").unwrap(),
                    user: UserId::parse("ann").unwrap(),
                    role: RoleName::parse("agent").unwrap(),
                    revision: Revision(1),
                };
                let sql = "INSERT INTO members VALUES ('acme', 'ann', 'agent', 1, ?1)";
                connection.execute_batch("PRAGMA foreign_keys = off; PRAGMA writable_schema = on")?;
                connection.execute(sql, [member_checksum(&member)])?;
                let other = "UPDATE sqlite_schema SET sql = 'CREATE INDEX members_with_role ON members (user_id, account)' \
                             WHERE name = 'members_with_role'";
                connection.execute(other, [])?;
                Ok(())
            })
            .await
            .unwrap();
        store.shutdown().await;
        drop(store);
        let at_start = SqliteStore::open(&path, SchemaPolicy::Migrate).await.unwrap_err();
        assert!(matches!(at_start, OpenError::Damaged { .. }), "{at_start}");
        let store = SqliteStore::open_checked(&path, 0, SchemaPolicy::Migrate).await.unwrap();
        let nobody: Arc<dyn SnapshotLoader> = Arc::new(Nobody);
        store.load_snapshot(Timestamp::from_micros(0), &nobody).await.unwrap();
        store.wait_until_lost().await;
    }

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
            assert_eq!(is_version_at_least(version, MIN_SQLITE_VERSION), good, "{version}");
        }
    }
}
