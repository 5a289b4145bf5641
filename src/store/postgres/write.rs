//! What goes into the tables: the rows of a decided run, a statement for each table, all of them for one message; and
//! what Checks have left.
//! Rows are always locked in the order of their keys, so that two replicas cannot wait for each other in a ring.

use std::collections::BTreeMap;

use sqlx::{PgConnection, postgres::PgRow};

use crate::{
    domain::{
        account::{Account, Member, Role},
        key::{Key, Secret},
        limit::Drawn,
        log::{Change, LogRow},
        log_format::LogFormat,
        name::KeyId,
        time::{Revision, Timestamp},
    },
    store::{
        Checkpoint, Head, IDEMPOTENCY_WINDOW, UsageBatch,
        plan::Plan,
        rows::{
            KeyRow, account_sum, longest_life, member_sum, revision_to_i64, role_account, role_scopes,
            role_sum, secret_sum,
        },
    },
};

use super::{
    literal::{Literal as _, fill, rows as values},
    query,
};

type Result<T> = std::result::Result<T, sqlx::Error>;

/// Brings the tables to what a run was decided to be.
pub(super) fn run(script: &mut Vec<String>, plan: &Plan<'_>) {
    let (mut accounts, mut roles, mut members, mut keys) = (vec![], vec![], vec![], vec![]);
    for (_, change) in &plan.committed.rows {
        match change {
            Change::Account(account) => accounts.push(&**account),
            Change::Role(role) => roles.push(&**role),
            Change::Member(member) => members.push(&**member),
            Change::Key(key) => keys.push(&**key),
            Change::RoleDeleted(role) => delete_role(script, role),
            Change::MemberRemoved(member) => remove_member(script, member),
        }
    }
    put_accounts(script, &accounts);
    put_roles(script, &roles);
    put_members(script, &members);
    put_keys(script, &keys);
    put_secrets(script, &plan.secrets);
    let rows: Vec<_> = plan.committed.rows.iter().map(|(row, _)| row).collect();
    append(script, &rows);
    raise_log_format(script, plan.log_format);
    remember(script, plan);
}

fn put_accounts(script: &mut Vec<String>, rows: &[&Account]) {
    if rows.is_empty() {
        return;
    }
    let rows = values(rows, |row| {
        [
            row.id.as_str().literal(),
            row.name.as_str().literal(),
            row.suspended_at.map(|at| at.as_micros()).literal(),
            row.created_at.as_micros().literal(),
            row.updated_at.as_micros().literal(),
            revision_to_i64(row.revision).literal(),
            account_sum(row).literal(),
            longest_life(row).literal(),
        ]
    });
    script.push(fill(
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
    let rows = values(rows, |row| {
        [
            role_account(row.account.as_ref()).literal(),
            row.name.as_str().literal(),
            role_scopes(row).literal(),
            revision_to_i64(row.revision).literal(),
            role_sum(row).literal(),
        ]
    });
    script.push(fill(
        "INSERT INTO roles (account, name, scopes, revision, sum) VALUES $1 ON CONFLICT (account, name) \
         DO UPDATE SET scopes = excluded.scopes, revision = excluded.revision, sum = excluded.sum",
        &[rows],
    ));
}

fn put_members(script: &mut Vec<String>, rows: &[&Member]) {
    if rows.is_empty() {
        return;
    }
    let rows = values(rows, |row| {
        [
            row.account.as_str().literal(),
            row.user.as_str().literal(),
            row.role.as_str().literal(),
            revision_to_i64(row.revision).literal(),
            member_sum(row).literal(),
        ]
    });
    script.push(fill(
        "INSERT INTO members (account, user_id, role, revision, sum) VALUES $1 ON CONFLICT (account, user_id) \
         DO UPDATE SET role = excluded.role, revision = excluded.revision, sum = excluded.sum",
        &[rows],
    ));
}

fn delete_role(script: &mut Vec<String>, role: &Role) {
    script.push(fill(
        "DELETE FROM roles WHERE account = $1 AND name = $2",
        &[role_account(role.account.as_ref()).literal(), role.name.as_str().literal()],
    ));
}

fn remove_member(script: &mut Vec<String>, member: &Member) {
    script.push(fill(
        "DELETE FROM members WHERE account = $1 AND user_id = $2",
        &[member.account.as_str().literal(), member.user.as_str().literal()],
    ));
}

/// The rows go in the order of their revisions: a name that one lets go is free for those after it.
fn put_keys(script: &mut Vec<String>, keys: &[&Key]) {
    if keys.is_empty() {
        return;
    }
    let rows = values(keys, |key| {
        let row = KeyRow::of(key);
        [
            row.id.as_slice().literal(),
            row.account.literal(),
            row.user_id.literal(),
            row.environment.literal(),
            row.name.literal(),
            row.scopes.literal(),
            row.roles.literal(),
            row.expires_at.literal(),
            row.customers.literal(),
            row.allowed_cidrs.literal(),
            row.rate_limits.literal(),
            row.quota.literal(),
            row.metadata.literal(),
            row.created_at.literal(),
            row.created_by.literal(),
            row.updated_at.literal(),
            row.disabled_at.literal(),
            row.revoked_at.literal(),
            row.revoke_reason.literal(),
            row.revoke_comment.as_deref().map(|comment| comment.as_bytes().to_vec()).literal(),
            row.revision.literal(),
            row.sum().literal(),
        ]
    });
    script.push(fill(
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

/// Brings the secrets' rows to where the plan says; only a record's newest can be new.
fn put_secrets(script: &mut Vec<String>, secrets: &[(KeyId, Secret)]) {
    if secrets.is_empty() {
        return;
    }
    let mut secrets: Vec<_> = secrets.iter().collect();
    secrets.sort_by_key(|(id, secret)| (*id, secret.version));
    let rows = values(&secrets, |(id, secret)| {
        [
            secret.digest.as_bytes().as_slice().literal(),
            id.as_bytes().as_slice().literal(),
            i64::from(secret.version).literal(),
            secret.hint.literal(),
            secret.created_at.as_micros().literal(),
            secret.expires_at.map(|end| end.as_micros()).literal(),
            secret_sum(id.as_bytes(), secret).literal(),
        ]
    });
    let count = i64::try_from(secrets.len()).unwrap_or(i64::MAX).literal();
    // A digest that is another secret's was found out before; here nothing may be overwritten: what it divides by then is
    // zero, which ends the transaction.
    script.push(fill(
        "WITH written AS (INSERT INTO secrets (digest, key_id, version, hint, created_at, expires_at, sum) \
         VALUES $1 ON CONFLICT (digest) DO UPDATE SET expires_at = excluded.expires_at, \
         sum = excluded.sum WHERE secrets.key_id = excluded.key_id AND secrets.version = excluded.version \
         RETURNING 1) SELECT 1 / (count(*) = $2)::int FROM written",
        &[rows, count],
    ));
}

fn append(script: &mut Vec<String>, rows: &[&LogRow]) {
    if rows.is_empty() {
        return;
    }
    let text = |text: Option<String>| text.literal();
    let rows = values(rows, |row| {
        [
            revision_to_i64(row.revision).literal(),
            row.at.as_micros().literal(),
            row.action.literal(),
            text(row.account.as_ref().map(ToString::to_string)),
            row.key_id.map(|id| id.as_bytes().to_vec()).literal(),
            text(row.user.as_ref().map(ToString::to_string)),
            row.actor.literal(),
            text(row.actor_account.as_ref().map(ToString::to_string)),
            text(row.acting_user.as_ref().map(ToString::to_string)),
            row.method.literal(),
            row.payload.literal(),
            row.prev_hash.as_slice().literal(),
            row.hash.as_slice().literal(),
        ]
    });
    script.push(fill(
        "INSERT INTO log (revision, at, action, account, key_id, user_id, actor, actor_account, acting_user, \
         method, payload, prev_hash, hash) VALUES $1",
        &[rows],
    ));
}

/// From this commit on, replicas that do not read the format are refused.
fn raise_log_format(script: &mut Vec<String>, format: Option<LogFormat>) {
    let Some(LogFormat(format)) = format else { return };
    script.push(fill(
        "UPDATE log_state SET newest_log_format = greatest(newest_log_format, $1)",
        &[i64::from(format).literal()],
    ));
}

/// Notes up to where the log was archived, unless it is noted.
pub(super) async fn checkpoint(connection: &mut PgConnection, checkpoint: &Checkpoint) -> Result<()> {
    query("INSERT INTO checkpoints VALUES ($1, $2, $3, $4) ON CONFLICT DO NOTHING")
        .bind(revision_to_i64(checkpoint.at.revision))
        .bind(checkpoint.at.hash.to_vec())
        .bind(i64::try_from(checkpoint.entries).unwrap_or(i64::MAX))
        .bind(checkpoint.made_at.as_micros())
        .execute(connection)
        .await
        .map(drop)
}

/// Takes the oldest entries up to a revision out of the log. The role has the right for this transaction alone.
pub(super) async fn take_out(connection: &mut PgConnection, upto: Revision, most: u32) -> Result<u64> {
    sqlx::raw_sql("GRANT DELETE ON log TO CURRENT_USER").execute(&mut *connection).await?;
    let sql = "DELETE FROM log WHERE revision IN \
               (SELECT revision FROM log WHERE revision <= $1 ORDER BY revision LIMIT $2)";
    let taken =
        query(sql).bind(revision_to_i64(upto)).bind(i64::from(most)).execute(&mut *connection).await?;
    sqlx::raw_sql("REVOKE DELETE ON log FROM CURRENT_USER").execute(connection).await?;
    Ok(taken.rows_affected())
}

/// Keeps the idempotency keys. Each insert takes away a few that no longer count, so the table stays small without
/// a sweeper.
fn remember(script: &mut Vec<String>, plan: &Plan<'_>) {
    // The last under a name counts; a row is written once in a statement.
    let newest: BTreeMap<_, _> = plan
        .requests
        .iter()
        .map(|(request, key_id, at)| ((request.caller, &request.key), (request.fingerprint, *key_id, *at)))
        .collect();
    let rows: Vec<_> = newest.into_iter().collect();
    let Some(oldest) = rows.iter().map(|(_, (_, _, at))| *at).min() else { return };
    let remembered = values(&rows, |((caller, key), (fingerprint, key_id, at))| {
        [
            caller.as_bytes().as_slice().literal(),
            key.as_str().literal(),
            fingerprint.as_slice().literal(),
            key_id.as_bytes().as_slice().literal(),
            at.as_micros().literal(),
        ]
    });
    script.push(fill(
        "INSERT INTO idempotency (caller, key, fingerprint, key_id, created_at) VALUES $1 \
         ON CONFLICT (caller, key) DO UPDATE SET fingerprint = excluded.fingerprint, \
         key_id = excluded.key_id, created_at = excluded.created_at",
        &[remembered],
    ));
    script.push(fill(
        "DELETE FROM idempotency WHERE (caller, key) IN (SELECT caller, key FROM idempotency \
         WHERE created_at < $1 ORDER BY created_at LIMIT $2)",
        &[
            oldest.minus(IDEMPOTENCY_WINDOW).as_micros().literal(),
            (4 * i64::try_from(rows.len()).unwrap_or(i64::MAX / 4)).literal(),
        ],
    ));
}

/// Moves the head, and tells whoever listens on `channel` where it is now. That is a hint, and may get lost.
pub(super) fn head(script: &mut Vec<String>, head: Head, channel: &str) {
    script.push(fill(
        "WITH moved AS (UPDATE meta SET head = $1, head_hash = $2 RETURNING head) \
         SELECT pg_notify($3, head::text) FROM moved",
        &[revision_to_i64(head.revision).literal(), head.hash.as_slice().literal(), channel.literal()],
    ));
}

/// One column of rows that are written together, as an argument.
fn arg<R, T>(rows: &[R], of: impl Fn(&R) -> T) -> Vec<T> {
    rows.iter().map(of).collect()
}

/// Writes what Checks have left. Gives the rows of the quotas that were drawn from.
pub(super) async fn usage(connection: &mut PgConnection, batch: &UsageBatch) -> Result<Vec<PgRow>> {
    let UsageBatch { used, counts, spent } = batch;
    if !used.is_empty() {
        query(
            "INSERT INTO uses (key_id, version, at) SELECT key_id, version, max(at) \
             FROM unnest($1::bytea[], $2::bigint[], $3::bigint[]) AS used (key_id, version, at) \
             GROUP BY 1, 2 ORDER BY 1, 2 \
             ON CONFLICT (key_id, version) DO UPDATE SET at = greatest(uses.at, excluded.at)",
        )
        .bind(arg(used, |used| used.key_id.as_bytes().to_vec()))
        .bind(arg(used, |used| i64::from(used.version)))
        .bind(arg(used, |used| used.at.as_micros()))
        .execute(&mut *connection)
        .await?;
    }
    if !counts.is_empty() {
        query(
            "INSERT INTO usage (key_id, hour, reason, count) SELECT key_id, hour, reason, sum(count)::bigint \
             FROM unnest($1::bytea[], $2::bigint[], $3::bigint[], $4::bigint[]) \
             AS more (key_id, hour, reason, count) GROUP BY 1, 2, 3 ORDER BY 1, 2, 3 \
             ON CONFLICT (key_id, hour, reason) DO UPDATE SET count = usage.count + excluded.count",
        )
        .bind(arg(counts, |count| count.key_id.as_bytes().to_vec()))
        .bind(arg(counts, |count| count.hour.0))
        .bind(arg(counts, |count| i64::from(count.reason as u8)))
        .bind(arg(counts, |count| i64::try_from(count.count).unwrap_or(i64::MAX)))
        .execute(&mut *connection)
        .await?;
    }
    if spent.is_empty() { Ok(Vec::new()) } else { draw(connection, spent).await }
}

/// Adds units to quotas. The rows there are are locked in the order of their keys, and seen as they are then.
async fn draw(connection: &mut PgConnection, spent: &[(KeyId, Drawn)]) -> Result<Vec<PgRow>> {
    let mut by_key = BTreeMap::<KeyId, Drawn>::new();
    for (id, drawn) in spent {
        by_key.entry(*id).and_modify(|known| *known = known.and(*drawn)).or_insert(*drawn);
    }
    let rows: Vec<_> = by_key.into_iter().collect();
    let ids = || arg(&rows, |(id, _)| id.as_bytes().to_vec());
    query(
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
    .bind(arg(&rows, |(_, drawn)| drawn.period.as_micros()))
    .bind(arg(&rows, |(_, drawn)| drawn.until.map_or(i64::MAX, Timestamp::as_micros)))
    .bind(arg(&rows, |(_, drawn)| i64::try_from(drawn.units).unwrap_or(i64::MAX)))
    .execute(&mut *connection)
    .await?;
    query("SELECT key_id, period, used FROM quotas WHERE key_id = ANY($1)")
        .bind(ids())
        .fetch_all(connection)
        .await
}
