//! Measures the memory of the index in bytes that are requested from the allocator.

#![expect(unsafe_code, reason = "an allocator is unsafe to write; this one only counts")]

use std::{
    alloc::{GlobalAlloc, Layout, System},
    cell::Cell,
    collections::BTreeMap,
    sync::Arc,
};

use super::*;
use crate::{
    domain::{
        key::{
            Quota, QuotaPeriod, RateLimit, Revocation, RevokeReason,
            tests::{at_seconds, sample_key},
        },
        name::{CustomerId, KeyName},
        scope::Scope,
    },
    engine::limiter::Consumption,
};

thread_local! {
    static LIVE: Cell<isize> = const { Cell::new(0) };
}

struct CountingAllocator;

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator;

/// Ignores threads whose thread-locals are already destroyed.
fn count(bytes: isize) {
    let _ = LIVE.try_with(|live| live.set(live.get() + bytes));
}

// SAFETY: every call is forwarded to the system allocator unchanged.
unsafe impl GlobalAlloc for CountingAllocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size().cast_signed());
        // SAFETY: the caller upholds the same contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        count(-layout.size().cast_signed());
        // SAFETY: the caller upholds the same contract.
        unsafe { System.dealloc(memory, layout) }
    }
}

/// The bytes that this thread has allocated and not freed.
fn live() -> usize {
    LIVE.with(Cell::get).try_into().unwrap()
}

/// A key of the largest permitted size that shares no value with another.
fn largest(number: u32) -> ApiKey {
    let text = |length: usize| format!("{number:0length$}");
    let mut random = [0; 10];
    random[..4].copy_from_slice(&number.to_be_bytes());
    let mut key = sample_key();
    key.id = KeyId::generate(at_seconds(0), random);
    key.secrets[0].digest = TokenDigest::from_token(&number.to_string());
    let spec = &mut key.spec;
    spec.name = Some(KeyName::parse(&text(255)).unwrap());
    spec.scopes =
        (0..32).map(|at| Scope::parse_grant(&format!("s{at}:{}", text(100))).unwrap()).collect::<ScopeSet>();
    spec.roles = vec![RoleName::parse(&text(64)).unwrap(); 16];
    spec.customers = (0..16).map(|at| CustomerId::parse(&format!("{at}{}", text(100))).unwrap()).collect();
    spec.allowed_cidrs = vec!["2001:db8::/32".parse().unwrap(); 16];
    let limit = |name| RateLimit { name, limit: number.into(), window: std::time::Duration::from_secs(1) };
    spec.rate_limits = (0..8).map(|_| limit(text(64))).collect();
    spec.quota = Some(Quota { limit: number.into(), period: QuotaPeriod::Total });
    spec.expires_at = Some(at_seconds(number.into()));
    spec.metadata = BTreeMap::from([("note".to_owned(), text(4000))]);
    key.disabled_at = Some(at_seconds(1));
    key
}

fn revoked(key: &ApiKey) -> ApiKey {
    let comment = "as long as it may be".repeat(50);
    ApiKey {
        revocation: Some(Revocation { at: at_seconds(5), reason: RevokeReason::Compromised, comment }),
        ..key.clone()
    }
}

const KEYS: u32 = 2048;
const LIMIT: usize = 200;

/// The bytes per key in an index that `fill` has filled with [`KEYS`] keys.
fn bytes_per_key(fill: impl FnOnce(&Index)) -> usize {
    let empty = live();
    let index = Index::default();
    let before = live();
    fill(&index);
    assert_eq!(index.len(), KEYS as usize);
    // Deferred reclamation holds nothing back: there are no concurrent readers.
    let bytes = (live() - before) / KEYS as usize;
    drop(index);
    assert!(live() - empty < 1024 * 1024, "what is dropped is free again");
    bytes
}

#[test]
fn a_revoked_key_takes_at_most_200_bytes_whatever_it_granted() {
    let revoked_here = bytes_per_key(|index| {
        for number in 0..KEYS {
            let key = largest(number);
            index.upsert_keys(std::iter::once(&key));
            // Its limits are used, so that their state must be dropped too.
            let found = index.find_by_digest(&key.secrets[0].digest).unwrap();
            let consumption = Consumption { cost: 1, dedup_id: None, dry_run: false };
            found.limit_state.unwrap().consume(&found.key, consumption, false, at_seconds(1)).unwrap();
        }
        let alive = live();
        for number in 0..KEYS {
            index.upsert_keys(std::iter::once(&revoked(&largest(number))));
        }
        // The hourly eviction removes policies that no key has any more.
        index.evict(at_seconds(0));
        assert!(alive > live());
    });
    assert!(revoked_here <= LIMIT, "{revoked_here} bytes of a key that was revoked here");
    let loaded = bytes_per_key(|index| {
        for number in 0..KEYS {
            index.load_record(SnapshotRecord::Key(Arc::new(revoked(&largest(number))), vec![]));
        }
        index.finish_load(Revision(1));
    });
    assert!(loaded <= LIMIT, "{loaded} bytes of a key that was loaded");
}
