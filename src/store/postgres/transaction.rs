//! Begins transactions on pooled connections, and sends messages of several statements.
//!
//! A transaction leaves nothing behind in its session. So its settings (schema, time limits, durability) are sent with
//! `BEGIN`, in the same round trip.

use std::time::Duration;

use futures_util::TryStreamExt as _;
use sqlx::{
    AssertSqlSafe, Either, PgConnection, PgPool, Postgres as PgDatabase, Row as _,
    pool::PoolConnection,
    postgres::{PgArguments, PgPoolOptions},
};

use super::{
    errors::{PgResult, is_connection_lost},
    server_identity::SERVER_START_TIME,
    sql_literal::SqlLiteral as _,
    target::PgTarget,
    text_row::TextRow,
    timeouts::{ACQUIRE_TIMEOUT, CALL_TIMEOUT, NEXT_ROW_TIMEOUT, with_timeout},
};

const MAX_CONNECTIONS: u32 = 6;

/// A statement without a name: a named one would stay in the session.
pub(super) fn unnamed_query(sql: &'static str) -> sqlx::query::Query<'static, PgDatabase, PgArguments> {
    sqlx::query(sql).persistent(false)
}

/// The pool for everything but the dedicated connections of replicas. It connects lazily.
pub(super) fn build_pool(target: &PgTarget) -> PgPool {
    PgPoolOptions::new()
        .max_connections(MAX_CONNECTIONS)
        .acquire_timeout(ACQUIRE_TIMEOUT)
        // `begin_transaction` detects dead connections at no extra cost.
        .test_before_acquire(false)
        .connect_lazy_with(target.options.clone())
}

/// The statements that begin transactions. All of them are read-write: a standby rejects these, and its data may be
/// old. JIT is off: if the server overestimates a table, compiling takes longer than any query here.
pub(super) struct BeginStatements {
    pub(super) read_committed: String,
    /// For dedicated connections and bulk reads. Functions are planned once, for any values; sequential scans are off,
    /// whatever the statistics were at that time.
    pub(super) dedicated: String,
    pub(super) repeatable_read: String,
}

impl BeginStatements {
    pub(super) fn new(schema: &str, synchronous_commit: &str) -> Self {
        let begin = |isolation: &str, limit: Duration| {
            let limit = limit.as_millis();
            let path = format!("\"{schema}\"").to_sql_literal();
            format!(
                "BEGIN ISOLATION LEVEL {isolation} READ WRITE; SELECT {SERVER_START_TIME}, set_config('search_path', {path}, true), \
                 set_config('synchronous_commit', '{synchronous_commit}', true), set_config('statement_timeout', '{limit}', true), \
                 set_config('idle_in_transaction_session_timeout', '{limit}', true), set_config('jit', 'off', true)"
            )
        };
        let read_committed = begin("READ COMMITTED", CALL_TIMEOUT);
        let dedicated = format!(
            "{read_committed}, set_config('plan_cache_mode', 'force_generic_plan', true), \
             set_config('enable_seqscan', 'off', true)"
        );
        BeginStatements {
            read_committed,
            dedicated,
            repeatable_read: begin("REPEATABLE READ", 4 * NEXT_ROW_TIMEOUT),
        }
    }
}

/// A connection with an open transaction. If the transaction does not finish (an error, or a dropped future), its state
/// is unknown: the connection is closed, and the server rolls back.
pub(super) struct PgTransaction {
    connection: PoolConnection<PgDatabase>,
    pub(super) finished: bool,
}

impl PgTransaction {
    pub(super) fn connection(&mut self) -> &mut PgConnection {
        &mut self.connection
    }

    /// Sends a message that ends with `COMMIT` or `ROLLBACK`, and returns the connection to the pool.
    pub(super) async fn finish(mut self, ending: impl Into<String>) -> PgResult<()> {
        sqlx::raw_sql(AssertSqlSafe(ending.into())).execute(self.connection()).await?;
        self.finished = true;
        Ok(())
    }
}

impl Drop for PgTransaction {
    fn drop(&mut self) {
        if !self.finished {
            self.connection.close_on_drop();
        }
    }
}

/// Begins a transaction with this message, whose statements must not change anything. Returns the rows of each
/// statement. A connection that died while idle is detected here, before any change, and replaced.
pub(super) async fn begin_transaction(
    pool: &PgPool,
    message: &str,
) -> PgResult<(PgTransaction, Vec<Vec<TextRow>>)> {
    let mut tries = MAX_CONNECTIONS + 1;
    loop {
        let mut session = PgTransaction { connection: pool.acquire().await?, finished: false };
        let error =
            match with_timeout(CALL_TIMEOUT, fetch_statement_rows(session.connection(), message.to_owned()))
                .await
            {
                Ok(answers) => return Ok((session, answers)),
                Err(error) => error,
            };
        tries -= 1;
        if tries == 0 || !is_connection_lost(&error) {
            return Err(error);
        }
    }
}

/// Sends a message of several statements. Returns the rows of each.
pub(super) async fn fetch_statement_rows(
    connection: &mut PgConnection,
    sql: String,
) -> PgResult<Vec<Vec<TextRow>>> {
    let mut results = sqlx::raw_sql(AssertSqlSafe(sql)).fetch_many(connection);
    let (mut answers, mut rows) = (Vec::new(), Vec::new());
    while let Some(next) = results.try_next().await? {
        match next {
            Either::Left(_done) => answers.push(std::mem::take(&mut rows)),
            Either::Right(row) => rows.push(TextRow::from_pg_row(&row, 0..row.len())?),
        }
    }
    Ok(answers)
}
