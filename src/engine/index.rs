//! The index: every key and account in memory, found by digest.
//!
//! Keys are `index/keys.rs`: packed small (`held.rs`, with `pool.rs` and `sparse.rs`), in blocks on a shelf
//! (`shelf.rs`), behind a table of digests (`table.rs`). Accounts, roles and members, of which there are fewer, are
//! in maps.
//!
//! It is changed by two things only: the first snapshot, and log rows in revision order. Readers take no lock
//! and never wait for a writer. What is published first is found first: a changed record is visible to every
//! reader before the revision that says so.
//!
//! A revoked key keeps only what a Check needs to answer REVOKED. Keys revoked and secrets superseded longer ago than the
//! retention leave the index and are unknown then.

mod held;
mod keys;
mod part;
mod pool;
mod shelf;
mod sparse;
mod table;

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
};

use arc_swap::ArcSwap;

pub use held::HeldKey;

use self::keys::Keys;
use super::limiter::Budget;

use crate::{
    domain::{
        account::{Account, Member, Role},
        decision::Reason,
        facts::KeyFacts as _,
        key::Key,
        log::{Change, LogRow},
        name::{AccountId, KeyId, RoleName, UserId},
        scope::ScopeSet,
        time::{Revision, Timestamp},
        token::Digest,
    },
    store::{Loader, Part, SnapshotItem, Write, writer::Follower},
};

/// A found key with everything that a decision needs.
#[derive(Clone, Debug)]
pub struct Found {
    /// The key.
    pub key: HeldKey,
    /// Which version of its secret was presented.
    pub version: u32,
    /// What is used of its limits, where it has any.
    pub budget: Option<Arc<Budget>>,
    /// A record that may have been committed in place of `key`, and is narrower.
    pub doubt: Option<Arc<Key>>,
    /// Somebody wanted it stopped when the store could not be asked: `Revoked` or `Disabled`.
    pub stopped: Option<Reason>,
}

/// Its hash is seeded anew in each process: nobody outside can choose ids that collide.
type Map<K, V> = papaya::HashMap<K, V, foldhash::fast::RandomState>;

/// Every key and account.
#[derive(Default)]
pub struct Index {
    keys: ArcSwap<Keys>,
    /// What is used of the limits of keys that have any, and were used or had used some of a quota before.
    budgets: Map<KeyId, Arc<Budget>>,
    accounts: Map<AccountId, Arc<Account>>,
    /// A global role has no account.
    roles: Map<(Option<AccountId>, RoleName), Arc<Role>>,
    members: Map<(AccountId, UserId), Arc<Member>>,
    doubts: Mutex<Doubts>,
    /// How many doubts there are; almost always none, and then nobody looks.
    doubtful: AtomicUsize,
    /// The newest revision applied, plus one; 0 = the first snapshot is not loaded.
    applied: AtomicU64,
    /// How often anything happened that revisions do not tell of: everything was forgotten, and what was loaded after may
    /// be another history under the same numbers; or something came in doubt. It moves after what it tells of: whoever
    /// reads it moved finds that too.
    turns: AtomicU64,
}

/// What the index held when it was read: two that are equal are one and the same state, but for keys and secrets that
/// have left after their retention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct State {
    applied: u64,
    turns: u64,
}

/// Changes that may have been committed. Each carries the revision of the record that it was made from; zero = there
/// was none. Only a newer record settles it: an older one may still be on its way from another replica.
#[derive(Default)]
struct Doubts {
    keys: HashMap<KeyId, Arc<Key>>,
    stopped: HashMap<KeyId, Reason>,
    accounts: HashMap<AccountId, Arc<Account>>,
    roles: HashMap<(Option<AccountId>, RoleName), Revision>,
    members: HashMap<(AccountId, UserId), Revision>,
}

impl Doubts {
    fn len(&self) -> usize {
        let records = self.keys.len() + self.accounts.len() + self.roles.len() + self.members.len();
        records + self.stopped.len()
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
        f.debug_struct("Index").field("keys", &self.len()).finish_non_exhaustive()
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

    /// What it holds now; None while it is not loaded, or anything is in doubt. Whoever reads this first and then finds
    /// a key has found it in that state or a later one.
    #[must_use]
    pub fn state(&self) -> Option<State> {
        let turns = self.turns.load(Ordering::Acquire);
        let applied = self.applied.load(Ordering::Acquire);
        let certain = applied > 0 && self.doubtful.load(Ordering::Acquire) == 0;
        certain.then_some(State { applied, turns })
    }

    /// How many keys it holds.
    #[must_use]
    pub fn len(&self) -> usize {
        self.keys.load().len()
    }

    /// Whether it holds no key.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The key with this digest.
    #[must_use]
    pub fn find(&self, digest: &Digest) -> Option<Found> {
        let find = || self.keys.load().find(digest);
        // The record is read under the lock: a doubt that is settled concurrently shows either as doubt or as its record.
        let in_doubt = |doubts: &Doubts| {
            let found = find();
            let id = found.as_ref().map(|(key, _)| key.id());
            let doubt = id.and_then(|id| doubts.keys.get(&id).cloned());
            let stopped = id.and_then(|id| doubts.stopped.get(&id).copied());
            Some((found, doubt, stopped))
        };
        let (found, doubt, stopped) = self.doubted(in_doubt).unwrap_or_else(|| (find(), None, None));
        let (key, version) = found?;
        let budget = key.is_limited().then(|| self.budget(key.id()));
        Some(Found { key, version, budget, doubt, stopped })
    }

    /// What is used of a key's limits; its secrets share it, and it stays while the key's record changes.
    fn budget(&self, id: KeyId) -> Arc<Budget> {
        self.budgets.pin().get_or_insert_with(id, Arc::default).clone()
    }

    /// The key with this id. It is looked for among all of them: for what is rare.
    #[must_use]
    pub fn with_id(&self, id: KeyId) -> Option<HeldKey> {
        self.keys.load().each().find(|key| key.id() == id)
    }

    /// Refuses a key that the store could not be asked about, as `Revoked` or as `Disabled`, until a record says so or
    /// it is enabled.
    pub fn stop(&self, id: KeyId, reason: Reason) {
        let mut doubts = lock(&self.doubts);
        let stopped = doubts.stopped.entry(id).or_insert(reason);
        // Nothing lifts a revocation.
        *stopped = (*stopped).min(reason);
        self.doubtful.store(doubts.len(), Ordering::Release);
        self.turns.fetch_add(1, Ordering::AcqRel);
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

    /// Whether the account with this id is suspended; None = there is none. Of what all Checks ask, no count of
    /// references is kept, which every core would have to write to.
    #[must_use]
    pub fn suspended(&self, id: &AccountId) -> Option<bool> {
        let suspended = |account: &Arc<Account>| account.suspended_at.is_some();
        self.doubted(|doubts| doubts.accounts.get(id).map(suspended))
            .or_else(|| self.accounts.pin().get(id).map(suspended))
    }

    /// The role that a name means in an account: its own before the global one. None while a change is in doubt at one of
    /// the places that the look-up depends on, also if no record exists there yet.
    #[must_use]
    pub fn role(&self, account: Option<&AccountId>, name: &RoleName) -> Option<Arc<Role>> {
        let roles = self.roles.pin();
        // The map's keys own what they hold; a service key with roles pays for the look-up.
        let place = |account: Option<&AccountId>| (account.cloned(), name.clone());
        // Doubts come before records: a doubt that is settled meanwhile has put its record there first.
        let in_doubt = |account| {
            let found = self.doubted(|doubts| doubts.roles.get(&place(account)).copied());
            found.is_some()
        };
        if let Some(account) = account {
            if in_doubt(Some(account)) {
                return None;
            }
            if let Some(own) = roles.get(&place(Some(account))) {
                return Some(own.clone());
            }
        }
        if in_doubt(None) { None } else { roles.get(&place(None)).cloned() }
    }

    /// A user's place in an account. None while its end or change is in doubt.
    #[must_use]
    pub fn member(&self, account: &AccountId, user: &UserId) -> Option<Arc<Member>> {
        let id = (account.clone(), user.clone());
        let doubted = self.doubted(|doubts| doubts.members.get(&id).map(drop));
        if doubted.is_some() { None } else { self.members.pin().get(&id).cloned() }
    }

    /// The record of an account, whatever is in doubt.
    #[must_use]
    pub fn account_record(&self, id: &AccountId) -> Option<Arc<Account>> {
        self.accounts.pin().get(id).cloned()
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

    /// Every key that is known to be revoked, and since when.
    #[must_use]
    pub fn revoked(&self) -> Vec<(KeyId, Timestamp)> {
        let keys = self.keys.load();
        let revoked = keys.each().filter_map(|key| Some((key.id(), key.revoked_at()?)));
        revoked.collect()
    }

    /// Takes a record of the first snapshot. All of a store's keys come faster in parts: see [`Loader`].
    pub fn load(&self, item: SnapshotItem) {
        match item {
            SnapshotItem::Account(account) => self.put_account(Arc::new(account)),
            SnapshotItem::Key(key, left) => self.keys.load().load(&key, &left),
            SnapshotItem::Role(role) => self.put_role(Arc::new(role)),
            SnapshotItem::Member(member) => self.put_member(Arc::new(member)),
            SnapshotItem::Spent(key, spent) => self.budget(key).restore(spent),
        }
    }

    /// Forgets everything: another snapshot is to be loaded. What is in doubt stays so.
    pub fn clear(&self) {
        self.applied.store(0, Ordering::Release);
        self.turns.fetch_add(1, Ordering::AcqRel);
        self.keys.store(Arc::default());
        self.budgets.pin().clear();
        self.accounts.pin().clear();
        self.roles.pin().clear();
        self.members.pin().clear();
    }

    /// Says that the snapshot is complete, as of `revision`.
    pub fn loaded(&self, revision: Revision) {
        self.keys.load().show();
        self.applied.store(revision.0 + 1, Ordering::Release);
    }

    /// Ends a disabling that was not recorded: somebody wants the key enabled.
    pub fn enable(&self, id: KeyId) {
        self.settle(|doubts| {
            if doubts.keys.get(&id).is_some_and(|doubt| doubt.revocation.is_none()) {
                doubts.keys.remove(&id);
            }
            doubts.stopped.retain(|of, reason| *of != id || *reason == Reason::Revoked);
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
        let suspended = account.suspended_at.map(|_| account.revision);
        self.accounts.pin().insert(id.clone(), account);
        self.settle(|doubts| {
            // A suspension that was not recorded stays until one is, or until Resume.
            let doubt = doubts.accounts.get(&id);
            if doubt.is_some_and(|doubt| suspended > Some(doubt.revision)) {
                doubts.accounts.remove(&id);
            }
        });
    }

    fn put_role(&self, role: Arc<Role>) {
        let (id, revision) = (role_id(&role), role.revision);
        self.roles.pin().insert(id.clone(), role);
        self.settle_role(&id, revision);
    }

    fn delete_role(&self, role: &Role) {
        let id = role_id(role);
        self.roles.pin().remove(&id);
        self.settle_role(&id, role.revision);
    }

    fn settle_role(&self, id: &(Option<AccountId>, RoleName), revision: Revision) {
        self.settle(|doubts| {
            if doubts.roles.get(id).is_some_and(|made_from| *made_from < revision) {
                doubts.roles.remove(id);
            }
        });
    }

    fn put_member(&self, member: Arc<Member>) {
        let (id, revision) = (member_id(&member), member.revision);
        self.members.pin().insert(id.clone(), member);
        self.settle_member(&id, revision);
    }

    fn remove_member(&self, member: &Member) {
        let id = member_id(member);
        self.members.pin().remove(&id);
        self.settle_member(&id, member.revision);
    }

    fn settle_member(&self, id: &(AccountId, UserId), revision: Revision) {
        self.settle(|doubts| {
            if doubts.members.get(id).is_some_and(|made_from| *made_from < revision) {
                doubts.members.remove(id);
            }
        });
    }

    fn put_keys<'k>(&self, keys: impl Iterator<Item = &'k Key> + Clone) {
        self.keys.load().put(keys.clone());
        keys.for_each(|key| {
            if key.is_revoked() {
                self.budgets.pin().remove(&key.id);
            }
            self.settle_key(key);
        });
    }

    /// Ends doubts about a key, whose record has come.
    fn settle_key(&self, key: &Key) {
        self.settle(|doubts| {
            // A stop that was not recorded stays until one is, or until Enable.
            let settled = |doubt: &Arc<Key>| {
                doubt.revision < key.revision
                    && (doubt.revocation.is_none() || key.revocation.is_some())
                    && (doubt.disabled_at.is_none() || key.disabled_at.is_some() || key.revocation.is_some())
            };
            if doubts.keys.get(&key.id).is_some_and(settled) {
                doubts.keys.remove(&key.id);
            }
            let said = match doubts.stopped.get(&key.id) {
                Some(Reason::Revoked) => key.revocation.is_some(),
                Some(_) => key.disabled_at.is_some() || key.revocation.is_some(),
                None => false,
            };
            if said {
                doubts.stopped.remove(&key.id);
            }
        });
    }

    fn apply(&self, change: &Change) {
        match change {
            Change::Key(key) => self.put_keys(std::iter::once(&**key)),
            Change::Account(account) => self.put_account(account.clone()),
            Change::Role(role) => self.put_role(role.clone()),
            Change::RoleDeleted(role) => self.delete_role(role),
            Change::Member(member) => self.put_member(member.clone()),
            Change::MemberRemoved(member) => self.remove_member(member),
        }
    }

    /// Whether a change that has not come in here takes something away: some Check may be refused after it that is
    /// allowed by what is held here.
    #[must_use]
    pub fn narrows(&self, change: &Change) -> bool {
        match change {
            Change::Key(after) => self.keys.load().before(after).is_some_and(|before| after.narrows(&before)),
            Change::Account(after) => {
                self.accounts.pin().get(&after.id).is_some_and(|before| after.narrows(before))
            }
            // A new role may stand before a global one of its name.
            Change::Role(after) => {
                !after.scopes.covers_all(&self.granted_by(after.account.as_ref(), &after.name))
            }
            Change::Member(after) => {
                let grants = |member: &Member| self.granted_by(Some(&member.account), &member.role);
                let before = self.member_record(&after.account, &after.user);
                before.is_some_and(|before| !grants(after).covers_all(&grants(&before)))
            }
            Change::RoleDeleted(_) | Change::MemberRemoved(_) => true,
        }
    }

    /// What a role's name grants by the records, whatever is in doubt.
    pub(crate) fn granted_by(&self, account: Option<&AccountId>, name: &RoleName) -> ScopeSet {
        let own = account.and_then(|account| self.role_record(Some(account), name));
        let role = own.or_else(|| self.role_record(None, name));
        role.map(|role| role.scopes.clone()).unwrap_or_default()
    }

    /// Forgets keys revoked and secrets superseded before `forget_before`. Returns how many digests left.
    pub fn forget(&self, forget_before: Timestamp) -> usize {
        let budgets = self.budgets.pin();
        self.keys.load().forget(forget_before, |id| {
            budgets.remove(&id);
        })
    }
}

impl Loader for Index {
    fn item(&self, item: SnapshotItem) {
        self.load(item);
    }

    fn expect(&self, secrets: usize) {
        self.keys.load().expect(secrets);
    }

    /// If everything is forgotten meanwhile, what comes in parts that were begun before is too.
    fn part(&self) -> Box<dyn Part> {
        Box::new(part::Part::of(self.keys.load_full()))
    }
}

impl Follower for Index {
    fn revision(&self) -> Revision {
        self.revision().unwrap_or_default()
    }

    fn applied(&self, rows: &[(LogRow, Change)]) {
        let seen = self.revision();
        let new = rows.partition_point(|(row, _)| seen.is_some_and(|seen| row.revision <= seen));
        let key = |change: &Change| matches!(change, Change::Key(_));
        for run in rows[new..].chunk_by(|(_, one), (_, next)| key(one) && key(next)) {
            match run {
                [(_, change)] => self.apply(change),
                keys => self.put_keys(keys.iter().filter_map(|(_, change)| match change {
                    Change::Key(key) => Some(&**key),
                    _ => None,
                })),
            }
            if let Some((last, _)) = run.last() {
                self.applied.store(last.revision.0 + 1, Ordering::Release);
            }
        }
    }

    fn in_doubt(&self, write: &Write) {
        let made_from = write.expect.unwrap_or_default();
        // The record that it was made from may not have come in here yet: the change may narrow that one.
        let narrows = write.expect > self.revision() || self.narrows(&write.change);
        let mut doubts = lock(&self.doubts);
        match write.change.clone().at_revision(made_from) {
            Change::Key(after) if narrows => {
                // A weaker change does not end what a stronger one refuses.
                let strength = |key: &Key| (key.revocation.is_some(), key.disabled_at.is_some());
                let known = doubts.keys.get(&after.id);
                if known.is_none_or(|known| strength(known) <= strength(&after)) {
                    doubts.keys.insert(after.id, after);
                }
            }
            Change::Account(after) if narrows => {
                doubts.accounts.insert(after.id.clone(), after);
            }
            Change::Key(_) | Change::Account(_) => {}
            // Whatever the change is, until it is settled the role grants nothing and the user is no member.
            Change::Role(role) | Change::RoleDeleted(role) => {
                doubts.roles.insert(role_id(&role), made_from);
            }
            Change::Member(member) | Change::MemberRemoved(member) => {
                let _ = doubts.members.insert(member_id(&member), made_from);
            }
        }
        self.doubtful.store(doubts.len(), Ordering::Release);
        self.turns.fetch_add(1, Ordering::AcqRel);
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
mod size;
#[cfg(test)]
mod tests;
