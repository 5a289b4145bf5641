//! The TLS of `deploy/envoy/production.yaml` and the listeners of `deploy/examples/listeners.toml`, between the real
//! Envoy and the real server.

use std::{net::SocketAddr, path::Path};

use crate::{
    envoy::{port_placeholder, read_deployed_file},
    process::{KeywardProcess, TestHome, plain_key_request, wait_for},
    proxy::{EnvoyProcess, fill_placeholders},
    raw_http::RawRequest,
    test_ca::{TestCa, replace_file},
    upstream::EchoUpstream,
};

/// `deploy/examples/listeners.toml` with the files of a test, on ports of the system's choice.
fn listeners(home: &TestHome) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/examples/listeners.toml");
    let folder = home.path("tls");
    fill_placeholders(
        &std::fs::read_to_string(path).unwrap(),
        &[
            ("/etc/keyward/tls", folder.to_str().unwrap()),
            ("0.0.0.0:50051", "127.0.0.1:0"),
            ("0.0.0.0:50052", "127.0.0.1:0"),
            ("0.0.0.0:50053", "127.0.0.1:0"),
            ("127.0.0.1:9090", "127.0.0.1:0"),
        ],
    )
}

/// `deploy/envoy/production.yaml` with its TLS in force.
fn production(keyward: SocketAddr, upstream: &EchoUpstream, folder: &Path) -> String {
    let text = read_deployed_file("production.yaml");
    let start = text.find("    # transport_socket:").unwrap();
    let end = start + text[start..].find("    circuit_breakers:").unwrap();
    let tls = text[start..end].replace("    # ", "    ");
    let rules = "- endpoint: { address: { socket_address: { address: 127.0.0.1, port_value: 50062 } } }";
    fill_placeholders(
        &[&text[..start], &tls, &text[end..]].concat(),
        &[
            (&port_placeholder(10000), &port_placeholder(0)),
            (&port_placeholder(9901), &port_placeholder(0)),
            (&port_placeholder(50052), &port_placeholder(keyward.port())),
            (rules, ""),
            (&port_placeholder(8080), &port_placeholder(upstream.address.port())),
            ("/etc/envoy/tls", folder.to_str().unwrap()),
            // What the route of the test needs.
            ("{ environment: production }", "{ environment: production, scope: \"monitors:read\" }"),
        ],
    )
}

fn start(home: &TestHome) -> KeywardProcess {
    std::fs::write(home.path("keyward.toml"), listeners(home)).unwrap();
    let mut command = home.serve_command();
    command.args(["--config", "keyward.toml"]);
    home.start_with(command).unwrap_or_else(|ended| panic!("{ended:?}"))
}

#[tokio::test]
async fn envoy_asks_over_tls_and_is_known_by_its_certificate() {
    let (home, authority, upstream) = (TestHome::new(), TestCa::new("ours"), EchoUpstream::start());
    let folder = home.path("tls");
    std::fs::create_dir(&folder).unwrap();
    authority
        .issue_server_certificate(2040)
        .write_files(&folder.join("server.crt"), &folder.join("server.key"));
    replace_file(&folder.join("clients.crt"), &authority.pem);
    replace_file(&folder.join("ca.crt"), &authority.pem);
    authority
        .issue_client_certificate("spiffe://example.org/envoy")
        .write_files(&folder.join("client.crt"), &folder.join("client.key"));
    let keyward = start(&home);
    keyward.root_caller().create_account("acme").await;
    let (_, token) = keyward.root_caller().create_key(plain_key_request()).await.unwrap();
    let edge: SocketAddr = keyward.process.listener_address("edge").unwrap().parse().unwrap();

    let envoy = EnvoyProcess::start(&production(edge, &upstream, &folder));
    wait_for("Envoy to know that Keyward is well", || {
        (envoy.read_stat("cluster.keyward.membership_healthy") == 1).then_some(())
    });
    let to = envoy.listener_address("edge");
    assert_eq!(RawRequest::get("/v1/monitors").bearer(&token).send(to).status, 200);
    assert_eq!(RawRequest::get("/v1/monitors").bearer("kw_live_x").send(to).status, 401);
    assert!(envoy.read_stat("cluster.keyward.ssl.handshake") > 0);

    // Signed by the same authority, and nobody's: Keyward refuses to answer it, and an outage is no verdict.
    authority
        .issue_client_certificate("spiffe://example.org/other")
        .write_files(&folder.join("client.crt"), &folder.join("client.key"));
    let other = EnvoyProcess::start(&production(edge, &upstream, &folder));
    wait_for("Envoy to know that Keyward is well", || {
        (other.read_stat("cluster.keyward.membership_healthy") == 1).then_some(())
    });
    assert_eq!(
        RawRequest::get("/v1/monitors").bearer(&token).send(other.listener_address("edge")).status,
        503
    );
}
