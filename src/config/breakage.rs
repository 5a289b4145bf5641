//! What a breakable build is told to do wrong (`--cfg keyward_breakable`): for the torture that must notice it. No other
//! build has this module.

use std::env;

use crate::domain::lease::Rule;

/// What is wrong with a process.
#[derive(Clone, Copy, Debug)]
pub struct Breakage {
    /// The rule of the lease protocol that it leaves out: `KEYWARD_BREAK`.
    pub rule: Option<Rule>,
    /// How fast its boot clock runs, in thousandths: `KEYWARD_CLOCK_RATE`.
    pub clock_rate: u64,
}

impl Breakage {
    /// Reads it from the environment.
    ///
    /// # Errors
    /// When it names no rule or no rate: a torture of nothing would prove nothing.
    #[expect(clippy::disallowed_methods, reason = "only config reads the environment")]
    pub fn read() -> Result<Breakage, String> {
        let rule = match env::var("KEYWARD_BREAK") {
            Err(_) => None,
            Ok(name) => Some(rule(&name).ok_or_else(|| format!("KEYWARD_BREAK={name} is no rule"))?),
        };
        let clock_rate = match env::var("KEYWARD_CLOCK_RATE") {
            Err(_) => 1000,
            Ok(rate) => rate.parse().map_err(|_| format!("KEYWARD_CLOCK_RATE={rate} is no number"))?,
        };
        Ok(Breakage { rule, clock_rate })
    }
}

fn rule(name: &str) -> Option<Rule> {
    Rule::ALL.into_iter().find(|rule| format!("{rule:?}") == name)
}
