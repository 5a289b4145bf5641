//! What holds while little or nothing goes wrong: Revoke is quick, and Checks are answered.

use std::time::Duration;

use keyward::domain::lease::{Incarnation, LeaseDuration, replica::ReplicaState};

use super::{
    RulesWithout,
    dice::{Micros, ScheduleRng},
    event_counts::Tally,
    faults::FaultPlan,
    schedule_run::populate,
    simulation::{SimEvent, Simulation},
};

const SECOND: Micros = 1_000_000;

/// Three nodes whose clocks differ as much as they may, and clients that create and revoke until then.
fn fleet(seed: u64, lease: LeaseDuration, until: Micros) -> Simulation {
    let faults = FaultPlan::without_faults(2 * SECOND, until);
    let mut world =
        Simulation::new(ScheduleRng::new(seed), lease, &[900, 1000, 1100], faults, RulesWithout(None));
    populate(&mut world);
    world.run_until(3 * SECOND);
    (world.tally, world.slowest_revoke) = (Tally::default(), 0);
    world
}

/// The least and the most that the wait for a lease takes, by any clock.
fn waited_out(lease: LeaseDuration) -> std::ops::Range<Micros> {
    let wait = lease.expiry_wait().unwrap().as_micros() as Micros;
    wait * 10 / 11..wait * 10 / 9 + SECOND / 10
}

fn leases() -> [LeaseDuration; 4] {
    [
        LeaseDuration::from_duration(Duration::from_secs(1)).unwrap(),
        LeaseDuration::STRICT,
        LeaseDuration::DEFAULT,
        LeaseDuration::INFINITE,
    ]
}

/// Revokes a live key, at whichever node.
fn revoke(world: &mut Simulation) {
    let key = world.dice.bit(world.db.keys.live).unwrap();
    world.revoke(key);
}

fn all_answer(world: &Simulation) -> bool {
    world.nodes.iter().all(|node| node.is_fresh(world.now) && node.replica.state() == ReplicaState::Following)
}

#[test]
fn revoke_is_quick_and_no_lease_lapses_when_nothing_goes_wrong() {
    for lease in leases() {
        for seed in 0..5 {
            let mut world = fleet(seed, lease, 30 * SECOND);
            world.run_until(31 * SECOND);
            assert_eq!(world.violation, None);
            assert!(all_answer(&world) && world.tally.fast > 20, "{lease:?}: {:?}", world.tally);
            let trouble = [world.tally.slow, world.tally.lapses, world.tally.stops, world.tally.timeouts];
            assert_eq!(trouble, [0; 4], "{lease:?}");
            // A hint, two renewals and a reading or two, of at most 1.8 ms each.
            assert!(world.slowest_revoke < SECOND / 50, "{lease:?}: {} us", world.slowest_revoke);
        }
    }
}

#[test]
fn an_outage_shorter_than_the_lease_costs_no_answer() {
    for seed in 0..5 {
        let mut world = fleet(seed, LeaseDuration::DEFAULT, 0);
        world.down_until = world.now + 30 * SECOND;
        world.db.fail_over(Incarnation(2));
        world.run_until(world.now + 60 * SECOND);
        assert_eq!((world.tally.lapses, world.tally.stops), (0, 0), "seed {seed}");
        assert!(all_answer(&world));
    }
}

#[test]
fn after_a_failover_revoke_is_quick_again_as_soon_as_lost_rows_would_have_run_out() {
    let mut world = fleet(1, LeaseDuration::STRICT, 0);
    world.db.fail_over(Incarnation(2));
    revoke(&mut world);
    world.run_until(world.now + 10 * SECOND);
    assert_eq!(world.tally.fast + world.tally.slow, 1);
    assert!(waited_out(LeaseDuration::STRICT).contains(&world.slowest_revoke), "{} us", world.slowest_revoke);
    revoke(&mut world);
    world.run_until(world.now + SECOND / 10);
    assert_eq!(world.tally.fast + world.tally.slow, 2);
}

#[test]
fn a_cut_off_replica_falls_silent_and_holds_a_revoke_up_by_the_wait_for_its_lease() {
    let mut world = fleet(1, LeaseDuration::STRICT, 0);
    world.nodes[0].cut = (Micros::MAX / 2, Micros::MAX / 2);
    // The clients of a node that is cut off cannot revoke there.
    while world.tally.slow == 0 {
        revoke(&mut world);
        world.run_until(world.now + 8 * SECOND);
        assert!(world.now < 100 * SECOND, "no Revoke returns");
    }
    assert!(!world.nodes[0].is_fresh(world.now));
    assert!(waited_out(LeaseDuration::STRICT).contains(&world.slowest_revoke), "{} us", world.slowest_revoke);
    world.nodes[0].cut = (0, 0);
    world.run_until(world.now + 3 * SECOND);
    assert!(all_answer(&world));
}

#[test]
fn a_cut_off_replica_with_an_infinite_lease_answers_and_no_revoke_is_ok_until_it_speaks() {
    let mut world = fleet(1, LeaseDuration::INFINITE, 0);
    let an_hour = world.now + 3600 * SECOND;
    world.nodes[0].cut = (an_hour, an_hour);
    for _ in 0..4 {
        revoke(&mut world);
        world.run_until(world.now + SECOND);
    }
    world.run_until(an_hour - SECOND);
    assert!(all_answer(&world));
    assert_eq!((world.tally.fast, world.tally.slow), (0, 0));
    world.run_until(an_hour + 30 * SECOND);
    assert!(world.tally.fast > 0 && world.nodes[0].keys == world.db.keys, "{:?}", world.tally);
}

#[test]
fn a_dead_replica_is_waited_for_until_its_row_is_collected() {
    let mut world = fleet(1, LeaseDuration::STRICT, 0);
    world.nodes[2].die(RulesWithout(None), LeaseDuration::STRICT);
    revoke(&mut world);
    world.run_until(world.now + 10 * SECOND);
    assert_eq!((world.tally.fast, world.tally.slow), (0, 1));
    world.run_until(world.now + 30 * SECOND);
    assert!(world.tally.collected > 0);
    revoke(&mut world);
    world.run_until(world.now + SECOND);
    assert_eq!((world.tally.fast, world.tally.slow), (1, 1));
    world.schedule_after(0, SimEvent::Start(2));
    world.run_until(world.now + SECOND);
    assert!(all_answer(&world));
}
