//! What a replica hears, and what it wants done.

use std::time::Duration;

use crate::domain::{
    lease::{Attempt, Boottime, Counts, Incarnation, Lease, Position, ReplicaId},
    log::Hash,
    time::{Revision, Timestamp},
};

/// What happens to a replica.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// It is time: also the first event of all.
    Tick,
    /// The row is committed: without `applied`, with a `renew_seq` of 0.
    Registered {
        /// Of the request.
        attempt: Attempt,
        /// The new row.
        id: ReplicaId,
    },
    /// A snapshot is at hand, whole, beside the map.
    Loaded {
        /// Of the request.
        attempt: Attempt,
        /// What it holds.
        at: Position,
    },
    /// A renewal was answered.
    Renewed {
        /// Of the request.
        attempt: Attempt,
        /// What its transaction saw.
        reply: Reply,
    },
    /// A request failed. Whether it was done all the same is unknown.
    Failed {
        /// Of the request.
        attempt: Attempt,
    },
    /// Something was committed (NOTIFY), or seems to have been. Only saves time.
    Hint,
    /// The map holds changes up to here that came by another way than a renewal: this process's own, or such as were
    /// read at a hint. They follow what it held without a gap.
    Advanced {
        /// What it holds now.
        to: Position,
    },
    /// Changes came that do not follow what the map holds: another history.
    Diverged {
        /// What the map holds.
        ours: Position,
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
pub struct Reply {
    /// Whether the row was changed: it was there, with a count that was expected, and what it was to acknowledge
    /// is in the log.
    pub renewed: bool,
    /// The database's own link at the revision that the renewal acknowledged ([`Position::START`] is in every
    /// database). None = its log ends before; also where the renewal acknowledged nothing.
    pub link: Option<Hash>,
    /// Where the changes end that came along; what was acknowledged, if none did. They follow each other and
    /// `link` without a gap, and each matches its own hash.
    pub upto: Position,
    /// The newest revision there is. Beyond `upto` when that many changes did not fit.
    pub head: Revision,
    /// The lease that a renewal grants.
    pub lease: Lease,
    /// The longest that any replica may hold.
    pub longest: Lease,
    /// The life of the database that the transaction ran in.
    pub incarnation: Incarnation,
    /// The newest life in which every earlier lease is known to have run out.
    pub settled: Option<Incarnation>,
    /// The database's wall clock.
    pub db_now: Timestamp,
}

/// What a replica wants done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Insert a row under a new id. Answer: `Registered` or `Failed`.
    Register {
        /// To name in the answer.
        attempt: Attempt,
    },
    /// Read every key and the head in one transaction, beside the map. Answer: `Loaded` or `Failed`; the end of
    /// a read that stalls is the reader's to decide.
    Load {
        /// To name in the answer.
        attempt: Attempt,
    },
    /// Renew. Answer: `Renewed` or `Failed`.
    Renew(Renewal),
    /// Nobody waits for this request any more: drop its connection, which may be dead.
    Abandon {
        /// Of the request.
        attempt: Attempt,
    },
    /// Make the loaded snapshot the map.
    Adopt {
        /// Of the load.
        attempt: Attempt,
    },
    /// Change the map by the changes that came with this renewal's answer, in their order.
    Apply {
        /// Of the renewal.
        attempt: Attempt,
    },
    /// Let Checks allow until then.
    Publish {
        /// The first instant at which nothing is allowed any more.
        deadline: Boottime,
        /// The map holds at least what the database held at this instant.
        as_of: Boottime,
    },
    /// Let Checks allow nothing.
    StopAllowing,
    /// The database's history is not the one this map was made from: page the operator. The map stays, so what
    /// is known to be dead stays dead; the lease is left to run out.
    EnterRegressed {
        /// What the map holds.
        ours: Position,
        /// The database's own link at that revision; None = its log ends before.
        link: Option<Hash>,
        /// The database's newest revision.
        head: Revision,
    },
    /// This machine's clock stood still, for this long at the least: count it.
    ReportFrozenClock {
        /// What is missing; taken off the lease already.
        missing: Duration,
    },
    /// Delete the row. There is no answer.
    Leave {
        /// The row.
        id: ReplicaId,
    },
}

/// A renewal to send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Renewal {
    /// To name in the answer.
    pub attempt: Attempt,
    /// The row.
    pub id: ReplicaId,
    /// Which count the row must have, and gets.
    pub counts: Counts,
    /// What the map holds: fetch what follows. None = the map is still being loaded: fetch nothing.
    pub applied: Option<Position>,
    /// Set `meta.settled` to this, if the transaction runs in it.
    pub settle: Option<Incarnation>,
}
