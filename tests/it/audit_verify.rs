//! AuditService.Verify: what was changed behind Keyward's back is found, in the log and in the tables; and what List tells
//! of how a change came about.

use keyward::pb;
use tonic::Code;

use sha2::Digest as _;

use crate::support::{Client, assert_invalid, assert_refused, named_key_request, service_key_request};

use super::Server;

async fn newest(caller: &Client) -> pb::AuditEntry {
    let request = pb::ListAuditEntriesRequest { page_size: Some(1), ..Default::default() };
    caller.list_audit_entries(request).await.unwrap().entries.remove(0)
}

fn changes(entry: &pb::AuditEntry) -> Vec<(&str, &str, &str)> {
    let changes = entry.changes.iter().map(|one| (&*one.field, &*one.before, &*one.after));
    changes.filter(|(field, ..)| *field != "updated_at").collect()
}

/// A server with a little of everything; the key's id.
async fn populated_server() -> (Server, String) {
    let server = Server::with_accounts().await;
    let root = server.root_client();
    let made = server.create_key(named_key_request("acme", "CI")).await;
    root.disable(&made.id).await.unwrap();
    root.enable(&made.id).await.unwrap();
    root.rotate(&made.id, 60).await.unwrap();
    root.put_role("acme", "agent", &["monitors:read"]).await.unwrap();
    root.put_member("acme", "ann", "agent").await.unwrap();
    root.put_member("acme", "ben", "agent").await.unwrap();
    let gone = pb::RemoveMemberRequest { account: "acme".into(), user: "ben".into() };
    root.accounts().remove_member(gone).await.unwrap();
    (server, made.id)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_nobody_touched_is_whole_and_the_tables_agree() {
    let (server, _) = populated_server().await;
    let found = server.root_client().verify_audit_log().await;
    let head = newest(&server.root_client()).await;
    assert!(found.valid, "{found:?}");
    assert_eq!((found.head, &found.head_hash, found.broken_at), (head.revision, &head.hash, 0));
    assert_eq!((found.entries, found.first_revision, found.last_revision), (head.revision, 1, head.revision));
    // Three accounts, two keys, a role, a member.
    assert!(found.records >= 7 && found.mismatches.is_empty(), "{found:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_entry_that_was_changed_or_taken_out_is_found() {
    for (touch, at, said) in [
        ("UPDATE log SET payload = replace(payload, 'CI', 'CD') WHERE revision = 5", 5, "it was changed"),
        ("UPDATE log SET actor = 'system' WHERE revision = 6", 6, "it was changed"),
        ("DELETE FROM log WHERE revision = 7", 7, "is missing; the next one there is 8"),
        ("UPDATE log SET acting_user = 'NOT A USER\n' WHERE revision = 4", 4, "cannot be read"),
        ("DELETE FROM log WHERE revision > 9", 10, "should continue to"),
        (
            "UPDATE meta SET head_hash = (SELECT hash FROM log WHERE revision = 2)",
            0,
            "the head that the database states",
        ),
    ] {
        let (server, _) = populated_server().await;
        let head = newest(&server.root_client()).await.revision;
        server.sql(touch);
        let found = server.root_client().verify_audit_log().await;
        let at = if at == 0 { head } else { at };
        assert!(!found.valid && found.broken_at == at && found.problem.contains(said), "{touch}: {found:?}");
    }
}

/// A member's row with the checksum that it should have: an attacker can make one too.
fn planted_member(user: &str) -> String {
    let text = |text: &str| [&(text.len() as u64).to_be_bytes()[..], text.as_bytes()].concat();
    let revision = [8u64.to_be_bytes(), 3i64.to_be_bytes()].concat();
    let sum = crc32fast::hash(&[text("acme"), text(user), text("agent"), revision].concat());
    format!("INSERT INTO members VALUES ('acme', '{user}', 'agent', 3, {sum})")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_was_put_back_taken_out_or_planted_is_found() {
    let (server, id) = populated_server().await;
    let root = server.root_client();
    server.sql("CREATE TABLE saved AS SELECT * FROM keys");
    root.revoke(&id).await.unwrap();
    server.sql(
        "UPDATE keys SET revoked_at = NULL, revoke_reason = NULL, revoke_comment = NULL, \
         updated_at = (SELECT updated_at FROM saved WHERE saved.id = keys.id), \
         revision = (SELECT revision FROM saved WHERE saved.id = keys.id), \
         sum = (SELECT sum FROM saved WHERE saved.id = keys.id); DELETE FROM members WHERE user_id = 'ann'",
    );
    server.sql(&planted_member("eve"));
    let found = root.verify_audit_log().await;
    assert!(!found.valid && found.broken_at == 0, "{found:?}");
    let told: Vec<_> = found.mismatches.iter().map(|one| (&*one.record, &*one.problem)).collect();
    let expected = [
        (format!("key {id}"), "an older state"),
        ("member ann of account acme".to_owned(), "the tables do not"),
        ("member eve of account acme".to_owned(), "the log has no entry"),
    ];
    assert_eq!(told.len(), expected.len(), "{told:?}");
    for ((record, said), (found, problem)) in expected.iter().zip(told) {
        assert!(record == found && problem.contains(said), "{found}: {problem}");
    }
}

/// The bytes that a row's checksum is made of.
fn checksum_of(columns: &[RowColumn<'_>]) -> u32 {
    let bytes = columns.iter().flat_map(|column| match column {
        RowColumn::Bytes(bytes) => [&(bytes.len() as u64).to_be_bytes()[..], bytes].concat(),
        RowColumn::Int(number) => [8u64.to_be_bytes(), number.to_be_bytes()].concat(),
        RowColumn::Null => u64::MAX.to_be_bytes().to_vec(),
    });
    crc32fast::hash(&bytes.collect::<Vec<_>>())
}

enum RowColumn<'a> {
    Bytes(&'a [u8]),
    Int(i64),
    Null,
}

/// Statements that plant a key without a name beside one, with its revision. Its id is the start of that one's digest, and
/// the digest of its secret the hash of the log's head.
fn planted_twin(token: &str, revision: u64, head_hash: &[u8]) -> (String, String) {
    use RowColumn::{Bytes, Int, Null};
    let digest = sha2::Sha256::digest(token.as_bytes());
    let (id, revision) = (&digest[..16], i64::try_from(revision).unwrap());
    let text = |text: &'static str| Bytes(text.as_bytes());
    let key = checksum_of(&[
        Bytes(id),
        text("acme"),
        Null,
        text("production"),
        Null,
        text("monitors:read"),
        text(""),
        Null,
        text(""),
        text(""),
        Null,
        Null,
        Null,
        Int(7),
        text("system"),
        Int(7),
        Null,
        Null,
        Null,
        Null,
        Int(revision),
    ]);
    let secret = checksum_of(&[Bytes(head_hash), Bytes(id), Int(1), text("kw_live_0000"), Int(7), Null]);
    let hint = &token[..12];
    let sql = format!(
        "INSERT INTO keys (id, account, environment, scopes, roles, customers, allowed_cidrs, created_at, created_by, \
         updated_at, revision, sum) SELECT substr(digest, 1, 16), 'acme', 'production', 'monitors:read', '', '', '', 7, \
         'system', 7, {revision}, {key} FROM secrets WHERE hint = '{hint}'; \
         INSERT INTO secrets (digest, key_id, version, hint, created_at, sum) SELECT (SELECT head_hash FROM meta), \
         substr(digest, 1, 16), 1, 'kw_live_0000', 7, {secret} FROM secrets WHERE hint = '{hint}'"
    );
    (uuid::Uuid::from_slice(id).unwrap().to_string(), sql)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_planted_key_with_the_revision_of_another_is_found() {
    let (server, _) = populated_server().await;
    let root = server.root_client();
    for _ in 0..4 {
        let made = server.create_key(service_key_request("acme", &["monitors:read"])).await;
        let head_hash = root.verify_audit_log().await.head_hash;
        let (twin, sql) = planted_twin(&made.token, made.key.revision, &head_hash);
        server.sql(&sql);
        let found = root.verify_audit_log().await;
        let told: Vec<_> =
            found.mismatches.iter().map(|one| (&*one.record, one.revision, &*one.problem)).collect();
        let said = "the tables have it, and the log has no entry about it";
        assert!(told.contains(&(&*format!("key {twin}"), made.key.revision, said)), "{told:?}");
        assert!(told.iter().all(|one| one.0 != format!("key {}", made.id)), "{told:?}");
        assert!(!found.valid && found.broken_at == 0, "{found:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_whose_row_contradicts_itself_is_found_once() {
    let (server, id) = populated_server().await;
    server.sql("UPDATE keys SET created_by = 'evil' WHERE name = 'CI'");
    let found = server.root_client().verify_audit_log().await;
    let told: Vec<_> = found.mismatches.iter().map(|one| (&*one.record, &*one.problem)).collect();
    assert!(!found.valid && told.len() == 1 && told[0].0 == format!("key {id}"), "{told:?}");
    assert!(told[0].1.contains("checksum"), "{told:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_extra_secret_that_contradicts_itself_is_found() {
    let (server, id) = populated_server().await;
    for version in [0, 9] {
        server.sql(&format!(
            "DELETE FROM secrets WHERE sum = 0; INSERT INTO secrets (digest, key_id, version, hint, created_at, sum) \
             SELECT (SELECT head_hash FROM meta), id, {version}, 'x', 7, 0 FROM keys WHERE name = 'CI'"
        ));
        let found = server.root_client().verify_audit_log().await;
        let told: Vec<_> = found.mismatches.iter().map(|one| (&*one.record, &*one.problem)).collect();
        assert!(!found.valid && told.len() == 1 && told[0].0 == format!("key {id}"), "{told:?}");
        assert!(told[0].1.contains("checksum"), "{told:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_secret_that_belongs_to_no_key_is_found() {
    let (server, _) = populated_server().await;
    let planted = |start: u8, length: u8| {
        format!(
            "INSERT INTO secrets (digest, key_id, version, hint, created_at, sum) \
             SELECT substr(head_hash, {start}, 20), substr(head_hash, {start}, {length}), 1, 'x', 7, 0 FROM meta"
        )
    };
    server.sql_without_foreign_key(&format!("{}; {}", planted(1, 16), planted(2, 5)));
    let found = server.root_client().verify_audit_log().await;
    let told: Vec<_> = found.mismatches.iter().map(|one| (&*one.record, &*one.problem)).collect();
    assert!(!found.valid && told.len() == 2, "{told:?}");
    assert!(
        told.iter().all(|one| one.0.starts_with("secret of key ") && one.1.contains("no key")),
        "{told:?}"
    );
    assert!(told.iter().any(|one| one.0.ends_with("(5 bytes instead of 16)")), "{told:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_role_account_or_member_is_a_mismatch_and_the_rest_is_verified() {
    for (damage, record) in [
        ("UPDATE roles SET scopes = 'x' WHERE name = 'agent'", "role agent of account acme"),
        ("UPDATE accounts SET name = 'x' WHERE id = 'acme'", "account acme"),
        ("UPDATE members SET role = 'x' WHERE user_id = 'ann'", "member ann of account acme"),
    ] {
        let (server, id) = populated_server().await;
        server.sql(damage);
        server.sql("UPDATE keys SET created_by = 'evil' WHERE name = 'CI'");
        let found = server.root_client().verify_audit_log().await;
        let told: Vec<_> = found.mismatches.iter().map(|one| (&*one.record, &*one.problem)).collect();
        let records: Vec<_> = told.iter().map(|one| one.0.to_owned()).collect();
        assert!(told.iter().all(|one| one.1.contains("checksum")), "{told:?}");
        let mut expected = [record.to_owned(), format!("key {id}")];
        expected.sort_unstable();
        assert_eq!(records, expected, "{damage}: {told:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_head_that_is_known_from_elsewhere_is_held_against_the_chain() {
    let (server, _) = populated_server().await;
    let root = server.root_client();
    let known = newest(&root).await;
    root.put_role("", "other", &["a"]).await.unwrap();
    let ask = async |expect_revision, expect_hash: &[u8]| {
        let request = pb::VerifyAuditLogRequest {
            expect_revision: Some(expect_revision),
            expect_hash: expect_hash.to_vec(),
            ..Default::default()
        };
        let answer = root.audit().verify(request).await.unwrap().into_inner();
        (answer.valid, answer.expected())
    };
    assert_eq!(ask(known.revision, &known.hash).await, (true, pb::ExpectedEntry::Found));
    assert_eq!(ask(known.revision, &[0; 32]).await, (false, pb::ExpectedEntry::Differs));
    assert_eq!(ask(known.revision + 9, &known.hash).await, (false, pb::ExpectedEntry::Lost));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_part_can_be_verified_and_a_question_must_make_sense() {
    let (server, _) = populated_server().await;
    let root = server.root_client();
    let ask = async |request| root.audit().verify(request).await.map(tonic::Response::into_inner);
    let part = pb::VerifyAuditLogRequest { from_revision: 3, to_revision: Some(5), ..Default::default() };
    let found = ask(part).await.unwrap();
    assert_eq!((found.valid, found.entries, found.first_revision, found.last_revision), (true, 3, 3, 5));
    let beyond = pb::VerifyAuditLogRequest { from_revision: 99, to_revision: Some(99), ..Default::default() };
    assert_invalid(ask(beyond).await, &["from_revision", "to_revision"]);
    let short = pb::VerifyAuditLogRequest { expect_revision: Some(1), ..Default::default() };
    assert_invalid(ask(short).await, &["expect_hash"]);
    let reader = server.client_with_scopes("acme", &["keyward:audit:read"]).await;
    let asked = reader.audit().verify(pb::VerifyAuditLogRequest::default()).await;
    assert_refused(asked, Code::PermissionDenied, "OPERATOR_ONLY");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_entry_tells_what_was_changed_before_and_after() {
    let server = Server::with_accounts().await;
    let root = server.root_client();
    root.put_role("acme", "agent", &["a"]).await.unwrap();
    let made = newest(&root).await;
    assert_eq!(made.previous_revision, Some(0));
    assert!(changes(&made).contains(&("name", "", r#""agent""#)), "{made:?}");
    root.put_role("acme", "agent", &["a", "b"]).await.unwrap();
    let put = newest(&root).await;
    assert_eq!(put.previous_revision, Some(made.revision));
    assert_eq!(changes(&put), [("scopes", r#"["a"]"#, r#"["a","b"]"#)]);

    let key = server.create_key(named_key_request("acme", "CI")).await;
    root.update(&pb::Key { name: "CD".into(), ..key.key.clone() }, &["name"]).await.unwrap();
    assert_eq!(changes(&newest(&root).await), [("name", r#""CI""#, r#""CD""#)]);
    root.rotate(&key.id, 60).await.unwrap();
    let rotated = newest(&root).await;
    assert_eq!(changes(&rotated)[0].0, "secrets");
    assert!(!format!("{:?}", rotated.changes).contains("digest"), "{rotated:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_entry_names_the_call_to_whom_that_concerns() {
    let server = Server::with_accounts().await;
    server.root_client().put_role("acme", "reader", &["a", "keyward:accounts:write"]).await.unwrap();
    server.root_client().put_member("acme", "ann", "reader").await.unwrap();
    let root =
        server.root_client().with_header("x-request-id", "r-17").with_header("x-keyward-acting-user", "ann");
    root.put_role("acme", "agent", &["a"]).await.unwrap();
    let seen = newest(&server.root_client()).await;
    assert_eq!((&*seen.request_id, &*seen.peer, &*seen.acting_user), ("r-17", "127.0.0.1", "ann"));
    let reader = server.client_with_scopes("acme", &["keyward:audit:read"]).await;
    let request = pb::ListAuditEntriesRequest { action: "role.put".into(), ..Default::default() };
    let seen = reader.list_audit_entries(request).await.unwrap().entries.remove(0);
    assert_eq!(
        (&*seen.request_id, &*seen.peer),
        ("", ""),
        "an account does not learn where its operator works"
    );
    let by_ann = pb::ListAuditEntriesRequest { acting_user: "ann".into(), ..Default::default() };
    assert_eq!(server.root_client().list_audit_entries(by_ann).await.unwrap().entries.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn entries_as_they_were_hashed_are_for_operators() {
    let (server, _) = populated_server().await;
    let request = pb::ListAuditEntriesRequest { full: true, oldest_first: true, ..Default::default() };
    let entries = server.root_client().list_audit_entries(request.clone()).await.unwrap().entries;
    assert!(entries.iter().all(|entry| !entry.payload.is_empty()));
    assert!(entries.windows(2).all(|pair| pair[1].prev_hash == pair[0].hash), "the oldest first");
    let reader = server.client_with_scopes("acme", &["keyward:audit:read"]).await;
    assert_refused(reader.list_audit_entries(request).await, Code::PermissionDenied, "OPERATOR_ONLY");
}
