//! Many keys at once: Import and BulkRevoke. Each key is a change of its own, and group commit puts many into
//! one transaction; one that fails never stops the rest.
//!
//! An answer holds for every key that it calls done. If the outcome of any is unknown, the call fails as a whole, and the
//! same call again finishes it.

use std::collections::HashMap;

use futures_util::{StreamExt as _, stream};

use crate::{
    caller::Caller,
    domain::{
        key::{ApiKey, ApiKeyState, KeyOwner, KeySecret, RevokeReason},
        log::AuditAction,
        name::{KeyId, UserId},
        policy_decision::Reason,
        time::{Revision, Timestamp},
        token::TokenDigest,
    },
    engine::usage::FlushMode,
    service_error::{ResourceKind, ServiceError, require_known_outcomes},
    store::{
        KeyFilter, OwnerFilter, StoreError, StoredKey, UsageCount, UsageHour, WriteOutcome,
        page_budget::PageBudget,
    },
};

use super::{KeyDetails, KeyOperations, NewKey, into_key};

/// How many writes of one call wait for the writer at a time: one transaction is filled while another commits.
const MAX_CONCURRENT_WRITES: usize = 512;
/// How many keys one BulkRevoke handles at the most; `more` says that there are others.
pub(crate) const MAX_BULK_REVOKE: u32 = 5000;

/// A key made elsewhere.
#[derive(Clone, Debug)]
pub(crate) struct KeyImport {
    /// The key.
    pub(crate) key: NewKey,
    /// The digest of its token.
    pub(crate) digest: TokenDigest,
    /// What lists show of its token.
    pub(crate) hint: String,
}

/// Which keys BulkRevoke means.
#[derive(Clone, Debug)]
pub(crate) struct BulkRevocation {
    /// Whose, when, where and called what.
    pub(crate) filter: KeyFilter,
    /// Say what would be revoked, and revoke nothing.
    pub(crate) dry_run: bool,
    /// Why.
    pub(crate) reason: RevokeReason,
    /// What is said of it.
    pub(crate) comment: String,
}

/// A key that Import has taken in.
#[derive(Debug)]
pub(crate) struct KeyImportResult {
    /// The key.
    pub(crate) details: KeyDetails,
    /// The same caller had imported it before.
    pub(crate) is_replay: bool,
}

/// What became of one key.
#[derive(Debug)]
pub(crate) struct KeyRevocationResult {
    /// The key, as it is now.
    pub(crate) details: KeyDetails,
    /// Why it was not revoked, if it was not.
    pub(crate) failure: Option<ServiceError>,
}

/// What became of all of them.
#[derive(Debug)]
pub(crate) struct BulkRevocationResult {
    /// Each that was not revoked yet.
    pub(crate) keys: Vec<KeyRevocationResult>,
    /// There are more.
    pub(crate) has_more: bool,
    /// The revision by which all that were meant are revoked, those included that were so before: what to wait for.
    pub(crate) wait_revision: Revision,
}

impl KeyOperations {
    /// Takes in keys made elsewhere. The results are in the order of the keys.
    ///
    /// # Errors
    /// When it is unknown whether some were imported.
    pub(crate) async fn import(
        &self,
        caller: &Caller,
        keys: Vec<Result<KeyImport, ServiceError>>,
    ) -> Result<Vec<Result<KeyImportResult, ServiceError>>, ServiceError> {
        let imports = keys.into_iter().map(|key| async { self.import_one(caller, key?).await });
        let results: Vec<_> = stream::iter(imports).buffered(MAX_CONCURRENT_WRITES).collect().await;
        require_known_outcomes(results.iter().map(|result: &Result<_, _>| result.as_ref().err()))?;
        Ok(results)
    }

    async fn import_one(
        &self,
        caller: &Caller,
        imported: KeyImport,
    ) -> Result<KeyImportResult, ServiceError> {
        let KeyImport { key, digest, hint } = imported;
        let now = key.created_at;
        let secret = KeySecret { version: 1, digest, hint, created_at: now, expires_at: None };
        match self.record_new_key(caller, &key, &secret, AuditAction::KeyImported, None).await {
            Ok(WriteOutcome::Applied(change)) => {
                Ok(KeyImportResult { details: self.key_details(into_key(change)?, &[]), is_replay: false })
            }
            Ok(WriteOutcome::Replayed(_)) => Err(ServiceError::Contended),
            Err(ServiceError::DigestTaken) => {
                let wanted = self.build_key(&mut caller.authorize(&self.engine)?, &key, secret)?;
                let view = self.find_previous_import(&digest, &wanted).await?;
                Ok(KeyImportResult { details: view.ok_or(ServiceError::DigestTaken)?, is_replay: true })
            }
            Err(refusal) => Err(refusal),
        }
    }

    /// The key with this digest, if an import of the same key by the same caller made it and nothing has changed it since:
    /// a call whose outcome was unknown is sent again.
    async fn find_previous_import(
        &self,
        digest: &TokenDigest,
        wanted: &ApiKey,
    ) -> Result<Option<KeyDetails>, ServiceError> {
        let find = || self.engine.index.find_by_digest(digest).map(|found| found.key.id());
        let id = match find() {
            Some(id) => Some(id),
            // Another replica may have recorded it.
            None => {
                self.commit_handle.wait_caught_up().await?;
                find()
            }
        };
        let Some(id) = id else { return Ok(None) };
        let stored = self.store.get_key(id).await?;
        let Some(stored) = stored.filter(|stored| is_same_import(&stored.key, wanted)) else {
            return Ok(None);
        };
        self.commit_handle.wait_applied(stored.key.revision).await?;
        Ok(Some(self.stored_key_details(stored)))
    }

    /// Revokes every key that is meant and not revoked yet, at most [`MAX_BULK_REVOKE`]. Gives what became of
    /// each.
    ///
    /// # Errors
    /// When the caller may not, the store fails before anything was done, or it is unknown whether some were revoked.
    pub(crate) async fn bulk_revoke(
        &self,
        caller: &Caller,
        bulk: BulkRevocation,
    ) -> Result<BulkRevocationResult, ServiceError> {
        match &bulk.filter.owner {
            OwnerFilter::ExceptOperator => {
                caller.require_operator()?;
                caller.require_no_acting_user()?;
            }
            OwnerFilter::Account(account) => {
                let mut asked = caller.authorize(&self.engine)?;
                asked.account(account).ok_or(ServiceError::NotFound(ResourceKind::Account))?;
                asked.check_account_visible(account)?;
                self.check_write(&mut asked, &KeyOwner::Account(account.clone()))?;
            }
            OwnerFilter::User(user) => {
                let owner = KeyOwner::User(user.clone());
                if !caller.can_see_owner(&owner) {
                    return Err(ServiceError::NotFound(ResourceKind::Key));
                }
            }
        }
        let (mut stored, more) = self.read_page(&bulk.filter, None, MAX_BULK_REVOKE).await?;
        // What is recorded as revoked is not listed, and may not be in force yet, here or elsewhere.
        let mut recorded = self.store.log_head().await?.revision;
        self.commit_handle.wait_applied(recorded).await?;
        if bulk.dry_run {
            if let OwnerFilter::Account(account) = &bulk.filter.owner {
                // A person who left meanwhile reads nothing.
                self.check_read(caller, &KeyOwner::Account(account.clone()))?;
            }
            let views = stored.into_iter().map(|stored| self.stored_key_details(stored));
            let keys = views.map(|view| KeyRevocationResult { details: view, failure: None }).collect();
            return Ok(BulkRevocationResult { keys, has_more: more, wait_revision: recorded });
        }
        let revoke = async |stored: StoredKey| match self
            .revoke(caller, stored.key.id, bulk.reason, bulk.comment.clone())
            .await
        {
            Ok(view) => KeyRevocationResult { details: view, failure: None },
            Err(refusal) => {
                KeyRevocationResult { details: self.stored_key_details(stored), failure: Some(refusal) }
            }
        };
        // The caller's own key comes last: the caller's rights end with it.
        let own = stored.iter().position(|stored| stored.key.id == caller.id());
        let own = own.map(|at| (at, stored.remove(at)));
        let mut keys: Vec<_> =
            stream::iter(stored.into_iter().map(&revoke)).buffered(MAX_CONCURRENT_WRITES).collect().await;
        // While others are left, the caller must be able to ask for them.
        if let Some((at, own)) = own.filter(|_| !more) {
            keys.insert(at, revoke(own).await);
        }
        require_known_outcomes(keys.iter().map(|key: &KeyRevocationResult| key.failure.as_ref()))?;
        let rights_ended = |key: &KeyRevocationResult| {
            matches!(key.failure, Some(ServiceError::CallerRevoked | ServiceError::MissingPermission(_)))
        };
        if keys.iter().any(rights_ended) {
            return Err(ServiceError::CallerRevoked);
        }
        recorded = recorded.max(newest_revision(keys.iter().map(|key| &key.details.key)));
        Ok(BulkRevocationResult { keys, has_more: more, wait_revision: recorded })
    }

    /// Revokes every key of a user who is no member anywhere any more. Gives the newest revision, zero if there
    /// was none to revoke; and the one by which all of them are revoked, whoever did it.
    ///
    /// # Errors
    /// When the store fails; what was revoked stays so.
    pub(crate) async fn revoke_all_of_user(
        &self,
        caller: &Caller,
        user: &UserId,
    ) -> Result<(Revision, Revision), ServiceError> {
        // The person acted for ended the membership; the keys end with it, whoever's they are.
        let named_user = caller.acting_user.clone();
        let caller = Caller { acting_user: None, logged_user: named_user, ..caller.clone() };
        let filter = self.unrevoked_keys_filter(OwnerFilter::User(user.clone()));
        let comment = "the user was removed from the last account".to_owned();
        let bulk = BulkRevocation { filter, dry_run: false, reason: RevokeReason::OwnerLeft, comment };
        let mut newest = Revision::default();
        loop {
            let BulkRevocationResult { keys, has_more: more, wait_revision: recorded } =
                self.bulk_revoke(&caller, bulk.clone()).await?;
            for key in keys {
                key.failure.map_or(Ok(()), Err)?;
                newest = newest.max(key.details.key.revision);
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
            let step = budget.next_step_size();
            let read = self.store.list_keys(filter, last, step + 1).await?;
            let more = read.len() > step as usize;
            for stored in read.into_iter().take(step as usize) {
                if !budget.try_add(estimate_size(&stored.key)) {
                    return Ok((page, true));
                }
                page.push(stored);
            }
            if !more || budget.next_step_size() == 0 {
                return Ok((page, more));
            }
        }
    }

    /// The keys of an owner that are not revoked.
    fn unrevoked_keys_filter(&self, owner: OwnerFilter) -> KeyFilter {
        KeyFilter {
            owner,
            environment: None,
            states: ApiKeyState::UNREVOKED.to_vec(),
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
    pub(crate) async fn usage_by_interval(
        &self,
        caller: &Caller,
        id: KeyId,
        from: UsageHour,
        to: UsageHour,
        hours: u32,
    ) -> Result<Vec<(Timestamp, HashMap<Reason, u64>)>, ServiceError> {
        let stored = self.find_visible(caller, id).await?;
        self.engine.usage.flush(&*self.store, FlushMode::Immediate).await?;
        let counts = self.store.list_usage(id, from, to).await?;
        self.check_read(caller, &stored.key.owner)?;
        let step = i64::from(hours.max(1));
        let mut buckets: Vec<(Timestamp, HashMap<Reason, u64>)> = Vec::new();
        for UsageCount { hour, reason, count, .. } in counts {
            let start = UsageHour(from.0 + (hour.0 - from.0).div_euclid(step) * step).start();
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
fn is_same_import(stored: &ApiKey, wanted: &ApiKey) -> bool {
    let life = |key: &ApiKey| key.spec.expires_at.map(|end| end.saturating_duration_since(key.created_at));
    let mut again = ApiKey {
        id: stored.id,
        created_at: stored.created_at,
        updated_at: stored.created_at,
        revision: stored.revision,
        ..wanted.clone()
    };
    again.secrets.iter_mut().for_each(|secret| secret.created_at = stored.created_at);
    if life(stored) == life(wanted) {
        again.spec.expires_at = stored.spec.expires_at;
    }
    *stored == again
}

/// About how many bytes a key takes in an answer.
fn estimate_size(key: &ApiKey) -> usize {
    const REST: usize = 512;
    let terms = &key.spec;
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
pub(crate) fn newest_revision<'a>(keys: impl IntoIterator<Item = &'a ApiKey>) -> Revision {
    keys.into_iter().map(|key| key.revision).max().unwrap_or_default()
}
