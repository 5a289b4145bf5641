//! What can be done with keys: each function is one use case, and writes what one transaction holds.
//!
//! A change is made from the record as it stands, committed only if the record still stands so, and tried again
//! if not. Effects on Checks come with the commit (see `store/writer.rs`). Parsing and statuses are `grpc`'s.

pub mod bulk;
mod rights;
pub mod root;

use std::{net::IpAddr, sync::Arc, time::Duration};

use crate::{
    access::{Caller, Proof},
    clock::{Clock, Entropy, random},
    domain::{
        account::{Account, Environment, Environments},
        decision::Reason,
        facts::KeyFacts as _,
        key::{Key, Owner, Revocation, RevokeReason, Secret, State, Terms},
        log::{Action, Change},
        name::{AccountId, IdempotencyKey, KeyId, RoleName, TokenPrefix, UserId},
        scope::ScopeSet,
        time::{Revision, Timestamp},
        token::Token,
    },
    engine::{Engine, Holder},
    refusal::{Refusal, Thing},
    replication::propagation::Reach,
    store::{
        IDEMPOTENCY_WINDOW, Idempotency, KeyFilter, Outcome, OwnerFilter, Rejection, Store, StoredKey, Write,
        writer::{WriteError, Writer},
    },
};

/// How often a change is tried again when the record moved under it.
const ATTEMPTS: u32 = 16;

/// What this deployment has decided about keys.
#[derive(Clone, Debug)]
pub struct KeySettings {
    /// The environments there are.
    pub environments: Environments,
    /// How tokens start.
    pub prefix: TokenPrefix,
    /// The role of keys made without scopes and roles. `None` = such a key is refused.
    pub default_role: Option<RoleName>,
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

/// The fields that Update changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Field {
    /// `name`
    Name,
    /// `scopes`
    Scopes,
    /// `roles`
    Roles,
    /// `expires_at`
    ExpiresAt,
    /// `customers`
    Customers,
    /// `allowed_cidrs`
    AllowedCidrs,
    /// `rate_limits`
    RateLimits,
    /// `quota`
    Quota,
    /// `metadata`
    Metadata,
}

impl Field {
    /// The field that an update mask's path names.
    #[must_use]
    pub fn parse(path: &str) -> Option<Field> {
        Some(match path {
            "name" => Field::Name,
            "scopes" => Field::Scopes,
            "roles" => Field::Roles,
            "expires_at" => Field::ExpiresAt,
            "customers" => Field::Customers,
            "allowed_cidrs" => Field::AllowedCidrs,
            "rate_limits" => Field::RateLimits,
            "quota" => Field::Quota,
            "metadata" => Field::Metadata,
            _ => return None,
        })
    }
}

/// New values for some of a key's terms.
#[derive(Clone, Debug)]
pub struct Patch {
    /// Which.
    pub fields: Vec<Field>,
    /// The values; those of other fields are not looked at.
    pub terms: Terms,
}

impl Patch {
    /// Whether any of the new values is the old one.
    fn repeats(&self, terms: &Terms) -> bool {
        self.fields.iter().any(|field| {
            let mut after = terms.clone();
            Patch { fields: vec![*field], terms: self.terms.clone() }.apply(&mut after);
            after == *terms
        })
    }

    fn apply(&self, terms: &mut Terms) {
        let new = self.terms.clone();
        for field in &self.fields {
            match field {
                Field::Name => terms.name.clone_from(&new.name),
                Field::Scopes => terms.scopes = new.scopes.clone(),
                Field::Roles => terms.roles.clone_from(&new.roles),
                Field::ExpiresAt => terms.expires_at = new.expires_at,
                Field::Customers => terms.customers.clone_from(&new.customers),
                Field::AllowedCidrs => terms.allowed_cidrs.clone_from(&new.allowed_cidrs),
                Field::RateLimits => terms.rate_limits.clone_from(&new.rate_limits),
                Field::Quota => terms.quota.clone_from(&new.quota),
                Field::Metadata => terms.metadata.clone_from(&new.metadata),
            }
        }
    }
}

/// Whether an edit changed anything.
enum Edit {
    Changed,
    /// Some of what it asks for was so before: it may be a call that is made again, or narrow what another narrowed.
    Repeats,
    AsItWas,
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
        match self.store.idempotent(caller.id(), &once.key, since).await? {
            Some((id, fingerprint)) if fingerprint == once.fingerprint => {
                self.replay(caller, id).await.map(Some)
            }
            Some(_) => Err(Refusal::IdempotencyKeyReused),
            None => Ok(None),
        }
    }

    async fn replay(&self, caller: &Caller, id: KeyId) -> Result<(Issued, Revision), Refusal> {
        let view = self.view_stored(self.visible(caller, id).await?);
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
        let key = self.new_key(caller, &new, first_secret(&token, now))?;
        let write = write(caller, key, None, Action::KeyCreated, now, once);
        match self.writer.write(write).await? {
            Outcome::Applied(change) => {
                let view = self.view(into_key(change)?, &[]);
                let revision = view.key.revision;
                Ok((Issued { view, token: Some(token) }, revision))
            }
            Outcome::Replayed(id) => self.replay(caller, id).await,
        }
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
        if let OwnerFilter::Account(account) = &filter.owner {
            self.may_read(caller, &Owner::Account(account.clone()))?;
        }
        if filter.unused_since.is_some() {
            // The filter runs in the store: it must know the latest uses.
            self.engine.usage.flush(&*self.store).await?;
        }
        let mut stored = self.store.keys(filter, before, size + 1).await?;
        let fitting = bulk::fitting(&stored).min(size as usize);
        let more = stored.len() > fitting;
        stored.truncate(fitting);
        let next = stored.last().filter(|_| more).map(|last| last.key.id);
        Ok((stored.into_iter().map(|stored| self.view_stored(stored)).collect(), next))
    }

    /// Changes a key: `edit` gets a copy of the record, and is called again if the record moved meanwhile.
    async fn change(
        &self,
        caller: &Caller,
        id: KeyId,
        action: Action,
        once: Option<Once>,
        mut edit: impl FnMut(&mut Key, Timestamp) -> Result<Edit, Refusal>,
    ) -> Result<Changed, Refusal> {
        for _ in 0..ATTEMPTS {
            let stored = self.visible(caller, id).await?;
            self.may_write(caller, &stored.key.owner)?;
            let now = self.clock.now();
            let mut key = stored.key.clone();
            let edit = edit(&mut key, now)?;
            if let Edit::AsItWas = edit {
                // Recorded is not yet in force, while the answer to its commit is awaited.
                self.writer.applied(stored.key.revision).await?;
                let reach =
                    if action == Action::KeyEnabled { Reach::Widens } else { Reach::Narrows { again: true } };
                return Ok(Changed::Now(Box::new(View { reach, ..self.view_stored(stored) })));
            }
            key.updated_at = now;
            let expect = Some(stored.key.revision);
            let reach = reach(&key, &stored.key, &edit);
            match self.writer.write(write(caller, key, expect, action, now, once.clone())).await {
                Ok(Outcome::Applied(change)) => {
                    let view = self.view(into_key(change)?, &stored.last_used);
                    return Ok(Changed::Now(Box::new(View { reach, ..view })));
                }
                Ok(Outcome::Replayed(id)) => return Ok(Changed::Before(id)),
                Err(WriteError::Rejected(Rejection::Conflict)) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Err(Refusal::Contended)
    }

    /// Changes some of a key's terms.
    ///
    /// # Errors
    /// When the key is revoked, would be left without a grant, or the caller could not give its grants.
    pub async fn update(&self, caller: &Caller, id: KeyId, patch: &Patch) -> Result<View, Refusal> {
        self.change(caller, id, Action::KeyUpdated, None, |key, now| {
            not_revoked(key)?;
            self.may_give(caller, &key.owner, &key.environment, &key.terms)?;
            caller.may_change_limits_of(key, patch)?;
            let repeats = patch.repeats(&key.terms);
            patch.apply(&mut key.terms);
            if patch.fields.contains(&Field::Roles) {
                self.roles_exist(&key.owner, &key.terms.roles, "key.roles")?;
            }
            if key.terms.scopes.is_empty() && key.terms.roles.is_empty() {
                return Err(Refusal::field(
                    "key.scopes",
                    "a key needs at least one scope or role; revoke or disable it instead",
                ));
            }
            self.may_give(caller, &key.owner, &key.environment, &key.terms)?;
            if patch.fields.contains(&Field::ExpiresAt) {
                self.keeps_longest_life(&key.owner, key.terms.expires_at, now, "key.expires_at")?;
            }
            Ok(if repeats { Edit::Repeats } else { Edit::Changed })
        })
        .await?
        .now()
    }

    /// Refuses a key until it is enabled.
    ///
    /// # Errors
    /// When the key is revoked.
    pub async fn disable(&self, caller: &Caller, id: KeyId) -> Result<View, Refusal> {
        let disabled = self.change(caller, id, Action::KeyDisabled, None, |key, now| {
            not_revoked(key)?;
            Ok(if key.disabled_at.replace(now).is_none() { Edit::Changed } else { Edit::AsItWas })
        });
        match disabled.await {
            Ok(changed) => changed.now(),
            Err(refusal) => Err(self.refused_here(caller, id, refusal, Reason::Disabled)),
        }
    }

    /// Where the store could not be asked, the key is refused by this process all the same: somebody wants it
    /// stopped, and the record in memory says whose it is.
    fn refused_here(&self, caller: &Caller, id: KeyId, refusal: Refusal, stop: Reason) -> Refusal {
        let known = match refusal {
            Refusal::Unavailable => self.engine.index.with_id(id),
            _ => None,
        };
        let Some(known) = known.filter(|key| caller.sees(key.owner())) else { return refusal };
        if let Err(refusal) = self.may_write(caller, known.owner()) {
            return refusal;
        }
        self.engine.index.stop(id, stop);
        Refusal::NotRecorded { full: false }
    }

    /// Ends what `disable` began.
    ///
    /// # Errors
    /// When the key is revoked, or the caller could not give its grants.
    pub async fn enable(&self, caller: &Caller, id: KeyId) -> Result<View, Refusal> {
        self.change(caller, id, Action::KeyEnabled, None, |key, _| {
            not_revoked(key)?;
            self.may_give(caller, &key.owner, &key.environment, &key.terms)?;
            // A disabling that was not recorded ends with this too.
            self.engine.index.enable(key.id);
            Ok(if key.disabled_at.take().is_some() { Edit::Changed } else { Edit::AsItWas })
        })
        .await?
        .now()
    }

    /// Refuses a key for ever.
    ///
    /// # Errors
    /// When it does not exist for the caller.
    pub async fn revoke(
        &self,
        caller: &Caller,
        id: KeyId,
        reason: RevokeReason,
        comment: String,
    ) -> Result<View, Refusal> {
        let revoked = self.change(caller, id, Action::KeyRevoked, None, |key, now| {
            if key.revocation.is_some() {
                return Ok(Edit::AsItWas);
            }
            key.revocation = Some(Revocation { at: now, reason, comment: comment.clone() });
            Ok(Edit::Changed)
        });
        match revoked.await {
            Ok(changed) => changed.now(),
            Err(refusal) => Err(self.refused_here(caller, id, refusal, Reason::Revoked)),
        }
    }

    /// Gives a key a new token.
    ///
    /// # Errors
    /// When the key is not active, or the caller could not give its grants.
    pub async fn rotate(
        &self,
        caller: &Caller,
        id: KeyId,
        overlap: Duration,
        once: Option<Once>,
    ) -> Result<Issued, Refusal> {
        // Whose key it is comes first: a replay must not tell a stranger's id from none.
        let stored = self.visible(caller, id).await?;
        self.may_write(caller, &stored.key.owner)?;
        if let Some((done, _)) = self.done_before(caller, once.as_ref()).await? {
            return Ok(done);
        }
        let random_bytes = random(&*self.entropy)?;
        let mut token = None;
        let changed = self
            .change(caller, id, Action::KeyRotated, once, |key, now| {
                active(key, now)?;
                self.may_give(caller, &key.owner, &key.environment, &key.terms)?;
                let environment = self.settings.environments.get(key.environment.as_str());
                let environment = environment.ok_or_else(|| environment_gone(key))?;
                let prefix =
                    prefix_kept(key.hint(), environment).unwrap_or_else(|| self.settings.prefix.clone());
                let new = Token::generate(&prefix, &environment.tag, &random_bytes);
                key.rotate(new.digest(), new.hint(), overlap, now);
                token = Some(new);
                Ok(Edit::Changed)
            })
            .await?;
        match changed {
            Changed::Now(view) => Ok(Issued { view: *view, token }),
            Changed::Before(id) => self.replay(caller, id).await.map(|(issued, _)| issued),
        }
    }

    /// Ends a rotation's overlap.
    ///
    /// # Errors
    /// When the key is revoked.
    pub async fn finish_rotation(&self, caller: &Caller, id: KeyId) -> Result<View, Refusal> {
        self.change(caller, id, Action::KeyRotationFinished, None, |key, now| {
            not_revoked(key)?;
            if !key.overlapping(now) {
                return Ok(Edit::AsItWas);
            }
            key.finish_rotation(now);
            Ok(Edit::Changed)
        })
        .await?
        .now()
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

    /// Revokes the key of whoever holds one of its living tokens, whatever else stands against it: proof is
    /// possession, and a retry after success proves it still.
    ///
    /// # Errors
    /// When the change is not recorded.
    pub async fn revoke_self(
        &self,
        holder: &Holder,
        method: &'static str,
        peer: Option<IpAddr>,
        request_id: Option<String>,
    ) -> Result<View, Refusal> {
        let caller = Caller {
            proof: Proof::Key(holder.key.clone()),
            account: holder.key.owner().account().cloned().unwrap_or_else(AccountId::nowhere),
            grants: ScopeSet::default(),
            acting_user: None,
            named_user: None,
            method,
            peer,
            request_id,
        };
        let comment = "revoked by its holder".to_owned();
        self.revoke(&caller, holder.key.id(), RevokeReason::Unspecified, comment).await
    }
}

/// What a change of a key takes away.
fn reach(after: &Key, before: &Key, edit: &Edit) -> Reach {
    match edit {
        _ if after.narrows(before) => Reach::Narrows { again: false },
        Edit::Repeats => Reach::Narrows { again: true },
        Edit::Changed | Edit::AsItWas => Reach::Widens,
    }
}

/// A change that was made now, or under the same idempotency key before.
enum Changed {
    Now(Box<View>),
    Before(KeyId),
}

impl Changed {
    /// Only a change with an idempotency key can have been made before.
    fn now(self) -> Result<View, Refusal> {
        match self {
            Changed::Now(view) => Ok(*view),
            Changed::Before(_) => Err(Refusal::Contended),
        }
    }
}

fn first_secret(token: &Token, now: Timestamp) -> Secret {
    Secret { version: 1, digest: token.digest(), hint: token.hint(), created_at: now, expires_at: None }
}

/// The prefix of a key's newest token, read from its hint: `{prefix}_{tag}_{4 characters}`. None where the
/// token is not of our making.
fn prefix_kept(hint: &str, environment: &Environment) -> Option<TokenPrefix> {
    let start = hint.get(..hint.len().checked_sub(4)?)?.strip_suffix('_')?;
    let prefix = match environment.tag.as_str() {
        "" => start,
        tag => start.strip_suffix(tag)?.strip_suffix('_')?,
    };
    TokenPrefix::parse(prefix).ok()
}

fn write(
    caller: &Caller,
    key: Key,
    expect: Option<Revision>,
    action: Action,
    at: Timestamp,
    once: Option<Once>,
) -> Write {
    let idempotency =
        once.map(|once| Idempotency { caller: caller.id(), key: once.key, fingerprint: once.fingerprint });
    Write {
        change: Change::Key(Arc::new(key)),
        expect,
        action,
        actor: caller.actor(),
        method: caller.method,
        at,
        idempotency,
    }
}

fn into_key(change: Change) -> Result<Key, Refusal> {
    match change {
        Change::Key(key) => Ok(Arc::unwrap_or_clone(key)),
        _ => Err(Refusal::Unavailable),
    }
}

fn not_revoked(key: &Key) -> Result<(), Refusal> {
    if key.revocation.is_none() {
        return Ok(());
    }
    let message = "the key is revoked, which is for ever; create another one";
    Err(Refusal::Precondition("KEY_REVOKED", message.to_owned()))
}

fn active(key: &Key, now: Timestamp) -> Result<(), Refusal> {
    let todo = match key.state(now) {
        State::Active => return Ok(()),
        State::Revoked => "revoked, which is for ever; create another one",
        State::Disabled => "disabled; enable it first",
        State::Expired => "expired; give it a later expires_at first",
    };
    Err(Refusal::Precondition("KEY_NOT_ACTIVE", format!("the key is {todo}")))
}

fn environment_gone(key: &Key) -> Refusal {
    let message = format!(
        "the key's environment {:?} is no longer configured; configure it again to rotate the key",
        key.environment.as_str()
    );
    Refusal::Precondition("ENVIRONMENT_NOT_CONFIGURED", message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_update_that_repeats_a_value_waits_as_the_one_before() {
        let before = crate::domain::key::tests::sample();
        let mut terms = before.terms.clone();
        terms.metadata.insert("team".to_owned(), "core".to_owned());
        let patch = |fields: &[Field]| Patch { fields: fields.to_vec(), terms: terms.clone() };
        assert!(!patch(&[Field::Metadata]).repeats(&before.terms));
        assert!(patch(&[Field::Metadata, Field::Scopes]).repeats(&before.terms));
        assert_eq!(reach(&before, &before, &Edit::Repeats), Reach::Narrows { again: true });
        assert_eq!(reach(&before, &before, &Edit::Changed), Reach::Widens);
    }

    #[test]
    fn a_rotation_keeps_the_prefix_of_the_token() {
        let environments = Environments::default();
        let production = environments.get("production").unwrap();
        let prefix = |hint| prefix_kept(hint, production).map(|prefix| prefix.to_string());
        assert_eq!(prefix("izli_sk_live_aB3d").as_deref(), Some("izli_sk"));
        assert_eq!(prefix("kw_live_aB3d").as_deref(), Some("kw"));
        for foreign in ["", "abc", "kw_staging_aB3d", "sk-1234…", "éééé"] {
            assert_eq!(prefix(foreign), None, "{foreign:?}");
        }
    }
}
