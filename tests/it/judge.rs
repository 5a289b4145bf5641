//! The judge of the torture harness, on small histories made by hand: what breaks a rule is noticed, and what only looks
//! like it is not.

use keyward::pb::Reason;

#[allow(dead_code, reason = "the harness asks more of it")]
#[path = "../torture/judge/mod.rs"]
mod judging;

use judging::{
    AcknowledgedChange, ChangeHistory, ChangeOutcome, CheckAnswer, GateId, Judge, JudgeRule, LogEntry, Nanos,
    ObservedCheck, PropagationClaim, TokenId, find_lost,
};

const CREATED: u64 = 10;

/// A key that was made at revision 10, and what may close.
struct KeyHistory {
    history: ChangeHistory,
    key: TokenId,
    gate: GateId,
}

impl KeyHistory {
    fn new() -> KeyHistory {
        let mut history = ChangeHistory::default();
        let gate = history.new_gate("the key");
        let key = history.new_token("a key", CREATED, &[gate]);
        KeyHistory { history, key, gate }
    }

    /// A change from one instant to another.
    fn change(mut self, closes: bool, from: Nanos, to: Nanos, outcome: ChangeOutcome) -> KeyHistory {
        let change = self.history.begin_change(self.gate, closes, 0, from);
        self.history.end_change(change, outcome, to);
        self
    }

    fn closed(self, from: Nanos, to: Nanos) -> KeyHistory {
        self.change(true, from, to, ChangeOutcome::Done(20))
    }

    fn opened(self, from: Nanos, to: Nanos) -> KeyHistory {
        self.change(false, from, to, ChangeOutcome::Done(30))
    }

    fn check(&self, from: Nanos, to: Nanos, answer: CheckAnswer) -> ObservedCheck {
        ObservedCheck {
            token: self.key,
            replica: 0,
            epoch: 1,
            invoked: from,
            returned: to,
            answer,
            revision: CREATED,
            min_revision: 0,
        }
    }

    fn allowed(&self, from: Nanos, to: Nanos) -> ObservedCheck {
        self.check(from, to, CheckAnswer::Allowed)
    }

    fn denied(&self, from: Nanos, to: Nanos) -> ObservedCheck {
        self.check(from, to, CheckAnswer::Denied(Reason::Unknown))
    }

    /// What is broken by these Checks.
    fn broken(&self, checks: &[ObservedCheck]) -> Vec<JudgeRule> {
        let mut judge = Judge::default();
        judge.judge_checks(&self.history, &mut checks.to_vec());
        judge.violations.iter().map(|violation| violation.rule).collect()
    }
}

#[test]
fn to_allow_after_a_revoke_was_ok_is_noticed() {
    let story = KeyHistory::new().closed(100, 200);
    assert_eq!(story.broken(&[story.allowed(201, 300)]), [JudgeRule::AllowedAfterNarrowing]);
}

#[test]
fn a_check_that_began_before_the_ok_may_be_allowed_however_late_it_returns() {
    let story = KeyHistory::new().closed(100, 200);
    assert_eq!(story.broken(&[story.allowed(50, 90), story.allowed(150, 180), story.allowed(199, 9000)]), []);
}

#[test]
fn a_revoke_without_an_answer_proves_nothing_until_another_is_ok() {
    for outcome in [ChangeOutcome::Unknown, ChangeOutcome::Pending] {
        let story = KeyHistory::new().change(true, 100, 200, outcome);
        assert_eq!(story.broken(&[story.allowed(300, 400)]), []);
    }
    let story = KeyHistory::new().change(true, 100, 200, ChangeOutcome::Unknown).closed(300, 400);
    let checks = [story.allowed(350, 360), story.allowed(500, 600)];
    assert_eq!(story.broken(&checks), [JudgeRule::AllowedAfterNarrowing]);
}

#[test]
fn what_is_disabled_may_be_allowed_once_its_enabling_has_begun() {
    let story = KeyHistory::new().closed(100, 200).opened(300, 400);
    assert_eq!(story.broken(&[story.allowed(250, 299)]), [JudgeRule::AllowedAfterNarrowing]);
    assert_eq!(story.broken(&[story.allowed(250, 301), story.allowed(450, 500)]), []);
}

#[test]
fn what_is_disabled_again_is_refused_again() {
    let story = KeyHistory::new().closed(100, 200).opened(300, 400).closed(500, 600);
    assert_eq!(story.broken(&[story.allowed(550, 580)]), []);
    assert_eq!(story.broken(&[story.allowed(601, 700)]), [JudgeRule::AllowedAfterNarrowing]);
}

#[test]
fn an_enabling_that_got_lost_may_come_at_any_later_time() {
    let story =
        KeyHistory::new().closed(100, 200).change(false, 300, 400, ChangeOutcome::Unknown).closed(500, 600);
    assert_eq!(story.broken(&[story.allowed(250, 290)]), [JudgeRule::AllowedAfterNarrowing]);
    assert_eq!(story.broken(&[story.allowed(900, 950)]), []);
}

#[test]
fn what_was_never_granted_is_noticed() {
    let mut story = KeyHistory::new();
    story.key = story.history.new_forbidden_token("a token that was never issued");
    assert_eq!(story.broken(&[story.allowed(1, 2)]), [JudgeRule::NeverGranted]);
    assert_eq!(story.broken(&[story.denied(1, 2)]), []);
}

#[test]
fn an_answer_about_another_key_is_noticed() {
    let story = KeyHistory::new();
    assert_eq!(story.broken(&[story.check(1, 2, CheckAnswer::AllowedAnother)]), [JudgeRule::NeverGranted]);
}

#[test]
fn to_deny_a_live_key_from_a_state_that_knows_it_is_noticed() {
    let story = KeyHistory::new();
    assert_eq!(story.broken(&[story.denied(1, 2)]), [JudgeRule::WrongDenial]);
    let early = ObservedCheck { revision: CREATED - 1, ..story.denied(1, 2) };
    assert_eq!(story.broken(&[early]), [], "a state from before its creation");
    let asked = ObservedCheck { min_revision: CREATED, ..early };
    assert_eq!(story.broken(&[asked]), [JudgeRule::WrongDenial]);
}

#[test]
fn no_answer_is_never_a_wrong_one() {
    let story = KeyHistory::new().closed(100, 200);
    assert_eq!(
        story.broken(&[story.check(1, 2, CheckAnswer::None), story.check(300, 301, CheckAnswer::None)]),
        []
    );
}

#[test]
fn a_caller_that_is_not_known_any_more_is_noticed() {
    let story = KeyHistory::new();
    assert_eq!(story.broken(&[story.check(1, 2, CheckAnswer::Stranger)]), [JudgeRule::WrongDenial]);
}

#[test]
fn to_deny_is_right_once_a_narrowing_change_has_begun() {
    for outcome in [ChangeOutcome::Done(20), ChangeOutcome::Unknown, ChangeOutcome::Pending] {
        let story = KeyHistory::new().change(true, 100, 200, outcome);
        assert_eq!(story.broken(&[story.denied(50, 101), story.denied(300, 301)]), []);
        assert_eq!(story.broken(&[story.denied(50, 99)]), [JudgeRule::WrongDenial]);
    }
}

#[test]
fn what_was_enabled_again_may_be_denied_only_by_an_older_state() {
    let story = KeyHistory::new().closed(100, 200).opened(300, 400);
    let at = |revision| ObservedCheck { revision, ..story.denied(500, 600) };
    assert_eq!(story.broken(&[at(20), at(29)]), []);
    assert_eq!(story.broken(&[at(30)]), [JudgeRule::WrongDenial]);
}

#[test]
fn what_may_yet_be_closed_may_be_denied() {
    let story = KeyHistory::new().change(true, 100, 200, ChangeOutcome::Unknown).opened(300, 400);
    let late = ObservedCheck { revision: 40, ..story.denied(500, 600) };
    assert_eq!(story.broken(&[late]), []);
    let mut story = KeyHistory::new();
    story.history.mark_doubtful(story.gate);
    assert_eq!(story.broken(&[story.denied(1, 2)]), []);
}

#[test]
fn a_process_that_goes_back_is_noticed() {
    let story = KeyHistory::new();
    let at = |from, to, revision| ObservedCheck { revision, ..story.allowed(from, to) };
    assert_eq!(story.broken(&[at(1, 2, 50), at(3, 4, 49)]), [JudgeRule::WentBack]);
    assert_eq!(story.broken(&[at(1, 3, 50), at(2, 4, 49)]), [], "at the same time");
    let other = |check| ObservedCheck { replica: 1, ..check };
    assert_eq!(story.broken(&[at(1, 2, 50), other(at(3, 4, 49))]), [], "another replica");
    let next = |check| ObservedCheck { epoch: 3, ..check };
    assert_eq!(story.broken(&[at(1, 2, 50), next(at(3, 4, 49))]), [], "another process");
    let uncertain = |check| ObservedCheck { epoch: 0, ..check };
    assert_eq!(story.broken(&[at(1, 2, 50), uncertain(at(3, 4, 49))]), [], "it is not certain which process");
}

#[test]
fn going_back_is_noticed_from_one_stretch_of_time_to_the_next() {
    let story = KeyHistory::new();
    let mut judge = Judge::default();
    for (from, to, revision) in [(1, 2, 50), (3, 4, 49)] {
        judge.judge_checks(&story.history, &mut [ObservedCheck { revision, ..story.allowed(from, to) }]);
    }
    assert_eq!(judge.count(JudgeRule::WentBack), 1);
    assert!(judge.violations[0].story.contains("revision 50"), "{:?}", judge.violations);
}

#[test]
fn an_acknowledged_change_that_the_log_lacks_is_noticed() {
    let change = |revision, subject: &str| AcknowledgedChange {
        revision,
        action: "key.revoked",
        subject: subject.to_owned(),
    };
    let entry = |action: &str, key: &str, account: &str| LogEntry {
        action: action.to_owned(),
        key: key.to_owned(),
        account: account.to_owned(),
        user: "someone".to_owned(),
    };
    let log = [(1, entry("key.revoked", "k", "acme")), (2, entry("key.created", "k", "acme"))].into();
    assert_eq!(find_lost(&[change(1, "k"), change(1, "acme"), change(1, "someone")], &log), []);
    for missing in [change(3, "k"), change(2, "k"), change(1, "another")] {
        assert_eq!(find_lost(std::slice::from_ref(&missing), &log), [missing]);
    }
}

#[test]
fn ok_with_a_replica_that_may_still_allow_is_noticed() {
    let report = PropagationClaim { complete: true, unconfirmed: 0, complete_by: Some(1000) };
    assert!(report.is_sound(1));
    assert!(!PropagationClaim { complete: false, ..report }.is_sound(2000));
    let silent = PropagationClaim { unconfirmed: 1, ..report };
    assert!(!silent.is_sound(999) && silent.is_sound(1000));
    assert!(!PropagationClaim { complete_by: None, ..silent }.is_sound(2000), "an infinite lease");
}

#[test]
fn a_time_without_an_allowed_check_is_a_gap_of_that_replica() {
    const MS: Nanos = 1_000_000;
    let story = KeyHistory::new();
    let mut judge = Judge::default();
    let at = |replica, at| ObservedCheck { replica, ..story.allowed(at * MS - 1, at * MS) };
    let denied = ObservedCheck { ..story.check(499 * MS, 500 * MS, CheckAnswer::Denied(Reason::Revoked)) };
    judge.judge_checks(&story.history, &mut [at(0, 1), at(1, 2), at(1, 300), denied, at(0, 900), at(1, 905)]);
    let longest = |replica| judge.gaps.longest(|gap| gap.replica == replica).unwrap();
    assert_eq!((longest(Some(0)).from, longest(Some(0)).to), (MS, 900 * MS));
    assert_eq!(longest(Some(1)).length(), 605 * MS);
    assert_eq!(longest(None).length(), 600 * MS, "of all replicas");
    assert_eq!(judge.gaps.last(0), Some(900 * MS));
}

#[test]
fn checks_near_a_narrowing_change_of_their_key_are_counted() {
    const MS: Nanos = 1_000_000;
    let story = KeyHistory::new().closed(2000 * MS, 2100 * MS).opened(5000 * MS, 5100 * MS);
    let mut judge = Judge::default();
    let at = |at| story.check(at * MS, at * MS + 1, CheckAnswer::None);
    judge.judge_checks(&story.history, &mut [at(999), at(1000), at(2050), at(3100), at(3101), at(5000)]);
    assert_eq!((judge.judged.near, judge.judged.checks), (3, 6));
}
