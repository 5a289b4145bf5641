//! The embedded store: one SQLite file, owned by one process.
//!
//! WAL with `synchronous=FULL`: what was committed survives a power cut. A second server refuses to start, and one that
//! has lost the file stops (`sqlite/owner.rs`), while backup tools may still read. A file whose WAL is lost is refused
//! (`sqlite/mark.rs`). One connection writes (`sqlite/connection.rs`); a few others read, each seeing whole transactions
//! only. Here: opening and checking; what a transaction writes is in `sqlite/write.rs`, the reads in `backend.rs`.

mod backup;
mod bulk;
mod connection;
mod facts;
mod look;
mod mark;
mod migrate;
mod owner;
mod pages;
mod permissions;
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
    limit::Spent,
    log::LogRow,
    name::KeyId,
    time::{Revision, Timestamp},
};

pub(super) use self::look::look;
use self::{
    bulk::SqliteBulkReader,
    connection::{Result as Written, Writer},
    owner::{Owner, give_up, hold, watch},
    pages::{PageRow, Readers},
    snapshot::Reader,
};
use super::{
    BulkReader, Checkpoint, CommitError, Committed, Head, Hour, Loader, OpenError, Schema, Step, StoreError,
    StoredKey, UsageBatch, Write,
    backend::{self, Backend, TakeLog, TakeRow, View},
    fleet::Fleet,
    queries::Sql,
    rows::{damaged, revision_to_i64},
};

/// The first SQLite without the WAL-reset corruption.
const OLDEST_SQLITE: (u32, u32, u32) = (3, 51, 3);
const READERS: u32 = 4;
/// A file of up to so many bytes is checked before it is used. Of a larger one that would hold up the start for
/// seconds by the gigabyte: its check begins when the keys are loaded, each of which has a checksum of its own.
const CHECKED_FIRST: u64 = 64 << 20;

/// The store in one SQLite file.
pub struct Sqlite {
    writer: Writer,
    /// How a reader opens the file.
    options: SqliteConnectOptions,
    /// For snapshots.
    readers: SqlitePool,
    /// For everything else.
    pages: Readers,
    /// Whether the file is to be checked when the keys are loaded.
    unchecked: AtomicBool,
    /// Whether the file was found damaged, or is no longer this process's own.
    lost: Sender<bool>,
    /// None = the file is only looked at.
    owner: Option<Arc<Owner>>,
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
    pub async fn open(path: &str, schema: Schema) -> Result<Sqlite, OpenError> {
        Sqlite::open_checked(path, CHECKED_FIRST, schema).await
    }

    /// Opens a file whose WAL is lost, as it is without. It stays one that was not closed until something is committed.
    ///
    /// # Errors
    /// As [`Sqlite::open`], and when its WAL is not lost.
    pub async fn open_without_wal(path: &str) -> Result<Sqlite, OpenError> {
        Sqlite::open_held(path, hold(path, true).await?, CHECKED_FIRST, Schema::Require).await
    }

    /// Brings the file's schema up to date, or only says what that would do. Gives the steps.
    ///
    /// # Errors
    /// As [`Sqlite::open`].
    pub async fn migrate(path: &str, dry_run: bool) -> Result<Vec<Step>, OpenError> {
        if dry_run && !Path::new(path).exists() {
            return Ok(migrate::all());
        }
        let (owner, writer) = hold(path, false).await?;
        let mut connection = SqliteConnection::connect_with(&migrating(owner.real()))
            .await
            .map_err(|error| open_error(path, error))?;
        check_version(&mut connection).await?;
        let steps = migrate::pending(path, &mut connection).await?;
        if !dry_run {
            migrate::run(path, &mut connection, Schema::Migrate).await?;
        }
        let _ = connection.close().await;
        owner.end(&writer).await.map_err(|error| opening_error(path, error))?;
        Ok(steps)
    }

    /// Opens a file, and checks it first if it has up to so many bytes.
    async fn open_checked(path: &str, first: u64, schema: Schema) -> Result<Sqlite, OpenError> {
        let held = hold(path, false).await?;
        let owner = held.0.clone();
        let opened = Sqlite::open_held(path, held, first, schema).await;
        let store = opened.map_err(|error| owner.explain(error))?;
        tokio::spawn(watch(Arc::downgrade(&owner), store.lost.clone()));
        let begun = store.writer.work(move |connection| owner.begin_term(connection)).await;
        begun.map_err(|error| opening_error(path, error))?;
        Ok(store)
    }

    async fn open_held(
        path: &str,
        (owner, writer): (Arc<Owner>, Writer),
        first: u64,
        schema: Schema,
    ) -> Result<Sqlite, OpenError> {
        let other = |source: Box<dyn std::error::Error + Send + Sync>| OpenError::Other {
            path: path.to_owned(),
            source,
        };
        let mut migrating = SqliteConnection::connect_with(&migrating(owner.real()))
            .await
            .map_err(|error| open_error(path, error))?;
        check_version(&mut migrating).await?;
        let unchecked = std::fs::metadata(path).map_err(|error| other(error.into()))?.len() > first;
        if !unchecked {
            check_whole(path, &mut migrating).await?;
        }
        migrate::run(path, &mut migrating, schema).await?;
        let _ = migrating.close().await;
        let options = reading(owner.real());
        let readers = SqlitePoolOptions::new()
            .max_connections(READERS)
            .acquire_timeout(Duration::from_secs(5))
            .connect_with(options.clone())
            .await
            .map_err(|error| other(error.into()))?;
        let unchecked = AtomicBool::new(unchecked);
        let pages = Readers::new(options.get_filename().to_owned());
        let lost = Sender::new(false);
        let store = Sqlite { writer, options, readers, pages, unchecked, lost, owner: Some(owner) };
        backend::check_log(&store).await.map_err(|error| opening_error(path, error))?;
        Ok(store)
    }

    /// Does `work` in a transaction, if this process owns the file. `commits` says whether there is something to commit.
    async fn transaction<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Connection) -> Written<T> + Send + 'static,
        commits: impl FnOnce(&T) -> bool + Send + 'static,
    ) -> Result<T, StoreError> {
        let Some(owner) = self.owner.clone() else {
            return Err(StoreError::Unavailable("the database is open for reading only".into()));
        };
        let done = self.writer.work(move |connection| owner.transaction(connection, work, commits)).await;
        if let Err(error @ StoreError::Lost(_)) = &done {
            give_up(&self.lost, error);
        }
        done
    }

    /// The same of what is always committed.
    async fn change<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Connection) -> Written<T> + Send + 'static,
    ) -> Result<T, StoreError> {
        self.transaction(work, |_| true).await
    }
}

#[async_trait]
impl Backend for Sqlite {
    type Db = sqlx::Sqlite;
    type Row = PageRow;

    async fn rows(&self, query: Sql<sqlx::Sqlite>) -> Result<Vec<PageRow>, StoreError> {
        self.pages.rows(query).await
    }

    async fn log_page(&self, query: Sql<sqlx::Sqlite>) -> Result<Vec<LogRow>, StoreError> {
        self.pages.log(query).await
    }

    async fn keys_by_id(&self, ids: &[KeyId]) -> Result<Vec<StoredKey>, StoreError> {
        self.pages.keys(ids).await
    }

    fn bulk(&self, entries: u64) -> Box<dyn BulkReader + '_> {
        Box::new(SqliteBulkReader::new(&self.pages, entries))
    }

    async fn each_entry(&self, after: Revision, take: TakeLog<'_>) -> Result<(), StoreError> {
        snapshot::log(self.options.get_filename().to_owned(), after, take).await
    }

    async fn commit_batch(&self, batch: &[Write]) -> Result<Committed, CommitError> {
        let batch = batch.to_vec();
        let committing = Arc::new(AtomicBool::new(false));
        let begun = committing.clone();
        let commits = move |committed: &Committed| {
            let commits = !committed.rows.is_empty();
            begun.store(commits, Ordering::Relaxed);
            commits
        };
        match self.transaction(move |connection| write::batch(connection, &batch), commits).await {
            Ok(committed) => Ok(committed),
            // Without room the commit's last frame is not in the WAL, and without that nothing of it counts.
            Err(error) if committing.load(Ordering::Relaxed) && !matches!(error, StoreError::Full(_)) => {
                Err(CommitError::Unknown(error))
            }
            Err(error) => Err(CommitError::NotRecorded(error)),
        }
    }

    async fn view(&self, forget_before: Timestamp, loader: &Arc<dyn Loader>) -> Result<Head, StoreError> {
        let mut connection = self.readers.acquire().await.map_err(store_error)?;
        // While nobody writes, two transactions that begin see the same.
        let writer = self.writer.pause().await?;
        let mut transaction = connection.begin().await.map_err(store_error)?;
        sqlx::query("SELECT head FROM meta").execute(&mut *transaction).await.map_err(store_error)?;
        let reader = Reader::begin(self.options.get_filename().to_owned()).await?;
        drop(writer);
        let mut view = SqliteView { connection: &mut transaction, reader: Some(reader) };
        let head = backend::snapshot(&mut view, forget_before, loader).await?;
        if self.unchecked.swap(false, Ordering::Relaxed) {
            tokio::spawn(check_behind(self.options.clone(), self.lost.clone()));
        }
        Ok(head)
    }

    async fn write_usage(&self, batch: &UsageBatch) -> Result<Vec<(KeyId, Spent)>, StoreError> {
        let batch = batch.clone();
        self.change(move |connection| write::usage(connection, &batch)).await
    }

    async fn drop_usage(&self, before: Hour) -> Result<(), StoreError> {
        let work = move |connection: &Connection| {
            connection.execute("DELETE FROM usage WHERE hour < ?1", [before.0])?;
            Ok(())
        };
        self.change(work).await
    }

    async fn note_checkpoint(&self, checkpoint: &Checkpoint) -> Result<(), StoreError> {
        let Checkpoint { at, entries, made_at } = *checkpoint;
        let work = move |connection: &Connection| {
            let sql = "INSERT INTO checkpoints VALUES (?1, ?2, ?3, ?4) ON CONFLICT DO NOTHING";
            let entries = i64::try_from(entries).unwrap_or(i64::MAX);
            connection
                .execute(sql, params![revision_to_i64(at.revision), at.hash, entries, made_at.as_micros()])?;
            Ok(())
        };
        self.change(work).await
    }

    async fn take_out(&self, upto: Revision, most: u32) -> Result<u64, StoreError> {
        let work = move |connection: &Connection| {
            let sql = "DELETE FROM log WHERE revision IN \
                       (SELECT revision FROM log WHERE revision <= ?1 ORDER BY revision LIMIT ?2)";
            Ok(connection.execute(sql, params![revision_to_i64(upto), most])? as u64)
        };
        self.change(work).await
    }

    /// SQLite has decided a commit when it answers, or when its file is opened again.
    async fn settled(&self) -> Result<(), StoreError> {
        self.writer.pause().await.map(drop)
    }

    fn as_fleet(self: Arc<Self>) -> Option<Arc<dyn Fleet>> {
        None
    }

    async fn wait_until_lost(&self) {
        // The sender lives as long as `self`.
        let _ = self.lost.subscribe().wait_for(|lost| *lost).await;
    }

    fn one_source(&self, _: Instant) -> bool {
        true
    }

    async fn shut(&self) {
        self.readers.close().await;
        self.pages.close().await;
        let Some(owner) = self.owner.clone() else { return };
        // Last of all, since that folds the WAL into the file; if it fails the next start does it.
        if let Err(error) = owner.end(&self.writer).await {
            tracing::warn!(error = &error as &dyn std::error::Error, "closing the database failed");
        }
    }
}

/// The view of two transactions that see the same revision.
struct SqliteView<'c> {
    connection: &'c mut SqliteConnection,
    /// What reads the keys.
    reader: Option<Reader>,
}

#[async_trait]
impl View for SqliteView<'_> {
    type Db = sqlx::Sqlite;

    async fn each(
        &mut self,
        query: Sql<sqlx::Sqlite>,
        take: TakeRow<'_, sqlx::Sqlite>,
    ) -> Result<(), StoreError> {
        // A snapshot asks for whole tables: there is no value to bind.
        let (statement, _) = query.into_parts();
        let mut rows = sqlx::query(AssertSqlSafe(statement)).fetch(&mut *self.connection);
        while let Some(row) = rows.try_next().await.map_err(store_error)? {
            take(&row)?;
        }
        Ok(())
    }

    async fn keys(&mut self, forget_before: Timestamp, loader: &Arc<dyn Loader>) -> Result<(), StoreError> {
        match self.reader.take() {
            Some(reader) => reader.keys(forget_before, loader).await,
            None => Ok(()),
        }
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

/// Checks a file that is in use, on a connection of its own.
async fn check_behind(options: SqliteConnectOptions, lost: Sender<bool>) {
    let path = options.get_filename().display().to_string();
    let check = async {
        let connection = SqliteConnection::connect_with(&options).await;
        let mut connection = connection.map_err(|error| open_error(&path, error))?;
        let checked = check_whole(&path, &mut connection).await;
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
fn migrating(path: &Path) -> SqliteConnectOptions {
    SqliteConnectOptions::new()
        .filename(path)
        .journal_mode(SqliteJournalMode::Wal)
        .synchronous(SqliteSynchronous::Full)
        .foreign_keys(true)
        .busy_timeout(Duration::from_secs(5))
}

/// How a file is opened to be read. Such a connection leaves the WAL as it is when it is closed.
fn reading(path: &Path) -> SqliteConnectOptions {
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

fn opening_error(path: &str, error: StoreError) -> OpenError {
    match error {
        StoreError::Damaged(what) => OpenError::Damaged { path: path.to_owned(), what },
        error => OpenError::Other { path: path.to_owned(), source: error.into() },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::{
        account::Member,
        name::{AccountId, RoleName, UserId},
        time::Revision,
    };
    use crate::store::{LoadedKey, Part, SnapshotItem, rows::member_sum};

    /// Takes a snapshot and keeps nothing.
    struct Nobody;

    impl Loader for Nobody {
        fn item(&self, _: SnapshotItem) {}

        fn expect(&self, _: usize) {}

        fn part(&self) -> Box<dyn Part> {
            Box::new(Nobody)
        }
    }

    impl Part for Nobody {
        fn key(&mut self, _: &LoadedKey<'_>) {}

        fn end(self: Box<Self>) {}
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_damaged_index_is_found_at_the_start_or_in_a_large_file_behind_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("keyward.db").display().to_string();
        let store = Sqlite::open(&path, Schema::Migrate).await.unwrap();
        store
            .writer
            .work(|connection| {
                let member = Member {
                    account: AccountId::parse("acme").unwrap(),
                    user: UserId::parse("ann").unwrap(),
                    role: RoleName::parse("agent").unwrap(),
                    revision: Revision(1),
                };
                let sql = "INSERT INTO members VALUES ('acme', 'ann', 'agent', 1, ?1)";
                connection.execute_batch("PRAGMA foreign_keys = off; PRAGMA writable_schema = on")?;
                connection.execute(sql, [member_sum(&member)])?;
                let other = "UPDATE sqlite_schema SET sql = 'CREATE INDEX members_with_role ON members (user_id, account)' \
                             WHERE name = 'members_with_role'";
                connection.execute(other, [])?;
                Ok(())
            })
            .await
            .unwrap();
        store.shut().await;
        drop(store);
        let at_start = Sqlite::open(&path, Schema::Migrate).await.unwrap_err();
        assert!(matches!(at_start, OpenError::Damaged { .. }), "{at_start}");
        let store = Sqlite::open_checked(&path, 0, Schema::Migrate).await.unwrap();
        let nobody: Arc<dyn Loader> = Arc::new(Nobody);
        store.view(Timestamp::from_micros(0), &nobody).await.unwrap();
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
            assert_eq!(version_at_least(version, OLDEST_SQLITE), good, "{version}");
        }
    }
}
