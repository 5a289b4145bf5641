//! A process of the fleet: its three machines, its map and deadline, and what it has heard but not done yet.

use std::collections::VecDeque;

use keyward::domain::lease::{
    AttemptId, BootInstant, LeaseDuration, LogPosition, PropagationTracker, Replica, ReplicaCollector,
    ReplicaId, collector, propagation_tracker, replica,
};

use super::{
    RulesWithout,
    database::{KeySets, RevokeResult, SimLogEntry},
    dice::{HostClock, Micros},
};

/// A process: a node, and which of its lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ProcessId {
    pub(super) node: usize,
    pub(super) life: u32,
}

/// What comes with an answer, for the map.
#[derive(Clone, Debug)]
pub(super) enum AnswerPayload {
    None,
    Changes(AttemptId, Vec<SimLogEntry>),
    Snapshot(AttemptId, KeySets),
}

/// What a process sends to the database.
#[derive(Clone, Debug)]
pub(super) enum DatabaseRequest {
    Replica(replica::ReplicaAction),
    Revoke { wait: usize, key: u8 },
    List { wait: usize, attempt: AttemptId, change: LogPosition },
    Collector(collector::CollectorAction),
}

/// What a process hears.
#[derive(Clone, Debug)]
pub(super) enum NodeMessage {
    Replica(replica::ReplicaEvent, AnswerPayload),
    Committed { wait: usize, committed: Option<RevokeResult> },
    Revoker { wait: usize, event: propagation_tracker::PropagationEvent },
    Collector(collector::CollectorEvent),
}

/// A Revoke that a caller waits for.
pub(super) struct PendingRevoke {
    pub(super) key: u8,
    pub(super) since: Micros,
    pub(super) change: Option<LogPosition>,
    pub(super) revoker: Option<PropagationTracker<RulesWithout>>,
}

/// A Check that has done its first half.
#[derive(Clone, Copy, Debug)]
pub(super) struct InFlightCheck {
    pub(super) key: u8,
    /// The keys whose Revoke had returned OK when it started.
    pub(super) denied: u64,
    /// What the first half saw.
    pub(super) saw: bool,
}

pub(super) struct SimNode {
    pub(super) up: bool,
    pub(super) life: u32,
    pub(super) clock: HostClock,
    pub(super) paused: bool,
    /// The instants until which nothing gets through, to the database and back.
    pub(super) cut: (Micros, Micros),
    pub(super) replica: Replica<RulesWithout>,
    pub(super) collector: ReplicaCollector<RulesWithout>,
    pub(super) waits: Vec<PendingRevoke>,
    pub(super) keys: KeySets,
    pub(super) deadline: BootInstant,
    pub(super) inbox: VecDeque<NodeMessage>,
    pub(super) todo: VecDeque<replica::ReplicaAction>,
    pub(super) baggage: AnswerPayload,
    /// Checks that a pause has caught between their halves.
    pub(super) checks: Vec<InFlightCheck>,
    /// The earliest tick that is on its way.
    pub(super) tick_at: Micros,
    /// The rows that this node has held in its lives.
    pub(super) rows: Vec<(u32, ReplicaId)>,
}

impl SimNode {
    pub(super) fn new(broken: RulesWithout, lease: LeaseDuration, clock: HostClock) -> SimNode {
        SimNode {
            up: true,
            life: 0,
            clock,
            paused: false,
            cut: (0, 0),
            replica: Replica::with_invariants(broken, lease),
            collector: ReplicaCollector::with_invariants(broken, lease),
            waits: Vec::new(),
            keys: KeySets::default(),
            deadline: BootInstant::EXPIRED,
            inbox: VecDeque::new(),
            todo: VecDeque::new(),
            baggage: AnswerPayload::None,
            checks: Vec::new(),
            tick_at: Micros::MAX,
            rows: Vec::new(),
        }
    }

    /// The process is gone, with all that it knew. Its host, and the host's clock, stay.
    pub(super) fn die(&mut self, broken: RulesWithout, lease: LeaseDuration) {
        let SimNode { life, cut, clock, .. } = *self;
        let rows = std::mem::take(&mut self.rows);
        *self = SimNode { up: false, life: life + 1, cut, rows, ..SimNode::new(broken, lease, clock) };
    }

    /// Whether it runs just now.
    pub(super) fn runs(&self) -> bool {
        self.up && !self.paused
    }

    /// Whether a Check that starts and ends just now may allow what its map says is live.
    pub(super) fn is_fresh(&self, at: Micros) -> bool {
        self.clock.read(at) < self.deadline
    }

    /// When one of its machines wants to be woken, in true time.
    pub(super) fn wake_at(&self) -> Option<Micros> {
        let revokers = self.waits.iter().filter_map(|wait| wait.revoker.as_ref()?.wake_at());
        // What the replica wants done comes before what it wants next.
        let replica = self.replica.wake_at().filter(|_| self.todo.is_empty());
        let all = revokers.chain(replica).chain(self.collector.wake_at());
        all.min().map(|local| self.clock.time_when_reading(local))
    }
}
