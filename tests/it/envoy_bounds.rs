//! The real Envoy, over gRPC, with much of everything: scopes, made-up names, bodies that Keyward gets to see.

use std::net::SocketAddr;

use crate::{
    envoy::minimal_config,
    forward_auth::{assert_denied, key_request_with_scopes, largest_key_request},
    process::{KeywardProcess, TestHome, plain_key_request, wait_for},
    proxy::{EnvoyProcess, fill_placeholders},
    raw_http::{RawRequest, RawResponse},
    upstream::{EchoUpstream, ReceivedRequest},
};

/// Keyward, a service, and Envoy with the minimal file.
struct EnvoyBoundsSetup {
    keyward: KeywardProcess,
    upstream: EchoUpstream,
    envoy: EnvoyProcess,
}

impl EnvoyBoundsSetup {
    async fn start(change: impl FnOnce(String) -> String) -> EnvoyBoundsSetup {
        let home = TestHome::new();
        let mut command = home.serve_command();
        command.args(["--envoy-listen", "127.0.0.1:0"]);
        let keyward = home.start_with(command).unwrap_or_else(|ended| panic!("{ended:?}"));
        keyward.root_caller().create_account("acme").await;
        let upstream = EchoUpstream::start();
        let envoy =
            EnvoyProcess::start(&change(minimal_config(keyward.process.envoy_address().unwrap(), &upstream)));
        EnvoyBoundsSetup { keyward, upstream, envoy }
    }

    async fn token(&self, key: keyward::pb::CreateKeyRequest) -> String {
        self.keyward.root_caller().create_key(key).await.unwrap().1
    }

    fn address(&self) -> SocketAddr {
        self.envoy.listener_address("edge")
    }

    fn send(&self, request: &RawRequest) -> RawResponse {
        request.send(self.address())
    }
}

fn keep_config(yaml: String) -> String {
    yaml
}

/// Envoy sends bodies of up to so many bytes along. A slow machine has time to send them.
fn with_bodies(yaml: &str, most: usize) -> String {
    fill_placeholders(
        yaml,
        &[
            (
                "validate_mutations: true",
                &format!(
                    "validate_mutations: true\n              with_request_body: {{ max_request_bytes: {most} }}"
                ),
            ),
            ("timeout: 0.25s\n                envoy_grpc", "timeout: 10s\n                envoy_grpc"),
        ],
    )
}

#[tokio::test]
async fn a_key_with_very_many_scopes_passes_and_the_service_learns_that_the_list_was_cut() {
    let edge = EnvoyBoundsSetup::start(keep_config).await;
    for (mut key, cut) in [
        (key_request_with_scopes(63), false),
        (key_request_with_scopes(64), true),
        (largest_key_request(), true),
    ] {
        key.scopes.truncate(255);
        key.scopes.push("monitors:read".to_owned());
        let request = RawRequest::get("/v1/monitors").bearer(&edge.token(key).await);
        let response = edge.send(&request.header("x-keyward-truncated", "evil"));
        assert_eq!(response.status, 200, "{response:?}");
        let arrived = ReceivedRequest::from_answer(&response.body);
        assert!((1900..=2048).contains(&arrived.header_values("x-keyward-scopes")[0].len()), "{arrived:?}");
        let expected: &[&str] = if cut { &["scopes"] } else { &[] };
        assert_eq!(arrived.header_values("x-keyward-truncated"), expected);
    }
}

#[tokio::test]
async fn more_made_up_names_than_envoy_can_be_told_are_400() {
    let edge = EnvoyBoundsSetup::start(keep_config).await;
    let token = edge.token(plain_key_request()).await;
    let with = |count: usize| {
        let request = RawRequest::get("/v1/monitors").bearer(&token);
        let named =
            (0..count).fold(request, |request, at| request.header(format!("x-keyward-made-up-{at:02}"), "x"));
        edge.send(&named)
    };
    let passed = with(60);
    assert_eq!(passed.status, 200, "{passed:?}");
    let arrived = ReceivedRequest::from_answer(&passed.body);
    assert!(!arrived.headers.iter().any(|(name, _)| name.starts_with("x-keyward-made-up")), "{arrived:?}");
    // Envoy itself takes up to 100 headers.
    let long = (0..80).fold(RawRequest::get("/health"), |request, at| {
        request.header(format!("x-keyward-made-up-of-very-many-letters-{at:02}"), "x")
    });
    assert_denied(&edge.send(&long), 400, "BAD_REQUEST");
    assert_eq!(edge.upstream.take_received().len(), 1);
}

#[tokio::test]
async fn a_body_that_envoy_sends_along_is_passed_over_and_reaches_the_service() {
    let edge = EnvoyBoundsSetup::start(|yaml| with_bodies(&yaml, 4 << 20)).await;
    let token = edge.token(plain_key_request()).await;
    for length in [10, 200_000, 4 << 20] {
        let body = vec![b'b'; length];
        let request = RawRequest::new("POST", "/v1/monitors").bearer(&token).body("text/plain", body);
        let response = edge.send(&request);
        assert_eq!(response.status, 200, "{length}: {:?}", response.headers);
        assert_eq!(ReceivedRequest::from_answer(&response.body).body.len(), length);
        let denied = RawRequest::new("POST", "/v1/monitors").body("text/plain", vec![0xff; length]);
        assert_denied(&edge.send(&denied), 401, "UNAUTHORIZED");
    }
}

#[tokio::test]
async fn a_body_beyond_the_bound_is_413_in_words_and_a_line_in_the_log() {
    for fails_open in [false, true] {
        let open = |yaml: String| match fails_open {
            true => fill_placeholders(&yaml, &[("failure_mode_allow: false", "failure_mode_allow: true")]),
            false => yaml,
        };
        let edge = EnvoyBoundsSetup::start(|yaml| open(with_bodies(&yaml, 16 << 20))).await;
        let token = edge.token(plain_key_request()).await;
        let large = |token: &str| {
            RawRequest::new("POST", "/v1/monitors").bearer(token).body("text/plain", vec![b'b'; 5 << 20])
        };
        for token in [&*token, "wrong"] {
            assert_denied(&edge.send(&large(token)), 413, "PAYLOAD_TOO_LARGE");
        }
        assert_eq!(
            edge.upstream.take_received().len(),
            0,
            "an error would let it pass where Envoy fails open"
        );
        wait_for("the line", || edge.keyward.process.stderr().contains("max_request_bytes").then_some(()));
        let metrics = edge.keyward.fetch_admin_page("/metrics").1;
        let counted = r#"{via="ext_authz",mode="enforce",result="denied",reason="too_large"} 2"#;
        assert!(metrics.contains(counted), "{metrics}");
        assert_eq!(edge.send(&RawRequest::get("/v1/monitors").bearer(&token)).status, 200, "and it goes on");
    }
}

#[test]
fn no_example_of_envoy_logs_a_query() {
    let deploy = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy");
    for file in [
        "envoy/production.yaml",
        "envoy/minimal.yaml",
        "envoy/http.yaml",
        "envoy/rest.yaml",
        "compose/envoy.yaml",
    ] {
        let text = std::fs::read_to_string(deploy.join(file)).unwrap();
        for with_query in ["%REQ(:PATH", "%REQ(X-ENVOY-ORIGINAL-PATH", "%PATH(WQ", "%PATH%", "%REQUEST_LINE"]
        {
            assert!(!text.to_uppercase().contains(with_query), "{file}: {with_query}");
        }
        // Envoy's own format, which an access log without one has, begins with the path and its query.
        let logs = text.matches("AccessLog\n").count();
        assert_eq!(text.matches("log_format:").count(), logs, "{file}");
    }
}
