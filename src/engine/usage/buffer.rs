//! What was noted of Checks, in memory: first as it comes, on a pad of the thread that it comes from; then by key, on
//! shelves; then in the line of what is written next. Writing it to the store is not done here.
//!
//! A Check only appends to its own thread's pad, which no other core touches but to read it; a full pad is put on the
//! shelves as a whole. Many keys are found faster in one go than one each time: their misses overlap. The line is in the
//! order of keys, since the store's pages are: what is written together then shares them.

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
/// How many keys may be on the shelves: about 130 MB of them. There may be as many in the line, in 84 MB.
pub const MAX_BUFFERED_KEYS: usize = 1 << 21;
/// Notes on a full pad: 8 KB of them, some ten microseconds' work.
const THREAD_BUFFER_EVENTS: usize = 256;
/// Keys that are written together: a write must not hold up others for long.
const WRITE_BATCH_KEYS: usize = 500;

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

type UsageByKey = HashMap<KeyId, KeyUsage, foldhash::fast::RandomState>;

/// Keys in order, each once. They are written from the end, so that what is written takes no memory any more.
#[derive(Default)]
struct FlushQueue(Vec<(KeyId, KeyUsage)>);

impl FlushQueue {
    fn merge(&mut self, mut more: Vec<(KeyId, KeyUsage)>) {
        // What could not be written comes before what was noted since.
        if self.0.is_empty() {
            self.0 = more
        } else {
            self.0.append(&mut more)
        }
        self.0.sort_by_key(|(key, _)| *key);
        self.0.dedup_by(|(key, later), (of, known)| {
            let same = key == of;
            if same {
                known.merge(std::mem::take(later));
            }
            same
        });
    }

    /// What is to be written next.
    fn next_batch(&self) -> &[(KeyId, KeyUsage)] {
        &self.0[self.0.len().saturating_sub(WRITE_BATCH_KEYS)..]
    }

    fn remove_batch(&mut self) {
        let left = self.0.len().saturating_sub(WRITE_BATCH_KEYS);
        self.0.truncate(left);
        if left < self.0.capacity() / 2 {
            self.0.shrink_to_fit();
        }
    }

    fn get(&self, key: KeyId) -> Option<&KeyUsage> {
        let at = self.0.binary_search_by_key(&key, |(of, _)| *of).ok()?;
        Some(&self.0[at].1)
    }
}

/// Everything that was noted and is not written. Whoever takes two of its locks takes them in the order of the fields.
#[derive(Default)]
pub(super) struct UsageBuffer {
    thread_buffers: PerThread<Mutex<Vec<UsageEvent>>>,
    flush_queue: Mutex<FlushQueue>,
    /// Checks wait for these locks, so nobody has one for long.
    shards: [Mutex<UsageByKey>; KEY_SHARDS],
}

impl UsageBuffer {
    /// Notes a Check. Tells how many could not be noted, since too many keys wait.
    pub(super) fn push(&self, event: UsageEvent) -> u64 {
        let mut buffer = lock(self.thread_buffers.local());
        buffer.push(event);
        if buffer.len() < THREAD_BUFFER_EVENTS { 0 } else { self.merge_into_shards(&mut buffer) }
    }

    /// Puts everything on the shelves that stands on pads. The same is told as by `note`.
    pub(super) fn merge_thread_buffers(&self) -> u64 {
        self.thread_buffers.iter().map(|buffer| self.merge_into_shards(&mut lock(buffer))).sum()
    }

    /// Puts everything in the line that is on the shelves.
    pub(super) fn enqueue(&self) {
        let mut queue = lock(&self.flush_queue);
        let mut all = Vec::with_capacity(self.sharded_keys());
        for shard in &self.shards {
            let mut shard = lock(shard);
            // As many keys will come again, and a table that grows holds up whoever makes it grow.
            let empty = UsageByKey::with_capacity_and_hasher(shard.len(), Default::default());
            let entries = std::mem::replace(&mut *shard, empty);
            drop(shard);
            all.extend(entries);
        }
        queue.merge(all);
    }

    /// What is to be written next, as `of` makes it. None = nothing is in the line.
    pub(super) fn next_batch<T>(&self, of: impl FnOnce(&[(KeyId, KeyUsage)]) -> T) -> Option<T> {
        let queue = lock(&self.flush_queue);
        let next = queue.next_batch();
        (!next.is_empty()).then(|| of(next))
    }

    /// What was next is written.
    pub(super) fn remove_batch(&self) {
        lock(&self.flush_queue).remove_batch();
    }

    /// How many keys wait. One that is used while it is written counts twice.
    pub(super) fn pending_keys(&self) -> usize {
        lock(&self.flush_queue).0.len() + self.sharded_keys()
    }

    /// How many keys are on the shelves.
    pub(super) fn sharded_keys(&self) -> usize {
        self.shards.iter().map(|shard| lock(shard).len()).sum()
    }

    /// The latest use of a secret that is known here.
    pub(super) fn last_use(&self, key: KeyId, version: u32) -> Option<Timestamp> {
        let queue = lock(&self.flush_queue);
        let shard = lock(self.shard(key));
        let known = [shard.get(&key), queue.get(key)].into_iter().flatten();
        known.flat_map(KeyUsage::secret_uses).filter(|(of, _)| *of == version).map(|(_, at)| at).max()
    }

    /// A pad is locked until its buffer are on the shelves: they are in one place or in the other for whoever looks.
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

/// The trace of a key. None = too many keys wait.
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

    /// Writes everything; gives the keys, those first that were written last.
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
