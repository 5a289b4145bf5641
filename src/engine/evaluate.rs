//! Evaluates a key in an account: collects the records that the decision needs, and calls the policy in `domain`.
//!
//! Nothing here checks the lease or the limits; the engine does.

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

/// What a decision needs besides the key.
pub(super) struct AccountContext {
    /// Whether the account is. None = there is no such account.
    pub(super) suspended: Option<bool>,
    roles: Vec<Arc<Role>>,
    membership: OwnedMembership,
}

/// [`MembershipStatus`], owned.
enum OwnedMembership {
    NotAsked,
    None,
    Role(Option<Arc<Role>>),
}

impl AccountContext {
    /// Where a key is decided: a service key in its account, a user key in the account asked for.
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
            // A key's own roles are its owner's: of a user key, global ones, wherever it works.
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

    /// Where the key acts; `asked`: the account that was asked about.
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

/// Why a token that nobody has is denied.
pub(super) fn unknown_token_reason(presented: &str) -> Reason {
    if token::has_wrong_checksum(presented) { Reason::Malformed } else { Reason::Unknown }
}

/// Decides by the record, and by the record that may be in its place: what either refuses is refused.
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
