//! KeyService.List: its order, its pages and its filters.

use std::collections::BTreeSet;

use keyward::pb::{self, KeyState};
use prost::Message;

use crate::support::{
    Client, HOUR, assert_invalid, authenticate_request, named_key_request, proto_seconds, user_key_request,
};

use super::Server;

fn of_acme() -> pb::ListKeysRequest {
    pb::ListKeysRequest { account: "acme".into(), ..Default::default() }
}

async fn names(root: &Client, request: pb::ListKeysRequest) -> Vec<String> {
    root.list(request).await.unwrap().keys.into_iter().map(|key| key.name).collect()
}

/// Keys of `acme` called `n0`, `n1` … , a second apart.
async fn numbered(server: &Server, count: usize) {
    for at in 0..count {
        server.create_key(named_key_request("acme", &format!("n{at}"))).await;
        server.advance(1);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_newest_comes_first() {
    let server = Server::with_accounts().await;
    numbered(&server, 4).await;
    assert_eq!(names(&server.root_client(), of_acme()).await, ["n3", "n2", "n1", "n0"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn pages_give_every_key_once_and_end() {
    let server = Server::with_accounts().await;
    numbered(&server, 7).await;
    for size in [1, 2, 3, 7, 8] {
        let (mut seen, mut token, mut pages) = (Vec::new(), String::new(), 0);
        loop {
            let request = pb::ListKeysRequest { page_size: Some(size), page_token: token, ..of_acme() };
            let page = server.root_client().list(request).await.unwrap();
            assert!(page.keys.len() <= size as usize);
            seen.extend(page.keys.into_iter().map(|key| key.name));
            (token, pages) = (page.next_page_token, pages + 1);
            if token.is_empty() {
                break;
            }
        }
        assert_eq!(seen, ["n6", "n5", "n4", "n3", "n2", "n1", "n0"]);
        assert_eq!(pages, 7u32.div_ceil(size), "no empty page at the end");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_of_the_same_instant_are_paged_without_loss() {
    let server = Server::with_accounts().await;
    for at in 0..9 {
        server.create_key(named_key_request("acme", &format!("n{at}"))).await;
    }
    let (mut seen, mut token) = (BTreeSet::new(), String::new());
    for _ in 0..3 {
        let request = pb::ListKeysRequest { page_size: Some(3), page_token: token, ..of_acme() };
        let page = server.root_client().list(request).await.unwrap();
        seen.extend(page.keys.into_iter().map(|key| key.name));
        token = page.next_page_token;
    }
    assert_eq!((seen.len(), token.as_str()), (9, ""));
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_made_and_revoked_between_two_pages_move_no_other() {
    let server = Server::with_accounts().await;
    let root = server.root_client();
    numbered(&server, 6).await;
    let page_of_3 = pb::ListKeysRequest { page_size: Some(3), ..of_acme() };
    let first = root.list(page_of_3.clone()).await.unwrap();
    server.create_key(named_key_request("acme", "later")).await;
    root.revoke(&first.keys[0].id).await.unwrap();
    root.rotate(&first.keys[1].id, 0).await.unwrap();
    let second = pb::ListKeysRequest { page_token: first.next_page_token, ..page_of_3 };
    assert_eq!(names(&root, second).await, ["n2", "n1", "n0"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_page_token_belongs_to_its_filters() {
    let server = Server::with_accounts().await;
    let root = server.root_client();
    numbered(&server, 3).await;
    let first = root.list(pb::ListKeysRequest { page_size: Some(1), ..of_acme() }).await.unwrap();
    let token = || first.next_page_token.clone();
    for other in [
        pb::ListKeysRequest { account: "other".into(), ..Default::default() },
        pb::ListKeysRequest { user: "ann".into(), ..Default::default() },
        pb::ListKeysRequest { environment: "production".into(), ..of_acme() },
        pb::ListKeysRequest { states: vec![KeyState::Active.into()], ..of_acme() },
        pb::ListKeysRequest { name_prefix: "n".into(), ..of_acme() },
        pb::ListKeysRequest { unused_since: Some(server.timestamp_after(0)), ..of_acme() },
        pb::ListKeysRequest { expires_before: Some(server.timestamp_after(0)), ..of_acme() },
        pb::ListKeysRequest { created_before: Some(server.timestamp_after(0)), ..of_acme() },
    ] {
        assert_invalid(
            root.list(pb::ListKeysRequest { page_token: token(), ..other }).await,
            &["page_token"],
        );
    }
    let larger = pb::ListKeysRequest { page_size: Some(2), page_token: token(), ..of_acme() };
    assert_eq!(names(&root, larger).await, ["n1", "n0"], "the size of a page may change");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_page_token_of_nobodys_making_is_refused() {
    let server = Server::with_accounts().await;
    let root = server.root_client();
    numbered(&server, 2).await;
    let first = root.list(pb::ListKeysRequest { page_size: Some(1), ..of_acme() }).await.unwrap();
    let mut changed = first.next_page_token.clone().into_bytes();
    changed[8] = if changed[8] == b'A' { b'B' } else { b'A' };
    let changed = String::from_utf8(changed).unwrap();
    let cut = first.next_page_token[..first.next_page_token.len() - 4].to_owned();
    for token in ["x".to_owned(), "AAAA".into(), "!".into(), "é".into(), "A".repeat(10_000), changed, cut] {
        assert_invalid(
            root.list(pb::ListKeysRequest { page_token: token, ..of_acme() }).await,
            &["page_token"],
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_page_has_50_keys_unless_it_is_asked_for_1_to_1000() {
    let server = Server::with_accounts().await;
    let root = server.root_client();
    let calls: Vec<_> = (0..53)
        .map(|at| {
            let root = root.clone();
            tokio::spawn(async move { root.create_key(named_key_request("acme", &format!("n{at}"))).await })
        })
        .collect();
    for call in calls {
        call.await.unwrap();
    }
    let page = root.list(of_acme()).await.unwrap();
    assert_eq!((page.keys.len(), page.next_page_token.is_empty()), (50, false));
    let all = pb::ListKeysRequest { page_size: Some(1000), ..of_acme() };
    assert_eq!(root.list(all).await.unwrap().keys.len(), 53);
    for size in [0, 1001, u32::MAX] {
        let request = pb::ListKeysRequest { page_size: Some(size), ..of_acme() };
        assert_invalid(root.list(request).await, &["page_size"]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn only_the_keys_of_the_owner_are_listed() {
    let server = Server::with_accounts().await;
    let root = server.root_client();
    root.put_role("acme", "agent", &["monitors:read"]).await.unwrap();
    root.put_member("acme", "ann", "agent").await.unwrap();
    server.create_key(named_key_request("acme", "acme's")).await;
    server.create_key(named_key_request("other", "other's")).await;
    server
        .create_key(pb::CreateKeyRequest { name: Some("ann's".into()), ..user_key_request("ann", &["all"]) })
        .await;
    assert_eq!(names(&root, of_acme()).await, ["acme's"]);
    let anns = pb::ListKeysRequest { user: "ann".into(), ..Default::default() };
    assert_eq!(names(&root, anns).await, ["ann's"]);
    let bobs = pb::ListKeysRequest { user: "bob".into(), ..Default::default() };
    assert!(names(&root, bobs).await.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_are_filtered_by_environment() {
    let server = Server::with_accounts().await;
    server.create_key(named_key_request("acme", "live")).await;
    server
        .create_key(pb::CreateKeyRequest {
            environment: "staging".into(),
            ..named_key_request("acme", "stage")
        })
        .await;
    for (environment, name) in [("production", "live"), ("staging", "stage")] {
        let request = pb::ListKeysRequest { environment: environment.into(), ..of_acme() };
        assert_eq!(names(&server.root_client(), request).await, [name]);
    }
    let none = pb::ListKeysRequest { environment: "development".into(), ..of_acme() };
    assert!(names(&server.root_client(), none).await.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_are_filtered_by_the_state_that_they_show() {
    let server = Server::with_accounts().await;
    let root = server.root_client();
    numbered(&server, 1).await;
    let short =
        |name| pb::CreateKeyRequest { ttl: Some(proto_seconds(1)), ..named_key_request("acme", name) };
    server.create_key(short("expired")).await;
    let both = server.create_key(short("expired and disabled")).await;
    let disabled = server.create_key(named_key_request("acme", "disabled")).await;
    let revoked = server.create_key(short("revoked")).await;
    server.advance(1);
    root.disable(&both.id).await.unwrap();
    root.disable(&disabled.id).await.unwrap();
    root.revoke(&revoked.id).await.unwrap();
    let of_states = |states: &[KeyState]| {
        let states = states.iter().map(|state| i32::from(*state)).collect();
        let root = root.clone();
        async move {
            let mut names = names(&root, pb::ListKeysRequest { states, ..of_acme() }).await;
            names.sort();
            names
        }
    };
    assert_eq!(of_states(&[KeyState::Active]).await, ["n0"]);
    assert_eq!(of_states(&[KeyState::Expired]).await, ["expired"]);
    assert_eq!(of_states(&[KeyState::Disabled]).await, ["disabled", "expired and disabled"]);
    assert_eq!(of_states(&[KeyState::Revoked]).await, ["revoked"]);
    assert_eq!(of_states(&[KeyState::Active, KeyState::Revoked]).await, ["n0", "revoked"]);
    assert_eq!(of_states(&[]).await.len(), 5, "none = in any");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_prefix_is_taken_letter_by_letter() {
    let server = Server::with_accounts().await;
    for name in ["ci-1", "ci-2", "CI-3", "c%i", "c_i", "é1", "ci"] {
        server.create_key(named_key_request("acme", name)).await;
    }
    for (prefix, count) in [
        ("ci", 3),
        ("ci-", 2),
        ("CI", 1),
        ("c%", 1),
        ("c_", 1),
        ("é", 1),
        ("e\u{301}", 1),
        ("e", 0),
        ("ci-1x", 0),
        ("", 7),
        ("*", 0),
    ] {
        let request = pb::ListKeysRequest { name_prefix: prefix.into(), ..of_acme() };
        assert_eq!(names(&server.root_client(), request).await.len(), count, "{prefix:?}");
    }
    let request = pb::ListKeysRequest { name_prefix: "ci\0".into(), ..of_acme() };
    assert_invalid(server.root_client().list(request).await, &["name_prefix"]);
    let request = pb::ListAuditEntriesRequest { actor: "ci\n".into(), ..Default::default() };
    assert_invalid(server.root_client().list_audit_entries(request).await, &["actor"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn unused_keys_are_found_with_the_latest_uses_counted() {
    let server = Server::with_accounts().await;
    let root = server.root_client();
    server.create_key(named_key_request("acme", "never")).await;
    let early = server.create_key(named_key_request("acme", "early")).await;
    let late = server.create_key(named_key_request("acme", "late")).await;
    root.check(authenticate_request(&early.token)).await.unwrap();
    server.advance(2 * HOUR);
    root.check(authenticate_request(&late.token)).await.unwrap();
    let since =
        |seconds| pb::ListKeysRequest { unused_since: Some(server.timestamp_after(seconds)), ..of_acme() };
    let mut found = names(&root, since(-3600)).await;
    found.sort();
    assert_eq!(found, ["early", "never"]);
    assert!(names(&root, since(-3 * 3600)).await.is_empty(), "no key was made before then");
    assert_eq!(names(&root, since(1)).await.len(), 3);
    server.create_key(named_key_request("acme", "new")).await;
    let mut found = names(&root, since(0)).await;
    found.sort();
    assert_eq!(found, ["early", "never"], "a new key is not unused");
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_that_were_made_before_an_instant_are_found() {
    let server = Server::with_accounts().await;
    numbered(&server, 3).await;
    let before =
        |seconds| pb::ListKeysRequest { created_before: Some(server.timestamp_after(seconds)), ..of_acme() };
    assert_eq!(names(&server.root_client(), before(0)).await, ["n2", "n1", "n0"]);
    assert_eq!(names(&server.root_client(), before(-2)).await, ["n0"], "before, not at");
    assert!(names(&server.root_client(), before(-3)).await.is_empty());
    let paged = pb::ListKeysRequest { page_size: Some(1), ..before(-1) };
    let first = server.root_client().list(paged.clone()).await.unwrap();
    let second = pb::ListKeysRequest { page_token: first.next_page_token, ..paged };
    assert_eq!(names(&server.root_client(), second).await, ["n0"]);
    let nonsense = prost_types::Timestamp { seconds: 0, nanos: -1 };
    let request = pb::ListKeysRequest { created_before: Some(nonsense), ..of_acme() };
    assert_invalid(server.root_client().list(request).await, &["created_before"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_looks_for_keys_to_revoke_leaves_out_those_that_are_revoked_unless_asked() {
    let server = Server::with_accounts().await;
    let root = server.root_client();
    let short =
        |name| pb::CreateKeyRequest { ttl: Some(proto_seconds(60)), ..named_key_request("acme", name) };
    let revoked = server.create_key(short("revoked")).await;
    let disabled = server.create_key(short("disabled")).await;
    server.create_key(short("active")).await;
    root.revoke(&revoked.id).await.unwrap();
    root.disable(&disabled.id).await.unwrap();
    server.advance(HOUR);
    let unused = pb::ListKeysRequest { unused_since: Some(server.timestamp_after(0)), ..of_acme() };
    let expired = pb::ListKeysRequest { expires_before: Some(server.timestamp_after(0)), ..of_acme() };
    let both = pb::ListKeysRequest { unused_since: Some(server.timestamp_after(0)), ..expired.clone() };
    for asked in [unused, expired, both] {
        let in_states = async |states: &[KeyState]| {
            let states = states.iter().map(|state| i32::from(*state)).collect();
            let mut found = names(&root, pb::ListKeysRequest { states, ..asked.clone() }).await;
            found.sort();
            found
        };
        assert_eq!(in_states(&[]).await, ["active", "disabled"]);
        assert_eq!(in_states(&[KeyState::Revoked]).await, ["revoked"]);
        let every = [KeyState::Expired, KeyState::Disabled, KeyState::Revoked];
        assert_eq!(in_states(&every).await, ["active", "disabled", "revoked"]);
    }
    assert_eq!(names(&root, of_acme()).await.len(), 3, "a plain list shows them");
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_that_expire_before_an_instant_are_found() {
    let server = Server::with_accounts().await;
    server.create_key(named_key_request("acme", "never")).await;
    for ttl in [10, 20] {
        let name = format!("in {ttl}");
        server
            .create_key(pb::CreateKeyRequest {
                ttl: Some(proto_seconds(ttl)),
                ..named_key_request("acme", &name)
            })
            .await;
    }
    let before =
        |seconds| pb::ListKeysRequest { expires_before: Some(server.timestamp_after(seconds)), ..of_acme() };
    assert!(names(&server.root_client(), before(10)).await.is_empty(), "before, not at");
    assert_eq!(names(&server.root_client(), before(11)).await, ["in 10"]);
    // Of the same instant: in either order.
    let mut both = names(&server.root_client(), before(1000)).await;
    both.sort();
    assert_eq!(both, ["in 10", "in 20"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn filters_narrow_together() {
    let server = Server::with_accounts().await;
    numbered(&server, 3).await;
    server
        .create_key(pb::CreateKeyRequest { environment: "staging".into(), ..named_key_request("acme", "n9") })
        .await;
    let request = pb::ListKeysRequest {
        environment: "production".into(),
        name_prefix: "n".into(),
        states: vec![KeyState::Active.into()],
        page_size: Some(2),
        ..of_acme()
    };
    let first = server.root_client().list(request.clone()).await.unwrap();
    assert_eq!(first.keys.len(), 2);
    let second = pb::ListKeysRequest { page_token: first.next_page_token, ..request };
    assert_eq!(names(&server.root_client(), second).await, ["n0"]);
}

/// As many scopes as a key or role can have, each as long as it can be: more than 32 KB.
fn large_scopes() -> Vec<String> {
    (0..256).map(|at| format!("{at:03}{}", "x".repeat(125))).collect()
}

/// Keys of `acme` whose records are as large as 32 KB.
async fn import_large(root: &Client, count: u8) {
    let keys = (0..count).map(|at| pb::ImportKey {
        account: "acme".into(),
        environment: "production".into(),
        scopes: large_scopes(),
        sha256: vec![at; 32],
        hint: "old_".into(),
        ..Default::default()
    });
    let request = pb::ImportKeysRequest { keys: keys.collect() };
    let results = root.keys().import(request).await.unwrap().into_inner().results;
    assert!(results.iter().all(|result| result.error.is_empty()), "{:?}", results[0]);
}

/// Reads page after page, none of which may be too large for a client. How many items each has.
async fn sizes<A: Message>(mut page: impl AsyncFnMut(String) -> (A, usize, String)) -> Vec<usize> {
    let (mut sizes, mut token) = (Vec::new(), String::new());
    loop {
        let (answer, items, next) = page(token).await;
        assert!(answer.encoded_len() <= (3 << 20) + 1024, "{}", answer.encoded_len());
        sizes.push(items);
        if next.is_empty() {
            return sizes;
        }
        token = next;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn pages_end_before_they_are_too_large_for_a_client_and_go_on_where_they_ended() {
    let server = Server::with_accounts().await;
    let root = server.root_client();
    import_large(&root, 110).await;
    let keys = sizes(async |page_token| {
        let request = pb::ListKeysRequest { page_size: Some(1000), page_token, ..of_acme() };
        let page = root.list(request).await.unwrap();
        (page.clone(), page.keys.len(), page.next_page_token)
    });
    let keys = keys.await;
    assert_eq!((keys.iter().sum::<usize>(), keys.len()), (110, 2), "{keys:?}");
    for full in [false, true] {
        let log = sizes(async |page_token| {
            let request = pb::ListAuditEntriesRequest {
                account: "acme".into(),
                action: "key.imported".into(),
                page_size: Some(1000),
                page_token,
                full,
                ..Default::default()
            };
            let page = root.audit().list(request).await.unwrap().into_inner();
            (page.clone(), page.entries.len(), page.next_page_token)
        });
        let log = log.await;
        assert_eq!(log.iter().sum::<usize>(), 110);
        assert!(log.len() > 1, "{log:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn roles_are_paged_by_number_and_by_bytes() {
    let server = Server::with_accounts().await;
    let root = server.root_client();
    for at in 0..110 {
        let account = if at % 2 == 0 { "acme".to_owned() } else { String::new() };
        let name = format!("role-{}", at / 2);
        let request = pb::PutRoleRequest { account, name, scopes: large_scopes() };
        root.accounts().put_role(request).await.unwrap();
    }
    let read = async |page_size| {
        let mut names = Vec::new();
        let sizes = sizes(async |page_token| {
            let request = pb::ListRolesRequest { account: "acme".into(), page_size, page_token };
            let page = root.accounts().list_roles(request).await.unwrap().into_inner();
            names.extend(page.roles.iter().map(|role| (role.name.clone(), role.account.clone())));
            (page.clone(), page.roles.len(), page.next_page_token)
        });
        (sizes.await, names)
    };
    let (sizes, names) = read(None).await;
    assert_eq!(sizes.len(), 2, "{sizes:?}");
    assert!(names.is_sorted() && names.iter().collect::<BTreeSet<_>>().len() == 110);
    let (sizes, again) = read(Some(50)).await;
    assert_eq!((sizes, again), (vec![50, 50, 10], names));
}
