//! Until when this process may allow, as Checks see it. Where one process owns the database, that is for as long as it does.
//!
//! Written by `replication`, from the actions of the lease protocol; read by every Check. The order of the two words
//! does not matter to the guarantee: only the deadline decides.

use std::{
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    time::Duration,
};

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

/// The lease that Checks are answered under.
#[derive(Debug)]
pub struct ServingLease {
    /// One process owns the database: what it has applied is all there is.
    is_sole_owner: AtomicBool,
    deadline: LeaseDeadline,
    as_of: AtomicU64,
    /// Limits are counted by each of several processes for itself.
    is_shared: AtomicBool,
}

impl ServingLease {
    /// Of the one process that owns the database.
    #[must_use]
    pub fn for_sole_owner() -> ServingLease {
        ServingLease {
            is_sole_owner: AtomicBool::new(true),
            is_shared: AtomicBool::new(false),
            ..ServingLease::expired()
        }
    }

    /// Of a replica, which has none yet.
    #[must_use]
    pub fn expired() -> ServingLease {
        // There are others, until a reading tells that there are none.
        let (as_of, shared) = (AtomicU64::new(0), AtomicBool::new(true));
        ServingLease {
            is_sole_owner: AtomicBool::new(false),
            deadline: LeaseDeadline::expired(),
            as_of,
            is_shared: shared,
        }
    }

    /// Allows until `deadline`: the map holds at least what the database held at `as_of`.
    pub fn publish(&self, deadline: BootInstant, as_of: BootInstant) {
        self.as_of.store(as_of.as_nanos(), Ordering::Relaxed);
        self.deadline.set(deadline);
    }

    /// Allows nothing from now on.
    pub fn expire_now(&self) {
        self.deadline.set(BootInstant::EXPIRED);
        self.is_sole_owner.store(false, Ordering::Relaxed);
    }

    fn is_sole_owner(&self) -> bool {
        self.is_sole_owner.load(Ordering::Relaxed)
    }

    /// When it ends.
    #[must_use]
    pub fn deadline(&self) -> BootInstant {
        if self.is_sole_owner() { BootInstant::FOREVER } else { self.deadline.get() }
    }

    /// Looks up, and tells `look_up` before whether what it finds may be allowed.
    pub fn with_validity<T>(
        &self,
        clock: impl FnOnce() -> BootInstant,
        look_up: impl FnOnce(bool) -> T,
    ) -> T {
        if self.is_sole_owner() { look_up(true) } else { self.deadline.with_validity(clock, look_up) }
    }

    /// Whether Checks may allow now.
    #[must_use]
    pub fn is_valid(&self, clock: impl FnOnce() -> BootInstant) -> bool {
        self.with_validity(clock, |fresh| fresh)
    }

    /// How old the map can be.
    #[must_use]
    pub fn staleness(&self, clock: impl FnOnce() -> BootInstant) -> Duration {
        if self.is_sole_owner() {
            return Duration::ZERO;
        }
        clock().saturating_duration_since(BootInstant::from_nanos(self.as_of.load(Ordering::Relaxed)))
    }

    /// Says whether other processes serve the same keys.
    pub fn set_shared(&self, shared: bool) {
        self.is_shared.store(shared, Ordering::Relaxed);
    }

    /// Whether other processes serve the same keys.
    #[must_use]
    pub fn is_shared(&self) -> bool {
        self.is_shared.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> BootInstant {
        BootInstant::from_nanos(seconds * 1_000_000_000)
    }

    #[test]
    fn a_replica_allows_until_its_deadline_and_before_its_first_lease_nothing() {
        let lease = ServingLease::expired();
        assert!(!lease.is_valid(|| at(0)));
        lease.publish(at(10), at(4));
        assert!(lease.is_valid(|| at(9)) && !lease.is_valid(|| at(10)));
        assert_eq!(lease.staleness(|| at(9)), Duration::from_secs(5));
        lease.expire_now();
        assert!(!lease.is_valid(|| at(5)));
    }

    #[test]
    fn the_one_owner_of_a_database_asks_no_clock() {
        let lease = ServingLease::for_sole_owner();
        assert!(lease.is_valid(|| panic!("asked")));
        assert_eq!(lease.staleness(|| panic!("asked")), Duration::ZERO);
    }

    #[test]
    fn an_owner_that_has_lost_the_database_allows_nothing() {
        let lease = ServingLease::for_sole_owner();
        lease.expire_now();
        assert!(!lease.is_valid(|| at(0)));
        assert_eq!(lease.deadline(), BootInstant::EXPIRED);
    }
}
