//! Requests that Envoy asks about and that are odd: paths, methods and headers that can be read in two ways, too much of
//! them, or none.

use std::collections::BTreeMap;

use keyward::pb::{
    self,
    envoy_request::{
        EnvoyAttributeContext, EnvoyCheckRequest, EnvoyHeaderMap, EnvoyHeaderValue, EnvoyHttpRequest,
        EnvoyRequest,
    },
};
use prost::Message as _;
use tonic::Code;

use crate::{
    ext_authz_client::{
        DeniedAnswer, EnvoyCheck, send_check, server_with_key, server_with_rules, server_with_settings,
    },
    support::{assert_refused, service_key_request, to_strings, violated_fields},
};

#[tokio::test]
async fn a_name_that_was_not_seen_does_not_reach_the_service() {
    let (server, made) = server_with_key().await;
    let ask =
        || EnvoyCheck::monitors_request().with_extension("account_header", "X-Acct").with_bearer(&made.token);
    let passed = ask().expect_allowed(&server).await;
    assert!(passed.removed.contains(&"x-acct".to_owned()), "a proxy may have kept it from us");
    let passed = ask().with_header("x-acct", "acme").expect_allowed(&server).await;
    assert!(!passed.removed.contains(&"x-acct".to_owned()));
    assert!(passed.removed.contains(&"x-original-url".to_owned()), "nor does another path");
}

#[tokio::test]
async fn the_client_is_so_many_hops_away_as_the_settings_say() {
    let bound = pb::CreateKeyRequest {
        allowed_cidrs: to_strings(&["10.0.0.0/8"]),
        ..service_key_request("acme", &["monitors:read"])
    };
    let (server, _) = server_with_settings(|settings| settings.gateway.trusted_hops = 1).await;
    let made = server.create_key(bound.clone()).await;
    let ask = |forwarded: &str| {
        EnvoyCheck::monitors_request().with_bearer(&made.token).with_header("x-forwarded-for", forwarded)
    };
    ask("6.6.6.6, 10.0.0.1").expect_allowed(&server).await;
    ask("6.6.6.6,10.0.0.1,192.0.2.1").expect_allowed(&server).await;
    assert_eq!(ask("10.0.0.1, 6.6.6.6").expect_denied(&server).await.reason(), "address_not_allowed");
    assert_eq!(ask("").expect_denied(&server).await.reason(), "address_not_allowed");
    let (server, _) = server_with_settings(|_| {}).await;
    let made = server.create_key(bound).await;
    let spoofed =
        EnvoyCheck::monitors_request().with_bearer(&made.token).with_header("x-forwarded-for", "10.0.0.1");
    assert_eq!(
        spoofed.expect_denied(&server).await.reason(),
        "address_not_allowed",
        "nobody in front is believed"
    );
}

#[tokio::test]
async fn a_route_that_cannot_be_understood_answers_503_not_a_verdict() {
    let (server, made) = server_with_key().await;
    for extensions in [
        &[("scope", "monitors:read"), ("environment", "moon")][..],
        &[("scope", "monitors:read")],
        &[("scope", "monitors:*"), ("environment", "production")],
        &[("scope", "monitors:read"), ("public", "true")],
        &[("scope", "monitors:read"), ("environment", "production"), ("mode", "of")],
    ] {
        let refused = EnvoyCheck::with_route_extensions(extensions)
            .with_bearer(&made.token)
            .expect_denied(&server)
            .await;
        assert_eq!((refused.status, refused.code, refused.fault), (503, 14, true), "{extensions:?}");
        assert_eq!((refused.reason(), refused.headers["retry-after"].as_str()), ("misconfigured", "1"));
        assert!(refused.body.contains("UNAVAILABLE"), "{}", refused.body);
    }
}

#[tokio::test]
async fn a_path_that_can_be_read_in_two_ways_is_refused_whatever_the_route() {
    let (server, made) = server_with_key().await;
    for path in [
        "/a//b",
        "/public/../admin",
        "/a/%2e%2E/b",
        "/a%2Fb",
        "/a\\b",
        "/a/..;/b",
        "/a;b",
        "/%252e/",
        "a",
        "/a%00",
    ] {
        for ask in [EnvoyCheck::monitors_request(), EnvoyCheck::with_route_extensions(&[("public", "true")])]
        {
            let refused = ask.with_path(path).with_bearer(&made.token).expect_denied(&server).await;
            assert_eq!((refused.status, refused.code, refused.reason()), (400, 3, "bad_request"), "{path}");
            assert!(refused.body.contains(r#""code":"BAD_REQUEST""#), "{}", refused.body);
        }
    }
    for host in ["", "a b", "user@host", "api.test:x"] {
        assert_eq!(
            EnvoyCheck::monitors_request().with_host(host).expect_denied(&server).await.status,
            400,
            "{host}"
        );
    }
    let mut raw = EnvoyCheck::monitors_request();
    raw.http.path = b"/caf\xe9".as_slice().into();
    assert_eq!(raw.expect_denied(&server).await.status, 400);
}

#[tokio::test]
async fn rules_by_method_are_not_evaded_by_a_header_or_by_case() {
    let rules = r#"
        [defaults]
        hosts = ["*"]
        environment = "production"
        [[rule]]
        methods = ["DELETE"]
        path = "/v1/**"
        scope = "monitors:write"
        [[rule]]
        methods = ["GET", "POST"]
        path = "/v1/**"
        scope = "monitors:read"
    "#;
    let (server, _folder) = server_with_rules(rules).await;
    let made = server.create_key(service_key_request("acme", &["monitors:read"])).await;
    let ask = |method: &str| EnvoyCheck::get("/v1/monitors").with_method(method).with_bearer(&made.token);
    ask("GET").expect_allowed(&server).await;
    ask("HEAD").expect_allowed(&server).await;
    for method in ["DELETE", "delete"] {
        assert_eq!(ask(method).expect_denied(&server).await.reason(), "missing_scope", "{method}");
    }
    assert_eq!(ask("PATCH").expect_denied(&server).await.reason(), "no_rule");
    for name in ["x-http-method-override", "x_http_method_override", "x.method-override"] {
        let tunnelled = ask("POST").with_header(name, "DELETE").expect_denied(&server).await;
        assert_eq!(tunnelled.reason(), "bad_request", "{name}");
    }
}

#[tokio::test]
async fn raw_headers_are_read_like_joined_ones() {
    let (server, made) = server_with_key().await;
    let raw = |values: &[(&str, &[u8])]| {
        let mut ask = EnvoyCheck::monitors_request();
        let headers = values.iter().map(|(name, value)| EnvoyHeaderValue {
            key: (*name).to_owned().into(),
            raw_value: value.to_vec().into(),
            ..EnvoyHeaderValue::default()
        });
        ask.http.header_map = Some(EnvoyHeaderMap { headers: headers.collect() });
        ask
    };
    let bearer = format!("Bearer {}", made.token);
    raw(&[("authorization", bearer.as_bytes())]).expect_allowed(&server).await;
    let twice = raw(&[("authorization", bearer.as_bytes()), ("authorization", b"Bearer x")]);
    assert_eq!(twice.expect_denied(&server).await.reason(), "many_credentials");
    let odd = raw(&[("authorization", b"Bearer caf\xe9")]).expect_denied(&server).await;
    assert_eq!((odd.status, odd.reason()), (401, "malformed"));
}

#[tokio::test]
async fn heaps_of_headers_are_read_and_too_much_is_refused_before_it_is_read() {
    let (server, made) = server_with_key().await;
    let mut heap = EnvoyCheck::monitors_request().with_bearer(&made.token);
    for number in 0..100 {
        heap = heap.with_header(&format!("x-{number}"), vec![b'a'; 600]);
    }
    heap.clone().expect_allowed(&server).await;
    let bomb = heap
        .clone()
        .with_header("authorization", vec![b'a'; 60 * 1024])
        .with_header("x", vec![b'a'; 10 * 1024]);
    assert_refused(bomb.try_send(&server).await, Code::InvalidArgument, "INVALID_REQUEST");
    let long = EnvoyCheck::monitors_request().with_bearer(&"a".repeat(10_000)).expect_denied(&server).await;
    assert_eq!((long.status, long.reason()), (401, "malformed"));
}

#[tokio::test]
async fn a_question_about_nothing_is_no_denial() {
    let (server, _) = server_with_key().await;
    let without_http = EnvoyAttributeContext {
        request: Some(EnvoyRequest { http: None }),
        ..EnvoyAttributeContext::default()
    };
    for attributes in [None, Some(EnvoyAttributeContext::default()), Some(without_http)] {
        let status = assert_refused(
            send_check(&server.root_client(), EnvoyCheckRequest { attributes }).await,
            Code::InvalidArgument,
            "INVALID_REQUEST",
        );
        assert_eq!(violated_fields(&status), ["attributes.request.http"]);
    }
    let empty = EnvoyAttributeContext {
        request: Some(EnvoyRequest { http: Some(EnvoyHttpRequest::default()) }),
        ..EnvoyAttributeContext::default()
    };
    let answer =
        send_check(&server.root_client(), EnvoyCheckRequest { attributes: Some(empty) }).await.unwrap();
    assert_eq!(DeniedAnswer::from(answer).status, 400);
}

/// The messages that we read by hand are the proto's.
#[test]
fn what_is_read_by_hand_has_the_numbers_and_types_of_the_proto() {
    let set = prost_types::FileDescriptorSet::decode(pb::FILE_DESCRIPTOR_SET).unwrap();
    let mut numbers = BTreeMap::new();
    for file in &set.file {
        let mut waiting: Vec<_> =
            file.message_type.iter().map(|message| (file.package().to_owned(), message)).collect();
        while let Some((outer, message)) = waiting.pop() {
            let name = format!("{outer}.{}", message.name());
            waiting.extend(message.nested_type.iter().map(|nested| (name.clone(), nested)));
            for field in &message.field {
                let kind = field.type_name().rsplit('.').next().unwrap().to_owned();
                numbers.insert(format!("{name}.{}", field.name()), (field.number(), kind));
            }
        }
    }
    const AUTH: &str = "envoy.service.auth.v3";
    const CORE: &str = "envoy.config.core.v3";
    for (field, number, kind) in [
        (format!("{AUTH}.CheckRequest.attributes"), 1, "AttributeContext"),
        (format!("{AUTH}.AttributeContext.source"), 1, "Peer"),
        (format!("{AUTH}.AttributeContext.request"), 4, "Request"),
        (format!("{AUTH}.AttributeContext.context_extensions"), 10, "ContextExtensionsEntry"),
        (format!("{AUTH}.AttributeContext.Peer.address"), 1, "Address"),
        (format!("{AUTH}.AttributeContext.Request.http"), 2, "HttpRequest"),
        (format!("{AUTH}.AttributeContext.HttpRequest.id"), 1, ""),
        (format!("{AUTH}.AttributeContext.HttpRequest.method"), 2, ""),
        (format!("{AUTH}.AttributeContext.HttpRequest.headers"), 3, "HeadersEntry"),
        (format!("{AUTH}.AttributeContext.HttpRequest.path"), 4, ""),
        (format!("{AUTH}.AttributeContext.HttpRequest.host"), 5, ""),
        (format!("{AUTH}.AttributeContext.HttpRequest.header_map"), 13, "HeaderMap"),
        (format!("{CORE}.Address.socket_address"), 1, "SocketAddress"),
        (format!("{CORE}.SocketAddress.address"), 2, ""),
        (format!("{CORE}.HeaderMap.headers"), 1, "HeaderValue"),
        (format!("{CORE}.HeaderValue.key"), 1, ""),
        (format!("{CORE}.HeaderValue.value"), 2, ""),
        (format!("{CORE}.HeaderValue.raw_value"), 3, ""),
    ] {
        assert_eq!(numbers[&field], (number, kind.to_owned()), "{field}");
    }
}
