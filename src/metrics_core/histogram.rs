//! Histograms of durations, sharded by thread as the counters are.

use std::time::Duration;

use super::counters::ShardedCounters;

/// Histograms of durations with the same bucket bounds: nanoseconds, ascending. Longer durations are counted as
/// overflow.
#[derive(Debug)]
pub(crate) struct ShardedHistograms<const BOUNDS: usize> {
    bounds: &'static [u64; BOUNDS],
    counters: ShardedCounters,
}

/// The values of one histogram.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HistogramSnapshot {
    /// Per bucket: its upper bound in nanoseconds, and the count above the previous bound.
    pub(crate) buckets: Vec<(u64, u64)>,
    /// Number of durations above the last bound.
    pub(crate) overflow: u64,
    /// Sum of all durations, in nanoseconds.
    pub(crate) sum: u64,
}

impl<const BOUNDS: usize> ShardedHistograms<BOUNDS> {
    /// The buckets, the overflow and the sum.
    const SLOTS_PER_HISTOGRAM: usize = BOUNDS + 2;

    /// Creates `count` histograms with the same bounds.
    #[must_use]
    pub(crate) fn new(count: usize, bounds: &'static [u64; BOUNDS]) -> Self {
        ShardedHistograms { bounds, counters: ShardedCounters::new(count * Self::SLOTS_PER_HISTOGRAM) }
    }

    /// Records a duration in the histogram at an index.
    pub(crate) fn record(&self, at: usize, duration: Duration) {
        let nanos = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        let bucket = self.bounds.iter().position(|bound| nanos <= *bound).unwrap_or(BOUNDS);
        self.counters.add(at * Self::SLOTS_PER_HISTOGRAM + bucket, 1);
        self.counters.add(at * Self::SLOTS_PER_HISTOGRAM + BOUNDS + 1, nanos);
    }

    /// Returns the histogram at an index, summed over all threads.
    #[must_use]
    pub(crate) fn snapshot(&self, at: usize) -> HistogramSnapshot {
        let counter = |of| self.counters.get(at * Self::SLOTS_PER_HISTOGRAM + of);
        let buckets = self.bounds.iter().enumerate().map(|(bucket, bound)| (*bound, counter(bucket)));
        HistogramSnapshot { buckets: buckets.collect(), overflow: counter(BOUNDS), sum: counter(BOUNDS + 1) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
