//! Tests of the replica, event by event. The simulator tests the consequences for a whole cluster.

use super::*;
use crate::domain::{
    lease::LeaseDuration,
    time::{Revision, Timestamp},
};

const D: Incarnation = Incarnation(1);

fn at(millis: u64) -> BootInstant {
    BootInstant::from_nanos((1_000_000 + millis) * 1_000_000)
}

fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

fn id(id: u128) -> ReplicaId {
    ReplicaId(uuid::Uuid::from_u128(id))
}

fn position(revision: u8) -> LogPosition {
    LogPosition { revision: Revision(revision.into()), hash: [revision; 32] }
}

/// The answer to a renewal that acknowledged `from`, with the changes up to `upto`, which is the head.
fn reply(from: u8, upto: u8) -> RenewalReply {
    RenewalReply {
        was_renewed: true,
        acknowledged_hash: Some(position(from).hash),
        changes_end: position(upto),
        head: Revision(upto.into()),
        lease: LeaseDuration::STRICT,
        longest_lease: LeaseDuration::STRICT,
        incarnation: D,
        settled_incarnation: Some(D),
        database_time: Timestamp::from_micros(0),
    }
}

fn renewal(actions: &[ReplicaAction]) -> RenewalRequest {
    let found = actions.iter().find_map(|action| match action {
        ReplicaAction::Renew(renewal) => Some(*renewal),
        _ => None,
    });
    found.unwrap_or_else(|| panic!("no renewal in {actions:?}"))
}

fn answer(
    replica: &mut Replica,
    to: RenewalRequest,
    reply: RenewalReply,
    now: BootInstant,
) -> Vec<ReplicaAction> {
    replica.handle(ReplicaEvent::Renewed { attempt: to.attempt, reply }, now)
}

/// A replica that has its row and its map, at revision 5, and has sent its first real renewal at 0 ms.
fn joined() -> (Replica, RenewalRequest) {
    let mut replica = Replica::new(LeaseDuration::STRICT);
    assert_eq!(
        replica.handle(ReplicaEvent::Tick, at(0)),
        [ReplicaAction::Register { attempt: AttemptId(1) }]
    );
    let registered = replica.handle(ReplicaEvent::Registered { attempt: AttemptId(1), id: id(7) }, at(0));
    assert_eq!(
        registered,
        [ReplicaAction::Load { attempt: AttemptId(2) }],
        "the snapshot is taken after the row is there"
    );
    let loaded = replica.handle(ReplicaEvent::Loaded { attempt: AttemptId(2), at: position(5) }, at(0));
    let renewal = renewal(&loaded);
    assert_eq!(
        loaded,
        [ReplicaAction::InstallSnapshot { attempt: AttemptId(2) }, ReplicaAction::Renew(renewal)]
    );
    (replica, renewal)
}

/// The same, when that was answered: its second renewal was sent at 0 ms too.
fn listed() -> (Replica, RenewalRequest) {
    let (mut replica, first) = joined();
    let actions = answer(&mut replica, first, reply(5, 5), at(0));
    let second = renewal(&actions);
    assert_eq!(actions, [ReplicaAction::Renew(second)], "the first renewal only asks for a lease");
    (replica, second)
}

/// One that has a lease since 0 ms, and nothing under way.
fn leased() -> Replica {
    let (mut replica, second) = listed();
    let actions = answer(&mut replica, second, reply(5, 5), at(10));
    assert_eq!(actions, [ReplicaAction::PublishDeadline { deadline: at(5000), as_of: at(0) }]);
    replica
}

/// One that has sent a renewal at 1 s.
fn renewing() -> (Replica, RenewalRequest) {
    let mut replica = leased();
    assert_eq!(replica.wake_at(), Some(at(1000)));
    let sent = renewal(&replica.handle(ReplicaEvent::Tick, at(1000)));
    (replica, sent)
}

#[test]
fn nothing_is_allowed_before_a_renewal_of_a_row_that_revokers_wait_for_was_answered() {
    let (mut replica, second) = listed();
    assert_eq!((second.id, second.applied), (id(7), Some(position(5))));
    let actions = answer(&mut replica, second, reply(5, 5), at(300));
    assert_eq!(
        actions,
        [ReplicaAction::PublishDeadline { deadline: at(5000), as_of: at(0) }],
        "from before it was sent"
    );
    assert_eq!(replica.state(), ReplicaState::Following);
}

#[test]
fn changes_are_applied_then_allowed_then_acknowledged() {
    let (mut replica, sent) = renewing();
    let actions = answer(&mut replica, sent, reply(5, 8), at(1003));
    let ack = renewal(&actions);
    let deadline = at(6000);
    assert_eq!(
        actions,
        [
            ReplicaAction::ApplyChanges { attempt: sent.attempt },
            ReplicaAction::PublishDeadline { deadline, as_of: at(1000) },
            ReplicaAction::Renew(ack)
        ]
    );
    assert_eq!(ack.applied, Some(position(8)));
}

#[test]
fn a_hint_renews_at_once_or_right_after_what_is_under_way() {
    let mut replica = leased();
    let sent = renewal(&replica.handle(ReplicaEvent::Hint, at(20)));
    assert_eq!(replica.handle(ReplicaEvent::Hint, at(21)), [], "one at a time");
    renewal(&answer(&mut replica, sent, reply(5, 5), at(22)));

    let mut replica = Replica::new(LeaseDuration::STRICT);
    replica.handle(ReplicaEvent::Tick, at(0));
    assert_eq!(replica.handle(ReplicaEvent::Hint, at(1)), [], "there is nothing to keep up to date yet");
    let registered = replica.handle(ReplicaEvent::Registered { attempt: AttemptId(1), id: id(7) }, at(2));
    assert_eq!(registered, [ReplicaAction::Load { attempt: AttemptId(2) }]);
    assert_eq!(replica.handle(ReplicaEvent::Hint, at(3)), [], "nor is there now");
}

#[test]
fn changes_that_did_not_fit_bring_no_lease() {
    let (mut replica, sent) = renewing();
    let actions = answer(&mut replica, sent, RenewalReply { head: Revision(9), ..reply(5, 7) }, at(1003));
    let next = renewal(&actions);
    assert_eq!(actions, [ReplicaAction::ApplyChanges { attempt: sent.attempt }, ReplicaAction::Renew(next)]);
    assert_eq!(next.applied, Some(position(7)));
    let actions = answer(&mut replica, next, reply(7, 9), at(1005));
    assert!(
        actions.contains(&ReplicaAction::PublishDeadline { deadline: at(6003), as_of: at(1003) }),
        "{actions:?}"
    );
}

#[test]
fn a_lost_answer_costs_no_lease() {
    let (mut replica, lost) = renewing();
    let timeout = LeaseDuration::STRICT.request_timeout();
    assert_eq!(replica.wake_at(), Some(at(1000).saturating_add(timeout)));
    assert_eq!(
        replica.handle(ReplicaEvent::Tick, at(1000).saturating_add(timeout)),
        [ReplicaAction::Abandon { attempt: lost.attempt }]
    );
    let again = renewal(&replica.handle(ReplicaEvent::Tick, at(2000)));
    // It counted, or it did not: the next one expects either.
    assert!(again.sequence.accepts(lost.sequence.confirmed) && again.sequence.accepts(lost.sequence.next));
    assert!(!lost.sequence.accepts(again.sequence.next), "a late one does not count");
    assert_eq!(answer(&mut replica, lost, reply(5, 5), at(2001)), [], "nobody waits for it any more");
    answer(&mut replica, again, reply(5, 5), at(2002));
    let next = renewal(&replica.handle(ReplicaEvent::Hint, at(2003)));
    assert_eq!(
        next.sequence,
        RenewalSequence { confirmed: again.sequence.next, next: again.sequence.next + 1 }
    );
}

#[test]
fn failures_are_tried_again_less_and_less_often() {
    let (mut replica, mut sent) = renewing();
    let mut now = at(1000);
    for wait in [50, 100, 200, 400, 800, 1000, 1000] {
        assert_eq!(replica.handle(ReplicaEvent::Failed { attempt: sent.attempt }, now), []);
        assert_eq!(replica.wake_at(), Some(now.saturating_add(ms(wait))));
        now = now.saturating_add(ms(wait));
        sent = renewal(&replica.handle(ReplicaEvent::Tick, now));
    }
    answer(&mut replica, sent, reply(5, 5), now);
    let sent = renewal(&replica.handle(ReplicaEvent::Hint, now));
    replica.handle(ReplicaEvent::Failed { attempt: sent.attempt }, now);
    assert_eq!(replica.wake_at(), Some(now.saturating_add(ms(50))), "a success is a new start");
}

#[test]
fn a_replica_without_its_row_stops_at_once_and_joins_under_another_id_with_the_map_it_has() {
    let (mut replica, sent) = renewing();
    let gone = answer(&mut replica, sent, RenewalReply { was_renewed: false, ..reply(5, 8) }, at(1003));
    let attempt = AttemptId(sent.attempt.0 + 1);
    assert_eq!(gone, [ReplicaAction::DenyAll, ReplicaAction::Register { attempt }]);
    assert_eq!(replica.state(), ReplicaState::Joining);
    let sent = renewal(&replica.handle(ReplicaEvent::Registered { attempt, id: id(8) }, at(1005)));
    assert_eq!((sent.id, sent.applied), (id(8), Some(position(5))));
    let sent = renewal(&answer(&mut replica, sent, reply(5, 8), at(1007)));
    let actions = answer(&mut replica, sent, reply(8, 8), at(1009));
    assert_eq!(actions, [ReplicaAction::PublishDeadline { deadline: at(6007), as_of: at(1007) }]);
}

#[test]
fn a_row_that_never_worked_is_not_replaced_at_once() {
    let (mut replica, first) = joined();
    let gone = answer(&mut replica, first, RenewalReply { was_renewed: false, ..reply(5, 5) }, at(3));
    assert_eq!((gone, replica.wake_at()), (vec![ReplicaAction::DenyAll], Some(at(1003))));
    assert!(matches!(replica.handle(ReplicaEvent::Tick, at(1003))[..], [ReplicaAction::Register { .. }]));
}

#[test]
fn another_history_is_not_followed() {
    let other = Some([9; 32]);
    let shorter =
        RenewalReply { acknowledged_hash: None, changes_end: position(3), head: Revision(3), ..reply(5, 5) };
    for foreign in [
        RenewalReply { acknowledged_hash: other, ..reply(5, 8) },
        RenewalReply { was_renewed: false, acknowledged_hash: other, ..reply(5, 8) },
        shorter,
    ] {
        let (mut replica, sent) = renewing();
        let actions = answer(&mut replica, sent, foreign, at(1003));
        let (link, head) = (foreign.acknowledged_hash, foreign.head);
        assert_eq!(
            actions,
            [ReplicaAction::EnterRegressed { local_position: position(5), database_hash: link, head }],
            "the lease runs out"
        );
        assert_eq!((replica.state(), replica.wake_at()), (ReplicaState::Regressed, None));
        assert_eq!(replica.handle(ReplicaEvent::Hint, at(1004)), []);
    }
}

#[test]
fn an_accepted_regression_is_a_new_start() {
    let (mut replica, sent) = renewing();
    answer(&mut replica, sent, RenewalReply { acknowledged_hash: None, ..reply(5, 5) }, at(1003));
    let actions = replica.handle(ReplicaEvent::RegressionAccepted, at(9000));
    let attempt = AttemptId(sent.attempt.0 + 1);
    let expected = [
        ReplicaAction::DenyAll,
        ReplicaAction::Deregister { id: id(7) },
        ReplicaAction::Register { attempt },
    ];
    assert_eq!(actions, expected);
    let actions = replica.handle(ReplicaEvent::Registered { attempt, id: id(8) }, at(9001));
    assert!(matches!(actions[..], [ReplicaAction::Load { .. }]), "{actions:?}");

    let mut replica = leased();
    assert_eq!(
        replica.handle(ReplicaEvent::RegressionAccepted, at(20)),
        [],
        "nothing was to be accepted here"
    );
    assert_eq!(replica.state(), ReplicaState::Following);
}

#[test]
fn whoever_stops_gives_up_the_lease_before_the_row() {
    let mut replica = leased();
    assert_eq!(
        replica.handle(ReplicaEvent::Stop, at(20)),
        [ReplicaAction::DenyAll, ReplicaAction::Deregister { id: id(7) }]
    );
    assert_eq!(replica.handle(ReplicaEvent::Tick, at(9000)), []);
    assert_eq!((replica.state(), replica.wake_at()), (ReplicaState::Stopped, None));
}

#[test]
fn a_long_load_keeps_its_row_alive_and_acknowledges_nothing() {
    let mut replica = Replica::new(LeaseDuration::STRICT);
    replica.handle(ReplicaEvent::Tick, at(0));
    replica.handle(ReplicaEvent::Registered { attempt: AttemptId(1), id: id(7) }, at(0));
    let mut now = at(0);
    for _ in 0..30 {
        now = replica.wake_at().unwrap();
        let beat = renewal(&replica.handle(ReplicaEvent::Tick, now));
        assert_eq!(beat.applied, None);
        assert_eq!(
            answer(&mut replica, beat, RenewalReply { acknowledged_hash: None, ..reply(0, 0) }, now),
            []
        );
    }
    assert!(now.saturating_duration_since(at(0)) >= LeaseDuration::STRICT.dead_after().unwrap());
    let loaded = replica.handle(ReplicaEvent::Loaded { attempt: AttemptId(2), at: position(5) }, now);
    assert_eq!(renewal(&loaded).applied, Some(position(5)));
}

#[test]
fn a_failed_load_is_tried_again() {
    let mut replica = Replica::new(LeaseDuration::STRICT);
    replica.handle(ReplicaEvent::Tick, at(0));
    replica.handle(ReplicaEvent::Registered { attempt: AttemptId(1), id: id(7) }, at(0));
    replica.handle(ReplicaEvent::Failed { attempt: AttemptId(2) }, at(100));
    assert_eq!(replica.wake_at(), Some(at(150)));
    assert_eq!(replica.handle(ReplicaEvent::Tick, at(150)), [ReplicaAction::Load { attempt: AttemptId(3) }]);
    assert_eq!(replica.handle(ReplicaEvent::Loaded { attempt: AttemptId(2), at: position(5) }, at(151)), []);
}

#[test]
fn an_infinite_lease_never_ends_until_the_lease_is_another() {
    let (mut replica, sent) = renewing();
    let fixed = RenewalReply {
        lease: LeaseDuration::INFINITE,
        longest_lease: LeaseDuration::INFINITE,
        ..reply(5, 5)
    };
    let actions = answer(&mut replica, sent, fixed, at(1003));
    assert_eq!(actions, [ReplicaAction::PublishDeadline { deadline: BootInstant::FOREVER, as_of: at(1000) }]);
    let sent = renewal(&replica.handle(ReplicaEvent::Hint, at(2000)));
    let actions = answer(&mut replica, sent, reply(5, 5), at(2003));
    assert_eq!(actions, [ReplicaAction::PublishDeadline { deadline: at(7000), as_of: at(2000) }]);
}

#[test]
fn what_a_frozen_clock_missed_is_taken_off_the_lease() {
    let (mut replica, sent) = renewing();
    let later = RenewalReply { database_time: Timestamp::from_micros(10_000_000), ..reply(5, 5) };
    let actions = answer(&mut replica, sent, later, at(1100));
    // 10 s there are at least 8 s here, of which 1.1 s were seen.
    let missing = ms(6900);
    assert_eq!(actions[0], ReplicaAction::ReportClockStall { stall: missing });
    assert_eq!(
        actions.last(),
        Some(&ReplicaAction::PublishDeadline { deadline: at(6000).saturating_sub(missing), as_of: at(1000) })
    );
}

#[test]
fn a_frozen_clock_shortens_a_lease_that_is_not_extended_too() {
    let (mut replica, sent) = renewing();
    let elsewhere = RenewalReply {
        database_time: Timestamp::from_micros(10_000_000),
        acknowledged_hash: None,
        ..reply(5, 5)
    };
    let actions = answer(&mut replica, sent, elsewhere, at(1100));
    let deadline = at(5000).saturating_sub(ms(6900));
    assert!(actions.contains(&ReplicaAction::PublishDeadline { deadline, as_of: at(0) }), "{actions:?}");
    assert_eq!(replica.state(), ReplicaState::Regressed);
}

#[test]
fn a_new_life_of_the_database_is_settled_after_every_older_lease_has_run_out() {
    let (mut replica, mut sent) = renewing();
    let unsettled = RenewalReply { incarnation: Incarnation(2), ..reply(5, 5) };
    answer(&mut replica, sent, unsettled, at(1003));
    let settled_at = at(1003).saturating_add(LeaseDuration::STRICT.expiry_wait().unwrap());
    let mut now = at(1003);
    while now < settled_at {
        sent = renewal(&replica.handle(ReplicaEvent::Hint, now));
        assert_eq!(sent.settle_incarnation, None);
        answer(&mut replica, sent, unsettled, now);
        now = now.saturating_add(ms(100));
    }
    sent = renewal(&replica.handle(ReplicaEvent::Hint, now));
    assert_eq!(sent.settle_incarnation, Some(Incarnation(2)));
    answer(&mut replica, sent, RenewalReply { settled_incarnation: Some(Incarnation(2)), ..unsettled }, now);
    assert_eq!(renewal(&replica.handle(ReplicaEvent::Hint, now)).settle_incarnation, None);
}
