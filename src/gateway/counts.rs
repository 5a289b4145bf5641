//! How many requests were judged how: one counter for each way of asking, mode and reason. The labels are a closed
//! set: nothing that a client sends becomes one.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::domain::{decision::Reason, route::Mode};

use super::{Finding, Via};

/// What is found besides the engine's reasons.
const OTHERS: [&str; 10] = [
    "public",
    "no_credential",
    "many_credentials",
    "no_rule",
    "management_key",
    "bad_request",
    "misconfigured",
    "not_ready",
    "limits_unavailable",
    "lease_lost",
];
const LABELS: usize = Reason::ALL.len() + OTHERS.len();

/// Counters since the start.
#[derive(Debug)]
pub struct Counts {
    judged: [[[AtomicU64; LABELS]; 2]; 2],
    /// Changed rules that were wrong, and that were right.
    reloads: [AtomicU64; 2],
}

impl Default for Counts {
    fn default() -> Self {
        let counter = |_| AtomicU64::new(0);
        let judged = std::array::from_fn(|_| std::array::from_fn(|_| std::array::from_fn(counter)));
        Counts { judged, reloads: Default::default() }
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

fn labels() -> impl Iterator<Item = &'static str> {
    Reason::ALL.into_iter().map(Reason::as_str).chain(OTHERS)
}

impl Counts {
    pub(super) fn note(&self, via: Via, mode: Mode, finding: &Finding) {
        let label = finding.label();
        if let Some(at) = labels().position(|known| known == label) {
            self.judged[via as usize][mode as usize][at].fetch_add(1, Ordering::Relaxed);
        }
    }

    pub(super) fn note_reload(&self, good: bool) {
        self.reloads[usize::from(good)].fetch_add(1, Ordering::Relaxed);
    }

    /// How often changed rules were wrong, and how often right.
    #[must_use]
    pub fn reloads(&self) -> [u64; 2] {
        self.reloads.each_ref().map(|counter| counter.load(Ordering::Relaxed))
    }

    /// Every counter that counted something.
    pub fn iter(&self) -> impl Iterator<Item = Count> {
        let vias = ["ext_authz", "forward"].into_iter().zip(&self.judged);
        vias.flat_map(|(via, modes)| {
            ["enforce", "shadow"].into_iter().zip(modes).flat_map(move |(mode, counters)| {
                labels().zip(counters).filter_map(move |(reason, counter)| {
                    let result = match reason {
                        "ok" | "public" => "allowed",
                        "misconfigured" | "not_ready" | "limits_unavailable" | "lease_lost" => "error",
                        _ => "denied",
                    };
                    let count = counter.load(Ordering::Relaxed);
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
