//! What Checks leave behind: when each secret was last used, how often each key was allowed and denied, which quotas
//! were drawn from. Noted in memory, written behind; what the store then says of quotas goes back to their budgets.
//!
//! Bounded: there is one entry for each key that was used since the last flush, and no more than
//! [`notes::MOST_KEYS`]; what comes beyond that is counted as dropped. A kill loses what was noted since the last
//! flush, five seconds at the most. Quotas that others draw from too cannot always wait so long: [`Usage::hurry`].

pub mod notes;

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::sync::{Notify, futures::Notified};

use crate::{
    domain::{limit::Drawn, name::KeyId, time::Timestamp},
    store::{Count, Store, StoreError, UsageBatch, UsedSecret},
};

use self::notes::{Note, Notes, Traces, lock};
use super::limiter::Budget;

/// Keys in one transaction: a flush must not hold up the writes between for long.
const CHUNK: usize = 500;
/// How long after a failure quotas are written again.
const DRAW_AGAIN: Duration = Duration::from_secs(1);

/// What the store does not have yet.
#[derive(Default)]
pub struct Usage {
    notes: Notes,
    dropped: AtomicU64,
    failures: AtomicU64,
    /// One flush at a time: what is being written must not be written twice.
    flush: tokio::sync::Mutex<()>,
    /// One write at a time: a budget's units must not be counted twice.
    writing: tokio::sync::Mutex<()>,
    hurried: Mutex<HashMap<KeyId, Arc<Budget>>>,
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
            self.notes.drew(note.key, budget);
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
    pub async fn flush(&self, store: &dyn Store) -> Result<(), StoreError> {
        let _one = self.flush.lock().await;
        for shelf in self.gathered().shelves() {
            for keys in shelf.take().chunks(CHUNK) {
                let _one = self.writing.lock().await;
                let (batch, drawn) = batch(&lock(&shelf.flushing), keys);
                self.write(store, &batch, &drawn).await?;
                let mut flushing = lock(&shelf.flushing);
                keys.iter().for_each(|key| drop(flushing.remove(key)));
            }
        }
        Ok(())
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

/// What is to be written of some keys, and the budgets that it is drawn from.
fn batch(traces: &Traces, keys: &[KeyId]) -> (UsageBatch, HashMap<KeyId, (Arc<Budget>, Drawn)>) {
    let (mut batch, mut all) = (UsageBatch::default(), HashMap::new());
    for (key_id, trace) in keys.iter().filter_map(|key| Some((*key, traces.get(key)?))) {
        batch.used.extend(trace.used().map(|(version, at)| UsedSecret { key_id, version, at }));
        let counts = trace.counts();
        batch.counts.extend(counts.map(|(hour, reason, count)| Count { key_id, hour, reason, count }));
        if let Some(budget) = trace.budget()
            && let Some(drawn) = budget.pending()
        {
            batch.spent.push((key_id, drawn));
            all.insert(key_id, (budget.clone(), drawn));
        }
    }
    (batch, all)
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
