//! What the lease protocol asks of a database that several replicas share: the trait [`Fleet`]. The rules are
//! `domain::lease`'s, who drives them is `replication`; here is what one transaction does, and no waiting.

use std::collections::HashMap;

use async_trait::async_trait;
use tokio::time::Instant;

use super::StoreError;
use crate::domain::{
    lease::{Lease, Listing, Renewal, ReplicaId, Reply},
    log::{Hash, LogRow},
    time::Revision,
};

/// How many changes one answer holds at the most.
pub const MOST_ROWS: u32 = 1000;

/// A renewal's answer.
#[derive(Clone, Debug)]
pub struct Renewed {
    /// What its transaction saw.
    pub reply: Reply,
    /// The changes that came along, up to `reply.upto`.
    pub rows: Vec<LogRow>,
    /// See [`Terms::epoch`].
    pub epoch: u64,
    /// How many replicas there are.
    pub replicas: u64,
}

/// One reading of the replicas' rows, with what is asked of it.
#[derive(Clone, Debug)]
pub struct Roster {
    /// The rows.
    pub listing: Listing,
    /// What people call the replicas.
    pub names: HashMap<ReplicaId, String>,
    /// The log's links at the revisions that were asked for; those that it does not have are left out.
    pub links: HashMap<Revision, Hash>,
    /// The newest revision.
    pub head: Revision,
    /// Up to where the log was archived: every replica had acknowledged that.
    pub archived: Revision,
    /// Whether a commit waits for a synchronous standby.
    pub sync_replicated: bool,
}

/// Something that somebody has been told over the database. It may come late, twice, never, or from anybody.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hint {
    /// Something was committed, up to this revision where that can be read.
    Committed(Option<Revision>),
    /// This process has committed something itself.
    Own,
    /// A replica has acknowledged every change up to a revision.
    Acknowledged {
        /// Which.
        replica: ReplicaId,
        /// Up to where.
        upto: Revision,
    },
}

/// What the database says to all replicas.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Terms {
    /// The lease that a renewal grants.
    pub lease: Lease,
    /// The longest that anybody may hold.
    pub longest: Lease,
    /// Grows each time that people accept that the database has lost changes, and beyond what it was in any history
    /// before.
    pub epoch: u64,
}

/// A database that several replicas share.
#[async_trait]
pub trait Fleet: Send + Sync + 'static {
    /// What holds for all.
    async fn terms(&self) -> Result<Terms, StoreError>;

    /// Sets the lease of a database that holds nothing yet. Whether it did.
    async fn set_first_lease(&self, lease: Lease) -> Result<bool, StoreError>;

    /// Grants this lease from now on. A longer one is at once what anybody may hold; a shorter one becomes that by
    /// [`Fleet::settle_lease`], when all that were granted before have run out.
    async fn set_lease(&self, lease: Lease) -> Result<(), StoreError>;

    /// Nobody holds a longer lease than `lease` any more, which is what renewals grant. Whether they still do.
    async fn settle_lease(&self, lease: Lease) -> Result<bool, StoreError>;

    /// Inserts a row, without `applied`, with a `renew_seq` of 0, and with the newest log format that this release reads.
    ///
    /// # Errors
    /// When the database fails, or the log contains entries of a newer format.
    async fn register(&self, id: ReplicaId, name: &str) -> Result<(), StoreError>;

    /// Renews: one durable transaction.
    async fn renew(&self, renewal: &Renewal) -> Result<Renewed, StoreError>;

    /// Tells whoever listens up to where a replica has acknowledged. Nothing hangs on it.
    async fn tell(&self, id: ReplicaId, upto: Revision) -> Result<(), StoreError>;

    /// Writes to a row, durably: so what was read since `since`, and before this, was the newest there was. A primary that
    /// was replaced answers reads and commits nothing. False = it may not have been, for another server has answered
    /// meanwhile; or the row is gone.
    async fn prove(&self, id: ReplicaId, since: Instant) -> Result<bool, StoreError>;

    /// The changes after a revision, in order, at most [`MOST_ROWS`].
    async fn follow(&self, after: Revision) -> Result<Vec<LogRow>, StoreError>;

    /// Reads the rows, and the links at these revisions, in one snapshot.
    async fn roster(&self, revisions: &[Revision]) -> Result<Roster, StoreError>;

    /// Deletes a row; with `renew_seq`, only if its count still is that. Whether there was one.
    async fn remove(&self, id: ReplicaId, renew_seq: Option<u64>) -> Result<bool, StoreError>;

    /// Waits until something seems to have been committed or acknowledged. It may say so too often, and never where the
    /// way to the database passes no notifications.
    ///
    /// # Errors
    /// When the connection for it ends, or has been silent for long; the next call makes another.
    async fn hint(&self) -> Result<Hint, StoreError>;

    /// Lets this process build on whatever history the database has: people have accepted that it is another one.
    fn start_over(&self);

    /// Says in the database that the loss of changes is accepted: another epoch. Gives it.
    async fn accept_regression(&self) -> Result<u64, StoreError>;
}
