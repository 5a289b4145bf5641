//! The log outside of the database: exported and verified by the command line as an operator does it, archived, and the
//! head in the server's own log.

use std::path::Path;

use keyward::pb;

use crate::{
    postgres::PostgresDatabase,
    process::{FinishedProcess, KeywardProcess, TestHome, plain_key_request, read_text, wait_for},
};

fn run(home: &TestHome, arguments: &[&str]) -> FinishedProcess {
    home.run_to_end(home.command(arguments))
}

/// A client command as root.
fn client(server: &KeywardProcess, arguments: &[&str]) -> FinishedProcess {
    let mut command = server.home.command(arguments);
    command.arg("--server").arg(server.address.to_string());
    command.arg("--token-file").arg(server.home.root_key_file());
    server.home.run_to_end(command)
}

#[track_caller]
fn good(ended: FinishedProcess) -> String {
    assert_eq!(ended.code, Some(0), "{ended:?}");
    ended.out + &ended.err
}

async fn work(server: &KeywardProcess) {
    let mut root = server.root_caller();
    root.create_account("acme").await;
    for _ in 0..5 {
        let (id, _) = root.create_key(plain_key_request()).await.unwrap();
        root.revoke_key(&id).await.unwrap();
    }
}

async fn verified(server: &KeywardProcess) -> pb::VerifyAuditLogResponse {
    server.root_caller().audit.verify(pb::VerifyAuditLogRequest::default()).await.unwrap().into_inner()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_export_verifies_without_a_server_and_a_change_to_it_is_found() {
    let server = KeywardProcess::start();
    work(&server).await;
    let file = server.home.path("log.jsonl");
    let name = file.to_str().unwrap();
    assert!(good(client(&server, &["audit", "export", "--to", name])).contains("13 entries up to 13"));
    let head = good(client(&server, &["audit", "verify"]));
    let head = head.lines().find_map(|line| line.strip_prefix("head: ")).unwrap().to_owned();
    let verify = |more: &[&str]| run(&server.home, &[&["audit", "verify", "--file", name], more].concat());
    assert!(good(verify(&["--expect", &head])).contains("is valid: 13 entries"));
    let other = format!("12:{}", head.split_once(':').unwrap().1);
    let refused = verify(&["--expect", &other]);
    assert!(refused.code == Some(1) && refused.err.contains("a different history"), "{refused:?}");
    std::fs::write(&file, read_text(&file).replacen("compromised", "superseded", 1)).unwrap();
    let refused = verify(&[]);
    assert!(refused.code == Some(1) && refused.err.contains("it was changed"), "{refused:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_head_is_in_the_servers_log_at_the_start_and_at_the_stop() {
    let server = KeywardProcess::start();
    wait_for("the head to be told", || server.process.stderr().contains("keyward::audit").then_some(()));
    work(&server).await;
    let head = verified(&server).await;
    server.process.terminate();
    let ended = server.process.wait_until_ended();
    let told: Vec<_> = ended.err.lines().filter(|line| line.contains("keyward::audit")).collect();
    let hash: String = head.head_hash.iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(told.len(), 2, "{}", ended.err);
    assert!(told[1].contains(&hash) && told[1].contains("13"), "{}", told[1]);
}

/// Archives what there is, as long as that is more than nothing.
fn archive(home: &TestHome, file: &Path) -> FinishedProcess {
    let (url, file) = (home.url(), file.to_str().unwrap());
    run(
        home,
        &["audit", "archive", "--before", "2200-01-01T00:00:00Z", "--yes", "--to", file, "--database", &url],
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_archived_verifies_as_a_file_and_the_rest_verifies_from_there() {
    let server = KeywardProcess::start();
    work(&server).await;
    let home = server.stop();
    let (first, second) = (home.path("first.jsonl"), home.path("second.jsonl"));
    assert!(good(archive(&home, &first)).contains("Moved 12 entries, 1 to 12, to "));
    let server = home.start_with(home.serve_command()).unwrap();
    let found = verified(&server).await;
    let checkpoint = found.checkpoint.clone().unwrap();
    assert!(found.valid, "{found:?}");
    assert_eq!((found.first_revision, found.head, checkpoint.revision, checkpoint.entries), (13, 14, 12, 12));
    let newest =
        server.root_caller().audit.list(pb::ListAuditEntriesRequest::default()).await.unwrap().into_inner();
    assert_eq!(newest.entries[0].action, "log.archived");
    let said = &newest.entries[0].changes[0];
    assert!(said.field == "archived" && said.after.contains(r#""revision":12"#), "{said:?}");
    server.root_caller().create_key(plain_key_request()).await.unwrap();
    let home = server.stop();
    good(archive(&home, &second));
    for (file, said) in [(&first, "12 entries"), (&second, "2 entries, after 12:")] {
        let told = good(run(&home, &["audit", "verify", "--file", file.to_str().unwrap()]));
        assert!(told.contains(said), "{told}");
    }
    let server = home.start_with(home.serve_command()).unwrap();
    let found = verified(&server).await;
    assert!(found.valid && found.checkpoint.as_ref().unwrap().entries == 14, "{found:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn entries_that_were_taken_away_without_an_archive_are_missed() {
    let database = PostgresDatabase::new();
    let home = TestHome::with_database_url(database.url());
    let server = home.start();
    work(&server).await;
    // As one who can write the database would cover up what he took away.
    database.sql(
        "INSERT INTO keyward.checkpoints SELECT revision, hash, revision, 0 FROM keyward.log WHERE revision = 9; \
         DELETE FROM keyward.log WHERE revision <= 9",
    );
    let found = verified(&server).await;
    assert!(!found.valid && found.problem.contains("no entry states that they were archived"), "{found:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn replicas_go_on_through_an_archive_and_one_that_lags_holds_it_back() {
    let database = PostgresDatabase::new();
    let homes = [TestHome::with_database_url(database.url()), TestHome::with_database_url(database.url())];
    let [one, other] = homes.each_ref().map(|home| home.start_with(home.serve_command()).unwrap());
    let root_key =
        if one.home.root_key_file().exists() { one.home.root_key() } else { other.home.root_key() };
    let (mut here, mut there) = (one.caller(&root_key), other.caller(&root_key));
    here.create_account("acme").await;
    let (old, _) = here.create_key(plain_key_request()).await.unwrap();
    here.revoke_key(&old).await.unwrap();
    let (id, token) = here.create_key(plain_key_request()).await.unwrap();
    let head = here.get_key(&id).await.unwrap().revision;
    let acknowledged = |revision: u64| {
        let sql = format!("SELECT count(*) FROM keyward.replicas WHERE applied >= {revision}");
        wait_for("the replicas to acknowledge", || (database.sql(&sql) == "2").then_some(()));
    };
    acknowledged(head);
    let file = one.home.path("log.jsonl");
    let told = good(archive(&one.home, &file));
    assert!(told.contains(&format!("1 to {}", head - 1)) && told.contains("Some later entries"), "{told}");
    assert_eq!(database.sql("SELECT has_table_privilege('keyward', 'keyward.log', 'DELETE')"), "f");
    // Both write, both check, and a change that was archived needs no one's word any more.
    acknowledged(head + 1);
    for caller in [&mut here, &mut there] {
        caller.create_key(plain_key_request()).await.unwrap();
        caller.revoke_key(&old).await.unwrap();
        assert_eq!(caller.check_token(&token).await.unwrap(), pb::Reason::Ok);
    }
    there.revoke_key(&id).await.unwrap();
    assert_eq!(here.check_token(&token).await.unwrap(), pb::Reason::Revoked);
    let found = there.audit.verify(pb::VerifyAuditLogRequest::default()).await.unwrap().into_inner();
    let archived = found.checkpoint.as_ref().unwrap().revision;
    assert!(found.valid, "{found:?}");

    // One that has acknowledged little, and one that is just loading. Who commits says so with its next renewal.
    acknowledged(archived + 3);
    let row = |name: &str, applied: &str| {
        database.sql(&format!(
            "INSERT INTO keyward.replicas VALUES (uuid_send(gen_random_uuid()), '{name}', {applied}, 0, \
             (extract(epoch FROM clock_timestamp()) * 1000000)::bigint)"
        ));
    };
    row("lags", &(archived + 3).to_string());
    let told = good(archive(&one.home, &one.home.path("second.jsonl")));
    assert!(told.contains(&format!("2 entries, {} to {}", archived + 1, archived + 2)), "{told}");
    row("loads", "NULL");
    let refused = archive(&one.home, &one.home.path("third.jsonl"));
    let said = "the replica loads is loading";
    assert!(refused.code == Some(1) && refused.err.contains(said), "{refused:?}");
    let third = TestHome::with_database_url(database.url());
    let third = third.start_with(third.serve_command()).unwrap();
    assert_eq!(third.caller(&root_key).check_token(&token).await.unwrap(), pb::Reason::Revoked);
}
