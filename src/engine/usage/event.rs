//! One use of a key: the unit that the recorder takes in.

use crate::domain::{name::KeyId, policy_decision::Reason, time::Timestamp};

/// One Check of a key that was found.
#[derive(Clone, Copy, Debug)]
pub struct UsageEvent {
    /// The key.
    pub key_id: KeyId,
    /// When.
    pub at: Timestamp,
    /// Which version of its secret was shown.
    pub secret_version: u32,
    /// What was answered.
    pub reason: Reason,
}
