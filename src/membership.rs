//! The use cases of roles and account members.
//!
//! Invariant: both carry scopes, so no caller grants through them what it does not hold, neither by changing a role nor
//! by assigning one.

use std::sync::Arc;

use crate::{
    caller::{Authorization, Caller, MAX_AUTHORIZATION_ATTEMPTS},
    clock::Clock,
    domain::{
        account::{AccountMember, Role},
        log::{AuditAction, RecordChange},
        name::{AccountId, RoleName, UserId},
        scope::ScopeSet,
        time::Revision,
    },
    engine::Engine,
    keys::KeyOperations,
    replication::propagation::ChangeEffect,
    service_error::{ResourceKind, ServiceError},
    store::{
        Store, WriteOutcome, WriteRejection, WriteRequest,
        group_commit::{CommitHandle, WriteError},
    },
};

/// The effect of replacing a role's scopes. The same scopes again may be a retry.
fn scope_change_effect(after: &ScopeSet, before: &ScopeSet) -> ChangeEffect {
    if after == before {
        ChangeEffect::Restricts { is_repeat: true }
    } else if after.covers_all(before) {
        ChangeEffect::Grants
    } else {
        ChangeEffect::Restricts { is_repeat: false }
    }
}

/// The result of ending a membership.
#[derive(Clone, Copy, Debug)]
pub(crate) struct MembershipEnd {
    /// The revision at which the membership has ended and, if it was the last one, the user's keys are revoked.
    pub(crate) revision: Revision,
    /// Whether this call ended anything. If not, an earlier call with an unknown outcome may have; `revision` covers
    /// that too.
    pub(crate) was_member: bool,
}

/// The use cases of roles and members.
pub(crate) struct MembershipOperations {
    store: Arc<dyn Store>,
    commit_handle: CommitHandle,
    engine: Arc<Engine>,
    keys: Arc<KeyOperations>,
    clock: Arc<dyn Clock>,
}

impl std::fmt::Debug for MembershipOperations {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MembershipOperations").finish_non_exhaustive()
    }
}

impl MembershipOperations {
    #[must_use]
    pub(crate) fn new(
        store: Arc<dyn Store>,
        writer: CommitHandle,
        engine: Arc<Engine>,
        keys: Arc<KeyOperations>,
        clock: Arc<dyn Clock>,
    ) -> Self {
        MembershipOperations { store, commit_handle: writer, engine, keys, clock }
    }

    /// Checks that the account exists for the caller.
    fn check_account_visible(
        &self,
        authorization: &mut Authorization<'_>,
        account: &AccountId,
    ) -> Result<(), ServiceError> {
        authorization.caller.resolve_account(Some(account.clone()))?;
        authorization.account(account).ok_or(ServiceError::NotFound(ResourceKind::Account))?;
        authorization.check_account_visible(account)
    }

    /// Checks that the caller may change roles and members of the account.
    fn check_account_change(
        &self,
        authorization: &mut Authorization<'_>,
        account: &AccountId,
    ) -> Result<(), ServiceError> {
        self.check_account_visible(authorization, account)?;
        authorization.check_acting_user_change(account)
    }

    /// Checks that the caller may change a role. Only operators without an acting user change global roles.
    fn check_role_change(
        &self,
        authorization: &mut Authorization<'_>,
        account: Option<&AccountId>,
    ) -> Result<(), ServiceError> {
        match account {
            Some(account) => self.check_account_change(authorization, account),
            None => authorization
                .caller
                .require_operator()
                .and_then(|()| authorization.caller.require_no_acting_user()),
        }
    }

    /// Checks that the caller could grant and withdraw these scopes in an account.
    fn check_grant(
        &self,
        authorization: &mut Authorization<'_>,
        account: Option<&AccountId>,
        scopes: &ScopeSet,
    ) -> Result<(), ServiceError> {
        authorization.caller.check_grant(scopes)?;
        authorization.check_acting_user_grant(account, scopes)
    }

    /// The recorded state, if a change would leave it as it is.
    fn find_unchanged_record(&self, change: &RecordChange) -> Option<RecordChange> {
        let index = &self.engine.index;
        match change {
            RecordChange::Role(role) => {
                let current = index.role_record(role.account.as_ref(), &role.name)?;
                (current.scopes == role.scopes).then_some(RecordChange::Role(current))
            }
            RecordChange::Member(member) => {
                let current = index.member_record(&member.account, &member.user)?;
                (current.role == member.role).then_some(RecordChange::Member(current))
            }
            _ => None,
        }
    }

    /// Whether a change of an existing record grants nothing.
    fn only_restricts(&self, change: &RecordChange, expect: Option<Revision>) -> bool {
        let index = &self.engine.index;
        match change {
            RecordChange::Role(role) if expect.is_some() => {
                let before = index.role_record(role.account.as_ref(), &role.name);
                before.is_some_and(|before| before.scopes.covers_all(&role.scopes))
            }
            RecordChange::Member(member) if expect.is_some() => {
                let grants = |role: &RoleName| index.recorded_role_scopes(Some(&member.account), role);
                let before = index.member_record(&member.account, &member.user);
                before.is_some_and(|before| grants(&before.role).covers_all(&grants(&member.role)))
            }
            _ => false,
        }
    }

    /// Writes a change that `make` authorizes from the recorded state, and retries if a record has moved. A change
    /// without effect writes nothing.
    async fn commit_change(
        &self,
        caller: &Caller,
        action: AuditAction,
        make: impl Fn(
            &mut Authorization<'_>,
        ) -> Result<(RecordChange, Option<Revision>, ChangeEffect), ServiceError>,
    ) -> Result<(RecordChange, ChangeEffect), ServiceError> {
        for attempt in 0..MAX_AUTHORIZATION_ATTEMPTS {
            let _turn = self.commit_handle.lock_for_change(action, attempt).await;
            let mut authorization = caller.authorize(&self.engine)?;
            let (change, expect, effect) = make(&mut authorization)?;
            if self.find_unchanged_record(&change).is_some() {
                // Another replica may have changed the record since.
                self.commit_handle.wait_caught_up().await?;
                match self.find_unchanged_record(&change) {
                    Some(recorded) => return Ok((recorded, ChangeEffect::Restricts { is_repeat: true })),
                    None => continue,
                }
            }
            let limits = self.keys.limits_for_action(action, self.only_restricts(&change, expect));
            let write =
                WriteRequest { limits, ..authorization.into_write(change, expect, action, self.clock.now()) };
            match self.commit_handle.write(write).await {
                Ok(WriteOutcome::Applied(change)) => return Ok((change, effect)),
                // The index lags behind another replica's change.
                Ok(WriteOutcome::Replayed(_))
                | Err(WriteError::Rejected(
                    WriteRejection::Conflict | WriteRejection::AuthorizationChanged,
                )) => {
                    self.commit_handle.wait_caught_up().await?;
                }
                Err(error) => return Err(error.into()),
            }
        }
        Err(ServiceError::Contended)
    }

    /// Creates a role, or replaces its scopes.
    ///
    /// Fails if the caller could not grant the old or the new scopes, or the account does not exist for it.
    pub(crate) async fn put_role(
        &self,
        caller: &Caller,
        account: Option<AccountId>,
        name: RoleName,
        scopes: ScopeSet,
    ) -> Result<(Arc<Role>, ChangeEffect), ServiceError> {
        let change = self
            .commit_change(caller, AuditAction::RolePut, |authorization| {
                self.check_role_change(authorization, account.as_ref())?;
                authorization.caller.require_unrestricted_key(&self.keys.environments().first().name)?;
                self.check_grant(authorization, account.as_ref(), &scopes)?;
                let before = self.engine.index.role_record(account.as_ref(), &name);
                // The scopes that the name grants so far, possibly by a global role that the new one hides.
                let held = authorization.role_scopes(account.as_ref(), &name);
                self.check_grant(authorization, account.as_ref(), &held)?;
                // The new role may hide a global role of which this process has an older state.
                let new = account.is_some() && before.is_none();
                let effect = if new {
                    ChangeEffect::Restricts { is_repeat: false }
                } else {
                    scope_change_effect(&scopes, &held)
                };
                let (account, name, scopes) = (account.clone(), name.clone(), scopes.clone());
                let role = Role { account, name, scopes, revision: Revision::default() };
                Ok((RecordChange::Role(Arc::new(role)), before.map(|before| before.revision), effect))
            })
            .await?;
        match change {
            (RecordChange::Role(role), effect) => Ok((role, effect)),
            _ => Err(ServiceError::Unavailable),
        }
    }

    /// Deletes a role that nothing uses.
    ///
    /// Fails if the role does not exist or is in use, or the caller could not grant its scopes.
    pub(crate) async fn delete_role(
        &self,
        caller: &Caller,
        account: Option<AccountId>,
        name: RoleName,
    ) -> Result<Revision, ServiceError> {
        let change = self
            .commit_change(caller, AuditAction::RoleDeleted, |authorization| {
                self.check_role_change(authorization, account.as_ref())?;
                authorization.caller.require_unrestricted_key(&self.keys.environments().first().name)?;
                let before = self.engine.index.role_record(account.as_ref(), &name);
                let before = before.ok_or(ServiceError::NotFound(ResourceKind::Role))?;
                self.check_grant(authorization, account.as_ref(), &before.scopes)?;
                let expect = Some(before.revision);
                Ok((RecordChange::RoleDeleted(before), expect, ChangeEffect::Restricts { is_repeat: false }))
            })
            .await?;
        match change {
            (RecordChange::RoleDeleted(role), _) => Ok(role.revision),
            _ => Err(ServiceError::Unavailable),
        }
    }

    /// Lists the roles of an account with the global ones, or the global ones alone.
    ///
    /// Fails if the account does not exist for the caller, or the store fails.
    pub(crate) async fn list_roles(
        &self,
        caller: &Caller,
        account: Option<AccountId>,
    ) -> Result<Vec<Role>, ServiceError> {
        let may_read = || match &account {
            Some(account) => self.check_account_visible(&mut caller.authorize(&self.engine)?, account),
            None => Ok(()),
        };
        may_read()?;
        let roles = self.store.list_roles(account.as_ref()).await?;
        // An acting user that left meanwhile must read nothing.
        may_read().map(|()| roles)
    }

    /// Makes a user a member, or changes a member's role.
    ///
    /// Fails if the role does not exist, or the caller could not grant the old or the new role.
    pub(crate) async fn put_member(
        &self,
        caller: &Caller,
        account: AccountId,
        user: UserId,
        role: RoleName,
    ) -> Result<(Arc<AccountMember>, ChangeEffect), ServiceError> {
        let change = self
            .commit_change(caller, AuditAction::MemberPut, |authorization| {
                self.check_account_change(authorization, &account)?;
                authorization.caller.require_unrestricted_key(&self.keys.environments().first().name)?;
                let given = authorization.role_scopes(Some(&account), &role);
                self.check_grant(authorization, Some(&account), &given)?;
                let before = self.engine.index.member_record(&account, &user);
                let mut effect = ChangeEffect::Grants;
                if let Some(before) = &before {
                    let held = authorization.role_scopes(Some(&account), &before.role);
                    self.check_grant(authorization, Some(&account), &held)?;
                    effect = scope_change_effect(&given, &held);
                }
                let (account, user, role) = (account.clone(), user.clone(), role.clone());
                let member = AccountMember { account, user, role, revision: Revision::default() };
                Ok((RecordChange::Member(Arc::new(member)), before.map(|before| before.revision), effect))
            })
            .await?;
        match change {
            (RecordChange::Member(member), effect) => Ok((member, effect)),
            _ => Err(ServiceError::Unavailable),
        }
    }

    /// Ends a membership: the user's keys stop working in the account. If an operator's caller ends the last
    /// membership, the user's keys are revoked too. An account's caller cannot revoke keys that work beyond its
    /// account.
    ///
    /// Fails if the change is not recorded, or that is unknown. Repeating the call finishes one that was interrupted before
    /// the keys were revoked.
    pub(crate) async fn remove_member(
        &self,
        caller: &Caller,
        account: AccountId,
        user: UserId,
    ) -> Result<MembershipEnd, ServiceError> {
        let end = |authorization: &mut Authorization<'_>| {
            // A person may always leave.
            match authorization.caller.acting_user.as_ref() == Some(&user) {
                true => self.check_account_visible(authorization, &account)?,
                false => self.check_account_change(authorization, &account)?,
            }
            authorization.caller.require_first_environment(&self.keys.environments().first().name)?;
            let before = self.engine.index.member_record(&account, &user);
            let before = before.ok_or(ServiceError::NotFound(ResourceKind::Member))?;
            let expect = Some(before.revision);
            Ok((RecordChange::MemberRemoved(before), expect, ChangeEffect::Restricts { is_repeat: false }))
        };
        let mut removed = self.commit_change(caller, AuditAction::MemberRemoved, end).await;
        let mut recorded = Revision::default();
        if matches!(removed, Err(ServiceError::NotFound(ResourceKind::Member))) {
            // Another replica may know the member. Also, what an earlier call has ended may not be in force everywhere.
            recorded = self.store.log_head().await?.revision;
            self.commit_handle.wait_applied(recorded).await?;
            removed = self.commit_change(caller, AuditAction::MemberRemoved, end).await;
        }
        let mut revoked = Revision::default();
        let ended = match removed {
            Ok(_) | Err(ServiceError::NotFound(ResourceKind::Member)) => true,
            // The account no longer exists for an acting user that has left.
            Err(ServiceError::NotFound(ResourceKind::Account)) => caller.acting_user.as_ref() == Some(&user),
            Err(_) => false,
        };
        if ended && caller.is_operator() && self.store.list_memberships(&user).await?.is_empty() {
            let (newest, all_revoked) = self.keys.revoke_all_of_user(caller, &user).await?;
            (revoked, recorded) = (newest, recorded.max(all_revoked));
        }
        match removed {
            Ok((RecordChange::MemberRemoved(member), _)) => {
                Ok(MembershipEnd { revision: member.revision.max(recorded), was_member: true })
            }
            Ok(_) => Err(ServiceError::Unavailable),
            Err(ServiceError::NotFound(ResourceKind::Account)) if revoked > Revision::default() => {
                Ok(MembershipEnd { revision: recorded, was_member: true })
            }
            Err(ServiceError::NotFound(ResourceKind::Member)) => {
                Ok(MembershipEnd { revision: recorded, was_member: revoked > Revision::default() })
            }
            Err(error) => Err(error),
        }
    }

    /// Returns a page of members, and the user where the next page starts.
    ///
    /// Fails if the account does not exist for the caller, or the store fails.
    pub(crate) async fn list_members(
        &self,
        caller: &Caller,
        account: &AccountId,
        after: Option<&UserId>,
        size: u32,
    ) -> Result<(Vec<AccountMember>, Option<UserId>), ServiceError> {
        let may_read = || self.check_account_visible(&mut caller.authorize(&self.engine)?, account);
        may_read()?;
        let mut members = self.store.list_members(account, after, size + 1).await?;
        // An acting user that left meanwhile must read nothing.
        may_read()?;
        let more = members.len() > size as usize;
        members.truncate(size as usize);
        let next = members.last().filter(|_| more).map(|last| last.user.clone());
        Ok((members, next))
    }
}
