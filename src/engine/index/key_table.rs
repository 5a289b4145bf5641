//! Stores all keys in memory, and finds them by the digest of any of their secrets.
//!
//! A key keeps its slot while it is in the index; the record in that slot is part of a block. The digest table maps
//! a digest to candidate slots.
//!
//! Readers take no lock; writers serialize on one that readers never take. A new digest is in its record before it is
//! in the table, and records are replaced as a whole.

use std::sync::{
    Arc, Mutex, MutexGuard, PoisonError,
    atomic::{AtomicUsize, Ordering},
};

use crate::domain::{
    key::{ApiKey, KeyOwner, KeySecret},
    key_policy::KeyPolicy,
    name::KeyId,
    time::Timestamp,
    token::TokenDigest,
};

use super::{
    block_array::BlockArray,
    digest_table::{DigestTable, KeySlot, TableOccupancy},
    key_block::{BlockEntryRef, BlockInterners, KeyBlock, KeyRef, OwnedBlockEntry, RECORDS_PER_BLOCK},
};

const SLOTS_PER_BLOCK: u32 = RECORDS_PER_BLOCK as u32;

/// All keys, with the table of their digests.
#[derive(Default)]
pub(super) struct KeyTable {
    digest_table: DigestTable,
    blocks: BlockArray,
    count: AtomicUsize,
    writer: Mutex<KeyTableWriter>,
}

/// The state that only writers need.
#[derive(Default)]
struct KeyTableWriter {
    occupancy: TableOccupancy,
    interners: BlockInterners,
    /// Slots whose keys were evicted.
    free_slots: Vec<KeySlot>,
    /// The first slot that was never used.
    next_slot: KeySlot,
    /// Keys for the slots from `next_slot` on, all in one block. Publishing them one by one would
    /// rebuild that block 64 times.
    staged_keys: Vec<OwnedBlockEntry>,
    /// A record was replaced or removed, so lists may contain unused values.
    has_stale_lists: bool,
}

impl KeyTable {
    /// The number of keys, including revoked ones.
    pub(super) fn len(&self) -> usize {
        self.count.load(Ordering::Relaxed)
    }

    /// Finds a key by digest, with the version of the secret that has it.
    pub(super) fn find_by_digest(&self, digest: &TokenDigest) -> Option<(KeyRef, u32)> {
        self.locate(digest).map(|(_, key, version)| (key, version))
    }

    /// Iterates over all keys in an unspecified order.
    pub(super) fn iter_keys(&self) -> impl Iterator<Item = KeyRef> {
        let blocks = self.lock_writer().next_slot.div_ceil(SLOTS_PER_BLOCK);
        let blocks = (0..blocks).filter_map(|number| self.blocks.get(number));
        blocks.flat_map(|block| (0..block.len()).filter_map(move |at| KeyRef::from_block(block.clone(), at)))
    }

    /// The current record of a key that changes. The newest secret is in the changed record too.
    pub(super) fn find_previous(&self, after: &ApiKey) -> Option<KeyRef> {
        self.find_slot(after).map(|(_, key)| key)
    }

    fn locate(&self, digest: &TokenDigest) -> Option<(KeySlot, KeyRef, u32)> {
        self.digest_table.find(digest, |slot| {
            let block = self.blocks.get(slot / SLOTS_PER_BLOCK)?;
            let key = KeyRef::from_block(block, offset_in_block(slot))?;
            // Another digest may have the same hash, and another key may have taken this slot.
            let version = key.find_version(digest)?;
            Some((slot, key, version))
        })
    }

    fn find_slot(&self, key: &ApiKey) -> Option<(KeySlot, KeyRef)> {
        let mut found = key.secrets.iter().filter_map(|secret| self.locate(&secret.digest));
        found.find(|(_, known, _)| known.id() == key.id).map(|(slot, known, _)| (slot, known))
    }

    fn lock_writer(&self) -> MutexGuard<'_, KeyTableWriter> {
        // The data is consistent between any two statements that could panic.
        self.writer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Loads a key of a snapshot, with the superseded secrets that have left its record. It can be found
    /// after [`KeyTable::publish`] at the latest.
    pub(super) fn load_key(&self, key: &ApiKey, retired_secrets: &[KeySecret]) {
        let mut writer = self.lock_writer();
        if let Some((slot, before)) = self.find_slot(key) {
            return self.update(&mut writer, slot, &before, key);
        }
        if let Some(entry) = OwnedBlockEntry::new(key, retired_secrets, &mut writer.interners) {
            self.stage(&mut writer, entry);
        }
    }

    /// Grows the digest table at once for this number of secrets.
    pub(super) fn reserve(&self, secrets: usize) {
        self.digest_table.reserve(&mut self.lock_writer().occupancy, secrets);
    }

    /// The stored owner that equals this one.
    pub(super) fn intern_owner(&self, owner: &Arc<KeyOwner>) -> Arc<KeyOwner> {
        self.lock_writer().interners.intern_owner(owner)
    }

    /// The stored policy that equals this one.
    pub(super) fn intern_policy(&self, policy: &Arc<KeyPolicy>) -> Arc<KeyPolicy> {
        self.lock_writer().interners.intern_policy(policy)
    }

    /// Loads new keys of a snapshot, whose owners and policies are interned; ideally a full block. They can be found
    /// after [`KeyTable::publish`] at the latest.
    pub(super) fn load_block(&self, keys: &[Option<BlockEntryRef<'_>>]) {
        let mut writer = self.lock_writer();
        if keys.len() < RECORDS_PER_BLOCK || offset_in_block(writer.next_slot) > 0 {
            return keys.iter().flatten().for_each(|key| self.stage(&mut writer, key.into_owned_entry()));
        }
        let KeyTableWriter { occupancy, interners, next_slot: next, .. } = &mut *writer;
        let first = *next;
        let block =
            self.blocks.put(first / SLOTS_PER_BLOCK, KeyBlock::from_entries(keys, keys.len(), interners));
        *next += SLOTS_PER_BLOCK;
        (first..*next).for_each(|slot| self.link_digests(occupancy, &block, slot, KeyRef::digests));
        self.count.fetch_add(keys.len(), Ordering::Relaxed);
    }

    /// Publishes all staged keys, and shrinks the digest table.
    pub(super) fn publish(&self) {
        let mut writer = self.lock_writer();
        self.publish_staged(&mut writer);
        self.digest_table.shrink_to_fit(&mut writer.occupancy);
    }

    /// Inserts or updates keys in this order. All of them can be found when this returns.
    ///
    /// Consecutive new keys are staged together: one by one, each would rebuild its block.
    pub(super) fn upsert<'k>(&self, keys: impl IntoIterator<Item = &'k ApiKey>) {
        let mut writer = self.lock_writer();
        for key in keys {
            if writer.staged_keys.iter().any(|staged| staged.id() == key.id) {
                self.publish_staged(&mut writer);
            }
            if let Some((slot, before)) = self.find_slot(key) {
                self.update(&mut writer, slot, &before, key);
                continue;
            }
            let Some(entry) = OwnedBlockEntry::new(key, &[], &mut writer.interners) else { continue };
            if let Some(slot) = writer.free_slots.pop() {
                self.replace_record(&mut writer, slot, &entry);
                self.count.fetch_add(1, Ordering::Relaxed);
            } else {
                self.stage(&mut writer, entry);
            }
        }
        self.publish_staged(&mut writer);
    }

    /// Stages a key until its block is full.
    fn stage(&self, writer: &mut KeyTableWriter, entry: OwnedBlockEntry) {
        writer.staged_keys.push(entry);
        if offset_in_block(writer.next_slot) + writer.staged_keys.len() == RECORDS_PER_BLOCK {
            self.publish_staged(writer);
        }
    }

    fn update(&self, writer: &mut KeyTableWriter, slot: KeySlot, before: &KeyRef, key: &ApiKey) {
        if let Some(entry) = OwnedBlockEntry::from_change(before, key, &mut writer.interners) {
            writer.has_stale_lists = true;
            self.replace_record(writer, slot, &entry);
        }
    }

    /// Replaces the record in a slot.
    fn replace_record(&self, writer: &mut KeyTableWriter, slot: KeySlot, entry: &OwnedBlockEntry) {
        if let Some(block) = self.blocks.get(slot / SLOTS_PER_BLOCK) {
            let block = block.with_replaced(offset_in_block(slot), entry, &mut writer.interners);
            let block = self.blocks.put(slot / SLOTS_PER_BLOCK, block);
            // Secrets that have left the record are in the table already, or were evicted.
            self.link_digests(&mut writer.occupancy, &block, slot, KeyRef::recorded_digests);
        }
    }

    fn publish_staged(&self, writer: &mut KeyTableWriter) {
        let KeyTableWriter { occupancy, interners, next_slot: next, staged_keys: staged, .. } = writer;
        let (first, count) = (*next, staged.len());
        if count == 0 {
            return;
        }
        let block = self.blocks.get(first / SLOTS_PER_BLOCK).unwrap_or_default();
        let block = self.blocks.put(first / SLOTS_PER_BLOCK, block.with_appended(staged, interners));
        staged.clear();
        *next += count as KeySlot;
        (first..*next).for_each(|slot| self.link_digests(occupancy, &block, slot, KeyRef::digests));
        self.count.fetch_add(count, Ordering::Relaxed);
    }

    /// Adds the digests of a key to the table unless they lead to it already. `block` is the current one.
    fn link_digests(
        &self,
        occupancy: &mut TableOccupancy,
        block: &Arc<KeyBlock>,
        slot: KeySlot,
        digests: fn(&KeyRef) -> Vec<TokenDigest>,
    ) {
        let Some(key) = KeyRef::from_block(block.clone(), offset_in_block(slot)) else { return };
        for digest in digests(&key) {
            if self.locate(&digest).is_none() {
                self.digest_table.insert(occupancy, &digest, slot);
            }
        }
    }

    /// Evicts keys revoked and secrets superseded before `cutoff`, and calls `on_removed` for each key that leaves.
    /// Returns how many digests were removed.
    pub(super) fn evict(&self, cutoff: Timestamp, mut on_removed: impl FnMut(KeyId)) -> usize {
        self.publish();
        let mut removed_digests = 0;
        let blocks = self.lock_writer().next_slot.div_ceil(SLOTS_PER_BLOCK);
        for number in 0..blocks {
            // The lock is released between blocks for other writers.
            let writer = &mut *self.lock_writer();
            let Some(block) = self.blocks.get(number) else { continue };
            if block.has_no_expirable_entries() {
                continue;
            }
            let mut changed = None;
            for at in 0..block.len() {
                let Some(key) = KeyRef::from_block(block.clone(), at) else { continue };
                let slot = number * SLOTS_PER_BLOCK + at as KeySlot;
                let before = changed.as_ref().unwrap_or(&*block);
                let (digests, after) = if key.is_revoked_before(cutoff) {
                    writer.free_slots.push(slot);
                    writer.has_stale_lists = true;
                    self.count.fetch_sub(1, Ordering::Relaxed);
                    on_removed(key.id());
                    (key.digests(), Some(before.with_removed(at, &mut writer.interners)))
                } else {
                    let (digests, less) = key.without_superseded(cutoff);
                    (digests, less.map(|entry| before.with_replaced(at, &entry, &mut writer.interners)))
                };
                let removed =
                    |digest: &&TokenDigest| self.digest_table.remove(&mut writer.occupancy, digest, slot);
                removed_digests += digests.iter().filter(removed).count();
                changed = after.or(changed);
            }
            if let Some(block) = changed {
                self.blocks.put(number, block);
            }
        }
        self.compact_lists();
        removed_digests
    }

    /// Drops values that only lists refer to: shrinks the common list to what records use, and rebuilds each
    /// block whose lists contain more.
    fn compact_lists(&self) {
        let (blocks, stale) = {
            let writer = &mut *self.lock_writer();
            (writer.next_slot.div_ceil(SLOTS_PER_BLOCK), std::mem::take(&mut writer.has_stale_lists))
        };
        if stale {
            let mut marks = self.lock_writer().interners.begin_marking();
            (0..blocks)
                .filter_map(|number| self.blocks.get(number))
                .for_each(|block| block.mark_used(&mut marks));
            self.lock_writer().interners.retain_marked(&marks);
        }
        for number in (0..blocks).filter(|_| stale) {
            // The lock is released between blocks for other writers; values that they add go into
            // lists of their own blocks.
            let writer = &mut *self.lock_writer();
            if let Some(block) = self.blocks.get(number).filter(|block| !block.is_compact(&writer.interners))
            {
                self.blocks.put(number, block.compact(&mut writer.interners));
            }
        }
        self.lock_writer().interners.collect_unused();
    }
}

/// The offset of a slot in its block.
fn offset_in_block(slot: KeySlot) -> usize {
    (slot % SLOTS_PER_BLOCK) as usize
}
