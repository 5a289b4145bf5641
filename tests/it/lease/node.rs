//! A process of the fleet: its three machines, its map and deadline, and what it has heard but not done yet.

use std::collections::VecDeque;

use keyward::domain::lease::{
    Attempt, Boottime, Collector, Lease, Position, Replica, ReplicaId, Revoker, collector, replica, revoker,
};

use super::{
    Broken,
    database::{Committed, Entry, Keys},
    dice::{HostClock, Micros},
};

/// A process: a node, and which of its lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Process {
    pub(super) node: usize,
    pub(super) life: u32,
}

/// What comes with an answer, for the map.
#[derive(Clone, Debug)]
pub(super) enum Baggage {
    None,
    Changes(Attempt, Vec<Entry>),
    Snapshot(Attempt, Keys),
}

/// What a process sends to the database.
#[derive(Clone, Debug)]
pub(super) enum Request {
    Replica(replica::Action),
    Revoke { wait: usize, key: u8 },
    List { wait: usize, attempt: Attempt, change: Position },
    Collector(collector::Action),
}

/// What a process hears.
#[derive(Clone, Debug)]
pub(super) enum Message {
    Replica(replica::Event, Baggage),
    Committed { wait: usize, committed: Option<Committed> },
    Revoker { wait: usize, event: revoker::Event },
    Collector(collector::Event),
}

/// A Revoke that a caller waits for.
pub(super) struct Wait {
    pub(super) key: u8,
    pub(super) since: Micros,
    pub(super) change: Option<Position>,
    pub(super) revoker: Option<Revoker<Broken>>,
}

/// A Check that has done its first half.
#[derive(Clone, Copy, Debug)]
pub(super) struct HalfCheck {
    pub(super) key: u8,
    /// The keys whose Revoke had returned OK when it started.
    pub(super) denied: u64,
    /// What the first half saw.
    pub(super) saw: bool,
}

pub(super) struct Node {
    pub(super) up: bool,
    pub(super) life: u32,
    pub(super) clock: HostClock,
    pub(super) paused: bool,
    /// The instants until which nothing gets through, to the database and back.
    pub(super) cut: (Micros, Micros),
    pub(super) replica: Replica<Broken>,
    pub(super) collector: Collector<Broken>,
    pub(super) waits: Vec<Wait>,
    pub(super) keys: Keys,
    pub(super) deadline: Boottime,
    pub(super) inbox: VecDeque<Message>,
    pub(super) todo: VecDeque<replica::Action>,
    pub(super) baggage: Baggage,
    /// Checks that a pause has caught between their halves.
    pub(super) checks: Vec<HalfCheck>,
    /// The earliest tick that is on its way.
    pub(super) tick_at: Micros,
    /// The rows that this node has held in its lives.
    pub(super) rows: Vec<(u32, ReplicaId)>,
}

impl Node {
    pub(super) fn new(broken: Broken, lease: Lease, clock: HostClock) -> Node {
        Node {
            up: true,
            life: 0,
            clock,
            paused: false,
            cut: (0, 0),
            replica: Replica::with_rules(broken, lease),
            collector: Collector::with_rules(broken, lease),
            waits: Vec::new(),
            keys: Keys::default(),
            deadline: Boottime::PASSED,
            inbox: VecDeque::new(),
            todo: VecDeque::new(),
            baggage: Baggage::None,
            checks: Vec::new(),
            tick_at: Micros::MAX,
            rows: Vec::new(),
        }
    }

    /// The process is gone, with all that it knew. Its host, and the host's clock, stay.
    pub(super) fn die(&mut self, broken: Broken, lease: Lease) {
        let Node { life, cut, clock, .. } = *self;
        let rows = std::mem::take(&mut self.rows);
        *self = Node { up: false, life: life + 1, cut, rows, ..Node::new(broken, lease, clock) };
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
        all.min().map(|local| self.clock.shows(local))
    }
}
