//! Maintenance of the database: migration, backup, archiving the log, accepting a lost WAL.
//!
//! Commands run these functions with direct access to the database, while servers run on it or none does.

use std::path::Path;

use crate::{
    audit::{
        archive::{self, ArchiveSummary},
        maintenance_entry,
    },
    clock::Clock,
    config::server::ServerSettings,
    domain::{log::AuditAction, log_payload::ChangeOrigin, time::Timestamp},
    store::{self, LogHead, MigrationStep, OpenError},
};

/// Checks that the settings name no missing SQLite file: a mistyped path must not create a database.
pub(crate) fn require_existing_database(settings: &ServerSettings) -> anyhow::Result<()> {
    match store::sqlite_file(&settings.database) {
        Some(path) if !path.exists() => {
            Err(OpenError::FileNotFound { path: path.display().to_string() }.into())
        }
        _ => Ok(()),
    }
}

/// Archives the log entries that were made before an instant to a new file. Returns `None` if there are none.
///
/// Fails if the database does not open or fails, the file cannot be written, or a replica needs the entries.
pub(crate) async fn archive_log(
    settings: &ServerSettings,
    before: Timestamp,
    to: &Path,
    clock: &dyn Clock,
) -> anyhow::Result<Option<ArchiveSummary>> {
    let store = store::open_existing(&settings.database).await?;
    let oldest = archive::min_acknowledged_revision(store.clone()).await;
    let archived = match oldest {
        Ok(oldest) => archive::archive_log(&*store, oldest, before, to, clock).await,
        Err(error) => Err(error),
    };
    store.close().await;
    Ok(archived?)
}

/// Migrates the schema, or only lists the steps if `dry_run`. Returns the steps.
///
/// Fails if the database does not open, or a newer version has migrated it.
pub(crate) async fn migrate(settings: &ServerSettings, dry_run: bool) -> anyhow::Result<Vec<MigrationStep>> {
    Ok(store::migrate(&settings.database, dry_run).await?)
}

/// Copies an SQLite database to a new file, even while a server owns it. Returns the head of the copy's log.
///
/// Fails if the database cannot be copied or is not SQLite.
pub(crate) async fn backup(settings: &ServerSettings, to: &Path) -> anyhow::Result<LogHead> {
    Ok(store::backup(&settings.database, to).await?)
}

/// Opens an SQLite database whose WAL is lost with the contents of its file, and records that in the log. Returns the
/// head of the log before that entry.
///
/// Fails if the WAL is not lost, or the database does not open or fails.
pub(crate) async fn accept_lost_wal(settings: &ServerSettings, clock: &dyn Clock) -> anyhow::Result<LogHead> {
    let store = store::open_without_wal(&settings.database).await?;
    let head = store.log_head().await?;
    // A file without an operator account acknowledged nothing before its server was killed.
    maintenance_entry::append_entry::<anyhow::Error>(
        &*store,
        AuditAction::DatabaseLossAccepted,
        ChangeOrigin::UNKNOWN,
        "keyward accept-lost-wal",
        clock,
    )
    .await?;
    store.close().await;
    Ok(head)
}
