//! What goes into the tables: the rows of a decided run, and what Checks have left, dozens in a statement. `BEGIN`
//! and `COMMIT` are the caller's.

use std::{borrow::Cow, collections::BTreeMap};

use sqlx::{SqliteConnection, sqlite::SqliteRow};

use crate::{
    domain::{
        account::{Account, Member, Role},
        key::Secret,
        limit::Drawn,
        log::{Change, LogRow},
        name::KeyId,
        time::Timestamp,
    },
    store::{
        Committed, Head, IDEMPOTENCY_WINDOW, UsageBatch, Write,
        plan::{self, Plan, Questions},
        queries,
        records::head_at,
        rows::{
            KeyRow, account_sum, longest_life, member_sum, revision_to_i64, role_account, role_scopes,
            role_sum, secret_sum,
        },
    },
};

use super::{
    facts,
    values::{Query, Result, Statement},
};

type Connection = SqliteConnection;

const PUT_ACCOUNTS: Statement = Statement {
    head: "INSERT INTO accounts (id, name, suspended_at, created_at, updated_at, revision, sum, longest_life)",
    row: "(?, ?, ?, ?, ?, ?, ?, ?)",
    tail: "ON CONFLICT (id) DO UPDATE SET name = excluded.name, suspended_at = excluded.suspended_at, \
           updated_at = excluded.updated_at, revision = excluded.revision, sum = excluded.sum, \
           longest_life = excluded.longest_life",
};
const PUT_ROLES: Statement =
    Statement { head: "INSERT OR REPLACE INTO roles", row: "(?, ?, ?, ?, ?)", tail: "" };
const PUT_MEMBERS: Statement =
    Statement { head: "INSERT OR REPLACE INTO members", row: "(?, ?, ?, ?, ?)", tail: "" };
const PUT_KEYS: Statement = Statement {
    head: "INSERT INTO keys",
    row: "(?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
    tail: "ON CONFLICT (id) DO UPDATE SET account = excluded.account, user_id = excluded.user_id, \
           environment = excluded.environment, name = excluded.name, scopes = excluded.scopes, \
           roles = excluded.roles, expires_at = excluded.expires_at, customers = excluded.customers, \
           allowed_cidrs = excluded.allowed_cidrs, rate_limits = excluded.rate_limits, quota = excluded.quota, \
           metadata = excluded.metadata, created_at = excluded.created_at, created_by = excluded.created_by, \
           updated_at = excluded.updated_at, disabled_at = excluded.disabled_at, \
           revoked_at = excluded.revoked_at, revoke_reason = excluded.revoke_reason, \
           revoke_comment = excluded.revoke_comment, revision = excluded.revision, sum = excluded.sum",
};
const PUT_SECRETS: Statement = Statement {
    head: "INSERT INTO secrets",
    row: "(?, ?, ?, ?, ?, ?, ?)",
    tail: "ON CONFLICT (digest) DO UPDATE SET expires_at = excluded.expires_at, sum = excluded.sum \
           WHERE key_id = excluded.key_id AND version = excluded.version",
};
const APPEND: Statement =
    Statement { head: "INSERT INTO log", row: "(?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", tail: "" };
const REMEMBER: Statement =
    Statement { head: "INSERT OR REPLACE INTO idempotency", row: "(?, ?, ?, ?, ?)", tail: "" };
const NOTE_USED: Statement = Statement {
    head: "INSERT INTO uses",
    row: "(?, ?, ?)",
    tail: "ON CONFLICT (key_id, version) DO UPDATE SET at = max(at, excluded.at)",
};
const COUNT: Statement = Statement {
    head: "INSERT INTO usage",
    row: "(?, ?, ?, ?)",
    tail: "ON CONFLICT (key_id, hour, reason) DO UPDATE SET count = count + excluded.count",
};
const DRAW: Statement = Statement {
    head: "WITH more (key_id, period, units, until) AS (",
    row: "(?, ?, ?, ?)",
    tail: ") INSERT INTO quotas SELECT more.key_id, more.period, more.units FROM more \
           LEFT JOIN quotas known ON known.key_id = more.key_id \
           WHERE known.period IS NULL OR known.period < more.until \
           ON CONFLICT (key_id) DO UPDATE SET period = excluded.period, \
           used = excluded.used + iif(quotas.period = excluded.period, quotas.used, 0)",
};
const SPENT: Statement = Statement {
    head: "WITH asked (key_id) AS (",
    row: "(?)",
    tail: ") SELECT q.key_id, q.period, q.used FROM asked CROSS JOIN quotas q ON q.key_id = asked.key_id",
};

/// Writes what of the batch can be written.
pub(super) async fn batch(connection: &mut Connection, batch: &[Write]) -> Result<Committed> {
    let mut head = read_head(connection).await?;
    let mut committed = Committed::default();
    for run in plan::runs(batch) {
        let facts = facts::answers(connection, &Questions::of(run)).await?;
        let plan = plan::decide(run, facts, head).map_err(|error| sqlx::Error::Encode(Box::new(error)))?;
        write(connection, &plan).await?;
        head = plan.head;
        committed.outcomes.extend(plan.committed.outcomes);
        committed.rows.extend(plan.committed.rows);
    }
    if !committed.rows.is_empty() {
        sqlx::query("UPDATE meta SET head = ?1, head_hash = ?2")
            .bind(revision_to_i64(head.revision))
            .bind(head.hash.to_vec())
            .execute(connection)
            .await?;
    }
    Ok(committed)
}

async fn read_head(connection: &mut Connection) -> Result<Head> {
    let row = queries::head::<sqlx::Sqlite>().into_builder().build().fetch_one(connection).await?;
    head_at(&row).map_err(|error| sqlx::Error::Decode(Box::new(error)))
}

/// Brings the tables to what a run was decided to be.
async fn write(connection: &mut Connection, plan: &Plan<'_>) -> Result<()> {
    let (mut accounts, mut roles, mut members, mut keys) = (vec![], vec![], vec![], vec![]);
    for (_, change) in &plan.committed.rows {
        match change {
            Change::Account(account) => accounts.push(&**account),
            Change::Role(role) => roles.push(&**role),
            Change::Member(member) => members.push(&**member),
            Change::Key(key) => keys.push(&**key),
            Change::RoleDeleted(role) => delete_role(connection, role).await?,
            Change::MemberRemoved(member) => remove_member(connection, member).await?,
        }
    }
    PUT_ACCOUNTS.write(connection, &accounts, |query, account| bind_account(query, account)).await?;
    PUT_ROLES.write(connection, &roles, |query, role| bind_role(query, role)).await?;
    PUT_MEMBERS.write(connection, &members, |query, member| bind_member(query, member)).await?;
    // In the order of their revisions: a name that one lets go is free for those after it.
    PUT_KEYS.write(connection, &keys, |query, key| bind_key(query, KeyRow::of(key))).await?;
    put_secrets(connection, &plan.secrets).await?;
    APPEND.write(connection, &plan.committed.rows, |query, (row, _)| bind_log(query, row)).await?;
    remember(connection, plan).await
}

fn bind_account(query: Query, account: &Account) -> Query {
    query
        .bind(account.id.to_string())
        .bind(account.name.to_string())
        .bind(account.suspended_at.map(Timestamp::as_micros))
        .bind(account.created_at.as_micros())
        .bind(account.updated_at.as_micros())
        .bind(revision_to_i64(account.revision))
        .bind(account_sum(account))
        .bind(longest_life(account))
}

fn bind_role(query: Query, role: &Role) -> Query {
    query
        .bind(role_account(role.account.as_ref()).to_owned())
        .bind(role.name.to_string())
        .bind(role_scopes(role))
        .bind(revision_to_i64(role.revision))
        .bind(role_sum(role))
}

fn bind_member(query: Query, member: &Member) -> Query {
    query
        .bind(member.account.to_string())
        .bind(member.user.to_string())
        .bind(member.role.to_string())
        .bind(revision_to_i64(member.revision))
        .bind(member_sum(member))
}

fn bind_key(query: Query, row: KeyRow<'_>) -> Query {
    let sum = row.sum();
    let text = |text: Option<Cow<'_, str>>| text.map(Cow::into_owned);
    query
        .bind(row.id.to_vec())
        .bind(text(row.account))
        .bind(text(row.user_id))
        .bind(row.environment.into_owned())
        .bind(text(row.name))
        .bind(row.scopes.into_owned())
        .bind(row.roles.into_owned())
        .bind(row.expires_at)
        .bind(row.customers.into_owned())
        .bind(row.allowed_cidrs.into_owned())
        .bind(text(row.rate_limits))
        .bind(text(row.quota))
        .bind(text(row.metadata))
        .bind(row.created_at)
        .bind(row.created_by.into_owned())
        .bind(row.updated_at)
        .bind(row.disabled_at)
        .bind(row.revoked_at)
        .bind(text(row.revoke_reason))
        .bind(text(row.revoke_comment))
        .bind(row.revision)
        .bind(sum)
}

fn bind_secret(query: Query, (id, secret): &(KeyId, Secret)) -> Query {
    query
        .bind(secret.digest.as_bytes().to_vec())
        .bind(id.as_bytes().to_vec())
        .bind(i64::from(secret.version))
        .bind(secret.hint.clone())
        .bind(secret.created_at.as_micros())
        .bind(secret.expires_at.map(Timestamp::as_micros))
        .bind(secret_sum(id.as_bytes(), secret))
}

fn bind_log(query: Query, row: &LogRow) -> Query {
    query
        .bind(revision_to_i64(row.revision))
        .bind(row.at.as_micros())
        .bind(row.action.clone())
        .bind(row.account.as_ref().map(ToString::to_string))
        .bind(row.key_id.map(|id| id.as_bytes().to_vec()))
        .bind(row.user.as_ref().map(ToString::to_string))
        .bind(row.actor.clone())
        .bind(row.actor_account.as_ref().map(ToString::to_string))
        .bind(row.acting_user.as_ref().map(ToString::to_string))
        .bind(row.method.clone())
        .bind(row.payload.clone())
        .bind(row.prev_hash.to_vec())
        .bind(row.hash.to_vec())
}

/// Brings the secrets' rows to where the records say; only a record's newest can be new.
async fn put_secrets(connection: &mut Connection, rows: &[(KeyId, Secret)]) -> Result<()> {
    // A digest that is another secret's was found out before: here nothing may be left out.
    match PUT_SECRETS.write(connection, rows, bind_secret).await? {
        written if written == rows.len() as u64 => Ok(()),
        written => Err(sqlx::Error::Protocol(format!("{written} of {} secrets were written", rows.len()))),
    }
}

async fn delete_role(connection: &mut Connection, role: &Role) -> Result<()> {
    sqlx::query("DELETE FROM roles WHERE account = ?1 AND name = ?2")
        .bind(role_account(role.account.as_ref()))
        .bind(role.name.as_str())
        .execute(connection)
        .await
        .map(drop)
}

async fn remove_member(connection: &mut Connection, member: &Member) -> Result<()> {
    sqlx::query("DELETE FROM members WHERE account = ?1 AND user_id = ?2")
        .bind(member.account.as_str())
        .bind(member.user.as_str())
        .execute(connection)
        .await
        .map(drop)
}

/// Keeps the idempotency keys. Each insert takes away a few that no longer count, so the table stays small without
/// a sweeper.
async fn remember(connection: &mut Connection, plan: &Plan<'_>) -> Result<()> {
    let Some(oldest) = plan.requests.iter().map(|(_, _, at)| *at).min() else { return Ok(()) };
    REMEMBER
        .write(connection, &plan.requests, |query, (request, key_id, at)| {
            query
                .bind(request.caller.as_bytes().to_vec())
                .bind(request.key.to_string())
                .bind(request.fingerprint.to_vec())
                .bind(key_id.as_bytes().to_vec())
                .bind(at.as_micros())
        })
        .await?;
    sqlx::query(
        "DELETE FROM idempotency WHERE (caller, key) IN (SELECT caller, key FROM idempotency \
         WHERE created_at < ?1 ORDER BY created_at LIMIT ?2)",
    )
    .bind(oldest.minus(IDEMPOTENCY_WINDOW).as_micros())
    .bind(4 * i64::try_from(plan.requests.len()).unwrap_or(i64::MAX / 4))
    .execute(connection)
    .await
    .map(drop)
}

/// Writes what Checks have left. Gives the rows of the quotas that were drawn from.
pub(super) async fn usage(connection: &mut Connection, batch: &UsageBatch) -> Result<Vec<SqliteRow>> {
    NOTE_USED
        .write(connection, &batch.used, |query, used| {
            query
                .bind(used.key_id.as_bytes().to_vec())
                .bind(i64::from(used.version))
                .bind(used.at.as_micros())
        })
        .await?;
    COUNT
        .write(connection, &batch.counts, |query, count| {
            query
                .bind(count.key_id.as_bytes().to_vec())
                .bind(count.hour.0)
                .bind(i64::from(count.reason as u8))
                .bind(i64::try_from(count.count).unwrap_or(i64::MAX))
        })
        .await?;
    draw(connection, &batch.spent).await
}

/// Adds units to quotas.
async fn draw(connection: &mut Connection, spent: &[(KeyId, Drawn)]) -> Result<Vec<SqliteRow>> {
    let mut by_key = BTreeMap::<KeyId, Drawn>::new();
    for (id, drawn) in spent {
        by_key.entry(*id).and_modify(|known| *known = known.and(*drawn)).or_insert(*drawn);
    }
    let rows: Vec<_> = by_key.into_iter().collect();
    DRAW.write(connection, &rows, |query, (key_id, drawn)| {
        query
            .bind(key_id.as_bytes().to_vec())
            .bind(drawn.period.as_micros())
            .bind(i64::try_from(drawn.units).unwrap_or(i64::MAX))
            .bind(drawn.until.map_or(i64::MAX, Timestamp::as_micros))
    })
    .await?;
    SPENT.read(connection, &rows, |query, (key_id, _)| query.bind(key_id.as_bytes().to_vec())).await
}

#[cfg(test)]
mod tests {
    use sqlx::{AssertSqlSafe, Row as _};

    use super::*;
    use crate::store::{Schema, sqlite::Sqlite};

    #[tokio::test(flavor = "multi_thread")]
    async fn what_is_asked_or_changed_is_found_by_an_index() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("keyward.db").display().to_string();
        let store = Sqlite::open(&path, Schema::Migrate).await.unwrap();
        for statement in facts::ALL.iter().chain([&DRAW, &SPENT]) {
            for rows in [1, 64] {
                let sql = format!("EXPLAIN QUERY PLAN {}", statement.of(rows));
                let plan = store
                    .writing(async |connection| {
                        sqlx::query(AssertSqlSafe(sql.clone())).fetch_all(connection).await
                    })
                    .await
                    .unwrap();
                let plan: Vec<String> = plan.iter().map(|row| row.get("detail")).collect();
                let mine =
                    |step: &&String| ["asked", "more", "CONSTANT"].iter().any(|own| step.contains(own));
                let scanned: Vec<_> =
                    plan.iter().filter(|step| step.starts_with("SCAN")).filter(|step| !mine(step)).collect();
                assert!(scanned.is_empty(), "{sql}: {plan:?}");
                assert!(plan.iter().any(|step| step.starts_with("SEARCH")), "{sql}: {plan:?}");
            }
        }
    }
}
