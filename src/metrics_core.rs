//! Counters and histograms that every part may have, and the text in which they are told. What is counted, and under
//! which name it is told, is not known here: see `metrics`.
//!
//! A counter of the hot path is kept several times over, once for each of a few threads: two cores that count at
//! once must not pass one cache line to and fro. Whoever reads adds them up.

mod per_thread;
mod prometheus_text;

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

pub use per_thread::PerThread;
pub use prometheus_text::{MetricKind, MetricsText};

/// Counters in a line: 128 bytes, since processors fetch lines of 64 bytes in pairs.
const COUNTERS_PER_LINE: usize = 16;

#[derive(Default)]
#[repr(align(128))]
struct CounterLine([AtomicU64; COUNTERS_PER_LINE]);

/// A fixed number of counters, each told apart by its place.
pub struct ShardedCounters {
    shards: PerThread<Box<[CounterLine]>>,
    count: usize,
}

impl std::fmt::Debug for ShardedCounters {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ShardedCounters").field("count", &self.count).finish_non_exhaustive()
    }
}

impl ShardedCounters {
    /// So many counters, all 0.
    #[must_use]
    pub fn new(count: usize) -> ShardedCounters {
        let lines = count.div_ceil(COUNTERS_PER_LINE);
        ShardedCounters {
            shards: PerThread::new(|| (0..lines).map(|_| CounterLine::default()).collect()),
            count,
        }
    }

    /// Adds to the counter at this place. One that is none counts nothing.
    pub fn add(&self, at: usize, more: u64) {
        counter(self.shards.local(), at).map(|counter| counter.fetch_add(more, Ordering::Relaxed));
    }

    /// The counter at this place, over all threads.
    #[must_use]
    pub fn get(&self, at: usize) -> u64 {
        let each = self.shards.iter().filter_map(|lines| counter(lines, at));
        each.map(|counter| counter.load(Ordering::Relaxed)).sum()
    }
}

fn counter(lines: &[CounterLine], at: usize) -> Option<&AtomicU64> {
    lines.get(at / COUNTERS_PER_LINE).map(|line| &line.0[at % COUNTERS_PER_LINE])
}

/// Durations, counted in buckets. The bounds are in nanoseconds, rising; what is longer than the last is counted apart.
#[derive(Debug)]
pub struct ShardedHistograms<const BOUNDS: usize> {
    bounds: &'static [u64; BOUNDS],
    counters: ShardedCounters,
}

/// One histogram as it stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HistogramSnapshot {
    /// How many were at most so long, in nanoseconds, and longer than the bound before.
    pub buckets: Vec<(u64, u64)>,
    /// How many were longer.
    pub overflow: u64,
    /// All of them together, in nanoseconds.
    pub sum: u64,
}

impl<const BOUNDS: usize> ShardedHistograms<BOUNDS> {
    /// The buckets, one for what is longer, and the sum.
    const SLOTS_PER_HISTOGRAM: usize = BOUNDS + 2;

    /// So many histograms with the same bounds.
    #[must_use]
    pub fn new(count: usize, bounds: &'static [u64; BOUNDS]) -> Self {
        ShardedHistograms { bounds, counters: ShardedCounters::new(count * Self::SLOTS_PER_HISTOGRAM) }
    }

    /// Notes a duration in the histogram at this place.
    pub fn record(&self, at: usize, took: Duration) {
        let nanos = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        let bucket = self.bounds.iter().position(|bound| nanos <= *bound).unwrap_or(BOUNDS);
        self.counters.add(at * Self::SLOTS_PER_HISTOGRAM + bucket, 1);
        self.counters.add(at * Self::SLOTS_PER_HISTOGRAM + BOUNDS + 1, nanos);
    }

    /// The histogram at this place, over all threads.
    #[must_use]
    pub fn snapshot(&self, at: usize) -> HistogramSnapshot {
        let counter = |of| self.counters.get(at * Self::SLOTS_PER_HISTOGRAM + of);
        let buckets = self.bounds.iter().enumerate().map(|(bucket, bound)| (*bound, counter(bucket)));
        HistogramSnapshot { buckets: buckets.collect(), overflow: counter(BOUNDS), sum: counter(BOUNDS + 1) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_many_threads_count_is_added_up() {
        const THREADS: u64 = 35;
        let counters = ShardedCounters::new(20);
        std::thread::scope(|scope| {
            for _ in 0..THREADS {
                scope.spawn(|| (0..100).for_each(|_| counters.add(19, 2)));
            }
        });
        assert_eq!((counters.get(19), counters.get(0)), (200 * THREADS, 0));
    }

    #[test]
    fn no_two_threads_count_in_one_line() {
        let counters = ShardedCounters::new(1);
        let place = || std::ptr::from_ref(counter(counters.shards.local(), 0).unwrap()) as usize;
        let (here, there) = std::thread::scope(|scope| (place(), scope.spawn(place).join().unwrap()));
        assert!(here.abs_diff(there) >= 128, "{here:x} {there:x}");
    }

    #[test]
    fn a_duration_is_in_the_first_bucket_that_holds_it() {
        let histograms = ShardedHistograms::new(2, &[1_000, 5_000]);
        for nanos in [0, 1_000, 1_001, 5_000, 5_001] {
            histograms.record(1, Duration::from_nanos(nanos));
        }
        let held = HistogramSnapshot { buckets: vec![(1_000, 2), (5_000, 2)], overflow: 1, sum: 12_002 };
        assert_eq!(histograms.snapshot(1), held);
        assert_eq!(histograms.snapshot(0).overflow, 0);
    }
}
