//! Parses the values of flags (instants, durations, rate limits, quotas, pairs) and formats the same values for people.
//!
//! Not here: whether a value is allowed. The server decides that by the rules of its version, and reports every wrong
//! field at once.

use std::{path::Path, time::Duration};

use prost_types::Timestamp;

use crate::{clock::Clock, config::duration, domain::credential_mask::mask_value, pb};

/// The value of `--expires`: `never`, a duration from now, or an instant.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum ExpiryArg {
    Never,
    In(Duration),
    At(Timestamp),
}

impl ExpiryArg {
    pub(super) fn parse(text: &str) -> Result<ExpiryArg, String> {
        if text == "never" {
            return Ok(ExpiryArg::Never);
        }
        parse_instant_or_duration(text, "never, ")
            .map(|either| either.map_or_else(ExpiryArg::In, ExpiryArg::At))
    }

    /// Returns the instant, for a request that has no field for a duration; `None` is never.
    pub(super) fn resolve(self, clock: &dyn Clock) -> Option<Timestamp> {
        match self {
            ExpiryArg::Never => None,
            ExpiryArg::In(life) => Some(timestamp_to_proto(clock.now().saturating_add(life))),
            ExpiryArg::At(instant) => Some(instant),
        }
    }
}

/// The longest lifetime of an account's keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LifetimeArg {
    Unlimited,
    AtMost(Duration),
}

impl LifetimeArg {
    /// Parses `never` (no limit) or a duration.
    pub(super) fn parse(text: &str) -> Result<LifetimeArg, String> {
        match text {
            "never" => Ok(LifetimeArg::Unlimited),
            _ => duration::parse_duration(text)
                .map(LifetimeArg::AtMost)
                .map_err(|_| "write never, or a duration such as 90d, 2w or 1y (365 days)".to_owned()),
        }
    }

    pub(super) fn to_proto_limit(self) -> Option<prost_types::Duration> {
        match self {
            LifetimeArg::Unlimited => None,
            LifetimeArg::AtMost(duration) => Some(duration_to_proto(duration)),
        }
    }
}

/// An instant in the past, given as an instant or as a duration before now.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum PastInstantArg {
    Ago(Duration),
    At(Timestamp),
}

impl PastInstantArg {
    pub(super) fn parse(text: &str) -> Result<PastInstantArg, String> {
        parse_instant_or_duration(text, "")
            .map(|either| either.map_or_else(PastInstantArg::Ago, PastInstantArg::At))
    }

    pub(super) fn resolve(self, clock: &dyn Clock) -> Timestamp {
        match self {
            PastInstantArg::Ago(ago) => timestamp_to_proto(clock.now().saturating_sub(ago)),
            PastInstantArg::At(instant) => instant,
        }
    }
}

/// An instant in the future, given as an instant or as a duration from now.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum FutureInstantArg {
    In(Duration),
    At(Timestamp),
}

impl FutureInstantArg {
    pub(super) fn parse(text: &str) -> Result<FutureInstantArg, String> {
        parse_instant_or_duration(text, "")
            .map(|either| either.map_or_else(FutureInstantArg::In, FutureInstantArg::At))
    }

    pub(super) fn resolve(self, clock: &dyn Clock) -> Timestamp {
        match self {
            FutureInstantArg::In(wait) => timestamp_to_proto(clock.now().saturating_add(wait)),
            FutureInstantArg::At(instant) => instant,
        }
    }
}

/// `Ok(Ok)` is an instant, `Ok(Err)` a duration. `also` names further values for the error message.
fn parse_instant_or_duration(text: &str, also: &str) -> Result<Result<Timestamp, Duration>, String> {
    if let Ok(duration) = duration::parse_duration(text) {
        return Ok(Err(duration));
    }
    match text.parse::<jiff::Timestamp>() {
        Ok(instant) => Ok(Ok(timestamp_from_micros(instant.as_microsecond()))),
        Err(_) => Err(format!(
            "write {also}a duration such as 90d, 12h, 1h30m, 2w or 1y (365 days), or an instant such as \
             2027-01-31T00:00:00Z"
        )),
    }
}

fn timestamp_to_proto(instant: crate::domain::time::Timestamp) -> Timestamp {
    timestamp_from_micros(instant.as_micros())
}

pub(super) fn timestamp_from_micros(micros: i64) -> Timestamp {
    Timestamp {
        seconds: micros.div_euclid(1_000_000),
        // Fits: the remainder is less than 1,000,000.
        nanos: (micros.rem_euclid(1_000_000) * 1_000) as i32,
    }
}

/// Formats an instant in UTC; one that RFC 3339 cannot express as seconds since 1970.
pub(super) fn format_rfc3339(instant: &Timestamp) -> String {
    jiff::Timestamp::new(instant.seconds, instant.nanos)
        .map_or_else(|_| format!("{}s since 1970", instant.seconds), |instant| instant.to_string())
}

pub(super) fn duration_to_proto(duration: Duration) -> prost_types::Duration {
    prost_types::Duration {
        seconds: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(duration.subsec_nanos()).unwrap_or_default(),
    }
}

/// Formats a duration as flags take it, such as `1m30s`.
pub(super) fn format_proto_duration(duration: &prost_types::Duration) -> String {
    Duration::try_from(*duration).map_or_else(|_| "negative".to_owned(), duration::format_duration)
}

/// Parses `NAME=LIMIT/WINDOW`, such as `calls=100/1m`.
pub(super) fn parse_rate_limit(text: &str) -> Result<pb::RateLimit, String> {
    let parts = text.split_once('=').and_then(|(name, rest)| Some((name, rest.split_once('/')?)));
    let Some((name, (limit, window))) = parts.filter(|(name, _)| !name.is_empty()) else {
        return Err("write NAME=LIMIT/WINDOW, such as calls=100/1m".to_owned());
    };
    Ok(pb::RateLimit {
        name: name.to_owned(),
        limit: limit.parse().map_err(|_| "the limit must be a whole number: calls=100/1m".to_owned())?,
        window: Some(duration_to_proto(duration::parse_duration(window)?)),
    })
}

/// Formats a rate limit so that [`parse_rate_limit`] can read it.
pub(super) fn format_rate_limit(limit: &pb::RateLimit) -> String {
    format!(
        "{}={}/{}",
        limit.name,
        limit.limit,
        limit.window.as_ref().map(format_proto_duration).unwrap_or_default()
    )
}

/// Parses `LIMIT/PERIOD`, such as `1000/month`.
pub(super) fn parse_quota(text: &str) -> Result<pb::Quota, String> {
    let usage = || "write LIMIT/PERIOD with a period of hour, day, month or total: 1000/month".to_owned();
    let (limit, period) = text.split_once('/').ok_or_else(usage)?;
    let period = match period {
        "hour" => pb::QuotaPeriod::Hour,
        "day" => pb::QuotaPeriod::Day,
        "month" => pb::QuotaPeriod::Month,
        "total" => pb::QuotaPeriod::Total,
        _ => return Err(usage()),
    };
    Ok(pb::Quota { limit: limit.parse().map_err(|_| usage())?, period: period.into() })
}

/// Formats a quota so that [`parse_quota`] can read it.
pub(super) fn format_quota(quota: &pb::Quota) -> String {
    format!("{}/{}", quota.limit, format_enum_name(quota.period().as_str_name(), "QUOTA_PERIOD_"))
}

/// Formats a path for a message. A secret that was given in place of a path is masked.
pub(super) fn shown_path(path: &Path) -> String {
    mask_value(&path.to_string_lossy()).into_owned()
}

/// Parses `NAME=VALUE`; the value may contain `=`.
pub(super) fn parse_name_value(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err("write NAME=VALUE, such as team=billing".to_owned()),
    }
}

/// Formats an enum's proto name for people: `KEY_STATE_ACTIVE` becomes `active`.
pub(super) fn format_enum_name(name: &str, prefix: &str) -> String {
    name.strip_prefix(prefix).unwrap_or(name).to_ascii_lowercase().replace('_', "-")
}

/// Formats a count with its noun: "1 row", "2 rows".
pub(super) fn format_row_count(count: u64) -> String {
    format!("{count} row{}", if count == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{clock::ManualClock, domain::time};
    use proptest::prelude::*;

    fn noon() -> ManualClock {
        ManualClock::new(time::Timestamp::from_micros(1_767_268_800_000_000)) // 2026-01-01T12:00:00Z
    }

    #[test]
    fn an_expiry_is_never_a_duration_or_an_instant() {
        let at = |text: &str| ExpiryArg::parse(text).unwrap().resolve(&noon()).map(|t| format_rfc3339(&t));
        assert_eq!(at("never"), None);
        assert_eq!(at("90d").unwrap(), "2026-04-01T12:00:00Z");
        assert_eq!(at("2027-01-31T00:00:00+01:00").unwrap(), "2027-01-30T23:00:00Z");
        for bad in ["", "tomorrow", "2027-01-31", "90", "Never"] {
            let error = ExpiryArg::parse(bad).unwrap_err();
            assert!(
                error.contains("never, a duration such as 90d") && error.contains("2027-01-31T"),
                "{error}"
            );
        }
    }

    #[test]
    fn a_longest_life_is_never_or_a_duration() {
        assert_eq!(LifetimeArg::parse("never").unwrap().to_proto_limit(), None);
        assert_eq!(
            LifetimeArg::parse("90d").unwrap().to_proto_limit().map(|life| life.seconds),
            Some(90 * 86_400)
        );
        for bad in ["", "Never", "90", "2027-01-31T00:00:00Z"] {
            assert!(
                LifetimeArg::parse(bad).unwrap_err().contains("never, or a duration such as 90d"),
                "{bad:?}"
            );
        }
    }

    #[test]
    fn durations_count_back_for_the_past_and_on_for_the_future() {
        assert_eq!(
            format_rfc3339(&PastInstantArg::parse("12h").unwrap().resolve(&noon())),
            "2026-01-01T00:00:00Z"
        );
        assert_eq!(
            format_rfc3339(&FutureInstantArg::parse("12h").unwrap().resolve(&noon())),
            "2026-01-02T00:00:00Z"
        );
        let instant = "2025-06-01T00:00:00.25Z";
        assert_eq!(format_rfc3339(&PastInstantArg::parse(instant).unwrap().resolve(&noon())), instant);
        assert!(PastInstantArg::parse("never").is_err());
    }

    #[test]
    fn instants_before_1970_and_beyond_all_years_are_shown_too() {
        assert_eq!(format_rfc3339(&timestamp_from_micros(-1)), "1969-12-31T23:59:59.999999Z");
        assert_eq!(
            format_rfc3339(&Timestamp { seconds: i64::MAX, nanos: -5 }),
            format!("{}s since 1970", i64::MAX)
        );
    }

    #[test]
    fn rate_limits_quotas_and_pairs_are_read_and_shown_alike() {
        for text in ["calls=100/1m", "burst=5/1s", "a=1/1d"] {
            assert_eq!(format_rate_limit(&parse_rate_limit(text).unwrap()), text);
        }
        for text in ["1000/month", "1/total", "5/hour", "7/day"] {
            assert_eq!(format_quota(&parse_quota(text).unwrap()), text);
        }
        assert_eq!(parse_name_value("a=b=c"), Ok(("a".to_owned(), "b=c".to_owned())));
        for bad in ["", "calls", "=1/1m", "calls=1", "calls=x/1m", "calls=1/m", "calls=-1/1m"] {
            assert!(parse_rate_limit(bad).is_err(), "{bad:?}");
        }
        for bad in ["", "1000", "1000/year", "x/day", "-1/day"] {
            assert!(parse_quota(bad).unwrap_err().contains("1000/month"), "{bad:?}");
        }
        assert!(parse_name_value("team").is_err() && parse_name_value("=x").is_err());
    }

    proptest! {
        #[test]
        fn no_string_makes_a_parser_panic(text in any::<String>()) {
            let _ = (ExpiryArg::parse(&text), parse_rate_limit(&text), parse_quota(&text), parse_name_value(&text));
        }

        #[test]
        fn no_instant_or_duration_makes_the_printer_panic(seconds: i64, nanos: i32) {
            let _ = format_rfc3339(&Timestamp { seconds, nanos });
            let _ = format_proto_duration(&prost_types::Duration { seconds, nanos });
        }
    }

    #[test]
    fn one_row_is_not_rows() {
        assert_eq!([0, 1, 2].map(format_row_count), ["0 rows", "1 row", "2 rows"]);
    }
}
