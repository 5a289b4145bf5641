//! Which replicas seem to have acknowledged what: what they tell once they have. It is good for one thing, to know when
//! reading their rows is worth it. Nothing is in force for anything that stands here: it may come late or never, and
//! anybody could have said it.

use std::collections::HashMap;

use tokio::sync::watch;

use crate::{
    domain::{lease::ReplicaId, time::Revision},
    store::replica_registry::ReplicaSnapshot,
};

/// Beyond so many replicas nobody tells: each would be heard by all, and it takes long enough for a poll to be as good.
pub(super) const MAX_NOTIFYING_REPLICAS: u64 = 16;

/// What replicas have told.
#[derive(Debug, Default)]
pub(super) struct AckTracker(watch::Sender<ObservedAcks>);

#[derive(Debug, Default)]
struct ObservedAcks {
    /// What is told is heard here.
    is_receiving: bool,
    /// Those that the newest reading of the rows knew: nothing is kept of others.
    revision_by_replica: HashMap<ReplicaId, Revision>,
}

impl AckTracker {
    /// Whether what is told comes here at all: it does not pass a pooler.
    pub(super) fn is_receiving(&self) -> bool {
        self.0.borrow().is_receiving
    }

    pub(super) fn set_receiving(&self, receiving: bool) {
        self.0.send_if_modified(|observed| {
            std::mem::replace(&mut observed.is_receiving, receiving) != receiving
        });
    }

    /// A replica has told up to where it has acknowledged.
    pub(super) fn record_ack(&self, replica: ReplicaId, up_to: Revision) {
        self.0.send_if_modified(|observed| {
            observed
                .revision_by_replica
                .get_mut(&replica)
                .is_some_and(|acked| std::mem::replace(acked, up_to.max(*acked)) < up_to)
        });
    }

    /// The rows say who there is, and up to where each has acknowledged. What was told beyond the newest revision was no
    /// replica's word.
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

    /// Returns when all that are known, without `own`, seem to have acknowledged the revision; never where none are.
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
