//! The one way into the index. Changes come from this process's own commits, from renewals and from reading the log
//! at a hint, and may come twice; they go in once, in revision order, each linked by its hash to the one before.

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

/// How many of the newest links are remembered.
const MAX_RECENT_HASHES: usize = 4096;

/// Why changes did not go in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ApplyError {
    /// Nothing is loaded yet.
    NotLoaded,
    /// The changes between are missing.
    Gap,
    /// They are of another history than what the index holds.
    HistoryDiverged {
        /// What it holds.
        ours: LogPosition,
        /// The newest that came.
        head: Revision,
    },
}

#[derive(Default)]
struct ApplierState {
    position: Option<LogPosition>,
    /// The newest change of others that may take something away, until it is acknowledged.
    unacknowledged: Option<Revision>,
    recent_hashes: VecDeque<(Revision, ChainHash)>,
}

/// The index with its place in the history.
pub struct LogApplier {
    index: Arc<Index>,
    state: Mutex<ApplierState>,
    /// Where it is; nothing before the first snapshot.
    position: watch::Sender<Option<LogPosition>>,
    /// Where it was after the newest changes of others that somebody may wait for, and that did not come with a renewal.
    ack_requests: watch::Sender<Option<LogPosition>>,
    /// Another history was met where none was looked for.
    divergence: watch::Sender<Option<ApplyError>>,
}

impl std::fmt::Debug for LogApplier {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LogApplier").field("at", &*self.position.borrow()).finish_non_exhaustive()
    }
}

impl LogApplier {
    /// Over an index that nothing is loaded into.
    #[must_use]
    pub fn new(index: Arc<Index>) -> LogApplier {
        let (moved, ack_requests, divergence) = Default::default();
        LogApplier { index, state: Mutex::default(), position: moved, ack_requests, divergence }
    }

    fn lock_state(&self) -> MutexGuard<'_, ApplierState> {
        // The data is whole between any two statements that could panic: see `apply_sequence`.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The index.
    #[must_use]
    pub fn index(&self) -> &Arc<Index> {
        &self.index
    }

    /// Where it is.
    #[must_use]
    pub fn position(&self) -> Option<LogPosition> {
        self.lock_state().position
    }

    /// Tells where it is, each time that it moves.
    #[must_use]
    pub fn subscribe_position(&self) -> watch::Receiver<Option<LogPosition>> {
        self.position.subscribe()
    }

    /// Tells where it is, each time that it holds something new of others that is to be acknowledged at once.
    #[must_use]
    pub fn subscribe_ack_requests(&self) -> watch::Receiver<Option<LogPosition>> {
        self.ack_requests.subscribe()
    }

    /// Tells when this process's own commit has met another history.
    #[must_use]
    pub fn subscribe_divergence(&self) -> watch::Receiver<Option<ApplyError>> {
        self.divergence.subscribe()
    }

    /// Forgets everything: another snapshot is loaded. Nobody finds anything until then.
    pub fn reset(&self) {
        let mut state = self.lock_state();
        *state = ApplierState::default();
        self.index.clear();
        self.position.send_replace(None);
        self.ack_requests.send_replace(None);
        self.divergence.send_replace(None);
    }

    /// The snapshot is loaded, as of here.
    pub fn finish_load(&self, LogHead { revision, hash }: LogHead) {
        let mut state = self.lock_state();
        let at = LogPosition { revision, hash };
        state.set_position(at);
        self.index.finish_load(revision);
        self.position.send_replace(Some(at));
    }

    /// The log's link at a revision, if that is one of the newest.
    #[must_use]
    pub fn entry_hash(&self, revision: Revision) -> Option<ChainHash> {
        self.lock_state().entry_hash(revision)
    }

    /// Whether somebody may wait to hear that everything up to here is acknowledged. It is told once.
    #[must_use]
    pub fn take_due_ack(&self, up_to: Revision) -> bool {
        self.lock_state().unacknowledged.take_if(|unacked| *unacked <= up_to).is_some()
    }

    /// Takes changes of others that are in order; those that it has already do not count. Gives where it is then, and
    /// whether any was new.
    ///
    /// # Errors
    /// When they do not follow what it has. What followed up to there is in force.
    pub fn apply_entries(
        &self,
        entries: &[(LogEntry, RecordChange)],
    ) -> Result<(LogPosition, bool), ApplyError> {
        self.apply_sequence(entries, true)
    }

    fn apply_sequence(
        &self,
        entries: &[(LogEntry, RecordChange)],
        others: bool,
    ) -> Result<(LogPosition, bool), ApplyError> {
        let mut guard = self.lock_state();
        // Away while the index takes what it says: should that panic, nothing is known to be in force any more.
        let mut state = std::mem::take(&mut *guard);
        let (mut new, mut moved, mut error) = (0..0, false, None);
        for (place, (entry, _)) in entries.iter().enumerate() {
            match state.advance(entry, others) {
                Ok(true) if new.end == place => new.end += 1,
                Ok(true) => {
                    self.index.apply_local(&entries[new]);
                    new = place..place + 1;
                }
                Ok(false) => continue,
                Err(found) => {
                    error = Some(found);
                    break;
                }
            }
            moved = true;
        }
        // Those that follow each other go in at once: the index makes room once for all of them.
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

    /// The same, from rows as they were read.
    ///
    /// # Errors
    /// When a row cannot be read; inside, as [`LogApplier::take`].
    pub fn decode_and_apply(
        &self,
        entries: Vec<LogEntry>,
    ) -> Result<Result<(LogPosition, bool), ApplyError>, StoreError> {
        let entries = entries.into_iter().map(LogEntry::decode_change).collect::<Result<Vec<_>, _>>();
        entries
            .map(|entries| self.apply_entries(&entries))
            .map_err(|error| StoreError::Damaged(error.to_string()))
    }

    /// The same of rows that no renewal brought. What may take something away is to be acknowledged at once: somebody waits
    /// for that. For the rest there is time until the next renewal.
    ///
    /// # Errors
    /// As [`LogApplier::decode_and_apply`].
    pub fn apply_and_request_ack(
        &self,
        entries: Vec<LogEntry>,
    ) -> Result<Result<LogPosition, ApplyError>, StoreError> {
        Ok(self.decode_and_apply(entries)?.map(|(at, moved)| self.request_ack(at, moved)))
    }

    /// What changes that do not fit mean to the machine.
    pub(super) fn divergence_event(&self, error: ApplyError) -> Option<ReplicaEvent> {
        let ours = self.position()?;
        let head = match error {
            ApplyError::HistoryDiverged { head, .. } => head,
            // What came between is missing, or cannot be read: the map cannot be trusted to be whole any more.
            ApplyError::Gap => ours.revision,
            ApplyError::NotLoaded => return None,
        };
        Some(ReplicaEvent::Diverged { local_position: ours, head })
    }

    fn report_divergence(&self, error: ApplyError) {
        tracing::error!(broken = ?error, "changes that were committed do not follow what this process holds");
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
    /// Goes on to an entry that follows; one that is known already is none.
    fn advance(&mut self, entry: &LogEntry, others: bool) -> Result<bool, ApplyError> {
        let at = self.position.ok_or(ApplyError::NotLoaded)?;
        let other = ApplyError::HistoryDiverged { ours: at, head: entry.revision };
        if entry.revision <= at.revision {
            // Links that are long past are not remembered.
            return match self.entry_hash(entry.revision) {
                Some(hash) if hash != entry.hash => Err(other),
                _ => Ok(false),
            };
        }
        if entry.revision > at.revision.next() {
            return Err(ApplyError::Gap);
        }
        // What this process has just made of what the database ended with needs no second look at its own hash.
        let follows = if others { entry.follows(at.revision, &at.hash) } else { entry.prev_hash == at.hash };
        if !follows {
            return Err(other);
        }
        self.set_position(LogPosition { revision: entry.revision, hash: entry.hash });
        if others && entry.may_restrict() {
            self.unacknowledged = Some(entry.revision);
        }
        Ok(true)
    }

    /// They follow each other without a gap.
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
