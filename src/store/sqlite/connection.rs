//! The one connection that writes. It is rusqlite's: a transaction runs in one go on the connection's thread, where sqlx
//! sends each statement there and back, and copies each value on the way.
//!
//! Who opens, checks and migrates a file, and who reads a few rows of it, does so through sqlx: see `sqlite.rs`.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    sync::mpsc,
    time::Duration,
};

use rusqlite::{CachedStatement, Connection, ErrorCode, OpenFlags, config::DbConfig};
use tokio::{sync::oneshot, task::spawn_blocking};

use crate::store::{StoreError, row_decoding::unreadable_column, row_format::damaged_error};

/// How many statements the connection keeps prepared: all that write or ask what is to be written.
const STATEMENT_CACHE_SIZE: usize = 64;

/// SQLite's pages in memory. Digests lie anywhere in their table: with SQLite's own 2 MB, a batch of imports writes pages
/// before its commit, and reads them again.
const CACHE_KIB: i64 = 8 * 1024;
/// How many pages the WAL takes, 16 MB, before they are copied to their places: one that changed a few times is copied
/// once. Their own 1,000 fill up with some 600 creates, and each time a commit waits for the whole file to be on disk.
const WAL_PAGES: i64 = 4000;

/// How long a statement waits for a lock that another process has.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);

/// Why something ended early.
#[derive(Debug)]
pub(super) enum SqliteFailure {
    Sqlite(rusqlite::Error),
    Store(StoreError),
}

pub(super) type SqliteResult<T> = std::result::Result<T, SqliteFailure>;

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

/// A column that cannot be read as what it should be.
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

/// What the file system, or the state of the file, does not allow now.
pub(super) fn unavailable_failure(
    cause: impl Into<Box<dyn std::error::Error + Send + Sync>>,
) -> SqliteFailure {
    StoreError::Unavailable(cause.into()).into()
}

/// Does what may wait for a disk on a thread that may.
pub(super) async fn run_blocking<T: Send + 'static>(
    work: impl FnOnce() -> SqliteResult<T> + Send + 'static,
) -> std::result::Result<T, StoreError> {
    let done = spawn_blocking(work).await.map_err(|error| StoreError::Unavailable(error.into()))?;
    done.map_err(StoreError::from)
}

type ConnectionJob = Box<dyn FnOnce(&mut ConnectionSlot) + Send>;

/// The connection to a file.
struct ConnectionSlot {
    path: PathBuf,
    state: ConnectionState,
}

enum ConnectionState {
    Open(Connection),
    /// Not yet; or not any more, after a fault: whatever state that left the connection in, a new one begins afresh. The
    /// old one is kept until then, so that the file is never without a connection.
    NeedsOpen(Option<Connection>),
    Closed,
}

/// The writing connection of a file, on a thread of its own. Work that has begun is done to its end, also when nobody
/// waits for it any more.
#[derive(Debug)]
pub(super) struct SqliteWriter {
    /// None = the file is only looked at.
    jobs: Option<mpsc::Sender<ConnectionJob>>,
}

/// While this lives the thread waits, and nobody writes.
pub(super) struct WriterPause {
    _release: Option<mpsc::Sender<()>>,
}

impl SqliteWriter {
    /// Opens the file at `path`, which is there.
    pub(super) async fn open(path: &Path) -> std::result::Result<SqliteWriter, StoreError> {
        let mut slot = ConnectionSlot { path: path.to_owned(), state: ConnectionState::NeedsOpen(None) };
        let (jobs, received) = mpsc::channel::<ConnectionJob>();
        let thread = std::thread::Builder::new().name("keyward-sqlite".to_owned()).spawn(move || {
            // It ends with the last who could send.
            for job in received {
                job(&mut slot);
            }
        });
        thread.map_err(|error| StoreError::Unavailable(error.into()))?;
        let writer = SqliteWriter { jobs: Some(jobs) };
        writer.run(|_| Ok(())).await?;
        Ok(writer)
    }

    /// Of a file that is only looked at.
    pub(super) const fn disabled() -> SqliteWriter {
        SqliteWriter { jobs: None }
    }

    /// Does `run` once that before it has ended. It begins and ends its transaction itself; what it leaves open when
    /// it fails is undone.
    pub(super) async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Connection) -> SqliteResult<T> + Send + 'static,
    ) -> std::result::Result<T, StoreError> {
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
                // Only this connection still has the WAL, if that was removed.
                Ok(_) | Err(SqliteFailure::Store(StoreError::OwnershipLost(_))) => {
                    ConnectionState::Open(connection)
                }
                Err(_) => ConnectionState::NeedsOpen(Some(connection)),
            };
            done
        });
        done.await?.map_err(StoreError::from)
    }

    /// Waits until what was begun has ended, and holds back what comes next.
    pub(super) async fn pause(&self) -> std::result::Result<WriterPause, StoreError> {
        if self.jobs.is_none() {
            return Ok(WriterPause { _release: None });
        }
        let (pause, over) = mpsc::channel();
        let (tell, begun) = oneshot::channel();
        self.send_job(Box::new(move |_| {
            let _ = tell.send(());
            // It ends when the other end is dropped.
            let _ = over.recv();
        }))?;
        begun.await.map_err(|_| closed_error())?;
        Ok(WriterPause { _release: Some(pause) })
    }

    /// Closes the connection for good.
    pub(super) async fn close(&self) -> std::result::Result<(), StoreError> {
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
    ) -> std::result::Result<T, StoreError> {
        let (answer, done) = oneshot::channel();
        self.send_job(Box::new(move |slot| {
            // Whoever asked may have gone.
            let _ = answer.send(work(slot));
        }))?;
        done.await.map_err(|_| closed_error())
    }

    fn send_job(&self, job: ConnectionJob) -> std::result::Result<(), StoreError> {
        self.jobs.as_ref().ok_or_else(closed_error)?.send(job).map_err(|_| closed_error())
    }
}

fn closed_error() -> StoreError {
    StoreError::Unavailable("the database is closed".into())
}

/// A file that was removed meanwhile is not made anew, and a connection that is closed leaves the WAL as it is: only the
/// end of a term copies all of it and removes it (`mark.rs`).
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

/// A connection that reads. It cannot change the file, and so leaves the WAL as it is when it is closed.
pub(super) fn connect_reader(path: &Path) -> SqliteResult<Connection> {
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(path, flags)?;
    connection.busy_timeout(BUSY_TIMEOUT)?;
    connection.execute_batch("PRAGMA query_only = on")?;
    Ok(connection)
}

/// Runs a statement without values.
pub(super) fn execute(connection: &Connection, sql: &'static str) -> SqliteResult<()> {
    connection.prepare_cached(sql)?.execute([])?;
    Ok(())
}

/// Runs a statement for each row, in their order. How many rows of the table it changed.
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
