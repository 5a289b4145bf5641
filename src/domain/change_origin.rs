//! Describes how a change came about: the call, its peer, the entry before it, or the archive that it records.

use serde::{Deserialize, Serialize};

use super::{log_position::HexPosition, time::Revision};

/// The circumstances of a change.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChangeOrigin {
    /// The id of the call, from its caller or from Keyward.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request_id: Option<String>,
    /// The address that the call came from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peer: Option<String>,
    /// The previous entry of the same record; 0 = the record did not exist. None in entries of older releases.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub previous: Option<Revision>,
    /// The archived range, in the entry that records an archive.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub archived: Option<ArchivedRange>,
}

impl ChangeOrigin {
    /// An origin of which nothing is known.
    pub const UNKNOWN: ChangeOrigin =
        ChangeOrigin { request_id: None, peer: None, previous: None, archived: None };
}

/// Entries that were moved from the log to an archive file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ArchivedRange {
    /// The last archived entry; the chain continues from its hash.
    #[serde(flatten)]
    pub end: HexPosition,
    /// The number of entries in the file.
    pub entries: u64,
    /// SHA-256 of the file, in hex.
    pub file_sha256: String,
}
