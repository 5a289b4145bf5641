//! Parses and formats durations such as `90d`, `1h30m` and `500ms`, the notation of flags and files.

use std::time::Duration;

/// The units, longest first, in milliseconds. A year is 365 days and there is no month, because a key's lifetime must not
/// depend on the day on which it starts.
const UNITS: [(&str, u64); 7] = [
    ("y", 365 * 86_400_000),
    ("w", 7 * 86_400_000),
    ("d", 86_400_000),
    ("h", 3_600_000),
    ("m", 60_000),
    ("s", 1_000),
    ("ms", 1),
];

const EXPECTED_FORMAT: &str = "write whole numbers with units, longest first: 30d, 12h, 1h30m, 2w, 1y (365 days); \
                      the units are y, w, d, h, m (minutes), s, ms";

/// Parses a duration of whole numbers with units, longest unit first.
///
/// # Errors
/// A message with the expected notation.
pub(crate) fn parse_duration(text: &str) -> Result<Duration, String> {
    parse_millis(text).map(Duration::from_millis).ok_or_else(|| format!("not a duration: {EXPECTED_FORMAT}"))
}

/// Parses a timeout between 1 ms and a day.
///
/// # Errors
/// A message with the expected notation or bounds.
pub(crate) fn parse_timeout(text: &str) -> Result<Duration, String> {
    let timeout = parse_duration(text)?;
    if timeout.is_zero() || timeout > Duration::from_secs(86_400) {
        return Err("must be between 1ms and 1d".to_owned());
    }
    Ok(timeout)
}

fn parse_millis(text: &str) -> Option<u64> {
    if text.is_empty() {
        return None;
    }
    let (mut rest, mut units, mut total) = (text, &UNITS[..], 0u64);
    while !rest.is_empty() {
        let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
        let count: u64 = rest[..digits].parse().ok()?;
        rest = &rest[digits..];
        let letters = rest.bytes().take_while(u8::is_ascii_alphabetic).count();
        let at = units.iter().position(|(name, _)| *name == &rest[..letters])?;
        rest = &rest[letters..];
        total = total.checked_add(count.checked_mul(units[at].1)?)?;
        units = &units[at + 1..];
    }
    Some(total)
}

/// Formats a duration so that [`parse_duration`] reads it back: whole milliseconds in days and smaller units.
#[must_use]
pub(crate) fn format_duration(duration: Duration) -> String {
    let mut rest = u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    let mut text = String::new();
    for (name, length) in &UNITS[2..] {
        if rest >= *length {
            text.push_str(&format!("{}{name}", rest / length));
            rest %= length;
        }
    }
    if text.is_empty() { "0s".to_owned() } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn durations_are_read_as_people_write_them() {
        for (text, seconds) in [
            ("30d", 30 * 86_400),
            ("90d", 90 * 86_400),
            ("12h", 43_200),
            ("1y", 365 * 86_400),
            ("2w", 14 * 86_400),
            ("1h30m", 5_400),
            ("0s", 0),
            ("1y2w3d4h5m6s7000ms", 382 * 86_400 + 14_713),
        ] {
            assert_eq!(parse_duration(text), Ok(Duration::from_secs(seconds)), "{text:?}");
        }
        assert_eq!(parse_duration("500ms"), Ok(Duration::from_millis(500)));
    }

    #[test]
    fn a_bad_one_says_what_would_be_right() {
        for bad in [
            "",
            "30",
            "d",
            "-1d",
            "1.5h",
            "1 d",
            "30D",
            "1mo",
            "30m1h",
            "1h1h",
            "1d ",
            "+1d",
            "é",
            "1é",
            "never",
            "18446744073709551615y",
            "99999999999999999999s",
        ] {
            assert!(
                parse_duration(bad).unwrap_err().contains("30d, 12h, 1h30m, 2w, 1y (365 days)"),
                "{bad:?}"
            );
        }
    }

    #[test]
    fn a_timeout_is_neither_nothing_nor_for_ever() {
        assert_eq!(parse_timeout("10s"), Ok(Duration::from_secs(10)));
        for bad in ["0s", "2d", "x"] {
            assert!(parse_timeout(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn durations_are_written_in_days_and_less() {
        assert_eq!(format_duration(Duration::from_secs(365 * 86_400 + 5_400)), "365d1h30m");
        assert_eq!(format_duration(Duration::ZERO), "0s");
    }

    proptest! {
        #[test]
        fn no_string_makes_the_parser_panic(text in any::<String>()) {
            let _ = parse_duration(&text);
        }

        #[test]
        fn nor_does_what_is_almost_a_duration(text in "([0-9]{0,20}(y|w|d|h|m|s|ms|é)?){0,8}") {
            let _ = parse_duration(&text);
        }

        #[test]
        fn what_is_written_reads_back(millis: u64) {
            let duration = Duration::from_millis(millis);
            prop_assert_eq!(parse_duration(&format_duration(duration)), Ok(duration));
        }
    }
}
