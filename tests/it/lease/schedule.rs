//! A schedule: a fleet, its weather, and everything that happens to it, all from one seed.

use std::time::Duration;

use keyward::domain::lease::{Lease, Rule, replica::Standing};

use super::{
    Broken,
    database::{Keys, Kind},
    dice::{Dice, HostClock, Micros},
    faults::{Fault, Faults},
    node::{Node, Wait},
    tally::Tally,
    world::{What, World},
};

/// What came of a schedule.
pub(super) struct Ran {
    /// How the promise was broken.
    pub(super) violation: Option<String>,
    /// What had not recovered when all was well again.
    pub(super) stuck: Option<String>,
    pub(super) tally: Tally,
    /// What happened, line by line, if asked for.
    pub(super) trace: Vec<String>,
}

impl Ran {
    pub(super) fn went_wrong(&self) -> Option<&str> {
        self.violation.as_deref().or(self.stuck.as_deref())
    }
}

/// Runs one schedule.
pub(super) fn run(seed: u64, without: Option<Rule>, keep_trace: bool) -> Ran {
    let mut dice = Dice::new(seed);
    let lease = match dice.below(10) {
        0 => Lease::STATIC,
        1..4 => Lease::of(Duration::from_secs(1)).unwrap(),
        4..9 => Lease::of(Duration::from_secs(2)).unwrap(),
        _ => Lease::STRICT,
    };
    let beat = lease.length().map_or(2_000_000, |length| length.as_micros() as Micros);
    let until = beat * dice.between(2, 6);
    let faults = Faults::some(&mut dice, beat, until);
    let rates = rates(&mut dice);
    let mut world = World::new(dice, lease, &rates, faults, Broken(without));
    world.trace = keep_trace.then(Vec::new);
    populate(&mut world);
    world.after(beat / 4, What::Fault);
    world.run_until(until);
    let keys = world.heal();
    let stuck = if world.violation.is_none() { stuck(&world, keys) } else { None };
    Ran { violation: world.violation, stuck, tally: world.tally, trace: world.trace.unwrap_or_default() }
}

/// Two to four clocks; often the slowest and the fastest that are allowed.
fn rates(dice: &mut Dice) -> Vec<u64> {
    let count = dice.between(2, 5);
    let any = |dice: &mut Dice| dice.between(HostClock::SLOWEST, HostClock::FASTEST + 1);
    let mut rates: Vec<_> = (0..count).map(|_| any(dice)).collect();
    if dice.one_in(2) {
        rates[0] = HostClock::SLOWEST;
        rates[1] = HostClock::FASTEST;
    }
    rates
}

/// A few keys, nodes that start one after the other, and clients.
pub(super) fn populate(world: &mut World) {
    for _ in 0..4 {
        world.db.append(world.keys_made, Kind::Created);
        world.keys_made += 1;
    }
    for node in 0..world.nodes.len() {
        let wait = world.dice.between(0, world.faults.beat / 2);
        world.after(wait, What::Start(node));
    }
    world.after(world.faults.beat / 8, What::Create);
    world.after(world.faults.beat / 4, What::Revoke);
}

/// What is not as it should be some time after the last fault.
fn stuck(world: &World, keys: Keys) -> Option<String> {
    if world.tally.frozen != 0 && !world.faults.include(Fault::StepWall) {
        return Some("a clock was taken for frozen that only drifts".to_owned());
    }
    for (at, node) in world.nodes.iter().enumerate() {
        let standing = node.replica.standing();
        if standing != Standing::Following || !node.is_fresh(world.now) {
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

fn overdue(node: &Node, wait: &Wait, now: Micros) -> bool {
    let Some(revoker) = &wait.revoker else { return false };
    let promised = revoker.propagation().complete_by;
    let late = Duration::from_millis(100);
    revoker.wake_at().is_some() && promised.is_some_and(|by| by.plus(late) < node.clock.read(now))
}
