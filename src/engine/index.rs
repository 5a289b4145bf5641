//! The index: every key and account in memory, found by digest.
//!
//! It is changed by two things only: the first snapshot, and log rows in revision order. Readers take no lock
//! and never wait for a writer. What is published first is found first: a changed record is visible to every
//! reader before the revision that says so.
//!
//! Keys revoked and secrets superseded longer ago than the retention leave the index and are unknown then.

use std::{
    collections::{HashMap, HashSet},
    hash::{BuildHasherDefault, Hasher},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
};

use arc_swap::ArcSwap;

use super::limiter::Budget;

use crate::{
    domain::{
        account::{Account, Member, Role},
        key::{Key, RevokeReason, Secret},
        log::{Change, LogRow},
        name::{AccountId, KeyId, RoleName, UserId},
        time::{Revision, Timestamp},
        token::Digest,
    },
    store::{SnapshotItem, writer::Follower},
};

/// A digest is uniformly distributed already: its first bytes are the hash.
#[derive(Clone, Copy, Debug, Default)]
pub struct DigestHasher(u64);

impl Hasher for DigestHasher {
    fn write(&mut self, bytes: &[u8]) {
        if let Some(first) = bytes.first_chunk() {
            self.0 = u64::from_ne_bytes(*first);
        }
    }

    // The length prefix of a slice carries nothing.
    fn write_usize(&mut self, _: usize) {}

    fn finish(&self) -> u64 {
        self.0
    }
}

/// A key's place: it stays while the record in it is replaced, so that both secrets change at one instant.
struct Slot {
    key: ArcSwap<Key>,
    /// Secrets that left the record: digest and when it was superseded.
    left: Mutex<Vec<(Digest, Timestamp)>>,
    /// What is used of the key's limits; its secrets share it.
    budget: Arc<Budget>,
}

/// A found key with everything that a decision needs.
#[derive(Clone, Debug)]
pub struct Found {
    /// The key.
    pub key: Arc<Key>,
    /// Which version of its secret was presented.
    pub version: u32,
    /// What is used of its limits.
    pub budget: Arc<Budget>,
    /// A record that may have been committed in place of `key`, and is narrower.
    pub doubt: Option<Arc<Key>>,
}

/// Every key and account.
#[derive(Default)]
pub struct Index {
    by_digest: papaya::HashMap<Digest, (Arc<Slot>, u32), BuildHasherDefault<DigestHasher>>,
    by_id: papaya::HashMap<KeyId, Arc<Slot>>,
    accounts: papaya::HashMap<AccountId, Arc<Account>>,
    /// A global role has no account.
    roles: papaya::HashMap<(Option<AccountId>, RoleName), Arc<Role>>,
    members: papaya::HashMap<(AccountId, UserId), Arc<Member>>,
    doubts: Mutex<Doubts>,
    /// How many doubts there are; almost always none, and then nobody looks.
    doubtful: AtomicUsize,
    /// The newest revision applied, plus one; 0 = the first snapshot is not loaded.
    applied: AtomicU64,
}

#[derive(Default)]
struct Doubts {
    keys: HashMap<KeyId, Arc<Key>>,
    accounts: HashMap<AccountId, Arc<Account>>,
    roles: HashSet<(Option<AccountId>, RoleName)>,
    members: HashSet<(AccountId, UserId)>,
}

impl Doubts {
    fn len(&self) -> usize {
        self.keys.len() + self.accounts.len() + self.roles.len() + self.members.len()
    }
}

fn role_id(role: &Role) -> (Option<AccountId>, RoleName) {
    (role.account.clone(), role.name.clone())
}

fn member_id(member: &Member) -> (AccountId, UserId) {
    (member.account.clone(), member.user.clone())
}

impl std::fmt::Debug for Index {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Index").field("keys", &self.by_id.len()).finish_non_exhaustive()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    // The data is whole between any two statements that could panic.
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

impl Index {
    /// The newest revision applied; `None` until the first snapshot is loaded.
    #[must_use]
    pub fn revision(&self) -> Option<Revision> {
        self.applied.load(Ordering::Acquire).checked_sub(1).map(Revision)
    }

    /// How many keys it holds.
    #[must_use]
    pub fn len(&self) -> usize {
        self.by_id.len()
    }

    /// Whether it holds no key.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.by_id.is_empty()
    }

    /// The key with this digest.
    #[must_use]
    pub fn find(&self, digest: &Digest) -> Option<Found> {
        let keys = self.by_digest.pin();
        let (slot, version) = keys.get(digest)?;
        let key = slot.key.load_full();
        let doubt = self.doubted(|doubts| doubts.keys.get(&key.id).cloned());
        Some(Found { key, version: *version, budget: slot.budget.clone(), doubt })
    }

    /// The record of a key.
    #[must_use]
    pub fn record(&self, id: KeyId) -> Option<Arc<Key>> {
        self.by_id.pin().get(&id).map(|slot| slot.key.load_full())
    }

    fn doubted<T>(&self, find: impl FnOnce(&Doubts) -> Option<T>) -> Option<T> {
        if self.doubtful.load(Ordering::Acquire) == 0 { None } else { find(&lock(&self.doubts)) }
    }

    /// The account with this id; in doubt, as narrow as it may be.
    #[must_use]
    pub fn account(&self, id: &AccountId) -> Option<Arc<Account>> {
        self.doubted(|doubts| doubts.accounts.get(id).cloned())
            .or_else(|| self.accounts.pin().get(id).cloned())
    }

    /// The role that a name stands for in an account: its own before the global one. None while a change of it
    /// is in doubt.
    #[must_use]
    pub fn role(&self, account: Option<&AccountId>, name: &RoleName) -> Option<Arc<Role>> {
        let roles = self.roles.pin();
        // The map's keys own what they hold; a service key with roles pays for the look-up.
        let own = account.and_then(|account| roles.get(&(Some(account.clone()), name.clone())));
        let role = own.or_else(|| roles.get(&(None, name.clone())))?;
        let doubted = self.doubted(|doubts| doubts.roles.get(&role_id(role)).map(drop));
        if doubted.is_some() { None } else { Some(role.clone()) }
    }

    /// A user's place in an account. None while its end or change is in doubt.
    #[must_use]
    pub fn member(&self, account: &AccountId, user: &UserId) -> Option<Arc<Member>> {
        let id = (account.clone(), user.clone());
        let doubted = self.doubted(|doubts| doubts.members.get(&id).map(drop));
        if doubted.is_some() { None } else { self.members.pin().get(&id).cloned() }
    }

    /// The record of a member, whatever is in doubt.
    #[must_use]
    pub fn member_record(&self, account: &AccountId, user: &UserId) -> Option<Arc<Member>> {
        self.members.pin().get(&(account.clone(), user.clone())).cloned()
    }

    /// The record of a role exactly so named, of an account or global.
    #[must_use]
    pub fn role_record(&self, account: Option<&AccountId>, name: &RoleName) -> Option<Arc<Role>> {
        self.roles.pin().get(&(account.cloned(), name.clone())).cloned()
    }

    /// Every key that is known to be revoked: since when, and why.
    #[must_use]
    pub fn revoked(&self) -> Vec<(KeyId, Timestamp, RevokeReason)> {
        let by_id = self.by_id.pin();
        let revoked = by_id.iter().filter_map(|(id, slot)| {
            let key = slot.key.load();
            key.revocation.as_ref().map(|revocation| (*id, revocation.at, revocation.reason))
        });
        revoked.collect()
    }

    /// Takes a record of the first snapshot.
    pub fn load(&self, item: SnapshotItem) {
        match item {
            SnapshotItem::Account(account) => self.put_account(Arc::new(account)),
            SnapshotItem::Key(key, left) => self.put_key(key, &left),
            SnapshotItem::Role(role) => self.put_role(Arc::new(role)),
            SnapshotItem::Member(member) => self.put_member(Arc::new(member)),
            SnapshotItem::Spent(key, spent) => {
                if let Some(slot) = self.by_id.pin().get(&key) {
                    slot.budget.restore(spent);
                }
            }
        }
    }

    /// Forgets everything: another snapshot is to be loaded. What is in doubt stays so.
    pub fn clear(&self) {
        self.applied.store(0, Ordering::Release);
        self.by_digest.pin().clear();
        self.by_id.pin().clear();
        self.accounts.pin().clear();
        self.roles.pin().clear();
        self.members.pin().clear();
    }

    /// Says that the snapshot is complete, as of `revision`.
    pub fn loaded(&self, revision: Revision) {
        self.applied.store(revision.0 + 1, Ordering::Release);
    }

    /// Ends a disabling that was not recorded: somebody wants the key enabled.
    pub fn enable(&self, id: KeyId) {
        self.settle(|doubts| {
            if doubts.keys.get(&id).is_some_and(|doubt| doubt.revocation.is_none()) {
                doubts.keys.remove(&id);
            }
        });
    }

    /// Ends a suspension that was not recorded: somebody wants the account resumed.
    pub fn resume(&self, id: &AccountId) {
        self.settle(|doubts| {
            doubts.accounts.remove(id);
        });
    }

    /// Ends a doubt, after the record that settles it has come.
    fn settle(&self, end: impl FnOnce(&mut Doubts)) {
        if self.doubtful.load(Ordering::Acquire) > 0 {
            let mut doubts = lock(&self.doubts);
            end(&mut doubts);
            self.doubtful.store(doubts.len(), Ordering::Release);
        }
    }

    fn put_account(&self, account: Arc<Account>) {
        let id = account.id.clone();
        self.accounts.pin().insert(id.clone(), account);
        let suspended = self.accounts.pin().get(&id).is_some_and(|account| account.suspended_at.is_some());
        self.settle(|doubts| {
            // A suspension that was not recorded stays until one is, or until Resume.
            if suspended {
                doubts.accounts.remove(&id);
            }
        });
    }

    fn put_role(&self, role: Arc<Role>) {
        let id = role_id(&role);
        self.roles.pin().insert(id.clone(), role);
        self.settle(|doubts| {
            doubts.roles.remove(&id);
        });
    }

    fn delete_role(&self, role: &Role) {
        let id = role_id(role);
        self.roles.pin().remove(&id);
        self.settle(|doubts| {
            doubts.roles.remove(&id);
        });
    }

    fn put_member(&self, member: Arc<Member>) {
        let id = member_id(&member);
        self.members.pin().insert(id.clone(), member);
        self.settle(|doubts| {
            doubts.members.remove(&id);
        });
    }

    fn remove_member(&self, member: &Member) {
        let id = member_id(member);
        self.members.pin().remove(&id);
        self.settle(|doubts| {
            doubts.members.remove(&id);
        });
    }

    fn put_key(&self, key: Arc<Key>, left: &[Secret]) {
        let by_id = self.by_id.pin();
        let slot = match by_id.get(&key.id) {
            Some(slot) => {
                let before = slot.key.swap(key.clone());
                let gone = before
                    .secrets
                    .iter()
                    .filter(|old| key.secrets.iter().all(|kept| kept.version != old.version));
                lock(&slot.left).extend(
                    gone.map(|old| {
                        (old.digest, old.expires_at.unwrap_or(key.updated_at).min(key.updated_at))
                    }),
                );
                slot.clone()
            }
            None => {
                let left =
                    left.iter().map(|old| (old.digest, old.expires_at.unwrap_or(key.updated_at))).collect();
                let slot = Arc::new(Slot {
                    key: ArcSwap::new(key.clone()),
                    left: Mutex::new(left),
                    budget: Arc::default(),
                });
                by_id.insert(key.id, slot.clone());
                slot
            }
        };
        self.settle(|doubts| {
            // A stop that was not recorded stays until one is, or until Enable.
            let settled = |doubt: &Arc<Key>| {
                (doubt.revocation.is_none() || key.revocation.is_some())
                    && (doubt.disabled_at.is_none() || key.disabled_at.is_some() || key.revocation.is_some())
            };
            if doubts.keys.get(&key.id).is_some_and(settled) {
                doubts.keys.remove(&key.id);
            }
        });
        let by_digest = self.by_digest.pin();
        for secret in key.secrets.iter().chain(left) {
            if by_digest.get(&secret.digest).is_none() {
                by_digest.insert(secret.digest, (slot.clone(), secret.version));
            }
        }
    }

    /// Forgets keys revoked and secrets superseded before `forget_before`. Returns how many digests left.
    pub fn forget(&self, forget_before: Timestamp) -> usize {
        let (by_id, by_digest) = (self.by_id.pin(), self.by_digest.pin());
        let mut forgotten = 0;
        let mut forget = |digest: &Digest| forgotten += usize::from(by_digest.remove(digest).is_some());
        for (id, slot) in &by_id {
            let key = slot.key.load();
            let mut left = lock(&slot.left);
            if key.revocation.as_ref().is_some_and(|revocation| revocation.at < forget_before) {
                key.secrets.iter().for_each(|secret| forget(&secret.digest));
                left.iter().for_each(|(digest, _)| forget(digest));
                by_id.remove(id);
            } else {
                let ended = key
                    .secrets
                    .iter()
                    .filter(|secret| secret.expires_at.is_some_and(|end| end < forget_before));
                ended.for_each(|secret| forget(&secret.digest));
                left.retain(|(digest, at)| {
                    let keep = *at >= forget_before;
                    if !keep {
                        forget(digest);
                    }
                    keep
                });
            }
        }
        forgotten
    }
}

impl Follower for Index {
    fn revision(&self) -> Revision {
        self.revision().unwrap_or_default()
    }

    fn applied(&self, rows: &[(LogRow, Change)]) {
        for (row, change) in rows {
            if self.revision().is_some_and(|seen| row.revision <= seen) {
                continue;
            }
            match change {
                Change::Key(key) => self.put_key(key.clone(), &[]),
                Change::Account(account) => self.put_account(account.clone()),
                Change::Role(role) => self.put_role(role.clone()),
                Change::RoleDeleted(role) => self.delete_role(role),
                Change::Member(member) => self.put_member(member.clone()),
                Change::MemberRemoved(member) => self.remove_member(member),
            }
            self.applied.store(row.revision.0 + 1, Ordering::Release);
        }
    }

    fn in_doubt(&self, change: &Change) {
        let mut doubts = lock(&self.doubts);
        match change {
            Change::Key(after) => {
                let narrower =
                    self.by_id.pin().get(&after.id).is_some_and(|slot| after.narrows(&slot.key.load()));
                if narrower {
                    doubts.keys.insert(after.id, after.clone());
                }
            }
            Change::Account(after) => {
                let narrower = self.accounts.pin().get(&after.id).is_some_and(|before| after.narrows(before));
                if narrower {
                    doubts.accounts.insert(after.id.clone(), after.clone());
                }
            }
            // Whatever the change is, until it is settled the role grants nothing and the user is no member.
            Change::Role(role) | Change::RoleDeleted(role) => {
                doubts.roles.insert(role_id(role));
            }
            Change::Member(member) | Change::MemberRemoved(member) => {
                let _ = doubts.members.insert(member_id(member));
            }
        }
        self.doubtful.store(doubts.len(), Ordering::Release);
    }

    fn decided(&self) {
        let mut doubts = lock(&self.doubts);
        doubts.keys.retain(|_, key| key.revocation.is_some() || key.disabled_at.is_some());
        doubts.roles.clear();
        doubts.members.clear();
        self.doubtful.store(doubts.len(), Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::key::{
        Revocation, RevokeReason,
        tests::{at, sample},
    };
    use std::time::Duration;

    fn loaded(key: &Key) -> Index {
        let index = Index::default();
        index.load(SnapshotItem::Key(Arc::new(key.clone()), vec![]));
        index.loaded(Revision(1));
        index
    }

    fn rotated(key: &Key, token: &str, seconds: i64) -> Key {
        let mut key = key.clone();
        key.rotate(Digest::of(token), String::new(), Duration::from_secs(5), at(seconds));
        key
    }

    fn revoked(key: &Key, seconds: i64) -> Key {
        let revocation =
            Revocation { at: at(seconds), reason: RevokeReason::Unspecified, comment: String::new() };
        Key { revocation: Some(revocation), ..key.clone() }
    }

    #[test]
    fn nothing_is_known_before_the_snapshot() {
        assert_eq!(Index::default().revision(), None);
        assert_eq!(loaded(&sample()).revision(), Some(Revision(1)));
    }

    #[test]
    fn every_secret_of_a_key_finds_its_newest_record() {
        let first = sample();
        let index = loaded(&first);
        let second = rotated(&first, "two", 10);
        let third = rotated(&second, "three", 20);
        index.put_key(Arc::new(second), &[]);
        index.put_key(Arc::new(third.clone()), &[]);
        for (token, version) in [("one", 1), ("two", 2), ("three", 3)] {
            let found = index.find(&Digest::of(token)).unwrap();
            assert_eq!((found.version, &*found.key), (version, &third), "{token}");
        }
        assert!(index.find(&Digest::of("four")).is_none());
    }

    #[test]
    fn a_token_rotated_longer_ago_than_the_retention_is_forgotten() {
        let index = loaded(&sample());
        index.put_key(Arc::new(rotated(&sample(), "two", 10)), &[]);
        assert_eq!(index.forget(at(15)), 0, "superseded at 15: not longer ago");
        assert_eq!(index.forget(at(16)), 1);
        assert!(index.find(&Digest::of("one")).is_none());
        assert!(index.find(&Digest::of("two")).is_some());
    }

    #[test]
    fn what_is_dead_for_longer_than_the_retention_is_forgotten() {
        let first = sample();
        let index = loaded(&first);
        let third = rotated(&rotated(&first, "two", 10), "three", 20);
        index.put_key(Arc::new(rotated(&first, "two", 10)), &[]);
        index.put_key(Arc::new(third.clone()), &[]);
        assert_eq!(index.forget(at(15)), 0, "superseded at 15: not longer ago");
        assert_eq!(index.forget(at(16)), 1);
        assert!(index.find(&Digest::of("one")).is_none());
        index.put_key(Arc::new(revoked(&third, 30)), &[]);
        assert_eq!(index.forget(at(30)), 1, "the one superseded at 25; the key was revoked at 30");
        assert_eq!(index.forget(at(31)), 1);
        assert!(index.is_empty());
    }

    #[test]
    fn a_revocation_in_doubt_is_in_force_until_a_record_settles_it() {
        let key = sample();
        let index = loaded(&key);
        let dead = revoked(&key, 5);
        index.in_doubt(&Change::Key(Arc::new(dead.clone())));
        assert_eq!(index.find(&Digest::of("one")).unwrap().doubt.as_deref(), Some(&dead));
        index.decided();
        assert!(index.find(&Digest::of("one")).unwrap().doubt.is_some(), "somebody wanted it stopped");
        index.put_key(Arc::new(key), &[]);
        assert!(index.find(&Digest::of("one")).unwrap().doubt.is_some(), "another change does not settle it");
        index.put_key(Arc::new(dead), &[]);
        assert!(index.find(&Digest::of("one")).unwrap().doubt.is_none());
    }

    #[test]
    fn other_doubts_end_when_the_log_has_decided() {
        let key = sample();
        let index = loaded(&key);
        index.in_doubt(&Change::Key(Arc::new(rotated(&key, "two", 5))));
        assert!(index.find(&Digest::of("one")).unwrap().doubt.is_some());
        index.decided();
        assert!(index.find(&Digest::of("one")).unwrap().doubt.is_none());
    }
}
