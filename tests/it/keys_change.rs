//! KeyService, but for rotation: changing, refusing and ending keys.

use std::collections::BTreeMap;

use keyward::pb::{self, KeyState, Reason, RevokeReason};
use tonic::Code;

use crate::support::{
    DAY, Server, assert_invalid, assert_refused, named_key_request, proto_seconds, scope_check_request,
    to_strings,
};

const PERSONAL: [&str; 2] = ["monitors:read", "monitors:write"];

#[tokio::test(flavor = "multi_thread")]
async fn update_cannot_take_a_name_that_is_taken_nor_revive_one() {
    let server = Server::with_accounts().await;
    let root = server.root_client();
    server.create_key(named_key_request("acme", "one")).await;
    let two = server.create_key(named_key_request("acme", "two")).await;
    let renamed = pb::Key { name: "one".into(), ..two.key.clone() };
    let status =
        assert_refused(root.update(&renamed, &["name"]).await, Code::AlreadyExists, "KEY_NAME_TAKEN");
    assert_eq!(status.message(), "An API key with this name already exists");
    assert_eq!(root.get(&two.id).await.unwrap().name, "two");
    root.update(&two.key, &["name"]).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_is_expired_from_its_expirys_very_instant_on() {
    let server = Server::with_accounts().await;
    let root = server.root_client();
    let request = pb::CreateKeyRequest { ttl: Some(proto_seconds(60)), ..named_key_request("acme", "CI") };
    let made = server.create_key(request).await;
    server.advance_by(std::time::Duration::from_micros(59_999_999));
    assert_eq!(root.get(&made.id).await.unwrap().state(), KeyState::Active);
    assert_eq!(root.check_reason(&made.token).await, Reason::Ok);
    server.advance_by(std::time::Duration::from_micros(1));
    assert_eq!(root.get(&made.id).await.unwrap().state(), KeyState::Expired);
    assert_eq!(root.check_reason(&made.token).await, Reason::Expired);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_expired_key_lives_again_with_a_later_expiry() {
    let server = Server::with_accounts().await;
    let root = server.root_client();
    let request = pb::CreateKeyRequest { ttl: Some(proto_seconds(60)), ..named_key_request("acme", "CI") };
    let made = server.create_key(request).await;
    server.advance(2 * DAY);
    let later = pb::Key { expires_at: Some(server.timestamp_after(60)), ..made.key.clone() };
    assert_eq!(root.update(&later, &["expires_at"]).await.unwrap().state(), KeyState::Active);
    assert_eq!(root.check_reason(&made.token).await, Reason::Ok);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_expiry_that_is_cleared_means_never() {
    let server = Server::with_accounts().await;
    let root = server.root_client();
    let request = pb::CreateKeyRequest { ttl: Some(proto_seconds(60)), ..named_key_request("acme", "CI") };
    let made = server.create_key(request).await;
    let cleared = pb::Key { expires_at: None, ..made.key.clone() };
    assert_eq!(root.update(&cleared, &["expires_at"]).await.unwrap().expires_at, None);
    server.advance(100 * 365 * DAY);
    assert_eq!(root.check_reason(&made.token).await, Reason::Ok);
}

#[tokio::test(flavor = "multi_thread")]
async fn update_changes_the_field_in_its_mask_and_no_other() {
    let server = Server::with_accounts().await;
    let root = server.root_client();
    server.root_client().put_role("acme", "agent", &["monitors:read"]).await.unwrap();
    let made = server.create_key(named_key_request("acme", "CI")).await;
    server.advance(5);
    let all_new = pb::Key {
        name: "new".into(),
        scopes: to_strings(&PERSONAL),
        roles: to_strings(&["agent"]),
        expires_at: Some(server.timestamp_after(60)),
        customers: to_strings(&["c1"]),
        allowed_cidrs: to_strings(&["10.0.0.0/8"]),
        rate_limits: vec![pb::RateLimit { name: "fast".into(), limit: 5, window: Some(proto_seconds(60)) }],
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
        expected =
            pb::Key { revision: changed.revision, updated_at: Some(server.timestamp_after(0)), ..expected };
        assert_eq!(changed, expected, "{path}");
        assert_eq!(root.get(&made.id).await.unwrap(), expected, "{path}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn update_clears_what_is_in_the_mask_without_a_value() {
    let server = Server::with_accounts().await;
    let request = pb::CreateKeyRequest {
        customers: to_strings(&["c1"]),
        allowed_cidrs: to_strings(&["10.0.0.0/8"]),
        quota: Some(pb::Quota { limit: 9, period: pb::QuotaPeriod::Day.into() }),
        metadata: BTreeMap::from([("a".to_owned(), "b".to_owned())]),
        ..named_key_request("acme", "CI")
    };
    let made = server.create_key(request).await;
    let empty = pb::Key { id: made.id.clone(), ..pb::Key::default() };
    let paths = ["name", "customers", "allowed_cidrs", "quota", "metadata"];
    let cleared = server.root_client().update(&empty, &paths).await.unwrap();
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
    let made = server.create_key(named_key_request("acme", "CI")).await;
    let empty = pb::Key { id: made.id.clone(), ..pb::Key::default() };
    assert_invalid(server.root_client().update(&empty, &["scopes"]).await, &["key.scopes"]);
    assert_eq!(server.root_client().get(&made.id).await.unwrap(), made.key);
}

#[tokio::test(flavor = "multi_thread")]
async fn update_takes_no_unknown_or_unchangeable_path_and_no_empty_mask() {
    let server = Server::with_accounts().await;
    let root = server.root_client();
    let made = server.create_key(named_key_request("acme", "CI")).await;
    for path in
        ["id", "account", "environment", "state", "hint", "secrets", "created_at", "nonsense", "*", ""]
    {
        assert_invalid(root.update(&made.key, &[path]).await, &["update_mask.paths[0]"]);
    }
    let both = root.update(&made.key, &["name", "state", "what"]).await;
    assert_invalid(both, &["update_mask.paths[1]", "update_mask.paths[2]"]);
    assert_invalid(root.update(&made.key, &[]).await, &["update_mask"]);
    let bare = pb::UpdateKeyRequest { key: None, update_mask: None };
    assert_invalid(root.keys().update(bare).await, &["key"]);
    assert_eq!(root.get(&made.id).await.unwrap(), made.key, "nothing has changed");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_check_sees_an_update_as_soon_as_it_is_answered() {
    let server = Server::with_accounts().await;
    let root = server.root_client();
    let made = server.create_key(named_key_request("acme", "CI")).await;
    assert!(!root.check(scope_check_request(&made.token, "alerts:read")).await.unwrap().allowed);
    let wider = pb::Key { scopes: to_strings(&["alerts:read"]), ..made.key.clone() };
    root.update(&wider, &["scopes"]).await.unwrap();
    assert!(root.check(scope_check_request(&made.token, "alerts:read")).await.unwrap().allowed);
    assert!(!root.check(scope_check_request(&made.token, "monitors:read")).await.unwrap().allowed);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disabled_key_is_refused_until_it_is_enabled() {
    let server = Server::with_accounts().await;
    let root = server.root_client();
    let made = server.create_key(named_key_request("acme", "CI")).await;
    assert_eq!(root.disable(&made.id).await.unwrap().state(), KeyState::Disabled);
    assert_eq!(root.check_reason(&made.token).await, Reason::Disabled);
    assert_eq!(root.enable(&made.id).await.unwrap().state(), KeyState::Active);
    assert_eq!(root.check_reason(&made.token).await, Reason::Ok);
}

#[tokio::test(flavor = "multi_thread")]
async fn disabling_and_enabling_again_change_nothing() {
    let server = Server::with_accounts().await;
    let root = server.root_client();
    let made = server.create_key(named_key_request("acme", "CI")).await;
    assert_eq!(root.enable(&made.id).await.unwrap(), made.key);
    let disabled = root.disable(&made.id).await.unwrap();
    server.advance(5);
    assert_eq!(root.disable(&made.id).await.unwrap(), disabled);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revocation_is_final_and_keeps_its_first_reason_and_revision() {
    let server = Server::with_accounts().await;
    let root = server.root_client();
    let made = server.create_key(named_key_request("acme", "CI")).await;
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
    assert_eq!(key.revoked_at, Some(server.timestamp_after(0)));
    assert_eq!(root.check_reason(&made.token).await, Reason::Revoked);
    server.advance(5);
    let second = revoke(RevokeReason::OwnerLeft, "again").await;
    assert_eq!((second.key, second.revision), (first.key, first.revision));
    server.advance(100 * DAY);
    assert_eq!(root.get(&made.id).await.unwrap().state(), KeyState::Revoked);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revoked_key_takes_no_change() {
    let server = Server::with_accounts().await;
    let root = server.root_client();
    let made = server.create_key(named_key_request("acme", "CI")).await;
    let revoked = root.revoke(&made.id).await.unwrap().key.unwrap();
    assert_refused(root.enable(&made.id).await, Code::FailedPrecondition, "KEY_REVOKED");
    assert_refused(root.disable(&made.id).await, Code::FailedPrecondition, "KEY_REVOKED");
    assert_refused(root.update(&made.key, &["name"]).await, Code::FailedPrecondition, "KEY_REVOKED");
    assert_refused(root.finish_rotation(&made.id).await, Code::FailedPrecondition, "KEY_REVOKED");
    assert_refused(root.rotate(&made.id, 0).await, Code::FailedPrecondition, "KEY_NOT_ACTIVE");
    assert_eq!(root.get(&made.id).await.unwrap(), revoked);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_state_is_the_first_of_revoked_disabled_expired_and_active() {
    let server = Server::with_accounts().await;
    let root = server.root_client();
    let request = pb::CreateKeyRequest { ttl: Some(proto_seconds(60)), ..named_key_request("acme", "CI") };
    let made = server.create_key(request).await;
    let state =
        || async { (root.get(&made.id).await.unwrap().state(), root.check_reason(&made.token).await) };
    assert_eq!(state().await, (KeyState::Active, Reason::Ok));
    server.advance(60);
    assert_eq!(state().await, (KeyState::Expired, Reason::Expired));
    root.disable(&made.id).await.unwrap();
    assert_eq!(state().await, (KeyState::Disabled, Reason::Disabled));
    root.revoke(&made.id).await.unwrap();
    assert_eq!(state().await, (KeyState::Revoked, Reason::Revoked));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bearer_can_revoke_its_own_key_and_send_it_again() {
    let server = Server::with_accounts().await;
    let made = server.create_key(named_key_request("acme", "CI")).await;
    let bearer = server.client_with_token(&made.token);
    let first = bearer.revoke_self().await.unwrap();
    assert_eq!(server.root_client().check_reason(&made.token).await, Reason::Revoked);
    assert_eq!(bearer.revoke_self().await.unwrap().revision, first.revision, "a retry is no failure");
}

#[tokio::test(flavor = "multi_thread")]
async fn disabled_and_expired_keys_and_those_of_suspended_accounts_can_revoke_themselves() {
    let server = Server::with_accounts().await;
    let root = server.root_client();
    let disabled = server.create_key(named_key_request("acme", "disabled")).await;
    root.disable(&disabled.id).await.unwrap();
    let request =
        pb::CreateKeyRequest { ttl: Some(proto_seconds(1)), ..named_key_request("acme", "expired") };
    let expired = server.create_key(request).await;
    server.advance(1);
    let suspended = server.create_key(named_key_request("other", "suspended")).await;
    root.suspend("other").await.unwrap();
    for made in [disabled, expired, suspended] {
        server.client_with_token(&made.token).revoke_self().await.unwrap();
        assert_eq!(root.get(&made.id).await.unwrap().state(), KeyState::Revoked, "{}", made.key.name);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn both_tokens_of_an_overlap_can_revoke_the_key_and_a_superseded_one_cannot() {
    let server = Server::with_accounts().await;
    let root = server.root_client();
    let made = server.create_key(named_key_request("acme", "CI")).await;
    root.rotate(&made.id, 10).await.unwrap();
    let old = server.client_with_token(&made.token);
    server.advance(10);
    assert_refused(old.revoke_self().await, Code::Unauthenticated, "UNAUTHENTICATED");
    assert_eq!(root.get(&made.id).await.unwrap().state(), KeyState::Active);

    let other = server.create_key(named_key_request("acme", "other")).await;
    root.rotate(&other.id, 10).await.unwrap();
    server.client_with_token(&other.token).revoke_self().await.unwrap();
    assert_eq!(root.get(&other.id).await.unwrap().state(), KeyState::Revoked);
}

#[tokio::test(flavor = "multi_thread")]
async fn narrowing_changes_answer_that_they_are_in_force() {
    let server = Server::with_accounts().await;
    let root = server.root_client();
    let made = server.create_key(named_key_request("acme", "CI")).await;
    let id = || made.id.clone();
    let now = Some(server.timestamp_after(0));
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
    let own = server.create_key(named_key_request("acme", "own")).await;
    assert!(in_force(server.client_with_token(&own.token).revoke_self().await.unwrap().propagation));
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_changes_at_once_none_is_lost() {
    let server = Server::with_accounts().await;
    let root = server.root_client();
    let made = server.create_key(named_key_request("acme", "CI")).await;
    let changes = (0..20).map(|at| {
        let (root, key) = (root.clone(), made.key.clone());
        tokio::spawn(async move {
            let (changed, path) = if at % 2 == 0 {
                (pb::Key { name: "renamed".into(), ..key }, "name")
            } else {
                (pb::Key { customers: to_strings(&["c1"]), ..key }, "customers")
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
    assert_eq!((key.name.as_str(), key.customers), ("renamed", to_strings(&["c1"])));
}
