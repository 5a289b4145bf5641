//! The real Envoy with `deploy/envoy/http.yaml`: ext_authz over HTTP.

use crate::{
    forward_auth::{Front, assert_denied, key_with_a_limit, largest_key},
    http::{Connection, Request, Response},
    process::plain_key,
    proxy::{Envoy, filled},
    upstream::{Arrived, Upstream},
};

const YAML: &str = include_str!("../../deploy/envoy/http.yaml");

/// Envoy, with Keyward and a service behind it.
struct Edge {
    front: Front,
    upstream: Upstream,
    envoy: Envoy,
}

impl Edge {
    async fn start() -> Edge {
        Edge::start_with(|yaml| yaml).await
    }

    async fn start_with(change: impl FnOnce(String) -> String) -> Edge {
        let (front, upstream) = (Front::start().await, Upstream::start());
        let port = |port: u16| format!("port_value: {port} ");
        let yaml = filled(
            YAML,
            &[
                ("port_value: 10000 ", "port_value: 0 "),
                ("port_value: 50053 ", &port(front.address.port())),
                ("port_value: 8080 ", &port(upstream.address.port())),
            ],
        );
        let envoy = Envoy::start(&change(yaml));
        Edge { front, upstream, envoy }
    }

    #[track_caller]
    fn send(&self, request: &Request) -> Response {
        request.send(self.envoy.listener("edge"))
    }

    #[track_caller]
    fn passed(&self, request: &Request) -> (Response, Arrived) {
        let response = self.send(request);
        assert_eq!(response.status, 200, "{response:?}");
        let arrived = Arrived::from_answer(&response.body);
        (response, arrived)
    }
}

/// A client that makes up who it is.
fn spoofed(request: Request) -> Request {
    request
        .header("X-Keyward-Account", "evil")
        .header("x-keyward-user", "evil")
        .header("x-keyward-later", "evil")
}

#[test]
fn envoy_takes_the_configuration_as_it_is() {
    assert_eq!(Envoy::validate(YAML), Ok(()));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_service_learns_who_calls_and_never_sees_the_credential() {
    let edge = Edge::start().await;
    let (id, token) = edge.front.key(plain_key()).await;
    for request in [
        Request::new("GET", "/monitors/7?x=1").bearer(&token),
        Request::new("GET", "/monitors/7?x=1").header("x-api-key", &token),
    ] {
        let (_, arrived) = edge.passed(&spoofed(request));
        assert_eq!(arrived.target, "/monitors/7?x=1");
        assert_eq!(arrived.all("x-keyward-key-id"), [&*id]);
        assert_eq!(arrived.all("x-keyward-account"), ["acme"]);
        for gone in ["x-keyward-user", "x-keyward-later", "authorization", "x-api-key"] {
            assert_eq!(arrived.all(gone), [""; 0], "{gone}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_denied_client_hears_why() {
    let edge = Edge::start().await;
    let token = edge.front.token().await;
    let nobody = edge.send(&Request::get("/monitors"));
    assert_denied(&nobody, 401, "UNAUTHORIZED");
    assert_eq!(nobody.header("www-authenticate"), Some(r#"Bearer realm="keyward""#));
    assert_denied(&edge.send(&Request::get("/secrets").bearer(&token)), 403, "FORBIDDEN");
    assert_denied(&edge.send(&Request::new("DELETE", "/monitors/7").bearer(&token)), 403, "FORBIDDEN");
    assert_denied(&edge.send(&Request::get("/monitors/%252e").bearer(&token)), 400, "BAD_REQUEST");
    let override_it = Request::get("/monitors").bearer(&token).header("x-http-method-override", "DELETE");
    assert_denied(&edge.send(&override_it), 400, "BAD_REQUEST");
    let (_, limited) = edge.front.key(key_with_a_limit()).await;
    let (first, _) = edge.passed(&Request::get("/monitors").bearer(&limited));
    assert_eq!(first.header("ratelimit"), Some(r#""minute";r=0;t=60"#));
    let second = edge.send(&Request::get("/monitors").bearer(&limited));
    assert_denied(&second, 429, "RATE_LIMITED");
    assert_eq!(second.header("retry-after"), Some("60"));
    assert_eq!(edge.upstream.take_arrived().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn shadow_mode_lets_pass_and_marks() {
    let edge = Edge::start().await;
    let token = edge.front.token().await;
    let (_, arrived) = edge.passed(&spoofed(Request::get("/trial")).bearer(&token));
    assert_eq!(arrived.all("x-keyward-shadow"), ["missing_scope"]);
    assert_eq!(arrived.all("x-keyward-account"), [""; 0], "nobody is vouched for");
    assert_eq!(arrived.all("authorization"), [format!("Bearer {token}")]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revoked_key_is_refused_and_a_stopped_keyward_is_503() {
    let edge = Edge::start().await;
    let (id, token) = edge.front.key(plain_key()).await;
    let mut connection = Connection::open(edge.envoy.listener("edge")).unwrap();
    let request = Request::get("/monitors").bearer(&token);
    assert_eq!(connection.send(&request).unwrap().status, 200);
    edge.front.keyward.root().revoke(&id).await.unwrap();
    assert_eq!(connection.send(&request).unwrap().status, 401);
    let Edge { front, envoy, upstream } = edge;
    front.keyward.stop();
    assert_eq!(request.send(envoy.listener("edge")).status, 503);
    assert_eq!(upstream.take_arrived().len(), 1);
}

/// Over loopback Envoy writes an address of its own into `x-forwarded-for`; so another comes in by the PROXY protocol.
#[tokio::test(flavor = "multi_thread")]
async fn the_clients_address_arrives() {
    const PROXY: &str = "    listener_filters:\n    - name: envoy.filters.listener.proxy_protocol\n      \
        typed_config: { \"@type\": type.googleapis.com/envoy.extensions.filters.listener.proxy_protocol.v3.ProxyProtocol }\n";
    let filters = "    filter_chains:\n";
    let edge = Edge::start_with(|yaml| filled(&yaml, &[(filters, &format!("{PROXY}{filters}"))])).await;
    let allowed_cidrs = vec!["203.0.113.7/32".to_owned()];
    let (_, token) = edge.front.key(keyward::pb::CreateKeyRequest { allowed_cidrs, ..plain_key() }).await;
    let from = |ip: &str| {
        let line = format!("PROXY TCP4 {ip} 127.0.0.1 1000 80\r\nGET");
        let request = Request::new(&line, "/monitors").bearer(&token);
        edge.send(&request.header("x-forwarded-for", "203.0.113.7")).status
    };
    assert_eq!(from("203.0.113.7"), 200);
    assert_eq!(from("203.0.113.8"), 403);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_with_very_many_scopes_passes_and_the_service_learns_that_the_list_was_cut() {
    let edge = Edge::start().await;
    let mut key = largest_key();
    key.scopes[0] = "monitors:read".to_owned();
    let (_, token) = edge.front.key(key).await;
    let (_, arrived) =
        edge.passed(&Request::get("/monitors").bearer(&token).header("x-keyward-truncated", "evil"));
    assert!((1900..=2048).contains(&arrived.all("x-keyward-scopes")[0].len()), "{arrived:?}");
    assert_eq!(arrived.all("x-keyward-truncated"), ["scopes"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_envoy_sends_along_is_passed_over_and_reaches_the_service() {
    let edge = Edge::start_with(|yaml| {
        let body =
            "failure_mode_allow: false\n              with_request_body: { max_request_bytes: 4194304 }";
        filled(&yaml, &[("failure_mode_allow: false", body), ("timeout: 0.25s }", "timeout: 10s }")])
    })
    .await;
    // A rule without methods of its own is for GET alone.
    for length in [10, 200_000, 4 << 20] {
        let request = Request::new("GET", "/health").body("text/plain", vec![b'b'; length]);
        let (_, arrived) = edge.passed(&request);
        assert_eq!(arrived.body.len(), length);
        let denied = Request::new("GET", "/monitors").body("text/plain", vec![b'b'; length]);
        assert_denied(&edge.send(&denied), 401, "UNAUTHORIZED");
    }
}
