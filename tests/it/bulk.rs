//! Many keys at once: Import takes in what was made elsewhere, BulkRevoke ends what must end together.

use sha2::{Digest as _, Sha256};
use tonic::{Code, Status};

use keyward::pb::{self, KeyState, Reason};

use crate::support::{
    Client, HOUR, Server, assert_invalid, assert_refused, authenticate_request, named_key_request,
    proto_seconds, scope_check_request, service_key_request, to_strings, user_key_request,
};

// ---- Import ----

/// A token as other systems make them.
fn foreign(number: usize) -> String {
    format!("sk-Legacy.{number:05}+dGhpcyBpcyBhIGxvbmcgc2VjcmV0/~==")
}

fn row(account: &str, token: &str) -> pb::ImportKey {
    pb::ImportKey {
        account: account.to_owned(),
        environment: "production".to_owned(),
        scopes: to_strings(&["monitors:read"]),
        sha256: Sha256::digest(token).to_vec(),
        hint: "sk-Legacy".to_owned(),
        ..Default::default()
    }
}

fn errors(results: &[pb::ImportResult]) -> Vec<&str> {
    results.iter().map(|result| result.error.as_str()).collect()
}

#[tokio::test]
async fn an_imported_foreign_token_checks_as_allowed() {
    let server = Server::with_accounts().await;
    let token = foreign(1);
    let results = server.root_client().import(vec![row("acme", &token)]).await.unwrap();
    let key = results[0].key.as_ref().unwrap();
    assert_eq!((key.hint.as_str(), key.account.as_str()), ("sk-Legacy", "acme"));
    let answer = server.root_client().check(scope_check_request(&token, "monitors:read")).await.unwrap();
    assert_eq!((answer.reason(), &answer.key_id), (Reason::Ok, &key.id));
    assert_eq!(server.root_client().check_reason(&foreign(2)).await, Reason::Unknown);
    assert_eq!(server.client_with_token(&token).who_am_i().await.unwrap().key.unwrap().id, key.id);
}

#[tokio::test]
async fn the_results_are_in_order_and_a_bad_row_stops_no_other() {
    let server = Server::with_accounts().await;
    server.create_key(named_key_request("acme", "taken")).await;
    let good = |number| row("acme", &foreign(number));
    let rows = vec![
        pb::ImportKey { name: Some("first".to_owned()), ..good(0) },
        pb::ImportKey { sha256: vec![0; 31], ..good(1) },
        pb::ImportKey { environment: "nowhere".to_owned(), scopes: to_strings(&["a b"]), ..good(2) },
        row("no-such-account", &foreign(3)),
        pb::ImportKey { name: Some("taken".to_owned()), ..good(4) },
        pb::ImportKey { roles: to_strings(&["boss"]), ..good(5) },
        pb::ImportKey { expires_at: Some(server.timestamp_after(0)), ..good(6) },
        pb::ImportKey { hint: "x".repeat(33), ..good(7) },
        pb::ImportKey { name: Some("last".to_owned()), ..good(8) },
    ];
    let results = server.root_client().import(rows).await.unwrap();
    let invalid = "INVALID_REQUEST";
    let expected =
        ["", invalid, invalid, "ACCOUNT_NOT_FOUND", "KEY_NAME_TAKEN", invalid, invalid, invalid, ""];
    assert_eq!(errors(&results), expected);
    for (at, field) in
        [(1, "sha256"), (2, "environment"), (2, "scopes[0]"), (5, "roles[0]"), (6, "expires_at")]
    {
        assert!(results[at].message.contains(&format!("{field}: ")), "{:?}", results[at]);
        assert_eq!(results[at].key, None);
    }
    let names = [0, 8].map(|at| results[at].key.as_ref().unwrap().name.clone());
    assert_eq!(names, ["first", "last"]);
    for (number, reason) in [(0, Reason::Ok), (4, Reason::Unknown), (8, Reason::Ok)] {
        assert_eq!(server.root_client().check_reason(&foreign(number)).await, reason);
    }
}

#[tokio::test]
async fn a_digest_is_unique_for_ever_whoever_owns_it() {
    let server = Server::with_accounts().await;
    let made = server.create_key(service_key_request("acme", &["monitors:read"])).await;
    let results =
        server.root_client().import(vec![row("acme", &foreign(1)), row("other", &foreign(1))]).await.unwrap();
    assert_eq!(errors(&results), ["", "DIGEST_TAKEN"], "within one call too");
    let imported = results[0].key.as_ref().unwrap();
    let named = |token| pb::ImportKey { name: Some("named".to_owned()), ..row("acme", token) };
    for token in [&foreign(1), &made.token] {
        let again = server.root_client().import(vec![named(token), row("other", token)]).await.unwrap();
        assert_eq!(errors(&again), ["DIGEST_TAKEN", "DIGEST_TAKEN"]);
    }
    let created = server.root_client().import(vec![row("acme", &made.token)]).await.unwrap();
    assert_eq!(errors(&created), ["DIGEST_TAKEN"], "nobody has imported it");
    server.root_client().revoke(&imported.id).await.unwrap();
    server.root_client().rotate(&made.id, 0).await.unwrap();
    for token in [&foreign(1), &made.token] {
        let again = server.root_client().import(vec![row("other", token)]).await.unwrap();
        assert_eq!(errors(&again), ["DIGEST_TAKEN"], "dead tokens do not come back to life");
    }
    assert_eq!(server.root_client().check_reason(&foreign(1)).await, Reason::Revoked);
    assert_eq!(server.root_client().check_reason(&made.token).await, Reason::Rotated);
}

#[tokio::test]
async fn an_import_that_the_same_caller_sends_again_is_answered_as_done_and_changes_nothing() {
    let server = Server::with_accounts().await;
    let rows = || {
        let row = |number| pb::ImportKey { ttl: Some(proto_seconds(HOUR)), ..row("acme", &foreign(number)) };
        (0..3).map(row).collect::<Vec<_>>()
    };
    let first = server.root_client().import(rows()).await.unwrap();
    assert!(first.iter().all(|result| result.error.is_empty() && !result.replayed));
    server.advance(10);
    let again = server.root_client().import(rows()).await.unwrap();
    assert!(again.iter().all(|result| result.error.is_empty() && result.replayed), "{again:?}");
    let keys = |results: &[pb::ImportResult]| {
        results.iter().map(|result| result.key.clone().unwrap().id).collect::<Vec<_>>()
    };
    assert_eq!(keys(&again), keys(&first));
    let request = pb::ListKeysRequest { account: "acme".to_owned(), ..Default::default() };
    assert_eq!(server.root_client().list(request).await.unwrap().keys.len(), 3);
}

#[tokio::test]
async fn an_import_by_another_caller_or_of_what_has_changed_since_is_not_done_before() {
    let server = Server::with_accounts().await;
    let rows = || (0..3).map(|number| row("acme", &foreign(number))).collect::<Vec<_>>();
    let first = server.root_client().import(rows()).await.unwrap();
    let id = |at: usize| first[at].key.as_ref().unwrap().id.clone();
    server.root_client().revoke(&id(0)).await.unwrap();
    server.root_client().disable(&id(1)).await.unwrap();
    let again = server.root_client().import(rows()).await.unwrap();
    assert_eq!(errors(&again), ["DIGEST_TAKEN", "DIGEST_TAKEN", ""]);
    let other = server.client_with_scopes("acme", &["keyward:keys:write", "monitors:read"]).await;
    let elsewhere = other.import(rows()).await.unwrap();
    assert_eq!(errors(&elsewhere), ["DIGEST_TAKEN"; 3]);
    assert!(elsewhere.iter().all(|result| result.key.is_none()));
}

#[tokio::test]
async fn a_thousand_rows_are_one_call_and_more_or_none_are_refused() {
    let server = Server::with_accounts().await;
    let rows = |count| (0..count).map(|number| row("acme", &foreign(number))).collect::<Vec<_>>();
    let results = server.root_client().import(rows(1000)).await.unwrap();
    assert_eq!(results.len(), 1000);
    assert!(results.iter().all(|result| result.error.is_empty()));
    for number in [0, 499, 999] {
        let answer = server.root_client().check(authenticate_request(&foreign(number))).await.unwrap();
        assert_eq!(answer.key_id, results[number].key.as_ref().unwrap().id, "row {number}");
    }
    for count in [0, 1001] {
        assert_invalid(server.root_client().import(rows(count)).await, &["keys"]);
    }
}

#[tokio::test]
async fn rows_beyond_what_the_caller_holds_are_refused_one_by_one() {
    let server = Server::with_accounts().await;
    let caller = server.client_with_scopes("acme", &["monitors:read", "keyward:keys:write"]).await;
    let good = |number| row("acme", &foreign(number));
    let rows = vec![
        pb::ImportKey { account: String::new(), ..good(0) },
        pb::ImportKey { scopes: to_strings(&["monitors:write"]), ..good(1) },
        pb::ImportKey { scopes: to_strings(&["all"]), ..good(2) },
        pb::ImportKey { scopes: to_strings(&["keyward:accounts:write"]), ..good(3) },
        pb::ImportKey { environment: "staging".to_owned(), ..good(4) },
        row("other", &foreign(5)),
        pb::ImportKey { account: String::new(), user: "ann".to_owned(), ..good(6) },
        good(7),
    ];
    let results = caller.import(rows).await.unwrap();
    let beyond = "GRANT_BEYOND_CALLER";
    let expected = ["", beyond, beyond, beyond, beyond, "ACCOUNT_NOT_FOUND", "KEY_NOT_FOUND", ""];
    assert_eq!(errors(&results), expected);
    for number in 1..7 {
        assert_eq!(server.root_client().check_reason(&foreign(number)).await, Reason::Unknown);
    }
}

#[tokio::test]
async fn a_user_key_is_imported_by_an_operator() {
    let server = Server::with_accounts().await;
    server.root_client().put_role("", "reader", &["monitors:read"]).await.unwrap();
    server.root_client().put_member("acme", "ann", "reader").await.unwrap();
    let imported = pb::ImportKey { account: String::new(), user: "ann".to_owned(), ..row("", &foreign(1)) };
    server.root_client().import(vec![imported]).await.unwrap();
    let account = Some("acme".to_owned());
    let asked = pb::CheckRequest { account, ..scope_check_request(&foreign(1), "monitors:read") };
    assert!(server.root_client().check(asked).await.unwrap().allowed);
}

#[tokio::test]
async fn an_imported_key_has_every_term_of_a_created_one() {
    let server = Server::with_accounts().await;
    let limits = vec![pb::RateLimit { name: "r".to_owned(), limit: 5, window: Some(proto_seconds(60)) }];
    let quota = Some(pb::Quota { limit: 9, period: pb::QuotaPeriod::Day.into() });
    let full = pb::ImportKey {
        name: Some("full".to_owned()),
        ttl: Some(proto_seconds(HOUR)),
        customers: to_strings(&["c1"]),
        allowed_cidrs: to_strings(&["10.0.0.0/8"]),
        rate_limits: limits.clone(),
        quota,
        metadata: [("team".to_owned(), "web".to_owned())].into(),
        ..row("acme", &foreign(1))
    };
    let id = server.root_client().import(vec![full]).await.unwrap().remove(0).key.unwrap().id;
    let key = server.root_client().get(&id).await.unwrap();
    assert_eq!((key.name.as_str(), key.expires_at), ("full", Some(server.timestamp_after(3600))));
    assert_eq!((&key.customers, &key.allowed_cidrs), (&to_strings(&["c1"]), &to_strings(&["10.0.0.0/8"])));
    assert_eq!((&key.rate_limits, key.quota, key.metadata["team"].as_str()), (&limits, quota, "web"));
}

#[tokio::test]
async fn a_token_that_is_known_to_be_weak_is_refused_and_so_is_a_strength_that_no_token_has() {
    let server = Server::with_accounts().await;
    let bits = [None, Some(0), Some(111), Some(112), Some(3355), Some(3356), Some(u32::MAX)];
    let rows = bits.iter().zip(1..);
    let rows =
        rows.map(|(bits, number)| pb::ImportKey { entropy_bits: *bits, ..row("acme", &foreign(number)) });
    let results = server.root_client().import(rows.collect()).await.unwrap();
    let wrong = "INVALID_REQUEST";
    assert_eq!(errors(&results), ["", wrong, wrong, "", "", wrong, wrong]);
    assert!(results[2].message.contains("entropy_bits: 111 is too few"), "{}", results[2].message);
    assert!(results[5].message.contains("entropy_bits: 3356 is more than a token"), "{}", results[5].message);
    for (bits, number) in bits.iter().zip(1..) {
        let good = bits.is_none_or(|bits| (112..=3355).contains(&bits));
        let expected = if good { Reason::Ok } else { Reason::Unknown };
        assert_eq!(server.root_client().check_reason(&foreign(number)).await, expected, "{bits:?}");
    }
}

#[tokio::test]
async fn an_imported_key_rotates_to_a_token_of_our_own() {
    let server = Server::with_accounts().await;
    let key =
        server.root_client().import(vec![row("acme", &foreign(1))]).await.unwrap().remove(0).key.unwrap();
    let rotated = server.root_client().rotate(&key.id, HOUR).await.unwrap();
    assert!(rotated.token.starts_with("kw_live_"));
    for token in [&foreign(1), &rotated.token] {
        assert_eq!(server.root_client().check_reason(token).await, Reason::Ok);
    }
    server.advance(HOUR);
    assert_eq!(server.root_client().check_reason(&foreign(1)).await, Reason::Rotated);
}

// ---- BulkRevoke ----

async fn bulk(
    client: &Client,
    request: pb::BulkRevokeKeysRequest,
) -> Result<pb::BulkRevokeKeysResponse, Status> {
    Ok(client.keys().bulk_revoke(request).await?.into_inner())
}

fn revoke_account_request(account: &str) -> pb::BulkRevokeKeysRequest {
    pb::BulkRevokeKeysRequest { account: account.to_owned(), ..Default::default() }
}

fn revoke_everywhere_request() -> pb::BulkRevokeKeysRequest {
    pb::BulkRevokeKeysRequest { all_accounts: true, ..Default::default() }
}

/// The names of the keys that were meant, sorted; every one of them was revoked, or would have been.
fn names(answer: &pb::BulkRevokeKeysResponse) -> Vec<&str> {
    assert!(answer.keys.iter().all(|result| result.revoked && result.error.is_empty()), "{answer:?}");
    let mut names: Vec<_> =
        answer.keys.iter().map(|result| result.key.as_ref().unwrap().name.as_str()).collect();
    names.sort_unstable();
    names
}

#[tokio::test]
async fn a_dry_run_says_what_would_be_revoked_and_revokes_nothing() {
    let server = Server::with_accounts().await;
    let [a, b] = [
        server.create_key(named_key_request("acme", "a")).await,
        server.create_key(named_key_request("acme", "b")).await,
    ];
    let dry = bulk(
        &server.root_client(),
        pb::BulkRevokeKeysRequest { dry_run: true, ..revoke_account_request("acme") },
    )
    .await
    .unwrap();
    assert_eq!(names(&dry), ["a", "b"]);
    for made in [&a, &b] {
        assert_eq!(server.root_client().check_reason(&made.token).await, Reason::Ok);
    }
    let real = bulk(&server.root_client(), revoke_account_request("acme")).await.unwrap();
    assert_eq!(names(&real), ["a", "b"]);
    for made in [&a, &b] {
        assert_eq!(server.root_client().check_reason(&made.token).await, Reason::Revoked);
    }
}

#[tokio::test]
async fn once_it_returns_every_key_is_refused_and_says_why() {
    let server = Server::with_accounts().await;
    let mut tokens = Vec::new();
    for _ in 0..30 {
        tokens.push(server.create_key(service_key_request("acme", &["monitors:read"])).await.token);
    }
    let request = pb::BulkRevokeKeysRequest {
        reason: pb::RevokeReason::Compromised.into(),
        comment: "leaked backup".to_owned(),
        ..revoke_account_request("acme")
    };
    let answer = bulk(&server.root_client(), request).await.unwrap();
    assert!(answer.propagation.unwrap().complete && !answer.more);
    let mut newest = 0;
    for result in &answer.keys {
        let key = result.key.as_ref().unwrap();
        let told = (key.state(), key.revoke_reason(), key.revoke_comment.as_str());
        assert_eq!(told, (KeyState::Revoked, pb::RevokeReason::Compromised, "leaked backup"));
        newest = newest.max(key.revision);
    }
    assert_eq!((answer.keys.len(), answer.revision), (30, newest));
    for token in tokens {
        assert_eq!(server.root_client().check_reason(&token).await, Reason::Revoked);
    }
}

#[tokio::test]
async fn it_is_narrowed_by_environment_age_and_name_together() {
    let server = Server::with_accounts().await;
    let staging =
        |name| pb::CreateKeyRequest { environment: "staging".to_owned(), ..named_key_request("acme", name) };
    server.create_key(named_key_request("acme", "ci-old")).await;
    server.create_key(staging("ci-old-staging")).await;
    server.advance(60);
    let middle = server.timestamp_after(0);
    server.create_key(named_key_request("acme", "ci-new")).await;
    server.create_key(named_key_request("acme", "web")).await;
    server.create_key(named_key_request("acme", "CI-upper")).await;
    let root = &server.root_client();
    let dry = |request: pb::BulkRevokeKeysRequest| async move {
        bulk(root, pb::BulkRevokeKeysRequest { dry_run: true, ..request }).await.unwrap()
    };
    let environment = "staging".to_owned();
    let by_environment =
        dry(pb::BulkRevokeKeysRequest { environment, ..revoke_account_request("acme") }).await;
    assert_eq!(names(&by_environment), ["ci-old-staging"]);
    let created_before = Some(middle);
    let by_age = dry(pb::BulkRevokeKeysRequest { created_before, ..revoke_account_request("acme") }).await;
    assert_eq!(names(&by_age), ["ci-old", "ci-old-staging"], "before, not at");
    let name_prefix = "ci-".to_owned();
    let by_name =
        dry(pb::BulkRevokeKeysRequest { name_prefix: name_prefix.clone(), ..revoke_account_request("acme") })
            .await;
    assert_eq!(names(&by_name), ["ci-new", "ci-old", "ci-old-staging"]);
    let environment = "production".to_owned();
    let all = pb::BulkRevokeKeysRequest {
        environment,
        created_before,
        name_prefix,
        ..revoke_account_request("acme")
    };
    assert_eq!(names(&bulk(root, all).await.unwrap()), ["ci-old"]);
}

#[tokio::test]
async fn disabled_and_expired_keys_are_meant_too_and_revoked_ones_are_not() {
    let server = Server::with_accounts().await;
    let root = server.root_client();
    let disabled = server.create_key(named_key_request("acme", "disabled")).await;
    root.disable(&disabled.id).await.unwrap();
    let ttl = Some(proto_seconds(HOUR));
    server.create_key(pb::CreateKeyRequest { ttl, ..named_key_request("acme", "expired") }).await;
    let revoked = server.create_key(named_key_request("acme", "revoked")).await;
    root.revoke(&revoked.id).await.unwrap();
    server.advance(HOUR);
    assert_eq!(names(&bulk(&root, revoke_account_request("acme")).await.unwrap()), ["disabled", "expired"]);
    let again = bulk(&root, revoke_account_request("acme")).await.unwrap();
    assert_eq!((again.keys.len(), again.more), (0, false));
}

#[tokio::test]
async fn an_account_is_revoked_without_touching_others_or_its_members_keys() {
    let server = Server::with_accounts().await;
    server.root_client().put_role("", "reader", &["monitors:read"]).await.unwrap();
    server.root_client().put_member("acme", "ann", "reader").await.unwrap();
    server.create_key(named_key_request("acme", "one")).await;
    let others = server.create_key(named_key_request("other", "two")).await;
    let anns = server.create_key(user_key_request("ann", &["all"])).await;
    assert_eq!(names(&bulk(&server.root_client(), revoke_account_request("acme")).await.unwrap()), ["one"]);
    assert_eq!(server.root_client().check_reason(&others.token).await, Reason::Ok);
    assert_eq!(server.root_client().get(&anns.id).await.unwrap().state(), KeyState::Active);
}

#[tokio::test]
async fn a_users_keys_are_revoked_everywhere() {
    let server = Server::with_accounts().await;
    let named = |user, name: &str| pb::CreateKeyRequest {
        name: Some(name.to_owned()),
        ..user_key_request(user, &["all"])
    };
    server.create_key(named("ann", "laptop")).await;
    server.create_key(named("ann", "phone")).await;
    let bobs = server.create_key(named("bob", "laptop")).await;
    let of_ann = pb::BulkRevokeKeysRequest { user: "ann".to_owned(), ..Default::default() };
    assert_eq!(names(&bulk(&server.root_client(), of_ann).await.unwrap()), ["laptop", "phone"]);
    assert_eq!(server.root_client().get(&bobs.id).await.unwrap().state(), KeyState::Active);
}

#[tokio::test]
async fn all_accounts_leaves_the_operators_own_keys_alone() {
    let server = Server::with_accounts().await;
    let operators = server.create_key(named_key_request("keyward", "dashboard")).await;
    server.create_key(named_key_request("acme", "one")).await;
    server.create_key(named_key_request("other", "two")).await;
    let name = Some("three".to_owned());
    server.create_key(pb::CreateKeyRequest { name, ..user_key_request("ann", &["all"]) }).await;
    let answer = bulk(&server.root_client(), revoke_everywhere_request()).await.unwrap();
    assert_eq!(names(&answer), ["one", "three", "two"], "user keys are keys of accounts too");
    assert_eq!(server.root_client().check_reason(&operators.token).await, Reason::Ok);
    assert_eq!(bulk(&server.root_client(), revoke_everywhere_request()).await.unwrap().keys, []);
}

#[tokio::test]
async fn exactly_one_of_account_user_and_all_accounts_is_needed() {
    let server = Server::with_accounts().await;
    let root = server.root_client();
    let (account, user) = ("acme".to_owned(), "ann".to_owned());
    let wrong = [
        pb::BulkRevokeKeysRequest::default(),
        pb::BulkRevokeKeysRequest { user: user.clone(), ..revoke_account_request("acme") },
        pb::BulkRevokeKeysRequest { all_accounts: true, ..revoke_account_request("acme") },
        pb::BulkRevokeKeysRequest { user: user.clone(), ..revoke_everywhere_request() },
        pb::BulkRevokeKeysRequest { account, user, ..revoke_everywhere_request() },
    ];
    for request in wrong {
        assert_invalid(bulk(&root, request).await, &["account"]);
    }
}

#[tokio::test]
async fn a_wrong_filter_revokes_nothing_and_names_its_fields() {
    let server = Server::with_accounts().await;
    let made = server.create_key(named_key_request("acme", "one")).await;
    let root = server.root_client();
    let wrong = pb::BulkRevokeKeysRequest {
        environment: "nowhere".to_owned(),
        created_before: Some(prost_types::Timestamp { seconds: i64::MAX, nanos: 0 }),
        reason: 99,
        comment: "x".repeat(1025),
        ..revoke_account_request("acme")
    };
    assert_invalid(bulk(&root, wrong).await, &["environment", "created_before", "reason", "comment"]);
    assert_refused(bulk(&root, revoke_account_request("nowhere")).await, Code::NotFound, "ACCOUNT_NOT_FOUND");
    assert_eq!(root.check_reason(&made.token).await, Reason::Ok);
}

#[tokio::test]
async fn an_accounts_caller_revokes_in_bulk_in_its_own_account_alone() {
    let server = Server::with_accounts().await;
    let others = server.create_key(named_key_request("other", "two")).await;
    let caller = server.client_with_scopes("acme", &["keyward:keys:write"]).await;
    server.create_key(named_key_request("acme", "one")).await;
    assert_refused(bulk(&caller, revoke_account_request("other")).await, Code::NotFound, "ACCOUNT_NOT_FOUND");
    assert_refused(bulk(&caller, revoke_everywhere_request()).await, Code::PermissionDenied, "OPERATOR_ONLY");
    let of_ann = pb::BulkRevokeKeysRequest { user: "ann".to_owned(), ..Default::default() };
    assert_refused(bulk(&caller, of_ann).await, Code::NotFound, "KEY_NOT_FOUND");
    assert_eq!(server.root_client().check_reason(&others.token).await, Reason::Ok);
    let answer = bulk(&caller, revoke_account_request("acme")).await.unwrap();
    assert_eq!(names(&answer), ["", "one"], "its own key among them");
    assert_refused(
        bulk(&caller, revoke_account_request("acme")).await,
        Code::Unauthenticated,
        "UNAUTHENTICATED",
    );
}

#[tokio::test]
async fn a_person_revokes_in_bulk_only_with_a_role_that_may() {
    let server = Server::with_accounts().await;
    server.root_client().put_role("", "reader", &["monitors:read"]).await.unwrap();
    server.root_client().put_role("", "admin", &["keyward:keys:write"]).await.unwrap();
    server.root_client().put_member("acme", "rob", "reader").await.unwrap();
    server.root_client().put_member("acme", "ann", "admin").await.unwrap();
    server.create_key(named_key_request("acme", "one")).await;
    let acting = |user| server.root_client().with_header("x-keyward-acting-user", user);
    assert_refused(
        bulk(&acting("rob"), revoke_account_request("acme")).await,
        Code::PermissionDenied,
        "ROLE_LACKS_PERMISSION",
    );
    assert_eq!(names(&bulk(&acting("ann"), revoke_account_request("acme")).await.unwrap()), ["one"]);
}

#[tokio::test]
async fn a_person_does_not_revoke_in_accounts_that_are_not_theirs() {
    let server = Server::with_accounts().await;
    server.root_client().put_role("", "admin", &["keyward:keys:write"]).await.unwrap();
    server.root_client().put_member("acme", "ann", "admin").await.unwrap();
    let [mine, others] = [
        server.create_key(named_key_request("acme", "one")).await,
        server.create_key(named_key_request("other", "two")).await,
    ];
    let ann = server.root_client().with_header("x-keyward-acting-user", "ann");
    bulk(&ann, revoke_everywhere_request()).await.expect_err("a person is no operator");
    for made in [mine, others] {
        assert_eq!(server.root_client().check_reason(&made.token).await, Reason::Ok);
    }
}

/// The caller's own key is the newest, and so on the first page; a page ends by its bytes.
#[tokio::test(flavor = "multi_thread")]
async fn a_caller_revokes_its_own_key_in_bulk_when_no_other_is_left() {
    let server = Server::with_accounts().await;
    let import = |number: u32| pb::ImportKey {
        account: "acme".to_owned(),
        environment: "production".to_owned(),
        scopes: to_strings(&["monitors:read"]),
        sha256: [&number.to_be_bytes()[..], &[7; 28]].concat(),
        metadata: [("note".to_owned(), "n".repeat(3000))].into(),
        ..Default::default()
    };
    server.root_client().import((0..1000).map(import).collect()).await.unwrap();
    let own = server.client_with_scopes("acme", &["keyward:keys:write", "keyward:keys:read"]).await;
    let first = bulk(&own, revoke_account_request("acme")).await.unwrap();
    assert!(first.more && first.keys.len() < 1000, "{}", first.keys.len());
    let last = bulk(&own, revoke_account_request("acme")).await.unwrap();
    assert!(!last.more && last.keys.iter().all(|key| key.revoked));
    assert_eq!(first.keys.len() + last.keys.len(), 1001);
    assert_refused(
        bulk(&own, revoke_account_request("acme")).await,
        Code::Unauthenticated,
        "UNAUTHENTICATED",
    );
}
