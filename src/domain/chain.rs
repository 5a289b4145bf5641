//! Walking the hash chain of the log entry by entry: what fits, and what is wrong with the first that does not.

use std::fmt;

use super::{lease::Position, log::LogRow, time::Revision};

/// What is wrong with an entry, or with what comes before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The entry that should come here does not; another follows.
    Missing {
        /// The next that there is.
        next: Revision,
    },
    /// It does not lead to the entry before: that one, or one of them, is of another history.
    Unlinked,
    /// It is not what was hashed: some of it was changed.
    Changed,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Fault::Missing { next } => write!(f, "the entry is missing; the next one there is {next}"),
            Fault::Unlinked => f.write_str("the entry does not lead to the hash of the one before"),
            Fault::Changed => f.write_str("the entry is not what its hash was made of: it was changed"),
        }
    }
}

/// Where a walk is.
#[derive(Clone, Copy, Debug)]
pub struct Chain {
    /// The newest entry that was found to fit.
    pub at: Position,
    /// How many were.
    pub entries: u64,
}

impl Chain {
    /// A walk that begins after this entry.
    #[must_use]
    pub const fn after(at: Position) -> Chain {
        Chain { at, entries: 0 }
    }

    /// Takes the next entry.
    ///
    /// # Errors
    /// When it does not fit; the fault is told of the revision after [`Chain::at`].
    pub fn take(&mut self, row: &LogRow) -> Result<(), Fault> {
        if row.revision != self.at.revision.next() {
            return Err(Fault::Missing { next: row.revision });
        }
        if row.prev_hash != self.at.hash {
            return Err(Fault::Unlinked);
        }
        if row.hash != row.expected_hash() {
            return Err(Fault::Changed);
        }
        self.at = Position { revision: row.revision, hash: row.hash };
        self.entries += 1;
        Ok(())
    }
}
