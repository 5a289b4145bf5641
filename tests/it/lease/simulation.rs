//! The scheduler: true time, what is going to happen when, and everything that it happens to.

use std::{cmp::Reverse, collections::BinaryHeap};

use keyward::domain::lease::{
    Incarnation, LeaseDuration,
    replica::{RenewalReply, RenewalRequest},
};

use super::{
    RulesWithout,
    database::{SimDatabase, SimLogEntry},
    dice::{HostClock, Micros, ScheduleRng},
    event_counts::Tally,
    faults::FaultPlan,
    sim_node::{DatabaseRequest, InFlightCheck, NodeMessage, ProcessId, SimNode},
};

/// What is going to happen.
#[derive(Debug)]
pub(super) enum SimEvent {
    /// A request reaches the database.
    Arrive(ProcessId, DatabaseRequest, Incarnation),
    /// What a renewal has changed is seen from now on.
    CommitRenewal(ProcessId, RenewalRequest, RenewalReply, Vec<SimLogEntry>),
    /// A message reaches a process.
    Deliver(ProcessId, NodeMessage),
    Tick(ProcessId),
    /// A process goes on with what it has begun.
    Step(ProcessId),
    EndCheck(ProcessId, InFlightCheck),
    Resume(ProcessId),
    Start(usize),
    Create,
    Revoke,
    RevokeAgain(u8),
    Fault,
    FinishLeaseChange(LeaseDuration),
}

struct ScheduledEvent(Micros, u64, SimEvent);

impl PartialEq for ScheduledEvent {
    fn eq(&self, other: &ScheduledEvent) -> bool {
        self.1 == other.1
    }
}
impl Eq for ScheduledEvent {}
impl PartialOrd for ScheduledEvent {
    fn partial_cmp(&self, other: &ScheduledEvent) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for ScheduledEvent {
    fn cmp(&self, other: &ScheduledEvent) -> std::cmp::Ordering {
        (self.0, self.1).cmp(&(other.0, other.1))
    }
}

pub(super) struct Simulation {
    pub(super) dice: ScheduleRng,
    pub(super) now: Micros,
    queue: BinaryHeap<Reverse<ScheduledEvent>>,
    order: u64,
    pub(super) rules: RulesWithout,
    pub(super) db: SimDatabase,
    /// Until when nothing reaches the database.
    pub(super) down_until: Micros,
    pub(super) nodes: Vec<SimNode>,
    pub(super) faults: FaultPlan,
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
macro_rules! trace_line {
    ($world:expr, $($text:tt)*) => {
        if let Some(trace) = &mut $world.trace {
            trace.push(format!("{:>11.6} {}", $world.now as f64 / 1e6, format_args!($($text)*)));
        }
    };
}
pub(super) use trace_line;

impl Simulation {
    pub(super) fn new(
        mut dice: ScheduleRng,
        lease: LeaseDuration,
        rates: &[u64],
        faults: FaultPlan,
        broken: RulesWithout,
    ) -> Simulation {
        let wall_rate = dice.between(HostClock::SLOWEST, HostClock::FASTEST + 1);
        let fits = dice.pick(&[1000, 1000, 3]);
        let clocks: Vec<_> = rates.iter().map(|&rate| HostClock::new(&mut dice, rate)).collect();
        Simulation {
            dice,
            now: 0,
            queue: BinaryHeap::new(),
            order: 0,
            rules: broken,
            db: SimDatabase::new(lease, wall_rate, fits),
            down_until: 0,
            nodes: clocks.into_iter().map(|clock| SimNode::new(broken, lease, clock)).collect(),
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

    pub(super) fn schedule_after(&mut self, wait: Micros, what: SimEvent) {
        self.order += 1;
        self.queue.push(Reverse(ScheduledEvent(self.now + wait, self.order, what)));
    }

    /// Lets time pass until `end`, or until the promise is broken.
    pub(super) fn run_until(&mut self, end: Micros) {
        while self.violation.is_none()
            && let Some(Reverse(next)) = self.queue.peek()
            && next.0 <= end
        {
            let Some(Reverse(ScheduledEvent(at, _, what))) = self.queue.pop() else { break };
            self.now = at;
            self.tally.events += 1;
            self.handle_event(what);
        }
        self.now = self.now.max(end);
    }

    fn handle_event(&mut self, what: SimEvent) {
        match what {
            SimEvent::Arrive(from, request, sent_in) => self.handle_request(from, request, sent_in),
            SimEvent::CommitRenewal(from, renewal, reply, changes) => {
                self.commit_renewal(from, renewal, reply, changes);
            }
            SimEvent::Deliver(to, message) => self.deliver(to, message),
            // A tick that an earlier one has overtaken is not due any more.
            SimEvent::Tick(to) if self.is_alive(to) && self.nodes[to.node].tick_at == self.now => {
                self.tick(to)
            }
            SimEvent::Step(of) if self.is_alive(of) && self.nodes[of.node].runs() => {
                self.run_pending_actions(of)
            }
            SimEvent::EndCheck(at, check) if self.is_alive(at) => self.end_check(at, check),
            SimEvent::Resume(process) if self.is_alive(process) => self.resume(process),
            SimEvent::Tick(_) | SimEvent::Step(_) | SimEvent::EndCheck(..) | SimEvent::Resume(_) => {}
            SimEvent::Start(node) => self.start(node),
            SimEvent::Create => self.create(),
            SimEvent::Revoke => self.revoke_some(),
            SimEvent::RevokeAgain(key) => self.revoke(key),
            SimEvent::Fault => self.fault(),
            SimEvent::FinishLeaseChange(lease) => self.db.longest = lease,
        }
    }

    pub(super) fn is_alive(&self, process: ProcessId) -> bool {
        let node = &self.nodes[process.node];
        node.up && node.life == process.life
    }

    pub(super) fn process(&self, node: usize) -> ProcessId {
        ProcessId { node, life: self.nodes[node].life }
    }

    fn start(&mut self, node: usize) {
        if !self.nodes[node].up || self.nodes[node].tick_at == Micros::MAX {
            trace_line!(self, "node {node} starts");
            self.nodes[node].up = true;
            self.tick(self.process(node));
        }
    }
}
