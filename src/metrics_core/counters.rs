//! Counters that are sharded by thread, so that counting cores do not contend for a cache line.

use std::sync::atomic::{AtomicU64, Ordering};

use super::per_thread::PerThread;

/// Counters in a shard's line of 128 bytes; processors fetch lines of 64 bytes in pairs.
const COUNTERS_PER_LINE: usize = 16;

#[derive(Default)]
#[repr(align(128))]
struct CounterLine([AtomicU64; COUNTERS_PER_LINE]);

/// A fixed number of counters, addressed by index.
pub(crate) struct ShardedCounters {
    shards: PerThread<Box<[CounterLine]>>,
    count: usize,
}

impl std::fmt::Debug for ShardedCounters {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ShardedCounters").field("count", &self.count).finish_non_exhaustive()
    }
}

impl ShardedCounters {
    /// Creates `count` counters, all 0.
    #[must_use]
    pub(crate) fn new(count: usize) -> ShardedCounters {
        let lines = count.div_ceil(COUNTERS_PER_LINE);
        ShardedCounters {
            shards: PerThread::new(|| (0..lines).map(|_| CounterLine::default()).collect()),
            count,
        }
    }

    /// Adds to the counter at an index. An index out of range is ignored.
    pub(crate) fn add(&self, at: usize, more: u64) {
        counter(self.shards.local(), at).map(|counter| counter.fetch_add(more, Ordering::Relaxed));
    }

    /// Returns the counter at an index, summed over all threads.
    #[must_use]
    pub(crate) fn get(&self, at: usize) -> u64 {
        let each = self.shards.iter().filter_map(|lines| counter(lines, at));
        each.map(|counter| counter.load(Ordering::Relaxed)).sum()
    }
}

fn counter(lines: &[CounterLine], at: usize) -> Option<&AtomicU64> {
    lines.get(at / COUNTERS_PER_LINE).map(|line| &line.0[at % COUNTERS_PER_LINE])
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
        let address = || std::ptr::from_ref(counter(counters.shards.local(), 0).unwrap()) as usize;
        let (here, there) = std::thread::scope(|scope| (address(), scope.spawn(address).join().unwrap()));
        assert!(here.abs_diff(there) >= 128, "{here:x} {there:x}");
    }
}
