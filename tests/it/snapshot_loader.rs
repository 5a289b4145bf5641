//! What a store gives a server that starts.

use std::sync::{
    Arc, Mutex,
    atomic::{AtomicUsize, Ordering},
};

use keyward::{
    domain::{key::ApiKey, key::KeySecret, time::Timestamp},
    store::{LoadedKey, LogHead, SnapshotLoader, SnapshotPart, SnapshotRecord, Store, StoreError},
};

/// A whole snapshot, in the order in which it came.
pub(crate) async fn load_snapshot(
    store: &Arc<dyn Store>,
    forget_before: Timestamp,
) -> Result<(LogHead, Vec<SnapshotRecord>), StoreError> {
    let came = CollectingLoader::default();
    let loader: Arc<dyn SnapshotLoader> = Arc::new(came.clone());
    let head = store.stream_snapshot(forget_before, &loader).await?;
    let items = std::mem::take(&mut *came.items.lock().unwrap());
    Ok((head, items))
}

/// In how many parts its keys come: as many as read them at once.
pub(crate) async fn count_parts(store: &Arc<dyn Store>) -> usize {
    let came = CollectingLoader::default();
    let loader: Arc<dyn SnapshotLoader> = Arc::new(came.clone());
    store.stream_snapshot(Timestamp::from_micros(0), &loader).await.unwrap();
    came.parts.load(Ordering::Relaxed)
}

/// Everything that came.
#[derive(Clone, Default)]
struct CollectingLoader {
    items: Arc<Mutex<Vec<SnapshotRecord>>>,
    parts: Arc<AtomicUsize>,
}

impl SnapshotLoader for CollectingLoader {
    fn add_record(&self, item: SnapshotRecord) {
        self.items.lock().unwrap().push(item);
    }

    fn reserve_secrets(&self, _: usize) {}

    fn begin_part(&self) -> Box<dyn SnapshotPart> {
        self.parts.fetch_add(1, Ordering::Relaxed);
        Box::new(CollectingPart { came: self.clone(), keys: Vec::new() })
    }
}

/// Keys of a part.
struct CollectingPart {
    came: CollectingLoader,
    keys: Vec<(ApiKey, Vec<KeySecret>)>,
}

impl SnapshotPart for CollectingPart {
    fn add_key(&mut self, key: &LoadedKey<'_>) {
        self.keys.push((key.to_key(), key.retired_secrets.to_vec()));
    }

    fn finish(self: Box<Self>) {
        let items = self.keys.into_iter().map(|(key, left)| SnapshotRecord::Key(Arc::new(key), left));
        self.came.items.lock().unwrap().extend(items);
    }
}
