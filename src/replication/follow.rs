//! The one way into the index. Changes come from this process's own commits, from renewals and from reading the log
//! at a hint, and may come twice; they go in once, in revision order, each linked by its hash to the one before.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::watch;

use crate::{
    domain::{
        lease::Position,
        log::{Change, Hash, LogRow},
        time::Revision,
    },
    engine::index::Index,
    store::{Head, StoreError, Write, writer::Follower},
};

/// How many of the newest links are remembered.
const RECENT: usize = 4096;

/// Why changes did not go in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Broken {
    /// Nothing is loaded yet.
    NotLoaded,
    /// The changes between are missing.
    Gap,
    /// They are of another history than what the index holds.
    OtherHistory {
        /// What it holds.
        ours: Position,
        /// The newest that came.
        head: Revision,
    },
}

#[derive(Default)]
struct State {
    at: Option<Position>,
    /// The newest change of others that may take something away, until it is acknowledged.
    untold: Option<Revision>,
    recent: VecDeque<(Revision, Hash)>,
}

/// The index with its place in the history.
pub struct Follow {
    index: Arc<Index>,
    state: Mutex<State>,
    /// Where it is; nothing before the first snapshot.
    moved: watch::Sender<Option<Position>>,
    /// Where it was after the newest changes of others that somebody may wait for, and that did not come with a renewal.
    heard: watch::Sender<Option<Position>>,
    /// Another history was met where none was looked for.
    diverged: watch::Sender<Option<Broken>>,
}

impl std::fmt::Debug for Follow {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Follow").field("at", &*self.moved.borrow()).finish_non_exhaustive()
    }
}

impl Follow {
    /// Over an index that nothing is loaded into.
    #[must_use]
    pub fn new(index: Arc<Index>) -> Follow {
        let (moved, heard, diverged) = Default::default();
        Follow { index, state: Mutex::default(), moved, heard, diverged }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // The data is whole between any two statements that could panic: see `put`.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The index.
    #[must_use]
    pub fn index(&self) -> &Arc<Index> {
        &self.index
    }

    /// Where it is.
    #[must_use]
    pub fn at(&self) -> Option<Position> {
        self.state().at
    }

    /// Tells where it is, each time that it moves.
    #[must_use]
    pub fn moves(&self) -> watch::Receiver<Option<Position>> {
        self.moved.subscribe()
    }

    /// Tells where it is, each time that it holds something new of others that is to be acknowledged at once.
    #[must_use]
    pub fn hearings(&self) -> watch::Receiver<Option<Position>> {
        self.heard.subscribe()
    }

    /// Tells when this process's own commit has met another history.
    #[must_use]
    pub fn divergences(&self) -> watch::Receiver<Option<Broken>> {
        self.diverged.subscribe()
    }

    /// Forgets everything: another snapshot is loaded. Nobody finds anything until then.
    pub fn reset(&self) {
        let mut state = self.state();
        *state = State::default();
        self.index.clear();
        self.moved.send_replace(None);
        self.heard.send_replace(None);
        self.diverged.send_replace(None);
    }

    /// The snapshot is loaded, as of here.
    pub fn loaded(&self, Head { revision, hash }: Head) {
        let mut state = self.state();
        let at = Position { revision, hash };
        state.note(at);
        self.index.loaded(revision);
        self.moved.send_replace(Some(at));
    }

    /// The log's link at a revision, if that is one of the newest.
    #[must_use]
    pub fn link(&self, revision: Revision) -> Option<Hash> {
        self.state().link(revision)
    }

    /// Whether somebody may wait to hear that everything up to here is acknowledged. It is told once.
    #[must_use]
    pub fn is_to_tell(&self, upto: Revision) -> bool {
        self.state().untold.take_if(|untold| *untold <= upto).is_some()
    }

    /// Takes changes of others that are in order; those that it has already do not count. Gives where it is then, and
    /// whether any was new.
    ///
    /// # Errors
    /// When they do not follow what it has. What followed up to there is in force.
    pub fn take(&self, rows: &[(LogRow, Change)]) -> Result<(Position, bool), Broken> {
        self.put(rows, true)
    }

    fn put(&self, rows: &[(LogRow, Change)], others: bool) -> Result<(Position, bool), Broken> {
        let mut place_of_state = self.state();
        // Away while the index takes what it says: should that panic, nothing is known to be in force any more.
        let mut state = std::mem::take(&mut *place_of_state);
        let (mut new, mut moved, mut broken) = (0..0, false, None);
        for (place, (row, _)) in rows.iter().enumerate() {
            match state.take(row, others) {
                Ok(true) if new.end == place => new.end += 1,
                Ok(true) => {
                    self.index.applied(&rows[new]);
                    new = place..place + 1;
                }
                Ok(false) => continue,
                Err(found) => {
                    broken = Some(found);
                    break;
                }
            }
            moved = true;
        }
        // Those that follow each other go in at once: the index makes room once for all of them.
        self.index.applied(&rows[new]);
        let at = state.at;
        *place_of_state = state;
        if let Some(broken) = broken {
            return Err(broken);
        }
        let at = at.ok_or(Broken::NotLoaded)?;
        if moved {
            self.moved.send_replace(Some(at));
        }
        Ok((at, moved))
    }

    /// The same, from rows as they were read.
    ///
    /// # Errors
    /// When a row cannot be read; inside, as [`Follow::take`].
    pub fn take_rows(&self, rows: Vec<LogRow>) -> Result<Result<(Position, bool), Broken>, StoreError> {
        let rows = rows.into_iter().map(LogRow::with_change).collect::<Result<Vec<_>, _>>();
        rows.map(|rows| self.take(&rows)).map_err(|error| StoreError::Damaged(error.to_string()))
    }

    /// The same of rows that no renewal brought. What may take something away is to be acknowledged at once: somebody waits
    /// for that. For the rest there is time until the next renewal.
    ///
    /// # Errors
    /// As [`Follow::take_rows`].
    pub fn hear(&self, rows: Vec<LogRow>) -> Result<Result<Position, Broken>, StoreError> {
        Ok(self.take_rows(rows)?.map(|(at, moved)| self.heard(at, moved)))
    }

    fn diverge(&self, broken: Broken) {
        tracing::error!(?broken, "changes that were committed do not follow what this process holds");
        self.diverged.send_replace(Some(broken));
    }

    fn heard(&self, at: Position, moved: bool) -> Position {
        if moved && self.state().untold.is_some() {
            self.heard.send_replace(Some(at));
        }
        at
    }
}

impl State {
    /// Goes on to an entry that follows; one that is known already is none.
    fn take(&mut self, row: &LogRow, others: bool) -> Result<bool, Broken> {
        let at = self.at.ok_or(Broken::NotLoaded)?;
        let other = Broken::OtherHistory { ours: at, head: row.revision };
        if row.revision <= at.revision {
            // Links that are long past are not remembered.
            return match self.link(row.revision) {
                Some(hash) if hash != row.hash => Err(other),
                _ => Ok(false),
            };
        }
        if row.revision > at.revision.next() {
            return Err(Broken::Gap);
        }
        // What this process has just made of what the database ended with needs no second look at its own hash.
        let follows = if others { row.follows(at.revision, &at.hash) } else { row.prev_hash == at.hash };
        if !follows {
            return Err(other);
        }
        self.note(Position { revision: row.revision, hash: row.hash });
        if others && row.may_narrow() {
            self.untold = Some(row.revision);
        }
        Ok(true)
    }

    /// They follow each other without a gap.
    fn link(&self, revision: Revision) -> Option<Hash> {
        let back = usize::try_from(self.at?.revision.0.checked_sub(revision.0)?).ok()?;
        let at = self.recent.len().checked_sub(back + 1)?;
        self.recent.get(at).map(|(_, hash)| *hash)
    }

    fn note(&mut self, at: Position) {
        self.at = Some(at);
        if self.recent.len() == RECENT {
            self.recent.pop_front();
        }
        self.recent.push_back((at.revision, at.hash));
    }
}

impl Follower for Follow {
    fn revision(&self) -> Revision {
        self.at().unwrap_or(Position::START).revision
    }

    fn applied(&self, rows: &[(LogRow, Change)]) {
        if let Err(broken) = self.put(rows, false) {
            self.diverge(broken);
        }
    }

    fn followed(&self, rows: &[(LogRow, Change)]) {
        match self.take(rows) {
            Ok((at, moved)) => drop(self.heard(at, moved)),
            Err(broken) => self.diverge(broken),
        }
    }

    fn in_doubt(&self, write: &Write) {
        self.index.in_doubt(write);
    }

    fn decided(&self) {
        self.index.decided();
    }
}
