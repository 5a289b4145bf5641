//! Settings of how a server starts and stops.

use std::time::Duration;

use clap::Args;

use crate::domain::time::Revision;

use super::{
    duration,
    problems::Problems,
    server::{Invalid, invalid},
};

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
    #[arg(long, env = "KEYWARD_NO_MIGRATE", value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    pub no_migrate: Option<String>,
    /// Do not start on a database that is older than this revision, as a restored backup may be
    #[arg(long, env = "KEYWARD_REQUIRE_REVISION", value_name = "REVISION")]
    pub require_revision: Option<String>,
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

/// Reads a duration up to a bound.
fn read(setting: &'static str, text: &str, most: Duration) -> Result<Duration, Invalid> {
    let read = duration::parse(text).map_err(|problem| invalid(setting, text, format!("is {problem}")))?;
    if read > most {
        return Err(invalid(setting, text, format!("must be at most {}", duration::format(most))));
    }
    Ok(read)
}

impl Lifecycle {
    /// Judges the settings.
    pub(super) fn read(
        shutdown_delay: Option<&str>,
        database_wait: Option<&str>,
        migrate: Option<bool>,
        require_revision: Option<&str>,
        problems: &mut Problems<'_>,
    ) -> Lifecycle {
        let mut time = |setting, text: Option<&str>, usual, most| {
            text.and_then(|text| problems.take(read(setting, text, most))).unwrap_or(usual)
        };
        let shutdown_delay = time("shutdown_delay", shutdown_delay, SHUTDOWN_DELAY, LONGEST_DELAY);
        let database_wait = time("database_wait", database_wait, DATABASE_WAIT, LONGEST_WAIT);
        let require_revision = require_revision.and_then(|text| {
            let read = text.parse().map(Revision).ok();
            if read.is_none() {
                let problem = "must be a revision: a whole number, as `keyward backup` prints it";
                problems.add_flag("--require-revision", "KEYWARD_REQUIRE_REVISION", text, problem);
            }
            read
        });
        Lifecycle { shutdown_delay, database_wait, migrates: migrate.unwrap_or(true), require_revision }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_out_is_as_usual_and_nobody_waits_for_ever() {
        let read = |delay, revision| {
            Problems::collect(None, |problems| {
                Some(Lifecycle::read(delay, Some("0s"), None, revision, problems))
            })
        };
        let settings = read(None, Some("7")).unwrap();
        let wanted = Lifecycle {
            database_wait: Duration::ZERO,
            require_revision: Some(Revision(7)),
            ..Lifecycle::default()
        };
        assert_eq!(settings, wanted);
        for (delay, said) in [("1h", "at most 10m"), ("soon", "is not a duration")] {
            let error = read(Some(delay), None).unwrap_err().to_string();
            assert!(error.contains("shutdown_delay") && error.contains(said), "{error}");
        }
        assert!(
            read(None, Some("seven"))
                .unwrap_err()
                .to_string()
                .contains("--require-revision: \"seven\" must be")
        );
    }
}
