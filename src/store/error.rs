//! The errors of the store: why a database did not open, why a read failed, and why a batch was not committed.
//!
//! No error of a database library appears in a signature; it is only a source.

use crate::domain::connection_url::{SECRET_MASK, mask_url};

/// Why a read or a write did not happen.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The database did not answer, or answered with a fault.
    #[error("the database failed")]
    Unavailable(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The database has no room left.
    #[error("the database is full")]
    Full(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// This process no longer owns the database file. It ends.
    #[error("this process no longer owns the database file: {0}")]
    OwnershipLost(&'static str),
    /// A row contradicts itself.
    #[error(
        "the database is damaged: {0}. Restore the newest backup (with its -wal file, if it has one); keep the \
         damaged files for a look"
    )]
    Damaged(String),
}

/// Why a batch was not committed.
#[derive(Debug, thiserror::Error)]
pub enum CommitError {
    /// Certainly nothing of it is recorded.
    #[error("the change was not recorded")]
    NotRecorded(#[source] StoreError),
    /// It may be recorded.
    #[error("whether the change was recorded is unknown")]
    Unknown(#[source] StoreError),
}

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

/// A URL that cannot be used.
pub(super) fn url_error(url: &str, problem: impl Into<String>) -> OpenError {
    let shown = mask_url(url);
    let shown = if shown == SECRET_MASK { String::new() } else { format!("{shown:?} ") };
    OpenError::Url { shown, problem: problem.into() }
}
