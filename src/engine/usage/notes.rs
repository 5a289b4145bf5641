//! What was noted of Checks, in memory: first as it comes, on a pad of the thread that it comes from; then by key, on
//! shelves; then in the line of what is written next. Writing it to the store is not done here.
//!
//! A Check only appends to its own thread's pad, which no other core touches but to read it; a full pad is put on the
//! shelves as a whole. Many keys are found faster in one go than one each time: their misses overlap. The line is in the
//! order of keys, since the store's pages are: what is written together then shares them.

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

use crate::{
    domain::{decision::Reason, name::KeyId, time::Timestamp},
    instruments::Apart,
};

use super::trace::Trace;

const SHELVES: usize = 16;
/// How many keys may be on the shelves: about 130 MB of them. There may be as many in the line, in 84 MB.
pub const MOST_KEYS: usize = 1 << 21;
/// Notes on a full pad: 8 KB of them, some ten microseconds' work.
const PAD: usize = 256;
/// Keys that are written together: a write must not hold up others for long.
const CHUNK: usize = 500;

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One Check of a key that was found.
#[derive(Clone, Copy, Debug)]
pub struct Note {
    /// The key.
    pub key: KeyId,
    /// When.
    pub at: Timestamp,
    /// Which version of its secret was shown.
    pub version: u32,
    /// What was answered.
    pub reason: Reason,
}

type Traces = HashMap<KeyId, Trace, foldhash::fast::RandomState>;

/// Keys in order, each once. They are written from the end, so that what is written takes no memory any more.
#[derive(Default)]
struct Row(Vec<(KeyId, Trace)>);

impl Row {
    fn add(&mut self, mut more: Vec<(KeyId, Trace)>) {
        // What could not be written comes before what was noted since.
        if self.0.is_empty() {
            self.0 = more
        } else {
            self.0.append(&mut more)
        }
        self.0.sort_by_key(|(key, _)| *key);
        self.0.dedup_by(|(key, later), (of, known)| {
            let same = key == of;
            if same {
                known.add(std::mem::take(later));
            }
            same
        });
    }

    /// What is to be written next.
    fn next(&self) -> &[(KeyId, Trace)] {
        &self.0[self.0.len().saturating_sub(CHUNK)..]
    }

    fn written(&mut self) {
        let left = self.0.len().saturating_sub(CHUNK);
        self.0.truncate(left);
        if left < self.0.capacity() / 2 {
            self.0.shrink_to_fit();
        }
    }

    fn get(&self, key: KeyId) -> Option<&Trace> {
        let at = self.0.binary_search_by_key(&key, |(of, _)| *of).ok()?;
        Some(&self.0[at].1)
    }
}

/// Everything that was noted and is not written. Whoever takes two of its locks takes them in the order of the fields.
#[derive(Default)]
pub(super) struct Notes {
    pads: Apart<Mutex<Vec<Note>>>,
    line: Mutex<Row>,
    /// Checks wait for these locks, so nobody has one for long.
    shelves: [Mutex<Traces>; SHELVES],
}

impl Notes {
    /// Notes a Check. Tells how many could not be noted, since too many keys wait.
    pub(super) fn note(&self, note: Note) -> u64 {
        let mut pad = lock(self.pads.mine());
        pad.push(note);
        if pad.len() < PAD { 0 } else { self.put(&mut pad) }
    }

    /// Puts everything on the shelves that stands on pads. The same is told as by `note`.
    pub(super) fn gather(&self) -> u64 {
        self.pads.each().map(|pad| self.put(&mut lock(pad))).sum()
    }

    /// Puts everything in the line that is on the shelves.
    pub(super) fn line_up(&self) {
        let mut line = lock(&self.line);
        let mut all = Vec::with_capacity(self.shelved());
        for shelf in &self.shelves {
            let mut shelf = lock(shelf);
            // As many keys will come again, and a table that grows holds up whoever makes it grow.
            let room = Traces::with_capacity_and_hasher(shelf.len(), Default::default());
            let taken = std::mem::replace(&mut *shelf, room);
            drop(shelf);
            all.extend(taken);
        }
        line.add(all);
    }

    /// What is to be written next, as `of` makes it. None = nothing is in the line.
    pub(super) fn next<T>(&self, of: impl FnOnce(&[(KeyId, Trace)]) -> T) -> Option<T> {
        let line = lock(&self.line);
        let next = line.next();
        (!next.is_empty()).then(|| of(next))
    }

    /// What was next is written.
    pub(super) fn written(&self) {
        lock(&self.line).written();
    }

    /// How many keys wait. One that is used while it is written counts twice.
    pub(super) fn len(&self) -> usize {
        lock(&self.line).0.len() + self.shelved()
    }

    /// How many keys are on the shelves.
    pub(super) fn shelved(&self) -> usize {
        self.shelves.iter().map(|shelf| lock(shelf).len()).sum()
    }

    /// The latest use of a secret that is known here.
    pub(super) fn last_use(&self, key: KeyId, version: u32) -> Option<Timestamp> {
        let line = lock(&self.line);
        let shelf = lock(self.shelf(key));
        let known = [shelf.get(&key), line.get(key)].into_iter().flatten();
        known.flat_map(Trace::used).filter(|(of, _)| *of == version).map(|(_, at)| at).max()
    }

    /// A pad is locked until its notes are on the shelves: they are in one place or in the other for whoever looks.
    fn put(&self, pad: &mut Vec<Note>) -> u64 {
        let mut dropped = 0;
        for note in pad.drain(..) {
            match trace(&mut lock(self.shelf(note.key)), note.key) {
                Some(trace) => trace.note(&note),
                None => dropped += 1,
            }
        }
        dropped
    }

    fn shelf(&self, key: KeyId) -> &Mutex<Traces> {
        // The last byte of a UUIDv7 is random.
        &self.shelves[usize::from(key.as_bytes()[15]) % SHELVES]
    }
}

/// The trace of a key. None = too many keys wait.
fn trace(shelf: &mut Traces, key: KeyId) -> Option<&mut Trace> {
    if shelf.len() >= MOST_KEYS / SHELVES && !shelf.contains_key(&key) {
        return None;
    }
    Some(shelf.entry(key).or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(micros: i64) -> Timestamp {
        Timestamp::from_micros(micros)
    }

    fn key(number: u64) -> KeyId {
        // Not in the order of their numbers.
        let mixed = number.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_be_bytes();
        KeyId::generate(at(0), std::array::from_fn(|byte| mixed[byte % 8]))
    }

    fn note(notes: &Notes, number: u64, micros: i64) {
        notes.note(Note { key: key(number), at: at(micros), version: 1, reason: Reason::Ok });
    }

    /// Writes everything; gives the keys, those first that were written last.
    fn drain(notes: &Notes) -> Vec<KeyId> {
        let mut all = std::collections::VecDeque::new();
        while let Some(keys) = notes.next(|chunk| chunk.iter().map(|(key, _)| *key).collect::<Vec<_>>()) {
            assert!(keys.len() <= CHUNK);
            keys.into_iter().rev().for_each(|key| all.push_front(key));
            notes.written();
        }
        all.into()
    }

    #[test]
    fn keys_are_written_in_order_from_the_end_and_once_whatever_was_left_of_the_line() {
        const KEYS: u64 = 3 * CHUNK as u64 + 7;
        let notes = Notes::default();
        for round in 1..4 {
            (0..KEYS).for_each(|number| note(&notes, number, round));
            notes.gather();
            assert_eq!(notes.last_use(key(8), 1), Some(at(round)));
            notes.line_up();
            assert_eq!(notes.last_use(key(8), 1), Some(at(round)));
        }
        let written = drain(&notes);
        assert_eq!(written.len() as u64, KEYS);
        assert!(written.is_sorted());
        assert_eq!((notes.len(), notes.last_use(key(8), 1)), (0, None));
    }

    #[test]
    fn what_was_used_while_it_was_written_is_written_again() {
        let notes = Notes::default();
        note(&notes, 1, 5);
        notes.gather();
        notes.line_up();
        note(&notes, 1, 9);
        notes.gather();
        assert_eq!(notes.last_use(key(1), 1), Some(at(9)));
        assert_eq!(drain(&notes), [key(1)]);
        notes.line_up();
        assert_eq!(drain(&notes), [key(1)]);
    }
}
