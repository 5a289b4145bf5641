//! Log formats: which values of a log entry an older release cannot read.
//!
//! A release reads every format up to [`LogFormat::NEWEST`]. What the store does with formats is in `store/log_fence.rs`.

use std::fmt;

use super::{log::RecordChange, name::AccountId, scope::Scope};

/// A generation of log entries. A release that reads one reads all before it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct LogFormat(pub u32);

impl LogFormat {
    /// Scopes without `/`, account ids without capital letters.
    pub const FIRST: LogFormat = LogFormat(0);
    /// Scopes may contain `/`, account ids capital letters.
    pub const SLASHES_AND_CAPITALS: LogFormat = LogFormat(1);
    /// The newest that this release reads.
    pub const NEWEST: LogFormat = LogFormat::SLASHES_AND_CAPITALS;
}

/// A value that releases before some format cannot read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NewerValue<'e> {
    /// A scope that contains `/`.
    Scope(&'e Scope),
    /// An account id with capital letters.
    AccountId(&'e AccountId),
}

impl<'e> NewerValue<'e> {
    /// Finds one in the entry of a change that a caller of `actor_account` makes.
    #[must_use]
    pub fn find(change: &'e RecordChange, actor_account: Option<&'e AccountId>) -> Option<NewerValue<'e>> {
        let scopes = match change {
            RecordChange::Key(key) => Some(&key.spec.scopes),
            RecordChange::Role(role) | RecordChange::RoleDeleted(role) => Some(&role.scopes),
            RecordChange::Account(_) | RecordChange::Member(_) | RecordChange::MemberRemoved(_) => None,
        };
        let scope = scopes.into_iter().flatten().find(|scope| scope.as_str().contains('/'));
        let has_capitals = |id: &&AccountId| id.as_str().bytes().any(|byte| byte.is_ascii_uppercase());
        let account_id = || change.account_id().into_iter().chain(actor_account).find(has_capitals);
        scope.map(NewerValue::Scope).or_else(|| account_id().map(NewerValue::AccountId))
    }

    /// The first format that has the value.
    #[must_use]
    pub const fn format(self) -> LogFormat {
        match self {
            NewerValue::Scope(_) | NewerValue::AccountId(_) => LogFormat::SLASHES_AND_CAPITALS,
        }
    }
}

impl fmt::Display for NewerValue<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            NewerValue::Scope(scope) => write!(f, "scope {scope:?}"),
            NewerValue::AccountId(id) => write!(f, "account id {id:?}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;
    use serde_json::Value;

    use super::*;
    use crate::domain::{
        account::{Account, AccountMember, Role},
        key::{KeyOwner, tests::sample_key},
        name::{DisplayName, RoleName, UserId},
        time::{Revision, Timestamp},
    };

    fn account_id(text: &str) -> AccountId {
        AccountId::parse(text).unwrap()
    }

    /// One change of each kind, about an account and with scopes.
    fn changes(account: &str, scopes: &[String]) -> Vec<RecordChange> {
        let id = account_id(account);
        let scopes = || scopes.iter().map(|scope| Scope::parse_grant(scope).unwrap()).collect();
        let key = |owner| {
            let mut key = sample_key();
            (key.owner, key.spec.scopes) = (owner, scopes());
            RecordChange::Key(Arc::new(key))
        };
        let (revision, at) = (Revision::default(), Timestamp::from_micros(1));
        let name = RoleName::parse("agent").unwrap();
        let role = |account| Arc::new(Role { account, name: name.clone(), scopes: scopes(), revision });
        let user = UserId::parse("Anna/1").unwrap();
        let member =
            Arc::new(AccountMember { account: id.clone(), user: user.clone(), role: name.clone(), revision });
        let account = Account {
            id: id.clone(),
            name: DisplayName::parse("A/B").unwrap(),
            suspended_at: None,
            longest_life: None,
            created_at: at,
            updated_at: at,
            revision,
        };
        vec![
            key(KeyOwner::Account(id.clone())),
            key(KeyOwner::User(user)),
            RecordChange::Role(role(Some(id.clone()))),
            RecordChange::Role(role(None)),
            RecordChange::RoleDeleted(role(Some(id))),
            RecordChange::Member(member.clone()),
            RecordChange::MemberRemoved(member),
            RecordChange::Account(Arc::new(account)),
        ]
    }

    /// Whether the release before would read an entry's record: its own two rules, on the record as JSON.
    fn release_before_reads(change: &RecordChange, actor_account: Option<&AccountId>) -> bool {
        let reads_scope = |scope: &str| {
            scope.split(':').all(|segment| {
                segment == "*"
                    || !segment.is_empty()
                        && segment.chars().all(|c| c.is_ascii_alphanumeric() || "_.-".contains(c))
            })
        };
        let reads_id = |id: &str| {
            id.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_' || c == '-')
        };
        let json = serde_json::to_value(change).unwrap();
        let (kind, record) = json.as_object().unwrap().iter().next().unwrap();
        let scopes = record.get("scopes").or_else(|| record.pointer("/terms/scopes"));
        let mut scopes = scopes.and_then(Value::as_array).into_iter().flatten();
        let account = if kind == "account" { "/id" } else { "/account" };
        let ids = [record.pointer(account), record.pointer("/owner/account")];
        let mut ids = ids.into_iter().flatten().filter_map(Value::as_str);
        scopes.all(|scope| reads_scope(scope.as_str().unwrap()))
            && ids.all(reads_id)
            && actor_account.is_none_or(|id| reads_id(id.as_str()))
    }

    #[test]
    fn the_value_that_an_older_release_cannot_read_is_named() {
        let table = [
            ("acme", "monitors:read", None, None),
            ("acme", "*", Some("keyward"), None),
            ("acme", "repo/write", None, Some("scope \"repo/write\"")),
            ("acme", "/v1/users:*", None, Some("scope \"/v1/users:*\"")),
            ("org_2abCD", "a", None, Some("account id \"org_2abCD\"")),
            ("acme", "a", Some("Acme"), Some("account id \"Acme\"")),
        ];
        for (account, scope, actor, wanted) in table {
            let (change, actor) = (&changes(account, &[scope.to_owned()])[0], actor.map(account_id));
            let found = NewerValue::find(change, actor.as_ref());
            assert_eq!(found.map(|value| value.to_string()).as_deref(), wanted, "{account} {scope}");
        }
    }

    proptest! {
        #[test]
        fn a_newer_value_is_found_exactly_where_the_release_before_cannot_read_the_record(
            account in "[a-zA-D0-9_-]{1,6}",
            actor in proptest::option::of("[a-zZ_-]{1,3}"),
            scopes in proptest::collection::vec("[ab./]{1,3}(:[A-C_/-]{1,2}){0,2}(:[*])?", 0..4),
        ) {
            let actor = actor.as_deref().map(account_id);
            for change in changes(&account, &scopes) {
                let found = NewerValue::find(&change, actor.as_ref());
                prop_assert_eq!(found.is_none(), release_before_reads(&change, actor.as_ref()), "{:?}", change);
            }
        }
    }
}
