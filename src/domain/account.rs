//! Records of accounts, members and roles, the limits of an account, and the configured environments.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{
    name::{AccountId, DisplayName, EnvironmentName, RoleName, TokenTag, UserId},
    scope::ScopeSet,
    time::{Revision, Timestamp},
};

/// The owner of a key.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KeyOwner {
    /// A service key: it works in this account, and outlives the user that created it.
    Account(AccountId),
    /// A user key: it works wherever the user is a member, with the member's rights.
    User(UserId),
}

impl KeyOwner {
    /// The account, of a service key.
    #[must_use]
    pub fn account(&self) -> Option<&AccountId> {
        match self {
            KeyOwner::Account(account) => Some(account),
            KeyOwner::User(_) => None,
        }
    }

    /// The user, of a user key.
    #[must_use]
    pub fn user(&self) -> Option<&UserId> {
        match self {
            KeyOwner::User(user) => Some(user),
            KeyOwner::Account(_) => None,
        }
    }
}

/// An organisation that owns keys. Every call is decided inside one account.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Account {
    /// Its id.
    pub id: AccountId,
    /// Display name, which need not be unique.
    pub name: DisplayName,
    /// Since when all its keys are refused.
    pub suspended_at: Option<Timestamp>,
    /// The longest that a key made or changed from now on may live. `None` = for ever.
    pub longest_life: Option<Duration>,
    /// When it was created.
    pub created_at: Timestamp,
    /// When it last changed.
    pub updated_at: Timestamp,
    /// The revision of its last change; the store sets it at commit.
    pub revision: Revision,
}

impl Account {
    /// Whether going from `before` to `self` can refuse a Check that was allowed.
    #[must_use]
    pub fn restricts(&self, before: &Account) -> bool {
        self.suspended_at.is_some() && before.suspended_at.is_none()
    }
}

/// Limits on what one account may own and do. A user has the same limits for user keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AccountLimits {
    /// Keys that are not revoked.
    pub keys: u64,
    /// Roles that the account defines.
    pub roles: u64,
    /// Rotations per hour, over all keys.
    pub rotations_per_hour: u64,
    /// Entries of the log in an hour.
    pub log_rows_per_hour: u64,
}

impl AccountLimits {
    /// More than an account needs, and less than a server has room for.
    pub const DEFAULT: AccountLimits =
        AccountLimits { keys: 100_000, roles: 1_000, rotations_per_hour: 10_000, log_rows_per_hour: 100_000 };
}

/// Names a limit of [`AccountLimits`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AccountLimitKind {
    /// See [`AccountLimits::keys`].
    Keys,
    /// See [`AccountLimits::roles`].
    Roles,
    /// See [`AccountLimits::rotations_per_hour`].
    RotationsPerHour,
    /// See [`AccountLimits::log_rows_per_hour`].
    LogRowsPerHour,
}

impl AccountLimitKind {
    /// Its name in the settings.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            AccountLimitKind::Keys => "keys",
            AccountLimitKind::Roles => "roles",
            AccountLimitKind::RotationsPerHour => "rotations_per_hour",
            AccountLimitKind::LogRowsPerHour => "log_rows_per_hour",
        }
    }
}

/// A limit that a change would exceed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AccountLimitReached {
    /// The limit that was reached.
    pub limit: AccountLimitKind,
    /// The value of that limit.
    pub value: u64,
    /// How long until there is room again; `None` = not by waiting.
    pub retry_after: Option<Duration>,
}

/// A named set of scopes, of one account or of all.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Role {
    /// The account; `None` = a global role.
    pub account: Option<AccountId>,
    /// Its name. An account's role takes precedence over a global role of the same name.
    pub name: RoleName,
    /// The scopes that the role grants.
    pub scopes: ScopeSet,
    /// The revision of its last change; the store sets it at commit.
    pub revision: Revision,
}

/// A user's place in an account.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AccountMember {
    /// The account.
    pub account: AccountId,
    /// The user.
    pub user: UserId,
    /// The role whose scopes the user's keys have here.
    pub role: RoleName,
    /// The revision of its last change; the store sets it at commit.
    pub revision: Revision,
}

/// An environment and its short name in tokens.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Environment {
    /// The name that requests use.
    pub name: EnvironmentName,
    /// Its short name in tokens; may be empty.
    pub tag: TokenTag,
}

/// The environments of a deployment: at least one, with different names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EnvironmentSet(Vec<Environment>);

impl EnvironmentSet {
    /// Takes a list of environments.
    ///
    /// # Errors
    /// If the list is empty or has duplicates; the error gives the cause.
    pub fn new(list: Vec<Environment>) -> Result<Self, String> {
        if list.is_empty() {
            return Err("at least one environment is needed".to_owned());
        }
        for (at, environment) in list.iter().enumerate() {
            if list[..at].iter().any(|other| other.name == environment.name) {
                return Err(format!("environment {:?} is named twice", environment.name.as_str()));
            }
        }
        Ok(EnvironmentSet(list))
    }

    /// Each of them, in the order of the list.
    pub fn iter(&self) -> impl Iterator<Item = &Environment> {
        self.0.iter()
    }

    /// The environment with this name.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&Environment> {
        self.0.iter().find(|environment| environment.name.as_str() == name)
    }

    /// The first one: the root key's.
    #[must_use]
    pub fn first(&self) -> &Environment {
        &self.0[0]
    }

    /// All names, for an error message.
    #[must_use]
    pub fn names(&self) -> String {
        self.0.iter().map(|environment| environment.name.as_str()).collect::<Vec<_>>().join(", ")
    }
}

impl Default for EnvironmentSet {
    fn default() -> Self {
        let list = [("production", "live"), ("staging", "staging"), ("development", "dev")];
        EnvironmentSet(
            list.into_iter()
                .filter_map(|(name, tag)| {
                    Some(Environment {
                        name: EnvironmentName::parse(name).ok()?,
                        tag: TokenTag::parse(tag).ok()?,
                    })
                })
                .collect(),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_environments_are_three() {
        let environments = EnvironmentSet::default();
        assert_eq!(environments.names(), "production, staging, development");
        assert_eq!(environments.get("production").unwrap().tag.as_str(), "live");
        assert_eq!(environments.get("prod"), None);
    }

    #[test]
    fn an_empty_or_repeated_list_is_refused() {
        let one = EnvironmentSet::default().first().clone();
        assert!(EnvironmentSet::new(vec![]).is_err());
        assert!(EnvironmentSet::new(vec![one.clone(), one]).unwrap_err().contains("twice"));
    }
}
