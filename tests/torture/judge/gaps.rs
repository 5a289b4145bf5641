//! How long there was no answer. A replica gives a definite answer when it allows: a denial needs no lease, so it
//! shows little; and live keys are asked about all the time.

use std::collections::BTreeMap;

use super::{CheckAnswer, Nanos, ObservedCheck};

/// Shorter ones are the machine's.
const SHORTEST: Nanos = 20_000_000;

/// A time without a definite answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct AnswerGap {
    /// Of this replica; None = of all of them.
    pub(crate) replica: Option<u8>,
    pub(crate) from: Nanos,
    pub(crate) to: Nanos,
}

impl AnswerGap {
    pub(crate) fn length(self) -> Nanos {
        self.to - self.from
    }
}

/// All that were longer than the shortest.
#[derive(Debug, Default)]
pub(crate) struct AnswerGaps {
    last: BTreeMap<Option<u8>, Nanos>,
    pub(crate) seen: Vec<AnswerGap>,
}

impl AnswerGaps {
    /// Takes the next Check, in the order of their returns.
    pub(super) fn observe(&mut self, check: &ObservedCheck) {
        if check.answer == CheckAnswer::Allowed {
            for replica in [None, Some(check.replica)] {
                let from = self.last.insert(replica, check.returned).unwrap_or(check.returned);
                let gap = AnswerGap { replica, from, to: check.returned };
                self.seen.extend((gap.length() >= SHORTEST).then_some(gap));
            }
        }
    }

    /// When the replica allowed last.
    pub(crate) fn last(&self, replica: u8) -> Option<Nanos> {
        self.last.get(&Some(replica)).copied()
    }

    /// The longest of those that match.
    pub(crate) fn longest(&self, matches: impl Fn(&AnswerGap) -> bool) -> Option<AnswerGap> {
        self.seen.iter().filter(|gap| matches(gap)).max_by_key(|gap| gap.length()).copied()
    }
}
