//! Limits how often a log line is written when clients control how often its event happens.

use std::sync::{Mutex, PoisonError};

use crate::domain::time::Timestamp;

/// Allows a number of events per second, minute or hour, and rejects the rest.
#[derive(Debug)]
pub(crate) struct LogThrottle {
    limit: u32,
    /// Length of a window, in seconds.
    period_seconds: i64,
    current_window: Mutex<(i64, u32)>,
}

impl LogThrottle {
    /// Allows `limit` events per second.
    #[must_use]
    pub(crate) fn per_second(limit: u32) -> LogThrottle {
        LogThrottle { limit, period_seconds: 1, current_window: Mutex::default() }
    }

    /// Allows one event per minute.
    #[must_use]
    pub(crate) fn once_per_minute() -> LogThrottle {
        LogThrottle { limit: 1, period_seconds: 60, current_window: Mutex::default() }
    }

    /// Allows one event per hour.
    #[must_use]
    pub(crate) fn once_per_hour() -> LogThrottle {
        LogThrottle { limit: 1, period_seconds: 3600, current_window: Mutex::default() }
    }

    /// Counts an event at `now`. Returns whether it is allowed.
    #[must_use]
    pub(crate) fn allow(&self, now: Timestamp) -> bool {
        let window = now.as_micros().div_euclid(1_000_000 * self.period_seconds);
        let mut current = self.current_window.lock().unwrap_or_else(PoisonError::into_inner);
        if current.0 != window {
            *current = (window, 0);
        }
        current.1 = current.1.saturating_add(1);
        current.1 <= self.limit
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_a_minute_is_let_through() {
        let quiet = LogThrottle::once_per_minute();
        let may = |second: i64| quiet.allow(Timestamp::from_micros(second * 1_000_000));
        assert_eq!([0, 59, 60, 61, 120].map(may), [true, false, true, false, true]);
    }

    #[test]
    fn each_second_begins_anew() {
        let quiet = LogThrottle::per_second(2);
        let at =
            |second: i64| (0..4).filter(|_| quiet.allow(Timestamp::from_micros(second * 1_000_000))).count();
        assert_eq!((at(5), at(5), at(6), at(5)), (2, 0, 2, 2));
    }
}
