//! What Envoy is told to remove, and which spellings of a header's name are read: over the wire, asked as Envoy asks.

use keyward::{
    domain::header_name::{IDENTITY, OVERRIDES},
    pb,
};

use crate::{
    ext_authz_client::{Ask, with_key, with_rules},
    support::{service_key, texts},
};

#[tokio::test]
async fn another_spelling_of_a_header_that_is_read_is_removed_and_never_read() {
    let (server, made) = with_key().await;
    let bound = pb::CreateKeyRequest { customers: texts(&["c1"]), ..service_key("acme", &["monitors:read"]) };
    let bound = server.make(bound).await;
    let ask = || Ask::monitors().saying("customer_header", "X-Customer").bearer(&bound.token);
    let odd = ask().header("x_customer", "c1").refused(&server).await;
    assert_eq!(odd.reason(), "wrong_customer", "the request names no customer");
    let both = ask().header("x-customer", "c1").header("x.customer", "c1").passes(&server).await;
    assert!(both.removed.contains(&"x.customer".to_owned()), "{:?}", both.removed);
    assert!(!both.removed.contains(&"x-customer".to_owned()), "{:?}", both.removed);
    let odd = Ask::monitors().header("x_api_key", &made.token).refused(&server).await;
    assert_eq!(odd.reason(), "no_credential");
    let both = Ask::monitors().header("x-api-key", &made.token).header("x_api_key", &made.token);
    let both = both.header("x_forwarded_for", "10.0.0.1").passes(&server).await;
    for name in ["x-api-key", "x_api_key", "x_forwarded_for"] {
        assert!(both.removed.contains(&name.to_owned()), "{name}: {:?}", both.removed);
    }
}

#[tokio::test]
async fn two_spellings_of_one_name_that_differ_are_400() {
    let (server, made) = with_key().await;
    let ask = || Ask::monitors().saying("customer_header", "X-Customer").bearer(&made.token);
    for (one, other) in [
        ("x-customer", "x_customer"),
        ("x.customer", "x-customer"),
        ("x_api_key", "x.api.key"),
        ("x-keyward-user", "x_keyward_user"),
        ("x-original-url", "x_original_url"),
    ] {
        let refused = ask().header(one, "c1").header(other, "c2").refused(&server).await;
        assert_eq!((refused.status, refused.reason()), (400, "bad_request"), "{one} {other}");
        assert!(refused.body.contains("comes in several spellings"), "{}", refused.body);
        ask().header(one, "c1").header(other, "c1").passes(&server).await;
    }
    let public = Ask::route(&[("public", "true")]).header("x-api-key", "a").header("x_api_key", "b");
    assert_eq!(public.refused(&server).await.status, 400);
}

#[tokio::test]
async fn everything_that_begins_like_an_identity_header_is_removed() {
    let (server, made) = with_key().await;
    let names =
        ["x.keyward.user", "x-keyward-later", "x_keyward_later", "x~keyward|account", "x-keyward_key-id"];
    let ask = |ask: Ask| names.iter().fold(ask, |ask, name| ask.header(name, "root"));
    for ask in [ask(Ask::monitors()).bearer(&made.token), ask(Ask::route(&[("public", "true")]))] {
        let passed = ask.passes(&server).await;
        for name in names {
            assert!(passed.removed.contains(&name.to_owned()), "{name}: {:?}", passed.removed);
        }
    }
    let plain = Ask::monitors().bearer(&made.token).header("x_other", "1").header("x-key", "1");
    let removed = plain.passes(&server).await.removed;
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
    let (server, _folder) = with_rules(rules).await;
    let made = server.make(service_key("acme", &["monitors:read"])).await;
    for ask in [Ask::get("/v1/monitors"), Ask::monitors(), Ask::route(&[("public", "true")])] {
        let ask = || ask.clone().method("POST").bearer(&made.token);
        let none = ask().passes(&server).await;
        for name in OVERRIDES {
            assert!(none.removed.contains(&name.to_owned()), "{name}: a proxy may keep it from Keyward");
            let odd = name.replace('-', "_");
            let passed = ask().header(name, "DELETE").header(&odd, "DELETE").passes(&server).await;
            assert!(passed.removed.contains(&name.to_owned()) && passed.removed.contains(&odd), "{name}");
        }
    }
}

#[tokio::test]
async fn in_shadow_mode_no_spelling_reaches_the_service_either() {
    let (server, _) = with_key().await;
    let shadow = || Ask::route(&[("mode", "shadow"), ("customer_header", "X-Customer")]);
    let ask = shadow().header("x-customer", "a").header("x_customer", "b").header("x.keyward.user", "root");
    let passed = ask.passes(&server).await;
    assert_eq!(passed.upstream["x-keyward-shadow"], "bad_request");
    for name in
        ["x_customer", "x.keyward.user"].into_iter().chain(IDENTITY).filter(|name| !name.ends_with("shadow"))
    {
        assert!(passed.removed.contains(&name.to_owned()), "{name}: {:?}", passed.removed);
    }
    // No proxy can be asked to remove what is no field name.
    let odd = shadow().header("x keyward user", "root").refused(&server).await;
    assert_eq!(odd.status, 400);
}
