//! Reads the secrets of all keys in a range of ids with one scan of their table.
//!
//! The table is ordered by digest, which is random. So looking up one key's secrets reads a separate page, and a scan
//! reads each page once for all keys.

use std::{cmp::Reverse, collections::HashSet, ops::Range};

use rusqlite::{Connection, OptionalExtension as _, Row, params};

use crate::{
    domain::{key::KeySecret, time::Timestamp, token::TokenDigest},
    store::{
        StoreError,
        row_decoding::{decode_secret, fixed_bytes, unreadable_column},
        secret_join::{KeyIdNumber, SECRET_ROW_COLUMNS},
    },
};

use super::connection::SqliteResult;

/// A secret of a key. Its hint is in the text of the range.
#[derive(Debug)]
struct CompactSecret {
    /// In two halves: as one number it would enlarge this struct to 96 bytes.
    key_id: [u64; 2],
    digest: TokenDigest,
    created_at: Timestamp,
    expires_at: Option<Timestamp>,
    version: u32,
    hint_start: u32,
    hint_length: u32,
}

const _: () = assert!(size_of::<CompactSecret>() == 88);

impl CompactSecret {
    fn key_id(&self) -> KeyIdNumber {
        KeyIdNumber::from(self.key_id[0]) << 64 | KeyIdNumber::from(self.key_id[1])
    }
}

/// How many keys with an unreadable secret are remembered. If there are more, each key of the range is looked up.
const MAX_UNREADABLE_KEYS: usize = 4096;

/// The secrets of keys whose ids are in a range.
#[derive(Debug, Default)]
pub(super) struct SecretRange {
    ids: Range<KeyIdNumber>,
    /// Sorted by key, and the secrets of a key from the newest to the oldest.
    secrets: Vec<CompactSecret>,
    hints: String,
    /// Keys with a secret that is left out, because it cannot be read or contradicts itself.
    unreadable_keys: HashSet<KeyIdNumber>,
    /// The end of the previous key's secrets: keys are requested in order.
    next: usize,
}

/// Selects the secrets of the keys in a range. The index on key ids is avoided: it would look up each row by its
/// digest.
fn scan() -> String {
    format!("SELECT {SECRET_ROW_COLUMNS} FROM secrets NOT INDEXED WHERE +key_id >= ?1 AND +key_id < ?2")
}

impl SecretRange {
    /// Reads at most `limit` secrets of the keys from `first` on. Rows that are unreadable or damaged are left out.
    pub(super) fn read(connection: &Connection, first: KeyIdNumber, limit: u64) -> SqliteResult<SecretRange> {
        let first = first.to_be_bytes();
        let index = "SELECT key_id FROM secrets WHERE key_id >= ?1 AND length(key_id) = 16 \
                     ORDER BY key_id LIMIT 1 OFFSET ?2";
        let offset = i64::try_from(limit).unwrap_or(i64::MAX);
        let end: Option<[u8; 16]> =
            connection.query_row(index, params![first, offset], |row| row.get(0)).optional()?;
        let end = end.map_or(KeyIdNumber::MAX, KeyIdNumber::from_be_bytes);
        let mut range = SecretRange { ids: KeyIdNumber::from_be_bytes(first)..end, ..SecretRange::default() };
        // A growing vector exists twice for a moment.
        let count = "SELECT count(*) FROM secrets WHERE key_id >= ?1 AND key_id < ?2";
        let count: i64 = connection.query_row(count, [first, end.to_be_bytes()], |row| row.get(0))?;
        range.secrets.reserve_exact(usize::try_from(count).unwrap_or(0));
        let mut statement = connection.prepare(&scan())?;
        let mut rows = statement.query([first, end.to_be_bytes()])?;
        while let Some(row) = rows.next()? {
            // A key id that is not 16 bytes belongs to no key: `find_row_faults` finds it.
            if range.add(row).is_err()
                && range.unreadable_keys.len() < MAX_UNREADABLE_KEYS
                && let Ok(key_id) = fixed_bytes(row, 0)
            {
                range.unreadable_keys.insert(KeyIdNumber::from_be_bytes(key_id));
            }
        }
        range.secrets.sort_unstable_by_key(|secret| (secret.key_id, Reverse(secret.version)));
        Ok(range)
    }

    fn add(&mut self, row: &Row<'_>) -> Result<(), StoreError> {
        let key_id: [u8; 16] = fixed_bytes(row, 0).map_err(unreadable_column)?;
        let secret = decode_secret(row, &key_id, 1, true)?;
        let offset =
            |length: usize| u32::try_from(length).map_err(|error| StoreError::Unavailable(error.into()));
        let (hint_start, hint_length) = (offset(self.hints.len())?, offset(secret.hint.len())?);
        self.hints.push_str(&secret.hint);
        let id = KeyIdNumber::from_be_bytes(key_id);
        self.secrets.push(CompactSecret {
            key_id: [(id >> 64) as u64, id as u64],
            digest: secret.digest,
            created_at: secret.created_at,
            expires_at: secret.expires_at,
            version: secret.version,
            hint_start,
            hint_length,
        });
        Ok(())
    }

    /// Whether a key may have a secret that is left out: a look at the key itself finds what is wrong.
    pub(super) fn has_unreadable_secret(&self, id: KeyIdNumber) -> bool {
        self.unreadable_keys.contains(&id)
            || self.unreadable_keys.len() >= MAX_UNREADABLE_KEYS && self.ids.contains(&id)
    }

    /// The first id after the range.
    pub(super) fn end(&self) -> KeyIdNumber {
        self.ids.end
    }

    /// The secrets of a key, the newest first; none if its id is outside the range.
    pub(super) fn get(&mut self, id: KeyIdNumber) -> Vec<KeySecret> {
        if !self.ids.contains(&id) {
            return Vec::new();
        }
        let is_next = self.secrets.get(self.next).is_some_and(|secret| secret.key_id() == id)
            && self.next.checked_sub(1).is_none_or(|before| self.secrets[before].key_id() != id);
        let start =
            if is_next { self.next } else { self.secrets.partition_point(|secret| secret.key_id() < id) };
        let count = self.secrets[start..].iter().take_while(|secret| secret.key_id() == id).count();
        self.next = start + count;
        self.secrets[start..self.next].iter().map(|secret| self.secret(secret)).collect()
    }

    fn secret(&self, secret: &CompactSecret) -> KeySecret {
        let start = secret.hint_start as usize;
        KeySecret {
            version: secret.version,
            digest: secret.digest,
            hint: self.hints[start..start + secret.hint_length as usize].to_owned(),
            created_at: secret.created_at,
            expires_at: secret.expires_at,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::store::row_format::secret_checksum;

    const TABLE: &str = "CREATE TABLE secrets (digest BLOB PRIMARY KEY, key_id BLOB NOT NULL, version INTEGER NOT NULL, \
        hint TEXT NOT NULL, created_at INTEGER NOT NULL, expires_at INTEGER, sum INTEGER NOT NULL) STRICT, WITHOUT ROWID; \
        CREATE UNIQUE INDEX secrets_of_key ON secrets (key_id, version)";

    /// The secrets of key `id`, the newest first.
    fn secrets(id: u8, count: u32) -> Vec<KeySecret> {
        let secret = |version| KeySecret {
            version,
            digest: TokenDigest::from_token(&format!("{id} {version}")),
            hint: "h".repeat(version as usize),
            created_at: Timestamp::from_micros(i64::from(id)),
            expires_at: (version < count).then_some(Timestamp::from_micros(-1)),
        };
        (1..=count).rev().map(secret).collect()
    }

    fn key_id(id: u8) -> [u8; 16] {
        KeyIdNumber::from(id).to_be_bytes()
    }

    /// A table where key `id` has `counts[id]` secrets.
    fn table(counts: &[u32]) -> Connection {
        let connection = Connection::open_in_memory().unwrap();
        connection.execute_batch(TABLE).unwrap();
        for (id, count) in (0..).zip(counts) {
            for secret in secrets(id, *count) {
                let row = rusqlite::params![
                    secret.digest.as_bytes(),
                    key_id(id),
                    secret.version,
                    secret.hint,
                    secret.created_at.as_micros(),
                    secret.expires_at.map(Timestamp::as_micros),
                    secret_checksum(&key_id(id), &secret),
                ];
                connection.execute("INSERT INTO secrets VALUES (?, ?, ?, ?, ?, ?, ?)", row).unwrap();
            }
        }
        connection
    }

    proptest! {
        #[test]
        fn ranges_after_each_other_have_all_secrets_and_no_more_than_they_may(
            counts in proptest::collection::vec(0u32..4, 1..20),
            most in 3u64..20,
            asked in proptest::collection::vec(0u8..20, 0..20),
        ) {
            let connection = table(&counts);
            let mut first = 0;
            let mut found = vec![Vec::new(); counts.len()];
            while first < KeyIdNumber::MAX {
                let mut range = SecretRange::read(&connection, first, most).unwrap();
                prop_assert!(range.secrets.len() as u64 <= most && range.end() > first);
                for id in asked.iter().copied().chain(0..=19) {
                    let has = range.get(KeyIdNumber::from(id));
                    if (first..range.end()).contains(&KeyIdNumber::from(id)) {
                        let count = counts.get(usize::from(id)).copied().unwrap_or(0);
                        prop_assert_eq!(&has, &secrets(id, count));
                        if let Some(found) = found.get_mut(usize::from(id)) {
                            *found = has;
                        }
                    } else {
                        prop_assert_eq!(has, []);
                    }
                }
                first = range.end();
            }
            for (id, (count, found)) in (0..).zip(counts.iter().zip(found)) {
                prop_assert_eq!(found, secrets(id, *count));
            }
        }
    }

    #[test]
    fn a_secret_that_contradicts_itself_is_left_out() {
        let connection = table(&[1, 2, 1]);
        connection.execute("UPDATE secrets SET hint = 'x' WHERE key_id = ?1", [key_id(1)]).unwrap();
        let mut range = SecretRange::read(&connection, 0, 100).unwrap();
        assert_eq!(range.get(1), []);
        assert_eq!([0, 1, 2].map(|id| range.has_unreadable_secret(id)), [false, true, false]);
        assert_eq!((range.get(0), range.get(2)), (secrets(0, 1), secrets(2, 1)));
    }

    #[test]
    fn the_table_is_scanned_and_not_looked_up_by_key() {
        let connection = table(&[1, 1]);
        let plan = format!("EXPLAIN QUERY PLAN {}", scan());
        let mut statement = connection.prepare(&plan).unwrap();
        let ids = [key_id(0), key_id(9)];
        let steps = statement.query_map(ids, |row| row.get::<_, String>("detail")).unwrap();
        assert_eq!(steps.map(|step| step.unwrap()).collect::<Vec<_>>(), ["SCAN secrets"]);
    }
}
