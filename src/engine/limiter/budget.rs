//! What is used of one key's limits, in this process: the arithmetic of `domain::limit` between Checks. Nothing here
//! waits; one lock for each limited key, held for the arithmetic alone.
//!
//! A rate limit is counted here where the process is alone, or is to count by itself. A quota is the store's: what
//! the store says that all have used, and what was used here since and it does not count yet. Where several
//! processes share the store, that may not grow beyond a block ([`block`]) before the store has counted it.

use std::{
    collections::VecDeque,
    hash::{DefaultHasher, Hasher as _},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use crate::domain::{
    decision::Reason,
    facts::KeyFacts,
    key::{Quota, RateLimit},
    limit::{Drawn, Level, Spent, Standing, block, gcra, period, spend},
    time::Timestamp,
};

/// What is used of one key's limits.
#[derive(Debug, Default)]
pub struct Budget(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// The limits that the levels are of; a limit that changed starts full.
    levels: Vec<(RateLimit, Level)>,
    /// What the store says that all have used.
    used: Option<Spent>,
    /// What was used here and the store does not count yet.
    pending: Option<Drawn>,
    /// Units that are kept for requests of which it is not known yet whether they take them.
    held: u64,
    /// Whether somebody was told to have the store count.
    hurried: bool,
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

    /// The number itself.
    #[must_use]
    pub fn number(self) -> u64 {
        self.0
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

impl Take {
    /// What one call takes.
    pub const ONE: Take = Take::units(1);

    /// So many units.
    #[must_use]
    pub const fn units(cost: u64) -> Take {
        Take { cost, charge: None, dry_run: false }
    }

    /// The same without taking anything.
    #[must_use]
    pub const fn dry(self) -> Take {
        Take { dry_run: true, ..self }
    }
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
    /// Whether units of the quota were used, which the store is to count.
    pub drew: bool,
    /// Whether the store is to count them at once.
    pub hurry: bool,
    /// Whether the rate limits were counted by this process alone although several share them.
    pub inexact: bool,
}

impl Usage {
    /// Of what has no limits, or was not asked.
    pub(crate) const fn none() -> Usage {
        Usage { standings: Vec::new(), refused: Vec::new(), drew: false, hurry: false, inexact: false }
    }

    /// How long until everything that refuses the request would let it through; `None` where nothing refuses
    /// it, or something always will.
    #[must_use]
    pub fn retry_after(&self) -> Option<Duration> {
        let refusing = self.standings.iter().filter(|(_, _, standing)| !standing.allowed);
        let waits: Option<Vec<Duration>> = refusing.map(|(_, _, standing)| standing.retry_after).collect();
        waits?.into_iter().max()
    }

    /// The smallest limit that refuses a request because it is never so large; `None` if there is none.
    #[must_use]
    pub fn never_fits(&self, cost: u64) -> Option<u64> {
        let refusing = self.standings.iter().filter(|(_, _, standing)| !standing.allowed);
        refusing.map(|(_, limit, _)| *limit).filter(|limit| *limit < cost).min()
    }

    /// From how each limit stands without the request and with it, and the quota likewise.
    fn of(rates: &[Rate<'_>], quota: Option<&Share>, dry_run: bool) -> Usage {
        let mut usage = Usage::default();
        if rates.iter().any(|rate| !rate.asked.allowed) {
            usage.refused.push(Reason::RateLimited);
        }
        if quota.is_some_and(|share| !share.asked.allowed) {
            usage.refused.push(Reason::QuotaExceeded);
        }
        let taken = usage.refused.is_empty() && !dry_run;
        // Where nothing is taken, what is left is told as it is.
        let told = |asked, idle| if taken { asked } else { untaken(asked, idle) };
        usage.standings = rates
            .iter()
            .map(|rate| (rate.limit.name.clone(), rate.limit.limit, told(rate.asked, rate.idle)))
            .collect();
        usage.standings.extend(
            quota.map(|share| ("quota".to_owned(), share.quota.limit, told(share.asked, share.idle))),
        );
        usage
    }
}

/// The verdict on the request, with what is left without it.
fn untaken(asked: Standing, now: Standing) -> Standing {
    Standing { remaining: now.remaining, reset_after: now.reset_after, ..asked }
}

/// A rate limit, judged.
struct Rate<'k> {
    limit: &'k RateLimit,
    asked: Standing,
    idle: Standing,
    /// The level after the request.
    after: Level,
}

impl Rate<'_> {
    fn judge(limit: &RateLimit, level: Level, cost: u64, now: Timestamp) -> Rate<'_> {
        let (after, asked) = gcra(limit, level, cost, now);
        Rate { limit, asked, idle: gcra(limit, level, 0, now).1, after }
    }
}

/// A quota, judged.
#[derive(Clone, Debug)]
struct Share {
    quota: Quota,
    asked: Standing,
    idle: Standing,
    /// What the request takes of it.
    drawn: Drawn,
}

/// A block is used up, and the store has not counted it yet: whether the quota has room cannot be known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockUsed;

impl Budget {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes up what the store says that all have used of the quota.
    pub fn restore(&self, spent: Spent) {
        self.lock().used = Some(spent);
    }

    /// Takes the units from every limit of the key, or, if any refuses, from none. What was taken already under
    /// the same number is not taken again. `shared`: others use the quota too.
    ///
    /// # Errors
    /// When nothing refuses, and a block is used up.
    pub fn take(
        &self,
        key: &impl KeyFacts,
        take: Take,
        shared: bool,
        now: Timestamp,
    ) -> Result<Usage, BlockUsed> {
        let mut state = self.lock();
        let again = take.charge.is_some_and(|charge| state.charged(charge, now));
        // Judged again at no cost, it is let through as it was.
        let cost = if again { 0 } else { take.cost };
        let limits = key.rate_limits();
        let rates: Vec<_> =
            limits.iter().map(|limit| Rate::judge(limit, state.level(limit), cost, now)).collect();
        let share = key.quota().map(|quota| state.share(quota, cost, now));
        let mut usage = Usage::of(&rates, share.as_ref(), take.dry_run);
        if take.dry_run || !usage.refused.is_empty() {
            return Ok(usage);
        }
        if let Some(share) = share.filter(|share| share.drawn.units > 0) {
            state.room(&share, shared)?;
            usage.drew = true;
            usage.hurry = state.draw(&share, shared);
        }
        state.levels = rates.iter().map(|rate| (rate.limit.clone(), rate.after)).collect();
        if let Some(charge) = take.charge.filter(|_| !again) {
            state.charge(charge, now);
        }
        Ok(usage)
    }

    /// Keeps the units of the quota that a request takes if its rate limits, which are counted elsewhere, let it
    /// through. Dropped, it gives them back. A number that the request has is not looked at.
    ///
    /// # Errors
    /// When the quota does not refuse, and a block is used up.
    pub fn hold(
        self: &Arc<Self>,
        key: &impl KeyFacts,
        take: Take,
        shared: bool,
        now: Timestamp,
    ) -> Result<Held, BlockUsed> {
        let mut state = self.lock();
        let share = key.quota().map(|quota| state.share(quota, take.cost, now));
        let keeps = share.as_ref().filter(|share| share.asked.allowed && !take.dry_run);
        let mut units = 0;
        if let Some(share) = keeps {
            state.room(share, shared)?;
            units = share.drawn.units;
            state.held += units;
        }
        Ok(Held { budget: self.clone(), share, units, shared })
    }

    /// What the store is to count, if anything. Nobody needs to be told again of what was used so far.
    #[must_use]
    pub fn pending(&self) -> Option<Drawn> {
        let mut state = self.lock();
        state.hurried = false;
        state.pending
    }

    /// Takes up that the store has counted `drawn`, and what it says that all have used now.
    pub fn counted(&self, drawn: Drawn, total: Spent) {
        let mut state = self.lock();
        if let Some(pending) = &mut state.pending
            && pending.period == drawn.period
        {
            pending.units = pending.units.saturating_sub(drawn.units);
        }
        state.pending = state.pending.filter(|pending| pending.units > 0);
        // The row may be of a later period, where this process' clock is behind: then it counts by itself.
        let known = state.used.filter(|spent| spent.period == drawn.period).map_or(0, |spent| spent.used);
        let alone = Spent { period: drawn.period, used: known.saturating_add(drawn.units) };
        state.used = Some(if total.period == drawn.period { total } else { alone });
    }

    /// Has the store count at once what waits for it. Whether somebody must be told.
    #[must_use]
    pub fn hurry(&self) -> bool {
        let mut state = self.lock();
        state.pending.is_some() && !std::mem::replace(&mut state.hurried, true)
    }
}

/// Units of a quota that are kept for a request.
#[derive(Debug)]
pub struct Held {
    budget: Arc<Budget>,
    share: Option<Share>,
    units: u64,
    shared: bool,
}

impl Held {
    /// Whether the quota refuses the request.
    #[must_use]
    pub fn refuses(&self) -> bool {
        self.share.as_ref().is_some_and(|share| !share.asked.allowed)
    }

    /// Uses the units if the rate limits at these levels let the request through, and gives them back otherwise, or
    /// if it was let through before (`again`).
    #[must_use]
    pub fn settle(
        mut self,
        key: &impl KeyFacts,
        take: Take,
        levels: &[Level],
        again: bool,
        now: Timestamp,
    ) -> Usage {
        let cost = if again { 0 } else { take.cost };
        let limits = key.rate_limits().iter().zip(levels);
        let rates: Vec<_> = limits.map(|(limit, level)| Rate::judge(limit, *level, cost, now)).collect();
        if again && let Some(share) = &mut self.share {
            share.asked = Standing { allowed: true, retry_after: None, ..share.idle };
        }
        let mut usage = Usage::of(&rates, self.share.as_ref(), take.dry_run);
        if let Some(share) = self.share.as_ref().filter(|_| self.units > 0 && !again)
            && usage.refused.is_empty()
        {
            let mut state = self.budget.lock();
            state.held = state.held.saturating_sub(std::mem::take(&mut self.units));
            usage.drew = true;
            usage.hurry = state.draw(share, self.shared);
        }
        usage
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if self.units > 0 {
            let mut state = self.budget.lock();
            state.held = state.held.saturating_sub(self.units);
        }
    }
}

impl State {
    fn level(&self, limit: &RateLimit) -> Level {
        let known = self.levels.iter().find(|(of, _)| of == limit);
        known.map_or_else(Level::default, |(_, level)| *level)
    }

    fn waiting(&self, period: Timestamp) -> u64 {
        let here = self.pending.filter(|pending| pending.period == period);
        here.map_or(0, |pending| pending.units).saturating_add(self.held)
    }

    /// How a request stands with a quota. A changed limit of the same period keeps what is used of it.
    fn share(&self, quota: &Quota, cost: u64, now: Timestamp) -> Share {
        let (start, until) = period(quota.period, now);
        let told = self.used.filter(|spent| spent.period == start).map_or(0, |spent| spent.used);
        let spent = Some(Spent { period: start, used: told.saturating_add(self.waiting(start)) });
        Share {
            quota: quota.clone(),
            asked: spend(quota, spent, cost, now).1,
            idle: spend(quota, spent, 0, now).1,
            drawn: Drawn { period: start, until, units: cost },
        }
    }

    /// Whether the units fit into the block. A request that is larger than one goes alone.
    fn room(&self, share: &Share, shared: bool) -> Result<(), BlockUsed> {
        let waiting = self.waiting(share.drawn.period);
        let fits = waiting == 0 || waiting.saturating_add(share.drawn.units) <= block(&share.quota);
        if fits || !shared { Ok(()) } else { Err(BlockUsed) }
    }

    /// Uses the units. Whether somebody must be told to have the store count them at once: when half a block waits
    /// for it, or when so little is left that others must know of each unit.
    fn draw(&mut self, share: &Share, shared: bool) -> bool {
        // Units of another period are of no use any more.
        let pending = self.pending.filter(|pending| pending.period == share.drawn.period);
        self.pending = Some(pending.map_or(share.drawn, |pending| pending.and(share.drawn)));
        let block = block(&share.quota);
        let soon = self.waiting(share.drawn.period) >= block / 2 || share.asked.remaining < block;
        shared && soon && !std::mem::replace(&mut self.hurried, true)
    }

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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::key::{
        Key, QuotaPeriod,
        tests::{at, sample},
    };

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

    fn taken(budget: &Budget, key: &Key, take: Take, now: Timestamp) -> Usage {
        budget.take(key, take, false, now).unwrap()
    }

    /// Used in the period of the tests' first instant.
    fn spent(used: u64) -> Spent {
        Spent { period: period(QuotaPeriod::Day, at(0)).0, used }
    }

    fn left(budget: &Budget, key: &Key, now: Timestamp) -> u64 {
        let usage = taken(budget, key, Take { dry_run: true, ..units(1) }, now);
        usage.standings.last().unwrap().2.remaining
    }

    fn units(cost: u64) -> Take {
        Take { cost, charge: None, dry_run: false }
    }

    #[test]
    fn what_is_asked_again_under_the_same_number_is_taken_once() {
        let (key, budget) = (limited(&[("l", 2)], Some(2)), Budget::default());
        let numbered = |id: &str| Take { charge: Some(Charge::of(id.as_bytes())), ..units(2) };
        for _ in 0..3 {
            let usage = taken(&budget, &key, numbered("7"), at(0));
            assert!(usage.refused.is_empty());
            assert_eq!(usage.standings[0].2.remaining, 0);
        }
        assert_eq!(taken(&budget, &key, numbered("8"), at(0)).refused.len(), 2);
        assert_eq!(
            taken(&budget, &key, numbered("8"), at(0)).refused.len(),
            2,
            "what was refused took nothing"
        );
        let later = at(0).plus(ASKED_AGAIN).plus(Duration::from_micros(1));
        assert!(!taken(&budget, &key, numbered("7"), later).refused.is_empty(), "a number is not for ever");
    }

    #[test]
    fn all_limits_are_taken_from_or_none() {
        let (key, budget) = (limited(&[("wide", 10), ("tight", 2)], Some(5)), Budget::default());
        assert!(taken(&budget, &key, units(2), at(0)).refused.is_empty());
        let refused = taken(&budget, &key, units(1), at(0));
        assert_eq!(refused.refused, [Reason::RateLimited]);
        let left: Vec<_> =
            refused.standings.iter().map(|(name, _, s)| (name.as_str(), s.remaining)).collect();
        assert_eq!(left, [("wide", 8), ("tight", 0), ("quota", 3)], "the refused request took nothing");
    }

    #[test]
    fn a_dry_run_takes_nothing() {
        let (key, budget) = (limited(&[("l", 1)], Some(1)), Budget::default());
        for _ in 0..3 {
            let usage = taken(&budget, &key, Take { dry_run: true, ..units(1) }, at(0));
            assert!(usage.refused.is_empty());
            assert_eq!(usage.standings[0].2.remaining, 1);
        }
    }

    #[test]
    fn a_quota_goes_on_where_it_was_before_a_restart() {
        let key = limited(&[], Some(3));
        let restarted = Budget::default();
        restarted.restore(spent(2));
        assert_eq!(taken(&restarted, &key, units(2), at(1)).refused, [Reason::QuotaExceeded]);
        assert!(taken(&restarted, &key, units(1), at(1)).refused.is_empty());
    }

    #[test]
    fn exactly_the_limit_is_allowed_to_many_at_once() {
        let (key, budget) = (Arc::new(limited(&[("l", 100)], Some(70))), Arc::new(Budget::default()));
        let callers: Vec<_> = (0..64)
            .map(|_| {
                let (key, budget) = (key.clone(), budget.clone());
                std::thread::spawn(move || {
                    (0..5).filter(|_| taken(&budget, &key, units(1), at(0)).refused.is_empty()).count()
                })
            })
            .collect();
        let allowed: usize = callers.into_iter().map(|caller| caller.join().unwrap()).sum();
        assert_eq!(allowed, 70);
    }

    #[test]
    fn what_the_store_has_counted_is_counted_once() {
        let (key, budget) = (limited(&[], Some(100)), Budget::default());
        taken(&budget, &key, units(5), at(0));
        let drawn = budget.pending().unwrap();
        taken(&budget, &key, units(2), at(0));
        budget.counted(drawn, spent(30));
        assert_eq!(left(&budget, &key, at(0)), 100 - 30 - 2, "others have used 25");
        assert_eq!(budget.pending().unwrap().units, 2);
        budget.counted(budget.pending().unwrap(), spent(32));
        assert_eq!((left(&budget, &key, at(0)), budget.pending()), (68, None));
    }

    #[test]
    fn a_process_whose_clock_is_behind_goes_on_counting_by_itself() {
        let (key, budget) = (limited(&[], Some(10)), Budget::default());
        for _ in 0..2 {
            taken(&budget, &key, units(3), at(0));
            let tomorrow = period(QuotaPeriod::Day, at(0)).1.unwrap();
            budget.counted(budget.pending().unwrap(), Spent { period: tomorrow, used: 1 });
        }
        assert_eq!(left(&budget, &key, at(0)), 4);
    }

    #[test]
    fn a_shared_quota_is_used_by_a_block_at_the_most_until_the_store_has_counted_it() {
        let (key, budget) = (limited(&[], Some(10_000)), Budget::default());
        let mut hurried = 0;
        for _ in 0..100 {
            hurried += usize::from(budget.take(&key, units(1), true, at(0)).unwrap().hurry);
        }
        assert_eq!(hurried, 1, "when half of it is used up");
        assert_eq!(budget.take(&key, units(1), true, at(0)).unwrap_err(), BlockUsed);
        let dry = budget.take(&key, Take { dry_run: true, ..units(1) }, true, at(0)).unwrap();
        assert!(dry.refused.is_empty());
        let drawn = budget.pending().unwrap();
        assert_eq!(budget.take(&key, units(1), true, at(0)).unwrap_err(), BlockUsed, "it is being written");
        budget.counted(drawn, spent(100));
        budget.take(&key, units(1), true, at(0)).unwrap();
    }

    #[test]
    fn what_is_certainly_exceeded_is_refused_though_a_block_is_used_up() {
        let (key, budget) = (limited(&[("l", 60)], Some(60)), Budget::default());
        budget.take(&key, units(50), true, at(0)).unwrap();
        assert_eq!(budget.take(&key, units(1), true, at(0)).unwrap_err(), BlockUsed);
        let refused = budget.take(&key, units(11), true, at(0)).unwrap().refused;
        assert_eq!(refused, [Reason::RateLimited, Reason::QuotaExceeded]);
        assert!(Budget::default().take(&key, units(60), true, at(0)).is_ok(), "more than a block goes alone");
    }

    #[test]
    fn near_the_end_of_a_shared_quota_each_use_is_to_be_counted_at_once() {
        let (key, budget) = (limited(&[], Some(10_000)), Budget::default());
        assert!(!budget.take(&key, units(1), true, at(0)).unwrap().hurry);
        budget.restore(spent(9_950));
        assert!(budget.take(&key, units(1), true, at(0)).unwrap().hurry);
        assert!(!budget.take(&key, units(1), true, at(0)).unwrap().hurry, "somebody was told already");
        assert!(budget.pending().is_some());
        assert!(budget.take(&key, units(1), true, at(0)).unwrap().hurry);
    }

    #[test]
    fn units_held_for_a_request_come_back_unless_it_takes_them() {
        let (key, budget) = (limited(&[("l", 1)], Some(3)), Arc::new(Budget::default()));
        let free = [Level::default()];
        let held = budget.hold(&key, units(2), false, at(0)).unwrap();
        assert_eq!(left(&budget, &key, at(0)), 1, "nobody else has them meanwhile");
        assert!(budget.hold(&key, units(2), false, at(0)).unwrap().refuses());
        drop(held);
        let held = budget.hold(&key, units(1), false, at(0)).unwrap();
        let full = [gcra(&key.terms.rate_limits[0], Level::default(), 1, at(0)).0];
        let usage = held.settle(&key, units(1), &full, false, at(0));
        assert_eq!((usage.refused, usage.drew), (vec![Reason::RateLimited], false));
        let held = budget.hold(&key, units(1), false, at(0)).unwrap();
        let usage = held.settle(&key, units(1), &full, true, at(0));
        assert_eq!((usage.refused, usage.drew), (vec![], false), "it was let through before");
        assert_eq!((left(&budget, &key, at(0)), budget.pending()), (3, None));
        let held = budget.hold(&key, units(1), false, at(0)).unwrap();
        let usage = held.settle(&key, units(1), &free, false, at(0));
        assert_eq!((usage.standings[1].2.remaining, usage.drew), (2, true));
        assert_eq!(budget.pending().unwrap().units, 1);
    }
}
