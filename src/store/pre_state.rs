//! The rows that answer a run's questions, read as facts: the order of the columns, the same for both databases. How
//! each is asked for is in `postgres/facts.rs` and in `sqlite/facts.rs`.

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

/// What a row of the answer to a question tells.
pub(super) type RowReader<R> = fn(&R, &mut PreState) -> PreStateResult<()>;

/// A column that holds a name.
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

/// Caller, key, id of what was made, fingerprint, instant.
pub(super) fn read_request(row: &impl RowColumns, facts: &mut PreState) -> PreStateResult<()> {
    let request = RecordedRequest {
        key_id: key_id_column(row, 2)?,
        fingerprint: fixed_bytes(row, 3)?,
        created_at: Timestamp::from_micros(row.int(4)?),
    };
    facts.requests.insert((key_id_column(row, 0)?, name_column(row, 1, IdempotencyKey::parse)?), request);
    Ok(())
}

/// Id and revision.
pub(super) fn read_key(row: &impl RowColumns, facts: &mut PreState) -> PreStateResult<()> {
    facts.keys.insert(key_id_column(row, 0)?, revision_from_i64(row.int(1)?));
    Ok(())
}

/// Account or NULL, user or NULL, normalized name, id of the key that has it, the name in its row.
pub(super) fn read_name(row: &impl RowColumns, facts: &mut PreState) -> PreStateResult<()> {
    let owner = match row.text_opt(0)? {
        Some(_) => KeyOwner::Account(name_column(row, 0, AccountId::parse)?),
        None => KeyOwner::User(name_column(row, 1, UserId::parse)?),
    };
    let name = name_column(row, 2, KeyName::from_stored)?;
    let holder = NameHolder {
        key_id: key_id_column(row, 3)?,
        stored_name: name_column(row, 4, KeyName::from_stored)?,
    };
    facts.names.entry((owner, name)).or_default().push(holder);
    Ok(())
}

/// Digest, key and version of its secret, its end and its checksum.
pub(super) fn read_digest(row: &impl RowColumns, facts: &mut PreState) -> PreStateResult<()> {
    let says = (row.int_opt(3)?.map(Timestamp::from_micros), row.int(4)?);
    let held = StoredSecret {
        key_id: key_id_column(row, 1)?,
        version: version_column(row, 2)?,
        stored_row: Some(says),
    };
    facts.digests.insert(TokenDigest::from_bytes(fixed_bytes(row, 0)?), held);
    Ok(())
}

/// A secret that left its key's record, as [`decode_secret`] reads it, and the key's id.
pub(super) fn read_retired_secret(row: &impl RowColumns, facts: &mut PreState) -> PreStateResult<()> {
    let id = key_id_column(row, 6)?;
    let secret =
        decode_secret(row, id.as_bytes(), 0, true).map_err(|error| sqlx::Error::Decode(Box::new(error)))?;
    facts.retired_secrets.insert(id, secret);
    Ok(())
}

/// Id and revision.
pub(super) fn read_account(row: &impl RowColumns, facts: &mut PreState) -> PreStateResult<()> {
    facts.accounts.insert(name_column(row, 0, AccountId::parse)?, revision_from_i64(row.int(1)?));
    Ok(())
}

/// Case-folded id and id.
pub(super) fn read_folded_account(row: &impl RowColumns, facts: &mut PreState) -> PreStateResult<()> {
    facts.folded_accounts.insert(row.text(0)?.to_owned(), name_column(row, 1, AccountId::parse)?);
    Ok(())
}

/// Account, which is empty for a global one; name and revision.
pub(super) fn read_role(row: &impl RowColumns, facts: &mut PreState) -> PreStateResult<()> {
    let account = if row.text(0)?.is_empty() { None } else { Some(name_column(row, 0, AccountId::parse)?) };
    let place: RoleId = (account, name_column(row, 1, RoleName::parse)?);
    facts.roles.insert(place, revision_from_i64(row.int(2)?));
    Ok(())
}

/// Account, user and revision.
pub(super) fn read_member(row: &impl RowColumns, facts: &mut PreState) -> PreStateResult<()> {
    let place = (name_column(row, 0, AccountId::parse)?, name_column(row, 1, UserId::parse)?);
    facts.members.insert(place, revision_from_i64(row.int(2)?));
    Ok(())
}

/// Account, which is empty for a user's; user; keys, hour, rotations and entries of the log.
pub(super) fn read_tally(row: &impl RowColumns, facts: &mut PreState) -> PreStateResult<()> {
    let number = |at| row.int(at).map(|count| u64::try_from(count).unwrap_or(0));
    let owner = match row.text(0)? {
        "" => KeyOwner::User(name_column(row, 1, UserId::parse)?),
        _ => KeyOwner::Account(name_column(row, 0, AccountId::parse)?),
    };
    let hour = Some(UsageHour(row.int(3)?));
    let tally = OwnerTally { keys: number(2)?, hour, rotations: number(4)?, log_rows: number(5)? };
    facts.tallies.insert(owner, tally);
    Ok(())
}

/// Account and how many roles it has.
pub(super) fn read_role_count(row: &impl RowColumns, facts: &mut PreState) -> PreStateResult<()> {
    let count = u64::try_from(row.int(1)?).unwrap_or(0);
    facts.role_counts.insert(name_column(row, 0, AccountId::parse)?, count);
    Ok(())
}

/// The newest format of the log; name of a replica that does not read the run's, or NULL, and the newest that it reads.
pub(super) fn log_fence(row: &impl RowColumns, facts: &mut PreState) -> PreStateResult<()> {
    facts.fence.newest = LogFormat(version_column(row, 0)?);
    if let Some(name) = row.text_opt(1)? {
        facts.fence.replicas.push((name.to_owned(), LogFormat(version_column(row, 2)?)));
    }
    Ok(())
}

/// How many unrevoked keys and how many members have the role.
pub(super) fn read_role_uses(row: &impl RowColumns, facts: &mut PreState) -> PreStateResult<()> {
    let number = |count: i64| u64::try_from(count).unwrap_or(0);
    facts.role_uses = (number(row.int(0)?), number(row.int(1)?));
    Ok(())
}
