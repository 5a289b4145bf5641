//! The endpoint for proxies that ask over HTTP, asked directly: what it believes, what it answers to Traefik, what it
//! makes of proxies that are set up wrongly, and of floods. The real nginx is in `nginx`, the real Envoy in
//! `envoy_http`.

use std::{
    io::{ErrorKind, Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    sync::mpsc,
    time::{Duration, Instant},
};

use keyward::pb;
use serde_json::json;

use crate::{
    http::{Connection, Request, Response},
    process::{Home, Keyward, PATIENCE, plain_key, wait_for},
};

/// Rules that the tests of all proxies are served with.
pub(crate) const RULES: &str = r#"
[defaults]
hosts = ["*"]
environment = "production"

[[rule]]
methods = ["GET"]
path = "/monitors/**"
scope = "monitors:read"

[[rule]]
methods = ["GET"]
path = "/accounts/{account}/monitors"
scope = "monitors:read"
account = "{account}"

[[rule]]
methods = ["GET"]
path = "/secrets"
scope = "secrets:read"

[[rule]]
methods = ["GET"]
path = "/files"
scope = "files/read"

[[rule]]
methods = ["GET"]
path = "/health"
public = true

[[rule]]
methods = ["GET"]
path = "/trial"
scope = "beta:use"
mode = "shadow"
"#;

/// A server that proxies ask over HTTP, with the account `acme`.
pub(crate) struct Front {
    pub(crate) keyward: Keyward,
    /// Where proxies ask.
    pub(crate) address: SocketAddr,
}

impl Front {
    pub(crate) async fn start() -> Front {
        Front::start_with(&[]).await
    }

    pub(crate) async fn start_with(more: &[&str]) -> Front {
        let home = Home::new();
        std::fs::write(home.path("rules.toml"), RULES).unwrap();
        let mut command = home.serve();
        command.args(["--forward-auth-listen", "127.0.0.1:0", "--rules", "rules.toml"]).args(more);
        let keyward = home.start_as(command).unwrap();
        let out = keyward.process.stdout();
        let (_, address) = out.split_once("Traefik and Envoy on http://").unwrap();
        let address = address.split_once("/auth/").unwrap().0.parse().unwrap();
        keyward.root().make_account("acme").await;
        Front { keyward, address }
    }

    /// The token of a key of `acme` that may `monitors:read`.
    pub(crate) async fn token(&self) -> String {
        self.key(plain_key()).await.1
    }

    /// A key: its id and its token.
    pub(crate) async fn key(&self, request: pb::CreateKeyRequest) -> (String, String) {
        self.keyward.root().create(request).await.unwrap()
    }

    #[track_caller]
    fn send(&self, request: &Request) -> Response {
        request.send(self.address)
    }

    fn open(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    /// Waits until the log says this.
    fn logs(&self, said: &str) {
        wait_for(&format!("{said:?} in the log"), || {
            self.keyward.process.stderr().contains(said).then_some(())
        });
    }
}

/// A key that may do so once a minute.
pub(crate) fn key_with_a_limit() -> pb::CreateKeyRequest {
    let window = Some(prost_types::Duration { seconds: 60, nanos: 0 });
    let limit = pb::RateLimit { name: "minute".to_owned(), limit: 1, window };
    pb::CreateKeyRequest { rate_limits: vec![limit], ..plain_key() }
}

/// The body of a denial.
#[track_caller]
pub(crate) fn assert_denied(response: &Response, status: u16, code: &str) {
    assert_eq!(response.status, status, "{response:?}");
    assert_eq!(response.header("content-type"), Some("application/json"), "{response:?}");
    let body = response.json();
    assert_eq!((&body["success"], &body["error"]["code"]), (&json!(false), &json!(code)), "{body}");
}

/// What nginx sends of `GET target`.
pub(crate) fn nginx(query: &str, target: &str) -> Request {
    Request::get(&format!("/auth/nginx?{query}"))
        .header("X-Original-Method", "GET")
        .header("X-Original-Host", "api.test")
        .header("X-Original-URI", target)
}

/// What Traefik sends of `GET target`, as its documentation of ForwardAuth has it.
fn traefik(query: &str, target: &str) -> Request {
    Request::get(&format!("/auth/traefik?{query}"))
        .header("X-Forwarded-Method", "GET")
        .header("X-Forwarded-Proto", "https")
        .header("X-Forwarded-Host", "api.test")
        .header("X-Forwarded-Uri", target)
        .header("X-Forwarded-For", "203.0.113.7")
}

#[tokio::test(flavor = "multi_thread")]
async fn traefik_hears_who_calls_or_why_not() {
    let front = Front::start().await;
    let token = front.token().await;
    let passed = front.send(&traefik("", "/accounts/acme/monitors?x=1").bearer(&token));
    assert_eq!((passed.status, passed.text().as_str()), (200, ""), "{passed:?}");
    assert_eq!(passed.header("x-keyward-account"), Some("acme"));
    assert_eq!(passed.header("x-keyward-scopes"), Some("monitors:read"));
    assert!(passed.header("x-keyward-remove").unwrap().split(',').any(|name| name == "authorization"));

    assert_denied(&front.send(&traefik("", "/monitors")), 401, "UNAUTHORIZED");
    assert_denied(&front.send(&traefik("", "/accounts/other/monitors").bearer(&token)), 401, "UNAUTHORIZED");
    let missing = front.send(&traefik("", "/secrets").bearer(&token));
    assert_denied(&missing, 403, "FORBIDDEN");
    let challenge = r#"Bearer realm="keyward", error="insufficient_scope", scope="secrets:read""#;
    assert_eq!(missing.header("www-authenticate"), Some(challenge));
    assert_denied(&front.send(&traefik("", "/nowhere").bearer(&token)), 403, "FORBIDDEN");
    assert_denied(&front.send(&traefik("", "/monitors//7").bearer(&token)), 400, "BAD_REQUEST");

    let (_, limited) = front.key(key_with_a_limit()).await;
    assert_eq!(front.send(&traefik("", "/monitors").bearer(&limited)).status, 200);
    let limited = front.send(&traefik("", "/monitors").bearer(&limited));
    assert_denied(&limited, 429, "RATE_LIMITED");
    assert_eq!(limited.header("retry-after"), Some("60"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_scope_with_a_slash_is_one_scope_on_every_way() {
    let front = Front::start().await;
    let scopes = vec!["repo/write".to_owned(), "/v1/users:read".to_owned()];
    let (_, token) = front.key(pb::CreateKeyRequest { scopes, ..plain_key() }).await;
    for scope in
        ["repo/write", "repo%2Fwrite", "/v1/users:read,repo/write", "%2Fv1%2Fusers%3Aread+repo/write"]
    {
        let field = if scope.contains([',', '+']) { "scopes" } else { "scope" };
        let query = format!("{field}={scope}&environment=production");
        let passed = front.send(&nginx(&query, "/any").bearer(&token));
        assert_eq!(passed.status, 200, "{query}: {passed:?}");
        assert_eq!(passed.header("x-keyward-scopes"), Some("/v1/users:read repo/write"));
    }
    for scope in ["repo", "write", "repo/read", "repo/write/x", "repo/"] {
        let query = format!("scope={scope}&environment=production");
        let missing = front.send(&traefik(&query, "/any").bearer(&token));
        assert_denied(&missing, 403, "FORBIDDEN");
        let challenge = format!(r#"Bearer realm="keyward", error="insufficient_scope", scope="{scope}""#);
        assert_eq!(missing.header("www-authenticate"), Some(&*challenge));
    }
    assert_denied(&front.send(&traefik("", "/files").bearer(&token)), 403, "FORBIDDEN");
    let (_, files) =
        front.key(pb::CreateKeyRequest { scopes: vec!["files/read".into()], ..plain_key() }).await;
    assert_eq!(front.send(&traefik("", "/files").bearer(&files)).status, 200, "as the rule says");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_account_in_a_path_is_the_one_that_is_spelled_exactly_so() {
    let front = Front::start().await;
    front.keyward.root().make_account("org_2abCD").await;
    let (_, token) = front.key(pb::CreateKeyRequest { account: "org_2abCD".into(), ..plain_key() }).await;
    let passed = front.send(&traefik("", "/accounts/org_2abCD/monitors").bearer(&token));
    assert_eq!((passed.status, passed.header("x-keyward-account")), (200, Some("org_2abCD")), "{passed:?}");
    for other in ["org_2abcd", "ORG_2ABCD", "Keyward", "keyward"] {
        let denied = front.send(&traefik("", &format!("/accounts/{other}/monitors")).bearer(&token));
        assert_denied(&denied, 401, "UNAUTHORIZED");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_address_is_the_last_that_was_forwarded() {
    let front = Front::start().await;
    let allowed_cidrs = vec!["203.0.113.7/32".to_owned()];
    let (_, token) = front.key(pb::CreateKeyRequest { allowed_cidrs, ..plain_key() }).await;
    let from = |forwarded: &str| {
        front.send(&nginx("", "/monitors").bearer(&token).header("x-forwarded-for", forwarded)).status
    };
    assert_eq!(from("6.6.6.6, 203.0.113.7"), 200);
    assert_eq!(from("203.0.113.7, 6.6.6.6"), 403, "what the client writes is not believed");
    assert_eq!(front.send(&nginx("", "/monitors").bearer(&token)).status, 403, "none is not the right one");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_query_says_what_a_route_needs_and_then_no_rule_is_asked() {
    let front = Front::start().await;
    let token = front.token().await;
    let status = |query: &str, target: &str| front.send(&nginx(query, target).bearer(&token)).status;
    assert_eq!(status("scope=monitors:read&environment=production", "/secrets"), 200);
    assert_eq!(status("scope=secrets:read&environment=production", "/monitors"), 403);
    assert_eq!(status("scope=monitors:read&environment=staging", "/monitors"), 401);
    assert_eq!(status("account=other", "/monitors"), 401, "what the rule leaves unsaid, the query says");
    assert_eq!(front.send(&nginx("public=true", "/secrets")).status, 200);
    assert_eq!(front.send(&nginx("public=true", "/a/../secrets")).status, 403, "400, as nginx can be told");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_proxy_that_is_set_up_wrongly_gets_503_and_the_log_says_why() {
    for (request, why) in [
        (
            Request::get("/auth/nginx").header("x-original-method", "GET"),
            "the proxy sends no x-original-host",
        ),
        (nginx("", "/monitors").header("x-original-uri", "/health"), "x-original-uri comes more than once"),
        (traefik("", "/monitors").header("x-forwarded-host", "a"), "x-forwarded-host comes more than once"),
        (nginx("scop=monitors:read", "/monitors"), "scop is no field of a route"),
        (nginx("scope=monitors:read&environment=moon", "/monitors"), "environment is none of production"),
        (nginx("scope=monitors:read&public=true", "/monitors"), "exclude each other"),
    ] {
        let front = Front::start().await;
        let response = front.send(&request.bearer(&front.token().await));
        assert_eq!(response.status, 503, "{why}: {response:?}");
        assert_eq!(response.header("retry-after"), Some("1"));
        front.logs(why);
        let (_, metrics) = front.keyward.page("/metrics");
        let counted = "keyward_gateway_requests_total{via=\"forward\",mode=\"enforce\",result=\"error\",reason=\"misconfigured\"} 1";
        assert!(metrics.contains(counted), "{metrics}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nginx_reads_only_the_status_and_headers_of_a_denial() {
    let front = Front::start().await;
    let denied = front.send(&nginx("", "/monitors"));
    assert_eq!(
        (denied.status, denied.header("content-length")),
        (401, Some("0")),
        "or it closes the connection"
    );
    let (_, token) = front.key(key_with_a_limit()).await;
    assert_eq!(front.send(&nginx("", "/monitors").bearer(&token)).header("x-keyward-status"), None);
    let limited = front.send(&nginx("", "/monitors").bearer(&token));
    assert_eq!((limited.status, limited.header("x-keyward-status")), (403, Some("429")));
    let odd = front.send(&nginx("", "/monitors/%2e%2e/secrets").bearer(&token));
    assert_eq!((odd.status, odd.header("x-keyward-status")), (403, Some("400")));
}

#[tokio::test(flavor = "multi_thread")]
async fn another_path_is_not_found() {
    let front = Front::start().await;
    for path in ["/", "/auth", "/auth/nginx/", "/auth/nginxx", "/auth/envoy", "/auth/envoyx", "/metrics"] {
        assert_eq!(front.send(&Request::get(path)).status, 404, "{path}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revoked_key_is_refused_at_once() {
    let front = Front::start().await;
    let (id, token) = front.key(plain_key()).await;
    let mut connection = Connection::open(front.address).unwrap();
    let request = nginx("", "/monitors").bearer(&token);
    assert_eq!(connection.send(&request).unwrap().status, 200);
    front.keyward.root().revoke(&id).await.unwrap();
    let refused = connection.send(&request).unwrap();
    assert_eq!(refused.status, 401);
    assert_eq!(refused.header("www-authenticate"), Some(r#"Bearer realm="keyward", error="invalid_token""#));
}

#[tokio::test(flavor = "multi_thread")]
async fn as_many_headers_as_proxies_admit_are_read_and_more_are_refused() {
    let front = Front::start().await;
    let token = front.token().await;
    let with = |count: usize, length: usize| {
        let request = nginx("", "/monitors").bearer(&token).header("x-odd", b"caf\xe9");
        let value = "v".repeat(length);
        let request = (0..count).fold(request, |request, at| request.header(format!("x-{at}"), &value));
        front.send(&request).status
    };
    assert_eq!(with(240, 10), 200);
    assert_eq!(with(1, 60 * 1024), 200);
    assert_eq!(with(60, 1024), 200);
    assert_eq!(with(300, 10), 431);
    assert_eq!(with(1, 200 * 1024), 431);
    assert_eq!(with(0, 0), 200, "and the next is served");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_is_slow_to_ask_is_closed() {
    let front = Front::start().await;
    let mut stream = front.open();
    stream.write_all(b"GET /auth/nginx HTTP/1.1\r\nhost: a\r\nx-slow").unwrap();
    let mut answer = Vec::new();
    // The connection's end comes before the test's patience does.
    stream.read_to_end(&mut answer).unwrap();
    assert!(answer.is_empty() || answer.starts_with(b"HTTP/1.1 408"), "{answer:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_1025th_connection_is_refused_until_another_ends() {
    let front = Front::start().await;
    let token = front.token().await;
    let mut held: Vec<TcpStream> = (0..1024).map(|_| front.open()).collect();
    let mut one_more = front.open();
    match one_more.read(&mut [0]) {
        Ok(0) => {}
        Err(error) if error.kind() == ErrorKind::ConnectionReset => {}
        other => panic!("{other:?}"),
    }
    front.logs("refused: there are 1024 connections already");
    held.pop();
    let request = nginx("", "/monitors").bearer(&token);
    wait_for("room for another", || {
        let mut connection = Connection::open(front.address).ok()?;
        connection.send(&request).ok().filter(|response| response.status == 200)
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_cuts_no_answer_short_and_waits_for_nobody_who_does_not_ask() {
    let front = Front::start().await;
    let request = nginx("", "/monitors").bearer(&front.token().await);
    let (mut idle, _slow) = (Connection::open(front.address).unwrap(), front.open());
    assert_eq!(idle.send(&request).unwrap().status, 200);
    let (answered, answers) = mpsc::channel();
    let asking = std::thread::spawn({
        let (request, mut connection) = (request.clone(), Connection::open(front.address).unwrap());
        move || {
            while let Ok(response) = connection.send(&request) {
                assert_eq!(response.status, 200);
                answered.send(()).unwrap();
            }
        }
    });
    answers.recv().unwrap();
    let begun = Instant::now();
    front.keyward.stop();
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
    asking.join().unwrap();
    assert!(idle.send(&request).is_err());
}

#[test]
fn the_example_of_rules_is_right() {
    let home = Home::new();
    let example = concat!(env!("CARGO_MANIFEST_DIR"), "/deploy/examples/rules.toml");
    let ended = home.run(home.command(["rules", "check", example]));
    assert_eq!((ended.code, ended.err.as_str()), (Some(0), ""), "{ended:?}");
    assert!(ended.out.ends_with("8 rules, nothing wrong.\n"), "{ended:?}");
    let ask = |method: &str, path: &str| {
        home.run(home.command(["rules", "test", example, method, path, "--host", "staging.example.com:443"]))
    };
    assert!(ask("GET", "/v1/monitors/7").out.contains("staging (said by the rule)"));
    assert_eq!(ask("GET", "//v1").code, Some(1));
    let none = home.run(home.command(["rules", "test", example, "PUT", "/v1/status", "--output", "json"]));
    let verdict: serde_json::Value = serde_json::from_str(&none.out).unwrap();
    assert_eq!((none.code, &verdict["outcome"]), (Some(1), &json!("denied")));
}

#[tokio::test(flavor = "multi_thread")]
async fn rules_that_change_are_in_force_soon_after() {
    let front = Front::start().await;
    let token = front.token().await;
    let request = nginx("", "/secrets").bearer(&token);
    assert_eq!(front.send(&request).status, 403);
    let rules = front.keyward.home.path("rules.toml");
    std::fs::write(&rules, RULES.replace("secrets:read", "monitors:read")).unwrap();
    wait_for("the new rules", || (front.send(&request).status == 200).then_some(()));
    std::fs::write(&rules, "[[rule]]").unwrap();
    front.logs("the old ones stay in force");
    assert_eq!(front.send(&request).status, 200);
    assert!(
        front
            .keyward
            .page("/metrics")
            .1
            .contains("keyward_gateway_rules_reloads_total{result=\"refused\"} 1")
    );
}

/// The headers of an answer, in bytes.
fn header_bytes(response: &Response) -> usize {
    response.headers.iter().map(|(name, value)| name.len() + value.len() + 4).sum()
}

/// A key with as much as there may be of whatever is answered about a key.
pub(crate) fn largest_key() -> pb::CreateKeyRequest {
    let scopes = (0..256).map(|at| format!("{}:{}{at:03}", "s".repeat(60), "a".repeat(60))).collect();
    let window = Some(prost_types::Duration { seconds: 86_400, nanos: 0 });
    let limit = |at: u8| pb::RateLimit { name: format!("{}{at}", "n".repeat(63)), limit: 1_000_000, window };
    pb::CreateKeyRequest { scopes, rate_limits: (0..8).map(limit).collect(), ..plain_key() }
}

/// A key whose list of scopes has `count` words of 31 letters, which takes 32 bytes each, but for one.
pub(crate) fn key_with_scopes(count: usize) -> pb::CreateKeyRequest {
    let scopes = (0..count).map(|at| format!("monitors-of-my-product-{at:03}:read")).collect();
    pb::CreateKeyRequest { scopes, ..plain_key() }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_list_of_scopes_is_cut_between_scopes_and_says_so() {
    let front = Front::start().await;
    let ask = async |count| {
        let (_, token) = front.key(key_with_scopes(count)).await;
        let response =
            front.send(&nginx("authenticate_only=true&environment=production", "/").bearer(&token));
        assert_eq!(response.status, 200, "{response:?}");
        let scopes = response.header("x-keyward-scopes").unwrap().to_owned();
        (scopes.len(), scopes.split(' ').count(), response.header("x-keyward-truncated").map(str::to_owned))
    };
    assert_eq!(ask(64).await, (2047, 64, None), "just below");
    assert_eq!(ask(65).await, (2047, 64, Some("scopes".to_owned())), "just above");
    assert_eq!(ask(256).await, (2047, 64, Some("scopes".to_owned())));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_has_at_most_8_kib_of_headers_and_a_refusal_less_than_4() {
    let front = Front::start().await;
    let (_, token) = front.key(largest_key()).await;
    let needs = "authenticate_only=true&environment=production";
    let passed = front.send(&nginx(needs, "/").bearer(&token));
    assert_eq!(passed.status, 200, "{passed:?}");
    assert!((3000..=8192).contains(&header_bytes(&passed)), "{}", header_bytes(&passed));
    let scopes: Vec<_> = (0..64).map(|at| format!("{}:{at}", "m".repeat(120))).collect();
    let needs = format!("environment=production&scopes={}", scopes.join(","));
    let refused = front.send(&nginx(&needs, "/").bearer(&token));
    assert_eq!(refused.status, 403, "{refused:?}");
    assert_eq!(
        refused.header("www-authenticate"),
        Some(r#"Bearer realm="keyward", error="insufficient_scope""#),
        "a part of the list would mislead"
    );
    assert!(header_bytes(&refused) < 4096 && refused.body.len() <= 512, "{refused:?}");
    let few: Vec<_> = (0..10).map(|at| format!("{}:{at}", "m".repeat(99))).collect();
    let needs = format!("environment=production&scopes={}", few.join(","));
    let refused = front.send(&nginx(&needs, "/").bearer(&token));
    let challenge = refused.header("www-authenticate").unwrap();
    assert!(challenge.ends_with(&format!(r#"scope="{}""#, few.join(" "))), "1,019 bytes fit: {challenge}");
}

#[tokio::test(flavor = "multi_thread")]
async fn more_made_up_names_than_a_proxy_can_be_told_are_400() {
    let front = Front::start().await;
    let token = front.token().await;
    let with = |count: usize| {
        let request = Request::get("/auth/envoy/monitors").bearer(&token);
        let named =
            (0..count).fold(request, |request, at| request.header(format!("x-keyward-made-up-{at:03}"), "x"));
        front.send(&named)
    };
    let passed = with(60);
    assert_eq!(passed.status, 200, "{passed:?}");
    let removed: Vec<_> = passed.header("x-envoy-auth-headers-to-remove").unwrap().split(',').collect();
    assert!((0..60).all(|at| removed.contains(&&*format!("x-keyward-made-up-{at:03}"))), "{removed:?}");
    let refused = with(120);
    assert_eq!(refused.status, 400, "{refused:?}");
    // Nor do they pass where a denial would.
    let shadowed = (0..120).fold(Request::get("/auth/envoy/trial"), |request, at| {
        request.header(format!("x-keyward-{at:010}"), "x")
    });
    assert_eq!(front.send(&shadowed).status, 400);
}

#[tokio::test(flavor = "multi_thread")]
async fn no_token_and_no_query_is_logged() {
    let home = Home::new();
    std::fs::write(home.path("rules.toml"), RULES).unwrap();
    let mut command = home.serve();
    command.args(["--forward-auth-listen", "127.0.0.1:0", "--rules", "rules.toml", "--log", "debug"]);
    let keyward = home.start_as(command).unwrap();
    let out = keyward.process.stdout();
    let (_, address) = out.split_once("Traefik and Envoy on http://").unwrap();
    let address: SocketAddr = address.split_once("/auth/").unwrap().0.parse().unwrap();
    keyward.root().make_account("acme").await;
    let (_, token) = keyward.root().create(plain_key()).await.unwrap();
    let random = &token[token.len() - 49..];
    for (request, logged) in [
        (nginx("", &format!("/monitors/{token}/one?t={token}")), "/monitors/kw_live_***/one"),
        (nginx("", &format!("/trial?x={token}")), "/trial"),
        (nginx("", &format!("/two/{token}")), "/two/kw_live_***"),
        (nginx("", &format!("/three%3ft={token}")), "/three"),
        (nginx("mode=sideways", &format!("/four/{token}")), "/four/kw_live_***"),
        (nginx("", "/monitors/legacy-token/five").bearer("legacy-token"), "/monitors/***/five"),
    ] {
        request.send(address);
        wait_for(logged, || keyward.process.stderr().contains(logged).then_some(()));
    }
    let log = keyward.process.stderr();
    assert!(!log.contains(random) && !log.contains("legacy-token") && !log.contains("?t="), "{log}");
}
