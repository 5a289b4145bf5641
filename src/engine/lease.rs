//! Until when this process may allow, as Checks see it. Where one process owns the database, that is for as long as it does.
//!
//! Written by `replication`, from the actions of the lease protocol; read by every Check. The order of the two words
//! does not matter to the guarantee: only the deadline decides.

use std::{
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    time::Duration,
};

use crate::domain::lease::Boottime;

use super::deadline::Deadline;

/// The lease that Checks are answered under.
#[derive(Debug)]
pub struct Lease {
    /// One process owns the database: what it has applied is all there is.
    sole: AtomicBool,
    deadline: Deadline,
    as_of: AtomicU64,
    /// Limits are counted by each of several processes for itself.
    shared: AtomicBool,
}

impl Lease {
    /// Of the one process that owns the database.
    #[must_use]
    pub fn sole() -> Lease {
        Lease { sole: AtomicBool::new(true), shared: AtomicBool::new(false), ..Lease::none() }
    }

    /// Of a replica, which has none yet.
    #[must_use]
    pub fn none() -> Lease {
        // There are others, until a reading tells that there are none.
        let (as_of, shared) = (AtomicU64::new(0), AtomicBool::new(true));
        Lease { sole: AtomicBool::new(false), deadline: Deadline::passed(), as_of, shared }
    }

    /// Allows until `deadline`: the map holds at least what the database held at `as_of`.
    pub fn publish(&self, deadline: Boottime, as_of: Boottime) {
        self.as_of.store(as_of.as_nanos(), Ordering::Relaxed);
        self.deadline.set(deadline);
    }

    /// Allows nothing from now on.
    pub fn stop_allowing(&self) {
        self.deadline.set(Boottime::PASSED);
        self.sole.store(false, Ordering::Relaxed);
    }

    fn is_sole(&self) -> bool {
        self.sole.load(Ordering::Relaxed)
    }

    /// When it ends.
    #[must_use]
    pub fn deadline(&self) -> Boottime {
        if self.is_sole() { Boottime::FOREVER } else { self.deadline.get() }
    }

    /// Looks up, and tells `look_up` before whether what it finds may be allowed.
    pub fn check<T>(&self, clock: impl FnOnce() -> Boottime, look_up: impl FnOnce(bool) -> T) -> T {
        if self.is_sole() { look_up(true) } else { self.deadline.check(clock, look_up) }
    }

    /// Whether Checks may allow now.
    #[must_use]
    pub fn holds(&self, clock: impl FnOnce() -> Boottime) -> bool {
        self.check(clock, |fresh| fresh)
    }

    /// How old the map can be.
    #[must_use]
    pub fn staleness(&self, clock: impl FnOnce() -> Boottime) -> Duration {
        if self.is_sole() {
            return Duration::ZERO;
        }
        clock().since(Boottime::from_nanos(self.as_of.load(Ordering::Relaxed)))
    }

    /// Says whether other processes serve the same keys.
    pub fn set_shared(&self, shared: bool) {
        self.shared.store(shared, Ordering::Relaxed);
    }

    /// Whether other processes serve the same keys.
    #[must_use]
    pub fn shared(&self) -> bool {
        self.shared.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> Boottime {
        Boottime::from_nanos(seconds * 1_000_000_000)
    }

    #[test]
    fn a_replica_allows_until_its_deadline_and_before_its_first_lease_nothing() {
        let lease = Lease::none();
        assert!(!lease.holds(|| at(0)));
        lease.publish(at(10), at(4));
        assert!(lease.holds(|| at(9)) && !lease.holds(|| at(10)));
        assert_eq!(lease.staleness(|| at(9)), Duration::from_secs(5));
        lease.stop_allowing();
        assert!(!lease.holds(|| at(5)));
    }

    #[test]
    fn the_one_owner_of_a_database_asks_no_clock() {
        let lease = Lease::sole();
        assert!(lease.holds(|| panic!("asked")));
        assert_eq!(lease.staleness(|| panic!("asked")), Duration::ZERO);
    }

    #[test]
    fn an_owner_that_has_lost_the_database_allows_nothing() {
        let lease = Lease::sole();
        lease.stop_allowing();
        assert!(!lease.holds(|| at(0)));
        assert_eq!(lease.deadline(), Boottime::PASSED);
    }
}
