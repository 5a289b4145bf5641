//! The store on a PostgreSQL server: tables in a schema of their own, which any number of processes write.
//!
//! Everything is a transaction, a single read too, and no transaction leaves anything behind in its session: so it
//! works through pgbouncer in transaction mode, where the next transaction may meet another session. A read is one
//! message, its transaction around it, with its values written out (`to_sql_literal.rs`). Where sqlx binds values it sends a
//! statement in two steps (parse, then execute), which only a transaction keeps in one session; a statement with a name
//! would stay in a session after it, so statements have none. What a session would be told once (the schema, time
//! limits, durability) is told with `BEGIN`, in the same round trip, which also says what server it is (`sources.rs`).
//!
//! A batch locks the row of `meta`, so that batches commit in the order of their revisions whoever sends them. It
//! is decided in `plan.rs` from what `facts.rs` asks in the message that locks, and written by `write.rs` in the message
//! that commits. What makes many processes one service
//! is `fleet.rs`, over connections of its own (`line.rs`); what the server must be is `doctor.rs`, the tables come from
//! `migrate.rs`; the reads are in `backend.rs`, those of all keys in `read_snapshot.rs`.

mod bulk;
mod copy_reader;
mod dedicated_connection;
mod errors;
mod inspect;
mod migrate;
mod pre_state;
mod replica_registry;
mod server_check;
mod server_identity;
mod snapshot;
mod sql_literal;
mod target;
mod write;

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use futures_util::TryStreamExt as _;
use sqlx::{
    AssertSqlSafe, Connection as _, PgConnection, PgPool, Postgres as Db,
    pool::PoolConnection,
    postgres::{PgArguments, PgPoolOptions},
};
use tokio::{task::JoinSet, time::Instant};

use crate::domain::{
    limit::QuotaUsage,
    name::KeyId,
    time::{Revision, Timestamp},
};

use super::{
    ArchiveCheckpoint, BulkReader, CommitError, CommittedBatch, LogHead, MigrationStep, OpenError,
    SchemaPolicy, SnapshotLoader, StoreError, UsageBatch, UsageHour, WriteRequest,
    backend::{self, EntryVisitor, RowVisitor, SnapshotView, StoreBackend},
    queries::SqlQuery,
    replica_registry::ReplicaRegistry,
    row_decoding::{LOG_COLUMNS, RowColumns as _, decode_head, decode_log_entry, decode_quota_usage},
    row_format::revision_to_i64,
    write_plan::{self, PreStateQuery},
};

use bulk::PgBulkReader;
use copy_reader::copy_rows;
use dedicated_connection::TextRow;
use errors::{as_server_error, is_commit_refused, is_connection_lost, is_transient, store_error};
pub(super) use inspect::inspect;
use replica_registry::ReplicaConnections;
use server_identity::{SERVER_START_TIME, SeenServers};
use snapshot::{ScanDirection, UnreadKeyRange};
use sql_literal::SqlLiteral as _;
use target::PgTarget;

type PgResult<T> = std::result::Result<T, sqlx::Error>;

/// How long one transaction may take, waiting for the lock included. The server is told the same, so that it does
/// not go on without us.
const CALL_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a second session may take to be had for reading the keys: they can be read by one.
const SECOND_SESSION_TIMEOUT: Duration = Duration::from_secs(3);
/// How long a free connection may take to be had.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a snapshot may wait for its next row.
const NEXT_ROW_TIMEOUT: Duration = Duration::from_secs(30);
const MAX_CONNECTIONS: u32 = 6;

/// A statement without a name: one with a name would stay in the session.
fn unnamed_query(sql: &'static str) -> sqlx::query::Query<'static, Db, PgArguments> {
    sqlx::query(sql).persistent(false)
}

/// Runs `work` for so long at the most: a server that has vanished says nothing.
async fn with_timeout<T>(limit: Duration, work: impl Future<Output = PgResult<T>>) -> PgResult<T> {
    tokio::time::timeout(limit, work).await.unwrap_or_else(|_| {
        let said = format!("the database did not answer within {} s", limit.as_secs());
        Err(sqlx::Error::Io(std::io::Error::new(std::io::ErrorKind::TimedOut, said)))
    })
}

/// How transactions begin. All of them may write: a standby refuses those, and what it says may be old. Nothing here is
/// worth compiling: where the server guesses a table's size wrong, that takes longer than all of it.
struct BeginStatements {
    read_committed: String,
    /// Of the replicas' lines and of bulk reads. What stands in functions is planned once and for any values; whatever the server knew of
    /// the tables by then, it goes by their indices.
    dedicated: String,
    repeatable_read: String,
}

impl BeginStatements {
    fn new(schema: &str, durable: &str) -> Self {
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

/// The store in a schema of a PostgreSQL database.
pub(super) struct PostgresStore {
    target: PgTarget,
    pool: PgPool,
    begin_statements: BeginStatements,
    replica_connections: ReplicaConnections,
    /// Where the log ended when this process last saw it. Whoever finds another end without having moved it has
    /// another history before it: a standby that lacked commits, or a backup.
    known_head: Mutex<Option<LogHead>>,
    seen_servers: SeenServers,
}

impl std::fmt::Debug for PostgresStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PostgresStore").field("database", &self.target.display_name).finish_non_exhaustive()
    }
}

/// Whether the text of a URL names a server, a database and a schema. Resolves nothing.
pub(super) fn check_url(url: &str) -> std::result::Result<(), OpenError> {
    PgTarget::parse(url).map(drop)
}

impl PostgresStore {
    /// Connects to the server that `url` names, checks it, migrates the schema and checks it.
    ///
    /// # Errors
    /// When it cannot be reached or trusted, is damaged or newer than this program.
    pub(super) async fn open(
        url: &str,
        schema: SchemaPolicy,
    ) -> std::result::Result<PostgresStore, OpenError> {
        let place = PgTarget::parse(url)?;
        let pool = build_pool(&place);
        let durable = PostgresStore::check_connection(&place).await?;
        let begins = BeginStatements::new(&place.schema, durable);
        migrate::run_migrations(&place, &pool, schema.into()).await?;
        let fleet = ReplicaConnections::new(&place);
        let store = PostgresStore {
            target: place,
            pool,
            begin_statements: begins,
            replica_connections: fleet,
            known_head: Mutex::default(),
            seen_servers: SeenServers::default(),
        };
        match backend::verify_newest_log(&store).await {
            Ok(()) => Ok(store),
            Err(StoreError::Damaged(what)) => {
                Err(OpenError::Damaged { path: store.target.display_name, what })
            }
            Err(error) => {
                Err(OpenError::Unreachable { path: store.target.display_name, source: error.into() })
            }
        }
    }

    /// Connects to the server, and sees that it can be trusted. Gives the durability that its transactions need.
    async fn check_connection(place: &PgTarget) -> std::result::Result<&'static str, OpenError> {
        // Not from the pool, which would try again until its time is over and forget why it failed.
        let connecting = PgConnection::connect_with(&place.options);
        let connected = with_timeout(ACQUIRE_TIMEOUT, connecting).await;
        let mut connection = connected.map_err(|error| open_error(place, error))?;
        let durable = server_check::check_server(place, &mut connection).await?;
        let _ = with_timeout(CALL_TIMEOUT, connection.close()).await;
        Ok(durable)
    }

    /// Brings the schema up to date, or only says what that would do. Gives the steps.
    ///
    /// # Errors
    /// As [`PostgresStore::open`].
    pub(super) async fn migrate(
        url: &str,
        dry_run: bool,
    ) -> std::result::Result<Vec<MigrationStep>, OpenError> {
        let place = PgTarget::parse(url)?;
        PostgresStore::check_connection(&place).await?;
        let pool = build_pool(&place);
        let what = if dry_run { migrate::PendingAction::Report } else { migrate::PendingAction::Apply };
        let steps = migrate::run_migrations(&place, &pool, what).await;
        pool.close().await;
        steps
    }

    /// Whether the server can be reached.
    ///
    /// # Errors
    /// When it cannot: [`OpenError::Unreachable`] where that may pass.
    pub(super) async fn check_reachable(url: &str) -> std::result::Result<(), OpenError> {
        let place = PgTarget::parse(url)?;
        let connecting = PgConnection::connect_with(&place.options);
        let connection =
            with_timeout(ACQUIRE_TIMEOUT, connecting).await.map_err(|error| open_error(&place, error))?;
        let _ = with_timeout(CALL_TIMEOUT, connection.close()).await;
        Ok(())
    }

    /// Runs `work` in a transaction. It is ended by what `work` says, `COMMIT` or `ROLLBACK`.
    async fn transaction<T>(
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
    async fn begin_with(
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
    async fn begin_same_snapshot(&self, snapshot: &str, server: i64) -> Option<PgTransaction> {
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
    fn known_head(&self) -> MutexGuard<'_, Option<LogHead>> {
        self.known_head.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Holds that the database's log is what this process has seen of it, or goes on from there. `locked` are the answers
    /// to [`lock_head_statements`].
    fn verify_continuity(&self, known: Option<LogHead>, locked: &[Vec<TextRow>]) -> PgResult<LogHead> {
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

    /// Writes what of the batch can be written. `committing` turns true before the message with the COMMIT.
    async fn write_batch(&self, batch: &[WriteRequest], committing: &mut bool) -> PgResult<CommittedBatch> {
        let mut committed = CommittedBatch::default();
        let mut runs = write_plan::split_into_runs(batch).into_iter();
        let Some(mut run) = runs.next() else { return Ok(committed) };
        let mut questions = pre_state::pre_state_statements(&PreStateQuery::from_writes(run));
        let known = *self.known_head();
        let asked: Vec<_> =
            lock_head_statements(known).into_iter().chain(statement_texts(&questions)).collect();
        let (mut session, mut locked) =
            self.begin_with(&self.begin_statements.read_committed, &asked).await?;
        let mut answers = locked.split_off(2.min(locked.len()));
        // Others write too; but nothing is built on another history.
        let mut head = self.verify_continuity(known, &locked)?;
        let mut script = Vec::new();
        loop {
            let facts = pre_state::read_pre_state(&questions, &answers)?;
            let plan = write_plan::plan_run(run, facts, head)
                .map_err(|error| sqlx::Error::Encode(Box::new(error)))?;
            write::write_run(&mut script, &plan);
            head = plan.head;
            committed.outcomes.extend(plan.committed.outcomes);
            committed.entries.extend(plan.committed.entries);
            let Some(next) = runs.next() else { break };
            run = next;
            questions = pre_state::pre_state_statements(&PreStateQuery::from_writes(run));
            let written = script.len();
            script.extend(statement_texts(&questions));
            answers = dedicated_connection::fetch_statement_rows(
                session.connection(),
                std::mem::take(&mut script).join("; "),
            )
            .await?;
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

/// Locks the head, so that batches come one after the other; and asks for the hash where this process knows it.
fn lock_head_statements(known: Option<LogHead>) -> [String; 2] {
    let known = known.map_or(0, |known| revision_to_i64(known.revision));
    [
        "SELECT head, head_hash FROM meta FOR UPDATE".to_owned(),
        format!("SELECT hash FROM log WHERE revision = {}", known.to_sql_literal()),
    ]
}

fn statement_texts(questions: &[pre_state::PreStateStatement]) -> impl Iterator<Item = String> {
    questions.iter().map(|(text, _)| text.clone())
}

/// Connections for all but the replicas' own lines. None is made yet.
fn build_pool(place: &PgTarget) -> PgPool {
    PgPoolOptions::new()
        .max_connections(MAX_CONNECTIONS)
        .acquire_timeout(ACQUIRE_TIMEOUT)
        // `begin` finds out for less.
        .test_before_acquire(false)
        .connect_lazy_with(place.options.clone())
}

/// A connection with a transaction. Whoever fails or is given up in the middle leaves it in an unknown state: then it
/// is closed, and the server ends the transaction.
struct PgTransaction {
    connection: PoolConnection<Db>,
    finished: bool,
}

impl PgTransaction {
    fn connection(&mut self) -> &mut PgConnection {
        &mut self.connection
    }

    /// Ends the transaction with a message that ends with `COMMIT` or `ROLLBACK`; others may have the connection then.
    async fn finish(mut self, ending: impl Into<String>) -> PgResult<()> {
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
async fn begin_transaction(pool: &PgPool, message: &str) -> PgResult<(PgTransaction, Vec<Vec<TextRow>>)> {
    let mut tries = MAX_CONNECTIONS + 1;
    loop {
        let mut session = PgTransaction { connection: pool.acquire().await?, finished: false };
        let error = match with_timeout(
            CALL_TIMEOUT,
            dedicated_connection::fetch_statement_rows(session.connection(), message.to_owned()),
        )
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

#[async_trait]
impl StoreBackend for PostgresStore {
    type QueryDatabase = Db;
    type QueryRow = TextRow;

    async fn fetch_rows(&self, query: SqlQuery<Db>) -> std::result::Result<Vec<TextRow>, StoreError> {
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

    async fn for_each_entry(
        &self,
        after: Revision,
        take: EntryVisitor<'_>,
    ) -> std::result::Result<(), StoreError> {
        let (mut session, _) =
            self.begin_with(&self.begin_statements.repeatable_read, &[]).await.map_err(store_error)?;
        let after = revision_to_i64(after);
        let sql = format!("SELECT {LOG_COLUMNS} FROM log WHERE revision > {after} ORDER BY revision");
        copy_rows(session.connection(), &sql, &mut |row| take(decode_log_entry(row)?)).await?;
        with_timeout(CALL_TIMEOUT, session.finish("COMMIT")).await.map_err(store_error)
    }

    async fn commit_batch(&self, batch: &[WriteRequest]) -> std::result::Result<CommittedBatch, CommitError> {
        let mut committing = false;
        let result = with_timeout(CALL_TIMEOUT, self.write_batch(batch, &mut committing)).await;
        if let Ok(committed) = &result
            && let Some((row, _)) = committed.entries.last()
        {
            *self.known_head() = Some(LogHead { revision: row.revision, hash: row.hash });
        }
        result.map_err(|error| {
            // Another may commit this revision.
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
    ) -> std::result::Result<LogHead, StoreError> {
        let export = [format!(
            "SELECT pg_export_snapshot(), reltuples::bigint, {SERVER_START_TIME} FROM pg_class WHERE oid = 'secrets'::regclass"
        )];
        let (session, answers) =
            self.begin_with(&self.begin_statements.repeatable_read, &export).await.map_err(store_error)?;
        let mut second = None;
        if let Some(row) = answers.first().and_then(|rows| rows.first()) {
            let server = row.int(2).map_err(store_error)?;
            second = self.begin_same_snapshot(row.text(0).map_err(store_error)?, server).await;
            // What the server last counted, if it ever did.
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

    async fn write_usage(
        &self,
        batch: &UsageBatch,
    ) -> std::result::Result<Vec<(KeyId, QuotaUsage)>, StoreError> {
        let rows =
            self.transaction(async |connection| Ok((write::write_usage(connection, batch).await?, "COMMIT")));
        rows.await.map_err(store_error)?.iter().map(decode_quota_usage).collect()
    }

    async fn delete_usage_rows(&self, before: UsageHour) -> std::result::Result<(), StoreError> {
        self.transaction(async |connection| {
            let dropped =
                unnamed_query("DELETE FROM usage WHERE hour < $1").bind(before.0).execute(connection);
            Ok((dropped.await.map(drop)?, "COMMIT"))
        })
        .await
        .map_err(store_error)
    }

    async fn insert_checkpoint(&self, checkpoint: &ArchiveCheckpoint) -> std::result::Result<(), StoreError> {
        self.transaction(async |connection| {
            Ok((write::insert_checkpoint(connection, checkpoint).await?, "COMMIT"))
        })
        .await
        .map_err(store_error)
    }

    async fn delete_log_entries(&self, upto: Revision, most: u32) -> std::result::Result<u64, StoreError> {
        self.transaction(async |connection| {
            Ok((write::delete_log_entries(connection, upto, most).await?, "COMMIT"))
        })
        .await
        .map_err(store_error)
    }

    fn as_replica_registry(self: Arc<Self>) -> Option<Arc<dyn ReplicaRegistry>> {
        Some(self)
    }

    async fn wait_until_lost(&self) {
        // What is read is checked when it is read.
        std::future::pending().await
    }

    /// A commit whose answer was lost holds the lock on the head until it is decided.
    async fn resolve_pending_commits(&self) -> std::result::Result<(), StoreError> {
        let known = *self.known_head();
        let head = self
            .transaction(async |connection| {
                let locked = dedicated_connection::fetch_statement_rows(
                    connection,
                    lock_head_statements(known).join("; "),
                )
                .await?;
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

/// One transaction's view.
struct PgSnapshotView {
    /// None while the keys are read, and after that has failed.
    session: Option<PgTransaction>,
    /// Another transaction that sees the same, until the keys have been read.
    second_session: Option<PgTransaction>,
}

impl PgSnapshotView {
    fn session(&mut self) -> std::result::Result<&mut PgTransaction, StoreError> {
        self.session.as_mut().ok_or_else(|| store_error(sqlx::Error::WorkerCrashed))
    }
}

#[async_trait]
impl SnapshotView for PgSnapshotView {
    type ViewDatabase = Db;

    async fn for_each_row(
        &mut self,
        query: SqlQuery<Db>,
        take: RowVisitor<'_, Db>,
    ) -> std::result::Result<(), StoreError> {
        let (sql, _) = query.into_parts();
        let query = sqlx::query(AssertSqlSafe(sql)).persistent(false);
        let mut rows = query.fetch(self.session()?.connection());
        while let Some(row) = with_timeout(NEXT_ROW_TIMEOUT, rows.try_next()).await.map_err(store_error)? {
            take(&row)?;
        }
        Ok(())
    }

    /// Reads on tasks of its own, which end if this is given up; their connections are closed then.
    async fn load_keys(
        &mut self,
        forget_before: Timestamp,
        loader: &Arc<dyn SnapshotLoader>,
    ) -> std::result::Result<(), StoreError> {
        self.session()?;
        let (mut tasks, rest) = (JoinSet::new(), Arc::new(UnreadKeyRange::full()));
        let sessions = [
            (self.session.take(), ScanDirection::Ascending),
            (self.second_session.take(), ScanDirection::Descending),
        ];
        for (mut session, from) in sessions.into_iter().filter_map(|(session, from)| Some((session?, from))) {
            let (rest, loader) = (rest.clone(), loader.clone());
            tasks.spawn(async move {
                snapshot::load_keys(session.connection(), &rest, from, forget_before, &loader).await?;
                Ok::<_, StoreError>((session, from))
            });
        }
        while let Some(read) = tasks.join_next().await {
            let (session, from) = read.map_err(|error| StoreError::Unavailable(error.into()))??;
            match from {
                ScanDirection::Ascending => self.session = Some(session),
                // It has nothing to commit.
                ScanDirection::Descending => drop(with_timeout(CALL_TIMEOUT, session.finish("COMMIT")).await),
            }
        }
        Ok(())
    }
}

fn open_error(place: &PgTarget, error: sqlx::Error) -> OpenError {
    let path = place.display_name.clone();
    if is_transient(&error) {
        OpenError::Unreachable { path, source: error.into() }
    } else {
        OpenError::Other { path, source: error.into() }
    }
}
