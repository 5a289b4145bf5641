//! Snapshots: everything that a Check needs, as of one revision.

use std::{collections::BTreeSet, time::Duration};

use keyward::{
    domain::{
        account::Account,
        key::{ApiKey, KeySecret},
        limit::{PendingQuotaUnits, QuotaUsage},
        time::Timestamp,
    },
    store::{LogHead, SnapshotRecord},
};
use proptest::{
    strategy::{Strategy as _, ValueTree as _},
    test_runner::TestRunner,
};

use crate::snapshot_loader;

use super::{records::records, *};

pub(super) async fn snapshot(
    store: &SharedStore,
    forget_before: Timestamp,
) -> (LogHead, Vec<Account>, Vec<(ApiKey, Vec<KeySecret>)>) {
    let (mut accounts, mut keys) = (Vec::new(), Vec::new());
    let (head, items) = snapshot_loader::load_snapshot(store, forget_before).await.unwrap();
    for item in items {
        match item {
            SnapshotRecord::Account(account) => accounts.push(account),
            SnapshotRecord::Key(key, left) => keys.push((Arc::unwrap_or_clone(key), left)),
            _ => {}
        }
    }
    accounts.sort_by(|a, b| a.id.cmp(&b.id));
    keys.sort_by_key(|(key, _)| key.id);
    (head, accounts, keys)
}

/// A record as a snapshot has it: what people are shown of a token is left out.
fn unhinted(mut key: ApiKey) -> ApiKey {
    key.secrets.iter_mut().for_each(|secret| secret.hint.clear());
    key
}

pub(super) async fn a_snapshot_holds_everything_that_was_written(store: SharedStore) {
    with_roles(&store).await;
    let accounts = [
        commit_account(&store, &account("acme"), None).await,
        commit_account(&store, &Account { suspended_at: Some(timestamp(1)), ..account("globex") }, None)
            .await,
    ];
    let mut expected = Vec::new();
    let mut runner = TestRunner::deterministic();
    for count in 0..40 {
        let mut record = records().new_tree(&mut runner).unwrap().current();
        record.spec.name = None;
        record.revocation = None;
        let mut record = commit_key(&store, create(&record)).await;
        let mut left = Vec::new();
        // Some are rotated, often enough that secrets leave the record.
        for turn in 0..count % 4 {
            let before = record.secrets.clone();
            record.rotate(new_digest(), format!("hint {turn}"), Duration::from_secs(100), timestamp(turn));
            record = commit_key(&store, update(&record)).await;
            for mut gone in
                before.into_iter().filter(|old| record.secrets.iter().all(|kept| kept.version != old.version))
            {
                // It ended, at the latest, when the one after the next was made.
                gone.expires_at =
                    Some(gone.expires_at.map_or(timestamp(turn), |end| end.min(timestamp(turn))));
                gone.hint.clear();
                left.insert(0, gone);
            }
        }
        expected.push((unhinted(record), left));
    }
    expected.sort_by_key(|(key, _)| key.id);
    let (head, found_accounts, found) = snapshot(&store, Timestamp::from_micros(i64::MIN)).await;
    assert_eq!(head, store.log_head().await.unwrap());
    assert_eq!(found_accounts, accounts);
    assert_eq!(found.len(), expected.len());
    for (found, expected) in found.iter().zip(&expected) {
        assert_eq!(found, expected);
    }
}

pub(super) async fn a_snapshot_holds_nothing_of_what_a_revoked_key_granted(store: SharedStore) {
    with_roles(&store).await;
    with_accounts(&store).await;
    let mut runner = TestRunner::deterministic();
    for count in 0..20 {
        let record = records().new_tree(&mut runner).unwrap().current();
        let record = ApiKey { owner: KeyOwner::Account(account_id("acme")), ..record };
        let made = commit_key(&store, create(&ApiKey { revocation: None, ..record })).await;
        let drawn = PendingQuotaUnits { period_start: timestamp(0), period_end: None, units: 1 };
        store
            .record_usage(&UsageBatch { quota_units: vec![(made.id, drawn)], ..UsageBatch::default() })
            .await
            .unwrap();
        let dead = commit_key(&store, update(&revoked(made, timestamp(count)))).await;
        let items = snapshot_loader::load_snapshot(&store, timestamp(0)).await.unwrap().1;
        let found = items.iter().find_map(|item| match item {
            SnapshotRecord::Key(key, _) if key.id == dead.id => Some(ApiKey::clone(key)),
            _ => None,
        });
        let ApiKey { spec: terms, .. } = key();
        let nothing = KeySpec { scopes: Default::default(), ..terms };
        assert_eq!(found, Some(unhinted(ApiKey { spec: nothing, ..dead })));
        assert!(!items.iter().any(|item| matches!(item, SnapshotRecord::QuotaUsage(..))));
    }
}

pub(super) async fn a_snapshot_leaves_out_what_is_dead_for_too_long(store: SharedStore) {
    with_accounts(&store).await;
    let alive = commit_key(&store, create(&key())).await;
    let fresh = commit_key(&store, create(&revoked(key(), timestamp(10)))).await;
    commit_key(&store, create(&revoked(key(), timestamp(9)))).await;
    let mut rotated = commit_key(&store, create(&key())).await;
    for second in [5, 9, 11, 20] {
        rotated.rotate(new_digest(), String::new(), Duration::ZERO, timestamp(second));
        rotated = commit_key(&store, update(&rotated)).await;
    }
    let (_, _, found) = snapshot(&store, timestamp(10)).await;
    let ids: BTreeSet<_> = found.iter().map(|(key, _)| key.id).collect();
    assert_eq!(ids, BTreeSet::from([alive.id, fresh.id, rotated.id]));
    let (_, left) = found.iter().find(|(key, _)| key.id == rotated.id).unwrap();
    let versions: Vec<_> = left.iter().map(|secret| secret.version).collect();
    assert_eq!(versions, [3], "1 and 2 ended at 5 and 9; 4 and 5 are in the record");
}

pub(super) async fn reads_see_whole_commits_while_others_write(store: SharedStore) {
    with_accounts(&store).await;
    let writing = store.clone();
    let writer = tokio::spawn(async move {
        for _ in 0..50 {
            let batch: Vec<_> = (0..4).map(|_| create(&key())).collect();
            writing.commit(&batch).await.unwrap();
        }
    });
    while !writer.is_finished() {
        let (head, _, keys) = snapshot(&store, timestamp(0)).await;
        assert_eq!(keys.len() as u64, head.revision.0 - 2);
        assert_eq!(keys.len() % 4, 0, "half a batch shows");
    }
    writer.await.unwrap();
}

pub(super) async fn a_snapshot_holds_roles_members_and_what_is_spent(store: SharedStore) {
    with_accounts(&store).await;
    let mut roles = vec![
        commit_role(&store, put_role(&role(None, "agent"))).await,
        commit_role(&store, put_role(&role(Some("acme"), "agent"))).await,
    ];
    let gone = commit_role(&store, put_role(&role(Some("acme"), "gone"))).await;
    commit_role(&store, delete_role(&gone)).await;
    let mut members = vec![commit_member(&store, put_member(&member("acme", "u1", "agent"))).await];
    members.push(commit_member(&store, put_member(&member("globex", "u1", "agent"))).await);
    let left = commit_member(&store, put_member(&member("acme", "u2", "agent"))).await;
    commit_member(&store, remove_member(&left)).await;
    let made = commit_key(&store, create(&key())).await;
    let spent = QuotaUsage { period_start: timestamp(0), used_units: u64::from(u32::MAX) };
    let drawn =
        PendingQuotaUnits { period_start: spent.period_start, period_end: None, units: spent.used_units };
    let batch = UsageBatch { quota_units: vec![(made.id, drawn)], ..UsageBatch::default() };
    store.record_usage(&batch).await.unwrap();

    let (mut found_roles, mut found_members, mut found_spent) = (vec![], vec![], vec![]);
    for item in snapshot_loader::load_snapshot(&store, timestamp(0)).await.unwrap().1 {
        match item {
            SnapshotRecord::Role(role) => found_roles.push(role),
            SnapshotRecord::Member(member) => found_members.push(member),
            SnapshotRecord::QuotaUsage(key, spent) => found_spent.push((key, spent)),
            SnapshotRecord::Account(_) => {}
            SnapshotRecord::Key(key, _) => assert_eq!(*key, unhinted(made.clone())),
        }
    }
    roles.sort_by(|a, b| a.account.cmp(&b.account));
    found_roles.sort_by(|a, b| a.account.cmp(&b.account));
    found_members.sort_by(|a, b| a.account.cmp(&b.account));
    assert_eq!((found_roles, found_members, found_spent), (roles, members, vec![(made.id, spent)]));
}

/// More than any backend asks for at once.
pub(super) async fn a_snapshot_of_many_keys_has_each_of_them_once(store: SharedStore) {
    const KEYS: usize = 21_001;
    with_accounts(&store).await;
    let mut made = BTreeSet::new();
    while made.len() < KEYS {
        let keys: Vec<_> = (0..3_000.min(KEYS - made.len())).map(|_| key()).collect();
        made.extend(keys.iter().map(|key| key.id));
        let batch: Vec<_> = keys.iter().map(create).collect();
        assert!(store.commit(&batch).await.unwrap().outcomes.iter().all(Result::is_ok));
    }
    let (_, _, found) = snapshot(&store, timestamp(0)).await;
    assert_eq!(found.len(), KEYS);
    assert!(found.iter().map(|(key, _)| key.id).eq(made));
    assert_eq!(snapshot_loader::count_parts(&store).await, 2, "two read at once");
}
