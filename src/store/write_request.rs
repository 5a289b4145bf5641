//! The write requests that a batch consists of, and the outcome of each.

use std::time::Duration;

use crate::domain::{
    account::AccountLimitReached,
    account::AccountLimits,
    log::{Actor, AuditAction, LogEntry, RecordChange},
    name::{AccountId, IdempotencyKey, KeyId},
    time::{Revision, Timestamp},
};

use super::read_set::ReadSet;

/// How long an idempotency key counts.
pub const IDEMPOTENCY_WINDOW: Duration = Duration::from_secs(24 * 60 * 60);

/// A request that may be sent again.
#[derive(Clone, Debug)]
pub struct IdempotentRequest {
    /// Who sends it.
    pub caller: KeyId,
    /// The caller's name for it.
    pub key: IdempotencyKey,
    /// SHA-256 over everything it asks.
    pub fingerprint: [u8; 32],
}

/// One change on its way.
#[derive(Clone, Debug)]
pub struct WriteRequest {
    /// The record after the change; its own revision is set at commit.
    pub change: RecordChange,
    /// The record's revision that the change is made from; `None` = the record must not exist.
    pub expected_revision: Option<Revision>,
    /// What happens.
    pub action: AuditAction,
    /// Who does it.
    pub actor: Actor,
    /// The RPC or command.
    pub method: &'static str,
    /// When.
    pub at: Timestamp,
    /// The name under which the same request is done once.
    pub idempotency: Option<IdempotentRequest>,
    /// What was read to authorize it; empty if nobody had to be authorized.
    pub read_set: ReadSet,
    /// The limits of the account concerned, to which the transaction holds it; `None` = it is held to none. What takes
    /// something away never is.
    pub limits: Option<AccountLimits>,
}

impl WriteRequest {
    /// A change that Keyward makes itself: nobody has to be authorized for it, and no limit holds it.
    #[must_use]
    pub fn from_system(
        change: RecordChange,
        expect: Option<Revision>,
        action: AuditAction,
        method: &'static str,
        at: Timestamp,
    ) -> WriteRequest {
        WriteRequest {
            change,
            expected_revision: expect,
            action,
            actor: Actor::SYSTEM,
            method,
            at,
            idempotency: None,
            read_set: ReadSet::default(),
            limits: None,
        }
    }
}

/// What became of one write of a committed batch.
#[derive(Clone, Debug)]
pub enum WriteOutcome {
    /// Recorded.
    Applied(RecordChange),
    /// Done before, for this key; nothing was recorded now.
    Replayed(KeyId),
}

/// Why one write of a batch was left out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WriteRejection {
    /// The record is not at the revision expected, or exists already.
    Conflict,
    /// A record that the authorization has read is no longer as it was, or its time is over: authorize again.
    AuthorizationChanged,
    /// Another key of the owner that is not revoked has the name.
    NameTaken,
    /// This account's id differs from the new one only in case.
    AccountIdDiffersInCase(AccountId),
    /// The digest is known already.
    DigestTaken,
    /// Another request was made under this idempotency key.
    IdempotencyReused,
    /// A role that the record names does not exist in its account, nor globally.
    RoleNotFound,
    /// The account, or the user, has reached a limit.
    AccountLimitReached(AccountLimitReached),
    /// Registered replicas of an older release could not read the log entry.
    ReplicaTooOld {
        /// What they cannot read: `scope "repo/write"`.
        value: String,
        /// Their names; at least one.
        replicas: Vec<String>,
    },
    /// The role to be deleted is in use.
    RoleInUse {
        /// By so many keys that are not revoked.
        keys: u64,
        /// And so many members.
        members: u64,
    },
}

/// A committed batch.
#[derive(Debug, Default)]
pub struct CommittedBatch {
    /// One for each write, in order.
    pub outcomes: Vec<Result<WriteOutcome, WriteRejection>>,
    /// The new log rows with their changes, in revision order.
    pub entries: Vec<(LogEntry, RecordChange)>,
}
