//! AccountService: accounts. Members and roles have tests of their own.

use keyward::pb::{self, Reason};
use tonic::{Code, Status};

use crate::support::{
    Client, DAY, START, Server, assert_invalid, assert_refused, named_key_request, proto_seconds,
    service_key_request, to_strings,
};

async fn create(root: &Client, id: &str, name: &str) -> Result<pb::Account, Status> {
    let request = pb::CreateAccountRequest { id: id.into(), name: name.into(), longest_life: None };
    Ok(root.accounts().create(request).await?.into_inner().account.unwrap())
}

async fn get(caller: &Client, id: &str) -> Result<pb::Account, Status> {
    let request = pb::GetAccountRequest { id: id.into() };
    Ok(caller.accounts().get(request).await?.into_inner().account.unwrap())
}

async fn update(caller: &Client, request: pb::UpdateAccountRequest) -> Result<pb::Account, Status> {
    Ok(caller.accounts().update(request).await?.into_inner().account.unwrap())
}

async fn ids(caller: &Client, page_size: Option<u32>, page_token: &str) -> (Vec<String>, String) {
    let request = pb::ListAccountsRequest { page_size, page_token: page_token.into() };
    let page = caller.accounts().list(request).await.unwrap().into_inner();
    (page.accounts.into_iter().map(|account| account.id).collect(), page.next_page_token)
}

fn longest(id: &str, days: u64) -> pb::UpdateAccountRequest {
    let longest_life = Some(proto_seconds(days * DAY));
    pb::UpdateAccountRequest { id: id.into(), longest_life, ..Default::default() }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_account_is_made_with_the_id_and_name_that_are_asked_for() {
    let server = Server::start().await;
    let root = server.root_client();
    let account = create(&root, "acme-1_x", "Acme Ltd.").await.unwrap();
    let at = Some(prost_types::Timestamp { seconds: START, nanos: 0 });
    let expected = pb::Account {
        id: "acme-1_x".into(),
        name: "Acme Ltd.".into(),
        suspended: false,
        created_at: at,
        updated_at: at,
        revision: 3,
        longest_life: None,
    };
    assert_eq!(account, expected, "the operator account and the root key came before");
    assert_eq!(get(&root, "acme-1_x").await.unwrap(), expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_name_it_is_called_by_its_id_and_without_an_id_one_is_made_up() {
    let server = Server::start().await;
    let root = server.root_client();
    assert_eq!(create(&root, "acme", "").await.unwrap().name, "acme");
    let (one, two) = (create(&root, "", "One").await.unwrap(), create(&root, "", "").await.unwrap());
    assert!(one.id != two.id && two.name == two.id);
    assert_eq!(get(&root, &one.id).await.unwrap().name, "One");
    server.create_key(service_key_request(&one.id, &["monitors:read"])).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_id_is_taken_once_and_for_all() {
    let server = Server::start().await;
    let root = server.root_client();
    create(&root, "acme", "First").await.unwrap();
    assert_refused(create(&root, "acme", "Second").await, Code::AlreadyExists, "ACCOUNT_EXISTS");
    assert_refused(create(&root, "keyward", "").await, Code::AlreadyExists, "ACCOUNT_EXISTS");
    root.suspend("acme").await.unwrap();
    assert_refused(create(&root, "acme", "").await, Code::AlreadyExists, "ACCOUNT_EXISTS");
    assert_eq!(get(&root, "acme").await.unwrap().name, "First");
}

#[tokio::test(flavor = "multi_thread")]
async fn ids_names_and_lives_keep_to_their_rules() {
    let server = Server::start().await;
    let root = server.root_client();
    for id in ["a.b", "a b", "é", "a:b", &"a".repeat(65)] {
        assert_invalid(create(&root, id, "").await, &["id"]);
        assert_invalid(get(&root, id).await, &["id"]);
        assert_invalid(root.suspend(id).await, &["id"]);
        assert_invalid(root.resume(id).await, &["id"]);
    }
    assert_invalid(create(&root, "acme", &"é".repeat(256)).await, &["name"]);
    for name in ["a\nb", " a", "a\u{202e}"] {
        assert_invalid(create(&root, "acme", name).await, &["name"]);
    }
    create(&root, &"a".repeat(64), &"é".repeat(255)).await.unwrap();
    for life in [0, DAY - 1, 101 * 366 * DAY] {
        let longest_life = Some(proto_seconds(life));
        let request = pb::CreateAccountRequest { id: "x".into(), longest_life, ..Default::default() };
        assert_invalid(root.accounts().create(request).await, &["longest_life"]);
    }
    let all =
        pb::CreateAccountRequest { id: "A!".into(), name: "\n".into(), longest_life: Some(proto_seconds(1)) };
    assert_invalid(root.accounts().create(all).await, &["id", "name", "longest_life"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn accounts_are_listed_in_the_order_of_their_ids_page_by_page() {
    let server = Server::start().await;
    let root = server.root_client();
    for id in ["c", "a", "b", "z"] {
        server.create_account(id).await;
    }
    assert_eq!(ids(&root, None, "").await.0, ["a", "b", "c", "keyward", "z"]);
    let (first, token) = ids(&root, Some(2), "").await;
    assert_eq!(first, ["a", "b"]);
    server.create_account("aa").await;
    server.create_account("bb").await;
    let (second, token) = ids(&root, Some(3), &token).await;
    assert_eq!(second, ["bb", "c", "keyward"]);
    let (third, token) = ids(&root, Some(3), &token).await;
    assert_eq!((third, token), (to_strings(&["z"]), String::new()));
    for (page_size, page_token, field) in
        [(Some(0), "", "page_size"), (Some(1001), "", "page_size"), (None, "x", "page_token")]
    {
        let request = pb::ListAccountsRequest { page_size, page_token: page_token.into() };
        assert_invalid(root.accounts().list(request).await, &[field]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_update_changes_what_it_names() {
    let server = Server::with_accounts().await;
    let root = server.root_client();
    let before = get(&root, "acme").await.unwrap();
    server.advance(5);
    let name =
        pb::UpdateAccountRequest { id: "acme".into(), name: Some("Acme".into()), ..Default::default() };
    let named = update(&root, name.clone()).await.unwrap();
    let expected = pb::Account {
        name: "Acme".into(),
        updated_at: Some(server.timestamp_after(0)),
        revision: named.revision,
        ..before.clone()
    };
    assert_eq!(named, expected);
    let lived = update(&root, longest("acme", 30)).await.unwrap();
    assert_eq!((lived.name.as_str(), lived.longest_life), ("Acme", Some(proto_seconds(30 * DAY))));
    let free = pb::UpdateAccountRequest { id: "acme".into(), no_longest_life: true, ..Default::default() };
    let freed = update(&root, free.clone()).await.unwrap();
    assert_eq!((freed.name.as_str(), freed.longest_life), ("Acme", None));
    assert_eq!(update(&root, name).await.unwrap(), freed, "the same again changes nothing");

    let nothing = pb::UpdateAccountRequest { id: "acme".into(), ..Default::default() };
    assert_invalid(update(&root, nothing).await, &["name"]);
    let both = pb::UpdateAccountRequest { no_longest_life: true, ..longest("acme", 30) };
    assert_invalid(update(&root, both).await, &["no_longest_life"]);
    let empty =
        pb::UpdateAccountRequest { id: "acme".into(), name: Some(String::new()), ..Default::default() };
    assert_invalid(update(&root, empty).await, &["name"]);
    assert_refused(update(&root, longest("nowhere", 30)).await, Code::NotFound, "ACCOUNT_NOT_FOUND");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_suspended_account_is_refused_in_every_way_until_it_is_resumed() {
    let server = Server::with_accounts().await;
    let root = server.root_client();
    let made = server.create_key(service_key_request("acme", &["keyward:keys:read"])).await;
    let others = server.create_key(named_key_request("other", "CI")).await;
    let suspended = root.suspend("acme").await.unwrap();
    let account = suspended.account.unwrap();
    assert!(account.suspended && suspended.propagation.unwrap().complete);
    assert_eq!(root.check_reason(&made.token).await, Reason::AccountSuspended);
    assert_refused(
        server.client_with_token(&made.token).who_am_i().await,
        Code::Unauthenticated,
        "UNAUTHENTICATED",
    );
    assert_eq!(root.check_reason(&others.token).await, Reason::Ok, "others are left alone");
    let resumed = root.resume("acme").await.unwrap();
    assert!(!resumed.account.unwrap().suspended && resumed.revision > suspended.revision);
    assert_eq!(root.check_reason(&made.token).await, Reason::Ok);
    server.client_with_token(&made.token).who_am_i().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn suspending_and_resuming_again_change_nothing() {
    let server = Server::with_accounts().await;
    let root = server.root_client();
    let before = get(&root, "acme").await.unwrap();
    assert_eq!(root.resume("acme").await.unwrap().account.unwrap(), before);
    let first = root.suspend("acme").await.unwrap();
    server.advance(5);
    let second = root.suspend("acme").await.unwrap();
    assert_eq!((second.account, second.revision), (first.account, first.revision));
    assert_refused(root.suspend("nowhere").await, Code::NotFound, "ACCOUNT_NOT_FOUND");
    assert_refused(root.resume("nowhere").await, Code::NotFound, "ACCOUNT_NOT_FOUND");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_operator_account_cannot_be_suspended() {
    let server = Server::start().await;
    let root = server.root_client();
    assert_refused(root.suspend("keyward").await, Code::FailedPrecondition, "OPERATOR_ACCOUNT");
    root.who_am_i().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn accounts_are_made_and_changed_by_operators_only() {
    let server = Server::with_accounts().await;
    let manager = server.client_with_scopes("acme", &["keyward:*"]).await;
    let only_operators = |result: Result<(), Status>| {
        assert_refused(result, Code::PermissionDenied, "OPERATOR_ONLY");
    };
    only_operators(create(&manager, "new", "").await.map(drop));
    for id in ["acme", "other", "nowhere"] {
        only_operators(manager.suspend(id).await.map(drop));
        only_operators(manager.resume(id).await.map(drop));
        only_operators(update(&manager, longest(id, 30)).await.map(drop));
    }
    assert!(!get(&server.root_client(), "acme").await.unwrap().suspended);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_account_caller_sees_its_own_account_alone() {
    let server = Server::with_accounts().await;
    let manager = server.client_with_scopes("acme", &["keyward:accounts:read"]).await;
    assert_eq!(ids(&manager, None, "").await, (to_strings(&["acme"]), String::new()));
    assert_eq!(get(&manager, "acme").await.unwrap().id, "acme");
    for id in ["other", "keyward", "nowhere"] {
        assert_refused(get(&manager, id).await, Code::NotFound, "ACCOUNT_NOT_FOUND");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_new_key_or_expiry_outlives_the_accounts_longest_life() {
    let server = Server::with_accounts().await;
    let root = server.root_client();
    let before = server.create_key(named_key_request("acme", "before")).await;
    update(&root, longest("acme", 30)).await.unwrap();
    let living =
        |ttl| pb::CreateKeyRequest { ttl: Some(proto_seconds(ttl)), ..service_key_request("acme", &["a"]) };
    assert_invalid(root.create(service_key_request("acme", &["a"])).await, &["expires_at"]);
    assert_invalid(root.create(living(30 * DAY + 1)).await, &["expires_at"]);
    let made = server.create_key(living(30 * DAY)).await;
    let import = pb::ImportKey {
        account: "acme".into(),
        environment: "production".into(),
        scopes: to_strings(&["a"]),
        sha256: vec![1; 32],
        ..Default::default()
    };
    assert_eq!(root.import(vec![import]).await.unwrap()[0].error, "INVALID_REQUEST");

    let expiring =
        |at: Option<i64>| pb::Key { expires_at: at.map(|at| server.timestamp_after(at)), ..made.key.clone() };
    assert_invalid(root.update(&expiring(None), &["expires_at"]).await, &["key.expires_at"]);
    assert_invalid(root.update(&expiring(Some(31 * 86_400)), &["expires_at"]).await, &["key.expires_at"]);
    root.update(&expiring(Some(29 * 86_400)), &["expires_at"]).await.unwrap();

    assert_eq!(root.check_reason(&before.token).await, Reason::Ok, "what was made before is left alone");
    let renamed = pb::Key { name: "renamed".into(), ..before.key.clone() };
    root.update(&renamed, &["name"]).await.expect("and may change in all but its expiry");
    server.create_key(named_key_request("other", "unbound")).await;
}
