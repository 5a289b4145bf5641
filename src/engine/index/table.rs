//! From digests to places: an open-addressing table of atomic words, with linear probing.
//!
//! Readers look at words and wait for nobody. One writer at a time changes them, which its [`Tally`] stands for.
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

use crate::domain::token::Digest;

/// The place of a key.
pub(super) type Slot = u32;

/// Nothing was ever here: who probes may stop.
const EMPTY: u64 = 0;
/// What was here is gone.
const GONE: u64 = 1;
/// The low half of a cell that is taken is its slot and this.
const FIRST: u64 = 2;
const LEAST: usize = 1024;

/// Multilinear hashing (Lemire and Kaser 2014): whatever digests somebody chooses, two of them have the same hash
/// with a chance of 2^-32.
struct Hash([u64; 9]);

impl Hash {
    fn random() -> Self {
        let random = RandomState::new();
        Hash(std::array::from_fn(|at| random.hash_one(at)))
    }

    fn of(&self, digest: &Digest) -> u64 {
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
pub(super) struct Tally {
    /// Cells that are taken.
    taken: usize,
    /// Cells that are taken or were.
    used: usize,
}

struct Cells(Box<[AtomicU64]>);

impl Cells {
    fn new(count: usize) -> Self {
        Cells((0..count).map(|_| AtomicU64::new(EMPTY)).collect())
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
pub(super) struct Table {
    hash: Hash,
    cells: ArcSwap<Cells>,
}

impl Default for Table {
    fn default() -> Self {
        Table { hash: Hash::random(), cells: ArcSwap::from_pointee(Cells::new(LEAST)) }
    }
}

impl Table {
    /// What `look` says first of the places where this digest may be.
    pub(super) fn find<T>(&self, digest: &Digest, look: impl FnMut(Slot) -> Option<T>) -> Option<T> {
        let hash = self.hash.of(digest);
        let cells = self.cells.load();
        let alike = cells.probe(hash).filter(|(_, value)| value >> 32 == hash);
        alike.filter_map(|(_, value)| slot(value)).find_map(look)
    }

    /// Says that a digest is at a place.
    pub(super) fn insert(&self, tally: &mut Tally, digest: &Digest, slot: Slot) {
        if (tally.used + 1) * 8 > self.cells.load().0.len() * 7 {
            self.widen(tally);
        }
        put(&self.cells.load(), cell(self.hash.of(digest), slot));
        tally.taken += 1;
        tally.used += 1;
    }

    /// Says that a digest is not at a place any more. Whether it was.
    pub(super) fn remove(&self, tally: &mut Tally, digest: &Digest, slot: Slot) -> bool {
        let wanted = cell(self.hash.of(digest), slot);
        let cells = self.cells.load();
        let found = cells.probe(wanted >> 32).find(|(_, value)| *value == wanted);
        if let Some((cell, _)) = found {
            cell.store(GONE, Ordering::Release);
            tally.taken -= 1;
        }
        found.is_some()
    }

    /// Makes room for so many more digests at once.
    pub(super) fn reserve(&self, tally: &mut Tally, more: usize) {
        let least = (tally.used + more) * 8 / 7 + 1;
        if self.cells.load().0.len() < least {
            self.renew(tally, (tally.taken + more) * 4 / 3);
        }
    }

    /// Lets go of room that was made for what did not come, if it is much.
    pub(super) fn fit(&self, tally: &mut Tally) {
        let enough = (tally.taken * 4 / 3).max(LEAST);
        if self.cells.load().0.len() > 2 * enough {
            self.renew(tally, enough);
        }
    }

    /// A table of which three quarters are taken, without what is gone.
    fn widen(&self, tally: &mut Tally) {
        self.renew(tally, tally.taken * 4 / 3);
    }

    /// A table with so many cells, without what is gone.
    fn renew(&self, tally: &mut Tally, cells: usize) {
        let wider = Cells::new(cells.max(LEAST));
        let old = self.cells.load();
        let values = old.0.iter().map(|cell| cell.load(Ordering::Relaxed));
        values.filter(|value| slot(*value).is_some()).for_each(|value| put(&wider, value));
        self.cells.store(wider.into());
        tally.used = tally.taken;
    }
}

fn cell(hash: u64, slot: Slot) -> u64 {
    hash << 32 | (FIRST + u64::from(slot))
}

/// The place in a cell that is taken.
fn slot(value: u64) -> Option<Slot> {
    let low = value & u64::from(u32::MAX);
    low.checked_sub(FIRST).and_then(|slot| Slot::try_from(slot).ok())
}

/// Takes the first cell that is empty. There is one: a table is never full.
fn put(cells: &Cells, value: u64) {
    let taken = cells.probe(value >> 32).count();
    let count = cells.0.len();
    let start = usize::try_from(((value >> 32) * count as u64) >> 32).unwrap_or_default();
    cells.0[(start + taken) % count].store(value, Ordering::Release);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digest(number: usize) -> Digest {
        Digest::of(&number.to_string())
    }

    /// How many cells are read of each of these digests, on average.
    fn probed(table: &Table, digests: std::ops::Range<usize>) -> f64 {
        let count = digests.len() as f64;
        let cells = table.cells.load();
        let look = |digest: &Digest| {
            let hash = table.hash.of(digest);
            1 + cells.probe(hash).take_while(|(_, value)| *value >> 32 != hash).count()
        };
        digests.map(|number| look(&digest(number))).sum::<usize>() as f64 / count
    }

    /// A table of the first digests, to which more can be added.
    fn filled(count: usize) -> (Table, Tally) {
        let (table, mut tally) = (Table::default(), Tally::default());
        (0..count).for_each(|number| table.insert(&mut tally, &digest(number), number as Slot));
        (table, tally)
    }

    #[test]
    fn room_that_was_made_is_kept_only_for_what_came() {
        let (table, mut tally) = filled(1000);
        table.reserve(&mut tally, 99_000);
        let roomy = table.cells.load().0.len();
        (1000..80_000).for_each(|number| table.insert(&mut tally, &digest(number), number as Slot));
        table.fit(&mut tally);
        assert_eq!(table.cells.load().0.len(), roomy);
        (0..60_000).for_each(|number| assert!(table.remove(&mut tally, &digest(number), number as Slot)));
        table.fit(&mut tally);
        assert!(table.cells.load().0.len() < 30_000);
        let there =
            |number: &usize| table.find(&digest(*number), |slot| (slot as usize == *number).then_some(()));
        assert_eq!((0..80_000).filter_map(|number| there(&number)).count(), 20_000);
    }

    #[test]
    fn the_emptiest_table_is_nearly_full_and_the_fullest_is_read_in_few_cells() {
        let (table, mut tally) = filled(100_000);
        let length = || table.cells.load().0.len();
        let (narrow, mut known) = (length(), 100_000);
        while length() == narrow {
            table.insert(&mut tally, &digest(known), known as Slot);
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
