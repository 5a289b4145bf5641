//! The store on a PostgreSQL server: tables in a schema of their own, which any number of processes write.
//!
//! Everything is a transaction, a single read too, and no transaction leaves anything behind in its session: so it
//! works through pgbouncer in transaction mode, where the next transaction may meet another session. A read is one
//! message, its transaction around it, with its values written out (`literal.rs`). Where sqlx binds values it sends a
//! statement in two steps (parse, then execute), which only a transaction keeps in one session; a statement with a name
//! would stay in a session after it, so statements have none. What a session would be told once (the schema, time
//! limits, durability) is told with `BEGIN`, in the same round trip, which also says what server it is (`sources.rs`).
//!
//! A batch locks the row of `meta`, so that batches commit in the order of their revisions whoever sends them. It
//! is decided in `plan.rs` from what `facts.rs` asks in the message that locks, and written by `write.rs` in the message
//! that commits. What makes many processes one service
//! is `fleet.rs`, over connections of its own (`line.rs`); what the server must be is `doctor.rs`, the tables come from
//! `migrate.rs`; the reads are in `backend.rs`, those of all keys in `snapshot.rs`.

mod bulk;
mod copy;
mod doctor;
mod errors;
mod facts;
mod fleet;
mod line;
mod literal;
mod look;
mod migrate;
mod place;
mod snapshot;
mod sources;
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
    limit::Spent,
    name::KeyId,
    time::{Revision, Timestamp},
};

use super::{
    BulkReader, Checkpoint, CommitError, Committed, Head, Hour, Loader, OpenError, Schema, Step, StoreError,
    UsageBatch, Write,
    backend::{self, Backend, TakeLog, TakeRow, View},
    fleet::Fleet,
    plan::{self, Questions},
    queries::Sql,
    records::{Columns as _, LOG_COLUMNS, head_at, log_at, spent_at},
    rows::revision_to_i64,
};

use bulk::PgBulkReader;
use copy::copy;
use errors::{is_gone, may_pass, server_error, store_error, was_refused};
use fleet::Lines;
use line::TextRow;
use literal::Literal as _;
pub(super) use look::look;
use place::Place;
use snapshot::{From, Rest};
use sources::{Sources, WHICH};

type Result<T> = std::result::Result<T, sqlx::Error>;

/// How long one transaction may take, waiting for the lock included. The server is told the same, so that it does
/// not go on without us.
const CALL: Duration = Duration::from_secs(10);
/// How long a second session may take to be had for reading the keys: they can be read by one.
const SAME: Duration = Duration::from_secs(3);
/// How long a free connection may take to be had.
const ACQUIRE: Duration = Duration::from_secs(5);
/// How long a snapshot may wait for its next row.
const NEXT_ROW: Duration = Duration::from_secs(30);
const CONNECTIONS: u32 = 6;

/// A statement without a name: one with a name would stay in the session.
fn query(sql: &'static str) -> sqlx::query::Query<'static, Db, PgArguments> {
    sqlx::query(sql).persistent(false)
}

/// Runs `work` for so long at the most: a server that has vanished says nothing.
async fn within<T>(limit: Duration, work: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::time::timeout(limit, work).await.unwrap_or_else(|_| {
        let said = format!("the database did not answer within {} s", limit.as_secs());
        Err(sqlx::Error::Io(std::io::Error::new(std::io::ErrorKind::TimedOut, said)))
    })
}

/// How transactions begin. All of them may write: a standby refuses those, and what it says may be old. Nothing here is
/// worth compiling: where the server guesses a table's size wrong, that takes longer than all of it.
struct Begins {
    one: String,
    /// Of the replicas' lines and of bulk reads. What stands in functions is planned once and for any values; whatever the server knew of
    /// the tables by then, it goes by their indices.
    line: String,
    view: String,
}

impl Begins {
    fn new(schema: &str, durable: &str) -> Self {
        let begin = |isolation: &str, limit: Duration| {
            let limit = limit.as_millis();
            let path = format!("\"{schema}\"").literal();
            format!(
                "BEGIN ISOLATION LEVEL {isolation} READ WRITE; SELECT {WHICH}, set_config('search_path', {path}, true), \
                 set_config('synchronous_commit', '{durable}', true), set_config('statement_timeout', '{limit}', true), \
                 set_config('idle_in_transaction_session_timeout', '{limit}', true), set_config('jit', 'off', true)"
            )
        };
        let one = begin("READ COMMITTED", CALL);
        let line = format!(
            "{one}, set_config('plan_cache_mode', 'force_generic_plan', true), \
             set_config('enable_seqscan', 'off', true)"
        );
        Begins { one, line, view: begin("REPEATABLE READ", 4 * NEXT_ROW) }
    }
}

/// The store in a schema of a PostgreSQL database.
pub(super) struct Postgres {
    place: Place,
    pool: PgPool,
    begins: Begins,
    fleet: Lines,
    /// Where the log ended when this process last saw it. Whoever finds another end without having moved it has
    /// another history before it: a standby that lacked commits, or a backup.
    known: Mutex<Option<Head>>,
    sources: Sources,
}

impl std::fmt::Debug for Postgres {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Postgres").field("database", &self.place.shown).finish_non_exhaustive()
    }
}

/// Whether the text of a URL names a server, a database and a schema. Resolves nothing.
pub(super) fn check_url(url: &str) -> std::result::Result<(), OpenError> {
    Place::parse(url).map(drop)
}

impl Postgres {
    /// Connects to the server that `url` names, checks it, migrates the schema and checks it.
    ///
    /// # Errors
    /// When it cannot be reached or trusted, is damaged or newer than this program.
    pub(super) async fn open(url: &str, schema: Schema) -> std::result::Result<Postgres, OpenError> {
        let place = Place::parse(url)?;
        let pool = pool(&place);
        let durable = Postgres::checked(&place).await?;
        let begins = Begins::new(&place.schema, durable);
        migrate::run(&place, &pool, schema.into()).await?;
        let fleet = Lines::to(&place);
        let store =
            Postgres { place, pool, begins, fleet, known: Mutex::default(), sources: Sources::default() };
        match backend::check_log(&store).await {
            Ok(()) => Ok(store),
            Err(StoreError::Damaged(what)) => Err(OpenError::Damaged { path: store.place.shown, what }),
            Err(error) => Err(OpenError::Away { path: store.place.shown, source: error.into() }),
        }
    }

    /// Connects to the server, and sees that it can be trusted. Gives the durability that its transactions need.
    async fn checked(place: &Place) -> std::result::Result<&'static str, OpenError> {
        // Not from the pool, which would try again until its time is over and forget why it failed.
        let connecting = PgConnection::connect_with(&place.options);
        let connected = within(ACQUIRE, connecting).await;
        let mut connection = connected.map_err(|error| open_error(place, error))?;
        let durable = doctor::check(place, &mut connection).await?;
        let _ = within(CALL, connection.close()).await;
        Ok(durable)
    }

    /// Brings the schema up to date, or only says what that would do. Gives the steps.
    ///
    /// # Errors
    /// As [`Postgres::open`].
    pub(super) async fn migrate(url: &str, dry_run: bool) -> std::result::Result<Vec<Step>, OpenError> {
        let place = Place::parse(url)?;
        Postgres::checked(&place).await?;
        let pool = pool(&place);
        let what = if dry_run { migrate::Pending::Tell } else { migrate::Pending::Take };
        let steps = migrate::run(&place, &pool, what).await;
        pool.close().await;
        steps
    }

    /// Whether the server can be reached.
    ///
    /// # Errors
    /// When it cannot: [`OpenError::Away`] where that may pass.
    pub(super) async fn reach(url: &str) -> std::result::Result<(), OpenError> {
        let place = Place::parse(url)?;
        let connecting = PgConnection::connect_with(&place.options);
        let connection = within(ACQUIRE, connecting).await.map_err(|error| open_error(&place, error))?;
        let _ = within(CALL, connection.close()).await;
        Ok(())
    }

    /// Runs `work` in a transaction. It is ended by what `work` says, `COMMIT` or `ROLLBACK`.
    async fn transaction<T>(
        &self,
        work: impl AsyncFnOnce(&mut PgConnection) -> Result<(T, &'static str)>,
    ) -> Result<T> {
        let (mut session, _) = self.begin(&self.begins.one, &[]).await?;
        within(CALL, async {
            let (value, ending) = work(session.get()).await?;
            session.end(ending).await?;
            Ok(value)
        })
        .await
    }

    /// Begins a transaction, with `statements` in the same message; gives their rows.
    async fn begin(&self, begins: &str, statements: &[String]) -> Result<(Session, Vec<Vec<TextRow>>)> {
        // What begins is two statements, of which the second says which server it is.
        const OWN: usize = 2;
        let message =
            statements.iter().fold(begins.to_owned(), |message, statement| message + "; " + statement);
        let (session, mut answers) = begin(&self.pool, &message).await?;
        let rest = answers.split_off(OWN.min(answers.len()));
        let row = answers.get(1).and_then(|rows| rows.first()).ok_or(sqlx::Error::RowNotFound)?;
        self.sources.saw(row.int(0)?, Instant::now());
        Ok((session, rest))
    }

    /// Another transaction on the same server that sees what one does that is open. None where that cannot be: all
    /// connections are in use, or another server answers this time. It only saves time.
    async fn begin_same(&self, snapshot: &str, server: i64) -> Option<Session> {
        // Which server it is is said by the statement after the two that begin.
        const SAYS: usize = 2;
        // This statement takes nothing but plain text between its quotes.
        let plain = snapshot.bytes().all(|byte| byte.is_ascii_hexdigit() || byte == b'-');
        let same = plain.then(|| format!("; SET TRANSACTION SNAPSHOT '{snapshot}'; "))?;
        match within(SAME, begin(&self.pool, &self.begins.view.replacen("; ", &same, 1))).await {
            // The number of a snapshot says nothing on another server.
            Ok((session, answers)) => {
                let says = answers.get(SAYS).and_then(|rows| rows.first()?.int(0).ok());
                (says == Some(server)).then_some(session)
            }
            Err(error) => {
                tracing::debug!(error = &error as &dyn std::error::Error, "the keys are read by one session");
                None
            }
        }
    }

    /// Where the log ended when this process last saw it.
    fn known(&self) -> MutexGuard<'_, Option<Head>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Holds that the database's log is what this process has seen of it, or goes on from there. `locked` are the answers
    /// to [`lock_head`].
    fn goes_on(&self, known: Option<Head>, locked: &[Vec<TextRow>]) -> Result<Head> {
        let [heads, links] = locked else { return Err(sqlx::Error::RowNotFound) };
        let head = heads.first().ok_or(sqlx::Error::RowNotFound)?;
        let head = head_at(head).map_err(|error| sqlx::Error::Decode(Box::new(error)))?;
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
    async fn write_batch(&self, batch: &[Write], committing: &mut bool) -> Result<Committed> {
        let mut committed = Committed::default();
        let mut runs = plan::runs(batch).into_iter();
        let Some(mut run) = runs.next() else { return Ok(committed) };
        let mut questions = facts::questions(&Questions::of(run));
        let known = *self.known();
        let asked: Vec<_> = lock_head(known).into_iter().chain(texts(&questions)).collect();
        let (mut session, mut locked) = self.begin(&self.begins.one, &asked).await?;
        let mut answers = locked.split_off(2.min(locked.len()));
        // Others write too; but nothing is built on another history.
        let mut head = self.goes_on(known, &locked)?;
        let mut script = Vec::new();
        loop {
            let facts = facts::read(&questions, &answers)?;
            let plan =
                plan::decide(run, facts, head).map_err(|error| sqlx::Error::Encode(Box::new(error)))?;
            write::run(&mut script, &plan);
            head = plan.head;
            committed.outcomes.extend(plan.committed.outcomes);
            committed.rows.extend(plan.committed.rows);
            let Some(next) = runs.next() else { break };
            run = next;
            questions = facts::questions(&Questions::of(run));
            let written = script.len();
            script.extend(texts(&questions));
            answers = line::ask(session.get(), std::mem::take(&mut script).join("; ")).await?;
            answers.drain(..written.min(answers.len()));
        }
        if committed.rows.is_empty() {
            session.end("ROLLBACK").await?;
            return Ok(committed);
        }
        write::head(&mut script, head, self.place.commits());
        script.push("COMMIT".to_owned());
        *committing = true;
        self.fleet.commits(Some(head.revision));
        session.end(script.join("; ")).await?;
        Ok(committed)
    }
}

/// Locks the head, so that batches come one after the other; and asks for the hash where this process knows it.
fn lock_head(known: Option<Head>) -> [String; 2] {
    let known = known.map_or(0, |known| revision_to_i64(known.revision));
    [
        "SELECT head, head_hash FROM meta FOR UPDATE".to_owned(),
        format!("SELECT hash FROM log WHERE revision = {}", known.literal()),
    ]
}

fn texts(questions: &[facts::Question]) -> impl Iterator<Item = String> {
    questions.iter().map(|(text, _)| text.clone())
}

/// Connections for all but the replicas' own lines. None is made yet.
fn pool(place: &Place) -> PgPool {
    PgPoolOptions::new()
        .max_connections(CONNECTIONS)
        .acquire_timeout(ACQUIRE)
        // `begin` finds out for less.
        .test_before_acquire(false)
        .connect_lazy_with(place.options.clone())
}

/// A connection with a transaction. Whoever fails or is given up in the middle leaves it in an unknown state: then it
/// is closed, and the server ends the transaction.
struct Session {
    connection: PoolConnection<Db>,
    ended: bool,
}

impl Session {
    fn get(&mut self) -> &mut PgConnection {
        &mut self.connection
    }

    /// Ends the transaction with a message that ends with `COMMIT` or `ROLLBACK`; others may have the connection then.
    async fn end(mut self, ending: impl Into<String>) -> Result<()> {
        sqlx::raw_sql(AssertSqlSafe(ending.into())).execute(self.get()).await?;
        self.ended = true;
        Ok(())
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        if !self.ended {
            self.connection.close_on_drop();
        }
    }
}

/// Begins a transaction with this message; gives the rows of its statements, which change nothing. A connection that died
/// while it was idle shows here, before anything was changed, and another takes its place.
async fn begin(pool: &PgPool, message: &str) -> Result<(Session, Vec<Vec<TextRow>>)> {
    let mut tries = CONNECTIONS + 1;
    loop {
        let mut session = Session { connection: pool.acquire().await?, ended: false };
        let error = match within(CALL, line::ask(session.get(), message.to_owned())).await {
            Ok(answers) => return Ok((session, answers)),
            Err(error) => error,
        };
        tries -= 1;
        if tries == 0 || !is_gone(&error) {
            return Err(error);
        }
    }
}

#[async_trait]
impl Backend for Postgres {
    type Db = Db;
    type Row = TextRow;

    async fn rows(&self, query: Sql<Db>) -> std::result::Result<Vec<TextRow>, StoreError> {
        let (sql, _) = query.into_parts();
        let message = [sql, "COMMIT".to_owned()];
        let (mut session, answers) = self.begin(&self.begins.one, &message).await.map_err(store_error)?;
        session.ended = true;
        Ok(answers.into_iter().next().unwrap_or_default())
    }

    fn bulk(&self, _: u64) -> Box<dyn BulkReader + '_> {
        Box::new(PgBulkReader::new(self))
    }

    async fn each_entry(&self, after: Revision, take: TakeLog<'_>) -> std::result::Result<(), StoreError> {
        let (mut session, _) = self.begin(&self.begins.view, &[]).await.map_err(store_error)?;
        let after = revision_to_i64(after);
        let sql = format!("SELECT {LOG_COLUMNS} FROM log WHERE revision > {after} ORDER BY revision");
        copy(session.get(), &sql, &mut |row| take(log_at(row)?)).await?;
        within(CALL, session.end("COMMIT")).await.map_err(store_error)
    }

    async fn commit_batch(&self, batch: &[Write]) -> std::result::Result<Committed, CommitError> {
        let mut committing = false;
        let result = within(CALL, self.write_batch(batch, &mut committing)).await;
        if let Ok(committed) = &result
            && let Some((row, _)) = committed.rows.last()
        {
            *self.known() = Some(Head { revision: row.revision, hash: row.hash });
        }
        result.map_err(|error| {
            // Another may commit this revision.
            self.fleet.commits(None);
            if committing && !was_refused(&error) {
                CommitError::Unknown(store_error(error))
            } else {
                CommitError::NotRecorded(store_error(error))
            }
        })
    }

    async fn view(
        &self,
        forget_before: Timestamp,
        loader: &Arc<dyn Loader>,
    ) -> std::result::Result<Head, StoreError> {
        let export = [format!(
            "SELECT pg_export_snapshot(), reltuples::bigint, {WHICH} FROM pg_class WHERE oid = 'secrets'::regclass"
        )];
        let (session, answers) = self.begin(&self.begins.view, &export).await.map_err(store_error)?;
        let mut second = None;
        if let Some(row) = answers.first().and_then(|rows| rows.first()) {
            let server = row.int(2).map_err(store_error)?;
            second = self.begin_same(row.text(0).map_err(store_error)?, server).await;
            // What the server last counted, if it ever did.
            loader.expect(row.int(1).ok().and_then(|count| usize::try_from(count).ok()).unwrap_or_default());
        }
        let mut view = PgView { session: Some(session), second };
        let head = backend::snapshot(&mut view, forget_before, loader).await?;
        if let Some(session) = view.session {
            within(CALL, session.end("COMMIT")).await.map_err(store_error)?;
        }
        self.known().get_or_insert(head);
        Ok(head)
    }

    async fn write_usage(&self, batch: &UsageBatch) -> std::result::Result<Vec<(KeyId, Spent)>, StoreError> {
        let rows =
            self.transaction(async |connection| Ok((write::usage(connection, batch).await?, "COMMIT")));
        rows.await.map_err(store_error)?.iter().map(spent_at).collect()
    }

    async fn drop_usage(&self, before: Hour) -> std::result::Result<(), StoreError> {
        self.transaction(async |connection| {
            let dropped = query("DELETE FROM usage WHERE hour < $1").bind(before.0).execute(connection);
            Ok((dropped.await.map(drop)?, "COMMIT"))
        })
        .await
        .map_err(store_error)
    }

    async fn note_checkpoint(&self, checkpoint: &Checkpoint) -> std::result::Result<(), StoreError> {
        self.transaction(async |connection| Ok((write::checkpoint(connection, checkpoint).await?, "COMMIT")))
            .await
            .map_err(store_error)
    }

    async fn take_out(&self, upto: Revision, most: u32) -> std::result::Result<u64, StoreError> {
        self.transaction(async |connection| Ok((write::take_out(connection, upto, most).await?, "COMMIT")))
            .await
            .map_err(store_error)
    }

    fn as_fleet(self: Arc<Self>) -> Option<Arc<dyn Fleet>> {
        Some(self)
    }

    async fn wait_until_lost(&self) {
        // What is read is checked when it is read.
        std::future::pending().await
    }

    /// A commit whose answer was lost holds the lock on the head until it is decided.
    async fn settled(&self) -> std::result::Result<(), StoreError> {
        let known = *self.known();
        let head = self
            .transaction(async |connection| {
                let locked = line::ask(connection, lock_head(known).join("; ")).await?;
                let head = self.goes_on(known, &locked)?;
                Ok((head, "ROLLBACK"))
            })
            .await
            .map_err(store_error)?;
        *self.known() = Some(head);
        Ok(())
    }

    fn one_source(&self, since: Instant) -> bool {
        self.sources.one_since(since)
    }

    async fn shut(&self) {
        self.fleet.close().await;
        self.pool.close().await;
    }
}

/// One transaction's view.
struct PgView {
    /// None while the keys are read, and after that has failed.
    session: Option<Session>,
    /// Another transaction that sees the same, until the keys have been read.
    second: Option<Session>,
}

impl PgView {
    fn session(&mut self) -> std::result::Result<&mut Session, StoreError> {
        self.session.as_mut().ok_or_else(|| store_error(sqlx::Error::WorkerCrashed))
    }
}

#[async_trait]
impl View for PgView {
    type Db = Db;

    async fn each(&mut self, query: Sql<Db>, take: TakeRow<'_, Db>) -> std::result::Result<(), StoreError> {
        let (sql, _) = query.into_parts();
        let query = sqlx::query(AssertSqlSafe(sql)).persistent(false);
        let mut rows = query.fetch(self.session()?.get());
        while let Some(row) = within(NEXT_ROW, rows.try_next()).await.map_err(store_error)? {
            take(&row)?;
        }
        Ok(())
    }

    /// Reads on tasks of its own, which end if this is given up; their connections are closed then.
    async fn keys(
        &mut self,
        forget_before: Timestamp,
        loader: &Arc<dyn Loader>,
    ) -> std::result::Result<(), StoreError> {
        self.session()?;
        let (mut tasks, rest) = (JoinSet::new(), Arc::new(Rest::all()));
        let sessions = [(self.session.take(), From::First), (self.second.take(), From::Last)];
        for (mut session, from) in sessions.into_iter().filter_map(|(session, from)| Some((session?, from))) {
            let (rest, loader) = (rest.clone(), loader.clone());
            tasks.spawn(async move {
                snapshot::keys(session.get(), &rest, from, forget_before, &loader).await?;
                Ok::<_, StoreError>((session, from))
            });
        }
        while let Some(read) = tasks.join_next().await {
            let (session, from) = read.map_err(|error| StoreError::Unavailable(error.into()))??;
            match from {
                From::First => self.session = Some(session),
                // It has nothing to commit.
                From::Last => drop(within(CALL, session.end("COMMIT")).await),
            }
        }
        Ok(())
    }
}

fn open_error(place: &Place, error: sqlx::Error) -> OpenError {
    let path = place.shown.clone();
    if may_pass(&error) {
        OpenError::Away { path, source: error.into() }
    } else {
        OpenError::Other { path, source: error.into() }
    }
}
