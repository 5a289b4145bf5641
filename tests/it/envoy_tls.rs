//! The TLS of `deploy/envoy/production.yaml` and the listeners of `deploy/examples/listeners.toml`, between the real
//! Envoy and the real server.

use std::{net::SocketAddr, path::Path};

use crate::{
    authority::{Authority, replace},
    envoy::{deployed, port},
    http::Request,
    process::{Home, Keyward, plain_key, wait_for},
    proxy::{Envoy, filled},
    upstream::Upstream,
};

/// `deploy/examples/listeners.toml` with the files of a test, on ports of the system's choice.
fn listeners(home: &Home) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/examples/listeners.toml");
    let folder = home.path("tls");
    filled(
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
fn production(keyward: SocketAddr, upstream: &Upstream, folder: &Path) -> String {
    let text = deployed("production.yaml");
    let start = text.find("    # transport_socket:").unwrap();
    let end = start + text[start..].find("    circuit_breakers:").unwrap();
    let tls = text[start..end].replace("    # ", "    ");
    let rules = "- endpoint: { address: { socket_address: { address: 127.0.0.1, port_value: 50062 } } }";
    filled(
        &[&text[..start], &tls, &text[end..]].concat(),
        &[
            (&port(10000), &port(0)),
            (&port(9901), &port(0)),
            (&port(50052), &port(keyward.port())),
            (rules, ""),
            (&port(8080), &port(upstream.address.port())),
            ("/etc/envoy/tls", folder.to_str().unwrap()),
            // What the route of the test needs.
            ("{ environment: production }", "{ environment: production, scope: \"monitors:read\" }"),
        ],
    )
}

fn start(home: &Home) -> Keyward {
    std::fs::write(home.path("keyward.toml"), listeners(home)).unwrap();
    let mut command = home.serve();
    command.args(["--config", "keyward.toml"]);
    home.start_as(command).unwrap_or_else(|ended| panic!("{ended:?}"))
}

#[tokio::test]
async fn envoy_asks_over_tls_and_is_known_by_its_certificate() {
    let (home, authority, upstream) = (Home::new(), Authority::new("ours"), Upstream::start());
    let folder = home.path("tls");
    std::fs::create_dir(&folder).unwrap();
    authority.server(2040).write(&folder.join("server.crt"), &folder.join("server.key"));
    replace(&folder.join("clients.crt"), &authority.pem);
    replace(&folder.join("ca.crt"), &authority.pem);
    authority
        .client("spiffe://example.org/envoy")
        .write(&folder.join("client.crt"), &folder.join("client.key"));
    let keyward = start(&home);
    keyward.root().make_account("acme").await;
    let (_, token) = keyward.root().create(plain_key()).await.unwrap();
    let edge: SocketAddr = keyward.process.listener("edge").unwrap().parse().unwrap();

    let envoy = Envoy::start(&production(edge, &upstream, &folder));
    wait_for("Envoy to know that Keyward is well", || {
        (envoy.stat("cluster.keyward.membership_healthy") == 1).then_some(())
    });
    let to = envoy.listener("edge");
    assert_eq!(Request::get("/v1/monitors").bearer(&token).send(to).status, 200);
    assert_eq!(Request::get("/v1/monitors").bearer("kw_live_x").send(to).status, 401);
    assert!(envoy.stat("cluster.keyward.ssl.handshake") > 0);

    // Signed by the same authority, and nobody's: Keyward refuses to answer it, and an outage is no verdict.
    authority
        .client("spiffe://example.org/other")
        .write(&folder.join("client.crt"), &folder.join("client.key"));
    let other = Envoy::start(&production(edge, &upstream, &folder));
    wait_for("Envoy to know that Keyward is well", || {
        (other.stat("cluster.keyward.membership_healthy") == 1).then_some(())
    });
    assert_eq!(Request::get("/v1/monitors").bearer(&token).send(other.listener("edge")).status, 503);
}
