//! Time limits for every wait for the server, since a server that has disappeared never answers.

use std::time::Duration;

use super::errors::PgResult;

/// The time limit of one transaction, including the wait for the lock. The server has the same limit, so it does not
/// continue alone.
pub(super) const CALL_TIMEOUT: Duration = Duration::from_secs(10);

/// The time limit for a second session that reads keys: one session is enough.
pub(super) const SECOND_SESSION_TIMEOUT: Duration = Duration::from_secs(3);

/// The time limit for a free or new connection.
pub(super) const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(5);

/// The time limit for the next row of a snapshot.
pub(super) const NEXT_ROW_TIMEOUT: Duration = Duration::from_secs(30);

/// Runs `work` with a time limit, which is an I/O error when it expires.
pub(super) async fn with_timeout<T>(limit: Duration, work: impl Future<Output = PgResult<T>>) -> PgResult<T> {
    tokio::time::timeout(limit, work).await.unwrap_or_else(|_| {
        let message = format!("the database did not answer within {} s", limit.as_secs());
        Err(sqlx::Error::Io(std::io::Error::new(std::io::ErrorKind::TimedOut, message)))
    })
}
