//! Checks whether an Envoy bootstrap asks Keyward in a way that lets no request pass unchecked. Pure: it contacts no server.
//!
//! Only the static resources are checked; what comes by xDS is not in the file. `docs/gateway.md` and `deploy/envoy` explain
//! each finding.

mod clusters;
mod header_mutations;
mod identity_headers;
mod listeners;
mod message;

use std::time::Duration;

use serde_json::Value;

use crate::{
    config::server::ServerSettings,
    domain::header_name::{IDENTITY_HEADERS, METHOD_OVERRIDE_HEADERS},
    pb::envoy_request::MAX_BODY_BYTES,
};

use super::report::{DoctorReport, format_rounded};
use message::{EXT_AUTHZ_TYPE, JsonMessage as _, StringMatcher, TOPIC, messages_with_type};

/// Envoy's own timeout, if none is set.
const ENVOY_DEFAULT_TIMEOUT: Duration = Duration::from_millis(200);
/// With a longer timeout an outage delays every request for too long.
const MAX_RECOMMENDED_TIMEOUT: Duration = Duration::from_secs(1);

/// Checks every document with an `ext_authz` filter in a YAML or JSON file. Bootstraps in the `data` of a Kubernetes
/// `ConfigMap` count as documents.
pub(super) fn check_bootstrap(
    name: &str,
    text: &str,
    settings: Option<&ServerSettings>,
    findings: &mut DoctorReport,
) {
    let redis_timeout =
        settings.and_then(|settings| settings.limits.redis.as_ref()).map(|redis| redis.timeout);
    check_bootstrap_with_redis_timeout(name, text, redis_timeout, findings);
}

/// `redis_timeout` is how long a Check may wait for Redis; None = limits are counted locally.
fn check_bootstrap_with_redis_timeout(
    name: &str,
    text: &str,
    redis_timeout: Option<Duration>,
    findings: &mut DoctorReport,
) {
    let documents: Vec<Value> = match serde_saphyr::from_multiple(text) {
        Ok(documents) => documents,
        Err(error) => {
            let problem = error.to_string().lines().next().unwrap_or_default().to_owned();
            findings.fail(
                TOPIC,
                format!("{name} is neither YAML nor JSON: {problem}"),
                "envoy --mode validate -c FILE",
            );
            return;
        }
    };
    let embedded: Vec<Value> = documents.iter().flat_map(config_map_documents).collect();
    let mut asking = documents
        .iter()
        .chain(&embedded)
        .filter(|root| !messages_with_type(root, EXT_AUTHZ_TYPE).is_empty())
        .peekable();
    if asking.peek().is_none() {
        let fix = "put envoy.filters.http.ext_authz into its http_filters, as in deploy/envoy/minimal.yaml";
        findings.fail(TOPIC, format!("{name} does not ask Keyward: it has no ext_authz filter"), fix);
    }
    for root in asking {
        check_document(name, root, redis_timeout, findings);
    }
}

/// The YAML documents in a `ConfigMap`, or in the `ConfigMap`s of a `List`; none for any other document.
fn config_map_documents(document: &Value) -> Vec<Value> {
    let maps: Vec<&Value> = match document.text_field("kind") {
        "ConfigMap" => vec![document],
        "List" => document
            .list_field("items")
            .iter()
            .filter(|item| item.text_field("kind") == "ConfigMap")
            .collect(),
        "ConfigMapList" => document.list_field("items").iter().collect(),
        _ => Vec::new(),
    };
    let data = maps.into_iter().filter_map(|map| map.field("data").and_then(Value::as_object));
    let files = data.flatten().filter_map(|(_, file)| file.as_str());
    files.filter_map(|file| serde_saphyr::from_multiple::<Value>(file).ok()).flatten().collect()
}

/// Checks one bootstrap.
fn check_document(name: &str, root: &Value, redis_timeout: Option<Duration>, findings: &mut DoctorReport) {
    let before = findings.problem_count();
    for filter in messages_with_type(root, EXT_AUTHZ_TYPE) {
        check_filter(filter, redis_timeout, findings);
        header_mutations::check_header_mutation_rules(filter, findings);
        clusters::check_cluster(root, filter, findings);
    }
    listeners::check_listeners(root, findings);
    identity_headers::check_identity_headers(root, findings);
    if findings.problem_count() == before {
        findings.pass(
            TOPIC,
            format!(
                "{name}: fails closed, answers 503 if Keyward is unreachable, and lets no header or path pass unchecked"
            ),
        );
    }
}

fn check_filter(filter: &Value, redis_timeout: Option<Duration>, findings: &mut DoctorReport) {
    if filter.is_true("failure_mode_allow") {
        let problem = "failure_mode_allow is true: in an outage of Keyward every request passes";
        findings.fail(TOPIC, problem, "failure_mode_allow: false");
    }
    let code = filter
        .field("status_on_error")
        .map_or(Value::Null, |status| status.field("code").cloned().unwrap_or_default());
    if code != "ServiceUnavailable" && code != 503 {
        let problem = "status_on_error is not 503 (Envoy's default is 403): an outage looks like a bad key, and clients discard good keys";
        findings.warn(TOPIC, problem, "status_on_error: { code: ServiceUnavailable }");
    }
    if !filter.is_true("validate_mutations") {
        let problem = "validate_mutations is off: a header value with a line break would be forwarded";
        findings.warn(TOPIC, problem, "validate_mutations: true");
    }
    if filter.is_true("clear_route_cache") {
        let problem =
            "clear_route_cache is true: a request can change its route after Keyward has checked it";
        findings.fail(TOPIC, problem, "remove clear_route_cache");
    }
    if let Some(body) = filter.field("with_request_body") {
        check_request_body(body, filter.field("http_service").is_some(), findings);
    }
    if filter.is_true("include_peer_certificate") {
        let problem =
            "include_peer_certificate sends a whole certificate with each request; Keyward ignores it";
        findings.warn(TOPIC, problem, "remove include_peer_certificate");
    }
    if filter.is_true("shadow_mode") {
        findings.warn(
            TOPIC,
            "shadow_mode is on: no request is ever denied",
            "remove shadow_mode after the trial",
        );
    }
    if filter.field("filter_enabled").is_some() && !filter.is_true("deny_at_disable") {
        let problem = "filter_enabled: requests outside its share pass unchecked";
        findings.warn(TOPIC, problem, "remove filter_enabled after the trial");
    }
    check_header_visibility(filter, findings);
    match (filter.field("grpc_service"), filter.field("http_service")) {
        (Some(service), _) => check_timeout(service, "grpc_service.timeout", redis_timeout, findings),
        (None, Some(service)) => {
            check_timeout(
                service.field("server_uri").unwrap_or(&Value::Null),
                "http_service.server_uri.timeout",
                redis_timeout,
                findings,
            );
            check_http_service(service, findings);
        }
        (None, None) => findings.fail(
            TOPIC,
            "ext_authz has no service to ask",
            "grpc_service with envoy_grpc, as in deploy/envoy",
        ),
    }
}

/// Checks the forwarding of bodies. Over HTTP Keyward skips a body of any length; over gRPC it is part of a message, whose
/// size is limited.
fn check_request_body(body: &Value, over_http: bool, findings: &mut DoctorReport) {
    let max_bytes = body.field("max_request_bytes").and_then(Value::as_u64).unwrap_or_default();
    if max_bytes > MAX_BODY_BYTES as u64 && !over_http {
        let problem = format!(
            "with_request_body sends bodies of up to {max_bytes} bytes along; Keyward answers 413 above {MAX_BODY_BYTES}"
        );
        findings.fail(TOPIC, problem, "remove with_request_body: Keyward ignores bodies");
    } else {
        let problem = "with_request_body makes Envoy buffer every body; Keyward ignores bodies";
        findings.warn(TOPIC, problem, "remove with_request_body");
    }
}

/// Checks which headers of a request Keyward sees: it can only have removed what it sees.
fn check_header_visibility(filter: &Value, findings: &mut DoctorReport) {
    let over_http = filter.field("http_service").is_some();
    let lists = |name: &str| filter.field(name).map(message::string_matchers);
    let (allowed, refused) = (lists("allowed_headers"), lists("disallowed_headers"));
    let sees = |name: &str| {
        allowed.as_ref().map_or(!over_http, |list| list.iter().any(|pattern| pattern.may_match(name)))
            && !refused
                .as_ref()
                .is_some_and(|list| list.iter().any(|pattern| pattern.definitely_matches(name)))
    };
    if !IDENTITY_HEADERS.into_iter().chain(["x-keyward-later"]).all(&sees) {
        let problem = "Keyward does not see x-keyward-… headers of clients, so it cannot have them removed: a client can forge its identity";
        findings.fail(TOPIC, problem, "allowed_headers: { patterns: [ { prefix: x-keyward- } ] }");
    }
    // Names with underscores are dropped earlier: see headers_with_underscores_action.
    if !["x.keyward.user", "x!keyward|account", "x-keyward.scopes"].into_iter().all(&sees) {
        let problem = "Keyward does not see spellings such as X.Keyward.User, so it cannot have them removed: PHP takes them for X-Keyward-User";
        findings.fail(
            TOPIC,
            problem,
            "allowed_headers: { patterns: [ { safe_regex: { regex: \".*[^a-z0-9:-].*\" } } ] }",
        );
    } else if !["x.api.key", "x.original.url", "x.http.method.override"].into_iter().all(&sees) {
        let problem = "Keyward does not see spellings such as X.Original.Url, so it cannot have them removed: they can lead a service around the rules";
        findings.warn(
            TOPIC,
            problem,
            "allowed_headers: { patterns: [ { safe_regex: { regex: \".*[^a-z0-9:-].*\" } } ] }",
        );
    }
    if !(over_http || sees("authorization")) {
        findings.fail(
            TOPIC,
            "Keyward does not see authorization: every request is denied",
            "add { exact: authorization } to allowed_headers",
        );
    }
    if !METHOD_OVERRIDE_HEADERS.into_iter().all(&sees) {
        let problem = "Keyward does not see x-http-method-override and the like: it removes them, but cannot reject them if rules depend on the method";
        findings.warn(
            TOPIC,
            problem,
            "add x-http-method-override, x-http-method and x-method-override to allowed_headers",
        );
    }
    let uncertain =
        allowed.iter().chain(&refused).flatten().any(|pattern| matches!(pattern, StringMatcher::Unsupported));
    if uncertain {
        findings.skip(
            TOPIC,
            "a pattern of allowed_headers or disallowed_headers that the doctor does not support",
        );
    }
}

fn check_timeout(service: &Value, name: &str, redis_timeout: Option<Duration>, findings: &mut DoctorReport) {
    let given = service.field("timeout").and_then(Value::as_str).and_then(message::parse_proto_duration);
    let timeout = given.unwrap_or(ENVOY_DEFAULT_TIMEOUT);
    if given.is_none() {
        findings.warn(TOPIC, format!("{name} is not set: Envoy waits 200 ms"), format!("set {name}: 0.25s"));
    }
    if timeout.is_zero() || timeout > MAX_RECOMMENDED_TIMEOUT {
        let problem = format!(
            "{name} is {}: in an outage of Keyward every request waits that long",
            format_timeout(timeout)
        );
        findings.warn(TOPIC, problem, "0.25s is ample for an answer from memory");
    }
    if redis_timeout.is_some_and(|redis_timeout| timeout <= redis_timeout) && !timeout.is_zero() {
        let problem = format!(
            "{name} is no longer than limits.timeout: if Redis is slow, Envoy gives up before Keyward can answer without it"
        );
        findings.warn(TOPIC, problem, "make it longer, or limits.timeout shorter");
    }
}

fn format_timeout(timeout: Duration) -> String {
    if timeout.is_zero() { "0, which means no limit".to_owned() } else { format_rounded(timeout) }
}

/// Checks which headers of Keyward's HTTP response reach the service.
fn check_http_service(service: &Value, findings: &mut DoctorReport) {
    let passed =
        service.field("authorization_response").and_then(|answer| answer.field("allowed_upstream_headers"));
    let passed = passed.map(message::string_matchers).unwrap_or_default();
    if !IDENTITY_HEADERS.iter().all(|name| passed.iter().any(|pattern| pattern.may_match(name))) {
        let problem = "allowed_upstream_headers lacks x-keyward-…: a client's own headers of these names reach the service as Keyward's";
        findings.fail(
            TOPIC,
            problem,
            "authorization_response: { allowed_upstream_headers: { patterns: [ { prefix: x-keyward- } ] } }",
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PRODUCTION: &str = include_str!("../../deploy/envoy/production.yaml");
    const MINIMAL: &str = include_str!("../../deploy/envoy/minimal.yaml");
    const HTTP: &str = include_str!("../../deploy/envoy/http.yaml");

    const SPELLINGS: &str = "- { safe_regex: { regex: \".*[^a-z0-9:-].*\" } }";

    /// What is found of a bootstrap, but for what is good.
    fn finding_messages(text: &str) -> Vec<String> {
        let mut findings = DoctorReport::default();
        let redis = Some(Duration::from_millis(20));
        check_bootstrap_with_redis_timeout("e.yaml", text, redis, &mut findings);
        findings.lines().into_iter().filter(|found| !found.starts_with("ok ")).collect()
    }

    #[test]
    fn the_bootstraps_that_come_with_keyward_have_no_trap() {
        for text in [PRODUCTION, MINIMAL, HTTP] {
            assert_eq!(finding_messages(text), Vec::<String>::new());
        }
    }

    #[test]
    fn each_trap_is_found_and_nothing_else_with_it() {
        for (before, after, said) in [
            ("failure_mode_allow: false", "failure_mode_allow: true", "fail failure_mode_allow is true"),
            ("status_on_error: { code: ServiceUnavailable }", "", "warn status_on_error is not 503"),
            ("code: ServiceUnavailable", "code: Forbidden", "warn status_on_error is not 503"),
            ("validate_mutations: true", "", "warn validate_mutations is off"),
            (
                "validate_mutations: true",
                "validate_mutations: true\n              clear_route_cache: true",
                "fail clear_route_cache",
            ),
            (
                "validate_mutations: true",
                "validate_mutations: true\n              with_request_body: { max_request_bytes: 1 }",
                "warn with_request_body",
            ),
            (
                "validate_mutations: true",
                "validate_mutations: true\n              with_request_body: { max_request_bytes: 4194305 }",
                "fail with_request_body sends bodies of up to 4194305 bytes along",
            ),
            (
                "validate_mutations: true",
                "validate_mutations: true\n              decoder_header_mutation_rules: { disallow_all: true }",
                "fail decoder_header_mutation_rules keep Keyward from changing x-keyward-key-id",
            ),
            (
                "validate_mutations: true",
                "validate_mutations: true\n              decoder_header_mutation_rules: { disallow_expression: { regex: \"x-.*-user\" } }",
                "fail decoder_header_mutation_rules keep Keyward from changing x-keyward-user",
            ),
            (
                "validate_mutations: true",
                "validate_mutations: true\n              decoder_header_mutation_rules: { disallow_expression: { regex: authorization } }",
                "fail decoder_header_mutation_rules keep Keyward from changing authorization",
            ),
            (
                "validate_mutations: true",
                "validate_mutations: true\n              decoder_header_mutation_rules: { disallow_expression: { regex: \"(\" } }",
                "not looked at an expression of decoder_header_mutation_rules",
            ),
            (
                "use_remote_address: true",
                "use_remote_address: true\n          http_protocol_options: { enable_trailers: true }",
                "warn a listener accepts trailers of HTTP/1",
            ),
            (
                "outlier_detection:",
                "http_protocol_options: { enable_trailers: true }\n    outlier_detection:",
                "fail cluster keyward forwards trailers",
            ),
            (
                "use_remote_address: true",
                "use_remote_address: true\n          request_headers_to_add: [ { header: { key: X-Keyward.User, value: \"%REQ(x-user)%\" } } ]",
                "fail request_headers_to_add sets X-Keyward.User from the request",
            ),
            (
                "use_remote_address: true",
                "use_remote_address: true\n          request_headers_to_add: [ { header: { key: x-keyward-user, value: root } } ]",
                "warn request_headers_to_add sets x-keyward-user",
            ),
            (
                "use_remote_address: true",
                "use_remote_address: true\n          mutations: { request_mutations: [ { append: { header: { key: x-keyward-user, value: \"%REQ(x-user)%\" } } } ] }",
                "fail request_mutations sets x-keyward-user from the request",
            ),
            (
                "validate_mutations: true",
                "validate_mutations: true\n              include_peer_certificate: true",
                "warn include_peer_certificate",
            ),
            (
                "validate_mutations: true",
                "validate_mutations: true\n              shadow_mode: true",
                "warn shadow_mode",
            ),
            ("- { prefix: x-keyward- }", "", "fail Keyward does not see x-keyward-"),
            (SPELLINGS, "", "fail Keyward does not see spellings such as X.Keyward.User"),
            (
                SPELLINGS,
                "- { safe_regex: { regex: \"x[^a-z0-9]keyward[^a-z0-9].*\" } }",
                "warn Keyward does not see spellings such as X.Original.Url",
            ),
            ("- { exact: authorization }", "", "fail Keyward does not see authorization"),
            ("- { exact: x-method-override }", "", "warn Keyward does not see x-http-method-override"),
            (
                "timeout: 0.25s\n                envoy_grpc",
                "envoy_grpc",
                "warn grpc_service.timeout is not set",
            ),
            (
                "timeout: 0.25s\n                envoy_grpc",
                "timeout: 5s\n                envoy_grpc",
                "warn grpc_service.timeout is 5s",
            ),
            (
                "timeout: 0.25s\n                envoy_grpc",
                "timeout: 0.02s\n                envoy_grpc",
                "warn grpc_service.timeout is no longer than limits.timeout",
            ),
            (
                "envoy_grpc: { cluster_name: keyward }",
                "envoy_grpc: { cluster_name: keyward, retry_policy: { num_retries: 2 } }",
                "warn envoy_grpc.retry_policy",
            ),
            ("num_retries: 3", "", "warn grpc_service.retry_policy"),
            (
                "name: envoy.retry_host_predicates.previous_hosts",
                "name: other",
                "warn grpc_service.retry_policy has no previous_hosts",
            ),
            ("max_retries: 1024", "", "warn its cluster keyward allows 3 retries"),
            ("cluster_name: keyward }", "cluster_name: other }", "fail its cluster other"),
            (
                "http2_protocol_options: { connection_keepalive: { interval: 30s, timeout: 5s } }",
                "http_protocol_options: {}",
                "fail its cluster keyward does not use HTTP/2",
            ),
            (
                "address: 127.0.0.1, port_value: 50062",
                "address: keyward.internal, port_value: 50062",
                "fail its cluster keyward reaches keyward.internal without TLS",
            ),
            ("no_traffic_interval: 1s", "", "warn its cluster keyward checks idle hosts once a minute"),
            (
                "outlier_detection:",
                "common_lb_config: {}\n    other:",
                "warn its cluster keyward has no outlier_detection",
            ),
            ("normalize_path: true", "normalize_path: false", "fail listener edge: normalize_path"),
            ("merge_slashes: true", "", "fail listener edge: merge_slashes"),
            (
                "path_with_escaped_slashes_action: REJECT_REQUEST",
                "",
                "fail listener edge: path_with_escaped_slashes_action",
            ),
            (
                "headers_with_underscores_action: REJECT_REQUEST",
                "",
                "fail listener edge: headers_with_underscores_action",
            ),
            ("use_remote_address: true", "", "warn listener edge: use_remote_address"),
            (
                "check_settings: { context_extensions: { public: \"true\" } }",
                "disabled: true",
                "fail a route is without Keyward",
            ),
        ] {
            assert!(PRODUCTION.contains(before), "{before}");
            let found = finding_messages(&PRODUCTION.replacen(before, after, 1));
            assert!(found.len() == 1 && found[0].starts_with(said), "{said}: {found:?}");
        }
    }

    #[test]
    fn one_host_needs_no_retries_and_a_pipe_no_tls() {
        let pipe = MINIMAL.replace(
            "socket_address: { address: 127.0.0.1, port_value: 50052 }",
            "pipe: { path: /run/keyward.sock }",
        );
        assert_eq!(finding_messages(&pipe), Vec::<String>::new());
    }

    #[test]
    fn json_and_its_names_are_understood() {
        let text = r#"{"staticResources": {"listeners": [{"name": "x", "filter": {
            "@type": "type.googleapis.com/envoy.extensions.filters.http.ext_authz.v3.ExtAuthz", "failureModeAllow": true}}]}}"#;
        let found = finding_messages(text);
        assert!(found.iter().any(|said| said.starts_with("fail failure_mode_allow")), "{found:?}");
    }

    #[test]
    fn every_document_of_a_file_is_read() {
        let open = MINIMAL.replace("failure_mode_allow: false", "failure_mode_allow: true");
        let service = "kind: Service\nmetadata: { name: keyward }\n";
        assert_eq!(finding_messages(&format!("---\n{service}---\n{MINIMAL}...\n")), Vec::<String>::new());
        let indented = open.lines().map(|line| format!("    {line}\n")).collect::<String>();
        let map = format!("kind: ConfigMap\ndata:\n  envoy.yaml: |\n{indented}");
        let item: String = map.lines().map(|line| format!("  {line}\n")).collect();
        let list = format!("kind: List\nitems:\n- kind: Service\n-{}", &item[1..]);
        for text in [
            format!("{service}---\n{open}"),
            format!("{open}---\n{MINIMAL}"),
            format!("{map}---\n{service}"),
            list,
        ] {
            let found = finding_messages(&text);
            assert!(found.len() == 1 && found[0].starts_with("fail failure_mode_allow"), "{found:?}\n{text}");
        }
        assert!(finding_messages(&format!("{service}---\n{service}"))[0].contains("does not ask Keyward"));
        assert!(finding_messages(&format!("{MINIMAL}---\na: [\n"))[0].contains("neither YAML nor JSON"));
    }

    #[test]
    fn a_pattern_that_cannot_be_understood_is_reported() {
        let odd = PRODUCTION.replacen(SPELLINGS, "- { safe_regex: { regex: \"(\" } }", 1);
        assert_eq!(finding_messages(&odd).len(), 1);
        assert!(
            finding_messages(&odd)[0].starts_with("not looked at a pattern"),
            "{:?}",
            finding_messages(&odd)
        );
    }

    #[test]
    fn a_bootstrap_that_asks_nobody_is_told() {
        let found = finding_messages("static_resources: {}");
        assert!(found.len() == 1 && found[0].contains("does not ask Keyward"), "{found:?}");
    }

    #[test]
    fn a_body_over_http_is_only_needless() {
        let body =
            "validate_mutations: true\n              with_request_body: { max_request_bytes: 8388608 }";
        let found = finding_messages(&HTTP.replacen("validate_mutations: true", body, 1));
        assert!(found.len() == 1 && found[0].starts_with("warn with_request_body makes"), "{found:?}");
    }

    #[test]
    fn mutation_rules_that_allow_what_keyward_changes_are_no_trap() {
        for rules in [
            "{ allow_all_routing: false }",
            "{ disallow_all: true, allow_expression: { regex: \".*\" } }",
            "{ disallow_expression: { regex: \"x-internal-.*\" } }",
        ] {
            let rules =
                format!("validate_mutations: true\n              decoder_header_mutation_rules: {rules}");
            assert_eq!(
                finding_messages(&PRODUCTION.replacen("validate_mutations: true", &rules, 1)),
                Vec::<String>::new()
            );
        }
    }

    #[test]
    fn an_answer_over_http_replaces_what_the_client_made_up() {
        let bare = HTTP.replacen("allowed_upstream_headers: { patterns: [ { prefix: x-keyward- } ] }", "", 1);
        let found = finding_messages(&bare);
        assert!(found.len() == 1 && found[0].starts_with("fail allowed_upstream_headers lacks"), "{found:?}");
    }
}
