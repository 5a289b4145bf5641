//! Checks of the SQLite library and of the structure of a database file.

use sqlx::{Connection as _, SqliteConnection, sqlite::SqliteConnectOptions};
use tokio::sync::watch::Sender;

use crate::store::OpenError;

use super::errors::open_error;

/// The first SQLite without the WAL-reset corruption.
const MIN_SQLITE_VERSION: (u32, u32, u32) = (3, 51, 3);

/// A file of up to so many bytes is checked before it is used. Of a larger one that would hold up the start for
/// seconds by the gigabyte: its check begins when the keys are loaded, each of which has a checksum of its own.
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

/// The file's structure: SQLite's own check, with every index held against its table. The quick one leaves the
/// indices out, and a List or a name would be looked up in one that has lost entries.
pub(super) async fn check_integrity(path: &str, connection: &mut SqliteConnection) -> Result<(), OpenError> {
    let found: String = sqlx::query_scalar("PRAGMA integrity_check(1)")
        .fetch_one(connection)
        .await
        .map_err(|error| open_error(path, error))?;
    if found == "ok" { Ok(()) } else { Err(OpenError::Damaged { path: path.to_owned(), what: found }) }
}

/// Checks a file that is in use, on a connection of its own.
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
        Ok(()) => tracing::info!(path, "the whole database file was checked"),
        Err(OpenError::Damaged { path, what }) => {
            let said = OpenError::Damaged { path, what };
            tracing::error!(error = &said as &dyn std::error::Error, "the database file is damaged");
            lost.send_replace(true);
        }
        Err(error) => {
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                "the database file could not be checked"
            );
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
