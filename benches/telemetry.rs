//! What telemetry adds to a call: its name, its counts, the question whether it is recorded; and what it adds to the
//! few that are recorded or written down. `cargo bench --bench telemetry`; compare with `--bench check`.

#![allow(missing_docs, clippy::unwrap_used, reason = "a benchmark that cannot be set up has nothing to say")]

use std::{hint::black_box, sync::Arc};

use criterion::{Criterion, criterion_group, criterion_main};
use futures_util::FutureExt as _;
use http::{HeaderMap, HeaderValue, Response};
use keyward::{
    clock::{Clock as _, SystemClock, SystemEntropy},
    config::{server::LogFormat, telemetry::OtlpSettings},
    decision_log::{DecisionInput, DecisionLog, DecisionLogSettings, DecisionLogTarget, DecisionSource},
    domain::{name::EnvironmentName, policy_decision::Reason, scope::Scope},
    grpc::rpc_metrics::RpcMetrics,
    telemetry,
    trace::{self, CallTracer, SamplingPolicy},
};
use tonic::body::Body;
use tracing::Instrument as _;

const PATH: &str = "/keyward.v1.AuthzService/Check";
const METHOD: &str = "keyward.v1.AuthzService/Check";

/// What a gRPC client sends.
fn headers(recorded: Option<bool>) -> HeaderMap {
    let mut headers = HeaderMap::new();
    for (name, value) in [
        ("te", "trailers"),
        ("content-type", "application/grpc"),
        ("user-agent", "tonic/0.14"),
        ("authorization", "Bearer kw_live_0000000000000000000000000000000000000000000000000"),
        ("grpc-timeout", "1000m"),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
    if let Some(recorded) = recorded {
        let parent = format!("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-0{}", u8::from(recorded));
        headers.insert("traceparent", HeaderValue::from_str(&parent).unwrap());
    }
    headers
}

/// All that the gate does for a call besides answering it.
fn call(calls: &Arc<RpcMetrics>, tracing: &CallTracer, headers: &HeaderMap) -> Response<Body> {
    let begun = calls.start_call(PATH);
    let call = tracing.new_call(Some(headers), None, SystemClock.now());
    let answer = async {
        let answer = async { Response::new(Body::empty()) };
        match tracing.start_span(METHOD) {
            Some(span) => {
                let response = answer.instrument(span.clone()).await;
                trace::finish_span(&span, tonic::Code::Ok);
                response
            }
            None => answer.await,
        }
    };
    let response = trace::scope(call, answer).now_or_never().unwrap();
    begun.finish(response)
}

fn calls(criterion: &mut Criterion) {
    let calls = Arc::new(RpcMetrics::default());
    let (off, on) =
        (CallTracer::new(1, SamplingPolicy::default()), CallTracer::new(1, SamplingPolicy::with_ratio(0.0)));
    let mut bench = |name: &str, tracing: &CallTracer, headers: HeaderMap| {
        criterion.bench_function(name, |b| b.iter(|| call(&calls, tracing, black_box(&headers))));
    };
    bench("a call, no collector", &off, headers(None));
    bench("a call that is not recorded", &on, headers(None));
    bench("a call that its caller does not record", &on, headers(Some(false)));

    let runtime = tokio::runtime::Runtime::new().unwrap();
    let _entered = runtime.enter();
    let otlp = OtlpSettings {
        endpoint: "http://127.0.0.1:9".to_owned(),
        headers: Vec::new(),
        ca_pem: None,
        service_name: "bench".to_owned(),
    };
    let exporter = telemetry::init("off", LogFormat::Text, Some(&otlp)).unwrap();
    bench("a call that is recorded", &on, headers(Some(true)));
    bench("a call that is not recorded, beside others that are", &on, headers(None));
    drop(exporter);
}

fn decisions(criterion: &mut Criterion) {
    let folder = tempfile::tempdir().unwrap();
    let settings = DecisionLogSettings {
        denial_ratio: 1.0,
        denials_per_second: u32::MAX,
        allowed_ratio: 0.0,
        log_restricting_changes: true,
        target: DecisionLogTarget::File(folder.path().join("decisions")),
    };
    let (log, _keeper) = DecisionLog::open(&settings, Arc::new(SystemClock), &SystemEntropy).unwrap();
    let environment = EnvironmentName::parse("production").unwrap();
    let needed = [Scope::parse_required("monitors:read").unwrap()];
    let note = |reason: Reason| {
        log.record_check(reason, || DecisionInput {
            source: DecisionSource::Check,
            allowed: false,
            reason: reason.as_str(),
            check_outcome: None,
            environment: Some(&environment),
            required_scopes: &needed,
            customer: None,
            client_ip: None,
            proxy_request_id: None,
            is_shadow: false,
        })
    };
    criterion.bench_function("a decision that is not written down", |b| b.iter(|| note(Reason::Ok)));
    criterion.bench_function("a decision that is written down", |b| b.iter(|| note(Reason::Unknown)));
}

criterion_group!(benches, calls, decisions);
criterion_main!(benches);
