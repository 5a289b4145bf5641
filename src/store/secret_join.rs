//! Joins secrets, which are read first, with their keys.
//!
//! Nearly all secrets are the only one of their key. These are stored compactly, since there may be a million.

use crate::domain::{key::KeySecret, time::Timestamp, token::TokenDigest};

use super::{
    SnapshotPart, StoreError,
    parse_cache::KeyParseCache,
    row_decoding::{
        RowColumns, count_record_secrets, decode_key_row, decode_secret, fixed_bytes, unreadable_column,
    },
};

/// The columns of a secret's row: its key, its columns, its checksum.
pub(super) const SECRET_ROW_COLUMNS: &str = "key_id, digest, version, hint, created_at, expires_at, sum";

/// A key id as a number with the same order.
pub(super) type KeyIdNumber = u128;

/// The first secret of a key, without an expiry.
#[derive(Debug)]
struct CompactSecret {
    /// In halves: as one number it would make this 64 bytes.
    key_id: [u64; 2],
    digest: TokenDigest,
    created_at: Timestamp,
}

const _: () = assert!(size_of::<CompactSecret>() == 56);

impl CompactSecret {
    fn key_number(&self) -> KeyIdNumber {
        KeyIdNumber::from(self.key_id[0]) << 64 | KeyIdNumber::from(self.key_id[1])
    }
}

/// Secrets of some keys, ordered after [`SecretBuffer::sort`].
#[derive(Debug, Default)]
pub(super) struct SecretBuffer {
    compact: Vec<CompactSecret>,
    /// Secrets with another version or an expiry; their hints are empty.
    others: Vec<(KeyIdNumber, KeySecret)>,
}

/// The end of the previous key's secrets. Keys are also ordered, so the next key's secrets are usually there.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct JoinCursor {
    compact: usize,
    others: usize,
}

impl SecretBuffer {
    /// Removes all secrets and keeps the memory.
    pub(super) fn clear(&mut self) {
        self.compact.clear();
        self.others.clear();
    }

    pub(super) fn len(&self) -> usize {
        self.compact.len() + self.others.len()
    }

    /// Adds a row of [`SECRET_ROW_COLUMNS`] and verifies its checksum.
    pub(super) fn push_row(&mut self, row: &impl RowColumns) -> Result<(), StoreError> {
        let key_id: [u8; 16] = fixed_bytes(row, 0).map_err(unreadable_column)?;
        let id = KeyIdNumber::from_be_bytes(key_id);
        match decode_secret(row, &key_id, 1, false)? {
            KeySecret { version: 1, digest, created_at, expires_at: None, .. } => {
                let key_id = [(id >> 64) as u64, id as u64];
                self.compact.push(CompactSecret { key_id, digest, created_at });
            }
            secret => self.others.push((id, secret)),
        }
        Ok(())
    }

    /// Sorts by key, and the secrets of a key from the newest to the oldest.
    pub(super) fn sort(&mut self) {
        self.compact.sort_unstable_by_key(CompactSecret::key_number);
        self.others.sort_unstable_by_key(|(owner, secret)| (*owner, std::cmp::Reverse(secret.version)));
    }

    /// The id of a key near the middle.
    pub(super) fn middle_id(&self) -> Option<KeyIdNumber> {
        let other = self.others.get(self.others.len() / 2).map(|(id, _)| *id);
        self.compact.get(self.compact.len() / 2).map(CompactSecret::key_number).or(other)
    }

    /// The smallest key id; the buffer must be sorted.
    pub(super) fn first_id(&self) -> Option<KeyIdNumber> {
        let ids =
            [self.compact.first().map(CompactSecret::key_number), self.others.first().map(|(id, _)| *id)];
        ids.into_iter().flatten().min()
    }

    /// The greatest key id; the buffer must be sorted.
    pub(super) fn last_id(&self) -> Option<KeyIdNumber> {
        let ids = [self.compact.last().map(CompactSecret::key_number), self.others.last().map(|(id, _)| *id)];
        ids.into_iter().flatten().max()
    }

    /// Adds the secrets of a key to `secrets`; the buffer must be sorted.
    fn collect_secrets(&self, id: KeyIdNumber, at: &mut JoinCursor, secrets: &mut Vec<KeySecret>) {
        let others = find_run(&self.others, |(id, _)| *id, id, &mut at.others);
        secrets.extend(others.iter().map(|(_, secret)| secret.clone()));
        // The first version, which comes last.
        let plain = find_run(&self.compact, CompactSecret::key_number, id, &mut at.compact);
        secrets.extend(plain.iter().map(|plain| KeySecret {
            version: 1,
            digest: plain.digest,
            hint: String::new(),
            created_at: plain.created_at,
            expires_at: None,
        }));
    }
}

/// The items of one key in `all`, which is sorted. `at` is the end of the previous key's items.
fn find_run<'a, T>(
    all: &'a [T],
    id_of: impl Fn(&T) -> KeyIdNumber,
    id: KeyIdNumber,
    at: &mut usize,
) -> &'a [T] {
    let before = at.checked_sub(1).and_then(|before| all.get(before)).map(&id_of);
    let next = all.get(*at).map(&id_of);
    let here = before.is_none_or(|before| before < id) && next.is_none_or(|next| next >= id);
    let start = if here { *at } else { all.partition_point(|one| id_of(one) < id) };
    let count = all[start..].iter().take_while(|one| id_of(one) == id).count();
    *at = start + count;
    &all[start..*at]
}

/// Joins keys in ascending order of their ids with their secrets.
pub(super) struct SecretJoin<'s> {
    buffers: &'s [SecretBuffer],
    /// For each buffer, the end of the previous key's secrets.
    cursors: Vec<JoinCursor>,
    /// The secrets of the current key.
    secrets: Vec<KeySecret>,
    parse_cache: &'s mut KeyParseCache,
    forget_before: Timestamp,
}

impl<'s> SecretJoin<'s> {
    pub(super) fn new(
        buffers: &'s [SecretBuffer],
        forget_before: Timestamp,
        parse_cache: &'s mut KeyParseCache,
    ) -> Self {
        let cursors = vec![JoinCursor::default(); buffers.len()];
        SecretJoin { buffers, cursors, secrets: Vec::new(), parse_cache, forget_before }
    }

    /// Passes the key of a row in `KEY_COLUMNS` to `part`, after verifying its checksum and that its secrets are
    /// complete. Secrets that were superseded before `forget_before` are left out, unless they are in its record.
    pub(super) fn join_key(
        &mut self,
        row: &impl RowColumns,
        part: &mut dyn SnapshotPart,
    ) -> Result<(), StoreError> {
        let (key, sum) = decode_key_row(row)?;
        self.secrets.clear();
        for (from, at) in self.buffers.iter().zip(&mut self.cursors) {
            from.collect_secrets(KeyIdNumber::from_be_bytes(key.id), at, &mut self.secrets);
        }
        if self.secrets.len() > 1 {
            self.secrets.sort_unstable_by_key(|secret| std::cmp::Reverse(secret.version));
        }
        let in_record = count_record_secrets(&key.id, &self.secrets)?;
        if self.secrets.len() > in_record {
            let mut at = 0;
            self.secrets.retain(|secret| {
                at += 1;
                at <= in_record || !secret.is_superseded(self.forget_before)
            });
        }
        let key = key.verify_checksum(sum)?.without_revoked_grants();
        part.add_key(&self.parse_cache.load_key(&key, self.secrets.split_at(in_record))?);
        Ok(())
    }
}
