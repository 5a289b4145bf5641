//! The collector: removes the rows of replicas that are dead, so that nobody waits for them.
//!
//! A row is dead when its count has stood still, watched by one clock, for four leases: its replica has not
//! renewed, so it has been without a lease for at least two and a half. No wall clock is asked: a step of it
//! would make the living look dead.

use super::{Attempt, Boottime, Incarnation, Kept, Lease, Listing, ReplicaId, Row, Rule, Rules};

/// What happens to a collector.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// It is time: also the first event of all.
    Tick,
    /// The replicas' rows were read.
    Listed {
        /// Of the request.
        attempt: Attempt,
        /// What was read.
        listing: Listing,
    },
    /// The reading failed.
    Failed {
        /// Of the request.
        attempt: Attempt,
    },
}

/// What a collector wants done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Read the replicas' rows. Answer: `Listed` or `Failed`.
    List {
        /// To name in the answer.
        attempt: Attempt,
    },
    /// Delete this row if its count still is `renew_seq`, and log who was removed. There is no answer.
    Remove {
        /// The row.
        id: ReplicaId,
        /// Its count.
        renew_seq: u64,
    },
}

#[derive(Clone, Copy, Debug)]
struct Watched {
    id: ReplicaId,
    renew_seq: u64,
    since: Boottime,
}

/// One process's watch over the rows. It begins with a [`Event::Tick`].
#[derive(Debug)]
pub struct Collector<R = Kept> {
    rules: R,
    lease: Lease,
    incarnation: Option<Incarnation>,
    watched: Vec<Watched>,
    request: Option<Attempt>,
    attempts: u64,
    list_at: Boottime,
}

impl Collector {
    /// A process that has read `lease` from the database.
    #[must_use]
    pub fn new(lease: Lease) -> Self {
        Collector::with_rules(Kept, lease)
    }
}

impl<R: Rules> Collector<R> {
    /// One that keeps these rules only.
    #[must_use]
    pub fn with_rules(rules: R, lease: Lease) -> Self {
        Collector {
            rules,
            lease,
            incarnation: None,
            watched: Vec::new(),
            request: None,
            attempts: 0,
            list_at: Boottime::PASSED,
        }
    }

    /// When it wants a [`Event::Tick`] at the latest.
    #[must_use]
    pub fn wake_at(&self) -> Option<Boottime> {
        Some(self.list_at)
    }

    /// Takes an event that was at hand at `now`; gives what is to be done.
    pub fn on(&mut self, event: Event, now: Boottime) -> Vec<Action> {
        match event {
            Event::Tick if now >= self.list_at => {
                // An answer that has not come by now is not waited for: the next reading is as good.
                self.attempts += 1;
                self.request = Some(Attempt(self.attempts));
                self.list_at = now.plus(self.lease.collect_every());
                vec![Action::List { attempt: Attempt(self.attempts) }]
            }
            Event::Listed { attempt, listing } if self.request == Some(attempt) => {
                self.request = None;
                self.listed(&listing, now)
            }
            Event::Failed { attempt } if self.request == Some(attempt) => {
                self.request = None;
                Vec::new()
            }
            Event::Tick | Event::Listed { .. } | Event::Failed { .. } => Vec::new(),
        }
    }

    fn listed(&mut self, listing: &Listing, now: Boottime) -> Vec<Action> {
        self.lease = listing.longest;
        if self.incarnation != Some(listing.incarnation) {
            // Counts of another life of the database say nothing.
            self.incarnation = Some(listing.incarnation);
            self.watched.clear();
        }
        let watched = std::mem::take(&mut self.watched);
        self.watched = listing.rows.iter().map(|row| watch(&watched, row, now)).collect();
        let dead = self.watched.iter().zip(&listing.rows).filter(|(watched, row)| {
            if self.rules.keep(Rule::DeadAreWatched) {
                self.is_dead(watched, now)
            } else {
                let silent = listing.db_now.since(row.last_seen);
                self.lease.dead_after().is_some_and(|wait| silent >= wait)
            }
        });
        dead.map(|(watched, _)| Action::Remove { id: watched.id, renew_seq: watched.renew_seq }).collect()
    }

    fn is_dead(&self, watched: &Watched, now: Boottime) -> bool {
        self.lease.dead_after().is_some_and(|wait| now.since(watched.since) >= wait)
    }
}

/// Goes on watching a row, from its last change.
fn watch(watched: &[Watched], row: &Row, now: Boottime) -> Watched {
    let same = watched.iter().find(|watched| watched.id == row.id && watched.renew_seq == row.renew_seq);
    same.copied().unwrap_or(Watched { id: row.id, renew_seq: row.renew_seq, since: now })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::time::{Revision, Timestamp};

    const ID: ReplicaId = ReplicaId(uuid::Uuid::nil());

    fn at(seconds: u64) -> Boottime {
        Boottime::from_nanos(seconds * 1_000_000_000)
    }

    fn listing(renew_seq: u64, incarnation: u128, longest: Lease) -> Listing {
        let last_seen = Timestamp::from_micros(0);
        // By the wall clock, the row is as old as can be.
        let db_now = Timestamp::MAX;
        let rows = vec![Row { id: ID, applied: Some(Revision(3)), renew_seq, last_seen }];
        let incarnation = Incarnation(incarnation);
        Listing { rows, longest, incarnation, settled: Some(incarnation), db_now }
    }

    /// Lets it read this, at this time.
    fn read(collector: &mut Collector, seconds: u64, listing: Listing) -> Vec<Action> {
        let asked = collector.on(Event::Tick, at(seconds));
        let [Action::List { attempt }] = asked[..] else { panic!("{asked:?}") };
        collector.on(Event::Listed { attempt, listing }, at(seconds))
    }

    #[test]
    fn a_row_is_removed_after_having_stood_still_for_four_leases() {
        let mut collector = Collector::new(Lease::STRICT);
        for seconds in [100, 103, 107, 119] {
            assert_eq!(read(&mut collector, seconds, listing(5, 1, Lease::STRICT)), []);
        }
        let removed = read(&mut collector, 122, listing(5, 1, Lease::STRICT));
        assert_eq!(removed, [Action::Remove { id: ID, renew_seq: 5 }]);
    }

    #[test]
    fn a_renewal_starts_the_watch_again() {
        let mut collector = Collector::new(Lease::STRICT);
        read(&mut collector, 100, listing(5, 1, Lease::STRICT));
        assert_eq!(read(&mut collector, 119, listing(6, 1, Lease::STRICT)), []);
        assert_eq!(read(&mut collector, 138, listing(6, 1, Lease::STRICT)), []);
        assert_eq!(read(&mut collector, 141, listing(6, 1, Lease::STRICT)).len(), 1);
    }

    #[test]
    fn rows_with_the_same_count_are_not_taken_for_each_other() {
        let mut collector = Collector::new(Lease::STRICT);
        read(&mut collector, 100, listing(0, 1, Lease::STRICT));
        let mut other = listing(0, 1, Lease::STRICT);
        other.rows[0].id = ReplicaId(uuid::Uuid::max());
        assert_eq!(read(&mut collector, 122, other), []);
    }

    #[test]
    fn another_life_of_the_database_starts_the_watch_again() {
        let mut collector = Collector::new(Lease::STRICT);
        read(&mut collector, 100, listing(5, 1, Lease::STRICT));
        assert_eq!(read(&mut collector, 200, listing(5, 2, Lease::STRICT)), []);
    }

    #[test]
    fn nobody_is_dead_who_may_hold_an_infinite_lease() {
        let mut collector = Collector::new(Lease::STRICT);
        read(&mut collector, 100, listing(5, 1, Lease::STRICT));
        assert_eq!(read(&mut collector, 100_000, listing(5, 1, Lease::STATIC)), []);
    }

    #[test]
    fn it_reads_now_and_then_and_only_the_newest_answer_counts() {
        let mut collector = Collector::new(Lease::DEFAULT);
        assert_eq!(collector.on(Event::Tick, at(100)), [Action::List { attempt: Attempt(1) }]);
        assert_eq!(collector.on(Event::Tick, at(114)), []);
        assert_eq!(collector.wake_at(), Some(at(115)));
        assert_eq!(collector.on(Event::Tick, at(115)), [Action::List { attempt: Attempt(2) }]);
        let listed = |attempt| Event::Listed { attempt, listing: listing(5, 1, Lease::STRICT) };
        assert_eq!(collector.on(listed(Attempt(1)), at(116)), [], "late");
        assert_eq!(collector.on(listed(Attempt(2)), at(117)), []);
        assert_eq!(read(&mut collector, 136, listing(5, 1, Lease::STRICT)), [], "watched since 117");
        assert_eq!(read(&mut collector, 139, listing(5, 1, Lease::STRICT)).len(), 1);
        assert_eq!(collector.on(Event::Failed { attempt: Attempt(4) }, at(140)), []);
    }
}
