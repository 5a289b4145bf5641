//! Usage of keys as it is stored: the last use of each secret, and counts of Checks per hour and reason.

use crate::domain::{limit::PendingQuotaUnits, name::KeyId, policy_decision::Reason, time::Timestamp};

/// A use of one secret, which is stored if it is later than the stored one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SecretUse {
    /// The key that the secret belongs to.
    pub key_id: KeyId,
    /// The version of the secret, counted from 1.
    pub version: u32,
    /// The time of the use.
    pub at: Timestamp,
}

/// The number of an hour since 1970-01-01T00:00Z.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct UsageHour(pub i64);

impl UsageHour {
    const MICROS_PER_HOUR: i64 = 3_600_000_000;

    /// The hour that contains this time.
    #[must_use]
    pub fn from_timestamp(at: Timestamp) -> UsageHour {
        UsageHour(at.as_micros().div_euclid(Self::MICROS_PER_HOUR))
    }

    /// The first instant of the hour.
    #[must_use]
    pub fn start(self) -> Timestamp {
        Timestamp::from_micros(self.0.saturating_mul(Self::MICROS_PER_HOUR))
    }
}

/// The number of Checks of one key in one hour that ended with one reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UsageCount {
    /// The key that was checked.
    pub key_id: KeyId,
    /// The hour in which the Checks were answered.
    pub hour: UsageHour,
    /// The reason of the decision, allowed or denied.
    pub reason: Reason,
    /// The number of Checks, which is added to the stored one.
    pub count: u64,
}

/// Usage that Checks have left to be written later.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UsageBatch {
    /// The latest use of each secret.
    pub secret_uses: Vec<SecretUse>,
    /// Counts to add to the stored ones.
    pub counts: Vec<UsageCount>,
    /// Units to add to the stored usage of quotas.
    pub quota_units: Vec<(KeyId, PendingQuotaUnits)>,
}
