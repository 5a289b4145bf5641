//! AuditService.List: what is written, for whom, and how it is found.

use std::collections::BTreeMap;

use keyward::{domain::token::TokenDigest, pb};
use tonic::Code;

use crate::support::{
    Client, assert_invalid, assert_refused, named_key_request, service_key_request, to_strings,
    user_key_request,
};

use super::Server;

async fn entries(caller: &Client, request: pb::ListAuditEntriesRequest) -> Vec<pb::AuditEntry> {
    caller.list_audit_entries(request).await.unwrap().entries
}

async fn all(caller: &Client) -> Vec<pb::AuditEntry> {
    let request = pb::ListAuditEntriesRequest { page_size: Some(1000), ..Default::default() };
    entries(caller, request).await
}

fn actions(entries: &[pb::AuditEntry]) -> Vec<&str> {
    entries.iter().map(|entry| entry.action.as_str()).collect()
}

/// Makes one of every kind of change; gives every token that there was.
async fn everything(server: &Server) -> Vec<String> {
    let root = server.root_client();
    server.create_account("acme").await;
    let name = Some("Acme".to_owned());
    let renamed = pb::UpdateAccountRequest { id: "acme".into(), name, ..Default::default() };
    root.accounts().update(renamed).await.unwrap();
    root.suspend("acme").await.unwrap();
    root.resume("acme").await.unwrap();
    let made = server.create_key(named_key_request("acme", "CI")).await;
    root.update(&pb::Key { name: "new".into(), ..made.key.clone() }, &["name"]).await.unwrap();
    root.disable(&made.id).await.unwrap();
    root.enable(&made.id).await.unwrap();
    let new = root.rotate(&made.id, 60).await.unwrap();
    root.finish_rotation(&made.id).await.unwrap();
    root.revoke(&made.id).await.unwrap();
    let foreign = "sk-0123456789abcdef0123456789abcdef".to_owned();
    let import = pb::ImportKey {
        account: "acme".into(),
        environment: "production".into(),
        scopes: to_strings(&["monitors:read"]),
        sha256: TokenDigest::from_token(&foreign).as_bytes().to_vec(),
        ..Default::default()
    };
    assert_eq!(root.import(vec![import]).await.unwrap()[0].error, "");
    root.put_role("acme", "agent", &["monitors:read"]).await.unwrap();
    root.put_member("acme", "ann", "agent").await.unwrap();
    let anns = server.create_key(user_key_request("ann", &["all"])).await;
    let leaves = pb::RemoveMemberRequest { account: "acme".into(), user: "ann".into() };
    root.accounts().remove_member(leaves).await.unwrap();
    let role = pb::DeleteRoleRequest { account: "acme".into(), name: "agent".into() };
    root.accounts().delete_role(role).await.unwrap();
    let own = server.create_key(named_key_request("acme", "own")).await;
    server.client_with_token(&own.token).revoke_self().await.unwrap();
    vec![server.root_token.clone(), made.token, new.token, foreign, anns.token, own.token]
}

#[tokio::test(flavor = "multi_thread")]
async fn every_kind_of_change_leaves_an_entry_with_its_actor_and_method() {
    let server = Server::start().await;
    everything(&server).await;
    let root = server.root_client().who_am_i().await.unwrap().key.unwrap().id;
    let mut found = BTreeMap::new();
    for entry in all(&server.root_client()).await {
        let by = if entry.actor == root { "root" } else { &entry.actor };
        if by == "root" {
            assert_eq!(entry.actor_account, "keyward");
        }
        // The oldest of its kind stands in the table.
        found.insert(entry.action.clone(), (by.to_owned(), entry.method));
    }
    let of_root = |method: &str| ("root".to_owned(), format!("keyward.v1.{method}"));
    let mut expected: BTreeMap<String, _> = [
        ("account.updated", "AccountService/Update"),
        ("account.suspended", "AccountService/Suspend"),
        ("account.resumed", "AccountService/Resume"),
        ("key.created", "KeyService/Create"),
        ("key.updated", "KeyService/Update"),
        ("key.disabled", "KeyService/Disable"),
        ("key.enabled", "KeyService/Enable"),
        ("key.rotated", "KeyService/Rotate"),
        ("key.rotation_finished", "KeyService/FinishRotation"),
        ("key.revoked", "KeyService/Revoke"),
        ("key.imported", "KeyService/Import"),
        ("role.put", "AccountService/PutRole"),
        ("role.deleted", "AccountService/DeleteRole"),
        ("member.put", "AccountService/PutMember"),
        ("member.removed", "AccountService/RemoveMember"),
    ]
    .map(|(action, method)| (action.to_owned(), of_root(method)))
    .into();
    for action in ["account.created", "root_key.created"] {
        expected.insert(action.to_owned(), ("system".to_owned(), "keyward serve".to_owned()));
    }
    assert_eq!(found, expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn entries_are_the_newest_first_without_a_gap_and_each_with_a_hash_of_its_own() {
    let server = Server::start().await;
    everything(&server).await;
    let entries = all(&server.root_client()).await;
    let revisions: Vec<_> = entries.iter().map(|entry| entry.revision).collect();
    let expected: Vec<_> = (1..=entries.len() as u64).rev().collect();
    assert_eq!(revisions, expected);
    let hashes: std::collections::BTreeSet<_> = entries.iter().map(|entry| &entry.hash).collect();
    assert!(hashes.len() == entries.len() && hashes.iter().all(|hash| hash.len() == 32));
}

#[tokio::test(flavor = "multi_thread")]
async fn no_entry_shows_a_token_or_a_digest() {
    let server = Server::start().await;
    let tokens = everything(&server).await;
    for entry in all(&server.root_client()).await {
        let shown = format!("{entry:?}");
        for token in &tokens {
            let digest = serde_json::to_string(&TokenDigest::from_token(token)).unwrap();
            assert!(!shown.contains(token.as_str()) && !shown.contains(digest.trim_matches('"')), "{shown}");
        }
        assert!(!entry.detail.contains("digest"), "{shown}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_entry_shows_the_record_after_the_change() {
    let server = Server::with_accounts().await;
    let root = server.root_client();
    let made = server.create_key(named_key_request("acme", "CI")).await;
    server.advance(5);
    let comment = "found in a repository".to_owned();
    let reason = pb::RevokeReason::Compromised.into();
    let revoke = pb::RevokeKeyRequest { id: made.id.clone(), reason, comment };
    let revoked = root.keys().revoke(revoke).await.unwrap().into_inner();
    let entry = all(&root).await.remove(0);
    assert_eq!((entry.revision, entry.at), (revoked.revision, Some(server.timestamp_after(0))));
    assert_eq!((entry.account.as_str(), &entry.key_id, entry.user.as_str()), ("acme", &made.id, ""));
    let detail: serde_json::Value = serde_json::from_str(&entry.detail).unwrap();
    let key = &detail["key"];
    assert_eq!((key["name"].as_str(), key["environment"].as_str()), (Some("CI"), Some("production")));
    assert_eq!(key["revocation"]["reason"].as_str(), Some("compromised"));
    assert_eq!(key["revocation"]["comment"].as_str(), Some("found in a repository"));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_changes_nothing_leaves_no_entry() {
    let server = Server::with_accounts().await;
    let root = server.root_client();
    let made = server.create_key(named_key_request("acme", "CI")).await;
    root.revoke(&made.id).await.unwrap();
    let before = all(&root).await;
    root.revoke(&made.id).await.unwrap();
    root.resume("acme").await.unwrap();
    root.enable(&made.id).await.unwrap_err();
    root.create(service_key_request("nowhere", &["a"])).await.unwrap_err();
    root.get(&made.id).await.unwrap();
    root.check_reason(&made.token).await;
    assert_eq!(all(&root).await, before);
}

#[tokio::test(flavor = "multi_thread")]
async fn entries_are_found_by_account_key_actor_and_time() {
    let server = Server::with_accounts().await;
    let root = server.root_client();
    let acmes = server.create_key(service_key_request("acme", &["keyward:keys:*", "monitors:*"])).await;
    server.create_key(named_key_request("other", "CI")).await;
    server.advance(10);
    let own =
        server.client_with_token(&acmes.token).create_key(service_key_request("", &["monitors:read"])).await;
    root.disable(&own.id).await.unwrap();
    server.advance(10);
    root.enable(&own.id).await.unwrap();

    let of = |request| entries(&root, request);
    let account = |id: &str| pb::ListAuditEntriesRequest { account: id.into(), ..Default::default() };
    let found = of(account("acme")).await;
    assert_eq!(
        actions(&found),
        ["key.enabled", "key.disabled", "key.created", "key.created", "account.created"]
    );
    assert_eq!(actions(&of(account("other")).await), ["key.created", "account.created"]);
    assert_eq!(actions(&of(account("keyward")).await), ["root_key.created", "account.created"]);

    let of_key = pb::ListAuditEntriesRequest { key_id: own.id.clone(), ..Default::default() };
    assert_eq!(actions(&of(of_key).await), ["key.enabled", "key.disabled", "key.created"]);
    let by_key = pb::ListAuditEntriesRequest { actor: acmes.id.clone(), ..Default::default() };
    assert_eq!(actions(&of(by_key).await), ["key.created"]);
    let by_system = pb::ListAuditEntriesRequest { actor: "system".into(), ..Default::default() };
    assert_eq!(actions(&of(by_system).await), ["root_key.created", "account.created"]);

    let between = |from, to| pb::ListAuditEntriesRequest {
        from: Some(server.timestamp_after(from)),
        to: Some(server.timestamp_after(to)),
        ..Default::default()
    };
    assert_eq!(actions(&of(between(-10, 0)).await), ["key.disabled", "key.created"], "from is in, to is out");
    assert_eq!(actions(&of(between(0, 1)).await), ["key.enabled"]);
    let together = pb::ListAuditEntriesRequest { key_id: own.id.clone(), ..between(-10, 0) };
    let together = pb::ListAuditEntriesRequest { actor: acmes.id, account: "acme".into(), ..together };
    assert_eq!(actions(&of(together).await), ["key.created"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_account_caller_reads_its_own_account_alone() {
    let server = Server::with_accounts().await;
    let reader = server.client_with_scopes("acme", &["keyward:audit:read"]).await;
    server.create_key(named_key_request("other", "CI")).await;
    server.create_key(user_key_request("ann", &["all"])).await;
    let found = all(&reader).await;
    assert!(found.iter().all(|entry| entry.account == "acme"));
    assert_eq!(actions(&found), ["key.created", "account.created"]);
    for account in ["other", "keyward", "nowhere"] {
        let request = pb::ListAuditEntriesRequest { account: account.into(), ..Default::default() };
        assert_refused(reader.list_audit_entries(request).await, Code::NotFound, "ACCOUNT_NOT_FOUND");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn pages_give_every_entry_once_whatever_is_written_meanwhile() {
    let server = Server::start().await;
    everything(&server).await;
    let root = server.root_client();
    let expected: Vec<_> = all(&root).await.iter().map(|entry| entry.revision).collect();
    let (mut seen, mut page_token) = (Vec::new(), String::new());
    loop {
        let request = pb::ListAuditEntriesRequest { page_size: Some(4), page_token, ..Default::default() };
        let page = root.list_audit_entries(request).await.unwrap();
        assert!(page.entries.len() <= 4);
        seen.extend(page.entries.iter().map(|entry| entry.revision));
        page_token = page.next_page_token;
        if page_token.is_empty() {
            break;
        }
        server.create_key(service_key_request("acme", &["a"])).await;
    }
    assert_eq!(seen, expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_page_token_belongs_to_its_filters_and_a_size_is_1_to_1000() {
    let server = Server::with_accounts().await;
    let root = server.root_client();
    let one = pb::ListAuditEntriesRequest { page_size: Some(1), ..Default::default() };
    let page_token = root.list_audit_entries(one).await.unwrap().next_page_token;
    let other = pb::ListAuditEntriesRequest { account: "acme".into(), page_token, ..Default::default() };
    assert_invalid(root.list_audit_entries(other).await, &["page_token"]);
    let request = pb::ListAuditEntriesRequest {
        account: "a.b".into(),
        key_id: "x".into(),
        from: Some(prost_types::Timestamp { seconds: i64::MAX, nanos: 0 }),
        page_size: Some(1001),
        page_token: "x".into(),
        ..Default::default()
    };
    assert_invalid(
        root.list_audit_entries(request).await,
        &["page_size", "page_token", "account", "key_id", "from"],
    );
}
