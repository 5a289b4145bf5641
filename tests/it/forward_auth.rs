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
    process::{KeywardProcess, TestHome, WAIT_TIMEOUT, plain_key_request, wait_for},
    raw_http::{RawConnection, RawRequest, RawResponse},
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
pub(crate) struct ForwardAuthServer {
    pub(crate) keyward: KeywardProcess,
    /// Where proxies ask.
    pub(crate) address: SocketAddr,
}

impl ForwardAuthServer {
    pub(crate) async fn start() -> ForwardAuthServer {
        ForwardAuthServer::start_with(&[]).await
    }

    pub(crate) async fn start_with(more: &[&str]) -> ForwardAuthServer {
        let home = TestHome::new();
        std::fs::write(home.path("rules.toml"), RULES).unwrap();
        let mut command = home.serve_command();
        command.args(["--forward-auth-listen", "127.0.0.1:0", "--rules", "rules.toml"]).args(more);
        let keyward = home.start_with(command).unwrap();
        let out = keyward.process.stdout();
        let (_, address) = out.split_once("Traefik and Envoy on http://").unwrap();
        let address = address.split_once("/auth/").unwrap().0.parse().unwrap();
        keyward.root_caller().create_account("acme").await;
        ForwardAuthServer { keyward, address }
    }

    /// The token of a key of `acme` that may `monitors:read`.
    pub(crate) async fn create_token(&self) -> String {
        self.create_key(plain_key_request()).await.1
    }

    /// A key: its id and its token.
    pub(crate) async fn create_key(&self, request: pb::CreateKeyRequest) -> (String, String) {
        self.keyward.root_caller().create_key(request).await.unwrap()
    }

    #[track_caller]
    fn send(&self, request: &RawRequest) -> RawResponse {
        request.send(self.address)
    }

    fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(WAIT_TIMEOUT)).unwrap();
        stream
    }

    /// Waits until the log says this.
    fn wait_for_log(&self, said: &str) {
        wait_for(&format!("{said:?} in the log"), || {
            self.keyward.process.stderr().contains(said).then_some(())
        });
    }
}

/// A key that may do so once a minute.
pub(crate) fn rate_limited_key_request() -> pb::CreateKeyRequest {
    let window = Some(prost_types::Duration { seconds: 60, nanos: 0 });
    let limit = pb::RateLimit { name: "minute".to_owned(), limit: 1, window };
    pb::CreateKeyRequest { rate_limits: vec![limit], ..plain_key_request() }
}

/// The body of a denial.
#[track_caller]
pub(crate) fn assert_denied(response: &RawResponse, status: u16, code: &str) {
    assert_eq!(response.status, status, "{response:?}");
    assert_eq!(response.header("content-type"), Some("application/json"), "{response:?}");
    let body = response.json();
    assert_eq!((&body["success"], &body["error"]["code"]), (&json!(false), &json!(code)), "{body}");
}

/// What nginx sends of `GET target`.
pub(crate) fn nginx_auth_request(query: &str, target: &str) -> RawRequest {
    RawRequest::get(&format!("/auth/nginx?{query}"))
        .header("X-Original-Method", "GET")
        .header("X-Original-Host", "api.test")
        .header("X-Original-URI", target)
}

/// What Traefik sends of `GET target`, as its documentation of ForwardAuth has it.
fn traefik_auth_request(query: &str, target: &str) -> RawRequest {
    RawRequest::get(&format!("/auth/traefik?{query}"))
        .header("X-Forwarded-Method", "GET")
        .header("X-Forwarded-Proto", "https")
        .header("X-Forwarded-Host", "api.test")
        .header("X-Forwarded-Uri", target)
        .header("X-Forwarded-For", "203.0.113.7")
}

#[tokio::test(flavor = "multi_thread")]
async fn traefik_hears_who_calls_or_why_not() {
    let front = ForwardAuthServer::start().await;
    let token = front.create_token().await;
    let passed = front.send(&traefik_auth_request("", "/accounts/acme/monitors?x=1").bearer(&token));
    assert_eq!((passed.status, passed.text().as_str()), (200, ""), "{passed:?}");
    assert_eq!(passed.header("x-keyward-account"), Some("acme"));
    assert_eq!(passed.header("x-keyward-scopes"), Some("monitors:read"));
    assert!(passed.header("x-keyward-remove").unwrap().split(',').any(|name| name == "authorization"));

    assert_denied(&front.send(&traefik_auth_request("", "/monitors")), 401, "UNAUTHORIZED");
    assert_denied(
        &front.send(&traefik_auth_request("", "/accounts/other/monitors").bearer(&token)),
        401,
        "UNAUTHORIZED",
    );
    let missing = front.send(&traefik_auth_request("", "/secrets").bearer(&token));
    assert_denied(&missing, 403, "FORBIDDEN");
    let challenge = r#"Bearer realm="keyward", error="insufficient_scope", scope="secrets:read""#;
    assert_eq!(missing.header("www-authenticate"), Some(challenge));
    assert_denied(&front.send(&traefik_auth_request("", "/nowhere").bearer(&token)), 403, "FORBIDDEN");
    assert_denied(&front.send(&traefik_auth_request("", "/monitors//7").bearer(&token)), 400, "BAD_REQUEST");

    let (_, limited) = front.create_key(rate_limited_key_request()).await;
    assert_eq!(front.send(&traefik_auth_request("", "/monitors").bearer(&limited)).status, 200);
    let limited = front.send(&traefik_auth_request("", "/monitors").bearer(&limited));
    assert_denied(&limited, 429, "RATE_LIMITED");
    assert_eq!(limited.header("retry-after"), Some("60"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_scope_with_a_slash_is_one_scope_on_every_way() {
    let front = ForwardAuthServer::start().await;
    let scopes = vec!["repo/write".to_owned(), "/v1/users:read".to_owned()];
    let (_, token) = front.create_key(pb::CreateKeyRequest { scopes, ..plain_key_request() }).await;
    for scope in
        ["repo/write", "repo%2Fwrite", "/v1/users:read,repo/write", "%2Fv1%2Fusers%3Aread+repo/write"]
    {
        let field = if scope.contains([',', '+']) { "scopes" } else { "scope" };
        let query = format!("{field}={scope}&environment=production");
        let passed = front.send(&nginx_auth_request(&query, "/any").bearer(&token));
        assert_eq!(passed.status, 200, "{query}: {passed:?}");
        assert_eq!(passed.header("x-keyward-scopes"), Some("/v1/users:read repo/write"));
    }
    for scope in ["repo", "write", "repo/read", "repo/write/x", "repo/"] {
        let query = format!("scope={scope}&environment=production");
        let missing = front.send(&traefik_auth_request(&query, "/any").bearer(&token));
        assert_denied(&missing, 403, "FORBIDDEN");
        let challenge = format!(r#"Bearer realm="keyward", error="insufficient_scope", scope="{scope}""#);
        assert_eq!(missing.header("www-authenticate"), Some(&*challenge));
    }
    assert_denied(&front.send(&traefik_auth_request("", "/files").bearer(&token)), 403, "FORBIDDEN");
    let (_, files) = front
        .create_key(pb::CreateKeyRequest { scopes: vec!["files/read".into()], ..plain_key_request() })
        .await;
    assert_eq!(
        front.send(&traefik_auth_request("", "/files").bearer(&files)).status,
        200,
        "as the rule says"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn an_account_in_a_path_is_the_one_that_is_spelled_exactly_so() {
    let front = ForwardAuthServer::start().await;
    front.keyward.root_caller().create_account("org_2abCD").await;
    let (_, token) =
        front.create_key(pb::CreateKeyRequest { account: "org_2abCD".into(), ..plain_key_request() }).await;
    let passed = front.send(&traefik_auth_request("", "/accounts/org_2abCD/monitors").bearer(&token));
    assert_eq!((passed.status, passed.header("x-keyward-account")), (200, Some("org_2abCD")), "{passed:?}");
    for other in ["org_2abcd", "ORG_2ABCD", "Keyward", "keyward"] {
        let denied =
            front.send(&traefik_auth_request("", &format!("/accounts/{other}/monitors")).bearer(&token));
        assert_denied(&denied, 401, "UNAUTHORIZED");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_address_is_the_last_that_was_forwarded() {
    let front = ForwardAuthServer::start().await;
    let allowed_cidrs = vec!["203.0.113.7/32".to_owned()];
    let (_, token) = front.create_key(pb::CreateKeyRequest { allowed_cidrs, ..plain_key_request() }).await;
    let from = |forwarded: &str| {
        front
            .send(&nginx_auth_request("", "/monitors").bearer(&token).header("x-forwarded-for", forwarded))
            .status
    };
    assert_eq!(from("6.6.6.6, 203.0.113.7"), 200);
    assert_eq!(from("203.0.113.7, 6.6.6.6"), 403, "what the client writes is not believed");
    assert_eq!(
        front.send(&nginx_auth_request("", "/monitors").bearer(&token)).status,
        403,
        "none is not the right one"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn the_query_says_what_a_route_needs_and_then_no_rule_is_asked() {
    let front = ForwardAuthServer::start().await;
    let token = front.create_token().await;
    let status =
        |query: &str, target: &str| front.send(&nginx_auth_request(query, target).bearer(&token)).status;
    assert_eq!(status("scope=monitors:read&environment=production", "/secrets"), 200);
    assert_eq!(status("scope=secrets:read&environment=production", "/monitors"), 403);
    assert_eq!(status("scope=monitors:read&environment=staging", "/monitors"), 401);
    assert_eq!(status("account=other", "/monitors"), 401, "what the rule leaves unsaid, the query says");
    assert_eq!(front.send(&nginx_auth_request("public=true", "/secrets")).status, 200);
    assert_eq!(
        front.send(&nginx_auth_request("public=true", "/a/../secrets")).status,
        403,
        "400, as nginx can be told"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_proxy_that_is_set_up_wrongly_gets_503_and_the_log_says_why() {
    for (request, why) in [
        (
            RawRequest::get("/auth/nginx").header("x-original-method", "GET"),
            "the proxy sends no x-original-host",
        ),
        (
            nginx_auth_request("", "/monitors").header("x-original-uri", "/health"),
            "x-original-uri comes more than once",
        ),
        (
            traefik_auth_request("", "/monitors").header("x-forwarded-host", "a"),
            "x-forwarded-host comes more than once",
        ),
        (nginx_auth_request("scop=monitors:read", "/monitors"), "scop is not a field of a route"),
        (
            nginx_auth_request("scope=monitors:read&environment=moon", "/monitors"),
            "environment must be one of production",
        ),
        (nginx_auth_request("scope=monitors:read&public=true", "/monitors"), "exclude each other"),
    ] {
        let front = ForwardAuthServer::start().await;
        let response = front.send(&request.bearer(&front.create_token().await));
        assert_eq!(response.status, 503, "{why}: {response:?}");
        assert_eq!(response.header("retry-after"), Some("1"));
        front.wait_for_log(why);
        let (_, metrics) = front.keyward.fetch_admin_page("/metrics");
        let counted = "keyward_gateway_requests_total{via=\"forward\",mode=\"enforce\",result=\"error\",reason=\"misconfigured\"} 1";
        assert!(metrics.contains(counted), "{metrics}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nginx_reads_only_the_status_and_headers_of_a_denial() {
    let front = ForwardAuthServer::start().await;
    let denied = front.send(&nginx_auth_request("", "/monitors"));
    assert_eq!(
        (denied.status, denied.header("content-length")),
        (401, Some("0")),
        "or it closes the connection"
    );
    let (_, token) = front.create_key(rate_limited_key_request()).await;
    assert_eq!(
        front.send(&nginx_auth_request("", "/monitors").bearer(&token)).header("x-keyward-status"),
        None
    );
    let limited = front.send(&nginx_auth_request("", "/monitors").bearer(&token));
    assert_eq!((limited.status, limited.header("x-keyward-status")), (403, Some("429")));
    let odd = front.send(&nginx_auth_request("", "/monitors/%2e%2e/secrets").bearer(&token));
    assert_eq!((odd.status, odd.header("x-keyward-status")), (403, Some("400")));
}

#[tokio::test(flavor = "multi_thread")]
async fn another_path_is_not_found() {
    let front = ForwardAuthServer::start().await;
    for path in ["/", "/auth", "/auth/nginx/", "/auth/nginxx", "/auth/envoy", "/auth/envoyx", "/metrics"] {
        assert_eq!(front.send(&RawRequest::get(path)).status, 404, "{path}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revoked_key_is_refused_at_once() {
    let front = ForwardAuthServer::start().await;
    let (id, token) = front.create_key(plain_key_request()).await;
    let mut connection = RawConnection::open(front.address).unwrap();
    let request = nginx_auth_request("", "/monitors").bearer(&token);
    assert_eq!(connection.send(&request).unwrap().status, 200);
    front.keyward.root_caller().revoke_key(&id).await.unwrap();
    let refused = connection.send(&request).unwrap();
    assert_eq!(refused.status, 401);
    assert_eq!(refused.header("www-authenticate"), Some(r#"Bearer realm="keyward", error="invalid_token""#));
}

#[tokio::test(flavor = "multi_thread")]
async fn as_many_headers_as_proxies_admit_are_read_and_more_are_refused() {
    let front = ForwardAuthServer::start().await;
    let token = front.create_token().await;
    let with = |count: usize, length: usize| {
        let request = nginx_auth_request("", "/monitors").bearer(&token).header("x-odd", b"caf\xe9");
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
    let front = ForwardAuthServer::start().await;
    let mut stream = front.connect();
    stream.write_all(b"GET /auth/nginx HTTP/1.1\r\nhost: a\r\nx-slow").unwrap();
    let mut answer = Vec::new();
    // The connection's end comes before the test's patience does.
    stream.read_to_end(&mut answer).unwrap();
    assert!(answer.is_empty() || answer.starts_with(b"HTTP/1.1 408"), "{answer:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_1025th_connection_is_refused_until_another_ends() {
    let front = ForwardAuthServer::start().await;
    let token = front.create_token().await;
    let mut held: Vec<TcpStream> = (0..1024).map(|_| front.connect()).collect();
    let mut one_more = front.connect();
    match one_more.read(&mut [0]) {
        Ok(0) => {}
        Err(error) if error.kind() == ErrorKind::ConnectionReset => {}
        other => panic!("{other:?}"),
    }
    front.wait_for_log("connection refused: limit reached");
    held.pop();
    let request = nginx_auth_request("", "/monitors").bearer(&token);
    wait_for("room for another", || {
        let mut connection = RawConnection::open(front.address).ok()?;
        connection.send(&request).ok().filter(|response| response.status == 200)
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_cuts_no_answer_short_and_waits_for_nobody_who_does_not_ask() {
    let front = ForwardAuthServer::start().await;
    let request = nginx_auth_request("", "/monitors").bearer(&front.create_token().await);
    let (mut idle, _slow) = (RawConnection::open(front.address).unwrap(), front.connect());
    assert_eq!(idle.send(&request).unwrap().status, 200);
    let (answered, answers) = mpsc::channel();
    let asking = std::thread::spawn({
        let (request, mut connection) = (request.clone(), RawConnection::open(front.address).unwrap());
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
    let home = TestHome::new();
    let example = concat!(env!("CARGO_MANIFEST_DIR"), "/deploy/examples/rules.toml");
    let ended = home.run_to_end(home.command(["rules", "check", example]));
    assert_eq!((ended.code, ended.err.as_str()), (Some(0), ""), "{ended:?}");
    assert!(ended.out.ends_with("8 rules, no problems.\n"), "{ended:?}");
    let ask = |method: &str, path: &str| {
        home.run_to_end(home.command([
            "rules",
            "test",
            example,
            method,
            path,
            "--host",
            "staging.example.com:443",
        ]))
    };
    assert!(ask("GET", "/v1/monitors/7").out.contains("staging (set by the rule)"));
    assert_eq!(ask("GET", "//v1").code, Some(1));
    let none =
        home.run_to_end(home.command(["rules", "test", example, "PUT", "/v1/status", "--output", "json"]));
    let verdict: serde_json::Value = serde_json::from_str(&none.out).unwrap();
    assert_eq!((none.code, &verdict["outcome"]), (Some(1), &json!("denied")));
}

#[tokio::test(flavor = "multi_thread")]
async fn rules_that_change_are_in_force_soon_after() {
    let front = ForwardAuthServer::start().await;
    let token = front.create_token().await;
    let request = nginx_auth_request("", "/secrets").bearer(&token);
    assert_eq!(front.send(&request).status, 403);
    let rules = front.keyward.home.path("rules.toml");
    std::fs::write(&rules, RULES.replace("secrets:read", "monitors:read")).unwrap();
    wait_for("the new rules", || (front.send(&request).status == 200).then_some(()));
    std::fs::write(&rules, "[[rule]]").unwrap();
    front.wait_for_log("the old rules stay in force");
    assert_eq!(front.send(&request).status, 200);
    assert!(
        front
            .keyward
            .fetch_admin_page("/metrics")
            .1
            .contains("keyward_gateway_rules_reloads_total{result=\"refused\"} 1")
    );
}

/// The headers of an answer, in bytes.
fn header_bytes(response: &RawResponse) -> usize {
    response.headers.iter().map(|(name, value)| name.len() + value.len() + 4).sum()
}

/// A key with as much as there may be of whatever is answered about a key.
pub(crate) fn largest_key_request() -> pb::CreateKeyRequest {
    let scopes = (0..256).map(|at| format!("{}:{}{at:03}", "s".repeat(60), "a".repeat(60))).collect();
    let window = Some(prost_types::Duration { seconds: 86_400, nanos: 0 });
    let limit = |at: u8| pb::RateLimit { name: format!("{}{at}", "n".repeat(63)), limit: 1_000_000, window };
    pb::CreateKeyRequest { scopes, rate_limits: (0..8).map(limit).collect(), ..plain_key_request() }
}

/// A key whose list of scopes has `count` words of 31 letters, which takes 32 bytes each, but for one.
pub(crate) fn key_request_with_scopes(count: usize) -> pb::CreateKeyRequest {
    let scopes = (0..count).map(|at| format!("monitors-of-my-product-{at:03}:read")).collect();
    pb::CreateKeyRequest { scopes, ..plain_key_request() }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_list_of_scopes_is_cut_between_scopes_and_says_so() {
    let front = ForwardAuthServer::start().await;
    let ask = async |count| {
        let (_, token) = front.create_key(key_request_with_scopes(count)).await;
        let response = front
            .send(&nginx_auth_request("authenticate_only=true&environment=production", "/").bearer(&token));
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
    let front = ForwardAuthServer::start().await;
    let (_, token) = front.create_key(largest_key_request()).await;
    let needs = "authenticate_only=true&environment=production";
    let passed = front.send(&nginx_auth_request(needs, "/").bearer(&token));
    assert_eq!(passed.status, 200, "{passed:?}");
    assert!((3000..=8192).contains(&header_bytes(&passed)), "{}", header_bytes(&passed));
    let scopes: Vec<_> = (0..64).map(|at| format!("{}:{at}", "m".repeat(120))).collect();
    let needs = format!("environment=production&scopes={}", scopes.join(","));
    let refused = front.send(&nginx_auth_request(&needs, "/").bearer(&token));
    assert_eq!(refused.status, 403, "{refused:?}");
    assert_eq!(
        refused.header("www-authenticate"),
        Some(r#"Bearer realm="keyward", error="insufficient_scope""#),
        "a part of the list would mislead"
    );
    assert!(header_bytes(&refused) < 4096 && refused.body.len() <= 512, "{refused:?}");
    let few: Vec<_> = (0..10).map(|at| format!("{}:{at}", "m".repeat(99))).collect();
    let needs = format!("environment=production&scopes={}", few.join(","));
    let refused = front.send(&nginx_auth_request(&needs, "/").bearer(&token));
    let challenge = refused.header("www-authenticate").unwrap();
    assert!(challenge.ends_with(&format!(r#"scope="{}""#, few.join(" "))), "1,019 bytes fit: {challenge}");
}

#[tokio::test(flavor = "multi_thread")]
async fn more_made_up_names_than_a_proxy_can_be_told_are_400() {
    let front = ForwardAuthServer::start().await;
    let token = front.create_token().await;
    let with = |count: usize| {
        let request = RawRequest::get("/auth/envoy/monitors").bearer(&token);
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
    let shadowed = (0..120).fold(RawRequest::get("/auth/envoy/trial"), |request, at| {
        request.header(format!("x-keyward-{at:010}"), "x")
    });
    assert_eq!(front.send(&shadowed).status, 400);
}

#[tokio::test(flavor = "multi_thread")]
async fn no_token_and_no_query_is_logged() {
    let home = TestHome::new();
    std::fs::write(home.path("rules.toml"), RULES).unwrap();
    let mut command = home.serve_command();
    command.args(["--forward-auth-listen", "127.0.0.1:0", "--rules", "rules.toml", "--log", "debug"]);
    let keyward = home.start_with(command).unwrap();
    let out = keyward.process.stdout();
    let (_, address) = out.split_once("Traefik and Envoy on http://").unwrap();
    let address: SocketAddr = address.split_once("/auth/").unwrap().0.parse().unwrap();
    keyward.root_caller().create_account("acme").await;
    let (_, token) = keyward.root_caller().create_key(plain_key_request()).await.unwrap();
    let random = &token[token.len() - 49..];
    for (request, logged) in [
        (nginx_auth_request("", &format!("/monitors/{token}/one?t={token}")), "/monitors/kw_live_***/one"),
        (nginx_auth_request("", &format!("/trial?x={token}")), "/trial"),
        (nginx_auth_request("", &format!("/two/{token}")), "/two/kw_live_***"),
        (nginx_auth_request("", &format!("/three%3ft={token}")), "/three"),
        (nginx_auth_request("mode=sideways", &format!("/four/{token}")), "/four/kw_live_***"),
        (nginx_auth_request("", "/monitors/legacy-token/five").bearer("legacy-token"), "/monitors/***/five"),
    ] {
        request.send(address);
        wait_for(logged, || keyward.process.stderr().contains(logged).then_some(()));
    }
    let log = keyward.process.stderr();
    assert!(!log.contains(random) && !log.contains("legacy-token") && !log.contains("?t="), "{log}");
}
