//! Authorizes a change: evaluates the caller again, and records each role, member, account and key that it looks up in a
//! read set. The change carries the read set into its transaction, which rejects it with
//! [`Rejection::AuthorizationMoved`](crate::store::Rejection) if any record has moved; the use case then authorizes
//! again from the start.
//!
//! A rule about a change looks up roles, members and accounts through [`Authorization`] and nowhere else: so no rule can
//! leave a record out of the read set.

use std::sync::Arc;

use crate::{
    domain::{
        account::{Account, Role},
        key::Owner,
        log::{Action, Change},
        name::{AccountId, RoleName, UserId},
        scope::ScopeSet,
        time::{Revision, Timestamp},
    },
    engine::Engine,
    refusal::{Refusal, Thing},
    store::{ReadSet, Write},
};

use super::{Caller, Proof};

/// How often a change is authorized again after records that it rests on have moved.
pub const ATTEMPTS: u32 = 16;

/// A caller with the read set of what it was judged by.
#[derive(Debug)]
pub struct Authorization<'e> {
    /// The caller as it is now.
    pub caller: Caller,
    engine: &'e Engine,
    reads: ReadSet,
}

impl Caller {
    /// Judges the caller again, and begins an authorization with what that has read. Nothing is charged.
    ///
    /// # Errors
    /// When the caller may not make its call any more, or that cannot be known.
    pub fn authorize<'e>(&self, engine: &'e Engine) -> Result<Authorization<'e>, Refusal> {
        let mut reads = ReadSet::default();
        let caller = match &self.proof {
            Proof::Key(_, digest) => {
                let account = Some(&self.account).filter(|account| **account != AccountId::nowhere());
                let anywhere = self.needs.is_none();
                let judged = engine.rejudge(digest, account, anywhere, self.peer, &mut reads)?;
                let (key, grants) = judged.map_err(|_| Refusal::CallerRevoked)?;
                Caller { proof: Proof::Key(key, *digest), grants, ..self.clone() }
            }
            Proof::Possession(_, digest) => {
                let holder = engine.possessor(digest)?.ok_or(Refusal::CallerRevoked)?;
                Caller { proof: Proof::Possession(holder.key, *digest), ..self.clone() }
            }
            Proof::Certificate(identity) if engine.rejudge_certificate(identity, &mut reads)? => self.clone(),
            Proof::Certificate(_) => return Err(Refusal::CallerRevoked),
        };
        match caller.needs.filter(|permission| !caller.may(*permission)) {
            Some(permission) => Err(Refusal::PermissionMissing(permission.as_str())),
            None => Ok(Authorization { caller, engine, reads }),
        }
    }
}

impl Authorization<'_> {
    /// The role that a name stands for in an account, as it is recorded: its own before the global one.
    pub fn role(&mut self, account: Option<&AccountId>, name: &RoleName) -> Option<Arc<Role>> {
        self.engine.index.read_role(account, name, &mut self.reads)
    }

    /// What a role's name grants in an account, as it is recorded; nothing if there is no such role.
    pub fn scopes_of(&mut self, account: Option<&AccountId>, name: &RoleName) -> ScopeSet {
        self.role(account, name).map(|role| role.scopes.clone()).unwrap_or_default()
    }

    /// An account, as it is recorded.
    pub fn account(&mut self, id: &AccountId) -> Option<Arc<Account>> {
        self.engine.index.read_account(id, &mut self.reads)
    }

    /// What the person that the caller acts for holds in the account that owns a service key. `None` if the caller acts
    /// for nobody, or the key is a user's; `Some(None)` if the person is no member.
    pub fn held_by_person(&mut self, owner: &Owner) -> Option<Option<ScopeSet>> {
        let (user, account) = (self.caller.acting_user.clone()?, owner.account()?);
        Some(self.held_by(account, &user))
    }

    /// Whether the person that the caller acts for may know of an account: only a member may.
    ///
    /// # Errors
    /// When the person is no member. For them the account does not exist.
    pub fn may_know(&mut self, account: &AccountId) -> Result<(), Refusal> {
        let Some(user) = self.caller.acting_user.clone() else { return Ok(()) };
        self.held_by(account, &user).map(drop).ok_or(Refusal::NotFound(Thing::Account))
    }

    /// Whether the person that the caller acts for may change an account: only a member may whose role holds the
    /// permission that the call needs.
    ///
    /// # Errors
    /// When the person is no member, and the account does not exist for them; or when the role lacks the permission.
    pub fn person_may_change(&mut self, account: &AccountId) -> Result<(), Refusal> {
        let Some(user) = self.caller.acting_user.clone() else { return Ok(()) };
        let held = self.held_by(account, &user).ok_or(Refusal::NotFound(Thing::Account))?;
        match self.caller.needs.filter(|permission| !permission.is_in(&held)) {
            None => Ok(()),
            Some(permission) => Err(Refusal::role_lacks(permission.as_str())),
        }
    }

    /// Whether the person that the caller acts for may give or take these scopes in an account: rights over Keyward only
    /// within the person's own role.
    ///
    /// # Errors
    /// When one goes beyond that; the message names it.
    pub fn person_may_grant(
        &mut self,
        account: Option<&AccountId>,
        scopes: &ScopeSet,
    ) -> Result<(), Refusal> {
        let (Some(user), Some(account)) = (self.caller.acting_user.clone(), account) else { return Ok(()) };
        let held = self.held_by(account, &user).unwrap_or_default();
        match scopes.iter().find(|scope| scope.is_reserved() && !held.covers(scope)) {
            None => Ok(()),
            Some(scope) => {
                let message = format!("a scope goes beyond the acting user's role: {scope}");
                Err(Refusal::Forbidden("GRANT_BEYOND_CALLER", message))
            }
        }
    }

    /// A membership or role with a change in doubt gives nothing.
    fn held_by(&mut self, account: &AccountId, user: &UserId) -> Option<ScopeSet> {
        let index = &self.engine.index;
        if let Some(member) = index.read_member(account, user, &mut self.reads) {
            index.read_role(Some(account), &member.role, &mut self.reads);
        }
        let member = index.member(account, user)?;
        let role = index.role(Some(account), &member.role);
        Some(role.map(|role| role.scopes.clone()).unwrap_or_default())
    }

    /// The write of a change that was authorized so.
    #[must_use]
    pub fn write(self, change: Change, expect: Option<Revision>, action: Action, at: Timestamp) -> Write {
        let (actor, method) = (self.caller.actor(), self.caller.method);
        Write {
            change,
            expect,
            action,
            actor,
            method,
            at,
            idempotency: None,
            reads: self.reads,
            limits: None,
        }
    }
}
