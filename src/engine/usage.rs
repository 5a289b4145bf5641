//! What Checks leave behind: when each secret was last used, how often each key was allowed and denied, which quotas
//! were drawn from. Noted in memory, written behind; what the store then says of quotas goes back to their budgets.
//!
//! Bounded: there is one entry for each key that was used since the last flush, and no more than
//! [`notes::MOST_KEYS`]; what comes beyond that is counted as dropped. A kill loses what was noted and is not written:
//! of the last five seconds, or of more where so many keys are used that writing would take more than its share of the
//! machine ([`Pace::Gentle`]). Quotas that others draw from too cannot always wait so long: [`Usage::hurry`].

pub mod notes;
mod trace;

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
    domain::{limit::Drawn, name::KeyId, time::Timestamp},
    store::{Count, Store, StoreError, UsageBatch, UsedSecret},
};

use self::{
    notes::{MOST_KEYS, Note, Notes, lock},
    trace::Trace,
};
use super::limiter::Budget;

/// Keys in one question for quotas.
const CHUNK: usize = 500;
/// Into how many parts quotas are divided, so that Checks do not wait for each other.
const SHARDS: usize = 16;
/// How often quotas are counted while a flush goes on.
const DRAW_EVERY: Duration = Duration::from_secs(5);
/// How many times as long as a write took a gentle flush rests after it.
const REST: u32 = 9;
/// No rest is longer: a write that takes longer waits for something else than processors.
const LONGEST_REST: Duration = Duration::from_millis(100);
/// A gentle flush does not rest while so many keys are noted: they must not be too many.
const MANY: usize = MOST_KEYS / 4 * 3;
/// How long after a failure quotas are written again.
const DRAW_AGAIN: Duration = Duration::from_secs(1);

/// How fast to write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pace {
    /// At once: somebody waits for it.
    AtOnce,
    /// A tenth of the time, unless somebody waits or very many keys do. Checks have the rest.
    Gentle,
}

/// Each knows what is to be drawn.
type Budgets = HashMap<KeyId, Arc<Budget>>;

/// What the store does not have yet.
#[derive(Default)]
pub struct Usage {
    notes: Notes,
    dropped: AtomicU64,
    failures: AtomicU64,
    /// One flush at a time: what is being written must not be written twice.
    flush: tokio::sync::Mutex<()>,
    /// How many wait for a flush.
    urgent: AtomicUsize,
    /// Somebody waits.
    urged: Notify,
    /// One write at a time: a budget's units must not be counted twice.
    writing: tokio::sync::Mutex<()>,
    /// Quotas that were drawn from, to be counted with the next flush.
    drew: [Mutex<Budgets>; SHARDS],
    /// Those to be counted now.
    hurried: Mutex<Budgets>,
    /// Somebody has to hurry.
    wanted: Notify,
    /// Quotas were counted, or could not be.
    drawn: Notify,
    failing: AtomicBool,
}

impl std::fmt::Debug for Usage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Usage").field("dropped", &self.dropped()).finish_non_exhaustive()
    }
}

impl Usage {
    /// Notes a Check of a key: allowed ones are uses of the secret. `drew`: the budget, if the quota was drawn from.
    pub fn note(&self, note: Note, drew: Option<&Arc<Budget>>) {
        self.count_dropped(self.notes.note(note));
        if let Some(budget) = drew {
            // The last byte of a UUIDv7 is random.
            let shard = &self.drew[usize::from(note.key.as_bytes()[15]) % SHARDS];
            lock(shard).entry(note.key).or_insert_with(|| budget.clone());
        }
    }

    fn count_dropped(&self, more: u64) {
        if more > 0 {
            self.dropped.fetch_add(more, Ordering::Relaxed);
        }
    }

    /// What was noted before this call, by key.
    fn gathered(&self) -> &Notes {
        self.count_dropped(self.notes.gather());
        &self.notes
    }

    /// How many Checks were not noted, since too many keys waited to be written.
    #[must_use]
    pub fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }

    /// How many keys' uses the store does not have yet.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.gathered().len()
    }

    /// How often uses or quotas were not written, and had to wait.
    #[must_use]
    pub fn failures(&self) -> u64 {
        self.failures.load(Ordering::Relaxed)
    }

    /// The latest use that the store may not have yet.
    #[must_use]
    pub fn pending(&self, key: KeyId, version: u32) -> Option<Timestamp> {
        self.gathered().last_use(key, version)
    }

    /// Writes everything noted so far. What could not be written waits for the next flush.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn flush(&self, store: &dyn Store, pace: Pace) -> Result<(), StoreError> {
        let _urgent = (pace == Pace::AtOnce).then(|| Urgent::new(self));
        let _one = self.flush.lock().await;
        self.gathered().line_up();
        let mut drawn: Option<Instant> = None;
        loop {
            // What a kill forgets of quotas is given out again: they come first, and again if the rest takes long.
            if drawn.is_none_or(|at| at.elapsed() >= DRAW_EVERY) {
                self.draw_all(store).await?;
                drawn = Some(Instant::now());
            }
            let begun = Instant::now();
            let writing = self.writing.lock().await;
            let Some(batch) = self.notes.next(batch) else { return Ok(()) };
            self.write(store, &batch, &HashMap::new()).await?;
            self.notes.written();
            drop(writing);
            self.rest(begun.elapsed()).await;
        }
    }

    /// Waits until nothing is being written, and holds back what would be. Whoever is given up then loses nothing, and
    /// nothing of it is written twice.
    pub async fn between_writes(&self) -> MutexGuard<'_, ()> {
        self.writing.lock().await
    }

    /// Leaves the machine to others after a write that took so long.
    async fn rest(&self, took: Duration) {
        let urged = self.urged.notified();
        if self.urgent.load(Ordering::SeqCst) == 0 && self.notes.shelved() < MANY {
            let _ = tokio::time::timeout((took * REST).min(LONGEST_REST), urged).await;
        }
    }

    /// Writes a batch, and tells the budgets what the store says of their quotas.
    async fn write(
        &self,
        store: &dyn Store,
        batch: &UsageBatch,
        drawn: &HashMap<KeyId, (Arc<Budget>, Drawn)>,
    ) -> Result<(), StoreError> {
        let written = store.note_usage(batch).await;
        for (key, total) in written.as_deref().unwrap_or_default() {
            if let Some((budget, drawn)) = drawn.get(key) {
                budget.counted(*drawn, *total);
            }
        }
        self.failing.store(written.is_err(), Ordering::Relaxed);
        self.failures.fetch_add(written.is_err().into(), Ordering::Relaxed);
        self.drawn.notify_waiters();
        written.map(drop)
    }

    /// Has the store count at once what was used of a key's quota.
    pub fn hurry(&self, key: KeyId, budget: &Arc<Budget>) {
        lock(&self.hurried).insert(key, budget.clone());
        self.wanted.notify_one();
    }

    /// Resolves when quotas were counted next, or could not be.
    pub fn drawn(&self) -> Notified<'_> {
        self.drawn.notified()
    }

    /// Whether the store failed to count, when it was last asked to.
    #[must_use]
    pub fn failing(&self) -> bool {
        self.failing.load(Ordering::Relaxed)
    }

    /// Has the store count the quotas that cannot wait, as often as there are some.
    pub async fn keep_drawing(&self, store: &dyn Store) {
        loop {
            self.wanted.notified().await;
            while let Err(error) = self.draw(store).await {
                tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    "quotas were not counted; they wait"
                );
                tokio::time::sleep(DRAW_AGAIN).await;
            }
        }
    }

    /// Has everything counted that was drawn.
    async fn draw_all(&self, store: &dyn Store) -> Result<(), StoreError> {
        for shard in &self.drew {
            let drew = std::mem::take(&mut *lock(shard));
            lock(&self.hurried).extend(drew);
        }
        self.draw(store).await
    }

    async fn draw(&self, store: &dyn Store) -> Result<(), StoreError> {
        loop {
            let _one = self.writing.lock().await;
            let budgets: Vec<_> = {
                let mut hurried = lock(&self.hurried);
                let some: Vec<KeyId> = hurried.keys().take(CHUNK).copied().collect();
                some.into_iter().filter_map(|key| hurried.remove_entry(&key)).collect()
            };
            if budgets.is_empty() {
                return Ok(());
            }
            let drawn: HashMap<_, _> = budgets
                .into_iter()
                .filter_map(|(key, budget)| Some((key, (budget.clone(), budget.pending()?))))
                .collect();
            let spent = drawn.iter().map(|(key, (_, drawn))| (*key, *drawn)).collect();
            let batch = UsageBatch { spent, ..UsageBatch::default() };
            if let Err(error) = self.write(store, &batch, &drawn).await {
                lock(&self.hurried).extend(drawn.into_iter().map(|(key, (budget, _))| (key, budget)));
                return Err(error);
            }
        }
    }
}

/// Somebody waits for a flush, until this is dropped.
struct Urgent<'u>(&'u Usage);

impl<'u> Urgent<'u> {
    fn new(usage: &'u Usage) -> Self {
        usage.urgent.fetch_add(1, Ordering::SeqCst);
        usage.urged.notify_waiters();
        Urgent(usage)
    }
}

impl Drop for Urgent<'_> {
    fn drop(&mut self) {
        self.0.urgent.fetch_sub(1, Ordering::SeqCst);
    }
}

/// What is to be written of some keys.
fn batch(keys: &[(KeyId, Trace)]) -> UsageBatch {
    let mut batch = UsageBatch::default();
    for (key_id, trace) in keys {
        let key_id = *key_id;
        batch.used.extend(trace.used().map(|(version, at)| UsedSecret { key_id, version, at }));
        let counts = trace.counts();
        batch.counts.extend(counts.map(|(hour, reason, count)| Count { key_id, hour, reason, count }));
    }
    batch
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::decision::Reason;

    fn at(micros: i64) -> Timestamp {
        Timestamp::from_micros(micros)
    }

    fn key() -> KeyId {
        KeyId::generate(at(0), [3; 10])
    }

    #[test]
    fn the_latest_allowed_use_of_each_secret_counts() {
        let usage = Usage::default();
        let note = |version, reason, at| usage.note(Note { key: key(), at, version, reason }, None);
        note(1, Reason::Ok, at(5));
        note(1, Reason::Ok, at(4));
        note(2, Reason::Ok, at(9));
        note(3, Reason::Rotated, at(9));
        assert_eq!(usage.pending(key(), 1), Some(at(5)));
        assert_eq!(usage.pending(key(), 2), Some(at(9)));
        assert_eq!(usage.pending(key(), 3), None, "a denied Check is no use");
    }
}
