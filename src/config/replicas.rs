//! Parses and formats the settings of a replica: its name, and the lease of a new database.

use std::time::Duration;

use crate::domain::lease::LeaseDuration;

use super::{
    duration,
    error::{InvalidSetting, invalid_setting},
};

const MAX_NAME_LEN: usize = 255;
/// Longer outages call for `static`.
const MAX_LEASE: Duration = Duration::from_secs(24 * 60 * 60);

/// Parses a lease: `strict`, `default`, `static`, or a duration.
///
/// # Errors
/// A message with the accepted values.
pub(crate) fn parse_lease(text: &str) -> Result<LeaseDuration, String> {
    match text {
        "strict" => Ok(LeaseDuration::STRICT),
        "default" => Ok(LeaseDuration::DEFAULT),
        "static" => Ok(LeaseDuration::INFINITE),
        _ => {
            let lease = duration::parse_duration(text)
                .ok()
                .filter(|length| *length <= MAX_LEASE)
                .and_then(LeaseDuration::from_duration);
            lease.ok_or_else(|| {
                "must be strict (5s), default (60s), static (never runs out), or a duration of 1s to 1d"
                    .to_owned()
            })
        }
    }
}

/// Formats a lease for people.
#[must_use]
pub(crate) fn format_lease(lease: LeaseDuration) -> String {
    lease.length().map_or_else(|| "static (never runs out)".to_owned(), duration::format_duration)
}

pub(super) fn validate_lease(text: &str) -> Result<LeaseDuration, InvalidSetting> {
    parse_lease(text).map_err(|problem| invalid_setting("lease", text, problem))
}

pub(super) fn validate_replica_name(name: &str) -> Result<String, InvalidSetting> {
    let fits = (1..=MAX_NAME_LEN).contains(&name.len()) && name.bytes().all(|byte| byte.is_ascii_graphic());
    if fits {
        Ok(name.to_owned())
    } else {
        Err(invalid_setting("replica_name", name, "must be 1-255 visible characters"))
    }
}

/// The name of a replica without `replica_name`: its machine and port.
#[must_use]
pub(crate) fn default_replica_name(port: u16) -> String {
    let machine = rustix::system::uname().nodename().to_string_lossy().into_owned();
    let machine: String = machine.chars().filter(char::is_ascii_graphic).take(MAX_NAME_LEN - 6).collect();
    format!("{machine}:{port}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_is_a_preset_or_a_duration_that_is_long_enough() {
        assert_eq!(parse_lease("strict"), Ok(LeaseDuration::STRICT));
        assert_eq!(parse_lease("5s"), Ok(LeaseDuration::STRICT));
        assert_eq!(parse_lease("static"), Ok(LeaseDuration::INFINITE));
        for bad in ["", "0s", "999ms", "2d", "forever", "-1s"] {
            assert!(parse_lease(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_name_is_visible_and_there_is_always_one() {
        assert!(validate_replica_name("eu-1").is_ok());
        for bad in ["", "a b", "é", &"a".repeat(256)] {
            assert!(validate_replica_name(bad).is_err(), "{bad:?}");
        }
        assert!(validate_replica_name(&default_replica_name(50051)).is_ok());
    }
}
