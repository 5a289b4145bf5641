//! Maps the names in a file to columns: the header of a CSV file, with its separator, or the field names of JSON objects.
//!
//! A file with an unknown name is refused before anything is imported.

use std::{
    collections::HashSet,
    io::{self, Read, Seek},
};

use serde_json::Value;

use super::{
    column::{ColumnNameArgs, ImportColumn, is_same_name},
    csv_rows,
    json_rows::JsonFields,
    text_reader::{LineOutcome, TextReader, trim_line_end},
};
use crate::cli::error::CliError;

/// Possible separators. The one with which the header has the most known names is used, or else the first of them.
const SEPARATORS: [char; 4] = [',', ';', '\t', '|'];
/// Longer text in a header is not a column's name.
const MAX_NAME_BYTES: usize = 64;
/// How many checked names are remembered, and how many unknown ones are reported.
const MAX_REMEMBERED_NAMES: usize = 1_000;
const MAX_REPORTED_NAMES: usize = 20;

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct CsvHeader {
    /// The header's text in the file.
    pub(super) raw: String,
    pub(super) separator: char,
    /// The columns with their names in the file.
    pub(super) columns: Vec<(String, ImportColumn)>,
}

impl CsvHeader {
    /// Reads the header and leaves the reader at the first row.
    pub(super) fn read_from<R: Read + Seek>(
        text: &mut TextReader<R>,
        names: &ColumnNameArgs,
    ) -> Result<CsvHeader, CliError> {
        let candidates = match read_separator_line(text)? {
            Some(separator) => vec![separator],
            None => SEPARATORS.to_vec(),
        };
        let start = text.position();
        let mut best: Option<(usize, char)> = None;
        for separator in candidates {
            text.seek_to(start)?;
            let record = csv_rows::next_record(text, separator)?;
            let fields = record.and_then(|record| record.fields.ok()).unwrap_or_default();
            let count = fields.iter().filter(|name| is_known_column(name, names)).count();
            if best.is_none_or(|(best_count, _)| count > best_count) {
                best = Some((count, separator));
            }
        }
        let separator = best.map_or(',', |(_, separator)| separator);
        text.seek_to(start)?;
        let record =
            csv_rows::next_record(text, separator)?.ok_or_else(|| CliError::new("the file is empty"))?;
        let fields = record.fields.map_err(columns_error)?;
        let columns = resolve_columns(fields, names)?;
        Ok(CsvHeader { raw: record.raw, separator, columns })
    }
}

/// Reads the separator from the line `sep=;`, which Excel writes before the header.
fn read_separator_line<R: Read + Seek>(text: &mut TextReader<R>) -> io::Result<Option<char>> {
    let (start, mut first) = (text.position(), String::new());
    let read = text.read_line(&mut first)?;
    let line = trim_line_end(&first).trim_matches('"');
    let named = line.get(..4).filter(|start| start.eq_ignore_ascii_case("sep=")).map(|_| line[4..].chars());
    let mut named = named.into_iter().flatten();
    match (read, named.next(), named.next()) {
        (LineOutcome::Whole, Some(separator), None) => Ok(Some(separator)),
        _ => {
            text.seek_to(start)?;
            Ok(None)
        }
    }
}

/// Checks that all column names of a file are known, and finds flags that name none of them.
pub(super) struct ColumnNameCheck<'a> {
    columns: &'a ColumnNameArgs,
    seen_names: HashSet<String>,
    unknown_names: Vec<String>,
    /// The flags that match none of the names so far, each with the name that it expects.
    unused_flags: Vec<(String, &'a str)>,
}

impl<'a> ColumnNameCheck<'a> {
    pub(super) fn new(columns: &'a ColumnNameArgs) -> ColumnNameCheck<'a> {
        ColumnNameCheck {
            columns,
            seen_names: HashSet::new(),
            unknown_names: Vec::new(),
            unused_flags: columns.flags(),
        }
    }

    pub(super) fn add_name(&mut self, name: &str) {
        if self.seen_names.contains(name) {
            return;
        }
        if self.seen_names.len() < MAX_REMEMBERED_NAMES && name.len() <= MAX_NAME_BYTES {
            self.seen_names.insert(name.to_owned());
        }
        self.unused_flags.retain(|(_, flagged)| !is_same_name(flagged, name));
        let is_new = || !self.unknown_names.iter().any(|unknown| unknown == name);
        if self.columns.resolve(name).is_none() && self.unknown_names.len() < MAX_REPORTED_NAMES && is_new() {
            self.unknown_names.push(name.to_owned());
        }
    }

    /// Returns the flags that name no column of the file, or an error if a column is unknown.
    pub(super) fn unused_flags(self) -> Result<Vec<String>, CliError> {
        if !self.unknown_names.is_empty() {
            return Err(unknown_columns_error(&self.unknown_names.iter().collect::<Vec<_>>()));
        }
        Ok(self.unused_flags.into_iter().map(|(flag, _)| flag).collect())
    }

    /// Like [`Self::unused_flags`], but such flags are an error.
    pub(super) fn require_all_used(self) -> Result<(), CliError> {
        let unused = self.unused_flags()?;
        if unused.is_empty() {
            return Ok(());
        }
        Err(CliError::new(format!("the file has no column for {}", unused.join(" and ")))
            .with_hint("check for typos; nothing was imported"))
    }
}

/// Refuses a JSON file whose first object cannot be a key.
pub(super) fn check_json_fields(fields: &JsonFields, names: &ColumnNameArgs) -> Result<(), CliError> {
    let holds_objects = |value: &Value| {
        value.as_array().is_some_and(|elements| elements.first().is_some_and(Value::is_object))
    };
    if fields.0.iter().any(|(_, value)| holds_objects(value)) {
        return Err(CliError::new("the file is an object that contains the array of keys, not the array")
            .with_hint("extract the array first, for example with jq .data keys.json"));
    }
    let names_in_file = fields.0.iter().map(|(name, _)| name.clone()).collect();
    resolve_columns(names_in_file, names).map(drop)
}

fn is_known_column(name: &str, names: &ColumnNameArgs) -> bool {
    names.resolve(name).is_some_and(|column| column != ImportColumn::Unnamed)
}

fn resolve_columns(
    names_in_file: Vec<String>,
    names: &ColumnNameArgs,
) -> Result<Vec<(String, ImportColumn)>, CliError> {
    if !names_in_file.iter().any(|name| is_known_column(name, names)) {
        // The error does not repeat the names: without a header they are the values of a row.
        return Err(columns_error("the first row names no columns"));
    }
    let unknown: Vec<&String> = names_in_file.iter().filter(|name| names.resolve(name).is_none()).collect();
    if !unknown.is_empty() {
        return Err(unknown_columns_error(&unknown));
    }
    let mut columns: Vec<(String, ImportColumn)> = Vec::new();
    for (name, number) in names_in_file.into_iter().zip(1..) {
        let column = names.resolve(&name).unwrap_or(ImportColumn::Unnamed);
        if !column.may_repeat()
            && let Some((other, _)) = columns.iter().find(|(_, other)| *other == column)
        {
            return Err(columns_error(&format!(
                "the columns {other:?} and {name:?} are the same; --ignore one of them"
            )));
        }
        let shown =
            if column == ImportColumn::Unnamed { format!("column {number}") } else { name.trim().to_owned() };
        columns.push((shown, column));
    }
    if !columns.iter().any(|(_, column)| *column == ImportColumn::Sha256) {
        return Err(columns_error("the column sha256 is missing"));
    }
    Ok(columns)
}

fn unknown_columns_error(unknown: &[&String]) -> CliError {
    if unknown.iter().any(|name| name.len() > MAX_NAME_BYTES || name.chars().any(char::is_control)) {
        return columns_error("some names are unknown");
    }
    let listed = unknown.iter().map(|name| format!("{:?}", name.trim())).collect::<Vec<_>>().join(", ");
    let what = if unknown.len() == 1 { "unknown column" } else { "unknown columns" };
    let hint = format!(
        "--ignore NAME skips a column, --rename THEIRS=OURS renames it; the columns are {}",
        ImportColumn::list_names()
    );
    columns_error(&format!("{what} {listed}")).with_hint(hint)
}

fn columns_error(problem: &str) -> CliError {
    CliError::new(format!("the file's columns: {problem}"))
        .with_hint(format!("the first row names the columns: {}", ImportColumn::list_names()))
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use clap::Parser;
    use serde_json::json;

    use super::*;

    #[derive(Debug, Parser)]
    struct Only {
        #[command(flatten)]
        names: ColumnNameArgs,
    }

    fn names(flags: &[&str]) -> ColumnNameArgs {
        Only::try_parse_from(["import"].iter().chain(flags)).unwrap().names
    }

    fn read(file: &str, flags: &[&str]) -> Result<CsvHeader, String> {
        let mut text = TextReader::open(Cursor::new(file.as_bytes().to_vec()), None).unwrap();
        CsvHeader::read_from(&mut text, &names(flags)).map_err(|failure| failure.to_string())
    }

    #[test]
    fn a_header_that_is_not_understood_stops_everything_and_says_all_that_is_wrong() {
        for (file, problem) in [
            ("sha256,scope\n", "unknown column \"scope\""),
            ("id;sha256;scope\n", "unknown columns \"id\", \"scope\""),
            ("name,account\n", "sha256 is missing"),
            ("sha256,Name,name\n", "\"Name\" and \"name\" are the same"),
            ("sk_live_not-a-name,x\n", "the first row names no columns"),
            ("sha256,\"name\n", "quotes are not closed"),
        ] {
            let error = read(file, &[]).unwrap_err();
            assert!(error.contains(problem) && error.contains("account, user, environment"), "{error}");
            assert!(!error.contains("sk_live"), "{error}");
        }
        for empty in ["", "\n,,\n", "\u{feff}", "sep=;\n"] {
            assert!(read(empty, &[]).unwrap_err().contains("the file is empty"), "{empty:?}");
        }
    }

    #[test]
    fn the_separator_is_the_one_that_the_header_or_a_line_before_it_names() {
        for (file, separator) in [
            ("sha256,name\n", ','),
            ("sha256;name\n", ';'),
            ("SHA256\tName\r\n", '\t'),
            ("sha256|name\n", '|'),
            ("\"sha256\";\"a,b\"\n", ';'),
            ("sha256\n", ','),
            ("sep=;\nsha256;name\n", ';'),
            ("SEP=^\r\nsha256^name\n", '^'),
            ("\"sep=\t\"\nsha256\tname\n", '\t'),
        ] {
            let header = read(file, &["--ignore", "a,b"]).unwrap();
            assert_eq!(
                (header.separator, header.columns[0].1),
                (separator, ImportColumn::Sha256),
                "{file:?}"
            );
        }
        let error = read("sep=;\nsha256,name\n", &[]).unwrap_err();
        assert!(error.contains("the first row names no columns"), "{error}");
    }

    #[test]
    fn columns_with_other_names_are_renamed_or_ignored() {
        let header = read(
            "Id,Key Hash,Label,\n",
            &["--rename", "key_hash=sha256", "--rename", "label=name", "--ignore", "id"],
        );
        let columns: Vec<ImportColumn> =
            header.unwrap().columns.into_iter().map(|(_, column)| column).collect();
        assert_eq!(
            columns,
            [ImportColumn::Ignored, ImportColumn::Sha256, ImportColumn::Name, ImportColumn::Unnamed]
        );
    }

    #[test]
    fn a_flag_that_names_no_column_is_refused() {
        let check = |flags: &[&str]| {
            let columns = names(flags);
            let mut check = ColumnNameCheck::new(&columns);
            ["sha256", "Key Hash", ""].iter().for_each(|name| check.add_name(name));
            check.require_all_used().map_err(|failure| failure.to_string())
        };
        assert_eq!(check(&["--rename", "key_hash=hint"]), Ok(()));
        let error =
            check(&["--ignore", "key-hash", "--rename", "nosuch=hint", "--ignore", "id"]).unwrap_err();
        assert!(error.contains("no column for --rename nosuch and --ignore id"), "{error}");
    }

    #[test]
    fn the_names_that_are_remembered_and_reported_are_bounded() {
        let columns = names(&[]);
        let mut check = ColumnNameCheck::new(&columns);
        (0..10_000).for_each(|number| check.add_name(&format!("x{number}")));
        assert_eq!(
            (check.seen_names.len(), check.unknown_names.len()),
            (MAX_REMEMBERED_NAMES, MAX_REPORTED_NAMES)
        );
        check.add_name(&"y".repeat(1 << 20));
        assert!(check.unused_flags().unwrap_err().to_string().contains("\"x0\", \"x1\""));
    }

    #[test]
    fn the_first_object_of_a_json_file_must_be_a_key() {
        let fields =
            |names: &[&str]| JsonFields(names.iter().map(|name| ((*name).to_owned(), json!(1))).collect());
        assert!(check_json_fields(&fields(&["sha256", "expiresAt"]), &names(&[])).is_ok());
        let error = check_json_fields(&fields(&["sha256", "id"]), &names(&[])).unwrap_err().to_string();
        assert!(error.contains("unknown column \"id\"") && error.contains("--ignore"), "{error}");
        let wrapped = JsonFields(vec![("data".to_owned(), json!([{ "sha256": "ab" }]))]);
        let error = check_json_fields(&wrapped, &names(&[])).unwrap_err().to_string();
        assert!(error.contains("an object that contains the array") && error.contains("jq"), "{error}");
    }
}
