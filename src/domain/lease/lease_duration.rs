//! The length of the lease, and every other time limit that follows from it.

use std::time::Duration;

use super::BootInstant;

/// How much longer than a lease a revoker waits: clocks that run within 10 % of true time differ by less than
/// a factor of 1.25, (1 + 0.11) / (1 - 0.11).
const DRIFT_NUMERATOR: u32 = 5;
const DRIFT_DENOMINATOR: u32 = 4;
/// Constant margin for errors that are not proportional, such as a step of a clock.
const EXPIRY_SLACK: Duration = Duration::from_millis(50);
/// Maximum interval of renewals, which bounds propagation if no hint arrives.
const MAX_RENEW_INTERVAL: Duration = Duration::from_secs(1);
/// Maximum time limit of a request to the database.
const MAX_REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// The maximum interval between searches for dead rows.
const MAX_COLLECT_INTERVAL: Duration = Duration::from_secs(15);

/// How long a replica may allow Checks without contact to the database.
///
/// A short lease bounds Revoke while a replica is silent; a long one survives longer outages of the database, and an
/// infinite one any outage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LeaseDuration(Option<Duration>);

impl LeaseDuration {
    /// 5 s: Revoke never waits longer than 6.3 s; a database failover is an outage.
    pub const STRICT: LeaseDuration = LeaseDuration(Some(Duration::from_secs(5)));

    /// 60 s: rides out a failover of the database.
    pub const DEFAULT: LeaseDuration = LeaseDuration(Some(Duration::from_secs(60)));

    /// Infinite: a replica keeps answering through any outage, and Revoke is not OK while one is silent.
    pub const INFINITE: LeaseDuration = LeaseDuration(None);

    /// The shortest: its renewals still get answers in time from a database in another building.
    pub const MIN: Duration = Duration::from_secs(1);

    /// A lease of this length. None below [`LeaseDuration::MIN`]: a lease of zero is a service that never answers.
    #[must_use]
    pub fn from_duration(length: Duration) -> Option<LeaseDuration> {
        (length >= Self::MIN).then_some(LeaseDuration(Some(length)))
    }

    /// Its length; None = infinite.
    #[must_use]
    pub const fn length(self) -> Option<Duration> {
        self.0
    }

    /// When a lease ends whose renewal was sent no earlier than `sent`.
    #[must_use]
    pub fn expires_at(self, sent: BootInstant) -> BootInstant {
        self.0.map_or(BootInstant::FOREVER, |length| sent.saturating_add(length))
    }

    /// How long to wait, by one's own clock, until every lease has run out that was granted before, by any
    /// other clock. None = waiting does not help.
    #[must_use]
    pub fn expiry_wait(self) -> Option<Duration> {
        self.0.map(|length| length * DRIFT_NUMERATOR / DRIFT_DENOMINATOR + EXPIRY_SLACK)
    }

    /// How often a replica renews.
    #[must_use]
    pub fn renew_interval(self) -> Duration {
        self.0.map_or(MAX_RENEW_INTERVAL, |length| MAX_RENEW_INTERVAL.min(length / 3))
    }

    /// How long a replica waits for the answer to one request before it takes the connection for dead.
    #[must_use]
    pub fn request_timeout(self) -> Duration {
        self.0.map_or(MAX_REQUEST_TIMEOUT, |length| MAX_REQUEST_TIMEOUT.min(length / 6))
    }

    /// How long a row must have been watched standing still before its replica counts as dead. None = never.
    #[must_use]
    pub fn dead_after(self) -> Option<Duration> {
        self.0.map(|length| length * 4)
    }

    /// How often dead rows are looked for.
    #[must_use]
    pub fn collect_interval(self) -> Duration {
        self.0.map_or(MAX_COLLECT_INTERVAL, |length| MAX_COLLECT_INTERVAL.min(length / 2))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_wait_outlasts_the_slowest_clock_by_the_fastest() {
        for lease in [LeaseDuration::STRICT, LeaseDuration::DEFAULT] {
            let length = lease.length().unwrap();
            // The holder's clock loses 11 %, the waiter's gains 11 %.
            let held = length.as_secs_f64() / 0.89;
            let waited = lease.expiry_wait().unwrap().as_secs_f64() / 1.11;
            assert!(waited > held, "{length:?}: waits {waited} s for a lease of {held} s");
        }
        assert_eq!(LeaseDuration::DEFAULT.expiry_wait(), Some(Duration::from_millis(75_050)));
    }

    #[test]
    fn a_replica_renews_three_times_in_a_lease_and_each_second_at_least() {
        assert_eq!(
            LeaseDuration::from_duration(Duration::from_secs(1)).unwrap().renew_interval(),
            Duration::from_secs(1) / 3
        );
        for lease in [LeaseDuration::STRICT, LeaseDuration::DEFAULT, LeaseDuration::INFINITE] {
            assert_eq!(lease.renew_interval(), Duration::from_secs(1));
        }
    }

    #[test]
    fn a_failed_renewal_leaves_time_for_another() {
        for lease in [
            LeaseDuration::from_duration(LeaseDuration::MIN).unwrap(),
            LeaseDuration::STRICT,
            LeaseDuration::DEFAULT,
        ] {
            assert!(lease.renew_interval() + lease.request_timeout() * 3 <= lease.length().unwrap());
        }
    }

    #[test]
    fn an_infinite_lease_never_ends_and_no_wait_outlasts_it() {
        assert_eq!(LeaseDuration::INFINITE.expires_at(BootInstant::EXPIRED), BootInstant::FOREVER);
        assert_eq!(
            (LeaseDuration::INFINITE.expiry_wait(), LeaseDuration::INFINITE.dead_after()),
            (None, None)
        );
    }

    #[test]
    fn no_lease_is_shorter_than_a_second() {
        assert_eq!(LeaseDuration::from_duration(Duration::ZERO), None);
        assert_eq!(LeaseDuration::from_duration(Duration::from_millis(999)), None);
    }
}
