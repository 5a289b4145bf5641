//! Reads the rows that describe the state of the tables before a run of writes.
//!
//! The order of the columns is the same for both databases. `postgres/pre_state.rs` and `sqlite/pre_state.rs` have the
//! statements.

use crate::domain::{
    key::KeyOwner,
    log_format::LogFormat,
    name::{AccountId, IdempotencyKey, KeyId, KeyName, NameError, RoleName, UserId},
    time::Timestamp,
    token::TokenDigest,
};

use super::{
    UsageHour,
    owner_tally::OwnerTally,
    row_decoding::{RowColumns, decode_secret, fixed_bytes},
    row_format::revision_from_i64,
    write_plan::{NameHolder, PreState, RecordedRequest, RoleId, StoredSecret},
};

pub(super) type PreStateResult<T> = Result<T, sqlx::Error>;

/// Adds one row of a statement to the state.
pub(super) type RowReader<R> = fn(&R, &mut PreState) -> PreStateResult<()>;

/// Parses a column that contains a name.
fn name_column<T>(
    row: &impl RowColumns,
    column: usize,
    parse: impl Fn(&str) -> Result<T, NameError>,
) -> PreStateResult<T> {
    parse(row.text(column)?).map_err(|error| sqlx::Error::Decode(Box::new(error)))
}

fn key_id_column(row: &impl RowColumns, column: usize) -> PreStateResult<KeyId> {
    Ok(KeyId::from_bytes(fixed_bytes(row, column)?))
}

fn version_column(row: &impl RowColumns, column: usize) -> PreStateResult<u32> {
    u32::try_from(row.int(column)?).map_err(|error| sqlx::Error::Decode(Box::new(error)))
}

/// Columns: caller, idempotency key, id of the created key, fingerprint, time.
pub(super) fn read_request(row: &impl RowColumns, state: &mut PreState) -> PreStateResult<()> {
    let request = RecordedRequest {
        key_id: key_id_column(row, 2)?,
        fingerprint: fixed_bytes(row, 3)?,
        created_at: Timestamp::from_micros(row.int(4)?),
    };
    state.requests.insert((key_id_column(row, 0)?, name_column(row, 1, IdempotencyKey::parse)?), request);
    Ok(())
}

/// Columns: id of the key, revision.
pub(super) fn read_key(row: &impl RowColumns, state: &mut PreState) -> PreStateResult<()> {
    state.keys.insert(key_id_column(row, 0)?, revision_from_i64(row.int(1)?));
    Ok(())
}

/// Columns: account or NULL, user or NULL, normalized name, id of the key that has it, name in its row.
pub(super) fn read_name(row: &impl RowColumns, state: &mut PreState) -> PreStateResult<()> {
    let owner = match row.text_opt(0)? {
        Some(_) => KeyOwner::Account(name_column(row, 0, AccountId::parse)?),
        None => KeyOwner::User(name_column(row, 1, UserId::parse)?),
    };
    let name = name_column(row, 2, KeyName::from_stored)?;
    let holder = NameHolder {
        key_id: key_id_column(row, 3)?,
        stored_name: name_column(row, 4, KeyName::from_stored)?,
    };
    state.names.entry((owner, name)).or_default().push(holder);
    Ok(())
}

/// Columns: digest, id of the key, version of the secret, its expiry, its checksum.
pub(super) fn read_digest(row: &impl RowColumns, state: &mut PreState) -> PreStateResult<()> {
    let stored_row = (row.int_opt(3)?.map(Timestamp::from_micros), row.int(4)?);
    let secret = StoredSecret {
        key_id: key_id_column(row, 1)?,
        version: version_column(row, 2)?,
        stored_row: Some(stored_row),
    };
    state.digests.insert(TokenDigest::from_bytes(fixed_bytes(row, 0)?), secret);
    Ok(())
}

/// Columns: those of [`decode_secret`] for a secret that left the record of its key, then the id of the key.
pub(super) fn read_retired_secret(row: &impl RowColumns, state: &mut PreState) -> PreStateResult<()> {
    let id = key_id_column(row, 6)?;
    let secret =
        decode_secret(row, id.as_bytes(), 0, true).map_err(|error| sqlx::Error::Decode(Box::new(error)))?;
    state.retired_secrets.insert(id, secret);
    Ok(())
}

/// Columns: id of the account, revision.
pub(super) fn read_account(row: &impl RowColumns, state: &mut PreState) -> PreStateResult<()> {
    state.accounts.insert(name_column(row, 0, AccountId::parse)?, revision_from_i64(row.int(1)?));
    Ok(())
}

/// Columns: case-folded id of the account, its id.
pub(super) fn read_folded_account(row: &impl RowColumns, state: &mut PreState) -> PreStateResult<()> {
    state.folded_accounts.insert(row.text(0)?.to_owned(), name_column(row, 1, AccountId::parse)?);
    Ok(())
}

/// Columns: account (empty for a global role), name, revision.
pub(super) fn read_role(row: &impl RowColumns, state: &mut PreState) -> PreStateResult<()> {
    let account = if row.text(0)?.is_empty() { None } else { Some(name_column(row, 0, AccountId::parse)?) };
    let role: RoleId = (account, name_column(row, 1, RoleName::parse)?);
    state.roles.insert(role, revision_from_i64(row.int(2)?));
    Ok(())
}

/// Columns: account, user, revision of the membership.
pub(super) fn read_member(row: &impl RowColumns, state: &mut PreState) -> PreStateResult<()> {
    let member = (name_column(row, 0, AccountId::parse)?, name_column(row, 1, UserId::parse)?);
    state.members.insert(member, revision_from_i64(row.int(2)?));
    Ok(())
}

/// Columns: account (empty for a user), user, keys, hour, rotations, log entries.
pub(super) fn read_tally(row: &impl RowColumns, state: &mut PreState) -> PreStateResult<()> {
    let number = |at| row.int(at).map(|count| u64::try_from(count).unwrap_or(0));
    let owner = match row.text(0)? {
        "" => KeyOwner::User(name_column(row, 1, UserId::parse)?),
        _ => KeyOwner::Account(name_column(row, 0, AccountId::parse)?),
    };
    let hour = Some(UsageHour(row.int(3)?));
    let tally = OwnerTally { keys: number(2)?, hour, rotations: number(4)?, log_rows: number(5)? };
    state.tallies.insert(owner, tally);
    Ok(())
}

/// Columns: account, number of its roles.
pub(super) fn read_role_count(row: &impl RowColumns, state: &mut PreState) -> PreStateResult<()> {
    let count = u64::try_from(row.int(1)?).unwrap_or(0);
    state.role_counts.insert(name_column(row, 0, AccountId::parse)?, count);
    Ok(())
}

/// Columns: newest format of the log; name of a replica that cannot read the run's format, or NULL; newest format that
/// this replica reads.
pub(super) fn log_fence(row: &impl RowColumns, state: &mut PreState) -> PreStateResult<()> {
    state.fence.newest = LogFormat(version_column(row, 0)?);
    if let Some(name) = row.text_opt(1)? {
        state.fence.replicas.push((name.to_owned(), LogFormat(version_column(row, 2)?)));
    }
    Ok(())
}

/// Columns: number of unrevoked keys with the role, number of members with it.
pub(super) fn read_role_uses(row: &impl RowColumns, state: &mut PreState) -> PreStateResult<()> {
    let number = |count: i64| u64::try_from(count).unwrap_or(0);
    state.role_uses = (number(row.int(0)?), number(row.int(1)?));
    Ok(())
}
