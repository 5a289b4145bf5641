//! Many keys at once: Import and BulkRevoke. Each key is a change of its own, and group commit puts many into
//! one transaction; one that fails never stops the rest.

use std::collections::HashMap;

use futures_util::{StreamExt as _, stream};

use crate::{
    access::Caller,
    domain::{
        decision::Reason,
        key::{Key, Owner, RevokeReason, Secret},
        log::Action,
        name::{KeyId, UserId},
        time::{Revision, Timestamp},
        token::Digest,
    },
    engine::usage::Pace,
    refusal::{Refusal, Thing},
    store::{Count, Hour, KeyFilter, Outcome, OwnerFilter, StoreError, StoredKey, page::PageBudget},
};

use super::{Keys, NewKey, View, into_key, write};

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
    pub async fn import(
        &self,
        caller: &Caller,
        keys: Vec<Result<ImportedKey, Refusal>>,
    ) -> Vec<Result<View, Refusal>> {
        stream::iter(keys.into_iter().map(|key| async { self.import_one(caller, key?).await }))
            .buffered(AT_ONCE)
            .collect()
            .await
    }

    async fn import_one(&self, caller: &Caller, imported: ImportedKey) -> Result<View, Refusal> {
        let ImportedKey { key, digest, hint } = imported;
        let now = key.now;
        let secret = Secret { version: 1, digest, hint, created_at: now, expires_at: None };
        let key = self.new_key(caller, &key, secret)?;
        match self.writer.write(write(caller, key, None, Action::KeyImported, now, None)).await? {
            Outcome::Applied(change) => Ok(self.view(into_key(change)?, &[])),
            Outcome::Replayed(_) => Err(Refusal::Contended),
        }
    }

    /// Revokes every key that is meant and not revoked yet, at most [`MOST_REVOKED`]. Gives what became of
    /// each.
    ///
    /// # Errors
    /// When the caller may not, or the store fails before anything was done.
    pub async fn bulk_revoke(&self, caller: &Caller, bulk: BulkRevoke) -> Result<BulkOutcome, Refusal> {
        match &bulk.filter.owner {
            OwnerFilter::AllButOperators => {
                caller.must_be_operator()?;
                if caller.acting_user.is_some() {
                    let message =
                        "nobody acts for a person over every account; leave x-keyward-acting-user out";
                    return Err(Refusal::Forbidden("ROLE_LACKS_PERMISSION", message.to_owned()));
                }
            }
            OwnerFilter::Account(account) => {
                self.engine.index.account(account).ok_or(Refusal::NotFound(Thing::Account))?;
                self.may_write(caller, &Owner::Account(account.clone()))?;
            }
            OwnerFilter::User(user) => {
                let owner = Owner::User(user.clone());
                if !caller.sees(&owner) {
                    return Err(Refusal::NotFound(Thing::Key));
                }
            }
        }
        let (stored, more) = self.read_page(&bulk.filter, None, MOST_REVOKED).await?;
        // What is recorded as revoked is not listed, and may not be in force yet, here or elsewhere.
        let mut recorded = self.store.head().await?.revision;
        self.writer.applied(recorded).await?;
        if bulk.dry_run {
            let views = stored.into_iter().map(|stored| self.view_stored(stored));
            let keys = views.map(|view| BulkRevoked { view, failure: None }).collect();
            return Ok(BulkOutcome { keys, more, recorded });
        }
        let revoked = stream::iter(stored.into_iter().map(|stored| async {
            let revoke = self.revoke(caller, stored.key.id, bulk.reason, bulk.comment.clone());
            match revoke.await {
                Ok(view) => BulkRevoked { view, failure: None },
                Err(refusal) => BulkRevoked { view: self.view_stored(stored), failure: Some(refusal) },
            }
        }));
        let keys: Vec<BulkRevoked> = revoked.buffered(AT_ONCE).collect().await;
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
        use crate::domain::key::State;
        KeyFilter {
            owner,
            environment: None,
            states: vec![State::Active, State::Disabled, State::Expired],
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
        self.may_read(caller, &stored.key.owner)?;
        self.engine.usage.flush(&*self.store, Pace::AtOnce).await?;
        let counts = self.store.usage(id, from, to).await?;
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
