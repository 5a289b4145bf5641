//! The revoker: after a narrowing change has been committed, waits until no replica can allow what was
//! narrowed.
//!
//! It is over when every replica on the list has acknowledged the change, or, whatever the list says, when
//! every lease that was granted before the commit has run out.

use std::time::Duration;

use super::{Attempt, Boottime, Kept, Lease, Listing, Position, ReplicaId, Row, Rule, Rules};
use crate::domain::{
    log::Hash,
    time::{Revision, Timestamp},
};

/// The wait between the first readings of the list: healthy replicas acknowledge within these. Then it doubles with each
/// that follows.
const FIRST_WAIT: Duration = Duration::from_millis(1);
const FIRST_READINGS: u64 = 4;
/// The longest wait between two readings.
const LONGEST_WAIT: Duration = Duration::from_millis(250);
/// How long a reading may take.
const TIMEOUT: Duration = Duration::from_secs(2);

/// What happens to a revoker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// It is time: also the first event of all.
    Tick,
    /// The replicas' rows were read, in a transaction begun after [`Action::List`]. One reading may serve every
    /// revoker that had asked before it was begun.
    Listed {
        /// Of the request.
        attempt: Attempt,
        /// What was read.
        listing: Listing,
        /// The log's link at the change's revision, from the same transaction; None = the log ends before.
        link: Option<Hash>,
    },
    /// All whose acknowledgment is lacking seem to have given it: a reason to read the rows, and none to believe it.
    Hint,
    /// The reading failed.
    Failed {
        /// Of the request.
        attempt: Attempt,
    },
}

/// What a revoker wants done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Read the replicas' rows. Answer: `Listed` or `Failed`.
    List {
        /// To name in the answer.
        attempt: Attempt,
    },
    /// It is over; the last action.
    Return(Outcome),
}

/// How it ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// No Check that starts from now on allows what was narrowed.
    Complete(Propagation),
    /// The change is not in the database any more: it has lost an acknowledged commit, or an older state was
    /// restored. It must be made again.
    Lost,
}

/// How far a change has come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Propagation {
    /// The change.
    pub revision: Revision,
    /// Whether no replica can allow any more what it narrowed.
    pub complete: bool,
    /// The replicas that have acknowledged it.
    pub confirmed: Vec<ReplicaId>,
    /// The replicas that have not. When it is complete all the same, their leases have run out.
    pub unconfirmed: Vec<Unconfirmed>,
    /// When it will be complete at the latest, whoever is silent. None = not before all of them have spoken,
    /// have left, or are attested dead.
    pub complete_by: Option<Boottime>,
}

/// A replica that has not acknowledged a change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unconfirmed {
    /// Which.
    pub replica: ReplicaId,
    /// When it renewed last, by the database's wall clock.
    pub last_seen: Timestamp,
    /// When its lease has run out at the latest. None = its lease is infinite.
    pub lease_ends_by: Option<Boottime>,
}

/// One narrowing change's wait. It begins with a [`Event::Tick`].
#[derive(Debug)]
pub struct Revoker<R = Kept> {
    rules: R,
    change: Position,
    /// The change was there already.
    again: bool,
    /// When it was committed by.
    since: Boottime,
    /// The longest lease that was granted before. None = no reading has told yet.
    longest: Option<Lease>,
    complete_by: Option<Boottime>,
    request: Option<(Attempt, Boottime)>,
    attempts: u64,
    list_at: Boottime,
    /// The rows are to be read as soon as no reading is under way.
    hinted: bool,
    wait: Duration,
    rows: Vec<Row>,
    returned: bool,
}

impl Revoker {
    /// For a change that is committed by `now`. It may have been committed just then, or long ago by another
    /// (`again`): a retry waits as the first did. `longest` was read in the commit's transaction or later.
    #[must_use]
    pub fn new(change: Position, again: bool, longest: Lease, now: Boottime) -> Self {
        Revoker::with_rules(Kept, change, again, longest, now)
    }

    /// One that learns the longest lease from its first reading.
    #[must_use]
    pub fn after(change: Position, again: bool, now: Boottime) -> Self {
        let revoker = Revoker::with_rules(Kept, change, again, Lease::STATIC, now);
        Revoker { longest: None, ..revoker }
    }
}

impl<R: Rules> Revoker<R> {
    /// One that keeps these rules only.
    #[must_use]
    pub fn with_rules(rules: R, change: Position, again: bool, longest: Lease, now: Boottime) -> Self {
        let complete_by = complete_by(&rules, longest, now);
        Revoker {
            rules,
            change,
            again,
            since: now,
            longest: Some(longest),
            complete_by,
            request: None,
            attempts: 0,
            list_at: now,
            hinted: false,
            wait: FIRST_WAIT,
            rows: Vec::new(),
            returned: false,
        }
    }

    /// When it wants a [`Event::Tick`] at the latest.
    #[must_use]
    pub fn wake_at(&self) -> Option<Boottime> {
        let list_at = self.request.map_or(self.list_at, |(_, sent)| sent.plus(TIMEOUT));
        (!self.returned).then(|| self.complete_by.map_or(list_at, |by| by.min(list_at)))
    }

    /// How far the change has come, as the newest reading says.
    #[must_use]
    pub fn propagation(&self) -> Propagation {
        let (confirmed, unconfirmed): (Vec<Row>, Vec<Row>) =
            self.rows.iter().copied().partition(|row| !self.blocks(row));
        Propagation {
            revision: self.change.revision,
            complete: self.returned,
            // Whoever holds no lease yet has nothing to confirm.
            confirmed: confirmed.iter().filter(|row| row.applied.is_some()).map(|row| row.id).collect(),
            unconfirmed: unconfirmed
                .iter()
                .map(|row| Unconfirmed {
                    replica: row.id,
                    last_seen: row.last_seen,
                    lease_ends_by: self.complete_by,
                })
                .collect(),
            complete_by: self.complete_by,
        }
    }

    /// Takes an event that was at hand at `now`; gives what is to be done.
    pub fn on(&mut self, event: Event, now: Boottime) -> Vec<Action> {
        let mut out = Vec::new();
        if self.returned {
            return out;
        }
        match event {
            Event::Tick => {}
            Event::Hint => self.hinted = true,
            Event::Listed { attempt, listing, link } => {
                if self.answered(attempt, now) && self.listed(listing, link, &mut out) {
                    return out;
                }
            }
            Event::Failed { attempt } => {
                self.answered(attempt, now);
            }
        }
        if self.need_not_wait() || self.complete_by.is_some_and(|by| now >= by) {
            self.complete(&mut out);
        } else {
            self.list_again(now, &mut out);
        }
        out
    }

    fn need_not_wait(&self) -> bool {
        let first = !self.rules.keep(Rule::RevokeWaits);
        let retry = self.again && !self.rules.keep(Rule::RetryWaits);
        first || retry
    }

    /// Takes a reading; whether that was the last.
    fn listed(&mut self, listing: Listing, link: Option<Hash>, out: &mut Vec<Action>) -> bool {
        if link != Some(self.change.hash) {
            self.returned = true;
            out.push(Action::Return(Outcome::Lost));
            return true;
        }
        if self.longest.is_none() {
            self.longest = Some(listing.longest);
            self.complete_by = complete_by(&self.rules, listing.longest, self.since);
        }
        let whole = listing.is_whole() || !self.rules.keep(Rule::LostRowsAreWaitedOut);
        self.rows = listing.rows;
        let done = whole && !self.rows.iter().any(|row| self.blocks(row));
        if done {
            self.complete(out);
        }
        done
    }

    /// Whether this replica may hold a lease on a map without the change. One that says nothing of what it has
    /// applied gets its first lease from a later snapshot, and so together with the change.
    fn blocks(&self, row: &Row) -> bool {
        row.applied.is_some_and(|applied| applied < self.change.revision)
    }

    fn complete(&mut self, out: &mut Vec<Action>) {
        self.returned = true;
        out.push(Action::Return(Outcome::Complete(self.propagation())));
    }

    fn list_again(&mut self, now: Boottime, out: &mut Vec<Action>) {
        let stalled = self.request.is_some_and(|(_, sent)| now >= sent.plus(TIMEOUT));
        let due = now >= self.list_at || self.hinted;
        if stalled || self.request.is_none() && due {
            self.hinted = false;
            self.attempts += 1;
            let attempt = Attempt(self.attempts);
            self.request = Some((attempt, now));
            out.push(Action::List { attempt });
        }
    }

    /// Whether this attempt is the one under way; it is not from here on.
    fn answered(&mut self, attempt: Attempt, now: Boottime) -> bool {
        let is_it = self.request.take_if(|(awaited, _)| *awaited == attempt).is_some();
        if is_it {
            self.list_at = now.plus(self.wait);
            if self.attempts >= FIRST_READINGS {
                self.wait = (self.wait * 2).min(LONGEST_WAIT);
            }
        }
        is_it
    }
}

/// When every lease of at most this length has run out that was granted before `since`.
fn complete_by(rules: &impl Rules, longest: Lease, since: Boottime) -> Option<Boottime> {
    let wait = match rules.keep(Rule::DriftIsCovered) {
        true => longest.outlived_after(),
        false => longest.length(),
    };
    wait.map(|wait| since.plus(wait))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::lease::Incarnation;

    const D: Incarnation = Incarnation(1);

    fn at(millis: u64) -> Boottime {
        Boottime::from_nanos(millis * 1_000_000)
    }

    fn change() -> Position {
        Position { revision: Revision(8), hash: [8; 32] }
    }

    fn row(id: u128, applied: Option<u64>) -> Row {
        let id = ReplicaId(uuid::Uuid::from_u128(id));
        Row { id, applied: applied.map(Revision), renew_seq: 3, last_seen: Timestamp::from_micros(7) }
    }

    fn listing(rows: &[Row]) -> Listing {
        Listing {
            rows: rows.to_vec(),
            longest: Lease::STRICT,
            incarnation: D,
            settled: Some(D),
            db_now: Timestamp::from_micros(9),
        }
    }

    /// A revoker of a change committed at 1 s, with its first reading under way.
    fn waiting(lease: Lease, again: bool) -> Revoker {
        let mut revoker = Revoker::new(change(), again, lease, at(1000));
        assert_eq!(revoker.on(Event::Tick, at(1000)), [Action::List { attempt: Attempt(1) }]);
        revoker
    }

    fn hear(revoker: &mut Revoker, attempt: u64, listing: Listing, now: Boottime) -> Vec<Action> {
        let link = Some(change().hash);
        revoker.on(Event::Listed { attempt: Attempt(attempt), listing, link }, now)
    }

    /// Reads until it returns; gives when it did, and what it said.
    fn wait_out(revoker: &mut Revoker, listing: &Listing, mut now: Boottime) -> (Boottime, Propagation) {
        for attempt in 1.. {
            assert_eq!(hear(revoker, attempt, listing.clone(), now), []);
            now = revoker.wake_at().unwrap();
            match revoker.on(Event::Tick, now).remove(0) {
                Action::Return(Outcome::Complete(report)) => return (now, report),
                Action::List { .. } => {}
                other => panic!("{other:?}"),
            }
        }
        unreachable!("attempts have no end")
    }

    fn ids(rows: &[Row]) -> Vec<ReplicaId> {
        rows.iter().map(|row| row.id).collect()
    }

    #[test]
    fn it_is_complete_when_all_have_acknowledged() {
        let mut revoker = waiting(Lease::DEFAULT, false);
        assert_eq!(hear(&mut revoker, 1, listing(&[row(1, Some(8)), row(2, Some(7))]), at(1001)), []);
        assert_eq!(revoker.propagation().unconfirmed[0].replica, row(2, None).id);
        revoker.on(Event::Tick, at(1002));
        let rows = [row(1, Some(8)), row(2, Some(9))];
        let actions = hear(&mut revoker, 2, listing(&rows), at(1003));
        let [Action::Return(Outcome::Complete(report))] = &actions[..] else { panic!("{actions:?}") };
        assert_eq!((report.complete, report.revision), (true, Revision(8)));
        assert_eq!((&report.confirmed, &report.unconfirmed), (&ids(&rows), &vec![]));
        assert_eq!(revoker.wake_at(), None);
    }

    #[test]
    fn a_hint_brings_a_reading_and_nothing_else() {
        let mut revoker = waiting(Lease::STRICT, false);
        assert_eq!(revoker.on(Event::Hint, at(1000)), [], "one is under way");
        let lacking = listing(&[row(1, Some(7))]);
        assert_eq!(hear(&mut revoker, 1, lacking.clone(), at(1001)), [Action::List { attempt: Attempt(2) }]);
        assert_eq!(hear(&mut revoker, 2, lacking.clone(), at(1002)), []);
        assert_eq!(revoker.on(Event::Hint, at(1002)), [Action::List { attempt: Attempt(3) }]);
        assert_eq!(hear(&mut revoker, 3, lacking, at(1003)), []);
        assert!(!revoker.propagation().complete && revoker.wake_at() > Some(at(1003)));
    }

    #[test]
    fn without_acknowledgment_it_is_complete_when_every_lease_has_run_out_and_not_before() {
        for again in [false, true] {
            let mut revoker = waiting(Lease::STRICT, again);
            let rows = listing(&[row(1, Some(8)), row(2, Some(7))]);
            let (now, report) = wait_out(&mut revoker, &rows, at(1001));
            assert_eq!(now, at(1000 + 6250 + 50));
            assert_eq!(report.confirmed, ids(&[row(1, None)]));
            let lease_ends_by = Some(now);
            let last_seen = Timestamp::from_micros(7);
            assert_eq!(
                report.unconfirmed,
                [Unconfirmed { replica: row(2, None).id, last_seen, lease_ends_by }]
            );
        }
    }

    #[test]
    fn the_longest_lease_may_be_learnt_from_the_first_reading() {
        let mut revoker = Revoker::after(change(), false, at(1000));
        assert_eq!(revoker.on(Event::Tick, at(1000)), [Action::List { attempt: Attempt(1) }]);
        assert_eq!(revoker.propagation().complete_by, None);
        hear(&mut revoker, 1, listing(&[row(1, Some(7))]), at(3000));
        assert_eq!(revoker.propagation().complete_by, Some(at(1000 + 6250 + 50)), "counted from the commit");
    }

    #[test]
    fn a_nanosecond_before_the_wait_is_over_it_is_not() {
        let mut revoker = waiting(Lease::STRICT, false);
        let end = at(1000 + 6250 + 50);
        let just_before = end.minus(Duration::from_nanos(1));
        assert_eq!(revoker.on(Event::Tick, just_before), [Action::List { attempt: Attempt(2) }]);
        assert!(matches!(revoker.on(Event::Tick, end)[..], [Action::Return(Outcome::Complete(_))]));
    }

    #[test]
    fn an_infinite_lease_is_waited_for_for_ever() {
        let mut revoker = waiting(Lease::STATIC, false);
        hear(&mut revoker, 1, listing(&[row(1, Some(7))]), at(1001));
        let a_year = at(365 * 86_400_000);
        assert!(matches!(revoker.on(Event::Tick, a_year)[..], [Action::List { .. }]));
        assert_eq!(revoker.propagation().complete_by, None);
        let actions = hear(&mut revoker, 2, listing(&[]), a_year);
        assert!(
            matches!(actions[..], [Action::Return(Outcome::Complete(_))]),
            "its row is gone: {actions:?}"
        );
    }

    #[test]
    fn whoever_cannot_hold_a_lease_yet_is_not_waited_for() {
        let mut revoker = waiting(Lease::DEFAULT, false);
        let actions = hear(&mut revoker, 1, listing(&[row(1, Some(8)), row(2, None)]), at(1001));
        let [Action::Return(Outcome::Complete(report))] = &actions[..] else { panic!("{actions:?}") };
        assert_eq!(report.confirmed, ids(&[row(1, None)]));
    }

    #[test]
    fn while_rows_may_be_lost_only_time_helps() {
        let mut revoker = waiting(Lease::STRICT, false);
        let unsettled = Listing { incarnation: Incarnation(2), ..listing(&[row(1, Some(8))]) };
        let (now, _) = wait_out(&mut revoker, &unsettled, at(1001));
        assert_eq!(now, at(1000 + 6250 + 50));
    }

    #[test]
    fn a_change_that_the_database_has_lost_is_never_complete() {
        for link in [None, Some([9; 32])] {
            let mut revoker = waiting(Lease::STRICT, false);
            let listed = Event::Listed { attempt: Attempt(1), listing: listing(&[]), link };
            assert_eq!(revoker.on(listed, at(1001)), [Action::Return(Outcome::Lost)]);
            assert_eq!(revoker.on(Event::Tick, at(99_000)), []);
        }
    }

    #[test]
    fn it_reads_often_at_first_and_less_often_later() {
        let mut revoker = waiting(Lease::DEFAULT, false);
        let mut now = at(1000);
        for (attempt, wait) in (1..).zip([1, 1, 1, 1, 2, 4, 8, 16, 32, 64, 128, 250, 250]) {
            assert_eq!(hear(&mut revoker, attempt, listing(&[row(1, Some(7))]), now), []);
            assert_eq!(revoker.wake_at(), Some(now.plus(Duration::from_millis(wait))));
            now = revoker.wake_at().unwrap();
            assert_eq!(revoker.on(Event::Tick, now), [Action::List { attempt: Attempt(attempt + 1) }]);
        }
    }

    #[test]
    fn a_reading_that_stalls_or_fails_is_done_again_and_a_late_one_does_not_count() {
        let mut revoker = waiting(Lease::DEFAULT, false);
        assert_eq!(revoker.wake_at(), Some(at(3000)));
        assert_eq!(revoker.on(Event::Tick, at(3000)), [Action::List { attempt: Attempt(2) }]);
        assert_eq!(hear(&mut revoker, 1, listing(&[]), at(3001)), []);
        assert_eq!(revoker.on(Event::Failed { attempt: Attempt(2) }, at(3002)), []);
        assert_eq!(revoker.on(Event::Tick, at(3003)), [Action::List { attempt: Attempt(3) }]);
    }
}
