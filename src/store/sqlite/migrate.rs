//! Migrates the schema of a file: which steps exist, which were applied, and running the missing ones.

use std::borrow::Cow;

use sqlx::{
    Connection as _, Row as _, SqlStr, SqliteConnection,
    migrate::{MigrateError, Migration, MigrationType, Migrator},
};

use crate::{
    domain::{log::GENESIS_HASH, text},
    store::{
        MigrationStep, OpenError, SchemaPolicy,
        schema::{CASE_COLLISIONS, check_account_ids},
    },
};

use super::errors::open_error;

/// The step that adds the column `name_nfc`.
const NAMES_VERSION: i64 = 9;

/// The migrations, oldest first. A released one never changes: the file has its checksum.
pub(super) fn migrations() -> Vec<Migration> {
    [
        (1, "start", SqlStr::from_static(include_str!("../migrations/sqlite/0001_start.sql"))),
        (2, "people", SqlStr::from_static(include_str!("../migrations/sqlite/0002_people.sql"))),
        (3, "replicas", SqlStr::from_static(include_str!("../migrations/sqlite/0003_replicas.sql"))),
        (4, "archive", SqlStr::from_static(include_str!("../migrations/sqlite/0004_archive.sql"))),
        (5, "plans", SqlStr::from_static(include_str!("../migrations/sqlite/0005_plans.sql"))),
        (6, "uses", SqlStr::from_static(include_str!("../migrations/sqlite/0006_uses.sql"))),
        (7, "owner", SqlStr::from_static(include_str!("../migrations/sqlite/0007_owner.sql"))),
        (8, "tallies", SqlStr::from_static(include_str!("../migrations/sqlite/0008_tallies.sql"))),
        (NAMES_VERSION, "names", SqlStr::from_static(include_str!("../migrations/sqlite/0009_names.sql"))),
        (10, "log_format", SqlStr::from_static(include_str!("../migrations/sqlite/0010_log_format.sql"))),
    ]
    .into_iter()
    .map(|(version, name, sql)| Migration::new(version, name.into(), MigrationType::Simple, sql, false))
    .collect()
}

/// The newest version that this program knows.
fn newest_known() -> i64 {
    migrations().iter().map(|migration| migration.version).max().unwrap_or(0)
}

/// All steps that exist.
pub(super) fn all_steps() -> Vec<MigrationStep> {
    let step = |migration: Migration| MigrationStep {
        version: migration.version,
        name: migration.description.into_owned(),
    };
    migrations().into_iter().map(step).collect()
}

/// The versions that were applied to a file.
async fn applied_versions(path: &str, connection: &mut SqliteConnection) -> Result<Vec<i64>, OpenError> {
    let failed = |error| open_error(path, error);
    let table = "SELECT 1 FROM sqlite_schema WHERE name = '_sqlx_migrations'";
    if sqlx::query(table).fetch_optional(&mut *connection).await.map_err(failed)?.is_none() {
        return Ok(Vec::new());
    }
    let rows =
        sqlx::query("SELECT version FROM _sqlx_migrations").fetch_all(connection).await.map_err(failed)?;
    rows.iter().map(|row| row.try_get(0).map_err(failed)).collect()
}

/// The steps that a file lacks.
pub(super) async fn pending_steps(
    path: &str,
    connection: &mut SqliteConnection,
) -> Result<Vec<MigrationStep>, OpenError> {
    let applied = applied_versions(path, connection).await?;
    if let Some(found) = applied.iter().copied().find(|version| *version > newest_known()) {
        return Err(OpenError::NewerSchema { path: path.to_owned(), found, known: newest_known() });
    }
    Ok(all_steps().into_iter().filter(|step| !applied.contains(&step.version)).collect())
}

/// Migrates a file, or fails if the schema must be current already.
pub(super) async fn run_migrations(
    path: &str,
    connection: &mut SqliteConnection,
    schema: SchemaPolicy,
) -> Result<(), OpenError> {
    let pending = pending_steps(path, connection).await?;
    if schema == SchemaPolicy::RequireCurrent && !pending.is_empty() {
        let found = applied_versions(path, connection).await?.into_iter().max().unwrap_or(0);
        return Err(OpenError::OlderSchema { path: path.to_owned(), found, known: newest_known() });
    }
    let failed = |error| open_error(path, error);
    // One transaction for all steps, so that no column exists without the values that fill it.
    let mut transaction = connection.begin().await.map_err(failed)?;
    if pending.iter().any(|step| step.version == NAMES_VERSION) {
        let ids = case_collisions(&mut transaction).await.map_err(failed)?;
        check_account_ids(path, &ids)?;
    }
    match Migrator::with_migrations(migrations()).run(&mut *transaction).await {
        Ok(()) => {}
        Err(MigrateError::VersionMissing(found)) => {
            return Err(OpenError::NewerSchema { path: path.to_owned(), found, known: newest_known() });
        }
        Err(MigrateError::VersionMismatch(version) | MigrateError::Dirty(version)) => {
            return Err(OpenError::Damaged {
                path: path.to_owned(),
                what: format!("migration {version} is not the one that this keyward knows"),
            });
        }
        Err(error) => {
            return Err(OpenError::Other { path: path.to_owned(), source: error.into() });
        }
    }
    if pending.iter().any(|step| step.version == NAMES_VERSION) {
        normalize_names(&mut transaction).await.map_err(failed)?;
    }
    sqlx::query("INSERT OR IGNORE INTO meta (one, store_id, epoch, head, head_hash) VALUES (1, randomblob(16), 1, 0, ?1)")
        .bind(GENESIS_HASH.as_slice())
        .execute(&mut *transaction)
        .await
        .map_err(failed)?;
    transaction.commit().await.map_err(failed)?;
    for MigrationStep { version, name } in pending {
        tracing::info!(version, name, database = path, "migrated");
    }
    Ok(())
}

/// The ids of accounts that differ only in case; none if there is no table of accounts yet.
async fn case_collisions(connection: &mut SqliteConnection) -> Result<Vec<String>, sqlx::Error> {
    let table = "SELECT 1 FROM sqlite_schema WHERE type = 'table' AND name = 'accounts'";
    if sqlx::query(table).fetch_optional(&mut *connection).await?.is_none() {
        return Ok(Vec::new());
    }
    sqlx::query_scalar(CASE_COLLISIONS).fetch_all(connection).await
}

/// Fills `name_nfc` for names that are not normalized.
async fn normalize_names(connection: &mut SqliteConnection) -> Result<(), sqlx::Error> {
    // ASCII is always normalized.
    let sql = "SELECT id, name FROM keys WHERE name GLOB '*[^ -~]*'";
    let rows = sqlx::query(sql).fetch_all(&mut *connection).await?;
    for row in rows {
        if let Cow::Owned(name) = text::normalize_nfc(row.try_get(1)?) {
            sqlx::query("UPDATE keys SET name_nfc = ?1 WHERE id = ?2")
                .bind(name)
                .bind(row.try_get::<Vec<u8>, _>(0)?)
                .execute(&mut *connection)
                .await?;
        }
    }
    Ok(())
}
