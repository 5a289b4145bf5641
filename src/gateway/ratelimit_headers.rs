//! Formats a key's limits as HTTP headers: `RateLimit` and `RateLimit-Policy` (draft-ietf-httpapi-ratelimit-headers-10)
//! and `Retry-After` (RFC 9110, section 10.2.3).

use std::time::Duration;

use crate::{
    domain::{key::QuotaPeriod, key_attributes::KeyAttributes},
    engine::limiter::LimitOutcome,
};

/// The longest value, in bytes: a key's limits, as many as there may be, with names as long as they may be, fit. Limits
/// that do not are left out.
const MAX_HEADER_BYTES: usize = 1024;

/// The values of `RateLimit-Policy` and `RateLimit`; `None` for a key without limits.
pub(super) fn ratelimit_values(key: &impl KeyAttributes, usage: &LimitOutcome) -> Option<(String, String)> {
    if usage.statuses.is_empty() {
        return None;
    }
    let (mut policies, mut states, mut length) = (Vec::new(), Vec::new(), 0);
    for (at, (name, limit, standing)) in usage.statuses.iter().enumerate() {
        let name = quote_string(name);
        let window = match key.rate_limits().get(at) {
            Some(limit) => Some(ceil_seconds(limit.window)),
            // The quota comes last; a month has no one length.
            None => key.quota().and_then(|quota| match quota.period {
                QuotaPeriod::Hour => Some(3600),
                QuotaPeriod::Day => Some(24 * 3600),
                QuotaPeriod::Month | QuotaPeriod::Total => None,
            }),
        };
        let policy = format!("{name};q={limit}{}", format_parameter("w", window));
        let reset = format_parameter("t", standing.reset_after.map(ceil_seconds));
        let state = format!("{name};r={}{reset}", standing.remaining);
        length += policy.len().max(state.len()) + 2;
        if length > MAX_HEADER_BYTES {
            break;
        }
        policies.push(policy);
        states.push(state);
    }
    Some((policies.join(", "), states.join(", ")))
}

/// Whole seconds, rounded up, so that a client that waits this long has waited long enough.
pub(super) fn ceil_seconds(duration: Duration) -> u64 {
    duration.as_secs() + u64::from(duration.subsec_nanos() > 0)
}

fn format_parameter(name: &str, value: Option<u64>) -> String {
    value.map(|value| format!(";{name}={value}")).unwrap_or_default()
}

/// A String of RFC 9651, section 3.3.3: visible ASCII and spaces, quotes and backslashes escaped.
fn quote_string(text: &str) -> String {
    let mut quoted = String::from("\"");
    for letter in text.chars() {
        match letter {
            '"' | '\\' => quoted.extend(['\\', letter]),
            ' '..='~' => quoted.push(letter),
            _ => quoted.push('?'),
        }
    }
    quoted.push('"');
    quoted
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::{
        key::{Quota, RateLimit, tests::sample_key},
        limit::LimitStatus,
    };

    fn standing(remaining: u64, reset_after: Option<u64>) -> LimitStatus {
        let reset_after = reset_after.map(Duration::from_millis);
        LimitStatus { remaining, reset_after, retry_after: None, allowed: true }
    }

    #[test]
    fn limits_and_quota_are_told_by_name() {
        let mut key = sample_key();
        key.spec.rate_limits =
            vec![RateLimit { name: "bu\"rst".into(), limit: 10, window: Duration::from_secs(60) }];
        key.spec.quota = Some(Quota { limit: 1000, period: QuotaPeriod::Total });
        let standings = vec![
            ("bu\"rst".into(), 10, standing(3, Some(41_001))),
            ("quota".into(), 1000, standing(7, None)),
        ];
        let usage = LimitOutcome { statuses: standings, ..LimitOutcome::default() };
        let (policy, state) = ratelimit_values(&key, &usage).unwrap();
        assert_eq!(policy, r#""bu\"rst";q=10;w=60, "quota";q=1000"#);
        assert_eq!(state, r#""bu\"rst";r=3;t=42, "quota";r=7"#);
        assert_eq!(ratelimit_values(&key, &LimitOutcome::default()), None);
    }

    #[test]
    fn the_longest_limits_fit_and_more_are_left_out() {
        let limits = |count: u8| {
            let name = |at: u8| format!("{}{at:02}", "n".repeat(62));
            let standings =
                (0..count).map(|at| (name(at), u64::MAX / 2, standing(u64::MAX / 2, Some(86_400_000))));
            let usage = LimitOutcome { statuses: standings.collect(), ..LimitOutcome::default() };
            let window = Duration::from_secs(86_400);
            let mut key = sample_key();
            key.spec.rate_limits =
                (0..8).map(|at| RateLimit { name: name(at), limit: u64::MAX / 2, window }).collect();
            key.spec.quota = Some(Quota { limit: u64::MAX / 2, period: QuotaPeriod::Hour });
            ratelimit_values(&key, &usage).unwrap()
        };
        let (policy, state) = limits(9);
        assert_eq!((policy.matches(";q=").count(), state.matches(";r=").count()), (9, 9));
        let (policy, state) = limits(99);
        assert!(
            policy.len() <= MAX_HEADER_BYTES
                && state.len() <= MAX_HEADER_BYTES
                && policy.ends_with(";w=3600"),
            "{policy}"
        );
    }

    #[test]
    fn no_name_breaks_a_header() {
        assert_eq!(quote_string("a\r\nset-cookie: é"), r#""a??set-cookie: ?""#);
    }
}
