//! What goes wrong in a schedule: the weather, the accidents, and an operator who does what the manual says.

use std::time::Duration;

use keyward::domain::lease::{
    Incarnation, LeaseDuration, ReplicaRow,
    replica::{self, RenewalRequest},
};

use super::{
    database::{KeyChangeKind, KeySets, SimDatabase},
    dice::{Micros, ScheduleRng},
    sim_node::{AnswerPayload, NodeMessage},
    simulation::{SimEvent, Simulation, trace_line},
};

/// An accident.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FaultKind {
    /// Nothing gets through between a node and the database: to it, back, or both ways.
    Cut,
    /// A process stands still (SIGSTOP, swapping).
    Pause,
    /// A process is killed and started again.
    Crash,
    /// A process ends in order and is started again.
    Stop,
    /// The database is away for a while.
    Down,
    /// Another machine takes the database over, with every commit.
    FailOver,
    /// The same, but rows of replicas are lost.
    LoseRows,
    /// A backup is taken.
    Backup,
    /// The backup is restored: commits are lost.
    Restore,
    /// The database's wall clock is set.
    StepWall,
    /// The network is slow.
    Slow,
    /// The operator makes the lease longer or shorter.
    ChangeLease,
    /// The operator accepts that the database goes on from an older state.
    Accept,
    /// The operator attests that a process is dead.
    AttestDead,
}

const ALL: [FaultKind; 14] = [
    FaultKind::Cut,
    FaultKind::Pause,
    FaultKind::Crash,
    FaultKind::Stop,
    FaultKind::Down,
    FaultKind::FailOver,
    FaultKind::LoseRows,
    FaultKind::Backup,
    FaultKind::Restore,
    FaultKind::StepWall,
    FaultKind::Slow,
    FaultKind::ChangeLease,
    FaultKind::Accept,
    FaultKind::AttestDead,
];

pub(super) struct FaultPlan {
    /// About a lease: what is long and what is short in this schedule.
    pub(super) mean_interval: Micros,
    /// When the faults and the changes end.
    pub(super) until: Micros,
    kinds: Vec<FaultKind>,
    /// Whether faults also strike when it hurts most.
    aims: bool,
    /// One message in so many is lost.
    loss: u64,
    /// The nodes that no notification reaches, as bits.
    deaf_nodes: u64,
    slow_until: Micros,
    backup: Option<Box<SimDatabase>>,
    lives: u128,
    /// The time between two changes, about.
    message_delay: Micros,
}

impl FaultPlan {
    /// Some of the faults, as the dice fall.
    pub(super) fn random(dice: &mut ScheduleRng, beat: Micros, until: Micros) -> FaultPlan {
        let mut kinds: Vec<_> = ALL.into_iter().filter(|_| dice.one_chance_in(2)).collect();
        // The two that most schedules should have, so that leases run out and revokes wait.
        kinds.extend([FaultKind::Cut, FaultKind::Pause]);
        if kinds.contains(&FaultKind::Restore) {
            kinds.push(FaultKind::Backup);
        }
        let aims = dice.one_chance_in(2);
        let loss = dice.pick(&[20, 100, 100, 1000]);
        let deaf = dice.below(1 << 8) & dice.below(1 << 8);
        FaultPlan { kinds, aims, loss, deaf_nodes: deaf, ..FaultPlan::without_faults(beat, until) }
    }

    /// None at all; changes are made until then.
    pub(super) fn without_faults(beat: Micros, until: Micros) -> FaultPlan {
        let kinds = Vec::new();
        let (loss, deaf, slow_until) = (u64::MAX, 0, 0);
        let (aims, backup, lives, pace) = (false, None, 1, beat / 4);
        FaultPlan {
            mean_interval: beat,
            until,
            kinds,
            aims,
            loss,
            deaf_nodes: deaf,
            slow_until,
            backup,
            lives,
            message_delay: pace,
        }
    }

    /// Whether this is among them.
    pub(super) fn include(&self, fault: FaultKind) -> bool {
        self.kinds.contains(&fault)
    }

    /// Whether things go wrong at this time.
    pub(super) fn is_active(&self, at: Micros) -> bool {
        at < self.until && !self.kinds.is_empty()
    }

    pub(super) fn is_deaf(&self, node: usize) -> bool {
        self.deaf_nodes >> node & 1 == 1
    }

    pub(super) fn loses(&self, at: Micros, dice: &mut ScheduleRng) -> bool {
        self.is_active(at) && dice.one_chance_in(self.loss)
    }

    /// How long a message takes.
    pub(super) fn delay(&self, at: Micros, dice: &mut ScheduleRng) -> Micros {
        if !self.is_active(at) {
            return dice.between(150, 900);
        }
        let longest = match dice.below(100) {
            0..70 => 2_000,
            70..90 => 20_000,
            90..98 => self.mean_interval / 6,
            _ => self.mean_interval * 2,
        };
        let slower = if at < self.slow_until { 8 } else { 1 };
        dice.between(150, longest) * slower
    }

    /// How long the database takes to commit what it has read for.
    pub(super) fn commit_takes(&self, at: Micros, dice: &mut ScheduleRng) -> Micros {
        match if self.is_active(at) { dice.below(20) } else { 1 } {
            0 => dice.between(0, self.mean_interval / 3),
            1..10 => dice.between(0, 400),
            _ => dice.between(0, 8_000),
        }
    }

    pub(super) fn next_create(&self, at: Micros, dice: &mut ScheduleRng) -> Option<Micros> {
        (at < self.until).then(|| dice.between(self.message_delay / 8, self.message_delay))
    }

    pub(super) fn next_revoke(&self, at: Micros, dice: &mut ScheduleRng) -> Option<Micros> {
        (at < self.until).then(|| dice.between(self.message_delay / 8, self.message_delay * 3 / 2))
    }
}

impl Simulation {
    pub(super) fn fault(&mut self) {
        if !self.faults.is_active(self.now) {
            return;
        }
        let beat = self.faults.mean_interval;
        let next = self.dice.between(beat / 40, beat / 2);
        self.schedule_after(next, SimEvent::Fault);
        let fault = self.dice.pick(&self.faults.kinds);
        let node = self.dice.below(self.nodes.len() as u64) as usize;
        trace_line!(self, "fault: {fault:?} (node {node})");
        match fault {
            FaultKind::Cut => self.cut(node),
            FaultKind::Pause => self.pause(node),
            FaultKind::Crash => self.crash(node),
            FaultKind::Stop => self.stop(node),
            FaultKind::Down => self.down_until = self.now + self.dice.between(beat / 100, beat * 3 / 2),
            FaultKind::FailOver => self.fail_over(),
            FaultKind::LoseRows => {
                self.fail_over();
                let lost = self.dice.pick(&[1, 2]);
                let dice = &mut self.dice;
                self.db.rows.retain(|_| !dice.one_chance_in(lost));
            }
            FaultKind::Backup => self.faults.backup = Some(Box::new(self.db.clone())),
            FaultKind::Restore => self.restore(),
            FaultKind::StepWall => {
                let by = self.dice.between(0, 20 * beat) as i64;
                self.db.step_wall(by - 5 * beat as i64);
            }
            FaultKind::Slow => self.faults.slow_until = self.now + self.dice.between(0, beat),
            FaultKind::ChangeLease => self.change_lease(),
            FaultKind::Accept => (0..self.nodes.len()).for_each(|node| self.accept_regression(node)),
            FaultKind::AttestDead => self.attest_dead(),
        }
    }

    fn cut(&mut self, node: usize) {
        let until =
            self.now + self.dice.between(self.faults.mean_interval / 20, self.faults.mean_interval * 3);
        let cut = &mut self.nodes[node].cut;
        match self.dice.below(4) {
            0 => cut.0 = until,
            1 => cut.1 = until,
            _ => *cut = (until, until),
        }
    }

    fn pause(&mut self, node: usize) {
        if self.nodes[node].runs() {
            self.nodes[node].paused = true;
            let wait = self.dice.between(self.faults.mean_interval / 100, self.faults.mean_interval * 5 / 2);
            self.schedule_after(wait, SimEvent::Resume(self.process(node)));
        }
    }

    fn crash(&mut self, node: usize) {
        if self.nodes[node].up {
            // A process reads the lease when it starts; here, a little earlier.
            self.nodes[node].die(self.rules, self.db.lease);
            let wait = self.dice.between(1_000, self.faults.mean_interval / 2);
            self.schedule_after(wait, SimEvent::Start(node));
        }
    }

    fn stop(&mut self, node: usize) {
        if self.nodes[node].runs() && self.nodes[node].todo.is_empty() {
            let stop = NodeMessage::Replica(replica::ReplicaEvent::Stop, AnswerPayload::None);
            self.happen_at_once(node, stop);
            self.crash(node);
        }
    }

    /// One life of the database ends and another begins.
    fn next_life(&mut self) -> Incarnation {
        self.faults.lives += 1;
        self.down_until = self.now + self.dice.between(1_000, self.faults.mean_interval);
        Incarnation(self.faults.lives)
    }

    fn fail_over(&mut self) {
        let incarnation = self.next_life();
        self.db.fail_over(incarnation);
    }

    fn restore(&mut self) {
        let Some(backup) = self.faults.backup.clone() else { return };
        let incarnation = self.next_life();
        self.db.restore(*backup, incarnation);
        self.tally.restores += 1;
        // What the database has lost is outside the promise.
        self.denied &= self.db.keys.revoked;
    }

    /// Longer at once; shorter in two steps.
    fn change_lease(&mut self) {
        let Some(length) = self.db.lease.length() else { return };
        if self.db.lease != self.db.longest {
            return;
        }
        // A restored lease that is shorter than one already granted would have to be waited out by hand.
        self.faults.backup = None;
        let factor = self.dice.pick(&[2, 3]);
        if length.as_micros() as Micros <= self.faults.mean_interval {
            let longer = LeaseDuration::from_duration(length * factor).unwrap();
            (self.db.lease, self.db.longest) = (longer, longer);
        } else if let Some(shorter) = LeaseDuration::from_duration(length / factor) {
            let wait = self.db.lease.expiry_wait().unwrap();
            self.db.lease = shorter;
            // By a clock that runs 10 % fast.
            self.schedule_after(wait.as_micros() as u64 * 10 / 11, SimEvent::FinishLeaseChange(shorter));
        }
    }

    /// What `accept-regression` does: the tombstones that a replica has kept go into the log again.
    fn accept_regression(&mut self, node: usize) {
        if self.nodes[node].runs() && self.nodes[node].replica.state() == replica::ReplicaState::Regressed {
            while let Some(key) = self.dice.bit(self.db.keys.live & self.nodes[node].keys.revoked) {
                self.db.append(key, KeyChangeKind::Revoked);
            }
            let accepted =
                NodeMessage::Replica(replica::ReplicaEvent::RegressionAccepted, AnswerPayload::None);
            self.happen_at_once(node, accepted);
        }
    }

    /// Removes the rows of processes that are really dead.
    fn attest_dead(&mut self) {
        let alive = self.nodes.iter().filter(|node| node.up);
        let alive: Vec<_> = alive
            .flat_map(|node| node.rows.iter().filter(|(life, _)| *life == node.life).map(|(_, id)| *id))
            .collect();
        self.db.rows.retain(|row| alive.contains(&row.id));
    }

    /// A process stands still between a renewal's sending and its answer.
    pub(super) fn aim_at_sender(&mut self, node: usize) {
        if self.faults.aims && self.faults.is_active(self.now) && self.dice.one_chance_in(40) {
            self.pause(node);
        }
    }

    /// A replica falls silent just when it has got a lease, and just then a key is revoked elsewhere.
    pub(super) fn aim_at_renewed(&mut self, node: usize) {
        if self.faults.aims && self.faults.is_active(self.now) && self.dice.one_chance_in(40) {
            trace_line!(self, "fault: node {node} is cut off after this");
            let until =
                self.now + self.dice.between(self.faults.mean_interval / 2, self.faults.mean_interval * 3);
            self.nodes[node].cut = (until, until);
            if let Some(key) = self.dice.bit(self.db.keys.live) {
                let wait = self.dice.between(0, 10_000);
                self.schedule_after(wait, SimEvent::RevokeAgain(key));
            }
        }
    }

    /// A key is revoked just when a replica asks for its first lease; whether so.
    pub(super) fn aim_at_joining(&mut self, renewal: &RenewalRequest) -> bool {
        let asks =
            |row: &ReplicaRow| row.id == renewal.id && row.applied.is_none() && renewal.applied.is_some();
        let aims = self.faults.aims && self.faults.is_active(self.now) && self.db.rows.iter().any(asks);
        let Some(key) = self.dice.bit(self.db.keys.live) else { return false };
        if aims && self.dice.one_chance_in(2) {
            self.schedule_after(200, SimEvent::RevokeAgain(key));
            return true;
        }
        false
    }

    /// The faults are over: everything works again, and the operator does what is due. Gives the keys as every
    /// replica must know them by the end.
    pub(super) fn heal(&mut self) -> KeySets {
        trace_line!(self, "the faults are over");
        self.down_until = 0;
        self.attest_dead();
        for node in 0..self.nodes.len() {
            self.nodes[node].cut = (0, 0);
            self.schedule_after(0, SimEvent::Resume(self.process(node)));
            self.schedule_after(0, SimEvent::Start(node));
        }
        // Until whoever waits for a lost answer has given up, and has heard what the database is now.
        let longest = self.db.longest;
        let patience = longest.request_timeout() + longest.renew_interval() + Duration::from_millis(300);
        self.run_until(self.now + patience.as_micros() as Micros * 10 / 9 + self.faults.mean_interval / 2);
        (0..self.nodes.len()).for_each(|node| self.accept_regression(node));
        let keys = self.db.keys;
        self.run_until(self.now + longest.renew_interval().as_micros() as Micros * 10 / 9 + 300_000);
        keys
    }
}
