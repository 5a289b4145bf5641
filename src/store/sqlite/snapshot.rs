//! What a start reads of SQLite, on threads of its own through rusqlite, which hands out columns where they are. sqlx
//! sends each row from thread to thread with a copy of every column, which of a million keys takes half a minute. Both
//! are on the same library.
//!
//! A key's secrets stand in the order of their digests, and to look each up would take ten times as long as to read
//! all of them. So they come first, as they stand, half on each of two threads; then the keys, half on each, which
//! packs them too. For as long as that takes, each secret takes 56 bytes.

use std::{
    borrow::Cow,
    path::{Path, PathBuf},
    sync::Arc,
};

use rusqlite::{Connection, Row, types::FromSqlResult};
use tokio::sync::mpsc;

use crate::{
    domain::{
        log::LogRow,
        time::{Revision, Timestamp},
    },
    store::{
        Loader, Part, StoreError,
        alike::Alike,
        backend::TakeLog,
        records::{Columns, KEY_COLUMNS, LOG_COLUMNS, log_at},
        rows::revision_to_i64,
        unclaimed::{COLUMNS, Claims, Unclaimed},
    },
};

use super::connection::{Failure, blocking, read_only};

/// How many rows are handed over at once.
const BATCH: usize = 256;
/// How many batches may wait.
const BATCHES: usize = 4;
/// Where the second half of the digests begins.
const MIDDLE: [u8; 32] = {
    let mut middle = [0; 32];
    middle[0] = 0x80;
    middle
};

/// A read transaction on two connections, which see the same if nobody writes while it begins.
pub(super) struct Reader([Connection; 2]);

impl Reader {
    /// A transaction that sees what is committed now.
    pub(super) async fn begin(path: PathBuf) -> Result<Reader, StoreError> {
        blocking(move || Ok(Reader([begin(&path)?, begin(&path)?]))).await
    }

    /// Gives every key that was not revoked before `forget_before` to `loader`, in two parts.
    pub(super) async fn keys(
        self,
        forget_before: Timestamp,
        loader: &Arc<dyn Loader>,
    ) -> Result<(), StoreError> {
        let Reader([one, other]) = self;
        let ((one, first), (other, second)) = tokio::try_join!(
            blocking(move || secrets(&one, "digest < ?1").map(|half| (one, half))),
            blocking(move || secrets(&other, "digest >= ?1").map(|half| (other, half))),
        )?;
        loader.expect(first.len() + second.len());
        // Digests are by chance: the keys of those in a half are spread like all keys.
        let middle = first.middle().unwrap_or_default().to_be_bytes();
        let secrets = Arc::new([first, second]);
        let same = secrets.clone();
        let (part, another) = (loader.part(), loader.part());
        let (read, read_too) = tokio::join!(
            blocking(move || keys(&one, "id < ?2", middle, forget_before, &secrets, part)),
            blocking(move || keys(&other, "id >= ?2", middle, forget_before, &same, another)),
        );
        read.and(read_too)
    }
}

fn begin(path: &Path) -> Result<Connection, Failure> {
    let connection = read_only(path)?;
    // It begins with its first read.
    connection.execute_batch("BEGIN; SELECT head FROM meta")?;
    Ok(connection)
}

/// Gives each entry of the log after a revision to `take`, in order.
pub(super) async fn log(path: PathBuf, after: Revision, take: TakeLog<'_>) -> Result<(), StoreError> {
    let (sender, mut batches) = mpsc::channel::<Vec<LogRow>>(BATCHES);
    let reading = blocking(move || {
        let connection = begin(&path)?;
        let sql = format!("SELECT {LOG_COLUMNS} FROM log WHERE revision > ?1 ORDER BY revision");
        let mut statement = connection.prepare(&sql)?;
        let mut rows = statement.query([revision_to_i64(after)])?;
        let mut batch = Batch::to(&sender);
        while let Some(row) = rows.next()? {
            if !batch.push(log_at(row)?) {
                return Ok(());
            }
        }
        batch.end();
        Ok(())
    });
    // The channel ends with the one who takes.
    let taking = async move {
        while let Some(batch) = batches.recv().await {
            // Whoever finds a fault wants no more, and the reader ends.
            batch.into_iter().try_for_each(&mut *take)?;
        }
        Ok(())
    };
    let (read, taken): (_, Result<(), StoreError>) = tokio::join!(reading, taking);
    taken.and(read)
}

/// Rows on their way to another thread.
struct Batch<'s, T> {
    rows: Vec<T>,
    sender: &'s mpsc::Sender<Vec<T>>,
}

impl<'s, T> Batch<'s, T> {
    fn to(sender: &'s mpsc::Sender<Vec<T>>) -> Self {
        Batch { rows: Vec::with_capacity(BATCH), sender }
    }

    /// Whether anybody waits for more.
    fn push(&mut self, row: T) -> bool {
        self.rows.push(row);
        if self.rows.len() < BATCH {
            return true;
        }
        let full = std::mem::replace(&mut self.rows, Vec::with_capacity(BATCH));
        self.sender.blocking_send(full).is_ok()
    }

    fn end(self) {
        let _ = self.sender.blocking_send(self.rows);
    }
}

/// Half of the secrets, in the order of their keys.
fn secrets(connection: &Connection, which: &str) -> Result<Unclaimed, Failure> {
    let mut statement = connection.prepare(&format!("SELECT {COLUMNS} FROM secrets WHERE {which}"))?;
    let mut rows = statement.query([MIDDLE])?;
    let mut secrets = Unclaimed::default();
    while let Some(row) = rows.next()? {
        secrets.add(row)?;
    }
    secrets.sort();
    Ok(secrets)
}

/// Gives the keys on one side of `middle` to `part`.
fn keys(
    connection: &Connection,
    which: &str,
    middle: [u8; 16],
    forget_before: Timestamp,
    secrets: &[Unclaimed; 2],
    mut part: Box<dyn Part>,
) -> Result<(), Failure> {
    let sql = format!(
        "SELECT {KEY_COLUMNS} FROM keys k WHERE (revoked_at IS NULL OR revoked_at >= ?1) AND {which} ORDER BY id"
    );
    let mut statement = connection.prepare(&sql)?;
    let mut rows = statement.query(rusqlite::params![forget_before.as_micros(), middle])?;
    let mut alike = Alike::default();
    let mut claims = Claims::of(secrets, forget_before, &mut alike);
    while let Some(row) = rows.next()? {
        claims.key(row, &mut *part)?;
    }
    part.end();
    Ok(())
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

    fn free_text_opt(&self, at: usize) -> Result<Option<Cow<'_, str>>, sqlx::Error> {
        Ok(self.text_opt(at)?.map(Cow::Borrowed))
    }
}
