//! The summary of an import, as a table for people and as JSON.

use std::{collections::BTreeMap, time::Duration};

use serde::{Serialize, Serializer};

use super::{checkpoint::ImportCheckpoint, send::RejectedRow};
use crate::cli::{json_output::ToJson, table::DetailTable, value_format::format_row_count};

/// The limit of distinct problems that are kept and that JSON output contains.
const MAX_PROBLEMS: usize = 100;
/// The limit of problems in the table for people.
const MAX_SHOWN_PROBLEMS: usize = 5;

#[derive(Debug, Serialize)]
pub(super) struct ImportSummary {
    /// Whether the import reached the end of the file.
    pub(super) complete: bool,
    lines: u64,
    /// Rows of the file that are done, including those of earlier runs.
    rows: u64,
    imported: u64,
    there_already: u64,
    expired: u64,
    inactive: u64,
    pub(super) rejected: u64,
    rejected_file: Option<String>,
    /// The reasons for the rows that this run rejected, most frequent first.
    problems: Vec<RowProblem>,
    /// Rows that this run has sent, skipped or rejected.
    rows_now: u64,
    seconds: f64,
    rows_per_second: f64,
}

/// A problem that some rejected rows share.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct RowProblem {
    error: String,
    message: String,
    rows: u64,
    /// The first line of the first such row.
    first_line: u64,
}

/// The distinct problems of rejected rows, each with its count and first line.
#[derive(Debug, Default)]
pub(super) struct RowProblems(BTreeMap<(String, String), (u64, u64)>);

impl RowProblems {
    pub(super) fn add_rejected(&mut self, rejected: &[RejectedRow]) {
        for RejectedRow { line, error, message, .. } in rejected {
            let problem = (error.clone(), message.clone());
            if self.0.len() < MAX_PROBLEMS || self.0.contains_key(&problem) {
                self.0.entry(problem).or_insert((0, *line)).0 += 1;
            }
        }
    }

    fn most_frequent_first(&self) -> Vec<RowProblem> {
        let problem = |((error, message), (rows, first_line)): (&(String, String), &(u64, u64))| RowProblem {
            error: error.clone(),
            message: message.clone(),
            rows: *rows,
            first_line: *first_line,
        };
        let mut problems: Vec<RowProblem> = self.0.iter().map(problem).collect();
        problems.sort_by_key(|problem| (std::cmp::Reverse(problem.rows), problem.first_line));
        problems
    }
}

impl ToJson for ImportSummary {
    fn serialize_json<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.serialize(serializer)
    }
}

impl ImportSummary {
    pub(super) fn new(
        checkpoint: &ImportCheckpoint,
        problems: &RowProblems,
        complete: bool,
        rows_now: u64,
        duration: Duration,
    ) -> ImportSummary {
        let progress = &checkpoint.progress;
        let path = checkpoint.rejected_path().display().to_string();
        ImportSummary {
            complete,
            lines: progress.lines,
            rows: checkpoint.rows_done(),
            imported: progress.imported,
            there_already: progress.there_already,
            expired: progress.expired,
            inactive: progress.inactive,
            rejected: progress.rejected,
            rejected_file: (progress.rejected > 0).then_some(path),
            problems: problems.most_frequent_first(),
            rows_now,
            seconds: duration.as_secs_f64(),
            rows_per_second: (rows_now as f64 / duration.as_secs_f64().max(0.001)).round(),
        }
    }

    pub(super) fn to_table(&self, checkpoint: &ImportCheckpoint) -> DetailTable {
        let file = self.rejected_file.as_ref();
        let rejected = file.map_or_else(|| "0".to_owned(), |file| format!("{}, see {file}", self.rejected));
        let some = |count: u64, what: &str| {
            if count == 0 { String::new() } else { format!("{count}{what}") }
        };
        let mut record = DetailTable::new()
            .field("imported", self.imported.to_string())
            .field("there already", some(self.there_already, ", imported by an earlier attempt"))
            .field("expired", some(self.expired, ", not imported: the keys have expired"))
            .field("inactive", some(self.inactive, ", not imported: revoked or disabled"))
            .field("rejected", rejected);
        for RowProblem { error, message, rows, first_line } in self.problems.iter().take(MAX_SHOWN_PROBLEMS) {
            let first = if *rows == 1 { "" } else { ", the first" };
            let count = format_row_count(*rows);
            record = record.field("", format!("{count}{first} on line {first_line}: {message} ({error})"));
        }
        if self.problems.len() > MAX_SHOWN_PROBLEMS {
            record =
                record.field("", format!("and {} other problems", self.problems.len() - MAX_SHOWN_PROBLEMS));
        }
        let record = record.field("rows done", self.rows.to_string());
        if self.rows_now == 0 && self.complete {
            let hint = format!("nothing; all rows are done by {}", checkpoint.progress_path().display());
            return record.field("this time", hint);
        }
        let ImportSummary { rows_now, seconds, rows_per_second, .. } = self;
        record.field(
            "this time",
            format!("{} in {seconds:.1}s, {rows_per_second:.0} rows/s", format_row_count(*rows_now)),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rejected(line: u64, message: &str) -> RejectedRow {
        RejectedRow { line, error: "UNREADABLE".to_owned(), message: message.to_owned(), raw: String::new() }
    }

    #[test]
    fn the_same_problem_of_many_rows_is_listed_once() {
        let mut problems = RowProblems::default();
        problems.add_rejected(&[rejected(2, "rare")]);
        problems.add_rejected(&(3..1003).map(|line| rejected(line, "frequent")).collect::<Vec<_>>());
        let actual = problems.most_frequent_first();
        let actual: Vec<_> = actual.iter().map(|p| (p.message.as_str(), p.rows, p.first_line)).collect();
        assert_eq!(actual, [("frequent", 1000, 3), ("rare", 1, 2)]);
    }

    #[test]
    fn different_problems_without_end_are_not_kept() {
        let mut problems = RowProblems::default();
        problems.add_rejected(&(0..1000).map(|line| rejected(line, &line.to_string())).collect::<Vec<_>>());
        assert_eq!(problems.most_frequent_first().len(), MAX_PROBLEMS);
    }
}
