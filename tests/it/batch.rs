//! AuthzService.BatchCheck, and how large requests may be.

use keyward::pb::{self, Reason};
use prost::Message as _;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use crate::support::{
    Client, Server, assert_invalid, assert_refused, authenticate_request, named_key_request, proto_seconds,
    scope_check_request, service_key_request,
};

async fn batch(root: &Client, checks: Vec<pb::CheckRequest>) -> Result<Vec<pb::CheckResponse>, Status> {
    Ok(root.authz().batch_check(pb::BatchCheckRequest { checks }).await?.into_inner().results)
}

#[tokio::test(flavor = "multi_thread")]
async fn each_check_is_answered_in_its_place_as_if_it_were_alone() {
    let server = Server::with_accounts().await;
    let root = server.root_client();
    let live = server.create_key(named_key_request("acme", "live")).await;
    let revoked = server.create_key(named_key_request("acme", "revoked")).await;
    root.revoke(&revoked.id).await.unwrap();
    let staging = pb::CheckRequest {
        environment: "staging".into(),
        ..scope_check_request(&live.token, "monitors:read")
    };
    let checks = vec![
        scope_check_request(&live.token, "monitors:read"),
        scope_check_request(&revoked.token, "monitors:read"),
        scope_check_request("", "monitors:read"),
        scope_check_request("sk-123", "monitors:read"),
        staging,
        scope_check_request(&live.token, "monitors:write"),
        scope_check_request(&live.token, "monitors:read"),
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
    let root = server.root_client();
    let made = server.create_key(service_key_request("acme", &["monitors:read"])).await;
    let many = |count| batch(&root, vec![scope_check_request(&made.token, "monitors:read"); count]);
    let answers = many(100).await.unwrap();
    assert!(answers.len() == 100 && answers.iter().all(|answer| answer.allowed));
    assert_eq!(many(1).await.unwrap().len(), 1);
    for count in [0, 101] {
        let status = assert_invalid(many(count).await, &["checks"]);
        assert!(status.message().contains("100"), "{status:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn violations_name_the_check_that_they_are_in() {
    let server = Server::with_accounts().await;
    let root = server.root_client();
    let made = server.create_key(service_key_request("acme", &["monitors:read"])).await;
    let mut checks = vec![scope_check_request(&made.token, "monitors:read"); 6];
    checks[3].environment = "prod".into();
    checks[3].cost = Some(0);
    checks[5].scopes = vec!["a".into(), "*".into()];
    let wrong = ["checks[3].environment", "checks[3].cost", "checks[5].scopes[1]"];
    assert_invalid(batch(&root, checks).await, &wrong);
    assert_eq!(root.get(&made.id).await.unwrap().last_used_at, None, "and none was answered");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_checks_of_a_batch_draw_on_one_budget_in_order() {
    let server = Server::with_accounts().await;
    let quota = Some(pb::Quota { limit: 2, period: pb::QuotaPeriod::Total.into() });
    let made = server.create_key(pb::CreateKeyRequest { quota, ..service_key_request("acme", &["a"]) }).await;
    let answers = batch(&server.root_client(), vec![authenticate_request(&made.token); 3]).await.unwrap();
    let allowed: Vec<_> = answers.iter().map(|answer| answer.allowed).collect();
    assert_eq!(allowed, [true, true, false]);
}

#[tokio::test(flavor = "multi_thread")]
async fn one_check_that_cannot_be_answered_fails_the_batch() {
    let server = Server::with_accounts().await;
    let made = server.create_key(service_key_request("acme", &["a"])).await;
    let fresh =
        pb::CheckRequest { min_revision: Some(made.revision + 1), ..authenticate_request(&made.token) };
    let answer = batch(&server.root_client(), vec![authenticate_request(&made.token), fresh]).await;
    assert_refused(answer, Code::Unavailable, "STALE");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_account_caller_learns_nothing_of_others_by_a_batch_either() {
    let server = Server::with_accounts().await;
    let theirs = server.create_key(named_key_request("other", "CI")).await;
    let acme = server.client_with_scopes("acme", &["keyward:check"]).await;
    let answers = batch(&acme, vec![authenticate_request(&theirs.token), authenticate_request("sk-123")])
        .await
        .unwrap();
    assert_eq!(answers[0], answers[1]);
}

/// The holder of a key that may check, with so many calls an hour, and a quota.
async fn limited(server: &Server, calls: u64, quota: Option<u64>) -> Client {
    let rate_limits =
        vec![pb::RateLimit { name: "calls".into(), limit: calls, window: Some(proto_seconds(3600)) }];
    let quota = quota.map(|limit| pb::Quota { limit, period: pb::QuotaPeriod::Day.into() });
    let request = pb::CreateKeyRequest {
        rate_limits,
        quota,
        ..service_key_request("acme", &["keyward:check", "keyward:keys:read"])
    };
    server.client_with_token(&server.create_key(request).await.token)
}

#[tokio::test(flavor = "multi_thread")]
async fn each_check_of_a_batch_is_charged_to_the_callers_limits_and_a_batch_that_does_not_fit_charges_nothing()
 {
    let server = Server::with_accounts().await;
    let live = server.create_key(named_key_request("acme", "live")).await;
    for quota in [None, Some(1000)] {
        let caller = limited(&server, 5, quota).await;
        let checks = |count| batch(&caller, vec![authenticate_request(&live.token); count]);
        assert_eq!(checks(3).await.unwrap().len(), 3);
        let status = assert_refused(checks(3).await, Code::ResourceExhausted, "CALLER_LIMITED");
        assert!(status.get_details_retry_info().is_some(), "{status:?}");
        assert_eq!(checks(2).await.unwrap().len(), 2, "nothing was charged for the refused batch");
        assert_refused(checks(1).await, Code::ResourceExhausted, "CALLER_LIMITED");
    }
    let caller = limited(&server, 1000, Some(5)).await;
    let checks = |count| batch(&caller, vec![authenticate_request(&live.token); count]);
    assert_eq!(checks(5).await.unwrap().len(), 5);
    assert_refused(checks(1).await, Code::ResourceExhausted, "CALLER_LIMITED");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_larger_than_its_callers_limit_is_refused_with_the_size_that_fits() {
    let server = Server::with_accounts().await;
    let live = server.create_key(named_key_request("acme", "live")).await;
    let caller = limited(&server, 5, None).await;
    let status = batch(&caller, vec![authenticate_request(&live.token); 6]).await;
    let status = assert_refused(status, Code::ResourceExhausted, "CALLER_LIMITED");
    assert_eq!(status.get_details_error_info().unwrap().metadata["limit"], "5");
    assert!(status.message().contains("smaller batches") && status.get_details_retry_info().is_none());
    assert_eq!(batch(&caller, vec![authenticate_request(&live.token); 5]).await.unwrap().len(), 5);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_that_is_wrong_is_charged_all_the_same() {
    let server = Server::with_accounts().await;
    let caller = limited(&server, 4, None).await;
    assert_invalid(
        batch(&caller, vec![pb::CheckRequest::default(); 2]).await,
        &["checks[0].environment", "checks[0].scopes", "checks[1].environment", "checks[1].scopes"],
    );
    assert_invalid(batch(&caller, vec![]).await, &["checks"]);
    caller.call_rpc("keyward.v1.AuthzService/BatchCheck", WrongTypeMessage { number: 1 }).await.unwrap_err();
    assert_refused(
        batch(&caller, vec![authenticate_request("x")]).await,
        Code::ResourceExhausted,
        "CALLER_LIMITED",
    );
}

/// A message whose first field is a number, where a batch has messages.
#[derive(Clone, PartialEq, prost::Message)]
struct WrongTypeMessage {
    #[prost(uint64, tag = "1")]
    number: u64,
}

/// Holds that a refusal has a size that clients take, and says how much it leaves out.
#[track_caller]
fn is_small(status: &Status) {
    let encoded: http::HeaderMap = status.clone().into_http::<()>().into_parts().0.headers;
    assert!(encoded["grpc-message"].len() <= 1024, "{status:?}");
    assert!(encoded["grpc-status-details-bin"].len() <= 8 * 1024, "{}", status.details().len());
    assert!(status.message().ends_with(" more violations"), "{status:?}");
    assert!(status.get_details_error_info().unwrap().metadata.contains_key("violations_omitted"));
    assert!(status.get_details_bad_request().unwrap().field_violations.len() >= 10);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_does_not_grow_with_what_was_wrong() {
    let server = Server::with_accounts().await;
    let root = server.root_client();
    let wrong =
        pb::CheckRequest { scopes: vec!["{ }".into(); 30], cost: Some(0), ..scope_check_request("", "") };
    is_small(&assert_refused(batch(&root, vec![wrong; 100]).await, Code::InvalidArgument, "INVALID_REQUEST"));
    let scopes: Vec<_> = (0..256).map(|at| format!("é {at}").repeat(20)).collect();
    let scopes: Vec<_> = scopes.iter().map(String::as_str).collect();
    let made = root.create(service_key_request("acme", &scopes)).await;
    is_small(&assert_refused(made, Code::InvalidArgument, "INVALID_REQUEST"));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_answer_of_a_batch_fits_a_client_and_leaves_out_grants_before_anything_else() {
    let server = Server::with_accounts().await;
    let root = server.root_client();
    let scopes: Vec<_> = (0..256).map(|at| format!("{at:03}{}", "x".repeat(120))).collect();
    let metadata = [("plan".to_owned(), "pro".to_owned())].into();
    let request = pb::CreateKeyRequest { scopes, metadata, ..service_key_request("acme", &["x"]) };
    let made = server.create_key(request).await;
    // Each asks for scopes of its own that it does not hold: what is missing is always told.
    let needed: Vec<_> = (0..10).map(|at| format!("{at}{}", "y".repeat(90))).collect();
    let asks = pb::CheckRequest {
        authenticate_only: false,
        scopes: needed.clone(),
        ..authenticate_request(&made.token)
    };
    let results = batch(&root, vec![asks.clone(); 100]).await.unwrap();
    let answer = pb::BatchCheckResponse { results };
    assert!(answer.encoded_len() <= 3 << 20, "{}", answer.encoded_len());
    let omitted = answer.results.iter().filter(|one| one.grants_omitted).count();
    assert!((30..60).contains(&omitted), "{omitted}");
    for one in &answer.results {
        assert_eq!((one.reason(), &one.missing_scopes), (Reason::MissingScope, &needed));
        assert_eq!((&one.key_id, one.scopes.is_empty()), (&made.id, one.grants_omitted));
        assert_eq!(one.metadata.is_empty(), one.grants_omitted);
    }
    let alone = root.check(asks).await.unwrap();
    assert!(!alone.grants_omitted && alone.scopes.len() == 256);
}

/// A Check of exactly so many bytes on the wire.
fn sized(bytes: usize) -> pb::CheckRequest {
    let mut check = authenticate_request(&"x".repeat(bytes));
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
    let root = server.root_client();
    assert_invalid(root.check(sized(16 * 1024)).await, &["token"]);
    let status = assert_invalid(root.check(sized(16 * 1024 + 1)).await, &["(message)"]);
    assert!(status.message().contains("16384"), "{status:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_of_more_than_128_kib_is_refused_by_its_size() {
    let server = Server::start().await;
    let root = server.root_client();
    let status = assert_invalid(batch(&root, vec![sized(15_000); 9]).await, &["(message)"]);
    assert!(status.message().contains("131072"), "{status:?}");
    let wrong: Vec<_> = (0..8).map(|at| format!("checks[{at}].token")).collect();
    let wrong: Vec<_> = wrong.iter().map(String::as_str).collect();
    assert_invalid(batch(&root, vec![sized(15_000); 8]).await, &wrong);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_management_request_of_more_than_4_mib_is_refused_by_its_size() {
    let server = Server::start().await;
    let root = server.root_client();
    let prefix = |bytes: usize| pb::ListKeysRequest {
        account: "keyward".into(),
        name_prefix: "x".repeat(bytes),
        ..Default::default()
    };
    let status = assert_invalid(root.list(prefix(4 * 1024 * 1024)).await, &["(message)"]);
    assert!(status.message().contains("4194304"), "{status:?}");
    let stranger = server.client_without_token().list(prefix(4 * 1024 * 1024)).await;
    assert_refused(stranger, Code::Unauthenticated, "UNAUTHENTICATED");
}
