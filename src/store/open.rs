//! From a URL to a store: which backend it names, what may stop it from opening, and what else is done with a database
//! that is not opened: its schema migrated, its file copied.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use super::{LogHead, Store, postgres, sqlite};
use crate::domain::connection_url::{SECRET_MASK, mask_url};

/// Why a store did not open. Each says what to do.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The URL names no backend, or cannot be used.
    #[error("the database URL {shown}{problem}")]
    Url {
        /// The URL without what may be secret, in quotes and with a blank behind it; empty if none of it may be shown.
        shown: String,
        /// What is wrong with it, and what would be right.
        problem: String,
    },
    /// Another process owns the file.
    #[error(
        "{path} is in use by another keyward{owner}: one process owns the file. Stop it first, or give this \
         one its own --database"
    )]
    Locked {
        /// The database file.
        path: String,
        /// ` (process N)`, where known.
        owner: String,
    },
    /// The file was not closed, and the WAL with its newest changes is missing.
    #[error(
        "{path} was not closed, and {path}-wal is missing or damaged: the newest changes, such as revocations, are only there. \
         Nothing was changed. Put that file beside it (a copy needs both files, or 'keyward backup'), or restore the \
         newest backup. If both are lost, 'keyward accept-lost-wal' says up to which change the file goes, and has it \
         start from there"
    )]
    WalMissing {
        /// The database file.
        path: String,
    },
    /// There is a WAL, and no database that it belongs to.
    #[error(
        "{path} is missing or empty, and {path}-wal is there: its newest changes are in that file alone. Nothing was \
         changed. Put the database file back; to start with a new database, move {path}-wal away"
    )]
    DatabaseFileMissing {
        /// The database file.
        path: String,
    },
    /// There is no such file, and none is to be created.
    #[error(
        "there is no database at {path}, and none was created: name the right one with --database sqlite:PATH"
    )]
    FileNotFound {
        /// The database file.
        path: String,
    },
    /// A backup is never written over a file.
    #[error("{path} exists already and is not overwritten; nothing was copied. Name a new file with --to")]
    BackupExists {
        /// The file.
        path: String,
    },
    /// The WAL beside the file belongs to an older state of it.
    #[error(
        "{path}-wal does not belong to {path}: it is from another state. No data was changed. If {path} is a restored \
         backup, move {path}-wal and {path}-shm away; else put the right -wal file in its place"
    )]
    ForeignWal {
        /// The database file.
        path: String,
    },
    /// A lost WAL is to be accepted, and none is.
    #[error("nothing of {path} is lost, so there is no loss to accept; start the server as usual")]
    WalNotLost {
        /// The database file.
        path: String,
    },
    /// The database server cannot be trusted with keys.
    #[error("{database} cannot be used: {what}. {fix}")]
    Unsuitable {
        /// The database.
        database: String,
        /// What is wrong with it.
        what: String,
        /// What to do.
        fix: &'static str,
    },
    /// A newer version has migrated the database.
    #[error(
        "{path} has schema version {found}, and this keyward knows versions up to {known}: start the newer \
         keyward that migrated it, or restore a backup from before"
    )]
    NewerSchema {
        /// The database.
        path: String,
        /// Its version.
        found: i64,
        /// The newest version known here.
        known: i64,
    },
    /// The schema is older than this program, and is not to be migrated now.
    #[error(
        "{path} has schema version {found}, and this keyward needs version {known}: run 'keyward migrate' (servers that \
         run may go on meanwhile), or start without --no-migrate"
    )]
    OlderSchema {
        /// The database.
        path: String,
        /// Its version; 0 = it has none.
        found: i64,
        /// The version that this program needs.
        known: i64,
    },
    /// The database server does not answer, or not yet.
    #[error("{path} could not be opened: {source}")]
    Unreachable {
        /// The database.
        path: String,
        /// The cause.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The database library is too old to be trusted.
    #[error(
        "SQLite {found} is linked, and 3.51.3 is the first without the WAL-reset corruption: rebuild with it"
    )]
    SqliteTooOld {
        /// The version linked.
        found: String,
    },
    /// The database is damaged.
    #[error(
        "{path} is damaged: {what}. Nothing was changed. Restore the newest backup (with its -wal file, if it \
         has one); keep the damaged files for a look"
    )]
    Damaged {
        /// The database.
        path: String,
        /// What was found.
        what: String,
    },
    /// Anything else.
    #[error("{path} could not be opened: {source}")]
    Other {
        /// The database.
        path: String,
        /// The cause.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// What to do where the schema is older than this program.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SchemaPolicy {
    /// Bring it up to date.
    #[default]
    Migrate,
    /// Do not open the store.
    RequireCurrent,
}

/// One step of the schema.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MigrationStep {
    /// Its number.
    pub version: i64,
    /// Its name.
    pub name: String,
}

/// Ids of accounts that differ in case alone, next to each other. Both stores read it before the step that makes an index
/// of them.
pub(super) const CASE_COLLISIONS: &str = "SELECT id FROM accounts WHERE lower(id) IN \
    (SELECT lower(id) FROM accounts GROUP BY lower(id) HAVING count(*) > 1) ORDER BY lower(id), id";

/// The most ids that an error names.
const MAX_NAMED_IDS: usize = 20;

/// Refuses ids of accounts that differ in case alone: `found` is what [`CASE_COLLISIONS`] gives.
///
/// # Errors
/// [`OpenError::Unsuitable`], with the ids and what to do, if there are any.
pub(super) fn check_account_ids(database: &str, found: &[String]) -> Result<(), OpenError> {
    if found.is_empty() {
        return Ok(());
    }
    let ids: Vec<_> = found.iter().take(MAX_NAMED_IDS).map(|id| format!("{id:?}")).collect();
    let more = found.len().saturating_sub(MAX_NAMED_IDS);
    let more = if more == 0 { String::new() } else { format!(" and {more} more") };
    Err(OpenError::Unsuitable {
        database: database.to_owned(),
        what: format!(
            "it has accounts whose ids differ in case alone, which migration 9 no longer allows: {}{more}",
            ids.join(", ")
        ),
        fix: "Nothing was migrated. No release makes such ids: restore a backup from before they were written into the \
              database by hand, or go on with the version before and move what uses one of them to another account",
    })
}

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

/// A URL that cannot be used.
pub(super) fn url_error(url: &str, problem: impl Into<String>) -> OpenError {
    let shown = mask_url(url);
    let shown = if shown == SECRET_MASK { String::new() } else { format!("{shown:?} ") };
    OpenError::Url { shown, problem: problem.into() }
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
