//! What a Check returns: the reasons, the key that was found, and what it is granted.

use std::time::Duration;

use crate::domain::{
    key_attributes::KeyAttributes as _,
    name::AccountId,
    policy_decision::{Reason, ReasonSet},
    scope::{Scope, ScopeSet},
    time::Revision,
};

use super::{index::KeyRef, limit_outcome::LimitOutcome};

/// The key that a presented token belongs to.
#[derive(Clone, Debug)]
pub struct KeyMatch {
    /// The key.
    pub key: KeyRef,
    /// Which version of its secret was presented.
    pub secret_version: u32,
}

/// Where a key was decided.
#[derive(Clone, Debug)]
pub(crate) enum ActingAccount {
    /// In no account that exists.
    Missing,
    /// In its own.
    KeyOwner,
    /// A user's key, in this one.
    Requested(AccountId),
}

/// What a key was granted where it was decided. What stands in its record is not counted as held here too.
#[derive(Clone, Debug)]
pub(crate) enum GrantedScopes {
    /// What its record says.
    FromRecord,
    /// What comes of its record, of roles, and of a member's place.
    Derived(ScopeSet),
}

impl GrantedScopes {
    pub(super) fn scopes<'a>(&'a self, key: &'a KeyRef) -> &'a ScopeSet {
        match self {
            GrantedScopes::FromRecord => key.scopes(),
            GrantedScopes::Derived(scopes) => scopes,
        }
    }
}

/// What a Check answers.
#[derive(Clone, Debug)]
pub struct CheckOutcome {
    /// Everything that failed. Empty = allowed.
    pub failures: ReasonSet,
    /// The needed scopes that are not granted.
    pub missing_scopes: Vec<Scope>,
    /// The key, where the token is known to the caller's account.
    pub key_match: Option<KeyMatch>,
    pub(crate) acting_account: ActingAccount,
    pub(crate) granted_scopes: GrantedScopes,
    /// Refused, whatever else it is, since the key may call Keyward itself.
    pub is_refused_management_key: bool,
    pub(crate) limits: Option<Box<LimitOutcome>>,
    /// The answer is from a state at least as new.
    pub revision: Revision,
    /// How old that state can be.
    pub staleness: Duration,
}

impl CheckOutcome {
    /// The first reason, or `Ok`.
    #[must_use]
    pub fn reason(&self) -> Reason {
        self.failures.primary_reason()
    }

    /// The account that was decided in, if it exists.
    #[must_use]
    pub fn acting_account_id(&self) -> Option<&AccountId> {
        match &self.acting_account {
            ActingAccount::Missing => None,
            ActingAccount::KeyOwner => self.key_match.as_ref()?.key.owner().account(),
            ActingAccount::Requested(account) => Some(account),
        }
    }

    /// What the key is granted there. Nothing, where no key was found.
    pub fn granted_scopes(&self) -> impl Iterator<Item = &Scope> {
        self.key_match.iter().flat_map(|key_match| self.granted_scopes.scopes(&key_match.key))
    }

    /// How its limits stand, where they were asked.
    #[must_use]
    pub fn limits(&self) -> &LimitOutcome {
        self.limits.as_deref().unwrap_or(const { &LimitOutcome::empty() })
    }

    /// Records what was decided in the span of the call that asked.
    pub fn record_in_span(&self, span: &tracing::Span) {
        span.record("keyward.reason", self.reason().as_str());
        span.record("keyward.revision", self.revision.0);
        if let Some(key_match) = &self.key_match {
            span.record("keyward.key_id", tracing::field::display(key_match.key.id()));
        }
        if let Some(account) = self.acting_account_id() {
            span.record("keyward.account", account.as_str());
        }
    }

    pub(crate) fn from_reason(reason: Reason, revision: Revision) -> CheckOutcome {
        let mut failures = ReasonSet::default();
        failures.insert_if(reason, reason != Reason::Ok);
        CheckOutcome {
            failures,
            missing_scopes: Vec::new(),
            key_match: None,
            acting_account: ActingAccount::Missing,
            granted_scopes: GrantedScopes::FromRecord,
            is_refused_management_key: false,
            limits: None,
            revision,
            staleness: Duration::ZERO,
        }
    }
}
