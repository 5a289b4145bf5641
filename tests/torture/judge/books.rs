//! What was acknowledged against what is in the database, and what was reported against what may be.

use std::collections::BTreeMap;

/// A change that returned OK.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct AcknowledgedChange {
    pub(crate) revision: u64,
    /// As the log calls it, such as `key.revoked`.
    pub(crate) action: &'static str,
    /// The key's id, or else the user's, or the account's.
    pub(crate) subject: String,
}

/// An entry of the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct LogEntry {
    pub(crate) action: String,
    pub(crate) key: String,
    pub(crate) account: String,
    pub(crate) user: String,
}

/// The acknowledged changes that the log does not hold, or holds as something else.
pub(crate) fn find_lost(
    acknowledged: &[AcknowledgedChange],
    log: &BTreeMap<u64, LogEntry>,
) -> Vec<AcknowledgedChange> {
    let holds = |change: &&AcknowledgedChange| {
        log.get(&change.revision).is_some_and(|entry| {
            entry.action == change.action
                && [&entry.key, &entry.account, &entry.user].contains(&&change.subject)
        })
    };
    acknowledged.iter().filter(|change| !holds(change)).cloned().collect()
}

/// What an OK said of how far the change had come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PropagationClaim {
    pub(crate) complete: bool,
    pub(crate) unconfirmed: usize,
    /// Microseconds since 1970; None = it does not say.
    pub(crate) complete_by: Option<i64>,
}

impl PropagationClaim {
    /// Whether it may come with OK at this instant of the same clock: all have confirmed, or the leases of
    /// those that have not have run out.
    pub(crate) fn is_sound(&self, now: i64) -> bool {
        let outlived = self.complete_by.is_some_and(|by| by <= now);
        self.complete && (self.unconfirmed == 0 || outlived)
    }
}
