//! The store in one SQLite file: opening it, and the operations of the backend.

use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use rusqlite::{Connection, params};
use sqlx::{
    Connection as _, SqliteConnection, SqlitePool,
    sqlite::{SqliteConnectOptions, SqlitePoolOptions},
};
use tokio::{sync::watch::Sender, time::Instant};

use crate::{
    domain::{
        limit::QuotaUsage,
        log::LogEntry,
        name::KeyId,
        time::{Revision, Timestamp},
    },
    store::{
        ArchiveCheckpoint, BulkReader, CommitError, CommittedBatch, LogHead, MigrationStep, OpenError,
        SchemaPolicy, SnapshotLoader, StoreError, StoredKey, UsageBatch, UsageHour, WriteRequest,
        backend::{self, EntryVisitor, StoreBackend},
        queries::SqlQuery,
        replica_registry::ReplicaRegistry,
        row_format::revision_to_i64,
    },
};

use super::{
    bulk::SqliteBulkReader,
    checks::{MAX_CHECKED_AT_OPEN, check_in_background, check_integrity, check_sqlite_version},
    connect_options::{MAX_SQLX_READERS, migration_options, read_only_options},
    connection::{SqliteResult, SqliteWriter},
    errors::{open_error, store_error, store_open_error},
    file_owner::{FileOwner, acquire, report_lost, watch_ownership},
    migrate,
    page_readers::{PageReaders, PageRow},
    snapshot::{self, SnapshotReader},
    snapshot_view::SqliteView,
    write,
};

/// A store in one SQLite file.
pub(in crate::store) struct SqliteStore {
    pub(super) writer: SqliteWriter,
    /// The options of a read connection.
    pub(super) read_options: SqliteConnectOptions,
    /// The pool that reads snapshots, except for their keys.
    pub(super) sqlx_readers: SqlitePool,
    /// The pool for all other reads.
    pub(super) page_readers: PageReaders,
    /// Whether the file must be checked when the keys are loaded.
    pub(super) check_pending: AtomicBool,
    /// Whether the file was found damaged, or this process no longer owns it.
    pub(super) lost: Sender<bool>,
    /// `None` if the file is only inspected.
    pub(super) file_owner: Option<Arc<FileOwner>>,
}

impl std::fmt::Debug for SqliteStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SqliteStore").field("file", &self.read_options.get_filename()).finish_non_exhaustive()
    }
}

impl SqliteStore {
    /// Opens or creates the file at `path`, takes ownership, migrates and checks it.
    ///
    /// # Errors
    /// If the file is in use, damaged, newer than this program, or cannot be opened.
    pub(in crate::store) async fn open(path: &str, schema: SchemaPolicy) -> Result<SqliteStore, OpenError> {
        SqliteStore::open_checked(path, MAX_CHECKED_AT_OPEN, schema).await
    }

    /// Opens a file whose WAL is lost. Its mark stays "open" until something is committed.
    ///
    /// # Errors
    /// Like [`SqliteStore::open`]; also if the WAL is not lost.
    pub(in crate::store) async fn open_without_wal(path: &str) -> Result<SqliteStore, OpenError> {
        SqliteStore::open_locked(
            path,
            acquire(path, true).await?,
            MAX_CHECKED_AT_OPEN,
            SchemaPolicy::RequireCurrent,
        )
        .await
    }

    /// Migrates the file; with `dry_run`, only finds the missing steps. Returns these steps.
    ///
    /// # Errors
    /// Like [`SqliteStore::open`], for a file in use or damaged.
    pub(in crate::store) async fn migrate(
        path: &str,
        dry_run: bool,
    ) -> Result<Vec<MigrationStep>, OpenError> {
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

    /// Opens a file. Checks it first if it has at most `check_limit` bytes.
    async fn open_checked(
        path: &str,
        check_limit: u64,
        schema: SchemaPolicy,
    ) -> Result<SqliteStore, OpenError> {
        let locked = acquire(path, false).await?;
        let owner = locked.0.clone();
        let opened = SqliteStore::open_locked(path, locked, check_limit, schema).await;
        let store = opened.map_err(|error| owner.explain_open_error(error))?;
        tokio::spawn(watch_ownership(Arc::downgrade(&owner), store.lost.clone()));
        let begun = store.writer.run(move |connection| owner.begin_term(connection)).await;
        begun.map_err(|error| store_open_error(path, error))?;
        Ok(store)
    }

    async fn open_locked(
        path: &str,
        (owner, writer): (Arc<FileOwner>, SqliteWriter),
        check_limit: u64,
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
        let check_pending = std::fs::metadata(path).map_err(|error| other(error.into()))?.len() > check_limit;
        if !check_pending {
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
        let check_pending = AtomicBool::new(check_pending);
        let pages = PageReaders::new(options.get_filename().to_owned());
        let lost = Sender::new(false);
        let store = SqliteStore {
            writer,
            read_options: options,
            sqlx_readers: readers,
            page_readers: pages,
            check_pending,
            lost,
            file_owner: Some(owner),
        };
        backend::verify_newest_log(&store).await.map_err(|error| store_open_error(path, error))?;
        Ok(store)
    }

    /// Runs `work` in a transaction if this process owns the file. `commits` decides whether there is something to
    /// commit.
    async fn transaction<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Connection) -> SqliteResult<T> + Send + 'static,
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

    /// Like [`SqliteStore::transaction`], for work that is always committed.
    async fn write_transaction<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Connection) -> SqliteResult<T> + Send + 'static,
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
            // On a full disk, the last frame of the commit is not in the WAL, and without it nothing is committed.
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
        // While nothing is written, two transactions that begin see the same state.
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

    async fn delete_log_entries(&self, up_to: Revision, limit: u32) -> Result<u64, StoreError> {
        let work = move |connection: &Connection| {
            let sql = "DELETE FROM log WHERE revision IN \
                       (SELECT revision FROM log WHERE revision <= ?1 ORDER BY revision LIMIT ?2)";
            Ok(connection.execute(sql, params![revision_to_i64(up_to), limit])? as u64)
        };
        self.write_transaction(work).await
    }

    /// A commit of SQLite is decided when it returns, or when the file is opened again.
    async fn resolve_pending_commits(&self) -> Result<(), StoreError> {
        self.writer.pause().await.map(drop)
    }

    fn as_replica_registry(self: Arc<Self>) -> Option<Arc<dyn ReplicaRegistry>> {
        None
    }

    async fn wait_until_lost(&self) {
        // The sender exists as long as `self`.
        let _ = self.lost.subscribe().wait_for(|lost| *lost).await;
    }

    fn has_single_server_since(&self, _: Instant) -> bool {
        true
    }

    async fn shutdown(&self) {
        self.sqlx_readers.close().await;
        self.page_readers.close().await;
        let Some(owner) = self.file_owner.clone() else { return };
        // The last step, which copies the WAL into the file. If it fails, the next start does it.
        if let Err(error) = owner.release(&self.writer).await {
            tracing::warn!(error = &error as &dyn std::error::Error, "closing the database failed");
        }
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
    use crate::store::{LoadedKey, OpenError, SnapshotPart, SnapshotRecord, row_format::member_checksum};

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
}
