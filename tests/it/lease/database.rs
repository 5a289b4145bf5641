//! The database as the protocol knows it: one linearizable copy. Each request is one transaction; a renewal reads
//! first and is committed some time after, the others take one instant. The database can be restarted, fail over,
//! lose rows, and be restored from a backup.

use keyward::domain::{
    lease::{
        Incarnation, Lease, Listing, Position, ReplicaId, Row, Rule, Rules as _,
        replica::{Renewal, Reply},
    },
    log::{GENESIS, Hash},
    time::{Revision, Timestamp},
};
use uuid::Uuid;

use super::{Broken, dice::Micros};

/// What a change does to a key. Revoking is for ever.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Created,
    Revoked,
}

/// One change of the log.
#[derive(Clone, Copy, Debug)]
pub(super) struct Entry {
    pub(super) key: u8,
    pub(super) kind: Kind,
    hash: Hash,
}

/// Keys as bits: which are live, and which are revoked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Keys {
    pub(super) live: u64,
    pub(super) revoked: u64,
}

impl Keys {
    pub(super) fn apply(&mut self, key: u8, kind: Kind) {
        let bit = 1 << key;
        match kind {
            Kind::Created => self.live |= bit,
            Kind::Revoked => {
                self.live &= !bit;
                self.revoked |= bit;
            }
        }
    }
}

/// What a Revoke found.
#[derive(Clone, Copy, Debug)]
pub(super) struct Committed {
    pub(super) change: Position,
    pub(super) again: bool,
    pub(super) longest: Lease,
}

#[derive(Clone)]
pub(super) struct Database {
    log: Vec<Entry>,
    pub(super) keys: Keys,
    pub(super) rows: Vec<Row>,
    pub(super) lease: Lease,
    pub(super) longest: Lease,
    pub(super) incarnation: Incarnation,
    pub(super) settled: Option<Incarnation>,
    /// Makes the hashes of another history differ.
    salt: u64,
    /// How far its wall clock is off, and how fast it runs.
    wall: i64,
    wall_rate: u64,
    /// How many changes an answer holds.
    pub(super) fits: usize,
}

/// 2026-01-01T00:00:00Z.
const START: i64 = 1_767_225_600_000_000;

fn link(before: Hash, salt: u64, key: u8, kind: Kind) -> Hash {
    let mut word = u64::from_be_bytes(*before.first_chunk().unwrap()) ^ salt;
    word = word.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (u64::from(key) << 8 | kind as u64);
    word = (word ^ word >> 29).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mut hash = GENESIS;
    hash[..8].copy_from_slice(&(word ^ word >> 32).to_be_bytes());
    hash
}

impl Database {
    pub(super) fn new(lease: Lease, wall_rate: u64, fits: usize) -> Database {
        let incarnation = Incarnation(1);
        Database {
            log: Vec::new(),
            keys: Keys::default(),
            rows: Vec::new(),
            lease,
            longest: lease,
            incarnation,
            // Nobody can hold a lease of a database that has just been made.
            settled: Some(incarnation),
            salt: 0,
            wall: 0,
            wall_rate,
            fits,
        }
    }

    pub(super) fn now(&self, at: Micros) -> Timestamp {
        let passed = i64::try_from(at * self.wall_rate / 1000).unwrap();
        Timestamp::from_micros(START + self.wall + passed)
    }

    pub(super) fn head(&self) -> Position {
        self.position(Revision(self.log.len() as u64)).unwrap()
    }

    fn position(&self, revision: Revision) -> Option<Position> {
        Some(Position { revision, hash: self.link(revision)? })
    }

    /// The link at a revision; None where the log ends before.
    pub(super) fn link(&self, revision: Revision) -> Option<Hash> {
        match revision {
            Revision(0) => Some(GENESIS),
            Revision(at) => self.log.get(at as usize - 1).map(|entry| entry.hash),
        }
    }

    pub(super) fn append(&mut self, key: u8, kind: Kind) -> Position {
        let hash = link(self.head().hash, self.salt, key, kind);
        self.log.push(Entry { key, kind, hash });
        self.keys.apply(key, kind);
        self.head()
    }

    /// Revokes a key, or finds that it is revoked. None: there is no such key (any more).
    pub(super) fn revoke(&mut self, key: u8) -> Option<Committed> {
        let found = self.log.iter().position(|entry| entry.key == key && entry.kind == Kind::Revoked);
        let (change, again) = match found {
            Some(at) => (self.position(Revision(at as u64 + 1)).unwrap(), true),
            None if self.keys.live >> key & 1 == 1 => (self.append(key, Kind::Revoked), false),
            None => return None,
        };
        Some(Committed { change, again, longest: self.longest })
    }

    pub(super) fn register(&mut self, id: u128, at: Micros) -> ReplicaId {
        let id = ReplicaId(Uuid::from_u128(id));
        self.rows.push(Row { id, applied: None, renew_seq: 0, last_seen: self.now(at) });
        id
    }

    /// What a renewal reads: the changes that the replica lacks, too. Its own change is seen when it is committed.
    pub(super) fn read(&self, renewal: &Renewal, at: Micros) -> (Reply, Vec<Entry>) {
        let from = renewal.applied.unwrap_or(Position::START);
        let lacking = self.log.get(from.revision.0 as usize..).unwrap_or_default();
        let fitting = match renewal.applied {
            Some(_) => &lacking[..lacking.len().min(self.fits)],
            None => &[],
        };
        let last = from.revision.0 + fitting.len() as u64;
        let upto = if fitting.is_empty() { from } else { self.position(Revision(last)).unwrap() };
        let reply = Reply {
            renewed: false,
            link: renewal.applied.and_then(|position| self.link(position.revision)),
            upto,
            head: self.head().revision,
            lease: self.lease,
            longest: self.longest,
            incarnation: self.incarnation,
            settled: self.settled,
            db_now: self.now(at),
        };
        (reply, fitting.to_vec())
    }

    /// Commits a renewal; whether it counts.
    pub(super) fn commit(&mut self, renewal: &Renewal, broken: Broken, at: Micros) -> bool {
        let same_history =
            renewal.applied.is_none_or(|position| self.link(position.revision) == Some(position.hash));
        if !same_history && broken.keep(Rule::HistoryIsCompared) {
            return false;
        }
        let last_seen = self.now(at);
        let row = self.rows.iter_mut().find(|row| row.id == renewal.id);
        let Some(row) = row.filter(|row| renewal.counts.expects(row.renew_seq)) else { return false };
        row.renew_seq = renewal.counts.next;
        row.applied = renewal.applied.map(|position| position.revision);
        row.last_seen = last_seen;
        if renewal.settle == Some(self.incarnation) {
            self.settled = renewal.settle;
        }
        true
    }

    pub(super) fn list(&self, at: Micros) -> Listing {
        Listing {
            rows: self.rows.clone(),
            longest: self.longest,
            incarnation: self.incarnation,
            settled: self.settled,
            db_now: self.now(at),
        }
    }

    pub(super) fn remove(&mut self, id: ReplicaId, renew_seq: u64) -> bool {
        let before = self.rows.len();
        self.rows.retain(|row| row.id != id || row.renew_seq != renew_seq);
        self.rows.len() < before
    }

    /// Another machine takes over, with every commit.
    pub(super) fn fail_over(&mut self, incarnation: Incarnation) {
        self.incarnation = incarnation;
    }

    /// An older state takes over.
    pub(super) fn restore(&mut self, backup: Database, incarnation: Incarnation) {
        let (wall, salt) = (self.wall, self.salt + 1);
        *self = Database { incarnation, wall, salt, ..backup };
    }

    /// Somebody sets its clock.
    pub(super) fn step_wall(&mut self, by: i64) {
        self.wall += by;
    }
}
