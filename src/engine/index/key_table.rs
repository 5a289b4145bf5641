//! Every key in memory, found by the digest of any of its secrets.
//!
//! A key has a place (a slot) for as long as it is known, and its record stands there, in a block; the table says
//! at which places a digest may be. Readers take no lock. Writers take turns on one, which no reader takes. A new
//! digest is in its record before it is in the table, and a record is replaced as a whole.

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

/// The keys.
#[derive(Default)]
pub(super) struct KeyTable {
    digest_table: DigestTable,
    blocks: BlockArray,
    count: AtomicUsize,
    writer: Mutex<KeyTableWriter>,
}

/// What only the one who writes needs.
#[derive(Default)]
struct KeyTableWriter {
    occupancy: TableOccupancy,
    interners: BlockInterners,
    /// Places that keys have left.
    free_slots: Vec<KeySlot>,
    /// The first place that no key ever had.
    next_slot: KeySlot,
    /// Keys that will have the places from `next` on: all of one block. To load keys one by one would make that
    /// block 64 times.
    staged_keys: Vec<OwnedBlockEntry>,
    /// A record was replaced or removed, so that lists may hold what no record names.
    has_stale_lists: bool,
}

impl KeyTable {
    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.count.load(Ordering::Relaxed)
    }

    /// The key with this digest, and which version of its secret that is.
    pub(super) fn find_by_digest(&self, digest: &TokenDigest) -> Option<(KeyRef, u32)> {
        self.locate(digest).map(|(_, key, version)| (key, version))
    }

    /// Every key, in no order that means anything.
    pub(super) fn iter_keys(&self) -> impl Iterator<Item = KeyRef> {
        let blocks = self.lock_writer().next_slot.div_ceil(SLOTS_PER_BLOCK);
        let blocks = (0..blocks).filter_map(|number| self.blocks.get(number));
        blocks.flat_map(|block| (0..block.len()).filter_map(move |at| KeyRef::from_block(block.clone(), at)))
    }

    /// The record of a key before a change; its newest secret is in the record after it too.
    pub(super) fn find_previous(&self, after: &ApiKey) -> Option<KeyRef> {
        self.find_slot(after).map(|(_, key)| key)
    }

    fn locate(&self, digest: &TokenDigest) -> Option<(KeySlot, KeyRef, u32)> {
        self.digest_table.find(digest, |slot| {
            let block = self.blocks.get(slot / SLOTS_PER_BLOCK)?;
            let key = KeyRef::from_block(block, offset_in_block(slot))?;
            // Another key's digest may have the same hash, and another key may have come to this place.
            let version = key.find_version(digest)?;
            Some((slot, key, version))
        })
    }

    fn find_slot(&self, key: &ApiKey) -> Option<(KeySlot, KeyRef)> {
        let mut found = key.secrets.iter().filter_map(|secret| self.locate(&secret.digest));
        found.find(|(_, known, _)| known.id() == key.id).map(|(slot, known, _)| (slot, known))
    }

    fn lock_writer(&self) -> MutexGuard<'_, KeyTableWriter> {
        // The data is whole between any two statements that could panic.
        self.writer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a key of a snapshot, with the superseded secrets that left its record. It can be found after
    /// [`KeyTable::publish`], if not before.
    pub(super) fn load_key(&self, key: &ApiKey, retired_secrets: &[KeySecret]) {
        let mut writer = self.lock_writer();
        if let Some((slot, before)) = self.find_slot(key) {
            return self.update(&mut writer, slot, &before, key);
        }
        if let Some(entry) = OwnedBlockEntry::new(key, retired_secrets, &mut writer.interners) {
            self.stage(&mut writer, entry);
        }
    }

    /// Makes room for so many secrets, so that the table does not grow while they come.
    pub(super) fn reserve(&self, secrets: usize) {
        self.digest_table.reserve(&mut self.lock_writer().occupancy, secrets);
    }

    /// The owner that is kept of all that are equal.
    pub(super) fn intern_owner(&self, owner: &Arc<KeyOwner>) -> Arc<KeyOwner> {
        self.lock_writer().interners.intern_owner(owner)
    }

    /// The policy that is kept of all that are equal.
    pub(super) fn intern_policy(&self, policy: &Arc<KeyPolicy>) -> Arc<KeyPolicy> {
        self.lock_writer().interners.intern_policy(policy)
    }

    /// Takes new keys of a snapshot, whose owners and policies are kept ones: at best a whole block. They can be found
    /// after [`KeyTable::publish`], if not before.
    pub(super) fn load_block(&self, keys: &[Option<BlockEntryRef<'_>>]) {
        let mut writer = self.lock_writer();
        if keys.len() < RECORDS_PER_BLOCK || offset_in_block(writer.next_slot) > 0 {
            return keys.iter().flatten().for_each(|key| self.stage(&mut writer, key.to_owned_entry()));
        }
        let KeyTableWriter { occupancy, interners, next_slot: next, .. } = &mut *writer;
        let first = *next;
        let block =
            self.blocks.put(first / SLOTS_PER_BLOCK, KeyBlock::from_entries(keys, keys.len(), interners));
        *next += SLOTS_PER_BLOCK;
        (first..*next).for_each(|slot| self.link_digests(occupancy, &block, slot, KeyRef::digests));
        self.count.fetch_add(keys.len(), Ordering::Relaxed);
    }

    /// Makes everything that was loaded to be found.
    pub(super) fn publish(&self) {
        let mut writer = self.lock_writer();
        self.publish_staged(&mut writer);
        self.digest_table.shrink_to_fit(&mut writer.occupancy);
    }

    /// Takes keys that were created or changed, in this order. Those that are new and stand together are placed together:
    /// one by one each would make its block again. All of them can be found when this returns.
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

    /// Lets a key wait for the others of its block.
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

    /// Puts a record where another one is, or was.
    fn replace_record(&self, writer: &mut KeyTableWriter, slot: KeySlot, entry: &OwnedBlockEntry) {
        if let Some(block) = self.blocks.get(slot / SLOTS_PER_BLOCK) {
            let block = block.with_replaced(offset_in_block(slot), entry, &mut writer.interners);
            let block = self.blocks.put(slot / SLOTS_PER_BLOCK, block);
            // Those that left the record are in the table, or were forgotten.
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

    /// Sees that the table leads to a place by digests of the key there. `block` is the one there now.
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

    /// Forgets keys revoked and secrets superseded before `then`, and gives each key that is gone to `gone`. Returns
    /// how many digests are unknown now.
    pub(super) fn evict(&self, cutoff: Timestamp, mut on_removed: impl FnMut(KeyId)) -> usize {
        self.publish();
        let mut removed_digests = 0;
        let blocks = self.lock_writer().next_slot.div_ceil(SLOTS_PER_BLOCK);
        for number in 0..blocks {
            // Other writers come between two blocks.
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

    /// Frees what only lists keep: a common list is made of what records name, and each block that has more in its lists
    /// gets other ones.
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
            // Other writers come between two blocks; what they named meanwhile goes into lists of their blocks.
            let writer = &mut *self.lock_writer();
            if let Some(block) = self.blocks.get(number).filter(|block| !block.is_compact(&writer.interners))
            {
                self.blocks.put(number, block.compact(&mut writer.interners));
            }
        }
        self.lock_writer().interners.collect_unused();
    }
}

/// Where in its block a place is.
fn offset_in_block(slot: KeySlot) -> usize {
    (slot % SLOTS_PER_BLOCK) as usize
}
