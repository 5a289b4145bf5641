//! The store in a schema of a PostgreSQL database: its connections, and the end of the log as this process knows it.

use std::sync::{Mutex, MutexGuard, PoisonError};

use sqlx::{PgConnection, PgPool};
use tokio::time::Instant;

use crate::{
    domain::time::Revision,
    store::{
        LogHead,
        row_decoding::{RowColumns as _, decode_head},
        row_format::revision_to_i64,
    },
};

use super::{
    errors::PgResult,
    replica_connections::ReplicaConnections,
    server_identity::SeenServers,
    sql_literal::SqlLiteral as _,
    target::PgTarget,
    text_row::TextRow,
    timeouts::{CALL_TIMEOUT, SECOND_SESSION_TIMEOUT, with_timeout},
    transaction::{BeginStatements, PgTransaction, begin_transaction, build_pool},
};

/// A store in one schema of a PostgreSQL database.
pub(in crate::store) struct PostgresStore {
    pub(super) target: PgTarget,
    pub(super) pool: PgPool,
    pub(super) begin_statements: BeginStatements,
    pub(super) replica_connections: ReplicaConnections,
    /// The end of the log when this process last saw it. If the log does not continue from there, its history was
    /// replaced: by a backup, or by a standby that lacked commits.
    pub(super) known_head: Mutex<Option<LogHead>>,
    pub(super) seen_servers: SeenServers,
}

impl std::fmt::Debug for PostgresStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PostgresStore").field("database", &self.target.display_name).finish_non_exhaustive()
    }
}

impl PostgresStore {
    /// A store that has not connected yet; `synchronous_commit` is the durability of its transactions.
    pub(super) fn new(target: PgTarget, synchronous_commit: &str) -> PostgresStore {
        PostgresStore {
            pool: build_pool(&target),
            begin_statements: BeginStatements::new(&target.schema, synchronous_commit),
            replica_connections: ReplicaConnections::new(&target),
            known_head: Mutex::default(),
            seen_servers: SeenServers::default(),
            target,
        }
    }

    /// Runs `work` in a transaction, and ends it with the statement that `work` returns: `COMMIT` or `ROLLBACK`.
    pub(super) async fn transaction<T>(
        &self,
        work: impl AsyncFnOnce(&mut PgConnection) -> PgResult<(T, &'static str)>,
    ) -> PgResult<T> {
        let (mut session, _) = self.begin_with(&self.begin_statements.read_committed, &[]).await?;
        with_timeout(CALL_TIMEOUT, async {
            let (value, ending) = work(session.connection()).await?;
            session.finish(ending).await?;
            Ok(value)
        })
        .await
    }

    /// Begins a transaction, with `statements` in the same message. Returns their rows.
    pub(super) async fn begin_with(
        &self,
        begin_statement: &str,
        statements: &[String],
    ) -> PgResult<(PgTransaction, Vec<Vec<TextRow>>)> {
        // The message begins with two statements; the second returns the identity of the server.
        const BEGIN_ANSWERS: usize = 2;
        let message = statements
            .iter()
            .fold(begin_statement.to_owned(), |message, statement| message + "; " + statement);
        let (session, mut answers) = begin_transaction(&self.pool, &message).await?;
        let rest = answers.split_off(BEGIN_ANSWERS.min(answers.len()));
        let row = answers.get(1).and_then(|rows| rows.first()).ok_or(sqlx::Error::RowNotFound)?;
        self.seen_servers.record(row.int(0)?, Instant::now());
        Ok((session, rest))
    }

    /// Another transaction on the same server with the same snapshot as an open one. `None` if that is impossible: all
    /// connections are in use, or another server answers. It only saves time.
    pub(super) async fn begin_same_snapshot(&self, snapshot: &str, server: i64) -> Option<PgTransaction> {
        // The statement that returns the identity of the server follows the two that begin.
        const SERVER_ANSWER: usize = 2;
        // This statement accepts no escapes between its quotes.
        let plain = snapshot.bytes().all(|byte| byte.is_ascii_hexdigit() || byte == b'-');
        let same = plain.then(|| format!("; SET TRANSACTION SNAPSHOT '{snapshot}'; "))?;
        match with_timeout(
            SECOND_SESSION_TIMEOUT,
            begin_transaction(&self.pool, &self.begin_statements.repeatable_read.replacen("; ", &same, 1)),
        )
        .await
        {
            // The id of a snapshot is meaningless on another server.
            Ok((session, answers)) => {
                let answered_by = answers.get(SERVER_ANSWER).and_then(|rows| rows.first()?.int(0).ok());
                (answered_by == Some(server)).then_some(session)
            }
            Err(error) => {
                tracing::debug!(
                    error = &error as &dyn std::error::Error,
                    "no second session: one session reads the keys"
                );
                None
            }
        }
    }

    pub(super) fn known_head(&self) -> MutexGuard<'_, Option<LogHead>> {
        self.known_head.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Verifies that the log of the database continues from `known`. `locked` are the answers to
    /// [`lock_head_statements`]. Returns the end of the log.
    pub(super) fn verify_continuity(
        &self,
        known: Option<LogHead>,
        locked: &[Vec<TextRow>],
    ) -> PgResult<LogHead> {
        let [heads, links] = locked else { return Err(sqlx::Error::RowNotFound) };
        let head = heads.first().ok_or(sqlx::Error::RowNotFound)?;
        let head = decode_head(head).map_err(|error| sqlx::Error::Decode(Box::new(error)))?;
        let Some(known) = known else { return Ok(head) };
        let linked = match links.first() {
            Some(row) => row.bytes(0)? == known.hash.as_slice(),
            // The empty log has no row.
            None => known.revision == Revision::default(),
        };
        if linked && head.revision >= known.revision {
            return Ok(head);
        }
        tracing::error!(
            known = known.revision.0,
            found = head.revision.0,
            "the database has another history than this process has seen: was a backup restored, or did a standby \
             take over that lacked commits? Nothing is written; the last acknowledged changes may be lost"
        );
        Err(sqlx::Error::Protocol("the database has another history than this process has seen".to_owned()))
    }
}

/// Locks the head, so that batches commit one after the other, and selects the hash of the entry that this process
/// knows.
pub(super) fn lock_head_statements(known: Option<LogHead>) -> [String; 2] {
    let known = known.map_or(0, |known| revision_to_i64(known.revision));
    [
        "SELECT head, head_hash FROM meta FOR UPDATE".to_owned(),
        format!("SELECT hash FROM log WHERE revision = {}", known.to_sql_literal()),
    ]
}
