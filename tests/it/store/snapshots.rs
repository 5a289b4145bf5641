//! Snapshots: everything that a Check needs, as of one revision.

use std::{collections::BTreeSet, time::Duration};

use keyward::{
    domain::{
        account::Account,
        key::{Key, Secret},
        limit::{Drawn, Spent},
        time::Timestamp,
    },
    store::{Head, SnapshotItem},
};
use proptest::{
    strategy::{Strategy as _, ValueTree as _},
    test_runner::TestRunner,
};

use crate::loaded;

use super::{records::records, *};

pub(super) async fn snapshot(
    store: &Shared,
    forget_before: Timestamp,
) -> (Head, Vec<Account>, Vec<(Key, Vec<Secret>)>) {
    let (mut accounts, mut keys) = (Vec::new(), Vec::new());
    let (head, items) = loaded::snapshot(store, forget_before).await.unwrap();
    for item in items {
        match item {
            SnapshotItem::Account(account) => accounts.push(account),
            SnapshotItem::Key(key, left) => keys.push((Arc::unwrap_or_clone(key), left)),
            _ => {}
        }
    }
    accounts.sort_by(|a, b| a.id.cmp(&b.id));
    keys.sort_by_key(|(key, _)| key.id);
    (head, accounts, keys)
}

/// A record as a snapshot has it: what people are shown of a token is left out.
fn unhinted(mut key: Key) -> Key {
    key.secrets.iter_mut().for_each(|secret| secret.hint.clear());
    key
}

pub(super) async fn a_snapshot_holds_everything_that_was_written(store: Shared) {
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
                gone.hint.clear();
                left.insert(0, gone);
            }
        }
        expected.push((unhinted(record), left));
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

pub(super) async fn a_snapshot_holds_nothing_of_what_a_revoked_key_granted(store: Shared) {
    with_roles(&store).await;
    with_accounts(&store).await;
    let mut runner = TestRunner::deterministic();
    for count in 0..20 {
        let record = records().new_tree(&mut runner).unwrap().current();
        let record = Key { owner: Owner::Account(account_id("acme")), ..record };
        let made = put(&store, create(&Key { revocation: None, ..record })).await;
        let drawn = Drawn { period: at(0), until: None, units: 1 };
        store
            .note_usage(&UsageBatch { spent: vec![(made.id, drawn)], ..UsageBatch::default() })
            .await
            .unwrap();
        let dead = put(&store, update(&revoked(made, at(count)))).await;
        let items = loaded::snapshot(&store, at(0)).await.unwrap().1;
        let found = items.iter().find_map(|item| match item {
            SnapshotItem::Key(key, _) if key.id == dead.id => Some(Key::clone(key)),
            _ => None,
        });
        let Key { terms, .. } = key();
        let nothing = Terms { scopes: Default::default(), ..terms };
        assert_eq!(found, Some(unhinted(Key { terms: nothing, ..dead })));
        assert!(!items.iter().any(|item| matches!(item, SnapshotItem::Spent(..))));
    }
}

pub(super) async fn a_snapshot_leaves_out_what_is_dead_for_too_long(store: Shared) {
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

pub(super) async fn reads_see_whole_commits_while_others_write(store: Shared) {
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

pub(super) async fn a_snapshot_holds_roles_members_and_what_is_spent(store: Shared) {
    with_accounts(&store).await;
    let mut roles = vec![
        made_role(&store, put_role(&role(None, "agent"))).await,
        made_role(&store, put_role(&role(Some("acme"), "agent"))).await,
    ];
    let gone = made_role(&store, put_role(&role(Some("acme"), "gone"))).await;
    made_role(&store, delete_role(&gone)).await;
    let mut members = vec![made_member(&store, put_member(&member("acme", "u1", "agent"))).await];
    members.push(made_member(&store, put_member(&member("globex", "u1", "agent"))).await);
    let left = made_member(&store, put_member(&member("acme", "u2", "agent"))).await;
    made_member(&store, remove_member(&left)).await;
    let made = put(&store, create(&key())).await;
    let spent = Spent { period: at(0), used: u64::from(u32::MAX) };
    let drawn = Drawn { period: spent.period, until: None, units: spent.used };
    let batch = UsageBatch { spent: vec![(made.id, drawn)], ..UsageBatch::default() };
    store.note_usage(&batch).await.unwrap();

    let (mut found_roles, mut found_members, mut found_spent) = (vec![], vec![], vec![]);
    for item in loaded::snapshot(&store, at(0)).await.unwrap().1 {
        match item {
            SnapshotItem::Role(role) => found_roles.push(role),
            SnapshotItem::Member(member) => found_members.push(member),
            SnapshotItem::Spent(key, spent) => found_spent.push((key, spent)),
            SnapshotItem::Account(_) => {}
            SnapshotItem::Key(key, _) => assert_eq!(*key, unhinted(made.clone())),
        }
    }
    roles.sort_by(|a, b| a.account.cmp(&b.account));
    found_roles.sort_by(|a, b| a.account.cmp(&b.account));
    found_members.sort_by(|a, b| a.account.cmp(&b.account));
    assert_eq!((found_roles, found_members, found_spent), (roles, members, vec![(made.id, spent)]));
}

/// More than any backend asks for at once.
pub(super) async fn a_snapshot_of_many_keys_has_each_of_them_once(store: Shared) {
    const KEYS: usize = 21_001;
    with_accounts(&store).await;
    let mut made = BTreeSet::new();
    while made.len() < KEYS {
        let keys: Vec<_> = (0..3_000.min(KEYS - made.len())).map(|_| key()).collect();
        made.extend(keys.iter().map(|key| key.id));
        let batch: Vec<_> = keys.iter().map(create).collect();
        assert!(store.commit(&batch).await.unwrap().outcomes.iter().all(Result::is_ok));
    }
    let (_, _, found) = snapshot(&store, at(0)).await;
    assert_eq!(found.len(), KEYS);
    assert!(found.iter().map(|(key, _)| key.id).eq(made));
    assert_eq!(loaded::parts(&store).await, 2, "two read at once");
}
