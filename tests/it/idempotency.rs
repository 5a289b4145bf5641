//! Requests that carry an idempotency key can be sent again.

use keyward::pb::{self, Reason};
use tonic::Code;

use crate::support::{
    Client, DAY, HOUR, assert_refused, named_key_request, proto_seconds, service_key_request,
    user_key_request,
};

use super::Server;

fn once(key: &str) -> pb::CreateKeyRequest {
    pb::CreateKeyRequest {
        idempotency_key: Some(key.to_owned()),
        ttl: Some(proto_seconds(30 * DAY)),
        ..service_key_request("acme", &["monitors:read"])
    }
}

async fn how_many(root: &Client) -> usize {
    let all = pb::ListKeysRequest { account: "acme".into(), page_size: Some(1000), ..Default::default() };
    root.list(all).await.unwrap().keys.len()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_request_again_answers_with_the_same_key_and_no_token() {
    let server = Server::with_accounts().await;
    let root = server.root_client();
    let first = root.create(once("a")).await.unwrap();
    server.advance(HOUR);
    let again = root.create(once("a")).await.unwrap();
    assert!(again.replayed && again.token.is_empty() && !first.replayed);
    assert_eq!((again.key, again.revision), (first.key, first.revision));
    assert_eq!(how_many(&root).await, 1);
    assert_eq!(root.check_reason(&first.token).await, Reason::Ok, "the first token is not touched");
}

#[tokio::test(flavor = "multi_thread")]
async fn another_request_under_the_same_key_is_refused() {
    let server = Server::with_accounts().await;
    let root = server.root_client();
    root.create(once("a")).await.unwrap();
    let reused = |request| {
        let root = root.clone();
        async move {
            assert_refused(root.create(request).await, Code::FailedPrecondition, "IDEMPOTENCY_KEY_REUSED")
        }
    };
    reused(pb::CreateKeyRequest { name: Some("x".into()), ..once("a") }).await;
    reused(pb::CreateKeyRequest { environment: "staging".into(), ..once("a") }).await;
    reused(pb::CreateKeyRequest { ttl: None, ..once("a") }).await;
    assert_eq!(how_many(&root).await, 1);
    root.create(once("b")).await.unwrap();
    assert_eq!(how_many(&root).await, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn one_key_for_a_creation_is_no_key_for_a_rotation() {
    let server = Server::with_accounts().await;
    let root = server.root_client();
    let made = root.create_key(once("a")).await;
    let rotate = pb::RotateKeyRequest { id: made.id, idempotency_key: Some("a".into()), overlap: None };
    assert_refused(root.keys().rotate(rotate).await, Code::FailedPrecondition, "IDEMPOTENCY_KEY_REUSED");
    assert_eq!(root.check_reason(&made.token).await, Reason::Ok);
}

#[tokio::test(flavor = "multi_thread")]
async fn each_caller_has_its_own_keys() {
    let server = Server::with_accounts().await;
    let one = server.client_with_scopes("acme", &["monitors:*", "keyward:keys:*"]).await;
    let two = server.client_with_scopes("acme", &["monitors:*", "keyward:keys:*"]).await;
    let request = || pb::CreateKeyRequest { ttl: None, ..once("a") };
    let first = one.create(request()).await.unwrap();
    let second = two.create(request()).await.unwrap();
    assert!(!second.replayed && second.key.unwrap().id != first.key.unwrap().id);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_keeps_its_keys_through_its_own_rotation() {
    let server = Server::with_accounts().await;
    let made = server.create_key(service_key_request("acme", &["monitors:*", "keyward:keys:*"])).await;
    let request = || pb::CreateKeyRequest { ttl: None, ..once("a") };
    server.client_with_token(&made.token).create(request()).await.unwrap();
    let new = server.root_client().rotate(&made.id, 0).await.unwrap();
    assert!(server.client_with_token(&new.token).create(request()).await.unwrap().replayed);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_counts_for_24_hours() {
    let server = Server::with_accounts().await;
    let root = server.root_client();
    let first = root.create(once("a")).await.unwrap();
    server.advance(DAY - 1);
    assert!(root.create(once("a")).await.unwrap().replayed, "a replay does not prolong it");
    server.advance(2);
    let anew = root.create(once("a")).await.unwrap();
    assert!(!anew.replayed && !anew.token.is_empty());
    assert_ne!(anew.key.unwrap().id, first.key.unwrap().id);
    assert!(root.create(once("a")).await.unwrap().replayed, "and counts for the new one from then on");
}

#[tokio::test(flavor = "multi_thread")]
async fn of_many_identical_creations_at_once_one_makes_the_key() {
    let server = Server::with_accounts().await;
    let calls: Vec<_> = (0..20)
        .map(|_| {
            let root = server.root_client();
            tokio::spawn(async move { root.create(once("a")).await.unwrap() })
        })
        .collect();
    let (mut made, mut ids) = (0, std::collections::BTreeSet::new());
    for call in calls {
        let answer = call.await.unwrap();
        assert_eq!(answer.token.is_empty(), answer.replayed);
        made += u32::from(!answer.replayed);
        ids.insert(answer.key.unwrap().id);
    }
    assert_eq!((made, ids.len(), how_many(&server.root_client()).await), (1, 1, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_creation_leaves_its_key_free() {
    let server = Server::with_accounts().await;
    let root = server.root_client();
    let taken = server.create_key(named_key_request("acme", "CI")).await;
    let request =
        || pb::CreateKeyRequest { idempotency_key: Some("a".into()), ..named_key_request("acme", "CI") };
    assert_refused(root.create(request()).await, Code::AlreadyExists, "KEY_NAME_TAKEN");
    root.revoke(&taken.id).await.unwrap();
    assert!(!root.create(request()).await.unwrap().replayed);
    assert!(root.create(request()).await.unwrap().replayed, "its own name is not in its way");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replay_shows_the_key_as_it_is_now() {
    let server = Server::with_accounts().await;
    let root = server.root_client();
    let made = root.create_key(once("a")).await;
    root.revoke(&made.id).await.unwrap();
    let again = root.create(once("a")).await.unwrap();
    assert_eq!(again.key.unwrap(), root.get(&made.id).await.unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_creation_is_replayed_even_when_its_expiry_has_passed() {
    let server = Server::with_accounts().await;
    let root = server.root_client();
    let request =
        pb::CreateKeyRequest { ttl: None, expires_at: Some(server.timestamp_after(60)), ..once("a") };
    let first = root.create(request.clone()).await.unwrap();
    server.advance(60);
    let again = root.create(request).await.unwrap();
    assert_eq!((again.replayed, again.key.unwrap().id), (true, first.key.unwrap().id));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rotation_again_gives_no_second_token() {
    let server = Server::with_accounts().await;
    let root = server.root_client();
    let made = server.create_key(named_key_request("acme", "CI")).await;
    let request = pb::RotateKeyRequest {
        id: made.id.clone(),
        overlap: Some(proto_seconds(60)),
        idempotency_key: Some("r".into()),
    };
    let first = root.keys().rotate(request.clone()).await.unwrap().into_inner();
    server.advance(10);
    let again = root.keys().rotate(request.clone()).await.unwrap().into_inner();
    assert!(again.replayed && again.token.is_empty() && !first.replayed);
    assert_eq!((again.revision, again.previous_expires_at), (first.revision, first.previous_expires_at));
    assert_eq!(again.key, first.key);
    assert_eq!(root.check_reason(&first.token).await, Reason::Ok);
    assert_eq!(root.check_reason(&made.token).await, Reason::Ok);
    let other = pb::RotateKeyRequest { overlap: None, ..request };
    assert_refused(root.keys().rotate(other).await, Code::FailedPrecondition, "IDEMPOTENCY_KEY_REUSED");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rotation_is_replayed_even_when_the_key_is_no_longer_active() {
    let server = Server::with_accounts().await;
    let root = server.root_client();
    let made = server.create_key(named_key_request("acme", "CI")).await;
    let request =
        pb::RotateKeyRequest { id: made.id.clone(), overlap: None, idempotency_key: Some("r".into()) };
    root.keys().rotate(request.clone()).await.unwrap();
    root.disable(&made.id).await.unwrap();
    assert!(root.keys().rotate(request).await.unwrap().into_inner().replayed);
}

#[tokio::test(flavor = "multi_thread")]
async fn of_many_identical_rotations_at_once_one_rotates() {
    let server = Server::with_accounts().await;
    let root = server.root_client();
    let made = server.create_key(named_key_request("acme", "CI")).await;
    let calls: Vec<_> = (0..10)
        .map(|_| {
            let (root, id) = (root.clone(), made.id.clone());
            let request = pb::RotateKeyRequest { id, overlap: None, idempotency_key: Some("r".into()) };
            tokio::spawn(async move { root.keys().rotate(request).await.unwrap().into_inner() })
        })
        .collect();
    let mut tokens = Vec::new();
    for call in calls {
        let answer = call.await.unwrap();
        tokens.extend((!answer.replayed).then_some(answer.token));
    }
    assert_eq!(tokens.len(), 1);
    assert_eq!(root.check_reason(&tokens[0]).await, Reason::Ok);
    assert_eq!(root.get(&made.id).await.unwrap().secrets[0].version, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replay_tells_a_stranger_nothing() {
    let server = Server::with_accounts().await;
    let theirs = server.create_key(named_key_request("other", "CI")).await;
    let acme = server.client_with_scopes("acme", &["keyward:keys:*", "monitors:*"]).await;
    let rotate = |id: &str| {
        let request =
            pb::RotateKeyRequest { id: id.to_owned(), overlap: None, idempotency_key: Some("r".into()) };
        let acme = acme.clone();
        async move { acme.keys().rotate(request).await }
    };
    let own = acme.create_key(service_key_request("", &["monitors:read"])).await;
    rotate(&own.id).await.unwrap();
    assert_refused(rotate(&theirs.id).await, Code::NotFound, "KEY_NOT_FOUND");
    assert_refused(rotate("00000000-0000-7000-8000-000000000000").await, Code::NotFound, "KEY_NOT_FOUND");
}

/// The dashboard's calls for a person.
fn acting(server: &Server, user: &str) -> Client {
    server.root_client().with_header("x-keyward-acting-user", user)
}

/// `acme` with two admins.
async fn with_admins() -> Server {
    let server = Server::with_accounts().await;
    server.root_client().put_role("", "admin", &["all", "keyward:keys:*"]).await.unwrap();
    for user in ["ann", "bob"] {
        server.root_client().put_member("acme", user, "admin").await.unwrap();
    }
    server
}

#[tokio::test(flavor = "multi_thread")]
async fn a_person_learns_nothing_of_another_persons_requests() {
    let server = with_admins().await;
    let (ann, bob, zoe) = (acting(&server, "ann"), acting(&server, "bob"), acting(&server, "zoe"));
    let first = ann.create_key(once("a")).await;
    let another = pb::CreateKeyRequest { name: Some("x".into()), ..once("a") };
    for request in [once("a"), another] {
        assert_refused(zoe.create(request).await, Code::NotFound, "ACCOUNT_NOT_FOUND");
    }
    let second = bob.create(once("a")).await.unwrap();
    assert!(!second.replayed && second.key.unwrap().id != first.id);
    assert_eq!(ann.create(once("a")).await.unwrap().key.unwrap().id, first.id);
    let own = server.root_client().create(once("a")).await.unwrap();
    assert!(!own.replayed, "nor does the operator who acts for nobody");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_person_who_has_left_is_shown_nothing_that_was_made_before() {
    let server = with_admins().await;
    let ann = acting(&server, "ann");
    let made = ann.create_key(once("a")).await;
    let rotate = pb::RotateKeyRequest { id: made.id, idempotency_key: Some("r".into()), overlap: None };
    ann.keys().rotate(rotate.clone()).await.unwrap();
    let remove = pb::RemoveMemberRequest { account: "acme".into(), user: "ann".into() };
    server.root_client().accounts().remove_member(remove).await.unwrap();
    assert_refused(ann.create(once("a")).await, Code::NotFound, "KEY_NOT_FOUND");
    assert_refused(ann.keys().rotate(rotate).await, Code::NotFound, "KEY_NOT_FOUND");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_key_has_idempotency_keys_apart_in_each_account_that_it_names() {
    let server = with_admins().await;
    server.root_client().put_member("other", "ann", "admin").await.unwrap();
    let made = server.create_key(user_key_request("ann", &["all", "keyward:keys:*"])).await;
    let within = |account| server.client_with_token(&made.token).with_header("x-keyward-account", account);
    let request = || pb::CreateKeyRequest { account: String::new(), ttl: None, ..once("a") };
    let first = within("acme").create_key(request()).await;
    let second = within("other").create(request()).await.unwrap();
    assert_eq!((second.replayed, second.key.unwrap().account.as_str()), (false, "other"));
    assert_eq!(within("acme").create(request()).await.unwrap().key.unwrap().id, first.id);
}
