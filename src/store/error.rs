//! The errors of a store: why a database did not open, why an operation failed, why a batch was not committed.
//!
//! No error of a database library appears in a signature; it is only a source.

use crate::domain::connection_url::{SECRET_MASK, mask_url};

/// The reason why a read or a write failed.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The database did not answer, or answered with an error that may pass.
    #[error("the database failed")]
    Unavailable(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The disk of the database is full.
    #[error("the database is full")]
    Full(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// This process no longer owns the database file, so it must end. Contains the cause.
    #[error("this process no longer owns the database file: {0}")]
    OwnershipLost(&'static str),
    /// Data contradicts itself, such as a row and its checksum. Contains the place and the problem.
    #[error(
        "the database is damaged: {0}. Restore the newest backup (with its -wal file, if it has one); keep the \
         damaged files for analysis"
    )]
    Damaged(String),
}

/// The reason why a batch was not committed, or may not have been.
#[derive(Debug, thiserror::Error)]
pub enum CommitError {
    /// Nothing of the batch is recorded, and nothing will be.
    #[error("the change was not recorded")]
    NotRecorded(#[source] StoreError),
    /// The batch may be recorded: the answer to the commit was lost.
    #[error("whether the change was recorded is unknown")]
    Unknown(#[source] StoreError),
}

/// The reason why a database did not open. Each message includes what to do.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The URL names no known database, or contains something unsupported.
    #[error("the database URL {shown}{problem}")]
    Url {
        /// The URL with secrets masked, quoted, with a space after it; empty if nothing may be shown.
        shown: String,
        /// What is wrong with the URL, and what would be right.
        problem: String,
    },
    /// Another process owns the database file.
    #[error(
        "{path} is in use by another keyward{owner}: one process owns the file. Stop it first, or give this \
         one another --database"
    )]
    Locked {
        /// The database file, as the URL names it.
        path: String,
        /// ` (process N)` if the owner is known; otherwise empty.
        owner: String,
    },
    /// The file was not closed, and its WAL with the newest changes is missing or damaged.
    #[error(
        "{path} was not closed, and {path}-wal is missing or damaged: the newest changes, such as revocations, are only there. \
         Nothing was changed. Put that file next to it (a copy needs both files, or 'keyward backup'), or restore the \
         newest backup. If both are lost, 'keyward accept-lost-wal' says up to which change the file goes, and has it \
         start from there"
    )]
    WalMissing {
        /// The database file, as the URL names it.
        path: String,
    },
    /// A WAL exists without the database file that it belongs to.
    #[error(
        "{path} is missing or empty, and {path}-wal is there: its newest changes are in that file alone. Nothing was \
         changed. Put the database file back; to start with a new database, move {path}-wal away"
    )]
    DatabaseFileMissing {
        /// The database file, as the URL names it.
        path: String,
    },
    /// The file does not exist, and none may be created.
    #[error(
        "there is no database at {path}, and none was created: name the right one with --database sqlite:PATH"
    )]
    FileNotFound {
        /// The database file, as the URL names it.
        path: String,
    },
    /// The target of a backup exists; a backup never overwrites a file.
    #[error("{path} exists already and is not overwritten; nothing was copied. Name a new file with --to")]
    BackupExists {
        /// The target of the backup.
        path: String,
    },
    /// The WAL next to the file belongs to another state of the database.
    #[error(
        "{path}-wal does not belong to {path}: it is from another state. No data was changed. If {path} is a restored \
         backup, move {path}-wal and {path}-shm away; else put the right -wal file in its place"
    )]
    ForeignWal {
        /// The database file, as the URL names it.
        path: String,
    },
    /// The loss of a WAL was to be accepted, but the WAL is not lost.
    #[error("nothing of {path} is lost, so there is no loss to accept; start the server as usual")]
    WalNotLost {
        /// The database file, as the URL names it.
        path: String,
    },
    /// The database cannot be trusted with keys, or does not support the operation.
    #[error("{database} cannot be used: {what}. {fix}")]
    Unsuitable {
        /// The database, named for people.
        database: String,
        /// What is wrong with the database.
        what: String,
        /// What to do about it, as a sentence.
        fix: &'static str,
    },
    /// A newer version of Keyward has migrated the database.
    #[error(
        "{path} has schema version {found}, and this keyward knows versions up to {known}: start the newer \
         keyward that migrated it, or restore a backup from before"
    )]
    NewerSchema {
        /// The database, named without user and password.
        path: String,
        /// The schema version of the database.
        found: i64,
        /// The newest schema version that this program knows.
        known: i64,
    },
    /// The schema is older than this program, and must not be migrated now.
    #[error(
        "{path} has schema version {found}, and this keyward needs version {known}: run 'keyward migrate' (running \
         servers may continue meanwhile), or start without --no-migrate"
    )]
    OlderSchema {
        /// The database, named without user and password.
        path: String,
        /// The schema version of the database; 0 if it has no schema.
        found: i64,
        /// The schema version that this program needs.
        known: i64,
    },
    /// The database server does not answer. It may later.
    #[error("{path} could not be opened: {source}")]
    Unreachable {
        /// The database, named without user and password.
        path: String,
        /// The error of the connection.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The linked SQLite is too old to be trusted.
    #[error(
        "SQLite {found} is linked, and 3.51.3 is the first without the WAL-reset corruption: rebuild with it"
    )]
    SqliteTooOld {
        /// The version of the linked SQLite.
        found: String,
    },
    /// The structure or the log of the database is damaged.
    #[error(
        "{path} is damaged: {what}. Nothing was changed. Restore the newest backup (with its -wal file, if it \
         has one); keep the damaged files for analysis"
    )]
    Damaged {
        /// The database, named without user and password.
        path: String,
        /// What the check found.
        what: String,
    },
    /// The database could not be opened for another reason.
    #[error("{path} could not be opened: {source}")]
    Other {
        /// The database, named without user and password.
        path: String,
        /// The error of the database or of the file system.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// An [`OpenError::Url`] for this URL.
pub(super) fn url_error(url: &str, problem: impl Into<String>) -> OpenError {
    let shown = mask_url(url);
    let shown = if shown == SECRET_MASK { String::new() } else { format!("{shown:?} ") };
    OpenError::Url { shown, problem: problem.into() }
}
