//! What a check costs a request through Envoy: requests per second and latency without ext_authz, with a stub that
//! answers every check with the same bytes, and with Keyward; turn about, so that a noisy machine is noisy for all.
//!
//! `cargo bench --bench envoy -- [SECONDS]`, of each round of each way: 3 unless said. It needs `envoy` and `wrk`
//! (`tools/install envoy wrk`) on the PATH. Read ratios, not rates.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::disallowed_methods,
    reason = "a benchmark talks and stops"
)]

#[path = "shared/goal.rs"]
mod goal;

use std::{
    convert::Infallible,
    io::Read as _,
    net::SocketAddr,
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Request, Response};
use http_body_util::{BodyExt as _, StreamBody};
use hyper::{
    body::{Frame, Incoming},
    server::conn::http2,
    service::service_fn,
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use keyward::pb::{self, account_service_client::AccountServiceClient, key_service_client::KeyServiceClient};
use tonic::{Request as Grpc, transport::Channel};

const ROUNDS: usize = 5;
const VARIANTS: [&str; 3] = ["none", "stub", "keyward"];

/// A child process that ends with this value.
struct ChildProcess(Child);

impl Drop for ChildProcess {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn main() {
    // Cargo says `--bench` to every benchmark.
    let mut words = std::env::args().skip(1).filter(|word| !word.starts_with("--"));
    let seconds: u32 = words.next().map_or(3, |word| word.parse().unwrap());
    let folder = tempfile::tempdir().unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let (_keyward, grpc, envoy_listener) = start_keyward(folder.path());
    let token =
        runtime.block_on(make_key(grpc, &std::fs::read_to_string(folder.path().join("root.key")).unwrap()));
    let stub = runtime.block_on(start_stub());
    let (_envoy, ports) = start_envoy(folder.path(), stub, envoy_listener);

    let mut rates = VARIANTS.map(|_| Vec::new());
    for round in 0..=ROUNDS {
        for (at, port) in ports.iter().enumerate() {
            let figures = load(*port, &token, seconds);
            // The first round warms up.
            if round > 0 {
                rates[at].push(figures);
            }
        }
    }
    println!("{:<10} {:>12} {:>10} {:>10} {:>8}", "ext_authz", "requests/s", "p50 ms", "p99 ms", "ratio");
    let median = |at: usize, of: fn(&LoadFigures) -> f64| goal::median(rates[at].iter().map(of));
    // Round by round, since a noisy moment is noisy for both.
    let ratio = |at: usize| goal::median(rates[at].iter().zip(&rates[1]).map(|(ours, stub)| ours.0 / stub.0));
    for (at, way) in VARIANTS.iter().enumerate() {
        let rate = median(at, |figures| figures.0);
        let (p50, p99) = (median(at, |figures| figures.1), median(at, |figures| figures.2));
        println!("{way:<10} {rate:>12.0} {p50:>10.2} {p99:>10.2} {:>8.2}", ratio(at));
    }
    println!("medians of {ROUNDS} rounds of {seconds} s each, 32 connections; the ratio is to the stub");
    goal::at_least("requests through Envoy, to a stub that allows all", 0.95, ratio(2), "");
}

/// The server: where it serves gRPC, and where Envoy.
fn start_keyward(folder: &Path) -> (ChildProcess, SocketAddr, SocketAddr) {
    let out = folder.join("keyward.out");
    let child = Command::new(env!("CARGO_BIN_EXE_keyward"))
        .args([
            "serve",
            "--listen",
            "127.0.0.1:0",
            "--admin-listen",
            "127.0.0.1:0",
            "--envoy-listen",
            "127.0.0.1:0",
        ])
        .args(["--database", "sqlite:bench.db", "--root-key-file", "root.key", "--log", "warn"])
        .current_dir(folder)
        .stdout(std::fs::File::create(&out).unwrap())
        .spawn()
        .unwrap();
    let running = ChildProcess(child);
    let address = |start: &str| {
        let text = std::fs::read_to_string(&out).unwrap();
        let (_, rest) = text.split_once(start)?;
        rest.split(['\n', ',']).next().filter(|_| text.ends_with('\n'))?.parse().ok()
    };
    let grpc = poll_until_some(|| address("keyward serves gRPC on "));
    (running, grpc, address("keyward serves Envoy on ").unwrap())
}

fn poll_until_some<T>(mut answer: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + Duration::from_secs(30);
    loop {
        if let Some(answer) = answer() {
            return answer;
        }
        assert!(Instant::now() < end, "waited in vain");
        std::thread::sleep(Duration::from_millis(10));
    }
}

async fn make_key(address: SocketAddr, root: &str) -> String {
    let channel = Channel::from_shared(format!("http://{address}")).unwrap().connect().await.unwrap();
    let bearer = format!("Bearer {root}").parse::<tonic::metadata::AsciiMetadataValue>().unwrap();
    let mut account = Grpc::new(pb::CreateAccountRequest { id: "acme".into(), ..Default::default() });
    account.metadata_mut().insert("authorization", bearer.clone());
    AccountServiceClient::new(channel.clone()).create(account).await.unwrap();
    let mut key = Grpc::new(pb::CreateKeyRequest {
        account: "acme".into(),
        environment: "production".into(),
        scopes: vec!["monitors:read".into()],
        ..Default::default()
    });
    key.metadata_mut().insert("authorization", bearer);
    KeyServiceClient::new(channel).create(key).await.unwrap().into_inner().token
}

/// Answers every check with an empty message, which is an ALLOW.
async fn start_stub() -> SocketAddr {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            stream.set_nodelay(true).unwrap();
            let service = service_fn(|request: Request<Incoming>| async {
                let _ = request.into_body().collect().await;
                let mut trailers = HeaderMap::new();
                trailers.insert("grpc-status", HeaderValue::from_static("0"));
                let frames = [
                    Ok::<_, Infallible>(Frame::data(Bytes::from_static(b"\0\0\0\0\0"))),
                    Ok(Frame::trailers(trailers)),
                ];
                let mut response = Response::new(StreamBody::new(futures_util::stream::iter(frames)));
                response.headers_mut().insert("content-type", HeaderValue::from_static("application/grpc"));
                Ok::<_, Infallible>(response)
            });
            let serving =
                http2::Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(stream), service);
            tokio::spawn(serving);
        }
    });
    address
}

/// Envoy with a listener for each way, all of which answer 200 by themselves.
fn start_envoy(folder: &Path, stub: SocketAddr, keyward: SocketAddr) -> (ChildProcess, [u16; 3]) {
    let listener = |way: &str| {
        let none = way == "none";
        let filter = if none { String::new() } else { FILTER.replace("{way}", way) };
        LISTENER
            .replace("{way}", way)
            .replace("{filter}", &filter)
            .replace("{route}", if none { "" } else { ROUTE })
    };
    let cluster = |way: &str, address: SocketAddr| {
        CLUSTER.replace("{way}", way).replace("{port}", &address.port().to_string())
    };
    let yaml = format!(
        "{HEAD}static_resources:\n  listeners:\n{}  clusters:\n{}{}",
        VARIANTS.map(listener).concat(),
        cluster("stub", stub),
        cluster("keyward", keyward)
    );
    std::fs::write(folder.join("envoy.yaml"), yaml).unwrap();
    let child = Command::new("envoy")
        .args(["-c", "envoy.yaml", "--concurrency", "1", "--disable-hot-restart", "--log-level", "error"])
        .args(["--admin-address-path", "admin"])
        .current_dir(folder)
        .stderr(Stdio::inherit())
        .spawn()
        .expect("envoy on the PATH");
    let running = ChildProcess(child);
    let admin = poll_until_some(|| {
        std::fs::read_to_string(folder.join("admin")).ok().filter(|text| !text.is_empty())
    });
    let ports = poll_until_some(|| ports(&admin));
    (running, ports)
}

fn ports(admin: &str) -> Option<[u16; 3]> {
    use std::io::Write as _;
    let mut stream = std::net::TcpStream::connect(admin).ok()?;
    write!(stream, "GET /listeners HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").ok()?;
    let mut text = String::new();
    stream.read_to_string(&mut text).ok()?;
    let port = |way: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(&format!("{way}::")))?;
        line.rsplit(':').next()?.trim().parse::<u16>().ok().filter(|port| *port > 0)
    };
    Some([port("none")?, port("stub")?, port("keyward")?])
}

/// Requests per second, and the median and the 99th percentile of their time in ms.
type LoadFigures = (f64, f64, f64);

fn load(port: u16, token: &str, seconds: u32) -> LoadFigures {
    let output = Command::new("wrk")
        .args(["-t1", "-c32", "--latency", "-d", &format!("{seconds}s")])
        .args([
            "-H",
            &format!("authorization: Bearer {token}"),
            &format!("http://127.0.0.1:{port}/v1/monitors"),
        ])
        .output()
        .expect("wrk on the PATH");
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(!text.contains("Non-2xx"), "{text}");
    let after = |start: &str| {
        text.lines().find_map(|line| line.trim().strip_prefix(start)).unwrap().trim().to_owned()
    };
    (after("Requests/sec:").parse().unwrap(), millis(&after("50%")), millis(&after("99%")))
}

fn millis(text: &str) -> f64 {
    let (number, factor) = match text {
        _ if text.ends_with("us") => (&text[..text.len() - 2], 0.001),
        _ if text.ends_with("ms") => (&text[..text.len() - 2], 1.0),
        _ => (&text[..text.len() - 1], 1000.0),
    };
    number.parse::<f64>().unwrap() * factor
}

const HEAD: &str = "admin: { address: { socket_address: { address: 127.0.0.1, port_value: 0 } } }\n";

const LISTENER: &str = r#"
  - name: {way}
    address: { socket_address: { address: 127.0.0.1, port_value: 0 } }
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: {way}
          normalize_path: true
          route_config:
            virtual_hosts:
            - { name: all, domains: ["*"], routes: [ { match: { prefix: / }, direct_response: { status: 200 }{route} } ] }
          http_filters:{filter}
          - name: envoy.filters.http.router
            typed_config: { "@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router }
"#;

const FILTER: &str = r#"
          - name: envoy.filters.http.ext_authz
            typed_config:
              "@type": type.googleapis.com/envoy.extensions.filters.http.ext_authz.v3.ExtAuthz
              transport_api_version: V3
              status_on_error: { code: ServiceUnavailable }
              grpc_service: { timeout: 1s, envoy_grpc: { cluster_name: {way} } }"#;

const ROUTE: &str = r#", typed_per_filter_config: { envoy.filters.http.ext_authz: {
              "@type": type.googleapis.com/envoy.extensions.filters.http.ext_authz.v3.ExtAuthzPerRoute,
              check_settings: { context_extensions: { scope: "monitors:read", environment: production } } } }"#;

const CLUSTER: &str = r#"
  - name: {way}
    typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        "@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
        explicit_http_config: { http2_protocol_options: {} }
    load_assignment:
      cluster_name: {way}
      endpoints: [ { lb_endpoints: [ { endpoint: { address: { socket_address: { address: 127.0.0.1, port_value: {port} } } } } ] } ]
"#;
