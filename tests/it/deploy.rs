//! What `deploy/` and its documents say of the program, held against the program: metrics, alerts and their runbooks,
//! settings, the compose file. Its Envoy file runs in `walk`. What needs no program is `tools/check-deploy`'s.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    process::Command,
};

use keyward::config::server::{DatabaseArgs, ServeArgs, ServerSettings};
use serde_json::Value;

use crate::{
    postgres::{self, PostgresDatabase, stdout_text},
    process::{KeywardProcess, TestHome, plain_key_request},
};

fn path(file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(file)
}

fn read(file: &str) -> String {
    std::fs::read_to_string(path(file)).unwrap_or_else(|error| panic!("{file}: {error}"))
}

/// Every value of `key`, however deep.
fn values<'a>(json: &'a Value, key: &str, found: &mut Vec<&'a str>) {
    match json {
        Value::Object(object) => {
            found.extend(object.get(key).and_then(Value::as_str));
            object.values().for_each(|value| values(value, key, found));
        }
        Value::Array(list) => list.iter().for_each(|value| values(value, key, found)),
        _ => {}
    }
}

/// What the dashboard asks Prometheus, with Grafana's own variables filled in.
fn dashboard_queries() -> Vec<String> {
    let json: Value = serde_json::from_str(&read("deploy/grafana/keyward.json")).unwrap();
    let mut found = Vec::new();
    values(&json, "expr", &mut found);
    values(&json, "definition", &mut found);
    assert!(found.len() > 40, "{found:?}");
    found.into_iter().map(|expr| expr.replace("$__rate_interval", "1m")).collect()
}

// Metrics. -----------------------------------------------------------------------------------------------------------

/// The labels that samples of a metric have, with their values.
type LabelValues = BTreeMap<String, BTreeSet<String>>;

/// What a server exports: each metric, with its labels if there is a sample of it yet.
struct ExportedMetrics(BTreeMap<String, Option<LabelValues>>);

impl ExportedMetrics {
    fn read(page: &str) -> ExportedMetrics {
        let mut families = BTreeMap::new();
        for line in page.lines() {
            if let Some(family) = line.strip_prefix("# TYPE ") {
                let (name, kind) = family.split_once(' ').unwrap();
                let parts: &[&str] = if kind == "histogram" { &["_bucket", "_sum", "_count"] } else { &[""] };
                families.extend(parts.iter().map(|part| (format!("{name}{part}"), None)));
            } else if !line.starts_with('#') && !line.is_empty() {
                let [named] = &find_metric_references(line)[..] else { panic!("{line}") };
                let labels = families.get_mut(&named.metric).unwrap().get_or_insert_with(LabelValues::new);
                for (label, _, value) in &named.labels {
                    labels.entry(label.clone()).or_default().insert(value.clone());
                }
            }
        }
        ExportedMetrics(families)
    }

    /// What is wrong with how somebody names a metric.
    fn problem(&self, named: &MetricReference) -> Option<String> {
        let Some(sampled) = self.0.get(&named.metric) else { return Some("is not exported".to_owned()) };
        let labels = sampled.as_ref()?;
        // Prometheus adds these.
        let asked = named.labels.iter().filter(|(label, ..)| label != "job" && label != "instance");
        for (label, operator, value) in asked {
            let Some(known) = labels.get(label) else { return Some(format!("has no label {label}")) };
            if !operator.contains('~') && !known.contains(value) {
                return Some(format!("has no {label} {value:?}, but {known:?}"));
            }
        }
        None
    }
}

/// A metric that some text names, with what it says of its labels: label, operator, value.
#[derive(Debug)]
struct MetricReference {
    metric: String,
    labels: Vec<(String, String, String)>,
}

fn is_name(letter: char) -> bool {
    letter.is_ascii_alphanumeric() || letter == '_' || letter == ':'
}

/// The metrics of ours that an expression names.
fn find_metric_references(expression: &str) -> Vec<MetricReference> {
    let mut found = Vec::new();
    let mut rest = expression;
    while let Some(at) = rest.find(is_name) {
        rest = &rest[at..];
        let end = rest.find(|letter| !is_name(letter)).unwrap_or(rest.len());
        let (word, after) = rest.split_at(end);
        rest = after;
        if ["keyward_", "grpc_server_", "process_"].iter().any(|ours| word.starts_with(ours)) {
            let selector = after.strip_prefix('{').and_then(|after| after.split_once('}'));
            let labels = selector.map(|(labels, _)| labels.split(',').map(parse_matcher).collect());
            found.push(MetricReference { metric: word.to_owned(), labels: labels.unwrap_or_default() });
        }
    }
    found
}

fn parse_matcher(text: &str) -> (String, String, String) {
    let (label, rest) =
        text.trim().split_at(text.trim().find(['=', '!']).unwrap_or_else(|| panic!("{text}")));
    let (operator, value) = rest.split_at(rest.find('"').unwrap());
    (label.to_owned(), operator.to_owned(), value.trim_matches('"').to_owned())
}

/// A server with all that has metrics of its own: a database with replicas, a listener with TLS.
fn server_on(database: &PostgresDatabase) -> KeywardProcess {
    let home = TestHome::with_database_url(database.url());
    let mut certificates = Command::new(path("deploy/examples/certificates.sh"));
    postgres::run_checked(certificates.arg(home.path("")));
    let settings = "[[listener]]\nname = 'api'\naddress = '127.0.0.1:0'\nservices = ['check']\n\
        tls = { certificate = 'keyward.crt', key = 'keyward.key' }\n";
    std::fs::write(home.path("keyward.toml"), settings).unwrap();
    let mut command = home.serve_command();
    command.args(["--config", "keyward.toml"]);
    home.start_with(command).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_metric_that_alerts_and_the_dashboard_name_is_exported_with_those_labels() {
    let database = PostgresDatabase::new();
    let server = server_on(&database);
    server.root_caller().create_account("acme").await;
    let (_, token) = server.root_caller().create_key(plain_key_request()).await.unwrap();
    server.root_caller().check_token(&token).await.unwrap();
    let (code, page) = server.fetch_admin_page("/metrics");
    assert_eq!(code, 200);
    let exported = ExportedMetrics::read(&page);
    let alerts = read("deploy/prometheus/alerts.yaml");
    let asked: Vec<_> =
        dashboard_queries().iter().chain([&alerts]).flat_map(|text| find_metric_references(text)).collect();
    assert!(asked.len() > 80, "{}", asked.len());
    let problems: BTreeSet<_> = asked
        .iter()
        .filter_map(|named| Some(format!("{} {}", named.metric, exported.problem(named)?)))
        .collect();
    assert!(problems.is_empty(), "{problems:#?}");
}

#[test]
fn a_metric_or_label_that_is_not_there_is_noticed() {
    let page = "# TYPE keyward_a_total counter\nkeyward_a_total{result=\"ok\"} 1\n\
        # TYPE keyward_b histogram\n# TYPE keyward_d gauge\nkeyward_d 1\n";
    let exported = ExportedMetrics::read(page);
    for (expression, said) in [
        ("rate(keyward_a_total{job=\"x\", result=\"ok\"}[5m])", None),
        ("keyward_a_total{result=~\"ok|no\"} + rate(keyward_b_bucket[1m])", None),
        ("keyward_a_total{result!=\"fine\"}", Some("keyward_a_total has no result \"fine\", but {\"ok\"}")),
        ("keyward_a_total{reason=\"ok\"}", Some("keyward_a_total has no label reason")),
        ("keyward_d{result=\"ok\"}", Some("keyward_d has no label result")),
        ("keyward_b_sum{any=\"thing\"} + keyward_d", None),
        ("keyward_b", Some("keyward_b is not exported")),
        ("keyward_c", Some("keyward_c is not exported")),
    ] {
        let problem = find_metric_references(expression)
            .iter()
            .find_map(|named| Some(format!("{} {}", named.metric, exported.problem(named)?)));
        assert_eq!(problem.as_deref(), said, "{expression}");
    }
}

#[test]
fn the_dashboard_asks_what_prometheus_understands() {
    let home = TestHome::new();
    let mut rules = "groups:\n- name: dashboard\n  rules:\n".to_owned();
    for (at, expr) in dashboard_queries().iter().filter(|expr| !expr.starts_with("label_values")).enumerate()
    {
        rules += &format!("  - record: panel_{at}\n    expr: {}\n", serde_json::to_string(expr).unwrap());
    }
    let file = home.path("rules.yaml");
    std::fs::write(&file, rules).unwrap();
    let mut promtool = Command::new("promtool");
    promtool.args(["check", "rules"]).arg(&file);
    postgres::run_checked(&mut promtool);
}

// Alerts. ------------------------------------------------------------------------------------------------------------

#[test]
fn every_alert_has_its_runbook_and_every_runbook_its_alert() {
    let (alerts, runbooks) = (read("deploy/prometheus/alerts.yaml"), read("docs/runbooks.md"));
    let urgency = |text: &str, start: &str, end: char| {
        text.split_once(start)
            .and_then(|(_, rest)| rest.split(end).next())
            .unwrap_or_default()
            .trim()
            .to_owned()
    };
    let raised: BTreeMap<_, _> = alerts
        .split("- alert: ")
        .skip(1)
        .map(|alert| {
            let name = alert.lines().next().unwrap();
            let place = format!("runbook_url: docs/runbooks.md#{}\n", name.to_lowercase());
            assert!(alert.contains(&place), "{name}: {place}");
            (name, urgency(alert, "severity: ", '}'))
        })
        .collect();
    let explained: BTreeMap<_, _> = runbooks
        .split("\n### ")
        .skip(1)
        .map(|part| (part.lines().next().unwrap(), urgency(part, "\n**", '.')))
        .collect();
    assert!(raised.len() > 20);
    assert_eq!(raised, explained);
}

// Settings. ----------------------------------------------------------------------------------------------------------

#[test]
fn the_settings_that_are_deployed_are_settings_of_this_version() {
    let files = [
        "deploy/compose/keyward.toml",
        "deploy/kubernetes/base/keyward.toml",
        "deploy/kubernetes/overlays/example/keyward.toml",
    ];
    for file in files {
        let database = DatabaseArgs { config: Some(path(file)), ..DatabaseArgs::default() };
        let settings = ServerSettings::load(&ServeArgs { database, ..ServeArgs::default() });
        assert!(settings.is_ok(), "{file}: {}", settings.unwrap_err());
    }
}

/// The compose file as Compose reads it.
fn compose() -> Value {
    let mut loader = Command::new("compose-go");
    loader.args(["-format", "json", "compose.yaml"]).current_dir(path("deploy/compose"));
    serde_json::from_str(&stdout_text(&postgres::run_checked(&mut loader))).unwrap()
}

fn keys(json: &Value) -> BTreeSet<&str> {
    json.as_object().into_iter().flatten().map(|(key, _)| key.as_str()).collect()
}

#[test]
fn every_container_of_the_compose_file_is_confined() {
    for (name, service) in compose()["services"].as_object().unwrap() {
        assert_eq!(service["read_only"], true, "{name}");
        assert_eq!(service["cap_drop"], serde_json::json!(["ALL"]), "{name}");
        assert_eq!(service["security_opt"], serde_json::json!(["no-new-privileges:true"]), "{name}");
        for port in service["ports"].as_array().into_iter().flatten() {
            assert_eq!(port["host_ip"], "127.0.0.1", "{name}");
        }
        let image = service["image"].as_str().unwrap();
        assert!(image.contains(':') && !image.ends_with(":latest"), "{name}: {image} names no version");
        // A secret is a file: of the environment it may be the name alone.
        for (variable, value) in service["environment"].as_object().into_iter().flatten() {
            let secret = ["PASSWORD", "TOKEN", "KEY"].iter().any(|word| variable.ends_with(word));
            assert!(!secret, "{name}: {variable}={value}");
        }
    }
}

#[test]
fn what_the_compose_file_names_is_there() {
    let compose = compose();
    let services = keys(&compose["services"]);
    for (name, service) in compose["services"].as_object().unwrap() {
        assert!(keys(&service["networks"]).is_subset(&keys(&compose["networks"])), "{name}");
        assert!(keys(&service["depends_on"]).is_subset(&services), "{name}");
        for secret in service["secrets"].as_array().into_iter().flatten() {
            let source = secret["source"].as_str().unwrap();
            assert!(keys(&compose["secrets"]).contains(source), "{name}: {source}");
        }
        for volume in service["volumes"].as_array().into_iter().flatten() {
            let source = volume["source"].as_str().unwrap();
            let there = match volume["type"].as_str() {
                Some("bind") => Path::new(source).exists() && volume["read_only"] == true,
                _ => keys(&compose["volumes"]).contains(source),
            };
            assert!(there, "{name}: {source}");
        }
    }
}
