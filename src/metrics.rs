//! Renders the page `/metrics`: the names, help texts and sources of all metrics.
//!
//! Counting happens where the events happen, not here. Metric names are stable, because dashboards and alerts rely on
//! them (docs/telemetry.md lists them). Labels have closed sets of values; nothing that a client sends becomes one.

mod process;

use std::sync::Arc;

use tokio::sync::watch;

use crate::{
    clock::Clock,
    decision_log::DecisionLog,
    domain::{
        lease::{BootInstant, replica::ReplicaState},
        policy_decision::Reason,
    },
    engine::{Engine, limiter::Limiter, usage::UsageRecorder},
    gateway::Gateway,
    grpc::rpc_metrics::RpcMetrics,
    metrics_core::{
        MetricKind::{Counter, Gauge, Histogram},
        MetricsText,
    },
    replication::{propagation::PropagationMetrics, replica_task::ReplicaStatus},
    store::group_commit::CommitMetrics,
    trace,
    transport::{listener_metrics::ListenerMetrics, memory_budget::MemoryBudget},
};

/// The sources of the page. To add a metric, add its source here and write it in one of the functions below.
pub(crate) struct MetricsSources {
    pub(crate) engine: Arc<Engine>,
    pub(crate) gateway: Arc<Gateway>,
    pub(crate) calls: Arc<RpcMetrics>,
    pub(crate) commits: Arc<CommitMetrics>,
    /// Waits until changes are in force on every replica.
    pub(crate) waits: Arc<PropagationMetrics>,
    pub(crate) decisions: DecisionLog,
    /// True while Checks are answered.
    pub(crate) ready: watch::Receiver<bool>,
    /// The state of this replica, if the database has replicas.
    pub(crate) replica: Option<Arc<ReplicaStatus>>,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) transport: ListenerMetrics,
    pub(crate) memory: Arc<MemoryBudget>,
}

impl std::fmt::Debug for MetricsSources {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MetricsSources").field("engine", &self.engine).finish_non_exhaustive()
    }
}

#[must_use]
pub(crate) fn render_metrics(sources: &MetricsSources) -> String {
    let mut text = MetricsText::default();
    let engine = &sources.engine;
    write_checks(&mut text, engine);
    write_calls(&mut text, &sources.calls);
    write_connections(&mut text, &sources.transport, &sources.memory);
    write_gateway(&mut text, &sources.gateway);
    write_limits(&mut text, &engine.limiter);
    write_usage(&mut text, &engine.usage);
    write_store(&mut text, &sources.commits);
    write_propagation(&mut text, &sources.waits);
    write_telemetry_losses(&mut text, &sources.decisions);
    write_state(&mut text, sources);
    if let Some(replica) = &sources.replica {
        write_replica(&mut text, sources, replica);
    }
    process::write_process(&mut text);
    text.finish()
}

fn write_checks(text: &mut MetricsText, engine: &Engine) {
    text.family("keyward_checks_total", Counter, "Checks answered.");
    for (reason, count) in engine.outcome_counts() {
        let result = if reason == Reason::Ok { "allowed" } else { "denied" };
        text.sample(&[("result", result), ("reason", reason.as_str())], count);
    }
}

/// Metrics of RPCs, under the usual names of gRPC servers.
fn write_calls(text: &mut MetricsText, calls: &RpcMetrics) {
    let counts: Vec<_> = calls.iter().collect();
    let labels: Vec<_> = counts
        .iter()
        .map(|of| [("grpc_type", of.kind), ("grpc_service", of.service), ("grpc_method", of.method)])
        .collect();
    text.family("grpc_server_started_total", Counter, "Calls started.");
    for (of, labels) in counts.iter().zip(&labels) {
        text.sample(labels, of.started);
    }
    text.family("grpc_server_handled_total", Counter, "Calls finished, by status code.");
    for (of, [kind, service, method]) in counts.iter().zip(&labels) {
        for (code, count) in &of.handled {
            text.sample(&[*kind, *service, *method, ("grpc_code", code)], count);
        }
    }
    let help = "Duration of calls from their headers to their response; of streams, to their end.";
    text.family("grpc_server_handling_seconds", Histogram, help);
    for (of, labels) in counts.iter().zip(&labels) {
        text.histogram(labels, &of.durations);
    }
}

/// Connections and shed calls. Listener names come from the settings.
fn write_connections(text: &mut MetricsText, report: &ListenerMetrics, memory: &MemoryBudget) {
    let listeners: Vec<_> = report.snapshots().collect();
    text.family("keyward_connections", Gauge, "Open connections.");
    for snapshot in &listeners {
        text.sample(&[("listener", &snapshot.listener)], snapshot.connections);
    }
    text.family("keyward_connections_refused_total", Counter, "Connections refused.");
    for snapshot in &listeners {
        for (reason, count) in snapshot.refused {
            text.sample(&[("listener", &snapshot.listener), ("reason", reason)], count);
        }
    }
    let expiries: Vec<_> = listeners
        .iter()
        .filter_map(|snapshot| Some((&snapshot.listener, snapshot.certificate_expiry?)))
        .collect();
    if !expiries.is_empty() {
        let help = "Expiry of the listener's certificate, in seconds since 1970.";
        text.family("keyward_tls_certificate_expiry_seconds", Gauge, help);
        for (listener, expiry) in expiries {
            text.sample(&[("listener", listener)], expiry);
        }
    }
    let help = "Calls shed because the server was at its limit.";
    text.single_sample("keyward_calls_shed_total", Counter, help, report.shed_calls());
    let help = "Memory held by requests in progress, in bytes.";
    text.single_sample("keyward_request_memory_bytes", Gauge, help, memory.used_bytes() as u64);
}

fn write_gateway(text: &mut MetricsText, gateway: &Gateway) {
    text.family("keyward_gateway_requests_total", Counter, "Requests that proxies asked to authorize.");
    for of in gateway.metrics.iter() {
        let labels = [("via", of.via), ("mode", of.mode), ("result", of.result), ("reason", of.reason)];
        text.sample(&labels, of.count);
    }
    let [bad, good] = gateway.metrics.reloads();
    text.family("keyward_gateway_rules_reloads_total", Counter, "Reloads of the rules file.");
    text.sample(&[("result", "accepted")], good).sample(&[("result", "refused")], bad);
    text.single_sample("keyward_gateway_rules", Gauge, "Rules in force.", gateway.rule_count());
}

fn write_limits(text: &mut MetricsText, limiter: &Limiter) {
    text.family("keyward_limits_redis_calls_total", Counter, "Checks sent to Redis to be counted.");
    for (call, count) in limiter.redis_outcome_counts() {
        text.sample(&[("result", call.as_str())], count);
    }
    let help = "Checks counted by this process alone because Redis did not answer.";
    text.single_sample("keyward_limits_fallbacks_total", Counter, help, limiter.local_fallbacks());
}

fn write_usage(text: &mut MetricsText, usage: &UsageRecorder) {
    let help = "Keys with usage that is not written yet.";
    text.single_sample("keyward_usage_pending", Gauge, help, usage.pending_keys());
    let help = "Failed writes of usage or quotas; they are retried.";
    text.single_sample("keyward_usage_flush_failures_total", Counter, help, usage.failures());
    let help = "Checks whose usage was dropped because too many keys waited to be written.";
    text.single_sample("keyward_usage_dropped_total", Counter, help, usage.dropped());
}

fn write_store(text: &mut MetricsText, commits: &CommitMetrics) {
    text.family("keyward_store_commits_total", Counter, "Transactions of changes, by result.");
    for (result, count) in commits.results() {
        text.sample(&[("result", result)], count);
    }
    let help = "Duration of a transaction of changes.";
    text.family("keyward_store_commit_seconds", Histogram, help).histogram(&[], &commits.durations());
    text.single_sample(
        "keyward_store_committed_changes_total",
        Counter,
        "Changes committed.",
        commits.committed_changes(),
    );
}

fn write_propagation(text: &mut MetricsText, waits: &PropagationMetrics) {
    let help = "Time until a restricting change was in force on every replica.";
    text.family("keyward_propagation_seconds", Histogram, help).histogram(&[], &waits.durations());
    let help = "Changes not confirmed on every replica when their caller got its response.";
    text.single_sample("keyward_propagation_incomplete_total", Counter, help, waits.incomplete_count());
}

/// Losses of the decision log and of trace export.
fn write_telemetry_losses(text: &mut MetricsText, decisions: &DecisionLog) {
    let help = "Decisions dropped instead of written.";
    text.single_sample("keyward_decision_log_dropped_total", Counter, help, decisions.dropped());
    let help = "Recorded spans dropped before export.";
    text.single_sample("keyward_traces_dropped_total", Counter, help, trace::lost_spans());
}

fn write_state(text: &mut MetricsText, sources: &MetricsSources) {
    let index = &sources.engine.index;
    let ready = u8::from(*sources.ready.borrow());
    text.single_sample("keyward_index_keys", Gauge, "Keys held in memory.", index.len());
    let revision = index.revision().unwrap_or_default();
    text.single_sample("keyward_revision", Gauge, "Newest change applied.", revision.0);
    text.single_sample("keyward_ready", Gauge, "1 while Checks are answered.", ready);
    text.family("keyward_build_info", Gauge, "1; the label has the running version.")
        .sample(&[("version", env!("CARGO_PKG_VERSION"))], 1);
}

/// Metrics of a replica: its lease, staleness and renewals.
fn write_replica(text: &mut MetricsText, sources: &MetricsSources, replica: &ReplicaStatus) {
    let clock = || sources.clock.boottime();
    let lease = &sources.engine.lease;
    let left = match lease.deadline() {
        BootInstant::FOREVER => "+Inf".to_owned(),
        deadline => deadline.saturating_duration_since(clock()).as_secs_f64().to_string(),
    };
    let help = "Time left until the lease expires and Checks fail.";
    text.single_sample("keyward_lease_seconds", Gauge, help, left);
    let help = "Maximum age of the state in memory.";
    text.single_sample("keyward_staleness_seconds", Gauge, help, lease.staleness(clock).as_secs_f64());
    let regressed = u8::from(replica.state() == Some(ReplicaState::Regressed));
    let help = "1 while the database's history differs from this replica's.";
    text.single_sample("keyward_regressed", Gauge, help, regressed);
    let help = "Replicas of the database, this one included.";
    text.single_sample("keyward_replicas", Gauge, help, replica.replica_count());
    if let Some(offset) = replica.clock_offset().seconds() {
        let help = "Offset of this machine's wall clock to the database's; positive if ahead.";
        text.single_sample("keyward_clock_offset_seconds", Gauge, help, offset);
    }
    let [renewals, failures, frozen] = replica.counters();
    let help = "Renewals of the lease that the database answered.";
    text.single_sample("keyward_renewals_total", Counter, help, renewals);
    text.single_sample(
        "keyward_feed_failures_total",
        Counter,
        "Requests of the replica that failed.",
        failures,
    );
    let help = "Times that this machine's clock stood still.";
    text.single_sample("keyward_clock_frozen_total", Counter, help, frozen);
}
