//! Which keys exist for a caller, and what it may do with them: what every use case of keys asks first.

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
    /// A limited caller does not lift its own limits.
    pub(super) fn check_own_limits_change(&self, key: &ApiKey, patch: &KeyPatch) -> Result<(), ServiceError> {
        let limits = [KeyField::RateLimits, KeyField::Quota];
        let limited = !key.spec.rate_limits.is_empty() || key.spec.quota.is_some();
        if key.id == self.id() && limited && patch.fields.iter().any(|field| limits.contains(field)) {
            let message = "a key does not change its own limits; another one must";
            return Err(ServiceError::Forbidden("GRANT_BEYOND_CALLER", message.to_owned()));
        }
        Ok(())
    }
}

impl KeyOperations {
    /// The key with this id, if it exists for the caller.
    pub(super) async fn find_visible(&self, caller: &Caller, id: KeyId) -> Result<StoredKey, ServiceError> {
        let found = self.store.get_key(id).await?;
        found
            .filter(|stored| caller.can_see_owner(&stored.key.owner))
            .ok_or(ServiceError::NotFound(ResourceKind::Key))
    }

    /// Whether the caller may read this owner's keys. For a person who is no member of the account they do not
    /// exist.
    pub(super) fn check_read(&self, caller: &Caller, owner: &KeyOwner) -> Result<(), ServiceError> {
        let mut asked = caller.authorize(&self.engine)?;
        match asked.acting_user_scopes(owner) {
            Some(None) => Err(ServiceError::NotFound(ResourceKind::Key)),
            _ => Ok(()),
        }
    }

    /// Whether the caller may change this owner's keys. A person changes service keys only with a role that
    /// holds `keyward:keys:write` in their account. For a person who is no member of the account they do not exist.
    pub(super) fn check_write(
        &self,
        asked: &mut Authorization<'_>,
        owner: &KeyOwner,
    ) -> Result<(), ServiceError> {
        let Some(held) = asked.acting_user_scopes(owner) else { return Ok(()) };
        let held = held.ok_or(ServiceError::NotFound(ResourceKind::Key))?;
        let needed = Permission::KeysWrite.as_str();
        if Scope::parse_required(needed).is_ok_and(|scope| held.covers(&scope)) {
            return Ok(());
        }
        Err(ServiceError::role_lacks_permission(needed))
    }

    /// Whether the caller could give a key these terms, roles included.
    pub(super) fn check_grant(
        &self,
        asked: &mut Authorization<'_>,
        owner: &KeyOwner,
        environment: &EnvironmentName,
        terms: &KeySpec,
    ) -> Result<(), ServiceError> {
        let role = |name| asked.resolve_role(owner.account(), name);
        let roles: Vec<_> = terms.roles.iter().filter_map(role).collect();
        let granted = terms.scopes.iter().chain(roles.iter().flat_map(|role| role.scopes.iter())).cloned();
        let granted: ScopeSet = granted.collect();
        asked.check_acting_user_grant(owner.account(), &granted)?;
        asked.caller.check_key_grant(environment, terms, &granted)
    }

    /// Whether every role that a key is to have stands for its owner.
    pub(super) fn check_roles_exist(
        &self,
        asked: &mut Authorization<'_>,
        owner: &KeyOwner,
        roles: &[RoleName],
        field: &str,
    ) -> Result<(), ServiceError> {
        let mut violations = InvalidFields::default();
        for (at, role) in roles.iter().enumerate() {
            let known = asked.resolve_role(owner.account(), role).is_some();
            let problem =
                format!("there is no role {:?} here; ListRoles shows those there are", role.as_str());
            violations.add_if(!known, format_args!("{field}[{at}]"), problem);
        }
        violations.into_result()
    }

    /// Whether an expiry keeps within the longest life that the owning account allows.
    pub(super) fn check_max_lifetime(
        &self,
        asked: &mut Authorization<'_>,
        owner: &KeyOwner,
        end: Option<Timestamp>,
        now: Timestamp,
        field: &str,
    ) -> Result<(), ServiceError> {
        let account = owner.account().and_then(|account| asked.account(account));
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

    /// Who a new key is for. An account must exist; a user is whoever it is.
    pub(super) fn resolve_owner(
        &self,
        asked: &mut Authorization<'_>,
        named: RequestedOwner,
    ) -> Result<KeyOwner, ServiceError> {
        let caller = &asked.caller;
        let owner = match named {
            RequestedOwner::User(user) => KeyOwner::User(user),
            RequestedOwner::Account(account) => KeyOwner::Account(caller.resolve_account(Some(account))?),
            RequestedOwner::Unspecified => KeyOwner::Account(caller.resolve_account(None)?),
        };
        match &owner {
            KeyOwner::Account(account) => {
                asked.account(account).ok_or(ServiceError::NotFound(ResourceKind::Account))?;
                asked.check_account_visible(account)?;
            }
            KeyOwner::User(_) if caller.can_see_owner(&owner) => {}
            KeyOwner::User(_) => return Err(ServiceError::NotFound(ResourceKind::Key)),
        }
        self.check_write(asked, &owner)?;
        Ok(owner)
    }

    /// A new key's record, once the caller may make it.
    pub(super) fn build_key(
        &self,
        asked: &mut Authorization<'_>,
        new: &NewKey,
        secret: KeySecret,
    ) -> Result<ApiKey, ServiceError> {
        let mut terms = new.spec.clone();
        if terms.scopes.is_empty() && terms.roles.is_empty() {
            let role = self.settings.default_role.clone();
            let role = role.ok_or_else(|| {
                ServiceError::invalid_field("scopes", "at least one scope or role is required")
            })?;
            terms.roles.push(role);
        }
        let owner = self.resolve_owner(asked, new.owner.clone())?;
        self.check_roles_exist(asked, &owner, &terms.roles, "roles")?;
        self.check_grant(asked, &owner, &new.environment.name, &terms)?;
        self.check_max_lifetime(asked, &owner, terms.expires_at, new.created_at, "expires_at")?;
        Ok(ApiKey {
            id: KeyId::generate(new.created_at, random_bytes(&*self.entropy)?),
            owner,
            environment: new.environment.name.clone(),
            spec: terms,
            created_at: new.created_at,
            created_by: asked.caller.actor().to_string(),
            updated_at: new.created_at,
            disabled_at: None,
            revocation: None,
            secrets: vec![secret],
            revision: Revision::default(),
        })
    }
}
