//! Validates the settings of startup and shutdown: delays, migration, and the revision that a restored backup must have.

use std::time::Duration;

use crate::domain::time::Revision;

use super::{
    duration,
    error::{InvalidSetting, invalid_setting},
    problems::ProblemCollector,
};

/// Load balancers poll health about every second; with this delay a shutdown still ends within 10 s.
const DEFAULT_SHUTDOWN_DELAY: Duration = Duration::from_secs(2);
const MAX_SHUTDOWN_DELAY: Duration = Duration::from_secs(10 * 60);
/// Long enough for a failover; after it the process exits, and its supervisor decides what to do.
const DEFAULT_DATABASE_WAIT: Duration = Duration::from_secs(60);
const MAX_DATABASE_WAIT: Duration = Duration::from_secs(24 * 60 * 60);

/// The validated settings of startup and shutdown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LifecycleSettings {
    /// How long the server keeps serving while health reports NOT_SERVING.
    pub shutdown_delay: Duration,
    /// How long a start waits for an unreachable database.
    pub database_wait: Duration,
    /// Whether a start migrates an older schema.
    pub auto_migrate: bool,
    /// A database with a lower revision is refused.
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

/// Parses a duration that must not be longer than `max`.
fn parse_bounded_duration(
    setting: &'static str,
    text: &str,
    max: Duration,
) -> Result<Duration, InvalidSetting> {
    let read = duration::parse_duration(text)
        .map_err(|problem| invalid_setting(setting, text, format!("is {problem}")))?;
    if read > max {
        return Err(invalid_setting(
            setting,
            text,
            format!("must be at most {}", duration::format_duration(max)),
        ));
    }
    Ok(read)
}

impl LifecycleSettings {
    pub(super) fn validate(
        shutdown_delay: Option<&str>,
        database_wait: Option<&str>,
        migrate: Option<bool>,
        require_revision: Option<&str>,
        problems: &mut ProblemCollector<'_>,
    ) -> LifecycleSettings {
        let mut time = |setting, text: Option<&str>, default, max| {
            text.and_then(|text| problems.ok_or_add(parse_bounded_duration(setting, text, max)))
                .unwrap_or(default)
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
