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

/// The contract of a database backend. A read sees everything that was committed before it began.
#[async_trait]
pub trait Store: Send + Sync + 'static {
    /// The newest revision and its hash.
    async fn log_head(&self) -> Result<LogHead, StoreError>;

    /// Commits a batch in one transaction, durably. A rejected write does not affect the others.
    async fn commit(&self, batch: &[WriteRequest]) -> Result<CommittedBatch, CommitError>;

    /// The log after `revision`, in ascending order; at most `limit` entries.
    async fn list_log_after(&self, revision: Revision, limit: u32) -> Result<Vec<LogEntry>, StoreError>;

    /// Streams everything that a Check needs, as of one revision, and returns that revision. Keys that were revoked and
    /// secrets that were superseded before `forget_before` are left out.
    ///
    /// After an error, or if the future is dropped, `loader` may still receive keys for a moment.
    async fn stream_snapshot(
        &self,
        forget_before: Timestamp,
        loader: &Arc<dyn SnapshotLoader>,
    ) -> Result<LogHead, StoreError>;

    /// The key with this id, with the last use of each secret.
    async fn get_key(&self, id: KeyId) -> Result<Option<StoredKey>, StoreError>;

    /// Keys with ids below `before`, in descending order of their ids; at most `limit`.
    async fn list_keys(
        &self,
        filter: &KeyFilter,
        before: Option<KeyId>,
        limit: u32,
    ) -> Result<Vec<StoredKey>, StoreError>;

    /// The account with exactly this id.
    async fn get_account(&self, id: &AccountId) -> Result<Option<Account>, StoreError>;

    /// Accounts with ids above `after`, in ascending order; at most `limit`.
    async fn list_accounts(&self, after: Option<&AccountId>, limit: u32) -> Result<Vec<Account>, StoreError>;

    /// Entries of the log in the order of the filter; at most `limit`. `cursor` is the last entry of the previous page.
    async fn list_log(
        &self,
        filter: &LogFilter,
        cursor: Option<Revision>,
        limit: u32,
    ) -> Result<Vec<LogEntry>, StoreError>;

    /// The entries at these revisions, in any order; missing ones are left out.
    async fn get_log_entries(&self, revisions: &[Revision]) -> Result<Vec<LogEntry>, StoreError>;

    /// The keys with these ids, in any order; missing ones are left out.
    async fn get_keys(&self, ids: &[KeyId]) -> Result<Vec<StoredKey>, StoreError>;

    /// A reader of the log and of keys for a caller that will read about this many entries.
    fn bulk_reader(&self, entries: u64) -> Box<dyn BulkReader + '_>;

    /// The newest checkpoint; `None` if nothing was archived.
    async fn newest_checkpoint(&self) -> Result<Option<ArchiveCheckpoint>, StoreError>;

    /// Records a checkpoint, then deletes the entries up to it from the log in small batches. A call with the same
    /// checkpoint resumes an interrupted one.
    async fn archive_log(&self, checkpoint: &ArchiveCheckpoint) -> Result<(), StoreError>;

    /// The key that was created or rotated under an idempotency key at or after `since`, and the fingerprint of that
    /// request.
    async fn find_idempotent_request(
        &self,
        caller: KeyId,
        key: &IdempotencyKey,
        since: Timestamp,
    ) -> Result<Option<(KeyId, [u8; 32])>, StoreError>;

    /// The roles of an account and the global ones; without an account, only the global ones. Sorted by name.
    async fn list_roles(&self, account: Option<&AccountId>) -> Result<Vec<Role>, StoreError>;

    /// Members of an account with users above `after`, in ascending order; at most `limit`.
    async fn list_members(
        &self,
        account: &AccountId,
        after: Option<&UserId>,
        limit: u32,
    ) -> Result<Vec<AccountMember>, StoreError>;

    /// All memberships of a user, in any account.
    async fn list_memberships(&self, user: &UserId) -> Result<Vec<AccountMember>, StoreError>;

    /// Writes usage in one transaction. Entries of unknown keys or secrets are skipped.
    ///
    /// Units of a quota are added to those of the same period. A later period starts at zero. So does a longer period
    /// that contains the start of the stored one: the quota then has another kind of period. Units of a past period are
    /// dropped. Returns the present usage of each quota in the batch, by all processes.
    ///
    /// If the answer is lost, it is unknown whether the units were added: sent again, they may count twice.
    async fn record_usage(&self, batch: &UsageBatch) -> Result<Vec<(KeyId, QuotaUsage)>, StoreError>;

    /// The counts of a key from hour `from` up to but not including `to`, in ascending order.
    async fn list_usage(
        &self,
        key: KeyId,
        from: UsageHour,
        to: UsageHour,
    ) -> Result<Vec<UsageCount>, StoreError>;

    /// Deletes the counts of hours before `before`.
    async fn prune_usage(&self, before: UsageHour) -> Result<(), StoreError>;

    /// Waits until no commit of this process is in progress, even one whose answer was lost. Then it verifies that the
    /// log continues the history that this process knows. Whatever the log does not contain then was not recorded.
    async fn settle_pending_commits(&self) -> Result<(), StoreError>;

    /// The coordination of replicas; `None` if one process owns the database.
    fn replica_registry(self: Arc<Self>) -> Option<Arc<dyn ReplicaRegistry>>;

    /// Whether all reads and commits since then were answered by one server. A replaced primary still answers reads but
    /// cannot commit. So if a commit and the reads before it came from one server, these reads were current.
    fn is_single_server_since(&self, since: Instant) -> bool;

    /// Waits until the database is found damaged or owned by another process. Never returns for a backend that does not
    /// check this.
    async fn wait_until_unusable(&self);

    /// Ends all work and closes the database.
    async fn close(&self);
}
