//! Compares the tables of the database with the audit log.
//!
//! Somebody with write access to the database could restore an older row, delete a row, or plant one: anybody can
//! compute a row's checksum. So each record must equal its newest entry.
//!
//! A record whose newest entry was archived cannot be compared; its row is trusted.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    sync::Arc,
};

use crate::{
    domain::{
        log::{LogEntry, RecordChange},
        name::{AccountId, KeyId},
        time::Revision,
    },
    store::{BulkReader, Store, StoreError, StoredKey},
};

use super::revision_set::RevisionSet;

/// Mismatches that a report lists at most.
const MAX_MISMATCHES: usize = 100;
/// Records in memory at once.
const PAGE: u32 = 500;

/// A record that differs from the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RecordMismatch {
    /// The record, such as `key 0198…`.
    pub(crate) record: String,
    /// Revision of the entry about the record; 0 if no entry is.
    pub(crate) revision: Revision,
    /// How the record differs, for people.
    pub(crate) problem: String,
}

/// The state of a comparison: counts, matches and mismatches so far.
#[derive(Debug)]
pub(super) struct TableComparison {
    pub(super) compared_records: u64,
    /// Revisions of the entries that match the row of a key.
    pub(super) matched_revisions: RevisionSet,
    /// By record; only the first mismatch of each is kept.
    mismatches: BTreeMap<String, RecordMismatch>,
    /// Roles and members that an entry has and the tables lack: a later entry must delete them.
    missing_records: BTreeMap<String, Revision>,
}

/// The result of comparing a record with an entry about it.
pub(super) enum RecordComparison {
    Same,
    /// The revisions are equal, the contents differ.
    Differs,
    /// The tables lack the record.
    Missing,
    /// The record in the tables has this revision.
    OtherRevision(Revision),
}

pub(super) fn compare<T: PartialEq>(
    found: Option<&T>,
    logged: &T,
    revision: impl Fn(&T) -> Revision,
) -> RecordComparison {
    match found {
        None => RecordComparison::Missing,
        Some(found) if revision(found) != revision(logged) => {
            RecordComparison::OtherRevision(revision(found))
        }
        Some(found) if found == logged => RecordComparison::Same,
        Some(_) => RecordComparison::Differs,
    }
}

impl TableComparison {
    /// An empty comparison whose first entry will have this revision.
    pub(super) fn starting_at(first: Revision) -> TableComparison {
        TableComparison {
            compared_records: 0,
            matched_revisions: RevisionSet::starting_at(first),
            mismatches: BTreeMap::new(),
            missing_records: BTreeMap::new(),
        }
    }

    /// Returns the number of compared records, and the mismatches.
    pub(super) fn finish(mut self) -> (u64, Vec<RecordMismatch>) {
        for (record, revision) in std::mem::take(&mut self.missing_records) {
            self.add_mismatch(record, revision, "the log has it, and the tables do not".to_owned());
        }
        (self.compared_records, self.mismatches.into_values().collect())
    }

    pub(super) fn add_mismatch(&mut self, record: String, revision: Revision, problem: String) {
        if self.mismatches.len() < MAX_MISMATCHES {
            let mismatch = RecordMismatch { record: record.clone(), revision, problem };
            self.mismatches.entry(record).or_insert(mismatch);
        }
    }

    pub(super) fn add_comparison(&mut self, record: String, revision: Revision, found: &RecordComparison) {
        match found {
            RecordComparison::Same => self.compared_records += 1,
            // A later entry covers it.
            RecordComparison::OtherRevision(newer) if *newer > revision => {}
            RecordComparison::OtherRevision(older) => {
                let problem = format!("the tables hold an older state of it, from entry {older}");
                self.add_mismatch(record, revision, problem);
            }
            RecordComparison::Differs => {
                self.add_mismatch(record, revision, "the tables differ from the entry".to_owned());
            }
            RecordComparison::Missing => {
                self.add_mismatch(record, revision, "the log has it, and the tables do not".to_owned());
            }
        }
    }

    /// Compares the tables with entries that the caller has verified.
    pub(super) async fn compare_entries(
        &mut self,
        store: &dyn Store,
        reader: &mut dyn BulkReader,
        rows: &[LogEntry],
    ) -> Result<(), StoreError> {
        let mut newest: BTreeMap<String, (Revision, RecordChange)> = BTreeMap::new();
        let mut ends: BTreeSet<String> = BTreeSet::new();
        let mut keys = Vec::with_capacity(rows.len());
        for row in rows {
            if let Some(id) = entry_key_id(row) {
                keys.push((id, row));
                continue;
            }
            // An entry of a newer version may not parse; it is skipped.
            let Ok(change) = serde_json::from_str::<RecordChange>(&row.payload) else { continue };
            let name = record_name(&change);
            if matches!(change, RecordChange::RoleDeleted(_) | RecordChange::MemberRemoved(_)) {
                ends.insert(name.clone());
            }
            newest.insert(name, (row.revision, change));
        }
        self.compare_key_entries(store, reader, keys).await?;
        self.missing_records.retain(|name, _| !ends.contains(name));
        let ids: Vec<_> = newest.values().filter_map(|(_, change)| change.key_id()).collect();
        let keys = self.load_keys(store, &ids).await?;
        for (name, (revision, change)) in newest {
            self.compare_record(store, name, revision, &change, &keys).await?;
        }
        Ok(())
    }

    /// Compares a record with the newest entry about it. One that cannot be read differs from it.
    async fn compare_record(
        &mut self,
        store: &dyn Store,
        name: String,
        revision: Revision,
        change: &RecordChange,
        keys: &HashMap<KeyId, Option<StoredKey>>,
    ) -> Result<(), StoreError> {
        match self.compare_readable_record(store, name.clone(), revision, change, keys).await {
            Err(StoreError::Damaged(what)) => {
                self.add_mismatch(name, revision, what);
                Ok(())
            }
            compared => compared,
        }
    }

    async fn compare_readable_record(
        &mut self,
        store: &dyn Store,
        name: String,
        revision: Revision,
        change: &RecordChange,
        keys: &HashMap<KeyId, Option<StoredKey>>,
    ) -> Result<(), StoreError> {
        let found = match change {
            RecordChange::Key(key) => match keys.get(&key.id) {
                Some(found) => compare(found.as_ref().map(|found| &found.key), &**key, |key| key.revision),
                // Its damaged row was recorded already.
                None => return Ok(()),
            },
            RecordChange::Account(account) => {
                compare(store.get_account(&account.id).await?.as_ref(), &**account, |account| {
                    account.revision
                })
            }
            RecordChange::Role(role) | RecordChange::RoleDeleted(role) => {
                let roles = store.list_roles(role.account.as_ref()).await?;
                let same = roles.iter().find(|one| (&one.account, &one.name) == (&role.account, &role.name));
                compare(same, &**role, |role| role.revision)
            }
            RecordChange::Member(member) | RecordChange::MemberRemoved(member) => {
                let members = store.list_memberships(&member.user).await?;
                compare(members.iter().find(|one| one.account == member.account), &**member, |one| {
                    one.revision
                })
            }
        };
        match (change, found) {
            (RecordChange::RoleDeleted(_) | RecordChange::MemberRemoved(_), RecordComparison::Missing) => {}
            // Created again since.
            (
                RecordChange::RoleDeleted(_) | RecordChange::MemberRemoved(_),
                RecordComparison::OtherRevision(newer),
            ) if newer > revision => {}
            (RecordChange::RoleDeleted(_) | RecordChange::MemberRemoved(_), _) => {
                self.add_mismatch(
                    name,
                    revision,
                    "the log has deleted it, and the tables still have it".to_owned(),
                );
            }
            (RecordChange::Role(_) | RecordChange::Member(_), RecordComparison::Missing) => {
                self.missing_records.insert(name, revision);
            }
            (_, found) => self.add_comparison(name, revision, &found),
        }
        Ok(())
    }

    /// Looks for records without an entry in the log. Those whose newest entry was archived are skipped.
    pub(super) async fn find_planted(
        &mut self,
        store: &dyn Store,
        reader: &mut dyn BulkReader,
        archived: Revision,
    ) -> Result<(), StoreError> {
        let found = self.find_row_faults(reader).await;
        self.note_damage(found)?;
        let found = self.find_planted_keys(store, reader, archived).await;
        self.note_damage(found)?;
        let found = self.find_planted_in_tables(store, archived).await;
        self.note_damage(found)
    }

    /// Turns a row that cannot be read into a mismatch, unless one with the same problem is known already.
    fn note_damage(&mut self, found: Result<(), StoreError>) -> Result<(), StoreError> {
        let Err(StoreError::Damaged(what)) = found else { return found };
        if self.mismatches.values().all(|known| known.problem != what) {
            self.add_mismatch("a row of the tables".to_owned(), Revision(0), what);
        }
        Ok(())
    }

    async fn find_row_faults(&mut self, reader: &mut dyn BulkReader) -> Result<(), StoreError> {
        for fault in reader.find_row_faults(MAX_MISMATCHES as u32).await? {
            self.add_mismatch(fault.record, Revision(0), fault.problem.to_owned());
        }
        Ok(())
    }

    async fn find_planted_in_tables(
        &mut self,
        store: &dyn Store,
        archived: Revision,
    ) -> Result<(), StoreError> {
        let checked = self.check_roles_logged(store, archived, None).await;
        self.note_damage(checked)?;
        let mut after = None;
        loop {
            let page = store.list_accounts(after.as_ref(), PAGE).await?;
            let Some(last) = page.last() else { return Ok(()) };
            after = Some(last.id.clone());
            for account in &page {
                let checked = self.check_roles_logged(store, archived, Some(&account.id)).await;
                self.note_damage(checked)?;
                let checked = self.check_members_logged(store, archived, &account.id).await;
                self.note_damage(checked)?;
            }
            let changes = page.into_iter().map(|account| RecordChange::Account(Arc::new(account)));
            self.check_logged(store, archived, changes).await?;
        }
    }

    async fn check_roles_logged(
        &mut self,
        store: &dyn Store,
        archived: Revision,
        account: Option<&AccountId>,
    ) -> Result<(), StoreError> {
        // The store lists global roles with an account's own.
        let roles =
            store.list_roles(account).await?.into_iter().filter(|role| role.account.as_ref() == account);
        self.check_logged(store, archived, roles.map(|role| RecordChange::Role(Arc::new(role)))).await
    }

    async fn check_members_logged(
        &mut self,
        store: &dyn Store,
        archived: Revision,
        account: &AccountId,
    ) -> Result<(), StoreError> {
        let mut after = None;
        loop {
            let page = store.list_members(account, after.as_ref(), PAGE).await?;
            let Some(last) = page.last() else { return Ok(()) };
            after = Some(last.user.clone());
            let changes = page.into_iter().map(|member| RecordChange::Member(Arc::new(member)));
            self.check_logged(store, archived, changes).await?;
        }
    }

    /// Checks that the entry at each record's revision is about that record.
    pub(super) async fn check_logged(
        &mut self,
        store: &dyn Store,
        archived: Revision,
        records: impl Iterator<Item = RecordChange>,
    ) -> Result<(), StoreError> {
        let records: Vec<_> = records
            .map(|record| (record_name(&record), record.revision()))
            .filter(|(_, revision)| *revision > archived)
            .collect();
        let revisions: Vec<_> = records.iter().map(|(_, revision)| *revision).collect();
        let about: HashSet<_> = store
            .get_log_entries(&revisions)
            .await?
            .iter()
            .filter_map(|row| Some((record_name(&serde_json::from_str(&row.payload).ok()?), row.revision)))
            .collect();
        for record in records.into_iter().filter(|record| !about.contains(record)) {
            let (name, revision) = record;
            self.add_mismatch(
                name,
                revision,
                "the tables have it, and the log has no entry about it".to_owned(),
            );
        }
        Ok(())
    }
}

/// Names the record of a change, for people.
fn record_name(change: &RecordChange) -> String {
    match change {
        RecordChange::Key(key) => format!("key {}", key.id),
        RecordChange::Account(account) => format!("account {}", account.id),
        RecordChange::Role(role) | RecordChange::RoleDeleted(role) => match &role.account {
            Some(account) => format!("role {} of account {account}", role.name),
            None => format!("global role {}", role.name),
        },
        RecordChange::Member(member) | RecordChange::MemberRemoved(member) => {
            format!("member {} of account {}", member.user, member.account)
        }
    }
}

/// The key that an entry is about, if its column and its payload agree.
pub(super) fn entry_key_id(row: &LogEntry) -> Option<KeyId> {
    let id = row.key_id?;
    let record = row.payload.strip_prefix(r#"{"key":{"id":""#)?;
    record.starts_with(&id.to_string()).then_some(id)
}
