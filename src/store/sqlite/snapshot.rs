//! The keys of a snapshot from SQLite, read on a thread of its own through rusqlite, which hands out columns where
//! they are. sqlx sends each row from thread to thread with a copy of every column, which of a million keys takes
//! half a minute. Both are on the same library.

use std::{path::PathBuf, time::Duration};

use rusqlite::{Connection, ErrorCode, OpenFlags, Row, types::FromSqlResult};
use tokio::{sync::mpsc, task::spawn_blocking};

use crate::domain::time::Timestamp;

use super::{
    StoreError,
    backend::TakeKey,
    records::{Columns, Gather, GatheredKey, KEY_COLUMNS, SECRET_COLUMNS},
    rows::damaged,
};

/// How many keys are handed over at once.
const BATCH: usize = 256;
/// How many batches may wait.
const BATCHES: usize = 4;

/// A read transaction.
pub(super) struct Reader(Connection);

impl Reader {
    /// A transaction that sees what is committed now.
    pub(super) async fn begin(path: PathBuf) -> Result<Reader, StoreError> {
        blocking(move || {
            let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
            let connection = Connection::open_with_flags(path, flags)?;
            connection.busy_timeout(Duration::from_secs(5))?;
            // It begins with its first read.
            connection.execute_batch("PRAGMA query_only = on; BEGIN; SELECT head FROM meta")?;
            Ok(Reader(connection))
        })
        .await
    }

    /// Gives every key that was not revoked before `forget_before` to `take`, in the order of ids.
    pub(super) async fn keys(self, forget_before: Timestamp, take: TakeKey<'_>) -> Result<(), StoreError> {
        let (sender, mut batches) = mpsc::channel(BATCHES);
        let reading = blocking(move || self.send(forget_before, &sender));
        let taking = async {
            while let Some(batch) = batches.recv().await {
                batch.into_iter().for_each(&mut *take);
            }
        };
        let (read, ()) = tokio::join!(reading, taking);
        read
    }

    fn send(&self, forget_before: Timestamp, sender: &mpsc::Sender<Vec<GatheredKey>>) -> Result<(), Failure> {
        let sql = format!(
            "SELECT {KEY_COLUMNS}, {SECRET_COLUMNS} FROM keys k LEFT JOIN secrets s ON s.key_id = k.id \
             WHERE k.revoked_at IS NULL OR k.revoked_at >= ?1 ORDER BY k.id, s.version DESC"
        );
        let mut statement = self.0.prepare(&sql)?;
        let mut rows = statement.query([forget_before.as_micros()])?;
        let (mut gather, mut batch) = (Gather::new(), Vec::with_capacity(BATCH));
        while let Some(row) = rows.next()? {
            batch.extend(gather.row(row)?);
            if batch.len() == BATCH {
                let full = std::mem::replace(&mut batch, Vec::with_capacity(BATCH));
                if sender.blocking_send(full).is_err() {
                    // Nobody waits for the rest.
                    return Ok(());
                }
            }
        }
        batch.extend(gather.finish()?);
        let _ = sender.blocking_send(batch);
        Ok(())
    }
}

/// Why reading ended early.
enum Failure {
    Sqlite(rusqlite::Error),
    Store(StoreError),
}

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

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Failure> + Send + 'static,
) -> Result<T, StoreError> {
    let done = spawn_blocking(work).await.map_err(|error| StoreError::Unavailable(error.into()))?;
    done.map_err(|failure| match failure {
        Failure::Store(error) => error,
        Failure::Sqlite(error) => match error.sqlite_error_code() {
            Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => damaged("the database file", error),
            _ => StoreError::Unavailable(error.into()),
        },
    })
}

fn read<T>(value: FromSqlResult<T>) -> Result<T, sqlx::Error> {
    value.map_err(|error| sqlx::Error::Decode(error.into()))
}

fn unread(error: rusqlite::Error) -> sqlx::Error {
    sqlx::Error::Decode(error.into())
}

impl Columns for Row<'_> {
    fn text(&self, at: usize) -> Result<&str, sqlx::Error> {
        read(self.get_ref(at).map_err(unread)?.as_str())
    }

    fn text_opt(&self, at: usize) -> Result<Option<&str>, sqlx::Error> {
        read(self.get_ref(at).map_err(unread)?.as_str_or_null())
    }

    fn int(&self, at: usize) -> Result<i64, sqlx::Error> {
        read(self.get_ref(at).map_err(unread)?.as_i64())
    }

    fn int_opt(&self, at: usize) -> Result<Option<i64>, sqlx::Error> {
        read(self.get_ref(at).map_err(unread)?.as_i64_or_null())
    }

    fn bytes(&self, at: usize) -> Result<&[u8], sqlx::Error> {
        read(self.get_ref(at).map_err(unread)?.as_blob())
    }

    fn bytes_opt(&self, at: usize) -> Result<Option<&[u8]>, sqlx::Error> {
        read(self.get_ref(at).map_err(unread)?.as_blob_or_null())
    }

    fn free_text_opt(&self, at: usize) -> Result<Option<String>, sqlx::Error> {
        Ok(self.text_opt(at)?.map(str::to_owned))
    }
}
