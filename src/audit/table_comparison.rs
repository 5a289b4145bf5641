//! The tables held against the log. Whoever can write the database could put an older row back, take one out, or plant one:
//! each has a checksum that anybody can make. So each record must be what the newest entry about it says.
//!
//! What the newest entry about a record was archived cannot be told here; its row is believed.

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

use super::key_comparison::{RevisionSet, entry_key_id};

/// How many differences are told.
const MAX_MISMATCHES: usize = 100;
/// How many records are in memory at once.
const PAGE: u32 = 500;

/// A record that is not what the log says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecordMismatch {
    /// Which, such as `key 0198…`.
    pub record: String,
    /// The entry about it.
    pub revision: Revision,
    /// What is wrong.
    pub problem: String,
}

/// What was found so far.
#[derive(Debug)]
pub(super) struct TableComparison {
    pub(super) compared_records: u64,
    /// The entries that say what the row of a key says.
    pub(super) matched_revisions: RevisionSet,
    /// By record: one difference of each is enough.
    mismatches: BTreeMap<String, RecordMismatch>,
    /// Roles and members that an entry has and the tables have not: a later entry must end them.
    missing_records: BTreeMap<String, Revision>,
}

/// How a record of the tables compares with an entry about it.
pub(super) enum RecordComparison {
    /// The very record.
    Same,
    /// Another one of the same revision.
    Differs,
    /// It is not there.
    Missing,
    /// It is at this revision.
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
    /// Nothing was compared yet; the first entry that will be has this revision.
    pub(super) fn starting_at(first: Revision) -> TableComparison {
        TableComparison {
            compared_records: 0,
            matched_revisions: RevisionSet::starting_at(first),
            mismatches: BTreeMap::new(),
            missing_records: BTreeMap::new(),
        }
    }

    /// How many records were held against the log, and where they differ.
    pub(super) fn finish(mut self) -> (u64, Vec<RecordMismatch>) {
        for (record, revision) in std::mem::take(&mut self.missing_records) {
            self.add_mismatch(record, revision, "the log has it, and the tables have not".to_owned());
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
            // A later entry is about it.
            RecordComparison::OtherRevision(newer) if *newer > revision => {}
            RecordComparison::OtherRevision(older) => {
                let problem = format!("the tables hold an older state of it, of entry {older}");
                self.add_mismatch(record, revision, problem);
            }
            RecordComparison::Differs => {
                self.add_mismatch(
                    record,
                    revision,
                    "the tables hold something else than the entry says".to_owned(),
                );
            }
            RecordComparison::Missing => {
                self.add_mismatch(record, revision, "the log has it, and the tables have not".to_owned());
            }
        }
    }

    /// Holds the tables against entries that are known to be whole.
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
            // What a newer version wrote is not held against anything by this one.
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
                // It is told of already.
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
            // Made anew since.
            (
                RecordChange::RoleDeleted(_) | RecordChange::MemberRemoved(_),
                RecordComparison::OtherRevision(newer),
            ) if newer > revision => {}
            (RecordChange::RoleDeleted(_) | RecordChange::MemberRemoved(_), _) => {
                self.add_mismatch(
                    name,
                    revision,
                    "the log has ended it, and the tables still have it".to_owned(),
                );
            }
            (RecordChange::Role(_) | RecordChange::Member(_), RecordComparison::Missing) => {
                self.missing_records.insert(name, revision);
            }
            (_, found) => self.add_comparison(name, revision, &found),
        }
        Ok(())
    }

    /// Looks for records that no entry has made. Those whose newest entry was archived are passed over.
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
        // With an account's roles come the global ones.
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

    /// Requires that the entry at each record's revision is about that record.
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
                "the tables have it, and no entry of the log is about it".to_owned(),
            );
        }
        Ok(())
    }
}

/// The record that a change is about, for people.
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
