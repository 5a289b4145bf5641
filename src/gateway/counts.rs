//! How many requests were judged how: one counter for each way of asking, mode and reason. The labels are a closed
//! set: nothing that a client sends becomes one.

use crate::{
    domain::{decision::Reason, route::Mode},
    instruments::Counters,
};

use super::{Finding, Via};

/// What is found besides the engine's reasons.
const OTHERS: [&str; 11] = [
    "public",
    "no_credential",
    "many_credentials",
    "no_rule",
    "management_key",
    "bad_request",
    "too_large",
    "misconfigured",
    "not_ready",
    "limits_unavailable",
    "lease_lost",
];
const LABELS: usize = Reason::ALL.len() + OTHERS.len();

/// Counters since the start.
#[derive(Debug)]
pub struct Counts {
    judged: Counters,
    /// Changed rules that were wrong, and that were right.
    reloads: Counters,
}

impl Default for Counts {
    fn default() -> Self {
        Counts { judged: Counters::new(2 * 2 * LABELS), reloads: Counters::new(2) }
    }
}

/// One counter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Count {
    /// `ext_authz` or `forward`.
    pub via: &'static str,
    /// `enforce` or `shadow`.
    pub mode: &'static str,
    /// `allowed`, `denied`, `error`: what was found, whether it was enforced or not.
    pub result: &'static str,
    /// Why.
    pub reason: &'static str,
    /// How many.
    pub count: u64,
}

/// The place of the first counter of a way of asking in a mode.
const fn first(via: usize, mode: usize) -> usize {
    (via * 2 + mode) * LABELS
}

fn labels() -> impl Iterator<Item = &'static str> {
    Reason::ALL.into_iter().map(Reason::as_str).chain(OTHERS)
}

impl Counts {
    pub(super) fn note(&self, via: Via, mode: Mode, finding: &Finding) {
        let label = finding.label();
        if let Some(at) = labels().position(|known| known == label) {
            self.judged.add(first(via as usize, mode as usize) + at, 1);
        }
    }

    pub(super) fn note_reload(&self, good: bool) {
        self.reloads.add(usize::from(good), 1);
    }

    /// How often changed rules were wrong, and how often right.
    #[must_use]
    pub fn reloads(&self) -> [u64; 2] {
        [0, 1].map(|good| self.reloads.get(good))
    }

    /// Every counter that counted something.
    pub fn iter(&self) -> impl Iterator<Item = Count> {
        ["ext_authz", "forward"].into_iter().enumerate().flat_map(move |(asked, via)| {
            ["enforce", "shadow"].into_iter().enumerate().flat_map(move |(at, mode)| {
                labels().zip(first(asked, at)..).filter_map(move |(reason, at)| {
                    let result = match reason {
                        "ok" | "public" => "allowed",
                        "misconfigured" | "not_ready" | "limits_unavailable" | "lease_lost" => "error",
                        _ => "denied",
                    };
                    let count = self.judged.get(at);
                    (count > 0).then_some(Count { via, mode, result, reason, count })
                })
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_finding_has_a_counter_of_its_own() {
        let counts = Counts::default();
        counts.note(Via::Forward, Mode::Shadow, &Finding::NoRule);
        counts.note(Via::Forward, Mode::Shadow, &Finding::NoRule);
        counts.note(Via::ExtAuthz, Mode::Enforce, &Finding::Public);
        let told: Vec<_> = counts.iter().collect();
        let count = |via, mode, result, reason, count| Count { via, mode, result, reason, count };
        assert_eq!(
            told,
            [
                count("ext_authz", "enforce", "allowed", "public", 1),
                count("forward", "shadow", "denied", "no_rule", 2)
            ]
        );
        assert_eq!(labels().count(), LABELS);
    }
}
