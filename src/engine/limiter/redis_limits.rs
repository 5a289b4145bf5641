//! Rate limits in Redis, or in what speaks its protocol: the connection, and the script `consume.lua`.
//!
//! One connection for all threads: its task lives on the runtime that [`RedisLimiter::maintain_connection`] runs on, and calls
//! from all over the process go through it in one pipeline. A call waits as long as its timeout and no longer. The
//! connection is taken away from the callers when it fails, or when it does not answer several calls in a row; they
//! fail at once then, until another one has answered. So a dead Redis costs a Check nothing.
//!
//! Keys in Redis are named after the key's id and the limit, never after a token, and expire when the limit is full
//! again. Their names share a hash tag, so that a cluster keeps them in one place.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    time::Duration,
};

use arc_swap::ArcSwapOption;
use redis::{AsyncConnectionConfig, RedisError, Script, aio};
use tokio::{
    sync::{Notify, oneshot},
    time::timeout,
};

use crate::{
    domain::{key_attributes::KeyAttributes, limit::GcraState, time::Timestamp},
    engine::{index::KeyRef, key_limits::Consumption},
};

use super::redis_settings::{ClockSource, RedisSettings};

/// How long connecting may take, name resolution and TLS included.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// How long it is waited before connecting again: at first, and at the most.
const INITIAL_BACKOFF: Duration = Duration::from_millis(50);
const MAX_BACKOFF: Duration = Duration::from_secs(1);
/// How often a connection is tried that nobody may be using, and how long that may take.
const HEARTBEAT_INTERVAL: Duration = Duration::from_secs(1);
/// So many calls in a row that fail take the connection away.
const MAX_CONSECUTIVE_FAILURES: u32 = 3;

/// How a call ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RedisOutcome {
    /// With an answer.
    Answered,
    /// Not in time.
    TimedOut,
    /// With an error.
    Failed,
    /// It was not made: there is no connection.
    NotConnected,
}

impl RedisOutcome {
    /// Every way.
    pub const ALL: [RedisOutcome; 4] =
        [RedisOutcome::Answered, RedisOutcome::TimedOut, RedisOutcome::Failed, RedisOutcome::NotConnected];

    /// One word for it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            RedisOutcome::Answered => "answered",
            RedisOutcome::TimedOut => "timed_out",
            RedisOutcome::Failed => "failed",
            RedisOutcome::NotConnected => "unconnected",
        }
    }
}

/// How a key's rate limits stood before a request.
#[derive(Debug)]
pub(super) struct RateLimitStates {
    /// Each, in the key's order.
    pub before_request: Vec<GcraState>,
    /// Whether the request took its units before, under the same number.
    pub is_repeated_request: bool,
}

/// A connection, and how many calls on it have failed in a row.
#[derive(Debug)]
struct RedisConnection {
    connection: aio::MultiplexedConnection,
    consecutive_failures: AtomicU32,
    answered_calls: AtomicU64,
}

/// Counts rate limits in Redis.
pub(super) struct RedisLimiter {
    settings: RedisSettings,
    script: Script,
    connection: ArcSwapOption<RedisConnection>,
    connection_lost: Notify,
    outcome_counts: [AtomicU64; RedisOutcome::ALL.len()],
}

impl std::fmt::Debug for RedisLimiter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RedisLimiter").field("settings", &self.settings).finish_non_exhaustive()
    }
}

impl RedisLimiter {
    pub(super) fn new(settings: &RedisSettings) -> RedisLimiter {
        RedisLimiter {
            settings: settings.clone(),
            script: Script::new(include_str!("consume.lua")),
            connection: ArcSwapOption::empty(),
            connection_lost: Notify::new(),
            outcome_counts: Default::default(),
        }
    }

    /// How often each way of ending came.
    pub(super) fn outcome_counts(&self) -> impl Iterator<Item = (RedisOutcome, u64)> {
        RedisOutcome::ALL
            .into_iter()
            .map(|call| (call, self.outcome_counts[call as usize].load(Ordering::Relaxed)))
    }

    /// Takes from every rate limit of the key, or, if one refuses, from none.
    ///
    /// # Errors
    /// When Redis did not answer. It may have taken the units all the same.
    pub(super) async fn consume(
        &self,
        key: &KeyRef,
        consumption: Consumption,
        now: Timestamp,
    ) -> Result<RateLimitStates, RedisOutcome> {
        let result = self.invoke_script(key, consumption, now).await;
        let ended = result.as_ref().err().copied().unwrap_or(RedisOutcome::Answered);
        self.outcome_counts[ended as usize].fetch_add(1, Ordering::Relaxed);
        result
    }

    async fn invoke_script(
        &self,
        key: &KeyRef,
        consumption: Consumption,
        now: Timestamp,
    ) -> Result<RateLimitStates, RedisOutcome> {
        let active = self.connection.load_full().ok_or(RedisOutcome::NotConnected)?;
        let mut connection = active.connection.clone();
        let mut call = self.script.prepare_invoke();
        for limit in key.rate_limits() {
            // A changed limit is another one, and starts full.
            call.key(format!(
                "{}{{{}}}/{}/{}/{}",
                self.settings.key_prefix.0,
                key.id(),
                limit.name,
                limit.limit,
                limit.window.as_micros()
            ));
        }
        if let Some(dedup_id) = consumption.dedup_id {
            call.key(format!("{}{{{}}}#{:016x}", self.settings.key_prefix.0, key.id(), dedup_id.to_u64()));
        }
        match self.settings.clock_source {
            ClockSource::Redis => call.arg(""),
            ClockSource::Local => call.arg(now.as_micros()),
        };
        call.arg(consumption.cost).arg(u8::from(consumption.dry_run));
        for limit in key.rate_limits() {
            let window = u64::try_from(limit.window.as_micros()).unwrap_or(u64::MAX);
            call.arg(limit.limit.max(1)).arg(window.max(1));
        }
        let answer = timeout(self.settings.timeout, call.invoke_async::<Vec<u64>>(&mut connection)).await;
        let failure = match answer {
            Ok(Ok(numbers)) => match parse_levels(key, &numbers, now) {
                Some(levels) => {
                    active.consecutive_failures.store(0, Ordering::Relaxed);
                    active.answered_calls.fetch_add(1, Ordering::Relaxed);
                    return Ok(levels);
                }
                None => RedisOutcome::Failed,
            },
            Ok(Err(error)) => {
                tracing::debug!(error = redacted_error(&error), "Redis did not count");
                if error.is_unrecoverable_error() || error.is_io_error() {
                    self.disconnect(&active);
                }
                RedisOutcome::Failed
            }
            Err(_) => RedisOutcome::TimedOut,
        };
        if active.consecutive_failures.fetch_add(1, Ordering::Relaxed) + 1 >= MAX_CONSECUTIVE_FAILURES {
            self.disconnect(&active);
        }
        Err(failure)
    }

    /// Takes a connection away from the callers.
    fn disconnect(&self, active: &Arc<RedisConnection>) {
        let before = self.connection.compare_and_swap(active, None);
        if before.as_ref().is_some_and(|known| Arc::ptr_eq(known, active)) {
            self.connection_lost.notify_one();
        }
    }

    /// Connects, and again whenever the connection is lost. Tells `tried` after the first attempt.
    pub(super) async fn maintain_connection(&self, attempted: oneshot::Sender<()>) {
        let (mut attempted, mut backoff, mut has_warned) = (Some(attempted), INITIAL_BACKOFF, false);
        loop {
            let connected = timeout(CONNECT_TIMEOUT, self.connect()).await;
            let active = match connected {
                Ok(Ok(active)) => Some(Arc::new(active)),
                Ok(Err(error)) => {
                    warn_once(&mut has_warned, &redacted_error(&error));
                    None
                }
                Err(_) => {
                    warn_once(&mut has_warned, "it does not answer");
                    None
                }
            };
            self.connection.store(active.clone());
            // Nobody may wait any more.
            if let Some(attempted) = attempted.take() {
                let _ = attempted.send(());
            }
            if let Some(active) = active {
                if std::mem::take(&mut has_warned) {
                    tracing::info!("Redis counts rate limits again");
                }
                self.wait_until_disconnected(&active).await;
                warn_once(&mut has_warned, "calls failed or were not answered in time");
                // One that worked is no sign that the next one fails.
                if active.answered_calls.load(Ordering::Relaxed) > 0 {
                    backoff = INITIAL_BACKOFF;
                }
            }
            tokio::time::sleep(backoff).await;
            backoff = (backoff * 2).min(MAX_BACKOFF);
        }
    }

    /// Waits until the connection is taken away from the callers; it is, too, when it dies while nobody calls.
    async fn wait_until_disconnected(&self, active: &Arc<RedisConnection>) {
        let mut connection = active.connection.clone();
        while timeout(HEARTBEAT_INTERVAL, self.connection_lost.notified()).await.is_err() {
            let ping = redis::cmd("PING");
            if !matches!(
                timeout(HEARTBEAT_INTERVAL, ping.query_async::<()>(&mut connection)).await,
                Ok(Ok(()))
            ) {
                self.disconnect(active);
            }
        }
    }

    /// A connection that has answered, and knows the script.
    async fn connect(&self) -> Result<RedisConnection, RedisError> {
        let config = AsyncConnectionConfig::new().set_connection_timeout(None).set_response_timeout(None);
        let mut connection =
            self.settings.url.0.get_multiplexed_async_connection_with_config(&config).await?;
        self.script.prepare_invoke().load_async(&mut connection).await?;
        Ok(RedisConnection {
            connection,
            consecutive_failures: AtomicU32::new(0),
            answered_calls: AtomicU64::new(0),
        })
    }
}

/// Says in the log what is wrong, once until it is well again.
fn warn_once(has_warned: &mut bool, problem: &str) {
    if !std::mem::replace(has_warned, true) {
        tracing::warn!(problem, "Redis cannot be asked about rate limits");
    }
}

/// What is wrong, without the server's own words: to a command that it does not know it repeats the password.
fn redacted_error(error: &RedisError) -> String {
    match error.code() {
        Some(code) => code.to_owned(),
        None if error.is_io_error() => error.to_string(),
        None => format!("{:?}", error.kind()),
    }
}

/// The script's answer; `None` if it is none.
fn parse_levels(key: &impl KeyAttributes, numbers: &[u64], now: Timestamp) -> Option<RateLimitStates> {
    let (is_repeated, levels) = numbers.split_first()?;
    let limits = key.rate_limits();
    if levels.len() != 2 * limits.len() {
        return None;
    }
    let pairs = limits.iter().zip(levels.chunks_exact(2));
    let before =
        pairs.map(|(limit, pair)| GcraState::from_used_units(limit, now, pair[0], pair[1])).collect();
    Some(RateLimitStates { before_request: before, is_repeated_request: *is_repeated == 1 })
}
