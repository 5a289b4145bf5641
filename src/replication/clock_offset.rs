//! Compares this machine's wall clock with the database's: keys expire by each replica's own clock.
//!
//! Not here: leases, which go by the boot clock and need no wall clock.

use std::{
    sync::atomic::{AtomicI64, AtomicU64, Ordering},
    time::Duration,
};

use crate::{domain::time::Timestamp, log_throttle::LogThrottle};

/// From which difference on expiry is visibly wrong.
const MAX_TOLERATED_OFFSET: Duration = Duration::from_secs(1);
/// A reading that took longer says too little.
const MAX_ROUND_TRIP: Duration = Duration::from_millis(500);

/// How far this machine's wall clock is ahead of the database's, by the newest reading that was exact enough.
#[derive(Debug)]
pub struct ClockOffset {
    offset_micros: AtomicI64,
    readings: AtomicU64,
    log_throttle: LogThrottle,
}

impl Default for ClockOffset {
    fn default() -> Self {
        ClockOffset {
            offset_micros: AtomicI64::new(0),
            readings: AtomicU64::new(0),
            log_throttle: LogThrottle::once_per_hour(),
        }
    }
}

impl ClockOffset {
    /// In seconds, positive if this machine is ahead; None before the first reading. It may be wrong by half of a round
    /// trip, at most a quarter of a second.
    #[must_use]
    pub fn seconds(&self) -> Option<f64> {
        let read = self.readings.load(Ordering::Acquire) > 0;
        read.then(|| self.offset_micros.load(Ordering::Relaxed) as f64 / 1e6)
    }

    /// Takes a reading of the database's clock, made between two of this machine's. Logs a difference beyond what is
    /// tolerated, now and then.
    pub(super) fn record(&self, before: Timestamp, database: Timestamp, after: Timestamp) {
        let Some(reading) = OffsetReading::new(before, database, after) else { return };
        self.offset_micros.store(reading.offset_micros, Ordering::Relaxed);
        self.readings.fetch_add(1, Ordering::Release);
        if reading.min_difference() >= MAX_TOLERATED_OFFSET && self.log_throttle.allow(after) {
            let offset_seconds = reading.offset_micros as f64 / 1e6;
            tracing::warn!(
                offset_seconds,
                "wall clock differs from the database's: keys expire too early or too late here; synchronize the \
                 clocks of both machines (NTP)"
            );
        }
    }
}

/// What one reading says, in microseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct OffsetReading {
    /// From the middle of the round trip.
    offset_micros: i64,
    /// By how much that may be wrong.
    error_micros: i64,
}

impl OffsetReading {
    /// None where the reading took too long, or this machine's clock was set meanwhile.
    fn new(before: Timestamp, database: Timestamp, after: Timestamp) -> Option<OffsetReading> {
        if after < before || after.saturating_duration_since(before) > MAX_ROUND_TRIP {
            return None;
        }
        let error = (after.as_micros() - before.as_micros()) / 2;
        let offset = (before.as_micros() + error).saturating_sub(database.as_micros());
        Some(OffsetReading { offset_micros: offset, error_micros: error })
    }

    /// The least difference that fits the reading.
    fn min_difference(self) -> Duration {
        let error = u64::try_from(self.error_micros).unwrap_or(0);
        Duration::from_micros(self.offset_micros.unsigned_abs().saturating_sub(error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(millis: i64) -> Timestamp {
        Timestamp::from_micros(1_700_000_000_000_000 + millis * 1000)
    }

    #[test]
    fn an_offset_is_taken_from_the_middle_of_a_round_trip_with_its_error() {
        let reading = |before, database, after| OffsetReading::new(at(before), at(database), at(after));
        assert_eq!(reading(0, 50, 100), Some(OffsetReading { offset_micros: 0, error_micros: 50_000 }));
        let ahead = reading(3000, 1000, 3100).unwrap();
        assert_eq!((ahead.offset_micros, ahead.min_difference()), (2_050_000, Duration::from_millis(2000)));
        let behind = reading(0, 1040, 100).unwrap();
        assert_eq!((behind.offset_micros, behind.min_difference()), (-990_000, Duration::from_millis(940)));
        assert_eq!(reading(0, 50, 501), None, "too slow to say much");
        assert_eq!(reading(100, 50, 0), None, "the clock was set meanwhile");
    }

    #[test]
    fn an_offset_is_known_from_the_first_reading_and_has_a_sign() {
        let offset = ClockOffset::default();
        assert_eq!(offset.seconds(), None);
        offset.record(at(0), at(2000), at(0));
        assert_eq!(offset.seconds(), Some(-2.0));
        offset.record(at(9000), at(0), at(9900));
        assert_eq!(offset.seconds(), Some(-2.0), "the slow reading is left out");
    }
}
