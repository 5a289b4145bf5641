//! What people do with the database at hand, beside the servers that run on it or while none does: migrate it, copy it,
//! archive its log.

use std::path::Path;

use crate::{
    audit::archive::{self, Archive},
    clock::Clock,
    config::server::Settings,
    domain::time::Timestamp,
    store::{self, Head, Step},
};

/// Archives the entries of the log that were made before an instant to a new file. None = there are none.
///
/// # Errors
/// When the database does not open or fails, the file cannot be written, or a replica stands in the way.
pub async fn archive(
    settings: &Settings,
    before: Timestamp,
    to: &Path,
    clock: &dyn Clock,
) -> anyhow::Result<Option<Archive>> {
    let store = store::open(&settings.database).await?;
    let oldest = archive::acknowledged_by_all(store.clone()).await;
    let archived = match oldest {
        Ok(oldest) => archive::archive(&*store, oldest, before, to, clock).await,
        Err(error) => Err(error),
    };
    store.close().await;
    Ok(archived?)
}

/// Brings the schema up to date, or only says what that would do. Gives the steps.
///
/// # Errors
/// When the database does not open, or a newer version has migrated it.
pub async fn migrate(settings: &Settings, dry_run: bool) -> anyhow::Result<Vec<Step>> {
    Ok(store::migrate(&settings.database, dry_run).await?)
}

/// Copies an SQLite database to a new file, also while a server owns it. Gives where the copy's log ends.
///
/// # Errors
/// When it cannot be copied, or the database is none of SQLite.
pub async fn backup(settings: &Settings, to: &Path) -> anyhow::Result<Head> {
    Ok(store::backup(&settings.database, to).await?)
}
