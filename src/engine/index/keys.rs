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
    key::{Key, Owner, Secret},
    name::KeyId,
    policy::Policy,
    time::Timestamp,
    token::Digest,
};

use super::{
    held::{BLOCK, Block, HeldKey, Packed, Placed, Shared},
    shelf::Shelf,
    table::{Slot, Table, Tally},
};

const PER_BLOCK: u32 = BLOCK as u32;

/// The keys.
#[derive(Default)]
pub(super) struct Keys {
    table: Table,
    shelf: Shelf,
    count: AtomicUsize,
    writer: Mutex<Writer>,
}

/// What only the one who writes needs.
#[derive(Default)]
struct Writer {
    tally: Tally,
    shared: Shared,
    /// Places that keys have left.
    free: Vec<Slot>,
    /// The first place that no key ever had.
    next: Slot,
    /// Keys that will have the places from `next` on: all of one block. To load keys one by one would make that
    /// block 64 times.
    coming: Vec<Packed>,
    /// A record was replaced or removed, so that lists may hold what no record names.
    stale_lists: bool,
}

impl Keys {
    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.count.load(Ordering::Relaxed)
    }

    /// The key with this digest, and which version of its secret that is.
    pub(super) fn find(&self, digest: &Digest) -> Option<(HeldKey, u32)> {
        self.locate(digest).map(|(_, key, version)| (key, version))
    }

    /// Every key, in no order that means anything.
    pub(super) fn each(&self) -> impl Iterator<Item = HeldKey> {
        let blocks = self.writer().next.div_ceil(PER_BLOCK);
        let blocks = (0..blocks).filter_map(|number| self.shelf.get(number));
        blocks.flat_map(|block| (0..block.len()).filter_map(move |at| HeldKey::at(block.clone(), at)))
    }

    /// The record of a key before a change; its newest secret is in the record after it too.
    pub(super) fn before(&self, after: &Key) -> Option<HeldKey> {
        self.place_of(after).map(|(_, key)| key)
    }

    fn locate(&self, digest: &Digest) -> Option<(Slot, HeldKey, u32)> {
        self.table.find(digest, |slot| {
            let block = self.shelf.get(slot / PER_BLOCK)?;
            let key = HeldKey::at(block, within(slot))?;
            // Another key's digest may have the same hash, and another key may have come to this place.
            let version = key.version_of(digest)?;
            Some((slot, key, version))
        })
    }

    fn place_of(&self, key: &Key) -> Option<(Slot, HeldKey)> {
        let mut found = key.secrets.iter().filter_map(|secret| self.locate(&secret.digest));
        found.find(|(_, known, _)| known.id() == key.id).map(|(slot, known, _)| (slot, known))
    }

    fn writer(&self) -> MutexGuard<'_, Writer> {
        // The data is whole between any two statements that could panic.
        self.writer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a key of a snapshot, with the superseded secrets that left its record. It can be found after
    /// [`Keys::show`], if not before.
    pub(super) fn load(&self, key: &Key, left: &[Secret]) {
        let mut writer = self.writer();
        if let Some((slot, before)) = self.place_of(key) {
            return self.change(&mut writer, slot, &before, key);
        }
        if let Some(packed) = Packed::new(key, left, &mut writer.shared) {
            self.come(&mut writer, packed);
        }
    }

    /// Makes room for so many secrets, so that the table does not grow while they come.
    pub(super) fn expect(&self, secrets: usize) {
        self.table.reserve(&mut self.writer().tally, secrets);
    }

    /// The owner that is kept of all that are equal.
    pub(super) fn owner(&self, owner: &Arc<Owner>) -> Arc<Owner> {
        self.writer().shared.owner(owner)
    }

    /// The policy that is kept of all that are equal.
    pub(super) fn policy(&self, policy: &Arc<Policy>) -> Arc<Policy> {
        self.writer().shared.policy(policy)
    }

    /// Takes new keys of a snapshot, whose owners and policies are kept ones: at best a whole block. They can be found
    /// after [`Keys::show`], if not before.
    pub(super) fn place(&self, keys: &[Option<Placed<'_>>]) {
        let mut writer = self.writer();
        if keys.len() < BLOCK || within(writer.next) > 0 {
            return keys.iter().flatten().for_each(|key| self.come(&mut writer, key.packed()));
        }
        let Writer { tally, shared, next, .. } = &mut *writer;
        let first = *next;
        let block = self.shelf.put(first / PER_BLOCK, Block::of(keys, keys.len(), shared));
        *next += PER_BLOCK;
        (first..*next).for_each(|slot| self.note(tally, &block, slot, HeldKey::digests));
        self.count.fetch_add(keys.len(), Ordering::Relaxed);
    }

    /// Makes everything that was loaded to be found.
    pub(super) fn show(&self) {
        let mut writer = self.writer();
        self.place_coming(&mut writer);
        self.table.fit(&mut writer.tally);
    }

    /// Takes keys that were created or changed, in this order. Those that are new and stand together are placed together:
    /// one by one each would make its block again. All of them can be found when this returns.
    pub(super) fn put<'k>(&self, keys: impl IntoIterator<Item = &'k Key>) {
        let mut writer = self.writer();
        for key in keys {
            if writer.coming.iter().any(|coming| coming.id() == key.id) {
                self.place_coming(&mut writer);
            }
            if let Some((slot, before)) = self.place_of(key) {
                self.change(&mut writer, slot, &before, key);
                continue;
            }
            let Some(packed) = Packed::new(key, &[], &mut writer.shared) else { continue };
            if let Some(slot) = writer.free.pop() {
                self.replace(&mut writer, slot, &packed);
                self.count.fetch_add(1, Ordering::Relaxed);
            } else {
                self.come(&mut writer, packed);
            }
        }
        self.place_coming(&mut writer);
    }

    /// Lets a key wait for the others of its block.
    fn come(&self, writer: &mut Writer, packed: Packed) {
        writer.coming.push(packed);
        if within(writer.next) + writer.coming.len() == BLOCK {
            self.place_coming(writer);
        }
    }

    fn change(&self, writer: &mut Writer, slot: Slot, before: &HeldKey, key: &Key) {
        if let Some(packed) = Packed::after(before, key, &mut writer.shared) {
            writer.stale_lists = true;
            self.replace(writer, slot, &packed);
        }
    }

    /// Puts a record where another one is, or was.
    fn replace(&self, writer: &mut Writer, slot: Slot, packed: &Packed) {
        if let Some(block) = self.shelf.get(slot / PER_BLOCK) {
            let block = block.with(within(slot), packed, &mut writer.shared);
            let block = self.shelf.put(slot / PER_BLOCK, block);
            // Those that left the record are in the table, or were forgotten.
            self.note(&mut writer.tally, &block, slot, HeldKey::digests_in_record);
        }
    }

    fn place_coming(&self, writer: &mut Writer) {
        let Writer { tally, shared, next, coming, .. } = writer;
        let (first, count) = (*next, coming.len());
        if count == 0 {
            return;
        }
        let block = self.shelf.get(first / PER_BLOCK).unwrap_or_default();
        let block = self.shelf.put(first / PER_BLOCK, block.and(coming, shared));
        coming.clear();
        *next += count as Slot;
        (first..*next).for_each(|slot| self.note(tally, &block, slot, HeldKey::digests));
        self.count.fetch_add(count, Ordering::Relaxed);
    }

    /// Sees that the table leads to a place by digests of the key there. `block` is the one there now.
    fn note(&self, tally: &mut Tally, block: &Arc<Block>, slot: Slot, digests: fn(&HeldKey) -> Vec<Digest>) {
        let Some(key) = HeldKey::at(block.clone(), within(slot)) else { return };
        for digest in digests(&key) {
            if self.locate(&digest).is_none() {
                self.table.insert(tally, &digest, slot);
            }
        }
    }

    /// Forgets keys revoked and secrets superseded before `then`, and gives each key that is gone to `gone`. Returns
    /// how many digests are unknown now.
    pub(super) fn forget(&self, then: Timestamp, mut gone: impl FnMut(KeyId)) -> usize {
        self.show();
        let mut forgotten = 0;
        let blocks = self.writer().next.div_ceil(PER_BLOCK);
        for number in 0..blocks {
            // Other writers come between two blocks.
            let writer = &mut *self.writer();
            let Some(block) = self.shelf.get(number) else { continue };
            if block.lasts() {
                continue;
            }
            let mut changed = None;
            for at in 0..block.len() {
                let Some(key) = HeldKey::at(block.clone(), at) else { continue };
                let slot = number * PER_BLOCK + at as Slot;
                let before = changed.as_ref().unwrap_or(&*block);
                let (digests, after) = if key.revoked_before(then) {
                    writer.free.push(slot);
                    writer.stale_lists = true;
                    self.count.fetch_sub(1, Ordering::Relaxed);
                    gone(key.id());
                    (key.digests(), Some(before.without(at, &mut writer.shared)))
                } else {
                    let (digests, less) = key.superseded_before(then);
                    (digests, less.map(|packed| before.with(at, &packed, &mut writer.shared)))
                };
                let removed = |digest: &&Digest| self.table.remove(&mut writer.tally, digest, slot);
                forgotten += digests.iter().filter(removed).count();
                changed = after.or(changed);
            }
            if let Some(block) = changed {
                self.shelf.put(number, block);
            }
        }
        self.compact_lists();
        forgotten
    }

    /// Frees what only lists keep: a common list is made of what records name, and each block that has more in its lists
    /// gets other ones.
    fn compact_lists(&self) {
        let (blocks, stale) = {
            let writer = &mut *self.writer();
            (writer.next.div_ceil(PER_BLOCK), std::mem::take(&mut writer.stale_lists))
        };
        if stale {
            let mut marks = self.writer().shared.marks();
            (0..blocks).filter_map(|number| self.shelf.get(number)).for_each(|block| block.mark(&mut marks));
            self.writer().shared.keep_marked(&marks);
        }
        for number in (0..blocks).filter(|_| stale) {
            // Other writers come between two blocks; what they named meanwhile goes into lists of their blocks.
            let writer = &mut *self.writer();
            if let Some(block) = self.shelf.get(number).filter(|block| !block.is_compact(&writer.shared)) {
                self.shelf.put(number, block.compacted(&mut writer.shared));
            }
        }
        self.writer().shared.sweep();
    }
}

/// Where in its block a place is.
fn within(slot: Slot) -> usize {
    (slot % PER_BLOCK) as usize
}
