//! The only connection that writes.
//!
//! It uses rusqlite: a transaction runs at once on the connection's thread. sqlx would send each statement to another
//! thread and copy each value.
//!
//! Opening, checking and migrating a file use sqlx: see `store.rs`.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    sync::mpsc,
    time::Duration,
};

use rusqlite::{CachedStatement, Connection, ErrorCode, OpenFlags, config::DbConfig};
use tokio::{sync::oneshot, task::spawn_blocking};

use crate::store::{StoreError, row_decoding::unreadable_column, row_format::damaged_error};

/// The number of cached prepared statements: more than there are in `write.rs` and `pre_state.rs`.
const STATEMENT_CACHE_SIZE: usize = 64;

/// The page cache in KiB. Digests are spread over their table: with SQLite's default of 2 MB, a batch of imports would
/// write pages before its commit and read them again.
const CACHE_KIB: i64 = 8 * 1024;
/// The WAL size in pages (16 MB) that triggers a checkpoint, which writes a page once even if it changed several times.
/// SQLite's default of 1,000 pages is reached after some 600 creates, and each time a commit waits for a sync of the
/// whole file.
const WAL_PAGES: i64 = 4000;

/// How long a statement waits for a lock of another process.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);

/// An error of SQLite or of the store.
#[derive(Debug)]
pub(super) enum SqliteFailure {
    Sqlite(rusqlite::Error),
    Store(StoreError),
}

pub(super) type SqliteResult<T> = Result<T, SqliteFailure>;

impl From<rusqlite::Error> for SqliteFailure {
    fn from(error: rusqlite::Error) -> Self {
        SqliteFailure::Sqlite(error)
    }
}

impl From<StoreError> for SqliteFailure {
    fn from(error: StoreError) -> Self {
        SqliteFailure::Store(error)
    }
}

/// A column of another type than expected.
impl From<sqlx::Error> for SqliteFailure {
    fn from(error: sqlx::Error) -> Self {
        SqliteFailure::Store(unreadable_column(error))
    }
}

impl From<SqliteFailure> for StoreError {
    fn from(failure: SqliteFailure) -> Self {
        match failure {
            SqliteFailure::Store(error) => error,
            SqliteFailure::Sqlite(error) => match error.sqlite_error_code() {
                Some(ErrorCode::DiskFull) => StoreError::Full(error.into()),
                Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => {
                    damaged_error("the database file", error)
                }
                _ => StoreError::Unavailable(error.into()),
            },
        }
    }
}

/// The failure for something that the file system or the state of the file prevents now.
pub(super) fn unavailable_failure(
    cause: impl Into<Box<dyn std::error::Error + Send + Sync>>,
) -> SqliteFailure {
    StoreError::Unavailable(cause.into()).into()
}

/// Runs work that may wait for the disk on a blocking thread.
pub(super) async fn run_blocking<T: Send + 'static>(
    work: impl FnOnce() -> SqliteResult<T> + Send + 'static,
) -> Result<T, StoreError> {
    let done = spawn_blocking(work).await.map_err(|error| StoreError::Unavailable(error.into()))?;
    done.map_err(StoreError::from)
}

type ConnectionJob = Box<dyn FnOnce(&mut ConnectionSlot) + Send>;

/// The file and its connection.
struct ConnectionSlot {
    path: PathBuf,
    state: ConnectionState,
}

enum ConnectionState {
    Open(Connection),
    /// Not opened yet, or failed: its state is unknown, so the next job opens another one. The old connection is kept
    /// until then, so that the file always has one.
    NeedsOpen(Option<Connection>),
    Closed,
}

/// The writing connection of a file, on a dedicated thread. A started job always runs to its end, even if its caller is
/// gone.
#[derive(Debug)]
pub(super) struct SqliteWriter {
    /// `None` if the file is only inspected.
    jobs: Option<mpsc::Sender<ConnectionJob>>,
}

/// While this exists, the thread waits and nothing is written.
pub(super) struct WriterPause {
    _release: Option<mpsc::Sender<()>>,
}

impl SqliteWriter {
    /// Opens the file at `path`, which must exist.
    pub(super) async fn open(path: &Path) -> Result<SqliteWriter, StoreError> {
        let mut slot = ConnectionSlot { path: path.to_owned(), state: ConnectionState::NeedsOpen(None) };
        let (jobs, received) = mpsc::channel::<ConnectionJob>();
        let thread = std::thread::Builder::new().name("keyward-sqlite".to_owned()).spawn(move || {
            // The loop ends when the last sender is dropped.
            for job in received {
                job(&mut slot);
            }
        });
        thread.map_err(|error| StoreError::Unavailable(error.into()))?;
        let writer = SqliteWriter { jobs: Some(jobs) };
        writer.run(|_| Ok(())).await?;
        Ok(writer)
    }

    /// The writer of a file that is only inspected.
    pub(super) const fn disabled() -> SqliteWriter {
        SqliteWriter { jobs: None }
    }

    /// Runs `work` after all earlier jobs. It begins and ends its transaction itself; if it fails, an open transaction
    /// is rolled back.
    pub(super) async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Connection) -> SqliteResult<T> + Send + 'static,
    ) -> Result<T, StoreError> {
        let done = self.run_on_slot(|slot| {
            let connection = match std::mem::replace(&mut slot.state, ConnectionState::Closed) {
                ConnectionState::Open(connection) => connection,
                ConnectionState::NeedsOpen(failed) => match connect_writer(&slot.path) {
                    Ok(connection) => connection,
                    Err(error) => {
                        slot.state = ConnectionState::NeedsOpen(failed);
                        return Err(error);
                    }
                },
                ConnectionState::Closed => {
                    slot.state = ConnectionState::Closed;
                    return Err(closed_error().into());
                }
            };
            let panicked = |_| Err(StoreError::Unavailable("writing panicked".into()).into());
            let done = catch_unwind(AssertUnwindSafe(|| work(&connection))).unwrap_or_else(panicked);
            if done.is_err() && !connection.is_autocommit() {
                let _ = connection.execute_batch("ROLLBACK");
            }
            slot.state = match &done {
                // If the WAL was removed, only this connection still has it.
                Ok(_) | Err(SqliteFailure::Store(StoreError::OwnershipLost(_))) => {
                    ConnectionState::Open(connection)
                }
                Err(_) => ConnectionState::NeedsOpen(Some(connection)),
            };
            done
        });
        done.await?.map_err(StoreError::from)
    }

    /// Waits for the jobs that have started, and holds back later ones.
    pub(super) async fn pause(&self) -> Result<WriterPause, StoreError> {
        if self.jobs.is_none() {
            return Ok(WriterPause { _release: None });
        }
        let (release, released) = mpsc::channel();
        let (sender, begun) = oneshot::channel();
        self.send_job(Box::new(move |_| {
            let _ = sender.send(());
            // This ends when the sender is dropped.
            let _ = released.recv();
        }))?;
        begun.await.map_err(|_| closed_error())?;
        Ok(WriterPause { _release: Some(release) })
    }

    /// Closes the connection permanently.
    pub(super) async fn close(&self) -> Result<(), StoreError> {
        if self.jobs.is_none() {
            return Ok(());
        }
        let closed =
            self.run_on_slot(|slot| match std::mem::replace(&mut slot.state, ConnectionState::Closed) {
                ConnectionState::Open(connection) => {
                    connection.close().map_err(|(_, error)| SqliteFailure::from(error))
                }
                ConnectionState::NeedsOpen(_) | ConnectionState::Closed => Ok(()),
            });
        closed.await?.map_err(StoreError::from)
    }

    async fn run_on_slot<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut ConnectionSlot) -> T + Send + 'static,
    ) -> Result<T, StoreError> {
        let (answer, done) = oneshot::channel();
        self.send_job(Box::new(move |slot| {
            // The caller may be gone.
            let _ = answer.send(work(slot));
        }))?;
        done.await.map_err(|_| closed_error())
    }

    fn send_job(&self, job: ConnectionJob) -> Result<(), StoreError> {
        self.jobs.as_ref().ok_or_else(closed_error)?.send(job).map_err(|_| closed_error())
    }
}

fn closed_error() -> StoreError {
    StoreError::Unavailable("the database is closed".into())
}

/// Opens the writing connection. It never creates a file, since the file may have been removed meanwhile. Closing it
/// leaves the WAL as it is: only the end of a term checkpoints and removes the WAL (`open_mark.rs`).
fn connect_writer(path: &Path) -> SqliteResult<Connection> {
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(path, flags)?;
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true)?;
    connection.busy_timeout(BUSY_TIMEOUT)?;
    connection
        .execute_batch("PRAGMA journal_mode = wal; PRAGMA synchronous = full; PRAGMA foreign_keys = on")?;
    connection.pragma_update(None, "cache_size", -CACHE_KIB)?;
    connection.pragma_update(None, "wal_autocheckpoint", WAL_PAGES)?;
    connection.set_prepared_statement_cache_capacity(STATEMENT_CACHE_SIZE);
    Ok(connection)
}

/// Opens a connection that cannot change the file, and so leaves the WAL as it is when it is closed.
pub(super) fn connect_reader(path: &Path) -> SqliteResult<Connection> {
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(path, flags)?;
    connection.busy_timeout(BUSY_TIMEOUT)?;
    connection.execute_batch("PRAGMA query_only = on")?;
    Ok(connection)
}

/// Runs a statement without arguments.
pub(super) fn execute(connection: &Connection, sql: &'static str) -> SqliteResult<()> {
    connection.prepare_cached(sql)?.execute([])?;
    Ok(())
}

/// Runs a statement for each row, in order. Returns how many rows of the table changed.
pub(super) fn execute_each<T>(
    connection: &Connection,
    sql: &'static str,
    rows: impl IntoIterator<Item = T>,
    execute: impl Fn(&mut CachedStatement<'_>, T) -> rusqlite::Result<usize>,
) -> SqliteResult<usize> {
    let mut rows = rows.into_iter().peekable();
    if rows.peek().is_none() {
        return Ok(0);
    }
    let mut statement = connection.prepare_cached(sql)?;
    let mut changed = 0;
    for row in rows {
        changed += execute(&mut statement, row)?;
    }
    Ok(changed)
}
