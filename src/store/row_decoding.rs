//! Decodes rows of either database into records.
//!
//! This module knows the order of the columns, and which consecutive rows form a key. `row_format.rs` knows what a
//! column contains and how a row's checksum is computed.

use std::borrow::Cow;

use sqlx::Row as _;

use crate::domain::{
    account::{Account, AccountMember, Role},
    key::{ApiKey, KeySecret},
    limit::QuotaUsage,
    log::{ChainHash, LogEntry},
    name::{AccountId, KeyId, UserId},
    policy_decision::Reason,
    time::{Revision, Timestamp},
};

use super::{
    ArchiveCheckpoint, LogHead, StoreError, StoredKey, UsageCount, UsageHour,
    parse_cache::KeyParseCache,
    row_format::{
        AccountColumns, KeyRow, SecretRow, account_from_columns, damaged_error, member_from_columns,
        revision_from_i64, role_from_columns,
    },
};

type ColumnResult<T> = Result<T, sqlx::Error>;

/// The columns of a row by their index, in the three types that both databases use.
pub(super) trait RowColumns {
    fn text(&self, at: usize) -> ColumnResult<&str>;
    fn text_opt(&self, at: usize) -> ColumnResult<Option<&str>>;
    fn int(&self, at: usize) -> ColumnResult<i64>;
    fn int_opt(&self, at: usize) -> ColumnResult<Option<i64>>;
    fn bytes(&self, at: usize) -> ColumnResult<&[u8]>;
    fn bytes_opt(&self, at: usize) -> ColumnResult<Option<&[u8]>>;
    /// Text written by people, which may contain any character.
    fn arbitrary_text_opt(&self, at: usize) -> ColumnResult<Option<Cow<'_, str>>>;
}

macro_rules! impl_row_columns {
    ($row:ty, $free_text:expr) => {
        impl RowColumns for $row {
            fn text(&self, at: usize) -> ColumnResult<&str> {
                self.try_get(at)
            }

            fn text_opt(&self, at: usize) -> ColumnResult<Option<&str>> {
                self.try_get(at)
            }

            fn int(&self, at: usize) -> ColumnResult<i64> {
                self.try_get(at)
            }

            fn int_opt(&self, at: usize) -> ColumnResult<Option<i64>> {
                self.try_get(at)
            }

            fn bytes(&self, at: usize) -> ColumnResult<&[u8]> {
                self.try_get(at)
            }

            fn bytes_opt(&self, at: usize) -> ColumnResult<Option<&[u8]>> {
                self.try_get(at)
            }

            fn arbitrary_text_opt(&self, at: usize) -> ColumnResult<Option<Cow<'_, str>>> {
                $free_text(self, at)
            }
        }
    };
}

fn sqlite_arbitrary_text(row: &sqlx::sqlite::SqliteRow, at: usize) -> ColumnResult<Option<Cow<'_, str>>> {
    Ok(row.text_opt(at)?.map(Cow::Borrowed))
}

/// PostgreSQL's text cannot contain the character zero, so such text is stored as bytes.
fn postgres_arbitrary_text(row: &sqlx::postgres::PgRow, at: usize) -> ColumnResult<Option<Cow<'_, str>>> {
    let text = row.bytes_opt(at)?.map(str::from_utf8).transpose();
    text.map(|text| text.map(Cow::Borrowed)).map_err(|error| sqlx::Error::Decode(error.into()))
}

impl_row_columns!(sqlx::sqlite::SqliteRow, sqlite_arbitrary_text);
impl_row_columns!(sqlx::postgres::PgRow, postgres_arbitrary_text);

pub(super) const HEAD_COLUMNS: &str = "head, head_hash";
pub(super) const KEY_COLUMNS: &str = "k.id, k.account, k.user_id, k.environment, k.name, k.scopes, k.roles, k.expires_at, \
    k.customers, k.allowed_cidrs, k.rate_limits, k.quota, k.metadata, k.created_at, k.created_by, k.updated_at, \
    k.disabled_at, k.revoked_at, k.revoke_reason, k.revoke_comment, k.revision, k.sum";
const KEY_COLUMN_COUNT: usize = 22;
pub(super) const SECRET_COLUMNS: &str = "s.digest, s.version, s.hint, s.created_at, s.expires_at, s.sum";
pub(super) const LOG_COLUMNS: &str = "revision, at, action, account, key_id, user_id, actor, actor_account, acting_user, \
    method, payload, prev_hash, hash";
pub(super) const ACCOUNT_COLUMNS: &str =
    "id, name, suspended_at, created_at, updated_at, revision, sum, longest_life";
pub(super) const ROLE_COLUMNS: &str = "account, name, scopes, revision, sum";
pub(super) const MEMBER_COLUMNS: &str = "account, user_id, role, revision, sum";
/// The number of secrets that the record of a key contains at most.
const SECRETS_IN_RECORD: usize = 2;

/// A column with exactly `N` bytes.
pub(super) fn fixed_bytes<const N: usize>(row: &impl RowColumns, column: usize) -> ColumnResult<[u8; N]> {
    let bytes = row.bytes(column)?;
    bytes.try_into().map_err(|_| sqlx::Error::Decode(format!("column {column} is not {N} bytes").into()))
}

/// The error for a column of another type than expected.
pub(super) fn unreadable_column(error: sqlx::Error) -> StoreError {
    match error {
        // The value itself is wrong: a second try finds the same.
        sqlx::Error::Decode(problem) | sqlx::Error::ColumnDecode { source: problem, .. } => {
            damaged_error("a row cannot be read", problem)
        }
        error => StoreError::Unavailable(error.into()),
    }
}

/// Head and hash, in [`HEAD_COLUMNS`].
pub(super) fn decode_head(row: &impl RowColumns) -> Result<LogHead, StoreError> {
    let read = || -> ColumnResult<(i64, ChainHash)> { Ok((row.int(0)?, fixed_bytes(row, 1)?)) };
    let (revision, hash) = read().map_err(unreadable_column)?;
    Ok(LogHead { revision: revision_from_i64(revision), hash })
}

/// A key's id and revision.
pub(super) fn decode_key_revision(row: &impl RowColumns) -> Result<(KeyId, Revision), StoreError> {
    let read = || -> ColumnResult<_> { Ok((KeyId::from_bytes(fixed_bytes(row, 0)?), row.int(1)?)) };
    let (id, revision) = read().map_err(unreadable_column)?;
    Ok((id, revision_from_i64(revision)))
}

/// The columns of the checkpoint query.
pub(super) fn decode_checkpoint(row: &impl RowColumns) -> Result<ArchiveCheckpoint, StoreError> {
    let at = decode_head(row)?;
    let read = || -> ColumnResult<(i64, i64)> { Ok((row.int(2)?, row.int(3)?)) };
    let (entries, made_at) = read().map_err(unreadable_column)?;
    let entries = u64::try_from(entries).unwrap_or(0);
    Ok(ArchiveCheckpoint { head: at, entry_count: entries, made_at: Timestamp::from_micros(made_at) })
}

/// A key's row in [`KEY_COLUMNS`] and its checksum.
pub(super) fn decode_key_row(row: &impl RowColumns) -> Result<(KeyRow<'_>, i64), StoreError> {
    let read = || -> ColumnResult<_> { Ok((read_key_columns(row)?, row.int(21)?)) };
    read().map_err(unreadable_column)
}

/// A key without its secrets, with a verified checksum.
fn decode_key(row: &impl RowColumns, cache: &mut KeyParseCache) -> Result<ApiKey, StoreError> {
    let (key, sum) = decode_key_row(row)?;
    Ok(cache.load_key(&key.verify_checksum(sum)?, (&[], &[]))?.to_key())
}

fn read_key_columns(row: &impl RowColumns) -> ColumnResult<KeyRow<'_>> {
    let text = |at| Ok::<_, sqlx::Error>(Cow::Borrowed(row.text(at)?));
    let text_opt = |at| Ok::<_, sqlx::Error>(row.text_opt(at)?.map(Cow::Borrowed));
    Ok(KeyRow {
        id: fixed_bytes(row, 0)?,
        account: text_opt(1)?,
        user_id: text_opt(2)?,
        environment: text(3)?,
        name: text_opt(4)?,
        scopes: text(5)?,
        roles: text(6)?,
        expires_at: row.int_opt(7)?,
        customers: text(8)?,
        allowed_cidrs: text(9)?,
        rate_limits: text_opt(10)?,
        quota: text_opt(11)?,
        metadata: text_opt(12)?,
        created_at: row.int(13)?,
        created_by: text(14)?,
        updated_at: row.int(15)?,
        disabled_at: row.int_opt(16)?,
        revoked_at: row.int_opt(17)?,
        revoke_reason: text_opt(18)?,
        revoke_comment: row.arbitrary_text_opt(19)?,
        revision: row.int(20)?,
    })
}

/// Decodes the secret whose columns start at `from`, in the order of [`SECRET_COLUMNS`], with or without its hint.
/// Verifies its checksum.
pub(super) fn decode_secret(
    row: &impl RowColumns,
    key_id: &[u8],
    from: usize,
    hint: bool,
) -> Result<KeySecret, StoreError> {
    let read = || -> ColumnResult<_> {
        let secret = SecretRow {
            digest: row.bytes(from)?,
            version: row.int(from + 1)?,
            hint: row.text(from + 2)?,
            created_at: row.int(from + 3)?,
            expires_at: row.int_opt(from + 4)?,
        };
        Ok((secret, row.int(from + 5)?))
    };
    let (secret, sum) = read().map_err(unreadable_column)?;
    secret.into_secret(key_id, sum, hint)
}

/// Assembles keys from joined rows of keys, secrets and their last uses. The rows of a key must be consecutive, the
/// newest secret first.
#[derive(Default)]
pub(super) struct KeyAssembler {
    key: Option<ApiKey>,
    secrets: Vec<(KeySecret, Option<i64>)>,
    parse_cache: KeyParseCache,
}

impl KeyAssembler {
    /// Starts with the cache of an earlier assembler.
    pub(super) fn with_cache(cache: KeyParseCache) -> KeyAssembler {
        KeyAssembler { parse_cache: cache, ..KeyAssembler::default() }
    }

    pub(super) fn into_cache(self) -> KeyParseCache {
        self.parse_cache
    }

    /// Adds a row. Returns the previous key if the row begins another one.
    pub(super) fn push_row(&mut self, row: &impl RowColumns) -> Result<Option<StoredKey>, StoreError> {
        let id: [u8; 16] = fixed_bytes(row, 0).map_err(unreadable_column)?;
        let mut done = None;
        if self.key.as_ref().is_none_or(|key| *key.id.as_bytes() != id) {
            done = self.finish()?;
            self.key = Some(decode_key(row, &mut self.parse_cache)?);
        }
        if row.bytes_opt(KEY_COLUMN_COUNT).map_err(unreadable_column)?.is_none() {
            return Err(incomplete_secrets(&id));
        }
        let secret = decode_secret(row, &id, KEY_COLUMN_COUNT, true)?;
        self.secrets.push((secret, row.int_opt(KEY_COLUMN_COUNT + 6).map_err(unreadable_column)?));
        Ok(done)
    }

    /// Returns the last key, if there is one.
    pub(super) fn finish(&mut self) -> Result<Option<StoredKey>, StoreError> {
        let Some(key) = self.key.take() else {
            return Ok(None);
        };
        let (secrets, used): (Vec<_>, Vec<_>) = std::mem::take(&mut self.secrets).into_iter().unzip();
        let versions = secrets.iter().map(|secret| secret.version);
        let used =
            versions.zip(used).filter_map(|(version, used)| Some((version, Timestamp::from_micros(used?))));
        let last_used = used.collect();
        Ok(Some(StoredKey { key: with_secrets(key, secrets)?, last_used }))
    }
}

/// The key of a verified row with all its secrets, the newest first.
pub(super) fn whole_key(
    row: &KeyRow<'_>,
    secrets: Vec<KeySecret>,
    cache: &mut KeyParseCache,
) -> Result<ApiKey, StoreError> {
    with_secrets(cache.load_key(row, (&[], &[]))?.to_key(), secrets)
}

/// A key with all its secrets, the newest first.
fn with_secrets(mut key: ApiKey, mut secrets: Vec<KeySecret>) -> Result<ApiKey, StoreError> {
    secrets.truncate(count_record_secrets(key.id.as_bytes(), &secrets)?);
    key.secrets = secrets;
    Ok(key)
}

/// How many of a key's secrets (the newest first) are in its record. Fails if any is missing.
pub(super) fn count_record_secrets(key_id: &[u8; 16], secrets: &[KeySecret]) -> Result<usize, StoreError> {
    // No secret is ever deleted: versions count down to 1, and the newest never expires.
    let counted = secrets.iter().rev().map(|secret| secret.version).eq(1..=secrets.len() as u32);
    let open_ended = secrets.first().is_some_and(|newest| newest.expires_at.is_none());
    if counted && open_ended {
        Ok(secrets.len().min(SECRETS_IN_RECORD))
    } else {
        Err(incomplete_secrets(key_id))
    }
}

fn incomplete_secrets(key_id: &[u8; 16]) -> StoreError {
    damaged_error(format_args!("key {}", KeyId::from_bytes(*key_id)), "its secrets are incomplete")
}

pub(super) fn decode_account(row: &impl RowColumns) -> Result<Account, StoreError> {
    let read = || -> ColumnResult<_> {
        let tail = AccountColumns {
            suspended_at: row.int_opt(2)?,
            created_at: row.int(3)?,
            updated_at: row.int(4)?,
            revision: row.int(5)?,
            checksum: row.int(6)?,
            longest_life: row.int_opt(7)?,
        };
        Ok((row.text(0)?, row.text(1)?, tail))
    };
    let (id, name, tail) = read().map_err(unreadable_column)?;
    account_from_columns(id, name, &tail)
}

/// Five columns: three texts, a revision, a checksum.
type FiveColumns<'r> = (&'r str, &'r str, &'r str, i64, i64);

fn read_five_columns(row: &impl RowColumns) -> Result<FiveColumns<'_>, StoreError> {
    let read = || Ok((row.text(0)?, row.text(1)?, row.text(2)?, row.int(3)?, row.int(4)?));
    read().map_err(unreadable_column)
}

pub(super) fn decode_role(row: &impl RowColumns) -> Result<Role, StoreError> {
    let (account, name, scopes, revision, sum) = read_five_columns(row)?;
    role_from_columns(account, name, scopes, revision, sum)
}

pub(super) fn decode_member(row: &impl RowColumns) -> Result<AccountMember, StoreError> {
    let (account, user, role, revision, sum) = read_five_columns(row)?;
    member_from_columns(account, user, role, revision, sum)
}

pub(super) fn decode_quota_usage(row: &impl RowColumns) -> Result<(KeyId, QuotaUsage), StoreError> {
    let read = || -> ColumnResult<_> {
        let used = u64::try_from(row.int(2)?).unwrap_or(0);
        let spent = QuotaUsage { period_start: Timestamp::from_micros(row.int(1)?), used_units: used };
        Ok((KeyId::from_bytes(fixed_bytes(row, 0)?), spent))
    };
    read().map_err(unreadable_column)
}

pub(super) fn decode_usage_count(
    key_id: KeyId,
    row: &impl RowColumns,
) -> Result<Option<UsageCount>, StoreError> {
    let read = || -> ColumnResult<_> { Ok((row.int(0)?, row.int(1)?, row.int(2)?)) };
    let (hour, reason, count) = read().map_err(unreadable_column)?;
    // A newer version may have written a reason that this one does not know.
    let reason = Reason::ALL.into_iter().find(|known| i64::from(*known as u8) == reason);
    Ok(reason.map(|reason| UsageCount {
        key_id,
        hour: UsageHour(hour),
        reason,
        count: u64::try_from(count).unwrap_or(0),
    }))
}

pub(super) fn decode_log_entry(row: &impl RowColumns) -> Result<LogEntry, StoreError> {
    let revision = revision_from_i64(row.int(0).map_err(unreadable_column)?);
    let read = || -> ColumnResult<LogEntry> {
        let account = |column| -> ColumnResult<Option<AccountId>> {
            row.text_opt(column)?
                .map(AccountId::parse)
                .transpose()
                .map_err(|error| sqlx::Error::Decode(Box::new(error)))
        };
        let user = |column| -> ColumnResult<Option<UserId>> {
            row.text_opt(column)?
                .map(UserId::parse)
                .transpose()
                .map_err(|error| sqlx::Error::Decode(Box::new(error)))
        };
        let key_id = row.bytes_opt(4)?;
        Ok(LogEntry {
            revision,
            at: Timestamp::from_micros(row.int(1)?),
            action: row.text(2)?.to_owned(),
            account: account(3)?,
            key_id: key_id.map(|_| fixed_bytes(row, 4).map(KeyId::from_bytes)).transpose()?,
            user: user(5)?,
            actor: row.text(6)?.to_owned(),
            actor_account: account(7)?,
            acting_user: user(8)?,
            method: row.text(9)?.to_owned(),
            payload: row.text(10)?.to_owned(),
            prev_hash: fixed_bytes(row, 11)?,
            hash: fixed_bytes(row, 12)?,
        })
    };
    read().map_err(|error| damaged_error(format_args!("log entry {revision}"), error))
}
