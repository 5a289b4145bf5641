//! Secrets that were read before their keys. Nearly all are the only one of their key: those take little, since there
//! may be a million of them.

use crate::domain::{key::Secret, time::Timestamp, token::Digest};

use super::{
    Part, StoreError,
    alike::Alike,
    records::{Columns, bytes_at, in_record, key_row, secret_at, unreadable},
};

/// A secret's row: whose it is, its columns, its checksum.
pub(super) const COLUMNS: &str = "key_id, digest, version, hint, created_at, expires_at, sum";

/// A key's id as a number of the same order.
pub(super) type Id = u128;

/// A first secret that has no end.
#[derive(Debug)]
struct Plain {
    /// In halves: as one number it would make this 64 bytes.
    key_id: [u64; 2],
    digest: Digest,
    created_at: Timestamp,
}

const _: () = assert!(size_of::<Plain>() == 56);

impl Plain {
    fn id(&self) -> Id {
        Id::from(self.key_id[0]) << 64 | Id::from(self.key_id[1])
    }
}

/// Some keys' secrets.
#[derive(Debug, Default)]
pub(super) struct Unclaimed {
    plain: Vec<Plain>,
    /// All else, without hints.
    others: Vec<(Id, Secret)>,
}

/// Where the secrets of the key before ended: keys come in order, too, and hardly any is left out.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct At {
    plain: usize,
    others: usize,
}

impl Unclaimed {
    /// Forgets all, and keeps the room.
    pub(super) fn clear(&mut self) {
        self.plain.clear();
        self.others.clear();
    }

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.plain.len() + self.others.len()
    }

    /// Takes a row of [`COLUMNS`], once its checksum has been found right.
    pub(super) fn add(&mut self, row: &impl Columns) -> Result<(), StoreError> {
        let key_id: [u8; 16] = bytes_at(row, 0).map_err(unreadable)?;
        let id = Id::from_be_bytes(key_id);
        match secret_at(row, &key_id, 1, false)? {
            Secret { version: 1, digest, created_at, expires_at: None, .. } => {
                let key_id = [(id >> 64) as u64, id as u64];
                self.plain.push(Plain { key_id, digest, created_at });
            }
            secret => self.others.push((id, secret)),
        }
        Ok(())
    }

    /// Puts them in the order of their keys, and of a key's the newest first.
    pub(super) fn sort(&mut self) {
        self.plain.sort_unstable_by_key(Plain::id);
        self.others.sort_unstable_by_key(|(owner, secret)| (*owner, std::cmp::Reverse(secret.version)));
    }

    /// The id of a key that is about in the middle.
    pub(super) fn middle(&self) -> Option<Id> {
        let other = self.others.get(self.others.len() / 2).map(|(id, _)| *id);
        self.plain.get(self.plain.len() / 2).map(Plain::id).or(other)
    }

    /// The first key's id, once they are sorted.
    pub(super) fn first(&self) -> Option<Id> {
        let ids = [self.plain.first().map(Plain::id), self.others.first().map(|(id, _)| *id)];
        ids.into_iter().flatten().min()
    }

    /// The last key's id, once they are sorted.
    pub(super) fn last(&self) -> Option<Id> {
        let ids = [self.plain.last().map(Plain::id), self.others.last().map(|(id, _)| *id)];
        ids.into_iter().flatten().max()
    }

    /// Adds a key's secrets to `secrets`, once they are sorted.
    fn claim(&self, id: Id, at: &mut At, secrets: &mut Vec<Secret>) {
        let others = run(&self.others, |(id, _)| *id, id, &mut at.others);
        secrets.extend(others.iter().map(|(_, secret)| secret.clone()));
        // The oldest.
        let plain = run(&self.plain, Plain::id, id, &mut at.plain);
        secrets.extend(plain.iter().map(|plain| Secret {
            version: 1,
            digest: plain.digest,
            hint: String::new(),
            created_at: plain.created_at,
            expires_at: None,
        }));
    }
}

/// Those of one key among `all`, which are in order. `at` is where those of the one before ended.
fn run<'a, T>(all: &'a [T], id_of: impl Fn(&T) -> Id, id: Id, at: &mut usize) -> &'a [T] {
    let before = at.checked_sub(1).and_then(|before| all.get(before)).map(&id_of);
    let next = all.get(*at).map(&id_of);
    let here = before.is_none_or(|before| before < id) && next.is_none_or(|next| next >= id);
    let start = if here { *at } else { all.partition_point(|one| id_of(one) < id) };
    let count = all[start..].iter().take_while(|one| id_of(one) == id).count();
    *at = start + count;
    &all[start..*at]
}

/// Keys in the order of their ids, which claim their secrets.
pub(super) struct Claims<'s> {
    from: &'s [Unclaimed],
    /// Where those of the key before ended, in each.
    at: Vec<At>,
    /// Of the key that is looked at.
    secrets: Vec<Secret>,
    alike: &'s mut Alike,
    forget_before: Timestamp,
}

impl<'s> Claims<'s> {
    pub(super) fn of(from: &'s [Unclaimed], forget_before: Timestamp, alike: &'s mut Alike) -> Self {
        let at = vec![At::default(); from.len()];
        Claims { from, at, secrets: Vec::new(), alike, forget_before }
    }

    /// Gives the key of a row in `KEY_COLUMNS` to `part`, once its checksum has been found right and its secrets are all
    /// there. Secrets that were superseded for too long are left out, unless they are in its record.
    pub(super) fn key(&mut self, row: &impl Columns, part: &mut dyn Part) -> Result<(), StoreError> {
        let (key, sum) = key_row(row)?;
        self.secrets.clear();
        for (from, at) in self.from.iter().zip(&mut self.at) {
            from.claim(Id::from_be_bytes(key.id), at, &mut self.secrets);
        }
        if self.secrets.len() > 1 {
            self.secrets.sort_unstable_by_key(|secret| std::cmp::Reverse(secret.version));
        }
        let in_record = in_record(&key.id, &self.secrets)?;
        if self.secrets.len() > in_record {
            let mut at = 0;
            self.secrets.retain(|secret| {
                at += 1;
                at <= in_record || !secret.superseded(self.forget_before)
            });
        }
        let key = key.checked(sum)?.for_checks();
        part.key(&key.to_loaded(self.alike, self.secrets.split_at(in_record))?);
        Ok(())
    }
}
