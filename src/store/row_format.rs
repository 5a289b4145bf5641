//! The format of records as rows: columns that both databases share, how they are written, and their checksums.

use std::{borrow::Cow, fmt};

use crate::domain::{
    account::{Account, AccountMember, Role},
    key::{ApiKey, KeySecret, KeySpec, RevokeReason},
    name::{AccountId, DisplayName, KeyId, NameError, RoleName, UserId},
    scope::{Scope, ScopeSet},
    text,
    time::{Revision, Timestamp},
    token::{HexBytes, TokenDigest},
};

use super::error::StoreError;

/// The error for a row that contradicts itself.
pub(super) fn damaged_error(what: impl fmt::Display, problem: impl fmt::Display) -> StoreError {
    StoreError::Damaged(format!("{what}: {problem}"))
}

/// A CRC-32 over the columns of a row, each with its type and length, so that different rows differ.
///
/// The columns are buffered first: many small updates take several times as long. `ROOM` exceeds the length of nearly
/// every row, and is small, since the buffer is zeroed for each row.
struct RowChecksum<const ROOM: usize = 512> {
    hasher: crc32fast::Hasher,
    /// Bytes that the hasher has not seen, up to `buffered`.
    buffer: [u8; ROOM],
    buffered: usize,
}

impl RowChecksum {
    fn new() -> Self {
        RowChecksum::with_capacity()
    }
}

impl<const ROOM: usize> RowChecksum<ROOM> {
    fn with_capacity() -> Self {
        RowChecksum { hasher: crc32fast::Hasher::new(), buffer: [0; ROOM], buffered: 0 }
    }

    fn update(&mut self, bytes: &[u8]) {
        if let Some(room) = self.buffer.get_mut(self.buffered..self.buffered + bytes.len()) {
            room.copy_from_slice(bytes);
            self.buffered += bytes.len();
        } else {
            self.hasher.update(&self.buffer[..self.buffered]);
            self.hasher.update(bytes);
            self.buffered = 0;
        }
    }

    fn add_bytes(&mut self, value: Option<&[u8]>) -> &mut Self {
        match value {
            Some(bytes) => {
                self.update(&(bytes.len() as u64).to_be_bytes());
                self.update(bytes);
            }
            None => self.update(&u64::MAX.to_be_bytes()),
        }
        self
    }

    fn add_text(&mut self, value: Option<&str>) -> &mut Self {
        self.add_bytes(value.map(str::as_bytes))
    }

    fn add_int(&mut self, value: Option<i64>) -> &mut Self {
        match value {
            Some(number) => {
                // Its length and value at once.
                self.update(&(8 << 64 | u128::from(number.cast_unsigned())).to_be_bytes());
            }
            None => self.update(&u64::MAX.to_be_bytes()),
        }
        self
    }

    fn finish(&mut self) -> i64 {
        self.hasher.update(&self.buffer[..self.buffered]);
        self.buffered = 0;
        i64::from(self.hasher.clone().finalize())
    }
}

fn join_words<T: fmt::Display>(list: impl IntoIterator<Item = T>) -> String {
    list.into_iter().map(|item| item.to_string()).collect::<Vec<_>>().join(" ")
}

pub(super) fn parse_words<T>(
    text: &str,
    parse: impl Fn(&str) -> Result<T, NameError>,
) -> Result<Vec<T>, NameError> {
    text.split(' ').filter(|word| !word.is_empty()).map(parse).collect()
}

/// The columns of a key, the same in both databases.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct KeyRow<'r> {
    pub(super) id: [u8; 16],
    pub(super) account: Option<Cow<'r, str>>,
    pub(super) user_id: Option<Cow<'r, str>>,
    pub(super) environment: Cow<'r, str>,
    pub(super) name: Option<Cow<'r, str>>,
    pub(super) scopes: Cow<'r, str>,
    pub(super) roles: Cow<'r, str>,
    pub(super) expires_at: Option<i64>,
    pub(super) customers: Cow<'r, str>,
    pub(super) allowed_cidrs: Cow<'r, str>,
    pub(super) rate_limits: Option<Cow<'r, str>>,
    pub(super) quota: Option<Cow<'r, str>>,
    pub(super) metadata: Option<Cow<'r, str>>,
    pub(super) created_at: i64,
    pub(super) created_by: Cow<'r, str>,
    pub(super) updated_at: i64,
    pub(super) disabled_at: Option<i64>,
    pub(super) revoked_at: Option<i64>,
    pub(super) revoke_reason: Option<Cow<'r, str>>,
    pub(super) revoke_comment: Option<Cow<'r, str>>,
    pub(super) revision: i64,
}

fn to_json<T: serde::Serialize>(value: &T) -> String {
    // Maps, numbers and text cannot fail to serialize.
    serde_json::to_string(value).unwrap_or_default()
}

/// The stable name of a reason: its JSON without the quotes.
fn revoke_reason_text(reason: RevokeReason) -> String {
    to_json(&reason).trim_matches('"').to_owned()
}

impl<'r> KeyRow<'r> {
    pub(super) fn from_key(key: &'r ApiKey) -> Self {
        let ApiKey { id, owner, environment, spec, created_at, created_by, updated_at, .. } = key;
        let KeySpec {
            name,
            scopes,
            roles,
            expires_at,
            customers,
            allowed_cidrs,
            rate_limits,
            quota,
            metadata,
        } = spec;
        let revocation = key.revocation.as_ref();
        KeyRow {
            id: *id.as_bytes(),
            account: owner.account().map(|account| account.as_str().into()),
            user_id: owner.user().map(|user| user.as_str().into()),
            environment: environment.as_str().into(),
            name: name.as_ref().map(|name| name.as_str().into()),
            scopes: join_words(scopes).into(),
            roles: join_words(roles).into(),
            expires_at: expires_at.map(Timestamp::as_micros),
            customers: join_words(customers).into(),
            allowed_cidrs: join_words(allowed_cidrs).into(),
            rate_limits: (!rate_limits.is_empty()).then(|| to_json(rate_limits).into()),
            quota: quota.as_ref().map(|quota| to_json(quota).into()),
            metadata: (!metadata.is_empty()).then(|| to_json(metadata).into()),
            created_at: created_at.as_micros(),
            created_by: created_by.into(),
            updated_at: updated_at.as_micros(),
            disabled_at: key.disabled_at.map(Timestamp::as_micros),
            revoked_at: revocation.map(|revocation| revocation.at.as_micros()),
            revoke_reason: revocation.map(|revocation| revoke_reason_text(revocation.reason).into()),
            revoke_comment: revocation.map(|revocation| revocation.comment.as_str().into()),
            revision: revision_to_i64(key.revision),
        }
    }

    pub(super) fn checksum(&self) -> i64 {
        RowChecksum::new()
            .add_bytes(Some(&self.id))
            .add_text(self.account.as_deref())
            .add_text(self.user_id.as_deref())
            .add_text(Some(&self.environment))
            .add_text(self.name.as_deref())
            .add_text(Some(&self.scopes))
            .add_text(Some(&self.roles))
            .add_int(self.expires_at)
            .add_text(Some(&self.customers))
            .add_text(Some(&self.allowed_cidrs))
            .add_text(self.rate_limits.as_deref())
            .add_text(self.quota.as_deref())
            .add_text(self.metadata.as_deref())
            .add_int(Some(self.created_at))
            .add_text(Some(&self.created_by))
            .add_int(Some(self.updated_at))
            .add_int(self.disabled_at)
            .add_int(self.revoked_at)
            .add_text(self.revoke_reason.as_deref())
            .add_text(self.revoke_comment.as_deref())
            .add_int(Some(self.revision))
            .finish()
    }

    /// The normalized name if it differs from the name; see `0009_names.sql`.
    pub(super) fn name_nfc(&self) -> Option<String> {
        match text::normalize_nfc(self.name.as_deref()?) {
            Cow::Borrowed(_) => None,
            Cow::Owned(name) => Some(name),
        }
    }

    /// Returns the row if its checksum is `sum`.
    pub(super) fn verify_checksum(self, sum: i64) -> Result<Self, StoreError> {
        let id = KeyId::from_bytes(self.id);
        if sum == self.checksum() {
            Ok(self)
        } else {
            Err(damaged_error(format_args!("key {id}"), "its checksum does not match"))
        }
    }

    /// The row as a Check needs it. A revoked key grants nothing, so its grants are not even parsed.
    pub(super) fn without_revoked_grants(self) -> Self {
        if self.revoked_at.is_none() {
            return self;
        }
        KeyRow {
            name: None,
            scopes: "".into(),
            roles: "".into(),
            expires_at: None,
            customers: "".into(),
            allowed_cidrs: "".into(),
            rate_limits: None,
            quota: None,
            metadata: None,
            ..self
        }
    }
}

pub(super) fn parse_json<T: serde::de::DeserializeOwned>(text: &str) -> Result<T, String> {
    serde_json::from_str(text).map_err(|error| error.to_string())
}

/// Revisions start at 0 and never reach 2^63.
pub(super) fn revision_to_i64(revision: Revision) -> i64 {
    i64::try_from(revision.0).unwrap_or(i64::MAX)
}

pub(super) fn revision_from_i64(revision: i64) -> Revision {
    Revision(u64::try_from(revision).unwrap_or(0))
}

/// The columns of a secret, without those of its key.
#[derive(Clone, Copy, Debug)]
pub(super) struct SecretRow<'r> {
    pub(super) digest: &'r [u8],
    pub(super) version: i64,
    pub(super) hint: &'r str,
    pub(super) created_at: i64,
    pub(super) expires_at: Option<i64>,
}

impl SecretRow<'_> {
    fn checksum(&self, key_id: &[u8]) -> i64 {
        RowChecksum::<192>::with_capacity()
            .add_bytes(Some(self.digest))
            .add_bytes(Some(key_id))
            .add_int(Some(self.version))
            .add_text(Some(self.hint))
            .add_int(Some(self.created_at))
            .add_int(self.expires_at)
            .finish()
    }

    /// Decodes the secret, with or without its hint, if its checksum is `sum`.
    pub(super) fn into_secret(self, key_id: &[u8], sum: i64, hint: bool) -> Result<KeySecret, StoreError> {
        let wrong = |problem| damaged_error(format_args!("a secret of key {}", HexBytes(key_id)), problem);
        if sum != self.checksum(key_id) {
            return Err(wrong("its checksum does not match"));
        }
        let version = u32::try_from(self.version).map_err(|_| wrong("its version is out of range"))?;
        let digest = self.digest.try_into().map_err(|_| wrong("its digest is not 32 bytes"))?;
        Ok(KeySecret {
            version,
            digest: TokenDigest::from_bytes(digest),
            hint: if hint { self.hint.to_owned() } else { String::new() },
            created_at: Timestamp::from_micros(self.created_at),
            expires_at: self.expires_at.map(Timestamp::from_micros),
        })
    }
}

/// The checksum of a secret's row.
pub(super) fn secret_checksum(key_id: &[u8], secret: &KeySecret) -> i64 {
    let row = SecretRow {
        digest: secret.digest.as_bytes(),
        version: secret.version.into(),
        hint: &secret.hint,
        created_at: secret.created_at.as_micros(),
        expires_at: secret.expires_at.map(Timestamp::as_micros),
    };
    row.checksum(key_id)
}

/// The checksum of an account's row. A column that was added later counts only if it is set, so older rows keep their
/// checksums.
pub(super) fn account_checksum(account: &Account) -> i64 {
    let mut sum = RowChecksum::new();
    sum.add_text(Some(account.id.as_str()))
        .add_text(Some(account.name.as_str()))
        .add_int(account.suspended_at.map(Timestamp::as_micros))
        .add_int(Some(account.created_at.as_micros()))
        .add_int(Some(account.updated_at.as_micros()))
        .add_int(Some(revision_to_i64(account.revision)));
    match longest_life_micros(account) {
        Some(life) => sum.add_int(Some(life)).finish(),
        None => sum.finish(),
    }
}

/// The longest allowed life of a key in microseconds, as it is stored.
pub(super) fn longest_life_micros(account: &Account) -> Option<i64> {
    account.longest_life.map(|life| i64::try_from(life.as_micros()).unwrap_or(i64::MAX))
}

/// The columns of an account after its id and name.
pub(super) struct AccountColumns {
    pub(super) suspended_at: Option<i64>,
    pub(super) created_at: i64,
    pub(super) updated_at: i64,
    pub(super) revision: i64,
    pub(super) checksum: i64,
    pub(super) longest_life: Option<i64>,
}

/// Decodes an account and verifies its checksum.
pub(super) fn account_from_columns(
    id: &str,
    name: &str,
    tail: &AccountColumns,
) -> Result<Account, StoreError> {
    let what = || format!("account {id:?}");
    let account = Account {
        id: AccountId::parse(id).map_err(|error| damaged_error(what(), error))?,
        name: DisplayName::from_stored(name).map_err(|error| damaged_error(what(), error))?,
        suspended_at: tail.suspended_at.map(Timestamp::from_micros),
        longest_life: tail
            .longest_life
            .map(|life| std::time::Duration::from_micros(u64::try_from(life).unwrap_or(0))),
        created_at: Timestamp::from_micros(tail.created_at),
        updated_at: Timestamp::from_micros(tail.updated_at),
        revision: revision_from_i64(tail.revision),
    };
    verify_record_checksum(account, tail.checksum, account_checksum, what)
}

/// Returns the record if its checksum is `sum`.
fn verify_record_checksum<T>(
    record: T,
    sum: i64,
    sum_of: impl Fn(&T) -> i64,
    what: impl Fn() -> String,
) -> Result<T, StoreError> {
    if sum == sum_of(&record) {
        Ok(record)
    } else {
        Err(damaged_error(what(), "its checksum does not match"))
    }
}

/// The account of a role as it is stored; empty for a global role.
pub(super) fn role_account_column(account: Option<&AccountId>) -> &str {
    account.map_or("", AccountId::as_str)
}

/// The scopes of a role as they are stored, separated by spaces.
pub(super) fn role_scopes_column(role: &Role) -> String {
    join_words(&role.scopes)
}

/// The checksum of a role's row.
pub(super) fn role_checksum(role: &Role) -> i64 {
    RowChecksum::new()
        .add_text(Some(role_account_column(role.account.as_ref())))
        .add_text(Some(role.name.as_str()))
        .add_text(Some(&role_scopes_column(role)))
        .add_int(Some(revision_to_i64(role.revision)))
        .finish()
}

/// Decodes a role and verifies its checksum.
pub(super) fn role_from_columns(
    account: &str,
    name: &str,
    scopes: &str,
    revision: i64,
    sum: i64,
) -> Result<Role, StoreError> {
    let what = || format!("role {name:?} of account {account:?}");
    let bad = |error: NameError| damaged_error(what(), error);
    let account = if account.is_empty() { None } else { Some(AccountId::parse(account).map_err(bad)?) };
    let role = Role {
        account,
        name: RoleName::parse(name).map_err(bad)?,
        scopes: ScopeSet::from(parse_words(scopes, Scope::parse_grant).map_err(bad)?),
        revision: revision_from_i64(revision),
    };
    verify_record_checksum(role, sum, role_checksum, what)
}

/// The checksum of a member's row.
pub(super) fn member_checksum(member: &AccountMember) -> i64 {
    RowChecksum::new()
        .add_text(Some(member.account.as_str()))
        .add_text(Some(member.user.as_str()))
        .add_text(Some(member.role.as_str()))
        .add_int(Some(revision_to_i64(member.revision)))
        .finish()
}

/// Decodes a membership and verifies its checksum.
pub(super) fn member_from_columns(
    account: &str,
    user: &str,
    role: &str,
    revision: i64,
    sum: i64,
) -> Result<AccountMember, StoreError> {
    let what = || format!("member {user:?} of account {account:?}");
    let bad = |error: NameError| damaged_error(what(), error);
    let member = AccountMember {
        account: AccountId::parse(account).map_err(bad)?,
        user: UserId::parse(user).map_err(bad)?,
        role: RoleName::parse(role).map_err(bad)?,
        revision: revision_from_i64(revision),
    };
    verify_record_checksum(member, sum, member_checksum, what)
}
