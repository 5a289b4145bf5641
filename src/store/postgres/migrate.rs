//! Migrates the schema of a PostgreSQL database.
//!
//! sqlx's migrator keeps a lock and named statements in its session, which pgbouncer does not support. So everything is
//! one transaction: the lock, the checks, the missing steps and their records.

use sha2::{Digest as _, Sha256};
use sqlx::{AssertSqlSafe, PgConnection, PgPool};
use std::{sync::Arc, time::Duration};

use crate::{
    domain::log::GENESIS_HASH,
    store::{
        MigrationStep, OpenError, SchemaPolicy,
        row_decoding::RowColumns as _,
        schema::{CASE_COLLISIONS, check_account_ids},
    },
};

use super::{
    errors::{PgResult, as_server_error, open_error},
    server_identity::UNKNOWN_SERVER,
    target::PgTarget,
    timeouts::with_timeout,
    transaction::{begin_transaction, unnamed_query},
};

/// The step after which account ids must not differ only in case.
const NAMES: i64 = 9;
/// The time limit of all missing steps together.
const MIGRATION_TIMEOUT: Duration = Duration::from_secs(600);
const INSUFFICIENT_PRIVILEGE: &str = "42501";

struct PgMigration {
    version: i64,
    name: &'static str,
    sql: &'static str,
}

/// The migrations, oldest first, with the numbers and names of SQLite's. A released one never changes: the database has
/// its checksum.
const MIGRATIONS: [PgMigration; 10] = [
    PgMigration { version: 1, name: "start", sql: include_str!("../migrations/postgres/0001_start.sql") },
    PgMigration { version: 2, name: "people", sql: include_str!("../migrations/postgres/0002_people.sql") },
    PgMigration {
        version: 3,
        name: "replicas",
        sql: include_str!("../migrations/postgres/0003_replicas.sql"),
    },
    PgMigration { version: 4, name: "archive", sql: include_str!("../migrations/postgres/0004_archive.sql") },
    PgMigration { version: 5, name: "plans", sql: include_str!("../migrations/postgres/0005_plans.sql") },
    PgMigration { version: 6, name: "uses", sql: include_str!("../migrations/postgres/0006_uses.sql") },
    PgMigration { version: 7, name: "owner", sql: include_str!("../migrations/postgres/0007_owner.sql") },
    PgMigration { version: 8, name: "tallies", sql: include_str!("../migrations/postgres/0008_tallies.sql") },
    PgMigration { version: 9, name: "names", sql: include_str!("../migrations/postgres/0009_names.sql") },
    PgMigration {
        version: 10,
        name: "log_format",
        sql: include_str!("../migrations/postgres/0010_log_format.sql"),
    },
];

/// What to do about missing steps.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum PendingAction {
    /// Run them, and commit.
    Apply,
    /// Return them, and change nothing.
    Report,
    /// Fail, if there are any.
    Refuse,
}

impl From<SchemaPolicy> for PendingAction {
    fn from(schema: SchemaPolicy) -> Self {
        match schema {
            SchemaPolicy::Migrate => PendingAction::Apply,
            SchemaPolicy::RequireCurrent => PendingAction::Refuse,
        }
    }
}

/// Migrates the schema, or does what else `action` requests. Returns the missing steps.
pub(super) async fn run_migrations(
    target: &PgTarget,
    pool: &PgPool,
    action: PendingAction,
) -> Result<Vec<MigrationStep>, OpenError> {
    let failed = |error: sqlx::Error| match as_server_error(&error) {
        Some(error) if error.code() == INSUFFICIENT_PRIVILEGE => OpenError::Unsuitable {
            database: target.display_name.clone(),
            what: format!("its role lacks a privilege that a start needs ({})", error.message()),
            fix: "Let a superuser create the schema for it: CREATE SCHEMA … AUTHORIZATION … (see README)",
        },
        _ => open_error(target, error),
    };
    let begin: Arc<str> = Arc::from(format!(
        "BEGIN READ WRITE; SET LOCAL search_path TO \"{}\"; SET LOCAL statement_timeout TO {}; \
         SET LOCAL synchronous_commit TO on",
        target.schema,
        MIGRATION_TIMEOUT.as_millis()
    ));
    let (mut session, _) = begin_transaction(pool, &begin).await.map_err(failed)?;
    let migrated = async {
        let steps = match migrate_in_transaction(target, session.connection(), action).await? {
            Ok(steps) => steps,
            Err(refused) => return Ok(Err(refused)),
        };
        session.finish(if action == PendingAction::Report { "ROLLBACK" } else { "COMMIT" }).await?;
        Ok(Ok(steps))
    };
    with_timeout(MIGRATION_TIMEOUT, migrated).await.map_err(failed)?
}

async fn migrate_in_transaction(
    target: &PgTarget,
    connection: &mut PgConnection,
    action: PendingAction,
) -> PgResult<Result<Vec<MigrationStep>, OpenError>> {
    unnamed_query("SELECT pg_advisory_xact_lock($1)")
        .bind(target.advisory_lock_key("migrate"))
        .execute(&mut *connection)
        .await?;
    create_schema(target, connection).await?;
    let applied = applied_migrations(connection).await?;
    if let Err(refused) = check_known(target, &applied) {
        return Ok(Err(refused));
    }
    let is_pending = |one: &&PgMigration| !applied.iter().any(|(done, _)| *done == one.version);
    let pending: Vec<_> = MIGRATIONS.iter().filter(is_pending).collect();
    let steps =
        pending.iter().map(|one| MigrationStep { version: one.version, name: one.name.to_owned() }).collect();
    if action == PendingAction::Report {
        return Ok(Ok(steps));
    }
    if action == PendingAction::Refuse && !pending.is_empty() {
        let (path, found) = (target.display_name.clone(), applied.iter().map(|(version, _)| *version).max());
        return Ok(Err(OpenError::OlderSchema { path, found: found.unwrap_or(0), known: newest_known() }));
    }
    if pending.iter().any(|one| one.version == NAMES)
        && let Err(refused) = check_account_ids(&target.display_name, &case_collisions(connection).await?)
    {
        return Ok(Err(refused));
    }
    for PgMigration { version, name, sql } in pending {
        sqlx::raw_sql(*sql).execute(&mut *connection).await?;
        unnamed_query("INSERT INTO migrations (version, name, checksum) VALUES ($1, $2, $3)")
            .bind(*version)
            .bind(*name)
            .bind(Sha256::digest(sql).to_vec())
            .execute(&mut *connection)
            .await?;
        tracing::info!(version, name, database = target.display_name, "migrated");
    }
    unnamed_query(
        "INSERT INTO meta VALUES (1, uuid_send(gen_random_uuid()), 1, 0, $1, 0) ON CONFLICT DO NOTHING",
    )
    .bind(GENESIS_HASH.to_vec())
    .execute(&mut *connection)
    .await?;
    settle_first_incarnation(connection).await?;
    Ok(Ok(steps))
}

/// The ids of accounts that differ only in case; none if there is no table of accounts yet.
async fn case_collisions(connection: &mut PgConnection) -> PgResult<Vec<String>> {
    let found = unnamed_query("SELECT to_regclass('accounts')::text").fetch_one(&mut *connection).await?;
    if found.text_opt(0)?.is_none() {
        return Ok(Vec::new());
    }
    let rows = unnamed_query(CASE_COLLISIONS).fetch_all(connection).await?;
    rows.iter().map(|row| Ok(row.text(0)?.to_owned())).collect()
}

/// Creates the schema, unless it exists: a role may own one without the right to create one.
async fn create_schema(target: &PgTarget, connection: &mut PgConnection) -> PgResult<()> {
    let found = unnamed_query("SELECT 1 FROM pg_namespace WHERE nspname = $1")
        .bind(target.schema.clone())
        .fetch_optional(&mut *connection)
        .await?;
    if found.is_none() {
        let sql = format!("CREATE SCHEMA \"{}\"", target.schema);
        sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut *connection).await?;
    }
    Ok(())
}

/// The applied migrations with their checksums.
async fn applied_migrations(connection: &mut PgConnection) -> PgResult<Vec<(i64, Vec<u8>)>> {
    let found = unnamed_query("SELECT to_regclass('migrations')::text").fetch_one(&mut *connection).await?;
    if found.text_opt(0)?.is_none() {
        let sql = "CREATE TABLE migrations (version BIGINT PRIMARY KEY, name TEXT NOT NULL, \
                   checksum BYTEA NOT NULL)";
        sqlx::raw_sql(sql).execute(connection).await?;
        return Ok(Vec::new());
    }
    let rows = unnamed_query("SELECT version, checksum FROM migrations").fetch_all(connection).await?;
    rows.iter().map(|row| Ok((row.int(0)?, row.bytes(1)?.to_vec()))).collect()
}

/// The newest migration that was applied to the schema, if any. Creates nothing.
pub(super) async fn newest_applied(
    target: &PgTarget,
    connection: &mut PgConnection,
) -> PgResult<Option<i64>> {
    let begin = format!("BEGIN READ ONLY; SET LOCAL search_path TO \"{}\"", target.schema);
    sqlx::raw_sql(AssertSqlSafe(begin)).execute(&mut *connection).await?;
    let found = unnamed_query("SELECT to_regclass('migrations')::text").fetch_one(&mut *connection).await?;
    let newest = match found.text_opt(0)? {
        None => None,
        Some(_) => unnamed_query("SELECT max(version) FROM migrations")
            .fetch_one(&mut *connection)
            .await?
            .int_opt(0)?,
    };
    sqlx::raw_sql("COMMIT").execute(connection).await?;
    Ok(newest)
}

/// The newest migration that this program knows.
pub(super) fn newest_known() -> i64 {
    MIGRATIONS.iter().map(|migration| migration.version).max().unwrap_or(0)
}

/// Checks that this program knows every applied migration.
fn check_known(target: &PgTarget, applied: &[(i64, Vec<u8>)]) -> Result<(), OpenError> {
    let newest = newest_known();
    for (version, checksum) in applied {
        match MIGRATIONS.iter().find(|migration| migration.version == *version) {
            None => {
                let (path, found) = (target.display_name.clone(), *version);
                return Err(OpenError::NewerSchema { path, found, known: newest });
            }
            Some(known) if Sha256::digest(known.sql).as_slice() != checksum.as_slice() => {
                return Err(OpenError::Damaged {
                    path: target.display_name.clone(),
                    what: format!("migration {version} is not the one that this keyward knows"),
                });
            }
            Some(_) => {}
        }
    }
    Ok(())
}

/// Settles the first incarnation of a new database: no lease was held in an earlier one.
async fn settle_first_incarnation(connection: &mut PgConnection) -> PgResult<()> {
    let sql = format!("UPDATE meta m SET settled = life({UNKNOWN_SERVER}, m.epoch) WHERE m.settled = ''");
    sqlx::raw_sql(AssertSqlSafe(sql)).execute(connection).await.map(drop)
}
