//! Rate limits and quotas of keys, over one process or several.
//!
//! A rate limit is counted in this process, exactly if it is the only one, or in Redis for all of them: one script
//! and one round trip a Check, for everything that the key is limited by. While Redis does not answer, this process
//! counts by itself and says so, or does not answer, as it is set. A quota is always counted in the store, in blocks
//! where several processes use it (`budget.rs`).
//!
//! Keys without limits never come here. Others wait in two cases only, for a bounded time each: for Redis, if they
//! have rate limits that are counted there; and for the store, if a block is used up in less time than the store takes
//! to count it.

mod budget;
mod remote;

use std::{
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

pub use budget::{BlockUsed, Budget, Charge, Held, Take, Usage};
pub use remote::{Call, Prefix, RedisUrl, Time};

use crate::domain::{key::Key, time::Timestamp};

use super::{CannotAnswer, lease::Lease, usage};
use remote::Redis;

/// How long a Check waits at the most for the store to count a block.
const BLOCK_PATIENCE: Duration = Duration::from_millis(100);
/// How often it tries again meanwhile: what others only kept may have come back.
const BLOCK_PAUSE: Duration = Duration::from_millis(5);

/// How limits are counted.
#[derive(Clone, Debug, Default)]
pub struct LimitSettings {
    /// Other processes serve the same keys, even where the lease does not say so.
    pub shared: bool,
    /// Where rate limits are counted for all of them; `None` = each process counts by itself.
    pub redis: Option<RedisSettings>,
}

/// How Redis is used.
#[derive(Clone, Debug)]
pub struct RedisSettings {
    /// Where it is.
    pub url: RedisUrl,
    /// What the names of all keys in it start with.
    pub prefix: Prefix,
    /// How long a Check waits for it.
    pub timeout: Duration,
    /// What becomes of a Check that it does not answer.
    pub on_failure: OnFailure,
    /// By whose clock units come back.
    pub time: Time,
}

/// What becomes of a limited Check when Redis does not answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnFailure {
    /// This process counts by itself; the answer says so.
    #[default]
    Allow,
    /// It is not answered.
    Deny,
}

/// Counts limits.
#[derive(Debug)]
pub struct Limiter {
    shared: bool,
    lease: Arc<Lease>,
    redis: Option<(Redis, OnFailure)>,
    usage: Arc<usage::Usage>,
    fallbacks: AtomicU64,
}

impl Limiter {
    /// A limiter whose quotas are written by `usage`.
    #[must_use]
    pub fn new(settings: &LimitSettings, lease: Arc<Lease>, usage: Arc<usage::Usage>) -> Limiter {
        let redis = settings.redis.as_ref().map(|redis| (Redis::new(redis), redis.on_failure));
        Limiter { shared: settings.shared, lease, redis, usage, fallbacks: AtomicU64::new(0) }
    }

    /// Whether other processes serve the same keys.
    fn shared(&self) -> bool {
        self.shared || self.lease.shared()
    }

    /// Connects to Redis, if limits are counted there, and connects again whenever the connection is lost. Tells
    /// `tried` when it has tried for the first time.
    pub async fn keep_connected(&self, tried: tokio::sync::oneshot::Sender<()>) {
        match &self.redis {
            Some((redis, _)) => redis.keep_connected(tried).await,
            // The receiver may be gone.
            None => drop(tried.send(())),
        }
    }

    /// Takes what a request takes of the key's limits.
    ///
    /// # Errors
    /// When whether there is room cannot be known.
    pub(super) async fn take(
        &self,
        key: &Key,
        budget: &Arc<Budget>,
        take: Take,
        now: Timestamp,
    ) -> Result<Usage, CannotAnswer> {
        let usage = match &self.redis {
            Some((redis, on_failure)) if !key.terms.rate_limits.is_empty() => {
                self.take_by(redis, *on_failure, key, budget, take, now).await?
            }
            _ => {
                let mut usage =
                    self.in_block(key, budget, || budget.take(key, take, self.shared(), now)).await?;
                usage.inexact = self.shared() && !key.terms.rate_limits.is_empty();
                usage
            }
        };
        if usage.hurry {
            self.usage.hurry(key.id, budget);
        }
        Ok(usage)
    }

    /// Keeps what the request takes of the quota, asks Redis, and uses it or gives it back.
    async fn take_by(
        &self,
        redis: &Redis,
        on_failure: OnFailure,
        key: &Key,
        budget: &Arc<Budget>,
        take: Take,
        now: Timestamp,
    ) -> Result<Usage, CannotAnswer> {
        let held = self.in_block(key, budget, || budget.hold(key, take, self.shared(), now)).await?;
        let asked = Take { dry_run: take.dry_run || held.refuses(), ..take };
        match redis.take(key, asked, now).await {
            Ok(levels) => Ok(held.settle(key, take, &levels.before, levels.again, now)),
            // What the quota refuses is refused, whatever Redis would say.
            Err(_) if on_failure == OnFailure::Deny && !held.refuses() => {
                Err(CannotAnswer::LimitsUnavailable)
            }
            Err(_) => {
                drop(held);
                self.fallbacks.fetch_add(1, Ordering::Relaxed);
                let mut usage =
                    self.in_block(key, budget, || budget.take(key, take, self.shared(), now)).await?;
                usage.inexact = true;
                Ok(usage)
            }
        }
    }

    /// Tries what may find its block used up; then it waits until the store has counted it.
    async fn in_block<T>(
        &self,
        key: &Key,
        budget: &Arc<Budget>,
        attempt: impl Fn() -> Result<T, BlockUsed>,
    ) -> Result<T, CannotAnswer> {
        if let Ok(done) = attempt() {
            return Ok(done);
        }
        let waiting = async {
            loop {
                // Whatever is counted from here on is heard of.
                let mut drawn = pin!(self.usage.drawn());
                drawn.as_mut().enable();
                if let Ok(done) = attempt() {
                    return Ok(done);
                }
                if budget.hurry() {
                    self.usage.hurry(key.id, budget);
                }
                if self.usage.failing() {
                    return Err(CannotAnswer::QuotaUnavailable);
                }
                let _ = tokio::time::timeout(BLOCK_PAUSE, drawn).await;
            }
        };
        tokio::time::timeout(BLOCK_PATIENCE, waiting).await.unwrap_or(Err(CannotAnswer::QuotaUnavailable))
    }

    /// How often Redis was asked and how that ended, since the start. Nothing, where it is not used.
    pub fn calls(&self) -> impl Iterator<Item = (Call, u64)> {
        self.redis.iter().flat_map(|(redis, _)| redis.calls())
    }

    /// How many Checks were counted by this process alone, since Redis did not answer.
    #[must_use]
    pub fn fallbacks(&self) -> u64 {
        self.fallbacks.load(Ordering::Relaxed)
    }
}
