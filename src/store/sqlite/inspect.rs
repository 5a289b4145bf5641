//! Inspects a file that a server may own: read-only connections, no ownership, no migration.

use std::{fs::File, os::unix::fs::PermissionsExt as _, path::Path, sync::Arc};

use sqlx::{SqliteConnection, sqlite::SqlitePoolOptions};
use tokio::sync::watch::Sender;

use crate::store::{
    OpenError, Store, backend,
    inspection::{DatabaseInspection, DatabaseKind, SqliteFileInfo},
};

use super::{
    checks::{MAX_CHECKED_AT_OPEN, check_integrity},
    connect_options::{MAX_SQLX_READERS, read_only_options},
    connection::SqliteWriter,
    errors::open_error,
    file_owner::is_owned,
    migrate::migrations,
    open_mark::{self, WalState},
    page_readers::PageReaders,
    store::SqliteStore,
};

/// Inspects the file at `path`.
///
/// # Errors
/// If the file does not exist or cannot be read.
pub(in crate::store) async fn inspect(path: &str) -> Result<DatabaseInspection, OpenError> {
    let other = |error: std::io::Error| OpenError::Other { path: path.to_owned(), source: error.into() };
    let found = std::fs::metadata(path).map_err(other)?;
    let real = Path::new(path).canonicalize().map_err(other)?;
    let disk = rustix::fs::statvfs(&real).map_err(|error| other(error.into()))?;
    // Before SQLite opens the file: closing any descriptor releases the locks of the whole process on it.
    let owned = is_owned(&real);
    if open_mark::check_wal(path, &real, &File::open(&real).map_err(other)?)? == WalState::Missing {
        return Err(OpenError::WalMissing { path: path.to_owned() });
    }
    let options = read_only_options(&real);
    let readers =
        SqlitePoolOptions::new().max_connections(MAX_SQLX_READERS).connect_lazy_with(options.clone());
    let mut connection = readers.acquire().await.map_err(|error| open_error(path, error))?;
    let structure = if found.len() > MAX_CHECKED_AT_OPEN {
        None
    } else {
        Some(check_structure(path, &mut connection).await?)
    };
    let schema = newest_applied(&mut connection).await.map_err(|error| open_error(path, error))?;
    drop(connection);
    let info = SqliteFileInfo {
        mode: found.permissions().mode() & 0o777,
        size_bytes: found.len(),
        free_bytes: disk.f_bavail.saturating_mul(disk.f_frsize),
        is_owned: owned,
        integrity_check: structure,
    };
    let known = migrations().iter().map(|migration| migration.version).max().unwrap_or(0);
    let mut inspection = DatabaseInspection {
        display_name: path.to_owned(),
        schema_version: schema,
        newest_schema_version: known,
        kind: DatabaseKind::Sqlite(info),
        log_check: None,
        store: None,
    };
    if schema == Some(known) {
        let store = Arc::new(SqliteStore {
            writer: SqliteWriter::disabled(),
            page_readers: PageReaders::new(real),
            read_options: options,
            sqlx_readers: readers,
            check_pending: false.into(),
            lost: Sender::new(false),
            file_owner: None,
        });
        inspection.log_check = Some(match backend::verify_newest_log(&*store).await {
            Ok(()) => store.log_head().await,
            Err(error) => Err(error),
        });
        inspection.store = Some(store);
    }
    Ok(inspection)
}

/// The result of SQLite's check. A failure of the check itself is an error.
async fn check_structure(
    path: &str,
    connection: &mut SqliteConnection,
) -> Result<Result<(), String>, OpenError> {
    match check_integrity(path, connection).await {
        Ok(()) => Ok(Ok(())),
        Err(OpenError::Damaged { what, .. }) => Ok(Err(what)),
        Err(error) => Err(error),
    }
}

/// The newest migration that was applied to the file.
async fn newest_applied(connection: &mut SqliteConnection) -> Result<Option<i64>, sqlx::Error> {
    let table = "SELECT count(*) FROM sqlite_schema WHERE name = '_sqlx_migrations'";
    if sqlx::query_scalar::<_, i64>(table).fetch_one(&mut *connection).await? == 0 {
        return Ok(None);
    }
    sqlx::query_scalar("SELECT max(version) FROM _sqlx_migrations").fetch_one(connection).await
}
