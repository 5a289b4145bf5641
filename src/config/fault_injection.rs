//! Reads which faults a breakable build injects into itself (`--cfg keyward_breakable`), so that the torture test can prove
//! that it notices them. No other build has this module.

use std::env;

use crate::domain::lease::LeaseInvariant;

/// The faults of this process.
#[derive(Clone, Copy, Debug)]
pub struct InjectedFaults {
    /// The rule of the lease protocol that is skipped: `KEYWARD_BREAK`.
    pub skipped_invariant: Option<LeaseInvariant>,
    /// The rate of the boot clock in thousandths: `KEYWARD_CLOCK_RATE`.
    pub clock_rate: u64,
}

impl InjectedFaults {
    /// Reads the faults from the environment.
    ///
    /// # Errors
    /// If a variable names no rule or is no number: a test without its fault would prove nothing.
    #[expect(clippy::disallowed_methods, reason = "only config reads the environment")]
    pub fn from_env() -> Result<InjectedFaults, String> {
        let skipped_invariant = match env::var("KEYWARD_BREAK") {
            Err(_) => None,
            Ok(name) => {
                Some(parse_invariant(&name).ok_or_else(|| format!("KEYWARD_BREAK={name} is no rule"))?)
            }
        };
        let clock_rate = match env::var("KEYWARD_CLOCK_RATE") {
            Err(_) => 1000,
            Ok(rate) => rate.parse().map_err(|_| format!("KEYWARD_CLOCK_RATE={rate} is no number"))?,
        };
        Ok(InjectedFaults { skipped_invariant, clock_rate })
    }
}

fn parse_invariant(name: &str) -> Option<LeaseInvariant> {
    LeaseInvariant::ALL.into_iter().find(|rule| format!("{rule:?}") == name)
}
