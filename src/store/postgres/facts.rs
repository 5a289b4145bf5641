//! What the tables say of everything that a run of writes touches: a query for each kind of record, and none for
//! what the run does not touch. The caller holds the lock on `meta`, so that nothing of it changes before the run
//! is written.

use sqlx::{PgConnection, postgres::PgRow};

use crate::{
    domain::{
        key::Owner,
        name::{AccountId, IdempotencyKey, KeyId, KeyName, NameError, RoleName, UserId},
        time::Timestamp,
        token::Digest,
    },
    store::{
        plan::{Facts, Questions, Request, RolePlace},
        records::{Columns, bytes_at, secret_at},
        rows::{revision_from_i64, role_account},
    },
};

use super::{Query, query};

type Result<T> = std::result::Result<T, sqlx::Error>;

/// Asks what is to be known.
pub(super) async fn gather(connection: &mut PgConnection, asked: &Questions) -> Result<Facts> {
    let mut facts = Facts::default();
    requests(connection, asked, &mut facts).await?;
    keys(connection, asked, &mut facts).await?;
    names(connection, asked, &mut facts).await?;
    digests(connection, asked, &mut facts).await?;
    left(connection, asked, &mut facts).await?;
    accounts(connection, asked, &mut facts).await?;
    roles(connection, asked, &mut facts).await?;
    members(connection, asked, &mut facts).await?;
    if let Some(place) = &asked.uses_of {
        facts.uses = uses(connection, place).await?;
    }
    Ok(facts)
}

async fn each(
    connection: &mut PgConnection,
    query: Query<'_>,
    mut take: impl FnMut(&PgRow) -> Result<()>,
) -> Result<()> {
    query.fetch_all(connection).await?.iter().try_for_each(&mut take)
}

/// A column that holds a name.
fn name_at<T>(
    row: &PgRow,
    column: usize,
    parse: impl Fn(&str) -> std::result::Result<T, NameError>,
) -> Result<T> {
    parse(row.text(column)?).map_err(|error| sqlx::Error::Decode(Box::new(error)))
}

fn id_at(row: &PgRow, column: usize) -> Result<KeyId> {
    Ok(KeyId::from_bytes(bytes_at(row, column)?))
}

fn version_at(row: &PgRow, column: usize) -> Result<u32> {
    u32::try_from(row.int(column)?).map_err(|error| sqlx::Error::Decode(Box::new(error)))
}

/// One column of what is asked.
fn column<I: IntoIterator, T>(asked: I, of: impl Fn(I::Item) -> T) -> Vec<T> {
    asked.into_iter().map(of).collect()
}

async fn requests(connection: &mut PgConnection, asked: &Questions, facts: &mut Facts) -> Result<()> {
    if asked.requests.is_empty() {
        return Ok(());
    }
    let query = query(
        "SELECT caller, key, key_id, fingerprint, created_at FROM idempotency \
         JOIN unnest($1::bytea[], $2::text[]) AS asked (caller, key) USING (caller, key)",
    )
    .bind(column(&asked.requests, |(caller, _)| caller.as_bytes().to_vec()))
    .bind(column(&asked.requests, |(_, key)| key.to_string()));
    each(connection, query, |row| {
        let request = Request {
            key_id: id_at(row, 2)?,
            fingerprint: bytes_at(row, 3)?,
            created_at: Timestamp::from_micros(row.int(4)?),
        };
        facts.requests.insert((id_at(row, 0)?, name_at(row, 1, IdempotencyKey::parse)?), request);
        Ok(())
    })
    .await
}

async fn keys(connection: &mut PgConnection, asked: &Questions, facts: &mut Facts) -> Result<()> {
    if asked.keys.is_empty() {
        return Ok(());
    }
    let query = query("SELECT id, revision FROM keys WHERE id = ANY ($1)")
        .bind(column(&asked.keys, |id| id.as_bytes().to_vec()));
    each(connection, query, |row| {
        facts.keys.insert(id_at(row, 0)?, revision_from_i64(row.int(1)?));
        Ok(())
    })
    .await
}

async fn names(connection: &mut PgConnection, asked: &Questions, facts: &mut Facts) -> Result<()> {
    if asked.names.is_empty() {
        return Ok(());
    }
    let of_accounts = || asked.names.iter().filter_map(|(owner, name)| Some((owner.account()?, name)));
    let of_users = || asked.names.iter().filter_map(|(owner, name)| Some((owner.user()?, name)));
    let query = query(
        "SELECT account, NULL, name, id FROM keys \
         JOIN unnest($1::text[], $2::text[]) AS asked (account, name) USING (account, name) \
         WHERE revoked_at IS NULL \
         UNION ALL SELECT NULL, user_id, name, id FROM keys \
         JOIN unnest($3::text[], $4::text[]) AS asked (user_id, name) USING (user_id, name) \
         WHERE revoked_at IS NULL",
    )
    .bind(column(of_accounts(), |(account, _)| account.to_string()))
    .bind(column(of_accounts(), |(_, name)| name.to_string()))
    .bind(column(of_users(), |(user, _)| user.to_string()))
    .bind(column(of_users(), |(_, name)| name.to_string()));
    each(connection, query, |row| {
        let owner = match row.text_opt(0)? {
            Some(_) => Owner::Account(name_at(row, 0, AccountId::parse)?),
            None => Owner::User(name_at(row, 1, UserId::parse)?),
        };
        facts.names.insert((owner, name_at(row, 2, KeyName::parse)?), id_at(row, 3)?);
        Ok(())
    })
    .await
}

async fn digests(connection: &mut PgConnection, asked: &Questions, facts: &mut Facts) -> Result<()> {
    if asked.digests.is_empty() {
        return Ok(());
    }
    let query = query("SELECT digest, key_id, version FROM secrets WHERE digest = ANY ($1)")
        .bind(column(&asked.digests, |digest| digest.as_bytes().to_vec()));
    each(connection, query, |row| {
        let holder = (id_at(row, 1)?, version_at(row, 2)?);
        facts.digests.insert(Digest::from_bytes(bytes_at(row, 0)?), holder);
        Ok(())
    })
    .await
}

async fn left(connection: &mut PgConnection, asked: &Questions, facts: &mut Facts) -> Result<()> {
    if asked.left.is_empty() {
        return Ok(());
    }
    let query = query(
        "SELECT digest, version, hint, created_at, expires_at, sum, key_id FROM secrets \
         JOIN unnest($1::bytea[], $2::bigint[]) AS asked (key_id, version) USING (key_id, version)",
    )
    .bind(column(&asked.left, |(id, _)| id.as_bytes().to_vec()))
    .bind(column(&asked.left, |(_, version)| i64::from(*version)));
    each(connection, query, |row| {
        let id = id_at(row, 6)?;
        let secret =
            secret_at(row, id.as_bytes(), 0).map_err(|error| sqlx::Error::Decode(Box::new(error)))?;
        facts.left.insert(id, secret);
        Ok(())
    })
    .await
}

async fn accounts(connection: &mut PgConnection, asked: &Questions, facts: &mut Facts) -> Result<()> {
    if asked.accounts.is_empty() {
        return Ok(());
    }
    let query = query("SELECT id, revision FROM accounts WHERE id = ANY ($1)")
        .bind(column(&asked.accounts, ToString::to_string));
    each(connection, query, |row| {
        facts.accounts.insert(name_at(row, 0, AccountId::parse)?, revision_from_i64(row.int(1)?));
        Ok(())
    })
    .await
}

async fn roles(connection: &mut PgConnection, asked: &Questions, facts: &mut Facts) -> Result<()> {
    if asked.roles.is_empty() {
        return Ok(());
    }
    let query = query(
        "SELECT account, name, revision FROM roles \
         JOIN unnest($1::text[], $2::text[]) AS asked (account, name) USING (account, name)",
    )
    .bind(column(&asked.roles, |(account, _)| role_account(account.as_ref()).to_owned()))
    .bind(column(&asked.roles, |(_, name)| name.to_string()));
    each(connection, query, |row| {
        let account = if row.text(0)?.is_empty() { None } else { Some(name_at(row, 0, AccountId::parse)?) };
        let place: RolePlace = (account, name_at(row, 1, RoleName::parse)?);
        facts.roles.insert(place, revision_from_i64(row.int(2)?));
        Ok(())
    })
    .await
}

async fn members(connection: &mut PgConnection, asked: &Questions, facts: &mut Facts) -> Result<()> {
    if asked.members.is_empty() {
        return Ok(());
    }
    let query = query(
        "SELECT account, user_id, revision FROM members \
         JOIN unnest($1::text[], $2::text[]) AS asked (account, user_id) USING (account, user_id)",
    )
    .bind(column(&asked.members, |(account, _)| account.to_string()))
    .bind(column(&asked.members, |(_, user)| user.to_string()));
    each(connection, query, |row| {
        let place = (name_at(row, 0, AccountId::parse)?, name_at(row, 1, UserId::parse)?);
        facts.members.insert(place, revision_from_i64(row.int(2)?));
        Ok(())
    })
    .await
}

/// How many keys and members use a role. Of a global one, accounts with an own role of that name do not count.
async fn uses(connection: &mut PgConnection, (account, name): &RolePlace) -> Result<(u64, u64)> {
    let row = query(
        "SELECT \
         (SELECT count(*) FROM keys WHERE revoked_at IS NULL \
          AND strpos(' ' || roles || ' ', ' ' || $1 || ' ') > 0 AND (account = $2 OR ($2 = '' AND NOT EXISTS \
          (SELECT 1 FROM roles own WHERE own.account = keys.account AND own.name = $1)))), \
         (SELECT count(*) FROM members WHERE role = $1 AND (account = $2 OR ($2 = '' AND NOT EXISTS \
          (SELECT 1 FROM roles own WHERE own.account = members.account AND own.name = $1))))",
    )
    .bind(name.to_string())
    .bind(role_account(account.as_ref()).to_owned())
    .fetch_one(connection)
    .await?;
    let number = |count: i64| u64::try_from(count).unwrap_or(0);
    Ok((number(row.int(0)?), number(row.int(1)?)))
}
