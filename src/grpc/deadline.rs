//! Computes the deadlines of a call from the method's limit and the client's `grpc-timeout`.

use std::time::Duration;

use http::HeaderMap;
use tokio::time::Instant;

/// Until when a call may wait for a change to be in force on every replica. `None` if the client set no deadline.
///
/// It ends shortly before the client's deadline, so that the client still receives the progress report.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct PropagationDeadline {
    pub(super) deadline: Option<Instant>,
}

impl PropagationDeadline {
    const MIN_MARGIN: Duration = Duration::from_millis(20);
    const MAX_MARGIN: Duration = Duration::from_millis(100);

    /// Reserves a twentieth of the timeout for the response, 20 to 100 ms.
    pub(super) fn from_timeout(timeout: Option<Duration>) -> PropagationDeadline {
        let deadline = timeout.and_then(|timeout| {
            let margin =
                (timeout / 20).clamp(PropagationDeadline::MIN_MARGIN, PropagationDeadline::MAX_MARGIN);
            Instant::now().checked_add(timeout.saturating_sub(margin))
        });
        PropagationDeadline { deadline }
    }
}

/// The time limit of a call: the shorter of the method's limit and the client's timeout.
pub(super) fn effective_timeout(method: Option<Duration>, headers: &HeaderMap) -> Option<Duration> {
    match (method, client_timeout(headers)) {
        (Some(method), Some(timeout)) => Some(method.min(timeout)),
        (method, timeout) => method.or(timeout),
    }
}

/// The client's timeout, from `grpc-timeout`.
pub(super) fn client_timeout(headers: &HeaderMap) -> Option<Duration> {
    headers.get("grpc-timeout").and_then(|value| value.to_str().ok()).and_then(parse_grpc_timeout)
}

/// Parses `grpc-timeout`: up to eight digits and a unit.
fn parse_grpc_timeout(text: &str) -> Option<Duration> {
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if !(1..=8).contains(&digits.len()) || !digits.bytes().all(|digit| digit.is_ascii_digit()) {
        return None;
    }
    let number: u64 = digits.parse().ok()?;
    Some(match unit {
        "H" => Duration::from_secs(number * 3600),
        "M" => Duration::from_secs(number * 60),
        "S" => Duration::from_secs(number),
        "m" => Duration::from_millis(number),
        "u" => Duration::from_micros(number),
        "n" => Duration::from_nanos(number),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_deadline_is_read_as_grpc_writes_it() {
        assert_eq!(parse_grpc_timeout("250m"), Some(Duration::from_millis(250)));
        assert_eq!(parse_grpc_timeout("5S"), Some(Duration::from_secs(5)));
        for bad in ["", "S", "5", "5x", "-5S", "123456789S", "é"] {
            assert_eq!(parse_grpc_timeout(bad), None, "{bad:?}");
        }
    }
}
