//! Which committed changes take something away. A change is held against what is in memory before it goes in there,
//! by the rule that decides whether its caller waits for the other replicas.
//!
//! Each change is written down by the process that made it, and no other: what others commit comes by another way.
//! Whether a commit happened may be unknown for a while; such a change is known again when the log tells of it.

use std::sync::{Arc, Mutex, PoisonError};

use crate::{
    domain::{
        log::{Change, LogRow},
        time::Revision,
    },
    engine::index::Index,
    store::{Write, writer::Follower},
};

use super::{Log, record::Record};

/// Follows in front of another.
pub(super) struct Watching {
    log: Arc<Log>,
    follower: Arc<dyn Follower>,
    index: Arc<Index>,
    /// Changes of this process that may or may not be recorded: no more than one batch of them.
    doubtful: Mutex<Vec<Change>>,
}

impl Watching {
    pub(super) fn new(log: Arc<Log>, follower: Arc<dyn Follower>, index: Arc<Index>) -> Watching {
        Watching { log, follower, index, doubtful: Mutex::default() }
    }

    /// Writes down those that take something away.
    fn note<'a>(&self, rows: impl Iterator<Item = &'a (LogRow, Change)>) {
        let mut earlier: Vec<&Change> = Vec::new();
        for (row, change) in rows.filter(|(row, _)| row.revision > self.follower.revision()) {
            if self.narrows(change, &earlier) {
                let now = self.log.clock.now();
                let id = self.log.ids.next().uuid(now.as_millis());
                self.log.hand_over(Record::of_change(id, row, change));
            }
            earlier.push(change);
        }
    }

    /// One batch may change a key twice.
    fn narrows(&self, change: &Change, earlier: &[&Change]) -> bool {
        let Change::Key(key) = change else { return self.index.narrows(change) };
        let before = earlier.iter().rev().find_map(|change| match change {
            Change::Key(before) if before.id == key.id => Some(before),
            _ => None,
        });
        before.map_or_else(|| self.index.narrows(change), |before| key.narrows(&**before))
    }

    fn doubtful(&self) -> std::sync::MutexGuard<'_, Vec<Change>> {
        self.doubtful.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Follower for Watching {
    fn revision(&self) -> Revision {
        self.follower.revision()
    }

    fn applied(&self, rows: &[(LogRow, Change)]) {
        self.note(rows.iter());
        self.follower.applied(rows);
    }

    fn followed(&self, rows: &[(LogRow, Change)]) {
        let ours = {
            let doubtful = self.doubtful();
            let is_ours = |row: &LogRow, change: &Change| {
                doubtful.iter().any(|doubt| doubt.clone().at_revision(row.revision) == *change)
            };
            rows.iter().filter(|(row, change)| is_ours(row, change)).collect::<Vec<_>>()
        };
        self.note(ours.into_iter());
        self.follower.followed(rows);
    }

    fn in_doubt(&self, write: &Write) {
        self.doubtful().push(write.change.clone());
        self.follower.in_doubt(write);
    }

    fn decided(&self) {
        self.doubtful().clear();
        self.follower.decided();
    }
}
