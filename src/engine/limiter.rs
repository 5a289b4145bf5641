//! Rate limits and quotas of keys: where the arithmetic of `domain::limit` is kept between Checks.
//!
//! Exact within this process: each limited key has one lock, held for the arithmetic alone. Keys without limits
//! never come here. Rate limits start full after a restart; what is spent of a quota is written behind, so a
//! kill forgets at most what was spent since the last flush.

use std::{
    sync::{Mutex, PoisonError},
    time::Duration,
};

use crate::domain::{
    decision::Reason,
    key::{Key, Quota, RateLimit},
    limit::{Level, Spent, Standing, gcra, spend},
    time::Timestamp,
};

/// What is used of one key's limits.
#[derive(Debug, Default)]
pub struct Budget(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// The limits that the levels are of; a limit that changed starts full.
    levels: Vec<(RateLimit, Level)>,
    quota: Option<(Quota, Spent)>,
    /// Read from the store, until the quota that it is of is known.
    restored: Option<Spent>,
}

/// How a limited request stands.
#[derive(Clone, Debug, Default)]
pub struct Usage {
    /// Each limit by name, the quota last under the name `quota`; with its units per window or period.
    pub standings: Vec<(String, u64, Standing)>,
    /// What refuses it.
    pub refused: Vec<Reason>,
    /// What is spent of the quota now, when this request spent some of it.
    pub spent: Option<Spent>,
}

impl Usage {
    /// How long until everything that refuses the request would let it through; `None` where nothing refuses
    /// it, or something always will.
    #[must_use]
    pub fn retry_after(&self) -> Option<Duration> {
        let refusing = self.standings.iter().filter(|(_, _, standing)| !standing.allowed);
        let waits: Option<Vec<Duration>> = refusing.map(|(_, _, standing)| standing.retry_after).collect();
        waits?.into_iter().max()
    }
}

impl Budget {
    /// Takes up what was spent before this process started.
    pub fn restore(&self, spent: Spent) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).restored = Some(spent);
    }

    /// Takes `cost` units from every limit of the key, or, if any refuses, from none. With `dry_run` it takes
    /// none either way.
    pub fn take(&self, key: &Key, cost: u64, now: Timestamp, dry_run: bool) -> Usage {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut usage = Usage::default();
        let levels: Vec<_> = key
            .terms
            .rate_limits
            .iter()
            .map(|limit| {
                let level = state
                    .levels
                    .iter()
                    .find(|(of, _)| of == limit)
                    .map_or_else(Level::default, |(_, level)| *level);
                (limit.clone(), level, gcra(limit, level, cost, now))
            })
            .collect();
        let quota = key.terms.quota.as_ref().map(|quota| {
            // A changed limit of the same period keeps what is spent of it.
            let known =
                state.quota.as_ref().filter(|(of, _)| of.period == quota.period).map(|(_, spent)| *spent);
            let spent = known.or(state.restored);
            (quota.clone(), spent, spend(quota, spent, cost, now))
        });
        if levels.iter().any(|(_, _, (_, standing))| !standing.allowed) {
            usage.refused.push(Reason::RateLimited);
        }
        if quota.as_ref().is_some_and(|(_, _, (_, standing))| !standing.allowed) {
            usage.refused.push(Reason::QuotaExceeded);
        }
        let taken = usage.refused.is_empty() && !dry_run;
        // Where nothing is taken, what is left is told as it is.
        usage.standings = levels
            .iter()
            .map(|(limit, level, (_, standing))| {
                let standing =
                    if taken { *standing } else { untaken(*standing, gcra(limit, *level, 0, now).1) };
                (limit.name.clone(), limit.limit, standing)
            })
            .collect();
        if let Some((quota, spent, (after, standing))) = &quota {
            let standing = if taken { *standing } else { untaken(*standing, spend(quota, *spent, 0, now).1) };
            usage.standings.push(("quota".to_owned(), quota.limit, standing));
            if taken {
                state.quota = Some((quota.clone(), *after));
                state.restored = None;
                usage.spent = Some(*after);
            }
        }
        if taken {
            state.levels = levels.into_iter().map(|(limit, _, (after, _))| (limit, after)).collect();
        }
        usage
    }
}

/// The verdict on the request, with what is left without it.
fn untaken(asked: Standing, now: Standing) -> Standing {
    Standing { remaining: now.remaining, reset_after: now.reset_after, ..asked }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::key::{
        QuotaPeriod,
        tests::{at, sample},
    };
    use std::sync::Arc;

    fn limited(limits: &[(&str, u64)], quota: Option<u64>) -> Key {
        let mut key = sample();
        key.terms.rate_limits = limits
            .iter()
            .map(|(name, limit)| RateLimit {
                name: (*name).to_owned(),
                limit: *limit,
                window: Duration::from_secs(60),
            })
            .collect();
        key.terms.quota = quota.map(|limit| Quota { limit, period: QuotaPeriod::Day });
        key
    }

    #[test]
    fn all_limits_are_taken_from_or_none() {
        let (key, budget) = (limited(&[("wide", 10), ("tight", 2)], Some(5)), Budget::default());
        assert!(budget.take(&key, 2, at(0), false).refused.is_empty());
        let refused = budget.take(&key, 1, at(0), false);
        assert_eq!(refused.refused, [Reason::RateLimited]);
        let left: Vec<_> =
            refused.standings.iter().map(|(name, _, s)| (name.as_str(), s.remaining)).collect();
        assert_eq!(left, [("wide", 8), ("tight", 0), ("quota", 3)], "the refused request took nothing");
    }

    #[test]
    fn a_dry_run_takes_nothing() {
        let (key, budget) = (limited(&[("l", 1)], Some(1)), Budget::default());
        for _ in 0..3 {
            let usage = budget.take(&key, 1, at(0), true);
            assert!(usage.refused.is_empty());
            assert_eq!(usage.standings[0].2.remaining, 1);
        }
    }

    #[test]
    fn a_quota_goes_on_where_it_was_before_a_restart() {
        let (key, budget) = (limited(&[], Some(3)), Budget::default());
        let spent = budget.take(&key, 2, at(0), false).spent.unwrap();
        let restarted = Budget::default();
        restarted.restore(spent);
        assert_eq!(restarted.take(&key, 2, at(1), false).refused, [Reason::QuotaExceeded]);
        assert!(restarted.take(&key, 1, at(1), false).refused.is_empty());
    }

    #[test]
    fn exactly_the_limit_is_allowed_to_many_at_once() {
        let (key, budget) = (Arc::new(limited(&[("l", 100)], Some(70))), Arc::new(Budget::default()));
        let callers: Vec<_> = (0..64)
            .map(|_| {
                let (key, budget) = (key.clone(), budget.clone());
                std::thread::spawn(move || {
                    (0..5).filter(|_| budget.take(&key, 1, at(0), false).refused.is_empty()).count()
                })
            })
            .collect();
        let allowed: usize = callers.into_iter().map(|caller| caller.join().unwrap()).sum();
        assert_eq!(allowed, 70);
    }
}
