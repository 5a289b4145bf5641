//! The real Envoy with the files of `deploy/envoy`, the real server, and a service behind: what clients hear, what
//! the service sees, and that neither a change of rules nor a dying server costs a request.

use std::{collections::BTreeMap, net::SocketAddr, path::Path, sync::Arc};

use keyward::{
    clock::{SystemClock, SystemEntropy},
    config::server::{DatabaseArgs, ServerSettings},
    decision_log::DecisionLog,
    engine::index::Index,
    grpc::{
        self,
        serve::{BoundListener, WorkerCapacity, WorkerPool, accept_connections},
    },
    pb,
    server::replicas::ReplicationRuntime,
    store,
    transport::{ListenAddress, ListenerSettings, OverloadLimits, ServiceSet, socket::BoundSocket},
};
use sha2::{Digest as _, Sha256};
use tonic::{
    Code,
    transport::{Channel, Endpoint},
};

use crate::{
    background_load::{BackgroundLoad, StatusCounts},
    process::{
        AuthorizedClients, KeywardProcess, TestHome, WAIT_TIMEOUT, call_raw, plain_key_request, wait_for,
    },
    proxy::{EnvoyProcess, fill_placeholders},
    raw_http::{RawConnection, RawRequest, RawResponse},
    upstream::{EchoUpstream, ReceivedRequest},
};

pub(crate) fn read_deployed_file(file: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/envoy").join(file);
    std::fs::read_to_string(path).unwrap()
}

pub(crate) fn port_placeholder(number: u16) -> String {
    format!("port_value: {number} }}")
}

/// `deploy/envoy/minimal.yaml` with the ports of a test.
pub(crate) fn minimal_config(keyward: SocketAddr, upstream: &EchoUpstream) -> String {
    fill_placeholders(
        &read_deployed_file("minimal.yaml"),
        &[
            (&port_placeholder(10000), &port_placeholder(0)),
            (&port_placeholder(50052), &port_placeholder(keyward.port())),
            (&port_placeholder(8080), &port_placeholder(upstream.address.port())),
        ],
    )
}

/// `deploy/envoy/production.yaml` with the ports of a test.
fn production_config(keywards: [SocketAddr; 2], upstream: &EchoUpstream, per_key: &str) -> String {
    fill_placeholders(
        &read_deployed_file("production.yaml"),
        &[
            ("{ max_tokens: 1000, tokens_per_fill: 1000, fill_interval: 1s }", per_key),
            (&port_placeholder(10000), &port_placeholder(0)),
            (&port_placeholder(9901), &port_placeholder(0)),
            (&port_placeholder(50052), &port_placeholder(keywards[0].port())),
            (&port_placeholder(50062), &port_placeholder(keywards[1].port())),
            (&port_placeholder(8080), &port_placeholder(upstream.address.port())),
        ],
    )
}

/// A server with the account `acme` that Envoy can ask.
async fn start_keyward(more: &[&str]) -> KeywardProcess {
    let home = TestHome::new();
    let mut command = home.serve_command();
    command.args(["--envoy-listen", "127.0.0.1:0"]).args(more);
    let keyward = home.start_with(command).unwrap_or_else(|ended| panic!("{ended:?}"));
    keyward.root_caller().create_account("acme").await;
    keyward
}

fn envoy_listener(keyward: &KeywardProcess) -> SocketAddr {
    keyward.process.envoy_address().unwrap()
}

/// Keyward, a service, and Envoy with the minimal file.
struct EnvoySetup {
    keyward: KeywardProcess,
    root: AuthorizedClients,
    upstream: EchoUpstream,
    envoy: EnvoyProcess,
}

impl EnvoySetup {
    async fn start() -> EnvoySetup {
        let (keyward, upstream) = (start_keyward(&[]).await, EchoUpstream::start());
        let envoy = EnvoyProcess::start(&minimal_config(envoy_listener(&keyward), &upstream));
        EnvoySetup { root: keyward.root_caller(), keyward, upstream, envoy }
    }

    fn address(&self) -> SocketAddr {
        self.envoy.listener_address("edge")
    }

    fn get(&self, token: &str) -> RawResponse {
        RawRequest::get("/v1/monitors").bearer(token).send(self.address())
    }
}

fn denial_code(response: &RawResponse) -> String {
    response.json()["error"]["code"].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn envoy_lets_a_key_pass_and_hides_it_from_the_service() {
    let mut edge = EnvoySetup::start().await;
    let (id, token) = edge.root.create_key(plain_key_request()).await.unwrap();
    let request = RawRequest::get("/v1/monitors?limit=1")
        .bearer(&token)
        .header("x-keyward-user", "root")
        .header("x-keyward-account", "other");
    let response = request.send(edge.address());
    assert_eq!(response.status, 200, "{response:?}");
    let arrived = ReceivedRequest::from_answer(&response.body);
    assert_eq!(arrived.target, "/v1/monitors?limit=1");
    assert_eq!(arrived.header_values("x-keyward-key-id"), [id.as_str()]);
    assert_eq!(
        arrived.header_values("x-keyward-account"),
        ["acme"],
        "what the client says of itself is gone"
    );
    assert_eq!(arrived.header_values("x-keyward-scopes"), ["monitors:read"]);
    assert!(
        arrived.header_values("x-keyward-user").is_empty()
            && arrived.header_values("authorization").is_empty()
    );
    let underscored = RawRequest::get("/v1/monitors").bearer(&token).header("x_keyward_account", "other");
    assert_eq!(underscored.send(edge.address()).status, 400);
    assert_eq!(edge.upstream.take_received().len(), 1);
    let metrics = edge.keyward.fetch_admin_page("/metrics").1;
    let counted =
        r#"keyward_gateway_requests_total{via="ext_authz",mode="enforce",result="allowed",reason="ok"} 1"#;
    assert!(metrics.contains(counted), "{metrics}");
}

#[tokio::test]
async fn envoy_refuses_with_the_bodies_that_clients_know() {
    let mut edge = EnvoySetup::start().await;
    let none = RawRequest::get("/v1/monitors").send(edge.address());
    assert_eq!((none.status, denial_code(&none).as_str()), (401, "UNAUTHORIZED"));
    assert_eq!(none.header("www-authenticate"), Some(r#"Bearer realm="keyward""#));
    assert_eq!(none.header("content-type"), Some("application/json"));

    let other = pb::CreateKeyRequest { scopes: vec!["alerts:read".into()], ..plain_key_request() };
    let (_, wrong) = edge.root.create_key(other).await.unwrap();
    let forbidden = edge.get(&wrong);
    assert_eq!((forbidden.status, denial_code(&forbidden).as_str()), (403, "FORBIDDEN"));
    assert!(forbidden.header("www-authenticate").unwrap().contains("insufficient_scope"));

    let limit = pb::RateLimit {
        name: "burst".into(),
        limit: 1,
        window: Some(prost_types::Duration { seconds: 3600, nanos: 0 }),
    };
    let limited =
        edge.root.create_key(pb::CreateKeyRequest { rate_limits: vec![limit], ..plain_key_request() });
    let (_, limited) = limited.await.unwrap();
    let passed = edge.get(&limited);
    assert_eq!((passed.status, passed.header("ratelimit-policy")), (200, Some(r#""burst";q=1;w=3600"#)));
    let refused = edge.get(&limited);
    assert_eq!((refused.status, denial_code(&refused).as_str()), (429, "RATE_LIMITED"));
    let wait: u64 = refused.header("retry-after").unwrap().parse().unwrap();
    assert!((3500..=3600).contains(&wait), "{wait}");

    let twice = RawRequest::get("/v1/monitors").bearer(&limited).bearer("another").send(edge.address());
    assert_eq!(twice.status, 401);
    assert_eq!(edge.upstream.take_received().len(), 1, "no refused request arrived");
}

#[tokio::test]
async fn a_route_can_be_public() {
    let edge = EnvoySetup::start().await;
    let response = RawRequest::get("/health").header("x-keyward-account", "acme").send(edge.address());
    assert_eq!(response.status, 200);
    assert!(ReceivedRequest::from_answer(&response.body).header_values("x-keyward-account").is_empty());
}

#[tokio::test]
async fn no_spelling_of_a_path_gets_around_a_route() {
    let mut edge = EnvoySetup::start().await;
    let (_, token) = edge.root.create_key(plain_key_request()).await.unwrap();
    for path in [
        "/health/../v1/monitors",
        "/health/%2e%2e/v1/monitors",
        "/health/..;/v1/monitors",
        "/health%2f..%2fv1/monitors",
        "/health\\..\\v1/monitors",
        "/health/..%5cv1/monitors",
        "//v1/monitors",
        "/./v1/monitors",
        "/health/%252e%252e/v1/monitors",
        "/v1/monitors%00",
        "/v1/monitors#/health",
        "/health?/../v1/monitors/..",
    ] {
        let response = RawRequest::get(path).send(edge.address());
        let harmless = path.starts_with("/health?");
        assert_eq!(response.status == 200, harmless, "{path}: {response:?}");
        assert!([400, 401].contains(&response.status) || harmless, "{path}: {response:?}");
        if let Some(arrived) = edge.upstream.take_received().first() {
            assert!(harmless && arrived.target.starts_with("/health?"), "{arrived:?}");
        }
    }
    let odd =
        RawRequest::get("/v1//%6donitors/").bearer(&token).host("API.Example:8443").send(edge.address());
    assert_eq!(odd.status, 200, "{odd:?}");
}

#[tokio::test]
async fn headers_in_heaps_and_in_odd_bytes_are_no_way_around() {
    let mut edge = EnvoySetup::start().await;
    let (_, token) = edge.root.create_key(plain_key_request()).await.unwrap();
    let large = RawRequest::get("/v1/monitors").bearer(&token).header("x-large", vec![b'a'; 50 * 1024]);
    assert_eq!(large.send(edge.address()).status, 200);
    let too_large = RawRequest::get("/v1/monitors").bearer(&token).header("x-large", vec![b'a'; 62 * 1024]);
    assert_eq!(too_large.send(edge.address()).status, 431, "Envoy's own limit");
    let many = (0..80).fold(RawRequest::get("/v1/monitors").bearer(&token), |request, number| {
        request.header(format!("x-{number}"), "1")
    });
    assert_eq!(many.send(edge.address()).status, 200);
    let odd = RawRequest::get("/v1/monitors").header("authorization", b"Bearer caf\xe9");
    assert_eq!(odd.send(edge.address()).status, 401);
    let odd = RawRequest::get("/v1/monitors").bearer(&token).header("x-odd", b"caf\xe9");
    assert_eq!(odd.send(edge.address()).status, 200);
}

#[tokio::test]
async fn a_keyward_that_is_gone_is_503_and_back_again_is_back() {
    let mut edge = EnvoySetup::start().await;
    let (_, token) = edge.root.create_key(plain_key_request()).await.unwrap();
    assert_eq!(edge.get(&token).status, 200);
    let listener = envoy_listener(&edge.keyward).to_string();
    let home = edge.keyward.stop();
    for token in [token.as_str(), "nonsense"] {
        let response =
            RawRequest::get("/v1/monitors").bearer(token).send(edge.envoy.listener_address("edge"));
        assert_eq!(response.status, 503, "{response:?}");
    }
    let mut command = home.serve_command();
    // The root key was kept by the first start.
    command.args(["--envoy-listen", &listener]);
    let again = home.start_with(command).unwrap_or_else(|ended| panic!("{ended:?}"));
    wait_for("Envoy to find it again", || {
        let response =
            RawRequest::get("/v1/monitors").bearer(&token).send(edge.envoy.listener_address("edge"));
        (response.status == 200).then_some(())
    });
    again.stop();
}

/// A server as it is before its keys are loaded.
async fn start_loading_server(home: &TestHome) -> SocketAddr {
    let settings = ServerSettings::load_for_database(&DatabaseArgs::default()).unwrap();
    let store = store::open(&home.url()).await.unwrap();
    let (clock, entropy) = (Arc::new(SystemClock), Arc::new(SystemEntropy));
    let place = ReplicationRuntime::new(&store, Arc::new(Index::default()), clock.clone());
    let (parts, _) =
        keyward::server::build_services(&settings, store, &place, clock, entropy, DecisionLog::disabled());
    let (stopping, is_stopping) = tokio::sync::watch::channel(false);
    let reporter = tonic_health::server::HealthReporter::new();
    let services = Arc::new(
        grpc::build_router(parts, reporter, OverloadLimits::default(), is_stopping.clone()).unwrap(),
    );
    let capacity =
        WorkerCapacity { threads: 1, max_connections: 100, max_queued: 100, drain_timeout: WAIT_TIMEOUT };
    let workers = WorkerPool::start(capacity, &services).unwrap();
    let listener = ListenerSettings::new_plaintext("envoy", "127.0.0.1:0", ServiceSet::for_envoy());
    let open = BoundSocket::bind(&ListenAddress::Tcp("127.0.0.1:0".to_owned()), false)
        .await
        .unwrap()
        .listen()
        .unwrap();
    let address = open.local_address().unwrap().as_tcp().unwrap();
    let opened = BoundListener { settings: listener, socket: open, tls: None, counters: Arc::default() };
    tokio::spawn(async move {
        accept_connections(opened, &workers, is_stopping).await;
        drop(stopping);
    });
    address
}

#[tokio::test(flavor = "multi_thread")]
async fn a_keyward_that_is_still_loading_is_503() {
    let (home, upstream) = (TestHome::new(), EchoUpstream::start());
    let envoy = EnvoyProcess::start(&minimal_config(start_loading_server(&home).await, &upstream));
    let response = RawRequest::get("/v1/monitors").bearer("anything").send(envoy.listener_address("edge"));
    assert_eq!((response.status, denial_code(&response).as_str()), (503, "UNAVAILABLE"));
    assert_eq!(response.header("retry-after"), Some("1"));
    assert_eq!(envoy.read_stat("cluster.service.ext_authz.error"), 1, "no verdict");
}

#[tokio::test]
async fn what_is_revoked_is_refused_through_envoy_a_thousand_times_of_a_thousand() {
    const KEYS: usize = 1000;
    let mut edge = EnvoySetup::start().await;
    let mut connection = RawConnection::open(edge.address()).unwrap();
    let mut get = |token: &str| {
        let request = RawRequest::get("/v1/monitors").bearer(token);
        let response = connection.send(&request).unwrap();
        if response.header("connection") == Some("close") {
            connection = RawConnection::open(edge.envoy.listener_address("edge")).unwrap();
        }
        response.status
    };
    let mut answers = BTreeMap::<(u16, u16), usize>::new();
    for _ in 0..KEYS {
        let (id, token) = edge.root.create_key(plain_key_request()).await.unwrap();
        let before = get(&token);
        edge.root.revoke_key(&id).await.unwrap();
        *answers.entry((before, get(&token))).or_default() += 1;
    }
    assert_eq!(answers, BTreeMap::from([((200, 401), KEYS)]));
}

/// Two servers that know one key by its digest, a service, and Envoy with the production file.
struct TwoServerSetup {
    keywards: [KeywardProcess; 2],
    token: String,
    upstream: EchoUpstream,
    envoy: EnvoyProcess,
}

const RULES: &str = r#"
[defaults]
hosts = ["*"]
environment = "production"
[[rule]]
methods = ["GET"]
path = "/v1/monitors"
scope = "monitors:read"
[[rule]]
methods = ["*"]
path = "/demo.Service/**"
scope = "monitors:read"
"#;

/// More requests of one key than a test sends.
const UNREACHED_RATE_LIMIT: &str = "{ max_tokens: 1000000, tokens_per_fill: 1000000, fill_interval: 1s }";

async fn start_two_servers(per_key: &str) -> (TwoServerSetup, tempfile::TempDir) {
    let folder = tempfile::tempdir().unwrap();
    let rules = folder.path().join("rules.toml");
    std::fs::write(&rules, RULES).unwrap();
    // The usual one, in which Envoy sees that a server stops.
    let flags = ["--rules", rules.to_str().unwrap(), "--shutdown-delay", "2s"];
    let (one, other) = (start_keyward(&flags).await, start_keyward(&flags).await);
    let (_, token) = one.root_caller().create_key(plain_key_request()).await.unwrap();
    let pb::CreateKeyRequest { account, environment, scopes, .. } = plain_key_request();
    let (sha256, hint) = (Sha256::digest(&token).to_vec(), "kw_live_".to_owned());
    let key = pb::ImportKey { account, environment, scopes, sha256, hint, ..Default::default() };
    let mut root = other.root_caller();
    let results =
        root.keys.import(pb::ImportKeysRequest { keys: vec![key] }).await.unwrap().into_inner().results;
    assert!(results[0].key.is_some(), "{results:?}");
    let upstream = EchoUpstream::start();
    let addresses = [envoy_listener(&one), envoy_listener(&other)];
    let envoy = EnvoyProcess::start(&production_config(addresses, &upstream, per_key));
    wait_for("Envoy to know that both are well", || {
        (envoy.read_stat("cluster.keyward.membership_healthy") == 2).then_some(())
    });
    (TwoServerSetup { keywards: [one, other], token, upstream, envoy }, folder)
}

/// Holds that every request passed; what did not stands in Envoy's access log.
#[track_caller]
fn assert_all_passed(tally: &StatusCounts, envoy: &EnvoyProcess) {
    if tally.keys().any(|status| *status != 200) {
        let log = envoy.stdout();
        let failed: Vec<_> = log.lines().filter(|line| !line.contains("\"code\":200")).take(10).collect();
        panic!("{tally:?}\n{}\n{}", failed.join("\n"), envoy.nonzero_stats("cluster.keyward."));
    }
}

#[tokio::test]
async fn one_of_two_servers_dies_under_load_and_no_request_fails() {
    let (TwoServerSetup { keywards: [one, _other], token, envoy, upstream: _upstream }, _folder) =
        start_two_servers(UNREACHED_RATE_LIMIT).await;
    let request = RawRequest::get("/v1/monitors").bearer(&token);
    let load = BackgroundLoad::start(envoy.listener_address("edge"), 4, &[request]);
    load.wait_for_answers(200);
    one.process.kill();
    load.wait_for_answers(2000);
    let tally = load.stop();
    assert_all_passed(&tally, &envoy);
    assert!(
        envoy.read_stat("cluster.keyward.upstream_rq_retry") > 0
            || envoy.read_stat("cluster.keyward.membership_healthy") == 1
    );
}

#[tokio::test]
async fn one_of_two_servers_stops_under_load_and_no_request_fails() {
    let (TwoServerSetup { keywards: [one, _other], token, envoy, upstream: _upstream }, _folder) =
        start_two_servers(UNREACHED_RATE_LIMIT).await;
    let load = BackgroundLoad::start(
        envoy.listener_address("edge"),
        4,
        &[RawRequest::get("/v1/monitors").bearer(&token)],
    );
    load.wait_for_answers(200);
    one.stop();
    load.wait_for_answers(2000);
    let tally = load.stop();
    assert_all_passed(&tally, &envoy);
}

#[tokio::test]
async fn rules_change_under_load_and_no_request_fails() {
    let (TwoServerSetup { keywards: [one, other], token, envoy, upstream: _upstream }, folder) =
        start_two_servers(UNREACHED_RATE_LIMIT).await;
    let rules = folder.path().join("rules.toml");
    let reloads = |keyward: &KeywardProcess, result: &str| {
        let page = keyward.fetch_admin_page("/metrics").1;
        let name = format!("keyward_gateway_rules_reloads_total{{result=\"{result}\"}} ");
        let line = page.lines().find_map(|line| line.strip_prefix(&name).map(str::to_owned));
        line.unwrap().parse::<u32>().unwrap()
    };
    let both = |result: &str, count| {
        wait_for("the rules to be read", || {
            [&one, &other].iter().all(|keyward| reloads(keyward, result) == count).then_some(())
        });
    };
    let get = |path: &str| RawRequest::get(path).bearer(&token).send(envoy.listener_address("edge")).status;
    let load = BackgroundLoad::start(
        envoy.listener_address("edge"),
        2,
        &[RawRequest::get("/v1/monitors").bearer(&token)],
    );
    assert_eq!(get("/v2/monitors"), 403, "no rule covers it yet");
    std::fs::write(
        &rules,
        format!("{RULES}\n[[rule]]\nmethods = ['GET']\npath = '/v2/monitors'\nscope = 'monitors:read'"),
    )
    .unwrap();
    both("accepted", 1);
    assert_eq!(get("/v2/monitors"), 200);
    std::fs::write(&rules, "[[rule]]\npath = '/v3").unwrap();
    both("refused", 1);
    load.wait_for_answers(200);
    assert_eq!((get("/v2/monitors"), get("/v3")), (200, 403), "wrong rules change nothing");
    std::fs::write(&rules, RULES).unwrap();
    both("accepted", 2);
    assert_eq!(get("/v2/monitors"), 403);
    load.wait_for_answers(200);
    let tally = load.stop();
    assert_all_passed(&tally, &envoy);
    assert!(one.process.stderr().contains("line 2"), "the log says where the rules are wrong");
}

#[tokio::test]
async fn a_route_in_shadow_mode_lets_all_pass_and_says_what_would_have_been_denied() {
    let (TwoServerSetup { envoy, keywards: _keywards, upstream: _upstream, .. }, _folder) =
        start_two_servers(UNREACHED_RATE_LIMIT).await;
    let response = RawRequest::get("/beta/x").bearer("nonsense").send(envoy.listener_address("edge"));
    assert_eq!(response.status, 200);
    let arrived = ReceivedRequest::from_answer(&response.body);
    assert_eq!(arrived.header_values("x-keyward-shadow"), ["unknown"]);
    assert_eq!(
        arrived.header_values("authorization"),
        ["Bearer nonsense"],
        "the service may judge it itself"
    );
    let line = wait_for("the access log", || envoy.stdout().lines().next().map(str::to_owned));
    let line: serde_json::Value = serde_json::from_str(&line).unwrap();
    assert_eq!(
        (&line["mode"], &line["reason"], &line["code"]),
        (&"shadow".into(), &"unknown".into(), &200.into())
    );
}

#[tokio::test]
async fn envoy_logs_and_limits_by_key() {
    let few = "{ max_tokens: 2, tokens_per_fill: 2, fill_interval: 3600s }";
    let (TwoServerSetup { keywards: [one, other], token, envoy, upstream }, _folder) =
        start_two_servers(few).await;
    let get = |token: &str| {
        RawRequest::get("/v1/monitors?secret=1")
            .bearer(token)
            .header("x-request-id", "r-1")
            .send(envoy.listener_address("edge"))
    };
    // The two know the token by different keys.
    other.stop();
    wait_for("Envoy to ask the first alone", || {
        (envoy.read_stat("cluster.keyward.membership_healthy") == 1).then_some(())
    });
    let statuses: Vec<_> = (0..3).map(|_| get(&token).status).collect();
    assert_eq!(statuses, [200, 200, 429], "{:?}", upstream.take_received());
    let lines = wait_for("the access log", || {
        let lines: Vec<_> = envoy.stdout().lines().map(str::to_owned).collect();
        (lines.len() == 3).then_some(lines)
    });
    let line: serde_json::Value = serde_json::from_str(&lines[0]).unwrap();
    assert_eq!((&line["account"], &line["reason"]), (&"acme".into(), &"ok".into()));
    assert_eq!((&line["path"], line["key_id"].as_str().unwrap().len()), (&"/v1/monitors".into(), 36));
    one.stop();
}

fn grpc_channel(envoy: &EnvoyProcess) -> Channel {
    let endpoint = format!("http://{}", envoy.listener_address("edge"));
    Endpoint::from_shared(endpoint).unwrap().timeout(WAIT_TIMEOUT).connect_lazy()
}

#[tokio::test]
async fn grpc_through_envoy_gets_the_codes_that_clients_understand() {
    let (TwoServerSetup { keywards: [one, other], token, envoy, upstream: _upstream }, _folder) =
        start_two_servers(UNREACHED_RATE_LIMIT).await;
    let call = async |token: &str, method: &str| {
        let message = futures_util::stream::iter([bytes::Bytes::from_static(b"hello")]);
        call_raw(grpc_channel(&envoy), token, method, message)
            .await
            .map_err(|status| (status.code(), status.message().to_owned()))
    };
    let answer = call(&token, "demo.Service/Call").await.unwrap();
    assert_eq!(ReceivedRequest::from_answer(&answer).header_values("x-keyward-account"), ["acme"]);
    let refused = async |token: &str, method: &str| call(token, method).await.unwrap_err();
    assert_eq!(
        refused("no", "demo.Service/Call").await,
        (Code::Unauthenticated, "Invalid or missing API key".to_owned())
    );
    assert_eq!(refused(&token, "other.Service/Call").await.0, Code::PermissionDenied);
    let limit = pb::RateLimit {
        name: "burst".into(),
        limit: 1,
        window: Some(prost_types::Duration { seconds: 3600, nanos: 0 }),
    };
    let limited = pb::CreateKeyRequest { rate_limits: vec![limit], ..plain_key_request() };
    let (_, limited) = one.root_caller().create_key(limited).await.unwrap();
    other.stop();
    wait_for("Envoy to ask the first alone", || {
        (envoy.read_stat("cluster.keyward.membership_healthy") == 1).then_some(())
    });
    call(&limited, "demo.Service/Call").await.unwrap();
    assert_eq!(refused(&limited, "demo.Service/Call").await.0, Code::ResourceExhausted);
    one.process.kill();
    wait_for("Envoy to notice", || {
        (envoy.read_stat("cluster.keyward.membership_healthy") == 0).then_some(())
    });
    assert_eq!(refused(&token, "demo.Service/Call").await.0, Code::Unavailable);
}

#[test]
fn envoy_takes_every_file_that_we_deploy() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/envoy");
    let mut files: Vec<_> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.ends_with(".yaml"))
        .collect();
    files.sort();
    assert!(files.contains(&"minimal.yaml".to_owned()) && files.contains(&"production.yaml".to_owned()));
    let home = TestHome::new();
    let descriptors = home.path("keyward.pb");
    std::fs::write(&descriptors, pb::FILE_DESCRIPTOR_SET).unwrap();
    let place = format!("proto_descriptor: {}", descriptors.display());
    for file in files {
        let yaml = read_deployed_file(&file).replace("proto_descriptor: keyward.pb", &place);
        assert_eq!(EnvoyProcess::validate(&yaml), Ok(()), "{file}");
    }
}
