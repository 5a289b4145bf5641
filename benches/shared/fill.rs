//! A store with many keys, written without a server: a server would need longer to be given them.

use std::{sync::Arc, time::Instant};

use keyward::{
    clock::{Clock as _, SystemClock},
    domain::{
        log::{Actor, AuditAction, RecordChange},
        time::Revision,
        token::TokenDigest,
    },
    store::{self, ReadSet, Store, WriteRequest},
};

use crate::sample;

/// What SQLite may keep in memory while it is filled, in pages of 4 KiB; and zero, which is its default.
const FILL_CACHE_PAGES: u32 = 1 << 18;
const DEFAULT_CACHE_PAGES: u32 = 0;
/// Keys in one transaction; more of them write each page of an index fewer times.
const BATCH: u64 = 20_000;

/// Says in an SQLite file how many pages whoever opens it may keep in memory. With the usual 2 MB most of a million
/// keys' time would go into reading pages again and writing them early.
fn set_cache_pages(path: &str, pages: u32) {
    let file = rusqlite::Connection::open(path).unwrap();
    file.execute_batch(&format!("PRAGMA default_cache_size = {pages}")).unwrap();
}

/// Puts accounts and keys into a store, unless it has as many entries.
pub(crate) async fn fill(url: &str, keys: u64) {
    store::open(url).await.unwrap().close().await;
    let cached =
        |pages| url.strip_prefix("sqlite:").into_iter().for_each(|path| set_cache_pages(path, pages));
    cached(FILL_CACHE_PAGES);
    add(url, keys).await;
    cached(DEFAULT_CACHE_PAGES);
}

async fn add(url: &str, keys: u64) {
    let store = store::open(url).await.unwrap();
    if store.log_head().await.unwrap().revision < Revision(keys) {
        let began = Instant::now();
        let now = SystemClock.now();
        let account = |number| RecordChange::Account(Arc::new(sample::account(number, now)));
        commit(&*store, (0..sample::ACCOUNTS).map(account).collect()).await;
        let sets = sample::scope_sets();
        let key = |number| {
            let digest = TokenDigest::from_token(&format!("token {number}"));
            RecordChange::Key(Arc::new(sample::key(number, digest, &sets, now)))
        };
        for first in (0..keys).step_by(usize::try_from(BATCH).unwrap()) {
            let batch = (first..keys.min(first + BATCH)).map(key).collect();
            commit(&*store, batch).await;
        }
        println!("{keys} keys put into the store in {:.0} s", began.elapsed().as_secs_f64());
    }
    store.close().await;
}

async fn commit(store: &dyn Store, changes: Vec<RecordChange>) {
    let write = |change| WriteRequest {
        change,
        expected_revision: None,
        action: AuditAction::KeyImported,
        actor: Actor::SYSTEM,
        method: "bench",
        at: SystemClock.now(),
        idempotency: None,
        read_set: ReadSet::default(),
        limits: None,
    };
    let batch: Vec<_> = changes.into_iter().map(write).collect();
    let committed = store.commit(&batch).await.unwrap();
    assert!(committed.outcomes.iter().all(Result::is_ok));
}
