//! Batches: each write stands or falls alone, in the light of those before it, and revisions count in commit order.

use std::{
    collections::BTreeSet,
    sync::{Mutex, atomic::Ordering},
    time::Duration,
};

use keyward::{
    domain::{name::KeyName, time::Revision},
    store::{
        WriteOutcome, WriteRejection, WriteRequest,
        group_commit::{ChangeListener, CommitHandle, WriteError},
    },
};

use super::*;

pub(super) async fn a_rejected_write_leaves_its_batch_alone(store: SharedStore) {
    with_accounts(&store).await;
    let made = commit_key(&store, create(&named("taken"))).await;
    let (good, last) = (key(), key());
    let twin = ApiKey { id: new_key_id(timestamp(0)), ..good.clone() };
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
    let outcomes: Vec<_> = committed.outcomes.iter().map(|outcome| outcome.as_ref().err().cloned()).collect();
    assert_eq!(
        outcomes,
        [
            None,
            Some(WriteRejection::NameTaken),
            Some(WriteRejection::DigestTaken),
            Some(WriteRejection::Conflict),
            Some(WriteRejection::Conflict),
            None,
            None,
            Some(WriteRejection::Conflict)
        ]
    );
    let revisions: Vec<_> = committed.entries.iter().map(|(row, _)| row.revision.0).collect();
    assert_eq!(revisions, [4, 5, 6], "without gaps");
    for (row, change) in &committed.entries {
        assert_eq!(serde_json::from_str::<RecordChange>(&row.payload).unwrap(), *change);
    }
    for id in [good.id, last.id] {
        assert!(read_key(&store, id).await.is_some());
    }
    assert!(read_key(&store, twin.id).await.is_none());
    let rows: Vec<_> = committed.entries.into_iter().map(|(row, _)| row).collect();
    assert_eq!(whole_chain(&store).await[3..], rows);
}

pub(super) async fn a_batch_of_rejections_records_nothing(store: SharedStore) {
    with_accounts(&store).await;
    let head = store.log_head().await.unwrap();
    let committed = store.commit(&[create_account(&account("acme"))]).await.unwrap();
    assert!(committed.entries.is_empty());
    assert!(store.commit(&[]).await.unwrap().outcomes.is_empty());
    assert_eq!(store.log_head().await.unwrap(), head);
}

pub(super) async fn a_write_sees_those_before_it_in_its_batch(store: SharedStore) {
    with_accounts(&store).await;
    let agent = role(None, "agent");
    let mut user = named("first");
    user.spec.roles = vec![agent.name.clone()];
    let mut stranger = key();
    stranger.spec.roles = vec![RoleName::parse("nobody").unwrap()];
    let batch = [
        create_account(&account("initech")),
        put_role(&agent),
        put_role(&agent),
        create(&ApiKey { owner: KeyOwner::Account(account_id("initech")), ..user.clone() }),
        create(&stranger),
        put_member(&member("initech", "u1", "agent")),
        // It stands at the revision that it has just been given.
        delete_role(&Role { revision: Revision(4), ..agent.clone() }),
    ];
    let outcomes = store.commit(&batch).await.unwrap().outcomes;
    let rejections: Vec<_> = outcomes.iter().map(|outcome| outcome.as_ref().err().cloned()).collect();
    let in_use = WriteRejection::RoleInUse { keys: 1, members: 1 };
    let expected = [
        None,
        None,
        Some(WriteRejection::Conflict),
        None,
        Some(WriteRejection::RoleNotFound),
        None,
        Some(in_use),
    ];
    assert_eq!(rejections, expected);
    whole_chain(&store).await;
}

pub(super) async fn a_record_changed_often_in_a_batch_is_as_the_last_change_says(store: SharedStore) {
    with_accounts(&store).await;
    let first = named("a");
    let mut batch = vec![create(&first)];
    let mut record = first.clone();
    // The batch begins at revision 3; each change is made from the one before it.
    for turn in 0..4u64 {
        record.revision = Revision(3 + turn);
        record.rotate(new_digest(), String::new(), Duration::from_secs(100), timestamp(turn.cast_signed()));
        batch.push(update(&record));
    }
    // One that has not seen them.
    batch.push(update(&ApiKey { revision: Revision(3), ..record.clone() }));
    let joined = member("acme", "u1", "agent");
    batch.extend([
        put_role(&role(None, "agent")),
        put_member(&joined),
        remove_member(&AccountMember { revision: Revision(9), ..joined.clone() }),
        put_member(&joined),
    ]);
    let outcomes = store.commit(&batch).await.unwrap().outcomes;
    for (at, outcome) in outcomes.iter().enumerate() {
        assert_eq!(outcome.is_ok(), at != 5, "{at}: {outcome:?}");
    }
    record.revision = Revision(7);
    assert_eq!(read_key(&store, first.id).await, Some(record));
    let members = store.list_memberships(&joined.user).await.unwrap();
    assert_eq!(members, [AccountMember { revision: Revision(11), ..joined }]);
    whole_chain(&store).await;
}

pub(super) async fn names_go_from_key_to_key_within_a_batch(store: SharedStore) {
    with_accounts(&store).await;
    let first = commit_key(&store, create(&named("a"))).await;
    let second = commit_key(&store, create(&named("b"))).await;
    let renamed = |key: &ApiKey, name: &str, revision| {
        let mut key = ApiKey { revision: Revision(revision), ..key.clone() };
        key.spec.name = Some(KeyName::parse(name).unwrap());
        key
    };
    let third = named("a");
    let batch = [
        create(&named("a")),
        update(&renamed(&first, "c", first.revision.0)),
        create(&third),
        update(&renamed(&second, "a", second.revision.0)),
        update(&revoked(third.clone(), timestamp(1))),
        // Revisions 5 and 6 are the first two that were made.
        update(&revoked(ApiKey { revision: Revision(6), ..third.clone() }, timestamp(1))),
        update(&renamed(&second, "a", second.revision.0)),
        update(&renamed(&first, "b", 5)),
    ];
    let outcomes = store.commit(&batch).await.unwrap().outcomes;
    let rejections: Vec<_> = outcomes.iter().map(|outcome| outcome.as_ref().err().cloned()).collect();
    let (taken, stale) = (Some(WriteRejection::NameTaken), Some(WriteRejection::Conflict));
    assert_eq!(rejections, [taken.clone(), None, None, taken, stale, None, None, None]);
    for (id, name) in [(first.id, "b"), (second.id, "a"), (third.id, "a")] {
        let key = read_key(&store, id).await.unwrap();
        assert_eq!(key.spec.name.as_ref().map(|name| name.as_str()), Some(name));
    }
}

/// Notes what a writer tells its follower.
#[derive(Default)]
struct RecordingListener {
    revision: AtomicU64,
    changes: Mutex<Vec<(Revision, RecordChange)>>,
}

impl ChangeListener for RecordingListener {
    fn applied_revision(&self) -> Revision {
        Revision(self.revision.load(Ordering::SeqCst))
    }

    fn apply_local(&self, rows: &[(LogEntry, RecordChange)]) {
        for (row, change) in rows {
            let before = self.revision.swap(row.revision.0, Ordering::SeqCst);
            assert_eq!(row.revision.0, before + 1, "in order, without gaps");
            self.changes.lock().unwrap().push((row.revision, change.clone()));
        }
    }

    fn mark_uncertain(&self, write: &WriteRequest) {
        panic!("nothing is in doubt: {write:?}");
    }

    fn resolve_uncertain(&self) {}
}

pub(super) async fn revisions_count_in_commit_order_under_overlapping_writers(store: SharedStore) {
    const WRITERS: usize = 300;
    let heard = Arc::new(RecordingListener::default());
    let (writer, task) = CommitHandle::spawn(store.clone(), heard.clone(), || timestamp(0));
    writer.write(create_account(&account("acme"))).await.unwrap();
    let writes = (0..WRITERS).map(|at| {
        let (writer, heard) = (writer.clone(), heard.clone());
        // One in three asks for a name that is taken already.
        let key = if at % 3 == 0 { named("the one") } else { key() };
        tokio::spawn(async move {
            let outcome = writer.write(create(&key)).await;
            if let Ok(WriteOutcome::Applied(RecordChange::Key(made))) = &outcome {
                assert!(heard.applied_revision() >= made.revision, "the follower knew before the caller");
            }
            outcome
        })
    });
    let (mut revisions, mut refused) = (BTreeSet::from([1]), 0);
    for write in writes.collect::<Vec<_>>() {
        match write.await.unwrap() {
            Ok(WriteOutcome::Applied(RecordChange::Key(made))) => assert!(revisions.insert(made.revision.0)),
            Err(WriteError::Rejected(WriteRejection::NameTaken)) => refused += 1,
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
        assert_eq!(
            (row.revision, serde_json::from_str::<RecordChange>(&row.payload).unwrap()),
            (revision, change)
        );
    }
}

pub(super) async fn of_changes_from_one_revision_one_is_made(store: SharedStore) {
    with_accounts(&store).await;
    let made = commit_key(&store, create(&key())).await;
    let heard = RecordingListener::default();
    heard.revision.store(store.log_head().await.unwrap().revision.0, Ordering::SeqCst);
    let (writer, _task) = CommitHandle::spawn(store.clone(), Arc::new(heard), || timestamp(0));
    let changes = (0..20).map(|_| {
        let (writer, write) = (writer.clone(), update(&made));
        tokio::spawn(async move { writer.write(write).await })
    });
    let mut done = 0;
    for change in changes.collect::<Vec<_>>() {
        match change.await.unwrap() {
            Ok(_) => done += 1,
            Err(error) => assert!(matches!(error, WriteError::Rejected(WriteRejection::Conflict)), "{error}"),
        }
    }
    assert_eq!(done, 1);
}
