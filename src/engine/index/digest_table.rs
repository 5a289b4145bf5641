//! Maps digests to slots: an open-addressing table of atomic words, with linear probing.
//!
//! Readers load words and never wait. One writer at a time changes them; it holds the [`TableOccupancy`]. A table
//! that is seven eighths full is replaced by one that is a third larger. Readers of the old table still find
//! everything that was in it.
//!
//! A digest takes 9 to 11 bytes. In the fullest table a hit reads about 4 cells, and a miss about 30, which are
//! adjacent: four cache lines. Hardly one cell in 2^32 leads to a wrong key. The writer moves each cell about six
//! times in total, in order.
//!
//! A cell has 32 bits of the digest's hash and the slot of its key. The digest itself is in the key's
//! record and is compared there. Clients can choose the digests that they import, so the hash is keyed:
//! nobody can construct digests that collide.

use std::{
    hash::{BuildHasher as _, RandomState},
    sync::atomic::{AtomicU64, Ordering},
};

use arc_swap::ArcSwap;

use crate::domain::token::TokenDigest;

/// Where a key is: the block's number times the block's size, plus the offset.
pub(super) type KeySlot = u32;

/// A cell that was never used: probing stops here.
const EMPTY: u64 = 0;
/// A cell whose entry was removed: probing continues.
const TOMBSTONE: u64 = 1;
/// Added to the slot in a cell, to distinguish it from `EMPTY` and `TOMBSTONE`.
const SLOT_BIAS: u64 = 2;
const MIN_CELLS: usize = 1024;

/// Multilinear hashing (Lemire and Kaser 2014): any two digests collide with a probability of 2^-32.
struct DigestHasher([u64; 9]);

impl DigestHasher {
    fn from_random_seed() -> Self {
        let random = RandomState::new();
        DigestHasher(std::array::from_fn(|at| random.hash_one(at)))
    }

    fn hash_digest(&self, digest: &TokenDigest) -> u64 {
        let (words, _) = digest.as_bytes().as_chunks::<4>();
        let terms = words
            .iter()
            .zip(&self.0)
            .map(|(word, factor)| factor.wrapping_mul(u32::from_ne_bytes(*word).into()));
        terms.fold(self.0[8], u64::wrapping_add) >> 32
    }
}

/// How full the table is. Its holder is the only writer.
#[derive(Debug, Default)]
pub(super) struct TableOccupancy {
    /// The number of cells with an entry.
    live_cells: usize,
    /// The number of cells with an entry or a tombstone.
    used_cells: usize,
}

struct CellArray(Box<[AtomicU64]>);

impl CellArray {
    fn new(count: usize) -> Self {
        CellArray((0..count).map(|_| AtomicU64::new(EMPTY)).collect())
    }

    /// Iterates over the cells that may hold a digest with this hash, up to the first empty one.
    fn probe(&self, hash: u64) -> impl Iterator<Item = (&AtomicU64, u64)> {
        let count = self.0.len();
        // The hash as a fraction of the table, which may have any length.
        let start = usize::try_from((hash * count as u64) >> 32).unwrap_or_default();
        let (wrapped, first) = self.0.split_at(start);
        let cells = first.iter().chain(wrapped).map(|cell| (cell, cell.load(Ordering::Acquire)));
        cells.take_while(|(_, value)| *value != EMPTY)
    }
}

/// The hash table, without the keys.
pub(super) struct DigestTable {
    hasher: DigestHasher,
    cells: ArcSwap<CellArray>,
}

impl Default for DigestTable {
    fn default() -> Self {
        DigestTable {
            hasher: DigestHasher::from_random_seed(),
            cells: ArcSwap::from_pointee(CellArray::new(MIN_CELLS)),
        }
    }
}

impl DigestTable {
    /// Calls `look` for each slot that may have this digest, and returns its first result.
    pub(super) fn find<T>(&self, digest: &TokenDigest, look: impl FnMut(KeySlot) -> Option<T>) -> Option<T> {
        let hash = self.hasher.hash_digest(digest);
        let cells = self.cells.load();
        let matching = cells.probe(hash).filter(|(_, value)| value >> 32 == hash);
        matching.filter_map(|(_, value)| decode_slot(value)).find_map(look)
    }

    /// Adds a digest and its slot.
    pub(super) fn insert(&self, occupancy: &mut TableOccupancy, digest: &TokenDigest, slot: KeySlot) {
        if (occupancy.used_cells + 1) * 8 > self.cells.load().0.len() * 7 {
            self.grow(occupancy);
        }
        insert_cell(&self.cells.load(), encode_cell(self.hasher.hash_digest(digest), slot));
        occupancy.live_cells += 1;
        occupancy.used_cells += 1;
    }

    /// Removes a digest from a slot. Returns whether it was there.
    pub(super) fn remove(&self, occupancy: &mut TableOccupancy, digest: &TokenDigest, slot: KeySlot) -> bool {
        let cell_value = encode_cell(self.hasher.hash_digest(digest), slot);
        let cells = self.cells.load();
        let found = cells.probe(cell_value >> 32).find(|(_, value)| *value == cell_value);
        if let Some((cell, _)) = found {
            cell.store(TOMBSTONE, Ordering::Release);
            occupancy.live_cells -= 1;
        }
        found.is_some()
    }

    /// Grows the table at once for this number of additional digests.
    pub(super) fn reserve(&self, occupancy: &mut TableOccupancy, additional: usize) {
        let min_cells = (occupancy.used_cells + additional) * 8 / 7 + 1;
        if self.cells.load().0.len() < min_cells {
            self.rehash(occupancy, (occupancy.live_cells + additional) * 4 / 3);
        }
    }

    /// Shrinks the table if it is less than half full.
    pub(super) fn shrink_to_fit(&self, occupancy: &mut TableOccupancy) {
        let target = (occupancy.live_cells * 4 / 3).max(MIN_CELLS);
        if self.cells.load().0.len() > 2 * target {
            self.rehash(occupancy, target);
        }
    }

    /// Replaces the table by one that is three quarters full, without tombstones.
    fn grow(&self, occupancy: &mut TableOccupancy) {
        self.rehash(occupancy, occupancy.live_cells * 4 / 3);
    }

    /// Replaces the table by one with this number of cells, without tombstones.
    fn rehash(&self, occupancy: &mut TableOccupancy, cells: usize) {
        let new_cells = CellArray::new(cells.max(MIN_CELLS));
        let old = self.cells.load();
        let values = old.0.iter().map(|cell| cell.load(Ordering::Relaxed));
        values.filter(|value| decode_slot(*value).is_some()).for_each(|value| insert_cell(&new_cells, value));
        self.cells.store(new_cells.into());
        occupancy.used_cells = occupancy.live_cells;
    }
}

fn encode_cell(hash: u64, slot: KeySlot) -> u64 {
    hash << 32 | (SLOT_BIAS + u64::from(slot))
}

/// The slot in a cell; `None` for an empty cell or a tombstone.
fn decode_slot(value: u64) -> Option<KeySlot> {
    let low = value & u64::from(u32::MAX);
    low.checked_sub(SLOT_BIAS).and_then(|slot| KeySlot::try_from(slot).ok())
}

/// Writes to the first empty cell. There is one: a table is never full.
fn insert_cell(cells: &CellArray, value: u64) {
    let taken = cells.probe(value >> 32).count();
    let count = cells.0.len();
    let start = usize::try_from(((value >> 32) * count as u64) >> 32).unwrap_or_default();
    cells.0[(start + taken) % count].store(value, Ordering::Release);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digest(number: usize) -> TokenDigest {
        TokenDigest::from_token(&number.to_string())
    }

    /// The mean number of cells that a look-up of these digests reads.
    fn probed(table: &DigestTable, digests: std::ops::Range<usize>) -> f64 {
        let count = digests.len() as f64;
        let cells = table.cells.load();
        let look = |digest: &TokenDigest| {
            let hash = table.hasher.hash_digest(digest);
            1 + cells.probe(hash).take_while(|(_, value)| *value >> 32 != hash).count()
        };
        digests.map(|number| look(&digest(number))).sum::<usize>() as f64 / count
    }

    /// A table with the first `count` digests.
    fn filled(count: usize) -> (DigestTable, TableOccupancy) {
        let (table, mut occupancy) = (DigestTable::default(), TableOccupancy::default());
        (0..count).for_each(|number| table.insert(&mut occupancy, &digest(number), number as KeySlot));
        (table, occupancy)
    }

    #[test]
    fn room_that_was_made_is_kept_only_for_what_came() {
        let (table, mut occupancy) = filled(1000);
        table.reserve(&mut occupancy, 99_000);
        let roomy = table.cells.load().0.len();
        (1000..80_000).for_each(|number| table.insert(&mut occupancy, &digest(number), number as KeySlot));
        table.shrink_to_fit(&mut occupancy);
        assert_eq!(table.cells.load().0.len(), roomy);
        (0..60_000)
            .for_each(|number| assert!(table.remove(&mut occupancy, &digest(number), number as KeySlot)));
        table.shrink_to_fit(&mut occupancy);
        assert!(table.cells.load().0.len() < 30_000);
        let there =
            |number: &usize| table.find(&digest(*number), |slot| (slot as usize == *number).then_some(()));
        assert_eq!((0..80_000).filter_map(|number| there(&number)).count(), 20_000);
    }

    #[test]
    fn the_emptiest_table_is_nearly_full_and_the_fullest_is_read_in_few_cells() {
        let (table, mut occupancy) = filled(100_000);
        let length = || table.cells.load().0.len();
        let (narrow, mut inserted) = (length(), 100_000);
        while length() == narrow {
            table.insert(&mut occupancy, &digest(inserted), inserted as KeySlot);
            inserted += 1;
        }
        assert!(length() * 3 <= inserted * 4, "{inserted} of {}", length());
        let fullest = inserted - 1;
        let (table, _) = filled(fullest);
        let (there, not) = (probed(&table, 0..fullest), probed(&table, fullest..2 * fullest));
        assert!(there < 8.0 && not < 64.0, "{there:.1} and {not:.1} cells");
        for number in 0..fullest {
            let found = table.find(&digest(number), |slot| (slot as usize == number).then_some(()));
            assert!(found.is_some(), "{number}");
        }
    }
}
