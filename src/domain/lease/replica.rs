//! Drives one replica: it registers, follows the log, and holds a lease as long as it can renew it.
//!
//! `register → load a snapshot → renew → (changes? apply, allow, renew again, which acknowledges them) → …`
//!
//! A renewal does three things in one transaction: it acknowledges what the map contains, fetches newer changes, and
//! extends the lease. At most one renewal is in flight; hints and ticks in the meantime only make the next one start at
//! once.

use std::time::Duration;

use super::{
    AllInvariants, AttemptId, BootInstant, Incarnation, InvariantSet, LeaseDuration, LeaseInvariant,
    LogPosition, RenewalSequence, ReplicaId, clock_stall::ClockStallDetector,
};
use crate::domain::{log::ChainHash, time::Revision};

mod messages;
#[cfg(test)]
mod tests;

pub use messages::{RenewalReply, RenewalRequest, ReplicaAction, ReplicaEvent};

/// The wait after a first failure; it doubles with each that follows, up to the pace of renewals.
const FIRST_BACKOFF: Duration = Duration::from_millis(50);

/// The state of a replica towards the database.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReplicaState {
    /// It has no row or no map yet.
    Joining,
    /// The replica applies changes and renews its lease.
    Following,
    /// The database holds another history.
    Regressed,
    /// It has given up its row.
    Stopped,
}

#[derive(Clone, Copy, Debug)]
enum ReplicaMapState {
    Empty { load_at: BootInstant },
    Loading { attempt: AttemptId, sent: BootInstant },
    Loaded(LogPosition),
}

#[derive(Clone, Copy, Debug)]
struct PendingReplicaRequest {
    attempt: AttemptId,
    sent_at: BootInstant,
    renewal: Option<RenewalRequest>,
}

/// The row that the process holds, and the counts of its renewals.
#[derive(Clone, Copy, Debug)]
struct OwnReplicaRow {
    id: ReplicaId,
    confirmed_seq: u64,
    sent_seq: u64,
    /// The row is known to have `applied` set, so that revokers wait for this replica.
    is_listed: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ReplicaMode {
    Running,
    Regressed,
    Stopped,
}

/// One process's part in the protocol. It begins with a [`ReplicaEvent::Tick`].
#[derive(Debug)]
pub struct Replica<R = AllInvariants> {
    invariants: R,
    mode: ReplicaMode,
    lease: LeaseDuration,
    longest_lease: LeaseDuration,
    row: Option<OwnReplicaRow>,
    map: ReplicaMapState,
    pending_request: Option<PendingReplicaRequest>,
    attempts: u64,
    failures: u32,
    /// When the next request is due, if none is in flight.
    next_send_at: BootInstant,
    /// A renewal is wanted as soon as the one under way has ended.
    renew_again: bool,
    deadline: BootInstant,
    valid_as_of: BootInstant,
    stall_detector: ClockStallDetector,
    /// A life of the database that is not settled, and since when it has been known here.
    unsettled: Option<(Incarnation, BootInstant)>,
}

impl Replica {
    /// A process that has read `lease` from the database, and nothing else yet.
    #[must_use]
    pub fn new(lease: LeaseDuration) -> Self {
        Replica::with_invariants(AllInvariants, lease)
    }
}

impl<R: InvariantSet> Replica<R> {
    /// One that keeps these rules only.
    #[must_use]
    pub fn with_invariants(rules: R, lease: LeaseDuration) -> Self {
        Replica {
            invariants: rules,
            mode: ReplicaMode::Running,
            lease,
            longest_lease: lease,
            row: None,
            map: ReplicaMapState::Empty { load_at: BootInstant::EXPIRED },
            pending_request: None,
            attempts: 0,
            failures: 0,
            next_send_at: BootInstant::EXPIRED,
            renew_again: false,
            deadline: BootInstant::EXPIRED,
            valid_as_of: BootInstant::EXPIRED,
            stall_detector: ClockStallDetector::default(),
            unsettled: None,
        }
    }

    /// When it wants a [`ReplicaEvent::Tick`] at the latest.
    #[must_use]
    pub fn wake_at(&self) -> Option<BootInstant> {
        if self.mode != ReplicaMode::Running {
            return None;
        }
        let request = match &self.pending_request {
            Some(sent) => sent.sent_at.saturating_add(self.lease.request_timeout()),
            None => self.next_send_at,
        };
        match self.map {
            ReplicaMapState::Empty { load_at } if self.row.is_some() => Some(request.min(load_at)),
            _ => Some(request),
        }
    }

    /// The row that it holds.
    #[must_use]
    pub fn row_id(&self) -> Option<ReplicaId> {
        self.row.map(|row| row.id)
    }

    /// The current state.
    #[must_use]
    pub fn state(&self) -> ReplicaState {
        match (self.mode, self.row, self.map) {
            (ReplicaMode::Stopped, ..) => ReplicaState::Stopped,
            (ReplicaMode::Regressed, ..) => ReplicaState::Regressed,
            (ReplicaMode::Running, Some(_), ReplicaMapState::Loaded(_)) => ReplicaState::Following,
            (ReplicaMode::Running, ..) => ReplicaState::Joining,
        }
    }

    /// Handles an event that had arrived at `now`, and returns the actions in order.
    pub fn handle(&mut self, event: ReplicaEvent, now: BootInstant) -> Vec<ReplicaAction> {
        let mut out = Vec::new();
        match (self.mode, event) {
            (ReplicaMode::Stopped, _) => {}
            (_, ReplicaEvent::Stop) => self.stop(&mut out),
            (ReplicaMode::Regressed, ReplicaEvent::RegressionAccepted) => self.restart(now, &mut out),
            (ReplicaMode::Running, event) => {
                self.handle_running(event, now, &mut out);
                self.start_due_requests(now, &mut out);
            }
            (ReplicaMode::Regressed, _) => {}
        }
        out
    }

    fn handle_running(&mut self, event: ReplicaEvent, now: BootInstant, out: &mut Vec<ReplicaAction>) {
        match event {
            ReplicaEvent::Tick => self.expire_request(now, out),
            ReplicaEvent::Registered { attempt, id } => {
                if self.take_pending(attempt).is_some() {
                    self.row = Some(OwnReplicaRow { id, confirmed_seq: 0, sent_seq: 0, is_listed: false });
                    // A map that is there already can be renewed at once; else this only keeps the row alive.
                    let wait = if self.has_map() { Duration::ZERO } else { self.lease.renew_interval() };
                    self.next_send_at = now.saturating_add(wait);
                }
            }
            ReplicaEvent::Loaded { attempt, at } => self.handle_loaded(attempt, at, out),
            ReplicaEvent::Renewed { attempt, reply } => {
                if let Some(sent) = self.take_pending(attempt)
                    && let Some(renewal) = sent.renewal
                {
                    self.handle_renewed(sent.sent_at, renewal, &reply, now, out);
                }
            }
            ReplicaEvent::Failed { attempt } => self.handle_failed(attempt, now),
            ReplicaEvent::Hint => self.renew_again |= self.has_map(),
            ReplicaEvent::Advanced { to } => self.advance_map(to),
            // The map has been given up already, so this changes nothing.
            ReplicaEvent::Diverged { local_position: ours, head } if self.has_map() => {
                self.enter_regressed(ours, None, head, out)
            }
            ReplicaEvent::Diverged { .. } => {}
            ReplicaEvent::RegressionAccepted | ReplicaEvent::Stop => {}
        }
    }

    /// Starts whatever is due and not under way.
    fn start_due_requests(&mut self, now: BootInstant, out: &mut Vec<ReplicaAction>) {
        if self.mode != ReplicaMode::Running {
            return;
        }
        let may_load =
            self.row.is_some() || !self.invariants.enforces(LeaseInvariant::RegisterBeforeSnapshot);
        if let ReplicaMapState::Empty { load_at } = self.map
            && now >= load_at
            && may_load
        {
            let attempt = self.next_attempt();
            self.map = ReplicaMapState::Loading { attempt, sent: now };
            out.push(ReplicaAction::Load { attempt });
        }
        let may_register = self.has_map() || self.invariants.enforces(LeaseInvariant::RegisterBeforeSnapshot);
        let due = now >= self.next_send_at || self.renew_again && self.row.is_some();
        if self.pending_request.is_none() && due && (self.row.is_some() || may_register) {
            self.send_next_request(now, out);
        }
    }

    /// Sends the next request. `now` is an instant before the sending: a lease may count from it.
    fn send_next_request(&mut self, now: BootInstant, out: &mut Vec<ReplicaAction>) {
        let attempt = self.next_attempt();
        let renewal = self.row.as_mut().map(|row| {
            row.sent_seq += 1;
            let counts = RenewalSequence { confirmed: row.confirmed_seq, next: row.sent_seq };
            let applied = match self.map {
                ReplicaMapState::Loaded(position) => Some(position),
                ReplicaMapState::Empty { .. } | ReplicaMapState::Loading { .. } => None,
            };
            RenewalRequest { attempt, id: row.id, sequence: counts, applied, settle_incarnation: None }
        });
        let renewal = renewal
            .map(|renewal| RenewalRequest { settle_incarnation: self.incarnation_to_settle(now), ..renewal });
        out.push(renewal.map_or(ReplicaAction::Register { attempt }, ReplicaAction::Renew));
        self.pending_request = Some(PendingReplicaRequest { attempt, sent_at: now, renewal });
        self.renew_again = false;
    }

    /// The unsettled life of the database, once every lease from before it has run out.
    fn incarnation_to_settle(&self, now: BootInstant) -> Option<Incarnation> {
        let (incarnation, since) = self.unsettled?;
        let wait = match self.invariants.enforces(LeaseInvariant::SettlingTakesTime) {
            true => self.longest_lease.expiry_wait()?,
            false => Duration::ZERO,
        };
        (now >= since.saturating_add(wait)).then_some(incarnation)
    }

    fn handle_loaded(&mut self, attempt: AttemptId, at: LogPosition, out: &mut Vec<ReplicaAction>) {
        let ReplicaMapState::Loading { attempt: awaited, sent } = self.map else { return };
        if awaited != attempt {
            return;
        }
        self.map = ReplicaMapState::Loaded(at);
        self.renew_again = true;
        out.push(ReplicaAction::InstallSnapshot { attempt });
        if !self.invariants.enforces(LeaseInvariant::RegisterBeforeSnapshot) {
            self.publish_deadline(self.lease.expires_at(sent), sent, out);
        }
    }

    fn handle_renewed(
        &mut self,
        sent: BootInstant,
        renewal: RenewalRequest,
        reply: &RenewalReply,
        now: BootInstant,
        out: &mut Vec<ReplicaAction>,
    ) {
        self.failures = 0;
        (self.lease, self.longest_lease) = (reply.lease, reply.longest_lease);
        self.next_send_at = sent.saturating_add(self.lease.renew_interval());
        self.watch_incarnation(reply, now);
        let missing = self.stall_detector.detect_stall(sent, now, reply.database_time, reply.incarnation);
        if let Some(missing) = missing {
            out.push(ReplicaAction::ReportClockStall { stall: missing });
            self.publish_deadline(self.deadline.saturating_sub(missing), self.valid_as_of, out);
        }
        if let Some(position) = renewal.applied
            && self.has_diverged(position, reply)
        {
            self.enter_regressed(position, reply.acknowledged_hash, reply.head, out);
            return;
        }
        if !reply.was_renewed {
            self.handle_lost_row(now, out);
            return;
        }
        let mut listed = !self.invariants.enforces(LeaseInvariant::ListedBeforeLease);
        if let Some(row) = &mut self.row {
            row.confirmed_seq = renewal.sequence.next;
            listed |= std::mem::replace(&mut row.is_listed, renewal.applied.is_some());
        }
        if let Some(position) = renewal.applied {
            let since =
                if self.invariants.enforces(LeaseInvariant::LeaseCountsFromSending) { sent } else { now };
            let until = self.lease.expires_at(since).saturating_sub(missing.unwrap_or_default());
            // The first renewal grants no lease: a revoker that lists the rows during its commit may not see it.
            let lease = listed.then_some((since, until));
            self.apply_renewal(renewal.attempt, position, reply, lease, now, out);
        }
    }

    /// Takes the changes of a renewal, and then the lease that was granted with them.
    fn apply_renewal(
        &mut self,
        attempt: AttemptId,
        from: LogPosition,
        reply: &RenewalReply,
        lease: Option<(BootInstant, BootInstant)>,
        now: BootInstant,
        out: &mut Vec<ReplicaAction>,
    ) {
        let at_head = reply.changes_end.revision == reply.head
            || !self.invariants.enforces(LeaseInvariant::LeaseNeedsHead);
        let changed = reply.changes_end.revision > from.revision;
        // To renew again is to acknowledge.
        self.renew_again |= changed || lease.is_none();
        if changed {
            self.advance_map(reply.changes_end);
            if !self.invariants.enforces(LeaseInvariant::ApplyBeforeAck) {
                self.send_next_request(now, out);
            }
        }
        let map_first = self.invariants.enforces(LeaseInvariant::MapBeforeDeadline);
        if changed && map_first {
            out.push(ReplicaAction::ApplyChanges { attempt });
        }
        if at_head && let Some((since, until)) = lease {
            let until = if self.invariants.enforces(LeaseInvariant::LeaseEnds) {
                until
            } else {
                BootInstant::FOREVER
            };
            self.publish_deadline(until, since, out);
        }
        if changed && !map_first {
            out.push(ReplicaAction::ApplyChanges { attempt });
        }
    }

    /// Whether the database's history is another one than the map's.
    fn has_diverged(&self, ours: LogPosition, reply: &RenewalReply) -> bool {
        if self.invariants.enforces(LeaseInvariant::HistoryIsCompared) {
            reply.acknowledged_hash != Some(ours.hash)
        } else {
            reply.head < ours.revision
        }
    }

    fn enter_regressed(
        &mut self,
        ours: LogPosition,
        link: Option<ChainHash>,
        head: Revision,
        out: &mut Vec<ReplicaAction>,
    ) {
        self.mode = ReplicaMode::Regressed;
        out.push(ReplicaAction::EnterRegressed { local_position: ours, database_hash: link, head });
    }

    /// The map holds this, if not more already.
    fn advance_map(&mut self, to: LogPosition) {
        if let ReplicaMapState::Loaded(at) = &mut self.map
            && to.revision > at.revision
        {
            *at = to;
        }
    }

    /// The row is gone or belongs to another process, so no revoker waits for this replica. The map is still valid: the
    /// first renewal under a new row fetches newer changes, or detects another history.
    fn handle_lost_row(&mut self, now: BootInstant, out: &mut Vec<ReplicaAction>) {
        let worked = self.row.take().is_some_and(|row| row.is_listed);
        // Where rows vanish as soon as they are made, there is no hurry to make more.
        self.next_send_at =
            now.saturating_add(if worked { Duration::ZERO } else { self.lease.renew_interval() });
        self.deny_all(out);
    }

    fn restart(&mut self, now: BootInstant, out: &mut Vec<ReplicaAction>) {
        self.mode = ReplicaMode::Running;
        self.map = ReplicaMapState::Empty { load_at: now };
        self.next_send_at = now;
        out.extend(self.pending_request.take().map(|sent| ReplicaAction::Abandon { attempt: sent.attempt }));
        self.deregister(out);
        self.start_due_requests(now, out);
    }

    fn stop(&mut self, out: &mut Vec<ReplicaAction>) {
        self.mode = ReplicaMode::Stopped;
        self.deregister(out);
    }

    /// Gives up the lease first, and then the row.
    fn deregister(&mut self, out: &mut Vec<ReplicaAction>) {
        self.deny_all(out);
        out.extend(self.row.take().map(|row| ReplicaAction::Deregister { id: row.id }));
    }

    fn publish_deadline(&mut self, deadline: BootInstant, as_of: BootInstant, out: &mut Vec<ReplicaAction>) {
        (self.deadline, self.valid_as_of) = (deadline, as_of);
        out.push(ReplicaAction::PublishDeadline { deadline, as_of });
    }

    fn deny_all(&mut self, out: &mut Vec<ReplicaAction>) {
        self.deadline = BootInstant::EXPIRED;
        out.push(ReplicaAction::DenyAll);
    }

    fn watch_incarnation(&mut self, reply: &RenewalReply, now: BootInstant) {
        if reply.settled_incarnation == Some(reply.incarnation) {
            self.unsettled = None;
        } else if self.unsettled.is_none_or(|(known, _)| known != reply.incarnation) {
            self.unsettled = Some((reply.incarnation, now));
        }
    }

    fn expire_request(&mut self, now: BootInstant, out: &mut Vec<ReplicaAction>) {
        if let Some(sent) = self.pending_request
            && now >= sent.sent_at.saturating_add(self.lease.request_timeout())
        {
            out.push(ReplicaAction::Abandon { attempt: sent.attempt });
            self.handle_failed(sent.attempt, now);
        }
    }

    fn handle_failed(&mut self, attempt: AttemptId, now: BootInstant) {
        let backoff =
            FIRST_BACKOFF.saturating_mul(1 << self.failures.min(10)).min(self.lease.renew_interval());
        if self.take_pending(attempt).is_some() {
            self.failures += 1;
            self.renew_again = false;
            self.next_send_at = now.saturating_add(backoff);
        }
        if matches!(self.map, ReplicaMapState::Loading { attempt: awaited, .. } if awaited == attempt) {
            self.failures += 1;
            self.map = ReplicaMapState::Empty { load_at: now.saturating_add(backoff) };
        }
    }

    /// The request that this attempt answers, if it is the one under way.
    fn take_pending(&mut self, attempt: AttemptId) -> Option<PendingReplicaRequest> {
        self.pending_request.take_if(|sent| sent.attempt == attempt)
    }

    fn next_attempt(&mut self) -> AttemptId {
        self.attempts += 1;
        AttemptId(self.attempts)
    }

    fn has_map(&self) -> bool {
        matches!(self.map, ReplicaMapState::Loaded(_))
    }
}
