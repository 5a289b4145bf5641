//! The third seed, Checkly: user keys, which act for a person in whatever accounts the person belongs to, and
//! service keys with a role of their own. The product's backend is an operator's caller and names the person in
//! `x-keyward-acting-user`. Each test is a sentence of its page; `docs/seeds.md` has the table.

use tonic::Code;

use keyward::pb::{self, KeyState, Reason};

use crate::support::{
    Client, CreatedKey, assert_invalid, assert_refused, scope_check_request, service_key_request, to_strings,
    user_key_request,
};

use super::Server;

const READ: &str = "checks:read";
const WRITE: &str = "checks:write";

/// Checkly with the accounts `acme` and `other`, its roles, and in `acme` an owner, an admin and a reader.
async fn checkly() -> Server {
    let server = Server::with_accounts().await;
    let root = server.root_client();
    root.put_role("", "read-only", &[READ]).await.unwrap();
    root.put_role("", "admin", &[READ, WRITE, "keyward:keys:*"]).await.unwrap();
    root.put_role("", "owner", &["all", "keyward:keys:*", "keyward:accounts:*"]).await.unwrap();
    for (user, role) in [("olga", "owner"), ("ann", "admin"), ("rob", "read-only")] {
        root.put_member("acme", user, role).await.unwrap();
    }
    server
}

/// The dashboard's backend, calling for a person.
fn dashboard(server: &Server, user: &str) -> Client {
    server.root_client().with_header("x-keyward-acting-user", user)
}

/// What the User Settings page sends.
async fn own_key(server: &Server, user: &str) -> CreatedKey {
    dashboard(server, user).create_key(user_key_request(user, &["all"])).await
}

fn with_role(name: &str, role: &str) -> pb::CreateKeyRequest {
    pb::CreateKeyRequest {
        name: Some(name.to_owned()),
        roles: to_strings(&[role]),
        ..service_key_request("acme", &[])
    }
}

/// What a request to the API hears: bearer token, account header, and the scope that its route needs.
async fn request(server: &Server, token: &str, account: &str, scope: &str) -> Reason {
    let account = Some(account.to_owned());
    server
        .root_client()
        .check(pb::CheckRequest { account, ..scope_check_request(token, scope) })
        .await
        .unwrap()
        .reason()
}

async fn remove(server: &Server, account: &str, user: &str) {
    let request = pb::RemoveMemberRequest { account: account.to_owned(), user: user.to_owned() };
    let removed = server.root_client().accounts().remove_member(request).await.unwrap().into_inner();
    assert!(removed.propagation.unwrap().complete);
}

#[tokio::test]
async fn keys_come_in_two_flavors() {
    let server = checkly().await;
    let user = own_key(&server, "ann").await.key;
    let service = dashboard(&server, "ann").create_key(with_role("ci", "admin")).await.key;
    assert_eq!((user.user.as_str(), user.account.as_str()), ("ann", ""));
    assert_eq!((service.user.as_str(), service.account.as_str()), ("", "acme"));
}

#[tokio::test]
async fn a_user_key_is_tied_to_one_specific_user() {
    let server = checkly().await;
    let made = own_key(&server, "ann").await;
    let account = Some("acme".to_owned());
    let answer = server
        .root_client()
        .check(pb::CheckRequest { account, ..scope_check_request(&made.token, READ) })
        .await
        .unwrap();
    assert_eq!((answer.user.as_str(), answer.account.as_str()), ("ann", "acme"));
    let nobody = pb::CreateKeyRequest { account: "acme".to_owned(), ..user_key_request("ann", &["all"]) };
    assert_invalid(server.root_client().create(nobody).await, &["user"]);
}

#[tokio::test]
async fn a_user_key_inherits_the_access_level_of_its_user() {
    let server = checkly().await;
    let [admin, reader] = [own_key(&server, "ann").await, own_key(&server, "rob").await];
    assert_eq!(request(&server, &admin.token, "acme", WRITE).await, Reason::Ok);
    assert_eq!(request(&server, &reader.token, "acme", READ).await, Reason::Ok);
    assert_eq!(request(&server, &reader.token, "acme", WRITE).await, Reason::MissingScope);
}

#[tokio::test]
async fn another_role_takes_effect_without_touching_the_key() {
    let server = checkly().await;
    let made = own_key(&server, "rob").await;
    server.root_client().put_member("acme", "rob", "admin").await.unwrap();
    assert_eq!(request(&server, &made.token, "acme", WRITE).await, Reason::Ok);
    server.root_client().put_member("acme", "rob", "read-only").await.unwrap();
    assert_eq!(request(&server, &made.token, "acme", WRITE).await, Reason::MissingScope);
    assert_eq!(server.root_client().get(&made.id).await.unwrap().revision, made.revision);
}

#[tokio::test]
async fn changing_what_a_role_may_do_takes_effect_without_touching_the_key() {
    let server = checkly().await;
    let made = own_key(&server, "rob").await;
    server.root_client().put_role("acme", "read-only", &[READ, WRITE]).await.unwrap();
    assert_eq!(request(&server, &made.token, "acme", WRITE).await, Reason::Ok);
}

#[tokio::test]
async fn when_a_user_is_removed_their_keys_no_longer_access_the_account() {
    let server = checkly().await;
    server.root_client().put_member("other", "ann", "admin").await.unwrap();
    let made = own_key(&server, "ann").await;
    remove(&server, "acme", "ann").await;
    assert_eq!(request(&server, &made.token, "acme", READ).await, Reason::WrongAccount);
}

#[tokio::test]
async fn one_user_has_other_rights_in_each_account_and_keeps_the_rest_when_removed_from_one() {
    let server = checkly().await;
    server.root_client().put_member("other", "ann", "read-only").await.unwrap();
    let made = own_key(&server, "ann").await;
    assert_eq!(request(&server, &made.token, "acme", WRITE).await, Reason::Ok);
    assert_eq!(request(&server, &made.token, "other", READ).await, Reason::Ok);
    assert_eq!(request(&server, &made.token, "other", WRITE).await, Reason::MissingScope);
    remove(&server, "acme", "ann").await;
    assert_eq!(request(&server, &made.token, "acme", READ).await, Reason::WrongAccount);
    assert_eq!(request(&server, &made.token, "other", READ).await, Reason::Ok, "the same token");
}

#[tokio::test]
async fn the_keys_of_a_user_removed_from_every_account_are_revoked() {
    let server = checkly().await;
    server.root_client().put_member("other", "ann", "read-only").await.unwrap();
    let made = own_key(&server, "ann").await;
    remove(&server, "acme", "ann").await;
    assert_eq!(server.root_client().get(&made.id).await.unwrap().state(), KeyState::Active);
    remove(&server, "other", "ann").await;
    let key = server.root_client().get(&made.id).await.unwrap();
    assert_eq!((key.state(), key.revoke_reason()), (KeyState::Revoked, pb::RevokeReason::OwnerLeft));
    server.root_client().put_member("acme", "ann", "admin").await.unwrap();
    assert_eq!(request(&server, &made.token, "acme", READ).await, Reason::Revoked, "coming back is no undo");
}

#[tokio::test]
async fn a_user_creates_their_own_keys_and_nobody_elses() {
    let server = checkly().await;
    let made = own_key(&server, "rob").await;
    assert_eq!(request(&server, &made.token, "acme", READ).await, Reason::Ok);
    let for_another = dashboard(&server, "ann").create(user_key_request("rob", &["all"])).await;
    assert_refused(for_another, Code::NotFound, "KEY_NOT_FOUND");
}

#[tokio::test]
async fn a_user_key_has_a_name_and_is_not_shown_again() {
    let server = checkly().await;
    let request =
        pb::CreateKeyRequest { name: Some("laptop".to_owned()), ..user_key_request("rob", &["all"]) };
    let made = dashboard(&server, "rob").create_key(request).await;
    let mine = pb::ListKeysRequest { user: "rob".to_owned(), ..Default::default() };
    let listed = dashboard(&server, "rob").list(mine).await.unwrap();
    assert_eq!(listed.keys[0].name, "laptop");
    assert!(!format!("{listed:?}").contains(&made.token[made.key.hint.len()..]));
}

#[tokio::test]
async fn a_user_key_needs_the_target_account() {
    let server = checkly().await;
    let made = own_key(&server, "ann").await;
    let unnamed = server.root_client().check(scope_check_request(&made.token, READ)).await.unwrap();
    assert_eq!(unnamed.reason(), Reason::WrongAccount);
    assert_eq!(request(&server, &made.token, "other", READ).await, Reason::WrongAccount, "no member there");
    assert_eq!(request(&server, &made.token, "acme", READ).await, Reason::Ok);
}

#[tokio::test]
async fn only_the_user_can_delete_a_user_key() {
    let server = checkly().await;
    let made = own_key(&server, "rob").await;
    let admins_key =
        server.client_with_scopes("acme", &["all", "keyward:keys:*", "keyward:accounts:*"]).await;
    for other in [dashboard(&server, "ann"), dashboard(&server, "olga"), admins_key] {
        assert_refused(other.revoke(&made.id).await, Code::NotFound, "KEY_NOT_FOUND");
    }
    assert_eq!(request(&server, &made.token, "acme", READ).await, Reason::Ok);
    dashboard(&server, "rob").revoke(&made.id).await.unwrap();
    assert_eq!(request(&server, &made.token, "acme", READ).await, Reason::Revoked);
}

#[tokio::test]
async fn a_user_deletes_a_key_with_the_key_itself() {
    let server = checkly().await;
    let made = own_key(&server, "rob").await;
    server.client_with_token(&made.token).revoke_self().await.unwrap();
    assert_eq!(request(&server, &made.token, "acme", READ).await, Reason::Revoked);
}

#[tokio::test]
async fn to_revoke_a_users_access_the_user_is_removed_from_the_team() {
    let server = checkly().await;
    let made = own_key(&server, "rob").await;
    let team = server.client_with_scopes("acme", &["all", "keyward:accounts:*"]).await;
    let request_to_remove = pb::RemoveMemberRequest { account: "acme".to_owned(), user: "rob".to_owned() };
    team.accounts().remove_member(request_to_remove).await.unwrap();
    assert_ne!(request(&server, &made.token, "acme", READ).await, Reason::Ok);
}

#[tokio::test]
async fn a_service_key_is_specific_to_one_account() {
    let server = checkly().await;
    let made = dashboard(&server, "ann").create_key(with_role("ci", "admin")).await;
    assert_eq!(request(&server, &made.token, "acme", READ).await, Reason::Ok);
    assert_eq!(request(&server, &made.token, "other", READ).await, Reason::WrongAccount);
}

#[tokio::test]
async fn a_service_key_works_even_if_the_user_that_created_it_is_removed() {
    let server = checkly().await;
    let made = dashboard(&server, "ann").create_key(with_role("ci", "admin")).await;
    remove(&server, "acme", "ann").await;
    assert_eq!(request(&server, &made.token, "acme", WRITE).await, Reason::Ok);
}

#[tokio::test]
async fn a_service_key_has_a_role_of_its_own() {
    let server = checkly().await;
    let ann = dashboard(&server, "ann");
    let [reader, admin] = [
        ann.create_key(with_role("reports", "read-only")).await,
        ann.create_key(with_role("cli", "admin")).await,
    ];
    assert_eq!(reader.key.roles, ["read-only"]);
    assert_eq!(request(&server, &reader.token, "acme", READ).await, Reason::Ok);
    assert_eq!(request(&server, &reader.token, "acme", WRITE).await, Reason::MissingScope);
    assert_eq!(request(&server, &admin.token, "acme", WRITE).await, Reason::Ok);
}

#[tokio::test]
async fn a_service_key_creates_updates_and_deletes_resources_through_the_api() {
    let server = checkly().await;
    let scopes = ["checks:create", "checks:update", "checks:delete"];
    server.root_client().put_role("acme", "integration", &scopes).await.unwrap();
    let made = dashboard(&server, "olga").create_key(with_role("integration", "integration")).await;
    for scope in scopes {
        assert_eq!(request(&server, &made.token, "acme", scope).await, Reason::Ok, "{scope}");
    }
}

#[tokio::test]
async fn a_service_key_needs_no_service_user() {
    let server = checkly().await;
    server.create_account("sso").await;
    let request_for_it = pb::CreateKeyRequest { account: "sso".to_owned(), ..with_role("ci", "read-only") };
    let made = server.create_key(request_for_it).await;
    let members = pb::ListMembersRequest { account: "sso".to_owned(), ..Default::default() };
    let members = server.root_client().accounts().list_members(members).await.unwrap().into_inner().members;
    assert!(members.is_empty());
    assert_eq!(request(&server, &made.token, "sso", READ).await, Reason::Ok);
}

#[tokio::test]
async fn only_admins_and_owners_create_service_keys() {
    let server = checkly().await;
    for user in ["ann", "olga"] {
        dashboard(&server, user).create_key(with_role(user, "read-only")).await;
    }
    let reader = dashboard(&server, "rob").create(with_role("mine", "read-only")).await;
    assert_refused(reader, Code::PermissionDenied, "ROLE_LACKS_PERMISSION");
    let stranger = dashboard(&server, "zoe").create(with_role("mine", "read-only")).await;
    assert_refused(stranger, Code::NotFound, "ACCOUNT_NOT_FOUND");
}

#[tokio::test]
async fn only_an_operators_caller_may_say_whom_it_calls_for() {
    let server = checkly().await;
    let caller = server.client_with_scopes("acme", &["all", "keyward:keys:*"]).await;
    let posing = caller.with_header("x-keyward-acting-user", "olga");
    assert_refused(
        posing.create(with_role("mine", "read-only")).await,
        Code::PermissionDenied,
        "OPERATOR_ONLY",
    );
}

#[tokio::test]
async fn a_service_key_has_a_name_and_a_role_and_is_not_shown_again() {
    let server = checkly().await;
    let made = dashboard(&server, "olga").create_key(with_role("ci", "admin")).await;
    let keys = pb::ListKeysRequest { account: "acme".to_owned(), ..Default::default() };
    let listed = dashboard(&server, "olga").list(keys).await.unwrap();
    assert_eq!((listed.keys[0].name.as_str(), &listed.keys[0].roles), ("ci", &to_strings(&["admin"])));
    assert!(!format!("{listed:?}").contains(&made.token[made.key.hint.len()..]));
}

#[tokio::test]
async fn a_service_key_is_used_the_same_way_as_a_user_key() {
    let server = checkly().await;
    let service = dashboard(&server, "ann").create_key(with_role("ci", "admin")).await;
    let user = own_key(&server, "ann").await;
    for token in [&service.token, &user.token] {
        assert_eq!(request(&server, token, "acme", WRITE).await, Reason::Ok);
        assert_eq!(request(&server, token, "other", WRITE).await, Reason::WrongAccount);
    }
}

#[tokio::test]
async fn only_admins_and_owners_delete_service_keys() {
    let server = checkly().await;
    let [first, second] = [
        dashboard(&server, "ann").create_key(with_role("one", "read-only")).await,
        dashboard(&server, "ann").create_key(with_role("two", "read-only")).await,
    ];
    let reader = dashboard(&server, "rob").revoke(&first.id).await;
    assert_refused(reader, Code::PermissionDenied, "ROLE_LACKS_PERMISSION");
    assert_eq!(request(&server, &first.token, "acme", READ).await, Reason::Ok);
    dashboard(&server, "ann").revoke(&first.id).await.unwrap();
    dashboard(&server, "olga").revoke(&second.id).await.unwrap();
    for made in [first, second] {
        assert_eq!(request(&server, &made.token, "acme", READ).await, Reason::Revoked);
    }
}

#[tokio::test]
async fn an_admin_of_one_account_is_nobody_in_another() {
    let server = checkly().await;
    let made = server.create_key(service_key_request("other", &[READ])).await;
    let ann = dashboard(&server, "ann");
    assert_refused(ann.revoke(&made.id).await, Code::NotFound, "KEY_NOT_FOUND");
    assert_refused(ann.get(&made.id).await, Code::NotFound, "KEY_NOT_FOUND");
    assert_eq!(request(&server, &made.token, "other", READ).await, Reason::Ok);
}
