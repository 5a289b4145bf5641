//! A cap on how often something is said: clients choose how often there is something to say.

use std::sync::{Mutex, PoisonError};

use crate::domain::time::Timestamp;

/// Lets so many through in each second, minute or hour, and no more.
#[derive(Debug)]
pub struct Quiet {
    most: u32,
    /// In seconds.
    period: i64,
    current: Mutex<(i64, u32)>,
}

impl Quiet {
    /// At most so many a second.
    #[must_use]
    pub fn new(most: u32) -> Quiet {
        Quiet { most, period: 1, current: Mutex::default() }
    }

    /// One a minute.
    #[must_use]
    pub fn once_a_minute() -> Quiet {
        Quiet { most: 1, period: 60, current: Mutex::default() }
    }

    /// One an hour.
    #[must_use]
    pub fn once_an_hour() -> Quiet {
        Quiet { most: 1, period: 3600, current: Mutex::default() }
    }

    /// Whether this one is let through.
    #[must_use]
    pub fn may(&self, now: Timestamp) -> bool {
        let this = now.as_micros().div_euclid(1_000_000 * self.period);
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        if current.0 != this {
            *current = (this, 0);
        }
        current.1 = current.1.saturating_add(1);
        current.1 <= self.most
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_a_minute_is_let_through() {
        let quiet = Quiet::once_a_minute();
        let may = |second: i64| quiet.may(Timestamp::from_micros(second * 1_000_000));
        assert_eq!([0, 59, 60, 61, 120].map(may), [true, false, true, false, true]);
    }

    #[test]
    fn each_second_begins_anew() {
        let quiet = Quiet::new(2);
        let at =
            |second: i64| (0..4).filter(|_| quiet.may(Timestamp::from_micros(second * 1_000_000))).count();
        assert_eq!((at(5), at(5), at(6), at(5)), (2, 0, 2, 2));
    }
}
