//! What a start reads of SQLite, on threads of its own through rusqlite, which hands out columns where they are. sqlx
//! sends each row from thread to thread with a copy of every column, which of a million keys takes half a minute. Both
//! are on the same library.
//!
//! A key's secrets stand in the order of their digests, and to look each up would take ten times as long as to read
//! all of them. So they come first, as they stand, half on each of two threads; then the keys, half on each. For as
//! long as that takes, each secret takes 80 bytes.

use std::{borrow::Cow, path::PathBuf, sync::Arc, time::Duration};

use rusqlite::{Connection, OpenFlags, Row, types::FromSqlResult};
use tokio::sync::mpsc;

use crate::{
    domain::{
        key::Secret,
        log::LogRow,
        time::{Revision, Timestamp},
        token::Digest,
    },
    store::{
        StoreError,
        alike::Alike,
        backend::{TakeKey, TakeLog},
        records::{
            Columns, GatheredKey, KEY_COLUMNS, LOG_COLUMNS, SECRET_COLUMNS, bytes_at, key_at, log_at,
            secret_at, unreadable, whole,
        },
        rows::revision_to_i64,
    },
};

use super::connection::{Failure, blocking};

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

    /// Gives every key that was not revoked before `forget_before` to `take`, in no order.
    pub(super) async fn keys(self, forget_before: Timestamp, take: TakeKey<'_>) -> Result<(), StoreError> {
        let Reader([one, other]) = self;
        let ((one, first), (other, second)) = tokio::try_join!(
            blocking(move || Half::read(&one, "digest < ?1").map(|half| (one, half))),
            blocking(move || Half::read(&other, "digest >= ?1").map(|half| (other, half))),
        )?;
        // Digests are by chance: the keys of those in a half are spread like all keys.
        let middle = first.0.get(first.0.len() / 2).map_or([0; 16], |entry| entry.key_id);
        let secrets = Arc::new([first, second]);
        let same = secrets.clone();
        let (sender, batches) = mpsc::channel(BATCHES);
        let more = sender.clone();
        let (read, read_too, ()) = tokio::join!(
            blocking(move || send_keys(&one, "id < ?2", middle, forget_before, &secrets, &sender)),
            blocking(move || send_keys(&other, "id >= ?2", middle, forget_before, &same, &more)),
            each(batches, take),
        );
        read.and(read_too)
    }
}

fn begin(path: &PathBuf) -> Result<Connection, Failure> {
    // The file may be another process's, which is looked at.
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(path, flags)?;
    connection.busy_timeout(Duration::from_secs(5))?;
    // It begins with its first read.
    connection.execute_batch("PRAGMA query_only = on; BEGIN; SELECT head FROM meta")?;
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

async fn each(mut batches: mpsc::Receiver<Vec<GatheredKey>>, take: TakeKey<'_>) {
    while let Some(batch) = batches.recv().await {
        batch.into_iter().for_each(&mut *take);
    }
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

/// A secret without its hint, and whose it is.
#[derive(Debug)]
struct Entry {
    key_id: [u8; 16],
    version: u32,
    digest: Digest,
    created_at: Timestamp,
    expires_at: Option<Timestamp>,
}

/// Half of the secrets, in the order of their keys.
struct Half(Vec<Entry>);

impl Half {
    fn read(connection: &Connection, which: &str) -> Result<Half, Failure> {
        let sql = format!("SELECT s.key_id, {SECRET_COLUMNS} FROM secrets s WHERE {which}");
        let mut statement = connection.prepare(&sql)?;
        let mut rows = statement.query([MIDDLE])?;
        let mut entries = Vec::new();
        while let Some(row) = rows.next()? {
            let key_id: [u8; 16] = bytes_at(row, 0).map_err(unreadable)?;
            let Secret { version, digest, created_at, expires_at, .. } = secret_at(row, &key_id, 1, false)?;
            entries.push(Entry { key_id, version, digest, created_at, expires_at });
        }
        entries.sort_unstable_by_key(|entry| entry.key_id);
        Ok(Half(entries))
    }

    /// The secrets of a key in it. `at` is where those of the key before ended.
    fn of(&self, key_id: &[u8; 16], at: &mut usize) -> &[Entry] {
        // Keys come in order, too, and hardly any is left out.
        let start = match self.0.get(*at) {
            Some(entry) if entry.key_id >= *key_id && (*at == 0 || self.0[*at - 1].key_id < *key_id) => *at,
            _ => self.0.partition_point(|entry| entry.key_id < *key_id),
        };
        let count = self.0[start..].iter().take_while(|entry| entry.key_id == *key_id).count();
        *at = start + count;
        &self.0[start..*at]
    }
}

/// Every secret of a key, the newest first.
fn secrets_of(halves: &[Half; 2], key_id: &[u8; 16], at: &mut [usize; 2]) -> Vec<Secret> {
    let found = halves.iter().zip(at).flat_map(|(half, at)| half.of(key_id, at));
    let secret = |entry: &Entry| {
        let Entry { version, digest, created_at, expires_at, .. } = *entry;
        Secret { version, digest, hint: String::new(), created_at, expires_at }
    };
    let mut secrets: Vec<_> = found.map(secret).collect();
    secrets.sort_unstable_by_key(|secret| std::cmp::Reverse(secret.version));
    secrets
}

fn send_keys(
    connection: &Connection,
    which: &str,
    middle: [u8; 16],
    forget_before: Timestamp,
    secrets: &[Half; 2],
    sender: &mpsc::Sender<Vec<GatheredKey>>,
) -> Result<(), Failure> {
    let sql = format!(
        "SELECT {KEY_COLUMNS} FROM keys k WHERE (revoked_at IS NULL OR revoked_at >= ?1) AND {which} ORDER BY id"
    );
    let mut statement = connection.prepare(&sql)?;
    let mut rows = statement.query(rusqlite::params![forget_before.as_micros(), middle])?;
    let (mut alike, mut at, mut batch) = (Alike::default(), [0; 2], Batch::to(sender));
    while let Some(row) = rows.next()? {
        let key = key_at(row, &mut alike)?;
        let secrets = secrets_of(secrets, key.id.as_bytes(), &mut at);
        if !batch.push(whole(key, secrets)?) {
            // Nobody waits for the rest.
            return Ok(());
        }
    }
    batch.end();
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
