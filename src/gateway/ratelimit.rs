//! How a key's limits look to a client: `RateLimit` and `RateLimit-Policy`
//! (draft-ietf-httpapi-ratelimit-headers-10) and `Retry-After` (RFC 9110, section 10.2.3).

use std::time::Duration;

use crate::{
    domain::{facts::KeyFacts, key::QuotaPeriod},
    engine::limiter::Usage,
};

/// The longest value, in bytes: a key's limits, as many as there may be, with names as long as they may be, fit. Limits
/// that do not are left out.
const MAX_LEN: usize = 1024;

/// The values of `RateLimit-Policy` and `RateLimit`; `None` for a key without limits.
pub(super) fn fields(key: &impl KeyFacts, usage: &Usage) -> Option<(String, String)> {
    if usage.standings.is_empty() {
        return None;
    }
    let (mut policies, mut states, mut length) = (Vec::new(), Vec::new(), 0);
    for (at, (name, limit, standing)) in usage.standings.iter().enumerate() {
        let name = quoted(name);
        let window = match key.rate_limits().get(at) {
            Some(limit) => Some(seconds(limit.window)),
            // The quota comes last; a month has no one length.
            None => key.quota().and_then(|quota| match quota.period {
                QuotaPeriod::Hour => Some(3600),
                QuotaPeriod::Day => Some(24 * 3600),
                QuotaPeriod::Month | QuotaPeriod::Total => None,
            }),
        };
        let policy = format!("{name};q={limit}{}", parameter("w", window));
        let reset = parameter("t", standing.reset_after.map(seconds));
        let state = format!("{name};r={}{reset}", standing.remaining);
        length += policy.len().max(state.len()) + 2;
        if length > MAX_LEN {
            break;
        }
        policies.push(policy);
        states.push(state);
    }
    Some((policies.join(", "), states.join(", ")))
}

/// Whole seconds, rounded up: whoever waits so long has waited long enough.
pub(super) fn seconds(duration: Duration) -> u64 {
    duration.as_secs() + u64::from(duration.subsec_nanos() > 0)
}

fn parameter(name: &str, value: Option<u64>) -> String {
    value.map(|value| format!(";{name}={value}")).unwrap_or_default()
}

/// A String of RFC 9651, section 3.3.3: visible ASCII and spaces, quotes and backslashes escaped.
fn quoted(text: &str) -> String {
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
        key::{Quota, RateLimit, tests::sample},
        limit::Standing,
    };

    fn standing(remaining: u64, reset_after: Option<u64>) -> Standing {
        let reset_after = reset_after.map(Duration::from_millis);
        Standing { remaining, reset_after, retry_after: None, allowed: true }
    }

    #[test]
    fn limits_and_quota_are_told_by_name() {
        let mut key = sample();
        key.terms.rate_limits =
            vec![RateLimit { name: "bu\"rst".into(), limit: 10, window: Duration::from_secs(60) }];
        key.terms.quota = Some(Quota { limit: 1000, period: QuotaPeriod::Total });
        let standings = vec![
            ("bu\"rst".into(), 10, standing(3, Some(41_001))),
            ("quota".into(), 1000, standing(7, None)),
        ];
        let usage = Usage { standings, ..Usage::default() };
        let (policy, state) = fields(&key, &usage).unwrap();
        assert_eq!(policy, r#""bu\"rst";q=10;w=60, "quota";q=1000"#);
        assert_eq!(state, r#""bu\"rst";r=3;t=42, "quota";r=7"#);
        assert_eq!(fields(&key, &Usage::default()), None);
    }

    #[test]
    fn the_longest_limits_fit_and_more_are_left_out() {
        let limits = |count: u8| {
            let name = |at: u8| format!("{}{at:02}", "n".repeat(62));
            let standings =
                (0..count).map(|at| (name(at), u64::MAX / 2, standing(u64::MAX / 2, Some(86_400_000))));
            let usage = Usage { standings: standings.collect(), ..Usage::default() };
            let window = Duration::from_secs(86_400);
            let mut key = sample();
            key.terms.rate_limits =
                (0..8).map(|at| RateLimit { name: name(at), limit: u64::MAX / 2, window }).collect();
            key.terms.quota = Some(Quota { limit: u64::MAX / 2, period: QuotaPeriod::Hour });
            fields(&key, &usage).unwrap()
        };
        let (policy, state) = limits(9);
        assert_eq!((policy.matches(";q=").count(), state.matches(";r=").count()), (9, 9));
        let (policy, state) = limits(99);
        assert!(policy.len() <= MAX_LEN && state.len() <= MAX_LEN && policy.ends_with(";w=3600"), "{policy}");
    }

    #[test]
    fn no_name_breaks_a_header() {
        assert_eq!(quoted("a\r\nset-cookie: é"), r#""a??set-cookie: ?""#);
    }
}
