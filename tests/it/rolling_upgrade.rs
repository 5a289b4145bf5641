//! A rolling upgrade: servers of this release beside replicas of the one before, which cannot read scopes with `/` and
//! account ids with capital letters. A replica of the one before is a row as its INSERT makes it.

use std::time::Duration;

use keyward::pb;
use sqlx::{Connection as _, PgConnection};
use tonic::{Code, Status};

use crate::{
    postgres::PostgresDatabase,
    postgres_server::holding,
    process::{AuthorizedClients, KeywardProcess, TestHome, plain_key_request, wait_for},
    replicas::{propagation_report, revoke_with_deadline, unconfirmed_replicas, wait_until_ready},
    support::assert_refused,
};

/// The registration of a replica of the release before.
const REGISTER_OLD: &str = "INSERT INTO keyward.replicas (id, name, applied, renew_seq, last_seen) \
     SELECT decode(repeat('01', 16), 'hex'), 'old-1', head, 1, 0 FROM keyward.meta";
const LEAVE_OLD: &str = "DELETE FROM keyward.replicas WHERE name = 'old-1'";

fn start(database: &PostgresDatabase) -> KeywardProcess {
    let server = TestHome::with_database_url(database.url()).start();
    wait_until_ready(&server, 200);
    server
}

/// A server of this release with the account `acme`, beside a replica of the release before.
async fn upgrading(database: &PostgresDatabase) -> KeywardProcess {
    let server = start(database);
    server.root_caller().create_account("acme").await;
    database.sql(REGISTER_OLD);
    server
}

fn newest_log_format(database: &PostgresDatabase) -> String {
    database.sql("SELECT newest_log_format FROM keyward.log_state")
}

fn slashed_key() -> pb::CreateKeyRequest {
    pb::CreateKeyRequest {
        scopes: vec!["monitors:read".to_owned(), "repo/write".to_owned()],
        ..plain_key_request()
    }
}

fn role(scope: &str) -> pb::PutRoleRequest {
    let (account, name) = ("acme".to_owned(), "writer".to_owned());
    pb::PutRoleRequest { account, name, scopes: vec![scope.to_owned()] }
}

fn imported(digest: u8, scope: &str) -> pb::ImportKey {
    pb::ImportKey {
        account: "acme".to_owned(),
        environment: "production".to_owned(),
        scopes: vec![scope.to_owned()],
        sha256: vec![digest; 32],
        ..Default::default()
    }
}

async fn create_account(root: &mut AuthorizedClients, id: &str) -> Result<(), Status> {
    root.accounts.create(pb::CreateAccountRequest { id: id.to_owned(), ..Default::default() }).await.map(drop)
}

async fn update_scopes(root: &mut AuthorizedClients, id: &str, scope: &str) -> Result<(), Status> {
    let key = pb::Key { id: id.to_owned(), scopes: vec![scope.to_owned()], ..Default::default() };
    let update_mask = Some(prost_types::FieldMask { paths: vec!["scopes".to_owned()] });
    root.keys.update(pb::UpdateKeyRequest { key: Some(key), update_mask }).await.map(drop)
}

/// Waits until a session of the database waits for a lock.
fn until_blocked(database: &PostgresDatabase) {
    let waiting = "SELECT count(*) > 0 FROM pg_stat_activity \
                   WHERE datname = current_database() AND wait_event_type = 'Lock'";
    tokio::task::block_in_place(|| {
        wait_for("a session to wait", || (database.sql(waiting) == "t").then_some(()));
    });
}

async fn execute(database: &PostgresDatabase, sql: &'static str) -> Result<(), sqlx::Error> {
    let mut connection = PgConnection::connect(&database.url()).await?;
    sqlx::raw_sql(sql).execute(&mut connection).await.map(drop)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_registered_replica_of_an_older_release_cannot_read_is_refused_with_its_name() {
    let database = PostgresDatabase::new();
    let server = upgrading(&database).await;
    let mut root = server.root_caller();
    let (id, _) = root.create_key(plain_key_request()).await.unwrap();

    let too_old = |result: Result<(), Status>, value: &str| {
        let status = assert_refused(result, Code::FailedPrecondition, "REPLICA_TOO_OLD");
        let what_to_do = format!("cannot read the {value}; upgrade or stop them, then retry: \"old-1\"");
        assert!(status.message().ends_with(&what_to_do), "{status:?}");
    };
    too_old(root.create_key(slashed_key()).await.map(drop), "scope \"repo/write\"");
    too_old(update_scopes(&mut root, &id, "/v1:read").await, "scope \"/v1:read\"");
    too_old(root.accounts.put_role(role("a/b")).await.map(drop), "scope \"a/b\"");
    too_old(create_account(&mut root, "org_2abCD").await, "account id \"org_2abCD\"");
    let keys = vec![imported(1, "a/b"), imported(2, "a:b")];
    let results = root.keys.import(pb::ImportKeysRequest { keys }).await.unwrap().into_inner().results;
    let errors: Vec<_> = results.iter().map(|result| result.error.as_str()).collect();
    assert_eq!(errors, ["REPLICA_TOO_OLD", ""], "the others of the batch are recorded");
    assert_eq!(root.get_key(&id).await.unwrap().scopes, ["monitors:read"]);
    assert_eq!(newest_log_format(&database), "0");
}

#[tokio::test(flavor = "multi_thread")]
async fn once_the_last_older_replica_has_left_everything_is_allowed_and_none_can_come_back() {
    let database = PostgresDatabase::new();
    let server = upgrading(&database).await;
    let mut root = server.root_caller();
    assert_refused(root.create_key(slashed_key()).await, Code::FailedPrecondition, "REPLICA_TOO_OLD");
    database.sql(LEAVE_OLD);
    // As long as the log has nothing that it cannot read, it may come back.
    database.sql(REGISTER_OLD);
    database.sql(LEAVE_OLD);
    root.create_key(slashed_key()).await.unwrap();
    assert_eq!(newest_log_format(&database), "1");
    let error = execute(&database, REGISTER_OLD).await.unwrap_err().to_string();
    let said = "replica \"old-1\" runs an older release: the log contains entries of format 1, and it reads formats up \
                to 0; start the newer release in its place";
    assert!(error.contains(said), "{error}");
    let second = server.home.start();
    wait_until_ready(&second, 200);
    create_account(&mut second.root_caller(), "org_2abCD").await.unwrap();
    assert_eq!(database.sql("SELECT string_agg(log_format::text, ' ') FROM keyward.replicas"), "1 1");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_waits_for_the_registration_of_an_older_replica_and_is_refused_then() {
    let database = PostgresDatabase::new();
    let server = start(&database);
    server.root_caller().create_account("acme").await;
    let mut registering = holding(&database, REGISTER_OLD).await;
    let mut root = server.root_caller();
    let creating = tokio::spawn(async move { root.create_key(slashed_key()).await });
    until_blocked(&database);
    sqlx::raw_sql("COMMIT").execute(&mut registering).await.unwrap();
    assert_refused(creating.await.unwrap(), Code::FailedPrecondition, "REPLICA_TOO_OLD");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_registration_of_an_older_replica_waits_for_a_commit_and_is_refused_then() {
    const COMMITTING: &str = "SELECT head FROM keyward.meta FOR UPDATE; \
                              UPDATE keyward.log_state SET newest_log_format = 1";
    let database = PostgresDatabase::new();
    start(&database).stop();
    let mut committing = holding(&database, COMMITTING).await;
    let mut registering = PgConnection::connect(&database.url()).await.unwrap();
    let registered =
        tokio::spawn(async move { sqlx::raw_sql(REGISTER_OLD).execute(&mut registering).await.map(drop) });
    until_blocked(&database);
    sqlx::raw_sql("COMMIT").execute(&mut committing).await.unwrap();
    let error = registered.await.unwrap().unwrap_err().to_string();
    assert!(error.contains("runs an older release"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_keeps_a_key_from_being_revoked_while_an_older_replica_runs() {
    let database = PostgresDatabase::new();
    let server = start(&database);
    server.root_caller().create_account("acme").await;
    let (id, _) = server.root_caller().create_key(slashed_key()).await.unwrap();
    // As if a server had stored the scope that did not know of log formats.
    database.sql("UPDATE keyward.log_state SET newest_log_format = 0");
    database.sql(REGISTER_OLD);
    let waited = revoke_with_deadline(&server, &id, Some(Duration::from_secs(2))).await.unwrap_err();
    assert_eq!(
        unconfirmed_replicas(&propagation_report(&waited)),
        ["old-1"],
        "it is recorded, and only not confirmed"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_migration_finds_what_the_database_already_contains() {
    const DOWN: &str = "SET search_path TO keyward; DROP TRIGGER check_log_format ON replicas; \
         DROP FUNCTION check_log_format; DROP TABLE log_state; ALTER TABLE replicas DROP COLUMN log_format; \
         DELETE FROM migrations WHERE version > 9";
    let made = [("none", "0"), ("key", "1"), ("role", "1"), ("account", "1")];
    for (what, format) in made {
        let database = PostgresDatabase::new();
        let server = start(&database);
        let mut root = server.root_caller();
        root.create_account("acme").await;
        root.create_key(plain_key_request()).await.unwrap();
        match what {
            "key" => drop(root.create_key(slashed_key()).await.unwrap()),
            "role" => drop(root.accounts.put_role(role("a/b")).await.unwrap()),
            "account" => create_account(&mut root, "Globex").await.unwrap(),
            _ => {}
        }
        let home = server.stop();
        database.sql(DOWN);
        let migrated = home.run_to_end(home.command(["migrate", "--database", &database.url()]));
        assert_eq!(migrated.out, "0010 log_format: taken\n", "{migrated:?}");
        assert_eq!(newest_log_format(&database), format, "{what}");
    }
}
