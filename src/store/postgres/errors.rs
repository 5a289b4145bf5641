//! Classifies PostgreSQL's errors: damage, a full disk, a lost connection, a refused commit.
//!
//! Messages for callers, and retries, are not here.

use sqlx::postgres::{PgDatabaseError, PgSeverity};

use crate::store::{OpenError, StoreError, row_format::damaged_error};

use super::target::PgTarget;

/// The result of a call of sqlx.
pub(super) type PgResult<T> = Result<T, sqlx::Error>;

pub(super) fn as_server_error(error: &sqlx::Error) -> Option<&PgDatabaseError> {
    error.as_database_error()?.try_downcast_ref::<PgDatabaseError>()
}

/// Whether the connection is unusable: a network error, or a server that ends its sessions.
pub(super) fn is_connection_lost(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::Io(error) => error.kind() != std::io::ErrorKind::TimedOut,
        error => as_server_error(error)
            .is_some_and(|error| matches!(error.severity(), PgSeverity::Fatal | PgSeverity::Panic)),
    }
}

/// Whether the server refused to commit, so that certainly nothing is recorded. An error that ends the session leaves
/// it open: the commit may be on disk. Poolers report a lost server as a connection error (08). Servers that stop or
/// crash report 57P, 58 or XX. CockroachDB uses 40003 for an unknown outcome.
pub(super) fn is_commit_refused(error: &sqlx::Error) -> bool {
    const UNDECIDED: [&str; 5] = ["08", "57P", "58", "XX", "40003"];
    as_server_error(error).is_some_and(|error| {
        let undecided = UNDECIDED.iter().any(|class| error.code().starts_with(class));
        error.severity() == PgSeverity::Error && !undecided
    })
}

/// A server that accepts no changes, reached by a reconnection: at the start, `server_check` refuses it. It counts as
/// unavailable, since its data may be old; the log explains the cause.
#[derive(Debug, thiserror::Error)]
#[error("the server accepts no changes: it is a standby or read-only. Its address must lead to the primary")]
struct ReadOnlyServerError(#[source] sqlx::Error);

/// Whether the server accepts no changes at all. A server in recovery rejects `BEGIN … READ WRITE` with a code that has
/// many other causes; among our statements, only this check raises it.
fn is_read_only_server(server_error: &PgDatabaseError) -> bool {
    const READ_ONLY: &str = "25006";
    const NOT_SUPPORTED: &str = "0A000";
    server_error.code() == READ_ONLY
        || server_error.code() == NOT_SUPPORTED && server_error.routine() == Some("call_bool_check_hook")
}

const DISK_FULL: &str = "53100";
const DATA_CORRUPTED: &str = "XX001";
const INDEX_CORRUPTED: &str = "XX002";

pub(super) fn store_error(error: sqlx::Error) -> StoreError {
    let server_error = as_server_error(&error);
    match server_error.map(PgDatabaseError::code) {
        Some(DISK_FULL) => StoreError::Full(error.into()),
        Some(_) if server_error.is_some_and(is_read_only_server) => {
            StoreError::Unavailable(ReadOnlyServerError(error).into())
        }
        Some(DATA_CORRUPTED | INDEX_CORRUPTED) => damaged_error("the PostgreSQL server's data", error),
        _ => StoreError::Unavailable(error.into()),
    }
}

/// Whether an error may pass by itself: the server does not answer, is starting or stopping, or accepts no more
/// sessions.
pub(super) fn is_transient(error: &sqlx::Error) -> bool {
    const PASSING: [&str; 3] = ["57P", "08", "53"];
    match error {
        sqlx::Error::Io(_) | sqlx::Error::PoolTimedOut => true,
        error => as_server_error(error)
            .is_some_and(|server_error| PASSING.iter().any(|class| server_error.code().starts_with(class))),
    }
}

pub(super) fn open_error(target: &PgTarget, error: sqlx::Error) -> OpenError {
    let path = target.display_name.clone();
    if is_transient(&error) {
        OpenError::Unreachable { path, source: error.into() }
    } else {
        OpenError::Other { path, source: error.into() }
    }
}
