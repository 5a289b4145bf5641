//! Bulk reads of SQLite.
//!
//! Keys are read by a scan of their table, since the ids of keys that were created together are close. If most of the
//! log is read, their secrets come from a [`SecretRange`]; otherwise they are looked up.

use std::{borrow::Cow, mem};

use async_trait::async_trait;
use rusqlite::{Connection, Row};

use crate::{
    domain::{
        key::{ApiKey, KeySecret},
        log::LogEntry,
        name::KeyId,
        text,
        time::Revision,
    },
    store::{
        BulkReader, RowFault, StoreError,
        parse_cache::KeyParseCache,
        queries,
        row_decoding::{
            KEY_COLUMNS, RowColumns as _, count_record_secrets, decode_key_revision, decode_key_row,
            decode_secret, fixed_bytes, whole_key,
        },
        secret_join::{KeyIdNumber, SECRET_ROW_COLUMNS},
    },
};

use super::{connection::SqliteResult, page_readers::PageReaders, secret_range::SecretRange};

/// How many secrets are in memory at once (50 MB), or an eighth of all, which limits the number of scans.
const MIN_SECRETS_IN_MEMORY: u64 = 1 << 19;
/// The maximum number of scans of the table of secrets.
const MAX_SCANS: u64 = 8;
/// How many unrequested keys are skipped before the next one is looked up.
const MAX_SKIPPED_KEYS: usize = 4;

/// A bulk reader of one file.
pub(super) struct SqliteBulkReader<'s> {
    readers: &'s PageReaders,
    state: BulkState,
}

impl<'s> SqliteBulkReader<'s> {
    /// A reader for about this many entries of the log.
    pub(super) fn new(readers: &'s PageReaders, entries: u64) -> Self {
        let state = BulkState { entries, ..BulkState::default() };
        SqliteBulkReader { readers, state }
    }
}

#[async_trait]
impl BulkReader for SqliteBulkReader<'_> {
    async fn log_after(&mut self, revision: Revision, limit: u32) -> Result<Vec<LogEntry>, StoreError> {
        self.readers.fetch_log(queries::log_after(revision, limit)).await
    }

    async fn keys_at(&mut self, ids: &[KeyId]) -> Result<Vec<ApiKey>, StoreError> {
        let (ids, mut state) = (ids.to_vec(), mem::take(&mut self.state));
        let work = move |connection: &Connection| {
            let keys = state.keys(connection, &ids);
            // A damaged key does not end the reader.
            Ok((state, keys))
        };
        let (state, keys) = self.readers.run_on_connection(work).await?;
        self.state = state;
        keys.map_err(StoreError::from)
    }

    async fn key_revisions(
        &mut self,
        after: Option<KeyId>,
        limit: u32,
    ) -> Result<Vec<(KeyId, Revision)>, StoreError> {
        let (statement, bound) = queries::key_revisions::<sqlx::Sqlite>(after, limit).into_parts();
        let work = move |connection: &Connection| {
            let mut statement = connection.prepare_cached(&statement)?;
            let mut rows = statement.query(rusqlite::params_from_iter(&bound))?;
            let mut keys = Vec::new();
            while let Some(row) = rows.next()? {
                keys.push(decode_key_revision(row)?);
            }
            Ok(keys)
        };
        self.readers.run_on_connection(work).await
    }

    async fn find_row_faults(&mut self, limit: u32) -> std::result::Result<Vec<RowFault>, StoreError> {
        let work = move |connection: &Connection| {
            let mut faults = find_secrets_without_key(connection, limit)?;
            faults.extend(find_wrong_normalized_names(connection, limit)?);
            Ok(faults)
        };
        self.readers.run_on_connection(work).await
    }
}

fn find_secrets_without_key(connection: &Connection, limit: u32) -> SqliteResult<Vec<RowFault>> {
    let (sql, bound) = queries::secrets_without_key::<sqlx::Sqlite>(limit).into_parts();
    let mut statement = connection.prepare(&sql)?;
    let mut rows = statement.query(rusqlite::params_from_iter(&bound))?;
    let mut faults = Vec::new();
    while let Some(row) = rows.next()? {
        faults.push(RowFault::secret_without_key(row.bytes(0)?));
    }
    Ok(faults)
}

/// Compares `name_nfc`, which no checksum covers, with the name. PostgreSQL computes it in an index.
fn find_wrong_normalized_names(connection: &Connection, limit: u32) -> SqliteResult<Vec<RowFault>> {
    // What is ASCII is normalized.
    let sql =
        "SELECT id, name, name_nfc FROM keys WHERE name_nfc IS NOT NULL OR name GLOB '*[^ -~]*' ORDER BY id";
    let mut statement = connection.prepare(sql)?;
    let mut rows = statement.query([])?;
    let mut faults = Vec::new();
    while let Some(row) = rows.next()? {
        let normalized = row.text_opt(1)?.map(text::normalize_nfc);
        let expected = normalized.as_ref().filter(|name| matches!(name, Cow::Owned(_)));
        if expected.map(Cow::as_ref) == row.text_opt(2)? {
            continue;
        }
        faults.push(RowFault::wrong_normalized_name(row.bytes(0)?));
        if faults.len() >= limit as usize {
            break;
        }
    }
    Ok(faults)
}

/// The state between pages.
#[derive(Default)]
struct BulkState {
    /// The number of log entries to read.
    entries: u64,
    secrets: SecretRange,
    /// The remaining scans, and the number of secrets to keep; `None` = not decided yet.
    scans: Option<(u64, u64)>,
    parse_cache: KeyParseCache,
}

impl BulkState {
    fn keys(&mut self, connection: &Connection, ids: &[KeyId]) -> SqliteResult<Vec<ApiKey>> {
        // All keys as of one committed state.
        let transaction = connection.unchecked_transaction()?;
        self.scan(&transaction, ids)?;
        let sql = format!("SELECT {KEY_COLUMNS} FROM keys k WHERE id >= ?1 ORDER BY id");
        let mut statement = transaction.prepare_cached(&sql)?;
        let mut keys = Vec::with_capacity(ids.len());
        let mut wanted = ids.iter().map(|id| *id.as_bytes()).peekable();
        'look_up: while let Some(first) = wanted.peek() {
            let mut rows = statement.query([first])?;
            let mut skipped = 0;
            while skipped <= MAX_SKIPPED_KEYS {
                let Some(row) = rows.next()? else { break 'look_up };
                let id: [u8; 16] = fixed_bytes(row, 0)?;
                // Requested ids before this one do not exist.
                while wanted.next_if(|wanted| *wanted < id).is_some() {}
                if wanted.next_if_eq(&id).is_some() {
                    keys.push(self.key(&transaction, row)?);
                    skipped = 0;
                } else {
                    skipped += 1;
                }
                if wanted.peek().is_none() {
                    break 'look_up;
                }
            }
        }
        Ok(keys)
    }

    /// Scans the next range of secrets if most of the ids are beyond the current one, and a scan is worth it.
    fn scan(&mut self, connection: &Connection, ids: &[KeyId]) -> SqliteResult<()> {
        let number = |id: &KeyId| KeyIdNumber::from_be_bytes(*id.as_bytes());
        let end = self.secrets.end();
        let beyond = &ids[ids.partition_point(|id| number(id) < end)..];
        let Some(first) = beyond.first().filter(|_| 2 * beyond.len() > ids.len()) else { return Ok(()) };
        let (scans, limit) = match self.scans {
            Some(decided) => decided,
            None => {
                // An entry creates at most one secret.
                let head: i64 = connection.query_row("SELECT head FROM meta", [], |row| row.get(0))?;
                let all = u64::try_from(head).unwrap_or(0);
                let limit = MIN_SECRETS_IN_MEMORY.max(all / MAX_SCANS);
                let is_worth_it = self.entries.saturating_mul(MAX_SCANS) >= all;
                (if is_worth_it { all / limit + 1 } else { 0 }, limit)
            }
        };
        self.scans = Some((scans.saturating_sub(1), limit));
        if scans > 0 {
            self.secrets = SecretRange::default();
            self.secrets = SecretRange::read(connection, number(first), limit)?;
        }
        Ok(())
    }

    fn key(&mut self, connection: &Connection, row: &Row<'_>) -> SqliteResult<ApiKey> {
        let (row, sum) = decode_key_row(row)?;
        let (id, row) = (row.id, row.verify_checksum(sum)?);
        let number = KeyIdNumber::from_be_bytes(id);
        let mut secrets = self.secrets.get(number);
        if self.secrets.has_unreadable_secret(number) || count_record_secrets(&id, &secrets).is_err() {
            secrets = lookup_secrets(connection, &id)?;
        }
        Ok(whole_key(&row, secrets, &mut self.parse_cache)?)
    }
}

/// The secrets of a key, the newest first.
fn lookup_secrets(connection: &Connection, key_id: &[u8; 16]) -> SqliteResult<Vec<KeySecret>> {
    let sql = format!("SELECT {SECRET_ROW_COLUMNS} FROM secrets WHERE key_id = ?1 ORDER BY version DESC");
    let mut statement = connection.prepare_cached(&sql)?;
    let mut rows = statement.query([key_id])?;
    let mut secrets = Vec::new();
    while let Some(row) = rows.next()? {
        secrets.push(decode_secret(row, key_id, 1, true)?);
    }
    Ok(secrets)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(rows: &str) -> Connection {
        let connection = Connection::open_in_memory().unwrap();
        connection
            .execute_batch("CREATE TABLE keys (id BLOB, name TEXT, name_nfc TEXT, revision INTEGER)")
            .unwrap();
        connection.execute_batch(&format!("INSERT INTO keys VALUES {rows}")).unwrap();
        connection
    }

    #[test]
    fn a_normalized_name_that_is_not_the_one_of_its_name_is_found() {
        let right = "(zeroblob(16), 'e\u{301}', '\u{e9}', 1), (zeroblob(16), '\u{e9}', NULL, 1), \
                     (zeroblob(16), 'a', NULL, 1), (zeroblob(16), NULL, NULL, 1)";
        assert_eq!(find_wrong_normalized_names(&table(right), 9).unwrap(), []);
        let wrong = "(zeroblob(16), 'e\u{301}', 'x', 1), (zeroblob(16), 'e\u{301}', NULL, 1), \
                     (zeroblob(16), 'a', 'b', 1), (zeroblob(16), NULL, 'b', 1)";
        let faults = find_wrong_normalized_names(&table(wrong), 9).unwrap();
        assert!(faults.len() == 4 && faults[0].record.starts_with("key 0000"), "{faults:?}");
        assert_eq!(find_wrong_normalized_names(&table(wrong), 2).unwrap().len(), 2);
    }

    #[test]
    fn a_key_id_that_is_not_16_bytes_is_damage() {
        let connection = table("(zeroblob(5), NULL, NULL, 1)");
        let read = connection
            .query_row("SELECT id, revision FROM keys", [], |row| Ok(decode_key_revision(row)))
            .unwrap();
        let message = read.unwrap_err().to_string();
        assert!(message.contains("not 16 bytes") && message.contains("backup"), "{message}");
    }
}
