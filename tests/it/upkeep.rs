//! What operators do to a server that lives: stop it under load, start it before its database, migrate, back up and
//! restore. Each with the real binary.

use std::{
    collections::BTreeMap,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use keyward::{
    domain::{
        account::Account,
        key::{ApiKey, KeyOwner, KeySecret, KeySpec},
        log::{AuditAction, ChainHash, LogEntry, RecordChange},
        name::{AccountId, DisplayName, EnvironmentName, KeyId, KeyName},
        scope::Scope,
        time::{Revision, Timestamp},
        token::TokenDigest,
    },
    pb,
    store::WriteRequest,
};
use tonic::Code;

use crate::{
    postgres::{
        PostgresDatabase, PostgresServer, command, program_folder, run_checked, short_temp_folder, url,
    },
    process::{
        AuthorizedClients, FinishedProcess, KeywardProcess, TestHome, check_request, plain_key_request,
        wait_for,
    },
};

#[track_caller]
fn good(ended: FinishedProcess) -> String {
    assert_eq!(ended.code, Some(0), "{ended:?}");
    ended.out
}

async fn verified(server: &KeywardProcess) -> pb::VerifyAuditLogResponse {
    server.root_caller().audit.verify(pb::VerifyAuditLogRequest::default()).await.unwrap().into_inner()
}

// Stopping. ----------------------------------------------------------------------------------------------------------

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_says_not_serving_and_serves_on_until_the_delay_is_over_or_a_second_signal_comes() {
    let home = TestHome::new();
    let mut serve = home.serve_command();
    serve.args(["--shutdown-delay", "10m"]);
    let server = home.start_with(serve).unwrap();
    server.root_caller().create_account("acme").await;
    let (_, token) = server.root_caller().create_key(plain_key_request()).await.unwrap();
    server.process.terminate();
    wait_for("the server to say that it stops", || {
        (server.fetch_admin_page("/readyz").0 == 503).then_some(())
    });
    assert_eq!(
        server.root_caller().check_token(&token).await.unwrap(),
        pb::Reason::Ok,
        "also over a new connection"
    );
    server.process.terminate();
    let ended = server.process.wait_until_ended();
    assert!(ended.err.contains("a second signal: stopping at once"), "{ended:?}");
}

/// The client's own words for a call that it had not sent when its connection ended, in order.
fn is_unsent(status: &tonic::Status) -> bool {
    let words = format!("{status:?}");
    status.code() == Code::Cancelled || words.contains("GoAway(b\"\", NO_ERROR, Remote)")
}

/// Asks until it is answered, as a client does that retries what says UNAVAILABLE.
async fn ask(caller: &mut AuthorizedClients, token: &str, retries: &AtomicUsize) -> pb::Reason {
    loop {
        match caller.authz.check(check_request(token)).await {
            Ok(answer) => return answer.into_inner().reason(),
            Err(status) => {
                assert!(status.code() == Code::Unavailable || is_unsent(&status), "{status:?}");
                retries.fetch_add(1, Ordering::Relaxed);
                tokio::time::sleep(std::time::Duration::from_millis(20)).await;
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn one_server_alone_is_restarted_under_load_and_no_call_of_a_client_that_retries_fails() {
    let server = KeywardProcess::start();
    server.root_caller().create_account("acme").await;
    let (_, token) = server.root_caller().create_key(plain_key_request()).await.unwrap();
    let (stop, answered, retries) =
        (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let clients: Vec<_> = (0..4)
        .map(|_| {
            let (mut caller, token) = (server.root_caller(), token.clone());
            let (stop, answered, retries) = (stop.clone(), answered.clone(), retries.clone());
            tokio::spawn(async move {
                while !stop.load(Ordering::Relaxed) {
                    assert_eq!(ask(&mut caller, &token, &retries).await, pb::Reason::Ok);
                    answered.fetch_add(1, Ordering::Relaxed);
                }
            })
        })
        .collect();
    let go_on = || {
        let end = answered.load(Ordering::Relaxed) + 200;
        wait_for("the load to go on", || (answered.load(Ordering::Relaxed) >= end).then_some(()));
    };
    go_on();
    let address = server.address.to_string();
    let home = server.stop();
    let url = home.url();
    let serve = ["serve", "--database", &url, "--listen", &address, "--admin-listen", "127.0.0.1:0"];
    let _again = home.start_with(home.command(serve)).unwrap();
    go_on();
    stop.store(true, Ordering::Relaxed);
    for client in clients {
        client.await.unwrap();
    }
    assert!(retries.load(Ordering::Relaxed) > 0, "the server was away in between");
}

// A database that is away. -------------------------------------------------------------------------------------------

fn free_port() -> String {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string()
}

fn status(address: &str, path: &str) -> Option<u16> {
    use std::io::{Read as _, Write as _};
    let mut stream = std::net::TcpStream::connect(address).ok()?;
    write!(stream, "GET {path} HTTP/1.1\r\nhost: keyward\r\nconnection: close\r\n\r\n").ok()?;
    let mut text = String::new();
    stream.read_to_string(&mut text).ok()?;
    text.split(' ').nth(1)?.parse().ok()
}

#[test]
fn a_start_waits_for_a_database_that_is_away_and_says_that_it_is_not_ready() {
    let mut cluster = PostgresServer::start(&[]);
    cluster.sql("postgres", "CREATE DATABASE keys OWNER keyward TEMPLATE template0");
    let home = TestHome::with_database_url(url(cluster.socket(), 5432, "keys"));
    let admin = free_port();
    let serve = |wait: &str| {
        let database = home.url();
        let listen = ["--listen", "127.0.0.1:0", "--admin-listen", &admin];
        let arguments = [&["serve", "--database", &database, "--database-wait", wait][..], &listen].concat();
        home.command(arguments)
    };
    let mut waiting = None;
    cluster.restart(|_| {
        let refused = home.run_expecting_failure(serve("0s"));
        assert!(refused.contains("could not be opened"), "{refused}");
        let process = home.spawn(serve("10m"));
        wait_for("the start to wait", || {
            let pages = (status(&admin, "/healthz"), status(&admin, "/readyz"));
            (pages == (Some(200), Some(503))).then_some(())
        });
        process.terminate();
        assert_eq!(process.wait_until_ended().code, Some(0), "it ends when it is told to");
        waiting = Some(home.spawn(serve("10m")));
        wait_for("the start to wait", || (status(&admin, "/readyz") == Some(503)).then_some(()));
    });
    let process = waiting.unwrap();
    wait_for("the server to be ready", || (status(&admin, "/readyz") == Some(200)).then_some(()));
    assert!(process.stderr().contains("the start waits for it"));
    process.terminate();
    assert_eq!(process.wait_until_ended().code, Some(0));
}

// Migrations. --------------------------------------------------------------------------------------------------------

/// The schema as an older version left it: the fifth.
const DOWNGRADE_SQL: &str = "DROP TABLE uses; DROP TRIGGER tally_log ON log; DROP FUNCTION tally_log; DROP TABLE tallies; \
     DROP INDEX key_name_nfc_of_account, key_name_nfc_of_user, accounts_by_folded_id; \
     DROP TRIGGER check_log_format ON replicas; DROP FUNCTION check_log_format; DROP TABLE log_state; \
     ALTER TABLE replicas DROP COLUMN log_format";

fn migrates(home: &TestHome) {
    let url = home.url();
    let run = |arguments: &[&str]| home.run_to_end(home.command(arguments));
    let mut serve = home.serve_command();
    serve.arg("--no-migrate");
    let refused = home.run_expecting_failure(serve);
    assert!(refused.contains("schema version 5") && refused.contains("run 'keyward migrate'"), "{refused}");
    for _ in 0..2 {
        let told = good(run(&["migrate", "--dry-run", "--database", &url]));
        let steps = "0006 uses: would be taken\n0007 owner: would be taken\n0008 tallies: would be taken\n\
                     0009 names: would be taken\n0010 log_format: would be taken\n";
        assert_eq!(told, steps);
    }
    let steps = "0006 uses: taken\n0007 owner: taken\n0008 tallies: taken\n0009 names: taken\n\
                 0010 log_format: taken\n";
    assert_eq!(good(run(&["migrate", "--database", &url])), steps);
    assert_eq!(good(run(&["migrate", "--database", &url])), "The schema is up to date.\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_is_migrated_apart_from_the_start() {
    let server = KeywardProcess::start();
    server.root_caller().create_account("acme").await;
    let (id, _) = server.root_caller().create_key(plain_key_request()).await.unwrap();
    let home = server.stop();
    let named = named_by_the_version_before(&home.url()).await;
    let open = || rusqlite::Connection::open(home.database()).unwrap();
    open().execute_batch("PRAGMA application_id = 0").unwrap();
    let file = open();
    file.execute_batch(
        "ALTER TABLE secrets ADD COLUMN last_used_at INTEGER; UPDATE secrets SET last_used_at = 1; \
         DROP TABLE uses; DROP TRIGGER tally_log; DROP TABLE tallies; \
         DROP INDEX key_name_nfc_of_account; DROP INDEX key_name_nfc_of_user; DROP INDEX accounts_by_folded_id; \
         ALTER TABLE keys DROP COLUMN name_nfc; \
         ALTER TABLE meta DROP COLUMN term; ALTER TABLE meta DROP COLUMN owner; \
         DELETE FROM _sqlx_migrations WHERE version > 5",
    )
    .unwrap();
    // As if it had been killed: the change is in the WAL.
    file.set_db_config(rusqlite::config::DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true).unwrap();
    drop(file);
    migrates(&home);
    let file = rusqlite::Connection::open(home.database()).unwrap();
    let count = "SELECT keys FROM tallies WHERE account = 'acme'";
    assert_eq!(file.query_row(count, [], |row| row.get::<_, i64>(0)).unwrap(), 2, "keys are counted");
    drop(file);
    let mut serve = home.serve_command();
    serve.arg("--no-migrate");
    let server = home.start_with(serve).unwrap();
    assert!(verified(&server).await.valid);
    assert_eq!(
        server.root_caller().get_key(&id).await.unwrap().last_used_at,
        Some(micro()),
        "uses are taken along"
    );
    names_and_ids_are_unique(&server, &named).await;
    assert!(verified(&server).await.valid);
}

/// Stores a key whose name is not normalized, as a version could that did not know normal forms. Its id.
async fn named_by_the_version_before(url: &str) -> String {
    let at = Timestamp::from_micros(1);
    let secret = KeySecret {
        version: 1,
        digest: TokenDigest::from_token("another token"),
        hint: String::new(),
        created_at: at,
        expires_at: None,
    };
    let key = ApiKey {
        id: KeyId::generate(at, [7; 10]),
        owner: KeyOwner::Account(AccountId::parse("acme").unwrap()),
        environment: EnvironmentName::parse("production").unwrap(),
        spec: KeySpec {
            name: Some(KeyName::from_stored("e\u{301}quipe").unwrap()),
            scopes: [Scope::parse_grant("monitors:read").unwrap()].into_iter().collect(),
            roles: vec![],
            expires_at: None,
            customers: vec![],
            allowed_cidrs: vec![],
            rate_limits: vec![],
            quota: None,
            metadata: BTreeMap::new(),
        },
        created_at: at,
        created_by: "system".to_owned(),
        updated_at: at,
        disabled_at: None,
        revocation: None,
        secrets: vec![secret],
        revision: Revision::default(),
    };
    let id = key.id.to_string();
    let store = keyward::store::open(url).await.unwrap();
    let change = RecordChange::Key(Arc::new(key));
    let write = WriteRequest::from_system(change, None, AuditAction::KeyCreated, "the version before", at);
    let committed = store.commit(&[write]).await.unwrap();
    assert!(committed.outcomes[0].is_ok(), "{committed:?}");
    store.close().await;
    id
}

/// A name is one in every form, also of a key that was there before; and so are ids of accounts in every case.
async fn names_and_ids_are_unique(server: &KeywardProcess, named: &str) {
    let mut root = server.root_caller();
    for name in ["\u{e9}quipe", "e\u{301}quipe"] {
        let same = pb::CreateKeyRequest { name: Some(name.to_owned()), ..plain_key_request() };
        assert_eq!(root.create_key(same).await.unwrap_err().code(), Code::AlreadyExists);
        let name_prefix = name[..3].to_owned();
        let list = pb::ListKeysRequest { account: "acme".to_owned(), name_prefix, ..Default::default() };
        let found = root.keys.list(list).await.unwrap().into_inner().keys;
        let found: Vec<_> = found.iter().map(|key| (key.id.as_str(), key.name.as_str())).collect();
        assert_eq!(found, [(named, "e\u{301}quipe")], "it stays as it was");
    }
    root.rotate_key(named).await.unwrap();
    for id in ["Acme", "ACME", "Keyward"] {
        let create = pb::CreateAccountRequest { id: id.to_owned(), ..Default::default() };
        assert_eq!(root.accounts.create(create).await.unwrap_err().code(), Code::AlreadyExists, "{id}");
    }
}

/// A microsecond after 1970.
fn micro() -> prost_types::Timestamp {
    prost_types::Timestamp { seconds: 0, nanos: 1000 }
}

fn text(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_be_bytes()[..], text.as_bytes()].concat()
}

fn int(value: Option<i64>) -> Vec<u8> {
    match value {
        Some(value) => [&8u64.to_be_bytes()[..], &value.to_be_bytes()].concat(),
        None => u64::MAX.to_be_bytes().to_vec(),
    }
}

/// Makes an account by the statements of the version before, as a replica of it would that still runs.
fn written_by_the_version_before(database: &PostgresDatabase, id: &str) {
    let head: u64 = database.sql("SELECT head FROM keyward.meta").parse().unwrap();
    let hash = database.sql("SELECT encode(head_hash, 'hex') FROM keyward.meta");
    let hash: ChainHash =
        std::array::from_fn(|at| u8::from_str_radix(&hash[2 * at..2 * at + 2], 16).unwrap());
    let account = Account {
        id: AccountId::parse(id).unwrap(),
        name: DisplayName::parse(id).unwrap(),
        suspended_at: None,
        longest_life: None,
        created_at: Timestamp::from_micros(1),
        updated_at: Timestamp::from_micros(1),
        revision: Revision(head + 1),
    };
    let change = RecordChange::Account(Arc::new(account));
    let mut row = LogEntry {
        revision: Revision(head + 1),
        at: Timestamp::from_micros(1),
        action: AuditAction::AccountCreated.as_str().to_owned(),
        account: change.account_id().cloned(),
        key_id: None,
        user: None,
        actor: "system".to_owned(),
        actor_account: None,
        acting_user: None,
        method: "the version before".to_owned(),
        payload: serde_json::to_string(&change).unwrap(),
        prev_hash: hash,
        hash: [0; 32],
    };
    row.hash = row.compute_hash();
    let hex = |hash: &ChainHash| hash.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let (revision, now, next) = (head + 1, hex(&row.prev_hash), hex(&row.hash));
    let at = i64::try_from(revision).unwrap();
    let sums = [text(id), text(id), int(None), int(Some(1)), int(Some(1)), int(Some(at))];
    let sum = crc32fast::hash(&sums.concat());
    database.sql(&format!(
        "SET search_path TO keyward; BEGIN; SELECT head, head_hash FROM meta FOR UPDATE; \
         INSERT INTO accounts (id, name, suspended_at, created_at, updated_at, revision, sum, longest_life) \
         VALUES ('{id}', '{id}', NULL, 1, 1, {revision}, {sum}, NULL); \
         INSERT INTO log (revision, at, action, account, key_id, user_id, actor, actor_account, acting_user, \
         method, payload, prev_hash, hash) VALUES ({revision}, 1, '{}', '{id}', NULL, NULL, 'system', NULL, NULL, \
         '{}', '{}', '\\x{now}', '\\x{next}'); \
         UPDATE meta SET head = {revision}, head_hash = '\\x{next}'; COMMIT",
        row.action, row.method, row.payload
    ));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_is_migrated_while_the_version_before_writes_and_all_of_it_verifies() {
    let database = PostgresDatabase::new();
    let home = TestHome::with_database_url(database.url());
    let server = home.start();
    server.root_caller().create_account("acme").await;
    server.root_caller().create_key(plain_key_request()).await.unwrap();
    server.stop();
    let named = named_by_the_version_before(&database.url()).await;
    database.sql(&format!(
        "SET search_path TO keyward; {DOWNGRADE_SQL}; DELETE FROM migrations WHERE version > 5"
    ));
    written_by_the_version_before(&database, "before");
    migrates(&home);
    written_by_the_version_before(&database, "after");
    let counted = "SELECT string_agg(account || ' ' || keys || ' ' || log_rows, ', ' ORDER BY account) \
                   FROM keyward.tallies WHERE account <> 'keyward'";
    assert_eq!(database.sql(counted), "acme 2 0, after 0 1", "what the version before writes is counted too");
    let server = home.start_with(home.serve_command()).unwrap();
    // While it runs too: what others of the version before commit is taken in.
    written_by_the_version_before(&database, "beside");
    server.root_caller().accounts.get(pb::GetAccountRequest { id: "beside".to_owned() }).await.unwrap();
    let (id, _) = server.root_caller().create_key(plain_key_request()).await.unwrap();
    database.sql("UPDATE keyward.secrets SET last_used_at = 1");
    assert_eq!(server.root_caller().get_key(&id).await.unwrap().last_used_at, Some(micro()));
    names_and_ids_are_unique(&server, &named).await;
    let found = verified(&server).await;
    assert!(found.valid && found.entries == found.head, "{found:?}");
}

/// `keyward migrate` names the accounts whose ids differ in case alone, and migrates nothing.
fn collision_is_refused(home: &TestHome, shown_ids: &str) {
    let url = home.url();
    let migrate =
        |more: &[&str]| home.run_to_end(home.command([&["migrate", "--database", &url], more].concat()));
    let refused = migrate(&[]);
    assert_eq!(refused.code, Some(1), "{refused:?}");
    for said in [shown_ids, "differ in case alone", "Nothing was migrated", "restore a backup"] {
        assert!(refused.err.contains(said), "{said}: {refused:?}");
    }
    assert!(!refused.err.contains("UNIQUE"), "{refused:?}");
    assert!(good(migrate(&["--dry-run"])).contains("0009 names: would be taken"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_migration_of_a_file_names_the_accounts_that_differ_in_case_alone() {
    let server = KeywardProcess::start();
    server.root_caller().create_account("acme").await;
    let home = server.stop();
    let file = rusqlite::Connection::open(home.database()).unwrap();
    file.execute_batch(
        "DROP INDEX key_name_nfc_of_account; DROP INDEX key_name_nfc_of_user; DROP INDEX accounts_by_folded_id; \
         ALTER TABLE keys DROP COLUMN name_nfc; DELETE FROM _sqlx_migrations WHERE version > 8; \
         CREATE TEMP TABLE other AS SELECT * FROM accounts WHERE id = 'acme'; UPDATE other SET id = 'ACME'; \
         INSERT INTO accounts SELECT * FROM other",
    )
    .unwrap();
    drop(file);
    collision_is_refused(&home, "\"ACME\", \"acme\"");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_migration_of_a_server_names_the_accounts_that_differ_in_case_alone() {
    let database = PostgresDatabase::new();
    let home = TestHome::with_database_url(database.url());
    let server = home.start();
    server.root_caller().create_account("acme").await;
    server.stop();
    database.sql(
        "SET search_path TO keyward; \
         DROP INDEX key_name_nfc_of_account, key_name_nfc_of_user, accounts_by_folded_id; \
         DELETE FROM migrations WHERE version > 8; \
         CREATE TEMP TABLE other AS SELECT * FROM accounts WHERE id = 'acme'; UPDATE other SET id = 'ACME'; \
         INSERT INTO accounts SELECT * FROM other",
    );
    collision_is_refused(&home, "\"ACME\", \"acme\"");
}

// Backups. -----------------------------------------------------------------------------------------------------------

/// A server with a key; then another one, which no backup has. The tokens of both, and the revision between.
async fn before_and_after(server: &KeywardProcess, backup: impl FnOnce()) -> ([String; 2], u64) {
    let mut root = server.root_caller();
    root.create_account("acme").await;
    let (id, kept) = root.create_key(plain_key_request()).await.unwrap();
    let revision = root.get_key(&id).await.unwrap().revision;
    backup();
    let (_, lost) = root.create_key(plain_key_request()).await.unwrap();
    ([kept, lost], revision)
}

async fn restored(home: &TestHome, root_key: &str, tokens: &[String; 2], revision: u64) -> KeywardProcess {
    let serve = |required: u64| {
        let mut serve = home.serve_command();
        serve.args(["--require-revision", &required.to_string()]);
        serve
    };
    let refused = home.run_expecting_failure(serve(revision + 1));
    let said = format!("ends at revision {revision}, and --require-revision asks for {}", revision + 1);
    assert!(refused.contains(&said) && refused.contains("Restore a newer backup"), "{refused}");
    let server = home.start_with(serve(revision)).unwrap_or_else(|ended| panic!("{ended:?}"));
    let mut root = server.caller(root_key);
    let reasons = [root.check_token(&tokens[0]).await.unwrap(), root.check_token(&tokens[1]).await.unwrap()];
    assert_eq!(reasons, [pb::Reason::Ok, pb::Reason::Unknown]);
    let found = root.audit.verify(pb::VerifyAuditLogRequest::default()).await.unwrap().into_inner();
    assert!(found.valid, "{found:?}");
    server
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_is_copied_while_its_server_runs_and_the_copy_is_a_database() {
    let server = KeywardProcess::start();
    let (url, copy) = (server.home.url(), server.home.path("copy.db"));
    let backup = || {
        let arguments = ["backup", "--database", &url, "--to", copy.to_str().unwrap()];
        let told = good(server.home.run_to_end(server.home.command(arguments)));
        assert!(told.contains("keyward serve --require-revision 4"), "{told}");
        let again = server.home.run_to_end(server.home.command(arguments));
        assert!(again.code == Some(1) && again.err.contains("exists"), "{again:?}");
    };
    let (tokens, revision) = before_and_after(&server, backup).await;
    let (root_key, home) = (server.home.root_key(), TestHome::new());
    std::fs::rename(&copy, home.database()).unwrap();
    restored(&home, &root_key, &tokens, revision).await.stop();
}

fn postgres_tool(name: &str, database: &str, arguments: &[&str], file: &Path) {
    let mut tool = command(program_folder().join(name));
    tool.arg("-h").arg(PostgresServer::shared().socket()).args(["-U", "postgres", "-d", database]);
    run_checked(tool.args(arguments).arg(file));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dump_of_the_schema_is_restored_into_another_database() {
    let (first, second, folder) = (PostgresDatabase::new(), PostgresDatabase::new(), short_temp_folder());
    let home = TestHome::with_database_url(first.url());
    let server = home.start();
    let dump = folder.path().join("keyward.dump");
    let backup = || {
        postgres_tool("pg_dump", &first.name, &["--format=custom", "--schema=keyward", "--file"], &dump);
    };
    let (tokens, revision) = before_and_after(&server, backup).await;
    postgres_tool("pg_restore", &second.name, &["--exit-on-error"], &dump);
    assert_eq!(second.sql("SELECT has_table_privilege('keyward', 'keyward.log', 'DELETE')"), "f");
    let restored =
        restored(&TestHome::with_database_url(second.url()), &home.root_key(), &tokens, revision).await;
    restored.stop();
    server.stop();
}
