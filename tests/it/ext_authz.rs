//! `envoy.service.auth.v3.Authorization` over the wire: where a route's needs come from, what each finding becomes, and what
//! the service behind sees.

use std::time::Duration;

use keyward::{
    config::server::ServerSettings,
    domain::route::EnforcementMode,
    engine::limiter::{ClockSource, RedisFailurePolicy, RedisKeyPrefix, RedisSettings, RedisUrl},
    pb::{self, envoy::service::auth::v3::CheckResponse, envoy_request::EnvoyCheckRequest},
};
use tonic::Status;

use crate::{
    ext_authz_client::{
        EnvoyCheck, FORBIDDEN, HeaderValues, UNAUTHORIZED, send_check, server_with_key, server_with_rules,
        server_with_settings,
    },
    support::{CreatedKey, Server, proto_seconds, service_key_request, to_strings, user_key_request},
};

#[tokio::test(flavor = "multi_thread")]
async fn a_proxy_cannot_tell_the_short_way_from_the_long_one() {
    let server = Server::with_accounts().await;
    let made = server.create_key(service_key_request("acme", &["monitors:read"])).await;
    let revoked = server.create_key(service_key_request("acme", &["monitors:read"])).await;
    server.root_client().revoke(&revoked.id).await.unwrap();
    let short = server.client_without_token();
    // Of those who show no key nobody reads it; and so their calls go the long way.
    let long = short.with_header("x-keyward-account", "acme");
    let asks = [
        EnvoyCheck::monitors_request().with_bearer(&made.token),
        EnvoyCheck::monitors_request()
            .with_bearer(&made.token)
            .with_header("x-request-id", "seven")
            .with_path("/v1/monitors?api_key=1"),
        EnvoyCheck::monitors_request().with_bearer(&revoked.token),
        EnvoyCheck::monitors_request().with_bearer("nobody's"),
        EnvoyCheck::monitors_request(),
        EnvoyCheck::with_route_extensions(&[("scope", "monitors:write"), ("environment", "production")])
            .with_bearer(&made.token),
        EnvoyCheck::with_route_extensions(&[("environment", "nowhere")]).with_bearer(&made.token),
        EnvoyCheck::with_route_extensions(&[("public", "true")]),
        EnvoyCheck::get("/v1//monitors").with_bearer(&made.token),
        EnvoyCheck::get("/none").with_bearer(&made.token),
    ];
    let told = |answer: Result<CheckResponse, Status>| {
        answer.map_err(|status| (status.code(), status.message().to_owned(), status.details().to_vec()))
    };
    let (mut passed, mut refused) = (0, 0);
    for message in asks.map(EnvoyCheck::into_message).into_iter().chain([EnvoyCheckRequest::default()]) {
        let answer = told(send_check(&short, message.clone()).await);
        assert_eq!(answer, told(send_check(&long, message).await));
        match answer.is_ok_and(|answer| answer.status.is_some_and(|status| status.code == 0)) {
            true => passed += 1,
            false => refused += 1,
        }
    }
    assert!(passed >= 3 && refused >= 5, "{passed} {refused}");
}

#[tokio::test]
async fn a_key_passes_and_the_service_learns_whose_it_is() {
    let (server, made) = server_with_key().await;
    let passed = EnvoyCheck::monitors_request().with_bearer(&made.token).expect_allowed(&server).await;
    let wanted = [
        ("x-keyward-account", "acme"),
        ("x-keyward-environment", "production"),
        ("x-keyward-key-id", &made.id),
        ("x-keyward-scopes", "monitors:read"),
    ];
    let wanted: HeaderValues = wanted.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
    assert_eq!(passed.upstream, wanted);
    assert!(passed.removed.contains(&"authorization".to_owned()), "the credential is hidden");
    assert_eq!((&*passed.metadata["key_id"], &*passed.metadata["reason"]), (&*made.id, "ok"));
    assert_eq!((&*passed.metadata["allowed"], &*passed.metadata["account"]), ("true", "acme"));
    let used = server
        .root_client()
        .check(crate::support::scope_check_request(&made.token, "monitors:read"))
        .await
        .unwrap();
    assert!(used.allowed, "one decision for both services");
}

#[tokio::test]
async fn an_unusable_key_hears_one_word_and_401() {
    let (server, made) = server_with_key().await;
    let disabled = server.create_key(service_key_request("acme", &["monitors:read"])).await;
    server.root_client().disable(&disabled.id).await.unwrap();
    let staging = server
        .create_key(pb::CreateKeyRequest {
            environment: "staging".into(),
            ..service_key_request("acme", &["*"])
        })
        .await;
    let revoked = server.create_key(service_key_request("acme", &["monitors:read"])).await;
    server.root_client().revoke(&revoked.id).await.unwrap();
    let rotated = server.create_key(service_key_request("acme", &["monitors:read"])).await;
    server.root_client().rotate(&rotated.id, 0).await.unwrap();
    let short = pb::CreateKeyRequest {
        ttl: Some(proto_seconds(1)),
        ..service_key_request("acme", &["monitors:read"])
    };
    let expired = server.create_key(short).await;
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
        let refused = EnvoyCheck::monitors_request().with_bearer(token).expect_denied(&server).await;
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
    let other = EnvoyCheck::monitors_request()
        .with_extension("account", "other")
        .with_bearer(&made.token)
        .expect_denied(&server)
        .await;
    assert_eq!((other.status, other.reason()), (401, "wrong_account"));
}

#[tokio::test]
async fn a_request_without_a_credential_is_told_to_bring_one() {
    let (server, made) = server_with_key().await;
    let none = EnvoyCheck::monitors_request().expect_denied(&server).await;
    assert_eq!((none.status, none.reason(), none.body.as_str()), (401, "no_credential", UNAUTHORIZED));
    assert_eq!(none.headers["www-authenticate"], r#"Bearer realm="keyward""#);
    let many = EnvoyCheck::monitors_request()
        .with_bearer(&made.token)
        .with_header("x-api-key", "another")
        .expect_denied(&server)
        .await;
    assert_eq!((many.status, many.reason()), (401, "many_credentials"));
    let joined = format!("Bearer {0},Bearer {0}", made.token);
    let joined =
        EnvoyCheck::monitors_request().with_header("authorization", joined).expect_denied(&server).await;
    assert_eq!(joined.reason(), "many_credentials");
    let passed =
        EnvoyCheck::monitors_request().with_header("x-api-key", &made.token).expect_allowed(&server).await;
    assert!(
        passed.removed.contains(&"x-api-key".to_owned()) && !passed.removed.contains(&"authorization".into())
    );
}

#[tokio::test]
async fn a_usable_key_without_the_right_hears_403() {
    let (server, made) = server_with_key().await;
    let bound = pb::CreateKeyRequest {
        customers: to_strings(&["c1"]),
        allowed_cidrs: to_strings(&["10.0.0.0/8"]),
        ..service_key_request("acme", &["monitors:read"])
    };
    let bound = server.create_key(bound).await;
    let ask = EnvoyCheck::monitors_request()
        .with_extension("customer_header", "X-Customer")
        .with_bearer(&bound.token);
    let mut inside = ask.clone().with_header("x-customer", "c1");
    inside.peer = "10.1.2.3";
    inside.clone().expect_allowed(&server).await;
    let mut elsewhere = inside.clone();
    elsewhere.peer = "192.0.2.1";
    for (ask, reason) in [
        (
            EnvoyCheck::with_route_extensions(&[("scope", "alerts:read"), ("environment", "production")])
                .with_bearer(&made.token),
            "missing_scope",
        ),
        (EnvoyCheck { peer: "10.1.2.3", ..ask }, "wrong_customer"),
        (elsewhere, "address_not_allowed"),
    ] {
        let refused = ask.expect_denied(&server).await;
        assert_eq!((refused.status, refused.code, refused.body.as_str()), (403, 7, FORBIDDEN), "{reason}");
        assert_eq!(refused.reason(), reason);
        let challenge = refused.headers.get("www-authenticate").map(String::as_str);
        let wanted = r#"Bearer realm="keyward", error="insufficient_scope", scope="alerts:read""#;
        assert_eq!(challenge, (reason == "missing_scope").then_some(wanted));
    }
    server.root_client().suspend("acme").await.unwrap();
    let suspended = EnvoyCheck::monitors_request().with_bearer(&made.token).expect_denied(&server).await;
    assert_eq!((suspended.status, suspended.reason()), (403, "account_suspended"));
}

fn rate_limited_key_request(limit: u64) -> pb::CreateKeyRequest {
    let limit = pb::RateLimit { name: "burst".to_owned(), limit, window: Some(proto_seconds(60)) };
    let quota = pb::Quota { limit: 5, period: pb::QuotaPeriod::Day.into() };
    pb::CreateKeyRequest {
        rate_limits: vec![limit],
        quota: Some(quota),
        ..service_key_request("acme", &["monitors:read"])
    }
}

#[tokio::test]
async fn a_limited_key_is_told_how_it_stands_and_hears_429() {
    let (server, _) = server_with_key().await;
    let made = server.create_key(rate_limited_key_request(3)).await;
    let ask = |id: &str| {
        EnvoyCheck::monitors_request()
            .with_extension("cost", "2")
            .with_bearer(&made.token)
            .with_request_id(id)
    };
    let passed = ask("1").expect_allowed(&server).await;
    assert_eq!(passed.response["ratelimit-policy"], r#""burst";q=3;w=60, "quota";q=5;w=86400"#);
    assert_eq!(passed.response["ratelimit"], r#""burst";r=1;t=40, "quota";r=3;t=86400"#);
    assert_eq!(passed.metadata["cost"], "2");
    let refused = ask("2").expect_denied(&server).await;
    assert_eq!((refused.status, refused.code, refused.reason()), (429, 8, "rate_limited"));
    assert_eq!(refused.headers["retry-after"], "20");
    assert_eq!(refused.headers["ratelimit"], r#""burst";r=1;t=40, "quota";r=3;t=86400"#);
    assert!(refused.body.contains(r#""code":"RATE_LIMITED""#), "{}", refused.body);
    server.advance(60);
    ask("3").expect_allowed(&server).await;
    server.advance(60);
    let refused = ask("4").expect_denied(&server).await;
    assert_eq!((refused.status, refused.reason()), (429, "quota_exceeded"));
}

#[tokio::test]
async fn what_envoy_asks_again_is_charged_once() {
    let (server, _) = server_with_key().await;
    let made = server.create_key(rate_limited_key_request(3)).await;
    for _ in 0..5 {
        let passed = EnvoyCheck::monitors_request()
            .with_bearer(&made.token)
            .with_request_id("17290")
            .expect_allowed(&server)
            .await;
        assert_eq!(passed.response["ratelimit"], r#""burst";r=2;t=20, "quota";r=4;t=86400"#);
    }
    let other = EnvoyCheck::monitors_request()
        .with_bearer(&made.token)
        .with_request_id("17291")
        .expect_allowed(&server)
        .await;
    assert_eq!(other.response["ratelimit"], r#""burst";r=1;t=40, "quota";r=3;t=86400"#);
}

#[tokio::test]
async fn grpc_calls_get_the_code_that_their_clients_understand() {
    let (server, _) = server_with_key().await;
    let made = server.create_key(rate_limited_key_request(1)).await;
    let ask = |id: &str| {
        EnvoyCheck::monitors_request()
            .with_header("content-type", "application/grpc+proto")
            .with_request_id(id)
    };
    ask("1").with_bearer(&made.token).expect_allowed(&server).await;
    let limited = ask("2").with_bearer(&made.token).expect_denied(&server).await;
    assert_eq!((limited.headers["grpc-status"].as_str(), limited.body.as_str()), ("8", "Too many requests"));
    let odd = ask("3").with_path("/a//b").with_bearer(&made.token).expect_denied(&server).await;
    assert_eq!(odd.headers["grpc-status"], "3");
    let none = ask("4").expect_denied(&server).await;
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
    let (server, _folder) = server_with_rules(rules).await;
    let acme = server.create_key(service_key_request("acme", &["monitors:read"])).await;
    let ruled = server.create_key(service_key_request("acme", &["rules:read"])).await;

    EnvoyCheck::get("/v1/monitors").with_bearer(&ruled.token).expect_allowed(&server).await;
    EnvoyCheck::get("/v1/monitors")
        .with_host("API.test:443")
        .with_bearer(&ruled.token)
        .expect_allowed(&server)
        .await;
    let refused = EnvoyCheck::get("/v1/monitors").with_bearer(&acme.token).expect_denied(&server).await;
    assert_eq!(refused.reason(), "missing_scope", "the rule decides");
    EnvoyCheck::with_route_extensions(&[("scope", "monitors:read")])
        .with_bearer(&acme.token)
        .expect_allowed(&server)
        .await;
    let refused = EnvoyCheck::with_route_extensions(&[("environment", "staging")])
        .with_bearer(&ruled.token)
        .expect_denied(&server)
        .await;
    assert_eq!(
        refused.reason(),
        "wrong_environment",
        "what a rule leaves unsaid the route says, before the default"
    );

    EnvoyCheck::get("/v1/accounts/acme/monitors").with_bearer(&acme.token).expect_allowed(&server).await;
    let other =
        EnvoyCheck::get("/v1/accounts/other/monitors").with_bearer(&acme.token).expect_denied(&server).await;
    assert_eq!((other.status, other.reason()), (401, "wrong_account"));
    let odd =
        EnvoyCheck::get("/v1/accounts/n.o/monitors").with_bearer(&acme.token).expect_denied(&server).await;
    assert_eq!((odd.status, odd.reason()), (400, "bad_request"));

    EnvoyCheck::get("/open/a/b").expect_allowed(&server).await;
    for ask in [
        EnvoyCheck::get("/v2").with_bearer(&acme.token),
        EnvoyCheck::get("/v2"),
        EnvoyCheck::with_route_extensions(&[("scop", "a:read")]).with_path("/v2"),
    ] {
        let refused = ask.expect_denied(&server).await;
        assert_eq!((refused.status, refused.reason(), refused.body.as_str()), (403, "no_rule", FORBIDDEN));
    }
}

#[tokio::test]
async fn a_user_key_works_in_the_account_that_a_header_names() {
    let (server, _) = server_with_key().await;
    server.root_client().put_role("acme", "reader", &["monitors:read"]).await.unwrap();
    server.root_client().put_member("acme", "ann", "reader").await.unwrap();
    let ann = server.create_key(user_key_request("ann", &["all"])).await;
    let ask = || {
        EnvoyCheck::monitors_request()
            .with_extension("account_header", "X-Checkly-Account")
            .with_bearer(&ann.token)
    };
    let passed = ask().with_header("x-checkly-account", "acme").expect_allowed(&server).await;
    assert_eq!(
        (&*passed.upstream["x-keyward-user"], &*passed.upstream["x-keyward-account"]),
        ("ann", "acme")
    );
    assert_eq!(ask().expect_denied(&server).await.reason(), "wrong_account");
    assert_eq!(
        ask().with_header("x-checkly-account", "other").expect_denied(&server).await.reason(),
        "wrong_account"
    );
    for odd in
        [ask().with_header("x-checkly-account", "acme,other"), ask().with_header("x-checkly-account", "é")]
    {
        assert_eq!(odd.expect_denied(&server).await.reason(), "bad_request");
    }
}

#[tokio::test]
async fn nobody_passes_for_somebody_by_a_header() {
    let (server, made) = server_with_key().await;
    let ask = |ask: EnvoyCheck| {
        ask.with_header("x-keyward-user", "root")
            .with_header("x-keyward-account", "other")
            .with_header("x_keyward_account", "other")
            .with_header("X-Keyward_Scopes", "*")
            .with_header("x-keyward-whatever", "1")
    };
    let passed = ask(EnvoyCheck::monitors_request()).with_bearer(&made.token).expect_allowed(&server).await;
    assert_eq!(passed.upstream["x-keyward-account"], "acme");
    for name in
        ["x-keyward-user", "x_keyward_account", "x-keyward_scopes", "x-keyward-whatever", "x-keyward-shadow"]
    {
        assert!(passed.removed.contains(&name.to_owned()), "{name}: {:?}", passed.removed);
    }
    assert!(!passed.removed.contains(&"x-keyward-account".to_owned()), "what is set is not removed");
    let public = ask(EnvoyCheck::with_route_extensions(&[("public", "true")]))
        .with_bearer("anything")
        .expect_allowed(&server)
        .await;
    assert!(public.upstream.is_empty() && public.removed.contains(&"x-keyward-account".to_owned()));
    assert!(
        !public.removed.contains(&"authorization".to_owned()),
        "who guards the route otherwise may need it"
    );
}

#[tokio::test]
async fn the_credential_stays_where_the_settings_say_so() {
    let (server, made) = server_with_settings(|settings| {
        settings.gateway.forward_credential = true;
        settings.gateway.credential_query = Some("api_key".into());
    })
    .await;
    let passed = EnvoyCheck::monitors_request().with_bearer(&made.token).expect_allowed(&server).await;
    assert!(!passed.removed.contains(&"authorization".to_owned()));
    let (server, made) =
        server_with_settings(|settings| settings.gateway.credential_query = Some("api_key".into())).await;
    let path = format!("/v1/monitors?z=1&api_key={}", made.token);
    let passed = EnvoyCheck::monitors_request().with_path(&path).expect_allowed(&server).await;
    assert_eq!(passed.removed_queries, ["api_key"]);
    let passed = EnvoyCheck::monitors_request()
        .with_path("/v1/monitors?z=1")
        .with_bearer(&made.token)
        .expect_allowed(&server)
        .await;
    assert!(passed.removed_queries.is_empty(), "Envoy would sort the rest of the query");
    let (server, made) = server_with_key().await;
    let path = format!("/v1/monitors?api_key={}", made.token);
    assert_eq!(
        EnvoyCheck::monitors_request().with_path(&path).expect_denied(&server).await.reason(),
        "no_credential"
    );
}

#[tokio::test]
async fn keys_for_managing_are_refused_unless_the_settings_say_otherwise() {
    let (server, _) = server_with_key().await;
    let mixed = server.create_key(service_key_request("acme", &["monitors:read", "keyward:keys:read"])).await;
    for token in [&server.root_token, &mixed.token] {
        let refused = EnvoyCheck::with_route_extensions(&[
            ("authenticate_only", "true"),
            ("environment", "production"),
        ])
        .with_bearer(token)
        .expect_denied(&server)
        .await;
        assert_eq!((refused.status, refused.reason()), (403, "management_key"));
    }
    let (server, _) = server_with_settings(|settings| settings.gateway.management_keys = true).await;
    let mixed = server.create_key(service_key_request("acme", &["monitors:read", "keyward:keys:read"])).await;
    EnvoyCheck::monitors_request().with_bearer(&mixed.token).expect_allowed(&server).await;
}

#[tokio::test]
async fn in_shadow_mode_all_pass_and_denials_are_marked() {
    let (server, made) = server_with_key().await;
    let shadow = || EnvoyCheck::monitors_request().with_extension("mode", "shadow");
    let good = shadow().with_bearer(&made.token).expect_allowed(&server).await;
    assert_eq!(good.upstream["x-keyward-account"], "acme");
    assert!(!good.upstream.contains_key("x-keyward-shadow"));
    assert!(!good.removed.contains(&"authorization".to_owned()), "the service may still judge it itself");
    for (ask, reason) in [
        (shadow(), "no_credential"),
        (shadow().with_bearer("nonsense"), "unknown"),
        (shadow().with_extension("cost", "none"), "misconfigured"),
        (EnvoyCheck::with_route_extensions(&[("mode", "shadow")]), "no_rule"),
    ] {
        let passed = ask.with_header("x-keyward-account", "other").expect_allowed(&server).await;
        assert_eq!(
            passed.upstream.into_iter().collect::<Vec<_>>(),
            [("x-keyward-shadow".into(), reason.into())]
        );
        assert!(passed.removed.contains(&"x-keyward-account".to_owned()));
        let said = ["allowed", "mode", "reason"].map(|name| passed.metadata[name].as_str());
        assert_eq!(said, ["false", "shadow", reason]);
    }
    let (server, _) = server_with_settings(|settings| settings.gateway.mode = EnforcementMode::Shadow).await;
    EnvoyCheck::monitors_request().expect_allowed(&server).await;
    for mode in ["enforce", "enforec"] {
        EnvoyCheck::monitors_request().with_extension("mode", mode).expect_denied(&server).await;
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
    let (server, _folder) = server_with_rules(rules).await;
    EnvoyCheck::get("/x").expect_allowed(&server).await;
    assert_eq!(EnvoyCheck::get("/admin/users").expect_denied(&server).await.status, 401);
    for odd in [
        EnvoyCheck::get("/admin/users").with_host("user@x"),
        EnvoyCheck::get("/admin/%2575sers"),
        EnvoyCheck::get("//admin/users"),
        EnvoyCheck::get("/x/../admin/users").with_extension("mode", "shadow"),
    ] {
        assert_eq!(odd.expect_denied(&server).await.status, 400);
    }
}

#[tokio::test]
async fn a_denied_client_hears_the_reason_where_the_settings_say_so() {
    let (server, _) = server_with_settings(|settings| settings.gateway.reason_header = true).await;
    let refused = EnvoyCheck::monitors_request().with_bearer("nonsense").expect_denied(&server).await;
    assert_eq!(refused.headers["x-keyward-reason"], "unknown");
}

// ---- limits that several replicas share ----

async fn server_with_limited_key(configure: impl FnOnce(&mut ServerSettings)) -> (Server, CreatedKey) {
    let (server, _) = server_with_settings(configure).await;
    let rate_limits =
        vec![pb::RateLimit { name: "requests".into(), limit: 5, window: Some(proto_seconds(60)) }];
    let request = pb::CreateKeyRequest { rate_limits, ..service_key_request("acme", &["monitors:read"]) };
    let made = server.create_key(request).await;
    (server, made)
}

#[tokio::test]
async fn limits_that_one_replica_counted_alone_are_told_apart_in_the_metadata() {
    let (server, limited) = server_with_limited_key(|settings| settings.limits.shared = true).await;
    let passed = EnvoyCheck::monitors_request().with_bearer(&limited.token).expect_allowed(&server).await;
    assert_eq!(passed.metadata["limits_inexact"], "true");
    let free = server.create_key(service_key_request("acme", &["monitors:read"])).await;
    let passed = EnvoyCheck::monitors_request().with_bearer(&free.token).expect_allowed(&server).await;
    assert_eq!(passed.metadata.get("limits_inexact"), None);
}

#[tokio::test]
async fn limits_that_cannot_be_counted_are_a_fault_and_no_denial() {
    let nowhere = RedisSettings {
        url: RedisUrl::parse("unix:///nowhere/redis").unwrap(),
        key_prefix: RedisKeyPrefix::parse("test:").unwrap(),
        timeout: Duration::from_secs(1),
        on_failure: RedisFailurePolicy::Deny,
        clock_source: ClockSource::Redis,
    };
    let (server, limited) = server_with_limited_key(|settings| settings.limits.redis = Some(nowhere)).await;
    let refused = EnvoyCheck::monitors_request().with_bearer(&limited.token).expect_denied(&server).await;
    assert_eq!((refused.status, refused.fault, refused.reason()), (503, true, "limits_unavailable"));
    let free = server.create_key(service_key_request("acme", &["monitors:read"])).await;
    EnvoyCheck::monitors_request().with_bearer(&free.token).expect_allowed(&server).await;
}
