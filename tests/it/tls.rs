//! TLS against the real binary: who is believed, who a client certificate makes a caller, and certificates that are
//! replaced under load.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use keyward::pb;
use tokio_rustls::{TlsConnector, rustls::pki_types::ServerName};
use tonic::{
    Code,
    transport::{Channel, ClientTlsConfig, Endpoint},
};

use crate::{
    process::{
        AuthorizedClients, KeywardProcess, TestHome, WAIT_TIMEOUT, check_request, plain_key_request, wait_for,
    },
    support::assert_refused,
    test_ca::{PemCertificate, TestCa, replace_file},
};

const ENVOY: &str = "spiffe://example.org/envoy";

/// A server with a TLS listener besides its plain one.
struct TlsServer {
    keyward: KeywardProcess,
    authority: TestCa,
    tls: SocketAddr,
}

impl TlsServer {
    /// With these lines more in the listener's table, and these tables after it.
    async fn start(lines: &str, tls: &str, tables: &str) -> TlsServer {
        let (home, authority) = (TestHome::new(), TestCa::new("ours"));
        authority.issue_server_certificate(2040).write_files(&home.path("cert.pem"), &home.path("key.pem"));
        replace_file(&home.path("clients.pem"), &authority.pem);
        let text = format!(
            "[[listener]]\nname = 'secure'\naddress = '127.0.0.1:0'\n\
             services = ['check', 'management', 'health', 'reflection']\n{lines}\n\
             [listener.tls]\ncertificate = 'cert.pem'\nkey = 'key.pem'\n{tls}\n{tables}"
        );
        std::fs::write(home.path("keyward.toml"), text).unwrap();
        let mut command = home.serve_command();
        command.args(["--config", "keyward.toml"]);
        let keyward = home.start_with(command).unwrap_or_else(|ended| panic!("{ended:?}"));
        keyward.root_caller().create_account("acme").await;
        let tls = keyward.process.listener_address("secure").unwrap().parse().unwrap();
        TlsServer { keyward, authority, tls }
    }

    fn file(&self, name: &str) -> std::path::PathBuf {
        self.keyward.home.path(name)
    }

    async fn connect(&self, tls: ClientTlsConfig) -> Result<Channel, tonic::transport::Error> {
        connect(self.tls, tls).await
    }

    /// A caller that shows a certificate and no token.
    async fn caller_with_certificate(&self, pair: &PemCertificate) -> AuthorizedClients {
        let channel =
            self.connect(self.authority.trusting_client_config().identity(pair.identity())).await.unwrap();
        AuthorizedClients::without_token(channel)
    }
}

async fn connect(address: SocketAddr, tls: ClientTlsConfig) -> Result<Channel, tonic::transport::Error> {
    let endpoint = Endpoint::from_shared(format!("https://{address}")).unwrap();
    endpoint.tls_config(tls).unwrap().connect_timeout(WAIT_TIMEOUT).connect().await
}

#[tokio::test]
async fn a_client_that_believes_the_authority_is_served_and_no_other() {
    let secure = TlsServer::start("", "", "").await;
    let channel = secure.connect(secure.authority.trusting_client_config()).await.unwrap();
    let mut root = AuthorizedClients::with_token(channel, &secure.keyward.home.root_key());
    let (_, token) = root.create_key(plain_key_request()).await.unwrap();
    assert_eq!(root.check_token(&token).await.unwrap(), pb::Reason::Ok);

    let stranger = TestCa::new("another");
    assert!(secure.connect(stranger.trusting_client_config()).await.is_err());
    let plain = Endpoint::from_shared(format!("http://{}", secure.tls)).unwrap().connect_lazy();
    let answer =
        AuthorizedClients::with_token(plain, &secure.keyward.home.root_key()).check_token(&token).await;
    assert!(answer.is_err(), "{answer:?}");
    let (_, metrics) = secure.keyward.fetch_admin_page("/metrics");
    assert!(
        metrics.contains("keyward_tls_certificate_expiry_seconds{listener=\"secure\"} 2208988800"),
        "{metrics}"
    );
    assert!(
        !metrics.contains("keyward_connections_refused_total{listener=\"secure\",reason=\"tls\"} 0"),
        "{metrics}"
    );
}

/// The first bytes of an answer to a client that offers nothing newer than a version of TLS.
fn answer_to_hello(address: SocketAddr, version: [u8; 2]) -> Vec<u8> {
    let mut body = version.to_vec();
    body.extend([7; 32]); // random
    body.push(0); // no session
    body.extend([0, 4, 0xc0, 0x09, 0xc0, 0x2b]); // a suite of TLS 1.1, and one of 1.2
    body.extend([1, 0]); // no compression
    // Signature algorithms and a group, which later versions need.
    let extensions = [0, 13, 0, 6, 0, 4, 4, 3, 8, 4, 0, 10, 0, 4, 0, 2, 0, 23];
    body.extend([0, extensions.len() as u8]);
    body.extend(extensions);
    let mut hello = vec![1, 0, 0, u8::try_from(body.len()).unwrap()];
    hello.extend(body);
    let mut record = vec![22, 3, 1, 0, u8::try_from(hello.len()).unwrap()];
    record.extend(hello);
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(WAIT_TIMEOUT)).unwrap();
    stream.write_all(&record).unwrap();
    let mut answer = vec![0; 7];
    stream.read_exact(&mut answer).unwrap();
    answer
}

async fn speaks(secure: &TlsServer, tls12: bool) -> bool {
    let stream = tokio::net::TcpStream::connect(secure.tls).await.unwrap();
    let connector = TlsConnector::from(secure.authority.trusting_rustls_config(tls12));
    connector.connect(ServerName::try_from("localhost").unwrap(), stream).await.is_ok()
}

#[tokio::test(flavor = "multi_thread")]
async fn old_versions_of_tls_are_refused() {
    const ALERT: u8 = 21;
    const HANDSHAKE: u8 = 22;
    const PROTOCOL_VERSION: u8 = 70;
    let usual = TlsServer::start("", "", "").await;
    for old in [[3, 1], [3, 2]] {
        let answer = answer_to_hello(usual.tls, old);
        assert_eq!((answer[0], answer[6]), (ALERT, PROTOCOL_VERSION), "{old:?}: {answer:?}");
    }
    assert_eq!(answer_to_hello(usual.tls, [3, 3])[0], HANDSHAKE, "the same with 1.2");
    assert!(speaks(&usual, true).await && speaks(&usual, false).await);
    let strict = TlsServer::start("", "min_version = '1.3'", "").await;
    assert!(!speaks(&strict, true).await && speaks(&strict, false).await);
}

fn identity(uri: &str, account: &str, scopes: &str) -> String {
    format!("[[listener.identity]]\nuri = '{uri}'\naccount = '{account}'\nscopes = [{scopes}]\n")
}

#[tokio::test]
async fn a_client_certificate_is_a_caller_with_the_scopes_of_its_identity() {
    let tables = [
        identity(ENVOY, "keyward", "'keyward:check'"),
        identity("spiffe://example.org/ci", "acme", "'keyward:keys:*', 'keyward:check', 'monitors:read'"),
        identity("spiffe://example.org/ops", "keyward", "'keyward:*'"),
    ];
    let secure = TlsServer::start("", "client_ca = 'clients.pem'", &tables.concat()).await;
    let mut ci = secure
        .caller_with_certificate(&secure.authority.issue_client_certificate("spiffe://example.org/ci"))
        .await;
    let create = pb::CreateKeyRequest { idempotency_key: Some("one".into()), ..plain_key_request() };
    let first = ci.keys.create(create.clone()).await.unwrap().into_inner();
    let key = first.key.unwrap();
    assert_eq!(key.created_by, "cert:spiffe://example.org/ci");
    let again = ci.keys.create(create).await.unwrap().into_inner();
    assert!(again.replayed && again.key.unwrap().id == key.id);
    let me = ci.keys.who_am_i(pb::WhoAmIRequest {}).await.unwrap().into_inner();
    assert_eq!(
        (me.account.unwrap().id.as_str(), me.key, me.actor.as_str()),
        ("acme", None, "cert:spiffe://example.org/ci")
    );

    let wide = pb::CreateKeyRequest { scopes: vec!["monitors:*".into()], ..plain_key_request() };
    assert_refused(ci.create_key(wide).await, Code::PermissionDenied, "GRANT_BEYOND_CALLER");
    let unsaid = pb::CreateKeyRequest { environment: String::new(), ..plain_key_request() };
    assert_refused(ci.create_key(unsaid).await, Code::InvalidArgument, "INVALID_REQUEST");
    let elsewhere = pb::CreateKeyRequest { account: "keyward".into(), ..plain_key_request() };
    assert_refused(ci.create_key(elsewhere).await, Code::NotFound, "ACCOUNT_NOT_FOUND");
    let users = pb::CreateKeyRequest { account: String::new(), user: "ann".into(), ..plain_key_request() };
    assert_refused(ci.create_key(users).await, Code::NotFound, "KEY_NOT_FOUND");
    let entries = ci.audit.list(pb::ListAuditEntriesRequest::default()).await;
    assert_refused(entries, Code::PermissionDenied, "PERMISSION_MISSING");

    let mut envoy = secure.caller_with_certificate(&secure.authority.issue_client_certificate(ENVOY)).await;
    assert_eq!(envoy.check_token(&first.token).await.unwrap(), pb::Reason::Ok);
    assert_refused(envoy.create_key(plain_key_request()).await, Code::PermissionDenied, "PERMISSION_MISSING");

    let mut ops = secure
        .caller_with_certificate(&secure.authority.issue_client_certificate("spiffe://example.org/ops"))
        .await;
    let by =
        pb::ListAuditEntriesRequest { actor: "cert:spiffe://example.org/ci".into(), ..Default::default() };
    let entries = ops.audit.list(by).await.unwrap().into_inner().entries;
    assert_eq!((entries.len(), entries[0].actor_account.as_str()), (1, "acme"));
    let suspend = pb::SuspendAccountRequest { id: "acme".into() };
    ops.accounts.suspend(suspend).await.unwrap();
    assert_refused(ci.get_key(&key.id).await, Code::Unauthenticated, "UNAUTHENTICATED");
}

#[tokio::test]
async fn a_certificate_that_nobody_knows_lets_nobody_in() {
    let tables = identity(ENVOY, "keyward", "'keyward:check'");
    let required = TlsServer::start("", "client_ca = 'clients.pem'", &tables).await;
    let other = required.authority.issue_client_certificate("spiffe://example.org/other");
    let mut unknown = required.caller_with_certificate(&other).await;
    assert_refused(unknown.check_token("x").await, Code::Unauthenticated, "UNAUTHENTICATED");
    let token = required.keyward.home.root_key();
    let known = required.authority.trusting_client_config().identity(other.identity());
    let mut with_token = AuthorizedClients::with_token(required.connect(known).await.unwrap(), &token);
    assert!(with_token.check_token("x").await.is_ok(), "a token is enough where either is");

    let forged = TestCa::new("ours").issue_client_certificate(ENVOY);
    for tls in [
        required.authority.trusting_client_config(),
        required.authority.trusting_client_config().identity(forged.identity()),
    ] {
        // TLS 1.3 tells a client so only when it speaks.
        let answer = match required.connect(tls).await {
            Ok(channel) => AuthorizedClients::with_token(channel, &token).check_token("x").await,
            Err(_) => continue,
        };
        assert!(matches!(&answer, Err(status) if status.code() != Code::Unauthenticated), "{answer:?}");
    }
}

#[tokio::test]
async fn a_listener_asks_for_what_it_was_told_to() {
    let (tables, optional) = (
        identity(ENVOY, "keyward", "'keyward:check'"),
        "client_ca = 'clients.pem'\nclient_auth = 'optional'",
    );
    for (auth, nothing, token_alone, certificate_alone, both) in [
        ("token", false, true, false, true),
        ("certificate", false, false, true, true),
        ("either", false, true, true, true),
        ("both", false, false, false, true),
    ] {
        let secure = TlsServer::start(&format!("auth = '{auth}'"), optional, &tables).await;
        let (anonymous, known) = (
            secure.authority.trusting_client_config(),
            secure.authority.issue_client_certificate(ENVOY).identity(),
        );
        let known = anonymous.clone().identity(known);
        let token = secure.keyward.home.root_key();
        for (tls, with_token, expected) in [
            (&anonymous, false, nothing),
            (&anonymous, true, token_alone),
            (&known, false, certificate_alone),
            (&known, true, both),
        ] {
            let channel = secure.connect(tls.clone()).await.unwrap();
            let mut caller = if with_token {
                AuthorizedClients::with_token(channel, &token)
            } else {
                AuthorizedClients::without_token(channel)
            };
            let answer = caller.check_token("x").await;
            assert_eq!(answer.is_ok(), expected, "{auth}, token {with_token}: {answer:?}");
        }
    }
}

/// Which certificate the server shows to a new connection.
async fn shown(address: SocketAddr, authority: &TestCa) -> Option<Vec<u8>> {
    let stream = tokio::net::TcpStream::connect(address).await.unwrap();
    let connector = TlsConnector::from(authority.trusting_rustls_config(false));
    let stream = connector.connect(ServerName::try_from("localhost").unwrap(), stream).await.ok()?;
    Some(stream.get_ref().1.peer_certificates()?.first()?.to_vec())
}

async fn wait_until_shown(secure: &TlsServer, pair: &PemCertificate) {
    let end = tokio::time::Instant::now() + WAIT_TIMEOUT;
    while shown(secure.tls, &secure.authority).await.as_deref() != Some(&pair.der()[..]) {
        assert!(tokio::time::Instant::now() < end, "the new certificate is not shown");
    }
}

/// Checks one after the other, over one connection or over a new one each time, until it is told to stop.
async fn keep_checking(
    secure: Arc<TlsServer>,
    token: String,
    fresh: bool,
    stop: Arc<AtomicBool>,
    done: Arc<AtomicUsize>,
) {
    let key = secure.keyward.home.root_key();
    let connected = || async {
        AuthorizedClients::with_token(
            secure.connect(secure.authority.trusting_client_config()).await.unwrap(),
            &key,
        )
    };
    let mut caller = connected().await;
    while !stop.load(Ordering::Relaxed) {
        if fresh {
            caller = connected().await;
        }
        assert_eq!(
            caller.authz.check(check_request(&token)).await.unwrap().into_inner().reason(),
            pb::Reason::Ok
        );
        done.fetch_add(1, Ordering::Relaxed);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_are_replaced_under_load_and_no_call_fails() {
    let secure = Arc::new(TlsServer::start("", "", "").await);
    let (_, token) = secure.keyward.root_caller().create_key(plain_key_request()).await.unwrap();
    let (stop, done) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let loads = [false, true, false, true].map(|fresh| {
        tokio::spawn(keep_checking(secure.clone(), token.clone(), fresh, stop.clone(), done.clone()))
    });
    let (certificate, key) = (secure.file("cert.pem"), secure.file("key.pem"));
    let mut newest = secure.authority.issue_server_certificate(2041);
    for year in 2042..2045 {
        newest.write_files(&certificate, &key);
        wait_until_shown(&secure, &newest).await;
        newest = secure.authority.issue_server_certificate(year);
    }
    newest.write_files(&certificate, &key);
    wait_until_shown(&secure, &newest).await;
    // A key of another certificate, and then no certificate at all: what there was goes on.
    replace_file(&key, &secure.authority.issue_server_certificate(2050).key);
    let said = || secure.keyward.process.stderr().matches("the previous one stays in use").count();
    wait_for("a wrong key to be told", || (said() == 1).then_some(()));
    replace_file(&certificate, "nothing");
    wait_for("a wrong certificate to be told", || (said() == 2).then_some(()));
    secure.keyward.process.send_sighup();
    wait_for("who asks to be told again", || (said() == 3).then_some(()));
    assert_eq!(shown(secure.tls, &secure.authority).await.as_deref(), Some(&newest.der()[..]));
    let checked = done.load(Ordering::Relaxed);
    wait_for("the load to go on", || (done.load(Ordering::Relaxed) > checked + 20).then_some(()));
    stop.store(true, Ordering::Relaxed);
    for load in loads {
        load.await.unwrap();
    }
}

#[test]
fn certificates_that_cannot_be_used_stop_the_start_and_are_named() {
    let (home, authority) = (TestHome::new(), TestCa::new("ours"));
    let (certificate, key) = (home.path("cert.pem"), home.path("key.pem"));
    let text = "[[listener]]\nname = 'secure'\naddress = '127.0.0.1:0'\nservices = ['check']\n\
                [listener.tls]\ncertificate = 'cert.pem'\nkey = 'key.pem'\n";
    std::fs::write(home.path("keyward.toml"), text).unwrap();
    let refusal = || {
        let mut command = home.serve_command();
        command.args(["--config", "keyward.toml"]);
        home.run_expecting_failure(command)
    };
    let said = refusal();
    assert!(
        said.contains("\"secure\" cannot speak TLS") && said.contains("cert.pem cannot be read"),
        "{said}"
    );
    let pair = authority.issue_server_certificate(2040);
    PemCertificate { certificate: "nothing".into(), ..pair.clone() }.write_files(&certificate, &key);
    assert!(refusal().contains("cert.pem holds no certificate"), "{}", refusal());
    PemCertificate { key: authority.issue_server_certificate(2040).key, ..pair }
        .write_files(&certificate, &key);
    assert!(refusal().contains("key.pem does not fit the certificate"), "{}", refusal());
    assert!(!home.root_key_file().exists(), "nothing was begun");
}
