//! Rate limits and quotas of keys: where the arithmetic of `domain::limit` is kept between Checks.
//!
//! Exact within this process: each limited key has one lock, held for the arithmetic alone. Keys without limits
//! never come here. Rate limits start full after a restart; what is spent of a quota is written behind, so a
//! kill forgets at most what was spent since the last flush.

use std::{
    collections::VecDeque,
    hash::{DefaultHasher, Hasher as _},
    sync::{Mutex, PoisonError},
    time::Duration,
};

use crate::domain::{
    decision::Reason,
    facts::KeyFacts,
    key::{Quota, RateLimit},
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
    /// What was taken lately under a number, oldest first.
    charged: VecDeque<(Charge, Timestamp)>,
}

/// An asker's number for a request. Envoy asks again under the same one when an answer does not come in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Charge(u64);

impl Charge {
    /// The number of a request with this id; ids are the asker's, not a client's.
    #[must_use]
    pub fn of(id: &[u8]) -> Charge {
        let mut hasher = DefaultHasher::new();
        hasher.write(id);
        Charge(hasher.finish())
    }
}

/// What a request takes.
#[derive(Clone, Copy, Debug)]
pub struct Take {
    /// Units of every limit.
    pub cost: u64,
    /// Under which number.
    pub charge: Option<Charge>,
    /// Judge, and take nothing.
    pub dry_run: bool,
}

/// How long an asker may take to ask again.
const ASKED_AGAIN: Duration = Duration::from_secs(2);
/// The most numbers to remember of one key.
const MAX_CHARGES: usize = 1024;

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

    /// Takes the units from every limit of the key, or, if any refuses, from none. What was taken already under
    /// the same number is not taken again.
    pub fn take(&self, key: &impl KeyFacts, take: Take, now: Timestamp) -> Usage {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let again = take.charge.is_some_and(|charge| state.charged(charge, now));
        // Judged again at no cost, it is let through as it was.
        let Take { cost, dry_run, .. } = if again { Take { cost: 0, ..take } } else { take };
        let mut usage = Usage::default();
        let levels: Vec<_> = key
            .rate_limits()
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
        let quota = key.quota().map(|quota| {
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
            if let Some(charge) = take.charge.filter(|_| !again) {
                state.charge(charge, now);
            }
            state.levels = levels.into_iter().map(|(limit, _, (after, _))| (limit, after)).collect();
        }
        usage
    }
}

impl State {
    fn charged(&self, charge: Charge, now: Timestamp) -> bool {
        let fresh = now.minus(ASKED_AGAIN);
        self.charged.iter().rev().take_while(|(_, at)| *at >= fresh).any(|(known, _)| *known == charge)
    }

    fn charge(&mut self, charge: Charge, now: Timestamp) {
        let fresh = now.minus(ASKED_AGAIN);
        while self.charged.len() >= MAX_CHARGES || self.charged.front().is_some_and(|(_, at)| *at < fresh) {
            self.charged.pop_front();
        }
        self.charged.push_back((charge, now));
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
        Key, QuotaPeriod,
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

    fn units(cost: u64) -> Take {
        Take { cost, charge: None, dry_run: false }
    }

    #[test]
    fn what_is_asked_again_under_the_same_number_is_taken_once() {
        let (key, budget) = (limited(&[("l", 2)], Some(2)), Budget::default());
        let numbered = |id: &str| Take { charge: Some(Charge::of(id.as_bytes())), ..units(2) };
        for _ in 0..3 {
            let usage = budget.take(&key, numbered("7"), at(0));
            assert!(usage.refused.is_empty());
            assert_eq!(usage.standings[0].2.remaining, 0);
        }
        assert_eq!(budget.take(&key, numbered("8"), at(0)).refused.len(), 2);
        assert_eq!(budget.take(&key, numbered("8"), at(0)).refused.len(), 2, "what was refused took nothing");
        let later = at(0).plus(ASKED_AGAIN).plus(Duration::from_micros(1));
        assert!(!budget.take(&key, numbered("7"), later).refused.is_empty(), "a number is not for ever");
    }

    #[test]
    fn all_limits_are_taken_from_or_none() {
        let (key, budget) = (limited(&[("wide", 10), ("tight", 2)], Some(5)), Budget::default());
        assert!(budget.take(&key, units(2), at(0)).refused.is_empty());
        let refused = budget.take(&key, units(1), at(0));
        assert_eq!(refused.refused, [Reason::RateLimited]);
        let left: Vec<_> =
            refused.standings.iter().map(|(name, _, s)| (name.as_str(), s.remaining)).collect();
        assert_eq!(left, [("wide", 8), ("tight", 0), ("quota", 3)], "the refused request took nothing");
    }

    #[test]
    fn a_dry_run_takes_nothing() {
        let (key, budget) = (limited(&[("l", 1)], Some(1)), Budget::default());
        for _ in 0..3 {
            let usage = budget.take(&key, Take { dry_run: true, ..units(1) }, at(0));
            assert!(usage.refused.is_empty());
            assert_eq!(usage.standings[0].2.remaining, 1);
        }
    }

    #[test]
    fn a_quota_goes_on_where_it_was_before_a_restart() {
        let (key, budget) = (limited(&[], Some(3)), Budget::default());
        let spent = budget.take(&key, units(2), at(0)).spent.unwrap();
        let restarted = Budget::default();
        restarted.restore(spent);
        assert_eq!(restarted.take(&key, units(2), at(1)).refused, [Reason::QuotaExceeded]);
        assert!(restarted.take(&key, units(1), at(1)).refused.is_empty());
    }

    #[test]
    fn exactly_the_limit_is_allowed_to_many_at_once() {
        let (key, budget) = (Arc::new(limited(&[("l", 100)], Some(70))), Arc::new(Budget::default()));
        let callers: Vec<_> = (0..64)
            .map(|_| {
                let (key, budget) = (key.clone(), budget.clone());
                std::thread::spawn(move || {
                    (0..5).filter(|_| budget.take(&*key, units(1), at(0)).refused.is_empty()).count()
                })
            })
            .collect();
        let allowed: usize = callers.into_iter().map(|caller| caller.join().unwrap()).sum();
        assert_eq!(allowed, 70);
    }
}
