//! What goes wrong in a run. Two lanes strike at random, each one fault after the other: one at the replicas, one at
//! the database; so faults of the two overlap.

use std::{sync::Arc, time::Duration};

use rustix::process::Signal;

use crate::{
    breakable_proxy::NetworkCondition,
    dice::ScheduleRng,
    judge::{Nanos, ms},
    test_bed::TestBed,
};

/// A kind of fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum FaultKind {
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

impl FaultKind {
    pub(crate) const AT_REPLICAS: [FaultKind; 10] = [
        FaultKind::Kill,
        FaultKind::Restart,
        FaultKind::Pause,
        FaultKind::Cut,
        FaultKind::CutThere,
        FaultKind::CutBack,
        FaultKind::Refuse,
        FaultKind::Slow,
        FaultKind::SlowPause,
        FaultKind::CutClients,
    ];

    pub(crate) const AT_DATABASE: [FaultKind; 9] = [
        FaultKind::KillPrimary,
        FaultKind::StopPrimary,
        FaultKind::FailOver,
        FaultKind::Isolate,
        FaultKind::LoseRows,
        FaultKind::StepWall,
        FaultKind::PausePrimary,
        FaultKind::PauseStandby,
        FaultKind::RestartBouncer,
    ];

    /// For people.
    pub(crate) fn description(self) -> &'static str {
        match self {
            FaultKind::Kill => "replica killed",
            FaultKind::Restart => "replica restarted",
            FaultKind::Pause => "replica stood still",
            FaultKind::Cut => "replica cut off, both ways",
            FaultKind::CutThere => "replica cut off, to the database",
            FaultKind::CutBack => "replica cut off, from the database",
            FaultKind::Refuse => "replica's connections refused",
            FaultKind::Slow => "replica's link slow",
            FaultKind::SlowPause => "replica stood still, its link slow",
            FaultKind::CutClients => "replica cut off from clients",
            FaultKind::KillPrimary => "primary killed",
            FaultKind::StopPrimary => "primary stopped at once",
            FaultKind::FailOver => "failover",
            FaultKind::Isolate => "failover, old primary goes on",
            FaultKind::LoseRows => "the same, replicas' rows lost",
            FaultKind::StepWall => "database's wall clock set",
            FaultKind::PausePrimary => "primary stood still",
            FaultKind::PauseStandby => "standby stood still",
            FaultKind::RestartBouncer => "pgbouncer restarted",
        }
    }
}

/// A fault that happened.
#[derive(Clone, Copy, Debug)]
pub(crate) struct FaultRecord {
    pub(crate) fault: FaultKind,
    /// Which replica it struck; None = the database, and so all of them.
    pub(crate) replica: Option<u8>,
    pub(crate) from: Nanos,
    pub(crate) to: Nanos,
}

/// One of the two sources of faults.
pub(crate) struct FaultInjector {
    pub(crate) world: Arc<TestBed>,
    pub(crate) dice: ScheduleRng,
    pub(crate) faults: Vec<FaultKind>,
    /// The one replica that is struck; None = any.
    pub(crate) victim: Option<usize>,
}

impl FaultInjector {
    /// Strikes until the run is over.
    pub(crate) fn inject_until_stopped(mut self) {
        while !self.faults.is_empty() && !self.world.are_faults_stopped() {
            self.wait(1, 20);
            if self.world.are_faults_stopped() {
                break;
            }
            let fault = self.dice.pick(&self.faults);
            let any = self.dice.below(self.world.field.replicas.len() as u64) as usize;
            self.inject(fault, self.victim.unwrap_or(any));
        }
    }

    fn inject(&mut self, fault: FaultKind, replica: usize) {
        let world = self.world.clone();
        let at_replica = FaultKind::AT_REPLICAS.contains(&fault);
        let from = world.field.now();
        if at_replica {
            self.inject_at_replica(fault, replica);
        } else {
            self.inject_at_database(fault, replica);
        }
        let replica = at_replica.then(|| u8::try_from(replica).unwrap());
        world.record_fault(FaultRecord { fault, replica, from, to: world.field.now() });
        // Whatever was acknowledged by now has survived it.
        if !matches!(fault, FaultKind::Slow | FaultKind::Refuse) {
            world.audit_newest();
        }
    }

    fn inject_at_replica(&mut self, fault: FaultKind, at: usize) {
        let world = self.world.clone();
        let replica = &world.field.replicas[at];
        let calm = NetworkCondition::default();
        match fault {
            FaultKind::Kill => replica.kill(self.tenths(0, 5)),
            FaultKind::Restart => {
                let code = replica.restart();
                if code != 0 {
                    world.remark(format!("{} was told to end, and ended with {code}", replica.name));
                }
            }
            FaultKind::Pause => replica.pause(self.tenths(1, 30)),
            FaultKind::Cut => {
                self.set_network(at, NetworkCondition { cut_there: true, cut_back: true, ..calm })
            }
            FaultKind::CutThere => self.set_network(at, NetworkCondition { cut_there: true, ..calm }),
            FaultKind::CutBack => self.set_network(at, NetworkCondition { cut_back: true, ..calm }),
            FaultKind::Refuse => self.set_network(at, NetworkCondition { refuse: true, ..calm }),
            FaultKind::SlowPause => {
                // Slow, and not too slow for a renewal to be answered in time: so one is under way most of the time. What
                // was begun when it stood still is OK before it goes on.
                let twentieth = u64::try_from(self.world.lease.as_millis()).unwrap() / 20;
                let delay = Duration::from_millis(self.dice.between(twentieth, twentieth * 7 / 5));
                world.cut(at, NetworkCondition { delay, ..calm });
                self.wait(2, 8);
                replica.pause(self.tenths(13, 22));
                self.wait(1, 4);
                world.cut(at, calm);
            }
            FaultKind::CutClients => {
                if let Some(cables) = &world.cables {
                    cables[at].unplug_clients(true);
                    self.wait(1, 20);
                    cables[at].unplug_clients(false);
                }
            }
            _ => {
                let delay = Duration::from_millis(self.dice.between(2, 300));
                self.set_network(at, NetworkCondition { delay, ..calm });
            }
        }
    }

    fn set_network(&mut self, at: usize, weather: NetworkCondition) {
        self.world.cut(at, weather);
        self.wait(1, 30);
        self.world.cut(at, NetworkCondition::default());
    }

    fn inject_at_database(&mut self, fault: FaultKind, at: usize) {
        let world = self.world.clone();
        let mut cluster = world.cluster();
        match fault {
            FaultKind::KillPrimary => cluster.kill_primary(),
            FaultKind::StopPrimary => cluster.stop_primary_at_once(),
            FaultKind::FailOver => {
                cluster.promote(false);
                world.retarget_all(&cluster.socket(), None);
                cluster.rebuild();
            }
            FaultKind::Isolate | FaultKind::LoseRows => {
                cluster.promote(true);
                if fault == FaultKind::LoseRows {
                    cluster.run_sql("DELETE FROM keyward.replicas");
                }
                world.retarget_all(&cluster.socket(), Some(at));
                self.wait(1, 20);
                cluster.kill_old();
                world.retarget_all(&cluster.socket(), None);
                cluster.rebuild();
            }
            FaultKind::StepWall => cluster.step_wall(self.dice.between(0, 40) as i64 - 15),
            FaultKind::PausePrimary => {
                cluster.signal_primary(Signal::STOP);
                self.wait(1, 30);
                cluster.signal_primary(Signal::CONT);
            }
            FaultKind::PauseStandby => {
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

impl FaultRecord {
    /// For people.
    pub(crate) fn describe(&self) -> String {
        let replica = self.replica.map(|replica| format!(" (replica {replica})")).unwrap_or_default();
        format!("{}{replica} from {} to {}", self.fault.description(), ms(self.from), ms(self.to))
    }
}

/// A rule's violation is told with the faults around it.
pub(crate) fn faults_around(strikes: &[FaultRecord], at: Nanos, lease: Duration) -> Vec<String> {
    let lease = Nanos::try_from(lease.as_nanos()).unwrap();
    let near = strikes.iter().filter(|strike| strike.from <= at && at <= strike.to + 3 * lease);
    near.map(FaultRecord::describe).collect()
}
