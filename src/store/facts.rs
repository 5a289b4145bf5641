//! The rows that answer a run's questions, read as facts: the order of the columns, the same for both databases. How
//! each is asked for is in `postgres/facts.rs` and in `sqlite/facts.rs`.

use crate::domain::{
    key::Owner,
    log_format::LogFormat,
    name::{AccountId, IdempotencyKey, KeyId, KeyName, NameError, RoleName, UserId},
    time::Timestamp,
    token::Digest,
};

use super::{
    Hour,
    plan::{Facts, Held, NameHolder, Request, RolePlace},
    records::{Columns, bytes_at, secret_at},
    rows::revision_from_i64,
    tally::Tally,
};

pub(super) type Read<T> = Result<T, sqlx::Error>;

/// What a row of the answer to a question tells.
pub(super) type Take<R> = fn(&R, &mut Facts) -> Read<()>;

/// A column that holds a name.
fn name_at<T>(row: &impl Columns, column: usize, parse: impl Fn(&str) -> Result<T, NameError>) -> Read<T> {
    parse(row.text(column)?).map_err(|error| sqlx::Error::Decode(Box::new(error)))
}

fn id_at(row: &impl Columns, column: usize) -> Read<KeyId> {
    Ok(KeyId::from_bytes(bytes_at(row, column)?))
}

fn version_at(row: &impl Columns, column: usize) -> Read<u32> {
    u32::try_from(row.int(column)?).map_err(|error| sqlx::Error::Decode(Box::new(error)))
}

/// Caller, key, id of what was made, fingerprint, instant.
pub(super) fn request(row: &impl Columns, facts: &mut Facts) -> Read<()> {
    let request = Request {
        key_id: id_at(row, 2)?,
        fingerprint: bytes_at(row, 3)?,
        created_at: Timestamp::from_micros(row.int(4)?),
    };
    facts.requests.insert((id_at(row, 0)?, name_at(row, 1, IdempotencyKey::parse)?), request);
    Ok(())
}

/// Id and revision.
pub(super) fn key(row: &impl Columns, facts: &mut Facts) -> Read<()> {
    facts.keys.insert(id_at(row, 0)?, revision_from_i64(row.int(1)?));
    Ok(())
}

/// Account or NULL, user or NULL, normalized name, id of the key that has it, the name in its row.
pub(super) fn name(row: &impl Columns, facts: &mut Facts) -> Read<()> {
    let owner = match row.text_opt(0)? {
        Some(_) => Owner::Account(name_at(row, 0, AccountId::parse)?),
        None => Owner::User(name_at(row, 1, UserId::parse)?),
    };
    let name = name_at(row, 2, KeyName::from_stored)?;
    let holder = NameHolder { key_id: id_at(row, 3)?, stored: name_at(row, 4, KeyName::from_stored)? };
    facts.names.entry((owner, name)).or_default().push(holder);
    Ok(())
}

/// Digest, key and version of its secret, its end and its checksum.
pub(super) fn digest(row: &impl Columns, facts: &mut Facts) -> Read<()> {
    let says = (row.int_opt(3)?.map(Timestamp::from_micros), row.int(4)?);
    let held = Held { key_id: id_at(row, 1)?, version: version_at(row, 2)?, row: Some(says) };
    facts.digests.insert(Digest::from_bytes(bytes_at(row, 0)?), held);
    Ok(())
}

/// A secret that left its key's record, as [`secret_at`] reads it, and the key's id.
pub(super) fn left(row: &impl Columns, facts: &mut Facts) -> Read<()> {
    let id = id_at(row, 6)?;
    let secret =
        secret_at(row, id.as_bytes(), 0, true).map_err(|error| sqlx::Error::Decode(Box::new(error)))?;
    facts.left.insert(id, secret);
    Ok(())
}

/// Id and revision.
pub(super) fn account(row: &impl Columns, facts: &mut Facts) -> Read<()> {
    facts.accounts.insert(name_at(row, 0, AccountId::parse)?, revision_from_i64(row.int(1)?));
    Ok(())
}

/// Case-folded id and id.
pub(super) fn folded_account(row: &impl Columns, facts: &mut Facts) -> Read<()> {
    facts.folded_accounts.insert(row.text(0)?.to_owned(), name_at(row, 1, AccountId::parse)?);
    Ok(())
}

/// Account, which is empty for a global one; name and revision.
pub(super) fn role(row: &impl Columns, facts: &mut Facts) -> Read<()> {
    let account = if row.text(0)?.is_empty() { None } else { Some(name_at(row, 0, AccountId::parse)?) };
    let place: RolePlace = (account, name_at(row, 1, RoleName::parse)?);
    facts.roles.insert(place, revision_from_i64(row.int(2)?));
    Ok(())
}

/// Account, user and revision.
pub(super) fn member(row: &impl Columns, facts: &mut Facts) -> Read<()> {
    let place = (name_at(row, 0, AccountId::parse)?, name_at(row, 1, UserId::parse)?);
    facts.members.insert(place, revision_from_i64(row.int(2)?));
    Ok(())
}

/// Account, which is empty for a user's; user; keys, hour, rotations and entries of the log.
pub(super) fn tally(row: &impl Columns, facts: &mut Facts) -> Read<()> {
    let number = |at| row.int(at).map(|count| u64::try_from(count).unwrap_or(0));
    let owner = match row.text(0)? {
        "" => Owner::User(name_at(row, 1, UserId::parse)?),
        _ => Owner::Account(name_at(row, 0, AccountId::parse)?),
    };
    let hour = Some(Hour(row.int(3)?));
    let tally = Tally { keys: number(2)?, hour, rotations: number(4)?, log_rows: number(5)? };
    facts.tallies.insert(owner, tally);
    Ok(())
}

/// Account and how many roles it has.
pub(super) fn role_count(row: &impl Columns, facts: &mut Facts) -> Read<()> {
    let count = u64::try_from(row.int(1)?).unwrap_or(0);
    facts.role_counts.insert(name_at(row, 0, AccountId::parse)?, count);
    Ok(())
}

/// The newest format of the log; name of a replica that does not read the run's, or NULL, and the newest that it reads.
pub(super) fn log_fence(row: &impl Columns, facts: &mut Facts) -> Read<()> {
    facts.fence.newest = LogFormat(version_at(row, 0)?);
    if let Some(name) = row.text_opt(1)? {
        facts.fence.replicas.push((name.to_owned(), LogFormat(version_at(row, 2)?)));
    }
    Ok(())
}

/// How many unrevoked keys and how many members have the role.
pub(super) fn uses(row: &impl Columns, facts: &mut Facts) -> Read<()> {
    let number = |count: i64| u64::try_from(count).unwrap_or(0);
    facts.uses = (number(row.int(0)?), number(row.int(1)?));
    Ok(())
}
