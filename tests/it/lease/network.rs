//! What is between the processes and the database, and what the database answers: late, twice, or never.

use keyward::domain::lease::{
    Incarnation, collector, propagation_tracker,
    replica::{self, RenewalReply, RenewalRequest},
};

use super::{
    database::SimLogEntry,
    sim_node::{AnswerPayload, DatabaseRequest, NodeMessage, ProcessId},
    simulation::{SimEvent, Simulation, trace_line},
};

impl Simulation {
    pub(super) fn send(&mut self, from: ProcessId, request: DatabaseRequest) {
        let copies = if self.faults.is_active(self.now) && self.dice.one_chance_in(100) { 2 } else { 1 };
        for _ in 0..copies {
            let wait = self.faults.delay(self.now, &mut self.dice);
            let lost = self.nodes[from.node].cut.0 > self.now || self.faults.loses(self.now, &mut self.dice);
            // What is held up by a cut may still arrive when it heals.
            let wait = match lost {
                true if self.dice.one_chance_in(3) => {
                    self.nodes[from.node].cut.0.saturating_sub(self.now) + wait
                }
                true => continue,
                false => wait,
            };
            self.schedule_after(wait, SimEvent::Arrive(from, request.clone(), self.db.incarnation));
        }
    }

    pub(super) fn answer(&mut self, to: ProcessId, message: NodeMessage) {
        let copies = if self.faults.is_active(self.now) && self.dice.one_chance_in(100) { 2 } else { 1 };
        for _ in 0..copies {
            let wait = self.faults.delay(self.now, &mut self.dice);
            let cut = self.nodes[to.node].cut.1;
            if cut <= self.now && !self.faults.loses(self.now, &mut self.dice) {
                self.schedule_after(wait, SimEvent::Deliver(to, message.clone()));
            } else if self.dice.one_chance_in(3) {
                self.schedule_after(
                    cut.saturating_sub(self.now) + wait,
                    SimEvent::Deliver(to, message.clone()),
                );
            }
        }
    }

    /// Tells who listens that something was committed. It is a hint, and may be lost.
    pub(super) fn notify(&mut self) {
        for node in 0..self.nodes.len() {
            let deaf = self.nodes[node].cut.1 > self.now || self.faults.is_deaf(node);
            if self.nodes[node].up && !deaf && !self.faults.loses(self.now, &mut self.dice) {
                let wait = self.faults.delay(self.now, &mut self.dice);
                let hint = NodeMessage::Replica(replica::ReplicaEvent::Hint, AnswerPayload::None);
                self.schedule_after(wait, SimEvent::Deliver(self.process(node), hint));
            }
        }
    }

    /// Tells who waits that replicas seem to have acknowledged it. It is a hint: it may be lost, and mostly it is not true.
    fn notify_revokers(&mut self) {
        for node in 0..self.nodes.len() {
            for wait in 0..self.nodes[node].waits.len() {
                let waits =
                    self.nodes[node].waits[wait].revoker.as_ref().and_then(|revoker| revoker.wake_at());
                if waits.is_some() && self.nodes[node].up && !self.faults.loses(self.now, &mut self.dice) {
                    let delay = self.faults.delay(self.now, &mut self.dice);
                    let hint =
                        NodeMessage::Revoker { wait, event: propagation_tracker::PropagationEvent::Hint };
                    self.schedule_after(delay, SimEvent::Deliver(self.process(node), hint));
                }
            }
        }
    }

    pub(super) fn handle_request(&mut self, from: ProcessId, request: DatabaseRequest, sent_in: Incarnation) {
        // A pooler may hand a request to the next primary; a connection of its own breaks.
        let broken_off = sent_in != self.db.incarnation && self.dice.one_chance_in(2);
        if self.now < self.down_until || broken_off {
            if let Some(message) = refused(&request)
                && self.dice.one_chance_in(2)
            {
                self.answer(from, message);
            }
            return;
        }
        match request {
            DatabaseRequest::Replica(action) => self.handle_replica_request(from, action),
            DatabaseRequest::Revoke { wait, key } => {
                let committed = self.db.revoke(key);
                trace_line!(self, "database: revoke key {key}: {committed:?}");
                if committed.is_some_and(|committed| !committed.again) {
                    self.notify();
                }
                self.answer(from, NodeMessage::Committed { wait, committed });
            }
            DatabaseRequest::List { wait, attempt, change } => {
                let (listing, link) = (self.db.list(self.now), self.db.link(change.revision));
                let event =
                    propagation_tracker::PropagationEvent::Listed { attempt, listing, change_hash: link };
                self.answer(from, NodeMessage::Revoker { wait, event });
            }
            DatabaseRequest::Collector(collector::CollectorAction::ListRows { attempt }) => {
                let event = collector::CollectorEvent::Listed { attempt, listing: self.db.list(self.now) };
                self.answer(from, NodeMessage::Collector(event));
            }
            DatabaseRequest::Collector(collector::CollectorAction::RemoveRow { id, renew_seq }) => {
                if self.db.remove(id, renew_seq) {
                    trace_line!(self, "database: node {} removes {id:?} at {renew_seq}", from.node);
                    self.tally.collected += 1;
                }
            }
        }
    }

    fn handle_replica_request(&mut self, from: ProcessId, action: replica::ReplicaAction) {
        let (event, baggage) = match action {
            replica::ReplicaAction::Register { attempt } => {
                self.ids += 1;
                let id = self.db.register(self.ids, self.now);
                self.nodes[from.node].rows.push((from.life, id));
                trace_line!(self, "database: node {} registers as {id:?}", from.node);
                (replica::ReplicaEvent::Registered { attempt, id }, AnswerPayload::None)
            }
            replica::ReplicaAction::Load { attempt } => {
                let snapshot = AnswerPayload::Snapshot(attempt, self.db.keys);
                (replica::ReplicaEvent::Loaded { attempt, at: self.db.head() }, snapshot)
            }
            replica::ReplicaAction::Renew(renewal) => {
                let (reply, changes) = self.db.read(&renewal, self.now);
                let wait = match self.aim_at_joining(&renewal) {
                    true => self.dice.between(5_000, 50_000),
                    false => self.faults.commit_takes(self.now, &mut self.dice),
                };
                self.schedule_after(wait, SimEvent::CommitRenewal(from, renewal, reply, changes));
                return;
            }
            replica::ReplicaAction::Deregister { id } => {
                self.db.rows.retain(|row| row.id != id);
                return;
            }
            other => panic!("{other:?} is not for the database"),
        };
        self.answer(from, NodeMessage::Replica(event, baggage));
    }

    pub(super) fn commit_renewal(
        &mut self,
        from: ProcessId,
        renewal: RenewalRequest,
        read: RenewalReply,
        changes: Vec<SimLogEntry>,
    ) {
        let attempt = renewal.attempt;
        if self.now < self.down_until || read.incarnation != self.db.incarnation {
            // It died with the database that it ran in.
            self.answer(
                from,
                NodeMessage::Replica(replica::ReplicaEvent::Failed { attempt }, AnswerPayload::None),
            );
            return;
        }
        let reply = RenewalReply { was_renewed: self.db.commit(&renewal, self.rules, self.now), ..read };
        trace_line!(self, "database: node {} has renewed {renewal:?}: {reply:?}", from.node);
        let baggage = AnswerPayload::Changes(attempt, changes);
        self.answer(from, NodeMessage::Replica(replica::ReplicaEvent::Renewed { attempt, reply }, baggage));
        self.notify_revokers();
        self.aim_at_renewed(from.node);
    }
}

/// What a client hears that was refused a connection.
fn refused(request: &DatabaseRequest) -> Option<NodeMessage> {
    let message = match *request {
        DatabaseRequest::Replica(
            replica::ReplicaAction::Register { attempt }
            | replica::ReplicaAction::Load { attempt }
            | replica::ReplicaAction::Renew(replica::RenewalRequest { attempt, .. }),
        ) => NodeMessage::Replica(replica::ReplicaEvent::Failed { attempt }, AnswerPayload::None),
        DatabaseRequest::List { wait, attempt, .. } => {
            NodeMessage::Revoker { wait, event: propagation_tracker::PropagationEvent::Failed { attempt } }
        }
        DatabaseRequest::Collector(collector::CollectorAction::ListRows { attempt }) => {
            NodeMessage::Collector(collector::CollectorEvent::Failed { attempt })
        }
        DatabaseRequest::Replica(_) | DatabaseRequest::Revoke { .. } | DatabaseRequest::Collector(_) => {
            return None;
        }
    };
    Some(message)
}
