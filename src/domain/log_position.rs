//! Names a place in the log: a revision, and the hash that the chain of entries has there.

use serde::{Deserialize, Serialize};

use super::{
    time::Revision,
    token::{HexBytes, parse_hex_bytes},
};

/// A link of the chain: SHA-256.
pub type ChainHash = [u8; 32];

/// The link before the first.
pub const GENESIS_HASH: ChainHash = [0; 32];

/// A place in one history: the same revision with another hash is another history.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LogPosition {
    /// The newest change in it.
    pub revision: Revision,
    /// That change's link of the log's chain.
    pub hash: ChainHash,
}

impl LogPosition {
    /// Before any change. Every database has this link.
    pub const START: LogPosition = LogPosition { revision: Revision(0), hash: GENESIS_HASH };
}

/// A place in the chain, as JSON says it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HexPosition {
    /// The entry's revision.
    pub revision: Revision,
    /// Its hash, in hex.
    pub hash: String,
}

impl From<LogPosition> for HexPosition {
    fn from(at: LogPosition) -> Self {
        HexPosition { revision: at.revision, hash: HexBytes(&at.hash).to_string() }
    }
}

impl HexPosition {
    /// The place, if the hash is one.
    #[must_use]
    pub fn to_position(&self) -> Option<LogPosition> {
        Some(LogPosition { revision: self.revision, hash: parse_hex_bytes(&self.hash)? })
    }
}
