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
        log::{Change, LogRow},
        name::{AccountId, KeyId},
        time::Revision,
    },
    store::{BulkReader, Store, StoreError, StoredKey},
};

use super::key_records::{RevisionSet, key_of};

/// How many differences are told.
const MOST: usize = 100;
/// How many records are in memory at once.
const PAGE: u32 = 500;

/// A record that is not what the log says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mismatch {
    /// Which, such as `key 0198…`.
    pub record: String,
    /// The entry about it.
    pub revision: Revision,
    /// What is wrong.
    pub problem: String,
}

/// What was found so far.
#[derive(Debug)]
pub(super) struct Records {
    pub(super) seen: u64,
    /// The entries that say what the row of a key says.
    pub(super) matched: RevisionSet,
    /// By record: one difference of each is enough.
    mismatches: BTreeMap<String, Mismatch>,
    /// Roles and members that an entry has and the tables have not: a later entry must end them.
    gone: BTreeMap<String, Revision>,
}

/// How a record of the tables compares with an entry about it.
pub(super) enum Found {
    /// The very record.
    Same,
    /// Another one of the same revision.
    Differs,
    /// It is not there.
    Missing,
    /// It is at this revision.
    At(Revision),
}

pub(super) fn compare<T: PartialEq>(
    found: Option<&T>,
    logged: &T,
    revision: impl Fn(&T) -> Revision,
) -> Found {
    match found {
        None => Found::Missing,
        Some(found) if revision(found) != revision(logged) => Found::At(revision(found)),
        Some(found) if found == logged => Found::Same,
        Some(_) => Found::Differs,
    }
}

impl Records {
    /// Nothing was compared yet; the first entry that will be has this revision.
    pub(super) fn starting_at(first: Revision) -> Records {
        Records {
            seen: 0,
            matched: RevisionSet::starting_at(first),
            mismatches: BTreeMap::new(),
            gone: BTreeMap::new(),
        }
    }

    /// How many records were held against the log, and where they differ.
    pub(super) fn finish(mut self) -> (u64, Vec<Mismatch>) {
        for (record, revision) in std::mem::take(&mut self.gone) {
            self.note(record, revision, "the log has it, and the tables have not".to_owned());
        }
        (self.seen, self.mismatches.into_values().collect())
    }

    pub(super) fn note(&mut self, record: String, revision: Revision, problem: String) {
        if self.mismatches.len() < MOST {
            let mismatch = Mismatch { record: record.clone(), revision, problem };
            self.mismatches.entry(record).or_insert(mismatch);
        }
    }

    pub(super) fn found(&mut self, record: String, revision: Revision, found: &Found) {
        match found {
            Found::Same => self.seen += 1,
            // A later entry is about it.
            Found::At(newer) if *newer > revision => {}
            Found::At(older) => {
                let problem = format!("the tables hold an older state of it, of entry {older}");
                self.note(record, revision, problem);
            }
            Found::Differs => {
                self.note(record, revision, "the tables hold something else than the entry says".to_owned());
            }
            Found::Missing => {
                self.note(record, revision, "the log has it, and the tables have not".to_owned());
            }
        }
    }

    /// Holds the tables against entries that are known to be whole.
    pub(super) async fn entries(
        &mut self,
        store: &dyn Store,
        reader: &mut dyn BulkReader,
        rows: &[LogRow],
    ) -> Result<(), StoreError> {
        let mut newest: BTreeMap<String, (Revision, Change)> = BTreeMap::new();
        let mut ends: BTreeSet<String> = BTreeSet::new();
        let mut keys = Vec::with_capacity(rows.len());
        for row in rows {
            if let Some(id) = key_of(row) {
                keys.push((id, row));
                continue;
            }
            // What a newer version wrote is not held against anything by this one.
            let Ok(change) = serde_json::from_str::<Change>(&row.payload) else { continue };
            let name = named(&change);
            if matches!(change, Change::RoleDeleted(_) | Change::MemberRemoved(_)) {
                ends.insert(name.clone());
            }
            newest.insert(name, (row.revision, change));
        }
        self.key_entries(store, reader, keys).await?;
        self.gone.retain(|name, _| !ends.contains(name));
        let ids: Vec<_> = newest.values().filter_map(|(_, change)| change.key_id()).collect();
        let keys = self.keys(store, &ids).await?;
        for (name, (revision, change)) in newest {
            self.one(store, name, revision, &change, &keys).await?;
        }
        Ok(())
    }

    async fn one(
        &mut self,
        store: &dyn Store,
        name: String,
        revision: Revision,
        change: &Change,
        keys: &HashMap<KeyId, Option<StoredKey>>,
    ) -> Result<(), StoreError> {
        let found = match change {
            Change::Key(key) => match keys.get(&key.id) {
                Some(found) => compare(found.as_ref().map(|found| &found.key), &**key, |key| key.revision),
                // It is told of already.
                None => return Ok(()),
            },
            Change::Account(account) => {
                compare(store.account(&account.id).await?.as_ref(), &**account, |account| account.revision)
            }
            Change::Role(role) | Change::RoleDeleted(role) => {
                let roles = store.roles(role.account.as_ref()).await?;
                let same = roles.iter().find(|one| (&one.account, &one.name) == (&role.account, &role.name));
                compare(same, &**role, |role| role.revision)
            }
            Change::Member(member) | Change::MemberRemoved(member) => {
                let members = store.memberships(&member.user).await?;
                compare(members.iter().find(|one| one.account == member.account), &**member, |one| {
                    one.revision
                })
            }
        };
        match (change, found) {
            (Change::RoleDeleted(_) | Change::MemberRemoved(_), Found::Missing) => {}
            // Made anew since.
            (Change::RoleDeleted(_) | Change::MemberRemoved(_), Found::At(newer)) if newer > revision => {}
            (Change::RoleDeleted(_) | Change::MemberRemoved(_), _) => {
                self.note(name, revision, "the log has ended it, and the tables still have it".to_owned());
            }
            (Change::Role(_) | Change::Member(_), Found::Missing) => drop(self.gone.insert(name, revision)),
            (_, found) => self.found(name, revision, &found),
        }
        Ok(())
    }

    /// Looks for records that no entry has made. Those whose newest entry was archived are passed over.
    pub(super) async fn planted(
        &mut self,
        store: &dyn Store,
        reader: &mut dyn BulkReader,
        archived: Revision,
    ) -> Result<(), StoreError> {
        match self.planted_in_tables(store, reader, archived).await {
            Err(StoreError::Damaged(what)) => {
                self.note("a row of the tables".to_owned(), Revision(0), what);
                Ok(())
            }
            ended => ended,
        }
    }

    async fn planted_in_tables(
        &mut self,
        store: &dyn Store,
        reader: &mut dyn BulkReader,
        archived: Revision,
    ) -> Result<(), StoreError> {
        self.planted_keys(store, reader, archived).await?;
        self.roles_logged(store, archived, None).await?;
        let mut after = None;
        loop {
            let page = store.accounts(after.as_ref(), PAGE).await?;
            let Some(last) = page.last() else { return Ok(()) };
            after = Some(last.id.clone());
            for account in &page {
                self.roles_logged(store, archived, Some(&account.id)).await?;
                self.members_logged(store, archived, &account.id).await?;
            }
            let changes = page.into_iter().map(|account| Change::Account(Arc::new(account)));
            self.logged(store, archived, changes).await?;
        }
    }

    async fn roles_logged(
        &mut self,
        store: &dyn Store,
        archived: Revision,
        account: Option<&AccountId>,
    ) -> Result<(), StoreError> {
        // With an account's roles come the global ones.
        let roles = store.roles(account).await?.into_iter().filter(|role| role.account.as_ref() == account);
        self.logged(store, archived, roles.map(|role| Change::Role(Arc::new(role)))).await
    }

    async fn members_logged(
        &mut self,
        store: &dyn Store,
        archived: Revision,
        account: &AccountId,
    ) -> Result<(), StoreError> {
        let mut after = None;
        loop {
            let page = store.members(account, after.as_ref(), PAGE).await?;
            let Some(last) = page.last() else { return Ok(()) };
            after = Some(last.user.clone());
            let changes = page.into_iter().map(|member| Change::Member(Arc::new(member)));
            self.logged(store, archived, changes).await?;
        }
    }

    /// Requires that the entry at each record's revision is about that record.
    pub(super) async fn logged(
        &mut self,
        store: &dyn Store,
        archived: Revision,
        records: impl Iterator<Item = Change>,
    ) -> Result<(), StoreError> {
        let records: Vec<_> = records
            .map(|record| (named(&record), record.revision()))
            .filter(|(_, revision)| *revision > archived)
            .collect();
        let revisions: Vec<_> = records.iter().map(|(_, revision)| *revision).collect();
        let about: HashSet<_> = store
            .log_at(&revisions)
            .await?
            .iter()
            .filter_map(|row| Some((named(&serde_json::from_str(&row.payload).ok()?), row.revision)))
            .collect();
        for record in records.into_iter().filter(|record| !about.contains(record)) {
            let (name, revision) = record;
            self.note(name, revision, "the tables have it, and no entry of the log is about it".to_owned());
        }
        Ok(())
    }
}

/// The record that a change is about, for people.
fn named(change: &Change) -> String {
    match change {
        Change::Key(key) => format!("key {}", key.id),
        Change::Account(account) => format!("account {}", account.id),
        Change::Role(role) | Change::RoleDeleted(role) => match &role.account {
            Some(account) => format!("role {} of account {account}", role.name),
            None => format!("global role {}", role.name),
        },
        Change::Member(member) | Change::MemberRemoved(member) => {
            format!("member {} of account {}", member.user, member.account)
        }
    }
}
