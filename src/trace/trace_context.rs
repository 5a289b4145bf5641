//! Parses W3C Trace Context: the headers `traceparent` and `tracestate` of a caller.
//!
//! It runs on every call. A malformed header counts as missing.

use std::fmt;

use http::{HeaderMap, HeaderValue};
use opentelemetry::trace::{SpanContext, SpanId, TraceFlags, TraceState};

/// The longest `tracestate` that is forwarded; the standard requires at least 512.
const MAX_TRACE_STATE_LEN: usize = 512;

/// The 128-bit id of a trace.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct TraceId(u128);

impl From<opentelemetry::trace::TraceId> for TraceId {
    fn from(id: opentelemetry::trace::TraceId) -> Self {
        TraceId(u128::from_be_bytes(id.to_bytes()))
    }
}

/// Formats the id as 32 hexadecimal digits.
impl fmt::Display for TraceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl fmt::Debug for TraceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The trace context of a caller's span.
#[derive(Clone, Debug)]
pub struct RemoteTraceContext {
    /// The trace that the span belongs to.
    pub(crate) trace_id: TraceId,
    /// Whether the caller records the span.
    pub(crate) is_sampled: bool,
    span_id: u64,
    trace_state: Option<HeaderValue>,
}

impl RemoteTraceContext {
    /// Reads the context from headers. Several `traceparent` headers count as none.
    #[must_use]
    pub(crate) fn from_headers(headers: &HeaderMap) -> Option<RemoteTraceContext> {
        let mut values = headers.get_all("traceparent").iter();
        let parent = RemoteTraceContext::parse(values.next()?.as_bytes(), None)?;
        if values.next().is_some() {
            return None;
        }
        // `tracestate` is used only if the span is exported.
        let state = headers.get("tracestate").filter(|_| parent.is_sampled).cloned();
        Some(RemoteTraceContext { trace_state: state, ..parent })
    }

    /// Parses the values of `traceparent` and `tracestate`.
    #[must_use]
    pub(crate) fn parse(parent: &[u8], state: Option<&[u8]>) -> Option<RemoteTraceContext> {
        // version "-" trace "-" span "-" flags; a later version may append more after another "-".
        let (version, rest) = (parse_hex(parent.get(..2)?)?, parent.get(2..55)?);
        let whole = match version {
            0 => parent.len() == 55,
            0xff => false,
            _ => parent.get(55).is_none_or(|next| *next == b'-'),
        };
        let dashes = [rest[0], rest[33], rest[50]] == *b"---";
        let (trace, span, flags) =
            (parse_hex(&rest[1..33])?, parse_hex(&rest[34..50])?, parse_hex(&rest[51..53])?);
        if !whole || !dashes || trace == 0 || span == 0 {
            return None;
        }
        let state = state.and_then(|state| HeaderValue::from_bytes(state).ok());
        Some(RemoteTraceContext {
            trace_id: TraceId(trace),
            span_id: u64::try_from(span).ok()?,
            is_sampled: flags & 1 == 1,
            trace_state: state,
        })
    }

    /// The value of `tracestate`, if it is visible ASCII and short enough to forward.
    #[must_use]
    pub(crate) fn trace_state(&self) -> Option<&str> {
        let state = self.trace_state.as_ref()?.to_str().ok()?;
        (state.len() <= MAX_TRACE_STATE_LEN).then_some(state)
    }

    /// Converts the context for the exporter.
    pub(super) fn to_span_context(&self) -> SpanContext {
        let state = self.trace_state().and_then(|state| state.parse().ok());
        let flags = if self.is_sampled { TraceFlags::SAMPLED } else { TraceFlags::default() };
        let trace = opentelemetry::trace::TraceId::from(self.trace_id.0);
        SpanContext::new(trace, SpanId::from(self.span_id), flags, true, state.unwrap_or(TraceState::NONE))
    }
}

/// Parses lower-case hexadecimal digits.
fn parse_hex(digits: &[u8]) -> Option<u128> {
    digits.iter().try_fold(0, |number, digit| {
        let digit = match digit {
            b'0'..=b'9' => digit - b'0',
            b'a'..=b'f' => digit - b'a' + 10,
            _ => return None,
        };
        Some(number << 4 | u128::from(digit))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn read(text: &str) -> Option<RemoteTraceContext> {
        RemoteTraceContext::parse(text.as_bytes(), Some(b"a=1"))
    }

    #[test]
    fn a_parent_is_read_as_the_standard_writes_it() {
        let parent = read("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01").unwrap();
        assert!(parent.is_sampled);
        let context = parent.to_span_context();
        assert_eq!(context.trace_id().to_string(), "0af7651916cd43dd8448eb211c80319c");
        assert_eq!(context.span_id().to_string(), "b7ad6b7169203331");
        assert_eq!(context.trace_state().header(), "a=1");
        assert!(!read("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00").unwrap().is_sampled);
        assert!(read("01-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-more").is_some());
    }

    #[test]
    fn what_is_not_well_formed_is_no_parent() {
        for bad in [
            "",
            "00-00000000000000000000000000000000-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01",
            "00-0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-more",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331",
            "ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "00_0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        ] {
            assert!(read(bad).is_none(), "{bad}");
        }
        let mut headers = HeaderMap::new();
        let good = HeaderValue::from_static("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01");
        headers.append("traceparent", good.clone());
        assert!(RemoteTraceContext::from_headers(&headers).is_some());
        headers.append("traceparent", good);
        assert!(RemoteTraceContext::from_headers(&headers).is_none(), "two may be of two callers");
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..80)) {
            let _ = RemoteTraceContext::parse(&bytes, Some(&bytes)).map(|parent| parent.to_span_context());
        }
    }
}
