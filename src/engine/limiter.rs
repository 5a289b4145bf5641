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

mod redis_limits;
mod redis_settings;

use std::{
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

pub use redis_limits::RedisOutcome;
pub use redis_settings::{ClockSource, RedisFailurePolicy, RedisKeyPrefix, RedisSettings, RedisUrl};

pub use super::{
    key_limits::{Consumption, KeyLimitState, QuotaBlockExhausted, QuotaReservation, RequestDedupId},
    limit_outcome::LimitOutcome,
};

use crate::domain::{key_attributes::KeyAttributes as _, time::Timestamp};

use super::{error::CheckError, index::KeyRef, serving_lease::ServingLease, usage::UsageRecorder};
use redis_limits::RedisLimiter;

/// How long a Check waits at the most for the store to count a block.
const QUOTA_BLOCK_WAIT: Duration = Duration::from_millis(100);
/// How often it tries again meanwhile: what others only kept may have come back.
const QUOTA_BLOCK_RETRY_INTERVAL: Duration = Duration::from_millis(5);

/// How limits are counted.
#[derive(Clone, Debug, Default)]
pub struct LimitSettings {
    /// Other processes serve the same keys, even where the lease does not say so.
    pub shared: bool,
    /// Where rate limits are counted for all of them; `None` = each process counts by itself.
    pub redis: Option<RedisSettings>,
}

/// Counts limits.
#[derive(Debug)]
pub struct Limiter {
    is_shared: bool,
    lease: Arc<ServingLease>,
    redis: Option<(RedisLimiter, RedisFailurePolicy)>,
    usage: Arc<UsageRecorder>,
    local_fallbacks: AtomicU64,
}

impl Limiter {
    /// A limiter whose quotas are written by `usage`.
    #[must_use]
    pub fn new(settings: &LimitSettings, lease: Arc<ServingLease>, usage: Arc<UsageRecorder>) -> Limiter {
        let redis = settings.redis.as_ref().map(|redis| (RedisLimiter::new(redis), redis.on_failure));
        Limiter { is_shared: settings.shared, lease, redis, usage, local_fallbacks: AtomicU64::new(0) }
    }

    /// Whether other processes serve the same keys.
    fn is_shared(&self) -> bool {
        self.is_shared || self.lease.is_shared()
    }

    /// Connects to Redis, if limits are counted there, and connects again whenever the connection is lost. Tells
    /// `tried` when it has tried for the first time.
    pub async fn maintain_connection(&self, attempted: tokio::sync::oneshot::Sender<()>) {
        match &self.redis {
            Some((redis, _)) => redis.maintain_connection(attempted).await,
            // The receiver may be gone.
            None => drop(attempted.send(())),
        }
    }

    /// Takes what a request takes of the key's limits.
    ///
    /// # Errors
    /// When whether there is room cannot be known.
    pub(super) async fn consume(
        &self,
        key: &KeyRef,
        limit_state: &Arc<KeyLimitState>,
        consumption: Consumption,
        now: Timestamp,
    ) -> Result<LimitOutcome, CheckError> {
        let outcome = match &self.redis {
            Some((redis, on_failure)) if !key.rate_limits().is_empty() => {
                self.consume_with_redis(redis, *on_failure, key, limit_state, consumption, now).await?
            }
            _ => {
                let mut outcome = self
                    .retry_until_block_counted(key, limit_state, || {
                        limit_state.consume(key, consumption, self.is_shared(), now)
                    })
                    .await?;
                outcome.is_inexact = self.is_shared() && !key.rate_limits().is_empty();
                outcome
            }
        };
        if outcome.needs_flush {
            self.usage.request_quota_flush(key.id(), limit_state);
        }
        Ok(outcome)
    }

    /// Keeps what the request takes of the quota, asks Redis, and uses it or gives it back.
    async fn consume_with_redis(
        &self,
        redis: &RedisLimiter,
        on_failure: RedisFailurePolicy,
        key: &KeyRef,
        limit_state: &Arc<KeyLimitState>,
        consumption: Consumption,
        now: Timestamp,
    ) -> Result<LimitOutcome, CheckError> {
        let reservation = self
            .retry_until_block_counted(key, limit_state, || {
                limit_state.reserve(key, consumption, self.is_shared(), now)
            })
            .await?;
        let redis_consumption =
            Consumption { dry_run: consumption.dry_run || reservation.is_refused(), ..consumption };
        match redis.consume(key, redis_consumption, now).await {
            Ok(levels) => Ok(reservation.commit_if_allowed(
                key,
                consumption,
                &levels.before_request,
                levels.is_repeated_request,
                now,
            )),
            // What the quota refuses is refused, whatever Redis would say.
            Err(_) if on_failure == RedisFailurePolicy::Deny && !reservation.is_refused() => {
                Err(CheckError::LimitsUnavailable)
            }
            Err(_) => {
                drop(reservation);
                self.local_fallbacks.fetch_add(1, Ordering::Relaxed);
                let mut outcome = self
                    .retry_until_block_counted(key, limit_state, || {
                        limit_state.consume(key, consumption, self.is_shared(), now)
                    })
                    .await?;
                outcome.is_inexact = true;
                Ok(outcome)
            }
        }
    }

    /// Tries what may find its block used up; then it waits until the store has counted it.
    async fn retry_until_block_counted<T>(
        &self,
        key: &KeyRef,
        limit_state: &Arc<KeyLimitState>,
        attempt: impl Fn() -> Result<T, QuotaBlockExhausted>,
    ) -> Result<T, CheckError> {
        if let Ok(result) = attempt() {
            return Ok(result);
        }
        let waiting = async {
            loop {
                // Whatever is counted from here on is heard of.
                let mut flushed = pin!(self.usage.quotas_flushed());
                flushed.as_mut().enable();
                if let Ok(result) = attempt() {
                    return Ok(result);
                }
                if limit_state.request_flush() {
                    self.usage.request_quota_flush(key.id(), limit_state);
                }
                if self.usage.is_failing() {
                    return Err(CheckError::QuotaUnavailable);
                }
                let _ = tokio::time::timeout(QUOTA_BLOCK_RETRY_INTERVAL, flushed).await;
            }
        };
        tokio::time::timeout(QUOTA_BLOCK_WAIT, waiting).await.unwrap_or(Err(CheckError::QuotaUnavailable))
    }

    /// How often Redis was asked and how that ended, since the start. Nothing, where it is not used.
    pub fn redis_outcome_counts(&self) -> impl Iterator<Item = (RedisOutcome, u64)> {
        self.redis.iter().flat_map(|(redis, _)| redis.outcome_counts())
    }

    /// How many Checks were counted by this process alone, since Redis did not answer.
    #[must_use]
    pub fn local_fallbacks(&self) -> u64 {
        self.local_fallbacks.load(Ordering::Relaxed)
    }
}
