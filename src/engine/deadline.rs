//! The deadline until which Checks may allow: written by the replica's task, read by every Check.
//!
//! Two orders make it sound, and both are kept here or nowhere. The publisher changes the map first and sets the
//! deadline after. A Check reads the deadline first, then the clock, and looks up after. So whoever sees a new
//! deadline sees the map that it was granted with. `tests/it/deadline.rs` tries every interleaving.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::domain::lease::Boottime;

/// A word that threads share. It is a trait so that a model checker can stand in for the real one.
pub trait Word {
    /// Reads it.
    fn load(&self, order: Ordering) -> u64;
    /// Writes it.
    fn store(&self, value: u64, order: Ordering);
}

impl Word for AtomicU64 {
    fn load(&self, order: Ordering) -> u64 {
        self.load(order)
    }

    fn store(&self, value: u64, order: Ordering) {
        self.store(value, order);
    }
}

/// The deadline.
#[derive(Debug)]
pub struct Deadline<W = AtomicU64>(W);

impl Deadline {
    /// One that has passed: nothing is allowed before the first lease.
    #[must_use]
    pub fn passed() -> Self {
        Deadline(AtomicU64::new(Boottime::PASSED.as_nanos()))
    }
}

impl<W: Word> Deadline<W> {
    /// One in this word.
    pub fn in_word(word: W) -> Self {
        Deadline(word)
    }

    /// Sets it. What the map must hold by then has been written before.
    pub fn set(&self, deadline: Boottime) {
        self.0.store(deadline.as_nanos(), Ordering::Release);
    }

    /// What it is.
    pub fn get(&self) -> Boottime {
        Boottime::from_nanos(self.0.load(Ordering::Acquire))
    }

    /// Reads it, then the clock, and looks up after. `look_up` hears whether what it finds may be allowed.
    pub fn check<T>(&self, clock: impl FnOnce() -> Boottime, look_up: impl FnOnce(bool) -> T) -> T {
        let deadline = self.get();
        let fresh = clock() < deadline;
        look_up(fresh)
    }
}
