//! `envoy.service.auth.v3.Authorization` over the wire: where a route's needs come from, what each finding becomes, and what
//! the service behind sees.

use std::time::Duration;

use keyward::{
    config::server::Settings,
    domain::route::Mode,
    engine::limiter::{OnFailure, Prefix, RedisSettings, RedisUrl, Time},
    pb::{self, envoy::service::auth::v3::CheckResponse, envoy_request::CheckRequest},
};
use tonic::Status;

use crate::{
    ext_authz_client::{Ask, FORBIDDEN, Headers, UNAUTHORIZED, ask, configured, with_key, with_rules},
    support::{Made, Server, seconds, service_key, texts, user_key},
};

#[tokio::test(flavor = "multi_thread")]
async fn a_proxy_cannot_tell_the_short_way_from_the_long_one() {
    let server = Server::with_accounts().await;
    let made = server.make(service_key("acme", &["monitors:read"])).await;
    let revoked = server.make(service_key("acme", &["monitors:read"])).await;
    server.root().revoke(&revoked.id).await.unwrap();
    let short = server.anonymous();
    // Of those who show no key nobody reads it; and so their calls go the long way.
    let long = short.with_header("x-keyward-account", "acme");
    let asks = [
        Ask::monitors().bearer(&made.token),
        Ask::monitors().bearer(&made.token).header("x-request-id", "seven").path("/v1/monitors?api_key=1"),
        Ask::monitors().bearer(&revoked.token),
        Ask::monitors().bearer("nobody's"),
        Ask::monitors(),
        Ask::route(&[("scope", "monitors:write"), ("environment", "production")]).bearer(&made.token),
        Ask::route(&[("environment", "nowhere")]).bearer(&made.token),
        Ask::route(&[("public", "true")]),
        Ask::get("/v1//monitors").bearer(&made.token),
        Ask::get("/none").bearer(&made.token),
    ];
    let told = |answer: Result<CheckResponse, Status>| {
        answer.map_err(|status| (status.code(), status.message().to_owned(), status.details().to_vec()))
    };
    let (mut passed, mut refused) = (0, 0);
    for message in asks.map(Ask::message).into_iter().chain([CheckRequest::default()]) {
        let answer = told(ask(&short, message.clone()).await);
        assert_eq!(answer, told(ask(&long, message).await));
        match answer.is_ok_and(|answer| answer.status.is_some_and(|status| status.code == 0)) {
            true => passed += 1,
            false => refused += 1,
        }
    }
    assert!(passed >= 3 && refused >= 5, "{passed} {refused}");
}

#[tokio::test]
async fn a_key_passes_and_the_service_learns_whose_it_is() {
    let (server, made) = with_key().await;
    let passed = Ask::monitors().bearer(&made.token).passes(&server).await;
    let wanted = [
        ("x-keyward-account", "acme"),
        ("x-keyward-environment", "production"),
        ("x-keyward-key-id", &made.id),
        ("x-keyward-scopes", "monitors:read"),
    ];
    let wanted: Headers = wanted.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
    assert_eq!(passed.upstream, wanted);
    assert!(passed.removed.contains(&"authorization".to_owned()), "the credential is hidden");
    assert_eq!((&*passed.metadata["key_id"], &*passed.metadata["reason"]), (&*made.id, "ok"));
    assert_eq!((&*passed.metadata["allowed"], &*passed.metadata["account"]), ("true", "acme"));
    let used = server.root().check(crate::support::check(&made.token, "monitors:read")).await.unwrap();
    assert!(used.allowed, "one decision for both services");
}

#[tokio::test]
async fn an_unusable_key_hears_one_word_and_401() {
    let (server, made) = with_key().await;
    let disabled = server.make(service_key("acme", &["monitors:read"])).await;
    server.root().disable(&disabled.id).await.unwrap();
    let staging = server
        .make(pb::CreateKeyRequest { environment: "staging".into(), ..service_key("acme", &["*"]) })
        .await;
    let revoked = server.make(service_key("acme", &["monitors:read"])).await;
    server.root().revoke(&revoked.id).await.unwrap();
    let rotated = server.make(service_key("acme", &["monitors:read"])).await;
    server.root().rotate(&rotated.id, 0).await.unwrap();
    let short = pb::CreateKeyRequest { ttl: Some(seconds(1)), ..service_key("acme", &["monitors:read"]) };
    let expired = server.make(short).await;
    server.advance(2);
    let typo = format!("{}x", &made.token[..made.token.len() - 1]);
    for (token, reason) in [
        (&*typo, "malformed"),
        ("imported-elsewhere", "unknown"),
        (&*revoked.token, "revoked"),
        (&*disabled.token, "disabled"),
        (&*expired.token, "expired"),
        (&*rotated.token, "rotated"),
        (&*staging.token, "wrong_environment"),
    ] {
        let refused = Ask::monitors().bearer(token).refused(&server).await;
        assert_eq!(
            (refused.status, refused.code, refused.body.as_str()),
            (401, 16, UNAUTHORIZED),
            "{reason}"
        );
        assert_eq!(refused.reason(), reason);
        assert_eq!(refused.headers["www-authenticate"], r#"Bearer realm="keyward", error="invalid_token""#);
        assert_eq!(refused.headers["content-type"], "application/json");
        assert!(!refused.fault && !refused.headers.contains_key("x-keyward-reason"));
    }
    let other = Ask::monitors().saying("account", "other").bearer(&made.token).refused(&server).await;
    assert_eq!((other.status, other.reason()), (401, "wrong_account"));
}

#[tokio::test]
async fn a_request_without_a_credential_is_told_to_bring_one() {
    let (server, made) = with_key().await;
    let none = Ask::monitors().refused(&server).await;
    assert_eq!((none.status, none.reason(), none.body.as_str()), (401, "no_credential", UNAUTHORIZED));
    assert_eq!(none.headers["www-authenticate"], r#"Bearer realm="keyward""#);
    let many = Ask::monitors().bearer(&made.token).header("x-api-key", "another").refused(&server).await;
    assert_eq!((many.status, many.reason()), (401, "many_credentials"));
    let joined = format!("Bearer {0},Bearer {0}", made.token);
    let joined = Ask::monitors().header("authorization", joined).refused(&server).await;
    assert_eq!(joined.reason(), "many_credentials");
    let passed = Ask::monitors().header("x-api-key", &made.token).passes(&server).await;
    assert!(
        passed.removed.contains(&"x-api-key".to_owned()) && !passed.removed.contains(&"authorization".into())
    );
}

#[tokio::test]
async fn a_usable_key_without_the_right_hears_403() {
    let (server, made) = with_key().await;
    let bound = pb::CreateKeyRequest {
        customers: texts(&["c1"]),
        allowed_cidrs: texts(&["10.0.0.0/8"]),
        ..service_key("acme", &["monitors:read"])
    };
    let bound = server.make(bound).await;
    let ask = Ask::monitors().saying("customer_header", "X-Customer").bearer(&bound.token);
    let mut inside = ask.clone().header("x-customer", "c1");
    inside.peer = "10.1.2.3";
    inside.clone().passes(&server).await;
    let mut elsewhere = inside.clone();
    elsewhere.peer = "192.0.2.1";
    for (ask, reason) in [
        (
            Ask::route(&[("scope", "alerts:read"), ("environment", "production")]).bearer(&made.token),
            "missing_scope",
        ),
        (Ask { peer: "10.1.2.3", ..ask }, "wrong_customer"),
        (elsewhere, "address_not_allowed"),
    ] {
        let refused = ask.refused(&server).await;
        assert_eq!((refused.status, refused.code, refused.body.as_str()), (403, 7, FORBIDDEN), "{reason}");
        assert_eq!(refused.reason(), reason);
        let challenge = refused.headers.get("www-authenticate").map(String::as_str);
        let wanted = r#"Bearer realm="keyward", error="insufficient_scope", scope="alerts:read""#;
        assert_eq!(challenge, (reason == "missing_scope").then_some(wanted));
    }
    server.root().suspend("acme").await.unwrap();
    let suspended = Ask::monitors().bearer(&made.token).refused(&server).await;
    assert_eq!((suspended.status, suspended.reason()), (403, "account_suspended"));
}

fn limited(limit: u64) -> pb::CreateKeyRequest {
    let limit = pb::RateLimit { name: "burst".to_owned(), limit, window: Some(seconds(60)) };
    let quota = pb::Quota { limit: 5, period: pb::QuotaPeriod::Day.into() };
    pb::CreateKeyRequest {
        rate_limits: vec![limit],
        quota: Some(quota),
        ..service_key("acme", &["monitors:read"])
    }
}

#[tokio::test]
async fn a_limited_key_is_told_how_it_stands_and_hears_429() {
    let (server, _) = with_key().await;
    let made = server.make(limited(3)).await;
    let ask = |id: &str| Ask::monitors().saying("cost", "2").bearer(&made.token).id(id);
    let passed = ask("1").passes(&server).await;
    assert_eq!(passed.response["ratelimit-policy"], r#""burst";q=3;w=60, "quota";q=5;w=86400"#);
    assert_eq!(passed.response["ratelimit"], r#""burst";r=1;t=40, "quota";r=3;t=86400"#);
    assert_eq!(passed.metadata["cost"], "2");
    let refused = ask("2").refused(&server).await;
    assert_eq!((refused.status, refused.code, refused.reason()), (429, 8, "rate_limited"));
    assert_eq!(refused.headers["retry-after"], "20");
    assert_eq!(refused.headers["ratelimit"], r#""burst";r=1;t=40, "quota";r=3;t=86400"#);
    assert!(refused.body.contains(r#""code":"RATE_LIMITED""#), "{}", refused.body);
    server.advance(60);
    ask("3").passes(&server).await;
    server.advance(60);
    let refused = ask("4").refused(&server).await;
    assert_eq!((refused.status, refused.reason()), (429, "quota_exceeded"));
}

#[tokio::test]
async fn what_envoy_asks_again_is_charged_once() {
    let (server, _) = with_key().await;
    let made = server.make(limited(3)).await;
    for _ in 0..5 {
        let passed = Ask::monitors().bearer(&made.token).id("17290").passes(&server).await;
        assert_eq!(passed.response["ratelimit"], r#""burst";r=2;t=20, "quota";r=4;t=86400"#);
    }
    let other = Ask::monitors().bearer(&made.token).id("17291").passes(&server).await;
    assert_eq!(other.response["ratelimit"], r#""burst";r=1;t=40, "quota";r=3;t=86400"#);
}

#[tokio::test]
async fn grpc_calls_get_the_code_that_their_clients_understand() {
    let (server, _) = with_key().await;
    let made = server.make(limited(1)).await;
    let ask = |id: &str| Ask::monitors().header("content-type", "application/grpc+proto").id(id);
    ask("1").bearer(&made.token).passes(&server).await;
    let limited = ask("2").bearer(&made.token).refused(&server).await;
    assert_eq!((limited.headers["grpc-status"].as_str(), limited.body.as_str()), ("8", "Too many requests"));
    let odd = ask("3").path("/a//b").bearer(&made.token).refused(&server).await;
    assert_eq!(odd.headers["grpc-status"], "3");
    let none = ask("4").refused(&server).await;
    assert_eq!(none.body, "Invalid or missing API key");
    assert!(!none.headers.contains_key("grpc-status"), "Envoy knows the code for 401");
}

#[tokio::test]
async fn what_the_route_says_comes_before_the_rules() {
    let rules = r#"
        [defaults]
        hosts = ["*"]
        methods = ["*"]
        environment = "production"
        [[rule]]
        path = "/v1/accounts/{account}/monitors"
        scope = "monitors:read"
        account = "{account}"
        [[rule]]
        path = "/v1/monitors"
        scope = "rules:read"
        [[rule]]
        path = "/open/**"
        public = true
    "#;
    let (server, _folder) = with_rules(rules).await;
    let acme = server.make(service_key("acme", &["monitors:read"])).await;
    let ruled = server.make(service_key("acme", &["rules:read"])).await;

    Ask::get("/v1/monitors").bearer(&ruled.token).passes(&server).await;
    Ask::get("/v1/monitors").host("API.test:443").bearer(&ruled.token).passes(&server).await;
    let refused = Ask::get("/v1/monitors").bearer(&acme.token).refused(&server).await;
    assert_eq!(refused.reason(), "missing_scope", "the rule decides");
    Ask::route(&[("scope", "monitors:read")]).bearer(&acme.token).passes(&server).await;
    let refused = Ask::route(&[("environment", "staging")]).bearer(&ruled.token).refused(&server).await;
    assert_eq!(
        refused.reason(),
        "wrong_environment",
        "what a rule leaves unsaid the route says, before the default"
    );

    Ask::get("/v1/accounts/acme/monitors").bearer(&acme.token).passes(&server).await;
    let other = Ask::get("/v1/accounts/other/monitors").bearer(&acme.token).refused(&server).await;
    assert_eq!((other.status, other.reason()), (401, "wrong_account"));
    let odd = Ask::get("/v1/accounts/n.o/monitors").bearer(&acme.token).refused(&server).await;
    assert_eq!((odd.status, odd.reason()), (400, "bad_request"));

    Ask::get("/open/a/b").passes(&server).await;
    for ask in
        [Ask::get("/v2").bearer(&acme.token), Ask::get("/v2"), Ask::route(&[("scop", "a:read")]).path("/v2")]
    {
        let refused = ask.refused(&server).await;
        assert_eq!((refused.status, refused.reason(), refused.body.as_str()), (403, "no_rule", FORBIDDEN));
    }
}

#[tokio::test]
async fn a_user_key_works_in_the_account_that_a_header_names() {
    let (server, _) = with_key().await;
    server.root().put_role("acme", "reader", &["monitors:read"]).await.unwrap();
    server.root().put_member("acme", "ann", "reader").await.unwrap();
    let ann = server.make(user_key("ann", &["all"])).await;
    let ask = || Ask::monitors().saying("account_header", "X-Checkly-Account").bearer(&ann.token);
    let passed = ask().header("x-checkly-account", "acme").passes(&server).await;
    assert_eq!(
        (&*passed.upstream["x-keyward-user"], &*passed.upstream["x-keyward-account"]),
        ("ann", "acme")
    );
    assert_eq!(ask().refused(&server).await.reason(), "wrong_account");
    assert_eq!(ask().header("x-checkly-account", "other").refused(&server).await.reason(), "wrong_account");
    for odd in [ask().header("x-checkly-account", "acme,other"), ask().header("x-checkly-account", "é")] {
        assert_eq!(odd.refused(&server).await.reason(), "bad_request");
    }
}

#[tokio::test]
async fn nobody_passes_for_somebody_by_a_header() {
    let (server, made) = with_key().await;
    let ask = |ask: Ask| {
        ask.header("x-keyward-user", "root")
            .header("x-keyward-account", "other")
            .header("x_keyward_account", "other")
            .header("X-Keyward_Scopes", "*")
            .header("x-keyward-whatever", "1")
    };
    let passed = ask(Ask::monitors()).bearer(&made.token).passes(&server).await;
    assert_eq!(passed.upstream["x-keyward-account"], "acme");
    for name in
        ["x-keyward-user", "x_keyward_account", "x-keyward_scopes", "x-keyward-whatever", "x-keyward-shadow"]
    {
        assert!(passed.removed.contains(&name.to_owned()), "{name}: {:?}", passed.removed);
    }
    assert!(!passed.removed.contains(&"x-keyward-account".to_owned()), "what is set is not removed");
    let public = ask(Ask::route(&[("public", "true")])).bearer("anything").passes(&server).await;
    assert!(public.upstream.is_empty() && public.removed.contains(&"x-keyward-account".to_owned()));
    assert!(
        !public.removed.contains(&"authorization".to_owned()),
        "who guards the route otherwise may need it"
    );
}

#[tokio::test]
async fn the_credential_stays_where_the_settings_say_so() {
    let (server, made) = configured(|settings| {
        settings.gateway.forward_credential = true;
        settings.gateway.credential_query = Some("api_key".into());
    })
    .await;
    let passed = Ask::monitors().bearer(&made.token).passes(&server).await;
    assert!(!passed.removed.contains(&"authorization".to_owned()));
    let (server, made) =
        configured(|settings| settings.gateway.credential_query = Some("api_key".into())).await;
    let path = format!("/v1/monitors?z=1&api_key={}", made.token);
    let passed = Ask::monitors().path(&path).passes(&server).await;
    assert_eq!(passed.removed_queries, ["api_key"]);
    let passed = Ask::monitors().path("/v1/monitors?z=1").bearer(&made.token).passes(&server).await;
    assert!(passed.removed_queries.is_empty(), "Envoy would sort the rest of the query");
    let (server, made) = with_key().await;
    let path = format!("/v1/monitors?api_key={}", made.token);
    assert_eq!(Ask::monitors().path(&path).refused(&server).await.reason(), "no_credential");
}

#[tokio::test]
async fn keys_for_managing_are_refused_unless_the_settings_say_otherwise() {
    let (server, _) = with_key().await;
    let mixed = server.make(service_key("acme", &["monitors:read", "keyward:keys:read"])).await;
    for token in [&server.root_token, &mixed.token] {
        let refused = Ask::route(&[("authenticate_only", "true"), ("environment", "production")])
            .bearer(token)
            .refused(&server)
            .await;
        assert_eq!((refused.status, refused.reason()), (403, "management_key"));
    }
    let (server, _) = configured(|settings| settings.gateway.management_keys = true).await;
    let mixed = server.make(service_key("acme", &["monitors:read", "keyward:keys:read"])).await;
    Ask::monitors().bearer(&mixed.token).passes(&server).await;
}

#[tokio::test]
async fn in_shadow_mode_all_pass_and_denials_are_marked() {
    let (server, made) = with_key().await;
    let shadow = || Ask::monitors().saying("mode", "shadow");
    let good = shadow().bearer(&made.token).passes(&server).await;
    assert_eq!(good.upstream["x-keyward-account"], "acme");
    assert!(!good.upstream.contains_key("x-keyward-shadow"));
    assert!(!good.removed.contains(&"authorization".to_owned()), "the service may still judge it itself");
    for (ask, reason) in [
        (shadow(), "no_credential"),
        (shadow().bearer("nonsense"), "unknown"),
        (shadow().saying("cost", "none"), "misconfigured"),
        (Ask::route(&[("mode", "shadow")]), "no_rule"),
    ] {
        let passed = ask.header("x-keyward-account", "other").passes(&server).await;
        assert_eq!(
            passed.upstream.into_iter().collect::<Vec<_>>(),
            [("x-keyward-shadow".into(), reason.into())]
        );
        assert!(passed.removed.contains(&"x-keyward-account".to_owned()));
        let said = ["allowed", "mode", "reason"].map(|name| passed.metadata[name].as_str());
        assert_eq!(said, ["false", "shadow", reason]);
    }
    let (server, _) = configured(|settings| settings.gateway.mode = Mode::Shadow).await;
    Ask::monitors().passes(&server).await;
    for mode in ["enforce", "enforec"] {
        Ask::monitors().saying("mode", mode).refused(&server).await;
    }
}

#[tokio::test]
async fn no_shadow_falls_on_a_request_whose_route_cannot_be_known() {
    let rules = r#"
        [defaults]
        hosts = ["*"]
        methods = ["*"]
        environment = "production"
        mode = "shadow"
        [[rule]]
        path = "/admin/**"
        scope = "admin:all"
        mode = "enforce"
        [[rule]]
        path = "/**"
        authenticate_only = true
    "#;
    let (server, _folder) = with_rules(rules).await;
    Ask::get("/x").passes(&server).await;
    assert_eq!(Ask::get("/admin/users").refused(&server).await.status, 401);
    for odd in [
        Ask::get("/admin/users").host("user@x"),
        Ask::get("/admin/%2575sers"),
        Ask::get("//admin/users"),
        Ask::get("/x/../admin/users").saying("mode", "shadow"),
    ] {
        assert_eq!(odd.refused(&server).await.status, 400);
    }
}

#[tokio::test]
async fn a_denied_client_hears_the_reason_where_the_settings_say_so() {
    let (server, _) = configured(|settings| settings.gateway.reason_header = true).await;
    let refused = Ask::monitors().bearer("nonsense").refused(&server).await;
    assert_eq!(refused.headers["x-keyward-reason"], "unknown");
}

// ---- limits that several replicas share ----

async fn limited_key(configure: impl FnOnce(&mut Settings)) -> (Server, Made) {
    let (server, _) = configured(configure).await;
    let rate_limits = vec![pb::RateLimit { name: "requests".into(), limit: 5, window: Some(seconds(60)) }];
    let request = pb::CreateKeyRequest { rate_limits, ..service_key("acme", &["monitors:read"]) };
    let made = server.make(request).await;
    (server, made)
}

#[tokio::test]
async fn limits_that_one_replica_counted_alone_are_told_apart_in_the_metadata() {
    let (server, limited) = limited_key(|settings| settings.limits.shared = true).await;
    let passed = Ask::monitors().bearer(&limited.token).passes(&server).await;
    assert_eq!(passed.metadata["limits_inexact"], "true");
    let free = server.make(service_key("acme", &["monitors:read"])).await;
    let passed = Ask::monitors().bearer(&free.token).passes(&server).await;
    assert_eq!(passed.metadata.get("limits_inexact"), None);
}

#[tokio::test]
async fn limits_that_cannot_be_counted_are_a_fault_and_no_denial() {
    let nowhere = RedisSettings {
        url: RedisUrl::parse("unix:///nowhere/redis").unwrap(),
        prefix: Prefix::parse("test:").unwrap(),
        timeout: Duration::from_secs(1),
        on_failure: OnFailure::Deny,
        time: Time::OfRedis,
    };
    let (server, limited) = limited_key(|settings| settings.limits.redis = Some(nowhere)).await;
    let refused = Ask::monitors().bearer(&limited.token).refused(&server).await;
    assert_eq!((refused.status, refused.fault, refused.reason()), (503, true, "limits_unavailable"));
    let free = server.make(service_key("acme", &["monitors:read"])).await;
    Ask::monitors().bearer(&free.token).passes(&server).await;
}
