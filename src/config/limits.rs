//! Validates the tables `[limits]` and `[account_limits]`: the backend that counts rate limits, and the bounds of an account.

use std::num::NonZeroU64;

use crate::domain::account::AccountLimits;
use crate::engine::limiter::{
    ClockSource, LimitSettings, RedisFailurePolicy, RedisKeyPrefix, RedisSettings, RedisUrl,
};

use super::{
    duration,
    error::{InvalidSetting, invalid_redacted_setting, invalid_setting},
    problems::ProblemCollector,
    raw::{DEFAULT_REDIS_TIMEOUT, RawAccountLimits, RawLimitSettings},
};

/// The longest that a Check may wait for Redis, in milliseconds.
const MAX_TIMEOUT_MS: u128 = 1000;

impl RawLimitSettings {
    pub(super) fn validate(self, problems: &mut ProblemCollector<'_>) -> LimitSettings {
        let is_redis = match self.backend.as_deref() {
            None | Some("local") => false,
            Some("redis") => true,
            Some(other) => {
                problems.add(invalid_setting("limits.backend", other, "must be local or redis"));
                false
            }
        };
        let on_failure = match self.on_backend_failure.as_deref() {
            None => RedisFailurePolicy::default(),
            Some("allow") => RedisFailurePolicy::Allow,
            Some("deny") => RedisFailurePolicy::Deny,
            Some(other) => {
                problems.add(invalid_setting("limits.on_backend_failure", other, "must be allow or deny"));
                RedisFailurePolicy::default()
            }
        };
        let timeout =
            problems.ok_or_add(parse_redis_timeout(self.timeout.as_deref().unwrap_or(DEFAULT_REDIS_TIMEOUT)));
        let prefix = self.prefix.as_deref().unwrap_or(RedisKeyPrefix::DEFAULT);
        let prefix = problems.ok_or_add(
            RedisKeyPrefix::parse(prefix).map_err(|error| invalid_setting("limits.prefix", prefix, error)),
        );
        let url = self.url.as_deref().and_then(|url| {
            problems.ok_or_add(
                RedisUrl::parse(url).map_err(|problem| invalid_redacted_setting("limits.url", problem)),
            )
        });
        if problems.is_valid("limits.backend") {
            match (is_redis, &self.url) {
                (false, Some(_)) => {
                    problems.add(invalid_redacted_setting(
                        "limits.url",
                        "has no effect: limits.backend is not redis",
                    ));
                }
                (true, None) if problems.is_valid("limits.url") => {
                    let problem = "needs limits.url, such as redis://127.0.0.1:6379; or set KEYWARD_LIMITS_URL, \
                                   the better place for a password";
                    problems.add(invalid_setting("limits.backend", "redis", problem));
                }
                _ => {}
            }
        }
        let redis = url.filter(|_| is_redis).zip(prefix).zip(timeout);
        let redis = redis.map(|((url, prefix), timeout)| RedisSettings {
            url,
            key_prefix: prefix,
            timeout,
            on_failure,
            clock_source: ClockSource::Redis,
        });
        LimitSettings { shared: false, redis }
    }
}

fn parse_redis_timeout(text: &str) -> Result<std::time::Duration, InvalidSetting> {
    let read =
        duration::parse_duration(text).ok().filter(|time| (1..=MAX_TIMEOUT_MS).contains(&time.as_millis()));
    let problem = "must be 1ms to 1s, such as 20ms: a Check waits that long for Redis";
    read.ok_or_else(|| invalid_setting("limits.timeout", text, problem))
}

impl RawAccountLimits {
    pub(super) fn into_account_limits(self) -> AccountLimits {
        let or = |limit: Option<NonZeroU64>, default| limit.map_or(default, NonZeroU64::get);
        AccountLimits {
            keys: or(self.keys, AccountLimits::DEFAULT.keys),
            roles: or(self.roles, AccountLimits::DEFAULT.roles),
            rotations_per_hour: or(self.rotations_per_hour, AccountLimits::DEFAULT.rotations_per_hour),
            log_rows_per_hour: or(self.log_rows_per_hour, AccountLimits::DEFAULT.log_rows_per_hour),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn read_with(text: &str, url: Option<&str>) -> Result<LimitSettings, String> {
        let mut file: RawLimitSettings = toml::from_str(text).map_err(|error| error.to_string())?;
        if let Some(url) = url {
            file.url = Some(url.into());
        }
        ProblemCollector::collect(None, |problems| Some(file.validate(problems)))
            .map_err(|error| error.to_string())
    }

    fn read(text: &str) -> Result<LimitSettings, String> {
        read_with(text, None)
    }

    #[test]
    fn each_limit_is_read_and_none_of_them_is_zero() {
        let read = |text: &str| {
            toml::from_str::<RawAccountLimits>(text)
                .map(RawAccountLimits::into_account_limits)
                .map_err(|error| error.to_string())
        };
        assert_eq!(read(""), Ok(AccountLimits::DEFAULT));
        let all = "keys = 1\nroles = 2\nrotations_per_hour = 3\nlog_rows_per_hour = 4";
        let expected = AccountLimits { keys: 1, roles: 2, rotations_per_hour: 3, log_rows_per_hour: 4 };
        assert_eq!(read(all), Ok(expected));
        for wrong in ["keys = 0", "roles = -1", "keys = 'all'", "members = 5"] {
            assert!(read(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_table_is_read() {
        assert!(read("").unwrap().redis.is_none());
        let redis = read("backend = 'redis'\nurl = 'redis://localhost'").unwrap().redis.unwrap();
        assert_eq!((redis.timeout, redis.on_failure), (Duration::from_millis(20), RedisFailurePolicy::Allow));
        assert_eq!(
            (redis.key_prefix, redis.clock_source),
            (RedisKeyPrefix::parse("keyward:").unwrap(), ClockSource::Redis)
        );
        let redis = read(
            "backend = 'redis'\nurl = 'unix:///run/redis.sock'\ntimeout = '5ms'\nprefix = 'kw2:'\n\
             on_backend_failure = 'deny'",
        );
        let redis = redis.unwrap().redis.unwrap();
        assert_eq!((redis.timeout, redis.on_failure), (Duration::from_millis(5), RedisFailurePolicy::Deny));
        assert!(read_with("backend = 'redis'", Some("rediss://u:p@h:1/2")).unwrap().redis.is_some());
    }

    #[test]
    fn wrong_values_say_which_and_what_would_be_right() {
        let redis = |more: &str| format!("backend = 'redis'\nurl = 'redis://h'\n{more}");
        for (text, said) in [
            ("backend = 'valkey'".to_owned(), "local or redis"),
            ("backend = 'redis'".to_owned(), "KEYWARD_LIMITS_URL"),
            ("url = 'redis://h'".to_owned(), "has no effect"),
            (redis("timeout = '0ms'"), "1ms to 1s"),
            (redis("timeout = '1001ms'"), "1ms to 1s"),
            (redis("timeout = '20'"), "1ms to 1s"),
            (redis("on_backend_failure = 'open'"), "allow or deny"),
            (redis("prefix = 'a b'"), "limits.prefix"),
            (redis("time_out = '1ms'"), "time_out"),
        ] {
            let error = read(&text).unwrap_err();
            assert!(error.contains(said), "{text}: {error}");
        }
    }

    #[test]
    fn a_password_is_never_shown() {
        for url in [
            "redis://:sesame@",
            "sesame",
            "redis://:sesame@h:port/x",
            "https://u:sesame@h",
            "redis://:p@h#sesame",
        ] {
            let error = read_with("backend = 'redis'", Some(url)).unwrap_err();
            assert!(error.contains("limits.url") && !error.contains("sesame"), "{url}: {error}");
        }
        let settings = read_with("backend = 'redis'", Some("redis://u:sesame@h")).unwrap();
        let file: RawLimitSettings = toml::from_str("url = 'redis://u:sesame@h'").unwrap();
        assert!(!format!("{settings:?} {file:?}").contains("sesame"));
    }
}
