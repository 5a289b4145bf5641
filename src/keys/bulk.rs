//! Many keys at once: Import and BulkRevoke. Each key is a change of its own, and group commit puts many into
//! one transaction; one that fails never stops the rest.
//!
//! An answer holds for every key that it calls done. If the outcome of any is unknown, the call fails as a whole, and the
//! same call again finishes it.

use std::collections::HashMap;

use futures_util::{StreamExt as _, stream};

use crate::{
    access::Caller,
    domain::{
        decision::Reason,
        key::{Key, Owner, RevokeReason, Secret, State},
        log::Action,
        name::{KeyId, UserId},
        time::{Revision, Timestamp},
        token::Digest,
    },
    engine::usage::Pace,
    refusal::{Refusal, Thing, all_known},
    store::{Count, Hour, KeyFilter, Outcome, OwnerFilter, StoreError, StoredKey, page::PageBudget},
};

use super::{Keys, NewKey, View, into_key};

/// How many writes of one call wait for the writer at a time: one transaction is filled while another commits.
const AT_ONCE: usize = 512;
/// How many keys one BulkRevoke handles at the most; `more` says that there are others.
pub const MOST_REVOKED: u32 = 5000;

/// A key made elsewhere.
#[derive(Clone, Debug)]
pub struct ImportedKey {
    /// The key.
    pub key: NewKey,
    /// The digest of its token.
    pub digest: Digest,
    /// What lists show of its token.
    pub hint: String,
}

/// Which keys BulkRevoke means.
#[derive(Clone, Debug)]
pub struct BulkRevoke {
    /// Whose, when, where and called what.
    pub filter: KeyFilter,
    /// Say what would be revoked, and revoke nothing.
    pub dry_run: bool,
    /// Why.
    pub reason: RevokeReason,
    /// What is said of it.
    pub comment: String,
}

/// A key that Import has taken in.
#[derive(Debug)]
pub struct Imported {
    /// The key.
    pub view: View,
    /// The same caller had imported it before.
    pub replayed: bool,
}

/// What became of one key.
#[derive(Debug)]
pub struct BulkRevoked {
    /// The key, as it is now.
    pub view: View,
    /// Why it was not revoked, if it was not.
    pub failure: Option<Refusal>,
}

/// What became of all of them.
#[derive(Debug)]
pub struct BulkOutcome {
    /// Each that was not revoked yet.
    pub keys: Vec<BulkRevoked>,
    /// There are more.
    pub more: bool,
    /// The revision by which all that were meant are revoked, those included that were so before: what to wait for.
    pub recorded: Revision,
}

impl Keys {
    /// Takes in keys made elsewhere. The results are in the order of the keys.
    ///
    /// # Errors
    /// When it is unknown whether some were imported.
    pub async fn import(
        &self,
        caller: &Caller,
        keys: Vec<Result<ImportedKey, Refusal>>,
    ) -> Result<Vec<Result<Imported, Refusal>>, Refusal> {
        let imports = keys.into_iter().map(|key| async { self.import_one(caller, key?).await });
        let results: Vec<_> = stream::iter(imports).buffered(AT_ONCE).collect().await;
        all_known(results.iter().map(|result: &Result<_, _>| result.as_ref().err()))?;
        Ok(results)
    }

    async fn import_one(&self, caller: &Caller, imported: ImportedKey) -> Result<Imported, Refusal> {
        let ImportedKey { key, digest, hint } = imported;
        let now = key.now;
        let secret = Secret { version: 1, digest, hint, created_at: now, expires_at: None };
        match self.make(caller, &key, &secret, Action::KeyImported, None).await {
            Ok(Outcome::Applied(change)) => {
                Ok(Imported { view: self.view(into_key(change)?, &[]), replayed: false })
            }
            Ok(Outcome::Replayed(_)) => Err(Refusal::Contended),
            Err(Refusal::DigestTaken) => {
                let wanted = self.new_key(&mut caller.authorize(&self.engine)?, &key, secret)?;
                let view = self.imported_before(&digest, &wanted).await?;
                Ok(Imported { view: view.ok_or(Refusal::DigestTaken)?, replayed: true })
            }
            Err(refusal) => Err(refusal),
        }
    }

    /// The key with this digest, if an import of the same key by the same caller made it and nothing has changed it since:
    /// a call whose outcome was unknown is sent again.
    async fn imported_before(&self, digest: &Digest, wanted: &Key) -> Result<Option<View>, Refusal> {
        let find = || self.engine.index.find(digest).map(|found| found.key.id());
        let id = match find() {
            Some(id) => Some(id),
            // Another replica may have recorded it.
            None => {
                self.writer.caught_up().await?;
                find()
            }
        };
        let Some(id) = id else { return Ok(None) };
        let stored = self.store.key(id).await?;
        let Some(stored) = stored.filter(|stored| is_same_import(&stored.key, wanted)) else {
            return Ok(None);
        };
        self.writer.applied(stored.key.revision).await?;
        Ok(Some(self.view_stored(stored)))
    }

    /// Revokes every key that is meant and not revoked yet, at most [`MOST_REVOKED`]. Gives what became of
    /// each.
    ///
    /// # Errors
    /// When the caller may not, the store fails before anything was done, or it is unknown whether some were revoked.
    pub async fn bulk_revoke(&self, caller: &Caller, bulk: BulkRevoke) -> Result<BulkOutcome, Refusal> {
        match &bulk.filter.owner {
            OwnerFilter::AllButOperators => {
                caller.must_be_operator()?;
                caller.must_act_for_itself()?;
            }
            OwnerFilter::Account(account) => {
                let mut asked = caller.authorize(&self.engine)?;
                asked.account(account).ok_or(Refusal::NotFound(Thing::Account))?;
                asked.may_know(account)?;
                self.may_write(&mut asked, &Owner::Account(account.clone()))?;
            }
            OwnerFilter::User(user) => {
                let owner = Owner::User(user.clone());
                if !caller.sees(&owner) {
                    return Err(Refusal::NotFound(Thing::Key));
                }
            }
        }
        let (mut stored, more) = self.read_page(&bulk.filter, None, MOST_REVOKED).await?;
        // What is recorded as revoked is not listed, and may not be in force yet, here or elsewhere.
        let mut recorded = self.store.head().await?.revision;
        self.writer.applied(recorded).await?;
        if bulk.dry_run {
            if let OwnerFilter::Account(account) = &bulk.filter.owner {
                // A person who left meanwhile reads nothing.
                self.may_read(caller, &Owner::Account(account.clone()))?;
            }
            let views = stored.into_iter().map(|stored| self.view_stored(stored));
            let keys = views.map(|view| BulkRevoked { view, failure: None }).collect();
            return Ok(BulkOutcome { keys, more, recorded });
        }
        let revoke = async |stored: StoredKey| match self
            .revoke(caller, stored.key.id, bulk.reason, bulk.comment.clone())
            .await
        {
            Ok(view) => BulkRevoked { view, failure: None },
            Err(refusal) => BulkRevoked { view: self.view_stored(stored), failure: Some(refusal) },
        };
        // The caller's own key comes last: the caller's rights end with it.
        let own = stored.iter().position(|stored| stored.key.id == caller.id());
        let own = own.map(|at| (at, stored.remove(at)));
        let mut keys: Vec<_> =
            stream::iter(stored.into_iter().map(&revoke)).buffered(AT_ONCE).collect().await;
        // While others are left, the caller must be able to ask for them.
        if let Some((at, own)) = own.filter(|_| !more) {
            keys.insert(at, revoke(own).await);
        }
        all_known(keys.iter().map(|key: &BulkRevoked| key.failure.as_ref()))?;
        let rights_ended = |key: &BulkRevoked| {
            matches!(key.failure, Some(Refusal::CallerRevoked | Refusal::PermissionMissing(_)))
        };
        if keys.iter().any(rights_ended) {
            return Err(Refusal::CallerRevoked);
        }
        recorded = recorded.max(newest(keys.iter().map(|key| &key.view.key)));
        Ok(BulkOutcome { keys, more, recorded })
    }

    /// Revokes every key of a user who is no member anywhere any more. Gives the newest revision, zero if there
    /// was none to revoke; and the one by which all of them are revoked, whoever did it.
    ///
    /// # Errors
    /// When the store fails; what was revoked stays so.
    pub async fn revoke_all_of(
        &self,
        caller: &Caller,
        user: &UserId,
    ) -> Result<(Revision, Revision), Refusal> {
        // The person acted for ended the membership; the keys end with it, whoever's they are.
        let named_user = caller.acting_user.clone();
        let caller = Caller { acting_user: None, named_user, ..caller.clone() };
        let filter = self.everything_of(OwnerFilter::User(user.clone()));
        let comment = "the user was removed from the last account".to_owned();
        let bulk = BulkRevoke { filter, dry_run: false, reason: RevokeReason::OwnerLeft, comment };
        let mut newest = Revision::default();
        loop {
            let BulkOutcome { keys, more, recorded } = self.bulk_revoke(&caller, bulk.clone()).await?;
            for key in keys {
                key.failure.map_or(Ok(()), Err)?;
                newest = newest.max(key.view.key.revision);
            }
            if !more {
                return Ok((newest, recorded));
            }
        }
    }

    /// At most `size` keys before `before`, as many as one answer can hold, and whether there are more.
    pub(super) async fn read_page(
        &self,
        filter: &KeyFilter,
        before: Option<KeyId>,
        size: u32,
    ) -> Result<(Vec<StoredKey>, bool), StoreError> {
        let (mut budget, mut page) = (PageBudget::new(size), Vec::<StoredKey>::new());
        loop {
            let last = page.last().map(|stored| stored.key.id).or(before);
            let step = budget.step();
            let read = self.store.keys(filter, last, step + 1).await?;
            let more = read.len() > step as usize;
            for stored in read.into_iter().take(step as usize) {
                if !budget.take(about(&stored.key)) {
                    return Ok((page, true));
                }
                page.push(stored);
            }
            if !more || budget.step() == 0 {
                return Ok((page, more));
            }
        }
    }

    /// The keys of an owner that are not revoked.
    fn everything_of(&self, owner: OwnerFilter) -> KeyFilter {
        KeyFilter {
            owner,
            environment: None,
            states: State::NOT_REVOKED.to_vec(),
            name_prefix: String::new(),
            unused_since: None,
            expires_before: None,
            created_before: None,
            now: self.clock.now(),
        }
    }

    /// How often a key was allowed and denied, in steps of `hours`.
    ///
    /// # Errors
    /// When the key does not exist for the caller, or the store fails.
    pub async fn usage(
        &self,
        caller: &Caller,
        id: KeyId,
        from: Hour,
        to: Hour,
        hours: u32,
    ) -> Result<Vec<(Timestamp, HashMap<Reason, u64>)>, Refusal> {
        let stored = self.visible(caller, id).await?;
        self.engine.usage.flush(&*self.store, Pace::AtOnce).await?;
        let counts = self.store.usage(id, from, to).await?;
        self.may_read(caller, &stored.key.owner)?;
        let step = i64::from(hours.max(1));
        let mut buckets: Vec<(Timestamp, HashMap<Reason, u64>)> = Vec::new();
        for Count { hour, reason, count, .. } in counts {
            let start = Hour(from.0 + (hour.0 - from.0).div_euclid(step) * step).start();
            if buckets.last().is_none_or(|(last, _)| *last != start) {
                buckets.push((start, HashMap::new()));
            }
            if let Some((_, bucket)) = buckets.last_mut() {
                *bucket.entry(reason).or_default() += count;
            }
        }
        Ok(buckets)
    }
}

/// Whether a key is as its import made it, and would be made the same now. An expiry that is as far away as it was then
/// comes of the same `ttl`.
fn is_same_import(stored: &Key, wanted: &Key) -> bool {
    let life = |key: &Key| key.terms.expires_at.map(|end| end.since(key.created_at));
    let mut again = Key {
        id: stored.id,
        created_at: stored.created_at,
        updated_at: stored.created_at,
        revision: stored.revision,
        ..wanted.clone()
    };
    again.secrets.iter_mut().for_each(|secret| secret.created_at = stored.created_at);
    if life(stored) == life(wanted) {
        again.terms.expires_at = stored.terms.expires_at;
    }
    *stored == again
}

/// About how many bytes a key takes in an answer.
fn about(key: &Key) -> usize {
    const REST: usize = 512;
    let terms = &key.terms;
    let scopes: usize = terms.scopes.iter().map(|scope| scope.as_str().len() + 2).sum();
    let customers: usize = terms.customers.iter().map(|customer| customer.as_str().len() + 2).sum();
    let metadata: usize = terms.metadata.iter().map(|(name, value)| name.len() + value.len() + 6).sum();
    let name = terms.name.as_ref().map_or(0, |name| name.as_str().len());
    let lists = terms.roles.len() * 66 + terms.allowed_cidrs.len() * 45 + terms.rate_limits.len() * 90;
    let comment = key.revocation.as_ref().map_or(0, |revocation| revocation.comment.len());
    REST + scopes + customers + metadata + name + lists + comment
}

/// The newest revision of a bulk's keys.
#[must_use]
pub fn newest<'a>(keys: impl IntoIterator<Item = &'a Key>) -> Revision {
    keys.into_iter().map(|key| key.revision).max().unwrap_or_default()
}
