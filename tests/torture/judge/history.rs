//! What happened: changes, kept for the whole run, and Checks, which are judged and forgotten.
//!
//! What a Check asks about depends on gates: the key's revocation, its being disabled, the version of its secret, its
//! scopes, its role, its owner's membership, its account's suspension. A gate begins open. Changes close it (they
//! narrow) and may open it again, one after the other: whoever owns a gate begins a change when the one
//! before has ended. Where a change ended without an answer, it may be done at any later time, or never.

use keyward::pb::Reason;

use super::ms;

/// Nanoseconds since the run began.
pub(crate) type Nanos = u64;

/// Which token, of all that the run knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct TokenId(u32);

/// Which gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct GateId(u32);

/// Which change of which gate.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ChangeId(GateId, u32);

/// What a Check was told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CheckAnswer {
    /// Yes.
    Allowed,
    /// Yes, but with the id of another key than the token's.
    AllowedAnother,
    /// No.
    Denied(Reason),
    /// The caller, whose key is live for ever, was not known or not trusted.
    Stranger,
    /// No verdict.
    None,
}

/// One Check.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ObservedCheck {
    pub(crate) token: TokenId,
    pub(crate) replica: u8,
    /// Which process of this replica answered; 0 = that is not certain.
    pub(crate) epoch: u32,
    pub(crate) invoked: Nanos,
    pub(crate) returned: Nanos,
    pub(crate) answer: CheckAnswer,
    /// The state that it was answered from, as the answer says; 0 = it says nothing.
    pub(crate) revision: u64,
    /// The state that was asked for; 0 = any.
    pub(crate) min_revision: u64,
}

impl ObservedCheck {
    /// Whether it says from which state which process answered.
    pub(super) fn has_state(&self) -> bool {
        let verdict = matches!(
            self.answer,
            CheckAnswer::Allowed | CheckAnswer::AllowedAnother | CheckAnswer::Denied(_)
        );
        verdict && self.epoch > 0
    }
}

/// How a change ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ChangeOutcome {
    /// It has not ended.
    Pending,
    /// OK, with this revision.
    Done(u64),
    /// Without OK: it may be done, or yet be done.
    Unknown,
}

#[derive(Clone, Copy, Debug)]
struct GateChange {
    closes: bool,
    replica: u8,
    invoked: Nanos,
    returned: Nanos,
    outcome: ChangeOutcome,
}

#[derive(Debug)]
struct AuthorizationGate {
    what: &'static str,
    changes: Vec<GateChange>,
    /// A change that nobody can see in `changes` may yet close it.
    doubtful: bool,
}

#[derive(Debug)]
struct TrackedToken {
    /// The key's id, or what it is.
    name: String,
    /// The revision from which on it is granted; None = never.
    since: Option<u64>,
    gates: Vec<GateId>,
}

/// Every change of a run, and what depends on it.
#[derive(Debug, Default)]
pub(crate) struct ChangeHistory {
    gates: Vec<AuthorizationGate>,
    tokens: Vec<TrackedToken>,
}

impl ChangeHistory {
    /// A new gate, open.
    pub(crate) fn new_gate(&mut self, what: &'static str) -> GateId {
        self.gates.push(AuthorizationGate { what, changes: Vec::new(), doubtful: false });
        GateId(index(self.gates.len() - 1))
    }

    /// Something may yet close this gate that is not one of its own changes.
    pub(crate) fn mark_doubtful(&mut self, gate: GateId) {
        self.gates[gate.0 as usize].doubtful = true;
    }

    /// A token that is granted what it is asked about from this revision on, through these gates.
    pub(crate) fn new_token(&mut self, name: &str, since: u64, gates: &[GateId]) -> TokenId {
        self.tokens.push(TrackedToken { name: name.to_owned(), since: Some(since), gates: gates.to_vec() });
        TokenId(index(self.tokens.len() - 1))
    }

    /// A question that must never be allowed.
    pub(crate) fn new_forbidden_token(&mut self, name: &str) -> TokenId {
        self.tokens.push(TrackedToken { name: name.to_owned(), since: None, gates: Vec::new() });
        TokenId(index(self.tokens.len() - 1))
    }

    /// A change is about to be sent.
    pub(crate) fn begin_change(&mut self, gate: GateId, closes: bool, replica: u8, now: Nanos) -> ChangeId {
        let changes = &mut self.gates[gate.0 as usize].changes;
        debug_assert!(changes.last().is_none_or(|last| last.outcome != ChangeOutcome::Pending));
        changes.push(GateChange {
            closes,
            replica,
            invoked: now,
            returned: 0,
            outcome: ChangeOutcome::Pending,
        });
        ChangeId(gate, index(changes.len() - 1))
    }

    /// It has ended.
    pub(crate) fn end_change(&mut self, change: ChangeId, outcome: ChangeOutcome, now: Nanos) {
        let change = &mut self.gates[change.0.0 as usize].changes[change.1 as usize];
        (change.returned, change.outcome) = (now, outcome);
    }

    pub(super) fn is_granted(&self, token: TokenId) -> bool {
        self.tokens[token.0 as usize].since.is_some()
    }

    /// Whether a gate that the token depends on was certainly closed during all of this Check.
    pub(super) fn must_be_refused(&self, check: &ObservedCheck) -> bool {
        self.gates_of(check.token).any(|gate| gate.is_certainly_closed(check.invoked, check.returned))
    }

    /// Whether every gate was certainly open, in every state that this Check may have been answered from.
    pub(super) fn must_be_allowed(&self, check: &ObservedCheck) -> bool {
        let state = check.revision.max(check.min_revision);
        let known = self.tokens[check.token.0 as usize].since.is_some_and(|since| since <= state);
        known && self.gates_of(check.token).all(|gate| gate.is_certainly_open(check.returned, state))
    }

    /// Whether a change that closes what was asked about was under way within `within` of it.
    pub(super) fn is_near(&self, check: &ObservedCheck, within: Nanos) -> bool {
        let closing = self.gates_of(check.token).flat_map(|gate| gate.changes.iter().rev());
        closing.filter(|change| change.closes).any(|change| {
            let until = change.returned.max(change.invoked) + within;
            check.invoked + within >= change.invoked && check.invoked <= until
        })
    }

    /// A Check and the changes of all that it depends on, for people.
    pub(super) fn describe(&self, check: &ObservedCheck) -> String {
        let ObservedCheck { replica, epoch, answer, revision, min_revision, .. } = check;
        let mut story = format!(
            "{}: Check on replica {replica} (life {epoch}) from {} to {} was told {answer:?}, revision {revision}, \
             min_revision {min_revision}",
            self.tokens[check.token.0 as usize].name,
            ms(check.invoked),
            ms(check.returned),
        );
        if let Some(since) = self.tokens[check.token.0 as usize].since {
            story += &format!("; granted since revision {since}");
        }
        for gate in self.gates_of(check.token) {
            for change in &gate.changes {
                let verb = if change.closes { "close" } else { "open" };
                story += &format!(
                    "\n      to {verb} {}: replica {} from {} to {}, {:?}",
                    gate.what,
                    change.replica,
                    ms(change.invoked),
                    ms(change.returned),
                    change.outcome
                );
            }
        }
        story
    }

    fn gates_of(&self, token: TokenId) -> impl Iterator<Item = &AuthorizationGate> {
        self.tokens[token.0 as usize].gates.iter().map(|gate| &self.gates[gate.0 as usize])
    }
}

impl AuthorizationGate {
    /// From `from` to `to`: a change that closes had returned OK before, and none that may open it again had been
    /// begun.
    fn is_certainly_closed(&self, from: Nanos, to: Nanos) -> bool {
        let closed = |change: &GateChange| {
            change.closes && matches!(change.outcome, ChangeOutcome::Done(_)) && change.returned < from
        };
        let Some(last) = self.changes.iter().rposition(closed) else { return false };
        // What ended before the closing began has had its effect, unless it may yet come.
        let may_open = |(at, change): (usize, &GateChange)| {
            let late = at > last || change.outcome == ChangeOutcome::Unknown;
            !change.closes && late && change.invoked < to
        };
        !self.changes.iter().enumerate().any(may_open)
    }

    /// In every state from revision `state` on that there was until `to`: nothing can have closed it that was
    /// not opened again in this state.
    fn is_certainly_open(&self, to: Nanos, state: u64) -> bool {
        let begun = || self.changes.iter().filter(|change| change.invoked < to);
        let in_doubt =
            self.doubtful || begun().any(|change| change.closes && change.outcome == ChangeOutcome::Unknown);
        let open = match begun().next_back() {
            None => true,
            Some(GateChange { closes: false, outcome: ChangeOutcome::Done(revision), .. }) => {
                *revision <= state
            }
            Some(_) => false,
        };
        open && !in_doubt
    }
}

fn index(at: usize) -> u32 {
    u32::try_from(at).expect("a run has fewer than 2^32 of anything")
}
