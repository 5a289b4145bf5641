//! What people do with the database at hand, beside the servers that run on it or while none does: migrate it, copy it,
//! archive its log, have it start without the changes that it has lost.

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

/// Fails if the settings name an SQLite file that does not exist: a misspelt path is no new database.
///
/// # Errors
/// When there is no such file.
pub(crate) fn require_existing_database(settings: &ServerSettings) -> anyhow::Result<()> {
    match store::sqlite_file(&settings.database) {
        Some(path) if !path.exists() => {
            Err(OpenError::FileNotFound { path: path.display().to_string() }.into())
        }
        _ => Ok(()),
    }
}

/// Archives the entries of the log that were made before an instant to a new file. None = there are none.
///
/// # Errors
/// When the database does not open or fails, the file cannot be written, or a replica stands in the way.
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

/// Brings the schema up to date, or only says what that would do. Gives the steps.
///
/// # Errors
/// When the database does not open, or a newer version has migrated it.
pub(crate) async fn migrate(settings: &ServerSettings, dry_run: bool) -> anyhow::Result<Vec<MigrationStep>> {
    Ok(store::migrate(&settings.database, dry_run).await?)
}

/// Copies an SQLite database to a new file, also while a server owns it. Gives where the copy's log ends.
///
/// # Errors
/// When it cannot be copied, or the database is none of SQLite.
pub(crate) async fn backup(settings: &ServerSettings, to: &Path) -> anyhow::Result<LogHead> {
    Ok(store::backup(&settings.database, to).await?)
}

/// Has an SQLite database whose WAL is lost start again from what its file holds, and the log say so. Gives where the log
/// ended.
///
/// # Errors
/// When its WAL is not lost, or the database does not open or fails.
pub(crate) async fn accept_lost_wal(settings: &ServerSettings, clock: &dyn Clock) -> anyhow::Result<LogHead> {
    let store = store::open_without_wal(&settings.database).await?;
    let head = store.log_head().await?;
    // A file without an operator account was killed before it acknowledged anything.
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
