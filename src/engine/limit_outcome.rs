//! Evaluates a request against the limits of its key, and combines the results into one outcome.
//!
//! What is counted, and where, is in `key_limits.rs` and `limiter.rs`.

use std::time::Duration;

use crate::domain::{
    key::{Quota, RateLimit},
    limit::{GcraState, LimitStatus, PendingQuotaUnits, apply_gcra},
    policy_decision::Reason,
    time::Timestamp,
};

/// The outcome of a request's limits.
#[derive(Clone, Debug, Default)]
pub struct LimitOutcome {
    /// Each limit: its name (`quota` for the quota, which is last), its units per window or period, and its status.
    pub statuses: Vec<(String, u64, LimitStatus)>,
    /// The reasons of the limits that refuse the request.
    pub refusal_reasons: Vec<Reason>,
    /// Whether units of the quota were consumed, which the store must record.
    pub consumed_quota: bool,
    /// Whether the store must record them at once.
    pub needs_flush: bool,
    /// Whether this process counted the rate limits alone although other processes share them.
    pub is_inexact: bool,
}

impl LimitOutcome {
    /// The outcome of a key without limits, or of limits that were not evaluated.
    pub(crate) const fn empty() -> LimitOutcome {
        LimitOutcome {
            statuses: Vec::new(),
            refusal_reasons: Vec::new(),
            consumed_quota: false,
            needs_flush: false,
            is_inexact: false,
        }
    }

    /// How long until every refusing limit would allow the request; `None` if none refuses it, or one always will.
    #[must_use]
    pub fn retry_after(&self) -> Option<Duration> {
        let refusing = self.statuses.iter().filter(|(_, _, status)| !status.allowed);
        let waits: Option<Vec<Duration>> = refusing.map(|(_, _, status)| status.retry_after).collect();
        waits?.into_iter().max()
    }

    /// The smallest refusing limit that is less than the cost, if any. Such a request can
    /// never succeed.
    #[must_use]
    pub fn smallest_exceeded_limit(&self, cost: u64) -> Option<u64> {
        let refusing = self.statuses.iter().filter(|(_, _, status)| !status.allowed);
        refusing.map(|(_, limit, _)| *limit).filter(|limit| *limit < cost).min()
    }

    /// Combines the evaluations of the rate limits and the quota.
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
        // If nothing is consumed, the remaining units are those without the request.
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

/// The verdict on the request, with the remaining units as they are without it.
fn status_without_request(with_request: LimitStatus, now: LimitStatus) -> LimitStatus {
    LimitStatus { remaining: now.remaining, reset_after: now.reset_after, ..with_request }
}

/// A rate limit that was evaluated for a request.
pub(super) struct RateEvaluation<'k> {
    pub(super) limit: &'k RateLimit,
    pub(super) with_request: LimitStatus,
    pub(super) without_request: LimitStatus,
    /// The state if the request is allowed.
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

/// A quota that was evaluated for a request.
#[derive(Clone, Debug)]
pub(super) struct QuotaEvaluation {
    pub(super) quota: Quota,
    pub(super) with_request: LimitStatus,
    pub(super) without_request: LimitStatus,
    /// The units that the request consumes from it.
    pub(super) requested_units: PendingQuotaUnits,
}
