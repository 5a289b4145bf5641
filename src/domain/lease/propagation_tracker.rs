//! Tracks a restricting change after its commit, until no replica can allow what it restricted.
//!
//! The wait ends when every listed replica has acknowledged the change, or when every lease from before the commit has
//! expired.

use std::time::Duration;

use super::{
    AllInvariants, AttemptId, BootInstant, InvariantSet, LeaseDuration, LeaseInvariant, LogPosition,
    ReplicaId, ReplicaListing, ReplicaRow,
};
use crate::domain::{
    log::ChainHash,
    time::{Revision, Timestamp},
};

/// The wait between the first readings of the list: healthy replicas acknowledge within these. Then it doubles with each
/// that follows.
const FIRST_LIST_INTERVAL: Duration = Duration::from_millis(1);
const FIXED_INTERVAL_READINGS: u64 = 4;
/// The longest wait between two readings.
const MAX_LIST_INTERVAL: Duration = Duration::from_millis(250);
/// How long a reading may take.
const LIST_TIMEOUT: Duration = Duration::from_secs(2);

/// What happens to a revoker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PropagationEvent {
    /// It is time: also the first event of all.
    Tick,
    /// The replica rows were read, in a transaction that began after [`PropagationAction::ListRows`]. One read may
    /// serve every revoker that requested it before the transaction began.
    Listed {
        /// The request that this responds to.
        attempt: AttemptId,
        /// The rows that were read.
        listing: ReplicaListing,
        /// The log's link at the change's revision, from the same transaction; None = the log ends before.
        change_hash: Option<ChainHash>,
    },
    /// Every missing acknowledgment seems to have arrived: a hint to read the rows, and no proof.
    Hint,
    /// The rows could not be read.
    Failed {
        /// The request that this responds to.
        attempt: AttemptId,
    },
}

/// What a revoker wants done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PropagationAction {
    /// Read the replicas' rows. Answer: `Listed` or `Failed`.
    ListRows {
        /// To name in the answer.
        attempt: AttemptId,
    },
    /// It is over; the last action.
    Finish(PropagationOutcome),
}

/// The result of the wait.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PropagationOutcome {
    /// No Check that starts from now on can allow what was restricted.
    Complete(PropagationStatus),
    /// The change is not in the database any more: it has lost an acknowledged commit, or an older state was
    /// restored. It must be made again.
    Lost,
}

/// How far a change has come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PropagationStatus {
    /// The revision of the change.
    pub revision: Revision,
    /// Whether no replica can still allow what the change restricted.
    pub is_complete: bool,
    /// The replicas that have acknowledged it.
    pub acknowledged: Vec<ReplicaId>,
    /// The replicas that have not. When it is complete all the same, their leases have run out.
    pub unacknowledged: Vec<UnacknowledgedReplica>,
    /// The latest instant of completion, even if replicas are silent. None = completion depends on each replica to
    /// acknowledge, leave, or be attested dead.
    pub completes_by: Option<BootInstant>,
}

/// A replica that has not acknowledged a change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnacknowledgedReplica {
    /// The replica that is waited for.
    pub id: ReplicaId,
    /// When it renewed last, by the database's wall clock.
    pub last_seen: Timestamp,
    /// When its lease has run out at the latest. None = its lease is infinite.
    pub lease_expires_by: Option<BootInstant>,
}

/// One narrowing change's wait. It begins with a [`PropagationEvent::Tick`].
#[derive(Debug)]
pub struct PropagationTracker<R = AllInvariants> {
    invariants: R,
    change: LogPosition,
    /// The change was there already.
    is_retry: bool,
    /// When it was committed by.
    committed_by: BootInstant,
    /// The longest lease that was granted before the commit. None = no listing has arrived yet.
    longest_lease: Option<LeaseDuration>,
    completes_by: Option<BootInstant>,
    pending_list: Option<(AttemptId, BootInstant)>,
    attempts: u64,
    next_list_at: BootInstant,
    /// The rows are to be read as soon as no reading is under way.
    hinted: bool,
    list_interval: Duration,
    rows: Vec<ReplicaRow>,
    finished: bool,
}

impl PropagationTracker {
    /// For a change that is committed by `now`. It may have been committed just then, or long ago by another
    /// (`again`): a retry waits as the first did. `longest` was read in the commit's transaction or later.
    #[must_use]
    pub fn new(change: LogPosition, again: bool, longest: LeaseDuration, now: BootInstant) -> Self {
        PropagationTracker::with_invariants(AllInvariants, change, again, longest, now)
    }

    /// One that learns the longest lease from its first reading.
    #[must_use]
    pub fn with_unknown_lease(change: LogPosition, again: bool, now: BootInstant) -> Self {
        let revoker =
            PropagationTracker::with_invariants(AllInvariants, change, again, LeaseDuration::INFINITE, now);
        PropagationTracker { longest_lease: None, ..revoker }
    }
}

impl<R: InvariantSet> PropagationTracker<R> {
    /// One that keeps these rules only.
    #[must_use]
    pub fn with_invariants(
        rules: R,
        change: LogPosition,
        again: bool,
        longest: LeaseDuration,
        now: BootInstant,
    ) -> Self {
        let complete_by = completion_deadline(&rules, longest, now);
        PropagationTracker {
            invariants: rules,
            change,
            is_retry: again,
            committed_by: now,
            longest_lease: Some(longest),
            completes_by: complete_by,
            pending_list: None,
            attempts: 0,
            next_list_at: now,
            hinted: false,
            list_interval: FIRST_LIST_INTERVAL,
            rows: Vec::new(),
            finished: false,
        }
    }

    /// When it wants a [`PropagationEvent::Tick`] at the latest.
    #[must_use]
    pub fn wake_at(&self) -> Option<BootInstant> {
        let list_at =
            self.pending_list.map_or(self.next_list_at, |(_, sent)| sent.saturating_add(LIST_TIMEOUT));
        (!self.finished).then(|| self.completes_by.map_or(list_at, |by| by.min(list_at)))
    }

    /// The progress of propagation, by the newest listing.
    #[must_use]
    pub fn status(&self) -> PropagationStatus {
        let (confirmed, unconfirmed): (Vec<ReplicaRow>, Vec<ReplicaRow>) =
            self.rows.iter().copied().partition(|row| !self.is_blocking(row));
        PropagationStatus {
            revision: self.change.revision,
            is_complete: self.finished,
            // A replica without a lease has nothing to acknowledge.
            acknowledged: confirmed.iter().filter(|row| row.applied.is_some()).map(|row| row.id).collect(),
            unacknowledged: unconfirmed
                .iter()
                .map(|row| UnacknowledgedReplica {
                    id: row.id,
                    last_seen: row.last_seen,
                    lease_expires_by: self.completes_by,
                })
                .collect(),
            completes_by: self.completes_by,
        }
    }

    /// Handles an event that had arrived at `now`, and returns the actions.
    pub fn handle(&mut self, event: PropagationEvent, now: BootInstant) -> Vec<PropagationAction> {
        let mut out = Vec::new();
        if self.finished {
            return out;
        }
        match event {
            PropagationEvent::Tick => {}
            PropagationEvent::Hint => self.hinted = true,
            PropagationEvent::Listed { attempt, listing, change_hash: link } => {
                if self.take_pending(attempt, now) && self.handle_listing(listing, link, &mut out) {
                    return out;
                }
            }
            PropagationEvent::Failed { attempt } => {
                self.take_pending(attempt, now);
            }
        }
        if self.skips_wait() || self.completes_by.is_some_and(|by| now >= by) {
            self.finish(&mut out);
        } else {
            self.list_if_due(now, &mut out);
        }
        out
    }

    fn skips_wait(&self) -> bool {
        let first = !self.invariants.enforces(LeaseInvariant::RevokeWaits);
        let retry = self.is_retry && !self.invariants.enforces(LeaseInvariant::RetryWaits);
        first || retry
    }

    /// Takes a reading; whether that was the last.
    fn handle_listing(
        &mut self,
        listing: ReplicaListing,
        link: Option<ChainHash>,
        out: &mut Vec<PropagationAction>,
    ) -> bool {
        if link != Some(self.change.hash) {
            self.finished = true;
            out.push(PropagationAction::Finish(PropagationOutcome::Lost));
            return true;
        }
        if self.longest_lease.is_none() {
            self.longest_lease = Some(listing.longest_lease);
            self.completes_by =
                completion_deadline(&self.invariants, listing.longest_lease, self.committed_by);
        }
        let whole = listing.is_complete() || !self.invariants.enforces(LeaseInvariant::LostRowsAreWaitedOut);
        self.rows = listing.rows;
        let done = whole && !self.rows.iter().any(|row| self.is_blocking(row));
        if done {
            self.finish(out);
        }
        done
    }

    /// Whether this replica may hold a lease on a map without the change. A replica whose row has no `applied` gets its
    /// first lease from a later snapshot, which includes the change.
    fn is_blocking(&self, row: &ReplicaRow) -> bool {
        row.applied.is_some_and(|applied| applied < self.change.revision)
    }

    fn finish(&mut self, out: &mut Vec<PropagationAction>) {
        self.finished = true;
        out.push(PropagationAction::Finish(PropagationOutcome::Complete(self.status())));
    }

    fn list_if_due(&mut self, now: BootInstant, out: &mut Vec<PropagationAction>) {
        let stalled = self.pending_list.is_some_and(|(_, sent)| now >= sent.saturating_add(LIST_TIMEOUT));
        let due = now >= self.next_list_at || self.hinted;
        if stalled || self.pending_list.is_none() && due {
            self.hinted = false;
            self.attempts += 1;
            let attempt = AttemptId(self.attempts);
            self.pending_list = Some((attempt, now));
            out.push(PropagationAction::ListRows { attempt });
        }
    }

    /// Whether this attempt is the one under way; it is not from here on.
    fn take_pending(&mut self, attempt: AttemptId, now: BootInstant) -> bool {
        let is_it = self.pending_list.take_if(|(awaited, _)| *awaited == attempt).is_some();
        if is_it {
            self.next_list_at = now.saturating_add(self.list_interval);
            if self.attempts >= FIXED_INTERVAL_READINGS {
                self.list_interval = (self.list_interval * 2).min(MAX_LIST_INTERVAL);
            }
        }
        is_it
    }
}

/// When every lease of at most this length has run out that was granted before `since`.
fn completion_deadline(
    rules: &impl InvariantSet,
    longest: LeaseDuration,
    since: BootInstant,
) -> Option<BootInstant> {
    let wait = match rules.enforces(LeaseInvariant::DriftIsCovered) {
        true => longest.expiry_wait(),
        false => longest.length(),
    };
    wait.map(|wait| since.saturating_add(wait))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::lease::Incarnation;

    const D: Incarnation = Incarnation(1);

    fn at(millis: u64) -> BootInstant {
        BootInstant::from_nanos(millis * 1_000_000)
    }

    fn change() -> LogPosition {
        LogPosition { revision: Revision(8), hash: [8; 32] }
    }

    fn row(id: u128, applied: Option<u64>) -> ReplicaRow {
        let id = ReplicaId(uuid::Uuid::from_u128(id));
        ReplicaRow { id, applied: applied.map(Revision), renew_seq: 3, last_seen: Timestamp::from_micros(7) }
    }

    fn listing(rows: &[ReplicaRow]) -> ReplicaListing {
        ReplicaListing {
            rows: rows.to_vec(),
            longest_lease: LeaseDuration::STRICT,
            incarnation: D,
            settled_incarnation: Some(D),
            database_time: Timestamp::from_micros(9),
        }
    }

    /// A revoker of a change committed at 1 s, with its first reading under way.
    fn waiting(lease: LeaseDuration, again: bool) -> PropagationTracker {
        let mut revoker = PropagationTracker::new(change(), again, lease, at(1000));
        assert_eq!(
            revoker.handle(PropagationEvent::Tick, at(1000)),
            [PropagationAction::ListRows { attempt: AttemptId(1) }]
        );
        revoker
    }

    fn hear(
        revoker: &mut PropagationTracker,
        attempt: u64,
        listing: ReplicaListing,
        now: BootInstant,
    ) -> Vec<PropagationAction> {
        let link = Some(change().hash);
        revoker
            .handle(PropagationEvent::Listed { attempt: AttemptId(attempt), listing, change_hash: link }, now)
    }

    /// Delivers listings until the wait ends. Returns the end and the result.
    fn wait_out(
        revoker: &mut PropagationTracker,
        listing: &ReplicaListing,
        mut now: BootInstant,
    ) -> (BootInstant, PropagationStatus) {
        for attempt in 1.. {
            assert_eq!(hear(revoker, attempt, listing.clone(), now), []);
            now = revoker.wake_at().unwrap();
            match revoker.handle(PropagationEvent::Tick, now).remove(0) {
                PropagationAction::Finish(PropagationOutcome::Complete(report)) => return (now, report),
                PropagationAction::ListRows { .. } => {}
                other => panic!("{other:?}"),
            }
        }
        unreachable!("attempts have no end")
    }

    fn ids(rows: &[ReplicaRow]) -> Vec<ReplicaId> {
        rows.iter().map(|row| row.id).collect()
    }

    #[test]
    fn it_is_complete_when_all_have_acknowledged() {
        let mut revoker = waiting(LeaseDuration::DEFAULT, false);
        assert_eq!(hear(&mut revoker, 1, listing(&[row(1, Some(8)), row(2, Some(7))]), at(1001)), []);
        assert_eq!(revoker.status().unacknowledged[0].id, row(2, None).id);
        revoker.handle(PropagationEvent::Tick, at(1002));
        let rows = [row(1, Some(8)), row(2, Some(9))];
        let actions = hear(&mut revoker, 2, listing(&rows), at(1003));
        let [PropagationAction::Finish(PropagationOutcome::Complete(report))] = &actions[..] else {
            panic!("{actions:?}")
        };
        assert_eq!((report.is_complete, report.revision), (true, Revision(8)));
        assert_eq!((&report.acknowledged, &report.unacknowledged), (&ids(&rows), &vec![]));
        assert_eq!(revoker.wake_at(), None);
    }

    #[test]
    fn a_hint_brings_a_reading_and_nothing_else() {
        let mut revoker = waiting(LeaseDuration::STRICT, false);
        assert_eq!(revoker.handle(PropagationEvent::Hint, at(1000)), [], "one is under way");
        let lacking = listing(&[row(1, Some(7))]);
        assert_eq!(
            hear(&mut revoker, 1, lacking.clone(), at(1001)),
            [PropagationAction::ListRows { attempt: AttemptId(2) }]
        );
        assert_eq!(hear(&mut revoker, 2, lacking.clone(), at(1002)), []);
        assert_eq!(
            revoker.handle(PropagationEvent::Hint, at(1002)),
            [PropagationAction::ListRows { attempt: AttemptId(3) }]
        );
        assert_eq!(hear(&mut revoker, 3, lacking, at(1003)), []);
        assert!(!revoker.status().is_complete && revoker.wake_at() > Some(at(1003)));
    }

    #[test]
    fn without_acknowledgment_it_is_complete_when_every_lease_has_run_out_and_not_before() {
        for again in [false, true] {
            let mut revoker = waiting(LeaseDuration::STRICT, again);
            let rows = listing(&[row(1, Some(8)), row(2, Some(7))]);
            let (now, report) = wait_out(&mut revoker, &rows, at(1001));
            assert_eq!(now, at(1000 + 6250 + 50));
            assert_eq!(report.acknowledged, ids(&[row(1, None)]));
            let lease_ends_by = Some(now);
            let last_seen = Timestamp::from_micros(7);
            assert_eq!(
                report.unacknowledged,
                [UnacknowledgedReplica { id: row(2, None).id, last_seen, lease_expires_by: lease_ends_by }]
            );
        }
    }

    #[test]
    fn the_longest_lease_may_be_learnt_from_the_first_reading() {
        let mut revoker = PropagationTracker::with_unknown_lease(change(), false, at(1000));
        assert_eq!(
            revoker.handle(PropagationEvent::Tick, at(1000)),
            [PropagationAction::ListRows { attempt: AttemptId(1) }]
        );
        assert_eq!(revoker.status().completes_by, None);
        hear(&mut revoker, 1, listing(&[row(1, Some(7))]), at(3000));
        assert_eq!(revoker.status().completes_by, Some(at(1000 + 6250 + 50)), "counted from the commit");
    }

    #[test]
    fn a_nanosecond_before_the_wait_is_over_it_is_not() {
        let mut revoker = waiting(LeaseDuration::STRICT, false);
        let end = at(1000 + 6250 + 50);
        let just_before = end.saturating_sub(Duration::from_nanos(1));
        assert_eq!(
            revoker.handle(PropagationEvent::Tick, just_before),
            [PropagationAction::ListRows { attempt: AttemptId(2) }]
        );
        assert!(matches!(
            revoker.handle(PropagationEvent::Tick, end)[..],
            [PropagationAction::Finish(PropagationOutcome::Complete(_))]
        ));
    }

    #[test]
    fn an_infinite_lease_is_waited_for_for_ever() {
        let mut revoker = waiting(LeaseDuration::INFINITE, false);
        hear(&mut revoker, 1, listing(&[row(1, Some(7))]), at(1001));
        let a_year = at(365 * 86_400_000);
        assert!(matches!(
            revoker.handle(PropagationEvent::Tick, a_year)[..],
            [PropagationAction::ListRows { .. }]
        ));
        assert_eq!(revoker.status().completes_by, None);
        let actions = hear(&mut revoker, 2, listing(&[]), a_year);
        assert!(
            matches!(actions[..], [PropagationAction::Finish(PropagationOutcome::Complete(_))]),
            "its row is gone: {actions:?}"
        );
    }

    #[test]
    fn whoever_cannot_hold_a_lease_yet_is_not_waited_for() {
        let mut revoker = waiting(LeaseDuration::DEFAULT, false);
        let actions = hear(&mut revoker, 1, listing(&[row(1, Some(8)), row(2, None)]), at(1001));
        let [PropagationAction::Finish(PropagationOutcome::Complete(report))] = &actions[..] else {
            panic!("{actions:?}")
        };
        assert_eq!(report.acknowledged, ids(&[row(1, None)]));
    }

    #[test]
    fn while_rows_may_be_lost_only_time_helps() {
        let mut revoker = waiting(LeaseDuration::STRICT, false);
        let unsettled = ReplicaListing { incarnation: Incarnation(2), ..listing(&[row(1, Some(8))]) };
        let (now, _) = wait_out(&mut revoker, &unsettled, at(1001));
        assert_eq!(now, at(1000 + 6250 + 50));
    }

    #[test]
    fn a_change_that_the_database_has_lost_is_never_complete() {
        for link in [None, Some([9; 32])] {
            let mut revoker = waiting(LeaseDuration::STRICT, false);
            let listed =
                PropagationEvent::Listed { attempt: AttemptId(1), listing: listing(&[]), change_hash: link };
            assert_eq!(
                revoker.handle(listed, at(1001)),
                [PropagationAction::Finish(PropagationOutcome::Lost)]
            );
            assert_eq!(revoker.handle(PropagationEvent::Tick, at(99_000)), []);
        }
    }

    #[test]
    fn it_reads_often_at_first_and_less_often_later() {
        let mut revoker = waiting(LeaseDuration::DEFAULT, false);
        let mut now = at(1000);
        for (attempt, wait) in (1..).zip([1, 1, 1, 1, 2, 4, 8, 16, 32, 64, 128, 250, 250]) {
            assert_eq!(hear(&mut revoker, attempt, listing(&[row(1, Some(7))]), now), []);
            assert_eq!(revoker.wake_at(), Some(now.saturating_add(Duration::from_millis(wait))));
            now = revoker.wake_at().unwrap();
            assert_eq!(
                revoker.handle(PropagationEvent::Tick, now),
                [PropagationAction::ListRows { attempt: AttemptId(attempt + 1) }]
            );
        }
    }

    #[test]
    fn a_reading_that_stalls_or_fails_is_done_again_and_a_late_one_does_not_count() {
        let mut revoker = waiting(LeaseDuration::DEFAULT, false);
        assert_eq!(revoker.wake_at(), Some(at(3000)));
        assert_eq!(
            revoker.handle(PropagationEvent::Tick, at(3000)),
            [PropagationAction::ListRows { attempt: AttemptId(2) }]
        );
        assert_eq!(hear(&mut revoker, 1, listing(&[]), at(3001)), []);
        assert_eq!(revoker.handle(PropagationEvent::Failed { attempt: AttemptId(2) }, at(3002)), []);
        assert_eq!(
            revoker.handle(PropagationEvent::Tick, at(3003)),
            [PropagationAction::ListRows { attempt: AttemptId(3) }]
        );
    }
}
