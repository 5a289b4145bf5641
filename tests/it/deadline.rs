//! The order of the deadline and the map, in every interleaving of a Check with a replica that renews: a model
//! checker runs the server's own code over words of its own.
//!
//! The replica has been without a lease for a while, and its map is old. Meanwhile a key was revoked, and Revoke
//! has returned OK. Now the replica renews: the answer brings the change and a new lease. A Check that allows the
//! key has seen the new lease with the old map.

use std::sync::atomic::Ordering;

use keyward::{
    domain::{
        lease::{
            AttemptId, BootInstant, Incarnation, InvariantSet, LeaseDuration, LeaseInvariant, LogPosition,
            Replica, ReplicaId,
            replica::{RenewalReply, ReplicaAction, ReplicaEvent},
        },
        time::{Revision, Timestamp},
    },
    engine::serving_lease::{AtomicWord, LeaseDeadline},
};
use loom::{
    sync::{Arc, atomic::AtomicU64},
    thread,
};

const NOW: BootInstant = BootInstant::from_nanos(1_000);
const LIVE: u64 = 0;
const REVOKED: u64 = 1;

/// A word of the model checker, used as the code says.
struct OrderedWord(AtomicU64);

impl AtomicWord for OrderedWord {
    fn load(&self, order: Ordering) -> u64 {
        self.0.load(order)
    }

    fn store(&self, value: u64, order: Ordering) {
        self.0.store(value, order);
    }
}

/// The same, but without any order between threads.
struct RelaxedWord(AtomicU64);

impl AtomicWord for RelaxedWord {
    fn load(&self, _: Ordering) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    fn store(&self, value: u64, _: Ordering) {
        self.0.store(value, Ordering::Relaxed);
    }
}

/// All rules but perhaps one.
#[derive(Clone, Copy)]
struct RulesExcept(Option<LeaseInvariant>);

impl InvariantSet for RulesExcept {
    fn enforces(&self, rule: LeaseInvariant) -> bool {
        self.0 != Some(rule)
    }
}

fn position(revision: u64) -> LogPosition {
    LogPosition { revision: Revision(revision), hash: [u8::try_from(revision).unwrap(); 32] }
}

/// The answer to a renewal that acknowledged revision 1.
fn reply(upto: u64) -> RenewalReply {
    RenewalReply {
        was_renewed: true,
        acknowledged_hash: Some(position(1).hash),
        changes_end: position(upto),
        head: Revision(upto),
        lease: LeaseDuration::STRICT,
        longest_lease: LeaseDuration::STRICT,
        incarnation: Incarnation(1),
        settled_incarnation: Some(Incarnation(1)),
        database_time: Timestamp::from_micros(0),
    }
}

/// What a replica wants done when a renewal has brought a change.
fn actions_of_a_renewal(rules: RulesExcept) -> Vec<ReplicaAction> {
    let mut replica = Replica::with_invariants(rules, LeaseDuration::STRICT);
    replica.handle(ReplicaEvent::Tick, NOW);
    replica.handle(ReplicaEvent::Registered { attempt: AttemptId(1), id: ReplicaId(uuid::Uuid::nil()) }, NOW);
    let loaded = replica.handle(ReplicaEvent::Loaded { attempt: AttemptId(2), at: position(1) }, NOW);
    let [ReplicaAction::InstallSnapshot { .. }, ReplicaAction::Renew(first)] = loaded[..] else {
        panic!("{loaded:?}")
    };
    let listed = replica.handle(ReplicaEvent::Renewed { attempt: first.attempt, reply: reply(1) }, NOW);
    let [ReplicaAction::Renew(second)] = listed[..] else { panic!("{listed:?}") };
    replica.handle(ReplicaEvent::Renewed { attempt: second.attempt, reply: reply(2) }, NOW)
}

/// Runs a Check beside the renewal, in every way there is.
fn model_check<W: AtomicWord + Send + Sync + 'static>(
    rules: RulesExcept,
    word: fn(AtomicU64) -> W,
    check: fn(&LeaseDeadline<W>, &AtomicU64) -> (u64, bool),
) {
    let actions = actions_of_a_renewal(rules);
    loom::model(move || {
        let deadline = Arc::new(LeaseDeadline::from_word(word(AtomicU64::new(0))));
        let map = Arc::new(AtomicU64::new(LIVE));
        let publisher = thread::spawn({
            let (deadline, map, actions) = (deadline.clone(), map.clone(), actions.clone());
            move || {
                for action in actions {
                    match action {
                        // The map has orders of its own; none is relied on.
                        ReplicaAction::ApplyChanges { .. } => map.store(REVOKED, Ordering::Relaxed),
                        ReplicaAction::PublishDeadline { deadline: until, .. } => deadline.set(until),
                        _ => {}
                    }
                }
            }
        });
        let (found, fresh) = check(&deadline, &map);
        assert!(!(fresh && found == LIVE), "a stale ALLOW");
        publisher.join().unwrap();
    });
}

fn check_as_engine<W: AtomicWord>(deadline: &LeaseDeadline<W>, map: &AtomicU64) -> (u64, bool) {
    deadline.with_validity(|| NOW, |fresh| (map.load(Ordering::Relaxed), fresh))
}

fn check_lookup_first<W: AtomicWord>(deadline: &LeaseDeadline<W>, map: &AtomicU64) -> (u64, bool) {
    let found = map.load(Ordering::Relaxed);
    deadline.with_validity(|| NOW, |fresh| (found, fresh))
}

#[test]
fn whoever_sees_the_new_deadline_sees_the_new_map() {
    model_check(RulesExcept(None), OrderedWord, check_as_engine);
}

#[test]
#[should_panic(expected = "a stale ALLOW")]
fn a_look_up_before_the_deadline_is_read_would_be_found() {
    model_check(RulesExcept(None), OrderedWord, check_lookup_first);
}

#[test]
#[should_panic(expected = "a stale ALLOW")]
fn a_deadline_set_before_the_map_would_be_found() {
    model_check(RulesExcept(Some(LeaseInvariant::MapBeforeDeadline)), OrderedWord, check_as_engine);
}

#[test]
#[should_panic(expected = "a stale ALLOW")]
fn a_deadline_without_order_between_threads_would_be_found() {
    model_check(RulesExcept(None), RelaxedWord, check_as_engine);
}

/// Without it the tests above would show nothing.
#[test]
fn a_renewal_that_brings_a_change_applies_it_and_publishes_a_lease() {
    let actions = actions_of_a_renewal(RulesExcept(None));
    assert!(
        matches!(actions[..], [ReplicaAction::ApplyChanges { .. }, ReplicaAction::PublishDeadline { deadline, .. }, ReplicaAction::Renew(_)] if NOW < deadline),
        "{actions:?}"
    );
}
