//! Values that are sharded by thread, each in its own cache line.

use std::{
    cell::Cell,
    fmt,
    sync::atomic::{AtomicUsize, Ordering},
};

/// Number of shards; more threads than this share shards.
const SHARDS: usize = 32;

/// Aligned to 128 bytes, because processors fetch lines of 64 bytes in pairs.
#[derive(Default)]
#[repr(align(128))]
struct CacheAligned<T>(T);

/// A `T` for each of a few threads, so that cores that write do not contend for a cache line.
pub(crate) struct PerThread<T>(Box<[CacheAligned<T>]>);

impl<T> fmt::Debug for PerThread<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PerThread").finish_non_exhaustive()
    }
}

impl<T: Default> Default for PerThread<T> {
    fn default() -> Self {
        PerThread::new(T::default)
    }
}

impl<T> PerThread<T> {
    /// Creates the value of each shard with `make`.
    #[must_use]
    pub(crate) fn new(mut make: impl FnMut() -> T) -> Self {
        PerThread((0..SHARDS).map(|_| CacheAligned(make())).collect())
    }

    /// The shard of the calling thread.
    #[must_use]
    pub(crate) fn local(&self) -> &T {
        &self.0[thread_index() % SHARDS].0
    }

    /// All shards.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &T> {
        self.0.iter().map(|line| &line.0)
    }
}

/// The index of the calling thread; the first thread that asks is 0.
fn thread_index() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    thread_local! {
        static NUMBER: Cell<Option<usize>> = const { Cell::new(None) };
    }
    NUMBER.with(|number| {
        number.get().unwrap_or_else(|| {
            let next = NEXT.fetch_add(1, Ordering::Relaxed);
            number.set(Some(next));
            next
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_threads_have_theirs_in_one_line() {
        let numbers = PerThread::<u64>::default();
        let address = || std::ptr::from_ref(numbers.local()) as usize;
        let (here, there) = std::thread::scope(|scope| (address(), scope.spawn(address).join().unwrap()));
        assert!(here.abs_diff(there) >= 128, "{here:x} {there:x}");
    }
}
