//! A set of log revisions, stored as one bit each from a first revision on.

use crate::domain::time::Revision;

/// A set of revisions from `first` on, one bit each.
#[derive(Debug)]
pub(super) struct RevisionSet {
    first: u64,
    words: Vec<u64>,
}

impl RevisionSet {
    pub(super) fn starting_at(first: Revision) -> RevisionSet {
        RevisionSet { first: first.0, words: Vec::new() }
    }

    pub(super) fn first(&self) -> Revision {
        Revision(self.first)
    }

    /// Adds a revision. Returns whether it was not in the set before; true for any revision before the first.
    pub(super) fn insert(&mut self, revision: Revision) -> bool {
        let Some((word, bit)) = self.word_and_bit(revision) else { return true };
        if word >= self.words.len() {
            self.words.resize(word + 1, 0);
        }
        let is_new = self.words[word] & bit == 0;
        self.words[word] |= bit;
        is_new
    }

    pub(super) fn contains(&self, revision: Revision) -> bool {
        let position = self.word_and_bit(revision);
        position.is_some_and(|(word, bit)| self.words.get(word).is_some_and(|word| word & bit != 0))
    }

    fn word_and_bit(&self, revision: Revision) -> Option<(usize, u64)> {
        let offset = revision.0.checked_sub(self.first)?;
        Some((usize::try_from(offset / 64).ok()?, 1 << (offset % 64)))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_set_of_revisions_holds_what_was_added(first in 0u64..300, offsets in proptest::collection::vec(0u64..300, 0..40)) {
            let (mut set, mut model) = (RevisionSet::starting_at(Revision(first)), BTreeSet::new());
            prop_assert!(first == 0 || set.insert(Revision(first - 1)), "it is never in it");
            for revision in offsets.iter().map(|offset| first + offset) {
                prop_assert_eq!(set.insert(Revision(revision)), model.insert(revision));
            }
            for revision in 0..700 {
                prop_assert_eq!(set.contains(Revision(revision)), model.contains(&revision));
            }
        }
    }
}
