//! Counts one key's limits in this process: the state between Checks, for the arithmetic of `domain::limit`.
//!
//! Nothing here waits; each limited key has a lock that is held for the arithmetic only.
//!
//! Rate limits are counted here if the process is the only one or counts for itself. A quota belongs to the store: its
//! usage is what the store has recorded for all processes, plus the units used here that it has not recorded yet. If
//! several processes share the store, those units must not exceed a block ([`quota_block_size`]).

use std::{
    collections::VecDeque,
    hash::{DefaultHasher, Hasher as _},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use crate::domain::{
    key::{Quota, RateLimit},
    key_attributes::KeyAttributes,
    limit::{
        GcraState, LimitStatus, PendingQuotaUnits, QuotaUsage, apply_quota, quota_block_size,
        quota_period_bounds,
    },
    time::Timestamp,
};

use super::limit_outcome::{LimitOutcome, QuotaEvaluation, RateEvaluation};

/// The state of one key's rate limits and quota.
#[derive(Debug, Default)]
pub struct KeyLimitState(Mutex<KeyLimitCounters>);

#[derive(Debug, Default)]
struct KeyLimitCounters {
    /// The state of each rate limit; a limit that was changed starts full.
    gcra_states: Vec<(RateLimit, GcraState)>,
    /// The usage by all processes that the store has recorded.
    recorded_usage: Option<QuotaUsage>,
    /// The units used here that the store has not recorded yet.
    pending_units: Option<PendingQuotaUnits>,
    /// Units reserved for requests that may not use them.
    reserved_units: u64,
    /// Whether a flush was requested since the last one.
    is_flush_requested: bool,
    /// The IDs of recent requests that consumed units, oldest first.
    recent_requests: VecDeque<(RequestDedupId, Timestamp)>,
}

/// The requester's ID of a request. Envoy retries with the same ID if a response does not arrive in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestDedupId(u64);

impl RequestDedupId {
    /// Hashes the ID of a request; it is chosen by the requester, not by its clients.
    #[must_use]
    pub fn from_request_id(id: &[u8]) -> RequestDedupId {
        let mut hasher = DefaultHasher::new();
        hasher.write(id);
        RequestDedupId(hasher.finish())
    }

    /// The hash of the ID.
    #[must_use]
    pub fn to_u64(self) -> u64 {
        self.0
    }
}

/// What a request consumes from the limits of its key.
#[derive(Clone, Copy, Debug)]
pub struct Consumption {
    /// The units to consume from every limit.
    pub cost: u64,
    /// The ID that repetitions of the request share.
    pub dedup_id: Option<RequestDedupId>,
    /// Evaluate only, and consume nothing.
    pub dry_run: bool,
}

impl Consumption {
    /// One unit: what a call without a cost consumes.
    pub const ONE: Consumption = Consumption::with_cost(1);

    /// Consumes this number of units, without an ID.
    #[must_use]
    pub const fn with_cost(cost: u64) -> Consumption {
        Consumption { cost, dedup_id: None, dry_run: false }
    }

    /// The same consumption as a dry run.
    #[must_use]
    pub const fn into_dry_run(self) -> Consumption {
        Consumption { dry_run: true, ..self }
    }
}

/// How long an ID is remembered for a repetition.
const DEDUP_WINDOW: Duration = Duration::from_secs(2);
/// The maximum number of IDs remembered per key.
const MAX_DEDUP_IDS: usize = 1024;

/// The block is used up and the store has not recorded it yet, so it is unknown whether the quota has room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QuotaBlockExhausted;

impl KeyLimitState {
    fn lock(&self) -> MutexGuard<'_, KeyLimitCounters> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets the usage that the store has recorded for all processes.
    pub fn restore_usage(&self, recorded: QuotaUsage) {
        self.lock().recorded_usage = Some(recorded);
    }

    /// Consumes the units from all limits of the key, or from none if any refuses. A repetition with the same ID
    /// consumes nothing. `is_shared`: other processes use the quota too.
    ///
    /// # Errors
    /// No limit refuses, but the quota's block is used up.
    pub fn consume(
        &self,
        key: &impl KeyAttributes,
        consumption: Consumption,
        is_shared: bool,
        now: Timestamp,
    ) -> Result<LimitOutcome, QuotaBlockExhausted> {
        let mut state = self.lock();
        let is_repeated =
            consumption.dedup_id.is_some_and(|dedup_id| state.is_repeated_request(dedup_id, now));
        // Evaluated at no cost, a repetition gets the same outcome as before.
        let cost = if is_repeated { 0 } else { consumption.cost };
        let limits = key.rate_limits();
        let rates: Vec<_> = limits
            .iter()
            .map(|limit| RateEvaluation::evaluate(limit, state.gcra_state(limit), cost, now))
            .collect();
        let quota = key.quota().map(|quota| state.evaluate_quota(quota, cost, now));
        let mut outcome = LimitOutcome::from_evaluations(&rates, quota.as_ref(), consumption.dry_run);
        if consumption.dry_run || !outcome.refusal_reasons.is_empty() {
            return Ok(outcome);
        }
        if let Some(quota) = quota.filter(|quota| quota.requested_units.units > 0) {
            state.check_quota_block(&quota, is_shared)?;
            outcome.consumed_quota = true;
            outcome.needs_flush = state.consume_quota(&quota, is_shared);
        }
        state.gcra_states = rates.iter().map(|rate| (rate.limit.clone(), rate.state_after)).collect();
        if let Some(dedup_id) = consumption.dedup_id.filter(|_| !is_repeated) {
            state.remember_request(dedup_id, now);
        }
        Ok(outcome)
    }

    /// Reserves the quota's units for a request whose rate limits are counted elsewhere. Dropping the reservation
    /// returns them. The request's ID is ignored.
    ///
    /// # Errors
    /// The quota does not refuse, but its block is used up.
    pub fn reserve(
        self: &Arc<Self>,
        key: &impl KeyAttributes,
        consumption: Consumption,
        is_shared: bool,
        now: Timestamp,
    ) -> Result<QuotaReservation, QuotaBlockExhausted> {
        let mut state = self.lock();
        let quota = key.quota().map(|quota| state.evaluate_quota(quota, consumption.cost, now));
        let reserved = quota.as_ref().filter(|quota| quota.with_request.allowed && !consumption.dry_run);
        let mut units = 0;
        if let Some(quota) = reserved {
            state.check_quota_block(quota, is_shared)?;
            units = quota.requested_units.units;
            state.reserved_units += units;
        }
        Ok(QuotaReservation {
            limit_state: self.clone(),
            evaluation: quota,
            reserved_units: units,
            is_shared,
        })
    }

    /// The units that the store has to record, if any. Clears the request for a flush.
    #[must_use]
    pub fn take_pending_units(&self) -> Option<PendingQuotaUnits> {
        let mut state = self.lock();
        state.is_flush_requested = false;
        state.pending_units
    }

    /// Confirms that the store has recorded the `flushed` units, and sets the `total` that it
    /// has recorded for all processes.
    pub fn confirm_flush(&self, flushed: PendingQuotaUnits, total: QuotaUsage) {
        let mut state = self.lock();
        if let Some(pending) = &mut state.pending_units
            && pending.period_start == flushed.period_start
        {
            pending.units = pending.units.saturating_sub(flushed.units);
        }
        state.pending_units = state.pending_units.filter(|pending| pending.units > 0);
        // The stored row is of a later period if this process's clock is behind; then it counts for itself.
        let recorded_before = state
            .recorded_usage
            .filter(|recorded| recorded.period_start == flushed.period_start)
            .map_or(0, |recorded| recorded.used_units);
        let local_total = QuotaUsage {
            period_start: flushed.period_start,
            used_units: recorded_before.saturating_add(flushed.units),
        };
        state.recorded_usage =
            Some(if total.period_start == flushed.period_start { total } else { local_total });
    }

    /// Requests a flush of the pending units. Returns whether the caller must pass the request on.
    #[must_use]
    pub fn request_flush(&self) -> bool {
        let mut state = self.lock();
        state.pending_units.is_some() && !std::mem::replace(&mut state.is_flush_requested, true)
    }
}

/// Units of a quota that are reserved for a request.
#[derive(Debug)]
pub struct QuotaReservation {
    limit_state: Arc<KeyLimitState>,
    evaluation: Option<QuotaEvaluation>,
    reserved_units: u64,
    is_shared: bool,
}

impl QuotaReservation {
    /// Returns whether the quota refuses the request.
    #[must_use]
    pub fn is_refused(&self) -> bool {
        self.evaluation.as_ref().is_some_and(|quota| !quota.with_request.allowed)
    }

    /// Consumes the reserved units if the rate limits in these states allow the request; returns them otherwise. They
    /// are also returned if the request was allowed before (`is_repeated`).
    #[must_use]
    pub fn commit_if_allowed(
        mut self,
        key: &impl KeyAttributes,
        consumption: Consumption,
        levels: &[GcraState],
        is_repeated: bool,
        now: Timestamp,
    ) -> LimitOutcome {
        let cost = if is_repeated { 0 } else { consumption.cost };
        let limits = key.rate_limits().iter().zip(levels);
        let rates: Vec<_> =
            limits.map(|(limit, level)| RateEvaluation::evaluate(limit, *level, cost, now)).collect();
        if is_repeated && let Some(quota) = &mut self.evaluation {
            quota.with_request = LimitStatus { allowed: true, retry_after: None, ..quota.without_request };
        }
        let mut outcome =
            LimitOutcome::from_evaluations(&rates, self.evaluation.as_ref(), consumption.dry_run);
        if let Some(quota) = self.evaluation.as_ref().filter(|_| self.reserved_units > 0 && !is_repeated)
            && outcome.refusal_reasons.is_empty()
        {
            let mut state = self.limit_state.lock();
            state.reserved_units =
                state.reserved_units.saturating_sub(std::mem::take(&mut self.reserved_units));
            outcome.consumed_quota = true;
            outcome.needs_flush = state.consume_quota(quota, self.is_shared);
        }
        outcome
    }
}

impl Drop for QuotaReservation {
    fn drop(&mut self) {
        if self.reserved_units > 0 {
            let mut state = self.limit_state.lock();
            state.reserved_units = state.reserved_units.saturating_sub(self.reserved_units);
        }
    }
}

impl KeyLimitCounters {
    fn gcra_state(&self, limit: &RateLimit) -> GcraState {
        let recorded_before = self.gcra_states.iter().find(|(of, _)| of == limit);
        recorded_before.map_or_else(GcraState::default, |(_, level)| *level)
    }

    fn unrecorded_units(&self, period: Timestamp) -> u64 {
        let here = self.pending_units.filter(|pending| pending.period_start == period);
        here.map_or(0, |pending| pending.units).saturating_add(self.reserved_units)
    }

    /// Evaluates a request against the quota. If the limit was changed within a period, its usage remains.
    fn evaluate_quota(&self, quota: &Quota, cost: u64, now: Timestamp) -> QuotaEvaluation {
        let (start, until) = quota_period_bounds(quota.period, now);
        let recorded_units = self
            .recorded_usage
            .filter(|recorded| recorded.period_start == start)
            .map_or(0, |recorded| recorded.used_units);
        let recorded = Some(QuotaUsage {
            period_start: start,
            used_units: recorded_units.saturating_add(self.unrecorded_units(start)),
        });
        QuotaEvaluation {
            quota: quota.clone(),
            with_request: apply_quota(quota, recorded, cost, now).1,
            without_request: apply_quota(quota, recorded, 0, now).1,
            requested_units: PendingQuotaUnits { period_start: start, period_end: until, units: cost },
        }
    }

    /// Checks that the units fit into the block. A request that exceeds a whole block is admitted
    /// if nothing else is pending.
    fn check_quota_block(&self, quota: &QuotaEvaluation, is_shared: bool) -> Result<(), QuotaBlockExhausted> {
        let unrecorded = self.unrecorded_units(quota.requested_units.period_start);
        let fits = unrecorded == 0
            || unrecorded.saturating_add(quota.requested_units.units) <= quota_block_size(&quota.quota);
        if fits || !is_shared { Ok(()) } else { Err(QuotaBlockExhausted) }
    }

    /// Consumes the units. Returns whether the store must record them at once: if half a block is pending, or if so
    /// little is left that other processes must know of each unit.
    fn consume_quota(&mut self, quota: &QuotaEvaluation, is_shared: bool) -> bool {
        // Units of an earlier period no longer count.
        let pending =
            self.pending_units.filter(|pending| pending.period_start == quota.requested_units.period_start);
        self.pending_units =
            Some(pending.map_or(quota.requested_units, |pending| pending.merge(quota.requested_units)));
        let block = quota_block_size(&quota.quota);
        let is_urgent = self.unrecorded_units(quota.requested_units.period_start) >= block / 2
            || quota.with_request.remaining < block;
        is_shared && is_urgent && !std::mem::replace(&mut self.is_flush_requested, true)
    }

    fn is_repeated_request(&self, dedup_id: RequestDedupId, now: Timestamp) -> bool {
        let window_start = now.saturating_sub(DEDUP_WINDOW);
        self.recent_requests
            .iter()
            .rev()
            .take_while(|(_, at)| *at >= window_start)
            .any(|(recorded_before, _)| *recorded_before == dedup_id)
    }

    fn remember_request(&mut self, dedup_id: RequestDedupId, now: Timestamp) {
        let window_start = now.saturating_sub(DEDUP_WINDOW);
        while self.recent_requests.len() >= MAX_DEDUP_IDS
            || self.recent_requests.front().is_some_and(|(_, at)| *at < window_start)
        {
            self.recent_requests.pop_front();
        }
        self.recent_requests.push_back((dedup_id, now));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::{
        key::{
            ApiKey, QuotaPeriod,
            tests::{at_seconds, sample_key},
        },
        limit::apply_gcra,
        policy_decision::Reason,
    };

    fn limited(limits: &[(&str, u64)], quota: Option<u64>) -> ApiKey {
        let mut key = sample_key();
        key.spec.rate_limits = limits
            .iter()
            .map(|(name, limit)| RateLimit {
                name: (*name).to_owned(),
                limit: *limit,
                window: Duration::from_secs(60),
            })
            .collect();
        key.spec.quota = quota.map(|limit| Quota { limit, period: QuotaPeriod::Day });
        key
    }

    fn consume_unshared(
        limit_state: &KeyLimitState,
        key: &ApiKey,
        consumption: Consumption,
        now: Timestamp,
    ) -> LimitOutcome {
        limit_state.consume(key, consumption, false, now).unwrap()
    }

    /// Usage in the period of the tests' first instant.
    fn used_today(used: u64) -> QuotaUsage {
        QuotaUsage { period_start: quota_period_bounds(QuotaPeriod::Day, at_seconds(0)).0, used_units: used }
    }

    fn remaining_units(limit_state: &KeyLimitState, key: &ApiKey, now: Timestamp) -> u64 {
        let outcome = consume_unshared(limit_state, key, Consumption { dry_run: true, ..units(1) }, now);
        outcome.statuses.last().unwrap().2.remaining
    }

    fn units(cost: u64) -> Consumption {
        Consumption { cost, dedup_id: None, dry_run: false }
    }

    #[test]
    fn what_is_asked_again_under_the_same_number_is_taken_once() {
        let (key, limit_state) = (limited(&[("l", 2)], Some(2)), KeyLimitState::default());
        let numbered = |id: &str| Consumption {
            dedup_id: Some(RequestDedupId::from_request_id(id.as_bytes())),
            ..units(2)
        };
        for _ in 0..3 {
            let outcome = consume_unshared(&limit_state, &key, numbered("7"), at_seconds(0));
            assert!(outcome.refusal_reasons.is_empty());
            assert_eq!(outcome.statuses[0].2.remaining, 0);
        }
        assert_eq!(
            consume_unshared(&limit_state, &key, numbered("8"), at_seconds(0)).refusal_reasons.len(),
            2
        );
        assert_eq!(
            consume_unshared(&limit_state, &key, numbered("8"), at_seconds(0)).refusal_reasons.len(),
            2,
            "what was refused took nothing"
        );
        let later = at_seconds(0).saturating_add(DEDUP_WINDOW).saturating_add(Duration::from_micros(1));
        assert!(
            !consume_unshared(&limit_state, &key, numbered("7"), later).refusal_reasons.is_empty(),
            "a number is not for ever"
        );
    }

    #[test]
    fn all_limits_are_taken_from_or_none() {
        let (key, limit_state) = (limited(&[("wide", 10), ("tight", 2)], Some(5)), KeyLimitState::default());
        assert!(consume_unshared(&limit_state, &key, units(2), at_seconds(0)).refusal_reasons.is_empty());
        let refused = consume_unshared(&limit_state, &key, units(1), at_seconds(0));
        assert_eq!(refused.refusal_reasons, [Reason::RateLimited]);
        let left: Vec<_> = refused.statuses.iter().map(|(name, _, s)| (name.as_str(), s.remaining)).collect();
        assert_eq!(left, [("wide", 8), ("tight", 0), ("quota", 3)], "the refused request took nothing");
    }

    #[test]
    fn a_dry_run_takes_nothing() {
        let (key, limit_state) = (limited(&[("l", 1)], Some(1)), KeyLimitState::default());
        for _ in 0..3 {
            let outcome = consume_unshared(
                &limit_state,
                &key,
                Consumption { dry_run: true, ..units(1) },
                at_seconds(0),
            );
            assert!(outcome.refusal_reasons.is_empty());
            assert_eq!(outcome.statuses[0].2.remaining, 1);
        }
    }

    #[test]
    fn a_quota_goes_on_where_it_was_before_a_restart() {
        let key = limited(&[], Some(3));
        let restarted = KeyLimitState::default();
        restarted.restore_usage(used_today(2));
        assert_eq!(
            consume_unshared(&restarted, &key, units(2), at_seconds(1)).refusal_reasons,
            [Reason::QuotaExceeded]
        );
        assert!(consume_unshared(&restarted, &key, units(1), at_seconds(1)).refusal_reasons.is_empty());
    }

    #[test]
    fn exactly_the_limit_is_allowed_to_many_at_once() {
        let (key, limit_state) =
            (Arc::new(limited(&[("l", 100)], Some(70))), Arc::new(KeyLimitState::default()));
        let callers: Vec<_> = (0..64)
            .map(|_| {
                let (key, limit_state) = (key.clone(), limit_state.clone());
                std::thread::spawn(move || {
                    (0..5)
                        .filter(|_| {
                            consume_unshared(&limit_state, &key, units(1), at_seconds(0))
                                .refusal_reasons
                                .is_empty()
                        })
                        .count()
                })
            })
            .collect();
        let allowed: usize = callers.into_iter().map(|caller| caller.join().unwrap()).sum();
        assert_eq!(allowed, 70);
    }

    #[test]
    fn what_the_store_has_counted_is_counted_once() {
        let (key, limit_state) = (limited(&[], Some(100)), KeyLimitState::default());
        consume_unshared(&limit_state, &key, units(5), at_seconds(0));
        let flushed = limit_state.take_pending_units().unwrap();
        consume_unshared(&limit_state, &key, units(2), at_seconds(0));
        limit_state.confirm_flush(flushed, used_today(30));
        assert_eq!(remaining_units(&limit_state, &key, at_seconds(0)), 100 - 30 - 2, "others have used 25");
        assert_eq!(limit_state.take_pending_units().unwrap().units, 2);
        limit_state.confirm_flush(limit_state.take_pending_units().unwrap(), used_today(32));
        assert_eq!(
            (remaining_units(&limit_state, &key, at_seconds(0)), limit_state.take_pending_units()),
            (68, None)
        );
    }

    #[test]
    fn a_process_whose_clock_is_behind_goes_on_counting_by_itself() {
        let (key, limit_state) = (limited(&[], Some(10)), KeyLimitState::default());
        for _ in 0..2 {
            consume_unshared(&limit_state, &key, units(3), at_seconds(0));
            let tomorrow = quota_period_bounds(QuotaPeriod::Day, at_seconds(0)).1.unwrap();
            limit_state.confirm_flush(
                limit_state.take_pending_units().unwrap(),
                QuotaUsage { period_start: tomorrow, used_units: 1 },
            );
        }
        assert_eq!(remaining_units(&limit_state, &key, at_seconds(0)), 4);
    }

    #[test]
    fn a_shared_quota_is_used_by_a_block_at_the_most_until_the_store_has_counted_it() {
        let (key, limit_state) = (limited(&[], Some(10_000)), KeyLimitState::default());
        let mut hurried = 0;
        for _ in 0..100 {
            hurried +=
                usize::from(limit_state.consume(&key, units(1), true, at_seconds(0)).unwrap().needs_flush);
        }
        assert_eq!(hurried, 1, "when half of it is used up");
        assert_eq!(
            limit_state.consume(&key, units(1), true, at_seconds(0)).unwrap_err(),
            QuotaBlockExhausted
        );
        let dry = limit_state
            .consume(&key, Consumption { dry_run: true, ..units(1) }, true, at_seconds(0))
            .unwrap();
        assert!(dry.refusal_reasons.is_empty());
        let flushed = limit_state.take_pending_units().unwrap();
        assert_eq!(
            limit_state.consume(&key, units(1), true, at_seconds(0)).unwrap_err(),
            QuotaBlockExhausted,
            "it is being written"
        );
        limit_state.confirm_flush(flushed, used_today(100));
        limit_state.consume(&key, units(1), true, at_seconds(0)).unwrap();
    }

    #[test]
    fn what_is_certainly_exceeded_is_refused_though_a_block_is_used_up() {
        let (key, limit_state) = (limited(&[("l", 60)], Some(60)), KeyLimitState::default());
        limit_state.consume(&key, units(50), true, at_seconds(0)).unwrap();
        assert_eq!(
            limit_state.consume(&key, units(1), true, at_seconds(0)).unwrap_err(),
            QuotaBlockExhausted
        );
        let refused = limit_state.consume(&key, units(11), true, at_seconds(0)).unwrap().refusal_reasons;
        assert_eq!(refused, [Reason::RateLimited, Reason::QuotaExceeded]);
        assert!(
            KeyLimitState::default().consume(&key, units(60), true, at_seconds(0)).is_ok(),
            "more than a block goes alone"
        );
    }

    #[test]
    fn near_the_end_of_a_shared_quota_each_use_is_to_be_counted_at_once() {
        let (key, limit_state) = (limited(&[], Some(10_000)), KeyLimitState::default());
        assert!(!limit_state.consume(&key, units(1), true, at_seconds(0)).unwrap().needs_flush);
        limit_state.restore_usage(used_today(9_950));
        assert!(limit_state.consume(&key, units(1), true, at_seconds(0)).unwrap().needs_flush);
        assert!(
            !limit_state.consume(&key, units(1), true, at_seconds(0)).unwrap().needs_flush,
            "a flush was requested already"
        );
        assert!(limit_state.take_pending_units().is_some());
        assert!(limit_state.consume(&key, units(1), true, at_seconds(0)).unwrap().needs_flush);
    }

    #[test]
    fn units_held_for_a_request_come_back_unless_it_takes_them() {
        let (key, limit_state) = (limited(&[("l", 1)], Some(3)), Arc::new(KeyLimitState::default()));
        let free = [GcraState::default()];
        let reservation = limit_state.reserve(&key, units(2), false, at_seconds(0)).unwrap();
        assert_eq!(remaining_units(&limit_state, &key, at_seconds(0)), 1, "nobody else has them meanwhile");
        assert!(limit_state.reserve(&key, units(2), false, at_seconds(0)).unwrap().is_refused());
        drop(reservation);
        let reservation = limit_state.reserve(&key, units(1), false, at_seconds(0)).unwrap();
        let full = [apply_gcra(&key.spec.rate_limits[0], GcraState::default(), 1, at_seconds(0)).0];
        let outcome = reservation.commit_if_allowed(&key, units(1), &full, false, at_seconds(0));
        assert_eq!((outcome.refusal_reasons, outcome.consumed_quota), (vec![Reason::RateLimited], false));
        let reservation = limit_state.reserve(&key, units(1), false, at_seconds(0)).unwrap();
        let outcome = reservation.commit_if_allowed(&key, units(1), &full, true, at_seconds(0));
        assert_eq!(
            (outcome.refusal_reasons, outcome.consumed_quota),
            (vec![], false),
            "it was let through before"
        );
        assert_eq!(
            (remaining_units(&limit_state, &key, at_seconds(0)), limit_state.take_pending_units()),
            (3, None)
        );
        let reservation = limit_state.reserve(&key, units(1), false, at_seconds(0)).unwrap();
        let outcome = reservation.commit_if_allowed(&key, units(1), &free, false, at_seconds(0));
        assert_eq!((outcome.statuses[1].2.remaining, outcome.consumed_quota), (2, true));
        assert_eq!(limit_state.take_pending_units().unwrap().units, 1);
    }
}
