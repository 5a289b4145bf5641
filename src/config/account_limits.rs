//! The table `[account_limits]` of the settings file: how much one account may hold and do.

use std::num::NonZeroU64;

use schemars::JsonSchema;
use serde::Deserialize;

use crate::domain::account::AccountLimits;

const DEFAULT: AccountLimits = AccountLimits::DEFAULT;

/// How much one account may hold and do.
// Unknown keys are refused: a typo must not be a default.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct RawAccountLimits {
    /// How many keys that are not revoked an account may have; the same for a user's own keys.
    #[schemars(extend("default" = DEFAULT.keys))]
    keys: Option<NonZeroU64>,
    /// How many roles of its own an account may have.
    #[schemars(extend("default" = DEFAULT.roles))]
    roles: Option<NonZeroU64>,
    /// How many rotations an account's keys may have in an hour; the same for a user's own keys.
    #[schemars(extend("default" = DEFAULT.rotations_per_hour))]
    rotations_per_hour: Option<NonZeroU64>,
    /// How many entries of the audit log an account's changes may make in an hour; the same for a user's own keys.
    #[schemars(extend("default" = DEFAULT.log_rows_per_hour))]
    log_rows_per_hour: Option<NonZeroU64>,
}

impl RawAccountLimits {
    pub(super) fn into_account_limits(self) -> AccountLimits {
        let or = |limit: Option<NonZeroU64>, default| limit.map_or(default, NonZeroU64::get);
        AccountLimits {
            keys: or(self.keys, DEFAULT.keys),
            roles: or(self.roles, DEFAULT.roles),
            rotations_per_hour: or(self.rotations_per_hour, DEFAULT.rotations_per_hour),
            log_rows_per_hour: or(self.log_rows_per_hour, DEFAULT.log_rows_per_hour),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_limit_is_read_and_none_of_them_is_zero() {
        let read = |text: &str| {
            toml::from_str::<RawAccountLimits>(text)
                .map(RawAccountLimits::into_account_limits)
                .map_err(|error| error.to_string())
        };
        assert_eq!(read(""), Ok(AccountLimits::DEFAULT));
        let all = "keys = 1\nroles = 2\nrotations_per_hour = 3\nlog_rows_per_hour = 4";
        let expected = AccountLimits { keys: 1, roles: 2, rotations_per_hour: 3, log_rows_per_hour: 4 };
        assert_eq!(read(all), Ok(expected));
        for wrong in ["keys = 0", "roles = -1", "keys = 'all'", "members = 5"] {
            assert!(read(wrong).is_err(), "{wrong}");
        }
    }
}
