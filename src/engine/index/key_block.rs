//! Stores keys compactly, in immutable blocks.
//!
//! A record has what a Check needs and returns; other details are read from the store. The record of a revoked key
//! keeps only its ID, owner, environment, digests and the time of the revocation.
//!
//! Values that many keys share are interned, and records name them by number (`interner.rs`). Fields that few keys have
//! are in `sparse_column.rs` and `cold_fields.rs`; names are concatenated.
//!
//! A change builds a new block, which replaces the old one. So all secrets of a key change at one instant, and readers
//! need no lock. A block owns everything that its records refer to.

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

/// The number of records in a full block.
pub(super) const RECORDS_PER_BLOCK: usize = MAX_RECORDS;
/// The longest name in bytes: 255 characters of four bytes.
const MAX_NAME_BYTES: usize = 255 * 4;
// The end of a name fits into 16 bits.
const _: () = assert!(RECORDS_PER_BLOCK * MAX_NAME_BYTES <= u16::MAX as usize);
// This is the fixed cost of each key. 64 records of 56 bytes (3584) are exactly one size class of the allocator, whose
// next one is 4096: one more byte would cost eight.
const _: () = assert!(size_of::<BlockRecord>() <= 56);

/// Owners and policies, each stored once.
#[derive(Debug, Default)]
pub(super) struct BlockInterners {
    owners: Interner<KeyOwner>,
    policies: Interner<KeyPolicy>,
}

impl BlockInterners {
    /// The stored owner that equals this one.
    pub(super) fn intern_owner(&mut self, owner: &Arc<KeyOwner>) -> Arc<KeyOwner> {
        self.owners.intern_arc(owner)
    }

    /// The stored policy that equals this one.
    pub(super) fn intern_policy(&mut self, policy: &Arc<KeyPolicy>) -> Arc<KeyPolicy> {
        self.policies.intern_arc(policy)
    }

    /// Starts to mark the entries of the common lists that are in use.
    pub(super) fn begin_marking(&self) -> BlockMarks {
        BlockMarks { owners: self.owners.begin_marking(), policies: self.policies.begin_marking() }
    }

    /// Removes entries without a mark from the common lists.
    pub(super) fn retain_marked(&mut self, marks: &BlockMarks) {
        self.owners.retain_marked(&marks.owners);
        self.policies.retain_marked(&marks.policies);
    }

    /// Drops owners and policies that no key has.
    pub(super) fn collect_unused(&mut self) {
        self.owners.collect_unused();
        self.policies.collect_unused();
    }
}

/// The entries of both common lists that are in use.
pub(super) struct BlockMarks {
    owners: interner::ListMarks<KeyOwner>,
    policies: interner::ListMarks<KeyPolicy>,
}

/// The fixed-size part of a key.
#[derive(Debug)]
struct BlockRecord {
    id: KeyId,
    /// The digest of the newest secret.
    digest: TokenDigest,
    /// The newest secret's version, or [`LARGE_VERSION`]. Versions start at 1; 0 marks a free record.
    version: u16,
    /// The end of its name in the names of the block.
    name_end: u16,
    /// Its owner's number in the block's list.
    owner_number: u16,
    /// Its policy's number in the block's list.
    policy_number: u16,
}

impl BlockRecord {
    /// A free record, which no key uses.
    fn empty() -> BlockRecord {
        let (id, digest) = (KeyId::from_bytes([0; 16]), TokenDigest::from_bytes([0; 32]));
        BlockRecord { id, digest, version: 0, name_end: 0, owner_number: 0, policy_number: 0 }
    }
}

/// A key that is ready to be put into a block.
#[derive(Debug)]
pub(super) struct OwnedBlockEntry {
    id: KeyId,
    digest: TokenDigest,
    version: u32,
    /// Empty if the key has no name.
    name: String,
    expires_at: Option<Timestamp>,
    revoked_at: Option<Timestamp>,
    owner: Arc<KeyOwner>,
    policy: Arc<KeyPolicy>,
    cold_fields: Option<Arc<ColdFields>>,
}

/// Like [`OwnedBlockEntry`], but borrowed: from a block, or from a pending key.
#[derive(Clone, Copy)]
pub(super) struct BlockEntryRef<'a> {
    pub(super) id: KeyId,
    pub(super) digest: TokenDigest,
    pub(super) version: u32,
    /// Empty if the key has no name.
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

    /// Builds the entry of a loaded key, with the superseded secrets that have left its record. Returns `None` for a
    /// key without secrets, which nobody can find.
    pub(super) fn new(
        key: &ApiKey,
        retired: &[KeySecret],
        interners: &mut BlockInterners,
    ) -> Option<OwnedBlockEntry> {
        OwnedBlockEntry::with_cold_fields(
            key,
            ColdFieldsView::from_key(key).with_retired_secrets(retired),
            interners,
        )
    }

    /// Builds the entry of a key after a change.
    pub(super) fn from_change(
        before: &KeyRef,
        key: &ApiKey,
        interners: &mut BlockInterners,
    ) -> Option<OwnedBlockEntry> {
        let retired = before.secrets().filter_map(|previous| {
            let kept = key.secrets.iter().any(|kept| kept.version == previous.version);
            let ends = Some(previous.superseded_at.unwrap_or(key.updated_at).min(key.updated_at));
            if previous.is_retired {
                Some(previous)
            } else {
                (!kept).then_some(PreviousSecret {
                    superseded_at: ends,
                    is_retired: true,
                    is_already_superseded: true,
                    ..previous
                })
            }
        });
        OwnedBlockEntry::with_cold_fields(
            key,
            ColdFieldsView::from_key(key).with_previous_secrets(retired),
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
    pub(super) fn into_owned_entry(self) -> OwnedBlockEntry {
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

/// Up to 64 immutable records, with everything that they refer to.
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
    /// Builds a block of these entries, of which `new_keys` are new; `None` is a free record. Everything is allocated
    /// exactly, since allocators rarely take back spare capacity.
    pub(super) fn from_entries(
        entries: &[Option<BlockEntryRef<'_>>],
        new_keys: usize,
        interners: &mut BlockInterners,
    ) -> KeyBlock {
        let taken = entries.iter().flatten();
        let (owners, owner) =
            interners.owners.number_in_list(taken.clone().map(|occupied| occupied.owner), new_keys);
        let (policies, policy) =
            interners.policies.number_in_list(taken.clone().map(|occupied| occupied.policy), new_keys);
        let mut numbers = owner.into_iter().zip(policy);
        let mut names = String::with_capacity(taken.map(|occupied| occupied.name.len()).sum());
        let mut records = Vec::with_capacity(entries.len());
        for entry in entries {
            let mut record = BlockRecord::empty();
            if let (Some(occupied), Some((owner, policy))) = (entry, entry.and_then(|_| numbers.next())) {
                names.push_str(occupied.name);
                let BlockEntryRef { id, digest, version, .. } = *occupied;
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
            // It fits: see the assertion at `MAX_NAME_BYTES`.
            record.name_end = u16::try_from(names.len()).unwrap_or(u16::MAX);
            records.push(record);
        }
        let optional = entries.iter().map(Option::as_ref);
        let expiries = optional.clone().map(|entry| entry.and_then(|entry| entry.expires_at.as_ref()));
        let revocations = optional.clone().map(|entry| entry.and_then(|entry| entry.revoked_at.as_ref()));
        let cold_fields = optional.map(|entry| entry.and_then(|entry| entry.cold_fields));
        KeyBlock {
            records: records.into(),
            names: names.into(),
            expiries: SparseColumn::from_options(expiries),
            revocations: SparseColumn::from_options(revocations),
            cold_fields: SparseColumn::from_options(cold_fields),
            owners,
            policies,
        }
    }

    /// The number of records, including free ones.
    pub(super) fn len(&self) -> usize {
        self.records.len()
    }

    fn name_at(&self, at: usize) -> &str {
        let start = at.checked_sub(1).map_or(0, |before| self.records[before].name_end);
        &self.names[usize::from(start)..usize::from(self.records[at].name_end)]
    }

    /// The newest secret's version of a record; 0 if it is free.
    fn newest_version_at(&self, at: usize) -> u32 {
        match (self.records[at].version, self.cold_fields.get(at)) {
            (LARGE_VERSION, Some(cold_fields)) => cold_fields.large_version,
            (version, _) => version.into(),
        }
    }

    /// The entry at an offset; `None` if the record is free.
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

    /// Returns whether no key is revoked and no secret is superseded, so that eviction can skip the block.
    pub(super) fn has_no_expirable_entries(&self) -> bool {
        let ends = |cold_fields: &Arc<ColdFields>| {
            cold_fields.newest_superseded_at.is_some() || !cold_fields.previous_secrets.is_empty()
        };
        self.revocations.values().next().is_none() && !self.cold_fields.values().any(ends)
    }

    /// The entry of each record.
    fn entries(&self) -> Vec<Option<BlockEntryRef<'_>>> {
        (0..self.len()).map(|at| self.entry_at(at)).collect()
    }

    fn occupied_records(&self) -> impl Iterator<Item = &BlockRecord> + Clone {
        self.records.iter().filter(|record| record.version > 0)
    }

    /// Marks what its records use of the common lists.
    pub(super) fn mark_used(&self, marks: &mut BlockMarks) {
        marks.owners.mark(&self.owners, self.occupied_records().map(|record| record.owner_number));
        marks.policies.mark(&self.policies, self.occupied_records().map(|record| record.policy_number));
    }

    /// Returns whether each of its lists is the common one, or contains nothing that its records do not use.
    pub(super) fn is_compact(&self, interners: &BlockInterners) -> bool {
        let named = |numbers: &mut dyn Iterator<Item = u16>| numbers.collect::<HashSet<_>>().len();
        let owners =
            || named(&mut self.occupied_records().map(|record| record.owner_number)) == self.owners.len();
        let policies =
            || named(&mut self.occupied_records().map(|record| record.policy_number)) == self.policies.len();
        (interners.owners.is_common_list(&self.owners) || owners())
            && (interners.policies.is_common_list(&self.policies) || policies())
    }

    /// Rebuilds the block with the current lists.
    pub(super) fn compact(&self, interners: &mut BlockInterners) -> KeyBlock {
        KeyBlock::from_entries(&self.entries(), 0, interners)
    }

    /// The block with these entries appended.
    pub(super) fn with_appended(
        &self,
        appended: &[OwnedBlockEntry],
        interners: &mut BlockInterners,
    ) -> KeyBlock {
        let mut entries = self.entries();
        entries.extend(appended.iter().map(|entry| Some(entry.entry_ref())));
        KeyBlock::from_entries(&entries, appended.len(), interners)
    }

    /// The block with another entry at an existing offset.
    pub(super) fn with_replaced(
        &self,
        at: usize,
        entry: &OwnedBlockEntry,
        interners: &mut BlockInterners,
    ) -> KeyBlock {
        let mut entries = self.entries();
        entries[at] = Some(entry.entry_ref());
        KeyBlock::from_entries(&entries, 1, interners)
    }

    /// The block with the record at this offset freed.
    pub(super) fn with_removed(&self, at: usize, interners: &mut BlockInterners) -> KeyBlock {
        let mut entries = self.entries();
        entries[at] = None;
        KeyBlock::from_entries(&entries, 0, interners)
    }
}

/// A key in the engine: one record of an immutable block. Later changes of the key do not affect it.
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

/// Builds a key outside the index.
impl From<&ApiKey> for KeyRef {
    fn from(key: &ApiKey) -> Self {
        let interners = &mut BlockInterners::default();
        let entry = OwnedBlockEntry::new(key, &[], interners);
        KeyRef {
            block: Arc::new(KeyBlock::from_entries(
                &[entry.as_ref().map(OwnedBlockEntry::entry_ref)],
                1,
                interners,
            )),
            offset: 0,
        }
    }
}

impl KeyRef {
    /// The key at an offset of a block; `None` if the record is free.
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

    fn newest_version(&self) -> u32 {
        self.block.newest_version_at(self.offset)
    }

    /// All known secrets of the key, newest first.
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

    /// The digests of all its known secrets.
    pub(super) fn digests(&self) -> Vec<TokenDigest> {
        self.secrets().map(|secret| secret.digest).collect()
    }

    /// The digests of the secrets in its record.
    pub(super) fn recorded_digests(&self) -> Vec<TokenDigest> {
        self.secrets().filter(|secret| !secret.is_retired).map(|secret| secret.digest).collect()
    }

    /// The version of the secret that has this digest.
    pub(super) fn find_version(&self, digest: &TokenDigest) -> Option<u32> {
        if self.record().digest == *digest {
            return Some(self.newest_version());
        }
        let older = &self.cold_fields()?.previous_secrets;
        older.iter().find(|secret| secret.digest == *digest).map(|secret| secret.version)
    }

    /// Returns whether the key was revoked before `cutoff`.
    pub(super) fn is_revoked_before(&self, cutoff: Timestamp) -> bool {
        self.revoked_at().is_some_and(|at| at < cutoff)
    }

    /// Returns the digests of secrets that were superseded before `cutoff`. If some of these had left the record, also
    /// returns the key without them.
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
        let occupied = self.block.entry_at(self.offset);
        (digests, occupied.map(|occupied| OwnedBlockEntry { cold_fields, ..occupied.into_owned_entry() }))
    }

    /// When the key was revoked.
    pub(super) fn revoked_at(&self) -> Option<Timestamp> {
        self.block.revocations.get(self.offset).copied()
    }

    /// The ID of the key, which is public.
    #[must_use]
    pub fn id(&self) -> KeyId {
        self.record().id
    }

    /// The display name; `None` for a revoked key, which keeps no name.
    #[must_use]
    pub fn name(&self) -> Option<&str> {
        Some(self.block.name_at(self.offset)).filter(|name| !name.is_empty())
    }

    /// The metadata that its creator attached.
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
