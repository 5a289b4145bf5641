//! What can be done with keys: each function is one use case, and writes what one transaction holds.
//!
//! A change is made from the record as it stands, committed only if the record still stands so, and tried again
//! if not. Effects on Checks come with the commit (see `store/writer.rs`). Parsing and statuses are `grpc`'s.

pub mod bulk;
mod change;
mod patch;
mod rights;
pub mod root;

use std::sync::Arc;

use crate::{
    access::{ATTEMPTS, Authorization, Caller},
    clock::{Clock, Entropy, random},
    domain::{
        account::{Account, AccountLimits, Environment, Environments},
        key::{Key, Owner, Secret, Terms},
        log::{Action, Change},
        name::{AccountId, IdempotencyKey, KeyId, RoleName, TokenPrefix, UserId},
        time::{Revision, Timestamp},
        token::Token,
    },
    engine::{Engine, usage::Pace},
    refusal::{Refusal, Thing},
    replication::propagation::Reach,
    store::{
        IDEMPOTENCY_WINDOW, Idempotency, KeyFilter, Outcome, OwnerFilter, Rejection, Store, StoredKey, Write,
        writer::{WriteError, Writer},
    },
};

pub use patch::{Field, Patch};

/// What this deployment has decided about keys.
#[derive(Clone, Debug)]
pub struct KeySettings {
    /// The environments there are.
    pub environments: Environments,
    /// How tokens start.
    pub prefix: TokenPrefix,
    /// The role of keys made without scopes and roles. `None` = such a key is refused.
    pub default_role: Option<RoleName>,
    /// How much an account may hold and do.
    pub account_limits: AccountLimits,
}

/// A key as it is shown: the record, its uses, and the instant at which its state is told.
#[derive(Clone, Debug)]
pub struct View {
    /// The record.
    pub key: Key,
    /// When each secret version was last used.
    pub last_used: Vec<(u32, Timestamp)>,
    /// The instant of the answer.
    pub now: Timestamp,
    /// What the change that was asked for takes away.
    pub reach: Reach,
}

/// Who a new key is for, as the request names it.
#[derive(Clone, Debug)]
pub enum OwnerNamed {
    /// An account's caller means its own account.
    Nobody,
    /// This account.
    Account(AccountId),
    /// This user.
    User(UserId),
}

/// A key to be made.
#[derive(Clone, Debug)]
pub struct NewKey {
    /// Who it is for.
    pub owner: OwnerNamed,
    /// When it is made; its expiry was counted from here.
    pub now: Timestamp,
    /// Where it works.
    pub environment: Environment,
    /// What it may do.
    pub terms: Terms,
    /// How its token starts, if not as usual.
    pub prefix: Option<TokenPrefix>,
}

/// The caller's name for a request, with a digest of all that it asks.
#[derive(Clone, Debug)]
pub struct Once {
    /// The name.
    pub key: IdempotencyKey,
    /// SHA-256 over the whole request.
    pub fingerprint: [u8; 32],
}

/// A key with a new token.
#[derive(Debug)]
pub struct Issued {
    /// The key.
    pub view: View,
    /// The token; none when the request was done before.
    pub token: Option<Token>,
}

/// The use cases of keys.
pub struct Keys {
    store: Arc<dyn Store>,
    writer: Writer,
    engine: Arc<Engine>,
    clock: Arc<dyn Clock>,
    entropy: Arc<dyn Entropy>,
    settings: KeySettings,
}

impl std::fmt::Debug for Keys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Keys").field("settings", &self.settings).finish_non_exhaustive()
    }
}

impl Keys {
    /// The use cases over a store, its writer and the engine that follows it.
    #[must_use]
    pub fn new(
        store: Arc<dyn Store>,
        writer: Writer,
        engine: Arc<Engine>,
        clock: Arc<dyn Clock>,
        entropy: Arc<dyn Entropy>,
        settings: KeySettings,
    ) -> Self {
        Keys { store, writer, engine, clock, entropy, settings }
    }

    /// The environments there are.
    #[must_use]
    pub fn environments(&self) -> &Environments {
        &self.settings.environments
    }

    /// Whether keys may be made without scopes and roles.
    #[must_use]
    pub fn has_default_role(&self) -> bool {
        self.settings.default_role.is_some()
    }

    /// The limits of an account to which a change is held. `only_takes`: it gives nothing to anybody.
    #[must_use]
    pub fn limits_of(&self, action: Action, only_takes: bool) -> Option<AccountLimits> {
        let limits = self.settings.account_limits;
        match action {
            _ if action.stops() => None,
            // What takes rights away has as much again, so that the log is bounded all the same.
            _ if only_takes && action != Action::KeyRotated => {
                let log_rows_per_hour = limits.log_rows_per_hour.saturating_mul(2);
                Some(AccountLimits { log_rows_per_hour, ..limits })
            }
            _ => Some(limits),
        }
    }

    /// The present instant.
    #[must_use]
    pub fn now(&self) -> Timestamp {
        self.clock.now()
    }

    fn view(&self, key: Key, stored: &[(u32, Timestamp)]) -> View {
        let mut last_used = stored.to_vec();
        for secret in &key.secrets {
            last_used
                .extend(self.engine.usage.pending(key.id, secret.version).map(|at| (secret.version, at)));
        }
        View { last_used, now: self.clock.now(), key, reach: Reach::Widens }
    }

    fn view_stored(&self, stored: StoredKey) -> View {
        self.view(stored.key, &stored.last_used)
    }

    /// The answer to a request that was done before, if it was.
    ///
    /// # Errors
    /// When another request was made under the same idempotency key, or the store fails.
    pub async fn done_before(
        &self,
        caller: &Caller,
        once: Option<&Once>,
    ) -> Result<Option<(Issued, Revision)>, Refusal> {
        let Some(once) = once else { return Ok(None) };
        let since = self.clock.now().minus(IDEMPOTENCY_WINDOW);
        match self.store.idempotent(caller.request_scope(), &once.key, since).await? {
            Some((id, fingerprint)) if fingerprint == once.fingerprint => {
                self.replay(caller, id).await.map(Some)
            }
            Some(_) => Err(Refusal::IdempotencyKeyReused),
            None => Ok(None),
        }
    }

    async fn replay(&self, caller: &Caller, id: KeyId) -> Result<(Issued, Revision), Refusal> {
        // What was made is shown as Get shows it: the person who asked may be no member any more.
        let view = self.get(caller, id).await?;
        // What is done again is waited for again: the first may not have ended.
        let view = View { reach: Reach::Narrows { again: true }, ..view };
        let revision = view.key.revision;
        self.writer.applied(revision).await?;
        Ok((Issued { view, token: None }, revision))
    }

    /// Makes a key.
    ///
    /// # Errors
    /// When the caller may not, the account does not exist, the name is taken, or the change is not recorded.
    pub async fn create(
        &self,
        caller: &Caller,
        new: NewKey,
        once: Option<Once>,
    ) -> Result<(Issued, Revision), Refusal> {
        let now = new.now;
        let prefix = new.prefix.as_ref().unwrap_or(&self.settings.prefix);
        let token = Token::generate(prefix, &new.environment.tag, &random(&*self.entropy)?);
        let secret = first_secret(&token, now);
        match self.make(caller, &new, &secret, Action::KeyCreated, once).await? {
            Outcome::Applied(change) => {
                let key = into_key(change)?;
                let revision = key.revision;
                // Nobody has its token yet: it has no use that could be told.
                let view = View { key, last_used: Vec::new(), now: self.clock.now(), reach: Reach::Widens };
                Ok((Issued { view, token: Some(token) }, revision))
            }
            Outcome::Replayed(id) => self.replay(caller, id).await,
        }
    }

    /// Records a new key with this secret, once the caller may make it.
    async fn make(
        &self,
        caller: &Caller,
        new: &NewKey,
        secret: &Secret,
        action: Action,
        once: Option<Once>,
    ) -> Result<Outcome, Refusal> {
        for attempt in 0..ATTEMPTS {
            let _turn = self.writer.turn(action, attempt).await;
            let mut asked = caller.authorize(&self.engine)?;
            let key = self.new_key(&mut asked, new, secret.clone())?;
            let limits = self.limits_of(action, false);
            let write = Write { limits, ..write(asked, key, None, action, new.now, once.clone()) };
            match self.writer.write(write).await {
                Err(WriteError::Rejected(Rejection::AuthorizationMoved)) => self.writer.caught_up().await?,
                outcome => return Ok(outcome?),
            }
        }
        Err(Refusal::Contended)
    }

    /// One key.
    ///
    /// # Errors
    /// When it does not exist for the caller.
    pub async fn get(&self, caller: &Caller, id: KeyId) -> Result<View, Refusal> {
        let stored = self.visible(caller, id).await?;
        self.may_read(caller, &stored.key.owner)?;
        Ok(self.view_stored(stored))
    }

    /// A page of keys, and where the next one begins.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn list(
        &self,
        caller: &Caller,
        filter: &KeyFilter,
        before: Option<KeyId>,
        size: u32,
    ) -> Result<(Vec<View>, Option<KeyId>), Refusal> {
        if filter.unused_since.is_some() {
            // The filter runs in the store: it must know the latest uses.
            self.engine.usage.flush(&*self.store, Pace::AtOnce).await?;
        }
        let (stored, more) = self.read_page(filter, before, size).await?;
        if let OwnerFilter::Account(account) = &filter.owner {
            // Judged after the reading: a person who left meanwhile reads nothing.
            self.may_read(caller, &Owner::Account(account.clone()))?;
        }
        let next = stored.last().filter(|_| more).map(|last| last.key.id);
        Ok((stored.into_iter().map(|stored| self.view_stored(stored)).collect(), next))
    }

    /// The key that a token belongs to, and which version of its secret it is.
    ///
    /// # Errors
    /// When none exists for the caller.
    pub async fn lookup(&self, caller: &Caller, presented: &str) -> Result<(View, u32), Refusal> {
        let holder = self.engine.lookup(presented)?.ok_or(Refusal::NotFound(Thing::Key))?;
        let view = self.get(caller, holder.key.id()).await?;
        Ok((view, holder.version))
    }

    /// The caller's own key, where it called with one, and the account that it acts in; a user key that names none
    /// acts in none.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn who_am_i(&self, caller: &Caller) -> Result<(Option<View>, Option<Arc<Account>>), Refusal> {
        let account = self.engine.index.account(&caller.account);
        let Some(key) = caller.key() else { return Ok((None, account)) };
        let stored = self.store.key(key.id()).await?.ok_or(Refusal::Unauthenticated)?;
        Ok((Some(self.view_stored(stored)), account))
    }
}

fn first_secret(token: &Token, now: Timestamp) -> Secret {
    Secret { version: 1, digest: token.digest(), hint: token.hint(), created_at: now, expires_at: None }
}

fn write(
    asked: Authorization<'_>,
    key: Key,
    expect: Option<Revision>,
    action: Action,
    at: Timestamp,
    once: Option<Once>,
) -> Write {
    let idempotency = once.map(|once| Idempotency {
        caller: asked.caller.request_scope(),
        key: once.key,
        fingerprint: once.fingerprint,
    });
    Write { idempotency, ..asked.write(Change::Key(Arc::new(key)), expect, action, at) }
}

fn into_key(change: Change) -> Result<Key, Refusal> {
    match change {
        Change::Key(key) => Ok(Arc::unwrap_or_clone(key)),
        _ => Err(Refusal::Unavailable),
    }
}
