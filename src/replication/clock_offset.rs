//! Compares this machine's wall clock with the database's: keys expire by each replica's own clock.
//!
//! Leases are not affected: they use the boot clock.

use std::{
    sync::atomic::{AtomicI64, AtomicU64, Ordering},
    time::Duration,
};

use crate::{domain::time::Timestamp, log_throttle::LogThrottle};

/// From this offset on, keys visibly expire at the wrong time.
const MAX_TOLERATED_OFFSET: Duration = Duration::from_secs(1);
/// A slower reading is too inaccurate.
const MAX_ROUND_TRIP: Duration = Duration::from_millis(500);

/// The offset of this machine's wall clock from the database's, by the newest reading that was accurate enough.
#[derive(Debug)]
pub(crate) struct ClockOffset {
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
    /// The offset in seconds, positive if this machine is ahead; `None` before the first reading. The error is at most
    /// half a round trip, a quarter of a second.
    #[must_use]
    pub(crate) fn seconds(&self) -> Option<f64> {
        let read = self.readings.load(Ordering::Acquire) > 0;
        read.then(|| self.offset_micros.load(Ordering::Relaxed) as f64 / 1e6)
    }

    /// Records the database's time, read between two readings of the local clock. Warns about a large offset,
    /// at most once per hour.
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

/// One reading of the offset, in microseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct OffsetReading {
    /// Measured from the middle of the round trip.
    offset_micros: i64,
    /// The maximum error of `offset_micros`.
    error_micros: i64,
}

impl OffsetReading {
    /// Returns `None` if the reading took too long, or if the local clock was set meanwhile.
    fn new(before: Timestamp, database: Timestamp, after: Timestamp) -> Option<OffsetReading> {
        if after < before || after.saturating_duration_since(before) > MAX_ROUND_TRIP {
            return None;
        }
        let error = (after.as_micros() - before.as_micros()) / 2;
        let offset = (before.as_micros() + error).saturating_sub(database.as_micros());
        Some(OffsetReading { offset_micros: offset, error_micros: error })
    }

    /// The smallest difference that is consistent with the reading.
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
        assert_eq!(reading(0, 50, 501), None, "the round trip was too slow");
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
