//! A usage event: one Check of a key that was found.

use crate::domain::{name::KeyId, policy_decision::Reason, time::Timestamp};

/// One Check of a key that was found.
#[derive(Clone, Copy, Debug)]
pub struct UsageEvent {
    /// The key that was checked.
    pub key_id: KeyId,
    /// The time of the Check.
    pub at: Timestamp,
    /// The version of the presented secret.
    pub secret_version: u32,
    /// The primary reason of the outcome.
    pub reason: Reason,
}
