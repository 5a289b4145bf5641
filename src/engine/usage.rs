//! Records the usage that Checks leave behind: the last use of each secret, the Checks per key, and
//! the quotas that were consumed.
//!
//! Usage is recorded in memory and written behind; the totals that the store returns go back to each key's limits.
//!
//! Memory is bounded: one entry for each key used since the last flush, up to [`buffer::MAX_BUFFERED_KEYS`]; more are
//! counted as dropped. A crash loses what is not written: normally the last five seconds. It is more if
//! writing all used keys takes longer, since a flush has a limited share of the machine ([`FlushMode::Throttled`]).
//! A shared quota cannot always wait that long: see [`UsageRecorder::request_quota_flush`].

pub mod buffer;
mod event;
mod key_usage;

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::{
    sync::{MutexGuard, Notify, futures::Notified},
    time::Instant,
};

use crate::{
    domain::{limit::PendingQuotaUnits, name::KeyId, time::Timestamp},
    store::{SecretUse, Store, StoreError, UsageBatch, UsageCount},
};

pub use event::UsageEvent;

use self::{
    buffer::{MAX_BUFFERED_KEYS, UsageBuffer, lock},
    key_usage::KeyUsage,
};
use super::key_limits::KeyLimitState;

/// The maximum number of quotas in one write.
const QUOTA_BATCH: usize = 500;
/// The number of shards, so that Checks do not contend for one lock.
const QUOTA_SHARDS: usize = 16;
/// How often quotas are written while a flush is running.
const QUOTA_FLUSH_INTERVAL: Duration = Duration::from_secs(5);
/// A throttled flush rests for this multiple of the duration of each write.
const REST_FACTOR: u32 = 9;
/// The maximum rest: a longer write is not limited by the processor.
const MAX_REST: Duration = Duration::from_millis(100);
/// A throttled flush does not rest while more keys than this are buffered.
const REST_THRESHOLD: usize = MAX_BUFFERED_KEYS / 4 * 3;
/// The delay before quotas are written again after a failure.
const QUOTA_RETRY_DELAY: Duration = Duration::from_secs(1);

/// How fast a flush writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FlushMode {
    /// Without rests, because a caller waits for it.
    Immediate,
    /// A tenth of the time, unless a caller waits or very many keys are buffered; the rest is for Checks.
    Throttled,
}

/// Each state knows its units that are pending.
type LimitStatesByKey = HashMap<KeyId, Arc<KeyLimitState>>;

/// Collects usage until the store has it.
#[derive(Default)]
pub struct UsageRecorder {
    buffer: UsageBuffer,
    dropped: AtomicU64,
    failures: AtomicU64,
    /// One flush at a time, so that no batch is written twice.
    flush_lock: tokio::sync::Mutex<()>,
    /// The number of callers that wait for a flush.
    immediate_waiters: AtomicUsize,
    /// Notified when a caller starts to wait.
    immediate_requested: Notify,
    /// One write at a time, so that no quota's units are recorded twice.
    write_lock: tokio::sync::Mutex<()>,
    /// Quotas to be written by the next flush.
    touched_quotas: [Mutex<LimitStatesByKey>; QUOTA_SHARDS],
    /// Quotas to be written at once.
    urgent_quotas: Mutex<LimitStatesByKey>,
    /// Notified when a quota is added to `urgent_quotas`.
    quota_flush_requested: Notify,
    /// Notified after each write, whether it succeeded or failed.
    quotas_flushed: Notify,
    failing: AtomicBool,
}

impl std::fmt::Debug for UsageRecorder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("UsageRecorder").field("dropped", &self.dropped()).finish_non_exhaustive()
    }
}

impl UsageRecorder {
    /// Records a Check. An allowed one is a use of the secret. `touched_quota` is set if the key's quota was consumed.
    pub fn record(&self, event: UsageEvent, touched_quota: Option<&Arc<KeyLimitState>>) {
        self.count_dropped(self.buffer.push(event));
        if let Some(limit_state) = touched_quota {
            // The last byte of a UUIDv7 is random.
            let shard = &self.touched_quotas[usize::from(event.key_id.as_bytes()[15]) % QUOTA_SHARDS];
            lock(shard).entry(event.key_id).or_insert_with(|| limit_state.clone());
        }
    }

    fn count_dropped(&self, count: u64) {
        if count > 0 {
            self.dropped.fetch_add(count, Ordering::Relaxed);
        }
    }

    /// Merges the events of all threads that were recorded before this call.
    fn merge_thread_buffers(&self) -> &UsageBuffer {
        self.count_dropped(self.buffer.merge_thread_buffers());
        &self.buffer
    }

    /// How many Checks were not recorded because too many keys were buffered.
    #[must_use]
    pub fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }

    /// How many keys have usage that the store does not have yet.
    #[must_use]
    pub fn pending_keys(&self) -> usize {
        self.merge_thread_buffers().pending_keys()
    }

    /// How many writes of usage or quotas failed; they are retried.
    #[must_use]
    pub fn failures(&self) -> u64 {
        self.failures.load(Ordering::Relaxed)
    }

    /// The latest use of a secret that may not be in the store yet.
    #[must_use]
    pub fn last_pending_use(&self, key: KeyId, version: u32) -> Option<Timestamp> {
        self.merge_thread_buffers().last_use(key, version)
    }

    /// Writes everything that was recorded before this call. What cannot be written remains for the next flush.
    ///
    /// # Errors
    /// The store fails to write a batch.
    pub async fn flush(&self, store: &dyn Store, mode: FlushMode) -> Result<(), StoreError> {
        let _urgent = (mode == FlushMode::Immediate).then(|| ImmediateFlushGuard::new(self));
        let _one = self.flush_lock.lock().await;
        self.merge_thread_buffers().enqueue();
        let mut quotas_written_at: Option<Instant> = None;
        loop {
            // Unwritten quota units are lost in a crash and given out again, so quotas are written first, and again
            // if the rest takes long.
            if quotas_written_at.is_none_or(|at| at.elapsed() >= QUOTA_FLUSH_INTERVAL) {
                self.flush_quotas(store).await?;
                quotas_written_at = Some(Instant::now());
            }
            let started = Instant::now();
            let writing = self.write_lock.lock().await;
            let Some(batch) = self.buffer.next_batch(build_batch) else { return Ok(()) };
            self.write_batch(store, &batch, &HashMap::new()).await?;
            self.buffer.remove_batch();
            drop(writing);
            self.rest_after_write(started.elapsed()).await;
        }
    }

    /// Waits for the running write and blocks further ones, so that a flush can be canceled
    /// without losing or repeating one.
    pub async fn pause_writes(&self) -> MutexGuard<'_, ()> {
        self.write_lock.lock().await
    }

    /// Leaves the machine to others after a write of this duration.
    async fn rest_after_write(&self, duration: Duration) {
        let requested = self.immediate_requested.notified();
        if self.immediate_waiters.load(Ordering::SeqCst) == 0 && self.buffer.sharded_keys() < REST_THRESHOLD {
            let _ = tokio::time::timeout((duration * REST_FACTOR).min(MAX_REST), requested).await;
        }
    }

    /// Writes a batch, and passes the store's totals to the limits of the keys.
    async fn write_batch(
        &self,
        store: &dyn Store,
        batch: &UsageBatch,
        pending: &HashMap<KeyId, (Arc<KeyLimitState>, PendingQuotaUnits)>,
    ) -> Result<(), StoreError> {
        let written = store.record_usage(batch).await;
        for (key, total) in written.as_deref().unwrap_or_default() {
            if let Some((limit_state, pending)) = pending.get(key) {
                limit_state.confirm_flush(*pending, *total);
            }
        }
        self.failing.store(written.is_err(), Ordering::Relaxed);
        self.failures.fetch_add(written.is_err().into(), Ordering::Relaxed);
        self.quotas_flushed.notify_waiters();
        written.map(drop)
    }

    /// Requests that the store records the units of a key's quota at once.
    pub fn request_quota_flush(&self, key: KeyId, limit_state: &Arc<KeyLimitState>) {
        lock(&self.urgent_quotas).insert(key, limit_state.clone());
        self.quota_flush_requested.notify_one();
    }

    /// Resolves after the next write, whether it succeeds or fails.
    pub fn quotas_flushed(&self) -> Notified<'_> {
        self.quotas_flushed.notified()
    }

    /// Returns whether the last write failed.
    #[must_use]
    pub fn is_failing(&self) -> bool {
        self.failing.load(Ordering::Relaxed)
    }

    /// Writes urgent quotas whenever there are some. Never returns.
    pub async fn run_quota_flusher(&self, store: &dyn Store) {
        loop {
            self.quota_flush_requested.notified().await;
            while let Err(error) = self.flush_urgent_quotas(store).await {
                tracing::warn!(error = &error as &dyn std::error::Error, "quotas not recorded: retrying");
                tokio::time::sleep(QUOTA_RETRY_DELAY).await;
            }
        }
    }

    /// Writes all quotas that were consumed since the last flush.
    async fn flush_quotas(&self, store: &dyn Store) -> Result<(), StoreError> {
        for shard in &self.touched_quotas {
            let touched_quota = std::mem::take(&mut *lock(shard));
            lock(&self.urgent_quotas).extend(touched_quota);
        }
        self.flush_urgent_quotas(store).await
    }

    async fn flush_urgent_quotas(&self, store: &dyn Store) -> Result<(), StoreError> {
        loop {
            let _one = self.write_lock.lock().await;
            let limit_states: Vec<_> = {
                let mut urgent = lock(&self.urgent_quotas);
                let keys: Vec<KeyId> = urgent.keys().take(QUOTA_BATCH).copied().collect();
                keys.into_iter().filter_map(|key| urgent.remove_entry(&key)).collect()
            };
            if limit_states.is_empty() {
                return Ok(());
            }
            let pending: HashMap<_, _> = limit_states
                .into_iter()
                .filter_map(|(key, limit_state)| {
                    Some((key, (limit_state.clone(), limit_state.take_pending_units()?)))
                })
                .collect();
            let quota_units = pending.iter().map(|(key, (_, pending))| (*key, *pending)).collect();
            let batch = UsageBatch { quota_units, ..UsageBatch::default() };
            if let Err(error) = self.write_batch(store, &batch, &pending).await {
                lock(&self.urgent_quotas)
                    .extend(pending.into_iter().map(|(key, (limit_state, _))| (key, limit_state)));
                return Err(error);
            }
        }
    }
}

/// While it exists, a caller waits for a flush.
struct ImmediateFlushGuard<'u>(&'u UsageRecorder);

impl<'u> ImmediateFlushGuard<'u> {
    fn new(usage: &'u UsageRecorder) -> Self {
        usage.immediate_waiters.fetch_add(1, Ordering::SeqCst);
        usage.immediate_requested.notify_waiters();
        ImmediateFlushGuard(usage)
    }
}

impl Drop for ImmediateFlushGuard<'_> {
    fn drop(&mut self) {
        self.0.immediate_waiters.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Builds the rows to be written for these keys.
fn build_batch(keys: &[(KeyId, KeyUsage)]) -> UsageBatch {
    let mut batch = UsageBatch::default();
    for (key_id, key_usage) in keys {
        let key_id = *key_id;
        batch.secret_uses.extend(key_usage.secret_uses().map(|(version, at)| SecretUse {
            key_id,
            version,
            at,
        }));
        let counts = key_usage.counts();
        batch.counts.extend(counts.map(|(hour, reason, count)| UsageCount { key_id, hour, reason, count }));
    }
    batch
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::policy_decision::Reason;

    fn at(micros: i64) -> Timestamp {
        Timestamp::from_micros(micros)
    }

    fn key() -> KeyId {
        KeyId::generate(at(0), [3; 10])
    }

    #[test]
    fn the_latest_allowed_use_of_each_secret_counts() {
        let usage = UsageRecorder::default();
        let record = |version, reason, at| {
            usage.record(UsageEvent { key_id: key(), at, secret_version: version, reason }, None)
        };
        record(1, Reason::Ok, at(5));
        record(1, Reason::Ok, at(4));
        record(2, Reason::Ok, at(9));
        record(3, Reason::Rotated, at(9));
        assert_eq!(usage.last_pending_use(key(), 1), Some(at(5)));
        assert_eq!(usage.last_pending_use(key(), 2), Some(at(9)));
        assert_eq!(usage.last_pending_use(key(), 3), None, "a denied Check is no use");
    }
}
