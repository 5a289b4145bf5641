//! Looking at a file that a server may have: read-only connections, no ownership, no migration.

use std::{fs::File, os::unix::fs::PermissionsExt as _, path::Path, sync::Arc};

use sqlx::{SqliteConnection, sqlite::SqlitePoolOptions};
use tokio::sync::watch::Sender;

use crate::store::{
    OpenError, Store, backend,
    look::{FileFacts, Kind, Seen},
};

use super::{
    CHECKED_FIRST, READERS, Sqlite, check_whole,
    connection::Writer,
    mark::{self, WalState},
    migrate::migrations,
    open_error,
    owner::is_owned,
    pages::Readers,
    reading,
};

/// Looks at the file at `path`.
///
/// # Errors
/// When there is none, or it cannot be read.
pub(in crate::store) async fn look(path: &str) -> Result<Seen, OpenError> {
    let other = |error: std::io::Error| OpenError::Other { path: path.to_owned(), source: error.into() };
    let found = std::fs::metadata(path).map_err(other)?;
    let real = Path::new(path).canonicalize().map_err(other)?;
    let disk = rustix::fs::statvfs(&real).map_err(|error| other(error.into()))?;
    // Before SQLite opens the file: whoever closes it gives up the locks of the whole process on it.
    let owned = is_owned(&real);
    if mark::look(path, &real, &File::open(&real).map_err(other)?)? == WalState::Lost {
        return Err(OpenError::WithoutWal { path: path.to_owned() });
    }
    let options = reading(&real);
    let readers = SqlitePoolOptions::new().max_connections(READERS).connect_lazy_with(options.clone());
    let mut connection = readers.acquire().await.map_err(|error| open_error(path, error))?;
    let structure =
        if found.len() > CHECKED_FIRST { None } else { Some(structure(path, &mut connection).await?) };
    let schema = newest(&mut connection).await.map_err(|error| open_error(path, error))?;
    drop(connection);
    let facts = FileFacts {
        mode: found.permissions().mode() & 0o777,
        bytes: found.len(),
        free: disk.f_bavail.saturating_mul(disk.f_frsize),
        owned,
        structure,
    };
    let known = migrations().iter().map(|migration| migration.version).max().unwrap_or(0);
    let mut seen =
        Seen { shown: path.to_owned(), schema, known, kind: Kind::Sqlite(facts), log: None, store: None };
    if schema == Some(known) {
        let store = Arc::new(Sqlite {
            writer: Writer::none(),
            pages: Readers::new(real),
            options,
            readers,
            unchecked: false.into(),
            lost: Sender::new(false),
            owner: None,
        });
        seen.log = Some(match backend::check_log(&*store).await {
            Ok(()) => store.head().await,
            Err(error) => Err(error),
        });
        seen.store = Some(store);
    }
    Ok(seen)
}

/// What SQLite's own check says; a fault of the check itself is none of the file's.
async fn structure(path: &str, connection: &mut SqliteConnection) -> Result<Result<(), String>, OpenError> {
    match check_whole(path, connection).await {
        Ok(()) => Ok(Ok(())),
        Err(OpenError::Damaged { what, .. }) => Ok(Err(what)),
        Err(error) => Err(error),
    }
}

/// The newest migration that the file has had.
async fn newest(connection: &mut SqliteConnection) -> Result<Option<i64>, sqlx::Error> {
    let table = "SELECT count(*) FROM sqlite_schema WHERE name = '_sqlx_migrations'";
    if sqlx::query_scalar::<_, i64>(table).fetch_one(&mut *connection).await? == 0 {
        return Ok(None);
    }
    sqlx::query_scalar("SELECT max(version) FROM _sqlx_migrations").fetch_one(connection).await
}
