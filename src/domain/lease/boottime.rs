//! Instants of a machine's boot clock. Nothing here reads one.

use std::time::Duration;

/// An instant of this machine's boot clock (`CLOCK_BOOTTIME`, which counts time asleep too), in nanoseconds
/// since the machine started. It means nothing on another machine, so it is never sent or stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Boottime(u64);

impl Boottime {
    /// A deadline that every instant has passed: the one of a replica without a lease.
    pub const PASSED: Boottime = Boottime(0);

    /// A deadline that no instant reaches: the one of an infinite lease.
    pub const FOREVER: Boottime = Boottime(u64::MAX);

    /// From nanoseconds since the machine started.
    #[must_use]
    pub const fn from_nanos(nanos: u64) -> Self {
        Boottime(nanos)
    }

    /// Nanoseconds since the machine started.
    #[must_use]
    pub const fn as_nanos(self) -> u64 {
        self.0
    }

    /// The instant `by` later, at most [`Boottime::FOREVER`].
    #[must_use]
    pub fn plus(self, by: Duration) -> Self {
        Boottime(self.0.saturating_add(nanos(by)))
    }

    /// The instant `by` earlier, at least [`Boottime::PASSED`]. Forever stays forever.
    #[must_use]
    pub fn minus(self, by: Duration) -> Self {
        if self == Boottime::FOREVER { self } else { Boottime(self.0.saturating_sub(nanos(by))) }
    }

    /// How long after `earlier` this is; zero if it is not.
    #[must_use]
    pub const fn since(self, earlier: Boottime) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arithmetic_stops_at_the_ends() {
        let second = Duration::from_secs(1);
        assert_eq!(Boottime::PASSED.minus(second), Boottime::PASSED);
        assert_eq!(Boottime::from_nanos(u64::MAX - 1).plus(second), Boottime::FOREVER);
        assert_eq!(Boottime::FOREVER.minus(second), Boottime::FOREVER);
        assert_eq!(Boottime::from_nanos(5).since(Boottime::from_nanos(7)), Duration::ZERO);
        assert_eq!(Boottime::from_nanos(7).plus(second).since(Boottime::from_nanos(7)), second);
    }
}
