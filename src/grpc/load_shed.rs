//! Limits the calls that wait for a serving thread, and counts the calls of each connection.
//!
//! Each thread has its own counter, so that a Check writes no memory that another core uses. Long-running
//! calls are limited in `concurrency.rs`.
//!
//! A burst may fill the queue, and so may calls that arrive while the thread does not run. A thread without an idle
//! moment for two intervals is overloaded: then only as many Checks may wait as it can answer within [`TARGET_DELAY`],
//! and the newest are refused. The times are those of CoDel (RFC 8289).

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::time::Instant;

/// How long a Check may wait on an overloaded thread.
const TARGET_DELAY: Duration = Duration::from_millis(5);
/// Interval over which a thread's load is measured.
const OBSERVATION_INTERVAL: Duration = Duration::from_millis(50);
/// A thread is overloaded if it is idle for less than this part of an interval.
const IDLE_DIVISOR: u64 = 50;
/// Checks that may always wait: what a few connections have in flight is no overload.
const MIN_QUEUE_LIMIT: usize = 256;

/// The queue of one serving thread: calls that have arrived but not started. Aligned, so that no two share a cache line.
#[derive(Debug)]
#[repr(align(128))]
pub(super) struct WorkerQueue {
    /// Waiting calls on connections without, and with, a proven caller. The former cannot crowd
    /// out Checks of the latter.
    waiting: [AtomicUsize; 2],
    shed_calls: AtomicU64,
    capacity: usize,
    /// How many Checks may wait now.
    limit: AtomicUsize,
    load: WorkerLoad,
}

/// A thread's activity in the current interval. Only the thread writes it. Times are nanoseconds since `epoch`.
#[derive(Debug)]
struct WorkerLoad {
    epoch: Instant,
    interval_started: AtomicU64,
    parked_at: AtomicU64,
    idle_nanos: AtomicU64,
    started_calls: AtomicU64,
    /// Whether the previous interval had no idle moment either.
    was_busy: AtomicBool,
}

impl WorkerLoad {
    fn elapsed_nanos(&self) -> u64 {
        u64::try_from(self.epoch.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }
}

impl WorkerQueue {
    pub(super) fn new(capacity: usize) -> WorkerQueue {
        WorkerQueue {
            waiting: Default::default(),
            shed_calls: AtomicU64::new(0),
            capacity,
            limit: AtomicUsize::new(capacity),
            load: WorkerLoad {
                epoch: Instant::now(),
                interval_started: AtomicU64::new(0),
                parked_at: AtomicU64::new(0),
                idle_nanos: AtomicU64::new(0),
                started_calls: AtomicU64::new(0),
                was_busy: AtomicBool::new(false),
            },
        }
    }

    /// Called when the thread becomes idle.
    pub(super) fn on_park(&self) {
        self.load.parked_at.store(self.load.elapsed_nanos(), Ordering::Relaxed);
    }

    /// Called when the thread has work again.
    pub(super) fn on_unpark(&self) {
        let now = self.load.elapsed_nanos();
        let idle = now.saturating_sub(self.load.parked_at.load(Ordering::Relaxed));
        self.load.idle_nanos.fetch_add(idle, Ordering::Relaxed);
        self.update_limit(now);
    }

    /// Updates the limit at the end of an interval. Returns the time in nanoseconds since the thread's epoch.
    fn refresh_limit(&self) -> u64 {
        let now = self.load.elapsed_nanos();
        self.update_limit(now);
        now
    }

    fn update_limit(&self, now: u64) {
        let load = &self.load;
        let elapsed = now.saturating_sub(load.interval_started.load(Ordering::Relaxed));
        if u128::from(elapsed) < OBSERVATION_INTERVAL.as_nanos() {
            return;
        }
        let (idle, started_calls) =
            (load.idle_nanos.swap(0, Ordering::Relaxed), load.started_calls.swap(0, Ordering::Relaxed));
        load.interval_started.store(now, Ordering::Relaxed);
        let busy = idle < elapsed / IDLE_DIVISOR;
        let overloaded = load.was_busy.swap(busy, Ordering::Relaxed) && busy;
        let limit =
            if overloaded { overload_limit(self.capacity, elapsed, started_calls) } else { self.capacity };
        self.limit.store(limit, Ordering::Relaxed);
    }

    /// Whether another Check would wait too long. Connections without a proven caller have half the limit.
    fn is_full(&self, has_proven_caller: bool) -> bool {
        self.waiting_calls(has_proven_caller)
            >= class_limit(self.limit.load(Ordering::Relaxed), has_proven_caller)
    }

    fn waiting_calls(&self, has_proven_caller: bool) -> usize {
        self.waiting[usize::from(has_proven_caller)].load(Ordering::Relaxed)
    }

    /// Fixes how many Checks may wait.
    #[cfg(test)]
    pub(super) fn set_limit(&self, limit: usize) {
        self.load.interval_started.store(u64::MAX, Ordering::Relaxed);
        self.limit.store(limit, Ordering::Relaxed);
    }

    pub(super) fn count_shed(&self) {
        self.shed_calls.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn shed_calls(&self) -> u64 {
        self.shed_calls.load(Ordering::Relaxed)
    }
}

fn class_limit(limit: usize, has_proven_caller: bool) -> usize {
    if has_proven_caller { limit } else { limit.div_ceil(2) }
}

/// How many Checks an overloaded thread may queue, given that it started `started_calls` in `elapsed` nanoseconds.
fn overload_limit(capacity: usize, elapsed: u64, started_calls: u64) -> usize {
    let in_time = u128::from(started_calls) * TARGET_DELAY.as_nanos() / u128::from(elapsed.max(1));
    usize::try_from(in_time).unwrap_or(capacity).max(MIN_QUEUE_LIMIT).min(capacity)
}

/// A connection's view of its thread's queue. Calls count from when their headers were read.
#[derive(Clone, Debug)]
pub(super) struct ConnectionQueue(Arc<ConnectionQueueState>);

#[derive(Debug)]
struct ConnectionQueueState {
    queue: Arc<WorkerQueue>,
    calls: Arc<ConnectionCalls>,
    has_proven_caller: Arc<AtomicBool>,
    /// Calls whose headers HTTP/2 has but has not delivered: from before the caller was proven, and from after.
    passed_calls: [AtomicUsize; 2],
    /// When bytes were last read, in nanoseconds since the thread's epoch.
    read_at: AtomicU64,
}

impl ConnectionQueue {
    pub(super) fn new(
        queue: Arc<WorkerQueue>,
        calls: Arc<ConnectionCalls>,
        has_proven_caller: Arc<AtomicBool>,
    ) -> ConnectionQueue {
        ConnectionQueue(Arc::new(ConnectionQueueState {
            queue,
            calls,
            has_proven_caller,
            passed_calls: Default::default(),
            read_at: AtomicU64::new(0),
        }))
    }

    fn has_proven_caller(&self) -> bool {
        self.0.has_proven_caller.load(Ordering::Relaxed)
    }

    /// Whether the next Check must be refused.
    pub(super) fn is_full(&self) -> bool {
        self.0.queue.is_full(self.has_proven_caller())
    }

    /// Counts a call that is passed to HTTP/2.
    pub(super) fn count_passed(&self) {
        let class = usize::from(self.has_proven_caller());
        self.0.queue.waiting[class].fetch_add(1, Ordering::Relaxed);
        self.0.passed_calls[class].fetch_add(1, Ordering::Relaxed);
    }

    /// Counts a call that is refused before HTTP/2 sees it.
    pub(super) fn count_refused(&self) {
        self.0.queue.count_shed();
        self.0.calls.track_call();
    }

    /// Records the time of a read.
    pub(super) fn mark_read(&self) {
        self.0.read_at.store(self.0.queue.refresh_limit(), Ordering::Relaxed);
    }

    /// Takes a slot for a call that HTTP/2 delivers. Also returns whether its headers were counted before.
    fn claim_slot(&self) -> (QueueSlot, bool) {
        let ConnectionQueueState { queue, passed_calls, read_at, .. } = &*self.0;
        let seen = passed_calls.iter().position(|passed_calls| passed_calls.load(Ordering::Relaxed) > 0);
        let class = seen.unwrap_or_else(|| usize::from(self.has_proven_caller()));
        if seen.is_some() {
            passed_calls[class].fetch_sub(1, Ordering::Relaxed);
        } else {
            queue.waiting[class].fetch_add(1, Ordering::Relaxed);
        }
        let arrived = queue.load.epoch + Duration::from_nanos(read_at.load(Ordering::Relaxed));
        (QueueSlot { arrived_at: arrived, caller_class: class, queue: queue.clone() }, seen.is_some())
    }

    /// Takes a slot for a call that HTTP/2 delivers; `None` if the queue is full.
    pub(super) fn try_enqueue(&self, is_check: bool) -> Option<QueueSlot> {
        let (slot, seen) = self.claim_slot();
        let (queue, has_proven_caller) = (&self.0.queue, self.has_proven_caller());
        let waiting = queue.waiting_calls(false) + queue.waiting_calls(true);
        // The count includes this call.
        let is_late = is_check
            && !seen
            && queue.waiting_calls(has_proven_caller)
                > class_limit(queue.limit.load(Ordering::Relaxed), has_proven_caller);
        if !is_late && waiting <= class_limit(queue.capacity, has_proven_caller) {
            return Some(slot);
        }
        queue.count_shed();
        None
    }

    /// Refuses a call even if the queue has space.
    pub(super) fn reject(&self) {
        drop(self.claim_slot());
        self.0.queue.count_shed();
    }

    /// Forgets calls that HTTP/2 itself refused. It delivers all others before it waits.
    pub(super) fn forget_undelivered(&self) {
        for (passed_calls, waiting) in self.0.passed_calls.iter().zip(&self.0.queue.waiting) {
            waiting.fetch_sub(passed_calls.swap(0, Ordering::Relaxed), Ordering::Relaxed);
        }
    }
}

impl Drop for ConnectionQueueState {
    fn drop(&mut self) {
        for (passed_calls, waiting) in self.passed_calls.iter_mut().zip(&self.queue.waiting) {
            waiting.fetch_sub(*passed_calls.get_mut(), Ordering::Relaxed);
        }
    }
}

/// A slot in a thread's queue, held until the call starts.
#[derive(Debug)]
pub(super) struct QueueSlot {
    queue: Arc<WorkerQueue>,
    caller_class: usize,
    arrived_at: Instant,
}

impl QueueSlot {
    /// Starts the call. Returns when it arrived.
    pub(super) fn start_call(self) -> Instant {
        self.queue.load.started_calls.fetch_add(1, Ordering::Relaxed);
        self.arrived_at
    }
}

impl Drop for QueueSlot {
    fn drop(&mut self) {
        self.queue.waiting[self.caller_class].fetch_sub(1, Ordering::Relaxed);
    }
}

/// Open and total calls of one connection.
#[derive(Debug, Default)]
pub(super) struct ConnectionCalls {
    open: AtomicUsize,
    total: AtomicU64,
}

impl ConnectionCalls {
    /// Counts a call as open until the guard is dropped.
    pub(super) fn track_call(self: &Arc<Self>) -> OpenCallGuard {
        self.open.fetch_add(1, Ordering::Relaxed);
        self.total.fetch_add(1, Ordering::Relaxed);
        OpenCallGuard(self.clone())
    }

    /// Total number of calls, if none is open.
    pub(super) fn total_if_idle(&self) -> Option<u64> {
        (self.open.load(Ordering::Relaxed) == 0).then(|| self.total.load(Ordering::Relaxed))
    }
}

/// Keeps a call counted as open.
#[derive(Debug)]
pub(super) struct OpenCallGuard(Arc<ConnectionCalls>);

impl Drop for OpenCallGuard {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CAPACITY: usize = 4096;
    const SECOND: u64 = 1_000_000_000;

    fn queue(most: usize, proven: bool) -> ConnectionQueue {
        let proven = Arc::new(AtomicBool::new(proven));
        ConnectionQueue::new(Arc::new(WorkerQueue::new(most)), Arc::default(), proven)
    }

    #[test]
    fn a_full_queue_turns_calls_away_until_a_turn_has_come() {
        let queue = queue(2, true);
        let (first, _second) = (queue.try_enqueue(false), queue.try_enqueue(true));
        assert!(first.is_some() && queue.is_full() && queue.try_enqueue(false).is_none());
        assert_eq!(queue.0.queue.shed_calls(), 1);
        drop(first);
        assert!(!queue.is_full() && queue.try_enqueue(false).is_some());
    }

    #[test]
    fn calls_without_a_credential_leave_half_of_a_queue_to_callers() {
        let queue = queue(4, false);
        let anonymous = [false; 3].map(|check| queue.try_enqueue(check));
        assert!(anonymous[1].is_some() && anonymous[2].is_none());
        queue.0.has_proven_caller.store(true, Ordering::Relaxed);
        let _callers = [true; 2].map(|check| queue.try_enqueue(check).unwrap());
        assert!(queue.try_enqueue(true).is_none());
    }

    #[test]
    fn a_call_counts_from_its_headers_and_once() {
        let queue = queue(2, true);
        queue.count_passed();
        queue.count_passed();
        assert!(queue.is_full(), "both wait within HTTP/2");
        let slots = [true; 2].map(|check| queue.try_enqueue(check));
        assert!(slots.iter().all(Option::is_some) && queue.is_full());
        drop(slots);
        queue.count_passed();
        queue.forget_undelivered();
        assert_eq!(queue.0.queue.waiting_calls(true), 0, "HTTP/2 has refused it");
    }

    #[test]
    fn calls_without_a_credential_have_no_check_of_a_caller_refused() {
        let worker_queue = Arc::new(WorkerQueue::new(CAPACITY));
        worker_queue.set_limit(4);
        let queue = |proven| {
            ConnectionQueue::new(worker_queue.clone(), Arc::default(), Arc::new(AtomicBool::new(proven)))
        };
        let (stranger, caller) = (queue(false), queue(true));
        let _held: Vec<_> = (0..100).map(|_| stranger.try_enqueue(false).unwrap()).collect();
        assert!(stranger.is_full() && stranger.try_enqueue(true).is_none());
        let _checks: Vec<_> = (0..4).map(|_| caller.try_enqueue(true).unwrap()).collect();
        assert!(caller.is_full() && caller.try_enqueue(true).is_none());
        assert!(caller.try_enqueue(false).is_some(), "what is no Check has the whole queue");
    }

    #[test]
    fn a_thread_without_an_idle_moment_queues_what_it_answers_in_time() {
        assert_eq!(overload_limit(CAPACITY, SECOND, 200_000), 1000, "5 ms of its work");
        assert_eq!(overload_limit(CAPACITY, SECOND, 2_000_000), CAPACITY, "never more than it may");
        assert_eq!(overload_limit(CAPACITY, SECOND, 10), MIN_QUEUE_LIMIT, "few connections are no overload");
        assert_eq!(overload_limit(100, SECOND, 200_000), 100);
    }

    #[test]
    fn a_thread_is_overloaded_once_it_has_had_no_idle_moment_for_two_intervals() {
        let worker_queue = WorkerQueue::new(CAPACITY);
        let interval = |at: u64, idle: u64| {
            worker_queue.load.idle_nanos.store(idle, Ordering::Relaxed);
            worker_queue.update_limit(at * 50_000_000);
            worker_queue.limit.load(Ordering::Relaxed)
        };
        assert_eq!(
            [interval(1, 0), interval(2, 0)],
            [CAPACITY, MIN_QUEUE_LIMIT],
            "one may be a burst, or a thread that did not run"
        );
        assert_eq!(interval(3, 1_000_000), CAPACITY, "the queue was empty for a moment");
        assert_eq!([interval(4, 0), interval(5, 2_000_000), interval(6, 0)], [CAPACITY; 3]);
    }

    #[test]
    fn a_connection_is_idle_while_no_call_is_open() {
        let calls = Arc::new(ConnectionCalls::default());
        assert_eq!(calls.total_if_idle(), Some(0));
        let call = calls.track_call();
        assert_eq!(calls.total_if_idle(), None);
        drop(call);
        assert_eq!(calls.total_if_idle(), Some(1));
    }
}
