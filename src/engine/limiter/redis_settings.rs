//! Where Redis is and how it is used, validated.

use std::time::Duration;

use redis::{Client, IntoConnectionInfo as _};

use crate::domain::connection_url::{ConnectionUrl, ConnectionUrlError};

/// How Redis is used.
#[derive(Clone, Debug)]
pub struct RedisSettings {
    /// Where it is.
    pub url: RedisUrl,
    /// What the names of all keys in it start with.
    pub key_prefix: RedisKeyPrefix,
    /// How long a Check waits for it.
    pub timeout: Duration,
    /// What becomes of a Check that it does not answer.
    pub on_failure: RedisFailurePolicy,
    /// By whose clock units come back.
    pub clock_source: ClockSource,
}

/// What becomes of a limited Check when Redis does not answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RedisFailurePolicy {
    /// This process counts by itself; the answer says so.
    #[default]
    Allow,
    /// It is not answered.
    Deny,
}

/// Where Redis is. It may hold a password, and is never shown.
#[derive(Clone)]
pub struct RedisUrl(pub(super) Client);

impl std::fmt::Debug for RedisUrl {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("RedisUrl")
    }
}

impl RedisUrl {
    /// Reads a URL.
    ///
    /// # Errors
    /// When it is none; the error says what would be right, and nothing of what was given.
    pub fn parse(url: &str) -> Result<RedisUrl, &'static str> {
        const WANTED: &str = "must be redis://[USER[:PASSWORD]@]HOST[:PORT][/DATABASE], rediss:// for TLS, or \
                              unix:///PATH; other letters than those of a URL are written as %XX";
        const AMBIGUOUS: &str = "can be read in more than one way: percent-encode the password (# is %23, / is %2F, \
                                 ? is %3F, @ is %40)";
        let known = ["redis", "rediss", "valkey", "valkeys", "redis+unix", "valkey+unix", "unix"];
        if !url.split_once("://").is_some_and(|(scheme, _)| known.contains(&scheme)) {
            return Err(WANTED);
        }
        let parts = ConnectionUrl::parse(url).map_err(|error| match error {
            ConnectionUrlError::NoScheme => WANTED,
            ConnectionUrlError::Ambiguous => AMBIGUOUS,
        })?;
        // With it a certificate is not verified; anything else behind a # is a piece of a password.
        if parts.fragment.is_some_and(|fragment| fragment != "insecure") {
            return Err(AMBIGUOUS);
        }
        // The client passes over an option that it does not know, such as a misspelt password.
        let of_socket = parts.scheme.contains("unix");
        let known: &[&str] = if of_socket { &["db", "user", "pass", "protocol"] } else { &["protocol"] };
        if parts.options().any(|(name, _)| !known.contains(&name)) {
            return Err(if of_socket {
                "has an unknown option; those of a socket are db, user, pass and protocol"
            } else {
                "has an unknown option; the only one is protocol, and the password is written before the host"
            });
        }
        let info = url.into_connection_info().map_err(|_| WANTED)?;
        Client::open(info).map(RedisUrl).map_err(|_| WANTED)
    }
}

/// What the names of all keys in Redis start with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RedisKeyPrefix(pub(super) String);

impl RedisKeyPrefix {
    /// The usual one.
    pub const DEFAULT: &str = "keyward:";

    /// Reads a prefix: 1-64 of `[A-Za-z0-9_.:-]`.
    ///
    /// # Errors
    /// When it is none.
    pub fn parse(text: &str) -> Result<RedisKeyPrefix, &'static str> {
        let good = |byte: u8| byte.is_ascii_alphanumeric() || b"_.:-".contains(&byte);
        if (1..=64).contains(&text.len()) && text.bytes().all(good) {
            Ok(RedisKeyPrefix(text.to_owned()))
        } else {
            Err("must be 1-64 characters of [A-Za-z0-9_.:-]")
        }
    }
}

/// By whose clock units come back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ClockSource {
    /// The Redis server's: one clock for all processes, whose own may differ.
    #[default]
    Redis,
    /// The process' own; for tests that stop time.
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
