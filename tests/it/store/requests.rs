//! Requests that may be sent again are done once.

use keyward::{
    domain::{
        key::ApiKey,
        name::{IdempotencyKey, KeyId},
    },
    store::{IDEMPOTENCY_WINDOW, IdempotentRequest, WriteOutcome, WriteRejection, WriteRequest},
};

use super::{
    SharedStore, commit_key, create, key, new_key_id, read_key, timestamp, try_commit, with_accounts,
};

/// A write under an idempotency key, at `seconds`.
fn once(key: &ApiKey, caller: KeyId, name: &str, fingerprint: u8, seconds: i64) -> WriteRequest {
    WriteRequest {
        at: timestamp(seconds),
        idempotency: Some(IdempotentRequest {
            caller,
            key: IdempotencyKey::parse(name).unwrap(),
            fingerprint: [fingerprint; 32],
        }),
        ..create(key)
    }
}

pub(super) async fn the_same_request_is_done_once(store: SharedStore) {
    with_accounts(&store).await;
    let (caller, other) = (new_key_id(timestamp(0)), new_key_id(timestamp(0)));
    let made = commit_key(&store, once(&key(), caller, "a", 1, 0)).await;
    let head = store.log_head().await.unwrap();
    match try_commit(&store, once(&key(), caller, "a", 1, 1)).await {
        Ok(WriteOutcome::Replayed(id)) => assert_eq!(id, made.id),
        outcome => panic!("{outcome:?}"),
    }
    assert_eq!(
        try_commit(&store, once(&key(), caller, "a", 2, 1)).await.unwrap_err(),
        WriteRejection::IdempotencyReused
    );
    assert_eq!(store.log_head().await.unwrap(), head, "nothing was recorded");

    let name = IdempotencyKey::parse("a").unwrap();
    let found = store.find_idempotent_request(caller, &name, timestamp(0)).await.unwrap();
    assert_eq!(found, Some((made.id, [1; 32])));
    assert_eq!(
        store.find_idempotent_request(caller, &name, timestamp(1)).await.unwrap(),
        None,
        "made before"
    );
    assert_eq!(store.find_idempotent_request(other, &name, timestamp(0)).await.unwrap(), None);
    // Another caller's, and another name.
    commit_key(&store, once(&key(), other, "a", 2, 1)).await;
    commit_key(&store, once(&key(), caller, "b", 2, 1)).await;
}

pub(super) async fn an_idempotency_key_counts_for_24_hours(store: SharedStore) {
    with_accounts(&store).await;
    let caller = new_key_id(timestamp(0));
    let day = i64::try_from(IDEMPOTENCY_WINDOW.as_secs()).unwrap();
    let first = commit_key(&store, once(&key(), caller, "a", 1, 0)).await;
    match try_commit(&store, once(&key(), caller, "a", 1, day)).await {
        Ok(WriteOutcome::Replayed(id)) => assert_eq!(id, first.id),
        outcome => panic!("{outcome:?}"),
    }
    let second = commit_key(&store, once(&key(), caller, "a", 2, day + 1)).await;
    let found = store
        .find_idempotent_request(caller, &IdempotencyKey::parse("a").unwrap(), timestamp(0))
        .await
        .unwrap();
    assert_eq!(found, Some((second.id, [2; 32])));
}

pub(super) async fn the_same_request_twice_in_a_batch_is_done_once(store: SharedStore) {
    with_accounts(&store).await;
    let caller = new_key_id(timestamp(0));
    let (first, second) = (key(), key());
    let batch = [once(&first, caller, "a", 1, 0), once(&second, caller, "a", 1, 0)];
    let committed = store.commit(&batch).await.unwrap();
    assert!(
        matches!(committed.outcomes[..], [Ok(WriteOutcome::Applied(_)), Ok(WriteOutcome::Replayed(id))] if id == first.id)
    );
    assert!(read_key(&store, second.id).await.is_none());
}
