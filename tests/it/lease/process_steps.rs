//! What a process does with what it hears: it lets its machines decide, and does what they want, in order. This is
//! what the server's layer around the machines does too, with a real database and a real clock.

use keyward::domain::lease::{BootInstant, PropagationTracker, collector, propagation_tracker, replica};

use super::{
    dice::Micros,
    sim_node::{AnswerPayload, DatabaseRequest, NodeMessage, PendingRevoke, ProcessId},
    simulation::{SimEvent, Simulation, trace_line},
};

impl Simulation {
    pub(super) fn deliver(&mut self, to: ProcessId, message: NodeMessage) {
        if !self.is_alive(to) {
            return;
        }
        let node = &mut self.nodes[to.node];
        let busy = matches!(message, NodeMessage::Replica(..)) && !node.todo.is_empty();
        if node.paused || busy {
            node.inbox.push_back(message);
        } else {
            self.handle_message(to, message);
            self.wake_later(to);
        }
    }

    fn handle_message(&mut self, process: ProcessId, message: NodeMessage) {
        let node = &mut self.nodes[process.node];
        let local = node.clock.read(self.now);
        match message {
            NodeMessage::Replica(event, baggage) => self.handle_replica_event(process, event, baggage),
            NodeMessage::Committed { wait, committed } => {
                let Some(committed) = committed else { return };
                let rules = self.rules;
                let (change, again, longest) = (committed.change, committed.again, committed.longest);
                let waiting = &mut node.waits[wait];
                if waiting.revoker.is_none() {
                    waiting.change = Some(change);
                    waiting.revoker =
                        Some(PropagationTracker::with_invariants(rules, change, again, longest, local));
                    self.handle_revoker_event(process, wait, propagation_tracker::PropagationEvent::Tick);
                }
            }
            NodeMessage::Revoker { wait, event } => self.handle_revoker_event(process, wait, event),
            NodeMessage::Collector(event) => {
                for action in node.collector.handle(event, local) {
                    self.send(process, DatabaseRequest::Collector(action));
                }
            }
        }
    }

    fn handle_replica_event(
        &mut self,
        process: ProcessId,
        event: replica::ReplicaEvent,
        baggage: AnswerPayload,
    ) {
        if self.dice.one_chance_in(4) {
            self.start_check(process);
        }
        let node = &mut self.nodes[process.node];
        let local = node.clock.read(self.now);
        let actions = node.replica.handle(event, local);
        node.baggage = baggage;
        node.todo.extend(actions);
        self.run_pending_actions(process);
    }

    fn handle_revoker_event(
        &mut self,
        process: ProcessId,
        wait: usize,
        event: propagation_tracker::PropagationEvent,
    ) {
        let node = &mut self.nodes[process.node];
        let PendingRevoke { key, since, change, .. } = node.waits[wait];
        let local = node.clock.read(self.now);
        let (Some(revoker), Some(change)) = (&mut node.waits[wait].revoker, change) else { return };
        for action in revoker.handle(event, local) {
            match action {
                propagation_tracker::PropagationAction::ListRows { attempt } => {
                    self.send(process, DatabaseRequest::List { wait, attempt, change });
                }
                propagation_tracker::PropagationAction::Finish(
                    propagation_tracker::PropagationOutcome::Complete(report),
                ) => {
                    assert!(report.is_complete);
                    let fast = report.completes_by.is_none_or(|by| local < by);
                    self.revoke_returns_ok((key, since), change, fast);
                }
                propagation_tracker::PropagationAction::Finish(
                    propagation_tracker::PropagationOutcome::Lost,
                ) => self.tally.lost += 1,
            }
        }
    }

    /// Does what the replica wants done, step by step, until something comes between two steps.
    pub(super) fn run_pending_actions(&mut self, process: ProcessId) {
        loop {
            while self.nodes[process.node].runs()
                && let Some(action) = self.nodes[process.node].todo.pop_front()
            {
                self.perform(process, action);
                self.probe(process.node);
                if self.faults.is_active(self.now) && self.dice.one_chance_in(12) {
                    let wait = match self.dice.below(8) {
                        0 => self.dice.between(0, self.faults.mean_interval / 2),
                        _ => self.dice.between(0, 20_000),
                    };
                    // While it is at it, further events wait.
                    if !self.nodes[process.node].todo.is_empty() {
                        self.schedule_after(wait, SimEvent::Step(process));
                        return;
                    }
                }
            }
            if !self.nodes[process.node].runs() {
                return;
            }
            let inbox = &mut self.nodes[process.node].inbox;
            let Some(at) = inbox.iter().position(|message| matches!(message, NodeMessage::Replica(..)))
            else {
                break;
            };
            if let Some(message) = inbox.remove(at) {
                return self.handle_message(process, message);
            }
        }
        self.wake_later(process);
    }

    fn perform(&mut self, process: ProcessId, action: replica::ReplicaAction) {
        let at = process.node;
        trace_line!(self, "node {at}: {action:?}");
        let node = &mut self.nodes[at];
        match action {
            replica::ReplicaAction::ApplyChanges { attempt } => {
                let AnswerPayload::Changes(of, changes) = &node.baggage else { panic!("no changes at hand") };
                assert_eq!(attempt, *of);
                changes.iter().for_each(|change| node.keys.apply(change.key, change.kind));
            }
            replica::ReplicaAction::InstallSnapshot { attempt } => {
                let AnswerPayload::Snapshot(of, keys) = &node.baggage else { panic!("no snapshot at hand") };
                assert_eq!(attempt, *of);
                node.keys = *keys;
                self.tally.snapshots += 1;
            }
            replica::ReplicaAction::PublishDeadline { deadline, .. } => {
                let lapsed = node.deadline != BootInstant::EXPIRED && !node.is_fresh(self.now);
                self.tally.lapses += u64::from(lapsed);
                node.deadline = deadline;
            }
            replica::ReplicaAction::DenyAll => {
                node.deadline = BootInstant::EXPIRED;
                self.tally.stops += 1;
            }
            replica::ReplicaAction::EnterRegressed { .. } => self.tally.regressed += 1,
            replica::ReplicaAction::ReportClockStall { .. } => self.tally.frozen += 1,
            replica::ReplicaAction::Abandon { .. } => self.tally.timeouts += 1,
            replica::ReplicaAction::Renew(_) => {
                self.send(process, DatabaseRequest::Replica(action));
                self.aim_at_sender(at);
            }
            replica::ReplicaAction::Load { attempt } => {
                self.send(process, DatabaseRequest::Replica(action));
                // Whoever reads a snapshot notices that it stalls.
                let stalled =
                    NodeMessage::Replica(replica::ReplicaEvent::Failed { attempt }, AnswerPayload::None);
                self.schedule_after(self.faults.mean_interval / 2, SimEvent::Deliver(process, stalled));
            }
            replica::ReplicaAction::Register { .. } | replica::ReplicaAction::Deregister { .. } => {
                self.send(process, DatabaseRequest::Replica(action));
            }
        }
    }

    pub(super) fn tick(&mut self, process: ProcessId) {
        let node = &mut self.nodes[process.node];
        node.tick_at = Micros::MAX;
        if node.paused {
            return;
        }
        let local = node.clock.read(self.now);
        let due = |wake: Option<BootInstant>| wake.is_some_and(|wake| wake <= local);
        for wait in 0..node.waits.len() {
            let node = &self.nodes[process.node];
            if node.waits[wait].revoker.as_ref().is_some_and(|revoker| due(revoker.wake_at())) {
                self.handle_revoker_event(process, wait, propagation_tracker::PropagationEvent::Tick);
            }
        }
        if due(self.nodes[process.node].collector.wake_at()) {
            self.handle_message(process, NodeMessage::Collector(collector::CollectorEvent::Tick));
        }
        let node = &self.nodes[process.node];
        if due(node.replica.wake_at()) && node.todo.is_empty() {
            self.handle_replica_event(process, replica::ReplicaEvent::Tick, AnswerPayload::None);
        }
        let again = self.nodes[process.node].wake_at().is_some_and(|at| at <= self.now);
        assert!(!again || self.rules.0.is_some(), "a tick at {} leaves something due", self.now);
        self.wake_later(process);
    }

    fn wake_later(&mut self, process: ProcessId) {
        let node = &self.nodes[process.node];
        let Some(at) = node.wake_at() else { return };
        // A timer fires late, never early.
        let at = at.max(self.now) + 500;
        if at < node.tick_at {
            self.nodes[process.node].tick_at = at;
            self.schedule_after(at - self.now, SimEvent::Tick(process));
        }
    }

    /// Lets a node hear this now, before anything else.
    pub(super) fn happen_at_once(&mut self, node: usize, message: NodeMessage) {
        self.deliver(self.process(node), message);
    }

    pub(super) fn resume(&mut self, process: ProcessId) {
        let node = &mut self.nodes[process.node];
        if !node.paused {
            return;
        }
        trace_line!(self, "node {} goes on", process.node);
        node.paused = false;
        // A Check that came in meanwhile is answered before anything is heard.
        self.probe(process.node);
        for check in std::mem::take(&mut self.nodes[process.node].checks) {
            self.end_check(process, check);
        }
        let messages = std::mem::take(&mut self.nodes[process.node].inbox);
        if !self.nodes[process.node].todo.is_empty() {
            self.schedule_after(0, SimEvent::Step(process));
        }
        for message in messages {
            self.schedule_after(0, SimEvent::Deliver(process, message));
        }
        // What came meanwhile, or what is due: either may be first.
        let wait = if self.dice.one_chance_in(2) { 0 } else { 100 };
        self.nodes[process.node].tick_at = self.now + wait;
        self.schedule_after(wait, SimEvent::Tick(process));
    }
}
