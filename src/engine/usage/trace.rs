//! What one key's Checks have left. Where and for how long it is kept is `notes.rs`'s.

use crate::{
    domain::{decision::Reason, time::Timestamp},
    store::Hour,
};

use super::notes::Note;

/// What one key's Checks have left. Most keys have one secret in use and one answer in an hour: these stand here, in 24
/// bytes, and others apart, since there may be a million of them.
#[derive(Clone, Debug)]
pub(super) struct Trace {
    /// The latest of the Checks that are counted here, and a use of the secret's version, if there is one.
    at: Timestamp,
    more: Option<Box<More>>,
    /// How many Checks in that hour had the reason.
    counted: u32,
    /// Versions count from 1: 0 = no secret was used. One that has no room here stands apart.
    version: u16,
    reason: Reason,
}

/// What else they have left.
#[derive(Clone, Debug, Default)]
struct More {
    used: Vec<(u32, Timestamp)>,
    counts: Vec<(Hour, Reason, u64)>,
}

impl Default for Trace {
    fn default() -> Trace {
        Trace { at: Timestamp::from_micros(0), more: None, counted: 0, version: 0, reason: Reason::Ok }
    }
}

impl Trace {
    pub(super) fn note(&mut self, note: &Note) {
        let version = if note.reason == Reason::Ok { note.version } else { 0 };
        self.add_here(note.at, note.reason, version, 1);
    }

    /// Adds what came later.
    pub(super) fn add(&mut self, later: Trace) {
        let Trace { at, more, counted, version, reason } = later;
        if counted > 0 {
            self.add_here(at, reason, version.into(), counted);
        }
        let Some(more) = more else { return };
        more.used.iter().for_each(|(version, at)| self.use_apart(*version, *at));
        more.counts.iter().for_each(|(hour, reason, count)| self.count_apart(*hour, *reason, *count));
    }

    /// Adds Checks of one hour and one answer, the latest of them at `at`: here, if they are like those that are.
    fn add_here(&mut self, at: Timestamp, reason: Reason, version: u32, count: u32) {
        let short = u16::try_from(version);
        if self.counted == 0
            && let Ok(version) = short
        {
            (self.at, self.reason, self.version, self.counted) = (at, reason, version, count);
            return;
        }
        let alike = (self.reason, Hour::of(self.at)) == (reason, Hour::of(at));
        if alike
            && short == Ok(self.version)
            && let Some(counted) = self.counted.checked_add(count)
        {
            (self.at, self.counted) = (self.at.max(at), counted);
            return;
        }
        self.count_apart(Hour::of(at), reason, count.into());
        if version > 0 {
            self.use_apart(version, at);
        }
    }

    fn more(&mut self) -> &mut More {
        self.more.get_or_insert_default()
    }

    fn use_apart(&mut self, version: u32, at: Timestamp) {
        let used = &mut self.more().used;
        match used.iter_mut().find(|(of, _)| *of == version) {
            Some((_, last)) => *last = at.max(*last),
            None => used.push((version, at)),
        }
    }

    fn count_apart(&mut self, hour: Hour, reason: Reason, more: u64) {
        let counts = &mut self.more().counts;
        match counts.iter_mut().find(|(of, why, _)| (*of, *why) == (hour, reason)) {
            Some((_, _, count)) => *count += more,
            None => counts.push((hour, reason, more)),
        }
    }

    /// The versions of secrets, each with its latest use; one may come twice.
    pub(super) fn used(&self) -> impl Iterator<Item = (u32, Timestamp)> {
        let here = (self.version > 0).then_some((self.version.into(), self.at));
        here.into_iter().chain(self.more.iter().flat_map(|more| more.used.iter().copied()))
    }

    /// The answers, by hour and reason; a pair may come twice, and both count.
    pub(super) fn counts(&self) -> impl Iterator<Item = (Hour, Reason, u64)> {
        let here = (self.counted > 0).then_some((Hour::of(self.at), self.reason, self.counted.into()));
        here.into_iter().chain(self.more.iter().flat_map(|more| more.counts.iter().copied()))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;
    use crate::domain::{name::KeyId, time::Timestamp};

    const HOUR: i64 = 3_600_000_000;

    fn note() -> impl Strategy<Value = Note> {
        let reason =
            prop_oneof![4 => Just(Reason::Ok), 1 => Just(Reason::Revoked), 1 => Just(Reason::Expired)];
        let version = prop_oneof![4 => 1..3u32, 1 => Just(70_000)];
        (0..3 * HOUR, reason, version).prop_map(|(at, reason, version)| Note {
            key: KeyId::generate(Timestamp::from_micros(0), [3; 10]),
            at: Timestamp::from_micros(at),
            version,
            reason,
        })
    }

    type Told = (BTreeMap<u32, Timestamp>, BTreeMap<(Hour, u8), u64>);

    fn told(
        used: impl Iterator<Item = (u32, Timestamp)>,
        counts: impl Iterator<Item = (Hour, Reason, u64)>,
    ) -> Told {
        let mut told = Told::default();
        for (version, at) in used {
            let last = told.0.entry(version).or_insert(at);
            *last = at.max(*last);
        }
        counts.for_each(|(hour, reason, count)| *told.1.entry((hour, reason as u8)).or_default() += count);
        told
    }

    proptest! {
        #[test]
        fn a_trace_tells_every_check_wherever_notes_of_it_were_put_together(
            notes in prop::collection::vec(note(), 0..20), cut in 0..20usize,
        ) {
            let (one, other) = notes.split_at(cut.min(notes.len()));
            let [mut trace, later] = [one, other].map(|notes| {
                let mut trace = Trace::default();
                notes.iter().for_each(|note| trace.note(note));
                trace
            });
            trace.add(later);
            let allowed = notes.iter().filter(|note| note.reason == Reason::Ok);
            let noted = told(
                allowed.map(|note| (note.version, note.at)),
                notes.iter().map(|note| (Hour::of(note.at), note.reason, 1)),
            );
            prop_assert_eq!(told(trace.used(), trace.counts()), noted);
        }
    }

    #[test]
    fn a_trace_is_small() {
        assert_eq!(size_of::<Trace>(), 24);
    }
}
