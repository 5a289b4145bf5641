//! When each secret was last used: noted in memory by Checks, written behind.
//!
//! Bounded by the secrets in the index: only what was found is noted, and each secret has one entry until the
//! next flush. A kill loses what was noted since the last flush, five seconds at the most.

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

use crate::{
    domain::{name::KeyId, time::Timestamp},
    store::{Store, StoreError, UsedSecret},
};

const SHARDS: usize = 16;
/// Rows in one transaction: a flush must not hold up the writes between for long.
const CHUNK: usize = 1000;

type Uses = HashMap<(KeyId, u32), Timestamp>;

#[derive(Default)]
struct Shard {
    /// Noted since the last flush began.
    fresh: Uses,
    /// Being written.
    flushing: Uses,
}

/// The uses that the store does not have yet.
#[derive(Default)]
pub struct Usage {
    shards: [Mutex<Shard>; SHARDS],
}

impl std::fmt::Debug for Usage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Usage").finish_non_exhaustive()
    }
}

fn keep_latest(uses: &mut Uses, of: (KeyId, u32), at: Timestamp) {
    uses.entry(of)
        .and_modify(|last| *last = at.max(*last))
        .or_insert(at);
}

impl Usage {
    fn shard(&self, key: KeyId) -> MutexGuard<'_, Shard> {
        // The last byte of a UUIDv7 is random.
        let shard = usize::from(key.as_bytes()[15]) % SHARDS;
        self.shards[shard].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that a secret was used.
    pub fn note(&self, key: KeyId, version: u32, at: Timestamp) {
        keep_latest(&mut self.shard(key).fresh, (key, version), at);
    }

    /// The latest use that the store may not have yet.
    #[must_use]
    pub fn pending(&self, key: KeyId, version: u32) -> Option<Timestamp> {
        let shard = self.shard(key);
        shard
            .fresh
            .get(&(key, version))
            .max(shard.flushing.get(&(key, version)))
            .copied()
    }

    /// Writes everything noted so far. What could not be written waits for the next flush.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn flush(&self, store: &dyn Store) -> Result<(), StoreError> {
        for shard in &self.shards {
            let lock = || shard.lock().unwrap_or_else(PoisonError::into_inner);
            let rows: Vec<UsedSecret> = {
                let mut shard = lock();
                let fresh = std::mem::take(&mut shard.fresh);
                for (of, at) in fresh {
                    keep_latest(&mut shard.flushing, of, at);
                }
                let uses = shard.flushing.iter();
                uses.map(|(&(key_id, version), &at)| UsedSecret { key_id, version, at })
                    .collect()
            };
            for chunk in rows.chunks(CHUNK) {
                store.note_used(chunk).await?;
            }
            lock().flushing.clear();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(micros: i64) -> Timestamp {
        Timestamp::from_micros(micros)
    }

    #[test]
    fn the_latest_use_of_each_secret_counts() {
        let usage = Usage::default();
        let key = KeyId::generate(at(0), [3; 10]);
        usage.note(key, 1, at(5));
        usage.note(key, 1, at(4));
        usage.note(key, 2, at(9));
        assert_eq!(usage.pending(key, 1), Some(at(5)));
        assert_eq!(usage.pending(key, 2), Some(at(9)));
        assert_eq!(usage.pending(key, 3), None);
    }
}
