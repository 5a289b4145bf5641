//! Settings of how a server starts and stops.

use std::time::Duration;

use clap::Args;

use crate::domain::time::Revision;

use super::{duration, server::ConfigError};

/// Balancers and proxies look for health every second or so; and with it a stop ends within 10 s.
const SHUTDOWN_DELAY: Duration = Duration::from_secs(2);
const LONGEST_DELAY: Duration = Duration::from_secs(10 * 60);
/// After that whoever started the process may know better what to do.
const DATABASE_WAIT: Duration = Duration::from_secs(60);
const LONGEST_WAIT: Duration = Duration::from_secs(24 * 60 * 60);

/// The flags.
#[derive(Args, Clone, Debug, Default)]
pub struct LifecycleArgs {
    /// How long to serve on after SIGTERM while health says NOT_SERVING [default: 2s]
    #[arg(long, env = "KEYWARD_SHUTDOWN_DELAY", value_name = "DURATION")]
    pub shutdown_delay: Option<String>,
    /// How long a start waits for a PostgreSQL server that is away [default: 60s]
    #[arg(long, env = "KEYWARD_DATABASE_WAIT", value_name = "DURATION")]
    pub database_wait: Option<String>,
    /// Do not start on an older schema: 'keyward migrate' brings it up to date
    #[arg(long, env = "KEYWARD_NO_MIGRATE", action = clap::ArgAction::SetTrue)]
    pub no_migrate: bool,
    /// Do not start on a database that is older than this revision, as a restored backup may be
    #[arg(long, env = "KEYWARD_REQUIRE_REVISION", value_name = "REVISION")]
    pub require_revision: Option<u64>,
}

/// How a server starts and stops.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lifecycle {
    /// How long it serves on while health says NOT_SERVING.
    pub shutdown_delay: Duration,
    /// How long a start waits for a database that is away.
    pub database_wait: Duration,
    /// Whether a start migrates an older schema.
    pub migrates: bool,
    /// What the database must have at least.
    pub require_revision: Option<Revision>,
}

impl Default for Lifecycle {
    fn default() -> Self {
        Lifecycle {
            shutdown_delay: SHUTDOWN_DELAY,
            database_wait: DATABASE_WAIT,
            migrates: true,
            require_revision: None,
        }
    }
}

fn read(
    setting: &'static str,
    text: Option<&str>,
    slot: &mut Duration,
    most: Duration,
) -> Result<(), ConfigError> {
    let Some(text) = text else { return Ok(()) };
    let wrong = |problem: String| ConfigError::Invalid { setting, value: text.to_owned(), problem };
    let read = duration::parse(text).map_err(wrong)?;
    if read > most {
        return Err(wrong(format!("must be at most {}", duration::format(most))));
    }
    *slot = read;
    Ok(())
}

impl Lifecycle {
    /// As the file says, where it does.
    pub(super) fn from_file(
        shutdown_delay: Option<&str>,
        database_wait: Option<&str>,
        migrate: Option<bool>,
    ) -> Result<Lifecycle, ConfigError> {
        let mut settings = Lifecycle { migrates: migrate.unwrap_or(true), ..Lifecycle::default() };
        settings.durations(shutdown_delay, database_wait)?;
        Ok(settings)
    }

    /// As the flags say, where they do.
    pub(super) fn flags(&mut self, args: &LifecycleArgs) -> Result<(), ConfigError> {
        self.durations(args.shutdown_delay.as_deref(), args.database_wait.as_deref())?;
        self.migrates &= !args.no_migrate;
        self.require_revision = args.require_revision.map(Revision);
        Ok(())
    }

    fn durations(&mut self, delay: Option<&str>, wait: Option<&str>) -> Result<(), ConfigError> {
        read("shutdown_delay", delay, &mut self.shutdown_delay, LONGEST_DELAY)?;
        read("database_wait", wait, &mut self.database_wait, LONGEST_WAIT)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flag_beats_the_file_and_nobody_waits_for_ever() {
        let mut settings = Lifecycle::from_file(Some("5s"), Some("0s"), Some(true)).unwrap();
        let flags =
            LifecycleArgs { shutdown_delay: Some("1s".to_owned()), no_migrate: true, ..Default::default() };
        settings.flags(&flags).unwrap();
        let wanted = (Duration::from_secs(1), Duration::ZERO, false);
        assert_eq!((settings.shutdown_delay, settings.database_wait, settings.migrates), wanted);
        for (delay, said) in [("1h", "at most 10m"), ("soon", "not a duration")] {
            let error = Lifecycle::from_file(Some(delay), None, None).unwrap_err().to_string();
            assert!(error.contains("shutdown_delay") && error.contains(said), "{error}");
        }
    }
}
