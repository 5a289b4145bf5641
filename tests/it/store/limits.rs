//! Account limits: what the tables have counted holds at the commit, whoever has written it.

use keyward::domain::account::{AccountLimit, AccountLimits, LimitReached};

use super::*;

const NONE: AccountLimits = AccountLimits {
    keys: u64::MAX,
    roles: u64::MAX,
    rotations_per_hour: u64::MAX,
    log_rows_per_hour: u64::MAX,
};

fn within(limits: AccountLimits, write: Write) -> Write {
    Write { limits: Some(limits), ..write }
}

fn reached(outcome: Result<Outcome, Rejection>) -> Option<AccountLimit> {
    match outcome {
        Ok(_) => None,
        Err(Rejection::AccountLimit(LimitReached { limit, .. })) => Some(limit),
        Err(other) => panic!("{other:?}"),
    }
}

fn of_user(user: &str) -> Key {
    Key { owner: Owner::User(UserId::parse(user).unwrap()), ..key() }
}

/// A key as it is after its revocation.
fn revoke(key: Key) -> Write {
    Write { action: Action::KeyRevoked, ..update(&revoked(key, at(1))) }
}

pub(super) async fn an_account_has_no_more_keys_than_its_limit_whoever_makes_them_at_once(store: Shared) {
    with_accounts(&store).await;
    let limits = AccountLimits { keys: 20, ..NONE };
    // Some are there that nobody held to a limit.
    let first = put(&store, create(&key())).await;
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
    assert_eq!(reached(try_one(&store, one_more()).await), Some(AccountLimit::Keys));
    let elsewhere = Key { owner: Owner::Account(account_id("globex")), ..key() };
    assert_eq!(reached(try_one(&store, within(limits, create(&elsewhere))).await), None, "another account");
    // In one batch: a revocation makes room for one key.
    let outcomes = store.commit(&[revoke(first), one_more(), one_more()]).await.unwrap().outcomes;
    let reached: Vec<_> = outcomes.into_iter().map(reached).collect();
    assert_eq!(reached, [None, None, Some(AccountLimit::Keys)]);
}

pub(super) async fn a_user_has_the_limits_of_an_account(store: Shared) {
    with_accounts(&store).await;
    let limits = AccountLimits { keys: 2, ..NONE };
    let batch: Vec<_> = (0..3).map(|_| within(limits, create(&of_user("ann")))).collect();
    let outcomes = store.commit(&batch).await.unwrap().outcomes;
    let reached: Vec<_> = outcomes.into_iter().map(reached).collect();
    assert_eq!(reached, [None, None, Some(AccountLimit::Keys)]);
    for owner in [of_user("bob"), key()] {
        assert_eq!(self::reached(try_one(&store, within(limits, create(&owner))).await), None, "{owner:?}");
    }
}

pub(super) async fn an_account_has_no_more_roles_of_its_own_than_its_limit(store: Shared) {
    with_accounts(&store).await;
    let limits = AccountLimits { roles: 2, ..NONE };
    let put = |account, name| within(limits, put_role(&role(account, name)));
    let batch = [put(Some("acme"), "a"), put(None, "global"), put(Some("acme"), "b"), put(Some("acme"), "c")];
    let outcomes = store.commit(&batch).await.unwrap().outcomes;
    let found: Vec<_> = outcomes.into_iter().map(reached).collect();
    assert_eq!(found, [None, None, None, Some(AccountLimit::Roles)]);
    let first = Role { revision: Revision(3), ..role(Some("acme"), "a") };
    let changed = made_role(&store, within(limits, put_role(&first))).await;
    assert_eq!(reached(try_one(&store, put(Some("acme"), "c")).await), Some(AccountLimit::Roles));
    assert_eq!(reached(try_one(&store, put(Some("globex"), "c")).await), None);
    made_role(&store, delete_role(&changed)).await;
    assert_eq!(reached(try_one(&store, put(Some("acme"), "c")).await), None, "there is room again");
}

pub(super) async fn rotations_and_log_rows_are_counted_by_the_hour(store: Shared) {
    with_accounts(&store).await;
    let limits = AccountLimits { rotations_per_hour: 2, log_rows_per_hour: 6, ..NONE };
    // The accounts' own entries came at the start of the hour that `NOW` lies in.
    let rotate = |key: &mut Key, seconds: i64| {
        key.rotate(fresh_digest(), String::new(), std::time::Duration::ZERO, at(seconds));
        Write { action: Action::KeyRotated, at: at(seconds), ..update(key) }
    };
    let mut record = put(&store, within(limits, create(&key()))).await;
    for seconds in [1, 2] {
        let write = rotate(&mut record, seconds);
        record = put(&store, within(limits, write)).await;
    }
    let before = record.clone();
    let third = rotate(&mut record, 3);
    let error = try_one(&store, within(limits, third.clone())).await.unwrap_err();
    let Rejection::AccountLimit(said) = error else { panic!("{error:?}") };
    assert_eq!((said.limit, said.value), (AccountLimit::RotationsPerHour, 2));
    let next_hour = 3600 - (NOW + 3).rem_euclid(3600);
    assert_eq!(said.retry_after, Some(std::time::Duration::from_secs(next_hour.unsigned_abs())));
    // Four entries are there: one of the account, one of the key, two rotations.
    for expected in [None, None, Some(AccountLimit::LogRowsPerHour)] {
        assert_eq!(reached(try_one(&store, within(limits, create(&key()))).await), expected);
    }
    // What is held to no limit counts, and is done all the same.
    let dead = put(&store, revoke(before)).await;
    assert!(dead.revocation.is_some());
    let later = |seconds| Write { at: at(seconds), ..within(limits, create(&key())) };
    assert_eq!(reached(try_one(&store, later(next_hour + 3)).await), None, "another hour");
    assert_eq!(reached(try_one(&store, later(0)).await), None, "a clock that is behind counts with it");
}

pub(super) async fn the_operator_account_is_held_to_no_limit(store: Shared) {
    put_account(&store, &account("keyward"), None).await;
    let limits = AccountLimits { keys: 1, roles: 1, rotations_per_hour: 1, log_rows_per_hour: 1 };
    for _ in 0..3 {
        let operators = Key { owner: Owner::Account(AccountId::operator()), ..key() };
        assert_eq!(reached(try_one(&store, within(limits, create(&operators))).await), None);
    }
}
