//! Roles and members, and what they mean for user keys: whose rights they have, who may see them, and where.

use tonic::{Code, Status};

use keyward::pb::{self, KeyState, Reason};

use crate::support::{
    Client, CreatedKey, assert_invalid, assert_refused, authenticate_request, error_reason,
    scope_check_request, service_key_request, to_strings, user_key_request,
};

use super::Server;

pub(super) const READ: &str = "monitors:read";
const WRITE: &str = "monitors:write";

/// Accounts `acme` and `other`, and global roles `reader` and `writer`.
async fn with_roles() -> Server {
    let server = Server::with_accounts().await;
    server.root_client().put_role("", "reader", &[READ]).await.unwrap();
    server.root_client().put_role("", "writer", &[READ, WRITE]).await.unwrap();
    server
}

async fn delete_role(client: &Client, account: &str, name: &str) -> Result<u64, Status> {
    let request = pb::DeleteRoleRequest { account: account.to_owned(), name: name.to_owned() };
    Ok(client.accounts().delete_role(request).await?.into_inner().revision)
}

pub(super) async fn list_roles(client: &Client, account: &str) -> Result<Vec<pb::Role>, Status> {
    let request = pb::ListRolesRequest { account: account.to_owned(), ..Default::default() };
    Ok(client.accounts().list_roles(request).await?.into_inner().roles)
}

pub(super) async fn remove_member(client: &Client, account: &str, user: &str) -> Result<u64, Status> {
    let request = pb::RemoveMemberRequest { account: account.to_owned(), user: user.to_owned() };
    Ok(client.accounts().remove_member(request).await?.into_inner().revision)
}

pub(super) async fn list_members(
    client: &Client,
    request: pb::ListMembersRequest,
) -> Result<pb::ListMembersResponse, Status> {
    Ok(client.accounts().list_members(request).await?.into_inner())
}

pub(super) fn list_members_request(account: &str) -> pb::ListMembersRequest {
    pb::ListMembersRequest { account: account.to_owned(), ..Default::default() }
}

fn users(page: &pb::ListMembersResponse) -> Vec<&str> {
    page.members.iter().map(|member| member.user.as_str()).collect()
}

fn with_role(account: &str, role: &str) -> pb::CreateKeyRequest {
    pb::CreateKeyRequest { roles: to_strings(&[role]), ..service_key_request(account, &[]) }
}

/// What a Check in an account says of a token and a scope.
async fn ask(client: &Client, token: &str, account: &str, scope: &str) -> Reason {
    let account = Some(account.to_owned());
    client.check(pb::CheckRequest { account, ..scope_check_request(token, scope) }).await.unwrap().reason()
}

// ---- roles ----

#[tokio::test]
async fn a_role_is_made_changed_listed_and_deleted() {
    let server = Server::with_accounts().await;
    let root = server.root_client();
    let made = root.put_role("acme", "agent", &[READ]).await.unwrap();
    let changed = root.put_role("acme", "agent", &[WRITE, READ]).await.unwrap();
    assert!(changed > made);
    let expected = pb::Role {
        account: "acme".to_owned(),
        name: "agent".to_owned(),
        scopes: to_strings(&[READ, WRITE]),
        revision: changed,
    };
    assert_eq!(list_roles(&root, "acme").await.unwrap(), [expected]);
    assert!(delete_role(&root, "acme", "agent").await.unwrap() > changed);
    assert_eq!(list_roles(&root, "acme").await.unwrap(), []);
    assert_refused(delete_role(&root, "acme", "agent").await, Code::NotFound, "ROLE_NOT_FOUND");
}

#[tokio::test]
async fn the_roles_of_an_account_are_its_own_and_the_global_ones() {
    let server = with_roles().await;
    let root = server.root_client();
    root.put_role("acme", "agent", &[READ]).await.unwrap();
    root.put_role("other", "secret", &[READ]).await.unwrap();
    let named = |roles: Vec<pb::Role>| -> Vec<String> {
        roles.into_iter().map(|role| format!("{}/{}", role.account, role.name)).collect()
    };
    assert_eq!(named(list_roles(&root, "acme").await.unwrap()), ["acme/agent", "/reader", "/writer"]);
    assert_eq!(named(list_roles(&root, "").await.unwrap()), ["/reader", "/writer"]);
}

#[tokio::test]
async fn an_accounts_own_role_stands_before_the_global_one_of_the_same_name() {
    let server = with_roles().await;
    let [acme, other] = [
        server.create_key(with_role("acme", "reader")).await,
        server.create_key(with_role("other", "reader")).await,
    ];
    server.root_client().put_role("acme", "reader", &[WRITE]).await.unwrap();
    assert_eq!(ask(&server.root_client(), &acme.token, "acme", WRITE).await, Reason::Ok);
    assert_eq!(ask(&server.root_client(), &acme.token, "acme", READ).await, Reason::MissingScope);
    assert_eq!(ask(&server.root_client(), &other.token, "other", READ).await, Reason::Ok);
    delete_role(&server.root_client(), "acme", "reader").await.expect_err("it is in use");
}

#[tokio::test]
async fn a_service_key_has_its_scopes_and_those_of_all_its_roles() {
    let server = with_roles().await;
    server.root_client().put_role("acme", "agent", &["artifacts:*"]).await.unwrap();
    let request = pb::CreateKeyRequest {
        roles: to_strings(&["writer", "agent"]),
        ..service_key_request("acme", &["billing:read"])
    };
    let made = server.create_key(request).await;
    assert_eq!(made.key.roles, ["writer", "agent"]);
    for scope in [READ, WRITE, "artifacts:write", "billing:read"] {
        assert_eq!(ask(&server.root_client(), &made.token, "acme", scope).await, Reason::Ok, "{scope}");
    }
    assert_eq!(ask(&server.root_client(), &made.token, "acme", "billing:write").await, Reason::MissingScope);
    let answer = server.root_client().check(authenticate_request(&made.token)).await.unwrap();
    assert_eq!(answer.scopes, ["artifacts:*", "billing:read", READ, WRITE]);
}

#[tokio::test]
async fn a_changed_role_changes_the_keys_that_have_it_at_once() {
    let server = with_roles().await;
    let made = server.create_key(with_role("acme", "reader")).await;
    server.root_client().put_role("", "reader", &[WRITE]).await.unwrap();
    assert_eq!(ask(&server.root_client(), &made.token, "acme", READ).await, Reason::MissingScope);
    assert_eq!(ask(&server.root_client(), &made.token, "acme", WRITE).await, Reason::Ok);
}

#[tokio::test]
async fn a_keys_roles_are_changed_by_update() {
    let server = with_roles().await;
    let made = server.create_key(with_role("acme", "reader")).await;
    let promoted = pb::Key { roles: to_strings(&["writer"]), ..made.key.clone() };
    assert_eq!(server.root_client().update(&promoted, &["roles"]).await.unwrap().roles, ["writer"]);
    assert_eq!(ask(&server.root_client(), &made.token, "acme", WRITE).await, Reason::Ok);
    let unknown = pb::Key { roles: to_strings(&["writer", "boss"]), ..made.key.clone() };
    assert_invalid(server.root_client().update(&unknown, &["roles"]).await, &["key.roles[1]"]);
    let none = pb::Key { roles: vec![], ..made.key };
    assert_invalid(server.root_client().update(&none, &["roles"]).await, &["key.scopes"]);
}

#[tokio::test]
async fn an_unknown_role_is_a_wrong_field() {
    let server = with_roles().await;
    server.root_client().put_role("other", "secret", &[READ]).await.unwrap();
    let root = server.root_client();
    for unknown in ["boss", "secret"] {
        let request = pb::CreateKeyRequest {
            roles: to_strings(&["reader", unknown]),
            ..service_key_request("acme", &[])
        };
        assert_invalid(root.create(request).await, &["roles[1]"]);
        assert_invalid(root.put_member("acme", "ann", unknown).await, &["role"]);
    }
    let private = pb::CreateKeyRequest { roles: to_strings(&["secret"]), ..user_key_request("ann", &[]) };
    assert_invalid(root.create(private).await, &["roles[0]"]);
}

#[tokio::test]
async fn a_role_in_use_is_not_deleted_and_the_refusal_counts_its_keys_and_members() {
    let server = with_roles().await;
    let root = server.root_client();
    let [first, second] = [
        server.create_key(with_role("acme", "reader")).await,
        server.create_key(with_role("acme", "reader")).await,
    ];
    root.put_member("acme", "ann", "reader").await.unwrap();
    let status =
        assert_refused(delete_role(&root, "", "reader").await, Code::FailedPrecondition, "ROLE_IN_USE");
    assert!(status.message().contains("2 keys and 1 members"), "{}", status.message());
    root.revoke(&first.id).await.unwrap();
    root.revoke(&second.id).await.unwrap();
    let status =
        assert_refused(delete_role(&root, "", "reader").await, Code::FailedPrecondition, "ROLE_IN_USE");
    assert!(
        status.message().contains("0 keys and 1 members"),
        "revoked keys use nothing: {}",
        status.message()
    );
    root.put_member("acme", "ann", "writer").await.unwrap();
    delete_role(&root, "", "reader").await.unwrap();
}

#[tokio::test]
async fn a_global_role_is_not_in_use_where_an_account_has_its_own_of_that_name() {
    let server = with_roles().await;
    server.root_client().put_role("acme", "reader", &[READ]).await.unwrap();
    let made = server.create_key(with_role("acme", "reader")).await;
    delete_role(&server.root_client(), "", "reader").await.unwrap();
    assert_eq!(ask(&server.root_client(), &made.token, "acme", READ).await, Reason::Ok);
}

#[tokio::test]
async fn an_own_role_that_shadows_a_global_one_can_be_deleted_while_it_is_used_by_nobody() {
    let server = with_roles().await;
    server.root_client().put_role("acme", "reader", &[WRITE]).await.unwrap();
    server.create_key(with_role("other", "reader")).await;
    delete_role(&server.root_client(), "acme", "reader").await.unwrap();
}

#[tokio::test]
async fn wrong_roles_and_members_name_every_wrong_field() {
    let server = with_roles().await;
    let root = server.root_client();
    assert_invalid(root.put_role("a.b", "B", &[]).await, &["account", "name", "scopes"]);
    assert_invalid(
        root.put_role("acme", "agent", &["ok:read", "a::b", ""]).await,
        &["scopes[1]", "scopes[2]"],
    );
    assert_invalid(root.put_role("acme", "agent", &["a"; 257]).await, &["scopes"]);
    assert_invalid(root.put_member("", "", "").await, &["account", "user", "role"]);
    assert_invalid(remove_member(&root, "", "a b").await, &["account", "user"]);
    assert_invalid(delete_role(&root, "acme", "").await, &["name"]);
    assert_invalid(list_members(&root, list_members_request("")).await, &["account"]);
    assert_invalid(list_roles(&root, "a.b").await, &["account"]);
    assert_refused(root.put_member("nowhere", "ann", "reader").await, Code::NotFound, "ACCOUNT_NOT_FOUND");
    assert_refused(root.put_role("nowhere", "agent", &[READ]).await, Code::NotFound, "ACCOUNT_NOT_FOUND");
}

#[tokio::test]
async fn global_roles_are_made_and_deleted_by_operators_alone() {
    let server = with_roles().await;
    let caller = server.client_with_scopes("acme", &["all", "keyward:*"]).await;
    assert_refused(caller.put_role("", "boss", &[READ]).await, Code::PermissionDenied, "OPERATOR_ONLY");
    assert_refused(delete_role(&caller, "", "reader").await, Code::PermissionDenied, "OPERATOR_ONLY");
    caller.put_role("acme", "boss", &[READ]).await.unwrap();
}

#[tokio::test]
async fn another_accounts_roles_and_members_do_not_exist() {
    let server = with_roles().await;
    server.root_client().put_member("other", "bob", "reader").await.unwrap();
    let caller = server.client_with_scopes("acme", &["all", "keyward:*"]).await;
    let refusals = [
        caller.put_role("other", "agent", &[READ]).await.unwrap_err(),
        caller.put_member("other", "bob", "writer").await.unwrap_err(),
        remove_member(&caller, "other", "bob").await.unwrap_err(),
        list_members(&caller, list_members_request("other")).await.unwrap_err(),
        list_roles(&caller, "other").await.unwrap_err(),
        delete_role(&caller, "other", "reader").await.unwrap_err(),
    ];
    let nowhere = list_members(&caller, list_members_request("nowhere")).await.unwrap_err();
    for status in refusals {
        assert_eq!(error_reason(&status), "ACCOUNT_NOT_FOUND");
        assert_eq!((status.message(), status.details()), (nowhere.message(), nowhere.details()));
    }
}

#[tokio::test]
async fn nobody_gives_by_role_or_membership_what_they_do_not_hold() {
    let server = with_roles().await;
    let caller =
        server.client_with_scopes("acme", &[READ, "keyward:accounts:write", "keyward:keys:write"]).await;
    caller.put_role("acme", "mine", &[READ]).await.unwrap();
    assert_refused(
        caller.put_role("acme", "more", &[WRITE]).await,
        Code::PermissionDenied,
        "GRANT_BEYOND_CALLER",
    );
    assert_refused(
        caller.put_role("acme", "mine", &["all"]).await,
        Code::PermissionDenied,
        "GRANT_BEYOND_CALLER",
    );
    assert_refused(
        caller.put_member("acme", "ann", "writer").await,
        Code::PermissionDenied,
        "GRANT_BEYOND_CALLER",
    );
    assert_refused(
        caller.create(with_role("acme", "writer")).await,
        Code::PermissionDenied,
        "GRANT_BEYOND_CALLER",
    );
    caller.put_member("acme", "ann", "reader").await.unwrap();
    server.root_client().put_member("acme", "ann", "writer").await.unwrap();
    let demoted = caller.put_member("acme", "ann", "reader").await;
    assert_refused(demoted, Code::PermissionDenied, "GRANT_BEYOND_CALLER");
}

// ---- members ----

#[tokio::test]
async fn a_member_is_made_given_another_role_and_removed() {
    let server = with_roles().await;
    let root = server.root_client();
    let made = root.put_member("acme", "ann", "reader").await.unwrap();
    let changed = root.put_member("acme", "ann", "writer").await.unwrap();
    assert!(changed > made);
    let page = list_members(&root, list_members_request("acme")).await.unwrap();
    let (account, user, role) = ("acme".to_owned(), "ann".to_owned(), "writer".to_owned());
    assert_eq!(page.members, [pb::Member { account, user, role, revision: changed }]);
    assert!(remove_member(&root, "acme", "ann").await.unwrap() > changed);
    assert_eq!(list_members(&root, list_members_request("acme")).await.unwrap().members, []);
    assert_refused(remove_member(&root, "acme", "ann").await, Code::NotFound, "MEMBER_NOT_FOUND");
}

#[tokio::test]
async fn members_come_in_pages_in_the_order_of_their_users() {
    let server = with_roles().await;
    let root = server.root_client();
    for number in [3, 0, 4, 1, 2] {
        root.put_member("acme", &format!("user-{number}"), "reader").await.unwrap();
    }
    root.put_member("other", "user-9", "reader").await.unwrap();
    let first =
        list_members(&root, pb::ListMembersRequest { page_size: Some(2), ..list_members_request("acme") })
            .await
            .unwrap();
    assert_eq!(users(&first), ["user-0", "user-1"]);
    let page_token = first.next_page_token;
    let next = pb::ListMembersRequest {
        page_size: Some(3),
        page_token: page_token.clone(),
        ..list_members_request("acme")
    };
    let second = list_members(&root, next).await.unwrap();
    assert_eq!(users(&second), ["user-2", "user-3", "user-4"]);
    assert_eq!(second.next_page_token, "", "that was the last page");
    let strange = pb::ListMembersRequest { page_token, ..list_members_request("other") };
    assert_invalid(list_members(&root, strange).await, &["page_token"]);
    for page_size in [Some(0), Some(1001)] {
        assert_invalid(
            list_members(&root, pb::ListMembersRequest { page_size, ..list_members_request("acme") }).await,
            &["page_size"],
        );
    }
}

// ---- user keys ----

#[tokio::test]
async fn a_user_key_may_do_what_both_its_grants_and_the_members_role_allow() {
    let server = with_roles().await;
    server.root_client().put_member("acme", "ann", "writer").await.unwrap();
    let request = |scope| ask_of(scope);
    let made = server.create_key(user_key_request("ann", &["monitors:read", "billing:*"])).await;
    for (scope, expected) in
        [(READ, Reason::Ok), (WRITE, Reason::MissingScope), ("billing:read", Reason::MissingScope)]
    {
        let answer = server.root_client().check(request(scope)(&made)).await.unwrap();
        assert_eq!(answer.reason(), expected, "{scope}");
        assert_eq!(answer.scopes, [READ], "what both allow");
    }
}

fn ask_of(scope: &str) -> impl Fn(&CreatedKey) -> pb::CheckRequest {
    move |made| pb::CheckRequest {
        account: Some("acme".to_owned()),
        ..scope_check_request(&made.token, scope)
    }
}

#[tokio::test]
async fn a_check_of_a_user_key_without_account_is_wrong_account() {
    let server = with_roles().await;
    server.root_client().put_member("acme", "ann", "reader").await.unwrap();
    let made = server.create_key(user_key_request("ann", &["all"])).await;
    let answer = server.root_client().check(scope_check_request(&made.token, READ)).await.unwrap();
    assert_eq!((answer.reason(), answer.account.as_str()), (Reason::WrongAccount, ""));
    for nowhere in ["other", "nowhere"] {
        assert_eq!(ask(&server.root_client(), &made.token, nowhere, READ).await, Reason::WrongAccount);
    }
}

#[tokio::test]
async fn a_suspended_account_refuses_its_members_keys_and_other_accounts_do_not() {
    let server = with_roles().await;
    for account in ["acme", "other"] {
        server.root_client().put_member(account, "ann", "reader").await.unwrap();
    }
    let made = server.create_key(user_key_request("ann", &["all"])).await;
    server.root_client().suspend("acme").await.unwrap();
    assert_eq!(ask(&server.root_client(), &made.token, "acme", READ).await, Reason::AccountSuspended);
    assert_eq!(ask(&server.root_client(), &made.token, "other", READ).await, Reason::Ok);
    server.root_client().resume("acme").await.unwrap();
    assert_eq!(ask(&server.root_client(), &made.token, "acme", READ).await, Reason::Ok);
}

#[tokio::test]
async fn an_accounts_caller_checks_its_members_keys_in_its_account() {
    let server = with_roles().await;
    server.root_client().put_member("acme", "ann", "reader").await.unwrap();
    server.root_client().put_member("other", "ann", "writer").await.unwrap();
    let made = server.create_key(user_key_request("ann", &["all"])).await;
    let gateway = server.client_with_scopes("acme", &["keyward:check"]).await;
    assert_eq!(ask(&gateway, &made.token, "acme", READ).await, Reason::Ok);
    assert_eq!(ask(&gateway, &made.token, "acme", WRITE).await, Reason::MissingScope);
    let elsewhere =
        pb::CheckRequest { account: Some("other".to_owned()), ..scope_check_request(&made.token, WRITE) };
    let answer = gateway.check(elsewhere).await.unwrap();
    assert_eq!(answer.reason(), Reason::WrongAccount, "nothing of the user's place in another account");
    assert_eq!(answer.scopes, [""; 0]);
}

#[tokio::test]
async fn to_an_accounts_caller_a_non_members_key_is_unknown() {
    let server = with_roles().await;
    server.root_client().put_member("other", "bob", "reader").await.unwrap();
    let made = server.create_key(user_key_request("bob", &["all"])).await;
    let gateway = server.client_with_scopes("acme", &["keyward:check"]).await;
    for account in ["acme", "other"] {
        let account = Some(account.to_owned());
        let asked = pb::CheckRequest { account, ..scope_check_request(&made.token, READ) };
        let answer = gateway.check(asked).await.unwrap();
        assert_eq!((answer.reason(), answer.key_id.as_str()), (Reason::Unknown, ""));
    }
}

#[tokio::test]
async fn user_keys_do_not_exist_for_an_accounts_callers() {
    let server = with_roles().await;
    server.root_client().put_member("acme", "ann", "reader").await.unwrap();
    let made = server.create_key(user_key_request("ann", &["all"])).await;
    let caller = server.client_with_scopes("acme", &["all", "keyward:*"]).await;
    let id = &made.id;
    let of_ann = pb::ListKeysRequest { user: "ann".to_owned(), ..Default::default() };
    let refusals = [
        caller.get(id).await.map(drop),
        caller.update(&made.key, &["name"]).await.map(drop),
        caller.disable(id).await.map(drop),
        caller.enable(id).await.map(drop),
        caller.revoke(id).await.map(drop),
        caller.rotate(id, 0).await.map(drop),
        caller.finish_rotation(id).await.map(drop),
        caller.lookup(&made.token).await.map(drop),
        caller.list(of_ann).await.map(drop),
        caller.create(user_key_request("ann", &[READ])).await.map(drop),
    ];
    for refusal in refusals {
        assert_refused(refusal, Code::NotFound, "KEY_NOT_FOUND");
    }
    let own = caller.list(pb::ListKeysRequest::default()).await.unwrap().keys;
    assert!(own.iter().all(|key| key.user.is_empty()), "nor do its lists show them");
}

#[tokio::test]
async fn a_user_key_calls_for_its_user_in_the_account_that_the_header_names() {
    let server = with_roles().await;
    server.root_client().put_role("", "admin", &["all", "keyward:keys:*"]).await.unwrap();
    server.root_client().put_member("acme", "ann", "admin").await.unwrap();
    server.root_client().put_member("other", "ann", "reader").await.unwrap();
    let made = server.create_key(user_key_request("ann", &["all", "keyward:*"])).await;
    let key = server.client_with_token(&made.token);
    let everything = pb::ListKeysRequest::default;
    assert_refused(key.list(everything()).await, Code::Unauthenticated, "UNAUTHENTICATED");
    let in_acme = key.with_header("x-keyward-account", "acme");
    let service = in_acme.create_key(service_key_request("acme", &[WRITE])).await;
    assert_eq!(service.key.account, "acme");
    assert_eq!(in_acme.get(&service.id).await.unwrap().id, service.id);
    let in_other = key.with_header("x-keyward-account", "other");
    assert_refused(in_other.list(everything()).await, Code::PermissionDenied, "PERMISSION_MISSING");
    let nowhere = key.with_header("x-keyward-account", "nowhere");
    assert_refused(nowhere.list(everything()).await, Code::Unauthenticated, "UNAUTHENTICATED");
    assert_invalid(
        key.with_header("x-keyward-account", "A B").list(everything()).await,
        &["x-keyward-account"],
    );
}

#[tokio::test]
async fn a_service_key_acts_in_its_own_account_whatever_the_header_names() {
    let server = with_roles().await;
    let caller = server
        .client_with_scopes("acme", &["keyward:keys:read"])
        .await
        .with_header("x-keyward-account", "other");
    let listed = caller.list(pb::ListKeysRequest::default()).await.unwrap().keys;
    assert!(listed.iter().all(|key| key.account == "acme") && !listed.is_empty());
}

#[tokio::test]
async fn a_user_manages_their_own_keys_with_a_key() {
    let server = with_roles().await;
    server.root_client().put_role("", "self-service", &["all", "keyward:keys:*"]).await.unwrap();
    for user in ["ann", "bob"] {
        server.root_client().put_member("acme", user, "self-service").await.unwrap();
    }
    let made = server.create_key(user_key_request("ann", &["all", "keyward:keys:*"])).await;
    let ann = server.client_with_token(&made.token).with_header("x-keyward-account", "acme");
    let second = ann.create_key(user_key_request("ann", &[READ])).await;
    let mine = pb::ListKeysRequest { user: "ann".to_owned(), ..Default::default() };
    assert_eq!(ann.list(mine).await.unwrap().keys.len(), 2);
    ann.revoke(&second.id).await.unwrap();
    let bobs = server.create_key(user_key_request("bob", &["all"])).await;
    assert_refused(ann.revoke(&bobs.id).await, Code::NotFound, "KEY_NOT_FOUND");
    assert_refused(ann.create(user_key_request("bob", &[READ])).await, Code::NotFound, "KEY_NOT_FOUND");
}

#[tokio::test]
async fn a_user_key_asks_about_itself_without_naming_an_account() {
    let server = with_roles().await;
    server.root_client().put_member("acme", "ann", "reader").await.unwrap();
    let made = server.create_key(user_key_request("ann", &["all"])).await;
    let me = server.client_with_token(&made.token);
    let anywhere = me.who_am_i().await.unwrap();
    assert_eq!((anywhere.key.unwrap().id, anywhere.account), (made.id.clone(), None));
    let there = me.with_header("x-keyward-account", "acme").who_am_i().await.unwrap();
    assert_eq!(there.account.unwrap().id, "acme");
}

#[tokio::test]
async fn a_user_keys_name_is_unique_among_its_users_keys() {
    let server = with_roles().await;
    let named =
        |user| pb::CreateKeyRequest { name: Some("laptop".to_owned()), ..user_key_request(user, &["all"]) };
    server.create_key(named("ann")).await;
    assert_refused(server.root_client().create(named("ann")).await, Code::AlreadyExists, "KEY_NAME_TAKEN");
    server.create_key(named("bob")).await;
}

#[tokio::test]
async fn the_last_removal_revokes_disabled_and_expired_keys_too_and_no_others() {
    let server = with_roles().await;
    let root = server.root_client();
    root.put_member("acme", "ann", "reader").await.unwrap();
    let disabled = server.create_key(user_key_request("ann", &["all"])).await;
    root.disable(&disabled.id).await.unwrap();
    let expires_at = Some(server.timestamp_after(10));
    let expired =
        server.create_key(pb::CreateKeyRequest { expires_at, ..user_key_request("ann", &["all"]) }).await;
    server.advance(10);
    let bobs = server.create_key(user_key_request("bob", &["all"])).await;
    remove_member(&root, "acme", "ann").await.unwrap();
    for made in [&disabled, &expired] {
        assert_eq!(root.get(&made.id).await.unwrap().state(), KeyState::Revoked);
    }
    assert_eq!(root.get(&bobs.id).await.unwrap().state(), KeyState::Active);
}

#[tokio::test]
async fn an_accounts_caller_ends_a_membership_and_only_an_operator_the_keys_with_the_last_one() {
    let server = with_roles().await;
    server.root_client().put_member("acme", "ann", "reader").await.unwrap();
    let made = server.create_key(user_key_request("ann", &["all"])).await;
    let team = server.client_with_scopes("acme", &["keyward:accounts:write"]).await;
    remove_member(&team, "acme", "ann").await.unwrap();
    assert_eq!(ask(&server.root_client(), &made.token, "acme", READ).await, Reason::WrongAccount);
    assert_eq!(server.root_client().get(&made.id).await.unwrap().state(), KeyState::Active);
    let again = remove_member(&server.root_client(), "acme", "ann").await.unwrap();
    let key = server.root_client().get(&made.id).await.unwrap();
    assert_eq!((key.state(), key.revision), (KeyState::Revoked, again), "the operator finishes it");
    assert_refused(
        remove_member(&server.root_client(), "acme", "ann").await,
        Code::NotFound,
        "MEMBER_NOT_FOUND",
    );
}

#[tokio::test]
async fn the_log_names_who_ended_the_last_membership_in_the_revocations_too() {
    let server = with_roles().await;
    server.root_client().put_member("acme", "ann", "reader").await.unwrap();
    let made = server.create_key(user_key_request("ann", &["all"])).await;
    server.root_client().put_role("acme", "manager", &["keyward:accounts:write"]).await.unwrap();
    server.root_client().put_member("acme", "olga", "manager").await.unwrap();
    let team = server.create_key(service_key_request("keyward", &["keyward:accounts:write"])).await;
    let olga = server.client_with_token(&team.token).with_header("x-keyward-acting-user", "olga");
    remove_member(&olga, "acme", "ann").await.unwrap();
    let about = pb::ListAuditEntriesRequest { key_id: made.id, ..Default::default() };
    let revocation = server.root_client().list_audit_entries(about).await.unwrap().entries.remove(0);
    let told = (revocation.action.as_str(), revocation.actor, revocation.acting_user.as_str());
    assert_eq!(told, ("key.revoked", team.id, "olga"));
}

#[tokio::test]
async fn the_log_has_every_change_of_a_membership() {
    let server = with_roles().await;
    server.root_client().put_member("acme", "ann", "reader").await.unwrap();
    server.root_client().put_member("acme", "ann", "writer").await.unwrap();
    remove_member(&server.root_client(), "acme", "ann").await.unwrap();
    let about = pb::ListAuditEntriesRequest { account: "acme".to_owned(), ..Default::default() };
    let entries = server.root_client().list_audit_entries(about).await.unwrap().entries;
    let of_ann: Vec<_> =
        entries.iter().filter(|entry| entry.user == "ann").map(|entry| entry.action.as_str()).collect();
    assert_eq!(of_ann, ["member.removed", "member.put", "member.put"]);
}

// ---- a person behind an operator's call ----

/// `acme` with an admin, who may write keys and monitors and nothing else; and the dashboard calling for her.
pub(super) async fn server_with_admin() -> (Server, Client) {
    let server = with_roles().await;
    server
        .root_client()
        .put_role("", "admin", &["monitors:*", "keyward:keys:write", "keyward:keys:read"])
        .await
        .unwrap();
    server.root_client().put_member("acme", "ann", "admin").await.unwrap();
    let ann = server.root_client().with_header("x-keyward-acting-user", "ann");
    (server, ann)
}

#[tokio::test]
async fn a_member_sees_the_accounts_keys_whatever_the_role() {
    let (server, _) = server_with_admin().await;
    server.root_client().put_member("acme", "rob", "reader").await.unwrap();
    let made = server.create_key(with_role("acme", "reader")).await;
    let rob = server.root_client().with_header("x-keyward-acting-user", "rob");
    assert_eq!(rob.get(&made.id).await.unwrap().id, made.id);
    for refusal in
        [rob.disable(&made.id).await, rob.enable(&made.id).await, rob.update(&made.key, &["name"]).await]
    {
        assert_refused(refusal, Code::PermissionDenied, "ROLE_LACKS_PERMISSION");
    }
}

#[tokio::test]
async fn a_person_gives_no_right_over_keyward_that_the_own_role_does_not_hold() {
    let (server, ann) = server_with_admin().await;
    server.root_client().put_role("", "owner", &["all", "keyward:*"]).await.unwrap();
    ann.create_key(service_key_request("acme", &["monitors:write", "keyward:keys:read"])).await;
    for beyond in ["keyward:accounts:write", "keyward:*"] {
        let refusal = ann.create(service_key_request("acme", &[beyond])).await;
        assert_refused(refusal, Code::PermissionDenied, "GRANT_BEYOND_CALLER");
    }
    assert_refused(
        ann.create(with_role("acme", "owner")).await,
        Code::PermissionDenied,
        "GRANT_BEYOND_CALLER",
    );
}

#[tokio::test]
async fn a_person_does_not_take_over_a_key_beyond_their_role() {
    let (server, ann) = server_with_admin().await;
    let made = server.create_key(service_key_request("acme", &["keyward:*"])).await;
    assert_refused(ann.rotate(&made.id, 0).await, Code::PermissionDenied, "GRANT_BEYOND_CALLER");
    assert_refused(ann.update(&made.key, &["name"]).await, Code::PermissionDenied, "GRANT_BEYOND_CALLER");
    assert_eq!(server.root_client().check_reason(&made.token).await, Reason::Ok);
    ann.revoke(&made.id).await.unwrap();
}
