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
        time::{Revision, Timestamp},
    },
    store::{
        Head, StoreError,
        fleet::{Fleet, MOST_ROWS, Renewed, Roster, Terms},
        records::{Columns as _, LOG_COLUMNS, bytes_at, log_at},
        rows::{revision_from_i64, revision_to_i64},
    },
};

use super::{
    ACQUIRE, CALL, Place, Postgres, Result,
    line::{Line, TextRow},
    literal::Literal as _,
    sources::WHICH,
    store_error, within,
};

/// How long a listener may hear nothing before another takes its place: its connection may be dead.
const SILENCE: Duration = Duration::from_secs(30);
/// How long nobody tries again to listen where a pooler stood in between.
const POOLED: Duration = Duration::from_secs(60);
/// An infinite lease, in `lease_ms` and `longest_ms`.
const INFINITE: i64 = i64::MAX;

/// One unbroken life of the database, in hex: the server's own identity, its timeline (another one after each
/// failover), the database and the table (others after a restored dump), and how often people accepted a loss.
fn life(identity: &str) -> String {
    format!(
        "substr(encode(sha256(convert_to(concat_ws(':', {identity}, \
         substr(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8), \
         (SELECT oid FROM pg_database WHERE datname = current_database()), 'replicas'::regclass::oid, m.epoch), \
         'UTF8')), 'hex'), 1, 32)"
    )
}

/// The server's own identity, which it reads from its disk each time.
const IDENTITY: &str = "(SELECT system_identifier::text FROM pg_control_system())";
const DB_NOW: &str = "(extract(epoch FROM clock_timestamp()) * 1000000)::bigint";

/// The lines of a replica.
pub(super) struct Lines {
    /// A server, as [`WHICH`] tells, and its identity.
    identity: Mutex<Option<(i64, String)>>,
    renewals: Line,
    changes: Line,
    rosters: Line,
    listener: tokio::sync::Mutex<Option<PgListener>>,
}

impl Lines {
    pub(super) fn to(place: &Place) -> Lines {
        let line = || Line::to(place.options.clone());
        Lines {
            identity: Mutex::default(),
            renewals: line(),
            changes: line(),
            rosters: line(),
            listener: tokio::sync::Mutex::default(),
        }
    }

    pub(super) async fn close(&self) {
        self.listener.lock().await.take();
        tokio::join!(self.renewals.close(), self.changes.close(), self.rosters.close());
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
        let rows = line.ask(format!("{}; {statements}; COMMIT", self.begins.one), limit).await?;
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
        let sql = renewal_sql(renewal, &self.life().await.map_err(store_error)?);
        let mut rows = self.message(&self.fleet.renewals, &sql, CALL).await.map_err(store_error)?;
        // First the row of the UPDATE, if it changed one; then the changes; then what holds for all.
        let last = rows.pop().ok_or_else(|| super::damaged("meta", "it has no row"))?;
        let meta = TextRow::of(&last, 0..META).map_err(store_error)?;
        let (updated, changes): (Vec<_>, Vec<_>) = rows.into_iter().partition(|row| sqlx::Row::len(row) == 1);
        let changes = rows_at(&changes, 0..LOG_COLUMNS.split(',').count())?;
        let from = renewal.applied.unwrap_or(Position::START);
        let reply = reply_at(&meta, !updated.is_empty(), renewal, Self::upto(from, &changes));
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

    /// The database's life as SQL. What the server has said of itself once is not asked again while it runs.
    async fn life(&self) -> Result<String> {
        let known = || self.fleet.identity.lock().unwrap_or_else(PoisonError::into_inner);
        let identity = known().clone();
        if let Some((server, identity)) = identity {
            let identity = identity.literal();
            return Ok(life(&format!("CASE WHEN {WHICH} = {server} THEN {identity} ELSE {IDENTITY} END")));
        }
        let asked = format!("SELECT {WHICH}, {IDENTITY}");
        let rows = self.message(&self.fleet.changes, &asked, CALL).await?;
        let row = TextRow::of(rows.first().ok_or(sqlx::Error::RowNotFound)?, 0..2)?;
        *known() = Some((row.int(0)?, row.text(1)?.to_owned()));
        Ok(life(IDENTITY))
    }

    /// The log goes on from what this process knew of it to here. What it knew before may be archived.
    fn saw_until(&self, Position { revision, hash }: Position) {
        let mut known = self.known();
        if known.is_some_and(|known| known.revision < revision) {
            *known = Some(Head { revision, hash });
        }
    }
}

/// The statements of a renewal. The changes are asked for before the head: where somebody commits in between, the changes
/// do not reach the head, and grant nothing.
fn renewal_sql(renewal: &Renewal, life: &str) -> String {
    let Renewal { id, counts, applied, settle, attempt: _ } = renewal;
    let position = applied.unwrap_or(Position::START);
    let revision = revision_to_i64(position.revision);
    // What is acknowledged must be in the log: a number alone acknowledges nothing.
    let held = match applied {
        Some(at) if at.revision > Revision(0) => {
            format!(
                " AND EXISTS (SELECT FROM log WHERE revision = {revision} AND hash = {})",
                at.hash.as_slice().literal()
            )
        }
        _ => String::new(),
    };
    let set = applied.map_or_else(|| "NULL".to_owned(), |_| revision.to_string());
    let mut sql = format!(
        "UPDATE replicas SET applied = {set}, renew_seq = {next}, last_seen = {DB_NOW} WHERE id = {id} \
         AND renew_seq >= {seen} AND renew_seq < {next}{held} RETURNING 1; ",
        next = counts.next,
        seen = counts.seen,
        id = id.0.as_bytes().as_slice().literal(),
    );
    if let Some(Incarnation(settled)) = settle {
        let settled = format!("{settled:032x}");
        let _ = write!(
            sql,
            "UPDATE meta m SET settled = '{settled}' WHERE m.settled <> '{settled}' AND {life} = '{settled}'; "
        );
    }
    if applied.is_some() {
        let _ = write!(
            sql,
            "SELECT {LOG_COLUMNS} FROM log WHERE revision > {revision} ORDER BY revision LIMIT {MOST_ROWS}; "
        );
    }
    let _ = write!(
        sql,
        "SELECT m.head, m.lease_ms, m.longest_ms, {life}, m.settled, {DB_NOW}, \
         (SELECT hash FROM log WHERE revision = {revision}), m.epoch, (SELECT count(*) FROM replicas) FROM meta m"
    );
    sql
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
        let row = rows.first().ok_or_else(|| super::damaged("meta", "it has no row"))?;
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
            "INSERT INTO replicas (id, name, applied, renew_seq, last_seen) \
             VALUES ({id}, {name}, NULL, 0, {DB_NOW})"
        );
        self.message(&self.fleet.renewals, &insert, CALL).await.map(drop).map_err(store_error)
    }

    async fn renew(&self, renewal: &Renewal) -> std::result::Result<Renewed, StoreError> {
        self.renew_once(renewal).await
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
        let revisions: Vec<_> =
            revisions.iter().map(|revision| revision_to_i64(*revision).to_string()).collect();
        let revisions = if revisions.is_empty() { "-1".to_owned() } else { revisions.join(", ") };
        let life = self.life().await.map_err(store_error)?;
        let asked = format!(
            "SELECT m.head, m.longest_ms, {life}, m.settled, {DB_NOW}, \
             (SELECT string_agg(revision || ':' || encode(hash, 'hex'), ',') FROM log WHERE revision IN ({revisions})), \
             (current_setting('synchronous_standby_names') <> '')::text, \
             coalesce((SELECT max(revision) FROM checkpoints), 0), \
             r.id, r.name, r.applied, r.renew_seq, r.last_seen FROM meta m LEFT JOIN replicas r ON true"
        );
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

    async fn hint(&self) -> std::result::Result<Option<Revision>, StoreError> {
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
        // None: the connection has ended, and what came meanwhile is lost.
        let heard = within(SILENCE, listener.try_recv()).await.map_err(store_error)?;
        let heard = heard.ok_or_else(|| gone("the connection that listens has ended"))?;
        *slot = Some(listener);
        Ok(heard.payload().parse().ok().map(revision_from_i64))
    }

    fn start_over(&self) {
        *self.known() = None;
    }

    async fn accept_regression(&self) -> std::result::Result<u64, StoreError> {
        // A restored database may count from less than what its replicas have seen: the time is beyond all that.
        let set = "UPDATE meta SET epoch = greatest(epoch + 1, extract(epoch FROM clock_timestamp())::bigint) \
                   RETURNING epoch";
        let rows = self.message(&self.fleet.rosters, set, CALL).await.map_err(store_error)?;
        let row = rows.first().ok_or_else(|| super::damaged("meta", "it has no row"))?;
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
        within(ACQUIRE, listener.listen(&self.place.schema)).await?;
        Ok(Some(listener))
    }
}

/// The first life that the tables have: nobody has held a lease in an earlier one.
pub(super) async fn settle_first(connection: &mut sqlx::PgConnection) -> Result<()> {
    let sql = format!("UPDATE meta m SET settled = {} WHERE m.settled = ''", life(IDENTITY));
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
    fn a_renewal_acknowledges_only_what_the_log_holds() {
        let at = Position { revision: Revision(7), hash: [0xab; 32] };
        let renewal = Renewal {
            attempt: Attempt(1),
            id: ReplicaId(Uuid::nil()),
            counts: Counts { seen: 3, next: 5 },
            applied: Some(at),
            settle: None,
        };
        let sql = renewal_sql(&renewal, "life");
        assert!(sql.contains("renew_seq >= 3 AND renew_seq < 5"), "{sql}");
        assert!(sql.contains(&format!("revision = 7 AND hash = E'\\\\x{}'", "ab".repeat(32))), "{sql}");
        let loading = renewal_sql(&Renewal { applied: None, ..renewal }, "life");
        assert!(loading.contains("applied = NULL") && !loading.contains("ORDER BY"), "{loading}");
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
