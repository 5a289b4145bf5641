//! The database as the protocol knows it: one linearizable copy. Each request is one transaction; a renewal reads
//! first and is committed some time after, the others take one instant. The database can be restarted, fail over,
//! lose rows, and be restored from a backup.

use keyward::domain::{
    lease::{
        Incarnation, InvariantSet as _, LeaseDuration, LeaseInvariant, LogPosition, ReplicaId,
        ReplicaListing, ReplicaRow,
        replica::{RenewalReply, RenewalRequest},
    },
    log::{ChainHash, GENESIS_HASH},
    time::{Revision, Timestamp},
};
use uuid::Uuid;

use super::{RulesWithout, dice::Micros};

/// What a change does to a key. Revoking is for ever.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum KeyChangeKind {
    Created,
    Revoked,
}

/// One change of the log.
#[derive(Clone, Copy, Debug)]
pub(super) struct SimLogEntry {
    pub(super) key: u8,
    pub(super) kind: KeyChangeKind,
    hash: ChainHash,
}

/// Keys as bits: which are live, and which are revoked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct KeySets {
    pub(super) live: u64,
    pub(super) revoked: u64,
}

impl KeySets {
    pub(super) fn apply(&mut self, key: u8, kind: KeyChangeKind) {
        let bit = 1 << key;
        match kind {
            KeyChangeKind::Created => self.live |= bit,
            KeyChangeKind::Revoked => {
                self.live &= !bit;
                self.revoked |= bit;
            }
        }
    }
}

/// What a Revoke found.
#[derive(Clone, Copy, Debug)]
pub(super) struct RevokeResult {
    pub(super) change: LogPosition,
    pub(super) again: bool,
    pub(super) longest: LeaseDuration,
}

#[derive(Clone)]
pub(super) struct SimDatabase {
    log: Vec<SimLogEntry>,
    pub(super) keys: KeySets,
    pub(super) rows: Vec<ReplicaRow>,
    pub(super) lease: LeaseDuration,
    pub(super) longest: LeaseDuration,
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

fn link(before: ChainHash, salt: u64, key: u8, kind: KeyChangeKind) -> ChainHash {
    let mut word = u64::from_be_bytes(*before.first_chunk().unwrap()) ^ salt;
    word = word.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (u64::from(key) << 8 | kind as u64);
    word = (word ^ word >> 29).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mut hash = GENESIS_HASH;
    hash[..8].copy_from_slice(&(word ^ word >> 32).to_be_bytes());
    hash
}

impl SimDatabase {
    pub(super) fn new(lease: LeaseDuration, wall_rate: u64, fits: usize) -> SimDatabase {
        let incarnation = Incarnation(1);
        SimDatabase {
            log: Vec::new(),
            keys: KeySets::default(),
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

    pub(super) fn head(&self) -> LogPosition {
        self.position(Revision(self.log.len() as u64)).unwrap()
    }

    fn position(&self, revision: Revision) -> Option<LogPosition> {
        Some(LogPosition { revision, hash: self.link(revision)? })
    }

    /// The link at a revision; None where the log ends before.
    pub(super) fn link(&self, revision: Revision) -> Option<ChainHash> {
        match revision {
            Revision(0) => Some(GENESIS_HASH),
            Revision(at) => self.log.get(at as usize - 1).map(|entry| entry.hash),
        }
    }

    pub(super) fn append(&mut self, key: u8, kind: KeyChangeKind) -> LogPosition {
        let hash = link(self.head().hash, self.salt, key, kind);
        self.log.push(SimLogEntry { key, kind, hash });
        self.keys.apply(key, kind);
        self.head()
    }

    /// Revokes a key, or finds that it is revoked. None: there is no such key (any more).
    pub(super) fn revoke(&mut self, key: u8) -> Option<RevokeResult> {
        let found =
            self.log.iter().position(|entry| entry.key == key && entry.kind == KeyChangeKind::Revoked);
        let (change, again) = match found {
            Some(at) => (self.position(Revision(at as u64 + 1)).unwrap(), true),
            None if self.keys.live >> key & 1 == 1 => (self.append(key, KeyChangeKind::Revoked), false),
            None => return None,
        };
        Some(RevokeResult { change, again, longest: self.longest })
    }

    pub(super) fn register(&mut self, id: u128, at: Micros) -> ReplicaId {
        let id = ReplicaId(Uuid::from_u128(id));
        self.rows.push(ReplicaRow { id, applied: None, renew_seq: 0, last_seen: self.now(at) });
        id
    }

    /// What a renewal reads: the changes that the replica lacks, too. Its own change is seen when it is committed.
    pub(super) fn read(&self, renewal: &RenewalRequest, at: Micros) -> (RenewalReply, Vec<SimLogEntry>) {
        let from = renewal.applied.unwrap_or(LogPosition::START);
        let lacking = self.log.get(from.revision.0 as usize..).unwrap_or_default();
        let fitting = match renewal.applied {
            Some(_) => &lacking[..lacking.len().min(self.fits)],
            None => &[],
        };
        let last = from.revision.0 + fitting.len() as u64;
        let upto = if fitting.is_empty() { from } else { self.position(Revision(last)).unwrap() };
        let reply = RenewalReply {
            was_renewed: false,
            acknowledged_hash: renewal.applied.and_then(|position| self.link(position.revision)),
            changes_end: upto,
            head: self.head().revision,
            lease: self.lease,
            longest_lease: self.longest,
            incarnation: self.incarnation,
            settled_incarnation: self.settled,
            database_time: self.now(at),
        };
        (reply, fitting.to_vec())
    }

    /// Commits a renewal; whether it counts.
    pub(super) fn commit(&mut self, renewal: &RenewalRequest, broken: RulesWithout, at: Micros) -> bool {
        let same_history =
            renewal.applied.is_none_or(|position| self.link(position.revision) == Some(position.hash));
        if !same_history && broken.enforces(LeaseInvariant::HistoryIsCompared) {
            return false;
        }
        let last_seen = self.now(at);
        let row = self.rows.iter_mut().find(|row| row.id == renewal.id);
        let Some(row) = row.filter(|row| renewal.sequence.accepts(row.renew_seq)) else { return false };
        row.renew_seq = renewal.sequence.next;
        row.applied = renewal.applied.map(|position| position.revision);
        row.last_seen = last_seen;
        if renewal.settle_incarnation == Some(self.incarnation) {
            self.settled = renewal.settle_incarnation;
        }
        true
    }

    pub(super) fn list(&self, at: Micros) -> ReplicaListing {
        ReplicaListing {
            rows: self.rows.clone(),
            longest_lease: self.longest,
            incarnation: self.incarnation,
            settled_incarnation: self.settled,
            database_time: self.now(at),
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
    pub(super) fn restore(&mut self, backup: SimDatabase, incarnation: Incarnation) {
        let (wall, salt) = (self.wall, self.salt + 1);
        *self = SimDatabase { incarnation, wall, salt, ..backup };
    }

    /// Somebody sets its clock.
    pub(super) fn step_wall(&mut self, by: i64) {
        self.wall += by;
    }
}
