//! From a URL to a store: which backend it names, what may stop it from opening, and what else is done with a database
//! that is not opened: its schema migrated, its file copied.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use super::{
    contract::Store,
    error::{OpenError, url_error},
    postgres,
    records::LogHead,
    schema::{MigrationStep, SchemaPolicy},
    sqlite,
};

/// A database, as a URL names it.
enum DatabaseUrl<'u> {
    /// An SQLite file.
    SqliteFile(&'u str),
    /// A PostgreSQL server.
    PostgresServer,
}

/// Opens the store that `url` names, migrates it, and checks that it is whole.
///
/// # Errors
/// When it cannot be opened, is damaged, or belongs to another process or a newer version.
pub async fn open(url: &str) -> Result<Arc<dyn Store>, OpenError> {
    open_with_schema(url, SchemaPolicy::Migrate).await
}

/// The same, and says what to do where the schema is older.
///
/// # Errors
/// As [`open`]; and where the schema is older and is to stay so.
pub async fn open_with_schema(url: &str, schema: SchemaPolicy) -> Result<Arc<dyn Store>, OpenError> {
    Ok(match parse_database_url(url)? {
        DatabaseUrl::SqliteFile(path) => Arc::new(sqlite::SqliteStore::open(path, schema).await?),
        DatabaseUrl::PostgresServer => Arc::new(postgres::PostgresStore::open(url, schema).await?),
    })
}

/// Opens a file that was not closed and whose WAL is lost, as it was when the WAL was last copied into it. Once anything is
/// committed and the store is closed, it is a whole database again.
///
/// # Errors
/// When its WAL is not lost, it cannot be opened, or the database is none of SQLite.
pub async fn open_without_wal(url: &str) -> Result<Arc<dyn Store>, OpenError> {
    match parse_database_url(url)? {
        DatabaseUrl::SqliteFile(path) => {
            // A misspelt path is no new database.
            if !Path::new(path).exists() {
                return Err(OpenError::FileNotFound { path: path.to_owned() });
            }
            Ok(Arc::new(sqlite::SqliteStore::open_without_wal(path).await?))
        }
        DatabaseUrl::PostgresServer => Err(OpenError::Unsuitable {
            database: "a PostgreSQL server".to_owned(),
            what: "it looks after its WAL itself".to_owned(),
            fix: "After a restored backup use 'keyward replicas accept-regression' (see docs/operations.md)",
        }),
    }
}

/// Brings the schema up to date, or only says what that would do. Gives the steps.
///
/// # Errors
/// When it cannot be opened, is damaged, or belongs to another process or a newer version.
pub async fn migrate(url: &str, dry_run: bool) -> Result<Vec<MigrationStep>, OpenError> {
    match parse_database_url(url)? {
        DatabaseUrl::SqliteFile(path) => sqlite::SqliteStore::migrate(path, dry_run).await,
        DatabaseUrl::PostgresServer => postgres::PostgresStore::migrate(url, dry_run).await,
    }
}

/// Whether the database can be reached. A file always can.
///
/// # Errors
/// When it cannot: [`OpenError::Unreachable`] where that may pass.
pub async fn check_reachable(url: &str) -> Result<(), OpenError> {
    match parse_database_url(url)? {
        DatabaseUrl::SqliteFile(_) => Ok(()),
        DatabaseUrl::PostgresServer => postgres::PostgresStore::check_reachable(url).await,
    }
}

/// The SQLite file that `url` names, where its path leads through symbolic links. None = a server has the database.
#[must_use]
pub fn sqlite_file(url: &str) -> Option<PathBuf> {
    match parse_database_url(url) {
        Ok(DatabaseUrl::SqliteFile(path)) => {
            Some(Path::new(path).canonicalize().unwrap_or_else(|_| path.into()))
        }
        _ => None,
    }
}

/// Copies an SQLite file as of one instant to a new file, also while a server owns it. Gives where the copy's log ends.
///
/// # Errors
/// When it cannot be copied, or the database is none of SQLite: its own tools copy a PostgreSQL server.
pub async fn backup(url: &str, to: &Path) -> Result<LogHead, OpenError> {
    match parse_database_url(url)? {
        DatabaseUrl::SqliteFile(path) => sqlite::backup(path, to).await,
        DatabaseUrl::PostgresServer => Err(OpenError::Unsuitable {
            database: "a PostgreSQL server".to_owned(),
            what: "its own tools make its backups".to_owned(),
            fix: "Use pg_dump --format=custom --schema=keyward, or back up the whole server (see docs/operations.md)",
        }),
    }
}

/// Whether the text of `url` names a database that this program can open. Opens and resolves nothing.
///
/// # Errors
/// [`OpenError::Url`]: what is wrong with it, and what would be right; it repeats no secret.
pub fn check_url(url: &str) -> Result<(), OpenError> {
    match parse_database_url(url)? {
        DatabaseUrl::SqliteFile(_) => Ok(()),
        DatabaseUrl::PostgresServer => postgres::check_url(url),
    }
}

/// Opens the store of an SQLite file that must exist, or of a PostgreSQL server: a misspelt path is no new database.
///
/// # Errors
/// As [`open`]; and [`OpenError::FileNotFound`] if there is no such file.
pub async fn open_existing(url: &str) -> Result<Arc<dyn Store>, OpenError> {
    if let DatabaseUrl::SqliteFile(path) = parse_database_url(url)?
        && !Path::new(path).exists()
    {
        return Err(OpenError::FileNotFound { path: path.to_owned() });
    }
    open(url).await
}

fn parse_database_url(url: &str) -> Result<DatabaseUrl<'_>, OpenError> {
    match url.split_once(':') {
        Some(("sqlite", path)) if path.contains(":memory:") || path.contains('?') => Err(url_error(
            url,
            "must name a file without options: sqlite:PATH, for example sqlite:keyward.db",
        )),
        Some(("sqlite", path)) if !path.is_empty() => {
            Ok(DatabaseUrl::SqliteFile(path.strip_prefix("//").unwrap_or(path)))
        }
        Some(("sqlite", _)) => {
            Err(url_error(url, "lacks a path: write sqlite:PATH, for example sqlite:keyward.db"))
        }
        Some(("postgres" | "postgresql", _)) => Ok(DatabaseUrl::PostgresServer),
        _ if is_database_file_name(url) => {
            Err(url_error(url, format!("lacks its kind: for this SQLite file write sqlite:{url}")))
        }
        _ => Err(url_error(
            url,
            "names no known kind of database: write sqlite:PATH, for example sqlite:keyward.db, or \
             postgres://user:password@host/database",
        )),
    }
}

/// Whether a text is a plain path that ends as database files do, and so no password.
fn is_database_file_name(text: &str) -> bool {
    let plain = |letter: char| letter.is_ascii_alphanumeric() || "/._-~".contains(letter);
    text.chars().all(plain) && [".db", ".sqlite", ".sqlite3"].iter().any(|end| text.ends_with(end))
}
