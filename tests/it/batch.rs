//! AuthzService.BatchCheck, and how large requests may be.

use keyward::pb::{self, Reason};
use tonic::{Code, Status};

use crate::support::{Client, Server, authenticate, check, invalid, named_key, refused, service_key};

async fn batch(root: &Client, checks: Vec<pb::CheckRequest>) -> Result<Vec<pb::CheckResponse>, Status> {
    Ok(root.authz().batch_check(pb::BatchCheckRequest { checks }).await?.into_inner().results)
}

#[tokio::test(flavor = "multi_thread")]
async fn each_check_is_answered_in_its_place_as_if_it_were_alone() {
    let server = Server::with_accounts().await;
    let root = server.root();
    let live = server.make(named_key("acme", "live")).await;
    let revoked = server.make(named_key("acme", "revoked")).await;
    root.revoke(&revoked.id).await.unwrap();
    let staging = pb::CheckRequest { environment: "staging".into(), ..check(&live.token, "monitors:read") };
    let checks = vec![
        check(&live.token, "monitors:read"),
        check(&revoked.token, "monitors:read"),
        check("", "monitors:read"),
        check("sk-123", "monitors:read"),
        staging,
        check(&live.token, "monitors:write"),
        check(&live.token, "monitors:read"),
    ];
    let answers = batch(&root, checks.clone()).await.unwrap();
    let reasons: Vec<_> = answers.iter().map(pb::CheckResponse::reason).collect();
    let expected = [
        Reason::Ok,
        Reason::Revoked,
        Reason::Malformed,
        Reason::Unknown,
        Reason::WrongEnvironment,
        Reason::MissingScope,
        Reason::Ok,
    ];
    assert_eq!(reasons, expected);
    for (check, answer) in checks.into_iter().zip(answers) {
        assert_eq!(root.check(check).await.unwrap(), answer);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn there_are_1_to_100_checks() {
    let server = Server::with_accounts().await;
    let root = server.root();
    let made = server.make(service_key("acme", &["monitors:read"])).await;
    let many = |count| batch(&root, vec![check(&made.token, "monitors:read"); count]);
    let answers = many(100).await.unwrap();
    assert!(answers.len() == 100 && answers.iter().all(|answer| answer.allowed));
    assert_eq!(many(1).await.unwrap().len(), 1);
    for count in [0, 101] {
        let status = invalid(many(count).await, &["checks"]);
        assert!(status.message().contains("100"), "{status:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn violations_name_the_check_that_they_are_in() {
    let server = Server::with_accounts().await;
    let root = server.root();
    let made = server.make(service_key("acme", &["monitors:read"])).await;
    let mut checks = vec![check(&made.token, "monitors:read"); 6];
    checks[3].environment = "prod".into();
    checks[3].cost = Some(0);
    checks[5].scopes = vec!["a".into(), "*".into()];
    let wrong = ["checks[3].environment", "checks[3].cost", "checks[5].scopes[1]"];
    invalid(batch(&root, checks).await, &wrong);
    assert_eq!(root.get(&made.id).await.unwrap().last_used_at, None, "and none was answered");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_checks_of_a_batch_draw_on_one_budget_in_order() {
    let server = Server::with_accounts().await;
    let quota = Some(pb::Quota { limit: 2, period: pb::QuotaPeriod::Total.into() });
    let made = server.make(pb::CreateKeyRequest { quota, ..service_key("acme", &["a"]) }).await;
    let answers = batch(&server.root(), vec![authenticate(&made.token); 3]).await.unwrap();
    let allowed: Vec<_> = answers.iter().map(|answer| answer.allowed).collect();
    assert_eq!(allowed, [true, true, false]);
}

#[tokio::test(flavor = "multi_thread")]
async fn one_check_that_cannot_be_answered_fails_the_batch() {
    let server = Server::with_accounts().await;
    let made = server.make(service_key("acme", &["a"])).await;
    let fresh = pb::CheckRequest { min_revision: Some(made.revision + 1), ..authenticate(&made.token) };
    let answer = batch(&server.root(), vec![authenticate(&made.token), fresh]).await;
    refused(answer, Code::Unavailable, "STALE");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_account_caller_learns_nothing_of_others_by_a_batch_either() {
    let server = Server::with_accounts().await;
    let theirs = server.make(named_key("other", "CI")).await;
    let acme = server.caller("acme", &["keyward:check"]).await;
    let answers = batch(&acme, vec![authenticate(&theirs.token), authenticate("sk-123")]).await.unwrap();
    assert_eq!(answers[0], answers[1]);
}

/// A Check of exactly so many bytes on the wire.
fn sized(bytes: usize) -> pb::CheckRequest {
    use prost::Message as _;
    let mut check = authenticate(&"x".repeat(bytes));
    // A shorter token can have a shorter length before it.
    while check.encoded_len() > bytes {
        check.token.pop();
    }
    assert_eq!(check.encoded_len(), bytes);
    check
}

#[tokio::test(flavor = "multi_thread")]
async fn a_check_of_more_than_16_kib_is_refused_by_its_size() {
    let server = Server::start().await;
    let root = server.root();
    invalid(root.check(sized(16 * 1024)).await, &["token"]);
    let status = invalid(root.check(sized(16 * 1024 + 1)).await, &["(message)"]);
    assert!(status.message().contains("16384"), "{status:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_of_more_than_128_kib_is_refused_by_its_size() {
    let server = Server::start().await;
    let root = server.root();
    let status = invalid(batch(&root, vec![sized(15_000); 9]).await, &["(message)"]);
    assert!(status.message().contains("131072"), "{status:?}");
    let wrong: Vec<_> = (0..8).map(|at| format!("checks[{at}].token")).collect();
    let wrong: Vec<_> = wrong.iter().map(String::as_str).collect();
    invalid(batch(&root, vec![sized(15_000); 8]).await, &wrong);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_management_request_of_more_than_4_mib_is_refused_by_its_size() {
    let server = Server::start().await;
    let root = server.root();
    let prefix = |bytes: usize| pb::ListKeysRequest {
        account: "keyward".into(),
        name_prefix: "x".repeat(bytes),
        ..Default::default()
    };
    let status = invalid(root.list(prefix(4 * 1024 * 1024)).await, &["(message)"]);
    assert!(status.message().contains("4194304"), "{status:?}");
    let stranger = server.anonymous().list(prefix(4 * 1024 * 1024)).await;
    refused(stranger, Code::Unauthenticated, "UNAUTHENTICATED");
}
