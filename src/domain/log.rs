//! The log: every change in commit order, hash-chained. It is the audit trail and the change feed in one.
//!
//! Here: what a change is, who made it, and the chain's arithmetic. Not here: where it is kept.

use std::{fmt, sync::Arc};

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::{
    account::{Account, Member, Role},
    entry::Via,
    key::{Key, Owner},
    name::{AccountId, KeyId, UserId},
    time::{Revision, Timestamp},
};

/// A link of the chain: SHA-256.
pub type Hash = [u8; 32];

/// The link before the first.
pub const GENESIS: Hash = [0; 32];

/// What changed: the whole record after the change, as a follower needs it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Change {
    /// A key was created or changed.
    Key(Arc<Key>),
    /// An account was created or changed.
    Account(Arc<Account>),
    /// A role was made or changed.
    Role(Arc<Role>),
    /// A role was deleted; the record is its last.
    RoleDeleted(Arc<Role>),
    /// A user became a member, or a member's role changed.
    Member(Arc<Member>),
    /// A membership ended; the record is its last.
    MemberRemoved(Arc<Member>),
}

impl Change {
    /// The account concerned.
    #[must_use]
    pub fn account(&self) -> Option<&AccountId> {
        match self {
            Change::Key(key) => key.owner.account(),
            Change::Account(account) => Some(&account.id),
            Change::Role(role) | Change::RoleDeleted(role) => role.account.as_ref(),
            Change::Member(member) | Change::MemberRemoved(member) => Some(&member.account),
        }
    }

    /// The key concerned.
    #[must_use]
    pub fn key_id(&self) -> Option<KeyId> {
        match self {
            Change::Key(key) => Some(key.id),
            _ => None,
        }
    }

    /// The user concerned.
    #[must_use]
    pub fn user(&self) -> Option<&UserId> {
        match self {
            Change::Key(key) => match &key.owner {
                Owner::User(user) => Some(user),
                Owner::Account(_) => None,
            },
            Change::Member(member) | Change::MemberRemoved(member) => Some(&member.user),
            Change::Account(_) | Change::Role(_) | Change::RoleDeleted(_) => None,
        }
    }

    /// The record's revision.
    #[must_use]
    pub fn revision(&self) -> Revision {
        match self {
            Change::Key(key) => key.revision,
            Change::Account(account) => account.revision,
            Change::Role(role) | Change::RoleDeleted(role) => role.revision,
            Change::Member(member) | Change::MemberRemoved(member) => member.revision,
        }
    }

    /// The same change with its record at `revision`.
    #[must_use]
    pub fn at_revision(mut self, revision: Revision) -> Change {
        match &mut self {
            Change::Key(key) => Arc::make_mut(key).revision = revision,
            Change::Account(account) => Arc::make_mut(account).revision = revision,
            Change::Role(role) | Change::RoleDeleted(role) => Arc::make_mut(role).revision = revision,
            Change::Member(member) | Change::MemberRemoved(member) => {
                Arc::make_mut(member).revision = revision
            }
        }
        self
    }
}

macro_rules! actions {
    ($($(#[$doc:meta])* $variant:ident = $text:literal,)*) => {
        /// What happened, in the words of the audit log.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Action { $($(#[$doc])* $variant,)* }

        impl Action {
            /// The stable name.
            #[must_use]
            pub const fn as_str(self) -> &'static str {
                match self { $(Action::$variant => $text,)* }
            }

            /// Reads a stable name.
            #[must_use]
            pub fn parse(text: &str) -> Option<Action> {
                match text { $($text => Some(Action::$variant),)* _ => None }
            }
        }
    };
}

actions! {
    /// A key was created.
    KeyCreated = "key.created",
    /// A key's terms were changed.
    KeyUpdated = "key.updated",
    /// A key was disabled.
    KeyDisabled = "key.disabled",
    /// A key was enabled.
    KeyEnabled = "key.enabled",
    /// A key was revoked.
    KeyRevoked = "key.revoked",
    /// A key was given a new secret.
    KeyRotated = "key.rotated",
    /// A rotation's overlap was ended.
    KeyRotationFinished = "key.rotation_finished",
    /// A root key was made, at the first start or by `root-key reset`.
    RootKeyCreated = "root_key.created",
    /// An account was created.
    AccountCreated = "account.created",
    /// An account was renamed.
    AccountUpdated = "account.updated",
    /// An account was suspended.
    AccountSuspended = "account.suspended",
    /// An account was resumed.
    AccountResumed = "account.resumed",
    /// A key made elsewhere was taken in.
    KeyImported = "key.imported",
    /// A role was made or changed.
    RolePut = "role.put",
    /// A role was deleted.
    RoleDeleted = "role.deleted",
    /// A user became a member, or a member's role changed.
    MemberPut = "member.put",
    /// A membership ended.
    MemberRemoved = "member.removed",
    /// Old entries left the log for a file; about the operator account, which stays as it is.
    LogArchived = "log.archived",
    /// The database starts again from an older state, since its newest changes are lost; about the operator account, which
    /// stays as it is.
    DatabaseLossAccepted = "database.loss_accepted",
}

impl Action {
    /// Whether it ends rights and gives none, whatever the record was: nothing keeps such a change from being made.
    #[must_use]
    pub const fn stops(self) -> bool {
        use Action::{
            AccountSuspended, KeyDisabled, KeyRevoked, KeyRotationFinished, MemberRemoved, RoleDeleted,
        };
        matches!(
            self,
            KeyRevoked | KeyDisabled | KeyRotationFinished | MemberRemoved | RoleDeleted | AccountSuspended
        )
    }
}

/// What called.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Who {
    /// Keyward itself.
    System,
    /// A management key.
    Key(KeyId),
    /// A client certificate, by the name of its identity: `cert:…`.
    Certificate(Box<str>),
}

/// A key's id, `cert:…`, or `system`.
impl fmt::Display for Who {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Who::System => f.write_str("system"),
            Who::Key(key) => key.fmt(f),
            Who::Certificate(name) => f.write_str(name),
        }
    }
}

/// Who made a change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Actor {
    /// What called.
    pub who: Who,
    /// The account that it acted in.
    pub account: Option<AccountId>,
    /// The person it called for.
    pub acting_user: Option<UserId>,
    /// By which call.
    pub via: Via,
}

impl Actor {
    /// Keyward itself.
    pub const SYSTEM: Actor = Actor { who: Who::System, account: None, acting_user: None, via: Via::NONE };
}

/// What called.
impl fmt::Display for Actor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.who.fmt(f)
    }
}

/// One entry as it is stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogRow {
    /// Its place in the order.
    pub revision: Revision,
    /// When the change was made.
    pub at: Timestamp,
    /// What happened: [`Action::as_str`]; text, since a newer version may know more.
    pub action: String,
    /// The account concerned.
    pub account: Option<AccountId>,
    /// The key concerned.
    pub key_id: Option<KeyId>,
    /// The user concerned.
    pub user: Option<UserId>,
    /// Who: a key's id, `cert:` and a certificate's name, or `system`.
    pub actor: String,
    /// The account of the actor.
    pub actor_account: Option<AccountId>,
    /// The person that the actor called for.
    pub acting_user: Option<UserId>,
    /// The RPC or command.
    pub method: String,
    /// The [`Change`] as JSON, and how it came about: see `entry.rs`.
    pub payload: String,
    /// The hash of the entry before.
    pub prev_hash: Hash,
    /// The hash of this entry.
    pub hash: Hash,
}

/// An entry whose payload cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("log entry {revision}: {source}")]
pub struct Unreadable {
    /// Its place.
    pub revision: Revision,
    /// What is wrong.
    pub source: serde_json::Error,
}

impl LogRow {
    /// The entry with its change, read from the payload.
    ///
    /// # Errors
    /// When that is no change that this version knows.
    pub fn with_change(self) -> Result<(LogRow, Change), Unreadable> {
        match serde_json::from_str(&self.payload) {
            Ok(change) => Ok((self, change)),
            Err(source) => Err(Unreadable { revision: self.revision, source }),
        }
    }

    /// Whether its change may take something away. What this version does not know may.
    #[must_use]
    pub fn may_narrow(&self) -> bool {
        !matches!(
            Action::parse(&self.action),
            Some(
                Action::KeyCreated
                    | Action::KeyImported
                    | Action::KeyEnabled
                    | Action::AccountCreated
                    | Action::AccountResumed
                    | Action::LogArchived
                    | Action::DatabaseLossAccepted
            )
        )
    }

    /// The hash that this entry must have: SHA-256 over a version tag, the hash before, the two numbers as
    /// 8 bytes big-endian, and every text with its length as 8 bytes big-endian before it. An absent value
    /// has the length 2^64-1, so that it differs from an empty one.
    #[must_use]
    pub fn expected_hash(&self) -> Hash {
        let mut sha = Sha256::new();
        sha.update(b"keyward-log-1");
        sha.update(self.prev_hash);
        sha.update(self.revision.0.to_be_bytes());
        sha.update(self.at.as_micros().to_be_bytes());
        let key_id = self.key_id.map(|id| id.to_string());
        for text in [
            Some(self.action.as_str()),
            self.account.as_ref().map(AccountId::as_str),
            key_id.as_deref(),
            self.user.as_ref().map(UserId::as_str),
            Some(self.actor.as_str()),
            self.actor_account.as_ref().map(AccountId::as_str),
            self.acting_user.as_ref().map(UserId::as_str),
            Some(self.method.as_str()),
            Some(self.payload.as_str()),
        ] {
            match text {
                Some(text) => {
                    sha.update((text.len() as u64).to_be_bytes());
                    sha.update(text);
                }
                None => sha.update(u64::MAX.to_be_bytes()),
            }
        }
        sha.finalize().into()
    }

    /// Whether the entry follows one with `revision` and `hash`, and is unchanged.
    #[must_use]
    pub fn follows(&self, revision: Revision, hash: &Hash) -> bool {
        self.revision == revision.next() && self.prev_hash == *hash && self.hash == self.expected_hash()
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::domain::key::tests::{at, sample};

    pub(crate) fn row(revision: u64, prev_hash: Hash) -> LogRow {
        let change = Change::Key(Arc::new(sample()));
        let mut row = LogRow {
            revision: Revision(revision),
            at: at(1),
            action: Action::KeyCreated.as_str().to_owned(),
            account: change.account().cloned(),
            key_id: change.key_id(),
            user: None,
            actor: Actor::SYSTEM.to_string(),
            actor_account: None,
            acting_user: None,
            method: "test".to_owned(),
            payload: serde_json::to_string(&change).unwrap(),
            prev_hash,
            hash: GENESIS,
        };
        row.hash = row.expected_hash();
        row
    }

    #[test]
    fn a_chain_follows_link_by_link() {
        let first = row(1, GENESIS);
        let second = row(2, first.hash);
        assert!(first.follows(Revision(0), &GENESIS));
        assert!(second.follows(Revision(1), &first.hash));
        assert!(!second.follows(Revision(0), &first.hash), "a gap");
        assert!(!second.follows(Revision(1), &GENESIS), "another history");
    }

    #[test]
    fn every_field_is_under_the_hash() {
        let whole = row(1, GENESIS);
        let turns: [fn(&mut LogRow); 10] = [
            |r| r.at = at(2),
            |r| r.action.push('x'),
            |r| r.account = None,
            |r| r.key_id = None,
            |r| r.user = Some(UserId::parse("u").unwrap()),
            |r| r.actor.push('x'),
            |r| r.actor_account = Some(AccountId::operator()),
            |r| r.acting_user = Some(UserId::parse("u").unwrap()),
            |r| r.method.clear(),
            |r| r.payload.push(' '),
        ];
        for turn in turns {
            let mut changed = whole.clone();
            turn(&mut changed);
            assert!(!changed.follows(Revision(0), &GENESIS), "{changed:?}");
        }
    }

    #[test]
    fn a_change_reads_back_from_the_log() {
        let change = Change::Key(Arc::new(sample())).at_revision(Revision(7));
        let text = serde_json::to_string(&change).unwrap();
        assert_eq!(serde_json::from_str::<Change>(&text).unwrap(), change);
    }

    #[test]
    fn actions_read_back() {
        assert_eq!(Action::parse(Action::KeyRotated.as_str()), Some(Action::KeyRotated));
        assert_eq!(Action::parse("nope"), None);
    }
}
