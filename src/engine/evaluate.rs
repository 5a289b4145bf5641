//! Evaluates a key in an account: collects the records that the decision needs and calls the policy in `domain`.
//!
//! The lease and the limits are not checked here; the engine does both.

use std::sync::Arc;

use crate::domain::{
    account::Role,
    key::KeyOwner,
    key_attributes::KeyAttributes,
    name::AccountId,
    policy_decision::{CheckSubject, MembershipStatus, PolicyDecision, PolicyRequest, Reason, decide},
    time::Timestamp,
    token,
};

use super::{
    check_outcome::{ActingAccount, GrantedScopes},
    index::{FoundKey, Index},
};

/// The records besides the key that a decision needs.
pub(super) struct AccountContext {
    /// Whether the account is suspended; `None` if it does not exist.
    pub(super) suspended: Option<bool>,
    roles: Vec<Arc<Role>>,
    membership: OwnedMembership,
}

/// Like [`MembershipStatus`], but owns the role.
enum OwnedMembership {
    NotAsked,
    None,
    Role(Option<Arc<Role>>),
}

impl AccountContext {
    /// Collects the records for a key: for a service key in its own account, for a user key in the requested one.
    pub(super) fn new(
        index: &Index,
        key: &impl KeyAttributes,
        requested: Option<&AccountId>,
    ) -> AccountContext {
        let account = match key.owner() {
            KeyOwner::Account(account) => Some(account),
            KeyOwner::User(_) => requested,
        };
        let role = |name: &_| index.resolve_role(account, name);
        let member = match (key.owner(), account) {
            (KeyOwner::Account(_), _) => OwnedMembership::NotAsked,
            (KeyOwner::User(user), Some(account)) => index
                .member(account, user)
                .map_or(OwnedMembership::None, |member| OwnedMembership::Role(role(&member.role))),
            (KeyOwner::User(_), None) => OwnedMembership::None,
        };
        AccountContext {
            suspended: account.and_then(|account| index.account_suspension(account)),
            // A key's own roles belong to its owner: for a user key they are global ones, in every account.
            roles: key
                .roles()
                .iter()
                .filter_map(|name| index.resolve_role(key.owner().account(), name))
                .collect(),
            membership: member,
        }
    }

    pub(super) fn subject<'a, K>(&'a self, key: &'a K, secret_version: u32) -> CheckSubject<'a, K> {
        let membership = match &self.membership {
            OwnedMembership::NotAsked => MembershipStatus::NotApplicable,
            OwnedMembership::None => MembershipStatus::NotMember,
            OwnedMembership::Role(role) => MembershipStatus::MemberRole(role.as_deref()),
        };
        let suspended = self.suspended == Some(true);
        CheckSubject { key, secret_version, account_suspended: suspended, roles: &self.roles, membership }
    }

    /// The account that the key acts in, given the requested one.
    pub(super) fn acting_account(
        &self,
        key: &impl KeyAttributes,
        requested: Option<&AccountId>,
    ) -> ActingAccount {
        match (self.suspended, key.owner(), requested) {
            (None, ..) | (_, KeyOwner::User(_), None) => ActingAccount::Missing,
            (Some(_), KeyOwner::Account(_), _) => ActingAccount::KeyOwner,
            (Some(_), KeyOwner::User(_), Some(requested)) => ActingAccount::Requested(requested.clone()),
        }
    }

    pub(super) fn granted_scopes(&self, key: &impl KeyAttributes) -> GrantedScopes {
        let subject = self.subject(key, 0);
        if subject.has_only_direct_grants() {
            GrantedScopes::FromRecord
        } else {
            GrantedScopes::Derived(subject.effective_scopes())
        }
    }
}

/// The reason to deny a token that no key has.
pub(super) fn unknown_token_reason(presented: &str) -> Reason {
    if token::has_wrong_checksum(presented) { Reason::Malformed } else { Reason::Unknown }
}

/// Decides by the key's record and, if a change is uncertain, also by the record that may have
/// replaced it. Both must allow.
pub(super) fn evaluate_key(
    found: &FoundKey,
    context: &AccountContext,
    request: PolicyRequest<'_>,
    now: Timestamp,
) -> PolicyDecision {
    let mut decision = decide(context.subject(&found.key, found.secret_version), request, now);
    if let Some(uncertain_record) = &found.uncertain_record
        && decision.failed_reasons.primary_reason() == Reason::Ok
    {
        decision = decide(context.subject(&**uncertain_record, found.secret_version), request, now);
    }
    if let Some(denial) = found.local_denial {
        decision.failed_reasons.insert_if(denial, true);
    }
    decision
}
