//! Removes the rows of dead replicas, so that no revoker waits for them.
//!
//! A row is dead if its count has not changed for four leases by one clock: its replica has been without a lease for at
//! least 2.5 leases. Wall clocks are not used, because a step would make live replicas look dead.

use super::{
    AllInvariants, AttemptId, BootInstant, Incarnation, InvariantSet, LeaseDuration, LeaseInvariant,
    ReplicaId, ReplicaListing, ReplicaRow,
};

/// What happens to a collector.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CollectorEvent {
    /// It is time: also the first event of all.
    Tick,
    /// The replicas' rows were read.
    Listed {
        /// The request that this responds to.
        attempt: AttemptId,
        /// The rows that were read.
        listing: ReplicaListing,
    },
    /// The rows could not be read.
    Failed {
        /// The request that this responds to.
        attempt: AttemptId,
    },
}

/// What a collector wants done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CollectorAction {
    /// Read the replicas' rows. Answer: `Listed` or `Failed`.
    ListRows {
        /// To name in the answer.
        attempt: AttemptId,
    },
    /// Delete this row if its count is still `renew_seq`, and log the removal. There is no response.
    RemoveRow {
        /// The replica whose row is dead.
        id: ReplicaId,
        /// The count that the row must still have.
        renew_seq: u64,
    },
}

#[derive(Clone, Copy, Debug)]
struct WatchedReplica {
    id: ReplicaId,
    renew_seq: u64,
    unchanged_since: BootInstant,
}

/// One process's watch over the rows. It begins with a [`CollectorEvent::Tick`].
#[derive(Debug)]
pub struct ReplicaCollector<R = AllInvariants> {
    invariants: R,
    lease: LeaseDuration,
    incarnation: Option<Incarnation>,
    watched: Vec<WatchedReplica>,
    pending_list: Option<AttemptId>,
    attempts: u64,
    next_list_at: BootInstant,
}

impl ReplicaCollector {
    /// A process that has read `lease` from the database.
    #[must_use]
    pub fn new(lease: LeaseDuration) -> Self {
        ReplicaCollector::with_invariants(AllInvariants, lease)
    }
}

impl<R: InvariantSet> ReplicaCollector<R> {
    /// One that keeps these rules only.
    #[must_use]
    pub fn with_invariants(rules: R, lease: LeaseDuration) -> Self {
        ReplicaCollector {
            invariants: rules,
            lease,
            incarnation: None,
            watched: Vec::new(),
            pending_list: None,
            attempts: 0,
            next_list_at: BootInstant::EXPIRED,
        }
    }

    /// When it wants a [`CollectorEvent::Tick`] at the latest.
    #[must_use]
    pub fn wake_at(&self) -> Option<BootInstant> {
        Some(self.next_list_at)
    }

    /// Handles an event that had arrived at `now`, and returns the actions.
    pub fn handle(&mut self, event: CollectorEvent, now: BootInstant) -> Vec<CollectorAction> {
        match event {
            CollectorEvent::Tick if now >= self.next_list_at => {
                // An answer that has not come by now is not waited for: the next reading is as good.
                self.attempts += 1;
                self.pending_list = Some(AttemptId(self.attempts));
                self.next_list_at = now.saturating_add(self.lease.collect_interval());
                vec![CollectorAction::ListRows { attempt: AttemptId(self.attempts) }]
            }
            CollectorEvent::Listed { attempt, listing } if self.pending_list == Some(attempt) => {
                self.pending_list = None;
                self.handle_listing(&listing, now)
            }
            CollectorEvent::Failed { attempt } if self.pending_list == Some(attempt) => {
                self.pending_list = None;
                Vec::new()
            }
            CollectorEvent::Tick | CollectorEvent::Listed { .. } | CollectorEvent::Failed { .. } => {
                Vec::new()
            }
        }
    }

    fn handle_listing(&mut self, listing: &ReplicaListing, now: BootInstant) -> Vec<CollectorAction> {
        self.lease = listing.longest_lease;
        if self.incarnation != Some(listing.incarnation) {
            // Counts of another incarnation mean nothing.
            self.incarnation = Some(listing.incarnation);
            self.watched.clear();
        }
        let watched = std::mem::take(&mut self.watched);
        self.watched = listing.rows.iter().map(|row| continue_watching(&watched, row, now)).collect();
        let dead = self.watched.iter().zip(&listing.rows).filter(|(watched, row)| {
            if self.invariants.enforces(LeaseInvariant::DeadAreWatched) {
                self.is_dead(watched, now)
            } else {
                let silent = listing.database_time.saturating_duration_since(row.last_seen);
                self.lease.dead_after().is_some_and(|wait| silent >= wait)
            }
        });
        dead.map(|(watched, _)| CollectorAction::RemoveRow { id: watched.id, renew_seq: watched.renew_seq })
            .collect()
    }

    fn is_dead(&self, watched: &WatchedReplica, now: BootInstant) -> bool {
        self.lease
            .dead_after()
            .is_some_and(|wait| now.saturating_duration_since(watched.unchanged_since) >= wait)
    }
}

/// Continues to watch a row from its last change.
fn continue_watching(watched: &[WatchedReplica], row: &ReplicaRow, now: BootInstant) -> WatchedReplica {
    let same = watched.iter().find(|watched| watched.id == row.id && watched.renew_seq == row.renew_seq);
    same.copied().unwrap_or(WatchedReplica { id: row.id, renew_seq: row.renew_seq, unchanged_since: now })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::time::{Revision, Timestamp};

    const ID: ReplicaId = ReplicaId(uuid::Uuid::nil());

    fn at(seconds: u64) -> BootInstant {
        BootInstant::from_nanos(seconds * 1_000_000_000)
    }

    fn listing(renew_seq: u64, incarnation: u128, longest: LeaseDuration) -> ReplicaListing {
        let last_seen = Timestamp::from_micros(0);
        // By the wall clock, the row is as old as can be.
        let db_now = Timestamp::MAX;
        let rows = vec![ReplicaRow { id: ID, applied: Some(Revision(3)), renew_seq, last_seen }];
        let incarnation = Incarnation(incarnation);
        ReplicaListing {
            rows,
            longest_lease: longest,
            incarnation,
            settled_incarnation: Some(incarnation),
            database_time: db_now,
        }
    }

    /// Lets it read this, at this time.
    fn read(collector: &mut ReplicaCollector, seconds: u64, listing: ReplicaListing) -> Vec<CollectorAction> {
        let actions = collector.handle(CollectorEvent::Tick, at(seconds));
        let [CollectorAction::ListRows { attempt }] = actions[..] else { panic!("{actions:?}") };
        collector.handle(CollectorEvent::Listed { attempt, listing }, at(seconds))
    }

    #[test]
    fn a_row_is_removed_after_having_stood_still_for_four_leases() {
        let mut collector = ReplicaCollector::new(LeaseDuration::STRICT);
        for seconds in [100, 103, 107, 119] {
            assert_eq!(read(&mut collector, seconds, listing(5, 1, LeaseDuration::STRICT)), []);
        }
        let removed = read(&mut collector, 122, listing(5, 1, LeaseDuration::STRICT));
        assert_eq!(removed, [CollectorAction::RemoveRow { id: ID, renew_seq: 5 }]);
    }

    #[test]
    fn a_renewal_starts_the_watch_again() {
        let mut collector = ReplicaCollector::new(LeaseDuration::STRICT);
        read(&mut collector, 100, listing(5, 1, LeaseDuration::STRICT));
        assert_eq!(read(&mut collector, 119, listing(6, 1, LeaseDuration::STRICT)), []);
        assert_eq!(read(&mut collector, 138, listing(6, 1, LeaseDuration::STRICT)), []);
        assert_eq!(read(&mut collector, 141, listing(6, 1, LeaseDuration::STRICT)).len(), 1);
    }

    #[test]
    fn rows_with_the_same_count_are_not_taken_for_each_other() {
        let mut collector = ReplicaCollector::new(LeaseDuration::STRICT);
        read(&mut collector, 100, listing(0, 1, LeaseDuration::STRICT));
        let mut other = listing(0, 1, LeaseDuration::STRICT);
        other.rows[0].id = ReplicaId(uuid::Uuid::max());
        assert_eq!(read(&mut collector, 122, other), []);
    }

    #[test]
    fn another_life_of_the_database_starts_the_watch_again() {
        let mut collector = ReplicaCollector::new(LeaseDuration::STRICT);
        read(&mut collector, 100, listing(5, 1, LeaseDuration::STRICT));
        assert_eq!(read(&mut collector, 200, listing(5, 2, LeaseDuration::STRICT)), []);
    }

    #[test]
    fn nobody_is_dead_who_may_hold_an_infinite_lease() {
        let mut collector = ReplicaCollector::new(LeaseDuration::STRICT);
        read(&mut collector, 100, listing(5, 1, LeaseDuration::STRICT));
        assert_eq!(read(&mut collector, 100_000, listing(5, 1, LeaseDuration::INFINITE)), []);
    }

    #[test]
    fn it_reads_now_and_then_and_only_the_newest_answer_counts() {
        let mut collector = ReplicaCollector::new(LeaseDuration::DEFAULT);
        assert_eq!(
            collector.handle(CollectorEvent::Tick, at(100)),
            [CollectorAction::ListRows { attempt: AttemptId(1) }]
        );
        assert_eq!(collector.handle(CollectorEvent::Tick, at(114)), []);
        assert_eq!(collector.wake_at(), Some(at(115)));
        assert_eq!(
            collector.handle(CollectorEvent::Tick, at(115)),
            [CollectorAction::ListRows { attempt: AttemptId(2) }]
        );
        let listed =
            |attempt| CollectorEvent::Listed { attempt, listing: listing(5, 1, LeaseDuration::STRICT) };
        assert_eq!(collector.handle(listed(AttemptId(1)), at(116)), [], "late");
        assert_eq!(collector.handle(listed(AttemptId(2)), at(117)), []);
        assert_eq!(read(&mut collector, 136, listing(5, 1, LeaseDuration::STRICT)), [], "watched since 117");
        assert_eq!(read(&mut collector, 139, listing(5, 1, LeaseDuration::STRICT)).len(), 1);
        assert_eq!(collector.handle(CollectorEvent::Failed { attempt: AttemptId(4) }, at(140)), []);
    }
}
