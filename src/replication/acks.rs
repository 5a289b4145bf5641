//! Which replicas seem to have acknowledged what: what they tell once they have. It is good for one thing, to know when
//! reading their rows is worth it. Nothing is in force for anything that stands here: it may come late or never, and
//! anybody could have said it.

use std::collections::HashMap;

use tokio::sync::watch;

use crate::{
    domain::{lease::ReplicaId, time::Revision},
    store::fleet::Roster,
};

/// Beyond so many replicas nobody tells: each would be heard by all, and it takes long enough for a poll to be as good.
pub(super) const TELLING: u64 = 16;

/// What replicas have told.
#[derive(Debug, Default)]
pub(super) struct Acks(watch::Sender<Heard>);

#[derive(Debug, Default)]
struct Heard {
    /// What is told is heard here.
    hears: bool,
    /// Those that the newest reading of the rows knew: nothing is kept of others.
    of: HashMap<ReplicaId, Revision>,
}

impl Acks {
    /// Whether what is told comes here at all: it does not pass a pooler.
    pub(super) fn hears(&self) -> bool {
        self.0.borrow().hears
    }

    pub(super) fn set_hears(&self, hears: bool) {
        self.0.send_if_modified(|heard| std::mem::replace(&mut heard.hears, hears) != hears);
    }

    /// A replica has told up to where it has acknowledged.
    pub(super) fn told(&self, replica: ReplicaId, upto: Revision) {
        self.0.send_if_modified(|heard| {
            heard.of.get_mut(&replica).is_some_and(|known| std::mem::replace(known, upto.max(*known)) < upto)
        });
    }

    /// The rows say who there is, and up to where each has acknowledged. What was told beyond the newest revision was no
    /// replica's word.
    pub(super) fn listed(&self, Roster { listing, head, .. }: &Roster) {
        self.0.send_modify(|heard| {
            let before = std::mem::take(&mut heard.of);
            let holding = listing.rows.iter().filter_map(|row| Some((row.id, row.applied?)));
            let told = |id| before.get(&id).copied().filter(|told| told <= head).unwrap_or_default();
            heard.of = holding.map(|(id, applied)| (id, applied.max(told(id)))).collect();
        });
    }

    /// Returns when all that are known, without `own`, seem to have acknowledged the revision; never where none are.
    pub(super) async fn all(&self, own: Option<ReplicaId>, revision: Revision) {
        let all = |heard: &Heard| {
            let mut others =
                heard.of.iter().filter(|(id, _)| Some(**id) != own).map(|(_, upto)| upto).peekable();
            others.peek().is_some() && others.all(|upto| *upto >= revision)
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
        lease::{Incarnation, Lease, Listing, Row},
        time::Timestamp,
    };

    fn id(number: u128) -> ReplicaId {
        ReplicaId(uuid::Uuid::from_u128(number))
    }

    fn roster(head: u64, rows: &[(u128, Option<u64>)]) -> Roster {
        let at = Timestamp::from_micros(0);
        let row = |&(number, applied): &(u128, Option<u64>)| Row {
            id: id(number),
            applied: applied.map(Revision),
            renew_seq: 1,
            last_seen: at,
        };
        let listing = Listing {
            rows: rows.iter().map(row).collect(),
            longest: Lease::DEFAULT,
            incarnation: Incarnation(1),
            settled: None,
            db_now: at,
        };
        let (names, links) = Default::default();
        Roster { listing, names, links, head: Revision(head), archived: Revision(0), sync_replicated: false }
    }

    fn seem_to_have(acks: &Acks, revision: u64) -> bool {
        acks.all(Some(id(1)), Revision(revision)).now_or_never().is_some()
    }

    #[test]
    fn all_others_that_hold_a_lease_are_to_have_told() {
        let acks = Acks::default();
        acks.told(id(2), Revision(9));
        assert!(!seem_to_have(&acks, 1), "nobody is known");
        acks.listed(&roster(7, &[(1, Some(3)), (2, Some(7)), (3, Some(6)), (4, None)]));
        assert!(seem_to_have(&acks, 6) && !seem_to_have(&acks, 7));
        acks.told(id(3), Revision(8));
        assert!(seem_to_have(&acks, 7) && !seem_to_have(&acks, 8));
        acks.told(id(2), Revision(8));
        acks.told(id(2), Revision(5));
        assert!(seem_to_have(&acks, 8), "what came late changes nothing");
    }

    #[test]
    fn what_was_told_beyond_what_there_is_ends_with_the_next_reading() {
        let acks = Acks::default();
        acks.listed(&roster(7, &[(2, Some(7)), (3, Some(7))]));
        acks.told(id(2), Revision(u64::MAX));
        acks.told(id(3), Revision(8));
        assert!(seem_to_have(&acks, 8));
        acks.listed(&roster(8, &[(2, Some(7)), (3, Some(7))]));
        assert!(!seem_to_have(&acks, 8));
        acks.told(id(2), Revision(8));
        assert!(seem_to_have(&acks, 8), "what may be true is kept");
    }
}
