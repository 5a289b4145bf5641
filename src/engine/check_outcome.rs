//! The outcome of a Check: the reasons, the matching key, and what it is granted.
//!
//! How the outcome looks on the wire is in `grpc`.

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
    /// The key as it was when it was found.
    pub key: KeyRef,
    /// The version of the presented secret.
    pub secret_version: u32,
}

/// The account that a key was evaluated in.
#[derive(Clone, Debug)]
pub(crate) enum ActingAccount {
    /// No account, or none that exists.
    Missing,
    /// The account that owns the key.
    KeyOwner,
    /// The account that was requested for a user key.
    Requested(AccountId),
}

/// The scopes that a key was granted; not copied if they are just those of its record.
#[derive(Clone, Debug)]
pub(crate) enum GrantedScopes {
    /// The scopes in the key's record.
    FromRecord,
    /// The union of its record, its roles and its membership.
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

/// The outcome of a Check.
#[derive(Clone, Debug)]
pub struct CheckOutcome {
    /// Every reason to deny. Empty: allowed.
    pub failures: ReasonSet,
    /// The required scopes that the key is not granted.
    pub missing_scopes: Vec<Scope>,
    /// The key, if the requester's account may know it.
    pub key_match: Option<KeyMatch>,
    pub(crate) acting_account: ActingAccount,
    pub(crate) granted_scopes: GrantedScopes,
    /// The key was refused because it may call Keyward itself.
    pub is_refused_management_key: bool,
    pub(crate) limits: Option<Box<LimitOutcome>>,
    /// The applied revision; the outcome may rest on newer records.
    pub revision: Revision,
    /// The maximum age of the state that the outcome rests on.
    pub staleness: Duration,
}

impl CheckOutcome {
    /// The primary reason, or `Ok` if the Check is allowed.
    #[must_use]
    pub fn reason(&self) -> Reason {
        self.failures.primary_reason()
    }

    /// The account that the key was evaluated in, if it exists.
    #[must_use]
    pub fn acting_account_id(&self) -> Option<&AccountId> {
        match &self.acting_account {
            ActingAccount::Missing => None,
            ActingAccount::KeyOwner => self.key_match.as_ref()?.key.owner().account(),
            ActingAccount::Requested(account) => Some(account),
        }
    }

    /// The scopes that the key is granted there; empty if no key matched.
    pub fn granted_scopes(&self) -> impl Iterator<Item = &Scope> {
        self.key_match.iter().flat_map(|key_match| self.granted_scopes.scopes(&key_match.key))
    }

    /// The outcome of each limit; empty if the limits were not consumed.
    #[must_use]
    pub fn limits(&self) -> &LimitOutcome {
        self.limits.as_deref().unwrap_or(const { &LimitOutcome::empty() })
    }

    /// Records the outcome in the span of the calling RPC.
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
