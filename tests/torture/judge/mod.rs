//! The judge: holds what was recorded of a run against the rules that Keyward promises. Pure: no clock, no I/O, so
//! that hand-made histories show that it notices what it must (`tests/it/judge.rs`).
//!
//! All instants are nanoseconds of one monotonic clock, that of the machine that every process of a run is on. So
//! "returned before the other was invoked" is true order, and no search is needed: each call is held against
//! what had certainly happened, and excused by whatever may have.

mod books;
mod gaps;
mod history;

pub(crate) use books::{AcknowledgedChange, LogEntry, PropagationClaim, find_lost};
#[allow(unused_imports, reason = "the harness names them")]
pub(crate) use gaps::{AnswerGap, AnswerGaps};
pub(crate) use history::{ChangeHistory, ChangeOutcome, CheckAnswer, GateId, Nanos, ObservedCheck, TokenId};

use std::collections::BTreeMap;

const SECOND: Nanos = 1_000_000_000;
/// A Check so close to a narrowing change of what it asks about is one that shows something.
const NEAR_CHANGE: Nanos = SECOND;
/// So many violations are told in full; all are counted.
const MAX_DETAILED_VIOLATIONS: usize = 20;

/// What may never happen. The numbers are those of the table that a run prints.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum JudgeRule {
    /// 1: allowed by a Check that was invoked after a narrowing change had returned OK.
    AllowedAfterNarrowing,
    /// 2: allowed what was never granted, or in the name of another key.
    NeverGranted,
    /// 3: denied by a state that must know that the key is live; or a change of what is there was refused.
    WrongDenial,
    /// 4: answered from an older state than before, by the same process.
    WentBack,
    /// 5: a change that was acknowledged is not in the database.
    Lost,
    /// 6: OK, and the report says that it is not in force everywhere.
    FalseReport,
    /// 7: no answer any more, although nothing is wrong any more.
    NoAnswer,
}

impl JudgeRule {
    pub(crate) const ALL: [JudgeRule; 7] = [
        JudgeRule::AllowedAfterNarrowing,
        JudgeRule::NeverGranted,
        JudgeRule::WrongDenial,
        JudgeRule::WentBack,
        JudgeRule::Lost,
        JudgeRule::FalseReport,
        JudgeRule::NoAnswer,
    ];

    /// For people.
    pub(crate) fn description(self) -> &'static str {
        match self {
            JudgeRule::AllowedAfterNarrowing => "1 allowed after a narrowing change was OK",
            JudgeRule::NeverGranted => "2 allowed what was never granted",
            JudgeRule::WrongDenial => "3 denied a live key, or did not know it",
            JudgeRule::WentBack => "4 a replica's state went back",
            JudgeRule::Lost => "5 an acknowledged change is lost",
            JudgeRule::FalseReport => "6 OK with a report that is not complete",
            JudgeRule::NoAnswer => "7 no answer after every fault had ended",
        }
    }
}

/// One case of it.
#[derive(Clone, Debug)]
pub(crate) struct Violation {
    pub(crate) rule: JudgeRule,
    pub(crate) at: Nanos,
    /// What happened.
    pub(crate) story: String,
}

/// How much was judged.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct JudgedCounts {
    pub(crate) checks: u64,
    pub(crate) allowed: u64,
    pub(crate) denied: u64,
    /// Answered with an error: no verdict.
    pub(crate) unanswered: u64,
    /// Within a second of a narrowing change of what they asked about.
    pub(crate) near: u64,
}

/// Hears of everything, in stretches of time.
#[derive(Debug, Default)]
pub(crate) struct Judge {
    pub(crate) judged: JudgedCounts,
    pub(crate) gaps: AnswerGaps,
    /// The first of them, in full.
    pub(crate) violations: Vec<Violation>,
    counts: BTreeMap<JudgeRule, u64>,
    /// Of each process: when it had answered from which state, the newest so far, in order.
    newest: BTreeMap<(u8, u32), Vec<(Nanos, u64)>>,
}

impl Judge {
    /// How often a rule was broken.
    pub(crate) fn count(&self, rule: JudgeRule) -> u64 {
        self.counts.get(&rule).copied().unwrap_or_default()
    }

    /// How often any was.
    pub(crate) fn broken(&self) -> u64 {
        self.counts.values().sum()
    }

    /// Notes a violation.
    pub(crate) fn report_violation(&mut self, rule: JudgeRule, at: Nanos, story: impl FnOnce() -> String) {
        *self.counts.entry(rule).or_default() += 1;
        if self.violations.len() < MAX_DETAILED_VIOLATIONS {
            self.violations.push(Violation { rule, at, story: story() });
        }
    }

    /// Judges the Checks of a stretch of time: all that returned in it. Stretches follow each other, and
    /// `history` knows every change that was begun before the end of this one.
    pub(crate) fn judge_checks(&mut self, history: &ChangeHistory, checks: &mut [ObservedCheck]) {
        checks.sort_unstable_by_key(|check| check.returned);
        for check in checks.iter() {
            self.count_in(history, check);
            self.judge_allowed(history, check);
            self.judge_denied(history, check);
            self.gaps.observe(check);
        }
        for check in checks.iter().filter(|check| check.has_state()) {
            let newest = self.newest.entry((check.replica, check.epoch)).or_default();
            if newest.last().is_none_or(|(_, revision)| *revision < check.revision) {
                newest.push((check.returned, check.revision));
            }
        }
        for check in checks.iter().filter(|check| check.has_state()) {
            self.judge_monotonic(history, check);
        }
    }

    fn count_in(&mut self, history: &ChangeHistory, check: &ObservedCheck) {
        let judged = &mut self.judged;
        judged.checks += 1;
        match check.answer {
            CheckAnswer::Allowed | CheckAnswer::AllowedAnother => judged.allowed += 1,
            CheckAnswer::Denied(_) | CheckAnswer::Stranger => judged.denied += 1,
            CheckAnswer::None => judged.unanswered += 1,
        }
        judged.near += u64::from(history.is_near(check, NEAR_CHANGE));
    }

    fn judge_allowed(&mut self, history: &ChangeHistory, check: &ObservedCheck) {
        match check.answer {
            CheckAnswer::Allowed => {}
            CheckAnswer::AllowedAnother => {
                self.report_violation(JudgeRule::NeverGranted, check.returned, || {
                    format!("{}, in the name of another key", history.describe(check))
                });
                return;
            }
            _ => return,
        }
        if !history.is_granted(check.token) {
            self.report_violation(JudgeRule::NeverGranted, check.returned, || history.describe(check));
        }
        if history.must_be_refused(check) {
            self.report_violation(JudgeRule::AllowedAfterNarrowing, check.returned, || {
                history.describe(check)
            });
        }
    }

    fn judge_denied(&mut self, history: &ChangeHistory, check: &ObservedCheck) {
        let denied = matches!(check.answer, CheckAnswer::Denied(_)) && history.must_be_allowed(check);
        // The callers' own key is live for ever.
        if denied || check.answer == CheckAnswer::Stranger {
            self.report_violation(JudgeRule::WrongDenial, check.returned, || history.describe(check));
        }
    }

    fn judge_monotonic(&mut self, history: &ChangeHistory, check: &ObservedCheck) {
        let newest = &self.newest[&(check.replica, check.epoch)];
        let before = newest.partition_point(|(returned, _)| *returned < check.invoked);
        if let Some((at, revision)) = before.checked_sub(1).map(|last| newest[last])
            && check.revision < revision
        {
            self.report_violation(JudgeRule::WentBack, check.returned, || {
                format!("{}; at {} it had answered from revision {revision}", history.describe(check), ms(at))
            });
        }
    }
}

/// An instant for people.
pub(crate) fn ms(at: Nanos) -> String {
    format!("{}.{:06} ms", at / 1_000_000, at % 1_000_000)
}
