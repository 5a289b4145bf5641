//! What a store gives a server that starts.

use std::sync::{
    Arc, Mutex,
    atomic::{AtomicUsize, Ordering},
};

use keyward::{
    domain::{key::Key, key::Secret, time::Timestamp},
    store::{Head, LoadedKey, Loader, Part, SnapshotItem, Store, StoreError},
};

/// A whole snapshot, in the order in which it came.
pub(crate) async fn snapshot(
    store: &Arc<dyn Store>,
    forget_before: Timestamp,
) -> Result<(Head, Vec<SnapshotItem>), StoreError> {
    let came = Came::default();
    let loader: Arc<dyn Loader> = Arc::new(came.clone());
    let head = store.snapshot(forget_before, &loader).await?;
    let items = std::mem::take(&mut *came.items.lock().unwrap());
    Ok((head, items))
}

/// In how many parts its keys come: as many as read them at once.
pub(crate) async fn parts(store: &Arc<dyn Store>) -> usize {
    let came = Came::default();
    let loader: Arc<dyn Loader> = Arc::new(came.clone());
    store.snapshot(Timestamp::from_micros(0), &loader).await.unwrap();
    came.parts.load(Ordering::Relaxed)
}

/// Everything that came.
#[derive(Clone, Default)]
struct Came {
    items: Arc<Mutex<Vec<SnapshotItem>>>,
    parts: Arc<AtomicUsize>,
}

impl Loader for Came {
    fn item(&self, item: SnapshotItem) {
        self.items.lock().unwrap().push(item);
    }

    fn expect(&self, _: usize) {}

    fn part(&self) -> Box<dyn Part> {
        self.parts.fetch_add(1, Ordering::Relaxed);
        Box::new(Keys { came: self.clone(), keys: Vec::new() })
    }
}

/// Keys of a part.
struct Keys {
    came: Came,
    keys: Vec<(Key, Vec<Secret>)>,
}

impl Part for Keys {
    fn key(&mut self, key: &LoadedKey<'_>) {
        self.keys.push((key.to_key(), key.left.to_vec()));
    }

    fn end(self: Box<Self>) {
        let items = self.keys.into_iter().map(|(key, left)| SnapshotItem::Key(Arc::new(key), left));
        self.came.items.lock().unwrap().extend(items);
    }
}
