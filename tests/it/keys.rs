//! KeyService: making and showing keys. What changes them is in `keys_change.rs` and `rotation.rs`.

use std::collections::BTreeMap;

use keyward::{
    domain::token,
    pb::{self, KeyState, Reason},
};
use tonic::{Code, Status};

use crate::support::{
    START, Server, assert_invalid, assert_refused, authenticate_request, named_key_request, proto_seconds,
    scope_check_request, service_key_request, to_strings,
};

fn timestamp(seconds: i64) -> Option<prost_types::Timestamp> {
    Some(prost_types::Timestamp { seconds, nanos: 0 })
}

#[tokio::test(flavor = "multi_thread")]
async fn create_answers_with_the_key_its_token_and_its_revision() {
    let server = Server::with_accounts().await;
    let request = pb::CreateKeyRequest {
        customers: to_strings(&["c1"]),
        allowed_cidrs: to_strings(&["10.0.0.0/8"]),
        rate_limits: vec![pb::RateLimit { name: "fast".into(), limit: 5, window: Some(proto_seconds(60)) }],
        quota: Some(pb::Quota { limit: 9, period: pb::QuotaPeriod::Month.into() }),
        metadata: BTreeMap::from([("team".to_owned(), "core".to_owned())]),
        ..named_key_request("acme", "CI")
    };
    let root = server.root_client().who_am_i().await.unwrap().key.unwrap();
    let made = server.root_client().create(request.clone()).await.unwrap();
    let key = made.key.unwrap();
    assert!(!made.token.is_empty() && !made.replayed);
    assert_eq!(made.revision, key.revision);
    assert_eq!(made.revision, root.revision + 3, "two accounts, then the key");
    let secret = pb::Secret {
        version: 1,
        hint: key.hint.clone(),
        created_at: timestamp(START),
        expires_at: None,
        last_used_at: None,
    };
    let expected = pb::Key {
        id: key.id.clone(),
        account: "acme".into(),
        environment: "production".into(),
        name: "CI".into(),
        hint: made.token[..key.hint.len()].to_owned(),
        scopes: request.scopes,
        customers: request.customers,
        allowed_cidrs: request.allowed_cidrs,
        rate_limits: request.rate_limits,
        quota: request.quota,
        metadata: request.metadata,
        state: KeyState::Active.into(),
        created_at: timestamp(START),
        created_by: root.id,
        updated_at: timestamp(START),
        secrets: vec![secret],
        revision: made.revision,
        ..pb::Key::default()
    };
    assert_eq!(key, expected);
    assert_eq!(server.root_client().get(&key.id).await.unwrap(), expected, "and Get answers the same");
}

/// What `token::TOKEN_PATTERN` says, by hand.
fn matches_the_published_pattern(text: &str) -> bool {
    assert_eq!(token::TOKEN_PATTERN, "^[a-z][a-z0-9_]{0,32}_[0-9A-Za-z]{49}$");
    let (head, body) = text.rsplit_once('_').unwrap_or_default();
    let word = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
    head.starts_with(|c: char| c.is_ascii_lowercase())
        && head.len() <= 33
        && head.chars().all(word)
        && body.len() == 49
        && body.chars().all(|c| c.is_ascii_alphanumeric())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_has_the_published_form_with_its_prefix_and_the_tag_of_its_environment() {
    let server = Server::with_accounts().await;
    for (environment, prefix, start) in [
        ("production", None, "kw_live_"),
        ("staging", None, "kw_staging_"),
        ("development", None, "kw_dev_"),
        ("production", Some("izli_sk"), "izli_sk_live_"),
        ("staging", Some("abcdefghijklmnop"), "abcdefghijklmnop_staging_"),
    ] {
        let request = pb::CreateKeyRequest {
            environment: environment.into(),
            prefix: prefix.map(str::to_owned),
            ..service_key_request("acme", &["monitors:read"])
        };
        let made = server.create_key(request).await;
        let body = made.token.strip_prefix(start).unwrap_or_else(|| panic!("does not start with {start}"));
        assert!(body.len() == 49 && matches_the_published_pattern(&made.token));
        assert!(token::can_be_token(&made.token) && !token::has_wrong_checksum(&made.token));
        assert_eq!(made.key.hint, made.token[..start.len() + 4], "prefix, tag and four characters");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_environment_without_a_tag_gives_tokens_of_prefix_and_body() {
    let server = Server::start_with(|settings| {
        let environment = keyward::domain::account::Environment {
            name: keyward::domain::name::EnvironmentName::parse("prod").unwrap(),
            tag: keyward::domain::name::TokenTag::parse("").unwrap(),
        };
        settings.key_settings.environments =
            keyward::domain::account::EnvironmentSet::new(vec![environment]).unwrap();
        settings.key_settings.prefix = keyward::domain::name::TokenPrefix::parse("izli_agent").unwrap();
    })
    .await;
    server.create_account("acme").await;
    let request = pb::CreateKeyRequest {
        environment: "prod".into(),
        ..service_key_request("acme", &["monitors:read"])
    };
    let made = server.create_key(request).await;
    assert_eq!(made.token.len(), "izli_agent_".len() + 49);
    assert_eq!(made.key.hint, made.token[.."izli_agent_".len() + 4]);
    let rotated = server.root_client().rotate(&made.id, 0).await.unwrap();
    assert_eq!(rotated.token.len(), made.token.len());
    assert!(rotated.token.starts_with("izli_agent_"));
}

#[tokio::test(flavor = "multi_thread")]
async fn no_two_tokens_or_ids_are_the_same() {
    let server = Server::with_accounts().await;
    let mut seen = std::collections::HashSet::new();
    for _ in 0..50 {
        let made = server.create_key(service_key_request("acme", &["monitors:read"])).await;
        assert!(seen.insert(made.token) && seen.insert(made.id));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_word_all_is_kept_as_a_star() {
    let server = Server::with_accounts().await;
    let made = server.create_key(service_key_request("acme", &["all"])).await;
    assert_eq!(made.key.scopes, ["*"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_can_be_given_roles_alone() {
    let server = Server::with_accounts().await;
    server.root_client().put_role("acme", "agent", &["monitors:read"]).await.unwrap();
    let request = pb::CreateKeyRequest { roles: to_strings(&["agent"]), ..service_key_request("acme", &[]) };
    let made = server.create_key(request).await;
    assert_eq!(made.key.roles, ["agent"]);
    assert!(
        server.root_client().check(scope_check_request(&made.token, "monitors:read")).await.unwrap().allowed
    );
    let request = pb::CreateKeyRequest { roles: to_strings(&["nobody"]), ..service_key_request("acme", &[]) };
    let status = server.root_client().create(request).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_is_optional_and_many_keys_may_have_none() {
    let server = Server::with_accounts().await;
    for _ in 0..2 {
        assert_eq!(server.create_key(service_key_request("acme", &["monitors:read"])).await.key.name, "");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_is_taken_within_its_account_until_the_key_is_revoked() {
    let server = Server::with_accounts().await;
    let root = server.root_client();
    let first = server.create_key(named_key_request("acme", "CI")).await;
    let taken = || async { root.create(named_key_request("acme", "CI")).await };
    let status = assert_refused(taken().await, Code::AlreadyExists, "KEY_NAME_TAKEN");
    assert_eq!(status.message(), "An API key with this name already exists");

    server.create_key(named_key_request("other", "CI")).await;
    server.create_key(named_key_request("acme", "ci")).await;
    let staging = pb::CreateKeyRequest { environment: "staging".into(), ..named_key_request("acme", "CI") };
    assert_refused(root.create(staging).await, Code::AlreadyExists, "KEY_NAME_TAKEN");

    root.disable(&first.id).await.unwrap();
    assert_refused(taken().await, Code::AlreadyExists, "KEY_NAME_TAKEN");
    root.revoke(&first.id).await.unwrap();
    taken().await.unwrap();
    assert_refused(taken().await, Code::AlreadyExists, "KEY_NAME_TAKEN");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_expired_key_keeps_its_name() {
    let server = Server::with_accounts().await;
    let request = pb::CreateKeyRequest { ttl: Some(proto_seconds(10)), ..named_key_request("acme", "CI") };
    let made = server.create_key(request).await;
    server.advance(10);
    assert_refused(
        server.root_client().create(named_key_request("acme", "CI")).await,
        Code::AlreadyExists,
        "KEY_NAME_TAKEN",
    );
    server.root_client().revoke(&made.id).await.unwrap();
    server.root_client().create(named_key_request("acme", "CI")).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn no_answer_but_the_first_shows_a_token() {
    let server = Server::with_accounts().await;
    let root = server.root_client();
    let made = server.create_key(named_key_request("acme", "CI")).await;
    let list = pb::ListKeysRequest { account: "acme".into(), ..Default::default() };
    let secret = &made.token[made.key.hint.len()..];
    for answer in [
        format!("{:?}", root.get(&made.id).await.unwrap()),
        format!("{:?}", root.list(list).await.unwrap()),
        format!("{:?}", root.lookup(&made.token).await.unwrap()),
        format!("{:?}", root.check(authenticate_request(&made.token)).await.unwrap()),
        format!("{:?}", server.client_with_token(&made.token).who_am_i().await.unwrap()),
        format!("{:?}", root.disable(&made.id).await.unwrap()),
        format!("{:?}", root.revoke(&made.id).await.unwrap()),
    ] {
        assert!(answer.contains(&made.id) && !answer.contains(secret), "{answer}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn lookup_finds_the_key_of_a_token_and_which_secret_it_is() {
    let server = Server::with_accounts().await;
    let root = server.root_client();
    let made = server.create_key(named_key_request("acme", "CI")).await;
    let new = root.rotate(&made.id, 60).await.unwrap();
    for (token, version) in [(&made.token, 1), (&new.token, 2)] {
        let found = root.lookup(token).await.unwrap();
        assert_eq!((found.key.unwrap().id, found.secret_version), (made.id.clone(), version));
    }
    root.revoke(&made.id).await.unwrap();
    assert_eq!(root.lookup(&made.token).await.unwrap().key.unwrap().state(), KeyState::Revoked);
    assert_refused(root.lookup("kw_live_nothing").await, Code::NotFound, "KEY_NOT_FOUND");
}

#[tokio::test(flavor = "multi_thread")]
async fn another_accounts_token_is_not_found_by_lookup() {
    let server = Server::with_accounts().await;
    let made = server.create_key(named_key_request("other", "CI")).await;
    let acme = server.client_with_scopes("acme", &["keyward:keys:read"]).await;
    let theirs = acme.lookup(&made.token).await.unwrap_err();
    let nobodys = acme.lookup("sk-123").await.unwrap_err();
    assert_refused(Err::<(), _>(theirs.clone()), Code::NotFound, "KEY_NOT_FOUND");
    assert_eq!((theirs.message(), theirs.details()), (nobodys.message(), nobodys.details()));
}

#[tokio::test(flavor = "multi_thread")]
async fn expires_at_and_ttl_say_the_same_instant() {
    let server = Server::with_accounts().await;
    let at = pb::CreateKeyRequest {
        expires_at: Some(server.timestamp_after(60)),
        ..named_key_request("acme", "at")
    };
    let ttl = pb::CreateKeyRequest { ttl: Some(proto_seconds(60)), ..named_key_request("acme", "ttl") };
    for request in [at, ttl] {
        let made = server.create_key(request).await;
        assert_eq!(made.key.expires_at, timestamp(START + 60));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_am_i_tells_any_bearer_its_key_and_account() {
    let server = Server::with_accounts().await;
    let made = server.create_key(named_key_request("acme", "CI")).await;
    let answer = server.client_with_token(&made.token).who_am_i().await.unwrap();
    assert_eq!(answer.account, Some(pb::AccountName { id: "acme".into(), name: "acme".into() }));
    let key = answer.key.unwrap();
    assert_eq!((key.id, key.scopes), (made.id.clone(), made.key.scopes));
    server.root_client().disable(&made.id).await.unwrap();
    assert_refused(
        server.client_with_token(&made.token).who_am_i().await,
        Code::Unauthenticated,
        "UNAUTHENTICATED",
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn the_last_use_of_a_key_shows_at_once_and_by_secret() {
    let server = Server::with_accounts().await;
    let root = server.root_client();
    let made = server.create_key(named_key_request("acme", "CI")).await;
    let new = root.rotate(&made.id, 60).await.unwrap();
    assert_eq!(new.key.unwrap().last_used_at, None);
    server.advance(5);
    assert_eq!(root.check_reason(&new.token).await, Reason::Ok);
    server.advance(5);
    assert_eq!(root.check_reason(&made.token).await, Reason::Ok);
    let key = root.get(&made.id).await.unwrap();
    assert_eq!(key.last_used_at, timestamp(START + 10));
    let used: Vec<_> = key.secrets.iter().map(|secret| (secret.version, secret.last_used_at)).collect();
    assert_eq!(used, [(2, timestamp(START + 5)), (1, timestamp(START + 10))]);
    let list = pb::ListKeysRequest { account: "acme".into(), ..Default::default() };
    assert_eq!(root.list(list).await.unwrap().keys, [key]);
}

#[tokio::test(flavor = "multi_thread")]
async fn neither_a_dry_run_nor_a_denied_check_nor_a_look_is_a_use() {
    let server = Server::with_accounts().await;
    let root = server.root_client();
    let made = server.create_key(named_key_request("acme", "CI")).await;
    let dry = pb::CheckRequest { dry_run: true, ..authenticate_request(&made.token) };
    assert!(root.check(dry).await.unwrap().allowed);
    assert!(!root.check(scope_check_request(&made.token, "alerts:read")).await.unwrap().allowed);
    root.lookup(&made.token).await.unwrap();
    assert_eq!(root.get(&made.id).await.unwrap().last_used_at, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_account_caller_may_leave_its_account_out_and_names_no_other() {
    let server = Server::with_accounts().await;
    let acme = server.client_with_scopes("acme", &["keyward:keys:*", "monitors:*"]).await;
    let made = acme.create_key(service_key_request("", &["monitors:read"])).await;
    assert_eq!(made.key.account, "acme");
    let other = acme.create(service_key_request("other", &["monitors:read"])).await;
    assert_refused(other, Code::NotFound, "ACCOUNT_NOT_FOUND");
    let nowhere = acme.create(service_key_request("nowhere", &["monitors:read"])).await;
    assert_refused(nowhere, Code::NotFound, "ACCOUNT_NOT_FOUND");
    let of_other = pb::ListKeysRequest { account: "other".into(), ..Default::default() };
    assert_refused(acme.list(of_other).await, Code::NotFound, "ACCOUNT_NOT_FOUND");
    let own = acme.list(pb::ListKeysRequest::default()).await.unwrap().keys;
    assert!(own.iter().all(|key| key.account == "acme") && own.len() == 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_account_caller_may_leave_the_environment_out_and_means_its_own_keys() {
    let server = Server::with_accounts().await;
    let staging = pb::CreateKeyRequest {
        environment: "staging".into(),
        ..service_key_request("acme", &["keyward:keys:*", "monitors:*"])
    };
    let staging = server.create_key(staging).await;
    let made = server.client_with_token(&staging.token).create_key(nowhere()).await;
    assert_eq!(made.key.environment, "staging");
    assert!(made.token.starts_with("kw_staging_"), "and its tag");
    assert_invalid(
        server.root_client().create(pb::CreateKeyRequest { account: "acme".into(), ..nowhere() }).await,
        &["environment"],
    );
}

/// A key without an account and an environment.
fn nowhere() -> pb::CreateKeyRequest {
    pb::CreateKeyRequest { environment: String::new(), ..service_key_request("", &["monitors:read"]) }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operator_must_say_whose_key_it_means() {
    let server = Server::with_accounts().await;
    let root = server.root_client();
    assert_invalid(root.create(service_key_request("", &["monitors:read"])).await, &["account"]);
    assert_invalid(root.list(pb::ListKeysRequest::default()).await, &["account"]);
    let missing = root.create(service_key_request("nowhere", &["monitors:read"])).await;
    assert_refused(missing, Code::NotFound, "ACCOUNT_NOT_FOUND");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_id_that_is_no_uuid_is_invalid_everywhere() {
    let server = Server::with_accounts().await;
    let root = server.root_client();
    for id in ["", "x", "0198", "00000000-0000-0000-0000-00000000000g"] {
        let answers: [Result<(), Status>; 5] = [
            root.get(id).await.map(drop),
            root.disable(id).await.map(drop),
            root.enable(id).await.map(drop),
            root.revoke(id).await.map(drop),
            root.rotate(id, 0).await.map(drop),
        ];
        for answer in answers {
            assert_invalid(answer, &["id"]);
        }
        assert_invalid(root.finish_rotation(id).await, &["id"]);
        let key = pb::Key { id: id.to_owned(), ..pb::Key::default() };
        assert_invalid(root.update(&key, &["name"]).await, &["key.id"]);
    }
}
