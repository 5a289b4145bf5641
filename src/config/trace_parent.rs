//! Reads the trace that a client command was started in from `TRACEPARENT` and `TRACESTATE`, whose values are those of the
//! W3C Trace Context headers (OpenTelemetry, "Environment Variables as Context Propagation Carriers").
//!
//! A client command creates no span: its calls are children of the span that started it. Malformed values are ignored, as in
//! the headers of a call.

use std::ffi::OsString;

use crate::trace::RemoteTraceContext;

/// The span that a command was started in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct InheritedTraceContext {
    traceparent: String,
    tracestate: Option<String>,
}

impl InheritedTraceContext {
    /// Reads the trace from the environment. None = it is absent or malformed.
    pub(super) fn from_env(
        variable: impl Fn(&'static str) -> Option<OsString>,
    ) -> Option<InheritedTraceContext> {
        let text = |name| variable(name)?.into_string().ok();
        let (parent, state) = (text("TRACEPARENT")?, text("TRACESTATE"));
        let read = RemoteTraceContext::parse(parent.as_bytes(), state.as_deref().map(str::as_bytes))?;
        let state = read.trace_state().map(str::to_owned);
        Some(InheritedTraceContext { traceparent: parent, tracestate: state })
    }

    /// The headers for calls within this trace, in visible ASCII.
    pub(crate) fn headers(&self) -> impl Iterator<Item = (&'static str, &str)> {
        let state = self.tracestate.as_deref().map(|state| ("tracestate", state));
        std::iter::once(("traceparent", &*self.traceparent)).chain(state)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    fn headers(parent: &str, state: &str) -> Vec<(&'static str, String)> {
        let variable = |name| Some(if name == "TRACEPARENT" { parent } else { state }.into());
        let told = InheritedTraceContext::from_env(variable);
        told.iter()
            .flat_map(InheritedTraceContext::headers)
            .map(|(name, value)| (name, value.to_owned()))
            .collect()
    }

    #[test]
    fn what_the_environment_says_is_sent_as_it_is() {
        let both = [("traceparent", PARENT.to_owned()), ("tracestate", "a=1, b=2".to_owned())];
        assert_eq!(headers(PARENT, "a=1, b=2"), both);
        assert_eq!(
            InheritedTraceContext::from_env(|name| (name == "TRACESTATE").then(|| "a=1".into())),
            None
        );
    }

    #[test]
    fn what_is_not_well_formed_is_not_sent() {
        assert_eq!(headers("kw_live_x", "a=1"), []);
        for state in ["a=\u{e9}".to_owned(), "a=1\nb: 2".to_owned(), "a=".repeat(300)] {
            assert_eq!(headers(PARENT, &state), [("traceparent", PARENT.to_owned())], "{state}");
        }
    }
}
