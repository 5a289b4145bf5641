//! The writes that a batch consists of, and the outcome of each.
//!
//! A write carries everything that its transaction needs: nothing else is read to decide it but the tables.

use std::time::Duration;

use crate::domain::{
    account::AccountLimitReached,
    account::AccountLimits,
    log::{Actor, AuditAction, LogEntry, RecordChange},
    name::{AccountId, IdempotencyKey, KeyId},
    time::{Revision, Timestamp},
};

use super::read_set::ReadSet;

/// How long a repeated request with the same idempotency key returns the first result.
pub const IDEMPOTENCY_WINDOW: Duration = Duration::from_secs(24 * 60 * 60);

/// An idempotency key, with what it was sent for.
#[derive(Clone, Debug)]
pub struct IdempotentRequest {
    /// The calling key; idempotency keys of different callers are independent.
    pub caller: KeyId,
    /// The name that the caller chose for the request.
    pub key: IdempotencyKey,
    /// SHA-256 of the whole request. Another fingerprint under the same key is rejected.
    pub fingerprint: [u8; 32],
}

/// One change of one record, with its log entry and its preconditions.
#[derive(Clone, Debug)]
pub struct WriteRequest {
    /// The record after the change. Its own revision is set by the commit.
    pub change: RecordChange,
    /// The revision of the record that the change is based on; `None`: the record must not exist.
    pub expected_revision: Option<Revision>,
    /// The action that the log entry records.
    pub action: AuditAction,
    /// The actor that the log entry records.
    pub actor: Actor,
    /// The RPC or command that the log entry records.
    pub method: &'static str,
    /// The time of the change, which the log entry records.
    pub at: Timestamp,
    /// The idempotency key, if the request has one.
    pub idempotency: Option<IdempotentRequest>,
    /// The records that were read to authorize the change; empty if no authorization was needed.
    pub read_set: ReadSet,
    /// The limits of the account concerned, which the transaction enforces; `None`: no limit applies. A change that
    /// only removes rights has none.
    pub limits: Option<AccountLimits>,
}

impl WriteRequest {
    /// A change that Keyward makes by itself: it needs no authorization, and no limit applies.
    #[must_use]
    pub fn from_system(
        change: RecordChange,
        expected_revision: Option<Revision>,
        action: AuditAction,
        method: &'static str,
        at: Timestamp,
    ) -> WriteRequest {
        WriteRequest {
            change,
            expected_revision,
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

/// The outcome of one accepted write of a committed batch.
#[derive(Clone, Debug)]
pub enum WriteOutcome {
    /// The change was recorded; contains the record with its new revision.
    Applied(RecordChange),
    /// The same request was recorded earlier and created this key; nothing was recorded now.
    Replayed(KeyId),
}

/// The reason why one write of a batch was left out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WriteRejection {
    /// The record is not at the expected revision, or already exists.
    Conflict,
    /// A record that was read for the authorization has changed, or the authorization has expired. The caller must
    /// authorize again.
    AuthorizationChanged,
    /// Another unrevoked key of the owner has this name.
    NameTaken,
    /// The new account id differs only in case from this existing one.
    AccountIdDiffersInCase(AccountId),
    /// Another secret has the same digest.
    DigestTaken,
    /// A different request was made under this idempotency key.
    IdempotencyReused,
    /// The record names a role that exists neither in its account nor globally.
    RoleNotFound,
    /// The account or the user has reached a limit.
    AccountLimitReached(AccountLimitReached),
    /// Registered replicas of an older release cannot read the log entry.
    ReplicaTooOld {
        /// The value that they cannot read, such as `scope "repo/write"`.
        value: String,
        /// The names of these replicas; at least one.
        replicas: Vec<String>,
    },
    /// The role cannot be deleted while it is in use.
    RoleInUse {
        /// The number of unrevoked keys that have the role.
        keys: u64,
        /// The number of members that have the role.
        members: u64,
    },
}

/// The result of a committed batch.
#[derive(Debug, Default)]
pub struct CommittedBatch {
    /// One result for each write, in the order of the batch.
    pub outcomes: Vec<Result<WriteOutcome, WriteRejection>>,
    /// The new log entries with their changes, in the order of their revisions.
    pub entries: Vec<(LogEntry, RecordChange)>,
}
