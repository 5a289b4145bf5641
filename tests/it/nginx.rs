//! The real nginx with `deploy/nginx/keyward.conf`, between a client and a service: what reaches either.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
};

use crate::{
    forward_auth::{
        ForwardAuthServer, assert_denied, key_request_with_scopes, largest_key_request,
        rate_limited_key_request,
    },
    process::{WAIT_TIMEOUT, plain_key_request, wait_for},
    proxy::{NginxProcess, fill_placeholders},
    raw_http::{RawConnection, RawRequest, RawResponse},
    upstream::{EchoUpstream, ReceivedRequest},
};

const CONF: &str = include_str!("../../deploy/nginx/keyward.conf");

/// nginx, with Keyward and a service behind it.
struct NginxSetup {
    front: ForwardAuthServer,
    upstream: EchoUpstream,
    nginx: NginxProcess,
}

impl NginxSetup {
    async fn start() -> NginxSetup {
        let (front, upstream) = (ForwardAuthServer::start().await, EchoUpstream::start());
        let nginx = NginxProcess::start(&nginx_config(front.address, upstream.address));
        NginxSetup { front, upstream, nginx }
    }

    #[track_caller]
    fn send(&self, request: &RawRequest) -> RawResponse {
        request.send(self.nginx.address)
    }

    /// What reached the service of a request that passes.
    #[track_caller]
    fn send_expecting_pass(&self, request: &RawRequest) -> (RawResponse, ReceivedRequest) {
        let response = self.send(request);
        assert_eq!(response.status, 200, "{response:?}");
        let arrived = ReceivedRequest::from_answer(&response.body);
        (response, arrived)
    }

    #[track_caller]
    fn assert_nothing_received(&self) {
        let arrived = self.upstream.take_received();
        assert!(arrived.is_empty(), "{arrived:?}");
    }
}

pub(crate) fn nginx_config(keyward: SocketAddr, upstream: SocketAddr) -> String {
    fill_placeholders(
        CONF,
        &[
            ("127.0.0.1:8000", "127.0.0.1:{port}"),
            ("127.0.0.1:50053", &keyward.to_string()),
            ("127.0.0.1:8080", &upstream.to_string()),
            ("/var/log/nginx/access.log", "/dev/null"),
        ],
    )
}

/// A client that makes up who it is.
fn with_spoofed_identity(request: RawRequest) -> RawRequest {
    request
        .header("X-Keyward-Account", "evil")
        .header("x-keyward-user", "evil")
        .header("X-KEYWARD-SHADOW", "evil")
        .header("X_Keyward_User", "evil")
        .header("X-Original-URI", "/health")
        .header("X-Original-Method", "OPTIONS")
        .header("X-Original-Host", "evil")
}

#[tokio::test(flavor = "multi_thread")]
async fn the_service_learns_who_calls_and_never_sees_the_credential() {
    let edge = NginxSetup::start().await;
    let (id, token) = edge.front.create_key(plain_key_request()).await;
    for request in [
        RawRequest::get("/monitors/7?x=1").bearer(&token),
        RawRequest::get("/monitors/7?x=1").header("x-api-key", &token),
    ] {
        let (_, arrived) = edge.send_expecting_pass(&with_spoofed_identity(request));
        assert_eq!(arrived.target, "/monitors/7?x=1");
        assert_eq!(arrived.header_values("x-keyward-key-id"), [&*id]);
        assert_eq!(arrived.header_values("x-keyward-account"), ["acme"]);
        assert_eq!(arrived.header_values("x-keyward-environment"), ["production"]);
        assert_eq!(arrived.header_values("x-keyward-scopes"), ["monitors:read"]);
        for gone in ["x-keyward-user", "x-keyward-shadow", "x_keyward_user", "authorization", "x-api-key"] {
            assert_eq!(arrived.header_values(gone), [""; 0], "{gone}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_reaches_the_service_alone() {
    let edge = NginxSetup::start().await;
    let token = edge.front.create_token().await;
    let body = "b".repeat(200_000);
    let request = RawRequest::new("POST", "/monitors").bearer(&token).body("text/plain", body.clone());
    assert_eq!(edge.send_expecting_pass(&request).1.body, body);
    let mut connection = RawConnection::open(edge.nginx.address).unwrap();
    let denied = RawRequest::new("POST", "/monitors").body("text/plain", "small");
    assert_eq!(connection.send(&denied).unwrap().status, 401);
    assert_eq!(connection.send(&request).unwrap().status, 200, "and the connection is kept");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_denied_client_hears_why_in_the_words_it_knows() {
    let edge = NginxSetup::start().await;
    let token = edge.front.create_token().await;
    let nobody = edge.send(&RawRequest::get("/monitors"));
    assert_denied(&nobody, 401, "UNAUTHORIZED");
    assert_eq!(nobody.header("www-authenticate"), Some(r#"Bearer realm="keyward""#));
    let wrong = edge.send(&RawRequest::get("/monitors").bearer("wrong"));
    assert_denied(&wrong, 401, "UNAUTHORIZED");
    assert_eq!(wrong.header("www-authenticate"), Some(r#"Bearer realm="keyward", error="invalid_token""#));
    let missing = edge.send(&RawRequest::get("/secrets").bearer(&token));
    assert_denied(&missing, 403, "FORBIDDEN");
    let challenge = r#"Bearer realm="keyward", error="insufficient_scope", scope="secrets:read""#;
    assert_eq!(missing.header("www-authenticate"), Some(challenge));
    let nowhere = edge.send(&RawRequest::get("/nowhere").bearer(&token));
    assert_denied(&nowhere, 403, "FORBIDDEN");
    assert_eq!(nowhere.header("www-authenticate"), None);
    edge.assert_nothing_received();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_limited_client_hears_how_its_limits_stand() {
    let edge = NginxSetup::start().await;
    let (_, token) = edge.front.create_key(rate_limited_key_request()).await;
    let request = RawRequest::get("/monitors").bearer(&token);
    let (first, _) = edge.send_expecting_pass(&request);
    assert_eq!(first.header("ratelimit-policy"), Some(r#""minute";q=1;w=60"#));
    assert_eq!(first.header("ratelimit"), Some(r#""minute";r=0;t=60"#));
    let second = edge.send(&request);
    assert_denied(&second, 429, "RATE_LIMITED");
    assert_eq!(second.header("retry-after"), Some("60"));
    assert_eq!(second.header("ratelimit"), Some(r#""minute";r=0;t=60"#));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_keyward_is_503_and_nothing_passes() {
    let edge = NginxSetup::start().await;
    let token = edge.front.create_token().await;
    let NginxSetup { front, upstream, nginx } = edge;
    front.keyward.stop();
    for request in
        [RawRequest::get("/monitors").bearer(&token), RawRequest::get("/health"), RawRequest::get("/beta/x")]
    {
        let response = request.send(nginx.address);
        assert_denied(&response, 503, "UNAVAILABLE");
        assert_eq!(response.header("retry-after"), Some("1"));
    }
    assert_eq!(upstream.take_received().len(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn shadow_mode_lets_pass_marks_and_leaves_the_credential() {
    let edge = NginxSetup::start().await;
    let token = edge.front.create_token().await;
    let scopes = vec!["beta:use".to_owned()];
    let (_, good) =
        edge.front.create_key(keyward::pb::CreateKeyRequest { scopes, ..plain_key_request() }).await;
    // What nginx says of the route, and what a rule says of it.
    for path in ["/beta/x", "/trial"] {
        let (_, denied) =
            edge.send_expecting_pass(&with_spoofed_identity(RawRequest::get(path)).bearer(&token));
        assert_eq!(denied.header_values("x-keyward-shadow"), ["missing_scope"], "{path}");
        assert_eq!(denied.header_values("x-keyward-account"), [""; 0], "nobody is vouched for");
        assert_eq!(denied.header_values("authorization"), [format!("Bearer {token}")]);
        let (_, allowed) =
            edge.send_expecting_pass(&with_spoofed_identity(RawRequest::get(path)).bearer(&good));
        assert_eq!(allowed.header_values("x-keyward-shadow"), [""; 0]);
        assert_eq!(allowed.header_values("x-keyward-account"), ["acme"]);
        assert_eq!(allowed.header_values("authorization"), [format!("Bearer {good}")]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_public_route_leaves_the_credential_and_takes_what_is_made_up() {
    let edge = NginxSetup::start().await;
    let (_, arrived) = edge.send_expecting_pass(
        &with_spoofed_identity(RawRequest::get("/health")).header("authorization", "Basic eDp5"),
    );
    assert_eq!(arrived.header_values("authorization"), ["Basic eDp5"]);
    assert!(arrived.headers.iter().all(|(name, _)| !name.starts_with("x-keyward-")), "{arrived:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn no_spelling_gets_around_a_location_or_a_rule() {
    let edge = NginxSetup::start().await;
    let token = edge.front.create_token().await;
    for path in [
        "/monitors//7",
        "//monitors",
        "/health/../secrets",
        "/health/..;/secrets",
        "/secrets/../health",
        "/secrets//../health",
        "/monitors/%2e%2e/secrets",
        "/monitors%2f7",
        "/monitors/%5c7",
        "/monitors/%252e",
        "/monitors/%C3%28",
        "/monitors/.",
        "/monitors/a#b",
        "/monitors/a;v=1",
    ] {
        let response = edge.send(&RawRequest::get(path).bearer(&token));
        assert_eq!(response.status, 400, "{path}: {response:?}");
    }
    edge.assert_nothing_received();
    assert_eq!(
        edge.send_expecting_pass(&RawRequest::get("/%6donitors/a%20b").bearer(&token)).1.target,
        "/%6donitors/a%20b"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn the_host_is_the_one_that_the_service_hears() {
    let edge = NginxSetup::start().await;
    let token = edge.front.create_token().await;
    let request = RawRequest::get("http://API.test:80/monitors/7").host("other.test").bearer(&token);
    let (_, arrived) = edge.send_expecting_pass(&request);
    assert_eq!((arrived.target.as_str(), arrived.header_values("host")), ("/monitors/7", vec!["api.test"]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_cannot_make_up_its_address() {
    let edge = NginxSetup::start().await;
    for (cidr, status) in [("127.0.0.1/32", 200), ("203.0.113.7/32", 403)] {
        let allowed_cidrs = vec![cidr.to_owned()];
        let (_, token) = edge
            .front
            .create_key(keyward::pb::CreateKeyRequest { allowed_cidrs, ..plain_key_request() })
            .await;
        let request = RawRequest::get("/monitors").bearer(&token).header("x-forwarded-for", "203.0.113.7");
        assert_eq!(edge.send(&request).status, status, "{cidr}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revoked_key_is_refused_through_nginx_at_once() {
    let edge = NginxSetup::start().await;
    let mut connection = RawConnection::open(edge.nginx.address).unwrap();
    for _ in 0..20 {
        let (id, token) = edge.front.create_key(plain_key_request()).await;
        let request = RawRequest::get("/monitors").bearer(&token);
        assert_eq!(connection.send(&request).unwrap().status, 200);
        edge.front.keyward.root_caller().revoke_key(&id).await.unwrap();
        assert_eq!(connection.send(&request).unwrap().status, 401);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn several_credentials_and_many_headers_break_nothing() {
    let edge = NginxSetup::start().await;
    let token = edge.front.create_token().await;
    let request = RawRequest::get("/monitors").bearer(&token);
    assert_eq!(edge.send(&request.clone().header("x-api-key", "another")).status, 401);
    // From 1.23 on nginx refuses two of them itself. Before, the first alone is judged, and no other reaches the service.
    let two = edge.send(&request.clone().bearer("another"));
    assert!(matches!(two.status, 200 | 400), "{two:?}");
    if two.status == 200 {
        assert_eq!(ReceivedRequest::from_answer(&two.body).header_values("authorization"), [""; 0]);
    }
    let second = RawRequest::get("/monitors").bearer("another").bearer(&token);
    assert!(matches!(edge.send(&second).status, 400 | 401));
    let many = (0..200).fold(request.clone(), |request, at| request.header(format!("x-{at}"), "v"));
    assert_eq!(edge.send(&many).status, 431, "the service itself; Keyward's own would be 503");
    assert_eq!(
        edge.send(&request.clone().header("x-large", "v".repeat(60 * 1024))).status,
        400,
        "nginx itself"
    );
    assert_eq!(edge.send(&request).status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_nginx_that_does_not_tell_of_the_request_opens_no_door() {
    let (front, upstream) = (ForwardAuthServer::start().await, EchoUpstream::start());
    let conf = fill_placeholders(
        &nginx_config(front.address, upstream.address),
        &[("proxy_set_header X-Original-URI $request_uri;", "")],
    );
    let nginx = NginxProcess::start(&conf);
    let response = RawRequest::get("/monitors").bearer(&front.create_token().await).send(nginx.address);
    assert_denied(&response, 503, "UNAVAILABLE");
    assert_eq!(upstream.take_received().len(), 0);
}

/// The list of what is to be removed grows with each.
fn with_made_up_names(request: RawRequest, count: usize) -> RawRequest {
    (0..count).fold(request, |request, at| request.header(format!("x-keyward-made-up-{at:03}"), "x"))
}

/// What `/monitors` needs, and so much more.
fn may_read_monitors(mut key: keyward::pb::CreateKeyRequest) -> keyward::pb::CreateKeyRequest {
    key.scopes.truncate(255);
    key.scopes.push("monitors:read".to_owned());
    key
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_with_very_many_scopes_passes_and_the_service_learns_that_the_list_was_cut() {
    let edge = NginxSetup::start().await;
    // With that one more, the list is just below its bound, just above, and far above.
    for (key, cut) in [
        (key_request_with_scopes(63), false),
        (key_request_with_scopes(64), true),
        (largest_key_request(), true),
    ] {
        let (_, token) = edge.front.create_key(may_read_monitors(key)).await;
        let request = RawRequest::get("/monitors").bearer(&token).header("X-Keyward-Truncated", "evil");
        let (response, arrived) = edge.send_expecting_pass(&request);
        let scopes = arrived.header_values("x-keyward-scopes");
        assert!(scopes.len() == 1 && (1900..=2048).contains(&scopes[0].len()), "{scopes:?}");
        let expected: &[&str] = if cut { &["scopes"] } else { &[] };
        assert_eq!(arrived.header_values("x-keyward-truncated"), expected);
        assert_eq!(arrived.header_values("x-keyward-account"), ["acme"]);
        assert!(response.headers.len() < 20, "{response:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_largest_answer_passes() {
    let (front, upstream) = (ForwardAuthServer::start().await, EchoUpstream::start());
    let nginx = NginxProcess::start(&nginx_config(front.address, upstream.address));
    let (_, token) = front.create_key(may_read_monitors(largest_key_request())).await;
    let request = RawRequest::get("/monitors").bearer(&token);
    assert_eq!(request.send(nginx.address).status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_with_many_missing_scopes_and_one_with_many_made_up_names_are_whole() {
    let (front, upstream) = (ForwardAuthServer::start().await, EchoUpstream::start());
    let scopes: Vec<_> = (0..30).map(|at| format!("{}:{at}", "m".repeat(100))).collect();
    let needs = format!("scopes={}&environment=production", scopes.join(","));
    let conf = fill_placeholders(
        &nginx_config(front.address, upstream.address),
        &[("scope=beta:use&environment=production&mode=shadow", &needs)],
    );
    let nginx = NginxProcess::start(&conf);
    let token = front.create_token().await;
    let missing = RawRequest::get("/beta/x").bearer(&token).send(nginx.address);
    assert_denied(&missing, 403, "FORBIDDEN");
    let challenge = r#"Bearer realm="keyward", error="insufficient_scope""#;
    assert_eq!(missing.header("www-authenticate"), Some(challenge));
    let named = with_made_up_names(RawRequest::get("/monitors").bearer(&token), 120);
    assert_denied(&named.send(nginx.address), 400, "BAD_REQUEST");
    assert_eq!(upstream.take_received().len(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_preflight_passes_without_a_credential_and_nothing_else_does() {
    let edge = NginxSetup::start().await;
    let preflight = |path: &str| {
        RawRequest::new("OPTIONS", path)
            .header("Origin", "https://app.test:8443")
            .header("Access-Control-Request-Method", "DELETE")
    };
    let (_, arrived) = edge.send_expecting_pass(&with_spoofed_identity(preflight("/reports/7")));
    assert_eq!((arrived.method.as_str(), arrived.target.as_str()), ("OPTIONS", "/reports/7"));
    assert!(arrived.headers.iter().all(|(name, _)| !name.starts_with("x-keyward-")), "{arrived:?}");
    let options = || RawRequest::new("OPTIONS", "/reports/7");
    for refused in [
        options(),
        options().header("Origin", "https://app.test"),
        options().header("Access-Control-Request-Method", "DELETE"),
        options().header("Origin", "").header("Access-Control-Request-Method", "DELETE"),
        options().header("Origin", "https://app.test").header("Access-Control-Request-Method", ""),
        preflight("/reports/7").bearer("wrong"),
        preflight("/reports/7").header("x-api-key", "wrong"),
        preflight("/monitors"),
        RawRequest::get("/reports/7").header("Origin", "a").header("Access-Control-Request-Method", "GET"),
    ] {
        assert_denied(&edge.send(&refused), 401, "UNAUTHORIZED");
    }
    let lower = RawRequest::new("OPTIONS", "/reports/7").header("Origin", "https://app.test");
    edge.send_expecting_pass(&lower.header("Access-Control-Request-Method", "patch"));
    edge.upstream.take_received();
    assert_eq!(edge.send(&preflight("/reports/../secrets")).status, 400);
    let scopes = vec!["reports:read".to_owned()];
    let (_, token) =
        edge.front.create_key(keyward::pb::CreateKeyRequest { scopes, ..plain_key_request() }).await;
    assert_eq!(edge.send(&options().bearer(&token)).status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_page_of_a_listed_origin_may_read_every_refusal_and_no_other_may() {
    let edge = NginxSetup::start().await;
    let token = edge.front.create_token().await;
    let (origin, allows) = ("https://app.example.com", "access-control-allow-origin");
    let report = |path: &str| RawRequest::get(path).header("Origin", origin);
    let limited = rate_limited_key_request();
    let scopes = vec!["reports:read".to_owned()];
    let (_, limited) = edge.front.create_key(keyward::pb::CreateKeyRequest { scopes, ..limited }).await;
    assert_eq!(edge.send(&report("/reports/7").bearer(&limited)).status, 200);
    let stranger =
        edge.send(&RawRequest::get("/reports/7").header("Origin", "https://app.example.com.evil.test"));
    assert_eq!((stranger.status, stranger.header(allows)), (401, None));
    assert_eq!(stranger.header("vary"), Some("Origin"), "a cache must keep the two apart");
    let elsewhere = edge.send(&report("/monitors"));
    assert_eq!((elsewhere.status, elsewhere.header(allows)), (401, None));
    let NginxSetup { front, nginx, .. } = edge;
    let refused = |request: RawRequest, status: u16| {
        let response = request.send(nginx.address);
        assert_eq!((response.status, response.header_values(allows)), (status, vec![origin]), "{response:?}");
        assert!(response.header("access-control-expose-headers").unwrap().contains("Retry-After"));
        assert_eq!(response.header_values("vary"), ["Origin"]);
    };
    refused(report("/reports/7"), 401);
    refused(report("/reports/7").bearer(&token), 403);
    refused(report("/reports/7").bearer(&limited), 429);
    refused(report("/reports/a;b").bearer(&token), 400);
    front.keyward.stop();
    refused(report("/reports/7").bearer(&token), 503);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_service_gets_the_number_of_a_request_that_the_log_has() {
    let (front, upstream) = (ForwardAuthServer::start().await, EchoUpstream::start());
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("access.log");
    let place = format!("access_log {} keyward;", log.display());
    let conf = fill_placeholders(
        &nginx_config(front.address, upstream.address),
        &[("access_log /dev/null keyward;", &place)],
    );
    let nginx = NginxProcess::start(&conf);
    let request =
        RawRequest::get("/monitors").bearer(&front.create_token().await).header("X-Request-Id", "mine");
    let arrived = ReceivedRequest::from_answer(&request.send(nginx.address).body);
    let [number] = arrived.header_values("x-request-id")[..] else { panic!("{arrived:?}") };
    let line = wait_for("a line", || std::fs::read_to_string(&log).ok().filter(|text| text.ends_with('\n')));
    assert!(number.len() == 32 && line.contains(&format!("id={number} ")), "{number}: {line}");
}

/// A service that takes one connection, says that the protocol changes, and sends back what it gets then. Gives the head
/// of the request.
fn websocket_service() -> (SocketAddr, std::thread::JoinHandle<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let serving = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(WAIT_TIMEOUT)).unwrap();
        let head = read_head(&mut stream);
        let answer = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n";
        stream.write_all(answer.as_bytes()).unwrap();
        let mut frame = [0; 4];
        stream.read_exact(&mut frame).unwrap();
        stream.write_all(&frame).unwrap();
        head
    });
    (address, serving)
}

fn read_head(stream: &mut TcpStream) -> String {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte).unwrap();
        head.extend(byte);
    }
    String::from_utf8(head).unwrap()
}

/// Begins a websocket that shows a token so, sends through it, and gives the head that reached the service.
async fn open_websocket(shown: impl Fn(&str) -> String) -> String {
    let front = ForwardAuthServer::start().await;
    let (service, serving) = websocket_service();
    let nginx = NginxProcess::start(&nginx_config(front.address, service));
    let token = front.create_token().await;
    let mut stream = TcpStream::connect(nginx.address).unwrap();
    stream.set_read_timeout(Some(WAIT_TIMEOUT)).unwrap();
    let request = format!(
        "GET /live HTTP/1.1\r\nhost: api.test\r\nupgrade: websocket\r\nconnection: keep-alive, Upgrade\r\n\
         sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n{}\r\n\r\n",
        shown(&token)
    );
    stream.write_all(request.as_bytes()).unwrap();
    let answer = read_head(&mut stream);
    assert!(answer.starts_with("HTTP/1.1 101 "), "{answer}");
    stream.write_all(b"ping").unwrap();
    let mut echo = [0; 4];
    stream.read_exact(&mut echo).unwrap();
    assert_eq!(&echo, b"ping");
    let head = serving.join().unwrap();
    assert!(!head.contains(&token), "{head}");
    let head = head.to_lowercase();
    for said in ["upgrade: websocket", "connection: upgrade", "x-keyward-account: acme", "sec-websocket-key:"]
    {
        assert!(head.contains(said), "{said}: {head}");
    }
    assert!(!head.contains("\r\nauthorization"), "{head}");
    head
}

#[tokio::test(flavor = "multi_thread")]
async fn a_websocket_begins_with_a_key_and_is_open_then() {
    open_websocket(|token| format!("authorization: Bearer {token}")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_page_shows_its_key_for_a_websocket_in_a_subprotocol_that_the_service_does_not_see() {
    let head = open_websocket(|token| format!("sec-websocket-protocol: live.v1, keyward.{token}")).await;
    assert!(head.contains("sec-websocket-protocol: live.v1\r\n"), "{head}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_subprotocol_is_a_credential_for_a_websocket_alone_and_never_reaches_the_service() {
    let edge = NginxSetup::start().await;
    let token = edge.front.create_token().await;
    let offer = |path: &str, offered: String| RawRequest::get(path).header("Sec-WebSocket-Protocol", offered);
    let begins = |request: RawRequest| request.header("Connection", "Upgrade").header("Upgrade", "websocket");
    for refused in [
        offer("/live", format!("a, keyward.{token}")),
        begins(offer("/monitors", format!("a, keyward.{token}"))),
        begins(offer("/live", format!("keyward.{token}"))),
        begins(offer("/live", format!("keyward.x, a, keyward.{token}"))),
        begins(offer("/live", "a, keyward.wrong".to_owned())),
    ] {
        assert_denied(&edge.send(&refused), 401, "UNAUTHORIZED");
    }
    edge.assert_nothing_received();
    for offered in ["keyward.a", "keyward.a, b", "keyward.a, b, keyward.c", "KEYWARD.a"] {
        let (_, arrived) = edge.send_expecting_pass(&offer("/health", offered.to_owned()));
        assert_eq!(arrived.header_values("sec-websocket-protocol"), [""; 0], "{offered}");
    }
    let (_, arrived) = edge.send_expecting_pass(&offer("/health", "a, b".to_owned()));
    assert_eq!(arrived.header_values("sec-websocket-protocol"), ["a, b"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn no_other_protocol_is_begun_and_no_other_location_begins_one() {
    let edge = NginxSetup::start().await;
    let token = edge.front.create_token().await;
    let upgrade = |path: &str, to: &str| {
        RawRequest::get(path)
            .header("Connection", "Upgrade, HTTP2-Settings")
            .header("Upgrade", to)
            .header("HTTP2-Settings", "AA")
    };
    assert_denied(&edge.send(&upgrade("/live", "websocket")), 401, "UNAUTHORIZED");
    for (path, to) in
        [("/live", "h2c"), ("/live", "websocket, h2c"), ("/monitors", "websocket"), ("/monitors", "h2c")]
    {
        let (_, arrived) = edge.send_expecting_pass(&upgrade(path, to).bearer(&token));
        assert_eq!(arrived.header_values("upgrade"), [""; 0], "{path} {to}");
        assert!(
            !arrived.header_values("connection").iter().any(|value| value.contains("pgrade")),
            "{arrived:?}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_log_of_nginx_has_no_query_and_no_token() {
    let (front, upstream) = (ForwardAuthServer::start().await, EchoUpstream::start());
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("access.log");
    let place = format!("access_log {} keyward;", log.display());
    let conf = fill_placeholders(
        &nginx_config(front.address, upstream.address),
        &[("access_log /dev/null keyward;", &place)],
    );
    let nginx = NginxProcess::start(&conf);
    let (id, token) = front.create_key(plain_key_request()).await;
    let target = format!("/monitors/{token}/x?api_key={token}");
    let request = RawRequest::get(&target).bearer(&token).header("Referer", format!("https://a/?{token}"));
    assert_eq!(request.send(nginx.address).status, 200);
    assert_eq!(RawRequest::get(&target).send(nginx.address).status, 401);
    // Two tokens, another long word after it, and a line end before it, which is refused.
    for path in [
        format!("/health/{token}/{token}"),
        format!("/j/{token}/sha_{}.css", "a".repeat(40)),
        format!("/b/x%0a{token}"),
    ] {
        RawRequest::get(&path).send(nginx.address);
    }
    let text = wait_for("five lines", || {
        let text = std::fs::read_to_string(&log).ok()?;
        (text.lines().count() == 5).then_some(text)
    });
    assert!(!text.contains(&token[token.len() - 49..]) && !text.contains("api_key"), "{text}");
    assert!(text.contains(r#""GET /monitors/kw_live_*** HTTP/1.1" 200"#), "{text}");
    assert!(text.contains(&format!("key={id}")), "{text}");
}
