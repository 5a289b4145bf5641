//! The trait [`Store`]: what every database backend implements, and all that the rest of Keyward knows of one.
//!
//! A store takes digests and timestamps, never tokens or clocks. It enforces uniqueness (names, digests, idempotency
//! keys, revisions) and the expected revisions of a write. It knows nothing of permissions.

use std::sync::Arc;

use async_trait::async_trait;
use tokio::time::Instant;

use crate::domain::{
    account::{Account, AccountMember, Role},
    limit::QuotaUsage,
    log::LogEntry,
    name::{AccountId, IdempotencyKey, KeyId, UserId},
    time::{Revision, Timestamp},
};

use super::{
    bulk::BulkReader,
    error::{CommitError, StoreError},
    records::{ArchiveCheckpoint, KeyFilter, LogFilter, LogHead, StoredKey},
    replica_registry::ReplicaRegistry,
    snapshot_loader::SnapshotLoader,
    usage_records::{UsageBatch, UsageCount, UsageHour},
    write_request::{CommittedBatch, WriteRequest},
};

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
