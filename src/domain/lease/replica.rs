//! The replica: joins, follows the log, and holds a lease as long as it can renew it.
//!
//! `register → load a snapshot → renew → (changes? apply, allow, renew again, which acknowledges them) → …`
//!
//! A renewal does three things in one transaction: it acknowledges what the map holds, it fetches what the map
//! lacks, and it extends the lease. There is never more than one under way, so whatever else happens meanwhile
//! (hints, ticks) only makes the next one start at once.

use std::time::Duration;

use super::{
    Attempt, Boottime, Counts, Incarnation, Kept, Lease, Position, ReplicaId, Rule, Rules,
    freeze::FreezeWatch,
};
use crate::domain::{log::Hash, time::Revision};

mod message;
#[cfg(test)]
mod tests;

pub use message::{Action, Event, Renewal, Reply};

/// The wait after a first failure; it doubles with each that follows, up to the pace of renewals.
const FIRST_BACKOFF: Duration = Duration::from_millis(50);

/// How a replica stands with the database.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// It has no row or no map yet.
    Joining,
    /// It follows.
    Following,
    /// The database holds another history.
    Regressed,
    /// It has given up its row.
    Stopped,
}

#[derive(Clone, Copy, Debug)]
enum Map {
    Empty { load_at: Boottime },
    Loading { attempt: Attempt, sent: Boottime },
    Holds(Position),
}

#[derive(Clone, Copy, Debug)]
struct Sent {
    attempt: Attempt,
    at: Boottime,
    renewal: Option<Renewal>,
}

/// The row that the process holds, and the counts of its renewals.
#[derive(Clone, Copy, Debug)]
struct OwnRow {
    id: ReplicaId,
    seen: u64,
    sent: u64,
    /// It is known to say what is applied, so that revokers wait for it.
    listed: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Running,
    Regressed,
    Stopped,
}

/// One process's part in the protocol. It begins with a [`Event::Tick`].
#[derive(Debug)]
pub struct Replica<R = Kept> {
    rules: R,
    mode: Mode,
    lease: Lease,
    longest: Lease,
    row: Option<OwnRow>,
    map: Map,
    request: Option<Sent>,
    attempts: u64,
    failures: u32,
    /// When the next request is due, if none is under way.
    send_at: Boottime,
    /// A renewal is wanted as soon as the one under way has ended.
    again: bool,
    deadline: Boottime,
    as_of: Boottime,
    clock: FreezeWatch,
    /// A life of the database that is not settled, and since when it has been known here.
    unsettled: Option<(Incarnation, Boottime)>,
}

impl Replica {
    /// A process that has read `lease` from the database, and nothing else yet.
    #[must_use]
    pub fn new(lease: Lease) -> Self {
        Replica::with_rules(Kept, lease)
    }
}

impl<R: Rules> Replica<R> {
    /// One that keeps these rules only.
    #[must_use]
    pub fn with_rules(rules: R, lease: Lease) -> Self {
        Replica {
            rules,
            mode: Mode::Running,
            lease,
            longest: lease,
            row: None,
            map: Map::Empty { load_at: Boottime::PASSED },
            request: None,
            attempts: 0,
            failures: 0,
            send_at: Boottime::PASSED,
            again: false,
            deadline: Boottime::PASSED,
            as_of: Boottime::PASSED,
            clock: FreezeWatch::default(),
            unsettled: None,
        }
    }

    /// When it wants a [`Event::Tick`] at the latest.
    #[must_use]
    pub fn wake_at(&self) -> Option<Boottime> {
        if self.mode != Mode::Running {
            return None;
        }
        let request = match &self.request {
            Some(sent) => sent.at.plus(self.lease.timeout()),
            None => self.send_at,
        };
        match self.map {
            Map::Empty { load_at } if self.row.is_some() => Some(request.min(load_at)),
            _ => Some(request),
        }
    }

    /// The row that it holds.
    #[must_use]
    pub fn row(&self) -> Option<ReplicaId> {
        self.row.map(|row| row.id)
    }

    /// How it stands.
    #[must_use]
    pub fn standing(&self) -> Standing {
        match (self.mode, self.row, self.map) {
            (Mode::Stopped, ..) => Standing::Stopped,
            (Mode::Regressed, ..) => Standing::Regressed,
            (Mode::Running, Some(_), Map::Holds(_)) => Standing::Following,
            (Mode::Running, ..) => Standing::Joining,
        }
    }

    /// Takes an event that was at hand at `now`; gives what is to be done, in order.
    pub fn on(&mut self, event: Event, now: Boottime) -> Vec<Action> {
        let mut out = Vec::new();
        match (self.mode, event) {
            (Mode::Stopped, _) => {}
            (_, Event::Stop) => self.stop(&mut out),
            (Mode::Regressed, Event::RegressionAccepted) => self.start_over(now, &mut out),
            (Mode::Running, event) => {
                self.take(event, now, &mut out);
                self.proceed(now, &mut out);
            }
            (Mode::Regressed, _) => {}
        }
        out
    }

    fn take(&mut self, event: Event, now: Boottime, out: &mut Vec<Action>) {
        match event {
            Event::Tick => self.time_out(now, out),
            Event::Registered { attempt, id } => {
                if self.answered(attempt).is_some() {
                    self.row = Some(OwnRow { id, seen: 0, sent: 0, listed: false });
                    // A map that is there already can be renewed at once; else this only keeps the row alive.
                    let wait = if self.holds() { Duration::ZERO } else { self.lease.renew_every() };
                    self.send_at = now.plus(wait);
                }
            }
            Event::Loaded { attempt, at } => self.loaded(attempt, at, out),
            Event::Renewed { attempt, reply } => {
                if let Some(sent) = self.answered(attempt)
                    && let Some(renewal) = sent.renewal
                {
                    self.renewed(sent.at, renewal, &reply, now, out);
                }
            }
            Event::Failed { attempt } => self.failed(attempt, now),
            Event::Hint => self.again |= self.holds(),
            Event::Advanced { to } => self.advance(to),
            // Of a map that is given up already, it says nothing new.
            Event::Diverged { ours, head } if self.holds() => self.regress(ours, None, head, out),
            Event::Diverged { .. } => {}
            Event::RegressionAccepted | Event::Stop => {}
        }
    }

    /// Starts whatever is due and not under way.
    fn proceed(&mut self, now: Boottime, out: &mut Vec<Action>) {
        if self.mode != Mode::Running {
            return;
        }
        let may_load = self.row.is_some() || !self.rules.keep(Rule::RegisterBeforeSnapshot);
        if let Map::Empty { load_at } = self.map
            && now >= load_at
            && may_load
        {
            let attempt = self.next_attempt();
            self.map = Map::Loading { attempt, sent: now };
            out.push(Action::Load { attempt });
        }
        let may_register = self.holds() || self.rules.keep(Rule::RegisterBeforeSnapshot);
        let due = now >= self.send_at || self.again && self.row.is_some();
        if self.request.is_none() && due && (self.row.is_some() || may_register) {
            self.send(now, out);
        }
    }

    /// Sends the next request. `now` is an instant before the sending: a lease may count from it.
    fn send(&mut self, now: Boottime, out: &mut Vec<Action>) {
        let attempt = self.next_attempt();
        let renewal = self.row.as_mut().map(|row| {
            row.sent += 1;
            let counts = Counts { seen: row.seen, next: row.sent };
            let applied = match self.map {
                Map::Holds(position) => Some(position),
                Map::Empty { .. } | Map::Loading { .. } => None,
            };
            Renewal { attempt, id: row.id, counts, applied, settle: None }
        });
        let renewal = renewal.map(|renewal| Renewal { settle: self.settled_by(now), ..renewal });
        out.push(renewal.map_or(Action::Register { attempt }, Action::Renew));
        self.request = Some(Sent { attempt, at: now, renewal });
        self.again = false;
    }

    /// The unsettled life of the database, once every lease from before it has run out.
    fn settled_by(&self, now: Boottime) -> Option<Incarnation> {
        let (incarnation, since) = self.unsettled?;
        let wait = match self.rules.keep(Rule::SettlingTakesTime) {
            true => self.longest.outlived_after()?,
            false => Duration::ZERO,
        };
        (now >= since.plus(wait)).then_some(incarnation)
    }

    fn loaded(&mut self, attempt: Attempt, at: Position, out: &mut Vec<Action>) {
        let Map::Loading { attempt: awaited, sent } = self.map else { return };
        if awaited != attempt {
            return;
        }
        self.map = Map::Holds(at);
        self.again = true;
        out.push(Action::Adopt { attempt });
        if !self.rules.keep(Rule::RegisterBeforeSnapshot) {
            self.publish(self.lease.ends(sent), sent, out);
        }
    }

    fn renewed(
        &mut self,
        sent: Boottime,
        renewal: Renewal,
        reply: &Reply,
        now: Boottime,
        out: &mut Vec<Action>,
    ) {
        self.failures = 0;
        (self.lease, self.longest) = (reply.lease, reply.longest);
        self.send_at = sent.plus(self.lease.renew_every());
        self.watch_incarnation(reply, now);
        let missing = self.clock.compare(sent, now, reply.db_now, reply.incarnation);
        if let Some(missing) = missing {
            out.push(Action::ReportFrozenClock { missing });
            self.publish(self.deadline.minus(missing), self.as_of, out);
        }
        if let Some(position) = renewal.applied
            && self.is_elsewhere(position, reply)
        {
            self.regress(position, reply.link, reply.head, out);
            return;
        }
        if !reply.renewed {
            self.lose_row(now, out);
            return;
        }
        let mut listed = !self.rules.keep(Rule::ListedBeforeLease);
        if let Some(row) = &mut self.row {
            row.seen = renewal.counts.next;
            listed |= std::mem::replace(&mut row.listed, renewal.applied.is_some());
        }
        if let Some(position) = renewal.applied {
            let since = if self.rules.keep(Rule::LeaseCountsFromSending) { sent } else { now };
            let until = self.lease.ends(since).minus(missing.unwrap_or_default());
            // The first renewal only asks: whoever lists the rows while it is committed may not see it yet.
            let lease = listed.then_some((since, until));
            self.follow(renewal.attempt, position, reply, lease, now, out);
        }
    }

    /// Takes the changes of a renewal, and then the lease that was granted with them.
    fn follow(
        &mut self,
        attempt: Attempt,
        from: Position,
        reply: &Reply,
        lease: Option<(Boottime, Boottime)>,
        now: Boottime,
        out: &mut Vec<Action>,
    ) {
        let at_head = reply.upto.revision == reply.head || !self.rules.keep(Rule::LeaseNeedsHead);
        let changed = reply.upto.revision > from.revision;
        // To renew again is to acknowledge.
        self.again |= changed || lease.is_none();
        if changed {
            self.advance(reply.upto);
            if !self.rules.keep(Rule::ApplyBeforeAck) {
                self.send(now, out);
            }
        }
        let map_first = self.rules.keep(Rule::MapBeforeDeadline);
        if changed && map_first {
            out.push(Action::Apply { attempt });
        }
        if at_head && let Some((since, until)) = lease {
            let until = if self.rules.keep(Rule::LeaseEnds) { until } else { Boottime::FOREVER };
            self.publish(until, since, out);
        }
        if changed && !map_first {
            out.push(Action::Apply { attempt });
        }
    }

    /// Whether the database's history is another one than the map's.
    fn is_elsewhere(&self, ours: Position, reply: &Reply) -> bool {
        if self.rules.keep(Rule::HistoryIsCompared) {
            reply.link != Some(ours.hash)
        } else {
            reply.head < ours.revision
        }
    }

    fn regress(&mut self, ours: Position, link: Option<Hash>, head: Revision, out: &mut Vec<Action>) {
        self.mode = Mode::Regressed;
        out.push(Action::EnterRegressed { ours, link, head });
    }

    /// The map holds this, if not more already.
    fn advance(&mut self, to: Position) {
        if let Map::Holds(at) = &mut self.map
            && to.revision > at.revision
        {
            *at = to;
        }
    }

    /// The row is gone, or is another process's: nobody waits for this one any more. The map is still good: the
    /// first renewal under the new row brings what it lacks, or finds that the history is another one.
    fn lose_row(&mut self, now: Boottime, out: &mut Vec<Action>) {
        let worked = self.row.take().is_some_and(|row| row.listed);
        // Where rows vanish as soon as they are made, there is no hurry to make more.
        self.send_at = now.plus(if worked { Duration::ZERO } else { self.lease.renew_every() });
        self.stop_allowing(out);
    }

    fn start_over(&mut self, now: Boottime, out: &mut Vec<Action>) {
        self.mode = Mode::Running;
        self.map = Map::Empty { load_at: now };
        self.send_at = now;
        out.extend(self.request.take().map(|sent| Action::Abandon { attempt: sent.attempt }));
        self.leave(out);
        self.proceed(now, out);
    }

    fn stop(&mut self, out: &mut Vec<Action>) {
        self.mode = Mode::Stopped;
        self.leave(out);
    }

    /// Gives up the lease first, and then the row.
    fn leave(&mut self, out: &mut Vec<Action>) {
        self.stop_allowing(out);
        out.extend(self.row.take().map(|row| Action::Leave { id: row.id }));
    }

    fn publish(&mut self, deadline: Boottime, as_of: Boottime, out: &mut Vec<Action>) {
        (self.deadline, self.as_of) = (deadline, as_of);
        out.push(Action::Publish { deadline, as_of });
    }

    fn stop_allowing(&mut self, out: &mut Vec<Action>) {
        self.deadline = Boottime::PASSED;
        out.push(Action::StopAllowing);
    }

    fn watch_incarnation(&mut self, reply: &Reply, now: Boottime) {
        if reply.settled == Some(reply.incarnation) {
            self.unsettled = None;
        } else if self.unsettled.is_none_or(|(known, _)| known != reply.incarnation) {
            self.unsettled = Some((reply.incarnation, now));
        }
    }

    fn time_out(&mut self, now: Boottime, out: &mut Vec<Action>) {
        if let Some(sent) = self.request
            && now >= sent.at.plus(self.lease.timeout())
        {
            out.push(Action::Abandon { attempt: sent.attempt });
            self.failed(sent.attempt, now);
        }
    }

    fn failed(&mut self, attempt: Attempt, now: Boottime) {
        let backoff = FIRST_BACKOFF.saturating_mul(1 << self.failures.min(10)).min(self.lease.renew_every());
        if self.answered(attempt).is_some() {
            self.failures += 1;
            self.again = false;
            self.send_at = now.plus(backoff);
        }
        if matches!(self.map, Map::Loading { attempt: awaited, .. } if awaited == attempt) {
            self.failures += 1;
            self.map = Map::Empty { load_at: now.plus(backoff) };
        }
    }

    /// The request that this attempt answers, if it is the one under way.
    fn answered(&mut self, attempt: Attempt) -> Option<Sent> {
        self.request.take_if(|sent| sent.attempt == attempt)
    }

    fn next_attempt(&mut self) -> Attempt {
        self.attempts += 1;
        Attempt(self.attempts)
    }

    fn holds(&self) -> bool {
        matches!(self.map, Map::Holds(_))
    }
}
