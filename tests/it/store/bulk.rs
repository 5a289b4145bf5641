//! Bulk reads find what single reads find, however much of the log is read.

use std::time::Duration;

use super::*;

/// Keys of two instants, with one to five secrets each.
async fn rotated(store: &SharedStore) -> Vec<ApiKey> {
    with_accounts(store).await;
    let mut keys = Vec::new();
    for number in 0..40 {
        let mut made = key();
        made.id = new_key_id(timestamp(number / 20));
        let mut made = commit_key(store, create(&made)).await;
        for rotation in 0..number % 5 {
            made.rotate(new_digest(), format!("hint {number}"), Duration::from_secs(60), timestamp(rotation));
            made = commit_key(store, update(&made)).await;
        }
        keys.push(made);
    }
    keys.sort_by_key(|key| key.id);
    keys
}

/// The keys with these ids, found one by one.
async fn one_by_one(store: &SharedStore, ids: &[KeyId]) -> Vec<ApiKey> {
    let mut keys = Vec::new();
    for id in ids {
        keys.extend(read_key(store, *id).await);
    }
    keys
}

/// How many entries a reader is made for: it reads secrets together if they are many.
const FEW_AND_MANY: [u64; 2] = [1, 1000];

pub(super) async fn a_bulk_reader_finds_each_key_as_a_look_at_it_does(store: SharedStore) {
    let mut ids: Vec<_> = rotated(&store).await.iter().map(|key| key.id).collect();
    ids.extend((0..10).map(|number| new_key_id(timestamp(number))));
    ids.sort_unstable();
    for entries in FEW_AND_MANY {
        let mut reader = store.bulk_reader(entries);
        let all = one_by_one(&store, &ids).await;
        assert_eq!((reader.keys_at(&ids).await.unwrap(), all.len()), (all, 40));
        assert_eq!(reader.keys_at(&[]).await.unwrap(), []);
        for (start, step) in [(0, 1), (3, 2), (7, 9), (0, 13)] {
            let some: Vec<_> = ids.iter().skip(start).step_by(step).copied().collect();
            for page in some.chunks(7).chain(some.chunks(3).rev()) {
                assert_eq!(reader.keys_at(page).await.unwrap(), one_by_one(&store, page).await);
            }
        }
    }
}

pub(super) async fn a_bulk_reader_finds_keys_that_were_made_and_changed_after_it(store: SharedStore) {
    let keys = rotated(&store).await;
    for entries in FEW_AND_MANY {
        let mut reader = store.bulk_reader(entries);
        let ids: Vec<_> = keys.iter().map(|key| key.id).collect();
        reader.keys_at(&ids).await.unwrap();
        let made = commit_key(&store, create(&key())).await;
        assert_eq!(reader.keys_at(&[made.id]).await.unwrap(), [made]);
        let mut changed = read_key(&store, ids[3]).await.unwrap();
        changed.disabled_at = Some(timestamp(9));
        let changed = commit_key(&store, update(&changed)).await;
        assert_eq!(reader.keys_at(&[ids[3]]).await.unwrap(), [changed]);
    }
}

pub(super) async fn a_bulk_reader_reads_the_log_and_the_revisions_of_keys_in_pages(store: SharedStore) {
    let keys = rotated(&store).await;
    let mut reader = store.bulk_reader(1000);
    let mut log = Vec::new();
    loop {
        let after = Revision(log.len() as u64);
        let page = reader.log_after(after, 7).await.unwrap();
        assert_eq!(page, store.list_log_after(after, 7).await.unwrap());
        if page.is_empty() {
            break;
        }
        log.extend(page);
    }
    assert_eq!(log, whole_log(&store).await);
    let (mut found, mut after) = (Vec::new(), None);
    loop {
        let page = reader.key_revisions(after, 7).await.unwrap();
        let Some((last, _)) = page.last() else { break };
        after = Some(*last);
        found.extend(page);
    }
    assert_eq!(found, keys.iter().map(|key| (key.id, key.revision)).collect::<Vec<_>>());
}

pub(super) async fn a_bulk_reader_that_was_given_up_in_the_middle_goes_on(store: SharedStore) {
    let keys = rotated(&store).await;
    let mut reader = store.bulk_reader(1000);
    let ids: Vec<_> = keys.iter().map(|key| key.id).collect();
    assert_eq!(reader.keys_at(&ids[..20]).await.unwrap(), keys[..20]);
    let _ = tokio::time::timeout(Duration::ZERO, reader.keys_at(&ids)).await;
    assert_eq!(reader.keys_at(&ids).await.unwrap(), keys);
}
