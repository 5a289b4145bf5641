//! What can be done with accounts. Only operators make and change them; an account's caller sees its own.

use std::{sync::Arc, time::Duration};

use crate::{
    access::{ATTEMPTS, Authorization, Caller},
    clock::{Clock, Entropy, random},
    domain::{
        account::Account,
        log::{Action, Change},
        name::{AccountId, DisplayName, UserId},
        time::{Revision, Timestamp},
    },
    engine::Engine,
    refusal::{Refusal, Thing},
    store::{
        Outcome, Rejection, Store, Write,
        writer::{WriteError, Writer},
    },
};

/// The use cases of accounts.
pub struct Accounts {
    store: Arc<dyn Store>,
    writer: Writer,
    engine: Arc<Engine>,
    clock: Arc<dyn Clock>,
    entropy: Arc<dyn Entropy>,
}

impl std::fmt::Debug for Accounts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Accounts").finish_non_exhaustive()
    }
}

fn write(
    asked: Authorization<'_>,
    account: Account,
    expect: Option<Revision>,
    action: Action,
    at: Timestamp,
) -> Write {
    asked.write(Change::Account(Arc::new(account)), expect, action, at)
}

fn applied(outcome: Outcome) -> Result<Account, Refusal> {
    match outcome {
        Outcome::Applied(Change::Account(account)) => Ok(Arc::unwrap_or_clone(account)),
        _ => Err(Refusal::Unavailable),
    }
}

impl Accounts {
    /// The use cases over a store and its writer.
    #[must_use]
    pub fn new(
        store: Arc<dyn Store>,
        writer: Writer,
        engine: Arc<Engine>,
        clock: Arc<dyn Clock>,
        entropy: Arc<dyn Entropy>,
    ) -> Self {
        Accounts { store, writer, engine, clock, entropy }
    }

    /// Makes an account.
    ///
    /// # Errors
    /// When the caller is no operator, or the id is taken.
    pub async fn create(
        &self,
        caller: &Caller,
        id: Option<AccountId>,
        name: Option<DisplayName>,
        longest_life: Option<Duration>,
    ) -> Result<Account, Refusal> {
        caller.must_be_operator()?;
        let now = self.clock.now();
        let id = match id {
            Some(id) => id,
            None => AccountId::generate(now, random(&*self.entropy)?),
        };
        let account = Account { longest_life, ..new_account(id, name, now)? };
        for attempt in 0..ATTEMPTS {
            let _turn = self.writer.turn(Action::AccountCreated, attempt).await;
            let asked = caller.authorize(&self.engine)?;
            let write = write(asked, account.clone(), None, Action::AccountCreated, now);
            match self.writer.write(write).await {
                Ok(outcome) => return applied(outcome),
                Err(WriteError::Rejected(Rejection::Conflict)) => {
                    return Err(Refusal::AccountExists(account.id));
                }
                Err(WriteError::Rejected(Rejection::AuthorizationMoved)) => self.writer.caught_up().await?,
                Err(error) => return Err(error.into()),
            }
        }
        Err(Refusal::Contended)
    }

    /// One account.
    ///
    /// # Errors
    /// When it does not exist for the caller.
    pub async fn get(&self, caller: &Caller, id: &AccountId) -> Result<Account, Refusal> {
        let seen = caller.is_operator() || *id == caller.account;
        let found = if seen { self.store.account(id).await? } else { None };
        caller.authorize(&self.engine)?.may_know(id)?;
        found.ok_or(Refusal::NotFound(Thing::Account))
    }

    /// A page of accounts, and where the next one begins.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn list(
        &self,
        caller: &Caller,
        after: Option<&AccountId>,
        size: u32,
    ) -> Result<(Vec<Account>, Option<AccountId>), Refusal> {
        if !caller.is_operator() {
            return Ok((self.store.account(&caller.account).await?.into_iter().collect(), None));
        }
        let mut accounts = match &caller.acting_user {
            Some(user) => self.accounts_of(user, after, size + 1).await?,
            None => self.store.accounts(after, size + 1).await?,
        };
        let more = accounts.len() > size as usize;
        accounts.truncate(size as usize);
        let next = accounts.last().filter(|_| more).map(|last| last.id.clone());
        Ok((accounts, next))
    }

    /// The accounts of which a user is a member, in the order of their ids.
    async fn accounts_of(
        &self,
        user: &UserId,
        after: Option<&AccountId>,
        limit: u32,
    ) -> Result<Vec<Account>, Refusal> {
        let memberships = self.store.memberships(user).await?;
        let mut ids: Vec<_> = memberships.into_iter().map(|member| member.account).collect();
        ids.retain(|id| after.is_none_or(|after| id > after));
        ids.sort();
        ids.truncate(limit as usize);
        let mut accounts = Vec::with_capacity(ids.len());
        for id in &ids {
            accounts.extend(self.store.account(id).await?);
        }
        Ok(accounts)
    }

    /// Changes an account from its record as it stands; `edit` says whether anything changed.
    async fn change(
        &self,
        caller: &Caller,
        id: &AccountId,
        action: Action,
        edit: impl Fn(&mut Account, Timestamp) -> bool,
    ) -> Result<Account, Refusal> {
        caller.must_be_operator()?;
        for attempt in 0..ATTEMPTS {
            let _turn = self.writer.turn(action, attempt).await;
            let before = self.get(caller, id).await?;
            let mut asked = caller.authorize(&self.engine)?;
            asked.person_may_change(id)?;
            let now = self.clock.now();
            let mut after = before.clone();
            if !edit(&mut after, now) {
                // Recorded is not yet in force, while the answer to its commit is awaited.
                self.writer.applied(before.revision).await?;
                return Ok(before);
            }
            after.updated_at = now;
            match self.writer.write(write(asked, after, Some(before.revision), action, now)).await {
                Ok(outcome) => return applied(outcome),
                Err(WriteError::Rejected(Rejection::Conflict)) => {}
                Err(WriteError::Rejected(Rejection::AuthorizationMoved)) => self.writer.caught_up().await?,
                Err(error) => return Err(error.into()),
            }
        }
        Err(Refusal::Contended)
    }

    /// Changes an account's name, the longest life of its keys, or both.
    ///
    /// # Errors
    /// When the caller is no operator, or there is no such account.
    pub async fn update(
        &self,
        caller: &Caller,
        id: &AccountId,
        name: Option<DisplayName>,
        longest_life: Option<Option<Duration>>,
    ) -> Result<Account, Refusal> {
        self.change(caller, id, Action::AccountUpdated, |account, _| {
            let before = account.clone();
            if let Some(name) = &name {
                account.name = name.clone();
            }
            if let Some(life) = longest_life {
                account.longest_life = life;
            }
            *account != before
        })
        .await
    }

    /// Refuses every key of an account.
    ///
    /// # Errors
    /// When the caller is no operator, there is no such account, or it is the operator account.
    pub async fn suspend(&self, caller: &Caller, id: &AccountId) -> Result<Account, Refusal> {
        caller.must_be_operator()?;
        if id.is_operator() {
            let message = "the operator account cannot be suspended: nobody could resume it";
            return Err(Refusal::Precondition("OPERATOR_ACCOUNT", message.to_owned()));
        }
        self.change(caller, id, Action::AccountSuspended, |account, now| {
            let changed = account.suspended_at.is_none();
            account.suspended_at.get_or_insert(now);
            changed
        })
        .await
    }

    /// Ends what `suspend` began.
    ///
    /// # Errors
    /// When the caller is no operator, or there is no such account.
    pub async fn resume(&self, caller: &Caller, id: &AccountId) -> Result<Account, Refusal> {
        let resumed = self
            .change(caller, id, Action::AccountResumed, |account, _| account.suspended_at.take().is_some())
            .await?;
        // A suspension that was not recorded ends with this too.
        self.engine.index.resume(id);
        Ok(resumed)
    }
}

fn new_account(id: AccountId, name: Option<DisplayName>, now: Timestamp) -> Result<Account, Refusal> {
    let name = match name {
        Some(name) => name,
        None => DisplayName::parse(id.as_str()).map_err(|error| Refusal::field("name", error.to_string()))?,
    };
    Ok(Account {
        id,
        name,
        suspended_at: None,
        longest_life: None,
        created_at: now,
        updated_at: now,
        revision: Revision::default(),
    })
}

/// What records the operator account, at the first start.
#[must_use]
pub fn operator_account(now: Timestamp) -> Option<Write> {
    let account =
        new_account(AccountId::operator(), DisplayName::parse("Keyward operators").ok(), now).ok()?;
    let change = Change::Account(Arc::new(account));
    Some(Write::by_system(change, None, Action::AccountCreated, "keyward serve", now))
}
