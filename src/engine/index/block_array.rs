//! Blocks by their numbers. It grows and never moves what it has: each row is twice as long as the one before, and
//! made when it is first needed.

use std::sync::{Arc, OnceLock};

use arc_swap::ArcSwapOption;

use super::key_block::KeyBlock;

/// Enough for as many blocks as 32 bits can number.
const SEGMENTS: usize = 32;

/// The blocks.
#[derive(Default)]
pub(super) struct BlockArray {
    segments: [OnceLock<Box<[ArcSwapOption<KeyBlock>]>>; SEGMENTS],
}

/// The row of a block, and its place in it.
fn segment_and_offset(number: u32) -> (usize, usize) {
    // Row `r` has the numbers from 2^r - 1 on.
    let counted = u64::from(number) + 1;
    let segment = counted.ilog2();
    (segment as usize, usize::try_from(counted - (1 << segment)).unwrap_or_default())
}

impl BlockArray {
    /// The block with this number, as it is now.
    pub(super) fn get(&self, number: u32) -> Option<Arc<KeyBlock>> {
        let (segment, offset) = segment_and_offset(number);
        self.segments[segment].get()?[offset].load_full()
    }

    /// Puts a block in the place of the one before. Gives it as it stands there.
    pub(super) fn put(&self, number: u32, block: KeyBlock) -> Arc<KeyBlock> {
        let (segment, offset) = segment_and_offset(number);
        let segment = self.segments[segment]
            .get_or_init(|| (0..1_u64 << segment).map(|_| ArcSwapOption::empty()).collect());
        let block = Arc::new(block);
        segment[offset].store(Some(block.clone()));
        block
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_has_a_place_of_its_own() {
        let expected = [(0, 0), (1, 0), (1, 1), (2, 0), (2, 1), (2, 2), (2, 3), (3, 0)];
        assert_eq!((0..8).map(segment_and_offset).collect::<Vec<_>>(), expected);
        assert!(segment_and_offset(u32::MAX - 1).0 < SEGMENTS);
    }
}
