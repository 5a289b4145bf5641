//! Transactions on pooled connections: how one begins, and messages of several statements.
//!
//! A transaction leaves nothing behind in its session. So the settings of a transaction (schema, time limits, durability)
//! are sent with `BEGIN`, in the same round trip.

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

/// A statement without a name: one with a name would stay in the session.
pub(super) fn unnamed_query(sql: &'static str) -> sqlx::query::Query<'static, PgDatabase, PgArguments> {
    sqlx::query(sql).persistent(false)
}

/// Connections for all but the replicas' own lines. None is made yet.
pub(super) fn build_pool(place: &PgTarget) -> PgPool {
    PgPoolOptions::new()
        .max_connections(MAX_CONNECTIONS)
        .acquire_timeout(ACQUIRE_TIMEOUT)
        // `begin` finds out for less.
        .test_before_acquire(false)
        .connect_lazy_with(place.options.clone())
}

/// How transactions begin. All of them may write: a standby refuses those, and what it says may be old. Nothing here is
/// worth compiling: where the server guesses a table's size wrong, that takes longer than all of it.
pub(super) struct BeginStatements {
    pub(super) read_committed: String,
    /// Of the replicas' lines and of bulk reads. What stands in functions is planned once and for any values; whatever the server knew of
    /// the tables by then, it goes by their indices.
    pub(super) dedicated: String,
    pub(super) repeatable_read: String,
}

impl BeginStatements {
    pub(super) fn new(schema: &str, durable: &str) -> Self {
        let begin = |isolation: &str, limit: Duration| {
            let limit = limit.as_millis();
            let path = format!("\"{schema}\"").to_sql_literal();
            format!(
                "BEGIN ISOLATION LEVEL {isolation} READ WRITE; SELECT {SERVER_START_TIME}, set_config('search_path', {path}, true), \
                 set_config('synchronous_commit', '{durable}', true), set_config('statement_timeout', '{limit}', true), \
                 set_config('idle_in_transaction_session_timeout', '{limit}', true), set_config('jit', 'off', true)"
            )
        };
        let one = begin("READ COMMITTED", CALL_TIMEOUT);
        let line = format!(
            "{one}, set_config('plan_cache_mode', 'force_generic_plan', true), \
             set_config('enable_seqscan', 'off', true)"
        );
        BeginStatements {
            read_committed: one,
            dedicated: line,
            repeatable_read: begin("REPEATABLE READ", 4 * NEXT_ROW_TIMEOUT),
        }
    }
}

/// A connection with a transaction. Whoever fails or is given up in the middle leaves it in an unknown state: then it
/// is closed, and the server ends the transaction.
pub(super) struct PgTransaction {
    connection: PoolConnection<PgDatabase>,
    pub(super) finished: bool,
}

impl PgTransaction {
    pub(super) fn connection(&mut self) -> &mut PgConnection {
        &mut self.connection
    }

    /// Ends the transaction with a message that ends with `COMMIT` or `ROLLBACK`; others may have the connection then.
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

/// Begins a transaction with this message; gives the rows of its statements, which change nothing. A connection that died
/// while it was idle shows here, before anything was changed, and another takes its place.
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

/// Sends a message of several statements; gives the rows of each of them.
pub(super) async fn fetch_statement_rows(
    connection: &mut PgConnection,
    sql: String,
) -> PgResult<Vec<Vec<TextRow>>> {
    let mut said = sqlx::raw_sql(AssertSqlSafe(sql)).fetch_many(connection);
    let (mut answers, mut rows) = (Vec::new(), Vec::new());
    while let Some(next) = said.try_next().await? {
        match next {
            Either::Left(_done) => answers.push(std::mem::take(&mut rows)),
            Either::Right(row) => rows.push(TextRow::from_pg_row(&row, 0..row.len())?),
        }
    }
    Ok(answers)
}
