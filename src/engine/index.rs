//! Holds every key and account in memory, and finds keys by digest.
//!
//! Keys are in `index/key_table.rs`: compact records in blocks (`key_block.rs`, with `interner.rs` and
//! `sparse_column.rs`), in a segmented array (`block_array.rs`), behind a table of digests (`digest_table.rs`).
//! Accounts, roles and members are fewer; they are in maps.
//!
//! Only two sources change the index: the first snapshot, and log entries in revision order. Readers take no lock and
//! never wait for a writer. A changed record is visible before the revision that contains it.
//!
//! A revoked key keeps only what a Check needs to answer REVOKED. Keys and secrets leave the index once the retention
//! has passed since their revocation or supersession; then they are unknown.

mod block_array;
mod bulk_load;
mod cold_fields;
mod digest_table;
mod interner;
mod key_block;
mod key_table;
mod sparse_column;

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
};

use arc_swap::ArcSwap;

pub use key_block::KeyRef;

use self::key_table::KeyTable;
use super::key_limits::KeyLimitState;

use crate::{
    domain::{
        account::{Account, AccountMember, Role},
        key::ApiKey,
        key_attributes::KeyAttributes as _,
        log::{LogEntry, RecordChange},
        name::{AccountId, KeyId, RoleName, UserId},
        policy_decision::Reason,
        scope::ScopeSet,
        time::{Revision, Timestamp},
        token::TokenDigest,
    },
    store::{SnapshotLoader, SnapshotPart, SnapshotRecord, WriteRequest, group_commit::ChangeListener},
};

/// A key that was found, with everything that a decision needs.
#[derive(Clone, Debug)]
pub struct FoundKey {
    /// The key as it is recorded.
    pub key: KeyRef,
    /// The version of the secret that has the digest.
    pub secret_version: u32,
    /// The state of its limits, if it has any.
    pub limit_state: Option<Arc<KeyLimitState>>,
    /// A more restrictive record that may have been committed in place of `key`.
    pub uncertain_record: Option<Arc<ApiKey>>,
    /// `Revoked` or `Disabled`, if a caller wanted that while the store was unreachable.
    pub local_denial: Option<Reason>,
}

/// The hash has a random seed per process, so that clients cannot choose IDs that collide.
type ConcurrentMap<K, V> = papaya::HashMap<K, V, foldhash::fast::RandomState>;

/// Every key, account, role and member.
#[derive(Default)]
pub struct Index {
    keys: ArcSwap<KeyTable>,
    /// The state of limits, for keys that have any and have used them.
    limit_states: ConcurrentMap<KeyId, Arc<KeyLimitState>>,
    accounts: ConcurrentMap<AccountId, Arc<Account>>,
    /// By account and name; a global role has no account.
    roles: ConcurrentMap<(Option<AccountId>, RoleName), Arc<Role>>,
    members: ConcurrentMap<(AccountId, UserId), Arc<AccountMember>>,
    uncertain_changes: Mutex<UncertainChanges>,
    /// The number of uncertain changes. It is almost always 0, and then readers skip the lock.
    uncertain_count: AtomicUsize,
    /// The newest applied revision plus one; 0 until the first snapshot is loaded.
    next_revision: AtomicU64,
    /// Counts the events that no revision shows: the index was cleared, after which the same revisions may belong to
    /// another history; or a change became uncertain.
    ///
    /// It is incremented after the event: a reader that sees the new value also sees the event.
    generation: AtomicU64,
}

/// Identifies the contents of the index. Equal versions imply identical contents, except for entries
/// evicted after the retention period.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IndexVersion {
    next_revision: u64,
    generation: u64,
}

/// Changes that may have been committed.
///
/// Each has the revision of the record that it was based on; zero if there was none. Only a newer record resolves it:
/// an older one may still arrive from another replica.
#[derive(Default)]
struct UncertainChanges {
    keys: HashMap<KeyId, Arc<ApiKey>>,
    local_denials: HashMap<KeyId, Reason>,
    accounts: HashMap<AccountId, Arc<Account>>,
    roles: HashMap<(Option<AccountId>, RoleName), Revision>,
    members: HashMap<(AccountId, UserId), Revision>,
}

impl UncertainChanges {
    fn len(&self) -> usize {
        let records = self.keys.len() + self.accounts.len() + self.roles.len() + self.members.len();
        records + self.local_denials.len()
    }
}

fn role_id(role: &Role) -> (Option<AccountId>, RoleName) {
    (role.account.clone(), role.name.clone())
}

fn member_id(member: &AccountMember) -> (AccountId, UserId) {
    (member.account.clone(), member.user.clone())
}

impl std::fmt::Debug for Index {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Index").field("keys", &self.len()).finish_non_exhaustive()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    // The data is consistent between any two statements that could panic.
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

impl Index {
    /// The newest applied revision; `None` until the first snapshot is loaded.
    #[must_use]
    pub fn revision(&self) -> Option<Revision> {
        self.next_revision.load(Ordering::Acquire).checked_sub(1).map(Revision)
    }

    /// The version of the contents; `None` before the first load, and while any change is uncertain.
    ///
    /// A key that is found after this call belongs to that version or a later one.
    #[must_use]
    pub fn version(&self) -> Option<IndexVersion> {
        let generation = self.generation.load(Ordering::Acquire);
        let next_revision = self.next_revision.load(Ordering::Acquire);
        let certain = next_revision > 0 && self.uncertain_count.load(Ordering::Acquire) == 0;
        certain.then_some(IndexVersion { next_revision, generation })
    }

    /// The number of keys, including revoked ones.
    #[must_use]
    pub fn len(&self) -> usize {
        self.keys.load().len()
    }

    /// Returns whether the index holds no key.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Finds the key that has a secret with this digest.
    #[must_use]
    pub fn find_by_digest(&self, digest: &TokenDigest) -> Option<FoundKey> {
        let find = || self.keys.load().find_by_digest(digest);
        // The record is read under the lock: a change that is resolved concurrently is seen either as
        // uncertain or as the record.
        let find_uncertain = |uncertain: &UncertainChanges| {
            let found = find();
            let id = found.as_ref().map(|(key, _)| key.id());
            let uncertain_record = id.and_then(|id| uncertain.keys.get(&id).cloned());
            let local_denial = id.and_then(|id| uncertain.local_denials.get(&id).copied());
            Some((found, uncertain_record, local_denial))
        };
        let (found, uncertain_record, local_denial) =
            self.lookup_uncertain(find_uncertain).unwrap_or_else(|| (find(), None, None));
        let (key, version) = found?;
        let limit_state = key.is_limited().then(|| self.limit_state(key.id()));
        Some(FoundKey { key, secret_version: version, limit_state, uncertain_record, local_denial })
    }

    /// The state of a key's limits. All its secrets share it, and it survives changes of the record.
    fn limit_state(&self, id: KeyId) -> Arc<KeyLimitState> {
        self.limit_states.pin().get_or_insert_with(id, Arc::default).clone()
    }

    /// Finds a key by ID. Scans all keys, so it is for rare calls only.
    #[must_use]
    pub fn find_by_id(&self, id: KeyId) -> Option<KeyRef> {
        self.keys.load().iter_keys().find(|key| key.id() == id)
    }

    /// Denies a key as `Revoked` or `Disabled` while the store is unreachable, until a record confirms it
    /// or the key is enabled.
    pub fn deny_locally(&self, id: KeyId, reason: Reason) {
        let mut uncertain = lock(&self.uncertain_changes);
        let local_denial = uncertain.local_denials.entry(id).or_insert(reason);
        // A revocation is final.
        *local_denial = (*local_denial).min(reason);
        self.uncertain_count.store(uncertain.len(), Ordering::Release);
        self.generation.fetch_add(1, Ordering::AcqRel);
    }

    fn lookup_uncertain<T>(&self, find: impl FnOnce(&UncertainChanges) -> Option<T>) -> Option<T> {
        if self.uncertain_count.load(Ordering::Acquire) == 0 {
            None
        } else {
            find(&lock(&self.uncertain_changes))
        }
    }

    /// The account with this ID. If a change of it is uncertain, the more restrictive record.
    #[must_use]
    pub fn account(&self, id: &AccountId) -> Option<Arc<Account>> {
        self.lookup_uncertain(|uncertain| uncertain.accounts.get(id).cloned())
            .or_else(|| self.accounts.pin().get(id).cloned())
    }

    /// Returns whether an account is suspended; `None` if it does not exist.
    ///
    /// Every Check calls this, so it does not touch a reference count, which all cores would write to.
    #[must_use]
    pub fn account_suspension(&self, id: &AccountId) -> Option<bool> {
        let suspended = |account: &Arc<Account>| account.suspended_at.is_some();
        self.lookup_uncertain(|uncertain| uncertain.accounts.get(id).map(suspended))
            .or_else(|| self.accounts.pin().get(id).map(suspended))
    }

    /// Resolves a role's name in an account: the account's own role before the global one.
    ///
    /// Returns `None` while a change is uncertain at one of the places that the look-up depends on, even if
    /// no record exists there yet.
    #[must_use]
    pub fn resolve_role(&self, account: Option<&AccountId>, name: &RoleName) -> Option<Arc<Role>> {
        let roles = self.roles.pin();
        // The map owns its keys, so each look-up clones; only service keys with roles pay for it.
        let role_key = |account: Option<&AccountId>| (account.cloned(), name.clone());
        // Uncertain changes are checked before records: one that is resolved meanwhile has published its record first.
        let is_uncertain = |account| {
            let found = self.lookup_uncertain(|uncertain| uncertain.roles.get(&role_key(account)).copied());
            found.is_some()
        };
        if let Some(account) = account {
            if is_uncertain(Some(account)) {
                return None;
            }
            if let Some(own) = roles.get(&role_key(Some(account))) {
                return Some(own.clone());
            }
        }
        if is_uncertain(None) { None } else { roles.get(&role_key(None)).cloned() }
    }

    /// A user's membership in an account. `None` while its removal or change is uncertain.
    #[must_use]
    pub fn member(&self, account: &AccountId, user: &UserId) -> Option<Arc<AccountMember>> {
        let id = (account.clone(), user.clone());
        let is_uncertain = self.lookup_uncertain(|uncertain| uncertain.members.get(&id).map(drop));
        if is_uncertain.is_some() { None } else { self.members.pin().get(&id).cloned() }
    }

    /// The record of an account, regardless of uncertain changes.
    #[must_use]
    pub fn account_record(&self, id: &AccountId) -> Option<Arc<Account>> {
        self.accounts.pin().get(id).cloned()
    }

    /// The record of a member, regardless of uncertain changes.
    #[must_use]
    pub fn member_record(&self, account: &AccountId, user: &UserId) -> Option<Arc<AccountMember>> {
        self.members.pin().get(&(account.clone(), user.clone())).cloned()
    }

    /// The record of a role with exactly this account and name, regardless of uncertain changes.
    #[must_use]
    pub fn role_record(&self, account: Option<&AccountId>, name: &RoleName) -> Option<Arc<Role>> {
        self.roles.pin().get(&(account.cloned(), name.clone())).cloned()
    }

    /// Every revoked key, with the time of its revocation.
    #[must_use]
    pub fn revoked_keys(&self) -> Vec<(KeyId, Timestamp)> {
        let keys = self.keys.load();
        let revoked = keys.iter_keys().filter_map(|key| Some((key.id(), key.revoked_at()?)));
        revoked.collect()
    }

    /// Loads one record of the first snapshot. Loading in parts is faster for many keys: see [`SnapshotLoader`].
    pub fn load_record(&self, record: SnapshotRecord) {
        match record {
            SnapshotRecord::Account(account) => self.upsert_account(Arc::new(account)),
            SnapshotRecord::Key(key, retired_secrets) => self.keys.load().load_key(&key, &retired_secrets),
            SnapshotRecord::Role(role) => self.upsert_role(Arc::new(role)),
            SnapshotRecord::Member(member) => self.upsert_member(Arc::new(member)),
            SnapshotRecord::QuotaUsage(key, usage) => self.limit_state(key).restore_usage(usage),
        }
    }

    /// Removes everything before another snapshot is loaded. Uncertain changes remain.
    pub fn clear(&self) {
        self.next_revision.store(0, Ordering::Release);
        self.generation.fetch_add(1, Ordering::AcqRel);
        self.keys.store(Arc::default());
        self.limit_states.pin().clear();
        self.accounts.pin().clear();
        self.roles.pin().clear();
        self.members.pin().clear();
    }

    /// Completes the load of a snapshot, which is as of `revision`.
    pub fn finish_load(&self, revision: Revision) {
        self.keys.load().publish();
        self.next_revision.store(revision.0 + 1, Ordering::Release);
    }

    /// Removes a disabling that was never recorded, because a caller enables the key.
    pub fn clear_local_disable(&self, id: KeyId) {
        self.update_uncertain(|uncertain| {
            if uncertain.keys.get(&id).is_some_and(|uncertain_record| uncertain_record.revocation.is_none()) {
                uncertain.keys.remove(&id);
            }
            uncertain.local_denials.retain(|of, reason| *of != id || *reason == Reason::Revoked);
        });
    }

    /// Removes a suspension that was never recorded, because a caller resumes the account.
    pub fn clear_local_suspension(&self, id: &AccountId) {
        self.update_uncertain(|uncertain| {
            uncertain.accounts.remove(id);
        });
    }

    /// Removes an uncertain change after the record that resolves it was published.
    fn update_uncertain(&self, resolve: impl FnOnce(&mut UncertainChanges)) {
        if self.uncertain_count.load(Ordering::Acquire) > 0 {
            let mut uncertain = lock(&self.uncertain_changes);
            resolve(&mut uncertain);
            self.uncertain_count.store(uncertain.len(), Ordering::Release);
        }
    }

    fn upsert_account(&self, account: Arc<Account>) {
        let id = account.id.clone();
        let suspended = account.suspended_at.map(|_| account.revision);
        self.accounts.pin().insert(id.clone(), account);
        self.update_uncertain(|uncertain| {
            // A suspension that was never recorded stays until one is recorded, or until Resume.
            let uncertain_record = uncertain.accounts.get(&id);
            if uncertain_record.is_some_and(|uncertain_record| suspended > Some(uncertain_record.revision)) {
                uncertain.accounts.remove(&id);
            }
        });
    }

    fn upsert_role(&self, role: Arc<Role>) {
        let (id, revision) = (role_id(&role), role.revision);
        self.roles.pin().insert(id.clone(), role);
        self.resolve_uncertain_role(&id, revision);
    }

    fn delete_role(&self, role: &Role) {
        let id = role_id(role);
        self.roles.pin().remove(&id);
        self.resolve_uncertain_role(&id, role.revision);
    }

    fn resolve_uncertain_role(&self, id: &(Option<AccountId>, RoleName), revision: Revision) {
        self.update_uncertain(|uncertain| {
            if uncertain.roles.get(id).is_some_and(|made_from| *made_from < revision) {
                uncertain.roles.remove(id);
            }
        });
    }

    fn upsert_member(&self, member: Arc<AccountMember>) {
        let (id, revision) = (member_id(&member), member.revision);
        self.members.pin().insert(id.clone(), member);
        self.resolve_uncertain_member(&id, revision);
    }

    fn remove_member(&self, member: &AccountMember) {
        let id = member_id(member);
        self.members.pin().remove(&id);
        self.resolve_uncertain_member(&id, member.revision);
    }

    fn resolve_uncertain_member(&self, id: &(AccountId, UserId), revision: Revision) {
        self.update_uncertain(|uncertain| {
            if uncertain.members.get(id).is_some_and(|made_from| *made_from < revision) {
                uncertain.members.remove(id);
            }
        });
    }

    fn upsert_keys<'k>(&self, keys: impl Iterator<Item = &'k ApiKey> + Clone) {
        self.keys.load().upsert(keys.clone());
        keys.for_each(|key| {
            if key.is_revoked() {
                self.limit_states.pin().remove(&key.id);
            }
            self.resolve_uncertain_key(key);
        });
    }

    /// Resolves uncertain changes of a key by its new record.
    fn resolve_uncertain_key(&self, key: &ApiKey) {
        self.update_uncertain(|uncertain| {
            // A denial that was never recorded stays until one is recorded, or until Enable.
            let is_resolved = |uncertain_record: &Arc<ApiKey>| {
                uncertain_record.revision < key.revision
                    && (uncertain_record.revocation.is_none() || key.revocation.is_some())
                    && (uncertain_record.disabled_at.is_none()
                        || key.disabled_at.is_some()
                        || key.revocation.is_some())
            };
            if uncertain.keys.get(&key.id).is_some_and(is_resolved) {
                uncertain.keys.remove(&key.id);
            }
            let is_recorded = match uncertain.local_denials.get(&key.id) {
                Some(Reason::Revoked) => key.revocation.is_some(),
                Some(_) => key.disabled_at.is_some() || key.revocation.is_some(),
                None => false,
            };
            if is_recorded {
                uncertain.local_denials.remove(&key.id);
            }
        });
    }

    fn apply_change(&self, change: &RecordChange) {
        match change {
            RecordChange::Key(key) => self.upsert_keys(std::iter::once(&**key)),
            RecordChange::Account(account) => self.upsert_account(account.clone()),
            RecordChange::Role(role) => self.upsert_role(role.clone()),
            RecordChange::RoleDeleted(role) => self.delete_role(role),
            RecordChange::Member(member) => self.upsert_member(member.clone()),
            RecordChange::MemberRemoved(member) => self.remove_member(member),
        }
    }

    /// Returns whether a change that is not applied yet restricts: a Check that the current state allows
    /// may be denied after it.
    #[must_use]
    pub fn is_restriction(&self, change: &RecordChange) -> bool {
        match change {
            RecordChange::Key(after) => {
                self.keys.load().find_previous(after).is_some_and(|before| after.restricts(&before))
            }
            RecordChange::Account(after) => {
                self.accounts.pin().get(&after.id).is_some_and(|before| after.restricts(before))
            }
            // A new role can shadow a global one of the same name.
            RecordChange::Role(after) => {
                !after.scopes.covers_all(&self.recorded_role_scopes(after.account.as_ref(), &after.name))
            }
            RecordChange::Member(after) => {
                let grants =
                    |member: &AccountMember| self.recorded_role_scopes(Some(&member.account), &member.role);
                let before = self.member_record(&after.account, &after.user);
                before.is_some_and(|before| !grants(after).covers_all(&grants(&before)))
            }
            RecordChange::RoleDeleted(_) | RecordChange::MemberRemoved(_) => true,
        }
    }

    /// The scopes of a role's name by the records, regardless of uncertain changes.
    pub(crate) fn recorded_role_scopes(&self, account: Option<&AccountId>, name: &RoleName) -> ScopeSet {
        let own = account.and_then(|account| self.role_record(Some(account), name));
        let role = own.or_else(|| self.role_record(None, name));
        role.map(|role| role.scopes.clone()).unwrap_or_default()
    }

    /// Evicts keys revoked and secrets superseded before `cutoff`. Returns how many digests were removed.
    pub fn evict(&self, cutoff: Timestamp) -> usize {
        let limit_states = self.limit_states.pin();
        self.keys.load().evict(cutoff, |id| {
            limit_states.remove(&id);
        })
    }
}

impl SnapshotLoader for Index {
    fn add_record(&self, record: SnapshotRecord) {
        self.load_record(record);
    }

    fn reserve_secrets(&self, secrets: usize) {
        self.keys.load().reserve(secrets);
    }

    /// The part keeps the current table: if the index is cleared meanwhile, what the part loads is discarded too.
    fn begin_part(&self) -> Box<dyn SnapshotPart> {
        Box::new(bulk_load::IndexSnapshotPart::new(self.keys.load_full()))
    }
}

impl ChangeListener for Index {
    fn applied_revision(&self) -> Revision {
        self.revision().unwrap_or_default()
    }

    fn apply_local(&self, entries: &[(LogEntry, RecordChange)]) {
        let applied = self.revision();
        let new =
            entries.partition_point(|(entry, _)| applied.is_some_and(|applied| entry.revision <= applied));
        let key = |change: &RecordChange| matches!(change, RecordChange::Key(_));
        for run in entries[new..].chunk_by(|(_, one), (_, next)| key(one) && key(next)) {
            match run {
                [(_, change)] => self.apply_change(change),
                keys => self.upsert_keys(keys.iter().filter_map(|(_, change)| match change {
                    RecordChange::Key(key) => Some(&**key),
                    _ => None,
                })),
            }
            if let Some((last, _)) = run.last() {
                self.next_revision.store(last.revision.0 + 1, Ordering::Release);
            }
        }
    }

    fn mark_uncertain(&self, write: &WriteRequest) {
        let made_from = write.expected_revision.unwrap_or_default();
        // The record that the change is based on may not be applied here yet: assume that the change restricts it.
        let restricts = write.expected_revision > self.revision() || self.is_restriction(&write.change);
        let mut uncertain = lock(&self.uncertain_changes);
        match write.change.clone().with_revision(made_from) {
            RecordChange::Key(after) if restricts => {
                // A weaker change must not replace a stronger denial.
                let strength = |key: &ApiKey| (key.revocation.is_some(), key.disabled_at.is_some());
                let earlier = uncertain.keys.get(&after.id);
                if earlier.is_none_or(|earlier| strength(earlier) <= strength(&after)) {
                    uncertain.keys.insert(after.id, after);
                }
            }
            RecordChange::Account(after) if restricts => {
                uncertain.accounts.insert(after.id.clone(), after);
            }
            RecordChange::Key(_) | RecordChange::Account(_) => {}
            // Until it is resolved, the role grants nothing and the user is not a member.
            RecordChange::Role(role) | RecordChange::RoleDeleted(role) => {
                uncertain.roles.insert(role_id(&role), made_from);
            }
            RecordChange::Member(member) | RecordChange::MemberRemoved(member) => {
                let _ = uncertain.members.insert(member_id(&member), made_from);
            }
        }
        self.uncertain_count.store(uncertain.len(), Ordering::Release);
        self.generation.fetch_add(1, Ordering::AcqRel);
    }

    fn resolve_uncertain(&self) {
        let mut uncertain = lock(&self.uncertain_changes);
        uncertain.keys.retain(|_, key| key.revocation.is_some() || key.disabled_at.is_some());
        uncertain.roles.clear();
        uncertain.members.clear();
        self.uncertain_count.store(uncertain.len(), Ordering::Release);
    }
}

#[cfg(test)]
mod memory_tests;
#[cfg(test)]
mod model_tests;
#[cfg(test)]
mod tests;
