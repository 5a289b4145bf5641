//! The one connection that writes. It is rusqlite's: a transaction runs in one go on a thread that may block, where sqlx
//! sends each statement to a thread of its own and back, and copies each value on the way.
//!
//! Who opens, checks and migrates a file, and who reads a few rows of it, does so through sqlx: see `sqlite.rs`.

use std::{path::PathBuf, sync::Arc, time::Duration};

use rusqlite::{CachedStatement, Connection, ErrorCode};
use tokio::{
    sync::{Mutex, OwnedMutexGuard},
    task::spawn_blocking,
};

use crate::store::{StoreError, rows::damaged};

/// How many statements the connection keeps prepared: all that write or ask what is to be written.
const STATEMENTS: usize = 64;

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

/// Does what may wait for a disk on a thread that may.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> std::result::Result<T, StoreError> {
    let done = spawn_blocking(work).await.map_err(|error| StoreError::Unavailable(error.into()))?;
    done.map_err(StoreError::from)
}

/// What the connection is in. Work that has begun holds it to its end, also when nobody waits for it any more.
#[derive(Debug)]
enum Slot {
    Open(Connection),
    /// After a fault: whatever state that left the connection in, a new one begins afresh.
    Faulty,
    Closed,
}

/// The writing connection of a file.
#[derive(Debug)]
pub(super) struct Writer {
    path: PathBuf,
    slot: Arc<Mutex<Slot>>,
}

/// While this lives nobody writes.
pub(super) struct Pause(#[expect(dead_code, reason = "it is held")] OwnedMutexGuard<Slot>);

impl Writer {
    /// Opens the file at `path`, which is there and has its tables.
    pub(super) async fn open(path: &str) -> std::result::Result<Writer, StoreError> {
        let path = PathBuf::from(path);
        let opened = path.clone();
        let connection = blocking(move || connect(&opened)).await?;
        Ok(Writer { path, slot: Arc::new(Mutex::new(Slot::Open(connection))) })
    }

    /// Of a file that is only looked at: it is closed.
    pub(super) fn none() -> Writer {
        Writer { path: PathBuf::new(), slot: Arc::new(Mutex::new(Slot::Closed)) }
    }

    /// Does `work` once that before it has ended. It begins and ends its transaction itself; what it leaves open when
    /// it fails is undone.
    pub(super) async fn work<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Connection) -> Result<T> + Send + 'static,
    ) -> std::result::Result<T, StoreError> {
        let mut slot = self.slot.clone().lock_owned().await;
        let path = self.path.clone();
        blocking(move || {
            let connection = match std::mem::replace(&mut *slot, Slot::Faulty) {
                Slot::Open(connection) => connection,
                Slot::Faulty => connect(&path)?,
                Slot::Closed => {
                    *slot = Slot::Closed;
                    return Err(StoreError::Unavailable("the database is closed".into()).into());
                }
            };
            let done = work(&connection);
            if done.is_ok() {
                *slot = Slot::Open(connection);
            }
            done
        })
        .await
    }

    /// Waits until what was begun has ended, and holds back what comes next.
    pub(super) async fn pause(&self) -> Pause {
        Pause(self.slot.clone().lock_owned().await)
    }

    /// Closes the connection for good.
    pub(super) async fn close(&self) -> std::result::Result<(), StoreError> {
        let mut slot = self.slot.clone().lock_owned().await;
        blocking(move || match std::mem::replace(&mut *slot, Slot::Closed) {
            Slot::Open(connection) => connection.close().map_err(|(_, error)| error.into()),
            Slot::Faulty | Slot::Closed => Ok(()),
        })
        .await
    }
}

fn connect(path: &PathBuf) -> Result<Connection> {
    let connection = Connection::open(path)?;
    connection.busy_timeout(Duration::from_secs(5))?;
    connection
        .execute_batch("PRAGMA journal_mode = wal; PRAGMA synchronous = full; PRAGMA foreign_keys = on")?;
    connection.set_prepared_statement_cache_capacity(STATEMENTS);
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
