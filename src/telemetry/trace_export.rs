//! Sends recorded spans to an OTLP collector.
//!
//! Calls queue their spans and continue. The queue is bounded; spans that do not fit are dropped and counted. A
//! collector that is away or hangs blocks only the exporting task.

use std::{sync::Mutex, time::Duration};

use anyhow::Context as _;
use opentelemetry::{Context, trace::TracerProvider as _};
use opentelemetry_otlp::{WithExportConfig as _, WithTonicConfig as _};
use opentelemetry_sdk::{
    Resource,
    error::OTelSdkResult,
    trace::{Sampler, SdkTracer, SdkTracerProvider, Span, SpanData, SpanExporter, SpanProcessor},
};
use tokio::{sync::mpsc, task::JoinHandle};
use tonic::{
    metadata::{MetadataKey, MetadataMap, MetadataValue},
    transport::{Certificate, ClientTlsConfig, Endpoint},
};

use crate::{config::telemetry::OtlpSettings, trace};

/// Spans that may wait, about 1 KB each.
const QUEUE_CAPACITY: usize = 4096;
/// Spans in one request.
const MAX_BATCH_SIZE: usize = 512;
/// Time for which spans are collected before a request.
const BATCH_DELAY: Duration = Duration::from_secs(1);
/// Time limit of a request.
const EXPORT_TIMEOUT: Duration = Duration::from_secs(5);
/// Time limit for the remaining spans at a stop.
const FINAL_EXPORT_TIMEOUT: Duration = Duration::from_secs(1);

/// The running exporter; call `stop` at the end of the process.
#[derive(Debug, Default)]
pub struct TraceExporter {
    running: Option<(SdkTracerProvider, JoinHandle<()>)>,
}

impl TraceExporter {
    /// Starts the exporter if a collector is configured.
    pub(super) fn start(otlp: Option<&OtlpSettings>) -> anyhow::Result<(TraceExporter, Option<SdkTracer>)> {
        let Some(otlp) = otlp else { return Ok((TraceExporter::default(), None)) };
        let mut exporter = build_span_exporter(otlp)?;
        exporter.set_resource(&build_resource(otlp));
        let (spans, waiting) = mpsc::channel(QUEUE_CAPACITY);
        let sending = tokio::spawn(export_spans(exporter, waiting));
        let provider = SdkTracerProvider::builder()
            .with_span_processor(SpanQueue(Mutex::new(Some(spans))))
            .with_resource(build_resource(otlp))
            // `trace` decides whether a call is recorded, before its span exists.
            .with_sampler(Sampler::AlwaysOn)
            .build();
        let tracer = provider.tracer("keyward");
        Ok((TraceExporter { running: Some((provider, sending)) }, Some(tracer)))
    }

    /// Sends the remaining spans, within a time limit.
    pub(crate) async fn stop(self) {
        let Some((provider, mut sending)) = self.running else { return };
        // Closes the queue; the task then empties it and ends.
        let _ = provider.shutdown();
        if tokio::time::timeout(FINAL_EXPORT_TIMEOUT, &mut sending).await.is_err() {
            tracing::warn!("the last spans were not exported in time");
            sending.abort();
        }
    }
}

fn build_span_exporter(otlp: &OtlpSettings) -> anyhow::Result<opentelemetry_otlp::SpanExporter> {
    let endpoint = Endpoint::from_shared(otlp.endpoint.clone())
        .with_context(|| format!("telemetry.otlp_endpoint {:?}", otlp.endpoint))?
        .connect_timeout(EXPORT_TIMEOUT)
        .timeout(EXPORT_TIMEOUT);
    let endpoint = if otlp.endpoint.starts_with("https:") {
        let tls = ClientTlsConfig::new();
        let tls = match &otlp.ca_pem {
            Some(pem) => tls.ca_certificate(Certificate::from_pem(pem)),
            None => tls.with_webpki_roots(),
        };
        endpoint.tls_config(tls).context("telemetry.otlp_ca_file")?
    } else {
        endpoint
    };
    let mut metadata = MetadataMap::new();
    for (name, value) in &otlp.headers {
        let name = MetadataKey::from_bytes(name.as_bytes())?;
        let mut value: MetadataValue<_> = value.reveal().parse()?;
        value.set_sensitive(true);
        metadata.insert(name, value);
    }
    let exporter = opentelemetry_otlp::SpanExporter::builder()
        .with_tonic()
        .with_channel(endpoint.connect_lazy())
        .with_timeout(EXPORT_TIMEOUT)
        .with_metadata(metadata);
    Ok(exporter.build()?)
}

/// The identity of this service. `OTEL_RESOURCE_ATTRIBUTES` may add attributes.
fn build_resource(otlp: &OtlpSettings) -> Resource {
    let version = opentelemetry::KeyValue::new("service.version", env!("CARGO_PKG_VERSION"));
    Resource::builder().with_service_name(otlp.service_name.clone()).with_attribute(version).build()
}

/// The queue of spans; `None` once it is closed.
#[derive(Debug)]
struct SpanQueue(Mutex<Option<mpsc::Sender<SpanData>>>);

impl SpanProcessor for SpanQueue {
    fn on_start(&self, _: &mut Span, _: &Context) {}

    fn on_end(&self, span: SpanData) {
        let queue = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone();
        if queue.is_none_or(|queue| queue.try_send(span).is_err()) {
            trace::add_lost_spans(1);
        }
    }

    fn force_flush(&self) -> OTelSdkResult {
        Ok(())
    }

    fn shutdown_with_timeout(&self, _: Duration) -> OTelSdkResult {
        self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take();
        Ok(())
    }
}

async fn export_spans(exporter: impl SpanExporter, mut waiting: mpsc::Receiver<SpanData>) {
    let mut batch = Vec::with_capacity(MAX_BATCH_SIZE);
    let mut failing = false;
    while waiting.recv_many(&mut batch, MAX_BATCH_SIZE).await > 0 {
        fill_batch(&mut waiting, &mut batch).await;
        let count = batch.len() as u64;
        let sent = tokio::time::timeout(EXPORT_TIMEOUT, exporter.export(std::mem::take(&mut batch))).await;
        let failed = match sent {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(error.to_string()),
            Err(_) => Some("no answer in time".to_owned()),
        };
        match failed {
            Some(error) => {
                trace::add_lost_spans(count);
                if !std::mem::replace(&mut failing, true) {
                    tracing::warn!(error, "the collector accepts no spans; they are dropped until it does");
                }
            }
            None if std::mem::take(&mut failing) => tracing::info!("the collector accepts spans again"),
            None => {}
        }
    }
}

/// Waits for more spans, because a request for each would cost more than the spans.
async fn fill_batch(waiting: &mut mpsc::Receiver<SpanData>, batch: &mut Vec<SpanData>) {
    let end = tokio::time::Instant::now() + BATCH_DELAY;
    while batch.len() < MAX_BATCH_SIZE {
        match tokio::time::timeout_at(end, waiting.recv()).await {
            Ok(Some(span)) => batch.push(span),
            // The delay is over, or the queue is closed.
            Ok(None) | Err(_) => return,
        }
    }
}
