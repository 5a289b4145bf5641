//! What the columns of a file are: the header of a CSV file with its separator, the field names of a JSON file. Without
//! all of them understood, nothing is imported.

use std::{
    collections::HashSet,
    io::{self, Read, Seek},
};

use serde_json::Value;

use super::{
    column::{Column, ColumnArgs, is_same_name},
    csv,
    json::Fields,
    text::{Line, Text, trim_line_end},
};
use crate::cli::failure::Failure;

/// What may separate fields; the first under which the most names are understood does.
const SEPARATORS: [char; 4] = [',', ';', '\t', '|'];
/// A longer name is no name.
const MAX_NAME: usize = 64;
/// How many checked names are remembered, and how many unknown ones are reported.
const MAX_SEEN: usize = 1_000;
const MAX_UNKNOWN: usize = 20;

/// The header of a CSV file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Header {
    /// As it is in the file.
    pub(super) raw: String,
    pub(super) separator: char,
    /// The columns, with their names in the file.
    pub(super) columns: Vec<(String, Column)>,
}

impl Header {
    /// Reads the header. The rows come next.
    pub(super) fn read<R: Read + Seek>(text: &mut Text<R>, names: &ColumnArgs) -> Result<Header, Failure> {
        let candidates = match separator_line(text)? {
            Some(separator) => vec![separator],
            None => SEPARATORS.to_vec(),
        };
        let start = text.at();
        let mut best: Option<(usize, char)> = None;
        for separator in candidates {
            text.go_to(start)?;
            let record = csv::next(text, separator)?;
            let fields = record.and_then(|record| record.fields.ok()).unwrap_or_default();
            let known = fields.iter().filter(|name| is_known(name, names)).count();
            if best.is_none_or(|(most, _)| known > most) {
                best = Some((known, separator));
            }
        }
        let separator = best.map_or(',', |(_, separator)| separator);
        text.go_to(start)?;
        let record = csv::next(text, separator)?.ok_or_else(|| Failure::usage("the file is empty"))?;
        let fields = record.fields.map_err(wrong)?;
        let columns = resolve(fields, names)?;
        Ok(Header { raw: record.raw, separator, columns })
    }
}

/// The separator that the line `sep=;` names, which Excel writes and reads before the header.
fn separator_line<R: Read + Seek>(text: &mut Text<R>) -> io::Result<Option<char>> {
    let (start, mut first) = (text.at(), String::new());
    let read = text.line(&mut first)?;
    let line = trim_line_end(&first).trim_matches('"');
    let named = line.get(..4).filter(|start| start.eq_ignore_ascii_case("sep=")).map(|_| line[4..].chars());
    let mut named = named.into_iter().flatten();
    match (read, named.next(), named.next()) {
        (Line::Whole, Some(separator), None) => Ok(Some(separator)),
        _ => {
            text.go_to(start)?;
            Ok(None)
        }
    }
}

/// Checks the names of a file's columns, and that the flags name some of them.
pub(super) struct NameCheck<'a> {
    columns: &'a ColumnArgs,
    seen: HashSet<String>,
    unknown: Vec<String>,
    /// The flags that name none of the columns so far, each with its name.
    unused: Vec<(String, &'a str)>,
}

impl<'a> NameCheck<'a> {
    pub(super) fn new(columns: &'a ColumnArgs) -> NameCheck<'a> {
        NameCheck { columns, seen: HashSet::new(), unknown: Vec::new(), unused: columns.flags() }
    }

    pub(super) fn add(&mut self, name: &str) {
        if self.seen.contains(name) {
            return;
        }
        if self.seen.len() < MAX_SEEN && name.len() <= MAX_NAME {
            self.seen.insert(name.to_owned());
        }
        self.unused.retain(|(_, flagged)| !is_same_name(flagged, name));
        let is_new = || !self.unknown.iter().any(|unknown| unknown == name);
        if self.columns.resolve(name).is_none() && self.unknown.len() < MAX_UNKNOWN && is_new() {
            self.unknown.push(name.to_owned());
        }
    }

    /// The flags that name no column.
    ///
    /// # Errors
    /// If a column is unknown.
    pub(super) fn unused(self) -> Result<Vec<String>, Failure> {
        if !self.unknown.is_empty() {
            return Err(unknown_names(&self.unknown.iter().collect::<Vec<_>>()));
        }
        Ok(self.unused.into_iter().map(|(flag, _)| flag).collect())
    }

    /// Refuses flags that name no column, too.
    pub(super) fn all_used(self) -> Result<(), Failure> {
        let unused = self.unused()?;
        if unused.is_empty() {
            return Ok(());
        }
        Err(Failure::usage(format!("the file has no column of {}", unused.join(" and ")))
            .hint("look for typos; nothing was imported"))
    }
}

/// Refuses a JSON file whose first object cannot be a key.
pub(super) fn check_fields(fields: &Fields, names: &ColumnArgs) -> Result<(), Failure> {
    let holds_objects = |value: &Value| {
        value.as_array().is_some_and(|elements| elements.first().is_some_and(Value::is_object))
    };
    if fields.0.iter().any(|(_, value)| holds_objects(value)) {
        return Err(Failure::usage("the file is an object around the array of keys, not the array")
            .hint("take the array out of it first, such as with jq .data keys.json"));
    }
    let names_in_file = fields.0.iter().map(|(name, _)| name.clone()).collect();
    resolve(names_in_file, names).map(drop)
}

fn is_known(name: &str, names: &ColumnArgs) -> bool {
    names.resolve(name).is_some_and(|column| column != Column::Unnamed)
}

fn resolve(names_in_file: Vec<String>, names: &ColumnArgs) -> Result<Vec<(String, Column)>, Failure> {
    if !names_in_file.iter().any(|name| is_known(name, names)) {
        // Not the names themselves: a file without a header begins with a row.
        return Err(wrong("it names no columns"));
    }
    let unknown: Vec<&String> = names_in_file.iter().filter(|name| names.resolve(name).is_none()).collect();
    if !unknown.is_empty() {
        return Err(unknown_names(&unknown));
    }
    let mut columns: Vec<(String, Column)> = Vec::new();
    for (name, number) in names_in_file.into_iter().zip(1..) {
        let column = names.resolve(&name).unwrap_or(Column::Unnamed);
        if !column.may_repeat()
            && let Some((other, _)) = columns.iter().find(|(_, other)| *other == column)
        {
            return Err(wrong(&format!(
                "the columns {other:?} and {name:?} are the same; --ignore one of them"
            )));
        }
        let shown =
            if column == Column::Unnamed { format!("column {number}") } else { name.trim().to_owned() };
        columns.push((shown, column));
    }
    if !columns.iter().any(|(_, column)| *column == Column::Sha256) {
        return Err(wrong("the column sha256 is missing"));
    }
    Ok(columns)
}

fn unknown_names(unknown: &[&String]) -> Failure {
    if unknown.iter().any(|name| name.len() > MAX_NAME || name.chars().any(char::is_control)) {
        return wrong("some names are unknown");
    }
    let listed = unknown.iter().map(|name| format!("{:?}", name.trim())).collect::<Vec<_>>().join(", ");
    let what = if unknown.len() == 1 { "unknown column" } else { "unknown columns" };
    let hint = format!(
        "--ignore NAME leaves a column out, --rename THEIRS=OURS gives it its name; the columns are {}",
        Column::names()
    );
    wrong(&format!("{what} {listed}")).hint(hint)
}

fn wrong(problem: &str) -> Failure {
    Failure::usage(format!("the file's columns: {problem}"))
        .hint(format!("the first row names the columns: {}", Column::names()))
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
        names: ColumnArgs,
    }

    fn names(flags: &[&str]) -> ColumnArgs {
        Only::try_parse_from(["import"].iter().chain(flags)).unwrap().names
    }

    fn read(file: &str, flags: &[&str]) -> Result<Header, String> {
        let mut text = Text::open(Cursor::new(file.as_bytes().to_vec()), None).unwrap();
        Header::read(&mut text, &names(flags)).map_err(|failure| failure.to_string())
    }

    #[test]
    fn a_header_that_is_not_understood_stops_everything_and_says_all_that_is_wrong() {
        for (file, problem) in [
            ("sha256,scope\n", "unknown column \"scope\""),
            ("id;sha256;scope\n", "unknown columns \"id\", \"scope\""),
            ("name,account\n", "sha256 is missing"),
            ("sha256,Name,name\n", "\"Name\" and \"name\" are the same"),
            ("sk_live_not-a-name,x\n", "it names no columns"),
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
            assert_eq!((header.separator, header.columns[0].1), (separator, Column::Sha256), "{file:?}");
        }
        let error = read("sep=;\nsha256,name\n", &[]).unwrap_err();
        assert!(error.contains("it names no columns"), "{error}");
    }

    #[test]
    fn columns_with_other_names_are_renamed_or_ignored() {
        let header = read(
            "Id,Key Hash,Label,\n",
            &["--rename", "key_hash=sha256", "--rename", "label=name", "--ignore", "id"],
        );
        let columns: Vec<Column> = header.unwrap().columns.into_iter().map(|(_, column)| column).collect();
        assert_eq!(columns, [Column::Ignored, Column::Sha256, Column::Name, Column::Unnamed]);
    }

    #[test]
    fn a_flag_that_names_no_column_is_refused() {
        let check = |flags: &[&str]| {
            let columns = names(flags);
            let mut check = NameCheck::new(&columns);
            ["sha256", "Key Hash", ""].iter().for_each(|name| check.add(name));
            check.all_used().map_err(|failure| failure.to_string())
        };
        assert_eq!(check(&["--rename", "key_hash=hint"]), Ok(()));
        let error =
            check(&["--ignore", "key-hash", "--rename", "nosuch=hint", "--ignore", "id"]).unwrap_err();
        assert!(error.contains("no column of --rename nosuch and --ignore id"), "{error}");
    }

    #[test]
    fn the_names_that_are_remembered_and_reported_are_bounded() {
        let columns = names(&[]);
        let mut check = NameCheck::new(&columns);
        (0..10_000).for_each(|number| check.add(&format!("x{number}")));
        assert_eq!((check.seen.len(), check.unknown.len()), (MAX_SEEN, MAX_UNKNOWN));
        check.add(&"y".repeat(1 << 20));
        assert!(check.unused().unwrap_err().to_string().contains("\"x0\", \"x1\""));
    }

    #[test]
    fn the_first_object_of_a_json_file_must_be_a_key() {
        let fields =
            |names: &[&str]| Fields(names.iter().map(|name| ((*name).to_owned(), json!(1))).collect());
        assert!(check_fields(&fields(&["sha256", "expiresAt"]), &names(&[])).is_ok());
        let error = check_fields(&fields(&["sha256", "id"]), &names(&[])).unwrap_err().to_string();
        assert!(error.contains("unknown column \"id\"") && error.contains("--ignore"), "{error}");
        let wrapped = Fields(vec![("data".to_owned(), json!([{ "sha256": "ab" }]))]);
        let error = check_fields(&wrapped, &names(&[])).unwrap_err().to_string();
        assert!(error.contains("an object around the array") && error.contains("jq"), "{error}");
    }
}
