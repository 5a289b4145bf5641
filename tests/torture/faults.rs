//! What goes wrong in a run. Two lanes strike at random, each one fault after the other: one at the replicas, one at
//! the database; so faults of the two overlap.

use std::{sync::Arc, time::Duration};

use rustix::process::Signal;

use crate::{
    dice::Dice,
    judge::{Nanos, ms},
    link::Weather,
    world::World,
};

/// A kind of fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Fault {
    /// A replica is killed, and started again.
    Kill,
    /// A replica is told to end, and started again.
    Restart,
    /// A replica stands still, for up to three leases.
    Pause,
    /// Nothing gets through between a replica and the database.
    Cut,
    /// Nothing gets through from a replica to the database.
    CutThere,
    /// Nothing gets through from the database to a replica.
    CutBack,
    /// A replica's connections to the database are refused.
    Refuse,
    /// Everything between a replica and the database takes longer.
    Slow,
    /// The same, and meanwhile the replica stands still for longer than a lease: answers to its renewals wait for it.
    SlowPause,
    /// No client reaches a replica (with namespaces only).
    CutClients,
    /// Every process of the primary is killed, and it is started again.
    KillPrimary,
    /// The primary ends without a checkpoint, and is started again.
    StopPrimary,
    /// The primary is killed, and the standby takes over.
    FailOver,
    /// The standby takes over while the old primary goes on, and one replica still reaches that one.
    Isolate,
    /// The same, and the new primary has lost the rows of the replicas.
    LoseRows,
    /// The database's wall clock is set.
    StepWall,
    /// Every process of the primary stands still.
    PausePrimary,
    /// Every process of the standby stands still: commits hang.
    PauseStandby,
    /// pgbouncer is killed, and started again.
    RestartBouncer,
}

impl Fault {
    pub(crate) const AT_REPLICAS: [Fault; 10] = [
        Fault::Kill,
        Fault::Restart,
        Fault::Pause,
        Fault::Cut,
        Fault::CutThere,
        Fault::CutBack,
        Fault::Refuse,
        Fault::Slow,
        Fault::SlowPause,
        Fault::CutClients,
    ];

    pub(crate) const AT_DATABASE: [Fault; 9] = [
        Fault::KillPrimary,
        Fault::StopPrimary,
        Fault::FailOver,
        Fault::Isolate,
        Fault::LoseRows,
        Fault::StepWall,
        Fault::PausePrimary,
        Fault::PauseStandby,
        Fault::RestartBouncer,
    ];

    /// For people.
    pub(crate) fn words(self) -> &'static str {
        match self {
            Fault::Kill => "replica killed",
            Fault::Restart => "replica restarted",
            Fault::Pause => "replica stood still",
            Fault::Cut => "replica cut off, both ways",
            Fault::CutThere => "replica cut off, to the database",
            Fault::CutBack => "replica cut off, from the database",
            Fault::Refuse => "replica's connections refused",
            Fault::Slow => "replica's link slow",
            Fault::SlowPause => "replica stood still, its link slow",
            Fault::CutClients => "replica cut off from clients",
            Fault::KillPrimary => "primary killed",
            Fault::StopPrimary => "primary stopped at once",
            Fault::FailOver => "failover",
            Fault::Isolate => "failover, old primary goes on",
            Fault::LoseRows => "the same, replicas' rows lost",
            Fault::StepWall => "database's wall clock set",
            Fault::PausePrimary => "primary stood still",
            Fault::PauseStandby => "standby stood still",
            Fault::RestartBouncer => "pgbouncer restarted",
        }
    }
}

/// A fault that happened.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Strike {
    pub(crate) fault: Fault,
    /// Which replica it struck; None = the database, and so all of them.
    pub(crate) replica: Option<u8>,
    pub(crate) from: Nanos,
    pub(crate) to: Nanos,
}

/// One of the two sources of faults.
pub(crate) struct Lane {
    pub(crate) world: Arc<World>,
    pub(crate) dice: Dice,
    pub(crate) faults: Vec<Fault>,
    /// The one replica that is struck; None = any.
    pub(crate) victim: Option<usize>,
}

impl Lane {
    /// Strikes until the run is over.
    pub(crate) fn work(mut self) {
        while !self.faults.is_empty() && !self.world.is_calm() {
            self.wait(1, 20);
            if self.world.is_calm() {
                break;
            }
            let fault = self.dice.pick(&self.faults);
            let any = self.dice.below(self.world.field.replicas.len() as u64) as usize;
            self.strike(fault, self.victim.unwrap_or(any));
        }
    }

    fn strike(&mut self, fault: Fault, replica: usize) {
        let world = self.world.clone();
        let at_replica = Fault::AT_REPLICAS.contains(&fault);
        let from = world.field.now();
        if at_replica {
            self.at_replica(fault, replica);
        } else {
            self.at_database(fault, replica);
        }
        let replica = at_replica.then(|| u8::try_from(replica).unwrap());
        world.note(Strike { fault, replica, from, to: world.field.now() });
        // Whatever was acknowledged by now has survived it.
        if !matches!(fault, Fault::Slow | Fault::Refuse) {
            world.audit_newest();
        }
    }

    fn at_replica(&mut self, fault: Fault, at: usize) {
        let world = self.world.clone();
        let replica = &world.field.replicas[at];
        let calm = Weather::default();
        match fault {
            Fault::Kill => replica.kill(self.tenths(0, 5)),
            Fault::Restart => {
                let code = replica.restart();
                if code != 0 {
                    world.remark(format!("{} was told to end, and ended with {code}", replica.name));
                }
            }
            Fault::Pause => replica.pause(self.tenths(1, 30)),
            Fault::Cut => self.weather(at, Weather { cut_there: true, cut_back: true, ..calm }),
            Fault::CutThere => self.weather(at, Weather { cut_there: true, ..calm }),
            Fault::CutBack => self.weather(at, Weather { cut_back: true, ..calm }),
            Fault::Refuse => self.weather(at, Weather { refuse: true, ..calm }),
            Fault::SlowPause => {
                // Slow, and not too slow for a renewal to be answered in time: so one is under way most of the time. What
                // was begun when it stood still is OK before it goes on.
                let twentieth = u64::try_from(self.world.lease.as_millis()).unwrap() / 20;
                let delay = Duration::from_millis(self.dice.between(twentieth, twentieth * 7 / 5));
                world.cut(at, Weather { delay, ..calm });
                self.wait(2, 8);
                replica.pause(self.tenths(13, 22));
                self.wait(1, 4);
                world.cut(at, calm);
            }
            Fault::CutClients => {
                if let Some(cables) = &world.cables {
                    cables[at].unplug_clients(true);
                    self.wait(1, 20);
                    cables[at].unplug_clients(false);
                }
            }
            _ => {
                let delay = Duration::from_millis(self.dice.between(2, 300));
                self.weather(at, Weather { delay, ..calm });
            }
        }
    }

    fn weather(&mut self, at: usize, weather: Weather) {
        self.world.cut(at, weather);
        self.wait(1, 30);
        self.world.cut(at, Weather::default());
    }

    fn at_database(&mut self, fault: Fault, at: usize) {
        let world = self.world.clone();
        let mut cluster = world.cluster();
        match fault {
            Fault::KillPrimary => cluster.kill_primary(),
            Fault::StopPrimary => cluster.stop_primary_at_once(),
            Fault::FailOver => {
                cluster.promote(false);
                world.lead_all_to(&cluster.socket(), None);
                cluster.rebuild();
            }
            Fault::Isolate | Fault::LoseRows => {
                cluster.promote(true);
                if fault == Fault::LoseRows {
                    cluster.must("DELETE FROM keyward.replicas");
                }
                world.lead_all_to(&cluster.socket(), Some(at));
                self.wait(1, 20);
                cluster.kill_old();
                world.lead_all_to(&cluster.socket(), None);
                cluster.rebuild();
            }
            Fault::StepWall => cluster.step_wall(self.dice.between(0, 40) as i64 - 15),
            Fault::PausePrimary => {
                cluster.signal_primary(Signal::STOP);
                self.wait(1, 30);
                cluster.signal_primary(Signal::CONT);
            }
            Fault::PauseStandby => {
                cluster.signal_standby(Signal::STOP);
                self.wait(1, 30);
                cluster.signal_standby(Signal::CONT);
            }
            _ => world.bouncer().restart(),
        }
    }

    /// So many tenths of a lease.
    fn tenths(&mut self, from: u64, to: u64) -> Duration {
        let lease = u64::try_from(self.world.lease.as_micros()).unwrap();
        Duration::from_micros(self.dice.between(lease * from / 10, lease * to / 10))
    }

    fn wait(&mut self, from: u64, to: u64) {
        std::thread::sleep(self.tenths(from, to));
    }
}

impl Strike {
    /// For people.
    pub(crate) fn tell(&self) -> String {
        let replica = self.replica.map(|replica| format!(" (replica {replica})")).unwrap_or_default();
        format!("{}{replica} from {} to {}", self.fault.words(), ms(self.from), ms(self.to))
    }
}

/// A rule's violation is told with the faults around it.
pub(crate) fn around(strikes: &[Strike], at: Nanos, lease: Duration) -> Vec<String> {
    let lease = Nanos::try_from(lease.as_nanos()).unwrap();
    let near = strikes.iter().filter(|strike| strike.from <= at && at <= strike.to + 3 * lease);
    near.map(Strike::tell).collect()
}
