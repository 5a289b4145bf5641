//! What the real server tells of itself: spans to a collector that speaks the real protocol, the page of metrics as
//! promtool reads it, log lines that name their call, the decision log.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    process::{Command, Stdio},
};

use keyward::pb::{
    self,
    envoy::service::auth::v3::{CheckResponse, check_response::HttpResponse},
    envoy_request::{
        EnvoyAttributeContext, EnvoyCheckRequest, EnvoyHttpRequest, EnvoyMapEntry, EnvoyRequest as Asked,
    },
};
use prost::Message as _;
use serde_json::Value;
use tonic::Request;

use crate::{
    collector::SpanCollector,
    envoy::minimal_config,
    process::{
        AuthorizedClients, FinishedProcess, KeywardProcess, TestHome, call_raw, check_request,
        plain_key_request, read_text, wait_for,
    },
    proxy::EnvoyProcess,
    raw_http,
    upstream::{EchoUpstream, ReceivedRequest},
};

const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
const CHECK: &str = "keyward.v1.AuthzService/Check";

/// A caller's span, recorded or not.
fn parent(trace: &str, recorded: bool) -> String {
    format!("00-{trace}-b7ad6b7169203331-0{}", u8::from(recorded))
}

/// A request with these headers.
fn told<T>(message: T, headers: &[(&'static str, &str)]) -> Request<T> {
    let mut request = Request::new(message);
    for (name, value) in headers {
        request.metadata_mut().insert(*name, value.parse().unwrap());
    }
    request
}

/// A server with the account `acme` and these settings and arguments.
async fn start(settings: &str, more: &[&str]) -> (KeywardProcess, AuthorizedClients) {
    let home = TestHome::new();
    std::fs::write(home.path("keyward.toml"), settings).unwrap();
    let mut command = home.serve_command();
    command.args(["--config", "keyward.toml"]).args(more);
    let keyward = home.start_with(command).unwrap_or_else(|ended| panic!("{ended:?}"));
    let mut root = keyward.root_caller();
    root.create_account("acme").await;
    (keyward, root)
}

/// The same, sending spans to a collector.
async fn traced(settings: &str) -> (SpanCollector, KeywardProcess, AuthorizedClients) {
    let collector = SpanCollector::start().await;
    let (keyward, root) = start(settings, &["--otlp-endpoint", &collector.url()]).await;
    (collector, keyward, root)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_checks_span_is_a_child_of_its_callers_and_never_holds_the_token() {
    let (collector, keyward, mut root) = traced("").await;
    let (id, token) = root.create_key(plain_key_request()).await.unwrap();
    let (parent, other) = (parent(TRACE, true), "1af7651916cd43dd8448eb211c80319c");
    let headers = [("traceparent", parent.as_str()), ("tracestate", "vendor=1"), ("x-request-id", "r-7")];
    root.authz.check(told(check_request(&token), &headers)).await.unwrap();
    let span = collector.wait_for_span(TRACE, CHECK).await;
    assert_eq!((span.parent.as_str(), span.state.as_str()), ("b7ad6b7169203331", "vendor=1"));
    let holds = |name: &str| span.attributes.get(name).map(String::as_str);
    for (name, value) in [
        ("rpc.system", "grpc"),
        ("rpc.service", "keyward.v1.AuthzService"),
        ("rpc.method", "Check"),
        ("rpc.grpc.status_code", "0"),
        ("keyward.reason", "ok"),
        ("keyward.account", "acme"),
        ("keyward.key_id", &id),
        ("keyward.request_id", "r-7"),
    ] {
        assert_eq!(holds(name), Some(value), "{name}: {span:?}");
    }
    assert!(holds("keyward.revision").is_some() && holds("keyward.caller").is_some(), "{span:?}");
    assert_eq!(span.resource["service.name"], "keyward");

    // A refusal of the caller is a call as well.
    let headers = [("traceparent", &*parent.replace(TRACE, other))];
    let refused = keyward.caller("unknown").authz.check(told(check_request(&token), &headers)).await;
    assert_eq!(refused.unwrap_err().code(), tonic::Code::Unauthenticated);
    assert_eq!(collector.wait_for_span(other, CHECK).await.attributes["rpc.grpc.status_code"], "16");
    assert!(collector.spans().iter().all(|span| !span.printed.contains(&token[10..])));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_that_nobody_records_makes_no_span() {
    let (collector, keyward, mut root) = traced("").await;
    let (_, token) = root.create_key(plain_key_request()).await.unwrap();
    let other = "1af7651916cd43dd8448eb211c80319c";
    root.authz.check(check_request(&token)).await.unwrap();
    root.authz.check(told(check_request(&token), &[("traceparent", &parent(other, false))])).await.unwrap();
    root.authz.check(told(check_request(&token), &[("traceparent", &parent(TRACE, true))])).await.unwrap();
    keyward.stop();
    let spans = collector.spans();
    assert_eq!(spans.iter().map(|span| &*span.trace).collect::<Vec<_>>(), [TRACE], "{spans:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_share_of_the_calls_is_recorded_though_nobody_asks_for_it() {
    let (collector, keyward, mut root) = traced("[telemetry]\nsample_ratio = 1.0").await;
    let (_, token) = root.create_key(plain_key_request()).await.unwrap();
    root.check_token(&token).await.unwrap();
    let unrecorded = parent(TRACE, false);
    root.authz.check(told(check_request(&token), &[("traceparent", &unrecorded)])).await.unwrap();
    keyward.stop();
    let spans = collector.spans();
    let checks: Vec<_> = spans.iter().filter(|span| span.name == CHECK).collect();
    assert_eq!(checks.len(), 1, "its caller decides, where it says something: {checks:?}");
    assert_eq!(checks[0].parent, "");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_shows_how_long_it_waited_for_what() {
    let (collector, keyward, mut root) = traced("").await;
    let (id, _) = root.create_key(plain_key_request()).await.unwrap();
    let revoke = pb::RevokeKeyRequest { id, ..Default::default() };
    root.keys.revoke(told(revoke, &[("traceparent", &parent(TRACE, true))])).await.unwrap();
    let call = collector.wait_for_span(TRACE, "keyward.v1.KeyService/Revoke").await;
    for step in ["store.commit", "propagation.wait"] {
        assert_eq!(collector.wait_for_span(TRACE, step).await.parent, call.id, "{step}");
    }
    keyward.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn headers_for_the_collector_come_from_a_file() {
    let collector = SpanCollector::start().await;
    let home = TestHome::new();
    std::fs::write(home.path("headers"), "x-collector-token: sesame\n").unwrap();
    let settings =
        format!("[telemetry]\notlp_endpoint = '{}'\notlp_headers_file = 'headers'", collector.url());
    std::fs::write(home.path("keyward.toml"), settings).unwrap();
    let mut command = home.serve_command();
    command.args(["--config", "keyward.toml", "--log", "trace"]).env("OTEL_SERVICE_NAME", "keys");
    let keyward = home.start_with(command).unwrap();
    let account = pb::ListAccountsRequest::default();
    keyward
        .root_caller()
        .accounts
        .list(told(account, &[("traceparent", &parent(TRACE, true))]))
        .await
        .unwrap();
    let span = collector.wait_for_span(TRACE, "keyward.v1.AccountService/List").await;
    assert_eq!(span.resource["service.name"], "keys");
    assert_eq!(collector.headers()[0]["x-collector-token"], "sesame");
    assert!(!keyward.process.stderr().contains("sesame"));
}

fn pair(key: &str, value: &str) -> EnvoyMapEntry {
    EnvoyMapEntry { key: key.to_owned().into(), value: value.to_owned().into() }
}

/// What Envoy asks about a request with these headers to a route that needs `monitors:read` in production.
async fn envoy_asks(keyward: &KeywardProcess, headers: &[(&str, &str)]) -> CheckResponse {
    let http = EnvoyHttpRequest {
        id: "1234".into(),
        method: "GET".into(),
        path: "/v1/monitors".into(),
        host: "api.test".into(),
        headers: headers.iter().map(|(name, value)| pair(name, value)).collect(),
        ..EnvoyHttpRequest::default()
    };
    let extensions = vec![pair("scope", "monitors:read"), pair("environment", "production")];
    let request = Some(Asked { http: Some(http) });
    let attributes = EnvoyAttributeContext { request, context_extensions: extensions, ..Default::default() };
    let message = EnvoyCheckRequest { attributes: Some(attributes) }.encode_to_vec();
    let once = futures_util::stream::iter([bytes::Bytes::from(message)]);
    let method = "envoy.service.auth.v3.Authorization/Check";
    let answer = call_raw(keyward.channel(), &keyward.home.root_key(), method, once).await.unwrap();
    CheckResponse::decode(answer).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_envoy_asks_is_part_of_the_trace_of_the_request_that_it_asks_about() {
    let (collector, keyward, mut root) = traced("").await;
    let (id, token) = root.create_key(plain_key_request()).await.unwrap();
    let (bearer, parent) = (format!("Bearer {token}"), parent(TRACE, true));
    envoy_asks(&keyward, &[("authorization", &bearer), ("traceparent", &parent)]).await;
    let span = collector.wait_for_span(TRACE, "envoy.service.auth.v3.Authorization/Check").await;
    assert_eq!(span.parent, "b7ad6b7169203331");
    assert_eq!((&*span.attributes["keyward.key_id"], &*span.attributes["keyward.reason"]), (&*id, "ok"));
    assert!(!span.printed.contains(&token[10..]));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_becomes_of_a_requests_trace_behind_envoy_is_left_to_envoy() {
    let (collector, keyward, mut root) = traced("").await;
    let (_, token) = root.create_key(plain_key_request()).await.unwrap();
    let (bearer, parent) = (format!("Bearer {token}"), parent(TRACE, true));
    let headers = [("authorization", &*bearer), ("traceparent", &*parent), ("tracestate", "vendor=1")];
    let answer = envoy_asks(&keyward, &headers).await;
    collector.wait_for_span(TRACE, "envoy.service.auth.v3.Authorization/Check").await;
    let Some(HttpResponse::OkResponse(ok)) = answer.http_response else { panic!("{answer:?}") };
    let set = ok.headers.into_iter().chain(ok.response_headers_to_add);
    let touched = set.filter_map(|option| Some(option.header?.key)).chain(ok.headers_to_remove);
    for name in touched {
        assert!(!name.starts_with("trace"), "{name}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_behind_envoy_gets_the_trace_that_the_client_sent() {
    let (collector, home, upstream) = (SpanCollector::start().await, TestHome::new(), EchoUpstream::start());
    let mut command = home.serve_command();
    command.args(["--envoy-listen", "127.0.0.1:0", "--otlp-endpoint", &collector.url()]);
    let keyward = home.start_with(command).unwrap();
    let mut root = keyward.root_caller();
    root.create_account("acme").await;
    let (_, token) = root.create_key(plain_key_request()).await.unwrap();
    let envoy = EnvoyProcess::start(&minimal_config(keyward.process.envoy_address().unwrap(), &upstream));
    let sent = parent(TRACE, true);
    let request = raw_http::RawRequest::get("/v1/monitors").bearer(&token);
    let request = request.header("traceparent", &sent).header("tracestate", "vendor=1");
    let arrived = ReceivedRequest::from_answer(&request.send(envoy.listener_address("edge")).body);
    assert_eq!(
        (arrived.header_values("traceparent"), arrived.header_values("tracestate")),
        (vec![&*sent], vec!["vendor=1"])
    );
    let span = collector.wait_for_span(TRACE, "envoy.service.auth.v3.Authorization/Check").await;
    assert_eq!((span.parent.as_str(), span.state.as_str()), ("b7ad6b7169203331", "vendor=1"));
}

/// Runs a client command as root in this trace.
fn client(keyward: &KeywardProcess, arguments: &[&str], trace: [&str; 2]) -> FinishedProcess {
    let mut command = keyward.home.command(arguments);
    command
        .args(["--server", &keyward.address.to_string(), "--token-file"])
        .arg(keyward.home.root_key_file());
    command.env("TRACEPARENT", trace[0]).env("TRACESTATE", trace[1]);
    keyward.home.run_to_end(command)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_cli_calls_is_part_of_the_trace_that_it_was_started_in() {
    let (collector, keyward, _root) = traced("").await;
    let trace = [&*parent(TRACE, true), "vendor=1"];
    let listed = client(&keyward, &["accounts", "list"], trace);
    assert_eq!(listed.code, Some(0), "{listed:?}");
    let span = collector.wait_for_span(TRACE, "keyward.v1.AccountService/List").await;
    assert_eq!((span.parent.as_str(), span.state.as_str()), ("b7ad6b7169203331", "vendor=1"));

    // Who reads the refusal finds the call.
    let refused = client(&keyward, &["keys", "get", "0197f0c0-0000-7000-8000-000000000000"], trace);
    let span = collector.wait_for_span(TRACE, "keyward.v1.KeyService/Get").await;
    let id = &span.attributes["keyward.request_id"];
    assert!(uuid::Uuid::parse_str(id).is_ok(), "{span:?}");
    assert!(refused.code == Some(1) && refused.err.contains(&format!("request id: {id}\n")), "{refused:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_cli_calls_all_the_same_where_the_environment_names_no_trace() {
    let (collector, keyward, _root) = traced("").await;
    for trace in [["", ""], ["kw_live_x", "vendor=1"], [&*parent(TRACE, false), "vendor=1"]] {
        let listed = client(&keyward, &["accounts", "list"], trace);
        assert_eq!((listed.code, listed.err.as_str()), (Some(0), ""), "{trace:?}");
    }
    keyward.stop();
    assert_eq!(collector.spans().len(), 0);
}

/// A figure of the page, by the start of its line.
fn figure(keyward: &KeywardProcess, start: &str) -> f64 {
    let page = keyward.fetch_admin_page("/metrics").1;
    let line = page.lines().find(|line| line.starts_with(start)).unwrap_or_else(|| panic!("{start}: {page}"));
    line.rsplit_once(' ').unwrap().1.parse().unwrap()
}

async fn answers_and_stops(endpoint: &str) {
    let (keyward, mut root) = start("[telemetry]\nsample_ratio = 1.0", &["--otlp-endpoint", endpoint]).await;
    let (_, token) = root.create_key(plain_key_request()).await.unwrap();
    // More than the queue holds.
    for _ in 0..6000 {
        assert_eq!(root.check_token(&token).await.unwrap(), pb::Reason::Ok);
    }
    wait_for("spans to be counted as lost", || {
        (figure(&keyward, "keyward_traces_dropped_total") > 0.0).then_some(())
    });
    keyward.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_are_answered_and_the_server_stops_while_the_collector_is_away() {
    let gone = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    answers_and_stops(&format!("http://{gone}")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_are_answered_and_the_server_stops_while_the_collector_hangs() {
    let collector = SpanCollector::start_hanging().await;
    answers_and_stops(&collector.url()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn log_lines_name_their_call() {
    let headers = [("traceparent", &*parent(TRACE, false)), ("x-request-id", "r-7")];
    for (format, named) in [
        ("text", format!("request_id=r-7 trace_id={TRACE}\n")),
        ("json", format!("\"request_id\":\"r-7\",\"trace_id\":\"{TRACE}\"}}\n")),
    ] {
        let (keyward, mut root) = start("", &["--log-format", format]).await;
        let create = root.keys.create(told(plain_key_request(), &headers)).await.unwrap();
        assert_eq!(create.metadata().get("x-request-id").unwrap(), "r-7");
        let made =
            root.keys.create(told(plain_key_request(), &[("x-request-id", "kw_live_x")])).await.unwrap();
        let made = made.metadata().get("x-request-id").unwrap().to_str().unwrap().to_owned();
        assert_eq!(uuid::Uuid::parse_str(&made).unwrap().get_version_num(), 7);
        let log = wait_for("both lines", || {
            let log = keyward.process.stderr();
            (log.matches("KeyService/Create").count() == 2).then_some(log)
        });
        assert!(log.contains(&named) && log.contains(&made) && !log.contains("kw_live_x"), "{log}");
        if format == "json" {
            log.lines().for_each(|line| assert!(serde_json::from_str::<Value>(line).is_ok(), "{line}"));
        }
    }
}

/// Runs `promtool check metrics` on a page: what it complains of.
fn complaints(page: &str) -> String {
    let program = std::env::var_os("KEYWARD_PROMTOOL").unwrap_or_else(|| "promtool".into());
    let mut child = Command::new(&program)
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| {
            panic!(
                "{} does not run ({error}): 'make tools' installs promtool into .tools/bin, where 'make test' \
                 finds it; or name one in KEYWARD_PROMTOOL",
                program.display()
            )
        });
    std::io::Write::write_all(&mut child.stdin.take().unwrap(), page.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let said = [output.stdout, output.stderr].map(|said| String::from_utf8(said).unwrap()).concat();
    if output.status.success() { said } else { format!("{}\n{said}", output.status) }
}

/// The samples of a page: metric, and labels.
fn samples(page: &str) -> Vec<(&str, BTreeMap<&str, &str>)> {
    let lines = page.lines().filter(|line| !line.starts_with('#'));
    lines
        .map(|line| {
            let (series, _) = line.rsplit_once(' ').unwrap();
            let (name, labels) = series.split_once('{').unwrap_or((series, ""));
            let labels = labels.trim_end_matches('}').split(',').filter(|label| !label.is_empty());
            let labels = labels.map(|label| {
                let (name, value) = label.split_once('=').unwrap_or_else(|| panic!("{line}"));
                (name, value.trim_matches('"'))
            });
            (name, labels.collect())
        })
        .collect()
}

/// The rows of the table under a heading of a page in `docs`: first and second column, without quotes.
fn documented(heading: &str) -> Vec<(String, String)> {
    let page = read_text(&Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/telemetry.md"));
    let (_, rest) = page.split_once(&format!("## {heading}\n")).unwrap();
    let section = rest.split("\n## ").next().unwrap();
    let rows = section.lines().filter(|line| line.starts_with("| `"));
    rows.map(|row| {
        let mut cells = row.trim_matches('|').split(" | ").map(|cell| cell.trim().replace('`', ""));
        (cells.next().unwrap(), cells.next().unwrap())
    })
    .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_page_of_metrics_is_as_documented_whatever_is_asked() {
    let (keyward, mut root) = start("[decision_log]\nfile = 'decisions'", &[]).await;
    let (id, token) = root.create_key(plain_key_request()).await.unwrap();
    root.check_token(&token).await.unwrap();
    root.check_token("\"} 1\nkeyward_forged 1").await.unwrap();
    envoy_asks(&keyward, &[("x-evil", "\"} 1")]).await;
    root.revoke_key(&id).await.unwrap();
    for method in ["keyward.v1.AuthzService/Evil", "evil{a=\"b\"}/x", "a/b/c/d", "grpc.health.v1.Health/Nope"]
    {
        let none = futures_util::stream::iter([bytes::Bytes::new()]);
        if let Ok(path) = format!("/{method}").parse::<::http::uri::PathAndQuery>() {
            call_raw(keyward.channel(), "evil", &path.as_str()[1..], none).await.unwrap_err();
        }
    }
    let page = keyward.fetch_admin_page("/metrics").1;
    assert_eq!(complaints(&page), "", "{page}");

    let table = documented("Metrics");
    let known: BTreeMap<_, BTreeSet<_>> = table
        .iter()
        .map(|(name, labels)| (name.as_str(), labels.split(", ").filter(|label| *label != "-").collect()))
        .collect();
    let families: Vec<_> = page.lines().filter_map(|line| line.strip_prefix("# TYPE ")).collect();
    let families: BTreeSet<_> = families.iter().map(|line| line.split(' ').next().unwrap()).collect();
    for (name, labels) in samples(&page) {
        let ends = ["_bucket", "_sum", "_count"];
        let family =
            ends.iter().find_map(|end| name.strip_suffix(end).filter(|name| families.contains(name)));
        let family = family.unwrap_or(name);
        let told = labels.keys().copied().filter(|label| *label != "le").collect::<BTreeSet<_>>();
        assert_eq!(known.get(family), Some(&told), "{name} {labels:?}");
    }
    // What only replicas have, and servers with TLS, is not on this page.
    let elsewhere = ["lease", "staleness", "regressed", "replicas", "renewals", "feed", "clock", "tls"];
    for name in known.keys().filter(|name| !elsewhere.iter().any(|word| name.contains(word))) {
        assert!(families.contains(name), "{name} is documented and not there");
    }
    assert!(!page.to_ascii_lowercase().contains("evil") && !page.contains("forged"), "{page}");
    let methods = samples(&page).into_iter().filter_map(|(_, labels)| labels.get("grpc_method").copied());
    assert!(methods.clone().any(|method| method == "unknown"));
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_are_counted_by_method_and_code() {
    let (keyward, mut root) = start("", &[]).await;
    root.get_key("no id").await.unwrap_err();
    root.check_token("unknown").await.unwrap();
    let labels = |service: &str, method: &str| {
        format!("{{grpc_type=\"unary\",grpc_service=\"keyward.v1.{service}\",grpc_method=\"{method}\"")
    };
    let counted = |name: &str, labels: String| figure(&keyward, &format!("{name}{labels}"));
    let (get, check) = (labels("KeyService", "Get"), labels("AuthzService", "Check"));
    assert_eq!(counted("grpc_server_started_total", get.clone()), 1.0);
    assert_eq!(counted("grpc_server_handled_total", format!("{get},grpc_code=\"InvalidArgument\"}}")), 1.0);
    assert_eq!(counted("grpc_server_handled_total", format!("{get},grpc_code=\"OK\"}}")), 0.0);
    assert_eq!(counted("grpc_server_handling_seconds_count", check.clone()), 1.0);
    assert_eq!(counted("grpc_server_handling_seconds_bucket", format!("{check},le=\"+Inf\"}}")), 1.0);
}

/// The lines of a decision log, once there are so many.
fn decisions(keyward: &KeywardProcess, count: usize) -> Vec<Value> {
    wait_for("decisions", || {
        let text = std::fs::read_to_string(keyward.home.path("decisions")).ok()?;
        let lines: Vec<_> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        (lines.len() >= count).then_some(lines)
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn denials_and_what_is_taken_away_are_written_down_by_an_id_that_their_askers_hear() {
    let (keyward, mut root) = start("[decision_log]\nfile = 'decisions'", &[]).await;
    let (id, token) = root.create_key(plain_key_request()).await.unwrap();
    let allowed = root.authz.check(check_request(&token)).await.unwrap();
    assert!(allowed.metadata().get("x-keyward-decision-id").is_none(), "it is not written down");
    let denied = pb::CheckRequest {
        scopes: vec!["monitors:read".to_owned(), "monitors:write".to_owned()],
        customer: Some("c-1".to_owned()),
        client_ip: Some("192.0.2.9".to_owned()),
        ..check_request(&token)
    };
    let headers = [("traceparent", &*parent(TRACE, false)), ("x-request-id", "r-7")];
    let denied = root.authz.check(told(denied, &headers)).await.unwrap();
    let heard = denied.metadata().get("x-keyward-decision-id").unwrap().to_str().unwrap().to_owned();
    assert_eq!(uuid::Uuid::parse_str(&heard).unwrap().get_version_num(), 7);
    let answer = envoy_asks(&keyward, &[("x-request-id", "r-8")]).await;
    let fields = answer.dynamic_metadata.unwrap().fields;
    let kind = fields["decision_id"].kind.clone().unwrap();
    let prost_types::value::Kind::StringValue(to_envoy) = kind else { panic!("{kind:?}") };
    root.revoke_key(&id).await.unwrap();

    let lines = decisions(&keyward, 3);
    assert_eq!(lines.len(), 3, "{lines:?}");
    let expected = serde_json::json!({
        "decision_id": heard, "kind": "check", "allowed": false, "reason": "missing_scope", "key_id": id,
        "account": "acme", "environment": "production", "needed_scopes": ["monitors:read", "monitors:write"],
        "missing_scopes": ["monitors:write"], "customer": "c-1", "client_ip": "192.0.2.9",
        "peer": "127.0.0.1", "request_id": "r-7", "trace_id": TRACE,
    });
    for (field, value) in expected.as_object().unwrap() {
        assert_eq!(lines[0][field], *value, "{field}");
    }
    assert!(lines[0]["revision"].as_u64().unwrap() > 0 && lines[0]["time"].as_str().unwrap().ends_with('Z'));
    let envoys = &lines[1];
    assert_eq!((&envoys["decision_id"], &envoys["reason"]), (&to_envoy.into(), &"no_credential".into()));
    assert_eq!((&envoys["http_id"], &envoys["request_id"]), (&"1234".into(), &"r-8".into()));
    let change = &lines[2];
    let said = ["kind", "action", "key_id", "account", "method"].map(|field| change[field].as_str().unwrap());
    assert_eq!(said, ["change", "key.revoked", &id, "acme", "keyward.v1.KeyService/Revoke"]);
    let home = keyward.stop();
    assert!(!read_text(&home.path("decisions")).contains(&token[10..]));
}

#[tokio::test(flavor = "multi_thread")]
async fn every_way_of_taking_away_is_written_down_and_no_other_change() {
    let (keyward, mut root) = start("[decision_log]\nfile = 'decisions'\ndenials = 0.0", &[]).await;
    let (id, _) = root.create_key(plain_key_request()).await.unwrap();
    root.check_token("unknown").await.unwrap();
    let id = || id.clone();
    let update = |scopes: &[&str]| pb::UpdateKeyRequest {
        key: Some(pb::Key {
            id: id(),
            scopes: scopes.iter().map(ToString::to_string).collect(),
            ..Default::default()
        }),
        update_mask: Some(prost_types::FieldMask { paths: vec!["scopes".to_owned()] }),
    };
    root.keys.update(update(&["monitors:read", "monitors:write"])).await.unwrap();
    root.keys.update(update(&["monitors:read"])).await.unwrap();
    root.keys.disable(pb::DisableKeyRequest { id: id() }).await.unwrap();
    root.keys.enable(pb::EnableKeyRequest { id: id() }).await.unwrap();
    root.rotate_key(&id()).await.unwrap();
    root.accounts.suspend(pb::SuspendAccountRequest { id: "acme".to_owned() }).await.unwrap();
    root.accounts.resume(pb::ResumeAccountRequest { id: "acme".to_owned() }).await.unwrap();
    let role = |scopes: &[&str]| pb::PutRoleRequest {
        account: "acme".to_owned(),
        name: "reader".to_owned(),
        scopes: scopes.iter().map(ToString::to_string).collect(),
    };
    root.accounts.put_role(role(&["a:read", "b:read"])).await.unwrap();
    root.accounts.put_role(role(&["a:read"])).await.unwrap();
    let delete = pb::DeleteRoleRequest { account: "acme".to_owned(), name: "reader".to_owned() };
    root.accounts.delete_role(delete).await.unwrap();
    root.revoke_key(&id()).await.unwrap();
    root.revoke_key(&id()).await.unwrap();
    let home = keyward.stop();
    let text = read_text(&home.path("decisions"));
    let lines = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let actions: Vec<_> = lines.map(|line| line["action"].as_str().unwrap().to_owned()).collect();
    let expected = [
        "key.updated",
        "key.disabled",
        "key.rotated",
        "account.suspended",
        "role.put",
        "role.deleted",
        "key.revoked",
    ];
    assert_eq!(actions, expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_file_decisions_go_to_the_log() {
    let (keyward, mut root) = start("[decision_log]\nallowed = 1.0", &["--log-format", "json"]).await;
    let (id, token) = root.create_key(plain_key_request()).await.unwrap();
    let allowed = root.authz.check(check_request(&token)).await.unwrap();
    let heard = allowed.metadata().get("x-keyward-decision-id").unwrap().to_str().unwrap().to_owned();
    let line = wait_for("the decision", || {
        let log = keyward.process.stderr();
        let line = log.lines().find(|line| line.contains("keyward::decision") && line.contains(&heard))?;
        Some(serde_json::from_str::<Value>(line).unwrap())
    });
    assert_eq!((&line["fields"]["key_id"], &line["fields"]["reason"]), (&id.into(), &"ok".into()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_proxy_that_asks_over_http_is_told_of_as_well() {
    let collector = SpanCollector::start().await;
    let home = TestHome::new();
    std::fs::write(home.path("keyward.toml"), "[decision_log]\nfile = 'decisions'").unwrap();
    let mut command = home.serve_command();
    command.args(["--config", "keyward.toml", "--forward-auth-listen", "127.0.0.1:0"]);
    command.args(["--otlp-endpoint", &collector.url()]);
    let keyward = home.start_with(command).unwrap();
    let out = keyward.process.stdout();
    let address = out.split_once("Traefik and Envoy on http://").unwrap().1.split('/').next().unwrap();
    let request = raw_http::RawRequest::get("/auth/nginx?scope=monitors:read&environment=production")
        .header("x-original-method", "GET")
        .header("x-original-host", "api.test")
        .header("x-original-uri", "/v1/monitors")
        .header("x-request-id", "r-9")
        .header("traceparent", parent(TRACE, true));
    let address = address.parse().unwrap();
    let status = tokio::task::spawn_blocking(move || request.send(address).status).await.unwrap();
    assert_eq!(status, 401);
    let line = &decisions(&keyward, 1)[0];
    let said =
        ["kind", "reason", "request_id", "trace_id", "peer"].map(|field| line[field].as_str().unwrap());
    assert_eq!(said, ["forward_auth", "no_credential", "r-9", TRACE, "127.0.0.1"]);
    assert_eq!(
        collector.wait_for_span(TRACE, "forward_auth").await.attributes["keyward.reason"],
        "no_credential"
    );
}
