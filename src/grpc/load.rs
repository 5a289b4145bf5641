//! Limits the calls that wait for a serving thread, and counts the calls of each connection. Each thread has its own
//! counter, so that a Check writes no memory that another core uses. Long-running calls are limited in `permits`.

use std::sync::{
    Arc,
    atomic::{AtomicU64, AtomicUsize, Ordering},
};

/// One serving thread's queue: calls that have arrived and have not had their turn. On a cache line of its own.
#[derive(Debug)]
#[repr(align(128))]
pub(super) struct Lane {
    waiting: AtomicUsize,
    shed: AtomicU64,
    most: usize,
}

impl Lane {
    pub(super) fn new(most: usize) -> Lane {
        Lane { waiting: AtomicUsize::new(0), shed: AtomicU64::new(0), most }
    }

    /// A place in the queue; None when it is full. Half is kept for connections over which a caller was `proven`.
    pub(super) fn queue(self: &Arc<Self>, proven: bool) -> Option<Turn> {
        let most = if proven { self.most } else { self.most.div_ceil(2) };
        if self.waiting.fetch_add(1, Ordering::Relaxed) < most {
            return Some(Turn(self.clone()));
        }
        self.waiting.fetch_sub(1, Ordering::Relaxed);
        self.turn_away();
        None
    }

    /// Counts a call that is turned away.
    pub(super) fn turn_away(&self) {
        self.shed.fetch_add(1, Ordering::Relaxed);
    }

    /// Calls that were turned away.
    pub(super) fn shed(&self) -> u64 {
        self.shed.load(Ordering::Relaxed)
    }
}

/// A place in a thread's queue, until the call's turn has come.
#[derive(Debug)]
pub(super) struct Turn(Arc<Lane>);

impl Drop for Turn {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The calls of one connection.
#[derive(Debug, Default)]
pub(super) struct Calls {
    open: AtomicUsize,
    ever: AtomicU64,
}

impl Calls {
    /// Counts a call until the guard is dropped.
    pub(super) fn begin(self: &Arc<Self>) -> Call {
        self.open.fetch_add(1, Ordering::Relaxed);
        self.ever.fetch_add(1, Ordering::Relaxed);
        Call(self.clone())
    }

    /// How many there have been, while none is open.
    pub(super) fn idle_after(&self) -> Option<u64> {
        (self.open.load(Ordering::Relaxed) == 0).then(|| self.ever.load(Ordering::Relaxed))
    }
}

/// A call that is counted.
#[derive(Debug)]
pub(super) struct Call(Arc<Calls>);

impl Drop for Call {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_queue_turns_calls_away_until_a_turn_has_come() {
        let lane = Arc::new(Lane::new(2));
        let (first, _second) = (lane.queue(true), lane.queue(true));
        assert!(first.is_some() && lane.queue(true).is_none());
        assert_eq!(lane.shed(), 1);
        drop(first);
        assert!(lane.queue(true).is_some());
    }

    #[test]
    fn calls_without_a_credential_leave_half_of_a_queue_to_callers() {
        let lane = Arc::new(Lane::new(4));
        let anonymous = [false; 3].map(|proven| lane.queue(proven));
        assert!(anonymous[1].is_some() && anonymous[2].is_none());
        let _callers = [true; 2].map(|proven| lane.queue(proven).unwrap());
        assert!(lane.queue(true).is_none());
    }

    #[test]
    fn a_connection_is_idle_while_no_call_is_open() {
        let calls = Arc::new(Calls::default());
        assert_eq!(calls.idle_after(), Some(0));
        let call = calls.begin();
        assert_eq!(calls.idle_after(), None);
        drop(call);
        assert_eq!(calls.idle_after(), Some(1));
    }
}
