//! What a run has shown: a table, the violations, and whether it shows anything at all.

use std::{collections::BTreeSet, time::Duration};

use comfy_table::{CellAlignment, Table, presets};

use crate::{
    faults::{FaultKind, FaultRecord, faults_around},
    judge::{AnswerGap, Judge, JudgeRule, Nanos, ms},
    shared_state::RunRecords,
    test_bed::TestBed,
};

/// A gap belongs to a fault that it begins in, or so soon after.
const AFTERMATH: Nanos = 500_000_000;

/// Less than this in a minute shows nothing.
#[derive(Clone, Copy, Debug)]
pub(crate) struct MinimumActivity {
    pub(crate) checks: u64,
    pub(crate) allowed: u64,
    pub(crate) revokes: u64,
    pub(crate) faults: u64,
    /// Percent of the Checks that must be near a narrowing change.
    pub(crate) near: u64,
}

/// A run of the usual kind, on a slow machine.
pub(crate) const MINIMUM_ACTIVITY: MinimumActivity =
    MinimumActivity { checks: 4_000, allowed: 1_000, revokes: 10, faults: 5, near: 10 };

/// A run that is over.
pub(crate) struct FinishedRun<'r> {
    pub(crate) seed: u64,
    pub(crate) judge: &'r Judge,
    pub(crate) world: &'r TestBed,
    /// How long there were faults.
    pub(crate) length: Duration,
}

impl FinishedRun<'_> {
    /// Prints all of it; whether nothing is wrong.
    pub(crate) fn print(&self) -> bool {
        let strikes = self.world.strikes();
        let books = self.world.field.records();
        println!("\n{}", self.figures(&books, &strikes));
        println!("\n{}", self.faults(&strikes));
        println!("\n{}", self.rules());
        for ((call, words), times) in &books.failures {
            println!("  {times:>8} times {call}: {words}");
        }
        for (remark, times) in self.world.remarks() {
            println!("  {times:>8} times {remark}");
        }
        for violation in &self.judge.violations {
            println!("\nVIOLATION of rule {} at {}", violation.rule.description(), ms(violation.at));
            println!("    {}", violation.story);
            for fault in faults_around(&strikes, violation.at, self.world.lease) {
                println!("    fault: {fault}");
            }
        }
        let missing = self.too_little_activity(&books, strikes.len());
        for little in &missing {
            println!("\nTOO LITTLE: {little}; such a run shows nothing");
        }
        let broken = self.judge.broken();
        let verdict = if broken == 0 && missing.is_empty() { "held" } else { "NOT HELD" };
        println!("\nseed {}: {verdict}, {broken} violations", self.seed);
        broken == 0 && missing.is_empty()
    }

    fn figures(&self, books: &RunRecords, strikes: &[FaultRecord]) -> Table {
        let judged = self.judge.judged;
        let narrowings = &books.narrowings;
        let mut table = table(&["", "number"]);
        let share = percent(judged.near, judged.checks);
        for (what, number) in [
            ("time under faults", format!("{:.0} s", self.length.as_secs_f64())),
            ("Checks", judged.checks.to_string()),
            ("  allowed", judged.allowed.to_string()),
            ("  denied", judged.denied.to_string()),
            ("  without an answer", judged.unanswered.to_string()),
            ("  within 1 s of a narrowing change of the key", format!("{share} %")),
            ("Revokes that were OK", narrowings.revokes.len().to_string()),
            ("other narrowing changes that were OK", narrowings.others.len().to_string()),
            ("narrowing changes that had to be sent again", narrowings.repeated.to_string()),
            ("changes acknowledged in all", books.acknowledged.len().to_string()),
            ("faults", strikes.len().to_string()),
            ("replicas that ended by themselves", self.ended_by_themselves().to_string()),
            ("Revoke, median", times(&narrowings.revokes, 50)),
            ("Revoke, 99 of 100", times(&narrowings.revokes, 99)),
            ("Revoke, slowest", times(&narrowings.revokes, 100)),
            ("other narrowing changes, median", times(&narrowings.others, 50)),
            ("other narrowing changes, slowest", times(&narrowings.others, 100)),
            ("longest gap of all replicas", gap(self.judge.gaps.longest(|gap| gap.replica.is_none()))),
            ("longest gap of one replica", gap(self.judge.gaps.longest(|gap| gap.replica.is_some()))),
        ] {
            table.add_row([what.to_owned(), number]);
        }
        table
    }

    fn faults(&self, strikes: &[FaultRecord]) -> Table {
        let mut table = table(&["fault", "times", "longest gap of one replica", "of all replicas"]);
        let kinds: BTreeSet<FaultKind> = strikes.iter().map(|strike| strike.fault).collect();
        for kind in kinds {
            let of_kind: Vec<_> = strikes.iter().filter(|strike| strike.fault == kind).collect();
            let during = |found: &AnswerGap| {
                of_kind.iter().any(|strike| {
                    let same = strike.replica.is_none()
                        || found.replica.is_none()
                        || strike.replica == found.replica;
                    same && found.from <= strike.to + AFTERMATH && found.to >= strike.from
                })
            };
            let gaps = &self.judge.gaps;
            let one = gaps.longest(|gap| gap.replica.is_some() && during(gap));
            let all = gaps.longest(|gap| gap.replica.is_none() && during(gap));
            table.add_row([kind.description().to_owned(), of_kind.len().to_string(), gap(one), gap(all)]);
        }
        table
    }

    fn rules(&self) -> Table {
        let mut table = table(&["rule", "violations"]);
        for rule in JudgeRule::ALL {
            table.add_row([rule.description().to_owned(), self.judge.count(rule).to_string()]);
        }
        table
    }

    fn ended_by_themselves(&self) -> u32 {
        let ended = |replica: &crate::replicas::ReplicaProcess| {
            replica.ended.load(std::sync::atomic::Ordering::Relaxed)
        };
        self.world.field.replicas.iter().map(ended).sum()
    }

    fn too_little_activity(&self, books: &RunRecords, faults: usize) -> Vec<String> {
        let judged = self.judge.judged;
        let seconds = self.length.as_secs();
        let revokes = books.narrowings.revokes.len() as u64;
        let mut missing = Vec::new();
        for (what, have, a_minute) in [
            ("Checks", judged.checks, MINIMUM_ACTIVITY.checks),
            ("allowed Checks", judged.allowed, MINIMUM_ACTIVITY.allowed),
            ("Revokes", revokes, MINIMUM_ACTIVITY.revokes),
            ("faults", faults as u64, MINIMUM_ACTIVITY.faults),
        ] {
            let want = a_minute * seconds / 60;
            if have < want {
                missing.push(format!("{have} {what} instead of at least {want}"));
            }
        }
        let near = percent(judged.near, judged.checks);
        if near < MINIMUM_ACTIVITY.near {
            missing.push(format!(
                "{near} % of the Checks near a narrowing change, and not {} %",
                MINIMUM_ACTIVITY.near
            ));
        }
        missing
    }
}

fn percent(part: u64, of: u64) -> u64 {
    part * 100 / of.max(1)
}

fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::UTF8_BORDERS_ONLY).set_header(header);
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

fn gap(longest: Option<AnswerGap>) -> String {
    longest.map_or_else(|| "none".to_owned(), |gap| format!("{:.2} s", gap.length() as f64 / 1e9))
}

/// The time that so many of 100 took at the most.
fn times(all: &[Duration], percent: usize) -> String {
    let mut sorted = all.to_vec();
    sorted.sort_unstable();
    let at = (sorted.len() * percent).div_ceil(100).saturating_sub(1);
    sorted.get(at).map_or_else(|| "none".to_owned(), |time| format!("{:.1} ms", time.as_secs_f64() * 1e3))
}
