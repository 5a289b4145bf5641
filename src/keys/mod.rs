//! The use cases of API keys: each function is one use case and writes one transaction.
//!
//! A change starts from the recorded state, commits only if that state has not moved, and retries otherwise. It affects
//! Checks when it commits (see `store/group_commit.rs`). Parsing requests and building statuses belongs to `grpc`.

mod access_rules;
pub(crate) mod bulk;
mod lifecycle;
mod patch;
pub(crate) mod root_key;

use std::sync::Arc;

use crate::{
    caller::{Authorization, Caller, MAX_AUTHORIZATION_ATTEMPTS},
    clock::{Clock, EntropySource, random_bytes},
    domain::{
        account::{Account, AccountLimits, Environment, EnvironmentSet},
        key::{ApiKey, KeyOwner, KeySecret, KeySpec},
        log::{AuditAction, RecordChange},
        name::{AccountId, IdempotencyKey, KeyId, RoleName, TokenPrefix, UserId},
        time::{Revision, Timestamp},
        token::Token,
    },
    engine::{Engine, usage::FlushMode},
    replication::propagation::ChangeEffect,
    service_error::{ResourceKind, ServiceError},
    store::{
        IDEMPOTENCY_WINDOW, IdempotentRequest, KeyFilter, OwnerFilter, Store, StoredKey, WriteOutcome,
        WriteRejection, WriteRequest,
        group_commit::{CommitHandle, WriteError},
    },
};

pub(crate) use patch::{KeyField, KeyPatch};

/// The settings of a deployment about keys.
#[derive(Clone, Debug)]
pub struct KeySettings {
    /// The configured environments.
    pub environments: EnvironmentSet,
    /// The default prefix of tokens.
    pub prefix: TokenPrefix,
    /// The role of keys created without scopes and roles. `None` rejects such a key.
    pub default_role: Option<RoleName>,
    /// The limits of each account.
    pub account_limits: AccountLimits,
}

/// A key for a response: the record, its last uses, and the instant for which its state holds.
#[derive(Clone, Debug)]
pub(crate) struct KeyDetails {
    pub(crate) key: ApiKey,
    /// When each secret version was last used.
    pub(crate) last_used: Vec<(u32, Timestamp)>,
    /// The instant of the response.
    pub(crate) as_of: Timestamp,
    /// The effect of the change that returned this key.
    pub(crate) effect: ChangeEffect,
}

/// The owner of a new key, as the request names it.
#[derive(Clone, Debug)]
pub(crate) enum RequestedOwner {
    /// The request names none; an account's caller means its own account.
    Unspecified,
    Account(AccountId),
    User(UserId),
}

/// The parameters of a new key.
#[derive(Clone, Debug)]
pub(crate) struct NewKey {
    pub(crate) owner: RequestedOwner,
    /// The creation time; a `ttl` counts from here.
    pub(crate) created_at: Timestamp,
    pub(crate) environment: Environment,
    pub(crate) spec: KeySpec,
    /// The token's prefix, if not the configured one.
    pub(crate) token_prefix: Option<TokenPrefix>,
}

/// The idempotency key of a request, and a digest of its contents.
#[derive(Clone, Debug)]
pub(crate) struct ReplayKey {
    pub(crate) idempotency_key: IdempotencyKey,
    /// SHA-256 over the whole request.
    pub(crate) fingerprint: [u8; 32],
}

#[derive(Debug)]
pub(crate) struct IssuedKey {
    pub(crate) details: KeyDetails,
    /// The new token; `None` for a replayed request.
    pub(crate) token: Option<Token>,
}

/// The use cases of API keys.
pub(crate) struct KeyOperations {
    store: Arc<dyn Store>,
    commit_handle: CommitHandle,
    engine: Arc<Engine>,
    clock: Arc<dyn Clock>,
    entropy: Arc<dyn EntropySource>,
    settings: KeySettings,
}

impl std::fmt::Debug for KeyOperations {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("KeyOperations").field("settings", &self.settings).finish_non_exhaustive()
    }
}

impl KeyOperations {
    #[must_use]
    pub(crate) fn new(
        store: Arc<dyn Store>,
        writer: CommitHandle,
        engine: Arc<Engine>,
        clock: Arc<dyn Clock>,
        entropy: Arc<dyn EntropySource>,
        settings: KeySettings,
    ) -> Self {
        KeyOperations { store, commit_handle: writer, engine, clock, entropy, settings }
    }

    #[must_use]
    pub(crate) fn environments(&self) -> &EnvironmentSet {
        &self.settings.environments
    }

    /// Whether keys may be created without scopes and roles.
    #[must_use]
    pub(crate) fn has_default_role(&self) -> bool {
        self.settings.default_role.is_some()
    }

    /// The account limits for a change. `only_restricts`: the change grants nothing.
    #[must_use]
    pub(crate) fn limits_for_action(
        &self,
        action: AuditAction,
        only_restricts: bool,
    ) -> Option<AccountLimits> {
        let limits = self.settings.account_limits;
        match action {
            _ if action.is_restriction() => None,
            // Restrictions have twice the budget: they may exceed the limit, but the log stays bounded.
            _ if only_restricts && action != AuditAction::KeyRotated => {
                let log_rows_per_hour = limits.log_rows_per_hour.saturating_mul(2);
                Some(AccountLimits { log_rows_per_hour, ..limits })
            }
            _ => Some(limits),
        }
    }

    #[must_use]
    pub(crate) fn now(&self) -> Timestamp {
        self.clock.now()
    }

    fn key_details(&self, key: ApiKey, stored: &[(u32, Timestamp)]) -> KeyDetails {
        let mut last_used = stored.to_vec();
        for secret in &key.secrets {
            last_used.extend(
                self.engine.usage.last_pending_use(key.id, secret.version).map(|at| (secret.version, at)),
            );
        }
        KeyDetails { last_used, as_of: self.clock.now(), key, effect: ChangeEffect::Grants }
    }

    fn stored_key_details(&self, stored: StoredKey) -> KeyDetails {
        self.key_details(stored.key, &stored.last_used)
    }

    /// The response to a request that was done before under the same idempotency key, if any.
    ///
    /// Fails if another request used this idempotency key, or the store fails.
    pub(crate) async fn find_replay(
        &self,
        caller: &Caller,
        once: Option<&ReplayKey>,
    ) -> Result<Option<(IssuedKey, Revision)>, ServiceError> {
        let Some(once) = once else { return Ok(None) };
        let since = self.clock.now().saturating_sub(IDEMPOTENCY_WINDOW);
        match self
            .store
            .find_idempotent_request(caller.idempotency_scope(), &once.idempotency_key, since)
            .await?
        {
            Some((id, fingerprint)) if fingerprint == once.fingerprint => {
                self.replay(caller, id).await.map(Some)
            }
            Some(_) => Err(ServiceError::IdempotencyKeyReused),
            None => Ok(None),
        }
    }

    async fn replay(&self, caller: &Caller, id: KeyId) -> Result<(IssuedKey, Revision), ServiceError> {
        // Return the key as Get does: the acting user may no longer be a member.
        let view = self.get(caller, id).await?;
        // Wait for a repeated change again: the first call may not have waited to the end.
        let view = KeyDetails { effect: ChangeEffect::Restricts { is_repeat: true }, ..view };
        let revision = view.key.revision;
        self.commit_handle.wait_applied(revision).await?;
        Ok((IssuedKey { details: view, token: None }, revision))
    }

    ///
    /// Fails if the caller may not, the account does not exist, the name is taken, or the change is not recorded.
    pub(crate) async fn create(
        &self,
        caller: &Caller,
        new: NewKey,
        once: Option<ReplayKey>,
    ) -> Result<(IssuedKey, Revision), ServiceError> {
        let now = new.created_at;
        let prefix = new.token_prefix.as_ref().unwrap_or(&self.settings.prefix);
        let token = Token::generate(prefix, &new.environment.tag, &random_bytes(&*self.entropy)?);
        let secret = first_secret(&token, now);
        match self.record_new_key(caller, &new, &secret, AuditAction::KeyCreated, once).await? {
            WriteOutcome::Applied(change) => {
                let key = into_key(change)?;
                let revision = key.revision;
                // The token was never used, so there is no last use to look up.
                let view = KeyDetails {
                    key,
                    last_used: Vec::new(),
                    as_of: self.clock.now(),
                    effect: ChangeEffect::Grants,
                };
                Ok((IssuedKey { details: view, token: Some(token) }, revision))
            }
            WriteOutcome::Replayed(id) => self.replay(caller, id).await,
        }
    }

    /// Records a new key with this secret, if the caller may create it.
    async fn record_new_key(
        &self,
        caller: &Caller,
        new: &NewKey,
        secret: &KeySecret,
        action: AuditAction,
        once: Option<ReplayKey>,
    ) -> Result<WriteOutcome, ServiceError> {
        for attempt in 0..MAX_AUTHORIZATION_ATTEMPTS {
            let _turn = self.commit_handle.lock_for_change(action, attempt).await;
            let mut authorization = caller.authorize(&self.engine)?;
            let key = self.build_key(&mut authorization, new, secret.clone())?;
            let limits = self.limits_for_action(action, false);
            let write = WriteRequest {
                limits,
                ..build_write(authorization, key, None, action, new.created_at, once.clone())
            };
            match self.commit_handle.write(write).await {
                Err(WriteError::Rejected(WriteRejection::AuthorizationChanged)) => {
                    self.commit_handle.wait_caught_up().await?
                }
                outcome => return Ok(outcome?),
            }
        }
        Err(ServiceError::Contended)
    }

    ///
    /// Fails if the key does not exist for the caller.
    pub(crate) async fn get(&self, caller: &Caller, id: KeyId) -> Result<KeyDetails, ServiceError> {
        let stored = self.find_visible(caller, id).await?;
        self.check_read(caller, &stored.key.owner)?;
        Ok(self.stored_key_details(stored))
    }

    /// Returns a page of keys, and the id where the next page starts.
    pub(crate) async fn list(
        &self,
        caller: &Caller,
        filter: &KeyFilter,
        before: Option<KeyId>,
        size: u32,
    ) -> Result<(Vec<KeyDetails>, Option<KeyId>), ServiceError> {
        if filter.unused_since.is_some() {
            // The filter runs in the store, so the latest uses must be there.
            self.engine.usage.flush(&*self.store, FlushMode::Immediate).await?;
        }
        let (stored, more) = self.read_page(filter, before, size).await?;
        if let OwnerFilter::Account(account) = &filter.owner {
            // Checked after the read: an acting user that left meanwhile must read nothing.
            self.check_read(caller, &KeyOwner::Account(account.clone()))?;
        }
        let next = stored.last().filter(|_| more).map(|last| last.key.id);
        Ok((stored.into_iter().map(|stored| self.stored_key_details(stored)).collect(), next))
    }

    /// Finds the key that a token belongs to, and the version of its secret.
    ///
    /// Fails if no such key exists for the caller.
    pub(crate) async fn find_by_token(
        &self,
        caller: &Caller,
        presented: &str,
    ) -> Result<(KeyDetails, u32), ServiceError> {
        let holder =
            self.engine.find_key_by_token(presented)?.ok_or(ServiceError::NotFound(ResourceKind::Key))?;
        let view = self.get(caller, holder.key.id()).await?;
        Ok((view, holder.secret_version))
    }

    /// The caller's own key, if it called with one, and the account that it acts in. A user key that names no account
    /// acts in none.
    pub(crate) async fn whoami(
        &self,
        caller: &Caller,
    ) -> Result<(Option<KeyDetails>, Option<Arc<Account>>), ServiceError> {
        let account = self.engine.index.account(&caller.account);
        let Some(key) = caller.key() else { return Ok((None, account)) };
        let stored = self.store.get_key(key.id()).await?.ok_or(ServiceError::Unauthenticated)?;
        Ok((Some(self.stored_key_details(stored)), account))
    }
}

fn first_secret(token: &Token, now: Timestamp) -> KeySecret {
    KeySecret { version: 1, digest: token.digest(), hint: token.hint(), created_at: now, expires_at: None }
}

fn build_write(
    authorization: Authorization<'_>,
    key: ApiKey,
    expect: Option<Revision>,
    action: AuditAction,
    at: Timestamp,
    once: Option<ReplayKey>,
) -> WriteRequest {
    let idempotency = once.map(|once| IdempotentRequest {
        caller: authorization.caller.idempotency_scope(),
        key: once.idempotency_key,
        fingerprint: once.fingerprint,
    });
    WriteRequest {
        idempotency,
        ..authorization.into_write(RecordChange::Key(Arc::new(key)), expect, action, at)
    }
}

fn into_key(change: RecordChange) -> Result<ApiKey, ServiceError> {
    match change {
        RecordChange::Key(key) => Ok(Arc::unwrap_or_clone(key)),
        _ => Err(ServiceError::Unavailable),
    }
}
