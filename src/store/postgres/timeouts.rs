//! Time limits for everything that waits for the server: one that has vanished does not answer.

use std::time::Duration;

use super::errors::PgResult;

/// How long one transaction may take, waiting for the lock included. The server is told the same, so that it does
/// not go on without us.
pub(super) const CALL_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a second session may take to be had for reading the keys: they can be read by one.
pub(super) const SECOND_SESSION_TIMEOUT: Duration = Duration::from_secs(3);

/// How long a free connection may take to be had.
pub(super) const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a snapshot may wait for its next row.
pub(super) const NEXT_ROW_TIMEOUT: Duration = Duration::from_secs(30);

/// Runs `work` for so long at the most: a server that has vanished says nothing.
pub(super) async fn with_timeout<T>(limit: Duration, work: impl Future<Output = PgResult<T>>) -> PgResult<T> {
    tokio::time::timeout(limit, work).await.unwrap_or_else(|_| {
        let said = format!("the database did not answer within {} s", limit.as_secs());
        Err(sqlx::Error::Io(std::io::Error::new(std::io::ErrorKind::TimedOut, said)))
    })
}
