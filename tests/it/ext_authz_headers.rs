//! What Envoy is told to remove, and which spellings of a header's name are read: over the wire, asked as Envoy asks.

use keyward::{
    domain::header_name::{IDENTITY_HEADERS, OVERRIDE_HEADERS},
    pb,
};

use crate::{
    ext_authz_client::{EnvoyCheck, server_with_key, server_with_rules},
    support::{service_key_request, to_strings},
};

#[tokio::test]
async fn another_spelling_of_a_header_that_is_read_is_removed_and_never_read() {
    let (server, made) = server_with_key().await;
    let bound = pb::CreateKeyRequest {
        customers: to_strings(&["c1"]),
        ..service_key_request("acme", &["monitors:read"])
    };
    let bound = server.create_key(bound).await;
    let ask = || {
        EnvoyCheck::monitors_request()
            .with_extension("customer_header", "X-Customer")
            .with_bearer(&bound.token)
    };
    let odd = ask().with_header("x_customer", "c1").expect_denied(&server).await;
    assert_eq!(odd.reason(), "wrong_customer", "the request names no customer");
    let both =
        ask().with_header("x-customer", "c1").with_header("x.customer", "c1").expect_allowed(&server).await;
    assert!(both.removed.contains(&"x.customer".to_owned()), "{:?}", both.removed);
    assert!(!both.removed.contains(&"x-customer".to_owned()), "{:?}", both.removed);
    let odd =
        EnvoyCheck::monitors_request().with_header("x_api_key", &made.token).expect_denied(&server).await;
    assert_eq!(odd.reason(), "no_credential");
    let both = EnvoyCheck::monitors_request()
        .with_header("x-api-key", &made.token)
        .with_header("x_api_key", &made.token);
    let both = both.with_header("x_forwarded_for", "10.0.0.1").expect_allowed(&server).await;
    for name in ["x-api-key", "x_api_key", "x_forwarded_for"] {
        assert!(both.removed.contains(&name.to_owned()), "{name}: {:?}", both.removed);
    }
}

#[tokio::test]
async fn two_spellings_of_one_name_that_differ_are_400() {
    let (server, made) = server_with_key().await;
    let ask = || {
        EnvoyCheck::monitors_request()
            .with_extension("customer_header", "X-Customer")
            .with_bearer(&made.token)
    };
    for (one, other) in [
        ("x-customer", "x_customer"),
        ("x.customer", "x-customer"),
        ("x_api_key", "x.api.key"),
        ("x-keyward-user", "x_keyward_user"),
        ("x-original-url", "x_original_url"),
    ] {
        let refused = ask().with_header(one, "c1").with_header(other, "c2").expect_denied(&server).await;
        assert_eq!((refused.status, refused.reason()), (400, "bad_request"), "{one} {other}");
        assert!(refused.body.contains("occurs in several spellings"), "{}", refused.body);
        ask().with_header(one, "c1").with_header(other, "c1").expect_allowed(&server).await;
    }
    let public = EnvoyCheck::with_route_extensions(&[("public", "true")])
        .with_header("x-api-key", "a")
        .with_header("x_api_key", "b");
    assert_eq!(public.expect_denied(&server).await.status, 400);
}

#[tokio::test]
async fn everything_that_begins_like_an_identity_header_is_removed() {
    let (server, made) = server_with_key().await;
    let names =
        ["x.keyward.user", "x-keyward-later", "x_keyward_later", "x~keyward|account", "x-keyward_key-id"];
    let ask = |ask: EnvoyCheck| names.iter().fold(ask, |ask, name| ask.with_header(name, "root"));
    for ask in [
        ask(EnvoyCheck::monitors_request()).with_bearer(&made.token),
        ask(EnvoyCheck::with_route_extensions(&[("public", "true")])),
    ] {
        let passed = ask.expect_allowed(&server).await;
        for name in names {
            assert!(passed.removed.contains(&name.to_owned()), "{name}: {:?}", passed.removed);
        }
    }
    let plain = EnvoyCheck::monitors_request()
        .with_bearer(&made.token)
        .with_header("x_other", "1")
        .with_header("x-key", "1");
    let removed = plain.expect_allowed(&server).await.removed;
    assert!(!removed.iter().any(|name| name == "x_other" || name == "x-key"), "{removed:?}");
}

#[tokio::test]
async fn what_overrides_a_request_never_reaches_the_service() {
    let rules = r#"
        [defaults]
        hosts = ["*"]
        environment = "production"
        [[rule]]
        methods = ["*"]
        path = "/v1/**"
        scope = "monitors:read"
    "#;
    let (server, _folder) = server_with_rules(rules).await;
    let made = server.create_key(service_key_request("acme", &["monitors:read"])).await;
    for ask in [
        EnvoyCheck::get("/v1/monitors"),
        EnvoyCheck::monitors_request(),
        EnvoyCheck::with_route_extensions(&[("public", "true")]),
    ] {
        let ask = || ask.clone().with_method("POST").with_bearer(&made.token);
        let none = ask().expect_allowed(&server).await;
        for name in OVERRIDE_HEADERS {
            assert!(none.removed.contains(&name.to_owned()), "{name}: a proxy may keep it from Keyward");
            let odd = name.replace('-', "_");
            let passed =
                ask().with_header(name, "DELETE").with_header(&odd, "DELETE").expect_allowed(&server).await;
            assert!(passed.removed.contains(&name.to_owned()) && passed.removed.contains(&odd), "{name}");
        }
    }
}

#[tokio::test]
async fn in_shadow_mode_no_spelling_reaches_the_service_either() {
    let (server, _) = server_with_key().await;
    let shadow =
        || EnvoyCheck::with_route_extensions(&[("mode", "shadow"), ("customer_header", "X-Customer")]);
    let ask = shadow()
        .with_header("x-customer", "a")
        .with_header("x_customer", "b")
        .with_header("x.keyward.user", "root");
    let passed = ask.expect_allowed(&server).await;
    assert_eq!(passed.upstream["x-keyward-shadow"], "bad_request");
    for name in ["x_customer", "x.keyward.user"]
        .into_iter()
        .chain(IDENTITY_HEADERS)
        .filter(|name| !name.ends_with("shadow"))
    {
        assert!(passed.removed.contains(&name.to_owned()), "{name}: {:?}", passed.removed);
    }
    // No proxy can be asked to remove what is no field name.
    let odd = shadow().with_header("x keyward user", "root").expect_denied(&server).await;
    assert_eq!(odd.status, 400);
}
