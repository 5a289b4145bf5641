//! Compares the key tables with the audit log.
//!
//! Keys outnumber all other records. If a key's row is exactly what its newest entry has, both are compared as text,
//! and the search for planted rows skips the row.

use std::collections::{HashMap, HashSet};

use crate::{
    domain::{
        key::ApiKey,
        log::{LogEntry, RecordChange},
        name::KeyId,
        time::Revision,
    },
    store::{BulkReader, Store, StoreError, StoredKey},
};

use super::{
    revision_set::RevisionSet,
    table_comparison::{TableComparison, compare},
};

/// Keys in memory at once.
const PAGE: usize = 500;
/// Ids that are read at once.
const SCANNED: u32 = 5000;

/// Whether an entry has exactly this key, as this version of Keyward encodes it. Another version may encode the same
/// key differently.
fn entry_matches_key(row: &LogEntry, key: &ApiKey, text: &mut Vec<u8>) -> bool {
    text.clear();
    text.extend_from_slice(br#"{"key":"#);
    if serde_json::to_writer(&mut *text, key).is_err() {
        return false;
    }
    // The origin of the change is the last field of the record, before its brace.
    text.pop();
    let rest = row.payload.as_bytes().strip_prefix(text.as_slice());
    rest.is_some_and(|rest| rest == b"}}" || rest.starts_with(br#","via":{"#))
}

impl TableComparison {
    /// Compares keys with the newest entry of a page about each. `entries` are the page's entries about keys, in order.
    /// The caller has verified the page.
    pub(super) async fn compare_key_entries(
        &mut self,
        store: &dyn Store,
        reader: &mut dyn BulkReader,
        mut entries: Vec<(KeyId, &LogEntry)>,
    ) -> Result<(), StoreError> {
        // Keep the newest entry about each key.
        entries.sort_by_key(|(id, _)| *id);
        entries.dedup_by(|next, kept| {
            let is_same = next.0 == kept.0;
            if is_same {
                kept.1 = next.1;
            }
            is_same
        });
        let ids: Vec<_> = entries.iter().map(|(id, _)| *id).collect();
        let mut text = Vec::new();
        match reader.keys_at(&ids).await {
            Ok(keys) => {
                let mut keys = keys.iter().peekable();
                for (id, row) in entries {
                    self.key_entry(id, row, keys.next_if(|key| key.id == id), &mut text);
                }
            }
            Err(StoreError::Damaged(_)) => {
                let stored = self.load_keys(store, &ids).await?;
                for (id, row) in entries {
                    // A key with a damaged row was recorded already.
                    let Some(stored) = stored.get(&id) else { continue };
                    self.key_entry(id, row, stored.as_ref().map(|stored| &stored.key), &mut text);
                }
            }
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// Compares a key with the newest entry of a page about it. `text` is a reused buffer.
    fn key_entry(&mut self, id: KeyId, row: &LogEntry, key: Option<&ApiKey>, text: &mut Vec<u8>) {
        match key {
            // A later entry is about it.
            Some(key) if key.revision > row.revision => {}
            Some(key) if key.revision == row.revision && entry_matches_key(row, key, text) => {
                self.compared_records += 1;
                self.matched_revisions.insert(row.revision);
            }
            _ => self.compare_parsed(id, row, key),
        }
    }

    fn compare_parsed(&mut self, id: KeyId, row: &LogEntry, key: Option<&ApiKey>) {
        // An entry of a newer version may not parse; it is skipped.
        if let Ok(RecordChange::Key(logged)) = serde_json::from_str(&row.payload) {
            let found = compare(key, &*logged, |key| key.revision);
            self.add_comparison(format!("key {id}"), row.revision, &found);
        }
    }

    /// Loads the keys with these ids. Damaged rows are recorded as mismatches and left out.
    pub(super) async fn load_keys(
        &mut self,
        store: &dyn Store,
        ids: &[KeyId],
    ) -> Result<HashMap<KeyId, Option<StoredKey>>, StoreError> {
        let mut keys: HashMap<_, _> = ids.iter().map(|id| (*id, None)).collect();
        match store.get_keys(ids).await {
            Ok(found) => keys.extend(found.into_iter().map(|stored| (stored.key.id, Some(stored)))),
            Err(StoreError::Damaged(_)) => {
                for id in ids {
                    match store.get_key(*id).await {
                        Ok(found) => drop(keys.insert(*id, found)),
                        Err(StoreError::Damaged(what)) => {
                            keys.remove(id);
                            self.add_mismatch(format!("key {id}"), Revision(0), what);
                        }
                        Err(error) => return Err(error),
                    }
                }
            }
            Err(error) => return Err(error),
        }
        Ok(keys)
    }

    /// Looks for keys without an entry in the log. A row needs no second look if it alone has the revision of an entry
    /// that it matches.
    pub(super) async fn find_planted_keys(
        &mut self,
        store: &dyn Store,
        reader: &mut dyn BulkReader,
        archived: Revision,
    ) -> Result<(), StoreError> {
        let mut claimed = RevisionSet::starting_at(self.matched_revisions.first());
        let mut claimed_twice = HashSet::new();
        self.scan_keys(store, reader, archived, |records, _, revision| {
            if !records.matched_revisions.contains(revision) {
                return true;
            }
            let is_first = claimed.insert(revision);
            if !is_first {
                claimed_twice.insert(revision);
            }
            !is_first
        })
        .await?;
        if claimed_twice.is_empty() {
            return Ok(());
        }
        // Of several rows with one revision, any may be the planted one.
        self.scan_keys(store, reader, archived, |_, _, revision| claimed_twice.contains(&revision)).await
    }

    /// Scans all keys, and checks those for which `is_suspect` is true.
    async fn scan_keys(
        &mut self,
        store: &dyn Store,
        reader: &mut dyn BulkReader,
        archived: Revision,
        mut is_suspect: impl FnMut(&TableComparison, KeyId, Revision) -> bool,
    ) -> Result<(), StoreError> {
        let (mut after, mut suspects) = (None, Vec::new());
        loop {
            let page = reader.key_revisions(after, SCANNED).await?;
            let Some((last, _)) = page.last() else { break };
            after = Some(*last);
            for (id, revision) in page {
                if is_suspect(self, id, revision) {
                    suspects.push(id);
                }
            }
            let whole = suspects.len() - suspects.len() % PAGE;
            for ids in suspects[..whole].chunks(PAGE) {
                self.check_keys_logged(store, archived, ids).await?;
            }
            suspects.drain(..whole);
        }
        self.check_keys_logged(store, archived, &suspects).await
    }

    /// Loads keys and checks that each has an entry.
    async fn check_keys_logged(
        &mut self,
        store: &dyn Store,
        archived: Revision,
        ids: &[KeyId],
    ) -> Result<(), StoreError> {
        if ids.is_empty() {
            return Ok(());
        }
        let keys = self.load_keys(store, ids).await?;
        let found = keys.into_values().flatten().map(|stored| RecordChange::Key(stored.key.into()));
        self.check_logged(store, archived, found).await
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::audit::table_comparison::entry_key_id;
    use crate::domain::{
        key::tests::sample_key,
        log::{GENESIS_HASH, tests::sample_entry},
        log_payload::{self, ChangeOrigin},
    };

    #[test]
    fn an_entry_says_a_key_with_and_without_how_it_came_about() {
        let key = sample_key();
        let mut entry = sample_entry(1, GENESIS_HASH);
        let mut buffer = Vec::new();
        assert_eq!(entry_key_id(&entry), Some(key.id));
        assert!(entry_matches_key(&entry, &key, &mut buffer));
        let via = ChangeOrigin { previous: Some(Revision(3)), ..ChangeOrigin::UNKNOWN };
        entry.payload = log_payload::encode_payload(&RecordChange::Key(Arc::new(key.clone())), &via).unwrap();
        assert!(entry_matches_key(&entry, &key, &mut buffer) && entry_key_id(&entry) == Some(key.id));
        let other = ApiKey { created_by: "another".to_owned(), ..key.clone() };
        assert!(!entry_matches_key(&entry, &other, &mut buffer));
        entry.payload = entry.payload.replacen("}}", ",\"x\":1}}", 1);
        entry.key_id = Some(KeyId::from_bytes([9; 16]));
        assert_eq!(entry_key_id(&entry), None, "column and payload disagree");
    }
}
