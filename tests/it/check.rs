//! AuthzService.Check: one row for each reason, what an answer carries, how fresh it is, and what cannot be asked.

use std::{collections::BTreeMap, time::Duration};

use keyward::pb::{self, Reason};
use tonic::Code;

use crate::support::{
    Client, CreatedKey, DAY, Server, assert_invalid, assert_refused, authenticate_request, error_reason,
    named_key_request, proto_seconds, scope_check_request, service_key_request, to_strings, user_key_request,
};

/// A key of `acme` with one of each restriction, and a Check that satisfies them all.
fn restricted() -> pb::CreateKeyRequest {
    pb::CreateKeyRequest {
        scopes: to_strings(&["monitors:read", "alerts:*"]),
        customers: to_strings(&["c1"]),
        allowed_cidrs: to_strings(&["10.0.0.0/8", "2001:db8::/32"]),
        rate_limits: vec![pb::RateLimit { name: "fast".into(), limit: 2, window: Some(proto_seconds(60)) }],
        quota: Some(pb::Quota { limit: 3, period: pb::QuotaPeriod::Total.into() }),
        ttl: Some(proto_seconds(DAY)),
        ..named_key_request("acme", "restricted")
    }
}

fn allowed(token: &str) -> pb::CheckRequest {
    pb::CheckRequest {
        scopes: to_strings(&["monitors:read", "alerts:write"]),
        account: Some("acme".into()),
        customer: Some("c1".into()),
        client_ip: Some("10.1.2.3".into()),
        ..scope_check_request(token, "monitors:read")
    }
}

/// One server for a row: the key as `restricted` makes it.
async fn row() -> (Server, Client, CreatedKey) {
    let server = Server::with_accounts().await;
    let (root, made) = (server.root_client(), server.create_key(restricted()).await);
    (server, root, made)
}

/// Holds that a Check is denied for these reasons: an answer, not an error.
async fn denied(root: &Client, request: pb::CheckRequest, failures: &[Reason]) -> pb::CheckResponse {
    let answer = root.check(request).await.expect("a denial is an answer");
    assert_eq!(answer.failures().collect::<Vec<_>>(), failures);
    assert_eq!((answer.allowed, answer.reason()), (false, failures[0]));
    assert!(!answer.message.is_empty());
    answer
}

#[tokio::test(flavor = "multi_thread")]
async fn what_satisfies_every_condition_is_allowed() {
    let (_server, root, made) = row().await;
    let answer = root.check(allowed(&made.token)).await.unwrap();
    assert!(answer.allowed && answer.reason() == Reason::Ok && answer.failures.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_string_that_cannot_be_a_token_is_malformed() {
    let (_server, root, made) = row().await;
    let mut typo = made.token.clone();
    let last = typo.pop().unwrap();
    typo.push(if last == '0' { '1' } else { '0' });
    for token in ["", " ", "with space", "é", "tab\t", &typo] {
        let answer = denied(&root, allowed(token), &[Reason::Malformed]).await;
        assert_eq!(answer.key_id, "", "{token:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_string_that_may_be_a_token_of_anyones_making_is_unknown() {
    let (_server, root, made) = row().await;
    let truncated = &made.token[..made.token.len() - 1];
    let long = "x".repeat(512);
    for token in ["sk-1234567890", "a", "kw_live_x", truncated, &made.token.to_uppercase(), &long] {
        denied(&root, allowed(token), &[Reason::Unknown]).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revoked_key_is_refused() {
    let (_server, root, made) = row().await;
    root.revoke(&made.id).await.unwrap();
    denied(&root, allowed(&made.token), &[Reason::Revoked]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disabled_key_is_refused() {
    let (_server, root, made) = row().await;
    root.disable(&made.id).await.unwrap();
    denied(&root, allowed(&made.token), &[Reason::Disabled]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_expired_key_is_refused() {
    let (server, root, made) = row().await;
    server.advance(DAY);
    denied(&root, allowed(&made.token), &[Reason::Expired]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_superseded_token_is_refused() {
    let (_server, root, made) = row().await;
    root.rotate(&made.id, 0).await.unwrap();
    denied(&root, allowed(&made.token), &[Reason::Rotated]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn another_environment_is_refused() {
    let (_server, root, made) = row().await;
    let request = pb::CheckRequest { environment: "staging".into(), ..allowed(&made.token) };
    let answer = denied(&root, request, &[Reason::WrongEnvironment]).await;
    assert_eq!(answer.environment, "production", "the key's own");
}

#[tokio::test(flavor = "multi_thread")]
async fn another_account_is_refused_and_an_absent_one_is_told() {
    let (_server, root, made) = row().await;
    for account in ["other", "nowhere"] {
        let request = pb::CheckRequest { account: Some(account.into()), ..allowed(&made.token) };
        denied(&root, request, &[Reason::WrongAccount]).await;
    }
    let answer = root.check(pb::CheckRequest { account: None, ..allowed(&made.token) }).await.unwrap();
    assert_eq!((answer.allowed, answer.account.as_str()), (true, "acme"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_suspended_account_is_refused_until_it_is_resumed() {
    let (_server, root, made) = row().await;
    root.suspend("acme").await.unwrap();
    denied(&root, allowed(&made.token), &[Reason::AccountSuspended]).await;
    root.resume("acme").await.unwrap();
    assert!(root.check(allowed(&made.token)).await.unwrap().allowed);
}

#[tokio::test(flavor = "multi_thread")]
async fn another_customer_or_none_is_refused_where_the_key_has_customers() {
    let (_server, root, made) = row().await;
    for customer in [None, Some("c2".to_owned()), Some("C1".to_owned())] {
        let request = pb::CheckRequest { customer, ..allowed(&made.token) };
        denied(&root, request, &[Reason::WrongCustomer]).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_address_outside_the_networks_or_none_is_refused_where_the_key_has_networks() {
    let (_server, root, made) = row().await;
    for client_ip in [None, Some("11.0.0.1"), Some("::1"), Some("::ffff:11.0.0.1"), Some("2001:db9::1")] {
        let client_ip = client_ip.map(str::to_owned);
        let request = pb::CheckRequest { client_ip, dry_run: true, ..allowed(&made.token) };
        denied(&root, request, &[Reason::AddressNotAllowed]).await;
    }
    for client_ip in ["10.255.255.255", "::ffff:10.0.0.1", "2001:db8:1::1"] {
        let client_ip = Some(client_ip.to_owned());
        let request = pb::CheckRequest { client_ip, dry_run: true, ..allowed(&made.token) };
        assert!(root.check(request).await.unwrap().allowed);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_scope_that_is_not_granted_is_refused_and_named() {
    let (_server, root, made) = row().await;
    let scopes = to_strings(&["monitors:read", "monitors:write", "alerts:a:b", "alerts", "Monitors:read"]);
    let request = pb::CheckRequest { scopes, ..allowed(&made.token) };
    let answer = denied(&root, request, &[Reason::MissingScope]).await;
    assert_eq!(answer.missing_scopes, ["monitors:write", "alerts", "Monitors:read"]);
    assert!(answer.message.contains("monitors:write"), "{}", answer.message);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_used_up_rate_limit_is_refused_until_there_is_room() {
    let (server, root, made) = row().await;
    for _ in 0..2 {
        assert!(root.check(allowed(&made.token)).await.unwrap().allowed);
    }
    let answer = denied(&root, allowed(&made.token), &[Reason::RateLimited]).await;
    assert_eq!(answer.retry_after, Some(proto_seconds(30)));
    server.advance(30);
    assert!(root.check(allowed(&made.token)).await.unwrap().allowed);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_used_up_quota_is_refused() {
    let (server, root, made) = row().await;
    for _ in 0..3 {
        server.advance(60);
        assert!(root.check(allowed(&made.token)).await.unwrap().allowed);
    }
    server.advance(60);
    let answer = denied(&root, allowed(&made.token), &[Reason::QuotaExceeded]).await;
    assert_eq!(answer.retry_after, None, "a total is never filled again");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_condition_that_fails_is_told_in_order_and_of_a_revoked_key_that_alone() {
    let (server, root, made) = row().await;
    root.rotate(&made.id, 0).await.unwrap();
    root.disable(&made.id).await.unwrap();
    root.suspend("acme").await.unwrap();
    server.advance(DAY);
    let request = pb::CheckRequest {
        environment: "staging".into(),
        account: Some("other".into()),
        customer: Some("c2".into()),
        client_ip: Some("1.1.1.1".into()),
        ..scope_check_request(&made.token, "billing:read")
    };
    let all = [
        Reason::Disabled,
        Reason::Expired,
        Reason::Rotated,
        Reason::WrongEnvironment,
        Reason::WrongAccount,
        Reason::AccountSuspended,
        Reason::WrongCustomer,
        Reason::AddressNotAllowed,
        Reason::MissingScope,
    ];
    denied(&root, request.clone(), &all).await;
    root.revoke(&made.id).await.unwrap();
    let answer = denied(&root, request, &[Reason::Revoked]).await;
    assert_eq!(
        (answer.key_id, answer.account, answer.environment),
        (made.id, "acme".into(), "production".into())
    );
    assert!(answer.key_name.is_empty() && answer.scopes.is_empty() && answer.missing_scopes.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_says_whose_key_it_is_and_what_it_holds() {
    let server = Server::with_accounts().await;
    let root = server.root_client();
    let metadata = BTreeMap::from([("team".to_owned(), "core".to_owned())]);
    let request = pb::CreateKeyRequest {
        metadata: metadata.clone(),
        ttl: Some(proto_seconds(60)),
        ..named_key_request("acme", "CI")
    };
    let made = server.create_key(request).await;
    let answer = root.check(scope_check_request(&made.token, "monitors:read")).await.unwrap();
    let expected = pb::CheckResponse {
        allowed: true,
        reason: Reason::Ok.into(),
        message: "allowed".into(),
        key_id: made.id.clone(),
        key_name: "CI".into(),
        account: "acme".into(),
        environment: "production".into(),
        scopes: to_strings(&["monitors:read"]),
        secret_version: 1,
        metadata,
        expires_at: Some(server.timestamp_after(60)),
        revision: made.revision,
        staleness: Some(proto_seconds(0)),
        max_age: Some(proto_seconds(0)),
        ..Default::default()
    };
    assert_eq!(answer, expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_token_is_answered_with_nothing_but_that() {
    let server = Server::with_accounts().await;
    let answer = server.root_client().check(scope_check_request("sk-123", "monitors:read")).await.unwrap();
    let expected = pb::CheckResponse {
        reason: Reason::Unknown.into(),
        failures: vec![Reason::Unknown.into()],
        message: answer.message.clone(),
        revision: answer.revision,
        staleness: Some(proto_seconds(0)),
        max_age: Some(proto_seconds(0)),
        ..Default::default()
    };
    assert_eq!(answer, expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn to_an_account_caller_another_accounts_token_is_unknown() {
    let server = Server::with_accounts().await;
    let made = server.create_key(named_key_request("other", "CI")).await;
    let acme = server.client_with_scopes("acme", &["keyward:check"]).await;
    let theirs = acme.check(scope_check_request(&made.token, "monitors:read")).await.unwrap();
    let nobodys = acme.check(scope_check_request("sk-123", "monitors:read")).await.unwrap();
    assert_eq!(theirs, nobodys, "not a trace of it");
    let root = server.root_client().check(scope_check_request(&made.token, "monitors:read")).await.unwrap();
    assert!(root.allowed);
    let other = server.client_with_scopes("other", &["keyward:check"]).await;
    assert!(other.check(scope_check_request(&made.token, "monitors:read")).await.unwrap().allowed);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_key_must_be_asked_for_an_account_of_its_user() {
    let server = Server::with_accounts().await;
    let root = server.root_client();
    root.put_role("acme", "agent", &["monitors:read"]).await.unwrap();
    root.put_member("acme", "ann", "agent").await.unwrap();
    let made = server.create_key(user_key_request("ann", &["all"])).await;
    let ask = |account: Option<&str>| pb::CheckRequest {
        account: account.map(str::to_owned),
        ..scope_check_request(&made.token, "monitors:read")
    };
    denied(&root, ask(None), &[Reason::WrongAccount, Reason::MissingScope]).await;
    denied(&root, ask(Some("other")), &[Reason::WrongAccount, Reason::MissingScope]).await;
    let answer = root.check(ask(Some("acme"))).await.unwrap();
    assert_eq!((answer.allowed, answer.user.as_str(), answer.account.as_str()), (true, "ann", "acme"));
    assert_eq!(answer.scopes, ["monitors:read"], "what both the key and the role grant");
}

#[tokio::test(flavor = "multi_thread")]
async fn no_answer_comes_from_a_state_older_than_asked_for() {
    let server = Server::with_accounts().await;
    let made = server.create_key(named_key_request("acme", "CI")).await;
    let ask = |revision| pb::CheckRequest {
        min_revision: Some(revision),
        ..scope_check_request(&made.token, "monitors:read")
    };
    let current = server.root_client().check(ask(made.revision)).await.unwrap();
    assert!(current.allowed && current.revision >= made.revision);
    assert_refused(server.root_client().check(ask(made.revision + 1)).await, Code::Unavailable, "STALE");
    assert_refused(server.root_client().check(ask(u64::MAX)).await, Code::Unavailable, "STALE");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_check_after_an_answered_change_sees_it_every_time() {
    let server = Server::with_accounts().await;
    let root = server.root_client();
    for round in 0..100 {
        let made = server.create_key(service_key_request("acme", &["monitors:read"])).await;
        let answer = root.check(scope_check_request(&made.token, "monitors:read")).await.unwrap();
        assert!(answer.allowed && answer.revision >= made.revision, "round {round}: created");
        let revoked = root.revoke(&made.id).await.unwrap();
        let answer = root.check(scope_check_request(&made.token, "monitors:read")).await.unwrap();
        assert_eq!(answer.reason(), Reason::Revoked, "round {round}: revoked");
        assert!(answer.revision >= revoked.revision, "round {round}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn concurrent_checkers_never_see_a_revoked_key_alive() {
    let server = Server::with_accounts().await;
    let workers: Vec<_> = (0..8)
        .map(|_| {
            let root = server.root_client();
            tokio::spawn(async move {
                for _ in 0..15 {
                    let made = root.create_key(service_key_request("acme", &["monitors:read"])).await;
                    assert_eq!(root.check_reason(&made.token).await, Reason::Ok);
                    root.disable(&made.id).await.unwrap();
                    assert_eq!(root.check_reason(&made.token).await, Reason::Disabled);
                    root.enable(&made.id).await.unwrap();
                    assert_eq!(root.check_reason(&made.token).await, Reason::Ok);
                    root.revoke(&made.id).await.unwrap();
                    assert_eq!(root.check_reason(&made.token).await, Reason::Revoked);
                }
            })
        })
        .collect();
    for worker in workers {
        worker.await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_check_that_asks_nothing_decidable_is_an_error() {
    let server = Server::with_accounts().await;
    let root = server.root_client();
    let good = scope_check_request("sk-123", "monitors:read");
    let ask = |change: fn(&mut pb::CheckRequest)| {
        let mut request = good.clone();
        change(&mut request);
        let root = root.clone();
        async move { root.check(request).await }
    };
    assert_invalid(ask(|r| r.environment = String::new()).await, &["environment"]);
    let status = assert_invalid(ask(|r| r.environment = "prod".into()).await, &["environment"]);
    assert!(status.message().contains("production, staging, development"), "{status:?}");
    assert_invalid(ask(|r| r.scopes.clear()).await, &["scopes"]);
    assert_invalid(
        ask(|r| r.scopes = to_strings(&["a", "monitors:*", "*", "a b"])).await,
        &["scopes[1]", "scopes[2]", "scopes[3]"],
    );
    assert_invalid(ask(|r| r.scopes = vec!["a".into(); 65]).await, &["scopes"]);
    assert_invalid(ask(|r| r.account = Some(String::new())).await, &["account"]);
    assert_invalid(ask(|r| r.customer = Some(String::new())).await, &["customer"]);
    assert_invalid(ask(|r| r.client_ip = Some("10.0.0.0/8".into())).await, &["client_ip"]);
    assert_invalid(ask(|r| r.cost = Some(0)).await, &["cost"]);
    assert_invalid(ask(|r| r.cost = Some(1_000_001)).await, &["cost"]);
    assert_invalid(ask(|r| r.token = "x".repeat(513)).await, &["token"]);
    let all = ask(|r| {
        *r = pb::CheckRequest {
            token: "x".repeat(513),
            client_ip: Some("here".into()),
            cost: Some(0),
            account: Some("a.b".into()),
            ..Default::default()
        };
    });
    assert_invalid(all.await, &["token", "environment", "scopes", "account", "client_ip", "cost"]);
    assert!(ask(|r| r.token = "x".repeat(512)).await.is_ok());
    assert!(ask(|r| r.scopes = vec!["a".into(); 64]).await.is_ok());
    assert!(ask(|r| r.cost = Some(1_000_000)).await.is_ok());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wildcard_grants_what_lies_under_it_and_never_what_is_reserved() {
    let server = Server::with_accounts().await;
    let root = server.root_client();
    let made = server.create_key(service_key_request("acme", &["all"])).await;
    for (scope, granted) in
        [("monitors:read", true), ("a:b:c:d", true), ("keyward:check", false), ("keyward", false)]
    {
        assert_eq!(
            root.check(scope_check_request(&made.token, scope)).await.unwrap().allowed,
            granted,
            "{scope}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_check_consumes_its_cost_and_a_dry_run_nothing() {
    let server = Server::with_accounts().await;
    let root = server.root_client();
    let quota = Some(pb::Quota { limit: 10, period: pb::QuotaPeriod::Total.into() });
    let made = server
        .create_key(pb::CreateKeyRequest { quota, ..service_key_request("acme", &["monitors:read"]) })
        .await;
    let ask =
        |cost, dry_run| pb::CheckRequest { cost: Some(cost), dry_run, ..authenticate_request(&made.token) };
    let left = |answer: &pb::CheckResponse| answer.rate_limits[0].remaining;
    let answer = root.check(ask(4, false)).await.unwrap();
    assert_eq!((answer.rate_limits[0].name.as_str(), left(&answer)), ("quota", 6));
    assert!(root.check(ask(6, true)).await.unwrap().allowed);
    assert!(!root.check(ask(7, false)).await.unwrap().allowed, "a denied Check consumes nothing either");
    assert!(root.check(ask(6, false)).await.unwrap().allowed);
    assert_eq!(root.check(ask(1, true)).await.unwrap().reason(), Reason::QuotaExceeded);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_denied_check_takes_nothing_from_the_limits() {
    let (_server, root, made) = row().await;
    for _ in 0..10 {
        let elsewhere = pb::CheckRequest { customer: None, ..allowed(&made.token) };
        denied(&root, elsewhere, &[Reason::WrongCustomer]).await;
    }
    assert_eq!(root.check(allowed(&made.token)).await.unwrap().rate_limits[0].remaining, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn superseded_and_revoked_tokens_are_told_apart_across_time() {
    let server = Server::with_accounts().await;
    let root = server.root_client();
    let made = server.create_key(named_key_request("acme", "CI")).await;
    root.rotate(&made.id, 0).await.unwrap();
    server.advance_by(Duration::from_secs(80 * DAY));
    assert_eq!(root.check_reason(&made.token).await, Reason::Rotated);
    root.revoke(&made.id).await.unwrap();
    assert_eq!(root.check_reason(&made.token).await, Reason::Revoked);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_callers_own_trouble_is_an_error_and_never_a_verdict() {
    let server = Server::with_accounts().await;
    let made = server.create_key(named_key_request("acme", "CI")).await;
    let ask = || scope_check_request(&made.token, "monitors:read");
    assert_refused(
        server.client_without_token().check(ask()).await,
        Code::Unauthenticated,
        "UNAUTHENTICATED",
    );
    let without = server.client_with_token(&made.token).check(ask()).await;
    let status = assert_refused(without, Code::PermissionDenied, "PERMISSION_MISSING");
    assert!(status.message().contains("keyward:check") && error_reason(&status) == "PERMISSION_MISSING");
}
