//! Account limits over the wire: past them a change is refused, what takes rights away never is, and what changes nothing
//! counts for nothing.

use keyward::{domain::account::AccountLimits, pb};
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use super::Server;
use crate::support::{
    Client, HOUR, assert_refused, error_reason, named_key_request, service_key_request, to_strings,
    user_key_request,
};

const MANY: u64 = 1_000;

async fn limited(limits: AccountLimits) -> Server {
    let server = Server::start_with(|settings| settings.key_settings.account_limits = limits).await;
    server.create_account("acme").await;
    server.create_account("other").await;
    server
}

fn limits() -> AccountLimits {
    AccountLimits { keys: MANY, roles: MANY, rotations_per_hour: MANY, log_rows_per_hour: MANY }
}

/// Holds that a call was refused by this limit, and that the refusal says its value and what to do.
#[track_caller]
fn past<T>(result: Result<T, Status>, limit: &str, value: u64) -> Status {
    let status = assert_refused(result, Code::ResourceExhausted, "ACCOUNT_LIMIT");
    let metadata = status.get_details_error_info().unwrap().metadata;
    assert_eq!((metadata["limit"].as_str(), metadata["value"].as_str()), (limit, &*value.to_string()));
    assert!(status.message().contains(&format!("account_limits.{limit}")), "{status:?}");
    status
}

async fn remove(client: &Client, user: &str) -> Result<(), Status> {
    let request = pb::RemoveMemberRequest { account: "acme".to_owned(), user: user.to_owned() };
    client.accounts().remove_member(request).await.map(drop)
}

async fn delete_role(client: &Client, name: &str) -> Result<(), Status> {
    let request = pb::DeleteRoleRequest { account: "acme".to_owned(), name: name.to_owned() };
    client.accounts().delete_role(request).await.map(drop)
}

async fn newest_revision(server: &Server) -> u64 {
    server.root_client().list_audit_entries(pb::ListAuditEntriesRequest::default()).await.unwrap().entries[0]
        .revision
}

#[tokio::test(flavor = "multi_thread")]
async fn past_its_limit_of_keys_an_account_makes_none_until_one_is_revoked() {
    let server = limited(AccountLimits { keys: 3, ..limits() }).await;
    let manager = server.client_with_scopes("acme", &["keyward:keys:write", "monitors:read"]).await;
    let key = || service_key_request("acme", &["monitors:read"]);
    let first = manager.create_key(key()).await;
    let import = |number: u8| pb::ImportKey {
        account: "acme".to_owned(),
        environment: "production".to_owned(),
        scopes: to_strings(&["monitors:read"]),
        sha256: vec![number; 32],
        hint: "sk".to_owned(),
        ..Default::default()
    };
    let results = manager.import((1..4).map(import).collect()).await.unwrap();
    let errors: Vec<_> = results.iter().map(|result| result.error.as_str()).collect();
    assert_eq!(errors, ["", "ACCOUNT_LIMIT", "ACCOUNT_LIMIT"]);
    past(manager.create(key()).await, "keys", 3);
    past(server.root_client().create(key()).await, "keys", 3);
    server.create_key(service_key_request("other", &["monitors:read"])).await;
    server.create_key(user_key_request("ann", &["monitors:read"])).await;
    manager.disable(&first.id).await.unwrap();
    past(manager.create(key()).await, "keys", 3);
    manager.revoke(&first.id).await.unwrap();
    manager.create_key(key()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn past_its_other_limits_an_account_makes_no_role_rotates_no_key_and_fills_no_log() {
    let server = limited(AccountLimits { roles: 1, rotations_per_hour: 1, ..limits() }).await;
    let root = server.root_client();
    root.put_role("acme", "one", &["monitors:read"]).await.unwrap();
    past(root.put_role("acme", "two", &["monitors:read"]).await, "roles", 1);
    root.put_role("", "global", &["monitors:read"]).await.unwrap();
    let made = server.create_key(named_key_request("acme", "a")).await;
    root.rotate(&made.id, 0).await.unwrap();
    let status = past(root.rotate(&made.id, 0).await, "rotations_per_hour", 1);
    assert!(status.get_details_retry_info().unwrap().retry_delay.is_some());
    server.advance(HOUR);
    root.rotate(&made.id, 0).await.unwrap();

    let server = limited(AccountLimits { log_rows_per_hour: 2, ..limits() }).await;
    server.create_key(named_key_request("acme", "a")).await;
    past(server.root_client().create(named_key_request("acme", "b")).await, "log_rows_per_hour", 2);
    past(server.root_client().put_role("acme", "one", &["monitors:read"]).await, "log_rows_per_hour", 2);
    server.advance(HOUR);
    server.create_key(named_key_request("acme", "b")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_limit_keeps_anybody_from_taking_rights_away() {
    let server = limited(AccountLimits { log_rows_per_hour: 12, ..limits() }).await;
    let root = server.root_client();
    root.put_role("acme", "agent", &["monitors:read", "monitors:write"]).await.unwrap();
    root.put_role("acme", "unused", &["monitors:read"]).await.unwrap();
    for user in ["ann", "bob"] {
        root.put_member("acme", user, "agent").await.unwrap();
    }
    let mut keys = Vec::new();
    for name in ["a", "b", "c", "d", "e"] {
        keys.push(server.create_key(named_key_request("acme", name)).await);
    }
    root.rotate(&keys[0].id, HOUR).await.unwrap();
    root.put_role("acme", "narrow", &["monitors:read"]).await.unwrap();
    past(root.enable(&{ root.disable(&keys[4].id).await.unwrap().id }).await, "log_rows_per_hour", 12);

    root.finish_rotation(&keys[0].id).await.unwrap();
    let narrower = pb::Key { expires_at: Some(server.timestamp_after(60)), ..keys[0].key.clone() };
    root.update(&narrower, &["expires_at"]).await.unwrap();
    let wider = pb::Key { scopes: to_strings(&["monitors:*"]), ..narrower };
    past(root.update(&wider, &["scopes"]).await, "log_rows_per_hour", 12);
    root.put_role("acme", "agent", &["monitors:read"]).await.unwrap();
    past(root.put_role("acme", "agent", &["monitors:*"]).await, "log_rows_per_hour", 12);
    delete_role(&root, "unused").await.unwrap();
    remove(&root, "ann").await.unwrap();
    past(root.put_member("acme", "ann", "agent").await, "log_rows_per_hour", 12);
    root.revoke(&keys[1].id).await.unwrap();
    server.client_with_token(&keys[2].token).revoke_self().await.unwrap();
    let bulk = pb::BulkRevokeKeysRequest { account: "acme".to_owned(), ..Default::default() };
    let revoked = root.keys().bulk_revoke(bulk).await.unwrap().into_inner().keys;
    assert!(revoked.len() == 3 && revoked.iter().all(|key| key.revoked), "{revoked:?}");
    root.suspend("acme").await.unwrap();
    root.resume("acme").await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_that_also_takes_something_away_is_held_to_the_limits_like_others() {
    let server = limited(AccountLimits { log_rows_per_hour: 12, ..limits() }).await;
    let root = server.root_client();
    root.put_role("acme", "agent", &["monitors:read"]).await.unwrap();
    let made = server.create_key(named_key_request("acme", "a")).await;
    let scopes = |scope: &str| pb::Key { scopes: to_strings(&[scope]), ..made.key.clone() };
    for scope in ["a", "b"].iter().cycle().take(9) {
        root.update(&scopes(scope), &["scopes"]).await.unwrap();
    }
    past(root.update(&scopes("c"), &["scopes"]).await, "log_rows_per_hour", 12);
    past(root.put_role("acme", "agent", &["other:read"]).await, "log_rows_per_hour", 12);
    for end in (0..12).rev() {
        let earlier = pb::Key { expires_at: Some(server.timestamp_after(60 + end)), ..made.key.clone() };
        root.update(&earlier, &["expires_at"]).await.unwrap();
    }
    let earlier = pb::Key { expires_at: Some(server.timestamp_after(50)), ..made.key.clone() };
    past(root.update(&earlier, &["expires_at"]).await, "log_rows_per_hour", 24);
    root.revoke(&made.id).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_that_changes_nothing_writes_no_log_row() {
    let server = limited(limits()).await;
    let root = server.root_client();
    root.put_role("acme", "agent", &["monitors:read"]).await.unwrap();
    root.put_role("", "agent", &["monitors:*"]).await.unwrap();
    root.put_member("acme", "ann", "agent").await.unwrap();
    let made = server.create_key(named_key_request("acme", "a")).await;
    root.disable(&made.id).await.unwrap();
    let changed = root.get(&made.id).await.unwrap();
    root.suspend("other").await.unwrap();
    let before = newest_revision(&server).await;

    let every = ["name", "scopes", "expires_at", "customers", "metadata"];
    assert_eq!(root.update(&changed, &every).await.unwrap(), changed);
    root.disable(&made.id).await.unwrap();
    root.finish_rotation(&made.id).await.unwrap();
    assert!(root.put_role("acme", "agent", &["monitors:read"]).await.unwrap() < before);
    assert!(root.put_role("", "agent", &["monitors:*"]).await.unwrap() < before);
    assert!(root.put_member("acme", "ann", "agent").await.unwrap() < before);
    root.suspend("other").await.unwrap();
    root.resume("acme").await.unwrap();
    let same = pb::UpdateAccountRequest {
        id: "acme".to_owned(),
        name: Some("acme".to_owned()),
        no_longest_life: true,
        ..Default::default()
    };
    root.accounts().update(same).await.unwrap();
    assert_eq!(newest_revision(&server).await, before);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_others_have_changed_meanwhile_is_no_change_that_changes_nothing() {
    let server = limited(limits()).await;
    let root = server.root_client();
    let made = server.create_key(named_key_request("acme", "a")).await;
    let renamed =
        root.update(&pb::Key { name: "b".to_owned(), ..made.key.clone() }, &["name"]).await.unwrap();
    let back = root.update(&made.key, &["name"]).await.unwrap();
    assert!(renamed.revision > made.revision && back.revision > renamed.revision);
    let gone = root.revoke(&made.id).await.unwrap();
    let refused = root.update(&made.key, &["name"]).await.unwrap_err();
    assert_eq!(error_reason(&refused), "KEY_REVOKED", "{gone:?}");
}
