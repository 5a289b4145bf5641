//! What only some records of a block have: a bit for each record, and room for those that have it.

use super::held::BLOCK;

// Each record has a bit.
const _: () = assert!(BLOCK <= u64::BITS as usize);

/// Values of some records.
#[derive(Debug)]
pub(super) struct Sparse<T> {
    /// Who has a value: the n-th bit from below stands for the n-th record.
    who: u64,
    /// The values, in the order of the records.
    values: Box<[T]>,
}

impl<T> Sparse<T> {
    /// The value of a record, where it has one.
    pub(super) fn get(&self, at: usize) -> Option<&T> {
        let bit = 1 << at;
        let before = self.who & (bit - 1);
        if self.who & bit == 0 { None } else { self.values.get(before.count_ones() as usize) }
    }

    /// All values.
    pub(super) fn values(&self) -> impl Iterator<Item = &T> {
        self.values.iter()
    }

    /// What each of up to 64 records has.
    pub(super) fn of<'v>(all: impl Iterator<Item = Option<&'v T>> + Clone) -> Self
    where
        T: Clone + 'v,
    {
        let bits = all.clone().enumerate().map(|(at, value)| u64::from(value.is_some()) << at);
        let who = bits.sum::<u64>();
        // Exactly as many as there are: see `Block::of`.
        let mut values = Vec::with_capacity(who.count_ones() as usize);
        values.extend(all.flatten().cloned());
        Sparse { who, values: values.into() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn each_record_has_its_own_value_or_none(all in prop::collection::vec(any::<Option<u8>>(), 0..=BLOCK)) {
            let sparse = Sparse::of(all.iter().map(Option::as_ref));
            for (at, value) in all.iter().enumerate() {
                prop_assert_eq!(sparse.get(at), value.as_ref());
            }
            prop_assert_eq!(sparse.values.len(), all.iter().flatten().count());
        }
    }
}
