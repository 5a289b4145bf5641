//! The contract [`Store`], kept once for both databases: a [`Backend`] runs queries and transactions, and what is
//! asked and how it is read stands here, in `queries.rs` and in `records.rs`.

use std::sync::Arc;

use async_trait::async_trait;
use sqlx::Database;
use tokio::time::Instant;

use crate::domain::{
    account::{Account, Member, Role},
    limit::Spent,
    log::{GENESIS, LogRow},
    name::{AccountId, IdempotencyKey, KeyId, UserId},
    time::{Revision, Timestamp},
};

use super::{
    BulkReader, Checkpoint, CommitError, Committed, Count, Head, Hour, KeyFilter, Loader, LogFilter,
    SnapshotItem, Store, StoreError, StoredKey, UsageBatch, Write,
    fleet::Fleet,
    queries::{self, Dialect, Sql},
    records::{
        Columns, Gather, account_at, bytes_at, checkpoint_at, count_at, head_at, log_at, member_at, role_at,
        spent_at,
    },
    rows::damaged,
};

/// How many of the newest log rows a start verifies; all of them is AuditService.Verify's work.
const VERIFY_AT_START: u64 = 100_000;

/// How many entries one transaction takes out of the log: others write meanwhile.
const TAKEN_AT_ONCE: u32 = 10_000;

/// A row of a database.
pub(super) type RowOf<D> = <D as Database>::Row;

/// What takes a row.
pub(super) type TakeRow<'t, D> = &'t mut (dyn FnMut(&RowOf<D>) -> Result<(), StoreError> + Send);

/// What takes an entry of the log.
pub(super) type TakeLog<'t> = &'t mut (dyn FnMut(LogRow) -> Result<(), StoreError> + Send);

/// What a database does for the store.
#[async_trait]
pub(super) trait Backend: Send + Sync + Sized + 'static {
    /// The database.
    type Db: Dialect<Row: Columns>;
    /// A row of a query.
    type Row: Columns + Send + Sync;

    /// The rows of one query, which are few: a page, at most.
    async fn rows(&self, query: Sql<Self::Db>) -> Result<Vec<Self::Row>, StoreError>;

    /// Entries of the log: a page, at most.
    async fn log_page(&self, query: Sql<Self::Db>) -> Result<Vec<LogRow>, StoreError> {
        all(self, query, log_at).await
    }

    /// The keys with these ids, in no order.
    async fn keys_by_id(&self, ids: &[KeyId]) -> Result<Vec<StoredKey>, StoreError> {
        gathered(self, queries::keys_at(ids)).await
    }

    /// [`Store::bulk_reader`].
    fn bulk(&self, entries: u64) -> Box<dyn BulkReader + '_>;

    /// Gives each entry of the log after a revision to `take`, in order, while they come in.
    async fn each_entry(&self, after: Revision, take: TakeLog<'_>) -> Result<(), StoreError>;

    /// [`Store::commit`].
    async fn commit_batch(&self, batch: &[Write]) -> Result<Committed, CommitError>;

    /// [`Store::snapshot`]: opens a view of one revision and gives it to [`snapshot`].
    async fn view(&self, forget_before: Timestamp, loader: &Arc<dyn Loader>) -> Result<Head, StoreError>;

    /// [`Store::note_usage`].
    async fn write_usage(&self, batch: &UsageBatch) -> Result<Vec<(KeyId, Spent)>, StoreError>;

    /// [`Store::forget_usage`].
    async fn drop_usage(&self, before: Hour) -> Result<(), StoreError>;

    /// Notes a checkpoint, unless it is noted.
    async fn note_checkpoint(&self, checkpoint: &Checkpoint) -> Result<(), StoreError>;

    /// Takes entries up to a revision out of the log, at most so many. How many there were.
    async fn take_out(&self, upto: Revision, most: u32) -> Result<u64, StoreError>;

    /// [`Store::fleet`].
    fn as_fleet(self: Arc<Self>) -> Option<Arc<dyn Fleet>>;

    /// [`Store::lost`].
    async fn wait_until_lost(&self);

    /// [`Store::settle`].
    async fn settled(&self) -> Result<(), StoreError>;

    /// [`Store::read_from_one`].
    fn one_source(&self, since: Instant) -> bool;

    /// [`Store::close`].
    async fn shut(&self);
}

/// Reads that all see the same revision.
#[async_trait]
pub(super) trait View: Send {
    /// The database.
    type Db: Dialect<Row: Columns>;

    /// Gives each row of a query to `take`, while it comes in.
    async fn each(&mut self, query: Sql<Self::Db>, take: TakeRow<'_, Self::Db>) -> Result<(), StoreError>;

    /// Gives every key that was not revoked before `forget_before` to `loader`, while they come in.
    async fn keys(&mut self, forget_before: Timestamp, loader: &Arc<dyn Loader>) -> Result<(), StoreError>;
}

async fn all<B: Backend, T>(
    backend: &B,
    query: Sql<B::Db>,
    record_at: impl Fn(&B::Row) -> Result<T, StoreError> + Send,
) -> Result<Vec<T>, StoreError> {
    backend.rows(query).await?.iter().map(record_at).collect()
}

/// Keys with their secrets, in the order in which they come.
async fn gathered<B: Backend>(backend: &B, query: Sql<B::Db>) -> Result<Vec<StoredKey>, StoreError> {
    let mut gather = Gather::default();
    let mut keys = Vec::new();
    for row in &backend.rows(query).await? {
        keys.extend(gather.row(row)?);
    }
    keys.extend(gather.finish()?);
    Ok(keys)
}

#[async_trait]
impl<B: Backend> Store for B {
    async fn head(&self) -> Result<Head, StoreError> {
        let found = all(self, queries::head(), head_at).await?;
        found.into_iter().next().ok_or_else(|| damaged("meta", "it has no row"))
    }

    async fn commit(&self, batch: &[Write]) -> Result<Committed, CommitError> {
        self.commit_batch(batch).await
    }

    async fn log_after(&self, revision: Revision, limit: u32) -> Result<Vec<LogRow>, StoreError> {
        self.log_page(queries::log_after(revision, limit)).await
    }

    async fn snapshot(&self, forget_before: Timestamp, loader: &Arc<dyn Loader>) -> Result<Head, StoreError> {
        self.view(forget_before, loader).await
    }

    async fn key(&self, id: KeyId) -> Result<Option<StoredKey>, StoreError> {
        Ok(gathered(self, queries::key(id)).await?.pop())
    }

    async fn keys(
        &self,
        filter: &KeyFilter,
        before: Option<KeyId>,
        limit: u32,
    ) -> Result<Vec<StoredKey>, StoreError> {
        gathered(self, queries::keys(filter, before, limit)).await
    }

    async fn account(&self, id: &AccountId) -> Result<Option<Account>, StoreError> {
        Ok(all(self, queries::account(id), account_at).await?.pop())
    }

    async fn accounts(&self, after: Option<&AccountId>, limit: u32) -> Result<Vec<Account>, StoreError> {
        all(self, queries::accounts(after, limit), account_at).await
    }

    async fn log(
        &self,
        filter: &LogFilter,
        cursor: Option<Revision>,
        limit: u32,
    ) -> Result<Vec<LogRow>, StoreError> {
        self.log_page(queries::log(filter, cursor, limit)).await
    }

    async fn log_at(&self, revisions: &[Revision]) -> Result<Vec<LogRow>, StoreError> {
        self.log_page(queries::log_at(revisions)).await
    }

    async fn keys_at(&self, ids: &[KeyId]) -> Result<Vec<StoredKey>, StoreError> {
        self.keys_by_id(ids).await
    }

    fn bulk_reader(&self, entries: u64) -> Box<dyn BulkReader + '_> {
        self.bulk(entries)
    }

    async fn checkpoint(&self) -> Result<Option<Checkpoint>, StoreError> {
        checkpoint(self).await
    }

    async fn archive(&self, checkpoint: &Checkpoint) -> Result<(), StoreError> {
        self.note_checkpoint(checkpoint).await?;
        while self.take_out(checkpoint.at.revision, TAKEN_AT_ONCE).await? == u64::from(TAKEN_AT_ONCE) {}
        Ok(())
    }

    async fn idempotent(
        &self,
        caller: KeyId,
        key: &IdempotencyKey,
        since: Timestamp,
    ) -> Result<Option<(KeyId, [u8; 32])>, StoreError> {
        let request_at = |row: &B::Row| {
            let read = || Ok((KeyId::from_bytes(bytes_at(row, 0)?), bytes_at(row, 1)?));
            read().map_err(|error: sqlx::Error| damaged("an idempotency key", error))
        };
        Ok(all(self, queries::idempotent(caller, key, since), request_at).await?.pop())
    }

    async fn roles(&self, account: Option<&AccountId>) -> Result<Vec<Role>, StoreError> {
        all(self, queries::roles(account), role_at).await
    }

    async fn members(
        &self,
        account: &AccountId,
        after: Option<&UserId>,
        limit: u32,
    ) -> Result<Vec<Member>, StoreError> {
        all(self, queries::members(account, after, limit), member_at).await
    }

    async fn memberships(&self, user: &UserId) -> Result<Vec<Member>, StoreError> {
        all(self, queries::memberships(user), member_at).await
    }

    async fn note_usage(&self, batch: &UsageBatch) -> Result<Vec<(KeyId, Spent)>, StoreError> {
        self.write_usage(batch).await
    }

    async fn usage(&self, key: KeyId, from: Hour, to: Hour) -> Result<Vec<Count>, StoreError> {
        let known = all(self, queries::usage(key, from, to), |row| count_at(key, row)).await?;
        Ok(known.into_iter().flatten().collect())
    }

    async fn forget_usage(&self, before: Hour) -> Result<(), StoreError> {
        self.drop_usage(before).await
    }

    async fn settle(&self) -> Result<(), StoreError> {
        self.settled().await
    }

    fn fleet(self: Arc<Self>) -> Option<Arc<dyn Fleet>> {
        self.as_fleet()
    }

    async fn lost(&self) {
        self.wait_until_lost().await;
    }

    fn read_from_one(&self, since: Instant) -> bool {
        self.one_source(since)
    }

    async fn close(&self) {
        self.shut().await;
    }
}

async fn checkpoint<B: Backend>(backend: &B) -> Result<Option<Checkpoint>, StoreError> {
    Ok(all(backend, queries::checkpoint(), checkpoint_at).await?.pop())
}

/// Everything that a Check needs, from one view.
pub(super) async fn snapshot<V: View>(
    view: &mut V,
    forget_before: Timestamp,
    loader: &Arc<dyn Loader>,
) -> Result<Head, StoreError> {
    let mut head = None;
    view.each(queries::head(), &mut |row| {
        head = Some(head_at(row)?);
        Ok(())
    })
    .await?;
    let head = head.ok_or_else(|| damaged("meta", "it has no row"))?;
    view.each(queries::all_accounts(), &mut |row| {
        loader.item(SnapshotItem::Account(account_at(row)?));
        Ok(())
    })
    .await?;
    view.each(queries::all_roles(), &mut |row| {
        loader.item(SnapshotItem::Role(role_at(row)?));
        Ok(())
    })
    .await?;
    view.each(queries::all_members(), &mut |row| {
        loader.item(SnapshotItem::Member(member_at(row)?));
        Ok(())
    })
    .await?;
    view.keys(forget_before, loader).await?;
    view.each(queries::all_spent(), &mut |row| {
        let (key_id, spent) = spent_at(row)?;
        loader.item(SnapshotItem::Spent(key_id, spent));
        Ok(())
    })
    .await?;
    Ok(head)
}

/// The end of the log: the newest rows form a chain that ends where `meta` says. Others may commit while this reads: then
/// the log has grown beyond, and `meta` with it. What is wrong, if anything is.
pub(super) async fn check_log<B: Backend>(backend: &B) -> Result<(), StoreError> {
    let broken = |problem: String| Err(damaged("the log", problem));
    // The checkpoint first: it lies before whatever head is read after it.
    let archived = checkpoint(backend).await?.map(|checkpoint| checkpoint.at);
    let head = backend.head().await?;
    let oldest = archived.unwrap_or(Head { revision: Revision(0), hash: GENESIS });
    let start = Revision(head.revision.0.saturating_sub(VERIFY_AT_START)).max(oldest.revision);
    let mut last = oldest;
    if start != oldest.revision {
        let found = all(backend, queries::hash_of(start), head_at).await?;
        let Some(found) = found.into_iter().next() else {
            return broken(format!("it has no entry {start}"));
        };
        last = found;
    }
    let mut met = last == head;
    backend
        .each_entry(last.revision, &mut |row| {
            if !row.follows(last.revision, &last.hash) {
                return broken(format!("its hash chain breaks at entry {}", last.revision.next()));
            }
            last = Head { revision: row.revision, hash: row.hash };
            met |= last == head;
            Ok(())
        })
        .await?;
    let end = if last.revision > head.revision { backend.head().await? } else { head };
    if met && (last == end || last.revision < end.revision) {
        Ok(())
    } else {
        broken(format!("it ends at {}, and should end at {}", last.revision, end.revision))
    }
}
