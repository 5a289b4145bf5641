//! What may not collide: revisions, names, digests.

use std::time::Duration;

use keyward::{
    domain::{
        key::{ApiKey, KeyOwner},
        log::{AuditAction, RecordChange},
        name::{AccountId, KeyName, UserId},
        time::Revision,
    },
    store::WriteRejection,
};

use super::*;

pub(super) async fn a_change_from_another_revision_than_the_records_is_a_conflict(store: SharedStore) {
    with_accounts(&store).await;
    let made = commit_key(&store, create(&key())).await;
    let newer = commit_key(&store, update(&made)).await;
    for stale in [
        update(&made),
        create(&newer),
        update(&ApiKey { revision: Revision(99), ..newer.clone() }),
        update(&ApiKey { revision: Revision(1), ..key() }),
        create_account(&account("acme")),
        write(
            RecordChange::Account(Arc::new(account("initech"))),
            Some(Revision(1)),
            AuditAction::AccountUpdated,
        ),
    ] {
        let said = format!("{stale:?}");
        assert_eq!(try_commit(&store, stale).await.unwrap_err(), WriteRejection::Conflict, "{said}");
    }
    assert_eq!(read_key(&store, newer.id).await, Some(newer));
    assert_eq!(store.log_head().await.unwrap().revision, Revision(4), "nothing was recorded");
}

pub(super) async fn a_name_is_its_keys_until_that_is_revoked(store: SharedStore) {
    with_accounts(&store).await;
    let first = commit_key(&store, create(&named("deploy"))).await;
    assert_eq!(try_commit(&store, create(&named("deploy"))).await.unwrap_err(), WriteRejection::NameTaken);
    commit_key(&store, create(&named("Deploy"))).await;

    let second = commit_key(&store, create(&named("other"))).await;
    let mut renamed = second.clone();
    renamed.spec.name.clone_from(&first.spec.name);
    assert_eq!(try_commit(&store, update(&renamed)).await.unwrap_err(), WriteRejection::NameTaken);

    commit_key(&store, update(&revoked(first, timestamp(1)))).await;
    let renamed = commit_key(&store, update(&renamed)).await;
    assert_eq!(read_key(&store, second.id).await, Some(renamed));
    // Several revoked ones may have had the name.
    let third = commit_key(&store, create(&named("third"))).await;
    let mut third = revoked(third, timestamp(2));
    third.spec.name = Some(KeyName::parse("deploy").unwrap());
    commit_key(&store, update(&third)).await;
}

pub(super) async fn a_name_is_free_in_another_account_and_for_a_user(store: SharedStore) {
    with_accounts(&store).await;
    let owners = [
        KeyOwner::Account(account_id("acme")),
        KeyOwner::Account(account_id("globex")),
        KeyOwner::User(UserId::parse("acme").unwrap()),
        KeyOwner::User(UserId::parse("u2").unwrap()),
    ];
    for owner in &owners {
        commit_key(&store, create(&ApiKey { owner: owner.clone(), ..named("deploy") })).await;
    }
    for owner in owners {
        let again = create(&ApiKey { owner, ..named("deploy") });
        assert_eq!(try_commit(&store, again).await.unwrap_err(), WriteRejection::NameTaken);
    }
}

/// A key with a name as a release stored it that did not normalize names.
fn named_before(owner: &KeyOwner, name: &str) -> ApiKey {
    let mut key = ApiKey { owner: owner.clone(), ..key() };
    key.spec.name = Some(KeyName::from_stored(name).unwrap());
    key
}

pub(super) async fn a_name_is_one_in_every_unicode_form(store: SharedStore) {
    with_accounts(&store).await;
    for owner in [KeyOwner::Account(account_id("acme")), KeyOwner::User(UserId::parse("u1").unwrap())] {
        // Both have two marks, which may come in either order.
        let forms = ["\u{1ec7}", "e\u{323}\u{302}", "e\u{302}\u{323}", "\u{1eb9}\u{302}", "\u{ea}\u{323}"];
        for first in forms {
            let made = commit_key(&store, create(&named_before(&owner, first))).await;
            for second in forms {
                let again = create(&named_before(&owner, second));
                assert_eq!(
                    try_commit(&store, again).await.unwrap_err(),
                    WriteRejection::NameTaken,
                    "{first:?} {second:?}"
                );
            }
            assert_eq!(read_key(&store, made.id).await.as_ref(), Some(&made), "it stays as it was written");
            let mut other = commit_key(&store, create(&named_before(&owner, "e"))).await;
            other.spec.name = Some(KeyName::parse(first).unwrap());
            assert_eq!(
                try_commit(&store, update(&other)).await.unwrap_err(),
                WriteRejection::NameTaken,
                "by renaming"
            );
            other.spec.name = None;
            commit_key(&store, update(&other)).await;
            // It may change, and be given its name in another form.
            let mut made = commit_key(&store, update(&made)).await;
            made.spec.name = Some(KeyName::parse(first).unwrap());
            let made = commit_key(&store, update(&made)).await;
            commit_key(&store, update(&revoked(made, timestamp(1)))).await;
        }
        let batch = forms.map(|form| create(&named_before(&owner, form)));
        let outcomes = store.commit(&batch).await.unwrap().outcomes;
        assert!(outcomes[0].is_ok(), "{outcomes:?}");
        let taken = |outcome: &Result<WriteOutcome, WriteRejection>| {
            matches!(outcome, Err(WriteRejection::NameTaken))
        };
        assert!(outcomes[1..].iter().all(taken), "{outcomes:?}");
    }
}

pub(super) async fn ids_of_accounts_that_differ_in_case_alone_are_taken(store: SharedStore) {
    commit_account(&store, &account("keyward"), None).await;
    let made = commit_account(&store, &account("org_2abCD"), None).await;
    for (taken, existing) in [
        ("org_2abcd", "org_2abCD"),
        ("ORG_2ABCD", "org_2abCD"),
        ("Org_2abCD", "org_2abCD"),
        ("Keyward", "keyward"),
        ("KEYWARD", "keyward"),
    ] {
        let create = create_account(&account(taken));
        let rejection = WriteRejection::AccountIdDiffersInCase(account_id(existing));
        assert_eq!(try_commit(&store, create).await.unwrap_err(), rejection, "{taken}");
        assert_eq!(store.get_account(&account_id(taken)).await.unwrap(), None, "ids are compared exactly");
    }
    let again = create_account(&account("org_2abCD"));
    assert_eq!(try_commit(&store, again).await.unwrap_err(), WriteRejection::Conflict);
    commit_account(&store, &made, Some(made.revision)).await;
    commit_account(&store, &account("org-2abCD"), None).await;
    // In one batch, and in two at once.
    let batch = ["user_2NNe", "user_2nne", "USER_2NNE"].map(|id| create_account(&account(id)));
    let outcomes = store.commit(&batch).await.unwrap().outcomes;
    assert!(outcomes[0].is_ok(), "{outcomes:?}");
    let taken = |outcome: &Result<WriteOutcome, WriteRejection>| {
        matches!(outcome, Err(WriteRejection::AccountIdDiffersInCase(_)))
    };
    assert!(outcomes[1..].iter().all(taken), "{outcomes:?}");
    let at_once = ["aB", "ab", "Ab", "AB"].map(|id| {
        let (store, create) = (store.clone(), create_account(&account(id)));
        tokio::spawn(async move { try_commit(&store, create).await.is_ok() })
    });
    let mut made = 0;
    for create in at_once {
        made += usize::from(create.await.unwrap());
    }
    assert_eq!(made, 1);
}

pub(super) async fn keys_without_a_name_do_not_collide(store: SharedStore) {
    with_accounts(&store).await;
    commit_key(&store, create(&key())).await;
    commit_key(&store, create(&key())).await;
}

pub(super) async fn a_digest_is_unique_for_ever(store: SharedStore) {
    with_accounts(&store).await;
    let first = commit_key(&store, create(&key())).await;
    let digest = first.secrets[0].digest;
    let with_digest = |owner: &KeyOwner| {
        let mut other = ApiKey { owner: owner.clone(), ..key() };
        other.secrets[0].digest = digest;
        create(&other)
    };
    let globex = KeyOwner::Account(account_id("globex"));
    let user = KeyOwner::User(UserId::parse("u1").unwrap());
    let refused = async |when: &str| {
        for owner in [&first.owner, &globex, &user] {
            assert_eq!(
                try_commit(&store, with_digest(owner)).await.unwrap_err(),
                WriteRejection::DigestTaken,
                "{when}"
            );
        }
    };
    refused("alive").await;
    let mut rotated = first.clone();
    for _ in 0..2 {
        rotated.rotate(new_digest(), String::new(), Duration::ZERO, timestamp(1));
        rotated = commit_key(&store, update(&rotated)).await;
    }
    refused("superseded and out of the record").await;
    commit_key(&store, update(&revoked(rotated.clone(), timestamp(2)))).await;
    refused("revoked").await;

    let mut other = commit_key(&store, create(&key())).await;
    other.rotate(digest, String::new(), Duration::ZERO, timestamp(3));
    assert_eq!(
        try_commit(&store, update(&other)).await.unwrap_err(),
        WriteRejection::DigestTaken,
        "by rotation"
    );
}

pub(super) async fn a_secret_of_the_keys_own_past_is_taken_too(store: SharedStore) {
    with_accounts(&store).await;
    let mut rotated = commit_key(&store, create(&key())).await;
    let first = rotated.secrets[0].digest;
    rotated.rotate(new_digest(), String::new(), Duration::ZERO, timestamp(1));
    let mut rotated = commit_key(&store, update(&rotated)).await;
    rotated.rotate(first, String::new(), Duration::ZERO, timestamp(2));
    assert_eq!(try_commit(&store, update(&rotated)).await.unwrap_err(), WriteRejection::DigestTaken);
}

/// What `keyward serve` writes when the database is new, by two that found it so.
pub(super) async fn of_two_first_starts_one_is_made(store: SharedStore) {
    let start = || {
        let root = ApiKey { owner: KeyOwner::Account(AccountId::operator()), ..named("root") };
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
            assert_eq!(rejections, [WriteRejection::Conflict, WriteRejection::NameTaken]);
        }
    }
    assert_eq!((made, whole_chain(&store).await.len()), (1, 2));
}
