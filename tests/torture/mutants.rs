//! Builds with a planted breakage: the same torture of real processes must notice each. A harness that has never failed
//! shows nothing.
//!
//! They need a build with `--cfg keyward_breakable` (`make torture-mutants` makes one): there a process leaves out the
//! rule that `KEYWARD_BREAK` names, and its clock runs as `KEYWARD_CLOCK_RATE` says.

use std::{path::Path, process::Command, time::Duration};

use comfy_table::{Table, presets};
use keyward::domain::lease::LeaseInvariant;

use crate::{faults::FaultKind, run::TortureRun};

/// One breakage, and what brings it to light.
struct PlantedBreakage {
    rule: LeaseInvariant,
    /// The faults that are needed; others would only be in the way.
    faults: &'static [FaultKind],
    /// How fast each replica's clock runs, in thousandths, where that matters.
    clocks: &'static [u32],
    /// Why these.
    why: &'static str,
}

/// Clocks at the ends of what the promise allows.
const EXTREME_CLOCKS: &[u32] = &[900, 1100, 1100];
const SILENT_FAULTS: &[FaultKind] = &[FaultKind::Cut, FaultKind::CutThere, FaultKind::CutBack];

/// The eleven of the protocol's design.
const MUTANTS: [PlantedBreakage; 11] = [
    PlantedBreakage {
        rule: LeaseInvariant::RevokeWaits,
        faults: &[FaultKind::Slow, FaultKind::Cut],
        clocks: &[],
        why: "a replica that hears late still allows",
    },
    PlantedBreakage {
        rule: LeaseInvariant::RetryWaits,
        faults: SILENT_FAULTS,
        clocks: &[],
        why: "a Revoke that timed out on a silent replica is sent again",
    },
    PlantedBreakage {
        rule: LeaseInvariant::DriftIsCovered,
        faults: SILENT_FAULTS,
        clocks: EXTREME_CLOCKS,
        why: "a slow clock holds a lease for longer than a fast one waits",
    },
    PlantedBreakage {
        rule: LeaseInvariant::LostRowsAreWaitedOut,
        faults: &[FaultKind::LoseRows],
        clocks: &[],
        why: "a replica that is left with the old primary is on no list",
    },
    PlantedBreakage {
        rule: LeaseInvariant::LeaseEnds,
        faults: &[FaultKind::Cut, FaultKind::CutThere, FaultKind::CutBack, FaultKind::Pause],
        clocks: &[],
        why: "a replica that is cut off for longer than its lease",
    },
    PlantedBreakage {
        rule: LeaseInvariant::LeaseCountsFromSending,
        faults: &[FaultKind::SlowPause],
        clocks: &[],
        why: "an answer that waits while the process stands still",
    },
    PlantedBreakage {
        rule: LeaseInvariant::MapBeforeDeadline,
        faults: SILENT_FAULTS,
        clocks: &[],
        why: "the renewal after a long silence brings changes and a lease at once",
    },
    PlantedBreakage {
        rule: LeaseInvariant::DeadlineBeforeLookUp,
        faults: SILENT_FAULTS,
        clocks: &[],
        why: "the lease comes back while a Check is between its two steps",
    },
    PlantedBreakage {
        rule: LeaseInvariant::RegisterBeforeSnapshot,
        faults: &[FaultKind::Restart],
        clocks: &[],
        why: "a Revoke between a new process's snapshot and its row",
    },
    PlantedBreakage {
        rule: LeaseInvariant::ApplyBeforeAck,
        faults: &[FaultKind::Refuse],
        clocks: &[],
        why: "a renewal that brings changes acknowledges them before they are applied",
    },
    PlantedBreakage {
        rule: LeaseInvariant::DeadAreWatched,
        faults: &[FaultKind::Cut, FaultKind::CutThere, FaultKind::CutBack, FaultKind::StepWall],
        clocks: &[],
        why: "the database's wall clock is set on while a replica is silent",
    },
];

/// Runs each until it is noticed, at most for as long as `usual` lasts, and before them the same build with nothing
/// left out, which must hold; or only those named. Whether all were noticed.
pub(crate) fn run(usual: &TortureRun, named: &[String]) -> bool {
    assert!(
        is_breakable(&usual.plan.setup.program),
        "KEYWARD_BIN is no breakable build: run 'make torture-mutants'"
    );
    let mut table = Table::new();
    table.load_style(presets::UTF8_BORDERS_ONLY).set_header([
        "left out",
        "noticed",
        "what brings it to light",
    ]);
    let mut all = true;
    if named.is_empty() {
        all = unbroken_run(usual).run().held;
        let said = if all { "nothing to notice" } else { "NOT HELD" };
        table.add_row(["nothing", said, "clocks at the ends of what is allowed"]);
    }
    let wanted =
        |mutant: &&PlantedBreakage| named.is_empty() || named.contains(&format!("{:?}", mutant.rule));
    for mutant in MUTANTS.iter().filter(wanted) {
        println!("\n==== left out: {:?}", mutant.rule);
        let ran = broken_run(usual, mutant).run();
        all &= ran.noticed.is_some();
        let noticed = ran.noticed.map(|after| format!("after {:.0} s", after.as_secs_f64()));
        let noticed = noticed.unwrap_or_else(|| "NOT NOTICED".to_owned());
        table.add_row([format!("{:?}", mutant.rule), noticed, mutant.why.to_owned()]);
    }
    println!("\n{table}");
    all
}

/// Nothing left out: what the others are held against.
fn unbroken_run(usual: &TortureRun) -> TortureRun {
    println!("\n==== nothing left out, clocks 10 % apart");
    let mut run = usual.clone();
    run.plan.clocks = EXTREME_CLOCKS.to_vec();
    run.length = usual.length.min(Duration::from_secs(60));
    run
}

fn broken_run(usual: &TortureRun, mutant: &PlantedBreakage) -> TortureRun {
    let mut run = usual.clone();
    run.plan.setup.environment.push(("KEYWARD_BREAK".to_owned(), format!("{:?}", mutant.rule)));
    run.plan.clocks = mutant.clocks.to_vec();
    run.faults = mutant.faults.to_vec();
    // A slow clock is only the first one's.
    run.victim = (!mutant.clocks.is_empty()).then_some(0);
    run.until_allowed = true;
    run
}

/// A build that can be broken refuses to break a rule that there is not; others do not look.
fn is_breakable(program: &Path) -> bool {
    let said = Command::new(program).arg("--version").env("KEYWARD_BREAK", "Nothing").output();
    !said.unwrap().status.success()
}
