//! Opens the store that a URL names, and does what needs no open store: migrations and backups.

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

/// A database, parsed from its URL.
enum DatabaseUrl<'u> {
    /// The path of an SQLite file.
    SqliteFile(&'u str),
    /// A PostgreSQL server, whose URL its backend parses.
    PostgresServer,
}

/// Opens the store that `url` names, migrates it and verifies the newest part of its log.
///
/// # Errors
/// If the database cannot be opened, is damaged, or belongs to another process or to a newer version.
pub async fn open(url: &str) -> Result<Arc<dyn Store>, OpenError> {
    open_with_schema(url, SchemaPolicy::Migrate).await
}

/// Like [`open`], with a policy for a schema that is older than this program.
///
/// # Errors
/// Like [`open`]; also if the schema is older and must not be migrated.
pub async fn open_with_schema(url: &str, schema: SchemaPolicy) -> Result<Arc<dyn Store>, OpenError> {
    Ok(match parse_database_url(url)? {
        DatabaseUrl::SqliteFile(path) => Arc::new(sqlite::SqliteStore::open(path, schema).await?),
        DatabaseUrl::PostgresServer => Arc::new(postgres::PostgresStore::open(url, schema).await?),
    })
}

/// Opens a file that was not closed and whose WAL is lost, in the state of its last checkpoint. After the next commit
/// and a close, it is a complete database again.
///
/// # Errors
/// If the WAL is not lost, the file cannot be opened, or the database is not SQLite.
pub async fn open_without_wal(url: &str) -> Result<Arc<dyn Store>, OpenError> {
    match parse_database_url(url)? {
        DatabaseUrl::SqliteFile(path) => {
            // A misspelled path must not become a new database.
            if !Path::new(path).exists() {
                return Err(OpenError::FileNotFound { path: path.to_owned() });
            }
            Ok(Arc::new(sqlite::SqliteStore::open_without_wal(path).await?))
        }
        DatabaseUrl::PostgresServer => Err(OpenError::Unsuitable {
            database: "a PostgreSQL server".to_owned(),
            what: "it manages its WAL by itself".to_owned(),
            fix: "After a restored backup use 'keyward replicas accept-regression' (see docs/operations.md)",
        }),
    }
}

/// Migrates the schema; with `dry_run`, only finds the missing steps. Returns these steps.
///
/// # Errors
/// If the database cannot be opened, is damaged, or belongs to another process or to a newer version.
pub async fn migrate(url: &str, dry_run: bool) -> Result<Vec<MigrationStep>, OpenError> {
    match parse_database_url(url)? {
        DatabaseUrl::SqliteFile(path) => sqlite::SqliteStore::migrate(path, dry_run).await,
        DatabaseUrl::PostgresServer => postgres::PostgresStore::migrate(url, dry_run).await,
    }
}

/// Checks that the database can be reached. A file always can.
///
/// # Errors
/// [`OpenError::Unreachable`] if the problem may pass; other errors otherwise.
pub async fn check_reachable(url: &str) -> Result<(), OpenError> {
    match parse_database_url(url)? {
        DatabaseUrl::SqliteFile(_) => Ok(()),
        DatabaseUrl::PostgresServer => postgres::PostgresStore::check_reachable(url).await,
    }
}

/// The SQLite file that `url` names, with symbolic links resolved; `None` for a server.
#[must_use]
pub fn sqlite_file(url: &str) -> Option<PathBuf> {
    match parse_database_url(url) {
        Ok(DatabaseUrl::SqliteFile(path)) => {
            Some(Path::new(path).canonicalize().unwrap_or_else(|_| path.into()))
        }
        _ => None,
    }
}

/// Copies an SQLite file as of one instant to a new file, even while a server owns it. Returns the end of the log in
/// the copy.
///
/// # Errors
/// If the file cannot be copied, or the database is not SQLite: PostgreSQL has its own backup tools.
pub async fn backup(url: &str, to: &Path) -> Result<LogHead, OpenError> {
    match parse_database_url(url)? {
        DatabaseUrl::SqliteFile(path) => sqlite::backup(path, to).await,
        DatabaseUrl::PostgresServer => Err(OpenError::Unsuitable {
            database: "a PostgreSQL server".to_owned(),
            what: "PostgreSQL's tools make its backups".to_owned(),
            fix: "Use pg_dump --format=custom --schema=keyward, or back up the whole server (see docs/operations.md)",
        }),
    }
}

/// Checks that `url` is well-formed and names a kind of database that this program supports. Opens and resolves
/// nothing.
///
/// # Errors
/// [`OpenError::Url`]: what is wrong, and what would be right, without secrets.
pub fn check_url(url: &str) -> Result<(), OpenError> {
    match parse_database_url(url)? {
        DatabaseUrl::SqliteFile(_) => Ok(()),
        DatabaseUrl::PostgresServer => postgres::check_url(url),
    }
}

/// Opens a store, but creates no SQLite file: a misspelled path must not become a new database.
///
/// # Errors
/// Like [`open`]; also [`OpenError::FileNotFound`].
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

/// Whether a text is a plain path with the extension of a database file, and so not a password.
fn is_database_file_name(text: &str) -> bool {
    let plain = |letter: char| letter.is_ascii_alphanumeric() || "/._-~".contains(letter);
    text.chars().all(plain) && [".db", ".sqlite", ".sqlite3"].iter().any(|end| text.ends_with(end))
}
