//! Describes how a change came about: the call, its peer, the entry before it, or the archive that it records.

use serde::{Deserialize, Serialize};

use super::{log_position::HexPosition, time::Revision};

/// How a change came about.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChangeOrigin {
    /// The call's id, as its caller or the gate named it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request_id: Option<String>,
    /// The address that the call came from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peer: Option<String>,
    /// The entry before about the same record; 0 = it did not exist. None in entries of before this was kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub previous: Option<Revision>,
    /// What was archived, in the entry that says so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub archived: Option<ArchivedRange>,
}

impl ChangeOrigin {
    /// Nothing is known.
    pub const UNKNOWN: ChangeOrigin =
        ChangeOrigin { request_id: None, peer: None, previous: None, archived: None };
}

/// Entries that left the log for a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ArchivedRange {
    /// The last of them: the chain goes on from its hash.
    #[serde(flatten)]
    pub end: HexPosition,
    /// How many this file took.
    pub entries: u64,
    /// SHA-256 of the file, in hex.
    pub file_sha256: String,
}
