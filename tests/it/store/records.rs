//! What is written reads back, whatever a record may hold.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use keyward::{
    domain::{
        account::Account,
        key::{
            ApiKey, KeyOwner, KeySecret, KeySpec, Quota, QuotaPeriod, RateLimit, Revocation, RevokeReason,
        },
        log::{GENESIS_HASH, RecordChange},
        name::{CustomerId, DisplayName, EnvironmentName, KeyName, RoleName, UserId},
        scope::Scope,
        time::{Revision, Timestamp},
    },
    store::{LogFilter, OwnerFilter, SecretUse},
};
use proptest::{prelude::*, strategy::ValueTree as _, test_runner::TestRunner};

use crate::snapshot_loader;

use super::{
    SharedStore, account, account_id, commit_account, commit_key, create, key, new_key_id, next_number,
    read_key, secret, timestamp, unfiltered_keys, update, whole_chain, with_accounts, with_roles,
    write_used_secrets,
};

fn instants() -> impl Strategy<Value = Timestamp> {
    // From the year 1 to the year 9999, as the wire has them.
    (-62_135_596_800_000_000i64..=253_402_300_799_999_999).prop_map(Timestamp::from_micros)
}

fn words<T: std::fmt::Debug + 'static>(
    pattern: &'static str,
    most: usize,
    parse: fn(&str) -> T,
) -> impl Strategy<Value = Vec<T>> {
    prop::collection::btree_set(pattern, 0..=most)
        .prop_map(move |set| set.iter().map(|word| parse(word)).collect())
}

fn nets() -> impl Strategy<Value = ipnet::IpNet> {
    let v4 = (any::<u32>(), 0u8..=32).prop_map(|(bits, length)| {
        ipnet::IpNet::new(std::net::Ipv4Addr::from_bits(bits).into(), length).unwrap().trunc()
    });
    let v6 = (any::<u128>(), 0u8..=128).prop_map(|(bits, length)| {
        ipnet::IpNet::new(std::net::Ipv6Addr::from_bits(bits).into(), length).unwrap().trunc()
    });
    prop_oneof![v4, v6]
}

fn terms() -> impl Strategy<Value = KeySpec> {
    let period = prop::sample::select(vec![
        QuotaPeriod::Hour,
        QuotaPeriod::Day,
        QuotaPeriod::Month,
        QuotaPeriod::Total,
    ]);
    let limit = ("[a-z0-9_-]{1,8}", 1u64..=1_000_000_000, 1u64..=86_400)
        .prop_map(|(name, limit, window)| RateLimit { name, limit, window: Duration::from_secs(window) });
    let lists = (
        words("agent|read-only|admin", 3, |word| RoleName::parse(word).unwrap()),
        words("[!-~]{1,12}", 3, |word| CustomerId::parse(word).unwrap()),
        prop::collection::vec(nets(), 0..3),
        prop::collection::vec(limit, 0..3),
    );
    let words = words("[A-Za-z0-9_./-]{1,6}(:[a-z]{1,6}){0,3}|[a-z]{1,4}:\\*|\\*", 4, |word| {
        Scope::parse_grant(word).unwrap()
    });
    (
        prop::option::of("[^\\p{Cc}]{1,40}"),
        words,
        prop::option::of(instants()),
        lists,
        prop::option::of(
            (1u64..=1_000_000_000_000, period).prop_map(|(limit, period)| Quota { limit, period }),
        ),
        prop::collection::btree_map(".{0,8}", ".{0,20}", 0..4),
    )
        .prop_map(
            |(name, scopes, expires_at, (roles, customers, allowed_cidrs, rate_limits), quota, metadata)| {
                KeySpec {
                    name: name.map(|name| KeyName::from_stored(&name).unwrap()),
                    scopes: scopes.into_iter().collect(),
                    roles,
                    expires_at,
                    customers,
                    allowed_cidrs,
                    rate_limits,
                    quota,
                    metadata,
                }
            },
        )
}

/// Keys of `acme`, `globex` or a user, in whatever state, with one secret or two.
pub(super) fn records() -> impl Strategy<Value = ApiKey> {
    let owner = prop_oneof![
        prop::sample::select(vec!["acme", "globex"]).prop_map(|id| KeyOwner::Account(account_id(id))),
        "[!-~]{1,20}".prop_map(|id| KeyOwner::User(UserId::parse(&id).unwrap())),
    ];
    let reason = prop::sample::select(vec![
        RevokeReason::Unspecified,
        RevokeReason::Compromised,
        RevokeReason::Superseded,
        RevokeReason::NoLongerNeeded,
        RevokeReason::OwnerLeft,
    ]);
    let revocation =
        (instants(), reason, ".{0,20}").prop_map(|(at, reason, comment)| Revocation { at, reason, comment });
    let times = (instants(), instants(), prop::option::of(instants()));
    let environment = "[a-z0-9_-]{1,32}".prop_map(|name| EnvironmentName::parse(&name).unwrap());
    (
        (owner, environment, terms()),
        times,
        prop::option::of(revocation),
        (prop::option::of(instants()), "[!-~]{0,20}", "[!-~]{0,20}"),
    )
        .prop_map(|((owner, environment, terms), times, revocation, (before, hint, created_by))| {
            let (created_at, updated_at, disabled_at) = times;
            let mut secrets = vec![KeySecret { hint, ..secret(1, created_at) }];
            if let Some(end) = before {
                secrets[0].expires_at = Some(end);
                secrets.insert(0, secret(2, updated_at));
            }
            ApiKey {
                id: new_key_id(timestamp(0)),
                owner,
                environment,
                spec: terms,
                created_at,
                created_by,
                updated_at,
                disabled_at,
                revocation,
                secrets,
                revision: Revision::default(),
            }
        })
}

/// Runs `check` on `cases` generated values; a failure names the value. The store outlives each case.
pub(super) async fn for_all<T: Clone + std::fmt::Debug, F: Future<Output = ()>>(
    cases: usize,
    strategy: impl Strategy<Value = T>,
    mut check: impl FnMut(T) -> F,
) {
    let mut runner = TestRunner::deterministic();
    for _ in 0..cases {
        check(strategy.new_tree(&mut runner).unwrap().current()).await;
    }
}

pub(super) async fn a_new_store_is_empty(store: SharedStore) {
    assert_eq!(whole_chain(&store).await, []);
    assert_eq!(store.log_head().await.unwrap().hash, GENESIS_HASH);
    assert!(read_key(&store, new_key_id(timestamp(0))).await.is_none());
    assert!(store.get_account(&account_id("acme")).await.unwrap().is_none());
}

pub(super) async fn every_field_of_a_key_reads_back(store: SharedStore) {
    with_accounts(&store).await;
    with_roles(&store).await;
    for_all(200, (records(), terms()), |(record, later)| {
        let store = store.clone();
        async move {
            let mut record = record;
            // Names are another test's: here none may collide.
            if let Some(name) = &mut record.spec.name {
                *name = KeyName::from_stored(&format!("{name} {}", next_number())).unwrap();
            }
            let made = commit_key(&store, create(&record)).await;
            assert_eq!(ApiKey { revision: Revision(0), ..made.clone() }, record);
            assert_eq!(read_key(&store, made.id).await.as_ref(), Some(&made));
            let mut changed = made;
            changed.spec = KeySpec { name: changed.spec.name.clone(), ..later };
            let changed = commit_key(&store, update(&changed)).await;
            assert_eq!(read_key(&store, changed.id).await, Some(changed));
        }
    })
    .await;
}

pub(super) async fn every_field_of_an_account_reads_back(store: SharedStore) {
    let made = commit_account(&store, &account("acme"), None).await;
    assert_eq!(made.revision, Revision(1));
    assert_eq!(store.get_account(&made.id).await.unwrap().as_ref(), Some(&made));
    let changed = Account {
        name: DisplayName::parse("Äcme \u{1f680}").unwrap(),
        suspended_at: Some(timestamp(5)),
        longest_life: Some(Duration::from_micros(1_234_567)),
        updated_at: timestamp(6),
        ..made.clone()
    };
    let changed = commit_account(&store, &changed, Some(made.revision)).await;
    assert_eq!(changed.revision, Revision(2));
    assert_eq!(store.get_account(&made.id).await.unwrap(), Some(changed));
}

pub(super) async fn a_closed_store_fails_and_says_so(store: SharedStore) {
    with_accounts(&store).await;
    let made = commit_key(&store, create(&key())).await;
    store.close().await;
    assert!(store.log_head().await.is_err());
    assert!(store.get_key(made.id).await.is_err());
    assert!(store.get_account(&account_id("acme")).await.is_err());
    assert!(store.list_accounts(None, 1).await.is_err());
    assert!(
        store.list_keys(&unfiltered_keys(OwnerFilter::Account(account_id("acme"))), None, 1).await.is_err()
    );
    assert!(store.list_log_after(Revision(0), 1).await.is_err());
    assert!(store.list_log(&LogFilter::default(), None, 1).await.is_err());
    assert!(snapshot_loader::load_snapshot(&store, timestamp(0)).await.is_err());
    assert!(store.commit(&[create(&key())]).await.is_err(), "what is closed takes no change");
    let used = SecretUse { key_id: made.id, version: 1, at: timestamp(0) };
    assert!(write_used_secrets(&store, &[used]).await.is_err());
}

/// Text in which any character may stand, zero too, which some databases cannot keep in text.
pub(super) async fn what_people_wrote_reads_back_whatever_it_is(store: SharedStore) {
    with_accounts(&store).await;
    let odd = "a\0b \u{1} \u{7f} \n\t\\ ' \" $1 ? % _ \u{202e} \u{1f680} \u{10ffff}";
    let mut made = commit_key(&store, create(&key())).await;
    made.spec.metadata = BTreeMap::from([(odd.to_owned(), odd.to_owned())]);
    made.revocation =
        Some(Revocation { at: timestamp(1), reason: RevokeReason::Compromised, comment: odd.to_owned() });
    let made = commit_key(&store, update(&made)).await;
    assert_eq!(read_key(&store, made.id).await.as_ref(), Some(&made));
    let payload = whole_chain(&store).await.pop().unwrap().payload;
    assert_eq!(serde_json::from_str::<RecordChange>(&payload).unwrap(), RecordChange::Key(Arc::new(made)));
}
