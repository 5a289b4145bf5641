//! Requests that break a rule: every violation is told at once, by the name of its field, and each stated limit
//! lies exactly where it is stated.

use std::collections::BTreeMap;

use keyward::pb;
use tonic::Code;

use crate::support::{
    Client, DAY, Server, assert_invalid, named_key_request, proto_seconds, service_key_request, to_strings,
    violated_fields,
};

/// Holds that Create refuses the request for this field alone; it is good otherwise.
async fn wrong(root: &Client, field: &str, change: impl FnOnce(&mut pb::CreateKeyRequest)) {
    let mut request = service_key_request("acme", &["monitors:read"]);
    change(&mut request);
    assert_invalid(root.create(request).await, &[field]);
}

async fn right(root: &Client, change: impl FnOnce(&mut pb::CreateKeyRequest)) {
    let mut request = service_key_request("acme", &["monitors:read"]);
    change(&mut request);
    root.create_key(request).await;
}

fn numbered(count: usize) -> Vec<String> {
    (0..count).map(|at| format!("c{at}")).collect()
}

fn limit(name: &str, limit: u64, window: Option<prost_types::Duration>) -> pb::RateLimit {
    pb::RateLimit { name: name.to_owned(), limit, window }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_violation_of_a_request_is_told_at_once() {
    let server = Server::with_accounts().await;
    let request = pb::CreateKeyRequest {
        account: "ACME Ltd".into(),
        user: String::new(),
        environment: "prod".into(),
        name: Some(String::new()),
        scopes: to_strings(&["good", "bad scope", "*:bad"]),
        roles: to_strings(&["A"]),
        expires_at: Some(server.timestamp_after(0)),
        ttl: Some(proto_seconds(1)),
        prefix: Some("9".into()),
        customers: to_strings(&[""]),
        allowed_cidrs: to_strings(&["10.0.0.0/33"]),
        rate_limits: vec![limit("", 0, None)],
        quota: Some(pb::Quota { limit: 0, period: 0 }),
        metadata: BTreeMap::from([("a".to_owned(), "b".repeat(4096))]),
        idempotency_key: Some("with space".into()),
    };
    let status = server.root_client().create(request).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    let mut told = violated_fields(&status);
    told.sort();
    let expected = [
        "account",
        "allowed_cidrs[0]",
        "customers[0]",
        "environment",
        "expires_at",
        "idempotency_key",
        "metadata",
        "name",
        "prefix",
        "quota.limit",
        "quota.period",
        "rate_limits[0].limit",
        "rate_limits[0].name",
        "rate_limits[0].window",
        "roles[0]",
        "scopes[1]",
        "scopes[2]",
        "ttl",
    ];
    assert_eq!(told, expected);
    let message = status.message();
    let named = expected.iter().filter(|field| message.contains(&format!(" {field}: "))).count();
    let omitted = format!("; and {} more violations", expected.len() - named);
    assert!(named >= 5 && message.ends_with(&omitted), "as many as fit are in the message too: {message}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_request_changes_nothing() {
    let server = Server::with_accounts().await;
    let head = || async {
        server.root_client().list_audit_entries(pb::ListAuditEntriesRequest::default()).await.unwrap().entries
            [0]
        .revision
    };
    let before = head().await;
    wrong(&server.root_client(), "environment", |r| r.environment.clear()).await;
    assert_eq!(head().await, before);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_belongs_to_an_account_or_a_user() {
    let server = Server::with_accounts().await;
    let root = server.root_client();
    wrong(&root, "user", |r| r.user = "ann".into()).await;
    wrong(&root, "account", |r| r.account.clear()).await;
    wrong(&root, "account", |r| r.account = "a".repeat(65)).await;
    wrong(&root, "user", |r| (r.account, r.user) = (String::new(), "a b".into())).await;
    wrong(&root, "user", |r| (r.account, r.user) = (String::new(), "a".repeat(129))).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_environment_is_one_of_those_that_are_configured() {
    let server = Server::with_accounts().await;
    for environment in ["", "prod", "Production", "production "] {
        wrong(&server.root_client(), "environment", |r| r.environment = environment.into()).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_has_1_to_255_characters() {
    let server = Server::with_accounts().await;
    let root = server.root_client();
    wrong(&root, "name", |r| r.name = Some(String::new())).await;
    wrong(&root, "name", |r| r.name = Some("é".repeat(256))).await;
    for name in
        ["a\nb", " a", "a\u{a0}", "a\u{202e}b", "\u{200b}", "a\u{85}", "a\u{e000}", "a\u{378}", "a\u{2028}b"]
    {
        wrong(&root, "name", |r| r.name = Some(name.into())).await;
    }
    right(&root, |r| r.name = Some("é".repeat(255))).await;
    right(&root, |r| r.name = Some("a".into())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn there_are_1_to_256_scopes_of_up_to_128_characters_and_four_segments() {
    let server = Server::with_accounts().await;
    let root = server.root_client();
    wrong(&root, "scopes", |r| r.scopes.clear()).await;
    wrong(&root, "scopes", |r| r.scopes = numbered(257)).await;
    right(&root, |r| r.scopes = numbered(256)).await;
    for scope in
        ["", ":", "a:", ":a", "a::b", "a:b:c:d:e", "a b", "é", "a:*:b", "**", "a*", "a:*b", &"a".repeat(129)]
    {
        wrong(&root, "scopes[0]", |r| r.scopes = to_strings(&[scope])).await;
    }
    for scope in ["a", "A.b_c-9", "repo/write", "/:/", "a:b:c:d", "a:b:c:*", "*", "all", &"a".repeat(128)] {
        right(&root, |r| r.scopes = to_strings(&[scope])).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn there_are_at_most_16_roles() {
    let server = Server::with_accounts().await;
    let root = server.root_client();
    for name in numbered(17) {
        root.put_role("acme", &name, &["monitors:read"]).await.unwrap();
    }
    wrong(&root, "roles", |r| r.roles = numbered(17)).await;
    wrong(&root, "roles[0]", |r| r.roles = to_strings(&["Not A Role"])).await;
    right(&root, |r| r.roles = numbered(16)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_expiry_lies_in_the_future() {
    let server = Server::with_accounts().await;
    let root = server.root_client();
    for at in [-1, 0] {
        wrong(&root, "expires_at", |r| r.expires_at = Some(server.timestamp_after(at))).await;
    }
    let nonsense = [(253_402_300_800, 0), (0, -1), (0, 1_000_000_000), (i64::MAX, 0), (i64::MIN, 0)];
    for (seconds, nanos) in nonsense {
        wrong(&root, "expires_at", |r| r.expires_at = Some(prost_types::Timestamp { seconds, nanos })).await;
    }
    let last = prost_types::Timestamp { seconds: 253_402_300_799, nanos: 999_999_999 };
    right(&root, |r| r.expires_at = Some(last)).await;
    right(&root, |r| r.expires_at = Some(server.timestamp_after(1))).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_ttl_is_one_second_to_100_years_and_stands_alone() {
    let server = Server::with_accounts().await;
    let root = server.root_client();
    let nanos = |seconds, nanos| Some(prost_types::Duration { seconds, nanos });
    for ttl in [nanos(0, 0), nanos(0, 999_999_999), nanos(-1, 0), nanos(i64::MAX, 0), nanos(1, -1)] {
        wrong(&root, "ttl", |r| r.ttl = ttl).await;
    }
    wrong(&root, "ttl", |r| r.ttl = Some(proto_seconds(101 * 366 * DAY))).await;
    wrong(&root, "ttl", |r| {
        (r.ttl, r.expires_at) = (Some(proto_seconds(60)), Some(server.timestamp_after(60)))
    })
    .await;
    right(&root, |r| r.ttl = Some(proto_seconds(1))).await;
    right(&root, |r| r.ttl = Some(proto_seconds(100 * 365 * DAY))).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prefix_is_1_to_16_of_a_z_0_9_and_underscore_and_starts_with_a_letter() {
    let server = Server::with_accounts().await;
    for prefix in ["", "9a", "_a", "A", "a-b", "abcdefghijklmnopq"] {
        wrong(&server.root_client(), "prefix", |r| r.prefix = Some(prefix.into())).await;
    }
    for prefix in ["a", "a_9", "abcdefghijklmnop"] {
        right(&server.root_client(), |r| r.prefix = Some(prefix.into())).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn there_are_at_most_64_customers_of_up_to_128_visible_characters() {
    let server = Server::with_accounts().await;
    let root = server.root_client();
    wrong(&root, "customers", |r| r.customers = numbered(65)).await;
    for customer in ["", "a b", "é", &"a".repeat(129)] {
        wrong(&root, "customers[1]", |r| r.customers = to_strings(&["c", customer])).await;
    }
    right(&root, |r| r.customers = numbered(64)).await;
    right(&root, |r| r.customers = vec!["~".repeat(128)]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn there_are_at_most_64_networks() {
    let server = Server::with_accounts().await;
    let root = server.root_client();
    let nets = |count: u8| (0..count).map(|at| format!("10.{at}.0.0/16")).collect::<Vec<_>>();
    wrong(&root, "allowed_cidrs", |r| r.allowed_cidrs = nets(65)).await;
    for net in ["", "10.0.0.0/33", "10.0.0/8", "2001:db8::/129", "localhost", "::ffff:10.0.0.0/104"] {
        wrong(&root, "allowed_cidrs[0]", |r| r.allowed_cidrs = to_strings(&[net])).await;
    }
    right(&root, |r| r.allowed_cidrs = nets(64)).await;
    right(&root, |r| r.allowed_cidrs = to_strings(&["10.0.0.1", "2001:db8::/32", "0.0.0.0/0"])).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn there_are_at_most_8_rate_limits_with_different_names() {
    let server = Server::with_accounts().await;
    let root = server.root_client();
    let minute = Some(proto_seconds(60));
    let many = |count: usize| numbered(count).iter().map(|name| limit(name, 1, minute)).collect::<Vec<_>>();
    wrong(&root, "rate_limits", |r| r.rate_limits = many(9)).await;
    right(&root, |r| r.rate_limits = many(8)).await;
    wrong(&root, "rate_limits[1].name", |r| {
        r.rate_limits = vec![limit("a", 1, minute), limit("a", 2, minute)]
    })
    .await;
    for name in ["", "A", "a b", "quota", &"a".repeat(65)] {
        wrong(&root, "rate_limits[0].name", |r| r.rate_limits = vec![limit(name, 1, minute)]).await;
    }
    for units in [0, 1_000_000_001, u64::MAX] {
        wrong(&root, "rate_limits[0].limit", |r| r.rate_limits = vec![limit("a", units, minute)]).await;
    }
    for window in [0, DAY + 1] {
        let window = Some(proto_seconds(window));
        wrong(&root, "rate_limits[0].window", |r| r.rate_limits = vec![limit("a", 1, window)]).await;
    }
    wrong(&root, "rate_limits[0].window", |r| r.rate_limits = vec![limit("a", 1, None)]).await;
    let bounds = vec![
        limit(&"a".repeat(64), 1_000_000_000, Some(proto_seconds(DAY))),
        limit("b", 1, Some(proto_seconds(1))),
    ];
    right(&root, |r| r.rate_limits = bounds).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_quota_is_1_to_10_to_the_12_units_of_a_known_period() {
    let server = Server::with_accounts().await;
    let root = server.root_client();
    let quota = |limit, period| Some(pb::Quota { limit, period });
    for limit in [0, 1_000_000_000_001, u64::MAX] {
        wrong(&root, "quota.limit", |r| r.quota = quota(limit, 1)).await;
    }
    for period in [0, 5, -1] {
        wrong(&root, "quota.period", |r| r.quota = quota(1, period)).await;
    }
    right(&root, |r| r.quota = quota(1_000_000_000_000, pb::QuotaPeriod::Total.into())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn metadata_has_up_to_4_kib_of_names_and_values() {
    let server = Server::with_accounts().await;
    let root = server.root_client();
    let metadata = |size: usize| BTreeMap::from([("name".to_owned(), "v".repeat(size - 4))]);
    wrong(&root, "metadata", |r| r.metadata = metadata(4097)).await;
    right(&root, |r| r.metadata = metadata(4096)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn metadata_has_names_as_keys_have_and_values_of_several_lines() {
    let server = Server::with_accounts().await;
    let root = server.root_client();
    let pairs = |pairs: &[(&str, &str)]| -> BTreeMap<String, String> {
        pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    };
    for bad in [
        &[("", "v")][..],
        &[(" team", "v")],
        &[("te\u{200b}am", "v")],
        &[("te\nam", "v")],
        &[("team", "\u{1b}[2J")],
        &[("team", "\u{9b}2J")],
        &[("team", "a\u{202e}b")],
        &[("é", "v"), ("e\u{301}", "w")],
    ] {
        wrong(&root, "metadata", |r| r.metadata = pairs(bad)).await;
    }
    let mut request = service_key_request("acme", &["monitors:read"]);
    request.metadata = pairs(&[("e\u{301}quipe", "one\r\n\ttwo e\u{301} "), ("empty", "")]);
    let made = root.create_key(request).await;
    let kept = pairs(&[("équipe", "one\r\n\ttwo e\u{301} "), ("empty", "")]);
    assert_eq!(made.key.metadata, kept, "names are normalized, values are kept as they are");
    let status = root
        .create(pb::CreateKeyRequest {
            metadata: pairs(&[("team", "ab\u{202e}")]),
            ..service_key_request("acme", &["a"])
        })
        .await
        .unwrap_err();
    assert!(status.message().contains("value of \"team\" has U+202E at character 3"), "{status:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_comment_has_up_to_1024_characters_and_no_control_but_tabs_and_line_ends() {
    let server = Server::with_accounts().await;
    let root = server.root_client();
    let made = server.create_key(service_key_request("acme", &["monitors:read"])).await;
    for comment in ["é".repeat(1025), "\u{1b}c".to_owned(), "a\u{2066}".to_owned()] {
        let request =
            pb::RevokeKeyRequest { id: made.id.clone(), comment: comment.clone(), ..Default::default() };
        assert_invalid(root.keys().revoke(request).await, &["comment"]);
        let request = pb::BulkRevokeKeysRequest { account: "acme".into(), comment, ..Default::default() };
        assert_invalid(root.keys().bulk_revoke(request).await, &["comment"]);
    }
    let comment = "é\n".repeat(512);
    let request = pb::RevokeKeyRequest { id: made.id, comment: comment.clone(), ..Default::default() };
    let revoked = root.keys().revoke(request).await.unwrap().into_inner();
    assert_eq!(revoked.key.unwrap().revoke_comment, comment);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idempotency_key_has_1_to_128_visible_characters() {
    let server = Server::with_accounts().await;
    let root = server.root_client();
    for key in ["", "a b", "é", &"a".repeat(129)] {
        wrong(&root, "idempotency_key", |r| r.idempotency_key = Some(key.into())).await;
    }
    right(&root, |r| r.idempotency_key = Some("~".repeat(128))).await;
    let made = root.create_key(named_key_request("acme", "CI")).await;
    let rotate =
        pb::RotateKeyRequest { id: made.id, idempotency_key: Some(String::new()), ..Default::default() };
    assert_invalid(root.keys().rotate(rotate).await, &["idempotency_key"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_comment_has_up_to_1024_characters_and_a_reason_is_a_known_one() {
    let server = Server::with_accounts().await;
    let root = server.root_client();
    let made = root.create_key(named_key_request("acme", "CI")).await;
    let revoke = |reason, comment: String| {
        let (root, id) = (root.clone(), made.id.clone());
        async move { root.keys().revoke(pb::RevokeKeyRequest { id, reason, comment }).await }
    };
    assert_invalid(revoke(99, "x".repeat(1025)).await, &["reason", "comment"]);
    revoke(0, "é".repeat(1024)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn update_names_fields_as_they_lie_in_its_request() {
    let server = Server::with_accounts().await;
    let root = server.root_client();
    let made = root.create_key(named_key_request("acme", "CI")).await;
    let key = pb::Key {
        id: made.id.clone(),
        name: "a\nb".into(),
        scopes: to_strings(&["a b"]),
        roles: to_strings(&["A"]),
        expires_at: Some(server.timestamp_after(0)),
        customers: to_strings(&[""]),
        allowed_cidrs: to_strings(&["x"]),
        rate_limits: vec![limit("a", 0, Some(proto_seconds(1)))],
        quota: Some(pb::Quota { limit: 0, period: 1 }),
        metadata: BTreeMap::from([("a".to_owned(), "b".repeat(4096))]),
        ..pb::Key::default()
    };
    let all = [
        "name",
        "scopes",
        "roles",
        "expires_at",
        "customers",
        "allowed_cidrs",
        "rate_limits",
        "quota",
        "metadata",
    ];
    let mut told = violated_fields(&root.update(&key, &all).await.unwrap_err());
    told.sort();
    let expected = [
        "key.allowed_cidrs[0]",
        "key.customers[0]",
        "key.expires_at",
        "key.metadata",
        "key.name",
        "key.quota.limit",
        "key.rate_limits[0].limit",
        "key.roles[0]",
        "key.scopes[0]",
    ];
    assert_eq!(told, expected);
    let good = pb::Key { name: "fine".into(), ..key };
    root.update(&good, &["name"]).await.expect("what is not in the mask is not looked at");
    assert_eq!(root.get(&made.id).await.unwrap().name, "fine");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_list_is_asked_in_words_that_exist() {
    let server = Server::with_accounts().await;
    let root = server.root_client();
    let odd = prost_types::Timestamp { seconds: i64::MAX, nanos: 0 };
    let request = pb::ListKeysRequest {
        account: "acme".into(),
        environment: "prod".into(),
        states: vec![1, 0, 9],
        unused_since: Some(odd),
        expires_before: Some(odd),
        page_size: Some(0),
        page_token: "x".into(),
        ..Default::default()
    };
    let mut told = violated_fields(&root.list(request).await.unwrap_err());
    told.sort();
    let expected = [
        "environment",
        "expires_before",
        "page_size",
        "page_token",
        "states[1]",
        "states[2]",
        "unused_since",
    ];
    assert_eq!(told, expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_to_look_up_has_1_to_512_bytes() {
    let server = Server::start().await;
    let root = server.root_client();
    assert_invalid(root.lookup("").await, &["token"]);
    assert_invalid(root.lookup(&"x".repeat(513)).await, &["token"]);
    assert_eq!(root.lookup(&"x".repeat(512)).await.unwrap_err().code(), Code::NotFound);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_header_that_names_nothing_is_told_by_its_name() {
    let server = Server::with_accounts().await;
    for (header, value) in [("x-keyward-acting-user", "a b"), ("x-keyward-account", "a.b")] {
        let caller = server.root_client().with_header(header, value);
        assert_invalid(caller.who_am_i().await, &[header]);
        let twice = server.root_client().with_header(header, "a").with_header(header, "a");
        assert_invalid(twice.who_am_i().await, &[header]);
    }
}
