//! Accumulates the usage of one key until it is written.
//!
//! How long it is kept, and where, is decided in `buffer.rs`.

use crate::{
    domain::{policy_decision::Reason, time::Timestamp},
    store::UsageHour,
};

use super::event::UsageEvent;

/// The usage of one key since the last flush.
///
/// Most keys use one secret and have one outcome within an hour: that fits the 24 bytes of this struct. The rest is
/// boxed, since there may be a million of them.
#[derive(Clone, Debug)]
pub(super) struct KeyUsage {
    /// The latest of the Checks in `count`; also the latest use of `secret_version`.
    last_at: Timestamp,
    extra: Option<Box<ExtraUsage>>,
    /// The number of Checks in that hour with that reason.
    count: u32,
    /// Versions start at 1; 0: no secret was used. A larger version is in `extra`.
    secret_version: u16,
    reason: Reason,
}

/// The usage that does not fit [`KeyUsage`].
#[derive(Clone, Debug, Default)]
struct ExtraUsage {
    secret_uses: Vec<(u32, Timestamp)>,
    counts: Vec<(UsageHour, Reason, u64)>,
}

impl Default for KeyUsage {
    fn default() -> KeyUsage {
        KeyUsage {
            last_at: Timestamp::from_micros(0),
            extra: None,
            count: 0,
            secret_version: 0,
            reason: Reason::Ok,
        }
    }
}

impl KeyUsage {
    pub(super) fn record(&mut self, event: &UsageEvent) {
        let version = if event.reason == Reason::Ok { event.secret_version } else { 0 };
        self.add_inline(event.at, event.reason, version, 1);
    }

    /// Adds later usage of the same key.
    pub(super) fn merge(&mut self, later: KeyUsage) {
        let KeyUsage { last_at: at, extra, count, secret_version: version, reason } = later;
        if count > 0 {
            self.add_inline(at, reason, version.into(), count);
        }
        let Some(extra) = extra else { return };
        extra.secret_uses.iter().for_each(|(version, at)| self.add_extra_use(*version, *at));
        extra.counts.iter().for_each(|(hour, reason, count)| self.add_extra_count(*hour, *reason, *count));
    }

    /// Adds Checks of one hour and reason, the latest of them at `at`: inline if they match, otherwise to `extra`.
    fn add_inline(&mut self, at: Timestamp, reason: Reason, version: u32, count: u32) {
        let short = u16::try_from(version);
        if self.count == 0
            && let Ok(version) = short
        {
            (self.last_at, self.reason, self.secret_version, self.count) = (at, reason, version, count);
            return;
        }
        let alike =
            (self.reason, UsageHour::from_timestamp(self.last_at)) == (reason, UsageHour::from_timestamp(at));
        if alike
            && short == Ok(self.secret_version)
            && let Some(total) = self.count.checked_add(count)
        {
            (self.last_at, self.count) = (self.last_at.max(at), total);
            return;
        }
        self.add_extra_count(UsageHour::from_timestamp(at), reason, count.into());
        if version > 0 {
            self.add_extra_use(version, at);
        }
    }

    fn extra_mut(&mut self) -> &mut ExtraUsage {
        self.extra.get_or_insert_default()
    }

    fn add_extra_use(&mut self, version: u32, at: Timestamp) {
        let used = &mut self.extra_mut().secret_uses;
        match used.iter_mut().find(|(of, _)| *of == version) {
            Some((_, last)) => *last = at.max(*last),
            None => used.push((version, at)),
        }
    }

    fn add_extra_count(&mut self, hour: UsageHour, reason: Reason, added: u64) {
        let counts = &mut self.extra_mut().counts;
        match counts.iter_mut().find(|(of, why, _)| (*of, *why) == (hour, reason)) {
            Some((_, _, count)) => *count += added,
            None => counts.push((hour, reason, added)),
        }
    }

    /// The versions of used secrets with their latest use. A version may occur twice.
    pub(super) fn secret_uses(&self) -> impl Iterator<Item = (u32, Timestamp)> {
        let here = (self.secret_version > 0).then_some((self.secret_version.into(), self.last_at));
        here.into_iter().chain(self.extra.iter().flat_map(|extra| extra.secret_uses.iter().copied()))
    }

    /// The number of Checks by hour and reason. A pair may occur twice; both counts apply.
    pub(super) fn counts(&self) -> impl Iterator<Item = (UsageHour, Reason, u64)> {
        let here = (self.count > 0).then_some((
            UsageHour::from_timestamp(self.last_at),
            self.reason,
            self.count.into(),
        ));
        here.into_iter().chain(self.extra.iter().flat_map(|extra| extra.counts.iter().copied()))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;
    use crate::domain::{name::KeyId, time::Timestamp};

    const HOUR: i64 = 3_600_000_000;

    fn event() -> impl Strategy<Value = UsageEvent> {
        let reason =
            prop_oneof![4 => Just(Reason::Ok), 1 => Just(Reason::Revoked), 1 => Just(Reason::Expired)];
        let version = prop_oneof![4 => 1..3u32, 1 => Just(70_000)];
        (0..3 * HOUR, reason, version).prop_map(|(at, reason, version)| UsageEvent {
            key_id: KeyId::generate(Timestamp::from_micros(0), [3; 10]),
            at: Timestamp::from_micros(at),
            secret_version: version,
            reason,
        })
    }

    type UsageTotals = (BTreeMap<u32, Timestamp>, BTreeMap<(UsageHour, u8), u64>);

    fn usage_totals(
        used: impl Iterator<Item = (u32, Timestamp)>,
        counts: impl Iterator<Item = (UsageHour, Reason, u64)>,
    ) -> UsageTotals {
        let mut totals = UsageTotals::default();
        for (version, at) in used {
            let last = totals.0.entry(version).or_insert(at);
            *last = at.max(*last);
        }
        counts.for_each(|(hour, reason, count)| *totals.1.entry((hour, reason as u8)).or_default() += count);
        totals
    }

    proptest! {
        #[test]
        fn a_trace_tells_every_check_wherever_notes_of_it_were_put_together(
            events in prop::collection::vec(event(), 0..20), cut in 0..20usize,
        ) {
            let (one, other) = events.split_at(cut.min(events.len()));
            let [mut usage, later] = [one, other].map(|events| {
                let mut usage = KeyUsage::default();
                events.iter().for_each(|event| usage.record(event));
                usage
            });
            usage.merge(later);
            let allowed = events.iter().filter(|event| event.reason == Reason::Ok);
            let expected = usage_totals(
                allowed.map(|event| (event.secret_version, event.at)),
                events.iter().map(|event| (UsageHour::from_timestamp(event.at), event.reason, 1)),
            );
            prop_assert_eq!(usage_totals(usage.secret_uses(), usage.counts()), expected);
        }
    }

    #[test]
    fn a_trace_is_small() {
        assert_eq!(size_of::<KeyUsage>(), 24);
    }
}
