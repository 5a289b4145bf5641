//! The log: what it says, and how it is read.

use keyward::{
    domain::{
        key::{ApiKey, KeyOwner},
        log::{Actor, ActorId, LogEntry, RecordChange},
        name::UserId,
        time::Revision,
    },
    store::{LogFilter, WriteRequest},
};
use proptest::prelude::*;

use super::{records::for_all, *};

pub(super) async fn the_log_says_who_did_what_and_holds_the_record(store: SharedStore) {
    with_accounts(&store).await;
    let actor = new_key_id(timestamp(0));
    let record = named("first");
    let made = commit_key(
        &store,
        WriteRequest {
            actor: Actor { id: ActorId::Key(actor), account: Some(account_id("globex")), ..Actor::SYSTEM },
            method: "keyward.v1.KeyService/Create",
            at: timestamp(7),
            ..create(&record)
        },
    )
    .await;
    let row = whole_chain(&store).await.pop().unwrap();
    assert_eq!((row.revision, row.at, &*row.action), (made.revision, timestamp(7), "key.created"));
    assert_eq!((row.account, row.key_id, row.user), (Some(account_id("acme")), Some(made.id), None));
    assert_eq!((row.actor, row.actor_account), (actor.to_string(), Some(account_id("globex"))));
    assert_eq!(row.method, "keyward.v1.KeyService/Create");
    assert_eq!(
        serde_json::from_str::<RecordChange>(&row.payload).unwrap(),
        RecordChange::Key(Arc::new(made))
    );
}

pub(super) async fn the_log_is_read_in_pages(store: SharedStore) {
    with_accounts(&store).await;
    for _ in 0..8 {
        commit_key(&store, create(&key())).await;
    }
    let whole = whole_log(&store).await;
    assert_eq!(whole.len(), 10);
    let mut paged = Vec::new();
    while let Some(page) = Some(store.list_log_after(Revision(paged.len() as u64), 3).await.unwrap()) {
        assert!(page.len() <= 3);
        if page.is_empty() {
            break;
        }
        paged.extend(page);
    }
    assert_eq!(paged, whole);
    assert_eq!(store.list_log_after(Revision(10), 3).await.unwrap(), []);
    assert_eq!(store.list_log_after(Revision(99), 3).await.unwrap(), []);
}

pub(super) async fn every_filter_of_the_log_finds_what_a_look_at_each_row_finds(store: SharedStore) {
    let actors: Vec<_> = (0..2).map(|_| new_key_id(timestamp(0))).collect();
    for id in ["acme", "globex"] {
        commit_account(&store, &account(id), None).await;
    }
    let mut keys = Vec::new();
    for count in 0..30usize {
        let owner = match count % 3 {
            0 => KeyOwner::Account(account_id("acme")),
            1 => KeyOwner::Account(account_id("globex")),
            _ => KeyOwner::User(UserId::parse("u1").unwrap()),
        };
        let who = actors.get(count % 4).map_or(ActorId::System, |key| ActorId::Key(*key));
        let acting_user = (count % 5 == 0).then(|| UserId::parse("ann").unwrap());
        let actor = Actor { id: who, acting_user, ..Actor::SYSTEM };
        let seconds = timestamp(i64::try_from(count % 7).unwrap());
        let made =
            commit_key(&store, WriteRequest { actor, at: seconds, ..create(&ApiKey { owner, ..key() }) })
                .await;
        keys.push(commit_key(&store, WriteRequest { at: seconds, ..update(&made) }).await.id);
    }
    let rows = whole_log(&store).await;
    let filters = (
        prop::option::of(prop::sample::select(vec!["acme", "globex", "nobody"])),
        prop::option::of(prop::sample::select(keys)),
        prop::option::of(prop::sample::select(vec![
            "system".to_owned(),
            actors[0].to_string(),
            actors[1].to_string(),
            "nobody".to_owned(),
        ])),
        prop::option::of(0i64..8),
        prop::option::of(0i64..8),
        prop::option::of(0u64..70),
        (
            prop::option::of(prop::sample::select(vec!["ann", "ben"])),
            prop::option::of(prop::sample::select(vec!["key.created", "key.updated", "nothing"])),
            0u64..70,
            any::<bool>(),
        ),
    );
    for_all(
        400,
        filters,
        |(account, key_id, actor, from, to, cursor, (person, action, after, oldest_first))| {
            let (store, rows) = (store.clone(), &rows);
            async move {
                let filter = LogFilter {
                    account: account.map(account_id),
                    key_id,
                    actor,
                    from: from.map(timestamp),
                    to: to.map(timestamp),
                    acting_user: person.map(|user| UserId::parse(user).unwrap()),
                    action: action.map(str::to_owned),
                    after: Revision(after),
                    oldest_first,
                };
                let cursor = cursor.map(Revision);
                let hit = |row: &&LogEntry| {
                    filter.account.as_ref().is_none_or(|account| row.account.as_ref() == Some(account))
                        && filter.key_id.is_none_or(|key| row.key_id == Some(key))
                        && filter.actor.as_ref().is_none_or(|actor| row.actor == *actor)
                        && filter.from.is_none_or(|from| row.at >= from)
                        && filter.to.is_none_or(|to| row.at < to)
                        && filter
                            .acting_user
                            .as_ref()
                            .is_none_or(|user| row.acting_user.as_ref() == Some(user))
                        && filter.action.as_ref().is_none_or(|action| row.action == *action)
                        && row.revision > filter.after
                        && cursor.is_none_or(|cursor| {
                            if oldest_first { row.revision > cursor } else { row.revision < cursor }
                        })
                };
                let mut expected: Vec<_> = rows.iter().filter(hit).cloned().collect();
                if !oldest_first {
                    expected.reverse();
                }
                expected.truncate(5);
                assert_eq!(
                    store.list_log(&filter, cursor, 5).await.unwrap(),
                    expected,
                    "{filter:?} {cursor:?}"
                );
            }
        },
    )
    .await;
}
