//! Buffers usage events in memory until they are written.
//!
//! Events are appended to a per-thread buffer, merged into sharded per-key maps, then sorted into the flush queue.
//! Writing to the store is in `usage.rs`.
//!
//! A Check only appends to the buffer of the current thread, which no other core writes to. A full buffer is merged at
//! once: looking up many keys at once overlaps their cache misses. The flush queue is sorted by key, as the pages of
//! the store are, so that keys written together share pages.

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

use crate::{
    domain::{name::KeyId, time::Timestamp},
    metrics_core::PerThread,
};

pub use super::event::UsageEvent;

use super::key_usage::KeyUsage;

const KEY_SHARDS: usize = 16;
/// The maximum number of keys in the shards, about 130 MB. The flush queue may hold as many, in 84 MB.
pub const MAX_BUFFERED_KEYS: usize = 1 << 21;
/// The length of a full thread buffer: 8 KB, some ten microseconds of work.
const THREAD_BUFFER_EVENTS: usize = 256;
/// How many keys are written at once; a longer write would delay others.
const WRITE_BATCH_KEYS: usize = 500;

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

type UsageByKey = HashMap<KeyId, KeyUsage, foldhash::fast::RandomState>;

/// Keys in order, each once. Batches are taken from the end, so that written ones free their memory.
#[derive(Default)]
struct FlushQueue(Vec<(KeyId, KeyUsage)>);

impl FlushQueue {
    fn merge(&mut self, mut added: Vec<(KeyId, KeyUsage)>) {
        // Batches that could not be written are older than the new entries.
        if self.0.is_empty() {
            self.0 = added
        } else {
            self.0.append(&mut added)
        }
        self.0.sort_by_key(|(key, _)| *key);
        self.0.dedup_by(|(key, later), (of, earlier)| {
            let same = key == of;
            if same {
                earlier.merge(std::mem::take(later));
            }
            same
        });
    }

    /// The keys to be written next.
    fn next_batch(&self) -> &[(KeyId, KeyUsage)] {
        &self.0[self.0.len().saturating_sub(WRITE_BATCH_KEYS)..]
    }

    fn remove_batch(&mut self) {
        let remaining = self.0.len().saturating_sub(WRITE_BATCH_KEYS);
        self.0.truncate(remaining);
        if remaining < self.0.capacity() / 2 {
            self.0.shrink_to_fit();
        }
    }

    fn get(&self, key: KeyId) -> Option<&KeyUsage> {
        let at = self.0.binary_search_by_key(&key, |(of, _)| *of).ok()?;
        Some(&self.0[at].1)
    }
}

/// Every event that is not written yet. Locks are taken in the order of the fields.
#[derive(Default)]
pub(super) struct UsageBuffer {
    thread_buffers: PerThread<Mutex<Vec<UsageEvent>>>,
    flush_queue: Mutex<FlushQueue>,
    /// Checks wait for these locks, so they are held only briefly.
    shards: [Mutex<UsageByKey>; KEY_SHARDS],
}

impl UsageBuffer {
    /// Adds an event. Returns how many events were dropped because too many keys are buffered.
    pub(super) fn push(&self, event: UsageEvent) -> u64 {
        let mut buffer = lock(self.thread_buffers.local());
        buffer.push(event);
        if buffer.len() < THREAD_BUFFER_EVENTS { 0 } else { self.merge_into_shards(&mut buffer) }
    }

    /// Merges all thread buffers into the shards. Returns how many events were dropped.
    pub(super) fn merge_thread_buffers(&self) -> u64 {
        self.thread_buffers.iter().map(|buffer| self.merge_into_shards(&mut lock(buffer))).sum()
    }

    /// Moves all shards into the flush queue.
    pub(super) fn enqueue(&self) {
        let mut queue = lock(&self.flush_queue);
        let mut all = Vec::with_capacity(self.sharded_keys());
        for shard in &self.shards {
            let mut shard = lock(shard);
            // About as many keys will follow, and growing the map would delay a Check.
            let empty = UsageByKey::with_capacity_and_hasher(shard.len(), Default::default());
            let entries = std::mem::replace(&mut *shard, empty);
            drop(shard);
            all.extend(entries);
        }
        queue.merge(all);
    }

    /// Converts the next batch with `convert`. Returns `None` if the queue is empty.
    pub(super) fn next_batch<T>(&self, of: impl FnOnce(&[(KeyId, KeyUsage)]) -> T) -> Option<T> {
        let queue = lock(&self.flush_queue);
        let next = queue.next_batch();
        (!next.is_empty()).then(|| of(next))
    }

    /// Removes the batch that was written.
    pub(super) fn remove_batch(&self) {
        lock(&self.flush_queue).remove_batch();
    }

    /// The number of buffered keys. A key that is used while it is being written counts twice.
    pub(super) fn pending_keys(&self) -> usize {
        lock(&self.flush_queue).0.len() + self.sharded_keys()
    }

    /// The number of keys in the shards.
    pub(super) fn sharded_keys(&self) -> usize {
        self.shards.iter().map(|shard| lock(shard).len()).sum()
    }

    /// The latest buffered use of a secret.
    pub(super) fn last_use(&self, key: KeyId, version: u32) -> Option<Timestamp> {
        let queue = lock(&self.flush_queue);
        let shard = lock(self.shard(key));
        let buffered = [shard.get(&key), queue.get(key)].into_iter().flatten();
        buffered.flat_map(KeyUsage::secret_uses).filter(|(of, _)| *of == version).map(|(_, at)| at).max()
    }

    /// The buffer stays locked until its events are in the shards, so that readers find each event in one of both.
    fn merge_into_shards(&self, buffer: &mut Vec<UsageEvent>) -> u64 {
        let mut dropped = 0;
        for event in buffer.drain(..) {
            match usage_entry(&mut lock(self.shard(event.key_id)), event.key_id) {
                Some(usage) => usage.record(&event),
                None => dropped += 1,
            }
        }
        dropped
    }

    fn shard(&self, key: KeyId) -> &Mutex<UsageByKey> {
        // The last byte of a UUIDv7 is random.
        &self.shards[usize::from(key.as_bytes()[15]) % KEY_SHARDS]
    }
}

/// The entry of a key; `None` if too many keys are buffered.
fn usage_entry(shard: &mut UsageByKey, key: KeyId) -> Option<&mut KeyUsage> {
    if shard.len() >= MAX_BUFFERED_KEYS / KEY_SHARDS && !shard.contains_key(&key) {
        return None;
    }
    Some(shard.entry(key).or_default())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::policy_decision::Reason;

    fn at(micros: i64) -> Timestamp {
        Timestamp::from_micros(micros)
    }

    fn key(number: u64) -> KeyId {
        // Not in the order of their numbers.
        let mixed = number.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_be_bytes();
        KeyId::generate(at(0), std::array::from_fn(|byte| mixed[byte % 8]))
    }

    fn record(buffer: &UsageBuffer, number: u64, micros: i64) {
        buffer.push(UsageEvent {
            key_id: key(number),
            at: at(micros),
            secret_version: 1,
            reason: Reason::Ok,
        });
    }

    /// Writes everything. Returns the keys in ascending order, the reverse of the batches.
    fn flush_all(buffer: &UsageBuffer) -> Vec<KeyId> {
        let mut all = std::collections::VecDeque::new();
        while let Some(keys) =
            buffer.next_batch(|chunk| chunk.iter().map(|(key, _)| *key).collect::<Vec<_>>())
        {
            assert!(keys.len() <= WRITE_BATCH_KEYS);
            keys.into_iter().rev().for_each(|key| all.push_front(key));
            buffer.remove_batch();
        }
        all.into()
    }

    #[test]
    fn keys_are_written_in_order_from_the_end_and_once_whatever_was_left_of_the_line() {
        const KEYS: u64 = 3 * WRITE_BATCH_KEYS as u64 + 7;
        let buffer = UsageBuffer::default();
        for round in 1..4 {
            (0..KEYS).for_each(|number| record(&buffer, number, round));
            buffer.merge_thread_buffers();
            assert_eq!(buffer.last_use(key(8), 1), Some(at(round)));
            buffer.enqueue();
            assert_eq!(buffer.last_use(key(8), 1), Some(at(round)));
        }
        let written = flush_all(&buffer);
        assert_eq!(written.len() as u64, KEYS);
        assert!(written.is_sorted());
        assert_eq!((buffer.pending_keys(), buffer.last_use(key(8), 1)), (0, None));
    }

    #[test]
    fn what_was_used_while_it_was_written_is_written_again() {
        let buffer = UsageBuffer::default();
        record(&buffer, 1, 5);
        buffer.merge_thread_buffers();
        buffer.enqueue();
        record(&buffer, 1, 9);
        buffer.merge_thread_buffers();
        assert_eq!(buffer.last_use(key(1), 1), Some(at(9)));
        assert_eq!(flush_all(&buffer), [key(1)]);
        buffer.enqueue();
        assert_eq!(flush_all(&buffer), [key(1)]);
    }
}
