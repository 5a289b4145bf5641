//! The access rules of the key use cases: which keys a caller sees, and what it may do with them.

use crate::{
    caller::{Authorization, Caller, Permission},
    clock::random_bytes,
    domain::{
        key::{ApiKey, KeyOwner, KeySecret, KeySpec},
        name::{EnvironmentName, KeyId, RoleName},
        scope::{Scope, ScopeSet},
        time::{Revision, Timestamp},
    },
    service_error::{InvalidFields, ResourceKind, ServiceError},
    store::StoredKey,
};

use super::{KeyField, KeyOperations, KeyPatch, NewKey, RequestedOwner};

impl Caller {
    /// Rejects a limited key that changes its own limits.
    pub(super) fn check_own_limits_change(&self, key: &ApiKey, patch: &KeyPatch) -> Result<(), ServiceError> {
        let limits = [KeyField::RateLimits, KeyField::Quota];
        let limited = !key.spec.rate_limits.is_empty() || key.spec.quota.is_some();
        if key.id == self.id() && limited && patch.fields.iter().any(|field| limits.contains(field)) {
            let message = "a key cannot change its own limits; use another key";
            return Err(ServiceError::Forbidden("GRANT_BEYOND_CALLER", message.to_owned()));
        }
        Ok(())
    }
}

impl KeyOperations {
    /// Returns the key with this id, if the caller may see it.
    pub(super) async fn find_visible(&self, caller: &Caller, id: KeyId) -> Result<StoredKey, ServiceError> {
        let found = self.store.get_key(id).await?;
        found
            .filter(|stored| caller.can_see_owner(&stored.key.owner))
            .ok_or(ServiceError::NotFound(ResourceKind::Key))
    }

    /// Checks that the caller may read this owner's keys. They do not exist for an acting user outside of the account.
    pub(super) fn check_read(&self, caller: &Caller, owner: &KeyOwner) -> Result<(), ServiceError> {
        let mut authorization = caller.authorize(&self.engine)?;
        match authorization.acting_user_scopes(owner) {
            Some(None) => Err(ServiceError::NotFound(ResourceKind::Key)),
            _ => Ok(()),
        }
    }

    /// Checks that the caller may change this owner's keys. An acting user needs a role in the account that holds
    /// `keyward:keys:write`, and membership to see service keys at all.
    pub(super) fn check_write(
        &self,
        authorization: &mut Authorization<'_>,
        owner: &KeyOwner,
    ) -> Result<(), ServiceError> {
        let Some(held) = authorization.acting_user_scopes(owner) else { return Ok(()) };
        let held = held.ok_or(ServiceError::NotFound(ResourceKind::Key))?;
        let needed = Permission::KeysWrite.as_str();
        if Scope::parse_required(needed).is_ok_and(|scope| held.covers(&scope)) {
            return Ok(());
        }
        Err(ServiceError::role_lacks_permission(needed))
    }

    /// Checks that the caller could grant a key this specification, roles included.
    pub(super) fn check_grant(
        &self,
        authorization: &mut Authorization<'_>,
        owner: &KeyOwner,
        environment: &EnvironmentName,
        spec: &KeySpec,
    ) -> Result<(), ServiceError> {
        let role = |name| authorization.resolve_role(owner.account(), name);
        let roles: Vec<_> = spec.roles.iter().filter_map(role).collect();
        let granted = spec.scopes.iter().chain(roles.iter().flat_map(|role| role.scopes.iter())).cloned();
        let granted: ScopeSet = granted.collect();
        authorization.check_acting_user_grant(owner.account(), &granted)?;
        authorization.caller.check_key_grant(environment, spec, &granted)
    }

    /// Checks that every named role exists for the owner.
    pub(super) fn check_roles_exist(
        &self,
        authorization: &mut Authorization<'_>,
        owner: &KeyOwner,
        roles: &[RoleName],
        field: &str,
    ) -> Result<(), ServiceError> {
        let mut violations = InvalidFields::default();
        for (at, role) in roles.iter().enumerate() {
            let exists = authorization.resolve_role(owner.account(), role).is_some();
            let problem =
                format!("there is no role {:?} here; ListRoles returns the existing ones", role.as_str());
            violations.add_if(!exists, format_args!("{field}[{at}]"), problem);
        }
        violations.into_result()
    }

    /// Checks that an expiry is within the longest life that the owning account allows.
    pub(super) fn check_max_lifetime(
        &self,
        authorization: &mut Authorization<'_>,
        owner: &KeyOwner,
        end: Option<Timestamp>,
        now: Timestamp,
        field: &str,
    ) -> Result<(), ServiceError> {
        let account = owner.account().and_then(|account| authorization.account(account));
        let Some(life) = account.and_then(|account| account.longest_life) else { return Ok(()) };
        if end.is_some_and(|end| end <= now.saturating_add(life)) {
            return Ok(());
        }
        let days = life.as_secs() / 86_400;
        Err(ServiceError::invalid_field(
            field,
            format!("must be given and at most {days} days from now: the account's longest life"),
        ))
    }

    /// Resolves the owner of a new key. An account must exist; a user may be any id.
    pub(super) fn resolve_owner(
        &self,
        authorization: &mut Authorization<'_>,
        named: RequestedOwner,
    ) -> Result<KeyOwner, ServiceError> {
        let caller = &authorization.caller;
        let owner = match named {
            RequestedOwner::User(user) => KeyOwner::User(user),
            RequestedOwner::Account(account) => KeyOwner::Account(caller.resolve_account(Some(account))?),
            RequestedOwner::Unspecified => KeyOwner::Account(caller.resolve_account(None)?),
        };
        match &owner {
            KeyOwner::Account(account) => {
                authorization.account(account).ok_or(ServiceError::NotFound(ResourceKind::Account))?;
                authorization.check_account_visible(account)?;
            }
            KeyOwner::User(_) if caller.can_see_owner(&owner) => {}
            KeyOwner::User(_) => return Err(ServiceError::NotFound(ResourceKind::Key)),
        }
        self.check_write(authorization, &owner)?;
        Ok(owner)
    }

    /// Builds the record of a new key, if the caller may create it.
    pub(super) fn build_key(
        &self,
        authorization: &mut Authorization<'_>,
        new: &NewKey,
        secret: KeySecret,
    ) -> Result<ApiKey, ServiceError> {
        let mut spec = new.spec.clone();
        if spec.scopes.is_empty() && spec.roles.is_empty() {
            let role = self.settings.default_role.clone();
            let role = role.ok_or_else(|| {
                ServiceError::invalid_field("scopes", "at least one scope or role is required")
            })?;
            spec.roles.push(role);
        }
        let owner = self.resolve_owner(authorization, new.owner.clone())?;
        self.check_roles_exist(authorization, &owner, &spec.roles, "roles")?;
        self.check_grant(authorization, &owner, &new.environment.name, &spec)?;
        self.check_max_lifetime(authorization, &owner, spec.expires_at, new.created_at, "expires_at")?;
        Ok(ApiKey {
            id: KeyId::generate(new.created_at, random_bytes(&*self.entropy)?),
            owner,
            environment: new.environment.name.clone(),
            spec,
            created_at: new.created_at,
            created_by: authorization.caller.actor().to_string(),
            updated_at: new.created_at,
            disabled_at: None,
            revocation: None,
            secrets: vec![secret],
            revision: Revision::default(),
        })
    }
}
