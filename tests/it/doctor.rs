//! `keyward doctor` beside a running deployment: the real binary, real servers, a real PostgreSQL. What it finds in a
//! bootstrap of Envoy, trap by trap, is `src/doctor/envoy.rs`'s own test.

use std::{
    net::{SocketAddr, TcpListener},
    os::unix::fs::PermissionsExt as _,
    path::Path,
    sync::Arc,
};

use rustls::{ServerConfig, ServerConnection, crypto::ring, pki_types::PrivateKeyDer};
use serde_json::Value;

use crate::{
    postgres::{PostgresServer, url},
    process::{FinishedProcess, KeywardProcess, TestHome},
};

/// What is found, but for what is good: `level about: said`.
struct DoctorFindings {
    code: Option<i32>,
    all: Vec<(String, String, String)>,
}

impl DoctorFindings {
    fn from_output(ended: &FinishedProcess) -> DoctorFindings {
        let whole: Value =
            serde_json::from_str(&ended.out).unwrap_or_else(|error| panic!("{error}: {ended:?}"));
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        let one = |found: &Value| (text(&found["level"]), text(&found["about"]), text(&found["said"]));
        DoctorFindings {
            code: ended.code,
            all: whole["findings"].as_array().unwrap().iter().map(one).collect(),
        }
    }

    /// Whether there is a finding of this level about this that says this.
    fn has_finding(&self, level: &str, about: &str, said: &str) -> bool {
        self.all.iter().any(|found| found.0 == level && found.1 == about && found.2.contains(said))
    }

    fn failures(&self) -> Vec<&str> {
        self.all.iter().filter(|found| found.0 == "fail").map(|found| found.2.as_str()).collect()
    }
}

fn doctor(home: &TestHome, more: &[&str]) -> DoctorFindings {
    let url = home.url();
    let arguments = ["doctor", "--output", "json", "--database", &url];
    DoctorFindings::from_output(&home.run_to_end(home.command(arguments.iter().chain(more))))
}

fn doctor_for_server(server: &KeywardProcess, home: &TestHome, more: &[&str]) -> DoctorFindings {
    let (grpc, admin) = (server.address.to_string(), format!("http://{}", server.admin_address));
    doctor(home, &[&["--server", &grpc, "--admin", &admin], more].concat())
}

fn bootstrap(name: &str) -> String {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/envoy").join(name).display().to_string()
}

#[test]
fn a_server_on_a_file_that_is_well_has_no_failure() {
    let home = TestHome::new();
    let server = home.start();
    let found = doctor_for_server(&server, &home, &["--envoy", &bootstrap("production.yaml")]);
    assert_eq!((found.code, found.failures()), (Some(0), vec![]));
    for (about, said) in [
        ("store", "is reachable"),
        ("schema", "the newest"),
        ("file", "only its owner"),
        ("file", "structure is whole"),
        ("log", "it ends at revision"),
        ("server", "is ready"),
        ("server", "newest revision"),
        ("server", "is SERVING"),
        ("envoy", "fails closed"),
    ] {
        assert!(found.has_finding("ok", about, said), "{about} {said}: {:?}", found.all);
    }
    // The server goes on: nothing was taken from it.
    let again = doctor_for_server(&server, &home, &[]);
    assert_eq!(again.code, Some(0));
}

#[test]
fn what_is_not_named_is_told_not_to_be_looked_at() {
    let home = TestHome::new();
    let server = home.start();
    let found = doctor(&home, &[]);
    for (about, said) in [
        ("settings", "--config"),
        ("server", "--admin"),
        ("server", "--server"),
        ("tls", "certificate"),
        ("envoy", "--envoy"),
        ("nginx", "--nginx"),
        ("traefik", "--traefik"),
    ] {
        assert!(found.has_finding("not looked at", about, said), "{about}: {:?}", found.all);
    }
    drop(server);
}

#[test]
fn a_file_that_others_may_read_or_that_is_missing_fails() {
    let home = TestHome::new();
    let server = home.start();
    std::fs::set_permissions(home.database(), std::fs::Permissions::from_mode(0o644)).unwrap();
    let found = doctor_for_server(&server, &home, &[]);
    assert!(found.code == Some(1) && found.has_finding("fail", "file", "mode 644"), "{:?}", found.all);
    let admin = format!("http://{}", server.admin_address);
    server.stop();
    let found = doctor(&home, &["--admin", &admin]);
    assert!(found.has_finding("warn", "file", "no server has it open"), "{:?}", found.all);
    assert!(found.has_finding("fail", "server", &admin), "{:?}", found.all);
    std::fs::remove_file(home.database()).unwrap();
    let found = doctor(&home, &[]);
    assert!(
        found.code == Some(1) && found.has_finding("fail", "store", "could not be opened"),
        "{:?}",
        found.all
    );
    assert!(!home.database().exists(), "looking makes nothing");
}

#[test]
fn replicas_on_postgresql_are_looked_at_without_a_change() {
    let cluster = PostgresServer::start(&[]);
    cluster.sql("postgres", "CREATE DATABASE keys OWNER keyward TEMPLATE template0");
    let home = TestHome::with_database_url(url(cluster.socket(), 5432, "keys"));
    let empty = doctor(&home, &[]);
    assert!(empty.code == Some(1) && empty.has_finding("fail", "schema", "no keyward"), "{:?}", empty.all);
    assert_eq!(cluster.sql("keys", "SELECT count(*) FROM pg_namespace WHERE nspname = 'keyward'"), "0");
    let named = |name: &str, key: &str| {
        let mut serve = home.command(["serve", "--database", &home.url(), "--replica-name", name]);
        serve.args(["--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0", "--root-key-file"]);
        serve.arg(home.path(key));
        home.start_with(serve).unwrap()
    };
    let (first, second) = (named("eu-1", "root.key"), named("eu-1", "second.key"));
    let found = doctor_for_server(&first, &home, &[]);
    assert_eq!((found.code, found.failures()), (Some(0), vec![]));
    for (level, about, said) in [
        ("ok", "postgresql", "fsync on"),
        ("warn", "postgresql", "no synchronous standbys"),
        ("ok", "clocks", "agree"),
        ("ok", "lease", "1m"),
        ("ok", "replicas", "eu-1 renewed"),
        ("warn", "replicas", "2 replicas are called eu-1"),
        ("ok", "server", "newest revision"),
        ("ok", "server", "clock has not stood still"),
    ] {
        assert!(found.has_finding(level, about, said), "{about} {said}: {:?}", found.all);
    }
    second.process.kill();
    cluster.sql("keys", "UPDATE keyward.replicas SET last_seen = last_seen - 3600000000");
    let found = doctor(&home, &[]);
    assert!(
        found.code == Some(1) && found.has_finding("fail", "replicas", "longer than any lease"),
        "{:?}",
        found.all
    );
}

#[test]
fn a_broken_hash_chain_is_found() {
    let cluster = PostgresServer::start(&[]);
    cluster.sql("postgres", "CREATE DATABASE keys OWNER keyward TEMPLATE template0");
    let home = TestHome::with_database_url(url(cluster.socket(), 5432, "keys"));
    home.start().stop();
    cluster.sql("keys", "UPDATE keyward.log SET actor = 'somebody' WHERE revision = 1");
    let found = doctor(&home, &[]);
    assert!(found.code == Some(1) && found.has_finding("fail", "log", "hash chain"), "{:?}", found.all);
    assert!(found.has_finding("fail", "replicas", "none serves"), "{:?}", found.all);
}

#[test]
fn a_server_with_fsync_off_fails_though_none_would_start_on_it() {
    let cluster = PostgresServer::start(&["fsync=off"]);
    cluster.sql("postgres", "CREATE DATABASE keys OWNER keyward TEMPLATE template0");
    let home = TestHome::with_database_url(url(cluster.socket(), 5432, "keys"));
    let found = doctor(&home, &[]);
    assert!(found.has_finding("fail", "postgresql", "fsync is off"), "{:?}", found.all);
}

#[test]
fn a_database_that_is_away_fails_and_its_password_is_not_told() {
    let home = TestHome::with_database_url("postgres://u:sesame@127.0.0.1:1/keys".to_owned());
    let ended = home.run_to_end(home.command(["doctor", "--database", &home.url()]));
    assert_eq!(ended.code, Some(1), "{ended:?}");
    assert!(ended.out.contains("fail  store") && ended.out.contains("not looked at: "), "{ended:?}");
    assert!(!format!("{ended:?}").contains("sesame"), "{ended:?}");
}

#[test]
fn a_bad_bootstrap_and_a_bad_configuration_are_told() {
    let home = TestHome::new();
    let server = home.start();
    let text = std::fs::read_to_string(bootstrap("minimal.yaml")).unwrap();
    let bad = home.path("envoy.yaml");
    std::fs::write(&bad, text.replace("failure_mode_allow: false", "failure_mode_allow: true")).unwrap();
    let found = doctor(&home, &["--envoy", bad.to_str().unwrap()]);
    assert!(
        found.code == Some(1) && found.has_finding("fail", "envoy", "every request passes"),
        "{:?}",
        found.all
    );
    let unread = home.run_to_end(home.command(["doctor", "--envoy", "nowhere.yaml"]));
    assert_eq!(unread.code, Some(2), "{unread:?}");
    std::fs::write(home.path("keyward.toml"), "lisen = 'x'\n").unwrap();
    let wrong = home.run_to_end(home.command(["doctor", "--config", "keyward.toml"]));
    let said = "fail  settings   line 1, column 1: unknown key `lisen`: did you mean `listen`?";
    assert!(wrong.code == Some(1) && wrong.out.contains(said), "{wrong:?}");
    drop(server);
}

/// A server that shows a certificate of long ago to whoever shakes hands first, and hangs up then.
fn serve_outdated_certificate() -> SocketAddr {
    let key = rcgen::KeyPair::generate().unwrap();
    let mut params = rcgen::CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
    params.not_before = rcgen::date_time_ymd(2019, 1, 1);
    params.not_after = rcgen::date_time_ymd(2020, 1, 1);
    let certificate = params.self_signed(&key).unwrap().der().clone();
    let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certificate], PrivateKeyDer::Pkcs8(key.serialize_der().into()))
        .unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut connection = ServerConnection::new(Arc::new(config)).unwrap();
        while connection.is_handshaking() {
            connection.complete_io(&mut stream).unwrap();
        }
    });
    address
}

#[test]
fn a_certificate_that_a_server_shows_is_looked_at() {
    let home = TestHome::new();
    let server = home.start();
    let url = format!("https://{}", serve_outdated_certificate());
    let found = doctor(&home, &["--server", &url]);
    assert!(found.code == Some(1) && found.has_finding("fail", "tls", "has expired"), "{:?}", found.all);
    drop(server);
}
