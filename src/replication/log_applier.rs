//! Applies log entries to the index; nothing else changes it after the load.
//!
//! Entries come from own commits, from renewals and from tailing the log, and may come twice. They are applied once, in
//! revision order, and each must be linked by its hash to the one before.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::watch;

use crate::{
    domain::{
        lease::{LogPosition, replica::ReplicaEvent},
        log::{ChainHash, LogEntry, RecordChange},
        time::Revision,
    },
    engine::index::Index,
    store::{LogHead, StoreError, WriteRequest, group_commit::ChangeListener},
};

/// How many of the newest entries' hashes are kept.
const MAX_RECENT_HASHES: usize = 4096;

/// Why entries were not applied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ApplyError {
    /// No snapshot is loaded yet.
    NotLoaded,
    /// Entries between these and the applied ones are missing.
    Gap,
    /// The entries belong to another history than the applied ones.
    HistoryDiverged {
        /// The position of the index.
        ours: LogPosition,
        /// The newest entry that was received.
        head: Revision,
    },
}

#[derive(Default)]
struct ApplierState {
    position: Option<LogPosition>,
    /// The newest entry of another process that may be a restriction, until it is acknowledged.
    unacknowledged: Option<Revision>,
    recent_hashes: VecDeque<(Revision, ChainHash)>,
}

/// The index and its position in the log.
pub struct LogApplier {
    index: Arc<Index>,
    state: Mutex<ApplierState>,
    /// The position of the index; `None` before the first snapshot.
    position: watch::Sender<Option<LogPosition>>,
    /// The position after the newest entries of others that may be restrictions and did not come with a renewal.
    ack_requests: watch::Sender<Option<LogPosition>>,
    /// The error with which an own commit, or a change applied after it, met another history.
    divergence: watch::Sender<Option<ApplyError>>,
}

impl std::fmt::Debug for LogApplier {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LogApplier").field("at", &*self.position.borrow()).finish_non_exhaustive()
    }
}

impl LogApplier {
    /// Starts without a position: nothing is loaded into the index yet.
    #[must_use]
    pub(crate) fn new(index: Arc<Index>) -> LogApplier {
        let (moved, ack_requests, divergence) = Default::default();
        LogApplier { index, state: Mutex::default(), position: moved, ack_requests, divergence }
    }

    fn lock_state(&self) -> MutexGuard<'_, ApplierState> {
        // The data is consistent between any two statements that could panic: see `apply_sequence`.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The index that the entries are applied to.
    #[must_use]
    pub(crate) fn index(&self) -> &Arc<Index> {
        &self.index
    }

    /// The position of the index in the log.
    #[must_use]
    pub(crate) fn position(&self) -> Option<LogPosition> {
        self.lock_state().position
    }

    /// Observes the position of the index.
    #[must_use]
    pub(crate) fn subscribe_position(&self) -> watch::Receiver<Option<LogPosition>> {
        self.position.subscribe()
    }

    /// Observes the positions that must be acknowledged at once.
    #[must_use]
    pub(crate) fn subscribe_ack_requests(&self) -> watch::Receiver<Option<LogPosition>> {
        self.ack_requests.subscribe()
    }

    /// Observes the errors of own commits that met another history.
    #[must_use]
    pub(crate) fn subscribe_divergence(&self) -> watch::Receiver<Option<ApplyError>> {
        self.divergence.subscribe()
    }

    /// Clears the index before another snapshot is loaded. Until then nothing is found.
    pub(crate) fn reset(&self) {
        let mut state = self.lock_state();
        *state = ApplierState::default();
        self.index.clear();
        self.position.send_replace(None);
        self.ack_requests.send_replace(None);
        self.divergence.send_replace(None);
    }

    /// Sets the position of the snapshot that was loaded.
    pub(crate) fn finish_load(&self, LogHead { revision, hash }: LogHead) {
        let mut state = self.lock_state();
        let at = LogPosition { revision, hash };
        state.set_position(at);
        self.index.finish_load(revision);
        self.position.send_replace(Some(at));
    }

    /// The hash of an entry, if it is one of the newest.
    #[must_use]
    pub(crate) fn entry_hash(&self, revision: Revision) -> Option<ChainHash> {
        self.lock_state().entry_hash(revision)
    }

    /// Returns whether an acknowledgment up to this revision may be awaited. Each is returned once.
    #[must_use]
    pub(crate) fn take_due_ack(&self, up_to: Revision) -> bool {
        self.lock_state().unacknowledged.take_if(|unacked| *unacked <= up_to).is_some()
    }

    /// Applies consecutive entries of other processes; those already applied are skipped. Returns the new position, and
    /// whether any entry was new.
    ///
    /// # Errors
    /// An entry does not follow its predecessor. Those before it are applied.
    pub(crate) fn apply_entries(
        &self,
        entries: &[(LogEntry, RecordChange)],
    ) -> Result<(LogPosition, bool), ApplyError> {
        self.apply_sequence(entries, true)
    }

    fn apply_sequence(
        &self,
        entries: &[(LogEntry, RecordChange)],
        from_others: bool,
    ) -> Result<(LogPosition, bool), ApplyError> {
        let mut guard = self.lock_state();
        // Taken out while the index applies the entries: after a panic, nothing counts as applied.
        let mut state = std::mem::take(&mut *guard);
        let (mut new, mut moved, mut error) = (0..0, false, None);
        for (offset, (entry, _)) in entries.iter().enumerate() {
            match state.advance(entry, from_others) {
                Ok(true) if new.end == offset => new.end += 1,
                Ok(true) => {
                    self.index.apply_local(&entries[new]);
                    new = offset..offset + 1;
                }
                Ok(false) => continue,
                Err(found) => {
                    error = Some(found);
                    break;
                }
            }
            moved = true;
        }
        // Consecutive entries are applied together, so that the index publishes new keys block by block.
        self.index.apply_local(&entries[new]);
        let at = state.position;
        *guard = state;
        if let Some(error) = error {
            return Err(error);
        }
        let at = at.ok_or(ApplyError::NotLoaded)?;
        if moved {
            self.position.send_replace(Some(at));
        }
        Ok((at, moved))
    }

    /// Like [`LogApplier::apply_entries`], for entries that are not decoded yet.
    ///
    /// # Errors
    /// An entry is damaged; the inner error is that of [`LogApplier::apply_entries`].
    pub(crate) fn decode_and_apply(
        &self,
        entries: Vec<LogEntry>,
    ) -> Result<Result<(LogPosition, bool), ApplyError>, StoreError> {
        let entries = entries.into_iter().map(LogEntry::decode_change).collect::<Result<Vec<_>, _>>();
        entries
            .map(|entries| self.apply_entries(&entries))
            .map_err(|error| StoreError::Damaged(error.to_string()))
    }

    /// Like [`LogApplier::decode_and_apply`], for entries that did not come with a renewal. If they may be a
    /// restriction, requests an acknowledgment at once, because a caller may be waiting.
    ///
    /// # Errors
    /// As [`LogApplier::decode_and_apply`].
    pub(crate) fn apply_and_request_ack(
        &self,
        entries: Vec<LogEntry>,
    ) -> Result<Result<LogPosition, ApplyError>, StoreError> {
        Ok(self.decode_and_apply(entries)?.map(|(at, moved)| self.request_ack(at, moved)))
    }

    /// The event for the replica's state machine; `None` if no snapshot is loaded.
    pub(super) fn divergence_event(&self, error: ApplyError) -> Option<ReplicaEvent> {
        let ours = self.position()?;
        let head = match error {
            ApplyError::HistoryDiverged { head, .. } => head,
            // Entries are missing or unreadable: the index may be incomplete.
            ApplyError::Gap => ours.revision,
            ApplyError::NotLoaded => return None,
        };
        Some(ReplicaEvent::Diverged { local_position: ours, head })
    }

    fn report_divergence(&self, error: ApplyError) {
        tracing::error!(broken = ?error, "committed changes do not follow the state of this process");
        self.divergence.send_replace(Some(error));
    }

    fn request_ack(&self, at: LogPosition, moved: bool) -> LogPosition {
        if moved && self.lock_state().unacknowledged.is_some() {
            self.ack_requests.send_replace(Some(at));
        }
        at
    }
}

impl ApplierState {
    /// Advances to the next entry. Returns false for an entry that is already applied.
    fn advance(&mut self, entry: &LogEntry, from_others: bool) -> Result<bool, ApplyError> {
        let at = self.position.ok_or(ApplyError::NotLoaded)?;
        let other = ApplyError::HistoryDiverged { ours: at, head: entry.revision };
        if entry.revision <= at.revision {
            // The hashes of old entries are not kept.
            return match self.entry_hash(entry.revision) {
                Some(hash) if hash != entry.hash => Err(other),
                _ => Ok(false),
            };
        }
        if entry.revision > at.revision.next() {
            return Err(ApplyError::Gap);
        }
        // The writer has just computed the hash of an own entry from its predecessor, so it is not verified again.
        let follows =
            if from_others { entry.follows(at.revision, &at.hash) } else { entry.prev_hash == at.hash };
        if !follows {
            return Err(other);
        }
        self.set_position(LogPosition { revision: entry.revision, hash: entry.hash });
        if from_others && entry.may_restrict() {
            self.unacknowledged = Some(entry.revision);
        }
        Ok(true)
    }

    /// The kept hashes are consecutive.
    fn entry_hash(&self, revision: Revision) -> Option<ChainHash> {
        let back = usize::try_from(self.position?.revision.0.checked_sub(revision.0)?).ok()?;
        let at = self.recent_hashes.len().checked_sub(back + 1)?;
        self.recent_hashes.get(at).map(|(_, hash)| *hash)
    }

    fn set_position(&mut self, at: LogPosition) {
        self.position = Some(at);
        if self.recent_hashes.len() == MAX_RECENT_HASHES {
            self.recent_hashes.pop_front();
        }
        self.recent_hashes.push_back((at.revision, at.hash));
    }
}

impl ChangeListener for LogApplier {
    fn applied_revision(&self) -> Revision {
        self.position().unwrap_or(LogPosition::START).revision
    }

    fn apply_local(&self, entries: &[(LogEntry, RecordChange)]) {
        if let Err(error) = self.apply_sequence(entries, false) {
            self.report_divergence(error);
        }
    }

    fn apply_remote(&self, entries: &[(LogEntry, RecordChange)]) {
        match self.apply_entries(entries) {
            Ok((at, moved)) => drop(self.request_ack(at, moved)),
            Err(error) => self.report_divergence(error),
        }
    }

    fn mark_uncertain(&self, write: &WriteRequest) {
        self.index.mark_uncertain(write);
    }

    fn resolve_uncertain(&self) {
        self.index.resolve_uncertain();
    }
}
