//! Writes the tables: the rows of a decided run, and usage.
//!
//! A run is one message with one statement for each table. Rows are locked in the order of their keys, so two replicas
//! cannot deadlock.

use std::collections::BTreeMap;

use sqlx::{PgConnection, postgres::PgRow};

use crate::{
    domain::{
        account::{Account, AccountMember, Role},
        key::{ApiKey, KeySecret},
        limit::PendingQuotaUnits,
        log::{LogEntry, RecordChange},
        log_format::LogFormat,
        name::KeyId,
        time::{Revision, Timestamp},
    },
    store::{
        ArchiveCheckpoint, IDEMPOTENCY_WINDOW, LogHead, UsageBatch,
        row_format::{
            KeyRow, account_checksum, longest_life_micros, member_checksum, revision_to_i64,
            role_account_column, role_checksum, role_scopes_column, secret_checksum,
        },
        write_plan::WritePlan,
    },
};

use super::{
    errors::PgResult,
    sql_literal::{SqlLiteral as _, fill_placeholders, values_list},
    transaction::unnamed_query,
};

/// Adds the statements that write a run to `script`.
pub(super) fn write_run(script: &mut Vec<String>, plan: &WritePlan<'_>) {
    let (mut accounts, mut roles, mut members, mut keys) = (vec![], vec![], vec![], vec![]);
    for (_, change) in &plan.committed.entries {
        match change {
            RecordChange::Account(account) => accounts.push(&**account),
            RecordChange::Role(role) => roles.push(&**role),
            RecordChange::Member(member) => members.push(&**member),
            RecordChange::Key(key) => keys.push(&**key),
            RecordChange::RoleDeleted(role) => delete_role(script, role),
            RecordChange::MemberRemoved(member) => remove_member(script, member),
        }
    }
    put_accounts(script, &accounts);
    put_roles(script, &roles);
    put_members(script, &members);
    put_keys(script, &keys);
    put_secrets(script, &plan.secrets);
    let rows: Vec<_> = plan.committed.entries.iter().map(|(row, _)| row).collect();
    append_log(script, &rows);
    raise_log_format(script, plan.log_format);
    store_idempotency_keys(script, plan);
}

fn put_accounts(script: &mut Vec<String>, rows: &[&Account]) {
    if rows.is_empty() {
        return;
    }
    let rows = values_list(rows, |row| {
        [
            row.id.as_str().to_sql_literal(),
            row.name.as_str().to_sql_literal(),
            row.suspended_at.map(|at| at.as_micros()).to_sql_literal(),
            row.created_at.as_micros().to_sql_literal(),
            row.updated_at.as_micros().to_sql_literal(),
            revision_to_i64(row.revision).to_sql_literal(),
            account_checksum(row).to_sql_literal(),
            longest_life_micros(row).to_sql_literal(),
        ]
    });
    script.push(fill_placeholders(
        "INSERT INTO accounts (id, name, suspended_at, created_at, updated_at, revision, sum, longest_life) \
         VALUES $1 ON CONFLICT (id) DO UPDATE SET name = excluded.name, suspended_at = excluded.suspended_at, \
         updated_at = excluded.updated_at, revision = excluded.revision, sum = excluded.sum, \
         longest_life = excluded.longest_life",
        &[rows],
    ));
}

fn put_roles(script: &mut Vec<String>, rows: &[&Role]) {
    if rows.is_empty() {
        return;
    }
    let rows = values_list(rows, |row| {
        [
            role_account_column(row.account.as_ref()).to_sql_literal(),
            row.name.as_str().to_sql_literal(),
            role_scopes_column(row).to_sql_literal(),
            revision_to_i64(row.revision).to_sql_literal(),
            role_checksum(row).to_sql_literal(),
        ]
    });
    script.push(fill_placeholders(
        "INSERT INTO roles (account, name, scopes, revision, sum) VALUES $1 ON CONFLICT (account, name) \
         DO UPDATE SET scopes = excluded.scopes, revision = excluded.revision, sum = excluded.sum",
        &[rows],
    ));
}

fn put_members(script: &mut Vec<String>, rows: &[&AccountMember]) {
    if rows.is_empty() {
        return;
    }
    let rows = values_list(rows, |row| {
        [
            row.account.as_str().to_sql_literal(),
            row.user.as_str().to_sql_literal(),
            row.role.as_str().to_sql_literal(),
            revision_to_i64(row.revision).to_sql_literal(),
            member_checksum(row).to_sql_literal(),
        ]
    });
    script.push(fill_placeholders(
        "INSERT INTO members (account, user_id, role, revision, sum) VALUES $1 ON CONFLICT (account, user_id) \
         DO UPDATE SET role = excluded.role, revision = excluded.revision, sum = excluded.sum",
        &[rows],
    ));
}

fn delete_role(script: &mut Vec<String>, role: &Role) {
    script.push(fill_placeholders(
        "DELETE FROM roles WHERE account = $1 AND name = $2",
        &[role_account_column(role.account.as_ref()).to_sql_literal(), role.name.as_str().to_sql_literal()],
    ));
}

fn remove_member(script: &mut Vec<String>, member: &AccountMember) {
    script.push(fill_placeholders(
        "DELETE FROM members WHERE account = $1 AND user_id = $2",
        &[member.account.as_str().to_sql_literal(), member.user.as_str().to_sql_literal()],
    ));
}

/// Rows are written in the order of their revisions: a later key may take a name that an earlier one gives up.
fn put_keys(script: &mut Vec<String>, keys: &[&ApiKey]) {
    if keys.is_empty() {
        return;
    }
    let rows = values_list(keys, |key| {
        let row = KeyRow::from_key(key);
        [
            row.id.as_slice().to_sql_literal(),
            row.account.to_sql_literal(),
            row.user_id.to_sql_literal(),
            row.environment.to_sql_literal(),
            row.name.to_sql_literal(),
            row.scopes.to_sql_literal(),
            row.roles.to_sql_literal(),
            row.expires_at.to_sql_literal(),
            row.customers.to_sql_literal(),
            row.allowed_cidrs.to_sql_literal(),
            row.rate_limits.to_sql_literal(),
            row.quota.to_sql_literal(),
            row.metadata.to_sql_literal(),
            row.created_at.to_sql_literal(),
            row.created_by.to_sql_literal(),
            row.updated_at.to_sql_literal(),
            row.disabled_at.to_sql_literal(),
            row.revoked_at.to_sql_literal(),
            row.revoke_reason.to_sql_literal(),
            row.revoke_comment.as_deref().map(|comment| comment.as_bytes().to_vec()).to_sql_literal(),
            row.revision.to_sql_literal(),
            row.checksum().to_sql_literal(),
        ]
    });
    script.push(fill_placeholders(
        "INSERT INTO keys (id, account, user_id, environment, name, scopes, roles, expires_at, customers, \
         allowed_cidrs, rate_limits, quota, metadata, created_at, created_by, updated_at, disabled_at, \
         revoked_at, revoke_reason, revoke_comment, revision, sum) VALUES $1 \
         ON CONFLICT (id) DO UPDATE SET account = excluded.account, user_id = excluded.user_id, \
         environment = excluded.environment, name = excluded.name, scopes = excluded.scopes, \
         roles = excluded.roles, expires_at = excluded.expires_at, customers = excluded.customers, \
         allowed_cidrs = excluded.allowed_cidrs, rate_limits = excluded.rate_limits, quota = excluded.quota, \
         metadata = excluded.metadata, created_at = excluded.created_at, created_by = excluded.created_by, \
         updated_at = excluded.updated_at, disabled_at = excluded.disabled_at, \
         revoked_at = excluded.revoked_at, revoke_reason = excluded.revoke_reason, \
         revoke_comment = excluded.revoke_comment, revision = excluded.revision, sum = excluded.sum",
        &[rows],
    ));
}

/// Writes the secrets of the plan. Only the newest secret of a record can be new.
fn put_secrets(script: &mut Vec<String>, secrets: &[(KeyId, KeySecret)]) {
    if secrets.is_empty() {
        return;
    }
    let mut secrets: Vec<_> = secrets.iter().collect();
    secrets.sort_by_key(|(id, secret)| (*id, secret.version));
    let rows = values_list(&secrets, |(id, secret)| {
        [
            secret.digest.as_bytes().as_slice().to_sql_literal(),
            id.as_bytes().as_slice().to_sql_literal(),
            i64::from(secret.version).to_sql_literal(),
            secret.hint.to_sql_literal(),
            secret.created_at.as_micros().to_sql_literal(),
            secret.expires_at.map(|end| end.as_micros()).to_sql_literal(),
            secret_checksum(id.as_bytes(), secret).to_sql_literal(),
        ]
    });
    let count = i64::try_from(secrets.len()).unwrap_or(i64::MAX).to_sql_literal();
    // A duplicate digest was rejected before, so nothing may be overwritten here: a division by zero ends the
    // transaction then.
    script.push(fill_placeholders(
        "WITH written AS (INSERT INTO secrets (digest, key_id, version, hint, created_at, expires_at, sum) \
         VALUES $1 ON CONFLICT (digest) DO UPDATE SET expires_at = excluded.expires_at, \
         sum = excluded.sum WHERE secrets.key_id = excluded.key_id AND secrets.version = excluded.version \
         RETURNING 1) SELECT 1 / (count(*) = $2)::int FROM written",
        &[rows, count],
    ));
}

fn append_log(script: &mut Vec<String>, rows: &[&LogEntry]) {
    if rows.is_empty() {
        return;
    }
    let text = |text: Option<String>| text.to_sql_literal();
    let rows = values_list(rows, |row| {
        [
            revision_to_i64(row.revision).to_sql_literal(),
            row.at.as_micros().to_sql_literal(),
            row.action.to_sql_literal(),
            text(row.account.as_ref().map(ToString::to_string)),
            row.key_id.map(|id| id.as_bytes().to_vec()).to_sql_literal(),
            text(row.user.as_ref().map(ToString::to_string)),
            row.actor.to_sql_literal(),
            text(row.actor_account.as_ref().map(ToString::to_string)),
            text(row.acting_user.as_ref().map(ToString::to_string)),
            row.method.to_sql_literal(),
            row.payload.to_sql_literal(),
            row.prev_hash.as_slice().to_sql_literal(),
            row.hash.as_slice().to_sql_literal(),
        ]
    });
    script.push(fill_placeholders(
        "INSERT INTO log (revision, at, action, account, key_id, user_id, actor, actor_account, acting_user, \
         method, payload, prev_hash, hash) VALUES $1",
        &[rows],
    ));
}

/// From this commit on, the database rejects replicas that cannot read the format.
fn raise_log_format(script: &mut Vec<String>, format: Option<LogFormat>) {
    let Some(LogFormat(format)) = format else { return };
    script.push(fill_placeholders(
        "UPDATE log_state SET newest_log_format = greatest(newest_log_format, $1)",
        &[i64::from(format).to_sql_literal()],
    ));
}

/// Records a checkpoint, unless it is recorded already.
pub(super) async fn insert_checkpoint(
    connection: &mut PgConnection,
    checkpoint: &ArchiveCheckpoint,
) -> PgResult<()> {
    unnamed_query("INSERT INTO checkpoints VALUES ($1, $2, $3, $4) ON CONFLICT DO NOTHING")
        .bind(revision_to_i64(checkpoint.head.revision))
        .bind(checkpoint.head.hash.to_vec())
        .bind(i64::try_from(checkpoint.entry_count).unwrap_or(i64::MAX))
        .bind(checkpoint.made_at.as_micros())
        .execute(connection)
        .await
        .map(drop)
}

/// Deletes the oldest entries up to a revision. The role has the privilege during this transaction only.
pub(super) async fn delete_log_entries(
    connection: &mut PgConnection,
    up_to: Revision,
    limit: u32,
) -> PgResult<u64> {
    sqlx::raw_sql("GRANT DELETE ON log TO CURRENT_USER").execute(&mut *connection).await?;
    let sql = "DELETE FROM log WHERE revision IN \
               (SELECT revision FROM log WHERE revision <= $1 ORDER BY revision LIMIT $2)";
    let taken = unnamed_query(sql)
        .bind(revision_to_i64(up_to))
        .bind(i64::from(limit))
        .execute(&mut *connection)
        .await?;
    sqlx::raw_sql("REVOKE DELETE ON log FROM CURRENT_USER").execute(connection).await?;
    Ok(taken.rows_affected())
}

/// Stores the idempotency keys. Each insert also deletes a few expired ones, so the table stays small without a cleanup
/// task.
fn store_idempotency_keys(script: &mut Vec<String>, plan: &WritePlan<'_>) {
    // The last request under a name counts; one statement can write a row only once.
    let newest: BTreeMap<_, _> = plan
        .requests
        .iter()
        .map(|(request, key_id, at)| ((request.caller, &request.key), (request.fingerprint, *key_id, *at)))
        .collect();
    let rows: Vec<_> = newest.into_iter().collect();
    let Some(oldest) = rows.iter().map(|(_, (_, _, at))| *at).min() else { return };
    let remembered = values_list(&rows, |((caller, key), (fingerprint, key_id, at))| {
        [
            caller.as_bytes().as_slice().to_sql_literal(),
            key.as_str().to_sql_literal(),
            fingerprint.as_slice().to_sql_literal(),
            key_id.as_bytes().as_slice().to_sql_literal(),
            at.as_micros().to_sql_literal(),
        ]
    });
    script.push(fill_placeholders(
        "INSERT INTO idempotency (caller, key, fingerprint, key_id, created_at) VALUES $1 \
         ON CONFLICT (caller, key) DO UPDATE SET fingerprint = excluded.fingerprint, \
         key_id = excluded.key_id, created_at = excluded.created_at",
        &[remembered],
    ));
    script.push(fill_placeholders(
        "DELETE FROM idempotency WHERE (caller, key) IN (SELECT caller, key FROM idempotency \
         WHERE created_at < $1 ORDER BY created_at LIMIT $2)",
        &[
            oldest.saturating_sub(IDEMPOTENCY_WINDOW).as_micros().to_sql_literal(),
            (4 * i64::try_from(rows.len()).unwrap_or(i64::MAX / 4)).to_sql_literal(),
        ],
    ));
}

/// Moves the head, and notifies the listeners on `channel` of it. Advisory only: the notification may be lost.
pub(super) fn update_head(script: &mut Vec<String>, head: LogHead, channel: &str) {
    script.push(fill_placeholders(
        "WITH moved AS (UPDATE meta SET head = $1, head_hash = $2 RETURNING head) \
         SELECT pg_notify($3, head::text) FROM moved",
        &[
            revision_to_i64(head.revision).to_sql_literal(),
            head.hash.as_slice().to_sql_literal(),
            channel.to_sql_literal(),
        ],
    ));
}

/// A column of rows as an argument of `unnest`.
fn column_values<R, T>(rows: &[R], of: impl Fn(&R) -> T) -> Vec<T> {
    rows.iter().map(of).collect()
}

/// Writes usage. Returns the rows of the quotas in the batch.
pub(super) async fn write_usage(connection: &mut PgConnection, batch: &UsageBatch) -> PgResult<Vec<PgRow>> {
    let UsageBatch { secret_uses: used, counts, quota_units: spent } = batch;
    if !used.is_empty() {
        unnamed_query(
            "INSERT INTO uses (key_id, version, at) SELECT key_id, version, max(at) \
             FROM unnest($1::bytea[], $2::bigint[], $3::bigint[]) AS used (key_id, version, at) \
             GROUP BY 1, 2 ORDER BY 1, 2 \
             ON CONFLICT (key_id, version) DO UPDATE SET at = greatest(uses.at, excluded.at)",
        )
        .bind(column_values(used, |used| used.key_id.as_bytes().to_vec()))
        .bind(column_values(used, |used| i64::from(used.version)))
        .bind(column_values(used, |used| used.at.as_micros()))
        .execute(&mut *connection)
        .await?;
    }
    if !counts.is_empty() {
        unnamed_query(
            "INSERT INTO usage (key_id, hour, reason, count) SELECT key_id, hour, reason, sum(count)::bigint \
             FROM unnest($1::bytea[], $2::bigint[], $3::bigint[], $4::bigint[]) \
             AS more (key_id, hour, reason, count) GROUP BY 1, 2, 3 ORDER BY 1, 2, 3 \
             ON CONFLICT (key_id, hour, reason) DO UPDATE SET count = usage.count + excluded.count",
        )
        .bind(column_values(counts, |count| count.key_id.as_bytes().to_vec()))
        .bind(column_values(counts, |count| count.hour.0))
        .bind(column_values(counts, |count| i64::from(count.reason as u8)))
        .bind(column_values(counts, |count| i64::try_from(count.count).unwrap_or(i64::MAX)))
        .execute(&mut *connection)
        .await?;
    }
    if spent.is_empty() { Ok(Vec::new()) } else { add_quota_units(connection, spent).await }
}

/// Adds units to quotas. Existing rows are locked in the order of their keys, and read after that.
async fn add_quota_units(
    connection: &mut PgConnection,
    spent: &[(KeyId, PendingQuotaUnits)],
) -> PgResult<Vec<PgRow>> {
    let mut by_key = BTreeMap::<KeyId, PendingQuotaUnits>::new();
    for (id, drawn) in spent {
        by_key.entry(*id).and_modify(|known| *known = known.merge(*drawn)).or_insert(*drawn);
    }
    let rows: Vec<_> = by_key.into_iter().collect();
    let ids = || column_values(&rows, |(id, _)| id.as_bytes().to_vec());
    unnamed_query(
        "WITH more AS (SELECT * FROM unnest($1::bytea[], $2::bigint[], $3::bigint[], $4::bigint[]) \
         AS more (key_id, period, until, units)), \
         known AS (SELECT q.key_id, q.period FROM quotas q JOIN more USING (key_id) \
         ORDER BY q.key_id FOR NO KEY UPDATE OF q) \
         INSERT INTO quotas (key_id, period, used) \
         SELECT more.key_id, more.period, more.units FROM more LEFT JOIN known USING (key_id) \
         WHERE known.period IS NULL OR known.period < more.until ORDER BY more.key_id \
         ON CONFLICT (key_id) DO UPDATE SET period = excluded.period, used = excluded.used + \
         CASE WHEN quotas.period = excluded.period THEN quotas.used ELSE 0 END",
    )
    .bind(ids())
    .bind(column_values(&rows, |(_, drawn)| drawn.period_start.as_micros()))
    .bind(column_values(&rows, |(_, drawn)| drawn.period_end.map_or(i64::MAX, Timestamp::as_micros)))
    .bind(column_values(&rows, |(_, drawn)| i64::try_from(drawn.units).unwrap_or(i64::MAX)))
    .execute(&mut *connection)
    .await?;
    unnamed_query("SELECT key_id, period, used FROM quotas WHERE key_id = ANY($1)")
        .bind(ids())
        .fetch_all(connection)
        .await
}
