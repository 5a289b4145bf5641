//! Implements [`Store`] once for both databases.
//!
//! A [`StoreBackend`] runs queries and transactions. `queries.rs` has the SQL of reads, `row_decoding.rs` turns rows
//! into records. What a transaction writes is the backend's.

use std::sync::Arc;

use async_trait::async_trait;
use sqlx::Database;
use tokio::time::Instant;

use crate::domain::{
    account::{Account, AccountMember, Role},
    limit::QuotaUsage,
    log::{GENESIS_HASH, LogEntry},
    name::{AccountId, IdempotencyKey, KeyId, UserId},
    time::{Revision, Timestamp},
};

use super::{
    ArchiveCheckpoint, BulkReader, CommitError, CommittedBatch, KeyFilter, LogFilter, LogHead,
    SnapshotLoader, SnapshotRecord, Store, StoreError, StoredKey, UsageBatch, UsageCount, UsageHour,
    WriteRequest,
    queries::{self, SqlDialect, SqlQuery},
    replica_registry::ReplicaRegistry,
    row_decoding::{
        KeyAssembler, RowColumns, decode_account, decode_checkpoint, decode_head, decode_log_entry,
        decode_member, decode_quota_usage, decode_role, decode_usage_count, fixed_bytes,
    },
    row_format::damaged_error,
};

/// How many of the newest entries are verified at the start. AuditService.Verify verifies all of them.
const ENTRIES_VERIFIED_AT_OPEN: u64 = 100_000;

/// How many entries one transaction deletes from the log: other writers wait meanwhile.
const ARCHIVE_DELETE_BATCH: u32 = 10_000;

/// The row type of a database.
pub(super) type DatabaseRow<D> = <D as Database>::Row;

/// Receives the rows of a query one by one.
pub(super) type RowVisitor<'t, D> = &'t mut (dyn FnMut(&DatabaseRow<D>) -> Result<(), StoreError> + Send);

/// Receives entries of the log one by one.
pub(super) type EntryVisitor<'t> = &'t mut (dyn FnMut(LogEntry) -> Result<(), StoreError> + Send);

/// The operations that a database implements for the store.
#[async_trait]
pub(super) trait StoreBackend: Send + Sync + Sized + 'static {
    type QueryDatabase: SqlDialect<Row: RowColumns>;
    /// The type of a row that [`StoreBackend::fetch_rows`] returns.
    type QueryRow: RowColumns + Send + Sync;

    /// The rows of one query, at most one page.
    async fn fetch_rows(
        &self,
        query: SqlQuery<Self::QueryDatabase>,
    ) -> Result<Vec<Self::QueryRow>, StoreError>;

    /// Entries of the log, at most one page.
    async fn fetch_log_page(
        &self,
        query: SqlQuery<Self::QueryDatabase>,
    ) -> Result<Vec<LogEntry>, StoreError> {
        fetch_all(self, query, decode_log_entry).await
    }

    /// The keys with these ids, in any order.
    async fn fetch_keys_by_id(&self, ids: &[KeyId]) -> Result<Vec<StoredKey>, StoreError> {
        fetch_keys(self, queries::keys_by_id(ids)).await
    }

    /// Implements [`Store::bulk_reader`] for this database.
    fn bulk(&self, entries: u64) -> Box<dyn BulkReader + '_>;

    /// Passes each entry of the log after a revision to `take`, in order, while they arrive.
    async fn for_each_entry(&self, after: Revision, take: EntryVisitor<'_>) -> Result<(), StoreError>;

    /// Implements [`Store::commit`] for this database.
    async fn commit_batch(&self, batch: &[WriteRequest]) -> Result<CommittedBatch, CommitError>;

    /// Implements [`Store::stream_snapshot`]: opens a view of one revision and passes it to [`read_snapshot`].
    async fn load_snapshot(
        &self,
        forget_before: Timestamp,
        loader: &Arc<dyn SnapshotLoader>,
    ) -> Result<LogHead, StoreError>;

    /// Implements [`Store::record_usage`] for this database.
    async fn write_usage(&self, batch: &UsageBatch) -> Result<Vec<(KeyId, QuotaUsage)>, StoreError>;

    /// Implements [`Store::prune_usage`] for this database.
    async fn delete_usage_rows(&self, before: UsageHour) -> Result<(), StoreError>;

    /// Records a checkpoint, unless it is recorded already.
    async fn insert_checkpoint(&self, checkpoint: &ArchiveCheckpoint) -> Result<(), StoreError>;

    /// Deletes at most `limit` entries up to a revision, the oldest first. Returns how many it deleted.
    async fn delete_log_entries(&self, up_to: Revision, limit: u32) -> Result<u64, StoreError>;

    /// Implements [`Store::replica_registry`] for this database.
    fn as_replica_registry(self: Arc<Self>) -> Option<Arc<dyn ReplicaRegistry>>;

    /// Implements [`Store::wait_until_unusable`] for this database.
    async fn wait_until_lost(&self);

    /// Implements [`Store::settle_pending_commits`] for this database.
    async fn resolve_pending_commits(&self) -> Result<(), StoreError>;

    /// Implements [`Store::is_single_server_since`] for this database.
    fn has_single_server_since(&self, since: Instant) -> bool;

    /// Implements [`Store::close`] for this database.
    async fn shutdown(&self);
}

/// Reads that all see the same revision.
#[async_trait]
pub(super) trait SnapshotView: Send {
    type ViewDatabase: SqlDialect<Row: RowColumns>;

    /// Passes each row of a query to `take` while it arrives.
    async fn for_each_row(
        &mut self,
        query: SqlQuery<Self::ViewDatabase>,
        take: RowVisitor<'_, Self::ViewDatabase>,
    ) -> Result<(), StoreError>;

    /// Passes every key that was not revoked before `forget_before` to `loader`, while they arrive.
    async fn load_keys(
        &mut self,
        forget_before: Timestamp,
        loader: &Arc<dyn SnapshotLoader>,
    ) -> Result<(), StoreError>;
}

async fn fetch_all<B: StoreBackend, T>(
    backend: &B,
    query: SqlQuery<B::QueryDatabase>,
    record_at: impl Fn(&B::QueryRow) -> Result<T, StoreError> + Send,
) -> Result<Vec<T>, StoreError> {
    backend.fetch_rows(query).await?.iter().map(record_at).collect()
}

/// Keys with their secrets, in the order of the rows.
async fn fetch_keys<B: StoreBackend>(
    backend: &B,
    query: SqlQuery<B::QueryDatabase>,
) -> Result<Vec<StoredKey>, StoreError> {
    let mut assembler = KeyAssembler::default();
    let mut keys = Vec::new();
    for row in &backend.fetch_rows(query).await? {
        keys.extend(assembler.push_row(row)?);
    }
    keys.extend(assembler.finish()?);
    Ok(keys)
}

#[async_trait]
impl<B: StoreBackend> Store for B {
    async fn log_head(&self) -> Result<LogHead, StoreError> {
        let found = fetch_all(self, queries::head(), decode_head).await?;
        found.into_iter().next().ok_or_else(|| damaged_error("meta", "it has no row"))
    }

    async fn commit(&self, batch: &[WriteRequest]) -> Result<CommittedBatch, CommitError> {
        self.commit_batch(batch).await
    }

    async fn list_log_after(&self, revision: Revision, limit: u32) -> Result<Vec<LogEntry>, StoreError> {
        self.fetch_log_page(queries::log_after(revision, limit)).await
    }

    async fn stream_snapshot(
        &self,
        forget_before: Timestamp,
        loader: &Arc<dyn SnapshotLoader>,
    ) -> Result<LogHead, StoreError> {
        self.load_snapshot(forget_before, loader).await
    }

    async fn get_key(&self, id: KeyId) -> Result<Option<StoredKey>, StoreError> {
        Ok(fetch_keys(self, queries::key(id)).await?.pop())
    }

    async fn list_keys(
        &self,
        filter: &KeyFilter,
        before: Option<KeyId>,
        limit: u32,
    ) -> Result<Vec<StoredKey>, StoreError> {
        fetch_keys(self, queries::keys(filter, before, limit)).await
    }

    async fn get_account(&self, id: &AccountId) -> Result<Option<Account>, StoreError> {
        Ok(fetch_all(self, queries::account(id), decode_account).await?.pop())
    }

    async fn list_accounts(&self, after: Option<&AccountId>, limit: u32) -> Result<Vec<Account>, StoreError> {
        fetch_all(self, queries::accounts(after, limit), decode_account).await
    }

    async fn list_log(
        &self,
        filter: &LogFilter,
        cursor: Option<Revision>,
        limit: u32,
    ) -> Result<Vec<LogEntry>, StoreError> {
        self.fetch_log_page(queries::log(filter, cursor, limit)).await
    }

    async fn get_log_entries(&self, revisions: &[Revision]) -> Result<Vec<LogEntry>, StoreError> {
        self.fetch_log_page(queries::log_entries(revisions)).await
    }

    async fn get_keys(&self, ids: &[KeyId]) -> Result<Vec<StoredKey>, StoreError> {
        self.fetch_keys_by_id(ids).await
    }

    fn bulk_reader(&self, entries: u64) -> Box<dyn BulkReader + '_> {
        self.bulk(entries)
    }

    async fn newest_checkpoint(&self) -> Result<Option<ArchiveCheckpoint>, StoreError> {
        fetch_checkpoint(self).await
    }

    async fn archive_log(&self, checkpoint: &ArchiveCheckpoint) -> Result<(), StoreError> {
        self.insert_checkpoint(checkpoint).await?;
        while self.delete_log_entries(checkpoint.head.revision, ARCHIVE_DELETE_BATCH).await?
            == u64::from(ARCHIVE_DELETE_BATCH)
        {}
        Ok(())
    }

    async fn find_idempotent_request(
        &self,
        caller: KeyId,
        key: &IdempotencyKey,
        since: Timestamp,
    ) -> Result<Option<(KeyId, [u8; 32])>, StoreError> {
        let request_at = |row: &B::QueryRow| {
            let read = || Ok((KeyId::from_bytes(fixed_bytes(row, 0)?), fixed_bytes(row, 1)?));
            read().map_err(|error: sqlx::Error| damaged_error("an idempotency key", error))
        };
        Ok(fetch_all(self, queries::idempotent_request(caller, key, since), request_at).await?.pop())
    }

    async fn list_roles(&self, account: Option<&AccountId>) -> Result<Vec<Role>, StoreError> {
        fetch_all(self, queries::roles(account), decode_role).await
    }

    async fn list_members(
        &self,
        account: &AccountId,
        after: Option<&UserId>,
        limit: u32,
    ) -> Result<Vec<AccountMember>, StoreError> {
        fetch_all(self, queries::members(account, after, limit), decode_member).await
    }

    async fn list_memberships(&self, user: &UserId) -> Result<Vec<AccountMember>, StoreError> {
        fetch_all(self, queries::memberships(user), decode_member).await
    }

    async fn record_usage(&self, batch: &UsageBatch) -> Result<Vec<(KeyId, QuotaUsage)>, StoreError> {
        self.write_usage(batch).await
    }

    async fn list_usage(
        &self,
        key: KeyId,
        from: UsageHour,
        to: UsageHour,
    ) -> Result<Vec<UsageCount>, StoreError> {
        let counts =
            fetch_all(self, queries::usage(key, from, to), |row| decode_usage_count(key, row)).await?;
        Ok(counts.into_iter().flatten().collect())
    }

    async fn prune_usage(&self, before: UsageHour) -> Result<(), StoreError> {
        self.delete_usage_rows(before).await
    }

    async fn settle_pending_commits(&self) -> Result<(), StoreError> {
        self.resolve_pending_commits().await
    }

    fn replica_registry(self: Arc<Self>) -> Option<Arc<dyn ReplicaRegistry>> {
        self.as_replica_registry()
    }

    async fn wait_until_unusable(&self) {
        self.wait_until_lost().await;
    }

    fn is_single_server_since(&self, since: Instant) -> bool {
        self.has_single_server_since(since)
    }

    async fn close(&self) {
        self.shutdown().await;
    }
}

async fn fetch_checkpoint<B: StoreBackend>(backend: &B) -> Result<Option<ArchiveCheckpoint>, StoreError> {
    Ok(fetch_all(backend, queries::checkpoint(), decode_checkpoint).await?.pop())
}

/// Reads everything that a Check needs from one view.
pub(super) async fn read_snapshot<V: SnapshotView>(
    view: &mut V,
    forget_before: Timestamp,
    loader: &Arc<dyn SnapshotLoader>,
) -> Result<LogHead, StoreError> {
    let mut head = None;
    view.for_each_row(queries::head(), &mut |row| {
        head = Some(decode_head(row)?);
        Ok(())
    })
    .await?;
    let head = head.ok_or_else(|| damaged_error("meta", "it has no row"))?;
    view.for_each_row(queries::all_accounts(), &mut |row| {
        loader.add_record(SnapshotRecord::Account(decode_account(row)?));
        Ok(())
    })
    .await?;
    view.for_each_row(queries::all_roles(), &mut |row| {
        loader.add_record(SnapshotRecord::Role(decode_role(row)?));
        Ok(())
    })
    .await?;
    view.for_each_row(queries::all_members(), &mut |row| {
        loader.add_record(SnapshotRecord::Member(decode_member(row)?));
        Ok(())
    })
    .await?;
    view.load_keys(forget_before, loader).await?;
    view.for_each_row(queries::all_quota_usage(), &mut |row| {
        let (key_id, usage) = decode_quota_usage(row)?;
        loader.add_record(SnapshotRecord::QuotaUsage(key_id, usage));
        Ok(())
    })
    .await?;
    Ok(head)
}

/// Verifies that the newest entries form a chain that ends at the head in `meta`.
///
/// Other processes may commit during the check: then both the log and the head have grown.
pub(super) async fn verify_newest_log<B: StoreBackend>(backend: &B) -> Result<(), StoreError> {
    let broken = |problem: String| Err(damaged_error("the log", problem));
    // The checkpoint first: every head that is read later is beyond it.
    let archived = fetch_checkpoint(backend).await?.map(|checkpoint| checkpoint.head);
    let head = backend.log_head().await?;
    let oldest = archived.unwrap_or(LogHead { revision: Revision(0), hash: GENESIS_HASH });
    let start = Revision(head.revision.0.saturating_sub(ENTRIES_VERIFIED_AT_OPEN)).max(oldest.revision);
    let mut last = oldest;
    if start != oldest.revision {
        let found = fetch_all(backend, queries::log_hash(start), decode_head).await?;
        let Some(found) = found.into_iter().next() else {
            return broken(format!("it has no entry {start}"));
        };
        last = found;
    }
    let mut reached = last == head;
    backend
        .for_each_entry(last.revision, &mut |row| {
            if !row.follows(last.revision, &last.hash) {
                return broken(format!("its hash chain breaks at entry {}", last.revision.next()));
            }
            last = LogHead { revision: row.revision, hash: row.hash };
            reached |= last == head;
            Ok(())
        })
        .await?;
    let end = if last.revision > head.revision { backend.log_head().await? } else { head };
    if reached && (last == end || last.revision < end.revision) {
        Ok(())
    } else {
        broken(format!("it ends at {}, and should end at {}", last.revision, end.revision))
    }
}
