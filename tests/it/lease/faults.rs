//! What goes wrong in a schedule: the weather, the accidents, and an operator who does what the manual says.

use std::time::Duration;

use keyward::domain::lease::{
    Incarnation, Lease, Row,
    replica::{self, Renewal},
};

use super::{
    database::{Database, Keys, Kind},
    dice::{Dice, Micros},
    node::{Baggage, Message},
    world::{What, World, note},
};

/// An accident.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
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

const ALL: [Fault; 14] = [
    Fault::Cut,
    Fault::Pause,
    Fault::Crash,
    Fault::Stop,
    Fault::Down,
    Fault::FailOver,
    Fault::LoseRows,
    Fault::Backup,
    Fault::Restore,
    Fault::StepWall,
    Fault::Slow,
    Fault::ChangeLease,
    Fault::Accept,
    Fault::AttestDead,
];

pub(super) struct Faults {
    /// About a lease: what is long and what is short in this schedule.
    pub(super) beat: Micros,
    /// When the faults and the changes end.
    pub(super) until: Micros,
    kinds: Vec<Fault>,
    /// Whether faults also strike when it hurts most.
    aims: bool,
    /// One message in so many is lost.
    loss: u64,
    /// The nodes that no notification reaches, as bits.
    deaf: u64,
    slow_until: Micros,
    backup: Option<Box<Database>>,
    lives: u128,
    /// The time between two changes, about.
    pace: Micros,
}

impl Faults {
    /// Some of the faults, as the dice fall.
    pub(super) fn some(dice: &mut Dice, beat: Micros, until: Micros) -> Faults {
        let mut kinds: Vec<_> = ALL.into_iter().filter(|_| dice.one_in(2)).collect();
        // The two that most schedules should have, so that leases run out and revokes wait.
        kinds.extend([Fault::Cut, Fault::Pause]);
        if kinds.contains(&Fault::Restore) {
            kinds.push(Fault::Backup);
        }
        let aims = dice.one_in(2);
        let loss = dice.pick(&[20, 100, 100, 1000]);
        let deaf = dice.below(1 << 8) & dice.below(1 << 8);
        Faults { kinds, aims, loss, deaf, ..Faults::none(beat, until) }
    }

    /// None at all; changes are made until then.
    pub(super) fn none(beat: Micros, until: Micros) -> Faults {
        let kinds = Vec::new();
        let (loss, deaf, slow_until) = (u64::MAX, 0, 0);
        let (aims, backup, lives, pace) = (false, None, 1, beat / 4);
        Faults { beat, until, kinds, aims, loss, deaf, slow_until, backup, lives, pace }
    }

    /// Whether this is among them.
    pub(super) fn include(&self, fault: Fault) -> bool {
        self.kinds.contains(&fault)
    }

    /// Whether things go wrong at this time.
    pub(super) fn now(&self, at: Micros) -> bool {
        at < self.until && !self.kinds.is_empty()
    }

    pub(super) fn is_deaf(&self, node: usize) -> bool {
        self.deaf >> node & 1 == 1
    }

    pub(super) fn loses(&self, at: Micros, dice: &mut Dice) -> bool {
        self.now(at) && dice.one_in(self.loss)
    }

    /// How long a message takes.
    pub(super) fn delay(&self, at: Micros, dice: &mut Dice) -> Micros {
        if !self.now(at) {
            return dice.between(150, 900);
        }
        let longest = match dice.below(100) {
            0..70 => 2_000,
            70..90 => 20_000,
            90..98 => self.beat / 6,
            _ => self.beat * 2,
        };
        let slower = if at < self.slow_until { 8 } else { 1 };
        dice.between(150, longest) * slower
    }

    /// How long the database takes to commit what it has read for.
    pub(super) fn commit_takes(&self, at: Micros, dice: &mut Dice) -> Micros {
        match if self.now(at) { dice.below(20) } else { 1 } {
            0 => dice.between(0, self.beat / 3),
            1..10 => dice.between(0, 400),
            _ => dice.between(0, 8_000),
        }
    }

    pub(super) fn next_create(&self, at: Micros, dice: &mut Dice) -> Option<Micros> {
        (at < self.until).then(|| dice.between(self.pace / 8, self.pace))
    }

    pub(super) fn next_revoke(&self, at: Micros, dice: &mut Dice) -> Option<Micros> {
        (at < self.until).then(|| dice.between(self.pace / 8, self.pace * 3 / 2))
    }
}

impl World {
    pub(super) fn fault(&mut self) {
        if !self.faults.now(self.now) {
            return;
        }
        let beat = self.faults.beat;
        let next = self.dice.between(beat / 40, beat / 2);
        self.after(next, What::Fault);
        let fault = self.dice.pick(&self.faults.kinds);
        let node = self.dice.below(self.nodes.len() as u64) as usize;
        note!(self, "fault: {fault:?} (node {node})");
        match fault {
            Fault::Cut => self.cut(node),
            Fault::Pause => self.pause(node),
            Fault::Crash => self.crash(node),
            Fault::Stop => self.stop(node),
            Fault::Down => self.down_until = self.now + self.dice.between(beat / 100, beat * 3 / 2),
            Fault::FailOver => self.fail_over(),
            Fault::LoseRows => {
                self.fail_over();
                let lost = self.dice.pick(&[1, 2]);
                let dice = &mut self.dice;
                self.db.rows.retain(|_| !dice.one_in(lost));
            }
            Fault::Backup => self.faults.backup = Some(Box::new(self.db.clone())),
            Fault::Restore => self.restore(),
            Fault::StepWall => {
                let by = self.dice.between(0, 20 * beat) as i64;
                self.db.step_wall(by - 5 * beat as i64);
            }
            Fault::Slow => self.faults.slow_until = self.now + self.dice.between(0, beat),
            Fault::ChangeLease => self.change_lease(),
            Fault::Accept => (0..self.nodes.len()).for_each(|node| self.accept_regression(node)),
            Fault::AttestDead => self.attest_dead(),
        }
    }

    fn cut(&mut self, node: usize) {
        let until = self.now + self.dice.between(self.faults.beat / 20, self.faults.beat * 3);
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
            let wait = self.dice.between(self.faults.beat / 100, self.faults.beat * 5 / 2);
            self.after(wait, What::Resume(self.process(node)));
        }
    }

    fn crash(&mut self, node: usize) {
        if self.nodes[node].up {
            // A process reads the lease when it starts; here, a little earlier.
            self.nodes[node].die(self.broken, self.db.lease);
            let wait = self.dice.between(1_000, self.faults.beat / 2);
            self.after(wait, What::Start(node));
        }
    }

    fn stop(&mut self, node: usize) {
        if self.nodes[node].runs() && self.nodes[node].todo.is_empty() {
            let stop = Message::Replica(replica::Event::Stop, Baggage::None);
            self.happen_at_once(node, stop);
            self.crash(node);
        }
    }

    /// One life of the database ends and another begins.
    fn next_life(&mut self) -> Incarnation {
        self.faults.lives += 1;
        self.down_until = self.now + self.dice.between(1_000, self.faults.beat);
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
        if length.as_micros() as Micros <= self.faults.beat {
            let longer = Lease::of(length * factor).unwrap();
            (self.db.lease, self.db.longest) = (longer, longer);
        } else if let Some(shorter) = Lease::of(length / factor) {
            let wait = self.db.lease.outlived_after().unwrap();
            self.db.lease = shorter;
            // By a clock that runs 10 % fast.
            self.after(wait.as_micros() as u64 * 10 / 11, What::FinishLeaseChange(shorter));
        }
    }

    /// What `accept-regression` does: the tombstones that a replica has kept go into the log again.
    fn accept_regression(&mut self, node: usize) {
        if self.nodes[node].runs() && self.nodes[node].replica.standing() == replica::Standing::Regressed {
            while let Some(key) = self.dice.bit(self.db.keys.live & self.nodes[node].keys.revoked) {
                self.db.append(key, Kind::Revoked);
            }
            let accepted = Message::Replica(replica::Event::RegressionAccepted, Baggage::None);
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
        if self.faults.aims && self.faults.now(self.now) && self.dice.one_in(40) {
            self.pause(node);
        }
    }

    /// A replica falls silent just when it has got a lease, and just then a key is revoked elsewhere.
    pub(super) fn aim_at_renewed(&mut self, node: usize) {
        if self.faults.aims && self.faults.now(self.now) && self.dice.one_in(40) {
            note!(self, "fault: node {node} is cut off after this");
            let until = self.now + self.dice.between(self.faults.beat / 2, self.faults.beat * 3);
            self.nodes[node].cut = (until, until);
            if let Some(key) = self.dice.bit(self.db.keys.live) {
                let wait = self.dice.between(0, 10_000);
                self.after(wait, What::RevokeAgain(key));
            }
        }
    }

    /// A key is revoked just when a replica asks for its first lease; whether so.
    pub(super) fn aim_at_joining(&mut self, renewal: &Renewal) -> bool {
        let asks = |row: &Row| row.id == renewal.id && row.applied.is_none() && renewal.applied.is_some();
        let aims = self.faults.aims && self.faults.now(self.now) && self.db.rows.iter().any(asks);
        let Some(key) = self.dice.bit(self.db.keys.live) else { return false };
        if aims && self.dice.one_in(2) {
            self.after(200, What::RevokeAgain(key));
            return true;
        }
        false
    }

    /// The faults are over: everything works again, and the operator does what is due. Gives the keys as every
    /// replica must know them by the end.
    pub(super) fn heal(&mut self) -> Keys {
        note!(self, "the faults are over");
        self.down_until = 0;
        self.attest_dead();
        for node in 0..self.nodes.len() {
            self.nodes[node].cut = (0, 0);
            self.after(0, What::Resume(self.process(node)));
            self.after(0, What::Start(node));
        }
        // Until whoever waits for a lost answer has given up, and has heard what the database is now.
        let longest = self.db.longest;
        let patience = longest.timeout() + longest.renew_every() + Duration::from_millis(300);
        self.run_until(self.now + patience.as_micros() as Micros * 10 / 9 + self.faults.beat / 2);
        (0..self.nodes.len()).for_each(|node| self.accept_regression(node));
        let keys = self.db.keys;
        self.run_until(self.now + longest.renew_every().as_micros() as Micros * 10 / 9 + 300_000);
        keys
    }
}
