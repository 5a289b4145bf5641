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

use crate::store::{StoreError, rows::damaged};

/// How many statements the connection keeps prepared: all that write or ask what is to be written.
const STATEMENTS: usize = 64;

/// SQLite's pages in memory. Digests lie anywhere in their table: with SQLite's own 2 MB, a batch of imports writes pages
/// before its commit, and reads them again.
const CACHE_KIB: i64 = 8 * 1024;
/// How many pages the WAL takes, 16 MB, before they are copied to their places: one that changed a few times is copied
/// once. Their own 1,000 fill up with some 600 creates, and each time a commit waits for the whole file to be on disk.
const WAL_PAGES: i64 = 4000;

/// How long a statement waits for a lock that another process has.
const BUSY: Duration = Duration::from_secs(5);

/// Why something ended early.
#[derive(Debug)]
pub(super) enum Failure {
    Sqlite(rusqlite::Error),
    Store(StoreError),
}

pub(super) type Result<T> = std::result::Result<T, Failure>;

impl From<rusqlite::Error> for Failure {
    fn from(error: rusqlite::Error) -> Self {
        Failure::Sqlite(error)
    }
}

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Self {
        Failure::Store(error)
    }
}

/// A column that cannot be read as what it should be.
impl From<sqlx::Error> for Failure {
    fn from(error: sqlx::Error) -> Self {
        Failure::Store(StoreError::Unavailable(error.into()))
    }
}

impl From<Failure> for StoreError {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Store(error) => error,
            Failure::Sqlite(error) => match error.sqlite_error_code() {
                Some(ErrorCode::DiskFull) => StoreError::Full(error.into()),
                Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => {
                    damaged("the database file", error)
                }
                _ => StoreError::Unavailable(error.into()),
            },
        }
    }
}

/// What the file system, or the state of the file, does not allow now.
pub(super) fn unavailable(cause: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Failure {
    StoreError::Unavailable(cause.into()).into()
}

/// Does what may wait for a disk on a thread that may.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> std::result::Result<T, StoreError> {
    let done = spawn_blocking(work).await.map_err(|error| StoreError::Unavailable(error.into()))?;
    done.map_err(StoreError::from)
}

type Job = Box<dyn FnOnce(&mut Slot) + Send>;

/// The connection to a file.
struct Slot {
    path: PathBuf,
    state: State,
}

enum State {
    Open(Connection),
    /// Not yet; or not any more, after a fault: whatever state that left the connection in, a new one begins afresh. The
    /// old one is kept until then, so that the file is never without a connection.
    Fresh(Option<Connection>),
    Closed,
}

/// The writing connection of a file, on a thread of its own. Work that has begun is done to its end, also when nobody
/// waits for it any more.
#[derive(Debug)]
pub(super) struct Writer {
    /// None = the file is only looked at.
    jobs: Option<mpsc::Sender<Job>>,
}

/// While this lives the thread waits, and nobody writes.
pub(super) struct Pause {
    _held: Option<mpsc::Sender<()>>,
}

impl Writer {
    /// Opens the file at `path`, which is there.
    pub(super) async fn open(path: &Path) -> std::result::Result<Writer, StoreError> {
        let mut slot = Slot { path: path.to_owned(), state: State::Fresh(None) };
        let (jobs, received) = mpsc::channel::<Job>();
        let thread = std::thread::Builder::new().name("keyward-sqlite".to_owned()).spawn(move || {
            // It ends with the last who could send.
            for job in received {
                job(&mut slot);
            }
        });
        thread.map_err(|error| StoreError::Unavailable(error.into()))?;
        let writer = Writer { jobs: Some(jobs) };
        writer.work(|_| Ok(())).await?;
        Ok(writer)
    }

    /// Of a file that is only looked at.
    pub(super) const fn none() -> Writer {
        Writer { jobs: None }
    }

    /// Does `work` once that before it has ended. It begins and ends its transaction itself; what it leaves open when
    /// it fails is undone.
    pub(super) async fn work<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Connection) -> Result<T> + Send + 'static,
    ) -> std::result::Result<T, StoreError> {
        let done = self.with(|slot| {
            let connection = match std::mem::replace(&mut slot.state, State::Closed) {
                State::Open(connection) => connection,
                State::Fresh(failed) => match connect(&slot.path) {
                    Ok(connection) => connection,
                    Err(error) => {
                        slot.state = State::Fresh(failed);
                        return Err(error);
                    }
                },
                State::Closed => {
                    slot.state = State::Closed;
                    return Err(closed().into());
                }
            };
            let panicked = |_| Err(StoreError::Unavailable("writing panicked".into()).into());
            let done = catch_unwind(AssertUnwindSafe(|| work(&connection))).unwrap_or_else(panicked);
            if done.is_err() && !connection.is_autocommit() {
                let _ = connection.execute_batch("ROLLBACK");
            }
            slot.state = match &done {
                // Only this connection still has the WAL, if that was removed.
                Ok(_) | Err(Failure::Store(StoreError::Lost(_))) => State::Open(connection),
                Err(_) => State::Fresh(Some(connection)),
            };
            done
        });
        done.await?.map_err(StoreError::from)
    }

    /// Waits until what was begun has ended, and holds back what comes next.
    pub(super) async fn pause(&self) -> std::result::Result<Pause, StoreError> {
        if self.jobs.is_none() {
            return Ok(Pause { _held: None });
        }
        let (pause, over) = mpsc::channel();
        let (tell, begun) = oneshot::channel();
        self.send(Box::new(move |_| {
            let _ = tell.send(());
            // It ends when the other end is dropped.
            let _ = over.recv();
        }))?;
        begun.await.map_err(|_| closed())?;
        Ok(Pause { _held: Some(pause) })
    }

    /// Closes the connection for good.
    pub(super) async fn close(&self) -> std::result::Result<(), StoreError> {
        if self.jobs.is_none() {
            return Ok(());
        }
        let closed = self.with(|slot| match std::mem::replace(&mut slot.state, State::Closed) {
            State::Open(connection) => connection.close().map_err(|(_, error)| Failure::from(error)),
            State::Fresh(_) | State::Closed => Ok(()),
        });
        closed.await?.map_err(StoreError::from)
    }

    async fn with<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Slot) -> T + Send + 'static,
    ) -> std::result::Result<T, StoreError> {
        let (answer, done) = oneshot::channel();
        self.send(Box::new(move |slot| {
            // Whoever asked may have gone.
            let _ = answer.send(work(slot));
        }))?;
        done.await.map_err(|_| closed())
    }

    fn send(&self, job: Job) -> std::result::Result<(), StoreError> {
        self.jobs.as_ref().ok_or_else(closed)?.send(job).map_err(|_| closed())
    }
}

fn closed() -> StoreError {
    StoreError::Unavailable("the database is closed".into())
}

/// A file that was removed meanwhile is not made anew, and a connection that is closed leaves the WAL as it is: only the
/// end of a term copies all of it and removes it (`mark.rs`).
fn connect(path: &Path) -> Result<Connection> {
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(path, flags)?;
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true)?;
    connection.busy_timeout(BUSY)?;
    connection
        .execute_batch("PRAGMA journal_mode = wal; PRAGMA synchronous = full; PRAGMA foreign_keys = on")?;
    connection.pragma_update(None, "cache_size", -CACHE_KIB)?;
    connection.pragma_update(None, "wal_autocheckpoint", WAL_PAGES)?;
    connection.set_prepared_statement_cache_capacity(STATEMENTS);
    Ok(connection)
}

/// A connection that reads. It cannot change the file, and so leaves the WAL as it is when it is closed.
pub(super) fn read_only(path: &Path) -> Result<Connection> {
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(path, flags)?;
    connection.busy_timeout(BUSY)?;
    connection.execute_batch("PRAGMA query_only = on")?;
    Ok(connection)
}

/// Runs a statement without values.
pub(super) fn run(connection: &Connection, sql: &'static str) -> Result<()> {
    connection.prepare_cached(sql)?.execute([])?;
    Ok(())
}

/// Runs a statement for each row, in their order. How many rows of the table it changed.
pub(super) fn each<T>(
    connection: &Connection,
    sql: &'static str,
    rows: impl IntoIterator<Item = T>,
    execute: impl Fn(&mut CachedStatement<'_>, T) -> rusqlite::Result<usize>,
) -> Result<usize> {
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
