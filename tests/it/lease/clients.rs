//! What clients do, and what they may conclude.
//!
//! Nothing happens between two events, so a stale ALLOW that is possible at all is possible right after an event.
//! After every step of a node, and on every node when a Revoke returns OK, the world asks whether a Check that
//! starts now would allow a key whose Revoke has returned OK. That finds what any number of Checks would. Only a
//! Check whose two halves are apart needs to be played out, and many are.

use keyward::domain::lease::{InvariantSet as _, LeaseInvariant, LogPosition};

use super::{
    database::KeyChangeKind,
    dice::Micros,
    sim_node::{DatabaseRequest, InFlightCheck, PendingRevoke, ProcessId},
    simulation::{SimEvent, Simulation, trace_line},
};

impl Simulation {
    pub(super) fn create(&mut self) {
        if self.keys_made < 64 && self.now >= self.down_until {
            self.db.append(self.keys_made, KeyChangeKind::Created);
            self.keys_made += 1;
            self.notify();
        }
        if let Some(wait) = self.faults.next_create(self.now, &mut self.dice) {
            self.schedule_after(wait, SimEvent::Create);
        }
    }

    pub(super) fn revoke_some(&mut self) {
        if let Some(wait) = self.faults.next_revoke(self.now, &mut self.dice) {
            self.schedule_after(wait, SimEvent::Revoke);
        }
        let Some(key) = self.dice.bit(self.db.keys.live) else { return };
        self.revoke(key);
        if self.dice.one_chance_in(3) {
            let wait = self.dice.between(0, self.faults.mean_interval / 3);
            self.schedule_after(wait, SimEvent::RevokeAgain(key));
        }
    }

    pub(super) fn revoke(&mut self, key: u8) {
        let running: Vec<_> = (0..self.nodes.len()).filter(|&node| self.nodes[node].runs()).collect();
        if running.is_empty() {
            return;
        }
        let node = self.dice.pick(&running);
        let wait = self.nodes[node].waits.len();
        trace_line!(self, "Revoke key {key} at node {node}");
        self.nodes[node].waits.push(PendingRevoke { key, since: self.now, change: None, revoker: None });
        self.send(self.process(node), DatabaseRequest::Revoke { wait, key });
    }

    pub(super) fn revoke_returns_ok(&mut self, (key, since): (u8, Micros), change: LogPosition, fast: bool) {
        self.slowest_revoke = self.slowest_revoke.max(self.now - since);
        if fast {
            self.tally.fast += 1;
        } else {
            self.tally.slow += 1;
        }
        trace_line!(
            self,
            "Revoke key {key} returns OK ({})",
            if fast { "acknowledged" } else { "waited out" }
        );
        // What the database has lost after it had acknowledged it is outside the promise.
        if self.db.link(change.revision) == Some(change.hash) {
            self.denied |= 1 << key;
        }
        for node in 0..self.nodes.len() {
            self.probe(node);
        }
    }

    /// Whether a Check that starts now on this node breaks the promise.
    pub(super) fn probe(&mut self, at: usize) {
        let node = &self.nodes[at];
        let stale = node.keys.live & self.denied;
        if node.runs() && stale != 0 && node.is_fresh(self.now) {
            self.violation = Some(format!("node {at} allows key {}", stale.trailing_zeros()));
        }
        self.tally.probes += 1;
    }

    /// Starts a Check whose halves are apart: most of all of a key that must be refused.
    pub(super) fn start_check(&mut self, process: ProcessId) {
        let node = &self.nodes[process.node];
        let stale = node.keys.live & self.denied;
        let Some(key) = self.dice.bit(if stale != 0 { stale } else { node.keys.live }) else { return };
        let saw = match self.rules.enforces(LeaseInvariant::DeadlineBeforeLookUp) {
            true => node.is_fresh(self.now),
            false => true,
        };
        let check = InFlightCheck { key, denied: self.denied, saw };
        let wait = match self.dice.below(4) {
            0 => 0,
            1 | 2 => self.dice.between(0, 20_000),
            _ => self.dice.between(0, self.faults.mean_interval),
        };
        self.schedule_after(wait, SimEvent::EndCheck(process, check));
    }

    pub(super) fn end_check(&mut self, process: ProcessId, check: InFlightCheck) {
        let node = &mut self.nodes[process.node];
        if node.paused {
            node.checks.push(check);
            return;
        }
        let second = match self.rules.enforces(LeaseInvariant::DeadlineBeforeLookUp) {
            true => node.keys.live >> check.key & 1 == 1,
            false => node.is_fresh(self.now),
        };
        let allows = check.saw && second;
        self.tally.allowed += u64::from(allows);
        if allows && (check.denied & self.denied) >> check.key & 1 == 1 {
            self.violation = Some(format!("a slow Check on node {} allows key {}", process.node, check.key));
        }
    }
}
