//! Detects afterwards that this machine's clock stalled, as it does while a virtual machine is paused or cloned. A
//! stall cannot be prevented and voids the guarantee. It is detected, counted, and subtracted from the lease.

use std::time::Duration;

use super::{BootInstant, Incarnation};
use crate::domain::time::Timestamp;

/// Less than this is not reported: clocks are read with some delay.
const MIN_REPORTED_STALL: Duration = Duration::from_millis(50);

/// One reading of the database's clock: taken by it after `sent` and before `received`, by our clock.
#[derive(Clone, Copy, Debug)]
struct DatabaseClockReading {
    sent: BootInstant,
    database_time: Timestamp,
    incarnation: Incarnation,
}

/// Compares the time that passed here with the time that passed at the database.
#[derive(Debug, Default)]
pub(super) struct ClockStallDetector {
    last_reading: Option<DatabaseClockReading>,
}

impl ClockStallDetector {
    /// Records a reading of both clocks. Returns the minimum of the time that this machine's clock has missed since the
    /// last reading; None = nothing noticeable.
    ///
    /// Clocks within 10 % of true time never cause a report. A forward step of the database's wall clock causes one
    /// report.
    pub(super) fn detect_stall(
        &mut self,
        sent: BootInstant,
        received: BootInstant,
        database: Timestamp,
        incarnation: Incarnation,
    ) -> Option<Duration> {
        let last =
            self.last_reading.replace(DatabaseClockReading { sent, database_time: database, incarnation })?;
        // Another incarnation may be another machine with another clock.
        if last.incarnation != incarnation {
            return None;
        }
        let there = database.saturating_duration_since(last.database_time) * 4 / 5;
        let here_at_most = received.saturating_duration_since(last.sent);
        let missing = there.saturating_sub(here_at_most);
        (missing >= MIN_REPORTED_STALL).then_some(missing)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const D: Incarnation = Incarnation(1);

    fn here(seconds: u64) -> BootInstant {
        BootInstant::from_nanos(seconds * 1_000_000_000)
    }

    fn there(seconds: i64) -> Timestamp {
        Timestamp::from_micros(seconds * 1_000_000)
    }

    #[test]
    fn a_clock_that_stood_still_is_noticed_with_what_it_missed_at_the_least() {
        let mut watch = ClockStallDetector::default();
        assert_eq!(watch.detect_stall(here(10), here(10), there(100), D), None);
        assert_eq!(
            watch.detect_stall(here(11), here(11), there(131), D),
            Some(Duration::from_millis(23_800))
        );
        assert_eq!(watch.detect_stall(here(12), here(12), there(132), D), None, "counted twice");
    }

    #[test]
    fn drift_slow_answers_and_a_database_set_back_are_no_freeze() {
        let mut watch = ClockStallDetector::default();
        watch.detect_stall(here(100), here(100), there(100), D);
        // 90 s here, 110 s there.
        assert_eq!(watch.detect_stall(here(190), here(190), there(210), D), None);
        // The answer came 30 s after the database read its clock.
        assert_eq!(watch.detect_stall(here(200), here(231), there(250), D), None);
        assert_eq!(watch.detect_stall(here(232), here(232), there(0), D), None);
    }

    #[test]
    fn the_clock_of_another_database_is_not_compared() {
        let mut watch = ClockStallDetector::default();
        watch.detect_stall(here(10), here(10), there(100), D);
        assert_eq!(watch.detect_stall(here(11), here(11), there(900), Incarnation(2)), None);
        assert!(watch.detect_stall(here(12), here(12), there(930), Incarnation(2)).is_some());
    }
}
