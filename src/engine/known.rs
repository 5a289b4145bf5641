//! Callers that were found in order, remembered: who calls again over the same connection is not decided again while
//! nothing that decided can have changed.
//!
//! What is remembered holds for one state of the index, and is worth nothing once that has moved on by any revision, or
//! anything is in doubt: so a revoked caller is refused at its next call. Callers of whom anything hangs on the clock or
//! on a count (an expiry, a superseded secret, limits) are not remembered.

use std::{
    net::IpAddr,
    sync::{Arc, Mutex, PoisonError},
};

use subtle::ConstantTimeEq as _;
use zeroize::Zeroizing;

use crate::domain::{
    decision::Reason,
    facts::KeyFacts as _,
    name::{AccountId, KeyId},
    scope::ScopeSet,
};

use super::{Engine, callers::CallerJudged, index::State, usage::notes::Note};

/// A caller in order.
#[derive(Debug)]
pub struct Known {
    /// The account that it acts in.
    pub account: AccountId,
    /// What it is granted there.
    pub grants: ScopeSet,
    key: KeyId,
    version: u32,
    /// When it was found in order.
    state: State,
}

/// The caller that one connection has had last.
#[derive(Default)]
pub struct Memory(Mutex<Option<Remembered>>);

struct Remembered {
    token: Zeroizing<Box<[u8]>>,
    /// Of this connection alone: calls on other cores count other references.
    known: Arc<Known>,
}

impl std::fmt::Debug for Memory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Memory").finish_non_exhaustive()
    }
}

impl Memory {
    fn recall(&self, token: &[u8], state: State) -> Option<Arc<Known>> {
        let remembered = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let remembered = remembered.as_ref().filter(|remembered| remembered.known.state == state)?;
        // How much of another caller's token somebody has right must not show in the time that this takes.
        bool::from(remembered.token.ct_eq(token)).then(|| remembered.known.clone())
    }

    fn remember(&self, token: &[u8], known: &Arc<Known>) {
        let remembered = Remembered { token: Zeroizing::new(token.into()), known: known.clone() };
        self.0.lock().unwrap_or_else(PoisonError::into_inner).replace(remembered);
    }
}

impl Engine {
    /// The service key's caller with this token, where it is plainly in order: [`Engine::authenticate`] would say so
    /// at once, and count nothing. None = that is to be asked. All calls with one `memory` come from the same `peer`.
    #[must_use]
    pub fn recognise(&self, presented: &str, peer: Option<IpAddr>, memory: &Memory) -> Option<Arc<Known>> {
        // Read first: what is found after is of this state or a later one.
        let state = self.index.state()?;
        if let Some(known) = memory.recall(presented.as_bytes(), state) {
            return Some(known);
        }
        let judged = self.judge_caller(presented, None, false, peer, true).ok()?.ok()?;
        let CallerJudged { found, failures, account, grants, .. } = judged;
        let endless = |(of, end): (u32, Option<_>)| of == found.version && end.is_none();
        let hangs = found.budget.is_some()
            || found.key.expires_at().is_some()
            || !found.key.secret_ends().any(endless)
            || found.key.owner().user().is_some();
        if failures.first() != Reason::Ok || hangs {
            return None;
        }
        let (key, version) = (found.key.id(), found.version);
        let known = Arc::new(Known { account: account?, grants, key, version, state });
        memory.remember(presented.as_bytes(), &known);
        Some(known)
    }

    /// Whether nothing has changed since the caller was found in order. If anything has, it is to be judged anew.
    #[must_use]
    pub fn is_as_known(&self, known: &Known) -> bool {
        self.index.state() == Some(known.state)
    }

    /// Notes a call of such a caller.
    pub fn note_call(&self, known: &Known) {
        let note = Note { key: known.key, at: self.clock.now(), version: known.version, reason: Reason::Ok };
        self.usage.note(note, None);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        clock::ManualClock,
        domain::{
            account::Account,
            key::{
                Key, Quota, QuotaPeriod, Revocation, RevokeReason,
                tests::{at, sample},
            },
            log::Change,
            name::{DisplayName, EnvironmentName},
            scope::Scope,
            time::Revision,
            token::Digest,
        },
        engine::{
            Asker, CannotAnswer, Question, index::Index, lease::Lease, limiter::LimitSettings, usage::Usage,
        },
        store::SnapshotItem,
    };
    use std::time::Duration;

    fn caller() -> Key {
        let mut key = sample();
        key.terms.scopes = [Scope::parse_grant("keyward:check").unwrap()].into_iter().collect();
        key
    }

    fn engine(key: &Key) -> Engine {
        let index = Arc::new(Index::default());
        let account = Account {
            id: AccountId::parse("acme").unwrap(),
            name: DisplayName::parse("Acme").unwrap(),
            suspended_at: None,
            longest_life: None,
            created_at: at(0),
            updated_at: at(0),
            revision: Revision(1),
        };
        index.load(SnapshotItem::Account(account));
        index.load(SnapshotItem::Key(Arc::new(key.clone()), vec![]));
        index.loaded(Revision(1));
        let (usage, lease) = (Arc::new(Usage::default()), Arc::new(Lease::sole()));
        Engine::new(index, usage, lease, &LimitSettings::default(), Arc::new(ManualClock::at(at(10))))
    }

    fn revoked(key: &Key) -> Arc<Key> {
        let revocation = Revocation { at: at(1), reason: RevokeReason::Unspecified, comment: String::new() };
        Arc::new(Key { revocation: Some(revocation), ..key.clone() })
    }

    #[test]
    fn a_caller_is_remembered_until_anything_changes_and_refused_once_it_is_revoked() {
        let (key, memory) = (caller(), Memory::default());
        let engine = engine(&key);
        let first = engine.recognise("one", None, &memory).unwrap();
        let again = engine.recognise("one", None, &memory).unwrap();
        assert!(Arc::ptr_eq(&first, &again));
        engine.index.loaded(Revision(2));
        let decided_anew = engine.recognise("one", None, &memory).unwrap();
        assert!(!Arc::ptr_eq(&first, &decided_anew));
        engine.index.load(SnapshotItem::Key(revoked(&key), vec![]));
        engine.index.loaded(Revision(3));
        assert!(engine.recognise("one", None, &memory).is_none());
    }

    #[test]
    fn whoever_was_let_in_and_is_gone_at_the_decision_gets_none() {
        let (key, memory) = (caller(), Memory::default());
        let engine = engine(&key);
        let known = engine.recognise("one", None, &memory).unwrap();
        assert!(engine.is_as_known(&known));
        engine.index.load(SnapshotItem::Key(revoked(&key), vec![]));
        engine.index.loaded(Revision(2));
        assert!(!engine.is_as_known(&known));
        assert_eq!(engine.stands("one", None, None).unwrap().unwrap_err(), Reason::Revoked);
        let environment = EnvironmentName::parse("production").unwrap();
        let question = Question {
            token: "one",
            environment: &environment,
            scopes: &[],
            account: None,
            customer: None,
            client_ip: None,
            cost: 1,
            dry_run: false,
            min_revision: None,
            charge: None,
            bar_management: false,
        };
        let gone = Asker { account: &known.account, stands: &|| Ok(false) };
        assert_eq!(engine.decide(gone, &question).unwrap_err(), CannotAnswer::AskerGone);
    }

    #[test]
    fn a_caller_in_doubt_is_not_remembered_and_not_by_what_was_before_the_doubt_either() {
        let (key, memory) = (caller(), Memory::default());
        let engine = engine(&key);
        let before = engine.recognise("one", None, &memory).unwrap();
        engine.index.doubt(Change::Key(revoked(&key)), Some(key.revision));
        assert!(engine.recognise("one", None, &memory).is_none());
        engine.index.enable(key.id);
        engine.index.stop(key.id, Reason::Disabled);
        assert!(engine.recognise("one", None, &memory).is_none());
        engine.index.enable(key.id);
        let after = engine.recognise("one", None, &memory);
        assert!(after.is_none_or(|after| !Arc::ptr_eq(&before, &after)));
    }

    #[test]
    fn nothing_is_remembered_over_another_history_under_the_same_numbers() {
        let (key, memory) = (caller(), Memory::default());
        let engine = engine(&key);
        engine.recognise("one", None, &memory).unwrap();
        engine.index.clear();
        engine.index.loaded(Revision(1));
        assert!(engine.recognise("one", None, &memory).is_none(), "the key is not in it");
    }

    #[test]
    fn whoever_hangs_on_the_clock_or_on_a_count_is_asked_each_time() {
        let turns: [fn(&mut Key); 3] = [
            |key| key.terms.expires_at = Some(at(1000)),
            |key| key.terms.quota = Some(Quota { limit: 5, period: QuotaPeriod::Day }),
            |key| {
                key.rotate(Digest::of("two"), String::new(), Duration::from_secs(900), at(5));
            },
        ];
        for turn in turns {
            let mut key = caller();
            turn(&mut key);
            assert!(engine(&key).recognise("one", None, &Memory::default()).is_none());
        }
    }

    #[test]
    fn another_token_over_the_same_connection_is_not_taken_for_the_first() {
        let (engine, memory) = (engine(&caller()), Memory::default());
        engine.recognise("one", None, &memory).unwrap();
        for other in ["", "on", "onE", "one1", "two"] {
            assert!(engine.recognise(other, None, &memory).is_none(), "{other:?}");
        }
    }
}
