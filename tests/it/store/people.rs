//! Roles and members: what they may be, what stands against a change, and how they are listed.

use keyward::{
    domain::{
        account::{AccountMember, Role},
        key::{ApiKey, KeyOwner},
        name::{RoleName, UserId},
        scope::Scope,
        time::Revision,
    },
    store::WriteRejection,
};

use super::*;

/// A key of `owner` with this role.
fn key_with(owner: &KeyOwner, role: &str) -> ApiKey {
    let mut key = ApiKey { owner: owner.clone(), ..key() };
    key.spec.roles = vec![RoleName::parse(role).unwrap()];
    key
}

fn of_account(id: &str) -> KeyOwner {
    KeyOwner::Account(account_id(id))
}

fn of_user(id: &str) -> KeyOwner {
    KeyOwner::User(UserId::parse(id).unwrap())
}

pub(super) async fn every_field_of_a_role_reads_back(store: SharedStore) {
    with_accounts(&store).await;
    for account in [None, Some("acme")] {
        let made = commit_role(&store, put_role(&role(account, "agent"))).await;
        let of = made.account.clone();
        assert!(store.list_roles(of.as_ref()).await.unwrap().contains(&made));
        let scopes = ["journeys:run", "monitors:*"].map(|scope| Scope::parse_grant(scope).unwrap());
        let changed = Role { scopes: scopes.into_iter().collect(), ..made.clone() };
        let changed = commit_role(&store, put_role(&changed)).await;
        assert!(changed.revision > made.revision);
        let found = store.list_roles(of.as_ref()).await.unwrap();
        assert!(found.contains(&changed) && !found.contains(&made));
        commit_role(&store, delete_role(&changed)).await;
        assert!(!store.list_roles(of.as_ref()).await.unwrap().contains(&changed));
    }
    whole_chain(&store).await;
}

pub(super) async fn every_field_of_a_member_reads_back(store: SharedStore) {
    with_accounts(&store).await;
    with_roles(&store).await;
    let made = commit_member(&store, put_member(&member("acme", "u1", "agent"))).await;
    assert_eq!(store.list_memberships(&made.user).await.unwrap(), std::slice::from_ref(&made));
    let changed = AccountMember { role: RoleName::parse("admin").unwrap(), ..made };
    let changed = commit_member(&store, put_member(&changed)).await;
    assert_eq!(store.list_memberships(&changed.user).await.unwrap(), std::slice::from_ref(&changed));
    assert_eq!(store.list_members(&changed.account, None, 10).await.unwrap(), std::slice::from_ref(&changed));
    commit_member(&store, remove_member(&changed)).await;
    assert_eq!(store.list_memberships(&changed.user).await.unwrap(), []);
    whole_chain(&store).await;
}

pub(super) async fn a_role_or_member_changed_from_another_revision_is_a_conflict(store: SharedStore) {
    with_accounts(&store).await;
    let old = commit_role(&store, put_role(&role(None, "agent"))).await;
    let new = commit_role(&store, put_role(&old)).await;
    let joined = commit_member(&store, put_member(&member("acme", "u1", "agent"))).await;
    let moved = commit_member(&store, put_member(&joined)).await;
    let head = store.log_head().await.unwrap();
    for stale in [
        put_role(&role(None, "agent")),
        put_role(&old),
        delete_role(&old),
        delete_role(&Role { revision: Revision(9), ..role(None, "nobody") }),
        put_member(&member("acme", "u1", "agent")),
        put_member(&joined),
        remove_member(&joined),
        remove_member(&AccountMember { revision: Revision(9), ..member("acme", "nobody", "agent") }),
    ] {
        let said = format!("{stale:?}");
        assert_eq!(try_commit(&store, stale).await.unwrap_err(), WriteRejection::Conflict, "{said}");
    }
    assert_eq!(store.log_head().await.unwrap(), head, "nothing was recorded");
    assert_eq!(store.list_roles(None).await.unwrap(), [new]);
    assert_eq!(store.list_memberships(&moved.user).await.unwrap(), [moved]);
}

pub(super) async fn the_roles_of_an_account_come_with_the_global_ones_by_name(store: SharedStore) {
    with_accounts(&store).await;
    let places =
        [(None, "b"), (None, "a_"), (Some("acme"), "b"), (Some("acme"), "a-"), (Some("globex"), "c")];
    for (account, name) in places {
        commit_role(&store, put_role(&role(account, name))).await;
    }
    let found = async |account: Option<&str>| {
        let roles = store.list_roles(account.map(account_id).as_ref()).await.unwrap();
        let shown = |role: Role| (role.account.map(|id| id.to_string()), role.name.to_string());
        roles.into_iter().map(shown).collect::<Vec<_>>()
    };
    let expected = |list: &[(Option<&str>, &str)]| {
        list.iter()
            .map(|(account, name)| (account.map(str::to_owned), (*name).to_owned()))
            .collect::<Vec<_>>()
    };
    assert_eq!(found(None).await, expected(&[(None, "a_"), (None, "b")]));
    let of_acme = [(Some("acme"), "a-"), (None, "a_"), (None, "b"), (Some("acme"), "b")];
    assert_eq!(found(Some("acme")).await, expected(&of_acme));
    assert_eq!(found(Some("initech")).await, expected(&[(None, "a_"), (None, "b")]));
}

pub(super) async fn a_key_has_roles_that_stand_for_its_owner(store: SharedStore) {
    with_accounts(&store).await;
    commit_role(&store, put_role(&role(None, "global"))).await;
    commit_role(&store, put_role(&role(Some("acme"), "own"))).await;
    for (owner, name, stands) in [
        (of_account("acme"), "global", true),
        (of_account("acme"), "own", true),
        (of_account("globex"), "own", false),
        (of_user("acme"), "own", false),
        (of_user("u1"), "global", true),
        (of_account("acme"), "nobody", false),
    ] {
        let outcome = try_commit(&store, create(&key_with(&owner, name))).await;
        let said = outcome.err().map_or(Ok(()), Err);
        assert_eq!(said, if stands { Ok(()) } else { Err(WriteRejection::RoleNotFound) }, "{owner:?} {name}");
    }
    // Of a revoked key nobody asks.
    commit_key(&store, create(&revoked(key_with(&of_account("acme"), "nobody"), timestamp(1)))).await;
}

pub(super) async fn a_member_has_a_role_that_stands_for_the_account(store: SharedStore) {
    with_accounts(&store).await;
    commit_role(&store, put_role(&role(None, "global"))).await;
    commit_role(&store, put_role(&role(Some("acme"), "own"))).await;
    for (account, name, stands) in
        [("acme", "own", true), ("globex", "global", true), ("globex", "own", false), ("acme", "no", false)]
    {
        let outcome = try_commit(&store, put_member(&member(account, name, name))).await;
        let said = outcome.err().map_or(Ok(()), Err);
        assert_eq!(said, if stands { Ok(()) } else { Err(WriteRejection::RoleNotFound) }, "{account} {name}");
    }
}

pub(super) async fn a_role_in_use_is_not_deleted(store: SharedStore) {
    with_accounts(&store).await;
    let agent = commit_role(&store, put_role(&role(None, "agent"))).await;
    // Names that only look like it.
    for name in ["agents", "an-agent"] {
        commit_role(&store, put_role(&role(None, name))).await;
        commit_key(&store, create(&key_with(&of_account("acme"), name))).await;
    }
    let first = commit_key(&store, create(&key_with(&of_account("acme"), "agent"))).await;
    let second = commit_key(&store, create(&key_with(&of_user("u1"), "agent"))).await;
    let joined = commit_member(&store, put_member(&member("acme", "u1", "agent"))).await;
    let in_use = async |keys, members| {
        let said = try_commit(&store, delete_role(&agent)).await.unwrap_err();
        assert_eq!(said, WriteRejection::RoleInUse { keys, members });
    };
    in_use(2, 1).await;
    commit_key(&store, update(&revoked(first, timestamp(1)))).await;
    in_use(1, 1).await;
    commit_member(&store, remove_member(&joined)).await;
    in_use(1, 0).await;
    commit_key(&store, update(&revoked(second, timestamp(1)))).await;
    commit_role(&store, delete_role(&agent)).await;
}

pub(super) async fn a_global_role_is_not_used_where_an_account_has_its_own(store: SharedStore) {
    with_accounts(&store).await;
    let global = commit_role(&store, put_role(&role(None, "agent"))).await;
    let own = commit_role(&store, put_role(&role(Some("acme"), "agent"))).await;
    let made = commit_key(&store, create(&key_with(&of_account("acme"), "agent"))).await;
    let joined = commit_member(&store, put_member(&member("acme", "u1", "agent"))).await;
    let said = try_commit(&store, delete_role(&own)).await.unwrap_err();
    assert_eq!(said, WriteRejection::RoleInUse { keys: 1, members: 1 });
    commit_role(&store, delete_role(&global)).await;
    commit_key(&store, update(&revoked(made, timestamp(1)))).await;
    commit_member(&store, remove_member(&joined)).await;
    commit_role(&store, delete_role(&own)).await;
}

pub(super) async fn a_deleted_role_can_be_made_again(store: SharedStore) {
    let made = commit_role(&store, put_role(&role(None, "agent"))).await;
    commit_role(&store, delete_role(&made)).await;
    assert_eq!(try_commit(&store, put_role(&made)).await.unwrap_err(), WriteRejection::Conflict);
    let again = commit_role(&store, put_role(&role(None, "agent"))).await;
    assert_eq!(store.list_roles(None).await.unwrap(), [again]);
}

pub(super) async fn members_come_in_pages_in_the_order_of_their_users(store: SharedStore) {
    with_accounts(&store).await;
    with_roles(&store).await;
    // The order of bytes, which is not that of dictionaries.
    let users = ["B", "a", "a-", "a_", "b", "~", "0"];
    for user in users {
        commit_member(&store, put_member(&member("acme", user, "agent"))).await;
    }
    commit_member(&store, put_member(&member("globex", "a0", "agent"))).await;
    let (mut found, mut after) = (Vec::new(), None);
    loop {
        let page = store.list_members(&account_id("acme"), after.as_ref(), 2).await.unwrap();
        assert!(page.len() <= 2);
        let Some(last) = page.last() else { break };
        after = Some(last.user.clone());
        found.extend(page.into_iter().map(|member| member.user.to_string()));
    }
    let mut sorted = users.to_vec();
    sorted.sort_unstable();
    assert_eq!(found, sorted);
}

pub(super) async fn the_memberships_of_a_user_are_those_of_no_other(store: SharedStore) {
    with_accounts(&store).await;
    with_roles(&store).await;
    for (account, user) in [("globex", "u1"), ("acme", "u1"), ("acme", "u2"), ("acme", "U1")] {
        commit_member(&store, put_member(&member(account, user, "agent"))).await;
    }
    let found = store.list_memberships(&UserId::parse("u1").unwrap()).await.unwrap();
    let found: Vec<_> = found.iter().map(|member| member.account.as_str()).collect();
    assert_eq!(found, ["acme", "globex"]);
}
