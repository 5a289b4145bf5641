//! Secrets that were read before their keys. Nearly all are the only one of their key: those take little, since there
//! may be a million of them.

use crate::domain::{key::KeySecret, time::Timestamp, token::TokenDigest};

use super::{
    SnapshotPart, StoreError,
    parse_cache::KeyParseCache,
    row_decoding::{
        RowColumns, count_record_secrets, decode_key_row, decode_secret, fixed_bytes, unreadable_column,
    },
};

/// A secret's row: whose it is, its columns, its checksum.
pub(super) const SECRET_ROW_COLUMNS: &str = "key_id, digest, version, hint, created_at, expires_at, sum";

/// A key's id as a number of the same order.
pub(super) type KeyIdNumber = u128;

/// A first secret that has no end.
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

/// Some keys' secrets.
#[derive(Debug, Default)]
pub(super) struct SecretBuffer {
    compact: Vec<CompactSecret>,
    /// All else, without hints.
    others: Vec<(KeyIdNumber, KeySecret)>,
}

/// Where the secrets of the key before ended: keys come in order, too, and hardly any is left out.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct JoinCursor {
    compact: usize,
    others: usize,
}

impl SecretBuffer {
    /// Forgets all, and keeps the room.
    pub(super) fn clear(&mut self) {
        self.compact.clear();
        self.others.clear();
    }

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.compact.len() + self.others.len()
    }

    /// Takes a row of [`SECRET_ROW_COLUMNS`], once its checksum has been found right.
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

    /// Puts them in the order of their keys, and of a key's the newest first.
    pub(super) fn sort(&mut self) {
        self.compact.sort_unstable_by_key(CompactSecret::key_number);
        self.others.sort_unstable_by_key(|(owner, secret)| (*owner, std::cmp::Reverse(secret.version)));
    }

    /// The id of a key that is about in the middle.
    pub(super) fn middle_id(&self) -> Option<KeyIdNumber> {
        let other = self.others.get(self.others.len() / 2).map(|(id, _)| *id);
        self.compact.get(self.compact.len() / 2).map(CompactSecret::key_number).or(other)
    }

    /// The first key's id, once they are sorted.
    pub(super) fn first_id(&self) -> Option<KeyIdNumber> {
        let ids =
            [self.compact.first().map(CompactSecret::key_number), self.others.first().map(|(id, _)| *id)];
        ids.into_iter().flatten().min()
    }

    /// The last key's id, once they are sorted.
    pub(super) fn last_id(&self) -> Option<KeyIdNumber> {
        let ids = [self.compact.last().map(CompactSecret::key_number), self.others.last().map(|(id, _)| *id)];
        ids.into_iter().flatten().max()
    }

    /// Adds a key's secrets to `secrets`, once they are sorted.
    fn collect_secrets(&self, id: KeyIdNumber, at: &mut JoinCursor, secrets: &mut Vec<KeySecret>) {
        let others = find_run(&self.others, |(id, _)| *id, id, &mut at.others);
        secrets.extend(others.iter().map(|(_, secret)| secret.clone()));
        // The oldest.
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

/// Those of one key among `all`, which are in order. `at` is where those of the one before ended.
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

/// Keys in the order of their ids, which claim their secrets.
pub(super) struct SecretJoin<'s> {
    buffers: &'s [SecretBuffer],
    /// Where those of the key before ended, in each.
    cursors: Vec<JoinCursor>,
    /// Of the key that is looked at.
    secrets: Vec<KeySecret>,
    parse_cache: &'s mut KeyParseCache,
    forget_before: Timestamp,
}

impl<'s> SecretJoin<'s> {
    pub(super) fn new(
        from: &'s [SecretBuffer],
        forget_before: Timestamp,
        alike: &'s mut KeyParseCache,
    ) -> Self {
        let at = vec![JoinCursor::default(); from.len()];
        SecretJoin { buffers: from, cursors: at, secrets: Vec::new(), parse_cache: alike, forget_before }
    }

    /// Gives the key of a row in `KEY_COLUMNS` to `part`, once its checksum has been found right and its secrets are all
    /// there. Secrets that were superseded for too long are left out, unless they are in its record.
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
