//! The contract of a store, as every backend must keep it: each promise is written once, against `dyn Store`, and
//! stamped for each backend at the end of the file.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use keyward::{
    domain::{
        account::{Account, Role},
        key::{Key, Owner, Quota, QuotaPeriod, RateLimit, Revocation, RevokeReason, Secret, State, Terms},
        log::{Action, Actor, Change, GENESIS, LogRow},
        name::{
            AccountId, CustomerId, DisplayName, EnvironmentName, IdempotencyKey, KeyId, KeyName, RoleName,
            UserId,
        },
        scope::Scope,
        time::{Revision, Timestamp},
        token::Digest,
    },
    store::{
        Head, IDEMPOTENCY_WINDOW, Idempotency, KeyFilter, LogFilter, Outcome, OwnerFilter, Rejection,
        SnapshotItem, Store, StoreError, StoredKey, UsageBatch, UsedSecret, Write,
        writer::{Follower, WriteError, Writer},
    },
};
use proptest::{prelude::*, strategy::ValueTree as _, test_runner::TestRunner};

type Shared = Arc<dyn Store>;

/// The present of these tests.
const NOW: i64 = 1_800_000_000;

fn at(seconds: i64) -> Timestamp {
    Timestamp::from_micros((NOW + seconds) * 1_000_000)
}

fn account_id(id: &str) -> AccountId {
    AccountId::parse(id).unwrap()
}

/// A number that no other call of this process gets.
fn fresh() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

fn fresh_digest() -> Digest {
    Digest::of(&format!("token {}", fresh()))
}

fn fresh_id(created: Timestamp) -> KeyId {
    let mut random = [0; 10];
    random[2..].copy_from_slice(&fresh().to_be_bytes());
    KeyId::generate(created, random)
}

fn secret(version: u32, created: Timestamp) -> Secret {
    Secret {
        version,
        digest: fresh_digest(),
        hint: format!("kw_live_{version:04}"),
        created_at: created,
        expires_at: None,
    }
}

/// A key of `acme` that no other is like.
fn key() -> Key {
    let created = at(0);
    Key {
        id: fresh_id(created),
        owner: Owner::Account(account_id("acme")),
        environment: EnvironmentName::parse("production").unwrap(),
        terms: Terms {
            name: None,
            scopes: [Scope::parse_grant("monitors:read").unwrap()].into_iter().collect(),
            roles: vec![],
            expires_at: None,
            customers: vec![],
            allowed_cidrs: vec![],
            rate_limits: vec![],
            quota: None,
            metadata: BTreeMap::new(),
        },
        created_at: created,
        created_by: "system".to_owned(),
        updated_at: created,
        disabled_at: None,
        revocation: None,
        secrets: vec![secret(1, created)],
        revision: Revision::default(),
    }
}

fn named(name: &str) -> Key {
    let mut key = key();
    key.terms.name = Some(KeyName::parse(name).unwrap());
    key
}

fn revoked(mut key: Key, when: Timestamp) -> Key {
    key.revocation = Some(Revocation {
        at: when,
        reason: RevokeReason::Compromised,
        comment: "on a paste site".to_owned(),
    });
    key
}

fn account(id: &str) -> Account {
    Account {
        id: account_id(id),
        name: DisplayName::parse(&format!("{id} Inc")).unwrap(),
        suspended_at: None,
        longest_life: None,
        created_at: at(0),
        updated_at: at(0),
        revision: Revision::default(),
    }
}

fn write(change: Change, expect: Option<Revision>, action: Action) -> Write {
    Write { change, expect, action, actor: Actor::SYSTEM, method: "test", at: at(0), idempotency: None }
}

fn create(key: &Key) -> Write {
    write(Change::Key(Arc::new(key.clone())), None, Action::KeyCreated)
}

/// Replaces the record that stands at `key`'s revision.
fn update(key: &Key) -> Write {
    write(Change::Key(Arc::new(key.clone())), Some(key.revision), Action::KeyUpdated)
}

fn create_account(account: &Account) -> Write {
    write(Change::Account(Arc::new(account.clone())), None, Action::AccountCreated)
}

async fn try_one(store: &Shared, write: Write) -> Result<Outcome, Rejection> {
    let committed = store.commit(&[write]).await.unwrap();
    let [outcome] = <[_; 1]>::try_from(committed.outcomes).unwrap();
    outcome
}

/// Commits a key's write: the key as it is recorded.
async fn put(store: &Shared, write: Write) -> Key {
    match try_one(store, write).await.unwrap() {
        Outcome::Applied(Change::Key(key)) => Arc::unwrap_or_clone(key),
        other => panic!("{other:?}"),
    }
}

async fn put_account(store: &Shared, account: &Account, expect: Option<Revision>) -> Account {
    let write = write(Change::Account(Arc::new(account.clone())), expect, Action::AccountUpdated);
    match try_one(store, write).await.unwrap() {
        Outcome::Applied(Change::Account(account)) => Arc::unwrap_or_clone(account),
        other => panic!("{other:?}"),
    }
}

/// The accounts that keys of these tests belong to.
async fn with_accounts(store: &Shared) {
    for id in ["acme", "globex"] {
        put_account(store, &account(id), None).await;
    }
}

/// The roles that generated records have.
async fn with_roles(store: &Shared) {
    for name in ["agent", "read-only", "admin"] {
        let role = Role {
            account: None,
            name: RoleName::parse(name).unwrap(),
            scopes: [Scope::parse_grant("monitors:*").unwrap()].into_iter().collect(),
            revision: Revision::default(),
        };
        try_one(store, write(Change::Role(Arc::new(role)), None, Action::RolePut)).await.unwrap();
    }
}

async fn read(store: &Shared, id: KeyId) -> Option<Key> {
    store.key(id).await.unwrap().map(|stored| stored.key)
}

async fn note_used(store: &Shared, used: &[UsedSecret]) -> Result<(), StoreError> {
    store.note_usage(&UsageBatch { used: used.to_vec(), ..UsageBatch::default() }).await
}

fn everything(owner: OwnerFilter) -> KeyFilter {
    KeyFilter {
        owner,
        environment: None,
        states: vec![],
        name_prefix: String::new(),
        unused_since: None,
        expires_before: None,
        created_before: None,
        now: at(0),
    }
}

async fn whole_log(store: &Shared) -> Vec<LogRow> {
    store.log_after(Revision(0), u32::MAX).await.unwrap()
}

/// Sees that the log is one chain that ends at the head, and returns it.
async fn whole_chain(store: &Shared) -> Vec<LogRow> {
    let rows = whole_log(store).await;
    let mut last = Head { revision: Revision(0), hash: GENESIS };
    for row in &rows {
        assert!(row.follows(last.revision, &last.hash), "{row:?} does not follow {last:?}");
        last = Head { revision: row.revision, hash: row.hash };
    }
    assert_eq!(store.head().await.unwrap(), last);
    rows
}

// What records may hold. -----------------------------------------------------------------------------------------

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

fn terms() -> impl Strategy<Value = Terms> {
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
    let words = words("[A-Za-z0-9_.-]{1,6}(:[a-z]{1,6}){0,3}|[a-z]{1,4}:\\*|\\*", 4, |word| {
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
                Terms {
                    name: name.map(|name| KeyName::parse(&name).unwrap()),
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
fn records() -> impl Strategy<Value = Key> {
    let owner = prop_oneof![
        prop::sample::select(vec!["acme", "globex"]).prop_map(|id| Owner::Account(account_id(id))),
        "[!-~]{1,20}".prop_map(|id| Owner::User(UserId::parse(&id).unwrap())),
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
            let mut secrets = vec![Secret { hint, ..secret(1, created_at) }];
            if let Some(end) = before {
                secrets[0].expires_at = Some(end);
                secrets.insert(0, secret(2, updated_at));
            }
            Key {
                id: fresh_id(at(0)),
                owner,
                environment,
                terms,
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
async fn for_all<T: Clone + std::fmt::Debug, F: Future<Output = ()>>(
    cases: usize,
    strategy: impl Strategy<Value = T>,
    mut check: impl FnMut(T) -> F,
) {
    let mut runner = TestRunner::deterministic();
    for _ in 0..cases {
        check(strategy.new_tree(&mut runner).unwrap().current()).await;
    }
}

// The promises. ----------------------------------------------------------------------------------------------------

async fn a_new_store_is_empty(store: Shared) {
    assert_eq!(whole_chain(&store).await, []);
    assert_eq!(store.head().await.unwrap().hash, GENESIS);
    assert!(read(&store, fresh_id(at(0))).await.is_none());
    assert!(store.account(&account_id("acme")).await.unwrap().is_none());
}

async fn every_field_of_a_key_reads_back(store: Shared) {
    with_accounts(&store).await;
    with_roles(&store).await;
    for_all(200, (records(), terms()), |(record, later)| {
        let store = store.clone();
        async move {
            let mut record = record;
            // Names are another test's: here none may collide.
            if let Some(name) = &mut record.terms.name {
                *name = KeyName::parse(&format!("{name} {}", fresh())).unwrap();
            }
            let made = put(&store, create(&record)).await;
            assert_eq!(Key { revision: Revision(0), ..made.clone() }, record);
            assert_eq!(read(&store, made.id).await.as_ref(), Some(&made));
            let mut changed = made;
            changed.terms = Terms { name: changed.terms.name.clone(), ..later };
            let changed = put(&store, update(&changed)).await;
            assert_eq!(read(&store, changed.id).await, Some(changed));
        }
    })
    .await;
}

async fn every_field_of_an_account_reads_back(store: Shared) {
    let made = put_account(&store, &account("acme"), None).await;
    assert_eq!(made.revision, Revision(1));
    assert_eq!(store.account(&made.id).await.unwrap().as_ref(), Some(&made));
    let changed = Account {
        name: DisplayName::parse("Äcme \u{1f680}").unwrap(),
        suspended_at: Some(at(5)),
        updated_at: at(6),
        ..made.clone()
    };
    let changed = put_account(&store, &changed, Some(made.revision)).await;
    assert_eq!(changed.revision, Revision(2));
    assert_eq!(store.account(&made.id).await.unwrap(), Some(changed));
}

async fn a_change_from_another_revision_than_the_records_is_a_conflict(store: Shared) {
    with_accounts(&store).await;
    let made = put(&store, create(&key())).await;
    let newer = put(&store, update(&made)).await;
    for stale in [
        update(&made),
        create(&newer),
        update(&Key { revision: Revision(99), ..newer.clone() }),
        update(&Key { revision: Revision(1), ..key() }),
        create_account(&account("acme")),
        write(Change::Account(Arc::new(account("initech"))), Some(Revision(1)), Action::AccountUpdated),
    ] {
        let said = format!("{stale:?}");
        assert_eq!(try_one(&store, stale).await.unwrap_err(), Rejection::Conflict, "{said}");
    }
    assert_eq!(read(&store, newer.id).await, Some(newer));
    assert_eq!(store.head().await.unwrap().revision, Revision(4), "nothing was recorded");
}

async fn a_name_is_its_keys_until_that_is_revoked(store: Shared) {
    with_accounts(&store).await;
    let first = put(&store, create(&named("deploy"))).await;
    assert_eq!(try_one(&store, create(&named("deploy"))).await.unwrap_err(), Rejection::NameTaken);
    put(&store, create(&named("Deploy"))).await;

    let second = put(&store, create(&named("other"))).await;
    let mut renamed = second.clone();
    renamed.terms.name.clone_from(&first.terms.name);
    assert_eq!(try_one(&store, update(&renamed)).await.unwrap_err(), Rejection::NameTaken);

    put(&store, update(&revoked(first, at(1)))).await;
    let renamed = put(&store, update(&renamed)).await;
    assert_eq!(read(&store, second.id).await, Some(renamed));
    // Several revoked ones may have had the name.
    let third = put(&store, create(&named("third"))).await;
    let mut third = revoked(third, at(2));
    third.terms.name = Some(KeyName::parse("deploy").unwrap());
    put(&store, update(&third)).await;
}

async fn a_name_is_free_in_another_account_and_for_a_user(store: Shared) {
    with_accounts(&store).await;
    let owners = [
        Owner::Account(account_id("acme")),
        Owner::Account(account_id("globex")),
        Owner::User(UserId::parse("acme").unwrap()),
        Owner::User(UserId::parse("u2").unwrap()),
    ];
    for owner in &owners {
        put(&store, create(&Key { owner: owner.clone(), ..named("deploy") })).await;
    }
    for owner in owners {
        let again = create(&Key { owner, ..named("deploy") });
        assert_eq!(try_one(&store, again).await.unwrap_err(), Rejection::NameTaken);
    }
}

async fn keys_without_a_name_do_not_collide(store: Shared) {
    with_accounts(&store).await;
    put(&store, create(&key())).await;
    put(&store, create(&key())).await;
}

async fn a_digest_is_unique_for_ever(store: Shared) {
    with_accounts(&store).await;
    let first = put(&store, create(&key())).await;
    let digest = first.secrets[0].digest;
    let with_digest = |owner: &Owner| {
        let mut other = Key { owner: owner.clone(), ..key() };
        other.secrets[0].digest = digest;
        create(&other)
    };
    let globex = Owner::Account(account_id("globex"));
    let user = Owner::User(UserId::parse("u1").unwrap());
    let refused = async |when: &str| {
        for owner in [&first.owner, &globex, &user] {
            assert_eq!(
                try_one(&store, with_digest(owner)).await.unwrap_err(),
                Rejection::DigestTaken,
                "{when}"
            );
        }
    };
    refused("alive").await;
    let mut rotated = first.clone();
    for _ in 0..2 {
        rotated.rotate(fresh_digest(), String::new(), Duration::ZERO, at(1));
        rotated = put(&store, update(&rotated)).await;
    }
    refused("superseded and out of the record").await;
    put(&store, update(&revoked(rotated.clone(), at(2)))).await;
    refused("revoked").await;

    let mut other = put(&store, create(&key())).await;
    other.rotate(digest, String::new(), Duration::ZERO, at(3));
    assert_eq!(try_one(&store, update(&other)).await.unwrap_err(), Rejection::DigestTaken, "by rotation");
}

async fn a_secret_of_the_keys_own_past_is_taken_too(store: Shared) {
    with_accounts(&store).await;
    let mut rotated = put(&store, create(&key())).await;
    let first = rotated.secrets[0].digest;
    rotated.rotate(fresh_digest(), String::new(), Duration::ZERO, at(1));
    let mut rotated = put(&store, update(&rotated)).await;
    rotated.rotate(first, String::new(), Duration::ZERO, at(2));
    assert_eq!(try_one(&store, update(&rotated)).await.unwrap_err(), Rejection::DigestTaken);
}

/// A write under an idempotency key, at `seconds`.
fn once(key: &Key, caller: KeyId, name: &str, fingerprint: u8, seconds: i64) -> Write {
    Write {
        at: at(seconds),
        idempotency: Some(Idempotency {
            caller,
            key: IdempotencyKey::parse(name).unwrap(),
            fingerprint: [fingerprint; 32],
        }),
        ..create(key)
    }
}

async fn the_same_request_is_done_once(store: Shared) {
    with_accounts(&store).await;
    let (caller, other) = (fresh_id(at(0)), fresh_id(at(0)));
    let made = put(&store, once(&key(), caller, "a", 1, 0)).await;
    let head = store.head().await.unwrap();
    match try_one(&store, once(&key(), caller, "a", 1, 1)).await {
        Ok(Outcome::Replayed(id)) => assert_eq!(id, made.id),
        outcome => panic!("{outcome:?}"),
    }
    assert_eq!(
        try_one(&store, once(&key(), caller, "a", 2, 1)).await.unwrap_err(),
        Rejection::IdempotencyReused
    );
    assert_eq!(store.head().await.unwrap(), head, "nothing was recorded");

    let name = IdempotencyKey::parse("a").unwrap();
    let found = store.idempotent(caller, &name, at(0)).await.unwrap();
    assert_eq!(found, Some((made.id, [1; 32])));
    assert_eq!(store.idempotent(caller, &name, at(1)).await.unwrap(), None, "made before");
    assert_eq!(store.idempotent(other, &name, at(0)).await.unwrap(), None);
    // Another caller's, and another name.
    put(&store, once(&key(), other, "a", 2, 1)).await;
    put(&store, once(&key(), caller, "b", 2, 1)).await;
}

async fn an_idempotency_key_counts_for_24_hours(store: Shared) {
    with_accounts(&store).await;
    let caller = fresh_id(at(0));
    let day = i64::try_from(IDEMPOTENCY_WINDOW.as_secs()).unwrap();
    let first = put(&store, once(&key(), caller, "a", 1, 0)).await;
    match try_one(&store, once(&key(), caller, "a", 1, day)).await {
        Ok(Outcome::Replayed(id)) => assert_eq!(id, first.id),
        outcome => panic!("{outcome:?}"),
    }
    let second = put(&store, once(&key(), caller, "a", 2, day + 1)).await;
    let found = store.idempotent(caller, &IdempotencyKey::parse("a").unwrap(), at(0)).await.unwrap();
    assert_eq!(found, Some((second.id, [2; 32])));
}

async fn the_same_request_twice_in_a_batch_is_done_once(store: Shared) {
    with_accounts(&store).await;
    let caller = fresh_id(at(0));
    let (first, second) = (key(), key());
    let batch = [once(&first, caller, "a", 1, 0), once(&second, caller, "a", 1, 0)];
    let committed = store.commit(&batch).await.unwrap();
    assert!(
        matches!(committed.outcomes[..], [Ok(Outcome::Applied(_)), Ok(Outcome::Replayed(id))] if id == first.id)
    );
    assert!(read(&store, second.id).await.is_none());
}

async fn a_rejected_write_leaves_its_batch_alone(store: Shared) {
    with_accounts(&store).await;
    let made = put(&store, create(&named("taken"))).await;
    let (good, last) = (key(), key());
    let twin = Key { id: fresh_id(at(0)), ..good.clone() };
    let batch = [
        create(&good),
        create(&named("taken")),
        create(&twin),
        create(&made),
        create_account(&account("acme")),
        create_account(&account("initech")),
        create(&last),
        create(&last),
    ];
    let committed = store.commit(&batch).await.unwrap();
    let outcomes: Vec<_> = committed.outcomes.iter().map(|outcome| outcome.as_ref().err().copied()).collect();
    assert_eq!(
        outcomes,
        [
            None,
            Some(Rejection::NameTaken),
            Some(Rejection::DigestTaken),
            Some(Rejection::Conflict),
            Some(Rejection::Conflict),
            None,
            None,
            Some(Rejection::Conflict)
        ]
    );
    let revisions: Vec<_> = committed.rows.iter().map(|(row, _)| row.revision.0).collect();
    assert_eq!(revisions, [4, 5, 6], "without gaps");
    for (row, change) in &committed.rows {
        assert_eq!(serde_json::from_str::<Change>(&row.payload).unwrap(), *change);
    }
    for id in [good.id, last.id] {
        assert!(read(&store, id).await.is_some());
    }
    assert!(read(&store, twin.id).await.is_none());
    let rows: Vec<_> = committed.rows.into_iter().map(|(row, _)| row).collect();
    assert_eq!(whole_chain(&store).await[3..], rows);
}

async fn a_batch_of_rejections_records_nothing(store: Shared) {
    with_accounts(&store).await;
    let head = store.head().await.unwrap();
    let committed = store.commit(&[create_account(&account("acme"))]).await.unwrap();
    assert!(committed.rows.is_empty());
    assert!(store.commit(&[]).await.unwrap().outcomes.is_empty());
    assert_eq!(store.head().await.unwrap(), head);
}

async fn the_log_says_who_did_what_and_holds_the_record(store: Shared) {
    with_accounts(&store).await;
    let actor = fresh_id(at(0));
    let record = named("first");
    let made = put(
        &store,
        Write {
            actor: Actor { key: Some(actor), account: Some(account_id("globex")), acting_user: None },
            method: "keyward.v1.KeyService/Create",
            at: at(7),
            ..create(&record)
        },
    )
    .await;
    let row = whole_chain(&store).await.pop().unwrap();
    assert_eq!((row.revision, row.at, &*row.action), (made.revision, at(7), "key.created"));
    assert_eq!((row.account, row.key_id, row.user), (Some(account_id("acme")), Some(made.id), None));
    assert_eq!((row.actor, row.actor_account), (actor.to_string(), Some(account_id("globex"))));
    assert_eq!(row.method, "keyward.v1.KeyService/Create");
    assert_eq!(serde_json::from_str::<Change>(&row.payload).unwrap(), Change::Key(Arc::new(made)));
}

/// Notes what a writer tells its follower.
#[derive(Default)]
struct Heard {
    revision: AtomicU64,
    changes: Mutex<Vec<(Revision, Change)>>,
}

impl Follower for Heard {
    fn revision(&self) -> Revision {
        Revision(self.revision.load(Ordering::SeqCst))
    }

    fn applied(&self, rows: &[(LogRow, Change)]) {
        for (row, change) in rows {
            let before = self.revision.swap(row.revision.0, Ordering::SeqCst);
            assert_eq!(row.revision.0, before + 1, "in order, without gaps");
            self.changes.lock().unwrap().push((row.revision, change.clone()));
        }
    }

    fn in_doubt(&self, change: &Change) {
        panic!("nothing is in doubt: {change:?}");
    }

    fn decided(&self) {}
}

async fn revisions_count_in_commit_order_under_overlapping_writers(store: Shared) {
    const WRITERS: usize = 300;
    let heard = Arc::new(Heard::default());
    let (writer, task) = Writer::spawn(store.clone(), heard.clone());
    writer.write(create_account(&account("acme"))).await.unwrap();
    let writes = (0..WRITERS).map(|at| {
        let (writer, heard) = (writer.clone(), heard.clone());
        // One in three asks for a name that is taken already.
        let key = if at % 3 == 0 { named("the one") } else { key() };
        tokio::spawn(async move {
            let outcome = writer.write(create(&key)).await;
            if let Ok(Outcome::Applied(Change::Key(made))) = &outcome {
                assert!(heard.revision() >= made.revision, "the follower knew before the caller");
            }
            outcome
        })
    });
    let (mut revisions, mut refused) = (BTreeSet::from([1]), 0);
    for write in writes.collect::<Vec<_>>() {
        match write.await.unwrap() {
            Ok(Outcome::Applied(Change::Key(made))) => assert!(revisions.insert(made.revision.0)),
            Err(WriteError::Rejected(Rejection::NameTaken)) => refused += 1,
            outcome => panic!("{outcome:?}"),
        }
    }
    assert_eq!(refused, WRITERS / 3 - 1);
    assert!(revisions.iter().copied().eq(1..=revisions.len() as u64), "gaps: {revisions:?}");
    drop(writer);
    task.await.unwrap();
    let log = whole_chain(&store).await;
    let heard = std::mem::take(&mut *heard.changes.lock().unwrap());
    assert_eq!(heard.len(), log.len());
    for (row, (revision, change)) in log.iter().zip(heard) {
        assert_eq!((row.revision, serde_json::from_str::<Change>(&row.payload).unwrap()), (revision, change));
    }
}

async fn of_changes_from_one_revision_one_is_made(store: Shared) {
    with_accounts(&store).await;
    let made = put(&store, create(&key())).await;
    let heard = Heard::default();
    heard.revision.store(store.head().await.unwrap().revision.0, Ordering::SeqCst);
    let (writer, _task) = Writer::spawn(store.clone(), Arc::new(heard));
    let changes = (0..20).map(|_| {
        let (writer, write) = (writer.clone(), update(&made));
        tokio::spawn(async move { writer.write(write).await })
    });
    let mut done = 0;
    for change in changes.collect::<Vec<_>>() {
        match change.await.unwrap() {
            Ok(_) => done += 1,
            Err(error) => assert!(matches!(error, WriteError::Rejected(Rejection::Conflict)), "{error}"),
        }
    }
    assert_eq!(done, 1);
}

async fn the_log_is_read_in_pages(store: Shared) {
    with_accounts(&store).await;
    for _ in 0..8 {
        put(&store, create(&key())).await;
    }
    let whole = whole_log(&store).await;
    assert_eq!(whole.len(), 10);
    let mut paged = Vec::new();
    while let Some(page) = Some(store.log_after(Revision(paged.len() as u64), 3).await.unwrap()) {
        assert!(page.len() <= 3);
        if page.is_empty() {
            break;
        }
        paged.extend(page);
    }
    assert_eq!(paged, whole);
    assert_eq!(store.log_after(Revision(10), 3).await.unwrap(), []);
    assert_eq!(store.log_after(Revision(99), 3).await.unwrap(), []);
}

async fn snapshot(store: &Shared, forget_before: Timestamp) -> (Head, Vec<Account>, Vec<(Key, Vec<Secret>)>) {
    let (mut accounts, mut keys) = (Vec::new(), Vec::new());
    let head = store
        .snapshot(forget_before, &mut |item| match item {
            SnapshotItem::Account(account) => {
                accounts.push(account);
            }
            SnapshotItem::Key(key, left) => keys.push((Arc::unwrap_or_clone(key), left)),
            _ => {}
        })
        .await
        .unwrap();
    accounts.sort_by(|a, b| a.id.cmp(&b.id));
    keys.sort_by_key(|(key, _)| key.id);
    (head, accounts, keys)
}

async fn a_snapshot_holds_everything_that_was_written(store: Shared) {
    with_roles(&store).await;
    let accounts = [
        put_account(&store, &account("acme"), None).await,
        put_account(&store, &Account { suspended_at: Some(at(1)), ..account("globex") }, None).await,
    ];
    let mut expected = Vec::new();
    let mut runner = TestRunner::deterministic();
    for count in 0..40 {
        let mut record = records().new_tree(&mut runner).unwrap().current();
        record.terms.name = None;
        record.revocation = None;
        let mut record = put(&store, create(&record)).await;
        let mut left = Vec::new();
        // Some are rotated, often enough that secrets leave the record.
        for turn in 0..count % 4 {
            let before = record.secrets.clone();
            record.rotate(fresh_digest(), format!("hint {turn}"), Duration::from_secs(100), at(turn));
            record = put(&store, update(&record)).await;
            for mut gone in
                before.into_iter().filter(|old| record.secrets.iter().all(|kept| kept.version != old.version))
            {
                // It ended, at the latest, when the one after the next was made.
                gone.expires_at = Some(gone.expires_at.map_or(at(turn), |end| end.min(at(turn))));
                left.insert(0, gone);
            }
        }
        expected.push((record, left));
    }
    expected.sort_by_key(|(key, _)| key.id);
    let (head, found_accounts, found) = snapshot(&store, Timestamp::from_micros(i64::MIN)).await;
    assert_eq!(head, store.head().await.unwrap());
    assert_eq!(found_accounts, accounts);
    assert_eq!(found.len(), expected.len());
    for (found, expected) in found.iter().zip(&expected) {
        assert_eq!(found, expected);
    }
}

async fn a_snapshot_leaves_out_what_is_dead_for_too_long(store: Shared) {
    with_accounts(&store).await;
    let alive = put(&store, create(&key())).await;
    let fresh = put(&store, create(&revoked(key(), at(10)))).await;
    put(&store, create(&revoked(key(), at(9)))).await;
    let mut rotated = put(&store, create(&key())).await;
    for second in [5, 9, 11, 20] {
        rotated.rotate(fresh_digest(), String::new(), Duration::ZERO, at(second));
        rotated = put(&store, update(&rotated)).await;
    }
    let (_, _, found) = snapshot(&store, at(10)).await;
    let ids: BTreeSet<_> = found.iter().map(|(key, _)| key.id).collect();
    assert_eq!(ids, BTreeSet::from([alive.id, fresh.id, rotated.id]));
    let (_, left) = found.iter().find(|(key, _)| key.id == rotated.id).unwrap();
    let versions: Vec<_> = left.iter().map(|secret| secret.version).collect();
    assert_eq!(versions, [3], "1 and 2 ended at 5 and 9; 4 and 5 are in the record");
}

/// A key's place in the model: the record and its uses.
type Model = Vec<StoredKey>;

fn matches(stored: &StoredKey, filter: &KeyFilter) -> bool {
    let key = &stored.key;
    let owner = match &filter.owner {
        OwnerFilter::Account(account) => key.owner.account() == Some(account),
        OwnerFilter::User(user) => key.owner.user() == Some(user),
        OwnerFilter::AllButOperators => key.owner.account().is_none_or(|account| !account.is_operator()),
    };
    owner
        && filter.environment.as_ref().is_none_or(|environment| key.environment == *environment)
        && (filter.states.is_empty() || filter.states.contains(&key.state(filter.now)))
        && key.terms.name.as_ref().map_or("", |name| name.as_str()).starts_with(&filter.name_prefix)
        && filter.unused_since.is_none_or(|since| stored.last_used.iter().all(|(_, used)| *used < since))
        && filter.created_before.is_none_or(|end| key.created_at < end)
        && filter.expires_before.is_none_or(|end| key.terms.expires_at.is_some_and(|expiry| expiry < end))
}

/// Keys that differ in what filters look at, few enough values that filters meet.
fn filterable() -> impl Strategy<Value = (Key, Option<i64>)> {
    let owner = prop::sample::select(vec![
        Owner::Account(account_id("acme")),
        Owner::Account(account_id("globex")),
        Owner::Account(AccountId::operator()),
        Owner::User(UserId::parse("u1").unwrap()),
    ]);
    let environment = prop::sample::select(vec!["production", "staging"]);
    let name = prop::option::of(prop::sample::select(vec!["a", "ab", "A", "a%", "a_b", "é", "éa", "b"]));
    let seconds = || prop::option::of(0i64..5);
    (owner, environment, name, seconds(), any::<(bool, bool)>(), (seconds(), 0i64..5)).prop_map(
        |(owner, environment, name, expires, (disabled, dead), (used, created))| {
            let mut key = Key {
                owner,
                environment: EnvironmentName::parse(environment).unwrap(),
                created_at: at(created),
                ..key()
            };
            // Only the start of a name is looked at; the rest keeps it from colliding.
            key.terms.name = name.map(|name| KeyName::parse(&format!("{name}{}", fresh())).unwrap());
            key.terms.expires_at = expires.map(at);
            key.disabled_at = disabled.then(|| at(0));
            (if dead { revoked(key, at(1)) } else { key }, used)
        },
    )
}

fn filters() -> impl Strategy<Value = KeyFilter> {
    let owner = prop::sample::select(vec![
        OwnerFilter::Account(account_id("acme")),
        OwnerFilter::Account(account_id("globex")),
        OwnerFilter::Account(account_id("nobody")),
        OwnerFilter::User(UserId::parse("u1").unwrap()),
        OwnerFilter::AllButOperators,
    ]);
    let environment = prop::option::of(prop::sample::select(vec!["production", "staging", "moon"]));
    let all = vec![State::Active, State::Disabled, State::Expired, State::Revoked];
    let states = prop::sample::subsequence(all, 0..=4);
    let prefix = prop::sample::select(vec!["", "", "a", "A", "a%", "a_", "é", "zz"]);
    let seconds = || prop::option::of(0i64..6);
    (owner, environment, states, prefix, seconds(), seconds(), (seconds(), 0i64..6)).prop_map(
        |(owner, environment, states, prefix, unused_since, expires_before, (created_before, now))| {
            KeyFilter {
                owner,
                environment: environment.map(|name| EnvironmentName::parse(name).unwrap()),
                states,
                name_prefix: prefix.to_owned(),
                unused_since: unused_since.map(at),
                expires_before: expires_before.map(at),
                created_before: created_before.map(at),
                now: at(now),
            }
        },
    )
}

/// Eighty filterable keys, and what was written.
async fn modelled(store: &Shared) -> Model {
    with_accounts(store).await;
    put_account(store, &account("keyward"), None).await;
    let mut runner = TestRunner::deterministic();
    let mut model = Model::new();
    for _ in 0..80 {
        let (record, used) = filterable().new_tree(&mut runner).unwrap().current();
        let key = put(store, create(&record)).await;
        let last_used: Vec<_> = used.map(|seconds| (1, at(seconds))).into_iter().collect();
        for (version, at) in &last_used {
            note_used(store, &[UsedSecret { key_id: key.id, version: *version, at: *at }]).await.unwrap();
        }
        model.push(StoredKey { key, last_used });
    }
    model.sort_by_key(|stored| std::cmp::Reverse(stored.key.id));
    model
}

fn ids<'k>(keys: impl IntoIterator<Item = &'k StoredKey>) -> Vec<KeyId> {
    keys.into_iter().map(|stored| stored.key.id).collect()
}

async fn every_filter_finds_what_a_look_at_each_key_finds(store: Shared) {
    let model = modelled(&store).await;
    for_all(400, filters(), |filter| {
        let (store, model) = (store.clone(), &model);
        async move {
            let found = store.keys(&filter, None, 1000).await.unwrap();
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

async fn pages_of_keys_join_to_the_whole_whatever_comes_between(store: Shared) {
    let model = modelled(&store).await;
    let filter = KeyFilter {
        states: vec![State::Active, State::Revoked],
        ..everything(OwnerFilter::Account(account_id("acme")))
    };
    let expected = ids(model.iter().filter(|stored| matches(stored, &filter)));
    let (mut found, mut before) = (Vec::new(), None);
    loop {
        let page = store.keys(&filter, before, 3).await.unwrap();
        assert!(page.len() <= 3);
        let Some(last) = page.last() else { break };
        before = Some(last.key.id);
        found.extend(ids(&page));
        // Newer than all: it belongs before the first page.
        put(&store, create(&key())).await;
    }
    assert_eq!(found, expected);
}

async fn a_page_counts_keys_and_not_their_secrets(store: Shared) {
    with_accounts(&store).await;
    for _ in 0..5 {
        let mut made = put(&store, create(&key())).await;
        for second in 0..3 {
            made.rotate(fresh_digest(), String::new(), Duration::from_secs(9), at(second));
            made = put(&store, update(&made)).await;
        }
    }
    let page = store.keys(&everything(OwnerFilter::Account(account_id("acme"))), None, 3).await.unwrap();
    assert_eq!(page.len(), 3);
    assert!(page.iter().all(|stored| stored.key.secrets.len() == 2));
}

async fn accounts_come_in_pages_in_the_order_of_their_ids(store: Shared) {
    for id in ["b", "a", "a-", "a_", "z", "0", "keyward"] {
        put_account(&store, &account(id), None).await;
    }
    let (mut found, mut after) = (Vec::new(), None);
    loop {
        let page = store.accounts(after.as_ref(), 2).await.unwrap();
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

async fn every_filter_of_the_log_finds_what_a_look_at_each_row_finds(store: Shared) {
    let actors: Vec<_> = (0..2).map(|_| fresh_id(at(0))).collect();
    for id in ["acme", "globex"] {
        put_account(&store, &account(id), None).await;
    }
    let mut keys = Vec::new();
    for count in 0..30usize {
        let owner = match count % 3 {
            0 => Owner::Account(account_id("acme")),
            1 => Owner::Account(account_id("globex")),
            _ => Owner::User(UserId::parse("u1").unwrap()),
        };
        let actor = Actor { key: actors.get(count % 4).copied(), account: None, acting_user: None };
        let seconds = at(i64::try_from(count % 7).unwrap());
        let made = put(&store, Write { actor, at: seconds, ..create(&Key { owner, ..key() }) }).await;
        keys.push(put(&store, Write { at: seconds, ..update(&made) }).await.id);
    }
    let rows = whole_log(&store).await;
    let filters = (
        prop::option::of(prop::sample::select(vec!["acme", "globex", "nobody"])),
        prop::option::of(prop::sample::select(keys)),
        prop::option::of(prop::sample::select(vec![
            "system".to_owned(),
            actors[0].to_string(),
            actors[1].to_string(),
            "nobody".to_owned(),
        ])),
        prop::option::of(0i64..8),
        prop::option::of(0i64..8),
        prop::option::of(0u64..70),
    );
    for_all(400, filters, |(account, key_id, actor, from, to, before)| {
        let (store, rows) = (store.clone(), &rows);
        async move {
            let filter = LogFilter {
                account: account.map(account_id),
                key_id,
                actor,
                from: from.map(at),
                to: to.map(at),
            };
            let before = before.map(Revision);
            let hit = |row: &&LogRow| {
                filter.account.as_ref().is_none_or(|account| row.account.as_ref() == Some(account))
                    && filter.key_id.is_none_or(|key| row.key_id == Some(key))
                    && filter.actor.as_ref().is_none_or(|actor| row.actor == *actor)
                    && filter.from.is_none_or(|from| row.at >= from)
                    && filter.to.is_none_or(|to| row.at < to)
                    && before.is_none_or(|before| row.revision < before)
            };
            let expected: Vec<_> = rows.iter().rev().filter(hit).take(5).cloned().collect();
            assert_eq!(store.log(&filter, before, 5).await.unwrap(), expected, "{filter:?} {before:?}");
        }
    })
    .await;
}

async fn the_latest_use_of_a_secret_is_kept_and_unknown_ones_are_skipped(store: Shared) {
    with_accounts(&store).await;
    let mut made = put(&store, create(&key())).await;
    made.rotate(fresh_digest(), String::new(), Duration::from_secs(60), at(0));
    let made = put(&store, update(&made)).await;
    let used = |version, seconds| UsedSecret { key_id: made.id, version, at: at(seconds) };
    let stranger = UsedSecret { key_id: fresh_id(at(0)), version: 1, at: at(1) };
    note_used(&store, &[used(1, 5), stranger, used(3, 9), used(2, 7)]).await.unwrap();
    note_used(&store, &[used(1, 4), used(2, 8)]).await.unwrap();
    note_used(&store, &[]).await.unwrap();
    let stored = store.key(made.id).await.unwrap().unwrap();
    let mut last_used = stored.last_used;
    last_used.sort();
    assert_eq!(last_used, [(1, at(5)), (2, at(8))]);
    assert_eq!(stored.key, made, "a use is no change");
    assert_eq!(store.head().await.unwrap().revision, made.revision);
}

async fn a_use_outlives_a_change_of_its_key(store: Shared) {
    with_accounts(&store).await;
    let made = put(&store, create(&key())).await;
    note_used(&store, &[UsedSecret { key_id: made.id, version: 1, at: at(3) }]).await.unwrap();
    let made = put(&store, update(&made)).await;
    assert_eq!(store.key(made.id).await.unwrap().unwrap().last_used, [(1, at(3))]);
}

async fn reads_see_whole_commits_while_others_write(store: Shared) {
    with_accounts(&store).await;
    let writing = store.clone();
    let writer = tokio::spawn(async move {
        for _ in 0..50 {
            let batch: Vec<_> = (0..4).map(|_| create(&key())).collect();
            writing.commit(&batch).await.unwrap();
        }
    });
    while !writer.is_finished() {
        let (head, _, keys) = snapshot(&store, at(0)).await;
        assert_eq!(keys.len() as u64, head.revision.0 - 2);
        assert_eq!(keys.len() % 4, 0, "half a batch shows");
    }
    writer.await.unwrap();
}

async fn a_closed_store_fails_and_says_so(store: Shared) {
    with_accounts(&store).await;
    let made = put(&store, create(&key())).await;
    store.close().await;
    assert!(store.head().await.is_err());
    assert!(store.key(made.id).await.is_err());
    assert!(store.account(&account_id("acme")).await.is_err());
    assert!(store.accounts(None, 1).await.is_err());
    assert!(store.keys(&everything(OwnerFilter::Account(account_id("acme"))), None, 1).await.is_err());
    assert!(store.log_after(Revision(0), 1).await.is_err());
    assert!(store.log(&LogFilter::default(), None, 1).await.is_err());
    assert!(store.snapshot(at(0), &mut |_| {}).await.is_err());
    assert!(store.commit(&[create(&key())]).await.is_err(), "what is closed takes no change");
    let used = UsedSecret { key_id: made.id, version: 1, at: at(0) };
    assert!(note_used(&store, &[used]).await.is_err());
}

/// One test for each promise, on a store that `$open` makes; `$keep` keeps alive what it lives in.
macro_rules! conformance {
    ($backend:ident, $open:expr; $($promise:ident,)*) => {
        mod $backend {
            $(
                #[tokio::test(flavor = "multi_thread")]
                async fn $promise() {
                    let (store, _kept) = $open.await;
                    super::$promise(store).await;
                }
            )*
        }
    };
}

macro_rules! every_promise {
    ($backend:ident, $open:expr) => {
        conformance! { $backend, $open;
            a_new_store_is_empty,
            every_field_of_a_key_reads_back,
            every_field_of_an_account_reads_back,
            a_change_from_another_revision_than_the_records_is_a_conflict,
            a_name_is_its_keys_until_that_is_revoked,
            a_name_is_free_in_another_account_and_for_a_user,
            keys_without_a_name_do_not_collide,
            a_digest_is_unique_for_ever,
            a_secret_of_the_keys_own_past_is_taken_too,
            the_same_request_is_done_once,
            an_idempotency_key_counts_for_24_hours,
            the_same_request_twice_in_a_batch_is_done_once,
            a_rejected_write_leaves_its_batch_alone,
            a_batch_of_rejections_records_nothing,
            the_log_says_who_did_what_and_holds_the_record,
            revisions_count_in_commit_order_under_overlapping_writers,
            of_changes_from_one_revision_one_is_made,
            the_log_is_read_in_pages,
            a_snapshot_holds_everything_that_was_written,
            a_snapshot_leaves_out_what_is_dead_for_too_long,
            every_filter_finds_what_a_look_at_each_key_finds,
            pages_of_keys_join_to_the_whole_whatever_comes_between,
            a_page_counts_keys_and_not_their_secrets,
            accounts_come_in_pages_in_the_order_of_their_ids,
            every_filter_of_the_log_finds_what_a_look_at_each_row_finds,
            the_latest_use_of_a_secret_is_kept_and_unknown_ones_are_skipped,
            a_use_outlives_a_change_of_its_key,
            reads_see_whole_commits_while_others_write,
            a_closed_store_fails_and_says_so,
        }
    };
}

async fn open_sqlite() -> (Shared, tempfile::TempDir) {
    let folder = tempfile::tempdir().unwrap();
    let url = format!("sqlite:{}", folder.path().join("keyward.db").display());
    (keyward::store::open(&url).await.unwrap(), folder)
}

every_promise!(sqlite, super::open_sqlite());
