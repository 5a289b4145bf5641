//! The call that is being answered, as log lines, decisions and traces name it: its request id, the trace that it is
//! part of, and whether that is recorded.
//!
//! What a call is called goes with its task and costs a few nanoseconds. A span is made only where it is recorded:
//! that is decided first, by the caller's word or else by chance. Who asks for the span of a call that is not
//! recorded gets nothing, and makes nothing. Where spans go is `telemetry`'s business.

mod request_id;
mod trace_context;

use std::{
    cell::{Cell, RefCell},
    net::IpAddr,
    sync::atomic::{AtomicU64, Ordering},
};

use http::HeaderMap;
use opentelemetry::trace::TraceContextExt as _;
use tracing::{Instrument as _, Span, field::Empty};
use tracing_opentelemetry::OpenTelemetrySpanExt as _;

use crate::domain::time::Timestamp;

pub use request_id::RequestId;
pub(crate) use request_id::{RandomId, RandomIds, sampling_threshold};
pub use trace_context::RemoteTraceContext;
pub(crate) use trace_context::TraceId;

/// The target of spans that are recorded. No log line has it.
pub(crate) const SPAN_TARGET: &str = "keyward::trace";
/// The name under which a call's own span is made; others are recorded only within one.
pub(crate) const CALL_SPAN_NAME: &str = "call";

tokio::task_local! {
    static CURRENT: TracedCall;
}

/// A call.
#[derive(Clone, Debug)]
pub struct TracedCall {
    request_id: RefCell<RequestId>,
    remote_context: RefCell<Option<RemoteTraceContext>>,
    trace_id: Cell<Option<TraceId>>,
    /// Chance has it recorded, if nobody says otherwise; None = none is, whatever anybody says.
    sampled: Option<bool>,
    recorded: Cell<bool>,
    peer: Option<IpAddr>,
    caller: RefCell<Option<CallerLabels>>,
}

/// Whose call it is, once that is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct CallerLabels {
    /// The id of its key, or what else it showed.
    pub(crate) key_id: String,
    /// The account that it acts in.
    pub(crate) account: String,
}

impl TracedCall {
    fn new(
        names: Option<&HeaderMap>,
        peer: Option<IpAddr>,
        made: RequestId,
        drawn: Option<bool>,
    ) -> TracedCall {
        let parent = names.and_then(RemoteTraceContext::from_headers);
        TracedCall {
            request_id: RefCell::new(names.and_then(RequestId::from_headers).unwrap_or(made)),
            trace_id: Cell::new(parent.as_ref().map(|parent| parent.trace_id)),
            remote_context: RefCell::new(parent),
            sampled: drawn,
            recorded: Cell::new(false),
            peer,
            caller: RefCell::default(),
        }
    }

    /// Its request id.
    #[must_use]
    pub(crate) fn request_id(&self) -> RequestId {
        self.request_id.borrow().clone()
    }

    /// The trace that it is part of, if it is known to be part of one.
    #[must_use]
    pub(crate) fn trace_id(&self) -> Option<TraceId> {
        self.trace_id.get()
    }

    /// Who is connected.
    #[must_use]
    pub(crate) fn peer(&self) -> Option<IpAddr> {
        self.peer
    }

    /// Whose call it is, if that is known.
    #[must_use]
    pub(crate) fn caller(&self) -> Option<CallerLabels> {
        self.caller.borrow().clone()
    }

    /// Notes whose call it is.
    pub(crate) fn set_caller(&self, caller: CallerLabels) {
        if self.recorded.get() {
            Span::current().record("keyward.caller", &caller.key_id);
        }
        self.caller.replace(Some(caller));
    }

    /// Whether it is to be recorded, by what is known of it so far: by its caller's word or else by chance.
    #[must_use]
    pub(crate) fn should_record(&self) -> bool {
        let told = || self.remote_context.borrow().as_ref().map(|parent| parent.is_sampled);
        self.sampled.is_some_and(|drawn| told().unwrap_or(drawn))
    }

    /// Whether it is recorded.
    #[must_use]
    pub(crate) fn is_recorded(&self) -> bool {
        self.recorded.get()
    }
}

/// How calls are named, and which are recorded.
#[derive(Clone, Copy, Debug)]
pub struct CallTracer {
    random_ids: RandomIds,
    sampling: SamplingPolicy,
}

impl CallTracer {
    /// Processes with the same seed would give the same names.
    #[must_use]
    pub const fn new(seed: u64, sampling: SamplingPolicy) -> CallTracer {
        CallTracer { random_ids: RandomIds::with_seed(seed), sampling }
    }

    /// A call with these headers; None = they are known to name neither it nor its trace. A request id that is none is
    /// as good as missing: it is made then.
    #[must_use]
    pub fn new_call(&self, headers: Option<&HeaderMap>, peer: Option<IpAddr>, now: Timestamp) -> TracedCall {
        let drawn = self.sampling.sample(|| self.random_ids.next_id().derive_independent());
        TracedCall::new(headers, peer, self.random_ids.next_id().request_id(now.as_millis()), drawn)
    }

    /// The span of this task's call, if it is recorded. To be made once, before any other.
    #[must_use]
    pub fn start_span(&self, method: &'static str) -> Option<Span> {
        with_current(|call| call.should_record().then(|| create_call_span(call, method)))?
    }
}

/// Answers a call: whatever `answer` logs, decides and records is this call's.
pub async fn scope<F: Future>(call: TracedCall, answer: F) -> F::Output {
    CURRENT.scope(call, answer).await
}

/// The same of what does not wait.
pub(crate) fn sync_scope<T>(call: TracedCall, answer: impl FnOnce() -> T) -> T {
    CURRENT.sync_scope(call, answer)
}

/// The call that this task answers.
pub(crate) fn with_current<T>(look: impl FnOnce(&TracedCall) -> T) -> Option<T> {
    CURRENT.try_with(look).ok()
}

/// Goes on with this task's call in another task.
pub(crate) fn propagate<F: Future>(future: F) -> impl Future<Output = F::Output> {
    let (call, span) = (with_current(TracedCall::clone), recorded_span().unwrap_or_else(Span::none));
    let future = future.instrument(span);
    async move {
        match call {
            Some(call) => scope(call, future).await,
            None => future.await,
        }
    }
}

/// The call's request is about another one, which has a name and a trace too: what the call itself was not told, it
/// takes from there.
pub(crate) fn adopt_ids(request_id: Option<RequestId>, parent: impl FnOnce() -> Option<RemoteTraceContext>) {
    with_current(|call| {
        if let Some(id) = request_id {
            call.request_id.replace(id);
        }
        if call.remote_context.borrow().is_none() {
            let parent = parent();
            call.trace_id.set(parent.as_ref().map(|parent| parent.trace_id));
            call.remote_context.replace(parent);
        }
    });
}

/// Which calls are recorded.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct SamplingPolicy {
    /// Of those whose caller says nothing, so many in 2^64; nothing = none is, whatever anybody says.
    threshold: Option<u64>,
}

impl SamplingPolicy {
    /// Calls that their caller records, and this share of the others, 0 to 1.
    #[must_use]
    pub fn with_ratio(ratio: f64) -> SamplingPolicy {
        SamplingPolicy { threshold: Some(sampling_threshold(ratio)) }
    }

    fn sample(self, draw: impl FnOnce() -> RandomId) -> Option<bool> {
        self.threshold.map(|share| share > 0 && draw().is_below(share))
    }
}

fn create_call_span(call: &TracedCall, method: &'static str) -> Span {
    // A request over HTTP/1.1 is none of gRPC's.
    let (service, name) = method.split_once('/').unzip();
    let span = tracing::info_span!(
        target: SPAN_TARGET,
        parent: None,
        CALL_SPAN_NAME,
        otel.name = method,
        otel.kind = "server",
        otel.status_code = Empty,
        rpc.system = service.map(|_| "grpc"),
        rpc.service = service,
        rpc.method = name,
        rpc.grpc.status_code = Empty,
        keyward.request_id = %call.request_id.borrow(),
        keyward.caller = Empty,
        keyward.reason = Empty,
        keyward.key_id = Empty,
        keyward.account = Empty,
        keyward.revision = Empty,
        keyward.checks = Empty,
        keyward.denied = Empty,
    );
    if let Some(parent) = call.remote_context.borrow().as_ref() {
        // It fails only where spans go nowhere.
        let _ =
            span.set_parent(opentelemetry::Context::new().with_remote_span_context(parent.to_span_context()));
    }
    let context = span.context();
    let context = context.span().span_context().clone();
    if context.is_valid() {
        call.trace_id.set(Some(TraceId::from(context.trace_id())));
        call.recorded.set(true);
    }
    span
}

/// Ends a call's span with the code that its caller hears. The server's own failures are errors, the caller's not.
pub fn finish_span(span: &Span, code: tonic::Code) {
    use tonic::Code::{DataLoss, DeadlineExceeded, Internal, Unavailable, Unimplemented, Unknown};
    span.record("rpc.grpc.status_code", i32::from(code));
    let ours = [Unknown, DeadlineExceeded, Unimplemented, Internal, Unavailable, DataLoss];
    if ours.contains(&code) {
        span.record("otel.status_code", "ERROR");
    }
}

/// The span of this task's call, if it is recorded: for what is known only later.
#[must_use]
pub(crate) fn recorded_span() -> Option<Span> {
    with_current(|call| call.recorded.get())?.then(Span::current)
}

/// Runs `work` in a span of its own, if the call is recorded.
pub(crate) async fn in_phase_span<F: Future>(name: CallPhase, work: F) -> F::Output {
    let span = match recorded_span() {
        None => Span::none(),
        Some(_) => match name {
            CallPhase::Commit => tracing::info_span!(target: SPAN_TARGET, "store.commit"),
            CallPhase::Propagation => tracing::info_span!(target: SPAN_TARGET, "propagation.wait"),
        },
    };
    work.instrument(span).await
}

/// What of a call has a span of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CallPhase {
    /// Until a change is recorded: the wait for its turn and the transaction that it goes with.
    Commit,
    /// Until a change is in force everywhere.
    Propagation,
}

static LOST_SPANS: AtomicU64 = AtomicU64::new(0);

/// Notes that spans were recorded and did not arrive. The exporter is the process's, as this count is.
pub(crate) fn add_lost_spans(spans: u64) {
    LOST_SPANS.fetch_add(spans, Ordering::Relaxed);
}

/// How many spans were recorded and did not arrive.
#[must_use]
pub(crate) fn lost_spans() -> u64 {
    LOST_SPANS.load(Ordering::Relaxed)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAMPLED: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    fn call(headers: &[(&'static str, &str)]) -> TracedCall {
        let headers = headers.iter().map(|(name, value)| {
            (http::HeaderName::from_static(name), http::HeaderValue::from_str(value).unwrap())
        });
        CallTracer::new(7, SamplingPolicy::default()).new_call(
            Some(&headers.collect()),
            None,
            Timestamp::from_micros(0),
        )
    }

    #[test]
    fn a_call_has_the_callers_trace_and_id_or_an_id_of_its_own() {
        let told = call(&[("traceparent", SAMPLED), ("x-request-id", "r-1")]);
        assert_eq!(told.request_id().to_string(), "r-1");
        assert_eq!(told.trace_id().unwrap().to_string(), "0af7651916cd43dd8448eb211c80319c");
        let (one, other) = (call(&[]), call(&[("x-request-id", "no id")]));
        assert_eq!((one.trace_id(), one.request_id().to_string().len()), (None, 36));
        assert_eq!(other.request_id().to_string().len(), 36);
    }

    #[tokio::test]
    async fn what_the_call_was_told_is_not_overwritten() {
        let other = "00-11111111111111111111111111111111-b7ad6b7169203331-01";
        let named = |text: &str| RemoteTraceContext::parse(text.as_bytes(), None);
        for (headers, trace) in [(&[("traceparent", SAMPLED)][..], "0af7"), (&[], "1111")] {
            scope(call(headers), async {
                adopt_ids(None, || named(other));
                assert!(
                    with_current(|call| call.trace_id().unwrap().to_string()).unwrap().starts_with(trace)
                );
            })
            .await;
        }
    }

    #[tokio::test]
    async fn nothing_is_recorded_where_spans_go_nowhere() {
        scope(call(&[("traceparent", SAMPLED)]), async {
            assert!(CallTracer::new(7, SamplingPolicy::default()).start_span("a.B/C").is_none());
            assert!(recorded_span().is_none());
        })
        .await;
        assert!(recorded_span().is_none());
    }
}
