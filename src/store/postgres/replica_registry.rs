//! [`ReplicaRegistry`] on PostgreSQL: the rows of replicas, renewals, and the incarnation of the database.
//!
//! Each kind of statement has its own connection. NOTIFY is advisory: every commit sends one, and a listener that is
//! silent for long is replaced.

use std::{collections::HashMap, fmt::Write as _, sync::PoisonError, time::Duration};

use async_trait::async_trait;
use sqlx::{
    Connection as _,
    postgres::{PgListener, PgPoolOptions, PgRow},
};
use tokio::time::Instant;
use uuid::Uuid;

use crate::{
    domain::{
        lease::{
            Incarnation, LeaseDuration, LogPosition, RenewalReply, RenewalRequest, ReplicaId, ReplicaListing,
            ReplicaRow,
        },
        log::{ChainHash, LogEntry},
        log_format::LogFormat,
        time::{Revision, Timestamp},
    },
    store::{
        LogHead, StoreError,
        replica_registry::{
            LeaseConfig, MAX_CHANGES_PER_REPLY, RenewalOutcome, ReplicaNotification, ReplicaRegistry,
            ReplicaSnapshot,
        },
        row_decoding::{LOG_COLUMNS, RowColumns as _, decode_log_entry, fixed_bytes},
        row_format::{damaged_error, revision_from_i64, revision_to_i64},
    },
};

use super::{
    dedicated_connection::DedicatedConnection,
    errors::{PgResult, store_error},
    replica_connections::{LISTENER_TIMEOUT, POOLER_RETRY_INTERVAL, encode_acknowledgment},
    server_identity::{SERVER_START_TIME, UNKNOWN_SERVER},
    sql_literal::{SqlLiteral as _, array_literal},
    store::PostgresStore,
    text_row::TextRow,
    timeouts::{ACQUIRE_TIMEOUT, CALL_TIMEOUT, with_timeout},
};

/// An infinite lease in the columns `lease_ms` and `longest_ms`.
const INFINITE_LEASE_MS: i64 = i64::MAX;

/// The system identifier of the server, which the server reads from its disk each time.
const SYSTEM_IDENTIFIER: &str = "(SELECT system_identifier::text FROM pg_control_system())";
const DATABASE_NOW: &str = "(extract(epoch FROM clock_timestamp()) * 1000000)::bigint";

fn lease_to_millis(lease: LeaseDuration) -> i64 {
    lease
        .length()
        .map_or(INFINITE_LEASE_MS, |length| i64::try_from(length.as_millis()).unwrap_or(INFINITE_LEASE_MS))
}

fn lease_from_millis(millis: i64) -> PgResult<LeaseDuration> {
    if millis == INFINITE_LEASE_MS {
        return Ok(LeaseDuration::INFINITE);
    }
    let length = Duration::from_millis(u64::try_from(millis).unwrap_or(0));
    LeaseDuration::from_duration(length)
        .ok_or_else(|| sqlx::Error::Decode("meta contains an invalid lease".into()))
}

fn decode_count(value: i64) -> PgResult<u64> {
    u64::try_from(value).map_err(|error| sqlx::Error::Decode(error.into()))
}

fn parse_incarnation(hex: &str) -> PgResult<Incarnation> {
    u128::from_str_radix(hex, 16).map(Incarnation).map_err(|error| sqlx::Error::Decode(error.into()))
}

fn parse_incarnation_opt(hex: &str) -> PgResult<Option<Incarnation>> {
    if hex.is_empty() { Ok(None) } else { parse_incarnation(hex).map(Some) }
}

fn decode_hash_opt(row: &TextRow, column: usize) -> PgResult<Option<ChainHash>> {
    row.bytes_opt(column)?.map(|_| fixed_bytes(row, column)).transpose()
}

fn decode_log_entries(rows: &[PgRow], columns: std::ops::Range<usize>) -> Result<Vec<LogEntry>, StoreError> {
    let text = rows.iter().map(|row| TextRow::from_pg_row(row, columns.clone()));
    text.map(|row| decode_log_entry(&row.map_err(store_error)?)).collect()
}

impl PostgresStore {
    /// Sends one message: a transaction around `statements`.
    async fn run_transaction(
        &self,
        connection: &DedicatedConnection,
        statements: &str,
        limit: Duration,
    ) -> PgResult<Vec<PgRow>> {
        let rows = connection
            .fetch_rows(format!("{}; {statements}; COMMIT", self.begin_statements.dedicated), limit)
            .await?;
        // The first row identifies the server.
        let mut rows = rows.into_iter();
        let server = rows.next().ok_or(sqlx::Error::RowNotFound)?;
        let server = TextRow::from_pg_row(&server, 0..1)?.int(0)?;
        self.seen_servers.record(server, Instant::now());
        let mut identity =
            self.replica_connections.server_identity.lock().unwrap_or_else(PoisonError::into_inner);
        *identity = identity.take_if(|(known, _)| *known == server);
        Ok(rows.collect())
    }

    /// The end of the delivered changes.
    fn end_position(from: LogPosition, rows: &[LogEntry]) -> LogPosition {
        rows.last().map_or(from, |row| LogPosition { revision: row.revision, hash: row.hash })
    }

    async fn send_renewal(&self, renewal: &RenewalRequest) -> Result<RenewalOutcome, StoreError> {
        const META_COLUMNS: usize = 9;
        let sql = renewal_sql(renewal, &self.server_arguments().await.map_err(store_error)?);
        let query = self.run_transaction(&self.replica_connections.renewals, &sql, CALL_TIMEOUT);
        let mut rows = query.await.map_err(store_error)?;
        // First whether the row was updated, then the changes, then the state of the database.
        let last = rows.pop().ok_or_else(|| damaged_error("meta", "it has no row"))?;
        let meta = TextRow::from_pg_row(&last, 0..META_COLUMNS).map_err(store_error)?;
        let (written, changes): (Vec<_>, Vec<_>) = rows.into_iter().partition(|row| sqlx::Row::len(row) == 1);
        let is_written =
            |row: &PgRow| TextRow::from_pg_row(row, 0..1).and_then(|row| Ok(row.text(0)? == "t"));
        let renewed = written.first().map_or(Ok(false), is_written).map_err(store_error)?;
        let changes = decode_log_entries(&changes, 0..LOG_COLUMNS.split(',').count())?;
        let from = renewal.applied.unwrap_or(LogPosition::START);
        let reply = decode_reply(&meta, renewed, renewal, Self::end_position(from, &changes));
        let reply = reply.map_err(store_error)?;
        let epoch = meta.int(7).and_then(decode_count).map_err(store_error)?;
        let replicas = meta.int(8).and_then(decode_count).map_err(store_error)?;
        if reply.acknowledged_hash.is_none_or(|link| link != from.hash) && renewal.applied.is_some() {
            return Ok(RenewalOutcome {
                reply: RenewalReply { changes_end: from, ..reply },
                entries: Vec::new(),
                epoch,
                replica_count: replicas,
            });
        }
        if renewal.applied.is_some() {
            self.advance_known_head(reply.changes_end);
        }
        Ok(RenewalOutcome { reply, entries: changes, epoch, replica_count: replicas })
    }

    /// The server and its identity as SQL arguments. The identity is queried once per server.
    async fn server_arguments(&self) -> PgResult<String> {
        let known =
            || self.replica_connections.server_identity.lock().unwrap_or_else(PoisonError::into_inner);
        let identity = known().clone();
        if let Some((server, identity)) = identity {
            return Ok(format!("{}, {}", server.to_sql_literal(), identity.to_sql_literal()));
        }
        let query = format!("SELECT {SERVER_START_TIME}, {SYSTEM_IDENTIFIER}");
        let rows = self.run_transaction(&self.replica_connections.changes, &query, CALL_TIMEOUT).await?;
        let row = TextRow::from_pg_row(rows.first().ok_or(sqlx::Error::RowNotFound)?, 0..2)?;
        *known() = Some((row.int(0)?, row.text(1)?.to_owned()));
        Ok(UNKNOWN_SERVER.to_owned())
    }

    /// Records that the log continues from what this process knew to this position. Earlier entries may be archived.
    fn advance_known_head(&self, LogPosition { revision, hash }: LogPosition) {
        let mut known = self.known_head();
        if known.is_some_and(|known| known.revision < revision) {
            *known = Some(LogHead { revision, hash });
        }
    }
}

/// The statements of a renewal; `server` comes from [`PostgresStore::server_arguments`]. The changes are read before
/// the head: if another process commits in between, the changes do not reach the head, and nothing is granted.
fn renewal_sql(renewal: &RenewalRequest, server: &str) -> String {
    let RenewalRequest { id, sequence: counts, applied, settle_incarnation: settle, attempt: _ } = renewal;
    let position = applied.unwrap_or(LogPosition::START);
    let link = applied.filter(|at| at.revision > Revision(0)).map(|at| at.hash.to_vec());
    let reached = revision_to_i64(position.revision);
    let mut sql = format!(
        "SELECT renew({id}, {acknowledged}, {link}, {seen}, {next}); ",
        id = id.0.as_bytes().as_slice().to_sql_literal(),
        acknowledged = applied.map(|_| reached).to_sql_literal(),
        link = link.to_sql_literal(),
        seen = counts.confirmed,
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
            "SELECT {LOG_COLUMNS} FROM log WHERE revision > {reached} ORDER BY revision LIMIT {MAX_CHANGES_PER_REPLY}; "
        );
    }
    let _ = write!(sql, "SELECT * FROM standing({reached}, {server})");
    sql
}

fn decode_reply(
    meta: &TextRow,
    renewed: bool,
    renewal: &RenewalRequest,
    upto: LogPosition,
) -> PgResult<RenewalReply> {
    let link = match renewal.applied {
        Some(at) if at.revision == Revision(0) => Some(LogPosition::START.hash),
        Some(_) => decode_hash_opt(meta, 6)?,
        None => None,
    };
    Ok(RenewalReply {
        was_renewed: renewed,
        acknowledged_hash: link,
        changes_end: upto,
        head: revision_from_i64(meta.int(0)?),
        lease: lease_from_millis(meta.int(1)?)?,
        longest_lease: lease_from_millis(meta.int(2)?)?,
        incarnation: parse_incarnation(meta.text(3)?)?,
        settled_incarnation: parse_incarnation_opt(meta.text(4)?)?,
        database_time: Timestamp::from_micros(meta.int(5)?),
    })
}

fn decode_lease_config(row: &PgRow) -> PgResult<LeaseConfig> {
    let row = TextRow::from_pg_row(row, 0..3)?;
    let (lease, longest) = (lease_from_millis(row.int(0)?)?, lease_from_millis(row.int(1)?)?);
    Ok(LeaseConfig { lease, longest_lease: longest, epoch: decode_count(row.int(2)?)? })
}

/// Decodes rows of the function `roster`: columns of `meta` in each, then a replica, if there is one.
fn decode_replica_snapshot(rows: &[PgRow]) -> PgResult<ReplicaSnapshot> {
    const META_COLUMNS: usize = 8;
    let first = rows.first().ok_or(sqlx::Error::RowNotFound)?;
    let meta = TextRow::from_pg_row(first, 0..META_COLUMNS)?;
    let (mut listed, mut names) = (Vec::new(), HashMap::new());
    for row in rows {
        let row = TextRow::from_pg_row(row, META_COLUMNS..META_COLUMNS + 5)?;
        if row.bytes_opt(0)?.is_none() {
            continue;
        }
        let id = ReplicaId(Uuid::from_bytes(fixed_bytes(&row, 0)?));
        names.insert(id, row.text(1)?.to_owned());
        listed.push(ReplicaRow {
            id,
            applied: row.int_opt(2)?.map(revision_from_i64),
            renew_seq: decode_count(row.int(3)?)?,
            last_seen: Timestamp::from_micros(row.int(4)?),
        });
    }
    let listing = ReplicaListing {
        rows: listed,
        longest_lease: lease_from_millis(meta.int(1)?)?,
        incarnation: parse_incarnation(meta.text(2)?)?,
        settled_incarnation: parse_incarnation_opt(meta.text(3)?)?,
        database_time: Timestamp::from_micros(meta.int(4)?),
    };
    let links = meta
        .text_opt(5)?
        .unwrap_or_default()
        .split_terminator(',')
        .map(parse_entry_hash)
        .collect::<PgResult<_>>()?;
    let sync_replicated = meta.text(6)? == "true";
    let (head, archived) = (revision_from_i64(meta.int(0)?), revision_from_i64(meta.int(7)?));
    Ok(ReplicaSnapshot {
        listing,
        names,
        entry_hashes: links,
        head,
        archived_up_to: archived,
        sync_replicated,
    })
}

/// Parses an entry hash of `roster`: a revision, a colon, the hash in hex.
fn parse_entry_hash(text: &str) -> PgResult<(Revision, ChainHash)> {
    let wrong = || sqlx::Error::Decode("an entry hash is malformed".into());
    let (revision, hash) = text.split_once(':').ok_or_else(wrong)?;
    let byte = |at: usize| u8::from_str_radix(hash.get(2 * at..2 * at + 2)?, 16).ok();
    let bytes: Option<Vec<u8>> = (0..32).map(byte).collect();
    let hash = bytes.and_then(|bytes| bytes.try_into().ok()).ok_or_else(wrong)?;
    Ok((revision_from_i64(revision.parse().map_err(|_| wrong())?), hash))
}

#[async_trait]
impl ReplicaRegistry for PostgresStore {
    async fn lease_config(&self) -> Result<LeaseConfig, StoreError> {
        let query = "SELECT lease_ms, longest_ms, epoch FROM meta";
        let rows = self
            .run_transaction(&self.replica_connections.registry, query, CALL_TIMEOUT)
            .await
            .map_err(store_error)?;
        let row = rows.first().ok_or_else(|| damaged_error("meta", "it has no row"))?;
        decode_lease_config(row).map_err(store_error)
    }

    async fn initialize_lease(&self, lease: LeaseDuration) -> Result<bool, StoreError> {
        let millis = lease_to_millis(lease);
        let set =
            format!("UPDATE meta SET lease_ms = {millis}, longest_ms = {millis} WHERE head = 0 RETURNING 1");
        let rows = self
            .run_transaction(&self.replica_connections.registry, &set, CALL_TIMEOUT)
            .await
            .map_err(store_error)?;
        Ok(!rows.is_empty())
    }

    async fn set_lease(&self, lease: LeaseDuration) -> Result<(), StoreError> {
        let millis = lease_to_millis(lease);
        let set = format!(
            "UPDATE meta SET lease_ms = {millis}, longest_ms = greatest(longest_ms, lease_ms, {millis})"
        );
        self.run_transaction(&self.replica_connections.registry, &set, CALL_TIMEOUT)
            .await
            .map(drop)
            .map_err(store_error)
    }

    async fn finish_lease_change(&self, lease: LeaseDuration) -> Result<bool, StoreError> {
        let millis = lease_to_millis(lease);
        let set = format!("UPDATE meta SET longest_ms = {millis} WHERE lease_ms = {millis} RETURNING 1");
        let rows = self
            .run_transaction(&self.replica_connections.registry, &set, CALL_TIMEOUT)
            .await
            .map_err(store_error)?;
        Ok(!rows.is_empty())
    }

    async fn register(&self, id: ReplicaId, name: &str) -> Result<(), StoreError> {
        let (id, name) = (id.0.as_bytes().as_slice().to_sql_literal(), name.to_sql_literal());
        let insert = format!(
            "INSERT INTO replicas (id, name, applied, renew_seq, last_seen, log_format) \
             VALUES ({id}, {name}, NULL, 0, {DATABASE_NOW}, {reads})",
            reads = LogFormat::NEWEST.0,
        );
        self.run_transaction(&self.replica_connections.renewals, &insert, CALL_TIMEOUT)
            .await
            .map(drop)
            .map_err(store_error)
    }

    async fn renew_lease(&self, renewal: &RenewalRequest) -> Result<RenewalOutcome, StoreError> {
        self.send_renewal(renewal).await
    }

    /// In a separate transaction, on a separate connection: NOTIFY waits for all other notifying transactions of the
    /// server, and must not delay a renewal.
    async fn notify_ack(&self, id: ReplicaId, upto: Revision) -> Result<(), StoreError> {
        let message = format!("NOTIFY {}, '{}'", self.target.ack_channel(), encode_acknowledgment(id, upto));
        self.replica_connections
            .notifications
            .fetch_rows(message, CALL_TIMEOUT)
            .await
            .map(drop)
            .map_err(store_error)
    }

    async fn confirm_primary(&self, id: ReplicaId, since: Instant) -> Result<bool, StoreError> {
        let write = format!(
            "UPDATE replicas SET last_seen = {DATABASE_NOW} WHERE id = {} RETURNING 1",
            id.0.as_bytes().as_slice().to_sql_literal()
        );
        let rows = self
            .run_transaction(&self.replica_connections.changes, &write, CALL_TIMEOUT)
            .await
            .map_err(store_error)?;
        Ok(!rows.is_empty() && self.seen_servers.is_single_since(since))
    }

    async fn fetch_changes_after(&self, after: Revision) -> Result<Vec<LogEntry>, StoreError> {
        let after = revision_to_i64(after);
        let query = format!(
            "SELECT {LOG_COLUMNS} FROM log WHERE revision > {after} ORDER BY revision LIMIT {MAX_CHANGES_PER_REPLY}"
        );
        let rows = self
            .run_transaction(&self.replica_connections.changes, &query, CALL_TIMEOUT)
            .await
            .map_err(store_error)?;
        decode_log_entries(&rows, 0..LOG_COLUMNS.split(',').count())
    }

    async fn list_replicas(&self, revisions: &[Revision]) -> Result<ReplicaSnapshot, StoreError> {
        let revisions = array_literal(revisions, |revision| revision_to_i64(*revision));
        let server = self.server_arguments().await.map_err(store_error)?;
        let query = format!("SELECT * FROM roster({revisions}::bigint[], {server})");
        let rows = self
            .run_transaction(&self.replica_connections.registry, &query, CALL_TIMEOUT)
            .await
            .map_err(store_error)?;
        decode_replica_snapshot(&rows).map_err(store_error)
    }

    async fn deregister(&self, id: ReplicaId, renew_seq: Option<u64>) -> Result<bool, StoreError> {
        let still = renew_seq.map(|count| format!(" AND renew_seq = {count}")).unwrap_or_default();
        let delete = format!(
            "DELETE FROM replicas WHERE id = {}{still} RETURNING 1",
            id.0.as_bytes().as_slice().to_sql_literal()
        );
        let rows = self
            .run_transaction(&self.replica_connections.registry, &delete, CALL_TIMEOUT)
            .await
            .map_err(store_error)?;
        Ok(!rows.is_empty())
    }

    async fn next_notification(&self) -> Result<ReplicaNotification, StoreError> {
        let mut slot = self.replica_connections.listener.lock().await;
        let mut listener = match slot.take() {
            Some(listener) => listener,
            None => match self.connect_listener().await.map_err(store_error)? {
                Some(listener) => listener,
                None => {
                    // The pooler may be gone at the next attempt.
                    tokio::time::sleep(POOLER_RETRY_INTERVAL).await;
                    return Err(connection_lost(
                        "a pooler is between this process and the database, and does not pass notifications on",
                    ));
                }
            },
        };
        loop {
            // None: the connection has ended, and notifications meanwhile are lost.
            let notification =
                with_timeout(LISTENER_TIMEOUT, listener.try_recv()).await.map_err(store_error)?;
            let notification =
                notification.ok_or_else(|| connection_lost("the listening connection has ended"))?;
            if let Some(hint) = self.replica_connections.parse_notification(
                &self.target,
                notification.channel(),
                notification.payload(),
            ) {
                *slot = Some(listener);
                return Ok(hint);
            }
        }
    }

    fn forget_known_head(&self) {
        *self.known_head() = None;
    }

    async fn accept_regression(&self) -> Result<u64, StoreError> {
        // A restored database may have a lower epoch than its replicas have seen; the time exceeds all of them.
        let set = "UPDATE meta SET epoch = greatest(epoch + 1, extract(epoch FROM clock_timestamp())::bigint) \
                   RETURNING epoch";
        let rows = self
            .run_transaction(&self.replica_connections.registry, set, CALL_TIMEOUT)
            .await
            .map_err(store_error)?;
        let row = rows.first().ok_or_else(|| damaged_error("meta", "it has no row"))?;
        let epoch = TextRow::from_pg_row(row, 0..1).and_then(|row| decode_count(row.int(0)?));
        epoch.map_err(store_error)
    }
}

fn connection_lost(why: &'static str) -> StoreError {
    StoreError::Unavailable(why.into())
}

/// The server process of this session, which may be new or lent by a pooler.
async fn backend_pid(connection: &mut sqlx::PgConnection) -> PgResult<i64> {
    let row = sqlx::raw_sql("SELECT pg_backend_pid()").fetch_one(connection).await?;
    TextRow::from_pg_row(&row, 0..1)?.int(0)
}

impl PostgresStore {
    /// A connection that receives notifications; `None` behind a pooler, which would lend the listening session to
    /// clients that do not expect notifications.
    ///
    /// A pooler is detected by a new connection that gets an existing session. Two connections are tried, since the
    /// first may have used up the pooler's free sessions.
    async fn connect_listener(&self) -> PgResult<Option<PgListener>> {
        const SELECT_KNOWN_PIDS: &str = "SELECT pid FROM pg_stat_activity WHERE usename = current_user";
        let known =
            self.run_transaction(&self.replica_connections.registry, SELECT_KNOWN_PIDS, CALL_TIMEOUT).await?;
        let known = known.iter().map(|row| TextRow::from_pg_row(row, 0..1)?.int(0));
        let mut known = known.collect::<PgResult<Vec<_>>>()?;
        let probe = sqlx::PgConnection::connect_with(&self.target.options);
        let mut probe = with_timeout(ACQUIRE_TIMEOUT, probe).await?;
        let first = with_timeout(ACQUIRE_TIMEOUT, backend_pid(&mut probe)).await?;
        let _ = with_timeout(ACQUIRE_TIMEOUT, probe.close()).await;
        if known.contains(&first) {
            return Ok(None);
        }
        known.push(first);
        let pool = PgPoolOptions::new().max_connections(1).acquire_timeout(ACQUIRE_TIMEOUT);
        let pool = pool.connect_lazy_with(self.target.options.clone());
        let mut listener = with_timeout(ACQUIRE_TIMEOUT, PgListener::connect_with(&pool)).await?;
        let query = sqlx::raw_sql("SELECT pg_backend_pid()").fetch_one(&mut listener);
        let second = TextRow::from_pg_row(&with_timeout(ACQUIRE_TIMEOUT, query).await?, 0..1)?.int(0)?;
        if known.contains(&second) {
            return Ok(None);
        }
        // A reconnection would hide that notifications were missed, so the connection must end instead.
        listener.eager_reconnect(false);
        let acknowledgments = self.target.ack_channel();
        with_timeout(ACQUIRE_TIMEOUT, listener.listen_all([self.target.commit_channel(), &acknowledgments]))
            .await?;
        Ok(Some(listener))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::lease::{AttemptId, RenewalSequence};

    #[test]
    fn leases_read_back_and_none_is_zero() {
        for lease in [LeaseDuration::STRICT, LeaseDuration::DEFAULT, LeaseDuration::INFINITE] {
            assert_eq!(lease_from_millis(lease_to_millis(lease)).unwrap(), lease);
        }
        assert!(lease_from_millis(0).is_err() && lease_from_millis(-1).is_err());
    }

    #[test]
    fn a_renewal_says_where_it_is_and_with_which_link() {
        let at = LogPosition { revision: Revision(7), hash: [0xab; 32] };
        let renewal = RenewalRequest {
            attempt: AttemptId(1),
            id: ReplicaId(Uuid::nil()),
            sequence: RenewalSequence { confirmed: 3, next: 5 },
            applied: Some(at),
            settle_incarnation: None,
        };
        let sql = renewal_sql(&renewal, UNKNOWN_SERVER);
        let id = "00".repeat(16);
        let renew =
            format!("renew(E'\\\\x{id}'::bytea, '7'::bigint, E'\\\\x{}'::bytea, 3, 5)", "ab".repeat(32));
        assert!(sql.contains(&renew) && sql.contains("revision > 7 ORDER BY"), "{sql}");
        let loading = renewal_sql(&RenewalRequest { applied: None, ..renewal }, UNKNOWN_SERVER);
        assert!(loading.contains("NULL, NULL, 3, 5)") && !loading.contains("ORDER BY"), "{loading}");
    }

    #[test]
    fn a_link_is_a_revision_and_32_bytes() {
        let text = format!("12:{}", "0f".repeat(32));
        assert_eq!(parse_entry_hash(&text).unwrap(), (Revision(12), [15; 32]));
        for bad in ["", "12", "12:", "x:00", "12:zz"] {
            assert!(parse_entry_hash(bad).is_err(), "{bad:?}");
        }
    }
}
