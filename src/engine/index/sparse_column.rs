//! Stores a column that only some records of a block have: a bit per record, and the values of those that have one.

/// How many records a column covers: one bit for each.
pub(super) const MAX_RECORDS: usize = u64::BITS as usize;

/// The values of some records of a block.
#[derive(Debug)]
pub(super) struct SparseColumn<T> {
    /// Bit n (from the lowest) is set if record n has a value.
    presence_bits: u64,
    /// The values, in the order of the records.
    values: Box<[T]>,
}

impl<T> SparseColumn<T> {
    /// The value of a record, if it has one.
    pub(super) fn get(&self, at: usize) -> Option<&T> {
        let bit = 1 << at;
        let before = self.presence_bits & (bit - 1);
        if self.presence_bits & bit == 0 { None } else { self.values.get(before.count_ones() as usize) }
    }

    pub(super) fn values(&self) -> impl Iterator<Item = &T> {
        self.values.iter()
    }

    /// Builds a column from the optional values of up to 64 records.
    pub(super) fn from_options<'v>(all: impl Iterator<Item = Option<&'v T>> + Clone) -> Self
    where
        T: Clone + 'v,
    {
        let bits = all.clone().enumerate().map(|(at, value)| u64::from(value.is_some()) << at);
        let presence_bits = bits.sum::<u64>();
        // Allocated exactly: see `KeyBlock::from_entries`.
        let mut values = Vec::with_capacity(presence_bits.count_ones() as usize);
        values.extend(all.flatten().cloned());
        SparseColumn { presence_bits, values: values.into() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn each_record_has_its_own_value_or_none(all in prop::collection::vec(any::<Option<u8>>(), 0..=MAX_RECORDS)) {
            let sparse = SparseColumn::from_options(all.iter().map(Option::as_ref));
            for (at, value) in all.iter().enumerate() {
                prop_assert_eq!(sparse.get(at), value.as_ref());
            }
            prop_assert_eq!(sparse.values.len(), all.iter().flatten().count());
        }
    }
}
