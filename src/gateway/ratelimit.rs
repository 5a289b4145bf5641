//! How a key's limits look to a client: `RateLimit` and `RateLimit-Policy`
//! (draft-ietf-httpapi-ratelimit-headers-10) and `Retry-After` (RFC 9110, section 10.2.3).

use std::time::Duration;

use crate::{
    domain::{facts::KeyFacts, key::QuotaPeriod},
    engine::limiter::Usage,
};

/// The values of `RateLimit-Policy` and `RateLimit`; `None` for a key without limits.
pub(super) fn fields(key: &impl KeyFacts, usage: &Usage) -> Option<(String, String)> {
    if usage.standings.is_empty() {
        return None;
    }
    let (mut policies, mut states) = (Vec::new(), Vec::new());
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
        policies.push(format!("{name};q={limit}{}", parameter("w", window)));
        let reset = parameter("t", standing.reset_after.map(seconds));
        states.push(format!("{name};r={}{reset}", standing.remaining));
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
    fn no_name_breaks_a_header() {
        assert_eq!(quoted("a\r\nset-cookie: é"), r#""a??set-cookie: ?""#);
    }
}
