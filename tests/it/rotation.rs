//! Rotation: a key's new token, what becomes of the old one, and that nothing else changes.

use std::{collections::BTreeMap, time::Duration};

use keyward::pb::{self, KeyState, Reason};
use tonic::Code;

use crate::support::{
    DAY, Server, assert_invalid, assert_refused, authenticate_request, named_key_request, proto_seconds,
    to_strings,
};

#[tokio::test(flavor = "multi_thread")]
async fn without_overlap_the_old_token_is_dead_at_once() {
    let server = Server::with_accounts().await;
    let root = server.root_client();
    let made = server.create_key(named_key_request("acme", "CI")).await;
    let bare = pb::RotateKeyRequest { id: made.id.clone(), ..Default::default() };
    let new = root.keys().rotate(bare).await.unwrap().into_inner();
    assert_eq!(root.check_reason(&made.token).await, Reason::Rotated);
    assert_eq!(root.check_reason(&new.token).await, Reason::Ok);
    assert_eq!(new.previous_expires_at, Some(server.timestamp_after(0)));
    assert!(!new.replayed);
    let newest = root.rotate(&made.id, 0).await.unwrap();
    for (token, reason) in
        [(made.token, Reason::Rotated), (new.token, Reason::Rotated), (newest.token, Reason::Ok)]
    {
        assert_eq!(root.check_reason(&token).await, reason);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn during_an_overlap_both_tokens_work_until_its_very_end() {
    let server = Server::with_accounts().await;
    let root = server.root_client();
    let made = server.create_key(named_key_request("acme", "CI")).await;
    let new = root.rotate(&made.id, 10).await.unwrap();
    assert_eq!(new.previous_expires_at, Some(server.timestamp_after(10)));
    let versions = |key: &pb::Key| key.secrets.iter().map(|secret| secret.version).collect::<Vec<_>>();
    assert_eq!(versions(new.key.as_ref().unwrap()), [2, 1]);
    server.advance_by(Duration::from_micros(9_999_999));
    for (token, version) in [(&made.token, 1), (&new.token, 2)] {
        let answer = root.check(authenticate_request(token)).await.unwrap();
        assert_eq!((answer.reason(), answer.secret_version), (Reason::Ok, version));
    }
    server.advance_by(Duration::from_micros(1));
    let answer = root.check(authenticate_request(&made.token)).await.unwrap();
    assert_eq!(
        (answer.reason(), answer.secret_version, answer.key_id),
        (Reason::Rotated, 1, made.id.clone())
    );
    assert_eq!(root.check_reason(&new.token).await, Reason::Ok);
    assert_eq!(versions(&root.get(&made.id).await.unwrap()), [2]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rotation_never_lengthens_a_life() {
    let server = Server::with_accounts().await;
    let root = server.root_client();
    let request = pb::CreateKeyRequest { ttl: Some(proto_seconds(60)), ..named_key_request("acme", "CI") };
    let made = server.create_key(request).await;
    let new = root.rotate(&made.id, DAY).await.unwrap();
    assert_eq!(new.previous_expires_at, Some(server.timestamp_after(60)), "the earlier of the two ends");
    assert_eq!(new.key.unwrap().expires_at, made.key.expires_at);
    server.advance(60);
    assert_eq!(root.check_reason(&new.token).await, Reason::Expired);
    assert_eq!(root.check_reason(&made.token).await, Reason::Expired);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rotation_during_an_overlap_ends_the_oldest_token() {
    let server = Server::with_accounts().await;
    let root = server.root_client();
    let first = server.create_key(named_key_request("acme", "CI")).await;
    let second = root.rotate(&first.id, 60).await.unwrap();
    server.advance(10);
    let third = root.rotate(&first.id, 60).await.unwrap();
    assert_eq!(third.previous_expires_at, Some(server.timestamp_after(60)));
    assert_eq!(root.check_reason(&first.token).await, Reason::Rotated);
    assert_eq!(root.check_reason(&second.token).await, Reason::Ok);
    assert_eq!(root.check_reason(&third.token).await, Reason::Ok);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_overlap_can_be_ended_early_and_again() {
    let server = Server::with_accounts().await;
    let root = server.root_client();
    let made = server.create_key(named_key_request("acme", "CI")).await;
    let new = root.rotate(&made.id, 60).await.unwrap();
    let finished = root.finish_rotation(&made.id).await.unwrap();
    assert!(finished.revision > new.revision);
    assert_eq!(root.check_reason(&made.token).await, Reason::Rotated);
    assert_eq!(root.check_reason(&new.token).await, Reason::Ok);
    server.advance(1);
    let again = root.finish_rotation(&made.id).await.unwrap();
    assert_eq!(again.revision, finished.revision);
    assert_eq!(again.key.unwrap().updated_at, finished.key.unwrap().updated_at);
}

#[tokio::test(flavor = "multi_thread")]
async fn finishing_without_a_rotation_changes_nothing() {
    let server = Server::with_accounts().await;
    let made = server.create_key(named_key_request("acme", "CI")).await;
    let finished = server.root_client().finish_rotation(&made.id).await.unwrap();
    assert_eq!((finished.key.unwrap(), finished.revision), (made.key, made.revision));
}

#[tokio::test(flavor = "multi_thread")]
async fn only_an_active_key_rotates() {
    let server = Server::with_accounts().await;
    let root = server.root_client();
    let disabled = server.create_key(named_key_request("acme", "disabled")).await;
    root.disable(&disabled.id).await.unwrap();
    let request =
        pb::CreateKeyRequest { ttl: Some(proto_seconds(1)), ..named_key_request("acme", "expired") };
    let expired = server.create_key(request).await;
    let revoked = server.create_key(named_key_request("acme", "revoked")).await;
    root.revoke(&revoked.id).await.unwrap();
    server.advance(1);
    for (made, state) in
        [(disabled, KeyState::Disabled), (expired, KeyState::Expired), (revoked, KeyState::Revoked)]
    {
        assert_refused(root.rotate(&made.id, 0).await, Code::FailedPrecondition, "KEY_NOT_ACTIVE");
        let key = root.get(&made.id).await.unwrap();
        assert_eq!((key.state(), key.secrets.len()), (state, 1));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rotation_keeps_everything_but_the_secret() {
    let server = Server::with_accounts().await;
    let root = server.root_client();
    let request = pb::CreateKeyRequest {
        environment: "staging".into(),
        prefix: Some("izli_sk".into()),
        ttl: Some(proto_seconds(DAY)),
        customers: to_strings(&["c1"]),
        allowed_cidrs: to_strings(&["10.0.0.0/8"]),
        rate_limits: vec![pb::RateLimit { name: "fast".into(), limit: 5, window: Some(proto_seconds(60)) }],
        quota: Some(pb::Quota { limit: 9, period: pb::QuotaPeriod::Month.into() }),
        metadata: BTreeMap::from([("a".to_owned(), "b".to_owned())]),
        ..named_key_request("acme", "CI")
    };
    let made = server.create_key(request).await;
    server.advance(5);
    let new = root.rotate(&made.id, 0).await.unwrap();
    let key = new.key.unwrap();
    assert!(new.token.starts_with("izli_sk_staging_") && new.token != made.token);
    assert_eq!(new.token[..key.hint.len()], key.hint);
    assert_eq!((key.revision, key.updated_at), (new.revision, Some(server.timestamp_after(0))));
    let secret = pb::Secret {
        version: 2,
        hint: key.hint.clone(),
        created_at: Some(server.timestamp_after(0)),
        expires_at: None,
        last_used_at: None,
    };
    let expected = pb::Key {
        hint: key.hint.clone(),
        secrets: vec![secret],
        updated_at: key.updated_at,
        revision: key.revision,
        ..made.key
    };
    assert_eq!(key, expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_overlap_is_nothing_to_seven_days() {
    let server = Server::with_accounts().await;
    let root = server.root_client();
    let made = server.create_key(named_key_request("acme", "CI")).await;
    let rotate = |overlap: prost_types::Duration| {
        let request =
            pb::RotateKeyRequest { id: made.id.clone(), overlap: Some(overlap), ..Default::default() };
        let root = root.clone();
        async move { root.keys().rotate(request).await }
    };
    let micro = prost_types::Duration { seconds: 604_800, nanos: 1000 };
    assert_invalid(rotate(micro).await, &["overlap"]);
    assert_invalid(rotate(prost_types::Duration { seconds: -1, nanos: 0 }).await, &["overlap"]);
    assert_invalid(rotate(prost_types::Duration { seconds: 0, nanos: -1 }).await, &["overlap"]);
    assert_invalid(rotate(prost_types::Duration { seconds: i64::MAX, nanos: 0 }).await, &["overlap"]);
    assert_eq!(root.get(&made.id).await.unwrap(), made.key, "nothing has changed");
    rotate(proto_seconds(7 * DAY)).await.unwrap();
    server.advance(7 * DAY - 1);
    assert_eq!(root.check_reason(&made.token).await, Reason::Ok);
    server.advance(1);
    assert_eq!(root.check_reason(&made.token).await, Reason::Rotated);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_states_before_rotated_are_told_first() {
    let server = Server::with_accounts().await;
    let root = server.root_client();
    let made = server.create_key(named_key_request("acme", "CI")).await;
    root.rotate(&made.id, 0).await.unwrap();
    root.disable(&made.id).await.unwrap();
    assert_eq!(root.check_reason(&made.token).await, Reason::Disabled);
    root.revoke(&made.id).await.unwrap();
    assert_eq!(root.check_reason(&made.token).await, Reason::Revoked);
}

#[tokio::test(flavor = "multi_thread")]
async fn both_tokens_draw_on_one_budget() {
    let server = Server::with_accounts().await;
    let root = server.root_client();
    let quota = Some(pb::Quota { limit: 3, period: pb::QuotaPeriod::Total.into() });
    let made = server.create_key(pb::CreateKeyRequest { quota, ..named_key_request("acme", "CI") }).await;
    assert_eq!(root.check_reason(&made.token).await, Reason::Ok);
    let new = root.rotate(&made.id, 60).await.unwrap();
    assert_eq!(root.check_reason(&new.token).await, Reason::Ok);
    assert_eq!(root.check_reason(&made.token).await, Reason::Ok);
    assert_eq!(root.check_reason(&new.token).await, Reason::QuotaExceeded);
    assert_eq!(root.check_reason(&made.token).await, Reason::QuotaExceeded);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_rotation_of_many_at_once_gives_a_token_and_at_most_two_live() {
    let server = Server::with_accounts().await;
    let root = server.root_client();
    let made = server.create_key(named_key_request("acme", "CI")).await;
    let rotations: Vec<_> = (0..8)
        .map(|_| {
            let (root, id) = (root.clone(), made.id.clone());
            tokio::spawn(async move { root.rotate(&id, 60).await })
        })
        .collect();
    let mut tokens = vec![made.token];
    for rotation in rotations {
        match rotation.await.unwrap() {
            Ok(new) => tokens.push(new.token),
            Err(status) => assert_eq!(status.code(), Code::Aborted, "{status:?}"),
        }
    }
    let mut alive = 0;
    for token in &tokens {
        match root.check_reason(token).await {
            Reason::Ok => alive += 1,
            reason => assert_eq!(reason, Reason::Rotated),
        }
    }
    assert_eq!(alive, 2);
}
