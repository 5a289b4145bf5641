//! [`StoreBackend`] on PostgreSQL: batches, snapshots, usage and archiving.
//!
//! A batch locks the row of `meta`, so batches of all processes commit in the order of their revisions. `pre_state.rs`
//! reads in the message that locks, `write_plan.rs` decides, and `write.rs` writes in the message that commits.

use std::sync::Arc;

use async_trait::async_trait;
use sqlx::Postgres as PgDatabase;
use tokio::time::Instant;

use crate::{
    domain::{
        limit::QuotaUsage,
        name::KeyId,
        time::{Revision, Timestamp},
    },
    store::{
        ArchiveCheckpoint, BulkReader, CommitError, CommittedBatch, LogHead, SnapshotLoader, StoreError,
        UsageBatch, UsageHour, WriteRequest,
        backend::{self, EntryVisitor, StoreBackend},
        queries::SqlQuery,
        replica_registry::ReplicaRegistry,
        row_decoding::{LOG_COLUMNS, RowColumns as _, decode_log_entry, decode_quota_usage},
        row_format::revision_to_i64,
        write_plan::{self, PreStateQuery},
    },
};

use super::{
    bulk::PgBulkReader,
    copy_reader::copy_rows,
    errors::{PgResult, is_commit_refused, store_error},
    pre_state,
    server_identity::SERVER_START_TIME,
    snapshot_view::PgSnapshotView,
    store::{PostgresStore, lock_head_statements},
    text_row::TextRow,
    timeouts::{CALL_TIMEOUT, with_timeout},
    transaction::{fetch_statement_rows, unnamed_query},
    write,
};

impl PostgresStore {
    /// Writes the accepted writes of a batch. Sets `committing` before it sends the message with the COMMIT.
    async fn write_batch(&self, batch: &[WriteRequest], committing: &mut bool) -> PgResult<CommittedBatch> {
        let mut committed = CommittedBatch::default();
        let mut runs = write_plan::split_into_runs(batch).into_iter();
        let Some(mut run) = runs.next() else { return Ok(committed) };
        let mut statements = pre_state::pre_state_statements(&PreStateQuery::from_writes(run));
        let known = *self.known_head();
        let message: Vec<_> =
            lock_head_statements(known).into_iter().chain(statement_texts(&statements)).collect();
        let (mut session, mut locked) =
            self.begin_with(&self.begin_statements.read_committed, &message).await?;
        let mut answers = locked.split_off(2.min(locked.len()));
        // Other processes may have written, but nothing may be written on top of another history.
        let mut head = self.verify_continuity(known, &locked)?;
        let mut script = Vec::new();
        loop {
            let state = pre_state::read_pre_state(&statements, &answers)?;
            let plan = write_plan::plan_run(run, state, head)
                .map_err(|error| sqlx::Error::Encode(Box::new(error)))?;
            write::write_run(&mut script, &plan);
            head = plan.head;
            committed.outcomes.extend(plan.committed.outcomes);
            committed.entries.extend(plan.committed.entries);
            let Some(next) = runs.next() else { break };
            run = next;
            statements = pre_state::pre_state_statements(&PreStateQuery::from_writes(run));
            let written = script.len();
            script.extend(statement_texts(&statements));
            answers =
                fetch_statement_rows(session.connection(), std::mem::take(&mut script).join("; ")).await?;
            answers.drain(..written.min(answers.len()));
        }
        if committed.entries.is_empty() {
            session.finish("ROLLBACK").await?;
            return Ok(committed);
        }
        write::update_head(&mut script, head, self.target.commit_channel());
        script.push("COMMIT".to_owned());
        *committing = true;
        self.replica_connections.set_own_commit(Some(head.revision));
        session.finish(script.join("; ")).await?;
        Ok(committed)
    }
}

fn statement_texts(statements: &[pre_state::PreStateStatement]) -> impl Iterator<Item = String> {
    statements.iter().map(|(text, _)| text.clone())
}

#[async_trait]
impl StoreBackend for PostgresStore {
    type QueryDatabase = PgDatabase;
    type QueryRow = TextRow;

    async fn fetch_rows(&self, query: SqlQuery<PgDatabase>) -> Result<Vec<TextRow>, StoreError> {
        let (sql, _) = query.into_parts();
        let message = [sql, "COMMIT".to_owned()];
        let (mut session, answers) =
            self.begin_with(&self.begin_statements.read_committed, &message).await.map_err(store_error)?;
        session.finished = true;
        Ok(answers.into_iter().next().unwrap_or_default())
    }

    fn bulk(&self, _: u64) -> Box<dyn BulkReader + '_> {
        Box::new(PgBulkReader::new(self))
    }

    async fn for_each_entry(&self, after: Revision, take: EntryVisitor<'_>) -> Result<(), StoreError> {
        let (mut session, _) =
            self.begin_with(&self.begin_statements.repeatable_read, &[]).await.map_err(store_error)?;
        let after = revision_to_i64(after);
        let sql = format!("SELECT {LOG_COLUMNS} FROM log WHERE revision > {after} ORDER BY revision");
        copy_rows(session.connection(), &sql, &mut |row| take(decode_log_entry(row)?)).await?;
        with_timeout(CALL_TIMEOUT, session.finish("COMMIT")).await.map_err(store_error)
    }

    async fn commit_batch(&self, batch: &[WriteRequest]) -> Result<CommittedBatch, CommitError> {
        let mut committing = false;
        let result = with_timeout(CALL_TIMEOUT, self.write_batch(batch, &mut committing)).await;
        if let Ok(committed) = &result
            && let Some((row, _)) = committed.entries.last()
        {
            *self.known_head() = Some(LogHead { revision: row.revision, hash: row.hash });
        }
        result.map_err(|error| {
            // Another process may commit this revision.
            self.replica_connections.set_own_commit(None);
            if committing && !is_commit_refused(&error) {
                CommitError::Unknown(store_error(error))
            } else {
                CommitError::NotRecorded(store_error(error))
            }
        })
    }

    async fn load_snapshot(
        &self,
        forget_before: Timestamp,
        loader: &Arc<dyn SnapshotLoader>,
    ) -> Result<LogHead, StoreError> {
        let export = [format!(
            "SELECT pg_export_snapshot(), reltuples::bigint, {SERVER_START_TIME} FROM pg_class WHERE oid = 'secrets'::regclass"
        )];
        let (session, answers) =
            self.begin_with(&self.begin_statements.repeatable_read, &export).await.map_err(store_error)?;
        let mut second = None;
        if let Some(row) = answers.first().and_then(|rows| rows.first()) {
            let server = row.int(2).map_err(store_error)?;
            second = self.begin_same_snapshot(row.text(0).map_err(store_error)?, server).await;
            // The estimate of the last ANALYZE, if there was one.
            loader.reserve_secrets(
                row.int(1).ok().and_then(|count| usize::try_from(count).ok()).unwrap_or_default(),
            );
        }
        let mut view = PgSnapshotView { session: Some(session), second_session: second };
        let head = backend::read_snapshot(&mut view, forget_before, loader).await?;
        if let Some(session) = view.session {
            with_timeout(CALL_TIMEOUT, session.finish("COMMIT")).await.map_err(store_error)?;
        }
        self.known_head().get_or_insert(head);
        Ok(head)
    }

    async fn write_usage(&self, batch: &UsageBatch) -> Result<Vec<(KeyId, QuotaUsage)>, StoreError> {
        let rows =
            self.transaction(async |connection| Ok((write::write_usage(connection, batch).await?, "COMMIT")));
        rows.await.map_err(store_error)?.iter().map(decode_quota_usage).collect()
    }

    async fn delete_usage_rows(&self, before: UsageHour) -> Result<(), StoreError> {
        self.transaction(async |connection| {
            let dropped =
                unnamed_query("DELETE FROM usage WHERE hour < $1").bind(before.0).execute(connection);
            Ok((dropped.await.map(drop)?, "COMMIT"))
        })
        .await
        .map_err(store_error)
    }

    async fn insert_checkpoint(&self, checkpoint: &ArchiveCheckpoint) -> Result<(), StoreError> {
        self.transaction(async |connection| {
            Ok((write::insert_checkpoint(connection, checkpoint).await?, "COMMIT"))
        })
        .await
        .map_err(store_error)
    }

    async fn delete_log_entries(&self, up_to: Revision, limit: u32) -> Result<u64, StoreError> {
        self.transaction(async |connection| {
            Ok((write::delete_log_entries(connection, up_to, limit).await?, "COMMIT"))
        })
        .await
        .map_err(store_error)
    }

    fn as_replica_registry(self: Arc<Self>) -> Option<Arc<dyn ReplicaRegistry>> {
        Some(self)
    }

    async fn wait_until_lost(&self) {
        // Data is verified whenever it is read.
        std::future::pending().await
    }

    /// A commit whose answer was lost holds the lock on the head until it is decided; so this waits for it.
    async fn resolve_pending_commits(&self) -> Result<(), StoreError> {
        let known = *self.known_head();
        let head = self
            .transaction(async |connection| {
                let locked = fetch_statement_rows(connection, lock_head_statements(known).join("; ")).await?;
                let head = self.verify_continuity(known, &locked)?;
                Ok((head, "ROLLBACK"))
            })
            .await
            .map_err(store_error)?;
        *self.known_head() = Some(head);
        Ok(())
    }

    fn has_single_server_since(&self, since: Instant) -> bool {
        self.seen_servers.is_single_since(since)
    }

    async fn shutdown(&self) {
        self.replica_connections.close().await;
        self.pool.close().await;
    }
}
