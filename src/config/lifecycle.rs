//! Settings of how a server starts and stops.

use std::time::Duration;

use clap::Args;

use crate::domain::time::Revision;

use super::{
    duration,
    problems::ProblemCollector,
    server::{InvalidSetting, invalid_setting},
};

/// Balancers and proxies look for health every second or so; and with it a stop ends within 10 s.
const DEFAULT_SHUTDOWN_DELAY: Duration = Duration::from_secs(2);
const MAX_SHUTDOWN_DELAY: Duration = Duration::from_secs(10 * 60);
/// After that whoever started the process may know better what to do.
const DEFAULT_DATABASE_WAIT: Duration = Duration::from_secs(60);
const MAX_DATABASE_WAIT: Duration = Duration::from_secs(24 * 60 * 60);

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
pub struct LifecycleSettings {
    /// How long it serves on while health says NOT_SERVING.
    pub shutdown_delay: Duration,
    /// How long a start waits for a database that is away.
    pub database_wait: Duration,
    /// Whether a start migrates an older schema.
    pub auto_migrate: bool,
    /// What the database must have at least.
    pub require_revision: Option<Revision>,
}

impl Default for LifecycleSettings {
    fn default() -> Self {
        LifecycleSettings {
            shutdown_delay: DEFAULT_SHUTDOWN_DELAY,
            database_wait: DEFAULT_DATABASE_WAIT,
            auto_migrate: true,
            require_revision: None,
        }
    }
}

/// Reads a duration up to a bound.
fn parse_bounded_duration(
    setting: &'static str,
    text: &str,
    most: Duration,
) -> Result<Duration, InvalidSetting> {
    let read = duration::parse_duration(text)
        .map_err(|problem| invalid_setting(setting, text, format!("is {problem}")))?;
    if read > most {
        return Err(invalid_setting(
            setting,
            text,
            format!("must be at most {}", duration::format_duration(most)),
        ));
    }
    Ok(read)
}

impl LifecycleSettings {
    /// Judges the settings.
    pub(super) fn validate(
        shutdown_delay: Option<&str>,
        database_wait: Option<&str>,
        migrate: Option<bool>,
        require_revision: Option<&str>,
        problems: &mut ProblemCollector<'_>,
    ) -> LifecycleSettings {
        let mut time = |setting, text: Option<&str>, usual, most| {
            text.and_then(|text| problems.ok_or_add(parse_bounded_duration(setting, text, most)))
                .unwrap_or(usual)
        };
        let shutdown_delay =
            time("shutdown_delay", shutdown_delay, DEFAULT_SHUTDOWN_DELAY, MAX_SHUTDOWN_DELAY);
        let database_wait = time("database_wait", database_wait, DEFAULT_DATABASE_WAIT, MAX_DATABASE_WAIT);
        let require_revision = require_revision.and_then(|text| {
            let read = text.parse().map(Revision).ok();
            if read.is_none() {
                let problem = "must be a revision: a whole number, as `keyward backup` prints it";
                problems.add_flag("--require-revision", "KEYWARD_REQUIRE_REVISION", text, problem);
            }
            read
        });
        LifecycleSettings {
            shutdown_delay,
            database_wait,
            auto_migrate: migrate.unwrap_or(true),
            require_revision,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_out_is_as_usual_and_nobody_waits_for_ever() {
        let read = |delay, revision| {
            ProblemCollector::collect(None, |problems| {
                Some(LifecycleSettings::validate(delay, Some("0s"), None, revision, problems))
            })
        };
        let settings = read(None, Some("7")).unwrap();
        let wanted = LifecycleSettings {
            database_wait: Duration::ZERO,
            require_revision: Some(Revision(7)),
            ..LifecycleSettings::default()
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
