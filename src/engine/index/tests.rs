//! Tests of the index, also against a model: plain maps of whole records.

use super::{
    key_block::{BlockInterners, KeyBlock, OwnedBlockEntry, RECORDS_PER_BLOCK},
    *,
};
use crate::{
    domain::{
        key::{
            KeyOwner, KeySecret, KeySpec, Quota, QuotaPeriod, RateLimit, Revocation, RevokeReason,
            tests::{at_seconds, sample_key},
        },
        key_policy::KeyPolicy,
        limit::QuotaUsage,
        log::{Actor, AuditAction, GENESIS_HASH},
        name::{CustomerId, EnvironmentName, KeyName},
        scope::{Scope, ScopeSet},
    },
    engine::limiter::Consumption,
    store::{LoadedKey, ReadSet},
};
use proptest::prelude::*;
use std::{sync::atomic::AtomicBool, time::Duration};

fn loaded(key: &ApiKey) -> Index {
    let index = Index::default();
    index.load_record(SnapshotRecord::Key(Arc::new(key.clone()), vec![]));
    index.finish_load(Revision(1));
    index
}

/// Adds a key to a part as a store does, which does not know of other parts.
fn add_to_part(part: &mut dyn SnapshotPart, key: &ApiKey, retired: &[KeySecret]) {
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
    fn put_key(&self, key: &ApiKey) {
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

fn rotated(key: &ApiKey, token: &str, seconds: i64) -> ApiKey {
    let mut key = key.clone();
    key.rotate(TokenDigest::from_token(token), String::new(), Duration::from_secs(5), at_seconds(seconds));
    key
}

fn revoked(key: &ApiKey, seconds: i64) -> ApiKey {
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
fn numbered(number: u16) -> ApiKey {
    let mut random = [0; 10];
    random[..2].copy_from_slice(&number.to_be_bytes());
    let mut key = sample_key();
    key.id = KeyId::generate(at_seconds(0), random);
    key.secrets[0].digest = digest(number, 1);
    key
}

fn digest(number: u16, version: u32) -> TokenDigest {
    TokenDigest::from_token(&format!("{number}.{version}"))
}

/// A key as the index keeps it: everything, or, once it is revoked, nothing that it granted.
fn key_without_details(key: &ApiKey) -> ApiKey {
    let mut key = key.clone();
    if key.is_revoked() {
        key.disabled_at = None;
        key.spec = KeySpec { scopes: ScopeSet::default(), ..sample_key().spec };
    }
    key
}

/// Asserts that the index holds a key as it is recorded.
#[track_caller]
fn assert_same_key(found_key: &KeyRef, key: &ApiKey) {
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

/// The model of the index: whole records in plain maps.
#[derive(Default)]
struct ReferenceIndex {
    keys: HashMap<KeyId, ApiKey>,
    /// Secrets that left the record: the digest, and when it was superseded.
    retired: HashMap<KeyId, Vec<(TokenDigest, Timestamp)>>,
    digests: HashMap<TokenDigest, (KeyId, u32)>,
}

impl ReferenceIndex {
    fn put(&mut self, key: &ApiKey, retired: &[KeySecret]) {
        let gone = self.retired.entry(key.id).or_default();
        gone.extend(retired.iter().map(|old| (old.digest, old.expires_at.unwrap_or(key.updated_at))));
        for old in self.keys.get(&key.id).map_or(&[][..], |before| &before.secrets) {
            if key.secrets.iter().all(|kept| kept.version != old.version) {
                gone.push((old.digest, old.expires_at.unwrap_or(key.updated_at).min(key.updated_at)));
            }
        }
        for secret in key.secrets.iter().chain(retired) {
            self.digests.entry(secret.digest).or_insert((key.id, secret.version));
        }
        self.keys.insert(key.id, key.clone());
    }

    fn evict(&mut self, cutoff: Timestamp) {
        let ReferenceIndex { keys, retired, digests } = self;
        keys.retain(|id, key| {
            let gone = retired.entry(*id).or_default();
            let revoked = key.revocation.as_ref().is_some_and(|revocation| revocation.at < cutoff);
            let is_due = |end: Option<Timestamp>| revoked || end.is_some_and(|end| end < cutoff);
            let ended = key.secrets.iter().filter(|secret| is_due(secret.expires_at));
            ended.for_each(|secret| digests.retain(|digest, _| *digest != secret.digest));
            gone.retain(|(digest, end)| {
                let is_due = is_due(Some(*end));
                if is_due {
                    digests.remove(digest);
                }
                !is_due
            });
            !revoked
        });
    }

    #[track_caller]
    fn assert_agrees(&self, index: &Index, digest: &TokenDigest, now: Timestamp) {
        match (index.find_by_digest(digest), self.digests.get(digest)) {
            (None, None) => {}
            (Some(found), Some((id, version))) => {
                let key = &self.keys[id];
                assert_same_key(&found.key, key);
                assert_eq!(found.secret_version, *version);
                assert_eq!(
                    found.key.is_secret_superseded(*version, now),
                    key.is_secret_superseded(*version, now)
                );
                assert_eq!(found.limit_state.is_some(), key_without_details(key).is_limited());
            }
            (found, known) => panic!("{found:?}, and should be {known:?}"),
        }
    }
}

/// A step in the life of a key.
#[derive(Clone, Copy, Debug)]
enum KeyEvent {
    /// The key is created, or loaded with a secret that left its record long ago.
    Made {
        loaded: bool,
    },
    /// Its attributes are replaced by those of this choice.
    Updated(u8),
    Disabled(bool),
    Rotated(u8),
    Revoked,
    /// Time passes, and what was dead for this number of seconds is evicted.
    Forgotten(u8),
}

fn event() -> impl Strategy<Value = (u16, KeyEvent)> {
    let kind = prop_oneof![
        4 => any::<bool>().prop_map(|loaded| KeyEvent::Made { loaded }),
        4 => any::<u8>().prop_map(KeyEvent::Updated),
        1 => any::<bool>().prop_map(KeyEvent::Disabled),
        4 => (0..20_u8).prop_map(KeyEvent::Rotated),
        2 => Just(KeyEvent::Revoked),
        1 => (0..30_u8).prop_map(KeyEvent::Forgotten),
    ];
    (0..150_u16, kind)
}

/// The same key with other attributes, more or fewer of them.
fn updated(mut key: ApiKey, choice: u8) -> ApiKey {
    let bit = |at: u8| choice & (1 << at) != 0;
    let spec = &mut key.spec;
    spec.name = bit(0).then(|| KeyName::parse(&"n\u{e9}".repeat(usize::from(choice % 9) + 1)).unwrap());
    let scope = if bit(1) { "alerts:*" } else { "monitors:read" };
    spec.scopes = [Scope::parse_grant(scope).unwrap()].into_iter().collect::<ScopeSet>();
    spec.roles = if bit(2) { vec![RoleName::parse("agent").unwrap()] } else { vec![] };
    spec.customers = if bit(3) { vec![CustomerId::parse("c1").unwrap()] } else { vec![] };
    spec.allowed_cidrs = if bit(4) { vec!["10.0.0.0/8".parse().unwrap()] } else { vec![] };
    let limit = || RateLimit { name: "l".to_owned(), limit: choice.into(), window: Duration::from_secs(1) };
    spec.rate_limits = if bit(5) { vec![limit()] } else { vec![] };
    spec.quota = bit(6).then_some(Quota { limit: choice.into(), period: QuotaPeriod::Day });
    spec.expires_at = bit(7).then(|| at_seconds(choice.into()));
    spec.metadata =
        choice.is_multiple_of(7).then(|| ("team".to_owned(), choice.to_string())).into_iter().collect();
    key.environment =
        EnvironmentName::parse(if choice.is_multiple_of(5) { "staging" } else { "production" }).unwrap();
    if choice.is_multiple_of(3) {
        key.owner = KeyOwner::User(UserId::parse("ann").unwrap());
    }
    key
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn it_answers_like_a_map_of_whole_records(events in proptest::collection::vec(event(), 1..400)) {
        let (index, mut model) = (Index::default(), ReferenceIndex::default());
        let mut made = HashMap::new();
        let mut all = Vec::new();
        for (seconds, (number, event)) in (1_i64..).zip(events) {
            let now = at_seconds(seconds);
            let known: Option<ApiKey> = made.get(&number).cloned();
            let (key, retired) = match (known, event) {
                (_, KeyEvent::Forgotten(age)) => {
                    let cutoff = now.saturating_sub(Duration::from_secs(age.into()));
                    let before = model.digests.len();
                    model.evict(cutoff);
                    prop_assert_eq!(index.evict(cutoff), before - model.digests.len());
                    prop_assert_eq!(index.len(), model.keys.len());
                    continue;
                }
                (None, KeyEvent::Made { loaded: false }) => (numbered(number), vec![]),
                (None, KeyEvent::Made { loaded: true }) => {
                    let mut key = rotated(&numbered(number), &format!("{number}.2"), seconds);
                    key.rotate(digest(number, 3), String::new(), Duration::ZERO, now);
                    let first = KeySecret { expires_at: Some(now), ..numbered(number).secrets.remove(0) };
                    (key, vec![first])
                }
                (Some(key), _) if key.is_revoked() => continue,
                (Some(key), KeyEvent::Updated(choice)) => (updated(key, choice), vec![]),
                (Some(key), KeyEvent::Disabled(on)) => (ApiKey { disabled_at: on.then_some(now), ..key }, vec![]),
                (Some(mut key), KeyEvent::Rotated(overlap)) => {
                    let next = digest(number, key.secrets[0].version + 1);
                    key.rotate(next, String::new(), Duration::from_secs(overlap.into()), now);
                    (key, vec![])
                }
                (Some(key), KeyEvent::Revoked) => (revoked(&key, seconds), vec![]),
                _ => continue,
            };
            let key = ApiKey { updated_at: now, ..key };
            model.put(&key, &retired);
            if matches!(event, KeyEvent::Made { loaded: true }) {
                let mut part = index.begin_part();
                add_to_part(&mut *part, &key, &retired);
                part.finish();
                index.keys.load().publish();
            } else {
                index.put_key(&key);
            }
            all.extend(key.secrets.iter().chain(&retired).map(|secret| secret.digest));
            key.secrets.iter().for_each(|secret| model.assert_agrees(&index, &secret.digest, now));
            made.insert(number, key);
        }
        prop_assert_eq!(index.len(), model.keys.len());
        all.iter().for_each(|digest| model.assert_agrees(&index, digest, at_seconds(1000)));
    }
}

/// A change of a block.
#[derive(Clone, Debug)]
enum BlockEdit {
    /// This number of keys is appended.
    And(u8),
    /// A key gets other attributes, is rotated this number of times, and moves to another account.
    With {
        at: u8,
        choice: u8,
        rotations: u8,
        account: u8,
    },
    Without(u8),
}

fn block_edit() -> impl Strategy<Value = BlockEdit> {
    prop_oneof![
        2 => (0..20_u8).prop_map(BlockEdit::And),
        6 => (0..64_u8, any::<u8>(), 0..4_u8, any::<u8>())
            .prop_map(|(at, choice, rotations, account)| BlockEdit::With { at, choice, rotations, account }),
        1 => (0..64_u8).prop_map(BlockEdit::Without),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn every_record_of_a_block_is_as_it_was_put_in(events in proptest::collection::vec(block_edit(), 1..60)) {
        let (mut shared, mut block) = (BlockInterners::default(), Arc::new(KeyBlock::default()));
        let mut keys: Vec<Option<ApiKey>> = Vec::new();
        let mut earlier = Vec::new();
        for (seconds, event) in (1_i64..).zip(events) {
            let next = match event {
                BlockEdit::And(count) => {
                    let first = u8::try_from(keys.len()).unwrap();
                    let more: Vec<_> = (first..RECORDS_PER_BLOCK as u8).take(count.into())
                        .map(|at| updated(numbered(at.into()), at.wrapping_mul(37)))
                        .collect();
                    let entries: Vec<_> =
                        more.iter().filter_map(|key| OwnedBlockEntry::new(key, &[], &mut shared)).collect();
                    keys.extend(more.into_iter().map(Some));
                    block.with_appended(&entries, &mut shared)
                }
                BlockEdit::With { at: place, choice, rotations, account } if usize::from(place) < keys.len() => {
                    let mut key = updated(numbered(place.into()), choice);
                    for rotation in 0..rotations {
                        let overlap = Duration::from_secs(choice.into());
                        key.rotate(digest(place.into(), rotation.into()), String::new(), overlap, at_seconds(seconds));
                    }
                    key.owner = KeyOwner::Account(AccountId::parse(&format!("account-{account}")).unwrap());
                    let entries = OwnedBlockEntry::new(&key, &[], &mut shared).unwrap();
                    keys[usize::from(place)] = Some(key);
                    block.with_replaced(place.into(), &entries, &mut shared)
                }
                BlockEdit::Without(place) if usize::from(place) < keys.len() => {
                    keys[usize::from(place)] = None;
                    block.with_removed(place.into(), &mut shared)
                }
                _ => continue,
            };
            block = Arc::new(next);
            earlier.push((block.clone(), keys.clone()));
            shared.collect_unused();
        }
        // Readers of an earlier block still find its contents.
        for (block, keys) in earlier {
            prop_assert_eq!(block.len(), keys.len());
            for (at, key) in keys.iter().enumerate() {
                let found_key = KeyRef::from_block(block.clone(), at);
                prop_assert_eq!(found_key.is_some(), key.is_some());
                found_key.iter().zip(key).for_each(|(found_key, key)| assert_same_key(found_key, key));
            }
        }
    }
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
