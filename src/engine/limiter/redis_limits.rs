//! Counts rate limits in Redis or a compatible server: one shared connection, and the script `consume.lua`.
//!
//! The connection's task lives on the runtime that [`RedisLimiter::maintain_connection`] runs on; all threads pipeline
//! their calls through it. No call waits longer than its timeout. A connection that fails, or leaves several
//! consecutive calls without a response, is withdrawn. Calls then fail at once until another connection has answered,
//! so a dead Redis does not delay Checks.
//!
//! Redis keys contain the key's ID and the limit, never a token, and expire once the limit is full again. They share a
//! hash tag, so that a cluster stores them on one node.

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

/// The time limit for connecting, including name resolution and TLS.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// The pause before the next connection attempt; it doubles up to the maximum.
const INITIAL_BACKOFF: Duration = Duration::from_millis(50);
const MAX_BACKOFF: Duration = Duration::from_secs(1);
/// How often an idle connection is probed, and the time limit of a probe.
const HEARTBEAT_INTERVAL: Duration = Duration::from_secs(1);
/// This number of consecutive failed calls withdraws the connection.
const MAX_CONSECUTIVE_FAILURES: u32 = 3;

/// How a call to Redis ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RedisOutcome {
    /// Redis answered within the timeout.
    Answered,
    /// Redis did not answer within the timeout.
    TimedOut,
    /// Redis returned an error, or the connection failed.
    Failed,
    /// There was no connection, so no call was made.
    NotConnected,
}

impl RedisOutcome {
    /// Every outcome, in the order of the metric's labels.
    pub const ALL: [RedisOutcome; 4] =
        [RedisOutcome::Answered, RedisOutcome::TimedOut, RedisOutcome::Failed, RedisOutcome::NotConnected];

    /// The value of the metric's label.
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

/// The state of a key's rate limits before a request.
#[derive(Debug)]
pub(super) struct RateLimitStates {
    /// The state of each limit, in the key's order.
    pub before_request: Vec<GcraState>,
    /// Whether the request consumed its units before, under the same ID.
    pub is_repeated_request: bool,
}

/// A connection, with its count of consecutive failures.
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

    /// The number of calls by outcome.
    pub(super) fn outcome_counts(&self) -> impl Iterator<Item = (RedisOutcome, u64)> {
        RedisOutcome::ALL
            .into_iter()
            .map(|call| (call, self.outcome_counts[call as usize].load(Ordering::Relaxed)))
    }

    /// Consumes from all rate limits of the key, or from none if one refuses.
    ///
    /// # Errors
    /// Redis did not answer. It may have consumed the units nevertheless.
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
            // A changed limit is another Redis key, and starts full.
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
        let response = timeout(self.settings.timeout, call.invoke_async::<Vec<u64>>(&mut connection)).await;
        let failure = match response {
            Ok(Ok(numbers)) => match parse_levels(key, &numbers, now) {
                Some(levels) => {
                    active.consecutive_failures.store(0, Ordering::Relaxed);
                    active.answered_calls.fetch_add(1, Ordering::Relaxed);
                    return Ok(levels);
                }
                None => RedisOutcome::Failed,
            },
            Ok(Err(error)) => {
                tracing::debug!(error = redacted_error(&error), "Redis call failed");
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

    /// Withdraws a connection, so that calls fail at once.
    fn disconnect(&self, active: &Arc<RedisConnection>) {
        let before = self.connection.compare_and_swap(active, None);
        if before.as_ref().is_some_and(|current| Arc::ptr_eq(current, active)) {
            self.connection_lost.notify_one();
        }
    }

    /// Connects, and reconnects whenever the connection is lost. Notifies `attempted` after the first attempt.
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
                    warn_once(&mut has_warned, "no answer");
                    None
                }
            };
            self.connection.store(active.clone());
            // The receiver may be gone.
            if let Some(attempted) = attempted.take() {
                let _ = attempted.send(());
            }
            if let Some(active) = active {
                if std::mem::take(&mut has_warned) {
                    tracing::info!("Redis available again: rate limits are counted there");
                }
                self.wait_until_disconnected(&active).await;
                warn_once(&mut has_warned, "calls failed or timed out");
                // A connection that worked resets the backoff.
                if active.answered_calls.load(Ordering::Relaxed) > 0 {
                    backoff = INITIAL_BACKOFF;
                }
            }
            tokio::time::sleep(backoff).await;
            backoff = (backoff * 2).min(MAX_BACKOFF);
        }
    }

    /// Waits until the connection is withdrawn. Probes it meanwhile, and withdraws it if it is dead.
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

    /// Opens a connection, and loads the script as a first call.
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

/// Logs a problem, once until calls succeed again.
fn warn_once(has_warned: &mut bool, problem: &str) {
    if !std::mem::replace(has_warned, true) {
        tracing::warn!(problem, "Redis unavailable for rate limits");
    }
}

/// Describes an error without the server's text, which repeats the password of an unknown command.
fn redacted_error(error: &RedisError) -> String {
    match error.code() {
        Some(code) => code.to_owned(),
        None if error.is_io_error() => error.to_string(),
        None => format!("{:?}", error.kind()),
    }
}

/// Parses the script's reply; `None` if it is malformed.
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
