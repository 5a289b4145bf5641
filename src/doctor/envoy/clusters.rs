//! Checks the cluster of an `ext_authz` filter: that it exists, uses HTTP/2 and TLS, and survives the loss of a replica.

use std::net::IpAddr;

use serde_json::Value;

use super::message::{JsonMessage as _, TOPIC, all_objects};
use crate::doctor::report::DoctorReport;

/// Checks the cluster of a filter, and how the filter uses several hosts.
pub(super) fn check_cluster(root: &Value, filter: &Value, findings: &mut DoctorReport) {
    let grpc = filter.field("grpc_service");
    let over_grpc = grpc.and_then(|service| service.field("envoy_grpc"));
    let over_http = filter.field("http_service").and_then(|service| service.field("server_uri"));
    let name = match (over_grpc, over_http) {
        (Some(grpc), _) => grpc.text_field("cluster_name"),
        (None, Some(uri)) => uri.text_field("cluster"),
        (None, None) => {
            if grpc.is_some() {
                findings.skip(TOPIC, "how Keyward is reached: its grpc_service is not envoy_grpc");
            }
            return;
        }
    };
    let clusters =
        root.field("static_resources").map_or(&[][..], |resources| resources.list_field("clusters"));
    let Some(cluster) = clusters.iter().find(|cluster| cluster.text_field("name") == name) else {
        findings.fail(
            TOPIC,
            format!("its cluster {name} is not among static_resources.clusters"),
            "name the cluster of Keyward",
        );
        return;
    };
    if over_grpc.is_some() && !speaks_http2(cluster) {
        let fix = "explicit_http_config: { http2_protocol_options: {} } in typed_extension_protocol_options";
        findings.fail(TOPIC, format!("its cluster {name} does not use HTTP/2, which gRPC needs"), fix);
    }
    check_cluster_tls(name, cluster, findings);
    let several = host_addresses(cluster).len() > 1;
    if let (Some(service), Some(grpc)) = (grpc, over_grpc) {
        check_retry_policy(service, grpc, name, cluster, several, findings);
    }
    if several {
        check_failover(name, cluster, findings);
    }
}

fn speaks_http2(cluster: &Value) -> bool {
    all_objects(cluster).iter().any(|object| {
        let config = object.field("explicit_http_config").or_else(|| object.field("auto_config"));
        config.is_some_and(|config| {
            config.get("http2_protocol_options").or_else(|| config.get("http2ProtocolOptions")).is_some()
        })
    }) || cluster.get("http2_protocol_options").is_some()
}

/// The addresses of a cluster's hosts; None = a pipe.
fn host_addresses(cluster: &Value) -> Vec<Option<&str>> {
    let endpoints =
        cluster.field("load_assignment").map_or(&[][..], |assignment| assignment.list_field("endpoints"));
    let all = endpoints.iter().flat_map(|locality| locality.list_field("lb_endpoints"));
    all.map(|host| {
        host.field("endpoint")?.field("address")?.field("socket_address")?.field("address")?.as_str()
    })
    .collect()
}

fn check_cluster_tls(name: &str, cluster: &Value, findings: &mut DoctorReport) {
    let local =
        |host: &str| host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback());
    let remote = host_addresses(cluster).into_iter().flatten().find(|host| !local(host));
    match (remote, cluster.field("transport_socket")) {
        (Some(host), None) => findings.fail(
            TOPIC,
            format!("its cluster {name} reaches {host} without TLS: tokens cross the network in plaintext"),
            "transport_socket with an UpstreamTlsContext, as in deploy/envoy/production.yaml",
        ),
        (_, Some(socket))
            if socket.text_field("name").contains("tls")
                && all_objects(socket).iter().all(|object| object.field("trusted_ca").is_none()) =>
        {
            let problem = format!("its cluster {name} accepts any certificate: its TLS has no trusted_ca");
            findings.fail(
                TOPIC,
                problem,
                "validation_context: { trusted_ca: …, match_typed_subject_alt_names: … }",
            );
        }
        _ => {}
    }
}

fn check_retry_policy(
    service: &Value,
    grpc: &Value,
    name: &str,
    cluster: &Value,
    several: bool,
    findings: &mut DoctorReport,
) {
    if grpc.field("retry_policy").is_some() {
        let problem = "envoy_grpc.retry_policy applies to configuration streams: it has no effect here";
        findings.warn(TOPIC, problem, "move retry_policy into grpc_service, next to timeout");
    }
    if !several {
        return;
    }
    let policy = service.field("retry_policy");
    if policy.and_then(|policy| policy.field("num_retries")).is_none() {
        let problem = "grpc_service.retry_policy allows no retry: requests on a failing replica fail";
        findings.warn(TOPIC, problem, "retry_policy with num_retries: 3, as in deploy/envoy/production.yaml");
        return;
    }
    let predicates = policy.map_or(&[][..], |policy| policy.list_field("retry_host_predicate"));
    if !predicates.iter().any(|predicate| predicate.text_field("name").ends_with("previous_hosts")) {
        let problem =
            "grpc_service.retry_policy has no previous_hosts: a retry may go to the same dead replica";
        findings.warn(TOPIC, problem, "retry_host_predicate: envoy.retry_host_predicates.previous_hosts");
    }
    let thresholds =
        cluster.field("circuit_breakers").map_or(&[][..], |breakers| breakers.list_field("thresholds"));
    if !thresholds.iter().any(|threshold| threshold.field("max_retries").is_some()) {
        let problem =
            format!("its cluster {name} allows 3 retries at once, but a failing replica needs more");
        findings.warn(TOPIC, problem, "circuit_breakers: { thresholds: [ { max_retries: 1024 } ] }");
    }
}

/// Checks what several hosts need so that one may fail.
fn check_failover(name: &str, cluster: &Value, findings: &mut DoctorReport) {
    let checks = cluster.list_field("health_checks");
    if checks.is_empty() {
        let problem =
            format!("its cluster {name} has no health_checks: a dead replica keeps its share of requests");
        findings.warn(
            TOPIC,
            problem,
            "health_checks with grpc_health_check, as in deploy/envoy/production.yaml",
        );
    } else if checks.iter().any(|check| check.field("no_traffic_interval").is_none()) {
        let problem =
            format!("its cluster {name} checks idle hosts once a minute: no_traffic_interval is not set");
        findings.warn(TOPIC, problem, "no_traffic_interval: 1s");
    }
    if cluster.field("outlier_detection").is_none() {
        let problem = format!(
            "its cluster {name} has no outlier_detection: a failed replica fails requests until its next health check"
        );
        findings.warn(TOPIC, problem, "outlier_detection, as in deploy/envoy/production.yaml");
    }
}
