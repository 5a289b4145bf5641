//! The embedded store's transactions: what a batch of writes does to the tables. `BEGIN` and `COMMIT` are the
//! caller's. What stands against a write is found before anything of it is written, so that the others of its
//! batch are left alone.

use std::collections::BTreeMap;

use sqlx::{SqliteConnection, sqlite::SqliteRow};

use crate::domain::{
    account::{Account, Member, Role},
    key::Key,
    log::{Change, LogRow},
    name::{AccountId, IdempotencyKey, KeyId, RoleName},
    time::{Revision, Timestamp},
};

use super::{
    Committed, Head, IDEMPOTENCY_WINDOW, Outcome, Rejection, UsageBatch, UsedSecret, Write, queries,
    records::{bytes_at, head_at, secret_at},
    rows::{
        KeyRow, account_sum, longest_life, member_sum, revision_from_i64, revision_to_i64, role_account,
        role_scopes, role_sum, secret_sum,
    },
};

type Connection = SqliteConnection;
type Result<T> = std::result::Result<T, sqlx::Error>;
type Verdict = std::result::Result<(), Rejection>;

/// Writes what of the batch can be written.
pub(super) async fn batch(connection: &mut Connection, batch: &[Write]) -> Result<Committed> {
    let mut head = read_head(connection).await?;
    let mut committed = Committed::default();
    for write in batch {
        let outcome = match done_before(connection, write).await? {
            Some(outcome) => outcome,
            None => match one(connection, write, head).await? {
                Ok((row, change)) => {
                    head = Head { revision: row.revision, hash: row.hash };
                    committed.rows.push((row, change.clone()));
                    Ok(Outcome::Applied(change))
                }
                Err(rejection) => Err(rejection),
            },
        };
        committed.outcomes.push(outcome);
    }
    if !committed.rows.is_empty() {
        sqlx::query("UPDATE meta SET head = ?1, head_hash = ?2")
            .bind(revision_to_i64(head.revision))
            .bind(head.hash.as_slice())
            .execute(connection)
            .await?;
    }
    Ok(committed)
}

async fn read_head(connection: &mut Connection) -> Result<Head> {
    let row = queries::head::<sqlx::Sqlite>().into_builder().build().fetch_one(connection).await?;
    head_at(&row).map_err(|error| sqlx::Error::Decode(Box::new(error)))
}

async fn idempotent(
    connection: &mut Connection,
    caller: KeyId,
    key: &IdempotencyKey,
    since: Timestamp,
) -> Result<Option<(KeyId, [u8; 32])>> {
    let mut query = queries::idempotent::<sqlx::Sqlite>(caller, key, since).into_builder();
    let row = query.build().fetch_optional(connection).await?;
    row.map(|row| Ok((KeyId::from_bytes(bytes_at(&row, 0)?), bytes_at(&row, 1)?))).transpose()
}

/// What is known of a write's idempotency key.
async fn done_before(
    connection: &mut Connection,
    write: &Write,
) -> Result<Option<std::result::Result<Outcome, Rejection>>> {
    let Some(idempotency) = &write.idempotency else { return Ok(None) };
    let since = write.at.minus(IDEMPOTENCY_WINDOW);
    let found = idempotent(connection, idempotency.caller, &idempotency.key, since).await?;
    Ok(found.map(|(key_id, fingerprint)| {
        if fingerprint == idempotency.fingerprint {
            Ok(Outcome::Replayed(key_id))
        } else {
            Err(Rejection::IdempotencyReused)
        }
    }))
}

/// Writes one record and its log row after `head`, unless something stands against it.
async fn one(
    connection: &mut Connection,
    write: &Write,
    head: Head,
) -> Result<std::result::Result<(LogRow, Change), Rejection>> {
    let revision = head.revision.next();
    let change = write.change.clone().at_revision(revision);
    if let Err(rejection) = put(connection, &change, write.expect).await? {
        return Ok(Err(rejection));
    }
    let row = write.log_row(&change, head).map_err(|error| sqlx::Error::Encode(Box::new(error)))?;
    append(connection, &row).await?;
    remember(connection, write, &change).await?;
    Ok(Ok((row, change)))
}

/// Brings the tables to the record, or leaves them as they are.
async fn put(connection: &mut Connection, change: &Change, expect: Option<Revision>) -> Result<Verdict> {
    match change {
        Change::Key(key) => put_key(connection, key, expect).await,
        Change::Account(account) => put_account(connection, account, expect).await,
        Change::Role(role) => put_role(connection, role, expect).await,
        Change::RoleDeleted(role) => delete_role(connection, role, expect).await,
        Change::Member(member) => put_member(connection, member, expect).await,
        Change::MemberRemoved(member) => remove_member(connection, member, expect).await,
    }
}

fn as_expected(found: Option<i64>, expect: Option<Revision>) -> Verdict {
    if found.map(revision_from_i64) == expect { Ok(()) } else { Err(Rejection::Conflict) }
}

async fn put_key(connection: &mut Connection, key: &Key, expect: Option<Revision>) -> Result<Verdict> {
    if key.revocation.is_none() {
        for role in &key.terms.roles {
            if !role_exists(connection, key.owner.account(), role).await? {
                return Ok(Err(Rejection::NoSuchRole));
            }
        }
    }
    let verdict = match expect {
        None => insert_key(connection, key).await?,
        Some(revision) => update_key(connection, key, revision).await?,
    };
    if verdict.is_ok() && expect.is_some() {
        end_left_secret(connection, key).await?;
    }
    Ok(verdict)
}

/// A new key: a conflict on its id, name or digest leaves the tables as they were.
async fn insert_key(connection: &mut Connection, key: &Key) -> Result<Verdict> {
    let insert = sqlx::query(
        "INSERT INTO keys VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15, ?16, ?17, \
         ?18, ?19, ?20, ?21, ?22) ON CONFLICT DO NOTHING",
    );
    if bind_key(insert, &KeyRow::of(key)).execute(&mut *connection).await?.rows_affected() == 0 {
        // A key that is there already, name and all, is told by its digest.
        let same: Option<i64> = sqlx::query_scalar("SELECT 1 FROM keys WHERE id = ?1")
            .bind(key.id.as_bytes().as_slice())
            .fetch_optional(&mut *connection)
            .await?;
        return Ok(Err(if same.is_some() {
            Rejection::Conflict
        } else if digest_known(connection, key).await? {
            Rejection::DigestTaken
        } else if name_taken(connection, key).await? {
            Rejection::NameTaken
        } else {
            Rejection::Conflict
        }));
    }
    if put_secrets(connection, key).await? {
        return Ok(Ok(()));
    }
    sqlx::query("DELETE FROM keys WHERE id = ?1")
        .bind(key.id.as_bytes().as_slice())
        .execute(connection)
        .await?;
    Ok(Err(Rejection::DigestTaken))
}

async fn update_key(connection: &mut Connection, key: &Key, expect: Revision) -> Result<Verdict> {
    let found: Option<i64> = sqlx::query_scalar("SELECT revision FROM keys WHERE id = ?1")
        .bind(key.id.as_bytes().as_slice())
        .fetch_optional(&mut *connection)
        .await?;
    if let Err(rejection) = as_expected(found, Some(expect)) {
        return Ok(Err(rejection));
    }
    if name_taken(connection, key).await? {
        return Ok(Err(Rejection::NameTaken));
    }
    if !put_secrets(connection, key).await? {
        return Ok(Err(Rejection::DigestTaken));
    }
    let update = sqlx::query(
        "UPDATE keys SET account = ?2, user_id = ?3, environment = ?4, name = ?5, scopes = ?6, roles = ?7, \
         expires_at = ?8, customers = ?9, allowed_cidrs = ?10, rate_limits = ?11, quota = ?12, metadata = ?13, \
         created_at = ?14, created_by = ?15, updated_at = ?16, disabled_at = ?17, revoked_at = ?18, \
         revoke_reason = ?19, revoke_comment = ?20, revision = ?21, sum = ?22 WHERE id = ?1",
    );
    bind_key(update, &KeyRow::of(key)).execute(connection).await?;
    Ok(Ok(()))
}

type Query<'q> = sqlx::query::Query<'q, sqlx::Sqlite, sqlx::sqlite::SqliteArguments>;

fn bind_key<'q>(query: Query<'q>, row: &KeyRow) -> Query<'q> {
    query
        .bind(row.id.to_vec())
        .bind(row.account.clone())
        .bind(row.user_id.clone())
        .bind(row.environment.clone())
        .bind(row.name.clone())
        .bind(row.scopes.clone())
        .bind(row.roles.clone())
        .bind(row.expires_at)
        .bind(row.customers.clone())
        .bind(row.allowed_cidrs.clone())
        .bind(row.rate_limits.clone())
        .bind(row.quota.clone())
        .bind(row.metadata.clone())
        .bind(row.created_at)
        .bind(row.created_by.clone())
        .bind(row.updated_at)
        .bind(row.disabled_at)
        .bind(row.revoked_at)
        .bind(row.revoke_reason.clone())
        .bind(row.revoke_comment.clone())
        .bind(row.revision)
        .bind(row.sum())
}

async fn name_taken(connection: &mut Connection, key: &Key) -> Result<bool> {
    let Some(name) = key.terms.name.as_ref().filter(|_| key.revocation.is_none()) else { return Ok(false) };
    let query = match (key.owner.account(), key.owner.user()) {
        (Some(account), _) => sqlx::query_scalar(
            "SELECT 1 FROM keys WHERE account = ?1 AND name = ?2 AND revoked_at IS NULL AND id <> ?3",
        )
        .bind(account.as_str()),
        (None, user) => sqlx::query_scalar(
            "SELECT 1 FROM keys WHERE user_id = ?1 AND name = ?2 AND revoked_at IS NULL AND id <> ?3",
        )
        .bind(user.map(|user| user.as_str())),
    };
    let found: Option<i64> =
        query.bind(name.as_str()).bind(key.id.as_bytes().as_slice()).fetch_optional(connection).await?;
    Ok(found.is_some())
}

async fn digest_known(connection: &mut Connection, key: &Key) -> Result<bool> {
    let Some(newest) = key.secrets.first() else { return Ok(false) };
    let found: Option<i64> = sqlx::query_scalar("SELECT 1 FROM secrets WHERE digest = ?1")
        .bind(newest.digest.as_bytes().as_slice())
        .fetch_optional(connection)
        .await?;
    Ok(found.is_some())
}

/// Brings the secrets' rows to where the record says. False, and nothing written, when the newest one's digest
/// belongs to another secret: a digest is unique for ever.
async fn put_secrets(connection: &mut Connection, key: &Key) -> Result<bool> {
    let key_id = key.id.as_bytes().as_slice();
    // The newest comes first, and it alone can be new.
    for secret in &key.secrets {
        let written = sqlx::query(
            "INSERT INTO secrets VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, NULL) ON CONFLICT (digest) DO UPDATE \
             SET expires_at = excluded.expires_at, sum = excluded.sum \
             WHERE key_id = excluded.key_id AND version = excluded.version",
        )
        .bind(secret.digest.as_bytes().as_slice())
        .bind(key_id)
        .bind(i64::from(secret.version))
        .bind(&secret.hint)
        .bind(secret.created_at.as_micros())
        .bind(secret.expires_at.map(|end| end.as_micros()))
        .bind(secret_sum(key_id, secret))
        .execute(&mut *connection)
        .await?;
        if written.rows_affected() == 0 {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Ends the secret that left the record when the newest was made, if it was alive still.
async fn end_left_secret(connection: &mut Connection, key: &Key) -> Result<()> {
    let [newest, .., oldest] = key.secrets.as_slice() else { return Ok(()) };
    if oldest.version < 2 {
        return Ok(());
    }
    let key_id = key.id.as_bytes().as_slice();
    let left = sqlx::query(
        "SELECT digest, version, hint, created_at, expires_at, sum FROM secrets \
         WHERE key_id = ?1 AND version = ?2 AND (expires_at IS NULL OR expires_at > ?3)",
    )
    .bind(key_id)
    .bind(i64::from(oldest.version) - 1)
    .bind(newest.created_at.as_micros())
    .fetch_optional(&mut *connection)
    .await?;
    let Some(row) = left else { return Ok(()) };
    let mut secret = secret_at(&row, key_id, 0).map_err(|error| sqlx::Error::Decode(Box::new(error)))?;
    secret.expires_at = Some(newest.created_at);
    sqlx::query("UPDATE secrets SET expires_at = ?2, sum = ?3 WHERE digest = ?1")
        .bind(secret.digest.as_bytes().as_slice())
        .bind(newest.created_at.as_micros())
        .bind(secret_sum(key_id, &secret))
        .execute(connection)
        .await
        .map(drop)
}

async fn put_account(
    connection: &mut Connection,
    account: &Account,
    expect: Option<Revision>,
) -> Result<Verdict> {
    let found = sqlx::query_scalar("SELECT revision FROM accounts WHERE id = ?1")
        .bind(account.id.as_str())
        .fetch_optional(&mut *connection)
        .await?;
    if let Err(rejection) = as_expected(found, expect) {
        return Ok(Err(rejection));
    }
    sqlx::query(
        "INSERT INTO accounts (id, name, suspended_at, created_at, updated_at, revision, sum, longest_life) \
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8) ON CONFLICT (id) DO UPDATE SET name = excluded.name, \
         suspended_at = excluded.suspended_at, updated_at = excluded.updated_at, revision = excluded.revision, \
         sum = excluded.sum, longest_life = excluded.longest_life",
    )
    .bind(account.id.as_str())
    .bind(account.name.as_str())
    .bind(account.suspended_at.map(|at| at.as_micros()))
    .bind(account.created_at.as_micros())
    .bind(account.updated_at.as_micros())
    .bind(revision_to_i64(account.revision))
    .bind(account_sum(account))
    .bind(longest_life(account))
    .execute(connection)
    .await?;
    Ok(Ok(()))
}

/// Whether a role stands for an account: its own, or a global one.
async fn role_exists(
    connection: &mut Connection,
    account: Option<&AccountId>,
    role: &RoleName,
) -> Result<bool> {
    let found: Option<i64> =
        sqlx::query_scalar("SELECT 1 FROM roles WHERE name = ?1 AND account IN ('', ?2) LIMIT 1")
            .bind(role.as_str())
            .bind(role_account(account))
            .fetch_optional(connection)
            .await?;
    Ok(found.is_some())
}

async fn role_revision(connection: &mut Connection, role: &Role) -> Result<Option<i64>> {
    sqlx::query_scalar("SELECT revision FROM roles WHERE account = ?1 AND name = ?2")
        .bind(role_account(role.account.as_ref()))
        .bind(role.name.as_str())
        .fetch_optional(connection)
        .await
}

async fn put_role(connection: &mut Connection, role: &Role, expect: Option<Revision>) -> Result<Verdict> {
    let found = role_revision(connection, role).await?;
    if let Err(rejection) = as_expected(found, expect) {
        return Ok(Err(rejection));
    }
    sqlx::query("INSERT OR REPLACE INTO roles VALUES (?1, ?2, ?3, ?4, ?5)")
        .bind(role_account(role.account.as_ref()))
        .bind(role.name.as_str())
        .bind(role_scopes(role))
        .bind(revision_to_i64(role.revision))
        .bind(role_sum(role))
        .execute(connection)
        .await?;
    Ok(Ok(()))
}

/// Deletes a role that nothing uses. Of a global one, accounts with an own role of that name do not count.
async fn delete_role(connection: &mut Connection, role: &Role, expect: Option<Revision>) -> Result<Verdict> {
    let found = role_revision(connection, role).await?;
    if let Err(rejection) = as_expected(found, expect) {
        return Ok(Err(rejection));
    }
    let account = role_account(role.account.as_ref());
    let count = |sql: &'static str| sqlx::query_scalar::<_, i64>(sql).bind(role.name.as_str()).bind(account);
    let members = count(
        "SELECT count(*) FROM members WHERE role = ?1 AND (account = ?2 OR (?2 = '' AND NOT EXISTS \
         (SELECT 1 FROM roles WHERE roles.account = members.account AND name = ?1)))",
    )
    .fetch_one(&mut *connection)
    .await?;
    let keys = count(
        "SELECT count(*) FROM keys WHERE revoked_at IS NULL AND instr(' ' || roles || ' ', ' ' || ?1 || ' ') > 0 \
         AND (account = ?2 OR (?2 = '' AND NOT EXISTS \
         (SELECT 1 FROM roles WHERE roles.account = keys.account AND name = ?1)))",
    )
    .fetch_one(&mut *connection)
    .await?;
    if members > 0 || keys > 0 {
        let number = |count: i64| u64::try_from(count).unwrap_or(0);
        return Ok(Err(Rejection::RoleInUse { keys: number(keys), members: number(members) }));
    }
    sqlx::query("DELETE FROM roles WHERE account = ?1 AND name = ?2")
        .bind(account)
        .bind(role.name.as_str())
        .execute(connection)
        .await?;
    Ok(Ok(()))
}

async fn member_revision(connection: &mut Connection, member: &Member) -> Result<Option<i64>> {
    sqlx::query_scalar("SELECT revision FROM members WHERE account = ?1 AND user_id = ?2")
        .bind(member.account.as_str())
        .bind(member.user.as_str())
        .fetch_optional(connection)
        .await
}

async fn put_member(
    connection: &mut Connection,
    member: &Member,
    expect: Option<Revision>,
) -> Result<Verdict> {
    let found = member_revision(connection, member).await?;
    if let Err(rejection) = as_expected(found, expect) {
        return Ok(Err(rejection));
    }
    if !role_exists(connection, Some(&member.account), &member.role).await? {
        return Ok(Err(Rejection::NoSuchRole));
    }
    sqlx::query("INSERT OR REPLACE INTO members VALUES (?1, ?2, ?3, ?4, ?5)")
        .bind(member.account.as_str())
        .bind(member.user.as_str())
        .bind(member.role.as_str())
        .bind(revision_to_i64(member.revision))
        .bind(member_sum(member))
        .execute(connection)
        .await?;
    Ok(Ok(()))
}

async fn remove_member(
    connection: &mut Connection,
    member: &Member,
    expect: Option<Revision>,
) -> Result<Verdict> {
    let found = member_revision(connection, member).await?;
    if let Err(rejection) = as_expected(found, expect) {
        return Ok(Err(rejection));
    }
    sqlx::query("DELETE FROM members WHERE account = ?1 AND user_id = ?2")
        .bind(member.account.as_str())
        .bind(member.user.as_str())
        .execute(connection)
        .await?;
    Ok(Ok(()))
}

async fn append(connection: &mut Connection, row: &LogRow) -> Result<()> {
    sqlx::query("INSERT INTO log VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13)")
        .bind(revision_to_i64(row.revision))
        .bind(row.at.as_micros())
        .bind(&row.action)
        .bind(row.account.as_ref().map(|account| account.as_str()))
        .bind(row.key_id.as_ref().map(|id| id.as_bytes().as_slice()))
        .bind(row.user.as_ref().map(|user| user.as_str()))
        .bind(&row.actor)
        .bind(row.actor_account.as_ref().map(|account| account.as_str()))
        .bind(row.acting_user.as_ref().map(|user| user.as_str()))
        .bind(&row.method)
        .bind(&row.payload)
        .bind(row.prev_hash.as_slice())
        .bind(row.hash.as_slice())
        .execute(connection)
        .await
        .map(drop)
}

/// Keeps the write's idempotency key. Each insert takes away a few that no longer count, so the table stays
/// small without a sweeper.
async fn remember(connection: &mut Connection, write: &Write, change: &Change) -> Result<()> {
    let (Some(idempotency), Some(key_id)) = (&write.idempotency, change.key_id()) else { return Ok(()) };
    sqlx::query("INSERT OR REPLACE INTO idempotency VALUES (?1, ?2, ?3, ?4, ?5)")
        .bind(idempotency.caller.as_bytes().as_slice())
        .bind(idempotency.key.as_str())
        .bind(idempotency.fingerprint.as_slice())
        .bind(key_id.as_bytes().as_slice())
        .bind(write.at.as_micros())
        .execute(&mut *connection)
        .await?;
    sqlx::query(
        "DELETE FROM idempotency WHERE (caller, key) IN (SELECT caller, key FROM idempotency \
         WHERE created_at < ?1 ORDER BY created_at LIMIT 4)",
    )
    .bind(write.at.minus(IDEMPOTENCY_WINDOW).as_micros())
    .execute(connection)
    .await
    .map(drop)
}

/// Writes what Checks have left. Gives the rows of the quotas that were drawn from.
pub(super) async fn usage(connection: &mut Connection, batch: &UsageBatch) -> Result<Vec<SqliteRow>> {
    for UsedSecret { key_id, version, at } in &batch.used {
        sqlx::query(
            "UPDATE secrets SET last_used_at = max(coalesce(last_used_at, 0), ?3) \
             WHERE key_id = ?1 AND version = ?2",
        )
        .bind(key_id.as_bytes().as_slice())
        .bind(i64::from(*version))
        .bind(at.as_micros())
        .execute(&mut *connection)
        .await?;
    }
    for count in &batch.counts {
        sqlx::query(
            "INSERT INTO usage VALUES (?1, ?2, ?3, ?4) \
             ON CONFLICT (key_id, hour, reason) DO UPDATE SET count = count + excluded.count",
        )
        .bind(count.key_id.as_bytes().as_slice())
        .bind(count.hour.0)
        .bind(i64::from(count.reason as u8))
        .bind(i64::try_from(count.count).unwrap_or(i64::MAX))
        .execute(&mut *connection)
        .await?;
    }
    let mut rows = BTreeMap::new();
    for (key_id, drawn) in &batch.spent {
        sqlx::query(
            "INSERT INTO quotas VALUES (?1, ?2, ?3) ON CONFLICT (key_id) DO UPDATE SET \
             period = excluded.period, used = excluded.used + iif(quotas.period = excluded.period, quotas.used, 0) \
             WHERE quotas.period < ?4",
        )
        .bind(key_id.as_bytes().as_slice())
        .bind(drawn.period.as_micros())
        .bind(i64::try_from(drawn.units).unwrap_or(i64::MAX))
        .bind(drawn.until.map_or(i64::MAX, Timestamp::as_micros))
        .execute(&mut *connection)
        .await?;
        let row = sqlx::query("SELECT key_id, period, used FROM quotas WHERE key_id = ?1")
            .bind(key_id.as_bytes().as_slice())
            .fetch_one(&mut *connection)
            .await?;
        rows.insert(*key_id, row);
    }
    Ok(rows.into_values().collect())
}
