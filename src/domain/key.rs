//! The record of an API key, its states and its transitions.
//!
//! Transitions keep the record consistent and know nothing about the caller. `keys` decides which caller may change a
//! key, and `policy_decision` what a key in a given state allows.

use std::{collections::BTreeMap, time::Duration};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::{
    key_attributes::{KeyAttributes, secret_superseded_at},
    name::{CustomerId, EnvironmentName, KeyId, KeyName, RoleName},
    scope::ScopeSet,
    time::{Revision, Timestamp},
    token::TokenDigest,
};

pub use super::{
    account::KeyOwner,
    limit::{Quota, QuotaPeriod, RateLimit},
};

/// One version of a key's token.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeySecret {
    /// The number of the secret, from 1.
    pub version: u32,
    /// Digest of the whole token.
    pub digest: TokenDigest,
    /// The part of the token that lists may show.
    pub hint: String,
    /// When the secret was issued.
    pub created_at: Timestamp,
    /// When the secret is superseded. None for the newest secret.
    pub expires_at: Option<Timestamp>,
}

impl KeySecret {
    /// Whether a later secret has taken this one's place by `now`.
    #[must_use]
    pub fn is_superseded(&self, now: Timestamp) -> bool {
        self.expires_at.is_some_and(|end| now >= end)
    }
}

/// Why a key was revoked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RevokeReason {
    /// The caller gave no reason.
    Unspecified,
    /// The token leaked.
    Compromised,
    /// Another key has taken its place.
    Superseded,
    /// The program that used it no longer exists.
    NoLongerNeeded,
    /// The person or team behind it has left.
    OwnerLeft,
}

/// The end of a key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Revocation {
    /// When the key was revoked.
    pub at: Timestamp,
    /// The reason that the caller gave.
    pub reason: RevokeReason,
    /// The comment that the caller gave.
    pub comment: String,
}

/// The state of a key, the first that holds in the order Revoked, Disabled, Expired, Active.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ApiKeyState {
    /// The key may be used.
    Active,
    /// The key is denied until it is enabled.
    Disabled,
    /// The key's expiry has passed.
    Expired,
    /// The key is denied for ever.
    Revoked,
}

impl ApiKeyState {
    /// Every state that a key can leave.
    pub const UNREVOKED: [ApiKeyState; 3] =
        [ApiKeyState::Active, ApiKeyState::Disabled, ApiKeyState::Expired];
}

/// The permissions and attributes of a key that its creator chooses and Update changes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeySpec {
    /// Name for people, unique within the owner while the key is not revoked.
    pub name: Option<KeyName>,
    /// Granted scopes.
    pub scopes: ScopeSet,
    /// Granted roles.
    pub roles: Vec<RoleName>,
    /// From this instant the key is refused.
    pub expires_at: Option<Timestamp>,
    /// The only customers it serves. None = every customer.
    pub customers: Vec<CustomerId>,
    /// The only client networks it serves. None = every address.
    pub allowed_cidrs: Vec<IpNet>,
    /// Rate limits. None = unlimited.
    pub rate_limits: Vec<RateLimit>,
    /// Quota. None = unlimited.
    pub quota: Option<Quota>,
    /// Free-form notes of the key's creator.
    pub metadata: BTreeMap<String, String>,
}

/// An API key: the record that survives rotation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApiKey {
    /// Its id.
    pub id: KeyId,
    /// The account or user that owns the key.
    pub owner: KeyOwner,
    /// The one environment in which it works.
    pub environment: EnvironmentName,
    /// What it may do and where.
    #[serde(flatten)]
    pub spec: KeySpec,
    /// When it was created.
    pub created_at: Timestamp,
    /// What created it: a key's id, `cert:` and a certificate's name, or `system`.
    pub created_by: String,
    /// When it last changed.
    pub updated_at: Timestamp,
    /// Since when it is disabled.
    pub disabled_at: Option<Timestamp>,
    /// The revocation; None = not revoked.
    pub revocation: Option<Revocation>,
    /// The newest secret and the one before it, newest first. Older ones are superseded, and known to the
    /// store and the index by digest alone.
    pub secrets: Vec<KeySecret>,
    /// The revision of its last change; the store sets it at commit.
    pub revision: Revision,
}

impl ApiKey {
    /// Derives the state at `now`.
    #[must_use]
    pub fn state(&self, now: Timestamp) -> ApiKeyState {
        if self.revocation.is_some() {
            ApiKeyState::Revoked
        } else if self.disabled_at.is_some() {
            ApiKeyState::Disabled
        } else if self.is_expired(now) {
            ApiKeyState::Expired
        } else {
            ApiKeyState::Active
        }
    }

    /// The hint of the newest secret; empty = the record has no secret.
    #[must_use]
    pub fn newest_hint(&self) -> &str {
        self.secrets.first().map_or("", |secret| &secret.hint)
    }

    /// Gives the key a new secret. The newest so far stays for `overlap`, but never beyond the key's own
    /// expiry; any older one ends now. Returns when the newest so far stops.
    pub fn rotate(
        &mut self,
        digest: TokenDigest,
        hint: String,
        overlap: Duration,
        now: Timestamp,
    ) -> Timestamp {
        let end = now.saturating_add(overlap);
        let end = self.spec.expires_at.map_or(end, |expiry| end.min(expiry));
        self.secrets.truncate(1);
        let mut version = 0;
        for secret in &mut self.secrets {
            secret.expires_at = Some(end);
            version = secret.version;
        }
        self.secrets
            .insert(0, KeySecret { version: version + 1, digest, hint, created_at: now, expires_at: None });
        self.updated_at = now;
        end
    }

    /// Whether a secret before the newest is still alive at `now`.
    #[must_use]
    pub fn has_overlapping_secret(&self, now: Timestamp) -> bool {
        self.secrets.iter().skip(1).any(|secret| !secret.is_superseded(now))
    }

    /// Ends a rotation's overlap at `now`.
    pub fn finish_rotation(&mut self, now: Timestamp) {
        for secret in self.secrets.iter_mut().skip(1) {
            secret.expires_at = Some(secret.expires_at.map_or(now, |end| end.min(now)));
        }
        self.updated_at = now;
    }

    /// Whether the change from `before` to `self` can deny a Check that was allowed.
    ///
    /// In doubt the answer is true: a change that does not wait for propagation is the worse mistake.
    #[must_use]
    pub fn restricts(&self, before: &impl KeyAttributes) -> bool {
        let earlier = |new: Option<Timestamp>, old: Option<Timestamp>| match (new, old) {
            (Some(new), Some(old)) => new < old,
            (new, old) => new.is_some() && old.is_none(),
        };
        let tighter_set = |new: usize, old: usize, kept: bool| new > 0 && (old == 0 || !kept);
        let (new, old) = (&self.spec, before);
        self.revocation.is_some() && !old.is_revoked()
            || self.disabled_at.is_some() && !old.is_disabled()
            || earlier(new.expires_at, old.expires_at())
            || !new.scopes.covers_all(old.scopes())
            || !old.roles().iter().all(|role| new.roles.contains(role))
            || tighter_set(
                new.customers.len(),
                old.customers().len(),
                old.customers().iter().all(|customer| new.customers.contains(customer)),
            )
            || tighter_set(
                new.allowed_cidrs.len(),
                old.allowed_cidrs().len(),
                old.allowed_cidrs().iter().all(|net| new.allowed_cidrs.iter().any(|wide| wide.contains(net))),
            )
            || (new.rate_limits != old.rate_limits() && !new.rate_limits.is_empty())
            || (new.quota.as_ref() != old.quota() && new.quota.is_some())
            || old.secret_expiries().any(|(version, end)| {
                let kept = self.secrets.iter().find(|other| other.version == version);
                kept.is_none_or(|kept| earlier(kept.expires_at, end))
            })
    }
}

impl KeyAttributes for ApiKey {
    fn owner(&self) -> &KeyOwner {
        &self.owner
    }

    fn environment(&self) -> &EnvironmentName {
        &self.environment
    }

    fn scopes(&self) -> &ScopeSet {
        &self.spec.scopes
    }

    fn roles(&self) -> &[RoleName] {
        &self.spec.roles
    }

    fn customers(&self) -> &[CustomerId] {
        &self.spec.customers
    }

    fn allowed_cidrs(&self) -> &[IpNet] {
        &self.spec.allowed_cidrs
    }

    fn rate_limits(&self) -> &[RateLimit] {
        &self.spec.rate_limits
    }

    fn quota(&self) -> Option<&Quota> {
        self.spec.quota.as_ref()
    }

    fn expires_at(&self) -> Option<Timestamp> {
        self.spec.expires_at
    }

    fn is_disabled(&self) -> bool {
        self.disabled_at.is_some()
    }

    fn is_revoked(&self) -> bool {
        self.revocation.is_some()
    }

    fn secret_expiries(&self) -> impl Iterator<Item = (u32, Option<Timestamp>)> {
        self.secrets
            .iter()
            .map(|secret| (secret.version, secret_superseded_at(secret.expires_at, self.updated_at)))
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::domain::{name::AccountId, scope::Scope};

    pub(crate) fn at_seconds(seconds: i64) -> Timestamp {
        Timestamp::from_micros(seconds * 1_000_000)
    }

    /// A service key of `acme` in production that may `monitors:read`, made at second 0.
    pub(crate) fn sample_key() -> ApiKey {
        ApiKey {
            id: KeyId::generate(at_seconds(0), [0; 10]),
            owner: KeyOwner::Account(AccountId::parse("acme").unwrap()),
            environment: EnvironmentName::parse("production").unwrap(),
            spec: KeySpec {
                name: None,
                scopes: [Scope::parse_grant("monitors:read").unwrap()].into_iter().collect(),
                roles: vec![],
                expires_at: None,
                customers: vec![],
                allowed_cidrs: vec![],
                rate_limits: vec![],
                quota: None,
                metadata: BTreeMap::new(),
            },
            created_at: at_seconds(0),
            created_by: "system".to_owned(),
            updated_at: at_seconds(0),
            disabled_at: None,
            revocation: None,
            secrets: vec![KeySecret {
                version: 1,
                digest: TokenDigest::from_token("one"),
                hint: "kw_live_1111".to_owned(),
                created_at: at_seconds(0),
                expires_at: None,
            }],
            revision: Revision(1),
        }
    }

    fn revoked_key(key: &ApiKey) -> ApiKey {
        let revocation =
            Revocation { at: at_seconds(1), reason: RevokeReason::Unspecified, comment: String::new() };
        ApiKey { revocation: Some(revocation), ..key.clone() }
    }

    #[test]
    fn the_state_is_the_first_that_holds() {
        let mut key = sample_key();
        assert_eq!(key.state(at_seconds(1)), ApiKeyState::Active);
        key.spec.expires_at = Some(at_seconds(5));
        assert_eq!(key.state(Timestamp::from_micros(4_999_999)), ApiKeyState::Active);
        assert_eq!(key.state(at_seconds(5)), ApiKeyState::Expired, "expired from the very instant on");
        key.disabled_at = Some(at_seconds(1));
        assert_eq!(key.state(at_seconds(5)), ApiKeyState::Disabled);
        assert_eq!(revoked_key(&key).state(at_seconds(5)), ApiKeyState::Revoked);
    }

    #[test]
    fn rotating_without_overlap_ends_the_old_secret_at_once() {
        let mut key = sample_key();
        assert_eq!(
            key.rotate(TokenDigest::from_token("two"), "h2".into(), Duration::ZERO, at_seconds(10)),
            at_seconds(10)
        );
        assert!(key.is_secret_superseded(1, at_seconds(10)));
        assert!(!key.is_secret_superseded(2, at_seconds(10)));
        assert_eq!(key.newest_hint(), "h2");
    }

    #[test]
    fn an_overlap_never_outlives_the_key() {
        let mut key = sample_key();
        key.spec.expires_at = Some(at_seconds(15));
        assert_eq!(
            key.rotate(TokenDigest::from_token("two"), "h2".into(), Duration::from_secs(10), at_seconds(10)),
            at_seconds(15)
        );
    }

    #[test]
    fn a_second_rotation_ends_the_oldest_secret() {
        let mut key = sample_key();
        key.rotate(TokenDigest::from_token("two"), "h2".into(), Duration::from_secs(100), at_seconds(10));
        assert!(!key.is_secret_superseded(1, at_seconds(11)));
        assert!(key.has_overlapping_secret(at_seconds(11)));
        key.rotate(TokenDigest::from_token("three"), "h3".into(), Duration::from_secs(100), at_seconds(12));
        assert!(key.is_secret_superseded(1, at_seconds(12)), "at most two are alive");
        assert!(!key.is_secret_superseded(2, at_seconds(12)));
        assert_eq!(key.secrets.iter().map(|secret| secret.version).collect::<Vec<_>>(), [3, 2]);
        key.finish_rotation(at_seconds(13));
        assert!(key.is_secret_superseded(2, at_seconds(13)));
        assert!(!key.has_overlapping_secret(at_seconds(13)));
    }

    #[test]
    fn what_takes_something_away_narrows() {
        let key = sample_key();
        let with = |change: &dyn Fn(&mut ApiKey)| {
            let mut other = key.clone();
            change(&mut other);
            other
        };
        let narrowing: [&dyn Fn(&mut ApiKey); 7] = [
            &|k| k.disabled_at = Some(at_seconds(1)),
            &|k| k.spec.expires_at = Some(at_seconds(9)),
            &|k| k.spec.scopes = [Scope::parse_grant("monitors:write").unwrap()].into_iter().collect(),
            &|k| k.spec.customers = vec![CustomerId::parse("c1").unwrap()],
            &|k| k.spec.allowed_cidrs = vec!["10.0.0.0/8".parse().unwrap()],
            &|k| {
                k.rotate(TokenDigest::from_token("two"), "h2".into(), Duration::ZERO, at_seconds(1));
            },
            &|k| k.spec.quota = Some(Quota { limit: 1, period: QuotaPeriod::Day }),
        ];
        for change in narrowing {
            let after = with(change);
            assert!(after.restricts(&key), "{after:?}");
        }
        assert!(revoked_key(&key).restricts(&key));
        let widening: [&dyn Fn(&mut ApiKey); 2] =
            [&|k| k.spec.scopes = [Scope::parse_grant("*").unwrap()].into_iter().collect(), &|k| {
                k.spec.name = Some(KeyName::parse("n").unwrap())
            }];
        for change in widening {
            let after = with(change);
            assert!(!after.restricts(&key), "{after:?}");
        }
        assert!(!key.restricts(&with(narrowing[3])), "taking a restriction away is widening");
    }
}
