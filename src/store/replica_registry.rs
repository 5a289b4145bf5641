//! What the lease protocol needs from a database that several replicas share: the trait [`ReplicaRegistry`].
//!
//! `domain::lease` has the rules and `replication` drives them. Each method here is one transaction; it never waits for
//! another replica.

use std::collections::HashMap;

use async_trait::async_trait;
use tokio::time::Instant;

use super::error::StoreError;
use crate::domain::{
    lease::{LeaseDuration, RenewalReply, RenewalRequest, ReplicaId, ReplicaListing},
    log::{ChainHash, LogEntry},
    time::Revision,
};

/// The maximum number of changes in one reply.
pub const MAX_CHANGES_PER_REPLY: u32 = 1000;

/// The reply to a renewal, with the changes that it delivers.
#[derive(Clone, Debug)]
pub struct RenewalOutcome {
    /// The state that the transaction of the renewal saw.
    pub reply: RenewalReply,
    /// The changes after the acknowledged position, up to `reply.changes_end`.
    pub entries: Vec<LogEntry>,
    /// The epoch of the database, see [`LeaseConfig::epoch`].
    pub epoch: u64,
    /// The number of registered replicas.
    pub replica_count: u64,
}

/// The rows of all replicas and the end of the log, read in one snapshot.
#[derive(Clone, Debug)]
pub struct ReplicaSnapshot {
    /// The rows, with the lease and the incarnation of the database.
    pub listing: ReplicaListing,
    /// The configured names of the replicas.
    pub names: HashMap<ReplicaId, String>,
    /// The hashes of the requested log entries; missing entries are left out.
    pub entry_hashes: HashMap<Revision, ChainHash>,
    /// The newest revision of the log.
    pub head: Revision,
    /// The last archived revision, which every replica had acknowledged.
    pub archived_up_to: Revision,
    /// Whether commits wait for a synchronous standby.
    pub sync_replicated: bool,
}

/// A notification over the database. Advisory only: it may be late, repeated, lost or forged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReplicaNotification {
    /// A change was committed, up to this revision if the notification is readable.
    Committed(Option<Revision>),
    /// This process has committed a change itself.
    OwnCommit,
    /// A replica has acknowledged every change up to a revision.
    Acknowledged {
        /// The replica that acknowledged the changes.
        replica: ReplicaId,
        /// The newest acknowledged revision.
        up_to: Revision,
    },
}

/// The lease settings that the database gives to all replicas.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LeaseConfig {
    /// The lease that a renewal grants.
    pub lease: LeaseDuration,
    /// The longest lease that any replica may hold.
    pub longest_lease: LeaseDuration,
    /// The epoch, which grows each time an operator accepts that the database has lost changes. It exceeds the epoch of
    /// every earlier history.
    pub epoch: u64,
}

/// A database that several replicas share.
#[async_trait]
pub trait ReplicaRegistry: Send + Sync + 'static {
    /// Reads the lease settings and the epoch.
    async fn lease_config(&self) -> Result<LeaseConfig, StoreError>;

    /// Sets the lease of a database without any log entry. Returns whether it did.
    async fn initialize_lease(&self, lease: LeaseDuration) -> Result<bool, StoreError>;

    /// Sets the lease that renewals grant from now on. A longer one is also the longest lease at once; a shorter one
    /// becomes that by [`ReplicaRegistry::finish_lease_change`], when all leases granted before have expired.
    async fn set_lease(&self, lease: LeaseDuration) -> Result<(), StoreError>;

    /// Makes `lease` the longest lease, if renewals still grant it: no replica holds a longer one anymore. Returns
    /// whether they do.
    async fn finish_lease_change(&self, lease: LeaseDuration) -> Result<bool, StoreError>;

    /// Inserts a row without an applied position, with a `renew_seq` of 0 and the newest log format that this release
    /// reads.
    ///
    /// # Errors
    /// If the database fails, or the log contains entries of a newer format.
    async fn register(&self, id: ReplicaId, name: &str) -> Result<(), StoreError>;

    /// Renews the lease of a replica in one durable transaction.
    async fn renew_lease(&self, renewal: &RenewalRequest) -> Result<RenewalOutcome, StoreError>;

    /// Notifies the other processes that a replica has acknowledged all changes up to a revision. Advisory only.
    async fn notify_ack(&self, id: ReplicaId, upto: Revision) -> Result<(), StoreError>;

    /// Writes to the row of a replica, durably. This proves that everything read since `since` was current: a replaced
    /// primary answers reads but cannot commit. Returns false if another server has answered meanwhile, or the row no
    /// longer exists.
    async fn confirm_primary(&self, id: ReplicaId, since: Instant) -> Result<bool, StoreError>;

    /// The changes after a revision, in ascending order; at most [`MAX_CHANGES_PER_REPLY`].
    async fn fetch_changes_after(&self, after: Revision) -> Result<Vec<LogEntry>, StoreError>;

    /// Reads the rows of all replicas and the hashes of these log entries in one snapshot.
    async fn list_replicas(&self, revisions: &[Revision]) -> Result<ReplicaSnapshot, StoreError>;

    /// Deletes the row of a replica; with `renew_seq`, only if the row still has that count. Returns whether a row was
    /// deleted.
    async fn deregister(&self, id: ReplicaId, renew_seq: Option<u64>) -> Result<bool, StoreError>;

    /// Waits for the next notification. There may be too many. There are none if the connection does not support them.
    ///
    /// # Errors
    /// If the connection ends or has been silent for long. The next call opens another one.
    async fn next_notification(&self) -> Result<ReplicaNotification, StoreError>;

    /// Accepts whatever history the database has now, because an operator has accepted that it changed.
    fn forget_known_head(&self);

    /// Records that the loss of changes is accepted, by a new epoch. Returns that epoch.
    async fn accept_regression(&self) -> Result<u64, StoreError>;
}
