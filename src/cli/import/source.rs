//! The file of an import, read in batches that fit into one call each: never whole.

use std::io::{self, BufRead, Seek};

use clap::ValueEnum;
use prost::Message as _;
use serde_json::Value;

use super::{
    csv,
    lines::{Line, Lines, Position, trimmed},
    row::{Column, DefaultArgs, Draft},
};
use crate::{cli::failure::Failure, pb};

/// The most keys of one call.
pub(super) const MOST: usize = 1_000;
/// A call holds at most 4 MiB; so much of it is for keys.
const BYTES: usize = 3_500_000;

/// How rows stand in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Format {
    /// Comma-separated values with a header line
    Csv,
    /// A JSON object on each line
    Jsonl,
}

/// A row, read or not.
#[derive(Debug)]
pub(super) struct Row {
    /// The line on which it begins, from 1.
    pub(super) line: u64,
    /// As it stands in the file.
    pub(super) raw: Vec<u8>,
    /// The key, or why there is none.
    pub(super) key: Result<pb::ImportKey, String>,
}

/// Rows for one call.
#[derive(Debug)]
pub(super) struct Batch {
    pub(super) rows: Vec<Row>,
    /// Where the next batch begins.
    pub(super) end: Position,
}

/// A file of rows.
pub(super) struct Source<R> {
    lines: Lines<R>,
    format: Format,
    /// The header of a CSV file, as it stands there and as it is understood.
    header: String,
    columns: Vec<Column>,
    defaults: DefaultArgs,
    /// A row that was read and had no place in its batch.
    waiting: Option<Row>,
    /// Where reading stood before that row.
    before: Position,
}

impl<R: BufRead + Seek> Source<R> {
    /// Reads the header, if there is to be one, and goes to where the rows begin or go on.
    pub(super) fn open(
        input: R,
        format: Format,
        defaults: DefaultArgs,
        from: Option<Position>,
    ) -> Result<Source<R>, Failure> {
        let mut lines = Lines::new(input)?;
        let (mut header, mut columns) = (String::new(), Vec::new());
        if format == Format::Csv {
            (header, columns) = read_header(&mut lines)?;
        }
        if let Some(from) = from.filter(|from| from.bytes > lines.at().bytes) {
            lines.go_to(from)?;
        }
        let before = lines.at();
        Ok(Source { lines, format, header, columns, defaults, waiting: None, before })
    }

    /// The header of a CSV file, as it stands there.
    pub(super) fn header(&self) -> &str {
        &self.header
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
            self.before = self.lines.at();
            rows.push(row);
        }
        Ok((!rows.is_empty()).then_some(Batch { rows, end: self.before }))
    }

    fn next(&mut self) -> io::Result<Option<Row>> {
        if let Some(row) = self.waiting.take() {
            return Ok(Some(row));
        }
        match self.format {
            Format::Csv => self.next_csv(),
            Format::Jsonl => self.next_json(),
        }
    }

    fn next_csv(&mut self) -> io::Result<Option<Row>> {
        let Some(record) = csv::next(&mut self.lines)? else { return Ok(None) };
        let key = record.fields.map_err(str::to_owned).and_then(|fields| self.read_csv(&fields));
        Ok(Some(Row { line: record.line, raw: record.raw, key }))
    }

    fn read_csv(&self, fields: &[String]) -> Result<pb::ImportKey, String> {
        if fields.len() != self.columns.len() {
            return Err(format!("has {} fields; the header has {}", fields.len(), self.columns.len()));
        }
        let mut draft = Draft::default();
        for (column, text) in self.columns.iter().zip(fields) {
            draft.text(*column, text).map_err(|problem| format!("{}: {problem}", column.name()))?;
        }
        draft.finish(&self.defaults)
    }

    fn next_json(&mut self) -> io::Result<Option<Row>> {
        loop {
            let (line, mut raw) = (self.lines.at().lines + 1, Vec::new());
            let key = match self.lines.next(&mut raw)? {
                Line::End => return Ok(None),
                Line::TooLong => Err("the line is longer than 1 MiB".to_owned()),
                Line::Whole if raw.trim_ascii().is_empty() => continue,
                Line::Whole => read_json(&raw, &self.defaults),
            };
            raw.truncate(trimmed(&raw).len());
            return Ok(Some(Row { line, raw, key }));
        }
    }
}

fn read_json(line: &[u8], defaults: &DefaultArgs) -> Result<pb::ImportKey, String> {
    let Ok(Value::Object(fields)) = serde_json::from_slice(line) else {
        return Err("is no JSON object".to_owned());
    };
    let mut draft = Draft::default();
    for (name, value) in fields {
        let column = Column::parse(&name)
            .ok_or_else(|| format!("there is no field {name:?}; there are {}", Column::names()))?;
        draft.json(column, value).map_err(|problem| format!("{name}: {problem}"))?;
    }
    draft.finish(defaults)
}

/// The names of the columns; without all of them understood no row is.
fn read_header<R: BufRead + Seek>(lines: &mut Lines<R>) -> Result<(String, Vec<Column>), Failure> {
    let wrong = |problem: String| {
        let hint = format!("the first line names the columns: {}", Column::names());
        Failure::usage(format!("the file's header: {problem}")).hint(hint)
    };
    let record = csv::next(lines)?.ok_or_else(|| wrong("the file is empty".to_owned()))?;
    let names = record.fields.map_err(|problem| wrong(problem.to_owned()))?;
    let mut columns = Vec::new();
    for name in &names {
        let name = name.trim();
        // Not the name itself where it is none: a file without a header begins with a row.
        let short = name.len() <= 32 && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
        let shown =
            if short { format!("there is no column {name:?}") } else { "it names no columns".to_owned() };
        let column = Column::parse(name).ok_or_else(|| wrong(shown))?;
        if column != Column::Remark && columns.contains(&column) {
            return Err(wrong(format!("{name} stands there twice")));
        }
        columns.push(column);
    }
    if !columns.contains(&Column::Sha256) {
        return Err(wrong("the column sha256 is missing".to_owned()));
    }
    Ok((String::from_utf8_lossy(&record.raw).into_owned(), columns))
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use super::*;

    const HEX: &str = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08";

    fn open(file: &str, format: Format, from: Option<Position>) -> Result<Source<Cursor<Vec<u8>>>, String> {
        let input = Cursor::new(file.as_bytes().to_vec());
        Source::open(input, format, DefaultArgs::default(), from).map_err(|failure| failure.to_string())
    }

    fn rows(file: &str, format: Format) -> Vec<Row> {
        open(file, format, None).unwrap().batch().unwrap().map(|batch| batch.rows).unwrap_or_default()
    }

    #[test]
    fn a_header_that_is_not_understood_stops_everything() {
        for (file, problem) in [
            ("", "the file is empty"),
            ("sha256,scope\n", "there is no column \"scope\""),
            ("name,account\n", "sha256 is missing"),
            ("sha256,name,name\n", "name stands there twice"),
            ("kw_live_not-a-name,x\n", "it names no columns"),
        ] {
            let error = open(file, Format::Csv, None).err().unwrap();
            assert!(error.contains(problem) && error.contains("account, user, environment"), "{error}");
        }
    }

    #[test]
    fn a_wrong_row_does_not_stop_the_others() {
        let file = format!("account,sha256\nacme,{HEX}\nacme\nacme,kw_x\n\nacme,{HEX}\n");
        let rows = rows(&file, Format::Csv);
        let told: Vec<_> = rows.iter().map(|row| (row.line, row.key.is_ok())).collect();
        assert_eq!(told, [(2, true), (3, false), (4, false), (6, true)]);
        assert_eq!(rows[1].key.as_ref().unwrap_err(), "has 1 fields; the header has 2");
        let error = rows[2].key.as_ref().unwrap_err();
        assert!(error.starts_with("sha256: write the SHA-256") && !error.contains("kw_x"), "{error}");
    }

    #[test]
    fn json_lines_are_told_what_is_wrong_without_their_values() {
        let file = format!(
            "{{\"account\":\"acme\",\"sha256\":\"{HEX}\"}}\n[1]\n{{\"token\":\"kw_x\"}}\n{{\"name\":[\"kw_x\"]}}\n"
        );
        let problems: Vec<_> = rows(&file, Format::Jsonl).into_iter().map(|row| row.key.err()).collect();
        assert_eq!(problems[0], None);
        assert_eq!(problems[1].as_deref(), Some("is no JSON object"));
        assert!(
            problems[2].as_ref().is_some_and(|p| p.contains("no field \"token\"") && !p.contains("kw_x"))
        );
        assert_eq!(problems[3].as_deref(), Some("name: write a text"));
    }

    #[test]
    fn reading_goes_on_where_a_batch_ended() {
        let wide = "a:b ".repeat(25_000);
        let row = |n: usize| format!("n{n},{HEX},{wide}\n");
        let file = format!("name,sha256,scopes\n{}", (0..100).map(row).collect::<String>());
        let names = |from: Option<Position>| {
            let mut source = open(&file, Format::Csv, from).unwrap();
            let (mut names, mut ends) = (Vec::new(), Vec::new());
            while let Some(batch) = source.batch().unwrap() {
                let size: usize = batch.rows.iter().map(|row| row.key.as_ref().unwrap().encoded_len()).sum();
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
            assert_eq!(end.lines as usize, count + 1);
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
