//! The only reader of the clocks and of the operating system's randomness.
//!
//! Everything else takes both as arguments, so that tests can stop time and repeat random values.

use std::{
    sync::atomic::{AtomicI64, Ordering},
    time::{SystemTime, UNIX_EPOCH},
};

use rand::TryRng as _;

use crate::domain::{lease::BootInstant, time::Timestamp};

/// A source of the current time.
pub trait Clock: Send + Sync + 'static {
    /// The current time in UTC.
    fn now(&self) -> Timestamp;

    /// The current time of the boot clock, which measures leases. It runs even if a test stops the wall clock, because
    /// requests to a database take real time.
    fn boottime(&self) -> BootInstant {
        boottime()
    }
}

/// `CLOCK_BOOTTIME` includes the time that the machine sleeps; on other systems than Linux the monotonic clock does.
fn boottime() -> BootInstant {
    #[cfg(target_os = "linux")]
    let clock = rustix::time::ClockId::Boottime;
    #[cfg(not(target_os = "linux"))]
    let clock = rustix::time::ClockId::Monotonic;
    let now = rustix::time::clock_gettime(clock);
    let (seconds, nanos) = (u64::try_from(now.tv_sec), u64::try_from(now.tv_nsec));
    let nanos = seconds.unwrap_or(0) * 1_000_000_000 + nanos.unwrap_or(0);
    #[cfg(keyward_breakable)]
    let nanos = nanos / 1000 * BOOT_CLOCK_RATE.load(Ordering::Relaxed);
    BootInstant::from_nanos(nanos)
}

/// Rate of the boot clock of a fault-injection build, in thousandths.
#[cfg(keyward_breakable)]
static BOOT_CLOCK_RATE: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(1000);

/// Sets the rate of the boot clock, in thousandths of real time. Must be called before the clock is read.
#[cfg(keyward_breakable)]
pub fn set_boot_clock_rate(thousandths: u64) {
    BOOT_CLOCK_RATE.store(thousandths, Ordering::Relaxed);
}

/// The machine's wall clock and boot clock.
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    #[expect(clippy::disallowed_methods, reason = "this is the one place that reads the wall clock")]
    fn now(&self) -> Timestamp {
        let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Timestamp::from_micros(0).saturating_add(since_1970)
    }
}

/// A clock for tests, which moves only by [`advance`](ManualClock::advance).
#[derive(Debug)]
pub struct ManualClock(AtomicI64);

impl ManualClock {
    /// Creates a clock that shows `now`.
    #[must_use]
    pub fn new(now: Timestamp) -> Self {
        ManualClock(AtomicI64::new(now.as_micros()))
    }

    /// Moves the clock forward.
    pub fn advance(&self, by: std::time::Duration) {
        let later = self.now().saturating_add(by);
        self.0.store(later.as_micros(), Ordering::SeqCst);
    }
}

impl Clock for ManualClock {
    fn now(&self) -> Timestamp {
        Timestamp::from_micros(self.0.load(Ordering::SeqCst))
    }
}

/// The source of randomness failed, so no secret can be generated.
#[derive(Debug, thiserror::Error)]
#[error("the operating system provided no random bytes")]
pub struct EntropyError(#[source] pub Box<dyn std::error::Error + Send + Sync>);

/// A source of random bytes for secrets.
pub trait EntropySource: Send + Sync + 'static {
    /// Fills the buffer with random bytes.
    ///
    /// Fails if the source fails; `bytes` must not be used then.
    fn fill(&self, bytes: &mut [u8]) -> Result<(), EntropyError>;
}

/// The operating system's random number generator.
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemEntropy;

impl EntropySource for SystemEntropy {
    fn fill(&self, bytes: &mut [u8]) -> Result<(), EntropyError> {
        rand::rngs::SysRng.try_fill_bytes(bytes).map_err(|error| EntropyError(Box::new(error)))
    }
}

/// Returns `N` random bytes.
///
/// # Errors
/// Fails if the source fails.
pub fn random_bytes<const N: usize>(entropy: &dyn EntropySource) -> Result<[u8; N], EntropyError> {
    let mut bytes = [0; N];
    entropy.fill(&mut bytes)?;
    Ok(bytes)
}
