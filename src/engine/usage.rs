//! What Checks leave behind: when each secret was last used, how often each key was allowed and denied, what is
//! spent of quotas. Noted in memory, written behind.
//!
//! Bounded: there is one entry for each key that was used since the last flush, and no more than
//! [`MOST_KEYS`]; what comes beyond that is counted as dropped. A kill loses what was noted since the last
//! flush, five seconds at the most.

use std::{
    collections::HashMap,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use crate::{
    domain::{decision::Reason, limit::Spent, name::KeyId, time::Timestamp},
    store::{Count, Hour, Store, StoreError, UsageBatch, UsedSecret},
};

const SHARDS: usize = 16;
/// How many keys may wait to be written: about 150 MB of them.
pub const MOST_KEYS: usize = 1 << 20;
/// Keys in one transaction: a flush must not hold up the writes between for long.
const CHUNK: usize = 500;

/// What one key's Checks have left.
#[derive(Clone, Debug, Default)]
struct Trace {
    /// The latest use of each secret version.
    used: Vec<(u32, Timestamp)>,
    counts: Vec<(Hour, Reason, u64)>,
    spent: Option<Spent>,
}

impl Trace {
    fn use_of(&mut self, version: u32, at: Timestamp) {
        match self.used.iter_mut().find(|(of, _)| *of == version) {
            Some((_, last)) => *last = at.max(*last),
            None => self.used.push((version, at)),
        }
    }

    fn count(&mut self, hour: Hour, reason: Reason, more: u64) {
        match self.counts.iter_mut().find(|(of, why, _)| (*of, *why) == (hour, reason)) {
            Some((_, _, count)) => *count += more,
            None => self.counts.push((hour, reason, more)),
        }
    }

    /// Checks of one key may be noted in another order than they spent: within a period the most counts.
    fn spend(&mut self, spent: Option<Spent>) {
        let key = |spent: &Spent| (spent.period, spent.used);
        self.spent = self.spent.into_iter().chain(spent).max_by_key(key);
    }

    /// Adds what came later.
    fn add(&mut self, later: Trace) {
        later.used.into_iter().for_each(|(version, at)| self.use_of(version, at));
        later.counts.into_iter().for_each(|(hour, reason, more)| self.count(hour, reason, more));
        self.spend(later.spent);
    }
}

#[derive(Default)]
struct Shard {
    /// Noted since the last flush began.
    fresh: HashMap<KeyId, Trace>,
    /// Being written.
    flushing: HashMap<KeyId, Trace>,
}

/// What the store does not have yet.
#[derive(Default)]
pub struct Usage {
    shards: [Mutex<Shard>; SHARDS],
    dropped: AtomicU64,
    /// One flush at a time: what is being written must not be written twice.
    flush: tokio::sync::Mutex<()>,
}

impl std::fmt::Debug for Usage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Usage").field("dropped", &self.dropped()).finish_non_exhaustive()
    }
}

fn lock(shard: &Mutex<Shard>) -> MutexGuard<'_, Shard> {
    shard.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Usage {
    fn shard(&self, key: KeyId) -> MutexGuard<'_, Shard> {
        // The last byte of a UUIDv7 is random.
        lock(&self.shards[usize::from(key.as_bytes()[15]) % SHARDS])
    }

    /// Notes a Check of a key: allowed ones are uses of the secret.
    pub fn note(&self, key: KeyId, version: u32, reason: Reason, spent: Option<Spent>, at: Timestamp) {
        let mut shard = self.shard(key);
        if shard.fresh.len() >= MOST_KEYS / SHARDS && !shard.fresh.contains_key(&key) {
            self.dropped.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let trace = shard.fresh.entry(key).or_default();
        trace.count(Hour::of(at), reason, 1);
        if reason == Reason::Ok {
            trace.use_of(version, at);
        }
        trace.spend(spent);
    }

    /// How many Checks were not noted, since too many keys waited to be written.
    #[must_use]
    pub fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }

    /// The latest use that the store may not have yet.
    #[must_use]
    pub fn pending(&self, key: KeyId, version: u32) -> Option<Timestamp> {
        let shard = self.shard(key);
        let traces = [shard.fresh.get(&key), shard.flushing.get(&key)];
        let used = traces.into_iter().flatten().flat_map(|trace| &trace.used);
        used.filter(|(of, _)| *of == version).map(|(_, at)| *at).max()
    }

    /// Writes everything noted so far. What could not be written waits for the next flush.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn flush(&self, store: &dyn Store) -> Result<(), StoreError> {
        let _one = self.flush.lock().await;
        for shard in &self.shards {
            let keys: Vec<KeyId> = {
                let mut shard = lock(shard);
                for (key, trace) in std::mem::take(&mut shard.fresh) {
                    shard.flushing.entry(key).or_default().add(trace);
                }
                shard.flushing.keys().copied().collect()
            };
            for keys in keys.chunks(CHUNK) {
                let batch = batch(&lock(shard).flushing, keys);
                store.note_usage(&batch).await?;
                let mut shard = lock(shard);
                keys.iter().for_each(|key| drop(shard.flushing.remove(key)));
            }
        }
        Ok(())
    }
}

fn batch(traces: &HashMap<KeyId, Trace>, keys: &[KeyId]) -> UsageBatch {
    let mut batch = UsageBatch::default();
    for (key_id, trace) in keys.iter().filter_map(|key| Some((*key, traces.get(key)?))) {
        batch.used.extend(trace.used.iter().map(|&(version, at)| UsedSecret { key_id, version, at }));
        let counts = trace.counts.iter();
        batch.counts.extend(counts.map(|&(hour, reason, count)| Count { key_id, hour, reason, count }));
        batch.spent.extend(trace.spent.map(|spent| (key_id, spent)));
    }
    batch
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(micros: i64) -> Timestamp {
        Timestamp::from_micros(micros)
    }

    fn key() -> KeyId {
        KeyId::generate(at(0), [3; 10])
    }

    #[test]
    fn the_latest_allowed_use_of_each_secret_counts() {
        let usage = Usage::default();
        usage.note(key(), 1, Reason::Ok, None, at(5));
        usage.note(key(), 1, Reason::Ok, None, at(4));
        usage.note(key(), 2, Reason::Ok, None, at(9));
        usage.note(key(), 3, Reason::Rotated, None, at(9));
        assert_eq!(usage.pending(key(), 1), Some(at(5)));
        assert_eq!(usage.pending(key(), 2), Some(at(9)));
        assert_eq!(usage.pending(key(), 3), None, "a denied Check is no use");
    }

    #[test]
    fn checks_are_counted_by_hour_and_reason() {
        let mut trace = Trace::default();
        trace.count(Hour(1), Reason::Ok, 2);
        trace.count(Hour(1), Reason::Revoked, 1);
        let mut later = Trace::default();
        later.count(Hour(1), Reason::Ok, 3);
        later.count(Hour(2), Reason::Ok, 1);
        trace.add(later);
        assert_eq!(
            trace.counts,
            [(Hour(1), Reason::Ok, 5), (Hour(1), Reason::Revoked, 1), (Hour(2), Reason::Ok, 1)]
        );
    }
}
