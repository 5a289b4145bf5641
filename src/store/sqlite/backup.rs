//! Copies a database file as of one instant, even while a server owns it.
//!
//! SQLite's `VACUUM INTO` on a separate connection does not block the writer. The copy is marked as closed
//! (`open_mark.rs`).

use std::{fs::File, io::ErrorKind, path::Path, time::Duration};

use sqlx::{Connection as _, SqliteConnection, sqlite::SqliteConnectOptions};

use crate::{
    private_file,
    store::{LogHead, OpenError, row_decoding::decode_head},
};

use super::{
    checks::check_integrity,
    errors::open_error,
    open_mark::{self, WalState},
};

/// Copies a file to a new one and checks the copy. Returns the end of its log.
pub(in crate::store) async fn backup(path: &str, to: &Path) -> Result<LogHead, OpenError> {
    let shown = to.display().to_string();
    let other = |error: std::io::Error| OpenError::Other { path: shown.clone(), source: error.into() };
    // Created first, readable by its owner only: it will contain digests and names. SQLite accepts an empty file.
    let file = private_file::create_new(to).map_err(|error| match error.kind() {
        ErrorKind::AlreadyExists => OpenError::BackupExists { path: shown.clone() },
        _ => other(error),
    })?;
    let copied = vacuum_into(path, &shown).await;
    if let Err(error) = copied {
        // An incomplete copy must not look like a backup.
        let _ = std::fs::remove_file(to);
        return Err(error);
    }
    private_file::sync_to_disk(&file, to).map_err(other)?;
    let reading = SqliteConnectOptions::new().filename(to).read_only(true);
    let mut copy =
        SqliteConnection::connect_with(&reading).await.map_err(|error| open_error(&shown, error))?;
    check_integrity(&shown, &mut copy).await?;
    let head = sqlx::query("SELECT head, head_hash FROM meta").fetch_one(&mut copy).await;
    let head = head.map_err(|error| open_error(&shown, error))?;
    let _ = copy.close().await;
    decode_head(&head).map_err(|error| OpenError::Other { path: shown, source: error.into() })
}

/// Marks a copy as closed: it is complete and has no WAL.
async fn mark_closed(copy: &str) -> Result<(), sqlx::Error> {
    let mut connection = SqliteConnection::connect_with(&SqliteConnectOptions::new().filename(copy)).await?;
    sqlx::query("PRAGMA user_version = 0").execute(&mut connection).await?;
    connection.close().await
}

async fn vacuum_into(path: &str, to: &str) -> Result<(), OpenError> {
    let failed = |error| open_error(path, error);
    let other = |error: std::io::Error| OpenError::Other { path: path.to_owned(), source: error.into() };
    let real = Path::new(path).canonicalize().map_err(|error| match error.kind() {
        ErrorKind::NotFound => OpenError::FileNotFound { path: path.to_owned() },
        _ => other(error),
    })?;
    if open_mark::check_wal(path, &real, &File::open(&real).map_err(other)?)? == WalState::Missing {
        return Err(OpenError::WalMissing { path: path.to_owned() });
    }
    // Closing a writable connection would remove the WAL of a server that was killed.
    let reading = SqliteConnectOptions::new().filename(&real).read_only(true);
    let reading = reading.busy_timeout(Duration::from_secs(5));
    let mut connection = SqliteConnection::connect_with(&reading).await.map_err(failed)?;
    let copied = sqlx::query("VACUUM INTO ?1").bind(to).execute(&mut connection).await;
    let _ = connection.close().await;
    copied.map_err(failed)?;
    mark_closed(to).await.map_err(|error| open_error(to, error))
}
