//! Inspects a database that servers may be using, read-only: nothing is migrated, owned or changed.
//!
//! `doctor` judges what is found.

use super::{error::OpenError, postgres, sqlite};

pub use super::inspection::{DatabaseInspection, DatabaseKind, PostgresServerInfo, SqliteFileInfo};

/// Inspects the database that `url` names.
///
/// # Errors
/// If the database cannot be reached, or the URL names none.
pub async fn inspect(url: &str) -> Result<DatabaseInspection, OpenError> {
    match url.split_once(':') {
        Some(("sqlite", path)) => sqlite::inspect(path.strip_prefix("//").unwrap_or(path)).await,
        _ => postgres::inspect(url).await,
    }
}
