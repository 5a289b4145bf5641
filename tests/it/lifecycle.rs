//! Starting and stopping: what the first start makes, what stops a start and what it says of that, what a stop
//! waits for.

use std::{
    net::{TcpListener, TcpStream},
    os::unix::fs::PermissionsExt as _,
    time::{Duration, Instant},
};

use bytes::Bytes;
use keyward::{
    domain::{name::KeyId, time::Revision},
    grpc::HEALTH_SERVICE_NAMES,
    pb::{self, Reason},
    store,
};
use prost::Message as _;
use tokio::sync::oneshot;
use tonic::{Code, Status, transport::Channel};

use crate::process::{KeywardProcess, TestHome, call_raw, plain_key_request, read_text, wait_for};

const STOP_WITHIN: Duration = Duration::from_secs(10);

/// Begins a Create over `channel`: the server has its headers when this returns, and its message when the sender
/// is used.
async fn begin_create(
    channel: &Channel,
    token: &str,
) -> (oneshot::Sender<()>, tokio::task::JoinHandle<Result<Bytes, Status>>) {
    let (go, gone) = oneshot::channel();
    let message = async {
        match gone.await {
            Ok(()) => Bytes::from(plain_key_request().encode_to_vec()),
            Err(_) => std::future::pending().await,
        }
    };
    let messages = futures_util::stream::once(message);
    let (channel_, token_) = (channel.clone(), token.to_owned());
    let call =
        tokio::spawn(
            async move { call_raw(channel_, &token_, "keyward.v1.KeyService/Create", messages).await },
        );
    // Frames of one connection come in order: when a later call is answered, this one has begun. The two are
    // begun by different tasks, so it takes a few.
    for _ in 0..20 {
        let mut caller = crate::process::AuthorizedClients::with_token(channel.clone(), token);
        caller.keys.who_am_i(pb::WhoAmIRequest {}).await.unwrap();
    }
    (go, call)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_waits_for_the_call_in_flight_and_keeps_what_it_did() {
    let server = KeywardProcess::start();
    server.root_caller().create_account("acme").await;
    let (go, call) = begin_create(&server.channel(), &server.home.root_key()).await;
    let begun = Instant::now();
    server.process.terminate();
    wait_for("the server to stop listening", || TcpStream::connect(server.address).err());
    go.send(()).unwrap();
    let answer = pb::CreateKeyResponse::decode(call.await.unwrap().unwrap()).unwrap();
    let KeywardProcess { home, process, .. } = server;
    let ended = process.wait_until_ended();
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert!(begun.elapsed() < STOP_WITHIN, "{:?}", begun.elapsed());

    let again = home.start();
    assert_eq!(again.root_caller().check_token(&answer.token).await.unwrap(), Reason::Ok);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_does_not_wait_for_ever() {
    let server = KeywardProcess::start();
    server.root_caller().create_account("acme").await;
    let (_never, _call) = begin_create(&server.channel(), &server.home.root_key()).await;
    let begun = Instant::now();
    server.stop();
    assert!(begun.elapsed() < STOP_WITHIN, "{:?}", begun.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_last_uses_are_on_disk_after_a_stop() {
    let server = KeywardProcess::start();
    let mut root = server.root_caller();
    root.create_account("acme").await;
    let (id, token) = root.create_key(plain_key_request()).await.unwrap();
    assert_eq!(root.check_token(&token).await.unwrap(), Reason::Ok);
    let seen = root.get_key(&id).await.unwrap().last_used_at.unwrap();
    let home = server.stop();

    let store = store::open(&home.url()).await.unwrap();
    let stored = store.get_key(KeyId::parse(&id).unwrap()).await.unwrap().unwrap();
    let [(1, used)] = stored.last_used[..] else { panic!("{stored:?}") };
    let micros = seen.seconds * 1_000_000 + i64::from(seen.nanos / 1000);
    assert_eq!(used.as_micros(), micros);
}

#[test]
fn a_second_server_on_the_same_file_refuses_and_names_the_first() {
    let server = KeywardProcess::start();
    let home = &server.home;
    let link = home.path("link.db");
    std::os::unix::fs::symlink(home.database(), &link).unwrap();
    for path in [home.database(), link] {
        let url = format!("sqlite:{}", path.display());
        let said = home.run_expecting_failure(serve_on(home, &url));
        assert!(said.contains(&format!("process {}", server.process.id())), "{said}");
        assert!(said.contains("in use by another keyward"), "{said}");
        assert!(said.contains("--database"), "the way out: {said}");
    }
}

#[test]
fn a_link_that_was_there_before_the_file_leads_to_the_same_lock() {
    let home = TestHome::new();
    let link = home.path("link.db");
    std::os::unix::fs::symlink(home.database(), &link).unwrap();
    let first = home.start_with(serve_on(&home, &format!("sqlite:{}", link.display()))).unwrap();
    assert!(home.database().exists(), "the link's end is the database");
    let said = home.run_expecting_failure(serve_on(&home, &home.url()));
    assert!(said.contains(&format!("process {}", first.process.id())), "{said}");
}

fn serve_on(home: &TestHome, url: &str) -> std::process::Command {
    home.command(["serve", "--database", url, "--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0"])
}

#[test]
fn a_lock_ends_with_its_process_however_that_ends() {
    let server = KeywardProcess::start();
    let home = server.home.clone();
    server.process.kill();
    home.start().stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_root_key_goes_to_a_file_that_holds_nothing_else_and_is_its_owners_alone() {
    let server = KeywardProcess::start();
    let file = server.home.root_key_file();
    assert_eq!(file.metadata().unwrap().permissions().mode() & 0o777, 0o600);
    let token = read_text(&file);
    let (start, body) = token.rsplit_once('_').unwrap();
    assert_eq!((start, body.len()), ("kw_live", 49));
    assert!(body.bytes().all(|byte| byte.is_ascii_alphanumeric()), "{body}");
    let me = server.root_caller().keys.who_am_i(pb::WhoAmIRequest {}).await.unwrap().into_inner();
    assert_eq!(me.account.unwrap().id, "keyward");
    assert!(!server.process.stdout().contains("ROOT_KEY"), "it is shown in one place only");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_root_key_file_that_exists_stops_a_first_start_and_nothing_is_left_behind() {
    let home = TestHome::new();
    std::fs::write(home.root_key_file(), "mine").unwrap();
    let said = home.run_expecting_failure(home.serve_command());
    assert!(said.contains("exists already"), "{said}");
    assert!(said.contains("root.key") && said.contains("move it away"), "{said}");
    assert_eq!(read_text(&home.root_key_file()), "mine");

    let other = home.path("other.key");
    let mut command = home.serve_command_without_root_key_file();
    command.arg("--root-key-file").arg(&other);
    let server = home.start_with(command).unwrap();
    server.caller(&read_text(&other)).create_account("acme").await;
}

#[test]
fn a_start_on_an_existing_database_shows_no_key() {
    let home = KeywardProcess::start().stop();
    std::fs::remove_file(home.root_key_file()).unwrap();
    let server = home.start_with(home.serve_command()).unwrap();
    assert!(!home.root_key_file().exists());
    assert!(!server.process.stdout().contains("ROOT_KEY"));
    let home = server.stop();
    let server = home.start_with(home.serve_command_without_root_key_file()).unwrap();
    assert!(!server.process.stdout().contains("ROOT_KEY"), "{}", server.process.stdout());
}

/// A root key that nobody has seen must not be the one that counts.
#[test]
fn a_first_start_that_cannot_serve_leaves_the_root_key_to_the_next() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let home = TestHome::new();
    let url = home.url();
    let address = taken.local_addr().unwrap().to_string();
    let first =
        home.command(["serve", "--database", &url, "--listen", &address, "--admin-listen", "127.0.0.1:0"]);
    home.run_expecting_failure(first);
    let file = home.path("keyward-root.key");
    assert!(!file.exists(), "no key was created");
    home.start_with(home.serve_command_without_root_key_file()).unwrap();
    assert!(file.exists(), "nobody has the root key");
}

#[test]
fn an_address_in_use_is_named() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    for (flag, other, setting) in
        [("--listen", "--admin-listen", "listen"), ("--admin-listen", "--listen", "admin_listen")]
    {
        let home = TestHome::new();
        let url = home.url();
        let said = home.run_expecting_failure(home.command([
            "serve",
            "--database",
            &url,
            flag,
            &address,
            other,
            "127.0.0.1:0",
        ]));
        assert!(said.contains(&format!("{setting} = {address:?} cannot be bound")), "{said}");
        assert!(said.contains("another server"), "{said}");
    }
}

#[test]
fn wrong_settings_stop_the_start_and_say_what_would_be_right() {
    let home = TestHome::new();
    let config = home.path("keyward.toml");
    let flags: [(&[&str], &[&str]); 9] = [
        (&["--listen", "nowhere"], &["listen", "nowhere", "must be host:port"]),
        (&["--admin-listen", "127.0.0.1:99999"], &["admin_listen", "must be host:port"]),
        (&["--database", "keyward.db"], &["--database: database ", "write sqlite:keyward.db"]),
        (&["--database", "sqlite:"], &["lacks a path", "sqlite:keyward.db"]),
        (
            &["--database", "postgres://me:hunter2@db:port/keyward"],
            &["more than one way", "database_password_file"],
        ),
        (&["--database", "postgres://me:hunter2@db/keyward?schema=a-b"], &["schema", "a-z, 0-9 and _"]),
        (&["--database", "mysql://me:hunter2@db/keyward"], &["mysql", "sqlite:PATH", "postgres://"]),
        (&["--config", "nowhere.toml"], &["nowhere.toml", "cannot be read"]),
        (&["--log", "keyward=loud"], &["--log: ", "log filter", "keyward=loud"]),
    ];
    for (arguments, said) in flags {
        let message = home.run_expecting_failure(home.command(["serve"].iter().chain(arguments)));
        for said in said {
            assert!(message.contains(said), "{arguments:?}: {message}");
        }
        assert!(!message.contains("hunter2"), "{message}");
    }
    for (settings, said) in [
        ("lisen = '127.0.0.1:1'", ["lisen", "did you mean `listen`?"]),
        ("listen = 50051", ["listen = 50051", "must be text, in quotes"]),
        ("token_prefix = 'K'", ["token_prefix", "must be 1-16 characters of [a-z0-9_]"]),
        ("environments = []", ["environments", "at least one"]),
        ("threads = 0", ["threads = 0", "must be a whole number of 1 or more"]),
        ("listen = ", ["keyward.toml", "line 1"]),
    ] {
        std::fs::write(&config, settings).unwrap();
        let message =
            home.run_expecting_failure(home.command(["serve", "--config", config.to_str().unwrap()]));
        for said in said {
            assert!(message.contains(said), "{settings}: {message}");
        }
    }
    let left: Vec<_> = home.files().into_iter().map(|(path, _)| path).collect();
    assert!(left.iter().all(|path| path.extension().is_none_or(|end| end != "db")), "{left:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_root_key_is_replaced_once_the_server_has_stopped() {
    let server = KeywardProcess::start();
    let home = server.home.clone();
    let old = home.root_key();
    server.root_caller().create_account("acme").await;
    let new_file = home.path("new.key");
    let reset = || home.root_key_reset_command("new.key");
    let said = home.run_expecting_failure(reset());
    assert!(said.contains("in use by another keyward"), "{said}");
    assert!(!new_file.exists());

    server.stop();
    let ended = home.run_to_end(reset());
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert!(ended.out.contains("new.key"), "{ended:?}");
    let server = home.start();
    let refused = server.caller(&old).keys.who_am_i(pb::WhoAmIRequest {}).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unauthenticated);
    let mut new = server.caller(&read_text(&new_file));
    new.accounts.get(pb::GetAccountRequest { id: "acme".to_owned() }).await.unwrap();
    let log = new.audit.list(pb::ListAuditEntriesRequest::default()).await.unwrap().into_inner();
    let newest: Vec<_> = log.entries.iter().take(2).map(|entry| (&*entry.action, &*entry.method)).collect();
    assert_eq!(
        newest,
        [("root_key.created", "keyward root-key reset"), ("key.revoked", "keyward root-key reset")],
        "it is in the log"
    );
}

#[test]
fn a_root_key_reset_without_a_terminal_shows_the_key_only_if_that_is_asked_for() {
    let home = KeywardProcess::start().stop();
    let url = home.url();
    let reset = ["root-key", "reset", "--yes", "--database", &url];
    let refused = home.run_to_end(home.command(reset));
    assert!(refused.code == Some(2) && refused.err.contains("--root-key-file -"), "{refused:?}");
    assert!(refused.out.is_empty(), "{refused:?}");
    let ended = home.run_to_end(home.command([&reset[..], &["--root-key-file", "-"]].concat()));
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert_eq!(ended.out.matches("ROOT_KEY='kw_live_").count(), 1, "{ended:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_root_key_reset_of_a_new_database_makes_no_key() {
    let home = TestHome::new();
    let url = home.url();
    store::open(&url).await.unwrap().close().await;
    let said = home.run_expecting_failure(home.root_key_reset_command("-"));
    assert!(said.contains("'keyward serve' creates one"), "{said}");
    let store = store::open(&url).await.unwrap();
    assert_eq!(store.log_head().await.unwrap().revision, Revision(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn health_is_told_to_strangers_for_every_service() {
    use tonic_health::pb::{
        HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
    };
    let server = KeywardProcess::start();
    let mut health = HealthClient::new(server.channel());
    for service in HEALTH_SERVICE_NAMES {
        let request = HealthCheckRequest { service: service.to_owned() };
        let answer = health.check(request).await.unwrap().into_inner();
        assert_eq!(answer.status(), ServingStatus::Serving, "{service:?}");
    }
    let unknown = HealthCheckRequest { service: "keyward.v1.None".to_owned() };
    assert_eq!(health.check(unknown).await.unwrap_err().code(), Code::NotFound);
}

/// Asks a reflection service for the list of services; the two versions differ in their package alone.
macro_rules! listed {
    ($version:ident, $server:expr) => {{
        use tonic_reflection::pb::$version::{
            ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
            server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
        };
        let request = ServerReflectionRequest {
            host: String::new(),
            message_request: Some(MessageRequest::ListServices(String::new())),
        };
        let mut client = ServerReflectionClient::new($server.channel());
        let answers = client.server_reflection_info(futures_util::stream::iter([request])).await;
        let answer = answers.unwrap().into_inner().message().await.unwrap().unwrap();
        let Some(MessageResponse::ListServicesResponse(list)) = answer.message_response else {
            panic!("{answer:?}")
        };
        list.service.into_iter().map(|service| service.name).collect::<Vec<_>>()
    }};
}

#[tokio::test(flavor = "multi_thread")]
async fn reflection_lists_every_service_in_both_versions() {
    let server = KeywardProcess::start();
    let listed = [listed!(v1, server), listed!(v1alpha, server)];
    for services in listed {
        for service in HEALTH_SERVICE_NAMES.into_iter().filter(|name| !name.is_empty()) {
            assert!(services.iter().any(|name| name == service), "{service}: {services:?}");
        }
        assert!(services.iter().any(|name| name == "grpc.health.v1.Health"), "{services:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_admin_pages_tell_life_readiness_and_numbers() {
    let server = KeywardProcess::start();
    let mut root = server.root_caller();
    root.create_account("acme").await;
    let (_, token) = root.create_key(plain_key_request()).await.unwrap();
    root.check_token(&token).await.unwrap();
    root.check_token("unknown").await.unwrap();
    assert_eq!(server.fetch_admin_page("/healthz").0, 200);
    assert_eq!(server.fetch_admin_page("/readyz").0, 200);
    assert_eq!(server.fetch_admin_page("/").0, 404);
    let (code, metrics) = server.fetch_admin_page("/metrics");
    assert_eq!(code, 200);
    for line in [
        "keyward_checks_total{result=\"allowed\",reason=\"ok\"} 1",
        "keyward_checks_total{result=\"denied\",reason=\"unknown\"} 1",
        "keyward_index_keys 2",
        "keyward_revision 4",
        "keyward_ready 1",
    ] {
        assert!(metrics.lines().any(|found| found == line), "{line}: {metrics}");
    }
}
