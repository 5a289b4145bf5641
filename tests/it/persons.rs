//! What a person behind an operator's call may know: to one who is no member, existing and absent ids are alike.

use keyward::pb::{self, KeyState};
use tonic::{Code, Status};

use crate::support::{Client, assert_refused, service_key_request, to_strings, user_key_request};

use super::people::{READ, list_members, list_members_request, list_roles, remove_member, server_with_admin};

/// Every call that names a key or an account, made for a person.
async fn every_call(
    caller: &Client,
    id: &str,
    token: &str,
    account: &str,
) -> Vec<(&'static str, Option<Status>)> {
    let (id, account) = (id.to_owned(), account.to_owned());
    let key = pb::Key { id: id.clone(), name: "new".to_owned(), ..Default::default() };
    let import = pb::ImportKey {
        account: account.clone(),
        environment: "production".to_owned(),
        scopes: to_strings(&[READ]),
        sha256: vec![7; 32],
        ..Default::default()
    };
    let rotation =
        pb::RotateKeyRequest { id: id.clone(), overlap: None, idempotency_key: Some("r".to_owned()) };
    let usage = pb::KeyUsageRequest { id: id.clone(), ..Default::default() };
    let list = pb::ListKeysRequest { account: account.clone(), ..Default::default() };
    let bulk = pb::BulkRevokeKeysRequest { account: account.clone(), ..Default::default() };
    let update =
        pb::UpdateAccountRequest { id: account.clone(), name: Some("New".to_owned()), ..Default::default() };
    let delete = pb::DeleteRoleRequest { account: account.clone(), name: "new".to_owned() };
    let audit = pb::ListAuditEntriesRequest { account: account.clone(), ..Default::default() };
    let imported = caller.import(vec![import]).await.unwrap().remove(0);
    let import = match imported.key {
        Some(_) => None,
        None => Some(Status::new(Code::NotFound, format!("{} {}", imported.error, imported.message))),
    };
    vec![
        ("Get", caller.get(&id).await.err()),
        ("Update", caller.update(&key, &["name"]).await.err()),
        ("Disable", caller.disable(&id).await.err()),
        ("Enable", caller.enable(&id).await.err()),
        ("Rotate", caller.rotate(&id, 0).await.err()),
        ("Rotate once", caller.keys().rotate(rotation).await.err()),
        ("FinishRotation", caller.finish_rotation(&id).await.err()),
        ("Usage", caller.keys().usage(usage).await.err()),
        ("Lookup", caller.lookup(token).await.err()),
        ("Revoke", caller.revoke(&id).await.err()),
        ("Create", caller.create(service_key_request(&account, &[READ])).await.err()),
        ("Import", import),
        ("List", caller.list(list).await.err()),
        ("BulkRevoke", caller.keys().bulk_revoke(bulk).await.err()),
        (
            "AccountService/Get",
            caller.accounts().get(pb::GetAccountRequest { id: account.clone() }).await.err(),
        ),
        ("AccountService/Update", caller.accounts().update(update).await.err()),
        ("Suspend", caller.suspend(&account).await.err()),
        ("Resume", caller.resume(&account).await.err()),
        ("PutRole", caller.put_role(&account, "new", &[READ]).await.err()),
        ("ListRoles", list_roles(caller, &account).await.err()),
        ("DeleteRole", caller.accounts().delete_role(delete).await.err()),
        ("PutMember", caller.put_member(&account, "new", "reader").await.err()),
        ("ListMembers", list_members(caller, list_members_request(&account)).await.err()),
        ("RemoveMember", remove_member(caller, &account, "rob").await.err()),
        ("AuditService/List", caller.list_audit_entries(audit).await.err()),
    ]
}

#[tokio::test]
async fn a_person_changes_an_account_only_with_a_role_that_may_and_gives_nothing_beyond_it() {
    let (server, ann) = server_with_admin().await;
    let root = server.root_client();
    root.put_member("acme", "rob", "reader").await.unwrap();
    root.put_role("acme", "owner", &["monitors:*", "keyward:accounts:write"]).await.unwrap();
    root.put_member("acme", "olga", "owner").await.unwrap();
    let olga = root.with_header("x-keyward-acting-user", "olga");
    let update =
        pb::UpdateAccountRequest { id: "acme".into(), name: Some("New".into()), ..Default::default() };
    let lacking = |result| assert_refused(result, Code::PermissionDenied, "ROLE_LACKS_PERMISSION");
    for person in [&ann, &root.with_header("x-keyward-acting-user", "rob")] {
        lacking(person.put_member("acme", "rob", "owner").await);
        lacking(person.put_role("acme", "reader", &["monitors:*"]).await);
        lacking(remove_member(person, "acme", "olga").await);
        lacking(person.suspend("acme").await.map(|_| 0));
        lacking(person.accounts().update(update.clone()).await.map(|_| 0));
        lacking(person.put_role("", "reader", &["monitors:*"]).await);
    }
    olga.put_member("acme", "rob", "owner").await.unwrap();
    let beyond = olga.put_role("acme", "reader", &["keyward:*"]).await;
    assert_refused(beyond, Code::PermissionDenied, "GRANT_BEYOND_CALLER");
    lacking(olga.put_role("", "reader", &["monitors:*"]).await);
    remove_member(&olga, "acme", "olga").await.unwrap();
}

#[tokio::test]
async fn to_a_person_who_is_no_member_existing_and_absent_keys_and_accounts_are_alike() {
    let (server, _) = server_with_admin().await;
    server.root_client().put_member("acme", "rob", "reader").await.unwrap();
    let made = server.create_key(service_key_request("acme", &[READ])).await;
    let zoe = server.root_client().with_header("x-keyward-acting-user", "zoe");
    let existing = every_call(&zoe, &made.id, &made.token, "acme").await;
    let unknown = made.token.replace("kw_live_", "kw_live_X");
    let absent = every_call(&zoe, "00000000-0000-7000-8000-000000000000", &unknown, "nowhere").await;
    for ((method, existing), (_, absent)) in existing.into_iter().zip(absent) {
        let (existing, absent) = (existing.expect(method), absent.expect(method));
        assert_eq!(existing.code(), Code::NotFound, "{method}: {existing:?}");
        let heard = |status: &Status| (status.code(), status.message().to_owned(), status.details().to_vec());
        assert_eq!(heard(&existing), heard(&absent), "{method}");
    }
    assert_eq!(server.root_client().get(&made.id).await.unwrap(), made.key, "nothing was done");
    let accounts =
        zoe.accounts().list(pb::ListAccountsRequest::default()).await.unwrap().into_inner().accounts;
    assert_eq!(accounts, []);
    let everywhere = zoe.list_audit_entries(pb::ListAuditEntriesRequest::default()).await;
    assert_refused(everywhere, Code::PermissionDenied, "ROLE_LACKS_PERMISSION");
}

#[tokio::test]
async fn a_member_finds_the_account_and_what_is_absent_there_is_not_found() {
    let (server, ann) = server_with_admin().await;
    server.root_client().put_member("acme", "rob", "reader").await.unwrap();
    let made = server.create_key(service_key_request("acme", &[READ])).await;
    for (method, refusal) in every_call(&ann, &made.id, &made.token, "acme").await {
        let code = refusal.map_or(Code::Ok, |status| status.code());
        assert_ne!(code, Code::NotFound, "{method}");
    }
    let accounts =
        ann.accounts().list(pb::ListAccountsRequest::default()).await.unwrap().into_inner().accounts;
    assert_eq!(accounts.iter().map(|account| account.id.as_str()).collect::<Vec<_>>(), ["acme"]);
}

#[tokio::test]
async fn a_person_who_ends_the_own_last_membership_finishes_it_by_the_same_call() {
    let (server, ann) = server_with_admin().await;
    let team = server.client_with_scopes("acme", &["keyward:accounts:write"]).await;
    let own = server.create_key(user_key_request("ann", &["all"])).await;
    remove_member(&team, "acme", "ann").await.unwrap();
    assert_eq!(server.root_client().get(&own.id).await.unwrap().state(), KeyState::Active);
    remove_member(&ann, "acme", "ann").await.unwrap();
    assert_eq!(server.root_client().get(&own.id).await.unwrap().state(), KeyState::Revoked);
}
