//! Which decisions the decision log records, and where it writes them.

use std::path::PathBuf;

/// The target that records are written to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DecisionLogTarget {
    /// The server's log, under the target `keyward::decision`.
    Log,
    /// A file with one JSON record per line.
    File(PathBuf),
}

/// Which decisions are recorded, and the target.
#[derive(Clone, Debug, PartialEq)]
pub struct DecisionLogSettings {
    /// Sampling ratio of denials, 0 to 1.
    pub denial_ratio: f64,
    /// Limit of recorded denials per second.
    pub denials_per_second: u32,
    /// Sampling ratio of allowed requests, 0 to 1.
    pub allowed_ratio: f64,
    /// Whether changes that restrict rights are recorded.
    pub log_restricting_changes: bool,
    /// The target that records are written to.
    pub target: DecisionLogTarget,
}
