//! Interns the owners and policies of keys, and numbers them in lists, so that a record names one in two bytes.
//!
//! A number is valid in its own list only. Lists are immutable; a block keeps the lists that its records were numbered
//! by. So no number ever leads to another key's value, even for a slow reader.
//!
//! Most blocks share one common list, which costs them nothing and stays in the processor's cache. A block with a value
//! that the common list lacks has a private list. Once as many keys are in such blocks as the common list would have
//! entries, it is rebuilt for later blocks: common lists cost at most 8 bytes per key, as private ones do. The next
//! eviction removes values that no record uses.

use std::{
    collections::{HashMap, HashSet},
    hash::Hash,
    sync::Arc,
};

use foldhash::quality::RandomState;

/// The maximum length of a common list, and of the values without a key that may remain until the next eviction.
const MAX_ENTRIES: usize = 1 << 14;

/// Interned values; their indices are the numbers in records.
pub(super) type SharedList<T> = Arc<[Arc<T>]>;

/// Equal values, each stored once.
#[derive(Debug)]
pub(super) struct Interner<T> {
    interned: HashSet<Arc<T>, RandomState>,
    common_list: SharedList<T>,
    /// The numbers of the common list by the address of the value. The list keeps its values
    /// alive, so addresses are unique.
    common_numbers: HashMap<usize, u16, RandomState>,
    /// The number of keys in blocks with private lists since the common list was built.
    keys_outside_common: usize,
}

impl<T> Default for Interner<T> {
    fn default() -> Self {
        Interner {
            interned: HashSet::default(),
            common_list: Arc::new([]),
            common_numbers: HashMap::default(),
            keys_outside_common: 0,
        }
    }
}

impl<T: Eq + Hash> Interner<T> {
    /// Returns the stored value that equals this one; stores this one if no other does.
    pub(super) fn intern(&mut self, value: T) -> Arc<T> {
        if let Some(interned) = self.interned.get(&value) {
            return interned.clone();
        }
        let new = Arc::new(value);
        self.interned.insert(new.clone());
        new
    }

    /// Like [`Interner::intern`], for a value that is already shared.
    pub(super) fn intern_arc(&mut self, value: &Arc<T>) -> Arc<T> {
        if let Some(interned) = self.interned.get(value) {
            return interned.clone();
        }
        self.interned.insert(value.clone());
        value.clone()
    }

    /// Returns a list that contains all these interned values, and the number of each in it.
    ///
    /// The values are those of one block, of whose keys `new_keys` are new.
    pub(super) fn number_in_list<'t>(
        &mut self,
        values: impl Iterator<Item = &'t Arc<T>> + Clone,
        new_keys: usize,
    ) -> (SharedList<T>, Vec<u16>)
    where
        T: 't,
    {
        if let Some(numbers) = self.find_common_numbers(values.clone()) {
            return (self.common_list.clone(), numbers);
        }
        self.keys_outside_common += new_keys;
        if self.keys_outside_common >= self.interned.len() && self.interned.len() <= MAX_ENTRIES {
            self.rebuild_common_list();
            if let Some(numbers) = self.find_common_numbers(values.clone()) {
                return (self.common_list.clone(), numbers);
            }
        }
        build_private_list(values)
    }

    fn find_common_numbers<'t>(&self, values: impl Iterator<Item = &'t Arc<T>>) -> Option<Vec<u16>>
    where
        T: 't,
    {
        values.map(|value| self.common_numbers.get(&arc_address(value)).copied()).collect()
    }

    /// Builds the common list from all interned values.
    fn rebuild_common_list(&mut self) {
        self.set_common_list(self.interned.iter().cloned().collect());
        self.keys_outside_common = 0;
    }

    fn set_common_list(&mut self, list: SharedList<T>) {
        self.common_numbers = list.iter().map(arc_address).zip(0..).collect();
        self.common_list = list;
    }

    /// Starts to mark the values of the common list that are in use.
    pub(super) fn begin_marking(&self) -> ListMarks<T> {
        ListMarks { list: self.common_list.clone(), used: vec![false; self.common_list.len()] }
    }

    /// Removes values without a mark from the common list.
    pub(super) fn retain_marked(&mut self, marks: &ListMarks<T>) {
        if self.is_common_list(&marks.list) && marks.used.contains(&false) {
            let used = marks.list.iter().zip(&marks.used).filter(|(_, used)| **used);
            self.set_common_list(used.map(|(value, _)| value.clone()).collect());
        }
    }

    /// Returns whether a list is the current common one.
    pub(super) fn is_common_list(&self, list: &SharedList<T>) -> bool {
        Arc::ptr_eq(list, &self.common_list)
    }

    /// Drops values that no key and no list refers to.
    pub(super) fn collect_unused(&mut self) {
        if Arc::strong_count(&self.common_list) == 1 {
            self.common_list = Arc::new([]);
            self.common_numbers.clear();
        }
        self.interned.retain(|value| Arc::strong_count(value) > 1);
    }
}

/// The values of a common list that are in use.
pub(super) struct ListMarks<T> {
    list: SharedList<T>,
    used: Vec<bool>,
}

impl<T> ListMarks<T> {
    /// Marks these numbers if they belong to the marked list.
    pub(super) fn mark(&mut self, list: &SharedList<T>, numbers: impl Iterator<Item = u16>) {
        if Arc::ptr_eq(list, &self.list) {
            numbers.for_each(|number| self.used[usize::from(number)] = true);
        }
    }
}

fn arc_address<T>(value: &Arc<T>) -> usize {
    Arc::as_ptr(value).addr()
}

/// Builds a list of exactly these values.
fn build_private_list<'t, T: 't>(values: impl Iterator<Item = &'t Arc<T>>) -> (SharedList<T>, Vec<u16>) {
    let mut list: Vec<&Arc<T>> = Vec::new();
    let mut numbers = Vec::new();
    for value in values {
        let interned = list.iter().position(|interned| Arc::ptr_eq(interned, value));
        let number = interned.unwrap_or(list.len());
        if interned.is_none() {
            list.push(value);
        }
        // It fits: a block has few records.
        numbers.push(u16::try_from(number).unwrap_or(u16::MAX));
    }
    (list.into_iter().cloned().collect(), numbers)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The list for a block with one value.
    fn block(interner: &mut Interner<usize>, value: usize) -> SharedList<usize> {
        let interned = interner.intern(value);
        let (list, numbers) = interner.number_in_list(std::iter::once(&interned), 1);
        assert_eq!(*list[usize::from(numbers[0])], value);
        list
    }

    #[test]
    fn blocks_have_one_list_in_common_and_lists_cost_no_more_than_the_keys_that_came() {
        const THINGS: usize = 1000;
        let mut interner = Interner::default();
        let first: Vec<_> = (0..THINGS).map(|value| block(&mut interner, value)).collect();
        let again: Vec<_> = (0..THINGS).map(|value| block(&mut interner, value)).collect();
        assert!(Arc::ptr_eq(&again[THINGS - 1], &again[THINGS - 2]));
        let all = first.iter().chain(&again);
        let lists: HashMap<_, _> = all.map(|list| (list.as_ptr(), list.len())).collect();
        assert!(lists.values().sum::<usize>() <= 2 * 2 * THINGS);
    }

    #[test]
    fn more_things_than_a_list_may_have_are_in_lists_of_their_own() {
        let mut interner = Interner::default();
        let lists: Vec<_> = (0..3 * MAX_ENTRIES).map(|value| block(&mut interner, value)).collect();
        assert!(lists.iter().all(|list| list.len() <= MAX_ENTRIES));
        assert_eq!(lists.last().unwrap().len(), 1);
    }

    #[test]
    fn what_no_record_names_leaves_the_common_list() {
        let mut interner = Interner::default();
        let lists: Vec<_> = (0..200).map(|value| block(&mut interner, value % 100)).collect();
        let common = lists.last().unwrap().clone();
        let mut marks = interner.begin_marking();
        marks.mark(&common, [1, 3].into_iter());
        marks.mark(&lists[0], [0].into_iter());
        interner.retain_marked(&marks);
        assert!(!interner.is_common_list(&common) && interner.common_list.len() == 2);
        let kept = [common[1].clone(), common[3].clone()];
        assert_eq!(interner.number_in_list(kept.iter(), 0).1, [0, 1]);
        drop((lists, common, kept, marks));
        interner.collect_unused();
        assert!(interner.interned.is_empty(), "no block has the list any more");
    }

    #[test]
    fn what_nobody_has_is_let_go_of() {
        let mut interner = Interner::default();
        let lists: Vec<_> = (0..200).map(|value| block(&mut interner, value % 100)).collect();
        assert_eq!(interner.common_numbers.len(), 100);
        interner.collect_unused();
        assert_eq!(interner.interned.len(), 100);
        drop(lists);
        interner.collect_unused();
        assert!(interner.interned.is_empty());
        // Addresses may have been reused by now.
        (100..200).for_each(|value| drop(block(&mut interner, value)));
    }
}
