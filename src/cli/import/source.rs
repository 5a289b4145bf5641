//! The file of an import, read in batches that fit into one call each: never whole.

use std::io::{self, Read, Seek};

use clap::ValueEnum;
use encoding_rs::{Encoding, ISO_2022_JP, REPLACEMENT};
use prost::Message as _;

use super::{
    column::{Column, ColumnArgs},
    csv::{self, Record},
    header::{Header, NameCheck, check_fields},
    inspect::Syntax,
    json::{Fields, Layout, Object},
    row::{DefaultArgs, Draft, NoKey},
    text::{Position, Text},
};
use crate::{cli::failure::Failure, domain::time::Timestamp, pb};

/// The most keys of one call.
pub(super) const MOST: usize = 1_000;
/// A call holds at most 4 MiB; so much of it is for keys.
const BYTES: usize = 3_500_000;

/// How rows are written in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Format {
    /// Values separated by commas, semicolons, tabs or |, with a header line
    Csv,
    /// JSON objects: one on each line, or in one array
    #[value(alias = "jsonl")]
    Json,
}

/// How a file is read.
#[derive(Clone, Debug)]
pub(super) struct Reading {
    pub(super) format: Format,
    /// What the user names; a byte order mark wins.
    pub(super) encoding: Option<&'static Encoding>,
    pub(super) columns: ColumnArgs,
    pub(super) defaults: DefaultArgs,
    /// Keys that have expired by now are skipped.
    pub(super) now: Timestamp,
}

/// A row, read or not.
#[derive(Debug)]
pub(super) struct Row {
    /// The line on which it begins, from 1.
    pub(super) line: u64,
    /// As it is in the file.
    pub(super) raw: String,
    /// The key, or why there is none.
    pub(super) key: Result<pb::ImportKey, NoKey>,
}

/// Rows for one call.
#[derive(Debug)]
pub(super) struct Batch {
    pub(super) rows: Vec<Row>,
    /// Where the next batch begins.
    pub(super) end: Position,
}

/// How the rows of a file, and their fields, are separated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Dialect {
    Separated(Header),
    Json(Layout),
}

/// A file of rows.
pub(super) struct Source<R> {
    text: Text<R>,
    dialect: Dialect,
    reading: Reading,
    /// A row that was read and had no place in its batch.
    waiting: Option<Row>,
    /// Where that row begins.
    before: Position,
}

/// Reads the name of an encoding.
pub(super) fn encoding(label: &str) -> Result<&'static Encoding, String> {
    // ISO-2022-JP has bytes that look like line ends and quotes.
    Encoding::for_label(label.as_bytes())
        .filter(|encoding| *encoding != ISO_2022_JP && *encoding != REPLACEMENT)
        .ok_or_else(|| "write an encoding such as utf-8, utf-16le, windows-1252 or shift_jis".to_owned())
}

impl Reading {
    /// What a file that begins like this must be as a whole.
    pub(super) fn syntax(&self, input: impl Read + Seek) -> io::Result<Syntax> {
        if self.format == Format::Csv {
            return Ok(Syntax::Rows);
        }
        Ok(match Layout::detect(&mut Text::open(input, self.encoding)?)? {
            Layout::Lines => Syntax::Rows,
            Layout::Array => Syntax::JsonValue,
            Layout::Sequence => Syntax::JsonValues,
        })
    }
}

impl Dialect {
    fn detect<R: Read + Seek>(text: &mut Text<R>, reading: &Reading) -> Result<Dialect, Failure> {
        if reading.format == Format::Csv {
            return Ok(Dialect::Separated(Header::read(text, &reading.columns)?));
        }
        let layout = Layout::detect(text)?;
        let start = text.at();
        if let Some(Object { fields: Ok(fields), .. }) = layout.next(text)? {
            check_fields(&fields, &reading.columns)?;
        }
        text.go_to(start)?;
        Ok(Dialect::Json(layout))
    }
}

impl<R: Read + Seek> Source<R> {
    /// Reads the header, if there is one, and goes to where the rows begin or continue.
    pub(super) fn open(input: R, reading: Reading, from: Option<Position>) -> Result<Source<R>, Failure> {
        let is_simple =
            |encoding: &&'static Encoding| encoding.is_single_byte() || encoding.name().starts_with("UTF-");
        if reading.format == Format::Json && reading.encoding.as_ref().is_some_and(|named| !is_simple(named))
        {
            return Err(Failure::usage("JSON is UTF-8, UTF-16 or in an encoding of one byte a character"));
        }
        let mut text = Text::open(input, reading.encoding)?;
        let dialect = Dialect::detect(&mut text, &reading)?;
        if let Some(from) = from.filter(|from| from.bytes > text.at().bytes) {
            text.go_to(from)?;
        }
        let before = text.at();
        Ok(Source { text, dialect, reading, waiting: None, before })
    }

    /// Checks the names of all columns, those of every JSON object too. Gives the flags that name no field of a JSON
    /// file: its objects may lack some.
    ///
    /// # Errors
    /// If a column is unknown, or a flag names none of a CSV file.
    pub(super) fn check_columns(mut self) -> Result<Vec<String>, Failure> {
        let mut check = NameCheck::new(&self.reading.columns);
        let layout = match &self.dialect {
            Dialect::Separated(header) => {
                header.columns.iter().for_each(|(name, _)| check.add(name));
                return check.all_used().map(|()| Vec::new());
            }
            Dialect::Json(layout) => *layout,
        };
        while let Some(object) = layout.next(&mut self.text)? {
            let fields = object.fields.unwrap_or_default();
            fields.0.iter().for_each(|(name, _)| check.add(name));
        }
        check.unused()
    }

    pub(super) fn dialect(&self) -> &Dialect {
        &self.dialect
    }

    /// The next batch; none at the file's end.
    pub(super) fn batch(&mut self) -> io::Result<Option<Batch>> {
        let (mut rows, mut bytes) = (Vec::new(), 0);
        while rows.len() < MOST {
            let before = self.before;
            let Some(row) = self.next()? else { break };
            let size = row.raw.len().max(row.key.as_ref().map_or(0, |key| key.encoded_len() + 8));
            if !rows.is_empty() && bytes + size > BYTES {
                self.waiting = Some(row);
                return Ok(Some(Batch { rows, end: before }));
            }
            bytes += size;
            self.before = self.text.at();
            rows.push(row);
        }
        Ok((!rows.is_empty()).then_some(Batch { rows, end: self.before }))
    }

    fn next(&mut self) -> io::Result<Option<Row>> {
        if let Some(row) = self.waiting.take() {
            return Ok(Some(row));
        }
        let (line, raw, key) = match &self.dialect {
            Dialect::Separated(header) => {
                let Some(Record { line, raw, fields }) = csv::next(&mut self.text, header.separator)? else {
                    return Ok(None);
                };
                let read = |fields: Vec<String>| read_cells(&fields, &header.columns, &self.reading);
                (line, raw, fields.map_err(unreadable).and_then(read))
            }
            Dialect::Json(layout) => {
                let Some(Object { line, raw, fields }) = layout.next(&mut self.text)? else {
                    return Ok(None);
                };
                let read = |fields: Fields| read_fields(fields, &self.reading);
                (line, raw, fields.map_err(unreadable).and_then(read))
            }
        };
        Ok(Some(Row { line, raw, key }))
    }
}

fn unreadable(problem: &str) -> NoKey {
    NoKey::Unreadable(problem.to_owned())
}

/// Reads a row of a CSV file. It may have more fields than the header if those are blank: spreadsheets add them.
fn read_cells(
    cells: &[String],
    columns: &[(String, Column)],
    reading: &Reading,
) -> Result<pb::ImportKey, NoKey> {
    let surplus = cells.get(columns.len()..).unwrap_or_default();
    if cells.len() < columns.len() || surplus.iter().any(|cell| !cell.trim().is_empty()) {
        return Err(format!("has {} fields; the header has {}", cells.len(), columns.len()).into());
    }
    let mut draft = Draft::default();
    for ((name, column), cell) in columns.iter().zip(cells) {
        draft.text(*column, cell).map_err(|problem| format!("{name}: {problem}"))?;
    }
    draft.finish(&reading.defaults, reading.now)
}

/// Reads an object of a JSON file.
fn read_fields(fields: Fields, reading: &Reading) -> Result<pb::ImportKey, NoKey> {
    let (mut draft, mut seen) = (Draft::default(), Vec::new());
    for (name, value) in fields.0 {
        let column = reading
            .columns
            .resolve(&name)
            .ok_or_else(|| format!("unknown field {name:?}; the fields are {}", Column::names()))?;
        if !column.may_repeat() && seen.contains(&column) {
            return Err(format!("{name}: is there twice").into());
        }
        seen.push(column);
        draft.json(column, value).map_err(|problem| format!("{name}: {problem}"))?;
    }
    draft.finish(&reading.defaults, reading.now)
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use super::*;

    const HEX: &str = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08";

    fn open(file: &str, format: Format, from: Option<Position>) -> Result<Source<Cursor<Vec<u8>>>, String> {
        let reading = Reading {
            format,
            encoding: None,
            columns: ColumnArgs::default(),
            defaults: DefaultArgs::default(),
            now: Timestamp::from_micros(0),
        };
        let input = Cursor::new(file.as_bytes().to_vec());
        Source::open(input, reading, from).map_err(|failure| failure.to_string())
    }

    fn problem(row: &Row) -> &str {
        match &row.key {
            Err(NoKey::Unreadable(problem)) => problem,
            other => panic!("{other:?}"),
        }
    }

    fn rows(file: &str, format: Format) -> Vec<Row> {
        open(file, format, None).unwrap().batch().unwrap().map(|batch| batch.rows).unwrap_or_default()
    }

    #[test]
    fn a_wrong_row_does_not_stop_the_others() {
        let file = format!("account,sha256\nacme,{HEX}\nacme\nacme,kw_x\n\nacme,{HEX}\n");
        let rows = rows(&file, Format::Csv);
        let told: Vec<_> = rows.iter().map(|row| (row.line, row.key.is_ok())).collect();
        assert_eq!(told, [(2, true), (3, false), (4, false), (6, true)]);
        assert_eq!(problem(&rows[1]), "has 1 fields; the header has 2");
        let error = problem(&rows[2]);
        assert!(error.starts_with("sha256: write the SHA-256") && !error.contains("kw_x"), "{error}");
    }

    #[test]
    fn json_rows_are_rejected_with_what_is_wrong_and_without_their_values() {
        let file = format!(
            "{{\"account\":\"acme\",\"sha256\":\"{HEX}\"}}\n[1]\n{{\"token\":\"kw_x\"}}\n{{\"name\":[\"kw_x\"]}}\n\
             {{\"expiresAt\":\"never\",\"expires_at\":null}}\n"
        );
        let rows = rows(&file, Format::Json);
        assert!(rows[0].key.is_ok());
        assert_eq!(problem(&rows[1]), "is no JSON object");
        assert!(problem(&rows[2]).contains("unknown field \"token\"") && !problem(&rows[2]).contains("kw_x"));
        assert_eq!(problem(&rows[3]), "name: write a text");
        assert_eq!(problem(&rows[4]), "expires_at: is there twice");
    }

    #[test]
    fn blank_cells_beyond_the_header_are_no_error_and_others_are() {
        let file = format!("sha256,,\n{HEX},,\n{HEX},,,,\n{HEX},x,\n{HEX},,,x\n{HEX}\n");
        let rows = rows(&file, Format::Csv);
        assert!(rows[0].key.is_ok() && rows[1].key.is_ok());
        assert_eq!(problem(&rows[2]), "column 2: the header gives this column no name");
        assert_eq!(problem(&rows[3]), "has 4 fields; the header has 3");
        assert_eq!(problem(&rows[4]), "has 1 fields; the header has 3");
    }

    #[test]
    fn an_encoding_has_the_names_that_the_web_gives_it() {
        for (label, name) in
            [("windows-1252", "windows-1252"), ("CP1252", "windows-1252"), ("utf-16", "UTF-16LE")]
        {
            assert_eq!(encoding(label).unwrap().name(), name);
        }
        for bad in ["", "klingon", "iso-2022-jp"] {
            assert!(encoding(bad).unwrap_err().contains("windows-1252"), "{bad}");
        }
    }

    #[test]
    fn reading_continues_where_a_batch_ended_in_every_dialect() {
        let wide = "a:b ".repeat(25_000);
        let table = |separator: char, line_end: &str, before: &str| {
            let row = |n: usize| format!("n{n}{separator}{HEX}{separator}{wide}{line_end}");
            let header = format!("name{separator}sha256{separator}scopes{line_end}");
            before.to_owned() + &header + &(0..100).map(row).collect::<String>()
        };
        let object = |n: usize| format!("{{\"name\":\"n{n}\",\"sha256\":\"{HEX}\",\"scopes\":\"{wide}\"}}");
        let objects = |between: &str| (0..100).map(object).collect::<Vec<_>>().join(between);
        let files = [
            (Format::Csv, table(',', "\n", "")),
            (Format::Csv, table(';', "\r\n", "\u{feff}sep=;\r\n")),
            (Format::Csv, table('\t', "\r", "")),
            (Format::Json, objects("\n")),
            (Format::Json, format!("[{}]", objects(","))),
            (Format::Json, objects("\n").replace('{', "{\n")),
        ];
        for (format, file) in files {
            let names = |from: Option<Position>| {
                let mut source = open(&file, format, from).unwrap();
                let (mut names, mut ends) = (Vec::new(), Vec::new());
                while let Some(batch) = source.batch().unwrap() {
                    let size: usize =
                        batch.rows.iter().map(|row| row.key.as_ref().unwrap().encoded_len()).sum();
                    assert!(size <= BYTES, "{size}");
                    names.extend(batch.rows.into_iter().map(|row| row.key.unwrap().name.unwrap()));
                    ends.push((batch.end, names.len()));
                }
                (names, ends)
            };
            let (all, ends) = names(None);
            assert_eq!(all, (0..100).map(|n| format!("n{n}")).collect::<Vec<_>>());
            assert!(ends.len() > 2, "a batch has room for {BYTES} bytes: {ends:?}");
            for (end, count) in ends {
                assert_eq!(names(Some(end)).0, all[count..]);
            }
        }
    }

    #[test]
    fn a_batch_has_as_many_rows_as_a_call_may() {
        let file = format!("sha256\n{}", format!("{HEX}\n").repeat(MOST + 1));
        let mut source = open(&file, Format::Csv, None).unwrap();
        let sizes: Vec<usize> =
            std::iter::from_fn(|| source.batch().unwrap()).map(|batch| batch.rows.len()).collect();
        assert_eq!(sizes, [MOST, 1]);
    }
}
