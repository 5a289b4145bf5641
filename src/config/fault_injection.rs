//! What a breakable build is told to do wrong (`--cfg keyward_breakable`): for the torture that must notice it. No other
//! build has this module.

use std::env;

use crate::domain::lease::LeaseInvariant;

/// What is wrong with a process.
#[derive(Clone, Copy, Debug)]
pub struct InjectedFaults {
    /// The rule of the lease protocol that it leaves out: `KEYWARD_BREAK`.
    pub skipped_invariant: Option<LeaseInvariant>,
    /// How fast its boot clock runs, in thousandths: `KEYWARD_CLOCK_RATE`.
    pub clock_rate: u64,
}

impl InjectedFaults {
    /// Reads it from the environment.
    ///
    /// # Errors
    /// When it names no rule or no rate: a torture of nothing would prove nothing.
    #[expect(clippy::disallowed_methods, reason = "only config reads the environment")]
    pub fn from_env() -> Result<InjectedFaults, String> {
        let rule = match env::var("KEYWARD_BREAK") {
            Err(_) => None,
            Ok(name) => {
                Some(parse_invariant(&name).ok_or_else(|| format!("KEYWARD_BREAK={name} is no rule"))?)
            }
        };
        let clock_rate = match env::var("KEYWARD_CLOCK_RATE") {
            Err(_) => 1000,
            Ok(rate) => rate.parse().map_err(|_| format!("KEYWARD_CLOCK_RATE={rate} is no number"))?,
        };
        Ok(InjectedFaults { skipped_invariant: rule, clock_rate })
    }
}

fn parse_invariant(name: &str) -> Option<LeaseInvariant> {
    LeaseInvariant::ALL.into_iter().find(|rule| format!("{rule:?}") == name)
}
