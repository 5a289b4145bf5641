//! Names that people type are one in every Unicode form, and ids of accounts are compared exactly; on every store.

use keyward::pb::{self, Reason};
use tonic::Code;
use tonic_types::StatusExt as _;

use crate::support::{
    Client, assert_invalid, assert_refused, named_key_request, scope_check_request, service_key_request,
    to_strings, user_key_request,
};

use super::Server;

async fn create_account(root: &Client, id: &str) -> Result<pb::Account, tonic::Status> {
    let request = pb::CreateAccountRequest { id: id.into(), ..Default::default() };
    Ok(root.accounts().create(request).await?.into_inner().account.unwrap())
}

async fn names(root: &Client, prefix: &str) -> Vec<String> {
    let request =
        pb::ListKeysRequest { account: "acme".into(), name_prefix: prefix.into(), ..Default::default() };
    root.list(request).await.unwrap().keys.into_iter().map(|key| key.name).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_is_kept_in_one_form_and_taken_and_found_in_every_one() {
    let server = Server::with_accounts().await;
    let root = server.root_client();
    let made = server.create_key(named_key_request("acme", "de\u{301}ploy")).await;
    assert_eq!(made.key.name, "d\u{e9}ploy");
    for form in ["d\u{e9}ploy", "de\u{301}ploy"] {
        assert_refused(
            root.create(named_key_request("acme", form)).await,
            Code::AlreadyExists,
            "KEY_NAME_TAKEN",
        );
        let row = pb::ImportKey {
            account: "acme".into(),
            environment: "production".into(),
            name: Some(form.into()),
            scopes: to_strings(&["a"]),
            sha256: vec![9; 32],
            ..Default::default()
        };
        assert_eq!(root.import(vec![row]).await.unwrap()[0].error, "KEY_NAME_TAKEN");
        assert_eq!(names(&root, &form[..form.len() - 2]).await, ["d\u{e9}ploy"]);
    }
    assert!(names(&root, "de").await.is_empty(), "e is another letter than \u{e9}");
    let other = server.create_key(named_key_request("acme", "other")).await;
    let renamed = pb::Key { name: "de\u{301}ploy".into(), ..other.key };
    assert_refused(root.update(&renamed, &["name"]).await, Code::AlreadyExists, "KEY_NAME_TAKEN");
    server
        .create_key(pb::CreateKeyRequest {
            name: Some("de\u{301}ploy".into()),
            ..user_key_request("ann", &["all"])
        })
        .await;

    let bulk = pb::BulkRevokeKeysRequest {
        account: "acme".into(),
        name_prefix: "de\u{301}".into(),
        ..Default::default()
    };
    let revoked = root.keys().bulk_revoke(bulk).await.unwrap().into_inner().keys;
    assert_eq!(
        revoked.iter().map(|one| one.key.as_ref().unwrap().id.as_str()).collect::<Vec<_>>(),
        [&*made.id]
    );
    assert_eq!(root.update(&renamed, &["name"]).await.unwrap().name, "d\u{e9}ploy");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_name_is_told_which_character_is_wrong_and_where() {
    let server = Server::with_accounts().await;
    let status = assert_invalid(
        server.root_client().create(named_key_request("acme", "paid\u{202e}gro.live")).await,
        &["name"],
    );
    let said = "name: has U+202E at character 5: an invisible format character is not allowed; remove it";
    assert!(status.message().contains(said), "{status:?}");
    let request = pb::CreateAccountRequest { id: "x".into(), name: "Acme ".into(), ..Default::default() };
    let status = assert_invalid(server.root_client().accounts().create(request).await, &["name"]);
    let said = "must not begin or end with a blank (U+0020 at character 5)";
    assert!(status.message().contains(said), "{status:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_account_has_the_id_of_another_system_letter_by_letter() {
    let server = Server::start().await;
    let root = server.root_client();
    assert_eq!(create_account(&root, "org_2abCD").await.unwrap().id, "org_2abCD");
    for (taken, existing) in [
        ("org_2abcd", "org_2abCD"),
        ("ORG_2ABCD", "org_2abCD"),
        ("Keyward", "keyward"),
        ("KEYWARD", "keyward"),
        ("keyward", "keyward"),
        ("org_2abCD", "org_2abCD"),
    ] {
        let status =
            assert_refused(create_account(&root, taken).await, Code::AlreadyExists, "ACCOUNT_EXISTS");
        assert!(status.message().contains(existing) || taken == existing, "{status:?}");
        let metadata = status.get_details_error_info().unwrap().metadata;
        assert_eq!(metadata["account"], existing, "{status:?}");
    }
    let made = server.create_key(service_key_request("org_2abCD", &["repo/write"])).await;
    assert_eq!(made.key.account, "org_2abCD");
    for other in ["org_2abcd", "Keyward"] {
        let get = pb::GetAccountRequest { id: other.into() };
        assert_refused(root.accounts().get(get).await, Code::NotFound, "ACCOUNT_NOT_FOUND");
        assert_refused(
            root.create(service_key_request(other, &["a"])).await,
            Code::NotFound,
            "ACCOUNT_NOT_FOUND",
        );
        let member = pb::PutMemberRequest { account: other.into(), user: "u".into(), role: "r".into() };
        assert!(root.accounts().put_member(member).await.is_err());
    }
    let reason = async |account: &str| {
        let request = pb::CheckRequest {
            account: Some(account.into()),
            ..scope_check_request(&made.token, "repo/write")
        };
        root.check(request).await.unwrap().reason()
    };
    assert_eq!(reason("org_2abCD").await, Reason::Ok);
    assert_eq!(reason("org_2abcd").await, Reason::WrongAccount);
    assert_eq!(reason("Keyward").await, Reason::WrongAccount);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_manager_of_an_account_reaches_no_other_spelling_of_its_id() {
    let server = Server::start().await;
    create_account(&server.root_client(), "org_2abCD").await.unwrap();
    let manager = server.client_with_scopes("org_2abCD", &["keyward:*", "a"]).await;
    manager.create_key(service_key_request("org_2abCD", &["a"])).await;
    manager.create_key(service_key_request("", &["a"])).await;
    for other in ["org_2abcd", "Keyward", "KEYWARD"] {
        assert_refused(
            manager.create(service_key_request(other, &["a"])).await,
            Code::NotFound,
            "ACCOUNT_NOT_FOUND",
        );
    }
}
