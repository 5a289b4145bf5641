//! Sets up the outputs of telemetry: log lines to standard error, recorded spans to an OTLP collector.
//!
//! Only commands that run a server call this, once per process. What is recorded is decided in `trace`.

mod log_format;
mod trace_export;

use tracing_subscriber::{
    EnvFilter, Layer as _,
    filter::{FilterExt as _, FilterFn, LevelFilter, dynamic_filter_fn, filter_fn},
    layer::SubscriberExt as _,
    util::SubscriberInitExt as _,
};

use crate::{
    config::{server::LogFormat, telemetry::OtlpSettings},
    trace,
};

pub use trace_export::TraceExporter;

/// Sets up logging for the process, and the export of spans if `otlp` is given. Must be called within the runtime that
/// exports.
///
/// # Errors
/// If the filter, the collector's address or its certificate is invalid, or telemetry is set up already.
pub fn init(filter: &str, format: LogFormat, otlp: Option<&OtlpSettings>) -> anyhow::Result<TraceExporter> {
    let filter = EnvFilter::try_new(filter)
        .map_err(|error| anyhow::anyhow!("the log filter {filter:?} is invalid: {error}"))?;
    // The log ignores recorded spans: log lines name their call themselves.
    let unrecorded = FilterFn::new(|metadata| metadata.target() != trace::SPAN_TARGET);
    let filter = filter.and(unrecorded.with_max_level_hint(LevelFilter::TRACE));
    let layer = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    let log = match format {
        LogFormat::Text => {
            let ansi = std::io::IsTerminal::is_terminal(&std::io::stderr());
            layer.with_ansi(ansi).fmt_fields(log_format::TextFieldsWithRequestId).with_filter(filter).boxed()
        }
        LogFormat::Json => {
            layer.json().map_event_format(log_format::JsonEventWithRequestId).with_filter(filter).boxed()
        }
    };
    let (exporter, tracer) = TraceExporter::start(otlp)?;
    // An empty layer would enable every span of the libraries below, for nothing.
    let mut layers = vec![log];
    layers.extend(tracer.map(|tracer| {
        let layer = tracing_opentelemetry::layer()
            .with_tracer(tracer)
            .with_location(false)
            .with_threads(false)
            .with_level(false)
            .with_target(false)
            .with_tracked_inactivity(false)
            .with_context_activation(false);
        // A call's root span exists only if the call is recorded; other spans need a recorded parent.
        let within_call = dynamic_filter_fn(|metadata, context| {
            metadata.name() == trace::CALL_SPAN_NAME || context.lookup_current().is_some()
        })
        .with_max_level_hint(LevelFilter::INFO);
        let ours = filter_fn(|metadata| metadata.is_span() && metadata.target() == trace::SPAN_TARGET)
            .with_max_level_hint(LevelFilter::INFO);
        layer.with_filter(ours.and(within_call)).boxed()
    }));
    tracing_subscriber::registry().with(layers).try_init()?;
    Ok(exporter)
}
