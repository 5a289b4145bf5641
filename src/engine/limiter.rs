//! Applies the rate limits and quotas of keys, within one process or across several.
//!
//! The arithmetic is in `domain::limit`, the state of one key in `key_limits.rs`.
//!
//! Rate limits are counted in this process, which is exact if it is the only one; or in Redis for all processes,
//! with one script and one round trip per Check. If Redis does not answer, the setting decides: count locally and
//! mark the outcome as inexact, or fail. A quota is always recorded in the store; if several processes share it,
//! each uses it in blocks.
//!
//! Keys without limits never get here. The others wait in two cases only, each for a bounded time: for Redis, and for
//! the store if a block is used up faster than the store records it.

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

/// How long a Check waits for the store to record a block.
const QUOTA_BLOCK_WAIT: Duration = Duration::from_millis(100);
/// How often it tries again meanwhile: other requests may return reserved units.
const QUOTA_BLOCK_RETRY_INTERVAL: Duration = Duration::from_millis(5);

/// How limits are counted: in this process or in Redis.
#[derive(Clone, Debug, Default)]
pub struct LimitSettings {
    /// Whether other processes serve the same keys, even if the lease does not show it.
    pub shared: bool,
    /// The Redis that counts rate limits for all processes; `None`: each process counts for itself.
    pub redis: Option<RedisSettings>,
}

/// Counts rate limits and quotas.
#[derive(Debug)]
pub struct Limiter {
    is_shared: bool,
    lease: Arc<ServingLease>,
    redis: Option<(RedisLimiter, RedisFailurePolicy)>,
    usage: Arc<UsageRecorder>,
    local_fallbacks: AtomicU64,
}

impl Limiter {
    /// Creates a limiter whose quotas are recorded by `usage`.
    #[must_use]
    pub fn new(settings: &LimitSettings, lease: Arc<ServingLease>, usage: Arc<UsageRecorder>) -> Limiter {
        let redis = settings.redis.as_ref().map(|redis| (RedisLimiter::new(redis), redis.on_failure));
        Limiter { is_shared: settings.shared, lease, redis, usage, local_fallbacks: AtomicU64::new(0) }
    }

    /// Whether other processes serve the same keys.
    fn is_shared(&self) -> bool {
        self.is_shared || self.lease.is_shared()
    }

    /// Connects to Redis if it counts the rate limits, and reconnects whenever the connection is lost. Notifies
    /// `attempted` after the first attempt.
    pub async fn maintain_connection(&self, attempted: tokio::sync::oneshot::Sender<()>) {
        match &self.redis {
            Some((redis, _)) => redis.maintain_connection(attempted).await,
            // The receiver may be gone.
            None => drop(attempted.send(())),
        }
    }

    /// Consumes from the limits of a key.
    ///
    /// # Errors
    /// It is unknown whether the limits have room.
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

    /// Reserves units of the quota, asks Redis, and then consumes or returns the reserved units.
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
            // If the quota refuses the request, the response of Redis does not matter.
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

    /// Runs `attempt`; while the quota's block is used up, waits for the store to record it and tries again.
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
                // Registered before the attempt, so that no notification is missed.
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

    /// The number of calls to Redis by outcome since the start; empty if Redis is not used.
    pub fn redis_outcome_counts(&self) -> impl Iterator<Item = (RedisOutcome, u64)> {
        self.redis.iter().flat_map(|(redis, _)| redis.outcome_counts())
    }

    /// How many Checks this process counted alone because Redis did not answer.
    #[must_use]
    pub fn local_fallbacks(&self) -> u64 {
        self.local_fallbacks.load(Ordering::Relaxed)
    }
}
