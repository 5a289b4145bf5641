//! What a process does with what it hears: it lets its machines decide, and does what they want, in order. This is
//! what the server's layer around the machines does too, with a real database and a real clock.

use keyward::domain::lease::{Boottime, Revoker, collector, replica, revoker};

use super::{
    dice::Micros,
    node::{Baggage, Message, Process, Request, Wait},
    world::{What, World, note},
};

impl World {
    pub(super) fn deliver(&mut self, to: Process, message: Message) {
        if !self.is_alive(to) {
            return;
        }
        let node = &mut self.nodes[to.node];
        let busy = matches!(message, Message::Replica(..)) && !node.todo.is_empty();
        if node.paused || busy {
            node.inbox.push_back(message);
        } else {
            self.hear(to, message);
            self.wake_later(to);
        }
    }

    fn hear(&mut self, process: Process, message: Message) {
        let node = &mut self.nodes[process.node];
        let local = node.clock.read(self.now);
        match message {
            Message::Replica(event, baggage) => self.replica_hears(process, event, baggage),
            Message::Committed { wait, committed } => {
                let Some(committed) = committed else { return };
                let rules = self.broken;
                let (change, again, longest) = (committed.change, committed.again, committed.longest);
                let waiting = &mut node.waits[wait];
                if waiting.revoker.is_none() {
                    waiting.change = Some(change);
                    waiting.revoker = Some(Revoker::with_rules(rules, change, again, longest, local));
                    self.revoker_hears(process, wait, revoker::Event::Tick);
                }
            }
            Message::Revoker { wait, event } => self.revoker_hears(process, wait, event),
            Message::Collector(event) => {
                for action in node.collector.on(event, local) {
                    self.send(process, Request::Collector(action));
                }
            }
        }
    }

    fn replica_hears(&mut self, process: Process, event: replica::Event, baggage: Baggage) {
        if self.dice.one_in(4) {
            self.start_check(process);
        }
        let node = &mut self.nodes[process.node];
        let local = node.clock.read(self.now);
        let actions = node.replica.on(event, local);
        node.baggage = baggage;
        node.todo.extend(actions);
        self.go_on(process);
    }

    fn revoker_hears(&mut self, process: Process, wait: usize, event: revoker::Event) {
        let node = &mut self.nodes[process.node];
        let Wait { key, since, change, .. } = node.waits[wait];
        let local = node.clock.read(self.now);
        let (Some(revoker), Some(change)) = (&mut node.waits[wait].revoker, change) else { return };
        for action in revoker.on(event, local) {
            match action {
                revoker::Action::List { attempt } => {
                    self.send(process, Request::List { wait, attempt, change });
                }
                revoker::Action::Return(revoker::Outcome::Complete(report)) => {
                    assert!(report.complete);
                    let fast = report.complete_by.is_none_or(|by| local < by);
                    self.revoke_returns_ok((key, since), change, fast);
                }
                revoker::Action::Return(revoker::Outcome::Lost) => self.tally.lost += 1,
            }
        }
    }

    /// Does what the replica wants done, step by step, until something comes between two steps.
    pub(super) fn go_on(&mut self, process: Process) {
        loop {
            while self.nodes[process.node].runs()
                && let Some(action) = self.nodes[process.node].todo.pop_front()
            {
                self.perform(process, action);
                self.probe(process.node);
                if self.faults.now(self.now) && self.dice.one_in(12) {
                    let wait = match self.dice.below(8) {
                        0 => self.dice.between(0, self.faults.beat / 2),
                        _ => self.dice.between(0, 20_000),
                    };
                    // While it is at it, further events wait.
                    if !self.nodes[process.node].todo.is_empty() {
                        self.after(wait, What::Step(process));
                        return;
                    }
                }
            }
            if !self.nodes[process.node].runs() {
                return;
            }
            let inbox = &mut self.nodes[process.node].inbox;
            let Some(at) = inbox.iter().position(|message| matches!(message, Message::Replica(..))) else {
                break;
            };
            if let Some(message) = inbox.remove(at) {
                return self.hear(process, message);
            }
        }
        self.wake_later(process);
    }

    fn perform(&mut self, process: Process, action: replica::Action) {
        let at = process.node;
        note!(self, "node {at}: {action:?}");
        let node = &mut self.nodes[at];
        match action {
            replica::Action::Apply { attempt } => {
                let Baggage::Changes(of, changes) = &node.baggage else { panic!("no changes at hand") };
                assert_eq!(attempt, *of);
                changes.iter().for_each(|change| node.keys.apply(change.key, change.kind));
            }
            replica::Action::Adopt { attempt } => {
                let Baggage::Snapshot(of, keys) = &node.baggage else { panic!("no snapshot at hand") };
                assert_eq!(attempt, *of);
                node.keys = *keys;
                self.tally.snapshots += 1;
            }
            replica::Action::Publish { deadline, .. } => {
                let lapsed = node.deadline != Boottime::PASSED && !node.is_fresh(self.now);
                self.tally.lapses += u64::from(lapsed);
                node.deadline = deadline;
            }
            replica::Action::StopAllowing => {
                node.deadline = Boottime::PASSED;
                self.tally.stops += 1;
            }
            replica::Action::EnterRegressed { .. } => self.tally.regressed += 1,
            replica::Action::ReportFrozenClock { .. } => self.tally.frozen += 1,
            replica::Action::Abandon { .. } => self.tally.timeouts += 1,
            replica::Action::Renew(_) => {
                self.send(process, Request::Replica(action));
                self.aim_at_sender(at);
            }
            replica::Action::Load { attempt } => {
                self.send(process, Request::Replica(action));
                // Whoever reads a snapshot notices that it stalls.
                let stalled = Message::Replica(replica::Event::Failed { attempt }, Baggage::None);
                self.after(self.faults.beat / 2, What::Deliver(process, stalled));
            }
            replica::Action::Register { .. } | replica::Action::Leave { .. } => {
                self.send(process, Request::Replica(action));
            }
        }
    }

    pub(super) fn tick(&mut self, process: Process) {
        let node = &mut self.nodes[process.node];
        node.tick_at = Micros::MAX;
        if node.paused {
            return;
        }
        let local = node.clock.read(self.now);
        let due = |wake: Option<Boottime>| wake.is_some_and(|wake| wake <= local);
        for wait in 0..node.waits.len() {
            let node = &self.nodes[process.node];
            if node.waits[wait].revoker.as_ref().is_some_and(|revoker| due(revoker.wake_at())) {
                self.revoker_hears(process, wait, revoker::Event::Tick);
            }
        }
        if due(self.nodes[process.node].collector.wake_at()) {
            self.hear(process, Message::Collector(collector::Event::Tick));
        }
        let node = &self.nodes[process.node];
        if due(node.replica.wake_at()) && node.todo.is_empty() {
            self.replica_hears(process, replica::Event::Tick, Baggage::None);
        }
        let again = self.nodes[process.node].wake_at().is_some_and(|at| at <= self.now);
        assert!(!again || self.broken.0.is_some(), "a tick at {} leaves something due", self.now);
        self.wake_later(process);
    }

    fn wake_later(&mut self, process: Process) {
        let node = &self.nodes[process.node];
        let Some(at) = node.wake_at() else { return };
        // A timer fires late, never early.
        let at = at.max(self.now) + 500;
        if at < node.tick_at {
            self.nodes[process.node].tick_at = at;
            self.after(at - self.now, What::Tick(process));
        }
    }

    /// Lets a node hear this now, before anything else.
    pub(super) fn happen_at_once(&mut self, node: usize, message: Message) {
        self.deliver(self.process(node), message);
    }

    pub(super) fn resume(&mut self, process: Process) {
        let node = &mut self.nodes[process.node];
        if !node.paused {
            return;
        }
        note!(self, "node {} goes on", process.node);
        node.paused = false;
        // A Check that came in meanwhile is answered before anything is heard.
        self.probe(process.node);
        for check in std::mem::take(&mut self.nodes[process.node].checks) {
            self.end_check(process, check);
        }
        let messages = std::mem::take(&mut self.nodes[process.node].inbox);
        if !self.nodes[process.node].todo.is_empty() {
            self.after(0, What::Step(process));
        }
        for message in messages {
            self.after(0, What::Deliver(process, message));
        }
        // What came meanwhile, or what is due: either may be first.
        let wait = if self.dice.one_in(2) { 0 } else { 100 };
        self.nodes[process.node].tick_at = self.now + wait;
        self.after(wait, What::Tick(process));
    }
}
