//! The call that is being answered, as log lines, decisions and traces name it: its request id, the trace that it is
//! part of, and whether that is recorded.
//!
//! What a call is called goes with its task and costs a few nanoseconds. A span is made only where it is recorded:
//! that is decided first, by the caller's word or else by chance. Who asks for the span of a call that is not
//! recorded gets nothing, and makes nothing. Where spans go is `telemetry`'s business.

mod ids;
mod parent;

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

pub use ids::{Draw, Ids, RequestId, threshold};
pub use parent::{Parent, TraceId};

/// The target of spans that are recorded. No log line has it.
pub const TARGET: &str = "keyward::trace";
/// The name under which a call's own span is made; others are recorded only within one.
pub const CALL: &str = "call";

tokio::task_local! {
    static CURRENT: Call;
}

/// A call.
#[derive(Clone, Debug)]
pub struct Call {
    request_id: RefCell<RequestId>,
    parent: RefCell<Option<Parent>>,
    trace: Cell<Option<TraceId>>,
    /// Chance has it recorded, if nobody says otherwise; None = none is, whatever anybody says.
    drawn: Option<bool>,
    recorded: Cell<bool>,
    peer: Option<IpAddr>,
    caller: RefCell<Option<Caller>>,
}

/// Whose call it is, once that is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caller {
    /// The id of its key, or what else it showed.
    pub key: String,
    /// The account that it acts in.
    pub account: String,
}

impl Call {
    fn new(names: Option<&HeaderMap>, peer: Option<IpAddr>, made: RequestId, drawn: Option<bool>) -> Call {
        let parent = names.and_then(Parent::of);
        Call {
            request_id: RefCell::new(names.and_then(RequestId::of).unwrap_or(made)),
            trace: Cell::new(parent.as_ref().map(|parent| parent.trace)),
            parent: RefCell::new(parent),
            drawn,
            recorded: Cell::new(false),
            peer,
            caller: RefCell::default(),
        }
    }

    /// Its request id.
    #[must_use]
    pub fn request_id(&self) -> RequestId {
        self.request_id.borrow().clone()
    }

    /// The trace that it is part of, if it is known to be part of one.
    #[must_use]
    pub fn trace(&self) -> Option<TraceId> {
        self.trace.get()
    }

    /// Who is connected.
    #[must_use]
    pub fn peer(&self) -> Option<IpAddr> {
        self.peer
    }

    /// Whose call it is, if that is known.
    #[must_use]
    pub fn caller(&self) -> Option<Caller> {
        self.caller.borrow().clone()
    }

    /// Notes whose call it is.
    pub fn set_caller(&self, caller: Caller) {
        if self.recorded.get() {
            Span::current().record("keyward.caller", &caller.key);
        }
        self.caller.replace(Some(caller));
    }

    /// Whether it is to be recorded, by what is known of it so far: by its caller's word or else by chance.
    #[must_use]
    pub fn is_chosen(&self) -> bool {
        let told = || self.parent.borrow().as_ref().map(|parent| parent.recorded);
        self.drawn.is_some_and(|drawn| told().unwrap_or(drawn))
    }

    /// Whether it is recorded.
    #[must_use]
    pub fn is_recorded(&self) -> bool {
        self.recorded.get()
    }
}

/// How calls are named, and which are recorded.
#[derive(Clone, Copy, Debug)]
pub struct Tracing {
    ids: Ids,
    sampling: Sampling,
}

impl Tracing {
    /// Processes with the same seed would give the same names.
    #[must_use]
    pub const fn new(seed: u64, sampling: Sampling) -> Tracing {
        Tracing { ids: Ids::seeded(seed), sampling }
    }

    /// A call with these headers; None = they are known to name neither it nor its trace. A request id that is none is
    /// as good as missing: it is made then.
    #[must_use]
    pub fn call(&self, headers: Option<&HeaderMap>, peer: Option<IpAddr>, now: Timestamp) -> Call {
        let drawn = self.sampling.draws(|| self.ids.next().other());
        Call::new(headers, peer, self.ids.next().request_id(now.as_millis()), drawn)
    }

    /// The span of this task's call, if it is recorded. To be made once, before any other.
    #[must_use]
    pub fn span(&self, method: &'static str) -> Option<Span> {
        current(|call| call.is_chosen().then(|| call_span(call, method)))?
    }
}

/// Answers a call: whatever `answer` logs, decides and records is this call's.
pub async fn within<F: Future>(call: Call, answer: F) -> F::Output {
    CURRENT.scope(call, answer).await
}

/// The same of what does not wait.
pub fn within_now<T>(call: Call, answer: impl FnOnce() -> T) -> T {
    CURRENT.sync_scope(call, answer)
}

/// The call that this task answers.
pub fn current<T>(look: impl FnOnce(&Call) -> T) -> Option<T> {
    CURRENT.try_with(look).ok()
}

/// Goes on with this task's call in another task.
pub fn carried<F: Future>(future: F) -> impl Future<Output = F::Output> {
    let (call, span) = (current(Call::clone), recording().unwrap_or_else(Span::none));
    let future = future.instrument(span);
    async move {
        match call {
            Some(call) => within(call, future).await,
            None => future.await,
        }
    }
}

/// The call's request is about another one, which has a name and a trace too: what the call itself was not told, it
/// takes from there.
pub fn adopt(request_id: Option<RequestId>, parent: impl FnOnce() -> Option<Parent>) {
    current(|call| {
        if let Some(id) = request_id {
            call.request_id.replace(id);
        }
        if call.parent.borrow().is_none() {
            let parent = parent();
            call.trace.set(parent.as_ref().map(|parent| parent.trace));
            call.parent.replace(parent);
        }
    });
}

/// Which calls are recorded.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Sampling {
    /// Of those whose caller says nothing, so many in 2^64; nothing = none is, whatever anybody says.
    share: Option<u64>,
}

impl Sampling {
    /// Calls that their caller records, and this share of the others, 0 to 1.
    #[must_use]
    pub fn share(ratio: f64) -> Sampling {
        Sampling { share: Some(threshold(ratio)) }
    }

    fn draws(self, draw: impl FnOnce() -> Draw) -> Option<bool> {
        self.share.map(|share| share > 0 && draw().is_below(share))
    }
}

fn call_span(call: &Call, method: &'static str) -> Span {
    // A request over HTTP/1.1 is none of gRPC's.
    let (service, name) = method.split_once('/').unzip();
    let span = tracing::info_span!(
        target: TARGET,
        parent: None,
        CALL,
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
    if let Some(parent) = call.parent.borrow().as_ref() {
        // It fails only where spans go nowhere.
        let _ = span.set_parent(opentelemetry::Context::new().with_remote_span_context(parent.context()));
    }
    let context = span.context();
    let context = context.span().span_context().clone();
    if context.is_valid() {
        call.trace.set(Some(TraceId::from(context.trace_id())));
        call.recorded.set(true);
    }
    span
}

/// Ends a call's span with the code that its caller hears. The server's own failures are errors, the caller's not.
pub fn end(span: &Span, code: tonic::Code) {
    use tonic::Code::{DataLoss, DeadlineExceeded, Internal, Unavailable, Unimplemented, Unknown};
    span.record("rpc.grpc.status_code", i32::from(code));
    let ours = [Unknown, DeadlineExceeded, Unimplemented, Internal, Unavailable, DataLoss];
    if ours.contains(&code) {
        span.record("otel.status_code", "ERROR");
    }
}

/// The span of this task's call, if it is recorded: for what is known only later.
#[must_use]
pub fn recording() -> Option<Span> {
    current(|call| call.recorded.get())?.then(Span::current)
}

/// Runs `work` in a span of its own, if the call is recorded.
pub async fn step<F: Future>(name: Step, work: F) -> F::Output {
    let span = match recording() {
        None => Span::none(),
        Some(_) => match name {
            Step::Commit => tracing::info_span!(target: TARGET, "store.commit"),
            Step::Propagation => tracing::info_span!(target: TARGET, "propagation.wait"),
        },
    };
    work.instrument(span).await
}

/// What of a call has a span of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Until a change is recorded: the wait for its turn and the transaction that it goes with.
    Commit,
    /// Until a change is in force everywhere.
    Propagation,
}

static LOST: AtomicU64 = AtomicU64::new(0);

/// Notes that spans were recorded and did not arrive. The exporter is the process's, as this count is.
pub fn lose(spans: u64) {
    LOST.fetch_add(spans, Ordering::Relaxed);
}

/// How many spans were recorded and did not arrive.
#[must_use]
pub fn lost() -> u64 {
    LOST.load(Ordering::Relaxed)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAMPLED: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    fn call(headers: &[(&'static str, &str)]) -> Call {
        let headers = headers.iter().map(|(name, value)| {
            (http::HeaderName::from_static(name), http::HeaderValue::from_str(value).unwrap())
        });
        Tracing::new(7, Sampling::default()).call(Some(&headers.collect()), None, Timestamp::from_micros(0))
    }

    #[test]
    fn a_call_has_the_callers_trace_and_id_or_an_id_of_its_own() {
        let told = call(&[("traceparent", SAMPLED), ("x-request-id", "r-1")]);
        assert_eq!(told.request_id().to_string(), "r-1");
        assert_eq!(told.trace().unwrap().to_string(), "0af7651916cd43dd8448eb211c80319c");
        let (one, other) = (call(&[]), call(&[("x-request-id", "no id")]));
        assert_eq!((one.trace(), one.request_id().to_string().len()), (None, 36));
        assert_eq!(other.request_id().to_string().len(), 36);
    }

    #[tokio::test]
    async fn what_the_call_was_told_is_not_overwritten() {
        let other = "00-11111111111111111111111111111111-b7ad6b7169203331-01";
        let named = |text: &str| Parent::read(text.as_bytes(), None);
        for (headers, trace) in [(&[("traceparent", SAMPLED)][..], "0af7"), (&[], "1111")] {
            within(call(headers), async {
                adopt(None, || named(other));
                assert!(current(|call| call.trace().unwrap().to_string()).unwrap().starts_with(trace));
            })
            .await;
        }
    }

    #[tokio::test]
    async fn nothing_is_recorded_where_spans_go_nowhere() {
        within(call(&[("traceparent", SAMPLED)]), async {
            assert!(Tracing::new(7, Sampling::default()).span("a.B/C").is_none());
            assert!(recording().is_none());
        })
        .await;
        assert!(recording().is_none());
    }
}
