//! Listeners of the real binary: each serves what it was told to, on an address or a socket file; plaintext stays at
//! home; connections end when their time has come, and what is too much is turned away.

use std::{error::Error as _, os::unix::fs::PermissionsExt as _};

use bytes::Bytes;
use keyward::pb;
use tonic::{
    Code,
    transport::{Channel, Endpoint},
};
use tonic_types::StatusExt as _;

use crate::{
    postgres::PostgresDatabase,
    postgres_server::holding,
    process::{
        AuthorizedClients, KeywardProcess, TestHome, call_raw, plain_key_request, read_text, wait_for,
    },
    support::{assert_refused, error_reason},
    test_ca::{TestCa, replace_file},
};

/// A server with these listeners besides its plain one.
fn start(home: &TestHome, tables: &str) -> KeywardProcess {
    std::fs::write(home.path("keyward.toml"), tables).unwrap();
    let mut command = home.serve_command();
    command.args(["--config", "keyward.toml"]);
    home.start_with(command).unwrap_or_else(|ended| panic!("{ended:?}"))
}

fn listener(name: &str, address: &str, services: &str, lines: &str) -> String {
    format!("[[listener]]\nname = '{name}'\naddress = '{address}'\nservices = [{services}]\n{lines}\n")
}

fn channel(keyward: &KeywardProcess, name: &str) -> Channel {
    let bound = keyward.process.listener_address(name).unwrap();
    let url = if bound.starts_with("unix:") { bound } else { format!("http://{bound}") };
    Endpoint::from_shared(url).unwrap().connect_lazy()
}

/// Which services answer at all.
async fn served(channel: Channel, token: &str) -> Vec<&'static str> {
    const METHODS: [(&str, &str); 5] = [
        ("check", "keyward.v1.AuthzService/Check"),
        ("management", "keyward.v1.AccountService/List"),
        ("ext_authz", "envoy.service.auth.v3.Authorization/Check"),
        ("health", "grpc.health.v1.Health/Check"),
        ("reflection", "grpc.reflection.v1.ServerReflection/ServerReflectionInfo"),
    ];
    let mut served = Vec::new();
    for (name, method) in METHODS {
        let messages = futures_util::stream::iter([Bytes::new()]);
        match call_raw(channel.clone(), token, method, messages).await {
            Err(status) if error_reason(&status) == "NO_SUCH_RPC" => {}
            _ => served.push(name),
        }
    }
    served
}

#[tokio::test]
async fn a_listener_serves_what_it_was_told_to_and_nothing_else() {
    let home = TestHome::new();
    let tables = [
        listener("checks", "127.0.0.1:0", "'check', 'health'", ""),
        listener("keys", "127.0.0.1:0", "'management'", ""),
        listener("edge", "127.0.0.1:0", "'ext_authz', 'health'", ""),
    ];
    let keyward = start(&home, &format!("reflection = false\n{}", tables.concat()));
    let token = home.root_key();
    let served = async |channel| served(channel, &token).await;
    assert_eq!(served(channel(&keyward, "checks")).await, ["check", "health"]);
    assert_eq!(served(channel(&keyward, "keys")).await, ["management"]);
    assert_eq!(served(channel(&keyward, "edge")).await, ["ext_authz", "health"]);
    assert_eq!(served(keyward.channel()).await, ["check", "management", "ext_authz", "health"]);
    let (_, metrics) = keyward.fetch_admin_page("/metrics");
    for name in ["main", "checks", "keys", "edge"] {
        assert!(
            metrics.contains(&format!("keyward_connections{{listener=\"{name}\"}} ")),
            "{name}: {metrics}"
        );
    }
}

#[tokio::test]
async fn where_the_file_has_listeners_there_is_no_other_unless_it_is_asked_for() {
    let home = TestHome::new();
    std::fs::write(home.path("keyward.toml"), listener("checks", "127.0.0.1:0", "'check'", "")).unwrap();
    let url = home.url();
    let mut command = home.command(["serve", "--database", &url, "--admin-listen", "127.0.0.1:0"]);
    command.arg("--root-key-file").arg(home.root_key_file()).args(["--config", "keyward.toml"]);
    let keyward = home.start_with(command).unwrap_or_else(|ended| panic!("{ended:?}"));
    assert_eq!(keyward.process.listener_address("checks").unwrap(), keyward.address.to_string());
    assert_eq!(served(keyward.channel(), &home.root_key()).await, ["check"]);
}

#[tokio::test]
async fn a_socket_file_is_served_and_goes_with_the_server_or_is_replaced() {
    let home = TestHome::new();
    let socket = home.path("keyward.sock");
    let address = format!("unix:{}", socket.display());
    let table = listener("side", &address, "'check', 'management'", "mode = '0600'");
    let keyward = start(&home, &table);
    assert_eq!(std::fs::metadata(&socket).unwrap().permissions().mode() & 0o777, 0o600);
    let mut root = AuthorizedClients::with_token(channel(&keyward, "side"), &home.root_key());
    root.create_account("acme").await;
    let (_, token) = root.create_key(plain_key_request()).await.unwrap();
    assert_eq!(root.check_token(&token).await.unwrap(), pb::Reason::Ok);
    let bound = pb::CreateKeyRequest {
        scopes: vec!["keyward:check".into()],
        allowed_cidrs: vec!["127.0.0.0/8".into()],
        ..plain_key_request()
    };
    let (_, bound) = root.create_key(bound).await.unwrap();
    let answer = AuthorizedClients::with_token(channel(&keyward, "side"), &bound).check_token(&token).await;
    assert_refused(answer, Code::Unauthenticated, "UNAUTHENTICATED");

    keyward.process.kill();
    assert!(socket.exists(), "a killed server leaves it");
    let keyward = start(&home, &table);
    let mut root = AuthorizedClients::with_token(channel(&keyward, "side"), &home.root_key());
    assert_eq!(root.check_token(&token).await.unwrap(), pb::Reason::Ok);
    keyward.stop();
    assert!(!socket.exists());
}

#[test]
fn plaintext_beyond_this_machine_has_to_be_asked_for() {
    let home = TestHome::new();
    let url = home.url();
    let serve = |more: &[&str]| {
        let mut command = home.command(["serve", "--database", &url, "--admin-listen", "0.0.0.0:0"]);
        command.arg("--root-key-file").arg(home.root_key_file()).args(more);
        command
    };
    std::fs::write(home.path("plain.toml"), listener("out", "0.0.0.0:0", "'check'", "")).unwrap();
    let local = ["--listen", "127.0.0.1:0"];
    let with = |more: &[&'static str]| [&local[..], more].concat();
    for outside in [
        vec!["--listen", "0.0.0.0:0"],
        vec!["--listen", "[::]:0"],
        with(&["--envoy-listen", "0.0.0.0:0"]),
        with(&["--forward-auth-listen", "0.0.0.0:0"]),
        with(&["--config", "plain.toml"]),
    ] {
        let said = home.run_expecting_failure(serve(&outside));
        assert!(said.contains("without TLS") && said.contains("--insecure"), "{outside:?}: {said}");
        assert!(!home.root_key_file().exists(), "nothing was begun");
    }
    let authority = TestCa::new("ours");
    authority.issue_server_certificate(2040).write_files(&home.path("cert.pem"), &home.path("key.pem"));
    let tls =
        listener("out", "0.0.0.0:0", "'check'", "[listener.tls]\ncertificate = 'cert.pem'\nkey = 'key.pem'");
    std::fs::write(home.path("tls.toml"), tls).unwrap();
    home.start_with(serve(&with(&["--config", "tls.toml"])))
        .unwrap_or_else(|ended| panic!("{ended:?}"))
        .stop();
    home.start_with(serve(&["--listen", "0.0.0.0:0", "--insecure"]))
        .unwrap_or_else(|e| panic!("{e:?}"))
        .stop();
    let mut by_environment = serve(&["--listen", "0.0.0.0:0"]);
    by_environment.env("KEYWARD_INSECURE", "true");
    home.start_with(by_environment).unwrap_or_else(|ended| panic!("{ended:?}")).stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_that_grow_old_or_idle_end_and_no_call_that_was_sent_fails() {
    let home = TestHome::new();
    let lines = "max_connection_age = '1s'\nmax_connection_idle = '1s'";
    let keyward = start(&home, &listener("brief", "127.0.0.1:0", "'check', 'health'", lines));
    let mut root = AuthorizedClients::with_token(channel(&keyward, "brief"), &home.root_key());
    let opened = || {
        let (_, metrics) = keyward.fetch_admin_page("/metrics");
        metrics.contains("keyward_connections{listener=\"brief\"} 0\n")
    };
    let begun = std::time::Instant::now();
    let mut checked = 0;
    // Three lives of a connection, each given up for the next under way.
    while begun.elapsed() < std::time::Duration::from_secs(3) {
        match root.check_token("kw_live_x").await {
            Ok(reason) => assert_eq!(reason, pb::Reason::Unknown),
            // The client's own: the call was to go over the connection that ended, and was never sent, or came after what
            // the server had said that it would still take.
            Err(status) => {
                let late = status.code() == Code::Internal && format!("{status:?}").contains("NO_ERROR");
                assert!(
                    (status.code() == Code::Cancelled && status.source().is_some()) || late,
                    "{status:?}"
                );
            }
        }
        checked += 1;
    }
    assert!(checked > 10);
    wait_for("the idle connection to end", || opened().then_some(()));
    assert_eq!(
        root.check_token("kw_live_x").await.unwrap(),
        pb::Reason::Unknown,
        "and a call makes a new one"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn management_beyond_what_the_server_takes_is_turned_away_and_checks_are_not() {
    let database = PostgresDatabase::new();
    let home = TestHome::with_database_url(database.url());
    let keyward = start(&home, "[overload]\nmanagement_calls = 1\n");
    keyward.root_caller().create_account("acme").await;
    let mut root = keyward.root_caller();
    let commits_wait = holding(&database, "SELECT head FROM keyward.meta FOR UPDATE").await;
    let begin = || {
        let mut root = root.clone();
        tokio::spawn(async move { root.create_key(plain_key_request()).await.is_ok() })
    };
    let mut call = begin();
    let status = loop {
        // It is begun by another task, so the server may hear of it later, or turn it away for one of these.
        if call.is_finished() {
            call = begin();
        }
        if let Err(status) = keyward.root_caller().keys.who_am_i(pb::WhoAmIRequest {}).await {
            break status;
        }
    };
    assert_eq!((status.code(), error_reason(&status).as_str()), (Code::Unavailable, "OVERLOADED"));
    assert!(status.get_details_retry_info().and_then(|info| info.retry_delay).is_some());
    assert_eq!(root.check_token("kw_live_x").await.unwrap(), pb::Reason::Unknown);
    drop(commits_wait);
    assert!(call.await.unwrap());
    assert!(root.keys.who_am_i(pb::WhoAmIRequest {}).await.is_ok(), "there is room again");
    assert!(!keyward.fetch_admin_page("/metrics").1.contains("keyward_calls_shed_total 0"));
    let told = "call refused: overload.management_calls reached";
    assert_eq!(keyward.process.stderr().matches(told).count(), 1, "once a minute");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_command_line_reaches_every_kind_of_listener() {
    let (home, authority) = (TestHome::new(), TestCa::new("ours"));
    authority.issue_server_certificate(2040).write_files(&home.path("cert.pem"), &home.path("key.pem"));
    replace_file(&home.path("ca.pem"), &authority.pem);
    authority
        .issue_client_certificate("spiffe://example.org/ops")
        .write_files(&home.path("ops.pem"), &home.path("ops.key"));
    let socket = format!("unix:{}", home.path("keyward.sock").display());
    let tls = "[listener.tls]\ncertificate = 'cert.pem'\nkey = 'key.pem'";
    let clients = "client_ca = 'ca.pem'\n[[listener.identity]]\nuri = 'spiffe://example.org/ops'\n\
                   account = 'keyward'\nscopes = ['keyward:*']";
    let tables = [
        listener("tls", "127.0.0.1:0", "'management'", tls),
        listener("mtls", "127.0.0.1:0", "'management'", &format!("{tls}\n{clients}")),
        listener("side", &socket, "'management'", ""),
    ];
    let keyward = start(&home, &tables.concat());
    let whoami = |name: &str, more: &[&str]| {
        let bound = keyward.process.listener_address(name).unwrap();
        let server = if bound.starts_with("unix:") { bound } else { format!("https://{bound}") };
        let mut command = home.command(["whoami", "--output", "json", "--server", &server]);
        command.args(more);
        home.run_to_end(command)
    };
    let root = home.root_key_file();
    let token = ["--token-file", root.to_str().unwrap()];
    let ca = ["--ca-file", "ca.pem"];
    for ended in [whoami("tls", &[token, ca].concat()), whoami("side", &token)] {
        assert!(ended.code == Some(0) && ended.out.contains("\"system\""), "{ended:?}");
    }
    let certificate = ["--client-certificate", "ops.pem", "--client-key", "ops.key"];
    let ended = whoami("mtls", &[&ca[..], &certificate].concat());
    assert!(ended.code == Some(0) && ended.out.contains("cert:spiffe://example.org/ops"), "{ended:?}");
    let unbelieved = whoami("tls", &token);
    assert!(unbelieved.code == Some(2) && unbelieved.err.contains("cannot reach https://"), "{unbelieved:?}");
    assert!(read_text(&home.path("ca.pem")).contains("BEGIN CERTIFICATE"));
}
