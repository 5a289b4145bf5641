//! The fifth seed, Eazip: people manage their own keys over HTTP with a key. Here each of its users is an account
//! whose keys may manage keys too. Each test is a sentence of its page; `docs/seeds.md` has the table.

use tonic::{Code, Status};

use keyward::{
    domain::name::RoleName,
    pb::{self, KeyState, Reason},
};

use crate::support::{
    Client, CreatedKey, DAY, assert_invalid, assert_refused, proto_seconds, service_key_request,
    user_key_request,
};

use super::Server;

/// Eazip with its users `ann` and `bob`; a key that is made with a name alone may do what its user may do.
async fn eazip() -> Server {
    let server = Server::start_with(|settings| {
        settings.key_settings.default_role = Some(RoleName::parse("everything").unwrap());
    })
    .await;
    let scopes = ["all", "keyward:keys:read", "keyward:keys:write"];
    server.root_client().put_role("", "everything", &scopes).await.unwrap();
    server.create_account("ann").await;
    server.create_account("bob").await;
    server
}

/// `-H "Authorization: Bearer YOUR_API_KEY"` of a user.
async fn bearer(server: &Server, user: &str) -> Client {
    let made = server.create_key(service_key_request(user, &[])).await;
    server.client_with_token(&made.token)
}

/// `POST /api-keys` with an empty body.
fn body() -> pb::CreateKeyRequest {
    pb::CreateKeyRequest { prefix: Some("eazip".to_owned()), ..service_key_request("", &[]) }
}

fn named(name: &str) -> pb::CreateKeyRequest {
    pb::CreateKeyRequest { name: Some(name.to_owned()), ..body() }
}

/// `GET /api-keys`: what is not revoked, of whoever asks.
async fn get_api_keys(client: &Client) -> Vec<pb::Key> {
    let states = [KeyState::Active, KeyState::Disabled, KeyState::Expired].map(i32::from).to_vec();
    client.list(pb::ListKeysRequest { states, ..Default::default() }).await.unwrap().keys
}

/// `DELETE /api-keys/:id`.
async fn delete(client: &Client, id: &str) -> Result<pb::RevokeKeyResponse, Status> {
    client.revoke(id).await
}

#[tokio::test]
async fn keys_authenticate_requests() {
    let server = eazip().await;
    let made = bearer(&server, "ann").await.create_key(body()).await;
    assert_eq!(server.root_client().check_reason(&made.token).await, Reason::Ok);
    assert_refused(
        server.client_without_token().list(pb::ListKeysRequest::default()).await,
        Code::Unauthenticated,
        "UNAUTHENTICATED",
    );
}

#[tokio::test]
async fn each_key_is_shown_only_once_at_creation() {
    let server = eazip().await;
    let ann = bearer(&server, "ann").await;
    let made = ann.create_key(named("Production")).await;
    assert!(made.token.starts_with("eazip_live_"));
    let later = format!("{:?} {:?}", get_api_keys(&ann).await, ann.get(&made.id).await);
    assert!(!later.contains(&made.token[made.key.hint.len()..]));
}

#[tokio::test]
async fn the_list_has_id_name_created_at_expires_at_and_last_used_at() {
    let server = eazip().await;
    let ann = bearer(&server, "ann").await;
    server.advance(1);
    let first =
        ann.create_key(pb::CreateKeyRequest { ttl: Some(proto_seconds(365 * DAY)), ..named("CI/CD") }).await;
    server.advance(5 * DAY);
    let second = ann.create_key(named("Production")).await;
    let created = server.timestamp_after(0);
    server.advance(DAY);
    assert_eq!(server.root_client().check_reason(&second.token).await, Reason::Ok);
    let rows = get_api_keys(&ann).await;
    assert_eq!(
        rows[..2].iter().map(|row| &row.id).collect::<Vec<_>>(),
        [&second.id, &first.id],
        "newest first"
    );
    let [production, ci] = [&rows[0], &rows[1]];
    assert!(uuid::Uuid::parse_str(&production.id).is_ok());
    assert_eq!((production.name.as_str(), production.created_at), ("Production", Some(created)));
    assert_eq!((production.expires_at, production.last_used_at), (None, Some(server.timestamp_after(0))));
    assert_eq!(ci.name, "CI/CD");
    assert_eq!((ci.expires_at, ci.last_used_at), (Some(server.timestamp_after(359 * 86_400)), None));
}

#[tokio::test]
async fn the_name_is_optional() {
    let server = eazip().await;
    let ann = bearer(&server, "ann").await;
    for _ in 0..2 {
        assert_eq!(
            ann.create_key(body()).await.key.name,
            "",
            "and nameless keys do not stand in each other's way"
        );
    }
}

#[tokio::test]
async fn the_name_has_at_most_255_characters() {
    let server = eazip().await;
    let ann = bearer(&server, "ann").await;
    let longest = "é".repeat(255);
    assert_eq!(ann.create_key(named(&longest)).await.key.name, longest, "characters, not bytes");
    assert_invalid(ann.create(named(&format!("{longest}x"))).await, &["name"]);
}

#[tokio::test]
async fn after_expires_at_the_key_is_no_longer_valid() {
    let server = eazip().await;
    let expires_at = Some(server.timestamp_after(100));
    let made = bearer(&server, "ann").await.create_key(pb::CreateKeyRequest { expires_at, ..body() }).await;
    server.advance(99);
    assert_eq!(server.root_client().check_reason(&made.token).await, Reason::Ok);
    server.advance(1);
    assert_eq!(server.root_client().check_reason(&made.token).await, Reason::Expired);
}

#[tokio::test]
async fn expires_at_must_be_in_the_future() {
    let server = eazip().await;
    let ann = bearer(&server, "ann").await;
    for past in [0, -1, -86_400] {
        let expires_at = Some(server.timestamp_after(past));
        assert_invalid(ann.create(pb::CreateKeyRequest { expires_at, ..body() }).await, &["expires_at"]);
    }
}

#[tokio::test]
async fn the_answer_of_create_has_the_key_and_all_that_the_list_has() {
    let server = eazip().await;
    // 2026-12-31T23:59:59Z, as on the page.
    let expires_at = Some(prost_types::Timestamp { seconds: 1_798_761_599, nanos: 0 });
    let request = pb::CreateKeyRequest { expires_at, ..named("CI/CD Pipeline") };
    let CreatedKey { id, token, key, .. } = bearer(&server, "ann").await.create_key(request).await;
    assert!(!id.is_empty() && !token.is_empty());
    assert_eq!((key.name.as_str(), key.created_at), ("CI/CD Pipeline", Some(server.timestamp_after(0))));
    assert_eq!((key.expires_at, key.last_used_at), (expires_at, None));
}

#[tokio::test]
async fn revoking_is_a_soft_delete() {
    let server = eazip().await;
    let ann = bearer(&server, "ann").await;
    let made = ann.create_key(named("Production")).await;
    delete(&ann, &made.id).await.unwrap();
    assert!(get_api_keys(&ann).await.iter().all(|row| row.id != made.id), "gone from the list");
    let kept = ann.get(&made.id).await.unwrap();
    assert_eq!(
        (kept.state(), kept.revoked_at),
        (KeyState::Revoked, Some(server.timestamp_after(0))),
        "kept on record"
    );
}

#[tokio::test]
async fn revoking_cannot_be_undone() {
    let server = eazip().await;
    let ann = bearer(&server, "ann").await;
    let made = ann.create_key(named("Production")).await;
    delete(&ann, &made.id).await.unwrap();
    let root = server.root_client();
    assert_refused(root.enable(&made.id).await, Code::FailedPrecondition, "KEY_REVOKED");
    assert_refused(
        root.update(&made.key, &["name", "expires_at"]).await,
        Code::FailedPrecondition,
        "KEY_REVOKED",
    );
    assert_refused(root.rotate(&made.id, 0).await, Code::FailedPrecondition, "KEY_NOT_ACTIVE");
    delete(&ann, &made.id).await.unwrap();
    assert_eq!(root.check_reason(&made.token).await, Reason::Revoked);
}

#[tokio::test]
async fn a_key_that_is_not_there_or_belongs_to_another_user_is_not_found_alike() {
    let server = eazip().await;
    let [ann, bob] = [bearer(&server, "ann").await, bearer(&server, "bob").await];
    let bobs = bob.create_key(named("Production")).await.id;
    let nowhere = another_id(&bobs);
    let mut heard = Vec::new();
    for id in [bobs.as_str(), &nowhere] {
        let status = assert_refused(delete(&ann, id).await, Code::NotFound, "KEY_NOT_FOUND");
        heard.push((status.message().to_owned(), status.details().to_vec()));
    }
    assert_eq!(heard[0], heard[1]);
    assert_eq!(bob.get(&bobs).await.unwrap().state(), KeyState::Active);
}

/// Another shape of the same product: its users' keys are user keys, and the site calls for the person.
#[tokio::test]
async fn a_user_key_of_another_user_is_not_found_like_one_that_is_not_there() {
    let server = eazip().await;
    let site = |user| server.root_client().with_header("x-keyward-acting-user", user);
    let bobs = site("bob").create_key(user_key_request("bob", &["all"])).await.id;
    let nowhere = another_id(&bobs);
    let mut heard = Vec::new();
    for id in [bobs.as_str(), &nowhere] {
        let status = assert_refused(delete(&site("ann"), id).await, Code::NotFound, "KEY_NOT_FOUND");
        heard.push((status.message().to_owned(), status.details().to_vec()));
    }
    assert_eq!(heard[0], heard[1]);
}

#[tokio::test]
async fn keys_are_labelled_by_their_purpose() {
    let server = eazip().await;
    let ann = bearer(&server, "ann").await;
    for name in ["Production Server", "Local Dev"] {
        assert_eq!(ann.create_key(named(name)).await.key.name, name);
    }
    let renamed = get_api_keys(&ann).await.remove(0);
    let key = pb::Key { name: "Laptop".to_owned(), ..renamed };
    assert_eq!(ann.update(&key, &["name"]).await.unwrap().name, "Laptop");
}

#[tokio::test]
async fn expires_at_serves_temporary_access_and_automated_rotation() {
    let server = eazip().await;
    let ann = bearer(&server, "ann").await;
    let ttl = Some(proto_seconds(30 * DAY));
    let made = ann.create_key(pb::CreateKeyRequest { ttl, ..named("job") }).await;
    server.advance(29 * DAY);
    let later = pb::Key { expires_at: Some(server.timestamp_after(30 * 86_400)), ..made.key.clone() };
    ann.update(&later, &["expires_at"]).await.unwrap();
    let new = ann.rotate(&made.id, DAY).await.unwrap();
    server.advance(DAY);
    assert_eq!(server.root_client().check_reason(&made.token).await, Reason::Rotated);
    assert_eq!(server.root_client().check_reason(&new.token).await, Reason::Ok);
}

#[tokio::test]
async fn different_keys_for_development_staging_and_production_are_apart() {
    let server = eazip().await;
    for environment in ["development", "staging", "production"] {
        let request = pb::CreateKeyRequest {
            environment: environment.to_owned(),
            ..service_key_request("ann", &["all"])
        };
        let made = server.create_key(request).await;
        let reason = server.root_client().check_reason(&made.token).await;
        assert_eq!(reason == Reason::Ok, environment == "production", "{environment}: {reason:?}");
    }
}

#[tokio::test]
async fn last_used_at_shows_keys_that_have_not_been_used_recently() {
    let server = eazip().await;
    let ann = bearer(&server, "ann").await;
    let [busy, idle] = [ann.create_key(named("busy")).await, ann.create_key(named("idle")).await];
    for made in [&busy, &idle] {
        assert_eq!(server.root_client().check_reason(&made.token).await, Reason::Ok);
    }
    server.advance(90 * DAY);
    assert_eq!(server.root_client().check_reason(&busy.token).await, Reason::Ok);
    let request =
        pb::ListKeysRequest { unused_since: Some(server.timestamp_after(-86_400)), ..Default::default() };
    let unused = ann.list(request).await.unwrap().keys;
    assert_eq!(unused.iter().map(|key| &key.id).collect::<Vec<_>>(), [&idle.id]);
}

#[tokio::test]
async fn a_compromised_key_is_revoked_right_away() {
    let server = eazip().await;
    let ann = bearer(&server, "ann").await;
    let made = ann.create_key(named("Production")).await;
    let reason = pb::RevokeReason::Compromised.into();
    let request = pb::RevokeKeyRequest { id: made.id.clone(), reason, comment: "leaked".to_owned() };
    let revoked = ann.keys().revoke(request).await.unwrap().into_inner().key.unwrap();
    assert_eq!(server.root_client().check_reason(&made.token).await, Reason::Revoked);
    assert_eq!(
        (revoked.revoke_reason(), revoked.revoke_comment.as_str()),
        (pb::RevokeReason::Compromised, "leaked")
    );
}

/// An id that no key has, made like the other.
fn another_id(id: &str) -> String {
    let mut bytes = *uuid::Uuid::parse_str(id).unwrap().as_bytes();
    bytes[15] ^= 1;
    uuid::Uuid::from_bytes(bytes).to_string()
}
