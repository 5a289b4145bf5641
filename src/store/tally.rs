//! What an account or a user holds and has done in the present hour, and whether a write fits its limits.
//!
//! The tables count: a trigger on the log keeps a row for each account, so that replicas of the version before are counted
//! too. Here the same is counted for the writes of one run, which are judged before any of them is in the tables.

use crate::domain::{
    account::{AccountLimit, AccountLimits, LimitReached},
    key::Owner,
    log::{Action, Change},
};

use super::{Hour, Write};

/// The counts of one account or user.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Tally {
    /// Keys that are not revoked.
    pub(super) keys: u64,
    /// The hour that the other counts are of.
    pub(super) hour: Option<Hour>,
    pub(super) rotations: u64,
    pub(super) log_rows: u64,
}

impl Tally {
    /// The counts as of an hour. Clocks of replicas differ: what another has counted for the next hour counts for this one.
    fn at(self, hour: Hour) -> Tally {
        let known = self.hour.filter(|known| *known == hour || known.0 == hour.0 + 1);
        match known {
            Some(_) => Tally { hour: known, ..self },
            None => Tally { keys: self.keys, hour: Some(hour), ..Tally::default() },
        }
    }

    /// Counts a write that is recorded.
    pub(super) fn count(&mut self, write: &Write) {
        let mut tally = self.at(Hour::of(write.at));
        match write.action {
            Action::KeyCreated | Action::KeyImported | Action::RootKeyCreated => tally.keys += 1,
            Action::KeyRevoked => tally.keys = tally.keys.saturating_sub(1),
            Action::KeyRotated => tally.rotations += 1,
            _ => {}
        }
        tally.log_rows += 1;
        *self = tally;
    }

    /// Whether a write fits the limits after what is counted so far; `roles` is how many the account has.
    pub(super) fn fits(self, write: &Write, limits: &AccountLimits, roles: u64) -> Result<(), LimitReached> {
        let now = self.at(Hour::of(write.at));
        let new = write.expect.is_none();
        let full = |counted: bool, count: u64, limit: u64| counted && count >= limit;
        let reached = if full(new && write.change.key_id().is_some(), now.keys, limits.keys) {
            (AccountLimit::Keys, limits.keys)
        } else if full(new && matches!(write.change, Change::Role(_)), roles, limits.roles) {
            (AccountLimit::Roles, limits.roles)
        } else if full(write.action == Action::KeyRotated, now.rotations, limits.rotations_per_hour) {
            (AccountLimit::RotationsPerHour, limits.rotations_per_hour)
        } else if full(true, now.log_rows, limits.log_rows_per_hour) {
            (AccountLimit::LogRowsPerHour, limits.log_rows_per_hour)
        } else {
            return Ok(());
        };
        let (limit, value) = reached;
        let waiting_helps = matches!(limit, AccountLimit::RotationsPerHour | AccountLimit::LogRowsPerHour);
        let next = now.hour.map(|hour| Hour(hour.0 + 1).start().since(write.at));
        Err(LimitReached { limit, value, retry_after: next.filter(|_| waiting_helps) })
    }
}

/// The account or user that a change counts for, by the same rule as the trigger. `None` for a global role.
pub(super) fn counted_for(change: &Change) -> Option<Owner> {
    let user = || change.user().cloned().map(Owner::User);
    change.account().cloned().map(Owner::Account).or_else(user)
}

/// The limits of a write, if it is to be held to any. The operator account has none: its keys must be able to act.
pub(super) fn limits_of(write: &Write) -> Option<(AccountLimits, Owner)> {
    let owner = counted_for(&write.change)?;
    let bounded = !owner.account().is_some_and(|account| account.is_operator());
    write.limits.filter(|_| bounded).map(|limits| (limits, owner))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::time::Timestamp;

    #[test]
    fn counts_of_an_hour_end_with_it_whoevers_clock_is_ahead() {
        let counted = Tally { keys: 7, hour: Some(Hour(10)), rotations: 2, log_rows: 3 };
        assert_eq!(counted.at(Hour(10)), counted);
        assert_eq!(counted.at(Hour(9)), counted, "another replica's clock is ahead by a little");
        for hour in [8, 11] {
            let fresh = Tally { keys: 7, hour: Some(Hour(hour)), rotations: 0, log_rows: 0 };
            assert_eq!(counted.at(Hour(hour)), fresh);
        }
        let at = Timestamp::from_micros(10 * 3_600_000_000);
        assert_eq!(Tally::default().at(Hour::of(at)).hour, Some(Hour(10)));
    }
}
