//! KeyService, but for rotation: making, showing, changing, refusing and ending keys.

use std::collections::BTreeMap;

use keyward::{
    domain::token,
    pb::{self, KeyState, Reason, RevokeReason},
};
use tonic::{Code, Status};

use crate::support::{
    DAY, START, Server, authenticate, check, invalid, named_key, refused, seconds, service_key, texts,
};

const PERSONAL: [&str; 2] = ["monitors:read", "monitors:write"];

fn timestamp(seconds: i64) -> Option<prost_types::Timestamp> {
    Some(prost_types::Timestamp { seconds, nanos: 0 })
}

#[tokio::test(flavor = "multi_thread")]
async fn create_answers_with_the_key_its_token_and_its_revision() {
    let server = Server::with_accounts().await;
    let request = pb::CreateKeyRequest {
        customers: texts(&["c1"]),
        allowed_cidrs: texts(&["10.0.0.0/8"]),
        rate_limits: vec![pb::RateLimit { name: "fast".into(), limit: 5, window: Some(seconds(60)) }],
        quota: Some(pb::Quota { limit: 9, period: pb::QuotaPeriod::Month.into() }),
        metadata: BTreeMap::from([("team".to_owned(), "core".to_owned())]),
        ..named_key("acme", "CI")
    };
    let root = server.root().who_am_i().await.unwrap().key.unwrap();
    let made = server.root().create(request.clone()).await.unwrap();
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
    assert_eq!(server.root().get(&key.id).await.unwrap(), expected, "and Get answers the same");
}

/// What `token::PATTERN` says, by hand.
fn matches_the_published_pattern(text: &str) -> bool {
    assert_eq!(token::PATTERN, "^[a-z][a-z0-9_]{0,32}_[0-9A-Za-z]{49}$");
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
            ..service_key("acme", &["monitors:read"])
        };
        let made = server.make(request).await;
        let body = made.token.strip_prefix(start).unwrap_or_else(|| panic!("does not start with {start}"));
        assert!(body.len() == 49 && matches_the_published_pattern(&made.token));
        assert_eq!(token::shape(&made.token), token::Shape::Plausible, "the checksum holds");
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
        settings.keys.environments = keyward::domain::account::Environments::new(vec![environment]).unwrap();
        settings.keys.prefix = keyward::domain::name::TokenPrefix::parse("izli_agent").unwrap();
    })
    .await;
    server.account("acme").await;
    let request =
        pb::CreateKeyRequest { environment: "prod".into(), ..service_key("acme", &["monitors:read"]) };
    let made = server.make(request).await;
    assert_eq!(made.token.len(), "izli_agent_".len() + 49);
    assert_eq!(made.key.hint, made.token[.."izli_agent_".len() + 4]);
    let rotated = server.root().rotate(&made.id, 0).await.unwrap();
    assert_eq!(rotated.token.len(), made.token.len());
    assert!(rotated.token.starts_with("izli_agent_"));
}

#[tokio::test(flavor = "multi_thread")]
async fn no_two_tokens_or_ids_are_the_same() {
    let server = Server::with_accounts().await;
    let mut seen = std::collections::HashSet::new();
    for _ in 0..50 {
        let made = server.make(service_key("acme", &["monitors:read"])).await;
        assert!(seen.insert(made.token) && seen.insert(made.id));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_word_all_is_kept_as_a_star() {
    let server = Server::with_accounts().await;
    let made = server.make(service_key("acme", &["all"])).await;
    assert_eq!(made.key.scopes, ["*"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_can_be_given_roles_alone() {
    let server = Server::with_accounts().await;
    server.root().put_role("acme", "agent", &["monitors:read"]).await.unwrap();
    let request = pb::CreateKeyRequest { roles: texts(&["agent"]), ..service_key("acme", &[]) };
    let made = server.make(request).await;
    assert_eq!(made.key.roles, ["agent"]);
    assert!(server.root().check(check(&made.token, "monitors:read")).await.unwrap().allowed);
    let request = pb::CreateKeyRequest { roles: texts(&["nobody"]), ..service_key("acme", &[]) };
    let status = server.root().create(request).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_is_optional_and_many_keys_may_have_none() {
    let server = Server::with_accounts().await;
    for _ in 0..2 {
        assert_eq!(server.make(service_key("acme", &["monitors:read"])).await.key.name, "");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_is_taken_within_its_account_until_the_key_is_revoked() {
    let server = Server::with_accounts().await;
    let root = server.root();
    let first = server.make(named_key("acme", "CI")).await;
    let taken = || async { root.create(named_key("acme", "CI")).await };
    let status = refused(taken().await, Code::AlreadyExists, "KEY_NAME_TAKEN");
    assert_eq!(status.message(), "An API key with this name already exists");

    server.make(named_key("other", "CI")).await;
    server.make(named_key("acme", "ci")).await;
    let staging = pb::CreateKeyRequest { environment: "staging".into(), ..named_key("acme", "CI") };
    refused(root.create(staging).await, Code::AlreadyExists, "KEY_NAME_TAKEN");

    root.disable(&first.id).await.unwrap();
    refused(taken().await, Code::AlreadyExists, "KEY_NAME_TAKEN");
    root.revoke(&first.id).await.unwrap();
    taken().await.unwrap();
    refused(taken().await, Code::AlreadyExists, "KEY_NAME_TAKEN");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_expired_key_keeps_its_name() {
    let server = Server::with_accounts().await;
    let request = pb::CreateKeyRequest { ttl: Some(seconds(10)), ..named_key("acme", "CI") };
    let made = server.make(request).await;
    server.advance(10);
    refused(server.root().create(named_key("acme", "CI")).await, Code::AlreadyExists, "KEY_NAME_TAKEN");
    server.root().revoke(&made.id).await.unwrap();
    server.root().create(named_key("acme", "CI")).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn update_cannot_take_a_name_that_is_taken_nor_revive_one() {
    let server = Server::with_accounts().await;
    let root = server.root();
    server.make(named_key("acme", "one")).await;
    let two = server.make(named_key("acme", "two")).await;
    let renamed = pb::Key { name: "one".into(), ..two.key.clone() };
    let status = refused(root.update(&renamed, &["name"]).await, Code::AlreadyExists, "KEY_NAME_TAKEN");
    assert_eq!(status.message(), "An API key with this name already exists");
    assert_eq!(root.get(&two.id).await.unwrap().name, "two");
    root.update(&two.key, &["name"]).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn no_answer_but_the_first_shows_a_token() {
    let server = Server::with_accounts().await;
    let root = server.root();
    let made = server.make(named_key("acme", "CI")).await;
    let list = pb::ListKeysRequest { account: "acme".into(), ..Default::default() };
    let secret = &made.token[made.key.hint.len()..];
    for answer in [
        format!("{:?}", root.get(&made.id).await.unwrap()),
        format!("{:?}", root.list(list).await.unwrap()),
        format!("{:?}", root.lookup(&made.token).await.unwrap()),
        format!("{:?}", root.check(authenticate(&made.token)).await.unwrap()),
        format!("{:?}", server.holder(&made.token).who_am_i().await.unwrap()),
        format!("{:?}", root.disable(&made.id).await.unwrap()),
        format!("{:?}", root.revoke(&made.id).await.unwrap()),
    ] {
        assert!(answer.contains(&made.id) && !answer.contains(secret), "{answer}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn lookup_finds_the_key_of_a_token_and_which_secret_it_is() {
    let server = Server::with_accounts().await;
    let root = server.root();
    let made = server.make(named_key("acme", "CI")).await;
    let new = root.rotate(&made.id, 60).await.unwrap();
    for (token, version) in [(&made.token, 1), (&new.token, 2)] {
        let found = root.lookup(token).await.unwrap();
        assert_eq!((found.key.unwrap().id, found.secret_version), (made.id.clone(), version));
    }
    root.revoke(&made.id).await.unwrap();
    assert_eq!(root.lookup(&made.token).await.unwrap().key.unwrap().state(), KeyState::Revoked);
    refused(root.lookup("kw_live_nothing").await, Code::NotFound, "KEY_NOT_FOUND");
}

#[tokio::test(flavor = "multi_thread")]
async fn another_accounts_token_is_not_found_by_lookup() {
    let server = Server::with_accounts().await;
    let made = server.make(named_key("other", "CI")).await;
    let acme = server.caller("acme", &["keyward:keys:read"]).await;
    let theirs = acme.lookup(&made.token).await.unwrap_err();
    let nobodys = acme.lookup("sk-123").await.unwrap_err();
    refused(Err::<(), _>(theirs.clone()), Code::NotFound, "KEY_NOT_FOUND");
    assert_eq!((theirs.message(), theirs.details()), (nobodys.message(), nobodys.details()));
}

#[tokio::test(flavor = "multi_thread")]
async fn expires_at_and_ttl_say_the_same_instant() {
    let server = Server::with_accounts().await;
    let at = pb::CreateKeyRequest { expires_at: Some(server.at(60)), ..named_key("acme", "at") };
    let ttl = pb::CreateKeyRequest { ttl: Some(seconds(60)), ..named_key("acme", "ttl") };
    for request in [at, ttl] {
        let made = server.make(request).await;
        assert_eq!(made.key.expires_at, timestamp(START + 60));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_is_expired_from_its_expirys_very_instant_on() {
    let server = Server::with_accounts().await;
    let root = server.root();
    let request = pb::CreateKeyRequest { ttl: Some(seconds(60)), ..named_key("acme", "CI") };
    let made = server.make(request).await;
    server.advance_by(std::time::Duration::from_micros(59_999_999));
    assert_eq!(root.get(&made.id).await.unwrap().state(), KeyState::Active);
    assert_eq!(root.reason(&made.token).await, Reason::Ok);
    server.advance_by(std::time::Duration::from_micros(1));
    assert_eq!(root.get(&made.id).await.unwrap().state(), KeyState::Expired);
    assert_eq!(root.reason(&made.token).await, Reason::Expired);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_expired_key_lives_again_with_a_later_expiry() {
    let server = Server::with_accounts().await;
    let root = server.root();
    let request = pb::CreateKeyRequest { ttl: Some(seconds(60)), ..named_key("acme", "CI") };
    let made = server.make(request).await;
    server.advance(2 * DAY);
    let later = pb::Key { expires_at: Some(server.at(60)), ..made.key.clone() };
    assert_eq!(root.update(&later, &["expires_at"]).await.unwrap().state(), KeyState::Active);
    assert_eq!(root.reason(&made.token).await, Reason::Ok);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_expiry_that_is_cleared_means_never() {
    let server = Server::with_accounts().await;
    let root = server.root();
    let request = pb::CreateKeyRequest { ttl: Some(seconds(60)), ..named_key("acme", "CI") };
    let made = server.make(request).await;
    let cleared = pb::Key { expires_at: None, ..made.key.clone() };
    assert_eq!(root.update(&cleared, &["expires_at"]).await.unwrap().expires_at, None);
    server.advance(100 * 365 * DAY);
    assert_eq!(root.reason(&made.token).await, Reason::Ok);
}

#[tokio::test(flavor = "multi_thread")]
async fn update_changes_the_field_in_its_mask_and_no_other() {
    let server = Server::with_accounts().await;
    let root = server.root();
    server.root().put_role("acme", "agent", &["monitors:read"]).await.unwrap();
    let made = server.make(named_key("acme", "CI")).await;
    server.advance(5);
    let all_new = pb::Key {
        name: "new".into(),
        scopes: texts(&PERSONAL),
        roles: texts(&["agent"]),
        expires_at: Some(server.at(60)),
        customers: texts(&["c1"]),
        allowed_cidrs: texts(&["10.0.0.0/8"]),
        rate_limits: vec![pb::RateLimit { name: "fast".into(), limit: 5, window: Some(seconds(60)) }],
        quota: Some(pb::Quota { limit: 9, period: pb::QuotaPeriod::Day.into() }),
        metadata: BTreeMap::from([("a".to_owned(), "b".to_owned())]),
        ..made.key.clone()
    };
    let mut expected = made.key.clone();
    for path in [
        "name",
        "scopes",
        "expires_at",
        "customers",
        "allowed_cidrs",
        "rate_limits",
        "quota",
        "metadata",
        "roles",
    ] {
        let new = all_new.clone();
        match path {
            "name" => expected.name = new.name,
            "scopes" => expected.scopes = new.scopes,
            "roles" => expected.roles = new.roles,
            "expires_at" => expected.expires_at = new.expires_at,
            "customers" => expected.customers = new.customers,
            "allowed_cidrs" => expected.allowed_cidrs = new.allowed_cidrs,
            "rate_limits" => expected.rate_limits = new.rate_limits,
            "quota" => expected.quota = new.quota,
            _ => expected.metadata = new.metadata,
        }
        let changed = root.update(&all_new, &[path]).await.unwrap();
        assert!(changed.revision > expected.revision, "{path}");
        expected = pb::Key { revision: changed.revision, updated_at: Some(server.at(0)), ..expected };
        assert_eq!(changed, expected, "{path}");
        assert_eq!(root.get(&made.id).await.unwrap(), expected, "{path}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn update_clears_what_is_in_the_mask_without_a_value() {
    let server = Server::with_accounts().await;
    let request = pb::CreateKeyRequest {
        customers: texts(&["c1"]),
        allowed_cidrs: texts(&["10.0.0.0/8"]),
        quota: Some(pb::Quota { limit: 9, period: pb::QuotaPeriod::Day.into() }),
        metadata: BTreeMap::from([("a".to_owned(), "b".to_owned())]),
        ..named_key("acme", "CI")
    };
    let made = server.make(request).await;
    let empty = pb::Key { id: made.id.clone(), ..pb::Key::default() };
    let paths = ["name", "customers", "allowed_cidrs", "quota", "metadata"];
    let cleared = server.root().update(&empty, &paths).await.unwrap();
    let expected = pb::Key {
        name: String::new(),
        customers: vec![],
        allowed_cidrs: vec![],
        quota: None,
        metadata: BTreeMap::new(),
        revision: cleared.revision,
        ..made.key
    };
    assert_eq!(cleared, expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn update_cannot_take_the_last_grant() {
    let server = Server::with_accounts().await;
    let made = server.make(named_key("acme", "CI")).await;
    let empty = pb::Key { id: made.id.clone(), ..pb::Key::default() };
    invalid(server.root().update(&empty, &["scopes"]).await, &["key.scopes"]);
    assert_eq!(server.root().get(&made.id).await.unwrap(), made.key);
}

#[tokio::test(flavor = "multi_thread")]
async fn update_takes_no_unknown_or_unchangeable_path_and_no_empty_mask() {
    let server = Server::with_accounts().await;
    let root = server.root();
    let made = server.make(named_key("acme", "CI")).await;
    for path in
        ["id", "account", "environment", "state", "hint", "secrets", "created_at", "nonsense", "*", ""]
    {
        invalid(root.update(&made.key, &[path]).await, &["update_mask.paths[0]"]);
    }
    let both = root.update(&made.key, &["name", "state", "what"]).await;
    invalid(both, &["update_mask.paths[1]", "update_mask.paths[2]"]);
    invalid(root.update(&made.key, &[]).await, &["update_mask"]);
    let bare = pb::UpdateKeyRequest { key: None, update_mask: None };
    invalid(root.keys().update(bare).await, &["key"]);
    assert_eq!(root.get(&made.id).await.unwrap(), made.key, "nothing has changed");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_check_sees_an_update_as_soon_as_it_is_answered() {
    let server = Server::with_accounts().await;
    let root = server.root();
    let made = server.make(named_key("acme", "CI")).await;
    assert!(!root.check(check(&made.token, "alerts:read")).await.unwrap().allowed);
    let wider = pb::Key { scopes: texts(&["alerts:read"]), ..made.key.clone() };
    root.update(&wider, &["scopes"]).await.unwrap();
    assert!(root.check(check(&made.token, "alerts:read")).await.unwrap().allowed);
    assert!(!root.check(check(&made.token, "monitors:read")).await.unwrap().allowed);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disabled_key_is_refused_until_it_is_enabled() {
    let server = Server::with_accounts().await;
    let root = server.root();
    let made = server.make(named_key("acme", "CI")).await;
    assert_eq!(root.disable(&made.id).await.unwrap().state(), KeyState::Disabled);
    assert_eq!(root.reason(&made.token).await, Reason::Disabled);
    assert_eq!(root.enable(&made.id).await.unwrap().state(), KeyState::Active);
    assert_eq!(root.reason(&made.token).await, Reason::Ok);
}

#[tokio::test(flavor = "multi_thread")]
async fn disabling_and_enabling_again_change_nothing() {
    let server = Server::with_accounts().await;
    let root = server.root();
    let made = server.make(named_key("acme", "CI")).await;
    assert_eq!(root.enable(&made.id).await.unwrap(), made.key);
    let disabled = root.disable(&made.id).await.unwrap();
    server.advance(5);
    assert_eq!(root.disable(&made.id).await.unwrap(), disabled);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revocation_is_final_and_keeps_its_first_reason_and_revision() {
    let server = Server::with_accounts().await;
    let root = server.root();
    let made = server.make(named_key("acme", "CI")).await;
    let revoke = |reason: RevokeReason, comment: &str| {
        let (id, comment) = (made.id.clone(), comment.to_owned());
        let request = pb::RevokeKeyRequest { id, reason: reason.into(), comment };
        async { root.keys().revoke(request).await.unwrap().into_inner() }
    };
    let first = revoke(RevokeReason::Compromised, "found in a repository").await;
    let key = first.key.clone().unwrap();
    assert_eq!(key.state(), KeyState::Revoked);
    assert_eq!(key.revoke_reason(), RevokeReason::Compromised);
    assert_eq!(key.revoke_comment, "found in a repository");
    assert_eq!(key.revoked_at, Some(server.at(0)));
    assert_eq!(root.reason(&made.token).await, Reason::Revoked);
    server.advance(5);
    let second = revoke(RevokeReason::OwnerLeft, "again").await;
    assert_eq!((second.key, second.revision), (first.key, first.revision));
    server.advance(100 * DAY);
    assert_eq!(root.get(&made.id).await.unwrap().state(), KeyState::Revoked);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revoked_key_takes_no_change() {
    let server = Server::with_accounts().await;
    let root = server.root();
    let made = server.make(named_key("acme", "CI")).await;
    let revoked = root.revoke(&made.id).await.unwrap().key.unwrap();
    refused(root.enable(&made.id).await, Code::FailedPrecondition, "KEY_REVOKED");
    refused(root.disable(&made.id).await, Code::FailedPrecondition, "KEY_REVOKED");
    refused(root.update(&made.key, &["name"]).await, Code::FailedPrecondition, "KEY_REVOKED");
    refused(root.finish_rotation(&made.id).await, Code::FailedPrecondition, "KEY_REVOKED");
    refused(root.rotate(&made.id, 0).await, Code::FailedPrecondition, "KEY_NOT_ACTIVE");
    assert_eq!(root.get(&made.id).await.unwrap(), revoked);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_state_is_the_first_of_revoked_disabled_expired_and_active() {
    let server = Server::with_accounts().await;
    let root = server.root();
    let request = pb::CreateKeyRequest { ttl: Some(seconds(60)), ..named_key("acme", "CI") };
    let made = server.make(request).await;
    let state = || async { (root.get(&made.id).await.unwrap().state(), root.reason(&made.token).await) };
    assert_eq!(state().await, (KeyState::Active, Reason::Ok));
    server.advance(60);
    assert_eq!(state().await, (KeyState::Expired, Reason::Expired));
    root.disable(&made.id).await.unwrap();
    assert_eq!(state().await, (KeyState::Disabled, Reason::Disabled));
    root.revoke(&made.id).await.unwrap();
    assert_eq!(state().await, (KeyState::Revoked, Reason::Revoked));
}

#[tokio::test(flavor = "multi_thread")]
async fn who_am_i_tells_any_bearer_its_key_and_account() {
    let server = Server::with_accounts().await;
    let made = server.make(named_key("acme", "CI")).await;
    let answer = server.holder(&made.token).who_am_i().await.unwrap();
    assert_eq!(answer.account, Some(pb::AccountName { id: "acme".into(), name: "acme".into() }));
    let key = answer.key.unwrap();
    assert_eq!((key.id, key.scopes), (made.id.clone(), made.key.scopes));
    server.root().disable(&made.id).await.unwrap();
    refused(server.holder(&made.token).who_am_i().await, Code::Unauthenticated, "UNAUTHENTICATED");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bearer_can_revoke_its_own_key_and_send_it_again() {
    let server = Server::with_accounts().await;
    let made = server.make(named_key("acme", "CI")).await;
    let bearer = server.holder(&made.token);
    let first = bearer.revoke_self().await.unwrap();
    assert_eq!(server.root().reason(&made.token).await, Reason::Revoked);
    assert_eq!(bearer.revoke_self().await.unwrap().revision, first.revision, "a retry is no failure");
}

#[tokio::test(flavor = "multi_thread")]
async fn disabled_and_expired_keys_and_those_of_suspended_accounts_can_revoke_themselves() {
    let server = Server::with_accounts().await;
    let root = server.root();
    let disabled = server.make(named_key("acme", "disabled")).await;
    root.disable(&disabled.id).await.unwrap();
    let request = pb::CreateKeyRequest { ttl: Some(seconds(1)), ..named_key("acme", "expired") };
    let expired = server.make(request).await;
    server.advance(1);
    let suspended = server.make(named_key("other", "suspended")).await;
    root.suspend("other").await.unwrap();
    for made in [disabled, expired, suspended] {
        server.holder(&made.token).revoke_self().await.unwrap();
        assert_eq!(root.get(&made.id).await.unwrap().state(), KeyState::Revoked, "{}", made.key.name);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn both_tokens_of_an_overlap_can_revoke_the_key_and_a_superseded_one_cannot() {
    let server = Server::with_accounts().await;
    let root = server.root();
    let made = server.make(named_key("acme", "CI")).await;
    root.rotate(&made.id, 10).await.unwrap();
    let old = server.holder(&made.token);
    server.advance(10);
    refused(old.revoke_self().await, Code::Unauthenticated, "UNAUTHENTICATED");
    assert_eq!(root.get(&made.id).await.unwrap().state(), KeyState::Active);

    let other = server.make(named_key("acme", "other")).await;
    root.rotate(&other.id, 10).await.unwrap();
    server.holder(&other.token).revoke_self().await.unwrap();
    assert_eq!(root.get(&other.id).await.unwrap().state(), KeyState::Revoked);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_last_use_of_a_key_shows_at_once_and_by_secret() {
    let server = Server::with_accounts().await;
    let root = server.root();
    let made = server.make(named_key("acme", "CI")).await;
    let new = root.rotate(&made.id, 60).await.unwrap();
    assert_eq!(new.key.unwrap().last_used_at, None);
    server.advance(5);
    assert_eq!(root.reason(&new.token).await, Reason::Ok);
    server.advance(5);
    assert_eq!(root.reason(&made.token).await, Reason::Ok);
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
    let root = server.root();
    let made = server.make(named_key("acme", "CI")).await;
    let dry = pb::CheckRequest { dry_run: true, ..authenticate(&made.token) };
    assert!(root.check(dry).await.unwrap().allowed);
    assert!(!root.check(check(&made.token, "alerts:read")).await.unwrap().allowed);
    root.lookup(&made.token).await.unwrap();
    assert_eq!(root.get(&made.id).await.unwrap().last_used_at, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_account_caller_may_leave_its_account_out_and_names_no_other() {
    let server = Server::with_accounts().await;
    let acme = server.caller("acme", &["keyward:keys:*", "monitors:*"]).await;
    let made = acme.make(service_key("", &["monitors:read"])).await;
    assert_eq!(made.key.account, "acme");
    let other = acme.create(service_key("other", &["monitors:read"])).await;
    refused(other, Code::NotFound, "ACCOUNT_NOT_FOUND");
    let nowhere = acme.create(service_key("nowhere", &["monitors:read"])).await;
    refused(nowhere, Code::NotFound, "ACCOUNT_NOT_FOUND");
    let of_other = pb::ListKeysRequest { account: "other".into(), ..Default::default() };
    refused(acme.list(of_other).await, Code::NotFound, "ACCOUNT_NOT_FOUND");
    let own = acme.list(pb::ListKeysRequest::default()).await.unwrap().keys;
    assert!(own.iter().all(|key| key.account == "acme") && own.len() == 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_account_caller_may_leave_the_environment_out_and_means_its_own_keys() {
    let server = Server::with_accounts().await;
    let staging = pb::CreateKeyRequest {
        environment: "staging".into(),
        ..service_key("acme", &["keyward:keys:*", "monitors:*"])
    };
    let staging = server.make(staging).await;
    let made = server.holder(&staging.token).make(nowhere()).await;
    assert_eq!(made.key.environment, "staging");
    assert!(made.token.starts_with("kw_staging_"), "and its tag");
    invalid(
        server.root().create(pb::CreateKeyRequest { account: "acme".into(), ..nowhere() }).await,
        &["environment"],
    );
}

/// A key without an account and an environment.
fn nowhere() -> pb::CreateKeyRequest {
    pb::CreateKeyRequest { environment: String::new(), ..service_key("", &["monitors:read"]) }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operator_must_say_whose_key_it_means() {
    let server = Server::with_accounts().await;
    let root = server.root();
    invalid(root.create(service_key("", &["monitors:read"])).await, &["account"]);
    invalid(root.list(pb::ListKeysRequest::default()).await, &["account"]);
    let missing = root.create(service_key("nowhere", &["monitors:read"])).await;
    refused(missing, Code::NotFound, "ACCOUNT_NOT_FOUND");
}

#[tokio::test(flavor = "multi_thread")]
async fn narrowing_changes_answer_that_they_are_in_force() {
    let server = Server::with_accounts().await;
    let root = server.root();
    let made = server.make(named_key("acme", "CI")).await;
    let id = || made.id.clone();
    let now = Some(server.at(0));
    let in_force = |propagation: Option<pb::Propagation>| {
        let propagation = propagation.unwrap();
        propagation.complete && propagation.unconfirmed.is_empty() && propagation.complete_by == now
    };
    let disable = root.keys().disable(pb::DisableKeyRequest { id: id() }).await;
    assert!(in_force(disable.unwrap().into_inner().propagation));
    let enable = root.keys().enable(pb::EnableKeyRequest { id: id() }).await;
    assert!(in_force(enable.unwrap().into_inner().propagation));
    assert!(in_force(root.rotate(&made.id, 0).await.unwrap().propagation));
    assert!(in_force(root.finish_rotation(&made.id).await.unwrap().propagation));
    assert!(in_force(root.revoke(&made.id).await.unwrap().propagation));
    let own = server.make(named_key("acme", "own")).await;
    assert!(in_force(server.holder(&own.token).revoke_self().await.unwrap().propagation));
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_changes_at_once_none_is_lost() {
    let server = Server::with_accounts().await;
    let root = server.root();
    let made = server.make(named_key("acme", "CI")).await;
    let changes = (0..20).map(|at| {
        let (root, key) = (root.clone(), made.key.clone());
        tokio::spawn(async move {
            let (changed, path) = if at % 2 == 0 {
                (pb::Key { name: "renamed".into(), ..key }, "name")
            } else {
                (pb::Key { customers: texts(&["c1"]), ..key }, "customers")
            };
            root.update(&changed, &[path]).await.map(drop)
        })
    });
    for change in changes.collect::<Vec<_>>() {
        match change.await.unwrap() {
            Ok(()) => {}
            Err(status) => assert_eq!(status.code(), Code::Aborted, "{status:?}"),
        }
    }
    let key = root.get(&made.id).await.unwrap();
    assert_eq!((key.name.as_str(), key.customers), ("renamed", texts(&["c1"])));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_id_that_is_no_uuid_is_invalid_everywhere() {
    let server = Server::with_accounts().await;
    let root = server.root();
    for id in ["", "x", "0198", "00000000-0000-0000-0000-00000000000g"] {
        let answers: [Result<(), Status>; 5] = [
            root.get(id).await.map(drop),
            root.disable(id).await.map(drop),
            root.enable(id).await.map(drop),
            root.revoke(id).await.map(drop),
            root.rotate(id, 0).await.map(drop),
        ];
        for answer in answers {
            invalid(answer, &["id"]);
        }
        invalid(root.finish_rotation(id).await, &["id"]);
        let key = pb::Key { id: id.to_owned(), ..pb::Key::default() };
        invalid(root.update(&key, &["name"]).await, &["key.id"]);
    }
}
