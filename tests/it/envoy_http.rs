//! The real Envoy with `deploy/envoy/http.yaml`: ext_authz over HTTP.

use crate::{
    forward_auth::{ForwardAuthServer, assert_denied, largest_key_request, rate_limited_key_request},
    process::plain_key_request,
    proxy::{EnvoyProcess, fill_placeholders},
    raw_http::{RawConnection, RawRequest, RawResponse},
    upstream::{EchoUpstream, ReceivedRequest},
};

const YAML: &str = include_str!("../../deploy/envoy/http.yaml");

/// Envoy, with Keyward and a service behind it.
struct EnvoyHttpSetup {
    front: ForwardAuthServer,
    upstream: EchoUpstream,
    envoy: EnvoyProcess,
}

impl EnvoyHttpSetup {
    async fn start() -> EnvoyHttpSetup {
        EnvoyHttpSetup::start_with(|yaml| yaml).await
    }

    async fn start_with(change: impl FnOnce(String) -> String) -> EnvoyHttpSetup {
        let (front, upstream) = (ForwardAuthServer::start().await, EchoUpstream::start());
        let port = |port: u16| format!("port_value: {port} ");
        let yaml = fill_placeholders(
            YAML,
            &[
                ("port_value: 10000 ", "port_value: 0 "),
                ("port_value: 50053 ", &port(front.address.port())),
                ("port_value: 8080 ", &port(upstream.address.port())),
            ],
        );
        let envoy = EnvoyProcess::start(&change(yaml));
        EnvoyHttpSetup { front, upstream, envoy }
    }

    #[track_caller]
    fn send(&self, request: &RawRequest) -> RawResponse {
        request.send(self.envoy.listener_address("edge"))
    }

    #[track_caller]
    fn passed(&self, request: &RawRequest) -> (RawResponse, ReceivedRequest) {
        let response = self.send(request);
        assert_eq!(response.status, 200, "{response:?}");
        let arrived = ReceivedRequest::from_answer(&response.body);
        (response, arrived)
    }
}

/// A client that makes up who it is.
fn with_spoofed_identity(request: RawRequest) -> RawRequest {
    request
        .header("X-Keyward-Account", "evil")
        .header("x-keyward-user", "evil")
        .header("x-keyward-later", "evil")
}

#[test]
fn envoy_takes_the_configuration_as_it_is() {
    assert_eq!(EnvoyProcess::validate(YAML), Ok(()));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_service_learns_who_calls_and_never_sees_the_credential() {
    let edge = EnvoyHttpSetup::start().await;
    let (id, token) = edge.front.create_key(plain_key_request()).await;
    for request in [
        RawRequest::new("GET", "/monitors/7?x=1").bearer(&token),
        RawRequest::new("GET", "/monitors/7?x=1").header("x-api-key", &token),
    ] {
        let (_, arrived) = edge.passed(&with_spoofed_identity(request));
        assert_eq!(arrived.target, "/monitors/7?x=1");
        assert_eq!(arrived.header_values("x-keyward-key-id"), [&*id]);
        assert_eq!(arrived.header_values("x-keyward-account"), ["acme"]);
        for gone in ["x-keyward-user", "x-keyward-later", "authorization", "x-api-key"] {
            assert_eq!(arrived.header_values(gone), [""; 0], "{gone}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_denied_client_hears_why() {
    let edge = EnvoyHttpSetup::start().await;
    let token = edge.front.create_token().await;
    let nobody = edge.send(&RawRequest::get("/monitors"));
    assert_denied(&nobody, 401, "UNAUTHORIZED");
    assert_eq!(nobody.header("www-authenticate"), Some(r#"Bearer realm="keyward""#));
    assert_denied(&edge.send(&RawRequest::get("/secrets").bearer(&token)), 403, "FORBIDDEN");
    assert_denied(&edge.send(&RawRequest::new("DELETE", "/monitors/7").bearer(&token)), 403, "FORBIDDEN");
    assert_denied(&edge.send(&RawRequest::get("/monitors/%252e").bearer(&token)), 400, "BAD_REQUEST");
    let override_it = RawRequest::get("/monitors").bearer(&token).header("x-http-method-override", "DELETE");
    assert_denied(&edge.send(&override_it), 400, "BAD_REQUEST");
    let (_, limited) = edge.front.create_key(rate_limited_key_request()).await;
    let (first, _) = edge.passed(&RawRequest::get("/monitors").bearer(&limited));
    assert_eq!(first.header("ratelimit"), Some(r#""minute";r=0;t=60"#));
    let second = edge.send(&RawRequest::get("/monitors").bearer(&limited));
    assert_denied(&second, 429, "RATE_LIMITED");
    assert_eq!(second.header("retry-after"), Some("60"));
    assert_eq!(edge.upstream.take_received().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn shadow_mode_lets_pass_and_marks() {
    let edge = EnvoyHttpSetup::start().await;
    let token = edge.front.create_token().await;
    let (_, arrived) = edge.passed(&with_spoofed_identity(RawRequest::get("/trial")).bearer(&token));
    assert_eq!(arrived.header_values("x-keyward-shadow"), ["missing_scope"]);
    assert_eq!(arrived.header_values("x-keyward-account"), [""; 0], "nobody is vouched for");
    assert_eq!(arrived.header_values("authorization"), [format!("Bearer {token}")]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revoked_key_is_refused_and_a_stopped_keyward_is_503() {
    let edge = EnvoyHttpSetup::start().await;
    let (id, token) = edge.front.create_key(plain_key_request()).await;
    let mut connection = RawConnection::open(edge.envoy.listener_address("edge")).unwrap();
    let request = RawRequest::get("/monitors").bearer(&token);
    assert_eq!(connection.send(&request).unwrap().status, 200);
    edge.front.keyward.root_caller().revoke_key(&id).await.unwrap();
    assert_eq!(connection.send(&request).unwrap().status, 401);
    let EnvoyHttpSetup { front, envoy, upstream } = edge;
    front.keyward.stop();
    assert_eq!(request.send(envoy.listener_address("edge")).status, 503);
    assert_eq!(upstream.take_received().len(), 1);
}

/// Over loopback Envoy writes an address of its own into `x-forwarded-for`; so another comes in by the PROXY protocol.
#[tokio::test(flavor = "multi_thread")]
async fn the_clients_address_arrives() {
    const PROXY: &str = "    listener_filters:\n    - name: envoy.filters.listener.proxy_protocol\n      \
        typed_config: { \"@type\": type.googleapis.com/envoy.extensions.filters.listener.proxy_protocol.v3.ProxyProtocol }\n";
    let filters = "    filter_chains:\n";
    let edge = EnvoyHttpSetup::start_with(|yaml| {
        fill_placeholders(&yaml, &[(filters, &format!("{PROXY}{filters}"))])
    })
    .await;
    let allowed_cidrs = vec!["203.0.113.7/32".to_owned()];
    let (_, token) =
        edge.front.create_key(keyward::pb::CreateKeyRequest { allowed_cidrs, ..plain_key_request() }).await;
    let from = |ip: &str| {
        let line = format!("PROXY TCP4 {ip} 127.0.0.1 1000 80\r\nGET");
        let request = RawRequest::new(&line, "/monitors").bearer(&token);
        edge.send(&request.header("x-forwarded-for", "203.0.113.7")).status
    };
    assert_eq!(from("203.0.113.7"), 200);
    assert_eq!(from("203.0.113.8"), 403);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_with_very_many_scopes_passes_and_the_service_learns_that_the_list_was_cut() {
    let edge = EnvoyHttpSetup::start().await;
    let mut key = largest_key_request();
    key.scopes[0] = "monitors:read".to_owned();
    let (_, token) = edge.front.create_key(key).await;
    let (_, arrived) =
        edge.passed(&RawRequest::get("/monitors").bearer(&token).header("x-keyward-truncated", "evil"));
    assert!((1900..=2048).contains(&arrived.header_values("x-keyward-scopes")[0].len()), "{arrived:?}");
    assert_eq!(arrived.header_values("x-keyward-truncated"), ["scopes"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_envoy_sends_along_is_passed_over_and_reaches_the_service() {
    let edge = EnvoyHttpSetup::start_with(|yaml| {
        let body =
            "failure_mode_allow: false\n              with_request_body: { max_request_bytes: 4194304 }";
        fill_placeholders(
            &yaml,
            &[("failure_mode_allow: false", body), ("timeout: 0.25s }", "timeout: 10s }")],
        )
    })
    .await;
    // A rule without methods of its own is for GET alone.
    for length in [10, 200_000, 4 << 20] {
        let request = RawRequest::new("GET", "/health").body("text/plain", vec![b'b'; length]);
        let (_, arrived) = edge.passed(&request);
        assert_eq!(arrived.body.len(), length);
        let denied = RawRequest::new("GET", "/monitors").body("text/plain", vec![b'b'; length]);
        assert_denied(&edge.send(&denied), 401, "UNAUTHORIZED");
    }
}
