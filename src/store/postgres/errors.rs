//! PostgreSQL's errors, and what each means to whoever asked. Words for callers and the retries that follow are not here.

use sqlx::postgres::{PgDatabaseError, PgSeverity};

use crate::store::{OpenError, StoreError, row_format::damaged_error};

use super::target::PgTarget;

pub(super) type PgResult<T> = Result<T, sqlx::Error>;

pub(super) fn as_server_error(error: &sqlx::Error) -> Option<&PgDatabaseError> {
    error.as_database_error()?.try_downcast_ref::<PgDatabaseError>()
}

/// Whether the connection is of no more use: a fault on the way, or a server that ends its sessions.
pub(super) fn is_connection_lost(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::Io(error) => error.kind() != std::io::ErrorKind::TimedOut,
        error => as_server_error(error)
            .is_some_and(|error| matches!(error.severity(), PgSeverity::Fatal | PgSeverity::Panic)),
    }
}

/// Whether the server refused to commit, so that certainly nothing was. Whatever ends the session leaves it open:
/// the commit may be on disk already. Poolers report a lost server as an error of a connection (08), and servers
/// that stop or break as such (57P, 58, XX); CockroachDB says 40003 where it does not know.
pub(super) fn is_commit_refused(error: &sqlx::Error) -> bool {
    const UNDECIDED: [&str; 5] = ["08", "57P", "58", "XX", "40003"];
    as_server_error(error).is_some_and(|error| {
        let undecided = UNDECIDED.iter().any(|class| error.code().starts_with(class));
        error.severity() == PgSeverity::Error && !undecided
    })
}

/// A server that takes no changes, which a reconnection can meet: at the start the doctor refuses it. It is as if it were
/// down, since what it says may be old; the log is to tell what is wrong all the same.
#[derive(Debug, thiserror::Error)]
#[error("the server takes no changes: it is a standby, or read-only. Its address must lead to the primary")]
struct ReadOnlyServerError(#[source] sqlx::Error);

/// Whether the server takes no changes at all. One in recovery says so of `BEGIN … READ WRITE`, under a code that others
/// use for much else: but of what we send, by this check alone.
fn is_read_only_server(said: &PgDatabaseError) -> bool {
    const READ_ONLY: &str = "25006";
    const NOT_SUPPORTED: &str = "0A000";
    said.code() == READ_ONLY || said.code() == NOT_SUPPORTED && said.routine() == Some("call_bool_check_hook")
}

const DISK_FULL: &str = "53100";
const DATA_CORRUPTED: &str = "XX001";
const INDEX_CORRUPTED: &str = "XX002";

pub(super) fn store_error(error: sqlx::Error) -> StoreError {
    let said = as_server_error(&error);
    match said.map(PgDatabaseError::code) {
        Some(DISK_FULL) => StoreError::Full(error.into()),
        Some(_) if said.is_some_and(is_read_only_server) => {
            StoreError::Unavailable(ReadOnlyServerError(error).into())
        }
        Some(DATA_CORRUPTED | INDEX_CORRUPTED) => damaged_error("the PostgreSQL server's data", error),
        _ => StoreError::Unavailable(error.into()),
    }
}

/// Whether an error may be gone by itself: a server that does not answer, is starting or stopping, or has no room for
/// another session.
pub(super) fn is_transient(error: &sqlx::Error) -> bool {
    const PASSING: [&str; 3] = ["57P", "08", "53"];
    match error {
        sqlx::Error::Io(_) | sqlx::Error::PoolTimedOut => true,
        error => as_server_error(error)
            .is_some_and(|said| PASSING.iter().any(|class| said.code().starts_with(class))),
    }
}

pub(super) fn open_error(place: &PgTarget, error: sqlx::Error) -> OpenError {
    let path = place.display_name.clone();
    if is_transient(&error) {
        OpenError::Unreachable { path, source: error.into() }
    } else {
        OpenError::Other { path, source: error.into() }
    }
}
