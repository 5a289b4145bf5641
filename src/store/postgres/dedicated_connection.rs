//! A connection for one purpose, which other work cannot delay.
//!
//! A message contains its whole transaction as text, so it takes one round trip and works through pgbouncer. If a call
//! fails or is dropped, its connection is closed.

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

/// A lazily opened connection that runs one message at a time. A concurrent message opens another connection.
pub(super) struct DedicatedConnection {
    options: PgConnectOptions,
    idle: Mutex<Option<PgConnection>>,
}

impl DedicatedConnection {
    pub(super) fn new(options: PgConnectOptions) -> DedicatedConnection {
        DedicatedConnection { options, idle: Mutex::default() }
    }

    /// Sends a message and returns its rows. The message must contain only trusted text: numbers, hex, literals, names
    /// that need no quotes.
    pub(super) async fn fetch_rows(&self, sql: String, limit: Duration) -> PgResult<Vec<PgRow>> {
        let idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner).take();
        let mut connection = match idle {
            Some(connection) => connection,
            None => {
                with_timeout(ACQUIRE_TIMEOUT.min(limit), PgConnection::connect_with(&self.options)).await?
            }
        };
        let query = sqlx::raw_sql(AssertSqlSafe(sql)).fetch_all(&mut connection);
        let rows = with_timeout(limit, query).await?;
        *self.idle.lock().unwrap_or_else(PoisonError::into_inner) = Some(connection);
        Ok(rows)
    }

    /// Closes the connection if there is one.
    pub(super) async fn close(&self) {
        let idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(connection) = idle {
            let _ = with_timeout(ACQUIRE_TIMEOUT, connection.close()).await;
        }
    }
}
