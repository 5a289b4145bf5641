//! Instants of a machine's boot clock. `clock` reads the clock itself.

use std::time::Duration;

/// An instant of this machine's boot clock (`CLOCK_BOOTTIME`, which counts time asleep too), in nanoseconds
/// since the machine started. It means nothing on another machine, so it is never sent or stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BootInstant(u64);

impl BootInstant {
    /// A deadline that every instant has passed: the one of a replica without a lease.
    pub const EXPIRED: BootInstant = BootInstant(0);

    /// A deadline that no instant reaches: the one of an infinite lease.
    pub const FOREVER: BootInstant = BootInstant(u64::MAX);

    /// From nanoseconds since the machine started.
    #[must_use]
    pub const fn from_nanos(nanos: u64) -> Self {
        BootInstant(nanos)
    }

    /// Nanoseconds since the machine started.
    #[must_use]
    pub const fn as_nanos(self) -> u64 {
        self.0
    }

    /// The instant `by` later, at most [`BootInstant::FOREVER`].
    #[must_use]
    pub fn saturating_add(self, by: Duration) -> Self {
        BootInstant(self.0.saturating_add(saturating_nanos(by)))
    }

    /// The instant `by` earlier, at least [`BootInstant::EXPIRED`]. Forever stays forever.
    #[must_use]
    pub fn saturating_sub(self, by: Duration) -> Self {
        if self == BootInstant::FOREVER {
            self
        } else {
            BootInstant(self.0.saturating_sub(saturating_nanos(by)))
        }
    }

    /// How long after `earlier` this is; zero if it is not.
    #[must_use]
    pub const fn saturating_duration_since(self, earlier: BootInstant) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }
}

fn saturating_nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arithmetic_stops_at_the_ends() {
        let second = Duration::from_secs(1);
        assert_eq!(BootInstant::EXPIRED.saturating_sub(second), BootInstant::EXPIRED);
        assert_eq!(BootInstant::from_nanos(u64::MAX - 1).saturating_add(second), BootInstant::FOREVER);
        assert_eq!(BootInstant::FOREVER.saturating_sub(second), BootInstant::FOREVER);
        assert_eq!(
            BootInstant::from_nanos(5).saturating_duration_since(BootInstant::from_nanos(7)),
            Duration::ZERO
        );
        assert_eq!(
            BootInstant::from_nanos(7)
                .saturating_add(second)
                .saturating_duration_since(BootInstant::from_nanos(7)),
            second
        );
    }
}
