//! Caches the caller of a connection, so that its next call is not evaluated again while nothing has changed.
//!
//! An entry is valid for one version of the index. Any applied revision and any uncertain change invalidates it, so a
//! revoked caller is refused at its next call. Callers whose evaluation depends on the clock or on a count (an expiry,
//! a superseded secret, limits) are never cached.

use std::{
    net::IpAddr,
    sync::{Arc, Mutex, PoisonError},
};

use subtle::ConstantTimeEq as _;
use zeroize::Zeroizing;

use crate::domain::{
    key_attributes::KeyAttributes as _,
    name::{AccountId, KeyId},
    policy_decision::Reason,
    scope::ScopeSet,
};

use super::{authenticate::CallerEvaluation, check::Engine, index::IndexVersion, usage::UsageEvent};

/// A caller that was authenticated and has no limits.
#[derive(Debug)]
pub struct CachedCaller {
    /// The account that the caller acts in.
    pub account: AccountId,
    /// The scopes that it is granted in that account.
    pub granted_scopes: ScopeSet,
    key_id: KeyId,
    secret_version: u32,
    /// The version of the index that it was authenticated against.
    index_version: IndexVersion,
}

/// The last caller of one connection.
#[derive(Default)]
pub struct CallerCache(Mutex<Option<CachedToken>>);

struct CachedToken {
    token: Zeroizing<Box<[u8]>>,
    /// Owned by this connection alone, so that cores do not share a reference count.
    caller: Arc<CachedCaller>,
}

impl std::fmt::Debug for CallerCache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CallerCache").finish_non_exhaustive()
    }
}

impl CallerCache {
    fn get(&self, token: &[u8], state: IndexVersion) -> Option<Arc<CachedCaller>> {
        let entry = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let entry = entry.as_ref().filter(|entry| entry.caller.index_version == state)?;
        // Constant time: the duration must not reveal how much of another caller's token was correct.
        bool::from(entry.token.ct_eq(token)).then(|| entry.caller.clone())
    }

    fn put(&self, token: &[u8], cached: &Arc<CachedCaller>) {
        let entry = CachedToken { token: Zeroizing::new(token.into()), caller: cached.clone() };
        self.0.lock().unwrap_or_else(PoisonError::into_inner).replace(entry);
    }
}

impl Engine {
    /// Authenticates a service key whose evaluation depends on nothing but the index. Returns
    /// `None` if [`Engine::authenticate`] must decide.
    ///
    /// All calls with one `cache` must come from the same `peer`.
    #[must_use]
    pub fn authenticate_cached(
        &self,
        presented: &str,
        peer: Option<IpAddr>,
        cache: &CallerCache,
    ) -> Option<Arc<CachedCaller>> {
        // Read first: whatever is found afterwards belongs to this version or a later one.
        let state = self.index.version()?;
        if let Some(cached) = cache.get(presented.as_bytes(), state) {
            return Some(cached);
        }
        let evaluation = self.evaluate_caller(presented, None, false, peer, true).ok()?.ok()?;
        let CallerEvaluation { found_key: found, failures, account, granted_scopes, .. } = evaluation;
        let is_unlimited = |(of, end): (u32, Option<_>)| of == found.secret_version && end.is_none();
        let can_expire = found.limit_state.is_some()
            || found.key.expires_at().is_some()
            || !found.key.secret_expiries().any(is_unlimited)
            || found.key.owner().user().is_some();
        if failures.primary_reason() != Reason::Ok || can_expire {
            return None;
        }
        let (key, version) = (found.key.id(), found.secret_version);
        let cached = Arc::new(CachedCaller {
            account: account?,
            granted_scopes,
            key_id: key,
            secret_version: version,
            index_version: state,
        });
        cache.put(presented.as_bytes(), &cached);
        Some(cached)
    }

    /// Returns whether the index is unchanged since the caller was authenticated. If not,
    /// it must be authenticated again.
    #[must_use]
    pub fn is_cached_caller_current(&self, cached: &CachedCaller) -> bool {
        self.index.version() == Some(cached.index_version)
    }

    /// Records one call of a cached caller as a use of its key.
    pub fn record_cached_call(&self, cached: &CachedCaller) {
        let event = UsageEvent {
            key_id: cached.key_id,
            at: self.clock.now(),
            secret_version: cached.secret_version,
            reason: Reason::Ok,
        };
        self.usage.record(event, None);
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
                ApiKey, Quota, QuotaPeriod, Revocation, RevokeReason,
                tests::{at_seconds, sample_key},
            },
            log::RecordChange,
            name::{DisplayName, EnvironmentName},
            scope::Scope,
            time::Revision,
            token::TokenDigest,
        },
        engine::{
            CheckError, CheckInput, Requester, index::Index, limiter::LimitSettings,
            serving_lease::ServingLease, usage::UsageRecorder,
        },
        store::SnapshotRecord,
    };
    use std::time::Duration;

    fn caller() -> ApiKey {
        let mut key = sample_key();
        key.spec.scopes = [Scope::parse_grant("keyward:check").unwrap()].into_iter().collect();
        key
    }

    fn engine(key: &ApiKey) -> Engine {
        let index = Arc::new(Index::default());
        let account = Account {
            id: AccountId::parse("acme").unwrap(),
            name: DisplayName::parse("Acme").unwrap(),
            suspended_at: None,
            longest_life: None,
            created_at: at_seconds(0),
            updated_at: at_seconds(0),
            revision: Revision(1),
        };
        index.load_record(SnapshotRecord::Account(account));
        index.load_record(SnapshotRecord::Key(Arc::new(key.clone()), vec![]));
        index.finish_load(Revision(1));
        let (usage, lease) = (Arc::new(UsageRecorder::default()), Arc::new(ServingLease::for_sole_owner()));
        Engine::new(
            index,
            usage,
            lease,
            &LimitSettings::default(),
            Arc::new(ManualClock::new(at_seconds(10))),
        )
    }

    fn revoked(key: &ApiKey) -> Arc<ApiKey> {
        let revocation =
            Revocation { at: at_seconds(1), reason: RevokeReason::Unspecified, comment: String::new() };
        Arc::new(ApiKey { revocation: Some(revocation), ..key.clone() })
    }

    #[test]
    fn a_caller_is_remembered_until_anything_changes_and_refused_once_it_is_revoked() {
        let (key, cache) = (caller(), CallerCache::default());
        let engine = engine(&key);
        let first = engine.authenticate_cached("one", None, &cache).unwrap();
        let again = engine.authenticate_cached("one", None, &cache).unwrap();
        assert!(Arc::ptr_eq(&first, &again));
        engine.index.finish_load(Revision(2));
        let decided_anew = engine.authenticate_cached("one", None, &cache).unwrap();
        assert!(!Arc::ptr_eq(&first, &decided_anew));
        engine.index.load_record(SnapshotRecord::Key(revoked(&key), vec![]));
        engine.index.finish_load(Revision(3));
        assert!(engine.authenticate_cached("one", None, &cache).is_none());
    }

    #[test]
    fn whoever_was_let_in_and_is_gone_at_the_decision_gets_none() {
        let (key, cache) = (caller(), CallerCache::default());
        let engine = engine(&key);
        let cached = engine.authenticate_cached("one", None, &cache).unwrap();
        assert!(engine.is_cached_caller_current(&cached));
        engine.index.load_record(SnapshotRecord::Key(revoked(&key), vec![]));
        engine.index.finish_load(Revision(2));
        assert!(!engine.is_cached_caller_current(&cached));
        assert_eq!(engine.reauthenticate("one", None, None).unwrap().unwrap_err(), Reason::Revoked);
        let environment = EnvironmentName::parse("production").unwrap();
        let input = CheckInput {
            token: "one",
            environment: &environment,
            scopes: &[],
            account: None,
            customer: None,
            client_ip: None,
            cost: 1,
            dry_run: false,
            min_revision: None,
            dedup_id: None,
            refuse_management_keys: false,
        };
        let gone = Requester { account: &cached.account, is_still_authorized: &|| Ok(false) };
        assert_eq!(engine.decide_locally(gone, &input).unwrap_err(), CheckError::RequesterRevoked);
    }

    #[test]
    fn a_caller_in_doubt_is_not_remembered_and_not_by_what_was_before_the_doubt_either() {
        let (key, cache) = (caller(), CallerCache::default());
        let engine = engine(&key);
        let before = engine.authenticate_cached("one", None, &cache).unwrap();
        engine.index.mark_change_uncertain(RecordChange::Key(revoked(&key)), Some(key.revision));
        assert!(engine.authenticate_cached("one", None, &cache).is_none());
        engine.index.clear_local_disable(key.id);
        engine.index.deny_locally(key.id, Reason::Disabled);
        assert!(engine.authenticate_cached("one", None, &cache).is_none());
        engine.index.clear_local_disable(key.id);
        let after = engine.authenticate_cached("one", None, &cache);
        assert!(after.is_none_or(|after| !Arc::ptr_eq(&before, &after)));
    }

    #[test]
    fn nothing_is_remembered_over_another_history_under_the_same_numbers() {
        let (key, cache) = (caller(), CallerCache::default());
        let engine = engine(&key);
        engine.authenticate_cached("one", None, &cache).unwrap();
        engine.index.clear();
        engine.index.finish_load(Revision(1));
        assert!(engine.authenticate_cached("one", None, &cache).is_none(), "the key is not in it");
    }

    #[test]
    fn whoever_hangs_on_the_clock_or_on_a_count_is_asked_each_time() {
        let turns: [fn(&mut ApiKey); 3] = [
            |key| key.spec.expires_at = Some(at_seconds(1000)),
            |key| key.spec.quota = Some(Quota { limit: 5, period: QuotaPeriod::Day }),
            |key| {
                key.rotate(
                    TokenDigest::from_token("two"),
                    String::new(),
                    Duration::from_secs(900),
                    at_seconds(5),
                );
            },
        ];
        for turn in turns {
            let mut key = caller();
            turn(&mut key);
            assert!(engine(&key).authenticate_cached("one", None, &CallerCache::default()).is_none());
        }
    }

    #[test]
    fn another_token_over_the_same_connection_is_not_taken_for_the_first() {
        let (engine, cache) = (engine(&caller()), CallerCache::default());
        engine.authenticate_cached("one", None, &cache).unwrap();
        for other in ["", "on", "onE", "one1", "two"] {
            assert!(engine.authenticate_cached(other, None, &cache).is_none(), "{other:?}");
        }
    }
}
