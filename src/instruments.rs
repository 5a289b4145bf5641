//! Counters and histograms that every part may have, and the text in which they are told. What is counted, and under
//! which name it is told, is not known here: see `metrics`.
//!
//! A counter of the hot path is kept several times over, once for each of a few threads: two cores that count at
//! once must not pass one cache line to and fro. Whoever reads adds them up.

mod apart;
mod text;

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

pub use apart::Apart;
pub use text::{Kind, Text};

/// Counters in a line: 128 bytes, since processors fetch lines of 64 bytes in pairs.
const IN_LINE: usize = 16;

#[derive(Default)]
#[repr(align(128))]
struct Line([AtomicU64; IN_LINE]);

/// A fixed number of counters, each told apart by its place.
pub struct Counters {
    shards: Apart<Box<[Line]>>,
    count: usize,
}

impl std::fmt::Debug for Counters {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Counters").field("count", &self.count).finish_non_exhaustive()
    }
}

impl Counters {
    /// So many counters, all 0.
    #[must_use]
    pub fn new(count: usize) -> Counters {
        let lines = count.div_ceil(IN_LINE);
        Counters { shards: Apart::new(|| (0..lines).map(|_| Line::default()).collect()), count }
    }

    /// Adds to the counter at this place. One that is none counts nothing.
    pub fn add(&self, at: usize, more: u64) {
        counter(self.shards.mine(), at).map(|counter| counter.fetch_add(more, Ordering::Relaxed));
    }

    /// The counter at this place, over all threads.
    #[must_use]
    pub fn get(&self, at: usize) -> u64 {
        let each = self.shards.each().filter_map(|lines| counter(lines, at));
        each.map(|counter| counter.load(Ordering::Relaxed)).sum()
    }
}

fn counter(lines: &[Line], at: usize) -> Option<&AtomicU64> {
    lines.get(at / IN_LINE).map(|line| &line.0[at % IN_LINE])
}

/// Durations, counted in buckets. The bounds are in nanoseconds, rising; what is longer than the last is counted apart.
#[derive(Debug)]
pub struct Histograms<const BOUNDS: usize> {
    bounds: &'static [u64; BOUNDS],
    counters: Counters,
}

/// One histogram as it stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Distribution {
    /// How many were at most so long, in nanoseconds, and longer than the bound before.
    pub buckets: Vec<(u64, u64)>,
    /// How many were longer.
    pub longer: u64,
    /// All of them together, in nanoseconds.
    pub sum: u64,
}

impl<const BOUNDS: usize> Histograms<BOUNDS> {
    /// The buckets, one for what is longer, and the sum.
    const EACH: usize = BOUNDS + 2;

    /// So many histograms with the same bounds.
    #[must_use]
    pub fn new(count: usize, bounds: &'static [u64; BOUNDS]) -> Self {
        Histograms { bounds, counters: Counters::new(count * Self::EACH) }
    }

    /// Notes a duration in the histogram at this place.
    pub fn note(&self, at: usize, took: Duration) {
        let nanos = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        let bucket = self.bounds.iter().position(|bound| nanos <= *bound).unwrap_or(BOUNDS);
        self.counters.add(at * Self::EACH + bucket, 1);
        self.counters.add(at * Self::EACH + BOUNDS + 1, nanos);
    }

    /// The histogram at this place, over all threads.
    #[must_use]
    pub fn get(&self, at: usize) -> Distribution {
        let counter = |of| self.counters.get(at * Self::EACH + of);
        let buckets = self.bounds.iter().enumerate().map(|(bucket, bound)| (*bound, counter(bucket)));
        Distribution { buckets: buckets.collect(), longer: counter(BOUNDS), sum: counter(BOUNDS + 1) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_many_threads_count_is_added_up() {
        const THREADS: u64 = 35;
        let counters = Counters::new(20);
        std::thread::scope(|scope| {
            for _ in 0..THREADS {
                scope.spawn(|| (0..100).for_each(|_| counters.add(19, 2)));
            }
        });
        assert_eq!((counters.get(19), counters.get(0)), (200 * THREADS, 0));
    }

    #[test]
    fn no_two_threads_count_in_one_line() {
        let counters = Counters::new(1);
        let place = || std::ptr::from_ref(counter(counters.shards.mine(), 0).unwrap()) as usize;
        let (here, there) = std::thread::scope(|scope| (place(), scope.spawn(place).join().unwrap()));
        assert!(here.abs_diff(there) >= 128, "{here:x} {there:x}");
    }

    #[test]
    fn a_duration_is_in_the_first_bucket_that_holds_it() {
        let histograms = Histograms::new(2, &[1_000, 5_000]);
        for nanos in [0, 1_000, 1_001, 5_000, 5_001] {
            histograms.note(1, Duration::from_nanos(nanos));
        }
        let held = Distribution { buckets: vec![(1_000, 2), (5_000, 2)], longer: 1, sum: 12_002 };
        assert_eq!(histograms.get(1), held);
        assert_eq!(histograms.get(0).longer, 0);
    }
}
