//! Chance from a seed, and clocks that are not quite right.

use keyward::domain::lease::BootInstant;
use rand::{Rng as _, SeedableRng as _, rngs::ChaCha8Rng};

/// Microseconds of true time since the schedule began.
pub(super) type Micros = u64;

/// Everything that is left to chance in a schedule.
pub(super) struct ScheduleRng(ChaCha8Rng);

impl ScheduleRng {
    pub(super) fn new(seed: u64) -> ScheduleRng {
        ScheduleRng(ChaCha8Rng::seed_from_u64(seed))
    }

    /// Chance of its own for somebody else.
    #[allow(dead_code, reason = "the torture forks it")]
    pub(super) fn split(&mut self) -> ScheduleRng {
        ScheduleRng::new(self.0.next_u64())
    }

    /// A number less than `end`.
    pub(super) fn below(&mut self, end: u64) -> u64 {
        let wide = u128::from(self.0.next_u64()) * u128::from(end);
        (wide >> 64) as u64
    }

    /// A number from `from` to less than `end`.
    pub(super) fn between(&mut self, from: u64, end: u64) -> u64 {
        from + self.below(end.saturating_sub(from).max(1))
    }

    /// Yes once in `of`.
    pub(super) fn one_chance_in(&mut self, of: u64) -> bool {
        self.below(of) == 0
    }

    pub(super) fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }

    /// One of the bits that are set; None if none is.
    pub(super) fn bit(&mut self, bits: u64) -> Option<u8> {
        let skip = self.below(u64::from(bits.count_ones()));
        (0..64).filter(|bit| bits >> bit & 1 == 1).nth(skip as usize)
    }
}

/// A machine's boot clock: runs from where it likes, at its own rate, within 10 % of true time.
#[derive(Clone, Copy, Debug)]
pub(super) struct HostClock {
    origin: u64,
    /// Nanoseconds that it counts in a true microsecond.
    rate: u64,
}

impl HostClock {
    pub(super) const SLOWEST: u64 = 900;
    pub(super) const FASTEST: u64 = 1100;

    pub(super) fn new(dice: &mut ScheduleRng, rate: u64) -> HostClock {
        HostClock { origin: dice.between(1, 1 << 50), rate }
    }

    pub(super) fn read(self, at: Micros) -> BootInstant {
        BootInstant::from_nanos(self.origin + at * self.rate)
    }

    /// When, in true time, it shows this instant or a later one.
    pub(super) fn time_when_reading(self, local: BootInstant) -> Micros {
        local.as_nanos().saturating_sub(self.origin).div_ceil(self.rate)
    }
}
