//! The attributes of a key that decide a Check, independent of how the key is stored.
//!
//! The store has whole records and the engine only these attributes; the policy is one function of both. Attributes
//! that only management shows do not belong here.

use ipnet::IpNet;

use super::{
    account::KeyOwner,
    limit::{Quota, RateLimit},
    name::{CustomerId, EnvironmentName, RoleName},
    scope::ScopeSet,
    time::Timestamp,
};

/// All attributes of a key that can allow or deny a Check.
pub trait KeyAttributes {
    /// The account or user that owns the key.
    fn owner(&self) -> &KeyOwner;
    /// The one environment in which it works.
    fn environment(&self) -> &EnvironmentName;
    /// Granted scopes.
    fn scopes(&self) -> &ScopeSet;
    /// Granted roles.
    fn roles(&self) -> &[RoleName];
    /// The only customers it serves. None = every customer.
    fn customers(&self) -> &[CustomerId];
    /// The only client networks it serves. None = every address.
    fn allowed_cidrs(&self) -> &[IpNet];
    /// Rate limits. None = unlimited.
    fn rate_limits(&self) -> &[RateLimit];
    /// Quota. None = unlimited.
    fn quota(&self) -> Option<&Quota>;
    /// From this instant it is refused.
    fn expires_at(&self) -> Option<Timestamp>;
    /// Whether it is refused until enabled.
    fn is_disabled(&self) -> bool;
    /// Whether it is refused for ever.
    fn is_revoked(&self) -> bool;
    /// The versions of the secrets in the record, each with the instant from which it is superseded; see [`secret_superseded_at`].
    fn secret_expiries(&self) -> impl Iterator<Item = (u32, Option<Timestamp>)>;

    /// Whether it is past its expiry at `now`. A key is expired from its expiry's very instant on.
    fn is_expired(&self, now: Timestamp) -> bool {
        self.expires_at().is_some_and(|end| now >= end)
    }

    /// Whether the secret with this version is superseded at `now`. Versions that left the record are.
    fn is_secret_superseded(&self, version: u32, now: Timestamp) -> bool {
        let kept = self.secret_expiries().find(|(of, _)| *of == version);
        kept.is_none_or(|(_, end)| end.is_some_and(|end| now >= end))
    }

    /// Whether it has rate limits or a quota.
    fn is_limited(&self) -> bool {
        !self.rate_limits().is_empty() || self.quota().is_some()
    }
}

/// When a secret is superseded.
///
/// A secret that ended with the change of the record, or before, has ended on every replica regardless of its clock. A
/// rotation without overlap waits for propagation and not for a clock.
#[must_use]
pub fn secret_superseded_at(ends: Option<Timestamp>, updated_at: Timestamp) -> Option<Timestamp> {
    ends.map(|end| if end <= updated_at { Timestamp::MIN } else { end })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::domain::{
        key::ApiKey,
        key::tests::{at_seconds, sample_key},
        token::TokenDigest,
    };

    fn rotated(overlap: Duration) -> ApiKey {
        let mut key = sample_key();
        key.rotate(TokenDigest::from_token("two"), String::new(), overlap, at_seconds(100));
        key.updated_at = at_seconds(100);
        key
    }

    #[test]
    fn what_ended_with_the_change_has_ended_on_clocks_that_are_behind_too() {
        let behind = at_seconds(50);
        let key = rotated(Duration::ZERO);
        assert!(key.is_secret_superseded(1, behind) && !key.is_secret_superseded(2, behind));
        let mut finished = rotated(Duration::from_secs(600));
        assert!(!finished.is_secret_superseded(1, at_seconds(200)), "an overlap goes by the clock");
        finished.finish_rotation(at_seconds(300));
        finished.updated_at = at_seconds(300);
        assert!(finished.is_secret_superseded(1, behind));
    }
}
