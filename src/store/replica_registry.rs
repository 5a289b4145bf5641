//! What the lease protocol asks of a database that several replicas share: the trait [`ReplicaRegistry`]. The rules are
//! `domain::lease`'s, who drives them is `replication`; here is what one transaction does, and no waiting.

use std::collections::HashMap;

use async_trait::async_trait;
use tokio::time::Instant;

use super::error::StoreError;
use crate::domain::{
    lease::{LeaseDuration, RenewalReply, RenewalRequest, ReplicaId, ReplicaListing},
    log::{ChainHash, LogEntry},
    time::Revision,
};

/// How many changes one answer holds at the most.
pub const MAX_CHANGES_PER_REPLY: u32 = 1000;

/// A renewal's answer.
#[derive(Clone, Debug)]
pub struct RenewalOutcome {
    /// What its transaction saw.
    pub reply: RenewalReply,
    /// The changes that came along, up to `reply.upto`.
    pub entries: Vec<LogEntry>,
    /// See [`LeaseConfig::epoch`].
    pub epoch: u64,
    /// How many replicas there are.
    pub replica_count: u64,
}

/// One reading of the replicas' rows, with what is asked of it.
#[derive(Clone, Debug)]
pub struct ReplicaSnapshot {
    /// The rows.
    pub listing: ReplicaListing,
    /// What people call the replicas.
    pub names: HashMap<ReplicaId, String>,
    /// The log's links at the revisions that were asked for; those that it does not have are left out.
    pub entry_hashes: HashMap<Revision, ChainHash>,
    /// The newest revision.
    pub head: Revision,
    /// Up to where the log was archived: every replica had acknowledged that.
    pub archived_up_to: Revision,
    /// Whether a commit waits for a synchronous standby.
    pub sync_replicated: bool,
}

/// Something that somebody has been told over the database. It may come late, twice, never, or from anybody.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReplicaNotification {
    /// Something was committed, up to this revision where that can be read.
    Committed(Option<Revision>),
    /// This process has committed something itself.
    OwnCommit,
    /// A replica has acknowledged every change up to a revision.
    Acknowledged {
        /// Which.
        replica: ReplicaId,
        /// Up to where.
        up_to: Revision,
    },
}

/// What the database says to all replicas.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LeaseConfig {
    /// The lease that a renewal grants.
    pub lease: LeaseDuration,
    /// The longest that anybody may hold.
    pub longest_lease: LeaseDuration,
    /// Grows each time that people accept that the database has lost changes, and beyond what it was in any history
    /// before.
    pub epoch: u64,
}

/// A database that several replicas share.
#[async_trait]
pub trait ReplicaRegistry: Send + Sync + 'static {
    /// What holds for all.
    async fn lease_config(&self) -> Result<LeaseConfig, StoreError>;

    /// Sets the lease of a database that holds nothing yet. Whether it did.
    async fn initialize_lease(&self, lease: LeaseDuration) -> Result<bool, StoreError>;

    /// Grants this lease from now on. A longer one is at once what anybody may hold; a shorter one becomes that by
    /// [`ReplicaRegistry::finish_lease_change`], when all that were granted before have run out.
    async fn set_lease(&self, lease: LeaseDuration) -> Result<(), StoreError>;

    /// Nobody holds a longer lease than `lease` any more, which is what renewals grant. Whether they still do.
    async fn finish_lease_change(&self, lease: LeaseDuration) -> Result<bool, StoreError>;

    /// Inserts a row, without `applied`, with a `renew_seq` of 0, and with the newest log format that this release reads.
    ///
    /// # Errors
    /// When the database fails, or the log contains entries of a newer format.
    async fn register(&self, id: ReplicaId, name: &str) -> Result<(), StoreError>;

    /// Renews: one durable transaction.
    async fn renew_lease(&self, renewal: &RenewalRequest) -> Result<RenewalOutcome, StoreError>;

    /// Tells whoever listens up to where a replica has acknowledged. Nothing hangs on it.
    async fn notify_ack(&self, id: ReplicaId, upto: Revision) -> Result<(), StoreError>;

    /// Writes to a row, durably: so what was read since `since`, and before this, was the newest there was. A primary that
    /// was replaced answers reads and commits nothing. False = it may not have been, for another server has answered
    /// meanwhile; or the row is gone.
    async fn confirm_primary(&self, id: ReplicaId, since: Instant) -> Result<bool, StoreError>;

    /// The changes after a revision, in order, at most [`MAX_CHANGES_PER_REPLY`].
    async fn fetch_changes_after(&self, after: Revision) -> Result<Vec<LogEntry>, StoreError>;

    /// Reads the rows, and the links at these revisions, in one snapshot.
    async fn list_replicas(&self, revisions: &[Revision]) -> Result<ReplicaSnapshot, StoreError>;

    /// Deletes a row; with `renew_seq`, only if its count still is that. Whether there was one.
    async fn deregister(&self, id: ReplicaId, renew_seq: Option<u64>) -> Result<bool, StoreError>;

    /// Waits until something seems to have been committed or acknowledged. It may say so too often, and never where the
    /// way to the database passes no notifications.
    ///
    /// # Errors
    /// When the connection for it ends, or has been silent for long; the next call makes another.
    async fn next_notification(&self) -> Result<ReplicaNotification, StoreError>;

    /// Lets this process build on whatever history the database has: people have accepted that it is another one.
    fn forget_known_head(&self);

    /// Says in the database that the loss of changes is accepted: another epoch. Gives it.
    async fn accept_regression(&self) -> Result<u64, StoreError>;
}
