//! Keys as the index holds them: small, and packed in blocks that never change.
//!
//! A record has what a Check asks and answers. What only management shows is read from the store. What many keys
//! have alike stands once and is shared; what few keys have is apart; names stand one after the other. A block has
//! 64 records in two allocations. A change makes a new block, which takes the place of the one before it: so both
//! secrets of a key change at one instant, and whoever reads needs no lock.

use std::{
    collections::{BTreeMap, HashSet},
    fmt,
    hash::Hash,
    sync::Arc,
};

use foldhash::quality::RandomState;
use ipnet::IpNet;

use crate::domain::{
    facts::{KeyFacts, ended},
    key::{Key, Owner, Quota, RateLimit, Secret},
    name::{CustomerId, EnvironmentName, KeyId, KeyName, RoleName},
    scope::ScopeSet,
    time::Timestamp,
    token::Digest,
};

/// How many records a block has.
pub(super) const BLOCK: usize = 64;
/// The longest name in bytes: 255 characters.
const MAX_NAME: usize = 255 * 4;
// Where a name ends fits into 16 bits.
const _: () = assert!(BLOCK * MAX_NAME <= u16::MAX as usize);
const NEVER: i64 = i64::MAX;

/// What many keys have alike.
#[derive(Debug, PartialEq, Eq, Hash)]
struct Policy {
    environment: EnvironmentName,
    scopes: ScopeSet,
    roles: Box<[RoleName]>,
    customers: Box<[CustomerId]>,
    allowed_cidrs: Box<[IpNet]>,
    rate_limits: Box<[RateLimit]>,
    quota: Option<Quota>,
}

/// What few keys have.
#[derive(Debug, Default, PartialEq, Eq)]
struct Rare {
    disabled: bool,
    revoked_at: Option<Timestamp>,
    /// From when the newest secret is superseded.
    newest_ends: Option<Timestamp>,
    older: Box<[Older]>,
    metadata: BTreeMap<String, String>,
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
    owners: HashSet<Arc<Owner>, RandomState>,
    policies: HashSet<Arc<Policy>, RandomState>,
}

/// The one that is kept of all that are equal.
fn the_one<T: Eq + Hash>(kept: &mut HashSet<Arc<T>, RandomState>, value: T) -> Arc<T> {
    if let Some(known) = kept.get(&value) {
        return known.clone();
    }
    let new = Arc::new(value);
    kept.insert(new.clone());
    new
}

impl Shared {
    /// Lets go of what no key has any more.
    pub(super) fn sweep(&mut self) {
        self.owners.retain(|owner| Arc::strong_count(owner) > 1);
        self.policies.retain(|policy| Arc::strong_count(policy) > 1);
    }
}

/// One key.
#[derive(Clone, Debug)]
pub(super) struct Record {
    id: KeyId,
    /// The newest secret's.
    digest: Digest,
    /// The newest secret's. Versions count from 1; 0 = the place is free.
    version: u32,
    /// Where its name ends among the names of its block.
    name_end: u16,
    /// Microseconds since 1970.
    expires_at: i64,
    owner: Arc<Owner>,
    policy: Arc<Policy>,
    rare: Option<Arc<Rare>>,
}

/// A record and its name, on their way into a block.
#[derive(Debug)]
pub(super) struct Packed {
    record: Record,
    /// Empty where it has none.
    name: String,
}

impl Packed {
    pub(super) fn id(&self) -> KeyId {
        self.record.id
    }

    /// A key as it was loaded, with the superseded secrets that left its record. None of a key without secrets:
    /// nobody can find it.
    pub(super) fn new(key: &Key, left: &[Secret], shared: &mut Shared) -> Option<Packed> {
        let left = left.iter().map(|secret| Older {
            version: secret.version,
            digest: secret.digest,
            ends: Some(secret.expires_at.unwrap_or(key.updated_at)),
            left: true,
            over: true,
        });
        Packed::with_left(key, left.collect(), shared)
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
        Packed::with_left(key, left.collect(), shared)
    }

    fn with_left(key: &Key, mut older: Vec<Older>, shared: &mut Shared) -> Option<Packed> {
        let (newest, others) = key.secrets.split_first()?;
        let others = others.iter().map(|secret| Older {
            version: secret.version,
            digest: secret.digest,
            ends: secret.expires_at,
            left: false,
            over: ended(secret.expires_at, key.updated_at) == Some(Timestamp::PASSED),
        });
        older.splice(0..0, others);
        let rare = Rare {
            disabled: key.disabled_at.is_some(),
            revoked_at: key.revocation.as_ref().map(|revocation| revocation.at),
            newest_ends: newest.expires_at,
            older: older.into(),
            metadata: key.terms.metadata.clone(),
        };
        let policy = Policy {
            environment: key.environment.clone(),
            scopes: key.terms.scopes.clone(),
            roles: key.terms.roles.clone().into(),
            customers: key.terms.customers.clone().into(),
            allowed_cidrs: key.terms.allowed_cidrs.clone().into(),
            rate_limits: key.terms.rate_limits.clone().into(),
            quota: key.terms.quota.clone(),
        };
        let record = Record {
            id: key.id,
            digest: newest.digest,
            version: newest.version,
            name_end: 0,
            expires_at: key.terms.expires_at.map_or(NEVER, Timestamp::as_micros),
            owner: the_one(&mut shared.owners, key.owner.clone()),
            policy: the_one(&mut shared.policies, policy),
            rare: (rare != Rare::default()).then(|| Arc::new(rare)),
        };
        let name = key.terms.name.as_ref().map_or("", KeyName::as_str).to_owned();
        Some(Packed { record, name })
    }
}

/// Up to 64 records that never change, with their names.
#[derive(Debug, Default)]
pub(super) struct Block {
    records: Box<[Record]>,
    names: Box<str>,
}

/// A block in the making.
struct Making {
    records: Vec<Record>,
    names: String,
}

impl Making {
    fn push(&mut self, mut record: Record, name: &str) {
        self.names.push_str(name);
        // It fits: see `BLOCK`.
        record.name_end = u16::try_from(self.names.len()).unwrap_or(u16::MAX);
        self.records.push(record);
    }

    fn take(&mut self, packed: Packed) {
        self.push(packed.record, &packed.name);
    }

    fn block(self) -> Block {
        Block { records: self.records.into(), names: self.names.into() }
    }
}

impl Block {
    /// How many records it has, free places included.
    pub(super) fn len(&self) -> usize {
        self.records.len()
    }

    fn name(&self, at: usize) -> &str {
        let start = at.checked_sub(1).map_or(0, |before| self.records[before].name_end);
        &self.names[usize::from(start)..usize::from(self.records[at].name_end)]
    }

    /// The same block with more records.
    pub(super) fn and(&self, more: impl ExactSizeIterator<Item = Packed>) -> Block {
        let mut making = self.copied(self.len(), more.len());
        more.for_each(|packed| making.take(packed));
        making.block()
    }

    /// The same block with another record at a place that it has.
    pub(super) fn with(&self, place: usize, packed: Packed) -> Block {
        let mut making = self.copied(place, self.len() - place);
        making.take(packed);
        for at in place + 1..self.len() {
            making.push(self.records[at].clone(), self.name(at));
        }
        making.block()
    }

    /// The same block with a free place.
    pub(super) fn without(&self, place: usize) -> Block {
        let record = Record { version: 0, rare: None, ..self.records[place].clone() };
        self.with(place, Packed { record, name: String::new() })
    }

    /// Its first records, with room for more.
    fn copied(&self, count: usize, more: usize) -> Making {
        let mut records = Vec::with_capacity(count + more);
        records.extend_from_slice(&self.records[..count]);
        let end = records.last().map_or(0, |last: &Record| usize::from(last.name_end));
        Making { records, names: self.names[..end].to_owned() }
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
        let packed = Packed::new(key, &[], &mut Shared::default());
        HeldKey { block: Arc::new(Block::default().and(packed.into_iter())), at: 0 }
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
        self.record().rare.as_deref()
    }

    /// Every secret that is known of it, the newest first.
    fn secrets(&self) -> impl Iterator<Item = Older> {
        let Record { version, digest, .. } = *self.record();
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
        let record = self.record();
        if record.digest == *digest {
            return Some(record.version);
        }
        let older = &record.rare.as_ref()?.older;
        older.iter().find(|secret| secret.digest == *digest).map(|secret| secret.version)
    }

    /// Whether it was revoked before `then`.
    pub(super) fn revoked_before(&self, then: Timestamp) -> bool {
        self.rare().and_then(|rare| rare.revoked_at).is_some_and(|at| at < then)
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
        let record = Record { rare, ..self.record().clone() };
        (digests, Some(Packed { record, name: self.name().unwrap_or_default().to_owned() }))
    }

    /// Since when it has been revoked.
    pub(super) fn revoked_at(&self) -> Option<Timestamp> {
        self.rare()?.revoked_at
    }

    /// Its id.
    #[must_use]
    pub fn id(&self) -> KeyId {
        self.record().id
    }

    /// Its name for people.
    #[must_use]
    pub fn name(&self) -> Option<&str> {
        Some(self.block.name(self.at)).filter(|name| !name.is_empty())
    }

    /// Its maker's own notes.
    #[must_use]
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        static NONE: BTreeMap<String, String> = BTreeMap::new();
        self.rare().map_or(&NONE, |rare| &rare.metadata)
    }
}

impl KeyFacts for HeldKey {
    fn owner(&self) -> &Owner {
        &self.record().owner
    }

    fn environment(&self) -> &EnvironmentName {
        &self.record().policy.environment
    }

    fn scopes(&self) -> &ScopeSet {
        &self.record().policy.scopes
    }

    fn roles(&self) -> &[RoleName] {
        &self.record().policy.roles
    }

    fn customers(&self) -> &[CustomerId] {
        &self.record().policy.customers
    }

    fn allowed_cidrs(&self) -> &[IpNet] {
        &self.record().policy.allowed_cidrs
    }

    fn rate_limits(&self) -> &[RateLimit] {
        &self.record().policy.rate_limits
    }

    fn quota(&self) -> Option<&Quota> {
        self.record().policy.quota.as_ref()
    }

    fn expires_at(&self) -> Option<Timestamp> {
        let end = self.record().expires_at;
        (end != NEVER).then_some(Timestamp::from_micros(end))
    }

    fn is_disabled(&self) -> bool {
        self.rare().is_some_and(|rare| rare.disabled)
    }

    fn is_revoked(&self) -> bool {
        self.rare().is_some_and(|rare| rare.revoked_at.is_some())
    }

    fn secret_ends(&self) -> impl Iterator<Item = (u32, Option<Timestamp>)> {
        let ends = |secret: &Older| if secret.over { Some(Timestamp::PASSED) } else { secret.ends };
        self.secrets().filter(|secret| !secret.left).map(move |secret| (secret.version, ends(&secret)))
    }
}
