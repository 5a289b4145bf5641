//! The current call, as logs, decisions and spans identify it: its request id, its trace, and whether it is recorded.
//!
//! The ids travel with the task and cost a few nanoseconds. Whether a call is recorded is decided first, by the
//! caller's sampling flag or else at random; only a recorded call gets spans. Where spans are sent is not known here:
//! see `telemetry`.

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

/// The target of recorded spans. No log line has it.
pub(crate) const SPAN_TARGET: &str = "keyward::trace";
/// The name of a call's root span; other spans are recorded only within one.
pub(crate) const CALL_SPAN_NAME: &str = "call";

tokio::task_local! {
    static CURRENT: TracedCall;
}

/// A call with its ids and its caller.
#[derive(Clone, Debug)]
pub struct TracedCall {
    request_id: RefCell<RequestId>,
    remote_context: RefCell<Option<RemoteTraceContext>>,
    trace_id: Cell<Option<TraceId>>,
    /// The random sampling decision, which the caller's flag overrides; `None` = nothing is recorded.
    sampled: Option<bool>,
    recorded: Cell<bool>,
    peer: Option<IpAddr>,
    caller: RefCell<Option<CallerLabels>>,
}

/// The caller of a call, as logs and spans name it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct CallerLabels {
    /// The key's id, or the name of another credential.
    pub(crate) key_id: String,
    /// The account that the caller acts in.
    pub(crate) account: String,
}

impl TracedCall {
    fn new(
        headers: Option<&HeaderMap>,
        peer: Option<IpAddr>,
        generated: RequestId,
        sampled: Option<bool>,
    ) -> TracedCall {
        let parent = headers.and_then(RemoteTraceContext::from_headers);
        TracedCall {
            request_id: RefCell::new(headers.and_then(RequestId::from_headers).unwrap_or(generated)),
            trace_id: Cell::new(parent.as_ref().map(|parent| parent.trace_id)),
            remote_context: RefCell::new(parent),
            sampled,
            recorded: Cell::new(false),
            peer,
            caller: RefCell::default(),
        }
    }

    #[must_use]
    pub(crate) fn request_id(&self) -> RequestId {
        self.request_id.borrow().clone()
    }

    /// The trace that the call belongs to, if known.
    #[must_use]
    pub(crate) fn trace_id(&self) -> Option<TraceId> {
        self.trace_id.get()
    }

    /// Address of the connected peer.
    #[must_use]
    pub(crate) fn peer(&self) -> Option<IpAddr> {
        self.peer
    }

    /// The caller, if authenticated.
    #[must_use]
    pub(crate) fn caller(&self) -> Option<CallerLabels> {
        self.caller.borrow().clone()
    }

    /// Sets the caller, in the call's span too.
    pub(crate) fn set_caller(&self, caller: CallerLabels) {
        if self.recorded.get() {
            Span::current().record("keyward.caller", &caller.key_id);
        }
        self.caller.replace(Some(caller));
    }

    /// Whether the call should be recorded: by its caller's flag, or else at random.
    #[must_use]
    pub(crate) fn should_record(&self) -> bool {
        let caller_flag = || self.remote_context.borrow().as_ref().map(|parent| parent.is_sampled);
        self.sampled.is_some_and(|sampled| caller_flag().unwrap_or(sampled))
    }

    #[must_use]
    pub(crate) fn is_recorded(&self) -> bool {
        self.recorded.get()
    }
}

/// Creates calls: assigns request ids and decides which calls are recorded.
#[derive(Clone, Copy, Debug)]
pub struct CallTracer {
    random_ids: RandomIds,
    sampling: SamplingPolicy,
}

impl CallTracer {
    /// Processes must have different seeds, or they generate the same ids.
    #[must_use]
    pub const fn new(seed: u64, sampling: SamplingPolicy) -> CallTracer {
        CallTracer { random_ids: RandomIds::with_seed(seed), sampling }
    }

    /// Creates a call. `headers` are `None` if they are known to have no ids. An invalid request id is replaced by a
    /// generated one.
    #[must_use]
    pub fn new_call(&self, headers: Option<&HeaderMap>, peer: Option<IpAddr>, now: Timestamp) -> TracedCall {
        let sampled = self.sampling.sample(|| self.random_ids.next_id().derive_independent());
        TracedCall::new(headers, peer, self.random_ids.next_id().request_id(now.as_millis()), sampled)
    }

    /// Creates the root span of this task's call, if the call should be recorded. Must be called once, before other
    /// spans.
    #[must_use]
    pub fn start_span(&self, method: &'static str) -> Option<Span> {
        with_current(|call| call.should_record().then(|| create_call_span(call, method)))?
    }
}

/// Runs a future as this call: its log lines, decisions and spans belong to the call.
pub async fn scope<F: Future>(call: TracedCall, answer: F) -> F::Output {
    CURRENT.scope(call, answer).await
}

/// Runs a function as this call, as [`scope`] does a future.
pub(crate) fn sync_scope<T>(call: TracedCall, answer: impl FnOnce() -> T) -> T {
    CURRENT.sync_scope(call, answer)
}

/// Passes this task's call to a function; `None` outside of a call.
pub(crate) fn with_current<T>(look: impl FnOnce(&TracedCall) -> T) -> Option<T> {
    CURRENT.try_with(look).ok()
}

/// Lets a future of another task run as this task's call.
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

/// Adopts the request id and trace of the proxied request that this call is about. A trace that the call received
/// itself stays.
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

/// The policy that decides which calls are recorded.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct SamplingPolicy {
    /// The sampling threshold for calls without a caller's flag; `None` = nothing is recorded.
    threshold: Option<u64>,
}

impl SamplingPolicy {
    /// Records calls whose caller records them, and this ratio of the others, 0 to 1.
    #[must_use]
    pub fn with_ratio(ratio: f64) -> SamplingPolicy {
        SamplingPolicy { threshold: Some(sampling_threshold(ratio)) }
    }

    fn sample(self, draw: impl FnOnce() -> RandomId) -> Option<bool> {
        self.threshold.map(|share| share > 0 && draw().is_below(share))
    }
}

fn create_call_span(call: &TracedCall, method: &'static str) -> Span {
    // A request over HTTP/1.1 has no gRPC method.
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
        // It fails only if no exporter runs.
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

/// Records the status code of a call in its span. Only failures of the server count as errors.
pub fn finish_span(span: &Span, code: tonic::Code) {
    use tonic::Code::{DataLoss, DeadlineExceeded, Internal, Unavailable, Unimplemented, Unknown};
    span.record("rpc.grpc.status_code", i32::from(code));
    let ours = [Unknown, DeadlineExceeded, Unimplemented, Internal, Unavailable, DataLoss];
    if ours.contains(&code) {
        span.record("otel.status_code", "ERROR");
    }
}

/// The span of this task's call, if the call is recorded; for fields that are known late.
#[must_use]
pub(crate) fn recorded_span() -> Option<Span> {
    with_current(|call| call.recorded.get())?.then(Span::current)
}

/// Runs a future in a child span, if the call is recorded.
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

/// A phase of a call with its own span.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CallPhase {
    /// Waiting for the commit of a change, and the commit itself.
    Commit,
    /// Waiting until a change is in force on every replica.
    Propagation,
}

static LOST_SPANS: AtomicU64 = AtomicU64::new(0);

/// Counts recorded spans that were dropped. The exporter is global to the process, and so is this count.
pub(crate) fn add_lost_spans(spans: u64) {
    LOST_SPANS.fetch_add(spans, Ordering::Relaxed);
}

/// Number of recorded spans that were dropped.
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
        let received = call(&[("traceparent", SAMPLED), ("x-request-id", "r-1")]);
        assert_eq!(received.request_id().to_string(), "r-1");
        assert_eq!(received.trace_id().unwrap().to_string(), "0af7651916cd43dd8448eb211c80319c");
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
