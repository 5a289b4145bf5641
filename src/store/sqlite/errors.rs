//! Classifies SQLite's errors from sqlx: damage, a full disk, or a failure that may pass.

use crate::store::{OpenError, StoreError, row_format::damaged_error};

/// The primary result code, without the extended part.
fn primary_code(error: &sqlx::Error) -> Option<u32> {
    let code = error.as_database_error()?.code()?.parse::<u32>().ok()?;
    Some(code & 0xff)
}
const SQLITE_CORRUPT: u32 = 11;
const SQLITE_FULL: u32 = 13;
const SQLITE_NOTADB: u32 = 26;

pub(super) fn store_error(error: sqlx::Error) -> StoreError {
    match primary_code(&error) {
        Some(SQLITE_FULL) => StoreError::Full(error.into()),
        Some(SQLITE_CORRUPT | SQLITE_NOTADB) => damaged_error("the database file", error),
        _ => StoreError::Unavailable(error.into()),
    }
}

pub(super) fn open_error(path: &str, error: sqlx::Error) -> OpenError {
    match primary_code(&error) {
        Some(SQLITE_CORRUPT | SQLITE_NOTADB) => {
            OpenError::Damaged { path: path.to_owned(), what: error.to_string() }
        }
        _ => OpenError::Other { path: path.to_owned(), source: error.into() },
    }
}

pub(super) fn store_open_error(path: &str, error: StoreError) -> OpenError {
    match error {
        StoreError::Damaged(what) => OpenError::Damaged { path: path.to_owned(), what },
        error => OpenError::Other { path: path.to_owned(), source: error.into() },
    }
}
