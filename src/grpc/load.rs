//! Limits the calls that wait for a serving thread, and counts the calls of each connection. Each thread has its own
//! counter, so that a Check writes no memory that another core uses. Long-running calls are limited in `permits`.
//!
//! A burst may fill the queue, and so may what came while the thread did not run. A thread that has had no idle moment for
//! two intervals answers fewer calls than come: then no more Checks may wait than it answers within [`TARGET`], and the
//! newest are refused. The times are those of CoDel (RFC 8289).

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::time::Instant;

/// How long a Check may wait while a thread is overloaded.
const TARGET: Duration = Duration::from_millis(5);
/// How long a thread is watched before it is judged.
const INTERVAL: Duration = Duration::from_millis(50);
/// A thread that is idle for less than this part of an interval is overloaded.
const IDLE_PART: u64 = 50;
/// Checks that may wait however slow the thread is: what a few connections have in flight is no overload.
const LEAST: usize = 256;

/// One serving thread's queue: calls that have arrived and have not had their turn. On a cache line of its own.
#[derive(Debug)]
#[repr(align(128))]
pub(super) struct Lane {
    /// Calls over connections without a proven caller, and with one: those cannot have Checks of these refused.
    waiting: [AtomicUsize; 2],
    shed: AtomicU64,
    most: usize,
    /// How many Checks may wait at present.
    limit: AtomicUsize,
    pace: Pace,
}

/// What a thread has done in the current interval. The thread alone writes it; times are nanoseconds since `epoch`.
#[derive(Debug)]
struct Pace {
    epoch: Instant,
    began: AtomicU64,
    parked: AtomicU64,
    idle: AtomicU64,
    turns: AtomicU64,
    /// The interval before had no idle moment either.
    was_busy: AtomicBool,
}

impl Pace {
    fn now(&self) -> u64 {
        u64::try_from(self.epoch.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }
}

impl Lane {
    pub(super) fn new(most: usize) -> Lane {
        let (began, parked, idle, turns, was_busy) = Default::default();
        Lane {
            waiting: Default::default(),
            shed: AtomicU64::new(0),
            most,
            limit: AtomicUsize::new(most),
            pace: Pace { epoch: Instant::now(), began, parked, idle, turns, was_busy },
        }
    }

    /// The thread has nothing to do.
    pub(super) fn park(&self) {
        self.pace.parked.store(self.pace.now(), Ordering::Relaxed);
    }

    /// The thread has something to do again.
    pub(super) fn unpark(&self) {
        let now = self.pace.now();
        let idle = now.saturating_sub(self.pace.parked.load(Ordering::Relaxed));
        self.pace.idle.fetch_add(idle, Ordering::Relaxed);
        self.judge(now);
    }

    /// Judges the thread at the end of an interval. Gives the time, in nanoseconds since the thread's epoch.
    fn look(&self) -> u64 {
        let now = self.pace.now();
        self.judge(now);
        now
    }

    fn judge(&self, now: u64) {
        let pace = &self.pace;
        let elapsed = now.saturating_sub(pace.began.load(Ordering::Relaxed));
        if u128::from(elapsed) < INTERVAL.as_nanos() {
            return;
        }
        let (idle, turns) = (pace.idle.swap(0, Ordering::Relaxed), pace.turns.swap(0, Ordering::Relaxed));
        pace.began.store(now, Ordering::Relaxed);
        let busy = idle < elapsed / IDLE_PART;
        let overloaded = pace.was_busy.swap(busy, Ordering::Relaxed) && busy;
        let limit = if overloaded { limit(self.most, elapsed, turns) } else { self.most };
        self.limit.store(limit, Ordering::Relaxed);
    }

    /// Whether another Check would wait for too long. Connections without a `proven` caller have half as many places.
    fn is_full(&self, proven: bool) -> bool {
        self.waiting_for(proven) >= part(self.limit.load(Ordering::Relaxed), proven)
    }

    fn waiting_for(&self, proven: bool) -> usize {
        self.waiting[usize::from(proven)].load(Ordering::Relaxed)
    }

    /// Sets how many Checks may wait, for good.
    #[cfg(test)]
    pub(super) fn set_limit(&self, limit: usize) {
        self.pace.began.store(u64::MAX, Ordering::Relaxed);
        self.limit.store(limit, Ordering::Relaxed);
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

fn part(limit: usize, proven: bool) -> usize {
    if proven { limit } else { limit.div_ceil(2) }
}

/// How many Checks may wait for an overloaded thread that has begun so many in `elapsed` nanoseconds.
fn limit(most: usize, elapsed: u64, turns: u64) -> usize {
    let in_time = u128::from(turns) * TARGET.as_nanos() / u128::from(elapsed.max(1));
    usize::try_from(in_time).unwrap_or(most).max(LEAST).min(most)
}

/// The queue of a connection's thread, as the connection uses it: calls count from when their headers were read.
#[derive(Clone, Debug)]
pub(super) struct ConnectionQueue(Arc<QueueState>);

#[derive(Debug)]
struct QueueState {
    lane: Arc<Lane>,
    calls: Arc<Calls>,
    proven: Arc<AtomicBool>,
    /// Calls whose headers HTTP/2 has, and that it has not given out: from before the caller was proven, and from after.
    passed: [AtomicUsize; 2],
    /// When bytes were last read, in nanoseconds since the thread's epoch.
    read_at: AtomicU64,
}

impl ConnectionQueue {
    pub(super) fn new(lane: Arc<Lane>, calls: Arc<Calls>, proven: Arc<AtomicBool>) -> ConnectionQueue {
        let (passed, read_at) = Default::default();
        ConnectionQueue(Arc::new(QueueState { lane, calls, proven, passed, read_at }))
    }

    fn is_proven(&self) -> bool {
        self.0.proven.load(Ordering::Relaxed)
    }

    /// Whether the next Check is to be refused.
    pub(super) fn is_full(&self) -> bool {
        self.0.lane.is_full(self.is_proven())
    }

    /// Counts a call that HTTP/2 is given.
    pub(super) fn pass(&self) {
        let class = usize::from(self.is_proven());
        self.0.lane.waiting[class].fetch_add(1, Ordering::Relaxed);
        self.0.passed[class].fetch_add(1, Ordering::Relaxed);
    }

    /// Counts a call that is refused before HTTP/2 is given it.
    pub(super) fn refuse(&self) {
        self.0.lane.turn_away();
        self.0.calls.begin();
    }

    /// Bytes were read.
    pub(super) fn look(&self) {
        self.0.read_at.store(self.0.lane.look(), Ordering::Relaxed);
    }

    /// Takes a call that HTTP/2 gives out: a place in the queue, and whether its headers were seen before.
    fn claim(&self) -> (Turn, bool) {
        let QueueState { lane, passed, read_at, .. } = &*self.0;
        let seen = passed.iter().position(|passed| passed.load(Ordering::Relaxed) > 0);
        let class = seen.unwrap_or_else(|| usize::from(self.is_proven()));
        if seen.is_some() {
            passed[class].fetch_sub(1, Ordering::Relaxed);
        } else {
            lane.waiting[class].fetch_add(1, Ordering::Relaxed);
        }
        let arrived = lane.pace.epoch + Duration::from_nanos(read_at.load(Ordering::Relaxed));
        (Turn { arrived, class, lane: lane.clone() }, seen.is_some())
    }

    /// A place in the queue for a call that HTTP/2 gives out; None when the queue is full.
    pub(super) fn queue(&self, is_check: bool) -> Option<Turn> {
        let (turn, seen) = self.claim();
        let (lane, proven) = (&self.0.lane, self.is_proven());
        let all = lane.waiting_for(false) + lane.waiting_for(true);
        // This one waits, too.
        let late =
            is_check && !seen && lane.waiting_for(proven) > part(lane.limit.load(Ordering::Relaxed), proven);
        if !late && all <= part(lane.most, proven) {
            return Some(turn);
        }
        lane.turn_away();
        None
    }

    /// Turns a call away although the queue may have room.
    pub(super) fn turn_away(&self) {
        drop(self.claim());
        self.0.lane.turn_away();
    }

    /// Forgets the calls that HTTP/2 has refused by itself. It gives out every other one before it waits.
    pub(super) fn settle(&self) {
        for (passed, waiting) in self.0.passed.iter().zip(&self.0.lane.waiting) {
            waiting.fetch_sub(passed.swap(0, Ordering::Relaxed), Ordering::Relaxed);
        }
    }
}

impl Drop for QueueState {
    fn drop(&mut self) {
        for (passed, waiting) in self.passed.iter_mut().zip(&self.lane.waiting) {
            waiting.fetch_sub(*passed.get_mut(), Ordering::Relaxed);
        }
    }
}

/// A place in a thread's queue, until the call's turn has come.
#[derive(Debug)]
pub(super) struct Turn {
    lane: Arc<Lane>,
    class: usize,
    arrived: Instant,
}

impl Turn {
    /// The call's turn has come. Gives when it arrived.
    pub(super) fn begin(self) -> Instant {
        self.lane.pace.turns.fetch_add(1, Ordering::Relaxed);
        self.arrived
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.lane.waiting[self.class].fetch_sub(1, Ordering::Relaxed);
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

    const MOST: usize = 4096;
    const SECOND: u64 = 1_000_000_000;

    fn queue(most: usize, proven: bool) -> ConnectionQueue {
        let proven = Arc::new(AtomicBool::new(proven));
        ConnectionQueue::new(Arc::new(Lane::new(most)), Arc::default(), proven)
    }

    #[test]
    fn a_full_queue_turns_calls_away_until_a_turn_has_come() {
        let queue = queue(2, true);
        let (first, _second) = (queue.queue(false), queue.queue(true));
        assert!(first.is_some() && queue.is_full() && queue.queue(false).is_none());
        assert_eq!(queue.0.lane.shed(), 1);
        drop(first);
        assert!(!queue.is_full() && queue.queue(false).is_some());
    }

    #[test]
    fn calls_without_a_credential_leave_half_of_a_queue_to_callers() {
        let queue = queue(4, false);
        let anonymous = [false; 3].map(|check| queue.queue(check));
        assert!(anonymous[1].is_some() && anonymous[2].is_none());
        queue.0.proven.store(true, Ordering::Relaxed);
        let _callers = [true; 2].map(|check| queue.queue(check).unwrap());
        assert!(queue.queue(true).is_none());
    }

    #[test]
    fn a_call_counts_from_its_headers_and_once() {
        let queue = queue(2, true);
        queue.pass();
        queue.pass();
        assert!(queue.is_full(), "both wait within HTTP/2");
        let turns = [true; 2].map(|check| queue.queue(check));
        assert!(turns.iter().all(Option::is_some) && queue.is_full());
        drop(turns);
        queue.pass();
        queue.settle();
        assert_eq!(queue.0.lane.waiting_for(true), 0, "HTTP/2 has refused it");
    }

    #[test]
    fn calls_without_a_credential_have_no_check_of_a_caller_refused() {
        let lane = Arc::new(Lane::new(MOST));
        lane.set_limit(4);
        let queue =
            |proven| ConnectionQueue::new(lane.clone(), Arc::default(), Arc::new(AtomicBool::new(proven)));
        let (stranger, caller) = (queue(false), queue(true));
        let _held: Vec<_> = (0..100).map(|_| stranger.queue(false).unwrap()).collect();
        assert!(stranger.is_full() && stranger.queue(true).is_none());
        let _checks: Vec<_> = (0..4).map(|_| caller.queue(true).unwrap()).collect();
        assert!(caller.is_full() && caller.queue(true).is_none());
        assert!(caller.queue(false).is_some(), "what is no Check has the whole queue");
    }

    #[test]
    fn a_thread_without_an_idle_moment_queues_what_it_answers_in_time() {
        assert_eq!(limit(MOST, SECOND, 200_000), 1000, "5 ms of its work");
        assert_eq!(limit(MOST, SECOND, 2_000_000), MOST, "never more than it may");
        assert_eq!(limit(MOST, SECOND, 10), LEAST, "few connections are no overload");
        assert_eq!(limit(100, SECOND, 200_000), 100);
    }

    #[test]
    fn a_thread_is_overloaded_once_it_has_had_no_idle_moment_for_two_intervals() {
        let lane = Lane::new(MOST);
        let interval = |at: u64, idle: u64| {
            lane.pace.idle.store(idle, Ordering::Relaxed);
            lane.judge(at * 50_000_000);
            lane.limit.load(Ordering::Relaxed)
        };
        assert_eq!(
            [interval(1, 0), interval(2, 0)],
            [MOST, LEAST],
            "one may be a burst, or a thread that did not run"
        );
        assert_eq!(interval(3, 1_000_000), MOST, "the queue was empty for a moment");
        assert_eq!([interval(4, 0), interval(5, 2_000_000), interval(6, 0)], [MOST; 3]);
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
