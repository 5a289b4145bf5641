//! Lists: every filter, held against a look at each record, and pages.

use std::time::Duration;

use keyward::{
    domain::{
        key::{ApiKey, ApiKeyState, KeyOwner},
        name::{AccountId, EnvironmentName, KeyId, KeyName, UserId},
    },
    store::{KeyFilter, OwnerFilter, SecretUse, StoredKey},
};
use proptest::{prelude::*, strategy::ValueTree as _, test_runner::TestRunner};

use super::{records::for_all, *};

/// A key's place in the model: the record and its uses.
type StoredKeys = Vec<StoredKey>;

fn matches(stored: &StoredKey, filter: &KeyFilter) -> bool {
    let key = &stored.key;
    let owner = match &filter.owner {
        OwnerFilter::Account(account) => key.owner.account() == Some(account),
        OwnerFilter::User(user) => key.owner.user() == Some(user),
        OwnerFilter::ExceptOperator => key.owner.account().is_none_or(|account| !account.is_operator()),
    };
    owner
        && filter.environment.as_ref().is_none_or(|environment| key.environment == *environment)
        && (filter.states.is_empty() || filter.states.contains(&key.state(filter.now)))
        && composed(key.spec.name.as_ref().map_or("", |name| name.as_str())).starts_with(&filter.name_prefix)
        && filter.unused_since.is_none_or(|since| last_sign_of_life(stored) < since)
        && filter.created_before.is_none_or(|end| key.created_at < end)
        && filter.expires_before.is_none_or(|end| key.spec.expires_at.is_some_and(|expiry| expiry < end))
}

/// A name in the form in which prefixes are compared. Of the names here only `é` has two forms.
fn composed(name: &str) -> String {
    name.replace("e\u{301}", "é")
}

/// When a key was last used, or else created.
fn last_sign_of_life(stored: &StoredKey) -> Timestamp {
    stored.last_used.iter().map(|(_, used)| *used).fold(stored.key.created_at, Timestamp::max)
}

/// Keys that differ in what filters look at, few enough values that filters meet.
fn filterable() -> impl Strategy<Value = (ApiKey, Option<i64>)> {
    let owner = prop::sample::select(vec![
        KeyOwner::Account(account_id("acme")),
        KeyOwner::Account(account_id("globex")),
        KeyOwner::Account(AccountId::operator()),
        KeyOwner::User(UserId::parse("u1").unwrap()),
    ]);
    let environment = prop::sample::select(vec!["production", "staging"]);
    let name = prop::option::of(prop::sample::select(vec![
        "a",
        "ab",
        "A",
        "a%",
        "a_b",
        "é",
        "éa",
        "e\u{301}",
        "e\u{301}a",
        "e",
        "b",
    ]));
    let seconds = || prop::option::of(0i64..5);
    (owner, environment, name, seconds(), any::<(bool, bool)>(), (seconds(), 0i64..5)).prop_map(
        |(owner, environment, name, expires, (disabled, dead), (used, created))| {
            let mut key = ApiKey {
                owner,
                environment: EnvironmentName::parse(environment).unwrap(),
                created_at: timestamp(created),
                ..key()
            };
            // Only the start of a name is looked at; the rest keeps it from colliding.
            key.spec.name =
                name.map(|name| KeyName::from_stored(&format!("{name}{}", next_number())).unwrap());
            key.spec.expires_at = expires.map(timestamp);
            key.disabled_at = disabled.then(|| timestamp(0));
            (if dead { revoked(key, timestamp(1)) } else { key }, used)
        },
    )
}

fn filters() -> impl Strategy<Value = KeyFilter> {
    let owner = prop::sample::select(vec![
        OwnerFilter::Account(account_id("acme")),
        OwnerFilter::Account(account_id("globex")),
        OwnerFilter::Account(account_id("nobody")),
        OwnerFilter::User(UserId::parse("u1").unwrap()),
        OwnerFilter::ExceptOperator,
    ]);
    let environment = prop::option::of(prop::sample::select(vec!["production", "staging", "moon"]));
    let all = vec![ApiKeyState::Active, ApiKeyState::Disabled, ApiKeyState::Expired, ApiKeyState::Revoked];
    let states = prop::sample::subsequence(all, 0..=4);
    let prefix = prop::sample::select(vec!["", "", "a", "A", "a%", "a_", "é", "éa", "e", "zz"]);
    let seconds = || prop::option::of(0i64..6);
    (owner, environment, states, prefix, seconds(), seconds(), (seconds(), 0i64..6)).prop_map(
        |(owner, environment, states, prefix, unused_since, expires_before, (created_before, now))| {
            KeyFilter {
                owner,
                environment: environment.map(|name| EnvironmentName::parse(name).unwrap()),
                states,
                name_prefix: prefix.to_owned(),
                unused_since: unused_since.map(timestamp),
                expires_before: expires_before.map(timestamp),
                created_before: created_before.map(timestamp),
                now: timestamp(now),
            }
        },
    )
}

/// Eighty filterable keys, and what was written.
async fn modelled(store: &SharedStore) -> StoredKeys {
    with_accounts(store).await;
    commit_account(store, &account("keyward"), None).await;
    let mut runner = TestRunner::deterministic();
    let mut model = StoredKeys::new();
    for _ in 0..80 {
        let (record, used) = filterable().new_tree(&mut runner).unwrap().current();
        let key = commit_key(store, create(&record)).await;
        let last_used: Vec<_> = used.map(|seconds| (1, timestamp(seconds))).into_iter().collect();
        for (version, at) in &last_used {
            write_used_secrets(store, &[SecretUse { key_id: key.id, version: *version, at: *at }])
                .await
                .unwrap();
        }
        model.push(StoredKey { key, last_used });
    }
    model.sort_by_key(|stored| std::cmp::Reverse(stored.key.id));
    model
}

fn ids<'k>(keys: impl IntoIterator<Item = &'k StoredKey>) -> Vec<KeyId> {
    keys.into_iter().map(|stored| stored.key.id).collect()
}

pub(super) async fn every_filter_finds_what_a_look_at_each_key_finds(store: SharedStore) {
    let model = modelled(&store).await;
    for_all(400, filters(), |filter| {
        let (store, model) = (store.clone(), &model);
        async move {
            let found = store.list_keys(&filter, None, 1000).await.unwrap();
            let expected = model.iter().filter(|stored| matches(stored, &filter));
            assert_eq!(ids(&found), ids(expected), "{filter:?}");
            for stored in &found {
                let known = model.iter().find(|known| known.key.id == stored.key.id).unwrap();
                assert_eq!((&stored.key, &stored.last_used), (&known.key, &known.last_used));
            }
        }
    })
    .await;
}

pub(super) async fn pages_of_keys_join_to_the_whole_whatever_comes_between(store: SharedStore) {
    let model = modelled(&store).await;
    let filter = KeyFilter {
        states: vec![ApiKeyState::Active, ApiKeyState::Revoked],
        ..unfiltered_keys(OwnerFilter::Account(account_id("acme")))
    };
    let expected = ids(model.iter().filter(|stored| matches(stored, &filter)));
    let (mut found, mut before) = (Vec::new(), None);
    loop {
        let page = store.list_keys(&filter, before, 3).await.unwrap();
        assert!(page.len() <= 3);
        let Some(last) = page.last() else { break };
        before = Some(last.key.id);
        found.extend(ids(&page));
        // Newer than all: it belongs before the first page.
        commit_key(&store, create(&key())).await;
    }
    assert_eq!(found, expected);
}

pub(super) async fn a_page_counts_keys_and_not_their_secrets(store: SharedStore) {
    with_accounts(&store).await;
    for _ in 0..5 {
        let mut made = commit_key(&store, create(&key())).await;
        for second in 0..3 {
            made.rotate(new_digest(), String::new(), Duration::from_secs(9), timestamp(second));
            made = commit_key(&store, update(&made)).await;
        }
    }
    let page =
        store.list_keys(&unfiltered_keys(OwnerFilter::Account(account_id("acme"))), None, 3).await.unwrap();
    assert_eq!(page.len(), 3);
    assert!(page.iter().all(|stored| stored.key.secrets.len() == 2));
}

pub(super) async fn accounts_come_in_pages_in_the_order_of_their_ids(store: SharedStore) {
    for id in ["b", "a", "a-", "a_", "z", "0", "keyward"] {
        commit_account(&store, &account(id), None).await;
    }
    let (mut found, mut after) = (Vec::new(), None);
    loop {
        let page = store.list_accounts(after.as_ref(), 2).await.unwrap();
        assert!(page.len() <= 2);
        let Some(last) = page.last() else { break };
        after = Some(last.id.clone());
        found.extend(page.into_iter().map(|account| account.id.to_string()));
    }
    let mut sorted = found.clone();
    sorted.sort();
    assert_eq!(found, sorted);
    assert_eq!(found.len(), 7);
}
