//! Counts started and ended calls by method and code, and measures their durations. The names are
//! those that gRPC dashboards expect.
//!
//! The labels are a closed set: an unknown path is counted as `unknown`.
//!
//! A call ends when its last byte is handed to the connection. If the client goes away earlier, the call is CANCELLED.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use bytes::Bytes;
use http::{HeaderMap, Response};
use http_body::{Body as _, Frame, SizeHint};
use tokio::time::Instant;
use tonic::{Code, Status, body::Body};

use crate::metrics_core::{HistogramSnapshot, ShardedCounters, ShardedHistograms};

use super::rpc::{self, RpcSpec, StreamingKind};

/// Methods outside the RPC table.
const PUBLIC_METHODS: [(&str, StreamingKind); 4] = [
    ("grpc.health.v1.Health/Check", StreamingKind::Unary),
    ("grpc.health.v1.Health/Watch", StreamingKind::ServerStream),
    ("grpc.reflection.v1.ServerReflection/ServerReflectionInfo", StreamingKind::BidiStream),
    ("grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", StreamingKind::BidiStream),
];
const UNKNOWN_ROW: usize = rpc::RPC_TABLE.len() + PUBLIC_METHODS.len();
const ROW_COUNT: usize = UNKNOWN_ROW + 1;
/// gRPC has the codes 0 to 16.
const CODE_COUNT: usize = 17;
/// Per row: started calls, then ended calls by code.
const COUNTERS_PER_ROW: usize = 1 + CODE_COUNT;

/// Histogram bounds in nanoseconds: from 50 µs, where most Checks are, to 10 s.
const DURATION_BOUNDS_NANOS: [u64; 17] = [
    50_000,
    100_000,
    250_000,
    500_000,
    1_000_000,
    2_500_000,
    5_000_000,
    10_000_000,
    25_000_000,
    50_000_000,
    100_000_000,
    250_000_000,
    500_000_000,
    1_000_000_000,
    2_500_000_000,
    5_000_000_000,
    10_000_000_000,
];

/// Counters and durations of all calls since the process started.
#[derive(Debug)]
pub struct RpcMetrics {
    counters: ShardedCounters,
    durations: ShardedHistograms<17>,
}

impl Default for RpcMetrics {
    fn default() -> Self {
        RpcMetrics {
            counters: ShardedCounters::new(ROW_COUNT * COUNTERS_PER_ROW),
            durations: ShardedHistograms::new(ROW_COUNT, &DURATION_BOUNDS_NANOS),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct MethodMetrics {
    /// `unary`, `server_stream` or `bidi_stream`.
    pub(crate) kind: &'static str,
    /// The service's full name, or `unknown`.
    pub(crate) service: &'static str,
    /// The method's name, or `unknown`.
    pub(crate) method: &'static str,
    pub(crate) started: u64,
    /// Number of ended calls by code, spelled as in other servers' metrics.
    pub(crate) handled: Vec<(&'static str, u64)>,
    pub(crate) durations: HistogramSnapshot,
}

/// The row of the counters for this path.
fn find_row(path: &str) -> usize {
    let Some(method) = path.strip_prefix('/') else { return UNKNOWN_ROW };
    let in_table = rpc::RPC_TABLE.iter().position(|rpc| rpc.method == method);
    let public = || {
        PUBLIC_METHODS.iter().position(|(public, _)| *public == method).map(|at| rpc::RPC_TABLE.len() + at)
    };
    in_table.or_else(public).unwrap_or(UNKNOWN_ROW)
}

/// Kind, service and method of a row.
fn row_labels(row: usize) -> (&'static str, &'static str, &'static str) {
    let in_table = rpc::RPC_TABLE.get(row).map(|rpc| (rpc.method, rpc.streaming));
    let public = || PUBLIC_METHODS.get(row - rpc::RPC_TABLE.len()).copied();
    let Some((method, kind)) = in_table.or_else(public) else { return ("unary", "unknown", "unknown") };
    let (service, method) = method.split_once('/').unwrap_or((method, method));
    (kind.as_str(), service, method)
}

impl RpcMetrics {
    /// Counts a started call and starts its timer.
    #[must_use]
    pub fn start_call(self: &Arc<Self>, path: &str) -> CallTimer<'_> {
        let row = find_row(path);
        self.counters.add(row * COUNTERS_PER_ROW, 1);
        CallTimer { metrics: self, row, started_at: Instant::now(), is_recorded: false }
    }

    fn record_end(&self, row: usize, started_at: Instant, code: Code) {
        self.counters.add(row * COUNTERS_PER_ROW + 1 + code as usize, 1);
        self.durations.record(row, started_at.elapsed());
    }

    /// Iterates over the methods that were called.
    pub(crate) fn iter(&self) -> impl Iterator<Item = MethodMetrics> {
        (0..ROW_COUNT).filter_map(|row| {
            let count = |at: usize| self.counters.get(row * COUNTERS_PER_ROW + at);
            let (kind, service, method) = row_labels(row);
            let started = count(0);
            let codes = CODE_NAMES.into_iter().enumerate().map(|(code, name)| (name, count(1 + code)));
            // OK is always present, so that an error rate has a denominator.
            let handled = codes.filter(|(name, count)| *name == "OK" || *count > 0).collect();
            let durations = || self.durations.snapshot(row);
            (started > 0).then(|| MethodMetrics {
                kind,
                service,
                method,
                started,
                handled,
                durations: durations(),
            })
        })
    }
}

/// Names of the codes by number, spelled as in other servers' metrics.
const CODE_NAMES: [&str; CODE_COUNT] = [
    "OK",
    "Canceled",
    "Unknown",
    "InvalidArgument",
    "DeadlineExceeded",
    "NotFound",
    "AlreadyExists",
    "PermissionDenied",
    "ResourceExhausted",
    "FailedPrecondition",
    "Aborted",
    "OutOfRange",
    "Unimplemented",
    "Internal",
    "Unavailable",
    "DataLoss",
    "Unauthenticated",
];

pub(super) fn code_name(code: Code) -> &'static str {
    CODE_NAMES.get(code as usize).copied().unwrap_or("Unknown")
}

/// A started call. It counts as cancelled if it is dropped before it is finished.
#[derive(Debug)]
pub struct CallTimer<'a> {
    metrics: &'a Arc<RpcMetrics>,
    row: usize,
    started_at: Instant,
    is_recorded: bool,
}

impl CallTimer<'_> {
    /// The RPC that is called, if it is in the table.
    pub(super) fn rpc_spec(&self) -> Option<&'static RpcSpec> {
        rpc::RPC_TABLE.get(self.row)
    }

    /// Whether the call is a Check, the most frequent one.
    pub(super) fn is_check(&self) -> bool {
        self.row == 0
    }

    /// Counts a response that is not a stream.
    pub(super) fn finish_unary<B>(mut self, response: Response<B>) -> Response<B> {
        self.is_recorded = true;
        self.metrics.record_end(
            self.row,
            self.started_at,
            code_from_headers(response.headers()).unwrap_or(Code::Ok),
        );
        response
    }

    pub(super) fn started_at(&self) -> Instant {
        self.started_at
    }

    pub(super) fn elapsed(&self) -> std::time::Duration {
        self.started_at.elapsed()
    }

    /// Counts the response: now if it is complete, else when its stream ends.
    #[must_use]
    pub fn finish(mut self, response: Response<Body>) -> Response<Body> {
        // A response without messages has its code in the headers.
        let streams = row_labels(self.row).0 != "unary" && !response.body().is_end_stream();
        match code_from_headers(response.headers()) {
            None if streams => {
                self.is_recorded = true;
                let (calls, row, at) = (self.metrics.clone(), self.row, self.started_at);
                response.map(|body| {
                    Body::new(TimedBody {
                        body,
                        metrics: calls,
                        row,
                        started_at: at,
                        pending_code: Some(Code::Cancelled),
                    })
                })
            }
            _ => self.finish_unary(response),
        }
    }
}

impl Drop for CallTimer<'_> {
    fn drop(&mut self) {
        if !self.is_recorded {
            self.metrics.record_end(self.row, self.started_at, Code::Cancelled);
        }
    }
}

/// The status code in headers or trailers. `None` in the headers of a response whose status comes in the trailers.
pub(super) fn code_from_headers(headers: &HeaderMap) -> Option<Code> {
    Status::from_header_map(headers).map(|status| status.code())
}

/// A response stream that is counted when it ends.
struct TimedBody {
    body: Body,
    metrics: Arc<RpcMetrics>,
    row: usize,
    started_at: Instant,
    /// The code to count if no trailer has one; `None` once it is counted.
    pending_code: Option<Code>,
}

impl http_body::Body for TimedBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let polled = Pin::new(&mut self.body).poll_frame(context);
        if let Poll::Ready(Some(Ok(frame))) = &polled
            && let Some(code) = frame.trailers_ref().and_then(code_from_headers)
        {
            self.pending_code = None;
            self.metrics.record_end(self.row, self.started_at, code);
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for TimedBody {
    fn drop(&mut self) {
        if let Some(code) = self.pending_code.take() {
            self.metrics.record_end(self.row, self.started_at, code);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A method, its started calls, and its ended calls by code.
    type MethodCount = (&'static str, u64, Vec<(&'static str, u64)>);

    fn count(calls: &RpcMetrics) -> Vec<MethodCount> {
        calls.iter().map(|count| (count.method, count.started, count.handled)).collect()
    }

    #[test]
    fn a_call_ends_with_its_code_or_is_cancelled() {
        let calls = Arc::new(RpcMetrics::default());
        let path = "/keyward.v1.AuthzService/Check";
        let _ = calls.start_call(path).finish(Response::new(Body::empty()));
        let refused = Response::builder().header("grpc-status", "16").body(Body::empty()).unwrap();
        let _ = calls.start_call(path).finish(refused);
        drop(calls.start_call(path));
        let handled = vec![("OK", 1), ("Canceled", 1), ("Unauthenticated", 1)];
        assert_eq!(count(&calls), [("Check", 3, handled)]);
    }

    #[test]
    fn a_stream_ends_when_its_body_does() {
        let calls = Arc::new(RpcMetrics::default());
        let path = "/keyward.v1.KeyService/WatchPropagation";
        let messages = Body::new(http_body_util::Full::new(Bytes::from_static(b"x")));
        let answered = calls.start_call(path).finish(Response::new(messages));
        assert_eq!(count(&calls), [("WatchPropagation", 1, vec![("OK", 0)])]);
        drop(answered);
        assert_eq!(count(&calls), [("WatchPropagation", 1, vec![("OK", 0), ("Canceled", 1)])]);
    }

    #[test]
    fn a_path_that_is_no_method_is_unknown() {
        let calls = Arc::new(RpcMetrics::default());
        for path in ["/x\"} 1/Check", "/keyward.v1.AuthzService/Chec", "", "/"] {
            let _ = calls.start_call(path).finish(Response::new(Body::empty()));
        }
        assert_eq!(count(&calls), [("unknown", 4, vec![("OK", 4)])]);
    }

    #[test]
    fn codes_are_spelt_by_their_numbers() {
        for (number, name) in CODE_NAMES.iter().enumerate() {
            let code = Code::from_i32(i32::try_from(number).unwrap());
            let usual = if code == Code::Ok { "OK".to_owned() } else { format!("{code:?}") };
            assert_eq!(usual.replace("Cancelled", "Canceled"), **name);
        }
    }
}
