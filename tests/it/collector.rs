//! A collector that takes spans as real ones do: OTLP over gRPC. It keeps what arrives, or never answers.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{Arc, Mutex},
};

use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    service::TowerToHyperService,
};
use opentelemetry_proto::tonic::{
    collector::trace::v1::{
        ExportTraceServiceRequest, ExportTraceServiceResponse,
        trace_service_server::{TraceService, TraceServiceServer},
    },
    common::v1::{KeyValue, any_value::Value},
    trace::v1::Span as Wire,
};
use tokio::net::TcpListener;
use tonic::{Request, Response, Status};

use crate::process::wait_for;

/// A span that arrived.
#[derive(Clone, Debug)]
pub(crate) struct ReceivedSpan {
    pub(crate) name: String,
    pub(crate) trace: String,
    pub(crate) id: String,
    pub(crate) parent: String,
    pub(crate) state: String,
    pub(crate) attributes: BTreeMap<String, String>,
    /// Of the program that sent it.
    pub(crate) resource: BTreeMap<String, String>,
    /// Everything of it, to look for what must not be there.
    pub(crate) printed: String,
}

#[derive(Clone, Default)]
struct FakeTraceService {
    spans: Arc<Mutex<Vec<ReceivedSpan>>>,
    headers: Arc<Mutex<Vec<http::HeaderMap>>>,
    hangs: bool,
}

/// A running collector; it ends with the test's runtime.
pub(crate) struct SpanCollector {
    pub(crate) address: SocketAddr,
    kept: FakeTraceService,
}

fn attributes_to_map(list: &[KeyValue]) -> BTreeMap<String, String> {
    let text = |value: &KeyValue| match value.value.as_ref().and_then(|value| value.value.as_ref()) {
        Some(Value::StringValue(text)) => text.clone(),
        Some(Value::IntValue(number)) => number.to_string(),
        other => format!("{other:?}"),
    };
    list.iter().map(|value| (value.key.clone(), text(value))).collect()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn to_received_span(span: &Wire, resource: &BTreeMap<String, String>) -> ReceivedSpan {
    ReceivedSpan {
        name: span.name.clone(),
        trace: hex(&span.trace_id),
        id: hex(&span.span_id),
        parent: hex(&span.parent_span_id),
        state: span.trace_state.clone(),
        attributes: attributes_to_map(&span.attributes),
        resource: resource.clone(),
        printed: format!("{span:?}"),
    }
}

#[tonic::async_trait]
impl TraceService for FakeTraceService {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        if self.hangs {
            std::future::pending::<()>().await;
        }
        self.headers.lock().unwrap().push(request.metadata().clone().into_headers());
        for of in request.into_inner().resource_spans {
            let resource =
                of.resource.map(|resource| attributes_to_map(&resource.attributes)).unwrap_or_default();
            let spans = of.scope_spans.iter().flat_map(|scope| &scope.spans);
            self.spans.lock().unwrap().extend(spans.map(|span| to_received_span(span, &resource)));
        }
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

impl SpanCollector {
    /// One that takes spans.
    pub(crate) async fn start() -> SpanCollector {
        SpanCollector::start_with(FakeTraceService::default()).await
    }

    /// One that takes connections and requests, and answers nothing.
    pub(crate) async fn start_hanging() -> SpanCollector {
        SpanCollector::start_with(FakeTraceService { hangs: true, ..FakeTraceService::default() }).await
    }

    async fn start_with(kept: FakeTraceService) -> SpanCollector {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let service = TowerToHyperService::new(TraceServiceServer::new(kept.clone()));
        tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let http2 = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
                tokio::spawn(http2.serve_connection(TokioIo::new(stream), service.clone()));
            }
        });
        SpanCollector { address, kept }
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Everything that has arrived.
    pub(crate) fn spans(&self) -> Vec<ReceivedSpan> {
        self.kept.spans.lock().unwrap().clone()
    }

    /// What came with the requests.
    pub(crate) fn headers(&self) -> Vec<http::HeaderMap> {
        self.kept.headers.lock().unwrap().clone()
    }

    /// The span of this name in a trace, once it has arrived.
    pub(crate) async fn wait_for_span(&self, trace: &str, name: &str) -> ReceivedSpan {
        let (kept, trace, name) = (self.kept.clone(), trace.to_owned(), name.to_owned());
        // The collector itself runs on the test's runtime.
        let waited = tokio::task::spawn_blocking(move || {
            wait_for(&format!("{name} in {trace}"), || {
                let spans = kept.spans.lock().unwrap();
                spans.iter().find(|span| span.trace == trace && span.name == name).cloned()
            })
        });
        waited.await.unwrap()
    }
}
