//! The admin pages, over HTTP/1.1: `/healthz` (the process lives), `/readyz` (it answers Checks) and `/metrics`
//! (Prometheus text). No secret is served here, and nothing can be changed.

use std::{fmt::Write as _, future::ready, sync::Arc};

use http::{StatusCode, request::Parts};
use tokio::{net::TcpListener, sync::watch};

use crate::{
    clock::Clock,
    domain::{
        decision::Reason,
        lease::{Boottime, replica::Standing},
    },
    engine::{Engine, limiter::Limiter},
    gateway::Gateway,
    http1::{self, Page},
    replication::feed::Sight,
    transport::counts::Report,
};

/// What the pages tell of.
pub struct Told {
    /// Answers Checks.
    pub engine: Arc<Engine>,
    /// Judges requests.
    pub gateway: Arc<Gateway>,
    /// Whether Checks are answered.
    pub ready: watch::Receiver<bool>,
    /// The replica that this is, where there are others.
    pub replica: Option<Arc<Sight>>,
    /// Tells the time.
    pub clock: Arc<dyn Clock>,
    /// Counts connections.
    pub transport: Report,
}

impl std::fmt::Debug for Told {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Told").field("engine", &self.engine).finish_non_exhaustive()
    }
}

/// Serves the pages until `stopping` turns true.
pub async fn serve(listener: TcpListener, told: Told, stopping: watch::Receiver<bool>) {
    http1::serve(listener, move |request: Parts| ready(page(request.uri.path(), &told)), stopping).await;
}

/// Serves the pages of a server that waits for its database, until this is dropped or `stopping` turns true.
pub async fn serve_waiting(listener: TcpListener, stopping: watch::Receiver<bool>) {
    let page = |path: &str| match path {
        "/healthz" => Page::text(StatusCode::OK, "ok\n"),
        _ => Page::text(StatusCode::SERVICE_UNAVAILABLE, "not ready: the database is away\n"),
    };
    http1::serve(listener, move |request: Parts| ready(page(request.uri.path())), stopping).await;
}

fn page(path: &str, told: &Told) -> Page {
    let ready = *told.ready.borrow();
    match path {
        "/healthz" => Page::text(StatusCode::OK, "ok\n"),
        "/readyz" if ready => Page::text(StatusCode::OK, "ready\n"),
        "/readyz" => Page::text(StatusCode::SERVICE_UNAVAILABLE, "not ready\n"),
        "/metrics" => Page::text(StatusCode::OK, metrics(told, ready)),
        _ => Page::text(StatusCode::NOT_FOUND, "there are /healthz, /readyz and /metrics\n"),
    }
}

fn metrics(told: &Told, ready: bool) -> String {
    let engine = &told.engine;
    let mut text =
        String::from("# HELP keyward_checks_total Checks answered.\n# TYPE keyward_checks_total counter\n");
    for (reason, count) in engine.answered() {
        let result = if reason == Reason::Ok { "allowed" } else { "denied" };
        // Writing to a String does not fail.
        let _ = writeln!(
            text,
            "keyward_checks_total{{result=\"{result}\",reason=\"{}\"}} {count}",
            reason.as_str()
        );
    }
    gateway_metrics(&mut text, &told.gateway);
    limit_metrics(&mut text, &engine.limiter);
    transport_metrics(&mut text, &told.transport);
    for (name, help, value) in [
        ("keyward_index_keys", "Keys held in memory.", engine.index.len() as u64),
        ("keyward_revision", "Newest change applied.", engine.index.revision().unwrap_or_default().0),
        ("keyward_ready", "1 while Checks are answered.", u64::from(ready)),
    ] {
        let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} gauge\n{name} {value}");
    }
    if let Some(replica) = &told.replica {
        replica_metrics(&mut text, told, replica);
    }
    text
}

/// How a replica stands with the database.
fn replica_metrics(text: &mut String, told: &Told, replica: &Sight) {
    let clock = || told.clock.boottime();
    let left = match told.engine.lease.deadline() {
        Boottime::FOREVER => "+Inf".to_owned(),
        deadline => deadline.since(clock()).as_secs_f64().to_string(),
    };
    let staleness = told.engine.lease.staleness(clock).as_secs_f64();
    let regressed = u8::from(replica.standing() == Some(Standing::Regressed));
    for (name, help, value) in [
        ("keyward_lease_seconds", "How long Checks may still allow without news from the database.", left),
        ("keyward_staleness_seconds", "How old the state in memory can be.", staleness.to_string()),
        (
            "keyward_regressed",
            "1 while the database has another history than this replica.",
            regressed.to_string(),
        ),
        ("keyward_replicas", "Replicas of the database, this one included.", replica.replicas().to_string()),
    ] {
        let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} gauge\n{name} {value}");
    }
    let [renewals, failures, frozen] = replica.counts();
    for (name, help, value) in [
        ("keyward_renewals_total", "Renewals of the lease that the database answered.", renewals),
        ("keyward_feed_failures_total", "Requests of the replica that failed.", failures),
        (
            "keyward_clock_frozen_total",
            "How often this machine's clock was found to have stood still.",
            frozen,
        ),
    ] {
        let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} counter\n{name} {value}");
    }
}

/// Connections, and calls that were turned away.
fn transport_metrics(text: &mut String, report: &Report) {
    let listeners: Vec<_> = report.tell().collect();
    const OPEN: &str = "keyward_connections";
    let _ = writeln!(text, "# HELP {OPEN} Connections that are open.\n# TYPE {OPEN} gauge");
    for told in &listeners {
        let _ = writeln!(text, "{OPEN}{{listener=\"{}\"}} {}", told.listener, told.connections);
    }
    const REFUSED: &str = "keyward_connections_refused_total";
    let _ = writeln!(text, "# HELP {REFUSED} Connections that were not served.\n# TYPE {REFUSED} counter");
    for told in &listeners {
        for (reason, count) in told.refused {
            let _ = writeln!(text, "{REFUSED}{{listener=\"{}\",reason=\"{reason}\"}} {count}", told.listener);
        }
    }
    const EXPIRY: &str = "keyward_tls_certificate_expiry_seconds";
    let expiries = listeners.iter().filter_map(|told| Some((&told.listener, told.certificate_expiry?)));
    for (at, (listener, expiry)) in expiries.enumerate() {
        if at == 0 {
            let help = "Until when the listener's certificate is valid, in seconds since 1970.";
            let _ = writeln!(text, "# HELP {EXPIRY} {help}\n# TYPE {EXPIRY} gauge");
        }
        let _ = writeln!(text, "{EXPIRY}{{listener=\"{listener}\"}} {expiry}");
    }
    const SHED: &str = "keyward_calls_shed_total";
    let help = "Calls that were turned away, since more were under way than the server takes.";
    let _ = writeln!(text, "# HELP {SHED} {help}\n# TYPE {SHED} counter\n{SHED} {}", report.shed());
}

fn limit_metrics(text: &mut String, limiter: &Limiter) {
    const CALLS: &str = "keyward_limits_redis_calls_total";
    let _ = writeln!(text, "# HELP {CALLS} Checks that Redis was to count.\n# TYPE {CALLS} counter");
    for (call, count) in limiter.calls() {
        let _ = writeln!(text, "{CALLS}{{result=\"{}\"}} {count}", call.as_str());
    }
    const ALONE: &str = "keyward_limits_fallbacks_total";
    let help = "Checks counted by this process alone, since Redis did not answer.";
    let _ = writeln!(text, "# HELP {ALONE} {help}\n# TYPE {ALONE} counter\n{ALONE} {}", limiter.fallbacks());
}

fn gateway_metrics(text: &mut String, gateway: &Gateway) {
    const REQUESTS: &str = "keyward_gateway_requests_total";
    let _ = writeln!(text, "# HELP {REQUESTS} Requests that proxies asked about.\n# TYPE {REQUESTS} counter");
    for count in gateway.counts.iter() {
        let _ = writeln!(
            text,
            "{REQUESTS}{{via=\"{}\",mode=\"{}\",result=\"{}\",reason=\"{}\"}} {}",
            count.via, count.mode, count.result, count.reason, count.count
        );
    }
    let [bad, good] = gateway.counts.reloads();
    const RELOADS: &str = "keyward_gateway_rules_reloads_total";
    let _ = writeln!(text, "# HELP {RELOADS} Changed rules files that were read.\n# TYPE {RELOADS} counter");
    let _ = writeln!(text, "{RELOADS}{{result=\"accepted\"}} {good}\n{RELOADS}{{result=\"refused\"}} {bad}");
    const RULES: &str = "keyward_gateway_rules";
    let _ =
        writeln!(text, "# HELP {RULES} Rules in force.\n# TYPE {RULES} gauge\n{RULES} {}", gateway.rules());
}
