//! What Checks leave behind: when each secret was last used, how often each key was allowed and denied, which quotas
//! were drawn from. Noted in memory, written behind; what the store then says of quotas goes back to their budgets.
//!
//! Bounded: there is one entry for each key that was used since the last flush, and no more than
//! [`notes::MAX_BUFFERED_KEYS`]; what comes beyond that is counted as dropped. A kill loses what was noted and is not written:
//! of the last five seconds, or of more where so many keys are used that writing would take more than its share of the
//! machine ([`FlushMode::Throttled`]). Quotas that others draw from too cannot always wait so long: [`UsageRecorder::request_quota_flush`].

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

/// Keys in one question for quotas.
const QUOTA_BATCH: usize = 500;
/// Into how many parts quotas are divided, so that Checks do not wait for each other.
const QUOTA_SHARDS: usize = 16;
/// How often quotas are counted while a flush goes on.
const QUOTA_FLUSH_INTERVAL: Duration = Duration::from_secs(5);
/// How many times as long as a write took a gentle flush rests after it.
const REST_FACTOR: u32 = 9;
/// No rest is longer: a write that takes longer waits for something else than processors.
const MAX_REST: Duration = Duration::from_millis(100);
/// A gentle flush does not rest while so many keys are noted: they must not be too many.
const REST_THRESHOLD: usize = MAX_BUFFERED_KEYS / 4 * 3;
/// How long after a failure quotas are written again.
const QUOTA_RETRY_DELAY: Duration = Duration::from_secs(1);

/// How fast to write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FlushMode {
    /// At once: somebody waits for it.
    Immediate,
    /// A tenth of the time, unless somebody waits or very many keys do. Checks have the rest.
    Throttled,
}

/// Each knows what is to be drawn.
type LimitStatesByKey = HashMap<KeyId, Arc<KeyLimitState>>;

/// What the store does not have yet.
#[derive(Default)]
pub struct UsageRecorder {
    buffer: UsageBuffer,
    dropped: AtomicU64,
    failures: AtomicU64,
    /// One flush at a time: what is being written must not be written twice.
    flush_lock: tokio::sync::Mutex<()>,
    /// How many wait for a flush.
    immediate_waiters: AtomicUsize,
    /// Somebody waits.
    immediate_requested: Notify,
    /// One write at a time: a budget's units must not be counted twice.
    write_lock: tokio::sync::Mutex<()>,
    /// Quotas that were drawn from, to be counted with the next flush.
    touched_quotas: [Mutex<LimitStatesByKey>; QUOTA_SHARDS],
    /// Those to be counted now.
    urgent_quotas: Mutex<LimitStatesByKey>,
    /// Somebody has to hurry.
    quota_flush_requested: Notify,
    /// Quotas were counted, or could not be.
    quotas_flushed: Notify,
    failing: AtomicBool,
}

impl std::fmt::Debug for UsageRecorder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("UsageRecorder").field("dropped", &self.dropped()).finish_non_exhaustive()
    }
}

impl UsageRecorder {
    /// Notes a Check of a key: allowed ones are uses of the secret. `drew`: the budget, if the quota was drawn from.
    pub fn record(&self, event: UsageEvent, touched_quota: Option<&Arc<KeyLimitState>>) {
        self.count_dropped(self.buffer.push(event));
        if let Some(limit_state) = touched_quota {
            // The last byte of a UUIDv7 is random.
            let shard = &self.touched_quotas[usize::from(event.key_id.as_bytes()[15]) % QUOTA_SHARDS];
            lock(shard).entry(event.key_id).or_insert_with(|| limit_state.clone());
        }
    }

    fn count_dropped(&self, more: u64) {
        if more > 0 {
            self.dropped.fetch_add(more, Ordering::Relaxed);
        }
    }

    /// What was noted before this call, by key.
    fn merge_thread_buffers(&self) -> &UsageBuffer {
        self.count_dropped(self.buffer.merge_thread_buffers());
        &self.buffer
    }

    /// How many Checks were not noted, since too many keys waited to be written.
    #[must_use]
    pub fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }

    /// How many keys' uses the store does not have yet.
    #[must_use]
    pub fn pending_keys(&self) -> usize {
        self.merge_thread_buffers().pending_keys()
    }

    /// How often uses or quotas were not written, and had to wait.
    #[must_use]
    pub fn failures(&self) -> u64 {
        self.failures.load(Ordering::Relaxed)
    }

    /// The latest use that the store may not have yet.
    #[must_use]
    pub fn last_pending_use(&self, key: KeyId, version: u32) -> Option<Timestamp> {
        self.merge_thread_buffers().last_use(key, version)
    }

    /// Writes everything noted so far. What could not be written waits for the next flush.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn flush(&self, store: &dyn Store, mode: FlushMode) -> Result<(), StoreError> {
        let _urgent = (mode == FlushMode::Immediate).then(|| ImmediateFlushGuard::new(self));
        let _one = self.flush_lock.lock().await;
        self.merge_thread_buffers().enqueue();
        let mut drawn: Option<Instant> = None;
        loop {
            // What a kill forgets of quotas is given out again: they come first, and again if the rest takes long.
            if drawn.is_none_or(|at| at.elapsed() >= QUOTA_FLUSH_INTERVAL) {
                self.flush_quotas(store).await?;
                drawn = Some(Instant::now());
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

    /// Waits until nothing is being written, and holds back what would be. Whoever is given up then loses nothing, and
    /// nothing of it is written twice.
    pub async fn pause_writes(&self) -> MutexGuard<'_, ()> {
        self.write_lock.lock().await
    }

    /// Leaves the machine to others after a write that took so long.
    async fn rest_after_write(&self, duration: Duration) {
        let requested = self.immediate_requested.notified();
        if self.immediate_waiters.load(Ordering::SeqCst) == 0 && self.buffer.sharded_keys() < REST_THRESHOLD {
            let _ = tokio::time::timeout((duration * REST_FACTOR).min(MAX_REST), requested).await;
        }
    }

    /// Writes a batch, and tells the budgets what the store says of their quotas.
    async fn write_batch(
        &self,
        store: &dyn Store,
        batch: &UsageBatch,
        drawn: &HashMap<KeyId, (Arc<KeyLimitState>, PendingQuotaUnits)>,
    ) -> Result<(), StoreError> {
        let written = store.record_usage(batch).await;
        for (key, total) in written.as_deref().unwrap_or_default() {
            if let Some((limit_state, drawn)) = drawn.get(key) {
                limit_state.confirm_flush(*drawn, *total);
            }
        }
        self.failing.store(written.is_err(), Ordering::Relaxed);
        self.failures.fetch_add(written.is_err().into(), Ordering::Relaxed);
        self.quotas_flushed.notify_waiters();
        written.map(drop)
    }

    /// Has the store count at once what was used of a key's quota.
    pub fn request_quota_flush(&self, key: KeyId, limit_state: &Arc<KeyLimitState>) {
        lock(&self.urgent_quotas).insert(key, limit_state.clone());
        self.quota_flush_requested.notify_one();
    }

    /// Resolves when quotas were counted next, or could not be.
    pub fn quotas_flushed(&self) -> Notified<'_> {
        self.quotas_flushed.notified()
    }

    /// Whether the store failed to count, when it was last asked to.
    #[must_use]
    pub fn is_failing(&self) -> bool {
        self.failing.load(Ordering::Relaxed)
    }

    /// Has the store count the quotas that cannot wait, as often as there are some.
    pub async fn run_quota_flusher(&self, store: &dyn Store) {
        loop {
            self.quota_flush_requested.notified().await;
            while let Err(error) = self.flush_urgent_quotas(store).await {
                tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    "quotas were not counted; they wait"
                );
                tokio::time::sleep(QUOTA_RETRY_DELAY).await;
            }
        }
    }

    /// Has everything counted that was drawn.
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
            let drawn: HashMap<_, _> = limit_states
                .into_iter()
                .filter_map(|(key, limit_state)| {
                    Some((key, (limit_state.clone(), limit_state.take_pending_units()?)))
                })
                .collect();
            let quota_units = drawn.iter().map(|(key, (_, drawn))| (*key, *drawn)).collect();
            let batch = UsageBatch { quota_units, ..UsageBatch::default() };
            if let Err(error) = self.write_batch(store, &batch, &drawn).await {
                lock(&self.urgent_quotas)
                    .extend(drawn.into_iter().map(|(key, (limit_state, _))| (key, limit_state)));
                return Err(error);
            }
        }
    }
}

/// Somebody waits for a flush, until this is dropped.
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

/// What is to be written of some keys.
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
