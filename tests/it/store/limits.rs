//! Account limits: what the tables have counted holds at the commit, whoever has written it.

use keyward::domain::account::{AccountLimitKind, AccountLimitReached, AccountLimits};

use super::*;

const NONE: AccountLimits = AccountLimits {
    keys: u64::MAX,
    roles: u64::MAX,
    rotations_per_hour: u64::MAX,
    log_rows_per_hour: u64::MAX,
};

fn within(limits: AccountLimits, write: WriteRequest) -> WriteRequest {
    WriteRequest { limits: Some(limits), ..write }
}

fn reached(outcome: Result<WriteOutcome, WriteRejection>) -> Option<AccountLimitKind> {
    match outcome {
        Ok(_) => None,
        Err(WriteRejection::AccountLimitReached(AccountLimitReached { limit, .. })) => Some(limit),
        Err(other) => panic!("{other:?}"),
    }
}

fn of_user(user: &str) -> ApiKey {
    ApiKey { owner: KeyOwner::User(UserId::parse(user).unwrap()), ..key() }
}

/// A key as it is after its revocation.
fn revoke(key: ApiKey) -> WriteRequest {
    WriteRequest { action: AuditAction::KeyRevoked, ..update(&revoked(key, timestamp(1))) }
}

pub(super) async fn an_account_has_no_more_keys_than_its_limit_whoever_makes_them_at_once(
    store: SharedStore,
) {
    with_accounts(&store).await;
    let limits = AccountLimits { keys: 20, ..NONE };
    // Some are there that nobody held to a limit.
    let first = commit_key(&store, create(&key())).await;
    let writers: Vec<_> = (0..4)
        .map(|_| {
            let store = store.clone();
            tokio::spawn(async move {
                let mut made = 0;
                for _ in 0..5 {
                    let batch: Vec<_> = (0..3).map(|_| within(limits, create(&key()))).collect();
                    let outcomes = store.commit(&batch).await.unwrap().outcomes;
                    made += outcomes.into_iter().filter(|outcome| reached(outcome.clone()).is_none()).count();
                }
                made
            })
        })
        .collect();
    let mut made = 1;
    for writer in writers {
        made += writer.await.unwrap();
    }
    assert_eq!(made, 20);
    let one_more = || within(limits, create(&key()));
    assert_eq!(reached(try_commit(&store, one_more()).await), Some(AccountLimitKind::Keys));
    let elsewhere = ApiKey { owner: KeyOwner::Account(account_id("globex")), ..key() };
    assert_eq!(
        reached(try_commit(&store, within(limits, create(&elsewhere))).await),
        None,
        "another account"
    );
    // In one batch: a revocation makes room for one key.
    let outcomes = store.commit(&[revoke(first), one_more(), one_more()]).await.unwrap().outcomes;
    let reached: Vec<_> = outcomes.into_iter().map(reached).collect();
    assert_eq!(reached, [None, None, Some(AccountLimitKind::Keys)]);
}

pub(super) async fn a_user_has_the_limits_of_an_account(store: SharedStore) {
    with_accounts(&store).await;
    let limits = AccountLimits { keys: 2, ..NONE };
    let batch: Vec<_> = (0..3).map(|_| within(limits, create(&of_user("ann")))).collect();
    let outcomes = store.commit(&batch).await.unwrap().outcomes;
    let reached: Vec<_> = outcomes.into_iter().map(reached).collect();
    assert_eq!(reached, [None, None, Some(AccountLimitKind::Keys)]);
    for owner in [of_user("bob"), key()] {
        assert_eq!(
            self::reached(try_commit(&store, within(limits, create(&owner))).await),
            None,
            "{owner:?}"
        );
    }
}

pub(super) async fn an_account_has_no_more_roles_of_its_own_than_its_limit(store: SharedStore) {
    with_accounts(&store).await;
    let limits = AccountLimits { roles: 2, ..NONE };
    let put = |account, name| within(limits, put_role(&role(account, name)));
    let batch = [put(Some("acme"), "a"), put(None, "global"), put(Some("acme"), "b"), put(Some("acme"), "c")];
    let outcomes = store.commit(&batch).await.unwrap().outcomes;
    let found: Vec<_> = outcomes.into_iter().map(reached).collect();
    assert_eq!(found, [None, None, None, Some(AccountLimitKind::Roles)]);
    let first = Role { revision: Revision(3), ..role(Some("acme"), "a") };
    let changed = commit_role(&store, within(limits, put_role(&first))).await;
    assert_eq!(reached(try_commit(&store, put(Some("acme"), "c")).await), Some(AccountLimitKind::Roles));
    assert_eq!(reached(try_commit(&store, put(Some("globex"), "c")).await), None);
    commit_role(&store, delete_role(&changed)).await;
    assert_eq!(reached(try_commit(&store, put(Some("acme"), "c")).await), None, "there is room again");
}

pub(super) async fn rotations_and_log_rows_are_counted_by_the_hour(store: SharedStore) {
    with_accounts(&store).await;
    let limits = AccountLimits { rotations_per_hour: 2, log_rows_per_hour: 6, ..NONE };
    // The accounts' own entries came at the start of the hour that `NOW` lies in.
    let rotate = |key: &mut ApiKey, seconds: i64| {
        key.rotate(new_digest(), String::new(), std::time::Duration::ZERO, timestamp(seconds));
        WriteRequest { action: AuditAction::KeyRotated, at: timestamp(seconds), ..update(key) }
    };
    let mut record = commit_key(&store, within(limits, create(&key()))).await;
    for seconds in [1, 2] {
        let write = rotate(&mut record, seconds);
        record = commit_key(&store, within(limits, write)).await;
    }
    let before = record.clone();
    let third = rotate(&mut record, 3);
    let error = try_commit(&store, within(limits, third.clone())).await.unwrap_err();
    let WriteRejection::AccountLimitReached(said) = error else { panic!("{error:?}") };
    assert_eq!((said.limit, said.value), (AccountLimitKind::RotationsPerHour, 2));
    let next_hour = 3600 - (NOW + 3).rem_euclid(3600);
    assert_eq!(said.retry_after, Some(std::time::Duration::from_secs(next_hour.unsigned_abs())));
    // Four entries are there: one of the account, one of the key, two rotations.
    for expected in [None, None, Some(AccountLimitKind::LogRowsPerHour)] {
        assert_eq!(reached(try_commit(&store, within(limits, create(&key()))).await), expected);
    }
    // What is held to no limit counts, and is done all the same.
    let dead = commit_key(&store, revoke(before)).await;
    assert!(dead.revocation.is_some());
    let later = |seconds| WriteRequest { at: timestamp(seconds), ..within(limits, create(&key())) };
    assert_eq!(reached(try_commit(&store, later(next_hour + 3)).await), None, "another hour");
    assert_eq!(reached(try_commit(&store, later(0)).await), None, "a clock that is behind counts with it");
}

pub(super) async fn the_operator_account_is_held_to_no_limit(store: SharedStore) {
    commit_account(&store, &account("keyward"), None).await;
    let limits = AccountLimits { keys: 1, roles: 1, rotations_per_hour: 1, log_rows_per_hour: 1 };
    for _ in 0..3 {
        let operators = ApiKey { owner: KeyOwner::Account(AccountId::operator()), ..key() };
        assert_eq!(reached(try_commit(&store, within(limits, create(&operators))).await), None);
    }
}
