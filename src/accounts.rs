//! The use cases of accounts.
//!
//! Only operators create and change accounts; an account's caller sees its own. Roles and members are in `membership`.

use std::{sync::Arc, time::Duration};

use crate::{
    caller::{Authorization, Caller, MAX_AUTHORIZATION_ATTEMPTS},
    clock::{Clock, EntropySource, random_bytes},
    domain::{
        account::Account,
        log::{AuditAction, RecordChange},
        name::{AccountId, DisplayName, UserId},
        time::{Revision, Timestamp},
    },
    engine::Engine,
    service_error::{ResourceKind, ServiceError},
    store::{
        Store, WriteOutcome, WriteRejection, WriteRequest,
        group_commit::{CommitHandle, WriteError},
    },
};

/// The use cases of accounts.
pub(crate) struct AccountOperations {
    store: Arc<dyn Store>,
    commit_handle: CommitHandle,
    engine: Arc<Engine>,
    clock: Arc<dyn Clock>,
    entropy: Arc<dyn EntropySource>,
}

impl std::fmt::Debug for AccountOperations {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AccountOperations").finish_non_exhaustive()
    }
}

fn build_write(
    authorization: Authorization<'_>,
    account: Account,
    expect: Option<Revision>,
    action: AuditAction,
    at: Timestamp,
) -> WriteRequest {
    authorization.into_write(RecordChange::Account(Arc::new(account)), expect, action, at)
}

fn into_account(outcome: WriteOutcome) -> Result<Account, ServiceError> {
    match outcome {
        WriteOutcome::Applied(RecordChange::Account(account)) => Ok(Arc::unwrap_or_clone(account)),
        _ => Err(ServiceError::Unavailable),
    }
}

impl AccountOperations {
    #[must_use]
    pub(crate) fn new(
        store: Arc<dyn Store>,
        writer: CommitHandle,
        engine: Arc<Engine>,
        clock: Arc<dyn Clock>,
        entropy: Arc<dyn EntropySource>,
    ) -> Self {
        AccountOperations { store, commit_handle: writer, engine, clock, entropy }
    }

    ///
    /// Fails if the caller is no operator, or the id is taken.
    pub(crate) async fn create(
        &self,
        caller: &Caller,
        id: Option<AccountId>,
        name: Option<DisplayName>,
        longest_life: Option<Duration>,
    ) -> Result<Account, ServiceError> {
        caller.require_operator()?;
        let now = self.clock.now();
        let id = match id {
            Some(id) => id,
            None => AccountId::generate(now, random_bytes(&*self.entropy)?),
        };
        let account = Account { longest_life, ..build_account(id, name, now)? };
        for attempt in 0..MAX_AUTHORIZATION_ATTEMPTS {
            let _turn = self.commit_handle.lock_for_change(AuditAction::AccountCreated, attempt).await;
            let authorization = caller.authorize(&self.engine)?;
            let write = build_write(authorization, account.clone(), None, AuditAction::AccountCreated, now);
            match self.commit_handle.write(write).await {
                Ok(outcome) => return into_account(outcome),
                Err(WriteError::Rejected(WriteRejection::Conflict)) => {
                    return Err(ServiceError::AccountExists(account.id));
                }
                Err(WriteError::Rejected(WriteRejection::AuthorizationChanged)) => {
                    self.commit_handle.wait_caught_up().await?
                }
                Err(error) => return Err(error.into()),
            }
        }
        Err(ServiceError::Contended)
    }

    ///
    /// Fails if the account does not exist for the caller.
    pub(crate) async fn get(&self, caller: &Caller, id: &AccountId) -> Result<Account, ServiceError> {
        let visible = caller.is_operator() || *id == caller.account;
        let found = if visible { self.store.get_account(id).await? } else { None };
        caller.authorize(&self.engine)?.check_account_visible(id)?;
        found.ok_or(ServiceError::NotFound(ResourceKind::Account))
    }

    /// Returns a page of accounts, and the id where the next page starts.
    pub(crate) async fn list(
        &self,
        caller: &Caller,
        after: Option<&AccountId>,
        size: u32,
    ) -> Result<(Vec<Account>, Option<AccountId>), ServiceError> {
        if !caller.is_operator() {
            return Ok((self.store.get_account(&caller.account).await?.into_iter().collect(), None));
        }
        let mut accounts = match &caller.acting_user {
            Some(user) => self.list_accounts_of_user(user, after, size + 1).await?,
            None => self.store.list_accounts(after, size + 1).await?,
        };
        let more = accounts.len() > size as usize;
        accounts.truncate(size as usize);
        let next = accounts.last().filter(|_| more).map(|last| last.id.clone());
        Ok((accounts, next))
    }

    /// The accounts of a user's memberships, ordered by id.
    async fn list_accounts_of_user(
        &self,
        user: &UserId,
        after: Option<&AccountId>,
        limit: u32,
    ) -> Result<Vec<Account>, ServiceError> {
        let memberships = self.store.list_memberships(user).await?;
        let mut ids: Vec<_> = memberships.into_iter().map(|member| member.account).collect();
        ids.retain(|id| after.is_none_or(|after| id > after));
        ids.sort();
        ids.truncate(limit as usize);
        let mut accounts = Vec::with_capacity(ids.len());
        for id in &ids {
            accounts.extend(self.store.get_account(id).await?);
        }
        Ok(accounts)
    }

    /// Changes an account from its recorded state. `edit` returns whether it changed anything.
    async fn apply_edit(
        &self,
        caller: &Caller,
        id: &AccountId,
        action: AuditAction,
        edit: impl Fn(&mut Account, Timestamp) -> bool,
    ) -> Result<Account, ServiceError> {
        caller.require_operator()?;
        for attempt in 0..MAX_AUTHORIZATION_ATTEMPTS {
            let _turn = self.commit_handle.lock_for_change(action, attempt).await;
            let before = self.get(caller, id).await?;
            let mut authorization = caller.authorize(&self.engine)?;
            authorization.check_acting_user_change(id)?;
            let now = self.clock.now();
            let mut after = before.clone();
            if !edit(&mut after, now) {
                // A recorded change is not in force until its commit is confirmed.
                self.commit_handle.wait_applied(before.revision).await?;
                return Ok(before);
            }
            after.updated_at = now;
            match self
                .commit_handle
                .write(build_write(authorization, after, Some(before.revision), action, now))
                .await
            {
                Ok(outcome) => return into_account(outcome),
                Err(WriteError::Rejected(WriteRejection::Conflict)) => {}
                Err(WriteError::Rejected(WriteRejection::AuthorizationChanged)) => {
                    self.commit_handle.wait_caught_up().await?
                }
                Err(error) => return Err(error.into()),
            }
        }
        Err(ServiceError::Contended)
    }

    /// Changes an account's name, the longest life of its keys, or both.
    ///
    /// Fails if the caller is no operator, or the account does not exist.
    pub(crate) async fn update(
        &self,
        caller: &Caller,
        id: &AccountId,
        name: Option<DisplayName>,
        longest_life: Option<Option<Duration>>,
    ) -> Result<Account, ServiceError> {
        self.apply_edit(caller, id, AuditAction::AccountUpdated, |account, _| {
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

    /// Denies every key of an account until it is resumed.
    ///
    /// Fails if the caller is no operator, or the account does not exist or is the operator account.
    pub(crate) async fn suspend(&self, caller: &Caller, id: &AccountId) -> Result<Account, ServiceError> {
        caller.require_operator()?;
        if id.is_operator() {
            let message = "the operator account cannot be suspended: nobody could resume it";
            return Err(ServiceError::FailedPrecondition("OPERATOR_ACCOUNT", message.to_owned()));
        }
        self.apply_edit(caller, id, AuditAction::AccountSuspended, |account, now| {
            let changed = account.suspended_at.is_none();
            account.suspended_at.get_or_insert(now);
            changed
        })
        .await
    }

    /// Allows the keys of a suspended account again.
    ///
    /// Fails if the caller is no operator, or the account does not exist.
    pub(crate) async fn resume(&self, caller: &Caller, id: &AccountId) -> Result<Account, ServiceError> {
        let resumed = self
            .apply_edit(caller, id, AuditAction::AccountResumed, |account, _| {
                account.suspended_at.take().is_some()
            })
            .await?;
        // This also ends a local suspension that was not recorded.
        self.engine.index.clear_local_suspension(id);
        Ok(resumed)
    }
}

fn build_account(id: AccountId, name: Option<DisplayName>, now: Timestamp) -> Result<Account, ServiceError> {
    let name = match name {
        Some(name) => name,
        None => DisplayName::parse(id.as_str())
            .map_err(|error| ServiceError::invalid_field("name", error.to_string()))?,
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

/// The write request that creates the operator account at the first start.
#[must_use]
pub(crate) fn build_operator_account(now: Timestamp) -> Option<WriteRequest> {
    let account =
        build_account(AccountId::operator(), DisplayName::parse("Keyward operators").ok(), now).ok()?;
    let change = RecordChange::Account(Arc::new(account));
    Some(WriteRequest::from_system(change, None, AuditAction::AccountCreated, "keyward serve", now))
}
