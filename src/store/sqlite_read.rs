//! The embedded store's reads, and its side of the [`Store`] contract.

use std::sync::Arc;

use async_trait::async_trait;
use sqlx::{Acquire as _, QueryBuilder, Row as _, Sqlite as Db, SqliteConnection, sqlite::SqliteRow};

use crate::domain::{
    account::{Account, Member, Role},
    decision::Reason,
    key::{Secret, State},
    limit::Spent,
    log::LogRow,
    name::{AccountId, IdempotencyKey, KeyId, UserId},
    time::{Revision, Timestamp},
};

use super::{
    CommitError, Committed, Count, Head, Hour, KeyFilter, LogFilter, OwnerFilter, SnapshotItem, Store,
    StoreError, StoredKey, UsageBatch, Write,
    rows::{
        AccountTail, KeyRow, account_from, damaged, member_from, revision_from_i64, revision_to_i64,
        role_account, role_from, secret_from,
    },
    sqlite::{Sqlite, hash_at, read_head, store_error},
};

const KEY_COLUMNS: &str = "k.id, k.account, k.user_id, k.environment, k.name, k.scopes, k.roles, k.expires_at, \
    k.customers, k.allowed_cidrs, k.rate_limits, k.quota, k.metadata, k.created_at, k.created_by, k.updated_at, \
    k.disabled_at, k.revoked_at, k.revoke_reason, k.revoke_comment, k.revision, k.sum";
const KEY_COLUMN_COUNT: usize = 22;
const SECRET_COLUMNS: &str = "s.digest, s.version, s.hint, s.created_at, s.expires_at, s.sum, s.last_used_at";
const LOG_COLUMNS: &str = "revision, at, action, account, key_id, user_id, actor, actor_account, acting_user, \
    method, payload, prev_hash, hash";
const ACCOUNT_COLUMNS: &str = "id, name, suspended_at, created_at, updated_at, revision, sum, longest_life";
const ROLE_COLUMNS: &str = "account, name, scopes, revision, sum";
const MEMBER_COLUMNS: &str = "account, user_id, role, revision, sum";
/// How many of a key's secrets are in its record.
const IN_RECORD: usize = 2;

fn bytes_at<const N: usize>(row: &SqliteRow, column: usize) -> Result<[u8; N], sqlx::Error> {
    let bytes: &[u8] = row.try_get(column)?;
    bytes.try_into().map_err(|_| sqlx::Error::Decode(format!("column {column} is not {N} bytes").into()))
}

fn key_row_at(row: &SqliteRow) -> Result<(KeyRow, i64), sqlx::Error> {
    let key = KeyRow {
        id: bytes_at(row, 0)?,
        account: row.try_get(1)?,
        user_id: row.try_get(2)?,
        environment: row.try_get(3)?,
        name: row.try_get(4)?,
        scopes: row.try_get(5)?,
        roles: row.try_get(6)?,
        expires_at: row.try_get(7)?,
        customers: row.try_get(8)?,
        allowed_cidrs: row.try_get(9)?,
        rate_limits: row.try_get(10)?,
        quota: row.try_get(11)?,
        metadata: row.try_get(12)?,
        created_at: row.try_get(13)?,
        created_by: row.try_get(14)?,
        updated_at: row.try_get(15)?,
        disabled_at: row.try_get(16)?,
        revoked_at: row.try_get(17)?,
        revoke_reason: row.try_get(18)?,
        revoke_comment: row.try_get(19)?,
        revision: row.try_get(20)?,
    };
    Ok((key, row.try_get(21)?))
}

/// The secret whose columns begin at `from`, in the order of [`SECRET_COLUMNS`].
pub(super) fn secret_at(row: &SqliteRow, key_id: &[u8], from: usize) -> Result<Secret, StoreError> {
    secret_from(
        key_id,
        row.try_get(from).map_err(store_error)?,
        row.try_get(from + 1).map_err(store_error)?,
        row.try_get(from + 2).map_err(store_error)?,
        (row.try_get(from + 3).map_err(store_error)?, row.try_get(from + 4).map_err(store_error)?),
        row.try_get(from + 5).map_err(store_error)?,
    )
}

/// Joined rows of keys and secrets, a key's rows in a run with the newest secret first, as keys.
struct Gather {
    key: Option<(KeyRow, i64)>,
    secrets: Vec<(Secret, Option<i64>)>,
}

impl Gather {
    fn new() -> Self {
        Gather { key: None, secrets: Vec::new() }
    }

    /// Takes a row; gives the key before it when the row begins another.
    fn row(&mut self, row: &SqliteRow) -> Result<Option<GatheredKey>, StoreError> {
        let id: [u8; 16] = bytes_at(row, 0).map_err(store_error)?;
        let mut done = None;
        if self.key.as_ref().is_none_or(|(key, _)| key.id != id) {
            done = self.finish()?;
            self.key = Some(key_row_at(row).map_err(store_error)?);
        }
        let digest: Option<&[u8]> = row.try_get(KEY_COLUMN_COUNT).map_err(store_error)?;
        if digest.is_none() {
            return Err(incomplete(&id));
        }
        let secret = secret_at(row, &id, KEY_COLUMN_COUNT)?;
        self.secrets.push((secret, row.try_get(KEY_COLUMN_COUNT + 6).map_err(store_error)?));
        Ok(done)
    }

    /// The last key.
    fn finish(&mut self) -> Result<Option<GatheredKey>, StoreError> {
        let Some((row, sum)) = self.key.take() else {
            return Ok(None);
        };
        let mut secrets = std::mem::take(&mut self.secrets);
        // None is ever removed: they count down to 1, and the newest has no end.
        let counted = secrets.iter().rev().map(|(secret, _)| secret.version).eq(1..=secrets.len() as u32);
        let open_ended = secrets.first().is_some_and(|(newest, _)| newest.expires_at.is_none());
        if !counted || !open_ended {
            return Err(incomplete(&row.id));
        }
        let used = secrets.iter();
        let used = used.filter_map(|(secret, used)| Some((secret.version, Timestamp::from_micros((*used)?))));
        let last_used = used.collect();
        let left = secrets.split_off(secrets.len().min(IN_RECORD));
        let key = row.into_key(sum, secrets.into_iter().map(|(secret, _)| secret).collect())?;
        let left = left.into_iter().map(|(secret, _)| secret).collect();
        Ok(Some(GatheredKey { stored: StoredKey { key, last_used }, left }))
    }
}

fn incomplete(key_id: &[u8; 16]) -> StoreError {
    damaged(format_args!("key {}", KeyId::from_bytes(*key_id)), "its secrets are incomplete")
}

struct GatheredKey {
    stored: StoredKey,
    /// Secrets that left the record.
    left: Vec<Secret>,
}

fn account_at(row: &SqliteRow) -> Result<Account, StoreError> {
    let read = || -> Result<_, sqlx::Error> {
        let tail = AccountTail {
            suspended_at: row.try_get(2)?,
            created_at: row.try_get(3)?,
            updated_at: row.try_get(4)?,
            revision: row.try_get(5)?,
            sum: row.try_get(6)?,
            longest_life: row.try_get(7)?,
        };
        Ok((row.try_get::<&str, _>(0)?, row.try_get::<&str, _>(1)?, tail))
    };
    let (id, name, tail) = read().map_err(store_error)?;
    account_from(id, name, &tail)
}

/// Five columns: three texts, a revision, a checksum.
type Small<'r> = (&'r str, &'r str, &'r str, i64, i64);

fn small_at(row: &SqliteRow) -> Result<Small<'_>, StoreError> {
    let read = || Ok((row.try_get(0)?, row.try_get(1)?, row.try_get(2)?, row.try_get(3)?, row.try_get(4)?));
    read().map_err(store_error)
}

fn role_at(row: &SqliteRow) -> Result<Role, StoreError> {
    let (account, name, scopes, revision, sum) = small_at(row)?;
    role_from(account, name, scopes, revision, sum)
}

fn member_at(row: &SqliteRow) -> Result<Member, StoreError> {
    let (account, user, role, revision, sum) = small_at(row)?;
    member_from(account, user, role, revision, sum)
}

fn spent_at(row: &SqliteRow) -> Result<(KeyId, Spent), StoreError> {
    let read = || -> Result<_, sqlx::Error> {
        let used: i64 = row.try_get(2)?;
        let spent =
            Spent { period: Timestamp::from_micros(row.try_get(1)?), used: u64::try_from(used).unwrap_or(0) };
        Ok((KeyId::from_bytes(bytes_at(row, 0)?), spent))
    };
    read().map_err(store_error)
}

fn count_at(key_id: KeyId, row: &SqliteRow) -> Result<Option<Count>, StoreError> {
    let read = || -> Result<(i64, i64, i64), sqlx::Error> {
        Ok((row.try_get(0)?, row.try_get(1)?, row.try_get(2)?))
    };
    let (hour, reason, count) = read().map_err(store_error)?;
    // A reason that a newer version wrote is not shown by this one.
    let reason = Reason::ALL.into_iter().find(|known| i64::from(*known as u8) == reason);
    Ok(reason.map(|reason| Count {
        key_id,
        hour: Hour(hour),
        reason,
        count: u64::try_from(count).unwrap_or(0),
    }))
}

fn log_at(row: &SqliteRow) -> Result<LogRow, StoreError> {
    let revision = revision_from_i64(row.try_get(0).map_err(store_error)?);
    let read = || -> Result<LogRow, sqlx::Error> {
        let account = |column| -> Result<Option<AccountId>, sqlx::Error> {
            let text: Option<&str> = row.try_get(column)?;
            text.map(AccountId::parse).transpose().map_err(|error| sqlx::Error::Decode(Box::new(error)))
        };
        let user = |column| -> Result<Option<UserId>, sqlx::Error> {
            let text: Option<&str> = row.try_get(column)?;
            text.map(UserId::parse).transpose().map_err(|error| sqlx::Error::Decode(Box::new(error)))
        };
        let key_id: Option<&[u8]> = row.try_get(4)?;
        Ok(LogRow {
            revision,
            at: Timestamp::from_micros(row.try_get(1)?),
            action: row.try_get(2)?,
            account: account(3)?,
            key_id: key_id.map(|_| bytes_at(row, 4).map(KeyId::from_bytes)).transpose()?,
            user: user(5)?,
            actor: row.try_get(6)?,
            actor_account: account(7)?,
            acting_user: user(8)?,
            method: row.try_get(9)?,
            payload: row.try_get(10)?,
            prev_hash: hash_at(row, 11)?,
            hash: hash_at(row, 12)?,
        })
    };
    read().map_err(|error| damaged(format_args!("log entry {revision}"), error))
}

pub(super) async fn log_after(
    connection: &mut SqliteConnection,
    revision: Revision,
    limit: u32,
) -> Result<Vec<LogRow>, StoreError> {
    let mut query = QueryBuilder::<Db>::new("SELECT ");
    query.push(LOG_COLUMNS).push(" FROM log WHERE revision > ").push_bind(revision_to_i64(revision));
    query.push(" ORDER BY revision LIMIT ").push_bind(i64::from(limit));
    let rows = query.build().fetch_all(connection).await.map_err(store_error)?;
    rows.iter().map(log_at).collect()
}

pub(super) async fn idempotent(
    connection: &mut SqliteConnection,
    caller: KeyId,
    key: &IdempotencyKey,
    since: Timestamp,
) -> Result<Option<(KeyId, [u8; 32])>, sqlx::Error> {
    let row = sqlx::query(
        "SELECT key_id, fingerprint FROM idempotency WHERE caller = ?1 AND key = ?2 AND created_at >= ?3",
    )
    .bind(caller.as_bytes().as_slice())
    .bind(key.as_str())
    .bind(since.as_micros())
    .fetch_optional(connection)
    .await?;
    row.map(|row| Ok((KeyId::from_bytes(bytes_at(&row, 0)?), bytes_at(&row, 1)?))).transpose()
}

fn select(columns: &'static str, from: &'static str) -> QueryBuilder<Db> {
    let mut query = QueryBuilder::new("SELECT ");
    query.push(columns).push(from);
    query
}

/// The condition of a state at `now`, in the order in which states are told.
fn push_state(query: &mut QueryBuilder<Db>, state: State, now: i64) {
    match state {
        State::Revoked => query.push("(revoked_at IS NOT NULL)"),
        State::Disabled => query.push("(revoked_at IS NULL AND disabled_at IS NOT NULL)"),
        State::Expired => query
            .push("(revoked_at IS NULL AND disabled_at IS NULL AND expires_at <= ")
            .push_bind(now)
            .push(")"),
        State::Active => query
            .push("(revoked_at IS NULL AND disabled_at IS NULL AND (expires_at IS NULL OR expires_at > ")
            .push_bind(now)
            .push("))"),
    };
}

/// The ids of a page, as a subquery: the page is cut before secrets multiply its rows.
fn push_page(query: &mut QueryBuilder<Db>, filter: &KeyFilter, before: Option<KeyId>, limit: u32) {
    match &filter.owner {
        OwnerFilter::Account(account) => {
            query.push("SELECT id FROM keys WHERE account = ").push_bind(account.to_string())
        }
        OwnerFilter::User(user) => {
            query.push("SELECT id FROM keys WHERE user_id = ").push_bind(user.to_string())
        }
        OwnerFilter::AllButOperators => query
            .push("SELECT id FROM keys WHERE account IS NOT ")
            .push_bind(AccountId::operator().to_string()),
    };
    if let Some(before) = before {
        query.push(" AND id < ").push_bind(before.as_bytes().to_vec());
    }
    if let Some(environment) = &filter.environment {
        query.push(" AND environment = ").push_bind(environment.to_string());
    }
    if !filter.name_prefix.is_empty() {
        // Not LIKE: it folds case, and its wildcards would have to be escaped.
        query.push(" AND substr(name, 1, length(").push_bind(filter.name_prefix.clone());
        query.push(")) = ").push_bind(filter.name_prefix.clone());
    }
    if let Some(end) = filter.expires_before {
        query.push(" AND expires_at < ").push_bind(end.as_micros());
    }
    if let Some(end) = filter.created_before {
        query.push(" AND created_at < ").push_bind(end.as_micros());
    }
    if let Some(since) = filter.unused_since {
        query
            .push(" AND NOT EXISTS (SELECT 1 FROM secrets WHERE key_id = keys.id AND last_used_at >= ")
            .push_bind(since.as_micros())
            .push(")");
    }
    for (at, state) in filter.states.iter().enumerate() {
        query.push(if at == 0 { " AND (" } else { " OR " });
        push_state(query, *state, filter.now.as_micros());
    }
    if !filter.states.is_empty() {
        query.push(")");
    }
    query.push(" ORDER BY id DESC LIMIT ").push_bind(i64::from(limit));
}

#[async_trait]
impl Store for Sqlite {
    async fn head(&self) -> Result<Head, StoreError> {
        let mut connection = self.readers.acquire().await.map_err(store_error)?;
        read_head(&mut connection).await.map_err(store_error)
    }

    async fn commit(&self, batch: &[Write]) -> Result<Committed, CommitError> {
        self.commit_batch(batch).await
    }

    async fn log_after(&self, revision: Revision, limit: u32) -> Result<Vec<LogRow>, StoreError> {
        let mut connection = self.readers.acquire().await.map_err(store_error)?;
        log_after(&mut connection, revision, limit).await
    }

    async fn snapshot(
        &self,
        forget_before: Timestamp,
        sink: &mut (dyn FnMut(SnapshotItem) + Send),
    ) -> Result<Head, StoreError> {
        use futures_util::TryStreamExt as _;
        let mut connection = self.readers.acquire().await.map_err(store_error)?;
        let mut transaction = connection.begin().await.map_err(store_error)?;
        let head = read_head(&mut transaction).await.map_err(store_error)?;

        for row in select(ACCOUNT_COLUMNS, " FROM accounts")
            .build()
            .fetch_all(&mut *transaction)
            .await
            .map_err(store_error)?
        {
            sink(SnapshotItem::Account(account_at(&row)?));
        }
        for row in select(ROLE_COLUMNS, " FROM roles")
            .build()
            .fetch_all(&mut *transaction)
            .await
            .map_err(store_error)?
        {
            sink(SnapshotItem::Role(role_at(&row)?));
        }
        let mut query = select(MEMBER_COLUMNS, " FROM members");
        let mut rows = query.build().fetch(&mut *transaction);
        while let Some(row) = rows.try_next().await.map_err(store_error)? {
            sink(SnapshotItem::Member(member_at(&row)?));
        }
        drop(rows);

        let mut query = QueryBuilder::<Db>::new("SELECT ");
        query.push(KEY_COLUMNS).push(", ").push(SECRET_COLUMNS);
        query.push(
            " FROM keys k LEFT JOIN secrets s ON s.key_id = k.id WHERE k.revoked_at IS NULL OR k.revoked_at >= ",
        );
        query.push_bind(forget_before.as_micros()).push(" ORDER BY k.id, s.version DESC");
        let mut send = |gathered: GatheredKey| {
            let left = gathered.left.into_iter().filter(|secret| !secret.superseded(forget_before)).collect();
            sink(SnapshotItem::Key(Arc::new(gathered.stored.key), left));
        };
        let mut gather = Gather::new();
        let mut rows = query.build().fetch(&mut *transaction);
        while let Some(row) = rows.try_next().await.map_err(store_error)? {
            if let Some(done) = gather.row(&row)? {
                send(done);
            }
        }
        if let Some(done) = gather.finish()? {
            send(done);
        }
        drop(rows);
        let mut query = select("key_id, period, used", " FROM quotas");
        let mut rows = query.build().fetch(&mut *transaction);
        while let Some(row) = rows.try_next().await.map_err(store_error)? {
            let (key_id, spent) = spent_at(&row)?;
            sink(SnapshotItem::Spent(key_id, spent));
        }
        drop(rows);
        Ok(head)
    }

    async fn key(&self, id: KeyId) -> Result<Option<StoredKey>, StoreError> {
        let mut query = QueryBuilder::<Db>::new("SELECT ");
        query.push(KEY_COLUMNS).push(", ").push(SECRET_COLUMNS);
        query.push(" FROM keys k LEFT JOIN secrets s ON s.key_id = k.id WHERE k.id = ");
        query.push_bind(id.as_bytes().to_vec()).push(" ORDER BY s.version DESC");
        let rows = query.build().fetch_all(&self.readers).await.map_err(store_error)?;
        let mut gather = Gather::new();
        for row in &rows {
            gather.row(row)?;
        }
        Ok(gather.finish()?.map(|gathered| gathered.stored))
    }

    async fn keys(
        &self,
        filter: &KeyFilter,
        before: Option<KeyId>,
        limit: u32,
    ) -> Result<Vec<StoredKey>, StoreError> {
        let mut query = QueryBuilder::<Db>::new("SELECT ");
        query.push(KEY_COLUMNS).push(", ").push(SECRET_COLUMNS);
        query.push(" FROM keys k LEFT JOIN secrets s ON s.key_id = k.id WHERE k.id IN (");
        push_page(&mut query, filter, before, limit);
        query.push(") ORDER BY k.id DESC, s.version DESC");
        let rows = query.build().fetch_all(&self.readers).await.map_err(store_error)?;
        let mut gather = Gather::new();
        let mut keys = Vec::new();
        for row in &rows {
            keys.extend(gather.row(row)?.map(|gathered| gathered.stored));
        }
        keys.extend(gather.finish()?.map(|gathered| gathered.stored));
        Ok(keys)
    }

    async fn account(&self, id: &AccountId) -> Result<Option<Account>, StoreError> {
        let mut query = QueryBuilder::<Db>::new("SELECT ");
        query.push(ACCOUNT_COLUMNS).push(" FROM accounts WHERE id = ").push_bind(id.to_string());
        let row = query.build().fetch_optional(&self.readers).await.map_err(store_error)?;
        row.as_ref().map(account_at).transpose()
    }

    async fn accounts(&self, after: Option<&AccountId>, limit: u32) -> Result<Vec<Account>, StoreError> {
        let mut query = QueryBuilder::<Db>::new("SELECT ");
        query.push(ACCOUNT_COLUMNS).push(" FROM accounts WHERE id > ");
        query.push_bind(after.map_or_else(String::new, ToString::to_string));
        query.push(" ORDER BY id LIMIT ").push_bind(i64::from(limit));
        let rows = query.build().fetch_all(&self.readers).await.map_err(store_error)?;
        rows.iter().map(account_at).collect()
    }

    async fn log(
        &self,
        filter: &LogFilter,
        before: Option<Revision>,
        limit: u32,
    ) -> Result<Vec<LogRow>, StoreError> {
        let mut query = QueryBuilder::<Db>::new("SELECT ");
        query.push(LOG_COLUMNS).push(" FROM log WHERE revision < ");
        query.push_bind(before.map_or(i64::MAX, revision_to_i64));
        if let Some(account) = &filter.account {
            query.push(" AND account = ").push_bind(account.to_string());
        }
        if let Some(key_id) = filter.key_id {
            query.push(" AND key_id = ").push_bind(key_id.as_bytes().to_vec());
        }
        if let Some(actor) = &filter.actor {
            query.push(" AND actor = ").push_bind(actor.clone());
        }
        if let Some(from) = filter.from {
            query.push(" AND at >= ").push_bind(from.as_micros());
        }
        if let Some(to) = filter.to {
            query.push(" AND at < ").push_bind(to.as_micros());
        }
        query.push(" ORDER BY revision DESC LIMIT ").push_bind(i64::from(limit));
        let rows = query.build().fetch_all(&self.readers).await.map_err(store_error)?;
        rows.iter().map(log_at).collect()
    }

    async fn idempotent(
        &self,
        caller: KeyId,
        key: &IdempotencyKey,
        since: Timestamp,
    ) -> Result<Option<(KeyId, [u8; 32])>, StoreError> {
        let mut connection = self.readers.acquire().await.map_err(store_error)?;
        idempotent(&mut connection, caller, key, since).await.map_err(store_error)
    }

    async fn roles(&self, account: Option<&AccountId>) -> Result<Vec<Role>, StoreError> {
        let mut query = select(ROLE_COLUMNS, " FROM roles WHERE account IN ('', ");
        query.push_bind(role_account(account).to_owned()).push(") ORDER BY name, account");
        let rows = query.build().fetch_all(&self.readers).await.map_err(store_error)?;
        rows.iter().map(role_at).collect()
    }

    async fn members(
        &self,
        account: &AccountId,
        after: Option<&UserId>,
        limit: u32,
    ) -> Result<Vec<Member>, StoreError> {
        let mut query = select(MEMBER_COLUMNS, " FROM members WHERE account = ");
        query.push_bind(account.to_string());
        query.push(" AND user_id > ").push_bind(after.map_or_else(String::new, ToString::to_string));
        query.push(" ORDER BY user_id LIMIT ").push_bind(i64::from(limit));
        let rows = query.build().fetch_all(&self.readers).await.map_err(store_error)?;
        rows.iter().map(member_at).collect()
    }

    async fn memberships(&self, user: &UserId) -> Result<Vec<Member>, StoreError> {
        let mut query = select(MEMBER_COLUMNS, " FROM members WHERE user_id = ");
        query.push_bind(user.to_string()).push(" ORDER BY account");
        let rows = query.build().fetch_all(&self.readers).await.map_err(store_error)?;
        rows.iter().map(member_at).collect()
    }

    async fn note_usage(&self, batch: &UsageBatch) -> Result<(), StoreError> {
        self.write_usage(batch).await
    }

    async fn usage(&self, key: KeyId, from: Hour, to: Hour) -> Result<Vec<Count>, StoreError> {
        let mut query = select("hour, reason, count", " FROM usage WHERE key_id = ");
        query.push_bind(key.as_bytes().to_vec()).push(" AND hour >= ").push_bind(from.0);
        query.push(" AND hour < ").push_bind(to.0).push(" ORDER BY hour, reason");
        let rows = query.build().fetch_all(&self.readers).await.map_err(store_error)?;
        rows.iter().filter_map(|row| count_at(key, row).transpose()).collect()
    }

    async fn forget_usage(&self, before: Hour) -> Result<(), StoreError> {
        self.drop_usage(before).await
    }

    async fn close(&self) {
        self.shut().await;
    }
}
