//! The values that replicas and the database exchange: ids, rows, listings and the sequence of renewals.

use uuid::Uuid;

use super::LeaseDuration;
use crate::domain::time::{Revision, Timestamp};

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
