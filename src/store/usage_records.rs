//! Usage of keys as it is stored: the last use of each secret, and counts of Checks for each hour and reason.

use crate::domain::{limit::PendingQuotaUnits, name::KeyId, policy_decision::Reason, time::Timestamp};

/// A use of one secret, to be kept as the latest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SecretUse {
    /// The key.
    pub key_id: KeyId,
    /// The secret's version.
    pub version: u32,
    /// When.
    pub at: Timestamp,
}

/// An hour, counted from 1970 (UTC).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct UsageHour(pub i64);

impl UsageHour {
    const MICROS_PER_HOUR: i64 = 3_600_000_000;

    /// The hour that an instant lies in.
    #[must_use]
    pub fn from_timestamp(at: Timestamp) -> UsageHour {
        UsageHour(at.as_micros().div_euclid(Self::MICROS_PER_HOUR))
    }

    /// Its first instant.
    #[must_use]
    pub fn start(self) -> Timestamp {
        Timestamp::from_micros(self.0.saturating_mul(Self::MICROS_PER_HOUR))
    }
}

/// Checks of a key in an hour with one reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UsageCount {
    /// The key.
    pub key_id: KeyId,
    /// The hour.
    pub hour: UsageHour,
    /// The reason.
    pub reason: Reason,
    /// How many.
    pub count: u64,
}

/// What Checks have left to be written behind.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UsageBatch {
    /// The latest use of each secret.
    pub secret_uses: Vec<SecretUse>,
    /// Counts to be added.
    pub counts: Vec<UsageCount>,
    /// Units of quotas to be added to what is spent of them.
    pub quota_units: Vec<(KeyId, PendingQuotaUnits)>,
}
