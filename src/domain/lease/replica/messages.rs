//! The events that a replica handles, and the actions that it returns.

use std::time::Duration;

use crate::domain::{
    lease::{AttemptId, BootInstant, Incarnation, LeaseDuration, LogPosition, RenewalSequence, ReplicaId},
    log::ChainHash,
    time::{Revision, Timestamp},
};

/// What happens to a replica.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ReplicaEvent {
    /// It is time: also the first event of all.
    Tick,
    /// The row is committed: without `applied`, with a `renew_seq` of 0.
    Registered {
        /// The request that this responds to.
        attempt: AttemptId,
        /// The id of the new row.
        id: ReplicaId,
    },
    /// A complete snapshot is loaded, but is not the map yet.
    Loaded {
        /// The request that this responds to.
        attempt: AttemptId,
        /// The position of the snapshot.
        at: LogPosition,
    },
    /// A renewal's transaction has committed.
    Renewed {
        /// The request that this responds to.
        attempt: AttemptId,
        /// The values that its transaction read.
        reply: RenewalReply,
    },
    /// A request failed. Whether it was done all the same is unknown.
    Failed {
        /// The request that this responds to.
        attempt: AttemptId,
    },
    /// Something was committed (NOTIFY), or seems to have been. Only saves time.
    Hint,
    /// The map has changes up to here from another source than a renewal: this process's own writes, or a read after a
    /// hint. They follow the map's previous contents without a gap.
    Advanced {
        /// The new position of the map.
        to: LogPosition,
    },
    /// Changes arrived that do not continue the map's history: the database has another history.
    Diverged {
        /// The position of the map.
        local_position: LogPosition,
        /// The newest revision that came.
        head: Revision,
    },
    /// The operator has accepted that the database continues from an older state.
    RegressionAccepted,
    /// The process is about to end.
    Stop,
}

/// What a renewal's transaction saw.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RenewalReply {
    /// Whether the row was updated: it exists, its count was expected, and the log contains the acknowledged position.
    pub was_renewed: bool,
    /// The database's chain hash at the acknowledged revision ([`LogPosition::START`] is in every database). None = its
    /// log ends earlier, or the renewal acknowledged nothing.
    pub acknowledged_hash: Option<ChainHash>,
    /// The end of the delivered changes, or the acknowledged position if there are none. They continue `link` and each
    /// other without a gap, and each matches its own hash.
    pub changes_end: LogPosition,
    /// The newest revision there is. Beyond `upto` when that many changes did not fit.
    pub head: Revision,
    /// The lease that a renewal grants.
    pub lease: LeaseDuration,
    /// The longest that any replica may hold.
    pub longest_lease: LeaseDuration,
    /// The incarnation of the database in the transaction.
    pub incarnation: Incarnation,
    /// The newest incarnation in which every earlier lease is known to have expired.
    pub settled_incarnation: Option<Incarnation>,
    /// The database's wall clock in the transaction.
    pub database_time: Timestamp,
}

/// An action that the driver performs for a replica.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ReplicaAction {
    /// Insert a row under a new id. The response is `Registered` or `Failed`.
    Register {
        /// The id that the response must carry.
        attempt: AttemptId,
    },
    /// Read every key and the head in one transaction, and keep the map meanwhile. The response is `Loaded` or
    /// `Failed`; the reader decides when a stalled read ends.
    Load {
        /// The id that the response must carry.
        attempt: AttemptId,
    },
    /// Send a renewal. The response is `Renewed` or `Failed`.
    Renew(RenewalRequest),
    /// Give up this request: drop its connection, which may be dead.
    Abandon {
        /// The request that this responds to.
        attempt: AttemptId,
    },
    /// Make the loaded snapshot the map.
    InstallSnapshot {
        /// The load that was requested.
        attempt: AttemptId,
    },
    /// Apply the changes of this renewal's response to the map, in order.
    ApplyChanges {
        /// The renewal that was requested.
        attempt: AttemptId,
    },
    /// Allow Checks until the deadline.
    PublishDeadline {
        /// The first instant at which no Check may be allowed.
        deadline: BootInstant,
        /// The map contains at least the database's state at this instant.
        as_of: BootInstant,
    },
    /// Stop allowing Checks until a lease is granted.
    DenyAll,
    /// The database's history differs from the map's: alert the operator. The map stays, so that revoked keys stay
    /// denied, and the lease runs out.
    EnterRegressed {
        /// The position of the map.
        local_position: LogPosition,
        /// The database's hash at that revision; None = its log ends earlier.
        database_hash: Option<ChainHash>,
        /// The newest revision of the database.
        head: Revision,
    },
    /// This machine's clock stalled for at least this long: count it.
    ReportClockStall {
        /// The missing time, which is already subtracted from the lease.
        stall: Duration,
    },
    /// Delete the row. There is no response.
    Deregister {
        /// The id of the row.
        id: ReplicaId,
    },
}

/// The contents of a renewal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RenewalRequest {
    /// The id that the response must carry.
    pub attempt: AttemptId,
    /// The id of the row.
    pub id: ReplicaId,
    /// The count that the row must have, and the one that it gets.
    pub sequence: RenewalSequence,
    /// The position of the map: fetch later changes. None = the map is still being loaded: fetch nothing.
    pub applied: Option<LogPosition>,
    /// Set `meta.settled` to this, if the transaction runs in it.
    pub settle_incarnation: Option<Incarnation>,
}
