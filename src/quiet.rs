//! A cap on how often something is said: clients choose how often there is something to say.

use std::sync::{Mutex, PoisonError};

use crate::domain::time::Timestamp;

/// Lets so many through in each second, and no more.
#[derive(Debug)]
pub struct Quiet {
    most: u32,
    second: Mutex<(i64, u32)>,
}

impl Quiet {
    /// At most so many a second.
    #[must_use]
    pub fn new(most: u32) -> Quiet {
        Quiet { most, second: Mutex::default() }
    }

    /// Whether this one is let through.
    #[must_use]
    pub fn may(&self, now: Timestamp) -> bool {
        let this = now.as_micros().div_euclid(1_000_000);
        let mut second = self.second.lock().unwrap_or_else(PoisonError::into_inner);
        if second.0 != this {
            *second = (this, 0);
        }
        second.1 = second.1.saturating_add(1);
        second.1 <= self.most
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_second_begins_anew() {
        let quiet = Quiet::new(2);
        let at =
            |second: i64| (0..4).filter(|_| quiet.may(Timestamp::from_micros(second * 1_000_000))).count();
        assert_eq!((at(5), at(5), at(6), at(5)), (2, 0, 2, 2));
    }
}
