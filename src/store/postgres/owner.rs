//! Who owns the database. For now one process does, as with SQLite; replicas come with a protocol of their own,
//! which takes this file's place.
//!
//! Two things keep a second process out. A transaction that stays open holds an advisory lock: a second process
//! that starts does not get it and refuses, and a process that dies loses it at once, since its connection goes.
//! It is no session's lock, so pgbouncer bears it. And `meta.term` counts the owners: an owner that lost the lock
//! unawares (the server was restarted, the network cut) finds at its next commit, or within seconds from its own
//! watching, that the term has gone on. Then nothing is recorded, and the process stops.
//!
//! In between it still answers Checks from its memory: closing that gap is what leases are for.

use std::time::Duration;

use sqlx::{Connection as _, PgConnection};
use tokio::{
    sync::{Mutex, watch},
    task::JoinHandle,
};

use crate::store::{OpenError, records::Columns as _};

use super::{CALL, Place, Result, open_error, query, server_error, within};

/// How often the owner looks whether it has the lock still.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// How long a start waits for the lock: an owner that was killed is not always gone at once.
const PATIENCE: Duration = Duration::from_secs(2);
const LOCK_TIMED_OUT: &str = "55P03";

/// The lock, held by a transaction that stays open.
pub(super) struct Claim(PgConnection);

impl Claim {
    /// Takes the lock, or says who has it.
    pub(super) async fn take(place: &Place) -> std::result::Result<Claim, OpenError> {
        match Claim::try_take(place).await {
            Ok(claim) => Ok(claim),
            Err(error) if server_error(&error).is_some_and(|said| said.code() == LOCK_TIMED_OUT) => {
                let owner = within(CALL, holder(place)).await.unwrap_or_default();
                Err(OpenError::Owned { database: place.shown.clone(), owner })
            }
            Err(error) => Err(open_error(place, error)),
        }
    }

    async fn try_take(place: &Place) -> Result<Claim> {
        within(CALL, async {
            let mut connection = PgConnection::connect_with(&place.options).await?;
            let begin = format!(
                "BEGIN READ WRITE; SET LOCAL idle_in_transaction_session_timeout TO 0; \
                 SET LOCAL tcp_keepalives_idle TO 5; SET LOCAL tcp_keepalives_interval TO 2; \
                 SET LOCAL tcp_keepalives_count TO 3; \
                 SET LOCAL lock_timeout TO {}",
                PATIENCE.as_millis()
            );
            sqlx::raw_sql(sqlx::AssertSqlSafe(begin)).execute(&mut connection).await?;
            let lock = query("SELECT pg_advisory_xact_lock($1)").bind(place.lock("owner"));
            lock.execute(&mut connection).await?;
            Ok(Claim(connection))
        })
        .await
    }

    async fn holds(&mut self) -> bool {
        within(CALL, query("SELECT 1").execute(&mut self.0)).await.is_ok()
    }

    /// Watches over the lock from now on, as the owner of `term`.
    pub(super) fn keep(self, place: Place, term: i64) -> Owner {
        let (lost, _) = watch::channel(false);
        let watching = tokio::spawn(watch_over(self, place, term, lost.clone()));
        Owner { term, lost, watching: Mutex::new(Some(watching)) }
    }
}

/// Who has the lock: ` (process N of ADDRESS)`, as far as it can be seen.
async fn holder(place: &Place) -> Result<String> {
    let mut connection = PgConnection::connect_with(&place.options).await?;
    sqlx::raw_sql("BEGIN").execute(&mut connection).await?;
    let lock = place.lock("owner");
    let row = query(
        "SELECT pid::bigint, coalesce(host(client_addr), 'this machine') FROM pg_locks \
         JOIN pg_stat_activity USING (pid) \
         WHERE locktype = 'advisory' AND granted AND classid = $1::bigint::oid AND objid = $2::bigint::oid \
         AND pg_locks.database = (SELECT oid FROM pg_database WHERE datname = current_database())",
    )
    .bind(lock >> 32 & 0xffff_ffff)
    .bind(lock & 0xffff_ffff)
    .fetch_one(&mut connection)
    .await?;
    Ok(format!(" (the server's process {} holds its lock, for {})", row.int(0)?, row.text(1)?))
}

/// Looks again and again whether the lock is held, and takes it again when it was lost. Ends when another process
/// has become the owner.
async fn watch_over(claim: Claim, place: Place, term: i64, lost: watch::Sender<bool>) {
    let mut claim = Some(claim);
    loop {
        tokio::time::sleep(LOOK_EVERY).await;
        if let Some(held) = &mut claim {
            if held.holds().await {
                continue;
            }
            claim = None;
            tracing::warn!(database = place.shown, "the lock on the database was lost; it is taken again");
        }
        let taken = Claim::try_take(&place).await;
        match within(CALL, newest_term(&place)).await {
            Ok(newest) if newest != term => {
                lost.send_replace(true);
                return;
            }
            Ok(_) => {
                claim = taken.ok();
                if claim.is_some() {
                    tracing::info!(database = place.shown, "the lock on the database is held again");
                }
            }
            Err(error) => {
                tracing::debug!(error = &error as &dyn std::error::Error, "the owner could not be read");
            }
        }
    }
}

async fn newest_term(place: &Place) -> Result<i64> {
    let mut connection = PgConnection::connect_with(&place.options).await?;
    let begin = format!("BEGIN READ WRITE; SET LOCAL search_path TO \"{}\"", place.schema);
    sqlx::raw_sql(sqlx::AssertSqlSafe(begin)).execute(&mut connection).await?;
    let term = query("SELECT term FROM meta").fetch_one(&mut connection).await?.int(0);
    let _ = connection.close().await;
    term
}

/// This process as the owner.
pub(super) struct Owner {
    term: i64,
    lost: watch::Sender<bool>,
    watching: Mutex<Option<JoinHandle<()>>>,
}

impl Owner {
    pub(super) fn term(&self) -> i64 {
        self.term
    }

    /// A commit has found out that another process is the owner.
    pub(super) fn has_lost(&self) {
        self.lost.send_replace(true);
    }

    /// Waits until another process is the owner.
    pub(super) async fn lost(&self) {
        // The sender lives as long as `self`.
        let _ = self.lost.subscribe().wait_for(|lost| *lost).await;
    }

    /// Lets go of the lock.
    pub(super) async fn release(&self) {
        if let Some(watching) = self.watching.lock().await.take() {
            watching.abort();
            // The connection goes with the task.
            let _ = watching.await;
        }
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        if let Some(watching) = self.watching.get_mut() {
            watching.abort();
        }
    }
}
