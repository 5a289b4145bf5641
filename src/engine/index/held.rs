//! Keys as the index holds them: small, and packed in blocks that never change.
//!
//! A record has what a Check asks and answers. What only management shows is read from the store. A revoked key's record
//! keeps its id, owner, environment, digests and the instant of the revocation, and nothing else. What many keys
//! have alike stands once, and records name it by numbers (`pool.rs`); what only some have is apart (`sparse.rs`);
//! names stand one after the other. A block has 64 records. A change makes a new block, which takes the place of the
//! one before it: so both secrets of a key change at one instant, and whoever reads needs no lock. A block owns
//! whatever its records lead to.

use std::{
    collections::{BTreeMap, HashSet},
    fmt,
    sync::Arc,
};

use ipnet::IpNet;

use crate::domain::{
    facts::{KeyFacts, ended},
    key::{Key, Owner, Quota, RateLimit, Secret},
    name::{CustomerId, EnvironmentName, KeyId, KeyName, RoleName},
    policy::Policy,
    scope::ScopeSet,
    time::Timestamp,
    token::Digest,
};

use super::{
    pool::{self, List, Pool},
    sparse::Sparse,
};

/// How many records a block has.
pub(super) const BLOCK: usize = 64;
/// The longest name in bytes: 255 characters.
const MAX_NAME: usize = 255 * 4;
// Where a name ends fits into 16 bits.
const _: () = assert!(BLOCK * MAX_NAME <= u16::MAX as usize);
// Each key costs this much before anything else. 64 times 56 is one of the sizes in which the allocator gives memory
// (3584 bytes, and the next is 4096), so a byte more would cost eight.
const _: () = assert!(size_of::<Record>() <= 56);

/// What few keys have.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Rare {
    /// The newest secret's version, where a record has no room for it; else 0.
    version: u32,
    disabled: bool,
    /// From when the newest secret is superseded.
    newest_ends: Option<Timestamp>,
    older: Box<[Older]>,
    /// Apart: an empty map would cost every rare record 24 bytes.
    metadata: Option<Arc<BTreeMap<String, String>>>,
}

/// What may be rare of a key.
pub(super) struct Uncommon<'k> {
    /// In its record, the newest first.
    pub(super) secrets: &'k [Secret],
    pub(super) updated_at: Timestamp,
    pub(super) disabled_at: Option<Timestamp>,
    pub(super) revoked_at: Option<Timestamp>,
    pub(super) metadata: &'k BTreeMap<String, String>,
}

impl<'k> Uncommon<'k> {
    fn of(key: &'k Key) -> Self {
        Uncommon {
            secrets: &key.secrets,
            updated_at: key.updated_at,
            disabled_at: key.disabled_at,
            revoked_at: key.revocation.as_ref().map(|revocation| revocation.at),
            metadata: &key.terms.metadata,
        }
    }

    /// With the superseded secrets that left its record.
    pub(super) fn loaded(&self, left: &[Secret]) -> Option<Arc<Rare>> {
        let left = left.iter().map(|secret| Older {
            version: secret.version,
            digest: secret.digest,
            ends: Some(secret.expires_at.unwrap_or(self.updated_at)),
            left: true,
            over: true,
        });
        self.with(left)
    }

    fn with(&self, left: impl Iterator<Item = Older>) -> Option<Arc<Rare>> {
        let (newest, others) = self.secrets.split_first()?;
        let others = others.iter().map(|secret| Older {
            version: secret.version,
            digest: secret.digest,
            ends: secret.expires_at,
            left: false,
            over: ended(secret.expires_at, self.updated_at) == Some(Timestamp::PASSED),
        });
        let alive = self.revoked_at.is_none();
        let metadata = Some(self.metadata).filter(|metadata| alive && !metadata.is_empty());
        let rare = Rare {
            version: if newest.version < LARGE.into() { 0 } else { newest.version },
            disabled: alive && self.disabled_at.is_some(),
            newest_ends: newest.expires_at.filter(|_| alive),
            older: others.chain(left).collect(),
            metadata: metadata.cloned().map(Arc::new),
        };
        (rare != Rare::default()).then(|| Arc::new(rare))
    }
}

/// A secret before the newest.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Older {
    version: u32,
    digest: Digest,
    /// From when it is superseded.
    ends: Option<Timestamp>,
    /// Whether it has left the key's record, and is superseded whatever the clock says.
    left: bool,
    /// Whether it had ended when the record was made, and is superseded whatever the clock says.
    over: bool,
}

/// What many keys have alike, each thing once.
#[derive(Debug, Default)]
pub(super) struct Shared {
    owners: Pool<Owner>,
    policies: Pool<Policy>,
}

impl Shared {
    /// The owner that is kept of all that are equal.
    pub(super) fn owner(&mut self, owner: &Arc<Owner>) -> Arc<Owner> {
        self.owners.kept(owner)
    }

    /// The policy that is kept of all that are equal.
    pub(super) fn policy(&mut self, policy: &Arc<Policy>) -> Arc<Policy> {
        self.policies.kept(policy)
    }

    /// The common lists, to be marked with what of them is used.
    pub(super) fn marks(&self) -> Marks {
        Marks { owners: self.owners.marks(), policies: self.policies.marks() }
    }

    /// Takes what is not marked out of the common lists.
    pub(super) fn keep_marked(&mut self, marks: &Marks) {
        self.owners.keep_marked(&marks.owners);
        self.policies.keep_marked(&marks.policies);
    }

    /// Lets go of what no key has any more.
    pub(super) fn sweep(&mut self) {
        self.owners.sweep();
        self.policies.sweep();
    }
}

/// What of the common lists records name.
pub(super) struct Marks {
    owners: pool::Marks<Owner>,
    policies: pool::Marks<Policy>,
}

/// One key.
#[derive(Debug)]
struct Record {
    id: KeyId,
    /// The newest secret's.
    digest: Digest,
    /// The newest secret's, or [`LARGE`]. Versions count from 1; 0 = the place is free.
    version: u16,
    /// Where its name ends among the names of its block.
    name_end: u16,
    /// Its owner's number in its block's list.
    owner: u16,
    /// Its policy's.
    policy: u16,
}

/// The version stands apart: it is this or more.
const LARGE: u16 = u16::MAX;

impl Record {
    /// What stands where no key is.
    fn free() -> Record {
        let (id, digest) = (KeyId::from_bytes([0; 16]), Digest::from_bytes([0; 32]));
        Record { id, digest, version: 0, name_end: 0, owner: 0, policy: 0 }
    }
}

/// A key on its way into a block.
#[derive(Debug)]
pub(super) struct Packed {
    id: KeyId,
    digest: Digest,
    version: u32,
    /// Empty where it has none.
    name: String,
    expires_at: Option<Timestamp>,
    revoked_at: Option<Timestamp>,
    owner: Arc<Owner>,
    policy: Arc<Policy>,
    rare: Option<Arc<Rare>>,
}

/// The same while it stands somewhere: in a block, or on its way.
#[derive(Clone, Copy)]
pub(super) struct Placed<'a> {
    pub(super) id: KeyId,
    pub(super) digest: Digest,
    pub(super) version: u32,
    /// Empty where it has none.
    pub(super) name: &'a str,
    pub(super) expires_at: Option<Timestamp>,
    pub(super) revoked_at: Option<Timestamp>,
    pub(super) owner: &'a Arc<Owner>,
    pub(super) policy: &'a Arc<Policy>,
    pub(super) rare: Option<&'a Arc<Rare>>,
}

impl Packed {
    pub(super) fn id(&self) -> KeyId {
        self.id
    }

    fn placed(&self) -> Placed<'_> {
        Placed {
            id: self.id,
            digest: self.digest,
            version: self.version,
            name: &self.name,
            expires_at: self.expires_at,
            revoked_at: self.revoked_at,
            owner: &self.owner,
            policy: &self.policy,
            rare: self.rare.as_ref(),
        }
    }

    /// A key as it was loaded, with the superseded secrets that left its record. None of a key without secrets:
    /// nobody can find it.
    pub(super) fn new(key: &Key, left: &[Secret], shared: &mut Shared) -> Option<Packed> {
        Packed::with(key, Uncommon::of(key).loaded(left), shared)
    }

    /// A key as it is after a change.
    pub(super) fn after(before: &HeldKey, key: &Key, shared: &mut Shared) -> Option<Packed> {
        let left = before.secrets().filter_map(|old| {
            let kept = key.secrets.iter().any(|kept| kept.version == old.version);
            let ends = Some(old.ends.unwrap_or(key.updated_at).min(key.updated_at));
            if old.left {
                Some(old)
            } else {
                (!kept).then_some(Older { ends, left: true, over: true, ..old })
            }
        });
        Packed::with(key, Uncommon::of(key).with(left), shared)
    }

    fn with(key: &Key, rare: Option<Arc<Rare>>, shared: &mut Shared) -> Option<Packed> {
        let newest = key.secrets.first()?;
        let revoked_at = key.revocation.as_ref().map(|revocation| revocation.at);
        let alive = Some(key).filter(|_| revoked_at.is_none());
        let name = alive.and_then(|key| key.terms.name.as_ref());
        let policy = alive.map_or_else(|| Policy::without_grants(key.environment.clone()), Policy::of);
        Some(Packed {
            id: key.id,
            digest: newest.digest,
            version: newest.version,
            name: name.map_or("", KeyName::as_str).to_owned(),
            expires_at: alive.and_then(|key| key.terms.expires_at),
            revoked_at,
            owner: shared.owners.one(key.owner.clone()),
            policy: shared.policies.one(policy),
            rare,
        })
    }
}

impl Placed<'_> {
    /// A copy.
    pub(super) fn packed(&self) -> Packed {
        Packed {
            id: self.id,
            digest: self.digest,
            version: self.version,
            name: self.name.to_owned(),
            expires_at: self.expires_at,
            revoked_at: self.revoked_at,
            owner: self.owner.clone(),
            policy: self.policy.clone(),
            rare: self.rare.cloned(),
        }
    }
}

/// Up to 64 records that never change, with all that belongs to them.
#[derive(Debug)]
pub(super) struct Block {
    records: Box<[Record]>,
    names: Box<str>,
    expiries: Sparse<Timestamp>,
    revocations: Sparse<Timestamp>,
    rares: Sparse<Arc<Rare>>,
    owners: List<Owner>,
    policies: List<Policy>,
}

impl Default for Block {
    fn default() -> Self {
        Block::of(&[], 0, &mut Shared::default())
    }
}

impl Block {
    /// A block of these, of which `came` are new; None is a free place. Nothing in it has room that it does not use:
    /// an allocator seldom takes back what is too much.
    pub(super) fn of(places: &[Option<Placed<'_>>], came: usize, shared: &mut Shared) -> Block {
        let taken = places.iter().flatten();
        let (owners, owner) = shared.owners.list(taken.clone().map(|placed| placed.owner), came);
        let (policies, policy) = shared.policies.list(taken.clone().map(|placed| placed.policy), came);
        let mut numbers = owner.into_iter().zip(policy);
        let mut names = String::with_capacity(taken.map(|placed| placed.name.len()).sum());
        let mut records = Vec::with_capacity(places.len());
        for place in places {
            let mut record = Record::free();
            if let (Some(placed), Some((owner, policy))) = (place, place.and_then(|_| numbers.next())) {
                names.push_str(placed.name);
                let Placed { id, digest, version, .. } = *placed;
                let version = u16::try_from(version).unwrap_or(LARGE);
                record = Record { id, digest, version, owner, policy, name_end: 0 };
            }
            // It fits: see `BLOCK`.
            record.name_end = u16::try_from(names.len()).unwrap_or(u16::MAX);
            records.push(record);
        }
        let placed = places.iter().map(Option::as_ref);
        let expiries = placed.clone().map(|placed| placed.and_then(|placed| placed.expires_at.as_ref()));
        let revocations = placed.clone().map(|placed| placed.and_then(|placed| placed.revoked_at.as_ref()));
        let rares = placed.map(|placed| placed.and_then(|placed| placed.rare));
        Block {
            records: records.into(),
            names: names.into(),
            expiries: Sparse::of(expiries),
            revocations: Sparse::of(revocations),
            rares: Sparse::of(rares),
            owners,
            policies,
        }
    }

    /// How many records it has, free places included.
    pub(super) fn len(&self) -> usize {
        self.records.len()
    }

    fn name(&self, at: usize) -> &str {
        let start = at.checked_sub(1).map_or(0, |before| self.records[before].name_end);
        &self.names[usize::from(start)..usize::from(self.records[at].name_end)]
    }

    /// The newest secret's version of the key at a place; 0 where it is free.
    fn version(&self, at: usize) -> u32 {
        match (self.records[at].version, self.rares.get(at)) {
            (LARGE, Some(rare)) => rare.version,
            (version, _) => version.into(),
        }
    }

    /// What stands at a place; None where it is free.
    fn placed(&self, at: usize) -> Option<Placed<'_>> {
        let record = &self.records[at];
        (record.version > 0).then(|| Placed {
            id: record.id,
            digest: record.digest,
            version: self.version(at),
            name: self.name(at),
            expires_at: self.expiries.get(at).copied(),
            revoked_at: self.revocations.get(at).copied(),
            owner: &self.owners[usize::from(record.owner)],
            policy: &self.policies[usize::from(record.policy)],
            rare: self.rares.get(at),
        })
    }

    /// Whether no key in it is revoked and no secret superseded.
    pub(super) fn lasts(&self) -> bool {
        let ends = |rare: &Arc<Rare>| rare.newest_ends.is_some() || !rare.older.is_empty();
        self.revocations.values().next().is_none() && !self.rares.values().any(ends)
    }

    /// What stands at each place.
    fn all_placed(&self) -> Vec<Option<Placed<'_>>> {
        (0..self.len()).map(|at| self.placed(at)).collect()
    }

    fn taken(&self) -> impl Iterator<Item = &Record> + Clone {
        self.records.iter().filter(|record| record.version > 0)
    }

    /// Marks what its records name of the common lists.
    pub(super) fn mark(&self, marks: &mut Marks) {
        marks.owners.mark(&self.owners, self.taken().map(|record| record.owner));
        marks.policies.mark(&self.policies, self.taken().map(|record| record.policy));
    }

    /// Whether each of its lists is the common one, or has nothing that its records do not name.
    pub(super) fn is_compact(&self, shared: &Shared) -> bool {
        let named = |numbers: &mut dyn Iterator<Item = u16>| numbers.collect::<HashSet<_>>().len();
        let owners = || named(&mut self.taken().map(|record| record.owner)) == self.owners.len();
        let policies = || named(&mut self.taken().map(|record| record.policy)) == self.policies.len();
        (shared.owners.is_common(&self.owners) || owners())
            && (shared.policies.is_common(&self.policies) || policies())
    }

    /// The same block with other lists.
    pub(super) fn compacted(&self, shared: &mut Shared) -> Block {
        Block::of(&self.all_placed(), 0, shared)
    }

    /// The same block with more records.
    pub(super) fn and(&self, more: &[Packed], shared: &mut Shared) -> Block {
        let mut places = self.all_placed();
        places.extend(more.iter().map(|packed| Some(packed.placed())));
        Block::of(&places, more.len(), shared)
    }

    /// The same block with another record at a place that it has.
    pub(super) fn with(&self, at: usize, packed: &Packed, shared: &mut Shared) -> Block {
        let mut places = self.all_placed();
        places[at] = Some(packed.placed());
        Block::of(&places, 1, shared)
    }

    /// The same block with a free place.
    pub(super) fn without(&self, at: usize, shared: &mut Shared) -> Block {
        let mut places = self.all_placed();
        places[at] = None;
        Block::of(&places, 0, shared)
    }
}

/// A key as the engine holds it: a record of a block, which stays as it is however the key changes.
#[derive(Clone)]
pub struct HeldKey {
    block: Arc<Block>,
    at: usize,
}

impl fmt::Debug for HeldKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("HeldKey").field(&self.id()).finish()
    }
}

/// A key outside the index.
impl From<&Key> for HeldKey {
    fn from(key: &Key) -> Self {
        let shared = &mut Shared::default();
        let packed = Packed::new(key, &[], shared);
        HeldKey { block: Arc::new(Block::of(&[packed.as_ref().map(Packed::placed)], 1, shared)), at: 0 }
    }
}

impl HeldKey {
    /// The key at a place of a block; None where the place is free.
    pub(super) fn at(block: Arc<Block>, at: usize) -> Option<HeldKey> {
        let taken = block.records.get(at)?.version > 0;
        taken.then_some(HeldKey { block, at })
    }

    fn record(&self) -> &Record {
        &self.block.records[self.at]
    }

    fn rare(&self) -> Option<&Rare> {
        self.block.rares.get(self.at).map(Arc::as_ref)
    }

    fn policy(&self) -> &Policy {
        &self.block.policies[usize::from(self.record().policy)]
    }

    /// The newest secret's version.
    fn version(&self) -> u32 {
        self.block.version(self.at)
    }

    /// Every secret that is known of it, the newest first.
    fn secrets(&self) -> impl Iterator<Item = Older> {
        let (version, digest) = (self.version(), self.record().digest);
        let ends = self.rare().and_then(|rare| rare.newest_ends);
        let older = self.rare().map_or(&[][..], |rare| &rare.older);
        [Older { version, digest, ends, left: false, over: false }].into_iter().chain(older.iter().cloned())
    }

    /// The digests of every secret that is known of it.
    pub(super) fn digests(&self) -> Vec<Digest> {
        self.secrets().map(|secret| secret.digest).collect()
    }

    /// The digests of the secrets in its record.
    pub(super) fn digests_in_record(&self) -> Vec<Digest> {
        self.secrets().filter(|secret| !secret.left).map(|secret| secret.digest).collect()
    }

    /// Which version of its secret has this digest.
    pub(super) fn version_of(&self, digest: &Digest) -> Option<u32> {
        if self.record().digest == *digest {
            return Some(self.version());
        }
        let older = &self.rare()?.older;
        older.iter().find(|secret| secret.digest == *digest).map(|secret| secret.version)
    }

    /// Whether it was revoked before `then`.
    pub(super) fn revoked_before(&self, then: Timestamp) -> bool {
        self.revoked_at().is_some_and(|at| at < then)
    }

    /// The digests of its secrets that were superseded before `then`, and the key without those among them that
    /// left the record, where there are such.
    pub(super) fn superseded_before(&self, then: Timestamp) -> (Vec<Digest>, Option<Packed>) {
        let Some(rare) = self.rare() else { return (Vec::new(), None) };
        let over = |secret: &Older| secret.ends.is_some_and(|end| end < then);
        let digests = self.secrets().filter(over).map(|secret| secret.digest).collect();
        if !rare.older.iter().any(|secret| secret.left && over(secret)) {
            return (digests, None);
        }
        let older = rare.older.iter().filter(|secret| !(secret.left && over(secret))).cloned().collect();
        let rare = Rare { older, metadata: rare.metadata.clone(), ..*rare };
        let rare = (rare != Rare::default()).then(|| Arc::new(rare));
        let placed = self.block.placed(self.at);
        (digests, placed.map(|placed| Packed { rare, ..placed.packed() }))
    }

    /// Since when it has been revoked.
    pub(super) fn revoked_at(&self) -> Option<Timestamp> {
        self.block.revocations.get(self.at).copied()
    }

    /// Its id.
    #[must_use]
    pub fn id(&self) -> KeyId {
        self.record().id
    }

    /// Its name for people. A revoked key has none here.
    #[must_use]
    pub fn name(&self) -> Option<&str> {
        Some(self.block.name(self.at)).filter(|name| !name.is_empty())
    }

    /// Its maker's own notes.
    #[must_use]
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        static NONE: BTreeMap<String, String> = BTreeMap::new();
        self.rare().and_then(|rare| rare.metadata.as_deref()).unwrap_or(&NONE)
    }
}

impl KeyFacts for HeldKey {
    fn owner(&self) -> &Owner {
        &self.block.owners[usize::from(self.record().owner)]
    }

    fn environment(&self) -> &EnvironmentName {
        &self.policy().environment
    }

    fn scopes(&self) -> &ScopeSet {
        &self.policy().scopes
    }

    fn roles(&self) -> &[RoleName] {
        &self.policy().roles
    }

    fn customers(&self) -> &[CustomerId] {
        &self.policy().customers
    }

    fn allowed_cidrs(&self) -> &[IpNet] {
        &self.policy().allowed_cidrs
    }

    fn rate_limits(&self) -> &[RateLimit] {
        &self.policy().rate_limits
    }

    fn quota(&self) -> Option<&Quota> {
        self.policy().quota.as_ref()
    }

    fn expires_at(&self) -> Option<Timestamp> {
        self.block.expiries.get(self.at).copied()
    }

    fn is_disabled(&self) -> bool {
        self.rare().is_some_and(|rare| rare.disabled)
    }

    fn is_revoked(&self) -> bool {
        self.revoked_at().is_some()
    }

    fn secret_ends(&self) -> impl Iterator<Item = (u32, Option<Timestamp>)> {
        let ends = |secret: &Older| if secret.over { Some(Timestamp::PASSED) } else { secret.ends };
        self.secrets().filter(|secret| !secret.left).map(move |secret| (secret.version, ends(&secret)))
    }
}
