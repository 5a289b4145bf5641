//! Requests that may be sent again are done once.

use keyward::{
    domain::{
        key::Key,
        name::{IdempotencyKey, KeyId},
    },
    store::{IDEMPOTENCY_WINDOW, Idempotency, Outcome, Rejection, Write},
};

use super::{Shared, at, create, fresh_id, key, put, read, try_one, with_accounts};

/// A write under an idempotency key, at `seconds`.
fn once(key: &Key, caller: KeyId, name: &str, fingerprint: u8, seconds: i64) -> Write {
    Write {
        at: at(seconds),
        idempotency: Some(Idempotency {
            caller,
            key: IdempotencyKey::parse(name).unwrap(),
            fingerprint: [fingerprint; 32],
        }),
        ..create(key)
    }
}

pub(super) async fn the_same_request_is_done_once(store: Shared) {
    with_accounts(&store).await;
    let (caller, other) = (fresh_id(at(0)), fresh_id(at(0)));
    let made = put(&store, once(&key(), caller, "a", 1, 0)).await;
    let head = store.head().await.unwrap();
    match try_one(&store, once(&key(), caller, "a", 1, 1)).await {
        Ok(Outcome::Replayed(id)) => assert_eq!(id, made.id),
        outcome => panic!("{outcome:?}"),
    }
    assert_eq!(
        try_one(&store, once(&key(), caller, "a", 2, 1)).await.unwrap_err(),
        Rejection::IdempotencyReused
    );
    assert_eq!(store.head().await.unwrap(), head, "nothing was recorded");

    let name = IdempotencyKey::parse("a").unwrap();
    let found = store.idempotent(caller, &name, at(0)).await.unwrap();
    assert_eq!(found, Some((made.id, [1; 32])));
    assert_eq!(store.idempotent(caller, &name, at(1)).await.unwrap(), None, "made before");
    assert_eq!(store.idempotent(other, &name, at(0)).await.unwrap(), None);
    // Another caller's, and another name.
    put(&store, once(&key(), other, "a", 2, 1)).await;
    put(&store, once(&key(), caller, "b", 2, 1)).await;
}

pub(super) async fn an_idempotency_key_counts_for_24_hours(store: Shared) {
    with_accounts(&store).await;
    let caller = fresh_id(at(0));
    let day = i64::try_from(IDEMPOTENCY_WINDOW.as_secs()).unwrap();
    let first = put(&store, once(&key(), caller, "a", 1, 0)).await;
    match try_one(&store, once(&key(), caller, "a", 1, day)).await {
        Ok(Outcome::Replayed(id)) => assert_eq!(id, first.id),
        outcome => panic!("{outcome:?}"),
    }
    let second = put(&store, once(&key(), caller, "a", 2, day + 1)).await;
    let found = store.idempotent(caller, &IdempotencyKey::parse("a").unwrap(), at(0)).await.unwrap();
    assert_eq!(found, Some((second.id, [2; 32])));
}

pub(super) async fn the_same_request_twice_in_a_batch_is_done_once(store: Shared) {
    with_accounts(&store).await;
    let caller = fresh_id(at(0));
    let (first, second) = (key(), key());
    let batch = [once(&first, caller, "a", 1, 0), once(&second, caller, "a", 1, 0)];
    let committed = store.commit(&batch).await.unwrap();
    assert!(
        matches!(committed.outcomes[..], [Ok(Outcome::Applied(_)), Ok(Outcome::Replayed(id))] if id == first.id)
    );
    assert!(read(&store, second.id).await.is_none());
}
