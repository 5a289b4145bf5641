//! The validated settings of Redis: its URL, and how the limiter uses it.
//!
//! The connection is in `redis_limits.rs`; the names of the settings are in `config`.

use std::time::Duration;

use redis::{Client, IntoConnectionInfo as _};

use crate::domain::connection_url::{ConnectionUrl, ConnectionUrlError};

/// How the limiter uses Redis.
#[derive(Clone, Debug)]
pub struct RedisSettings {
    /// The URL, which may contain a password.
    pub url: RedisUrl,
    /// The prefix of all keys in Redis.
    pub key_prefix: RedisKeyPrefix,
    /// How long a Check waits for Redis.
    pub timeout: Duration,
    /// What happens to a Check that Redis does not answer.
    pub on_failure: RedisFailurePolicy,
    /// The clock by which units come back.
    pub clock_source: ClockSource,
}

/// What happens to a limited Check if Redis does not answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RedisFailurePolicy {
    /// This process counts alone, and the outcome is marked as inexact.
    #[default]
    Allow,
    /// The Check fails with an error.
    Deny,
}

/// The URL of Redis. It may contain a password, so `Debug` does not show it.
#[derive(Clone)]
pub struct RedisUrl(pub(super) Client);

impl std::fmt::Debug for RedisUrl {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("RedisUrl")
    }
}

impl RedisUrl {
    /// Parses a URL of Redis, Valkey or a Unix socket.
    ///
    /// # Errors
    /// It is invalid. The error describes the valid form and repeats nothing of the input.
    pub fn parse(url: &str) -> Result<RedisUrl, &'static str> {
        const WANTED: &str = "must be redis://[USER[:PASSWORD]@]HOST[:PORT][/DATABASE], rediss:// for TLS, or \
                              unix:///PATH; percent-encode other characters as %XX";
        const AMBIGUOUS: &str = "can be read in more than one way: percent-encode the password (# is %23, / is %2F, \
                                 ? is %3F, @ is %40)";
        let schemes = ["redis", "rediss", "valkey", "valkeys", "redis+unix", "valkey+unix", "unix"];
        if !url.split_once("://").is_some_and(|(scheme, _)| schemes.contains(&scheme)) {
            return Err(WANTED);
        }
        let parts = ConnectionUrl::parse(url).map_err(|error| match error {
            ConnectionUrlError::NoScheme => WANTED,
            ConnectionUrlError::Ambiguous => AMBIGUOUS,
        })?;
        // This fragment turns off the verification of certificates; any other is part of a password that contains `#`.
        if parts.fragment.is_some_and(|fragment| fragment != "insecure") {
            return Err(AMBIGUOUS);
        }
        // The client ignores options that it does not know, such as a misspelled password.
        let of_socket = parts.scheme.contains("unix");
        let options: &[&str] = if of_socket { &["db", "user", "pass", "protocol"] } else { &["protocol"] };
        if parts.options().any(|(name, _)| !options.contains(&name)) {
            return Err(if of_socket {
                "has an unknown option; those of a socket are db, user, pass and protocol"
            } else {
                "has an unknown option; the only one is protocol; the password goes before the host"
            });
        }
        let info = url.into_connection_info().map_err(|_| WANTED)?;
        Client::open(info).map(RedisUrl).map_err(|_| WANTED)
    }
}

/// The prefix of all keys in Redis.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RedisKeyPrefix(pub(super) String);

impl RedisKeyPrefix {
    /// The prefix unless one is configured.
    pub const DEFAULT: &str = "keyward:";

    /// Parses a prefix: 1-64 of `[A-Za-z0-9_.:-]`.
    ///
    /// # Errors
    /// It is empty, too long, or has another character.
    pub fn parse(text: &str) -> Result<RedisKeyPrefix, &'static str> {
        let good = |byte: u8| byte.is_ascii_alphanumeric() || b"_.:-".contains(&byte);
        if (1..=64).contains(&text.len()) && text.bytes().all(good) {
            Ok(RedisKeyPrefix(text.to_owned()))
        } else {
            Err("must be 1-64 characters of [A-Za-z0-9_.:-]")
        }
    }
}

/// The clock by which units come back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ClockSource {
    /// The Redis server's: one clock for all processes, whose own may differ.
    #[default]
    Redis,
    /// The process's own; for tests that stop time.
    Local,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_option_that_the_client_would_pass_over_is_refused() {
        for good in [
            "redis://u:p@h:1/2?protocol=3",
            "unix:///run/r.sock?db=1&user=u&pass=p&protocol=2",
            "rediss://h#insecure",
        ] {
            assert!(RedisUrl::parse(good).is_ok(), "{good}");
        }
        for bad in [
            "redis://h?password=sesame",
            "redis://h?pass=sesame",
            "redis://h?protocol=3&foo=bar",
            "unix:///run/r.sock?password=sesame",
            "unix:///run/r.sock?PASS=sesame",
            "unix:///run/r.sock?p%61ss=sesame",
        ] {
            assert!(RedisUrl::parse(bad).unwrap_err().contains("unknown option"), "{bad}");
        }
    }
}
