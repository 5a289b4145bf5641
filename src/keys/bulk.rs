//! Bulk operations on keys: Import and BulkRevoke.
//!
//! Each key is a separate change, and group commit puts many into one transaction. A key that fails does not stop the
//! others.
//!
//! Invariant: a response is true for every key that it lists as done. If any outcome is unknown, the whole call fails,
//! and repeating it finishes the work.

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

/// Writes of one call that wait for the writer at a time: one transaction fills while another commits.
const MAX_CONCURRENT_WRITES: usize = 512;
/// Keys that one BulkRevoke call handles.
pub(crate) const MAX_BULK_REVOKE: u32 = 5000;

/// A key that was issued elsewhere.
#[derive(Clone, Debug)]
pub(crate) struct KeyImport {
    pub(crate) key: NewKey,
    /// SHA-256 of the token.
    pub(crate) digest: TokenDigest,
    /// The part of the token that lists show.
    pub(crate) hint: String,
}

#[derive(Clone, Debug)]
pub(crate) struct BulkRevocation {
    /// Selects the keys.
    pub(crate) filter: KeyFilter,
    /// Returns the selected keys without revoking them.
    pub(crate) dry_run: bool,
    pub(crate) reason: RevokeReason,
    /// The comment for the audit log.
    pub(crate) comment: String,
}

/// The result of importing one key.
#[derive(Debug)]
pub(crate) struct KeyImportResult {
    pub(crate) details: KeyDetails,
    /// The same caller had imported the key before.
    pub(crate) is_replay: bool,
}

/// The result of revoking one key.
#[derive(Debug)]
pub(crate) struct KeyRevocationResult {
    /// The key after the call.
    pub(crate) details: KeyDetails,
    /// Why the key was not revoked.
    pub(crate) failure: Option<ServiceError>,
}

#[derive(Debug)]
pub(crate) struct BulkRevocationResult {
    /// The selected keys that were not revoked before.
    pub(crate) keys: Vec<KeyRevocationResult>,
    /// More keys are selected than one call handles.
    pub(crate) has_more: bool,
    /// The revision at which all selected keys are revoked, including those revoked before: what to wait for.
    pub(crate) wait_revision: Revision,
}

impl KeyOperations {
    /// Imports keys that were issued elsewhere. The results are in the order of the keys.
    ///
    /// Fails if it is unknown whether some keys were imported.
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
            Err(error) => Err(error),
        }
    }

    /// Finds the key with this digest, if the same caller imported the same key before and nothing has changed it
    /// since. A client repeats a call whose outcome is unknown.
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

    /// Revokes the selected keys that are not revoked yet, at most [`MAX_BULK_REVOKE`].
    ///
    /// Fails if the caller may not, the store fails before anything was done, or it is unknown whether some keys were
    /// revoked.
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
                let mut authorization = caller.authorize(&self.engine)?;
                authorization.account(account).ok_or(ServiceError::NotFound(ResourceKind::Account))?;
                authorization.check_account_visible(account)?;
                self.check_write(&mut authorization, &KeyOwner::Account(account.clone()))?;
            }
            OwnerFilter::User(user) => {
                let owner = KeyOwner::User(user.clone());
                if !caller.can_see_owner(&owner) {
                    return Err(ServiceError::NotFound(ResourceKind::Key));
                }
            }
        }
        let (mut stored, more) = self.read_page(&bulk.filter, None, MAX_BULK_REVOKE).await?;
        // Keys recorded as revoked are not listed, but may not be in force yet, here or on other replicas.
        let mut recorded = self.store.log_head().await?.revision;
        self.commit_handle.wait_applied(recorded).await?;
        if bulk.dry_run {
            if let OwnerFilter::Account(account) = &bulk.filter.owner {
                // An acting user that left meanwhile must read nothing.
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
            Err(error) => {
                KeyRevocationResult { details: self.stored_key_details(stored), failure: Some(error) }
            }
        };
        // Revoke the caller's own key last: the caller's rights end with it.
        let own = stored.iter().position(|stored| stored.key.id == caller.id());
        let own = own.map(|at| (at, stored.remove(at)));
        let mut keys: Vec<_> =
            stream::iter(stored.into_iter().map(&revoke)).buffered(MAX_CONCURRENT_WRITES).collect().await;
        // While other keys are left, the caller must be able to call again.
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

    /// Revokes every key of a user without memberships. Returns the newest revocation, zero if there was none, and the
    /// revision at which all keys are revoked, including earlier revocations.
    ///
    /// Fails if the store fails; earlier revocations stay.
    pub(crate) async fn revoke_all_of_user(
        &self,
        caller: &Caller,
        user: &UserId,
    ) -> Result<(Revision, Revision), ServiceError> {
        // The acting user ended the membership; the keys end with it, whatever their owner.
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

    /// Reads at most `size` keys before `before`, as many as fit in one response. Returns whether there are more.
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

    /// A filter for the unrevoked keys of an owner.
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

    /// Counts how often a key was allowed and denied, in steps of `hours`.
    ///
    /// Fails if the key does not exist for the caller, or the store fails.
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

/// Whether a key is unchanged since its import, and importing it now would give the same record. An expiry at the same
/// distance from creation comes from the same `ttl`.
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

/// Estimates the bytes of a key in a response.
fn estimate_size(key: &ApiKey) -> usize {
    const REST: usize = 512;
    let spec = &key.spec;
    let scopes: usize = spec.scopes.iter().map(|scope| scope.as_str().len() + 2).sum();
    let customers: usize = spec.customers.iter().map(|customer| customer.as_str().len() + 2).sum();
    let metadata: usize = spec.metadata.iter().map(|(name, value)| name.len() + value.len() + 6).sum();
    let name = spec.name.as_ref().map_or(0, |name| name.as_str().len());
    let lists = spec.roles.len() * 66 + spec.allowed_cidrs.len() * 45 + spec.rate_limits.len() * 90;
    let comment = key.revocation.as_ref().map_or(0, |revocation| revocation.comment.len());
    REST + scopes + customers + metadata + name + lists + comment
}

/// The newest revision among these keys, zero if there are none.
#[must_use]
pub(crate) fn newest_revision<'a>(keys: impl IntoIterator<Item = &'a ApiKey>) -> Revision {
    keys.into_iter().map(|key| key.revision).max().unwrap_or_default()
}
