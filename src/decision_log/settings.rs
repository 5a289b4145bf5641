//! Which decisions the decision log records, and where it writes them.

use std::path::PathBuf;

/// Where records go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DecisionLogTarget {
    /// To the log, as target `keyward::decision`.
    Log,
    /// To this file, as JSON, one a line.
    File(PathBuf),
}

/// Which decisions are written down, and where.
#[derive(Clone, Debug, PartialEq)]
pub struct DecisionLogSettings {
    /// The share of denials, 0 to 1.
    pub denial_ratio: f64,
    /// How many denials in one second at the most.
    pub denials_per_second: u32,
    /// The share of allowed requests, 0 to 1.
    pub allowed_ratio: f64,
    /// Whether changes that take something away are.
    pub log_restricting_changes: bool,
    /// Where records go.
    pub target: DecisionLogTarget,
}
