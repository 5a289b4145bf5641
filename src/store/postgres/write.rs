//! What goes into the tables: the rows of a decided run, a statement for each table, all of them for one message; and
//! what Checks have left.
//! Rows of `secrets` are always locked in the order of their keys, so that a batch and a note of uses cannot wait
//! for each other in a ring.

use std::collections::BTreeMap;

use sqlx::{PgConnection, postgres::PgRow};

use crate::{
    domain::{
        account::{Account, Member, Role},
        key::{Key, Secret},
        limit::Drawn,
        log::{Change, LogRow},
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
    literal::{Literal as _, column, fill},
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
    put_secrets(script, &keys, &plan.ended);
    let rows: Vec<_> = plan.committed.rows.iter().map(|(row, _)| row).collect();
    append(script, &rows);
    remember(script, plan);
}

fn put_accounts(script: &mut Vec<String>, rows: &[&Account]) {
    if rows.is_empty() {
        return;
    }
    script.push(fill(
"INSERT INTO accounts (id, name, suspended_at, created_at, updated_at, revision, sum, longest_life) \
         SELECT * FROM unnest($1::text[], $2::text[], $3::bigint[], $4::bigint[], $5::bigint[], $6::bigint[], \
         $7::bigint[], $8::bigint[]) ON CONFLICT (id) DO UPDATE SET name = excluded.name, \
         suspended_at = excluded.suspended_at, updated_at = excluded.updated_at, revision = excluded.revision, \
         sum = excluded.sum, longest_life = excluded.longest_life",
&[column(rows, |row| row.id.to_string()), column(rows, |row| row.name.to_string()), column(rows, |row| row.suspended_at.map(|at| at.as_micros())), column(rows, |row| row.created_at.as_micros()), column(rows, |row| row.updated_at.as_micros()), column(rows, |row| revision_to_i64(row.revision)), column(rows, |row| account_sum(row)), column(rows, |row| longest_life(row))],
));
}

fn put_roles(script: &mut Vec<String>, rows: &[&Role]) {
    if rows.is_empty() {
        return;
    }
    script.push(fill(
        "INSERT INTO roles (account, name, scopes, revision, sum) \
         SELECT * FROM unnest($1::text[], $2::text[], $3::text[], $4::bigint[], $5::bigint[]) \
         ON CONFLICT (account, name) DO UPDATE SET scopes = excluded.scopes, revision = excluded.revision, \
         sum = excluded.sum",
        &[
            column(rows, |row| role_account(row.account.as_ref()).to_owned()),
            column(rows, |row| row.name.to_string()),
            column(rows, |row| role_scopes(row)),
            column(rows, |row| revision_to_i64(row.revision)),
            column(rows, |row| role_sum(row)),
        ],
    ));
}

fn put_members(script: &mut Vec<String>, rows: &[&Member]) {
    if rows.is_empty() {
        return;
    }
    script.push(fill(
        "INSERT INTO members (account, user_id, role, revision, sum) \
         SELECT * FROM unnest($1::text[], $2::text[], $3::text[], $4::bigint[], $5::bigint[]) \
         ON CONFLICT (account, user_id) DO UPDATE SET role = excluded.role, revision = excluded.revision, \
         sum = excluded.sum",
        &[
            column(rows, |row| row.account.to_string()),
            column(rows, |row| row.user.to_string()),
            column(rows, |row| row.role.to_string()),
            column(rows, |row| revision_to_i64(row.revision)),
            column(rows, |row| member_sum(row)),
        ],
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
    let rows: Vec<_> = keys.iter().map(|key| KeyRow::of(key)).collect();
    script.push(fill(
        "INSERT INTO keys (id, account, user_id, environment, name, scopes, roles, expires_at, customers, \
         allowed_cidrs, rate_limits, quota, metadata, created_at, created_by, updated_at, disabled_at, \
         revoked_at, revoke_reason, revoke_comment, revision, sum) \
         SELECT * FROM unnest($1::bytea[], $2::text[], $3::text[], $4::text[], $5::text[], $6::text[], \
         $7::text[], $8::bigint[], $9::text[], $10::text[], $11::text[], $12::text[], $13::text[], \
         $14::bigint[], $15::text[], $16::bigint[], $17::bigint[], $18::bigint[], $19::text[], $20::bytea[], \
         $21::bigint[], $22::bigint[]) \
         ON CONFLICT (id) DO UPDATE SET account = excluded.account, user_id = excluded.user_id, \
         environment = excluded.environment, name = excluded.name, scopes = excluded.scopes, \
         roles = excluded.roles, expires_at = excluded.expires_at, customers = excluded.customers, \
         allowed_cidrs = excluded.allowed_cidrs, rate_limits = excluded.rate_limits, quota = excluded.quota, \
         metadata = excluded.metadata, created_at = excluded.created_at, created_by = excluded.created_by, \
         updated_at = excluded.updated_at, disabled_at = excluded.disabled_at, \
         revoked_at = excluded.revoked_at, revoke_reason = excluded.revoke_reason, \
         revoke_comment = excluded.revoke_comment, revision = excluded.revision, sum = excluded.sum",
        &[
            column(&rows, |row| row.id.to_vec()),
            column(&rows, |row| row.account.clone()),
            column(&rows, |row| row.user_id.clone()),
            column(&rows, |row| row.environment.clone()),
            column(&rows, |row| row.name.clone()),
            column(&rows, |row| row.scopes.clone()),
            column(&rows, |row| row.roles.clone()),
            column(&rows, |row| row.expires_at),
            column(&rows, |row| row.customers.clone()),
            column(&rows, |row| row.allowed_cidrs.clone()),
            column(&rows, |row| row.rate_limits.clone()),
            column(&rows, |row| row.quota.clone()),
            column(&rows, |row| row.metadata.clone()),
            column(&rows, |row| row.created_at),
            column(&rows, |row| row.created_by.clone()),
            column(&rows, |row| row.updated_at),
            column(&rows, |row| row.disabled_at),
            column(&rows, |row| row.revoked_at),
            column(&rows, |row| row.revoke_reason.clone()),
            column(&rows, |row| row.revoke_comment.clone().map(String::into_bytes)),
            column(&rows, |row| row.revision),
            column(&rows, KeyRow::sum),
        ],
    ));
}

/// Brings the secrets' rows to where the records say; only a record's newest can be new.
fn put_secrets(script: &mut Vec<String>, keys: &[&Key], ended: &[(KeyId, Secret)]) {
    let of_keys = keys.iter().flat_map(|key| key.secrets.iter().map(|secret| (key.id, secret)));
    let ended = ended.iter().map(|(id, secret)| (*id, secret));
    let mut rows: Vec<_> = of_keys.chain(ended).collect();
    if rows.is_empty() {
        return;
    }
    rows.sort_by_key(|(id, secret)| (*id, secret.version));
    // A digest that is another secret's was found out before; here nothing may be overwritten: what it divides by then is
    // zero, which ends the transaction.
    script.push(fill(
        "WITH written AS (INSERT INTO secrets (digest, key_id, version, hint, created_at, expires_at, sum) \
         SELECT * FROM unnest($1::bytea[], $2::bytea[], $3::bigint[], $4::text[], $5::bigint[], $6::bigint[], \
         $7::bigint[]) ON CONFLICT (digest) DO UPDATE SET expires_at = excluded.expires_at, \
         sum = excluded.sum WHERE secrets.key_id = excluded.key_id AND secrets.version = excluded.version \
         RETURNING 1) SELECT 1 / (count(*) = $8)::int FROM written",
        &[
            column(&rows, |(_, secret)| secret.digest.as_bytes().to_vec()),
            column(&rows, |(id, _)| id.as_bytes().to_vec()),
            column(&rows, |(_, secret)| i64::from(secret.version)),
            column(&rows, |(_, secret)| secret.hint.clone()),
            column(&rows, |(_, secret)| secret.created_at.as_micros()),
            column(&rows, |(_, secret)| secret.expires_at.map(|end| end.as_micros())),
            column(&rows, |(id, secret)| secret_sum(id.as_bytes(), secret)),
            i64::try_from(rows.len()).unwrap_or(i64::MAX).literal(),
        ],
    ));
}

fn append(script: &mut Vec<String>, rows: &[&LogRow]) {
    if rows.is_empty() {
        return;
    }
    script.push(fill(
        "INSERT INTO log (revision, at, action, account, key_id, user_id, actor, actor_account, acting_user, \
         method, payload, prev_hash, hash) \
         SELECT * FROM unnest($1::bigint[], $2::bigint[], $3::text[], $4::text[], $5::bytea[], $6::text[], \
         $7::text[], $8::text[], $9::text[], $10::text[], $11::text[], $12::bytea[], $13::bytea[])",
        &[
            column(rows, |row| revision_to_i64(row.revision)),
            column(rows, |row| row.at.as_micros()),
            column(rows, |row| row.action.clone()),
            column(rows, |row| row.account.as_ref().map(ToString::to_string)),
            column(rows, |row| row.key_id.map(|id| id.as_bytes().to_vec())),
            column(rows, |row| row.user.as_ref().map(ToString::to_string)),
            column(rows, |row| row.actor.clone()),
            column(rows, |row| row.actor_account.as_ref().map(ToString::to_string)),
            column(rows, |row| row.acting_user.as_ref().map(ToString::to_string)),
            column(rows, |row| row.method.clone()),
            column(rows, |row| row.payload.clone()),
            column(rows, |row| row.prev_hash.to_vec()),
            column(rows, |row| row.hash.to_vec()),
        ],
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
    script.push(fill(
        "INSERT INTO idempotency (caller, key, fingerprint, key_id, created_at) \
         SELECT * FROM unnest($1::bytea[], $2::text[], $3::bytea[], $4::bytea[], $5::bigint[]) \
         ON CONFLICT (caller, key) DO UPDATE SET fingerprint = excluded.fingerprint, \
         key_id = excluded.key_id, created_at = excluded.created_at",
        &[
            column(&rows, |((caller, _), _)| caller.as_bytes().to_vec()),
            column(&rows, |((_, key), _)| key.to_string()),
            column(&rows, |(_, (fingerprint, _, _))| fingerprint.to_vec()),
            column(&rows, |(_, (_, key_id, _))| key_id.as_bytes().to_vec()),
            column(&rows, |(_, (_, _, at))| at.as_micros()),
        ],
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
            "WITH latest AS (SELECT key_id, version, max(at) AS at \
             FROM unnest($1::bytea[], $2::bigint[], $3::bigint[]) AS used (key_id, version, at) \
             GROUP BY key_id, version), \
             found AS (SELECT s.digest, latest.at FROM secrets s JOIN latest USING (key_id, version) \
             ORDER BY s.key_id, s.version FOR NO KEY UPDATE OF s) \
             UPDATE secrets SET last_used_at = greatest(last_used_at, found.at) \
             FROM found WHERE secrets.digest = found.digest",
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
