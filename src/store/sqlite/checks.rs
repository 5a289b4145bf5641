//! Checks of the SQLite library and of the structure of a database file.

use sqlx::{Connection as _, SqliteConnection, sqlite::SqliteConnectOptions};
use tokio::sync::watch::Sender;

use crate::store::OpenError;

use super::errors::open_error;

/// The first SQLite without the WAL-reset corruption.
const MIN_SQLITE_VERSION: (u32, u32, u32) = (3, 51, 3);

/// The size up to which a file is checked before it is used. The check of a larger file would delay the start by
/// seconds per gigabyte. It begins when the keys are loaded, each of which has a checksum.
pub(super) const MAX_CHECKED_AT_OPEN: u64 = 64 << 20;

pub(super) async fn check_sqlite_version(connection: &mut SqliteConnection) -> Result<(), OpenError> {
    let found: String = sqlx::query_scalar("SELECT sqlite_version()")
        .fetch_one(connection)
        .await
        .map_err(|error| open_error("SQLite", error))?;
    if is_version_at_least(&found, MIN_SQLITE_VERSION) {
        Ok(())
    } else {
        Err(OpenError::SqliteTooOld { found })
    }
}

fn is_version_at_least(found: &str, least: (u32, u32, u32)) -> bool {
    let mut parts = found.split('.').map(|part| part.parse::<u32>().unwrap_or(0));
    let mut next = || parts.next().unwrap_or(0);
    (next(), next(), next()) >= least
}

/// Checks the structure of the file with SQLite's `integrity_check`, which compares every index with its table.
/// `quick_check` skips the indices, but lists and names are looked up in them.
pub(super) async fn check_integrity(path: &str, connection: &mut SqliteConnection) -> Result<(), OpenError> {
    let found: String = sqlx::query_scalar("PRAGMA integrity_check(1)")
        .fetch_one(connection)
        .await
        .map_err(|error| open_error(path, error))?;
    if found == "ok" { Ok(()) } else { Err(OpenError::Damaged { path: path.to_owned(), what: found }) }
}

/// Checks a file that is in use, on a separate connection.
pub(super) async fn check_in_background(options: SqliteConnectOptions, lost: Sender<bool>) {
    let path = options.get_filename().display().to_string();
    let check = async {
        let connection = SqliteConnection::connect_with(&options).await;
        let mut connection = connection.map_err(|error| open_error(&path, error))?;
        let checked = check_integrity(&path, &mut connection).await;
        let _ = connection.close().await;
        checked
    };
    match check.await {
        Ok(()) => tracing::info!(path, "database file checked"),
        Err(OpenError::Damaged { path, what }) => {
            let error = OpenError::Damaged { path, what };
            tracing::error!(error = &error as &dyn std::error::Error, "database file damaged");
            lost.send_replace(true);
        }
        Err(error) => {
            tracing::warn!(error = &error as &dyn std::error::Error, "database file check failed");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_sqlite_without_the_wal_reset_corruption_is_accepted() {
        for (version, good) in [
            ("3.51.3", true),
            ("3.52.0", true),
            ("4.0", true),
            ("3.51.2", false),
            ("3.6.20", false),
            ("x", false),
        ] {
            assert_eq!(is_version_at_least(version, MIN_SQLITE_VERSION), good, "{version}");
        }
    }
}
