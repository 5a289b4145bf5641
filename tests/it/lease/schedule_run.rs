//! A schedule: a fleet, its weather, and everything that happens to it, all from one seed.

use std::time::Duration;

use keyward::domain::lease::{LeaseDuration, LeaseInvariant, replica::ReplicaState};

use super::{
    RulesWithout,
    database::{KeyChangeKind, KeySets},
    dice::{HostClock, Micros, ScheduleRng},
    event_counts::Tally,
    faults::{FaultKind, FaultPlan},
    sim_node::{PendingRevoke, SimNode},
    simulation::{SimEvent, Simulation},
};

/// What came of a schedule.
pub(super) struct ScheduleResult {
    /// How the promise was broken.
    pub(super) violation: Option<String>,
    /// What had not recovered when all was well again.
    pub(super) stuck: Option<String>,
    pub(super) tally: Tally,
    /// What happened, line by line, if asked for.
    pub(super) trace: Vec<String>,
}

impl ScheduleResult {
    pub(super) fn went_wrong(&self) -> Option<&str> {
        self.violation.as_deref().or(self.stuck.as_deref())
    }
}

/// Runs one schedule.
pub(super) fn run(seed: u64, without: Option<LeaseInvariant>, keep_trace: bool) -> ScheduleResult {
    let mut dice = ScheduleRng::new(seed);
    let lease = match dice.below(10) {
        0 => LeaseDuration::INFINITE,
        1..4 => LeaseDuration::from_duration(Duration::from_secs(1)).unwrap(),
        4..9 => LeaseDuration::from_duration(Duration::from_secs(2)).unwrap(),
        _ => LeaseDuration::STRICT,
    };
    let beat = lease.length().map_or(2_000_000, |length| length.as_micros() as Micros);
    let until = beat * dice.between(2, 6);
    let faults = FaultPlan::random(&mut dice, beat, until);
    let rates = rates(&mut dice);
    let mut world = Simulation::new(dice, lease, &rates, faults, RulesWithout(without));
    world.trace = keep_trace.then(Vec::new);
    populate(&mut world);
    world.schedule_after(beat / 4, SimEvent::Fault);
    world.run_until(until);
    let keys = world.heal();
    let stuck = if world.violation.is_none() { stuck(&world, keys) } else { None };
    ScheduleResult {
        violation: world.violation,
        stuck,
        tally: world.tally,
        trace: world.trace.unwrap_or_default(),
    }
}

/// Two to four clocks; often the slowest and the fastest that are allowed.
fn rates(dice: &mut ScheduleRng) -> Vec<u64> {
    let count = dice.between(2, 5);
    let any = |dice: &mut ScheduleRng| dice.between(HostClock::SLOWEST, HostClock::FASTEST + 1);
    let mut rates: Vec<_> = (0..count).map(|_| any(dice)).collect();
    if dice.one_chance_in(2) {
        rates[0] = HostClock::SLOWEST;
        rates[1] = HostClock::FASTEST;
    }
    rates
}

/// A few keys, nodes that start one after the other, and clients.
pub(super) fn populate(world: &mut Simulation) {
    for _ in 0..4 {
        world.db.append(world.keys_made, KeyChangeKind::Created);
        world.keys_made += 1;
    }
    for node in 0..world.nodes.len() {
        let wait = world.dice.between(0, world.faults.mean_interval / 2);
        world.schedule_after(wait, SimEvent::Start(node));
    }
    world.schedule_after(world.faults.mean_interval / 8, SimEvent::Create);
    world.schedule_after(world.faults.mean_interval / 4, SimEvent::Revoke);
}

/// What is not as it should be some time after the last fault.
fn stuck(world: &Simulation, keys: KeySets) -> Option<String> {
    if world.tally.frozen != 0 && !world.faults.include(FaultKind::StepWall) {
        return Some("a clock was taken for frozen that only drifts".to_owned());
    }
    for (at, node) in world.nodes.iter().enumerate() {
        let standing = node.replica.state();
        if standing != ReplicaState::Following || !node.is_fresh(world.now) {
            return Some(format!("node {at} is {standing:?}, fresh: {}", node.is_fresh(world.now)));
        }
        let lacks = keys.live & !(node.keys.live | node.keys.revoked);
        if lacks != 0 || node.keys.live & keys.revoked != 0 {
            return Some(format!("node {at} does not know what the database has known for long"));
        }
        if node.waits.iter().any(|wait| overdue(node, wait, world.now)) {
            return Some(format!("a Revoke waits at node {at} beyond what it has promised"));
        }
    }
    None
}

fn overdue(node: &SimNode, wait: &PendingRevoke, now: Micros) -> bool {
    let Some(revoker) = &wait.revoker else { return false };
    let promised = revoker.status().completes_by;
    let late = Duration::from_millis(100);
    revoker.wake_at().is_some() && promised.is_some_and(|by| by.saturating_add(late) < node.clock.read(now))
}
