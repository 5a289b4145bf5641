//! What is between the processes and the database, and what the database answers: late, twice, or never.

use keyward::domain::lease::{
    Incarnation, collector,
    replica::{self, Renewal, Reply},
    revoker,
};

use super::{
    database::Entry,
    node::{Baggage, Message, Process, Request},
    world::{What, World, note},
};

impl World {
    pub(super) fn send(&mut self, from: Process, request: Request) {
        let copies = if self.faults.now(self.now) && self.dice.one_in(100) { 2 } else { 1 };
        for _ in 0..copies {
            let wait = self.faults.delay(self.now, &mut self.dice);
            let lost = self.nodes[from.node].cut.0 > self.now || self.faults.loses(self.now, &mut self.dice);
            // What is held up by a cut may still arrive when it heals.
            let wait = match lost {
                true if self.dice.one_in(3) => self.nodes[from.node].cut.0.saturating_sub(self.now) + wait,
                true => continue,
                false => wait,
            };
            self.after(wait, What::Arrive(from, request.clone(), self.db.incarnation));
        }
    }

    pub(super) fn answer(&mut self, to: Process, message: Message) {
        let copies = if self.faults.now(self.now) && self.dice.one_in(100) { 2 } else { 1 };
        for _ in 0..copies {
            let wait = self.faults.delay(self.now, &mut self.dice);
            let cut = self.nodes[to.node].cut.1;
            if cut <= self.now && !self.faults.loses(self.now, &mut self.dice) {
                self.after(wait, What::Deliver(to, message.clone()));
            } else if self.dice.one_in(3) {
                self.after(cut.saturating_sub(self.now) + wait, What::Deliver(to, message.clone()));
            }
        }
    }

    /// Tells who listens that something was committed. It is a hint, and may be lost.
    pub(super) fn notify(&mut self) {
        for node in 0..self.nodes.len() {
            let deaf = self.nodes[node].cut.1 > self.now || self.faults.is_deaf(node);
            if self.nodes[node].up && !deaf && !self.faults.loses(self.now, &mut self.dice) {
                let wait = self.faults.delay(self.now, &mut self.dice);
                let hint = Message::Replica(replica::Event::Hint, Baggage::None);
                self.after(wait, What::Deliver(self.process(node), hint));
            }
        }
    }

    /// Tells who waits that replicas seem to have acknowledged it. It is a hint: it may be lost, and mostly it is not true.
    fn tell_revokers(&mut self) {
        for node in 0..self.nodes.len() {
            for wait in 0..self.nodes[node].waits.len() {
                let waits =
                    self.nodes[node].waits[wait].revoker.as_ref().and_then(|revoker| revoker.wake_at());
                if waits.is_some() && self.nodes[node].up && !self.faults.loses(self.now, &mut self.dice) {
                    let delay = self.faults.delay(self.now, &mut self.dice);
                    let hint = Message::Revoker { wait, event: revoker::Event::Hint };
                    self.after(delay, What::Deliver(self.process(node), hint));
                }
            }
        }
    }

    pub(super) fn arrive(&mut self, from: Process, request: Request, sent_in: Incarnation) {
        // A pooler may hand a request to the next primary; a connection of its own breaks.
        let broken_off = sent_in != self.db.incarnation && self.dice.one_in(2);
        if self.now < self.down_until || broken_off {
            if let Some(message) = refused(&request)
                && self.dice.one_in(2)
            {
                self.answer(from, message);
            }
            return;
        }
        match request {
            Request::Replica(action) => self.arrive_from_replica(from, action),
            Request::Revoke { wait, key } => {
                let committed = self.db.revoke(key);
                note!(self, "database: revoke key {key}: {committed:?}");
                if committed.is_some_and(|committed| !committed.again) {
                    self.notify();
                }
                self.answer(from, Message::Committed { wait, committed });
            }
            Request::List { wait, attempt, change } => {
                let (listing, link) = (self.db.list(self.now), self.db.link(change.revision));
                let event = revoker::Event::Listed { attempt, listing, link };
                self.answer(from, Message::Revoker { wait, event });
            }
            Request::Collector(collector::Action::List { attempt }) => {
                let event = collector::Event::Listed { attempt, listing: self.db.list(self.now) };
                self.answer(from, Message::Collector(event));
            }
            Request::Collector(collector::Action::Remove { id, renew_seq }) => {
                if self.db.remove(id, renew_seq) {
                    note!(self, "database: node {} removes {id:?} at {renew_seq}", from.node);
                    self.tally.collected += 1;
                }
            }
        }
    }

    fn arrive_from_replica(&mut self, from: Process, action: replica::Action) {
        let (event, baggage) = match action {
            replica::Action::Register { attempt } => {
                self.ids += 1;
                let id = self.db.register(self.ids, self.now);
                self.nodes[from.node].rows.push((from.life, id));
                note!(self, "database: node {} registers as {id:?}", from.node);
                (replica::Event::Registered { attempt, id }, Baggage::None)
            }
            replica::Action::Load { attempt } => {
                let snapshot = Baggage::Snapshot(attempt, self.db.keys);
                (replica::Event::Loaded { attempt, at: self.db.head() }, snapshot)
            }
            replica::Action::Renew(renewal) => {
                let (reply, changes) = self.db.read(&renewal, self.now);
                let wait = match self.aim_at_joining(&renewal) {
                    true => self.dice.between(5_000, 50_000),
                    false => self.faults.commit_takes(self.now, &mut self.dice),
                };
                self.after(wait, What::CommitRenewal(from, renewal, reply, changes));
                return;
            }
            replica::Action::Leave { id } => {
                self.db.rows.retain(|row| row.id != id);
                return;
            }
            other => panic!("{other:?} is not for the database"),
        };
        self.answer(from, Message::Replica(event, baggage));
    }

    pub(super) fn commit_renewal(
        &mut self,
        from: Process,
        renewal: Renewal,
        read: Reply,
        changes: Vec<Entry>,
    ) {
        let attempt = renewal.attempt;
        if self.now < self.down_until || read.incarnation != self.db.incarnation {
            // It died with the database that it ran in.
            self.answer(from, Message::Replica(replica::Event::Failed { attempt }, Baggage::None));
            return;
        }
        let reply = Reply { renewed: self.db.commit(&renewal, self.broken, self.now), ..read };
        note!(self, "database: node {} has renewed {renewal:?}: {reply:?}", from.node);
        let baggage = Baggage::Changes(attempt, changes);
        self.answer(from, Message::Replica(replica::Event::Renewed { attempt, reply }, baggage));
        self.tell_revokers();
        self.aim_at_renewed(from.node);
    }
}

/// What a client hears that was refused a connection.
fn refused(request: &Request) -> Option<Message> {
    let message = match *request {
        Request::Replica(
            replica::Action::Register { attempt }
            | replica::Action::Load { attempt }
            | replica::Action::Renew(replica::Renewal { attempt, .. }),
        ) => Message::Replica(replica::Event::Failed { attempt }, Baggage::None),
        Request::List { wait, attempt, .. } => {
            Message::Revoker { wait, event: revoker::Event::Failed { attempt } }
        }
        Request::Collector(collector::Action::List { attempt }) => {
            Message::Collector(collector::Event::Failed { attempt })
        }
        Request::Replica(_) | Request::Revoke { .. } | Request::Collector(_) => return None,
    };
    Some(message)
}
