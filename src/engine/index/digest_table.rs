//! From digests to places: an open-addressing table of atomic words, with linear probing.
//!
//! Readers look at words and wait for nobody. One writer at a time changes them, which its [`TableOccupancy`] stands for.
//! When it is seven eighths full the writer makes one a third wider and puts it in the old one's place; who still reads
//! the old one finds everything there that was in it. So a digest takes 9 to 11 bytes. Whoever looks for one that is
//! there reads some 4 cells of the fullest table, for one that is not, some 30: they stand together, four lines of
//! the cache, and hardly one in 2^32 leads anywhere else. The writer moves each cell six times or so, in order.
//!
//! A cell has 32 bits of a digest's hash and the place of its key; the digest itself stands with the key, and is
//! compared there. Imported digests are chosen by whoever imports them, so the hash is keyed: nobody can make keys
//! that crowd together.

use std::{
    hash::{BuildHasher as _, RandomState},
    sync::atomic::{AtomicU64, Ordering},
};

use arc_swap::ArcSwap;

use crate::domain::token::TokenDigest;

/// The place of a key.
pub(super) type KeySlot = u32;

/// Nothing was ever here: who probes may stop.
const EMPTY: u64 = 0;
/// What was here is gone.
const TOMBSTONE: u64 = 1;
/// The low half of a cell that is taken is its slot and this.
const SLOT_BIAS: u64 = 2;
const MIN_CELLS: usize = 1024;

/// Multilinear hashing (Lemire and Kaser 2014): whatever digests somebody chooses, two of them have the same hash
/// with a chance of 2^-32.
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

/// How full the table is. Whoever has it is the one writer.
#[derive(Debug, Default)]
pub(super) struct TableOccupancy {
    /// Cells that are taken.
    live_cells: usize,
    /// Cells that are taken or were.
    used_cells: usize,
}

struct CellArray(Box<[AtomicU64]>);

impl CellArray {
    fn new(count: usize) -> Self {
        CellArray((0..count).map(|_| AtomicU64::new(EMPTY)).collect())
    }

    /// The cells in which a digest with this hash may be, up to where it cannot be.
    fn probe(&self, hash: u64) -> impl Iterator<Item = (&AtomicU64, u64)> {
        let count = self.0.len();
        // The hash as a fraction of the table: it may have any length.
        let start = usize::try_from((hash * count as u64) >> 32).unwrap_or_default();
        let (wrapped, first) = self.0.split_at(start);
        let cells = first.iter().chain(wrapped).map(|cell| (cell, cell.load(Ordering::Acquire)));
        cells.take_while(|(_, value)| *value != EMPTY)
    }
}

/// The table.
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
    /// What `look` says first of the places where this digest may be.
    pub(super) fn find<T>(&self, digest: &TokenDigest, look: impl FnMut(KeySlot) -> Option<T>) -> Option<T> {
        let hash = self.hasher.hash_digest(digest);
        let cells = self.cells.load();
        let matching = cells.probe(hash).filter(|(_, value)| value >> 32 == hash);
        matching.filter_map(|(_, value)| decode_slot(value)).find_map(look)
    }

    /// Says that a digest is at a place.
    pub(super) fn insert(&self, occupancy: &mut TableOccupancy, digest: &TokenDigest, slot: KeySlot) {
        if (occupancy.used_cells + 1) * 8 > self.cells.load().0.len() * 7 {
            self.grow(occupancy);
        }
        insert_cell(&self.cells.load(), encode_cell(self.hasher.hash_digest(digest), slot));
        occupancy.live_cells += 1;
        occupancy.used_cells += 1;
    }

    /// Says that a digest is not at a place any more. Whether it was.
    pub(super) fn remove(&self, occupancy: &mut TableOccupancy, digest: &TokenDigest, slot: KeySlot) -> bool {
        let wanted = encode_cell(self.hasher.hash_digest(digest), slot);
        let cells = self.cells.load();
        let found = cells.probe(wanted >> 32).find(|(_, value)| *value == wanted);
        if let Some((cell, _)) = found {
            cell.store(TOMBSTONE, Ordering::Release);
            occupancy.live_cells -= 1;
        }
        found.is_some()
    }

    /// Makes room for so many more digests at once.
    pub(super) fn reserve(&self, occupancy: &mut TableOccupancy, more: usize) {
        let min_cells = (occupancy.used_cells + more) * 8 / 7 + 1;
        if self.cells.load().0.len() < min_cells {
            self.rehash(occupancy, (occupancy.live_cells + more) * 4 / 3);
        }
    }

    /// Lets go of room that was made for what did not come, if it is much.
    pub(super) fn shrink_to_fit(&self, occupancy: &mut TableOccupancy) {
        let target = (occupancy.live_cells * 4 / 3).max(MIN_CELLS);
        if self.cells.load().0.len() > 2 * target {
            self.rehash(occupancy, target);
        }
    }

    /// A table of which three quarters are taken, without what is gone.
    fn grow(&self, occupancy: &mut TableOccupancy) {
        self.rehash(occupancy, occupancy.live_cells * 4 / 3);
    }

    /// A table with so many cells, without what is gone.
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

/// The place in a cell that is taken.
fn decode_slot(value: u64) -> Option<KeySlot> {
    let low = value & u64::from(u32::MAX);
    low.checked_sub(SLOT_BIAS).and_then(|slot| KeySlot::try_from(slot).ok())
}

/// Takes the first cell that is empty. There is one: a table is never full.
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

    /// How many cells are read of each of these digests, on average.
    fn probed(table: &DigestTable, digests: std::ops::Range<usize>) -> f64 {
        let count = digests.len() as f64;
        let cells = table.cells.load();
        let look = |digest: &TokenDigest| {
            let hash = table.hasher.hash_digest(digest);
            1 + cells.probe(hash).take_while(|(_, value)| *value >> 32 != hash).count()
        };
        digests.map(|number| look(&digest(number))).sum::<usize>() as f64 / count
    }

    /// A table of the first digests, to which more can be added.
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
        let (narrow, mut known) = (length(), 100_000);
        while length() == narrow {
            table.insert(&mut occupancy, &digest(known), known as KeySlot);
            known += 1;
        }
        assert!(length() * 3 <= known * 4, "{known} of {}", length());
        let fullest = known - 1;
        let (table, _) = filled(fullest);
        let (there, not) = (probed(&table, 0..fullest), probed(&table, fullest..2 * fullest));
        assert!(there < 8.0 && not < 64.0, "{there:.1} and {not:.1} cells");
        for number in 0..fullest {
            let found = table.find(&digest(number), |slot| (slot as usize == number).then_some(()));
            assert!(found.is_some(), "{number}");
        }
    }
}
