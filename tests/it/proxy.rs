//! The real Envoy and the real nginx as child processes, on ports of the system's choice and gone when they are
//! dropped. A test that fails shows what they logged.
//!
//! Listeners of an Envoy's configuration say `port_value: 0`, and [`EnvoyProcess::listener_address`] says where each one listens.

use std::{
    net::{SocketAddr, TcpListener},
    path::PathBuf,
    process::Command,
};

use serde_json::Value;

use crate::{
    process::{TestHome, TestProcess, wait_for},
    raw_http::{RawConnection, RawRequest},
};

/// How much of a log a failed test shows.
const LOG_TAIL_LINES: usize = 60;
/// How often another process may take the port that nginx was to have.
const MAX_PORT_ATTEMPTS: usize = 5;

/// A program that `make tools` installs, unless a variable names one.
fn program(name: &str, variable: &str, version: &str) -> PathBuf {
    let path = std::env::var_os(variable).map_or_else(|| name.into(), PathBuf::from);
    match Command::new(&path).arg(version).output() {
        Ok(_) => path,
        Err(error) => panic!(
            "{} does not run ({error}): 'make tools' installs {name} into .tools/bin, where 'make test' finds it; \
             or name one in {variable}",
            path.display()
        ),
    }
}

fn envoy_program() -> PathBuf {
    program("envoy", "KEYWARD_ENVOY", "--version")
}

fn nginx_program() -> PathBuf {
    program("nginx", "KEYWARD_NGINX", "-v")
}

/// Puts values in the places that a text has for them, each of which must be there.
#[track_caller]
pub(crate) fn fill_placeholders(text: &str, values: &[(&str, &str)]) -> String {
    values.iter().fold(text.to_owned(), |text, (place, value)| {
        assert!(text.contains(place), "there is no {place:?} in\n{text}");
        text.replace(place, value)
    })
}

fn log_tail(log: &str) -> String {
    let lines: Vec<_> = log.lines().collect();
    lines[lines.len().saturating_sub(LOG_TAIL_LINES)..].join("\n")
}

fn print_log_if_failed(name: &str, process: &TestProcess) {
    if std::thread::panicking() {
        eprintln!("the end of {name}'s log:\n{}", log_tail(&process.stderr()));
    }
}

/// A running Envoy.
pub(crate) struct EnvoyProcess {
    process: TestProcess,
    /// Where its files are, for as long as it runs.
    _home: TestHome,
    /// Where its admin pages are.
    pub(crate) admin: SocketAddr,
    listeners: Vec<(String, SocketAddr)>,
}

impl EnvoyProcess {
    /// Starts it with a configuration, which may leave `admin` out, and waits until it serves.
    #[track_caller]
    pub(crate) fn start(yaml: &str) -> EnvoyProcess {
        let home = TestHome::new();
        let own = yaml.lines().any(|line| line.starts_with("admin:"));
        let admin = if own {
            ""
        } else {
            "\nadmin: { address: { socket_address: { address: 127.0.0.1, port_value: 0 } } }\n"
        };
        let mut command = envoy_command(&home, &format!("{yaml}{admin}"));
        command.args(["--admin-address-path", "admin", "--concurrency", "2", "--disable-hot-restart"]);
        // What is logged of requests can be read soon after.
        command.args(["--file-flush-interval-msec", "20"]);
        let mut process = home.spawn(command);
        let ready = wait_for("Envoy to be ready", || {
            assert!(!process.has_ended(), "Envoy does not start:\n{}", log_tail(&process.stderr()));
            let admin = std::fs::read_to_string(home.path("admin")).ok()?.parse().ok()?;
            (fetch_admin_page(admin, "/ready")?.0 == 200).then_some(())?;
            Some((admin, read_listeners(admin)?))
        });
        let (admin, listeners) = ready;
        EnvoyProcess { process, _home: home, admin, listeners }
    }

    /// Whether Envoy would take a configuration, and if not, what it says.
    pub(crate) fn validate(yaml: &str) -> Result<(), String> {
        let home = TestHome::new();
        let mut command = envoy_command(&home, yaml);
        command.args(["--mode", "validate", "--disable-hot-restart"]);
        let ended = home.run_to_end(command);
        if ended.code == Some(0) { Ok(()) } else { Err(log_tail(&ended.err)) }
    }

    /// Where the listener of this name listens.
    #[track_caller]
    pub(crate) fn listener_address(&self, name: &str) -> SocketAddr {
        let found = self.listeners.iter().find(|(listener, _)| listener == name);
        found.unwrap_or_else(|| panic!("no listener {name}: {:?}", self.listeners)).1
    }

    /// A counter or gauge by its full name; what nothing has counted yet is 0.
    #[track_caller]
    pub(crate) fn read_stat(&self, name: &str) -> u64 {
        let (_, text) = fetch_admin_page(self.admin, "/stats").unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
        line.map_or(0, |value| value.parse().unwrap())
    }

    /// Every counter and gauge above 0 whose name starts so, line by line.
    #[track_caller]
    pub(crate) fn nonzero_stats(&self, start: &str) -> String {
        let (_, text) = fetch_admin_page(self.admin, "/stats").unwrap();
        let lines = text.lines().filter(|line| line.starts_with(start) && !line.ends_with(": 0"));
        lines.collect::<Vec<_>>().join("\n")
    }

    /// What was written to `/dev/stdout`: the access log, where the configuration says so.
    pub(crate) fn stdout(&self) -> String {
        self.process.stdout()
    }
}

impl Drop for EnvoyProcess {
    fn drop(&mut self) {
        print_log_if_failed("Envoy", &self.process);
    }
}

/// Envoy with this configuration; its own log says only what is wrong.
fn envoy_command(home: &TestHome, yaml: &str) -> Command {
    let path = home.path("envoy.yaml");
    std::fs::write(&path, yaml).unwrap();
    let mut command = Command::new(envoy_program());
    command.arg("-c").arg(path).args(["--log-level", "warning"]).current_dir(home.path("."));
    command
}

fn fetch_admin_page(admin: SocketAddr, path: &str) -> Option<(u16, String)> {
    let response =
        RawConnection::open(admin).and_then(|mut admin| admin.send(&RawRequest::get(path))).ok()?;
    Some((response.status, response.text()))
}

/// Names and addresses of the listeners, once all of them have a port.
fn read_listeners(admin: SocketAddr) -> Option<Vec<(String, SocketAddr)>> {
    let (_, text) = fetch_admin_page(admin, "/listeners?format=json")?;
    let statuses: Value = serde_json::from_str(&text).ok()?;
    let address = |status: &Value| {
        let socket = &status["local_address"]["socket_address"];
        let port = u16::try_from(socket["port_value"].as_u64()?).ok().filter(|port| *port > 0)?;
        let address = SocketAddr::new(socket["address"].as_str()?.parse().ok()?, port);
        Some((status["name"].as_str()?.to_owned(), address))
    };
    statuses["listener_statuses"].as_array()?.iter().map(address).collect()
}

/// A running nginx.
pub(crate) struct NginxProcess {
    process: TestProcess,
    _home: TestHome,
    pub(crate) address: SocketAddr,
}

impl NginxProcess {
    /// Starts it with what stands in `http { … }` of its configuration, `{port}` being where it is to listen, and
    /// waits until it serves.
    #[track_caller]
    pub(crate) fn start(http: &str) -> NginxProcess {
        let started = (0..MAX_PORT_ATTEMPTS).find_map(|_| {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let address = listener.local_addr().unwrap();
            drop(listener);
            NginxProcess::start_on(address, http)
        });
        started.expect("a port that stays free until nginx has it")
    }

    /// No nginx: another process was faster.
    #[track_caller]
    fn start_on(address: SocketAddr, http: &str) -> Option<NginxProcess> {
        let home = TestHome::new();
        let http = fill_placeholders(http, &[("{port}", &address.port().to_string())]);
        std::fs::write(home.path("nginx.conf"), fill_placeholders(NGINX_MAIN_CONFIG, &[("{http}", &http)]))
            .unwrap();
        let mut command = Command::new(nginx_program());
        command.arg("-p").arg(home.path(".")).args(["-c", "nginx.conf", "-e", "stderr"]);
        let mut process = home.spawn(command);
        // It writes the file once it listens.
        wait_for("nginx to serve", || {
            if process.has_ended() {
                let log = process.stderr();
                assert!(log.contains("Address already in use"), "nginx does not start:\n{}", log_tail(&log));
                return Some(None);
            }
            let pid = std::fs::read_to_string(home.path("nginx.pid")).ok()?;
            (!pid.is_empty()).then_some(Some(()))
        })?;
        Some(NginxProcess { process, _home: home, address })
    }
}

impl Drop for NginxProcess {
    fn drop(&mut self) {
        print_log_if_failed("nginx", &self.process);
    }
}

/// One process in the foreground, which no other user's files concern: nothing outlives a kill.
const NGINX_MAIN_CONFIG: &str = "\
daemon off;
master_process off;
pid nginx.pid;
error_log stderr notice;
events { worker_connections 512; }
http {
    access_log off;
    client_body_temp_path body;
    proxy_temp_path proxy;
    fastcgi_temp_path fastcgi;
    uwsgi_temp_path uwsgi;
    scgi_temp_path scgi;
{http}
}
";

mod tests {
    use super::*;
    use crate::upstream::{EchoUpstream, ReceivedRequest};
    use crate::{
        process::{WAIT_TIMEOUT, call_raw},
        raw_http::RawResponse,
    };

    const PLAIN: &str = r#"
static_resources:
  listeners:
  - name: edge
    address: { socket_address: { address: 127.0.0.1, port_value: 0 } }
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: edge
          access_log:
          - name: envoy.access_loggers.file
            typed_config:
              "@type": type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog
              path: /dev/stdout
              log_format: { text_format_source: { inline_string: "%REQ(:PATH)%\n" } }
          route_config:
            virtual_hosts:
            - name: all
              domains: ["*"]
              routes:
              - { match: { prefix: /, grpc: {} }, route: { cluster: grpc } }
              - { match: { prefix: / }, route: { cluster: plain } }
          http_filters:
          - name: envoy.filters.http.router
            typed_config: { "@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router }
  clusters:
  - name: plain
    load_assignment: &upstream
      cluster_name: upstream
      endpoints: [ { lb_endpoints: [ { endpoint: { address: { socket_address: { address: 127.0.0.1, port_value: {upstream} } } } } ] } ]
  - name: grpc
    typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        "@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
        explicit_http_config: { http2_protocol_options: {} }
    load_assignment: *upstream
"#;

    fn plain_config(upstream: &EchoUpstream) -> String {
        fill_placeholders(PLAIN, &[("{upstream}", &upstream.address.port().to_string())])
    }

    /// Two headers of one name, one of them not text, and a path that nobody has tidied up.
    fn unusual_request() -> RawRequest {
        RawRequest::get("/a//b?x=1").header("x-odd", "one").header("X-Odd", b"caf\xe9")
    }

    #[track_caller]
    fn assert_passed(response: &RawResponse, upstream: &EchoUpstream) {
        assert_eq!(response.status, 200, "{response:?}");
        let arrived = ReceivedRequest::from_answer(&response.body);
        assert_eq!((arrived.method.as_str(), arrived.target.as_str()), ("GET", "/a//b?x=1"));
        assert_eq!(arrived.header_values("x-odd"), ["one", "caf\u{fffd}"]);
        let seen = upstream.take_received();
        assert_eq!(seen.iter().map(|seen| &seen.target).collect::<Vec<_>>(), ["/a//b?x=1"]);
    }

    #[test]
    fn a_request_passes_through_envoy() {
        let upstream = EchoUpstream::start();
        let envoy = EnvoyProcess::start(&plain_config(&upstream));
        let mut connection = RawConnection::open(envoy.listener_address("edge")).unwrap();
        assert_passed(&connection.send(&unusual_request()).unwrap(), &upstream);
        assert_passed(&connection.send(&unusual_request()).unwrap(), &upstream);
        assert_eq!(envoy.read_stat("http.edge.downstream_cx_total"), 1, "the connection is kept");
        assert_eq!(envoy.read_stat("cluster.plain.upstream_rq_200"), 2);
        wait_for("the access log", || (envoy.stdout() == "/a//b?x=1\n/a//b?x=1\n").then_some(()));
    }

    #[tokio::test]
    async fn grpc_passes_through_envoy() {
        let upstream = EchoUpstream::start();
        let envoy = EnvoyProcess::start(&plain_config(&upstream));
        let endpoint = format!("http://{}", envoy.listener_address("edge"));
        let channel = tonic::transport::Endpoint::from_shared(endpoint).unwrap().timeout(WAIT_TIMEOUT);
        let message = futures_util::stream::iter([bytes::Bytes::from_static(b"hello")]);
        let answer = call_raw(channel.connect_lazy(), "secret", "a.Service/Call", message).await.unwrap();
        let arrived = ReceivedRequest::from_answer(&answer);
        assert_eq!((arrived.method.as_str(), arrived.target.as_str()), ("POST", "/a.Service/Call"));
        assert_eq!(arrived.header_values("authorization"), ["Bearer secret"]);
        assert_eq!(upstream.take_received().len(), 1);
    }

    #[test]
    fn host_token_and_body_pass_through_envoy() {
        let upstream = EchoUpstream::start();
        let envoy = EnvoyProcess::start(&plain_config(&upstream));
        let body = serde_json::json!({"name": "ci"});
        let request = RawRequest::new("POST", "/keys").host("API.Example:8080").bearer("secret").json(&body);
        let response = request.send(envoy.listener_address("edge"));
        assert_eq!(response.json()["method"], "POST");
        let arrived = ReceivedRequest::from_answer(&response.body);
        assert_eq!(arrived.header_values("host"), ["API.Example:8080"]);
        assert_eq!(arrived.header_values("authorization"), ["Bearer secret"]);
        assert_eq!(arrived.body, body.to_string());
    }

    #[test]
    fn envoy_says_what_is_wrong_with_a_configuration() {
        let upstream = EchoUpstream::start();
        assert_eq!(EnvoyProcess::validate(&plain_config(&upstream)), Ok(()));
        let wrong =
            EnvoyProcess::validate(&plain_config(&upstream).replace("cluster: plain", "cluster: plane"))
                .unwrap_err();
        assert!(wrong.contains("unknown cluster 'plane'"), "{wrong}");
    }

    #[test]
    fn a_request_passes_through_nginx() {
        let upstream = EchoUpstream::start();
        let nginx = NginxProcess::start(&format!(
            "merge_slashes off; server {{ listen 127.0.0.1:{{port}}; location / {{ proxy_pass http://{}; }} }}",
            upstream.address
        ));
        assert_passed(&unusual_request().send(nginx.address), &upstream);
    }
}
