//! Where keys, accounts and the log are kept. The trait [`Store`] is the contract; nobody outside this folder
//! names a backend, and SQL stands nowhere else.
//!
//! A store takes digests and instants, never tokens or clocks. It knows what may not collide (names, digests,
//! idempotency keys, revisions) and what must not have moved, and nothing of who may do what.
//!
//! Every change is one [`WriteRequest`]: a whole record, the revision that the caller saw, what was read to authorize it, and the log entry. Writes
//! are committed in batches; inside a batch each stands or falls alone, and revisions count in commit order
//! without gaps. A follower that has applied revision `n` has seen every change up to `n`.

mod backend;
mod bulk;
pub mod group_commit;
pub mod inspect;
mod log_fence;
mod open;
mod owner_tally;
pub mod page_budget;
mod parse_cache;
mod postgres;
mod pre_state;
mod queries;
mod read_set;
pub mod replica_registry;
mod row_decoding;
mod row_format;
mod secret_join;
mod snapshot_loader;
pub mod sqlite;
mod write_plan;

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use tokio::time::Instant;

pub use bulk::{BulkReader, RowFault};
pub use open::{
    MigrationStep, OpenError, SchemaPolicy, backup, check_reachable, check_url, migrate, open, open_existing,
    open_with_schema, open_without_wal, sqlite_file,
};
pub use read_set::{ReadSet, ReadState, RecordId};
pub use snapshot_loader::{LoadedKey, SnapshotLoader, SnapshotPart};

use replica_registry::ReplicaRegistry;

use crate::domain::{
    account::{Account, AccountLimitReached, AccountLimits, AccountMember, Role},
    key::{ApiKey, ApiKeyState, KeySecret},
    limit::{PendingQuotaUnits, QuotaUsage},
    log::{Actor, AuditAction, ChainHash, LogEntry, RecordChange},
    name::{AccountId, EnvironmentName, IdempotencyKey, KeyId, UserId},
    policy_decision::Reason,
    time::{Revision, Timestamp},
};

/// How long an idempotency key counts.
pub const IDEMPOTENCY_WINDOW: Duration = Duration::from_secs(24 * 60 * 60);

/// Why a read or a write did not happen.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The database did not answer, or answered with a fault.
    #[error("the database failed")]
    Unavailable(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The database has no room left.
    #[error("the database is full")]
    Full(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// This process no longer owns the database file. It ends.
    #[error("this process no longer owns the database file: {0}")]
    OwnershipLost(&'static str),
    /// A row contradicts itself.
    #[error(
        "the database is damaged: {0}. Restore the newest backup (with its -wal file, if it has one); keep the \
         damaged files for a look"
    )]
    Damaged(String),
}

/// Why a batch was not committed.
#[derive(Debug, thiserror::Error)]
pub enum CommitError {
    /// Certainly nothing of it is recorded.
    #[error("the change was not recorded")]
    NotRecorded(#[source] StoreError),
    /// It may be recorded.
    #[error("whether the change was recorded is unknown")]
    Unknown(#[source] StoreError),
}

/// Where the log ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogHead {
    /// The newest revision.
    pub revision: Revision,
    /// Its hash.
    pub hash: ChainHash,
}

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

/// A record of the snapshot.
#[derive(Debug)]
pub enum SnapshotRecord {
    /// An account.
    Account(Account),
    /// A key, with the superseded secrets that left its record. Hints are left out of either, and of a revoked key all that
    /// it granted: see [`LoadedKey`].
    Key(Arc<ApiKey>, Vec<KeySecret>),
    /// A role.
    Role(Role),
    /// A member.
    Member(AccountMember),
    /// What is spent of the quota of a key that is not revoked; after its key.
    QuotaUsage(KeyId, QuotaUsage),
}

/// A key with what is known of its use.
#[derive(Clone, Debug)]
pub struct StoredKey {
    /// The record.
    pub key: ApiKey,
    /// When each secret version was last used, those that left the record included.
    pub last_used: Vec<(u32, Timestamp)>,
}

/// Whose keys.
#[derive(Clone, Debug)]
pub enum OwnerFilter {
    /// Service keys of this account.
    Account(AccountId),
    /// User keys of this user.
    User(UserId),
    /// Every key but those of the operator account.
    ExceptOperator,
}

/// Which keys of an owner.
#[derive(Clone, Debug)]
pub struct KeyFilter {
    /// Whose.
    pub owner: OwnerFilter,
    /// Only of this environment.
    pub environment: Option<EnvironmentName>,
    /// Only in one of these states at `now`. Empty = in any.
    pub states: Vec<ApiKeyState>,
    /// Only with a name that starts so: in Unicode Normalization Form C.
    pub name_prefix: String,
    /// Only created before then, and not used since.
    pub unused_since: Option<Timestamp>,
    /// Only expiring before then.
    pub expires_before: Option<Timestamp>,
    /// Only created before then.
    pub created_before: Option<Timestamp>,
    /// The instant at which states are told.
    pub now: Timestamp,
}

/// Which log entries.
#[derive(Clone, Debug, Default)]
pub struct LogFilter {
    /// Only about this account.
    pub account: Option<AccountId>,
    /// Only about this key.
    pub key_id: Option<KeyId>,
    /// Only by this actor.
    pub actor: Option<String>,
    /// Only from this instant on.
    pub from: Option<Timestamp>,
    /// Only before this instant.
    pub to: Option<Timestamp>,
    /// Only made for this person.
    pub acting_user: Option<UserId>,
    /// Only of this action.
    pub action: Option<String>,
    /// Only after this revision.
    pub after: Revision,
    /// The oldest first; else the newest.
    pub oldest_first: bool,
}

/// Up to where the log was archived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ArchiveCheckpoint {
    /// The last entry that is not in the log any more; the next one leads to its hash.
    pub head: LogHead,
    /// How many entries are in files, all archives together.
    pub entry_count: u64,
    /// When it was made.
    pub made_at: Timestamp,
}

/// A use of one secret, to be kept as the latest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SecretUse {
    /// The key.
    pub key_id: KeyId,
    /// The secret's version.
    pub version: u32,
    /// When.
    pub at: Timestamp,
}

/// An hour, counted from 1970 (UTC).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct UsageHour(pub i64);

impl UsageHour {
    const MICROS_PER_HOUR: i64 = 3_600_000_000;

    /// The hour that an instant lies in.
    #[must_use]
    pub fn from_timestamp(at: Timestamp) -> UsageHour {
        UsageHour(at.as_micros().div_euclid(Self::MICROS_PER_HOUR))
    }

    /// Its first instant.
    #[must_use]
    pub fn start(self) -> Timestamp {
        Timestamp::from_micros(self.0.saturating_mul(Self::MICROS_PER_HOUR))
    }
}

/// Checks of a key in an hour with one reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UsageCount {
    /// The key.
    pub key_id: KeyId,
    /// The hour.
    pub hour: UsageHour,
    /// The reason.
    pub reason: Reason,
    /// How many.
    pub count: u64,
}

/// What Checks have left to be written behind.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UsageBatch {
    /// The latest use of each secret.
    pub secret_uses: Vec<SecretUse>,
    /// Counts to be added.
    pub counts: Vec<UsageCount>,
    /// Units of quotas to be added to what is spent of them.
    pub quota_units: Vec<(KeyId, PendingQuotaUnits)>,
}

/// The contract of a backend. Reads see everything that was committed before they began.
#[async_trait]
pub trait Store: Send + Sync + 'static {
    /// Where the log ends.
    async fn log_head(&self) -> Result<LogHead, StoreError>;

    /// Commits a batch in one transaction; it is durable when this returns. A write that is rejected leaves
    /// the others alone.
    async fn commit(&self, batch: &[WriteRequest]) -> Result<CommittedBatch, CommitError>;

    /// The log after `revision`, in order, at most `limit` rows.
    async fn list_log_after(&self, revision: Revision, limit: u32) -> Result<Vec<LogEntry>, StoreError>;

    /// Everything that a Check needs, as of one revision, which is returned. Keys revoked and secrets
    /// superseded before `forget_before` are left out. After a fault, or when this is given up, `loader` may still hear of
    /// keys for a moment.
    async fn stream_snapshot(
        &self,
        forget_before: Timestamp,
        loader: &Arc<dyn SnapshotLoader>,
    ) -> Result<LogHead, StoreError>;

    /// One key.
    async fn get_key(&self, id: KeyId) -> Result<Option<StoredKey>, StoreError>;

    /// Keys before `before` in the order of falling ids, at most `limit`.
    async fn list_keys(
        &self,
        filter: &KeyFilter,
        before: Option<KeyId>,
        limit: u32,
    ) -> Result<Vec<StoredKey>, StoreError>;

    /// One account.
    async fn get_account(&self, id: &AccountId) -> Result<Option<Account>, StoreError>;

    /// Accounts after `after` in the order of their ids, at most `limit`.
    async fn list_accounts(&self, after: Option<&AccountId>, limit: u32) -> Result<Vec<Account>, StoreError>;

    /// Log entries in the order of the filter, at most `limit`: those that come behind `cursor`, which is the last one
    /// of the page before.
    async fn list_log(
        &self,
        filter: &LogFilter,
        cursor: Option<Revision>,
        limit: u32,
    ) -> Result<Vec<LogEntry>, StoreError>;

    /// The entries at these revisions, in no order; those that there are.
    async fn get_log_entries(&self, revisions: &[Revision]) -> Result<Vec<LogEntry>, StoreError>;

    /// The keys with these ids, in no order; those that there are.
    async fn get_keys(&self, ids: &[KeyId]) -> Result<Vec<StoredKey>, StoreError>;

    /// A reader of the log and of the keys, for whoever is about to read this many entries.
    fn bulk_reader(&self, entries: u64) -> Box<dyn BulkReader + '_>;

    /// The newest checkpoint; None = nothing was archived.
    async fn newest_checkpoint(&self) -> Result<Option<ArchiveCheckpoint>, StoreError>;

    /// Notes a checkpoint, and takes the entries up to it out of the log, a few at a time. Called again with the same one
    /// it goes on where it was broken off.
    async fn archive_log(&self, checkpoint: &ArchiveCheckpoint) -> Result<(), StoreError>;

    /// The key that was made or rotated under an idempotency key at or after `since`, and the fingerprint.
    async fn find_idempotent_request(
        &self,
        caller: KeyId,
        key: &IdempotencyKey,
        since: Timestamp,
    ) -> Result<Option<(KeyId, [u8; 32])>, StoreError>;

    /// The roles of an account, global ones included; or the global ones alone. In the order of their names.
    async fn list_roles(&self, account: Option<&AccountId>) -> Result<Vec<Role>, StoreError>;

    /// Members of an account after `after` in the order of their users, at most `limit`.
    async fn list_members(
        &self,
        account: &AccountId,
        after: Option<&UserId>,
        limit: u32,
    ) -> Result<Vec<AccountMember>, StoreError>;

    /// Every membership of a user.
    async fn list_memberships(&self, user: &UserId) -> Result<Vec<AccountMember>, StoreError>;

    /// Writes what Checks have left, in one transaction. A key or secret that is gone is skipped.
    ///
    /// Units of a quota are added to those of the same period. A later period starts afresh, and so does a longer
    /// one that the known one began in: the quota has another kind of period then. Units of a period that is over
    /// are dropped. Gives what is spent now of each quota that the batch has units of, by all who write.
    ///
    /// An answer that is lost leaves open whether the units were added: sent again, they may count twice.
    async fn record_usage(&self, batch: &UsageBatch) -> Result<Vec<(KeyId, QuotaUsage)>, StoreError>;

    /// The counts of a key from one hour to before another, in the order of hours.
    async fn list_usage(
        &self,
        key: KeyId,
        from: UsageHour,
        to: UsageHour,
    ) -> Result<Vec<UsageCount>, StoreError>;

    /// Drops counts of hours before `before`.
    async fn prune_usage(&self, before: UsageHour) -> Result<(), StoreError>;

    /// Waits until no commit of this process is under way any more, one whose answer was lost included, and sees that
    /// the database goes on from what this process knows of it. What the log does not hold then was not recorded.
    async fn settle_pending_commits(&self) -> Result<(), StoreError>;

    /// What replicas need of the database; `None` where one process owns it.
    fn replica_registry(self: Arc<Self>) -> Option<Arc<dyn ReplicaRegistry>>;

    /// Whether all that was read and committed since then came from one server. A primary that was replaced answers reads,
    /// and commits nothing: what a commit follows was the newest there was, if both were on the same server.
    fn is_single_server_since(&self, since: Instant) -> bool;

    /// Waits until the database is found damaged or owned by another process. Never returns for a backend that does not
    /// check this.
    async fn wait_until_unusable(&self);

    /// Ends all work and lets go of the database.
    async fn close(&self);
}
