//! Verifies the hash chain of the log entry by entry, and reports the first entry that does not fit.

use std::fmt;

use super::{lease::LogPosition, log::LogEntry, time::Revision};

/// The fault of an entry, or of the entries before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChainFault {
    /// The entry that should come here does not; another follows.
    Missing {
        /// The next that there is.
        next: Revision,
    },
    /// It does not lead to the entry before: that one, or one of them, is of another history.
    BrokenLink,
    /// The contents do not match the hash: they were altered.
    Tampered,
}

impl fmt::Display for ChainFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ChainFault::Missing { next } => write!(f, "the entry is missing; the next one there is {next}"),
            ChainFault::BrokenLink => f.write_str("the entry does not lead to the hash of the one before"),
            ChainFault::Tampered => f.write_str("the entry is not what its hash was made of: it was changed"),
        }
    }
}

/// The position of a verification in the chain.
#[derive(Clone, Copy, Debug)]
pub struct ChainVerifier {
    /// The newest entry that was found to fit.
    pub position: LogPosition,
    /// The number of entries so far.
    pub entry_count: u64,
}

impl ChainVerifier {
    /// A walk that begins after this entry.
    #[must_use]
    pub const fn from_position(at: LogPosition) -> ChainVerifier {
        ChainVerifier { position: at, entry_count: 0 }
    }

    /// Verifies the next entry.
    ///
    /// # Errors
    /// If the entry does not fit; the fault refers to the revision after the current position.
    pub fn verify_next(&mut self, row: &LogEntry) -> Result<(), ChainFault> {
        if row.revision != self.position.revision.next() {
            return Err(ChainFault::Missing { next: row.revision });
        }
        if row.prev_hash != self.position.hash {
            return Err(ChainFault::BrokenLink);
        }
        if row.hash != row.compute_hash() {
            return Err(ChainFault::Tampered);
        }
        self.position = LogPosition { revision: row.revision, hash: row.hash };
        self.entry_count += 1;
        Ok(())
    }
}
