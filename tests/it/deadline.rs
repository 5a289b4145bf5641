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
            Attempt, Boottime, Incarnation, Lease, Position, Replica, ReplicaId, Rule, Rules,
            replica::{Action, Event, Reply},
        },
        time::{Revision, Timestamp},
    },
    engine::deadline::{Deadline, Word},
};
use loom::{
    sync::{Arc, atomic::AtomicU64},
    thread,
};

const NOW: Boottime = Boottime::from_nanos(1_000);
const LIVE: u64 = 0;
const REVOKED: u64 = 1;

/// A word of the model checker, used as the code says.
struct Checked(AtomicU64);

impl Word for Checked {
    fn load(&self, order: Ordering) -> u64 {
        self.0.load(order)
    }

    fn store(&self, value: u64, order: Ordering) {
        self.0.store(value, order);
    }
}

/// The same, but without any order between threads.
struct Unordered(AtomicU64);

impl Word for Unordered {
    fn load(&self, _: Ordering) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    fn store(&self, value: u64, _: Ordering) {
        self.0.store(value, Ordering::Relaxed);
    }
}

/// All rules but perhaps one.
#[derive(Clone, Copy)]
struct AllBut(Option<Rule>);

impl Rules for AllBut {
    fn keep(&self, rule: Rule) -> bool {
        self.0 != Some(rule)
    }
}

fn position(revision: u64) -> Position {
    Position { revision: Revision(revision), hash: [u8::try_from(revision).unwrap(); 32] }
}

/// The answer to a renewal that acknowledged revision 1.
fn reply(upto: u64) -> Reply {
    Reply {
        renewed: true,
        link: Some(position(1).hash),
        upto: position(upto),
        head: Revision(upto),
        lease: Lease::STRICT,
        longest: Lease::STRICT,
        incarnation: Incarnation(1),
        settled: Some(Incarnation(1)),
        db_now: Timestamp::from_micros(0),
    }
}

/// What a replica wants done when a renewal has brought a change.
fn actions_of_a_renewal(rules: AllBut) -> Vec<Action> {
    let mut replica = Replica::with_rules(rules, Lease::STRICT);
    replica.on(Event::Tick, NOW);
    replica.on(Event::Registered { attempt: Attempt(1), id: ReplicaId(uuid::Uuid::nil()) }, NOW);
    let loaded = replica.on(Event::Loaded { attempt: Attempt(2), at: position(1) }, NOW);
    let [Action::Adopt { .. }, Action::Renew(first)] = loaded[..] else { panic!("{loaded:?}") };
    let listed = replica.on(Event::Renewed { attempt: first.attempt, reply: reply(1) }, NOW);
    let [Action::Renew(second)] = listed[..] else { panic!("{listed:?}") };
    replica.on(Event::Renewed { attempt: second.attempt, reply: reply(2) }, NOW)
}

/// Runs a Check beside the renewal, in every way there is.
fn model<W: Word + Send + Sync + 'static>(
    rules: AllBut,
    word: fn(AtomicU64) -> W,
    check: fn(&Deadline<W>, &AtomicU64) -> (u64, bool),
) {
    let actions = actions_of_a_renewal(rules);
    loom::model(move || {
        let deadline = Arc::new(Deadline::in_word(word(AtomicU64::new(0))));
        let map = Arc::new(AtomicU64::new(LIVE));
        let publisher = thread::spawn({
            let (deadline, map, actions) = (deadline.clone(), map.clone(), actions.clone());
            move || {
                for action in actions {
                    match action {
                        // The map has orders of its own; none is relied on.
                        Action::Apply { .. } => map.store(REVOKED, Ordering::Relaxed),
                        Action::Publish { deadline: until, .. } => deadline.set(until),
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

fn as_the_engine_does<W: Word>(deadline: &Deadline<W>, map: &AtomicU64) -> (u64, bool) {
    deadline.check(|| NOW, |fresh| (map.load(Ordering::Relaxed), fresh))
}

fn look_up_first<W: Word>(deadline: &Deadline<W>, map: &AtomicU64) -> (u64, bool) {
    let found = map.load(Ordering::Relaxed);
    deadline.check(|| NOW, |fresh| (found, fresh))
}

#[test]
fn whoever_sees_the_new_deadline_sees_the_new_map() {
    model(AllBut(None), Checked, as_the_engine_does);
}

#[test]
#[should_panic(expected = "a stale ALLOW")]
fn a_look_up_before_the_deadline_is_read_would_be_found() {
    model(AllBut(None), Checked, look_up_first);
}

#[test]
#[should_panic(expected = "a stale ALLOW")]
fn a_deadline_set_before_the_map_would_be_found() {
    model(AllBut(Some(Rule::MapBeforeDeadline)), Checked, as_the_engine_does);
}

#[test]
#[should_panic(expected = "a stale ALLOW")]
fn a_deadline_without_order_between_threads_would_be_found() {
    model(AllBut(None), Unordered, as_the_engine_does);
}

/// Without it the tests above would show nothing.
#[test]
fn a_renewal_that_brings_a_change_applies_it_and_publishes_a_lease() {
    let actions = actions_of_a_renewal(AllBut(None));
    assert!(
        matches!(actions[..], [Action::Apply { .. }, Action::Publish { deadline, .. }, Action::Renew(_)] if NOW < deadline),
        "{actions:?}"
    );
}
