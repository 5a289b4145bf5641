//! An array of blocks that grows without moving its elements: each segment is twice as long as the one before, and
//! is allocated on first use.

use std::sync::{Arc, OnceLock};

use arc_swap::ArcSwapOption;

use super::key_block::KeyBlock;

/// Enough segments for as many blocks as 32 bits can number.
const SEGMENTS: usize = 32;

/// Blocks by number, each replaceable atomically.
#[derive(Default)]
pub(super) struct BlockArray {
    segments: [OnceLock<Box<[ArcSwapOption<KeyBlock>]>>; SEGMENTS],
}

/// The segment of a block, and its offset in it.
fn segment_and_offset(number: u32) -> (usize, usize) {
    // Segment `s` starts at number 2^s - 1.
    let counted = u64::from(number) + 1;
    let segment = counted.ilog2();
    (segment as usize, usize::try_from(counted - (1 << segment)).unwrap_or_default())
}

impl BlockArray {
    /// The current block with this number.
    pub(super) fn get(&self, number: u32) -> Option<Arc<KeyBlock>> {
        let (segment, offset) = segment_and_offset(number);
        self.segments[segment].get()?[offset].load_full()
    }

    /// Replaces the block with this number, and returns the shared new one.
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
