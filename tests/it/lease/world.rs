//! The scheduler: true time, what is going to happen when, and everything that it happens to.

use std::{cmp::Reverse, collections::BinaryHeap};

use keyward::domain::lease::{
    Incarnation, Lease,
    replica::{Renewal, Reply},
};

use super::{
    Broken,
    database::{Database, Entry},
    dice::{Dice, HostClock, Micros},
    faults::Faults,
    node::{HalfCheck, Message, Node, Process, Request},
    tally::Tally,
};

/// What is going to happen.
#[derive(Debug)]
pub(super) enum What {
    /// A request reaches the database.
    Arrive(Process, Request, Incarnation),
    /// What a renewal has changed is seen from now on.
    CommitRenewal(Process, Renewal, Reply, Vec<Entry>),
    /// A message reaches a process.
    Deliver(Process, Message),
    Tick(Process),
    /// A process goes on with what it has begun.
    Step(Process),
    EndCheck(Process, HalfCheck),
    Resume(Process),
    Start(usize),
    Create,
    Revoke,
    RevokeAgain(u8),
    Fault,
    FinishLeaseChange(Lease),
}

struct Due(Micros, u64, What);

impl PartialEq for Due {
    fn eq(&self, other: &Due) -> bool {
        self.1 == other.1
    }
}
impl Eq for Due {}
impl PartialOrd for Due {
    fn partial_cmp(&self, other: &Due) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Due {
    fn cmp(&self, other: &Due) -> std::cmp::Ordering {
        (self.0, self.1).cmp(&(other.0, other.1))
    }
}

pub(super) struct World {
    pub(super) dice: Dice,
    pub(super) now: Micros,
    queue: BinaryHeap<Reverse<Due>>,
    order: u64,
    pub(super) broken: Broken,
    pub(super) db: Database,
    /// Until when nothing reaches the database.
    pub(super) down_until: Micros,
    pub(super) nodes: Vec<Node>,
    pub(super) faults: Faults,
    /// The keys whose Revoke has returned OK.
    pub(super) denied: u64,
    pub(super) keys_made: u8,
    pub(super) ids: u128,
    pub(super) tally: Tally,
    /// How long the slowest Revoke took that returned OK.
    pub(super) slowest_revoke: Micros,
    pub(super) trace: Option<Vec<String>>,
    pub(super) violation: Option<String>,
}

/// Notes a line, if anybody will read it.
macro_rules! note {
    ($world:expr, $($text:tt)*) => {
        if let Some(trace) = &mut $world.trace {
            trace.push(format!("{:>11.6} {}", $world.now as f64 / 1e6, format_args!($($text)*)));
        }
    };
}
pub(super) use note;

impl World {
    pub(super) fn new(mut dice: Dice, lease: Lease, rates: &[u64], faults: Faults, broken: Broken) -> World {
        let wall_rate = dice.between(HostClock::SLOWEST, HostClock::FASTEST + 1);
        let fits = dice.pick(&[1000, 1000, 3]);
        let clocks: Vec<_> = rates.iter().map(|&rate| HostClock::new(&mut dice, rate)).collect();
        World {
            dice,
            now: 0,
            queue: BinaryHeap::new(),
            order: 0,
            broken,
            db: Database::new(lease, wall_rate, fits),
            down_until: 0,
            nodes: clocks.into_iter().map(|clock| Node::new(broken, lease, clock)).collect(),
            faults,
            denied: 0,
            keys_made: 0,
            ids: 0,
            tally: Tally::default(),
            slowest_revoke: 0,
            trace: None,
            violation: None,
        }
    }

    pub(super) fn after(&mut self, wait: Micros, what: What) {
        self.order += 1;
        self.queue.push(Reverse(Due(self.now + wait, self.order, what)));
    }

    /// Lets time pass until `end`, or until the promise is broken.
    pub(super) fn run_until(&mut self, end: Micros) {
        while self.violation.is_none()
            && let Some(Reverse(next)) = self.queue.peek()
            && next.0 <= end
        {
            let Some(Reverse(Due(at, _, what))) = self.queue.pop() else { break };
            self.now = at;
            self.tally.events += 1;
            self.happen(what);
        }
        self.now = self.now.max(end);
    }

    fn happen(&mut self, what: What) {
        match what {
            What::Arrive(from, request, sent_in) => self.arrive(from, request, sent_in),
            What::CommitRenewal(from, renewal, reply, changes) => {
                self.commit_renewal(from, renewal, reply, changes);
            }
            What::Deliver(to, message) => self.deliver(to, message),
            // A tick that an earlier one has overtaken is not due any more.
            What::Tick(to) if self.is_alive(to) && self.nodes[to.node].tick_at == self.now => self.tick(to),
            What::Step(of) if self.is_alive(of) && self.nodes[of.node].runs() => self.go_on(of),
            What::EndCheck(at, check) if self.is_alive(at) => self.end_check(at, check),
            What::Resume(process) if self.is_alive(process) => self.resume(process),
            What::Tick(_) | What::Step(_) | What::EndCheck(..) | What::Resume(_) => {}
            What::Start(node) => self.start(node),
            What::Create => self.create(),
            What::Revoke => self.revoke_some(),
            What::RevokeAgain(key) => self.revoke(key),
            What::Fault => self.fault(),
            What::FinishLeaseChange(lease) => self.db.longest = lease,
        }
    }

    pub(super) fn is_alive(&self, process: Process) -> bool {
        let node = &self.nodes[process.node];
        node.up && node.life == process.life
    }

    pub(super) fn process(&self, node: usize) -> Process {
        Process { node, life: self.nodes[node].life }
    }

    fn start(&mut self, node: usize) {
        if !self.nodes[node].up || self.nodes[node].tick_at == Micros::MAX {
            note!(self, "node {node} starts");
            self.nodes[node].up = true;
            self.tick(self.process(node));
        }
    }
}
