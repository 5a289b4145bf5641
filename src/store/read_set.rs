//! The read set of a change: every record that was read to authorize it, by its place, with the revision at which it
//! was found. The transaction compares them with the tables and rejects the change if any has moved.

use crate::domain::{
    name::{AccountId, KeyId, RoleName, UserId},
    time::{Revision, Timestamp},
};

/// Where a record is looked up. A role's place is exact: the global role of the same name is another place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RecordId {
    /// A key.
    Key(KeyId),
    /// An account.
    Account(AccountId),
    /// A role of an account, or, without one, a global role.
    Role(Option<AccountId>, RoleName),
    /// A user's membership in an account.
    Member(AccountId, UserId),
}

/// What the look-up of a place found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReadState {
    /// No record.
    Absent,
    /// The record with this revision.
    AtRevision(Revision),
    /// A record whose own revision is not known in memory; it was not changed after this one.
    UnchangedSince(Revision),
}

impl ReadState {
    /// What a look-up found whose record has this revision.
    #[must_use]
    pub fn from_revision(found: Option<Revision>) -> ReadState {
        found.map_or(ReadState::Absent, ReadState::AtRevision)
    }

    /// Whether a record with this revision, or its absence, is what was seen.
    pub(super) fn still_matches(self, now: Option<Revision>) -> bool {
        match self {
            ReadState::Absent => now.is_none(),
            ReadState::AtRevision(revision) => now == Some(revision),
            ReadState::UnchangedSince(revision) => now.is_some_and(|now| now <= revision),
        }
    }
}

/// Everything that an authorization has read, and until when it holds.
#[derive(Clone, Debug, Default)]
pub struct ReadSet {
    records: Vec<(RecordId, ReadState)>,
    valid_until: Option<Timestamp>,
}

impl ReadSet {
    /// Adds a record. A place that was read twice and changed in between never matches the tables.
    pub fn add(&mut self, place: RecordId, seen: ReadState) {
        let read = (place, seen);
        if !self.records.contains(&read) {
            self.records.push(read);
        }
    }

    /// Limits the authorization to the time before `end`.
    pub fn limit_until(&mut self, end: Timestamp) {
        self.valid_until = Some(self.valid_until.map_or(end, |until| until.min(end)));
    }

    /// Whether the authorization has run out at `now`.
    #[must_use]
    pub fn is_expired(&self, now: Timestamp) -> bool {
        self.valid_until.is_some_and(|end| now >= end)
    }

    /// The records.
    pub(super) fn iter(&self) -> impl Iterator<Item = &(RecordId, ReadState)> {
        self.records.iter()
    }
}
