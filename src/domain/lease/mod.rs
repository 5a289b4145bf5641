//! The lease protocol: how many replicas answer from memory, and a revoked key is refused by all of them.
//!
//! **Once Revoke returns OK, every Check that starts afterwards is refused, on every replica.** Three state
//! machines keep that promise. Each takes an event and the present instant, and gives actions:
//!
//! | machine | runs | does |
//! |---|---|---|
//! | [`Replica`] | once a process | registers, loads, follows, renews its lease, gives it up |
//! | [`PropagationTracker`] | once a narrowing change | waits until no replica can allow what was narrowed |
//! | [`ReplicaCollector`] | once a process | removes the rows of replicas that are dead |
//!
//! Not here: I/O, clocks, async, randomness. So a simulator can drive whole fleets of them through faults that
//! no test of real processes would ever meet (`tests/it/lease`), and the layer that does drive them has
//! little left to get wrong.
//!
//! # Why it holds
//! A replica may allow until a deadline. The deadline counts from before a renewal was sent, and is granted with
//! every change that was committed by then. A revoker commits, and *then* reads the list of replicas. Whoever
//! may still allow the key was granted its lease by what was read before that commit; so it is on the list, where
//! it stood before it was granted any, and the revoker waits: until it has acknowledged the change, or its row was
//! removed, or 1.25 leases have passed, by which time its deadline has, even if the one clock is slow and the
//! other fast. Where the list may have lost rows, only time helps. [`LeaseInvariant`] lists what this rests on.
//!
//! # What whoever drives a machine owes it
//! - The instant of an event is read when the event is at hand, and before its actions are begun.
//! - Actions are done in their order, each before the next. To have sent a request is to have done it; the
//!   answer is a later event. The next event waits for the last action.
//! - Every answer names its [`AttemptId`] and may come late, twice or never; the machines sort that out. What is
//!   certain is that each request is one transaction, and that its answer tells what one snapshot of it saw. A
//!   renewal's snapshot is taken before its own change is seen by others, by as long as its commit takes.
//! - A machine is given a `Tick` at the instant that its `wake_at` says, or later, and asked again after each
//!   event.
//! - A Check reads the deadline, then the clock, then the map; it allows only if `clock < deadline`.
//!
//! # What the database owes
//! - Read committed is enough, where what an answer tells was read by one statement, or in one snapshot.
//! - One row, `meta`, gives revisions; its lock makes commit order, revision order and visibility one order.
//! - A renewal changes the replica's row if and only if the row is there, its count is one that [`RenewalSequence`]
//!   expects, and the log holds the [`LogPosition`] that is acknowledged: a number alone acknowledges nothing. It
//!   is a durable commit like any other ("the log is the lease").
//! - An acknowledged commit is not lost. Where it is lost all the same, or a backup is restored, the
//!   [`Incarnation`] is another one.
//! - The lease grows at once. It shrinks in two steps: `lease` first, and `longest` after the old one's
//!   [`LeaseDuration::outlived_after`]; from infinite, after every row has renewed.

mod boot_instant;
mod clock_stall;
pub mod collector;
mod invariants;
mod lease_duration;
pub mod propagation_tracker;
pub mod replica;

pub use boot_instant::BootInstant;
pub use collector::ReplicaCollector;
#[cfg(keyward_breakable)]
pub use invariants::disable_invariant;
pub use invariants::{AllInvariants, InvariantSet, LeaseInvariant};
pub use lease_duration::LeaseDuration;
pub use propagation_tracker::PropagationTracker;
pub use replica::{RenewalReply, RenewalRequest, Replica};

use uuid::Uuid;

use crate::domain::{
    log::{ChainHash, GENESIS_HASH},
    time::{Revision, Timestamp},
};

/// A replica's row. A process that has lost its row registers under a new id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ReplicaId(pub Uuid);

/// Which request of a machine an answer belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AttemptId(pub u64);

/// One unbroken life of the database: the same until replica rows or commits may have been lost. Opaque here;
/// what it is made of (system identifier, timeline, ...) is the store's business.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Incarnation(pub u128);

/// A place in one history: the same revision with another hash is another history.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LogPosition {
    /// The newest change in it.
    pub revision: Revision,
    /// That change's link of the log's chain.
    pub hash: ChainHash,
}

impl LogPosition {
    /// Before any change. Every database has this link.
    pub const START: LogPosition = LogPosition { revision: Revision(0), hash: GENESIS_HASH };
}

/// Which `renew_seq` a renewal expects, and which it sets. A renewal whose answer is lost may or may not have
/// counted, so several are expected; a copy of this process, or a late renewal, finds another and fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RenewalSequence {
    /// The newest that is known to be in the row.
    pub confirmed: u64,
    /// The new one. The row's must be at least `seen` and less than this.
    pub next: u64,
}

impl RenewalSequence {
    /// Whether a row with this count is the one expected.
    #[must_use]
    pub const fn accepts(self, in_row: u64) -> bool {
        self.confirmed <= in_row && in_row < self.next
    }
}

/// A replica's row as others read it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReplicaRow {
    /// Whose.
    pub id: ReplicaId,
    /// What it has acknowledged: every change up to here is in its map. None = it holds no lease, and gets none
    /// before this is committed as something else.
    pub applied: Option<Revision>,
    /// Counts its renewals.
    pub renew_seq: u64,
    /// When it renewed last, by the database's wall clock: for people to read, and for nothing else.
    pub last_seen: Timestamp,
}

/// What one reading of the replicas' rows saw.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReplicaListing {
    /// The rows, in any order.
    pub rows: Vec<ReplicaRow>,
    /// The longest lease that any of them may hold.
    pub longest_lease: LeaseDuration,
    /// The life of the database that it was read in.
    pub incarnation: Incarnation,
    /// The newest life that every lease granted before it has run out in: then the rows are all there are.
    pub settled_incarnation: Option<Incarnation>,
    /// The database's wall clock.
    pub database_time: Timestamp,
}

impl ReplicaListing {
    /// Whether who is not listed holds no lease.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.settled_incarnation == Some(self.incarnation)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_renewal_expects_what_it_has_seen_or_may_have_set_and_nothing_else() {
        let counts = RenewalSequence { confirmed: 3, next: 6 };
        let expected: Vec<_> = (0..9).filter(|count| counts.accepts(*count)).collect();
        assert_eq!(expected, [3, 4, 5]);
    }
}
