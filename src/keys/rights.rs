//! Which keys exist for a caller, and what it may do with them: what every use case of keys asks first.

use crate::{
    access::{Authorization, Caller, Permission},
    clock::random,
    domain::{
        key::{Key, Owner, Secret, Terms},
        name::{EnvironmentName, KeyId, RoleName},
        scope::{Scope, ScopeSet},
        time::{Revision, Timestamp},
    },
    refusal::{Refusal, Thing, Violations},
    store::StoredKey,
};

use super::{Field, Keys, NewKey, OwnerNamed, Patch};

impl Caller {
    /// A limited caller does not lift its own limits.
    pub(super) fn may_change_limits_of(&self, key: &Key, patch: &Patch) -> Result<(), Refusal> {
        let limits = [Field::RateLimits, Field::Quota];
        let limited = !key.terms.rate_limits.is_empty() || key.terms.quota.is_some();
        if key.id == self.id() && limited && patch.fields.iter().any(|field| limits.contains(field)) {
            let message = "a key does not change its own limits; another one must";
            return Err(Refusal::Forbidden("GRANT_BEYOND_CALLER", message.to_owned()));
        }
        Ok(())
    }
}

impl Keys {
    /// The key with this id, if it exists for the caller.
    pub(super) async fn visible(&self, caller: &Caller, id: KeyId) -> Result<StoredKey, Refusal> {
        let found = self.store.key(id).await?;
        found.filter(|stored| caller.sees(&stored.key.owner)).ok_or(Refusal::NotFound(Thing::Key))
    }

    /// Whether the caller may read this owner's keys. For a person who is no member of the account they do not
    /// exist.
    pub(super) fn may_read(&self, caller: &Caller, owner: &Owner) -> Result<(), Refusal> {
        let mut asked = caller.authorize(&self.engine)?;
        match asked.held_by_person(owner) {
            Some(None) => Err(Refusal::NotFound(Thing::Key)),
            _ => Ok(()),
        }
    }

    /// Whether the caller may change this owner's keys. A person changes service keys only with a role that
    /// holds `keyward:keys:write` in their account. For a person who is no member of the account they do not exist.
    pub(super) fn may_write(&self, asked: &mut Authorization<'_>, owner: &Owner) -> Result<(), Refusal> {
        let Some(held) = asked.held_by_person(owner) else { return Ok(()) };
        let held = held.ok_or(Refusal::NotFound(Thing::Key))?;
        let needed = Permission::KeysWrite.as_str();
        if Scope::parse_required(needed).is_ok_and(|scope| held.covers(&scope)) {
            return Ok(());
        }
        Err(Refusal::role_lacks(needed))
    }

    /// Whether the caller could give a key these terms, roles included.
    pub(super) fn may_give(
        &self,
        asked: &mut Authorization<'_>,
        owner: &Owner,
        environment: &EnvironmentName,
        terms: &Terms,
    ) -> Result<(), Refusal> {
        let role = |name| asked.role(owner.account(), name);
        let roles: Vec<_> = terms.roles.iter().filter_map(role).collect();
        let granted = terms.scopes.iter().chain(roles.iter().flat_map(|role| role.scopes.iter())).cloned();
        let granted: ScopeSet = granted.collect();
        asked.person_may_grant(owner.account(), &granted)?;
        asked.caller.may_give(environment, terms, &granted)
    }

    /// Whether every role that a key is to have stands for its owner.
    pub(super) fn roles_exist(
        &self,
        asked: &mut Authorization<'_>,
        owner: &Owner,
        roles: &[RoleName],
        field: &str,
    ) -> Result<(), Refusal> {
        let mut violations = Violations::default();
        for (at, role) in roles.iter().enumerate() {
            let known = asked.role(owner.account(), role).is_some();
            let problem =
                format!("there is no role {:?} here; ListRoles shows those there are", role.as_str());
            violations.note_if(!known, format_args!("{field}[{at}]"), problem);
        }
        violations.finish()
    }

    /// Whether an expiry keeps within the longest life that the owning account allows.
    pub(super) fn keeps_longest_life(
        &self,
        asked: &mut Authorization<'_>,
        owner: &Owner,
        end: Option<Timestamp>,
        now: Timestamp,
        field: &str,
    ) -> Result<(), Refusal> {
        let account = owner.account().and_then(|account| asked.account(account));
        let Some(life) = account.and_then(|account| account.longest_life) else { return Ok(()) };
        if end.is_some_and(|end| end <= now.plus(life)) {
            return Ok(());
        }
        let days = life.as_secs() / 86_400;
        Err(Refusal::field(
            field,
            format!("must be given and at most {days} days from now: the account's longest life"),
        ))
    }

    /// Who a new key is for. An account must exist; a user is whoever it is.
    pub(super) fn owner_meant(
        &self,
        asked: &mut Authorization<'_>,
        named: OwnerNamed,
    ) -> Result<Owner, Refusal> {
        let caller = &asked.caller;
        let owner = match named {
            OwnerNamed::User(user) => Owner::User(user),
            OwnerNamed::Account(account) => Owner::Account(caller.account_meant(Some(account))?),
            OwnerNamed::Nobody => Owner::Account(caller.account_meant(None)?),
        };
        match &owner {
            Owner::Account(account) => {
                asked.account(account).ok_or(Refusal::NotFound(Thing::Account))?;
                asked.may_know(account)?;
            }
            Owner::User(_) if caller.sees(&owner) => {}
            Owner::User(_) => return Err(Refusal::NotFound(Thing::Key)),
        }
        self.may_write(asked, &owner)?;
        Ok(owner)
    }

    /// A new key's record, once the caller may make it.
    pub(super) fn new_key(
        &self,
        asked: &mut Authorization<'_>,
        new: &NewKey,
        secret: Secret,
    ) -> Result<Key, Refusal> {
        let mut terms = new.terms.clone();
        if terms.scopes.is_empty() && terms.roles.is_empty() {
            let role = self.settings.default_role.clone();
            let role =
                role.ok_or_else(|| Refusal::field("scopes", "at least one scope or role is required"))?;
            terms.roles.push(role);
        }
        let owner = self.owner_meant(asked, new.owner.clone())?;
        self.roles_exist(asked, &owner, &terms.roles, "roles")?;
        self.may_give(asked, &owner, &new.environment.name, &terms)?;
        self.keeps_longest_life(asked, &owner, terms.expires_at, new.now, "expires_at")?;
        Ok(Key {
            id: KeyId::generate(new.now, random(&*self.entropy)?),
            owner,
            environment: new.environment.name.clone(),
            terms,
            created_at: new.now,
            created_by: asked.caller.actor().to_string(),
            updated_at: new.now,
            disabled_at: None,
            revocation: None,
            secrets: vec![secret],
            revision: Revision::default(),
        })
    }
}
