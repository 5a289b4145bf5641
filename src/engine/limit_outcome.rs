//! How a request fares against the limits of its key: each limit evaluated, and the outcome of all of them.
//!
//! What is counted, and where, is in `key_limits.rs` and `limiter.rs`.

use std::time::Duration;

use crate::domain::{
    key::{Quota, RateLimit},
    limit::{GcraState, LimitStatus, PendingQuotaUnits, apply_gcra},
    policy_decision::Reason,
    time::Timestamp,
};

/// How a limited request stands.
#[derive(Clone, Debug, Default)]
pub struct LimitOutcome {
    /// Each limit by name, the quota last under the name `quota`; with its units per window or period.
    pub statuses: Vec<(String, u64, LimitStatus)>,
    /// What refuses it.
    pub refusal_reasons: Vec<Reason>,
    /// Whether units of the quota were used, which the store is to count.
    pub consumed_quota: bool,
    /// Whether the store is to count them at once.
    pub needs_flush: bool,
    /// Whether the rate limits were counted by this process alone although several share them.
    pub is_inexact: bool,
}

impl LimitOutcome {
    /// Of what has no limits, or was not asked.
    pub(crate) const fn empty() -> LimitOutcome {
        LimitOutcome {
            statuses: Vec::new(),
            refusal_reasons: Vec::new(),
            consumed_quota: false,
            needs_flush: false,
            is_inexact: false,
        }
    }

    /// How long until everything that refuses the request would let it through; `None` where nothing refuses
    /// it, or something always will.
    #[must_use]
    pub fn retry_after(&self) -> Option<Duration> {
        let refusing = self.statuses.iter().filter(|(_, _, status)| !status.allowed);
        let waits: Option<Vec<Duration>> = refusing.map(|(_, _, status)| status.retry_after).collect();
        waits?.into_iter().max()
    }

    /// The smallest limit that refuses a request because it is never so large; `None` if there is none.
    #[must_use]
    pub fn smallest_exceeded_limit(&self, cost: u64) -> Option<u64> {
        let refusing = self.statuses.iter().filter(|(_, _, status)| !status.allowed);
        refusing.map(|(_, limit, _)| *limit).filter(|limit| *limit < cost).min()
    }

    /// From how each limit stands without the request and with it, and the quota likewise.
    pub(super) fn from_evaluations(
        rates: &[RateEvaluation<'_>],
        quota: Option<&QuotaEvaluation>,
        dry_run: bool,
    ) -> LimitOutcome {
        let mut outcome = LimitOutcome::default();
        if rates.iter().any(|rate| !rate.with_request.allowed) {
            outcome.refusal_reasons.push(Reason::RateLimited);
        }
        if quota.is_some_and(|evaluation| !evaluation.with_request.allowed) {
            outcome.refusal_reasons.push(Reason::QuotaExceeded);
        }
        let is_consumed = outcome.refusal_reasons.is_empty() && !dry_run;
        // Where nothing is taken, what is left is told as it is.
        let reported = |with_request, without_request| {
            if is_consumed { with_request } else { status_without_request(with_request, without_request) }
        };
        outcome.statuses = rates
            .iter()
            .map(|rate| {
                (rate.limit.name.clone(), rate.limit.limit, reported(rate.with_request, rate.without_request))
            })
            .collect();
        outcome.statuses.extend(quota.map(|evaluation| {
            (
                "quota".to_owned(),
                evaluation.quota.limit,
                reported(evaluation.with_request, evaluation.without_request),
            )
        }));
        outcome
    }
}

/// The verdict on the request, with what is left without it.
fn status_without_request(with_request: LimitStatus, now: LimitStatus) -> LimitStatus {
    LimitStatus { remaining: now.remaining, reset_after: now.reset_after, ..with_request }
}

/// A rate limit, judged.
pub(super) struct RateEvaluation<'k> {
    pub(super) limit: &'k RateLimit,
    pub(super) with_request: LimitStatus,
    pub(super) without_request: LimitStatus,
    /// The level after the request.
    pub(super) state_after: GcraState,
}

impl RateEvaluation<'_> {
    pub(super) fn evaluate(
        limit: &RateLimit,
        level: GcraState,
        cost: u64,
        now: Timestamp,
    ) -> RateEvaluation<'_> {
        let (after, with_request) = apply_gcra(limit, level, cost, now);
        RateEvaluation {
            limit,
            with_request,
            without_request: apply_gcra(limit, level, 0, now).1,
            state_after: after,
        }
    }
}

/// A quota, judged.
#[derive(Clone, Debug)]
pub(super) struct QuotaEvaluation {
    pub(super) quota: Quota,
    pub(super) with_request: LimitStatus,
    pub(super) without_request: LimitStatus,
    /// What the request takes of it.
    pub(super) requested_units: PendingQuotaUnits,
}
