//! Writes the tables: the rows of a decided run, and usage.
//!
//! A statement writes one row: it is prepared once, and only SQLite copies its values. The caller runs `BEGIN` and
//! `COMMIT`.

use std::collections::BTreeMap;

use rusqlite::{CachedStatement, Connection, params};

use crate::{
    domain::{
        account::{Account, AccountMember, Role},
        key::KeySecret,
        limit::{PendingQuotaUnits, QuotaUsage},
        log::{LogEntry, RecordChange},
        name::{AccountId, KeyId, UserId},
        time::Timestamp,
    },
    store::{
        CommittedBatch, IDEMPOTENCY_WINDOW, LogHead, StoreError, UsageBatch, WriteRequest,
        row_decoding::{decode_head, decode_quota_usage},
        row_format::{
            KeyRow, account_checksum, longest_life_micros, member_checksum, revision_to_i64,
            role_account_column, role_checksum, role_scopes_column, secret_checksum,
        },
        write_plan::{self, PreStateQuery, WritePlan},
    },
};

use super::{
    connection::{SqliteResult, execute_each},
    pre_state,
};

type ExecuteResult = rusqlite::Result<usize>;

const PUT_ACCOUNT: &str = "INSERT INTO accounts (id, name, suspended_at, created_at, updated_at, revision, sum, longest_life) \
     VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO UPDATE SET name = excluded.name, \
     suspended_at = excluded.suspended_at, updated_at = excluded.updated_at, revision = excluded.revision, \
     sum = excluded.sum, longest_life = excluded.longest_life";
const PUT_ROLE: &str = "INSERT OR REPLACE INTO roles VALUES (?, ?, ?, ?, ?)";
const PUT_MEMBER: &str = "INSERT OR REPLACE INTO members VALUES (?, ?, ?, ?, ?)";
const PUT_KEY: &str = "INSERT INTO keys VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) \
     ON CONFLICT (id) DO UPDATE SET account = excluded.account, user_id = excluded.user_id, \
     environment = excluded.environment, name = excluded.name, scopes = excluded.scopes, \
     roles = excluded.roles, expires_at = excluded.expires_at, customers = excluded.customers, \
     allowed_cidrs = excluded.allowed_cidrs, rate_limits = excluded.rate_limits, quota = excluded.quota, \
     metadata = excluded.metadata, created_at = excluded.created_at, created_by = excluded.created_by, \
     updated_at = excluded.updated_at, disabled_at = excluded.disabled_at, \
     revoked_at = excluded.revoked_at, revoke_reason = excluded.revoke_reason, \
     revoke_comment = excluded.revoke_comment, revision = excluded.revision, sum = excluded.sum, \
     name_nfc = excluded.name_nfc";
const PUT_SECRET: &str = "INSERT INTO secrets VALUES (?, ?, ?, ?, ?, ?, ?) \
     ON CONFLICT (digest) DO UPDATE SET expires_at = excluded.expires_at, sum = excluded.sum \
     WHERE key_id = excluded.key_id AND version = excluded.version";
const APPEND_LOG_ENTRY: &str = "INSERT INTO log VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)";
const PUT_IDEMPOTENCY_KEY: &str = "INSERT OR REPLACE INTO idempotency VALUES (?, ?, ?, ?, ?)";
const PUT_SECRET_USE: &str = "INSERT INTO uses VALUES (?, ?, ?) \
     ON CONFLICT (key_id, version) DO UPDATE SET at = max(at, excluded.at)";
const ADD_USAGE_COUNT: &str = "INSERT INTO usage VALUES (?, ?, ?, ?) \
     ON CONFLICT (key_id, hour, reason) DO UPDATE SET count = count + excluded.count";
/// A later period starts at zero, and a past one is dropped.
const ADD_QUOTA_UNITS: &str = "INSERT INTO quotas SELECT ?1, ?2, ?3 \
     WHERE NOT EXISTS (SELECT 1 FROM quotas known WHERE known.key_id = ?1 AND known.period >= ?4) \
     ON CONFLICT (key_id) DO UPDATE SET period = excluded.period, \
     used = excluded.used + iif(quotas.period = excluded.period, quotas.used, 0)";
const SELECT_QUOTA_USAGE: &str = "SELECT key_id, period, used FROM quotas WHERE key_id = ?1";

/// Writes the accepted writes of a batch.
pub(super) fn write_batch(connection: &Connection, batch: &[WriteRequest]) -> SqliteResult<CommittedBatch> {
    let mut head = read_head(connection)?;
    let mut committed = CommittedBatch::default();
    for run in write_plan::split_into_runs(batch) {
        let state = pre_state::read_pre_state(connection, &PreStateQuery::from_writes(run))?;
        let plan =
            write_plan::plan_run(run, state, head).map_err(|error| StoreError::Unavailable(error.into()))?;
        write_run(connection, &plan)?;
        head = plan.head;
        committed.outcomes.extend(plan.committed.outcomes);
        committed.entries.extend(plan.committed.entries);
    }
    if !committed.entries.is_empty() {
        connection
            .prepare_cached("UPDATE meta SET head = ?1, head_hash = ?2")?
            .execute(params![revision_to_i64(head.revision), head.hash])?;
    }
    Ok(committed)
}

fn read_head(connection: &Connection) -> SqliteResult<LogHead> {
    let mut statement = connection.prepare_cached("SELECT head, head_hash FROM meta")?;
    Ok(statement.query_row([], |row| Ok(decode_head(row)))??)
}

/// Writes the rows of a run.
fn write_run(connection: &Connection, plan: &WritePlan<'_>) -> SqliteResult<()> {
    let (mut accounts, mut roles, mut members, mut keys) = (vec![], vec![], vec![], vec![]);
    for (_, change) in &plan.committed.entries {
        match change {
            RecordChange::Account(account) => accounts.push(&**account),
            RecordChange::Role(role) => roles.push(&**role),
            RecordChange::Member(member) => members.push(&**member),
            RecordChange::Key(key) => keys.push(&**key),
            RecordChange::RoleDeleted(role) => delete_role(connection, role)?,
            RecordChange::MemberRemoved(member) => remove_member(connection, member)?,
        }
    }
    execute_each(connection, PUT_ACCOUNT, accounts, put_account)?;
    execute_each(connection, PUT_ROLE, roles, put_role)?;
    execute_each(connection, PUT_MEMBER, members, put_member)?;
    // In the order of their revisions: a later key may take a name that an earlier one gives up.
    execute_each(connection, PUT_KEY, keys, |put, key| put_key(put, &KeyRow::from_key(key)))?;
    put_secrets(connection, &plan.secrets)?;
    execute_each(connection, APPEND_LOG_ENTRY, &plan.committed.entries, |append, (row, _)| {
        append_log_entry(append, row)
    })?;
    store_idempotency_keys(connection, plan)
}

fn put_account(put: &mut CachedStatement<'_>, account: &Account) -> ExecuteResult {
    put.execute(params![
        account.id.as_str(),
        account.name.as_str(),
        account.suspended_at.map(Timestamp::as_micros),
        account.created_at.as_micros(),
        account.updated_at.as_micros(),
        revision_to_i64(account.revision),
        account_checksum(account),
        longest_life_micros(account),
    ])
}

fn put_role(put: &mut CachedStatement<'_>, role: &Role) -> ExecuteResult {
    put.execute(params![
        role_account_column(role.account.as_ref()),
        role.name.as_str(),
        role_scopes_column(role),
        revision_to_i64(role.revision),
        role_checksum(role),
    ])
}

fn put_member(put: &mut CachedStatement<'_>, member: &AccountMember) -> ExecuteResult {
    put.execute(params![
        member.account.as_str(),
        member.user.as_str(),
        member.role.as_str(),
        revision_to_i64(member.revision),
        member_checksum(member),
    ])
}

fn put_key(put: &mut CachedStatement<'_>, row: &KeyRow<'_>) -> ExecuteResult {
    put.execute(params![
        row.id,
        row.account,
        row.user_id,
        row.environment,
        row.name,
        row.scopes,
        row.roles,
        row.expires_at,
        row.customers,
        row.allowed_cidrs,
        row.rate_limits,
        row.quota,
        row.metadata,
        row.created_at,
        row.created_by,
        row.updated_at,
        row.disabled_at,
        row.revoked_at,
        row.revoke_reason,
        row.revoke_comment,
        row.revision,
        row.checksum(),
        row.name_nfc(),
    ])
}

fn put_secret(put: &mut CachedStatement<'_>, (id, secret): &(KeyId, KeySecret)) -> ExecuteResult {
    put.execute(params![
        secret.digest.as_bytes(),
        id.as_bytes(),
        secret.version,
        secret.hint,
        secret.created_at.as_micros(),
        secret.expires_at.map(Timestamp::as_micros),
        secret_checksum(id.as_bytes(), secret),
    ])
}

fn append_log_entry(append: &mut CachedStatement<'_>, row: &LogEntry) -> ExecuteResult {
    append.execute(params![
        revision_to_i64(row.revision),
        row.at.as_micros(),
        row.action,
        row.account.as_ref().map(AccountId::as_str),
        row.key_id.as_ref().map(KeyId::as_bytes),
        row.user.as_ref().map(UserId::as_str),
        row.actor,
        row.actor_account.as_ref().map(AccountId::as_str),
        row.acting_user.as_ref().map(UserId::as_str),
        row.method,
        row.payload,
        row.prev_hash,
        row.hash,
    ])
}

/// Writes the secrets of the plan. Only the newest secret of a record can be new.
fn put_secrets(connection: &Connection, rows: &[(KeyId, KeySecret)]) -> SqliteResult<()> {
    // A duplicate digest was rejected before, so no row may be skipped here.
    match execute_each(connection, PUT_SECRET, rows, put_secret)? {
        written if written == rows.len() => Ok(()),
        written => {
            let problem = format!("{written} of {} secrets were written", rows.len());
            Err(StoreError::Unavailable(problem.into()).into())
        }
    }
}

fn delete_role(connection: &Connection, role: &Role) -> SqliteResult<()> {
    let id = [role_account_column(role.account.as_ref()), role.name.as_str()];
    connection.execute("DELETE FROM roles WHERE account = ?1 AND name = ?2", id)?;
    Ok(())
}

fn remove_member(connection: &Connection, member: &AccountMember) -> SqliteResult<()> {
    let id = [member.account.as_str(), member.user.as_str()];
    connection.execute("DELETE FROM members WHERE account = ?1 AND user_id = ?2", id)?;
    Ok(())
}

/// Stores the idempotency keys. Each insert also deletes a few expired ones, so the table stays small without a cleanup
/// task.
fn store_idempotency_keys(connection: &Connection, plan: &WritePlan<'_>) -> SqliteResult<()> {
    let Some(oldest) = plan.requests.iter().map(|(_, _, at)| *at).min() else { return Ok(()) };
    execute_each(connection, PUT_IDEMPOTENCY_KEY, &plan.requests, |statement, (request, key_id, at)| {
        statement.execute(params![
            request.caller.as_bytes(),
            request.key.as_str(),
            request.fingerprint,
            key_id.as_bytes(),
            at.as_micros(),
        ])
    })?;
    let sql = "DELETE FROM idempotency WHERE (caller, key) IN (SELECT caller, key FROM idempotency \
               WHERE created_at < ?1 ORDER BY created_at LIMIT ?2)";
    let limit = 4 * i64::try_from(plan.requests.len()).unwrap_or(i64::MAX / 4);
    connection
        .prepare_cached(sql)?
        .execute([oldest.saturating_sub(IDEMPOTENCY_WINDOW).as_micros(), limit])?;
    Ok(())
}

/// Writes usage. Returns the present usage of the quotas in the batch.
pub(super) fn write_usage(
    connection: &Connection,
    batch: &UsageBatch,
) -> SqliteResult<Vec<(KeyId, QuotaUsage)>> {
    execute_each(connection, PUT_SECRET_USE, &batch.secret_uses, |statement, used| {
        statement.execute(params![used.key_id.as_bytes(), used.version, used.at.as_micros()])
    })?;
    execute_each(connection, ADD_USAGE_COUNT, &batch.counts, |statement, count| {
        let (reason, number) = (count.reason as u8, i64::try_from(count.count).unwrap_or(i64::MAX));
        statement.execute(params![count.key_id.as_bytes(), count.hour.0, reason, number])
    })?;
    add_quota_units(connection, &batch.quota_units)
}

/// Adds units to quotas, once per key. Returns their present usage.
fn add_quota_units(
    connection: &Connection,
    spent: &[(KeyId, PendingQuotaUnits)],
) -> SqliteResult<Vec<(KeyId, QuotaUsage)>> {
    let mut by_key = BTreeMap::<KeyId, PendingQuotaUnits>::new();
    for (id, drawn) in spent {
        by_key.entry(*id).and_modify(|known| *known = known.merge(*drawn)).or_insert(*drawn);
    }
    execute_each(connection, ADD_QUOTA_UNITS, &by_key, |statement, (key_id, drawn)| {
        statement.execute(params![
            key_id.as_bytes(),
            drawn.period_start.as_micros(),
            i64::try_from(drawn.units).unwrap_or(i64::MAX),
            drawn.period_end.map_or(i64::MAX, Timestamp::as_micros),
        ])
    })?;
    let mut found = Vec::with_capacity(by_key.len());
    if by_key.is_empty() {
        return Ok(found);
    }
    let mut statement = connection.prepare_cached(SELECT_QUOTA_USAGE)?;
    for key_id in by_key.keys() {
        let mut rows = statement.query([key_id.as_bytes()])?;
        while let Some(row) = rows.next()? {
            found.push(decode_quota_usage(row)?);
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{SchemaPolicy, sqlite::SqliteStore};

    #[tokio::test(flavor = "multi_thread")]
    async fn what_is_asked_or_changed_is_found_by_an_index() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("keyward.db").display().to_string();
        let store = SqliteStore::open(&path, SchemaPolicy::Migrate).await.unwrap();
        for statement in pre_state::ALL_STATEMENTS.into_iter().chain([ADD_QUOTA_UNITS, SELECT_QUOTA_USAGE]) {
            let steps = store
                .writer
                .run(move |connection| {
                    let mut statement = connection.prepare(&format!("EXPLAIN QUERY PLAN {statement}"))?;
                    let mut rows = statement.raw_query();
                    let mut steps = Vec::<String>::new();
                    while let Some(row) = rows.next()? {
                        steps.push(row.get("detail")?);
                    }
                    Ok(steps)
                })
                .await
                .unwrap();
            let scanned = steps.iter().any(|step| step.starts_with("SCAN") && !step.contains("CONSTANT"));
            assert!(!scanned, "{statement}: {steps:?}");
            assert!(steps.iter().any(|step| step.starts_with("SEARCH")), "{statement}: {steps:?}");
        }
    }
}
