//! What can be done with roles and members. Both carry rights, so nobody gives through them what they do not
//! hold: neither by making a role, nor by giving one to a member.

use std::sync::Arc;

use crate::{
    access::{ATTEMPTS, Authorization, Caller},
    clock::Clock,
    domain::{
        account::{Member, Role},
        log::{Action, Change},
        name::{AccountId, RoleName, UserId},
        scope::ScopeSet,
        time::Revision,
    },
    engine::Engine,
    keys::Keys,
    refusal::{Refusal, Thing},
    replication::propagation::Reach,
    store::{
        Outcome, Rejection, Store, Write,
        writer::{WriteError, Writer},
    },
};

/// What other scopes take away. The same once more may be a call that is made again.
fn reach(after: &ScopeSet, before: &ScopeSet) -> Reach {
    if after == before {
        Reach::Narrows { again: true }
    } else if after.covers_all(before) {
        Reach::Widens
    } else {
        Reach::Narrows { again: false }
    }
}

/// What ending a membership came to.
#[derive(Clone, Copy, Debug)]
pub struct Removed {
    /// The revision by which it has ended, and by which the user's keys are revoked where it was the last one.
    pub revision: Revision,
    /// Whether this call ended anything. If not, an earlier one may have, whose outcome was unknown: its revision is waited
    /// for too.
    pub was_member: bool,
}

/// The use cases of roles and members.
pub struct People {
    store: Arc<dyn Store>,
    writer: Writer,
    engine: Arc<Engine>,
    keys: Arc<Keys>,
    clock: Arc<dyn Clock>,
}

impl std::fmt::Debug for People {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("People").finish_non_exhaustive()
    }
}

impl People {
    /// The use cases over a store, its writer and the engine that follows it.
    #[must_use]
    pub fn new(
        store: Arc<dyn Store>,
        writer: Writer,
        engine: Arc<Engine>,
        keys: Arc<Keys>,
        clock: Arc<dyn Clock>,
    ) -> Self {
        People { store, writer, engine, keys, clock }
    }

    /// Whether the caller acts on the account, and it exists for the caller.
    fn account(&self, asked: &mut Authorization<'_>, account: &AccountId) -> Result<(), Refusal> {
        asked.caller.account_meant(Some(account.clone()))?;
        asked.account(account).ok_or(Refusal::NotFound(Thing::Account))?;
        asked.may_know(account)
    }

    /// Whether the caller may change roles and members of the account.
    fn account_to_change(&self, asked: &mut Authorization<'_>, account: &AccountId) -> Result<(), Refusal> {
        self.account(asked, account)?;
        asked.person_may_change(account)
    }

    /// Global roles are made and changed by operators, for themselves.
    fn role_home(&self, asked: &mut Authorization<'_>, account: Option<&AccountId>) -> Result<(), Refusal> {
        match account {
            Some(account) => self.account_to_change(asked, account),
            None => asked.caller.must_be_operator().and_then(|()| asked.caller.must_act_for_itself()),
        }
    }

    /// Whether the caller could give and take what a role grants in an account.
    fn may_grant(
        &self,
        asked: &mut Authorization<'_>,
        account: Option<&AccountId>,
        scopes: &ScopeSet,
    ) -> Result<(), Refusal> {
        asked.caller.may_grant(scopes)?;
        asked.person_may_grant(account, scopes)
    }

    /// The record, if a change would leave it as it is.
    fn as_recorded(&self, change: &Change) -> Option<Change> {
        let index = &self.engine.index;
        match change {
            Change::Role(role) => {
                let known = index.role_record(role.account.as_ref(), &role.name)?;
                (known.scopes == role.scopes).then_some(Change::Role(known))
            }
            Change::Member(member) => {
                let known = index.member_record(&member.account, &member.user)?;
                (known.role == member.role).then_some(Change::Member(known))
            }
            _ => None,
        }
    }

    /// Whether a change of what is there gives nothing.
    fn only_takes(&self, change: &Change, expect: Option<Revision>) -> bool {
        let index = &self.engine.index;
        match change {
            Change::Role(role) if expect.is_some() => {
                let before = index.role_record(role.account.as_ref(), &role.name);
                before.is_some_and(|before| before.scopes.covers_all(&role.scopes))
            }
            Change::Member(member) if expect.is_some() => {
                let grants = |role: &RoleName| index.granted_by(Some(&member.account), role);
                let before = index.member_record(&member.account, &member.user);
                before.is_some_and(|before| grants(&before.role).covers_all(&grants(&member.role)))
            }
            _ => false,
        }
    }

    /// Writes a change that `make` authorizes from the current record, and retries if a record has moved. A change that
    /// leaves the record as it is writes nothing.
    async fn change(
        &self,
        caller: &Caller,
        action: Action,
        make: impl Fn(&mut Authorization<'_>) -> Result<(Change, Option<Revision>, Reach), Refusal>,
    ) -> Result<(Change, Reach), Refusal> {
        for attempt in 0..ATTEMPTS {
            let _turn = self.writer.turn(action, attempt).await;
            let mut asked = caller.authorize(&self.engine)?;
            let (change, expect, reach) = make(&mut asked)?;
            if self.as_recorded(&change).is_some() {
                // Another replica may have changed it since.
                self.writer.caught_up().await?;
                match self.as_recorded(&change) {
                    Some(recorded) => return Ok((recorded, Reach::Narrows { again: true })),
                    None => continue,
                }
            }
            let limits = self.keys.limits_of(action, self.only_takes(&change, expect));
            let write = Write { limits, ..asked.write(change, expect, action, self.clock.now()) };
            match self.writer.write(write).await {
                Ok(Outcome::Applied(change)) => return Ok((change, reach)),
                // The index does not know yet of what another replica has changed.
                Ok(Outcome::Replayed(_))
                | Err(WriteError::Rejected(Rejection::Conflict | Rejection::AuthorizationMoved)) => {
                    self.writer.caught_up().await?;
                }
                Err(error) => return Err(error.into()),
            }
        }
        Err(Refusal::Contended)
    }

    /// Makes a role, or changes what it grants.
    ///
    /// # Errors
    /// When the caller could not grant its scopes, old or new, or the account does not exist for it.
    pub async fn put_role(
        &self,
        caller: &Caller,
        account: Option<AccountId>,
        name: RoleName,
        scopes: ScopeSet,
    ) -> Result<(Arc<Role>, Reach), Refusal> {
        let change = self
            .change(caller, Action::RolePut, |asked| {
                self.role_home(asked, account.as_ref())?;
                asked.caller.must_be_unbound(&self.keys.environments().first().name)?;
                self.may_grant(asked, account.as_ref(), &scopes)?;
                let before = self.engine.index.role_record(account.as_ref(), &name);
                // What the name grants so far, possibly by a global role that this one hides.
                let held = asked.scopes_of(account.as_ref(), &name);
                self.may_grant(asked, account.as_ref(), &held)?;
                // A new one may stand before a global one that this process knows an older state of.
                let new = account.is_some() && before.is_none();
                let reach = if new { Reach::Narrows { again: false } } else { reach(&scopes, &held) };
                let (account, name, scopes) = (account.clone(), name.clone(), scopes.clone());
                let role = Role { account, name, scopes, revision: Revision::default() };
                Ok((Change::Role(Arc::new(role)), before.map(|before| before.revision), reach))
            })
            .await?;
        match change {
            (Change::Role(role), reach) => Ok((role, reach)),
            _ => Err(Refusal::Unavailable),
        }
    }

    /// Deletes a role that nothing uses.
    ///
    /// # Errors
    /// When there is none, it is in use, or the caller could not grant its scopes.
    pub async fn delete_role(
        &self,
        caller: &Caller,
        account: Option<AccountId>,
        name: RoleName,
    ) -> Result<Revision, Refusal> {
        let change = self
            .change(caller, Action::RoleDeleted, |asked| {
                self.role_home(asked, account.as_ref())?;
                asked.caller.must_be_unbound(&self.keys.environments().first().name)?;
                let before = self.engine.index.role_record(account.as_ref(), &name);
                let before = before.ok_or(Refusal::NotFound(Thing::Role))?;
                self.may_grant(asked, account.as_ref(), &before.scopes)?;
                let expect = Some(before.revision);
                Ok((Change::RoleDeleted(before), expect, Reach::Narrows { again: false }))
            })
            .await?;
        match change {
            (Change::RoleDeleted(role), _) => Ok(role.revision),
            _ => Err(Refusal::Unavailable),
        }
    }

    /// The roles of an account, global ones included; or the global ones alone.
    ///
    /// # Errors
    /// When the account does not exist for the caller, or the store fails.
    pub async fn list_roles(
        &self,
        caller: &Caller,
        account: Option<AccountId>,
    ) -> Result<Vec<Role>, Refusal> {
        let may_read = || match &account {
            Some(account) => self.account(&mut caller.authorize(&self.engine)?, account),
            None => Ok(()),
        };
        may_read()?;
        let roles = self.store.roles(account.as_ref()).await?;
        // A person who left meanwhile reads nothing.
        may_read().map(|()| roles)
    }

    /// Makes a user a member, or gives the member another role.
    ///
    /// # Errors
    /// When there is no such role, or the caller could not grant what the old or the new one grants.
    pub async fn put_member(
        &self,
        caller: &Caller,
        account: AccountId,
        user: UserId,
        role: RoleName,
    ) -> Result<(Arc<Member>, Reach), Refusal> {
        let change = self
            .change(caller, Action::MemberPut, |asked| {
                self.account_to_change(asked, &account)?;
                asked.caller.must_be_unbound(&self.keys.environments().first().name)?;
                let given = asked.scopes_of(Some(&account), &role);
                self.may_grant(asked, Some(&account), &given)?;
                let before = self.engine.index.member_record(&account, &user);
                let mut reach = Reach::Widens;
                if let Some(before) = &before {
                    let held = asked.scopes_of(Some(&account), &before.role);
                    self.may_grant(asked, Some(&account), &held)?;
                    reach = self::reach(&given, &held);
                }
                let (account, user, role) = (account.clone(), user.clone(), role.clone());
                let member = Member { account, user, role, revision: Revision::default() };
                Ok((Change::Member(Arc::new(member)), before.map(|before| before.revision), reach))
            })
            .await?;
        match change {
            (Change::Member(member), reach) => Ok((member, reach)),
            _ => Err(Refusal::Unavailable),
        }
    }

    /// Ends a membership: the user's keys stop working in the account. When an operator's caller ends the last
    /// one they are revoked too; an account's caller has no say over keys that reach beyond its account.
    ///
    /// # Errors
    /// When the change is not recorded, or some of it may be. A call that was cut short between ending the last membership
    /// and revoking the keys is finished by the same call again.
    pub async fn remove_member(
        &self,
        caller: &Caller,
        account: AccountId,
        user: UserId,
    ) -> Result<Removed, Refusal> {
        let end = |asked: &mut Authorization<'_>| {
            // Each person may leave.
            match asked.caller.acting_user.as_ref() == Some(&user) {
                true => self.account(asked, &account)?,
                false => self.account_to_change(asked, &account)?,
            }
            asked.caller.reaches_every_environment(&self.keys.environments().first().name)?;
            let before = self.engine.index.member_record(&account, &user);
            let before = before.ok_or(Refusal::NotFound(Thing::Member))?;
            let expect = Some(before.revision);
            Ok((Change::MemberRemoved(before), expect, Reach::Narrows { again: false }))
        };
        let mut removed = self.change(caller, Action::MemberRemoved, end).await;
        let mut recorded = Revision::default();
        if matches!(removed, Err(Refusal::NotFound(Thing::Member))) {
            // Another replica may know of it; and what an earlier call has ended may not be in force everywhere.
            recorded = self.store.head().await?.revision;
            self.writer.applied(recorded).await?;
            removed = self.change(caller, Action::MemberRemoved, end).await;
        }
        let mut revoked = Revision::default();
        let ended = match removed {
            Ok(_) | Err(Refusal::NotFound(Thing::Member)) => true,
            // For a person who ended the own membership, the account exists no more.
            Err(Refusal::NotFound(Thing::Account)) => caller.acting_user.as_ref() == Some(&user),
            Err(_) => false,
        };
        if ended && caller.is_operator() && self.store.memberships(&user).await?.is_empty() {
            let known = self.keys.revoke_all_of(caller, &user).await?;
            (revoked, recorded) = (known.0, recorded.max(known.1));
        }
        match removed {
            Ok((Change::MemberRemoved(member), _)) => {
                Ok(Removed { revision: member.revision.max(recorded), was_member: true })
            }
            Ok(_) => Err(Refusal::Unavailable),
            Err(Refusal::NotFound(Thing::Account)) if revoked > Revision::default() => {
                Ok(Removed { revision: recorded, was_member: true })
            }
            Err(Refusal::NotFound(Thing::Member)) => {
                Ok(Removed { revision: recorded, was_member: revoked > Revision::default() })
            }
            Err(refusal) => Err(refusal),
        }
    }

    /// A page of members, and where the next one begins.
    ///
    /// # Errors
    /// When the account does not exist for the caller, or the store fails.
    pub async fn list_members(
        &self,
        caller: &Caller,
        account: &AccountId,
        after: Option<&UserId>,
        size: u32,
    ) -> Result<(Vec<Member>, Option<UserId>), Refusal> {
        let may_read = || self.account(&mut caller.authorize(&self.engine)?, account);
        may_read()?;
        let mut members = self.store.members(account, after, size + 1).await?;
        // A person who left meanwhile reads nothing.
        may_read()?;
        let more = members.len() > size as usize;
        members.truncate(size as usize);
        let next = members.last().filter(|_| more).map(|last| last.user.clone());
        Ok((members, next))
    }
}
