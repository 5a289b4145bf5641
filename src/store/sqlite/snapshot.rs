//! Reads a snapshot of SQLite with rusqlite on blocking threads, which borrows columns in place.
//!
//! sqlx would send each row between threads and copy each column: half a minute for a million keys.
//!
//! Secrets are ordered by digest, and looking up those of each key would take ten times as long as reading all. So the
//! secrets are read first, half on each of two threads, then the keys, half on each thread, which also builds the index
//! entries. Meanwhile each secret takes 56 bytes.

use std::{
    borrow::Cow,
    path::{Path, PathBuf},
    sync::Arc,
};

use rusqlite::{Connection, Row, types::FromSqlResult};
use tokio::sync::mpsc;

use crate::{
    domain::{
        log::LogEntry,
        time::{Revision, Timestamp},
    },
    store::{
        SnapshotLoader, SnapshotPart, StoreError,
        backend::EntryVisitor,
        parse_cache::KeyParseCache,
        row_decoding::{KEY_COLUMNS, LOG_COLUMNS, RowColumns, decode_log_entry},
        row_format::revision_to_i64,
        secret_join::{SECRET_ROW_COLUMNS, SecretBuffer, SecretJoin},
    },
};

use super::connection::{SqliteFailure, connect_reader, run_blocking};

/// The number of rows in a batch for another thread.
const BATCH_ROWS: usize = 256;
/// The maximum number of batches in the channel.
const MAX_WAITING_BATCHES: usize = 4;
/// The first digest of the second half.
const MIDDLE_DIGEST: [u8; 32] = {
    let mut middle = [0; 32];
    middle[0] = 0x80;
    middle
};

/// Read transactions on two connections, which see the same state if nothing is written while they begin.
pub(super) struct SnapshotReader([Connection; 2]);

impl SnapshotReader {
    /// Begins the transactions, which see what is committed now.
    pub(super) async fn begin(path: PathBuf) -> Result<SnapshotReader, StoreError> {
        run_blocking(move || Ok(SnapshotReader([begin_read(&path)?, begin_read(&path)?]))).await
    }

    /// Passes every key that was not revoked before `forget_before` to `loader`, in two parts.
    pub(super) async fn load_keys(
        self,
        forget_before: Timestamp,
        loader: &Arc<dyn SnapshotLoader>,
    ) -> Result<(), StoreError> {
        let SnapshotReader([one, other]) = self;
        let ((one, first), (other, second)) = tokio::try_join!(
            run_blocking(move || read_half_of_secrets(&one, "digest < ?1").map(|half| (one, half))),
            run_blocking(move || read_half_of_secrets(&other, "digest >= ?1").map(|half| (other, half))),
        )?;
        loader.reserve_secrets(first.len() + second.len());
        // Digests are random: the keys of one half are spread like all keys.
        let middle = first.middle_id().unwrap_or_default().to_be_bytes();
        let secrets = Arc::new([first, second]);
        let same = secrets.clone();
        let (part, another) = (loader.begin_part(), loader.begin_part());
        let (read, read_too) = tokio::join!(
            run_blocking(move || read_half_of_keys(&one, "id < ?2", middle, forget_before, &secrets, part)),
            run_blocking(move || read_half_of_keys(
                &other,
                "id >= ?2",
                middle,
                forget_before,
                &same,
                another
            )),
        );
        read.and(read_too)
    }
}

fn begin_read(path: &Path) -> Result<Connection, SqliteFailure> {
    let connection = connect_reader(path)?;
    // A transaction begins with its first read.
    connection.execute_batch("BEGIN; SELECT head FROM meta")?;
    Ok(connection)
}

/// Passes each entry of the log after a revision to `take`, in order.
pub(super) async fn stream_log(
    path: PathBuf,
    after: Revision,
    take: EntryVisitor<'_>,
) -> Result<(), StoreError> {
    let (sender, mut batches) = mpsc::channel::<Vec<LogEntry>>(MAX_WAITING_BATCHES);
    let reading = run_blocking(move || {
        let connection = begin_read(&path)?;
        let sql = format!("SELECT {LOG_COLUMNS} FROM log WHERE revision > ?1 ORDER BY revision");
        let mut statement = connection.prepare(&sql)?;
        let mut rows = statement.query([revision_to_i64(after)])?;
        let mut batch = BatchSender::new(&sender);
        while let Some(row) = rows.next()? {
            if !batch.push(decode_log_entry(row)?) {
                return Ok(());
            }
        }
        batch.flush();
        Ok(())
    });
    // The channel closes when this future ends.
    let taking = async move {
        while let Some(batch) = batches.recv().await {
            // An error drops the receiver, which ends the reader.
            batch.into_iter().try_for_each(&mut *take)?;
        }
        Ok(())
    };
    let (read, taken): (_, Result<(), StoreError>) = tokio::join!(reading, taking);
    taken.and(read)
}

/// Collects rows into batches for another thread.
struct BatchSender<'s, T> {
    rows: Vec<T>,
    sender: &'s mpsc::Sender<Vec<T>>,
}

impl<'s, T> BatchSender<'s, T> {
    fn new(sender: &'s mpsc::Sender<Vec<T>>) -> Self {
        BatchSender { rows: Vec::with_capacity(BATCH_ROWS), sender }
    }

    /// Adds a row. Returns whether the receiver still exists.
    fn push(&mut self, row: T) -> bool {
        self.rows.push(row);
        if self.rows.len() < BATCH_ROWS {
            return true;
        }
        let full = std::mem::replace(&mut self.rows, Vec::with_capacity(BATCH_ROWS));
        self.sender.blocking_send(full).is_ok()
    }

    fn flush(self) {
        let _ = self.sender.blocking_send(self.rows);
    }
}

/// Reads half of the secrets, sorted by key.
fn read_half_of_secrets(connection: &Connection, which: &str) -> Result<SecretBuffer, SqliteFailure> {
    let mut statement =
        connection.prepare(&format!("SELECT {SECRET_ROW_COLUMNS} FROM secrets WHERE {which}"))?;
    let mut rows = statement.query([MIDDLE_DIGEST])?;
    let mut secrets = SecretBuffer::default();
    while let Some(row) = rows.next()? {
        secrets.push_row(row)?;
    }
    secrets.sort();
    Ok(secrets)
}

/// Passes the keys on one side of `middle` to `part`.
fn read_half_of_keys(
    connection: &Connection,
    which: &str,
    middle: [u8; 16],
    forget_before: Timestamp,
    secrets: &[SecretBuffer; 2],
    mut part: Box<dyn SnapshotPart>,
) -> Result<(), SqliteFailure> {
    let sql = format!(
        "SELECT {KEY_COLUMNS} FROM keys k WHERE (revoked_at IS NULL OR revoked_at >= ?1) AND {which} ORDER BY id"
    );
    let mut statement = connection.prepare(&sql)?;
    let mut rows = statement.query(rusqlite::params![forget_before.as_micros(), middle])?;
    let mut parse_cache = KeyParseCache::default();
    let mut join = SecretJoin::new(secrets, forget_before, &mut parse_cache);
    while let Some(row) = rows.next()? {
        join.join_key(row, &mut *part)?;
    }
    part.finish();
    Ok(())
}

fn decode_value<T>(value: FromSqlResult<T>) -> Result<T, sqlx::Error> {
    value.map_err(|error| sqlx::Error::Decode(error.into()))
}

fn decode_error(error: rusqlite::Error) -> sqlx::Error {
    sqlx::Error::Decode(error.into())
}

impl RowColumns for Row<'_> {
    fn text(&self, at: usize) -> Result<&str, sqlx::Error> {
        decode_value(self.get_ref(at).map_err(decode_error)?.as_str())
    }

    fn text_opt(&self, at: usize) -> Result<Option<&str>, sqlx::Error> {
        decode_value(self.get_ref(at).map_err(decode_error)?.as_str_or_null())
    }

    fn int(&self, at: usize) -> Result<i64, sqlx::Error> {
        decode_value(self.get_ref(at).map_err(decode_error)?.as_i64())
    }

    fn int_opt(&self, at: usize) -> Result<Option<i64>, sqlx::Error> {
        decode_value(self.get_ref(at).map_err(decode_error)?.as_i64_or_null())
    }

    fn bytes(&self, at: usize) -> Result<&[u8], sqlx::Error> {
        decode_value(self.get_ref(at).map_err(decode_error)?.as_blob())
    }

    fn bytes_opt(&self, at: usize) -> Result<Option<&[u8]>, sqlx::Error> {
        decode_value(self.get_ref(at).map_err(decode_error)?.as_blob_or_null())
    }

    fn arbitrary_text_opt(&self, at: usize) -> Result<Option<Cow<'_, str>>, sqlx::Error> {
        Ok(self.text_opt(at)?.map(Cow::Borrowed))
    }
}
