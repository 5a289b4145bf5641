//! The read set of a change: each record that was read to authorize it, with the revision that was found.
//!
//! The transaction compares the read set with the tables, and rejects the change if a record has changed.

use crate::domain::{
    name::{AccountId, KeyId, RoleName, UserId},
    time::{Revision, Timestamp},
};

/// The identity of a record. The global role and an account's role of the same name are different records.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RecordId {
    /// The key with this id.
    Key(KeyId),
    /// The account with exactly this id.
    Account(AccountId),
    /// A role of an account; without an account, a global role.
    Role(Option<AccountId>, RoleName),
    /// The membership of a user in an account.
    Member(AccountId, UserId),
}

/// What a lookup of a record found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReadState {
    /// The record does not exist.
    Absent,
    /// The record exists, with this revision.
    AtRevision(Revision),
    /// The record exists. Its own revision is not in memory, but it has not changed since this one.
    UnchangedSince(Revision),
}

impl ReadState {
    /// The result of a lookup that found a record with this revision, or none.
    #[must_use]
    pub fn from_revision(found: Option<Revision>) -> ReadState {
        found.map_or(ReadState::Absent, ReadState::AtRevision)
    }

    /// Whether a record with this revision, or its absence, matches what was read.
    pub(super) fn still_matches(self, now: Option<Revision>) -> bool {
        match self {
            ReadState::Absent => now.is_none(),
            ReadState::AtRevision(revision) => now == Some(revision),
            ReadState::UnchangedSince(revision) => now.is_some_and(|now| now <= revision),
        }
    }
}

/// Everything that an authorization has read, and how long it is valid.
#[derive(Clone, Debug, Default)]
pub struct ReadSet {
    records: Vec<(RecordId, ReadState)>,
    valid_until: Option<Timestamp>,
}

impl ReadSet {
    /// Adds a record. A record that was read twice and changed in between never matches the tables.
    pub fn add(&mut self, record: RecordId, state: ReadState) {
        let read = (record, state);
        if !self.records.contains(&read) {
            self.records.push(read);
        }
    }

    /// Limits the validity of the authorization to the time before `end`.
    pub fn limit_until(&mut self, end: Timestamp) {
        self.valid_until = Some(self.valid_until.map_or(end, |until| until.min(end)));
    }

    /// Whether the authorization has expired at `now`.
    #[must_use]
    pub fn is_expired(&self, now: Timestamp) -> bool {
        self.valid_until.is_some_and(|end| now >= end)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &(RecordId, ReadState)> {
        self.records.iter()
    }
}
