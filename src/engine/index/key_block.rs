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
    key::{ApiKey, KeyOwner, KeySecret, Quota, RateLimit},
    key_attributes::KeyAttributes,
    key_policy::KeyPolicy,
    name::{CustomerId, EnvironmentName, KeyId, KeyName, RoleName},
    scope::ScopeSet,
    time::Timestamp,
    token::TokenDigest,
};

use super::{
    cold_fields::{ColdFields, ColdFieldsView, LARGE_VERSION, PreviousSecret},
    interner::{self, Interner, SharedList},
    sparse_column::{MAX_RECORDS, SparseColumn},
};

/// How many records a block has.
pub(super) const RECORDS_PER_BLOCK: usize = MAX_RECORDS;
/// The longest name in bytes: 255 characters.
const MAX_NAME_BYTES: usize = 255 * 4;
// Where a name ends fits into 16 bits.
const _: () = assert!(RECORDS_PER_BLOCK * MAX_NAME_BYTES <= u16::MAX as usize);
// Each key costs this much before anything else. 64 times 56 is one of the sizes in which the allocator gives memory
// (3584 bytes, and the next is 4096), so a byte more would cost eight.
const _: () = assert!(size_of::<BlockRecord>() <= 56);

/// What many keys have alike, each thing once.
#[derive(Debug, Default)]
pub(super) struct BlockInterners {
    owners: Interner<KeyOwner>,
    policies: Interner<KeyPolicy>,
}

impl BlockInterners {
    /// The owner that is kept of all that are equal.
    pub(super) fn intern_owner(&mut self, owner: &Arc<KeyOwner>) -> Arc<KeyOwner> {
        self.owners.intern_arc(owner)
    }

    /// The policy that is kept of all that are equal.
    pub(super) fn intern_policy(&mut self, policy: &Arc<KeyPolicy>) -> Arc<KeyPolicy> {
        self.policies.intern_arc(policy)
    }

    /// The common lists, to be marked with what of them is used.
    pub(super) fn begin_marking(&self) -> BlockMarks {
        BlockMarks { owners: self.owners.begin_marking(), policies: self.policies.begin_marking() }
    }

    /// Takes what is not marked out of the common lists.
    pub(super) fn retain_marked(&mut self, marks: &BlockMarks) {
        self.owners.retain_marked(&marks.owners);
        self.policies.retain_marked(&marks.policies);
    }

    /// Lets go of what no key has any more.
    pub(super) fn collect_unused(&mut self) {
        self.owners.collect_unused();
        self.policies.collect_unused();
    }
}

/// What of the common lists records name.
pub(super) struct BlockMarks {
    owners: interner::ListMarks<KeyOwner>,
    policies: interner::ListMarks<KeyPolicy>,
}

/// One key.
#[derive(Debug)]
struct BlockRecord {
    id: KeyId,
    /// The newest secret's.
    digest: TokenDigest,
    /// The newest secret's, or [`LARGE_VERSION`]. Versions count from 1; 0 = the place is free.
    version: u16,
    /// Where its name ends among the names of its block.
    name_end: u16,
    /// Its owner's number in its block's list.
    owner_number: u16,
    /// Its policy's.
    policy_number: u16,
}

impl BlockRecord {
    /// What stands where no key is.
    fn empty() -> BlockRecord {
        let (id, digest) = (KeyId::from_bytes([0; 16]), TokenDigest::from_bytes([0; 32]));
        BlockRecord { id, digest, version: 0, name_end: 0, owner_number: 0, policy_number: 0 }
    }
}

/// A key on its way into a block.
#[derive(Debug)]
pub(super) struct OwnedBlockEntry {
    id: KeyId,
    digest: TokenDigest,
    version: u32,
    /// Empty where it has none.
    name: String,
    expires_at: Option<Timestamp>,
    revoked_at: Option<Timestamp>,
    owner: Arc<KeyOwner>,
    policy: Arc<KeyPolicy>,
    cold_fields: Option<Arc<ColdFields>>,
}

/// The same while it stands somewhere: in a block, or on its way.
#[derive(Clone, Copy)]
pub(super) struct BlockEntryRef<'a> {
    pub(super) id: KeyId,
    pub(super) digest: TokenDigest,
    pub(super) version: u32,
    /// Empty where it has none.
    pub(super) name: &'a str,
    pub(super) expires_at: Option<Timestamp>,
    pub(super) revoked_at: Option<Timestamp>,
    pub(super) owner: &'a Arc<KeyOwner>,
    pub(super) policy: &'a Arc<KeyPolicy>,
    pub(super) cold_fields: Option<&'a Arc<ColdFields>>,
}

impl OwnedBlockEntry {
    pub(super) fn id(&self) -> KeyId {
        self.id
    }

    fn entry_ref(&self) -> BlockEntryRef<'_> {
        BlockEntryRef {
            id: self.id,
            digest: self.digest,
            version: self.version,
            name: &self.name,
            expires_at: self.expires_at,
            revoked_at: self.revoked_at,
            owner: &self.owner,
            policy: &self.policy,
            cold_fields: self.cold_fields.as_ref(),
        }
    }

    /// A key as it was loaded, with the superseded secrets that left its record. None of a key without secrets:
    /// nobody can find it.
    pub(super) fn new(
        key: &ApiKey,
        left: &[KeySecret],
        interners: &mut BlockInterners,
    ) -> Option<OwnedBlockEntry> {
        OwnedBlockEntry::with_cold_fields(
            key,
            ColdFieldsView::from_key(key).with_retired_secrets(left),
            interners,
        )
    }

    /// A key as it is after a change.
    pub(super) fn from_change(
        before: &KeyRef,
        key: &ApiKey,
        interners: &mut BlockInterners,
    ) -> Option<OwnedBlockEntry> {
        let left = before.secrets().filter_map(|old| {
            let kept = key.secrets.iter().any(|kept| kept.version == old.version);
            let ends = Some(old.superseded_at.unwrap_or(key.updated_at).min(key.updated_at));
            if old.is_retired {
                Some(old)
            } else {
                (!kept).then_some(PreviousSecret {
                    superseded_at: ends,
                    is_retired: true,
                    is_already_superseded: true,
                    ..old
                })
            }
        });
        OwnedBlockEntry::with_cold_fields(
            key,
            ColdFieldsView::from_key(key).with_previous_secrets(left),
            interners,
        )
    }

    fn with_cold_fields(
        key: &ApiKey,
        cold_fields: Option<Arc<ColdFields>>,
        interners: &mut BlockInterners,
    ) -> Option<OwnedBlockEntry> {
        let newest = key.secrets.first()?;
        let revoked_at = key.revocation.as_ref().map(|revocation| revocation.at);
        let alive = Some(key).filter(|_| revoked_at.is_none());
        let name = alive.and_then(|key| key.spec.name.as_ref());
        let policy =
            alive.map_or_else(|| KeyPolicy::without_grants(key.environment.clone()), KeyPolicy::from_key);
        Some(OwnedBlockEntry {
            id: key.id,
            digest: newest.digest,
            version: newest.version,
            name: name.map_or("", KeyName::as_str).to_owned(),
            expires_at: alive.and_then(|key| key.spec.expires_at),
            revoked_at,
            owner: interners.owners.intern(key.owner.clone()),
            policy: interners.policies.intern(policy),
            cold_fields,
        })
    }
}

impl BlockEntryRef<'_> {
    /// A copy.
    pub(super) fn to_owned_entry(&self) -> OwnedBlockEntry {
        OwnedBlockEntry {
            id: self.id,
            digest: self.digest,
            version: self.version,
            name: self.name.to_owned(),
            expires_at: self.expires_at,
            revoked_at: self.revoked_at,
            owner: self.owner.clone(),
            policy: self.policy.clone(),
            cold_fields: self.cold_fields.cloned(),
        }
    }
}

/// Up to 64 records that never change, with all that belongs to them.
#[derive(Debug)]
pub(super) struct KeyBlock {
    records: Box<[BlockRecord]>,
    names: Box<str>,
    expiries: SparseColumn<Timestamp>,
    revocations: SparseColumn<Timestamp>,
    cold_fields: SparseColumn<Arc<ColdFields>>,
    owners: SharedList<KeyOwner>,
    policies: SharedList<KeyPolicy>,
}

impl Default for KeyBlock {
    fn default() -> Self {
        KeyBlock::from_entries(&[], 0, &mut BlockInterners::default())
    }
}

impl KeyBlock {
    /// A block of these, of which `came` are new; None is a free place. Nothing in it has room that it does not use:
    /// an allocator seldom takes back what is too much.
    pub(super) fn from_entries(
        entries: &[Option<BlockEntryRef<'_>>],
        new_keys: usize,
        interners: &mut BlockInterners,
    ) -> KeyBlock {
        let taken = entries.iter().flatten();
        let (owners, owner) =
            interners.owners.number_in_list(taken.clone().map(|placed| placed.owner), new_keys);
        let (policies, policy) =
            interners.policies.number_in_list(taken.clone().map(|placed| placed.policy), new_keys);
        let mut numbers = owner.into_iter().zip(policy);
        let mut names = String::with_capacity(taken.map(|placed| placed.name.len()).sum());
        let mut records = Vec::with_capacity(entries.len());
        for place in entries {
            let mut record = BlockRecord::empty();
            if let (Some(placed), Some((owner, policy))) = (place, place.and_then(|_| numbers.next())) {
                names.push_str(placed.name);
                let BlockEntryRef { id, digest, version, .. } = *placed;
                let version = u16::try_from(version).unwrap_or(LARGE_VERSION);
                record = BlockRecord {
                    id,
                    digest,
                    version,
                    owner_number: owner,
                    policy_number: policy,
                    name_end: 0,
                };
            }
            // It fits: see `RECORDS_PER_BLOCK`.
            record.name_end = u16::try_from(names.len()).unwrap_or(u16::MAX);
            records.push(record);
        }
        let placed = entries.iter().map(Option::as_ref);
        let expiries = placed.clone().map(|placed| placed.and_then(|placed| placed.expires_at.as_ref()));
        let revocations = placed.clone().map(|placed| placed.and_then(|placed| placed.revoked_at.as_ref()));
        let rares = placed.map(|placed| placed.and_then(|placed| placed.cold_fields));
        KeyBlock {
            records: records.into(),
            names: names.into(),
            expiries: SparseColumn::from_options(expiries),
            revocations: SparseColumn::from_options(revocations),
            cold_fields: SparseColumn::from_options(rares),
            owners,
            policies,
        }
    }

    /// How many records it has, free places included.
    pub(super) fn len(&self) -> usize {
        self.records.len()
    }

    fn name_at(&self, at: usize) -> &str {
        let start = at.checked_sub(1).map_or(0, |before| self.records[before].name_end);
        &self.names[usize::from(start)..usize::from(self.records[at].name_end)]
    }

    /// The newest secret's version of the key at a place; 0 where it is free.
    fn newest_version_at(&self, at: usize) -> u32 {
        match (self.records[at].version, self.cold_fields.get(at)) {
            (LARGE_VERSION, Some(cold_fields)) => cold_fields.large_version,
            (version, _) => version.into(),
        }
    }

    /// What stands at a place; None where it is free.
    fn entry_at(&self, at: usize) -> Option<BlockEntryRef<'_>> {
        let record = &self.records[at];
        (record.version > 0).then(|| BlockEntryRef {
            id: record.id,
            digest: record.digest,
            version: self.newest_version_at(at),
            name: self.name_at(at),
            expires_at: self.expiries.get(at).copied(),
            revoked_at: self.revocations.get(at).copied(),
            owner: &self.owners[usize::from(record.owner_number)],
            policy: &self.policies[usize::from(record.policy_number)],
            cold_fields: self.cold_fields.get(at),
        })
    }

    /// Whether no key in it is revoked and no secret superseded.
    pub(super) fn has_no_expirable_entries(&self) -> bool {
        let ends = |cold_fields: &Arc<ColdFields>| {
            cold_fields.newest_superseded_at.is_some() || !cold_fields.previous_secrets.is_empty()
        };
        self.revocations.values().next().is_none() && !self.cold_fields.values().any(ends)
    }

    /// What stands at each place.
    fn entries(&self) -> Vec<Option<BlockEntryRef<'_>>> {
        (0..self.len()).map(|at| self.entry_at(at)).collect()
    }

    fn occupied_records(&self) -> impl Iterator<Item = &BlockRecord> + Clone {
        self.records.iter().filter(|record| record.version > 0)
    }

    /// Marks what its records name of the common lists.
    pub(super) fn mark_used(&self, marks: &mut BlockMarks) {
        marks.owners.mark(&self.owners, self.occupied_records().map(|record| record.owner_number));
        marks.policies.mark(&self.policies, self.occupied_records().map(|record| record.policy_number));
    }

    /// Whether each of its lists is the common one, or has nothing that its records do not name.
    pub(super) fn is_compact(&self, interners: &BlockInterners) -> bool {
        let named = |numbers: &mut dyn Iterator<Item = u16>| numbers.collect::<HashSet<_>>().len();
        let owners =
            || named(&mut self.occupied_records().map(|record| record.owner_number)) == self.owners.len();
        let policies =
            || named(&mut self.occupied_records().map(|record| record.policy_number)) == self.policies.len();
        (interners.owners.is_common_list(&self.owners) || owners())
            && (interners.policies.is_common_list(&self.policies) || policies())
    }

    /// The same block with other lists.
    pub(super) fn compact(&self, interners: &mut BlockInterners) -> KeyBlock {
        KeyBlock::from_entries(&self.entries(), 0, interners)
    }

    /// The same block with more records.
    pub(super) fn with_appended(&self, more: &[OwnedBlockEntry], interners: &mut BlockInterners) -> KeyBlock {
        let mut entries = self.entries();
        entries.extend(more.iter().map(|packed| Some(packed.entry_ref())));
        KeyBlock::from_entries(&entries, more.len(), interners)
    }

    /// The same block with another record at a place that it has.
    pub(super) fn with_replaced(
        &self,
        at: usize,
        packed: &OwnedBlockEntry,
        interners: &mut BlockInterners,
    ) -> KeyBlock {
        let mut entries = self.entries();
        entries[at] = Some(packed.entry_ref());
        KeyBlock::from_entries(&entries, 1, interners)
    }

    /// The same block with a free place.
    pub(super) fn with_removed(&self, at: usize, interners: &mut BlockInterners) -> KeyBlock {
        let mut entries = self.entries();
        entries[at] = None;
        KeyBlock::from_entries(&entries, 0, interners)
    }
}

/// A key as the engine holds it: a record of a block, which stays as it is however the key changes.
#[derive(Clone)]
pub struct KeyRef {
    block: Arc<KeyBlock>,
    offset: usize,
}

impl fmt::Debug for KeyRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("KeyRef").field(&self.id()).finish()
    }
}

/// A key outside the index.
impl From<&ApiKey> for KeyRef {
    fn from(key: &ApiKey) -> Self {
        let interners = &mut BlockInterners::default();
        let packed = OwnedBlockEntry::new(key, &[], interners);
        KeyRef {
            block: Arc::new(KeyBlock::from_entries(
                &[packed.as_ref().map(OwnedBlockEntry::entry_ref)],
                1,
                interners,
            )),
            offset: 0,
        }
    }
}

impl KeyRef {
    /// The key at a place of a block; None where the place is free.
    pub(super) fn from_block(block: Arc<KeyBlock>, at: usize) -> Option<KeyRef> {
        let taken = block.records.get(at)?.version > 0;
        taken.then_some(KeyRef { block, offset: at })
    }

    fn record(&self) -> &BlockRecord {
        &self.block.records[self.offset]
    }

    fn cold_fields(&self) -> Option<&ColdFields> {
        self.block.cold_fields.get(self.offset).map(Arc::as_ref)
    }

    fn policy(&self) -> &KeyPolicy {
        &self.block.policies[usize::from(self.record().policy_number)]
    }

    /// The newest secret's version.
    fn newest_version(&self) -> u32 {
        self.block.newest_version_at(self.offset)
    }

    /// Every secret that is known of it, the newest first.
    fn secrets(&self) -> impl Iterator<Item = PreviousSecret> {
        let (version, digest) = (self.newest_version(), self.record().digest);
        let ends = self.cold_fields().and_then(|cold_fields| cold_fields.newest_superseded_at);
        let older = self.cold_fields().map_or(&[][..], |cold_fields| &cold_fields.previous_secrets);
        [PreviousSecret {
            version,
            digest,
            superseded_at: ends,
            is_retired: false,
            is_already_superseded: false,
        }]
        .into_iter()
        .chain(older.iter().cloned())
    }

    /// The digests of every secret that is known of it.
    pub(super) fn digests(&self) -> Vec<TokenDigest> {
        self.secrets().map(|secret| secret.digest).collect()
    }

    /// The digests of the secrets in its record.
    pub(super) fn recorded_digests(&self) -> Vec<TokenDigest> {
        self.secrets().filter(|secret| !secret.is_retired).map(|secret| secret.digest).collect()
    }

    /// Which version of its secret has this digest.
    pub(super) fn find_version(&self, digest: &TokenDigest) -> Option<u32> {
        if self.record().digest == *digest {
            return Some(self.newest_version());
        }
        let older = &self.cold_fields()?.previous_secrets;
        older.iter().find(|secret| secret.digest == *digest).map(|secret| secret.version)
    }

    /// Whether it was revoked before `then`.
    pub(super) fn is_revoked_before(&self, cutoff: Timestamp) -> bool {
        self.revoked_at().is_some_and(|at| at < cutoff)
    }

    /// The digests of its secrets that were superseded before `then`, and the key without those among them that
    /// left the record, where there are such.
    pub(super) fn without_superseded(
        &self,
        cutoff: Timestamp,
    ) -> (Vec<TokenDigest>, Option<OwnedBlockEntry>) {
        let Some(cold_fields) = self.cold_fields() else { return (Vec::new(), None) };
        let is_due = |secret: &PreviousSecret| secret.superseded_at.is_some_and(|end| end < cutoff);
        let digests = self.secrets().filter(is_due).map(|secret| secret.digest).collect();
        if !cold_fields.previous_secrets.iter().any(|secret| secret.is_retired && is_due(secret)) {
            return (digests, None);
        }
        let older = cold_fields
            .previous_secrets
            .iter()
            .filter(|secret| !(secret.is_retired && is_due(secret)))
            .cloned()
            .collect();
        let cold_fields =
            ColdFields { previous_secrets: older, metadata: cold_fields.metadata.clone(), ..*cold_fields };
        let cold_fields = (cold_fields != ColdFields::default()).then(|| Arc::new(cold_fields));
        let placed = self.block.entry_at(self.offset);
        (digests, placed.map(|placed| OwnedBlockEntry { cold_fields, ..placed.to_owned_entry() }))
    }

    /// Since when it has been revoked.
    pub(super) fn revoked_at(&self) -> Option<Timestamp> {
        self.block.revocations.get(self.offset).copied()
    }

    /// Its id.
    #[must_use]
    pub fn id(&self) -> KeyId {
        self.record().id
    }

    /// Its name for people. A revoked key has none here.
    #[must_use]
    pub fn name(&self) -> Option<&str> {
        Some(self.block.name_at(self.offset)).filter(|name| !name.is_empty())
    }

    /// Its maker's own notes.
    #[must_use]
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        static NONE: BTreeMap<String, String> = BTreeMap::new();
        self.cold_fields().and_then(|cold_fields| cold_fields.metadata.as_deref()).unwrap_or(&NONE)
    }
}

impl KeyAttributes for KeyRef {
    fn owner(&self) -> &KeyOwner {
        &self.block.owners[usize::from(self.record().owner_number)]
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
        self.block.expiries.get(self.offset).copied()
    }

    fn is_disabled(&self) -> bool {
        self.cold_fields().is_some_and(|cold_fields| cold_fields.disabled)
    }

    fn is_revoked(&self) -> bool {
        self.revoked_at().is_some()
    }

    fn secret_expiries(&self) -> impl Iterator<Item = (u32, Option<Timestamp>)> {
        let ends = |secret: &PreviousSecret| {
            if secret.is_already_superseded { Some(Timestamp::MIN) } else { secret.superseded_at }
        };
        self.secrets().filter(|secret| !secret.is_retired).map(move |secret| (secret.version, ends(&secret)))
    }
}
