//! Records committed changes that restrict rights.
//!
//! A change is compared with the index before it is applied there, by the rule that decides whether its caller waits
//! for other replicas.
//!
//! Only the process that made a change records it; changes of other replicas arrive through `apply_remote`. If the
//! outcome of a commit is unknown at first, the change is recognized when it arrives there.

use std::sync::{Arc, Mutex, PoisonError};

use crate::{
    domain::{
        log::{LogEntry, RecordChange},
        time::Revision,
    },
    engine::index::Index,
    store::{WriteRequest, group_commit::ChangeListener},
};

use super::{queue::DecisionLogState, record::DecisionRecord};

/// A listener that records restricting changes and then passes every change on.
pub(super) struct RestrictionListener {
    log: Arc<DecisionLogState>,
    inner: Arc<dyn ChangeListener>,
    index: Arc<Index>,
    /// Changes of this process with an unknown outcome: at most one batch.
    uncertain: Mutex<Vec<RecordChange>>,
}

impl RestrictionListener {
    pub(super) fn new(
        log: Arc<DecisionLogState>,
        inner: Arc<dyn ChangeListener>,
        index: Arc<Index>,
    ) -> RestrictionListener {
        RestrictionListener { log, inner, index, uncertain: Mutex::default() }
    }

    /// Records the changes that restrict rights.
    fn record_restrictions<'a>(&self, rows: impl Iterator<Item = &'a (LogEntry, RecordChange)>) {
        let mut earlier: Vec<&RecordChange> = Vec::new();
        for (row, change) in rows.filter(|(row, _)| row.revision > self.inner.applied_revision()) {
            if self.is_restriction(change, &earlier) {
                let now = self.log.clock.now();
                let id = self.log.ids.next_id().uuid(now.as_millis());
                self.log.enqueue(DecisionRecord::from_change(id, row, change));
            }
            earlier.push(change);
        }
    }

    /// Whether a change restricts rights. One batch may change a key twice, so earlier changes of the batch count.
    fn is_restriction(&self, change: &RecordChange, earlier: &[&RecordChange]) -> bool {
        let RecordChange::Key(key) = change else { return self.index.is_restriction(change) };
        let before = earlier.iter().rev().find_map(|change| match change {
            RecordChange::Key(before) if before.id == key.id => Some(before),
            _ => None,
        });
        before.map_or_else(|| self.index.is_restriction(change), |before| key.restricts(&**before))
    }

    fn lock_uncertain(&self) -> std::sync::MutexGuard<'_, Vec<RecordChange>> {
        self.uncertain.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ChangeListener for RestrictionListener {
    fn applied_revision(&self) -> Revision {
        self.inner.applied_revision()
    }

    fn apply_local(&self, rows: &[(LogEntry, RecordChange)]) {
        self.record_restrictions(rows.iter());
        self.inner.apply_local(rows);
    }

    fn apply_remote(&self, rows: &[(LogEntry, RecordChange)]) {
        let ours = {
            let uncertain = self.lock_uncertain();
            let is_ours = |row: &LogEntry, change: &RecordChange| {
                uncertain.iter().any(|change_made| change_made.clone().with_revision(row.revision) == *change)
            };
            rows.iter().filter(|(row, change)| is_ours(row, change)).collect::<Vec<_>>()
        };
        self.record_restrictions(ours.into_iter());
        self.inner.apply_remote(rows);
    }

    fn mark_uncertain(&self, write: &WriteRequest) {
        self.lock_uncertain().push(write.change.clone());
        self.inner.mark_uncertain(write);
    }

    fn resolve_uncertain(&self) {
        self.lock_uncertain().clear();
        self.inner.resolve_uncertain();
    }
}
