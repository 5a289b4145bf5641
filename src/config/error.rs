//! The errors of settings: every problem of a file, the environment and the flags, each with its source.
//!
//! Values that look like credentials are masked here, so that no message repeats one. `problems.rs` collects the problems.

use std::fmt;

use crate::domain::credential_mask::{mask_message, mask_quoted, mask_value};

use super::client::env_var;

/// Why settings cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("the configuration file {}{} cannot be read: {source}", mask_value(.path), env_source_suffix(.path))]
    Unreadable {
        /// The path as it was given.
        path: String,
        /// The error of the file system.
        source: std::io::Error,
    },
    /// The file, the environment or the flags have problems.
    #[error("{}:\n  {}", error_headline(.path.as_deref()), .problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n  "))]
    Invalid {
        /// The path of the file; None = there is no file.
        path: Option<String>,
        /// All problems, sorted by source.
        problems: Vec<ConfigProblem>,
    },
}

/// Names the environment variable that names the file, if one does.
fn env_source_suffix(path: &str) -> &'static str {
    if env_var("KEYWARD_CONFIG").as_deref() == Some(path) { " (KEYWARD_CONFIG)" } else { "" }
}

/// The line before a list of problems.
#[must_use]
pub(crate) fn error_headline(path: Option<&str>) -> String {
    match path {
        Some(path) => format!("the settings cannot be used (configuration file: {})", mask_value(path)),
        None => "the settings cannot be used".to_owned(),
    }
}

/// Where a problem comes from.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ProblemSource {
    /// A position in the configuration file.
    File {
        /// Counted from 1.
        line: usize,
        /// In characters, counted from 1.
        column: usize,
    },
    /// The name of an environment variable.
    Variable(String),
    /// A flag with its dashes.
    Flag(String),
    /// A default, or a combination of settings.
    Unknown,
}

/// A problem of the settings, with the value and what would be right.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ConfigProblem {
    /// Where the problem comes from; shown before the text.
    pub source: ProblemSource,
    /// The problem in one line; credentials are masked.
    pub text: String,
}

impl fmt::Display for ConfigProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.source {
            ProblemSource::File { line, column } => write!(f, "line {line}, column {column}: ")?,
            ProblemSource::Variable(name) | ProblemSource::Flag(name) => write!(f, "{name}: ")?,
            ProblemSource::Unknown => {}
        }
        f.write_str(&self.text)
    }
}

/// A setting whose value is invalid.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{setting}{} {problem}", .value.as_ref().map(|value| format!(" = {value:?}")).unwrap_or_default())]
pub(super) struct InvalidSetting {
    /// The path of the setting, without the numbers of list entries.
    pub(super) setting: &'static str,
    /// The masked value; None = it is not shown.
    value: Option<String>,
    /// What is wrong; quotes of the value are masked.
    problem: String,
}

pub(super) fn invalid_setting(setting: &'static str, value: &str, problem: impl ToString) -> InvalidSetting {
    let problem = mask_quoted(&problem.to_string(), value);
    InvalidSetting { setting, value: Some(mask_value(value).into_owned()), problem }
}

/// An error that does not show the value.
pub(super) fn invalid_redacted_setting(setting: &'static str, problem: impl ToString) -> InvalidSetting {
    InvalidSetting { setting, value: None, problem: mask_message(&problem.to_string()).into_owned() }
}
