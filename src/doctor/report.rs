//! The findings of the doctor and their severity. Every check adds to one [`DoctorReport`]; `cli` prints it.

use std::time::Duration;

use crate::config::duration::format_duration;

/// The time limit of each connection and query.
pub(super) const CHECK_TIMEOUT: Duration = Duration::from_secs(5);

/// The severity of a finding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Severity {
    /// Nothing to do.
    Ok,
    /// It works, but something should be changed.
    Warning,
    /// It does not work, or it is not safe.
    Failure,
    /// It could not be checked, so it may be wrong.
    Skipped,
}

impl Severity {
    /// The word that reports print: `ok`, `warn`, `fail` or `not looked at`.
    #[must_use]
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Severity::Ok => "ok",
            Severity::Warning => "warn",
            Severity::Failure => "fail",
            Severity::Skipped => "not looked at",
        }
    }
}

/// One result of a check.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct DoctorFinding {
    /// Whether and how urgently something must be done.
    pub severity: Severity,
    /// The checked subject in one word, such as `lease`.
    pub topic: &'static str,
    /// The observed state, in one line.
    pub message: String,
    /// The remedy; empty = nothing to do.
    pub fix: String,
}

/// The findings of all checks, in the order of the checks.
#[derive(Debug, Default)]
pub(crate) struct DoctorReport(Vec<DoctorFinding>);

impl DoctorReport {
    pub(super) fn add(
        &mut self,
        severity: Severity,
        topic: &'static str,
        message: impl Into<String>,
        fix: impl Into<String>,
    ) {
        self.0.push(DoctorFinding { severity, topic, message: message.into(), fix: fix.into() });
    }

    pub(super) fn pass(&mut self, topic: &'static str, message: impl Into<String>) {
        self.add(Severity::Ok, topic, message, "");
    }

    pub(super) fn warn(&mut self, topic: &'static str, message: impl Into<String>, fix: impl Into<String>) {
        self.add(Severity::Warning, topic, message, fix);
    }

    pub(super) fn fail(&mut self, topic: &'static str, message: impl Into<String>, fix: impl Into<String>) {
        self.add(Severity::Failure, topic, message, fix);
    }

    pub(super) fn skip(&mut self, topic: &'static str, message: impl Into<String>) {
        self.add(Severity::Skipped, topic, message, "");
    }

    /// The number of warnings and failures.
    pub(super) fn problem_count(&self) -> usize {
        self.0
            .iter()
            .filter(|finding| matches!(finding.severity, Severity::Warning | Severity::Failure))
            .count()
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &DoctorFinding> {
        self.0.iter()
    }

    /// The severity and message of each finding.
    #[cfg(test)]
    pub(super) fn lines(&self) -> Vec<String> {
        self.iter().map(|found| format!("{} {}", found.severity.as_str(), found.message)).collect()
    }

    #[must_use]
    pub(crate) fn has_failures(&self) -> bool {
        self.0.iter().any(|finding| finding.severity == Severity::Failure)
    }
}

/// Formats a duration for people: in whole seconds, or in milliseconds if it is shorter than one.
pub(super) fn format_rounded(duration: Duration) -> String {
    let whole = if duration >= Duration::from_secs(1) {
        duration.as_secs() * 1000
    } else {
        u64::try_from(duration.as_millis()).unwrap_or(0)
    };
    format_duration(Duration::from_millis(whole))
}
