//! What may not collide: revisions, names, digests.

use std::time::Duration;

use keyward::{
    domain::{
        key::{Key, Owner},
        log::{Action, Change},
        name::{AccountId, KeyName, UserId},
        time::Revision,
    },
    store::Rejection,
};

use super::*;

pub(super) async fn a_change_from_another_revision_than_the_records_is_a_conflict(store: Shared) {
    with_accounts(&store).await;
    let made = put(&store, create(&key())).await;
    let newer = put(&store, update(&made)).await;
    for stale in [
        update(&made),
        create(&newer),
        update(&Key { revision: Revision(99), ..newer.clone() }),
        update(&Key { revision: Revision(1), ..key() }),
        create_account(&account("acme")),
        write(Change::Account(Arc::new(account("initech"))), Some(Revision(1)), Action::AccountUpdated),
    ] {
        let said = format!("{stale:?}");
        assert_eq!(try_one(&store, stale).await.unwrap_err(), Rejection::Conflict, "{said}");
    }
    assert_eq!(read(&store, newer.id).await, Some(newer));
    assert_eq!(store.head().await.unwrap().revision, Revision(4), "nothing was recorded");
}

pub(super) async fn a_name_is_its_keys_until_that_is_revoked(store: Shared) {
    with_accounts(&store).await;
    let first = put(&store, create(&named("deploy"))).await;
    assert_eq!(try_one(&store, create(&named("deploy"))).await.unwrap_err(), Rejection::NameTaken);
    put(&store, create(&named("Deploy"))).await;

    let second = put(&store, create(&named("other"))).await;
    let mut renamed = second.clone();
    renamed.terms.name.clone_from(&first.terms.name);
    assert_eq!(try_one(&store, update(&renamed)).await.unwrap_err(), Rejection::NameTaken);

    put(&store, update(&revoked(first, at(1)))).await;
    let renamed = put(&store, update(&renamed)).await;
    assert_eq!(read(&store, second.id).await, Some(renamed));
    // Several revoked ones may have had the name.
    let third = put(&store, create(&named("third"))).await;
    let mut third = revoked(third, at(2));
    third.terms.name = Some(KeyName::parse("deploy").unwrap());
    put(&store, update(&third)).await;
}

pub(super) async fn a_name_is_free_in_another_account_and_for_a_user(store: Shared) {
    with_accounts(&store).await;
    let owners = [
        Owner::Account(account_id("acme")),
        Owner::Account(account_id("globex")),
        Owner::User(UserId::parse("acme").unwrap()),
        Owner::User(UserId::parse("u2").unwrap()),
    ];
    for owner in &owners {
        put(&store, create(&Key { owner: owner.clone(), ..named("deploy") })).await;
    }
    for owner in owners {
        let again = create(&Key { owner, ..named("deploy") });
        assert_eq!(try_one(&store, again).await.unwrap_err(), Rejection::NameTaken);
    }
}

/// A key with a name as a release stored it that did not normalize names.
fn named_before(owner: &Owner, name: &str) -> Key {
    let mut key = Key { owner: owner.clone(), ..key() };
    key.terms.name = Some(KeyName::from_stored(name).unwrap());
    key
}

pub(super) async fn a_name_is_one_in_every_unicode_form(store: Shared) {
    with_accounts(&store).await;
    for owner in [Owner::Account(account_id("acme")), Owner::User(UserId::parse("u1").unwrap())] {
        // Both have two marks, which may come in either order.
        let forms = ["\u{1ec7}", "e\u{323}\u{302}", "e\u{302}\u{323}", "\u{1eb9}\u{302}", "\u{ea}\u{323}"];
        for first in forms {
            let made = put(&store, create(&named_before(&owner, first))).await;
            for second in forms {
                let again = create(&named_before(&owner, second));
                assert_eq!(
                    try_one(&store, again).await.unwrap_err(),
                    Rejection::NameTaken,
                    "{first:?} {second:?}"
                );
            }
            assert_eq!(read(&store, made.id).await.as_ref(), Some(&made), "it stays as it was written");
            let mut other = put(&store, create(&named_before(&owner, "e"))).await;
            other.terms.name = Some(KeyName::parse(first).unwrap());
            assert_eq!(
                try_one(&store, update(&other)).await.unwrap_err(),
                Rejection::NameTaken,
                "by renaming"
            );
            other.terms.name = None;
            put(&store, update(&other)).await;
            // It may change, and be given its name in another form.
            let mut made = put(&store, update(&made)).await;
            made.terms.name = Some(KeyName::parse(first).unwrap());
            let made = put(&store, update(&made)).await;
            put(&store, update(&revoked(made, at(1)))).await;
        }
        let batch = forms.map(|form| create(&named_before(&owner, form)));
        let outcomes = store.commit(&batch).await.unwrap().outcomes;
        assert!(outcomes[0].is_ok(), "{outcomes:?}");
        let taken = |outcome: &Result<Outcome, Rejection>| matches!(outcome, Err(Rejection::NameTaken));
        assert!(outcomes[1..].iter().all(taken), "{outcomes:?}");
    }
}

pub(super) async fn ids_of_accounts_that_differ_in_case_alone_are_taken(store: Shared) {
    put_account(&store, &account("keyward"), None).await;
    let made = put_account(&store, &account("org_2abCD"), None).await;
    for (taken, existing) in [
        ("org_2abcd", "org_2abCD"),
        ("ORG_2ABCD", "org_2abCD"),
        ("Org_2abCD", "org_2abCD"),
        ("Keyward", "keyward"),
        ("KEYWARD", "keyward"),
    ] {
        let create = create_account(&account(taken));
        let rejection = Rejection::AccountIdCase(account_id(existing));
        assert_eq!(try_one(&store, create).await.unwrap_err(), rejection, "{taken}");
        assert_eq!(store.account(&account_id(taken)).await.unwrap(), None, "ids are compared exactly");
    }
    let again = create_account(&account("org_2abCD"));
    assert_eq!(try_one(&store, again).await.unwrap_err(), Rejection::Conflict);
    put_account(&store, &made, Some(made.revision)).await;
    put_account(&store, &account("org-2abCD"), None).await;
    // In one batch, and in two at once.
    let batch = ["user_2NNe", "user_2nne", "USER_2NNE"].map(|id| create_account(&account(id)));
    let outcomes = store.commit(&batch).await.unwrap().outcomes;
    assert!(outcomes[0].is_ok(), "{outcomes:?}");
    let taken = |outcome: &Result<Outcome, Rejection>| matches!(outcome, Err(Rejection::AccountIdCase(_)));
    assert!(outcomes[1..].iter().all(taken), "{outcomes:?}");
    let at_once = ["aB", "ab", "Ab", "AB"].map(|id| {
        let (store, create) = (store.clone(), create_account(&account(id)));
        tokio::spawn(async move { try_one(&store, create).await.is_ok() })
    });
    let mut made = 0;
    for create in at_once {
        made += usize::from(create.await.unwrap());
    }
    assert_eq!(made, 1);
}

pub(super) async fn keys_without_a_name_do_not_collide(store: Shared) {
    with_accounts(&store).await;
    put(&store, create(&key())).await;
    put(&store, create(&key())).await;
}

pub(super) async fn a_digest_is_unique_for_ever(store: Shared) {
    with_accounts(&store).await;
    let first = put(&store, create(&key())).await;
    let digest = first.secrets[0].digest;
    let with_digest = |owner: &Owner| {
        let mut other = Key { owner: owner.clone(), ..key() };
        other.secrets[0].digest = digest;
        create(&other)
    };
    let globex = Owner::Account(account_id("globex"));
    let user = Owner::User(UserId::parse("u1").unwrap());
    let refused = async |when: &str| {
        for owner in [&first.owner, &globex, &user] {
            assert_eq!(
                try_one(&store, with_digest(owner)).await.unwrap_err(),
                Rejection::DigestTaken,
                "{when}"
            );
        }
    };
    refused("alive").await;
    let mut rotated = first.clone();
    for _ in 0..2 {
        rotated.rotate(fresh_digest(), String::new(), Duration::ZERO, at(1));
        rotated = put(&store, update(&rotated)).await;
    }
    refused("superseded and out of the record").await;
    put(&store, update(&revoked(rotated.clone(), at(2)))).await;
    refused("revoked").await;

    let mut other = put(&store, create(&key())).await;
    other.rotate(digest, String::new(), Duration::ZERO, at(3));
    assert_eq!(try_one(&store, update(&other)).await.unwrap_err(), Rejection::DigestTaken, "by rotation");
}

pub(super) async fn a_secret_of_the_keys_own_past_is_taken_too(store: Shared) {
    with_accounts(&store).await;
    let mut rotated = put(&store, create(&key())).await;
    let first = rotated.secrets[0].digest;
    rotated.rotate(fresh_digest(), String::new(), Duration::ZERO, at(1));
    let mut rotated = put(&store, update(&rotated)).await;
    rotated.rotate(first, String::new(), Duration::ZERO, at(2));
    assert_eq!(try_one(&store, update(&rotated)).await.unwrap_err(), Rejection::DigestTaken);
}

/// What `keyward serve` writes when the database is new, by two that found it so.
pub(super) async fn of_two_first_starts_one_is_made(store: Shared) {
    let start = || {
        let root = Key { owner: Owner::Account(AccountId::operator()), ..named("root") };
        let batch = [create_account(&account("keyward")), create(&root)];
        let store = store.clone();
        tokio::spawn(async move { store.commit(&batch).await.unwrap().outcomes })
    };
    let (first, second) = (start(), start());
    let mut made = 0;
    for outcomes in [first.await.unwrap(), second.await.unwrap()] {
        if outcomes.iter().all(Result::is_ok) {
            made += 1;
        } else {
            let rejections: Vec<_> = outcomes.into_iter().map(|outcome| outcome.unwrap_err()).collect();
            assert_eq!(rejections, [Rejection::Conflict, Rejection::NameTaken]);
        }
    }
    assert_eq!((made, whole_chain(&store).await.len()), (1, 2));
}
