//! A connection for one purpose, which no other work can hold up. A statement is one message of text, with its
//! transaction around it, so that it costs one round trip and passes pgbouncer; answers come as text. Whoever fails
//! or is given up in the middle leaves no connection behind.

use std::{
    sync::{Mutex, PoisonError},
    time::Duration,
};

use sqlx::{
    AssertSqlSafe, Connection as _, PgConnection,
    postgres::{PgConnectOptions, PgRow},
};

use super::{
    errors::PgResult,
    timeouts::{ACQUIRE_TIMEOUT, with_timeout},
};

/// A way to the server, for one statement at a time; a second one makes a connection of its own.
pub(super) struct DedicatedConnection {
    options: PgConnectOptions,
    idle: Mutex<Option<PgConnection>>,
}

impl DedicatedConnection {
    pub(super) fn new(options: PgConnectOptions) -> DedicatedConnection {
        DedicatedConnection { options, idle: Mutex::default() }
    }

    /// Sends a message and gives its rows. What stands in it must be ours: numbers, hex, names that need no quotes.
    pub(super) async fn fetch_rows(&self, sql: String, limit: Duration) -> PgResult<Vec<PgRow>> {
        let idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner).take();
        let mut connection = match idle {
            Some(connection) => connection,
            None => {
                with_timeout(ACQUIRE_TIMEOUT.min(limit), PgConnection::connect_with(&self.options)).await?
            }
        };
        let asked = sqlx::raw_sql(AssertSqlSafe(sql)).fetch_all(&mut connection);
        let rows = with_timeout(limit, asked).await?;
        *self.idle.lock().unwrap_or_else(PoisonError::into_inner) = Some(connection);
        Ok(rows)
    }

    /// Ends the connection, if there is one.
    pub(super) async fn close(&self) {
        let idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(connection) = idle {
            let _ = with_timeout(ACQUIRE_TIMEOUT, connection.close()).await;
        }
    }
}
