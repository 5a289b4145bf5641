//! Envoy's bootstrap: whether what it says of Keyward keeps the doors that Keyward is to keep. Pure; nothing is asked.
//!
//! The bootstrap is looked at as it is written (static resources; what comes by xDS is not in it). Every finding is
//! about one trap, which `docs/gateway.md` and `deploy/envoy` explain.

mod clusters;
mod identity;
mod listeners;
mod mutations;
mod reading;

use std::time::Duration;

use serde_json::Value;

use crate::{
    config::server::Settings,
    domain::header_name::{IDENTITY, METHOD_OVERRIDES},
    pb::envoy_request::MAX_BODY,
};

use super::Findings;
use reading::{Object as _, Pattern, typed};

pub(super) const ABOUT: &str = "envoy";
const FILTER: &str = ".ext_authz.v3.ExtAuthz";
const PER_ROUTE: &str = ".ext_authz.v3.ExtAuthzPerRoute";
const MANAGER: &str = ".http_connection_manager.v3.HttpConnectionManager";
/// What Envoy waits for when nobody says how long.
const TIMEOUT: Duration = Duration::from_millis(200);
/// Longer, and an outage holds up every request for all of it.
const PATIENT: Duration = Duration::from_secs(1);

/// Looks at a bootstrap in YAML or JSON: one document, or those of several that have an `ext_authz` filter. Bootstraps in
/// the `data` of a Kubernetes `ConfigMap` count as documents.
pub(super) fn examine(name: &str, text: &str, settings: Option<&Settings>, findings: &mut Findings) {
    let redis = settings.and_then(|settings| settings.limits.redis.as_ref()).map(|redis| redis.timeout);
    examine_with(name, text, redis, findings);
}

/// The same. `redis` is how long a Check may wait for Redis, where it does.
fn examine_with(name: &str, text: &str, redis: Option<Duration>, findings: &mut Findings) {
    let documents: Vec<Value> = match serde_saphyr::from_multiple(text) {
        Ok(documents) => documents,
        Err(error) => {
            let said = error.to_string().lines().next().unwrap_or_default().to_owned();
            findings.fail(
                ABOUT,
                format!("{name} is neither YAML nor JSON: {said}"),
                "envoy --mode validate -c FILE",
            );
            return;
        }
    };
    let embedded: Vec<Value> = documents.iter().flat_map(embedded).collect();
    let mut asking =
        documents.iter().chain(&embedded).filter(|root| !typed(root, FILTER).is_empty()).peekable();
    if asking.peek().is_none() {
        let fix = "put envoy.filters.http.ext_authz into its http_filters, as in deploy/envoy/minimal.yaml";
        findings.fail(ABOUT, format!("{name} asks nobody: it has no ext_authz filter"), fix);
    }
    for root in asking {
        examine_value(name, root, redis, findings);
    }
}

/// The files in a `ConfigMap`, or in those of a `List`, that are YAML; nothing of any other document.
fn embedded(document: &Value) -> Vec<Value> {
    let maps: Vec<&Value> = match document.text("kind") {
        "ConfigMap" => vec![document],
        "List" => document.list("items").iter().filter(|item| item.text("kind") == "ConfigMap").collect(),
        "ConfigMapList" => document.list("items").iter().collect(),
        _ => Vec::new(),
    };
    let data = maps.into_iter().filter_map(|map| map.at("data").and_then(Value::as_object));
    let files = data.flatten().filter_map(|(_, file)| file.as_str());
    files.filter_map(|file| serde_saphyr::from_multiple::<Value>(file).ok()).flatten().collect()
}

/// The same of one document.
fn examine_value(name: &str, root: &Value, redis: Option<Duration>, findings: &mut Findings) {
    let before = findings.grave();
    for filter in typed(root, FILTER) {
        examine_filter(filter, redis, findings);
        mutations::examine(filter, findings);
        clusters::examine(root, filter, findings);
    }
    listeners::examine(root, findings);
    identity::examine(root, findings);
    if findings.grave() == before {
        findings.good(
            ABOUT,
            format!(
                "{name}: fails closed, says 503 when Keyward is away, and lets no header or path pass unseen"
            ),
        );
    }
}

fn examine_filter(filter: &Value, redis: Option<Duration>, findings: &mut Findings) {
    if filter.is_true("failure_mode_allow") {
        let said = "failure_mode_allow is true: an outage of Keyward opens every door";
        findings.fail(ABOUT, said, "failure_mode_allow: false");
    }
    let code = filter
        .at("status_on_error")
        .map_or(Value::Null, |status| status.at("code").cloned().unwrap_or_default());
    if code != "ServiceUnavailable" && code != 503 {
        let said = "status_on_error is not 503 (Envoy's default is 403): an outage looks like a bad key, and clients throw good keys away";
        findings.warn(ABOUT, said, "status_on_error: { code: ServiceUnavailable }");
    }
    if !filter.is_true("validate_mutations") {
        let said = "validate_mutations is off: a header value with a line end would be passed on";
        findings.warn(ABOUT, said, "validate_mutations: true");
    }
    if filter.is_true("clear_route_cache") {
        let said = "clear_route_cache is true: a request can change to another route after it was judged by the first";
        findings.fail(ABOUT, said, "take clear_route_cache away");
    }
    if let Some(body) = filter.at("with_request_body") {
        request_body(body, filter.at("http_service").is_some(), findings);
    }
    if filter.is_true("include_peer_certificate") {
        let said =
            "include_peer_certificate sends a whole certificate with each question; Keyward does not read it";
        findings.warn(ABOUT, said, "take include_peer_certificate away");
    }
    if filter.is_true("shadow_mode") {
        findings.warn(
            ABOUT,
            "shadow_mode is on: nothing is ever refused",
            "take shadow_mode away when the trial is over",
        );
    }
    if filter.at("filter_enabled").is_some() && !filter.is_true("deny_at_disable") {
        let said = "filter_enabled: requests outside its share pass unasked";
        findings.warn(ABOUT, said, "take filter_enabled away when the trial is over");
    }
    headers(filter, findings);
    match (filter.at("grpc_service"), filter.at("http_service")) {
        (Some(service), _) => timeout(service, "grpc_service.timeout", redis, findings),
        (None, Some(service)) => {
            timeout(
                service.at("server_uri").unwrap_or(&Value::Null),
                "http_service.server_uri.timeout",
                redis,
                findings,
            );
            http_service(service, findings);
        }
        (None, None) => findings.fail(
            ABOUT,
            "ext_authz has no service to ask",
            "grpc_service with envoy_grpc, as in deploy/envoy",
        ),
    }
}

/// Over HTTP a body of any length is passed over; over gRPC it is part of a message, which has a bound.
fn request_body(body: &Value, over_http: bool, findings: &mut Findings) {
    let most = body.at("max_request_bytes").and_then(Value::as_u64).unwrap_or_default();
    if most > MAX_BODY as u64 && !over_http {
        let said = format!(
            "with_request_body sends bodies of up to {most} bytes along; Keyward answers 413 above {MAX_BODY}"
        );
        findings.fail(ABOUT, said, "take with_request_body away: Keyward does not look at bodies");
    } else {
        let said = "with_request_body makes Envoy hold every body back; Keyward does not look at bodies";
        findings.warn(ABOUT, said, "take with_request_body away");
    }
}

/// Which of a request's headers Keyward sees. What it does not see it does not have removed.
fn headers(filter: &Value, findings: &mut Findings) {
    let over_http = filter.at("http_service").is_some();
    let lists = |name: &str| filter.at(name).map(reading::patterns);
    let (allowed, refused) = (lists("allowed_headers"), lists("disallowed_headers"));
    let sees = |name: &str| {
        allowed.as_ref().map_or(!over_http, |list| list.iter().any(|pattern| pattern.takes(name)))
            && !refused.as_ref().is_some_and(|list| list.iter().any(|pattern| pattern.surely_takes(name)))
    };
    if !IDENTITY.into_iter().chain(["x-keyward-later"]).all(&sees) {
        let said = "Keyward does not see x-keyward-… headers of clients, so it cannot have them removed: a client can make up who it is";
        findings.fail(ABOUT, said, "allowed_headers: { patterns: [ { prefix: x-keyward- } ] }");
    }
    // An underscore never gets so far: see headers_with_underscores_action.
    if !["x.keyward.user", "x!keyward|account", "x-keyward.scopes"].into_iter().all(&sees) {
        let said = "Keyward does not see spellings such as X.Keyward.User, so it cannot have them removed: PHP takes them for X-Keyward-User";
        findings.fail(
            ABOUT,
            said,
            "allowed_headers: { patterns: [ { safe_regex: { regex: \".*[^a-z0-9:-].*\" } } ] }",
        );
    } else if !["x.api.key", "x.original.url", "x.http.method.override"].into_iter().all(&sees) {
        let said = "Keyward does not see spellings such as X.Original.Url, so it cannot have them removed: a service that obeys them can be led around rules";
        findings.warn(
            ABOUT,
            said,
            "allowed_headers: { patterns: [ { safe_regex: { regex: \".*[^a-z0-9:-].*\" } } ] }",
        );
    }
    if !(over_http || sees("authorization")) {
        findings.fail(
            ABOUT,
            "Keyward does not see authorization: every request is denied",
            "add { exact: authorization } to allowed_headers",
        );
    }
    if !METHOD_OVERRIDES.into_iter().all(&sees) {
        let said = "Keyward does not see x-http-method-override and the like: it removes them, and cannot refuse them where rules go by method";
        findings.warn(
            ABOUT,
            said,
            "add x-http-method-override, x-http-method and x-method-override to allowed_headers",
        );
    }
    let uncertain = allowed.iter().chain(&refused).flatten().any(|pattern| matches!(pattern, Pattern::Other));
    if uncertain {
        findings
            .unseen(ABOUT, "a pattern of allowed_headers or disallowed_headers that is not understood here");
    }
}

fn timeout(service: &Value, name: &str, redis: Option<Duration>, findings: &mut Findings) {
    let given = service.at("timeout").and_then(Value::as_str).and_then(reading::duration);
    let timeout = given.unwrap_or(TIMEOUT);
    if given.is_none() {
        findings.warn(
            ABOUT,
            format!("{name} is not set: Envoy waits 200 ms"),
            format!("{name}: 0.25s says what is meant"),
        );
    }
    if timeout.is_zero() || timeout > PATIENT {
        let said =
            format!("{name} is {}: an outage of Keyward holds every request up for so long", spoken(timeout));
        findings.warn(ABOUT, said, "0.25s is much for an answer from memory");
    }
    if redis.is_some_and(|redis| timeout <= redis) && !timeout.is_zero() {
        let said = format!(
            "{name} is no longer than limits.timeout: when Redis is slow, Envoy gives up before Keyward can answer without it"
        );
        findings.warn(ABOUT, said, "make it longer, or limits.timeout shorter");
    }
}

fn spoken(timeout: Duration) -> String {
    if timeout.is_zero() { "0, without an end".to_owned() } else { super::spoken(timeout) }
}

/// What an answer over HTTP may bring to the service.
fn http_service(service: &Value, findings: &mut Findings) {
    let passed =
        service.at("authorization_response").and_then(|answer| answer.at("allowed_upstream_headers"));
    let passed = passed.map(reading::patterns).unwrap_or_default();
    if !IDENTITY.iter().all(|name| passed.iter().any(|pattern| pattern.takes(name))) {
        let said = "allowed_upstream_headers lacks x-keyward-…: what a client sends under these names reaches the service as if Keyward had said it";
        findings.fail(
            ABOUT,
            said,
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
    fn found(text: &str) -> Vec<String> {
        let mut findings = Findings::default();
        let redis = Some(Duration::from_millis(20));
        examine_with("e.yaml", text, redis, &mut findings);
        findings.lines().into_iter().filter(|found| !found.starts_with("ok ")).collect()
    }

    #[test]
    fn the_bootstraps_that_come_with_keyward_have_no_trap() {
        for text in [PRODUCTION, MINIMAL, HTTP] {
            assert_eq!(found(text), Vec::<String>::new());
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
                "warn a listener lets trailers of HTTP/1 in",
            ),
            (
                "outlier_detection:",
                "http_protocol_options: { enable_trailers: true }\n    outlier_detection:",
                "fail cluster keyward passes trailers on",
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
                "fail its cluster keyward does not speak HTTP/2",
            ),
            (
                "address: 127.0.0.1, port_value: 50062",
                "address: keyward.internal, port_value: 50062",
                "fail its cluster keyward reaches keyward.internal without TLS",
            ),
            ("no_traffic_interval: 1s", "", "warn its cluster keyward looks at idle hosts once a minute"),
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
            let found = found(&PRODUCTION.replacen(before, after, 1));
            assert!(found.len() == 1 && found[0].starts_with(said), "{said}: {found:?}");
        }
    }

    #[test]
    fn one_host_needs_no_retries_and_a_pipe_no_tls() {
        let pipe = MINIMAL.replace(
            "socket_address: { address: 127.0.0.1, port_value: 50052 }",
            "pipe: { path: /run/keyward.sock }",
        );
        assert_eq!(found(&pipe), Vec::<String>::new());
    }

    #[test]
    fn json_and_its_names_are_understood() {
        let text = r#"{"staticResources": {"listeners": [{"name": "x", "filter": {
            "@type": "type.googleapis.com/envoy.extensions.filters.http.ext_authz.v3.ExtAuthz", "failureModeAllow": true}}]}}"#;
        let found = found(text);
        assert!(found.iter().any(|said| said.starts_with("fail failure_mode_allow")), "{found:?}");
    }

    #[test]
    fn every_document_of_a_file_is_read() {
        let open = MINIMAL.replace("failure_mode_allow: false", "failure_mode_allow: true");
        let service = "kind: Service\nmetadata: { name: keyward }\n";
        assert_eq!(found(&format!("---\n{service}---\n{MINIMAL}...\n")), Vec::<String>::new());
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
            let found = found(&text);
            assert!(found.len() == 1 && found[0].starts_with("fail failure_mode_allow"), "{found:?}\n{text}");
        }
        assert!(found(&format!("{service}---\n{service}"))[0].contains("asks nobody"));
        assert!(found(&format!("{MINIMAL}---\na: [\n"))[0].contains("neither YAML nor JSON"));
    }

    #[test]
    fn a_pattern_that_cannot_be_understood_is_reported() {
        let odd = PRODUCTION.replacen(SPELLINGS, "- { safe_regex: { regex: \"(\" } }", 1);
        assert_eq!(found(&odd).len(), 1);
        assert!(found(&odd)[0].starts_with("not looked at a pattern"), "{:?}", found(&odd));
    }

    #[test]
    fn a_bootstrap_that_asks_nobody_is_told() {
        let found = found("static_resources: {}");
        assert!(found.len() == 1 && found[0].contains("asks nobody"), "{found:?}");
    }

    #[test]
    fn a_body_over_http_is_only_needless() {
        let body =
            "validate_mutations: true\n              with_request_body: { max_request_bytes: 8388608 }";
        let found = found(&HTTP.replacen("validate_mutations: true", body, 1));
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
                found(&PRODUCTION.replacen("validate_mutations: true", &rules, 1)),
                Vec::<String>::new()
            );
        }
    }

    #[test]
    fn an_answer_over_http_replaces_what_the_client_made_up() {
        let bare = HTTP.replacen("allowed_upstream_headers: { patterns: [ { prefix: x-keyward- } ] }", "", 1);
        let found = found(&bare);
        assert!(found.len() == 1 && found[0].starts_with("fail allowed_upstream_headers lacks"), "{found:?}");
    }
}
