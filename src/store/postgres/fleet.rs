//! [`Fleet`] on PostgreSQL: the replicas' rows, renewals, and the life of the database.
//!
//! Each statement goes over a line of its purpose, so that no slow list of keys holds up a renewal. NOTIFY is a hint:
//! whoever commits sends one, and a listener that hears none for long is replaced.

use std::{
    collections::HashMap,
    fmt::Write as _,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use sqlx::{
    Connection as _,
    postgres::{PgListener, PgPoolOptions, PgRow},
};
use tokio::time::Instant;
use uuid::Uuid;

use crate::{
    domain::{
        lease::{Incarnation, Lease, Listing, Position, Renewal, ReplicaId, Reply, Row},
        log::{Hash, LogRow},
        log_format::LogFormat,
        time::{Revision, Timestamp},
    },
    store::{
        Head, StoreError,
        fleet::{Fleet, Hint, MOST_ROWS, Renewed, Roster, Terms},
        records::{Columns as _, LOG_COLUMNS, bytes_at, log_at},
        rows::{damaged, revision_from_i64, revision_to_i64},
    },
};

use super::{
    ACQUIRE, CALL, Place, Postgres, Result,
    line::{Line, TextRow},
    literal::{Literal as _, column},
    sources::WHICH,
    store_error, within,
};

/// How long a listener may hear nothing before another takes its place: its connection may be dead.
const SILENCE: Duration = Duration::from_secs(30);
/// How long nobody tries again to listen where a pooler stood in between.
const POOLED: Duration = Duration::from_secs(60);
/// An infinite lease, in `lease_ms` and `longest_ms`.
const INFINITE: i64 = i64::MAX;

/// The server's own identity, which it reads from its disk each time.
const IDENTITY: &str = "(SELECT system_identifier::text FROM pg_control_system())";
/// No server that is known.
const UNKNOWN: &str = "NULL, NULL";
const DB_NOW: &str = "(extract(epoch FROM clock_timestamp()) * 1000000)::bigint";

/// The lines of a replica.
pub(super) struct Lines {
    /// A server, as [`WHICH`] tells, and its identity.
    identity: Mutex<Option<(i64, String)>>,
    renewals: Line,
    changes: Line,
    rosters: Line,
    tells: Line,
    listener: tokio::sync::Mutex<Option<PgListener>>,
    /// What this process commits, or has committed last: it is told of that too.
    own: Mutex<Option<Revision>>,
}

impl Lines {
    pub(super) fn to(place: &Place) -> Lines {
        let line = || Line::to(place.options.clone());
        Lines {
            identity: Mutex::default(),
            renewals: line(),
            changes: line(),
            rosters: line(),
            tells: line(),
            listener: tokio::sync::Mutex::default(),
            own: Mutex::default(),
        }
    }

    /// This process holds the lock on the head, and commits up to here; or it has found that it may not have.
    pub(super) fn commits(&self, upto: Option<Revision>) {
        *self.own.lock().unwrap_or_else(PoisonError::into_inner) = upto;
    }

    /// What a notification says, unless it cannot be read and says nothing then.
    fn hint(&self, place: &Place, channel: &str, payload: &str) -> Option<Hint> {
        if channel != place.commits() {
            return acknowledged(payload);
        }
        let upto = payload.parse().ok().map(revision_from_i64);
        let own = *self.own.lock().unwrap_or_else(PoisonError::into_inner);
        Some(if upto.is_some() && upto == own { Hint::Own } else { Hint::Committed(upto) })
    }

    pub(super) async fn close(&self) {
        self.listener.lock().await.take();
        tokio::join!(self.renewals.close(), self.changes.close(), self.rosters.close(), self.tells.close());
    }
}

fn to_millis(lease: Lease) -> i64 {
    lease.length().map_or(INFINITE, |length| i64::try_from(length.as_millis()).unwrap_or(INFINITE))
}

fn from_millis(millis: i64) -> Result<Lease> {
    if millis == INFINITE {
        return Ok(Lease::STATIC);
    }
    let length = Duration::from_millis(u64::try_from(millis).unwrap_or(0));
    Lease::of(length).ok_or_else(|| sqlx::Error::Decode("meta holds a lease that is none".into()))
}

fn count(value: i64) -> Result<u64> {
    u64::try_from(value).map_err(|error| sqlx::Error::Decode(error.into()))
}

fn life_at(hex: &str) -> Result<Incarnation> {
    u128::from_str_radix(hex, 16).map(Incarnation).map_err(|error| sqlx::Error::Decode(error.into()))
}

fn life_opt(hex: &str) -> Result<Option<Incarnation>> {
    if hex.is_empty() { Ok(None) } else { life_at(hex).map(Some) }
}

fn hash_opt(row: &TextRow, column: usize) -> Result<Option<Hash>> {
    row.bytes_opt(column)?.map(|_| bytes_at(row, column)).transpose()
}

fn rows_at(rows: &[PgRow], columns: std::ops::Range<usize>) -> std::result::Result<Vec<LogRow>, StoreError> {
    let text = rows.iter().map(|row| TextRow::of(row, columns.clone()));
    text.map(|row| log_at(&row.map_err(store_error)?)).collect()
}

impl Postgres {
    /// One message: a transaction around `statements`.
    async fn message(&self, line: &Line, statements: &str, limit: Duration) -> Result<Vec<PgRow>> {
        let rows = line.ask(format!("{}; {statements}; COMMIT", self.begins.line), limit).await?;
        // The first row says which server it is.
        let mut rows = rows.into_iter();
        let server = rows.next().ok_or(sqlx::Error::RowNotFound)?;
        let server = TextRow::of(&server, 0..1)?.int(0)?;
        self.sources.saw(server, Instant::now());
        let mut identity = self.fleet.identity.lock().unwrap_or_else(PoisonError::into_inner);
        *identity = identity.take_if(|(known, _)| *known == server);
        Ok(rows.collect())
    }

    /// What the log ends with, if anything: where an answer's changes lead.
    fn upto(from: Position, rows: &[LogRow]) -> Position {
        rows.last().map_or(from, |row| Position { revision: row.revision, hash: row.hash })
    }

    async fn renew_once(&self, renewal: &Renewal) -> std::result::Result<Renewed, StoreError> {
        const META: usize = 9;
        let sql = renewal_sql(renewal, &self.server().await.map_err(store_error)?);
        let asked = self.message(&self.fleet.renewals, &sql, CALL);
        let mut rows = asked.await.map_err(store_error)?;
        // First whether the row was written; then the changes; then what holds for all.
        let last = rows.pop().ok_or_else(|| damaged("meta", "it has no row"))?;
        let meta = TextRow::of(&last, 0..META).map_err(store_error)?;
        let (written, changes): (Vec<_>, Vec<_>) = rows.into_iter().partition(|row| sqlx::Row::len(row) == 1);
        let is_written = |row: &PgRow| TextRow::of(row, 0..1).and_then(|row| Ok(row.text(0)? == "t"));
        let renewed = written.first().map_or(Ok(false), is_written).map_err(store_error)?;
        let changes = rows_at(&changes, 0..LOG_COLUMNS.split(',').count())?;
        let from = renewal.applied.unwrap_or(Position::START);
        let reply = reply_at(&meta, renewed, renewal, Self::upto(from, &changes));
        let reply = reply.map_err(store_error)?;
        let epoch = meta.int(7).and_then(count).map_err(store_error)?;
        let replicas = meta.int(8).and_then(count).map_err(store_error)?;
        if reply.link.is_none_or(|link| link != from.hash) && renewal.applied.is_some() {
            return Ok(Renewed { reply: Reply { upto: from, ..reply }, rows: Vec::new(), epoch, replicas });
        }
        if renewal.applied.is_some() {
            self.saw_until(reply.upto);
        }
        Ok(Renewed { reply, rows: changes, epoch, replicas })
    }

    /// A server and its identity, as the functions of the schema take them. What it has said of itself once is not asked
    /// again while it runs.
    async fn server(&self) -> Result<String> {
        let known = || self.fleet.identity.lock().unwrap_or_else(PoisonError::into_inner);
        let identity = known().clone();
        if let Some((server, identity)) = identity {
            return Ok(format!("{}, {}", server.literal(), identity.literal()));
        }
        let asked = format!("SELECT {WHICH}, {IDENTITY}");
        let rows = self.message(&self.fleet.changes, &asked, CALL).await?;
        let row = TextRow::of(rows.first().ok_or(sqlx::Error::RowNotFound)?, 0..2)?;
        *known() = Some((row.int(0)?, row.text(1)?.to_owned()));
        Ok(UNKNOWN.to_owned())
    }

    /// The log goes on from what this process knew of it to here. What it knew before may be archived.
    fn saw_until(&self, Position { revision, hash }: Position) {
        let mut known = self.known();
        if known.is_some_and(|known| known.revision < revision) {
            *known = Some(Head { revision, hash });
        }
    }
}

/// A renewal's statements. `server` is what [`Postgres::server`] gives. The changes are asked for before the head: where
/// somebody commits in between, the changes do not reach the head, and grant nothing.
fn renewal_sql(renewal: &Renewal, server: &str) -> String {
    let Renewal { id, counts, applied, settle, attempt: _ } = renewal;
    let position = applied.unwrap_or(Position::START);
    let link = applied.filter(|at| at.revision > Revision(0)).map(|at| at.hash.to_vec());
    let reached = revision_to_i64(position.revision);
    let mut sql = format!(
        "SELECT renew({id}, {acknowledged}, {link}, {seen}, {next}); ",
        id = id.0.as_bytes().as_slice().literal(),
        acknowledged = applied.map(|_| reached).literal(),
        link = link.literal(),
        seen = counts.seen,
        next = counts.next,
    );
    if let Some(Incarnation(settled)) = settle {
        let settled = format!("{settled:032x}");
        let _ = write!(
            sql,
            "UPDATE meta m SET settled = '{settled}' \
             WHERE m.settled <> '{settled}' AND life({server}, m.epoch) = '{settled}'; "
        );
    }
    if applied.is_some() {
        let _ = write!(
            sql,
            "SELECT {LOG_COLUMNS} FROM log WHERE revision > {reached} ORDER BY revision LIMIT {MOST_ROWS}; "
        );
    }
    let _ = write!(sql, "SELECT * FROM standing({reached}, {server})");
    sql
}

/// What a replica tells that has acknowledged changes.
fn acknowledgment(id: ReplicaId, upto: Revision) -> String {
    format!("{} {}", id.0.simple(), upto.0)
}

fn acknowledged(payload: &str) -> Option<Hint> {
    let (id, upto) = payload.split_once(' ')?;
    let replica = ReplicaId(Uuid::try_parse(id).ok()?);
    Some(Hint::Acknowledged { replica, upto: Revision(upto.parse().ok()?) })
}

fn reply_at(meta: &TextRow, renewed: bool, renewal: &Renewal, upto: Position) -> Result<Reply> {
    let link = match renewal.applied {
        Some(at) if at.revision == Revision(0) => Some(Position::START.hash),
        Some(_) => hash_opt(meta, 6)?,
        None => None,
    };
    Ok(Reply {
        renewed,
        link,
        upto,
        head: revision_from_i64(meta.int(0)?),
        lease: from_millis(meta.int(1)?)?,
        longest: from_millis(meta.int(2)?)?,
        incarnation: life_at(meta.text(3)?)?,
        settled: life_opt(meta.text(4)?)?,
        db_now: Timestamp::from_micros(meta.int(5)?),
    })
}

fn terms_at(row: &PgRow) -> Result<Terms> {
    let row = TextRow::of(row, 0..3)?;
    let (lease, longest) = (from_millis(row.int(0)?)?, from_millis(row.int(1)?)?);
    Ok(Terms { lease, longest, epoch: count(row.int(2)?)? })
}

/// A roster's rows: what `meta` says in each, and a replica, unless there is none.
fn roster_at(rows: &[PgRow]) -> Result<Roster> {
    const META: usize = 8;
    let first = rows.first().ok_or(sqlx::Error::RowNotFound)?;
    let meta = TextRow::of(first, 0..META)?;
    let (mut listed, mut names) = (Vec::new(), HashMap::new());
    for row in rows {
        let row = TextRow::of(row, META..META + 5)?;
        if row.bytes_opt(0)?.is_none() {
            continue;
        }
        let id = ReplicaId(Uuid::from_bytes(bytes_at(&row, 0)?));
        names.insert(id, row.text(1)?.to_owned());
        listed.push(Row {
            id,
            applied: row.int_opt(2)?.map(revision_from_i64),
            renew_seq: count(row.int(3)?)?,
            last_seen: Timestamp::from_micros(row.int(4)?),
        });
    }
    let listing = Listing {
        rows: listed,
        longest: from_millis(meta.int(1)?)?,
        incarnation: life_at(meta.text(2)?)?,
        settled: life_opt(meta.text(3)?)?,
        db_now: Timestamp::from_micros(meta.int(4)?),
    };
    let links =
        meta.text_opt(5)?.unwrap_or_default().split_terminator(',').map(link).collect::<Result<_>>()?;
    let sync_replicated = meta.text(6)? == "true";
    let (head, archived) = (revision_from_i64(meta.int(0)?), revision_from_i64(meta.int(7)?));
    Ok(Roster { listing, names, links, head, archived, sync_replicated })
}

/// A link of a roster: a revision, a colon, its hash in hex.
fn link(text: &str) -> Result<(Revision, Hash)> {
    let wrong = || sqlx::Error::Decode("no link where one should be".into());
    let (revision, hash) = text.split_once(':').ok_or_else(wrong)?;
    let byte = |at: usize| u8::from_str_radix(hash.get(2 * at..2 * at + 2)?, 16).ok();
    let bytes: Option<Vec<u8>> = (0..32).map(byte).collect();
    let hash = bytes.and_then(|bytes| bytes.try_into().ok()).ok_or_else(wrong)?;
    Ok((revision_from_i64(revision.parse().map_err(|_| wrong())?), hash))
}

#[async_trait]
impl Fleet for Postgres {
    async fn terms(&self) -> std::result::Result<Terms, StoreError> {
        let asked = "SELECT lease_ms, longest_ms, epoch FROM meta";
        let rows = self.message(&self.fleet.rosters, asked, CALL).await.map_err(store_error)?;
        let row = rows.first().ok_or_else(|| damaged("meta", "it has no row"))?;
        terms_at(row).map_err(store_error)
    }

    async fn set_first_lease(&self, lease: Lease) -> std::result::Result<bool, StoreError> {
        let millis = to_millis(lease);
        let set =
            format!("UPDATE meta SET lease_ms = {millis}, longest_ms = {millis} WHERE head = 0 RETURNING 1");
        let rows = self.message(&self.fleet.rosters, &set, CALL).await.map_err(store_error)?;
        Ok(!rows.is_empty())
    }

    async fn set_lease(&self, lease: Lease) -> std::result::Result<(), StoreError> {
        let millis = to_millis(lease);
        let set = format!(
            "UPDATE meta SET lease_ms = {millis}, longest_ms = greatest(longest_ms, lease_ms, {millis})"
        );
        self.message(&self.fleet.rosters, &set, CALL).await.map(drop).map_err(store_error)
    }

    async fn settle_lease(&self, lease: Lease) -> std::result::Result<bool, StoreError> {
        let millis = to_millis(lease);
        let set = format!("UPDATE meta SET longest_ms = {millis} WHERE lease_ms = {millis} RETURNING 1");
        let rows = self.message(&self.fleet.rosters, &set, CALL).await.map_err(store_error)?;
        Ok(!rows.is_empty())
    }

    async fn register(&self, id: ReplicaId, name: &str) -> std::result::Result<(), StoreError> {
        let (id, name) = (id.0.as_bytes().as_slice().literal(), name.literal());
        let insert = format!(
            "INSERT INTO replicas (id, name, applied, renew_seq, last_seen, log_format) \
             VALUES ({id}, {name}, NULL, 0, {DB_NOW}, {reads})",
            reads = LogFormat::NEWEST.0,
        );
        self.message(&self.fleet.renewals, &insert, CALL).await.map(drop).map_err(store_error)
    }

    async fn renew(&self, renewal: &Renewal) -> std::result::Result<Renewed, StoreError> {
        self.renew_once(renewal).await
    }

    /// In a transaction of its own and over a line of its own: whoever tells something waits for all others in the server
    /// who do, and no renewal is to wait with it.
    async fn tell(&self, id: ReplicaId, upto: Revision) -> std::result::Result<(), StoreError> {
        let told = format!("NOTIFY {}, '{}'", self.place.acknowledgments(), acknowledgment(id, upto));
        self.fleet.tells.ask(told, CALL).await.map(drop).map_err(store_error)
    }

    async fn prove(&self, id: ReplicaId, since: Instant) -> std::result::Result<bool, StoreError> {
        let write = format!(
            "UPDATE replicas SET last_seen = {DB_NOW} WHERE id = {} RETURNING 1",
            id.0.as_bytes().as_slice().literal()
        );
        let rows = self.message(&self.fleet.changes, &write, CALL).await.map_err(store_error)?;
        Ok(!rows.is_empty() && self.sources.one_since(since))
    }

    async fn follow(&self, after: Revision) -> std::result::Result<Vec<LogRow>, StoreError> {
        let after = revision_to_i64(after);
        let asked = format!(
            "SELECT {LOG_COLUMNS} FROM log WHERE revision > {after} ORDER BY revision LIMIT {MOST_ROWS}"
        );
        let rows = self.message(&self.fleet.changes, &asked, CALL).await.map_err(store_error)?;
        rows_at(&rows, 0..LOG_COLUMNS.split(',').count())
    }

    async fn roster(&self, revisions: &[Revision]) -> std::result::Result<Roster, StoreError> {
        let revisions = column(revisions, |revision| revision_to_i64(*revision));
        let server = self.server().await.map_err(store_error)?;
        let asked = format!("SELECT * FROM roster({revisions}::bigint[], {server})");
        let rows = self.message(&self.fleet.rosters, &asked, CALL).await.map_err(store_error)?;
        roster_at(&rows).map_err(store_error)
    }

    async fn remove(&self, id: ReplicaId, renew_seq: Option<u64>) -> std::result::Result<bool, StoreError> {
        let still = renew_seq.map(|count| format!(" AND renew_seq = {count}")).unwrap_or_default();
        let delete = format!(
            "DELETE FROM replicas WHERE id = {}{still} RETURNING 1",
            id.0.as_bytes().as_slice().literal()
        );
        let rows = self.message(&self.fleet.rosters, &delete, CALL).await.map_err(store_error)?;
        Ok(!rows.is_empty())
    }

    async fn hint(&self) -> std::result::Result<Hint, StoreError> {
        let mut slot = self.fleet.listener.lock().await;
        let mut listener = match slot.take() {
            Some(listener) => listener,
            None => match self.listen().await.map_err(store_error)? {
                Some(listener) => listener,
                None => {
                    // Another time there may be none in between.
                    tokio::time::sleep(POOLED).await;
                    return Err(gone(
                        "a pooler stands before the database, and notifications do not pass it",
                    ));
                }
            },
        };
        loop {
            // None: the connection has ended, and what came meanwhile is lost.
            let heard = within(SILENCE, listener.try_recv()).await.map_err(store_error)?;
            let heard = heard.ok_or_else(|| gone("the connection that listens has ended"))?;
            if let Some(hint) = self.fleet.hint(&self.place, heard.channel(), heard.payload()) {
                *slot = Some(listener);
                return Ok(hint);
            }
        }
    }

    fn start_over(&self) {
        *self.known() = None;
    }

    async fn accept_regression(&self) -> std::result::Result<u64, StoreError> {
        // A restored database may count from less than what its replicas have seen: the time is beyond all that.
        let set = "UPDATE meta SET epoch = greatest(epoch + 1, extract(epoch FROM clock_timestamp())::bigint) \
                   RETURNING epoch";
        let rows = self.message(&self.fleet.rosters, set, CALL).await.map_err(store_error)?;
        let row = rows.first().ok_or_else(|| damaged("meta", "it has no row"))?;
        let epoch = TextRow::of(row, 0..1).and_then(|row| count(row.int(0)?));
        epoch.map_err(store_error)
    }
}

fn gone(why: &'static str) -> StoreError {
    StoreError::Unavailable(why.into())
}

/// The server's process for this session, of one that was begun for it or of one that a pooler lent.
async fn process(connection: &mut sqlx::PgConnection) -> Result<i64> {
    let row = sqlx::raw_sql("SELECT pg_backend_pid()").fetch_one(connection).await?;
    TextRow::of(&row, 0..1)?.int(0)
}

impl Postgres {
    /// A connection that hears notifications; None where a pooler stands in between. There a session that listens would be
    /// lent to others, who cannot bear what they are told then. It shows in that a new connection gets a session that was
    /// there before: asked of two, since the first may have been all that the pooler had free.
    async fn listen(&self) -> Result<Option<PgListener>> {
        const KNOWN: &str = "SELECT pid FROM pg_stat_activity WHERE usename = current_user";
        let known = self.message(&self.fleet.rosters, KNOWN, CALL).await?;
        let known = known.iter().map(|row| TextRow::of(row, 0..1)?.int(0));
        let mut known = known.collect::<Result<Vec<_>>>()?;
        let probe = sqlx::PgConnection::connect_with(&self.place.options);
        let mut probe = within(ACQUIRE, probe).await?;
        let first = within(ACQUIRE, process(&mut probe)).await?;
        let _ = within(ACQUIRE, probe.close()).await;
        if known.contains(&first) {
            return Ok(None);
        }
        known.push(first);
        let pool = PgPoolOptions::new().max_connections(1).acquire_timeout(ACQUIRE);
        let pool = pool.connect_lazy_with(self.place.options.clone());
        let mut listener = within(ACQUIRE, PgListener::connect_with(&pool)).await?;
        let asked = sqlx::raw_sql("SELECT pg_backend_pid()").fetch_one(&mut listener);
        let second = TextRow::of(&within(ACQUIRE, asked).await?, 0..1)?.int(0)?;
        if known.contains(&second) {
            return Ok(None);
        }
        // Another connection in its place would have missed something: then this one has ended.
        listener.eager_reconnect(false);
        let acknowledgments = self.place.acknowledgments();
        within(ACQUIRE, listener.listen_all([self.place.commits(), &acknowledgments])).await?;
        Ok(Some(listener))
    }
}

/// The first life that the tables have: nobody has held a lease in an earlier one.
pub(super) async fn settle_first(connection: &mut sqlx::PgConnection) -> Result<()> {
    let sql = format!("UPDATE meta m SET settled = life({UNKNOWN}, m.epoch) WHERE m.settled = ''");
    sqlx::raw_sql(sqlx::AssertSqlSafe(sql)).execute(connection).await.map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::lease::{Attempt, Counts};

    #[test]
    fn leases_read_back_and_none_is_zero() {
        for lease in [Lease::STRICT, Lease::DEFAULT, Lease::STATIC] {
            assert_eq!(from_millis(to_millis(lease)).unwrap(), lease);
        }
        assert!(from_millis(0).is_err() && from_millis(-1).is_err());
    }

    #[test]
    fn a_renewal_says_where_it_is_and_with_which_link() {
        let at = Position { revision: Revision(7), hash: [0xab; 32] };
        let renewal = Renewal {
            attempt: Attempt(1),
            id: ReplicaId(Uuid::nil()),
            counts: Counts { seen: 3, next: 5 },
            applied: Some(at),
            settle: None,
        };
        let sql = renewal_sql(&renewal, UNKNOWN);
        let id = "00".repeat(16);
        let renew =
            format!("renew(E'\\\\x{id}'::bytea, '7'::bigint, E'\\\\x{}'::bytea, 3, 5)", "ab".repeat(32));
        assert!(sql.contains(&renew) && sql.contains("revision > 7 ORDER BY"), "{sql}");
        let loading = renewal_sql(&Renewal { applied: None, ..renewal }, UNKNOWN);
        assert!(loading.contains("NULL, NULL, 3, 5)") && !loading.contains("ORDER BY"), "{loading}");
    }

    #[test]
    fn what_is_told_of_an_acknowledgment_reads_back_and_nothing_else_does() {
        let (replica, upto) = (ReplicaId(Uuid::from_u128(7)), Revision(12));
        assert_eq!(acknowledged(&acknowledgment(replica, upto)), Some(Hint::Acknowledged { replica, upto }));
        for bad in ["", "12", "x 12", "00000000000000000000000000000007 -1"] {
            assert_eq!(acknowledged(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn what_this_process_commits_is_no_news_to_it() {
        let place = Place::parse("postgres://u@db/keys").unwrap();
        let lines = Lines::to(&place);
        let hint = |payload| lines.hint(&place, place.commits(), payload);
        assert_eq!(hint("7"), Some(Hint::Committed(Some(Revision(7)))));
        lines.commits(Some(Revision(7)));
        assert_eq!(hint("7"), Some(Hint::Own));
        assert_eq!(hint("8"), Some(Hint::Committed(Some(Revision(8)))));
        assert_eq!(hint("?"), Some(Hint::Committed(None)));
        lines.commits(None);
        assert_eq!(hint("7"), Some(Hint::Committed(Some(Revision(7)))));
        assert_eq!(lines.hint(&place, &place.acknowledgments(), "?"), None);
    }

    #[test]
    fn a_link_is_a_revision_and_32_bytes() {
        let text = format!("12:{}", "0f".repeat(32));
        assert_eq!(link(&text).unwrap(), (Revision(12), [15; 32]));
        for bad in ["", "12", "12:", "x:00", "12:zz"] {
            assert!(link(bad).is_err(), "{bad:?}");
        }
    }
}
