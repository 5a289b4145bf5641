//! Tracks which replicas seem to have acknowledged which revision, from their notifications.
//!
//! Advisory only: notifications may be late, lost or forged. They decide when reading the replicas' rows
//! is worthwhile, and nothing else.

use std::collections::HashMap;

use tokio::sync::watch;

use crate::{
    domain::{lease::ReplicaId, time::Revision},
    store::replica_registry::ReplicaSnapshot,
};

/// With more replicas than this none sends notifications: each would reach all others, and a poll is as fast by then.
pub(super) const MAX_NOTIFYING_REPLICAS: u64 = 16;

/// What the notifications have shown so far.
#[derive(Debug, Default)]
pub(super) struct AckTracker(watch::Sender<ObservedAcks>);

#[derive(Debug, Default)]
struct ObservedAcks {
    /// Whether notifications arrive at all.
    is_receiving: bool,
    /// The replicas of the newest reading of the rows; others are ignored.
    revision_by_replica: HashMap<ReplicaId, Revision>,
}

impl AckTracker {
    /// Returns whether notifications arrive; a connection pooler may drop them.
    pub(super) fn is_receiving(&self) -> bool {
        self.0.borrow().is_receiving
    }

    pub(super) fn set_receiving(&self, receiving: bool) {
        self.0.send_if_modified(|observed| {
            std::mem::replace(&mut observed.is_receiving, receiving) != receiving
        });
    }

    /// Records that a replica has acknowledged everything up to this revision.
    pub(super) fn record_ack(&self, replica: ReplicaId, up_to: Revision) {
        self.0.send_if_modified(|observed| {
            observed
                .revision_by_replica
                .get_mut(&replica)
                .is_some_and(|acked| std::mem::replace(acked, up_to.max(*acked)) < up_to)
        });
    }

    /// Sets the replicas and their acknowledged revisions from the rows. A notified revision beyond the newest one
    /// cannot be genuine and is dropped.
    pub(super) fn update_replicas(&self, ReplicaSnapshot { listing, head, .. }: &ReplicaSnapshot) {
        self.0.send_modify(|observed| {
            let before = std::mem::take(&mut observed.revision_by_replica);
            let applied = listing.rows.iter().filter_map(|row| Some((row.id, row.applied?)));
            let reported =
                |id| before.get(&id).copied().filter(|reported| reported <= head).unwrap_or_default();
            observed.revision_by_replica =
                applied.map(|(id, applied)| (id, applied.max(reported(id)))).collect();
        });
    }

    /// Resolves when all known replicas except `own` seem to have acknowledged the revision; never if none is known.
    pub(super) async fn wait_for_all(&self, own: Option<ReplicaId>, revision: Revision) {
        let all = |observed: &ObservedAcks| {
            let mut others = observed
                .revision_by_replica
                .iter()
                .filter(|(id, _)| Some(**id) != own)
                .map(|(_, up_to)| up_to)
                .peekable();
            others.peek().is_some() && others.all(|up_to| *up_to >= revision)
        };
        if self.0.subscribe().wait_for(all).await.is_err() {
            std::future::pending().await
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;
    use crate::domain::{
        lease::{Incarnation, LeaseDuration, ReplicaListing, ReplicaRow},
        time::Timestamp,
    };

    fn id(number: u128) -> ReplicaId {
        ReplicaId(uuid::Uuid::from_u128(number))
    }

    fn replica_snapshot(head: u64, rows: &[(u128, Option<u64>)]) -> ReplicaSnapshot {
        let at = Timestamp::from_micros(0);
        let row = |&(number, applied): &(u128, Option<u64>)| ReplicaRow {
            id: id(number),
            applied: applied.map(Revision),
            renew_seq: 1,
            last_seen: at,
        };
        let listing = ReplicaListing {
            rows: rows.iter().map(row).collect(),
            longest_lease: LeaseDuration::DEFAULT,
            incarnation: Incarnation(1),
            settled_incarnation: None,
            database_time: at,
        };
        let (names, links) = Default::default();
        ReplicaSnapshot {
            listing,
            names,
            entry_hashes: links,
            head: Revision(head),
            archived_up_to: Revision(0),
            sync_replicated: false,
        }
    }

    fn have_others_acknowledged(acks: &AckTracker, revision: u64) -> bool {
        acks.wait_for_all(Some(id(1)), Revision(revision)).now_or_never().is_some()
    }

    #[test]
    fn all_others_that_hold_a_lease_are_to_have_told() {
        let acks = AckTracker::default();
        acks.record_ack(id(2), Revision(9));
        assert!(!have_others_acknowledged(&acks, 1), "nobody is known");
        acks.update_replicas(&replica_snapshot(7, &[(1, Some(3)), (2, Some(7)), (3, Some(6)), (4, None)]));
        assert!(have_others_acknowledged(&acks, 6) && !have_others_acknowledged(&acks, 7));
        acks.record_ack(id(3), Revision(8));
        assert!(have_others_acknowledged(&acks, 7) && !have_others_acknowledged(&acks, 8));
        acks.record_ack(id(2), Revision(8));
        acks.record_ack(id(2), Revision(5));
        assert!(have_others_acknowledged(&acks, 8), "what came late changes nothing");
    }

    #[test]
    fn what_was_told_beyond_what_there_is_ends_with_the_next_reading() {
        let acks = AckTracker::default();
        acks.update_replicas(&replica_snapshot(7, &[(2, Some(7)), (3, Some(7))]));
        acks.record_ack(id(2), Revision(u64::MAX));
        acks.record_ack(id(3), Revision(8));
        assert!(have_others_acknowledged(&acks, 8));
        acks.update_replicas(&replica_snapshot(8, &[(2, Some(7)), (3, Some(7))]));
        assert!(!have_others_acknowledged(&acks, 8));
        acks.record_ack(id(2), Revision(8));
        assert!(have_others_acknowledged(&acks, 8), "what may be true is kept");
    }
}
