//! The lease protocol under a simulator: fleets of replicas, revokers and collectors, the very ones that the
//! server runs, over one database, with everything going wrong that the promise allows to go wrong.
//!
//! **Once a Revoke has returned OK, no Check that starts later allows, on any replica.** A schedule comes from one
//! seed. One that fails says its seed, and `make simulate SEED=n` shows what happened in it.

mod calm;
mod clients;
mod database;
mod dice;
mod event_counts;
mod faults;
mod network;
mod process_steps;
mod schedule_run;
mod sim_node;
mod simulation;

use std::{ops::Range, time::Instant};

use keyward::domain::lease::{InvariantSet, LeaseInvariant};

use event_counts::Tally;
use schedule_run::run;

/// What `make test` has time for.
const DEFAULT_SCHEDULES: u64 = 2_000;

/// All rules but perhaps one. The server has `Kept` in its place.
#[derive(Clone, Copy, Debug)]
struct RulesWithout(Option<LeaseInvariant>);

impl InvariantSet for RulesWithout {
    fn enforces(&self, rule: LeaseInvariant) -> bool {
        self.0 != Some(rule)
    }
}

/// The story of a schedule: its end, or all of it.
fn trace_schedule(seed: u64, without: Option<LeaseInvariant>, lines: usize) -> String {
    let ran = run(seed, without, true);
    let told = &ran.trace[ran.trace.len().saturating_sub(lines)..];
    let end = ran.went_wrong().unwrap_or("nothing went wrong");
    format!("schedule {seed}:\n{}\n{end}; `make simulate SEED={seed}` shows all of it", told.join("\n"))
}

/// Runs schedules with every rule kept. Stops at one that goes wrong.
fn run_schedules(seeds: Range<u64>) -> Tally {
    let mut total = Tally::default();
    for seed in seeds {
        let ran = run(seed, None, false);
        if ran.went_wrong().is_some() {
            panic!("{}", trace_schedule(seed, None, 60));
        }
        total.add(&ran.tally);
    }
    total
}

/// The first schedule that notices that a rule is left out.
fn first_to_notice(without: LeaseInvariant, seeds: Range<u64>) -> Option<u64> {
    seeds.into_iter().find(|seed| run(*seed, Some(without), false).violation.is_some())
}

#[test]
fn no_check_that_starts_after_a_revoke_returned_ok_allows() {
    let seen = run_schedules(0..DEFAULT_SCHEDULES);
    assert_eq!(seen.never(), [""; 0], "schedules in which these never happen show little");
    assert!(seen.fast > 5 * DEFAULT_SCHEDULES && seen.slow > DEFAULT_SCHEDULES, "{seen:?}");
}

macro_rules! noticed {
    ($($rule:ident = $name:ident,)*) => {
        $(#[test]
        fn $name() {
            let seed = first_to_notice(LeaseInvariant::$rule, 0..DEFAULT_SCHEDULES);
            assert!(seed.is_some(), "no schedule misses {:?}", LeaseInvariant::$rule);
        })*

        #[test]
        fn every_rule_has_its_test() {
            assert_eq!([$(LeaseInvariant::$rule),*], LeaseInvariant::ALL);
        }
    };
}

noticed! {
    RevokeWaits = a_revoke_that_does_not_wait_is_noticed,
    RetryWaits = a_retry_that_does_not_wait_is_noticed,
    DriftIsCovered = a_wait_of_just_one_lease_is_noticed,
    LostRowsAreWaitedOut = trust_in_a_list_that_has_lost_rows_is_noticed,
    LeaseEnds = a_lease_that_never_ends_is_noticed,
    LeaseCountsFromSending = a_lease_that_counts_from_its_answer_is_noticed,
    MapBeforeDeadline = a_deadline_set_before_the_map_is_noticed,
    DeadlineBeforeLookUp = a_look_up_before_the_deadline_is_noticed,
    RegisterBeforeSnapshot = a_snapshot_before_the_registration_is_noticed,
    ApplyBeforeAck = an_acknowledgment_before_the_change_is_noticed,
    DeadAreWatched = rows_removed_by_the_wall_clock_are_noticed,
    ListedBeforeLease = a_lease_granted_by_the_renewal_that_asks_is_noticed,
    HistoryIsCompared = revisions_compared_by_number_alone_are_noticed,
    LeaseNeedsHead = a_lease_on_half_the_changes_is_noticed,
    SettlingTakesTime = a_database_settled_at_once_is_noticed,
}

#[test]
fn a_seed_gives_the_same_schedule_every_time() {
    for (seed, without) in
        [(1, None), (2, Some(LeaseInvariant::RevokeWaits)), (3, Some(LeaseInvariant::LeaseEnds))]
    {
        assert_eq!(trace_schedule(seed, without, usize::MAX), trace_schedule(seed, without, usize::MAX));
    }
    assert_ne!(run(1, None, true).trace, run(2, None, true).trace);
}

#[test]
fn a_schedule_that_fails_tells_its_seed_and_its_end() {
    let seed = first_to_notice(LeaseInvariant::RevokeWaits, 0..DEFAULT_SCHEDULES).unwrap();
    let story = trace_schedule(seed, Some(LeaseInvariant::RevokeWaits), 5);
    assert!(story.contains(&format!("SEED={seed}")) && story.contains("allows key"), "{story}");
    assert!(story.contains("returns OK"), "{story}");
}

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().map(|text| text.parse().unwrap())
}

/// `make simulate`: very many schedules, and how often each rule is missed. `SEED` shows one, `SCHEDULES` says how
/// many.
#[test]
#[ignore = "make simulate runs it"]
fn very_many_schedules() {
    if let Some(seed) = number("SEED") {
        println!("{}", trace_schedule(seed, None, usize::MAX));
        return;
    }
    let schedules = number("SCHEDULES").unwrap_or(1_000_000);
    let started = Instant::now();
    let threads = std::thread::available_parallelism().unwrap().get() as u64;
    let total = std::thread::scope(|scope| {
        let share = |thread| schedules * thread / threads..schedules * (thread + 1) / threads;
        let workers: Vec<_> =
            (0..threads).map(|thread| scope.spawn(move || run_schedules(share(thread)))).collect();
        let mut total = Tally::default();
        workers.into_iter().for_each(|worker| total.add(&worker.join().unwrap()));
        total
    });
    let rate = schedules as f64 / started.elapsed().as_secs_f64();
    println!("{schedules} schedules, {rate:.0} a second, 0 stale ALLOWs\n{total:#?}");
    for rule in LeaseInvariant::ALL {
        let few = 0..DEFAULT_SCHEDULES;
        let missed = few.filter(|seed| run(*seed, Some(rule), false).violation.is_some()).count();
        println!("without {rule:?}: {missed} of {DEFAULT_SCHEDULES} schedules allow what they must not");
    }
}
