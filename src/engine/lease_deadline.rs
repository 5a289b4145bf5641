//! The deadline until which Checks may allow: written by the replica's task, read by every Check.
//!
//! Two orders make it sound, and both are kept here or nowhere. The publisher changes the map first and sets the
//! deadline after. A Check reads the deadline first, then the clock, and looks up after. So whoever sees a new
//! deadline sees the map that it was granted with. `tests/it/deadline.rs` tries every interleaving.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::domain::lease::BootInstant;

/// A word that threads share. It is a trait so that a model checker can stand in for the real one.
pub trait AtomicWord {
    /// Reads it.
    fn load(&self, order: Ordering) -> u64;
    /// Writes it.
    fn store(&self, value: u64, order: Ordering);
}

impl AtomicWord for AtomicU64 {
    fn load(&self, order: Ordering) -> u64 {
        self.load(order)
    }

    fn store(&self, value: u64, order: Ordering) {
        self.store(value, order);
    }
}

/// The deadline.
#[derive(Debug)]
pub struct LeaseDeadline<W = AtomicU64>(W);

impl LeaseDeadline {
    /// One that has passed: nothing is allowed before the first lease.
    #[must_use]
    pub fn expired() -> Self {
        LeaseDeadline(AtomicU64::new(BootInstant::EXPIRED.as_nanos()))
    }
}

impl<W: AtomicWord> LeaseDeadline<W> {
    /// One in this word.
    pub fn from_word(word: W) -> Self {
        LeaseDeadline(word)
    }

    /// Sets it. What the map must hold by then has been written before.
    pub fn set(&self, deadline: BootInstant) {
        self.0.store(deadline.as_nanos(), Ordering::Release);
    }

    /// What it is.
    pub fn get(&self) -> BootInstant {
        BootInstant::from_nanos(self.0.load(Ordering::Acquire))
    }

    /// Reads it, then the clock, and looks up after. `look_up` hears whether what it finds may be allowed.
    pub fn with_validity<T>(
        &self,
        clock: impl FnOnce() -> BootInstant,
        look_up: impl FnOnce(bool) -> T,
    ) -> T {
        let deadline = self.get();
        let fresh = clock() < deadline;
        look_up(fresh)
    }
}
