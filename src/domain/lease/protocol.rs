//! Defines the values that replicas and the database exchange: ids, rows, listings and the sequence of renewals.

use uuid::Uuid;

use super::LeaseDuration;
use crate::domain::time::{Revision, Timestamp};

/// A replica's row. A process that has lost its row registers under a new id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ReplicaId(pub Uuid);

/// Identifies the request that a response belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AttemptId(pub u64);

/// Identifies one unbroken life of the database. It changes when replica rows or commits may have been lost. The store
/// chooses its contents (system identifier, timeline, …).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Incarnation(pub u128);

/// The `renew_seq` that a renewal expects, and the one that it sets.
///
/// A renewal whose response is lost may or may not have been counted, so a range is expected. A copy of this process,
/// or a late renewal, finds another count and fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RenewalSequence {
    /// The newest count that is known to be in the row.
    pub confirmed: u64,
    /// The new count. The row's count must be at least `confirmed` and less than this.
    pub next: u64,
}

impl RenewalSequence {
    /// Whether a renewal may update a row with this count.
    #[must_use]
    pub const fn accepts(self, in_row: u64) -> bool {
        self.confirmed <= in_row && in_row < self.next
    }
}

/// A replica's row as others read it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReplicaRow {
    /// The replica of the row.
    pub id: ReplicaId,
    /// The revision that it has acknowledged: its map contains every change up to here. None = it holds no lease, and
    /// gets none before this value is committed.
    pub applied: Option<Revision>,
    /// The number of its renewals.
    pub renew_seq: u64,
    /// When it last renewed, by the database's wall clock; only for display.
    pub last_seen: Timestamp,
}

/// The result of reading all replica rows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReplicaListing {
    /// The rows, in any order.
    pub rows: Vec<ReplicaRow>,
    /// The longest lease that any of the replicas may hold.
    pub longest_lease: LeaseDuration,
    /// The incarnation of the database that was read.
    pub incarnation: Incarnation,
    /// The newest incarnation by which every earlier lease has expired. If it is the current one, the listing is
    /// complete.
    pub settled_incarnation: Option<Incarnation>,
    /// The database's wall clock at the read.
    pub database_time: Timestamp,
}

impl ReplicaListing {
    /// Whether a replica that is not listed holds no lease.
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
