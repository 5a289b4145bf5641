//! What makes this process one replica among others: its name, and the lease of a new database.

use std::time::Duration;

use crate::domain::lease::Lease;

use super::{
    duration,
    server::{Invalid, invalid},
};

const MOST_NAME: usize = 255;
/// Longer is no lease that anybody wants: `static` says what is meant.
const LONGEST: Duration = Duration::from_secs(24 * 60 * 60);

/// Reads a lease: `strict`, `default`, `static`, or a duration.
///
/// # Errors
/// When it is none of them; the error says what would be right.
pub fn parse_lease(text: &str) -> Result<Lease, String> {
    match text {
        "strict" => Ok(Lease::STRICT),
        "default" => Ok(Lease::DEFAULT),
        "static" => Ok(Lease::STATIC),
        _ => {
            let lease = duration::parse(text).ok().filter(|length| *length <= LONGEST).and_then(Lease::of);
            lease.ok_or_else(|| {
                "must be strict (5s), default (60s), static (never runs out), or a duration of 1s to 1d"
                    .to_owned()
            })
        }
    }
}

/// Writes a lease as people read it.
#[must_use]
pub fn lease_text(lease: Lease) -> String {
    lease.length().map_or_else(|| "static (never runs out)".to_owned(), duration::format)
}

pub(super) fn read_lease(text: &str) -> Result<Lease, Invalid> {
    parse_lease(text).map_err(|problem| invalid("lease", text, problem))
}

pub(super) fn read_name(name: &str) -> Result<String, Invalid> {
    let fits = (1..=MOST_NAME).contains(&name.len()) && name.bytes().all(|byte| byte.is_ascii_graphic());
    if fits {
        Ok(name.to_owned())
    } else {
        Err(invalid("replica_name", name, "must be 1-255 visible characters"))
    }
}

/// What a replica is called that nobody has named: its machine and its port.
#[must_use]
pub fn default_name(port: u16) -> String {
    let machine = rustix::system::uname().nodename().to_string_lossy().into_owned();
    let machine: String = machine.chars().filter(char::is_ascii_graphic).take(MOST_NAME - 6).collect();
    format!("{machine}:{port}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_is_a_preset_or_a_duration_that_is_long_enough() {
        assert_eq!(parse_lease("strict"), Ok(Lease::STRICT));
        assert_eq!(parse_lease("5s"), Ok(Lease::STRICT));
        assert_eq!(parse_lease("static"), Ok(Lease::STATIC));
        for bad in ["", "0s", "999ms", "2d", "forever", "-1s"] {
            assert!(parse_lease(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_name_is_visible_and_there_is_always_one() {
        assert!(read_name("eu-1").is_ok());
        for bad in ["", "a b", "é", &"a".repeat(256)] {
            assert!(read_name(bad).is_err(), "{bad:?}");
        }
        assert!(read_name(&default_name(50051)).is_ok());
    }
}
