//! The lease until which this process may allow, as Checks see it.
//!
//! `replication` writes it, from the actions of the lease protocol in `domain::lease`; every Check reads it. A process
//! that owns its database alone may allow for as long as it does.
//!
//! Two orders make the deadline sound. The publisher changes the index first and sets the deadline afterwards. A Check
//! reads the deadline, then the clock, and looks up afterwards. So a Check that sees a new deadline also sees the index
//! that it was granted with. `tests/it/deadline.rs` tries every interleaving. The order of the other words does not
//! matter: only the deadline decides.

use std::{
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    time::Duration,
};

use crate::domain::lease::BootInstant;

/// An atomic word. It is a trait so that a model checker can substitute its own.
pub trait AtomicWord {
    /// Loads the word with this ordering.
    fn load(&self, order: Ordering) -> u64;
    /// Stores the word with this ordering.
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

/// The deadline of the lease, in one atomic word.
#[derive(Debug)]
pub struct LeaseDeadline<W = AtomicU64>(W);

impl LeaseDeadline {
    /// A deadline in the past: nothing is allowed before the first lease.
    #[must_use]
    pub fn expired() -> Self {
        LeaseDeadline(AtomicU64::new(BootInstant::EXPIRED.as_nanos()))
    }
}

impl<W: AtomicWord> LeaseDeadline<W> {
    /// A deadline that is stored in this word.
    pub fn from_word(word: W) -> Self {
        LeaseDeadline(word)
    }

    /// Sets the deadline. The index must already hold what it was granted with.
    pub fn set(&self, deadline: BootInstant) {
        self.0.store(deadline.as_nanos(), Ordering::Release);
    }

    /// The deadline that was set last.
    pub fn get(&self) -> BootInstant {
        BootInstant::from_nanos(self.0.load(Ordering::Acquire))
    }

    /// Reads the deadline, then the clock, and then calls `look_up` with whether the lease is valid.
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
    /// This process owns the database: what it has applied is complete.
    is_sole_owner: AtomicBool,
    deadline: LeaseDeadline,
    as_of: AtomicU64,
    /// Whether other processes serve the same keys, so that each counts limits for itself.
    is_shared: AtomicBool,
}

impl ServingLease {
    /// The lease of the only process on a database: valid until it loses the database.
    #[must_use]
    pub fn for_sole_owner() -> ServingLease {
        ServingLease {
            is_sole_owner: AtomicBool::new(true),
            is_shared: AtomicBool::new(false),
            ..ServingLease::expired()
        }
    }

    /// The lease of a replica before its first renewal.
    #[must_use]
    pub fn expired() -> ServingLease {
        // Other replicas are assumed until a renewal shows that there are none.
        let (as_of, shared) = (AtomicU64::new(0), AtomicBool::new(true));
        ServingLease {
            is_sole_owner: AtomicBool::new(false),
            deadline: LeaseDeadline::expired(),
            as_of,
            is_shared: shared,
        }
    }

    /// Allows until `deadline`. The index holds at least what the database held at `as_of`.
    pub fn publish(&self, deadline: BootInstant, as_of: BootInstant) {
        self.as_of.store(as_of.as_nanos(), Ordering::Relaxed);
        self.deadline.set(deadline);
    }

    /// Ends the lease: from now on nothing is allowed.
    pub fn expire_now(&self) {
        self.deadline.set(BootInstant::EXPIRED);
        self.is_sole_owner.store(false, Ordering::Relaxed);
    }

    fn is_sole_owner(&self) -> bool {
        self.is_sole_owner.load(Ordering::Relaxed)
    }

    /// When the lease ends; never, for a sole owner.
    #[must_use]
    pub fn deadline(&self) -> BootInstant {
        if self.is_sole_owner() { BootInstant::FOREVER } else { self.deadline.get() }
    }

    /// Calls `look_up` with whether the lease is valid; the deadline and the clock are read first.
    pub fn with_validity<T>(
        &self,
        clock: impl FnOnce() -> BootInstant,
        look_up: impl FnOnce(bool) -> T,
    ) -> T {
        if self.is_sole_owner() { look_up(true) } else { self.deadline.with_validity(clock, look_up) }
    }

    /// Returns whether Checks may allow now.
    #[must_use]
    pub fn is_valid(&self, clock: impl FnOnce() -> BootInstant) -> bool {
        self.with_validity(clock, |fresh| fresh)
    }

    /// The maximum age of the index's contents.
    #[must_use]
    pub fn staleness(&self, clock: impl FnOnce() -> BootInstant) -> Duration {
        if self.is_sole_owner() {
            return Duration::ZERO;
        }
        clock().saturating_duration_since(BootInstant::from_nanos(self.as_of.load(Ordering::Relaxed)))
    }

    /// Sets whether other processes serve the same keys.
    pub fn set_shared(&self, shared: bool) {
        self.is_shared.store(shared, Ordering::Relaxed);
    }

    /// Returns whether other processes serve the same keys.
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
