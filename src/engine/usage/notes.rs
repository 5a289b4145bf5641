//! What was noted of Checks, in memory: first as it comes, on a pad of the thread that it comes from; then by key, on
//! shelves that the flush takes away. Writing it to the store is not done here.
//!
//! A Check only appends to its own thread's pad, which no other core touches but to read it; a full pad is put on the
//! shelves as a whole. Many keys are found faster in one go than one each time: their misses overlap.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use crate::{
    domain::{decision::Reason, name::KeyId, time::Timestamp},
    engine::limiter::Budget,
    instruments::Apart,
    store::Hour,
};

pub(super) const SHELVES: usize = 16;
/// How many keys may wait to be written: about 120 MB of them.
pub const MOST_KEYS: usize = 1 << 20;
/// Notes on a full pad: 8 KB of them, some ten microseconds' work.
const PAD: usize = 256;

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

/// What one key's Checks have left. Most keys have one secret in use and one answer in an hour: these stand here, and
/// others apart, since a table of these may be large.
#[derive(Clone, Debug)]
pub(super) struct Trace {
    /// A secret's version and its latest use. Versions count from 1: 0 = there is none.
    version: u32,
    last: Timestamp,
    /// How many answers there were with a reason in an hour.
    counted: u64,
    reason: Reason,
    hour: Hour,
    more: Option<Box<More>>,
}

/// What else they have left.
#[derive(Clone, Debug, Default)]
struct More {
    used: Vec<(u32, Timestamp)>,
    counts: Vec<(Hour, Reason, u64)>,
    /// The budget, where the quota was drawn from: it knows how much.
    budget: Option<Arc<Budget>>,
}

impl Default for Trace {
    fn default() -> Trace {
        Trace {
            version: 0,
            last: Timestamp::from_micros(0),
            counted: 0,
            reason: Reason::Ok,
            hour: Hour(0),
            more: None,
        }
    }
}

impl Trace {
    fn note(&mut self, note: &Note) {
        self.count(Hour::of(note.at), note.reason, 1);
        if note.reason == Reason::Ok {
            self.use_of(note.version, note.at);
        }
    }

    fn more(&mut self) -> &mut More {
        self.more.get_or_insert_default()
    }

    fn use_of(&mut self, version: u32, at: Timestamp) {
        if self.version == 0 || self.version == version {
            (self.version, self.last) = (version, at.max(self.last));
            return;
        }
        let used = &mut self.more().used;
        match used.iter_mut().find(|(of, _)| *of == version) {
            Some((_, last)) => *last = at.max(*last),
            None => used.push((version, at)),
        }
    }

    fn count(&mut self, hour: Hour, reason: Reason, more: u64) {
        if self.counted == 0 || (self.hour, self.reason) == (hour, reason) {
            (self.hour, self.reason, self.counted) = (hour, reason, self.counted + more);
            return;
        }
        let counts = &mut self.more().counts;
        match counts.iter_mut().find(|(of, why, _)| (*of, *why) == (hour, reason)) {
            Some((_, _, count)) => *count += more,
            None => counts.push((hour, reason, more)),
        }
    }

    /// Adds what came later.
    fn add(&mut self, later: Trace) {
        later.used().for_each(|(version, at)| self.use_of(version, at));
        later.counts().for_each(|(hour, reason, more)| self.count(hour, reason, more));
        if let Some(budget) = later.budget() {
            self.drew(budget);
        }
    }

    fn drew(&mut self, budget: &Arc<Budget>) {
        self.more().budget.get_or_insert_with(|| budget.clone());
    }

    /// The versions of secrets, each with its latest use.
    pub(super) fn used(&self) -> impl Iterator<Item = (u32, Timestamp)> {
        let here = (self.version > 0).then_some((self.version, self.last));
        here.into_iter().chain(self.more.iter().flat_map(|more| more.used.iter().copied()))
    }

    /// The answers, by hour and reason; of each pair once.
    pub(super) fn counts(&self) -> impl Iterator<Item = (Hour, Reason, u64)> {
        let here = (self.counted > 0).then_some((self.hour, self.reason, self.counted));
        here.into_iter().chain(self.more.iter().flat_map(|more| more.counts.iter().copied()))
    }

    /// The budget, where the quota was drawn from.
    pub(super) fn budget(&self) -> Option<&Arc<Budget>> {
        self.more.as_ref()?.budget.as_ref()
    }
}

pub(super) type Traces = HashMap<KeyId, Trace, foldhash::fast::RandomState>;

/// A part of the keys. Whoever takes both locks takes that of `flushing` first.
#[derive(Default)]
pub(super) struct Shelf {
    /// Put here since the last flush began. Checks wait for this lock, so nobody has it for long.
    fresh: Mutex<Traces>,
    /// Being written.
    pub(super) flushing: Mutex<Traces>,
}

impl Shelf {
    /// Makes what is fresh a part of what is being written, and tells of which keys that is now.
    pub(super) fn take(&self) -> Vec<KeyId> {
        let mut flushing = lock(&self.flushing);
        // As many keys will come again, and a table that grows holds up whoever makes it grow.
        let room = Traces::with_capacity_and_hasher(lock(&self.fresh).len(), Default::default());
        let fresh = std::mem::replace(&mut *lock(&self.fresh), room);
        if flushing.is_empty() {
            *flushing = fresh;
        } else {
            fresh.into_iter().for_each(|(key, trace)| flushing.entry(key).or_default().add(trace));
        }
        flushing.keys().copied().collect()
    }

    /// How many keys it has. One that is used while it is written is in both parts.
    fn len(&self) -> usize {
        let flushing = lock(&self.flushing);
        let fresh = lock(&self.fresh);
        fresh.len() + flushing.keys().filter(|key| !fresh.contains_key(key)).count()
    }

    fn last_use(&self, key: KeyId, version: u32) -> Option<Timestamp> {
        let flushing = lock(&self.flushing);
        let fresh = lock(&self.fresh);
        let used = [fresh.get(&key), flushing.get(&key)].into_iter().flatten().flat_map(Trace::used);
        used.filter(|(of, _)| *of == version).map(|(_, at)| at).max()
    }
}

/// Everything that was noted and is not written.
#[derive(Default)]
pub(super) struct Notes {
    pads: Apart<Mutex<Vec<Note>>>,
    shelves: [Shelf; SHELVES],
}

impl Notes {
    /// Notes a Check. Tells how many could not be noted, since too many keys wait.
    pub(super) fn note(&self, note: Note) -> u64 {
        let mut pad = lock(self.pads.mine());
        pad.push(note);
        if pad.len() < PAD { 0 } else { self.put(&mut pad) }
    }

    /// Notes that a key's quota was drawn from, beside the Check that did.
    pub(super) fn drew(&self, key: KeyId, budget: &Arc<Budget>) {
        if let Some(trace) = trace(&mut lock(&self.shelf(key).fresh), key) {
            trace.drew(budget);
        }
    }

    /// Puts everything on the shelves that stands on pads. The same is told as by `note`.
    pub(super) fn gather(&self) -> u64 {
        self.pads.each().map(|pad| self.put(&mut lock(pad))).sum()
    }

    /// The shelves, with everything on them that was noted before this call.
    pub(super) fn shelves(&self) -> &[Shelf] {
        &self.shelves
    }

    /// How many keys wait.
    pub(super) fn len(&self) -> usize {
        self.shelves.iter().map(Shelf::len).sum()
    }

    /// The latest use of a secret that is known here.
    pub(super) fn last_use(&self, key: KeyId, version: u32) -> Option<Timestamp> {
        self.shelf(key).last_use(key, version)
    }

    /// A pad is locked until its notes are on the shelves: they are in one place or in the other for whoever looks.
    fn put(&self, pad: &mut Vec<Note>) -> u64 {
        let mut dropped = 0;
        for note in pad.drain(..) {
            match trace(&mut lock(&self.shelf(note.key).fresh), note.key) {
                Some(trace) => trace.note(&note),
                None => dropped += 1,
            }
        }
        dropped
    }

    fn shelf(&self, key: KeyId) -> &Shelf {
        // The last byte of a UUIDv7 is random.
        &self.shelves[usize::from(key.as_bytes()[15]) % SHELVES]
    }
}

/// The trace of a key. None = too many keys wait.
fn trace(fresh: &mut Traces, key: KeyId) -> Option<&mut Trace> {
    if fresh.len() >= MOST_KEYS / SHELVES && !fresh.contains_key(&key) {
        return None;
    }
    Some(fresh.entry(key).or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checks_are_counted_by_hour_and_reason() {
        let mut trace = Trace::default();
        trace.count(Hour(1), Reason::Ok, 2);
        trace.count(Hour(1), Reason::Revoked, 1);
        let mut later = Trace::default();
        later.count(Hour(1), Reason::Ok, 3);
        later.count(Hour(2), Reason::Ok, 1);
        trace.add(later);
        let counts = [(Hour(1), Reason::Ok, 5), (Hour(1), Reason::Revoked, 1), (Hour(2), Reason::Ok, 1)];
        assert_eq!(trace.counts().collect::<Vec<_>>(), counts);
    }
}
