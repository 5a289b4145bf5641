//! Tests of the index. Those against a model are in `model_tests.rs`.

use super::{key_block::RECORDS_PER_BLOCK, *};
use crate::{
    domain::{
        key::{
            KeyOwner, KeySecret, KeySpec, Quota, QuotaPeriod, Revocation, RevokeReason,
            tests::{at_seconds, sample_key},
        },
        key_policy::KeyPolicy,
        limit::QuotaUsage,
        log::{Actor, AuditAction, GENESIS_HASH},
        name::KeyName,
        scope::{Scope, ScopeSet},
    },
    engine::limiter::Consumption,
    store::{LoadedKey, ReadSet},
};
use std::{sync::atomic::AtomicBool, time::Duration};

pub(super) fn loaded(key: &ApiKey) -> Index {
    let index = Index::default();
    index.load_record(SnapshotRecord::Key(Arc::new(key.clone()), vec![]));
    index.finish_load(Revision(1));
    index
}

/// Adds a key to a part as a store does, which does not know of other parts.
pub(super) fn add_to_part(part: &mut dyn SnapshotPart, key: &ApiKey, retired: &[KeySecret]) {
    part.add_key(&LoadedKey {
        id: key.id,
        owner: &Arc::new(key.owner.clone()),
        policy: &Arc::new(KeyPolicy::from_key(key)),
        name: key.spec.name.as_ref().map(KeyName::as_str),
        expires_at: key.spec.expires_at,
        metadata: key.spec.metadata.clone(),
        created_at: key.created_at,
        created_by: &key.created_by,
        updated_at: key.updated_at,
        disabled_at: key.disabled_at,
        revocation: key.revocation.clone(),
        revision: key.revision,
        secrets: &key.secrets,
        retired_secrets: retired,
    });
}

impl Index {
    pub(super) fn put_key(&self, key: &ApiKey) {
        self.upsert_keys(std::iter::once(key));
    }

    /// Marks a change as uncertain that is based on the record at this revision.
    pub(in crate::engine) fn mark_change_uncertain(&self, change: RecordChange, made_from: Option<Revision>) {
        self.mark_uncertain(&WriteRequest {
            change,
            expected_revision: made_from,
            action: AuditAction::KeyUpdated,
            actor: Actor::SYSTEM,
            method: "test",
            at: at_seconds(0),
            idempotency: None,
            read_set: ReadSet::default(),
            limits: None,
        });
    }
}

pub(super) fn rotated(key: &ApiKey, token: &str, seconds: i64) -> ApiKey {
    let mut key = key.clone();
    key.rotate(TokenDigest::from_token(token), String::new(), Duration::from_secs(5), at_seconds(seconds));
    key
}

pub(super) fn revoked(key: &ApiKey, seconds: i64) -> ApiKey {
    let revocation =
        Revocation { at: at_seconds(seconds), reason: RevokeReason::Unspecified, comment: String::new() };
    ApiKey { revocation: Some(revocation), ..key.clone() }
}

#[test]
fn nothing_is_known_before_the_snapshot() {
    assert_eq!(Index::default().revision(), None);
    assert_eq!(loaded(&sample_key()).revision(), Some(Revision(1)));
}

#[test]
fn every_secret_of_a_key_finds_its_newest_record() {
    let first = sample_key();
    let index = loaded(&first);
    let second = rotated(&first, "two", 10);
    let third = rotated(&second, "three", 20);
    index.put_key(&second);
    index.put_key(&third);
    for (token, version) in [("one", 1), ("two", 2), ("three", 3)] {
        let found = index.find_by_digest(&TokenDigest::from_token(token)).unwrap();
        assert_eq!(found.secret_version, version, "{token}");
        assert_same_key(&found.key, &third);
    }
    assert!(index.find_by_digest(&TokenDigest::from_token("four")).is_none());
}

#[test]
fn a_token_rotated_longer_ago_than_the_retention_is_forgotten() {
    let index = loaded(&sample_key());
    index.put_key(&rotated(&sample_key(), "two", 10));
    assert_eq!(index.evict(at_seconds(15)), 0, "superseded at 15: not longer ago");
    assert_eq!(index.evict(at_seconds(16)), 1);
    assert!(index.find_by_digest(&TokenDigest::from_token("one")).is_none());
    assert!(index.find_by_digest(&TokenDigest::from_token("two")).is_some());
}

#[test]
fn what_is_dead_for_longer_than_the_retention_is_forgotten() {
    let first = sample_key();
    let index = loaded(&first);
    let third = rotated(&rotated(&first, "two", 10), "three", 20);
    index.put_key(&rotated(&first, "two", 10));
    index.put_key(&third);
    assert_eq!(index.evict(at_seconds(15)), 0, "superseded at 15: not longer ago");
    assert_eq!(index.evict(at_seconds(16)), 1);
    assert!(index.find_by_digest(&TokenDigest::from_token("one")).is_none());
    index.put_key(&revoked(&third, 30));
    assert_eq!(index.evict(at_seconds(30)), 1, "the one superseded at 25; the key was revoked at 30");
    assert_eq!(index.evict(at_seconds(31)), 1);
    assert!(index.is_empty());
}

#[test]
fn a_revocation_in_doubt_is_in_force_until_a_record_settles_it() {
    let key = sample_key();
    let index = loaded(&key);
    let dead = revoked(&key, 5);
    index.mark_change_uncertain(RecordChange::Key(Arc::new(dead.clone())), Some(key.revision));
    assert_eq!(
        index.find_by_digest(&TokenDigest::from_token("one")).unwrap().uncertain_record.as_deref(),
        Some(&dead)
    );
    index.resolve_uncertain();
    assert!(
        index.find_by_digest(&TokenDigest::from_token("one")).unwrap().uncertain_record.is_some(),
        "somebody wanted it stopped"
    );
    index.put_key(&key);
    assert!(
        index.find_by_digest(&TokenDigest::from_token("one")).unwrap().uncertain_record.is_some(),
        "another change does not settle it"
    );
    index.put_key(&ApiKey { revision: Revision(2), ..dead });
    assert!(index.find_by_digest(&TokenDigest::from_token("one")).unwrap().uncertain_record.is_none());
}

#[test]
fn other_doubts_end_when_the_log_has_decided() {
    let key = sample_key();
    let index = loaded(&key);
    index.mark_change_uncertain(RecordChange::Key(Arc::new(rotated(&key, "two", 5))), Some(key.revision));
    assert!(index.find_by_digest(&TokenDigest::from_token("one")).unwrap().uncertain_record.is_some());
    index.resolve_uncertain();
    assert!(index.find_by_digest(&TokenDigest::from_token("one")).unwrap().uncertain_record.is_none());
}

fn role(account: Option<&str>, scope: &str, revision: u64) -> Arc<Role> {
    Arc::new(Role {
        account: account.map(|account| AccountId::parse(account).unwrap()),
        name: RoleName::parse("admin").unwrap(),
        scopes: [Scope::parse_grant(scope).unwrap()].into_iter().collect(),
        revision: Revision(revision),
    })
}

/// The scope that the role `admin` grants in an account.
fn effective_grant(index: &Index, account: &str) -> Option<String> {
    let role =
        index.resolve_role(Some(&AccountId::parse(account).unwrap()), &RoleName::parse("admin").unwrap())?;
    Some(role.scopes.iter().next().unwrap().to_string())
}

#[test]
fn a_new_account_role_in_doubt_hides_the_global_one_in_its_account_alone() {
    let index = loaded(&sample_key());
    index.upsert_role(role(None, "*", 1));
    index.mark_change_uncertain(RecordChange::Role(role(Some("acme"), "monitors:read", 0)), None);
    assert_eq!(effective_grant(&index, "acme"), None);
    assert_eq!(effective_grant(&index, "other").as_deref(), Some("*"));
    index.resolve_uncertain();
    assert_eq!(effective_grant(&index, "acme").as_deref(), Some("*"), "it was not recorded");
    index.mark_change_uncertain(RecordChange::Role(role(Some("acme"), "monitors:read", 0)), None);
    index.upsert_role(role(Some("acme"), "monitors:read", 2));
    assert_eq!(effective_grant(&index, "acme").as_deref(), Some("monitors:read"), "it was recorded");
}

#[test]
fn a_global_role_in_doubt_grants_nothing_where_no_account_role_hides_it() {
    let index = loaded(&sample_key());
    index.upsert_role(role(Some("acme"), "monitors:read", 1));
    for change in
        [RecordChange::Role(role(None, "alerts:read", 0)), RecordChange::RoleDeleted(role(None, "*", 2))]
    {
        index.upsert_role(role(None, "*", 2));
        index.mark_change_uncertain(change, Some(Revision(2)));
        assert_eq!(effective_grant(&index, "acme").as_deref(), Some("monitors:read"));
        assert_eq!(effective_grant(&index, "other"), None);
        index.resolve_uncertain();
    }
}

#[test]
fn a_role_or_member_in_doubt_is_not_settled_by_an_older_record() {
    let index = loaded(&sample_key());
    let (account, user) = (AccountId::parse("acme").unwrap(), UserId::parse("ann").unwrap());
    let member = |revision| {
        let (account, user, role) = (account.clone(), user.clone(), RoleName::parse("admin").unwrap());
        Arc::new(AccountMember { account, user, role, revision: Revision(revision) })
    };
    index.mark_change_uncertain(RecordChange::RoleDeleted(role(Some("acme"), "*", 5)), Some(Revision(5)));
    index.mark_change_uncertain(RecordChange::MemberRemoved(member(5)), Some(Revision(5)));
    // A snapshot, or the changes of another replica, deliver such records.
    for revision in [4, 5] {
        index.upsert_role(role(Some("acme"), "*", revision));
        index.upsert_member(member(revision));
        assert_eq!(effective_grant(&index, "acme"), None);
        assert!(index.member(&account, &user).is_none());
    }
    index.upsert_role(role(Some("acme"), "*", 6));
    index.upsert_member(member(6));
    assert!(effective_grant(&index, "acme").is_some() && index.member(&account, &user).is_some());
}

#[test]
fn a_weaker_change_in_doubt_does_not_end_what_a_stronger_one_refuses() {
    let key = sample_key();
    let index = loaded(&key);
    let narrower = ApiKey { spec: KeySpec { scopes: Default::default(), ..key.spec.clone() }, ..key.clone() };
    index.mark_change_uncertain(RecordChange::Key(Arc::new(revoked(&key, 6))), Some(key.revision));
    index.mark_change_uncertain(RecordChange::Key(Arc::new(narrower)), Some(key.revision));
    index.resolve_uncertain();
    let found = index.find_by_digest(&key.secrets[0].digest).unwrap();
    assert!(found.uncertain_record.is_some_and(|uncertain_record| uncertain_record.revocation.is_some()));
}

#[test]
fn a_stop_in_doubt_holds_for_a_record_that_comes_after_the_doubt() {
    let index = loaded(&sample_key());
    let elsewhere = ApiKey { revision: Revision(5), ..rotated(&numbered(7), "two", 5) };
    let account = |suspended: Option<i64>, revision| {
        Arc::new(Account {
            id: AccountId::parse("new").unwrap(),
            name: crate::domain::name::DisplayName::parse("New").unwrap(),
            suspended_at: suspended.map(at_seconds),
            longest_life: None,
            created_at: at_seconds(0),
            updated_at: at_seconds(0),
            revision: Revision(revision),
        })
    };
    index.mark_change_uncertain(RecordChange::Key(Arc::new(revoked(&elsewhere, 6))), Some(Revision(5)));
    index.mark_change_uncertain(RecordChange::Account(account(Some(6), 0)), Some(Revision(5)));
    index.put_key(&elsewhere);
    for (suspended, revision) in [(Some(3), 3), (None, 5)] {
        index.upsert_account(account(suspended, revision));
        assert_eq!(index.account_suspension(&account(None, 0).id), Some(true), "revision {revision}");
    }
    assert!(
        index
            .find_by_digest(&TokenDigest::from_token("two"))
            .unwrap()
            .uncertain_record
            .is_some_and(|uncertain_record| uncertain_record.revocation.is_some())
    );
}

#[test]
fn what_is_spent_of_a_quota_outlives_every_change_but_the_end() {
    let mut key = sample_key();
    key.spec.quota = Some(Quota { limit: 5, period: QuotaPeriod::Total });
    let index = loaded(&key);
    index.load_record(SnapshotRecord::QuotaUsage(
        key.id,
        QuotaUsage { period_start: at_seconds(0), used_units: 4 },
    ));
    let take = |cost| {
        let found = index.find_by_digest(&TokenDigest::from_token("one")).unwrap();
        let take = Consumption { cost, dedup_id: None, dry_run: false };
        found
            .limit_state
            .unwrap()
            .consume(&found.key, take, false, at_seconds(1))
            .unwrap()
            .refusal_reasons
            .is_empty()
    };
    assert!(!take(2));
    index.put_key(&rotated(&key, "two", 2));
    assert!(take(1));
    assert!(!take(1));
    key.spec.quota = None;
    index.put_key(&key);
    assert!(index.find_by_digest(&TokenDigest::from_token("one")).unwrap().limit_state.is_none());
}

/// Key number `number`, with the token `number.1`.
pub(super) fn numbered(number: u16) -> ApiKey {
    let mut random = [0; 10];
    random[..2].copy_from_slice(&number.to_be_bytes());
    let mut key = sample_key();
    key.id = KeyId::generate(at_seconds(0), random);
    key.secrets[0].digest = digest(number, 1);
    key
}

pub(super) fn digest(number: u16, version: u32) -> TokenDigest {
    TokenDigest::from_token(&format!("{number}.{version}"))
}

/// A key as the index keeps it: everything, or, once it is revoked, nothing that it granted.
pub(super) fn key_without_details(key: &ApiKey) -> ApiKey {
    let mut key = key.clone();
    if key.is_revoked() {
        key.disabled_at = None;
        key.spec = KeySpec { scopes: ScopeSet::default(), ..sample_key().spec };
    }
    key
}

/// Asserts that the index holds a key as it is recorded.
#[track_caller]
pub(super) fn assert_same_key(found_key: &KeyRef, key: &ApiKey) {
    let key = &key_without_details(key);
    assert_eq!(found_key.id(), key.id);
    assert_eq!(found_key.name(), key.spec.name.as_ref().map(KeyName::as_str));
    assert_eq!(found_key.metadata(), &key.spec.metadata);
    assert_eq!((found_key.owner(), found_key.environment()), (&key.owner, &key.environment));
    assert_eq!((found_key.scopes(), found_key.roles()), (key.scopes(), key.roles()));
    assert_eq!((found_key.customers(), found_key.allowed_cidrs()), (key.customers(), key.allowed_cidrs()));
    assert_eq!((found_key.rate_limits(), found_key.quota()), (key.rate_limits(), key.quota()));
    assert_eq!(found_key.expires_at(), key.expires_at());
    assert_eq!((found_key.is_disabled(), found_key.is_revoked()), (key.is_disabled(), key.is_revoked()));
    assert!(found_key.secret_expiries().eq(key.secret_expiries()));
}

#[test]
fn versions_may_be_as_large_as_32_bits_let_them() {
    let versions = [1, 65_534, 65_535, 65_536, u32::MAX - 1];
    for version in versions {
        let mut key = numbered(0);
        key.secrets[0].version = version;
        let index = loaded(&key);
        let found = |version| index.find_by_digest(&digest(0, version)).unwrap();
        assert_eq!(found(1).secret_version, version);
        key.rotate(digest(0, 2), String::new(), Duration::from_secs(5), at_seconds(10));
        index.put_key(&key);
        assert_eq!((found(1).secret_version, found(2).secret_version), (version, version + 1));
        assert_same_key(&found(2).key, &key);
        index.evict(at_seconds(16));
        assert_eq!(found(2).secret_version, version + 1);
    }
}

#[test]
fn keys_that_come_in_parts_at_once_are_all_found_as_they_are() {
    const PART: u16 = 3 * RECORDS_PER_BLOCK as u16 + 7;
    let key = |number: u16| {
        let mut key = numbered(number);
        key.spec.name =
            (!number.is_multiple_of(3)).then(|| KeyName::parse(&format!("key {number}")).unwrap());
        key.spec.expires_at = (!number.is_multiple_of(2)).then(|| at_seconds(number.into()));
        key.owner = KeyOwner::Account(AccountId::parse(&format!("account-{}", number % 5)).unwrap());
        if number.is_multiple_of(7) {
            key.rotate(digest(number, 2), String::new(), Duration::from_secs(5), at_seconds(9));
        }
        key
    };
    let index = Index::default();
    index.reserve_secrets(2 * usize::from(PART));
    std::thread::scope(|scope| {
        for numbers in [0..PART, PART..2 * PART] {
            let mut part = index.begin_part();
            scope.spawn(move || {
                numbers.for_each(|number| add_to_part(&mut *part, &key(number), &[]));
                part.finish();
            });
        }
    });
    index.finish_load(Revision(1));
    assert_eq!(index.len(), usize::from(2 * PART));
    for key in (0..2 * PART).map(key) {
        for secret in &key.secrets {
            let found = index.find_by_digest(&secret.digest).unwrap();
            assert_eq!(found.secret_version, secret.version);
            assert_same_key(&found.key, &key);
        }
    }
}

#[test]
fn while_it_grows_no_reader_misses_a_key_that_was_there() {
    const OLD: u16 = 700;
    let index = Index::default();
    (0..OLD).for_each(|number| index.load_record(SnapshotRecord::Key(Arc::new(numbered(number)), vec![])));
    index.finish_load(Revision(1));
    let grown = AtomicBool::new(false);
    let read = || {
        let mut rounds = 0;
        while !grown.load(Ordering::Acquire) || rounds == 0 {
            (0..OLD).for_each(|number| {
                let found = index.find_by_digest(&digest(number, 1)).unwrap();
                assert_eq!(found.key.id(), numbered(number).id);
            });
            rounds += 1;
        }
    };
    std::thread::scope(|scope| {
        (0..3).for_each(|_| drop(scope.spawn(read)));
        (OLD..20_000).for_each(|number| index.put_key(&numbered(number)));
        grown.store(true, Ordering::Release);
    });
    assert_eq!(index.len(), 20_000);
}

#[test]
fn a_record_is_seen_before_the_revision_that_says_so_and_by_all_digests_at_once() {
    let before = rotated(&numbered(0), "0.2", 1);
    let index = loaded(&before);
    const LAST: u64 = 5000;
    let row = |revision| LogEntry {
        revision: Revision(revision),
        at: at_seconds(0),
        action: AuditAction::KeyUpdated.as_str().to_owned(),
        account: None,
        key_id: Some(before.id),
        user: None,
        actor: Actor::SYSTEM.to_string(),
        actor_account: None,
        acting_user: None,
        method: "test".to_owned(),
        payload: String::new(),
        prev_hash: GENESIS_HASH,
        hash: GENESIS_HASH,
    };
    let written = |version| {
        let found = index.find_by_digest(&digest(0, version)).unwrap();
        found.key.expires_at().map_or(0, |at| at.as_micros() as u64 / 1_000_000)
    };
    let read = || {
        loop {
            let revision = Index::revision(&index).unwrap().0;
            let (first, second) = (written(1), written(2));
            assert!(revision == 1 || (first >= revision && second >= first), "{revision}: {first}, {second}");
            if revision == LAST {
                return assert_eq!(second, LAST);
            }
        }
    };
    std::thread::scope(|scope| {
        (0..3).for_each(|_| drop(scope.spawn(read)));
        for revision in 2..=LAST {
            let mut key = before.clone();
            key.spec.expires_at = Some(at_seconds(revision as i64));
            index.apply_local(&[(row(revision), RecordChange::Key(Arc::new(key)))]);
        }
    });
}

#[test]
fn keys_that_come_together_are_as_if_they_had_come_one_by_one() {
    // Each key is created and changed soon afterwards: at once, a few keys later, or in another block.
    let changes: Vec<_> = (0..400u16)
        .flat_map(|number| {
            let before = number.checked_sub([0, 3, 150][usize::from(number % 3)]);
            let change = before.map(|before| match before % 4 {
                0 => rotated(&numbered(before), &format!("{before}.2"), 1),
                1 => revoked(&numbered(before), 1),
                _ => ApiKey { disabled_at: Some(at_seconds(1)), ..numbered(before) },
            });
            [Some(numbered(number)), change]
        })
        .flatten()
        .collect();
    let alone = Index::default();
    changes.iter().for_each(|key| alone.put_key(key));
    for together in [1, 2, 7, 64, 100, 1000] {
        let index = Index::default();
        changes.chunks(together).for_each(|keys| index.upsert_keys(keys.iter()));
        assert_eq!(index.len(), alone.len());
        for (number, version) in (0..400).flat_map(|number| [(number, 1), (number, 2)]) {
            let [one, other] = [&index, &alone].map(|index| {
                index.find_by_digest(&digest(number, version)).map(|found| {
                    let facts = (
                        found.key.is_disabled(),
                        found.key.is_revoked(),
                        found.key.name().map(str::to_owned),
                    );
                    (found.secret_version, found.key.id(), facts, found.key.digests())
                })
            });
            assert_eq!(one, other, "{number}.{version} of {together} together");
        }
    }
}
