//! The read set of a change: what was read to authorize it is expected in its transaction, each record by its place.

use std::sync::Arc;

use keyward::{
    domain::{
        account::Account,
        log::RecordChange,
        name::{IdempotencyKey, RoleName, UserId},
        time::{Revision, Timestamp},
    },
    store::{
        IdempotentRequest, ReadSet, ReadState, RecordId, WriteOutcome, WriteRejection, WriteRequest,
        group_commit::{ChangeListener, CommitHandle, WriteError},
    },
};

use super::*;

fn role_at(account: Option<&str>, name: &str) -> RecordId {
    RecordId::Role(account.map(account_id), RoleName::parse(name).unwrap())
}

fn member_at(account: &str, user: &str) -> RecordId {
    RecordId::Member(account_id(account), UserId::parse(user).unwrap())
}

/// A new key that was authorized by this.
fn authorized_by(reads: &[(RecordId, ReadState)]) -> WriteRequest {
    let mut set = ReadSet::default();
    reads.iter().for_each(|(place, seen)| set.add(place.clone(), *seen));
    WriteRequest { read_set: set, ..create(&key()) }
}

/// Commits a change and sees that what was authorized before is not made after it.
async fn moves(
    store: &SharedStore,
    what: &str,
    place: RecordId,
    seen: ReadState,
    change: WriteRequest,
) -> Revision {
    let before = || authorized_by(&[(role_at(None, "nobody"), ReadState::Absent), (place.clone(), seen)]);
    commit_key(store, before()).await;
    try_commit(store, change).await.unwrap_or_else(|rejection| panic!("{what}: {rejection:?}"));
    let head = store.log_head().await.unwrap().revision;
    assert_eq!(
        try_commit(store, before()).await.unwrap_err(),
        WriteRejection::AuthorizationChanged,
        "{what}"
    );
    assert_eq!(store.log_head().await.unwrap().revision, head, "{what}: nothing is recorded");
    head
}

pub(super) async fn a_change_is_rejected_after_any_record_has_moved_that_it_was_authorized_by(
    store: SharedStore,
) {
    let acme = commit_account(&store, &account("acme"), None).await;
    let global = commit_role(&store, put_role(&role(None, "admin"))).await;

    // A role in the account that hides the global one: each is a place of its own.
    let own = role_at(Some("acme"), "admin");
    let made = moves(
        &store,
        "a role appears",
        own.clone(),
        ReadState::Absent,
        put_role(&role(Some("acme"), "admin")),
    );
    let role = Role { revision: made.await, ..role(Some("acme"), "admin") };
    commit_key(&store, authorized_by(&[(role_at(None, "admin"), ReadState::AtRevision(global.revision))]))
        .await;
    let changed =
        moves(&store, "a role changes", own.clone(), ReadState::AtRevision(role.revision), put_role(&role))
            .await;
    let role = Role { revision: changed, ..role };
    moves(&store, "a role is deleted", own.clone(), ReadState::AtRevision(role.revision), delete_role(&role))
        .await;
    let again = put_role(&Role { revision: Revision::default(), ..role });
    moves(&store, "a role is made again", own, ReadState::Absent, again).await;

    let place = member_at("acme", "ann");
    let ann = member("acme", "ann", "admin");
    let joined = moves(&store, "a member joins", place.clone(), ReadState::Absent, put_member(&ann)).await;
    let ann = AccountMember { revision: joined, ..ann };
    let changed =
        moves(&store, "a member changes", place.clone(), ReadState::AtRevision(joined), put_member(&ann))
            .await;
    let ann = AccountMember { revision: changed, ..ann };
    moves(&store, "a member leaves", place, ReadState::AtRevision(changed), remove_member(&ann)).await;

    let suspended = Account { suspended_at: Some(timestamp(1)), ..acme.clone() };
    let suspend =
        write(RecordChange::Account(Arc::new(suspended)), Some(acme.revision), AuditAction::AccountSuspended);
    let seen = ReadState::AtRevision(acme.revision);
    moves(&store, "an account is suspended", RecordId::Account(acme.id), seen, suspend).await;

    let caller = commit_key(&store, create(&key())).await;
    let seen = ReadState::UnchangedSince(store.log_head().await.unwrap().revision);
    moves(&store, "a key changes", RecordId::Key(caller.id), seen, update(&caller)).await;
    let never =
        authorized_by(&[(RecordId::Key(key().id), ReadState::UnchangedSince(Revision(u64::MAX >> 1)))]);
    assert_eq!(
        try_commit(&store, never).await.unwrap_err(),
        WriteRejection::AuthorizationChanged,
        "a key that is gone"
    );
    let place = role_at(None, "admin");
    let twice =
        authorized_by(&[(place.clone(), ReadState::AtRevision(global.revision)), (place, ReadState::Absent)]);
    assert_eq!(
        try_commit(&store, twice).await.unwrap_err(),
        WriteRejection::AuthorizationChanged,
        "changed between reads"
    );
}

pub(super) async fn a_change_sees_the_records_that_those_before_it_in_its_batch_have_moved(
    store: SharedStore,
) {
    let acme = commit_account(&store, &account("acme"), None).await;
    let caller = commit_key(&store, create(&key())).await;
    let head = store.log_head().await.unwrap().revision;
    let by_role = || authorized_by(&[(role_at(Some("acme"), "admin"), ReadState::Absent)]);
    let by_key = || authorized_by(&[(RecordId::Key(caller.id), ReadState::UnchangedSince(head))]);
    let by_account =
        || authorized_by(&[(RecordId::Account(acme.id.clone()), ReadState::AtRevision(acme.revision))]);
    let batch = [
        by_role(),
        put_role(&role(Some("acme"), "admin")),
        by_role(),
        by_key(),
        update(&revoked(caller.clone(), timestamp(1))),
        by_key(),
        by_account(),
        write(
            RecordChange::Account(Arc::new(acme.clone())),
            Some(acme.revision),
            AuditAction::AccountUpdated,
        ),
        by_account(),
    ];
    let outcomes = store.commit(&batch).await.unwrap().outcomes;
    let moved: Vec<_> = outcomes.into_iter().map(|outcome| outcome.err()).collect();
    let rejected = Some(WriteRejection::AuthorizationChanged);
    let moved_like = [None, None, rejected];
    assert_eq!(moved, [moved_like.clone(), moved_like.clone(), moved_like].concat());
}

pub(super) async fn a_request_that_was_done_is_replayed_whatever_has_moved_since(store: SharedStore) {
    with_accounts(&store).await;
    let once = |seen| WriteRequest {
        idempotency: Some(IdempotentRequest {
            caller: KeyId::from_bytes([7; 16]),
            key: IdempotencyKey::parse("once").unwrap(),
            fingerprint: [1; 32],
        }),
        ..authorized_by(&[(role_at(None, "admin"), seen)])
    };
    let made = commit_key(&store, once(ReadState::Absent)).await;
    let again = try_commit(&store, once(ReadState::AtRevision(Revision(1)))).await.unwrap();
    assert!(matches!(again, WriteOutcome::Replayed(id) if id == made.id), "{again:?}");
}

/// Follows nothing: what is committed here is read from the store.
struct IgnoringListener;

impl ChangeListener for IgnoringListener {
    fn applied_revision(&self) -> Revision {
        Revision(u64::MAX >> 1)
    }

    fn apply_local(&self, _: &[(LogEntry, RecordChange)]) {}

    fn mark_uncertain(&self, _: &WriteRequest) {}

    fn resolve_uncertain(&self) {}
}

pub(super) async fn an_authorization_that_has_run_out_in_the_queue_commits_nothing(store: SharedStore) {
    with_accounts(&store).await;
    let (writer, _task) = CommitHandle::spawn(store.clone(), Arc::new(IgnoringListener), || timestamp(50));
    let until = |end: Timestamp| {
        let mut write = create(&key());
        write.read_set.limit_until(end);
        write
    };
    writer.write(until(timestamp(51))).await.unwrap();
    let head = store.log_head().await.unwrap();
    for end in [timestamp(50), timestamp(49)] {
        let refused = writer.write(until(end)).await.unwrap_err();
        assert!(matches!(refused, WriteError::Rejected(WriteRejection::AuthorizationChanged)), "{refused}");
    }
    assert_eq!(store.log_head().await.unwrap(), head);
}
