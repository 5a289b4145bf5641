//! Tests of the index and its blocks against a model: plain maps of whole records.

use std::time::Duration;

use proptest::prelude::*;

use super::{
    key_block::{BlockInterners, KeyBlock, OwnedBlockEntry, RECORDS_PER_BLOCK},
    tests::{add_to_part, assert_same_key, digest, key_without_details, numbered, revoked, rotated},
    *,
};
use crate::domain::{
    key::{KeyOwner, KeySecret, Quota, QuotaPeriod, RateLimit, tests::at_seconds},
    name::{CustomerId, EnvironmentName, KeyName},
    scope::{Scope, ScopeSet},
};

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
