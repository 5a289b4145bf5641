//! Authorizes a change: evaluates the caller again, and collects a read set of every role, member, account and key that
//! it looks up.
//!
//! The change carries the read set into its transaction. If any of these records has moved, the transaction rejects the
//! change with [`WriteRejection::AuthorizationChanged`](crate::store::WriteRejection), and the use case authorizes
//! again from the start.
//!
//! Invariant: rules about a change look up roles, members and accounts only through [`Authorization`], so no rule can
//! leave a record out of the read set.

use std::sync::Arc;

use crate::{
    domain::{
        account::{Account, Role},
        key::KeyOwner,
        log::{AuditAction, RecordChange},
        name::{AccountId, RoleName, UserId},
        scope::ScopeSet,
        time::{Revision, Timestamp},
    },
    engine::Engine,
    service_error::{ResourceKind, ServiceError},
    store::{ReadSet, WriteRequest},
};

use super::identity::{Caller, CallerIdentity};

/// Attempts to authorize a change whose read set keeps moving.
pub(crate) const MAX_AUTHORIZATION_ATTEMPTS: u32 = 16;

/// An authorized caller, with the read set of its authorization.
#[derive(Debug)]
pub(crate) struct Authorization<'e> {
    /// The caller, as the current state of the index grants it.
    pub(crate) caller: Caller,
    engine: &'e Engine,
    read_set: ReadSet,
}

impl Caller {
    /// Evaluates the caller again, and starts an authorization with the records that this reads. Charges no limits.
    ///
    /// Fails if the caller may no longer make this call, or the state is too old to decide.
    pub(crate) fn authorize<'e>(&self, engine: &'e Engine) -> Result<Authorization<'e>, ServiceError> {
        let mut reads = ReadSet::default();
        let caller = match &self.identity {
            CallerIdentity::Key(_, digest) => {
                let account = Some(&self.account).filter(|account| **account != AccountId::unspecified());
                let anywhere = self.required_permission.is_none();
                let evaluated =
                    engine.reauthenticate_tracked(digest, account, anywhere, self.peer, &mut reads)?;
                let (key, grants) = evaluated.map_err(|_| ServiceError::CallerRevoked)?;
                Caller { identity: CallerIdentity::Key(key, *digest), granted_scopes: grants, ..self.clone() }
            }
            CallerIdentity::Possession(_, digest) => {
                let holder = engine.find_possessed_key(digest)?.ok_or(ServiceError::CallerRevoked)?;
                Caller { identity: CallerIdentity::Possession(holder.key, *digest), ..self.clone() }
            }
            CallerIdentity::Certificate(identity)
                if engine.is_certificate_account_active_tracked(identity, &mut reads)? =>
            {
                self.clone()
            }
            CallerIdentity::Certificate(_) => return Err(ServiceError::CallerRevoked),
        };
        match caller.required_permission.filter(|permission| !caller.has_permission(*permission)) {
            Some(permission) => Err(ServiceError::MissingPermission(permission.as_str())),
            None => Ok(Authorization { caller, engine, read_set: reads }),
        }
    }
}

impl Authorization<'_> {
    /// The role with this name in an account, as recorded: the account's own role hides the global one.
    pub(crate) fn resolve_role(&mut self, account: Option<&AccountId>, name: &RoleName) -> Option<Arc<Role>> {
        self.engine.index.resolve_role_tracked(account, name, &mut self.read_set)
    }

    /// The scopes that a role's name grants in an account, as recorded; empty if there is no such role.
    pub(crate) fn role_scopes(&mut self, account: Option<&AccountId>, name: &RoleName) -> ScopeSet {
        self.resolve_role(account, name).map(|role| role.scopes.clone()).unwrap_or_default()
    }

    /// The account, as recorded.
    pub(crate) fn account(&mut self, id: &AccountId) -> Option<Arc<Account>> {
        self.engine.index.account_record_tracked(id, &mut self.read_set)
    }

    /// The scopes of the acting user in the account that owns a service key. `None` if there is no acting user, or the
    /// key is a user key; `Some(None)` if the user is no member.
    pub(crate) fn acting_user_scopes(&mut self, owner: &KeyOwner) -> Option<Option<ScopeSet>> {
        let (user, account) = (self.caller.acting_user.clone()?, owner.account()?);
        Some(self.member_scopes(account, &user))
    }

    /// Checks that the acting user, if any, is a member of the account. For others the account does not exist.
    pub(crate) fn check_account_visible(&mut self, account: &AccountId) -> Result<(), ServiceError> {
        let Some(user) = self.caller.acting_user.clone() else { return Ok(()) };
        self.member_scopes(account, &user).map(drop).ok_or(ServiceError::NotFound(ResourceKind::Account))
    }

    /// Checks that the acting user, if any, may change the account: a member whose role holds the permission that the
    /// call requires.
    ///
    /// Fails if the user is no member (then the account does not exist for it), or if the role lacks the permission.
    pub(crate) fn check_acting_user_change(&mut self, account: &AccountId) -> Result<(), ServiceError> {
        let Some(user) = self.caller.acting_user.clone() else { return Ok(()) };
        let held = self.member_scopes(account, &user).ok_or(ServiceError::NotFound(ResourceKind::Account))?;
        match self.caller.required_permission.filter(|permission| !permission.is_granted_by(&held)) {
            None => Ok(()),
            Some(permission) => Err(ServiceError::role_lacks_permission(permission.as_str())),
        }
    }

    /// Checks that the acting user, if any, may grant or withdraw these scopes in an account: reserved scopes only
    /// within the user's own role.
    ///
    /// Fails if a scope exceeds the user's role; the message names it.
    pub(crate) fn check_acting_user_grant(
        &mut self,
        account: Option<&AccountId>,
        scopes: &ScopeSet,
    ) -> Result<(), ServiceError> {
        let (Some(user), Some(account)) = (self.caller.acting_user.clone(), account) else { return Ok(()) };
        let held = self.member_scopes(account, &user).unwrap_or_default();
        match scopes.iter().find(|scope| scope.is_reserved() && !held.covers(scope)) {
            None => Ok(()),
            Some(scope) => {
                let message = format!("a scope goes beyond the acting user's role: {scope}");
                Err(ServiceError::Forbidden("GRANT_BEYOND_CALLER", message))
            }
        }
    }

    /// A membership or role with an uncertain change grants nothing.
    fn member_scopes(&mut self, account: &AccountId, user: &UserId) -> Option<ScopeSet> {
        let index = &self.engine.index;
        if let Some(member) = index.member_record_tracked(account, user, &mut self.read_set) {
            index.resolve_role_tracked(Some(account), &member.role, &mut self.read_set);
        }
        let member = index.member(account, user)?;
        let role = index.resolve_role(Some(account), &member.role);
        Some(role.map(|role| role.scopes.clone()).unwrap_or_default())
    }

    /// The write request of an authorized change.
    #[must_use]
    pub(crate) fn into_write(
        self,
        change: RecordChange,
        expect: Option<Revision>,
        action: AuditAction,
        at: Timestamp,
    ) -> WriteRequest {
        let (actor, method) = (self.caller.actor(), self.caller.method);
        WriteRequest {
            change,
            expected_revision: expect,
            action,
            actor,
            method,
            at,
            idempotency: None,
            read_set: self.read_set,
            limits: None,
        }
    }
}
