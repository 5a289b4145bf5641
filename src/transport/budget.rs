//! Memory that requests hold while they arrive and while they are worked on: one limit for the process, over every
//! listener, and a quarter of it for a connection.
//!
//! What arrives whole and is answered at once needs no reservation. A reservation goes back when it is dropped: at the
//! end of its call, on every error, and with its connection.

use std::sync::{
    Arc,
    atomic::{AtomicU64, AtomicUsize, Ordering},
};

use crate::{clock::Clock, quiet::Quiet};

/// How far a caller may fill a limit. The rest is kept for the priorities above it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Priority {
    /// Shows no credential.
    Anonymous,
    /// Any caller.
    Caller,
    /// A call that takes rights away.
    Restricting,
    /// A caller of the operator account.
    Operator,
    /// A call of an operator that takes rights away.
    RestrictingOperator,
}

impl Priority {
    /// The part of a limit that this priority may fill; at least one.
    #[must_use]
    pub const fn part_of(self, limit: usize) -> usize {
        let sixteenths = match self {
            Priority::Anonymous => 8,
            Priority::Caller => 12,
            Priority::Restricting => 14,
            Priority::Operator => 15,
            Priority::RestrictingOperator => 16,
        };
        limit.saturating_mul(sixteenths).div_ceil(16)
    }
}

/// The memory of the whole process.
pub struct MemoryBudget {
    limit: usize,
    used: AtomicUsize,
    connections: AtomicU64,
    refused: AtomicU64,
    clock: Arc<dyn Clock>,
    log: Quiet,
}

impl std::fmt::Debug for MemoryBudget {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MemoryBudget")
            .field("limit", &self.limit)
            .field("used", &self.used)
            .finish_non_exhaustive()
    }
}

impl MemoryBudget {
    /// A connection may take this part of the limit: a quarter.
    const CONNECTIONS: usize = 4;

    /// A budget of so many bytes.
    #[must_use]
    pub fn new(limit: usize, clock: Arc<dyn Clock>) -> Arc<MemoryBudget> {
        let (used, connections, refused) = Default::default();
        Arc::new(MemoryBudget { limit, used, connections, refused, clock, log: Quiet::once_a_minute() })
    }

    /// Bytes that are reserved.
    #[must_use]
    pub fn used(&self) -> usize {
        self.used.load(Ordering::Relaxed)
    }

    /// Reservations that did not fit.
    #[must_use]
    pub fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }

    fn refuse(&self, bytes: usize) {
        let refused = self.refused.fetch_add(1, Ordering::Relaxed) + 1;
        if self.log.may(self.clock.now()) {
            let (limit, used) = (self.limit, self.used());
            tracing::warn!(bytes, used, limit, refused, "request refused: overload.request_bytes reached");
        }
    }
}

/// The memory of one connection, within that of the process.
#[derive(Debug)]
pub struct ConnectionBudget {
    process: Arc<MemoryBudget>,
    number: u64,
    used: AtomicUsize,
}

impl ConnectionBudget {
    /// The share of a new connection.
    #[must_use]
    pub fn new(process: Arc<MemoryBudget>) -> Arc<ConnectionBudget> {
        let number = process.connections.fetch_add(1, Ordering::Relaxed);
        Arc::new(ConnectionBudget { process, number, used: AtomicUsize::new(0) })
    }

    /// Which connection it is: no other one of the process has this number.
    #[must_use]
    pub fn number(&self) -> u64 {
        self.number
    }

    /// Reserves memory; `None` if that would exceed the connection's limit or the process's.
    #[must_use]
    pub fn reserve(self: &Arc<Self>, bytes: usize, priority: Priority) -> Option<Reservation> {
        let mut reservation = Reservation { connection: self.clone(), bytes: 0 };
        reservation.resize(bytes, priority).then_some(reservation)
    }

    fn take(&self, bytes: usize, priority: Priority) -> bool {
        let process = &*self.process;
        let own = priority.part_of(process.limit.div_ceil(MemoryBudget::CONNECTIONS));
        if add_within(&self.used, bytes, own) {
            if add_within(&process.used, bytes, priority.part_of(process.limit)) {
                return true;
            }
            self.used.fetch_sub(bytes, Ordering::Relaxed);
        }
        process.refuse(bytes);
        false
    }

    fn give_back(&self, bytes: usize) {
        self.used.fetch_sub(bytes, Ordering::Relaxed);
        self.process.used.fetch_sub(bytes, Ordering::Relaxed);
    }
}

fn add_within(used: &AtomicUsize, bytes: usize, limit: usize) -> bool {
    let add = |used: usize| used.checked_add(bytes).filter(|sum| *sum <= limit);
    used.try_update(Ordering::Relaxed, Ordering::Relaxed, add).is_ok()
}

/// Reserved memory, until this is dropped.
#[derive(Debug)]
pub struct Reservation {
    connection: Arc<ConnectionBudget>,
    bytes: usize,
}

impl Reservation {
    /// Changes its size. `false` = so many more bytes do not fit, and nothing has changed.
    #[must_use]
    pub fn resize(&mut self, bytes: usize, priority: Priority) -> bool {
        match bytes.checked_sub(self.bytes) {
            Some(0) => {}
            Some(more) if !self.connection.take(more, priority) => return false,
            Some(_) => {}
            None => self.connection.give_back(self.bytes - bytes),
        }
        self.bytes = bytes;
        true
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.connection.give_back(self.bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn budget(limit: usize) -> Arc<MemoryBudget> {
        MemoryBudget::new(limit, Arc::new(crate::clock::SystemClock))
    }

    #[test]
    fn a_connection_takes_a_quarter_and_what_it_took_goes_back() {
        let process = budget(1600);
        let connection = ConnectionBudget::new(process.clone());
        let mut all = connection.reserve(300, Priority::Caller).unwrap();
        assert!(!all.resize(301, Priority::Caller), "a caller fills three quarters of the 400");
        assert!(all.resize(400, Priority::RestrictingOperator));
        assert!(all.resize(350, Priority::Caller), "less always fits");
        assert_eq!((connection.used.load(Ordering::Relaxed), process.refused()), (350, 1));
        drop(all);
        assert_eq!((connection.used.load(Ordering::Relaxed), process.used()), (0, 0));
    }

    #[test]
    fn anonymous_callers_leave_half_of_the_process_to_others() {
        let process = budget(1600);
        let held: Vec<_> = (0..10)
            .filter_map(|_| ConnectionBudget::new(process.clone()).reserve(200, Priority::Anonymous))
            .collect();
        assert_eq!(held.len(), 4);
        let next = ConnectionBudget::new(process.clone());
        assert!(next.reserve(200, Priority::Anonymous).is_none());
        assert!(next.reserve(200, Priority::Caller).is_some());
    }

    #[test]
    fn the_smallest_limit_lets_everybody_have_one() {
        assert_eq!(Priority::Anonymous.part_of(1), 1);
        assert_eq!(Priority::RestrictingOperator.part_of(1), 1);
    }
}
