//! Rows as they come out of either database, read as records: the order of the columns, and what makes a run of
//! rows a key. What a column holds and how a row is summed is in `rows.rs`.

use std::borrow::Cow;

use sqlx::Row as _;

use crate::domain::{
    account::{Account, Member, Role},
    decision::Reason,
    key::{Key, Secret},
    limit::Spent,
    log::{Hash, LogRow},
    name::{AccountId, KeyId, UserId},
    time::{Revision, Timestamp},
};

use super::{
    Checkpoint, Count, Head, Hour, StoreError, StoredKey,
    alike::Alike,
    rows::{
        AccountTail, KeyRow, SecretRow, account_from, damaged, member_from, revision_from_i64, role_from,
    },
};

type Read<T> = Result<T, sqlx::Error>;

/// A row's columns by their places, in the three types that both databases keep.
pub(super) trait Columns {
    fn text(&self, at: usize) -> Read<&str>;
    fn text_opt(&self, at: usize) -> Read<Option<&str>>;
    fn int(&self, at: usize) -> Read<i64>;
    fn int_opt(&self, at: usize) -> Read<Option<i64>>;
    fn bytes(&self, at: usize) -> Read<&[u8]>;
    fn bytes_opt(&self, at: usize) -> Read<Option<&[u8]>>;
    /// Text that people wrote, in which any character may stand.
    fn free_text_opt(&self, at: usize) -> Read<Option<Cow<'_, str>>>;
}

macro_rules! columns {
    ($row:ty, $free_text:expr) => {
        impl Columns for $row {
            fn text(&self, at: usize) -> Read<&str> {
                self.try_get(at)
            }

            fn text_opt(&self, at: usize) -> Read<Option<&str>> {
                self.try_get(at)
            }

            fn int(&self, at: usize) -> Read<i64> {
                self.try_get(at)
            }

            fn int_opt(&self, at: usize) -> Read<Option<i64>> {
                self.try_get(at)
            }

            fn bytes(&self, at: usize) -> Read<&[u8]> {
                self.try_get(at)
            }

            fn bytes_opt(&self, at: usize) -> Read<Option<&[u8]>> {
                self.try_get(at)
            }

            fn free_text_opt(&self, at: usize) -> Read<Option<Cow<'_, str>>> {
                $free_text(self, at)
            }
        }
    };
}

fn sqlite_text(row: &sqlx::sqlite::SqliteRow, at: usize) -> Read<Option<Cow<'_, str>>> {
    Ok(row.text_opt(at)?.map(Cow::Borrowed))
}

/// PostgreSQL's text cannot hold the character zero: there such text is bytes.
fn postgres_text(row: &sqlx::postgres::PgRow, at: usize) -> Read<Option<Cow<'_, str>>> {
    let text = row.bytes_opt(at)?.map(str::from_utf8).transpose();
    text.map(|text| text.map(Cow::Borrowed)).map_err(|error| sqlx::Error::Decode(error.into()))
}

columns!(sqlx::sqlite::SqliteRow, sqlite_text);
columns!(sqlx::postgres::PgRow, postgres_text);

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
/// How many of a key's secrets are in its record.
const IN_RECORD: usize = 2;

/// A column that holds exactly `N` bytes.
pub(super) fn bytes_at<const N: usize>(row: &impl Columns, column: usize) -> Read<[u8; N]> {
    let bytes = row.bytes(column)?;
    bytes.try_into().map_err(|_| sqlx::Error::Decode(format!("column {column} is not {N} bytes").into()))
}

/// A column that cannot be read as what it should be.
pub(super) fn unreadable(error: sqlx::Error) -> StoreError {
    StoreError::Unavailable(error.into())
}

/// Head and hash, in [`HEAD_COLUMNS`].
pub(super) fn head_at(row: &impl Columns) -> Result<Head, StoreError> {
    let read = || -> Read<(i64, Hash)> { Ok((row.int(0)?, bytes_at(row, 1)?)) };
    let (revision, hash) = read().map_err(unreadable)?;
    Ok(Head { revision: revision_from_i64(revision), hash })
}

/// A key's id and revision.
pub(super) fn key_revision_at(row: &impl Columns) -> Result<(KeyId, Revision), StoreError> {
    let read = || -> Read<_> { Ok((KeyId::from_bytes(bytes_at(row, 0)?), row.int(1)?)) };
    let (id, revision) = read().map_err(unreadable)?;
    Ok((id, revision_from_i64(revision)))
}

/// The columns of the checkpoint query.
pub(super) fn checkpoint_at(row: &impl Columns) -> Result<Checkpoint, StoreError> {
    let at = head_at(row)?;
    let read = || -> Read<(i64, i64)> { Ok((row.int(2)?, row.int(3)?)) };
    let (entries, made_at) = read().map_err(unreadable)?;
    let entries = u64::try_from(entries).unwrap_or(0);
    Ok(Checkpoint { at, entries, made_at: Timestamp::from_micros(made_at) })
}

/// A key's row in [`KEY_COLUMNS`] and its checksum.
pub(super) fn key_row(row: &impl Columns) -> Result<(KeyRow<'_>, i64), StoreError> {
    let read = || -> Read<_> { Ok((key_row_at(row)?, row.int(21)?)) };
    read().map_err(unreadable)
}

/// A key without its secrets, once the row's checksum has been found right.
fn key_at(row: &impl Columns, alike: &mut Alike) -> Result<Key, StoreError> {
    let (key, sum) = key_row(row)?;
    Ok(key.checked(sum)?.to_loaded(alike, (&[], &[]))?.to_key())
}

fn key_row_at(row: &impl Columns) -> Read<KeyRow<'_>> {
    let text = |at| Ok::<_, sqlx::Error>(Cow::Borrowed(row.text(at)?));
    let text_opt = |at| Ok::<_, sqlx::Error>(row.text_opt(at)?.map(Cow::Borrowed));
    Ok(KeyRow {
        id: bytes_at(row, 0)?,
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
        revoke_comment: row.free_text_opt(19)?,
        revision: row.int(20)?,
    })
}

/// The secret whose columns begin at `from`, in the order of [`SECRET_COLUMNS`] up to its checksum, once the row's checksum has been found
/// right; with its hint or without.
pub(super) fn secret_at(
    row: &impl Columns,
    key_id: &[u8],
    from: usize,
    hint: bool,
) -> Result<Secret, StoreError> {
    let read = || -> Read<_> {
        let secret = SecretRow {
            digest: row.bytes(from)?,
            version: row.int(from + 1)?,
            hint: row.text(from + 2)?,
            created_at: row.int(from + 3)?,
            expires_at: row.int_opt(from + 4)?,
        };
        Ok((secret, row.int(from + 5)?))
    };
    let (secret, sum) = read().map_err(unreadable)?;
    secret.into_secret(key_id, sum, hint)
}

/// Joined rows of keys, secrets and their latest uses, a key's rows in a run with the newest secret first, as keys.
#[derive(Default)]
pub(super) struct Gather {
    key: Option<Key>,
    secrets: Vec<(Secret, Option<i64>)>,
    alike: Alike,
}

impl Gather {
    /// Begins with what was parsed before.
    pub(super) fn with_cache(alike: Alike) -> Gather {
        Gather { alike, ..Gather::default() }
    }

    /// What was parsed.
    pub(super) fn into_cache(self) -> Alike {
        self.alike
    }

    /// Takes a row; gives the key before it when the row begins another.
    pub(super) fn row(&mut self, row: &impl Columns) -> Result<Option<StoredKey>, StoreError> {
        let id: [u8; 16] = bytes_at(row, 0).map_err(unreadable)?;
        let mut done = None;
        if self.key.as_ref().is_none_or(|key| *key.id.as_bytes() != id) {
            done = self.finish()?;
            self.key = Some(key_at(row, &mut self.alike)?);
        }
        if row.bytes_opt(KEY_COLUMN_COUNT).map_err(unreadable)?.is_none() {
            return Err(incomplete(&id));
        }
        let secret = secret_at(row, &id, KEY_COLUMN_COUNT, true)?;
        self.secrets.push((secret, row.int_opt(KEY_COLUMN_COUNT + 6).map_err(unreadable)?));
        Ok(done)
    }

    /// The last key.
    pub(super) fn finish(&mut self) -> Result<Option<StoredKey>, StoreError> {
        let Some(key) = self.key.take() else {
            return Ok(None);
        };
        let (secrets, used): (Vec<_>, Vec<_>) = std::mem::take(&mut self.secrets).into_iter().unzip();
        let versions = secrets.iter().map(|secret| secret.version);
        let used =
            versions.zip(used).filter_map(|(version, used)| Some((version, Timestamp::from_micros(used?))));
        let last_used = used.collect();
        Ok(Some(StoredKey { key: whole(key, secrets)?, last_used }))
    }
}

/// The key of a row whose checksum has been found right, with all its secrets, the newest first.
pub(super) fn whole_key(
    row: &KeyRow<'_>,
    secrets: Vec<Secret>,
    alike: &mut Alike,
) -> Result<Key, StoreError> {
    whole(row.to_loaded(alike, (&[], &[]))?.to_key(), secrets)
}

/// A key with all its secrets, the newest first.
fn whole(mut key: Key, mut secrets: Vec<Secret>) -> Result<Key, StoreError> {
    secrets.truncate(in_record(key.id.as_bytes(), &secrets)?);
    key.secrets = secrets;
    Ok(key)
}

/// How many of a key's secrets, the newest first, are in its record; if they are all there.
pub(super) fn in_record(key_id: &[u8; 16], secrets: &[Secret]) -> Result<usize, StoreError> {
    // None is ever removed: they count down to 1, and the newest has no end.
    let counted = secrets.iter().rev().map(|secret| secret.version).eq(1..=secrets.len() as u32);
    let open_ended = secrets.first().is_some_and(|newest| newest.expires_at.is_none());
    if counted && open_ended { Ok(secrets.len().min(IN_RECORD)) } else { Err(incomplete(key_id)) }
}

fn incomplete(key_id: &[u8; 16]) -> StoreError {
    damaged(format_args!("key {}", KeyId::from_bytes(*key_id)), "its secrets are incomplete")
}

pub(super) fn account_at(row: &impl Columns) -> Result<Account, StoreError> {
    let read = || -> Read<_> {
        let tail = AccountTail {
            suspended_at: row.int_opt(2)?,
            created_at: row.int(3)?,
            updated_at: row.int(4)?,
            revision: row.int(5)?,
            sum: row.int(6)?,
            longest_life: row.int_opt(7)?,
        };
        Ok((row.text(0)?, row.text(1)?, tail))
    };
    let (id, name, tail) = read().map_err(unreadable)?;
    account_from(id, name, &tail)
}

/// Five columns: three texts, a revision, a checksum.
type Small<'r> = (&'r str, &'r str, &'r str, i64, i64);

fn small_at(row: &impl Columns) -> Result<Small<'_>, StoreError> {
    let read = || Ok((row.text(0)?, row.text(1)?, row.text(2)?, row.int(3)?, row.int(4)?));
    read().map_err(unreadable)
}

pub(super) fn role_at(row: &impl Columns) -> Result<Role, StoreError> {
    let (account, name, scopes, revision, sum) = small_at(row)?;
    role_from(account, name, scopes, revision, sum)
}

pub(super) fn member_at(row: &impl Columns) -> Result<Member, StoreError> {
    let (account, user, role, revision, sum) = small_at(row)?;
    member_from(account, user, role, revision, sum)
}

pub(super) fn spent_at(row: &impl Columns) -> Result<(KeyId, Spent), StoreError> {
    let read = || -> Read<_> {
        let used = u64::try_from(row.int(2)?).unwrap_or(0);
        let spent = Spent { period: Timestamp::from_micros(row.int(1)?), used };
        Ok((KeyId::from_bytes(bytes_at(row, 0)?), spent))
    };
    read().map_err(unreadable)
}

pub(super) fn count_at(key_id: KeyId, row: &impl Columns) -> Result<Option<Count>, StoreError> {
    let read = || -> Read<_> { Ok((row.int(0)?, row.int(1)?, row.int(2)?)) };
    let (hour, reason, count) = read().map_err(unreadable)?;
    // A reason that a newer version wrote is not shown by this one.
    let reason = Reason::ALL.into_iter().find(|known| i64::from(*known as u8) == reason);
    Ok(reason.map(|reason| Count {
        key_id,
        hour: Hour(hour),
        reason,
        count: u64::try_from(count).unwrap_or(0),
    }))
}

pub(super) fn log_at(row: &impl Columns) -> Result<LogRow, StoreError> {
    let revision = revision_from_i64(row.int(0).map_err(unreadable)?);
    let read = || -> Read<LogRow> {
        let account = |column| -> Read<Option<AccountId>> {
            row.text_opt(column)?
                .map(AccountId::parse)
                .transpose()
                .map_err(|error| sqlx::Error::Decode(Box::new(error)))
        };
        let user = |column| -> Read<Option<UserId>> {
            row.text_opt(column)?
                .map(UserId::parse)
                .transpose()
                .map_err(|error| sqlx::Error::Decode(Box::new(error)))
        };
        let key_id = row.bytes_opt(4)?;
        Ok(LogRow {
            revision,
            at: Timestamp::from_micros(row.int(1)?),
            action: row.text(2)?.to_owned(),
            account: account(3)?,
            key_id: key_id.map(|_| bytes_at(row, 4).map(KeyId::from_bytes)).transpose()?,
            user: user(5)?,
            actor: row.text(6)?.to_owned(),
            actor_account: account(7)?,
            acting_user: user(8)?,
            method: row.text(9)?.to_owned(),
            payload: row.text(10)?.to_owned(),
            prev_hash: bytes_at(row, 11)?,
            hash: bytes_at(row, 12)?,
        })
    };
    read().map_err(|error| damaged(format_args!("log entry {revision}"), error))
}
