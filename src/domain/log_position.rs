//! Identifies a position in the log: a revision, and the chain's hash at that revision.

use serde::{Deserialize, Serialize};

use super::{
    time::Revision,
    token::{HexBytes, parse_hex_bytes},
};

/// The hash that links an entry to all earlier ones: SHA-256.
pub type ChainHash = [u8; 32];

/// The hash before the first entry.
pub const GENESIS_HASH: ChainHash = [0; 32];

/// A position in one history: the same revision with another hash belongs to another history.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LogPosition {
    /// The revision of the newest entry.
    pub revision: Revision,
    /// The chain hash of that entry.
    pub hash: ChainHash,
}

impl LogPosition {
    /// The position before any change; every database contains it.
    pub const START: LogPosition = LogPosition { revision: Revision(0), hash: GENESIS_HASH };
}

/// A position in the chain, in its JSON form.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HexPosition {
    /// The revision of the entry.
    pub revision: Revision,
    /// The chain hash of the entry, in hex.
    pub hash: String,
}

impl From<LogPosition> for HexPosition {
    fn from(at: LogPosition) -> Self {
        HexPosition { revision: at.revision, hash: HexBytes(&at.hash).to_string() }
    }
}

impl HexPosition {
    /// Parses the hash. None = the text is no hash.
    #[must_use]
    pub fn to_position(&self) -> Option<LogPosition> {
        Some(LogPosition { revision: self.revision, hash: parse_hex_bytes(&self.hash)? })
    }
}
