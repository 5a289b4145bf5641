//! The change log: every change in commit order, hash-chained. It is both the audit trail and the change feed.
//!
//! Defines changes, their actors and the arithmetic of the chain. The store decides where the log is kept.

use std::{fmt, sync::Arc};

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::{
    account::{Account, AccountMember, Role},
    change_origin::ChangeOrigin,
    key::{ApiKey, KeyOwner},
    name::{AccountId, KeyId, UserId},
    time::{Revision, Timestamp},
};

pub use super::log_position::{ChainHash, GENESIS_HASH};

/// What changed: the whole record after the change, as a follower needs it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RecordChange {
    /// A key was created or changed.
    Key(Arc<ApiKey>),
    /// An account was created or changed.
    Account(Arc<Account>),
    /// A role was made or changed.
    Role(Arc<Role>),
    /// A role was deleted; the record is its last.
    RoleDeleted(Arc<Role>),
    /// A user became a member, or a member's role changed.
    Member(Arc<AccountMember>),
    /// A membership ended; the record is its last.
    MemberRemoved(Arc<AccountMember>),
}

impl RecordChange {
    /// The account that the change concerns.
    #[must_use]
    pub fn account_id(&self) -> Option<&AccountId> {
        match self {
            RecordChange::Key(key) => key.owner.account(),
            RecordChange::Account(account) => Some(&account.id),
            RecordChange::Role(role) | RecordChange::RoleDeleted(role) => role.account.as_ref(),
            RecordChange::Member(member) | RecordChange::MemberRemoved(member) => Some(&member.account),
        }
    }

    /// The key that the change concerns.
    #[must_use]
    pub fn key_id(&self) -> Option<KeyId> {
        match self {
            RecordChange::Key(key) => Some(key.id),
            _ => None,
        }
    }

    /// The user that the change concerns.
    #[must_use]
    pub fn user_id(&self) -> Option<&UserId> {
        match self {
            RecordChange::Key(key) => match &key.owner {
                KeyOwner::User(user) => Some(user),
                KeyOwner::Account(_) => None,
            },
            RecordChange::Member(member) | RecordChange::MemberRemoved(member) => Some(&member.user),
            RecordChange::Account(_) | RecordChange::Role(_) | RecordChange::RoleDeleted(_) => None,
        }
    }

    /// The revision of the changed record.
    #[must_use]
    pub fn revision(&self) -> Revision {
        match self {
            RecordChange::Key(key) => key.revision,
            RecordChange::Account(account) => account.revision,
            RecordChange::Role(role) | RecordChange::RoleDeleted(role) => role.revision,
            RecordChange::Member(member) | RecordChange::MemberRemoved(member) => member.revision,
        }
    }

    /// The same change with its record at `revision`.
    #[must_use]
    pub fn with_revision(mut self, revision: Revision) -> RecordChange {
        match &mut self {
            RecordChange::Key(key) => Arc::make_mut(key).revision = revision,
            RecordChange::Account(account) => Arc::make_mut(account).revision = revision,
            RecordChange::Role(role) | RecordChange::RoleDeleted(role) => {
                Arc::make_mut(role).revision = revision
            }
            RecordChange::Member(member) | RecordChange::MemberRemoved(member) => {
                Arc::make_mut(member).revision = revision
            }
        }
        self
    }
}

macro_rules! define_actions {
    ($($(#[$doc:meta])* $variant:ident = $text:literal,)*) => {
        /// What happened, in the words of the audit log.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum AuditAction { $($(#[$doc])* $variant,)* }

        impl AuditAction {
            /// The name in the audit log, which never changes.
            #[must_use]
            pub const fn as_str(self) -> &'static str {
                match self { $(AuditAction::$variant => $text,)* }
            }

            /// Parses a name of the audit log.
            #[must_use]
            pub fn parse(text: &str) -> Option<AuditAction> {
                match text { $($text => Some(AuditAction::$variant),)* _ => None }
            }
        }
    };
}

define_actions! {
    /// A key was created.
    KeyCreated = "key.created",
    /// A key's permissions or attributes were changed.
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

impl AuditAction {
    /// Whether the action only takes rights away, for any record. Such a change is never prevented.
    #[must_use]
    pub const fn is_restriction(self) -> bool {
        use AuditAction::{
            AccountSuspended, KeyDisabled, KeyRevoked, KeyRotationFinished, MemberRemoved, RoleDeleted,
        };
        matches!(
            self,
            KeyRevoked | KeyDisabled | KeyRotationFinished | MemberRemoved | RoleDeleted | AccountSuspended
        )
    }
}

/// The authenticated identity of a caller.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ActorId {
    /// Keyward acted without a call.
    System,
    /// A management key.
    Key(KeyId),
    /// A client certificate, by the name of its identity: `cert:…`.
    Certificate(Box<str>),
}

/// A key's id, `cert:…`, or `system`.
impl fmt::Display for ActorId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ActorId::System => f.write_str("system"),
            ActorId::Key(key) => key.fmt(f),
            ActorId::Certificate(name) => f.write_str(name),
        }
    }
}

/// The caller that made a change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Actor {
    /// The authenticated identity of a caller.
    pub id: ActorId,
    /// The account that it acted in.
    pub account: Option<AccountId>,
    /// The person it called for.
    pub acting_user: Option<UserId>,
    /// The circumstances of the call.
    pub origin: ChangeOrigin,
}

impl Actor {
    /// Keyward acted without a call.
    pub const SYSTEM: Actor =
        Actor { id: ActorId::System, account: None, acting_user: None, origin: ChangeOrigin::UNKNOWN };
}

/// The authenticated identity of a caller.
impl fmt::Display for Actor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.id.fmt(f)
    }
}

/// One entry as it is stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogEntry {
    /// Its place in the order.
    pub revision: Revision,
    /// When the change was made.
    pub at: Timestamp,
    /// What happened: [`AuditAction::as_str`]; text, since a newer version may know more.
    pub action: String,
    /// The account that the change concerns.
    pub account: Option<AccountId>,
    /// The key that the change concerns.
    pub key_id: Option<KeyId>,
    /// The user that the change concerns.
    pub user: Option<UserId>,
    /// The actor: a key's id, `cert:` and a certificate's name, or `system`.
    pub actor: String,
    /// The account of the actor.
    pub actor_account: Option<AccountId>,
    /// The person that the actor called for.
    pub acting_user: Option<UserId>,
    /// The RPC or command that made the change.
    pub method: String,
    /// The [`RecordChange`] as JSON, and its origin: see [`super::log_payload`].
    pub payload: String,
    /// The hash of the entry before.
    pub prev_hash: ChainHash,
    /// The hash of this entry.
    pub hash: ChainHash,
}

/// An entry whose payload cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("log entry {revision}: {source}")]
pub struct PayloadDecodeError {
    /// The revision of the entry.
    pub revision: Revision,
    /// The cause of the failure.
    pub source: serde_json::Error,
}

impl LogEntry {
    /// The entry with its change, read from the payload.
    ///
    /// # Errors
    /// When that is no change that this version knows.
    pub fn decode_change(self) -> Result<(LogEntry, RecordChange), PayloadDecodeError> {
        match serde_json::from_str(&self.payload) {
            Ok(change) => Ok((self, change)),
            Err(source) => Err(PayloadDecodeError { revision: self.revision, source }),
        }
    }

    /// Whether its change may take something away. What this version does not know may.
    #[must_use]
    pub fn may_restrict(&self) -> bool {
        !matches!(
            AuditAction::parse(&self.action),
            Some(
                AuditAction::KeyCreated
                    | AuditAction::KeyImported
                    | AuditAction::KeyEnabled
                    | AuditAction::AccountCreated
                    | AuditAction::AccountResumed
                    | AuditAction::LogArchived
                    | AuditAction::DatabaseLossAccepted
            )
        )
    }

    /// The hash that this entry must have: SHA-256 over a version tag, the hash before, the two numbers as
    /// 8 bytes big-endian, and every text with its length as 8 bytes big-endian before it. An absent value
    /// has the length 2^64-1, so that it differs from an empty one.
    #[must_use]
    pub fn compute_hash(&self) -> ChainHash {
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
    pub fn follows(&self, revision: Revision, hash: &ChainHash) -> bool {
        self.revision == revision.next() && self.prev_hash == *hash && self.hash == self.compute_hash()
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::domain::key::tests::{at_seconds, sample_key};

    pub(crate) fn sample_entry(revision: u64, prev_hash: ChainHash) -> LogEntry {
        let change = RecordChange::Key(Arc::new(sample_key()));
        let mut row = LogEntry {
            revision: Revision(revision),
            at: at_seconds(1),
            action: AuditAction::KeyCreated.as_str().to_owned(),
            account: change.account_id().cloned(),
            key_id: change.key_id(),
            user: None,
            actor: Actor::SYSTEM.to_string(),
            actor_account: None,
            acting_user: None,
            method: "test".to_owned(),
            payload: serde_json::to_string(&change).unwrap(),
            prev_hash,
            hash: GENESIS_HASH,
        };
        row.hash = row.compute_hash();
        row
    }

    #[test]
    fn a_chain_follows_link_by_link() {
        let first = sample_entry(1, GENESIS_HASH);
        let second = sample_entry(2, first.hash);
        assert!(first.follows(Revision(0), &GENESIS_HASH));
        assert!(second.follows(Revision(1), &first.hash));
        assert!(!second.follows(Revision(0), &first.hash), "a gap");
        assert!(!second.follows(Revision(1), &GENESIS_HASH), "another history");
    }

    #[test]
    fn every_field_is_under_the_hash() {
        let whole = sample_entry(1, GENESIS_HASH);
        let turns: [fn(&mut LogEntry); 10] = [
            |r| r.at = at_seconds(2),
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
            assert!(!changed.follows(Revision(0), &GENESIS_HASH), "{changed:?}");
        }
    }

    #[test]
    fn a_change_reads_back_from_the_log() {
        let change = RecordChange::Key(Arc::new(sample_key())).with_revision(Revision(7));
        let text = serde_json::to_string(&change).unwrap();
        assert_eq!(serde_json::from_str::<RecordChange>(&text).unwrap(), change);
    }

    #[test]
    fn actions_read_back() {
        assert_eq!(AuditAction::parse(AuditAction::KeyRotated.as_str()), Some(AuditAction::KeyRotated));
        assert_eq!(AuditAction::parse("nope"), None);
    }
}
