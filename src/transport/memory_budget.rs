//! Bounds the memory that requests hold while they arrive and run: one limit for the process, and a quarter of it for a
//! connection.
//!
//! A request that arrives whole and is answered at once needs no reservation. A dropped reservation is returned: at the
//! end of its call, on every error, and with its connection.

use std::sync::{
    Arc,
    atomic::{AtomicU64, AtomicUsize, Ordering},
};

use crate::{clock::Clock, log_throttle::LogThrottle};

/// The share of a limit that a caller may fill. The rest is reserved for higher priorities.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum CallPriority {
    /// The call carries no credential.
    Anonymous,
    Caller,
    /// The call takes rights away.
    Restricting,
    /// The caller belongs to the operator account.
    Operator,
    /// An operator's call takes rights away.
    RestrictingOperator,
}

impl CallPriority {
    /// The part of a limit that this priority may fill, at least one unit.
    #[must_use]
    pub(crate) const fn share_of(self, limit: usize) -> usize {
        let sixteenths = match self {
            CallPriority::Anonymous => 8,
            CallPriority::Caller => 12,
            CallPriority::Restricting => 14,
            CallPriority::Operator => 15,
            CallPriority::RestrictingOperator => 16,
        };
        limit.saturating_mul(sixteenths).div_ceil(16)
    }
}

/// The memory budget of the process.
pub struct MemoryBudget {
    limit: usize,
    used_bytes: AtomicUsize,
    next_connection_id: AtomicU64,
    refused_reservations: AtomicU64,
    clock: Arc<dyn Clock>,
    log_throttle: LogThrottle,
}

impl std::fmt::Debug for MemoryBudget {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MemoryBudget")
            .field("limit", &self.limit)
            .field("used", &self.used_bytes)
            .finish_non_exhaustive()
    }
}

impl MemoryBudget {
    /// A connection may reserve the limit divided by this.
    const CONNECTION_DIVISOR: usize = 4;

    /// Creates a budget of `limit` bytes.
    #[must_use]
    pub(crate) fn new(limit: usize, clock: Arc<dyn Clock>) -> Arc<MemoryBudget> {
        let (used, connections, refused) = Default::default();
        Arc::new(MemoryBudget {
            limit,
            used_bytes: used,
            next_connection_id: connections,
            refused_reservations: refused,
            clock,
            log_throttle: LogThrottle::once_per_minute(),
        })
    }

    /// Bytes that are reserved at present.
    #[must_use]
    pub(crate) fn used_bytes(&self) -> usize {
        self.used_bytes.load(Ordering::Relaxed)
    }

    /// Reservations that were refused since the start.
    #[must_use]
    pub(crate) fn refused_reservations(&self) -> u64 {
        self.refused_reservations.load(Ordering::Relaxed)
    }

    fn record_refusal(&self, bytes: usize) {
        let refused = self.refused_reservations.fetch_add(1, Ordering::Relaxed) + 1;
        if self.log_throttle.allow(self.clock.now()) {
            let (limit, used) = (self.limit, self.used_bytes());
            tracing::warn!(bytes, used, limit, refused, "request refused: overload.request_bytes reached");
        }
    }
}

/// The memory budget of one connection, within that of the process.
#[derive(Debug)]
pub struct ConnectionMemoryBudget {
    process: Arc<MemoryBudget>,
    connection_id: u64,
    used_bytes: AtomicUsize,
}

impl ConnectionMemoryBudget {
    /// Creates the budget of a new connection.
    #[must_use]
    pub(crate) fn new(process: Arc<MemoryBudget>) -> Arc<ConnectionMemoryBudget> {
        let number = process.next_connection_id.fetch_add(1, Ordering::Relaxed);
        Arc::new(ConnectionMemoryBudget { process, connection_id: number, used_bytes: AtomicUsize::new(0) })
    }

    /// A number that is unique among the process's connections.
    #[must_use]
    pub(crate) fn connection_id(&self) -> u64 {
        self.connection_id
    }

    /// Reserves memory; `None` if that would exceed the connection's limit or the process's.
    #[must_use]
    pub(crate) fn reserve(
        self: &Arc<Self>,
        bytes: usize,
        priority: CallPriority,
    ) -> Option<MemoryReservation> {
        let mut reservation = MemoryReservation { budget: self.clone(), bytes: 0 };
        reservation.resize(bytes, priority).then_some(reservation)
    }

    fn try_take(&self, bytes: usize, priority: CallPriority) -> bool {
        let process = &*self.process;
        let own = priority.share_of(process.limit.div_ceil(MemoryBudget::CONNECTION_DIVISOR));
        if add_up_to(&self.used_bytes, bytes, own) {
            if add_up_to(&process.used_bytes, bytes, priority.share_of(process.limit)) {
                return true;
            }
            self.used_bytes.fetch_sub(bytes, Ordering::Relaxed);
        }
        process.record_refusal(bytes);
        false
    }

    fn release(&self, bytes: usize) {
        self.used_bytes.fetch_sub(bytes, Ordering::Relaxed);
        self.process.used_bytes.fetch_sub(bytes, Ordering::Relaxed);
    }
}

fn add_up_to(used: &AtomicUsize, bytes: usize, limit: usize) -> bool {
    let add = |used: usize| used.checked_add(bytes).filter(|sum| *sum <= limit);
    used.try_update(Ordering::Relaxed, Ordering::Relaxed, add).is_ok()
}

/// Reserved memory, until this is dropped.
#[derive(Debug)]
pub(crate) struct MemoryReservation {
    budget: Arc<ConnectionMemoryBudget>,
    bytes: usize,
}

impl MemoryReservation {
    /// Resizes the reservation. `false` = the new size does not fit, and nothing changed.
    #[must_use]
    pub(crate) fn resize(&mut self, bytes: usize, priority: CallPriority) -> bool {
        match bytes.checked_sub(self.bytes) {
            Some(0) => {}
            Some(more) if !self.budget.try_take(more, priority) => return false,
            Some(_) => {}
            None => self.budget.release(self.bytes - bytes),
        }
        self.bytes = bytes;
        true
    }
}

impl Drop for MemoryReservation {
    fn drop(&mut self) {
        self.budget.release(self.bytes);
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
        let connection = ConnectionMemoryBudget::new(process.clone());
        let mut all = connection.reserve(300, CallPriority::Caller).unwrap();
        assert!(!all.resize(301, CallPriority::Caller), "a caller fills three quarters of the 400");
        assert!(all.resize(400, CallPriority::RestrictingOperator));
        assert!(all.resize(350, CallPriority::Caller), "less always fits");
        assert_eq!((connection.used_bytes.load(Ordering::Relaxed), process.refused_reservations()), (350, 1));
        drop(all);
        assert_eq!((connection.used_bytes.load(Ordering::Relaxed), process.used_bytes()), (0, 0));
    }

    #[test]
    fn anonymous_callers_leave_half_of_the_process_to_others() {
        let process = budget(1600);
        let held: Vec<_> = (0..10)
            .filter_map(|_| {
                ConnectionMemoryBudget::new(process.clone()).reserve(200, CallPriority::Anonymous)
            })
            .collect();
        assert_eq!(held.len(), 4);
        let next = ConnectionMemoryBudget::new(process.clone());
        assert!(next.reserve(200, CallPriority::Anonymous).is_none());
        assert!(next.reserve(200, CallPriority::Caller).is_some());
    }

    #[test]
    fn the_smallest_limit_lets_everybody_have_one() {
        assert_eq!(CallPriority::Anonymous.share_of(1), 1);
        assert_eq!(CallPriority::RestrictingOperator.share_of(1), 1);
    }
}
