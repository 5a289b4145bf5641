//! What a replica hears, and what it wants done.

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
        /// Of the request.
        attempt: AttemptId,
        /// The new row.
        id: ReplicaId,
    },
    /// A snapshot is at hand, whole, beside the map.
    Loaded {
        /// Of the request.
        attempt: AttemptId,
        /// What it holds.
        at: LogPosition,
    },
    /// A renewal was answered.
    Renewed {
        /// Of the request.
        attempt: AttemptId,
        /// What its transaction saw.
        reply: RenewalReply,
    },
    /// A request failed. Whether it was done all the same is unknown.
    Failed {
        /// Of the request.
        attempt: AttemptId,
    },
    /// Something was committed (NOTIFY), or seems to have been. Only saves time.
    Hint,
    /// The map holds changes up to here that came by another way than a renewal: this process's own, or such as were
    /// read at a hint. They follow what it held without a gap.
    Advanced {
        /// What it holds now.
        to: LogPosition,
    },
    /// Changes came that do not follow what the map holds: another history.
    Diverged {
        /// What the map holds.
        local_position: LogPosition,
        /// The newest revision that came.
        head: Revision,
    },
    /// The operator has accepted that the database goes on from an older state.
    RegressionAccepted,
    /// The process is about to end.
    Stop,
}

/// What a renewal's transaction saw.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RenewalReply {
    /// Whether the row was changed: it was there, with a count that was expected, and what it was to acknowledge
    /// is in the log.
    pub was_renewed: bool,
    /// The database's own link at the revision that the renewal acknowledged ([`LogPosition::START`] is in every
    /// database). None = its log ends before; also where the renewal acknowledged nothing.
    pub acknowledged_hash: Option<ChainHash>,
    /// Where the changes end that came along; what was acknowledged, if none did. They follow each other and
    /// `link` without a gap, and each matches its own hash.
    pub changes_end: LogPosition,
    /// The newest revision there is. Beyond `upto` when that many changes did not fit.
    pub head: Revision,
    /// The lease that a renewal grants.
    pub lease: LeaseDuration,
    /// The longest that any replica may hold.
    pub longest_lease: LeaseDuration,
    /// The life of the database that the transaction ran in.
    pub incarnation: Incarnation,
    /// The newest life in which every earlier lease is known to have run out.
    pub settled_incarnation: Option<Incarnation>,
    /// The database's wall clock.
    pub database_time: Timestamp,
}

/// What a replica wants done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ReplicaAction {
    /// Insert a row under a new id. Answer: `Registered` or `Failed`.
    Register {
        /// To name in the answer.
        attempt: AttemptId,
    },
    /// Read every key and the head in one transaction, beside the map. Answer: `Loaded` or `Failed`; the end of
    /// a read that stalls is the reader's to decide.
    Load {
        /// To name in the answer.
        attempt: AttemptId,
    },
    /// Renew. Answer: `Renewed` or `Failed`.
    Renew(RenewalRequest),
    /// Nobody waits for this request any more: drop its connection, which may be dead.
    Abandon {
        /// Of the request.
        attempt: AttemptId,
    },
    /// Make the loaded snapshot the map.
    InstallSnapshot {
        /// Of the load.
        attempt: AttemptId,
    },
    /// Change the map by the changes that came with this renewal's answer, in their order.
    ApplyChanges {
        /// Of the renewal.
        attempt: AttemptId,
    },
    /// Let Checks allow until then.
    PublishDeadline {
        /// The first instant at which nothing is allowed any more.
        deadline: BootInstant,
        /// The map holds at least what the database held at this instant.
        as_of: BootInstant,
    },
    /// Let Checks allow nothing.
    DenyAll,
    /// The database's history is not the one this map was made from: page the operator. The map stays, so what
    /// is known to be dead stays dead; the lease is left to run out.
    EnterRegressed {
        /// What the map holds.
        local_position: LogPosition,
        /// The database's own link at that revision; None = its log ends before.
        database_hash: Option<ChainHash>,
        /// The database's newest revision.
        head: Revision,
    },
    /// This machine's clock stood still, for this long at the least: count it.
    ReportClockStall {
        /// What is missing; taken off the lease already.
        stall: Duration,
    },
    /// Delete the row. There is no answer.
    Deregister {
        /// The row.
        id: ReplicaId,
    },
}

/// A renewal to send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RenewalRequest {
    /// To name in the answer.
    pub attempt: AttemptId,
    /// The row.
    pub id: ReplicaId,
    /// Which count the row must have, and gets.
    pub sequence: RenewalSequence,
    /// What the map holds: fetch what follows. None = the map is still being loaded: fetch nothing.
    pub applied: Option<LogPosition>,
    /// Set `meta.settled` to this, if the transaction runs in it.
    pub settle_incarnation: Option<Incarnation>,
}
