//! The store in a schema of a PostgreSQL database: its connections, and what this process knows of the log's end.

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

/// The store in a schema of a PostgreSQL database.
pub(in crate::store) struct PostgresStore {
    pub(super) target: PgTarget,
    pub(super) pool: PgPool,
    pub(super) begin_statements: BeginStatements,
    pub(super) replica_connections: ReplicaConnections,
    /// Where the log ended when this process last saw it. Whoever finds another end without having moved it has
    /// another history before it: a standby that lacked commits, or a backup.
    pub(super) known_head: Mutex<Option<LogHead>>,
    pub(super) seen_servers: SeenServers,
}

impl std::fmt::Debug for PostgresStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PostgresStore").field("database", &self.target.display_name).finish_non_exhaustive()
    }
}

impl PostgresStore {
    /// A store without a connection yet; `synchronous_commit` is the durability of its transactions.
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

    /// Runs `work` in a transaction. It is ended by what `work` says, `COMMIT` or `ROLLBACK`.
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

    /// Begins a transaction, with `statements` in the same message; gives their rows.
    pub(super) async fn begin_with(
        &self,
        begins: &str,
        statements: &[String],
    ) -> PgResult<(PgTransaction, Vec<Vec<TextRow>>)> {
        // What begins is two statements, of which the second says which server it is.
        const BEGIN_ANSWERS: usize = 2;
        let message =
            statements.iter().fold(begins.to_owned(), |message, statement| message + "; " + statement);
        let (session, mut answers) = begin_transaction(&self.pool, &message).await?;
        let rest = answers.split_off(BEGIN_ANSWERS.min(answers.len()));
        let row = answers.get(1).and_then(|rows| rows.first()).ok_or(sqlx::Error::RowNotFound)?;
        self.seen_servers.record(row.int(0)?, Instant::now());
        Ok((session, rest))
    }

    /// Another transaction on the same server that sees what one does that is open. None where that cannot be: all
    /// connections are in use, or another server answers this time. It only saves time.
    pub(super) async fn begin_same_snapshot(&self, snapshot: &str, server: i64) -> Option<PgTransaction> {
        // Which server it is is said by the statement after the two that begin.
        const SERVER_ANSWER: usize = 2;
        // This statement takes nothing but plain text between its quotes.
        let plain = snapshot.bytes().all(|byte| byte.is_ascii_hexdigit() || byte == b'-');
        let same = plain.then(|| format!("; SET TRANSACTION SNAPSHOT '{snapshot}'; "))?;
        match with_timeout(
            SECOND_SESSION_TIMEOUT,
            begin_transaction(&self.pool, &self.begin_statements.repeatable_read.replacen("; ", &same, 1)),
        )
        .await
        {
            // The number of a snapshot says nothing on another server.
            Ok((session, answers)) => {
                let says = answers.get(SERVER_ANSWER).and_then(|rows| rows.first()?.int(0).ok());
                (says == Some(server)).then_some(session)
            }
            Err(error) => {
                tracing::debug!(error = &error as &dyn std::error::Error, "the keys are read by one session");
                None
            }
        }
    }

    /// Where the log ended when this process last saw it.
    pub(super) fn known_head(&self) -> MutexGuard<'_, Option<LogHead>> {
        self.known_head.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Holds that the database's log is what this process has seen of it, or goes on from there. `locked` are the answers
    /// to [`lock_head_statements`].
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
            // Nothing was there, and the log keeps no row of it.
            None => known.revision == Revision::default(),
        };
        if linked && head.revision >= known.revision {
            return Ok(head);
        }
        tracing::error!(
            known = known.revision.0,
            found = head.revision.0,
            "the database has another history than this process has seen: was a backup restored, or did a standby \
             take over that lacked commits? Nothing is built on it; what was acknowledged last may be lost"
        );
        Err(sqlx::Error::Protocol("the database has another history than this process has seen".to_owned()))
    }
}

/// Locks the head, so that batches come one after the other; and asks for the hash where this process knows it.
pub(super) fn lock_head_statements(known: Option<LogHead>) -> [String; 2] {
    let known = known.map_or(0, |known| revision_to_i64(known.revision));
    [
        "SELECT head, head_hash FROM meta FOR UPDATE".to_owned(),
        format!("SELECT hash FROM log WHERE revision = {}", known.to_sql_literal()),
    ]
}
