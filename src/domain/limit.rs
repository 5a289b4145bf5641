//! Computes rate limits and quotas: how many units are left, and when more will be. The engine stores the state and
//! orders access to it.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::time::Timestamp;

/// One rate limit of a key.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct RateLimit {
    /// Its name within the key.
    pub name: String,
    /// The units that are available per window.
    pub limit: u64,
    /// The length of the window, which refills evenly.
    pub window: Duration,
}

/// The calendar period of a quota, in UTC. A later one in this order holds whole periods of those before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum QuotaPeriod {
    /// Starts at the full hour.
    Hour,
    /// Starts at midnight.
    Day,
    /// Starts at midnight of the first of the month.
    Month,
    /// Never ends, so the quota is never refilled.
    Total,
}

/// A number of units per calendar period.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Quota {
    /// The units that are available per period.
    pub limit: u64,
    /// When the budget is full again.
    pub period: QuotaPeriod,
}

/// The state of a rate limit after a request: the "theoretical arrival time" of GCRA, when all units are available
/// again. Its unit is microseconds since 1970 times the limit, so that nothing is rounded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GcraState(u128);

/// The status of a limit for a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LimitStatus {
    /// Units left, after the request if it was allowed.
    pub remaining: u64,
    /// When all units are there again; `None` = never.
    pub reset_after: Option<Duration>,
    /// How long until the request would be allowed; `None` = it is now, or never will be.
    pub retry_after: Option<Duration>,
    /// Whether the request is allowed.
    pub allowed: bool,
}

impl GcraState {
    /// The state of a limit from which `units` units are taken at `now`, plus `part` of the window's microseconds of
    /// one more.
    #[must_use]
    pub fn from_used_units(limit: &RateLimit, now: Timestamp, units: u64, part: u64) -> GcraState {
        let (all, window) = (u128::from(limit.limit.max(1)), limit.window.as_micros().max(1));
        GcraState(epoch_micros(now) * all + u128::from(units) * window + u128::from(part))
    }
}

fn epoch_micros(at: Timestamp) -> u128 {
    u128::try_from(at.as_micros()).unwrap_or(0)
}

/// Converts the unit of [`GcraState`] to time. Rounds up, so that a client that waits this long has waited long enough.
fn scaled_to_duration(scaled: u128, limit: u128) -> Duration {
    Duration::from_micros(u64::try_from(scaled.div_ceil(limit)).unwrap_or(u64::MAX))
}

/// Judges a request of `cost` units by the Generic Cell Rate Algorithm (ITU-T I.371): `limit` units in any
/// `window`, burst equal to `limit`. Gives the level after the request, were it allowed.
#[must_use]
pub fn apply_gcra(
    limit: &RateLimit,
    level: GcraState,
    cost: u64,
    now: Timestamp,
) -> (GcraState, LimitStatus) {
    let (units, window) = (u128::from(limit.limit.max(1)), limit.window.as_micros().max(1));
    let now = epoch_micros(now) * units;
    let full = window * units;
    // A clock that was set back must not lock a key out for longer than a window.
    let level_now = level.0.clamp(now, now + full);
    let after = level_now + u128::from(cost) * window;
    let allowed = after - now <= full;
    let counted = if allowed { after } else { level_now };
    let standing = LimitStatus {
        remaining: u64::try_from((full - (counted - now)) / window).unwrap_or(u64::MAX),
        reset_after: Some(scaled_to_duration(counted - now, units)),
        retry_after: (!allowed && u128::from(cost) <= units)
            .then(|| scaled_to_duration(after - now - full, units)),
        allowed,
    };
    (GcraState(after), standing)
}

/// Whether a rate limit is at least as tight as `bound`: its burst is no larger, and its units come back no faster. Then
/// `bound` allows every sequence of requests that the limit allows.
#[must_use]
pub fn is_rate_within(limit: &RateLimit, bound: &RateLimit) -> bool {
    let units = |limit: &RateLimit| u128::from(limit.limit.max(1));
    let window = |limit: &RateLimit| limit.window.as_micros().max(1);
    units(limit) <= units(bound) && units(limit) * window(bound) <= units(bound) * window(limit)
}

/// Whether a quota is at least as tight as `bound`: no more units, in the same period or a longer one.
#[must_use]
pub fn is_quota_within(quota: &Quota, bound: &Quota) -> bool {
    quota.limit <= bound.limit && quota.period >= bound.period
}

/// What was used of a quota, and in which period.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QuotaUsage {
    /// Start of the period that is counted.
    pub period_start: Timestamp,
    /// Units consumed in that period.
    pub used_units: u64,
}

/// Units of a quota that were used in one process and that the store does not count yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PendingQuotaUnits {
    /// Start of the period that is counted.
    pub period_start: Timestamp,
    /// Its end; `None` = it has none.
    pub period_end: Option<Timestamp>,
    /// Units consumed in that period.
    pub units: u64,
}

impl PendingQuotaUnits {
    /// Adds two counts. Of different periods the later one counts, because a past period no longer matters.
    #[must_use]
    pub fn merge(self, other: PendingQuotaUnits) -> PendingQuotaUnits {
        match self.period_start.cmp(&other.period_start) {
            std::cmp::Ordering::Equal => {
                PendingQuotaUnits { units: self.units.saturating_add(other.units), ..self }
            }
            std::cmp::Ordering::Less => other,
            std::cmp::Ordering::Greater => self,
        }
    }
}

/// The units of a quota that a process may consume before the store counts them, if several processes share the store:
/// 1/100 of the quota, between 50 and 10,000.
#[must_use]
pub fn quota_block_size(quota: &Quota) -> u64 {
    (quota.limit / 100).clamp(50, 10_000)
}

/// The start of the period that `now` lies in, and of the next one. `Total` has one period, from 1970 on.
#[must_use]
pub fn quota_period_bounds(of: QuotaPeriod, now: Timestamp) -> (Timestamp, Option<Timestamp>) {
    const HOUR: i64 = 3_600_000_000;
    let slice = |length: i64| {
        let start = now.as_micros().div_euclid(length) * length;
        (Timestamp::from_micros(start), Some(Timestamp::from_micros(start + length)))
    };
    match of {
        QuotaPeriod::Hour => slice(HOUR),
        QuotaPeriod::Day => slice(24 * HOUR),
        QuotaPeriod::Month => month_bounds(now),
        QuotaPeriod::Total => (Timestamp::from_micros(0), None),
    }
}

/// The calendar month of an instant, by the civil-from-days algorithm of the proleptic Gregorian calendar
/// (jiff does it; only the instants are ours).
fn month_bounds(now: Timestamp) -> (Timestamp, Option<Timestamp>) {
    let start_of = |date: jiff::civil::Date| {
        let zoned = date.to_zoned(jiff::tz::TimeZone::UTC).ok()?;
        Some(Timestamp::from_micros(zoned.timestamp().as_microsecond()))
    };
    let found = || {
        let at = jiff::Timestamp::from_microsecond(now.as_micros()).ok()?;
        let first = at.to_zoned(jiff::tz::TimeZone::UTC).date().first_of_month();
        let next = first.checked_add(jiff::Span::new().months(1)).ok()?;
        Some((start_of(first)?, start_of(next)))
    };
    // Out of the calendar (after the year 9999) the last month does not end.
    found().unwrap_or((Timestamp::from_micros(0), None))
}

/// Evaluates a request of `cost` units against a quota. Returns the units consumed after the request if it is allowed.
#[must_use]
pub fn apply_quota(
    quota: &Quota,
    spent: Option<QuotaUsage>,
    cost: u64,
    now: Timestamp,
) -> (QuotaUsage, LimitStatus) {
    let (start, next) = quota_period_bounds(quota.period, now);
    let used = spent.filter(|spent| spent.period_start == start).map_or(0, |spent| spent.used_units);
    let allowed = used.checked_add(cost).is_some_and(|after| after <= quota.limit);
    let counted = if allowed { used + cost } else { used };
    let until_next = next.map(|next| next.saturating_duration_since(now));
    let standing = LimitStatus {
        remaining: quota.limit.saturating_sub(counted),
        reset_after: until_next,
        retry_after: if allowed || cost > quota.limit { None } else { until_next },
        allowed,
    };
    (QuotaUsage { period_start: start, used_units: used.saturating_add(cost) }, standing)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn at(micros: i64) -> Timestamp {
        Timestamp::from_micros(1_700_000_000_000_000 + micros)
    }

    fn limit(units: u64, window_ms: u64) -> RateLimit {
        RateLimit { name: "l".to_owned(), limit: units, window: Duration::from_millis(window_ms) }
    }

    #[test]
    fn a_burst_of_the_whole_limit_is_allowed_and_then_one_by_one() {
        let limit = limit(3, 3000);
        let mut level = GcraState::default();
        for left in [2, 1, 0] {
            let (after, standing) = apply_gcra(&limit, level, 1, at(0));
            assert_eq!((standing.allowed, standing.remaining), (true, left));
            level = after;
        }
        let (_, standing) = apply_gcra(&limit, level, 1, at(0));
        assert!(!standing.allowed);
        assert_eq!(standing.retry_after, Some(Duration::from_secs(1)));
        assert_eq!(standing.reset_after, Some(Duration::from_secs(3)));
        assert!(!apply_gcra(&limit, level, 1, at(999_999)).1.allowed);
        assert!(apply_gcra(&limit, level, 1, at(1_000_000)).1.allowed);
    }

    #[test]
    fn a_cost_above_the_limit_never_fits() {
        let (_, standing) = apply_gcra(&limit(3, 1000), GcraState::default(), 4, at(0));
        assert_eq!((standing.allowed, standing.retry_after), (false, None));
    }

    #[test]
    fn a_rate_is_within_another_if_neither_its_burst_nor_its_rate_is_higher() {
        let bound = limit(10, 1000);
        for (within, units, window_ms) in
            [(true, 10, 1000), (true, 5, 500), (true, 10, 2000), (false, 11, 2000), (false, 5, 499)]
        {
            assert_eq!(is_rate_within(&limit(units, window_ms), &bound), within, "{units} in {window_ms}");
        }
    }

    #[test]
    fn a_quota_is_within_another_if_it_has_no_more_units_and_no_shorter_period() {
        use QuotaPeriod::{Day, Hour, Month, Total};
        let bound = Quota { limit: 10, period: Day };
        for (within, units, period) in
            [(true, 10, Day), (true, 9, Month), (true, 10, Total), (false, 11, Total), (false, 1, Hour)]
        {
            assert_eq!(
                is_quota_within(&Quota { limit: units, period }, &bound),
                within,
                "{units} {period:?}"
            );
        }
    }

    #[test]
    fn a_clock_set_back_locks_nobody_out_for_longer_than_a_window() {
        let limit = limit(1, 1000);
        let (level, _) = apply_gcra(&limit, GcraState::default(), 1, at(3_600_000_000));
        let (_, standing) = apply_gcra(&limit, level, 1, at(0));
        assert_eq!(standing.retry_after, Some(Duration::from_secs(1)));
    }

    #[test]
    fn periods_begin_on_the_calendar() {
        let read =
            |text: &str| Timestamp::from_micros(text.parse::<jiff::Timestamp>().unwrap().as_microsecond());
        let now = read("2024-02-29T13:45:10Z");
        for (of, start, next) in [
            (QuotaPeriod::Hour, "2024-02-29T13:00:00Z", "2024-02-29T14:00:00Z"),
            (QuotaPeriod::Day, "2024-02-29T00:00:00Z", "2024-03-01T00:00:00Z"),
            (QuotaPeriod::Month, "2024-02-01T00:00:00Z", "2024-03-01T00:00:00Z"),
        ] {
            assert_eq!(quota_period_bounds(of, now), (read(start), Some(read(next))), "{of:?}");
        }
        assert_eq!(quota_period_bounds(QuotaPeriod::Total, now).1, None);
    }

    #[test]
    fn a_quota_is_full_again_in_the_next_period_and_credits_never() {
        let day = Quota { limit: 2, period: QuotaPeriod::Day };
        let (spent, standing) = apply_quota(&day, None, 2, at(0));
        assert_eq!((standing.allowed, standing.remaining), (true, 0));
        let (_, standing) = apply_quota(&day, Some(spent), 1, at(0));
        assert!(!standing.allowed);
        let tomorrow = at(0).saturating_add(standing.retry_after.unwrap());
        assert!(apply_quota(&day, Some(spent), 1, tomorrow).1.allowed);
        let total = Quota { limit: 2, period: QuotaPeriod::Total };
        let (spent, _) = apply_quota(&total, None, 2, at(0));
        let (_, standing) =
            apply_quota(&total, Some(spent), 1, tomorrow.saturating_add(Duration::from_secs(1 << 30)));
        assert_eq!((standing.allowed, standing.retry_after), (false, None));
    }

    #[test]
    fn a_level_is_told_by_the_units_that_are_taken() {
        let limit = limit(3, 3000);
        let (level, _) = apply_gcra(&limit, GcraState::default(), 2, at(0));
        assert_eq!(level, GcraState::from_used_units(&limit, at(0), 2, 0));
        // A microsecond gives three microseconds of a unit back.
        let later = GcraState::from_used_units(&limit, at(1), 1, 3_000_000 - 3);
        assert_eq!(apply_gcra(&limit, level, 0, at(1)).1, apply_gcra(&limit, later, 0, at(1)).1);
    }

    #[test]
    fn units_add_up_within_a_period_and_a_later_one_starts_afresh() {
        let drawn = |period, units| PendingQuotaUnits { period_start: at(period), period_end: None, units };
        assert_eq!(drawn(0, 2).merge(drawn(0, 3)), drawn(0, 5));
        assert_eq!(drawn(0, 2).merge(drawn(9, 3)), drawn(9, 3));
        assert_eq!(drawn(9, 2).merge(drawn(0, 3)), drawn(9, 2));
    }

    #[test]
    fn a_block_is_a_hundredth_within_bounds() {
        let block = |limit| quota_block_size(&Quota { limit, period: QuotaPeriod::Day });
        assert_eq!([1, 10_000, 100_000, 1_000_000_000].map(block), [50, 100, 1000, 10_000]);
    }

    proptest! {
        #[test]
        fn what_a_rate_within_another_allows_the_other_allows(
            (units, window_ms, wide, wide_ms) in (1u64..20, 1u64..500, 1u64..20, 1u64..500),
            steps in proptest::collection::vec((0i64..200_000, 1u64..6), 1..60),
        ) {
            let (tight, wide) = (limit(units, window_ms), limit(wide, wide_ms));
            prop_assume!(is_rate_within(&tight, &wide));
            let (mut inner, mut outer, mut now) = (GcraState::default(), GcraState::default(), 0i64);
            for (wait, cost) in steps {
                now += wait;
                let (after, standing) = apply_gcra(&tight, inner, cost, at(now));
                if standing.allowed {
                    inner = after;
                    let (after, standing) = apply_gcra(&wide, outer, cost, at(now));
                    prop_assert!(standing.allowed);
                    outer = after;
                }
            }
        }

        /// A naive bucket with exact fractions: `limit` units, one more each `window / limit`.
        #[test]
        fn the_gcra_agrees_with_a_bucket_counted_in_fractions(
            units in 1u64..50, window_ms in 1u64..5000,
            steps in proptest::collection::vec((0i64..2_000_000, 1u64..6), 1..60),
        ) {
            let limit = limit(units, window_ms);
            let window = i128::from(window_ms) * 1000;
            // The bucket in units times the window, so that one microsecond adds `units`.
            let full = i128::from(units) * window;
            let (mut level, mut bucket, mut now) = (GcraState::default(), full, 0i64);
            for (wait, cost) in steps {
                now += wait;
                bucket = full.min(bucket + i128::from(wait) * i128::from(units));
                let fits = bucket >= i128::from(cost) * window;
                let (after, standing) = apply_gcra(&limit, level, cost, at(now));
                prop_assert_eq!(standing.allowed, fits);
                if fits {
                    bucket -= i128::from(cost) * window;
                    level = after;
                }
                prop_assert_eq!(i128::from(standing.remaining), bucket / window);
            }
        }
    }
}
