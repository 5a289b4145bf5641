//! Counts what an account or a user has and has done in the present hour, and checks a write against its limits.
//!
//! The tables count by a trigger on the log, so the writes of older replicas are included. This module counts the same
//! for the writes of one run, which are decided before any of them is in the tables.

use crate::domain::{
    account::{AccountLimitKind, AccountLimitReached, AccountLimits},
    key::KeyOwner,
    log::{AuditAction, RecordChange},
};

use super::{UsageHour, WriteRequest};

/// The counts of one account or user.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct OwnerTally {
    /// Keys that are not revoked.
    pub(super) keys: u64,
    /// The hour that the other counts are of.
    pub(super) hour: Option<UsageHour>,
    pub(super) rotations: u64,
    pub(super) log_rows: u64,
}

impl OwnerTally {
    /// The counts as of an hour. Clocks of replicas differ, so counts of the next hour also count for this one.
    fn as_of_hour(self, hour: UsageHour) -> OwnerTally {
        let known = self.hour.filter(|known| *known == hour || known.0 == hour.0 + 1);
        match known {
            Some(_) => OwnerTally { hour: known, ..self },
            None => OwnerTally { keys: self.keys, hour: Some(hour), ..OwnerTally::default() },
        }
    }

    /// Counts a write that is recorded.
    pub(super) fn add_write(&mut self, write: &WriteRequest) {
        let mut tally = self.as_of_hour(UsageHour::from_timestamp(write.at));
        match write.action {
            AuditAction::KeyCreated | AuditAction::KeyImported | AuditAction::RootKeyCreated => {
                tally.keys += 1
            }
            AuditAction::KeyRevoked => tally.keys = tally.keys.saturating_sub(1),
            AuditAction::KeyRotated => tally.rotations += 1,
            _ => {}
        }
        tally.log_rows += 1;
        *self = tally;
    }

    /// Whether a write fits the limits after what is counted so far; `roles` is how many the account has.
    pub(super) fn check_limits(
        self,
        write: &WriteRequest,
        limits: &AccountLimits,
        roles: u64,
    ) -> Result<(), AccountLimitReached> {
        let now = self.as_of_hour(UsageHour::from_timestamp(write.at));
        let new = write.expected_revision.is_none();
        let full = |counted: bool, count: u64, limit: u64| counted && count >= limit;
        let reached = if full(new && write.change.key_id().is_some(), now.keys, limits.keys) {
            (AccountLimitKind::Keys, limits.keys)
        } else if full(new && matches!(write.change, RecordChange::Role(_)), roles, limits.roles) {
            (AccountLimitKind::Roles, limits.roles)
        } else if full(write.action == AuditAction::KeyRotated, now.rotations, limits.rotations_per_hour) {
            (AccountLimitKind::RotationsPerHour, limits.rotations_per_hour)
        } else if full(true, now.log_rows, limits.log_rows_per_hour) {
            (AccountLimitKind::LogRowsPerHour, limits.log_rows_per_hour)
        } else {
            return Ok(());
        };
        let (limit, value) = reached;
        let waiting_helps =
            matches!(limit, AccountLimitKind::RotationsPerHour | AccountLimitKind::LogRowsPerHour);
        let next = now.hour.map(|hour| UsageHour(hour.0 + 1).start().saturating_duration_since(write.at));
        Err(AccountLimitReached { limit, value, retry_after: next.filter(|_| waiting_helps) })
    }
}

/// The account or user that a change counts for, by the same rule as the trigger. `None` for a global role.
pub(super) fn counted_owner(change: &RecordChange) -> Option<KeyOwner> {
    let user = || change.user_id().cloned().map(KeyOwner::User);
    change.account_id().cloned().map(KeyOwner::Account).or_else(user)
}

/// The limits of a write, if it is to be held to any. The operator account has none: its keys must be able to act.
pub(super) fn applicable_limits(write: &WriteRequest) -> Option<(AccountLimits, KeyOwner)> {
    let owner = counted_owner(&write.change)?;
    let bounded = !owner.account().is_some_and(|account| account.is_operator());
    write.limits.filter(|_| bounded).map(|limits| (limits, owner))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::time::Timestamp;

    #[test]
    fn counts_of_an_hour_end_with_it_whoevers_clock_is_ahead() {
        let counted = OwnerTally { keys: 7, hour: Some(UsageHour(10)), rotations: 2, log_rows: 3 };
        assert_eq!(counted.as_of_hour(UsageHour(10)), counted);
        assert_eq!(counted.as_of_hour(UsageHour(9)), counted, "another replica's clock is ahead by a little");
        for hour in [8, 11] {
            let fresh = OwnerTally { keys: 7, hour: Some(UsageHour(hour)), rotations: 0, log_rows: 0 };
            assert_eq!(counted.as_of_hour(UsageHour(hour)), fresh);
        }
        let at = Timestamp::from_micros(10 * 3_600_000_000);
        assert_eq!(OwnerTally::default().as_of_hour(UsageHour::from_timestamp(at)).hour, Some(UsageHour(10)));
    }
}
