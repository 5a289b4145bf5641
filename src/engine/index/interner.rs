//! What many keys have alike: each thing once, and the lists in which the records of a block name it by two bytes.
//!
//! A number means something in its own list only. A list never changes, a block keeps the list that its records were
//! numbered by, and a list keeps what is in it: no number leads to another key's thing, however long somebody reads.
//!
//! Most blocks have one list in common, so that it costs nothing and stays in the processor's cache. A block that needs
//! what is not there has a short list of its own. Once as many keys have come into such blocks as a common list of
//! everything would have entries, that one is made, for blocks to come: common lists cost no more than 8 bytes for
//! each key that came, as own ones do. What no record names any more leaves them with the next sweep of the index.

use std::{
    collections::{HashMap, HashSet},
    hash::Hash,
    sync::Arc,
};

use foldhash::quality::RandomState;

/// How many things a common list may have; and so how many that no key has any more may stay until the next sweep.
const MAX_ENTRIES: usize = 1 << 14;

/// Things by their numbers.
pub(super) type SharedList<T> = Arc<[Arc<T>]>;

/// Things, each once.
#[derive(Debug)]
pub(super) struct Interner<T> {
    interned: HashSet<Arc<T>, RandomState>,
    common_list: SharedList<T>,
    /// Where in the common list a thing is, by its address. The list keeps it there, so nothing else has the address.
    common_numbers: HashMap<usize, u16, RandomState>,
    /// How many keys came into blocks with lists of their own since the common one was made.
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
    /// The one that is kept of all that are equal.
    pub(super) fn intern(&mut self, value: T) -> Arc<T> {
        if let Some(interned) = self.interned.get(&value) {
            return interned.clone();
        }
        let new = Arc::new(value);
        self.interned.insert(new.clone());
        new
    }

    /// The same of what is shared already.
    pub(super) fn intern_arc(&mut self, value: &Arc<T>) -> Arc<T> {
        if let Some(interned) = self.interned.get(value) {
            return interned.clone();
        }
        self.interned.insert(value.clone());
        value.clone()
    }

    /// A list that has all of these, which this pool gave, and the number of each in it. They are the things of one
    /// block, of whose records `came` are new.
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

    /// Makes the common list of everything that is known.
    fn rebuild_common_list(&mut self) {
        self.set_common_list(self.interned.iter().cloned().collect());
        self.keys_outside_common = 0;
    }

    fn set_common_list(&mut self, list: SharedList<T>) {
        self.common_numbers = list.iter().map(arc_address).zip(0..).collect();
        self.common_list = list;
    }

    /// The common list, to be marked with what of it is used.
    pub(super) fn begin_marking(&self) -> ListMarks<T> {
        ListMarks { list: self.common_list.clone(), used: vec![false; self.common_list.len()] }
    }

    /// Takes what is not marked out of the common list.
    pub(super) fn retain_marked(&mut self, marks: &ListMarks<T>) {
        if self.is_common_list(&marks.list) && marks.used.contains(&false) {
            let used = marks.list.iter().zip(&marks.used).filter(|(_, used)| **used);
            self.set_common_list(used.map(|(value, _)| value.clone()).collect());
        }
    }

    /// Whether a list is the common one.
    pub(super) fn is_common_list(&self, list: &SharedList<T>) -> bool {
        Arc::ptr_eq(list, &self.common_list)
    }

    /// Lets go of what no key has any more and no list keeps.
    pub(super) fn collect_unused(&mut self) {
        if Arc::strong_count(&self.common_list) == 1 {
            self.common_list = Arc::new([]);
            self.common_numbers.clear();
        }
        self.interned.retain(|value| Arc::strong_count(value) > 1);
    }
}

/// Which things of a common list are used.
pub(super) struct ListMarks<T> {
    list: SharedList<T>,
    used: Vec<bool>,
}

impl<T> ListMarks<T> {
    /// Marks what a block names by these numbers, if it has that list.
    pub(super) fn mark(&mut self, list: &SharedList<T>, numbers: impl Iterator<Item = u16>) {
        if Arc::ptr_eq(list, &self.list) {
            numbers.for_each(|number| self.used[usize::from(number)] = true);
        }
    }
}

fn arc_address<T>(value: &Arc<T>) -> usize {
    Arc::as_ptr(value).addr()
}

/// A list of these alone.
fn build_private_list<'t, T: 't>(values: impl Iterator<Item = &'t Arc<T>>) -> (SharedList<T>, Vec<u16>) {
    let mut list: Vec<&Arc<T>> = Vec::new();
    let mut numbers = Vec::new();
    for value in values {
        let interned = list.iter().position(|interned| Arc::ptr_eq(interned, value));
        let number = interned.unwrap_or(list.len());
        if interned.is_none() {
            list.push(value);
        }
        // A block has few records.
        numbers.push(u16::try_from(number).unwrap_or(u16::MAX));
    }
    (list.into_iter().cloned().collect(), numbers)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The list for a block of one thing.
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
        // An address may be another thing's now.
        (100..200).for_each(|value| drop(block(&mut interner, value)));
    }
}
